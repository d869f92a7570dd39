"""The pool: finished runs reused, missing ones named or trained, a failing run alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from lab import pool


@dataclass(frozen=True)
class Toy:
    """A setting as small as can be."""

    seed: int = 0
    rate: float = 0.5
    model: str = "toy"
    d: int = 1
    M: int = 1
    tau: int = 1
    norm: str = "none"
    betas: tuple = (0.9, 0.98)
    n: int = 10


def toy_run(s):
    """A run that fails at rate 0.666 and else needs no training."""
    if s.rate == 0.666:
        raise FloatingPointError("step 3: the loss is nan after 2.5")
    return dict(weights={"w": np.full(3, s.seed, np.float32)}, curve=[[1, s.seed]], accuracy=[[3, 1, 5]], opening=[float(s.seed)], seconds={"training": 0.0})


def toys(seeds, **letters):
    return [Toy(seed=seed, **letters) for seed in seeds]


@pytest.fixture
def plan(tmp_path):
    return pool.Plan(train="missing", folder=tmp_path / "runs")


def test_missing_runs_are_trained_once_and_come_in_order(plan):
    said = []
    runs = pool.finished({"a": toys(range(3)), "b": toys([1])}, toy_run, replace(plan, workers=2), say=said.append)
    assert [r["setting"]["seed"] for r in runs["a"]] == [0, 1, 2] and runs["b"][0]["weights"]["w"].tolist() == [1, 1, 1]
    assert runs["a"][0]["provenance"]["threads"] == 1 and "torch" in runs["a"][0]["provenance"]
    before = {p: p.stat().st_mtime_ns for p in plan.folder.iterdir()}
    again = pool.finished({"a": toys(range(3))}, toy_run, plan, say=said.append)
    assert {p: p.stat().st_mtime_ns for p in plan.folder.iterdir()} == before and len(again["a"]) == 3
    assert "training 3 on 2 cores" in said[0] and said[1].startswith("3 finished runs reused")


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    folders = []
    for workers in (1, 2):
        plan = pool.Plan(train="missing", folder=tmp_path / str(workers), workers=workers)
        pool.finished({"a": toys(range(4))}, toy_run, plan)
        folders.append({p.name: p.read_bytes() for p in plan.folder.iterdir()})
    assert folders[0] == folders[1]


def test_a_missing_run_is_an_error_that_says_in_what_it_differs(plan):
    pool.finished({"a": toys(range(2))}, toy_run, plan)
    asked = pool.Plan(folder=plan.folder)
    with pytest.raises(pool.Missing, match=r"1 runs .* first a: toy-.*differs in rate: 0.5 there, 0.25 here.*TRAIN=missing"):
        pool.finished({"a": toys([1], rate=0.25)}, toy_run, asked)


def test_a_run_that_fails_is_named_and_the_others_are_kept(plan):
    with pytest.raises(RuntimeError, match="1 of 3 runs failed; the others are kept.*rate|0.666.*step 3: the loss is nan after 2.5"):
        pool.finished({"a": [*toys([0]), *toys([1], rate=0.666), *toys([2])]}, toy_run, plan)
    assert plan.store(True).get(asdict(Toy(seed=2))) is not None


def test_training_anew_leaves_the_finished_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "ROOT", tmp_path)
    pool.finished({"P1": toys([0])}, toy_run, pool.Plan(train="missing", folder=tmp_path / "runs"))
    plan = pool.Plan.of({"TRAIN": "1", "RECALL_STORE": str(tmp_path / "anew")})
    pool.finished({"P1": toys([0])}, toy_run, plan)
    assert len(list((tmp_path / "anew").glob("*.json"))) == 1


def test_fewer_seeds_are_of_the_assignments_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "ROOT", tmp_path)
    pool.finished({"more": toys(range(3))}, toy_run, pool.Plan(train="missing", folder=tmp_path / "runs"))
    plan = pool.Plan.of({"TRAIN": "1", "SEEDS": "1", "RECALL_STORE": str(tmp_path / "anew")})
    runs = pool.finished({"P1a": toys(range(3)), "more": toys(range(3))}, toy_run, plan)
    assert plan.trial and len(runs["P1a"]) == 1 and len(runs["more"]) == 3
    assert len(list((tmp_path / "anew").glob("*.json"))) == 1


@pytest.mark.parametrize("switch, value, allowed", [("TRAIN", "yes", "missing, 1"), ("TRAIN", "", ""), ("PROFILE", "ful", "full, smoke"), ("PROFILE", "", "full, smoke"), ("SEEDS", "0", "from 1"),
                                                    ("SEEDS", "two", "from 1"), ("SEEDS", "", "from 1"), ("RECALL_STORE", "", "name of a folder"), ("RECALL_STORE", "  ", "name of a folder")])
def test_a_switch_with_a_typo_is_refused(switch, value, allowed):
    if (switch, value) == ("TRAIN", ""):
        assert pool.Plan.of({"TRAIN": ""}) == pool.Plan.of({})
    else:
        with pytest.raises(ValueError, match=f"{switch}=.*{allowed}"):
            pool.Plan.of({switch: value})


def test_a_worker_ends_with_its_parent():
    """A process that trains for another does not train on unseen after that one is killed."""
    child = "import os, time; from lab.pool import end_with_parent; end_with_parent(os.getppid(), 0.1); print(os.getpid(), flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"], stdout=subprocess.PIPE, text=True, cwd=pool.ROOT)
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def slow_run(s):
    """A run of a few seconds."""
    time.sleep(2)
    return toy_run(s)


def endless_run(s):
    """A run that outlasts every test."""
    time.sleep(600)


def killed_run(s):
    """A run that the system ends at seed 3, as it does where memory is short."""
    if s.seed == 3:
        time.sleep(1)  # until the others are kept
        os.kill(os.getpid(), signal.SIGKILL)
    return toy_run(s)


def hungry_run(s):
    """A run that asks for more memory than there is at seed 1."""
    return toy_run(s) | ({"weights": {"w": np.ones(1 << 58)}} if s.seed == 1 else {})


def test_a_killed_worker_is_one_line_and_finished_runs_are_kept(plan):
    """It names the signal, what it means, where the runs are and how to go on."""
    with pytest.raises(RuntimeError, match="a worker was killed .SIGKILL.*memory.*kept in .*LOKY_MAX_CPU_COUNT=1") as raised:
        pool.finished({"a": toys(range(4))}, killed_run, replace(plan, workers=2))
    assert "\n" not in str(raised.value) and raised.value.__suppress_context__
    assert {plan.store(True).get(asdict(Toy(seed=seed))) is not None for seed in range(3)} == {True}
    assert len(pool.finished({"a": toys(range(4))}, toy_run, replace(plan, workers=2))["a"]) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_without_memory_is_named_in_one_line(plan, workers):
    with pytest.raises(RuntimeError, match="1 of 3 runs failed; the others are kept.*MemoryError: Unable to allocate") as raised:
        pool.finished({"a": toys(range(3))}, hungry_run, replace(plan, workers=workers))
    assert "\n" not in str(raised.value) and len(list(plan.folder.glob("*.json"))) == 2


def test_no_worker_outlives_its_parent(tmp_path):
    """Neither the one at work nor those that never had a run to make, a few seconds after a SIGKILL of the parent alone."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_pool as t; from lab import pool; from pathlib import Path\n"
    code += f"pool.finished({{'a': t.toys([0, 1])}}, t.endless_run, pool.Plan(train='missing', folder=Path({str(tmp_path)!r}), workers=3))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=pool.ROOT, stderr=subprocess.DEVNULL)
    workers, deadline = [], time.monotonic() + 60
    while len(workers) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
        workers = [child for child in psutil.Process(parent.pid).children(recursive=True) if any("LokyProcess" in word for word in child.cmdline())]
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(workers, timeout=30)
    for process in left:
        process.kill()
    assert len(workers) == 3 and not left


@pytest.fixture
def dask_cluster():
    """A real scheduler and two worker processes of one thread each on loopback: (address, workers)."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None) as cluster:
        yield cluster.scheduler_address, cluster


@pytest.mark.long
def test_a_cluster_trains_and_a_killed_worker_loses_nothing(tmp_path, dask_cluster):
    """The same bytes as one process makes, though a worker is killed in the middle."""
    address, cluster = dask_cluster
    alone = pool.Plan(train="missing", folder=tmp_path / "alone", workers=1)
    pool.finished({"a": toys(range(6))}, toy_run, alone)
    killed = threading.Timer(3, lambda: os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL))
    killed.start()
    pool.finished({"a": toys(range(6))}, slow_run, replace(alone, folder=tmp_path / "cluster", cluster=address, workers=0))
    folders = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "cluster")]
    assert folders[0] == folders[1]


@pytest.mark.long
def test_a_run_that_ends_every_worker_of_a_cluster_is_one_line(plan, dask_cluster):
    """joblib itself would wait for it without end."""
    with pytest.raises(RuntimeError, match="DASK='tcp://127.0.0.1:.*one run ended every worker that tried it, last tcp.*out of memory") as raised:
        pool.finished({"a": toys(range(4))}, killed_run, replace(plan, cluster=dask_cluster[0]))
    assert "\n" not in str(raised.value) and len(list(plan.folder.glob("*.json"))) == 3


def test_no_scheduler_is_one_line(plan):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="DASK='tcp://127.0.0.1:1': no scheduler answers there"):
        pool.finished({"a": toys([0])}, toy_run, replace(plan, cluster="tcp://127.0.0.1:1"))
