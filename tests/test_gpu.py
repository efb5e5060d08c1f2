"""NVML readings with a made-up NVML: what it says is recorded, the unsaid is None, failure is an error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perf_tests.harness import gpu
from perf_tests.harness.gpu import (
    GpuError,
    Snapshot,
    difference,
    first_visible,
    gpu_facts,
    read_counters,
    slug,
    visible,
)
from perf_tests.harness.schema import Counters

ULL, UINT = 3, 1


class FakeNvml:
    """One GPU; `fields` maps a field id to (return code, value type, value), `errors` a function to an error code."""

    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_PERF_POLICY_POWER = 0
    NVML_PERF_POLICY_THERMAL = 1
    NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = ULL
    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            self.value = value

    def __init__(self, name: str = "NVIDIA H200", limit_mw: int = 700_000, count: int = 1) -> None:
        self.name, self.limit_mw, self.count = name, limit_mw, count
        self.violations = {0: 1000, 1: 20}
        # As read on an H200 with driver 580.159.04.
        self.fields: dict[int, tuple[int, int, int]] = dict.fromkeys((251, 252, 253), (3, UINT, 0))
        self.fields |= {269: (0, ULL, 20), 270: (0, ULL, 5), 271: (0, ULL, 7)}
        self.pids: list[int] = []
        self.errors: dict[str, int] = {}
        self.opened = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in super().__getattribute__("errors"):
            raise self.NVMLError(self.errors[name])
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index >= self.count:
            raise self.NVMLError(self.NVML_ERROR_INVALID_ARGUMENT)
        return f"handle {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle {uuid}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return self.name

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self.limit_mw

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return 9, 0

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> SimpleNamespace:
        return SimpleNamespace(referenceTime=1, violationTime=self.violations[policy])

    def nvmlDeviceGetFieldValues(self, handle: str, ids: list[int]) -> list[SimpleNamespace]:
        found = [self.fields.get(field, (2, 0, 0)) for field in ids]
        return [SimpleNamespace(nvmlReturn=r, valueType=t, value=SimpleNamespace(ullVal=v)) for r, t, v in found]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return 1980


@pytest.fixture(autouse=True)
def no_nodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Device files as on a machine without a GPU; a test may add some."""
    nodes: list[Path] = []
    monkeypatch.setattr(gpu, "_gpu_nodes", lambda: nodes)
    return nodes


@pytest.mark.parametrize(
    ("name", "limit_mw", "expected"),
    [
        ("NVIDIA H200", 700_000, "h200-700w"),
        ("NVIDIA H100 80GB HBM3", 700_000, "h100-700w"),
        ("NVIDIA H100 80GB HBM3", 649_990, "h100-650w"),
        ("NVIDIA H100 PCIe", 350_000, "h100-350w"),
        ("NVIDIA H100 NVL", 400_000, "h100-nvl-400w"),
        ("NVIDIA A100-SXM4-80GB", 400_000, "a100-400w"),
        ("NVIDIA GeForce RTX 4090", 450_000, "rtx-4090-450w"),
        ("Tesla T4", 70_000, "t4-70w"),
        ("NVIDIA RTX 6000 Ada Generation", 300_000, "rtx-6000-ada-generation-300w"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 700_000, "h100-mig-1g.10gb-700w"),
    ],
)
def test_a_slug_is_the_gpu_and_its_power_limit(name: str, limit_mw: int, expected: str) -> None:
    """Two machines of one slug compare; another power limit is another machine."""
    fake = FakeNvml(name, limit_mw)
    assert slug(nvml=fake) == expected
    assert fake.opened == 0


def test_the_facts_are_those_of_the_environment() -> None:
    """Name, limit, driver and capability, by index and by UUID."""
    expected = {"name": "NVIDIA H200", "power_limit_w": 700, "driver": "580.159.04", "capability": "9.0"}
    assert gpu_facts(nvml=FakeNvml()) == gpu_facts("GPU-1", nvml=FakeNvml()) == expected


@pytest.mark.parametrize("code", [FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND, FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_driver_and_gpu_it_is_a_cpu(code: int, no_nodes: list[Path]) -> None:
    """No NVML and no device file has no slug, all None; the same with a device file is an error, not a CPU."""
    fake = FakeNvml()
    fake.errors["nvmlInit"] = code
    assert slug(nvml=fake) is None
    assert gpu_facts(nvml=fake) == {}
    assert difference(read_counters(nvml=fake), read_counters(nvml=fake)) == Counters()
    no_nodes.append(Path("/dev/nvidia0"))
    with pytest.raises(GpuError, match="NVML does not start"):
        slug(nvml=fake)


def test_no_device_counts_as_a_cpu_unless_there_is_one(no_nodes: list[Path]) -> None:
    """A driver without a GPU is a CPU machine; a device file that NVML does not count is an error."""
    assert slug(nvml=FakeNvml(count=0)) is None
    no_nodes.append(Path("/dev/nvidia0"))
    with pytest.raises(GpuError, match="NVML counts no GPU"):
        slug(nvml=FakeNvml(count=0))


def test_a_gpu_without_pynvml_is_an_error(monkeypatch: pytest.MonkeyPatch, no_nodes: list[Path]) -> None:
    """The package missing is no sign that the GPU is."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert slug() is None
    no_nodes.append(Path("/dev/nvidia0"))
    with pytest.raises(GpuError, match="pip install nvidia-ml-py"):
        slug()


@pytest.mark.parametrize(
    "function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName", "nvmlDeviceGetEnforcedPowerLimit"]
)
def test_a_failing_nvml_is_an_error(function: str) -> None:
    """A lost GPU is neither a CPU nor another GPU."""
    fake = FakeNvml()
    fake.errors[function] = FakeNvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(GpuError, match="nvidia-smi"):
        slug(nvml=fake)


def test_an_unknown_device_is_an_error() -> None:
    """An index beyond the last GPU is not another GPU."""
    with pytest.raises(GpuError, match="nvmlDeviceGetHandleByIndex failed"):
        slug(3, nvml=FakeNvml())


def test_a_difference_is_what_happened_meanwhile() -> None:
    """Counters since boot are subtracted, clocks are kept, each under its own name."""
    fake = FakeNvml()
    before = read_counters(nvml=fake)
    fake.violations = {0: 1500, 1: 21}
    fake.fields |= {270: (0, ULL, 15), 271: (0, ULL, 107)}
    assert difference(before, read_counters(nvml=fake)) == Counters(
        power_violation_ns=500,
        thermal_violation_ns=1,
        hw_slowdown_ns=10,
        power_brake_ns=100,
        sm_clock_mhz_before=1980,
        sm_clock_mhz_after=1980,
    )


def test_the_older_numbering_of_fields_is_read() -> None:
    """On a driver where 269-271 are power smoothing's, the counters are 251-253."""
    fake = FakeNvml()
    fake.fields = {251: (0, ULL, 1), 252: (0, ULL, 2), 253: (0, ULL, 3)} | dict.fromkeys((269, 270, 271), (0, UINT, 9))
    snapshot = read_counters(nvml=fake)
    assert (snapshot.hw_slowdown_ns, snapshot.power_brake_ns) == (2, 3)


@pytest.mark.parametrize("both", [True, False])
def test_a_field_of_unknown_meaning_is_none(both: bool) -> None:
    """If both numberings fit, or neither, nothing is guessed."""
    fake = FakeNvml()
    fake.fields = dict.fromkeys((251, 252, 253, 269, 270, 271), (0, ULL, 1)) if both else {}
    snapshot = read_counters(nvml=fake)
    assert (snapshot.hw_slowdown_ns, snapshot.power_brake_ns, snapshot.thermal_ns) == (None, None, 20)


@pytest.mark.parametrize("code", [FakeNvml.NVML_ERROR_NOT_SUPPORTED, FakeNvml.NVML_ERROR_NO_PERMISSION])
def test_what_is_not_supported_is_none_and_not_zero(code: int) -> None:
    """ "Never throttled" and "cannot tell" stay apart; thermal time then comes from the event counter."""
    fake = FakeNvml()
    fake.errors = dict.fromkeys(("nvmlDeviceGetViolationStatus", "nvmlDeviceGetClockInfo"), code)
    assert read_counters(nvml=fake) == Snapshot(thermal_ns=20, hw_slowdown_ns=5, power_brake_ns=7)
    fake.errors["nvmlDeviceGetFieldValues"] = code
    assert difference(read_counters(nvml=fake), read_counters(nvml=fake)) == Counters()


def test_a_lost_gpu_is_an_error_while_measuring() -> None:
    """A counter that fails for any other reason than support ends the measurement."""
    fake = FakeNvml()
    fake.errors["nvmlDeviceGetViolationStatus"] = FakeNvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(GpuError, match="a counter cannot be read"):
        read_counters(nvml=fake)


def test_a_counter_that_goes_backwards_is_an_error() -> None:
    """The driver was reloaded in between."""
    with pytest.raises(GpuError, match=r"power_ns went from 5 to 4: the GPU was reset meanwhile"):
        difference(Snapshot(power_ns=5), Snapshot(power_ns=4))


def test_foreign_processes_are_told_from_own() -> None:
    """This process, its group and the named ones are own; init and a process of another session are not."""
    own = subprocess.Popen(["sleep", "30"])
    foreign = subprocess.Popen(["sleep", "30"], start_new_session=True)
    fake = FakeNvml()
    try:
        fake.pids = [os.getpid(), own.pid, foreign.pid, 1]
        snapshot = read_counters(nvml=fake)
        assert snapshot.foreign_pids == (1, foreign.pid)
        assert read_counters(own_pids={foreign.pid, 1}, nvml=fake).foreign_pids == ()
        assert difference(Snapshot(), snapshot).foreign_pids == [1, foreign.pid]
        assert difference(snapshot, Snapshot()).foreign_pids == [1, foreign.pid]
    finally:
        for process in (own, foreign):
            process.kill()
            process.wait()


def test_in_a_container_one_unknown_process_is_this_one() -> None:
    """Pids of the host do not exist here: the first is taken for ours, a second is foreign; beside ours, any is."""
    fake = FakeNvml()
    fake.pids = [2**22 + 1]
    assert read_counters(nvml=fake).foreign_pids == ()
    fake.pids = [2**22 + 1, 2**22 + 2]
    assert read_counters(nvml=fake).foreign_pids == (2**22 + 2,)
    fake.pids = [2**22 + 1, 2**22 + 2, 2**22 + 3]
    beside = read_counters(own_pids=[os.getpid(), os.getppid()], nvml=fake).foreign_pids
    assert beside == (2**22 + 3,), "one more waits, and may hold a context too"
    fake.pids = [2**22 + 1, os.getpid()]
    assert read_counters(nvml=fake).foreign_pids == (2**22 + 1,)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, 0), ("0", 0), ("3,1", 3), (" 2", 2), ("GPU-8a,GPU-9b", "GPU-8a"), ("MIG-1", "MIG-1")]
)
def test_the_first_visible_gpu_is_the_one_that_is_used(value: str | None, expected: int | str) -> None:
    """CUDA's device 0 is what CUDA_VISIBLE_DEVICES names first."""
    assert first_visible(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, [0, 1]), ("3,1,0", [3, 1]), ("GPU-8a, 2", ["GPU-8a", 2]), ("4,5,-1", [4, 5])],
)
def test_the_first_gpus_are_those_of_the_variable(value: str | None, expected: list[int | str]) -> None:
    """In its order; without it those that NVML counts first."""
    fake = FakeNvml(count=3)
    assert visible(value, 2, nvml=fake) == expected
    assert visible(value, 1, nvml=fake) == [first_visible(value)]
    assert fake.opened == 0


@pytest.mark.parametrize(
    ("value", "observed"),
    [
        (None, "NVML counts 1"),
        ("3", "CUDA_VISIBLE_DEVICES='3' names 1"),
        ("3,3", "CUDA_VISIBLE_DEVICES='3,3' names 1"),
        ("3,-1,4", "CUDA_VISIBLE_DEVICES='3,-1,4' names 1"),
    ],
)
def test_fewer_gpus_than_asked_for_are_an_error(value: str | None, observed: str) -> None:
    """Two workers on one GPU would measure each other."""
    with pytest.raises(GpuError, match=f"^{observed} and not 2 GPUs; ask for fewer, or let this process see more$"):
        visible(value, 2, nvml=FakeNvml())


def test_gpus_without_nvml_are_none(no_nodes: list[Path]) -> None:
    """Where there is no driver, NVML counts none."""
    fake = FakeNvml()
    fake.errors["nvmlInit"] = FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND
    with pytest.raises(GpuError, match="NVML counts 0"):
        visible(None, 1, nvml=fake)


@pytest.mark.parametrize("value", ["", "-1", "-1,0"])
def test_hidden_gpus_are_an_error(value: str) -> None:
    """A suite that would then run on the CPU must not take the GPU's baseline."""
    with pytest.raises(GpuError, match="hides every GPU"):
        first_visible(value)
    with pytest.raises(GpuError, match="hides every GPU"):
        visible(value, 1)


def test_the_fake_has_the_names_of_the_real_one() -> None:
    """Every constant and function of FakeNvml exists in pynvml, constants with the same value."""
    pynvml = pytest.importorskip("pynvml")
    for name in dir(FakeNvml):
        if name.startswith(("NVML", "nvml")):
            assert hasattr(pynvml, name)
            if isinstance(value := getattr(FakeNvml, name), int):
                assert getattr(pynvml, name) == value
