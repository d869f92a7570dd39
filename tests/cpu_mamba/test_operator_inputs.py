"""Inputs that nobody thought of: the operators give the reference's numbers, or an error that names the argument."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpu_mamba import causal_conv1d_fn, causal_conv1d_ref, selective_scan_fn, selective_scan_ref

many = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
dtypes = st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64))


def same(a, b, dtype):
    """Equal but for rounding, and no finite number where the other has none: infinity times zero is NaN in one order of products and not in another."""
    loose, known = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-4, torch.isfinite(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.isfinite(a), known) and torch.allclose(a[known].double(), b[known].double(), rtol=loose, atol=loose)


def made(shape, dtype, strange=0):
    """A tensor with something strange in it: a NaN, an infinity, or neither."""
    x = torch.randn(shape)
    if strange and x.numel():
        x.view(-1)[strange % x.numel()] = (float("nan"), float("inf"), -float("inf"))[strange % 3]
    return x.to(dtype)


@many
@given(batch=st.integers(0, 3), dim=st.integers(0, 40), length=st.integers(0, 40), state=st.integers(0, 20), groups=st.sampled_from((0, 1, 2)), wrong=st.sampled_from(("", "", "u", "B", "D", "z")),
       options=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()), dtype=dtypes, strange=st.sampled_from((0, 0, 1, 2, 3)))
def test_the_scan(batch, dim, length, state, groups, wrong, options, dtype, strange):
    """Any shape, group, option and dtype; one argument of a wrong length is named."""
    torch.manual_seed(0)
    with_D, with_z, with_bias, softplus, last = options
    shape = (batch, groups, state, length) if groups else (batch, state, length)
    given_ = dict(u=made((batch, dim, length), dtype, strange), delta=made((batch, dim, length), dtype), A=-torch.rand(dim, state), B=made(shape, dtype), C=made(shape, dtype),
                  D=torch.randn(dim) if with_D else None, z=made((batch, dim, length), dtype) if with_z else None, delta_bias=torch.randn(dim) if with_bias else None)
    fitting = given_.get(wrong)
    if fitting is not None:  # of nothing one more is nothing, and fits
        given_[wrong] = torch.cat((fitting, fitting[..., :1]), -1)
    try:
        found = selective_scan_fn(**given_, delta_softplus=softplus, return_last_state=last)
    except (ValueError, TypeError) as error:
        assert any(f"{name} " in str(error) for name in given_)
        return
    assert fitting is None or given_[wrong].shape == fitting.shape
    want = selective_scan_ref(*given_.values(), softplus, last)
    for a, b in zip(found, want) if last else ((found, want),):
        assert same(a, b, dtype)


@many
@given(batch=st.integers(0, 3), dim=st.integers(0, 40), length=st.integers(0, 40), width=st.integers(0, 6), with_bias=st.booleans(), activation=st.sampled_from((None, "silu", "swish", "relu", "")),
       wrong=st.sampled_from(("", "", "x", "weight", "bias")), dtype=dtypes, strange=st.sampled_from((0, 0, 1, 2, 3)))
def test_the_convolution(batch, dim, length, width, with_bias, activation, wrong, dtype, strange):
    """Any shape, width, activation and dtype; what does not fit is named."""
    torch.manual_seed(0)
    given_ = dict(x=made((batch, dim, length), dtype, strange), weight=made((dim, width), torch.float32), bias=torch.randn(dim) if with_bias else None)
    if wrong and given_[wrong] is not None:
        given_[wrong] = given_[wrong][None]
    try:
        found = causal_conv1d_fn(**given_, activation=activation)
    except (ValueError, TypeError) as error:
        assert any(f"{name} " in str(error) for name in given_) or f"activation={activation!r}" in str(error)
        return
    assert activation in (None, "silu", "swish") and not (wrong and given_[wrong] is not None)
    assert same(found, causal_conv1d_ref(**given_, activation=activation), dtype)
