"""The kernel of the fused training step: embedding, norms, both mixers, head and loss of one sequence, and back, before the next sequence starts.

All of it stays in cache. A layer is one of Mamba or attention, told apart by the type of its plan when the kernel is compiled.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from .attention import AttentionLayer, AttentionPlan, attention_backward, attention_close, attention_forward, attention_open
from .dense import (Norm, NormPlan, cross_entropy, norm_backward, norm_close, norm_forward, norm_open, outer, padded, product, put, room, row,
                    set_row, transposed, view, wide)
from .lanes import ONE, ZERO
from .mamba_step import MambaLayer, MambaPlan, mamba_backward, mamba_close, mamba_forward, mamba_open
from .parts import PART, maker, part, whole


class StepPlan(NamedTuple):
    """What the kernel knows of a model: its layers, norms, and where the other parameters begin in the flat ones (negative: there is none)."""

    first: MambaPlan | AttentionPlan
    last: MambaPlan | AttentionPlan
    norms: tuple[NormPlan, NormPlan, NormPlan]
    positions: int
    head: int
    head_bias: int


class Head(NamedTuple):
    """The last norm's output to logits: weights, gradients, and one row of logits."""

    weight: np.ndarray    # (d, K)
    weight_T: np.ndarray
    bias: np.ndarray      # (1, K)
    dweight: np.ndarray   # (K, d)
    dbias: np.ndarray
    logits: np.ndarray
    dlogits: np.ndarray


def is_mamba(layer):
    """Whether a plan or layer, known by its type, is one of Mamba."""
    return layer.instance_class in (MambaPlan, MambaLayer)


def layer_open(plan, flat, length, V, norm):
    """For compiled code: `mamba_open` or `attention_open`."""


def layer_forward(layer, tokens, h, x):
    """For compiled code: `mamba_forward` or `attention_forward`."""


def layer_backward(layer, tokens, dx, h, dh):
    """For compiled code: `mamba_backward` or `attention_backward`."""


def layer_close(layer, flat, norm):
    """For compiled code: `mamba_close` or `attention_close`."""


@overload(layer_open, jit_options=PART)
def typed_open(plan, flat, length, V, norm):
    """`layer_open` by the type of plan."""
    chosen = mamba_open if is_mamba(plan) else attention_open
    return lambda plan, flat, length, V, norm: chosen(plan, flat, length, V, norm)


@overload(layer_forward, jit_options=PART)
def typed_forward(layer, tokens, h, x):
    """`layer_forward` by the type of layer."""
    chosen = mamba_forward if is_mamba(layer) else attention_forward
    return lambda layer, tokens, h, x: chosen(layer, tokens, h, x)


@overload(layer_backward, jit_options=PART)
def typed_backward(layer, tokens, dx, h, dh):
    """`layer_backward` by the type of layer."""
    chosen = mamba_backward if is_mamba(layer) else attention_backward
    return lambda layer, tokens, dx, h, dh: chosen(layer, tokens, dx, h, dh)


@overload(layer_close, jit_options=PART)
def typed_close(layer, flat, norm):
    """`layer_close` by the type of layer."""
    chosen = mamba_close if is_mamba(layer) else attention_close
    return lambda layer, flat, norm: chosen(layer, flat, norm)


@maker
def head_open(plan, P, K, d):
    """The head at work: its weight (K, d) and bias from the parameters P."""
    weight = view(P, plan.head, K, d)
    return Head(transposed(weight, 0, K), padded(weight, 0, K), row(P, plan.head_bias, K), np.zeros((wide(K), wide(d)), np.float32), room(1, K),
                room(1, K), room(1, K))


class Model(NamedTuple):
    """A model at work in one thread: its parts, and arrays of one sequence that are used again for the next."""

    plan: StepPlan
    norms: tuple[Norm, Norm, Norm]
    lower: MambaLayer | AttentionLayer
    upper: MambaLayer | AttentionLayer
    head: Head
    x: np.ndarray   # (length, d)
    dx: np.ndarray
    dh: np.ndarray
    r: np.ndarray   # (1, d), the last place
    dr: np.ndarray
    df: np.ndarray


@maker
def model_open(plan, P, V, length):
    """The model at work on sequences of one length, with the parameters P and the embeddings V (K, d)."""
    K, d = V.shape
    norms = (norm_open(plan.norms[0], P, K if plan.first.table else length), norm_open(plan.norms[1], P, length), norm_open(plan.norms[2], P, 1))
    return Model(plan, norms, layer_open(plan.first, P, length, V, norms[0]), layer_open(plan.last, P, length, V, norms[1]), head_open(plan, P, K, d),
                 room(length, d), room(length, d), room(length, d), room(1, d), room(1, d), room(1, d))


@part
def forward(m, tokens, V, P, logits):
    """Logits (K,) of one sequence."""
    x, positions, length, (K, d) = m.x, m.plan.positions, len(tokens), V.shape
    for t in range(length):
        for k in range(d):
            x[t, k] = V[tokens[t], k] + (P[positions + t * d + k] if positions >= 0 else ZERO)
    if not m.plan.first.table:
        norm_forward(m.norms[0], x, length)
    layer_forward(m.lower, tokens, m.norms[0].out, x)
    norm_forward(m.norms[1], x, length)
    for k in range(d):
        m.r[0, k] = x[length - 1, k]
    layer_forward(m.upper, tokens, m.norms[1].out, m.r)
    norm_forward(m.norms[2], m.r, 1)
    product(m.norms[2].out, 1, m.head.weight, m.head.logits, False)
    for k in range(K):
        logits[k] = m.head.logits[0, k] + m.head.bias[0, k]


@part
def backward(m, tokens, V, gradient):
    """Gradients of one sequence from head.dlogits, added up in the parts of the model; those of the positions in `gradient`."""
    dx, dr, positions, length, (K, d) = m.dx, m.dr, m.plan.positions, len(tokens), V.shape
    for k in range(K):
        m.head.dbias[0, k] += m.head.dlogits[0, k]
    outer(m.head.dlogits, K, m.norms[2].out, 1, m.head.dweight)
    product(m.head.dlogits, 1, m.head.weight_T, m.df, False)
    dr[:], dx[:] = ZERO, ZERO
    norm_backward(m.norms[2], m.df, 1, dr)
    layer_backward(m.upper, tokens, dr, m.norms[1].out, m.dh)
    norm_backward(m.norms[1], m.dh, length, dx)
    for k in range(d):
        dx[length - 1, k] += dr[0, k]
    layer_backward(m.lower, tokens, dx, m.norms[0].out, m.dh)
    if not m.plan.first.table:
        norm_backward(m.norms[0], m.dh, length, dx)
    if positions >= 0:
        for t in range(length):
            for k in range(d):
                gradient[positions + t * d + k] += dx[t, k]


@maker
def model_close(m, gradient, K, d):
    """Write the gradients where the parameters stand."""
    layer_close(m.lower, gradient, m.norms[0])
    layer_close(m.upper, gradient, m.norms[1])
    for norm in m.norms:
        norm_close(norm, gradient)
    put(m.head.dweight, K, d, view(gradient, m.plan.head, K, d))
    set_row(gradient, m.plan.head_bias, m.head.dbias, K)


@whole
def step(first, last, tokens, values, V, plan, P, G, logits, losses):
    """Logits (batch, K) of the sequences first .. last - 1 of a batch and, where there are values, losses and the gradient of the batch's mean loss.

    tokens (batch, length); values (batch,), or none; V (K, d); P: flat parameters; G (threads, parameters), zeros: one gradient for each thread.
    """
    (batch, length), (K, d) = tokens.shape, V.shape
    gradient, m = G[(first * len(G) + batch - 1) // batch], model_open(plan, P, V, length)
    for i in range(first, last):
        forward(m, tokens[i], V, P, logits[i])
        if len(values):
            losses[i] = cross_entropy(logits[i], values[i], ONE / np.float32(batch), m.head.dlogits)
            backward(m, tokens[i], V, gradient)
    if len(values):
        model_close(m, gradient, K, d)
