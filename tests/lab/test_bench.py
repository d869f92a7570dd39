"""The benchmark: what it times is the same computation, and what it prints."""

import pandas as pd
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


def test_medians_time_a_slow_call_once(monkeypatch):
    """Once where it is plain PyTorch, a second time where the first may have compiled; no turns after that."""
    clock, calls = iter(range(0, 10**6, 30)), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench, "peak_memory", lambda call: call() or 5.0)
    slow = {name: lambda name=name: calls.append(name) for name in (bench.PLAIN, bench.COMPILED)}
    assert bench.medians(slow, 5) == dict.fromkeys(slow, (30.0, 5.0)) and calls == [bench.PLAIN, *[bench.COMPILED] * 2]


def rows(part, case, threads=2, **ms):
    return pd.DataFrame([(part, case, threads, getattr(bench, name), value, 10.0) for name, value in ms.items()], columns=bench.COLUMNS)


def test_the_table_says_times_ours_of_the_same_part():
    """A line holds what was measured in two parts, each in units of ours beside it."""
    text = bench.table(pd.concat([rows("layer", "a", OURS=2, MAMBAPY=20, PRODUCTS=1), rows("plain", "a", OURS=3, PLAIN=300), rows("step", "b", OURS=1)]))
    assert "| a | 2 | 2 | 100 | 10 | – | 2 | 10 / 10 / 10 / – |" in text.splitlines()
    assert "| b | 2 | 1 | – | – | – | – | 10 / – / – / – |" in text.splitlines()
    assert "8 (2.00)" in bench.sizes_table(rows("sizes", "layer, d 8, length 25, batch 10", OURS=2, PRODUCTS=1))


def test_what_is_measured_anew_takes_the_place_of_its_like(tmp_path):
    """speed.csv row by row; table, figure and what it was measured on into the README, whose other lines stay."""
    (tmp_path / "README.md").write_text("above\n<!-- bench -->\nold\n<!-- /bench -->\nbelow\n")
    bench.keep(pd.concat([rows("step", "a", OURS=1, MAMBAPY=4), rows("sizes", "layer, d 8, length 64, batch 1", OURS=1, PRODUCTS=1)]), tmp_path)
    bench.keep(rows("layer", "b", OURS=7, MAMBAPY=21, PRODUCTS=5), tmp_path)
    stored = bench.keep(rows("step", "a", OURS=2, MAMBAPY=20), tmp_path)
    assert stored.part.tolist() == ["step"] * 2 + ["layer"] * 3 + ["sizes"] * 2 and stored[stored.part == "step"].ms.tolist() == [2, 20]
    assert len(pd.read_csv(tmp_path / "speed.csv")) == 7
    bench.write(stored, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("above\n<!-- bench -->\n| ") and text.endswith("<!-- /bench -->\nbelow\n") and "old" not in text
    assert "| a | 2 | 2 | – | 10 |" in text and "torch " in text and "d 8" not in text and "</svg>" in (tmp_path / "speed.svg").read_text()


@pytest.mark.parametrize("part", ["step", "layer", "generation"])
def test_a_part_measures_every_case(part, monkeypatch):
    """Each once, without its peers, on small sizes."""
    monkeypatch.setattr(bench, "peers", lambda *names: {})
    monkeypatch.setattr(bench, "LAYERS", [(8, 5, 1)])
    monkeypatch.setattr(bench, "generation", lambda rounds, whole=bench.generation: whole(rounds, 2, 8))
    monkeypatch.setattr(bench, "medians", lambda calls, rounds: {name: call() or (1.0, 2.0) for name, call in calls.items()})
    found = dict(bench.measure(part, 1))
    assert len(found) == {"step": 2, "layer": 1, "generation": 1}[part] and all(bench.OURS in measured for measured in found.values())


def test_an_unknown_argument_is_refused():
    assert "--fast: unknown" in bench.main(["--fast"])


def test_memory_of_a_call_is_seen():
    grown = bench.peak_memory(lambda: torch.ones(20_000_000).mul_(2).sum())
    assert grown != grown or 60 < grown < 200
