"""Releases on the usual index and nightlies on their own: a real pip finds and installs both ends of a search."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from perf_tests.bisect import versions
from perf_tests.bisect.environments import BuildError, NoSuchVersionError, Recipe, build, install_commands

NIGHTLY = "2.2.0.dev20260920+cu130"


def wheel(index: Path, name: str, version: str, *requires: str) -> None:
    """A package of one empty module, on a page that pip reads as an index."""
    place, info = index / name, f"{name}-{version}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place / f"{name}-{version}-py3-none-any.whl", "w") as file:
        needs = "".join(f"Requires-Dist: {text}\n" for text in requires)
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    names = sorted(path.name for path in place.glob("*.whl"))
    (place / "index.html").write_text("".join(f'<a href="{n.replace("+", "%2B")}">{n}</a>\n' for n in names))


@pytest.fixture
def nightly_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a component whose releases lie elsewhere, and of an older version of what is pinned beside it."""
    usual, nightly = tmp_path / "usual", tmp_path / "nightly"
    for version in ("2.0.0", "2.1.0"):
        wheel(usual, "component", version)
    wheel(nightly, "component", "2.1.0+cu130")
    wheel(nightly, "component", NIGHTLY, "helper>=1", "compiler==3.0+git1")
    wheel(usual, "pinned", "1.5")
    wheel(nightly, "pinned", "1.0")
    wheel(nightly, "compiler", "3.0+git1")
    for version in ("1.0", "1.1rc1"):
        wheel(usual, "helper", version)
    for name, value in {"INDEX_URL": usual.as_uri(), "EXTRA_INDEX_URL": "", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return nightly.as_uri()


def test_a_release_and_a_nightly_are_ends_of_one_search(nightly_index: str) -> None:
    """A release is not among the nightlies; of a version that is, the build that would be installed is listed."""
    names = versions.published("component", index_url=nightly_index, pre=True)
    assert versions.between(names, "2.0.0", NIGHTLY) == ["2.0.0", "2.1.0+cu130", NIGHTLY]
    assert versions.between(names, "2.1.0", NIGHTLY) == ["2.1.0+cu130", NIGHTLY]


@pytest.mark.parametrize("version", ["2.0.0", NIGHTLY])
def test_either_end_is_installed(nightly_index: str, tmp_path: Path, version: str) -> None:
    """With the rest at its pins, what a nightly needs from its own index, and no other package's pre-release."""
    recipe = Recipe(component="component", index_url=nightly_index, rest=["pinned==1.5"])
    python = build(recipe, version, tmp_path / "environment")
    code = "import importlib.metadata as m; print(sorted(f'{d.name}=={d.version}' for d in m.distributions()))"
    brought = ["compiler==3.0+git1", "helper==1.0"] if version == NIGHTLY else []
    installed = subprocess.check_output([python, "-I", "-c", code], text=True).strip()
    assert installed == str(sorted([*brought, f"component=={version}", "pinned==1.5"]))


def test_only_an_index_that_answers_says_that_a_version_is_not_there(
    nightly_index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not pip without a network, nor with one of two indexes; what cannot stand beside the rest is as final."""

    def error(recipe: Recipe, version: str) -> type[BuildError]:
        with pytest.raises(BuildError, match="cannot be installed") as raised:
            build(recipe, version, tmp_path / "environment")
        return raised.type

    alone = Recipe(component="component", rest=["pinned==1.5"])
    assert error(alone, "9.9") is NoSuchVersionError
    assert error(Recipe(component="component", index_url=nightly_index), "9.9") is BuildError
    wheel(tmp_path / "usual", "component", "2.2.0", "pinned<1.5")
    wheel(tmp_path / "usual", "pinned", "1.4")
    assert error(alone, "2.2.0") is NoSuchVersionError
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert error(alone, "2.0.0") is BuildError


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("error: No solution found when resolving dependencies\n  cause: Because there is no version of c==9.9", True),
        ("error: No solution found\n  cause: Because c was not found in the cache\nthe network was disabled", False),
        ("error: No solution found\n  cause: Because c was not found in the provided package locations", False),
        ("error: Failed to fetch: `https://nightly/c/`", False),
    ],
)
def test_uv_says_whether_a_version_is_not_there(tmp_path: Path, said: str, kind: bool) -> None:
    """It ends where an index does not answer, so two of them are as good as one."""

    def run(command: list[str], log: Path) -> int:
        (tmp_path / "9.9").mkdir(exist_ok=True)
        log.write_text(said)
        return int("venv" not in command)

    with pytest.raises(BuildError, match="cannot be installed") as raised:
        build(Recipe(component="c", index_url="https://nightly", uv="/uv"), "9.9", tmp_path / "9.9", run)
    assert (raised.type is NoSuchVersionError) is kind


@pytest.mark.parametrize("over_base", [True, False])
@pytest.mark.parametrize("component", ["torch", "triton"])
def test_uv_looks_on_both_indexes(component: str, over_base: bool) -> None:
    """By itself it stops at the first one that has any version of a package."""
    recipe = Recipe(component=component, index_url="https://nightly", base=["/base"] if over_base else [], uv="/uv")
    for command in install_commands(recipe, NIGHTLY, Path("p"), Path("c")):
        assert command[:5] == ["/uv", "pip", "install", "--python", "p"]
        assert command[5:9] == ["--extra-index-url", "https://nightly", "--index-strategy", "unsafe-best-match"]
