"""Compiles quack's GEMMs with our epilogues for a Hopper, without one, and prints what the machine code is made of.

A process of its own, because CuTe DSL reads its settings when it is imported: see `test_kernels_for_hopper.py`. Its
argument is the folder in which CuTe DSL leaves machine code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from quack.gemm_runtime import host
from triton import knobs

from fluxfast.kernels import gemm
from fluxfast.kernels.rowwise import E4M3

FOLDER = Path(sys.argv[1])
PROCESSORS = 132
D = 3072
LOCAL = ("LDL", "STL")
"""What a kernel with more values than registers does."""
host.get_max_active_clusters = lambda *args, **kwargs: PROCESSORS // 2


def assembly() -> str:
    """Of the one kernel in the folder, which is emptied."""
    (binary,) = FOLDER.glob("*.cubin")
    command = [knobs.nvidia.nvdisasm.path, "-c", str(binary)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    binary.unlink()
    return code


def compiled(epilogue: str, rows: int, columns: int) -> dict[str, int]:
    """Float8 products and local memory in the machine code of a product of this size."""
    q, weight = torch.empty(rows, D, dtype=E4M3), torch.empty(columns, D, dtype=E4M3)
    vectors = {"scale": torch.empty(1, rows), "weight_scale": torch.empty(1, columns)}
    vectors["bias"] = torch.empty(1, columns, dtype=torch.bfloat16)
    if epilogue == "gelu":
        widths, c = gemm.GELU_WIDTHS, ()
        out = torch.empty(rows, D + columns, dtype=E4M3)[:, D:]
        vectors["out_scale"] = torch.empty(1, rows)
    else:
        widths, c = gemm.WIDTHS, (torch.empty(rows, columns, dtype=torch.bfloat16),)
        out = torch.empty_like(c[0])
        vectors["gate"] = torch.empty(1, columns, dtype=torch.bfloat16)
    getattr(gemm, epilogue).gemm(
        q,
        weight,
        out,
        *c,
        epi_args=vectors,
        post_init_attrs=gemm.FAST_ACCUMULATION,
        _launch=False,
        **gemm.tiles(rows, columns, widths, PROCESSORS),
    )
    code = assembly()
    return {"products": code.count("QGMMA"), "local": sum(code.count(name) for name in LOCAL)}


# Of the ones with the same tiles, one: quack compiles the others no more.
sizes = {"gelu": [(4352, 12288), (256, 12288)], "gated_residual": [(4352, 3072), (4096, 3072), (256, 3072)]}
found = {f"{name} {rows} x {n}": compiled(name, rows, n) for name, given in sizes.items() for rows, n in given}
print(json.dumps(found))
