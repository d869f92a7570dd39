"""Which path a call takes, the fused kernels or plain PyTorch, and the threads that kernels run on.

The kernels take a call only where they compute exactly what it says: plain float32 (or half precision, computed in float32) tensors on the
CPU, seen by no tracer and no transform. All else, second derivatives included, goes through `reference`.
"""

import concurrent.futures
import functools
import math
import os
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as modules

try:
    import numba  # noqa: F401
    MISSING = ""
except ImportError as error:
    MISSING = str(error)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, nn.Parameter)
HOOKS = [(name, "_global" + name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")]


def available() -> bool:
    """Whether the fused kernels can be used here: Numba can be imported. Without, all runs through plain PyTorch, and a warning says so once."""
    return not MISSING


@functools.cache
def warn_once():
    """Warn that Numba is missing, once in a process."""
    warnings.warn(f"cpu_mamba: the fused kernels need Numba ({MISSING}); plain PyTorch is used, which is correct but slow", stacklevel=4)


@functools.cache
def warn_of_gpu():
    """Warn that tensors on a GPU take the plain path, once in a process."""
    warnings.warn("cpu_mamba: tensors on a GPU go through plain PyTorch; the packages for them are mamba-ssm and causal-conv1d", stacklevel=4)


def ready() -> bool:
    """Whether kernels may be called at all: no compiler, tracer, transform or forward-mode derivative is looking on."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if MISSING:
        warn_once()
        return False
    watched = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() or torch.autograd.forward_ad._current_level >= 0
    return not watched


def fits(*tensors) -> bool:
    """Whether kernels may have these tensors (None passes): plain ones of float32 or half precision on the CPU, with something in each."""
    if not ready():
        return False
    for t in tensors:
        if t is None:
            continue
        if t.is_cuda:
            warn_of_gpu()
        if not (type(t) in PLAIN and t.dtype in FLOATS and t.is_cpu and t.layout is torch.strided and t.numel()):
            return False
        if torch._C._functorch.is_legacy_batchedtensor(t):
            return False
    return True


def untouched(module, kind) -> bool:
    """Whether calling `module` is what `kind.forward` does with its parameters, so that a kernel may take those and pass it by.

    Exactly of that class (a wrapper, a subclass, a parametrisation is of another), without hooks of its own or global ones, `forward` not replaced.
    """
    own = module.__dict__
    if type(module) is not kind or "forward" in own:
        return False
    for name, anywhere in HOOKS:
        if own[name] or getattr(modules, anywhere):
            return False
    return True


def outside_autocast(function):
    """In the dtypes of the arguments, inside torch.autocast as well."""
    @functools.wraps(function)
    def call(*args):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args)
        with torch.autocast("cpu", enabled=False):
            return function(*args)
    return call


# Threads

USED = []  # whether a kernel has run in this process


@functools.cache
def helpers(threads, process):
    """A pool of threads that treat denormal numbers as zero: in the tails of a decay they would cost more than all the rest."""
    return concurrent.futures.ThreadPoolExecutor(threads, initializer=torch.set_flush_denormal, initargs=(True,))


def after_fork():
    """PyTorch's threads do not survive a fork, and to wait for them would hang: a child of a process that has used its threads starts with one."""
    if USED:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


UNITS = 16  # of work in a batch, at least, where there are sequences and channels enough


class Share(NamedTuple):
    """Units first .. last - 1 of a batch's work, for one thread; unit k is share k % split of the channels of group k // split of the sequences."""
    first: int
    last: int
    groups: int
    split: int


def shares(batch: int, blocks: int) -> list:
    """All units of a batch, evenly among PyTorch's threads. What a unit is does not depend on their number, and so no sum does.

    Sequences are in up to UNITS groups; where they are fewer their `blocks` of channels are split, into shares of at least four.
    """
    return shares_among(torch.get_num_threads(), batch, blocks)


@functools.lru_cache(256)
def shares_among(threads, batch, blocks):
    """shares for a number of threads."""
    groups, split = min(batch, UNITS), max(1, min(-(-UNITS // batch), blocks // 4))
    threads = min(threads, groups * split)
    bounds = [groups * split * k // threads for k in range(threads + 1)]
    return [Share(first, last, groups, split) for first, last in zip(bounds, bounds[1:])]


def over_shares(kernel, parts: list, *args):
    """Call kernel(share, *args) for every share, each on a thread of its own."""
    if not USED:
        USED.append(True)
    if len(parts) == 1:
        kernel(parts[0], *args)
    else:
        list(helpers(len(parts), os.getpid()).map(lambda part: kernel(part, *args), parts))


def over_batch(kernel, batch: int, *args):
    """Call kernel(first, last, *args) on all of `batch` sequences, shared between PyTorch's threads: part k of n from batch k // n on."""
    if not USED:
        USED.append(True)
    threads = min(torch.get_num_threads(), batch)
    if threads <= 1:
        return kernel(0, batch, *args)
    bounds = [batch * k // threads for k in range(threads + 1)]
    list(helpers(threads, os.getpid()).map(lambda first, last: kernel(first, last, *args), bounds, bounds[1:]))
