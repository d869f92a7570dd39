"""Speed beside public implementations of Mamba, in one process and in turns, so that a slow spell of the machine meets all.

    python -m lab.bench [--write] [part ...]      all parts, or some of them

step: a training step of the report's model.  layer, forward: a layer, with and without its gradients.  plain: the token-by-token scan of
`transformers` on large layers, timed once.  compiled-step, compiled-layer: beside torch.compile, which takes a minute for each.  generation: a
token.  sizes: a layer over widths, lengths and batches.  --write puts what was measured into cpu_mamba/speed.csv and, from all that stands there,
the table and the figure into cpu_mamba's README.  --quick is the part step on its own.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import platform
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import cpu_mamba
from lab import report
from lab.pool import keep_heap, processor

OURS, PLAIN, MAMBAPY, COMPILED, PRODUCTS = "cpu_mamba", "transformers", "transformers, mambapy", "transformers, torch.compile", "matrix products alone"
LAYERWISE = "cpu_mamba, layers alone"  # under autograd, without the fused step
LAYERS = [(256, 256, 4), (768, 512, 1), (768, 512, 4)]  # d_model, length, batch
SIZES = [(d, length, batch) for d in (8, 64, 256, 768, 2048) for length in (64, 512, 4096) for batch in (1, 8)]
HOME = Path(cpu_mamba.__file__).parent
COLUMNS = ["part", "case", "threads", "name", "ms", "MB"]


def peer(d, mambapy=False, associative=False):
    """The Mamba block of `transformers` on (batch, length, d): its scan token by token, that of `mambapy`, or PyTorch's associative scan, which is for
    torch.compile. Raises ImportError without them."""
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer
    transformers.logging.set_verbosity_error()  # it warns that it is slow
    if mambapy:
        from mambapy.pscan import pscan  # noqa: F401  transformers takes another path where it is missing
    return MambaMixer(transformers.MambaConfig(hidden_size=d, state_size=16, conv_kernel=4, expand=2, time_step_rank=math.ceil(d / 16), use_bias=False,
                                               use_conv_bias=True, use_mambapy=mambapy, use_associative_scan=associative), layer_idx=0)


def peers(*names):
    """{name: d -> layer} of those of the named public implementations that can be had here."""
    made = {PLAIN: peer, MAMBAPY: functools.partial(peer, mambapy=True)}
    if shutil.which("c++"):
        made[COMPILED] = lambda d: torch.compile(peer(d, associative=True))
    found = {}
    for name in names:
        with contextlib.suppress(ImportError, KeyError):
            made[name](8)
            found[name] = made[name]
    return found


def trimmed_memory(call):
    """peak_memory of call() after the heap's free pages went back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return peak_memory(call)


def medians(calls, rounds, most=10.0, compiles=(OURS, LAYERWISE, COMPILED)):
    """{name: (seconds, MB)}: the median of each call in turns, and the memory of one. A call that takes over `most` seconds is made once, or twice
    where the first may compile; one that has taken as much in all has had its turns."""
    times, memory = {}, {}
    for name, call in calls.items():
        for _ in range(2):
            start = time.perf_counter()
            memory[name] = trimmed_memory(call)
            times[name] = [time.perf_counter() - start]
            if times[name][0] > most and name not in compiles:
                break
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(times[name]) > most:
                continue
            repeats = max(1, min(50, int(0.2 / max(times[name][-1], 1e-4))))
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: (float(np.median(found[1:] or found)), memory[name]) for name, found in times.items()}


def training_steps(d, rounds, others):
    """A training step of the two-layer Mamba model of width d, batch 64, length 64."""
    names = report.definitions()
    tokens, values = names.sample_batch(64, 64, 16, 1, 1, torch.Generator().manual_seed(0))

    def step(layer, make):
        model = names.Recall([layer(d), layer(d)], nn.LayerNorm, 16, d)
        cpu_mamba.flatten_parameters(model)
        return functools.partial(make(model), tokens, values)
    calls = {OURS: step(cpu_mamba.Mamba, names.make_step), LAYERWISE: step(cpu_mamba.Mamba, names.PlainStep)}
    return medians(calls | {name: step(layer, names.PlainStep) for name, layer in others.items()}, rounds)


def projections(d):
    """The matrix products of a Mamba layer alone, as a function of (batch, length, d): a layer without what lies between."""
    dim, low = 2 * d, math.ceil(d / 16) + 32
    linear = nn.ModuleList([nn.Linear(d, 2 * dim, bias=False), nn.Linear(dim, low, bias=False), nn.Linear(low - 32, dim), nn.Linear(dim, d, bias=False)])

    def forward(x):
        xz = linear[0](x)
        u = xz[..., :dim]
        return linear[3](u + linear[2](linear[1](u)[..., : low - 32]))
    return forward


def layer_times(d, length, batch, rounds, backward, others, **limits):
    """One layer, forward or forward and backward, beside those of `others`, {name: d -> layer}."""
    x = torch.randn(batch, length, d, requires_grad=backward)

    def call(forward):
        def run():
            with torch.set_grad_enabled(backward):
                y = forward(x)
                if backward:
                    y.sum().backward()
        return run
    calls = {OURS: cpu_mamba.Mamba(d), PRODUCTS: projections(d)} | {name: layer(d) for name, layer in others.items()}
    calls[OURS](torch.randn(1, 3, d)).sum().backward()  # compiles
    return medians({name: call(layer) for name, layer in calls.items()}, rounds, **limits)


def generation(rounds, layers=24, d=768):
    """A token of a stack of layers, batch 1: `step` with its states, and the same stack in `transformers`, on its own and on our kernels."""
    stack = nn.ModuleList(nn.ModuleList([nn.RMSNorm(d), cpu_mamba.Mamba(d)]) for _ in range(layers))
    states, token = [m.allocate_inference_cache(1) for _, m in stack], torch.randn(1, 1, d)

    @torch.no_grad()
    def ours():
        x = token
        for (norm, m), state in zip(stack, states):
            x = x + m.step(norm(x), *state)[0]

    @torch.no_grad()
    def products():
        x = token[:, 0]
        for _, m in stack:
            z = x @ m.in_proj.weight.t()
            u = z[:, : m.d_inner]
            x = x + (u + (u @ m.x_proj.weight.t())[:, : m.dt_rank] @ m.dt_proj.weight.t()) @ m.out_proj.weight.t()
    calls = {OURS: ours, PRODUCTS: products}
    with contextlib.suppress(ImportError):
        import transformers
        transformers.logging.set_verbosity_error()
        model = transformers.MambaModel(transformers.MambaConfig(hidden_size=d, num_hidden_layers=layers, vocab_size=16)).eval()
        with torch.no_grad():
            cache = model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).cache_params
        one = torch.zeros(1, 1, dtype=torch.long)

        @torch.no_grad()
        def theirs():
            model(one, cache_params=cache, use_cache=True)

        def both():
            with cpu_mamba.use_in_transformers():
                theirs()
        calls |= {PLAIN: theirs, "transformers on cpu_mamba": both}
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


def shape(d, length, batch):
    """A layer's size as the tables have it."""
    return f"d {d}, length {length}, batch {batch}"


def measure(part, threads):
    """Yields (case, {name: (seconds, MB)}) of a part, on as many threads as PyTorch has."""
    whole, some, compiled, plain = (peers(*names) for names in ((PLAIN, MAMBAPY), (MAMBAPY,), (COMPILED,), (PLAIN,)))
    if part == "step" or part == "compiled-step" and threads > 1 and compiled:
        for d in (8, 64):
            yield f"training step, d {d}", training_steps(d, 7, whole if part == "step" else compiled)
    elif part in ("layer", "forward"):
        for size in LAYERS:
            yield f"{part}, {shape(*size)}", layer_times(*size, 7, part == "layer", whole if part == "forward" or size[0] < 768 else some)
    elif part == "plain" and threads > 1 or part == "compiled-layer" and threads > 1 and compiled:
        for size in LAYERS[1:] if part == "plain" else LAYERS[:2]:
            yield f"layer, {shape(*size)}", layer_times(*size, 7, True, plain if part == "plain" else compiled)
    elif part == "generation":
        yield "token, 24 layers of d 768", generation(9)
    elif part == "sizes" and threads > 1:
        for size in SIZES:
            yield f"layer, {shape(*size)}", layer_times(*size, 3, True, {}, most=2.0, compiles=())


PARTS = ("step", "compiled-step", "layer", "plain", "compiled-layer", "forward", "generation", "sizes")


def times(rows):
    """The rows with a column `times`: their time in units of ours, measured with it."""
    key = ["part", "case", "threads"]
    ours = rows[rows.name == OURS].set_index(key).ms
    return rows.assign(times=rows.ms / rows.set_index(key).index.map(ours).astype(float))


def entry(value):
    """Three digits, a dash for what was not measured."""
    return "–" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows):
    """A line per case and number of threads: our milliseconds, how many times that the others take, ours in units of the matrix products, memory."""
    rows, lines = times(rows), []
    for (case, threads), found in rows.groupby(["case", "threads"], sort=False):
        of = {name: here.iloc[0] for name, here in found.groupby("name")}  # each in units of ours of its own part

        def get(name, column, of=of):
            return float(of[name][column]) if name in of else math.nan
        cells = [entry(get(OURS, "ms")), *(entry(get(name, "times")) for name in (PLAIN, MAMBAPY, COMPILED)), entry(1 / get(PRODUCTS, "times"))]
        memory = [get(name, "MB") for name in (OURS, PLAIN, MAMBAPY, COMPILED)]
        lines.append([case, str(threads), *cells, " / ".join("–" if mb != mb else f"{mb:,.0f}" for mb in memory)])
    heads = ["", "threads", "ms", "`transformers`", "mambapy", "torch.compile", "of products", "MB"]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, [":--"] + ["--:"] * 7, *lines))


def sizes_table(rows):
    """Microseconds per token of a layer's forward and backward and, in brackets, in units of its matrix products."""
    rows, cells = times(rows), {}
    for case, found in rows.groupby("case", sort=False):
        d, length, batch = map(int, re.findall(r"\d+", case))
        of = found.set_index("name")
        cells.setdefault(f"d {d}", {})[f"{length} x {batch}"] = f"{1e3 * of.ms[OURS] / length / batch:.3g} ({1 / of.times[PRODUCTS]:.2f})"
    return pd.DataFrame(cells).T.to_markdown()


def figure(rows, path):
    """How many times our time the others take, on two threads: a dot for each, on a logarithmic axis."""
    import matplotlib.pyplot as plt

    from lab.figures import STYLE
    rows = times(rows)
    rows = rows[(rows.threads == rows.threads.max())]
    cases = list(dict.fromkeys(rows.case))
    looks = {PLAIN: ("s", "#D55E00"), MAMBAPY: ("^", "#0072B2"), COMPILED: ("D", "#AA3377"), PRODUCTS: ("|", "#333333")}
    with plt.rc_context(STYLE | {"svg.hashsalt": "speed", "svg.fonttype": "none"}):
        drawn, axis = plt.subplots(figsize=(7.2, 0.4 + 0.3 * len(cases)))
        for name, (mark, colour) in looks.items():
            found = rows[rows.name == name]
            if found.empty:
                continue
            axis.plot(found.times, [cases.index(case) for case in found.case], mark, color=colour, markersize=7, label=name)
        axis.axvline(1, color="#009E73", label="cpu_mamba")
        axis.set(xscale="log", xlabel="time, in units of cpu_mamba's", yticks=range(len(cases)), yticklabels=cases, ylim=(len(cases) - 0.5, -0.5))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        drawn.savefig(path, metadata={"Date": None})
    plt.close(drawn)


def caption(threads):
    """What the numbers were measured on and with."""
    versions = []
    for package in ("torch", "numba", "transformers", "mambapy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return (f"`python -m lab.bench --write` on {processor()}, {' and '.join(map(str, threads))} threads, float32; Python {platform.python_version()}, "
            f"{', '.join(versions)}. Medians of turns in one process; the plain scan of large layers once.")


def keep(rows, home=HOME):
    """Put rows in place of their like in speed.csv; all that stands there."""
    path, key = home / "speed.csv", ["part", "case", "threads"]
    if path.exists():
        old = pd.read_csv(path)
        rows = pd.concat([old[~old.set_index(key).index.isin(rows.set_index(key).index)], rows])
    rows = rows.sort_values("part", key=lambda part: part.map(PARTS.index), kind="stable")
    rows.round({"ms": 4, "MB": 1}).to_csv(path, index=False)
    return rows


def write(rows, home=HOME):
    """The table and the figure of rows into the README."""
    shown, readme = rows[rows.part != "sizes"], home / "README.md"
    figure(shown, home / "speed.svg")
    layers = times(shown)[shown.name == LAYERWISE].times
    alone = f"The training step is `fused_step`'s; by `Mamba` layers under autograd it takes {layers.min():.1f} to {layers.max():.1f} times as long.\n\n" if len(layers) else ""
    text = (f"{table(shown)}\n\n{caption(sorted(set(rows.threads)))} In the columns of `transformers`, with its token-by-token "
            "scan, with mambapy's and compiled: how many times our time. Of products: our time over that of the layer's matrix products alone, by PyTorch. "
            "MB: how much the process grew in a call, ours and theirs in the order of the columns.\n\n"
            f"{alone}![Time of each implementation in units of cpu_mamba's](speed.svg)")
    before, rest = readme.read_text(encoding="utf-8").split("<!-- bench -->")
    readme.write_text(f"{before}<!-- bench -->\n{text}\n<!-- /bench -->{rest.split('<!-- /bench -->')[1]}", encoding="utf-8")


def main(arguments):
    """What `make bench` prints."""
    wanted = ["step" if a == "--quick" else a for a in arguments if a != "--write"]
    if unknown := [a for a in wanted if a not in PARTS]:
        return f"{' '.join(unknown)}: unknown, --write, --quick or some of {', '.join(PARTS)}"
    keep_heap()
    warnings.filterwarnings("ignore", module="torch._dynamo")  # torch.compile says much of others' code
    warnings.filterwarnings("ignore", "`cache_params` is deprecated")  # the name that all versions of transformers know
    torch.set_flush_denormal(True)
    most = torch.get_num_threads()
    print(f"{processor()}; medians of turns in one process")
    for part in wanted or PARTS:
        here = []
        for threads in dict.fromkeys((1, most)):
            torch.set_num_threads(threads)
            for case, found in measure(part, threads):
                new = [dict(zip(COLUMNS, (part, case, threads, name, 1e3 * seconds, MB))) for name, (seconds, MB) in found.items()]
                here += new
                stored = keep(pd.DataFrame(new)) if "--write" in arguments else None
                print(f"  {case}, {threads} threads: " + ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, (seconds, _) in found.items()), flush=True)
        if here:
            print(f"\n{(sizes_table if part == 'sizes' else table)(pd.DataFrame(here))}\n", flush=True)
        if "--write" in arguments and here:
            write(stored)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
