"""What stands around the mixers of a training step: small matrix products, LayerNorm and RMSNorm, the cross-entropy, forward and backward.

Matrices are float32 with rows of whole vectors, `LANES` numbers each; a product keeps `ROWS` of them at a time in registers. Parameters are parts of
one flat vector: `view` and `row` take out the one that begins at `at`, which is negative where the model has no such parameter.
"""

from typing import NamedTuple

import numpy as np
from numba.core.imputils import lower_constant

from .lanes import ONE, ZERO, Width, fill, load, load_rows, rows, size_of, spread, store, store_rows, tile, width
from .parts import maker, part

LANES, ROWS = width(16), width(8)



@lower_constant(Width)
def constant_width(context, builder, kind, value):
    """A width that is a module's constant, in compiled code: there is nothing of it at run time."""
    return context.get_dummy_value()


@part
def wide(n):
    """n rounded up to whole vectors."""
    return (n + size_of(LANES) - 1) // size_of(LANES) * size_of(LANES)


@maker
def room(length, n):
    """Zeros (length, n and a little more): rows never lie a power of two apart."""
    return np.zeros((length, wide(n) + size_of(LANES)), np.float32)


@maker
def view(flat, at, rows, columns):
    """flat[at:] as a matrix (rows, columns), in place; of no rows where there is no such parameter."""
    if at < 0:
        return flat[:0].reshape(0, columns)
    return flat[at : at + rows * columns].reshape(rows, columns)


@part
def put(source, rows, columns, target):
    """target[:rows, :columns] = source[:rows, :columns]. As loops: for an assignment of arrays Numba compiles the words of its error messages too."""
    for r in range(rows):
        for c in range(columns):
            target[r, c] = source[r, c]


@maker
def row(flat, at, n):
    """A copy of flat[at : at + n] as a matrix of one row with zeros behind; all zeros where there is no such parameter."""
    out, source = np.zeros((1, wide(n)), np.float32), view(flat, at, 1, n)
    put(source, len(source), n, out)
    return out


@maker
def set_row(flat, at, values, n):
    """The converse: flat[at : at + n] = the first n of values (1, at least n), where there is such a parameter."""
    target = view(flat, at, 1, n)
    put(values, len(target), n, target)


@maker
def padded(weight, first, last):
    """Rows first .. last - 1 of a weight with zeros behind each."""
    out = np.zeros((last - first, wide(weight.shape[1])), np.float32)
    put(weight[first:], last - first, weight.shape[1], out)
    return out


@maker
def transposed(weight, first, last):
    """The same, transposed."""
    out = np.zeros((weight.shape[1], wide(last - first)), np.float32)
    put(weight[first:].T, weight.shape[1], last - first, out)
    return out


@part
def product(x, length, weight, out, add):
    """out[:length] = x @ weight, or added to it: x (length, at least K), weight (K, columns). ROWS rows at a time in registers."""
    whole = length // size_of(ROWS) * size_of(ROWS)
    for c in range(0, weight.shape[1], size_of(LANES)):
        for t in range(0, whole, size_of(ROWS)):
            total = load_rows(LANES, ROWS, out, t, c) if add else fill(LANES * ROWS, ZERO)
            for k in range(weight.shape[0]):
                total = total + rows(LANES, ROWS, x, t, k) * tile(ROWS, load(LANES, weight, k, c))
            store_rows(LANES, ROWS, out, t, c, total)
        for t in range(whole, length):
            rest = load(LANES, out, t, c) if add else fill(LANES, ZERO)
            for k in range(weight.shape[0]):
                rest = rest + load(LANES, weight, k, c) * x[t, k]
            store(LANES, out, t, c, rest)


@part
def outer(y, C, x, length, gradient):
    """gradient (C rounded up to a multiple of ROWS, columns) += y[:, :C].T @ x; y has as many columns as gradient has rows."""
    for k in range(0, gradient.shape[1], size_of(LANES)):
        for c in range(0, C, size_of(ROWS)):
            total = load_rows(LANES, ROWS, gradient, c, k)
            for t in range(length):
                total = total + spread(LANES, ROWS, y, t, c) * tile(ROWS, load(LANES, x, t, k))
            store_rows(LANES, ROWS, gradient, c, k, total)


class NormPlan(NamedTuple):
    """A norm of rows of d numbers, its weight and bias (or a negative number) in the flat parameters; RMSNorm takes 0 for the mean."""

    weight: int
    bias: int
    d: int
    eps: float
    rms: bool


class Norm(NamedTuple):
    """A norm at work on at most so many rows: weight gamma and bias beta, their gradients, and what the last `norm_forward` gave."""

    plan: NormPlan
    gamma: np.ndarray   # (1, d)
    beta: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    out: np.ndarray     # (rows, d), unit gamma + beta
    unit: np.ndarray    # (rows, d), (x - mean) scale
    scale: np.ndarray   # (rows,), 1 / sqrt(variance + eps)


@maker
def norm_open(plan, flat, length):
    """A norm at work: its weight and bias from the parameters `flat`, room for (length, d)."""
    zeros = np.zeros((2, 1, wide(plan.d)), np.float32)
    return Norm(plan, row(flat, plan.weight, plan.d), row(flat, plan.bias, plan.d), zeros[0], zeros[1],
                room(length, plan.d), room(length, plan.d), np.empty(length, np.float32))


@part
def norm_forward(norm, x, length):
    """Fill norm.out from the rows of x."""
    d, gamma, beta, unit, scale = norm.plan.d, norm.gamma, norm.beta, norm.unit, norm.scale
    for t in range(length):
        mean, square = ZERO, ZERO
        if not norm.plan.rms:
            for k in range(d):
                mean += x[t, k]
            mean /= np.float32(d)
        for k in range(d):
            square += (x[t, k] - mean) * (x[t, k] - mean)
        scale[t] = ONE / np.sqrt(square / np.float32(d) + norm.plan.eps)
        for k in range(d):
            unit[t, k] = (x[t, k] - mean) * scale[t]
            norm.out[t, k] = unit[t, k] * gamma[0, k] + beta[0, k]


@part
def norm_backward(norm, dout, length, dx):
    """Adds to dx and to the gradients of gamma and beta."""
    d, gamma, unit = norm.plan.d, norm.gamma, norm.unit
    for t in range(length):
        mean, along = ZERO, ZERO
        for k in range(d):
            g = dout[t, k] * gamma[0, k]
            mean += g
            along += g * unit[t, k]
        mean = ZERO if norm.plan.rms else mean / np.float32(d)
        along /= np.float32(d)
        for k in range(d):
            dx[t, k] += norm.scale[t] * (dout[t, k] * gamma[0, k] - mean - unit[t, k] * along)
            norm.dgamma[0, k] += dout[t, k] * unit[t, k]
            norm.dbeta[0, k] += dout[t, k]


@maker
def norm_close(norm, flat):
    """Write the gradients where the parameters stand."""
    set_row(flat, norm.plan.weight, norm.dgamma, norm.plan.d)
    set_row(flat, norm.plan.bias, norm.dbeta, norm.plan.d)


@maker
def cross_entropy(logits, value, share, dlogits):
    """Loss of one row of logits; dlogits (1, K) = share (softmax - one at the value)."""
    top, total = logits.max(), ZERO
    for k in range(len(logits)):
        dlogits[0, k] = np.exp(logits[k] - top)
    for k in range(len(logits)):  # apart: beside a store, the compiler orders a sum by where in memory the two arrays lie
        total += dlogits[0, k]
    for k in range(len(logits)):
        dlogits[0, k] *= share / total
    dlogits[0, value] -= share
    return np.log(total) + top - logits[value]
