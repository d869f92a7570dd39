"""Make the report: runs from the store or trained, the notebook executed, typeset, put in place. Called by the Makefile.

    python -m lab.report             make the report
    python -m lab.report --replay    does the present code still make the stored runs?
    python -m lab.report --check     do outputs, figures and PDF belong to the committed code, and the tables to the runs? The measurements
                                     inside the networks are made again in the first seed of every configuration; with --all, in all

Everything is made in a folder of this process under `.build/` and moved into place at the end, so that an interruption leaves no
half-made report. What the environment may say is in lab/pool.py; a trial's report goes to `trial/`.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import nbformat
import pandas as pd
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from pypdf import PdfReader
from traitlets.config import Config

from lab import pool, replay, tables
from lab.pdf import ExportError, export, notebook_digest

ROOT = pool.ROOT
NOTEBOOK = "recall.ipynb"
BUILD = ROOT / ".build"
CODE = ("cpu_mamba/*.py", "lab/*.py", "lab/*.typ")
# Ctrl-C, `kill`, a terminal that closes.
INTERRUPTIONS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def definitions(notebook=ROOT / NOTEBOOK):
    """The names that the notebook's definition cells define (those without the tag `active-ipynb`), from one execution of them.

    They are made in a namespace called `__main__`, as in the notebook itself, so that joblib sends its functions to workers by value.
    """
    names = {"__name__": "__main__"}
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
        if cell.cell_type == "code" and "active-ipynb" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"{Path(notebook).name}, cell {number}", "exec"), names)
    return SimpleNamespace(**names)


def code_digest(book, root=ROOT):
    """Hash of all that the report's outputs come from: the notebook's code cells and both packages."""
    digest = hashlib.sha256("\0".join(cell.source for cell in book.cells if cell.cell_type == "code").encode())
    for path in sorted(p for pattern in CODE for p in Path(root).glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def channel(folder):
    """How to talk to a notebook's kernel, as nbclient's settings: by TCP on loopback or, where a process may not, through sockets in `folder`."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            return Config()
    except OSError:
        return Config(KernelManager={"transport": "ipc", "ip": str(Path(folder) / "kernel")})


def execute(notebook, folder):
    """Run a notebook top to bottom in `folder`, write it there with its outputs, say which cell is at work; returns its path."""
    book = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]

    def say(cell, cell_index):
        if cell.cell_type == "code":
            line = next((x for x in cell.source.splitlines() if x.strip()), "")
            print(f"  cell {cells.index(cell) + 1:2d} of {len(cells)}  {line[:90]}", file=sys.stderr, flush=True)

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="recall-") as sockets, open(folder / "kernel.log", "w", encoding="utf-8") as words:
        client = NotebookClient(book, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, on_cell_execute=say, config=channel(sockets))
        try:
            client.execute(stderr=words)
        except (CellExecutionError, DeadKernelError):
            raise
        except Exception as error:
            if hasattr(client, "_async_cleanup_kernel_future"):  # nbclient's answer to Ctrl-C; what it raises then is that its kernel is gone
                raise KeyboardInterrupt from error
            raise
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day would make two equal runs differ
        for output in [o for o in cell.get("outputs", []) if o.get("name") == "stderr"]:
            cell.outputs.remove(output)
    path = Path(folder) / NOTEBOOK
    nbformat.write(book, path)
    (folder / "kernel.log").unlink()
    return path


def failures(book):
    """What cells said that raised and were passed over, as the check of the claims is, so that the rest of the report is made."""
    return [output.evalue for cell in book.cells for output in cell.get("outputs", []) if output.output_type == "error"]


def move(source, target):
    """Put every file of `source` under `target`, each in one step; figures that are no longer made go.

    Ctrl-C and its like have no effect meanwhile: notebook, figures and PDF in place are always of one run.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTIONS}
    try:
        for old in (target / "figures").glob("*"):
            if not (source / "figures" / old.name).exists():
                old.unlink()
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone():
    """Hold the one lock on the report in place; a second process is told who has it. The system frees a dead owner's lock."""
    BUILD.mkdir(exist_ok=True)
    owner, lock = BUILD / "owner", filelock.FileLock(BUILD / "lock")
    try:
        with lock.acquire(timeout=0):
            owner.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            yield
    except filelock.Timeout:
        raise SystemExit(f"another report is being made here ({owner.read_text() if owner.exists() else 'just begun'}); wait for it, or end it") from None


def make(plan):
    """Runs, notebook, PDF, into place; says what was reused, and where the time went."""
    start = time.perf_counter()
    os.environ["RECALL_STORE"] = str(plan.folder)  # absolute, as the notebook runs in a folder of its own
    for left in BUILD.glob("stage-*"):  # of processes that died: this one holds the lock
        shutil.rmtree(left)
    stage = BUILD / f"stage-{os.getpid()}"
    stage.mkdir()
    names = definitions()
    pool.finished(names.EXPERIMENTS, names.run, plan)
    trained = time.perf_counter()
    notebook = execute(ROOT / NOTEBOOK, stage)
    executed = time.perf_counter()
    book = nbformat.read(notebook, as_version=4)
    export(notebook, stage / "report.pdf", keywords=(f"code={code_digest(book)}", f"notebook={notebook_digest(book)}"))
    if failed := failures(book):
        kept = BUILD / "failed"
        shutil.rmtree(kept, ignore_errors=True)
        stage.rename(kept)
        raise SystemExit("\n".join(failed) + f"\nNothing in place was touched; this run's notebook, figures and report.pdf are in {kept}")
    target = ROOT / "trial" if plan.trial else ROOT
    move(stage, target)
    shutil.rmtree(stage)
    times = (("runs", trained - start), ("notebook", executed - trained), ("PDF", time.perf_counter() - executed))
    print("  ".join(f"{what} {seconds / 60:.1f} min" for what, seconds in times))
    print(f"written: {target / NOTEBOOK}, {target / 'figures'}, {target / 'report.pdf'}")


def measured(names, runs, notebook=ROOT / NOTEBOOK):
    """mechanisms.csv of some runs, {group: [run, ...]}, as the notebook's own cells make it now: those that use lab/inside.py."""
    active = [cell for cell in nbformat.read(notebook, as_version=4).cells if "active-ipynb" in cell.metadata.get("tags", [])]
    sources = [cell.source for cell in active if re.search(r"\binside\.", cell.source)]
    space = vars(names) | {"RUNS": runs, "pool": pool, "tables": tables, "pd": pd}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small batches would wait for a second one
    try:
        with tempfile.TemporaryDirectory(prefix="recall-") as folder, contextlib.chdir(folder):  # they write their table where they are
            for source in sources:
                exec(compile(source, Path(notebook).name, "exec"), space)
    finally:
        torch.set_num_threads(threads)
    return space["mechanisms"]


def stale(root=ROOT, seeds=(0,)):
    """Why outputs, figures, tables or PDF do not belong to the committed code and runs; empty when they do.

    All tables are made again, but of the measurements inside the networks only those of some `seeds`; None for all.
    """
    root, reasons = Path(root), []
    book = nbformat.read(root / NOTEBOOK, as_version=4)
    code = code_digest(book)
    record = root / "figures" / "provenance.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if made.get("code") != code:
        reasons.append(f"figures and outputs: made by code {made.get('code', 'unknown')}, the present is {code}")
    for name, digest in made.get("files", {}).items():
        file = root / "figures" / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            reasons.append(f"figures/{name} is not the file that the run wrote")
    pdf = root / "report.pdf"
    keywords = (PdfReader(pdf).metadata or {}).get("/Keywords", "") if pdf.is_file() else ""
    for name, digest in (("code", code), ("notebook", notebook_digest(book))):
        if f"{name}={digest}" not in keywords:
            reasons.append(f"report.pdf: not of the present {name}")
    names = definitions(root / NOTEBOOK)
    runs = pool.finished(names.EXPERIMENTS, names.run, pool.Plan(), say=lambda text: None)
    counted = (*tables.tidy(runs), tables.searched(runs))
    for name, now, values in zip(("accuracy", "convergence", "search"), counted, (["correct"], ["correct"], ["steps", "steps_to_90", "percent"])):
        reasons += [f"figures/{name}.csv: {line}" for line in tables.differing(pd.read_csv(root / "figures" / f"{name}.csv"), now, values)]
    there = pd.read_csv(root / "figures" / "mechanisms.csv")
    if seeds is not None:
        there, runs = there[there.seed.isin(seeds)], {group: [r for r in members if r["setting"]["seed"] in seeds] for group, members in runs.items()}
    if seeds != ():
        now = measured(names, runs, root / NOTEBOOK)
        reasons += [f"figures/mechanisms.csv: {line}" for line in tables.differing(there, now, ["percent"], now.measurement.map(replay.rounding))]
    return reasons


def interruptible():
    """Let each of INTERRUPTIONS raise KeyboardInterrupt, so that workers end with their parent; what is ignored stays so, as below nohup."""
    for number in INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def main(arguments):
    """What the module's text says; every foreseeable failure is one line and exit status 1."""
    interruptible()
    try:
        plan = pool.Plan.of()
        if arguments == ["--replay"]:
            names = definitions()
            print(replay.replay(pool.finished(names.EXPERIMENTS, names.run, plan), names.REPLAY).to_string(index=False))
        elif arguments in (["--check"], ["--check", "--all"]):
            found = stale(seeds=None if "--all" in arguments else (0,))
            print("\n".join(found) or "outputs, figures and report.pdf belong to the committed code and runs")
            return int(bool(found))
        elif arguments:
            return f"{' '.join(arguments)}: unknown, one of --replay, --check, --check --all, or nothing"
        else:
            with alone():
                make(plan)
    except DeadKernelError:
        return "report: the notebook's kernel died (out of memory?)"
    except MemoryError as error:
        return f"report: out of memory: {error}"
    except (ValueError, pool.Missing, replay.Stale, RuntimeError, ExportError) as error:
        return f"report: {error}"
    except OSError as error:
        return f"report: {error.strerror or error}: {error.filename or ''}"
    except CellExecutionError as error:
        return f"report: out of memory in a cell of {NOTEBOOK}" if error.ename == "MemoryError" else f"report: a cell of {NOTEBOOK} raised:\n{error}"
    except KeyboardInterrupt:
        return "interrupted; finished runs are kept, the same command goes on from here"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
