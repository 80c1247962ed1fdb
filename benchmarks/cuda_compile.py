"""Compile the GPU kernels without a GPU, for every tile of the autotuner:

    python -m benchmarks.cuda_compile --capability 80 90 --json benchmarks/results/cuda-compile.json

It shows what Triton's interpreter cannot: that the kernels compile, that products are integer tensor instructions, that
both operands are prefetched asynchronously, and how much shared memory a program needs. It does not measure speed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepquant.runtime.cuda.codes import group_norm_kernel, quantize_kernel
from stepquant.runtime.cuda.products import convolution_kernel, matmul_kernel
from stepquant.runtime.cuda.tuning import HIGH, TILES

TYPES = {
    "codes": "*i8", "weight": "*i8", "weight_zero_point": "*i8", "weight_sum": "*i32", "weight_scale": "*fp32",
    "bias": "*fp32", "row": "*i64", "scale": "*fp32", "zero_point": "*i32", "channel_add": "*fp32",
    "residual": "*bf16", "y": "*bf16", "x": "*bf16", "multiply": "*fp32", "add": "*fp32", "smoothing": "*fp32",
    "factor": "fp32", "eps": "fp32", "invalid": "*fp32",
}  # fmt: skip
ALIGNED = {"M", "N", "C", "K", "RUN", "BUCKET", "x_sample", "x_pixel", "norm_sample"}
"""Sizes that, like pointers, are multiples of 16 in common networks, for which Triton compiles separately."""
WINDOW = {"SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1, "KW": 3, "TAPS": 9, "UPSAMPLE": 1, "PARTS": 1}
PRODUCTS = {"matmul": (matmul_kernel, {}), "convolution 3x3": (convolution_kernel, WINDOW)}
OTHERS = {
    "quantize": (quantize_kernel, {"GROUPS": 1, "TOP": 255, "SILU": True, "BLOCK_M": 32, "BLOCK_C": 128}),
    "group_norm": (group_norm_kernel, {"WIDTH": 10, "BLOCK_P": 256, "BLOCK_W": 16}),
}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, types: dict[str, str], **options: int) -> Any:
    """Compile the kernel for a GPU of this compute capability."""
    while not isinstance(kernel, triton.runtime.jit.JITFunction):
        kernel = kernel.fn
    types = TYPES | types
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants and (name in ALIGNED or signature[name].startswith("*"))
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def rows(capability: int, tiles: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """One row per kernel and tile: its instructions, and the bytes of shared memory per program."""
    table: list[dict[str, Any]] = []
    for name, (kernel, constants) in PRODUCTS.items():
        for m, n, k, warps, stages in tiles:
            for bits in (8, 4):
                tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "HIGH": HIGH, "GROUPS": 1}
                weight = {"weight_zero_point": None} if bits == 8 else {}
                binary = compiled(
                    kernel, tile | constants | weight, capability, {} if bits == 8 else {"weight": "*u8"},
                    num_warps=warps, num_stages=stages,
                )  # fmt: skip
                text = binary.asm["ptx"]
                table.append(
                    {
                        "kernel": name,
                        "capability": capability,
                        "weight_bits": bits,
                        "tile": [m, n, k],
                        "warps": warps,
                        "stages": stages,
                        "integer_tensor_instructions": text.count(".s32.s8.s8"),
                        "asynchronous_copies": text.count("cp.async.c"),
                        "shared_memory": binary.metadata.shared,
                    }
                )
    for name, (kernel, constants) in OTHERS.items():
        floats = {"weight": "*bf16", "bias": "*bf16"} if name == "group_norm" else {}
        binary = compiled(kernel, constants, capability, floats)
        table.append({"kernel": name, "capability": capability, "shared_memory": binary.metadata.shared})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="10 times the compute capability")
    parser.add_argument("--tiles", type=int, default=len(TILES), help="number of tiles, the smallest first")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    table = [row for capability in arguments.capability for row in rows(capability, TILES[-arguments.tiles :])]
    lines = ",\n".join(json.dumps(row) for row in table)
    text = f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
    if arguments.json is None:
        print(text, end="")
    else:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
