"""What a worker says while it runs, and how it is shown. No torch.

The worker's side, files in the folder it is given as `--out`:

* `progress.jsonl`: `report_stage` appends a line when a stage begins and, as often as it likes outside timed regions,
  for its detail. A stage's deadline runs from its first line; more lines of the same stage do not extend it.
* `await_turn`, if it was started to take turns: it has imported and waits before it loads, and again before the last
  call that is not timed, until the parent lets it go on. Its deadlines stand still meanwhile.
* `trace.json.gz`: only if it was asked for, a profile of one call that is not timed.
* `result.json`: `write_result`, once, as the last act before exit status 0.
* On a failure it knows: `leave(out, exit_status.OOM, sentence)`, and no `result.json`. The runner writes that.

The parent's side: `StageReader` follows the file, `ProgressPrinter` shows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TextIO, get_args

from perf_tests.harness.files import write_over
from perf_tests.harness.schema import Result

Stage = Literal["load", "apply", "warmup", "measure", "finish"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
PROGRESS_FILE: Final = "progress.jsonl"
RESULT_FILE: Final = "result.json"
TRACE_FILE: Final = "trace.json.gz"
CI_LINE_EVERY_S: Final = 15.0
TURN_POLL_S: Final = 0.1

Turn = Callable[[Stage, int], Sequence[int] | None]
"""Called with "load" or "measure" and the pid of a worker that asks to begin it: None if it has to wait, else the pids
of workers that wait for the same GPU themselves."""
OnProgress = Callable[[str, int, Stage, str, float], None]
"""Called with level, process index, stage, detail and the seconds spent in this stage so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadlines:
    """The longest a worker may stay in each stage, seconds. `apply` compiles ahead of time, `warmup` just in time."""

    load_s: float
    apply_s: float
    warmup_s: float
    measure_s: float
    finish_s: float

    def of(self, stage: Stage) -> float:
        """Seconds allowed for `stage`."""
        return float(getattr(self, f"{stage}_s"))


CPU_DEADLINES: Final = Deadlines(load_s=180, apply_s=900, warmup_s=900, measure_s=300, finish_s=60)
"""For the tiny workload on two cores; a cold Inductor cache takes most of the time."""
GPU_DEADLINES: Final = Deadlines(load_s=900, apply_s=1800, warmup_s=1800, measure_s=900, finish_s=120)
"""For the full shape: 34 GB of weights from a cold disk, max-autotune with an empty cache, 28-step float32 rounds."""


def report_stage(out: Path, stage: Stage, detail: str = "") -> None:
    """Worker: say that `stage` has begun, or where in it the work is ("round 3/10").

    Raises:
        ValueError: if there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")
    _append(out, {"stage": stage, "t": time.monotonic(), "detail": detail})


def await_turn(out: Path, stage: Stage) -> list[int]:
    """Worker: wait until the parent lets us begin `stage`.

    Returns:
        Workers that wait for the GPU meanwhile, by pid. They compute nothing, whatever NVML says they hold.
    """
    _append(out, {"waits": stage, "t": time.monotonic()})
    while not _turn_file(out, stage).exists():
        time.sleep(TURN_POLL_S)
    return [int(pid) for pid in json.loads(_turn_file(out, stage).read_text(encoding="utf-8"))]


def give_turn(out: Path, stage: Stage, waiting: Sequence[int]) -> None:
    """Parent: let the worker in `out` begin `stage`; `waiting` is what it is told."""
    write_over(_turn_file(out, stage), json.dumps(list(waiting)).encode())


def _turn_file(out: Path, stage: Stage) -> Path:
    return out / f"turn_{stage}.json"


def leave(out: Path, status: int, sentence: str) -> NoReturn:
    """Worker: give up with one of `exit_status` and one sentence for the user, which becomes the failure's message."""
    _append(out, {"error": sentence, "t": time.monotonic()})
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(status)


def write_result(out: Path, result: Result) -> None:
    """Put `result.json` there whole or not at all, however the process or the machine ends."""
    write_over(out / RESULT_FILE, result.model_dump_json(indent=2).encode() + b"\n")


def _append(out: Path, entry: dict[str, object]) -> None:
    with (out / PROGRESS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


class StageReader:
    """Follows a worker's `progress.jsonl`; times are this process's `time.monotonic`, seconds."""

    def __init__(self, out: Path, started: float) -> None:
        self.stage: Stage = STAGES[0]
        self.detail = ""
        self.since = started
        self.error: str | None = None
        """The sentence of `leave`."""
        self.awaits: Stage | None = None
        """What the worker asks to begin; None while it waits for nothing."""
        self._asked: set[Stage] = set()
        self._path = out / PROGRESS_FILE
        self._offset = 0

    def read(self, now: float) -> bool:
        """Take in what was appended since the last call; True if the stage or its detail changed."""
        before = (self.stage, self.detail)
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole + newline)
            for line in whole.splitlines():
                # A line that a full disk or a stray print spoilt says nothing; the stage's deadline holds all the same.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._take(json.loads(line), now)
        return (self.stage, self.detail) != before

    def _take(self, entry: dict[str, Any], now: float) -> None:
        if "error" in entry:
            self.error = str(entry["error"])
            return
        if "waits" in entry:
            stage = STAGES[STAGES.index(entry["waits"])]
            # Once each: a worker that goes round in circles must meet its deadline.
            if stage not in self._asked:
                self._asked.add(stage)
                self.awaits, self.detail = stage, f"waits to {stage}"
            return
        index = STAGES.index(entry["stage"])
        # Only a later stage restarts the clock: a worker that goes round in circles must meet its deadline.
        if index > STAGES.index(self.stage):
            self.stage, self.since = STAGES[index], now
        self.detail = str(entry["detail"])


class ProgressPrinter:
    """An `OnProgress` that keeps one line up to date on a terminal, and writes few lines into a CI log.

    Without a terminal a line is written when a worker's stage changes and every 15 s of it. Workers side by side call
    from threads of their own; a terminal shows the one that called last.
    """

    def __init__(self, deadlines: Deadlines, workers: int, stream: TextIO | None = None) -> None:
        self._deadlines = deadlines
        self._workers = workers
        self._stream = sys.stderr if stream is None else stream
        self._shown: dict[tuple[str, int], tuple[Stage, float]] = {}
        """Worker -> stage and time in it, seconds, of its last line in a log."""
        self._lock = threading.Lock()

    def __call__(self, level: str, process: int, stage: Stage, detail: str, elapsed_s: float) -> None:
        """Show where the worker is; `elapsed_s` is the time in this stage, seconds."""
        with self._lock:
            shown, line_at_s = self._shown.get((level, process), (None, 0.0))
            is_due = stage != shown or elapsed_s - line_at_s >= CI_LINE_EVERY_S
            if is_due:
                self._shown[level, process] = stage, elapsed_s
            line = self._line(level, process, stage, detail, elapsed_s)
            if self._stream.isatty():
                # A line that wraps cannot be taken back by a carriage return.
                self._stream.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            elif is_due:
                self._stream.write(f"{line}\n")
            self._stream.flush()

    def _line(self, level: str, process: int, stage: Stage, detail: str, elapsed_s: float) -> str:
        number = list(self._shown).index((level, process)) + 1
        return (
            f"[{number}/{self._workers}] {level} #{process} {stage} "
            f"{elapsed_s:.0f} s of at most {self._deadlines.of(stage):.0f} s {detail}"
        ).rstrip()

    def close(self) -> None:
        """Clear the terminal's line, so that the next writer starts on an empty one."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()
