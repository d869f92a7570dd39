"""Causal depthwise convolution with SiLU (Mamba paper, Figure 3), forward and backward, W channels at a time.

Time first, channels last: x, u (length, dim), weight (width, dim), bias (1, dim), with dim a multiple of W. `conv` and `conv_backward` take one
sequence, as the fused step does; the `_tasks` kernels arrays with one axis more, in chunks.
"""

import numpy as np

from .chunks import place
from .lanes import ONE, ZERO, entry, fill, kernel, lane_sigmoid, load, size_of, store


CHUNK = 64  # tokens of a batch's convolution at a time


@kernel
def copy(W, x, c, width, block):
    """Channels c .. c + W - 1 of x behind width - 1 rows of zeros: in place, rows a power of two apart would meet in a few cache sets."""
    for t in range(width - 1):
        store(W, block, t, 0, fill(W, ZERO))
    for t in range(x.shape[0]):
        store(W, block, width - 1 + t, 0, load(W, x, t, c))


@kernel
def convolve(W, block, weight, bias, t, c):
    """bias + sum_k weight[k] x[t - width + 1 + k] for channels c .. c + W - 1."""
    total = load(W, bias, 0, c)
    for k in range(weight.shape[0]):
        total = total + load(W, weight, k, c) * load(W, block, t + k, 0)
    return total


@kernel
def conv(W, x, weight, bias, silu, u, slope, block):
    """u = the convolution of x, through SiLU where `silu`, and for the gradient the slope of that; block (length + width - 1, W) is scratch."""
    for c in range(0, weight.shape[1], size_of(W)):
        copy(W, x, c, weight.shape[0], block)
        if silu:
            for t in range(x.shape[0]):
                pre = convolve(W, block, weight, bias, t, c)
                s = lane_sigmoid(pre)
                store(W, u, t, c, pre * s)
                store(W, slope, t, c, s * (pre * (ONE - s) + ONE))
        else:
            for t in range(x.shape[0]):
                store(W, u, t, c, convolve(W, block, weight, bias, t, c))
                store(W, slope, t, c, fill(W, ONE))


@kernel
def conv_backward(W, x, weight, slope, du, dx, dweight, block, g):
    """Gradients of conv, whose slope is given: dx, and added to dweight (width + 1, dim), the bias in its last row.

    block and g (length + width - 1, W) are scratch.
    """
    length, width = x.shape[0], weight.shape[0]
    for c in range(0, weight.shape[1], size_of(W)):
        copy(W, x, c, width, block)
        total = load(W, dweight, width, c)
        for t in range(length):
            here = load(W, du, t, c) * load(W, slope, t, c)
            store(W, g, t, 0, here)
            total = total + here
        store(W, dweight, width, c, total)
        for t in range(length, length + width - 1):
            store(W, g, t, 0, fill(W, ZERO))
        for k in range(width):
            total = load(W, dweight, k, c)
            for t in range(length):
                total = total + load(W, block, t + k, 0) * load(W, g, t, 0)
            store(W, dweight, k, c, total)
        for t in range(length):
            total = fill(W, ZERO)
            for k in range(width):
                total = total + load(W, weight, k, c) * load(W, g, t + width - 1 - k, 0)
            store(W, dx, t, c, total)


# A batch, in chunks of tokens, by units of work (see `chunks`)

@kernel
def window(W, x, c, first, last, block):
    """Rows first .. last - 1 of x, zeros where there are none, from channel c on into block."""
    for t in range(first, last):
        store(W, block, t - first, 0, load(W, x, t, c) if 0 <= t < x.shape[0] else fill(W, ZERO))


@entry
def conv_tasks(share, W, x, weight, bias, silu, u):
    """u (batch, length, dim) = the convolution of the first dim columns of x, through SiLU where `silu`."""
    (_, length, dim), width = u.shape, weight.shape[0]
    block = np.empty((CHUNK + width - 1, size_of(W)), np.float32)
    for unit in range(share.first, share.last):
        i0, i1, b0, b1 = place(share, unit, len(u), dim // size_of(W))
        for i in range(i0, i1):
            for first in range(0, length, CHUNK):
                last = min(first + CHUNK, length)
                for c in range(b0 * size_of(W), b1 * size_of(W), size_of(W)):
                    window(W, x[i], c, first - width + 1, last, block)
                    for t in range(first, last):
                        pre = convolve(W, block, weight, bias, t - first, c)
                        store(W, u[i], t, c, pre * lane_sigmoid(pre) if silu else pre)


@kernel
def chunk_backward(W, x, weight, bias, silu, du, dx, dweight, first, last, scratch):
    """dx of the tokens first .. last - 1 for the channels from c on; scratch is (block, g, c), and what these tokens add to dweight."""
    (block, g, c), length, width, count = scratch, x.shape[0], weight.shape[0], last - first
    window(W, x, c, first - width + 1, last + width - 1, block)
    window(W, du, c, first, last + width - 1, g)
    if silu:  # that of all outputs which these tokens reach
        for t in range(min(last + width - 1, length) - first):
            pre = convolve(W, block, weight, bias, t, c)
            s = lane_sigmoid(pre)
            store(W, g, t, 0, load(W, g, t, 0) * s * (pre * (ONE - s) + ONE))
    total = load(W, dweight, width, c)
    for t in range(count):
        total = total + load(W, g, t, 0)
    store(W, dweight, width, c, total)
    for k in range(width):
        total = load(W, dweight, k, c)
        for t in range(count):
            total = total + load(W, block, t + k, 0) * load(W, g, t, 0)
        store(W, dweight, k, c, total)
    for t in range(count):
        total = fill(W, ZERO)
        for k in range(width):
            total = total + load(W, weight, k, c) * load(W, g, t + width - 1 - k, 0)
        store(W, dx, first + t, c, total)


@entry
def conv_backward_tasks(share, W, x, weight, bias, silu, du, dx, dweight):
    """Its gradients: dx, and dweight (groups, width + 1, dim), the bias in the last row, of each group of sequences."""
    (_, length, dim), width, w = du.shape, weight.shape[0], size_of(W)
    block, g = np.empty((CHUNK + 2 * width - 2, w), np.float32), np.empty((CHUNK + width - 1, w), np.float32)
    for unit in range(share.first, share.last):
        (i0, i1, b0, b1), total = place(share, unit, len(du), dim // w), dweight[unit // share.split]
        total[:, b0 * w : b1 * w] = ZERO
        for i in range(i0, i1):
            for first in range(0, length, CHUNK):
                for c in range(b0 * w, b1 * w, w):
                    chunk_backward(W, x[i], weight, bias, silu, du[i], dx[i], total, first, min(first + CHUNK, length), (block, g, c))
