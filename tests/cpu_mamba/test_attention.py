"""The attention kernel of the training step against softmax(Q K) V in PyTorch."""

import numpy as np
import pytest
import torch
from numba import njit
from parity import relative

from cpu_mamba import attention
from cpu_mamba.lanes import WidthValue


@njit  # parts of kernels can be called from compiled code alone
def attend(E, qkv, out, lse, dout, dqkv):
    block = attention.attend_room(E, len(qkv))
    attention.attend(E, qkv, out, lse, block)
    attention.attend_backward(E, qkv, out, lse, dout, dqkv, block)


@njit
def rotate(qkv, d, cos, sin, sign):
    attention.rotate(qkv, d, cos, sin, sign)


def plain(qkv, heads, queries):
    """Causal attention of the last places, (queries, d), from (length, 3 d)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)[-queries:]


def both(qkv, heads, queries, dout, exact=torch.float64):
    """(output, gradient of qkv) by the kernel, and the same in plain PyTorch."""
    d = qkv.shape[1] // 3
    out, lse, dqkv = np.empty((queries, d), np.float32), np.empty((heads, queries), np.float32), np.empty(qkv.shape, np.float32)
    attend(WidthValue(d // heads), qkv.numpy(), out, lse, dout.numpy(), dqkv)
    given = qkv.clone().to(exact).requires_grad_()
    want = plain(given, heads, queries)
    (want * dout).sum().backward()
    return (torch.from_numpy(out), torch.from_numpy(dqkv)), (want, given.grad)


@pytest.mark.parametrize("d, heads", [(4, 2), (8, 2), (20, 2), (32, 1)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 200])
def test_attention_equals_softmax(d, heads, length):
    """Values and gradients, for all places and for the last one alone."""
    qkv = 4 * torch.randn(length, 3 * d)
    for queries in {length, 1}:
        found, want = both(qkv, heads, queries, torch.randn(queries, d))
        assert all(relative(a, b) < 2e-5 for a, b in zip(found, want))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_finite_number_where_pytorch_has_none(bad):
    """NaN and infinities in queries, keys and values come out wherever they are seen, and in the gradient.

    (PyTorch's softmax and its product with the values let them through the mask as well, to places that must not see them.)
    """
    for column in (1, 9, 17):
        for row in (0, 5, 19):
            qkv = torch.randn(20, 24)
            qkv[row, column] = bad
            for queries in (20, 1):
                (out, gradient), (want, _) = both(qkv, 2, queries, torch.randn(queries, 8), torch.float32)
                seen = slice(row, row + 1) if column == 1 and queries == 20 else slice(-1, None)  # a query is its own place's alone
                assert not (torch.isfinite(out[seen]) & ~torch.isfinite(want[seen])).any(), (column, row, queries)
                assert torch.isfinite(want[seen]).all() or not torch.isfinite(gradient).all(), (column, row, queries)


def test_rotation():
    """Neighbouring pairs of queries and keys turn by the angles of their place (RoFormer, eq. 34), values do not; and back."""
    qkv, angles = torch.randn(30, 24), torch.rand(30, 2) * 6
    turned = qkv.numpy().copy()
    rotate(turned, 8, torch.cos(angles).numpy(), torch.sin(angles).numpy(), np.float32(1))
    pairs = torch.view_as_complex(qkv[:, :16].double().unflatten(-1, (4, 2, 2)).contiguous()) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    assert relative(torch.from_numpy(turned[:, :16]), torch.view_as_real(pairs).flatten(1)) < 1e-6 and np.array_equal(turned[:, 16:], qkv[:, 16:].numpy())
    rotate(turned, 8, torch.cos(angles).numpy(), torch.sin(angles).numpy(), np.float32(-1))
    assert relative(torch.from_numpy(turned), qkv) < 1e-6
    before = qkv.numpy().copy()
    rotate(before, 8, np.empty((0, 1), np.float32), np.empty((0, 1), np.float32), np.float32(1))
    assert np.array_equal(before, qkv.numpy())
