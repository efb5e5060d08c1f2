"""One run of the suite: which levels, measured or replayed, and the verdict on each. No torch, no pytest.

Everything that needs a machine happens in `measure` and `confirm`; everything else reads results, so that a stored run
gives the same verdicts again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxfast.levels import LEVELS
from fluxfast.workloads import Workload
from perf_tests.harness import fidelity, gate, runner, store
from perf_tests.harness.files import read_floats, read_png, write_over
from perf_tests.harness.lanes import Job
from perf_tests.harness.obstacles import obstacle, why_disturbed
from perf_tests.harness.policy import worst
from perf_tests.harness.progress import RESULT_FILE
from perf_tests.harness.schema import Baseline, Environment, Outcome, Result, Verdict
from perf_tests.harness.stored_run import (
    RERUN,
    RUN_FILE,
    RunFacts,
    is_replaced,
    read_run,
    rerun_of,
    with_reruns,
)

REFERENCE_LEVEL = "bf16"
EXACT_LEVEL = "fp32"
CONFIRM = "confirm"
SUFFIXES = ("", "_stored")

Measure = Callable[[Sequence[Job], Path], Mapping[Job, Result]]
"""(jobs in the order to run, folder) -> job -> result; `folder/<level>/<process>` holds the same."""


@dataclasses.dataclass
class Session:
    """What the tests ask.

    Args:
        folder: of this run, or of the stored one; `make_folder` gives it where it has to be made first.
        workload: what is generated.
        levels: to measure, in ladder order; the references they need are added by `with_references`.
        unavailable: level -> why this machine cannot run it.
        processes: fresh processes a level.
        slug: of the machine.
        baseline: None if there is none or it was not asked for.
        is_compared: whether a missing baseline is a failure.
        measure: runs workers; None replays what is in `folder`.
        error: what ended the measuring. It is raised again for whoever asks next, who would run into the same.
    """

    folder: Path
    workload: Workload
    levels: Sequence[str]
    unavailable: Mapping[str, str]
    processes: int
    slug: str
    baseline: Baseline | None
    baseline_folder: Path
    is_compared: bool
    measure: Measure | None
    make_folder: Callable[[], Path] | None = None
    error: Exception | None = dataclasses.field(default=None, init=False)
    _results: dict[str, list[Result]] = dataclasses.field(default_factory=dict)
    _latency: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    _worst: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    _scores: dict[tuple[bytes, ...], dict[str, float | None]] = dataclasses.field(default_factory=dict)

    @property
    def policy(self) -> gate.Policy:
        """How this machine is judged."""
        return gate.policy_for(self.slug, self.unavailable.keys())

    @property
    def results(self) -> dict[str, list[Result]]:
        """Level -> one result a process, in their order; measured on first use, disturbed processes once more."""
        if not self._results:
            levels = with_references(self.levels, self.unavailable)
            if self.measure is None:
                self._results = with_reruns(read_run(self.folder, levels, self.processes), self.folder)
            else:
                with self._measuring():
                    if self.make_folder is not None:
                        self.folder = self.make_folder()
                    self.describe()
                    self._results = self._measured(levels, self.processes, self.folder, self.measure)
        return self._results

    def _measured(
        self, levels: Sequence[str], processes: int, folder: Path, measure: Measure
    ) -> dict[str, list[Result]]:
        """Level -> one result a process; of its rerun, if it was disturbed."""
        jobs = runner.schedule(levels, processes)
        found = measure(jobs, folder)
        # A level in which a process failed has no time to judge, disturbed or not.
        failed = {level for (level, _), result in found.items() if result.failure}
        again = [job for job in jobs if job[0] not in failed and why_disturbed(found[job], self.baseline)]
        results = {level: [found[level, process] for process in range(processes)] for level in levels}
        if again:
            measure(again, folder / RERUN)
        # As a replay reads it: a resumed run may hold reruns of undisturbed processes too.
        return with_reruns(results, folder)

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        if self.error is not None:
            raise self.error
        try:
            yield
        except Exception as error:
            self.error = error
            raise

    @property
    def environment(self) -> Environment | None:
        """Of the first worker that told; None before anything is measured."""
        known = (result.environment for own in self._results.values() for result in own if result.environment)
        return next(known, None)

    def describe(self) -> None:
        """Write what a replay needs to know beside the results."""
        facts = RunFacts(
            slug=self.slug,
            workload=self.workload.id,
            workload_digest=self.workload.digest,
            levels=list(self.levels),
            unavailable=dict(self.unavailable),
            processes=self.processes,
        )
        write_over(self.folder / RUN_FILE, facts.model_dump_json(indent=1).encode())

    def latency(self, level: str) -> Verdict:
        """Against the baseline, confirmed in fresh processes if it looks red."""
        divisor = self.policy.divisor(level)
        if divisor in self.results and (broken := self._broken(level, divisor)) and broken.rule == "step_not_applied":
            return broken
        if level not in self._latency:
            verdict = gate.judge_latency(level, self.results, self.baseline, self.policy)
            if verdict.rule == "unconfirmed" and (again := self.confirm(level)):
                verdict = gate.judge_latency(level, self.results, self.baseline, self.policy, again)
            if verdict.outcome is Outcome.VOID and (lost := self.lost_reruns(level)):
                verdict = verdict.model_copy(update={"message": f"{verdict.message} Also: {'; '.join(lost)}."})
            self._latency[level] = self._unless_not_compared(verdict)
        return self._latency[level]

    def lost_reruns(self, level: str) -> list[str]:
        """A clause on each process that was measured once more without a measurement, so that its first one stands."""
        reruns = [rerun_of(own, self.folder) for own in self.results[level] if own.measurement]
        return [
            f"the rerun of process {rerun.process} gave no measurement ({rerun.failure.kind.value} in stage "
            f"{rerun.failure.stage!r})"
            for rerun in reruns
            if rerun is not None and rerun.failure is not None
        ]

    def confirm(self, level: str) -> dict[str, list[Result]]:
        """Fresh processes of a level that looks red, its parent and the level that divides it.

        Empty if the stored run has none: it was measured against another baseline, or none.
        """
        needed = [level, self.policy.parents.get(level), self.policy.divisor(level)]
        levels = [known for known in LEVELS if known in needed and known in self.results]
        folder = self.folder / CONFIRM / level
        if self.measure is None:
            return with_reruns(read_run(folder, levels), folder) if folder.is_dir() else {}
        with self._measuring():
            return self._measured(levels, self.policy.confirmation_processes, folder, self.measure)

    def structure(self, level: str) -> Verdict:
        """The proofs; exact, with or without a baseline."""
        return self._unless_not_compared(gate.judge_structure(level, self.results[level], self.baseline))

    def memory(self, level: str) -> Verdict:
        """Weight bytes and peak memory."""
        return self._unless_not_compared(gate.judge_memory(level, self.results[level], self.baseline, self.policy))

    def fidelity(self, level: str) -> Verdict:
        """The image against the same run's bf16 image and the stored one."""
        if broken := self._broken(level, REFERENCE_LEVEL):
            return broken
        values, reference = self._worst_scores(level), self._worst_scores(REFERENCE_LEVEL)
        judged = gate.judge_fidelity(
            level, values, fidelity.METHOD, self.baseline, self.policy, self.results[level], reference
        )
        verdict = self._unless_not_compared(judged)
        if verdict.outcome is not Outcome.REGRESSED:
            return verdict
        return verdict.model_copy(update={"message": f"{verdict.message} {self.show_difference(level)}"})

    def _worst_scores(self, level: str) -> dict[str, float]:
        """Of a level's processes; bf16's are asked for with every other level's."""
        if level not in self._worst:
            self._worst[level] = worst(self.image_scores(level, self.stored_reference()))
        return self._worst[level]

    def step_error(self, level: str) -> Verdict:
        """The first step's output against float32, bounded by bf16's own error."""
        if broken := self._broken(level, REFERENCE_LEVEL, EXACT_LEVEL):
            return broken
        error, own = max(self.step_errors(level)), max(self.step_errors(REFERENCE_LEVEL))
        verdict = gate.judge_step_error(level, self.results[level], error, own, self.baseline, self.policy)
        return self._unless_not_compared(verdict)

    def image_scores(self, level: str, stored: Any) -> list[dict[str, float]]:
        """One a process: metrics against this run's bf16 image, and as `<metric>_stored` against `stored`, if given.

        bf16 has no metrics against itself.
        """
        scores = []
        for index in range(len(self.results[level])):
            image = self.image(level, index)
            pairs = {} if level == REFERENCE_LEVEL else {"": self.image(REFERENCE_LEVEL, index)}
            if stored is not None:
                pairs["_stored"] = stored
            scores.append(
                {
                    f"{metric}{suffix}": value
                    for suffix, reference in pairs.items()
                    for metric, value in self._compare(image, reference, level).items()
                    if value is not None
                }
            )
        return scores

    def _compare(self, image: Any, reference: Any, level: str) -> dict[str, float | None]:
        # Processes often draw the same image, and every level's is compared with bf16's.
        pair = tuple(hashlib.sha256(f"{one.shape}".encode() + one.tobytes()).digest() for one in (image, reference))
        try:
            if pair not in self._scores:
                self._scores[pair] = fidelity.compare(image, reference).as_dict()
        except ValueError as error:
            said = f"the image of level {level!r} in {self.folder} cannot be judged: {error}"
            raise store.ResultError(said) from error
        return self._scores[pair]

    def step_errors(self, level: str) -> list[float]:
        """One a process: relative L2 of the first step's output against float32; infinite if not finite."""
        exact = self.step_output(EXACT_LEVEL, 0)
        outputs = [self.step_output(level, index) for index in range(len(self.results[level]))]
        if not np.isfinite(exact).all():
            return [math.inf] * len(outputs)
        try:
            return [fidelity.relative_l2(own, exact) if np.isfinite(own).all() else math.inf for own in outputs]
        except ValueError as error:
            said = f"the step's output of {level!r} in {self.folder} does not compare with {EXACT_LEVEL!r}'s ({error})"
            raise store.ResultError(f"{said}; measure again") from error

    def image(self, level: str, index: int) -> Any:
        """Of one process: uint8, (height, width, 3)."""
        return store.result_image(self.place(level, index) / RESULT_FILE, self.results[level][index])

    def image_path(self, level: str, index: int) -> Path:
        """Of one process."""
        measurement = self.results[level][index].measurement
        assert measurement is not None
        return self.place(level, index) / measurement.image

    def step_output(self, level: str, index: int) -> Any:
        """Of one process: float32, (batch, image tokens, channels)."""
        measurement = self.results[level][index].measurement
        assert measurement is not None
        return read_floats(self.place(level, index) / measurement.step_output, store.ResultError)

    def stored_reference(self) -> Any:
        """The baseline's bf16 image, None without a baseline."""
        if self.baseline is None or self.baseline.reference_image is None or self.baseline.reference_sha256 is None:
            return None
        path = self.baseline_folder / self.baseline.reference_image
        return read_png(path, self.baseline.reference_sha256, store.BaselineError)

    def worst_process(self, level: str) -> int:
        """Index of the process whose image has the largest FLIP in one tile."""
        scores = self.image_scores(level, self.stored_reference())
        return max(range(len(scores)), key=lambda at: max(scores[at].get(f"flip_worst_tile{s}", 0.0) for s in SUFFIXES))

    def show_difference(self, level: str) -> str:
        """Write difference maps of a level's worst process beside its image; a sentence that names or misses them."""
        stored, index = self.stored_reference(), self.worst_process(level)
        path = self.image_path(level, index)
        references = {"stored": stored}
        if level != REFERENCE_LEVEL:
            references["this_run"] = self.image(REFERENCE_LEVEL, index)
        paths = []
        for name, reference in references.items():
            if reference is not None:
                paths.append(str(path.with_name(f"difference_from_{name}.png")))
                try:
                    # Not through a link that lies there: the folder may be someone else's.
                    write_over(Path(paths[-1]), fidelity.difference_map(self.image(level, index), reference))
                except OSError as error:
                    return f"Look at {path}; its difference map cannot be written ({error})."
        return f"Look at {path} and at {' and '.join(paths)}."

    def unmeasured(self) -> list[str]:
        """Levels, references included, without a measurement in every process."""
        needed = with_references(self.levels, self.unavailable)
        return [
            level for level in needed if not (own := self._results.get(level)) or not all(r.measurement for r in own)
        ]

    def place(self, level: str, index: int) -> Path:
        """Folder of one process: of its rerun, if that is the one that counts."""
        own = self.results[level][index]
        root = self.folder / RERUN if is_replaced(own, rerun_of(own, self.folder)) else self.folder
        return root / level / str(own.process)

    def _broken(self, level: str, *references: str) -> Verdict | None:
        """The error of a level that gave no measurement, or whose reference gave none."""
        for needed in (level, *references):
            found = obstacle(needed, self.results[needed], None, clocked=False)
            if found is not None and found.outcome is Outcome.ERROR:
                if needed == level:
                    return found
                message = f"{needed!r} of the same run, its reference, gave no measurement: {found.message}"
                return found.model_copy(update={"level": level, "message": message})
        return None

    def _unless_not_compared(self, verdict: Verdict) -> Verdict:
        if verdict.outcome is not Outcome.NO_BASELINE:
            return verdict
        if self.is_compared:
            where = "" if self.baseline else f" None of workload {self.workload.id!r} is in {self.baseline_folder}."
            return verdict.model_copy(update={"message": verdict.message + where})
        message = f"level {verdict.level!r} was measured and proven; --benchmark-compare judges what a baseline holds"
        return verdict.model_copy(update={"outcome": Outcome.PASS, "rule": "not_compared", "message": message})


def with_references(levels: Sequence[str], unavailable: Mapping[str, str]) -> list[str]:
    """`levels`, the nearest level below each that runs here, bf16 and fp32, lowest first.

    Of fp32 one output is compared with, but its times count too: with bf16 and the level below it is the third by which
    the gate knows a machine's drift in a run of one level.
    """
    parents = gate.nearest_parents(unavailable)
    needed = {*levels, EXACT_LEVEL, REFERENCE_LEVEL, *(parents.get(level) for level in levels)}
    return [level for level in LEVELS if level in needed and level not in unavailable]
