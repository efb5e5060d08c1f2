"""Which levels a recording is of: none that the baseline holds is dropped, and what cannot work is said at once."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from suite_samples import LEVELS, SPEED_S, UNAVAILABLE, Ran, put, run_suite, sample, write_run

from fluxfast.levels import LADDER
from fluxfast.workloads import TINY
from perf_tests.harness.obstacles import record_command
from perf_tests.harness.record import store_run
from perf_tests.harness.recordable import refuse_other_measurement
from perf_tests.harness.recording import stock_json
from perf_tests.harness.session import Session
from perf_tests.harness.store import BaselineError, find_baseline, read_baseline, write_baseline
from perf_tests.harness.stored_run import read_facts

GPU, CPU = "h200-700w", "cpu"
BESIDE, OTHER = "flux_fast", "float8_rowwise"
HELD = ("bf16", "compile", "channels_last", "aoti", BESIDE)
"""As the committed H100 baseline: not the whole ladder, and more than it."""
START = "pytest perf_tests --workload tiny"
COMMAND = re.compile(r"`(pytest perf_tests [^`]*)`")


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up machine runs what is beside the ladder too."""
    monkeypatch.setitem(SPEED_S, BESIDE, 0.11)
    monkeypatch.setitem(SPEED_S, OTHER, 0.1)
    monkeypatch.setattr("suite_samples.LEVELS", (*LEVELS, BESIDE, OTHER))


def record(tmp: Path, levels: Sequence[str], slug: str = GPU) -> None:
    """A baseline of `levels`."""
    ran = run_suite(
        tmp, "--replay", write_run(tmp / f"recorded-{slug}", 5, (*LEVELS, BESIDE), slug=slug), "--record-baseline"
    )
    assert ran.status == 0, ran.text
    baseline = read_baseline(newest(tmp, slug))
    part = baseline.model_copy(update={"levels": {level: baseline.levels[level] for level in levels}})
    write_baseline(tmp / "baselines" / slug, "tiny", part, stock_json(part), {})
    (tmp / "baselines" / slug / "0001_tiny.json").unlink()


def newest(tmp: Path, slug: str = GPU) -> Path:
    path = find_baseline(tmp / "baselines" / slug, "tiny")
    assert path is not None
    return path


def held(tmp: Path, slug: str = GPU) -> list[str]:
    return list(read_baseline(newest(tmp, slug)).levels)


def advised(text: str) -> list[str]:
    """Options of the one command that a message names."""
    (command,) = set(COMMAND.findall(text))
    return shlex.split(command)[2:]


def refused(ran: Ran, *said: str) -> list[str]:
    """What one sentence before any test advises."""
    assert ran.status == 4 and not ran.outcomes, ran.text
    assert all(part in ran.text for part in said), ran.text
    assert ran.text.count("ERROR") == 1 and "Traceback" not in ran.text
    return advised(ran.text)


def test_an_update_measures_what_the_baseline_holds(tmp_path: Path) -> None:
    """Neither the rest of the ladder nor only the ladder, without a word about it, and with a reason too."""
    record(tmp_path, [level for level in LEVELS if level not in ("fp32", "aoti")])
    own = held(tmp_path)
    machine = ("-p", "fake_machine", f"--cards={GPU}", f"--cache={tmp_path / 'cache'}")
    ran = run_suite(tmp_path, *machine, "--slow=compile", "--update-baseline", "--reason=new kernel")
    assert ran.status == 0, ran.text
    measured = {path.parent.name for path in (tmp_path / "results").glob("*/*/0")}
    assert measured == {"fp32", *own}, "step errors are against fp32"
    assert newest(tmp_path).name == "0003_tiny.json" and held(tmp_path) == own
    assert [step.level for step in read_baseline(newest(tmp_path)).steps] == ["compile"]


def test_a_replayed_update_keeps_what_is_beside_the_ladder(tmp_path: Path) -> None:
    """Of a run that holds more than the baseline, that part is taken; the baseline keeps its levels."""
    record(tmp_path, HELD)
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE), slug=GPU)
    for process in range(5):
        put(run, sample(BESIDE, process, 0.8))
    ran = run_suite(tmp_path, "--replay", run, "--update-baseline")
    assert ran.status == 0, ran.text
    assert f"{BESIDE}: " in ran.text and newest(tmp_path).name == "0003_tiny.json"
    assert held(tmp_path) == list(HELD)


@pytest.mark.parametrize("options", [(), ("--levels=ladder",)], ids=["stored", "named"])
@pytest.mark.parametrize("slug", [GPU, CPU])
def test_a_recording_drops_no_level(tmp_path: Path, slug: str, options: tuple[str, ...]) -> None:
    """A run of the ladder alone is refused over a baseline with more, and the command that is named keeps that."""
    record(tmp_path, HELD, slug)
    run = write_run(tmp_path / "run", 5, slug=slug)
    asked = refused(run_suite(tmp_path, "--replay", run, "--record-baseline", *options), f"is without {BESIDE}: ")
    assert asked[-1] == "--record-baseline" and "--replay" not in asked
    whole = write_run(tmp_path / "whole", 5, (*LEVELS, BESIDE), slug=slug)
    ran = run_suite(tmp_path, "--replay", whole, "--record-baseline")
    assert ran.status == 0, ran.text
    assert held(tmp_path, slug) == [*LEVELS, BESIDE]


def test_the_command_names_what_is_beside_the_ladder() -> None:
    """Only where it has to: without --levels the newest baseline's are measured anyway."""
    assert record_command(["aoti"], HELD, START) == f"{START} --record-baseline"
    assert record_command([BESIDE], HELD, START) == f"{START} --record-baseline"
    named = f"--levels ladder,{BESIDE},{OTHER} --record-baseline"
    assert record_command([OTHER], HELD, START) == f"{START} {named}"
    assert record_command([OTHER, BESIDE], (), "pytest x") == f"pytest x {named}"


@pytest.mark.parametrize("slug", [GPU, CPU])
@pytest.mark.parametrize("reason", [(), ("--reason", "it's new")], ids=["", "reason"])
def test_an_update_of_a_part_is_refused(tmp_path: Path, slug: str, reason: tuple[str, ...]) -> None:
    """With the command for all of it, which keeps the reason and replays the run if that has all."""
    record(tmp_path, (*LEVELS, BESIDE), slug)
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE), slug=slug)
    ran = run_suite(tmp_path, "--replay", run, f"--levels={','.join(LEVELS)}", "--update-baseline", *reason)
    asked = refused(ran, f"every level that {newest(tmp_path, slug)} holds, and this run is without {BESIDE}: ")
    assert asked == ["--replay", str(run), "--baselines", str(tmp_path / "baselines"), "--update-baseline", *reason]
    ran = run_suite(tmp_path, *asked)
    assert ran.status == 0, ran.text


def test_what_is_new_and_what_is_held_are_told_apart(tmp_path: Path) -> None:
    """On a GPU the new level is added by itself, on a CPU recorded with all others; both commands work."""
    for slug in (GPU, CPU):
        record(tmp_path, (*LEVELS, BESIDE), slug)
        run = write_run(tmp_path / f"run-{slug}", 5, (*LEVELS, BESIDE, OTHER), slug=slug)
        ran = run_suite(tmp_path, "--replay", run, f"--levels=ladder,{OTHER}", "--update-baseline")
        asked = refused(ran, OTHER, str(newest(tmp_path, slug)))
        named = OTHER if slug == GPU else f"ladder,{BESIDE},{OTHER}"
        assert asked[asked.index("--levels") + 1] == named
        ran = run_suite(tmp_path, *asked)
        assert ran.status == 0, ran.text
        assert set(held(tmp_path, slug)) == {*LEVELS, BESIDE, OTHER}


@pytest.mark.parametrize("is_published", [False, True])
def test_nothing_to_update(tmp_path: Path, is_published: bool) -> None:
    """No baseline, or someone else's numbers: a new one is recorded, with what was asked for."""
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE), slug=GPU)
    if is_published:
        record(tmp_path, LEVELS)
        old = read_baseline(newest(tmp_path)).model_copy(update={"source": "published", "source_note": "a paper"})
        write_baseline(tmp_path / "baselines" / GPU, "tiny.published", old, stock_json(old), {})
    said = "holds published numbers" if is_published else "there is no baseline of 'tiny'"
    for options in ((), (f"--levels={BESIDE}",)):
        asked = refused(run_suite(tmp_path, "--replay", run, "--update-baseline", *options), said)
    assert f"ladder,{BESIDE}" in asked
    ran = run_suite(tmp_path, *asked)
    assert ran.status == 0 and held(tmp_path) == [*LEVELS, BESIDE], ran.text


def test_a_recording_says_what_is_gone(tmp_path: Path) -> None:
    """Named levels leave out what the machine cannot run any more, and a line tells; an update on a CPU cannot."""
    record(tmp_path, LEVELS, CPU)
    left = [level for level in LEVELS if level != "float8"]
    lost = {"float8": "float8: needs torchao", **UNAVAILABLE}
    run = write_run(tmp_path / "run", 5, left, slug=CPU, unavailable=lost)
    chosen = ("--replay", run, "--levels=ladder")
    ran = run_suite(tmp_path, *chosen, "--update-baseline")
    assert ran.status == 4 and "cannot run there now: float8: needs torchao" in ran.text, ran.text
    ran = run_suite(tmp_path, *chosen, "--record-baseline")
    assert ran.status == 0 and "float8: not in it any more: float8: needs torchao" in ran.text, ran.text
    assert held(tmp_path, CPU) == left


@pytest.mark.parametrize("slug", [GPU, CPU])
def test_a_level_that_no_checkout_has_any_more(tmp_path: Path, slug: str) -> None:
    """An update keeps it; on a CPU, where times of two runs do not mix, only a new baseline goes on, and says so."""
    record(tmp_path, LEVELS, slug)
    old = read_baseline(newest(tmp_path, slug))
    more = old.model_copy(update={"levels": {**old.levels, "gone": old.levels["compile"]}})
    write_baseline(tmp_path / "baselines" / slug, "tiny", more, stock_json(more), {})
    run = write_run(tmp_path / "run", 5, slug=slug)
    for process in range(5):
        put(run, sample("aoti", process, 0.7))
    ran = run_suite(tmp_path, "--replay", run, "--update-baseline")
    if slug == GPU:
        assert ran.status == 0 and "gone: kept as it was, since it was not measured" in ran.text, ran.text
        assert held(tmp_path, slug) == [*LEVELS, "gone"]
        return
    ran = run_suite(tmp_path, *refused(ran, "holds gone, which this checkout does not have"))
    assert ran.status == 0 and "gone: not in it any more: " in ran.text, ran.text
    assert held(tmp_path, slug) == list(LEVELS)


@pytest.mark.parametrize("slug", [GPU, CPU])
def test_a_missing_level_is_added_by_the_command_of_its_message(tmp_path: Path, slug: str) -> None:
    """By itself on a GPU, with all others on a CPU; nothing that the baseline holds is lost, and it is green then."""
    record(tmp_path, (*LEVELS, BESIDE), slug)
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE, OTHER), slug=slug)
    judged = ("--replay", run, "--benchmark-compare")
    ran = run_suite(tmp_path, *judged)
    assert ran.of("failure") == {name for name in ran.outcomes if f"[{OTHER}]" in name}
    asked = advised(" ".join(ran.messages.values()))
    named = f"{OTHER} --update-baseline" if slug == GPU else f"ladder,{BESIDE},{OTHER} --record-baseline"
    assert asked == ["--workload", "tiny", "--levels", *named.split()]
    ran = run_suite(tmp_path, "--replay", run, *asked)
    assert ran.status == 0, ran.text
    assert set(held(tmp_path, slug)) == {*LEVELS, BESIDE, OTHER}
    assert run_suite(tmp_path, *judged).status == 0


def test_a_machine_without_a_baseline_gets_one_with_the_level(tmp_path: Path) -> None:
    """The ladder belongs to it."""
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE), slug=GPU)
    ran = run_suite(tmp_path, "--replay", run, "--benchmark-compare", paths=("perf_tests/test_memory.py",))
    asked = {level: advised(ran.messages[f"test_memory[{level}]"]) for level in (BESIDE, "aoti")}
    assert asked[BESIDE] == ["--workload", "tiny", "--levels", f"ladder,{BESIDE}", "--record-baseline"]
    assert asked["aoti"] == ["--workload", "tiny", "--record-baseline"]


def begun(tmp: Path, run: Path, levels: Sequence[str], slug: str = GPU) -> Session:
    """A run that has read the newest baseline and not yet written."""
    session = Session(
        folder=run, workload=TINY, levels=levels, unavailable=UNAVAILABLE, processes=5, slug=slug,
        baseline=read_baseline(newest(tmp, slug)), baseline_folder=tmp / "baselines" / slug, is_compared=False,
        measure=None,
    )  # fmt: skip
    assert session.results
    return session


def test_two_additions_side_by_side_lose_none(tmp_path: Path) -> None:
    """The second names the newer file and the command that repeats it over that; the command works."""
    record(tmp_path, LEVELS)
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE, OTHER), slug=GPU)
    first, second = (begun(tmp_path, run, [level]) for level in (BESIDE, OTHER))
    store_run(first, update=True, reason=None, added=[BESIDE])
    before = newest(tmp_path)
    with pytest.raises(BaselineError) as raised:
        store_run(second, update=True, reason=None, added=[OTHER])
    assert str(before) in str(raised.value) and newest(tmp_path) == before
    ran = run_suite(tmp_path, *advised(str(raised.value)))
    assert ran.status == 0, ran.text
    assert set(held(tmp_path)) == {*LEVELS, BESIDE, OTHER}


def test_an_addition_of_which_a_part_came_in_adds_the_rest(tmp_path: Path) -> None:
    """By the command that it names; one of which all came in says so."""
    record(tmp_path, LEVELS)
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE, OTHER), slug=GPU)
    added = [BESIDE, OTHER]
    first, both, again = (begun(tmp_path, run, levels) for levels in ([BESIDE], added, added))
    store_run(first, update=True, reason=None, added=[BESIDE])
    with pytest.raises(BaselineError) as raised:
        store_run(both, update=True, reason=None, added=added)
    ran = run_suite(tmp_path, *advised(str(raised.value)))
    assert ran.status == 0, ran.text
    assert set(held(tmp_path)) == {*LEVELS, BESIDE, OTHER}
    with pytest.raises(BaselineError, match=f"it holds {BESIDE}, {OTHER} by now; to measure what it holds again"):
        store_run(again, update=True, reason=None, added=added)


def test_a_part_over_a_lost_level_names_what_is_lost(tmp_path: Path) -> None:
    """A command for the whole would be refused for it."""
    record(tmp_path, LEVELS)
    lost = {"float8": "float8: needs torchao", **UNAVAILABLE}
    run = write_run(tmp_path / "run", 5, ("fp32", "bf16", "compile"), slug=GPU, unavailable=lost)
    for option in ("--record-baseline", "--update-baseline"):
        ran = run_suite(tmp_path, "--replay", run, "--levels=bf16,compile", option)
        assert ran.status == 4 and "cannot run there now: float8: needs torchao" in ran.text, ran.text


def test_another_measurement_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """Its environment, where one file says one for all levels; its workload, always."""
    record(tmp_path, LEVELS)
    path = newest(tmp_path)
    baseline = read_baseline(path)
    now = baseline.environment
    assert now is not None
    facts = read_facts(write_run(tmp_path / "run", 5, LEVELS, slug=GPU))
    refuse_other_measurement(path, baseline, facts, now)
    with pytest.raises(ValueError, match=r"\(torch .* -> 9\.9\), and a file says one for all levels; undo that, or"):
        refuse_other_measurement(path, baseline, facts, now.model_copy(update={"torch": "9.9"}))
    with pytest.raises(ValueError, match="workload 'tiny' has digest 0000, and had "):
        refuse_other_measurement(path, baseline, facts.model_copy(update={"workload_digest": "0000"}), None)
    machine = ("-p", "fake_machine", f"--cards={GPU}", f"--cache={tmp_path / 'cache'}")
    ran = run_suite(tmp_path, *machine, "--torch=9.9", f"--levels={BESIDE}", "--update-baseline")
    assert ran.status == 4 and "-> 9.9), and a file says one" in ran.text, ran.text
    assert not (tmp_path / "results").exists()


def test_a_recording_beside_an_update_loses_nothing(tmp_path: Path) -> None:
    """A new baseline of this run would lack the level that came in, and so would an update: both are measured again."""
    record(tmp_path, LEVELS)
    run = write_run(tmp_path / "run", 5, (*LEVELS, BESIDE), slug=GPU)
    for process in range(5):
        put(run, sample("compile", process, 0.7))
    record_it, update = begun(tmp_path, run, LEVELS), begun(tmp_path, run, LEVELS)
    store_run(begun(tmp_path, run, [BESIDE]), update=True, reason=None, added=[BESIDE])
    before = newest(tmp_path)
    for session, options in (
        (record_it, {"update": False, "reason": None}),
        (update, {"update": True, "reason": "it's new"}),
    ):
        with pytest.raises(BaselineError, match=f"it holds {BESIDE}, so measure again with") as raised:
            store_run(session, **options)
        asked = advised(str(raised.value))
        assert "--replay" not in asked and ("it's new" in asked) == options["update"]
        assert newest(tmp_path) == before


def test_two_updates_side_by_side_lose_none(tmp_path: Path) -> None:
    """The second is judged by what the first wrote, from the results that it has."""
    record(tmp_path, LEVELS)
    runs = {level: write_run(tmp_path / level, 5, slug=GPU) for level in ("aoti", "compile")}
    for level, run in runs.items():
        for process in range(5):
            put(run, sample("aoti", process, 0.7))
            put(run, sample(level, process, 0.7))
    sessions = {level: begun(tmp_path, run, LEVELS) for level, run in runs.items()}
    store_run(sessions["aoti"], update=True, reason=None)
    with pytest.raises(BaselineError) as raised:
        store_run(sessions["compile"], update=True, reason=None)
    ran = run_suite(tmp_path, *advised(str(raised.value)))
    assert ran.status == 0, ran.text
    assert [step.level for step in read_baseline(newest(tmp_path)).steps] == ["aoti", "compile"]


def test_ladder_is_whole() -> None:
    """What this file takes for the ladder is it, but for the one that the made-up machine lacks."""
    assert {level.id for level in LADDER} == {*LEVELS, *UNAVAILABLE}
