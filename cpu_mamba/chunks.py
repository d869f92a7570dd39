"""The selective scan of a batch, forward and backward, in chunks of tokens: the sizes of its scratch do not depend on the length.

A unit of work is a group of sequences and a share of their blocks of channels, so that a single sequence keeps all threads busy: `paths.shares`.
Each adds to gradients of the weights of its own. Letters and named tuples: `scan`.
"""

import numpy as np

from .lanes import ZERO, entry, fill, kernel, load, size_of, store
from .scan import (Gradients, Inputs, Kept, Scratch, backward_tile, chunk, forward_tile, gate_backward, gate_forward, gather, input_backward, prepare,
                   scatter, skip_forward, steps_backward)


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
def backward_span(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, bounds, span, last_blocks, scratch):
    """The tokens of `span` for a few blocks: the gradients of what is theirs alone; those of B, C and low add up in scratch until the last blocks."""
    u, low, BC, z = inputs
    A, (length, _), vectors, (b0, b1), (first, last, step) = weights.A, u.shape, scratch.vectors, bounds, span
    (dweight, dA, dskip), N, R, size = gradients, A.shape[1], weights.W_dt.shape[0], last - first
    rows, chunks, pairs = (A.shape[0] * N, size_of(W)), (length - 1) // step + 1, len(scratch.tiles) // 2 - 1
    A2, dA2 = A.reshape(rows), dA.reshape(rows)
    for block in range(b0, b1):
        c, at = block * size_of(W), (block - b0) * size
        prepare(W, layout.softplus, u, low, weights.W_dt, weights.bias, vectors[0], vectors[1], block, (first, last, at - first))
        total = load(W, dskip, 0, c)
        store(W, dskip, 0, c, gate_backward(W, layout, u, z, kept.y, dout, dinputs.z, vectors[2], total, block, (first, last, at - first)))
        for t in range(at, at + size):
            store(W, vectors[3], t, 0, fill(W, ZERO))
            store(W, vectors[4], t, 0, fill(W, ZERO))
    for k in range((last - 1) // step, first // step - 1, -1):
        start, stop = k * step, min(k * step + step, last)
        for n in range(0, N, size_of(U)):
            pair, count = 2 + 2 * (((k - first // step) * N + n) // size_of(U) % pairs), min(size_of(U), layout.N - n)
            sums = (scratch.tiles[pair], scratch.tiles[pair + 1])
            for block in range(b0, b1):
                row = block * N + n
                here = (load(W * U, A2, row, 0), load(W * U, kept.marks, (block * chunks + k) * N + n, 0), load(W * U, scratch.adjoint, row, 0),
                        load(W * U, dA2, row, 0))
                g, gradient_A = backward_tile(W, U, vectors, scratch.tiles, sums, here, BC, n, (start, stop, (block - b0) * size - first))
                store(W * U, scratch.adjoint, row, 0, g)
                store(W * U, dA2, row, 0, gradient_A)
            if last_blocks:
                scatter(W, U, sums[0], stop - start, count, dinputs.BC, start, layout.b0 + n)
                scatter(W, U, sums[1], stop - start, count, dinputs.BC, start, layout.c0 + n)
    for block in range(b0, b1):
        c, here = block * size_of(W), (first, last, (block - b0) * size - first)
        input_backward(W, u, weights.skip, vectors, dinputs.u, block, here)
        steps_backward(W, U, layout.softplus, low, weights.W_dt, weights.bias, vectors[4], block, here, scratch.low_tiles, dweight)
        if R == 0:
            for t in range(first, last):
                store(W, dinputs.low, t, c, load(W, vectors[4], here[2] + t, 0))
    if last_blocks:
        for r in range(0, R, size_of(U)):
            scatter(W, U, scratch.low_tiles[r // size_of(U)], size, min(size_of(U), R - r), dinputs.BC, first, r)


@kernel
def spans(length):
    """(tokens of a chunk, tokens taken at a time, blocks taken at a time in the backward pass)."""
    step = chunk(length)
    tokens = step * max(1, 64 // step)
    return step, tokens, max(1, 1024 // tokens)


@kernel
def backward_scratch(W, U, length, blocks, adjoints, N, R):
    """Scratch for sequences of one length, shares of up to so many blocks and so many rows of `adjoint`.

    Tiles of the gradients of B and C are two, which stay in the first cache, where all blocks are taken at once, else two for each tile of states
    and chunk.
    """
    w, u, (step, tokens, group) = size_of(W), size_of(U), spans(length)
    pairs, tokens, short = 1 if blocks <= group else tokens // step * (N // u), min(tokens, length), (step + w - 1) // w * w
    return Scratch(np.empty((5, min(blocks, group) * tokens, w), np.float32), np.zeros((2 + 2 * pairs, short, u * w), np.float32),
                   np.zeros(((R + u - 1) // u, (tokens + w - 1) // w * w, u * w), np.float32), np.empty((0, w), np.float32),
                   np.empty((adjoints, w), np.float32))


@kernel
def sequence_backward(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, bounds, scratch):
    """Gradients of one sequence for the blocks of `bounds`; inputs.BC as `scan` wants it, scratch.adjoint the gradient of the last state."""
    length = inputs.u.shape[0]
    step, tokens, group = spans(length)
    for first in range((length - 1) // tokens * tokens, -1, -tokens):
        span = (first, min(first + tokens, length), step)
        for b in range(bounds[0], bounds[1], group):
            last = min(b + group, bounds[1])
            backward_span(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, (b, last), span, last == bounds[1], scratch)


@entry
def backward_tasks(share, W, U, layout, weights, inputs, kept, dout, dstarts, dends, dinputs, gradients):
    """Gradients of forward_tasks, those of weights for each group; dstarts, dends (batch, blocks N, W) are those of its states, or have no rows.

    dinputs.BC (split, batch, length, columns) is by shares, with B, C and, from column 0 on, that of low; where there is no W_dt, dinputs.low
    (batch, length, dim) is that of the step sizes before the softplus.
    """
    u, low, BC, z = inputs
    (blocks, N, w), length = weights.A.shape, u.shape[1]
    scratch = backward_scratch(W, U, length, (blocks + share.split - 1) // share.split, blocks * N, N, weights.W_dt.shape[0])
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
