"""Numbers of finished runs as tidy tables, what the report reads off them, and the claims that hold its prose to them."""

import functools
import io
import math

import numpy as np
import pandas as pd
from IPython.display import display

from lab import pool, store

LETTERS = ("model", "K", "d", "M", "tau", "L")
CHOICE = ("search", "check", "grid")  # groups that chose the settings: in a table of their own
SHOWN = {"figure": [], "table": []}  # names of the outputs displayed so far, whose order gives their numbers


def numbered(role, name, caption):
    """(number, title) of a figure or table: its place in the order of first display, the same when it is displayed again."""
    if name not in SHOWN[role]:
        SHOWN[role].append(name)
    number = 1 + SHOWN[role].index(name)
    return number, f"**{role.capitalize()} {number}.** {caption}"


def show_table(table, name, caption):
    """Display a DataFrame, its cells as they are, as a Markdown table below its numbered caption."""
    number, title = numbered("table", name, caption)
    text = table.to_markdown(index=False, disable_numparse=True)
    display({"text/markdown": title, "text/plain": title}, raw=True, metadata={"caption": True})
    display({"text/markdown": text, "text/plain": text}, raw=True, metadata={"table": {"name": name, "number": number, "caption": caption}})


def save(table, name):
    """Write a table as figures/NAME.csv."""
    store.write(pool.figures() / f"{name}.csv", table.to_csv(index=False).encode())


def tidy(runs):
    """(accuracy, convergence) of {group: [run, ...]}, those of CHOICE left out: one row per evaluated point, `problem` is the group.

    Runs of a group that differ in their rate alone have it in their problem, as in "rates 0.001".
    """
    accuracy, convergence = [], []
    for group, members in runs.items():
        if group in CHOICE:
            continue
        same = pd.Series([tuple(r["setting"][k] for k in (*LETTERS, "norm", "seed")) for r in members]).duplicated(keep=False)
        for r, ambiguous in zip(members, same):
            s = r["setting"]
            row = {"problem": f"{group} {s['rate']:g}" if ambiguous else group} | {k: s[k] for k in LETTERS} | {"seed": s["seed"]}
            accuracy += [row | {"length": length, "n": n, "correct": correct} for length, correct, n in r["accuracy"]]
            convergence += [row | {"step": step, "n": s["n"], "correct": correct} for step, correct in r["curve"]]
    columns = ["problem", *LETTERS, "seed"]
    return tuple(pd.DataFrame(rows, columns=[*columns, x, "n", "correct"]) for rows, x in ((accuracy, "length"), (convergence, "step")))


def searched(runs):
    """The runs of CHOICE, one row each: its setting, the steps trained, the steps to 90 % and the accuracy (%) of the test batch at the end."""
    rows = []
    for group in CHOICE:
        for r in runs[group]:
            s = r["setting"]
            curve = pd.DataFrame(r["curve"], columns=["step", "correct"]).assign(n=s["n"], seed=s["seed"])
            rows.append({"problem": group} | {k: s[k] for k in (*LETTERS, "norm", "heads", "rate", "weight_decay", "seed")} | {
                "steps": int(curve.step.iloc[-1]), "steps_to_90": steps_to(curve, 90)[s["seed"]], "percent": 100 * float(curve.correct.iloc[-1]) / s["n"]})
    return pd.DataFrame(rows)


def differing(there, now, values, allowed=0.0):
    """The rows in which a table is not the one made now: a line each, none where they are equal.

    Rows belong together by their columns but `values`, which may be apart by `allowed`, a number or one for each row of `now`.
    """
    keys, there, now = [c for c in now if c not in values], *(pd.read_csv(io.StringIO(t.to_csv(index=False))) for t in (there, now))
    if set(there) != set(now):
        return [f"its columns are {', '.join(there)}, not {', '.join(now)}"]
    there, now = (t[keys].map(str).join(t[values].apply(pd.to_numeric, errors="coerce")) for t in (there, now))
    count = lambda table: table.assign(copy=table.groupby(keys).cumcount())
    both = count(there).merge(count(now.assign(allowed=np.broadcast_to(allowed, len(now)))), on=[*keys, "copy"], how="outer", suffixes=(" there", " now"), indicator="in")
    far = both["in"] != "both"
    for a, b in ((both[f"{value} there"], both[f"{value} now"]) for value in values):
        far |= ~((a == b) | a.isna() & b.isna() | ((a - b).abs() <= both.allowed * (1 + 1e-9)))
    lines = []
    for row in both[far].to_dict("records"):
        said, made = (", ".join(f"{value} {row[f'{value} {place}']:g}" for value in values) for place in ("there", "now"))
        told = {"both": f"{said}, but {made} now", "left_only": f"{said}, but no such row now", "right_only": f"missing, {made} now"}[row["in"]]
        lines.append(" ".join(f"{key} {row[key].removesuffix('.0')}" for key in keys if row[key] != "nan") + f": {told}")
    return lines or ([] if there[keys].equals(now[keys]) else ["its rows are in another order"])


def matching(table, **values):
    """The rows of a table that have the given values in the columns of those names."""
    return table[np.logical_and.reduce([table[name] == value for name, value in values.items()])] if values else table


def select(table, **values):
    """The same of a tidy table, with its accuracy in a column `percent`."""
    return matching(table, **values).assign(percent=lambda t: 100 * t.correct / t.n)


def by_seed(table, **values):
    """Accuracy (%) by seed: a Series, from rows that the values narrow to one a seed. Raises ValueError where a seed has several."""
    rows = select(table, **values)
    if rows.seed.duplicated().any():
        raise ValueError(f"{values}: several rows of a seed")
    return rows.set_index("seed").percent.sort_index()


def steps_to(convergence, level, **values):
    """Per seed, the first step from which two evaluations in a row reach `level` %, or the last if that one does; inf where that never happens."""
    first = {}
    for seed, curve in select(convergence, **values).groupby("seed"):
        good = curve.percent.to_numpy() >= level
        both = good & np.append(good[1:], good[-1:])
        first[seed] = float(curve.step.to_numpy()[both.argmax()]) if both.any() else math.inf
    return pd.Series(first, dtype=float)


def spread(values, digits=0):
    """Seeds in a table's cell: their mean and, in brackets, the lowest and the highest, as "98 (91–100)"; a dash where there is none."""
    if not len(values):
        return "–"
    shown = [f"{round(x, digits) + 0.0:,.{digits}f}".replace("-", "−") for x in (np.mean(values), np.min(values), np.max(values))]
    return shown[0] + (f" ({shown[1]}–{shown[2]})" if shown[1] != shown[2] else "")


@functools.cache
def expected_most(balls, boxes):
    """E[max of the counts] of balls thrown into equal boxes, exactly."""
    below = mean = 0.0
    for most in range(1, balls + 1):
        box = np.array([1 / math.factorial(j) if j <= most else 0.0 for j in range(balls + 1)])
        ways = functools.reduce(lambda a, b: np.convolve(a, b)[: balls + 1], [box] * boxes)[balls]
        up_to = ways * math.exp(math.lgamma(balls + 1) - balls * math.log(boxes))  # P(max <= most)
        mean, below = mean + most * (up_to - below), up_to
        if below > 1 - 1e-12:
            break
    return mean


def counting_baseline(lengths, K=16, distinct=False):
    """The counting baseline (%): the best accuracy of a predictor that sees how often each token stands in a sequence, and its query, not the order.

    With v != q the n - 2 tokens beside the two queries are exchangeable, so the value is k with probability c_k / (n - 2) and the best
    guess is the most frequent. With v = q, one sequence in K, the query stands three times, which gives it away; `distinct` leaves these out.
    """
    guess = np.array([expected_most(n - 2, K - 1) / (n - 2) for n in lengths])
    return 100 * (guess if distinct else 1 / K + (1 - 1 / K) * guess)


def calibration(mechanisms):
    """(trials, failing) of Section 7.4 as wide tables, a row for each network: accuracy (%) by (length, trial).

    `trials` has the networks that recall at 64 tokens (90 % or more); `failing` those of them that have less than 90 % at 32, and over five points less.
    """
    rows = mechanisms[mechanisms.measurement.str.startswith("calibration, ")].assign(trial=lambda t: t.measurement.str.removeprefix("calibration, "))
    trials = rows.pivot(index=["model", "d", "M", "tau", "seed"], columns=["length", "trial"], values="percent")
    trials = trials[trials[64, "as it is"] >= 90]
    return trials, trials[(trials[32, "as it is"] < 90) & (trials[32, "as it is"] < trials[64, "as it is"] - 5)]


def check(claims):
    """A table of claims (text, value, bound): whether each holds.

    The bound of a number in the prose, whose text is quoted as it is written there, is what it rounds to, "= 60 ± 5" or "= 9";
    that of a finding is what would refute it, ">= 90" or "<= 5". A value that is no number holds nothing.
    """
    rows = []
    for text, value, bound in claims:
        sign, level, *width = bound.replace("±", "").split()
        value, level, width = float(value), float(level), float(width[0]) if width else 0.0
        holds = {"=": abs(value - level) <= width + 1e-9, ">=": value >= level, "<=": value <= level}[sign]
        rows.append({"claim": text, "measured": value, "bound": bound, "holds": bool(holds)})
    return pd.DataFrame(rows, columns=["claim", "measured", "bound", "holds"])


def hold(checked):
    """Raise AssertionError that names the claims of `check` which do not hold."""
    failed = checked[~checked.holds]
    if len(failed):
        raise AssertionError("claims that do not hold: " + "; ".join(f"{r.claim} (measured {r.measured:.4g}, bound {r.bound})" for r in failed.itertuples()))


def unsaid(claims, prose):
    """The quotations among the claims (those of numbers in the prose) that do not stand in it, spaces and line ends apart."""
    flat = " ".join(prose.split())
    return [text for text, _, bound in claims if bound.startswith("=") and " ".join(text.split()) not in flat]
