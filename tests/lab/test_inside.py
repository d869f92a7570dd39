"""Interventions: without one the model is itself, with one exactly the part that is meant changes, and afterwards it is itself again."""

import math
from types import SimpleNamespace

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import nn

from cpu_mamba import Mamba
from lab import inside


class Attention(nn.Module):
    """Two heads of width 4, as the report's."""

    def __init__(self, rotary=False):
        super().__init__()
        self.heads, self.qkv, self.out = 2, nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.rotary = RotaryEmbedding(4, learned_freq=False) if rotary else None

    def weights(self, q, k):
        if self.rotary is not None:
            angles = self.rotary(torch.arange(q.shape[2]).float())
            q, k = apply_rotary_emb(angles, q), apply_rotary_emb(angles, k)
        scores = q @ k.transpose(-1, -2) / 2
        return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf).softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out((self.weights(q, k) @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two layers over a fixed embedding, sixteen answers; `positions` rows of learned positions."""

    def __init__(self, *mixers, positions=None):
        super().__init__()
        self.register_buffer("V", torch.randn(16, 8))
        self.positions = nn.Parameter(torch.randn(positions, 8)) if positions else None
        self.mixers, self.norms, self.head = nn.ModuleList(mixers), nn.ModuleList(nn.LayerNorm(8) for _ in range(3)), nn.Linear(8, 16)

    def forward(self, tokens):
        x = self.V[tokens]
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[1]]
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x))
        return self.head(self.norms[2](x[:, -1]))


KINDS = {
    "learned": lambda: Net(Attention(), Attention(), positions=60), "rope": lambda: Net(Attention(True), Attention(True)), "nope": lambda: Net(Attention(), Attention()),
    "mamba": lambda: Net(Mamba(8), Mamba(8)), "hybrid": lambda: Net(Mamba(8), Attention()),
}


def build(kind):
    torch.manual_seed(3)
    return KINDS[kind]()


@pytest.fixture(params=KINDS)
def net(request):
    return build(request.param)


@pytest.fixture
def tokens():
    return torch.randint(16, (100, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def places():
    return torch.randint(2, 39, (100,), generator=torch.Generator().manual_seed(1))


def test_nothing_changed_is_the_model(net, tokens):
    """Without a change, with one that does nothing, and after one that did something, the answers are the model's own."""
    own = net(tokens).argmax(-1)
    assert torch.equal(inside.answers(net, tokens), own)
    assert torch.equal(inside.answers(net, tokens, (0, inside.shifted(torch.zeros(8))), (1, lambda mixer, x, out: out)), own)
    with pytest.raises(RuntimeError), inside.patched(net, 0, inside.shifted(torch.zeros(5))):
        net(tokens)
    assert torch.equal(net(tokens).argmax(-1), own)
    with pytest.raises(ValueError, match="layer=2"), inside.patched(net, 2, inside.shifted(torch.zeros(8))):
        pass


@pytest.mark.parametrize("at", (0, 1))
def test_layers_written_again_are_the_models(net, tokens, at):
    """Attention with its own weights, and Mamba with its own step sizes, give the layer's own output."""
    same = inside.reweighted(lambda mixer, q, k: mixer.weights(q, k)) if hasattr(net.mixers[at], "qkv") else inside.rescanned(lambda delta: delta)
    x, out = inside.recorded(net, tokens, at)
    with torch.no_grad():
        assert torch.allclose(same(net.mixers[at], x, None), out, atol=1e-5)


def test_a_change_of_the_wrong_kind_is_refused(tokens, places):
    """Attention has no step sizes, Mamba and NoPE no rotation, only learned positions a table."""
    for kind, change in (("nope", inside.emptied()), ("nope", inside.skipped(places)), ("nope", inside.limited(5)), ("mamba", inside.uniform()), ("mamba", inside.limited(5))):
        with pytest.raises(TypeError):
            inside.answers(build(kind), tokens, (0, change))
    with pytest.raises(ValueError, match="positions"):
        inside.with_row(build("rope"), 20, 40)
    with pytest.raises(ValueError, match="lag=4"):
        inside.without_tap(build("mamba"), 0, 4)


def test_a_limit_beyond_the_context_changes_nothing(tokens):
    """The scores written here are RoPE's; a limit inside the context changes the output, and only from the place after it on."""
    net = build("rope")
    x, out = inside.recorded(net, tokens, 1)
    with torch.no_grad():
        assert torch.allclose(inside.limited(39)(net.mixers[1], x, None), out, atol=1e-5)
        moved = (inside.limited(5)(net.mixers[1], x, None) - out).abs().amax((0, 2))
    assert moved[:6].max() < 1e-5 and moved[10:].min() > 1e-4


def test_the_slow_pair_alone_is_limited(tokens):
    """Limited at 0 is a slow pair that does not turn, as with frequency 0; limited at 7, each distance over it counts as 7 for that pair."""
    net = build("rope")
    mixer, x = net.mixers[1], inside.recorded(net, tokens, 1)[0]
    q, k, v = inside.project(mixer, x)
    distance = (torch.arange(40)[:, None] - torch.arange(40)).double()
    a, b = (torch.view_as_complex(t.unflatten(-1, (2, 2)).double().contiguous()) for t in (q, k))
    fast, slow = mixer.rotary.freqs.tolist()
    turns = torch.stack([torch.exp(1j * fast * distance), torch.exp(1j * slow * distance.clamp(max=7))])
    scores = torch.einsum("nhtp,nhsp,pts->nhts", a, b.conj(), turns).real / 2
    weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1).float()
    with torch.no_grad():
        assert torch.allclose(inside.limited(7)(mixer, x, None), mixer.out((weights @ v).transpose(1, 2).flatten(2)), atol=1e-5)
        limited = inside.limited(0)(mixer, x, None)
        mixer.rotary.freqs.data[1] = 0.0
        mixer.rotary.cached_freqs = None
        assert torch.allclose(limited, Attention.forward(mixer, x), atol=1e-5)


def test_uniform_attention(tokens, places):
    """The mean of the values so far comes out: everywhere, or at the places named, while the others keep their output."""
    net, rows = build("nope"), torch.arange(100)
    mixer, (x, out) = net.mixers[0], inside.recorded(net, tokens, 0)
    with torch.no_grad():
        mean = mixer.out(inside.project(mixer, x)[2].transpose(1, 2).flatten(2).cumsum(1) / torch.arange(1.0, 41)[:, None])
        everywhere, there = (inside.uniform(at)(mixer, x, None) for at in (None, places))
    assert torch.allclose(everywhere, mean, atol=1e-5)
    want = out.clone()
    want[rows, places] = mean[rows, places]
    assert torch.allclose(there, want, atol=1e-5) and not torch.allclose(want, out, atol=1e-3)


def test_masses():
    """The best head's mass, one place back from everywhere and at one place from the end."""
    weights = torch.zeros(3, 2, 5, 5)
    weights[:, 1].diagonal(-1, 1, 2)[:] = 0.5
    weights[:, 0, -1, 2], weights[:, 1, -1, 2] = 0.25, torch.tensor([0.0, 0.5, 1.0])
    assert inside.previous_token_mass(weights) == pytest.approx(0.5) and inside.previous_token_mass(weights, 2) == pytest.approx(0.5 / 3)
    assert inside.mass_at(weights, torch.tensor([2, 2, 2])) == pytest.approx(0.5) and inside.mass_at(weights, torch.tensor([2, 0, 0])) == pytest.approx(0.25 / 3)


def test_a_skipped_place_is_not_seen(tokens):
    """With its step size zeroed out a place leaves no trace in a recurrence that can see it nowhere else; an empty one leaves none of any place."""
    mixer, places = build("mamba").mixers[0], torch.full((100,), 7)
    u, delta, A, B, C, z = mixer.parts(torch.randn(100, 40, 8))
    other = u.clone()
    other[..., 7] = 9.0

    def run(change, u):
        stand_in = SimpleNamespace(parts=lambda x: (u, delta, A, B, C, z), D=torch.zeros(16), out_proj=lambda y: y)
        return change(stand_in, None, None)
    with torch.no_grad():
        assert torch.allclose(run(inside.skipped(places), u), run(inside.skipped(places), other), atol=1e-6)
        assert not torch.allclose(run(inside.skipped(places + 1), u), run(inside.skipped(places + 1), other), atol=1e-3)
        assert run(inside.emptied(), u).abs().max() == 0


@pytest.mark.parametrize("lag", range(4))
def test_a_tap_zeroed_out(lag):
    """The copy's convolution does not see the token `lag` back and sees the others as before; the model itself stays."""
    net = build("mamba")
    own = net.mixers[1].conv1d.weight.clone()
    weight = inside.without_tap(net, 1, lag).mixers[1].conv1d.weight
    kept = [tap for tap in range(4) if tap != 3 - lag]
    assert (weight[..., 3 - lag] == 0).all() and torch.equal(weight[..., kept], own[..., kept]) and torch.equal(net.mixers[1].conv1d.weight, own)


@pytest.mark.parametrize("at", (0, 1))
def test_a_shift_reaches_the_head(net, tokens, at):
    """The vector is added to the stream after its layer at the last place and nowhere else: the answers are those of what follows on that stream."""
    shift = 10 * torch.randn(8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        stream = net.V[tokens] + (0 if net.positions is None else net.positions[:40])
        for norm, mixer in list(zip(net.norms, net.mixers))[: at + 1]:
            stream = stream + mixer(norm(stream))
        stream[:, -1] += shift
        end = stream[:, -1] if at else stream[:, -1] + net.mixers[1](net.norms[1](stream))[:, -1]
        want = net.head(net.norms[2](end)).argmax(1)
    got = inside.answers(net, tokens, (at, inside.shifted(shift)))
    assert torch.equal(got, want) and not torch.equal(got, inside.answers(net, tokens))
    assert torch.equal(inside.answers(net, tokens, (at, inside.shifted(shift.expand(100, 8)))), got)


def test_the_mean_output_is_moved_by_its_shift(net, tokens):
    """A shift by the difference of two mean outputs gives one the mean of the other."""
    short = tokens[:, :20]
    vector = inside.mean_output(net, tokens, 0) - inside.mean_output(net, short, 0)
    with inside.patched(net, 0, inside.shifted(vector)):
        moved = inside.mean_output(net, short, 0)  # recorded after the shift: hooks run in order
    assert torch.allclose(moved, inside.mean_output(net, tokens, 0), atol=1e-5) and vector.norm() > 1e-3


def test_with_row_moves_one_row():
    """The place named gets the other's row, nothing else changes, the model itself stays."""
    net = build("learned")
    placed = inside.with_row(net, 20, 40)
    assert torch.equal(placed.positions[19], net.positions[39]) and not torch.equal(placed.positions[19], net.positions[19])
    assert torch.equal(placed.positions[:19], net.positions[:19]) and torch.equal(placed.positions[20:], net.positions[20:])


def test_query_places():
    """The first q, and whether the value differs from it."""
    tokens, values = torch.tensor([[5, 2, 9, 2], [2, 7, 1, 2], [3, 2, 2, 2]]), torch.tensor([9, 7, 2])
    differ, first = inside.query_places(tokens, values)
    assert differ.tolist() == [True, True, False] and first.tolist() == [1, 0, 1]


def measured(found):
    """{(measurement, layer, place): percent}, each once."""
    rows = [((name, where.get("layer"), where.get("place")), percent) for name, percent, where in found]
    assert len(dict(rows)) == len(rows) and all(math.isnan(percent) or 0 <= percent <= 100 for _, percent in rows)
    return dict(rows)


@pytest.fixture
def task():
    """(tokens, values, index of the earlier query) with delay 2: the query 0, the value two places on, in one of eight sequences the query."""
    draw = torch.Generator().manual_seed(11)
    tokens, first = torch.randint(1, 16, (400, 40), generator=draw), torch.randint(0, 37, (400,), generator=draw)
    values, rows = torch.randint(0, 8, (400,), generator=draw), torch.arange(400)
    tokens[rows, first], tokens[rows, first + 2], tokens[:, -1] = 0, values, 0
    return tokens, values, first


class Oracle(nn.Module):
    """Answers the token two places after the first query; wrong where that is further back than `reach`."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, tokens):
        first = (tokens[:, :-1] == tokens[:, -1:]).int().argmax(1)
        answer = tokens[torch.arange(len(tokens)), first + 2]
        return nn.functional.one_hot(torch.where(39 - first > self.reach, (answer + 1) % 16, answer), 16)


def test_by_sequence(task):
    """A model that forgets is seen to by age and not by the query or the draw; one that does not has 100 % of everything."""
    tokens, values, first = task
    whole, short = (measured(inside.by_sequence(Oracle(reach), tokens, values, 1)) for reach in (40, 16))
    assert set(whole.values()) == {100.0} and whole.keys() == short.keys()
    assert [short["by age", None, -low] for low in (1, 9, 17, 25, 33)] == [100, 100, 0, 0, 0]
    recent = 39 - first <= 16
    assert short["by the query", None, 0] == pytest.approx(100 * recent.double().mean().item())
    assert short["v = q", None, None] == pytest.approx(100 * recent[values == 0].double().mean().item())


def test_measurements_of_attention(task):
    """Scores and ablations are those of the tools, on the sequences with v != q; a limit beyond the context and a row put on itself change nothing."""
    tokens, values, _ = task
    net, (some, asked, first) = build("rope"), inside.distinct(tokens, values)
    assert (some[:, :-1] == 0).sum(1).max() == 1 and torch.equal(some[torch.arange(len(some)), first + 2], asked)
    assert measured(inside.scores(net, some, first + 2))["mass on the value", 2, None] == pytest.approx(100 * inside.mass_at(inside.attention_weights(net, some, 1), first + 2))
    assert len(measured(inside.scores(build("hybrid"), some, first + 2))) == 1
    uniform = measured(inside.ablations(net, tokens, values, 2))
    assert uniform["uniform at the value", 1, None] == inside.accuracy(net, some, asked, (0, inside.uniform(first + 2)))
    assert uniform["uniform everywhere", 1, None] == inside.accuracy(net, some, asked, (0, inside.uniform()))
    assert len(set(measured(inside.limits(net, tokens, values, 40)).values())) == 1
    assert len(set(measured(inside.rows_given(build("learned"), tokens, values, 40)).values())) == 1


def test_measurements_of_mamba(task):
    """Both recurrences and eight taps of Mamba, one recurrence and four taps of the hybrid; places are counted from the earlier query."""
    tokens, values, _ = task
    net, (some, asked, first) = build("mamba"), inside.distinct(tokens, values)
    removed = measured(inside.parts_removed(net, tokens, values))
    assert len(removed) == 10 and len(measured(inside.parts_removed(build("hybrid"), tokens, values))) == 5
    assert removed["recurrence emptied", 2, None] == inside.accuracy(net, tokens, values, (1, inside.emptied()))
    assert removed["tap zeroed out", 1, -3] == inside.accuracy(inside.without_tap(net, 0, 3), tokens, values)
    inner = (first >= 1) & (first <= 35)
    skipped = measured(inside.places_skipped(net, tokens, values, range(-1, 4)))
    assert len(skipped) == 10 and skipped["place skipped", 2, 3] == inside.accuracy(net, some[inner], asked[inner], (1, inside.skipped(first[inner] + 3)))


def test_calibration_to_the_same_length_changes_nothing(net, task):
    """With the same sequences on both sides the vector is 0; with others the answers are those with the difference of the means."""
    tokens, values, _ = task
    same = measured(inside.calibration(net, (tokens, values), tokens, tokens, torch.Generator()))
    assert len(set(same.values())) == 1
    other = measured(inside.calibration(net, (tokens, values), tokens, tokens[:, :20], torch.Generator().manual_seed(1)))
    vector = inside.mean_output(net, tokens[:, :20], 0) - inside.mean_output(net, tokens, 0)
    assert other["calibration, vector", None, None] == inside.accuracy(net, tokens, values, (0, inside.shifted(vector)))
    assert other["calibration, as it is", None, None] == inside.accuracy(net, tokens, values)
