"""Mamba on a CPU: the operators, the layer and the fused training step, in the role that `mamba_ssm` has on a GPU.

    from cpu_mamba import Mamba
    y = Mamba(d_model=64)(x)  # (batch, length, 64) to the same

The kernels are compiled by Numba at first use and kept on disk (`cache`). Without Numba everything runs through plain PyTorch.
"""

from .functions import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn
from .generate import causal_conv1d_update, causal_conv1d_update_ref, selective_state_update, selective_state_update_ref
from .layer import Mamba
from .paths import available, untouched
from .reference import causal_conv1d_ref, mamba_inner_ref, selective_scan_ref
from .step import AttentionSpec, FusedStep, MambaSpec, NormSpec, StepSpec, flatten_parameters, fused_step
from .transformers import use_in_transformers

__all__ = ["AttentionSpec", "FusedStep", "Mamba", "MambaSpec", "NormSpec", "StepSpec", "available", "causal_conv1d_fn", "causal_conv1d_ref",
           "causal_conv1d_update", "causal_conv1d_update_ref", "flatten_parameters", "fused_step", "mamba_inner_fn", "mamba_inner_ref",
           "selective_scan_fn", "selective_scan_ref", "selective_state_update", "selective_state_update_ref", "untouched", "use_in_transformers"]
