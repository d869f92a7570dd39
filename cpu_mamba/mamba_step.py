"""Mamba as a mixer of the fused training step, one sequence at a time: as the first layer of a model or as its last.

The first layer of a model without positions sees K different inputs only, so norm, in_proj and gate are taken once for each (`Table`), and the scan
gives every place. Of the last layer the output at the last place alone is needed: its gate and C are taken there only, and the recurrence unrolls to
h_n = sum_t exp(A sum_{s>t} delta_s) delta_t B_t u_t (`End`). All else is one piece of code.
"""

from typing import NamedTuple

import numpy as np

from . import last_state, scan
from .conv import conv, conv_backward
from .dense import LANES, norm_backward, norm_forward, outer, padded, product, put, room, row, set_row, transposed, view, wide
from .lanes import LOG2E, ONE, ZERO, lane_sigmoid, lane_sum, load, size_of, store
from .parts import maker, part
from .scan import STATES

inside, inside_backward = maker(scan.inside.py_func), maker(scan.inside_backward.py_func)
end_state, end_state_backward = maker(last_state.end_state.py_func), maker(last_state.end_state_backward.py_func)


class MambaPlan(NamedTuple):
    """What the step knows of a Mamba layer: where each parameter begins in the flat ones (negative: there is none), and its shape."""

    A_log: int
    D: int
    in_proj: int
    conv_weight: int
    conv_bias: int
    x_proj: int
    dt_proj: int
    dt_bias: int
    out_proj: int
    d: int
    dim: int      # d_inner, a multiple of LANES
    N: int        # d_state
    R: int        # dt_rank
    width: int    # d_conv
    table: bool   # whether it is the first layer, whose inputs are those of a table ...
    last: bool    # ... or the last, whose output is needed at the last place alone


class MambaWeights(NamedTuple):
    """Matrices as `product` wants them; of the last layer `low` has no columns for C."""

    A: np.ndarray     # (blocks, N, LANES)
    scan: scan.Weights
    taps: np.ndarray  # (d_conv, dim)
    conv_bias: np.ndarray
    in_x: np.ndarray  # (d, dim)
    in_x_T: np.ndarray
    in_z: np.ndarray
    in_z_T: np.ndarray
    low: np.ndarray   # (dim, columns)
    low_T: np.ndarray
    C: np.ndarray     # (dim, N)
    C_T: np.ndarray
    out: np.ndarray   # (dim, d)
    out_T: np.ndarray


class MambaGradients(NamedTuple):
    """Gradients of the weights of a layer, added to from sequence to sequence."""
    scan: scan.Gradients
    conv: np.ndarray  # (d_conv + 1, dim), the bias in the last row
    in_x: np.ndarray  # (dim, d), as the parameters lie; so the others
    in_z: np.ndarray
    low: np.ndarray
    C: np.ndarray
    out: np.ndarray


class Table(NamedTuple):
    """Of the first layer, (K, dim): x and the gate SiLU(z) of each token, the slope of the gate, and the gradients of x and z."""

    x: np.ndarray
    gate: np.ndarray
    slope: np.ndarray
    dx: np.ndarray
    dz: np.ndarray


class End(NamedTuple):
    """Of the last layer, at the last place: (1, dim), C (1, N), the state (blocks, N, LANES), and gradients."""

    y: np.ndarray
    z: np.ndarray
    out: np.ndarray
    dy: np.ndarray
    dz: np.ndarray
    dout: np.ndarray
    C: np.ndarray
    dC: np.ndarray
    h: np.ndarray
    dh: np.ndarray


class Sequence(NamedTuple):
    """Of one sequence, (length, dim), low (length, columns); used again for the next."""

    x: np.ndarray
    u: np.ndarray
    slope: np.ndarray
    y: np.ndarray      # of the first layer: the scan's output, and that times the gate
    out: np.ndarray
    dx: np.ndarray
    du: np.ndarray
    low: np.ndarray
    dlow: np.ndarray
    marks: np.ndarray
    blocks: np.ndarray  # (2, length + d_conv - 1, LANES)
    scan: scan.Scratch


class MambaLayer(NamedTuple):
    """A Mamba layer at work in one thread."""

    plan: MambaPlan
    layout: scan.Layout
    weights: MambaWeights
    gradients: MambaGradients
    sequence: Sequence
    table: Table
    end: End


@part
def columns(plan):
    """Columns of x_proj that are taken at every place: step sizes, B and, but for the last layer, C."""
    return plan.R + plan.N if plan.last else plan.R + 2 * plan.N


@part
def states(plan):
    """States, filled up to whole tiles."""
    return (plan.N + size_of(STATES) - 1) // size_of(STATES) * size_of(STATES)


@maker
def weights_of(plan, flat):
    """The weights of a layer from the parameters `flat`, laid out for the kernels."""
    d, dim, N, R, low = plan.d, plan.dim, plan.N, plan.R, columns(plan)
    A = np.zeros((2, dim // size_of(LANES), states(plan), size_of(LANES)), np.float32)
    for c in range(dim):
        for n in range(N):
            a, block, lane = -np.exp(flat[plan.A_log + c * N + n]), c // size_of(LANES), c % size_of(LANES)
            A[0, block, n, lane], A[1, block, n, lane] = a, a * LOG2E
    W_in, W_x, W_out = view(flat, plan.in_proj, 2 * dim, d), view(flat, plan.x_proj, R + 2 * N, dim), view(flat, plan.out_proj, d, dim)
    inner = scan.Weights(transposed(view(flat, plan.dt_proj, dim, R), 0, dim), row(flat, plan.dt_bias, dim), A[1], row(flat, plan.D, dim))
    return MambaWeights(A[0], inner, transposed(view(flat, plan.conv_weight, dim, plan.width), 0, dim), row(flat, plan.conv_bias, dim),
                   transposed(W_in, 0, dim), padded(W_in, 0, dim), transposed(W_in, dim, 2 * dim), padded(W_in, dim, 2 * dim),
                   transposed(W_x, 0, low), padded(W_x, 0, low), transposed(W_x, R + N, R + 2 * N), padded(W_x, R + N, R + 2 * N),
                   transposed(W_out, 0, d), padded(W_out, 0, d))


@maker
def gradients_of(plan):
    """Zeros for the gradients of a layer."""
    d, dim = plan.d, plan.dim
    inner = scan.Gradients(np.zeros((plan.R + 1, dim), np.float32), np.zeros((dim // size_of(LANES), states(plan), size_of(LANES)), np.float32),
                           np.zeros((1, dim), np.float32))
    in_x, in_z = np.zeros((dim, wide(d)), np.float32), np.zeros((dim, wide(d)), np.float32)
    low, C = np.zeros((wide(columns(plan)), dim), np.float32), np.zeros((wide(plan.N), dim), np.float32)
    return MambaGradients(inner, np.zeros((plan.width + 1, dim), np.float32), in_x, in_z, low, C, np.zeros((wide(d), dim), np.float32))


@maker
def sequence_of(plan, length):
    """Room for one sequence of `length` tokens in a layer."""
    dim, blocks, low, whole = plan.dim, plan.dim // size_of(LANES), columns(plan), 0 if plan.last else length
    marks = np.empty((scan.marks_rows(whole, blocks, states(plan)) if whole else 0, size_of(LANES)), np.float32)
    return Sequence(room(length, dim), room(length, dim), room(length, dim), room(whole, dim), room(whole, dim), room(length, dim), room(length, dim),
                    room(length, low), room(length, low), marks, np.empty((2, length + plan.width - 1, size_of(LANES)), np.float32),
                    scan.scratch_of(LANES, STATES, length, blocks, states(plan), plan.R))


@maker
def mamba_open(plan, flat, length, V, norm):
    """The layer for sequences of one length. As the first of a model it takes the norm of the K embeddings V, (K, d), here."""
    dim, N, K = plan.dim, plan.N, len(V) if plan.table else 0
    weights = weights_of(plan, flat)
    table = Table(room(K, dim), room(K, dim), room(K, dim), room(K, dim), room(K, dim))
    if plan.table:
        norm_forward(norm, V, K)
        product(norm.out, K, weights.in_x, table.x, False)
        product(norm.out, K, weights.in_z, table.gate, False)
        for k in range(K):
            for c in range(0, dim, size_of(LANES)):
                z = load(LANES, table.gate, k, c)
                s = lane_sigmoid(z)
                store(LANES, table.gate, k, c, z * s)
                store(LANES, table.slope, k, c, s * (z * (ONE - s) + ONE))
    at_end = np.zeros((6, 1, dim + size_of(LANES)), np.float32)
    h = np.zeros((2, dim // size_of(LANES), states(plan), size_of(LANES)), np.float32)
    end = End(at_end[0], at_end[1], at_end[2], at_end[3], at_end[4], at_end[5], room(1, N), room(1, N), h[0], h[1])
    layout = scan.Layout(True, False, N, plan.R, plan.R + N, 0)
    return MambaLayer(plan, layout, weights, gradients_of(plan), sequence_of(plan, length), table, end)


@part
def all_outputs(layer, tokens):
    """out (length, dim): scan, skip and gate at every place."""
    s, table = layer.sequence, layer.table
    inside(LANES, STATES, layer.layout, layer.weights.scan, scan.Inputs(s.u, s.low, s.low, s.u), s.y, scan.Kept(s.y, s.marks), s.scan)
    for t in range(len(tokens)):
        for c in range(0, layer.plan.dim, size_of(LANES)):
            store(LANES, s.out, t, c, load(LANES, s.y, t, c) * load(LANES, table.gate, tokens[t], c))


@part
def all_outputs_backward(layer, tokens, dout):
    """du, dlow and gradients of weights from dout (length, dim), which it takes through the gate."""
    s, table = layer.sequence, layer.table
    for t in range(len(tokens)):
        for c in range(0, layer.plan.dim, size_of(LANES)):
            here, k = load(LANES, dout, t, c), tokens[t]
            store(LANES, table.dz, k, c, load(LANES, table.dz, k, c) + here * load(LANES, s.y, t, c))
            store(LANES, dout, t, c, here * load(LANES, table.gate, k, c))
    inside_backward(LANES, STATES, layer.layout, layer.weights.scan, scan.Inputs(s.u, s.low, s.low, s.u), scan.Kept(s.y, s.marks), dout,
                         scan.Inputs(s.du, s.dlow, s.dlow, s.du), layer.gradients.scan, s.scan)


@part
def end_output(layer, h):
    """end.out (1, dim): scan, skip and gate at the last place alone."""
    s, w, end, last = layer.sequence, layer.weights, layer.end, len(layer.sequence.x) - 1
    end_state(LANES, STATES, layer.layout, w.scan, scan.Inputs(s.u, s.low, s.low, s.u), end.h, s.scan)
    product(h[last:], 1, w.in_z, end.z, False)
    product(s.u[last:], 1, w.C, end.C, False)
    for block in range(len(end.h)):
        c = block * size_of(LANES)
        y = load(LANES, w.scan.skip, 0, c) * load(LANES, s.u, last, c)
        for n in range(layer.plan.N):
            y = y + load(LANES, end.h[block], n, 0) * end.C[0, n]
        z = load(LANES, end.z, 0, c)
        store(LANES, end.y, 0, c, y)
        store(LANES, end.out, 0, c, y * z * lane_sigmoid(z))


@part
def end_output_backward(layer):
    """du and dlow but for the direct way from the last place, which goes to end.dy; end.dz and gradients of weights, from end.dout."""
    s, w, g, end, last, N = layer.sequence, layer.weights, layer.gradients, layer.end, len(layer.sequence.x) - 1, layer.plan.N
    end.dC[:] = ZERO
    for block in range(len(end.h)):
        c = block * size_of(LANES)
        z, dout = load(LANES, end.z, 0, c), load(LANES, end.dout, 0, c)
        sigmoid = lane_sigmoid(z)
        dy = dout * z * sigmoid
        store(LANES, end.dz, 0, c, dout * load(LANES, end.y, 0, c) * sigmoid * (z * (ONE - sigmoid) + ONE))
        store(LANES, g.scan.skip, 0, c, load(LANES, g.scan.skip, 0, c) + dy * load(LANES, s.u, last, c))
        store(LANES, end.dy, 0, c, dy * load(LANES, w.scan.skip, 0, c))
        for n in range(N):
            end.dC[0, n] += lane_sum(load(LANES, end.h[block], n, 0) * dy)
            store(LANES, end.dh[block], n, 0, dy * end.C[0, n])
    end_state_backward(LANES, STATES, layer.layout, w.scan, scan.Inputs(s.u, s.low, s.low, s.u), end.dh, scan.Inputs(s.du, s.dlow, s.dlow, s.du),
                            g.scan, s.scan)
    product(end.dC, 1, w.C_T, end.dy, True)
    outer(end.dC, N, s.u[last:], 1, g.C)


@part
def mamba_forward(layer, tokens, h, x):
    """x += the layer's output: of the first for the given tokens, x (length, d); of the last from h (length, d), x (1, d)."""
    plan, s, w, length = layer.plan, layer.sequence, layer.weights, len(tokens)
    if plan.table:
        for t in range(length):
            for c in range(0, plan.dim, size_of(LANES)):
                store(LANES, s.x, t, c, load(LANES, layer.table.x, tokens[t], c))
    else:
        product(h, length, w.in_x, s.x, False)
    conv(LANES, s.x, w.taps, w.conv_bias, True, s.u, s.slope, s.blocks[0])
    product(s.u, length, w.low, s.low, False)
    if plan.last:
        end_output(layer, h)
        product(layer.end.out, 1, w.out, x, True)
    else:
        all_outputs(layer, tokens)
        product(s.out, length, w.out, x, True)


@part
def mamba_backward(layer, tokens, dx, h, dh):
    """Gradients of weights, and dh (length, d) of the last layer, from dx, shaped as x in `mamba_forward`."""
    plan, s, w, g, end, length = layer.plan, layer.sequence, layer.weights, layer.gradients, layer.end, len(tokens)
    if plan.last:
        outer(dx, plan.d, end.out, 1, g.out)
        product(dx, 1, w.out_T, end.dout, False)
        end_output_backward(layer)
    else:
        outer(dx, plan.d, s.out, length, g.out)
        product(dx, length, w.out_T, s.dx, False)  # dout for now
        all_outputs_backward(layer, tokens, s.dx)
    outer(s.dlow, columns(plan), s.u, length, g.low)
    product(s.dlow, length, w.low_T, s.du, True)
    if plan.last:
        for c in range(0, plan.dim, size_of(LANES)):
            store(LANES, s.du, length - 1, c, load(LANES, s.du, length - 1, c) + load(LANES, end.dy, 0, c))
    conv_backward(LANES, s.x, w.taps, s.slope, s.du, s.dx, g.conv, s.blocks[0], s.blocks[1])
    if plan.table:
        for t in range(length):
            for c in range(0, plan.dim, size_of(LANES)):
                store(LANES, layer.table.dx, tokens[t], c, load(LANES, layer.table.dx, tokens[t], c) + load(LANES, s.dx, t, c))
    else:
        outer(s.dx, plan.dim, h, length, g.in_x)
        outer(end.dz, plan.dim, h[length - 1 :], 1, g.in_z)
        product(s.dx, length, w.in_x_T, dh, False)
        product(end.dz, 1, w.in_z_T, dh[length - 1 :], True)


@maker
def table_close(layer, norm):
    """What the table's gradients mean for in_proj and the norm before it."""
    plan, w, g, table, K = layer.plan, layer.weights, layer.gradients, layer.table, len(layer.table.x)
    for k in range(K):
        for c in range(0, plan.dim, size_of(LANES)):
            store(LANES, table.dz, k, c, load(LANES, table.dz, k, c) * load(LANES, table.slope, k, c))
    dh = room(K, plan.d)
    outer(table.dx, plan.dim, norm.out, K, g.in_x)
    product(table.dx, K, w.in_x_T, dh, True)
    outer(table.dz, plan.dim, norm.out, K, g.in_z)
    product(table.dz, K, w.in_z_T, dh, True)
    norm_backward(norm, dh, K, room(K, plan.d))


@maker
def mamba_close(layer, flat, norm):
    """Write the gradients where the parameters stand; those of the first layer's norm go to `norm`."""
    plan, A, g, low = layer.plan, layer.weights.A, layer.gradients, columns(layer.plan)
    d, dim, N, R = plan.d, plan.dim, plan.N, plan.R
    if plan.table:
        table_close(layer, norm)
    for c in range(dim):
        for n in range(N):
            block, lane = c // size_of(LANES), c % size_of(LANES)
            flat[plan.A_log + c * N + n] = g.scan.A[block, n, lane] * A[block, n, lane]
    set_row(flat, plan.D, g.scan.skip, dim)
    dW_in, dW_x = view(flat, plan.in_proj, 2 * dim, d), view(flat, plan.x_proj, R + 2 * N, dim)
    put(g.in_x, dim, d, dW_in)
    put(g.in_z, dim, d, dW_in[dim:])
    put(g.conv.T, dim, plan.width, view(flat, plan.conv_weight, dim, plan.width))
    set_row(flat, plan.conv_bias, g.conv[plan.width :], dim)
    put(g.low, low, dim, dW_x)
    if plan.last:
        put(g.C, N, dim, dW_x[low:])
    put(g.scan.W_dt.T, dim, R, view(flat, plan.dt_proj, dim, R))
    set_row(flat, plan.dt_bias, g.scan.W_dt[R:], dim)
    put(g.out, d, dim, view(flat, plan.out_proj, d, dim))
