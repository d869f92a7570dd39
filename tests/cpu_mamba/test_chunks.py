"""Batches in chunks: the work divided over threads by sequences and channels, sequences longer than a chunk, memory."""

import subprocess
import sys

import pytest
import torch
from parity import assert_parity, relative, scan_inputs, values_and_gradients
from test_functions import ENVIRONMENT, inner_inputs

from cpu_mamba import Mamba, causal_conv1d_fn, mamba_inner_fn, mamba_inner_ref, selective_scan_fn, selective_scan_ref
from cpu_mamba.paths import shares


@pytest.mark.parametrize("batch, blocks", [(1, 1), (1, 8), (1, 96), (3, 96), (7, 2), (9, 12), (64, 1), (65, 8)])
def test_every_unit_of_work_is_shared_out_once(batch, blocks):
    """Evenly, to as many threads as there are if the batch is large enough or has four blocks of channels for each."""
    units = set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        parts = shares(batch, blocks)
        sizes = [part.last - part.first for part in parts]
        assert [unit for part in parts for unit in range(part.first, part.last)] == list(range(parts[0].groups * parts[0].split))
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1 and len(parts) <= threads
        assert len(parts) == threads or max(batch, batch * blocks // 4) < 8
        units.add((parts[0].groups, parts[0].split))
    (groups, split), = units
    assert groups <= batch and split <= blocks, "nor does what a unit is depend on the threads"


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_change_the_result(batch):
    """The scan and the convolution on one to five threads, which share sequences and channels: the same bits. The layer but for matrix products."""
    layer, x, scan = Mamba(64), torch.randn(batch, 50, 64), scan_inputs(batch, 208, 50, 5, 0)
    conv = dict(x=torch.randn(batch, 208, 150), weight=torch.randn(208, 4), bias=torch.randn(208))
    weights = dict(layer.named_parameters())
    calls = [(lambda **a: selective_scan_fn(**a, delta_softplus=True, return_last_state=True), scan, 0),
             (lambda **a: causal_conv1d_fn(**a, activation="silu"), conv, 0),
             (lambda x, **given: torch.func.functional_call(layer, given, (x,)), dict(x=x) | weights, 2e-6)]
    for function, arguments, bound in calls:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs, gradients = values_and_gradients(function, arguments)
            results.append([*outputs, *gradients.values()])
        for other in results[1:]:
            assert all(relative(a, b) <= bound for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("threads, batch, dim, length, N", [(1, 1, 32, 1030, 4), (2, 1, 288, 130, 3), (1, 2, 272, 17, 16), (2, 16, 272, 70, 5)])
def test_long_and_wide(threads, batch, dim, length, N):
    """Chunks of more than 16 tokens, more blocks than are taken at a time, a last chunk of one or two tokens."""
    torch.set_num_threads(threads)
    arguments, options = scan_inputs(batch, dim, length, N, 1), dict(delta_softplus=True, return_last_state=True)
    assert_parity(lambda **a: selective_scan_fn(**a, **options), lambda **a: selective_scan_ref(**a, **options), arguments)


@pytest.mark.parametrize("batch, dim, length, R, N", [(16, 272, 70, 3, 5), (16, 272, 70, 9, 5), (2, 128, 130, 6, 4), (2, 128, 130, 9, 4),
                                                      (1, 16, 1030, 1, 4)])
def test_step_sizes_of_every_rank(batch, dim, length, R, N):
    """Ranks whose gradients the kernel takes itself and one that it leaves, with the channels in one share or several, taken at once or not."""
    torch.set_num_threads(1)
    assert_parity(mamba_inner_fn, mamba_inner_ref, inner_inputs(batch, length, dim, 4, R, N))


MEMORY = """
import resource, torch
from cpu_mamba import Mamba
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
layer = Mamba(256, d_state=64)
run = lambda length: layer(torch.randn(1, length, 256, requires_grad=True)).sum().backward()
run(8)
before = peak()
run(4096)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_does_not_hold_every_state():
    """Forward and backward over 4,096 tokens take less than a third of what their states would, length x d_inner x d_state."""
    found = subprocess.run([sys.executable, "-c", MEMORY], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 4096 * 512 * 64 * 4 / 3
