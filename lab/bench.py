"""Speed beside public implementations of Mamba, in one process and in turns, so that a slow spell of the machine meets all.

    python -m lab.bench               tables of training steps, layers at real sizes and generation
    python -m lab.bench --quick       the report's model alone
"""

import contextlib
import functools
import math
import shutil
import sys
import threading
import time
import warnings

import numpy as np
import pandas as pd
import torch
from torch import nn

import cpu_mamba
from lab import report
from lab.pool import keep_heap, processor

LAYERS = [(256, 256, 4), (768, 512, 1), (768, 512, 4)]  # d_model, length, batch


def peer(d, mambapy=False):
    """The Mamba block of `transformers` on (batch, length, d), its scan in PyTorch or that of `mambapy`. Raises ImportError without them."""
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer
    transformers.logging.set_verbosity_error()  # it warns that it is slow
    if mambapy:
        from mambapy.pscan import pscan  # noqa: F401  transformers takes another path where it is missing
    return MambaMixer(transformers.MambaConfig(hidden_size=d, state_size=16, conv_kernel=4, expand=2, time_step_rank=math.ceil(d / 16), use_bias=False,
                                               use_conv_bias=True, use_mambapy=mambapy, use_associative_scan=False), layer_idx=0)


def peers():
    """{name: d -> layer} of the public implementations that can be had here."""
    found = {}
    with contextlib.suppress(ImportError):
        peer(8)
        found["transformers"] = peer
        if shutil.which("c++"):
            found["transformers, torch.compile"] = lambda d: torch.compile(peer(d))
        peer(8, mambapy=True)
        found["transformers, mambapy"] = functools.partial(peer, mambapy=True)
    return found


def medians(calls, rounds, most=20.0):
    """Median seconds of each call, {name: seconds}, in turns, after one that compiles; one that then takes over `most` seconds is timed once."""
    times = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        times[name] = [time.perf_counter() - start]
    slow = {name for name, (first,) in times.items() if first > most}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in slow:
                continue
            repeats = max(1, min(50, int(0.2 / max(times[name][-1], 1e-4))))
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: float(np.median(found[1:] or found)) for name, found in times.items()}


def training_steps(names, d, rounds):
    """Seconds of a training step of the two-layer Mamba model of width d, batch 64, length 64."""
    tokens, values = names.sample_batch(64, 64, 16, 1, 1, torch.Generator().manual_seed(0))

    def step(layer, make):
        model = names.Recall([layer(d), layer(d)], nn.LayerNorm, 16, d)
        cpu_mamba.flatten_parameters(model)
        return functools.partial(make(model), tokens, values)
    calls = {"cpu_mamba, whole step": step(cpu_mamba.Mamba, names.make_step), "cpu_mamba, layers alone": step(cpu_mamba.Mamba, names.PlainStep)}
    return medians(calls | {name: step(layer, names.PlainStep) for name, layer in peers().items()}, rounds)


def projections(d):
    """The matrix products of a Mamba layer alone, as a function of (batch, length, d): a layer without what lies between."""
    dim, low = 2 * d, math.ceil(d / 16) + 32
    linear = nn.ModuleList([nn.Linear(d, 2 * dim, bias=False), nn.Linear(dim, low, bias=False), nn.Linear(low - 32, dim), nn.Linear(dim, d, bias=False)])

    def forward(x):
        xz = linear[0](x)
        u = xz[..., :dim]
        return linear[3](u + linear[2](linear[1](u)[..., : low - 32]))
    return forward


def layer_times(d, length, batch, rounds, backward):
    """Seconds of one layer, forward or forward and backward."""
    x = torch.randn(batch, length, d, requires_grad=backward)

    def call(forward):
        def run():
            with torch.set_grad_enabled(backward):
                y = forward(x)
                if backward:
                    y.sum().backward()
        return run
    calls = {"cpu_mamba": call(cpu_mamba.Mamba(d)), "matrix products alone": call(projections(d))}
    return medians(calls | {name: call(layer(d)) for name, layer in peers().items()}, rounds)


def generation(rounds, layers=24, d=768):
    """Seconds of a token of a stack of layers, batch 1: `step` with its states, and the same stack in `transformers`."""
    stack = nn.ModuleList(cpu_mamba.Mamba(d) for _ in range(layers))
    states, token = [m.allocate_inference_cache(1) for m in stack], torch.randn(1, 1, d)

    @torch.no_grad()
    def ours():
        x = token
        for m, state in zip(stack, states):
            x = x + m.step(x, *state)[0]

    @torch.no_grad()
    def products():
        x = token[:, 0]
        for m in stack:
            z = x @ m.in_proj.weight.t()
            u = z[:, : m.d_inner]
            x = x + (u + (u @ m.x_proj.weight.t())[:, : m.dt_rank] @ m.dt_proj.weight.t()) @ m.out_proj.weight.t()
    calls = {"cpu_mamba": ours, "matrix products alone": products}
    with contextlib.suppress(ImportError):
        import transformers
        config = transformers.MambaConfig(hidden_size=d, num_hidden_layers=layers, vocab_size=16)
        model = transformers.MambaModel(config).eval()
        with torch.no_grad():
            cache = model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).cache_params
        one = torch.zeros(1, 1, dtype=torch.long)

        @torch.no_grad()
        def theirs():
            model(one, cache_params=cache, use_cache=True)
        calls["transformers"] = theirs
    return medians(calls, rounds)


def peak_memory(call):
    """Megabytes by which this process grew at most during call(), looked at every millisecond; NaN where the system does not tell."""
    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096 / 1e6
    try:
        before = most = resident()
    except OSError:
        call()
        return math.nan
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())
    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return most - before


def table(measured):
    """{case: {implementation: seconds}} as milliseconds and, in brackets, how many times the first's."""
    names = list(dict.fromkeys(name for found in measured.values() for name in found))

    def entry(found, name):
        first = next(iter(found.values()))
        return "–" if name not in found else f"{1e3 * found[name]:,.1f}" + (f" ({found[name] / first:.3g})" if found[name] != first else "")
    return pd.DataFrame([{"ms (times)": name} | {case: entry(found, name) for case, found in measured.items()} for name in names]).to_markdown(index=False)


def main(arguments):
    """What `make bench` prints."""
    if arguments not in ([], ["--quick"]):
        return f"{' '.join(arguments)}: unknown, --quick or nothing"
    keep_heap()
    warnings.filterwarnings("ignore", module="torch._dynamo")  # torch.compile says much of others' code
    torch.set_flush_denormal(True)
    names, everything = report.definitions(), not arguments
    print(f"{processor()}; medians of turns in one process\n")
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        print(f"Training step of the two-layer model, batch 64, length 64, {threads} threads\n")
        print(table({f"d {d}": training_steps(names, d, 9) for d in (8, 64)}), flush=True)
        for backward in (True, False) if everything else ():
            print(f"\nOne layer, forward{' and backward' * backward}, {threads} threads\n")
            print(table({f"d {d}, length {length}, batch {batch}": layer_times(d, length, batch, 7, backward) for d, length, batch in LAYERS}), flush=True)
        if everything:
            print(f"\nA token of 24 layers of d_model 768, batch 1, {threads} threads\n")
            print(table({"generation": generation(7)}), "\n", flush=True)
    if everything:
        x = torch.randn(1, 2048, 768, requires_grad=True)
        layer = cpu_mamba.Mamba(768)
        layer(x).sum().backward()
        print(f"peak memory of forward and backward, d_model 768, length 2,048: {peak_memory(lambda: layer(x).sum().backward()):.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
