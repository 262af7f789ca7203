"""Compiles what the launchers would launch, for sm_90, on a machine that may have no GPU.

Run as a program, since Triton decides at import whether kernels are interpreted: it prints one JSON line per compiled
kernel. Not a test file; `test_compile.py` runs it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

HALF = torch.bfloat16
seen: set[str] = set()


def compile_call(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of a launch: compiles with the same types, constants and alignments."""
    named = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
    constants, signature, attributes = {}, {}, {}
    for index, name in enumerate(self.arg_names):
        value = named[name]
        if self.params[index].is_constexpr or (isinstance(value, int) and value == 1) or value is None:
            constants[name], signature[name] = value, "constexpr"
            continue
        signature[name] = mangle_type(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    source = ASTSource(self, signature, constants, attributes)
    label = f"{self.__name__} {options} {constants} {[v for v in signature.values() if v != 'constexpr']} {attributes}"
    if label in seen:
        return
    seen.add(label)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shown = {name: value for name, value in constants.items() if name.isupper()}
    shown |= {"types": sorted({value for value in signature.values() if value.startswith("*")})}
    line = {"kernel": self.__name__, "constants": shown | options, "shared": compiled.metadata.shared}
    print(json.dumps(line | usage(compiled.asm["cubin"])), flush=True)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spills) of a compiled kernel; whether it uses Hopper's matrix instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        show = [str(tool), "--dump-resource-usage", file.name]
        found = subprocess.run(show, capture_output=True, text=True, check=True)
        code = subprocess.run([str(tool), "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(part.split(":")[:2] for part in (found.stdout + found.stderr).split() if part.count(":") == 1)
    return {name.lower(): int(words[name]) for name in ("REG", "STACK", "LOCAL")} | {"hgmma": code.count("HGMMA")}


def lora_linear(every: bool) -> None:
    from graft.kernels.lora_linear import paths
    from graft.kernels.lora_linear_triton import fused, fused_backward

    def run(mode: int, r: int, bands: int, dtype: torch.dtype) -> None:
        x, weight = torch.empty(2, 64, 768, dtype=dtype), torch.empty(768, 768, dtype=dtype)
        down, up = torch.empty(3, bands * r, 768, dtype=dtype), torch.empty(3, 768, r, dtype=dtype)
        scale, route = torch.empty(bands, 3), torch.zeros(2, dtype=torch.long)
        fused(x, weight, None, down, up, scale, route, mode)
        if every:
            fused_backward(x, weight, down, up, scale, route, mode)

    if not every:
        return run(1, 16, 1, HALF)
    for r, bands in [(16, 1), (32, 1), (64, 1), (128, 1), (16, 3), (64, 3)]:
        for tokens in (1024, 32):
            for path in paths(torch.empty(tokens, 768, dtype=HALF), 768, r, bands)[1:]:
                name, tile = path.split()
                run(2 * int(tile) + (name == "inline"), r, bands, HALF)
    for mode in (4, 5):
        run(mode, 32, 1, torch.float32)
    return None


def gated_attention(every: bool) -> None:
    from graft.kernels.gated_attention_triton import fused, fused_backward

    for d, lengths in [(40, (77, 4)), (64, (77, 16)), (128, (10,)), (128, (77, 257))] if every else [(64, (77, 16))]:
        q = torch.empty(1, 2, 128, d, dtype=HALF)
        keys, gates = [q.new_empty(1, 2, m, d) for m in lengths], [torch.ones(1, 2) for _ in lengths]
        fused(q, q, keys, keys, gates)
        if every:
            fused_backward(q, q, keys, keys, gates)


def bottleneck(every: bool) -> None:
    from graft.kernels.bottleneck_triton import fused, fused_backward

    for h, norm in [(8, False), (64, True), (64, False), (128, True)] if every else [(64, True)]:
        for dtype in (HALF, torch.float32) if every and not norm and h < 64 else (HALF,):
            x, route = torch.empty(2, 64, 768, dtype=dtype), torch.zeros(2, dtype=torch.long)
            down, up = torch.empty(3, h, 768), torch.empty(3, 768, h)
            affine = (x[0, 0], x[0, 0], 1e-5) if norm else (None, None, 0.0)
            fused(x, None, down, down[..., 0], up, up[..., 0], torch.ones(3), route, *affine, 1, True)
            if every:
                fused_backward(x, x, down, down[..., 0], up, torch.ones(3), route, *affine, 1, True)


def class_votes(every: bool) -> None:
    from graft.kernels.class_votes_triton import fused

    for dtype, widest in [(HALF, 1), (HALF, 16), (HALF, 128), (torch.float32, 16)] if every else [(HALF, 16)]:
        features, index = torch.empty(256, 512, dtype=dtype), torch.zeros(1001, dtype=torch.long)
        fused(features, features, index, index, index, 5.5, 1000, widest)


def flat_adamw(every: bool) -> None:
    from graft.kernels.flat_adamw_triton import fused

    flat, table, each = torch.empty(4096), torch.zeros(4, 3, dtype=torch.long), torch.empty(2)
    fused(flat, flat, flat.clone(), flat.clone(), each, table, table[0], each, each, each, 0.9, 0.999, 1e-8)


OPERATIONS: tuple[Callable[[bool], None], ...] = (lora_linear, gated_attention, bottleneck, class_votes, flat_adamw)

if __name__ == "__main__":
    JITFunction.run = compile_call  # type: ignore[method-assign]
    for operation in OPERATIONS:
        if len(sys.argv) < 2 or sys.argv[1] in (operation.__name__, "every"):
            operation("every" in sys.argv)
