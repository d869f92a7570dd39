"""The fused training step against plain PyTorch in float64: logits, loss and the gradient of every parameter; and what it must refuse."""

import contextlib
import ctypes
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from parity import relative
from torch import Tensor, nn

from cpu_mamba.step import AttentionSpec, FusedStep, MambaSpec, NormSpec, StepSpec, flatten_parameters, fused_step, misfit

KINDS = ("learned", "rope", "nope", "mamba", "hybrid")
K = 16


# A small model in plain PyTorch, straight from the description of a step

def rope(width):
    return lambda length: (torch.arange(length)[:, None] * 10_000.0 ** -(torch.arange(0, width, 2) / width)).repeat_interleave(2, 1)


def trained(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).requires_grad_()


def mamba(d, N=16, width=4):
    dim, R = 2 * d, -(-d // 16)
    A_log = (torch.arange(1.0, N + 1).log().repeat(dim, 1) + 0.1 * torch.randn(dim, N)).requires_grad_()
    return MambaSpec(A_log, trained(dim), trained(2 * dim, d, scale=d ** -0.5), trained(dim, 1, width, scale=0.5), trained(dim, scale=0.5),
                     trained(R + 2 * N, dim, scale=dim ** -0.5), trained(dim, R), (torch.randn(dim) - 3).requires_grad_(), trained(d, dim, scale=dim ** -0.5))


def describe(kind, d=8, rms=False, heads=2, seed=0):
    """A StepSpec with random tensors, every one of its own."""
    torch.manual_seed(seed)
    attention = lambda: AttentionSpec(trained(3 * d, d, scale=d ** -0.5), trained(d, d, scale=d ** -0.5), heads, rope(d // heads) if kind == "rope" else None)
    layers = {"mamba": (mamba, mamba), "hybrid": (mamba, lambda d: attention())}.get(kind, (lambda d: attention(),) * 2)
    norms = tuple(NormSpec((1 + 0.1 * torch.randn(d)).requires_grad_(), None if rms else trained(d, scale=0.1), 1e-5, rms) for _ in range(3))
    return StepSpec(F.normalize(torch.randn(K, d)), trained(70, d, scale=0.3) if kind == "learned" else None, norms, tuple(layer(d) for layer in layers),
                    trained(K, d, scale=d ** -0.5), trained(K, scale=0.1))


def mapped(spec, function):
    """The spec with every tensor replaced."""
    if isinstance(spec, Tensor):
        return function(spec)
    if isinstance(spec, tuple):
        parts = [mapped(part, function) for part in spec]
        return type(spec)(*parts) if hasattr(spec, "_fields") else tuple(parts)
    return spec


def tensors(spec):
    """All parameters of a spec."""
    found = []
    mapped(spec._replace(embedding=None), found.append)
    return found


def plain_norm(norm, x):
    y = F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) if norm.rms else F.layer_norm(x, x.shape[-1:], norm.weight, None, norm.eps)
    return y if norm.bias is None else y + norm.bias


def plain_mixer(m, x):
    if isinstance(m, AttentionSpec):
        q, k, v = (x @ m.qkv.T).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
        if m.angles:
            turn = torch.polar(torch.ones(()).double(), m.angles(x.shape[1])[:, ::2].double())
            q, k = (torch.view_as_real(torch.view_as_complex(t.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(x.dtype) for t in (q, k))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2) @ m.out.T
    (dim, N), R = m.A_log.shape, m.dt_proj.shape[1]
    u, z = (x @ m.in_proj.T).chunk(2, -1)
    u = F.silu(F.conv1d(u.transpose(1, 2), m.conv_weight, m.conv_bias, padding=m.conv_weight.shape[2] - 1, groups=dim)[..., : x.shape[1]]).transpose(1, 2)
    low, B, C = (u @ m.x_proj.T).split([R, N, N], -1)
    delta, A, h, ys = F.softplus(low @ m.dt_proj.T + m.dt_bias), -m.A_log.exp(), 0, []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + m.D * u[:, t])
    return (torch.stack(ys, 1) * F.silu(z)) @ m.out_proj.T


def plain_logits(spec, tokens):
    x = spec.embedding[tokens]
    x = x if spec.positions is None else x + spec.positions[: tokens.shape[1]]
    for norm, mixer in zip(spec.norms, spec.mixers):
        x = x + plain_mixer(mixer, plain_norm(norm, x))
    return F.linear(plain_norm(spec.norms[2], x[:, -1]), spec.head_weight, spec.head_bias)


def exactly(spec, tokens, values, dtype=torch.float64):
    """(logits, loss, gradients) by autograd."""
    exact = mapped(spec, lambda t: t.detach().clone().to(dtype).requires_grad_(t.requires_grad))
    logits = plain_logits(exact, tokens)
    loss = F.cross_entropy(logits, values)
    loss.backward()
    return logits.detach(), loss.detach(), [p.grad for p in tensors(exact)]


def batch(n, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(K, (n, length), generator=generator), torch.randint(K, (n,), generator=generator)


def assert_exact(spec, tokens, values, bound=1e-5):
    """Logits, loss and every gradient of the fused step within `bound` of float64 autograd; gives the step."""
    step = fused_step(spec)
    assert step is not None, misfit(spec)
    logits, loss, gradients = exactly(spec, tokens, values)
    assert relative(step.logits(tokens), logits) < bound
    found = step(tokens, values)
    assert found.shape == () and found.dtype == torch.float32 and abs(found.item() - loss.item()) < bound
    largest = max(float(g.abs().max()) for g in gradients)
    for p, g in zip(tensors(spec), gradients):
        assert float((p.grad.double() - g).abs().max()) < bound * max(float(g.abs().max()), 1e-3 * largest), tuple(p.shape)
    return step


class Holder(nn.Module):
    """A module with the parameters of a spec, which it then holds as `nn.Parameter`s."""

    def __init__(self, spec):
        super().__init__()
        self.held = nn.ParameterList()
        self.spec = mapped(spec, lambda t: self.hold(t) if t.requires_grad else t)

    def hold(self, t):
        self.held.append(nn.Parameter(t.detach().clone()))
        return self.held[-1]


# Right values

@pytest.mark.parametrize("length", [3, 16, 37, 64])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("kind, d, heads", [*((kind, 8, 2) for kind in KINDS), ("mamba", 64, 2), ("rope", 64, 2), ("hybrid", 64, 16)])
def test_step_equals_the_plain_model(kind, d, heads, rms, length):
    """Logits, loss and the gradient of every parameter against float64 autograd through the plain model."""
    assert_exact(describe(kind, d, rms, heads, seed=1), *batch(5, length, seed=length))


@pytest.mark.parametrize("kind, length", [("mamba", 2), ("nope", 2), ("mamba", 1100), ("nope", 300)])
def test_short_and_long(kind, length):
    """The shortest length, and more tokens than the scan keeps states for."""
    assert_exact(describe(kind), *batch(2, length))


@pytest.mark.parametrize("kind", ["mamba", "hybrid", "nope"])
def test_missing_biases(kind):
    """Norms, convolution and head without a bias: right values, alone and together, and no gradient for what is not there."""
    whole = describe(kind)
    without = dict(head=whole._replace(head_bias=None), norms=whole._replace(norms=tuple(n._replace(bias=None) for n in whole.norms)))
    if kind != "nope":
        without["convolution"] = whole._replace(mixers=tuple(m._replace(conv_bias=None) if isinstance(m, MambaSpec) else m for m in whole.mixers))
    without["all"] = whole._replace(head_bias=None, norms=without["norms"].norms, mixers=without.get("convolution", whole).mixers)
    for spec in without.values():
        assert_exact(spec, *batch(3, 20))


def test_mixed_norms_and_shapes():
    """A LayerNorm beside an RMSNorm, an eps of its own for each, layers that differ in their states, convolution and heads."""
    a, b, attention = describe("mamba"), describe("hybrid"), describe("rope")
    norms = tuple(n._replace(eps=eps, rms=rms) for n, eps, rms in zip(a.norms, (1e-3, 1e-6, 0.1), (True, False, True)))
    torch.manual_seed(3)
    assert_exact(a._replace(norms=norms, mixers=(mamba(8, N=5, width=3), mamba(8, N=16, width=2))), *batch(3, 40))
    one_head = AttentionSpec(trained(24, 8, scale=0.3), trained(8, 8, scale=0.3), 1)
    assert_exact(attention._replace(norms=norms, mixers=(one_head, attention.mixers[1])), *batch(3, 40))
    assert_exact(b._replace(mixers=(b.mixers[1], b.mixers[0])), *batch(3, 40))  # attention first, Mamba last


def test_a_training_run_agrees_with_the_plain_model():
    """Twenty steps of Adam by the fused step and by autograd end at the same parameters but for rounding."""
    for kind in ("rope", "mamba", "hybrid"):
        ends = []
        for fused in (True, False):
            model = Holder(describe(kind))
            flat = flatten_parameters(model)
            optimizer, step = torch.optim.Adam([flat], lr=1e-3), fused_step(model.spec)
            for k in range(20):
                tokens, values = batch(16, 24, seed=k)
                if fused:
                    step(tokens, values)
                else:
                    flat.grad.zero_()
                    F.cross_entropy(plain_logits(model.spec, tokens), values).backward()
                optimizer.step()
            ends.append(flat.detach().clone())
        assert float((ends[0] - ends[1]).abs().max()) < 2e-4


@pytest.mark.parametrize("kind", ["mamba", "learned"])
def test_no_finite_number_where_the_plain_model_has_none(kind):
    """NaN and infinities in any parameter or in the embedding come out in loss, logits and gradients wherever they do in plain PyTorch."""
    spec, (tokens, values) = describe(kind), batch(3, 40)
    step = fused_step(spec)
    for p in [spec.embedding, *tensors(spec)]:
        for bad in (math.nan, math.inf, -math.inf):
            with torch.no_grad():
                place = p.view(-1)[p.numel() // 3]
                before = place.clone()
                place.fill_(bad)
            logits, loss, gradients = exactly(spec, tokens, values, torch.float32)
            found = step(tokens, values)
            name = tuple(p.shape), bad
            assert not (torch.isfinite(step.logits(tokens)) & ~torch.isfinite(logits)).any(), name
            assert torch.isfinite(loss) or not torch.isfinite(found), name
            for q, g in zip(tensors(spec), gradients):
                assert torch.isfinite(g).all() or not torch.isfinite(q.grad).all(), (name, tuple(q.shape))
            with torch.no_grad():
                place.copy_(before)
    assert torch.isfinite(step(tokens, values))


# Threads and memory

@pytest.mark.parametrize("n", [1, 2, 13])
def test_threads_change_rounding_alone(n):
    """One, two and three threads agree within rounding, also with fewer sequences than threads, and a repeated call bit by bit."""
    spec, (tokens, values) = describe("mamba"), batch(n, 40)
    step, found = fused_step(spec), {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs = [[step(tokens, values), step.logits(tokens), *(p.grad.clone() for p in step.parameters)] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs))
        found[threads] = runs[0]
    for threads in (2, 3):
        assert all(relative(a, b) < 1e-5 for a, b in zip(found[threads], found[1]))


def test_memory_grows_with_the_length():
    """A step on 32,768 tokens takes about twice the memory of one on 16,384, and far less than length x length."""
    def peak(call):
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what the call takes
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # forget the peak so far
            megabytes = lambda name: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
            before = megabytes("VmRSS")
            call()
            return megabytes("VmHWM") - before
        except (OSError, StopIteration):
            pytest.skip("the system does not tell peak memory")
    for kind in ("mamba", "nope"):
        step, sizes = fused_step(describe(kind)), []
        step(*batch(1, 64))
        for length in (16_384, 32_768) if kind == "mamba" else (2_048, 4_096):
            given = batch(1, length)
            sizes.append(peak(lambda: step(*given)))
        assert sizes[1] < 2.5 * sizes[0] + 20 and sizes[1] < 500


# Where parameters lie

def test_scattered_parameters_give_the_same_bits():
    """Gathered from all over memory, transposed, or in place in one vector, in any order: the same loss and gradients."""
    spec, (tokens, values) = describe("hybrid"), batch(5, 30)
    loss = fused_step(spec)(tokens, values)
    wanted = [p.grad for p in tensors(spec)]
    order = [g for _, g in sorted(zip([p.data_ptr() for p in tensors(spec)], range(len(wanted))))]
    strided = mapped(spec, lambda t: t if t.dim() != 2 or not t.requires_grad else t.detach().T.clone().T.requires_grad_())
    model = Holder(spec)
    flatten_parameters(model)
    shuffled = mapped(spec, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
    parts = tensors(shuffled)
    memory, at = torch.cat([parts[k].detach().flatten() for k in order]), 0
    for k in order:
        parts[k].data, at = memory[at : at + parts[k].numel()].view_as(parts[k]), at + parts[k].numel()
    for other in (strided, model.spec, shuffled):
        step = fused_step(other)
        assert torch.equal(step(tokens, values), loss)
        assert all(torch.equal(p.grad, g) for p, g in zip(tensors(other), wanted))
        assert torch.equal(step(tokens, values), loss) and (step.flat is None) == (other is strided)
        assert all(torch.equal(p.grad, g) for p, g in zip(tensors(other), wanted))


def test_flat_parameters_are_used_in_place():
    """After flatten_parameters values, gradients and the optimiser's tensor are one memory; every step overwrites the gradient."""
    model = Holder(describe("mamba"))
    before = [p.detach().clone() for p in model.parameters()]
    flat = flatten_parameters(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)) and flat.is_leaf and flat.requires_grad
    assert torch.equal(flat.detach(), torch.cat([p.flatten() for p in before]))
    step, given = fused_step(model.spec), batch(4, 20)
    places = [p.grad.data_ptr() for p in model.parameters()]
    for _ in range(2):
        step(*given)
        assert torch.equal(flat.grad, torch.cat([p.grad.flatten() for p in model.parameters()])) and flat.grad.abs().sum() > 0
        assert places == [p.grad.data_ptr() for p in model.parameters()]
        first = flat.grad.clone()
    assert torch.equal(first, flat.grad)
    with torch.no_grad():
        flat.mul_(0.5)
    _, loss, _ = exactly(model.spec, *given)
    assert abs(step(*given).item() - loss.item()) < 1e-5


def test_gradients_of_every_kind_of_place():
    """None gets a gradient, a given one is overwritten where it is, and one that was taken away does not change afterwards."""
    spec, given = describe("nope"), batch(4, 20)
    step, other = fused_step(spec), batch(4, 20, seed=1)
    step(*given)
    taken = [p.grad for p in step.parameters]
    kept = [g.clone() for g in taken]
    for p in step.parameters:
        p.grad = None
    step(*other)
    assert all(torch.equal(a, b) for a, b in zip(taken, kept)) and not torch.equal(step.parameters[0].grad, kept[0])
    mine = torch.ones_like(step.parameters[0])
    step.parameters[0].grad = mine
    step(*given)
    assert step.parameters[0].grad is mine and all(torch.equal(p.grad, g) for p, g in zip(step.parameters, kept))


def test_parameters_moved_or_changed_after_building():
    """New memory, new values and new strides are followed; what no longer fits is an error, not a wrong number."""
    spec, given = describe("hybrid"), batch(4, 20)
    step = fused_step(spec)
    step(*given)
    with torch.no_grad():
        spec.head_weight.data = spec.head_weight.detach() * 2
        spec.mixers[1].out.data = spec.mixers[1].out.data.t()  # the same memory, read otherwise
        spec.mixers[0].A_log.add_(0.3)
        spec.embedding.mul_(1.5)
    _, loss, gradients = exactly(spec, *given)
    assert abs(step(*given).item() - loss.item()) < 1e-5
    assert all(relative(p.grad, g) < 1e-4 for p, g in zip(tensors(spec), gradients))
    for change, back in ((lambda p: p.requires_grad_(False), lambda p: p.requires_grad_(True)),
                         (lambda p: setattr(p, "data", p.data.double()), lambda p: setattr(p, "data", p.data.float()))):
        change(spec.head_weight)
        with pytest.raises(ValueError, match="no longer fits.*head_weight"):
            step(*given)
        back(spec.head_weight)
        step(*given)
    hook = spec.head_bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="no longer fits.*head_bias"):
        step(*given)
    hook.remove()


def test_gradient_modes():
    """The step sets gradients under no_grad and inference_mode too, and they can be changed outside."""
    for mode in (torch.no_grad, torch.inference_mode):
        spec, given = describe("nope"), batch(4, 20)
        step = fused_step(spec)
        with mode():
            loss = step(*given)
        _, wanted, gradients = exactly(spec, *given)
        assert not loss.requires_grad and abs(loss.item() - wanted.item()) < 1e-5
        for p, g in zip(tensors(spec), gradients):
            assert relative(p.grad.mul_(1.0), g) < 1e-4


# What is refused

def frozen(t):
    return t.detach().clone()


def hooked(t):
    t = t.detach().clone().requires_grad_()
    t.register_hook(lambda g: 2 * g)
    return t


class Subclass(nn.Parameter):
    pass


@pytest.mark.parametrize("name, change", [
    ("float64", lambda s: mapped(s, lambda t: t.detach().double().requires_grad_(t.requires_grad))),
    ("half precision", lambda s: mapped(s, lambda t: t.detach().bfloat16().requires_grad_(t.requires_grad))),
    ("one in float64", lambda s: s._replace(head_weight=trained(K, 8).detach().double().requires_grad_())),
    ("frozen", lambda s: s._replace(head_weight=frozen(s.head_weight))),
    ("trained embedding", lambda s: s._replace(embedding=trained(K, 8))),
    ("no leaf", lambda s: s._replace(head_weight=s.head_weight * 1)),
    ("hook", lambda s: s._replace(head_weight=hooked(s.head_weight))),
    ("subclass", lambda s: s._replace(head_weight=Subclass(s.head_weight.detach()))),
    ("another device", lambda s: s._replace(head_weight=torch.empty(K, 8, device="meta", requires_grad=True))),
    ("shared layer", lambda s: s._replace(mixers=(s.mixers[0], s.mixers[0]))),
    ("shared norm", lambda s: s._replace(norms=(s.norms[0], s.norms[0], s.norms[2]))),
    ("views that overlap", lambda s: s._replace(norms=(s.norms[0]._replace(bias=s.norms[0].weight.detach()[:].requires_grad_()), *s.norms[1:]))),
    ("tied head", lambda s: s._replace(head_weight=s.embedding.view(K, 8).detach().requires_grad_())),
    ("expanded", lambda s: s._replace(head_bias=torch.zeros(1).expand(K).requires_grad_())),
    ("norm without a weight", lambda s: s._replace(norms=(s.norms[0]._replace(weight=None), *s.norms[1:]))),
    ("shape", lambda s: s._replace(head_weight=trained(K, 9))),
    ("a third layer", lambda s: s._replace(mixers=(*s.mixers, mamba(8)))),
    ("another layer", lambda s: s._replace(mixers=(nn.Linear(8, 8), s.mixers[1]))),
    ("no layer", lambda s: s._replace(mixers=(None, s.mixers[1]))),
    ("positions before Mamba", lambda s: s._replace(positions=trained(70, 8))),
    ("shapes of a layer", lambda s: s._replace(mixers=(s.mixers[0]._replace(D=trained(8)), s.mixers[1]))),
    ("narrow d_inner", lambda s: describe("mamba", d=4)),
    ("heads", lambda s: s._replace(mixers=(s.mixers[0], s.mixers[1]._replace(heads=3)))),
    ("no heads", lambda s: s._replace(mixers=(s.mixers[0], s.mixers[1]._replace(heads=0)))),
    ("odd head width", lambda s: s._replace(mixers=(s.mixers[0], s.mixers[1]._replace(heads=8, angles=lambda n: torch.zeros(n, 1))))),
    ("angles", lambda s: s._replace(mixers=(s.mixers[0], s.mixers[1]._replace(angles=lambda n: torch.zeros(n, 2))))),
    ("trained angles", lambda s: s._replace(mixers=(s.mixers[0], s.mixers[1]._replace(angles=lambda n: trained(n, 4))))),
])
def test_other_models_are_left_to_the_plain_path(name, change):
    """What the kernels cannot represent gives None, and a reason."""
    spec = change(describe("hybrid"))
    assert fused_step(spec) is None and isinstance(misfit(spec), str)


def test_without_numba(monkeypatch):
    """Without Numba there is no fused step."""
    monkeypatch.setattr("cpu_mamba.step.available", lambda: False)
    assert fused_step(describe("mamba")) is None


@pytest.mark.parametrize("error, named, tokens, values", [
    (ValueError, "length=71.*70", torch.zeros(2, 71, dtype=torch.int64), None),
    (ValueError, "length=1", torch.zeros(2, 1, dtype=torch.int64), None),
    (ValueError, "tokens from 0 to 16", torch.tensor([[0, 16, 0]]), None),
    (ValueError, "tokens from -1 to 0", torch.tensor([[0, -1, 0]]), None),
    (ValueError, "tokens of shape", torch.zeros(0, 5, dtype=torch.int64), None),
    (ValueError, "tokens of shape", torch.zeros(5, dtype=torch.int64), None),
    (TypeError, "tokens of torch.int32", torch.zeros(2, 5, dtype=torch.int32), None),
    (TypeError, "tokens of torch.float32", torch.zeros(2, 5), None),
    (TypeError, "tokens of .*list", [[1, 2, 3]], None),
    (ValueError, "values from 0 to 16", torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 16])),
    (ValueError, "values of shape", torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1, 2])),
    (TypeError, "values of torch.float32", torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2))])
def test_bad_arguments_are_named(error, named, tokens, values):
    """What PyTorch's own lookups would refuse, the kernel refuses too, and leaves the gradients alone."""
    step = fused_step(describe("learned"))
    for call in [lambda: step(tokens, torch.zeros(2, dtype=torch.int64) if values is None else values)] + [lambda: step.logits(tokens)] * (values is None):
        with pytest.raises(error, match=named):
            call()
    assert all(p.grad is None for p in step.parameters)


def test_strided_tokens():
    """Tokens and values that are views of something larger."""
    spec, (tokens, values) = describe("mamba"), batch(6, 40)
    step = fused_step(spec)
    assert torch.equal(step(tokens[::2, ::2], values[::2]), step(tokens[::2, ::2].clone(), values[::2].clone()))
    assert torch.equal(step.logits(tokens[:, :1].expand(6, 40)), step.logits(tokens[:, :1].repeat(1, 40)))


def test_flatten_parameters_refuses():
    """Shared parameters, several dtypes and none at all are refused; frozen ones stay where they are."""
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="share memory"):
        flatten_parameters(shared)
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="share memory"):
        flatten_parameters(nn.Sequential(layer, layer))
    with pytest.raises(ValueError, match="one dtype"):
        flatten_parameters(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()))
    with pytest.raises(ValueError, match="one dtype"):
        flatten_parameters(nn.ReLU())
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    place = model[0].weight.requires_grad_(False).data_ptr()
    assert flatten_parameters(model).shape == (3 + 6 + 2,) and model[0].weight.data_ptr() == place and model[0].weight.grad is None


def test_norms_of_pytorch_and_layers_of_mamba():
    """`of` describes PyTorch's norms and this package's Mamba; a bias that there is no place for gives None."""
    from cpu_mamba import Mamba
    assert NormSpec.of(nn.LayerNorm(8))[2:] == (1e-5, False) and NormSpec.of(nn.LayerNorm(8, bias=False)).bias is None
    assert NormSpec.of(nn.RMSNorm(8))[1:] == (None, torch.finfo(torch.float32).eps, True) and NormSpec.of(nn.RMSNorm(8, eps=0.5)).eps == 0.5
    layers = nn.ModuleList([Mamba(8), Mamba(8)])
    spec = describe("mamba")._replace(mixers=tuple(map(MambaSpec.of, layers)))
    assert isinstance(fused_step(spec), FusedStep)
    tokens, values = batch(3, 20)
    _, loss, _ = exactly(spec, tokens, values)
    x = spec.embedding[tokens]
    for norm, layer in zip(spec.norms, layers):
        x = x + layer(plain_norm(norm, x))
    whole = F.cross_entropy(F.linear(plain_norm(spec.norms[2], x[:, -1]), spec.head_weight, spec.head_bias), values)
    assert abs(whole.item() - loss.item()) < 1e-5 and abs(fused_step(spec)(tokens, values).item() - loss.item()) < 1e-5
    assert MambaSpec.of(Mamba(8, bias=True)) is None and isinstance(MambaSpec.of(Mamba(8, conv_bias=False)), MambaSpec)
