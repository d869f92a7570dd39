"""The whole training step in one kernel, and the benchmarks."""

import collections
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn


def relative(a, b):
    return float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-30))


def pair(recall, name, d, norm, seed=1):
    """A model with its norms moved off their start, and the same in float64, which takes the plain path."""
    torch.manual_seed(seed)
    net = recall.build_model(name, d=d, norm=norm)
    with torch.no_grad():
        for p in net.norms.parameters():
            p.add_(0.1 * torch.randn_like(p))
    exact = recall.build_model(name, d=d, norm=norm).double()
    exact.load_state_dict(net.state_dict())
    exact.V = exact.V.double()
    for module in [*net.norms, *exact.norms]:
        module.eps = 1e-5  # RMSNorm's own depends on the precision
    return net, exact


@pytest.mark.parametrize("length", [3, 16, 37, 64])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize("name", ["learned", "rope", "nope", "mamba", "hybrid"])
def test_step_equals_the_plain_model(recall, name, d, norm, length):
    """Logits, loss and the gradient of every parameter against float64 autograd through the plain layers."""
    net, exact = pair(recall, name, d, norm)
    tokens, values = recall.sample_batch(5, length, 16, 4, 1, torch.Generator().manual_seed(length))
    flat, plan = recall.flatten_parameters(net), recall.step_plan(net)
    assert plan is not None
    logits, want = recall.run_step(plan, net.V, flat, tokens)[0], exact(tokens)
    assert relative(logits, want) < 1e-5
    loss, wanted = recall.training_loss(net, flat, tokens, values), F.cross_entropy(want, values)
    assert abs(loss.item() - wanted.item()) < 1e-5
    loss.backward()
    wanted.backward()
    largest = max(float(q.grad.abs().max()) for q in exact.parameters() if q.grad is not None)
    for (key, p), q in zip(net.named_parameters(), exact.parameters()):
        if q.grad is not None:  # the rotary frequencies have none
            assert float((p.grad.double() - q.grad).abs().max()) < 1e-5 * max(float(q.grad.abs().max()), 1e-3 * largest), key


@pytest.mark.parametrize("name", ["rope", "mamba", "hybrid"])
def test_a_training_run_agrees_with_the_plain_layers(recall, name):
    """Twenty steps of Adam by the fused step and by autograd end at the same parameters but for rounding."""
    ends = []
    for whole in (True, False):
        torch.manual_seed(3)
        net = recall.build_model(name)
        flat = recall.flatten_parameters(net)
        if not whole:
            net.__dict__["plan"] = None
        optimizer = torch.optim.Adam([flat], lr=1e-3)
        generator = torch.Generator().manual_seed(5)
        for _ in range(20):
            recall.training_loss(net, flat, *recall.sample_batch(16, 24, 16, 4, 1, generator)).backward()
            optimizer.step()
            flat.grad.zero_()
        ends.append(flat.detach().clone())
    assert float((ends[0] - ends[1]).abs().max()) < 2e-4


@pytest.mark.parametrize("batch", [1, 2, 13])
def test_threads_change_rounding_alone(recall, batch):
    """One, two and three threads agree within rounding, also with fewer sequences than threads, and a repeated call bit by bit."""
    torch.manual_seed(0)
    net = recall.build_model("mamba")
    flat, plan = recall.flatten_parameters(net), recall.step_plan(net)
    tokens, values = recall.sample_batch(batch, 40, 16, 4, 1, torch.Generator().manual_seed(0))
    found, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = recall.run_step(plan, net.V, flat, tokens, values)
            again = recall.run_step(plan, net.V, flat, tokens, values)
            assert all(torch.equal(a, b) for a, b in zip(found[threads], again))
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        assert all(relative(a, b.double()) < 1e-5 for a, b in zip(found[threads], found[1]))


def test_bad_tokens_and_lengths_are_refused(recall):
    """What PyTorch's own lookups would refuse, the kernel refuses too."""
    net = recall.build_model("learned")
    flat, plan = recall.flatten_parameters(net), recall.step_plan(net)
    with pytest.raises(ValueError, match="length=193"):
        recall.run_step(plan, net.V, flat, torch.zeros(2, 193, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens from 0 to 16"):
        recall.run_step(plan, net.V, flat, torch.tensor([[0, 16, 0]]))


def test_other_models_take_the_plain_path(recall):
    """float64, a third layer or a layer of another kind: no plan, and training_loss is autograd's."""
    assert recall.step_plan(recall.build_model("mamba").double()) is None
    three = recall.Recall([recall.Mamba(8) for _ in range(3)], 16, 8, nn.LayerNorm)
    assert recall.step_plan(three) is None
    tokens, values = recall.sample_batch(4, 12, 16, 1, 1, torch.Generator().manual_seed(0))
    flat = recall.flatten_parameters(three)
    recall.training_loss(three, flat, tokens, values).backward()
    assert torch.isfinite(flat.grad).all() and flat.grad.abs().sum() > 0


def test_memory_of_a_long_sequence_grows_with_its_length(recall):
    """A step on 32,768 tokens takes at most about twice the memory of one on 16,384, and far less than length x length."""
    sizes = []
    for length in (16_384, 32_768):
        tokens, values = recall.sample_batch(1, length, 16, 1, 1, torch.Generator().manual_seed(0))
        net = recall.build_model("mamba")
        flat = recall.flatten_parameters(net)
        plan = recall.step_plan(net)
        recall.run_step(plan, net.V, flat, tokens[:, :64], values)
        sizes.append(recall.peak_memory(lambda: recall.run_step(plan, net.V, flat, tokens, values)))
    if math.isnan(sizes[0]):
        pytest.skip("the system does not tell peak memory")
    assert sizes[1] < 2.5 * sizes[0] + 20 and sizes[1] < 500


def test_sums_do_not_hang_on_where_arrays_lie(recall):
    """The softmax of the loss has the same bits whether its two arrays lie side by side or far apart: a compiler may take another loop where they are close."""
    step = recall.step_kernel(False, False, 4)
    loss = dict(zip(step.py_func.__code__.co_freevars, step.py_func.__closure__))["cross_entropy"].cell_contents
    memory = np.zeros(4096, np.float32)
    for row in np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32):
        memory[:16] = row
        found = set()
        for start in (16, 20, 32, 48, 2000):
            gradient = memory[start : start + 16].reshape(1, 16)
            found.add((float(loss(memory[:16], 3, np.float32(1 / 64), gradient)), gradient.tobytes()))
        assert len(found) == 1


def test_benchmarks_run(recall):
    """Every part of `make bench` gives numbers; their size is nobody's business here."""
    found = recall.compare_peers(8, 1, compiled=False)
    assert {"this notebook", "this notebook, layers alone fused", "this notebook, scans alone fused", "recurrence of Section 2.1 in PyTorch"} <= set(found) and all(v > 0 for v in found.values())
    assert "this notebook" in recall.peers_table({8: found}).to_markdown()
    assert set(recall.step_shares(8, 1).part) == {"scans and step sizes", "convolutions", "matrix products", "rest"}
    grown = recall.growth("nope", [16, 32], 1)
    assert list(grown.length) == [16, 32] and (grown.seconds > 0).all()
    assert set(recall.model_steps(1)) == set(recall.RATES)
    assert all(seconds > 0 for seconds in recall.by_threads(8, 1))


def test_what_others_took_is_told(recall, monkeypatch):
    """Of ten busy seconds of the machine, less what this process and its children had."""
    Spent = collections.namedtuple("Spent", "user system idle")

    def percent(call):
        turns = iter((Spent(0, 0, 0), Spent(10, 0, 10)))
        monkeypatch.setattr(recall.psutil, "cpu_times", lambda: next(turns))
        with recall.watching_others() as others:
            call()
        return others["percent"]

    burn = "import time\nwhile time.process_time() < 2: pass"
    assert 45 < percent(lambda: None) <= 50
    assert percent(lambda: subprocess.run([sys.executable, "-c", burn], check=True)) < 42


@pytest.mark.parametrize("part", ["LayerMamba", "ScanMamba", "ReferenceMamba"])
def test_partly_fused_layers_compute_the_same(recall, part):
    """What the benchmark compares to say which fusion pays: the same numbers, and none of them takes the whole step as one call."""
    torch.manual_seed(0)
    other, ours, x = getattr(recall, part)(8), recall.Mamba(8), torch.randn(2, 32, 8)
    other.load_state_dict(ours.state_dict())
    assert relative(ours(x), other(x).double()) < 1e-5
    assert recall.step_plan(recall.Recall([other, other], 16, 8, nn.LayerNorm)) is None


@pytest.mark.parametrize("mambapy", [False, True])
def test_peers_compute_the_same(recall, mambapy):
    """The peers of the benchmark with this notebook's weights give its numbers: they do the same work."""
    pytest.importorskip("transformers")
    if mambapy:
        pytest.importorskip("mambapy")
    torch.manual_seed(0)
    peer, ours = recall.Peer(8, mambapy), recall.Mamba(8)
    peer.mixer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 32, 8)
    assert relative(ours(x), peer(x).double()) < 2e-5
    assert relative(ours(x, last=True), peer(x, last=True).double()) < 2e-5
