"""Times attention in e4m3 at FLUX.1's sizes on a Hopper: FlashAttention-3's and `coded_attention`, and their errors.

    python -m tools.bench_attention --out results/attention [--seconds 0.5]

Every figure is the mean over so many seconds of replays of a CUDA graph, as `tools.bench_gemms` takes it: at the power
limit, where the clock is not that of a first call. Errors are relative L2 against float64 of the same e4m3 operands,
for queries of each spread: with 1 many keys share a row, with 4 a few have all of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxfast.attention import fa3_fp8, fa3_fp8_split_tail
from fluxfast.kernels import flash, reference
from fluxfast.kernels.rowwise import E4M3, dequantize_rowwise
from fluxfast.machine import processors
from fluxfast.workloads import get_workload
from tools.bench_gemms import DEVICE, sustained_us

HEADS = 24
TOKENS = {id: get_workload(id).tokens for id in ("schnell", "dev")}
SPREADS = (0.1, 1.0, 2.0, 4.0)
SETS = 4
Set = tuple[torch.Tensor, ...]
"""q, k and v; q scaled for the operations of ours, v transposed for either, and its largest magnitude."""


def make(tokens: int, spread: float = 1.0) -> Set:
    """Random operands of `tokens`, see `Set`; the product of one query and one key has a deviation of spread."""
    q, k, v = (torch.randn(1, tokens, HEADS, flash.HEAD_DIM, device=DEVICE) for _ in range(3))
    v = v.to(E4M3)
    transposed = (reference.transposed_values(v, mixed=mixed) for mixed in (False, True))
    scaled = (q * spread * reference.code_scale(flash.HEAD_DIM)).to(E4M3)
    return (q * spread).to(E4M3), k.to(E4M3), v, scaled, *transposed, v.float().abs().amax()[None]


def quantised(s: Set, *, beside: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales; `beside` as in a single block, with bounds of the rows and room for what the MLP adds."""
    if not beside:
        return flash.coded_attention_quantize(s[3], s[1], *s[5:])
    scale, bound = torch.full((s[0].shape[1], 1), 0.01, device=DEVICE), torch.tensor([1.0, 1e-3], device=DEVICE)
    return flash.coded_attention_quantize(s[3], s[1], *s[5:], scale, bound, 4 * HEADS * flash.HEAD_DIM)


Out = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def attentions() -> dict[str, Callable[[Set], Out]]:
    return {
        "FlashAttention-3": lambda s: fa3_fp8(*s[:3]),
        "FlashAttention-3, split tail": lambda s: fa3_fp8_split_tail(*s[:3]),
        "coded": lambda s: flash.coded_attention(s[3], s[1], s[4]),
        "coded, and quantised": quantised,
        "coded, and quantised beside an MLP": functools.partial(quantised, beside=True),
    }


def value(out: Out, s: Set) -> torch.Tensor:
    """What an attention gives, codes times their scales: (1, S, H, 128)."""
    if isinstance(out, torch.Tensor):
        return out
    codes, scale = out
    return dequantize_rowwise(codes[:, : HEADS * flash.HEAD_DIM], scale).view(s[0].shape)


def error(got: torch.Tensor, s: Set, *, ours: bool) -> float:
    """Relative, in L2, of the first head and the last, which has the tail."""
    query, scale = (s[3], math.log(2) / reference.CODES_A_BINADE) if ours else (s[0], flash.HEAD_DIM**-0.5)
    total, lost = 0.0, 0.0
    for head in (0, HEADS - 1):
        q, k, v = (x[0, :, head].double() for x in (query, *s[1:3]))
        exact = (q @ k.t() * scale).softmax(-1) @ v
        total += exact.square().sum().item()
        lost += (got[0, :, head].double() - exact).square().sum().item()
    return (lost / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for attention.json")
    parser.add_argument("--seconds", type=float, default=0.5, help="of replays for each figure: %(default)s")
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "attention": []}
    print(f"{found['device']}, torch {found['torch']}; microseconds, and errors at spreads {SPREADS}")
    for shape, tokens in TOKENS.items():
        sets, probes = [make(tokens) for _ in range(SETS)], [make(tokens, spread) for spread in SPREADS]
        parts = flash.parts_of(1, tokens, HEADS, processors())
        print(f"{shape}, {tokens} tokens: {parts[0]} parts of the keys of {parts[1]} tiles")
        for name, call in attentions().items():
            row = {"shape": shape, "tokens": tokens, "name": name, "us": sustained_us(call, sets, options.seconds)}
            row["errors"] = [error(value(call(s), s), s, ours=name.startswith("coded")) for s in probes]
            found["attention"].append(row)
            print(f"  {name:34} {row['us']:7.1f}", *(f"{e:.4f}" for e in row["errors"]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
