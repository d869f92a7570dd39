"""The selective scan of a batch, forward and backward, in chunks of tokens: the sizes of its scratch do not depend on the length.

A unit of work is a group of sequences and a share of their blocks of channels, so that a single sequence keeps all threads busy: `paths.shares`.
Each adds to gradients of the weights of its own. Letters and named tuples: `scan`.
"""

import numpy as np

from .lanes import ZERO, entry, fill, kernel, load, size_of, store
from .scan import (Gradients, Inputs, Kept, Scratch, backward_tile, chunk, forward_tile, gate_backward, gate_forward, gather, input_backward, prepare,
                   scatter, skip_forward, softplus_backward)


@kernel
def place(share, unit, batch, blocks):
    """(first, last + 1) of the sequences and of the blocks of a unit."""
    g, s, groups, split = unit // share.split, unit % share.split, share.groups, share.split
    return batch * g // groups, batch * (g + 1) // groups, blocks * s // split, blocks * (s + 1) // split


@kernel
def forward_span(W, U, layout, weights, inputs, kept, out, bounds, span, vectors, state):
    """The tokens of `span`, whole chunks of one sequence, for the blocks of `bounds`; their states stand in `state` (blocks N, W)."""
    u, low, BC, z = inputs
    A, (length, _), x, delta, total = weights.A, u.shape, vectors[0], vectors[1], vectors[2]
    (first, last, at), step, N = span, chunk(length), A.shape[1]
    flat, chunks = A.reshape(A.shape[0] * N, size_of(W)), (length - 1) // step + 1
    for block in range(bounds[0], bounds[1]):
        prepare(W, layout.softplus, u, low, weights.W_dt, weights.bias, x, delta, block, span)
        skip_forward(W, u, weights.skip, total, block, span)
        for n in range(0, N, size_of(U)):
            A2, h = load(W * U, flat, block * N + n, 0), load(W * U, state, block * N + n, 0)
            for start in range(first, last, step):
                store(W * U, kept.marks, (block * chunks + start // step) * N + n, 0, h)
                h = forward_tile(W, U, x, delta, total, A2, h, BC, n, (start, min(start + step, last), at))
            store(W * U, state, block * N + n, 0, h)
        gate_forward(W, layout, z, total, kept.y, out, block, span)


@entry
def forward_tasks(share, W, U, layout, weights, inputs, kept, out, starts, ends):
    """out (batch, length, dim) = the gated output, left alone where there is no gate.

    starts, ends (batch, blocks N, W): the states before the first token, zeros where it has no rows, and those after the last, if it has rows.
    """
    u, low, BC, z = inputs
    (blocks, N, _), length = weights.A.shape, u.shape[1]
    step = chunk(length) * max(1, 64 // chunk(length))
    vectors, state = np.empty((3, step, size_of(W)), np.float32), np.empty((blocks * N, size_of(W)), np.float32)
    for unit in range(share.first, share.last):
        i0, i1, b0, b1 = place(share, unit, len(u), blocks)
        for i in range(i0, i1):
            here, keep = Inputs(u[i], low[i], gather(U, BC[i], (layout.b0, layout.c0), layout.N), z[i]), Kept(kept.y[i], kept.marks[i])
            state[b0 * N : b1 * N] = ZERO
            if len(starts):
                state[b0 * N : b1 * N] = starts[i, b0 * N : b1 * N]
            for t in range(0, length, step):
                forward_span(W, U, layout, weights, here, keep, out[i], (b0, b1), (t, min(t + step, length), -t), vectors, state)
            if len(ends):
                ends[i, b0 * N : b1 * N] = state[b0 * N : b1 * N]


@kernel
def backward_chunk(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, bounds, k, scratch):
    """Chunk k of a few blocks: the gradients of what is theirs alone, and those of B and C added up in scratch.low_tiles, for each tile of states."""
    u, low, BC, z = inputs
    A, (length, _), vectors, (b0, b1), (dbias, dA, dskip) = weights.A, u.shape, scratch.vectors, bounds, gradients
    step, N = chunk(length), A.shape[1]
    rows, chunks, first = (A.shape[0] * N, size_of(W)), (length - 1) // step + 1, k * step
    last, A2, dA2 = min(first + step, length), A.reshape(rows), dA.reshape(rows)
    for block in range(b0, b1):
        c, span = block * size_of(W), (first, last, (block - b0) * step - first)
        prepare(W, layout.softplus, u, low, weights.W_dt, weights.bias, vectors[0], vectors[1], block, span)
        store(W, dskip, 0, c, gate_backward(W, layout, u, z, kept.y, dout, dinputs.z, vectors[2], load(W, dskip, 0, c), block, span))
        for t in range((block - b0) * step, (block - b0) * step + last - first):
            store(W, vectors[3], t, 0, fill(W, ZERO))
            store(W, vectors[4], t, 0, fill(W, ZERO))
    for n in range(0, N, size_of(U)):
        sums = (scratch.low_tiles[2 * (n // size_of(U))], scratch.low_tiles[2 * (n // size_of(U)) + 1])
        for block in range(b0, b1):
            row = block * N + n
            here = (load(W * U, A2, row, 0), load(W * U, kept.marks, (block * chunks + k) * N + n, 0), load(W * U, scratch.adjoint, row, 0),
                    load(W * U, dA2, row, 0))
            g, gradient_A = backward_tile(W, U, vectors, scratch.tiles, sums, here, BC, n, (first, last, (block - b0) * step - first))
            store(W * U, scratch.adjoint, row, 0, g)
            store(W * U, dA2, row, 0, gradient_A)
    for block in range(b0, b1):
        c, at = block * size_of(W), (block - b0) * step - first
        input_backward(W, u, weights.skip, vectors, dinputs.u, block, (first, last, at))
        total = load(W, dbias, 0, c)
        total = softplus_backward(W, layout.softplus, low, weights.W_dt, weights.bias, vectors[4], total, block, (first, last, at))
        store(W, dbias, 0, c, total)
        for t in range(first, last):
            store(W, dinputs.low, t, c, load(W, vectors[4], at + t, 0))


@kernel
def backward_room(W, U, step, group, blocks, N):
    """Scratch for chunks of `step` tokens and `group` blocks; `low_tiles`, zeros between calls, are those of dB and dC."""
    w, u = size_of(W), size_of(U)
    return Scratch(np.empty((5, group * step, w), np.float32), np.empty((2, step, u * w), np.float32),
                   np.zeros((2 * (N // u), (step + w - 1) // w * w, u * w), np.float32), np.empty((0, w), np.float32),
                   np.empty((blocks * N, w), np.float32))


@kernel
def sequence_backward(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, bounds, scratch):
    """Gradients of one sequence for the blocks of `bounds`; inputs.BC as `scan` wants it, scratch.adjoint the gradient of the last state."""
    length, N, count = inputs.u.shape[0], weights.A.shape[1], size_of(U)
    step = chunk(length)
    group = max(1, 256 // step)
    for k in range((length - 1) // step, -1, -1):
        for b in range(bounds[0], bounds[1], group):
            backward_chunk(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, (b, min(b + group, bounds[1])), k, scratch)
        tokens = min(k * step + step, length) - k * step
        for n in range(0, N, count):
            pair = 2 * (n // count)
            scatter(W, U, scratch.low_tiles[pair], tokens, min(count, layout.N - n), dinputs.BC, k * step, n)
            scatter(W, U, scratch.low_tiles[pair + 1], tokens, min(count, layout.N - n), dinputs.BC, k * step, layout.N + n)


@entry
def backward_tasks(share, W, U, layout, weights, inputs, kept, dout, dstarts, dends, dinputs, gradients):
    """Gradients of forward_tasks, those of weights for each group; dstarts, dends (batch, blocks N, W) those of the first and the last states, or without rows.

    dinputs.low (batch, length, dim) is that of the step sizes before the softplus, dinputs.BC (split, batch, length, 2 N) that of B and C by shares.
    """
    u, low, BC, z = inputs
    (blocks, N, w), length = weights.A.shape, u.shape[1]
    scratch = backward_room(W, U, chunk(length), max(1, 256 // chunk(length)), blocks, N)
    for unit in range(share.first, share.last):
        (i0, i1, b0, b1), g, s = place(share, unit, len(u), blocks), unit // share.split, unit % share.split
        mine = Gradients(gradients.W_dt[g], gradients.A[g], gradients.skip[g])
        mine.W_dt[:, b0 * w : b1 * w], mine.A[b0:b1], mine.skip[:, b0 * w : b1 * w] = ZERO, ZERO, ZERO
        for i in range(i0, i1):
            here, keep = Inputs(u[i], low[i], gather(U, BC[i], (layout.b0, layout.c0), layout.N), z[i]), Kept(kept.y[i], kept.marks[i])
            scratch.adjoint[b0 * N : b1 * N] = ZERO
            if len(dends):
                scratch.adjoint[b0 * N : b1 * N] = dends[i, b0 * N : b1 * N]
            dhere = Inputs(dinputs.u[i], dinputs.low[i], dinputs.BC[s, i], dinputs.z[i])
            sequence_backward(W, U, layout, weights, here, keep, dout[i], dhere, mine, (b0, b1), scratch)
            if len(dstarts):
                dstarts[i, b0 * N : b1 * N] = scratch.adjoint[b0 * N : b1 * N]
