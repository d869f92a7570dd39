"""What a process runs whose kernels are compiled for the processor that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name: parity, then what was compiled.

    python on_target.py part ...        conv, scan, layer, token, or a kind of model; prints {kernel: [float vector registers by width], ...} as JSON
"""

import importlib
import json
import pkgutil
import re
import sys

import torch
import torch.nn.functional as F
from llvmlite import binding as llvm
from numba.core.dispatcher import Dispatcher
from parity import assert_parity, relative, scan_inputs
from test_step import assert_exact, batch, describe

import cpu_mamba
from cpu_mamba import Mamba, causal_conv1d_fn, causal_conv1d_ref, generate, selective_scan_fn, selective_scan_ref

ELSEWHERE = {"aarch64-unknown-linux-gnu": ("generic", "+neon"), "x86_64-unknown-linux-gnu": ("skylake-avx512", "")}


def conv(width=3):
    for dim in (16, 6):
        assert_parity(causal_conv1d_fn, causal_conv1d_ref, dict(x=torch.randn(2, dim, 37), weight=torch.randn(dim, width), bias=torch.randn(dim), activation="silu"))


def scan():
    for dim in (16, 6):
        arguments = scan_inputs(2, dim, 37, 16, 0) | dict(delta_softplus=True, return_last_state=True)
        assert_parity(selective_scan_fn, selective_scan_ref, arguments)


def layer(d=16, bound=1e-5):
    """Output and every gradient against the plain path in float64."""
    ours, exact, x = Mamba(d), Mamba(d, use_fast_path=False, dtype=torch.float64), torch.randn(2, 37, d, requires_grad=True)
    exact.load_state_dict(ours.state_dict())
    x64 = x.detach().double().requires_grad_()
    y, want = ours(x), exact(x64)
    y.sin().sum().backward()
    want.sin().sum().backward()
    assert relative(y, want) < bound and relative(x.grad, x64.grad) < bound
    for (name, p), q in zip(ours.named_parameters(), exact.parameters()):
        assert relative(p.grad, q.grad) < bound, name


def token():
    """A layer's tokens one after the other against all at once."""
    m, x = Mamba(16), torch.randn(2, 9, 16)
    states = m.allocate_inference_cache(2)
    with torch.no_grad():
        steps = torch.cat([m.step(x[:, t : t + 1], *states)[0] for t in range(9)], 1)
        m.use_fast_path = False
        assert relative(steps, m.double()(x.double())) < 1e-5
    assert F.softplus and generate.state_update_batch.signatures


def kernels():
    """{name: compiled kernel} of those that Python calls."""
    found = {}
    for module in pkgutil.iter_modules(cpu_mamba.__path__):
        for name, value in vars(importlib.import_module(f"cpu_mamba.{module.name}")).items():
            if isinstance(value, Dispatcher) and not value.targetoptions.get("forceinline") and value.signatures:
                found[name] = value
    return found


def lowered(code, triple, cpu, features):
    """The assembly of a kernel's LLVM code for another processor. What counts references on x86 becomes a call."""
    code = re.sub(r"^target (triple|datalayout).*\n", "", code, flags=re.M).replace("llvm.x86.atomic.sub.cc.i64", "count_down").replace(" immarg", "")
    module = llvm.parse_assembly(code)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return machine.emit_assembly(module)


def vectors(text):
    """How often vector registers of each kind are named."""
    return {kind: len(re.findall(pattern, text)) for kind, pattern in dict(xmm=r"%xmm", ymm=r"%ymm", zmm=r"%zmm", neon=r"\bv\d+\.4s").items()}


def main(parts):
    torch.manual_seed(0)
    for part in parts:
        if part in globals():
            globals()[part]()
        else:
            assert_exact(describe(part), *batch(5, 37))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = {}
    for name, kernel in kernels().items():
        codes = kernel.inspect_llvm().values()
        found[name] = {"here": vectors("".join(kernel.inspect_asm().values()))}
        for triple, (cpu, features) in ELSEWHERE.items():
            text = "".join(lowered(code, triple, cpu, features) for code in codes)
            mathematics = re.findall(r"\t(?:bl|callq?)\t\S*?((?:exp2?|log1?p?2?|fma)f)\b", text)
            found[name][triple] = vectors(text) | {"mathematics": len(mathematics)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
