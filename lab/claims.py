"""What the notebook's prose says, computed again: a claim is (text, value, bound), see `tables.check`.

A claim whose bound begins with "=" is a number in the prose, quoted as it stands there; the others are findings, whose bound says what would
refute them. `conclusions` are those that the report shows; all are computed from the tables that the notebook writes to figures/*.csv.
"""

from dataclasses import dataclass

import pandas as pd

from lab.tables import by_seed, calibration, counting_baseline, matching, select, steps_to

ATTENTION = ("learned", "rope", "nope")
MODELS = (*ATTENTION, "mamba", "hybrid")
BASELINE = float(counting_baseline([64])[0])
DELAYS = ("P1a", "P1b")
ORDER = (("hybrid", "mamba"), ("mamba", "rope"), ("rope", "learned"), ("learned", "nope"))  # neighbours at delay one


@dataclass(frozen=True)
class Numbers:
    """The tables of the report and what is read off them, by seed."""

    accuracy: pd.DataFrame
    convergence: pd.DataFrame
    searched: pd.DataFrame
    mechanisms: pd.DataFrame
    rates: dict  # (model, d): the rate chosen

    def at(self, length, problem, model, **letters):
        """Accuracy (%) at a length."""
        return by_seed(self.accuracy, length=length, problem=problem, model=model, **letters)

    def lowest(self, low, high, problem, model):
        """The lowest accuracy (%) at any length from low to high."""
        rows = select(self.accuracy, problem=problem, model=model)
        return rows[rows.length.between(low, high)].groupby("seed").percent.min()

    def solved(self, length, problem, model, **letters):
        """How many seeds recall at a length: 95 % or more."""
        return int((self.at(length, problem, model, **letters) >= 95).sum())

    def steps(self, problem, model, level=90, **letters):
        """Steps to an accuracy of the test batch, inf where it was never reached."""
        return steps_to(self.convergence, level, problem=problem, model=model, **letters)

    def median(self, problem, model, level=90, **letters):
        """The median of these over seeds."""
        return self.steps(problem, model, level, **letters).median()

    def last_step(self, problem, model, **letters):
        """How many steps the runs had."""
        return matching(self.convergence, problem=problem, model=model, **letters).groupby("seed").step.max()

    def longer(self, **letters):
        """The accuracy (%) at which the further seed of a case, given 48,000 steps, ended."""
        return select(self.convergence, problem="longer", **letters).percent.tail(1).mean()

    def part(self, measurement, **letters):
        """A measurement inside the models (%)."""
        return matching(self.mechanisms, measurement=measurement, **letters).set_index("seed").percent


def gap(percent):
    """The highest less the lowest seed."""
    return percent.max() - percent.min()


def conclusions(n):
    """The findings that the conclusions rest on."""
    both = lambda model: sum(n.solved(192, problem, model) for problem in DELAYS)
    next_best = lambda problem: min(n.median(problem, model) for model in MODELS[:4])
    return [
        ("Mamba recalls one query at 3L in most seeds: seeds of twenty", both("mamba"), ">= 11"),
        ("So does the hybrid: seeds of twenty", both("hybrid"), ">= 11"),
        ("Attention alone does not: seeds of sixty", sum(map(both, ATTENTION)), "<= 6"),
        ("Learned positions end at L: at 2L, the higher mean of both delays (%)", max(n.at(128, problem, "learned").mean() for problem in DELAYS), "<= 12"),
        ("NoPE at delay five does little more than count: at L, highest seed less the counting baseline (points)", n.at(64, "P1b", "nope").max() - BASELINE, "<= 10"),
        ("The hybrid converges fastest: median steps to 90 % over the next best, the higher of both delays", max(n.median(p, "hybrid") / next_best(p) for p in DELAYS), "<= 0.9"),
        ("At d = 8 neither Mamba nor RoPE recalls sixteen queries: highest seed at L (%)", max(n.at(64, "P2a", "mamba", M=16).max(), n.at(64, "P2b", "rope", M=16).max()), "<= 90"),
        ("The hybrid does, at 3L: lowest seed (%)", n.at(192, "P2c", "hybrid", M=16).min(), ">= 90"),
        ("Room is not all that Mamba lacks: d = 8, M = 8, highest less lowest seed at L (points)", gap(n.at(64, "P2a", "mamba", M=8)), ">= 20"),
        ("At d = 64 Mamba recalls sixteen queries at L: lowest seed (%)", n.at(64, "P3a", "mamba", M=16).min(), ">= 95"),
        ("With delay ten it counts: at L, distance from the counting baseline (points)", abs(n.at(64, "P3b", "mamba").mean() - BASELINE), "<= 5"),
    ]


def on_settings(n):
    """Sections 1 and 3."""
    one, hard = (matching(n.searched, norm="layer", **letters) for letters in (dict(problem="search", M=1), dict(problem="check")))
    at_90 = lambda model: int((one[one.model == model].percent >= 90).sum())
    faster = [hard[(hard.model == model) & (hard.rate > n.rates[model, 8])].sort_values("rate").percent.head(1).mean() for model in ("mamba", "rope", "hybrid")]
    chosen = matching(n.searched, problem="search", norm="layer")
    chosen = chosen.merge(hard[hard.M > 1][["model", "d", "rate", "percent"]], on=["model", "d", "rate"], how="left", suffixes=("", "_hard"))
    chosen = chosen.sort_values(["percent", "percent_hard", "steps", "rate"], ascending=[False, False, True, False]).groupby(["model", "d"]).rate.first()
    ends = select(n.accuracy[n.accuracy.problem.str.startswith("P")], length=64).percent
    return [
        ("The search: rates that the rule gives, of six", sum(chosen[which] == rate for which, rate in n.rates.items()), ">= 6"),
        ("the hybrid and Mamba reach 90 % at all four rates", min(at_90("mamba"), at_90("hybrid")), "= 4"),
        ("RoPE and learned positions at one of them", max(at_90("rope"), at_90("learned")), "= 1"),
        ("three times the chosen rate leaves Mamba, RoPE and the hybrid at or below the counting baseline", max(faster) - BASELINE, "<= 0"),
        ("Of the 165 runs of Table 2, 43 end so", (ends < 95).sum(), "= 43"),
        ("Of the 165 runs of Table 2", len(ends), "= 165"),
        ("after about 33,000 steps", n.median("longer", "mamba", tau=5), "= 33000 ± 500"),
        ("ended at about 39 %", n.longer(model="mamba", d=8), "= 39 ± 0.5"),
        ("RoPE stayed below counting", int(n.longer(model="rope") < BASELINE), "= 1"),
        ("NoPE at delay five stayed at 20 %", n.longer(model="nope"), "= 20 ± 0.5"),
        ("NoPE stays near it at every rate", abs(hard[hard.model == "nope"].percent - BASELINE).max(), "= 0 ± 4"),
        ("about 18 % at 64 tokens", BASELINE, "= 18 ± 0.5"),
    ]


def on_problem_1(n):
    """Section 4."""
    least = matching(n.mechanisms, measurement="place skipped", tau=5).groupby(["layer", "seed"]).percent.min().unstack("seed")
    first, second = least.reindex([1, 2]).to_numpy()
    lost = lambda model: int(((n.at(64, "P1b", model) >= 95) & (n.at(32, "P1b", model) < 70)).sum())
    emptied = n.part("recurrence emptied", model="hybrid", M=1, tau=1)
    return [
        ("pure attention in one run of sixty", sum(n.solved(192, p, m) for p in ("P1a", "P1b") for m in ATTENTION), "= 1"),
        ("all ten seeds keep 95 % to $3L$", (n.lowest(64, 192, "P1a", "hybrid") >= 95).sum(), "= 10"),
        ("eight of ten seeds keep 95 % at $3L$", n.solved(192, "P1a", "mamba"), "= 8"),
        ("no seed keeps 95 % at $3L$. Scores", n.solved(192, "P1a", "rope"), "= 0"),
        ("Half of the seeds also fail at $L/2$", (n.at(32, "P1a", "rope") < 90).sum(), "= 5"),
        ("one token beyond $L$ the mean is already down to about 40 %", n.at(65, "P1a", "learned").mean(), "= 40 ± 4"),
        ("nine of ten seeds learn the task, late", n.solved(64, "P1a", "nope"), "= 9"),
        ("P1a: NoPE at L/2, highest seed (%)", n.at(32, "P1a", "nope").max(), "<= 12"),
        ("here two of ten RoPE seeds have 95 % at $2L$", n.solved(128, "P1a", "rope"), "= 2"),
        ("P1a: NoPE less learned positions at 2L, means (points)", n.at(128, "P1a", "nope").mean() - n.at(128, "P1a", "learned").mean(), ">= 20"),
        ("learned positions in seven, NoPE in none", n.solved(64, "P1b", "learned"), "= 7"),
        ("six seeds of RoPE, two of Mamba and one of the hybrid", lost("rope"), "= 6"),
        ("two of Mamba and one of the hybrid are far down at $L/2$", lost("mamba"), "= 2"),
        ("one of the hybrid are far down at $L/2$", lost("hybrid"), "= 1"),
        ("RoPE and Mamba recall at the training length in all ten seeds", min(n.solved(64, "P1b", model) for model in ("rope", "mamba")), "= 10"),
        ("no seed learns it; all end at 18 to 25 %", n.at(64, "P1b", "nope").min(), "= 18 ± 0.5"),
        ("all end at 18 to 25 %", n.at(64, "P1b", "nope").max(), "= 25 ± 0.5"),
        ("five cannot do without a token of layer 1's either", (first < 25).sum(), "= 5"),
        ("two lose a third to a half without it", ((first >= 45) & (first < 70)).sum(), "= 2"),
        ("three little (Section 7)", (first >= 89).sum(), "= 3"),
        ("Every seed needs layer 2's recurrence", (second < 25).sum(), "= 10"),
        ("while at delay one nine of ten keep most of their accuracy", (emptied > 50).sum(), "= 9"),
        ("in all ten seeds, the hybrid in nine", n.solved(64, "P1b", "hybrid"), "= 9"),
        ("by two each", n.solved(192, "P1a", "mamba") - n.solved(192, "P1b", "mamba"), "= 2"),
        ("than at delay one, by two each", n.solved(192, "P1a", "hybrid") - n.solved(192, "P1b", "hybrid"), "= 2"),
        ("after about 650 steps at delay one", n.median("P1a", "hybrid"), "= 650 ± 50"),
    ]


def on_training(n):
    """Section 4, P1c."""
    grows = lambda model: n.median("P1b", model) / n.median("P1a", model)
    apart = lambda problem, one, other: int(n.steps(problem, one).max() < n.steps(problem, other).min())
    return [
        ("at delay one, RoPE after 2,500", n.median("P1a", "rope"), "= 2500 ± 50"),
        ("lies flat for about 1,300 steps", n.median("P1a", "mamba", 30), "= 1300 ± 130"),
        ("The medians of Mamba and the hybrid grow 2.7-fold", grows("mamba"), "= 2.7 ± 0.05"),
        ("of Mamba and the hybrid grow 2.7-fold", grows("hybrid"), "= 2.7 ± 0.05"),
        ("learned positions' 2.3-fold", grows("learned"), "= 2.3 ± 0.05"),
        ("RoPE's 1.2-fold", grows("rope"), "= 1.2 ± 0.05"),
        ("never arrives at delay five", (n.steps("P1b", "nope") < float("inf")).sum(), "= 0"),
        ("At delay one hybrid and Mamba, and learned positions and NoPE, do not overlap", sum(apart("P1a", *two) for two in ORDER), "= 2"),
        ("hybrid and Mamba, and learned positions and NoPE, do not overlap", apart("P1a", *ORDER[0]) + apart("P1a", *ORDER[3]), "= 2"),
        ("the other neighbours in the order do", sum(apart("P1b", *two) for two in (("hybrid", "rope"), ("rope", "mamba"), ("mamba", "learned"))), "= 0"),
        ("Mamba takes about 1,000 steps to 90 % at delay one", n.median("equal", "mamba"), "= 1000 ± 50"),
        ("at Mamba's rate the hybrid takes 1,200", n.median("equal", "hybrid"), "= 1200 ± 50"),
        ("the hybrid takes 1,200 and Mamba 1,500", n.median("P1a", "mamba"), "= 1500 ± 50"),
        ("the hybrid takes 900 on the same five seeds", n.steps("P1a", "hybrid").head(5).median(), "= 900"),
        ("P1a: RoPE at 3L, highest less lowest seed (points)", gap(n.at(192, "P1a", "rope")), ">= 30"),
        ("P1c: delay 5, RoPE's median steps over Mamba's", n.median("P1b", "rope") / n.median("P1b", "mamba"), "<= 1"),
        ("P1c: delay 1, Mamba's median steps over RoPE's", n.median("P1a", "mamba") / n.median("P1a", "rope"), "<= 1"),
        ("P1c: delay 1, RoPE's median steps over those of learned positions", n.median("P1a", "rope") / n.median("P1a", "learned"), "<= 1"),
    ]


def on_problem_2(n):
    """Section 5."""
    return [
        ("Mamba recalls four queries in three of five seeds", n.solved(64, "P2a", "mamba", M=4), "= 3"),
        ("eight in one, sixteen in none", n.solved(64, "P2a", "mamba", M=8), "= 1"),
        ("sixteen in none. It does not recall", n.solved(64, "P2a", "mamba", M=16), "= 0"),
        ("one seed reaches 99.9 %", n.at(64, "P2a", "mamba", M=8).max(), "= 99.9 ± 0.05"),
        ("has about half", n.at(64, "P2a", "mamba", M=8).min(), "= 50 ± 5"),
        ("cut at 24,000 steps", n.last_step("P2a", "mamba", M=8).reindex(n.at(64, "P2a", "mamba", M=8).sort_values().index[:1]).mean(), "= 24000"),
        ("RoPE recalls four queries in three of five seeds", n.solved(64, "P2b", "rope", M=4), "= 3"),
        ("eight and sixteen in none within its steps", n.solved(64, "P2b", "rope", M=8) + n.solved(64, "P2b", "rope", M=16), "= 0"),
        ("At $M = 16$ all seeds end near 9 %", n.at(64, "P2b", "rope", M=16).mean(), "= 9 ± 0.5"),
        ("At $3L$ no seed has more than 20 %", sum((n.at(192, "P2b", "rope", M=M) > 20).sum() for M in (4, 8, 16)), "= 0"),
        ("at $M = 16$ every seed of Mamba is ahead of every seed of RoPE", int(n.at(64, "P2a", "mamba", M=16).min() > n.at(64, "P2b", "rope", M=16).max()), "= 1"),
        ("at $M = 8$ their seeds overlap", int(n.at(64, "P2a", "mamba", M=8).min() < n.at(64, "P2b", "rope", M=8).max()), "= 1"),
        ("every seed keeps 95 % at $M = 16$", (n.part("recurrence emptied", model="hybrid", M=16) >= 94.9).sum(), "= 5"),
        ("at most 28,000 steps", n.last_step("P2b", "rope", M=4).max(), "= 28000"),
        ("Mamba up to 52,000", max(n.last_step("P2a", "mamba", M=M).max() for M in (4, 8, 16)), "= 52000"),
        ("in every seed, at the training length and at three times it", sum(n.solved(length, "P2c", "hybrid", M=M) for M in (4, 8, 16) for length in (64, 192)), "= 30"),
        ("one of two seeds ended near 80 % at $M = 16$", n.at(64, "norm", "hybrid").min(), "= 80 ± 0.5"),
    ]


def on_problem_3(n):
    """Section 6."""
    short, vector = (n.part(f"calibration, {name}", model="mamba", d=64, length=32) for name in ("as it is", "vector"))
    return [
        ("at $3L$ none keeps 95 %** (Figure 7", n.solved(192, "P3a", "mamba", M=16), "= 0"),
        ("at width 8 it answered fewer than half", (n.at(64, "P2a", "mamba", M=16) >= 50).sum(), "= 0"),
        ("90 % takes about 2,100 steps", n.median("P3a", "mamba", M=4), "= 2100 ± 50"),
        ("about nine times that", n.median("P2a", "mamba", M=4) / n.median("P3a", "mamba", M=4), "= 9 ± 0.5"),
        ("Four of five do so only around that length", ((n.at(32, "P3a", "mamba", M=16) < 95) & (n.at(192, "P3a", "mamba", M=16) < 90)).sum(), "= 4"),
        ("three of five seeds are far down at $L/2$ already", (n.at(32, "P3a", "mamba", M=16) < 60).sum(), "= 3"),
        ("With four queries four seeds keep 95 % at $3L$", n.solved(192, "P3a", "mamba", M=4), "= 4"),
        ("at $3L$, with eight three", n.solved(192, "P3a", "mamba", M=8), "= 3"),
        ("In two of those a constant vector at the last token brings most of it back", (vector[short < 60] > 80).sum(), "= 2"),
        ("it ends near 17 %", n.at(64, "P3b", "mamba").mean(), "= 17 ± 0.5"),
        ("the counting baseline is 18 %", BASELINE, "= 18 ± 0.5"),
        ("*Four* queries at delay ten were learned by one of two seeds", n.solved(64, "near", "mamba", M=4), "= 1"),
        ("after 11,500 steps", n.steps("near", "mamba", M=4).min(), "= 11500"),
        ("where delay one takes 2,100", n.median("P3a", "mamba", M=4), "= 2100"),
        ("Sixteen queries at delay *five* were not learned by two seeds", (n.at(64, "near", "mamba", M=16) < 95).sum(), "= 2"),
        ("P3b's own further seed, 48,000 steps, ends three points above counting", n.longer(d=64, tau=10) - BASELINE, "= 3 ± 0.5"),
        ("Four of five seeds are near it, one is below", (abs(n.at(64, "P3b", "mamba") - BASELINE) <= 5).sum(), "= 4"),
        ("are near it, one is below", (n.at(64, "P3b", "mamba") < BASELINE - 5).sum(), "= 1"),
        ("(19 and 7 %)", n.at(64, "rates 0.001", "mamba").max(), "= 19 ± 0.5"),
        ("and 7 %)", n.at(64, "rates 0.004", "mamba").max(), "= 7 ± 0.5"),
        ("P3b: the two other rates, above the best of the five seeds", sum((n.at(64, f"rates {rate}", "mamba") > n.at(64, "P3b", "mamba").max()).sum() for rate in ("0.001", "0.004")), "<= 0"),
        ("it has 98 % at $3L$", n.at(192, "longer", "mamba", tau=5, d=64).mean(), "= 98 ± 0.5"),
        ("P3b: delay five, the longer run's steps to 90 %, beyond its neighbours' budget", n.median("longer", "mamba", tau=5) - n.last_step("near", "mamba", M=16).max(), ">= 0"),
    ]


def on_mechanisms(n):
    """Sections 7.1 and 7.2."""
    by_run = lambda name: matching(n.mechanisms, measurement=name, M=1).set_index(["model", "tau", "seed"]).percent.sort_index()
    at_end, previous = by_run("uniform at the end"), {length: n.part("mass on the previous token", model="rope", length=length) for length in (64, 192)}
    limited = lambda where, tau: n.part(f"RoPE limited {where}", tau=tau)
    empty = lambda model, tau: n.part("recurrence emptied", model=model, tau=tau, layer=1, M=1)
    no_tap = lambda tau, lag: n.part("tap zeroed out", model="hybrid", tau=tau, place=-lag).max()
    skips = matching(n.mechanisms, measurement="place skipped")
    lost = skips[skips.percent < 50]
    needs = lambda tau, layer: matching(lost, tau=tau, layer=layer).set_index("seed").place
    return [
        ("7.1: accuracy with layer 1 ablated at the value's place, highest seed (%)", by_run("uniform at the value").max(), "<= 15"),
        ("ablated at an unrelated place, they lose nothing on average", (by_run("v ≠ q") - by_run("uniform elsewhere")).mean(), "= 0 ± 0.5"),
        ("33 of the 40 runs of RoPE and learned positions keep 80 %", sum((at_end.loc[model] >= 80).sum() for model in ("rope", "learned")), "= 33"),
        ("and NoPE in every seed, use it there too", (at_end.loc["nope", 1] < 80).sum(), "= 10"),
        ("between 21 and 93 % of its mass on the previous token", previous[64].min(), "= 21 ± 0.5"),
        ("and 93 % of its mass on the previous token", previous[64].max(), "= 93 ± 0.5"),
        ("and keeps it to $3L$ within about four points", (previous[64] - previous[192]).max(), "= 4 ± 0.4"),
        ("only what uniform attention would put there", n.part("mass on the previous token", model="nope", length=64).max() - 100 / 63 * sum(1 / t for t in range(2, 65)), "= 0 ± 0.5"),
        ("rises from 66 to 96 %", limited("nowhere", 1).mean(), "= 66 ± 0.5"),
        ("to 96 %, and at delay five", limited("in layer 2", 1).mean(), "= 96 ± 0.5"),
        ("at delay five eight of the nine that had lost recover to 85 % or more", ((limited("in layer 2", 5) >= 85) & (limited("nowhere", 5) < 82)).sum(), "= 8"),
        ("of the nine that had lost", (limited("nowhere", 5) < 82).sum(), "= 9"),
        ("In layer 1 the same changes the mean by one point at most", max(abs((limited("in layer 1", tau) - limited("nowhere", tau)).mean()) for tau in (1, 5)), "= 1 ± 0.5"),
        ("every seed has 97 % or more at 65 tokens", n.part("trained row at the end", tau=1, length=65).min(), "= 97 ± 0.5"),
        ("7.2: hybrid without the tap that reaches the query, or at delay 5 the recurrence, highest seed (%)", max(no_tap(1, 1), no_tap(5, 3), empty("hybrid", 5).max()), "<= 20"),
        ("7.2: Mamba at delay one, layer 2's recurrence emptied, highest seed (%)", n.part("recurrence emptied", model="mamba", tau=1, layer=2, M=1).max(), "<= 95"),
        ("nine of ten keep more than half", (empty("hybrid", 1) > 50).sum(), "= 9"),
        ("layer 1's in eight of ten seeds", needs(1, 1).index.nunique(), "= 8"),
        ("layer 2's in two", needs(1, 2).index.nunique(), "= 2"),
        ("It lies one to three tokens after the query", lost[lost.tau == 1].place.min(), "= 1"),
        ("one to three tokens after the query", lost[lost.tau == 1].place.max(), "= 3"),
        ("7.2: Mamba with a place before the query skipped, lowest accuracy (%)", skips[skips.place < 0].percent.min(), ">= 95"),
        ("Every seed needs layer 2's state", needs(5, 2).index.nunique(), "= 10"),
        ("at the value's place or at the next", needs(5, 2).min() + needs(5, 2).max(), "= 11"),
        ("Five also need a place of layer 1", len(set(needs(5, 1).index) & set(needs(5, 2).index)), "= 5"),
        ("two of these recall with layer 1's recurrence empty", (empty("mamba", 5) >= 90).sum(), "= 2"),
    ]


def on_memory(n):
    """Sections 7.3 and 7.4."""
    query, rope = (matching(n.mechanisms, measurement="by the query", d=8, tau=1, model=model, M=M) for model, M in (("mamba", 16), ("rope", 4)))
    known = (query.percent > 90).groupby(query.seed).sum()
    ages = matching(n.mechanisms, measurement="by age", model="mamba", d=8, tau=1).query("M > 1").groupby(["M", "place"]).percent.mean().unstack()
    able, failing = calibration(n.mechanisms)
    trial = lambda table, length, name: table[length, name]
    own = able[64, "as it is"]
    back = lambda name: (failing[32, name] >= own.loc[failing.index] - 5).sum()
    failed = lambda model, d: sum(which[:2] == (model, d) for which in failing.index)
    mended = failing.index[failing[32, "vector"] >= own.loc[failing.index] - 5]
    healed = lambda model, d: sum(which[:2] == (model, d) for which in mended)
    return [
        ("the five seeds answer between 3 and 7", known.min(), "= 3"),
        ("between 3 and 7 in more than 90 %", known.max(), "= 7"),
        ("the rest in less than 30 %", query.percent.between(30, 90).sum(), "= 0"),
        ("7.3: Mamba at d = 8, youngest less oldest pairs, of the three M the most (points)", (ages[-1] - ages[-57]).abs().max(), "<= 10"),
        ("at $M = 4$ two seeds answer some queries in 60 to 80 %", rope[rope.percent.between(59.5, 80.5)].seed.nunique(), "= 2"),
        ("Of the 73 networks tried that recall at 64 tokens", len(able), "= 73"),
        ("27 *fail* at 32", len(failing), "= 27"),
        ("The vector brings 20 back", back("vector"), "= 20"),
        ("random vectors of its norm none", back("random vector"), "= 0"),
        ("it takes 21 of the 27 below 40 %", (trial(failing, 64, "vector") < 40).sum(), "= 21"),
        ("Random vectors take none so low", (trial(failing, 64, "random vector") < 40).sum(), "= 0"),
        *((text, value, f"= {number}") for k, of, whose, which in (
            (9, 9, " of NoPE", ("nope", 8)), (8, 11, " of RoPE", ("rope", 8)), (2, 3, " of Mamba at $d = 8$", ("mamba", 8)), (1, 3, " at $d = 64$", ("mamba", 64)))
          for text, value, number in ((f"{k} of {of}{whose}", healed(*which), k), (f"of {of}{whose}", failed(*which), of))),
        ("NoPE's seeds down to 46 %", trial(failing, 64, "random vector").min(), "= 46 ± 0.5"),
        ("takes their mean from 38 to 85 %", n.part("own row at the end", tau=1, length=32).mean(), "= 38 ± 0.5"),
        ("to 85 % at delay one", n.part("trained row at the end", tau=1, length=32).mean(), "= 85 ± 0.5"),
    ]


def on_further(n):
    """Section 8."""
    delays = {tau: n.steps(problem, "mamba", tau=tau) for problem, taus in (("P1a", (1,)), ("P1b", (5,)), ("delays", (2, 3, 4, 6, 7, 8, 10))) for tau in taus}
    swept = n.accuracy[n.accuracy.problem.isin(["P1a", "P1b", "delays"])]
    mixed = lambda length, model: select(n.accuracy, problem="mixed", model=model, length=length).percent
    grid = lambda **letters: matching(n.searched, problem="grid", **letters).percent

    def best(decay):
        """Mamba at d = 64: both seeds at the rate that is best for them."""
        runs = matching(n.searched, problem="grid", d=64, weight_decay=decay)
        return runs[runs.rate == runs.groupby("rate").percent.mean().idxmax()].percent
    return [
        ("in 8 of 12 runs with one head", (grid(model="rope", M=4, heads=1) >= 90).sum(), "= 8"),
        ("8 of 12 runs with one head", len(grid(model="rope", M=4, heads=1)), "= 12"),
        ("and in 1 of 12 with two", (grid(model="rope", M=4, heads=2) >= 90).sum(), "= 1"),
        ("With sixteen every run of RoPE stays below counting", (grid(model="rope", M=16) >= BASELINE).sum(), "= 0"),
        ("8.3: Mamba at d = 8, M = 16, the highest run of the grid (%)", grid(model="mamba", d=8).max(), "<= 50"),
        ("which is ahead with it in both seeds", int(best(0.1).min() > best(0.0).max()), "= 1"),
        ("100 % at three tokens and 18 % at 64", BASELINE, "= 18 ± 0.5"),
        ("and 16 % of the rest", n.part("v ≠ q", model="nope", tau=5).mean(), "= 16 ± 0.5"),
        ("the 13 % that counting gives", float(counting_baseline([64], distinct=True)[0]), "= 13 ± 0.5"),
        ("does much the same in four of five seeds", (n.part("v = q", tau=10) >= 80).sum(), "= 4"),
        ("8.2: Mamba with one query, delays 1 to 10, lowest seed at L (%)", select(swept, model="mamba", length=64).percent.min(), ">= 95"),
        ("8.2: steps to 90 %, delays up to three, the slowest seed", max(delays[tau].max() for tau in (1, 2, 3)), "<= 3000"),
        ("the median is above 3,000 steps", sum(steps.median() <= 3000 for tau, steps in delays.items() if tau > 3), "= 0"),
        ("at ten as at five", delays[10].median() - delays[5].median(), "= 0 ± 50"),
        ("8.2: trained at mixed lengths, RoPE and Mamba at 32 tokens, lowest seed (%)", min(mixed(32, model).min() for model in ("rope", "mamba")), ">= 99"),
        ("rises from chance to 81 to 95 %", mixed(32, "nope").min(), "= 81 ± 0.5"),
        ("to 81 to 95 %", mixed(32, "nope").max(), "= 95 ± 0.5"),
        ("loses about 7 points at $L$", n.at(64, "P1a", "nope").head(5).mean() - mixed(64, "nope").mean(), "= 7 ± 0.7"),
        ("its seeds have 19 to 92 % at $3L$", n.at(192, "P1a", "rope").min(), "= 19 ± 0.5"),
        ("19 to 92 % at $3L$", n.at(192, "P1a", "rope").max(), "= 92 ± 0.5"),
        ("four of five seeds keep more than 90 % at $3L$", (mixed(192, "rope") > 90).sum(), "= 4"),
    ]


def of(*tables):
    """(the conclusions, all other claims) of the tables of `Numbers`."""
    n = Numbers(*tables)
    return conclusions(n), [claim for part in (on_settings, on_problem_1, on_training, on_problem_2, on_problem_3, on_mechanisms, on_memory, on_further) for claim in part(n)]
