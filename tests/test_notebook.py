"""The notebook and its PDF: the whole in the smoke profile, and what is committed."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import nbformat
import pytest
from conftest import ROOT
from nbclient.exceptions import CellExecutionError
from pypdf import PdfReader


@pytest.fixture(scope="module")
def book():
    return nbformat.read(ROOT / "recall.ipynb", as_version=4)


def test_the_whole_notebook_runs(tmp_path, monkeypatch):
    """Top to bottom in the smoke profile in a scratch folder, with no cell raising, and its PDF is made."""
    import export
    import report
    monkeypatch.setenv("PROFILE", "smoke")
    monkeypatch.setenv("RECALL_STORE", str(tmp_path / ".runs"))
    shutil.copy(ROOT / "recall.ipynb", tmp_path)
    path = report.execute(tmp_path / "recall.ipynb", tmp_path)
    export.export(path, tmp_path / "report.pdf")
    pdf = PdfReader(tmp_path / "report.pdf")
    assert len(pdf.pages) >= 5 and "Transformer or Mamba" in pdf.pages[0].extract_text()
    figures = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"accuracy.csv", "convergence.csv", "provenance.json", "p1a.pdf", "p1a.png"} <= figures
    assert not [p for p in tmp_path.rglob("*part*")]


def test_the_committed_notebook_is_one_clean_run(book):
    """Execution counts 1, 2, 3, ... in order, no error, no stderr text, no widget."""
    code = [c for c in book.cells if c.cell_type == "code" and c.source.strip()]
    counts = [c.execution_count for c in code]
    if not any(counts):
        pytest.skip("the notebook is committed without outputs")
    assert counts == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr" or "widget" in str(o.get("data", {}).keys())]


def test_every_question_has_its_heading(book):
    """P1a to P3b each stand in a heading."""
    headings = [line for c in book.cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("#")]
    for question in ("P1a", "P1b", "P1c", "P2a", "P2b", "P2c", "P3a", "P3b"):
        assert any(question in line for line in headings), question


def test_committed_figures_exist(recall):
    """Every figure of the report is there as PDF and PNG."""
    for name in recall.FIGURES:
        assert (ROOT / "figures" / f"{name}.pdf").is_file() and (ROOT / "figures" / f"{name}.png").is_file(), name


def test_a_stale_report_is_told(tmp_path):
    """A changed definition, a changed figure, a changed output: each is a reason. What is true of the committed files is a warning here and an error of `make check-report`."""
    import report
    reasons = report.stale()
    for reason in reasons:
        warnings.warn(reason)
    for name in ("recall.ipynb", "report.pdf"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    copy = nbformat.read(tmp_path / "recall.ipynb", as_version=4)
    next(c for c in copy.cells if "def vocabulary" in c.source).source += "\nEXTRA = 1"
    nbformat.write(copy, tmp_path / "recall.ipynb")
    (tmp_path / "figures" / "p1a.pdf").write_bytes(b"another")
    found = " ".join(report.stale(tmp_path))
    assert "outputs are of definitions" in found and "figures: made by definitions" in found and "report.pdf: not of these definitions" in found
    assert "figures/p1a.pdf is not the file" in found and "not typeset from this" in found


@pytest.fixture
def start(tmp_path):
    """start(*arguments, **variables): Python in `tmp_path`, in a process group of its own, which ends with the test."""
    started = []

    def start(*arguments, **variables):
        started.append(subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, env=os.environ | variables, text=True, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def make_report(tmp_path, start):
    """What `make report` does with a profile, in `tmp_path` on a copy of what it runs and of what it would replace."""
    for name in ("recall.ipynb", "report.py", "export.py", "report.pdf"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    return lambda profile: start("report.py", PROFILE=profile, RECALL_STORE=".runs")


def interrupted(process, folder, sign, later=0, end=lambda process: os.killpg(process.pid, signal.SIGINT)):
    """What a process says that gets Ctrl-C, or what `end` sends, `later` seconds after a file named like `sign` has come."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(sign)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(later)
    end(process)
    return process.communicate(timeout=60)[0]


def contents(folder):
    """Every file below a folder that is not the run's own scratch, with its bytes."""
    own = {".build", ".runs", "__pycache__"}
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not own & set(p.relative_to(folder).parts)}


def test_ctrl_c_leaves_nothing_half_written(tmp_path, make_report):
    """Interrupted while the workers train: says that it goes on from there, and no file in place has come, gone or changed."""
    before, process = contents(tmp_path), make_report("smoke")
    said = interrupted(process, tmp_path, ".runs/definitions_*.py", later=5)  # written right before the pool starts
    assert process.returncode == 1 and "goes on from here" in said and "Traceback" not in said
    assert contents(tmp_path) == before and not list(tmp_path.glob(".runs/part-*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_workers_end_with_a_report_that_is_killed(tmp_path, make_report, name):
    """A signal to `make report` alone, as from `kill` or a closing terminal: answered like Ctrl-C, and no worker trains on."""
    here = signal.signal(getattr(signal, name), signal.SIG_DFL)  # a child ignores what is ignored here, as SIGHUP is below nohup
    process = make_report("smoke")
    signal.signal(getattr(signal, name), here)
    said = interrupted(process, tmp_path, ".runs/definitions_*.py", 5, lambda process: process.send_signal(getattr(signal, name)))
    assert process.returncode == 1 and "goes on from here" in said and "Traceback" not in said
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # as long as one of the group is there
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("a process of the run is still there")


def test_ctrl_c_in_a_cell_stops_without_a_traceback(tmp_path, start):
    """Interrupted while the notebook runs: KeyboardInterrupt, which `make report` answers in one line, and the notebook as it was."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time\nopen('started', 'w').close()\ntime.sleep(60)")])
    nbformat.write(book, tmp_path / "recall.ipynb")
    before = (tmp_path / "recall.ipynb").read_bytes()
    code = "import pathlib, report\ntry: report.execute('recall.ipynb', pathlib.Path('.'))\nexcept KeyboardInterrupt: print('interrupted')"
    assert interrupted(start("-c", code, PYTHONPATH=str(ROOT)), tmp_path, "started") == "interrupted\n"
    assert (tmp_path / "recall.ipynb").read_bytes() == before


def test_claims_that_fail_leave_a_report_to_read(tmp_path):
    """A cell that may raise stops neither the run nor the PDF, which says what it said; any other does."""
    import export
    import report
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("assert False, 'claims that do not hold: 2 < 1'"), nbformat.v4.new_code_cell("print('and on')")]
    cells[1].metadata.tags = ["raises-exception"]
    (tmp_path / "run").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    path = report.execute(tmp_path / "recall.ipynb", tmp_path / "run")
    assert report.failures(nbformat.read(path, as_version=4)) == ["claims that do not hold: 2 < 1"]
    export.export(path, tmp_path / "report.pdf")
    text = PdfReader(tmp_path / "report.pdf").pages[0].extract_text()
    assert "claims that do not hold: 2 < 1" in text and "and on" in text
    del cells[1].metadata["tags"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "recall.ipynb")
    with pytest.raises(CellExecutionError):
        report.execute(tmp_path / "recall.ipynb", tmp_path / "run")


def test_the_check_of_the_claims_may_raise(book):
    """The cell that raises where a claim does not hold is the one that a run passes over."""
    passed = [c.source for c in book.cells if "raises-exception" in c.metadata.get("tags", [])]
    assert len(passed) == 1 and "hold(checked)" in passed[0]


def test_an_unknown_profile_is_refused_at_once(tmp_path, make_report):
    """The message names the value and what is allowed, and nothing is removed."""
    before, process = contents(tmp_path), make_report("..")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "PROFILE='..'" in said and "full, quick, smoke" in said and "Traceback" not in said
    assert contents(tmp_path) == before


def test_a_relative_store_is_taken_from_here(tmp_path, monkeypatch):
    """RECALL_STORE=folder is meant from where `make report` starts, not from the scratch folder in which the notebook runs."""
    import report
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("RECALL_STORE", "kept")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):  # no notebook lies here
        report.make("smoke")
    assert os.environ["RECALL_STORE"] == str(tmp_path / "kept")
