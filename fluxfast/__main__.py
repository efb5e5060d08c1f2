"""Command line: `python -m fluxfast levels | generate | bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fluxfast.errors import CheckpointError, FluxFastError
from fluxfast.levels import LADDER, LEVELS, get_level
from fluxfast.workloads import RANDOM, WORKLOADS, Workload, get_workload

if TYPE_CHECKING:
    from fluxfast.machine import Machine


def main() -> int:
    """Run one command; 2 after one sentence on stderr if its input was wrong."""
    parser = argparse.ArgumentParser(prog="python -m fluxfast", description="FLUX.1, one optimisation at a time.")
    commands = parser.add_subparsers(dest="command", required=True)
    levels = commands.add_parser("levels", help="what this machine can run, and why not")
    levels.add_argument("--json", action="store_true", help="the same for programs, with the workload to measure")
    levels.add_argument("--workload", help="check that its checkpoint is here; default: the best that is")
    draw = commands.add_parser("generate", help="draw one image")
    draw.add_argument("prompt", nargs="?", help="default: the workload's own")
    draw.add_argument("--level", default=LADDER[-1].id, help="one of " + ", ".join(LEVELS))
    draw.add_argument(
        "--workload",
        default="tiny",
        help=f"one of {', '.join(WORKLOADS)} (-hub: released weights, -full: the transformer compiled as one graph); "
        "WORKLOAD@CHECKPOINT takes the weights from owner/name@<40-hex> in the local Hugging Face cache, or from the "
        "absolute path of a folder",
    )
    draw.add_argument("--seed", type=int, default=None)
    draw.add_argument("-o", "--output", type=Path, required=True)
    commands.add_parser("bench", help="measure levels into one table, one plot and their images; `bench -h` tells more")
    if sys.argv[1:2] == ["bench"]:  # its options are the suite's own, unknown here
        return run_bench(sys.argv[2:])
    arguments = parser.parse_args()
    try:
        if arguments.command == "levels":
            return list_levels(arguments.workload, as_json=arguments.json)
        return draw_image(arguments)
    except (FluxFastError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_levels(asked: str | None, as_json: bool) -> int:
    """Print every level with the reason if this machine cannot run it, and the workload to measure."""
    from fluxfast.convolution import has_bfloat16
    from fluxfast.machine import cpu_capability, this_machine, why_not

    machine = this_machine()
    reasons = {level.id: why_not(level, machine) for level in LEVELS.values()}
    workload, why = chosen_workload(asked) if asked else default_workload(machine)
    if as_json:
        print(json.dumps({
            "device": machine.device, "capability": machine.capability, "cpu_capability": cpu_capability(),
            "levels": reasons, "workload": workload.id, "why_workload": why,
        }))  # fmt: skip
        return 0
    rows = []
    for level in LEVELS.values():
        field = level.own_field
        change = f"{field}={getattr(level, field)}" if field else f"dtype={level.dtype}"
        rows.append((level.id, change, reasons[level.id] or "runs here"))
    ids, changes = (2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[:2])
    for id, change, reason in rows:
        print(f"{id:{ids}}{change:{changes}}{reason}")
    print(f"workload: {workload.id} ({why})")
    if machine.device == "cpu" and not has_bfloat16():
        print("convolutions: bfloat16 in float32, because oneDNN has no bfloat16 for this processor")
    return 0


def run_bench(options: list[str]) -> int:
    """Hand over to the suite, which measures this package and is not imported by it."""
    if importlib.util.find_spec("perf_tests") is None:
        print(
            "error: bench is part of the suite, and `perf_tests` cannot be found here; run it in a checkout of "
            "fluxfast-perf or install that with pip install -e '.[perf]'",
            file=sys.stderr,
        )
        return 2
    sys.argv = ["perf_tests", "bench", *options]
    runpy.run_module("perf_tests", run_name="__main__")
    raise AssertionError("perf_tests ends with SystemExit")


def default_workload(machine: Machine) -> tuple[Workload, str]:
    """What the suite measures where none is named, and why: schnell on a Hopper, released weights if they are here."""
    if machine.capability != (9, 0):
        return get_workload("tiny"), f"no Hopper GPU, found {machine.device}"
    released = get_workload("schnell-hub")
    try:
        return chosen_workload(released.id)
    except CheckpointError as error:
        return get_workload("schnell"), f"random weights, because {error}"


def chosen_workload(id: str) -> tuple[Workload, str]:
    """The workload called `id`, and which weights it has.

    Raises:
        CheckpointError: if its checkpoint is not on this machine's disk.
    """
    workload = get_workload(id)
    if workload.checkpoint not in ("tiny", *RANDOM):
        # Only now: it imports diffusers.
        from fluxfast.checkpoints import find, pipeline_class

        find(workload.checkpoint, pipeline_class(workload))
    return workload, f"checkpoint {workload.checkpoint}"


def draw_image(arguments: argparse.Namespace) -> int:
    """Build a level, draw the prompt, prove the level, save the image."""
    import dataclasses

    from fluxfast.build import build, generate

    level, workload = get_level(arguments.level), get_workload(arguments.workload)
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist; make it")
    changes = {name: value for name in ("prompt", "seed") if (value := getattr(arguments, name)) is not None}
    workload = dataclasses.replace(workload, **changes)
    built = build(workload, level, on_stage=lambda *stage: print(f"{' '.join(stage).strip()} ...", file=sys.stderr))
    image = generate(built, workload).images[0]
    built.prove(calls=1, num_steps=workload.num_inference_steps)
    image.save(arguments.output)
    print(f"{arguments.output}: {level.id}" + "".join(f"\nwithout {reason}" for reason in built.unavailable.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
