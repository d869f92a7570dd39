"""The store of finished runs: nothing lost, nothing mistaken, nothing executed."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from lab import store
from lab.pool import ROOT

SETTING = dict(model="mamba", d=8, M=1, tau=1, norm="layer", rate=0.003, seed=0, betas=[0.9, 0.98])
DATA = dict(curve=[[100, 5]], accuracy=[[3, 1, 5]], opening=[2.5, 2.4], seconds={"training": 1.0}, provenance={"processor": "x"})


@pytest.fixture
def said():
    return []


@pytest.fixture
def kept(tmp_path, said):
    """A store with one run, and what it says."""
    kept = store.Store(tmp_path / "runs", say=said.append)
    kept.put(SETTING, {"a": np.arange(6, dtype=np.float32)}, **DATA)
    return kept


def test_a_run_comes_back_as_it_was(kept):
    run = kept.get(SETTING)
    assert {k: run[k] for k in DATA} == DATA and run["setting"] == SETTING
    assert np.array_equal(run["weights"]["a"], np.arange(6, dtype=np.float32)) and run["weights"]["a"].dtype == np.float32
    assert kept.get(SETTING | {"seed": 1}) is None


def test_the_key_is_of_the_setting_alone():
    """Order and tuples do not count, every value does."""
    assert store.key(SETTING) == store.key(dict(reversed(SETTING.items()))) == store.key(SETTING | {"betas": (0.9, 0.98)})
    changed = [store.key(SETTING | {name: "other"}) for name in SETTING] + [store.key(SETTING | {"more": 1})]
    assert len({store.key(SETTING), *changed}) == len(changed) + 1


def test_equal_runs_are_equal_bytes(kept, tmp_path):
    other = store.Store(tmp_path / "other")
    other.put(SETTING, {"a": np.arange(6, dtype=np.float32)}, **DATA)
    for path in kept.folder.iterdir():
        assert path.read_bytes() == (other.folder / path.name).read_bytes()


def test_300_byte_flips_are_300_found(tmp_path, said):
    """One byte of a real entry changed, in its data or its weights: it is never used."""
    random.seed(0)
    names = sorted(p.stem for p in (ROOT / "runs").glob("*.json"))
    for _ in range(300):
        name, suffix, folder = random.choice(names), random.choice([".json", ".npz"]), tmp_path / "flip"
        folder.mkdir()
        for ending in (".json", ".npz"):
            shutil.copy(ROOT / "runs" / (name + ending), folder)
        setting = store.checked((folder / (name + ".json")).read_bytes())["setting"]
        path = folder / (name + suffix)
        data = bytearray(path.read_bytes())
        at = random.randrange(len(data))
        data[at] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        before = len(said)
        run = store.Store(folder, say=said.append).get(setting)
        assert run is None and len(said) == before + 1, (name, suffix, at)
        shutil.rmtree(folder)


def test_each_damage_is_one_line_and_set_aside(kept, said):
    """A foreign file, a list, a missing field, cut-off data, missing weights, another format: named, kept, not used; nothing is overwritten."""
    path = kept.folder / f"{store.name(SETTING)}.json"
    good, weights = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    entry = json.loads(good)
    broken = [b"", b"\x80\x04N.", b"[1, 2]", b"{}", good[:-40], json.dumps(entry | {"format": 99}).encode(), json.dumps(entry | {"curve": [[100, 1000]]}).encode(), None]
    for number, data in enumerate(broken, 1):
        path.write_bytes(good if data is None else data)
        path.with_suffix(".npz").write_bytes(weights)
        if data is None:
            path.with_suffix(".npz").unlink()
        assert kept.get(SETTING) is None
        assert len(said) == number and "\n" not in said[-1] and str(path) in said[-1] and f".broken-{number}.json" in said[-1]
        assert path.with_suffix(f".broken-{number}.json").exists() and not path.exists()
    assert kept.entries() == []


def test_another_runs_file_under_this_name_is_not_this_run(kept, said):
    other = SETTING | {"seed": 1}
    for ending in (".json", ".npz"):
        shutil.copy(kept.folder / (store.name(SETTING) + ending), kept.folder / (store.name(other) + ending))
    assert kept.get(other) is None and "it holds the run" in said[0]
    assert kept.get(SETTING) is not None


def test_nothing_is_executed(kept, tmp_path):
    """A pickle in the weights' place, even with the right hash, is not loaded."""
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    path = kept.folder / f"{store.name(SETTING)}.npz"
    np.savez(path, a=np.array([Harm()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        with np.load(path, allow_pickle=False) as arrays:
            arrays["a"]
    assert kept.get(SETTING) is None and not (tmp_path / "harm").exists()


def test_a_full_disk_leaves_what_was_there(kept, monkeypatch):
    before = {p.name: p.read_bytes() for p in kept.folder.iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        kept.put(SETTING | {"seed": 7}, {"a": np.zeros(3)}, **DATA)
    assert {p.name: p.read_bytes() for p in kept.folder.iterdir()} == before


def test_what_is_not_plain_is_refused(kept):
    with pytest.raises(ValueError):
        kept.put(SETTING | {"rate": float("nan")}, {}, **DATA)
    with pytest.raises(TypeError):
        kept.put(SETTING | {"model": {1, 2}}, {}, **DATA)


def test_wrong_places_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="name of a folder"):
        store.Store("")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="this is a file"):
        store.Store(tmp_path / "file")


def test_a_second_folder_is_read_and_never_written(kept, tmp_path):
    both = store.Store(tmp_path / "new", kept.folder)
    assert both.get(SETTING) is not None and not (tmp_path / "new").exists()
    both.put(SETTING | {"seed": 1}, {}, **DATA)
    assert len(both.entries()) == 2 and len(kept.entries()) == 1


def test_parts_of_dead_processes_are_swept(kept):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, left = (kept.folder / f".part-{number}-x.json" for number in (os.getpid(), dead.pid))
    mine.touch()
    left.touch()
    kept.sweep()
    assert mine.exists() and not left.exists()
