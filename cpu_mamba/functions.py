"""The kernels as differentiable PyTorch functions, and the public operators.

Each function has its reference in `reference`, which also gives the derivatives of its derivatives. Which of the two is taken: `paths`.
"""

import math

import torch
import torch.nn.functional as F

from .checks import check_conv, check_scan
from .paths import MISSING, fits, outside_autocast, over_shares, shares
from .reference import causal_conv1d_ref, mamba_inner_ref, selective_scan_ref

if not MISSING:
    import numpy as np

    from .chunks import backward_tasks, forward_tasks
    from .conv import conv_backward_tasks, conv_tasks
    from .lanes import LOG2E, width
    from .scan import STATES, Gradients, Inputs, Kept, Layout, Weights, marks_rows
    NO_STATES = np.empty((0, 1, 1), np.float32)

NARROW = 8  # rank of the step sizes up to which the kernels take W_dt themselves


# Layout

def array(t):
    """A tensor as a C-contiguous numpy array, without a copy where it is contiguous already; numpy copies little ones faster, PyTorch large ones."""
    t = t.detach().resolve_neg()
    return np.ascontiguousarray(t.numpy()) if t.numel() < 1 << 15 else t.contiguous().numpy()


def arrays(*tensors):
    """Each tensor through `array`."""
    return [array(t) for t in tensors]


def one_row(t, dim):
    """(1, dim) from (dim,), zeros from None."""
    return np.zeros((1, dim), np.float32) if t is None else array(t).reshape(1, dim)


def channels(dim: int):
    """(W, U) for kernels over `dim` channels."""
    return width(math.gcd(dim, 16)), STATES


def blocks_of(dim):
    """Blocks of `channels` that `dim` channels are."""
    return dim // math.gcd(dim, 16)


def blocked(A):
    """(..., blocks, N, W) from (..., dim, N), both numpy, N filled up with zeros to whole tiles: how the kernels want A and states."""
    *rest, dim, N = A.shape
    W = math.gcd(dim, 16)
    out = np.zeros((*rest, dim // W, -(-N // STATES.size) * STATES.size, W), np.float32)
    out[..., :N, :] = A.reshape(*rest, dim // W, W, N).swapaxes(-1, -2)
    return out


def unblocked(A, N):
    """The opposite, of tensors: (..., dim, N)."""
    return A[..., :N, :].transpose(-1, -2).flatten(-3, -2)


def states_of(states):
    """States (batch, dim, N) as the kernels want them, (batch, blocks N, W); None has no rows."""
    return NO_STATES if states is None else (of := blocked(array(states))).reshape(len(of), -1, of.shape[-1])


def empty(*shape):
    """An uninitialised float32 array."""
    return np.empty(shape, np.float32)


def gradients_of(groups, weights):
    """Room for the gradients of the weights, of every group of sequences."""
    blocks, _, W = weights.A.shape
    return Gradients(empty(groups, len(weights.W_dt) + 1, blocks * W), empty(groups, *weights.A.shape), empty(groups, 1, blocks * W))


def summed(a):
    """The sum over the first axis of a numpy array as a tensor."""
    return torch.from_numpy(a[0]) if len(a) == 1 else torch.from_numpy(a).sum(0)


def plain_gradients(ctx, reference, inputs, grads):
    """Gradients through `reference`: differentiable again if the backward pass itself is to be, and open to transforms of it."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t if t is None else t.view_as(t) for t in inputs]  # each its own, should one tensor be several arguments
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad) if needed]
        outputs, grads = zip(*((out, g) for out, g in zip(reference(*inputs), grads) if g is not None))
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=again, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


# Autograd functions

class SelectiveScan(torch.autograd.Function):
    """selective_scan_fn in float32, (out, last state): out time-major, (batch, length, dim); B, C (batch, state, length)."""

    @staticmethod
    def call(u, delta, A, B, C, D, z, delta_bias, softplus):
        """(layout, weights, inputs) for the kernels."""
        dim, N = A.shape
        u_, low, BC = arrays(u.transpose(1, 2), delta.transpose(1, 2), torch.cat((B, C), 1).transpose(1, 2))
        A2 = blocked(array(A) * LOG2E)
        skip, bias = (one_row(t, dim) for t in (D, delta_bias))
        z_ = u_ if z is None else array(z.transpose(1, 2))
        layout = Layout(bool(softplus), z is not None, N, 0, N, 0)
        return layout, Weights(np.empty((0, dim), np.float32), bias, A2, skip), Inputs(u_, low, BC, z_)

    @staticmethod
    @outside_autocast
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, softplus):
        (batch, dim, length), N = u.shape, A.shape[1]
        layout, weights, inputs = SelectiveScan.call(u, delta, A, B, C, D, z, delta_bias, softplus)
        blocks, whole, W = weights.A.shape
        out = u.new_empty(batch, length, dim)
        y = torch.empty_like(out) if layout.gated else out
        marks, last = u.new_empty(batch, marks_rows(length, blocks, whole), W), u.new_empty(batch, blocks * whole, W)
        kept = Kept(y.numpy(), marks.numpy())
        over_shares(forward_tasks, shares(batch, blocks), *channels(dim), layout, weights, inputs, kept, out.numpy(), states_of(initial_state), last.numpy())
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, y if layout.gated else None, marks)
        ctx.set_materialize_grads(False)
        ctx.softplus = softplus
        return out, unblocked(last.view(batch, blocks, whole, W), N).contiguous()

    @staticmethod
    @outside_autocast
    def backward(ctx, dout, dlast):
        *given, y, marks = ctx.saved_tensors
        if dout is None and dlast is None:
            return (None,) * 10
        if torch.is_grad_enabled() or not fits(dout, dlast):
            def reference(*inputs):
                out, last = selective_scan_ref(*inputs[:-1], ctx.softplus, True, inputs[-1])
                return out.transpose(1, 2), last
            return *plain_gradients(ctx, reference, given, (dout, dlast))[:9], None
        layout, weights, inputs = SelectiveScan.call(*given[:-1], ctx.softplus)
        (batch, length, dim), N = inputs.u.shape, layout.N
        dout = marks.new_zeros(batch, length, dim) if dout is None else dout
        parts, ends = shares(batch, len(weights.A)), states_of(dlast)
        blocks, whole, W = weights.A.shape
        starts = NO_STATES if given[-1] is None else empty(batch, blocks * whole, W)
        dinputs = Inputs(*map(np.empty_like, inputs))._replace(BC=empty(parts[0].split, batch, length, 2 * N))
        gradients = gradients_of(parts[0].groups, weights)
        kept = Kept(inputs.u if y is None else y.numpy(), marks.numpy())
        over_shares(backward_tasks, parts, *channels(dim), layout, weights, inputs, kept, array(dout), starts, ends, dinputs, gradients)
        du, ddelta, dBC, dz = (torch.from_numpy(a).transpose(-1, -2) for a in dinputs)
        dBC, dbias, dA, dD = summed(dBC.numpy()), *map(summed, gradients)
        dstate = unblocked(torch.from_numpy(starts).view(batch, blocks, whole, W), N) if len(starts) else None
        results = du, ddelta, unblocked(dA, N), dBC[:, :N], dBC[:, N:], dD[0], dz, dbias[0], dstate
        return *(g if needed else None for g, needed in zip(results, ctx.needs_input_grad)), None


class CausalConv(torch.autograd.Function):
    """causal_conv1d_fn in float32, time-major: x (batch, dim, length) to (batch, length, dim)."""

    @staticmethod
    def call(x, weight, bias, silu):
        """(x, weight, bias, silu) for the kernels, which may read the first columns of a wider x."""
        return array(x.transpose(1, 2)), array(weight.t()), one_row(bias, len(weight)), silu

    @staticmethod
    @outside_autocast
    def forward(ctx, x, weight, bias, silu):
        out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
        batch, dim, _ = x.shape
        over_shares(conv_tasks, shares(batch, blocks_of(dim)), channels(dim)[0], *CausalConv.call(x, weight, bias, silu), out.numpy())
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return out

    @staticmethod
    @outside_autocast
    def backward(ctx, dout):
        x, weight, bias = given = ctx.saved_tensors
        if torch.is_grad_enabled() or not fits(dout):
            reference = lambda *inputs: [causal_conv1d_ref(*inputs, "silu" if ctx.silu else None).transpose(1, 2)]
            return *plain_gradients(ctx, reference, given, [dout])[:3], None
        batch, dim, length = x.shape
        parts, dx = shares(batch, blocks_of(dim)), x.new_empty(batch, length, dim)
        dweight = empty(parts[0].groups, weight.shape[1] + 1, dim)
        over_shares(conv_backward_tasks, parts, channels(dim)[0], *CausalConv.call(*given, ctx.silu), array(dout), dx.numpy(), dweight)
        dweight = summed(dweight)
        results = dx.transpose(1, 2), dweight[:-1].t(), dweight[-1]
        return *(g if needed else None for g, needed in zip(results, ctx.needs_input_grad)), None


class MambaInner(torch.autograd.Function):
    """mamba_inner_ref in float32, the gradient by hand. The products with W_x and W_dt are PyTorch's, all else is in two kernels."""

    @staticmethod
    def steps(low, W_dt):
        """What kernels get for the step sizes, (batch length, columns): those before bias and softplus or, where they take W_dt as well, `low`."""
        return low[:, : W_dt.shape[1]] @ W_dt.t() if W_dt.shape[1] > NARROW else low

    @staticmethod
    @outside_autocast
    def forward(ctx, xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D):
        (batch, length, _), (dim, N), (W, U), xz_ = xz.shape, A.shape, channels(len(A)), array(xz)
        R, parts, shape = W_dt.shape[1], shares(batch, blocks_of(dim)), (batch, length, -1)
        taps, tap_bias = ctx.taps = array(conv_weight.t()), one_row(conv_bias, dim)
        weights = ctx.weights = Weights(array(W_dt.t())[: R if R <= NARROW else 0], one_row(dt_bias, dim), blocked(array(A) * LOG2E), one_row(D, dim))
        ctx.layout = layout = Layout(True, True, N, R, R + N, dim)
        u, y, out = (xz.new_empty(batch, length, dim) for _ in range(3))
        over_shares(conv_tasks, parts, W, xz_, taps, tap_bias, True, u.numpy())
        low = u.view(-1, dim) @ W_x.t()  # step sizes before W_dt, B, C: R + 2 N columns
        marks = xz.new_empty(batch, marks_rows(length, *weights.A.shape[:2]), W.size)
        inputs = Inputs(u.numpy(), MambaInner.steps(low, W_dt).view(shape).numpy(), low.view(shape).numpy(), xz_)
        over_shares(forward_tasks, parts, W, U, layout, weights, inputs, Kept(y.numpy(), marks.numpy()), out.numpy(), NO_STATES, NO_STATES)
        ctx.save_for_backward(xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D, u, low, y, marks)
        return out

    @staticmethod
    @outside_autocast
    def backward(ctx, dout):
        *given, u, low, y, marks = ctx.saved_tensors
        xz, conv_weight, W_x, W_dt, A = given[0], given[1], given[3], given[4], given[6]
        if torch.is_grad_enabled() or not fits(dout):
            return plain_gradients(ctx, lambda *inputs: [mamba_inner_ref(*inputs)], given, [dout])
        (batch, length, dim), N, R, (W, U), needed = u.shape, A.shape[1], W_dt.shape[1], channels(len(A)), ctx.needs_input_grad
        parts, xz_, steps = shares(batch, blocks_of(dim)), array(xz), MambaInner.steps(low, W_dt)
        du, dxz = torch.empty_like(u), u.new_empty(batch, length, 2 * dim)
        dlow, dconv = empty(parts[0].split, batch, length, R + 2 * N), empty(parts[0].groups, conv_weight.shape[1] + 1, dim)
        gradients, steps_ = gradients_of(parts[0].groups, ctx.weights), steps.view(batch, length, -1).numpy()
        inputs = Inputs(u.numpy(), steps_, low.view(batch, length, -1).numpy(), xz_)
        dinputs, kept = Inputs(du.numpy(), steps_, dlow, dxz.numpy()), Kept(y.numpy(), marks.numpy())
        over_shares(backward_tasks, parts, W, U, ctx.layout, ctx.weights, inputs, kept, array(dout), NO_STATES, NO_STATES, dinputs, gradients)
        dlow = summed(dlow).view(-1, R + 2 * N)
        if R > NARROW:  # the gradient of the step sizes is in their place
            dlow[:, :R] = steps @ W_dt
        du.view(-1, dim).addmm_(dlow, W_x)
        over_shares(conv_backward_tasks, parts, W, xz_, *ctx.taps, True, du.numpy(), dxz.numpy(), dconv)
        dconv, (dweight, dA, dskip) = summed(dconv), map(summed, gradients)
        dW_x = dlow.t() @ u.view(-1, dim) if needed[3] else None
        dW_dt = dweight[:R].t() if R <= NARROW else (low[:, :R].t() @ steps).t() if needed[4] else None  # faster than the transposed product
        results = dxz, dconv[:-1].t(), dconv[-1], dW_x, dW_dt, dweight[-1], unblocked(dA, N), dskip[0]
        return tuple(g if n else None for g, n in zip(results, needed))


# Public operators

def as_float32(tensors):
    """The tensors in float32, None as it is."""
    return [t if t is None or t.dtype == torch.float32 else t.float() for t in tensors]


def mamba_inner_fn(xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D):
    """mamba_inner_ref, fused where it can be: (batch, length, 2 d_inner) to (batch, length, d_inner), in the dtype of xz."""
    given = xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D
    if not fits(*given) or (A > 0).any():
        return mamba_inner_ref(*given)
    return fused_inner(*given)


def fused_inner(xz, *weights):
    """The same where everything `fits` and no A is over 0."""
    return MambaInner.apply(*as_float32((xz, *weights))).to(xz.dtype)


def causal_conv1d_fn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, seq_idx: torch.Tensor | None = None,
                     initial_states: torch.Tensor | None = None, return_final_states: bool = False,
                     final_states_out: torch.Tensor | None = None, activation: str | None = None):
    """Causal depthwise convolution as causal_conv1d's `causal_conv1d_fn`: x (batch, dim, length), weight (dim, width), bias (dim,).

    `initial_states` (batch, dim, width - 1) are the tokens before x, zeros where there are none; with `return_final_states` the last width - 1
    tokens come back beside the output, in `final_states_out` if that is given. `seq_idx` (batch, length): the sequences that x holds one behind the
    other, apart from each other; a negative number is padding. It takes the plain path. `activation`: None, "silu" or "swish".
    Returns (batch, dim, length) in the dtype of x, differentiable in every tensor. Raises ValueError for shapes that do not fit and for another
    activation, TypeError for a dtype that is not floating and states of another dtype than x, NotImplementedError for seq_idx beside states.
    """
    check_conv(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    whole, width = x if initial_states is None else torch.cat((initial_states, x), 2), weight.shape[1]
    if seq_idx is not None or not fits(whole, weight, bias):
        out = causal_conv1d_ref(whole, weight, bias, activation, seq_idx)
    else:
        out = CausalConv.apply(*as_float32((whole, weight, bias)), activation is not None).transpose(1, 2).to(x.dtype)
    out = out if initial_states is None else out[..., width - 1 :]
    if not return_final_states:
        return out
    states = F.pad(whole, (width - 1 - whole.shape[2], 0))
    return out, states if final_states_out is None else final_states_out.copy_(states)


def decays(delta, A, delta_bias, delta_softplus):
    """Whether no exp(delta A) is over 1, as in every Mamba; the fused kernel's 2**x holds for such exponents."""
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    return not (A > 0).any() and (delta_softplus or not (steps < 0).any())


def selective_scan_fn(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None = None,
                      z: torch.Tensor | None = None, delta_bias: torch.Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False, initial_state: torch.Tensor | None = None):
    """Selective scan with the signature, layouts and results of mamba_ssm's `selective_scan_fn` (Mamba paper, Section 3.3).

    u, delta, z (batch, dim, length); A (dim, state); B, C (batch, state, length), (batch, groups, state, length) or (dim, state);
    D, delta_bias (dim,). Returns (batch, dim, length) in the dtype of u and, if asked, the last state (batch, dim, state); both are
    differentiable in every tensor. `initial_state` (batch, dim, state), beyond mamba_ssm's: the last state of what came before, else zeros.
    float32 and half precision on the CPU run in the fused kernel, in float32. The plain recurrence (`selective_scan_ref`) takes all else: other
    dtypes and devices, complex A (its B and C (..., 2 length), real and imaginary parts side by side), states that could grow (delta A > 0),
    PyTorch's transforms and tracers, second derivatives.
    Raises ValueError for shapes and devices that do not fit, TypeError for what is no floating tensor.
    """
    given = u, delta, A, B, C, D, z, delta_bias, initial_state
    check_scan(*given)
    if not (fits(*given) and decays(delta, A, delta_bias, delta_softplus)):
        return selective_scan_ref(*given[:-1], delta_softplus, return_last_state, initial_state)
    out, last = (grouped_scan if B.dim() > 2 and C.dim() > 2 else constant_scan)(*as_float32(given), delta_softplus)
    out = out.transpose(1, 2).to(u.dtype)
    return (out, last) if return_last_state else out


def grouped_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus):
    """SelectiveScan for each group of channels that share B and C."""
    groups = math.lcm(*(x.shape[1] if x.dim() == 4 else 1 for x in (B, C)))
    B, C = (x if x.dim() == 4 else x[:, None] for x in (B, C))
    part = lambda x, axis, g: x if x is None or groups == 1 else x.chunk(groups, axis)[g]
    results = [SelectiveScan.apply(part(u, 1, g), part(delta, 1, g), part(A, 0, g), B[:, g * B.shape[1] // groups], C[:, g * C.shape[1] // groups],
                                   part(D, 0, g), part(z, 1, g), part(delta_bias, 0, g), part(initial_state, 1, g), softplus) for g in range(groups)]
    return results[0] if groups == 1 else [torch.cat(parts, axis) for parts, axis in zip(zip(*results), (2, 1))]


def constant_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus):
    """SelectiveScan where B or C is (dim, state): each state of a channel is a channel of one state, its input times B and its output times C.

    Needs memory for all states of all tokens, as the plain recurrence does under autograd.
    """
    (batch, dim, length), N = u.shape, A.shape[1]
    B, C = (x[None, :, :, None] if x.dim() == 2 else (x if x.dim() == 4 else x[:, None]) for x in (B, C))
    B, C = (x.repeat_interleave(dim // x.shape[1], 1) for x in (B, C))  # (batch or 1, dim, state, length or 1)
    ones, bias = u.new_ones(batch, 1, length), None if delta_bias is None else delta_bias.repeat_interleave(N)
    first = None if initial_state is None else initial_state.reshape(batch, -1, 1)
    inputs = (u[:, :, None] * B).flatten(1, 2), delta.repeat_interleave(N, 1), A.reshape(-1, 1), ones, ones
    states, last = SelectiveScan.apply(*inputs, None, None, bias, first, softplus)
    out = (states.view(batch, length, dim, N) * C.permute(0, 3, 1, 2)).sum(-1)
    out = out if D is None else out + D * u.transpose(1, 2)
    return out if z is None else out * F.silu(z.transpose(1, 2)), last.view(batch, dim, N)
