"""What the public operators do beyond plain training: dtypes, layouts, derivatives of derivatives, transforms, tracers, forks, wrong arguments."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from parity import assert_parity, double, relative, scan_inputs, values_and_gradients
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import cpu_mamba
from cpu_mamba import (available, causal_conv1d_fn, causal_conv1d_ref, mamba_inner_fn, mamba_inner_ref, selective_scan_fn, selective_scan_ref,
                       untouched)
from cpu_mamba.paths import fits

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cpu_mamba.__file__).parents[1])}


def inner_inputs(batch=2, length=9, dim=4, width=3, R=2, N=3):
    r = torch.randn
    return dict(xz=r(batch, length, 2 * dim), conv_weight=r(dim, width), conv_bias=r(dim), W_x=r(R + 2 * N, dim) / 2, W_dt=r(dim, R), dt_bias=r(dim) - 2,
                A=-torch.rand(dim, N) * 4, D=r(dim))


def conv_inputs(batch=2, dim=6, length=8, width=3):
    return dict(x=torch.randn(batch, dim, length), weight=torch.randn(dim, width), bias=torch.randn(dim))


silu = lambda function: lambda x, weight, bias: function(x, weight, bias, activation="silu")


def stepped(function):
    """A scan with softplus, its tensors by place or by name."""
    return lambda *args, **named: function(*args[:8], **dict(initial_state=args[8]) if len(args) > 8 else {}, **named, delta_softplus=True)


OPERATORS = {"scan": (stepped(selective_scan_fn), stepped(selective_scan_ref), lambda: scan_inputs(2, 4, 9, 3, 0)),
             "conv": (silu(causal_conv1d_fn), silu(causal_conv1d_ref), conv_inputs), "inner": (mamba_inner_fn, mamba_inner_ref, inner_inputs)}
every_operator = pytest.mark.parametrize("fn, ref, make", OPERATORS.values(), ids=OPERATORS)


def test_the_kernels_are_used():
    """These tests compare fused functions with references: the fused ones are there."""
    assert available() and fits(*inner_inputs().values())


# Layouts and sizes

@pytest.mark.parametrize("batch, length, dim, width, R, N", [(2, 20, 16, 4, 1, 16), (1, 1, 5, 4, 1, 3), (3, 37, 24, 2, 3, 5), (2, 70, 128, 4, 4, 16),
                                                             (1, 40, 2, 1, 6, 1)])
def test_inner_equals_the_reference(batch, length, dim, width, R, N):
    y, = assert_parity(mamba_inner_fn, mamba_inner_ref, inner_inputs(batch, length, dim, width, R, N))
    assert "MambaInner" in y.grad_fn.name()
    assert_parity(mamba_inner_fn, mamba_inner_ref, inner_inputs(batch, length, dim, width, R, N) | dict(conv_bias=None))


@every_operator
def test_any_layout(fn, ref, make):
    """Inputs that are transposed, strided or expanded, and gradients that are, give what contiguous ones do."""
    arguments = make()
    want = fn(**arguments)
    strided = {k: torch.stack((v, v), -1)[..., 0].transpose(0, -1).clone(memory_format=torch.preserve_format).transpose(0, -1) for k, v in arguments.items()}
    doubled = {k: torch.stack((v, v), -1)[..., 0] for k, v in arguments.items()}
    assert relative(fn(**strided), want) < 1e-6 and relative(fn(**doubled), want) < 1e-6 and not any(v.is_contiguous() for v in doubled.values())
    first = next(iter(arguments))
    expanded = arguments | {first: arguments[first][:1].expand(3, -1, -1)} | {k: v[:1].expand(3, *v.shape[1:]) for k, v in arguments.items() if v.dim() == 3}
    assert_parity(fn, ref, expanded)
    leaf = arguments[first].requires_grad_()
    for gradient in (torch.ones(()).expand_as(want), torch.randn(want.shape[::-1]).permute(2, 1, 0), torch.randn(*want.shape, 2)[..., 1]):
        one, = torch.autograd.grad(fn(**arguments), leaf, gradient)
        other, = torch.autograd.grad(fn(**arguments), leaf, gradient.contiguous())
        assert torch.equal(one, other)


def test_growing_states_of_the_block(calls):
    """A over 0, which no Mamba has: the plain recurrence, and right."""
    arguments = inner_inputs() | dict(A=torch.full((4, 3), 0.2))
    assert_parity(mamba_inner_fn, mamba_inner_ref, arguments)
    huge = arguments | dict(A=torch.full((4, 3), 300.0))
    assert not torch.isfinite(mamba_inner_fn(**huge)).all() and not calls


@every_operator
def test_an_empty_batch(fn, ref, make):
    """No sequences: an empty output, gradients of zero."""
    arguments = {k: v[:0] if v.dim() == 3 else v for k, v in make().items()}
    (y,), gradients = values_and_gradients(fn, arguments)
    assert y.shape[0] == 0 and y.dim() == 3 and all((g == 0).all() for g in gradients.values() if g is not None)


@pytest.mark.parametrize("kind_B", ["shared", "one group", "two groups", "four groups", "constant"])
@pytest.mark.parametrize("kind_C", ["shared", "two groups", "constant"])
def test_B_and_C_of_every_kind(calls, kind_B, kind_C):
    """(batch, state, length), per group of channels, or constant (dim, state), in any combination; against a recurrence with all of it written out."""
    dim, N, length = 8, 3, 12
    shapes = {"shared": (2, N, length), "one group": (2, 1, N, length), "two groups": (2, 2, N, length), "four groups": (2, 4, N, length),
              "constant": (dim, N)}
    arguments = scan_inputs(2, dim, length, N, 2) | dict(B=torch.randn(shapes[kind_B]), C=torch.randn(shapes[kind_C]), delta_softplus=True, return_last_state=True)

    def whole(x):
        if x.dim() == 2:
            return x[None, :, :, None].expand(2, dim, N, length)
        x = x if x.dim() == 4 else x[:, None]
        return x[:, torch.arange(dim) * x.shape[1] // dim]

    def recurrence(u, delta, A, B, C, D, z, delta_bias, initial_state, **_):
        delta, B, C, h, ys = nn.functional.softplus(delta + delta_bias[:, None]), whole(B), whole(C), initial_state, []
        for t in range(length):
            h = torch.exp(delta[:, :, t, None] * A) * h + delta[:, :, t, None] * u[:, :, t, None] * B[..., t]
            ys.append((h * C[..., t]).sum(-1))
        return (torch.stack(ys, -1) + D[:, None] * u) * nn.functional.silu(z), h
    assert_parity(selective_scan_fn, recurrence, arguments)
    assert {"forward_tasks", "backward_tasks"} <= set(calls)
    wanted = recurrence(**double(arguments))
    assert all(torch.allclose(a, b) for a, b in zip(selective_scan_ref(**double(arguments)), wanted))


@pytest.mark.parametrize("varies", [True, False])
def test_complex_A(varies):
    """As mamba_ssm: A (dim, state) complex, B and C real and imaginary parts side by side (or complex and constant), twice the real part comes out."""
    batch, dim, N, length = 2, 4, 3, 6
    u, delta, A = torch.randn(batch, dim, length), torch.rand(batch, dim, length), torch.complex(-torch.rand(dim, N), torch.randn(dim, N))
    B, C = (torch.view_as_complex(torch.randn(*((batch, N, length) if varies else (dim, N)), 2)) for _ in range(2))
    h, ys = 0, []
    for t in range(length):
        Bt, Ct = (x[:, None, :, t] if varies else x for x in (B, C))
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * Bt
        ys.append(2 * (h * Ct).sum(-1).real)
    pairs = [torch.view_as_real(x).flatten(-2) if varies else x for x in (B, C)]
    y, last = selective_scan_fn(u, delta, A, *pairs, return_last_state=True)
    assert torch.allclose(y, torch.stack(ys, -1), atol=1e-5) and torch.allclose(last, h, atol=1e-5)


# Dtypes

@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@every_operator
def test_half_precision(fn, ref, make, dtype, bound):
    """All in half precision, or the sequences alone beside float32 parameters: float32 of the rounded inputs, rounded once."""
    for keep in ((), ("A", "D", "delta_bias", "weight", "bias", "conv_weight", "conv_bias", "W_x", "W_dt", "dt_bias")):
        arguments = {k: v if k in keep else v.to(dtype) for k, v in make().items()}
        (y,), gradients = values_and_gradients(fn, arguments)
        (want,), wanted = values_and_gradients(ref, {k: v.float() for k, v in arguments.items()})
        assert y.dtype == dtype and relative(y, want) < bound
        assert all(g.dtype == arguments[k].dtype and relative(g, wanted[k]) < bound for k, g in gradients.items())


@every_operator
def test_autocast(fn, ref, make):
    """Within torch.autocast, forward and backward: exactly what it is without."""
    arguments = make()
    (want,), wanted = values_and_gradients(fn, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        (y,), gradients = values_and_gradients(fn, arguments)
    assert torch.equal(y, want) and all(torch.equal(gradients[k], wanted[k]) for k in gradients)


@every_operator
def test_float64_and_meta(fn, ref, make):
    """float64 keeps its precision; on the meta device shapes come out."""
    arguments = double(make())
    assert torch.equal(fn(**arguments), ref(**arguments)) and fn(**arguments).dtype == torch.float64
    shadow = fn(**{k: v.to("meta") for k, v in make().items()})
    assert shadow.device.type == "meta" and shadow.shape == fn(**arguments).shape


def test_defaults_of_the_process_do_not_matter():
    arguments = inner_inputs()
    want = values_and_gradients(mamba_inner_fn, arguments)
    try:
        torch.set_default_dtype(torch.float64)
        got = values_and_gradients(mamba_inner_fn, arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0][0], want[0][0]) and all(torch.equal(got[1][k], want[1][k]) for k in want[1])


# Derivatives

@every_operator
def test_second_derivatives(fn, ref, make):
    """A gradient penalty: its value and its gradient for every argument are those of the float64 reference."""
    def penalty(function, arguments):
        arguments = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
        first = torch.autograd.grad(function(**arguments).square().sum(), arguments.values(), create_graph=True)
        total = sum(g.square().sum() for g in first)
        return total, torch.autograd.grad(total, arguments.values())
    arguments = make()
    (got, gradients), (want, wanted) = penalty(fn, arguments), penalty(ref, double(arguments))
    assert relative(got, want) < 1e-5 and all((w != 0).any() for w in wanted)
    assert all(relative(g, w) < 1e-4 for g, w in zip(gradients, wanted))


@every_operator
def test_functional_transforms(fn, ref, make):
    """Hessians of both kinds, jvp, vmap, forward mode, and gradients in batches: the reference's."""
    arguments = make()
    first, *rest = arguments.values()
    loss = lambda function: lambda x: function(x.view_as(first), *rest).square().sum()
    x, v = first.flatten()[:].clone(), torch.randn(first.numel())
    for get in (torch.func.hessian, lambda f: lambda x: torch.autograd.functional.hessian(f, x)):
        assert relative(get(loss(fn))(x), get(loss(ref))(x)) < 1e-5
    assert relative(torch.func.jvp(loss(fn), (x,), (v,))[1], torch.func.jvp(loss(ref), (x,), (v,))[1]) < 1e-5
    assert relative(torch.func.grad(loss(fn))(x), torch.func.grad(loss(ref))(x)) < 1e-5
    many = torch.stack((x, v))
    assert relative(torch.func.vmap(loss(fn))(many), torch.stack([loss(ref)(x), loss(ref)(v)])) < 1e-5
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(fn)(dual)).tangent
    assert relative(tangent, torch.func.jvp(loss(ref), (x,), (v,))[1]) < 1e-5
    leaf = first.clone().requires_grad_()
    y = fn(leaf, *rest)
    gradients = torch.randn(3, *y.shape)
    batched, = torch.autograd.grad(y, leaf, gradients, is_grads_batched=True)
    want = torch.stack([torch.autograd.grad(ref(leaf, *rest), leaf, g)[0] for g in gradients])
    assert relative(batched, want) < 1e-5


def test_one_tensor_as_several_arguments():
    """u and z the same tensor: first and second derivatives count both."""
    a = scan_inputs(2, 4, 9, 3, 0)
    shared = lambda function: lambda u, delta, A, B, C: stepped(function)(u, delta, A, B, C, None, u)
    arguments = {k: a[k] for k in ("u", "delta", "A", "B", "C")}
    assert_parity(shared(selective_scan_fn), shared(selective_scan_ref), arguments)

    def twice(function, a):
        u = a["u"].clone().requires_grad_()
        g, = torch.autograd.grad(shared(function)(**a | dict(u=u)).square().sum(), u, create_graph=True)
        return torch.autograd.grad(g.square().sum(), u)[0]
    assert relative(twice(selective_scan_fn, arguments), twice(selective_scan_ref, double(arguments))) < 1e-5


@every_operator
def test_frozen_arguments(fn, ref, make):
    """No gradient is made for what needs none; the others are the same bits, whichever are frozen."""
    arguments = make()
    _, wanted = values_and_gradients(fn, arguments)
    for frozen in arguments:
        given = {k: v.detach().clone().requires_grad_(k != frozen) for k, v in arguments.items()}
        y = fn(**given)
        (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)).sum().backward()
        assert given[frozen].grad is None and all(torch.equal(given[k].grad, wanted[k]) for k in arguments if k != frozen)


@every_operator
def test_changed_in_place_before_backward(fn, ref, make):
    """Autograd's own error, for every argument that the gradient needs."""
    for name, value in make().items():
        arguments = {k: v.clone().requires_grad_() for k, v in make().items()}
        y = fn(**arguments)
        with torch.no_grad():
            arguments[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_operator
def test_output_changed_in_place(fn, ref, make):
    """The output may be changed without harm to the gradient, as y += 1 in a residual block does."""
    leaf, *rest = make().values()
    a, b = leaf.clone().requires_grad_(), leaf.clone().requires_grad_()
    y = fn(a, *rest)
    y += 1
    (y * 3).sum().backward()
    (fn(b, *rest) * 3).sum().backward()
    assert torch.equal(a.grad, b.grad)


@every_operator
def test_checkpoint_and_repeated_backward(fn, ref, make):
    """Gradient checkpointing and a graph that is kept give the same gradient."""
    leaf, *rest = make().values()
    leaf.requires_grad_()
    want, = torch.autograd.grad(fn(leaf, *rest).sum(), leaf)
    got, = torch.autograd.grad(checkpoint(fn, leaf, *rest, use_reentrant=False).sum(), leaf)
    total = fn(leaf, *rest).sum()
    again = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(g, want) for g in (got, *again))


# Tracers

@every_operator
def test_tracers(fn, ref, make):
    """torch.jit.trace, make_fx and torch.export see the plain operations, and what they make is right for other numbers."""
    from torch.fx.experimental.proxy_tensor import make_fx
    first, other = tuple(make().values()), tuple(make().values())
    want = fn(*other)
    assert relative(torch.jit.trace(lambda *a: fn(*a), first, check_trace=False)(*other), want) < 1e-5
    assert relative(make_fx(fn)(*first)(*other), want) < 1e-5

    class Module(nn.Module):
        def forward(self, *args):
            return fn(*args)
    assert relative(torch.export.export(Module(), first).module()(*other), want) < 1e-5


@every_operator
def test_compile(fn, ref, make):
    """torch.compile, here without its code generator: the plain operations, no break in the graph."""
    arguments = tuple(make().values())
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: fn(*a), backend="eager", fullgraph=True)
    assert relative(compiled(*arguments), fn(*arguments)) < 1e-5


# Modules

def test_untouched():
    """True of a plain module only: each way to change what its call does is seen."""
    assert untouched(nn.Linear(2, 2), nn.Linear) and untouched(nn.Conv1d(2, 2, 1), nn.Conv1d)
    assert not untouched(nn.Identity(), nn.Linear) and not untouched(type("Mine", (nn.Linear,), {})(2, 2), nn.Linear)
    nothing = lambda *args: None
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        module = nn.Linear(2, 2)
        handle = getattr(module, register)(nothing)
        assert not untouched(module, nn.Linear), register
        handle.remove()
        assert untouched(module, nn.Linear)
    for register in ("register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook",
                     "register_module_full_backward_pre_hook"):
        handle = getattr(nn.modules.module, register)(nothing)
        assert not untouched(nn.Linear(2, 2), nn.Linear), register
        handle.remove()
    assert untouched(nn.Linear(2, 2), nn.Linear)
    module = nn.Linear(2, 2)
    module.forward = nothing
    assert not untouched(module, nn.Linear)
    for change in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
                   lambda m: prune.l1_unstructured(m, "weight", 1), lambda m: parametrize.register_parametrization(m, "weight", nn.Identity())):
        module = nn.Linear(2, 2)
        change(module)
        assert not untouched(module, nn.Linear)


# Forks and threads

@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child(tmp_path):
    """A child of a parent whose threads have run computes what the parent does, and does not wait for threads that are not there."""
    script = textwrap.dedent("""
        import os, sys, torch
        from cpu_mamba import Mamba
        torch.set_num_threads(2)
        torch.manual_seed(0)
        layer, x = Mamba(64), torch.randn(4, 300, 64)
        def gradient():
            layer.zero_grad()
            layer(x).square().sum().backward()
            return torch.cat([p.grad.flatten() for p in layer.parameters()])
        want = gradient()
        child = os.fork()
        if not child:
            good = torch.allclose(gradient(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
            torch.save(torch.tensor(good), sys.argv[1])
            os._exit(0)
        os.waitpid(child, 0)
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "good.pt")], timeout=120, check=True, env=ENVIRONMENT)
    assert torch.load(tmp_path / "good.pt")


# Wrong arguments

@pytest.mark.parametrize("name, shape", [("delta", (2, 16, 9)), ("A", (15, 16)), ("B", (2, 15, 10)), ("B", (2, 3, 16, 10)), ("C", (2, 16, 11)),
                                         ("D", (15,)), ("z", (2, 16)), ("delta_bias", (1,))])
def test_shapes_are_checked(name, shape):
    """A tensor of the wrong shape is named, with its shape and the one that is needed."""
    arguments = scan_inputs(2, 16, 10, 16, 0)
    wanted = re.escape(str(tuple(arguments[name].shape)))
    with pytest.raises(ValueError, match=rf"{name} of shape {re.escape(str(shape))}: .*{wanted}.* needed"):
        selective_scan_fn(**arguments | {name: torch.zeros(shape)})


@pytest.mark.parametrize("change, error, words", [
    (dict(u=torch.zeros(2, 16)), ValueError, r"u of shape \(2, 16\)"), (dict(u=torch.zeros(2, 16, 0)), ValueError, "length"),
    (dict(delta=torch.zeros(2, 16, 10).int()), TypeError, "delta of dtype torch.int32: a floating dtype is needed"),
    (dict(B=torch.zeros(2, 16, 10, dtype=torch.complex64)), TypeError, "B of dtype torch.complex64"), (dict(D=[1.0]), TypeError, "D of type list"), (dict(u=None), TypeError, "u of type NoneType"),
    (dict(z=torch.zeros(2, 16, 10, device="meta")), ValueError, "z on meta: that of u, cpu, is needed")])
def test_arguments_are_checked(change, error, words):
    with pytest.raises(error, match=words):
        selective_scan_fn(**scan_inputs(2, 16, 10, 16, 0) | change)


def test_without_numba():
    """Everything works through the reference, and one warning says so."""
    script = textwrap.dedent("""
        import sys, warnings
        sys.modules["numba"] = None
        import torch, cpu_mamba
        assert not cpu_mamba.available()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            layer, x = cpu_mamba.Mamba(8), torch.randn(2, 5, 8)
            y = [layer(x) for _ in range(2)]
            y[0].sum().backward()
        assert len(said) == 1 and "Numba" in str(said[0].message), said
        assert torch.equal(*y) and all(p.grad is not None for p in layer.parameters())
    """)
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True, env=ENVIRONMENT)
