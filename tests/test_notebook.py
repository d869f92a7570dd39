"""The notebook and its PDF: the whole in the smoke profile, and what is committed."""

import os
import shutil
import warnings

import nbformat
import pytest
from conftest import ROOT
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


def test_committed_figures_exist(book):
    """Every figure in the outputs is there as PDF and PNG."""
    for output in (o for c in book.cells if c.cell_type == "code" for o in c.outputs):
        if name := output.get("metadata", {}).get("figure", {}).get("name"):
            assert (ROOT / "figures" / f"{name}.pdf").is_file() and (ROOT / "figures" / f"{name}.png").is_file()


def test_report_is_current():
    """Says whether outputs, figures and PDF belong to the code; `make check-report` enforces it."""
    import report
    if os.path.exists(ROOT / "report.pdf"):
        for reason in report.stale():
            warnings.warn(reason)
