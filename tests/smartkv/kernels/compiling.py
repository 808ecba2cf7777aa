"""What the kernels become on an H100 (sm_90), compiled without a GPU: `python -m tests.smartkv.kernels.compiling`.

It prints a line of JSON a kernel: registers and bytes of local memory of a thread (spills), shared memory of a program,
matrix instructions and asynchronous copies. Triton's interpreter must be off, so it runs in a process of its own.
"""

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smartkv.kernels import chunk_attention, range_attention
from smartkv.kernels.launching import BLOCKS

SHAPES = {"smollm2-135m": (3, 64), "qwen2.5-0.5b": (7, 64), "llama-3.1-8b": (4, 128)}  # group, head_dim
TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
POINTERS = ("queries", "keys", "values", "outputs")  # in the model's dtype


def compiled(
    kernel: Any,
    dtype: str,
    integers: tuple[str, ...],
    numbers: tuple[str, ...],
    constants: dict[str, Any],
    warps: int = 4,
) -> dict[str, int]:
    """Compile a kernel whose pointers are aligned to 16 bytes, as torch's are."""
    names = kernel.arg_names
    signature = dict.fromkeys(names, "*fp32")
    signature |= {name: TYPES[dtype] for name in names if name in POINTERS} | dict.fromkeys(integers, "*i32")
    signature |= {"tokens": "i32"} if "tokens" in names else {}
    signature |= dict.fromkeys(numbers, "fp32") | dict.fromkeys(constants, "constexpr")
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    code = binary.asm["ptx"]
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": binary.metadata.shared,
        "matrix": len(re.findall(r"\b(?:wgmma|mma)\.\S+", code)),
        "asynchronous": len(re.findall(r"cp\.async\.c[ga]", code)),
    }


def main() -> None:
    """Compile every kernel for every shape."""
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        for model, (group, head_dim) in SHAPES.items():
            pads = {"GROUP": group, "GROUP_PAD": 16, "HEAD_DIM": head_dim, "HEAD_DIM_PAD": head_dim, "SPLITS": 8}
            attend = pads | {"BLOCK": BLOCKS[width], "CAPPED": False, "WIDE": False}
            found = {
                "attend": compiled(
                    range_attention._attend_split, dtype, ("starts", "lengths"), ("scaling", "cap"), attend
                ),
                "merge": compiled(range_attention._merge_splits, dtype, (), (), pads | {"SINKS": False}),
            }
            sizes = {"GROUP": group, "HEAD_DIM": head_dim, "HEAD_DIM_PAD": head_dim, "BLOCK": BLOCKS[width]}
            rows, warps = chunk_attention.rows_and_warps(width, head_dim)
            chunk = sizes | {"ROWS": rows, "CAPPED": False, "SINKS": False, "WIDE": False}
            whole, numbers = ("positions", "ends", "firsts", "counts", "places"), ("scaling", "cap")
            found["chunk"] = compiled(chunk_attention._attend_tile, dtype, whole, numbers, chunk, warps)
            for kernel, figures in found.items():
                print(json.dumps({"kernel": kernel, "dtype": dtype, "model": model} | figures))


if __name__ == "__main__":
    main()
