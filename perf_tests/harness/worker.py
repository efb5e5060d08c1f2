"""Builds one level, measures it, proves it and writes one result. The suite's only way to torch.

Started by `runner` in a process of its own: torch keeps global state, CUDA forbids fork, and GPU timings differ between
processes more than within one. The protocol of stages and exit statuses is in `progress` and `exit_status`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxfast.levels import get_level
from fluxfast.workloads import Workload, get_workload
from perf_tests.harness import exit_status, faults, gpu, sanity
from perf_tests.harness.environment import device_uuid, read_environment
from perf_tests.harness.progress import TRACE_FILE, await_turn, leave, report_stage, write_result
from perf_tests.harness.schema import Measurement, Proof, Result

if TYPE_CHECKING:
    import torch

    from fluxfast.build import Built

IMAGE_FILE = "image.png"
STEP_FILE = "step_output.npy"


def main() -> None:
    """Run one worker; leaves with one of `exit_status` if it cannot give a measurement."""
    parser = argparse.ArgumentParser(prog="perf_tests.harness.worker", description=__doc__)
    parser.add_argument("--level", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--inject")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--takes-turns", action="store_true", help="import, then wait to be let on; see `progress`")
    arguments = parser.parse_args()
    out: Path = arguments.out
    report_stage(out, "load", "importing torch")
    try:
        import torch

        import fluxfast.build  # noqa: F401  everything that takes long, before the turn
        from fluxfast.errors import CheckpointError, LevelUnavailable, PackageError, StepNotApplied
    except ImportError as error:
        traceback.print_exc()
        leave(out, exit_status.IMPORT, f"a package cannot be imported: {error}")
    if arguments.takes_turns:
        await_turn(out, "load")
        report_stage(out, "load")
    try:
        write_result(out, run(arguments, out))
    except (torch.OutOfMemoryError, MemoryError) as error:
        if torch.cuda.is_available():
            print(torch.cuda.memory_summary())
        traceback.print_exc()
        leave(out, exit_status.OOM, f"out of memory: {str(error).splitlines()[0] if str(error) else 'on the host'}")
    except StepNotApplied as error:
        leave(out, exit_status.STEP_NOT_APPLIED, str(error))
    except (CheckpointError, LevelUnavailable, PackageError) as error:
        leave(out, exit_status.BAD_INPUT, str(error))
    except sanity.NonFinite as error:
        leave(out, exit_status.NON_FINITE, str(error))
    except ImportError as error:
        traceback.print_exc()
        leave(out, exit_status.IMPORT, f"a package cannot be imported: {error}")


def run(arguments: argparse.Namespace, out: Path) -> Result:
    """One level, built and measured.

    Raises:
        FluxFastError: from building or proving.
        NonFinite: if the decoded image is not finite, or a step was faster than the chip can be.
    """
    import torch

    from fluxfast.build import build

    level, workload = get_level(arguments.level), get_workload(arguments.workload)
    fault = faults.parse(arguments.inject) if arguments.inject else None
    started = time.perf_counter()
    moments: dict[str, float] = {}

    def on_stage(stage: str, detail: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # weights are made and copied asynchronously: count them as load
        moments.setdefault(stage, time.perf_counter())
        report_stage(out, "load" if stage == "load" else "apply", detail)

    built = build(
        workload,
        level,
        cache_dir=arguments.cache,
        unapplied=fault.field if fault else None,
        on_stage=on_stage,
    )
    applied = time.perf_counter()
    _strike(fault)
    device = device_uuid()
    own, snapshots = [os.getpid()], []

    def take_turn() -> None:
        if arguments.takes_turns:
            own.extend(await_turn(out, "measure"))

    def read_counters() -> None:
        if device:
            snapshots.append(gpu.read_counters(device, own))

    measurement = measure(
        built,
        workload,
        fault,
        out,
        load_s=moments["apply"] - started,
        apply_s=applied - moments["apply"],
        take_turn=take_turn,
        read_counters=read_counters,
    )
    counters = gpu.difference(*snapshots) if snapshots else None
    report_stage(out, "finish")
    sanity.require_possible_steps(workload, built.level.fields(), torch.cuda.is_available(), measurement.stages_s)
    result = Result(
        level=level.id,
        workload=workload.id,
        workload_digest=workload.digest,
        process=arguments.process,
        fields=built.level.fields(),
        unavailable=built.unavailable,
        injection=fault.spec if fault else None,
        environment=read_environment(),
        gpu_uuid=device,
        counters=counters,
        measurement=measurement,
    )
    if arguments.trace:
        report_stage(out, "finish", "trace")
        _trace(built, workload, out / TRACE_FILE)
    return result


def measure(
    built: Built,
    workload: Workload,
    fault: faults.Fault | None,
    out: Path,
    *,
    load_s: float,
    apply_s: float,
    take_turn: Callable[[], None],
    read_counters: Callable[[], None],
) -> Measurement:
    """Warm up, time, prove, and keep the image and the first step of the last timed call.

    Args:
        take_turn: waits until nobody imports; the last warm-up call comes after it, or an idle GPU would be timed.
        read_counters: called right before and right after what is timed.
    """
    import numpy as np

    from fluxfast.build import generate
    from perf_tests.harness.clock import Clock, StageClock
    from perf_tests.harness.memory import peak_bytes, weight_bytes

    def spoil(decoded: torch.Tensor) -> torch.Tensor:
        if fault is None or fault.kind != "nan-image":
            return decoded
        image = faults.apply_float_fault(fault, decoded[0].float().permute(1, 2, 0).cpu().numpy())
        return decoded.new_tensor(image).permute(2, 0, 1)[None]

    def delay(seconds: float) -> None:
        if fault and fault.kind == "latency":
            faults.stretch(seconds, fault.percent)

    offset = faults.WRONG_SEED_OFFSET if fault and fault.kind == "wrong-seed" else 0
    drawn = dataclasses.replace(workload, seed=workload.seed + offset)
    stages = StageClock(built.pipeline, Clock(built.device), spoil)
    warmup_started = time.perf_counter()
    for index in range(workload.warmup_rounds):
        if index == workload.warmup_rounds - 1:
            stages.clock.wait()
            waits_since = time.perf_counter()
            take_turn()
            warmup_started += time.perf_counter() - waits_since
        report_stage(out, "warmup", f"round {index + 1}/{workload.warmup_rounds}")
        generate(built, drawn)
    stages.clock.wait()
    warmup_s = time.perf_counter() - warmup_started
    watched = built.watch(lambda: generate(built, drawn))
    read_counters()
    rounds = []
    for index in range(workload.rounds):
        report_stage(out, "measure", f"round {index + 1}/{workload.rounds}")
        output, timed = stages.round(lambda: generate(built, drawn), delay)
        rounds.append(timed)
    read_counters()
    assert stages.decoded is not None and stages.first_step_output is not None
    # Before the proof: the fault that spoils an image copies it, and the host waits for that.
    faults.require_finite(stages.decoded.float().cpu().numpy(), f"level {built.level.id!r}: the decoded image")
    proofs = built.prove(workload.warmup_rounds + watched + workload.rounds, workload.num_inference_steps)
    np.save(out / STEP_FILE, stages.first_step_output.float().cpu().numpy())
    digest = save_image(faults.apply_image_fault(fault, np.asarray(output.images[0])), out / IMAGE_FILE)
    return Measurement(
        clock=stages.clock.kind,
        samples_s=[timed.sample_s for timed in rounds],
        wall_s=[timed.wall_s for timed in rounds],
        stages_s={name: [timed.stages_s[name] for timed in rounds] for name in rounds[0].stages_s},
        load_s=load_s,
        apply_s=apply_s,
        warmup_s=warmup_s,
        peak_memory_bytes=peak_bytes(built.pipeline, built.device, lambda: generate(built, drawn)),
        transformer_weight_bytes=weight_bytes(built.pipeline.transformer),
        proofs=[Proof(**dataclasses.asdict(fact)) for fact in proofs],
        inductor_config=built.compiler.options,
        image=IMAGE_FILE,
        image_sha256=digest,
        step_output=STEP_FILE,
    )


def save_image(image: Any, path: Path) -> str:
    """Write (height, width, 3) uint8 as PNG; its sha256."""
    from PIL import Image

    Image.fromarray(image).save(path, "PNG")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _trace(built: Built, workload: Workload, path: Path) -> None:
    """Profile one more call; a profiler that fails costs the trace, which the parent misses, not the measurement."""
    from fluxfast.build import generate
    from perf_tests.harness.trace import write_trace

    try:
        write_trace(built.pipeline, lambda: generate(built, workload), path)
    except Exception:
        traceback.print_exc()
        path.unlink(missing_ok=True)


def _strike(fault: faults.Fault | None) -> None:
    """The faults that end a worker, once the level is built."""
    import torch

    if fault is None:
        return
    if fault.kind == "hang":
        faults.hang_forever()
    if fault.kind == "segv":
        faults.segv()
    if fault.kind == "oom":
        if torch.cuda.is_available():
            torch.empty(1 << 62, dtype=torch.uint8, device="cuda")
        faults.exhaust_memory()


if __name__ == "__main__":
    main()
