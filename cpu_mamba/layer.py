"""The Mamba block with the constructor, parameters and initialisation of `mamba_ssm.Mamba`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .functions import fused_inner, selective_scan_fn
from .generate import selective_state_update_ref, token_fits, token_step
from .paths import FLOATS, fits, ready, untouched


class Mamba(nn.Module):
    """The Mamba block (Mamba paper, Section 3.4), as `mamba_ssm.Mamba`: a state_dict moves either way.

    Where `use_fast_path` is set and the submodules are as made here, all between in_proj and out_proj is one fused function, in float32.
    `layer_idx` is kept for those who count layers. Raises ValueError for a size that is not a positive integer and an unknown dt_init.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2, dt_rank: int | str = "auto", dt_min: float = 0.001,
                 dt_max: float = 0.1, dt_init: str = "random", dt_scale: float = 1.0, dt_init_floor: float = 1e-4, conv_bias: bool = True,
                 bias: bool = False, use_fast_path: bool = True, layer_idx: int | None = None, device=None, dtype=None):
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        d_inner = expand * d_model
        for name, value in dict(d_model=d_model, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank, d_inner=d_inner).items():
            if isinstance(value, str) or value < 1 or value != int(value):
                from_what = f" (expand={expand} times d_model={d_model})" if name == "d_inner" else ""
                raise ValueError(f"{name}={value}: a positive integer is needed{from_what}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init={dt_init!r}: "random" or "constant" is needed')
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank, self.use_fast_path, self.layer_idx = int(d_inner), dt_rank, use_fast_path, layer_idx
        kind = dict(device=device, dtype=dtype)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **kind)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **kind)
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False, **kind)
        self.dt_proj = nn.Linear(dt_rank, self.d_inner, **kind)
        # A and D stay at float32 at least, as they do there.
        wide = dict(device=device, dtype=torch.promote_types(dtype or torch.get_default_dtype(), torch.float32))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1, **wide)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, **wide))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **kind)
        self.A_log._no_weight_decay = self.D._no_weight_decay = self.dt_proj.bias._no_reinit = True
        self.init_step_sizes(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    def init_step_sizes(self, dt_min, dt_max, dt_init, dt_scale, dt_init_floor):
        """W_dt of the given scale, and a bias at which the step sizes are log-uniform in dt_min .. dt_max (Mamba paper, Section 3.6)."""
        bound, bias = self.dt_rank ** -0.5 * dt_scale, self.dt_proj.bias
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        uniform = torch.rand(self.d_inner, device=bias.device, dtype=bias.dtype)
        dt = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_init_floor)
        with torch.no_grad():
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt

    def forward(self, x: torch.Tensor, inference_params=None, last: bool = False) -> torch.Tensor:
        """(batch, length, d_model) to the same, or with last=True to (batch, 1, d_model).

        `inference_params` as mamba_ssm's, with a dict `key_value_memory_dict` of states by layer_idx and an int `seqlen_offset`: the
        states after x are kept there, and at more than 0 x continues what came before, by any number of tokens. Raises ValueError for another shape and without a layer_idx for it.
        """
        if x.dim() != 3 or x.shape[1] < 1:
            raise ValueError(f"x of shape {tuple(x.shape)}: (batch, length, d_model={self.d_model}), a length of at least 1, is needed")
        if inference_params is not None:
            return self.cached(x, inference_params, last)
        xz = self.in_proj(x)
        weights = self.fused_weights(xz)
        if weights is None:
            u, delta, A, B, C, z = self.scan_inputs(xz)
            y = selective_scan_fn(u, delta, A, B, C, self.D, z).transpose(1, 2)
        else:
            y = fused_inner(xz, *weights)
        return self.out_proj(y[:, -1:] if last else y)

    def A(self):
        """The paper's A, (d_inner, d_state)."""
        return -torch.exp(self.A_log.float() if self.A_log.dtype in FLOATS else self.A_log)

    def fused_weights(self, xz):
        """What `mamba_inner_fn` takes beside xz, where that is what the submodules would do to it; else None."""
        conv, x_proj, dt_proj = self.conv1d, self.x_proj, self.dt_proj
        if not (self.use_fast_path and ready() and untouched(conv, nn.Conv1d) and untouched(x_proj, nn.Linear) and untouched(dt_proj, nn.Linear)):
            return None
        taps, conv_bias, W_x, W_dt, dt_bias, A_log, D = conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, self.A_log, self.D
        if x_proj.bias is not None or dt_bias is None or not fits(xz, taps, conv_bias, W_x, W_dt, dt_bias, A_log, D):
            return None
        (dim, N), width, R = A_log.shape, taps.shape[2], W_dt.shape[1]
        shapes = (xz.shape[2:], taps.shape, W_x.shape, W_dt.shape, D.shape) == ((2 * dim,), (dim, 1, width), (R + 2 * N, dim), (dim, R), (dim,))
        if not shapes or (conv.stride, conv.padding, conv.dilation, conv.padding_mode) != ((1,), (width - 1,), (1,), "zeros"):
            return None
        return taps[:, 0], conv_bias, W_x, W_dt, dt_bias, self.A(), D

    def parts(self, x: torch.Tensor) -> tuple:
        """What the scan of this layer gets: (u, delta, A, B, C, z), time last, delta after the softplus (Mamba paper, Algorithm 2)."""
        return self.scan_inputs(self.in_proj(x))

    def scan_inputs(self, xz, before=None):
        """The same from in_proj's output, through the submodules; `before` (batch, d_inner, any) are the convolution's inputs of earlier tokens."""
        x, z = xz.transpose(1, 2).chunk(2, 1)  # (batch, d_inner, length) each
        earlier = 0 if before is None else before.shape[2]
        u = F.silu(self.conv1d(torch.cat((before, x), 2) if earlier else x)[..., earlier : earlier + x.shape[2]])
        low, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], 2)
        delta = F.softplus(self.dt_proj(low)).transpose(1, 2)
        return u, delta, self.A(), B.transpose(1, 2), C.transpose(1, 2), z

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None = None, dtype=None) -> tuple:
        """(conv_state (batch, d_inner, d_conv), ssm_state (batch, d_inner, d_state)) of zeros, for `step`; max_seqlen is not needed."""
        kind = dict(device=self.conv1d.weight.device, dtype=dtype or self.conv1d.weight.dtype)
        return torch.zeros(batch_size, self.d_inner, self.d_conv, **kind), torch.zeros(batch_size, self.d_inner, self.d_state, **kind)

    def step(self, x: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> tuple:
        """One token, (batch, 1, d_model), with both states brought up to date in place: (output (batch, 1, d_model), conv_state, ssm_state)."""
        if x.dim() != 3 or x.shape[1] != 1:
            raise ValueError(f"x of shape {tuple(x.shape)}: one token, (batch, 1, d_model={self.d_model}), is needed")
        if self.use_fast_path and token_fits(self, x, conv_state, ssm_state):
            return token_step(self, x, conv_state, ssm_state), conv_state, ssm_state
        x, z = self.in_proj(x)[:, 0].chunk(2, 1)  # (batch, d_inner) each
        window = torch.cat((conv_state[..., 1:], x[..., None].to(conv_state.dtype)), -1)
        conv_state.copy_(window)
        u = F.silu(self.conv1d(window.to(x.dtype))[..., self.d_conv - 1])
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], 1)
        y = selective_state_update_ref(ssm_state, u, F.softplus(self.dt_proj(low)), self.A(), B, C, self.D, z)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def cached(self, x, inference_params, last):
        """forward with `inference_params`."""
        if self.layer_idx is None:
            raise ValueError("layer_idx=None: with inference_params a number of the layer is needed, which Mamba takes when it is made")
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(len(x))
        conv_state, ssm_state = states[self.layer_idx]
        later = inference_params.seqlen_offset > 0
        if later and x.shape[1] == 1:
            return self.step(x, conv_state, ssm_state)[0]
        xz = self.in_proj(x)
        before, state = (conv_state.to(xz.dtype), ssm_state.clone()) if later else (None, None)
        u, delta, A, B, C, z = self.scan_inputs(xz, before)
        y, end = selective_scan_fn(u, delta, A, B, C, self.D, z, return_last_state=True, initial_state=state)
        window = xz[..., : self.d_inner].transpose(1, 2)
        window = torch.cat((before, window), 2) if later else F.pad(window, (self.d_conv, 0))
        conv_state.copy_(window[..., -self.d_conv :])
        ssm_state.copy_(end)
        y = y.transpose(1, 2)
        return self.out_proj(y[:, -1:] if last else y)
