"""The selective scan (Mamba paper, eq. 2 and Algorithm 2) with step sizes, skip and gate, forward and backward.

Letters: W channels side by side make a block (dim = blocks W), U states of N a tile (N a multiple of U here, filled up with zeros), R the
rank of the step sizes. Time comes first: u, y (length, dim). A is A log2(e), so that exp(delta A) = 2**(delta A), laid out (blocks, N, W).
In the loops A, a, h, g are tiles of U states x W channels, x = delta u, delta, y vectors of W channels. Arrays for vectors of every block
have the blocks one below the other, (blocks length, W), so that no slice is made on the way. `span` is
(first, last, at): the tokens first .. last - 1, token t in row at + t of such arrays.
`inside` takes one sequence, as the fused step does; `chunks` does the same for batches of any size, of the same pieces, and `last_state` has the last
state alone.
"""

from typing import NamedTuple

import numpy as np

from .lanes import (LOG2E, ONE, ZERO, fill, fold, kernel, lane_exp2, lane_sigmoid, lane_softplus, load, size_of, spread, store, store_groups,
                    sums, tile, width)

STATES = width(4)  # of a tile: independent work for the processor while a sum waits for the one before


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
    """Weights of step sizes, scan and skip, as the kernels want them."""
    W_dt: np.ndarray  # (R, dim), R = 0 where `low` are step sizes already
    bias: np.ndarray  # (1, dim), added to them
    A: np.ndarray     # (blocks, N, W), A log2(e)
    skip: np.ndarray  # (1, dim), the paper's D


class Gradients(NamedTuple):
    """Gradients of the weights, added to what is there; of a batch, one for each group of sequences."""
    W_dt: np.ndarray  # (R + 1, dim), the bias in the last row
    A: np.ndarray     # (blocks, N, W), of A itself
    skip: np.ndarray  # (1, dim)


class Kept(NamedTuple):
    """What `inside` leaves for its gradient."""
    y: np.ndarray      # (length, dim), before the gate
    marks: np.ndarray  # (blocks chunks N, W): the state before each chunk


class Scratch(NamedTuple):
    """Arrays of one sequence that are used again for the next."""
    vectors: np.ndarray    # (5, blocks length, W)
    tiles: np.ndarray      # (4, rows of a chunk, U W), in `chunks` maybe more; all but the first two zeros between calls
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
def scratch_of(W, U, length, blocks, N, R):
    """Scratch for sequences of one length, to be used again from one to the next."""
    w, u = size_of(W), size_of(U)
    short, long = (chunk(length) + w - 1) // w * w, (length + w - 1) // w * w
    return Scratch(np.empty((5, blocks * length, w), np.float32), np.zeros((4, short, u * w), np.float32),
                   np.zeros(((R + u - 1) // u, long, u * w), np.float32),
                   np.empty((blocks * N, w), np.float32), np.zeros((blocks * N, w), np.float32))


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
def forward_tile(W, U, x, delta, y, A, h, BC, n, span):
    """h after the tokens of `span` (Mamba paper, eq. 2): h_t = exp(delta_t A) h_{t-1} + B_t x_t,  y_t += C_t h_t."""
    (first, last, at), N = span, BC.shape[1] // 2
    for t in range(first, last):
        r = at + t
        h = lane_exp2(A * tile(U, load(W, delta, r, 0))) * h + spread(W, U, BC, t, n) * tile(U, load(W, x, r, 0))
        store(W, y, r, 0, load(W, y, r, 0) + fold(W, spread(W, U, BC, t, N + n) * h))
    return h


@kernel
def backward_tile(W, U, vectors, tiles, sums, tile_of, BC, n, span):
    """The adjoint g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1} of a tile, back over the tokens of `span`.

    `vectors` are x, delta, dy, dx and dlog, the last two added to: dlog_t is the gradient for delta_t by way of the decay; `sums` add up the
    gradients of B and C, the channels of a block still apart. tile_of is (A, h before the first token, g after the last, the gradient for A so
    far). Returns g before the first token and the gradient for A.
    """
    (first, last, at), (A, h, g, gradient_A), (dB, dC) = span, tile_of, sums
    x, delta, dy, dx, dlog = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    decay, states, N = tiles[0], tiles[1], BC.shape[1] // 2
    for t in range(first, last):
        a = lane_exp2(A * tile(U, load(W, delta, at + t, 0)))
        store(W * U, decay, t - first, 0, a)
        store(W * U, states, t - first, 0, h)
        h = a * h + spread(W, U, BC, t, n) * tile(U, load(W, x, at + t, 0))
    for t in range(last - 1, first - 1, -1):  # h is h_t here
        s, r = t - first, at + t
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
    return g, gradient_A


@kernel
def scan(W, U, x, delta, A, BC, block, y, marks, last):
    """The recurrence of a block over a whole sequence (Mamba paper, Algorithm 2).

    x, delta, y (length, W); A (blocks N, W); BC (length, 2 N), B and C side by side.
    """
    length, N, step = x.shape[0], BC.shape[1] // 2, chunk(x.shape[0])
    chunks = (length - 1) // step + 1
    for n in range(0, N, size_of(U)):
        a = load(W * U, A, block * N + n, 0)
        h = fill(W * U, ZERO)
        for k in range(chunks):
            store(W * U, marks, (block * chunks + k) * N + n, 0, h)
            h = forward_tile(W, U, x, delta, y, a, h, BC, n, (k * step, min(k * step + step, length), 0))
        store(W * U, last, block * N + n, 0, h)


@kernel
def scan_backward(W, U, layout, A2, BC, dA, dBC, marks, scratch):
    """The adjoint of one sequence, a chunk and U states at a time, their states recomputed.

    A2, dA (blocks N, W); BC as in `scan`, dBC as `Inputs.BC`, `scratch.vectors` as in `backward_tile`. dB and dC sum over blocks first;
    `adjoint` carries g from chunk to chunk, from the gradient of the last state on.
    """
    vectors, tiles, dB, dC, adjoint = scratch.vectors, scratch.tiles, scratch.tiles[2], scratch.tiles[3], scratch.adjoint
    length, N, count, b0, c0 = BC.shape[0], BC.shape[1] // 2, layout.N, layout.b0, layout.c0
    blocks, step = vectors.shape[1] // length, chunk(length)
    chunks = (length - 1) // step + 1
    for k in range(chunks - 1, -1, -1):
        first, last = k * step, min(k * step + step, length)
        for n in range(0, N, size_of(U)):
            for block in range(blocks):
                at = block * N + n
                here = (load(W * U, A2, at, 0), load(W * U, marks, (block * chunks + k) * N + n, 0), load(W * U, adjoint, at, 0),
                        load(W * U, dA, at, 0))
                g, gradient_A = backward_tile(W, U, vectors, tiles, (dB, dC), here, BC, n, (first, last, block * length))
                store(W * U, adjoint, at, 0, g)
                store(W * U, dA, at, 0, gradient_A)
            scatter(W, U, dB, last - first, min(size_of(U), count - n), dBC, first, b0 + n)
            scatter(W, U, dC, last - first, min(size_of(U), count - n), dBC, first, c0 + n)
    adjoint[:] = ZERO


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
def prepare(W, softplus, u, low, W_dt, bias, x, delta, block, span):
    """Step sizes of a block into its rows of delta, and delta u into those of x."""
    (first, last, at), c = span, block * size_of(W)
    for t in range(first, last):
        step = step_size(W, low, W_dt, bias, t, c)
        if softplus:
            step = lane_softplus(step)
        store(W, delta, at + t, 0, step)
        store(W, x, at + t, 0, step * load(W, u, t, c))


@kernel
def softplus_backward(W, softplus, low, W_dt, bias, ddelta, total, block, span):
    """Takes ddelta through the softplus, in place. Returns total, the gradient for the bias, added to."""
    (first, last, at), c = span, block * size_of(W)
    for t in range(first, last):
        g = load(W, ddelta, at + t, 0)
        if softplus:
            g = g * lane_sigmoid(step_size(W, low, W_dt, bias, t, c))
        store(W, ddelta, at + t, 0, g)
        total = total + g
    return total


@kernel
def steps_backward(W, U, softplus, low, W_dt, bias, ddelta, block, span, tiles, dweight):
    """Takes ddelta through the softplus: gradients for W_dt and bias, and for low, in `tiles` as in scan_backward, from the first token on."""
    (first, last, at), R, c = span, W_dt.shape[0], block * size_of(W)
    store(W, dweight, R, c, softplus_backward(W, softplus, low, W_dt, bias, ddelta, load(W, dweight, R, c), block, span))
    for r in range(R):
        here, k, column, total = tiles[r // size_of(U)], r % size_of(U) * size_of(W), load(W, W_dt, r, c), load(W, dweight, r, c)
        for t in range(first, last):
            g = load(W, ddelta, at + t, 0)
            store(W, here, t - first, k, load(W, here, t - first, k) + g * column)
            total = total + g * low[t, r]
        store(W, dweight, r, c, total)


# One sequence through step sizes, scan, skip and gate

@kernel
def skip_forward(W, u, skip, y, block, span):
    """y = D u, to which the scan adds."""
    (first, last, at), c = span, block * size_of(W)
    for t in range(first, last):
        store(W, y, at + t, 0, load(W, skip, 0, c) * load(W, u, t, c))


@kernel
def gate_forward(W, layout, z, total, y, out, block, span):
    """A block's rows of total into y (length, dim) and, where there is a gate, times SiLU(z) into out."""
    (first, last, at), c = span, block * size_of(W)
    for t in range(first, last):
        here = load(W, total, at + t, 0)
        store(W, y, t, c, here)
        if layout.gated:
            gate = load(W, z, t, layout.z0 + c)
            store(W, out, t, c, here * gate * lane_sigmoid(gate))


@kernel
def gate_backward(W, layout, u, z, y, dout, dz, dy, total, block, span):
    """dz, and dy from dout. Returns total, the gradient for the skip, added to."""
    (first, last, at), c, z0 = span, block * size_of(W), layout.z0
    for t in range(first, last):
        g = load(W, dout, t, c)
        if layout.gated:
            gate = load(W, z, t, z0 + c)
            s = lane_sigmoid(gate)
            store(W, dz, t, z0 + c, g * load(W, y, t, c) * s * (gate * (ONE - s) + ONE))
            g = g * gate * s
        store(W, dy, at + t, 0, g)
        total = total + g * load(W, u, t, c)
    return total


@kernel
def input_backward(W, u, skip, vectors, du, block, span):
    """du, and the gradient for delta where dlog was, by way of the decay and of x = delta u."""
    (first, last, at), c = span, block * size_of(W)
    delta, dy, dx, dlog = vectors[1], vectors[2], vectors[3], vectors[4]
    for t in range(first, last):
        r = at + t
        g = load(W, dx, r, 0)
        store(W, du, t, c, g * load(W, delta, r, 0) + load(W, skip, 0, c) * load(W, dy, r, 0))
        store(W, dlog, r, 0, load(W, dlog, r, 0) * (ONE / LOG2E) + g * load(W, u, t, c))


@kernel
def inside(W, U, layout, weights, inputs, out, kept, scratch):
    """out (length, dim) = the gated output, left alone where there is no gate and `kept.y` is the output. Leaves x and step sizes in `scratch`."""
    u, low, BC, z = inputs
    W_dt, bias, A, skip = weights
    y, marks = kept
    vectors, length, flat = scratch.vectors, BC.shape[0], A.reshape(A.shape[0] * A.shape[1], size_of(W))
    both = gather(U, BC, (layout.b0, layout.c0), layout.N)
    x, delta, total = vectors[0], vectors[1], vectors[2][:length]
    for block in range(A.shape[0]):
        row = block * length
        prepare(W, layout.softplus, u, low, W_dt, bias, x, delta, block, (0, length, row))
        skip_forward(W, u, skip, total, block, (0, length, 0))
        scan(W, U, x[row : row + length], delta[row : row + length], flat, both, block, total, marks, scratch.last)
        gate_forward(W, layout, z, total, y, out, block, (0, length, 0))


@kernel
def inside_backward(W, U, layout, weights, inputs, kept, dout, dinputs, gradients, scratch):
    """Gradients of inside from dout (length, dim). `scratch` is as `inside`, or `prepare` of every block, left it for this sequence.

    `scratch.adjoint` holds the gradient of the last state, if it has one, and is zero afterwards. dinputs may lie in one array, column by column.
    """
    u, low, BC, z = inputs
    W_dt, bias, A, skip = weights
    du, dlow, dBC, dz = dinputs
    dweight, dA, dskip = gradients
    vectors, length, flat = scratch.vectors, BC.shape[0], (A.shape[0] * A.shape[1], size_of(W))
    dy, dx, dlog = vectors[2], vectors[3], vectors[4]
    both = gather(U, BC, (layout.b0, layout.c0), layout.N)
    dx[:], dlog[:] = ZERO, ZERO
    for block in range(A.shape[0]):
        c, row = block * size_of(W), block * length
        store(W, dskip, 0, c, gate_backward(W, layout, u, z, kept.y, dout, dz, dy, load(W, dskip, 0, c), block, (0, length, row)))
    scan_backward(W, U, layout, A.reshape(flat), both, dA.reshape(flat), dBC, kept.marks, scratch)
    for block in range(A.shape[0]):
        row = block * length
        input_backward(W, u, skip, vectors, du, block, (0, length, row))
        steps_backward(W, U, layout.softplus, low, W_dt, bias, dlog, block, (0, length, row), scratch.low_tiles, dweight)
    for k in range(len(scratch.low_tiles)):
        scatter(W, U, scratch.low_tiles[k], length, min(size_of(U), W_dt.shape[0] - k * size_of(U)), dlow, 0, k * size_of(U))
