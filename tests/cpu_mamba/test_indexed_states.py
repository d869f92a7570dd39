"""States that lie elsewhere: rows by index, with padding, and a convolution's inputs in a ring, over the cases of causal_conv1d's and mamba_ssm's tests."""

import pytest
import torch
import torch.nn.functional as F

from cpu_mamba import causal_conv1d_update, selective_state_update

INDICES = torch.tensor([5, -1, 0, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [None, 1, 3, 9])
@pytest.mark.parametrize("columns, width", [(3, 4), (4, 4), (7, 3), (2, 2), (1, 1)])
def test_a_ring_is_the_same_convolution(columns, width, n, dtype):
    """Tokens up to many times the ring's size, in calls of n: the outputs of the whole sequence, its last inputs where they belong."""
    batch, dim, calls = 3, 8, 5
    x = torch.randn(batch, dim, calls * (n or 1)).to(dtype)
    weight, bias, state = torch.randn(dim, width).to(dtype), torch.randn(dim).to(dtype), torch.zeros(batch, dim, columns, dtype=dtype)
    start, outs = torch.tensor([0, 4, 11], dtype=torch.int32), []
    for k in range(calls):
        part = x[..., k * (n or 1) : (k + 1) * (n or 1)]
        outs.append(causal_conv1d_update(part if n else part[..., 0], state, weight, bias, "silu", cache_seqlens=start + k * (n or 1)).view(part.shape))
    want = F.silu(F.conv1d(F.pad(x.double(), (width - 1, 0)), weight.double()[:, None], bias.double(), groups=dim))
    assert torch.allclose(torch.cat(outs, 2).double(), want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)
    for i in range(batch):
        for t in range(max(0, x.shape[2] - columns), x.shape[2]):
            assert torch.equal(state[i, :, (int(start[i]) + t) % columns], x[i, :, t])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("n", [None, 2])
def test_rows_of_the_convolution(ring, n):
    """Each sequence by its row as alone; padding gives 0; no other row changes."""
    states, weight, bias = torch.randn(7, 16, 5), torch.randn(16, 4), torch.randn(16)
    x, lengths = torch.randn(4, 16, n or 1), torch.tensor([3, 9, 2, 4]) if ring else None
    x, before = x if n else x[..., 0], states.clone()
    out = causal_conv1d_update(x, states, weight, bias, "silu", lengths, INDICES.int())
    for i, row in enumerate(INDICES.tolist()):
        if row < 0:
            assert not out[i].any()
            continue
        alone = before[row : row + 1].clone()
        want = causal_conv1d_update(x[i : i + 1], alone, weight, bias, "silu", None if lengths is None else lengths[i : i + 1])
        assert torch.allclose(out[i], want[0], atol=1e-6) and torch.equal(states[row], alone[0]) and not torch.equal(states[row], before[row])
    assert torch.equal(states[[1, 2, 4, 6]], before[[1, 2, 4, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [False, True])
def test_rows_of_the_recurrence(heads, dtype):
    r = lambda *shape: torch.randn(*shape).to(dtype)
    whole = (2, 16) if heads else (16,)
    states, x, dt, z, D, bias = r(6, *whole, 8), r(4, *whole), r(4, *whole), r(4, *whole), r(*whole), r(*whole)
    A, B, C, before = -torch.rand(*whole, 8), r(4, 1, 8), r(4, 1, 8), states.clone()
    out = selective_state_update(states, x, dt, A, B, C, D, z, bias, True, state_batch_indices=INDICES)
    for i, row in enumerate(INDICES.tolist()):
        if row < 0:
            assert not out[i].any()
            continue
        alone, one = before[row : row + 1].clone(), slice(i, i + 1)
        want = selective_state_update(alone, x[one], dt[one], A, B[one], C[one], D, z[one], bias, True)
        assert out.dtype == dtype and torch.allclose(out[i], want[0], rtol=1e-5, atol=1e-6) and torch.equal(states[row], alone[0])
    assert torch.equal(states[[1, 2, 4]], before[[1, 2, 4]])


def test_padding_alone():
    states, none = torch.randn(3, 16, 4), torch.full((2,), -1)
    before, x = states.clone(), torch.randn(2, 16)
    assert not causal_conv1d_update(x, states, torch.randn(16, 4), conv_state_indices=none).any()
    assert not selective_state_update(states, x, x, -torch.rand(16, 4), torch.randn(2, 4), torch.randn(2, 4), state_batch_indices=none).any()
    assert torch.equal(states, before)


@pytest.mark.parametrize("indices, error, words", [
    (torch.tensor([0, 3]), ValueError, "up to 3: less than 3"), (torch.tensor([1, 1]), ValueError, "one sequence alone"),
    (torch.tensor([0.0, 1.0]), TypeError, "dtype torch.float32"), (torch.tensor([0]), ValueError, r"of shape \(1,\)"), ([0, 1], TypeError, "of type list")])
def test_indices_are_checked(indices, error, words):
    x, states = torch.randn(2, 16), torch.randn(3, 16, 4)
    with pytest.raises(error, match="conv_state_indices.*" + words):
        causal_conv1d_update(x, states, torch.randn(16, 4), conv_state_indices=indices)
    with pytest.raises(error, match="state_batch_indices.*" + words):
        selective_state_update(states, x, x, -torch.rand(16, 4), torch.randn(2, 4), torch.randn(2, 4), state_batch_indices=indices)


def test_lengths_are_checked():
    with pytest.raises(ValueError, match=r"cache_seqlens of shape \(3,\)"):
        causal_conv1d_update(torch.randn(2, 16), torch.randn(2, 16, 4), torch.randn(16, 4), cache_seqlens=torch.tensor([0, 1, 2]))
