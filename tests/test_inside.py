"""The tools that replace parts of a model: without a replacement they change nothing, with one they change what they say."""

import pandas as pd
import pytest
import torch


@pytest.fixture(params=("learned", "rope", "nope", "mamba", "hybrid"))
def net(recall, request):
    torch.manual_seed(3)
    return recall.build_model(request.param)


@pytest.fixture
def tokens(recall, generator):
    return recall.sample_batch(100, 40, 16, 4, 2, generator)[0]


def test_answers_are_the_models(recall, net, tokens):
    """With nothing replaced, or everything replaced by itself, the answers are the model's own."""
    own = net(tokens).argmax(-1)
    assert torch.equal(recall.answers(net, tokens), own)
    same = recall.answers(net, tokens, attention=lambda layer, weights, mixer, h: weights, step_size=lambda layer, delta: delta, shift=torch.zeros(8))
    assert (same == own).float().mean() >= 0.99  # sums in another order may turn a near tie


def test_holding_beyond_the_context_changes_nothing(recall, tokens):
    """The scores written pair by pair are RoPE's; a limit beyond the context leaves them, one inside it does not; only the layers named are held."""
    torch.manual_seed(4)
    net = recall.build_model("rope")
    mixer, h = net.mixers[1], net.norms[1](net.embed(tokens))
    weights = mixer.weights(mixer.project(h))
    assert torch.allclose(recall.holding((1,), 1_000)(1, weights, mixer, h), weights, atol=1e-6)
    assert (recall.holding((1,), 5)(1, weights, mixer, h) - weights).abs().max() > 1e-4
    assert recall.holding((0,), 5)(1, weights, mixer, h) is weights and recall.holding((), 5)(0, weights, mixer, h) is weights
    both = recall.holding((0, 1), 5)
    assert all((both(layer, weights, mixer, h) - weights).abs().max() > 1e-4 for layer in (0, 1))


def test_held_scores_depend_on_the_held_distance(recall):
    """With one token throughout, a place sees all keys beyond the limit under one angle of the slow pair: held at 0 it does not turn at all."""
    torch.manual_seed(4)
    mixer = recall.build_model("rope").mixers[0]
    mixer.rotary.freqs.data[0] = 0.0  # the fast pair still: only the slow one is left to turn
    h = torch.randn(1, 1, 8).expand(1, 30, 8)
    held = recall.holding((0,), 0)(0, None, mixer, h)
    assert torch.allclose(held[0, 0, -1], torch.full((30,), 1 / 30), atol=1e-6)


@pytest.fixture
def layer(recall, tokens):
    """(weights, mixer, h) of an untrained attention layer."""
    torch.manual_seed(5)
    net = recall.build_model("nope")
    mixer, h = net.mixers[0], net.norms[0](net.embed(tokens))
    return mixer.weights(mixer.project(h)), mixer, h


@pytest.fixture
def places(tokens):
    return torch.randint(2, 39, (len(tokens),), generator=torch.Generator().manual_seed(1))


def test_replacements_are_attention(recall, layer, places):
    """Replaced rows are probabilities over the past, and only the layer meant is replaced."""
    weights = layer[0]
    for change, at in ((recall.uniform(), 0), (recall.uniform(places), 0), (recall.exact(1), 0), (recall.exact(5), 0), (recall.told(places), 1), (recall.told(places, both=True), 1)):
        new = change(at, *layer)
        assert torch.allclose(new.sum(-1), torch.ones(new.shape[:-1]), atol=1e-5) and new.triu(1).abs().max() == 0
        assert change(1 - at, *layer) is weights and not torch.equal(new, weights)


def test_uniform_at_one_place(recall, layer, places):
    """Only the row of the place named is made uniform over its past, in all heads."""
    weights, rows = layer[0], torch.arange(len(places))
    new = recall.uniform(places)(0, *layer)
    assert all(torch.allclose(new[i, :, p, : p + 1], torch.full((2, int(p) + 1), 1 / (int(p) + 1))) for i, p in enumerate(places))
    new[rows, :, places] = weights[rows, :, places]
    assert torch.equal(new, weights)


def test_exact_looks_one_lag_back(recall, layer):
    """One head looks `lag` places back and nowhere else, the other is left alone."""
    weights = layer[0]
    for lag in (1, 5):
        new = recall.exact(lag)(0, *layer)
        changed = [head for head in (0, 1) if not torch.equal(new[:, head], weights[:, head])]
        assert len(changed) == 1 and (new[:, changed[0]].diagonal(-lag, 1, 2) == 1).all()


def test_told_one_head_or_both(recall, layer, places):
    """The last query looks at its place alone: in one head the other keeps its weights, in both neither does; earlier rows stay."""
    weights, rows = layer[0], torch.arange(len(places))
    one, both = (recall.told(places, both)(1, *layer) for both in (False, True))
    assert ((one[rows, :, -1, places] == 1).sum(1) == 1).all() and (both[rows, :, -1, places] == 1).all()
    assert torch.equal(one[:, :, :-1], weights[:, :, :-1]) and torch.equal(both[:, :, :-1], weights[:, :, :-1])


def test_a_skipped_place_is_not_seen(recall):
    """With its step size at zero a place leaves no trace in a recurrence whose convolution and skip see it nowhere else."""
    torch.manual_seed(6)
    u, B, C = torch.randn(2, 4, 30), torch.randn(2, 16, 30), torch.randn(2, 16, 30)
    delta, A = torch.rand(2, 4, 30), -torch.rand(4, 16)
    silent = recall.skipping(0, torch.tensor([7, 7]))(0, delta)
    other = u.clone()
    other[..., 7] = 9.0
    assert torch.allclose(recall.selective_scan(u, silent, A, B, C), recall.selective_scan(other, silent, A, B, C))
    assert not torch.allclose(recall.selective_scan(u, delta, A, B, C), recall.selective_scan(other, delta, A, B, C))


def test_the_implicit_attention_follows_the_writes(recall, tokens, monkeypatch):
    """Shares sum to one; a place at which nothing is written has none, and what it had goes to the others in proportion."""
    torch.manual_seed(7)
    net = recall.build_model("mamba")
    share = recall.implicit_attention(net, tokens, 1)
    assert share.shape == tokens.shape and (share >= 0).all() and torch.allclose(share.sum(1), torch.ones(len(tokens)))
    whole = recall.contributions

    def silent(*arguments):
        part, decay = whole(*arguments)
        part[..., 5] = 0
        return part, decay
    monkeypatch.setattr(recall, "contributions", silent)
    without = recall.implicit_attention(net, tokens, 1)
    others = torch.arange(tokens.shape[1]) != 5
    assert (share[:, 5] > 0).all() and (without[:, 5] == 0).all()
    assert torch.allclose(without[:, others], share[:, others] / (1 - share[:, 5:6]), atol=1e-6)


def test_the_contributions_sum_to_the_recurrence(recall, tokens):
    """alpha_s u_s, summed over places and states, is what the recurrence gives at the last position; decay is 1 there and grows with the place."""
    torch.manual_seed(7)
    net = recall.build_model("mamba")
    part, decay = recall.contributions(net, tokens, 1)
    u, delta, A, B, C, _ = net.mixers[1].parts(net.norms[1](recall.layer_inputs(net, tokens, 1)))
    assert torch.allclose(part.sum((2, 3)), recall.selective_scan_reference(u, delta, A, B, C)[..., -1], atol=1e-5)
    assert (decay[..., -1] == 1).all() and (decay.diff(dim=-1) >= 0).all()


def test_retention_is_what_the_step_sizes_leave(recall, tokens):
    """At the last place all is left; a place whose later step sizes are made huge keeps nothing."""
    torch.manual_seed(7)
    net = recall.build_model("mamba")
    last, early = torch.full((len(tokens),), tokens.shape[1] - 1), torch.full((len(tokens),), 3)
    kept = recall.retention(net, [(tokens, last), (tokens, early)], 1)
    assert kept[0] == pytest.approx(100) and 0 < kept[1] < 100
    with torch.no_grad():
        net.mixers[1].dt_proj.bias.fill_(50.0)
    assert recall.retention(net, [(tokens, early)], 1)[0] < 1e-6


def test_a_shift_may_differ_by_sequence(recall, net, tokens):
    """One vector for all, or that vector for each, answer alike; a large one changes answers."""
    shift = torch.arange(8.0)
    same = recall.answers(net, tokens, shift=shift)
    assert torch.equal(recall.answers(net, tokens, shift=shift.expand(len(tokens), 8)), same)
    assert not torch.equal(same, recall.answers(net, tokens))


def test_with_row_moves_one_row(recall):
    """The place named gets the other's row, nothing else changes; models without a table stay as they are."""
    torch.manual_seed(8)
    net = recall.build_model("learned")
    placed = recall.with_row(net, 20, 64)
    assert torch.equal(placed.positions[19], net.positions[63]) and not torch.equal(placed.positions[19], net.positions[19])
    assert torch.equal(placed.positions[:19], net.positions[:19]) and torch.equal(placed.positions[20:], net.positions[20:])
    mamba = recall.build_model("mamba")
    assert all(torch.equal(a, b) for a, b in zip(recall.with_row(mamba, 20, 64).parameters(), mamba.parameters()))


@pytest.mark.parametrize("layer", (0, 1))
def test_a_disguise_reaches_the_head(recall, net, layer):
    """The vector is added to the stream after its layer at the last place and nowhere else: the answers are those of what follows on that stream."""
    placed, vectors = recall.disguised(net, 1, 1, 20, 64)
    shift = 10 * vectors[layer] / vectors[layer].norm()  # far enough to change answers of an untrained model
    tokens, _ = recall.sample_batch(200, 20, 16, 1, 1, torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = recall.layer_inputs(placed, tokens, layer + 1)
        x[:, -1] += shift
        end = x[:, -1] if layer else x[:, -1] + placed.mixers[1](placed.norms[1](x))[:, -1]
        want = placed.head(placed.norms[2](end)).argmax(1)
    got = recall.answers(placed, tokens, shift=shift, shifted=layer)
    assert torch.equal(got, want) and not torch.equal(got, recall.answers(placed, tokens))


def test_a_disguise_moves_the_mean(recall, net):
    """With a layer's vector its mean output at the last place of short sequences is that of 64 tokens."""
    placed, vectors = recall.disguised(net, 1, 1, 20, 64)
    short, long = recall.mean_outputs(placed, 1, 1, 20), recall.mean_outputs(net, 1, 1, 64)
    assert torch.allclose(short + vectors, long, atol=1e-5) and (vectors.norm(dim=1) > 1e-3).all()


def test_query_places(recall, generator):
    """The first q is found for any M, and the sequences with v = q are told apart."""
    tokens, values = recall.sample_batch(500, 20, 16, 16, 3, generator)
    differ, first = recall.query_places(tokens, values)
    rows = torch.arange(500)
    assert torch.equal(tokens[rows, first], tokens[:, -1]) and torch.equal(tokens[rows, first + 3][differ], values[differ])
    assert torch.equal(differ, (tokens == tokens[:, -1:]).sum(1) == 2)


def test_networks_that_fail_at_half_the_length_alone_are_counted(recall):
    """The report's seeds and further ones, of the counted cases, at 32 tokens; as far as they recall at 64, a failure is one against the network's own accuracy there."""
    def trials(kind, model, seed, length, **percent):
        return [dict(measurement=kind + name.replace("_", " "), model=model, d=8, M=1, tau=1, length=length, seed=seed, percent=value) for name, value in percent.items()]

    table = recall.counted(pd.DataFrame(
        trials("clock ", "nope", 0, 32, untouched=5, at_64=92, repaired=88) + trials("clock ", "nope", 1, 32, untouched=86, at_64=90, repaired=90)
        + trials("clock ", "nope", 2, 32, untouched=5, at_64=70, repaired=70)
        + trials("clock ", "nope", 0, 192, untouched=1, at_64=70, repaired=1) + trials("clock ", "learned", 0, 32, untouched=5, at_64=99, repaired=99)
        + trials("further clock ", "nope", 5, 32, untouched=5, at_64=99, repaired=30)))
    assert list(table.index.get_level_values("seed")) == [0, 1, 5] and set(table.index.get_level_values("model")) == {"nope"}
    low = recall.failing(table)
    assert list(low.index.get_level_values("seed")) == [0, 5] and list(recall.mended(low, "repaired")) == [True, False]
