"""Which work is measured by default, with whose weights, and how it is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fluxfast import __main__ as command_line
from fluxfast.checkpoints import TINY as SHIPPED
from fluxfast.errors import CheckpointError
from fluxfast.machine import Machine
from fluxfast.workloads import HUB_NAME, REVISIONS, TINY, WORKLOADS, get_workload
from perf_tests.harness.sanity import NonFinite, require_possible_steps, step_tflop

ROOT = Path(__file__).parents[1]
CPU = Machine(device="cpu", capability=None, fa3_module=None, triton=True)
ADA = Machine(device="cuda", capability=(8, 9), fa3_module=None, triton=True)
HOPPER = Machine(device="cuda", capability=(9, 0), fa3_module=None, triton=True)
SCHNELL, DEV = WORKLOADS["schnell"], WORKLOADS["dev"]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(cache: Path, checkpoint: str, folder: Path) -> Path:
    """`folder` as the snapshot of a pinned checkpoint, as `hf download` lays it out."""
    repo, _, revision = checkpoint.partition("@")
    snapshots = cache / f"models--{repo.replace('/', '--')}" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / revision).symlink_to(folder)
    return snapshots / revision


def test_workload_of_the_published_numbers() -> None:
    """What flux-fast timed; FLUX.1-dev beside it, with its own steps, guidance and text length."""
    assert SCHNELL.call_arguments() == {
        "prompt": "A cat playing with a ball of yarn", "height": 1024, "width": 1024, "num_inference_steps": 4,
        "guidance_scale": 0.0, "max_sequence_length": 256,
    }  # fmt: skip
    assert (SCHNELL.seed, SCHNELL.warmup_rounds, SCHNELL.rounds) == (42, 3, 10)
    assert (DEV.num_inference_steps, DEV.guidance_scale, DEV.max_sequence_length) == (28, 3.5, 512)


def test_digest_of_the_cpu_baselines_has_not_moved() -> None:
    """A field that came later and is None does not part a baseline from its workload."""
    paths = list((ROOT / "baselines").glob("cpu-*/*_tiny.json"))
    assert paths
    assert {json.loads(path.read_text())["fluxfast"]["workload_digest"] for path in paths} == {TINY.digest}
    assert dataclasses.replace(TINY, input_image="still_life_1").digest != TINY.digest


@pytest.mark.parametrize("machine", [CPU, ADA])
def test_tiny_is_the_default_without_a_hopper(machine: Machine) -> None:
    """The full shape would take minutes a step there."""
    workload, why = command_line.default_workload(machine)
    assert workload == TINY and machine.device in why


def test_default_on_a_hopper_follows_the_cache(hub_cache: Path) -> None:
    """Random weights until the pinned revision is here whole; the reason says how to fetch it."""
    workload, why = command_line.default_workload(HOPPER)
    assert workload == SCHNELL and "hf download black-forest-labs/FLUX.1-schnell --revision" in why
    snapshot = put_in_cache(hub_cache, REVISIONS["schnell"], SHIPPED)
    assert command_line.default_workload(HOPPER)[0] == WORKLOADS["schnell-hub"]
    snapshot.unlink()
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot / "model_index.json").write_bytes((SHIPPED / "model_index.json").read_bytes())
    workload, why = command_line.default_workload(HOPPER)
    assert workload == SCHNELL and "config.json is missing" in why and "hf download" in why


def test_chosen_workload_is_looked_for_before_anything_is_measured(hub_cache: Path, tmp_path: Path) -> None:
    """A checkpoint that is not here is one error, not one a level."""
    for id in ("dev-hub", "kontext-hub-full", f"schnell@{tmp_path}/nowhere"):
        with pytest.raises(CheckpointError, match=r"is not in the local|is no folder"):
            command_line.chosen_workload(id)
    assert command_line.chosen_workload(f"tiny@{SHIPPED}")[1] == f"checkpoint {SHIPPED}"


def test_released_weights_are_pinned_and_draw_real_images() -> None:
    """Every -hub workload differs from its own in checkpoint alone, and its images are judged."""
    for id, checkpoint in REVISIONS.items():
        own, released = WORKLOADS[id], WORKLOADS[f"{id}-hub"]
        assert HUB_NAME.fullmatch(checkpoint) and released.checkpoint == checkpoint
        assert dataclasses.replace(released, id=own.id, checkpoint=own.checkpoint) == own
        assert own.has_random_weights and not released.has_random_weights


def test_full_graph_is_a_workload_of_its_own() -> None:
    """The scope is in the digest and the id, so that neither baseline judges the other."""
    for id, workload in WORKLOADS.items():
        if workload.compile_scope == "blocks":
            full = get_workload(f"{id}-full")
            assert full == dataclasses.replace(workload, id=full.id, compile_scope="full")
    assert len({workload.digest for workload in WORKLOADS.values()}) == len(WORKLOADS)


def test_other_checkpoint_behind_a_workload(tmp_path: Path) -> None:
    """A pinned Hub id or a folder replaces the weights and nothing else; the name tells them apart."""
    for checkpoint in ("owner/name@" + "0123456789" * 4, str(tmp_path)):
        workload = get_workload(f"dev-full@{checkpoint}")
        assert (workload.checkpoint, workload.compile_scope) == (checkpoint, "full")
        assert dataclasses.replace(workload, id="dev", checkpoint=DEV.checkpoint, compile_scope="blocks") == DEV
        assert workload.digest != WORKLOADS["dev-full"].digest


@pytest.mark.parametrize("id", ["dev@", "dev@folder", "dev@owner/name", "dev@owner/name@main", "dev@synthetic-2"])
def test_checkpoint_that_is_not_pinned_is_refused(id: str) -> None:
    """A branch moves, and a relative path is another one for the worker."""
    with pytest.raises(ValueError, match=re.escape(f"workload {id!r}: expected owner/name@<40-hex revision>")):
        get_workload(id)


def test_step_cannot_beat_the_chip() -> None:
    """Every full-size workload has a floor from its own sequence length; tiny and a CPU have none."""
    assert step_tflop(SCHNELL.tokens) == pytest.approx(69.47, rel=0.001)
    assert step_tflop(DEV.tokens) == pytest.approx(74.38, rel=0.001)
    fields, steps = {"quantization": "none"}, {"step_0": [0.060], "decode": [0.001]}
    for id in ("schnell", "schnell-full", "schnell-hub", "dev-hub-full", "kontext"):
        with pytest.raises(NonFinite, match=r"a step took 60.0 ms"):
            require_possible_steps(WORKLOADS[id], fields, True, steps)
    require_possible_steps(SCHNELL, {"quantization": "float8_tensorwise"}, True, steps)
    with pytest.raises(NonFinite):
        require_possible_steps(WORKLOADS["kontext"], {"quantization": "float8_tensorwise"}, True, steps)
    require_possible_steps(TINY, fields, True, steps)
    require_possible_steps(SCHNELL, fields, False, steps)
