"""Causal softmax attention for narrow heads, one sequence at a time, as a mixer of the fused training step; elsewhere attention is plain PyTorch.

The head width E goes by type, so that the loops over it are unrolled; `LANES` keys stand side by side. Probabilities are computed again in backward.
"""

from typing import NamedTuple

import numpy as np

from .dense import LANES, outer, padded, product, put, room, transposed, view, wide
from .lanes import LOG2E, ONE, ZERO, WidthValue, fill, lane_exp2, lane_max, lane_sum, lane_top, load, size_of, store
from .parts import maker, part

BAR = np.zeros((1, 2 * LANES.size), np.float32)
BAR[0, LANES.size :] = -np.inf  # load(LANES, BAR, 0, LANES - 1 - k) lets the lanes 0 .. k pass


class Block(NamedTuple):
    """Keys and values of one head and their gradients, (E, whole vectors), and one row of scores."""

    keys: np.ndarray
    values: np.ndarray
    dkeys: np.ndarray
    dvalues: np.ndarray
    scores: np.ndarray


@maker
def attend_room(E, length):
    """Room for one head over sequences of one length."""
    arrays = np.empty((4, size_of(E), wide(length)), np.float32)
    return Block(arrays[0], arrays[1], arrays[2], arrays[3], np.empty((1, wide(length)), np.float32))


@part
def head_transposed(E, x, first, out):
    """out (E, whole vectors) = x[:, first : first + E] transposed, zeros behind the end."""
    out[:] = ZERO
    for t in range(x.shape[0]):
        for e in range(size_of(E)):
            out[e, t] = x[t, first + e]


@part
def score(E, q, t, first, scale, keys, s):
    """Scores of query t against the keys s, s + 1 ... of one vector, in units of log 2, -inf for keys after t."""
    total = fill(LANES, ZERO)
    for e in range(size_of(E)):
        total = total + load(LANES, keys, e, s) * (q[t, first + e] * scale)
    if s + size_of(LANES) > t:
        total = total + load(LANES, BAR, 0, size_of(LANES) - 1 - (t - s))
    return total


@part
def attend(E, qkv, out, lse, block):
    """out (queries, heads E): attention of the last `queries` places; lse (heads, queries): the log2 of each softmax's denominator.

    qkv (length, 3 heads E and more): queries, keys, values, each head by head.
    """
    scale = LOG2E / np.float32(np.sqrt(size_of(E)))
    keys, values, p = block.keys, block.values, block.scores
    (heads, queries), length = lse.shape, qkv.shape[0]
    d = heads * size_of(E)
    for head in range(heads):
        head_transposed(E, qkv, d + head * size_of(E), keys)
        head_transposed(E, qkv, 2 * d + head * size_of(E), values)
        for t in range(length - queries, length):
            r = t - length + queries
            top = fill(LANES, np.float32(-np.inf))
            for s in range(0, t + 1, size_of(LANES)):
                x = score(E, qkv, t, head * size_of(E), scale, keys, s)
                store(LANES, p, 0, s, x)
                top = lane_max(top, x)
            highest = lane_top(top)
            total = fill(LANES, ZERO)
            for s in range(0, t + 1, size_of(LANES)):
                x = lane_exp2(load(LANES, p, 0, s) - highest)
                store(LANES, p, 0, s, x)
                total = total + x
            denominator = lane_sum(total)
            lse[head, r] = highest + np.float32(np.log2(denominator))
            for e in range(size_of(E)):
                total = fill(LANES, ZERO)
                for s in range(0, t + 1, size_of(LANES)):
                    total = total + load(LANES, p, 0, s) * load(LANES, values, e, s)
                out[r, head * size_of(E) + e] = lane_sum(total) / denominator


@part
def attend_backward(E, qkv, out, lse, dout, dqkv, block):
    """dqkv from dout and what `attend` gave."""
    scale = LOG2E / np.float32(np.sqrt(size_of(E)))
    keys, values, dkeys, dvalues, ds = block
    (heads, queries), length = lse.shape, qkv.shape[0]
    d = heads * size_of(E)
    for head in range(heads):
        first = head * size_of(E)
        head_transposed(E, qkv, d + first, keys)
        head_transposed(E, qkv, 2 * d + first, values)
        dkeys[:], dvalues[:] = ZERO, ZERO
        dqkv[: length - queries, first : first + size_of(E)] = ZERO
        for t in range(length - queries, length):
            r = t - length + queries
            mean = ZERO
            for e in range(size_of(E)):
                mean += dout[r, first + e] * out[r, first + e]
            for s in range(0, t + 1, size_of(LANES)):
                p = lane_exp2(score(E, qkv, t, first, scale, keys, s) - lse[head, r])
                dp = fill(LANES, ZERO)
                for e in range(size_of(E)):
                    dp = dp + load(LANES, values, e, s) * dout[r, first + e]
                    store(LANES, dvalues, e, s, load(LANES, dvalues, e, s) + p * dout[r, first + e])
                g = p * (dp - mean) * (scale / LOG2E)
                store(LANES, ds, 0, s, g)
                for e in range(size_of(E)):
                    store(LANES, dkeys, e, s, load(LANES, dkeys, e, s) + g * qkv[t, first + e])
            for e in range(size_of(E)):
                total = fill(LANES, ZERO)
                for s in range(0, t + 1, size_of(LANES)):
                    total = total + load(LANES, ds, 0, s) * load(LANES, keys, e, s)
                dqkv[t, first + e] = lane_sum(total)
        for t in range(length):
            for e in range(size_of(E)):
                dqkv[t, d + first + e] = dkeys[e, t]
                dqkv[t, 2 * d + first + e] = dvalues[e, t]


@part
def rotate(qkv, d, cos, sin, sign):
    """Turn neighbouring pairs of queries and keys by the angles of their place, cos and sin (length, pairs of a head); none for NoPE."""
    for t in range(min(len(qkv), len(cos))):
        for c in range(0, 2 * d, 2):
            pair = c // 2 % cos.shape[1]
            x, y = qkv[t, c], qkv[t, c + 1]
            qkv[t, c] = x * cos[t, pair] - sign * y * sin[t, pair]
            qkv[t, c + 1] = y * cos[t, pair] + sign * x * sin[t, pair]


# The layer of a step

class AttentionPlan(NamedTuple):
    """What the step knows of an attention layer: where its weights begin in the flat parameters, its shape and angles."""

    qkv: int
    out: int
    E: WidthValue
    heads: int
    cos: np.ndarray  # (length, E / 2), or no rows for NoPE
    sin: np.ndarray
    last: bool       # whether the output is needed at the last place alone
    table: bool      # always False: see MambaPlan


class AttentionWeights(NamedTuple):
    """The matrices of an attention layer, each as x @ it wants it, and transposed."""
    qkv: np.ndarray   # (d, 3 d): x @ qkv
    qkv_T: np.ndarray
    out: np.ndarray   # (d, d)
    out_T: np.ndarray


class AttentionGradients(NamedTuple):
    """Gradients of both, laid out as the parameters lie."""
    qkv: np.ndarray
    out: np.ndarray


class AttentionLayer(NamedTuple):
    """An attention layer at work in one thread; arrays of one sequence are used again for the next."""

    plan: AttentionPlan
    weights: AttentionWeights
    gradients: AttentionGradients
    qkv: np.ndarray   # (length, 3 d)
    dqkv: np.ndarray
    out: np.ndarray   # (queries, d)
    dout: np.ndarray
    lse: np.ndarray   # (heads, queries)
    block: Block


@maker
def attention_open(plan, flat, length, V, norm):
    """The layer for sequences of one length; V and norm are for `mamba_open`."""
    d, queries = plan.heads * size_of(plan.E), 1 if plan.last else length
    W_qkv, W_out = view(flat, plan.qkv, 3 * d, d), view(flat, plan.out, d, d)
    weights = AttentionWeights(transposed(W_qkv, 0, 3 * d), padded(W_qkv, 0, 3 * d), transposed(W_out, 0, d), padded(W_out, 0, d))
    gradients = AttentionGradients(np.zeros((wide(3 * d), wide(d)), np.float32), np.zeros((wide(d), wide(d)), np.float32))
    return AttentionLayer(plan, weights, gradients, room(length, 3 * d), room(length, 3 * d), room(queries, d), room(queries, d),
                          np.empty((plan.heads, queries), np.float32), attend_room(plan.E, length))


@part
def attention_forward(layer, tokens, h, x):
    """x (queries, d), the last places, += attention of h (length, d); tokens are for `mamba_forward`."""
    plan, length, queries = layer.plan, len(layer.qkv), len(layer.out)
    product(h, length, layer.weights.qkv, layer.qkv, False)
    rotate(layer.qkv, plan.heads * size_of(plan.E), plan.cos, plan.sin, ONE)
    attend(plan.E, layer.qkv, layer.out, layer.lse, layer.block)
    product(layer.out, queries, layer.weights.out, x, True)


@part
def attention_backward(layer, tokens, dx, h, dh):
    """dh (length, d) from dx (queries, d)."""
    plan, length, queries = layer.plan, len(layer.qkv), len(layer.out)
    d = plan.heads * size_of(plan.E)
    outer(dx, d, layer.out, queries, layer.gradients.out)
    product(dx, queries, layer.weights.out_T, layer.dout, False)
    attend_backward(plan.E, layer.qkv, layer.out, layer.lse, layer.dout, layer.dqkv, layer.block)
    rotate(layer.dqkv, d, plan.cos, plan.sin, -ONE)
    outer(layer.dqkv, 3 * d, h, length, layer.gradients.qkv)
    product(layer.dqkv, length, layer.weights.qkv_T, dh, False)


@maker
def attention_close(layer, flat, norm):
    """Write the gradients where the parameters stand."""
    plan = layer.plan
    d = plan.heads * size_of(plan.E)
    put(layer.gradients.qkv, 3 * d, d, view(flat, plan.qkv, 3 * d, d))
    put(layer.gradients.out, d, d, view(flat, plan.out, d, d))
