"""One token: the convolution and one step of the recurrence (Mamba paper, eq. 2) for a batch, with their states brought up to date in place.

Vectors of V channels where channels lie side by side, of W states where states do: V divides dim, W the number of states N. States are as the
caches have them, (batch dim, columns) and (batch dim, N). The `_batch` kernels take the sequences first .. last - 1.
"""

from typing import NamedTuple

import numpy as np

from .lanes import LOG2E, ZERO, entry, fill, kernel, lane_exp2, lane_max, lane_sigmoid, lane_softplus, lane_sum, load, size_of, store


class Form(NamedTuple):
    """What there is and where it stands: B and C are groups x N columns from b0 and c0 on, z begins at column z0."""
    softplus: bool
    gated: bool
    log: bool  # A is given as log(-A)
    groups: int
    b0: int
    c0: int
    z0: int


class Parameters(NamedTuple):
    """Parameters of the recurrence of one token."""
    A: np.ndarray     # (dim, N)
    D: np.ndarray     # (1, dim)
    bias: np.ndarray  # (1, dim), added to the step sizes


class Token(NamedTuple):
    """What a token brings, a row for each sequence."""
    x: np.ndarray   # (batch, dim)
    dt: np.ndarray  # (batch, dim)
    B: np.ndarray   # (batch, columns)
    C: np.ndarray   # (batch, columns)
    z: np.ndarray   # (batch, at least z0 + dim)


@kernel
def exp2_of_any(x):
    """2**x as `lane_exp2`, and infinity above its range."""
    return lane_exp2(ZERO - lane_max(ZERO - x, np.float32(-128)))


@kernel
def conv_update(V, i, x, state, weight, bias, silu, out):
    """out[i] = bias + sum_k weight[k] x_{t - width + 1 + k} from state (batch dim, columns) and x[i], which moves into it."""
    (dim, taps), columns = weight.shape, state.shape[1]
    first = columns - taps + 1
    for c in range(dim):
        r, here = i * dim + c, x[i, c]
        total = bias[0, c] + weight[c, taps - 1] * here
        for k in range(taps - 1):
            total += weight[c, k] * state[r, first + k]
        for k in range(columns - 1):
            state[r, k] = state[r, k + 1]
        state[r, columns - 1] = here
        out[i, c] = total
    if silu:
        for c in range(0, dim, size_of(V)):
            pre = load(V, out, i, c)
            store(V, out, i, c, pre * lane_sigmoid(pre))


@kernel
def recur(W, i, form, A, state, token, out):
    """h = exp(dt A) h + B dt x and out[i] = C h for every channel; the step sizes dt come in out[i]. state (batch dim, N)."""
    (dim, N), of_group = A.shape, A.shape[0] // form.groups
    for c in range(dim):
        dt, r, group = out[i, c], i * dim + c, c // of_group * N
        x, y = dt * token.x[i, c], fill(W, ZERO)
        for n in range(0, N, size_of(W)):
            a = load(W, A, c, n) * LOG2E
            if form.log:
                a = (ZERO - exp2_of_any(a)) * LOG2E
            h = exp2_of_any(a * dt) * load(W, state, r, n) + load(W, token.B, i, form.b0 + group + n) * x
            store(W, state, r, n, h)
            y = y + load(W, token.C, i, form.c0 + group + n) * h
        out[i, c] = lane_sum(y)


@kernel
def state_update(V, W, i, form, parameters, state, token, out):
    """One step of the recurrence for sequence i, with step sizes, skip and gate; out (batch, dim)."""
    A, D, bias = parameters
    for c in range(0, A.shape[0], size_of(V)):
        dt = load(V, token.dt, i, c) + load(V, bias, 0, c)
        if form.softplus:
            dt = lane_softplus(dt)
        store(V, out, i, c, dt)
    recur(W, i, form, A, state, token, out)
    for c in range(0, A.shape[0], size_of(V)):
        y = load(V, out, i, c) + load(V, D, 0, c) * load(V, token.x, i, c)
        if form.gated:
            z = load(V, token.z, i, form.z0 + c)
            y = y * z * lane_sigmoid(z)
        store(V, out, i, c, y)


@entry
def conv_update_batch(first, last, V, x, state, weight, bias, silu, out):
    """conv_update of the sequences first .. last - 1."""
    for i in range(first, last):
        conv_update(V, i, x, state, weight, bias, silu, out)


@entry
def state_update_batch(first, last, V, W, form, parameters, state, token, out):
    """state_update of the same."""
    for i in range(first, last):
        state_update(V, W, i, form, parameters, state, token, out)
