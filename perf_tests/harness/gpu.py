"""What NVML knows of the GPU: which machine this is, whether it was throttled, who else was there. No torch.

Counters are cumulative in the driver, so two readings see a throttling that polling would miss. What a GPU does not
report is None, never 0. Clocks and power limits are the operator's to set; nothing is changed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from perf_tests.harness.schema import Counters

LEFT_OUT = re.compile(r"nvidia|geforce|tesla|quadro|graphics|device|sxm\d?|hbm\d?e?|\d+gb|pcie")
"""Words of a product name that a slug leaves out. What then shares a name mostly differs in its power limit; a
baseline's environment holds the whole name besides."""

EVENT_FIELDS = ((269, 270, 271), (251, 252, 253))
"""Field ids of the time in software thermal, hardware thermal and power-brake slowdown, by driver generation.

NVML renumbered them, within driver 580 even: 269-271 on 580.159.04 (H200, read there), 251-253 on 580.65.06. Under the
other numbering the same ids are settings of power smoothing, so the package's constants are not trusted: `_event_ns`.
"""


class GpuError(Exception):
    """There is a GPU and NVML cannot tell what is asked: what was observed, what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """NVML's readings at one moment; None where this GPU has none.

    Attributes:
        power_ns, thermal_ns: time below the requested clocks by the power or thermal policy, nanoseconds.
        hw_slowdown_ns, power_brake_ns: time in hardware thermal slowdown, in external power brake, nanoseconds.
        foreign_pids: processes with a compute context that are neither given as own nor in this process group.
        sm_clock_mhz: SM clock now.
    """

    power_ns: int | None = None
    thermal_ns: int | None = None
    hw_slowdown_ns: int | None = None
    power_brake_ns: int | None = None
    foreign_pids: tuple[int, ...] = ()
    sm_clock_mhz: int | None = None


def slug(device: int | str = 0, *, nvml: Any = None) -> str | None:
    """The machine a baseline belongs to: `h200-700w` (GPU, enforced power limit in W); None where there is no GPU.

    Args:
        device: NVML index or UUID of the GPU that is used.
        nvml: stands in for pynvml in tests.

    Raises:
        GpuError: there is a GPU and NVML fails; it is never taken for a CPU machine.
    """
    facts = gpu_facts(device, nvml=nvml)
    if not facts:
        return None
    words = [word for word in re.split(r"[^a-z0-9.]+", facts["name"].lower()) if word and not LEFT_OUT.fullmatch(word)]
    if not words:
        raise GpuError(
            f"GPU name {facts['name']!r} leaves no word for a slug; add a rule for it in perf_tests.harness.gpu"
        )
    return f"{'-'.join(words)}-{facts['power_limit_w']}w"


def gpu_facts(device: int | str = 0, *, nvml: Any = None) -> dict[str, Any]:
    """`name`, `power_limit_w` (enforced, W), `driver`, `capability` ("9.0"); empty where there is no GPU.

    Raises:
        GpuError: as `slug`.
    """
    with _opened(nvml) as lib:
        if lib is None:
            return {}
        handle = _handle(lib, device)
        major, minor = _asked(lib, "nvmlDeviceGetCudaComputeCapability", handle)
        return {
            "name": str(_asked(lib, "nvmlDeviceGetName", handle)),
            "power_limit_w": round(_asked(lib, "nvmlDeviceGetEnforcedPowerLimit", handle) / 1000),
            "driver": str(_asked(lib, "nvmlSystemGetDriverVersion")),
            "capability": f"{major}.{minor}",
        }


def read_counters(device: int | str = 0, own_pids: Collection[int] = (), *, nvml: Any = None) -> Snapshot:
    """Read the counters once; everything None where there is no GPU.

    Args:
        device: NVML index or UUID.
        own_pids: processes that may use the GPU, beside those of this process's group.
        nvml: stands in for pynvml in tests.

    Raises:
        GpuError: as `slug`.
    """
    with _opened(nvml) as lib:
        if lib is None:
            return Snapshot()
        handle = _handle(lib, device)
        sw_thermal_ns, hw_slowdown_ns, power_brake_ns = _event_ns(lib, handle)
        thermal_ns = _violation_ns(lib, handle, lib.NVML_PERF_POLICY_THERMAL)
        processes = _asked(lib, "nvmlDeviceGetComputeRunningProcesses", handle)
        return Snapshot(
            power_ns=_violation_ns(lib, handle, lib.NVML_PERF_POLICY_POWER),
            thermal_ns=sw_thermal_ns if thermal_ns is None else thermal_ns,
            hw_slowdown_ns=hw_slowdown_ns,
            power_brake_ns=power_brake_ns,
            foreign_pids=_foreign({p.pid for p in processes}, own_pids),
            sm_clock_mhz=_optional(lib, lambda: int(lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM))),
        )


def difference(before: Snapshot, after: Snapshot) -> Counters:
    """What happened between two snapshots of one GPU; a foreign process in either counts.

    Raises:
        GpuError: a counter went backwards, as when the driver was reloaded: nothing measured in between can stand.
    """

    def passed(field: str) -> int | None:
        first, second = getattr(before, field), getattr(after, field)
        if first is None or second is None:
            return None
        if second < first:
            raise GpuError(f"NVML's {field} went from {first} to {second}: the GPU was reset meanwhile; measure again")
        return int(second - first)

    return Counters(
        power_violation_ns=passed("power_ns"),
        thermal_violation_ns=passed("thermal_ns"),
        hw_slowdown_ns=passed("hw_slowdown_ns"),
        power_brake_ns=passed("power_brake_ns"),
        foreign_pids=sorted({*before.foreign_pids, *after.foreign_pids}),
        sm_clock_mhz_before=before.sm_clock_mhz,
        sm_clock_mhz_after=after.sm_clock_mhz,
    )


def first_visible(cuda_visible_devices: str | None) -> int | str:
    """NVML's name of the GPU that CUDA calls 0: index or UUID, from the value of CUDA_VISIBLE_DEVICES (None: unset).

    Raises:
        GpuError: the variable hides every GPU.
    """
    return 0 if cuda_visible_devices is None else _named(cuda_visible_devices)[0]


def visible(cuda_visible_devices: str | None, count: int, *, nvml: Any = None) -> list[int | str]:
    """NVML's names of the first `count` GPUs of CUDA, as `first_visible`.

    Raises:
        GpuError: fewer are there, or the variable hides every GPU.
    """
    if cuda_visible_devices is None:
        with _opened(nvml) as lib:
            there: list[int | str] = list(range(_asked(lib, "nvmlDeviceGetCount"))) if lib else []
        observed = "NVML counts"
    else:
        there = _named(cuda_visible_devices)
        observed = f"CUDA_VISIBLE_DEVICES={cuda_visible_devices!r} names"
    if len(there) < count:
        raise GpuError(f"{observed} {len(there)} and not {count} GPUs; ask for fewer, or let this process see more")
    return there[:count]


def _named(cuda_visible_devices: str) -> list[int | str]:
    """Each GPU once, up to the first word that names none, as CUDA reads the variable."""
    words = [word.strip() for word in cuda_visible_devices.split(",")]
    words = list(itertools.takewhile(lambda word: word not in ("", "-1", "NoDevFiles"), words))
    if not words:
        raise GpuError(f"CUDA_VISIBLE_DEVICES is {cuda_visible_devices!r} and hides every GPU; name one, or unset it")
    return list(dict.fromkeys(int(word) if word.isdecimal() else word for word in words))


def _gpu_nodes() -> list[Path]:
    """Device files of NVIDIA GPUs that this process could open."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


@contextlib.contextmanager
def _opened(nvml: Any) -> Iterator[Any]:
    """NVML, initialised; None if there is neither NVML nor a GPU."""
    nodes = _gpu_nodes()
    try:
        lib = nvml or importlib.import_module("pynvml")
    except ImportError as bad:
        if nodes:
            raise GpuError(f"{nodes[0]} is there but pynvml is not: `pip install nvidia-ml-py` ({bad})") from bad
        yield None
        return
    try:
        lib.nvmlInit()
        count = lib.nvmlDeviceGetCount()
    except lib.NVMLError as bad:
        absent = (lib.NVML_ERROR_LIBRARY_NOT_FOUND, lib.NVML_ERROR_DRIVER_NOT_LOADED)
        if nodes or bad.value not in absent:
            raise GpuError(f"NVML does not start ({bad}), so the GPU cannot be named; see `nvidia-smi`") from bad
        yield None
        return
    try:
        if count == 0 and nodes:
            raise GpuError(f"{nodes[0]} is there but NVML counts no GPU; see `nvidia-smi`")
        yield lib if count else None
    finally:
        lib.nvmlShutdown()


def _handle(lib: Any, device: int | str) -> Any:
    by = "nvmlDeviceGetHandleByIndex" if isinstance(device, int) else "nvmlDeviceGetHandleByUUID"
    return _asked(lib, by, device)


def _asked(lib: Any, function: str, *arguments: Any) -> Any:
    """A call that must succeed."""
    try:
        return getattr(lib, function)(*arguments)
    except lib.NVMLError as bad:
        raise GpuError(f"NVML: {function} failed ({bad}), so this GPU cannot be described; see `nvidia-smi`") from bad


def _optional(lib: Any, call: Callable[[], int]) -> int | None:
    """A reading, None where the GPU does not have it or does not show it to this user."""
    try:
        return call()
    except lib.NVMLError as bad:
        unsupported = (
            lib.NVML_ERROR_NOT_SUPPORTED,
            lib.NVML_ERROR_NO_PERMISSION,
            lib.NVML_ERROR_FUNCTION_NOT_FOUND,
            lib.NVML_ERROR_INVALID_ARGUMENT,
        )
        if bad.value in unsupported:
            return None
        raise GpuError(f"NVML: a counter cannot be read ({bad}); see `nvidia-smi`") from bad


def _violation_ns(lib: Any, handle: Any, policy: int) -> int | None:
    return _optional(lib, lambda: int(lib.nvmlDeviceGetViolationStatus(handle, policy).violationTime))


def _event_ns(lib: Any, handle: Any) -> tuple[int | None, int | None, int | None]:
    """Software thermal, hardware thermal, power brake: the one numbering under which all three are 64-bit counters.

    Power smoothing's settings are 32-bit, and unsupported before Blackwell (H200: 251-253 give "not supported", type
    32-bit). If both numberings fit, or none, there is no telling, and None is recorded.
    """
    wanted = [field for fields in EVENT_FIELDS for field in fields]
    try:
        values = list(lib.nvmlDeviceGetFieldValues(handle, wanted))
    except lib.NVMLError:
        return None, None, None
    fitting = []
    for start in range(0, len(wanted), 3):
        three = values[start : start + 3]
        if all(v.nvmlReturn == 0 and v.valueType == lib.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG for v in three):
            fitting.append([int(v.value.ullVal) for v in three])
    if len(fitting) != 1:
        return None, None, None
    sw_thermal_ns, hw_thermal_ns, power_brake_ns = fitting[0]
    return sw_thermal_ns, hw_thermal_ns, power_brake_ns


def _foreign(pids: Collection[int], own_pids: Collection[int]) -> tuple[int, ...]:
    """Those of `pids` that are not ours.

    In a container NVML may give the host's pids, under which we know neither ourselves nor those that wait beside us.
    Then as many processes that do not exist here as we named are taken to be those; one more is foreign.
    """
    foreign = sorted(pid for pid in pids if not _is_own(pid, own_pids))
    if len(foreign) == len(pids):
        hidden = [pid for pid in foreign if not _exists(pid)]
        foreign = [pid for pid in foreign if pid not in hidden[: len({os.getpid(), *own_pids})]]
    return tuple(foreign)


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _is_own(pid: int, own_pids: Collection[int]) -> bool:
    if pid in own_pids or pid == os.getpid():
        return True
    try:
        return os.getpgid(pid) == os.getpgrp()
    except OSError:
        return False
