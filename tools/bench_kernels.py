"""Times the fused kernels at FLUX.1's sizes on a CUDA GPU, beside what Inductor makes of their references.

    python tools/bench_kernels.py --out results/kernels [--tune] [--blocks] [--mode max-autotune-no-cudagraphs]

Every figure is the median over replays of a CUDA graph that runs the operation on as many input sets as exceed the L2
cache several times, each with outputs of its own, divided by their number. The floor is the bytes an operation must
move over the bandwidth of a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fluxfast.kernels import activations, group_norm, norms, ops, qkv, reference
from fluxfast.kernels.rowwise import E4M3

TEXT, IMAGE, D, H, HEADS, HEAD_DIM = 256, 4096, 3072, 12288, 24, 128
M = TEXT + IMAGE
ROTATE_BYTES = 768e6
DEVICE = "cuda"
Arguments = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One operation: how to make its arguments, the bytes it must move, and its value in float64."""

    name: str
    moved: int
    make: Callable[[], Arguments]
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    exact: Callable[..., torch.Tensor]


def randn(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * spread


def layernorm64(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.double(), (x.shape[-1],), eps=1e-6) * (1 + scale.double()) + shift.double()


def gelu64(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.double(), approximate="tanh")


def qk_arguments(text: int, image: int) -> Arguments:
    weights = [1 + randn(HEAD_DIM, spread=0.2) for _ in range(4)]
    angles = torch.rand(text + image, HEAD_DIM // 2, device=DEVICE).mul(6.28).repeat_interleave(2, -1)
    arguments = (randn(1, image, 3 * D), *weights[:2], angles.cos(), angles.sin(), 1e-6)
    return (*arguments, randn(1, text, 3 * D), *weights[2:]) if text else arguments


def merged_arguments() -> Arguments:
    """The single block with merged projections: the MLP's rows are views of a (M, 21504) GEMM output."""
    return randn(M, D), randn(M, 3 * D + H, spread=2.0)[:, 3 * D :]


def group_norm_arguments(channels: int, side: int) -> Arguments:
    """As behind the first convolution of a residual block of the decoder: NHWC, its bias still to be added."""
    x = randn(1, side, side, channels).movedim(-1, 1)
    return (x, 1 + randn(channels, spread=0.2), randn(channels), 32, 1e-6, True, randn(channels))


def group_norm64(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor,
) -> torch.Tensor:
    value = (x.double() + x_bias.double()[:, None, None]).contiguous()
    return F.silu(F.group_norm(value, groups, weight.double(), bias.double(), eps))


def heads64(
    image: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    text: torch.Tensor | None = None,
    text_norm_q: torch.Tensor | None = None,
    text_norm_k: torch.Tensor | None = None,
    *,
    hadamard: bool = False,
) -> torch.Tensor:
    """q, k and v (3, B, S, H, Dh) as FlashAttention-3 should get them."""
    streams = [(image, (norm_q, norm_k))]
    if text is not None:
        streams.insert(0, (text, (text_norm_q, text_norm_k)))
    parts = []
    for stream, weights in streams:
        q, k, v = stream.double().unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        q, k = (F.rms_norm(x, (HEAD_DIM,), w.double(), eps) for x, w in zip((q, k), weights, strict=True))
        parts.append(torch.stack([q, k, v]))
    q, k, v = torch.cat(parts, 2)
    turned = (torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) for x in (q, k))
    q, k = (x * cos.double()[:, None] + t * sin.double()[:, None] for x, t in zip((q, k), turned, strict=True))
    if hadamard:
        q, k = reference.hadamard(q), reference.hadamard(k)
    return torch.stack([q, k, v]).clamp(-448, 448)


def cases() -> list[Case]:
    def vectors() -> Arguments:
        return randn(1, D), randn(1, D)

    def case(name: str, moved: int, make: Callable, exact: Callable, module: Any, operation: str) -> Case:
        return Case(
            name=name,
            moved=moved,
            make=make,
            kernel=getattr(module, operation),
            plain=getattr(reference, operation),
            exact=exact,
        )

    def concat64(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a.double(), gelu64(b)], -1)

    def residual64(r: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return layernorm64((r.double() + gate.double() * y.double()).bfloat16(), *rest)

    hadamard64, with_hadamard = functools.partial(heads64, hadamard=True), "qk_norm_rope_hadamard_quantize"
    gelu_concat, wide = "gelu_concat_quantize", M * (D + H) * 3
    layernorm, residual = "layernorm_modulate_quantize", "residual_layernorm_modulate_quantize"
    return [
        case("gelu_concat", wide, lambda: (randn(M, D), randn(M, H, spread=2.0)), concat64, activations, gelu_concat),
        case("gelu_concat_merged", wide, merged_arguments, concat64, activations, gelu_concat),
        case("gelu", IMAGE * H * 3, lambda: (randn(IMAGE, H, spread=2.0),), gelu64, activations, "gelu_quantize"),
        case("quantize_rows", M * D * 3, lambda: (randn(1, M, D),), torch.Tensor.double, activations, "quantize_rows"),
        case("layernorm", M * D * 3, lambda: (randn(M, D), *vectors()), layernorm64, norms, layernorm),
        case(
            "residual_layernorm",
            IMAGE * D * 7,
            lambda: (randn(IMAGE, D), randn(IMAGE, D), randn(1, D), *vectors()),
            residual64,
            norms,
            residual,
        ),
        case("qk_norm_rope", M * D * 9, lambda: qk_arguments(0, M), heads64, qkv, "qk_norm_rope_quantize"),
        case("qk_norm_rope_two", M * D * 9, lambda: qk_arguments(TEXT, IMAGE), heads64, qkv, "qk_norm_rope_quantize"),
        case("qk_hadamard", M * D * 9, lambda: qk_arguments(0, M), hadamard64, qkv, with_hadamard),
        case("qk_hadamard_two", M * D * 9, lambda: qk_arguments(TEXT, IMAGE), hadamard64, qkv, with_hadamard),
        *(
            case(
                f"group_norm_{channels}_{side}",
                # Read for the statistics, read again, written.
                channels * side**2 * 6,
                functools.partial(group_norm_arguments, channels, side),
                group_norm64,
                group_norm,
                "group_norm_silu",
            )
            for channels, side in ((512, 128), (512, 256), (256, 512), (128, 1024))
        ),
    ]  # fmt: skip


def graph_us(call: Callable[..., Any], sets: list[Arguments], replays: int = 30) -> float:
    """Median microseconds of one call, launched from a CUDA graph over all argument sets."""
    for arguments in sets[:2]:
        call(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in sets]
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    del kept
    return statistics.median(times[3:])


def copy_gb_s() -> float:
    """Device-to-device copy bandwidth in GB/s, bytes read plus bytes written."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * source.numel() / graph_us(lambda: target.copy_(source), [()]) / 1e3


def accuracy(case: Case, arguments: Arguments) -> dict[str, float]:
    """Largest error in units of what rounding allows (at most 1), and how many codes differ from the reference's."""
    got, plain = case.kernel(*arguments), case.plain(*arguments)
    exact = case.exact(*arguments)
    if isinstance(got, torch.Tensor):
        excess = ((got.double() - exact).abs() / (exact.abs() * 2**-8 + 2e-5)).max().item()
        return {"error_over_allowed": excess, "codes_differing": (got != plain).double().mean().item()}
    if case.name.startswith("qk"):
        value = torch.stack([part.double() for part in got])
        step = torch.full((), 2**-10 + 1e-4, device=DEVICE, dtype=torch.float64)
    else:
        q, scale = got[-2:]
        step = exact.abs().amax(-1, keepdim=True) / 448 * 2**-10
        value = q.double() * scale.double()
    excess = ((value - exact).abs() / (exact.abs() * 2**-4 + step)).max().item()
    differing = [
        (a.view(torch.uint8) != b.view(torch.uint8)).double().mean().item()
        for a, b in zip(got, plain, strict=True)
        if a.dtype == E4M3
    ]
    return {"error_over_allowed": excess, "codes_differing": max(differing)}


def special_values() -> None:
    """The hardware's casts and maxima keep the promises that the interpreter's tests make. Raises AssertionError."""
    x = randn(6, 4097).float()
    x[1, 3], x[2, 5], x[3], x[4, 7] = math.nan, math.inf, 0.0, 1e30
    zeros = torch.zeros_like(x)
    for module in (activations, reference):
        for q, scale in (module.gelu_concat_quantize(x, zeros), module.quantize_rows(x)):
            q = q.float()
            assert q[1].isnan().all() and scale[1].isnan() and scale[2].isinf() and q[2, 5].isnan(), "NaN or Inf lost"
            assert (q[3] == 0).all() and scale[3] > 0 and q[4, 7] == 448, "zero or large row"
    v = torch.arange(65536, device=DEVICE).to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    heads, one = torch.cat([v, v, v])[None, None], torch.ones(HEAD_DIM, device=DEVICE)
    cast = qkv.qk_norm_rope_quantize(heads, one, one, one[None], one[None])[2].flatten()
    expected = reference.cast_e4m3(v)
    same = cast.view(torch.uint8) == expected.view(torch.uint8)
    assert bool((same | (v.isnan() & cast.float().isnan())).all()), "the e4m3 cast differs from PyTorch's"


def tune(case: Case, sets: list[Arguments]) -> dict[str, float]:
    """Microseconds for other warp counts and, for QK, heads a program; for the group norm, what it holds at a time."""
    if case.name.startswith("qk"):
        settings = [
            (qkv, {"HEADS_PER_PROGRAM": g, "NUM_WARPS": w}) for g, w in ((4, 1), (4, 2), (8, 2), (8, 4), (32, 8))
        ]
    elif case.name.startswith("group_norm"):
        settings = [
            (group_norm, {"NUM_WARPS": w, "STEP_ELEMENTS": n}) for w, n in ((4, 2048), (4, 4096), (8, 4096), (8, 8192))
        ]
    elif case.name == "quantize_rows":
        settings = [(activations, {"ROWS_NUM_WARPS": w}) for w in (1, 2, 4, 8)]
    else:
        module = activations if case.name.startswith("gelu") else norms
        settings = [(module, {"NUM_WARPS": w}) for w in ((4, 8, 16) if module is activations else (1, 2, 4))]
    found = {}
    for module, values in settings:
        before = {name: getattr(module, name) for name in values}
        vars(module).update(values)
        found[str(values)] = graph_us(case.kernel, sets, replays=10)
        vars(module).update(before)
    return found


def bench_blocks(mode: str | None) -> list[dict[str, Any]]:
    """Milliseconds of one compiled block at FLUX's size, weights of 4 blocks in turn, with FA3 if it is installed."""
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    from fluxfast.kernels.blocks import FusedFluxSingleTransformerBlock, FusedFluxTransformerBlock

    def cast_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v.bfloat16()

    fa3 = any(importlib.util.find_spec(name) for name in ("flash_attn_interface", "fa3_fwd_interface"))
    attention = importlib.import_module("fluxfast.attention").fa3_fp8 if fa3 else cast_v
    quantizing, with_rope = (ops.triton_ops(qk_rope=rope, quantize_rows=False) for rope in (False, True))
    single, double = FluxSingleTransformerBlock, FluxTransformerBlock
    merged = {"merged_projections": True}
    arrangements = [
        ("single", single, FusedFluxSingleTransformerBlock, ops.REFERENCE, {}),
        ("single fused_quantize", single, FusedFluxSingleTransformerBlock, quantizing, {}),
        ("single fused_qk_rope", single, FusedFluxSingleTransformerBlock, with_rope, {}),
        ("single merged", single, FusedFluxSingleTransformerBlock, with_rope, merged),
        ("double", double, FusedFluxTransformerBlock, ops.REFERENCE, {}),
        ("double fused_quantize", double, FusedFluxTransformerBlock, quantizing, {}),
        ("double fused_qk_rope", double, FusedFluxTransformerBlock, with_rope, {}),
        ("double quantize_rows", double, FusedFluxTransformerBlock, ops.triton_ops(), {}),
    ]  # fmt: skip
    image, text = randn(1, IMAGE, D), randn(1, TEXT, D)
    rotary = tuple(torch.rand(M, HEAD_DIM, device=DEVICE) for _ in range(2))
    found = []
    for name, original, fused, operations, options in arrangements:
        torch._dynamo.reset()
        sets = []
        for _ in range(4):
            with torch.device(DEVICE):
                source = original(D, HEADS, HEAD_DIM).to(torch.bfloat16).requires_grad_(False)
            block = fused(source, attention=attention, ops=operations, **options)
            block.modulation = randn(1, block.modulation_width)
            sets.append((block.compile(fullgraph=True, dynamic=False, mode=mode) or block,))
        with torch.no_grad():
            milliseconds = graph_us(lambda block: block(image, text, None, rotary), sets) / 1e3
        found.append({"block": name, "ms": milliseconds, "fa3": fa3})
        print(
            f"{name:28s} {milliseconds:8.3f} ms  {'with FA3' if fa3 else 'attention replaced by a cast of v'}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json")
    parser.add_argument("--tune", action="store_true", help="also time other launch settings")
    parser.add_argument("--blocks", action="store_true", help="also time whole compiled blocks (needs diffusers)")
    parser.add_argument("--mode", default=None, help="torch.compile mode of the blocks")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_gb_s()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "copy_gb_s": bandwidth,
        "kernels": [],
    }
    print(f"{found['device']}, torch {found['torch']}, triton {found['triton']}, copy {bandwidth:.0f} GB/s")
    special_values()
    print(f"{'operation':20s} {'MB':>6s} {'floor':>7s} {'kernel':>7s} {'GB/s':>6s} {'Inductor':>8s} (us)  error  codes")
    for case in cases():
        sets = [case.make() for _ in range(max(3, math.ceil(ROTATE_BYTES / case.moved)))]
        row = {"name": case.name, "bytes": case.moved, "floor_us": case.moved / bandwidth / 1e3}
        row |= accuracy(case, sets[0])
        row["kernel_us"] = graph_us(case.kernel, sets)
        row["inductor_us"] = graph_us(torch.compile(case.plain, fullgraph=True, dynamic=False), sets)
        row["gb_s"] = case.moved / row["kernel_us"] / 1e3
        print(
            f"{case.name:20s} {case.moved / 1e6:6.0f} {row['floor_us']:7.1f} {row['kernel_us']:7.1f} "
            f"{row['gb_s']:6.0f} {row['inductor_us']:8.1f}       {row['error_over_allowed']:.3f} "
            f"{row['codes_differing']:.1e}",
            flush=True,
        )
        if options.tune:
            row["tuned_us"] = tune(case, sets)
            print("    " + ", ".join(f"{key} {value:.1f}" for key, value in row["tuned_us"].items()), flush=True)
        found["kernels"].append(row)
    if options.blocks:
        found["blocks"] = bench_blocks(options.mode)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
