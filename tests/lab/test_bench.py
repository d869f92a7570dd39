"""The benchmark: what it times is the same computation, and what it prints."""

import pytest
import torch
from lab import bench

import cpu_mamba


@pytest.mark.parametrize("mambapy", [False, True])
def test_a_peer_computes_what_our_layer_computes(mambapy):
    """The same parameters, the same outputs: the times compare like with like."""
    torch.manual_seed(0)
    theirs, ours, x = bench.peer(8, mambapy), cpu_mamba.Mamba(8), torch.randn(2, 20, 8)
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_medians_time_a_slow_call_once_after_a_first_that_compiles(monkeypatch):
    clock, calls = iter(range(0, 10**6, 30)), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.medians({"slow": lambda: calls.append("slow")}, 5) == {"slow": 30.0} and calls == ["slow"] * 2


def test_the_table_says_times_the_first():
    text = bench.table({"case": {"ours": 0.002, "theirs": 0.02}, "other": {"ours": 0.001}})
    assert "| theirs" in text and "20.0 (10)" in text and "2.0" in text and "–" in text


def test_an_unknown_argument_is_refused():
    assert "--fast: unknown" in bench.main(["--fast"])


def test_memory_of_a_call_is_seen():
    grown = bench.peak_memory(lambda: torch.ones(20_000_000).mul_(2).sum())
    assert grown != grown or 60 < grown < 200
