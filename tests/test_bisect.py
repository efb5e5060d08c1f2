"""From a command to an answer: versions, environments, the suite as oracle, resuming. Nothing is installed."""

from __future__ import annotations

import errno
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from baseline_samples import ENVIRONMENT
from history_samples import judged, level_night, night
from packaging.requirements import Requirement

from perf_tests.bisect import answer, cli, known, versions
from perf_tests.bisect.bisection import Bisection
from perf_tests.bisect.environments import (
    READY,
    BuildError,
    NoSuchVersionError,
    Recipe,
    build,
    install_commands,
    pinned_requirements,
    recipe_here,
    requirements,
)
from perf_tests.bisect.known import require_good
from perf_tests.bisect.machines import Here
from perf_tests.bisect.oracle import Case, classify
from perf_tests.bisect.search import Contradiction, Found
from perf_tests.bisect.state import STATE_FILE, Judged, Kind, Question, State, load
from perf_tests.bisect.versions import VersionError
from perf_tests.harness.files import StoreError
from perf_tests.harness.schema import Outcome
from perf_tests.history.store import HistoryError, append

NAMES = [f"2.{minor}.0" for minor in range(10, 20)]
RECIPE = Recipe(component="torch", rest=["numpy==2.4.6", "pytest-benchmark[histogram]==5.3.1"])


def question(test: str = "test_structure[float8]", **change: object) -> Question:
    asked = Question(
        axis="torch", versions=NAMES, test=test, against="none", over_base=False, bad_is_error=False, workload="tiny",
        processes=None, index_url=None, pre=False,
    )  # fmt: skip
    return asked.model_copy(update=change)


class Night:
    """An oracle without environments: `says` is what each attempt at a version ends with."""

    def __init__(self, says: Callable[[str, int], Kind | str]) -> None:
        self.says = says
        self.built: list[str] = []
        self.calls: list[str] = []

    def build(self, _: Recipe, version: str, folder: Path) -> Path:
        self.built.append(version)
        if isinstance(said := self.says(version, 0), str) and not isinstance(said, Kind):
            raise (NoSuchVersionError if "No matching" in said else BuildError)(said)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / version

    def judge(self, _: Question, python: Path, root: Path) -> Judged:
        version = python.name
        kind = self.says(version, self.calls.count(version))
        assert isinstance(kind, Kind)
        self.calls.append(version)
        return Judged(
            kind=kind, why=f"{kind} night", numbers={"ratio": 1.2}, samples_s={"float8": [[0.1, 0.11, 0.12]]},
            facts={"float8 Linears": 350 if kind is Kind.GOOD else 0}, folder=str(root / "1"),
        )  # fmt: skip

    def record(self, _: Question, python: Path, root: Path) -> Judged:
        self.calls.append(f"record {python.name}")
        return Judged(kind=Kind.GOOD, why="", folder=str(root / "1"))


def bisect(tmp: Path, night: Night, asked: Question | None = None, state: State | None = None) -> Bisection:
    own = state or load(tmp, asked or question())
    night_here = {"build": night.build, "judge": night.judge, "record": night.record}
    return Bisection(own, tmp, lambda line: None, Here(tmp, own.question, RECIPE, lambda line: None, **night_here))


def since(first_bad: str) -> Callable[[str, int], Kind | str]:
    return lambda version, _: Kind.BAD if version >= first_bad else Kind.GOOD


def test_answer_names_both_versions_and_both_sample_sets(tmp_path: Path) -> None:
    """The text holds last good, first bad, their samples and what was counted differently."""
    search = bisect(tmp_path, Night(since("2.14.0")))
    found = search.run()
    text = answer.describe(search.state, found)
    assert found == Found(last_good=3, first_bad=4, between=(), good_again=())
    assert "last good: torch 2.13.0" in text and "first bad: torch 2.14.0" in text
    assert text.count("float8: medians 0.1100 s (1 process(es), 3 calls)") == 2
    assert "float8 Linears: 350 -> 0" in text


def test_uninstallable_and_inconclusive_versions(tmp_path: Path) -> None:
    """A void night is repeated, thrice at most; what cannot be installed or run is left out and said so."""

    def says(version: str, attempt: int) -> Kind | str:
        match version:
            case "2.14.0":
                return "cannot be installed (status 1): No matching distribution"
            case "2.15.0":
                return Kind.UNUSABLE
            case "2.13.0":
                return Kind.INCONCLUSIVE
            case "2.12.0":
                return Kind.INCONCLUSIVE if attempt < 2 else Kind.GOOD
        return since("2.14.0")(version, attempt)

    night = Night(says)
    search = bisect(tmp_path, night)
    found = search.run()
    assert isinstance(found, Found)
    assert (NAMES[found.last_good], NAMES[found.first_bad]) == ("2.12.0", "2.16.0")
    assert night.calls.count("2.13.0") == 3 and night.calls.count("2.12.0") == 3 and night.calls.count("2.15.0") == 1
    text = answer.describe(search.state, found)
    assert "one of 2.13.0, 2.14.0, 2.15.0, 2.16.0" in text
    assert "2.14.0: cannot be installed (status 1): No matching distribution" in text
    assert "2.13.0: inconclusive 3 times" in text


def test_failed_install_is_tried_again(tmp_path: Path) -> None:
    """Three times, and again when the search is asked again; a version that the index does not have is not."""

    def says(version: str, attempt: int) -> Kind | str:
        if version == "2.14.0":
            return "cannot be installed (status 1): No matching distribution"
        return "cannot be installed (status 1): no network" if is_down else since("2.15.0")(version, attempt)

    is_down, night = True, Night(says)
    search = bisect(tmp_path, night)
    assert search.run() == Contradiction(0)
    assert night.built == ["2.10.0"] * 3
    text = answer.describe(search.state, Contradiction(0))
    assert "ask again" in text and "2.10.0: inconclusive 3 times, the last time: cannot be installed" in text
    is_down, night = False, Night(says)
    assert bisect(tmp_path, night).run() == Found(last_good=3, first_bad=5, between=(4,), good_again=())
    assert night.built.count("2.14.0") == 1
    again = Night(says)
    bisect(tmp_path, again).run()
    assert again.built == []


def test_full_disk_is_no_verdict(tmp_path: Path) -> None:
    """Where a run is to be written; the version is tried again."""
    full = [True]

    def judge(asked: Question, python: Path, root: Path) -> Judged:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return night.judge(asked, python, root)

    night = Night(since("2.14.0"))
    here = Here(tmp_path, question(), RECIPE, lambda line: None, build=night.build, judge=judge)
    search = Bisection(load(tmp_path, question()), tmp_path, lambda line: None, here)
    assert search.run() == Found(last_good=3, first_bad=4, between=(), good_again=())
    assert [run.kind for run in search.state.judged["2.10.0"]] == [Kind.INCONCLUSIVE, Kind.GOOD]


def test_boundary_that_was_judged_once_says_so(tmp_path: Path) -> None:
    """Where its environment could not be made a second time."""

    def says(version: str, attempt: int) -> Kind | str:
        if version == "2.14.0" and version in night.calls:
            return "cannot be installed (status 1): no network"
        return since("2.14.0")(version, attempt)

    night = Night(says)
    search = bisect(tmp_path, night, question("test_latency[float8]"))
    text = answer.describe(search.state, found) if isinstance(found := search.run(), Found) else ""
    once = "first bad: torch 2.14.0\n  judged once and could not be confirmed: inconclusive 3 times, the last time: "
    assert once in text and text.count("judged once") == 1


def test_resumes_after_any_end(tmp_path: Path) -> None:
    """Stopped after every run, the search comes to the same answer and repeats nothing."""
    whole = Night(since("2.16.0"))
    bisect(tmp_path / "whole", whole, question("test_latency[float8]", against="good")).run()
    calls: list[str] = []

    def stopping(version: str, attempt: int) -> Kind | str:
        if pieces.calls:
            raise KeyboardInterrupt
        return since("2.16.0")(version, attempt)

    for _ in range(50):
        pieces = Night(stopping)
        search = bisect(tmp_path / "pieces", pieces, question("test_latency[float8]", against="good"))
        try:
            found = search.run()
            break
        except KeyboardInterrupt:
            continue
        finally:
            calls += pieces.calls
    assert calls == whole.calls
    assert calls[:2] == ["record 2.10.0", "2.10.0"]
    assert found == Found(last_good=5, first_bad=6, between=(), good_again=())


def test_only_the_brackets_environments_stay(tmp_path: Path) -> None:
    """Each is gigabytes."""
    bisect(tmp_path, Night(since("2.14.0"))).run()
    assert {folder.name for folder in (tmp_path / "environments").iterdir()} == {"2.13.0", "2.14.0"}


def test_good_that_is_bad_already(tmp_path: Path) -> None:
    """One version is judged, the answer says so, and asking again builds nothing."""
    night = Night(lambda version, _: Kind.BAD)
    search = bisect(tmp_path, night)
    assert search.run() == Contradiction(0)
    assert "--good 2.10.0 was judged bad" in answer.describe(search.state, Contradiction(0))
    again = Night(lambda version, _: Kind.BAD)
    assert bisect(tmp_path, again).run() == Contradiction(0)
    assert (night.built, again.built) == (["2.10.0"], [])


def test_bad_end_with_an_error_says_how_to_search_for_it(tmp_path: Path) -> None:
    """An error is no vote unless it is asked for."""
    search = bisect(tmp_path, Night(lambda version, _: Kind.GOOD if version == "2.10.0" else Kind.UNUSABLE))
    assert search.run() == Contradiction(9)
    assert "--bad-is error" in answer.describe(search.state, Contradiction(9))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"{}", "damaged at question"),
        (State(question=question(workload="schnell")).model_dump_json().encode(), "another workload"),
    ],
    ids=["torn", "empty", "another question"],
)
def test_damaged_state_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    """One sentence, and the file stays as it is."""
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(StoreError, match=said):
        load(tmp_path, question())
    assert (tmp_path / STATE_FILE).read_bytes() == content


VERDICTS = [
    (0, {"verdict": "pass", "rule": "interval"}, "", Kind.GOOD),
    (0, {"verdict": "improved", "rule": "interval"}, "", Kind.GOOD),
    (1, {"verdict": "pass", "rule": "interval"}, "", Kind.UNUSABLE),
    (1, {"verdict": "regressed", "rule": "interval"}, "Failed: regressed [float8] (interval): slow", Kind.BAD),
    (0, {"verdict": "regressed", "rule": "interval"}, "excused by the quarantine", Kind.BAD),
    (1, {"verdict": "error", "rule": "step_not_applied"}, "Failed: error [float8]: 0 of 350", Kind.BAD),
    (1, {"verdict": "error", "rule": "import"}, "Failed: error [float8] (import): no module", Kind.UNUSABLE),
    (9, {"verdict": "void", "rule": "disturbed"}, "throttled", Kind.INCONCLUSIVE),
    (1, {"verdict": "incomparable", "rule": "changed"}, "another method", Kind.UNUSABLE),
    (1, {"verdict": "no_baseline", "rule": "no_baseline"}, "none", Kind.UNUSABLE),
    (1, {"verdict": "error", "rule": "exception"}, "Failed: [Errno 28] No space left on device", Kind.INCONCLUSIVE),
    (2, {}, "Failed: measuring ended with: [Errno 28] No space left on device", Kind.INCONCLUSIVE),
    (2, {}, "Failed: measuring ended with: GPU 0 is held by process 7", Kind.INCONCLUSIVE),
    (2, {}, "RuntimeError: a mistake of the suite", Kind.INCONCLUSIVE),
    (1, {}, "Failed: the level is not available here", Kind.UNUSABLE),
    (4, None, "", Kind.INCONCLUSIVE),
    (-9, None, "", Kind.INCONCLUSIVE),
]


@pytest.mark.parametrize(("status", "properties", "message", "kind"), VERDICTS)
def test_suites_verdict_decides(status: int, properties: dict[str, str] | None, message: str, kind: Kind) -> None:
    """Only `regressed` and a step that was not applied are bad; an error is where it is searched for."""
    case = None if properties is None else Case(message, properties)
    assert classify(status, case, "the log's last line", bad_is_error=False)[0] is kind
    is_error = bool(properties and properties.get("rule") == "import")
    assert classify(status, case, "", bad_is_error=True)[0] is (Kind.BAD if is_error else kind)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("ERROR: `python -m fluxfast levels` failed with exit status 1: ImportError: libtorch.so: not there", Kind.BAD),
        ("ERROR: `python -m fluxfast levels` failed with exit status 1: ModuleNotFoundError: torch", Kind.BAD),
        ("ERROR: `python -m fluxfast levels` failed with exit status 1: ImportError: libcuda.so.1", Kind.INCONCLUSIVE),
        ("ERROR: NVML does not start, so no GPU answers; see `nvidia-smi`", Kind.INCONCLUSIVE),
        ("ERROR: [Errno 28] No space left on device", Kind.INCONCLUSIVE),
    ],
)
def test_run_that_did_not_begin(said: str, kind: Kind) -> None:
    """Only a component that cannot be imported is the version's own; it is bad where errors are searched for."""
    assert classify(4, None, said, bad_is_error=True)[0] is kind
    usual = Kind.UNUSABLE if kind is Kind.BAD else kind
    assert classify(4, None, said, bad_is_error=False)[0] is usual


def test_why_is_the_verdicts_own_sentence() -> None:
    """Outcome and rule once, and neither pytest's prefix nor the worker's command."""
    message = "Failed: error [bf16] (oom): process 0 failed: no memory. Reproduce with `cd /x`. End of its log:\nx"
    _, why = classify(1, Case(message, {"verdict": "error", "rule": "oom"}), "", bad_is_error=False)
    assert why == "error (oom): process 0 failed: no memory."


def test_versions_between_two() -> None:
    """Sorted as versions, from good to bad, also backwards; a local part may be left out."""
    names = ["2.9.0", "2.10.0+cpu", "2.8.0", "2.11.0.dev20260901", "2.11.0"]
    assert versions.between(names, "2.8.0", "2.11.0")[1:3] == ["2.9.0", "2.10.0+cpu"]
    assert versions.between(names, "2.11.0", "2.10.0") == ["2.11.0", "2.11.0.dev20260901", "2.10.0+cpu"]
    assert versions.same("2.10.0", "2.10.0+cpu") and not versions.same("2.10.0+cpu", "2.10.0")


ASK = ("--axis", "torch", "--versions", "2.9.0,2.10.0,2.11.0")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--good", "2.9.0", "--bad", "2.9.0"), "nothing between them"),
        (
            ("--good", "2.9.0", "--bad", "2.10.1"),
            "2.10.1 does not exist among 3 versions; near it are 2.9.0, 2.10.0, 2.11.0",
        ),
        (("--good", "nine", "--bad", "2.10.0"), "'nine' is not a version"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--test", "test_speed[bf16]"), "expected NAME\\[LEVEL\\]"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--test", "test_latency[int4]"), "int4"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--test", "test_latency[quick]"), "unknown level 'quick'"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--workload", "huge"), "huge"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--processes", "0"), "at least 1"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--against", "none"), "only test_structure"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--cache", "there"), "--cache goes with --ray"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--state", __file__), r"--state .*: cannot be made \(File exists\)"),
        (("--good", "2.9.0", "--bad", "2.10.0", "--state", f"{__file__}/x"), r"cannot be made \(Not a directory\)"),
    ],
)
def test_bad_question_is_a_sentence(
    asked: Sequence[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Status 2 before anything is built, and no folder is made."""
    arguments = [*ASK, "--test", "test_latency[bf16]", "--state", str(tmp_path / "state"), *asked]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error), error
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("outcomes", "change", "is_refused"),
    [
        ([], {}, False),
        ([Outcome.REGRESSED, Outcome.VOID], {}, True),
        ([Outcome.REGRESSED, Outcome.VOID], {"workload": "schnell"}, False),
        ([Outcome.REGRESSED, Outcome.PASS], {}, False),
        ([Outcome.ERROR], {}, False),
        ([Outcome.ERROR], {"bad_is_error": True}, True),
    ],
)
def test_good_that_was_red_in_every_night(
    tmp_path: Path, outcomes: Sequence[Outcome], change: dict[str, object], is_refused: bool
) -> None:
    """What the history knows is said before anything is built; an error is no vote unless it is asked for."""
    asked = question("test_latency[float8]", versions=["2.13.0", "2.14.0"], **change)
    history = tmp_path / "history.db"
    later = ENVIRONMENT.model_copy(update={"torch": "2.14.0"}).model_dump(mode="json")
    red = level_night("float8", 1.3, judged=judged("float8", Outcome.REGRESSED), environment=later)
    own = [night(i, [level_night("float8", 1.3, judged=judged("float8", said))]) for i, said in enumerate(outcomes)]
    append(history, [*own, night(9, [red])])
    with pytest.raises(VersionError, match=r"2.13.0 is bad already: .* in 1 of") if is_refused else nullcontext():
        require_good(history, asked)


def test_history_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default one says nothing, as before the first night; one that was named is misspelt."""
    asked, history = question("test_latency[float8]", versions=["2.13.0", "2.14.0"]), tmp_path / "histroy.db"
    with pytest.raises(HistoryError, match=r"histroy.db: there is no history"):
        require_good(history, asked)
    monkeypatch.setattr(known, "DEFAULT", history)
    require_good(history, asked)


def test_known_bad_good_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with the sentence and status 2."""
    history = tmp_path / "nights.db"
    append(history, [night(0, [level_night("bf16", 2.0, judged=judged("bf16", Outcome.REGRESSED))])])
    arguments = ["--axis", "torch", "--versions", "2.13.0,2.14.0", "--good", "2.13.0", "--bad", "2.14.0"]
    arguments += [
        "--test",
        "test_latency[bf16]",
        "--state",
        str(tmp_path / "s"),
        "--history",
        str(tmp_path / "nights.db"),
    ]
    assert cli.main(arguments) == 2
    assert "error: --good 2.13.0 is bad already" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_index_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip said, and that versions can be given by hand."""
    ended = subprocess.CompletedProcess([], 1, "", "WARNING: experimental\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(versions.VersionError, match=r"ERROR: No matching distribution.*--versions"):
        versions.published("torch", index_url=None, pre=True)


PROJECT = {
    "name": "fluxfast-perf",
    "dependencies": ["torch>=2.11", "numpy"],
    "optional-dependencies": {
        "perf": ["fluxfast_perf[report]", "pytest-benchmark[histogram]>=5.3"],
        "report": ["jinja2>=3.1", "fluxfast-perf[perf]"],
        "gpu": ["fa3-fwd>=0.0.3", "quack-kernels[cu13]>=0.6.5"],
    },
}


def test_everything_but_the_component_is_pinned() -> None:
    """What is not installed here is not wanted there, and of this project, which is on no index, what it asks for."""
    here = {
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "pytest-benchmark": "5.3.1",
        "jinja2": "3.1.6",
        "fluxfast-perf": "0.1.0",
    }
    pinned = ["numpy==2.4.6", "pytest-benchmark[histogram]==5.3.1", "jinja2==3.1.6"]
    assert pinned_requirements("torch", requirements(PROJECT), here.get) == pinned


def test_this_project_asks_for_packages_of_an_index(tmp_path: Path) -> None:
    """Every extra of its own is resolved, and the component keeps the extras that it is asked for with."""
    recipe = recipe_here("quack-kernels", index_url=None, over_base=False)
    names = {Requirement(text).name for text in recipe.rest}
    assert {"torch", "pytest", "jinja2"} <= names and not {"fluxfast-perf", "quack-kernels"} & names
    (install,) = install_commands(recipe, "0.6.6", Path("p"), tmp_path / "c")
    assert install[-1] == "quack-kernels[cu13]==0.6.6"
    with pytest.raises(ValueError, match="leave --base-env away"):
        recipe_here("nvidia-cutlass-dsl", index_url=None, over_base=True)


def test_triton_goes_over_what_torch_brought() -> None:
    """torch pins one triton, so another one is installed last and without dependencies."""
    recipe = Recipe(component="triton", rest=["torch==2.13.0"])
    first, second = install_commands(recipe, "3.8.0", Path("p"), Path("c"))
    assert first[-1] == "torch==2.13.0" and second[-2:] == ["--no-deps", "triton==3.8.0"]


def test_environment_over_the_base(tmp_path: Path) -> None:
    """The component comes from the environment, everything else from the base; a whole one is not made twice."""
    base, folder = tmp_path / "base", tmp_path / "environments" / "9.9"
    for name, version in (("torch", "1.0"), ("numpy", "2.0")):
        distribution(base, name, version)
    ran: list[Sequence[str]] = []

    def run(command: Sequence[str], log: Path) -> int:
        ran.append(command)
        if "venv" in command:
            return subprocess.run(command, check=False).returncode
        distribution(next(folder.glob("lib/python*/site-packages")), "torch", "9.9")
        return 0

    recipe = Recipe(component="torch", base=[str(base)])
    python = build(recipe, "9.9", folder, run)
    code = "import importlib.metadata as m, json; print(json.dumps([m.version('torch'), m.version('numpy')]))"
    assert json.loads(subprocess.check_output([python, "-c", code])) == ["9.9", "2.0"]
    assert build(recipe, "9.9", folder, run) == python
    assert len(ran) == 2 and "--no-deps" in ran[1]


def distribution(folder: Path, name: str, version: str) -> None:
    """The metadata of an installed package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_version_that_cannot_be_installed(tmp_path: Path) -> None:
    """The installer's own error, where its log is, and no environment that a later run would take for whole."""
    is_full = False

    def run(command: Sequence[str], log: Path) -> int:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        (tmp_path / "9.9").mkdir(exist_ok=True)
        log.write_text("Collecting\nERROR: No matching distribution found for torch==9.9\nhint\n")
        return int("venv" not in command)

    with pytest.raises(BuildError, match=r"status 1.: ERROR: No matching distribution found for torch==9.9 .log: "):
        build(RECIPE, "9.9", tmp_path / "9.9", run)
    assert not (tmp_path / "9.9" / READY).exists()
    is_full = True
    with pytest.raises(BuildError, match="No space left"):
        build(RECIPE, "9.9", tmp_path / "9.9", run)
