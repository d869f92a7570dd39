"""The five models: shapes, causality, positions, the fused step beside the plain one."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lab import inside

NAMES = ("learned", "rope", "nope", "mamba", "hybrid")


@pytest.fixture
def model(recall, request):
    torch.manual_seed(0)
    return recall.build_model(request.param).eval()


every = pytest.mark.parametrize("model", NAMES, indirect=True)


@every
@pytest.mark.parametrize("length", [3, 7, 64, 192])
def test_logits(recall, generator, model, length):
    """Any length from 3 to 3 L gives logits (n, K) of the last position, the same from the fused step."""
    tokens, _ = recall.sample_batch(5, length, 16, 4, 1, generator)
    logits = model(tokens)
    assert logits.shape == (5, 16) and torch.isfinite(logits).all()
    assert torch.allclose(recall.make_step(model).logits(tokens), logits, rtol=1e-4, atol=1e-5)


@every
def test_every_model_takes_the_fused_step(recall, generator, model):
    """Loss and every gradient as by plain autograd."""
    tokens, values = recall.sample_batch(16, 40, 16, 4, 1, generator)
    other = copy.deepcopy(model)
    fused, plain = recall.make_step(model), recall.PlainStep(other)
    assert not isinstance(fused, recall.PlainStep)
    assert float(fused(tokens, values)) == pytest.approx(float(plain(tokens, values)), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name


class Lora(nn.Module):
    """A linear layer with something added, as fine-tuning wraps it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.more = inner, nn.Linear(inner.in_features, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.more(x)


CHANGES = {
    "a wrapped layer": lambda m: setattr(m, "head", Lora(m.head)),
    "a wrapped projection": lambda m: setattr(m.mixers[0], "x_proj", Lora(m.mixers[0].x_proj)),
    "a hook": lambda m: m.norms[1].register_forward_hook(lambda module, args, out: 2 * out),
    "a hook on the model": lambda m: m.register_forward_hook(lambda module, args, out: 2 * out),
    "a parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m.head),
    "a replaced norm": lambda m: m.norms.__setitem__(0, nn.Identity()),
    "a head without bias": lambda m: setattr(m.head, "bias", None),
    "a norm without bias": lambda m: setattr(m.norms[2], "bias", None),
    "a shared layer": lambda m: m.mixers.__setitem__(1, m.mixers[0]),
    "a frozen parameter": lambda m: m.head.weight.requires_grad_(False),
    "float64": lambda m: m.double(),
    "a NaN": lambda m: m.mixers[0].A_log.data.fill_(float("nan")),
    "an infinity": lambda m: m.head.weight.data[3].fill_(float("inf")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_fused_step_cannot_represent_is_computed_all_the_same(recall, generator, change):
    """A changed Mamba model gives the loss, the logits and the gradients of plain autograd, whatever path it takes."""
    torch.manual_seed(1)
    model = recall.build_model("mamba")
    CHANGES[change](model)
    tokens, values = recall.sample_batch(8, 20, 16, 4, 1, generator)
    other = copy.deepcopy(model)
    step, plain = recall.make_step(model), recall.PlainStep(other)
    same = lambda a, b: torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True)
    assert same(step.logits(tokens), plain.logits(tokens)) and same(step(tokens, values), plain(tokens, values))
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert q.grad is None and p.grad is None or same(p.grad, q.grad), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(recall, generator, name, dtype):
    """All five models in half precision, by autocast and by conversion: logits near those of float32."""
    torch.manual_seed(1)
    model = recall.build_model(name).eval()
    tokens, _ = recall.sample_batch(8, 30, 16, 4, 1, generator)
    want = model(tokens).detach()
    with torch.autocast("cpu", dtype):
        step = recall.make_step(model)
        assert isinstance(step, recall.PlainStep)
        assert torch.allclose(step.logits(tokens).float(), want, atol=0.1)
    converted = copy.deepcopy(model).to(dtype)
    assert torch.allclose(converted(tokens).detach().float(), want, atol=0.1)


@every
def test_causality(recall, generator, model):
    """In every layer, later tokens change no earlier state, and earlier tokens change later ones."""
    tokens, _ = recall.sample_batch(2, 40, 16, 4, 1, generator)
    later, earlier = tokens.clone(), tokens.clone()
    later[:, 25:] = (later[:, 25:] + 1) % 16
    earlier[:, 3] = (earlier[:, 3] + 1) % 16
    states = []
    for t in (tokens, later, earlier):
        layers = []
        hooks = [m.register_forward_hook(lambda module, args, out: layers.append(out.detach())) for m in model.mixers]
        model(t)
        for hook in hooks:
            hook.remove()
        states.append(layers)
    for same, changed, moved in zip(*states):
        assert torch.equal(same[:, :25], changed[:, :25]) and not torch.equal(same[:, 25:], changed[:, 25:])
        assert torch.equal(same[:, :3], moved[:, :3]) and ((same - moved)[:, 4:].abs().amax((0, 2)) > 0).float().mean() > 0.9


def test_learned_positions_past_L_stay_untrained_but_are_used(recall, generator):
    """Training at L gives rows past L no gradient; evaluation past L depends on them; past the table it is refused."""
    model = recall.build_model("learned", L=64)
    tokens, values = recall.sample_batch(8, 64, 16, 1, 1, generator)
    recall.make_step(model)(tokens, values)
    gradient = model.positions.grad.abs().sum(1)
    assert (gradient[:64] > 0).all() and (gradient[64:] == 0).all()
    longer, _ = recall.sample_batch(8, 100, 16, 1, 1, generator)
    before, at_64 = model(longer), model(tokens)
    with torch.no_grad():
        model.positions[80] += 1
    assert not torch.equal(before, model(longer)) and torch.equal(at_64, model(tokens))
    for answer in (model, recall.make_step(model).logits):
        with pytest.raises(ValueError, match="length=193.*192"):
            answer(torch.zeros(1, 193, dtype=torch.int64))


def test_rope_sees_relative_positions_only(recall):
    """Behind a prefix, the attention among the tokens that follow it is what it was, but for the share of the prefix."""
    torch.manual_seed(0)
    attention = recall.Attention(8, 2, rotary=True)
    q, k = torch.randn(2, 1, 2, 50, 4)
    alone, behind = attention.weights(q[:, :, 30:], k[:, :, 30:]), attention.weights(q, k)[:, :, 30:, 30:]
    assert torch.allclose(alone, behind / behind.sum(-1, keepdim=True), atol=1e-5)
    assert not torch.allclose(alone, recall.Attention(8, 2).weights(q[:, :, 30:], k[:, :, 30:]), atol=1e-2)


def test_rope_turns_pairs_by_the_papers_angles(recall):
    """Scores are Re(q conj(k) exp(i (m - n) theta_j)) summed over pairs, theta_j = 10000^(-2j / width) (RoFormer, eq. 34)."""
    torch.manual_seed(0)
    attention = recall.Attention(8, 2, rotary=True).double()
    q, k = torch.randn(2, 1, 1, 50, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones(50, 2, dtype=torch.float64), torch.arange(50.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 1e-2], dtype=torch.float64))
    turned = [torch.view_as_complex(x.unflatten(-1, (2, 2))) * turn for x in (q, k)]
    scores = (turned[0] @ turned[1].mH).real / 2
    want = scores.masked_fill(torch.ones(50, 50, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert torch.allclose(attention.weights(q, k), want, atol=1e-6)


def test_nope_has_no_positions(recall):
    """One causal attention layer without positions answers the last query from the set of earlier tokens, whatever their order."""
    torch.manual_seed(0)
    x = torch.randn(3, 30, 8)
    order = torch.cat((torch.randperm(29), torch.tensor([29])))
    nope, rope = recall.Attention(8, 2), recall.Attention(8, 2, rotary=True)
    assert torch.allclose(nope(x)[:, -1], nope(x[:, order])[:, -1], atol=1e-5)
    assert not torch.allclose(rope(x)[:, -1], rope(x[:, order])[:, -1], atol=1e-3)
    assert not any("position" in name or "rot" in name for name, _ in recall.build_model("nope").named_parameters())


@pytest.mark.parametrize("call, named", [
    (lambda r: r.build_model("gru"), "name='gru'"), (lambda r: r.build_model("rope", d=6), "even head width"), (lambda r: r.build_model("rope", heads=4), "at least 4, not 2"), (lambda r: r.build_model("mamba", norm="batch"), "norm='batch'"),
    (lambda r: r.Attention(9, 2), "heads=2"), (lambda r: r.build_model("mamba", L=2), "L=2"), (lambda r: r.vocabulary(1, 8), "K=1"), (lambda r: r.Attention(8, 0), "heads=0"),
    (lambda r: r.Setting("mamba", M=17), "M=17.*16"), (lambda r: r.Setting("mamba", M=0), "M=0"), (lambda r: r.Setting("mamba", tau=0), "tau=0"),
    (lambda r: r.Setting("mamba", K=1), "K=1"), (lambda r: r.Setting("mamba", d=0), "d=0"), (lambda r: r.Setting("gru"), "model='gru'"), (lambda r: r.Setting("mamba", tau=63), "L=64"),
    (lambda r: r.Setting("mamba", rate=0.0), "rate=0.0"), (lambda r: r.Setting("mamba", norm="batch"), "norm='batch'"), (lambda r: r.Setting("mamba", shortest=65), "shortest=65")])
def test_bad_arguments_are_named(recall, call, named):
    """An impossible model or setting is refused with the argument and its value."""
    with pytest.raises(ValueError, match=named):
        call(recall)


def test_the_23_configurations(recall):
    """The assignment's list: 10 in Problem 1, 9 in Problem 2, 4 in Problem 3, all at K 16 and L 64 and tested at every length."""
    got = {(group, s.model, s.d, s.M, s.tau) for group, settings in recall.EXPERIMENTS.items() if group.startswith("P") for s in settings}
    want = {(p, m, 8, 1, tau) for p, tau in (("P1a", 1), ("P1b", 5)) for m in NAMES}
    want |= {(p, m, 8, M, 1) for p, m in (("P2a", "mamba"), ("P2b", "rope"), ("P2c", "hybrid")) for M in (4, 8, 16)}
    want |= {("P3a", "mamba", 64, M, 1) for M in (4, 8, 16)} | {("P3b", "mamba", 64, 16, 10)}
    assert got == want and len(got) == 23
    reported = [s for group, settings in recall.EXPERIMENTS.items() if group.startswith("P") for s in settings]
    assert all((s.K, s.L, s.n, s.batch, s.norm) == (16, 64, 1000, 64, "layer") for s in reported)
    assert all(list(recall.test_lengths(s)) == list(range(s.tau + 2, 193)) for s in reported)
    searched = {s.seed for group in ("search", "check", "grid") for s in recall.EXPERIMENTS[group]}
    assert not searched & {s.seed for s in reported}


def test_a_stream_is_the_model(recall, generator, monkeypatch):
    """Part after part gives the logits of the whole; `evaluate` streams where a sequence of a model of Mamba layers is longer than its chunk."""
    model = recall.build_model("mamba")
    tokens, values = recall.sample_batch(5, 200, 16, 4, 1, generator)
    want = recall.PlainStep(model).logits(tokens)
    for part in (1, 64, 200):
        assert torch.allclose(inside.stream(model, tokens, part), want, atol=1e-5)
    right, used, stream = int((want.argmax(-1) == values).sum()), [], inside.stream
    monkeypatch.setattr(inside, "stream", lambda *a: used.append(1) or stream(*a))
    for name, chunk, streamed in (("mamba", 100, True), ("mamba", 1_000, False), ("hybrid", 100, False)):
        used.clear()
        net = model if name == "mamba" else recall.build_model(name)
        found = recall.evaluate(net, tokens, values, chunk)
        assert bool(used) == streamed and (name != "mamba" or found == right)


def test_powers_of_two(recall):
    """A setting with `powers` is tested at 2^6 .. 2^powers, by fewer sequences where they are long, each row with their number."""
    s = recall.Setting("mamba", powers=17)
    assert list(recall.test_lengths(s)) == [2**k for k in range(6, 18)] and [recall.sequences(s, n) for n in (64, 4096, 8192, 2**17)] == [1000, 1000, 512, 64]
    done = recall.run(replace(s, budget=2, longest=2, every=1, patience=1, n=3, powers=7))
    assert [(length, n) for length, _, n in done["accuracy"]] == [(64, 3), (128, 3)]
