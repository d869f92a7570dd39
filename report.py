"""Make the report: train what is missing, execute recall.ipynb, put notebook, figures and report.pdf in place.

Use: ``PROFILE=full python report.py`` (what ``make report`` does), ``python report.py --check`` or ``python report.py --bench``.

Everything is made in ``.build/`` and moved into place at the end, so that an interruption leaves no half-written file.
The full profile replaces the committed files; any other writes to a folder of its name.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from pypdf import PdfReader

from export import ExportError, export, notebook_digest

ROOT = Path(__file__).resolve().parent
NOTEBOOK = "recall.ipynb"
KERNEL_LOG = ROOT / ".build" / "kernel.log"
# Ctrl-C, `kill`, a terminal that closes.
INTERRUPTIONS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_like_ctrl_c():
    """Let each of INTERRUPTIONS raise KeyboardInterrupt, so that workers end with their parent and none trains on unseen.

    What is ignored stays ignored, as SIGHUP is below nohup.
    """
    for number in INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def load_definitions(notebook, folder):
    """Import the notebook's definition cells as a module, from a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recall_definitions.py"
    path.write_text(jupytext.writes(jupytext.read(notebook), fmt="py:percent"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("recall_definitions", path)
    module = sys.modules["recall_definitions"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def execute(notebook, folder, log=os.devnull):
    """Run the notebook top to bottom in `folder`, write it there with its outputs and return its path.

    What the kernel's process says of itself goes to the file `log`. Raises KeyboardInterrupt for Ctrl-C.
    """
    book = nbformat.read(notebook, as_version=4)
    client = NotebookClient(book, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    try:
        with open(log, "w", encoding="utf-8") as words:
            client.execute(stderr=words)
    except Exception as error:
        if hasattr(client, "_async_cleanup_kernel_future"):  # nbclient's answer to Ctrl-C; what it raises then is that its kernel is gone
            raise KeyboardInterrupt from error
        raise
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day would make two equal runs differ
        for output in [o for o in cell.get("outputs", []) if o.get("name") == "stderr"]:
            cell.outputs.remove(output)
            print(output.text, file=sys.stderr)  # progress and warnings are for the terminal
    path = folder / NOTEBOOK
    nbformat.write(book, path)
    return path


def move(source, target):
    """Put every file of `source` under `target`, each in one step; figures that are no longer made go.

    Ctrl-C and its like have no effect meanwhile: notebook, figures and PDF in place are always of one run.
    """
    before = {s: signal.signal(s, signal.SIG_IGN) for s in INTERRUPTIONS}
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


def make(profile):
    """Train, execute, typeset, move; prints where the time went."""
    start = time.perf_counter()
    # Absolute, as the notebook runs in a folder of its own.
    os.environ["RECALL_STORE"] = str(Path(os.environ.get("RECALL_STORE", ROOT / ".runs")).resolve())
    recall = load_definitions(ROOT / NOTEBOOK, ROOT / ".build" / "module")
    try:
        chosen = recall.chosen_profile(profile)
    except ValueError as error:
        sys.exit(str(error))
    stage = ROOT / ".build" / profile
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    results = recall.run_all(recall.jobs(chosen), chosen)
    trained = time.perf_counter()
    shutil.copy(ROOT / NOTEBOOK, stage / NOTEBOOK)
    notebook = execute(stage / NOTEBOOK, stage, KERNEL_LOG)
    executed = time.perf_counter()
    export(notebook, stage / "report.pdf")
    if failed := failures(nbformat.read(notebook, as_version=4)):
        sys.exit("\n".join(failed) + f"\nNothing in place was touched; this run's notebook, figures and report.pdf are in {stage}")
    target = ROOT if profile == "full" else ROOT / profile
    move(stage, target)
    minutes = lambda seconds: f"{seconds / 60:6.1f} min"
    print(f"training in this call      {minutes(trained - start)}  ({len(results)} runs; their own work, whenever it was done:")
    print(f"  steps                    {minutes(sum(r['seconds'][0] for r in results))}  on one core,")
    print(f"  test lengths             {minutes(sum(r['seconds'][1] for r in results))}  on one core)")
    print(f"notebook                   {minutes(executed - trained)}")
    print(f"PDF                        {minutes(time.perf_counter() - executed)}")
    print(f"written: {target / NOTEBOOK}, {target / 'figures'}, {target / 'report.pdf'}")


def failures(book):
    """What cells said that raised and were passed over, as the check of the claims is, so that the rest of the report is made."""
    return [output.evalue for cell in book.cells for output in cell.get("outputs", []) if output.output_type == "error"]


def provenance(book):
    """What the notebook's provenance output recorded of its run, {} where there is none."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "provenance" in output.get("metadata", {}):
                return output.metadata.provenance
    return {}


def stale(root=ROOT):
    """Why outputs, figures or PDF do not belong to the committed definitions and configurations; empty when they do."""
    root, reasons = Path(root), []
    book = nbformat.read(root / NOTEBOOK, as_version=4)
    recall = load_definitions(root / NOTEBOOK, root / ".build" / "module")
    code = recall.code_hash(recall.definitions())
    recorded = provenance(book)
    if recorded.get("definitions") != code:
        reasons.append(f"{NOTEBOOK}: outputs are of definitions {recorded.get('definitions', 'unknown')}, the cells are {code}")
    if recorded.get("profile") != "full":
        reasons.append(f"{NOTEBOOK}: outputs are of profile {recorded.get('profile', 'unknown')}, not full")
    record = root / "figures" / "provenance.json"
    figures = json.loads(record.read_text()) if record.is_file() else {}
    if figures.get("definitions") != code:
        reasons.append(f"figures: made by definitions {figures.get('definitions', 'unknown')}, the cells are {code}")
    for name, digest in figures.get("files", {}).items():
        file = root / "figures" / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            reasons.append(f"figures/{name} is not the file that the run wrote")
    pdf = root / "report.pdf"
    keywords = (PdfReader(pdf).metadata or {}).get("/Keywords", "") if pdf.is_file() else ""
    if f"definitions={code}" not in keywords:
        reasons.append("report.pdf: not of these definitions")
    if f"notebook={notebook_digest(book)}" not in keywords:
        reasons.append(f"report.pdf: not typeset from this {NOTEBOOK}")
    return reasons


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        found = stale()
        print("\n".join(found) or "outputs, figures and report.pdf belong to the committed code")
        sys.exit(bool(found))
    elif sys.argv[1:] == ["--bench"]:
        load_definitions(ROOT / NOTEBOOK, ROOT / ".build" / "module").bench()
        sys.exit()
    elif sys.argv[1:]:
        sys.exit("usage: [PROFILE=full|quick|smoke] python report.py [--check | --bench]")
    end_like_ctrl_c()
    try:
        make(os.environ.get("PROFILE", "full"))
    except ExportError as error:
        sys.exit(f"report: {error}")
    except DeadKernelError:
        sys.exit(f"report: the notebook's kernel died (out of memory?); what it said is in {KERNEL_LOG}")
    except KeyboardInterrupt:
        sys.exit("interrupted; finished runs are kept, `make report` goes on from here")
