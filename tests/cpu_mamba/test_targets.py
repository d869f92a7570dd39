"""The kernels on processors with narrower vectors than this one, run where it can, and lowered for those that it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding as llvm

HERE = Path(__file__).parent
TARGETS = {"AVX2": ("haswell", "avx2", "ymm"), "SSE": ("x86-64", "sse2", "xmm")}  # name of the processor, what it takes to run, widest vectors


def kernels_for(target, *parts):
    """{kernel: what it was compiled to} by a process for that target that compares these parts with the references."""
    cpu, needed, _ = TARGETS[target]
    if not llvm.get_host_cpu_features().get(needed):
        pytest.skip(f"this processor has no {needed}")
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "CPU_MAMBA_CACHE": "", "PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), str(HERE)))}
    done = subprocess.run([sys.executable, str(HERE / "on_target.py"), *parts], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_narrow(found, target):
    """No kernel has wider vectors than its target, and those that compute, not copy, have its widest."""
    widest = TARGETS[target][2]
    for name, of in found.items():
        assert not any(of["here"][wider] for wider in dict(xmm=("ymm", "zmm"), ymm=("zmm",))[widest]), (name, of)
    assert any(of["here"][widest] > 100 for of in found.values())


def assert_vectors(found, target):
    """The same, and every kernel lowers to vectors for 64-bit Arm and AVX-512, without calls of exp or log."""
    assert_narrow(found, target)
    for name, of in found.items():
        arm, avx512 = of["aarch64-unknown-linux-gnu"], of["x86_64-unknown-linux-gnu"]
        assert arm["neon"] > 20 and avx512["zmm"] > 20 and not arm["mathematics"] + avx512["mathematics"], (name, of)


@pytest.mark.parametrize("target", TARGETS)
def test_the_convolution_on(target):
    found = kernels_for(target, "conv")
    assert set(found) == {"conv_tasks", "conv_backward_tasks"}
    assert_vectors(found, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_operators_and_layer_on(target):
    """Forward and every gradient of the scan and of a layer, and single tokens."""
    found = kernels_for(target, "scan", "layer", "token")
    assert {"forward_tasks", "backward_tasks", "conv_tasks", "conv_backward_tasks", "state_update_batch", "conv_update_batch"} <= set(found)
    assert_vectors(found, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_steps_of_the_models_on(target):
    """Loss, logits and every gradient of the fused step of a Mamba model, a hybrid one and attention with its two kinds of positions.

    Its softmax takes a logarithm for each row, so that calls are not asked about.
    """
    assert_narrow(kernels_for(target, "mamba", "hybrid", "learned", "rope"), target)
