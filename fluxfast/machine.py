"""What this machine can run. Availability is asked here, once, and never guessed by a step."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import platform

import torch

from fluxfast.levels import DEFAULTS, FUSED_BLOCK_FIELDS, QUACK_FIELDS, Level

FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
"""FlashAttention-3's own build, and the forward-only wheel of PyPI's `fa3-fwd`."""

TRITON_FIELDS = ("fused_quantize", "fused_qk_rope", "fast_decode", "fused_residuals", "hadamard_qk")
NEEDS_QUACK = (*QUACK_FIELDS, "fused_t5")
"""Fields that stand on quack-kernels, of the fused blocks and others."""
SEARCH_FIELDS = ("gemm_search", "coordinate_descent")
TO_FLOAT8_ATTENTION = {
    "fused_qk_rope": "casts for",
    "split_attention_tail": "is two launches of",
    "hadamard_qk": "casts for",
    "coded_softmax": "takes the place of",
    "attention_epilogue": "is of what takes the place of",
    "value_epilogue": "writes for what takes the place of",
}
"""What fields that are nothing without float8 attention have to do with it."""
ROWWISE_LT = (12, 9)
"""CUDA from which torch's row-wise float8 GEMM on a Hopper is cuBLASLt's; before, it is CUTLASS's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What availability depends on.

    Attributes:
        device: "cuda" or "cpu".
        capability: CUDA compute capability, None without a GPU.
        cuda: version of CUDA that torch was built for, None without a GPU.
        fa3_module: the first of `FA3_MODULES` that is installed, None if neither is.
        triton: whether Triton is installed.
        quack: whether quack-kernels is installed.
    """

    device: str
    capability: tuple[int, int] | None
    fa3_module: str | None
    triton: bool
    cuda: tuple[int, ...] | None = None
    quack: bool = False

    @property
    def found(self) -> str:
        """What there is to compute on, for reasons: "9.0", or "cpu"."""
        return f"{self.capability[0]}.{self.capability[1]}" if self.capability else self.device

    @property
    def found_with_triton(self) -> str:
        """`found`, and whether there is Triton to write its kernels with."""
        return f"{self.found} and {'Triton' if self.triton else 'no Triton'}"


@functools.cache
def this_machine() -> Machine:
    """The machine this process runs on; device 0 of CUDA where there is one."""
    fa3_module = next((name for name in FA3_MODULES if importlib.util.find_spec(name) is not None), None)
    triton, quack = (importlib.util.find_spec(name) is not None for name in ("triton", "quack"))
    if not torch.cuda.is_available():
        return Machine(device="cpu", capability=None, fa3_module=fa3_module, triton=triton, quack=quack)
    capability = torch.cuda.get_device_capability()
    # None in a ROCm build.
    cuda = tuple(map(int, torch.version.cuda.split(".")[:2])) if torch.version.cuda else None
    return Machine(device="cuda", capability=capability, fa3_module=fa3_module, triton=triton, cuda=cuda, quack=quack)


@functools.cache
def processors() -> int:
    """Streaming multiprocessors of device 0 of CUDA."""
    count: int = torch.cuda.get_device_properties(0).multi_processor_count
    return count


def cpu_capability() -> str:
    """The processor's widest vector instructions as PyTorch uses them, and oneDNN's for bfloat16: "AVX512-BF16".

    Of those with AVX-512 and its bfloat16, one with its float16 too is another, to oneDNN as well: on an Intel Xeon the
    shipped checkpoint takes 1.4 times as long in bfloat16 as in float32, on an AMD EPYC 0.8 times.

    Where PyTorch has only its baseline kernels, the architecture: "aarch64".
    """
    widest = torch.backends.cpu.get_cpu_capability()
    vectors = platform.machine() if widest == "DEFAULT" else widest.replace(" ", "")
    if torch.cpu._is_amx_tile_supported():
        return f"{vectors}-AMX"
    if not torch.cpu._is_avx512_bf16_supported():
        return vectors
    # Older torch cannot tell: there all of them are BF16.
    has_fp16 = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("avx512_fp16")
    return f"{vectors}-{'FP16' if has_fp16 else 'BF16'}"


def unavailable(level: Level, machine: Machine) -> dict[str, str]:
    """Fields of `level` that `machine` cannot run, each with the reason."""
    reasons = {}
    if level.attention != "sdpa" and (machine.capability != (9, 0) or machine.fa3_module is None):
        reasons["attention"] = (
            f"{level.attention}: needs compute capability 9.0 and one of {', '.join(FA3_MODULES)}; "
            f"found {machine.found} and {machine.fa3_module or 'neither module'}"
        )
    if level.quantization != "none" and machine.capability is not None and machine.capability < (8, 9):
        reasons["quantization"] = (
            f"{level.quantization}: needs compute capability 8.9 or newer for float8 GEMMs; found {machine.found}"
        )
    for field in TRITON_FIELDS:
        if getattr(level, field) and (machine.capability != (9, 0) or not machine.triton):
            reasons[field] = (
                f"{field}: its Triton kernels need compute capability 9.0 and Triton; found {machine.found_with_triton}"
            )
    for field in NEEDS_QUACK:
        if getattr(level, field) and not (machine.capability == (9, 0) and machine.triton and machine.quack):
            modules = f"{'Triton' if machine.triton else 'no Triton'} and {'quack' if machine.quack else 'no quack'}"
            reasons[field] = (
                f"{field}: needs compute capability 9.0, Triton and quack-kernels (pip install -e '.[gpu]'); "
                f"found {machine.found}, {modules}"
            )
    if level.no_gemm_workspace and (machine.capability != (9, 0) or machine.cuda is None or machine.cuda < ROWWISE_LT):
        found = f"CUDA {'.'.join(map(str, machine.cuda))}" if machine.cuda else "no CUDA"
        reasons["no_gemm_workspace"] = (
            "no_gemm_workspace: needs compute capability 9.0 and torch for CUDA 12.9 or newer, whose row-wise float8 "
            f"GEMMs are cuBLASLt's; found {machine.found} and {found}"
        )
    if level.whole_loop_graph and machine.capability is None:
        reasons["whole_loop_graph"] = f"whole_loop_graph: needs CUDA graphs; found {machine.found}"
    if level.no_host_waits and machine.capability is None:
        reasons["no_host_waits"] = (
            f"no_host_waits: needs a device that works while the host goes on; found {machine.found}"
        )
    if level.concurrent_encode and machine.capability is None:
        reasons["concurrent_encode"] = f"concurrent_encode: needs CUDA streams; found {machine.found}"
    for field in SEARCH_FIELDS:
        if getattr(level, field) and (machine.capability is None or not machine.triton):
            reasons[field] = f"{field}: is a search among Triton kernels on CUDA; found {machine.found_with_triton}"
    for field, relation in TO_FLOAT8_ATTENTION.items():
        if getattr(level, field) and "attention" in reasons:
            reasons.setdefault(field, f"{field}: {relation} {reasons['attention']}")
    if "quantization" in reasons:
        built_on_it = {field: f"{field}: is built on {reasons['quantization']}" for field in FUSED_BLOCK_FIELDS}
        reasons |= {field: reason for field, reason in built_on_it.items() if getattr(level, field)}
    return reasons


def effective(level: Level, machine: Machine) -> tuple[Level, dict[str, str]]:
    """`level` without the fields that `machine` cannot run, and why each was taken out."""
    reasons = unavailable(level, machine)
    return dataclasses.replace(level, **{field: DEFAULTS[field] for field in reasons}), reasons


def why_not(level: Level, machine: Machine) -> str | None:
    """Why `level` cannot be measured here, None if it can.

    A level is left out when the field that it adds is unavailable: it would repeat its parent.
    """
    own = level.own_field
    return unavailable(level, machine).get(own) if own else None
