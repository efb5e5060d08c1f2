"""Which processor this is, and what a baseline of it is called. No torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPU = "cpu"


def cpu_slug(capability: str) -> str:
    """The machine a CPU baseline belongs to: `cpu-avx512-bf16`.

    Without the vector instructions in its name, one baseline would judge processors on which a level's ratio to bf16
    has nothing in common: `bf16` takes 0.8 of `fp32`'s time with AVX-512 and its bfloat16, 1.4 of it where that has
    float16 too, and 2.6 of it with AVX2.

    Args:
        capability: `fluxfast.machine.cpu_capability`.
    """
    return "-".join((CPU, *re.findall(r"[a-z0-9.]+", capability.lower())))


def is_cpu(slug: str) -> bool:
    """Whether a slug is of a machine without a GPU."""
    return slug == CPU or slug.startswith(f"{CPU}-")


def cpu_name() -> str:
    """The processor's model name where Linux tells, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
