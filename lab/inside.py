"""Interventions in trained models: ablate, patch or zero out one part of one layer and see what is left of the accuracy.

First the tools, then the measurements that the report makes with them, as iterators of (measurement, percent, where): what was done,
what is left, and the layer and place, where there is one. A model has `mixers`, one per layer, each added to the residual stream, and `positions`, a table or None. A mixer is attention, with
`qkv`, `heads`, `rotary`, `weights(q, k)` and `out`, or a `cpu_mamba.Mamba`. What replaces a mixer's output is a *change*,
change(mixer, x, out) -> new output, for the mixer's input x and own output, (n, length, d) each; it acts through a forward hook, so
that the model's own forward pass runs and nothing of it is written twice. Places count from 0 in tensors.
"""

import contextlib
import copy
import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cpu_mamba import selective_scan_fn

FEW = 32  # sequences at a time, where they need not come all at once


@contextlib.contextmanager
def patched(net, layer, change):
    """Within the block, layer `layer` (from 0) of `net` gives change(mixer, x, out) in place of its output. Raises ValueError for a layer it has not."""
    if not 0 <= layer < len(net.mixers):
        raise ValueError(f"layer={layer}: it must lie in 0 .. {len(net.mixers) - 1}")
    hook = net.mixers[layer].register_forward_hook(lambda mixer, arguments, out: change(mixer, arguments[0], out))
    try:
        yield net
    finally:
        hook.remove()


@torch.no_grad()
def answers(net, tokens, *changes, few=None):
    """The model's answers to tokens (n, length), (n,), with every (layer, change) of `changes` in force.

    `few`: so many sequences at a time, which is faster where a cache holds them; not for changes that differ by sequence.
    """
    with contextlib.ExitStack() as stack:
        for layer, change in changes:
            stack.enter_context(patched(net, layer, change))
        return torch.cat([net(some).argmax(-1) for some in tokens.split(few or max(1, len(tokens)))])


@torch.no_grad()
def stream(net, tokens, part=128):
    """Logits (n, K) of a model of Mamba layers, `part` tokens after the other, in memory that does not depend on the length."""
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    for here in tokens.split(part, 1):
        x = F.embedding(here.to(net.V.device), net.V)
        for norm, mixer in zip(net.norms, net.mixers):
            x = x + mixer(norm(x), cache)
        cache.seqlen_offset += here.shape[1]
    return net.head(net.norms[-1](x[:, -1])).cpu()



def accuracy(net, tokens, values, *changes, few=None):
    """The share of right answers (%) with every (layer, change) of `changes` in force."""
    return percent(answers(net, tokens, *changes, few=few) == values)


def percent(right):
    """The share (%) of True in a tensor, NaN for none."""
    return 100 * right.double().mean().item()


@torch.no_grad()
def recorded(net, tokens, layer):
    """The input and the output of one layer's mixer for tokens (n, length), (n, length, d) each."""
    seen = []
    with patched(net, layer, lambda mixer, x, out: seen.append((x, out)) or out):
        net(tokens)
    return seen[0]


def query_places(tokens, values):
    """(which sequences have v != q, index of the first q), (n,) each, of tokens (n, length) and values (n,)."""
    query = tokens[:, -1]
    return values != query, (tokens[:, :-1] == query[:, None]).int().argmax(1)


def distinct(tokens, values):
    """The sequences with v != q: (tokens, values, index of the earlier query)."""
    rows, first = query_places(tokens, values)
    return tokens[rows], values[rows], first[rows]


# Attention

def project(mixer, x):
    """An attention layer's queries, keys and values, (n, heads, length, head width) each. Raises TypeError for a layer that is not attention."""
    if not hasattr(mixer, "qkv"):
        raise TypeError(f"mixer={type(mixer).__name__}: an attention layer is needed")
    return mixer.qkv(x).unflatten(-1, (3, mixer.heads, -1)).permute(2, 0, 3, 1, 4)


def reweighted(weights):
    """The change by which attention uses weights(mixer, q, k), (n, heads, length, length), in place of its own probabilities."""
    def change(mixer, x, out):
        q, k, v = project(mixer, x)
        return mixer.out((weights(mixer, q, k) @ v).transpose(1, 2).flatten(2))
    return change


def uniform(places=None):
    """Ablate attention: every head looks uniformly over its past, from everywhere, or from one place of each sequence alone, (n,)."""
    def weights(mixer, q, k):
        length = q.shape[2]
        flat = q.new_ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
        return flat if places is None else torch.where(F.one_hot(places, length).bool()[:, None, :, None], flat, mixer.weights(q, k))
    return reweighted(weights)


def turned(x, angles):
    """Queries or keys x (n, heads, length, head width) whose pairs of channels are turned by angles (length, pairs), as RoPE does."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def limited(limit):
    """Patch RoPE: its slowest rotation pair turns no further than at a distance of `limit` tokens. The change raises TypeError without rotation."""
    def weights(mixer, q, k):
        if mixer.rotary is None:
            raise TypeError("rotary=None: a layer with rotary positions is needed")
        freqs, place = mixer.rotary.freqs.detach(), torch.arange(q.shape[2], dtype=q.dtype)
        angles = place[:, None] * freqs
        still, ahead = angles.clone(), angles.clone()
        still[:, -1], ahead[:, -1] = 0, freqs[-1] * limit  # of keys and queries further apart than the limit
        near, far = turned(q, angles) @ turned(k, angles).mT, turned(q, ahead) @ turned(k, still).mT
        distance = place[:, None] - place
        scores = torch.where(distance > limit, far, near) * q.shape[-1] ** -0.5
        return scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return reweighted(weights)


@torch.no_grad()
def attention_weights(net, tokens, layer):
    """A layer's attention probabilities, (n, heads, length, length). Raises TypeError for a layer that is not attention."""
    mixer = net.mixers[layer]
    q, k, _ = project(mixer, recorded(net, tokens, layer)[0])
    return mixer.weights(q, k)


def previous_token_mass(weights, lag=1):
    """How much attention (n, heads, length, length) puts on the place `lag` tokens back, mean over sequences and places, of the best head."""
    return weights.diagonal(-lag, 2, 3).mean((0, 2)).max().item()


def mass_at(weights, places):
    """How much the last query looks at `places`, (n,): mean over sequences, of the best head."""
    rows = torch.arange(len(places))
    return weights[rows, :, -1, places].mean(0).max().item()


# Mamba

def rescanned(step_size):
    """The change by which a Mamba layer's recurrence runs with step_size(delta) for its step sizes delta, (n, d_inner, length)."""
    def change(mixer, x, out):
        if not hasattr(mixer, "parts"):
            raise TypeError(f"mixer={type(mixer).__name__}: a Mamba layer is needed")
        u, delta, A, B, C, z = mixer.parts(x)
        return mixer.out_proj(selective_scan_fn(u, step_size(delta), A, B, C, mixer.D, z).transpose(1, 2))
    return change


def emptied():
    """Zero out all step sizes of a Mamba layer: its recurrence stays empty, its convolution, skip and gate go on."""
    return rescanned(torch.zeros_like)


def skipped(places):
    """Zero out a Mamba layer's step size at one place of each sequence, (n,): the state passes by that place unchanged."""
    return rescanned(lambda delta: delta.scatter(2, places[:, None, None].expand(-1, delta.shape[1], 1), 0.0))


def without_tap(net, layer, lag):
    """A copy of the model in which the convolution of one Mamba layer does not see the token `lag` steps back. Raises ValueError for a tap it has not."""
    net = copy.deepcopy(net)
    weight = net.mixers[layer].conv1d.weight
    if not 0 <= lag < weight.shape[-1]:
        raise ValueError(f"lag={lag}: it must lie in 0 .. {weight.shape[-1] - 1}")
    with torch.no_grad():
        weight[..., -1 - lag] = 0
    return net


# Any layer

def shifted(vector):
    """The change that adds a vector, (d,) or one for each sequence (n, d), to a layer's output at the last place."""
    def change(mixer, x, out):
        out = out.clone()
        out[:, -1] += vector
        return out
    return change


def mean_output(net, tokens, layer):
    """A layer's mean output at the last place of tokens (n, length), (d,)."""
    return recorded(net, tokens, layer)[1][:, -1].mean(0)


def with_row(net, place, row):
    """A copy of a model in which place `place` has the learned position of place `row`, both counted from 1. Raises ValueError where there is no table."""
    if net.positions is None:
        raise ValueError("positions=None: a model with learned positions is needed")
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.positions[place - 1] = net.positions[row - 1]
    return net


# Measurements

def scores(net, tokens, places):
    """Attention mass (%) of the best head: layer 2's on `places` from the last query, layer 1's, if it is attention, on the previous token."""
    yield "mass on the value", 100 * mass_at(attention_weights(net, tokens, 1), places), dict(layer=2)
    if hasattr(net.mixers[0], "qkv"):
        yield "mass on the previous token", 100 * previous_token_mass(attention_weights(net, tokens, 0)), dict(layer=1)


def ablations(net, tokens, values, tau):
    """Layer 1's attention made uniform, from one place and from everywhere, on the sequences with v != q."""
    tokens, values, first = distinct(tokens, values)
    length = tokens.shape[1]
    places = {"at the value": first + tau, "elsewhere": (first + tau + length // 3) % (length - 2), "at the end": torch.full_like(first, length - 1), "everywhere": None}
    for name, at in places.items():
        yield f"uniform {name}", accuracy(net, tokens, values, (0, uniform(at))), dict(layer=1)


def limits(net, tokens, values, limit):
    """RoPE's slow pair limited in neither, either and both layers."""
    for name, layers in (("nowhere", ()), ("in layer 1", (0,)), ("in layer 2", (1,)), ("in both", (0, 1))):
        yield f"RoPE limited {name}", accuracy(net, tokens, values, *((layer, limited(limit)) for layer in layers), few=FEW), {}


def rows_given(net, tokens, values, row):
    """The last place with its own learned position, and with that of place `row`."""
    yield "own row at the end", accuracy(net, tokens, values, few=FEW), {}
    yield "trained row at the end", accuracy(with_row(net, tokens.shape[1], row), tokens, values, few=FEW), {}


def parts_removed(net, tokens, values):
    """Every Mamba layer's recurrence emptied, and each tap of its convolution zeroed out."""
    for layer, mixer in enumerate(net.mixers):
        if hasattr(mixer, "conv1d"):
            yield "recurrence emptied", accuracy(net, tokens, values, (layer, emptied())), dict(layer=layer + 1)
            for lag in range(mixer.conv1d.weight.shape[-1]):
                yield "tap zeroed out", accuracy(without_tap(net, layer, lag), tokens, values), dict(layer=layer + 1, place=-lag)


def places_skipped(net, tokens, values, window):
    """One place skipped by one Mamba layer's state, counted from the earlier query, on sequences with v != q that have all of `window`."""
    tokens, values, first = distinct(tokens, values)
    inner = (first + min(window) >= 0) & (first + max(window) < tokens.shape[1] - 1)
    for layer, place in itertools.product(range(len(net.mixers)), window):
        yield "place skipped", accuracy(net, tokens[inner], values[inner], (layer, skipped(first[inner] + place))), dict(layer=layer + 1, place=place)


def by_sequence(net, tokens, values, M, width=8):
    """Accuracy by whether the value is the query, by the query, and by how far back the earlier one stands, in bins of `width` tokens from the given one on."""
    right, (rows, first) = answers(net, tokens, few=FEW) == values, query_places(tokens, values)
    yield "v ≠ q", percent(right[rows]), {}
    yield "v = q", percent(right[~rows]), {}
    for query in range(M):
        yield "by the query", percent(right[tokens[:, -1] == query]), dict(place=query)
    back = tokens.shape[1] - 1 - first
    for low in range(1, tokens.shape[1] - 1, width):
        yield "by age", percent(right[rows & (back >= low) & (back < low + width)]), dict(place=-low)


def calibration(net, test, mean_here, mean_there, generator):
    """A vector added to layer 1's output at the last place: its mean on the sequences `mean_there` less that on `mean_here`, beside none and random ones of its norm.

    `test` is (tokens, values), as long as the sequences `mean_here`.
    """
    vector = mean_output(net, mean_there, 0) - mean_output(net, mean_here, 0)
    random = F.normalize(torch.randn(len(test[0]), len(vector), generator=generator), dim=1) * vector.norm()
    for name, shift in (("as it is", torch.zeros_like(vector)), ("vector", vector), ("random vector", random)):
        yield f"calibration, {name}", accuracy(net, *test, (0, shifted(shift))), {}
