"""The kernels as differentiable PyTorch functions, and the public operators.

Each function has its reference in `reference`, which also gives the derivatives of its derivatives. Which of the two is taken: `paths`.
"""

import math

import torch

from .paths import MISSING, fits, outside_autocast, over_batch
from .reference import causal_conv1d_ref, mamba_inner_ref, selective_scan_ref

if not MISSING:
    import numpy as np

    from .conv import conv_backward_batch, conv_batch
    from .lanes import LOG2E, width
    from .scan import Gradients, Inputs, Kept, Layout, Weights, inside_backward_batch, inside_batch, marks_rows
    NO_ENDS = np.empty((0, 1, 1), np.float32)

STATES = 4  # of a tile: independent work for the processor while a sum waits for the one before


# Layout

def array(t):
    """A tensor as a C-contiguous numpy array, without a copy where it is contiguous already; numpy copies little ones faster, PyTorch large ones."""
    t = t.detach().resolve_neg()
    return np.ascontiguousarray(t.numpy()) if t.numel() < 1 << 15 else t.contiguous().numpy()


def arrays(*tensors):
    return [array(t) for t in tensors]


def row(t, dim):
    """(1, dim) from (dim,), zeros from None."""
    return np.zeros((1, dim), np.float32) if t is None else array(t).reshape(1, dim)


def channels(dim: int):
    """(W, U) for kernels over `dim` channels."""
    return width(math.gcd(dim, 16)), width(STATES)


def blocked(A):
    """(..., blocks, N, W) from (..., dim, N), both numpy, N filled up with zeros to whole tiles: how the kernels want A and states."""
    *rest, dim, N = A.shape
    W = math.gcd(dim, 16)
    out = np.zeros((*rest, dim // W, -(-N // STATES) * STATES, W), np.float32)
    out[..., :N, :] = A.reshape(*rest, dim // W, W, N).swapaxes(-1, -2)
    return out


def unblocked(A, N):
    """The opposite, of tensors: (..., dim, N)."""
    return A[..., :N, :].transpose(-1, -2).flatten(-3, -2)


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
        skip, bias = (row(t, dim) for t in (D, delta_bias))
        z_ = u_ if z is None else array(z.transpose(1, 2))
        layout = Layout(bool(softplus), z is not None, N, 0, N, 0)
        return layout, Weights(np.empty((0, dim), np.float32), bias, A2, skip), Inputs(u_, low, BC, z_)

    @staticmethod
    @outside_autocast
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, softplus):
        (batch, dim, length), N = u.shape, A.shape[1]
        layout, weights, inputs = SelectiveScan.call(u, delta, A, B, C, D, z, delta_bias, softplus)
        blocks, whole, W = weights.A.shape
        out = u.new_empty(batch, length, dim)
        y = torch.empty_like(out) if layout.gated else out
        marks, last = u.new_empty(batch, marks_rows(length, blocks, whole), W), u.new_empty(batch, blocks * whole, W)
        over_batch(inside_batch, batch, *channels(dim), layout, weights, inputs, Kept(y.numpy(), marks.numpy()), out.numpy(), last.numpy())
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, y if layout.gated else None, marks)
        ctx.set_materialize_grads(False)
        ctx.softplus = softplus
        return out, unblocked(last.view(batch, blocks, whole, W), N).contiguous()

    @staticmethod
    @outside_autocast
    def backward(ctx, dout, dlast):
        *given, y, marks = ctx.saved_tensors
        if dout is None and dlast is None:
            return (None,) * 9
        if torch.is_grad_enabled() or not fits(dout, dlast):
            def reference(*inputs):
                out, last = selective_scan_ref(*inputs, ctx.softplus, return_last_state=True)
                return out.transpose(1, 2), last
            return *plain_gradients(ctx, reference, given, (dout, dlast))[:8], None
        layout, weights, inputs = SelectiveScan.call(*given, ctx.softplus)
        (batch, length, dim), N = inputs.u.shape, layout.N
        dout = marks.new_zeros(batch, length, dim) if dout is None else dout
        empty = lambda *shape: np.empty(shape, np.float32)
        ends = NO_ENDS if dlast is None else blocked(array(dlast)).reshape(batch, -1, weights.A.shape[2])
        dinputs = Inputs(*(np.empty_like(a) for a in inputs))
        gradients = Gradients(empty(batch, 1, dim), empty(batch, *weights.A.shape), empty(batch, 1, dim))
        kept = Kept(inputs.u if y is None else y.numpy(), marks.numpy())
        over_batch(inside_backward_batch, batch, *channels(dim), layout, weights, inputs, kept, array(dout), ends, dinputs, gradients)
        du, ddelta, dBC, dz = (torch.from_numpy(a).transpose(1, 2) for a in dinputs)
        dbias, dA, dD = (torch.from_numpy(a).sum(0) for a in gradients)
        results = du, ddelta, unblocked(dA, N), dBC[:, :N], dBC[:, N:], dD[0], dz, dbias[0]
        return *(g if needed else None for g, needed in zip(results, ctx.needs_input_grad)), None


class CausalConv(torch.autograd.Function):
    """causal_conv1d_fn in float32, time-major: x (batch, dim, length) to (batch, length, dim)."""

    @staticmethod
    def call(x, weight, bias, silu):
        """(x, weight, bias, silu) for the kernels, which may read the first columns of a wider x."""
        return array(x.transpose(1, 2)), array(weight.t()), row(bias, len(weight)), silu

    @staticmethod
    @outside_autocast
    def forward(ctx, x, weight, bias, silu):
        out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
        over_batch(conv_batch, len(x), channels(x.shape[1])[0], *CausalConv.call(x, weight, bias, silu), out.numpy())
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
        dx, dweight = x.new_empty(batch, length, dim), x.new_empty(batch, weight.shape[1] + 1, dim)
        over_batch(conv_backward_batch, batch, channels(dim)[0], *CausalConv.call(*given, ctx.silu), array(dout), dx.numpy(), dweight.numpy())
        dweight = dweight.sum(0)
        results = dx.transpose(1, 2), dweight[:-1].t(), dweight[-1]
        return *(g if needed else None for g, needed in zip(results, ctx.needs_input_grad)), None


class MambaInner(torch.autograd.Function):
    """mamba_inner_ref in float32, the gradient by hand. The product with W_x is PyTorch's, all else is in two kernels."""

    @staticmethod
    def weights(conv_weight, conv_bias, W_dt, dt_bias, A, D):
        """(taps, their bias, layout, weights) for the kernels."""
        (dim, N), R = A.shape, W_dt.shape[1]
        weights = Weights(array(W_dt.t()), row(dt_bias, dim), blocked(array(A) * LOG2E), row(D, dim))
        return array(conv_weight.t()), row(conv_bias, dim), Layout(True, True, N, R, R + N, dim), weights

    @staticmethod
    @outside_autocast
    def forward(ctx, xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D):
        (batch, length, _), dim, (W, U), xz_ = xz.shape, len(A), channels(len(A)), array(xz)
        taps, tap_bias, layout, weights = ctx.weights = MambaInner.weights(conv_weight, conv_bias, W_dt, dt_bias, A, D)
        u, y, out = (xz.new_empty(batch, length, dim) for _ in range(3))
        over_batch(conv_batch, batch, W, xz_, taps, tap_bias, True, u.numpy())
        low = u.view(-1, dim) @ W_x.t()  # step sizes before W_dt, B, C: R + 2 N columns
        low_ = low.numpy().reshape(batch, length, -1)
        marks = xz.new_empty(batch, marks_rows(length, *weights.A.shape[:2]), W.size)
        inputs, kept = Inputs(u.numpy(), low_, low_, xz_), Kept(y.numpy(), marks.numpy())
        over_batch(inside_batch, batch, W, U, layout, weights, inputs, kept, out.numpy(), NO_ENDS)
        ctx.save_for_backward(xz, conv_weight, conv_bias, W_x, W_dt, dt_bias, A, D, u, low, y, marks)
        return out

    @staticmethod
    @outside_autocast
    def backward(ctx, dout):
        *given, u, low, y, marks = ctx.saved_tensors
        xz, conv_weight, W_x, W_dt, A = given[0], given[1], given[3], given[4], given[6]
        if torch.is_grad_enabled() or not fits(dout):
            return plain_gradients(ctx, lambda *inputs: [mamba_inner_ref(*inputs)], given, [dout])
        taps, tap_bias, layout, weights = ctx.weights
        (batch, length, dim), (W, U), needed = u.shape, channels(len(A)), ctx.needs_input_grad
        du, dxz, dlow = torch.empty_like(u), u.new_empty(batch, length, 2 * dim), torch.empty_like(low)
        dweight, dskip, dconv = (u.new_empty(batch, n, dim) for n in (W_dt.shape[1] + 1, 1, conv_weight.shape[1] + 1))
        dA, xz_, dxz_ = u.new_empty(batch, *weights.A.shape), array(xz), dxz.numpy()
        low_, dlow_ = (x.numpy().reshape(batch, length, -1) for x in (low, dlow))
        inputs, kept = Inputs(u.numpy(), low_, low_, xz_), Kept(y.numpy(), marks.numpy())
        dinputs, gradients = Inputs(du.numpy(), dlow_, dlow_, dxz_), Gradients(dweight.numpy(), dA.numpy(), dskip.numpy())
        over_batch(inside_backward_batch, batch, W, U, layout, weights, inputs, kept, array(dout), NO_ENDS, dinputs, gradients)
        du.view(-1, dim).addmm_(dlow, W_x)
        over_batch(conv_backward_batch, batch, W, xz_, taps, tap_bias, True, du.numpy(), dxz_, dconv.numpy())
        dweight, dconv = dweight.sum(0), dconv.sum(0)
        results = (dxz, dconv[:-1].t(), dconv[-1], dlow.t() @ u.view(-1, dim) if needed[3] else None, dweight[:-1].t(), dweight[-1],
                   unblocked(dA.sum(0), A.shape[1]), dskip.sum((0, 1)))
        return tuple(g if n else None for g, n in zip(results, needed))


# Public operators

def as_float32(tensors):
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


def causal_conv1d_fn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None) -> torch.Tensor:
    """Causal depthwise convolution as causal_conv1d's `causal_conv1d_fn`: x (batch, dim, length), weight (dim, width), bias (dim,).

    `activation`: None, "silu" or "swish". Returns (batch, dim, length) in the dtype of x, differentiable in every tensor.
    Raises ValueError for shapes that do not fit and for another activation, TypeError for a dtype that is not floating.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation={activation!r}: None, "silu" or "swish" is needed')
    check_tensors(x=x, weight=weight)
    if x.dim() != 3 or weight.dim() != 2 or not (x.shape[2] and weight.shape[1]):
        raise ValueError(f"x of shape {tuple(x.shape)}, weight of shape {tuple(weight.shape)}: (batch, dim, length) and (dim, width) are needed, "
                         "with a length and a width of at least 1")
    dim = x.shape[1]
    check("x", x, dict(x=(x, tuple(x.shape)), weight=(weight, (dim, weight.shape[1])), bias=(bias, (dim,))))
    if not fits(x, weight, bias):
        return causal_conv1d_ref(x, weight, bias, activation)
    return CausalConv.apply(*as_float32((x, weight, bias)), activation is not None).transpose(1, 2).to(x.dtype)


def check_tensors(**tensors):
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} of type {type(tensor).__name__}: a tensor is needed")


def check(first, like, wanted):
    """Compare shape, dtype and device of every tensor with what goes with `like`, the argument `first`; wanted: {name: (tensor or None, shapes)}."""
    for name, (tensor, shapes) in wanted.items():
        if tensor is None:
            continue
        check_tensors(**{name: tensor})
        shapes = shapes if isinstance(shapes, list) else [shapes]
        if tuple(tensor.shape) not in shapes:
            needed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: {needed} is needed beside {first} of shape {tuple(like.shape)}")
        if not (tensor.is_floating_point() or tensor.is_complex() and name in "ABC"):
            raise TypeError(f"{name} of dtype {tensor.dtype}: a floating dtype is needed")
        if tensor.device != like.device:
            raise ValueError(f"{name} on {tensor.device}: that of {first}, {like.device}, is needed")


def check_scan(u, delta, A, B, C, D, z, delta_bias):
    """Raise what selective_scan_fn says."""
    check_tensors(u=u, A=A, B=B, C=C)
    if u.dim() != 3 or A.dim() != 2 or not (u.shape[2] and A.shape[1]):
        raise ValueError(f"u of shape {tuple(u.shape)}, A of shape {tuple(A.shape)}: (batch, dim, length) and (dim, state) are needed, with a length "
                         "and a state of at least 1")
    for name, x in dict(B=B, C=C).items():
        if x.is_complex() and not A.is_complex():
            raise TypeError(f"{name} of dtype {x.dtype}: a floating dtype is needed beside A of dtype {A.dtype}")
    (batch, dim, length), N = u.shape, A.shape[1]

    def coefficients(x):
        groups = x.shape[1] if x.dim() == 4 and x.shape[1] and dim % x.shape[1] == 0 else 1
        steps = 2 * length if A.is_complex() and not x.is_complex() else length
        return [(batch, N, steps), (batch, groups, N, steps), (dim, N)]
    whole = tuple(u.shape)
    check("u", u, dict(u=(u, whole), delta=(delta, whole), A=(A, (dim, N)), B=(B, coefficients(B)), C=(C, coefficients(C)), D=(D, (dim,)),
                       z=(z, whole), delta_bias=(delta_bias, (dim,))))


def decays(delta, A, delta_bias, delta_softplus):
    """Whether no exp(delta A) is over 1, as in every Mamba; the fused kernel's 2**x holds for such exponents."""
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    return not (A > 0).any() and (delta_softplus or not (steps < 0).any())


def selective_scan_fn(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None = None,
                      z: torch.Tensor | None = None, delta_bias: torch.Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False):
    """Selective scan with the signature, layouts and results of mamba_ssm's `selective_scan_fn` (Mamba paper, Section 3.3).

    u, delta, z (batch, dim, length); A (dim, state); B, C (batch, state, length), (batch, groups, state, length) or (dim, state);
    D, delta_bias (dim,). Returns (batch, dim, length) in the dtype of u and, if asked, the last state (batch, dim, state); both are
    differentiable in every tensor. float32 and half precision on the CPU run in the fused kernel, in float32. The plain recurrence
    (`selective_scan_ref`) takes all else: other dtypes and devices, B or C (dim, state), complex A (its B and C (..., 2 length), real and
    imaginary parts side by side), states that could grow (delta A > 0), PyTorch's transforms and tracers, second derivatives.
    Raises ValueError for shapes and devices that do not fit, TypeError for what is no floating tensor.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    given = u, delta, A, B, C, D, z, delta_bias
    if not (fits(*given) and B.dim() > 2 and C.dim() > 2 and decays(delta, A, delta_bias, delta_softplus)):
        return selective_scan_ref(*given, delta_softplus, return_last_state)
    out, last = grouped_scan(*as_float32(given), delta_softplus)
    out = out.transpose(1, 2).to(u.dtype)
    return (out, last) if return_last_state else out


def grouped_scan(u, delta, A, B, C, D, z, delta_bias, softplus):
    """SelectiveScan for each group of channels that share B and C."""
    groups = math.lcm(*(x.shape[1] if x.dim() == 4 else 1 for x in (B, C)))
    B, C = (x if x.dim() == 4 else x[:, None] for x in (B, C))
    part = lambda x, axis, g: x if x is None or groups == 1 else x.chunk(groups, axis)[g]
    results = [SelectiveScan.apply(part(u, 1, g), part(delta, 1, g), part(A, 0, g), B[:, g * B.shape[1] // groups], C[:, g * C.shape[1] // groups],
                                   part(D, 0, g), part(z, 1, g), part(delta_bias, 0, g), softplus) for g in range(groups)]
    return results[0] if groups == 1 else [torch.cat(parts, axis) for parts, axis in zip(zip(*results), (2, 1))]
