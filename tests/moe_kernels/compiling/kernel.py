"""Compile one kernel for a GPU, without one, and look at what came of it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import moe_kernels

MODULES = {
    module.name.rpartition(".")[2]: importlib.import_module(module.name)
    for module in pkgutil.walk_packages(moe_kernels.__path__, "moe_kernels.")
    if not module.ispkg
}
ALIGNED = ("stride_row", "stride_slot", "hidden_size", "intermediate", "num_experts", "rows_at")
ALIGNED += ("stride_scale", "stride_zero", "inner", "height", "width", "stride_left", "stride_right")
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
QUANTISED = {  # the types of weights and of their scales
    "fp8_block": ("*fp8e4nv", "*fp32"),
    "mxfp4": ("*i32", "*u8"),
    "int4": ("*i32", "*bf16"),
}
# Of every kind of expert: activation, and whether it has biases.
GPT_OSS = "silu limit=7.0 alpha=1.702 up_offset=1.0"
KINDS = (("silu", False), (GPT_OSS, True), ("gelu_tanh", False), ("relu2 ungated", False), ("gelu", True))


def compile_kernel(module: str, name: str, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int):  # type: ignore[no-untyped-def]
    """`types`: those of the arguments that differ from i32 (shapes) and *i32 (pointers); everything is 16-aligned."""
    kernel = getattr(MODULES[module], name).jit
    signature = {}
    for argument in kernel.arg_names:
        default = "*i32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, default)
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument not in constants and (argument.endswith("_ptr") or argument in ALIGNED)
    }
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, places, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    print(f"{module}.{name} sm_{arch} {options} {constants} shared={compiled.metadata.shared}", flush=True)
    return compiled


def compile_small_one(
    module: str, name: str, types: dict[str, str], constants: dict[str, Any], arch: int, num_warps: int = 4
):  # type: ignore[no-untyped-def]
    pdl = arch >= 90
    compiled = compile_kernel(module, name, types, constants | {"PDL": pdl}, arch, num_warps=num_warps, launch_pdl=pdl)
    ptx = compiled.asm["ptx"]
    wait, access = ptx.find("griddepcontrol.wait"), min(ptx.find("ld.global"), ptx.find("st.global"))
    if name == "_send_rows_kernel" and pdl:
        assert access < wait < ptx.find("atom."), "must wait for the kernel before, and before it says anything"
    elif name == "_combine_home_kernel" and pdl and not constants["SAYS"]:
        assert ptx.find("atom.") < wait < ptx.find("launch_dependents"), "must have waited when the next kernel starts"
    else:
        assert 0 <= wait < access if pdl else wait == -1, "must wait for the kernel before, and before all else"
    if "increment_ptr" in types and constants.get("increment_ptr", 0) is not None:
        check_recording(ptx)
    return compiled


def check_recording(ptx: str) -> None:
    """Load is added by one atomic without a fence, whose result nobody reads (so ptxas makes a RED of it)."""
    (result,) = re.findall(r"atom\.global\.gpu\.relaxed\.add\.u64 (%rd\d+),", ptx)
    uses = [line for line in ptx.splitlines() if re.search(rf"{result}\b", line)]
    assert all(re.search(rf"(mov\.u64|add\.u64)\s+{result},", line) for line in uses), f"the result is read: {uses}"
    assert not re.search(r"fence|membar|acq_rel", ptx)


def check_hopper(compiled, programs_per_sm: int = 1) -> None:  # type: ignore[no-untyped-def]
    """Products are Hopper's, and so many programs share the memory of a multiprocessor."""
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    assert "wgmma" in ptx and "mma.sync" not in ptx
    assert shared <= 227 * 1024 // programs_per_sm, f"{shared} bytes of shared memory"
