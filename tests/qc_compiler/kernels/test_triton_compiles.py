"""What the interpreter cannot show: that the kernels compile for a Hopper GPU, and to its tensor cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]


def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    run = subprocess.run([sys.executable, str(script), "90"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [line.split(".")[0] + " … " + ".".join(line.split(".")[-3:]) for line in run.stdout.splitlines()]
    assert found[:-2] == [
        "linear int8 wgmma … s32.s8.s8",
        "linear int4 wgmma … s32.s8.s8",
        "linear fp8 wgmma … f32.e4m3.e4m3",
        "linear nvfp4 wgmma … f32.bf16.bf16",
        "attention wgmma … f32.bf16.bf16",
        "attention int8 wgmma … s32.s8.s8",
        "quantize uint 128 wgmma … f32.bf16.bf16",
        "quantize int 128 wgmma … f32.bf16.bf16",
        "quantize fp8 128 wgmma … f32.bf16.bf16",
    ]
    assert run.stdout.splitlines()[-2:] == ["quantize uint 1", "attention keys"]  # nothing to multiply
