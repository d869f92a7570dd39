"""From settings to finished runs: out of the store, or trained now on all cores and kept there.

What is asked for comes from the environment, the same in a terminal and in Jupyter:

    TRAIN=          the finished runs of the repository; a missing one is an error that names it
    TRAIN=missing   train what is missing
    TRAIN=1         train everything anew, in a store of its own; what that has already is kept
    SEEDS=n         of the assignment's configurations only the first n seeds
    RECALL_STORE=   the folder where new runs are kept and looked for first (default .runs)
    DASK=           the address of a Dask scheduler, whose workers then train
    PROFILE=smoke   a few steps of everything, for the tests
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import joblib
import torch
from tqdm import tqdm

from lab import store

ROOT = Path(__file__).resolve().parent.parent
SMOKE = dict(budget=20, longest=20, every=10, patience=2, n=20)


class Missing(LookupError):
    """Runs that are asked for and not there."""


@dataclass(frozen=True)
class Plan:
    """What the environment asks for; see the module's text."""

    train: str = ""
    seeds: int = 0
    folder: Path = ROOT / ".runs"
    smoke: bool = False
    cluster: str = ""
    workers: int = 0  # all cores

    @classmethod
    def of(cls, environ=os.environ):
        """Read the environment. Raises ValueError for a switch that is empty or unknown, naming what is allowed."""
        def one_of(name, default, *allowed):
            value = environ.get(name, default)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: one of {', '.join(filter(None, allowed))}")
            return value
        train = one_of("TRAIN", "", "", "0", "missing", "1").replace("0", "")
        smoke = one_of("PROFILE", "full", "full", "smoke") == "smoke"
        seeds = environ.get("SEEDS", "0")
        if not seeds.isdecimal() or "SEEDS" in environ and not int(seeds):
            raise ValueError(f"SEEDS={seeds!r}: a whole number from 1")
        folder = environ.get("RECALL_STORE", str(ROOT / (".runs/anew" if train == "1" else ".runs")))
        if not folder.strip():
            raise ValueError("RECALL_STORE='': the name of a folder is needed")
        return cls(train, int(seeds), Path(folder).resolve(), smoke, environ.get("DASK", ""))

    @property
    def trial(self):
        """Whether the outcome is a trial's, which never takes the place of the committed report."""
        return self.smoke or self.seeds > 0

    def store(self, anew):
        """Where the runs of a group are: everything of a run that is trained `anew` is in its own folder."""
        return store.Store(self.folder, *(() if anew else (ROOT / "runs",)))

    def settings(self, group, settings):
        """A group's settings under this plan."""
        if self.smoke:
            settings = [replace(s, **SMOKE, stride=48 if s.stride else 0) for s in settings if s.seed == settings[0].seed]
        return [s for s in settings if s.seed < self.seeds or not (self.seeds and assigned(group))]


def figures():
    """The folder for figures and tables: `figures/` here, but a trial in the checkout itself never touches the committed ones."""
    folder = Path("trial/figures" if Path.cwd() == ROOT and Plan.of().trial else "figures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def assigned(group):
    """Whether a group is one of the assignment's problems."""
    return group.startswith("P")


def finished(experiments, run, plan=None, say=lambda text: print(text, file=sys.stderr)):
    """{group: [run, ...]} for {group: [setting, ...]}; `run(setting)` makes one and is sent to the workers by value.

    Settings are dataclasses of plain values. Raises Missing where runs are missing and the plan does not say to train them, and
    RuntimeError, after all others are done, for runs that failed.
    """
    plan = plan or Plan.of()
    asked = {group: plan.settings(group, settings) for group, settings in experiments.items()}
    stores = {group: plan.store(anew=plan.train == "1" and (assigned(group) or not plan.seeds)) for group in asked}
    found = {group: [stores[group].get(asdict(s)) for s in settings] for group, settings in asked.items()}
    missing = {store.name(asdict(s)): (group, s) for group in asked for s, entry in zip(asked[group], found[group]) if entry is None}
    count = sum(map(len, found.values()))
    if not missing:
        say(f"{count} finished runs reused; " + (f"remove {plan.folder} to train them again." if plan.train == "1" else "TRAIN=1 trains them anew."))
        return found
    if not plan.train and not plan.smoke:
        raise Missing(missing_text(missing, plan.store(False)))
    say(f"{count - len(missing)} of {count} runs are there; training {len(missing)} on {plan.cluster or f'{plan.workers or joblib.cpu_count()} cores'}, kept in {plan.folder}")
    train_all(missing, run, store.Store(plan.folder, say=say), plan)
    return {group: [stores[group].get(asdict(s)) for s in settings] for group, settings in asked.items()}


def missing_text(missing, known):
    """Which runs are missing, and in what the first differs from the stored run nearest to it."""
    group, s = next(iter(missing.values()))
    wanted, text = asdict(s), f"{len(missing)} runs of the present settings are not among the finished ones, first {group}: {next(iter(missing))}"
    stored = [store.checked(path.read_bytes())["setting"] for path in known.entries()]
    differences = [{k: (e.get(k), v) for k, v in wanted.items() if e.get(k) != (list(v) if isinstance(v, tuple) else v)} for e in stored]
    if differences:
        nearest = min(differences, key=len)
        text += "; the nearest stored run differs in " + ", ".join(f"{k}: {was} there, {now} here" for k, (was, now) in nearest.items())
    return text + ". Put the setting back, or train with TRAIN=missing (only these) or TRAIN=1 (everything)."


def train_all(missing, run, keep, plan):
    """Make the missing runs, {name: (group, setting)}, one thread each, on all cores here or on a cluster, and keep each as it ends."""
    calls = (joblib.delayed(in_worker)(run, s, os.getpid()) for _, s in missing.values())
    ours = {} if plan.cluster else {"initializer": end_with_parent, "initargs": (os.getpid(),)}
    failed = []
    keep.ready()
    with cluster(plan.cluster), killed_workers(plan.folder):
        pool = joblib.Parallel(n_jobs=plan.workers or -1, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs", max_nbytes=None, **ours)
        for s, done, error in tqdm(pool(calls), total=len(missing), desc="training", unit="run", smoothing=0.1):
            name = store.name(asdict(s))
            if error:
                failed.append(f"{name}: {error}")
            else:
                keep.put(asdict(s), **done)
            tqdm.write(f"{name}: {error or outcome(s, done)}", file=sys.stderr)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed; the others are kept. " + "; ".join(failed))


def outcome(s, done):
    """A line about a run that has ended."""
    step, correct = done["curve"][-1] if done["curve"] else (0, 0)
    stopped = done["provenance"].get("stopped")
    return f"{100 * correct / s.n:.1f} % at L after {step:,} steps, {sum(done['seconds'].values()):.0f} s" + (f"; stopped: {stopped}" if stopped else "")


@contextlib.contextmanager
def killed_workers(folder):
    """Let the death of a worker be a RuntimeError of one line, with its cause as far as the system tells it."""
    try:
        yield
    except BrokenProcessPool as error:
        how = re.search(r"\{(\w+)", str(error))
        raise RuntimeError(f"a worker was killed ({how[1] if how else 'cause unknown'}; SIGKILL is how the system takes memory back when there is none left). Finished runs are kept in {folder}, "
                           "the same command goes on from here; LOKY_MAX_CPU_COUNT=1 before it trains one run at a time") from None


@contextlib.contextmanager
def cluster(address):
    """joblib's backend meanwhile: its own processes, or the workers of the Dask scheduler at an address, which must find this project to import."""
    if not address:
        yield
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise ValueError(f"DASK={address!r}: this needs the package `distributed` (pip install distributed)") from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"DASK={address!r}: no scheduler answers there ({error})") from None
    with client, joblib.parallel_config(failing_backend()(client=client, wait_for_workers_timeout=60, retries=3)):
        try:
            yield
        except KilledWorker as error:
            raise RuntimeError(f"DASK={address!r}: one run ended every worker that tried it, last {error.last_worker.address} (out of memory?). Finished runs are kept, the same command goes on from here") from None


def failing_backend():
    """joblib's Dask backend, but that it tells joblib of a task that failed with its workers; joblib 1.6 would wait for it without end."""
    from joblib._dask import DaskDistributedBackend

    class Failing(DaskDistributedBackend):
        def submit(self, func, callback=None):
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: done.exception() and callback(done.exception()))
            return future

        def retrieve_result_callback(self, out):
            if isinstance(out, BaseException):
                raise out
            return super().retrieve_result_callback(out)
    return Failing


def in_worker(run, s, parent):
    """Make one run in this process; returns (setting, what the store keeps of it or None, why it failed or "")."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_heap()
    try:
        done = run(s)
    except Exception as error:  # whatever it is, the other runs go on
        return s, None, " ".join(f"{type(error).__name__}: {error}".split())
    finally:
        if os.getpid() == parent:  # one worker alone works in the process that asks
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
    stopped = done.pop("stopped", "")
    return s, done | {"provenance": provenance() | {"threads": 1} | ({"stopped": stopped} if stopped else {})}, ""


def provenance():
    """What this process computes on: processor and versions. Recorded beside a run's key, never in it."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["numba"] = importlib.metadata.version("numba")
    return {"processor": processor(), "python": platform.python_version(), **versions, "threads": torch.get_num_threads()}


@functools.cache
def processor():
    """The processor's name where the system tells, its architecture and widest vectors, by which results round differently."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def keep_heap():
    """Ask glibc not to hand freed memory back to the system: fresh pages cost a step more than its arithmetic at d = 64."""
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
                libc.mallopt(option, value)


@functools.cache
def end_with_parent(parent, seconds=2.0):
    """Let this process end soon after its parent, at work or idle: a kernel that is restarted tells its workers nothing, and they would train on unseen."""
    def watch():
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
