"""The versions to search: asked of the package index or given by hand, in the order from good to bad."""

from __future__ import annotations

import bisect
import re
import subprocess
import sys
from collections.abc import Sequence

from packaging.version import InvalidVersion, Version


class VersionError(ValueError):
    """A version that does not exist or cannot be asked for: observed, expected, what to do."""


def published(component: str, *, index_url: str | None, pre: bool) -> list[str]:
    """What `pip index versions` lists, on the usual index and on `index_url`: nightlies lie on one of their own.

    Raises:
        VersionError: if it cannot tell.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", component]
    command += ["--extra-index-url", index_url] if index_url else []
    command += ["--pre"] if pre else []
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"^Available versions: (.+)$", asked.stdout, re.MULTILINE)
    if asked.returncode != 0 or found is None:
        said = [line for line in asked.stderr.splitlines() if not line.startswith("WARNING")] or ["it said nothing"]
        raise VersionError(
            f"`{' '.join(command[1:])}` lists no versions of {component!r} ({said[-1]}): check --index-url, "
            "or name the versions with --versions A,B,C"
        )
    return [name.strip() for name in found[1].split(",")]


def between(names: Sequence[str], good: str, bad: str) -> list[str]:
    """The versions from `good` to `bad`, both included, in that order: newest last unless good is the newer one.

    Args:
        names: what exists. A version may be named without its local part (`2.13.0` for `2.13.0+cpu`) where that is
            unambiguous, and stands for it where both exist: an installer takes the one with the local part.

    Raises:
        VersionError: not a version, not among `names`, or both the same.
    """
    found = {parse(name) for name in names}
    built = {version.public for version in found if version.local}
    existing = sorted(version for version in found if version.local or version.public not in built)
    first, last = (_match(parse(name), existing) for name in (good, bad))
    if first == last:
        raise VersionError(f"--good and --bad are both {first}: there is nothing between them to search")
    chosen = [version for version in existing if min(first, last) <= version <= max(first, last)]
    return [str(version) for version in (chosen if first < last else reversed(chosen))]


def parse(name: str) -> Version:
    """A version as it is written in paths and requirements.

    Raises:
        VersionError: if it is none.
    """
    try:
        return Version(name.strip())
    except InvalidVersion:
        raise VersionError(f"{name!r} is not a version; expected one like 2.13.0 or 2.13.0.dev20260901") from None


def same(asked: str, found: str) -> bool:
    """Whether `found` is the version asked for; a local part counts only if it was asked for."""
    wanted, got = parse(asked), parse(found)
    return wanted == got or (wanted.local is None and wanted.public == got.public)


def _match(asked: Version, existing: Sequence[Version]) -> Version:
    if asked in existing:
        return asked
    alike = [version for version in existing if version.public == asked.public]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise VersionError(f"version {asked} could be {' or '.join(map(str, alike))}: name one of them")
    place = bisect.bisect(existing, asked)
    near = ", ".join(map(str, existing[max(0, place - 2) : place + 2])) or "none"
    raise VersionError(
        f"version {asked} does not exist among {len(existing)} versions; near it are "
        f"{near} (nightlies need --pre and the --index-url they lie on)"
    )
