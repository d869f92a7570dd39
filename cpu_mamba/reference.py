"""Convolution, selective scan and Mamba block in plain PyTorch: what the tests compare with, and what runs where the kernels do not.

Any floating dtype, any device, differentiable any number of times, and open to PyTorch's transforms and tracers.
"""

import torch
import torch.nn.functional as F


def work_dtype(*tensors):
    """The dtype to compute in: that of the widest tensor, at least float32."""
    return torch.float64 if any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in tensors) else torch.float32


def causal_conv1d_ref(x, weight, bias=None, activation=None, seq_idx=None):
    """Causal depthwise convolution as causal_conv1d's: x (batch, dim, length), weight (dim, width), bias (dim,); in the dtype of x.

    `activation` None, "silu" or "swish". `seq_idx` (batch, length) says which of the sequences that lie one behind the other a token belongs to:
    it sees tokens of the same number alone, and one of a negative number is padding, whose output is 0.
    """
    dtype, (dim, width), length = work_dtype(x, weight, bias), weight.shape, x.shape[-1]
    padded = F.pad(x.to(dtype), (width - 1, 0))
    taps = [padded[..., k : k + length] for k in range(width)]
    if seq_idx is not None:
        numbers = F.pad(seq_idx, (width - 1, 0), value=-1)[:, None]
        taps = [torch.where(numbers[..., k : k + length] == seq_idx[:, None], tap, 0.0) for k, tap in enumerate(taps)]
    out = sum(weight[:, k, None].to(dtype) * tap for k, tap in enumerate(taps))
    if bias is not None:
        out = out + bias[:, None].to(dtype)
    if seq_idx is not None:
        out = torch.where(seq_idx[:, None] < 0, 0.0, out)
    return (out if activation is None else F.silu(out)).to(x.dtype)


def over_channels(coefficients, dim, dtype):
    """B or C as (batch or 1, dim or 1, state, length or 1); for a complex dtype pairs along the length are the parts of a number, as in mamba_ssm."""
    if coefficients.dim() == 2:  # (dim, state)
        return coefficients[None, :, :, None].to(dtype)
    if dtype.is_complex and not coefficients.is_complex():
        parts = coefficients.to(torch.float32 if dtype == torch.complex64 else torch.float64).unflatten(-1, (-1, 2))
        coefficients = torch.view_as_complex(parts.contiguous())
    if coefficients.dim() == 4:  # (batch, groups, state, length)
        return coefficients.repeat_interleave(dim // coefficients.shape[1], 1).to(dtype)
    return coefficients[:, None].to(dtype)


def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, initial_state=None):
    """The recurrence as the paper writes it (Mamba paper, eq. 2), step by step, with mamba_ssm's arguments.

    u, delta, z (batch, dim, length); A (dim, state); B, C (batch, state, length), (batch, groups, state, length) or (dim, state);
    D, delta_bias (dim,). A may be complex; B and C that vary then hold real and imaginary parts side by side, (..., 2 length).
    Returns (batch, dim, length) in the dtype of u and, if asked, the last state (batch, dim, state). `initial_state` (batch, dim, state): the state
    before the first token, else zeros.
    """
    real = work_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    full = real if not A.is_complex() else torch.complex64 if real == torch.float32 else torch.complex128
    dim, x, delta = u.shape[1], u.to(real), delta.to(real)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None].to(real)
    if delta_softplus:
        delta = F.softplus(delta)
    A, B, C = A.to(full), over_channels(B, dim, full), over_channels(C, dim, full)
    h = torch.zeros_like(x[:, :, :1] * A) if initial_state is None else initial_state.to(full)  # (batch, dim, state)
    ys = []
    for t in range(u.shape[2]):
        here = min(t, B.shape[3] - 1), min(t, C.shape[3] - 1)
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * x[:, :, t])[..., None] * B[..., here[0]]
        ys.append((h * C[..., here[1]]).sum(-1))
    y = torch.stack(ys, -1)
    if A.is_complex():
        y = y.real * 2
    if D is not None:
        y = y + D[:, None].to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    y = y.to(u.dtype)
    return (y, h) if return_last_state else y


def mamba_inner_ref(xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D):
    """All of a Mamba block between its outer projections (Mamba paper, Figure 3): xz (batch, length, 2 d_inner) to (batch, length, d_inner).

    conv_weight (d_inner, d_conv); conv_bias, dt_bias, D (d_inner,); W_x (dt_rank + 2 d_state, d_inner); W_dt (d_inner, dt_rank);
    A (d_inner, d_state).
    """
    x, z = xz.transpose(1, 2).chunk(2, 1)
    u = causal_conv1d_ref(x, conv_weight, conv_bias, "silu")
    low, B, C = (W_x @ u).split([W_dt.shape[1], A.shape[1], A.shape[1]], 1)
    return selective_scan_ref(u, W_dt @ low, A, B, C, D, z, dt_bias, delta_softplus=True).transpose(1, 2)
