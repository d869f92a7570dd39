"""Inputs that nobody thought of: an error that names the argument, or a right answer."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

numbers = st.integers(-2, 24)
many = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
some = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def named(error, **arguments):
    """Whether an error names one of the arguments with its value."""
    return any(f"{name}={value!r}" in str(error) for name, value in arguments.items())


@many
@given(n=numbers, length=st.integers(-2, 200), K=numbers, M=numbers, tau=st.integers(-2, 70), seed=st.integers(0, 2**32))
def test_the_generator(recall, n, length, K, M, tau, seed):
    """A batch of T3, or a ValueError that names what is impossible."""
    arguments = dict(n=n, length=length, K=K, M=M, tau=tau)
    possible = n >= 1 and K >= 2 and 1 <= M <= K and tau >= 1 and length >= tau + 2
    try:
        tokens, values = recall.sample_batch(**arguments, generator=torch.Generator().manual_seed(seed))
    except ValueError as error:
        assert not possible and named(error, **arguments)
        return
    assert possible and tokens.shape == (n, length) and 0 <= int(tokens.min()) and int(tokens.max()) < K
    first = (tokens == tokens[:, -1:]).int().argmax(1)
    assert bool((tokens[torch.arange(n), first + tau] == values).all()) and bool((tokens[:, -1] < M).all())


@some
@given(name=st.sampled_from(("learned", "rope", "nope", "mamba", "hybrid", "gru")), K=st.integers(0, 20), d=st.integers(0, 40), L=st.integers(0, 20),
       heads=st.integers(0, 5), d_state=st.integers(1, 20), d_conv=st.integers(1, 6), norm=st.sampled_from(("layer", "rms", "none")),
       n=st.integers(1, 4), length=st.integers(1, 70))
def test_the_models(recall, name, K, d, L, heads, d_state, d_conv, norm, n, length):
    """Finite logits of the right shape, the fused step's the same as the plain one's; or a ValueError that names an argument."""
    torch.manual_seed(0)
    try:
        model = recall.build_model(name, K, d, L, norm, heads, d_state, d_conv)
    except ValueError as error:
        assert named(error, name=name, K=K, d=d, L=L, heads=heads, norm=norm, d_model=d)
        return
    tokens = torch.randint(K, (n, length))
    try:
        want = model(tokens)
    except ValueError as error:
        assert name == "learned" and length > 3 * L and f"length={length}" in str(error)
        return
    assert want.shape == (n, K) and bool(torch.isfinite(want).all())
    step = recall.PlainStep(model) if length == 1 else recall.make_step(model)
    assert torch.allclose(step.logits(tokens), want.detach(), rtol=1e-3, atol=1e-4)


@many
@given(model=st.sampled_from(("mamba", "rope", "gru", "")), M=numbers, tau=numbers, d=numbers, K=numbers, L=st.integers(-1, 100), shortest=st.integers(-1, 100),
       rate=st.one_of(st.floats(-1, 2, allow_subnormal=False), st.just(math.nan), st.just(math.inf)), budget=numbers, longest=numbers, stride=numbers,
       weight_decay=st.floats(-1, 2, allow_subnormal=False), cooling=numbers, powers=numbers)
def test_the_settings(recall, **letters):
    """A setting that can be trained, or a ValueError that names a field and its value."""
    try:
        s = recall.Setting(**letters)
    except ValueError as error:
        assert named(error, **letters)
        return
    assert s.model in recall.MODELS and 1 <= s.M <= s.K and s.tau + 2 <= s.shortest <= s.L and 0 < s.rate < 1 and s.longest >= s.budget >= 1
    assert 0 <= s.weight_decay <= 1 and s.cooling >= 0 and 0 <= s.powers <= 20
