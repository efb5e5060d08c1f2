"""Every Triton kernel compiled for a Hopper by the installed Triton and its ptxas, which needs no GPU.

The interpreter runs Python: what the compiler or the assembler refuses, it does not see.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import OPERATIONS, normal, operation

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
pytest.importorskip("quack", reason="quack is not installed: pip install -e '.[dev]'")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fluxfast.kernels import activations, flash, group_norm, norms, qkv
from fluxfast.kernels.device import INTERPRETED
from fluxfast.kernels.rowwise import E4M3

pytestmark = pytest.mark.skipif(INTERPRETED, reason="there are no kernels to compile in Triton's interpreter")

HOPPER = ("cuda", 90, 32)
D = 3072
LOCAL_LOADS = ("LDL", "STL")
"""What a kernel with more values than registers does."""


class Compiling:
    """A kernel that is compiled where it would be launched, whatever this process compiled of it before."""

    def __init__(self, kernel: Any, compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self._kernel, self._compiled = kernel, compiled
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._compiled.append(self._kernel.warmup(*args, grid=grid, **kwargs))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the operations of the test compile, kernel by kernel; nothing is launched, and no cache on disk is asked."""
    kernels: list[Any] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*HOPPER),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", hopper)
    for module in (activations, flash, group_norm, norms, qkv):
        monkeypatch.setattr(module, "wrap_triton", lambda kernel: Compiling(kernel, kernels, monkeypatch))
        # Tensors on a CPU pass for such that the kernels can reach.
        monkeypatch.setattr(module, "require_runnable", lambda *tensors: None, raising=False)
    monkeypatch.setattr(group_norm, "INTERPRETED", True)
    return kernels


def arguments(name: str) -> tuple[Any, ...]:
    """Of FLUX.1's widths, which decide how many registers a kernel takes, and of few rows, which do not."""
    rows, vectors, head = normal(4, D), [normal(2, D) for _ in range(3)], [normal(128) for _ in range(4)]
    angles = [normal(4, 128, dtype=torch.float32) for _ in range(2)]
    two_streams = (normal(1, 2, 3 * D), *head[:2], *angles, 1e-6, normal(1, 2, 3 * D), *head[2:])
    behind_values = (normal(1, 2, 2 * D), *two_streams[1:6], normal(1, 2, 2 * D), *head[2:])
    norm = normal(1, 8, 8, 512).movedim(-1, 1), normal(512), normal(512), 32, 1e-6, True, normal(512)
    parts = normal(2, flash.QUERIES, 128), normal(2, flash.QUERIES, dtype=torch.float32)
    return {
        "gelu_concat_quantize": (rows, normal(4, 4 * D)),
        "gelu_quantize": (normal(4, 4 * D),),
        "quantize_rows": (rows,),
        "quantize_beside": (rows, normal(4, 5 * D).to(E4M3), normal(4, 1, dtype=torch.float32)),
        "layernorm_modulate_quantize": (rows, *vectors[:2]),
        "layernorm_modulate_quantize_with_value": (rows, *vectors[:2]),
        "residual_layernorm_modulate_quantize": (rows, rows, *vectors),
        "qk_norm_rope_quantize": two_streams,
        "qk_norm_rope_hadamard_quantize": two_streams,
        "qk_norm_rope_hadamard_quantize_transposed": two_streams,
        "qk_norm_rope_hadamard_quantize_mixed": two_streams,
        "qk_norm_rope_hadamard_quantize_without_values": behind_values,
        "grouped_layernorm_modulate_quantize": (normal(1, 4, D), *normal(1, 2, 6, D).unbind(2)[:2], 2),
        "combine_parts": (*parts, normal(1, 129, 1, 128), 2),
        "group_norm_silu": norm,
    }[name]


def assembly(binary: Path) -> str:
    """What the GPU would run, by NVIDIA's disassembler, which Triton brings."""
    tool = knobs.nvidia.nvdisasm.path
    return subprocess.run([tool, "-c", str(binary)], capture_output=True, text=True, check=True).stdout


def test_kernels_of_quack_compile(tmp_path: Path) -> None:
    """Its GEMMs with our epilogues, and our attention: tensor cores multiply, and at FLUX.1's sizes no sum spills."""
    script = Path(__file__).with_name("quack_for_hopper.py")
    settings = {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "QUACK_CACHE_ENABLED": "0"}
    left, out = tmp_path / "left", tmp_path / "out"
    left.mkdir(), out.mkdir()
    settings |= {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": str(left)}
    command, environment = [sys.executable, script, left, out], {**os.environ, **settings}
    result = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {binary.stem: assembly(binary) for binary in out.iterdir()}
    assert len(found) == 20
    for name, code in found.items():
        spilled = sum(code.count(load) for load in LOCAL_LOADS)
        # The scheduler of a grouped one keeps two of its numbers there from tile to tile.
        product = "HGMMA" if name.startswith("dense") else "QGMMA"
        assert product in code and spilled <= (6 if name.startswith("grouped_gated_residual") else 0), name
    # One product after the other, waited for in between, is what ptxas makes of attention that it does not understand;
    # its numbers of buffers, if in every thread, are moved in front of each product; and telling the other thread block
    # of a cluster that a buffer is read needs no fence of the whole GPU.
    for attention in (code for name, code in found.items() if name.startswith("coded_attention")):
        assert attention.count("WARPGROUP.DEPBAR") == 3 and attention.count("QGMMA") == 24 > 2 * attention.count("R2UR")
        assert attention.count("UTMALDG.4D.MULTICAST") == 2 and "MEMBAR.ALL.GPU" not in attention


def test_combining_into_codes_compiles(compiled: list[Any]) -> None:
    """With every scale that it can be given."""
    partial, weights, out, parts = arguments("combine_parts")
    one, rows = torch.ones(1), torch.ones(129, 1)
    scales = {"largest": one, "row_scale": rows, "bound": torch.ones(2), "out_scale": rows.clone()}
    flash.combine_parts(partial, weights, out.to(E4M3), parts, **scales)
    assert len(compiled) == 1 and "cvt.rn.satfinite.e4m3x2" in compiled[0].asm["ptx"]


@pytest.mark.parametrize("name", [*OPERATIONS, "quantize_beside", "combine_parts", "group_norm_silu"])
def test_kernels_compile(name: str, compiled: list[Any], tmp_path: Path) -> None:
    """To machine code of a Hopper, in whose registers all values find room."""
    operation("quack" if name == "combine_parts" else "triton", name)(*arguments(name))
    assert compiled
    for kernel in compiled:
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        code = assembly(binary)
        assert kernel.metadata.target == GPUTarget(*HOPPER)
        assert "EXIT" in code and not any(load in code for load in LOCAL_LOADS), kernel.name
