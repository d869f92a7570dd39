"""The training loop and its rule."""

import itertools
import re
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def brief(recall):
    """A setting of a few steps."""
    return recall.Setting("hybrid", seed=1, budget=10, longest=10, every=5, patience=2, n=20)


@pytest.mark.parametrize("seed", [11, 12])
def test_a_hybrid_learns_the_induction_head(recall, seed):
    """The report's own training loop, 1,000 steps at most, brings the hybrid well above anything but recall."""
    s = recall.setting("hybrid", seed=seed, budget=1_000, longest=1_000, n=500)
    model, curve, _ = recall.train(s)
    assert recall.evaluate(model, *recall.test_set(s, 64, "fresh")) >= 450, curve


@pytest.mark.parametrize("model", ["mamba", "rope"])
def test_same_seed_same_bits(recall, brief, model):
    """Two trainings with one seed agree in every weight; another seed differs."""
    runs = [recall.train(replace(brief, model=model, seed=seed)) for seed in (1, 1, 2)]
    states = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m, *_ in runs]
    assert torch.equal(states[0], states[1]) and runs[0][1] == runs[1][1] and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("model", ["learned", "rope", "nope", "mamba", "hybrid"])
def test_a_trajectory_agrees_with_plain_pytorch(recall, model, monkeypatch):
    """Twenty steps of the training loop by the fused step and by autograd in float64 have the same losses but for rounding."""
    losses, s = [], recall.setting(model, M=4, budget=20, longest=20, every=20, n=20)
    make = recall.trajectory.__globals__["make_step"]

    def listening(net):
        step = make(net)

        class Step:
            logits = staticmethod(step.logits)

            def __call__(self, tokens, values):
                losses.append(float(step(tokens, values)))
                return losses[-1]
        assert not isinstance(step, recall.PlainStep)
        return Step()
    monkeypatch.setitem(recall.trajectory.__globals__, "make_step", listening)
    recall.train(s)
    assert losses == pytest.approx([loss for _, loss, _, _ in itertools.islice(recall.trajectory(s, plain=True), 20)], rel=2e-4)


def test_weight_decay_and_cooling_are_those_of_pytorch(recall):
    """Forty float64 steps agree with torch.optim.AdamW on two groups, the linear maps' weights and all else, under a schedule of PyTorch's."""
    s = recall.setting("hybrid", M=4, rate=1e-2, weight_decay=0.1, cooling=10, warmup=5, clip=1e9)
    losses = [loss for _, loss, _, _ in itertools.islice(recall.trajectory(s, plain=True), 40)]
    torch.manual_seed(s.seed)
    model, batches = recall.model_of(s).double(), torch.Generator().manual_seed(1_000_003 * (s.seed + 1))
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not w for w in linear)]
    optimizer = torch.optim.AdamW([{"params": linear, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, betas=s.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min((done + 1) / 5, 1) * (10 / max(done + 1, 10)) ** 0.5)
    for loss in losses:
        tokens, values = recall.sample_batch(64, 64, 16, 4, 1, batches)
        optimizer.zero_grad()
        mine = torch.nn.functional.cross_entropy(model(tokens), values)
        assert loss == pytest.approx(mine.item(), rel=1e-9)
        mine.backward()
        optimizer.step()
        schedule.step()
    assert len(linear) == 7 and sum(w.numel() for w in linear) == int(recall.linear_weights(model).sum())


def curve_of(s, *levels):
    """A curve with the given accuracies, one evaluation after the other."""
    return [(s.every * k, round(level * s.n)) for k, level in enumerate(levels, 1)]


def test_a_run_that_stays_at_99_9_percent_ends_at_the_low_rate(recall):
    """1,000 steps after 99 %; 99.5 % and 50 % go on to the end of the budget."""
    s = recall.Setting("mamba")
    assert recall.progress(curve_of(s, *[1.0] * 30), s) == (2_000, 1_000, 1_000)
    assert recall.progress(curve_of(s, *[0.995] * 160), s) == (16_000, 1_000, 1_000)
    assert recall.progress(curve_of(s, *[0.5] * 160), s)[0] == 16_000
    assert recall.progress(curve_of(s, *[0.5] * 159), s) == (None, float("inf"), 1)


def test_a_budget_grows_while_the_curve_climbs(recall):
    """By quarters, as long as the last quarter is more than a point above the one before, to the longest."""
    s = recall.Setting("mamba")
    flat_then_up = [0.3] * 120 + [0.3 + 0.002 * k for k in range(40)]
    assert recall.progress(curve_of(s, *flat_then_up), s)[0] is None
    assert recall.progress(curve_of(s, *flat_then_up, *[0.38] * 80), s)[0] == 24_000
    assert recall.progress(curve_of(s, *[k / 700 for k in range(640)]), s)[0] == 64_000
    leap = [0.3] * 155 + [0.9] * 5  # the last ten tell of a curve that has just left its plateau
    assert recall.progress(curve_of(s, *leap), s)[0] is None


def test_the_tested_weights_are_the_moving_average(recall, brief):
    """After one step the kept weights are 99 % of the initial and 1 % of the trained ones."""
    one = replace(brief, budget=1, longest=1, every=1, rate=0.5)
    before, after, average = (torch.cat([p.detach().flatten() for p in recall.train(replace(one, average=kept))[0].parameters()]) for kept in (1.0, 0.0, 0.99))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(average, 0.99 * before + 0.01 * after)


def test_a_loss_that_is_not_finite_stops_the_run(recall, brief, monkeypatch):
    """It is named with its step and the last finite value."""
    make = recall.trajectory.__globals__["make_step"]

    def broken(net):
        step, count = make(net), iter(range(100))
        return (lambda tokens, values: step(tokens, values) * (float("nan") if next(count) == 3 else 1.0))
    monkeypatch.setitem(recall.trajectory.__globals__, "make_step", broken)
    assert re.fullmatch(r"step 4: the loss is nan after \d\.\d+", recall.train(brief)[2])


def test_the_opening_is_of_the_same_run(recall):
    """The first losses in float64 are those of the training itself, but for rounding."""
    s = recall.setting("mamba", seed=3)
    first = [loss for _, loss, _, _ in itertools.islice(recall.trajectory(s), recall.OPENING)]
    assert recall.opening(s)[:-1] == pytest.approx(first, rel=1e-5) and recall.opening(s) == recall.opening(s)
