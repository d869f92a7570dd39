"""lab/claims.py: the claims hold of the committed numbers, stand in the notebook, and fail when a number changes."""

import nbformat
import pandas as pd
import pytest

from lab import claims, report, tables


@pytest.fixture(scope="module")
def written():
    """The committed tables, {name: DataFrame}."""
    return {name: pd.read_csv(report.ROOT / "figures" / f"{name}.csv") for name in ("accuracy", "convergence", "search", "mechanisms")}


@pytest.fixture(scope="module")
def rates():
    """The notebook's learning rates."""
    return report.definitions().RATES


def test_all_hold(written, rates):
    main, others = claims.of(*written.values(), rates)
    tables.hold(tables.check([*main, *others]))
    assert len(main) >= 10 and not any(bound.startswith("=") for _, _, bound in main)


def test_no_claim_is_made_twice(written, rates):
    texts = [text for part in claims.of(*written.values(), rates) for text, _, _ in part]
    assert len(texts) == len(set(texts))


def test_numbers_stand_in_the_notebook_as_they_are_claimed(written, rates):
    book = nbformat.read(report.ROOT / report.NOTEBOOK, as_version=4)
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert tables.unsaid(claims.of(*written.values(), rates)[1], prose) == []


@pytest.mark.parametrize("problem, model, text", [("P1a", "mamba", "eight of ten seeds keep 95 %"), ("P2c", "hybrid", "The hybrid does, at 3L"), ("P3a", "mamba", "At d = 64 Mamba recalls sixteen queries at L")])
def test_a_changed_accuracy_fails_by_name(written, rates, problem, model, text):
    accuracy = written["accuracy"].copy()
    accuracy.loc[(accuracy.problem == problem) & (accuracy.model == model), "correct"] = 500
    main, others = claims.of(accuracy, written["convergence"], written["search"], written["mechanisms"], rates)
    with pytest.raises(AssertionError, match=text):
        tables.hold(tables.check([*main, *others]))


def test_fewer_runs_than_the_reports_fail_without_an_error(written, rates):
    some = {name: table[table.seed == 0] if "seed" in table and name != "search" else table for name, table in written.items()}
    some["accuracy"] = some["accuracy"][some["accuracy"].length != 64]
    main, others = claims.of(*some.values(), rates)
    assert not tables.check([*main, *others]).holds.all()
