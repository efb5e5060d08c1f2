"""Machines without a GPU: which baseline is theirs, how they convolve bfloat16, and how they multiply float8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d
from torch.profiler import profile

from fluxfast import convolution, scaled_mm
from fluxfast.build import build
from fluxfast.levels import BF16
from fluxfast.machine import cpu_capability
from fluxfast.workloads import Workload
from perf_tests.harness import gpu
from perf_tests.harness.cpu import cpu_slug, is_cpu
from perf_tests.harness.environment import read_environment
from perf_tests.harness.machine import ask_machine, slug_of

CPU = {"device": "cpu", "cpu_capability": "AVX512-BF16"}


@pytest.mark.parametrize(
    ("widest", "bf16", "fp16", "amx", "expected"),
    [
        ("AVX2", False, False, False, "cpu-avx2"),
        ("AVX512", False, False, False, "cpu-avx512"),
        ("AVX512", True, False, False, "cpu-avx512-bf16"),
        ("AVX512", True, True, False, "cpu-avx512-fp16"),
        ("AVX512", True, True, True, "cpu-avx512-amx"),
        ("SVE256", False, False, False, "cpu-sve256"),
        ("Z VECTOR", False, False, False, "cpu-zvector"),
        ("DEFAULT", False, False, False, "cpu-aarch64"),
    ],
)
def test_a_cpu_baseline_is_of_vector_instructions(
    monkeypatch: pytest.MonkeyPatch, widest: str, bf16: bool, fp16: bool, amx: bool, expected: str
) -> None:
    """Two processors that compute bfloat16 differently share no ratio to it, whatever their name."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": fp16})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert cpu_slug(cpu_capability()) == expected
    assert is_cpu(expected)


def test_a_gpu_is_no_cpu() -> None:
    """A product name may begin with the letters."""
    assert not is_cpu("h200-700w")
    assert not is_cpu("cpux-700w")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's environment holds its compute capability")
def test_the_environment_holds_them() -> None:
    """A baseline says which machine it is of even outside its folder."""
    assert read_environment().capability == cpu_capability()


def test_a_gpu_that_only_nvml_finds_is_not_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CPU build of torch the workers would measure the processor, unless that was asked for."""
    monkeypatch.setattr(gpu, "slug", lambda device=0: "h200-700w")
    for visible in (None, "1"):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ValueError, match=r"'h200-700w' and its torch finds no GPU: install a CUDA build"):
            slug_of(CPU, ())
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert slug_of(CPU, ()) == "cpu-avx512-bf16"


def test_a_gpu_that_nvml_does_not_find_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There would be no name to file its numbers under."""
    monkeypatch.setattr(gpu, "slug", lambda device=0: None)
    with pytest.raises(ValueError, match="torch finds a GPU and NVML does not"):
        slug_of({"device": "cuda"}, [0])


def test_the_machine_is_asked_in_the_order_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the slug would be of one card, and the levels of the fastest."""
    asked: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **more: Any) -> SimpleNamespace:
        asked.update(env)
        return SimpleNamespace(returncode=0, stdout='{"device": "cuda"}')

    monkeypatch.setattr("perf_tests.harness.machine.subprocess.run", run)
    assert ask_machine() == {"device": "cuda"}
    assert asked["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.fixture
def slow_convolution() -> Any:
    """ATen's fallback as this machine calls it, which another one has to be asked for."""
    convolution.replace_slow_bfloat16()
    return torch.ops.aten._slow_conv2d_forward


def operators(measured: profile) -> set[str]:
    """Names of what ran."""
    return {event.key for event in measured.key_averages()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [True, False])
def test_bfloat16_is_convolved_by_onednn(slow_convolution: Any, layout: torch.memory_format, has_bias: bool) -> None:
    """In float32, and as near to the exact result as one rounding to bfloat16 is."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 9, 7, generator=draw).bfloat16().to(memory_format=layout)
    weight = torch.randn(5, 6, 3, 3, generator=draw).bfloat16()
    bias = torch.randn(5, generator=draw).bfloat16() if has_bias else None
    with profile() as measured:
        found = slow_convolution(x, weight, (3, 3), bias, (2, 1), (1, 0))
    assert "aten::mkldnn_convolution" in operators(measured)
    exact = conv2d(x.double(), weight.double(), None if bias is None else bias.double(), (2, 1), (1, 0))
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_keep_their_convolution(slow_convolution: Any, dtype: torch.dtype) -> None:
    """Only bfloat16's fallback is slow."""
    x, weight = torch.randn(1, 3, 9, 9, dtype=dtype), torch.randn(4, 3, 3, 3, dtype=dtype)
    with profile() as measured:
        found = slow_convolution(x, weight, (3, 3), None, (1, 1), (1, 1))
    assert "aten::mkldnn_convolution" not in operators(measured)
    torch.testing.assert_close(found, conv2d(x, weight, padding=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU convolves bfloat16")
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_it_is_replaced_where_onednn_has_none(
    micro: Workload, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    """And nowhere else: with AVX-512 the fallback is never reached."""
    replaced: list[bool] = []
    monkeypatch.setattr(convolution, "has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(convolution, "replace_slow_bfloat16", lambda: replaced.append(True))
    build(micro, BF16)
    assert bool(replaced) is not has_bfloat16


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("is_by_row", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_float8_is_multiplied_in_float32(is_by_row: bool, has_bias: bool) -> None:
    """Eagerly and compiled, with scales of a tensor or of rows: what the matrices stand for, rounded once."""
    if torch.cuda.is_available():
        pytest.skip("a GPU multiplies float8")
    scaled_mm.replace_reference()
    a, b = torch.randn(5, 32).to(FLOAT8), torch.randn(48, 32).to(FLOAT8).t()
    scales = (torch.rand(5, 1), torch.rand(1, 48)) if is_by_row else (torch.tensor(0.5), torch.tensor(0.1))
    bias = torch.randn(48).bfloat16() if has_bias else None
    exact = (a.double() @ b.double()) * scales[0].double() * scales[1].double() + (0 if bias is None else bias.double())

    def product(*args: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(*args, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)

    torch._dynamo.reset()
    for multiply in (product, torch.compile(product, fullgraph=True)):
        found = multiply(a, b, *scales)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies float8")
@pytest.mark.parametrize(("tile", "half", "is_slow"), [(True, False, True), (True, True, False), (False, False, False)])
def test_it_is_replaced_where_onednn_has_its_reference_alone(
    micro: Workload, monkeypatch: pytest.MonkeyPatch, tile: bool, half: bool, is_slow: bool
) -> None:
    """That is where PyTorch hands float8 to oneDNN, for a processor with AMX, and AMX has no float16."""
    replaced: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tile)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: half)
    monkeypatch.setattr(scaled_mm, "replace_reference", lambda: replaced.append(True))
    build(micro, BF16)
    assert bool(replaced) is is_slow
