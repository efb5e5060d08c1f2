"""What the suite refuses on the command line, in one sentence each, before it asks the machine anything. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1]
"""`perf_tests`."""
STOCK_TIMING = tuple(
    f"--benchmark-{name}"
    for name in ("min-rounds", "min-time", "max-time", "timer", "calibration", "warmup", "disable-gc", "cprofile")
)
"""Options of pytest-benchmark about timing, which is not its job here."""
COMMITTED = FOLDER.parent / "baselines"


def asked_for(config: pytest.Config, arguments: Sequence[str]) -> list[Path]:
    """Those of pytest's arguments that are in `perf_tests`, are it or hold it, as paths."""
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in arguments]
    return [path for path in paths if path == FOLDER or FOLDER in path.parents or path in FOLDER.parents]


def refuse_swallowed_path(config: pytest.Config) -> None:
    """`--benchmark-compare perf_tests` takes the path for its value, and pytest would run something else."""
    value = getattr(config.option, "benchmark_compare", None)
    if isinstance(value, str) and (not value or asked_for(config, [value])):
        raise pytest.UsageError(
            f"--benchmark-compare took {value!r} for the number of a baseline: give the flag last, without a value, or "
            "--benchmark-compare=0001"
        )


def refuse_what_disables_timing(config: pytest.Config) -> None:
    """No pytest-benchmark, xdist, and pytest-benchmark's own switches."""
    option = config.option
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("perf_tests shows its samples through pytest-benchmark; install it, no -p no:benchmark")
    if getattr(option, "numprocesses", None) or getattr(option, "dist", "no") != "no":
        raise pytest.UsageError(
            "perf_tests cannot run under xdist (-n): levels would share the machine while they are timed, and "
            "pytest-benchmark turns itself off; run without -n"
        )
    for argument in config.invocation_params.args:
        if argument.startswith(STOCK_TIMING):
            raise pytest.UsageError(
                f"{argument} would change nothing: workers time, as the workload says; leave it away"
            )
    if option.benchmark_save or option.benchmark_autosave:
        raise pytest.UsageError("--benchmark-save and -autosave write no baseline of ours; use --record-baseline")
    for name in ("benchmark_disable", "benchmark_skip", "benchmark_only"):
        if getattr(option, name):
            raise pytest.UsageError(
                f"--{name.replace('_', '-')} with perf_tests would leave tests out and be green; leave it away"
            )


def refuse_contradictions(option: Any) -> None:
    """An option that would say nothing beside the others is an error and not ignored."""
    is_own_folder = option.baselines.resolve() != COMMITTED
    refused = {
        "--inject breaks a worker, and --replay starts none: leave one away": option.replay and option.inject,
        "--processes says how many workers to start, and --replay starts none: leave one away": (
            option.replay and option.processes is not None
        ),
        "--gpus says on how many GPUs workers run, and --replay starts none: leave one away": (
            option.replay and option.gpus != 1
        ),
        "--fresh-compiles says that workers compile anew, and --replay starts none: leave one away": (
            option.replay and option.fresh_compiles
        ),
        f"--gpus is {option.gpus}, expected at least 1: leave it away for one": option.gpus < 1,
        "--record-baseline writes a new baseline and --update-baseline changes the old one: leave one away": (
            option.record_baseline and option.update_baseline
        ),
        "--add-night keeps a run that is compared with the baseline, as it is: give --benchmark-compare, and leave "
        "--record-baseline, --update-baseline and --inject away": (
            option.add_night
            and not (
                option.benchmark_compare and not (option.record_baseline or option.update_baseline or option.inject)
            )
        ),
        "--reason says why --update-baseline accepts something slower: give both, and the reason in words": (
            option.reason is not None and not (option.update_baseline and option.reason.strip())
        ),
        "--partial-baseline goes with --record-baseline and a --baselines folder of your own": (
            option.partial_baseline and not (option.record_baseline and is_own_folder)
        ),
    }
    for sentence, is_so in refused.items():
        if is_so:
            raise pytest.UsageError(sentence)


def refuse_other_machine(required: str | None, slug: str) -> None:
    """A GPU machine whose driver is not loaded would measure its processor and be green on that."""
    if required not in (None, slug):
        raise pytest.UsageError(
            f"--require-machine {required}: this machine is {slug!r}; look at its driver and power limit (nvidia-smi), "
            "or name it as it is"
        )
