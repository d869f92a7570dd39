"""The claims: they hold in the committed tables, and not in doctored ones."""

import pandas as pd
import pytest
from conftest import ROOT


@pytest.fixture
def tables():
    """The three tables behind the figures, as committed."""
    paths = [ROOT / "figures" / f"{name}.csv" for name in ("accuracy", "convergence", "mechanisms")]
    if not all(p.is_file() for p in paths):
        pytest.skip("no tables are committed")
    return [pd.read_csv(p) for p in paths]


def test_claims_hold_in_the_committed_tables(recall, tables):
    """Every claim of the report, computed anew."""
    checked = recall.check_claims(*tables)
    recall.hold(checked)
    assert len(checked) >= 40 and checked.claim.is_unique


@pytest.mark.parametrize("doctor, named", [
    (lambda a, c, m: a.loc[(a.problem == "P1a") & (a.model == "mamba") & (a.length == 64), "correct"].index, "P1a: Mamba at L"),
    (lambda a, c, m: a.loc[(a.problem == "P3a") & (a.M == 16) & (a.length == 64), "correct"].index, "P3a: Mamba, d = 64, M = 16, at L")])
def test_a_doctored_accuracy_breaks_its_claim(recall, tables, doctor, named):
    """Accuracy halved where a claim rests on it: the claim is reported by name, and raising it stops the notebook."""
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
    """Every run at chance: most claims fail."""
    accuracy, convergence = (t.assign(correct=t.n // 16) for t in tables[:2])
    checked = recall.check_claims(accuracy, convergence, tables[2])
    assert (checked.holds == "NO").sum() >= 10
