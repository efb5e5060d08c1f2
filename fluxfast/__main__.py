"""Command line: `python -m fluxfast levels | generate | bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path

from fluxfast.errors import FluxFastError
from fluxfast.levels import LADDER, LEVELS, get_level
from fluxfast.workloads import WORKLOADS, get_workload


def main() -> int:
    """Run one command; 2 after one sentence on stderr if its input was wrong."""
    parser = argparse.ArgumentParser(prog="python -m fluxfast", description="FLUX.1, one optimisation at a time.")
    commands = parser.add_subparsers(dest="command", required=True)
    levels = commands.add_parser("levels", help="what this machine can run, and why not")
    levels.add_argument("--json", action="store_true", help="level id -> reason or null, and the device")
    draw = commands.add_parser("generate", help="draw one image")
    draw.add_argument("prompt", nargs="?", help="default: the workload's own")
    draw.add_argument("--level", default=LADDER[-1].id, help="one of " + ", ".join(LEVELS))
    draw.add_argument("--workload", default="tiny", help="one of " + ", ".join(WORKLOADS))
    draw.add_argument("--seed", type=int, default=None)
    draw.add_argument("-o", "--output", type=Path, required=True)
    commands.add_parser("bench", help="measure levels into one table, one plot and their images; `bench -h` tells more")
    if sys.argv[1:2] == ["bench"]:  # its options are the suite's own, unknown here
        return run_bench(sys.argv[2:])
    arguments = parser.parse_args()
    try:
        if arguments.command == "levels":
            return list_levels(as_json=arguments.json)
        return draw_image(arguments)
    except (FluxFastError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_levels(as_json: bool) -> int:
    """Print every level with the reason if this machine cannot run it."""
    from fluxfast.machine import this_machine, why_not

    machine = this_machine()
    reasons = {level.id: why_not(level, machine) for level in LEVELS.values()}
    if as_json:
        print(json.dumps({"device": machine.device, "capability": machine.capability, "levels": reasons}))
        return 0
    for level in LEVELS.values():
        field = level.own_field
        change = f"{field}={getattr(level, field)}" if field else f"dtype={level.dtype}"
        print(f"{level.id:16}{change:34}{reasons[level.id] or 'runs here'}")
    return 0


def run_bench(options: list[str]) -> int:
    """Hand over to the suite, which measures this package and is not imported by it."""
    if importlib.util.find_spec("perf_tests") is None:
        print(
            "error: bench is part of the suite, and `perf_tests` cannot be found here; run it in a checkout of "
            "fluxfast-perf or install it with pip install 'fluxfast-perf[perf]'",
            file=sys.stderr,
        )
        return 2
    sys.argv = ["perf_tests", "bench", *options]
    runpy.run_module("perf_tests", run_name="__main__")
    raise AssertionError("perf_tests ends with SystemExit")


def draw_image(arguments: argparse.Namespace) -> int:
    """Build a level, draw the prompt, prove the level, save the image."""
    import dataclasses

    from fluxfast.build import build, generate

    level, workload = get_level(arguments.level), get_workload(arguments.workload)
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist; make it")
    changes = {name: value for name in ("prompt", "seed") if (value := getattr(arguments, name)) is not None}
    workload = dataclasses.replace(workload, **changes)
    built = build(workload, level, on_stage=lambda stage: print(f"{stage} ...", file=sys.stderr))
    image = generate(built, workload).images[0]
    built.prove(calls=1, num_steps=workload.num_inference_steps)
    image.save(arguments.output)
    print(f"{arguments.output}: {level.id}" + "".join(f"\nwithout {reason}" for reason in built.unavailable.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
