"""Trains the checkpoint that ships in fluxfast/assets/tiny_flux.

    python tools/train_tiny_flux.py --out /tmp/tiny                      # all phases, then evidence and card
    python tools/train_tiny_flux.py --out /tmp/tiny --resume /tmp/tiny --phases distil
    python tools/train_tiny_flux.py --out /tmp/tiny --evaluate           # evidence and card only
    python tools/train_tiny_flux.py --out /tmp/tiny --untrained          # random weights, final architecture
    python tools/train_tiny_flux.py --probe --precision bf16 --compile   # time one training step, then stop

`--out` holds a loadable checkpoint after each phase, so whatever cuts a run short costs one phase at most.
"""

import argparse
import time

import torch
from tiny_flux_card import read_metrics, write_evidence, write_metrics
from tiny_flux_model import load_checkpoint, make_pipeline, save_checkpoint, start_as_identity
from tiny_flux_text import train_text
from tiny_flux_training import TOKEN_WIDTH, TOKENS, distil, make_pool, token_ids, train_flow, train_vae

PHASES = ("text", "vae", "flow", "distil")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder of the checkpoint")
    parser.add_argument("--resume", help="start from this checkpoint instead of from random weights")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument(
        "--minutes", nargs="+", type=float, default=[2.0, 4.0, 5.0, 1.5], help="one for each of text vae flow distil"
    )
    parser.add_argument("--pool-minutes", type=float, default=0.5, help="time for drawing and encoding the scenes")
    parser.add_argument("--pool", type=int, default=160_000, help="scenes to draw at most")
    parser.add_argument("--batch", type=int, default=256, help="of flow and distil")
    parser.add_argument("--vae-batch", type=int, default=96, help="quarters of pictures; a fourth of it whole ones")
    parser.add_argument("--max-steps", type=int, help="cap on each phase, for trying the script")
    parser.add_argument("--count", type=int, default=200, help="held-out captions to evaluate")
    parser.add_argument("--precision", choices=("tf32", "bf16"), default="tf32", help="products of flow and distil")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    parser.add_argument("--blas", choices=("cublas", "cublaslt"), help="library of the matrix products on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    for flag in ("--untrained", "--evaluate", "--probe"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(argv)
    if not args.out and not args.probe:
        parser.error("--out is needed")
    if len(args.minutes) != len(PHASES):
        parser.error(f"--minutes has {len(args.minutes)} numbers, expected {len(PHASES)}: one for each of {PHASES}")
    return args


def hardware(device):
    """One line for the card."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"One {name}, torch {torch.__version__}"


def probe(args, device):
    """Runs a few steps of both transformer trainings at the real shapes on random data and prints milliseconds."""
    pipeline, generator = make_pipeline(args.seed), torch.Generator(device).manual_seed(args.seed)
    start_as_identity(pipeline.transformer)
    if args.compile:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    latents = torch.randn(args.batch, TOKENS, TOKEN_WIDTH, device=device, generator=generator)
    pool = {
        "latents": latents,
        "weights": torch.ones(args.batch, TOKENS, device=device),
        **token_ids(pipeline, ["a large red star at the top"] * args.batch, device),
    }
    options = {"minutes": 5, "batch": args.batch, "bf16": args.precision == "bf16"}
    milliseconds = []
    for train, extra in ((train_flow, {}), (distil, {"compiled": args.compile})):
        train(pipeline, pool, generator, max_steps=3, **options, **extra)
        started = time.monotonic()
        train(pipeline, pool, generator, max_steps=args.max_steps or 15, **options, **extra)
        milliseconds.append((time.monotonic() - started) / (args.max_steps or 15) * 1e3)
    print(f"PROBE {milliseconds[0]:.1f} {milliseconds[1]:.1f} ms for a step of flow and of distil")


def train(args, device):
    """The phases asked for, each followed by a save."""
    pipeline = load_checkpoint(args.resume) if args.resume else make_pipeline(args.seed)
    metrics = read_metrics(args.resume) if args.resume else {}
    metrics["seed"] = args.seed

    def keep(phase, figures):
        metrics[phase] = add_up(metrics.get(phase), figures | {"hardware": hardware(device)})
        save_checkpoint(pipeline, args.out)
        write_metrics(args.out, metrics)

    generator = torch.Generator(device).manual_seed(args.seed)
    minutes = dict(zip(PHASES, args.minutes, strict=True))
    if "text" in args.phases:
        keep("text", train_text(pipeline, generator, minutes=minutes["text"], max_steps=args.max_steps))
    if "vae" in args.phases:
        keep(
            "vae",
            train_vae(pipeline.vae, generator, minutes=minutes["vae"], batch=args.vae_batch, max_steps=args.max_steps),
        )
    if {"flow", "distil"} & set(args.phases):
        options = {"batch": args.batch, "bf16": args.precision == "bf16", "max_steps": args.max_steps}
        pool = make_pool(pipeline, generator, size=args.pool, minutes=args.pool_minutes, batch=min(args.pool, 256))
        if "flow" in args.phases and "flow" not in metrics:
            start_as_identity(pipeline.transformer)
        if args.compile:
            pipeline.transformer.compile_repeated_blocks(fullgraph=True)
        if "flow" in args.phases:
            keep("flow", train_flow(pipeline, pool, generator, minutes=minutes["flow"], **options))
        if "distil" in args.phases:
            keep(
                "distil", distil(pipeline, pool, generator, minutes=minutes["distil"], compiled=args.compile, **options)
            )


def add_up(before, figures):
    """Figures of a resumed phase: steps, seconds and runs count all of them, everything else is the last run's."""
    before = before or {"steps": 0, "seconds": 0, "runs": 0}
    return figures | {
        "steps": before["steps"] + figures["steps"],
        "seconds": round(before["seconds"] + figures["seconds"], 1),
        "runs": before["runs"] + 1,
    }


def main(argv=None):
    args = parse(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # Under bf16 autocast a training step ended in an illegal address on torch 2.11+cu130 (H200). cuDNN's attention is
    # the suspect, not the culprit: --probe tells whether a machine trains without it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.blas:
        torch.backends.cuda.preferred_blas_library(args.blas)
    if args.probe:
        return probe(args, device)
    if args.untrained:
        return save_checkpoint(make_pipeline(args.seed), args.out)
    if not args.evaluate:
        train(args, device)
    if args.evaluate or "distil" in args.phases:
        print(write_evidence(args.out, count=args.count, device=args.device))


if __name__ == "__main__":
    main()
