"""Memory of packed models with the shape of DiT-XL/2: all linears of their blocks in NVFP4, against bf16.

1. Resident bytes of parameters and buffers before and after `pack_`, and whether the float weights are gone: no weak
   reference to one is alive, and the process shrinks by what they took.
2. A fresh process that builds the model on the meta device, loads the packed file and reads every byte of it: its peak
   lies below what the float weights alone would take.

The first model is the DiT of `examples/` (as in the paper: one embedding of labels), the second diffusers', which has a
table of 1001 labels in every block; those are no linears and stay in bf16.

    python benchmarks/memory.py
"""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch

import qc_compiler
from harness import header, table, write
from qc_compiler.packing import weight_bytes

MIB = 2**20


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(*sys.argv[2:])))
        return
    text = header("Memory of packed models", "python benchmarks/memory.py")
    for name in MODELS:
        text += f"\n## {name}\n\n{measure(name)}"
    write("memory.md", text)


def examples_dit() -> torch.nn.Module:
    from dit import DiT, DiTConfig  # `harness` has put the examples on the path by now

    return DiT(DiTConfig(depth=28, width=1152, num_heads=16, num_classes=1000, channels=4, size=(32, 32)))


def diffusers_dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel()  # its defaults are DiT-XL/2's


MODELS = {"examples/dit.py": examples_dit, "diffusers' DiTTransformer2DModel": diffusers_dit}


def measure(name: str) -> str:
    before = resident()
    model = MODELS[name]().bfloat16().eval().requires_grad_(False)
    linears = [child for child in model.modules() if isinstance(child, torch.nn.Linear)]
    blocks = {
        linear for stack in model.children() if isinstance(stack, torch.nn.ModuleList) for linear in stack.modules()
    }
    floats = [weakref.ref(linear.weight) for linear in linears if linear in blocks]
    del linears, blocks
    full, full_rss = weight_bytes(model), resident() - before
    qc_compiler.pack_(model, "nvfp4")
    packed, packed_rss = weight_bytes(model), resident() - before
    alive = sum(ref() is not None for ref in floats)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "dit.safetensors"))
        qc_compiler.save_packed(model, path)
        command = [sys.executable, __file__, "--load", name, path]
        loaded = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows = [
        ("weights, bf16", f"{full / MIB:.0f}", ""),
        ("weights, packed", f"{packed / MIB:.0f}", f"{full / packed:.2f}×"),
        ("process, bf16", f"{full_rss / MIB:.0f}", ""),
        ("process, packed", f"{packed_rss / MIB:.0f}", f"{full_rss / packed_rss:.2f}×"),
        ("another process: weights loaded", f"{loaded['weights'] / MIB:.0f}", ""),
        ("another process: peak above the empty model", f"{loaded['peak'] / MIB:.0f}", ""),
    ]
    gone = f"Float weights of the blocks' linears still alive after packing: {alive} of {len(floats)}.\n"
    return f"{table(('what', 'MiB', 'smaller'), rows)}\n{gone}"


def load(name: str, path: str) -> dict[str, int]:
    """Loads a packed file into a model on the meta device and reads it all; returns bytes."""
    with torch.device("meta"):
        model = MODELS[name]()
    before = resident()
    qc_compiler.load_packed(model, path)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:  # buffers that are no part of the state dict
            tensor.flatten().view(torch.uint8).max()
    return {"weights": weight_bytes(model), "peak": peak() - before}


def resident() -> int:
    """Returns the bytes of memory that the process holds now; what it has freed goes back to the system first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
