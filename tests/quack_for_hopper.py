"""Compiles what is built on quack for a Hopper, without one: machine code of each kernel, in a file of its own.

A process of its own, because CuTe DSL reads its settings when it is imported: see `test_kernels_for_hopper.py`. Its
arguments are the folder in which CuTe DSL leaves machine code, and the one for these files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from quack.gemm_runtime import host

from fluxfast.kernels import dense, flash, gemm, projections
from fluxfast.kernels.rowwise import E4M3

LEFT, OUT = map(Path, sys.argv[1:])
PROCESSORS = 132
D = 3072
host.get_max_active_clusters = lambda *args, **kwargs: PROCESSORS // 2


def compile_epilogue(name: str, rows: int, columns: int, stream: torch.dtype = torch.bfloat16) -> None:
    """A product of this size, cut as on a GPU; of the stream's type if it adds to it."""
    q, weight = torch.empty(rows, D, dtype=E4M3), torch.empty(columns, D, dtype=E4M3)
    vectors = {"scale": torch.empty(rows), "weight_scale": torch.empty(columns)}
    vectors["bias"] = torch.empty(columns, dtype=torch.bfloat16)
    if name == "gelu":
        widths, c = gemm.GELU_WIDTHS, ()
        out = torch.empty(rows, D + columns, dtype=E4M3)[:, D:]
        vectors["out_scale"] = torch.empty(rows)
    else:
        widths, c = gemm.WIDTHS, (torch.empty(rows, columns, dtype=stream),)
        out = torch.empty_like(c[0])
        vectors["gate"] = torch.empty(columns, dtype=torch.bfloat16)
    cut = gemm.tiles(rows, columns, widths, PROCESSORS) | {"_launch": False}
    gemm.multiply(getattr(gemm, name), cut, q, weight, out, *c, **vectors)
    take(f"{name}_{rows}" + "_float16" * (stream == torch.float16))


def compile_grouped(name: str, columns: int, widths: tuple[int, ...], stream: torch.dtype = torch.bfloat16) -> None:
    """A product of both streams, cut as on a GPU for those of schnell."""
    text, tokens = 256, 4352
    q, weight = torch.empty(tokens, D, dtype=E4M3), torch.empty(2, columns, D, dtype=E4M3)
    out = torch.empty(tokens, columns, dtype=E4M3 if name == "gelu" else stream)
    vectors = {"scale": torch.empty(tokens), "weight_scale": torch.empty(2, columns)}
    vectors["bias"] = torch.empty(2, columns, dtype=torch.bfloat16)
    vectors |= {"out_scale": torch.empty(tokens)} if name == "gelu" else {}
    vectors |= {"gate": torch.empty(2, 6, columns, dtype=torch.bfloat16)[:, 2]} if name == "gated_residual" else {}
    c = (torch.empty_like(out),) if name == "gated_residual" else ()
    begins = torch.tensor([0, text, tokens], dtype=torch.int32)
    cut = gemm.tiles(tokens, columns, widths, PROCESSORS) | {"_launch": False}
    gemm.multiply(getattr(gemm, name), cut, q, weight, out, *c, begins=begins, **vectors)
    take(f"grouped_{name}" + "_float16" * (stream == torch.float16))


def compile_values(*groups: int) -> None:
    """A product of QKV, of both streams if there are groups."""
    tokens, given = 4352, torch.empty(*groups, 3 * D)
    q, weight, bias = torch.empty(tokens, D, dtype=E4M3), torch.empty(*groups, 3 * D, D, dtype=E4M3), given.bfloat16()
    qk, v, largest = projections._outputs(q, 1, tokens, 3 * D)
    begins = torch.tensor([0, 256, tokens], dtype=torch.int32) if groups else None
    vectors = {"scale": torch.empty(tokens), "weight_scale": given, "bias": bias}
    cut = projections.tiles_of(3 * D) | {"_launch": False}
    projections._multiply(cut, q, weight, qk, v[0], largest, begins, **vectors)
    take("grouped_values" if groups else "values")


def compile_dense(name: str, rows: int, columns: int, k: int = 4096) -> None:
    """A product of T5's, cut as on a GPU, with a gate if its epilogue has one."""
    x, weight = (torch.empty(n, k, dtype=torch.bfloat16) for n in (rows, columns))
    gated = name == "gated_gelu"
    cut = dense.tiles_of(rows, columns, PROCESSORS, gated=gated)
    out = torch.empty(rows, columns // 2 if gated else columns, dtype=torch.bfloat16)
    given, more = ((None,), {dense.GATED: out}) if gated else ((out, torch.empty_like(out)), {})
    getattr(dense, name).gemm(x, weight, *given, epi_args=more, _launch=False, **cut)
    take(f"dense_{name}_{columns}")


def take(name: str) -> None:
    """The machine code that was left, under a name that says whose it is."""
    (binary,) = LEFT.glob("*.cubin")
    binary.rename(OUT / f"{name}.cubin")


# Of the ones with the same tiles, one: quack compiles the others no more.
for sizes in (("gelu", 4352, 12288), ("gelu", 256, 12288)):
    compile_epilogue(*sizes)
for rows in (4352, 4096, 256):
    compile_epilogue("gated_residual", rows, D)
compile_grouped("linear", 3 * D, gemm.WIDTHS)
compile_grouped("gelu", 4 * D, gemm.GELU_WIDTHS)
compile_grouped("gated_residual", D, gemm.WIDTHS)
compile_epilogue("gated_residual", 4352, D, torch.float16)
compile_grouped("gated_residual", D, gemm.WIDTHS, torch.float16)
compile_dense("add_residual", 256, 4096)
compile_dense("gated_gelu", 256, 20480)
for columns in (512, 10240, 12288):
    compile_dense("gated_gelu", 256, columns)
compile_values()
compile_values(2)
for quantized, bounded in ((False, False), (True, False), (True, True)):
    flash.coded_attention_kernel(PROCESSORS, quantized, bounded, flash.SOURCE)
    take("coded_attention" + "_quantized" * quantized + "_bounded" * bounded)
