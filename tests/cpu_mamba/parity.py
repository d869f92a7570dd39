"""What the tests compare with: the same call in float64, through the plain reference."""

import torch


def relative(a, b):
    """Largest difference in units of the largest reference value."""
    return float(((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).detach())


def scan_inputs(batch, dim, length, N, seed, extreme=False):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    delta = 10 ** (torch.rand(batch, dim, length, generator=g) * 7.7 - 6) if extreme else r(batch, dim, length)
    A = -torch.rand(dim, N, generator=g) * 64 if extreme else -torch.arange(1.0, N + 1).repeat(dim, 1) * (0.5 + torch.rand(dim, 1, generator=g))
    return dict(u=r(batch, dim, length), delta=delta, A=A, B=r(batch, N, length), C=r(batch, N, length), D=r(dim), z=r(batch, dim, length),
                delta_bias=r(dim) - 2, initial_state=r(batch, dim, N))


def double(arguments):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def values_and_gradients(function, arguments):
    """(outputs, {name: gradient}) of function(**arguments), each output under its own weights."""
    arguments = {k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)).sum() for y in outputs)
    total.backward()
    return outputs, {k: v.grad for k, v in arguments.items() if isinstance(v, torch.Tensor)}


def assert_parity(function, reference, arguments, bound=1e-5):
    """Values and every gradient of `function` in float32 are finite and within `bound` of `reference` in float64; returns the outputs."""
    outputs, gradients = values_and_gradients(function, arguments)
    wanted, wanted_gradients = values_and_gradients(reference, double(arguments))
    for y, want in zip(outputs, wanted):
        assert torch.isfinite(y).all() and relative(y, want) < bound
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all() and relative(gradient, wanted_gradients[name]) < bound, (name, relative(gradient, wanted_gradients[name]))
    return outputs


def assert_spoiled_alike(function, reference, arguments):
    """With NaN or an infinity at one place of each tensor in turn, `function` gives no finite number where `reference` gives none; gradients too."""
    for name in [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]:
        for bad in (float("nan"), float("inf"), -float("inf")):
            spoiled = dict(arguments)
            spoiled[name] = arguments[name].clone()
            spoiled[name].view(-1)[spoiled[name].numel() // 2] = bad
            outputs, gradients = values_and_gradients(function, spoiled)
            wanted, wanted_gradients = values_and_gradients(reference, spoiled)
            for y, want in [*zip(outputs, wanted), *((g, wanted_gradients[k]) for k, g in gradients.items())]:
                assert not (torch.isfinite(y) & ~torch.isfinite(want)).any(), (name, bad)
