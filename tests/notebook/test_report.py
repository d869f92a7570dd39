"""The report: the notebook as committed, and what `make report` does on a copy of the tree."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from lab import inside, pool, replay, report, tables
from lab.pdf import export
from nbclient.exceptions import CellExecutionError
from pypdf import PdfReader

ROOT = report.ROOT


@pytest.fixture(scope="module")
def book():
    return nbformat.read(ROOT / "recall.ipynb", as_version=4)


def code_cells(book):
    return [c for c in book.cells if c.cell_type == "code"]


def test_a_cell_fits_on_a_screen(book):
    """At most 900 lines of code, no cell over 40."""
    lines = [len(c.source.splitlines()) for c in code_cells(book)]
    assert sum(lines) <= 900 and max(lines) <= 40


def test_the_committed_notebook_is_one_clean_run(book):
    """Execution counts 1, 2, 3, ... in order, no error, no stderr text, no widget."""
    cells = code_cells(book)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr" or "widget" in str(o.get("data", {}).keys())]


def test_every_question_has_its_heading(book):
    """P1a to P3b each stand in a heading."""
    headings = [line for c in book.cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("#")]
    for question in ("P1a", "P1b", "P1c", "P2a", "P2b", "P2c", "P3a", "P3b"):
        assert any(question in line for line in headings), question


def test_the_committed_report_is_not_stale():
    """Outputs, figures and PDF belong to the committed code, the tables to the runs."""
    assert report.stale() == []


def test_a_stale_report_is_told(tmp_path):
    """A changed definition, figure, output or row of a table: each is a reason, and every row is named."""
    for name in ("recall.ipynb", "report.pdf"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("figures", "lab", "cpu_mamba"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert report.stale(tmp_path, seeds=()) == []
    copy = nbformat.read(tmp_path / "recall.ipynb", as_version=4)
    next(c for c in copy.cells if "def vocabulary" in c.source).source += "\nEXTRA = 1"
    nbformat.write(copy, tmp_path / "recall.ipynb")
    (tmp_path / "figures" / "p1a.pdf").write_bytes(b"another")
    for name, number in (("accuracy", ",1000,"), ("search", ",3000,")):
        table = tmp_path / "figures" / f"{name}.csv"
        table.write_text(table.read_text().replace(number, number + "1", 2))
    found = "\n".join(report.stale(tmp_path, seeds=()))
    for reason in ("figures and outputs: made by code", "figures/p1a.pdf is not the file", "figures/accuracy.csv is not the file", "report.pdf: not of the present code",
                   "report.pdf: not of the present notebook"):
        assert reason in found
    assert [found.count(f"figures/{name}.csv: ") for name in ("accuracy", "convergence", "search", "mechanisms")] == [2, 0, 2, 0]


def test_measurements_are_made_again_and_compared_up_to_rounding(tmp_path, recall):
    """What the notebook's cells measure in one network of each kind of mixer is what the committed table says; a row that is further off than rounding moves it is named."""
    runs = pool.finished({group: recall.EXPERIMENTS[group] for group in recall.EXPERIMENTS if pool.assigned(group)}, recall.run, pool.Plan(), say=lambda text: None)
    few = {group: [r for r in members if r["setting"]["seed"] == 3 and (group, r["setting"]["model"]) in (("P1a", "rope"), ("P1b", "hybrid"))] for group, members in runs.items()}
    before, now = set(Path.cwd().iterdir()), report.measured(recall, few)
    assert set(Path.cwd().iterdir()) == before
    committed = pd.read_csv(ROOT / "figures" / "mechanisms.csv").query("seed == 3 and M == 1 and (model == 'rope' and tau == 1 or model == 'hybrid' and tau == 5)")
    allowed = now.measurement.map(replay.rounding)
    assert len(now) > 50 and tables.differing(committed, now, ["percent"], allowed) == []
    for share, named in ((0.9, 0), (1.1, len(now))):
        moved = committed.assign(percent=committed.percent + share * committed.measurement.map(replay.rounding))
        assert len(tables.differing(moved, now, ["percent"], allowed)) == named
    assert [line.rsplit(": ", 1)[1][:7] for line in tables.differing(committed[1:], now, ["percent"], allowed)] == ["missing"]


def test_rounding_is_allowed_two_answers_of_those_a_row_counts(recall, monkeypatch):
    """No row counts fewer sequences than the allowance says, but those without any."""
    counted, percent = [], inside.percent
    monkeypatch.setattr(inside, "percent", lambda right: counted.append(len(right)) or percent(right))
    runs = pool.finished({group: recall.EXPERIMENTS[group] for group in recall.EXPERIMENTS if pool.assigned(group)}, recall.run, pool.Plan(), say=lambda text: None)
    few = {group: [r for r in members if r["setting"]["seed"] == 4 and r["setting"]["model"] == "mamba"] for group, members in runs.items()}
    table = report.measured(recall, few)
    for measurement, number in zip(table.measurement[~table.measurement.str.startswith("mass")], counted, strict=True):
        assert number == 0 or 100 * replay.TIES / number <= replay.rounding(measurement), (measurement, number)


@pytest.fixture
def start(tmp_path):
    """start(*arguments, within=(), **variables): Python in `tmp_path`, after the words of `within`, in a process group of its own, which ends with the test."""
    started = []

    def start(*arguments, within=(), **variables):
        started.append(subprocess.Popen([*within, sys.executable, *arguments], cwd=tmp_path, env=os.environ | variables, text=True, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def make_report(tmp_path, start):
    """What `make report` does, in `tmp_path` on a copy of what it runs and of what it would replace."""
    for name in ("recall.ipynb", "report.pdf"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("figures", "lab", "cpu_mamba"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return lambda **variables: start("-m", "lab.report", PROFILE="smoke", **variables)


def apart(*words):
    """The words that run a command in namespaces of its own, as `unshare` makes them; skips the test where the system has or allows none."""
    words = ["unshare", "--map-root-user", *words]
    if not shutil.which("unshare") or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    return words


def contents(folder):
    """Every file below a folder that is not the run's own, with its bytes."""
    own = {".build", ".runs", "trial", "__pycache__"}
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not own & set(p.relative_to(folder).parts)}


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.long
def test_the_whole_report_in_the_smoke_profile(tmp_path, make_report):
    """Runs, notebook, figures and PDF from nothing, written to `trial/`; what is in place stays as it is. A second call reuses the runs."""
    before, process = contents(tmp_path), make_report()
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert contents(tmp_path) == before and not list(tmp_path.rglob(".part-*"))
    names = {p.name for p in (tmp_path / "trial" / "figures").iterdir()}
    assert {"accuracy.csv", "convergence.csv", "mechanisms.csv", "provenance.json", "p1a.pdf", "p1a.png"} <= names
    pdf = PdfReader(tmp_path / "trial" / "report.pdf")
    assert len(pdf.pages) >= 5 and "Transformer or Mamba" in pdf.pages[0].extract_text()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_report_leaves_all_in_place(tmp_path, make_report, name):
    """Ctrl-C, `kill`, a closing terminal while the workers train: one line, no file in place changed, no worker trains on."""
    here = signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)  # a child ignores what is ignored here
    before, process = contents(tmp_path), make_report()
    signal.signal(getattr(signal, name), here)
    until(lambda: list(tmp_path.glob(".runs/*.json")) or process.poll() is not None)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "goes on from here" in said and "Traceback" not in said
    assert contents(tmp_path) == before and not list(tmp_path.glob(".runs/.part*"))

    def gone():
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
    until(gone, 30)


def test_a_second_report_is_told_who_makes_the_first(tmp_path, make_report):
    first = make_report()
    until((tmp_path / ".build" / "owner").exists)
    second = make_report()
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 1 and f"another report is being made here (process {first.pid} since" in said and "Traceback" not in said


@pytest.mark.parametrize("variables, said", [(dict(PROFILE="ful"), "PROFILE='ful': one of full, smoke"), (dict(RECALL_STORE=""), "name of a folder is needed"),
                                             (dict(TRAIN="yes"), "TRAIN='yes'"), (dict(SEEDS="0"), "SEEDS='0'"), (dict(RECALL_STORE="recall.ipynb"), "this is a file")])
def test_a_wrong_switch_is_one_line(tmp_path, make_report, start, variables, said):
    """It names the switch, its value and what is allowed; nothing is written."""
    before, process = contents(tmp_path), (make_report(**variables) if "PROFILE" not in variables else start("-m", "lab.report", **variables))
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and said in text and "Traceback" not in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["checkout", "store"])
def test_a_read_only_place_is_one_line(tmp_path, make_report, place):
    """It names the path and the cause, before anything is trained; nothing is written."""
    folder = {"checkout": tmp_path, "store": tmp_path / "kept"}[place]
    folder.mkdir(exist_ok=True)
    read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd . && exec "$@"'
    before = contents(tmp_path)
    said = make_report(within=[*apart("--mount"), "sh", "-c", read_only, str(folder)], RECALL_STORE=str(tmp_path / "kept")).communicate(timeout=100)[0].splitlines()
    assert said[-1].startswith(f"report: Read-only file system: {folder}") and not any("Traceback" in line or "training:" in line for line in said)
    assert contents(tmp_path) == before


def test_a_notebook_runs_without_a_network(tmp_path, start):
    """Not even loopback, by which Jupyter talks to its kernels unless told otherwise."""
    cells = [nbformat.v4.new_code_cell("print(6 * 7)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    code = "import pathlib\nfrom lab import report\nassert report.channel('x')\nprint(report.execute('recall.ipynb', pathlib.Path('.')))"
    said = start("-c", code, within=apart("--net"), PYTHONPATH=str(ROOT)).communicate(timeout=100)[0]
    assert said.endswith("recall.ipynb\n"), said
    assert nbformat.read(tmp_path / "recall.ipynb", as_version=4).cells[0].outputs[0].text == "42\n"


def test_a_killed_kernel_is_one_line(tmp_path, monkeypatch):
    """As the system does where memory is short."""
    cells = [nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    monkeypatch.setattr(report, "BUILD", tmp_path / "build")
    monkeypatch.setattr(report, "interruptible", lambda: None)
    monkeypatch.setattr(report, "make", lambda plan: report.execute(tmp_path / "recall.ipynb", tmp_path))
    assert report.main([]) == "report: the notebook's kernel died (out of memory?)"


def test_ctrl_c_in_a_cell_stops_without_a_traceback(tmp_path, start):
    """Interrupted while the notebook runs: KeyboardInterrupt, which `make report` answers in one line, and the notebook as it was."""
    cells = [nbformat.v4.new_code_cell("import time\nopen('started', 'w').close()\ntime.sleep(60)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    before = (tmp_path / "recall.ipynb").read_bytes()
    code = "import pathlib\nfrom lab import report\ntry: report.execute('recall.ipynb', pathlib.Path('.'))\nexcept KeyboardInterrupt: print('interrupted')"
    process = start("-c", code, PYTHONPATH=str(ROOT))
    until((tmp_path / "started").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert "interrupted\n" in process.communicate(timeout=60)[0]
    assert (tmp_path / "recall.ipynb").read_bytes() == before


def test_claims_that_fail_leave_a_report_to_read(tmp_path):
    """A cell that may raise stops neither the run nor the PDF, which says what it said; any other does."""
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("assert False, 'claims that do not hold: 2 < 1'"), nbformat.v4.new_code_cell("print('and on')")]
    cells[1].metadata.tags = ["raises-exception"]
    (tmp_path / "run").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    path = report.execute(tmp_path / "recall.ipynb", tmp_path / "run")
    assert report.failures(nbformat.read(path, as_version=4)) == ["claims that do not hold: 2 < 1"]
    export(path, tmp_path / "report.pdf")
    text = PdfReader(tmp_path / "report.pdf").pages[0].extract_text()
    assert "claims that do not hold: 2 < 1" in text and "and on" in text
    del cells[1].metadata["tags"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    with pytest.raises(CellExecutionError):
        report.execute(tmp_path / "recall.ipynb", tmp_path / "run")


def test_the_check_of_the_claims_may_raise(book):
    """One cell alone is passed over where it raises: the check of the claims."""
    passed = [c.source for c in book.cells if "raises-exception" in c.metadata.get("tags", [])]
    assert len(passed) == 1 and "claims" in passed[0]
