"""Training that is killed goes on where it was, to the same bits."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from lab import pool

CODE = """
import sys
from dataclasses import replace
from lab import pool, report
names = report.definitions()
brief = lambda s: replace(s, budget=150, longest=150, every=50, n=50, stride=40)
some = {"a": [brief(names.setting(model, seed=seed)) for seed in range(4) for model in names.MODELS]}
pool.finished(some, names.run, pool.Plan(train="missing", folder=pool.Path(sys.argv[1])))
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", CODE, str(folder)], cwd=pool.ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcomes(folder):
    """What each run came to: all but its times."""
    found = {}
    for path in folder.glob("*.json"):
        entry = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            found[path.name] = [entry[field] for field in ("setting", "curve", "accuracy", "opening")], {name: arrays[name].tobytes() for name in arrays.files}
    return found


@pytest.mark.long
def test_twenty_kills_and_the_runs_are_the_same_bit_for_bit(tmp_path):
    """SIGKILL to the parent alone at random moments; its workers end, and the next start takes up what is there."""
    began = time.monotonic()
    assert start(tmp_path / "whole").wait(timeout=300) == 0  # compiles the kernels as well
    whole = time.monotonic() - began
    random.seed(1)
    for _ in range(20):
        process = start(tmp_path / "killed")
        try:
            process.wait(timeout=random.uniform(0, min(whole, 15)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start(tmp_path / "killed").wait(timeout=300) == 0
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole") and len(outcomes(tmp_path / "whole")) == 20
    assert not list((tmp_path / "killed").glob(".part-*")) and not list((tmp_path / "killed").glob("*broken*"))
