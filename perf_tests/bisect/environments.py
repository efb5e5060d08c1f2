"""One environment a version, in which everything but the component is the same. uv where it is installed, else pip."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from perf_tests.bisect.versions import same
from perf_tests.harness.runner import ROOT

INSTALL_S: Final = 3600.0
"""A CUDA build of torch is some gigabytes; a download that takes longer than this hangs."""
READY: Final = "ready"
LOG: Final = "install.log"
IMPOSSIBLE: Final = re.compile(
    r"\(from versions: (?!none\))|depends on .*ResolutionImpossible"
    r"|No solution found(?!.*(network was|package locations))",
    re.DOTALL,
)
"""pip and uv of a version that is not on an index which answered, or whose own requirements were read and exclude the
rest. Without a network pip lists "none", or sees a conflict among what was asked for."""
DISTURBED: Final = ("WARNING: Retrying", "Could not fetch URL")
"""pip goes on without an index that does not answer."""

Run = Callable[[Sequence[str], Path], int]
"""(command, log to append to) -> exit status."""


class BuildError(Exception):
    """A version that could not be installed: one sentence. Another time it may be."""


class NoSuchVersionError(BuildError):
    """One that never can be: the index answered and has no such build, or it cannot stand beside the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an environment is made.

    Args:
        component: the package that differs.
        extras: of the component.
        index_url: where nightlies lie, beside the configured index; None for that one alone.
        base: site-packages of the running Python, over which the component alone is installed; empty for an
            environment of its own.
        rest: requirements of everything else, of the same versions as in the running Python.
        uv: path of uv, None for pip.
    """

    component: str
    extras: Sequence[str] = ()
    index_url: str | None = None
    base: Sequence[str] = ()
    rest: Sequence[str] = ()
    uv: str | None = None


def recipe_here(component: str, *, index_url: str | None, over_base: bool) -> Recipe:
    """The recipe for this machine: what the running Python has, with another version of `component`.

    Raises:
        ValueError: for a component whose code lies in packages of its own requirements, alone.
    """
    if over_base and component == "nvidia-cutlass-dsl":
        raise ValueError(f"{component} without what it requires has no code: leave --base-env away")
    base = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    asked = requirements(_project())
    return Recipe(
        component=component,
        extras=sorted({extra for own in asked if canonicalize_name(own.name) == component for extra in own.extras}),
        index_url=index_url,
        base=list(base) if over_base else [],
        rest=[] if over_base else pinned_requirements(component, asked, _installed),
        uv=shutil.which("uv"),
    )


def pinned_requirements(
    component: str, asked: Sequence[Requirement], installed: Callable[[str], str | None]
) -> list[str]:
    """What `pyproject.toml` asks for beside `component`, at the versions that are installed here.

    What those need in turn is left to the installer: torch, for one, brings the triton it was built with.
    """
    pinned = []
    for requirement in asked:
        version = installed(requirement.name)
        # An extra's package that is not here, such as FlashAttention-3 without a Hopper GPU, is not wanted there.
        if canonicalize_name(requirement.name) != component and version is not None:
            pinned.append(f"{requirement.name}{_in_brackets(sorted(requirement.extras))}=={version}")
    return pinned


def requirements(project: Mapping[str, Any]) -> list[Requirement]:
    """Of the suite on a GPU, from a `pyproject.toml`'s `project`; its own extras are what they stand for."""
    found, groups, seen = [], [project["dependencies"]], {"perf", "gpu"}
    groups += [project["optional-dependencies"][extra] for extra in sorted(seen)]
    for group in groups:
        for requirement in map(Requirement, group):
            if canonicalize_name(requirement.name) != canonicalize_name(project["name"]):
                found.append(requirement)
                continue
            extras = {canonicalize_name(extra) for extra in requirement.extras} - seen
            groups += [project["optional-dependencies"][extra] for extra in sorted(extras)]
            seen |= extras
    return found


def _in_brackets(extras: Sequence[str]) -> str:
    return f"[{','.join(extras)}]" if extras else ""


def install_commands(recipe: Recipe, version: str, python: Path, constraints: Path) -> list[list[str]]:
    """What to run for an environment with `version`.

    Args:
        python: of the new environment.
        constraints: file that holds `recipe.rest` without extras.
    """
    own = [f"{recipe.component}{_in_brackets(recipe.extras)}=={version}"]
    if recipe.uv:
        install = [recipe.uv, "pip", "install", "--python", str(python)]
    else:
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-input", "--progress-bar=off"]
    # A release lies on the usual index, a nightly on the other one. A version that is named may be a pre-release
    # without `--pre`, which would take those of every other package too.
    if recipe.index_url:
        install += ["--extra-index-url", recipe.index_url]
        # Left to itself uv takes a package from the first index that has any version of it.
        install += ["--index-strategy", "unsafe-best-match"] if recipe.uv else []
    if recipe.base:
        return [[*install, "--no-deps", *own]]
    bound = ["--constraint", str(constraints)]
    if recipe.component == "triton":  # torch pins it to one version: put the other one over it
        return [[*install, *bound, *recipe.rest], [*install, "--no-deps", *own]]
    return [[*install, *bound, *recipe.rest, *own]]


def python_of(folder: Path) -> Path:
    """The environment's interpreter. Not resolved: the link is what makes it that environment's."""
    return folder / "bin" / "python"


def build(recipe: Recipe, version: str, folder: Path, run: Run | None = None) -> Path:
    """Make the environment in `folder`, unless it stands there whole already; its interpreter.

    Raises:
        BuildError: what the installer or the disk said, and where the log is.
    """
    python = python_of(folder)
    if (folder / READY).exists():
        return python
    try:
        _make(recipe, version, folder, run or run_logged)
    except OSError as error:
        raise BuildError(f"no environment can be made in {folder}: {error}") from error
    return python


def _make(recipe: Recipe, version: str, folder: Path, run: Run) -> None:
    python = python_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.{LOG}"
    log.unlink(missing_ok=True)
    made = run([sys.executable, "-m", "venv", "--without-pip", str(folder)], log)
    if made != 0:
        raise BuildError(f"no environment can be made in {folder}: {last_line(log)} (log: {log})")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(re.sub(r"\[.*?\]", "", line) for line in recipe.rest) + "\n", encoding="utf-8")
    for command in install_commands(recipe, version, python, constraints):
        if (status := run(command, log)) != 0:
            kind = NoSuchVersionError if _is_impossible(recipe, log) else BuildError
            raise kind(f"cannot be installed (status {status}): {last_line(log)} (log: {log})")
    # After the install, so that no installer takes the base's copy for one that it may replace.
    _put_over(recipe.base, folder)
    found = _version_in(python, recipe.component)
    if not same(version, found):
        raise BuildError(f"{version} was asked for and {recipe.component} {found} is what is imported (log: {log})")
    (folder / READY).touch()


def prune(folder: Path, versions: Collection[str]) -> None:
    """Remove every environment in `folder` but those of `versions`."""
    for environment in folder.glob("*/"):
        if environment.name not in versions:
            shutil.rmtree(environment, ignore_errors=True)


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run an installer; 124 if it takes longer than `INSTALL_S`."""
    environment = environment_without("PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV", "UV_CONSTRAINT", "VIRTUAL_ENV")
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        try:
            ended = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                timeout=INSTALL_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            output.write(f"stopped after {INSTALL_S:.0f} s\n".encode())
            return 124
    return ended.returncode


def environment_without(*names: str) -> dict[str, str]:
    """The environment for a process of another Python: nothing that points at this one's packages."""
    left_out = {"PYTHONPATH", "PYTHONHOME", *names}
    return {name: value for name, value in os.environ.items() if name not in left_out}


def last_line(log: Path) -> str:
    """What a log ends with, the line that tells most: the last error if there is one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error:", "cause:"))]
    return (errors or lines or ["it said nothing"])[-1][:500]


def _is_impossible(recipe: Recipe, log: Path) -> bool:
    """Whether trying again is in vain. Of two indexes pip may have heard one alone and does not say so."""
    said = log.read_text(errors="replace")
    is_whole = not any(word in said for word in DISTURBED) and (bool(recipe.uv) or not recipe.index_url)
    return is_whole and IMPOSSIBLE.search(said) is not None


def _put_over(base: Sequence[str], folder: Path) -> None:
    if not base:
        return
    (own,) = folder.glob("lib/python*/site-packages")
    # `addsitedir` reads the base's own .pth files, which a plain path would not: editable installs work.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in base]
    (own / "_base_environment.pth").write_text("".join(lines), encoding="utf-8")


def _version_in(python: Path, component: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({component!r}))"
    asked = subprocess.run(
        [python, "-c", code], cwd=python.parent, env=environment_without(), capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        raise BuildError(f"{component} is not importable there: {(asked.stderr.strip() or 'it said nothing')[-300:]}")
    return asked.stdout.strip()


def _project() -> Mapping[str, Any]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project: Mapping[str, Any] = document["project"]
    return project


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
