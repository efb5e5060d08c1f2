"""What a number was measured on; run as a module it prints that. Used by the worker alone; imports torch."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fluxfast.machine import cpu_capability
from perf_tests.harness import gpu
from perf_tests.harness.cpu import cpu_name
from perf_tests.harness.schema import Environment


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return f"{name} {version(name)}" if len(names) > 1 else version(name)
        except PackageNotFoundError:
            continue
    return None


def device_uuid() -> str | None:
    """NVML's name of the GPU that torch calls 0, whatever CUDA_VISIBLE_DEVICES says; None without one."""
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None


def read_environment() -> Environment:
    """Of this process."""
    device = device_uuid()
    facts = gpu.gpu_facts(device) if device else {}
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        torchao=version("torchao"),
        diffusers=version("diffusers"),
        transformers=version("transformers"),
        fa3=_version("flash-attn-3", "fa3-fwd"),
        cuda=torch.version.cuda,
        driver=facts.get("driver"),
        device_name=facts.get("name", "cpu"),
        capability=facts.get("capability") if device else cpu_capability(),
        power_limit_w=facts.get("power_limit_w"),
        cpu_name=cpu_name(),
        cpu_threads=torch.get_num_threads(),
        platform=platform.platform(),
        quack=_version("quack-kernels"),
        cutlass_dsl=_version("nvidia-cutlass-dsl"),
    )


if __name__ == "__main__":
    print(read_environment().model_dump_json())
