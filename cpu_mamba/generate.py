"""One token at a time: the convolution and the recurrence with their states brought up to date in place, and a whole Mamba layer around them.

The kernels take plain float32 tensors on the CPU while no gradient is wanted; all else runs in plain PyTorch (`causal_conv1d_update_ref`,
`selective_state_update_ref`). A state that a kernel is to write must be C-contiguous, as every cache makes it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check, check_indices, check_tensors
from .functions import array, one_row
from .paths import MISSING, fits, over_batch, untouched
from .reference import causal_conv1d_ref, work_dtype

if not MISSING:
    from .lanes import width
    from .update import Form, Parameters, Token, conv_update_batch, state_update_batch

WORTH = 1 << 18  # states from which on threads share the sequences of a batch


# Reference

def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None):
    """causal_conv1d_update in plain PyTorch, any dtype and device."""
    steps = x if x.dim() == 3 else x[..., None]
    dtype = work_dtype(steps, conv_state, weight, bias)
    window = torch.cat((conv_state.to(dtype), steps.to(dtype)), -1)
    out = causal_conv1d_ref(window, weight, bias, activation)[..., -steps.shape[-1]:].to(x.dtype)
    conv_state.copy_(window[..., window.shape[-1] - conv_state.shape[-1]:])
    return out if x.dim() == 3 else out[..., 0]


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """selective_state_update in plain PyTorch, any dtype and device: one step of the recurrence (Mamba paper, eq. 2)."""
    dtype = work_dtype(state, x, dt, A, B, C, D, z, dt_bias)
    u, delta, A, B, C, D, z, dt_bias = (t if t is None else t.to(dtype) for t in (x, dt, A, B, C, D, z, dt_bias))
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    if state.dim() == 4:  # B, C (batch, heads, 1, state)
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], 1)[:, :, None] if t.dim() == 3 else t[:, None, None] for t in (B, C))
    else:  # (batch, 1, state)
        B, C = (t if t.dim() == 3 else t[:, None] for t in (B, C))
    h = torch.exp(delta[..., None] * A) * state.to(dtype, copy=True) + (delta * u)[..., None] * B
    state.copy_(h)
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y.to(x.dtype)


# From tensors to kernels

def lanes(size):
    """The vector width for kernels over `size` channels."""
    return width(math.gcd(size, 16))


def writable(*tensors) -> bool:
    """Whether a kernel may write these: float32, in C order."""
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def no_gradient(*tensors) -> bool:
    """Whether autograd wants no gradient for any of these (None passes)."""
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def kernels_take(*tensors) -> bool:
    """Whether the kernels compute what is said of these: plain float32 on the CPU, and no gradient wanted."""
    return fits(*tensors) and all(t is None or t.dtype == torch.float32 for t in tensors) and no_gradient(*tensors)


def changed(state):
    """Tell autograd of what a kernel wrote, as for every operation in place: who kept the old state for a gradient gets an error."""
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)


def share(kernel, batch, work, *args):
    """kernel(first, last, *args) for a batch, with threads where they are worth it."""
    if batch > 1 and work >= WORTH:
        over_batch(kernel, batch, *args)
    else:
        kernel(0, batch, *args)


def conv_token(x, conv_state, weight, bias, silu):
    """One token, x (batch, at least dim), weight (dim, width), by the kernel: (batch, dim)."""
    (batch, dim, columns), out = conv_state.shape, x.new_empty(len(x), len(weight))
    state = conv_state.detach().view(batch * dim, columns).numpy()
    share(conv_update_batch, batch, batch * dim * columns, lanes(dim), array(x), state, array(weight), one_row(bias, dim), silu, out.numpy())
    changed(conv_state)
    return out


def state_token(form, state, x, dt, A, B, C, D, z, dt_bias):
    """One token by the kernel: state (batch, dim, N), x, dt (batch, dim); the rest as `Parameters` and `Token` say. Returns (batch, dim)."""
    (batch, dim, N), out = state.shape, x.new_empty(x.shape)
    x_, B_ = array(x), array(B)
    token = Token(x_, array(dt), B_, B_ if C is B else array(C), x_ if z is None else array(z))
    parameters = Parameters(array(A), one_row(D, dim), one_row(dt_bias, dim))
    h = state.detach().view(batch * dim, N).numpy()
    share(state_update_batch, batch, batch * dim * N, lanes(dim), lanes(N), form, parameters, h, token, out.numpy())
    changed(state)
    return out


# States that lie elsewhere

def at_rows(name, indices, update, state, x, *others):
    """update(rows of state, x, *others) for the sequences whose index is not negative, their rows put back; zeros for the others, which are padding."""
    check_tensors(state=state, x=x)
    check_indices(name, indices, len(x) if x.dim() else 0, x.device)
    live = indices >= 0
    rows = indices[live].long()
    if rows.numel() and int(rows.max()) >= len(state):
        raise ValueError(f"{name} up to {int(rows.max())}: less than {len(state)}, the number of states, is needed")
    if len(rows.unique()) < len(rows):
        raise ValueError(f"{name}={indices.tolist()}: a state can be that of one sequence alone")
    if not rows.numel():
        return torch.zeros_like(x)
    picked = state[rows]
    found = update(picked, x[live], *(t[live] if isinstance(t, torch.Tensor) else t for t in others))
    state.index_copy_(0, rows, picked)
    out = found.new_zeros(x.shape)
    out[live] = found
    return out


def circular_update(x, conv_state, weight, bias, activation, lengths):
    """causal_conv1d_update where the input of token t stands in column t % columns, `lengths` tokens having come before."""
    check_indices("cache_seqlens", lengths, len(x), x.device)
    (batch, dim, columns), steps = conv_state.shape, x if x.dim() == 3 else x[..., None]
    n = steps.shape[2]

    def places(first, last):
        return ((lengths.long()[:, None] + torch.arange(first, last, device=x.device)) % columns)[:, None].expand(-1, dim, -1)
    out = causal_conv1d_update(x, conv_state.gather(2, places(1 - weight.shape[1], 0)), weight, bias, activation)
    kept = min(columns, n)
    conv_state.scatter_(2, places(n - kept, n), steps[..., n - kept:].to(conv_state.dtype))
    return out


# Public operators

def causal_conv1d_update(x: torch.Tensor, conv_state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                         activation: str | None = None, cache_seqlens: torch.Tensor | None = None,
                         conv_state_indices: torch.Tensor | None = None) -> torch.Tensor:
    """Causal depthwise convolution of the next token or tokens, as causal_conv1d's `causal_conv1d_update`.

    x (batch, dim) or (batch, dim, length); conv_state (batch, dim, columns), the last inputs, at least width - 1 of them, which move on in
    place; weight (dim, width), bias (dim,); `activation` None, "silu" or "swish". Returns the shape and dtype of x.
    `cache_seqlens` (batch,), the number of tokens before these: the columns are then a ring, in which token t stands at t modulo their number.
    `conv_state_indices` (batch,): conv_state has any number of rows, and that of sequence i is conv_state_indices[i]; where that is negative the
    sequence is padding, whose output is 0, and no state changes.
    One float32 token on the CPU runs in a kernel; all else, and what a gradient is wanted of, in plain PyTorch.
    Raises ValueError for shapes and devices that do not fit, for another activation and an index that is none of a row or comes twice, TypeError for a
    dtype that is not floating, and of indices not int32 or int64.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation={activation!r}: None, "silu" or "swish" is needed')
    if conv_state_indices is not None:
        def update(state, x, lengths):
            return causal_conv1d_update(x, state, weight, bias, activation, lengths)
        return at_rows("conv_state_indices", conv_state_indices, update, conv_state, x, cache_seqlens)
    check_tensors(x=x, conv_state=conv_state, weight=weight)
    if x.dim() not in (2, 3) or weight.dim() != 2 or conv_state.dim() != 3 or not weight.shape[1] or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(f"x of shape {tuple(x.shape)}, conv_state of shape {tuple(conv_state.shape)}, weight of shape {tuple(weight.shape)}: "
                         "(batch, dim) or (batch, dim, length), (batch, dim, at least width - 1) and (dim, width) are needed, "
                         "with a width of at least 1")
    batch, dim = x.shape[:2]
    check("x", x, dict(x=(x, tuple(x.shape)), conv_state=(conv_state, (batch, dim, conv_state.shape[2])), weight=(weight, (dim, weight.shape[1])),
                       bias=(bias, (dim,))))
    if cache_seqlens is not None and conv_state.shape[2]:
        return circular_update(x, conv_state, weight, bias, activation, cache_seqlens)
    one = x.dim() == 2 or x.shape[2] == 1
    if not (one and kernels_take(x, conv_state, weight, bias) and writable(conv_state)):
        return causal_conv1d_update_ref(x, conv_state, weight, bias, activation)
    return conv_token(x.reshape(batch, dim), conv_state, weight, bias, activation is not None).view(x.shape)


def selective_state_update(state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                           D: torch.Tensor | None = None, z: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None,
                           dt_softplus: bool = False, state_batch_indices: torch.Tensor | None = None) -> torch.Tensor:
    """One step of the selective scan, as mamba_ssm's `selective_state_update` (Mamba paper, eq. 2).

    state (batch, dim, dstate), brought up to date in place; x, dt, z (batch, dim); A (dim, dstate); B, C (batch, dstate) or
    (batch, 1, dstate); D, dt_bias (dim,). With heads: state (batch, nheads, dim, dstate), x, dt, z (batch, nheads, dim), A (nheads, dim,
    dstate), B, C (batch, ngroups, dstate), D, dt_bias (nheads, dim). Returns the shape and dtype of x.
    `state_batch_indices` (batch,): state has any number of rows, and that of sequence i is state_batch_indices[i]; where that is negative the
    sequence is padding, whose output is 0, and no state changes.
    float32 on the CPU runs in a kernel; all else, and what a gradient is wanted of, in plain PyTorch.
    Raises ValueError for shapes and devices that do not fit and an index that is none of a row or comes twice, TypeError for what is no tensor of
    real floating dtype, and of indices not int32 or int64.
    """
    if state_batch_indices is not None:
        def update(state, x, dt, B, C, z):
            return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        return at_rows("state_batch_indices", state_batch_indices, update, state, x, dt, B, C, z)
    check_update(state, x, dt, A, B, C, D, z, dt_bias)
    given = state, x, dt, A, B, C, D, z, dt_bias
    if not (kernels_take(*given) and writable(state)):
        return selective_state_update_ref(*given, dt_softplus)
    batch, N = len(state), state.shape[-1]
    flat = lambda t: t if t is None else t.reshape(batch, -1)
    groups = math.lcm(*(t.shape[1] if t.dim() == 3 else 1 for t in (B, C)))
    B, C = (t.repeat_interleave(groups // t.shape[1], 1) if t.dim() == 3 else t[:, None].expand(batch, groups, N) for t in (B, C))
    form = Form(bool(dt_softplus), z is not None, False, groups, 0, 0, 0)
    D, dt_bias = (t if t is None else t.reshape(-1) for t in (D, dt_bias))
    return state_token(form, state.view(batch, -1, N), flat(x), flat(dt), A.reshape(-1, N), flat(B), flat(C), D, flat(z), dt_bias).view(x.shape)


def check_update(state, x, dt, A, B, C, D, z, dt_bias):
    """Raise what selective_state_update says."""
    check_tensors(state=state, x=x, dt=dt, A=A, B=B, C=C)
    for name, tensor in dict(A=A, B=B, C=C).items():
        if tensor.is_complex():
            raise TypeError(f"{name} of dtype {tensor.dtype}: a floating dtype is needed")
    if state.dim() not in (3, 4) or not state.numel():
        raise ValueError(f"state of shape {tuple(state.shape)}: (batch, dim, dstate) or (batch, nheads, dim, dstate), none of them 0, is needed")
    batch, *dims, N = state.shape
    whole, heads = (batch, *dims), dims[0] if len(dims) == 2 else 1

    def coefficients(t):
        groups = t.shape[1] if t.dim() == 3 and t.shape[1] and heads % t.shape[1] == 0 else 1
        return [(batch, groups, N), (batch, N)]
    check("state", state, dict(state=(state, tuple(state.shape)), x=(x, whole), dt=(dt, whole), A=(A, (*dims, N)), B=(B, coefficients(B)),
                               C=(C, coefficients(C)), D=(D, tuple(dims)), z=(z, whole), dt_bias=(dt_bias, tuple(dims))))


# A layer

def token_fits(layer, x, conv_state, ssm_state) -> bool:
    """Whether `token_step` computes what the layer's submodules would: those before the output are as they were made."""
    conv, dt_proj, A_log, linear = layer.conv1d, layer.dt_proj, layer.A_log, (layer.in_proj, layer.x_proj, layer.dt_proj)
    if not (x.dim() == 3 and x.shape[1] == 1 and untouched(conv, nn.Conv1d) and all(untouched(part, nn.Linear) for part in linear)):
        return False
    if not kernels_take(x, conv_state, ssm_state, conv.weight, conv.bias, dt_proj.bias, A_log, layer.D, *(part.weight for part in linear)):
        return False
    dim, N = A_log.shape
    taps, batch = conv.weight.shape, len(x)
    return (writable(conv_state, ssm_state) and conv.dilation == (1,) and not torch.is_autocast_enabled("cpu") and taps == (dim, 1, taps[2])
            and conv_state.shape == (batch, dim, taps[2]) and ssm_state.shape == (batch, dim, N) and dt_proj.weight.shape[0] == dim)


def token_step(layer, x, conv_state, ssm_state, norms=()):
    """One token through a layer with the submodules of `Mamba`, where `token_fits`: x (batch, 1, d_model) to the same, both states in place.

    `norms`: functions of the step sizes before dt_proj, of B and of C, or none.
    """
    conv, dt_proj, (dim, N) = layer.conv1d, layer.dt_proj, layer.A_log.shape
    xz = layer.in_proj(x)[:, 0]
    u = conv_token(xz, conv_state, conv.weight[:, 0], conv.bias, True)
    low = layer.x_proj(u)
    R = low.shape[1] - 2 * N
    if norms:
        dt, B, C = (norm(t) for norm, t in zip(norms, low.split((R, N, N), 1)))
        b0 = c0 = 0
    else:
        dt, B, C, b0, c0 = low[:, :R], low, low, R, R + N
    form = Form(True, True, True, 1, b0, c0, dim)
    y = state_token(form, ssm_state, u, F.linear(dt, dt_proj.weight), layer.A_log, B, C, layer.D, xz, dt_proj.bias)
    return layer.out_proj(y[:, None])
