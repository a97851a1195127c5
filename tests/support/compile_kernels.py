"""Compiles our Triton kernels to machine code for a GPU that need not be there: `python compile_kernels.py 90`.

It must run in a process of its own, without TRITON_INTERPRET.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from qc_compiler.kernels.triton_attention import _attention_kernel, _narrow_keys_kernel
from qc_compiler.kernels.triton_linear import _linear_kernel
from qc_compiler.kernels.triton_quantize import _quantize_kernel

SIZES = {"M": "i32", "M_BUCKET": "i32", "stride_xm": "i32", "rows_per_sample": "i32"}
LINEAR = {"x_scale_M": "*fp32", "x_zero_M": "*fp32", "w_sum_N": "*fp32", "w_scale": "*fp32", "bias_N": "*bf16",
          "gate_BN": "*bf16", "residual_MN": "*bf16", "y_MN": "*bf16", **SIZES}  # fmt: skip
SHAPE = {"stride_xk": 1, "K": 3072}
EPILOGUE = {"HAS_BIAS": True, "HAS_GATE": True, "HAS_RESIDUAL": True, "ACTIVATION": "gelu_tanh"}
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP_M": 8}
ATTENTION = {"q_BHSD": "*bf16", "k_BHSD": "*bf16", "v_BHSD": "*bf16", "kept_BNSD": "*bf16", "code_BISD": "*i8",
             "key_scale_BIG": "*fp32", "y_BSHD": "*bf16", "schedule_H3": "*i32", "mean_BHD": "*fp32",
             "entry_I3": "*i32", "scale": "fp32"}  # fmt: skip
HEAD = {"D": 128, "WIDTH": 128}


def main(capability: int) -> None:
    for form, x, w, scale in (
        ("int8", "*u8", "*i8", "*fp32"),
        ("int4", "*u8", "*u8", "*fp32"),
        ("fp8", "*u8", "*u8", "*fp32"),
        ("nvfp4", "*bf16", "*u8", "*u8"),
    ):
        has = {
            "HAS_SCALE": form != "nvfp4",
            "HAS_ZERO": form.startswith("int"),
            "BLOCK_K": 64 if form == "nvfp4" else 128,
        }
        constants = {**SHAPE, **EPILOGUE, **TILE, **has, "N": 3072, "FORM": form}
        show(
            f"linear {form}",
            _linear_kernel,
            {**LINEAR, "x_MK": x, "w_NK": w, "w_scale_N": scale},
            constants,
            capability,
        )
    for name, has_int8 in (("attention", False), ("attention int8", True)):
        constants = {**HEAD, "HAS_INT8": has_int8, "BLOCK_M": 64, "BLOCK_N": 64}
        show(name, _attention_kernel, ATTENTION, constants, capability)
    for kind, codes, rotation in (("uint", "*u8", 128), ("int", "*i8", 128), ("fp8", "*u8", 128), ("uint", "*u8", 1)):
        constants = {**SHAPE, "KIND": kind, "TOP": 127.0, "ROTATION": rotation, "BLOCK_M": 16, "CHUNKS": 4}
        types = {"x_MK": "*bf16", "codes_MK": codes, "scale_M": "*fp32", "zero_M": "*fp32", **SIZES}
        show(f"quantize {kind} {rotation}", _quantize_kernel, types, constants, capability)
    show("attention keys", _narrow_keys_kernel, ATTENTION, HEAD, capability)


def show(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    """Compiles a kernel and prints its name with the tensor core instructions it uses."""
    if isinstance(kernel, Autotuner):
        kernel = kernel.fn
    names = kernel.arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if signature[arg][0] in "*i"}
    source = ASTSource(kernel, signature, {(names.index(arg),): value for arg, value in constants.items()}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    units = {word for word in ptx.split() if word.startswith(("wgmma.mma_async", "mma.sync", "tcgen05.mma"))}
    print(name, *sorted(units))


if __name__ == "__main__":
    main(int(sys.argv[1]))
