"""One token at a time: the two operators over the cases of mamba_ssm's and causal_conv1d's own tests, and whole layers against the full sequence."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import relative, scan_inputs
from torch import nn

from cpu_mamba import Mamba, causal_conv1d_fn, generate, selective_scan_fn
from cpu_mamba.generate import causal_conv1d_update, causal_conv1d_update_ref, selective_state_update, selective_state_update_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What the kernels were called for, so that no test compares the reference with itself."""
    names = []

    def counted(name, function):
        return lambda *args: names.append(name) or function(*args)
    for name in ("conv_token", "state_token"):
        monkeypatch.setattr(generate, name, counted(name, getattr(generate, name)))
    return names


def bound(dtype):
    """rtol, atol of mamba_ssm's tests; float32 is held to 1e-5 of the largest value besides."""
    return {torch.float32: (3e-4, 1e-3), torch.float16: (5e-3, 1e-2), torch.bfloat16: (1e-2, 5e-2)}[dtype]


def assert_near(got, want, dtype):
    rtol, atol = bound(dtype)
    assert got.dtype == dtype and torch.allclose(got.double(), want, rtol=rtol, atol=atol)
    assert dtype != torch.float32 or relative(got, want) < 1e-5


def recurrence(state, x, dt, A, B, C, D, z, dt_bias):
    """(out, new state) with heads, by the paper's equation in float64 and one einsum each."""
    state, x, dt, A, B, C, D, z, dt_bias = (t if t is None else t.double() for t in (state, x, dt, A, B, C, D, z, dt_bias))
    dt, (B, C) = torch.nn.functional.softplus(dt + dt_bias), (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    h = torch.exp(torch.einsum("bhp,hpn->bhpn", dt, A)) * state + torch.einsum("bhp,bhn,bhp->bhpn", dt, B, x)
    y = torch.einsum("bhpn,bhn->bhp", h, C) + D * x
    return y if z is None else y * z * torch.sigmoid(z), h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [16, 32, 64])
@pytest.mark.parametrize("dim", [2048, 2048 + 16, 4096])
def test_state_update(calls, dim, N, gated, dtype):
    """mamba_ssm's test_selective_state_update: output and state, the state in place."""
    r = lambda *shape: torch.randn(*shape).to(dtype)
    state, x, dt, bias, A = r(2, dim, N), r(2, dim), r(2, dim), torch.rand(dim) - 4, -torch.rand(dim, N) - 1
    B, C, D, z = r(2, N), r(2, N), torch.randn(dim), r(2, dim) if gated else None
    want, h = recurrence(state[:, None], x[:, None], dt[:, None], A[None], B[:, None], C[:, None], D, z if z is None else z[:, None], bias)
    place = state.data_ptr()
    out = selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True)
    assert_near(out, want[:, 0], dtype)
    assert_near(state, h[:, 0], dtype)
    assert state.data_ptr() == place and bool(calls) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("N, dim", [(16, 2048), (64, 4096)])
def test_state_update_with_heads(calls, dim, N, groups, tied, dtype):
    """mamba_ssm's test_selective_state_update_with_heads; tied: one step size and decay for a head, expanded with a stride of 0."""
    p, heads = 64, dim // 64
    r = lambda *shape: torch.randn(*shape).to(dtype)
    state, x = r(2, heads, p, N), r(2, heads, p)
    if tied:
        dt, bias = r(2, heads, 1).expand(2, heads, p), (torch.rand(heads, 1) - 4).expand(heads, p)
        A, D = (-torch.rand(heads, 1, 1) - 1).expand(heads, p, N), torch.randn(heads, 1).expand(heads, p)
    else:
        dt, bias, A, D = r(2, heads, p), torch.rand(heads, p) - 4, -torch.rand(heads, p, N) - 1, torch.randn(heads, p)
    B, C, z = r(2, groups, N), r(2, groups, N), r(2, heads, p)
    want, h = recurrence(state, x, dt, A, B, C, D, z, bias)
    out = selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True)
    assert_near(out, want, dtype)
    assert_near(state, h, dtype)
    assert bool(calls) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length, width", [(None, 2), (None, 3), (None, 4), (1, 4), (4, 3), (5, 4), (None, 1)])
@pytest.mark.parametrize("dim", [2048, 2048 + 16, 7])
def test_conv_update(calls, dim, length, width, biased, activation, dtype):
    """causal_conv1d's test_causal_conv1d_update: one token or several, from the state and back into it, bit by bit."""
    r = lambda *shape: torch.randn(*shape).to(dtype)
    x, state, weight, bias = r(2, dim, length or 1), r(2, dim, max(width - 1, 1)), r(dim, width), r(dim) if biased else None
    window = torch.cat((state, x), 2)
    want = F.conv1d(window.double(), weight.double()[:, None], bias if bias is None else bias.double(), groups=dim)[..., -x.shape[2]:]
    want = want if activation is None else F.silu(want)
    given = x if length else x[..., 0]
    out = causal_conv1d_update(given, state, weight, bias, activation)
    assert_near(out, want if length else want[..., 0], dtype)
    assert torch.equal(state, window[..., -state.shape[2]:])
    assert bool(calls) == (dtype == torch.float32 and (length or 1) == 1)


def test_a_longer_state():
    """A state of more than width - 1 inputs, as Mamba keeps it, moves on as a whole and only its end counts."""
    x, state, weight = torch.randn(3, 5), torch.randn(3, 5, 6), torch.randn(5, 3)
    window = torch.cat((state, x[..., None]), 2)
    out = causal_conv1d_update(x, state, weight)
    assert torch.equal(state, window[..., 1:]) and torch.allclose(out, (window[..., -3:] * weight).sum(-1), atol=1e-6)


@pytest.mark.parametrize("batch, dim, N", [(1, 16, 16), (3, 7, 5), (2, 24, 1), (1, 1, 3)])
@pytest.mark.parametrize("absent", [(), ("D", "z"), ("delta_bias",)])
def test_tokens_equal_the_sequence(calls, batch, dim, N, absent):
    """Token after token gives the outputs and the last state of selective_scan_fn and causal_conv1d_fn."""
    a = {k: v for k, v in scan_inputs(batch, dim, 12, N, N).items() if k not in absent}
    want, last = selective_scan_fn(**{k: v.double() for k, v in a.items()}, delta_softplus=True, return_last_state=True)
    x, weight, state = a["u"], torch.randn(dim, 4), a["initial_state"].clone()
    window, convolved = torch.zeros(batch, dim, 4), causal_conv1d_fn(x.double(), weight.double(), activation="silu")
    for t in range(12):
        z = a["z"][..., t] if "z" in a else None
        y = selective_state_update(state, x[..., t], a["delta"][..., t], a["A"], a["B"][..., t], a["C"][..., t], a.get("D"), z,
                                   a.get("delta_bias"), True)
        assert relative(y, want[..., t]) < 1e-5
        assert (causal_conv1d_update(x[..., t], window, weight, None, "swish") - convolved[..., t]).abs().max() < 1e-5
    assert relative(state, last) < 1e-5 and len(calls) == 24


def update_inputs(batch=2, dim=16, N=16):
    r = torch.randn
    return dict(state=r(batch, dim, N), x=r(batch, dim), dt=r(batch, dim), A=-torch.rand(dim, N) - 1, B=r(batch, N), C=r(batch, N), D=r(dim),
                z=r(batch, dim), dt_bias=r(dim))


def both(arguments, **options):
    """(out, state) of the kernel, and of the reference in float64."""
    results = []
    for function, convert in ((selective_state_update, torch.clone), (selective_state_update_ref, torch.Tensor.double)):
        given = {k: convert(v) for k, v in arguments.items()}
        results.append((function(**given, **options), given["state"]))
    return results


@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_steps(calls, scale, sign):
    """Decays down to nothing, and growth (no Mamba has it), which overflows where it does in the recurrence."""
    arguments = update_inputs() | dict(dt=torch.rand(2, 16) * scale, A=-sign * (torch.rand(16, 16) + 0.5))
    del arguments["dt_bias"]
    (out, state), (want, h) = both(arguments)
    assert calls and relative(out, want) < 1e-5 and relative(state, h) < 1e-5
    (out, state), _ = both(arguments | dict(dt=torch.full((2, 16), 1e4)))
    assert torch.isfinite(state).all() == (sign == 1) and torch.isinf(state).all() == (sign == -1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out(bad):
    """No finite number where the reference gives none."""
    for name, tensor in update_inputs().items():
        spoiled = update_inputs()
        spoiled[name] = tensor.clone()
        spoiled[name].view(-1)[tensor.numel() // 2] = bad
        got, want = both(spoiled, dt_softplus=True)
        for a, b in zip(got, want):
            assert not (torch.isfinite(a) & ~torch.isfinite(b)).any(), name
    x, state = torch.randn(1, 8), torch.zeros(1, 8, 4)
    x[0, 3] = bad
    assert not torch.isfinite(causal_conv1d_update(x, state, torch.randn(8, 4)))[0, 3] and not torch.isfinite(state[0, 3, 3])


def test_what_the_kernel_leaves_to_pytorch(calls):
    """A state in another order, float64, a gradient that is wanted: right, without the kernel."""
    arguments = update_inputs()
    (want, h), _ = both(arguments)
    calls.clear()
    state = arguments["state"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.allclose(selective_state_update(**arguments | dict(state=state)), want, atol=1e-5) and torch.allclose(state, h, atol=1e-5)
    double = {k: v.double() for k, v in arguments.items()}
    assert torch.allclose(selective_state_update(**double), want.double(), atol=1e-5) and double["state"].dtype == torch.float64
    x = arguments["x"].clone().requires_grad_()
    selective_state_update(**arguments | dict(x=x, state=arguments["state"].clone())).sum().backward()
    dt, gate = arguments["dt"] + arguments["dt_bias"], F.silu(arguments["z"])
    assert torch.allclose(x.grad, gate * (dt * (arguments["B"] * arguments["C"]).sum(1, keepdim=True) + arguments["D"]), atol=1e-4)
    weight = torch.randn(16, 4, requires_grad=True)
    causal_conv1d_update(arguments["x"], torch.zeros(2, 16, 4), weight).sum().backward()
    assert torch.allclose(weight.grad[:, 3], arguments["x"].sum(0), atol=1e-6) and not calls


def test_autograd_learns_of_the_change(calls):
    """A gradient that still needs the state of before is refused, not computed from the new one."""
    arguments, weight = update_inputs(), torch.randn(2, 16, 16, requires_grad=True)
    loss = (arguments["state"] * weight).sum()
    selective_state_update(**arguments)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    with torch.inference_mode():
        selective_state_update(**update_inputs())
    assert len(calls) == 2


def test_threads_do_not_change_the_result(monkeypatch):
    monkeypatch.setattr(generate, "WORTH", 0)
    arguments, results = update_inputs(5), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = arguments | dict(state=arguments["state"].clone())
        results.append((selective_state_update(**given), given["state"]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("change, error, words", [
    (dict(x=torch.zeros(2, 8)), ValueError, r"x of shape \(2, 8\): \(2, 16\) is needed"), (dict(A=torch.zeros(16, 4)), ValueError, "A of shape"),
    (dict(B=torch.zeros(2, 3, 16)), ValueError, r"B of shape \(2, 3, 16\)"), (dict(state=torch.zeros(2, 16)), ValueError, "state of shape"),
    (dict(A=torch.zeros(16, 16).cfloat()), TypeError, "A of dtype torch.complex64"),
    (dict(C=torch.zeros(2, 16).int()), TypeError, "C of dtype torch.int32"), (dict(dt=None), TypeError, "dt of type NoneType"),
    (dict(dt_bias=torch.zeros(16, device="meta")), ValueError, "dt_bias on meta")])
def test_arguments_of_the_state_update(change, error, words):
    with pytest.raises(error, match=words):
        selective_state_update(**update_inputs() | change)


@pytest.mark.parametrize("change, error, words", [
    (dict(activation="gelu"), ValueError, "activation='gelu'"), (dict(conv_state=torch.zeros(2, 16, 2)), ValueError, "conv_state of shape"),
    (dict(conv_state=torch.zeros(1, 16, 4)), ValueError, "conv_state of shape"), (dict(weight=torch.zeros(8, 4)), ValueError, r"weight of shape \(8, 4\)"),
    (dict(x=torch.zeros(2, 16).long()), TypeError, "x of dtype torch.int64"), (dict(weight=[1.0]), TypeError, "weight of type list")])
def test_arguments_of_the_convolution(change, error, words):
    with pytest.raises(error, match=words):
        causal_conv1d_update(**dict(x=torch.zeros(2, 16), conv_state=torch.zeros(2, 16, 4), weight=torch.zeros(16, 4)) | change)


# A layer

def tokens_of(layer, x, states):
    return torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("batch, options", [
    (1, {}), (3, dict(d_state=5, d_conv=3)), (2, dict(bias=True, conv_bias=False, dt_rank=3)), (2, dict(d_conv=2, d_state=1))])
def test_steps_equal_the_layer(calls, batch, options):
    """Token after token through `step` is the layer on the whole sequence, by the kernels."""
    layer, x = Mamba(24, **options), torch.randn(batch, 9, 24)
    with torch.no_grad():
        got = tokens_of(layer, x, layer.allocate_inference_cache(batch))
        assert calls == ["conv_token", "state_token"] * 9
        assert relative(got, layer.double()(x.double())) < 1e-5


@pytest.mark.parametrize("spoil", [
    lambda layer: layer.conv1d.register_forward_hook(lambda *args: None), lambda layer: layer.dt_proj.register_forward_pre_hook(lambda *args: None),
    lambda layer: setattr(layer, "x_proj", type("Other", (nn.Linear,), {})(48, 34, bias=False)), lambda layer: layer.double(),
    lambda layer: setattr(layer, "use_fast_path", False)])
def test_steps_without_kernels(calls, spoil):
    """What the kernels do not represent takes the submodules, with the same result; so does a gradient that is wanted."""
    layer = Mamba(24)
    spoil(layer)
    x, states = torch.randn(2, 5, 24, dtype=layer.D.dtype), layer.allocate_inference_cache(2)
    with torch.no_grad():
        assert relative(tokens_of(layer, x, states), layer(x)) < 1e-5 and not calls
    layer = Mamba(24)
    y = layer.step(torch.randn(2, 1, 24), *layer.allocate_inference_cache(2))[0]
    y.sum().backward()
    assert layer.in_proj.weight.grad.abs().sum() > 0 and not calls


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_inference_params(calls, prompt):
    """A prompt at once and then token by token, with mamba_ssm's cache by layer_idx, is the whole sequence; also with the cache used again."""
    layer, x = Mamba(24, layer_idx=3), torch.randn(2, 10, 24)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        want = layer(x)
        for _ in range(2):
            params.seqlen_offset = 0
            parts = [layer(x[:, :prompt], inference_params=params)]
            for t in range(prompt, 10):
                params.seqlen_offset = t
                parts.append(layer(x[:, t : t + 1], inference_params=params))
            assert relative(torch.cat(parts, 1), want) < 1e-5
    assert list(params.key_value_memory_dict) == [3] and len(calls) == 2 * 2 * (10 - prompt)
    with pytest.raises(ValueError, match="layer_idx"):
        Mamba(24)(x, inference_params=params)


@pytest.mark.parametrize("spoil", [lambda layer: None, lambda layer: layer.double(), lambda layer: setattr(layer, "x_proj", torch.nn.Sequential(layer.x_proj))])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (4, 50), (2, 3, 70, 71)])
def test_a_prompt_in_parts(cuts, spoil):
    """Parts of any length one after the other are the whole sequence, at the memory of a part."""
    layer = Mamba(24, layer_idx=0)
    spoil(layer)
    x, params = torch.randn(2, 80, 24, dtype=layer.D.dtype), SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        want, parts = layer(x), []
        for part in x.tensor_split(cuts, 1):
            parts.append(layer(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
    assert relative(torch.cat(parts, 1), want) < 1e-5


def test_references_stand_for_the_operators():
    """The references take what the operators take."""
    arguments = update_inputs()
    (out, state), _ = both(arguments, dt_softplus=True)
    assert torch.allclose(selective_state_update_ref(**arguments, dt_softplus=True), out, atol=1e-4)
    assert torch.allclose(arguments["state"], state, atol=1e-5)
    x, first, weight, bias = torch.randn(2, 16), torch.randn(2, 16, 4), torch.randn(16, 4), torch.randn(16)
    second = first.clone()
    got, want = causal_conv1d_update(x, first, weight, bias, "silu"), causal_conv1d_update_ref(x, second, weight, bias, "silu")
    assert torch.allclose(got, want, atol=1e-5) and torch.equal(first, second)
