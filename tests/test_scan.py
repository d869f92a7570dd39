"""The fused scan against the paper's recurrence, and the Mamba block against an independent implementation."""

import math
import re

import pytest
import torch
import torch.nn.functional as F


def relative(a, b):
    """Largest difference in units of the largest reference value."""
    return float(((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).detach())


def inputs(batch, dim, length, N, seed, extreme=False):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    delta = 10 ** (torch.rand(batch, dim, length, generator=g) * 7.7 - 6) if extreme else r(batch, dim, length)
    A = -torch.rand(dim, N, generator=g) * 64 if extreme else -torch.arange(1.0, N + 1).repeat(dim, 1) * (0.5 + torch.rand(dim, 1, generator=g))
    return dict(u=r(batch, dim, length), delta=delta, A=A, B=r(batch, N, length), C=r(batch, N, length), D=r(dim), z=r(batch, dim, length), delta_bias=r(dim) - 2)


def values_and_gradients(recall, arguments, flags):
    arguments = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
    y = recall.selective_scan(**arguments, **flags)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    return y, {k: v.grad for k, v in arguments.items()}


def assert_as_the_recurrence(recall, arguments, **flags):
    """Values and every gradient are finite and within 1e-5 of the float64 recurrence, and come from the fused kernel."""
    y, gradients = values_and_gradients(recall, arguments, flags)
    want, wanted = values_and_gradients(recall, {k: v.double() for k, v in arguments.items()}, flags)
    assert y.dtype == torch.float32 and "FusedScan" in y.grad_fn.next_functions[0][0].name()
    assert torch.isfinite(y).all() and relative(y, want) < 1e-5
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all() and relative(gradient, wanted[name]) < 1e-5, name


CASES = [(2, 16, length, 16, True) for length in (1, 2, 3, 5, 31, 64, 127, 200)] + [
    (3, 5, 40, 1, True), (1, 7, 33, 4, True), (2, 12, 50, 5, False), (2, 24, 64, 8, True), (1, 128, 64, 16, True), (2, 8, 20, 32, False), (1, 4, 1000, 16, True)]


@pytest.mark.parametrize("batch, dim, length, N, softplus", CASES)
def test_scan_equals_the_recurrence(recall, batch, dim, length, N, softplus):
    """Values and every gradient within 1e-5 of the float64 recurrence."""
    arguments = inputs(batch, dim, length, N, seed=length + N)
    if not softplus:
        arguments["delta"] = arguments["delta"].abs()
        del arguments["delta_bias"]
    assert_as_the_recurrence(recall, arguments, delta_softplus=softplus)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("D", "z"), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_arguments(recall, absent):
    """Skip, gate and bias may be left out, each alone and together."""
    assert_as_the_recurrence(recall, {k: v for k, v in inputs(2, 16, 20, 16, 1).items() if k not in absent}, delta_softplus=True)


@pytest.mark.parametrize("length", [4, 64, 300])
def test_extreme_steps_and_decays(recall, length):
    """delta from 1e-6 to 50 and A down to -64: no NaN or infinity, and still within 1e-5."""
    assert_as_the_recurrence(recall, {k: v for k, v in inputs(2, 16, length, 16, length, extreme=True).items() if k != "delta_bias"})


@pytest.mark.parametrize("name", ["A", "delta"])
def test_a_state_that_grows(recall, name):
    """Exponents above 0, which no Mamba has, are as right, and overflow where the recurrence does."""
    arguments = inputs(2, 16, 30, 4, 7) | dict(D=None, z=None, delta_bias=None)
    arguments["delta"] = arguments["delta"].abs()
    arguments[name] = -arguments[name] / 10
    y = recall.selective_scan(**arguments)
    assert relative(y, recall.selective_scan(**{k: v if v is None else v.double() for k, v in arguments.items()})) < 1e-5
    assert not torch.isfinite(recall.selective_scan(**arguments | {name: 1_000 * arguments[name]})).all()


def test_extreme_gates(recall):
    """A gate far from 0 on either side is 0 or passes all, and its gradient is finite."""
    arguments = inputs(2, 16, 20, 16, 5)
    arguments["z"] = torch.linspace(-300, 300, arguments["z"].numel()).view_as(arguments["z"])
    assert_as_the_recurrence(recall, arguments, delta_softplus=True)


def test_gradient_against_finite_differences(recall):
    """The reference that the kernel is held to has itself the gradient that float64 finite differences give."""
    arguments = [v.double().requires_grad_() for v in inputs(1, 2, 5, 3, 0).values()]
    assert torch.autograd.gradcheck(lambda *a: recall.selective_scan(*a, delta_softplus=True), arguments, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 5])
def test_threads_do_not_change_the_result(recall, batch):
    """One, two or three threads, also with fewer sequences than threads: the same bits, since every sum over the batch has a fixed order."""
    arguments, results, before = inputs(batch, 16, 64, 16, 3), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, gradients = values_and_gradients(recall, arguments, dict(delta_softplus=True))
            results.append([y, *gradients.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name, shape", [("delta", (2, 16, 9)), ("B", (2, 15, 10)), ("D", (15,)), ("z", (2, 16)), ("delta_bias", (1,))])
def test_shapes_are_checked(recall, name, shape):
    """A tensor of the wrong shape is named, with its shape and the one that is needed."""
    arguments = inputs(2, 16, 10, 16, 0) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name} of shape .*{re.escape(str(tuple(inputs(2, 16, 10, 16, 0)[name].shape)))} is needed"):
        recall.selective_scan(**arguments)


@pytest.mark.parametrize("name", ["delta", "A", "B", "D", "z", "delta_bias"])
def test_dtypes_are_checked(recall, name):
    """A tensor of another dtype than u is named with its own and the one that is needed."""
    arguments = inputs(2, 16, 10, 16, 0)
    with pytest.raises(ValueError, match=f"{name} of dtype torch.float64: that of u, torch.float32"):
        recall.selective_scan(**arguments | {name: arguments[name].double()})


def double_of(module, make):
    other = make().double()
    other.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    return other


@pytest.mark.parametrize("d, length, last", [(8, 64, False), (8, 64, True), (64, 64, False), (64, 33, True), (5, 17, False), (5, 17, True), (8, 1, True)])
def test_fused_block_equals_the_plain_one(recall, d, length, last):
    """The hand-written gradient of the whole Mamba block against autograd through the recurrence in float64."""
    torch.manual_seed(d + length)
    block = recall.Mamba(d)
    plain = double_of(block, lambda: recall.Mamba(d))
    x = torch.randn(3, length, d)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = block(a, last=last), plain(b, last=last)
    assert y.shape == (3, 1 if last else length, d)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (want * weights.double()).sum().backward()
    assert relative(y, want) < 1e-5 and relative(a.grad, b.grad) < 1e-5
    for (name, p), q in zip(block.named_parameters(), plain.parameters()):
        assert relative(p.grad, q.grad) < 2e-5, name


def test_last_is_the_last_row(recall):
    """last=True gives the last row of the full output."""
    torch.manual_seed(0)
    block, x = recall.Mamba(8), torch.randn(4, 50, 8)
    assert torch.allclose(block(x, last=True), block(x)[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [8, 64])
def test_mamba_equals_transformers(recall, d):
    """The block against transformers' MambaMixer with the same weights, values and gradients."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer
    torch.manual_seed(1)
    config = transformers.MambaConfig(hidden_size=d, state_size=16, conv_kernel=4, expand=2, time_step_rank=math.ceil(d / 16),
                                      use_conv_bias=True, use_bias=False)
    theirs, ours = MambaMixer(config, layer_idx=0), recall.Mamba(d)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40, d)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = ours(a), theirs(b)
    assert relative(y, want.double()) < 2e-5
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    assert relative(a.grad, b.grad.double()) < 2e-5
    for (name, p), q in zip(ours.named_parameters(), (dict(theirs.named_parameters())[n] for n, _ in ours.named_parameters())):
        assert relative(p.grad, q.grad.double()) < 5e-5, name


def test_mamba_has_the_official_parameters(recall):
    """Names, shapes and initial ranges of mamba_ssm.Mamba."""
    shapes = {k: tuple(v.shape) for k, v in recall.Mamba(64).state_dict().items()}
    assert shapes == {"A_log": (128, 16), "D": (128,), "in_proj.weight": (256, 64), "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,),
                      "x_proj.weight": (36, 128), "dt_proj.weight": (128, 4), "dt_proj.bias": (128,), "out_proj.weight": (64, 128)}
    block = recall.Mamba(64)
    assert torch.allclose(block.A_log.exp(), torch.arange(1.0, 17).expand(128, 16)) and (block.D == 1).all()
    steps = F.softplus(block.dt_proj.bias)
    assert (steps > 0.99e-3).all() and (steps < 0.101).all()
    with pytest.raises(ValueError, match="d_state=0"):
        recall.Mamba(8, d_state=0)


def test_choice_of_backend(recall, monkeypatch, capsys):
    """The official layer is taken where CUDA and mamba-ssm are there; a broken package is named and the CPU taken."""
    import sys
    import types
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    recall.backend.cache_clear()
    assert recall.backend() == ("cpu", recall.Mamba) and "mamba-ssm is not usable" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.SimpleNamespace(Mamba=recall.Mamba))
    recall.backend.cache_clear()
    device, layer = recall.backend()
    assert device == "cuda" and issubclass(layer, recall.Mamba)
    recall.backend.cache_clear()
