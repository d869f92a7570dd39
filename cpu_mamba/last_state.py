"""The last state of the selective scan alone, by unrolling, forward and backward, as the last layer of a model needs it. Letters: `scan`."""

from .lanes import LOG2E, ONE, ZERO, fill, fold, kernel, lane_exp2, load, size_of, spread, store, tile
from .scan import chunk, gather, prepare, scatter, steps_backward


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


@kernel
def end_state(W, U, layout, weights, inputs, h, scratch):
    """The state after the last token, h (blocks, N, W), from u, low and B of `inputs`; x, step sizes and their sums stay in `scratch`."""
    u, low, BC, _ = inputs
    W_dt, bias, A, _ = weights
    vectors, length, flat = scratch.vectors, BC.shape[0], (A.shape[0] * A.shape[1], size_of(W))
    x, delta, S, wide = vectors[0], vectors[1], vectors[2], gather(U, BC, (layout.b0,), layout.N)
    for block in range(A.shape[0]):
        row = block * length
        prepare(W, layout.softplus, u, low, W_dt, bias, x, delta, block, (0, length, row))
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
        steps_backward(W, U, layout.softplus, low, W_dt, bias, dS, block, (0, length, row), scratch.low_tiles, gradients.W_dt)
    for k in range(len(scratch.low_tiles)):
        scatter(W, U, scratch.low_tiles[k], length, min(size_of(U), W_dt.shape[0] - k * size_of(U)), dlow, 0, k * size_of(U))
