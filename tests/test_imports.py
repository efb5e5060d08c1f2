"""The one arrow, perf_tests -> fluxfast, and where torch may be imported: held by parsing the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLUXFAST = sorted((ROOT / "fluxfast").rglob("*.py"))
PERF_TESTS = sorted((ROOT / "perf_tests").rglob("*.py"))
USES_TORCH = {"worker.py", "clock.py", "environment.py", "memory.py", "trace.py"}
HEAVY = {"torch", "torchao", "diffusers", "transformers", "triton"}


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (parent, node.module)))
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def fluxfast_file(module: str) -> Path | None:
    """The file of a module of fluxfast, None for anything else."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((c for c in candidates if module.startswith("fluxfast") and c.is_file()), None)


def reaches_torch(path: Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Whether importing `path`, a file of fluxfast, can import torch, directly or through fluxfast."""
    if top_level(path) & HEAVY:
        return True
    below = {file for name in imported(path) if (file := fluxfast_file(name)) and file not in seen | {path}}
    return any(reaches_torch(file, seen | {path}) for file in below)


def named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


@named(FLUXFAST)
def test_fluxfast_never_imports_the_suite(path: Path) -> None:
    """What is measured knows nothing of being measured."""
    assert not top_level(path) & {"perf_tests", "pytest", "tests", "tools"}


@pytest.mark.parametrize("name", ["levels", "workloads", "errors"])
def test_data_imports_only_the_standard_library(name: str) -> None:
    """The suite reads the ladder without loading torch."""
    assert top_level(ROOT / "fluxfast" / f"{name}.py") <= sys.stdlib_module_names


@named([path for path in PERF_TESTS if path.name not in USES_TORCH])
def test_suite_is_free_of_torch(path: Path) -> None:
    """Only the worker and what it alone uses may load torch; everything else of the suite runs beside a busy GPU."""
    assert not top_level(path) & HEAVY
    files = filter(None, map(fluxfast_file, imported(path)))
    assert not [file.name for file in files if reaches_torch(file)]


@named([path for path in PERF_TESTS if path.name not in USES_TORCH])
def test_only_the_worker_uses_the_torch_files(path: Path) -> None:
    """A file of the suite that imported one of them would load torch through it."""
    assert not {f"{name.rpartition('.')[2]}.py" for name in imported(path)} & USES_TORCH


@named([path for path in FLUXFAST if path.name not in ("__main__.py", "build.py", "proof.py")])
def test_steps_know_nothing_of_the_build(path: Path) -> None:
    """`build` imports every step, never back; the command line builds, the proof names the type for checkers only."""
    assert "fluxfast.build" not in imported(path)
