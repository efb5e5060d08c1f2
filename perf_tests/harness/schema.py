"""Every fact that crosses a process or a file, strict to and from JSON. No torch.

pydantic in strict mode does the work: unknown keys, wrong types, NaN and infinity are errors when a file is read and
when one is written. Ranges are wider than any machine, so that no sum, ratio or exponential of what passes overflows.
"""

from __future__ import annotations

import datetime
import enum
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

SCHEMA: Final = 1
"""Raised when a stored file can no longer be read as before; `store` refuses other numbers with the action to take."""

METHOD = "whole-call/process-median/1"
"""How a latency comes about: the timed region, the unit of decision, a revision. Raised when samples stop comparing."""

Seconds = Annotated[float, Field(gt=1e-9, lt=1e7)]
StageSeconds = Annotated[float, Field(gt=-1e7, lt=1e7)]
"""A difference of two clock readings, which noise can make negative."""
Ratio = Annotated[float, Field(gt=1e-18, lt=1e18)]
"""Of two times, or of two such ratios."""
Limit = Annotated[float, Field(ge=0, lt=1e18)]
"""How far a ratio may lie from 1."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Bytes = Annotated[int, Field(gt=0, lt=1 << 50)]


def _in_the_calendar(text: str) -> str:
    datetime.datetime.fromisoformat(text)  # a ValueError for a day or an hour that is none
    return text


Day = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_in_the_calendar)]
Moment = Annotated[
    str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"), AfterValidator(_in_the_calendar)
]
"""UTC."""


class Strict(BaseModel):
    """Frozen, no unknown keys, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


PACKAGES = ("torch", "triton", "torchao", "diffusers", "transformers", "fa3", "quack", "cutlass_dsl")
"""Fields of an environment that hold a package's version, in the order in which they are told."""


class Environment(Strict):
    """What a number was measured on. A null means: not there."""

    python: str
    torch: str
    triton: str | None
    torchao: str
    diffusers: str
    transformers: str
    fa3: str | None
    cuda: str | None
    driver: str | None
    device_name: str
    capability: str | None
    power_limit_w: int | None
    cpu_name: str
    cpu_threads: Annotated[int, Field(ge=1, le=1 << 20)]
    platform: str
    quack: str | None = None
    cutlass_dsl: str | None = None

    def changes(self, was: Environment | None) -> list[str]:
        """What is not as it was, `name old -> new` each.

        A null that is a field's default does not count: the file is from before a level used the package, or it was not
        installed, and the levels of that file do without.
        """
        old = dict(was or ())
        fields = type(self).model_fields
        compared = [name for name in fields if fields[name].is_required() or old.get(name) is not None]
        return [
            f"{name} {old.get(name)} -> {getattr(self, name)}"
            for name in compared
            if old.get(name) != getattr(self, name)
        ]


class Counters(Strict):
    """NVML's cumulative counters over the timed region, and who else was there. All None without a GPU.

    Nanoseconds of violation, from `nvmlDeviceGetViolationStatus` and the clock-event fields.
    """

    power_violation_ns: Count | None = None
    thermal_violation_ns: Count | None = None
    hw_slowdown_ns: Count | None = None
    power_brake_ns: Count | None = None
    foreign_pids: list[int] = []
    sm_clock_mhz_before: Count | None = None
    sm_clock_mhz_after: Count | None = None


class Proof(Strict):
    """A counted fact: `field` is on because `what` was observed as often as expected."""

    field: str
    what: str
    observed: Count
    expected: Count

    @property
    def holds(self) -> bool:
        """Whether the count is exact."""
        return self.observed == self.expected


class ErrorKind(enum.StrEnum):
    """Why a worker gave no measurement, in a word."""

    OOM = "oom"
    HANG = "hang"
    CRASH = "crash"
    IMPORT = "import"
    STEP_NOT_APPLIED = "step_not_applied"
    BAD_INPUT = "bad_input"
    NON_FINITE = "non_finite"
    EXCEPTION = "exception"
    INTERRUPTED = "interrupted"


class Failure(Strict):
    """Why a worker gave no measurement."""

    kind: ErrorKind
    stage: str
    message: str
    exit_status: int | None
    log_tail: str
    command: str


class Measurement(Strict):
    """What one worker process measured."""

    clock: Literal["wall", "cuda_event"]
    samples_s: Annotated[list[Seconds], Field(min_length=1)]
    """One a round: the whole `pipeline(...)` call on `clock`, seconds."""
    wall_s: Annotated[list[Seconds], Field(min_length=1)]
    stages_s: dict[str, list[StageSeconds]]
    """`text_encode`, `step_0` ... or `denoise`, `decode`, `postprocess`, `image_encode` where an image is edited: one a
    round each, on `clock`, seconds."""
    load_s: Seconds
    apply_s: Seconds
    """Steps applied, packages compiled ahead of time; just-in-time compilation falls into `warmup_s`."""
    warmup_s: Seconds
    peak_memory_bytes: Bytes
    """CUDA: the allocator's peak. CPU: all weights and the peak of what one call allocates."""
    transformer_weight_bytes: Bytes
    proofs: Annotated[list[Proof], Field(min_length=1)]
    inductor_config: dict[str, Any]
    """Options that Inductor was given beyond its defaults."""
    image: str
    """File name of the image of the last timed round, relative to the result."""
    image_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    step_output: str
    """File name of the first denoising step's output of that same call, `.npy`, float32."""

    @property
    def loop_s(self) -> list[float]:
        """One a round: the denoising loop, its steps or the graph of all, seconds; empty if it is not timed in each."""
        steps = [own for name, own in self.stages_s.items() if name.startswith("step_")]
        steps = steps or [self.stages_s.get("denoise", [])]
        if any(len(own) != len(self.samples_s) for own in steps):
            return []
        sums = [sum(own) for own in zip(*steps, strict=True)]
        return sums if all(own > 0 for own in sums) else []


class Result(Strict):
    """One worker process: exactly one of `measurement` and `failure`."""

    result_schema: Literal[1] = SCHEMA
    method: str = METHOD
    level: str
    workload: str
    workload_digest: str
    process: Count
    fields: dict[str, Any]
    """The effective optimisation fields, after unavailable ones were taken out."""
    unavailable: dict[str, str]
    """Field -> why this machine cannot do it."""
    injection: str | None = None
    environment: Environment | None
    gpu_uuid: str | None = None
    """NVML's name of the GPU that was measured, as GPUs of one kind differ. None without one, and of a failure."""
    counters: Counters | None = None
    measurement: Measurement | None = None
    failure: Failure | None = None

    @field_validator("fields")
    @classmethod
    def _known_dtype(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("dtype", "bfloat16") not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {fields['dtype']!r}, expected float32 or bfloat16")
        return fields


class ProcessSamples(Strict):
    """What a baseline keeps of one process."""

    samples_s: Annotated[list[Seconds], Field(min_length=1)]
    wall_s: list[Seconds] = []
    loop_s: list[Seconds] = []
    """The denoising loop alone; empty in a baseline that is older than its judgement."""
    counters: Counters | None = None


class LevelBaseline(Strict):
    """What is expected of one level."""

    fields: dict[str, Any]
    unavailable: dict[str, str] = {}
    processes: Annotated[list[ProcessSamples], Field(min_length=1)]
    nights: list[Finite] = []
    """Log ratios of earlier accepted nights to this baseline: how much this level moves when nothing changed."""
    loop_nights: list[Finite] = []
    """The same of its denoising loop."""
    proofs: list[Proof] = []
    peak_memory_bytes: list[Bytes] = []
    transformer_weight_bytes: Bytes | None = None
    fidelity: dict[str, list[Finite]] = {}
    """Metric -> one value a fresh process, against the same run's bf16 image."""
    step_error: list[Finite] = []
    """Relative L2 of the one-step transformer output against float32, one a fresh process."""


class AnnotatedStep(Strict):
    """A change that was looked at and accepted."""

    level: str
    date: Day
    ratio: Ratio
    """New median over old."""
    reason: Annotated[str, Field(min_length=1)]


class Baseline(Strict):
    """The `fluxfast` block of a baseline file; the rest of the file is stock pytest-benchmark JSON."""

    baseline_schema: Literal[1] = SCHEMA
    method: str
    source: Literal["recorded", "published"]
    source_note: str = ""
    """Of a published baseline: where the numbers come from. Of a recorded one: what was changed since."""
    slug: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    workload: dict[str, Any]
    workload_digest: str
    environment: Environment | None
    """None only in a published baseline."""
    levels: Annotated[dict[str, LevelBaseline], Field(min_length=1)]
    reference_image: str | None = None
    """Path of the bf16 image, relative to the baseline file."""
    reference_sha256: str | None = None
    fidelity_method: dict[str, Any] = {}
    """Metric -> variant and parameters."""
    steps: list[AnnotatedStep] = []


class Outcome(enum.StrEnum):
    """What a verdict says."""

    PASS = "pass"
    REGRESSED = "regressed"
    IMPROVED = "improved"
    VOID = "void"
    INCOMPARABLE = "incomparable"
    NO_BASELINE = "no_baseline"
    ERROR = "error"


class Verdict(Strict):
    """What a test asserts on."""

    outcome: Outcome
    level: str
    rule: str
    """Which rule decided, in a word: `interval`, `ladder`, `limit`, `count`, `environment`, ..."""
    message: str
    """What was observed, what was expected and from where, what to do next. One paragraph."""
    numbers: dict[str, Finite | None] = {}
    """`ratio`, `low`, `high`, `limit`, `smallest_visible` of the part of the call that decided a latency, and with
    `call_` and `loop_` in front of both parts, where there are two; metric values and limits for fidelity."""

    @property
    def ok(self) -> bool:
        """Whether a test passes on it; an improvement does, unless the run is strict."""
        return self.outcome in (Outcome.PASS, Outcome.IMPROVED)

    def explain(self) -> str:
        """The whole failure text."""
        return f"{self.outcome.value} [{self.level}] ({self.rule}): {self.message}"
