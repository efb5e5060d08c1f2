"""Times the GEMMs with epilogues at FLUX.1's sizes on a Hopper, beside cuBLASLt's and the kernels that they replace.

    python -m tools.bench_gemms --out results/gemms [--seconds 0.5] [--grouped]

Every figure is the mean over so many seconds of replays of a CUDA graph that runs the operation on input sets in turn,
because a GEMM that runs for milliseconds only has another clock than one at the power limit. Each width of a tile that
`gemm.tiles` may choose is timed, and the one that it does choose is marked.

With `--grouped` it is the products of both streams of a double block, in one GEMM and in two as `residual_epilogue` has
them, nothing behind them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fluxfast import workspace
from fluxfast.kernels import activations, gemm, norms, reference
from fluxfast.kernels.linear import GroupedRowwiseFloat8Linear, RowwiseFloat8GeluLinear
from fluxfast.kernels.rowwise import E4M3, dequantize_rowwise, quantize_rowwise
from fluxfast.machine import processors

SETS = 4
ROWS = (4352, 4096, 256)
"""Of a single block, and of a double block's image and text streams."""
GROUPED_SHAPES = (
    ("linear", 3072, 9216),
    ("gelu", 3072, 12288),
    ("gated_residual", 12288, 3072),
    ("gated_residual", 3072, 3072),
)
SHAPES = (("gelu", 3072, 12288), ("gated_residual", 15360, 3072), ("gated_residual", 12288, 3072))
DEVICE = "cuda"


@dataclasses.dataclass(frozen=True)
class Set:
    """One set of operands, and what stands behind the GEMM: (rows, K), (rows, 1), a Linear, (rows, N) and (1, N)."""

    q: torch.Tensor
    scale: torch.Tensor
    linear: RowwiseFloat8GeluLinear
    residual: torch.Tensor
    gate: torch.Tensor
    shift: torch.Tensor


def make(rows: int, k: int, columns: int) -> Set:
    """A random one."""
    weight, bias = torch.randn(columns, k, device=DEVICE) / k**0.5, torch.randn(columns, device=DEVICE)
    linear = RowwiseFloat8GeluLinear(weight, bias, operation=gemm.gelu_linear_quantize)
    sizes = (rows, columns), (1, columns), (1, columns)
    behind = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for size in sizes)
    return Set(*quantize_rowwise(torch.randn(rows, k, device=DEVICE)), linear, *behind)


def cublaslt(s: Set) -> torch.Tensor:
    return s.linear.forward_quantized(s.q, s.scale)


def with_kernel(epilogue: str, s: Set) -> tuple[torch.Tensor, ...]:
    """cuBLASLt's GEMM and the kernel behind it."""
    if epilogue == "gelu":
        return activations.gelu_quantize(cublaslt(s))
    return norms.residual_layernorm_modulate_quantize(s.residual, cublaslt(s), s.gate, s.shift, s.shift)


def with_epilogue(epilogue: str, cut: dict[str, Any], s: Set) -> tuple[torch.Tensor, ...]:
    """quack's GEMM cut this way, and what is left of the kernel behind it."""
    weight, bound = s.linear.weight, s.linear.bound
    vectors = {"scale": s.scale, "weight_scale": s.linear.weight_scale, "bias": s.linear.bias}
    if epilogue == "gelu":
        codes = torch.empty(s.residual.shape, dtype=E4M3, device=DEVICE)
        out_scale = torch.addcmul(bound[1], s.scale, bound[0])
        gemm.multiply(gemm.gelu, cut, s.q, weight, codes, **vectors, out_scale=out_scale)
        return codes, out_scale
    out = torch.empty_like(s.residual)
    gemm.multiply(gemm.gated_residual, cut, s.q, weight, out, s.residual, **vectors, gate=s.gate)
    return out, *norms.layernorm_modulate_quantize(out, s.shift, s.shift)


def alone(epilogue: str, s: Set) -> Any:
    """One stream's product as a rung without grouped GEMMs has it."""
    weights = s.linear.weight, s.linear.weight_scale, s.linear.bias
    if epilogue == "linear":
        return cublaslt(s)
    if epilogue == "gelu":
        return gemm.gelu_linear_quantize(s.q, s.scale, *weights, s.linear.bound)
    return gemm.residual_linear(s.q, s.scale, *weights, s.residual, s.gate)


def both(streams: tuple[Set, Set]) -> dict[str, torch.Tensor]:
    """The operands of both streams' product in one GEMM."""
    linear = GroupedRowwiseFloat8Linear(*(s.linear for s in streams), operation=gemm.grouped_linear)
    operands = {name: torch.cat([getattr(s, name) for s in streams]) for name in ("scale", "residual", "gate")}
    operands["q"] = torch.cat([s.q.view(torch.uint8) for s in streams]).view(E4M3)
    return operands | {name: getattr(linear, name) for name in ("weight", "weight_scale", "bias", "bound")}


def together(epilogue: str, cut: dict[str, Any], s: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Both streams' product in one GEMM, cut this way; codes and their scales if it ends in GELU."""
    _, image, text = ROWS
    vectors = {"scale": s["scale"][:, 0], "weight_scale": s["weight_scale"], "bias": s["bias"]}
    scales, c = (), ()
    if epilogue == "gelu":
        slope, offset = s["bound"].repeat_interleave(torch.tensor([text, image], device=DEVICE), 0).unbind(1)
        vectors["out_scale"] = vectors["scale"] * slope + offset
        scales = (vectors["out_scale"][:, None],)
    if epilogue == "gated_residual":
        vectors["gate"], c = s["gate"], (s["residual"],)
    out = torch.empty_like(s["residual"], dtype=E4M3 if epilogue == "gelu" else torch.bfloat16)
    borders = gemm.begins(text, text + image, out.device)
    gemm.multiply(getattr(gemm, epilogue), cut, s["q"], s["weight"], out, *c, begins=borders, **vectors)
    return out, *scales


def time_grouped(seconds: float) -> list[dict[str, Any]]:
    """Rows of the report, printed too."""
    found = []
    _, image, text = ROWS
    for epilogue, k, columns in GROUPED_SHAPES:
        sets = [(make(text, k, columns), make(image, k, columns)) for _ in range(SETS)]
        row: dict[str, Any] = {"epilogue": epilogue, "rows": [text, image], "k": k, "columns": columns, "cut": []}
        each = functools.partial(alone, epilogue)
        row["apart_us"] = sustained_us(lambda streams, each=each: list(map(each, streams)), sets, seconds)
        print(f"{epilogue} ({text} + {image}) x {k} x {columns}: two GEMMs {row['apart_us']:.1f}")
        joint, want = [both(s) for s in sets], torch.cat([exact(epilogue, s) for s in sets[0]])
        widths = gemm.GELU_WIDTHS if epilogue == "gelu" else gemm.WIDTHS
        chosen = gemm.tiles(gemm.grouped_rows(text, text + image), columns, widths, processors())
        for width in widths:
            cut = chosen | {"tile_N": width}
            call = functools.partial(together, epilogue, cut)
            timed = {
                "cut": cut,
                "us": sustained_us(call, joint, seconds),
                "error": error(epilogue, call(joint[0]), want),
            }
            row["cut"].append(timed)
            mark = " *" if cut == chosen else ""
            print(f"  {width:4d} columns {timed['us']:7.1f}, error {timed['error']:.4f}{mark}", flush=True)
        found.append(row)
    return found


def exact(epilogue: str, s: Set) -> torch.Tensor:
    y = reference.scaled_product(s.q, s.scale, s.linear.weight, s.linear.weight_scale, s.linear.bias)
    if epilogue == "linear":
        return y
    return F.gelu(y, approximate="tanh") if epilogue == "gelu" else s.residual + s.gate * y


def error(epilogue: str, got: tuple[torch.Tensor, ...], want: torch.Tensor) -> float:
    """Relative, in L2."""
    value = dequantize_rowwise(*got) if epilogue == "gelu" else got[0].float()
    return ((value - want).norm() / want.norm()).item()


def sustained_us(call: Callable[[Any], Any], sets: list[Any], seconds: float) -> float:
    """Microseconds a call, from a CUDA graph of all sets that is replayed for a while, a quarter of it before."""
    for s in sets[:2]:
        call(s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(s) for s in sets]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replayed_ms(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    replayed_ms(3)
    replays = max(3, int(seconds * 1e3 / (replayed_ms(3) / 3)))
    replayed_ms(replays // 4)
    del kept
    return replayed_ms(replays) * 1e3 / replays / len(sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gemms.json, or grouped.json")
    parser.add_argument("--seconds", type=float, default=0.5, help="of replays for each figure: %(default)s")
    parser.add_argument("--grouped", action="store_true", help="products of both streams of a double block")
    options = parser.parse_args()
    torch.manual_seed(0)
    workspace.drop()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "gemms": []}
    print(f"{found['device']}, torch {found['torch']}; microseconds, and the width that `tiles` chooses: *")
    if options.grouped:
        found["gemms"] = time_grouped(options.seconds)
    for epilogue, k, columns in () if options.grouped else SHAPES:
        for rows in ROWS:
            sets = [make(rows, k, columns) for _ in range(SETS)]
            want = exact(epilogue, sets[0])
            behind = functools.partial(with_kernel, epilogue)
            row = {"epilogue": epilogue, "rows": rows, "k": k, "columns": columns, "cut": []}
            row |= {"gemm_us": sustained_us(cublaslt, sets, options.seconds)}
            row |= {"kernel_us": sustained_us(behind, sets, options.seconds)}
            row |= {"kernel_error": error(epilogue, behind(sets[0]), want)}
            size = f"{epilogue} {rows} x {k} x {columns}"
            print(f"{size}: cuBLASLt {row['gemm_us']:.1f}, with the kernel {row['kernel_us']:.1f}")
            chosen = gemm.tiles(rows, columns, gemm.GELU_WIDTHS if epilogue == "gelu" else gemm.WIDTHS, processors())
            for width in gemm.WIDTHS if chosen["pingpong"] else gemm.FEW_TILES_WIDTHS:
                cut = chosen | {"tile_N": width}
                call = functools.partial(with_epilogue, epilogue, cut)
                timed = {"cut": cut, "us": sustained_us(call, sets, options.seconds)}
                timed["error"] = error(epilogue, call(sets[0]), want)
                row["cut"].append(timed)
                mark = " *" if cut == chosen else ""
                print(f"  {width:4d} columns {timed['us']:7.1f}, error {timed['error']:.4f}{mark}", flush=True)
            found["gemms"].append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / ("grouped.json" if options.grouped else "gemms.json")).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
