"""The causal convolution against the reference in float64 and PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_spoiled_alike

from cpu_mamba import causal_conv1d_fn, causal_conv1d_ref
from cpu_mamba.functions import CausalConv


def conv_inputs(batch, dim, length, width):
    return dict(x=torch.randn(batch, dim, length), weight=torch.randn(dim, width), bias=torch.randn(dim))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("batch, dim, length, width", [(2, 16, 20, 4), (1, 5, 3, 4), (3, 24, 1, 2), (2, 7, 33, 1), (1, 128, 64, 3)])
def test_convolution_equals_the_reference(batch, dim, length, width, activation):
    """Values and every gradient within 1e-5, with and without a bias; lengths shorter than the convolution."""
    arguments = conv_inputs(batch, dim, length, width) | dict(activation=activation)
    y, = assert_parity(causal_conv1d_fn, causal_conv1d_ref, arguments)
    assert CausalConv.__name__ in y.grad_fn.next_functions[0][0].name()
    assert_parity(causal_conv1d_fn, causal_conv1d_ref, arguments | dict(bias=None))


def test_reference_is_pytorchs_convolution():
    x, weight, bias = (v.double() for v in conv_inputs(2, 6, 15, 4).values())
    want = F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=6)
    assert torch.allclose(causal_conv1d_ref(x, weight, bias), want) and torch.allclose(causal_conv1d_ref(x, weight, bias, "silu"), F.silu(want))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_nan_and_infinity_come_out(activation):
    assert_spoiled_alike(causal_conv1d_fn, causal_conv1d_ref, conv_inputs(2, 16, 12, 4) | dict(activation=activation))


@pytest.mark.parametrize("change, error, words", [
    (dict(activation="relu"), ValueError, "activation='relu': None, \"silu\""), (dict(weight=[1.0]), TypeError, "weight of type list"),
    (dict(weight=torch.zeros(3, 4)), ValueError, r"weight of shape \(3, 4\): \(8, 4\) is needed"),
    (dict(x=torch.zeros(2, 8, 0)), ValueError, "length"), (dict(bias=torch.zeros(8).int()), TypeError, "bias of dtype torch.int32")])
def test_arguments_are_checked(change, error, words):
    with pytest.raises(error, match=words):
        causal_conv1d_fn(**conv_inputs(2, 8, 10, 4) | change)
