"""The fused scan against the paper's recurrence in float64: values and every gradient over shapes."""

import pytest
import torch
from parity import assert_parity, assert_spoiled_alike, double, relative, scan_inputs, values_and_gradients

from cpu_mamba import selective_scan_fn, selective_scan_ref


CASES = [(2, 16, length, 16, True) for length in (1, 2, 3, 5, 31, 64, 127, 200)] + [
    (3, 5, 40, 1, True), (1, 7, 33, 4, True), (2, 12, 50, 5, False), (2, 24, 64, 8, True), (1, 128, 64, 16, True), (2, 8, 20, 32, False),
    (1, 4, 1000, 16, True), (1, 2, 17, 3, True), (1, 1, 1, 1, True)]


@pytest.mark.parametrize("batch, dim, length, N, softplus", CASES)
def test_scan_equals_the_recurrence(calls, batch, dim, length, N, softplus):
    """Values, last state and every gradient within 1e-5 of the float64 recurrence."""
    arguments = scan_inputs(batch, dim, length, N, seed=length + N) | dict(delta_softplus=softplus, return_last_state=True)
    if not softplus:
        arguments["delta"] = arguments["delta"].abs()
        del arguments["delta_bias"]
    assert_parity(selective_scan_fn, selective_scan_ref, arguments)
    assert calls == ["forward_tasks", "backward_tasks"]


@pytest.mark.parametrize("absent", [("D",), ("z",), ("D", "z"), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias", "initial_state")])
def test_optional_arguments(calls, absent):
    """Skip, gate and bias may be left out, each alone and together."""
    arguments = {k: v for k, v in scan_inputs(2, 16, 20, 16, 1).items() if k not in absent}
    assert_parity(selective_scan_fn, selective_scan_ref, arguments | dict(delta_softplus=True))
    assert calls


def test_output_or_last_state_alone(calls):
    """The gradient is right where only one of the two outputs is used; the last state does not depend on C, D and z."""
    arguments = scan_inputs(2, 16, 40, 6, 9) | dict(delta_softplus=True, return_last_state=True)
    for used, extra in ((0, ()), (1, ("C", "D", "z"))):
        one = lambda function: lambda **given: function(**given)[used]
        _, gradients = values_and_gradients(one(selective_scan_fn), arguments)
        _, wanted = values_and_gradients(one(selective_scan_ref), double(arguments))
        for name in gradients:
            if name in extra:
                assert wanted[name] is None and (gradients[name] is None or (gradients[name] == 0).all())
            else:
                assert relative(gradients[name], wanted[name]) < 1e-5, name
    assert calls == 2 * ["forward_tasks", "backward_tasks"]


@pytest.mark.parametrize("length", [4, 64, 300])
def test_extreme_steps_and_decays(calls, length):
    """delta from 1e-6 to 50 and A down to -64: no NaN or infinity, and still within 1e-5."""
    assert_parity(selective_scan_fn, selective_scan_ref, {k: v for k, v in scan_inputs(2, 16, length, 16, length, extreme=True).items() if k != "delta_bias"})
    assert calls


@pytest.mark.parametrize("name", ["A", "delta"])
def test_a_state_that_grows(calls, name):
    """Exponents above 0, which no Mamba has, are as right, and overflow where the recurrence does."""
    arguments = scan_inputs(2, 16, 30, 4, 7) | dict(D=None, z=None, delta_bias=None)
    arguments["delta"] = arguments["delta"].abs()
    arguments[name] = -arguments[name] / 10
    wanted = selective_scan_ref(**{k: v if v is None else v.double() for k, v in arguments.items()})
    assert relative(selective_scan_fn(**arguments), wanted) < 1e-5
    assert not torch.isfinite(selective_scan_fn(**arguments | {name: 1_000 * arguments[name]})).all()
    assert not calls


@pytest.mark.parametrize("cut", [1, 30, 64])
def test_a_scan_in_two_parts(calls, cut):
    """The last state of one part as the initial one of the next: outputs and gradients are those of the whole, through the state as well."""
    whole = scan_inputs(2, 16, 100, 16, 4) | dict(delta_softplus=True, return_last_state=True)

    def in_parts(**given):
        outputs, state = [], given["initial_state"]
        for part in (slice(None, cut), slice(cut, None)):
            here = {k: v[..., part] if k in ("u", "delta", "B", "C", "z") else v for k, v in given.items()}
            y, state = selective_scan_fn(**here | dict(initial_state=state))
            outputs.append(y)
        return torch.cat(outputs, 2), state
    assert_parity(in_parts, selective_scan_ref, whole)
    assert calls == 2 * ["forward_tasks"] + 2 * ["backward_tasks"]


def test_extreme_gates(calls):
    """A gate far from 0 on either side is 0 or passes all, and its gradient is finite."""
    arguments = scan_inputs(2, 16, 20, 16, 5) | dict(delta_softplus=True)
    arguments["z"] = torch.linspace(-300, 300, arguments["z"].numel()).view_as(arguments["z"])
    assert_parity(selective_scan_fn, selective_scan_ref, arguments)
    assert calls


def test_nan_and_infinity_come_out(calls):
    """Wherever one goes in, the output, the last state and the gradients have none of the finite numbers that the reference has not."""
    arguments = scan_inputs(2, 16, 40, 5, 3) | dict(delta_softplus=True, return_last_state=True)
    assert_spoiled_alike(selective_scan_fn, selective_scan_ref, arguments)
    assert calls
    everywhere = selective_scan_fn(**arguments | dict(A=torch.full((16, 5), float("nan"))))
    assert all(torch.isnan(y).all() for y in everywhere)


def test_reference_against_finite_differences():
    """The reference that the kernel is held to has itself the gradient that float64 finite differences give."""
    arguments = [v.double().requires_grad_() for v in scan_inputs(1, 2, 5, 3, 0).values()]
    assert torch.autograd.gradcheck(lambda *a: selective_scan_ref(*a[:-1], True, False, a[-1]), arguments, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 5])
def test_threads_do_not_change_the_result(batch):
    """One, two or three threads, also with fewer sequences than threads: the same bits, since every sum over the batch has a fixed order."""
    arguments, results = scan_inputs(batch, 16, 64, 16, 3) | dict(delta_softplus=True), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = values_and_gradients(selective_scan_fn, arguments)
        results.append([*outputs, *gradients.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
