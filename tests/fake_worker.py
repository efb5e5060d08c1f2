"""Stands in for the worker: same arguments and protocol, no torch; `--behave` says how it ends."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fluxfast.levels import get_level
from fluxfast.workloads import get_workload
from perf_tests.harness import exit_status, faults
from perf_tests.harness.progress import (
    RESULT_FILE,
    STAGES,
    TRACE_FILE,
    await_turn,
    leave,
    report_stage,
    write_result,
)
from perf_tests.harness.schema import Measurement, Proof, Result


def result_of(arguments: argparse.Namespace) -> Result:
    """What a healthy worker would have measured."""
    return Result(
        level=arguments.level,
        workload=arguments.workload,
        workload_digest=get_workload(arguments.workload).digest,
        process=arguments.process,
        fields=get_level(arguments.level).fields(),
        unavailable={},
        injection=arguments.inject,
        environment=None,
        measurement=Measurement(
            clock="wall",
            samples_s=[0.1, 0.1],
            wall_s=[0.1, 0.1],
            stages_s={"text_encode": [0.01], "step_0": [0.02], "decode": [0.03], "postprocess": [0.01]},
            load_s=0.1,
            apply_s=0.1,
            warmup_s=0.1,
            peak_memory_bytes=1,
            transformer_weight_bytes=1,
            proofs=[Proof(field="dtype", what="parameters", observed=7, expected=7)],
            inductor_config={},
            image="image.png",
            image_sha256="0" * 64,
            step_output="step.npy",
        ),
    )


def start_grandchild(out: pathlib.Path) -> None:
    """Leave a process running, as Inductor's compile pool may be; its number goes into `grandchild`."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "grandchild").write_text(str(child.pid))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--level", "--workload", "--inject", "--behave", "--hang-in"):
        parser.add_argument(name)
    parser.add_argument("--process", type=int)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--cache", type=pathlib.Path)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--takes-turns", action="store_true")
    arguments = parser.parse_args()
    out, behave = arguments.out, arguments.behave
    (out / "pid").write_text(str(os.getpid()))
    if arguments.takes_turns:
        report_stage(out, "load", "importing")
        if behave == "import":
            act(arguments, behave, out)
        time.sleep(0.3)
        if behave == "impatient":
            threading.Timer(1.0, os._exit, [1]).start()
        await_turn(out, "load")
    for stage in STAGES:
        if arguments.takes_turns and stage == "measure":
            (out / "waiting").write_text(json.dumps(await_turn(out, "measure")))
        report_stage(out, stage, f"{stage} 1/1")
        if arguments.hang_in == stage:
            while behave == "circle":
                report_stage(out, "load", "again")
                report_stage(out, stage, "and again")
                time.sleep(0.05)
            time.sleep(600)
        if stage == "measure":
            act(arguments, behave, out)
    if arguments.trace:
        (out / TRACE_FILE).write_bytes(b"")
    if behave == "torn":
        (out / RESULT_FILE).write_text(result_of(arguments).model_dump_json()[:-40])
    elif behave == "forgetful":
        write_result(out, result_of(arguments).model_copy(update={"injection": None}))
    elif behave != "silent":
        write_result(out, result_of(arguments))
    if behave == "slow":
        time.sleep(1.0)
    if behave == "late-crash":
        faults.segv()
    if behave == "lingers":
        time.sleep(600)


def act(arguments: argparse.Namespace, behave: str | None, out: pathlib.Path) -> None:
    """Go wrong as told, in the stage `measure`."""
    match behave:
        case "raise":
            for number in range(200):
                print(f"log line {number}")
            raise RuntimeError("the model said no")
        case "oom":
            leave(out, exit_status.OOM, "the device has no memory left")
        case "step-not-applied":
            leave(out, exit_status.STEP_NOT_APPLIED, "level 'compile' is on but 0 of 57 blocks are compiled")
        case "bad-input":
            leave(out, exit_status.BAD_INPUT, "the checkpoint has no file vae/config.json")
        case "import":
            leave(out, exit_status.IMPORT, "No module named 'torch'")
        case "non-finite":
            leave(out, exit_status.NON_FINITE, "the decoded image has 192 NaN")
        case "segv":
            faults.segv()
        case "killed":
            os.kill(os.getpid(), 9)
        case "hang":
            start_grandchild(out)
            faults.hang_forever()
        case "grandchild":
            start_grandchild(out)
        case "environment" | "slow" | "very slow":
            (out / "environment").write_text("\n".join(f"{name}={value}" for name, value in os.environ.items()))
            assert sys.stdin.read() == ""
            time.sleep({"environment": 0.0, "slow": 0.5, "very slow": 3.0}[behave])


if __name__ == "__main__":
    main()
