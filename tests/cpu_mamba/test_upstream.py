"""The cases of the operators' own upstream tests, written anew: mamba_ssm's test_selective_scan and causal_conv1d's test_causal_conv1d, on the CPU.

Shapes, dtypes, options and tolerances are theirs, the lengths a selection; every gradient is compared too. `causal_conv1d_update` and
`selective_state_update`: test_generate.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import double, values_and_gradients

from cpu_mamba import causal_conv1d_fn, causal_conv1d_ref, paths, selective_scan_fn, selective_scan_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
names = lambda value: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


WEIGHTS = {"weight", "bias", "A", "D", "delta_bias"}


def assert_close(function, reference, arguments, bounds, weights=None, times=1):
    """Outputs within bounds (rtol, atol) of the reference, which is in float64 beside float32 inputs and else gets what the function gets; gradients,
    in their own dtypes, within so many times these bounds, or those for `weights`."""
    dtype = next(iter(arguments.values())).dtype
    outputs, gradients = values_and_gradients(function, arguments)
    wanted, wanted_gradients = values_and_gradients(reference, double(arguments) if dtype == torch.float32 else arguments)
    close = lambda a, b, rtol, atol: torch.allclose(a, b.to(a.dtype), rtol=times * rtol, atol=times * atol)
    assert outputs[0].dtype == dtype
    for y, want in zip(outputs, wanted, strict=True):
        assert torch.allclose(y, want.to(y.dtype), rtol=bounds[0], atol=bounds[1])
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype and close(gradient, wanted_gradients[name], *(weights if name in WEIGHTS else bounds)), name


# state-spaces/mamba, tests/ops/test_selective_scan.py

SCAN_BOUNDS = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}


def scan_case(dtype, length, groups=1, wtype=torch.float32, variable=(True, True)):
    batch, dim, N = 2, 4, 8
    steps = length * (2 if wtype.is_complex else 1)
    varying = (batch, N, steps) if groups == 1 else (batch, groups, N, steps)
    B, C = (torch.randn(varying, dtype=dtype) if varies else torch.randn(dim, N, dtype=wtype) for varies in variable)
    return dict(u=torch.randn(batch, dim, length, dtype=dtype), delta=0.5 * torch.rand(batch, dim, length, dtype=dtype),
                A=-0.5 * torch.rand(dim, N, dtype=wtype), B=B, C=C, D=torch.randn(dim), z=torch.randn(batch, dim, length, dtype=dtype),
                delta_bias=0.5 * torch.rand(dim))


def check_scan(arguments, softplus=True, last=True):
    bounds, options = SCAN_BOUNDS[arguments["u"].dtype], dict(delta_softplus=softplus, return_last_state=last)
    weights = tuple(max(1e-3, bound) for bound in bounds)  # gradients: upstream has twice to ten times the bounds
    assert_close(lambda **a: selective_scan_fn(**a, **options), lambda **a: selective_scan_ref(**a, **options), arguments, bounds, weights, times=2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_selective_scan(dtype, length, groups):
    check_scan(scan_case(dtype, length, groups))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
@pytest.mark.parametrize("softplus, last", [(True, False), (False, True)])
def test_selective_scan_options(absent, softplus, last):
    arguments = scan_case(torch.float32, 128)
    del arguments[absent]
    check_scan(arguments, softplus, last)


@pytest.mark.parametrize("wtype", [torch.float32, torch.complex64], ids=names)
@pytest.mark.parametrize("variable", [(True, True), (True, False), (False, True), (False, False)])
def test_selective_scan_constant_and_complex(wtype, variable):
    """B and C of shape (dim, state), and complex A: through the reference."""
    arguments = scan_case(torch.float32, 128, 1, wtype, variable)
    options = dict(delta_softplus=True, return_last_state=True)
    out, last = selective_scan_fn(**arguments, **options)
    wide = {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in arguments.items()}
    want, wanted = selective_scan_ref(**wide, **options)
    assert out.dtype == torch.float32 and last.dtype == wtype
    assert torch.allclose(out.double(), want, rtol=6e-4, atol=2e-3) and torch.allclose(last.to(wanted.dtype), wanted, rtol=6e-4, atol=2e-3)


# Dao-AILab/causal-conv1d, tests/test_causal_conv1d.py

CONV_BOUNDS = {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}


def conv_case(dtype, dim, length, width, biased, channel_last, batch=2):
    """x as a part of something wider, channels or tokens side by side in memory; the weights in float32."""
    x = torch.randn(batch, length, dim + 128, dtype=dtype)[..., 64 : 64 + dim].transpose(1, 2)
    x = x if channel_last else torch.randn(batch, dim + 128, length, dtype=dtype)[:, 64 : 64 + dim]
    return dict(x=x, weight=torch.randn(dim, width), bias=torch.randn(dim) if biased else None)


def conv_with_states(x, weight, bias, activation, initial_states, final):
    """What causal_conv1d's reference says of states: tokens before x, zeros where there are none, and the last ones of both."""
    before = x.shape[0], x.shape[1], weight.shape[1] - 1
    whole = torch.cat((x.new_zeros(before) if initial_states is None else initial_states, x), 2)
    out = causal_conv1d_ref(whole, weight, bias, activation)[..., before[2] :]
    return (out, whole[..., x.shape[2] :]) if final else out


@pytest.mark.parametrize("length", [1, 2, 8, 129, 372])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_causal_conv1d(dtype, width, length, initial, final):
    biased, activation, channel_last = (length + width) % 2 == 0, "silu" if length % 3 else None, initial or final or width == 3
    arguments = conv_case(dtype, 64, length, width, biased, channel_last)
    if initial:
        arguments["initial_states"] = torch.randn(2, width - 1, 64, dtype=dtype).transpose(1, 2)
    assert_close(lambda **a: causal_conv1d_fn(**a, return_final_states=final, activation=activation),
                 lambda x, weight, bias, initial_states=None: conv_with_states(x, weight, bias, activation, initial_states, final),
                 arguments, CONV_BOUNDS[dtype], (1e-3, 1e-3))


@pytest.mark.parametrize("dtype, channel_last", [(torch.float32, False), (torch.bfloat16, True)], ids=names)
def test_many_channels(dtype, channel_last):
    arguments = conv_case(dtype, 4096 + 32, 151, 4, True, channel_last)
    assert_close(lambda **a: causal_conv1d_fn(**a, activation="silu"), lambda **a: causal_conv1d_ref(**a, activation="silu"), arguments,
                 CONV_BOUNDS[dtype], (1e-3, 1e-3))


def test_states_go_on_where_they_ended():
    """A sequence in two pieces, the states of the first handed on: the whole, to the last bit; also into a tensor that is given."""
    arguments = conv_case(torch.float32, 48, 33, 4, True, True)
    x, kept = arguments.pop("x"), torch.zeros(2, 48, 3)
    first, states = causal_conv1d_fn(x[..., :2], **arguments, return_final_states=True, final_states_out=kept, activation="silu")
    assert states is kept and torch.equal(kept[..., 1:], x[..., :2]) and not kept[..., 0].any()
    second = causal_conv1d_fn(x[..., 2:], **arguments, initial_states=states, activation="silu")
    assert torch.allclose(torch.cat((first, second), 2), causal_conv1d_fn(x, **arguments, activation="silu"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("width, activation", [(2, None), (3, "silu"), (4, "silu")])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_sequences_in_a_row(dtype, width, activation, padding):
    """causal_conv1d's varlen tests: with seq_idx the sequences of a row do not see each other, and padding gives 0."""
    parts = [[7, 1, 55], [40, 23], [2, 2, 59]]
    arguments = conv_case(dtype, 64, 63 + padding, width, True, True, batch=3)
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in parts])
    numbers = F.pad(numbers, (0, padding), value=-1).int()

    def apart(x, weight, bias):
        rows = [torch.cat([causal_conv1d_ref(s, weight, bias, activation) for s in x[i : i + 1, :, :63].split(row, 2)], 2) for i, row in enumerate(parts)]
        return F.pad(torch.cat(rows), (0, padding))
    assert_close(lambda **a: causal_conv1d_fn(**a, seq_idx=numbers, activation=activation), apart, arguments, CONV_BOUNDS[dtype], (1e-3, 1e-3))


@pytest.mark.parametrize("change, error, words", [
    (dict(seq_idx="silu"), TypeError, "seq_idx of type str"), (dict(seq_idx=torch.zeros(2, 9).int()), ValueError, r"seq_idx of shape \(2, 9\)"),
    (dict(seq_idx=torch.zeros(2, 10).int(), return_final_states=True), NotImplementedError, "seq_idx beside"),
    (dict(initial_states=torch.zeros(2, 8, 4)), ValueError, r"initial_states of shape \(2, 8, 4\): \(2, 8, 3\)"),
    (dict(initial_states=torch.zeros(2, 8, 3).half()), TypeError, "initial_states of dtype torch.float16"),
    (dict(final_states_out=torch.zeros(2, 8, 3)), ValueError, "return_final_states=True")])
def test_arguments_of_states_are_checked(change, error, words):
    with pytest.raises(error, match=words):
        causal_conv1d_fn(torch.zeros(2, 8, 10), torch.zeros(8, 4), **change)


def test_gpu_tensors_are_told_of_their_packages():
    paths.warn_of_gpu.cache_clear()
    with pytest.warns(UserWarning, match="mamba-ssm and causal-conv1d"):
        assert not paths.fits(SimpleNamespace(is_cuda=True))
