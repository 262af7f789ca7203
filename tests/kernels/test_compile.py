"""What the kernels compile to for Hopper, without a GPU: no spilled registers, and matrix instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("compile_for_hopper.py")
SHARED = 227 * 1024
"""Bytes that a program may have on an H100."""


def compiled(*arguments: str) -> list[dict]:
    # Fusion of multiply and add is what Triton has always done; newer versions want it said.
    settings = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(PROGRAM), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(kernels: list[dict]) -> None:
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        if "*bf16" in kernel["constants"]["types"]:
            assert kernel["hgmma"] > 0, kernel


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the assembler comes with Triton for Linux")
def test_the_usual_shape_of_a_lora_layer_stays_in_registers():
    kernels = compiled("lora_linear")
    assert kernels
    check(kernels)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the assembler comes with Triton for Linux")
def test_every_shape_stays_in_registers():
    kernels = compiled("every")
    assert len({kernel["kernel"] for kernel in kernels}) >= 6
    check(kernels)
