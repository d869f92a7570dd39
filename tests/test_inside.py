"""The tools that replace parts of a model: without a replacement they change nothing, with one they change what they say."""

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
    """The scores written pair by pair are RoPE's; a limit beyond the context leaves them, one inside it does not."""
    torch.manual_seed(4)
    net = recall.build_model("rope")
    mixer, h = net.mixers[1], net.norms[1](net.embed(tokens))
    weights = mixer.weights(mixer.project(h))
    assert torch.allclose(recall.holding(1, 1_000)(1, weights, mixer, h), weights, atol=1e-6)
    assert (recall.holding(1, 5)(1, weights, mixer, h) - weights).abs().max() > 1e-4
    assert recall.holding(0, 5)(1, weights, mixer, h) is weights


def test_replacements_are_attention(recall, tokens):
    """Replaced rows are probabilities over the past: uniform, exact and told."""
    torch.manual_seed(5)
    net = recall.build_model("nope")
    mixer, h = net.mixers[0], net.norms[0](net.embed(tokens))
    weights = mixer.weights(mixer.project(h))
    places = torch.randint(0, 39, (len(tokens),))
    for change, layer in ((recall.flat_layer, 0), (recall.exact_layer, 0), (recall.told_layer(places), 1)):
        new = change(layer, weights, mixer, h)
        assert torch.allclose(new.sum(-1), torch.ones(new.shape[:-1]), atol=1e-5) and new.triu(1).abs().max() == 0
    assert (recall.told_layer(places)(1, weights, mixer, h)[torch.arange(len(places)), :, -1, places].max(1).values == 1).all()


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


def test_the_implicit_attention_is_the_recurrence(recall, tokens):
    """Its shares are non-negative, sum to one, and see only the past's writes."""
    torch.manual_seed(7)
    net = recall.build_model("mamba")
    share = recall.implicit_attention(net, tokens, 1)
    assert share.shape == tokens.shape and (share >= 0).all() and torch.allclose(share.sum(1), torch.ones(len(tokens)))


def test_clock_shift_is_zero_at_the_trained_length(recall):
    """At length L there is nothing to repair."""
    torch.manual_seed(8)
    net = recall.build_model("nope")
    assert recall.clock_shift(net, 1, 1, 64, n=100).abs().max() == 0 and recall.clock_shift(net, 1, 1, 20, n=100).abs().max() > 0
