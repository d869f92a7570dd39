"""Causal depthwise convolution with SiLU (Mamba paper, Figure 3), forward and backward, W channels at a time.

Time first, channels last: x, u (length, dim), weight (width, dim), bias (1, dim), with dim a multiple of W. The `_batch` kernels take the
sequences first .. last - 1 of arrays with one axis more.
"""

import numpy as np

from .lanes import ONE, ZERO, entry, fill, kernel, lane_sigmoid, load, size_of, store


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


@entry
def conv_batch(first, last, W, x, weight, bias, silu, u):
    """conv of the sequences first .. last - 1; x (batch, length, at least dim), u (batch, length, dim)."""
    block, slope = np.empty((x.shape[1] + weight.shape[0] - 1, size_of(W)), np.float32), np.empty(u.shape[1:], np.float32)
    for i in range(first, last):
        conv(W, x[i], weight, bias, silu, u[i], slope, block)


@entry
def conv_backward_batch(first, last, W, x, weight, bias, silu, du, dx, dweight):
    """Its gradients: dx, dweight (batch, width + 1, dim), one for each sequence."""
    both, again = np.empty((2, x.shape[1] + weight.shape[0] - 1, size_of(W)), np.float32), np.empty((2,) + du.shape[1:], np.float32)
    for i in range(first, last):
        dweight[i] = ZERO
        conv(W, x[i], weight, bias, silu, again[0], again[1], both[0])
        conv_backward(W, x[i], weight, again[1], du[i], dx[i], dweight[i], both[0], both[1])
