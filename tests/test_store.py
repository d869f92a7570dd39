"""The store of finished runs, its keys, and the rule that ends a run."""

import dataclasses
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT


def test_hash_counts_code_not_comments(recall):
    """Comments and docstrings change no hash; code does; the hash of a name only sees what that name rests on."""
    source = 'import math\nE = 2\n\ndef f(x):\n    """Doc."""\n    return math.sin(x) ** E\n\ndef g(copy):\n    return copy\n'
    quiet = source.replace('"""Doc."""', '"""Other."""  # and why')
    assert recall.code_hash(source) == recall.code_hash(quiet) and recall.code_hash(source, "f") == recall.code_hash(quiet, "f")
    other = source + "\ndef plot():\n    return f(1)\n\ncopy = 3\n"
    assert recall.code_hash(source) != recall.code_hash(other)
    assert recall.code_hash(source, "f") == recall.code_hash(other, "f") and recall.code_hash(source, "g") == recall.code_hash(other, "g")
    for change in (("E = 2", "E = 3"), ("sin", "cos"), ("import math", "import cmath as math")):
        assert recall.code_hash(source, "f") != recall.code_hash(source.replace(*change), "f")


def test_runs_rest_on_the_models_and_not_on_the_plots(recall):
    """What a stored run is keyed by covers kernels, models, data and training, and none of the figures."""
    kept = "\n".join(recall.rests_on(recall.definitions(), "run_and_store"))
    for name in ("scan_kernels", "FusedMamba", "Attention", "Recall", "sample_batch", "train", "vocabulary"):
        assert f"name='{name}'" in kept, name
    for name in ("show_figure", "curves", "claims", "Profile", "run_all"):
        assert f"name='{name}'" not in kept, name


def test_a_run_is_trained_once_and_the_same_in_every_store(recall, tmp_path, monkeypatch):
    """A second call trains nothing; a fresh store gets the same bits; a broken entry is set aside, reported and made again."""
    job, profile = (recall.Config("P1a", "hybrid"), 0), recall.PROFILES["smoke"]
    results = []
    for name in ("a", "b"):
        monkeypatch.setattr(recall, "STORE", tmp_path / name)
        results.append(recall.run_all([job], profile, workers=1)[0])
    for key in ("curve", "accuracy", "config", "seed"):
        assert results[0][key] == results[1][key]
    assert all(torch.equal(p, results[1]["weights"][k]) for k, p in results[0]["weights"].items())
    entry, = (tmp_path / "b").glob("*.pt")
    assert results[1]["processor"] == recall.processor() == recall.signatures()[entry.name]
    before = entry.stat().st_mtime_ns
    renamed = recall.run_all([(dataclasses.replace(job[0], problem="P2c"), 0)], profile, workers=1)[0]
    assert entry.stat().st_mtime_ns == before and renamed["config"]["problem"] == "P2c"
    entry.write_bytes(entry.read_bytes()[:1000])
    again = recall.run_all([job], profile, workers=1)[0]
    assert again["curve"] == results[0]["curve"] and entry.exists() and entry.with_suffix(".broken").stat().st_size == 1000


def test_a_run_without_a_signature_is_of_an_unknown_processor(recall, tmp_path, monkeypatch):
    """Runs that came without `processors.tsv` are used, and not said to be of this machine."""
    monkeypatch.setattr(recall, "STORE", tmp_path)
    job, profile = (recall.Config("P1a", "nope"), 0), recall.PROFILES["smoke"]
    recall.run_all([job], profile, workers=1)
    (tmp_path / "processors.tsv").unlink()
    assert recall.run_all([job], profile, workers=1)[0]["processor"] == "unknown"


def test_a_worker_ends_with_its_parent(recall):
    """When the process that asked is gone, so is the worker, whatever it is doing."""
    worker = "import os, sys, time; sys.path.insert(0, sys.argv[1]); import recall_definitions as r; r.end_with_parent(os.getppid(), 0.1); print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; w = subprocess.Popen([sys.executable, '-c', {worker!r}, sys.argv[1]], stdout=subprocess.PIPE); print(w.stdout.readline().decode(), flush=True)"
    said = subprocess.run([sys.executable, "-c", parent, str(Path(recall.__file__).parent)], stdout=subprocess.PIPE, text=True, check=True).stdout

    def alive(pid):
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 60
    while alive(int(said)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_broken_entry_is_reported(recall, tmp_path, capsys):
    """A file that cannot be read is named and kept under another name."""
    path = tmp_path / "run.pt"
    path.write_bytes(b"not a run")
    assert recall.load_entry(path) is None and "run.pt could not be read" in capsys.readouterr().out
    assert (tmp_path / "run.broken").read_bytes() == b"not a run" and recall.load_entry(path) is None


def test_kept_runs_can_be_used(recall):
    """Every run that is committed can be read and is what its name says; one of former code, which nothing would use, is told."""
    profile, code = recall.PROFILES["full"], recall.code_hash(recall.definitions(), "run_and_store")
    wanted = {recall.entry_path(config, seed, profile, code).name: (config, seed) for config, seed in recall.jobs(profile)}
    for path in sorted((ROOT / "runs").glob("*.pt")):
        kept = recall.load_entry(path)
        config, seed = wanted.get(path.name, (None, None))
        if config is None:
            warnings.warn(f"{path.name}: of former code or of no configuration")
        else:
            assert dataclasses.asdict(config) | {"problem": kept["config"]["problem"]} == kept["config"] and seed == kept["seed"], path.name


def test_entries_differ_by_all_that_decides(recall):
    """Rate, norm, seed, budget, code: each alone makes another entry; the problem's name does not."""
    config, profile = recall.Config("P2a", "mamba", M=16), recall.PROFILES["full"]
    path = lambda config=config, seed=0, profile=profile, code="c": recall.entry_path(config, seed, profile, code)
    others = [path(dataclasses.replace(config, rate=2e-3)), path(dataclasses.replace(config, norm="rms")), path(seed=1),
              path(profile=dataclasses.replace(profile, budget=10)), path(code="d"), path(dataclasses.replace(config, problem="search"))]
    assert len({path(), *others}) == 7 and path(dataclasses.replace(config, problem="other")) == path()


@pytest.mark.parametrize("curve, window, answer", [
    ([0.1] * 8, 4, False), ([0.1] * 4 + [0.2] * 4, 4, True), ([0.1] * 4 + [0.109] * 4, 4, False), ([0.5, 0.9], 4, False), ([0.9] * 4 + [0.1] * 4, 4, False),
    ([0.1] * 10 + [0.118] * 2, 6, True), ([0.1] * 6 + [0.12] * 4 + [0.1] * 2, 6, True), ([0.1] * 10 + [0.109] * 2, 6, False)])
def test_climbing(recall, curve, window, answer):
    """A budget grows only while the mean accuracy of a window, or of its last two values, is over a point above that of the window before."""
    assert bool(recall.climbing(curve, window, 2)) is answer
