"""The generator against T1 to T3."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, chi2_contingency


def test_vocabulary_is_the_one_told(recall):
    """T1: numpy's legacy generator after seed 0, rows of unit length, the same at every call."""
    np.random.seed(0)
    V = np.random.randn(16, 8)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    for _ in range(2):
        got = recall.vocabulary(16, 8)
        assert got.dtype == torch.float32 and np.allclose(got.numpy(), V, rtol=0, atol=1e-7)


@pytest.mark.parametrize("length, K, M, tau", [(64, 16, 1, 1), (64, 16, 16, 5), (12, 16, 4, 10), (3, 16, 8, 1), (7, 5, 5, 5), (40, 2, 2, 3)])
def test_structure(recall, generator, length, K, M, tau):
    """T3: the query stands last and at one earlier place, the value tau later; nothing else equals the query."""
    tokens, values = recall.sample_batch(2000, length, K, M, tau, generator)
    assert tokens.shape == (2000, length) and values.shape == (2000,) and tokens.dtype == values.dtype == torch.int64
    q = tokens[:, -1]
    assert (q < M).all() and tokens.min() >= 0 and tokens.max() < K
    earlier = tokens[:, :-1] == q[:, None]
    assert (earlier.sum(1) == 1 + (values == q).int()).all()
    i = earlier.int().argmax(1)
    assert (i + tau < length - 1).all()
    assert (tokens[torch.arange(2000), i + tau] == values).all()


def test_distribution(recall, generator):
    """T3: q, v and i uniform and independent, other tokens uniform without q, v = q in one draw of K."""
    n, length, K, M, tau = 60_000, 10, 6, 3, 2
    tokens, values = recall.sample_batch(n, length, K, M, tau, generator)
    q = tokens[:, -1]
    i = (tokens[:, :-1] == q[:, None]).int().argmax(1)
    for sample, cells in ((q, M), (values, K), (i, length - tau - 1)):
        assert chisquare(torch.bincount(sample, minlength=cells).numpy()).pvalue > 1e-4
    for a, b, cells in ((q, values, (M, K)), (q, i, (M, length - tau - 1)), (values, i, (K, length - tau - 1))):
        table = torch.bincount(a * cells[1] + b, minlength=cells[0] * cells[1]).reshape(cells)
        assert chi2_contingency(table.numpy()).pvalue > 1e-4
    free = torch.ones_like(tokens, dtype=torch.bool)
    rows = torch.arange(n)
    free[:, -1] = free[rows, i] = free[rows, i + tau] = False
    for query in range(M):
        rest = tokens[q == query][free[q == query]]
        counts = torch.bincount(rest, minlength=K)
        assert counts[query] == 0 and chisquare(np.delete(counts.numpy(), query)).pvalue > 1e-4


def test_all_randomness_comes_from_the_generator(recall):
    """The same generator state gives the same batch; torch's and numpy's own generators are left alone."""
    torch.manual_seed(0)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = (recall.sample_batch(50, 20, 16, 4, 1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])


@pytest.mark.parametrize("bad, named", [
    (dict(M=17), "M=17"), (dict(M=0), "M=0"), (dict(length=2), "length=2"), (dict(tau=0), "tau=0"), (dict(n=0), "n=0"), (dict(K=1), "K=1"),
    (dict(length=11, tau=10), "length=11")])
def test_bad_arguments_are_named(recall, generator, bad, named):
    """An impossible task is refused with the argument and its value."""
    arguments = dict(n=4, length=64, K=16, M=4, tau=1) | bad
    with pytest.raises(ValueError, match=named):
        recall.sample_batch(**arguments, generator=generator)
