"""Kernels on disk: a second process compiles nothing and computes the same bits; folders that cannot be used, damage, several processes at once."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cpu_mamba import cache

ROOT = str(Path(cache.__file__).parents[1])
FORWARD = """
    import hashlib, time, torch, numba
    import cpu_mamba, cpu_mamba.scan
    numba.njit(lambda x: x)(1)  # Numba's own start, which is none of the package's
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3).requires_grad_()
    y = cpu_mamba.causal_conv1d_fn(x, torch.randn(5, 2), activation="silu")
    y.sum().backward()
    digest = hashlib.sha256(y.detach().numpy().tobytes() + x.grad.numpy().tobytes()).hexdigest()
    print(digest, time.perf_counter() - start, sum(cpu_mamba.conv.conv_tasks.stats.cache_hits.values()), cpu_mamba.cache.folder(), repr(numba.config.CACHE_DIR))
"""


def python(script, folder, **environment):
    """What a process with its kernels in `folder` prints, word by word."""
    environment = {**os.environ, "CPU_MAMBA_CACHE": str(folder), "PYTHONPATH": ROOT, **environment}
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def kernels(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*.bin"))


def test_a_second_process(tmp_path):
    """Everything comes from disk, in well under a second after the imports; the same bits; Numba's own folder for others is as it was."""
    first, *_ = python(FORWARD, tmp_path)
    made = kernels(tmp_path)
    assert any("conv_tasks" in path.name for path in made) and any("conv_backward_tasks" in path.name for path in made)
    second, seconds, hits, folder, other = python(FORWARD, tmp_path)
    assert second == first and kernels(tmp_path) == made and float(seconds) < 1 and int(hits) == 1
    assert folder == str(tmp_path / cache.digest()) and other == "''"


def test_damaged_files_are_made_again(tmp_path):
    first, *_ = python(FORWARD, tmp_path)
    for path in tmp_path.rglob("*.bin"):
        path.write_bytes(path.read_bytes()[:100])
    assert python(FORWARD, tmp_path)[0] == first
    assert all(path.stat().st_size > 100 for path in tmp_path.rglob("*.bin") if "batch" in path.name)


def test_several_processes_at_once(tmp_path):
    """Three start in an empty folder: each is right, no half-written file stays, and a fourth compiles nothing."""
    environment = {**os.environ, "CPU_MAMBA_CACHE": str(tmp_path), "PYTHONPATH": ROOT}
    all_at_once = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(FORWARD)], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {process.communicate(timeout=300)[0].split()[0] for process in all_at_once}
    made = kernels(tmp_path)
    assert len(digests) == 1 and python(FORWARD, tmp_path)[0] in digests and kernels(tmp_path) == made and not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX file modes")
def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    """A file in the way, no folder wanted, somebody else's folder: the next candidate, or nothing on disk; never an error."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not cache.writable(blocked) and cache.writable(tmp_path / "new" / "folder")
    assert python(FORWARD, blocked)[3] == "None" and python(FORWARD, "")[3] == "None"
    monkeypatch.delenv("CPU_MAMBA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert next(filter(cache.writable, cache.candidates())) == tmp_path / f"cpu_mamba-{os.getuid()}"
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert not cache.writable(tmp_path)


def test_old_folders_go(tmp_path):
    """The last few digests stay, the one in use among them."""
    for k in range(7):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "kernel.bin").write_text("")
        os.utime(tmp_path / str(k), (time.time() - 100 + k,) * 2)
    cache.prune(tmp_path, "0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "4", "5", "6"]


def test_the_digest_follows_the_sources(tmp_path, monkeypatch):
    """A changed line of any source, another processor: another folder."""
    (tmp_path / "lanes.py").write_text("x = 1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    before = cache.digest()
    assert cache.digest() == before
    (tmp_path / "lanes.py").write_text("x = 2")
    changed = cache.digest()
    monkeypatch.setattr(cache.config, "CPU_NAME", "another")
    assert len({before, changed, cache.digest()}) == 3
