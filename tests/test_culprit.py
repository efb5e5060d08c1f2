"""The command that a red test prints."""

from __future__ import annotations

from baseline_samples import ENVIRONMENT

from perf_tests.harness.culprit import bisect_commands, unsearched, versions_of
from perf_tests.harness.schema import Environment, Outcome, Verdict

TEST = "test_latency[float8]"


def commands(
    was: Environment | None, now: Environment | None, outcome: Outcome = Outcome.REGRESSED, rule: str = "interval"
) -> list[str]:
    verdict = Verdict(outcome=outcome, level="float8", rule=rule, message="")
    return bisect_commands(TEST, "tiny", verdict, versions_of(was), versions_of(now))


def moved(**versions: str) -> Environment:
    return ENVIRONMENT.model_copy(update=versions)


def test_nothing_where_nothing_moved_or_nothing_is_to_be_searched() -> None:
    """The same packages, no environment, or a verdict that is about the machine."""
    assert commands(ENVIRONMENT, moved(driver="580", python="3.14.0")) == []
    assert commands(None, ENVIRONMENT) == commands(ENVIRONMENT, None) == []
    assert commands(ENVIRONMENT, moved(torch="2.14.0"), Outcome.VOID) == []


def test_what_no_command_searches_is_named() -> None:
    """A driver or a library of kernels moves numbers too; what an older baseline has never heard of does not count."""
    red = Verdict(outcome=Outcome.REGRESSED, level="float8", rule="interval", message="")
    with_quack = moved(quack="0.6.5")
    now = moved(quack="0.6.6", driver="600.1", torch="2.14.0")
    assert unsearched(red, with_quack, now) == (
        "Not as when the baseline was recorded, and searched by no command: driver None -> 600.1; quack 0.6.5 -> 0.6.6"
    )
    assert unsearched(red, ENVIRONMENT, with_quack) is None
    assert unsearched(red, ENVIRONMENT, moved(torch="2.14.0")) is None
    assert unsearched(red, None, now) is unsearched(red, now, None) is None
    assert unsearched(red.model_copy(update={"outcome": Outcome.VOID}), ENVIRONMENT, now) is None


def test_one_command_a_package_that_moved() -> None:
    """Quoted for a shell; triton goes with torch, and nightlies need their index."""
    both = commands(moved(triton="3.6.0"), moved(torch="2.14.0.dev20260901+cu130", triton="3.7.0", diffusers="0.43.0"))
    assert both == [
        "python -m perf_tests bisect --axis torch --good 2.13.0 --bad 2.14.0.dev20260901+cu130 "
        "--test 'test_latency[float8]' --workload tiny --pre --index-url \"$NIGHTLY_INDEX_URL\"",
        "python -m perf_tests bisect --axis diffusers --good 0.42.1 --bad 0.43.0 "
        "--test 'test_latency[float8]' --workload tiny",
    ]


def test_an_error_is_searched_as_one() -> None:
    """A step that was not applied is bad by itself."""
    (error,) = commands(ENVIRONMENT, moved(torchao="0.19.0"), Outcome.ERROR, "oom")
    (count,) = commands(ENVIRONMENT, moved(torchao="0.19.0"), Outcome.ERROR, "step_not_applied")
    assert error == f"{count} --bad-is error"


def test_counts_need_no_baseline() -> None:
    """Unless what is red is that other facts are counted than in the baseline."""
    for rule, is_without in (("count", True), ("facts", False)):
        verdict = Verdict(outcome=Outcome.REGRESSED, level="float8", rule=rule, message="")
        was, now = (versions_of(environment) for environment in (ENVIRONMENT, moved(torchao="0.19.0")))
        (command,) = bisect_commands("test_structure[float8]", "tiny", verdict, was, now)
        assert command.endswith("--against none") is is_without
