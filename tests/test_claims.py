"""The claims: they hold in the committed tables, and not in doctored ones. The numbers of figures and tables follow their order."""

import re

import nbformat
import pandas as pd
import pytest
import report
from conftest import ROOT


@pytest.fixture
def tables():
    """The three tables behind the figures, as committed."""
    paths = [ROOT / "figures" / f"{name}.csv" for name in ("accuracy", "convergence", "mechanisms")]
    if not all(p.is_file() for p in paths):
        pytest.skip("no tables are committed")
    return [pd.read_csv(p) for p in paths]


def test_claims_hold_in_the_committed_tables(recall, tables):
    """Every claim of the report, computed anew; tables of former definitions need not know all that is claimed now (`make check-report` tells)."""
    if any("definitions" in reason for reason in report.stale()):
        pytest.skip("the committed tables are of former definitions")
    checked = recall.check_claims(*tables)
    recall.hold(checked)
    assert len(checked) >= 60 and checked.claim.is_unique


@pytest.mark.parametrize("doctor, named", [
    (lambda a, c, m: a.loc[(a.problem == "P1a") & (a.model == "mamba") & (a.length == 64), "correct"].index, "P1a: Mamba at L"),
    (lambda a, c, m: a.loc[(a.problem == "P3a") & (a.M == 8) & (a.length == 64), "correct"].index, "P3a: M = 8, at L")])
def test_a_doctored_accuracy_breaks_its_claim(recall, tables, doctor, named):
    """Accuracy halved where a claim rests on it: the claim is reported by name, and `hold` raises."""
    accuracy = tables[0].copy()
    accuracy.loc[doctor(*tables), "correct"] //= 2
    checked = recall.check_claims(accuracy, *tables[1:])
    assert named in set(checked.claim[checked.holds == "NO"])
    with pytest.raises(AssertionError, match=named):
        recall.hold(checked)


def test_a_doctored_mechanism_breaks_its_claim(recall, tables):
    """An intervention that did nothing cannot carry the story told about it."""
    mechanisms = tables[2].copy()
    mechanisms.loc[mechanisms.measurement == "layer 1 uniform", "percent"] = 100.0
    with pytest.raises(AssertionError, match="layer 1 uniform"):
        recall.hold(recall.check_claims(*tables[:2], mechanisms))


def test_untrained_tables_carry_no_claim(recall, tables):
    """Every run at chance: of the claims of recall (a lowest accuracy at L or 3L) none holds."""
    accuracy, convergence = (t.assign(correct=t.n // 16) for t in tables[:2])
    checked = recall.check_claims(accuracy, convergence, tables[2])
    recalls = checked.claim.str.match(r"P[123][abc].*at (?:L|3L|L/2)$") & checked.bound.str.startswith("≥")
    assert recalls.sum() >= 15 and (checked.holds[recalls] == "NO").all()


@pytest.fixture(scope="module")
def sources():
    return [cell.source for cell in nbformat.read(ROOT / "recall.ipynb", as_version=4).cells]


def test_numbers_follow_the_order_of_display(recall, sources):
    """FIGURES and TABLES list what is shown, in its order, so that an inserted one renumbers the rest."""
    text = "\n".join(sources)
    shown = lambda call, names: [next(n for n in re.findall(r'"(\w+)"', text[m.end():]) if n in names) for m in re.finditer(rf"(?<!def ){call}\(", text)]
    assert shown("show_figure", recall.FIGURES) == list(recall.FIGURES)
    assert shown("show_table", recall.TABLES) == list(recall.TABLES)


def test_no_number_is_written_by_hand(recall, sources):
    """Text says fig("p1a"), not its number; the summary, which stands before any code, is the exception, and is right."""
    by_hand = [match for source in sources for match in re.findall(r"\b(?:Figure|Table)s? \d+(?! there)", source)]
    assert by_hand == [recall.fig("p1a")] and "Figure 2" in sources[3]


def test_without_gift(recall):
    """The order-blind optimum divides into v = q, always right, and the rest."""
    whole = recall.order_blind([64])[0]
    assert 1 / 16 * 100 + 15 / 16 * recall.without_gift(whole) == pytest.approx(whole)
    assert recall.without_gift(recall.order_blind([3])[0]) == pytest.approx(100)
