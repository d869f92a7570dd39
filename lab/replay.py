"""Does the present code still make the stored runs? Cheap and behavioural: answers, rule, opening (see `replay`)."""

import math

import pandas as pd
from tqdm import tqdm

# Relative, of float64 losses after a few steps. They start from weights drawn in float32, whose last bit depends on the vectors that PyTorch draws them with:
# AVX2 and AVX-512 give losses 3e-16 apart, no vectors 1e-8. The smallest change of code in the tests moves them by 4e-6.
OPENING_TOLERANCE = 1e-7
ADVICE = {
    "answers": "its weights answer otherwise than when it was stored: the model, the test set or a kernel has changed; put that back or train with TRAIN=1",
    "rule": "the stopping rule ends it at another step: put `progress` back, or raise RULE and train with TRAIN=1",
    "opening": "its first losses come out otherwise: sampler, initialisation, loss or optimiser have changed; put that back, or raise RULE and train with TRAIN=1",
}


class Stale(AssertionError):
    """Stored runs that the present code does not make."""


def kind(run):
    """What runs share that are opened alike: model, sizes, norm, mixed lengths, weight decay, a rate that cools."""
    s = run["setting"]
    return s["model"], s["d"], s["norm"], s["heads"], s["shortest"] < s["L"], s["weight_decay"] > 0, s["cooling"] > 0


def answers_differ(run, again):
    """Right answers on the test batch, now less stored."""
    return abs(again(run) - run["curve"][-1][1]) if run["curve"] else 0


def steps_differ(run, again):
    """Steps between where the rule ends the stored curve now and where the run ended; inf where it does not end.

    A run that a loss stopped which was not finite has no end by the rule.
    """
    end = again(run)
    if "stopped" in run["provenance"]:
        return 0 if end is None else math.inf
    return math.inf if end is None else abs(end - run["curve"][-1][0])


def losses_differ(run, again):
    """Largest relative difference of the first losses; inf where their number differs."""
    pairs = list(zip(again(run), run["opening"], strict=False))
    return max(abs(now - was) / abs(was) for now, was in pairs) if len(pairs) == len(run["opening"]) else math.inf


# What another processor's rounding may move. An answer turns where two logits are equal but for it, which is rare: TIES of the answers that one number
# counts, in the test batch of a run as in a measurement. FEWEST: the sequences that a row of a measurement has at least, ELSE those of all others.
TIES = 2
FEWEST, ELSE = {"by age": 40, "v = q": 64, "by the query": 87}, 300
MASS = 0.01  # points of an attention mass, a mean of float32 probabilities, of which rounding changes all a little
CHECKS = {"answers": (answers_differ, TIES), "rule": (steps_differ, 0), "opening": (losses_differ, OPENING_TOLERANCE)}


def rounding(measurement):
    """By how many points rounding may move a row of mechanisms.csv."""
    return MASS if measurement.startswith("mass on") else 100 * TIES / FEWEST.get(measurement, ELSE)


def chosen(check, runs, sample):
    """Which runs a check takes: the opening one of each kind, the others all, or every `sample`-th."""
    if check == "opening":
        return list({kind(run): run for run in reversed(runs)}.values())[::-1]
    return runs[::sample]


def replay(runs, again, sample=1):
    """Replay runs; returns a table of kind of check, runs replayed and largest difference. Raises Stale naming every run that fails.

    `again` holds a function of a run for each check: "answers" gives the right answers of the stored weights on the test batch, "rule"
    the step at which the stored curve ends, "opening" the first losses in plain float64. `sample`: of answers and rule every n-th run.
    """
    rows, failed, once = [], [], {id(run): run for group in runs.values() for run in group}
    for check, (difference, allowed) in CHECKS.items():
        taken, most = chosen(check, list(once.values()), sample), 0.0
        for run in tqdm(taken, desc=f"replaying {check}", unit="run", leave=False):
            found = difference(run, again[check])
            most = max(most, found)
            if not found <= allowed:  # NaN fails
                failed.append(f"{describe(run)}: {ADVICE[check]} (difference {found:.3g})")
        rows.append({"replay": check, "runs": len(taken), "of": len(once), "largest difference": f"{most:.3g}", "allowed": f"{allowed:g}"})
    if failed:
        raise Stale(f"{len(failed)} replays fail:\n" + "\n".join(failed))
    return pd.DataFrame(rows)


def describe(run):
    """A run in words."""
    s = run["setting"]
    return "{model} d {d} M {M} tau {tau} {norm} rate {rate:g} seed {seed}".format(**s)
