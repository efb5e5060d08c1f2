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
    """A driver or another build of FlashAttention-3 moves numbers too; what a baseline has never heard of does not."""
    red = Verdict(outcome=Outcome.REGRESSED, level="float8", rule="interval", message="")
    with_quack = moved(quack="0.6.5", fa3="fa3-fwd 0.0.3")
    now = moved(quack="0.6.6", fa3="flash-attn-3 3.0.0", driver="600.1", torch="2.14.0", triton="3.8.0")
    assert unsearched(red, with_quack, now) == (
        "Not as when the baseline was recorded, and searched by no command: fa3 fa3-fwd 0.0.3 -> flash-attn-3 3.0.0; "
        "driver None -> 600.1"
    )
    assert unsearched(red, moved(fa3="fa3-fwd 0.0.3"), with_quack) is None
    assert unsearched(red, ENVIRONMENT, moved(torch="2.14.0")) is None
    assert str(unsearched(red, ENVIRONMENT, moved(triton="3.9.0"))).endswith(": triton None -> 3.9.0")
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


def test_libraries_of_kernels_are_searched_by_the_names_of_their_packages() -> None:
    """An environment calls them otherwise, and says which package FlashAttention-3 is from."""
    was = moved(quack="0.6.5", cutlass_dsl="4.8.1", fa3="fa3-fwd 0.0.3")
    now = moved(quack="0.6.6", cutlass_dsl="4.9.0", fa3="fa3-fwd 0.0.4")
    asked = [command.split()[4:9] for command in commands(was, now)]
    assert asked == [
        ["--axis", "quack-kernels", "--good", "0.6.5", "--bad"],
        ["--axis", "nvidia-cutlass-dsl", "--good", "4.8.1", "--bad"],
        ["--axis", "fa3-fwd", "--good", "0.0.3", "--bad"],
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
