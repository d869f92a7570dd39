"""lab/figures.py: one look, numbered display, files on disk."""

import base64

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lab import figures, tables

matplotlib.use("Agg")


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """A folder of our own as the working directory, and what is displayed meanwhile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "SHOWN", {"figure": [], "table": []})
    outputs = []
    monkeypatch.setattr(figures, "display", lambda data, raw, metadata: outputs.append((data, metadata)))
    return outputs


def test_every_model_has_a_colour_a_line_and_a_mark_of_its_own():
    looks = [figures.look(model) for model in figures.LABELS]
    for key in ("color", "linestyle", "marker"):
        assert len({str(look[key]) for look in looks}) == 5
    assert set(figures.SHORT) == set(figures.LABELS) == set(figures.COLOURS) == set(figures.DASHES) == set(figures.MARKS)


def test_a_figure_is_saved_twice_and_displayed_with_its_number(shown, tmp_path):
    for name in ("second", "first", "second"):
        figure, axis = plt.subplots()
        axis.plot([0, 1])
        figures.show_figure(figure, name, "The finding.")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["first.pdf", "first.png", "second.pdf", "second.png"]
    assert [m["figure"]["number"] for _, m in shown if "figure" in m] == [1, 2, 1]
    assert [m for _, m in shown[1::2]] == [{"caption": True}] * 3
    assert shown[1][0]["text/markdown"] == "**Figure 1.** The finding."
    assert base64.b64decode(shown[-2][0]["image/png"]) == (tmp_path / "figures" / "second.png").read_bytes()
    assert not plt.get_fignums()


def test_equal_figures_give_equal_files(shown, tmp_path):
    files = []
    for _ in range(2):
        figure, axis = plt.subplots()
        axis.plot([0, 1])
        figures.show_figure(figure, "same", "The finding.")
        files.append([(tmp_path / "figures" / f"same.{kind}").read_bytes() for kind in ("pdf", "png")])
    assert files[0] == files[1]


def test_all_seeds_are_drawn_and_no_mean_where_none_is_asked_for():
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "step": [1, 2, 1, 2], "percent": [10.0, 20.0, 30.0, 60.0]})
    _, axis = plt.subplots()
    figures.each_seed(axis, table, "step", label="model", **figures.look("rope"))
    assert [line.get_ydata().tolist() for line in axis.lines] == [[10, 20], [30, 60]] and len(axis.get_legend_handles_labels()[1]) == 1
    figures.each_seed(axis, table[:0], "step", color="k")
    assert len(axis.lines) == 2
    plt.close("all")


def test_axes_carry_the_trained_length_chance_and_the_counting_baseline():
    _, axis = plt.subplots()
    figures.length_axis(axis)
    bar, chance, baseline = axis.lines
    assert bar.get_xdata()[0] == 64 and chance.get_ydata()[0] == pytest.approx(100 / 16)
    assert np.allclose(baseline.get_ydata(), tables.counting_baseline(range(3, 193))) and "tokens" in axis.get_xlabel() and "%" in axis.get_ylabel()
    _, axis = plt.subplots()
    figures.training_axis(axis)
    assert axis.lines[1].get_ydata()[0] == pytest.approx(tables.counting_baseline([64])[0])
    plt.close("all")


def test_style_sets_text_as_large_as_the_reports():
    with plt.rc_context():
        figures.style()
        assert plt.rcParams["font.size"] == plt.rcParams["legend.fontsize"] == 9 and plt.rcParams["figure.figsize"][0] == 6.5
