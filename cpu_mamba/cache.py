"""Numba's compiled kernels on disk: in a folder of their own, keyed by this package's sources, the versions and the processor.

The folder is `CPU_MAMBA_CACHE` where that is set (empty: nothing is kept on disk), else the user's cache folder, else one of the user's
own in the temporary folder. Numba itself looks at a function's own source file alone, and would not see a change in what it calls.
"""

import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import llvmlite.binding
import numba
from numba.core import caching, config, serialize

KEPT = 4  # digests whose folders stay; older ones are removed


def digest() -> str:
    """What a compiled kernel depends on: every source of the package, versions, processor, Numba's own settings."""
    host = (config.CPU_NAME or llvmlite.binding.get_host_cpu_name(), config.CPU_FEATURES or llvmlite.binding.get_host_cpu_features().flatten())
    made = (sys.version, numba.__version__, llvmlite.__version__, *host, config.OPT, config.BOUNDSCHECK)
    hasher = hashlib.sha256(repr(made).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.name.encode() + path.read_bytes())
    return hasher.hexdigest()[:16]


def candidates():
    """Folders for the kernels of all digests, the best first."""
    if "CPU_MAMBA_CACHE" in os.environ:
        return [Path(os.environ["CPU_MAMBA_CACHE"])] if os.environ["CPU_MAMBA_CACHE"] else []
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        user = Path.home() / "Library" / "Caches"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    return [Path(user) / "cpu_mamba", Path(tempfile.gettempdir()) / f"cpu_mamba-{owner}"]


def writable(root):
    """Make the folder; whether files can be written there and, unless it was asked for, nobody else has made it."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=root).close()
        return "CPU_MAMBA_CACHE" in os.environ or not hasattr(os, "getuid") or root.stat().st_uid == os.getuid()
    except OSError:
        return False


def prune(root, keep):
    """Remove the folders of all but the last used digests; a process that still works in one compiles again."""
    try:
        folders = sorted((p for p in root.iterdir() if p.is_dir() and p.name != keep), key=lambda p: p.stat().st_mtime)
        for old in folders[: max(0, len(folders) - KEPT + 1)]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        pass  # another process does the same


@functools.cache
def folder():
    """The folder of this digest, or None where nothing can be kept."""
    try:
        root = next(filter(writable, candidates()), None)
        if root is None:
            return None
        here = root / digest()
        here.mkdir(exist_ok=True)
        os.utime(here)
        prune(root, here.name)
        return here
    except (OSError, RuntimeError):  # no home, no processor's name
        return None


class Files:
    """One file for each compiled signature. Numba's own index and its numbered files can be mixed up by processes that compile at once."""

    def __init__(self, root, base):
        self.root, self.base = root, base

    def path(self, key):
        """The file of a signature."""
        return self.root / f"{self.base}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}.bin"

    def load(self, key):
        """What is kept for a signature, or None."""
        try:
            name, data = pickle.loads(self.path(key).read_bytes())
            return data if name == repr(key) else None
        except Exception:  # not there, or damaged: compile
            return None

    def save(self, key, data):
        """Keep `data` for a signature, whole or not at all."""
        part = None
        try:
            self.root.mkdir(exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.root, suffix=".part")
            with open(handle, "wb") as file:
                file.write(serialize.dumps((repr(key), data)))
            os.replace(part, self.path(key))
        except OSError:  # a full disk costs time, nothing else
            if part and os.path.exists(part):
                os.unlink(part)

    def flush(self):
        """Remove what is kept of this function."""
        for path in self.root.glob(f"{self.base}-*.bin"):
            path.unlink(missing_ok=True)


def keep(dispatcher):
    """Let the compiled forms of an njit function be kept on disk; returns it. Other functions in the process keep theirs as before."""
    root = folder()
    if root is None:
        return dispatcher
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(root)
        cache = caching.FunctionCache(dispatcher.py_func)
        cache._impl.locator.ensure_cache_path = lambda: None
        cache._cache_file = Files(root, f"{dispatcher.py_func.__module__.rpartition('.')[2]}.{dispatcher.py_func.__name__}")
        dispatcher._cache = cache
    except Exception:  # another version of Numba, whose caches are made otherwise: compile in every process
        pass
    finally:
        config.CACHE_DIR = before
    return dispatcher
