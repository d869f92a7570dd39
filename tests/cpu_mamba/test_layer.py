"""The Mamba block: against itself in float64, transformers' block, and every way in which its submodules may be changed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parity import assert_spoiled_alike, relative
from torch import nn
from torch.func import functional_call

from cpu_mamba import Mamba, selective_scan_ref


FUSED = ["conv_tasks", "forward_tasks", "backward_tasks", "conv_backward_tasks"]


def made(d=8, **options):
    """A layer whose parameters have all been moved away from their initial pattern, and an input."""
    layer = Mamba(d, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, torch.randn(3, 20, d)


def plain(layer):
    """The same in float64, where no kernel is."""
    return copy.deepcopy(layer).double()


def run(layer, x, last=False):
    """(output, {name: gradient}) with the gradient of x among them."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, last=last)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)).sum().backward()
    return y, {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_equal(layer, other, x, bound=1e-5, last=False):
    """Output and every gradient of `layer` within `bound` of those of `other`, which takes float64."""
    (y, gradients), (want, wanted) = run(layer, x, last), run(other, x.double(), last)
    assert y.shape == want.shape and relative(y, want) < bound
    assert gradients.keys() == wanted.keys()
    for name in gradients:
        assert relative(gradients[name], wanted[name]) < 2 * bound, name


@pytest.mark.parametrize("d, length, last", [(8, 64, False), (8, 64, True), (64, 64, False), (64, 33, True), (5, 17, False), (5, 17, True), (8, 1, True),
                                             (8, 2, False)])
def test_fused_block_equals_the_plain_one(calls, d, length, last):
    """The hand-written gradient of the whole Mamba block against autograd through the recurrence in float64."""
    layer, x = Mamba(d), torch.randn(3, length, d)
    assert_equal(layer, plain(layer), x, last=last)
    assert calls == FUSED


@pytest.mark.parametrize("options", [dict(d_state=5), dict(d_conv=2), dict(expand=3), dict(expand=1.5), dict(dt_rank=6), dict(conv_bias=False), dict(bias=True),
                                     dict(d_state=1, d_conv=1, expand=1)])
def test_every_option(calls, options):
    layer, x = made(8, **options)
    assert_equal(layer, plain(layer), x)
    assert calls == FUSED


def test_last_is_the_last_row():
    layer, x = made()
    assert torch.allclose(layer(x, last=True), layer(x)[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [8, 64])
def test_mamba_equals_transformers(d):
    """The block against transformers' MambaMixer with the same weights, values and gradients."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer
    config = transformers.MambaConfig(hidden_size=d, state_size=16, conv_kernel=4, expand=2, time_step_rank=math.ceil(d / 16), use_conv_bias=True,
                                      use_bias=False)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(d)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40, d)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = ours(a), theirs(b)
    assert relative(y, want) < 2e-5
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    assert relative(a.grad, b.grad) < 2e-5
    for (name, p), q in zip(ours.named_parameters(), (dict(theirs.named_parameters())[n] for n, _ in ours.named_parameters())):
        assert relative(p.grad, q.grad) < 5e-5, name


# Parameters

def test_official_parameters():
    """Names, shapes and initial ranges of mamba_ssm.Mamba."""
    shapes = {k: tuple(v.shape) for k, v in Mamba(64).state_dict().items()}
    assert shapes == {"A_log": (128, 16), "D": (128,), "in_proj.weight": (256, 64), "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,),
                      "x_proj.weight": (36, 128), "dt_proj.weight": (128, 4), "dt_proj.bias": (128,), "out_proj.weight": (64, 128)}
    layer = Mamba(64)
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16)) and (layer.D == 1).all()
    steps = F.softplus(layer.dt_proj.bias)
    assert (steps > 0.99e-3).all() and (steps < 0.101).all()
    assert layer.A_log._no_weight_decay and layer.D._no_weight_decay and layer.dt_proj.bias._no_reinit
    assert (Mamba(64, dt_init="constant", dt_scale=3.0).dt_proj.weight == 1.5).all()
    steps = F.softplus(Mamba(64, dt_min=0.2, dt_max=0.5).dt_proj.bias)
    assert (steps > 0.199).all() and (steps < 0.501).all()


@pytest.mark.parametrize("d", [5, 8, 64])
def test_initial_parameters_come_from_the_seed(d):
    """Drawn in this order and no other, since trained runs are opened again from their seeds: all four projections, W_dt, step sizes."""
    torch.manual_seed(11)
    layer, after = Mamba(d), torch.random.get_rng_state()
    torch.manual_seed(11)
    R = math.ceil(d / 16)
    in_proj, conv1d = nn.Linear(d, 4 * d, bias=False), nn.Conv1d(2 * d, 2 * d, 4, groups=2 * d)
    x_proj, dt_proj = nn.Linear(2 * d, R + 32, bias=False), nn.Linear(R, 2 * d)
    out_proj = nn.Linear(2 * d, d, bias=False)
    W_dt = torch.empty(2 * d, R).uniform_(-R**-0.5, R**-0.5)
    dt = torch.exp(torch.rand(2 * d) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    wanted = {"A_log": torch.log(torch.arange(1.0, 17)).repeat(2 * d, 1), "D": torch.ones(2 * d), "in_proj.weight": in_proj.weight,
              "conv1d.weight": conv1d.weight, "conv1d.bias": conv1d.bias, "x_proj.weight": x_proj.weight, "dt_proj.weight": W_dt,
              "dt_proj.bias": dt + torch.log(-torch.expm1(-dt)), "out_proj.weight": out_proj.weight}
    assert torch.equal(after, torch.random.get_rng_state()) and list(layer.state_dict()) == list(wanted)
    assert all(torch.equal(v, wanted[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("options, words", [(dict(d_state=0), "d_state=0"), (dict(d_conv=1.5), "d_conv=1.5"), (dict(dt_rank=0), "dt_rank=0"),
                                            (dict(expand=0.3), "d_inner=2.4.*expand=0.3"), (dict(dt_rank="all"), "dt_rank=all"),
                                            (dict(dt_init="zeros"), "dt_init='zeros'")])
def test_sizes_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba(8, **options)


@pytest.mark.parametrize("shape", [(20, 8), (3, 0, 8)])
def test_inputs_are_checked(shape):
    with pytest.raises(ValueError, match=r"x of shape .*\(batch, length, d_model=8\)"):
        Mamba(8)(torch.zeros(shape))


# Dtypes and numbers that are none

@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(calls, dtype, bound):
    """A layer in half precision, made so or turned so, against float64 from the same rounded parameters."""
    for layer in (made()[0].to(dtype), Mamba(8, dtype=dtype)):
        x = torch.randn(3, 20, 8).to(dtype)
        y, gradients = run(layer, x)
        want, wanted = run(plain(layer), x.double())
        assert y.dtype == dtype and relative(y, want) < bound
        assert all(relative(gradients[name], wanted[name]) < 3 * bound for name in gradients)
    assert Mamba(8, dtype=dtype).A_log.dtype == torch.float32 and calls == 2 * FUSED


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_autocast(calls, dtype, bound):
    """Within torch.autocast the outer projections are in half precision, the rest is not."""
    layer, x = made()
    want, wanted = run(plain(layer), x.double())
    with torch.autocast("cpu", dtype):
        y, gradients = run(layer, x)
    assert relative(y, want) < bound and all(relative(gradients[name], wanted[name]) < 3 * bound for name in gradients)
    assert calls == FUSED


def test_nan_and_infinity_come_out(calls):
    """Planted in each parameter and in the input: no finite number where the plain layer has none, gradients too."""
    layer, x = made()
    names = [name for name, _ in layer.named_parameters()]

    class ByHand(Mamba):
        def forward(self, x):
            return by_hand(self, x)
    other = ByHand(8)

    def call(module):
        return lambda x, **parameters: functional_call(module, dict(zip(names, parameters.values())), (x,))
    arguments = dict(x=x, **{name.replace(".", "_"): p.detach() for name, p in layer.named_parameters()})
    assert_spoiled_alike(call(layer), call(other), arguments)
    assert calls
    with torch.no_grad():
        layer.A_log.fill_(float("nan"))
    assert torch.isnan(layer(x)).all() and torch.isnan(layer(x, last=True)).all()


# Submodules that are not as made

class LoRA(nn.Module):
    """A frozen projection plus one of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base.requires_grad_(False), nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(module, inputs, output):
    return 2 * output


def with_bias(module):
    module.bias = nn.Parameter(torch.randn(module.out_features))
    return module


def replaced(name, make):
    return lambda layer: setattr(layer, name, make(getattr(layer, name)))


def loaded(kind, module):
    other = kind(module.in_features, module.out_features, bias=module.bias is not None)
    other.load_state_dict(module.state_dict())
    return other


def without_dt_bias(layer):
    layer.dt_proj.bias = None


def dilated(layer):
    layer.conv1d.dilation, layer.conv1d.padding = (2,), (6,)


# A change to a layer, the same change written out on a plain recurrence (parts with the change in place), whether the kernels may still be used
CHANGES = {
    "LoRA on x_proj": replaced("x_proj", LoRA), "LoRA on dt_proj": replaced("dt_proj", LoRA), "a subclass": replaced("x_proj", lambda m: loaded(Doubled, m)),
    "a bias of x_proj": replaced("x_proj", with_bias), "no bias of dt_proj": without_dt_bias, "dilation": dilated,
    "a hook on x_proj": lambda layer: layer.x_proj.register_forward_hook(doubled), "a hook on conv1d": lambda layer: layer.conv1d.register_forward_hook(doubled),
    "a hook on dt_proj": lambda layer: layer.dt_proj.register_forward_hook(doubled),
    "a pre-hook": lambda layer: layer.x_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "a backward hook": lambda layer: layer.x_proj.register_full_backward_hook(lambda module, given, got: (2 * given[0],)),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer.x_proj),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer.dt_proj).eval(),
    "forward replaced": lambda layer: setattr(layer.x_proj, "forward", lambda x: F.linear(x, 2 * layer.x_proj.weight)),
    "identity for in_proj": lambda layer: setattr(layer, "in_proj", nn.Sequential(layer.in_proj, nn.Identity())),
}
KEPT = ("identity for in_proj",)


def by_hand(layer, x):
    """The block from its submodules, called one by one (Mamba paper, Figure 3)."""
    x, z = layer.in_proj(x).transpose(1, 2).chunk(2, 1)
    u = F.silu(layer.conv1d(x)[..., : x.shape[2]])
    low, B, C = layer.x_proj(u.transpose(1, 2)).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    delta = F.softplus(layer.dt_proj(low)).transpose(1, 2)
    y = selective_scan_ref(u, delta, -torch.exp(layer.A_log), B.transpose(1, 2), C.transpose(1, 2), layer.D, z)
    return layer.out_proj(y.transpose(1, 2))


@pytest.mark.parametrize("name", CHANGES)
def test_changed_submodules(calls, name):
    """Whatever is done to a submodule acts on output and gradients, as it does in the block called piece by piece; and it does act."""
    layer, x = made()
    unchanged = layer(x)
    CHANGES[name](layer)
    calls.clear()
    y, gradients = run(layer, x)
    used = list(calls)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    got = by_hand(layer, leaf)
    (got.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)).sum().backward()
    wanted = {"x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert relative(y, got) < 1e-5
    for key, gradient in gradients.items():
        assert (gradient is None) == (wanted[key] is None) and (gradient is None or relative(gradient, wanted[key]) < 2e-5), key
    assert used == (FUSED if name in KEPT else FUSED[1:3])  # the scan alone is still what it was
    assert name in ("a backward hook", "weight norm", *KEPT) or relative(y, unchanged) > 1e-4  # ten times what is asked above


def test_global_hooks(calls):
    """A global hook acts as it does on the submodules called one by one."""
    layer, x = made()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output if module is layer.x_proj else None)
    try:
        assert relative(layer(x), by_hand(layer, x)) < 1e-5 and calls == FUSED[1:2]
    finally:
        handle.remove()
    assert relative(layer(x), by_hand(layer, x)) < 1e-5 and calls[1:] == FUSED[:2]


def test_shared_and_tied_parameters():
    """One layer used twice, and one x_proj in two layers: gradients add up."""
    (layer, x), (other, _) = made(), made()
    other.x_proj.weight = layer.x_proj.weight
    stack = nn.ModuleList([layer, other])
    twin = plain(stack)
    assert twin[0].x_proj.weight is twin[1].x_proj.weight
    for net in (stack, twin):
        v = x.to(net[0].D.dtype)
        net[1](net[0](net[0](v))).square().sum().backward()
    for (name, p), q in zip(stack.named_parameters(), twin.parameters()):
        assert relative(p.grad, q.grad) < 5e-5, name


@pytest.mark.parametrize("name", [name for name, _ in Mamba(8).named_parameters()])
def test_frozen_parameters(calls, name):
    """One parameter frozen, and all but one: no gradient for the frozen, the same bits for the others."""
    layer, x = made()
    _, wanted = run(layer, x)
    for frozen in ([name], [other for other, _ in layer.named_parameters() if other != name]):
        other = copy.deepcopy(layer)
        for parameter in frozen:
            other.get_parameter(parameter).requires_grad_(False)
        _, gradients = run(other, x)
        assert all(gradients[k] is None if k in frozen else torch.equal(gradients[k], wanted[k]) for k in gradients)


@pytest.mark.parametrize("name", [name for name, _ in Mamba(8).named_parameters()])
def test_a_parameter_changed_before_backward(name):
    """Autograd's own error, or the gradient at the parameters of the forward pass where that does not need the changed one."""
    layer, x = made()
    _, wanted = run(layer, x)
    layer.zero_grad()
    y = layer(x)
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    total = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)).sum()
    if name in ("A_log", "in_proj.weight"):  # exp keeps its result; x asks for no gradient
        total.backward()
        assert all(torch.equal(p.grad, wanted[k]) for k, p in layer.named_parameters())
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


# Derivatives and tracers

def test_hessian(calls):
    """The Hessian of a loss in the input, and in a parameter, of float32 against float64."""
    layer, x = Mamba(8), torch.randn(1, 5, 8)
    twin = plain(layer)
    for net_hessian in (torch.autograd.functional.hessian, lambda f, v: torch.func.hessian(f)(v)):
        got, want = (net_hessian(lambda v: net(v).square().sum(), x.to(net.D.dtype)) for net in (layer, twin))
        assert relative(got, want) < 1e-4 and (want != 0).any()
    loss = lambda net: lambda A_log: functional_call(net, dict(A_log=A_log), (x.to(net.D.dtype),)).square().sum()
    got, want = (torch.func.hessian(loss(net))(net.A_log.detach()) for net in (layer, twin))
    assert relative(got, want) < 1e-4


def test_gradient_penalty():
    """The gradient of a squared gradient, for every parameter."""
    layer, x = made()
    twin, results = plain(layer), []
    for net in (layer, twin):
        v = x.to(net.D.dtype).requires_grad_()
        g, = torch.autograd.grad(net(v).square().sum(), v, create_graph=True)
        g.square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert all(relative(a, b) < 1e-4 for a, b in zip(*results))


def test_tracers():
    """torch.jit.trace, torch.export and torch.compile (without its code generator) give what the layer does, for another input too."""
    layer, x = made()
    other = torch.randn_like(x)
    want = layer(other)
    torch._dynamo.reset()
    for traced in (torch.jit.trace(layer, x, check_trace=False), torch.export.export(layer, (x,)).module(), torch.compile(layer, backend="eager", fullgraph=True)):
        traced(x)
        assert relative(traced(other), want) < 1e-5


def test_meta_and_copies():
    """On the meta device shapes come out; a copy and a reloaded state are the same layer."""
    assert Mamba(8, device="meta")(torch.empty(2, 5, 8, device="meta")).shape == (2, 5, 8)
    layer, x = made()
    other = Mamba(8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    with torch.inference_mode():
        assert torch.equal(layer(x), other(x))


# What the scan gets, and one token at a time

def test_parts(calls):
    """`parts` are the paper's: the scan of them, gated and projected, is the layer."""
    layer, x = made()
    u, delta, A, B, C, z = layer.parts(x)
    assert A.shape == (16, 16) and all(part.shape == (3, 16, 20) for part in (u, delta, B, C, z))
    assert (delta > 0).all() and (A < 0).all()
    y = selective_scan_ref(u, delta, A, B, C, layer.D, z)
    assert relative(layer.out_proj(y.transpose(1, 2)), layer(x)) < 1e-5


@pytest.mark.parametrize("options", [{}, dict(conv_bias=False, bias=True), dict(d_conv=1), dict(d_conv=2, d_state=5)])
def test_step(options):
    """Token by token with states kept in place: what the layer says of the whole sequence."""
    layer, x = made(8, **options)
    states = layer.allocate_inference_cache(3)
    with torch.no_grad():
        outputs = []
        for t in range(x.shape[1]):
            y, *after = layer.step(x[:, t : t + 1], *states)
            assert all(a is b for a, b in zip(after, states))
            outputs.append(y)
    assert relative(torch.cat(outputs, 1), layer(x)) < 1e-5
    with pytest.raises(ValueError, match="one token"):
        layer.step(x, *states)
