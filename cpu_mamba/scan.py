"""The selective scan (Mamba paper, eq. 2 and Algorithm 2) with step sizes, skip and gate, forward and backward.

Letters: W channels side by side make a block (dim = blocks W), U states of N a tile (N a multiple of U here, filled up with zeros), R the
rank of the step sizes. Time comes first: u, y (length, dim). A is A log2(e), so that exp(delta A) = 2**(delta A), laid out (blocks, N, W).
In the loops A, a, h, g are tiles of U states x W channels, x = delta u, delta, y vectors of W channels. Arrays for vectors of every block
have the blocks one below the other, (blocks length, W), so that no slice is made on the way. `inside` and `end_state` take one sequence, as
does the fused step; the `_batch` kernels take the sequences first .. last - 1 of a batch.
"""

from typing import NamedTuple

import numpy as np

from .lanes import (LOG2E, ONE, ZERO, entry, fill, fold, kernel, lane_exp2, lane_sigmoid, lane_softplus, load, size_of, spread, store, store_groups,
                    sums, tile)


class Layout(NamedTuple):
    """Which steps there are, and where things stand: B and C are N columns of `BC` from b0 and c0 on, z begins at column z0."""
    softplus: bool
    gated: bool
    N: int  # states, not filled up
    b0: int
    c0: int
    z0: int


class Inputs(NamedTuple):
    """What a sequence brings, or the gradients for it; of a batch, with one axis more."""
    u: np.ndarray    # (length, dim)
    low: np.ndarray  # (length, at least R): step sizes before W_dt; (length, dim) without W_dt
    BC: np.ndarray   # (length, columns)
    z: np.ndarray    # (length, at least z0 + dim)


class Weights(NamedTuple):
    W_dt: np.ndarray  # (R, dim), R = 0 where `low` are step sizes already
    bias: np.ndarray  # (1, dim), added to them
    A: np.ndarray     # (blocks, N, W), A log2(e)
    skip: np.ndarray  # (1, dim), the paper's D


class Gradients(NamedTuple):
    """Gradients of the weights, added to what is there; of a batch, one for each sequence."""
    W_dt: np.ndarray  # (R + 1, dim), the bias in the last row
    A: np.ndarray     # (blocks, N, W), of A itself
    skip: np.ndarray  # (1, dim)


class Kept(NamedTuple):
    """What `inside` leaves for its gradient."""
    y: np.ndarray      # (length, dim), before the gate
    marks: np.ndarray  # (blocks chunks N, W): the state before each chunk


class Scratch(NamedTuple):
    vectors: np.ndarray    # (5, blocks length, W)
    tiles: np.ndarray      # (4, rows of a chunk, U W); the last two zeros between calls
    low_tiles: np.ndarray  # (tiles of R, rows, U W), zeros between calls
    last: np.ndarray       # (blocks N, W), the state after the last token
    adjoint: np.ndarray    # (blocks N, W), its gradient; zeros between calls


@kernel
def chunk(length):
    """Tokens between two states that are kept for the gradient: 16, or as many more as leave 64 states at most."""
    return max(16, (length + 63) // 64)


@kernel
def marks_rows(length, blocks, N):
    """Rows of `Kept.marks`."""
    return blocks * ((length - 1) // chunk(length) + 1) * N


@kernel
def room(W, U, length, blocks, N, R):
    """Scratch for sequences of one length, to be used again from one to the next."""
    w, u = size_of(W), size_of(U)
    short, long = (chunk(length) + w - 1) // w * w, (length + w - 1) // w * w
    return Scratch(np.empty((5, blocks * length, w), np.float32), np.zeros((4, short, u * w), np.float32),
                   np.zeros(((R + u - 1) // u, long, u * w), np.float32), np.empty((blocks * N, w), np.float32), np.zeros((blocks * N, w), np.float32))


@kernel
def gather(U, BC, columns, N):
    """The columns that start at each of `columns`, N of them padded with zeros to a multiple of U, side by side."""
    padded = (N + size_of(U) - 1) // size_of(U) * size_of(U)
    both = np.zeros((BC.shape[0], padded * len(columns)), np.float32)
    for t in range(BC.shape[0]):
        for k in range(len(columns)):
            for n in range(N):
                both[t, k * padded + n] = BC[t, columns[k] + n]
    return both


@kernel
def scatter(W, U, tiles, length, count, narrow, first, column):
    """Sum the channels that `tiles` (length, U W) still holds apart into `count` columns of narrow[first:], from `column` on, and clear it."""
    w, u, row = size_of(W), size_of(U), np.empty((1, size_of(W)), np.float32)
    for v in range(0, length * u, w):  # W vectors, one after the other in memory: vector v is state v % U at time v // U
        total, start = sums(W, tiles, v // u, v % u * w), first + v // u
        if count == u and w >= u and start + w // u <= first + length:
            store_groups(W, U, narrow, start, column, total)
        else:
            store(W, row, 0, 0, total)
            for j in range(w):
                t, n = first + (v + j) // u, (v + j) % u
                if t < first + length and n < count:
                    narrow[t, column + n] = row[0, j]
    for t in range(length):
        store(W * U, tiles, t, 0, fill(W * U, ZERO))


# The recurrence of one sequence

@kernel
def scan(W, U, x, delta, A, BC, block, y, marks, last):
    """h_t = exp(delta_t A) h_{t-1} + B_t x_t,  y_t += C_t h_t of a block (Mamba paper, eq. 2 and Algorithm 2).

    x, delta, y (length, W); A (blocks N, W); BC (length, 2 N), B and C side by side.
    """
    length, N, step = x.shape[0], BC.shape[1] // 2, chunk(x.shape[0])
    chunks = (length - 1) // step + 1
    for n in range(0, N, size_of(U)):
        a = load(W * U, A, block * N + n, 0)
        h = fill(W * U, ZERO)
        for k in range(chunks):
            store(W * U, marks, (block * chunks + k) * N + n, 0, h)
            for t in range(k * step, min(k * step + step, length)):
                h = lane_exp2(a * tile(U, load(W, delta, t, 0))) * h + spread(W, U, BC, t, n) * tile(U, load(W, x, t, 0))
                store(W, y, t, 0, load(W, y, t, 0) + fold(W, spread(W, U, BC, t, N + n) * h))
        store(W * U, last, block * N + n, 0, h)


@kernel
def scan_backward(W, U, layout, A2, BC, dA, dBC, marks, scratch):
    """The adjoint g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1} of one sequence, a chunk and U states at a time, their states recomputed.

    A2, dA (blocks N, W); BC as in `scan`, dBC as `Inputs.BC`. The five `vectors` are x, delta, dy, dx and dlog, the last two added to:
    dlog_t is the gradient for delta_t by way of the decay. dB and dC sum over blocks first, the channels of a block still apart;
    `adjoint` carries g from chunk to chunk, from the gradient of the last state on.
    """
    x, delta, dy, dx, dlog = scratch.vectors[0], scratch.vectors[1], scratch.vectors[2], scratch.vectors[3], scratch.vectors[4]
    decay, states, dB, dC, adjoint = scratch.tiles[0], scratch.tiles[1], scratch.tiles[2], scratch.tiles[3], scratch.adjoint
    length, N, count, b0, c0 = BC.shape[0], BC.shape[1] // 2, layout.N, layout.b0, layout.c0
    blocks, step = x.shape[0] // length, chunk(length)
    chunks = (length - 1) // step + 1
    for k in range(chunks - 1, -1, -1):
        first, last = k * step, min(k * step + step, length)
        for n in range(0, N, size_of(U)):
            for block in range(blocks):
                row, at = block * length, block * N + n
                A, h = load(W * U, A2, at, 0), load(W * U, marks, (block * chunks + k) * N + n, 0)
                for t in range(first, last):
                    a = lane_exp2(A * tile(U, load(W, delta, row + t, 0)))
                    store(W * U, decay, t - first, 0, a)
                    store(W * U, states, t - first, 0, h)
                    h = a * h + spread(W, U, BC, t, n) * tile(U, load(W, x, row + t, 0))
                g, gradient_A = load(W * U, adjoint, at, 0), load(W * U, dA, at, 0)
                for t in range(last - 1, first - 1, -1):  # h is h_t here
                    s, r = t - first, row + t
                    out = tile(U, load(W, dy, r, 0))
                    g = g + spread(W, U, BC, t, N + n) * out
                    store(W * U, dB, s, 0, load(W * U, dB, s, 0) + g * tile(U, load(W, x, r, 0)))
                    store(W * U, dC, s, 0, load(W * U, dC, s, 0) + h * out)
                    store(W, dx, r, 0, load(W, dx, r, 0) + fold(W, g * spread(W, U, BC, t, n)))
                    g = g * load(W * U, decay, s, 0)
                    h = load(W * U, states, s, 0)
                    carried = g * h
                    gradient_A = gradient_A + carried * tile(U, load(W, delta, r, 0))
                    store(W, dlog, r, 0, load(W, dlog, r, 0) + fold(W, carried * A))
                store(W * U, adjoint, at, 0, g)
                store(W * U, dA, at, 0, gradient_A)
            scatter(W, U, dB, last - first, min(size_of(U), count - n), dBC, first, b0 + n)
            scatter(W, U, dC, last - first, min(size_of(U), count - n), dBC, first, c0 + n)
    adjoint[:] = ZERO


@kernel
def scan_last(W, U, x, S, A2, B, block, h):
    """The last state alone, by unrolling: h = sum_t exp(S_t A) B_t x_t with S_t = sum_{s>t} delta_s; A2, h (blocks N, W), B (length, N)."""
    N = B.shape[1]
    for n in range(0, N, size_of(U)):
        A = load(W * U, A2, block * N + n, 0)
        total = fill(W * U, ZERO)
        for t in range(x.shape[0]):
            total = total + lane_exp2(A * tile(U, load(W, S, t, 0))) * spread(W, U, B, t, n) * tile(U, load(W, x, t, 0))
        store(W * U, h, block * N + n, 0, total)


@kernel
def scan_last_backward(W, U, layout, A2, B, dh, dA, dB, scratch):
    """Gradients of scan_last, laid out as in scan_backward; the five `vectors` are x, delta, S, dx and dS."""
    x, S, dx, dS, sums_B = scratch.vectors[0], scratch.vectors[2], scratch.vectors[3], scratch.vectors[4], scratch.tiles[2]
    (length, N), count, b0 = B.shape, layout.N, layout.b0
    blocks, step = x.shape[0] // length, chunk(length)
    for first in range(0, length, step):
        last = min(first + step, length)
        for n in range(0, N, size_of(U)):
            for block in range(blocks):
                row, at = block * length, block * N + n
                A, G, gradient_A = load(W * U, A2, at, 0), load(W * U, dh, at, 0), load(W * U, dA, at, 0)
                for t in range(first, last):
                    r = row + t
                    here, later = tile(U, load(W, x, r, 0)), tile(U, load(W, S, r, 0))
                    g = lane_exp2(A * later) * G
                    store(W * U, sums_B, t - first, 0, load(W * U, sums_B, t - first, 0) + g * here)
                    g = g * spread(W, U, B, t, n)
                    store(W, dx, r, 0, load(W, dx, r, 0) + fold(W, g))
                    g = g * here
                    gradient_A = gradient_A + g * later
                    store(W, dS, r, 0, load(W, dS, r, 0) + fold(W, g * A))
                store(W * U, dA, at, 0, gradient_A)
            scatter(W, U, sums_B, last - first, min(size_of(U), count - n), dB, first, b0 + n)


# Step sizes of one sequence

@kernel
def step_size(W, low, W_dt, bias, t, c):
    """Step sizes before the softplus, bias + sum_r W_dt[r] low[t, r]; bias + low[t] where there is no W_dt (no rows)."""
    total = load(W, bias, 0, c)
    if W_dt.shape[0] == 0:
        return total + load(W, low, t, c)
    for r in range(W_dt.shape[0]):
        total = total + load(W, W_dt, r, c) * low[t, r]
    return total


@kernel
def prepare(W, softplus, u, low, W_dt, bias, x, delta, block):
    """Step sizes of a block into its rows of delta, and delta u into those of x."""
    length, c = u.shape[0], block * size_of(W)
    row = block * length
    for t in range(length):
        step = step_size(W, low, W_dt, bias, t, c)
        if softplus:
            step = lane_softplus(step)
        store(W, delta, row + t, 0, step)
        store(W, x, row + t, 0, step * load(W, u, t, c))


@kernel
def steps_backward(W, U, softplus, low, W_dt, bias, ddelta, block, dlow, tiles, dweight):
    """Takes ddelta through the softplus: gradients for W_dt and bias, and for low, in `tiles` as in scan_backward where there is a W_dt."""
    R, length, c = W_dt.shape[0], low.shape[0], block * size_of(W)
    row, total = block * length, load(W, dweight, R, c)
    for t in range(length):
        g = load(W, ddelta, row + t, 0)
        if softplus:
            g = g * lane_sigmoid(step_size(W, low, W_dt, bias, t, c))
        store(W, ddelta, row + t, 0, g)
        total = total + g
        if R == 0:
            store(W, dlow, t, c, g)
    store(W, dweight, R, c, total)
    for r in range(R):
        here, k, column, total = tiles[r // size_of(U)], r % size_of(U) * size_of(W), load(W, W_dt, r, c), load(W, dweight, r, c)
        for t in range(length):
            g = load(W, ddelta, row + t, 0)
            store(W, here, t, k, load(W, here, t, k) + g * column)
            total = total + g * low[t, r]
        store(W, dweight, r, c, total)


# One sequence through step sizes, scan, skip and gate

@kernel
def inside(W, U, layout, weights, inputs, out, kept, scratch):
    """out (length, dim) = the gated output, left alone where there is no gate and `kept.y` is the output. Leaves x and step sizes in `scratch`."""
    u, low, BC, z = inputs
    W_dt, bias, A, skip = weights
    y, marks = kept
    vectors, length, flat, z0 = scratch.vectors, BC.shape[0], A.reshape(A.shape[0] * A.shape[1], size_of(W)), layout.z0
    both = gather(U, BC, (layout.b0, layout.c0), layout.N)
    x, delta, total = vectors[0], vectors[1], vectors[2][:length]
    for block in range(A.shape[0]):
        c, row = block * size_of(W), block * length
        prepare(W, layout.softplus, u, low, W_dt, bias, x, delta, block)
        for t in range(length):
            store(W, total, t, 0, load(W, skip, 0, c) * load(W, u, t, c))
        scan(W, U, x[row : row + length], delta[row : row + length], flat, both, block, total, marks, scratch.last)
        for t in range(length):
            here = load(W, total, t, 0)
            store(W, y, t, c, here)
            if layout.gated:
                gate = load(W, z, t, z0 + c)
                store(W, out, t, c, here * gate * lane_sigmoid(gate))


@kernel
def inside_backward(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, scratch):
    """Gradients of inside from dout (length, dim). `scratch` is as `inside`, or `prepare` of every block, left it for this sequence.

    `scratch.adjoint` holds the gradient of the last state, if it has one, and is zero afterwards. dinputs may lie in one array, column by column.
    """
    u, low, BC, z = inputs
    W_dt, bias, A, skip = weights
    du, dlow, dBC, dz = dinputs
    dweight, dA, dskip = gradients
    y, vectors, length, flat, z0 = kept.y, scratch.vectors, BC.shape[0], (A.shape[0] * A.shape[1], size_of(W)), layout.z0
    delta, dy, dx, dlog = vectors[1], vectors[2], vectors[3], vectors[4]
    both = gather(U, BC, (layout.b0, layout.c0), layout.N)
    dx[:], dlog[:] = ZERO, ZERO
    for block in range(A.shape[0]):
        c, row = block * size_of(W), block * length
        total = load(W, dskip, 0, c)
        for t in range(length):
            g = load(W, dout, t, c)
            if layout.gated:
                gate = load(W, z, t, z0 + c)
                s = lane_sigmoid(gate)
                store(W, dz, t, z0 + c, g * load(W, y, t, c) * s * (gate * (ONE - s) + ONE))
                g = g * gate * s
            store(W, dy, row + t, 0, g)
            total = total + g * load(W, u, t, c)
        store(W, dskip, 0, c, total)
    scan_backward(W, U, layout, A.reshape(flat), both, dA.reshape(flat), dBC, kept.marks, scratch)
    for block in range(A.shape[0]):
        c, row = block * size_of(W), block * length
        for t in range(length):
            g, r = load(W, dx, row + t, 0), row + t
            store(W, du, t, c, g * load(W, delta, r, 0) + load(W, skip, 0, c) * load(W, dy, r, 0))
            store(W, dlog, r, 0, load(W, dlog, r, 0) * (ONE / LOG2E) + g * load(W, u, t, c))
        steps_backward(W, U, layout.softplus, low, W_dt, bias, dlog, block, dlow, scratch.low_tiles, dweight)
    for k in range(len(scratch.low_tiles)):
        scatter(W, U, scratch.low_tiles[k], length, min(size_of(U), W_dt.shape[0] - k * size_of(U)), dlow, 0, k * size_of(U))


@kernel
def end_state(W, U, layout, weights, inputs, h, scratch):
    """The state after the last token, h (blocks, N, W), from u, low and B of `inputs`; x, step sizes and their sums stay in `scratch`."""
    u, low, BC, _ = inputs
    W_dt, bias, A, _ = weights
    vectors, length, flat = scratch.vectors, BC.shape[0], (A.shape[0] * A.shape[1], size_of(W))
    x, delta, S, wide = vectors[0], vectors[1], vectors[2], gather(U, BC, (layout.b0,), layout.N)
    for block in range(A.shape[0]):
        row = block * length
        prepare(W, layout.softplus, u, low, W_dt, bias, x, delta, block)
        later = fill(W, ZERO)
        for t in range(row + length - 1, row - 1, -1):
            store(W, S, t, 0, later)
            later = later + load(W, delta, t, 0)
        scan_last(W, U, x[row : row + length], S[row : row + length], A.reshape(flat), wide, block, h.reshape(flat))


@kernel
def end_state_backward(W, U, layout, weights, inputs, dh, dinputs, gradients, scratch):
    """Gradients of end_state, straight after it and with its `scratch`: for u, low and B (that of C and z is left alone), W_dt with bias, and A."""
    u, low, BC, _ = inputs
    W_dt, bias, A, _ = weights
    du, dlow, dBC, _ = dinputs
    vectors, length, flat = scratch.vectors, BC.shape[0], (A.shape[0] * A.shape[1], size_of(W))
    delta, dx, dS, wide = vectors[1], vectors[3], vectors[4], gather(U, BC, (layout.b0,), layout.N)
    dx[:], dS[:] = ZERO, ZERO
    scan_last_backward(W, U, layout, A.reshape(flat), wide, dh.reshape(flat), gradients.A.reshape(flat), dBC, scratch)
    for block in range(A.shape[0]):
        c, row, later = block * size_of(W), block * length, fill(W, ZERO)
        for t in range(length):
            r = row + t
            g, here = load(W, dx, r, 0), load(W, dS, r, 0)
            store(W, du, t, c, g * load(W, delta, r, 0))
            store(W, dS, r, 0, g * load(W, u, t, c) + later * (ONE / LOG2E))
            later = later + here
        steps_backward(W, U, layout.softplus, low, W_dt, bias, dS, block, dlow, scratch.low_tiles, gradients.W_dt)
    for k in range(len(scratch.low_tiles)):
        scatter(W, U, scratch.low_tiles[k], length, min(size_of(U), W_dt.shape[0] - k * size_of(U)), dlow, 0, k * size_of(U))


@entry
def inside_batch(first, last, W, U, layout, weights, inputs, kept, out, ends):
    """inside of the sequences first .. last - 1; ends (batch, blocks N, W) gets the last states, or has no rows."""
    u, low, BC, z = inputs
    y, marks = kept
    scratch = room(W, U, u.shape[1], weights.A.shape[0], weights.A.shape[1], weights.W_dt.shape[0])
    for i in range(first, last):
        inside(W, U, layout, weights, Inputs(u[i], low[i], BC[i], z[i]), out[i], Kept(y[i], marks[i]), scratch)
        if len(ends):
            ends[i] = scratch.last


@entry
def inside_backward_batch(first, last, W, U, layout, weights, inputs, kept, dout, dends, dinputs, gradients):
    """inside_backward of the same; dends (batch, blocks N, W) is the gradient of the last states, or has no rows."""
    u, low, BC, z = inputs
    W_dt, bias, A, _ = weights
    du, dlow, dBC, dz = dinputs
    dweight, dA, dskip = gradients
    y, marks = kept
    scratch = room(W, U, u.shape[1], A.shape[0], A.shape[1], W_dt.shape[0])
    for i in range(first, last):
        dweight[i], dA[i], dskip[i] = ZERO, ZERO, ZERO
        if len(dends):
            scratch.adjoint[:] = dends[i]
        for block in range(A.shape[0]):
            prepare(W, layout.softplus, u[i], low[i], W_dt, bias, scratch.vectors[0], scratch.vectors[1], block)
        inside_backward(W, U, layout, weights, Inputs(u[i], low[i], BC[i], z[i]), Kept(y[i], marks[i]), dout[i],
                        Inputs(du[i], dlow[i], dBC[i], dz[i]), Gradients(dweight[i], dA[i], dskip[i]), scratch)
