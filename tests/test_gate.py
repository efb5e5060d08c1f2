"""The gate, one rule a test. Runs alone on a copy of the tree: test_gate_mutations.py mutates that copy."""

from __future__ import annotations

import dataclasses
import math

import gate_samples as samples
import pytest
from gate_samples import CPU, GPU, IDS, SPEED_S, baseline, confirmation, run, with_level
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_tests.harness import gate, noise
from perf_tests.harness.policy import direction, policy_for, roundoff_factor
from perf_tests.harness.schema import Counters, Outcome, ProcessSamples, Proof, Verdict


def latency(level, tonight, base=None, policy=GPU, again=None) -> Verdict:
    return gate.judge_latency(level, tonight, base or baseline(policy.slug), policy, again)


def reds(slower, policy=GPU, base=None) -> dict[str, Verdict]:
    """The levels that are red after confirmation."""
    tonight, again = run(slower), confirmation(slower)
    verdicts = {id: latency(id, tonight, base, policy, again) for id in IDS}
    return {id: verdict for id, verdict in verdicts.items() if not verdict.ok}


# Latency: the decision


def test_a_quiet_night_passes_at_every_level():
    """No level is red or improved when nothing changed."""
    for policy in (GPU, CPU):
        assert {latency(id, run(), policy=policy).outcome for id in IDS} == {Outcome.PASS}


def test_one_slowed_level_is_red_in_absolute_and_ladder_terms_and_nowhere_else():
    """Neither the parent nor the child of a slowed level is blamed."""
    found = reds({"fused_qkv": 0.04})
    assert found.keys() == {"fused_qkv"}
    verdict = found["fused_qkv"]
    assert (verdict.outcome, verdict.rule) == (Outcome.REGRESSED, "interval")
    assert "Fired: interval and ladder" in verdict.message
    assert "stopped paying is fused_projections (compile -> fused_qkv): it was worth x1.250" in verdict.message


def test_a_level_that_inherits_a_slow_parent_names_the_parent():
    """Slow from `compile` on: every level is red, and each names the one step that changed."""
    slower = dict.fromkeys(IDS[2:], 0.04)
    found = reds(slower)
    assert found.keys() == slower.keys()
    assert "'aoti' inherits this" in found["aoti"].message and "(bf16 -> compile)" in found["aoti"].message
    assert "inherits" not in found["compile"].message


def test_a_slower_machine_is_not_blamed_on_an_optimisation():
    """Everything moved alike: red, but the message points at the machine."""
    found = reds(dict.fromkeys(IDS, 0.04))
    assert found.keys() == set(IDS)
    assert "No step of the ladder changed, but the other levels moved by +4.08 %" in found["aoti"].message


def test_a_step_that_pays_less_on_a_faster_machine_is_red_by_the_ladder():
    """Every level got 4 % faster but one: its seconds are unchanged, its optimisation pays less."""
    found = reds(dict.fromkeys(set(IDS) - {"float8"}, -0.04))
    assert found.keys() == {"float8"}
    assert found["float8"].rule == "ladder"


def test_a_parent_that_alone_got_faster_makes_no_child_red():
    """The step over it shrinks, but nothing is slower than it was."""
    assert not reds({"compile": -0.04})
    assert latency("compile", run({"compile": -0.04})).outcome is Outcome.IMPROVED


def test_a_level_whose_parent_cannot_run_is_compared_with_the_nearest_below():
    """Without FA3 float8 stands over channels_last, in the ladder ratio and in the message."""
    levels = tuple(id for id in IDS if id != "fa3_fp8")
    policy = policy_for("h200-700w", {"fa3_fp8"})
    known = baseline(logs=dict.fromkeys(levels, samples.BASE))
    slower = {"float8": 0.04}
    again = confirmation(slower, levels)
    verdict = gate.judge_latency("float8", run(slower, levels=levels), known, policy, again)
    assert "Fired: interval and ladder" in verdict.message
    assert "stopped paying is quantization (channels_last -> float8)" in verdict.message


def test_the_ladder_alone_does_not_fire_without_the_rest_of_the_ladder():
    """With only the parent to look at, a faster parent and a faster machine cannot be told apart."""
    two = ("channels_last", "fa3_fp8")
    tonight = run({"channels_last": -0.04}, levels=two)
    assert latency("fa3_fp8", tonight).outcome is Outcome.PASS


SLOWER_LOOP = {"float8": 0.025}


def of_loops(level, slower, base=None, again=None, policy=GPU):
    """The verdict on restless calls whose loops are slower by so much; confirmed by `again`, if given."""
    tonight = samples.with_loops(run(), slower)
    confirming = None if again is None else samples.with_loops(confirmation(), again)
    return gate.judge_latency(level, tonight, base or samples.baseline_with_loops(), policy, confirming)


def test_a_slower_loop_is_found_in_a_restless_call():
    """Text encoding hides 2 % of a call; the loop alone shows them, and is confirmed like the call."""
    unseen = of_loops("float8", SLOWER_LOOP, samples.baseline_with_loops(levels=()))
    assert unseen.ok and "loop" not in unseen.message and "loop_ratio" not in unseen.numbers
    first = of_loops("float8", SLOWER_LOOP)
    assert (first.outcome, first.rule) == (Outcome.REGRESSED, "unconfirmed")
    found = of_loops("float8", SLOWER_LOOP, again=SLOWER_LOOP)
    assert (found.outcome, found.rule) == (Outcome.REGRESSED, "interval")
    assert found.message.startswith("The denoising loop of 'float8' took") and "'float8' took" in found.message
    assert "stopped paying is quantization" in found.message
    assert found.numbers["loop_ratio"] == pytest.approx(math.exp(0.025), rel=1e-3)
    assert found.numbers["ratio"] == found.numbers["loop_ratio"] > found.numbers["call_ratio"]
    assert found.numbers["call_smallest_visible"] > 2 * found.numbers["loop_smallest_visible"]
    cleared = of_loops("float8", SLOWER_LOOP, again={})
    assert (cleared.outcome, cleared.rule) == (Outcome.PASS, "confirmation")
    others = [of_loops(level, SLOWER_LOOP) for level in IDS if level != "float8"]
    assert all(verdict.rule == "interval" and verdict.outcome is Outcome.PASS for verdict in others)


def test_what_is_confirmed_decides_over_what_is_not():
    """Both parts look red; the call's ladder cannot be confirmed without the parent, the loop is."""
    everything = dict.fromkeys(set(IDS) - {"float8"}, -0.04)
    base = samples.baseline_with_loops()
    tonight = run(everything)
    for own in tonight["float8"]:
        own.measurement.stages_s["denoise"] = [SPEED_S["float8"] * samples.LOOP_SHARE * math.exp(0.03)] * 3
    base = base.model_copy(update={"levels": base.levels | {
        id: base.levels[id].model_copy(update={"processes": [
            process.model_copy(update={"samples_s": own.samples_s})
            for process, own in zip(base.levels[id].processes, baseline().levels[id].processes, strict=True)
        ]}) for id in IDS
    }})  # fmt: skip
    again = confirmation(levels=["float8"])
    for own in again["float8"]:
        own.measurement.stages_s["denoise"] = [SPEED_S["float8"] * samples.LOOP_SHARE * math.exp(0.03)] * 3
    verdict = gate.judge_latency("float8", tonight, base, GPU, again)
    assert verdict.rule == "interval" and verdict.message.startswith("The denoising loop")
    assert verdict.message.endswith("That looks red and is not confirmed.")


def test_a_faster_loop_makes_the_baseline_stale():
    """Also where the call as a whole does not show it."""
    verdict = of_loops("float8", {"float8": -0.025})
    assert verdict.outcome is Outcome.IMPROVED and verdict.message.startswith("The denoising loop")
    assert of_loops("float8", {"float8": -0.025}, samples.baseline_with_loops(levels=())).outcome is Outcome.PASS


def test_a_slower_rest_of_the_call_is_the_calls():
    """The loop clears nothing but itself."""
    slower = {"float8": 0.2}
    tonight = run(slower)
    for own in tonight["float8"]:
        own.measurement.stages_s["denoise"] = [SPEED_S["float8"] * samples.LOOP_SHARE] * 3
    verdict = gate.judge_latency("float8", tonight, samples.baseline_with_loops(), GPU)
    assert verdict.rule == "unconfirmed" and verdict.message.startswith("'float8' took")


def test_loops_have_no_ladder_of_their_own():
    """A loop that pays less on a faster machine is the call's to show, or two ladders would cry wolf."""
    faster = dict.fromkeys(set(IDS) - {"float8"}, -0.04)
    assert of_loops("float8", faster).outcome is Outcome.PASS


def test_loops_share_the_error_of_the_gate():
    """Two looks at half the error each; with one, all of it is the call's."""
    with_loops = of_loops("float8", {})
    alone = of_loops("float8", {}, samples.baseline_with_loops(levels=()))
    width = [math.log(verdict.numbers["high"] / verdict.numbers["low"]) for verdict in (with_loops, alone)]
    assert width[0] > 1.05 * width[1]


def test_loops_are_judged_where_seconds_are_compared():
    """Not on a CPU, where a ratio to bf16 is as restless as the rest, nor over what someone published."""
    policy = dataclasses.replace(CPU, slug="cpu")
    base = samples.baseline_with_loops(slug="cpu")
    assert "loop_ratio" not in of_loops("float8", SLOWER_LOOP, base, policy=policy).numbers
    published = samples.baseline_with_loops(source="published", source_note="a note")
    assert "loop_ratio" not in of_loops("float8", SLOWER_LOOP, published).numbers


def test_loops_that_are_not_timed_in_every_round_are_none():
    """Nor are those that cannot be; the call is judged alone."""
    for stages in ({}, {"step_0": [0.1] * 3, "step_1": [0.1] * 2}, {"denoise": [0.1, 0.1, -0.3]}, {"denoise": [0.1]}):
        assert samples.measurement(1.0, stages_s=stages).loop_s == []
    assert (
        samples.measurement(1.0, stages_s={"step_0": [0.1] * 3, "step_1": [0.2] * 3}).loop_s == [pytest.approx(0.3)] * 3
    )


def test_a_parent_without_loops_costs_its_child_none():
    """As of a baseline to which a level was added later."""
    base = samples.baseline_with_loops(levels=[id for id in IDS if id != "fa3_fp8"])
    assert of_loops("float8", SLOWER_LOOP, base, again=SLOWER_LOOP).rule == "interval"
    assert "loop_ratio" not in of_loops("fa3_fp8", {}, base).numbers


def test_red_needs_a_confirmation():
    """Without one the verdict asks for it; with a disagreeing one it passes and says both; short ones are named."""
    slower = {"aoti": 0.04}
    first = latency("aoti", run(slower))
    assert (first.outcome, first.rule, first.ok) == (Outcome.REGRESSED, "unconfirmed", False)
    assert "in 14 fresh processes" in first.message
    disagreeing = latency("aoti", run(slower), again=confirmation())
    assert (disagreeing.outcome, disagreeing.rule) == (Outcome.PASS, "confirmation")
    assert "+4.08 %" in disagreeing.message and "+0.00 %" in disagreeing.message
    short = latency("aoti", run(slower), again=run(slower))
    assert short.outcome is Outcome.REGRESSED and "assume 14 processes" in short.message


def test_a_ladder_red_is_not_dismissed_by_a_confirmation_without_the_parent():
    """What cannot be confirmed stays unconfirmed, never a pass."""
    faster = dict.fromkeys(set(IDS) - {"float8"}, -0.04)
    verdict = latency("float8", run(faster), again=confirmation(levels=["float8"]))
    assert verdict.rule == "unconfirmed" and not verdict.ok


def test_a_broken_confirmation_is_an_error():
    """A worker that dies while confirming neither confirms nor clears."""
    again = confirmation({"aoti": 0.04})
    again["aoti"][3] = samples.failed("aoti", 3)
    assert latency("aoti", run({"aoti": 0.04}), again=again).outcome is Outcome.ERROR


def test_the_interval_has_to_be_beyond_the_limit_as_a_whole():
    """A mean beyond the limit with an interval across it passes; floor and history move the limit."""
    verdict = latency("aoti", run({"aoti": 0.009}))
    assert verdict.ok and verdict.numbers["ratio"] > 1 + verdict.numbers["limit"] > verdict.numbers["low"]
    wide = dataclasses.replace(GPU, floor=0.035, cap=0.035)
    assert latency("aoti", run({"aoti": 0.02})).rule == "unconfirmed"
    assert latency("aoti", run({"aoti": 0.02}), policy=wide).ok


def test_the_history_of_nights_widens_the_limit_up_to_the_cap():
    """A level that moves by a per cent when nothing changed is not red for 2 %; but no history excuses 6 %."""
    restless = with_level(baseline(), "aoti", nights=[0.01, -0.012, 0.008, -0.009, 0.011, -0.01])
    assert latency("aoti", run({"aoti": 0.025}), restless).ok
    assert latency("aoti", run({"aoti": 0.025})).rule == "unconfirmed"
    drifting = with_level(baseline(), "aoti", nights=[0.01 * night for night in range(10)])
    assert latency("aoti", run({"aoti": 0.06}), drifting).numbers["limit"] == pytest.approx(math.expm1(GPU.cap))
    assert latency("aoti", run({"aoti": 0.06}), drifting).rule == "unconfirmed"


def test_quiet_nights_do_not_widen_the_limit():
    """Nights that moved by no more than process noise leave the floor as the limit."""
    quiet = with_level(baseline(), "aoti", nights=[0.001, -0.001, 0.0015, -0.0005] * 5)
    assert latency("aoti", run(), quiet).numbers["limit"] == pytest.approx(math.expm1(GPU.floor))


def test_a_mode_that_the_baseline_has_seen_is_never_red():
    """All of tonight in the slow mode of a bimodal baseline passes, and so does a half-slow night over a fast one."""
    gap = math.log(1.13)
    bimodal = baseline(logs={"aoti": (0.0, 0.001, 0.002, gap, 0.001)})
    assert latency("aoti", run({"aoti": gap - 0.002}), bimodal).ok
    tonight = run()
    tonight["aoti"] = [samples.result("aoti", i, log) for i, log in enumerate((gap, gap, 0.001))]
    assert latency("aoti", tonight).ok


def test_a_level_of_few_baseline_processes_is_judged_with_a_wider_interval():
    """One baseline process still decides, less sharply, and says so."""
    few = with_level(baseline(), "aoti", processes=[ProcessSamples(samples_s=[SPEED_S["aoti"]])])
    narrow, wide = latency("aoti", run()), latency("aoti", run(), few)
    assert wide.numbers["high"] > narrow.numbers["high"] and "under 5 processes" in wide.message
    assert latency("aoti", run({"aoti": 0.05}), few, again=confirmation({"aoti": 0.05})).outcome is Outcome.REGRESSED


def test_the_spread_of_other_levels_widens_the_interval():
    """Five processes that look tight among noisy levels are not believed to be tight."""
    noisy = {id: tuple(10 * log for log in samples.BASE) for id in IDS if id != "aoti"}
    quiet, restless = latency("aoti", run()), latency("aoti", run(), baseline(logs=noisy))
    assert restless.numbers["high"] - restless.numbers["low"] > 2 * (quiet.numbers["high"] - quiet.numbers["low"])


def test_the_unit_of_decision_is_the_median_of_a_process():
    """One slow round in a process changes nothing, and the message tells the medians."""
    tonight = run()
    for slow in tonight["aoti"]:
        slow.measurement.samples_s[1] *= 10
    assert latency("aoti", tonight).ok
    assert f"took {SPEED_S['aoti']:.4g} s (3 process(es))" in latency("aoti", tonight).message


def test_an_improvement_is_loud_and_passes():
    """4 % faster: ok, and the message says that the baseline is stale."""
    verdict = latency("aoti", run({"aoti": -0.04}))
    assert (verdict.outcome, verdict.ok) == (Outcome.IMPROVED, True) and "--update-baseline" in verdict.message


@settings(max_examples=40, deadline=None)
@given(st.floats(-0.2, 0.2), st.floats(0, 0.1))
def test_more_slowing_never_makes_a_red_level_green(effect, more):
    """Redness is monotone in the effect."""

    def is_red(log_ratio: float) -> bool:
        return latency("aoti", run({"aoti": log_ratio}), again=confirmation({"aoti": log_ratio})).ok is False

    assert is_red(effect + more) >= is_red(effect)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_no_overlapping_processes_are_ever_red(base, tonight):
    """Whatever the distribution, a process as fast as the baseline's slowest keeps a level from being red."""
    low, high = min(base), max(base)
    overlapping = [*tonight, low + (high - low) / 2]
    night = run()
    night["aoti"] = [samples.result("aoti", i, log) for i, log in enumerate(overlapping)]
    verdict = latency("aoti", night, baseline(logs={"aoti": base}))
    assert "interval" not in verdict.message.partition("looks red (")[2].partition(")")[0]


# Latency: relative, published, smallest visible


def test_cpu_latency_is_a_ratio_to_bf16_of_the_same_run():
    """A machine half as fast passes; one slow level is red at that level only, bf16 itself against fp32."""
    assert not reds(dict.fromkeys(IDS, 0.7), CPU)
    assert reds({"compile": 0.3}, CPU).keys() == {"compile"}
    assert reds({"bf16": 0.3}, CPU).keys() == {"bf16"}
    assert "of bf16" in latency("aoti", run(), policy=CPU).message


def test_a_faster_divisor_is_named_and_no_optimisation_blamed():
    """bf16 alone got faster on the CPU: the other ratios rise, and the message says why."""
    found = reds({"bf16": -0.3}, CPU)
    assert found.keys() == set(IDS) - {"bf16"}
    assert "'bf16' itself got faster" in found["compile"].message and "stopped paying" not in found["compile"].message


def test_cpu_latency_without_its_divisor_is_incomparable():
    """Left out, failed or disturbed bf16: the level says why it has no ratio."""
    left_out = latency("aoti", run(levels=["fp32", "aoti"]), policy=CPU)
    assert (left_out.outcome, left_out.rule) == (Outcome.INCOMPARABLE, "divisor")
    assert "`pytest perf_tests --workload tiny --levels bf16,aoti`" in left_out.message
    never_in = latency("aoti", run(), baseline("cpu", levels=["fp32", "aoti"]), CPU)
    assert never_in.rule == "divisor" and "not in the baseline. Record one" in never_in.message
    tonight = run()
    tonight["bf16"][1] = samples.failed("bf16", 1)
    broken = latency("aoti", tonight, policy=CPU)
    assert broken.outcome is Outcome.ERROR and "out of memory" in broken.message


def test_a_published_number_bounds_from_above_only():
    """Faster and a little slower pass, clearly slower is red, and the message says what the number is."""
    published = baseline(logs=dict.fromkeys(IDS, (0.0,)), source="published", source_note="README", environment=None)
    published = published.model_copy(update={"method": "theirs"})
    for log_ratio in (-0.3, 0.0, 0.04):
        verdict = latency("aoti", run({"aoti": log_ratio}), published)
        assert verdict.outcome is Outcome.PASS and "Published numbers bound from above only (README)" in verdict.message
    slow = {"aoti": 0.15}
    assert latency("aoti", run(slow), published, again=confirmation(slow)).outcome is Outcome.REGRESSED


def test_the_printed_smallest_visible_change_shrinks_with_evidence():
    """More processes tonight or in the baseline show less; what the message prints is the number."""

    def visible(tonight, base=None) -> float:
        return latency("aoti", tonight, base).numbers["smallest_visible"]

    few = with_level(baseline(), "aoti", processes=baseline().levels["aoti"].processes[:2])
    assert visible(confirmation()) < visible(run()) < visible(run(), few)
    assert f"smallest visible change +{100 * visible(run()):.2f} %" in latency("aoti", run()).message


# What comes before numbers


def test_a_failure_is_an_error_that_names_everything_needed_to_reproduce_it():
    """Kind, stage, message, command and log tail; and it comes before a missing baseline."""
    tonight = run()
    tonight["aoti"][1] = samples.failed("aoti", 1)
    for verdict in (
        latency("aoti", tonight),
        gate.judge_structure("aoti", tonight["aoti"], None),
        gate.judge_memory("aoti", tonight["aoti"], None, GPU),
    ):
        assert (verdict.outcome, verdict.rule) == (Outcome.ERROR, "oom")
        for words in ("process 1", "'warmup'", "out of memory", "exit status 10", "harness.worker x", "the last line"):
            assert words in verdict.message


@pytest.mark.parametrize(
    ("counters", "is_void"),
    [
        (Counters(thermal_violation_ns=1), True),
        (Counters(hw_slowdown_ns=1), True),
        (Counters(power_brake_ns=1), True),
        (Counters(foreign_pids=[4711]), True),
        (Counters(power_violation_ns=10**9, thermal_violation_ns=0), False),
        (None, False),
    ],
)
def test_a_disturbed_run_is_void(counters, is_void):
    """Thermal and hardware slowdown, power brake and neighbours void; the software power cap does not."""
    tonight = run({"aoti": 0.04})
    tonight["aoti"][2] = tonight["aoti"][2].model_copy(update={"counters": counters})
    assert (latency("aoti", tonight).outcome is Outcome.VOID) == is_void
    assert gate.judge_structure("aoti", tonight["aoti"], baseline()).outcome is Outcome.PASS


def test_another_power_limit_is_void():
    """700 W numbers are not judged against a 500 W baseline."""
    verdict = latency("aoti", run(), baseline(environment=samples.environment(500)))
    assert verdict.outcome is Outcome.VOID and "700 W" in verdict.message and "500 W" in verdict.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "other/2"}, "other/2"),
        ({"workload_digest": "f" * 16}, "f" * 16),
        ({"fields": {"dtype": "float16"}}, "dtype='float16'"),
        ({"unavailable": {"attention": "no FA3 wheel"}}, "no FA3 wheel"),
    ],
)
def test_another_measurement_is_incomparable(change, words):
    """Method, workload, fields and unavailable fields have to be the baseline's; the message says which is not."""
    tonight = run()
    tonight["aoti"][0] = tonight["aoti"][0].model_copy(update=change)
    verdict = latency("aoti", tonight)
    assert (
        verdict.outcome is Outcome.INCOMPARABLE and words in verdict.message and "--record-baseline" in verdict.message
    )


def test_an_optimisation_newer_than_the_baseline_was_off_in_it():
    """A field that the baseline does not know is no difference as long as it is off; nor is a fact that holds."""
    fact = Proof(field="fused_quantize", what="launches", observed=0, expected=0)
    tonight, old = run(), baseline()
    stored = old.levels["aoti"]
    fields = {name: value for name, value in stored.fields.items() if name != "fused_quantize"}
    old = with_level(old, "aoti", fields=fields)
    measurement = tonight["aoti"][0].measurement
    more = measurement.model_copy(update={"proofs": [*measurement.proofs, fact]})
    tonight["aoti"] = [result.model_copy(update={"measurement": more}) for result in tonight["aoti"]]
    assert gate.judge_structure("aoti", tonight["aoti"], old).ok and latency("aoti", tonight, old).ok
    assert gate.judge_structure("aoti", tonight["aoti"], baseline()).ok
    on = [r.model_copy(update={"fields": r.fields | {"fused_quantize": True}}) for r in tonight["aoti"]]
    assert gate.judge_structure("aoti", on, old).outcome is Outcome.INCOMPARABLE


def test_no_baseline_is_not_ok_and_names_the_command():
    """Missing altogether or for one level, for every judge."""
    tonight, without = run(), baseline(levels=IDS[:-1])
    for verdict in (
        gate.judge_latency("aoti", tonight, None, GPU),
        latency("aoti", tonight, without),
        gate.judge_structure("aoti", tonight["aoti"], without),
        gate.judge_memory("aoti", tonight["aoti"], without, GPU),
        gate.judge_fidelity("aoti", {"ssim": 0.9}, {}, None, GPU, tonight["aoti"]),
        gate.judge_fidelity("aoti", {"ssim": 0.9}, {}, without, GPU),
        gate.judge_step_error("aoti", tonight["aoti"], 0.02, 0.01, None, GPU),
    ):
        assert verdict.outcome is Outcome.NO_BASELINE and not verdict.ok
        command = "--record-baseline" if "there is no " in verdict.message else "--levels aoti --update-baseline"
        assert "'aoti'" in verdict.message and f"`pytest perf_tests --workload tiny {command}`" in verdict.message


def test_an_injected_result_is_judged_as_any_other_and_named():
    """The verdict is that of the numbers, the message begins with the fault."""
    tonight = run({"aoti": 0.04})
    tonight["aoti"] = [r.model_copy(update={"injection": "latency=+4%"}) for r in tonight["aoti"]]
    verdict = latency("aoti", tonight)
    assert verdict.rule == "unconfirmed" and verdict.message.startswith("[fault injected on purpose: latency=+4%]")


def test_nothing_to_judge_is_a_mistake_of_the_caller():
    """An empty level raises instead of passing."""
    with pytest.raises(ValueError, match="no result to judge"):
        gate.judge_latency("aoti", run(levels=["bf16"]), baseline(), GPU)


def test_a_disturbed_neighbour_level_does_not_take_part():
    """The parent's throttled run is no parent to be compared with."""
    tonight = run({"fused_qkv": 0.04})
    tonight["compile"][0] = tonight["compile"][0].model_copy(update={"counters": Counters(hw_slowdown_ns=5)})
    verdict = latency("fused_qkv", tonight)
    assert verdict.numbers["ladder_ratio"] is None and verdict.rule == "unconfirmed"


# Structure, fidelity, step error, memory


def with_measurement(level="aoti", **change):
    return [samples.result(level, measurement=samples.measurement(1.0, **change))]


def test_structure_counts_exactly():
    """One count off in one process is red, with or without a baseline; so is a fact that is gone. More prove more."""
    off = Proof(field="dtype", what="bfloat16 weights", observed=6, expected=7)
    for base in (baseline(), None):
        verdict = gate.judge_structure("aoti", [samples.result("aoti"), *with_measurement(proofs=[off])], base)
        assert (verdict.outcome, verdict.rule) == (Outcome.REGRESSED, "count") and "counted 6 times" in verdict.message
    more = Proof(field="attention", what="fp8 calls", observed=1, expected=1)
    for proofs in ([samples.PROOF], [samples.PROOF, more]):
        assert gate.judge_structure("aoti", with_measurement(proofs=proofs), baseline()).outcome is Outcome.PASS
    changed = Proof(field="dtype", what="weights", observed=7, expected=7)
    said = gate.judge_structure("aoti", with_measurement(proofs=[more, changed]), baseline()).message
    assert "counted instead: [('dtype', 'weights', 7)]" in said
    for proofs in ([], [more], [Proof(field="dtype", what="bfloat16 weights", observed=8, expected=8)]):
        verdict = gate.judge_structure("aoti", with_measurement(proofs=proofs), baseline())
        assert (verdict.outcome, verdict.rule) == (Outcome.REGRESSED, "facts")


GOOD = {"ssim": 0.97, "flip": 0.03, "flip_worst_tile": 0.1, "psnr_db": 30.0}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"ssim": 0.999, "flip": 0.0, "flip_worst_tile": 0.0}, None),
        ({"ssim": 0.9655}, None),
        ({"ssim": 0.96}, "limit"),
        ({"flip": 0.04}, "limit"),
        ({"flip_worst_tile": 0.11}, None),
        ({"flip_worst_tile": 0.2}, "limit"),
        ({"psnr_db": 1.0}, None),
        ({"psnr_db": math.inf}, None),
        ({"flip_worst_tile": math.nan}, "not_finite"),
        ({"ms_ssim": 0.9}, "no_baseline"),
    ],
)
def test_fidelity_is_judged_in_each_metrics_own_direction(change, rule):
    """SSIM may not fall, FLIP may not rise, PSNR is for information, NaN and unknown metrics are never a pass."""
    verdict = gate.judge_fidelity("aoti", GOOD | change, {}, baseline(), GPU)
    assert verdict.ok == (rule is None) and (rule is None or verdict.rule == rule)


def test_fidelity_limits_follow_the_spread_of_fresh_runs():
    """A metric that varies between compiles gets room; one that was not measured tonight is not passed over."""
    varied = with_level(baseline(), "aoti", fidelity={"ssim": [0.97, 0.96, 0.98, 0.965, 0.975]})
    assert gate.judge_fidelity("aoti", {"ssim": 0.955}, {}, varied, GPU).ok
    assert not gate.judge_fidelity("aoti", {"ssim": 0.80}, {}, varied, GPU).ok
    assert not gate.judge_fidelity("aoti", {"flip": 0.0}, {}, varied, GPU).ok


def test_an_image_scored_by_another_method_is_incomparable():
    """Another window or library variant gives other numbers; the message names the metrics that changed."""
    method = {"ssim": {"window": 11}, "flip": {"variant": "LDR"}}
    assert gate.judge_fidelity("aoti", GOOD, method, baseline(fidelity_method=method), GPU).ok
    for other in ({}, {**method, "ssim": {"window": 7}}):
        verdict = gate.judge_fidelity("aoti", GOOD, method, baseline(fidelity_method=other), GPU)
        assert (verdict.outcome, verdict.rule) == (Outcome.INCOMPARABLE, "method")
        assert "ssim" in verdict.message and ("flip" in verdict.message) == (not other)
        assert "--record-baseline" in verdict.message


def test_a_wrong_image_is_red_without_a_baseline():
    """Black, noise or another picture never becomes the first baseline; what float8 does passes."""
    alike = {"ssim": 0.96, "flip": 0.07, "flip_worst_tile": 0.4}
    tonight = [samples.result("aoti")]
    for base in (None, baseline()):
        for change in ({"ssim": 0.49}, {"flip": 0.31}, {"flip": math.nan}):
            verdict = gate.judge_fidelity("aoti", alike | change, {}, base, GPU, tonight)
            assert (verdict.outcome, verdict.rule) == (Outcome.REGRESSED, "wrong_image")
            assert "accept" not in verdict.message
    assert gate.judge_fidelity("aoti", alike, {}, None, GPU, tonight).outcome is Outcome.NO_BASELINE
    assert gate.judge_fidelity("aoti", alike, {}, None, GPU, [samples.failed("aoti")]).rule == "oom"


def test_an_injected_image_is_named():
    """Its verdict begins with the fault."""
    tonight = [samples.result("aoti", injection="hole")]
    for values in (GOOD, GOOD | {"ssim": 0.9}, GOOD | {"ssim": 0.1}):
        verdict = gate.judge_fidelity("aoti", values, {}, baseline(), GPU, tonight)
        assert verdict.message.startswith("[fault injected on purpose: hole]")


def test_a_changed_bf16_image_is_blamed_on_bf16():
    """A level that left this run's bf16 image and not the stored one stayed where it was."""
    base = with_level(baseline(), "bf16", fidelity={"flip_stored": [0.0] * 5})
    base = with_level(base, "aoti", fidelity={"flip": [0.03] * 5, "flip_stored": [0.03] * 5})
    stays, moves, moved = {"flip": 0.1, "flip_stored": 0.03}, {"flip": 0.1, "flip_stored": 0.1}, {"flip_stored": 0.1}
    verdict = gate.judge_fidelity("aoti", stays, {}, base, GPU, reference=moved)
    assert verdict.rule == "limit" and "mend bf16" in verdict.message and "--update-baseline" not in verdict.message
    verdict = gate.judge_fidelity("aoti", {"flip": 0.9, "flip_stored": 0.03}, {}, base, GPU, reference=moved)
    assert verdict.rule == "wrong_image" and "mend bf16" in verdict.message
    for values, reference in ((moves, moved), (stays, {"flip_stored": 0.0}), (stays, None)):
        verdict = gate.judge_fidelity("aoti", values, {}, base, GPU, reference=reference)
        assert verdict.rule == "limit" and "mend bf16" not in verdict.message


def test_no_image_limit_is_tighter_than_rounding():
    """On a CPU other than the recording one an image may differ from the stored one as float32's does from bf16's."""
    stored = with_level(baseline(), "aoti", fidelity={"ssim_stored": [1.0] * 5, "flip_stored": [0.0] * 5})
    stored = with_level(stored, "fp32", fidelity={"ssim": [0.98] * 5, "flip": [0.03] * 5})
    for values, is_within in (({"ssim_stored": 0.981, "flip_stored": 0.029}, True),
                              ({"ssim_stored": 0.979, "flip_stored": 0.029}, False),
                              ({"ssim_stored": 0.981, "flip_stored": 0.031}, False)):  # fmt: skip
        assert gate.judge_fidelity("aoti", values, {}, stored, CPU).ok == is_within
        assert not gate.judge_fidelity("aoti", values, {}, stored, GPU).ok
    with pytest.raises(ValueError, match="no known direction"):
        direction("beauty")


def test_step_error_is_bounded_by_roundoff_and_by_the_baseline():
    """k follows the coarsest format; baseline runs bound it more tightly; k and NaN are judged without one too."""
    assert roundoff_factor({"dtype": "bfloat16"})[0] == 2
    assert roundoff_factor({"dtype": "bfloat16", "attention": "fa3_fp8"})[0] == 32
    assert roundoff_factor({"dtype": "bfloat16", "quantization": "float8_tensorwise"})[0] == 32
    assert roundoff_factor({"dtype": "float32"})[0] == 2.0**-15
    unknown = with_level(baseline(), "compile", step_error=[])
    exact = with_level(baseline(), "fp32", step_error=[0.0] * 5)

    def judge(level, error, bf16_error, base) -> Verdict:
        return gate.judge_step_error(level, [samples.result(level)], error, bf16_error, base, GPU)

    assert judge("compile", 0.019, 0.01, unknown).ok
    assert judge("compile", 0.0205, 0.02, baseline()).ok
    assert judge("compile", 0.03, 0.02, baseline()).rule == "baseline"
    assert judge("fp32", 0.0, 0.01, exact).ok
    assert not judge("fp32", 0.01, 0.01, exact).ok
    other = baseline(workload_digest="f" * 16)
    for base, otherwise in ((unknown, "limit"), (None, "no_baseline"), (other, "changed")):
        assert judge("compile", 0.021, 0.01, base).rule == "roundoff"
        assert judge("compile", math.nan, 0.02, base).rule == "not_finite"
        assert judge("compile", 0.02, math.inf, base).rule == "not_finite"
        # As if bf16 had drawn other noise than float32: every bound that is a multiple of it would hold. bf16 is to
        # blame, the others cannot be judged, and float32 has no part in it.
        blamed, other_level = judge("bf16", 1.39, 1.39, base), judge("compile", 1.4, 1.39, base)
        assert (blamed.outcome, blamed.rule) == (Outcome.REGRESSED, "reference")
        assert (other_level.outcome, other_level.rule) == (Outcome.ERROR, "reference")
        assert "not judged" in other_level.message and "weights and noise" not in other_level.message
        assert judge("fp32", 0.0, 1.39, base).rule in ("limit", "no_baseline", "changed")
        # 32 x bf16's error is more than unrelated outputs are apart.
        assert judge("float8", 0.55, 0.1, base).rule == "roundoff"
        assert judge("compile", 0.019, 0.01, base).rule == otherwise


@pytest.mark.parametrize(
    ("runs", "floor"), [([0.02] * 5, 0.05), ([0.0200, 0.0202], 0.05), ([0.04, 0.05], 2 / 9), ([0.01, 0.05], 0.25)]
)
def test_step_errors_may_move_by_what_compilations_round_otherwise(runs: list[float], floor: float):
    """Another version may do to one level what compiling anew does to another of its format, within bounds."""
    noisy = with_level(baseline(), "fused_qkv", step_error=runs)
    others = with_level(with_level(baseline(), "float8", step_error=runs), "bf16", step_error=runs)
    for base, own in ((noisy, floor), (others, 0.05)):
        for error, is_within in ((0.02 * (1 + own) - 1e-4, True), (0.02 * (1 + own) + 1e-4, False)):
            found = gate.judge_step_error("compile", [samples.result("compile")], error, 0.02, base, GPU)
            assert found.ok == is_within and f"({own:.0%} at least)" in found.message
    # Eager levels are never compiled anew.
    assert "(5% at least)" in gate.judge_step_error("bf16", [samples.result("bf16")], 0.02, 0.02, noisy, GPU).message


def test_memory_is_exact_for_weights_and_tolerant_for_the_peak():
    """One byte of weights is red; a per cent of peak is not; less peak is an improvement."""
    judge = gate.judge_memory
    assert judge("aoti", with_measurement(peak_memory_bytes=10_090_000), baseline(), GPU).outcome is Outcome.PASS
    for weights in (499, 501):
        verdict = judge("aoti", with_measurement(transformer_weight_bytes=weights), baseline(), GPU)
        assert (verdict.outcome, verdict.rule) == (Outcome.REGRESSED, "weights")
    assert judge("aoti", with_measurement(peak_memory_bytes=10_110_000), baseline(), GPU).rule == "peak"
    assert judge("aoti", with_measurement(peak_memory_bytes=9_000_000), baseline(), GPU).outcome is Outcome.IMPROVED
    without = with_level(baseline(), "aoti", peak_memory_bytes=[])
    assert judge("aoti", with_measurement(), without, GPU).outcome is Outcome.NO_BASELINE


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("size", "seconds", "others"), [(1e308, 9e6, 2e-9), (1e-300, 2e-9, 6e6)])
@pytest.mark.parametrize("policy", [GPU, CPU])
def test_no_stored_number_is_too_large_to_judge(size, seconds, others, policy):
    """A verdict, and no overflow, whatever numbers a baseline or a result can hold."""
    tonight = run()
    most = 2**50 - 1
    long = samples.measurement(1.0, samples_s=[seconds] * 2, peak_memory_bytes=most, transformer_weight_bytes=most)
    tonight["compile"] = [samples.result("compile", i, measurement=long) for i in range(3)]
    tonight["bf16"] = [samples.result("bf16", i, measurement=samples.measurement(others)) for i in range(3)]
    change = {
        "nights": [size, -size],
        "fidelity": {"ssim": [size] * 5, "flip": [size, -size]},
        "step_error": [size] * 5,
        "peak_memory_bytes": [most, 1],
        "processes": [ProcessSamples(samples_s=[others] * 2)] * 5,
    }
    base = baseline(policy.slug)
    for odd in (base, with_level(base, "compile", **change), with_level(base, "bf16", **change)):
        for level in ("bf16", "compile", "fused_qkv"):
            assert latency(level, tonight, odd, policy, tonight)
            assert gate.judge_memory(level, tonight[level], odd, policy)
            assert gate.judge_fidelity(level, {"ssim": 0.9, "flip": 0.1}, {}, odd, policy)
            assert gate.judge_step_error(level, tonight[level], 0.1, size, odd, policy)
    proof = Proof(field="dtype", what="weights", observed=2**63 - 1, expected=7)
    assert not gate.judge_structure("aoti", with_measurement(proofs=[proof]), base).ok


def test_policies_differ_by_machine():
    """`cpu` is relative to bf16, a GPU is not, and the interval of one process is wider than that of three."""
    assert policy_for("cpu").relative_to == "bf16" and policy_for("h100-500w").relative_to is None
    assert noise.quantile(4, 1e-3) == pytest.approx(7.173, abs=1e-3)
