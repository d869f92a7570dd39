"""The fused training step of a model `embedding -> [norm -> mixer -> add] x 2 -> norm -> head` that answers at the last position.

`fused_step(spec)` takes a plain description of the model and gives `step`: `loss = step(tokens, values)` sets `.grad` of every parameter on the way,
`step.logits(tokens)` answers. One call of a compiled kernel does all of it, one sequence after the other, the batch shared over PyTorch's threads.
Where it gives None, the model is not one that the kernels can represent, and its caller takes the plain path.

The step reads the tensors of its spec and knows nothing of modules around them: whoever makes a spec sees to it that no hook, parametrisation or
replaced module stands between them. It computes in float32 whatever `torch.autocast` says, and sets gradients whatever `torch.no_grad` says.
"""

import functools
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .paths import available, over_batch

if available():
    from .attention import AttentionPlan
    from .dense import LANES, NormPlan
    from .lanes import WidthValue
    from .mamba_step import MambaPlan
    from .step_kernel import StepPlan, step as step_kernel


class NormSpec(NamedTuple):
    """LayerNorm or, where `rms`, RMSNorm: weight (d,), bias (d,) or None."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, norm: nn.LayerNorm | nn.RMSNorm) -> "NormSpec":
        """The description of a norm of PyTorch's."""
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        return cls(norm.weight, getattr(norm, "bias", None), eps, isinstance(norm, nn.RMSNorm))


class MambaSpec(NamedTuple):
    """A Mamba block (Mamba paper, Section 3.4), parameters as in `mamba_ssm.Mamba`; conv_bias may be None."""

    A_log: Tensor        # (d_inner, d_state)
    D: Tensor            # (d_inner,)
    in_proj: Tensor      # (2 d_inner, d)
    conv_weight: Tensor  # (d_inner, 1, d_conv)
    conv_bias: Tensor | None
    x_proj: Tensor       # (dt_rank + 2 d_state, d_inner)
    dt_proj: Tensor      # (d_inner, dt_rank)
    dt_bias: Tensor      # (d_inner,)
    out_proj: Tensor     # (d, d_inner)

    @classmethod
    def of(cls, mamba: nn.Module) -> "MambaSpec | None":
        """The description of a layer with the attributes of `mamba_ssm.Mamba`; None where a projection has a bias that there is no place for."""
        if any(projection.bias is not None for projection in (mamba.in_proj, mamba.x_proj, mamba.out_proj)):
            return None
        return cls(mamba.A_log, mamba.D, mamba.in_proj.weight, mamba.conv1d.weight, mamba.conv1d.bias, mamba.x_proj.weight, mamba.dt_proj.weight,
                   mamba.dt_proj.bias, mamba.out_proj.weight)


class AttentionSpec(NamedTuple):
    """Causal softmax attention without biases.

    `angles(length)` gives RoPE's angles (length, head width) as rotary-embedding-torch does, every one twice; they are asked for once for each
    length and must not be trained. None: no rotation.
    """

    qkv: Tensor  # (3 d, d): queries, keys, values, each head by head
    out: Tensor  # (d, d)
    heads: int
    angles: Callable[[int], Tensor] | None = None


class StepSpec(NamedTuple):
    """A model of two mixers: norms[0] and [1] stand before them, norms[2] before the head."""

    embedding: Tensor         # (K, d), fixed
    positions: Tensor | None  # (rows, d), learned, added to the embedding
    norms: tuple[NormSpec, NormSpec, NormSpec]
    mixers: tuple[MambaSpec | AttentionSpec, MambaSpec | AttentionSpec]
    head_weight: Tensor       # (K, d)
    head_bias: Tensor | None  # (K,)


def named_parameters(spec):
    """(name, tensor, shape it must have) of every trained parameter; ValueError where a part of the spec is of no known kind."""
    K, d = spec.embedding.shape
    rows = [] if spec.positions is None else [("positions", spec.positions, (len(spec.positions), d))]
    for k, norm in enumerate(spec.norms):
        rows += [(f"norms[{k}].weight", norm.weight, (d,)), (f"norms[{k}].bias", norm.bias, (d,))]
    for k, mixer in enumerate(spec.mixers):
        if isinstance(mixer, MambaSpec):
            (dim, N), R, width = mixer.A_log.shape, mixer.dt_proj.shape[-1], mixer.conv_weight.shape[-1]
            shapes = ((dim, N), (dim,), (2 * dim, d), (dim, 1, width), (dim,), (R + 2 * N, dim), (dim, R), (dim,), (d, dim))
            rows += [(f"mixers[{k}].{name}", getattr(mixer, name), shape) for name, shape in zip(MambaSpec._fields, shapes)]
        elif isinstance(mixer, AttentionSpec):
            rows += [(f"mixers[{k}].qkv", mixer.qkv, (3 * d, d)), (f"mixers[{k}].out", mixer.out, (d, d))]
        else:
            raise ValueError(f"mixers[{k}] is a {type(mixer).__name__}: a MambaSpec or an AttentionSpec is needed")
    rows += [("head_weight", spec.head_weight, (K, d)), ("head_bias", spec.head_bias, (K,))]
    optional = ("].bias", ".conv_bias", "head_bias")
    return [(name, tensor, shape) for name, tensor, shape in rows if tensor is not None or not name.endswith(optional)]


def plain(tensor):
    """Whether it is float32 on a CPU, in memory of its own, with no class or hook that would see what is done with it."""
    return (type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.dtype == torch.float32 and tensor.layout == torch.strided
            and not tensor._backward_hooks and not tensor._post_accumulate_grad_hooks)


def extent(tensor):
    """Where its memory begins and ends, in bytes."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * size


def misfit(spec):
    """Why the kernels cannot take a model, or None where they can."""
    V = spec.embedding
    if not plain(V) or V.dim() != 2 or V.requires_grad or not V.numel():
        return "embedding: a fixed float32 matrix on the CPU is needed"
    if len(spec.mixers) != 2 or len(spec.norms) != 3:
        return f"{len(spec.mixers)} mixers and {len(spec.norms)} norms: 2 and 3 are needed"
    try:
        parameters = named_parameters(spec)
    except (AttributeError, ValueError, IndexError) as error:
        return str(error)
    for name, p, shape in parameters:
        if not isinstance(p, Tensor) or tuple(p.shape) != shape or not p.numel():
            return f"{name}: a tensor of shape {shape} is needed"
        if not plain(p) or not p.requires_grad or not p.is_leaf:
            return f"{name}: a trained float32 leaf on the CPU without hooks is needed"
        if extent(p)[1] - extent(p)[0] < 4 * p.numel():
            return f"{name}: its elements share memory"
    places = sorted(extent(p) for p in (V, *(p for _, p, _ in parameters)))
    if any(end > start for (_, end), (start, _) in zip(places, places[1:])):
        return "two of the tensors share memory"
    return next(filter(None, map(functools.partial(mixer_misfit, spec), range(2))), None)


def mixer_misfit(spec, k):
    """What `misfit` says of mixer k, whose tensors have shapes that fit."""
    mixer, d = spec.mixers[k], spec.embedding.shape[1]
    if isinstance(mixer, MambaSpec):
        if len(mixer.A_log) % LANES.size:
            return f"mixers[{k}]: d_inner={len(mixer.A_log)}: a multiple of {LANES.size} is needed"
        return "positions: with Mamba as the first layer there must be none" if k == 0 and spec.positions is not None else None
    if not isinstance(mixer.heads, int) or mixer.heads < 1 or d % mixer.heads:
        return f"mixers[{k}]: heads={mixer.heads}: a divisor of d={d} is needed"
    if mixer.angles is not None:
        width, angles = d // mixer.heads, mixer.angles(2)
        if width % 2 or tuple(angles.shape) != (2, width) or angles.requires_grad:
            return f"mixers[{k}]: angles must be fixed and of shape (length, {width}), an even head width"
    return None


def fused_step(spec: StepSpec) -> "FusedStep | None":
    """The training step of a model in one compiled kernel, or None where it cannot be: the caller then takes the plain path.

    None without Numba, for tensors that are not float32 on the CPU, that are frozen (a trained embedding likewise), no leaves, hooked, of a
    subclass, or share memory, for shapes that do not fit each other, a d_inner that is no multiple of 16, and learned positions before Mamba.
    """
    return None if not available() or misfit(spec) else FusedStep(spec)


def flat_view(tensors):
    """The float32 vector that the tensors make up, in any order and without gaps, as a NumPy array in place; or None."""
    places, first = sorted(extent(t) for t in tensors), min(tensors, key=Tensor.data_ptr)
    if (any(end != start for (_, end), (start, _) in zip(places, places[1:])) or not all(t.is_contiguous() for t in tensors)
            or len({t.untyped_storage().data_ptr() for t in tensors}) > 1):
        return None
    return first.detach().as_strided((sum(t.numel() for t in tensors),), (1,)).numpy()


def offsets_in(flat, tensors):
    """Where in `flat` each of the tensors begins."""
    return [(t.data_ptr() - flat.ctypes.data) // 4 for t in tensors]


def turns(angles, length):
    """cos and sin of RoPE's angles, (length, pairs of a head), as the kernel wants them; of no rows without RoPE."""
    table = np.empty((0, 1), np.float32) if angles is None else angles(length).detach()[:, ::2].float().contiguous().numpy()
    return np.cos(table), np.sin(table)


def kernel_plan(spec, at, length):
    """The kernel's own description of a model, whose parameters begin at `at` (by name), for one length."""
    d, place = spec.embedding.shape[1], lambda name: at.get(name, -1)
    layers = []
    for k, mixer in enumerate(spec.mixers):
        if isinstance(mixer, MambaSpec):
            shape = (d, *mixer.A_log.shape, mixer.dt_proj.shape[1], mixer.conv_weight.shape[2])
            layers.append(MambaPlan(*(place(f"mixers[{k}].{name}") for name in MambaSpec._fields), *shape, table=k == 0, last=k == 1))
        else:
            layers.append(AttentionPlan(place(f"mixers[{k}].qkv"), place(f"mixers[{k}].out"), WidthValue(d // mixer.heads), mixer.heads,
                                        *turns(mixer.angles, length), table=False, last=k == 1))
    norms = tuple(NormPlan(place(f"norms[{k}].weight"), place(f"norms[{k}].bias"), d, np.float32(n.eps), n.rms) for k, n in enumerate(spec.norms))
    return StepPlan(*layers, norms, place("positions"), place("head_weight"), place("head_bias"))


class FusedStep:
    """The training step of a model (see `fused_step`). Parameters may be changed in place or moved between calls, as long as they still fit.

    Where all parameters lie in one vector, as `flatten_parameters` puts them, and their gradients in another in the same order, the kernel works in
    place; elsewhere they are gathered and the gradients set one by one.
    """

    def __init__(self, spec):
        self.spec = spec
        self.names, self.parameters, _ = zip(*named_parameters(spec))
        self.state, self.gradient_state = None, None

    def __call__(self, tokens: Tensor, values: Tensor) -> Tensor:
        """The mean cross-entropy of a batch (a scalar), tokens (n, length) and values (n,) int64; overwrites `.grad` of every parameter.

        Raises TypeError for other dtypes, ValueError for other shapes, an empty batch, a length under 2 or past the table of positions, tokens or
        values outside 0 .. K - 1, and where the model no longer fits.
        """
        self.check("tokens", tokens, 2)
        self.check("values", values, 1)
        if len(values) != len(tokens):
            raise ValueError(f"values of shape {tuple(values.shape)}: ({len(tokens)},) is needed beside tokens of shape {tuple(tokens.shape)}")
        _, losses, gradients = self.run(tokens, values)
        self.set_gradients(gradients)
        return torch.from_numpy(losses).mean()

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (n, K) of the last position, without gradient; errors as above."""
        self.check("tokens", tokens, 2)
        return torch.from_numpy(self.run(tokens)[0])

    def check(self, name, tensor, dim):
        """Raise TypeError or ValueError unless it is an int64 tensor of the given dimension with values in 0 .. K - 1."""
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            raise TypeError(f"{name} of {getattr(tensor, 'dtype', type(tensor))}: a tensor of torch.int64 is needed")
        if tensor.dim() != dim or not tensor.numel() or tensor.device.type != "cpu":
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: {dim} axes, none of them empty, on the CPU are needed")
        numbers, K = tensor.numpy(), len(self.spec.embedding)
        low, high = numbers.min(), numbers.max()
        if low < 0 or high >= K:
            raise ValueError(f"{name} from {low} to {high}: they must lie in 0 .. K - 1 = {K - 1}")

    def run(self, tokens, values=None):
        """(logits (n, K), losses (n,), gradients (threads, parameters) for the flat parameters) as NumPy arrays; no gradients without values."""
        length, positions, V = tokens.shape[1], self.spec.positions, self.spec.embedding
        if length < 2 or positions is not None and length > len(positions):
            most = "" if positions is None else f", at most the {len(positions)} learned positions"
            raise ValueError(f"length={length}: at least 2 is needed{most}")
        plan, P = self.laid_out(length)
        values = np.empty(0, np.int64) if values is None else values.contiguous().numpy()
        G = np.zeros((torch.get_num_threads(), len(P) if len(values) else 1), np.float32)
        logits, losses = np.empty((len(tokens), len(V)), np.float32), np.zeros(len(tokens), np.float32)
        over_batch(step_kernel, len(tokens), tokens.contiguous().numpy(), values, V.contiguous().numpy(), plan, P, G, logits, losses)
        return logits, losses, G

    def laid_out(self, length):
        """(plan, flat parameters) for the kernel, the layout made anew where a tensor is no longer where, or what, it was."""
        state = [(p.data_ptr(), p.dtype, p.stride(), p.shape, p.requires_grad, p._backward_hooks, p._post_accumulate_grad_hooks)
                 for p in (self.spec.embedding, *self.parameters)]
        if state != self.state:
            if problem := misfit(self.spec):
                raise ValueError(f"the model no longer fits the fused step: {problem}")
            self.state, self.gradient_state = state, None
            self.views, self.flat = [p.detach().numpy() for p in self.parameters], flat_view(self.parameters)
            starts = np.cumsum([0, *(p.numel() for p in self.parameters)])[:-1].tolist()
            self.places = starts if self.flat is None else offsets_in(self.flat, self.parameters)
            self.plan = functools.lru_cache(64)(functools.partial(kernel_plan, self.spec, dict(zip(self.names, self.places))))
        return self.plan(length), np.concatenate([view.ravel() for view in self.views]) if self.flat is None else self.flat

    def set_gradients(self, G):
        """`.grad` of every parameter from one flat gradient for each thread: in place where they lie as the parameters do, else one by one."""
        gradients = [p.grad for p in self.parameters]
        state = [None if g is None else (g.data_ptr(), g.stride(), g.dtype) for g in gradients]
        if state != self.gradient_state:
            self.gradient = None if None in state else flat_view(gradients)
            if self.gradient is not None and offsets_in(self.gradient, gradients) != self.places:
                self.gradient = None
            self.gradient_state = state
        if self.gradient is not None:
            np.sum(G, 0, out=self.gradient)
            return
        with torch.inference_mode(False), torch.no_grad():  # so that gradients set here can be changed outside
            total = torch.from_numpy(G.sum(0))
            for p, at in zip(self.parameters, self.places):
                part = total[at : at + p.numel()].view(p.shape)
                if p.grad is None:
                    p.grad = part
                else:
                    p.grad.copy_(part)


def flatten_parameters(model: nn.Module) -> Tensor:
    """All trained parameters of a model as views of one leaf tensor, in the order of `model.parameters()`, their gradients as views of its own.

    An optimiser of the one tensor then takes one fused call, not dozens, and `FusedStep` works in place. Frozen parameters stay where they are.
    Raises ValueError where there is no trained parameter, where two share memory, and where they are of different dtypes or devices.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if len({(p.dtype, p.device) for p in parameters}) != 1:
        raise ValueError(f"parameters of {sorted({f'{p.dtype} on {p.device}' for p in parameters})}: one dtype on one device is needed")
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    places = sorted(extent(p) for p in parameters if p.numel())
    if len(names) > len(parameters) or any(end > start for (_, end), (start, _) in zip(places, places[1:])):
        raise ValueError("two of the parameters share memory: each must have its own")
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    flat.grad, offset = torch.zeros_like(flat), 0
    for p in parameters:
        here = slice(offset, offset + p.numel())
        p.data, p.grad = flat.detach()[here].view_as(p), flat.grad[here].view_as(p)
        offset += p.numel()
    return flat
