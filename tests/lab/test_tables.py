"""lab/tables.py: tidy tables, what is read off them, the counting baseline, claims."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from lab import tables


def made(curve=((100, 5), (200, 9)), accuracy=((3, 4, 10), (4, 6, 10)), **letters):
    """A finished run of ten test sequences."""
    setting = dict(model="mamba", K=16, d=8, M=1, tau=1, L=64, seed=0, norm="layer", heads=2, rate=0.01, weight_decay=0.0, n=10) | letters
    return {"setting": setting, "curve": [list(p) for p in curve], "accuracy": [list(p) for p in accuracy]}


def test_tidy_has_the_columns_of_the_contract_and_a_row_per_point():
    accuracy, convergence = tables.tidy({"P1a": [made(), made(seed=1)]})
    assert list(accuracy) == ["problem", "model", "K", "d", "M", "tau", "L", "seed", "length", "n", "correct"]
    assert list(convergence) == ["problem", "model", "K", "d", "M", "tau", "L", "seed", "step", "n", "correct"]
    assert accuracy.values.tolist() == [["P1a", "mamba", 16, 8, 1, 1, 64, seed, length, 10, right] for seed in (0, 1) for length, right in ((3, 4), (4, 6))]
    assert convergence[["seed", "step", "correct"]].values.tolist() == [[0, 100, 5], [0, 200, 9], [1, 100, 5], [1, 200, 9]]


def test_tidy_tells_runs_apart_that_differ_in_their_rate_alone_and_leaves_the_search_out():
    accuracy, _ = tables.tidy({"rates": [made(rate=0.001), made(rate=0.004)], "search": [made(rate=0.1)], "check": [made()]})
    assert list(accuracy.problem.unique()) == ["rates 0.001", "rates 0.004"]


def test_tidy_survives_its_csv(tmp_path):
    for table in tables.tidy({"P1a": [made()], "P2a": [made(accuracy=())]}):
        table.to_csv(tmp_path / "t.csv", index=False)
        assert pd.read_csv(tmp_path / "t.csv").equals(table)


def test_searched_has_a_row_per_run():
    rows = tables.searched({"search": [made(curve=((100, 3), (200, 9), (300, 10)))], "check": [made(M=4)], "grid": [made(heads=1)], "P1a": [made()]})
    assert rows[["problem", "M", "rate", "steps", "steps_to_90", "percent"]].values.tolist() == [["search", 1, 0.01, 300, 200.0, 100.0], ["check", 4, 0.01, 200, 200.0, 90.0], ["grid", 1, 0.01, 200, 200.0, 90.0]]
    assert rows.heads.tolist() == [2, 2, 1]


def rows(*percents, letters="abcdef"):
    """A table of measurements, one row a percent."""
    return pd.DataFrame({"measurement": list(letters[: len(percents)]), "layer": [math.nan, *range(1, len(percents))], "percent": percents})


def test_differing_tables_of_equal_rows_are_equal():
    """NaN and infinity are equal to themselves, and a number to what its CSV says."""
    table = rows(0.1 + 0.2, math.nan, math.inf)
    assert tables.differing(table, table.copy(), ["percent"]) == []


def test_differing_names_every_row_that_is_changed_missing_or_added():
    now = rows(10.0, 20.0, 30.0, 40.0)
    there = pd.concat([rows(10.0, 20.5, 30.0), pd.DataFrame({"measurement": ["z"], "layer": [9], "percent": [1.0]})])
    assert tables.differing(there, now, ["percent"]) == ["measurement b layer 1: percent 20.5, but percent 20 now", "measurement d layer 3: missing, percent 40 now",
                                                         "measurement z layer 9: percent 1, but no such row now"]
    assert tables.differing(now.assign(percent=[math.nan, 20.0, math.inf, 40.0]), now, ["percent"]) == ["measurement a: percent nan, but percent 10 now", "measurement c layer 2: percent inf, but percent 30 now"]


def test_differing_allows_what_it_is_told():
    now = rows(10.0, 20.0, 30.0)
    assert tables.differing(rows(10.5, 20.5, 30.5), now, ["percent"], [0.5, 0.4, 1.0]) == ["measurement b layer 1: percent 20.5, but percent 20 now"]


def test_differing_sees_a_row_twice_another_order_and_another_column():
    now = rows(10.0, 20.0)
    assert tables.differing(pd.concat([now, now[:1]]), now, ["percent"]) == ["measurement a: percent 10, but no such row now"]
    assert tables.differing(now[::-1], now, ["percent"]) == ["its rows are in another order"]
    assert tables.differing(now.rename(columns={"layer": "depth"}), now, ["percent"]) == ["its columns are measurement, depth, percent, not measurement, layer, percent"]


def test_differing_names_a_row_whose_number_is_none():
    now = rows(10.0, 20.0)
    assert tables.differing(rows("10.0", "2O.0"), now, ["percent"]) == ["measurement b layer 1: percent nan, but percent 20 now"]


def test_selections():
    accuracy, _ = tables.tidy({"P1a": [made(seed=1), made(accuracy=((3, 10, 10),))], "P1b": [made(tau=5)]})
    assert tables.select(accuracy, problem="P1a", length=3).percent.tolist() == [40.0, 100.0]
    assert tables.by_seed(accuracy, problem="P1a", length=3).to_dict() == {0: 100.0, 1: 40.0}
    assert tables.by_seed(accuracy, problem="P1a", length=99).empty
    with pytest.raises(ValueError, match="several rows of a seed"):
        tables.by_seed(accuracy, length=3)


@pytest.mark.parametrize("right, first", [((1, 9, 9, 1), 200), ((9, 1, 9, 1), math.inf), ((1, 1, 1, 9), 400), ((1, 1, 1, 1), math.inf), ((9, 9, 1, 1), 100)])
def test_steps_to_wants_two_evaluations_in_a_row_or_the_last(right, first):
    _, convergence = tables.tidy({"P1a": [made(curve=zip((100, 200, 300, 400), right))]})
    assert tables.steps_to(convergence, 90, problem="P1a").to_dict() == {0: first}


def test_spread():
    assert tables.spread([50, 51, 100]) == "67 (50–100)"
    assert tables.spread([100, 100]) == "100"
    assert tables.spread([-0.04, 0.0, 1500], 1) == "500.0 (0.0–1,500.0)"
    assert tables.spread([-3, 1]) == "−1 (−3–1)"
    assert tables.spread([]) == "–"


def test_expected_most_is_the_mean_over_all_ways_to_throw_the_balls():
    for balls, boxes in ((1, 3), (4, 3), (5, 2), (3, 5)):
        ways = [max(np.bincount(way)) for way in itertools.product(range(boxes), repeat=balls)]
        assert tables.expected_most(balls, boxes) == pytest.approx(np.mean(ways), rel=1e-12)


def test_counting_baseline_is_what_a_counter_scores():
    assert tables.counting_baseline([3])[0] == pytest.approx(100)  # one place is left: the value
    rng, n, K, rounds = np.random.default_rng(0), 12, 16, 40_000
    others = rng.integers(1, K, (rounds, n - 2))  # v != q: n - 2 exchangeable tokens, the first of them the value
    counts = (others[:, :, None] == np.arange(K)).sum(1)
    share = 100 * np.mean(counts.argmax(1) == others[:, 0])
    assert tables.counting_baseline([n], distinct=True)[0] == pytest.approx(share, abs=1.0)
    assert tables.counting_baseline([n])[0] == pytest.approx(100 / K + (1 - 1 / K) * tables.counting_baseline([n], distinct=True)[0])
    assert (np.diff(tables.counting_baseline(range(3, 193))) < 0).all()


@pytest.mark.parametrize("value, bound, holds", [
    (9, "= 9", True), (8, "= 9", False), (57.4, "= 60 ± 5", True), (54.9, "= 60 ± 5", False), (55, "= 60 ± 5", True), (90, ">= 90", True), (89.9, ">= 90", False),
    (5, "<= 5", True), (5.1, "<= 5", False), (math.nan, "= 9", False), (math.nan, ">= 0", False), (math.inf, "<= 5", False), (math.inf, "= 9 ± 1", False)])
def test_check(value, bound, holds):
    assert tables.check([("a claim", value, bound)]).holds.tolist() == [holds]


def test_an_unknown_bound_is_refused():
    with pytest.raises(KeyError):
        tables.check([("a claim", 1, "~ 1")])


def test_hold_names_what_fails_and_only_that():
    checked = tables.check([("one of ten", 2, "= 1"), ("half", 50, "= 50 ± 5"), ("most", 10, ">= 60")])
    with pytest.raises(AssertionError) as error:
        tables.hold(checked)
    assert "one of ten" in str(error.value) and "most" in str(error.value) and "half" not in str(error.value)
    tables.hold(checked[checked.holds])


def test_unsaid_finds_numbers_that_are_claimed_but_not_written():
    claims = [("one of  ten", 1, "= 1"), ("two of ten", 2, "= 2"), ("what is measured", 3, ">= 1")]
    assert tables.unsaid(claims, "It is one\nof ten.") == ["two of ten"]


def test_numbers_follow_the_order_of_first_display(monkeypatch):
    shown = []
    monkeypatch.setattr(tables, "SHOWN", {"figure": [], "table": []})
    monkeypatch.setattr(tables, "display", lambda data, raw, metadata: shown.append((data, metadata)))
    for name in ("b", "a", "b"):
        tables.show_table(pd.DataFrame({"x": ["1.0", "02"]}), name, "A caption.")
    assert [m["table"] for _, m in shown if "table" in m] == [{"name": n, "number": k, "caption": "A caption."} for n, k in (("b", 1), ("a", 2), ("b", 1))]
    assert [m for _, m in shown if "table" not in m] == [{"caption": True}] * 3
    assert shown[0][0]["text/markdown"] == "**Table 1.** A caption." and "| 02" in shown[1][0]["text/markdown"] and "1.0" in shown[1][0]["text/markdown"]


def test_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables.save(pd.DataFrame({"a": [1, 2]}), "t")
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["t.csv"] and pd.read_csv("figures/t.csv").a.tolist() == [1, 2]
