"""Small products, norms and the loss of the training step against PyTorch in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from parity import relative

from cpu_mamba import dense
from cpu_mamba.dense import NormPlan, row, view


# Parts of kernels can be called from compiled code alone.
@njit
def product(x, length, weight, out, add):
    dense.product(x, length, dense.transposed(weight, 0, len(weight)), out, add)


@njit
def outer(y, C, x, length, gradient):
    dense.outer(y, C, x, length, gradient)


@njit
def padded(weight, first, last):
    return dense.padded(weight, first, last), dense.transposed(weight, first, last)


@njit
def norm_step(plan, flat, x, dout, dx, gradient):
    norm = dense.norm_open(plan, flat, len(x))
    dense.norm_forward(norm, x, len(x))
    dense.norm_backward(norm, dout, len(x), dx)
    dense.norm_close(norm, gradient)
    return norm.out


@njit
def cross_entropy(logits, value, share, dlogits):
    return dense.cross_entropy(logits, value, share, dlogits)


@njit
def parts(flat, at, n):
    return view(flat, at, 2, n), row(flat, at, n)


def random(*shape):
    return torch.randn(*shape).numpy()


@pytest.mark.parametrize("length, K, columns", [(1, 3, 16), (7, 16, 5), (8, 40, 17), (19, 8, 48)])
def test_product(length, K, columns):
    """x @ weight.T, set and added; rows past `length` stay as they are."""
    x, weight, wide = random(length, K + 3), random(columns, K), -(-columns // 16) * 16
    want = torch.from_numpy(x[:, :K]).double() @ torch.from_numpy(weight).double().T
    for add in (False, True):
        out = random(length + 1, wide + 16)
        before = out.copy()
        product(x, length, weight, out, add)
        assert relative(torch.from_numpy(out[:length, :columns]), want + torch.from_numpy(before[:length, :columns]) * add) < 1e-6
        assert np.array_equal(out[length], before[length])


@pytest.mark.parametrize("length, C, columns", [(1, 3, 16), (20, 8, 16), (33, 19, 48)])
def test_outer(length, C, columns):
    """gradient += y.T @ x."""
    rows = -(-C // 16) * 16
    y, x, gradient = np.zeros((length, rows + 16), np.float32), random(length, columns + 16), random(rows, columns)
    y[:, :C] = random(length, C)
    want = torch.from_numpy(gradient).double() + torch.from_numpy(y[:, :rows]).double().T @ torch.from_numpy(x[:, :columns]).double()
    outer(y, C, x, length, gradient)
    assert relative(torch.from_numpy(gradient[:C]), want[:C]) < 1e-6


def test_padding():
    """Some rows of a weight, as they are and transposed, with zeros behind up to whole vectors."""
    weight = random(20, 5)
    rows, columns = padded(weight, 3, 9)
    assert rows.shape == (6, 16) and columns.shape == (5, 16)
    assert np.array_equal(rows[:, :5], weight[3:9]) and np.array_equal(columns[:, :6], weight[3:9].T) and not rows[:, 5:].any() and not columns[:, 6:].any()


@pytest.mark.parametrize("rms, bias", [(False, True), (False, False), (True, False), (True, True)])
@pytest.mark.parametrize("d", [8, 33])
def test_norms(d, rms, bias):
    """LayerNorm and RMSNorm, with a bias and without, values and gradients; dx is added to."""
    flat, x, dout, before = random(2 * d + 7), 3 * random(6, d) + 1, random(6, d), random(6, d)
    plan, gradient, dx = NormPlan(3, d + 5 if bias else -1, d, np.float32(1e-3), rms), np.zeros_like(flat), before.copy()
    out = norm_step(plan, flat, x, dout, dx, gradient)
    a, weight = (torch.from_numpy(t.copy()).double().requires_grad_() for t in (x, flat[3 : 3 + d]))
    b = torch.from_numpy(flat[d + 5 : 2 * d + 5] * bias).double().requires_grad_()
    want = (F.rms_norm(a, (d,), weight, 1e-3) if rms else F.layer_norm(a, (d,), weight, None, 1e-3)) + b
    (want * torch.from_numpy(dout)).sum().backward()
    assert relative(torch.from_numpy(out[:, :d]), want) < 1e-6 and relative(torch.from_numpy(dx - before), a.grad) < 2e-6
    assert relative(torch.from_numpy(gradient[3 : 3 + d]), weight.grad) < 1e-6
    assert relative(torch.from_numpy(gradient[d + 5 : 2 * d + 5]), b.grad) < 1e-6 if bias else not gradient[d + 5 :].any()


def test_missing_parameters():
    """A parameter at a negative place has no rows, or is zero; nothing that lies elsewhere is read."""
    flat = random(40)
    matrix, vector = parts(flat, 4, 7)
    assert np.array_equal(matrix, flat[4:18].reshape(2, 7)) and np.array_equal(vector[0, :7], flat[4:11]) and not vector[0, 7:].any()
    matrix, vector = parts(flat, -1, 7)
    assert matrix.shape == (0, 7) and vector.shape == (1, 16) and not vector.any()


def test_cross_entropy():
    """Loss and gradient of a row, large and infinite logits and NaN included."""
    for row in (3 * random(16), 1e4 * random(16), np.array([0, np.nan], np.float32), np.array([np.inf, 0], np.float32), np.array([-np.inf, 0], np.float32)):
        dlogits, exact = np.zeros((1, len(row) + 16), np.float32), torch.from_numpy(row).double().requires_grad_()
        loss, want = cross_entropy(row, 1, np.float32(0.25), dlogits), F.cross_entropy(exact, torch.tensor(1))
        want.backward()
        assert loss == pytest.approx(want.item(), rel=1e-6, abs=1e-6, nan_ok=True)
        np.testing.assert_allclose(dlogits[0, : len(row)], exact.grad / 4, rtol=1e-5, atol=1e-7)


def test_sums_do_not_hang_on_where_arrays_lie():
    """The loss has the same bits whether its two arrays lie side by side or far apart: a compiler may take another loop where they are close."""
    memory = np.zeros(4096, np.float32)
    for row in np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32):
        memory[:16] = row
        found = set()
        for start in (16, 20, 32, 48, 2000):
            gradient = memory[start : start + 16].reshape(1, 16)
            found.add((float(cross_entropy(memory[:16], 3, np.float32(1 / 64), gradient)), gradient.tobytes()))
        assert len(found) == 1
