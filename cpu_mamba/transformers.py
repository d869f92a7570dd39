"""Mamba, Falcon-Mamba and Jamba of `transformers` on the CPU through this package's kernels, for training and for generation.

    from cpu_mamba import use_in_transformers
    use_in_transformers()              # from here on, or
    with use_in_transformers(): ...    # inside alone

Of each mixer class `forward` alone is replaced; models, weights and caches stay what they are. Made for transformers 4.50 to 5, whose forms
of the mixers are told apart by what they have: in older ones (with a `slow_forward`) padding is masked after in_proj, in newer ones before.
"""

import functools
import importlib
import threading

import torch
import torch.nn.functional as F
from torch import nn

from .functions import causal_conv1d_fn, fused_inner, selective_scan_fn
from .generate import token_fits, token_step
from .paths import fits, untouched

MIXERS = (("mamba", "MambaMixer"), ("falcon_mamba", "FalconMambaMixer"), ("jamba", "JambaMambaMixer"))
LOCK = threading.Lock()
USERS, ORIGINALS = [], {}  # handles not yet undone; {mixer class: its own forward}


class use_in_transformers:
    """Let `transformers` run the Mamba layers of its Mamba, Falcon-Mamba and Jamba models on the CPU through this package's kernels.

    As a call it holds until `undo()` of what it returns, as a context manager until the end of the block. It may be nested; the last one
    to end undoes it. It holds for the whole process: all threads, all models, made before or after. Logits and gradients agree to the
    rounding of float32. What the kernels do not represent takes transformers' own path: other dtypes and devices, tracers and compilers,
    an activation other than SiLU, hooks or replacements on submodules that the kernels pass by, several tokens after cached ones.
    Raises ImportError without `transformers`, RuntimeError where its version has other mixers than those of 4.50 to 5.
    """

    def __init__(self):
        with LOCK:
            if not USERS:
                ORIGINALS.update(patch(find_mixers()))
            USERS.append(self)

    def undo(self):
        """End it; again is nothing."""
        with LOCK:
            if self in USERS:
                USERS.remove(self)
                if not USERS:
                    restore()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()


def restore():
    """Give every mixer its own forward back."""
    while ORIGINALS:
        mixer, forward = ORIGINALS.popitem()
        mixer.forward = forward


def find_mixers():
    """The mixer classes, looked at before any is changed."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("use_in_transformers needs the package transformers, 4.50 or newer: pip install transformers") from error
    found, version = [], f"transformers {transformers.__version__}"
    for name, kind in MIXERS:
        try:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            mixer = getattr(module, kind)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"{version}: its {kind} is not found; 4.50 to 5 are supported") from error
        if not (hasattr(mixer, "slow_forward") or hasattr(module, "apply_mask_to_padding_states")):
            raise RuntimeError(f"{version}: how its {kind} works is not known here; 4.50 to 5 are supported")
        found.append((mixer, module))
    return found


def patch(found):
    """Replace the forward of each class; returns {class: its own forward}."""
    originals = {mixer: mixer.forward for mixer, _ in found}
    for mixer, module in found:
        mixer.forward = through_kernels(mixer, module, mixer.forward)
    return originals


def through_kernels(mixer, module, original):
    """forward of a mixer class, which calls `original` for what the kernels do not represent."""
    old = hasattr(mixer, "slow_forward")

    @functools.wraps(original)
    def forward(self, hidden_states, *args, **kwargs):
        if not (args or torch.compiler.is_compiling()) and type(self) is mixer and mixer in ORIGINALS:  # the layers of a model name their arguments
            given = {name: value for name, value in kwargs.items() if value is not None}
            mask, position = given.pop("attention_mask", None), given.pop("cache_position", None)
            cache = given.pop("cache", None) if "cache" in given else given.pop("cache_params", None)
            if not given and self.activation in ("silu", "swish"):
                y = run(self, module, old, hidden_states, cache, mask, position)
                if y is not None:
                    return y
        return original(self, hidden_states, *args, **kwargs)
    return forward


def run(mixer, module, old, x, cache, mask, position):
    """The mixer's output, or None, with nothing done yet, where only transformers' own path will do."""
    before = () if cache is None else earlier_states(cache, mixer, len(x), position)
    if before is None:
        return None
    if before:
        return token_step(mixer, x, *before, norms_of(mixer, module)) if mask is None and token_fits(mixer, x, *before) else None
    if not sequence_fits(mixer, x, mask):
        return None
    return whole_sequence(mixer, norms_of(mixer, module), old, x, cache, None if mask is not None and (mask == 1).all() else mask)


def sequence_fits(mixer, x, mask) -> bool:
    """Whether `whole_sequence` computes what the mixer says: conv1d and dt_proj, which it passes by, are as they were made."""
    conv, dt_proj = mixer.conv1d, mixer.dt_proj
    if not (untouched(conv, nn.Conv1d) and untouched(dt_proj, nn.Linear)) or x.dim() != 3 or mask is not None and mask.shape != x.shape[:2]:
        return False
    usual = (conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((1,), (conv.kernel_size[0] - 1,), (1,), "zeros")
    return usual and fits(x, conv.weight, conv.bias, dt_proj.weight, dt_proj.bias, mixer.A_log, mixer.D)


def norms_of(mixer, module):
    """What is done to the step sizes before dt_proj, to B and to C: normalised in Falcon-Mamba and Jamba."""
    if hasattr(mixer, "dt_layernorm"):
        return mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm
    if hasattr(mixer, "rms_eps"):
        return (functools.partial(module.rms_forward, variance_epsilon=mixer.rms_eps),) * 3
    return ()


def whole_sequence(mixer, norms, old, hidden, cache, mask):
    """A sequence from its first token on, (batch, length, d_model) to the same, the states after it into the cache if there is one."""
    conv, x_proj, dt_proj, D = mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.D
    masked = lambda t: t if mask is None else (t * mask[:, :, None]).to(t.dtype)
    xz, A = mixer.in_proj(hidden if old else masked(hidden)), -torch.exp(mixer.A_log.float())
    linear = untouched(x_proj, nn.Linear) and x_proj.bias is None and fits(xz, x_proj.weight)
    if cache is None and mask is None and not norms and linear and dt_proj.bias is not None:
        return mixer.out_proj(fused_inner(xz, conv.weight[:, 0], conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A, D))
    x, z = xz.chunk(2, 2)
    x, N = (masked(x) if old else x).transpose(1, 2), A.shape[1]
    u = masked(causal_conv1d_fn(x, conv.weight[:, 0], conv.bias, activation="silu").transpose(1, 2))
    low, B, C = x_proj(u).split((dt_proj.weight.shape[1], N, N), 2)
    if norms:
        low, B, C = (norm(t) for norm, t in zip(norms, (low, B, C)))
    u, delta, B, C, z = (t.transpose(1, 2) for t in (u, F.linear(low, dt_proj.weight), B, C, z))
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, dt_proj.bias, delta_softplus=True, return_last_state=True)
    if cache is not None:
        keep_states(cache, mixer, old, x, last)
    return mixer.out_proj(y.transpose(1, 2))


# Caches: tensors of each layer in `cache.layers` (newer), or lists `conv_states` and `ssm_states`, with a flag (Jamba) or a position beside

def earlier_states(cache, mixer, batch, position):
    """(conv_state, ssm_state) after earlier tokens, () if there are none, None where that cannot be told."""
    index, width = mixer.layer_idx, mixer.conv1d.kernel_size[0]
    if hasattr(cache, "update_recurrent_state"):
        layer = cache.layers[index]
        if not cache.has_previous_state(index):
            return ()
        states = [s[0] if isinstance(s, dict) else s for s in (layer.conv_states, layer.recurrent_states)]
        return None if getattr(layer, "record_past", False) or any(s is None for s in states) else tuple(states)
    if not (hasattr(cache, "conv_states") and hasattr(cache, "ssm_states")) or len(cache.ssm_states[index]) != batch:
        return None
    states = cache.conv_states[index], cache.ssm_states[index]
    if hasattr(cache, "has_previous_state"):
        return states if cache.has_previous_state else ()
    if position is None or width == 1 or len(position) not in (1, width):
        return None
    if len(position) == width:  # this is how those versions mark a first call
        return None if states[1].any() else ()
    return states if position[0] >= width - 1 else None


def keep_states(cache, mixer, old, x, last):
    """The last inputs of the convolution, of x (batch, dim, length), and the last state into the cache."""
    index, width = mixer.layer_idx, mixer.conv1d.kernel_size[0]
    tail = F.pad(x, (width - x.shape[2], 0)).contiguous()  # as token_step wants it
    if hasattr(cache, "update_recurrent_state"):
        if old:
            cache.update_conv_state(tail, index)
        else:
            cache.update_conv_state(x, index, conv_kernel_size=width)
        cache.update_recurrent_state(last, index)
    elif hasattr(cache, "has_previous_state"):
        dtype = cache.ssm_states[index].dtype
        cache.conv_states[index], cache.ssm_states[index] = tail, last.to(dtype)
    else:
        cache.conv_states[index].copy_(tail)
        cache.ssm_states[index].copy_(last)
