"""One look for all figures of the report, and their numbered display."""

import base64
import io

import matplotlib.pyplot as plt
from IPython.display import display

from lab import pool, store
from lab.tables import counting_baseline, numbered

LABELS = dict(learned="learned positions", rope="RoPE", nope="NoPE", mamba="Mamba", hybrid="hybrid")
SHORT = LABELS | {"learned": "learned"}
COLOURS = dict(learned="#0072B2", rope="#D55E00", nope="#4D4D4D", mamba="#009E73", hybrid="#AA3377")
DASHES = dict(learned=(0, (5, 1.5)), rope=(0, (1, 1)), nope=(0, (3, 1, 1, 1)), mamba="-", hybrid=(0, (4, 4)))
MARKS = dict(learned="s", rope="^", nope="x", mamba="o", hybrid="D")
QUERIES = {4: dict(color="#56B4E9", linestyle="-", marker="o"), 8: dict(color="#E69F00", linestyle=(0, (5, 1.5)), marker="s"),
           16: dict(color="#333333", linestyle=(0, (1, 1)), marker="^")}
GREY = "#999999"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
         "figure.figsize": (6.5, 3.0), "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E5E5E5", "grid.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.7,
         "lines.markersize": 4, "figure.dpi": 130, "savefig.dpi": 200, "pdf.fonttype": 42}


def style():
    """Give every figure made from now on the report's look."""
    plt.rcParams.update(STYLE)


def look(model, every=24):
    """A model's colour, line and marker, the same in every figure; `every`: how often a marker, as matplotlib's markevery."""
    return dict(color=COLOURS[model], linestyle=DASHES[model], marker=MARKS[model], markevery=every)


def show_figure(figure, name, caption):
    """Save a figure as figures/NAME.pdf and .png and display it with its numbered caption; numbers follow the order of first display."""
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, metadata=metadata)
        store.write(pool.figures() / f"{name}.{suffix}", buffer.getvalue())
    plt.close(figure)
    number, title = numbered("figure", name, caption)
    display({"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": caption}, raw=True, metadata={"figure": {"name": name, "number": number, "caption": caption}})
    display({"text/markdown": title, "text/plain": title}, raw=True, metadata={"caption": True})


def each_seed(axis, table, x, label=None, **look):
    """A line per seed and no mean, from rows with the columns x, `seed`, `percent`."""
    look = {"linewidth": 0.8, "alpha": 0.8} | {k: v for k, v in look.items() if k not in ("marker", "markevery")}
    for _, rows in table.groupby("seed"):
        axis.plot(rows[x], rows.percent, label=label, **look)
        label = None


def trained_at(axis, place):
    """A shaded bar behind the curves, at the trained length."""
    axis.axvline(place, color="#BBBBBB", linewidth=4, alpha=0.5, zorder=0)


def references(axis, lengths=None, K=16):
    """Thin grey lines of what needs no recall: chance, and the counting baseline, at length 64 or at `lengths` on the x axis."""
    axis.axhline(100 / K, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    if lengths is None:
        axis.axhline(counting_baseline([64], K)[0], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    else:
        axis.plot(lengths, counting_baseline(lengths, K), color=GREY, linewidth=0.8, linestyle="--", zorder=1)


def length_axis(axis, L=64, K=16, shortest=3):
    """Dress a panel of accuracy (%) against context length: the trained length, chance, the counting baseline."""
    trained_at(axis, L)
    references(axis, range(shortest, 3 * L + 1), K)
    axis.set(xlabel="context length (tokens)", ylabel="accuracy (%)", ylim=(-2, 104), xlim=(0, 3 * L + 2), xticks=range(0, 3 * L + 1, L), yticks=(0, 25, 50, 75, 100))


def training_axis(axis, K=16):
    """Dress a panel of accuracy (%) on the test batch of length 64 against training steps."""
    references(axis, K=K)
    axis.set(xlabel="training steps", ylabel="accuracy (%)", ylim=(-2, 104), yticks=(0, 25, 50, 75, 100))
