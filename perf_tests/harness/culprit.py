"""Which package moved under a red test, as the command that finds the version."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
from collections.abc import Mapping
from typing import Any, Final

from packaging.version import InvalidVersion, Version

from perf_tests.harness.schema import Environment, Outcome, Verdict

AXES: Final = {
    "torch": "torch",
    "torchao": "torchao",
    "diffusers": "diffusers",
    "triton": "triton",
    "transformers": "transformers",
    "quack-kernels": "quack",
    "nvidia-cutlass-dsl": "cutlass_dsl",
    "fa3-fwd": "fa3",
}
"""The components whose versions can be searched, as an index names them, and their fields of an environment."""
EXACT_RULES: Final = ("count", "step_not_applied")
"""Counts that are wrong by themselves: to find the version, no baseline has to be recorded first."""
SEARCHABLE: Final = (Outcome.REGRESSED, Outcome.ERROR)

Versions = Mapping[str, str | None]
"""Component -> version, None where it is not there."""


def version_of(axis: str, environment: Mapping[str, Any]) -> str | None:
    """Of a component, in the fields of an environment; None where it is not there, or another one is in its place."""
    name, _, version = (environment.get(AXES[axis]) or "").rpartition(" ")
    return version or None if name in ("", axis) else None


def versions_of(environment: Environment | None) -> dict[str, str | None]:
    """Of the components."""
    facts = environment.model_dump() if environment else {}
    return {axis: version_of(axis, facts) for axis in AXES} if facts else {}


def installed_versions() -> dict[str, str | None]:
    """Of the components, in the running Python; nothing is imported."""
    versions: dict[str, str | None] = {}
    for axis in AXES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[axis] = importlib.metadata.version(axis)
    return versions


def bisect_commands(test: str, workload: str, verdict: Verdict, was: Versions, now: Versions) -> list[str]:
    """One command a package that moved between the baseline's environment and this run's; often none.

    Args:
        test: name and level, e.g. `test_latency[float8]`.
        was, now: `versions_of` either environment; empty where it is not known.
    """
    if verdict.outcome not in SEARCHABLE:
        return []
    is_error = verdict.outcome is Outcome.ERROR and verdict.rule != "step_not_applied"
    commands = []
    for axis, (good, bad) in _moved(was, now).items():
        words = ["python", "-m", "perf_tests", "bisect", "--axis", axis, "--good", good, "--bad", bad]
        words += ["--test", test, "--workload", workload, *(["--bad-is", "error"] if is_error else [])]
        if test.startswith("test_structure") and verdict.rule in EXACT_RULES:
            words += ["--against", "none"]
        nightly = ' --pre --index-url "$NIGHTLY_INDEX_URL"' if _is_pre(good) or _is_pre(bad) else ""
        commands.append(shlex.join(words) + nightly)
    return commands


def unsearched(verdict: Verdict, was: Environment | None, now: Environment | None) -> str | None:
    """What else is another than when the baseline was recorded, which no command searches: driver, Python, machine,
    and packages that came or went.

    None where there is nothing, or `bisect_commands` would look for nothing either.
    """
    if verdict.outcome not in SEARCHABLE or was is None or now is None:
        return None
    searched = {AXES[axis] for axis in _moved(versions_of(was), versions_of(now))}
    searched |= {"triton"} if "torch" in searched else set()
    changes = [change for change in now.changes(was) if change.partition(" ")[0] not in searched]
    return (
        f"Not as when the baseline was recorded, and searched by no command: {'; '.join(changes)}" if changes else None
    )


def _moved(was: Versions, now: Versions) -> dict[str, tuple[str, str]]:
    """Component -> its two versions, where they differ; triton, which torch pins, only where torch did not move."""
    versions = {axis: (was.get(axis), now.get(axis)) for axis in AXES}
    moved = {axis: (good, bad) for axis, (good, bad) in versions.items() if good and bad and good != bad}
    if "torch" in moved:
        moved.pop("triton", None)
    return moved


def _is_pre(version: str) -> bool:
    try:
        return Version(version).is_prerelease
    except InvalidVersion:  # a build from source; the command will say that it does not exist
        return False
