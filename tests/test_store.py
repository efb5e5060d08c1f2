"""Baselines and results as files: what is written is read back, what is odd is refused in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from baseline_samples import WORKLOAD, picture_png, sample_baseline, sample_failure, sample_result, write_sample
from PIL import Image

from perf_tests.harness.files import StoreError, read_png
from perf_tests.harness.recording import stock_json
from perf_tests.harness.schema import Result
from perf_tests.harness.store import (
    BaselineError,
    ResultError,
    find_baseline,
    read_baseline,
    read_result,
    result_image,
    write_baseline,
    write_result,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A slug's folder."""
    return tmp_path / "cpu"


def test_what_is_written_is_read_back(folder: Path) -> None:
    """A baseline survives its file, number 1 in an empty folder, and leaves no temporary file."""
    path = write_sample(folder)
    assert path == folder / "0001_tiny.json"
    assert read_baseline(path) == sample_baseline()
    assert sorted(p.suffix for p in folder.rglob("*") if p.is_file()) == [".json", ".png"]


def test_numbers_go_on_from_the_highest(folder: Path) -> None:
    """A gap is not filled: pytest-benchmark and we take the highest number for the newest."""
    write_sample(folder)
    write_sample(folder).rename(folder / "0041_tiny.json")
    assert write_sample(folder, "tiny.after-update").name == "0042_tiny.after-update.json"


def test_the_newest_of_the_workload_is_found(folder: Path) -> None:
    """Other workloads in the folder do not count, and an absent folder or workload is None."""
    assert find_baseline(folder, "tiny") is None
    write_sample(folder)
    newest = write_sample(folder, "tiny.note")
    named = dataclasses.replace(WORKLOAD, id="schnell")
    change = {"workload": dataclasses.asdict(named), "workload_digest": named.digest}
    other = sample_baseline().model_copy(update=change)
    write_sample(folder, "schnell", other)
    assert find_baseline(folder, "tiny") == newest
    assert find_baseline(folder, "dev") is None


def test_an_unreadable_newest_is_never_passed_over(folder: Path) -> None:
    """pytest-benchmark would warn and compare with the older file."""
    write_sample(folder)
    newest = write_sample(folder)
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.raises(BaselineError, match=r"0002_tiny.json: not JSON .* restore the file"):
        find_baseline(folder, "tiny")


@pytest.mark.parametrize("name", ["tiny.json", "0002_TINY.json", "2_tiny.json", "0002_.json", "0002_tiny.a.b.json"])
def test_a_stray_json_file_is_an_error(folder: Path, name: str) -> None:
    """The newest under a wrong name must not make an older one the newest."""
    write_sample(folder)
    write_sample(folder).rename(folder / name)
    with pytest.raises(BaselineError, match=r"expected a name like 0001_tiny\.json"):
        find_baseline(folder, "tiny")


def test_two_files_of_one_number_are_an_error(folder: Path) -> None:
    """A merge of two branches can bring that about; neither is the newest."""
    write_sample(folder)
    write_sample(folder).rename(folder / "0001_tiny.note.json")
    with pytest.raises(BaselineError, match="has the same number"):
        find_baseline(folder, "tiny")


def test_a_file_in_the_wrong_place_is_an_error(folder: Path) -> None:
    """Neither another machine's nor another workload's file is taken for one's own."""
    path = write_sample(folder)
    moved = folder.parent / "h200-700w" / path.name
    folder.rename(moved.parent)
    with pytest.raises(BaselineError, match=r"content is of workload, slug \('tiny', 'cpu'\)"):
        find_baseline(moved.parent, "tiny")
    moved.parent.rename(folder)
    path.rename(folder / "0001_schnell.json")
    with pytest.raises(BaselineError, match="content is of workload"):
        find_baseline(folder, "schnell")


def test_a_writer_may_refuse_what_it_finds(folder: Path) -> None:
    """It is asked once no one else can write, with the newest of its workload; then neither file nor image is left."""
    first, baseline = write_sample(folder), sample_baseline(reference_png=picture_png(shade=3))
    images = {str(baseline.reference_image): picture_png(shade=3)}
    before = sorted(folder.rglob("*"))
    seen = []

    def refuse(newest: Path | None) -> None:
        seen.append(newest)
        with pytest.raises(BlockingIOError), folder_descriptor(folder) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise BaselineError("another one is newer")

    with pytest.raises(BaselineError, match="another one is newer"):
        write_baseline(folder, "tiny", baseline, stock_json(baseline), images, refuse)
    assert seen == [first] and sorted(folder.rglob("*")) == before


@contextlib.contextmanager
def folder_descriptor(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_numbers_end_at_9999(folder: Path) -> None:
    """pytest-benchmark's glob has four digits; a fifth would hide the file from it."""
    write_sample(folder).rename(folder / "9999_tiny.json")
    with pytest.raises(BaselineError, match="expected a number up to 9999"):
        write_sample(folder)


@pytest.mark.parametrize("tag", ["", "TINY", "../tiny", "tiny/../x", "schnell", "tiny\0", "tiny.json.tmp", "." * 300])
def test_a_tag_cannot_leave_the_folder_or_lie(folder: Path, tag: str) -> None:
    """The tag is the workload's id and at most a note."""
    with pytest.raises(BaselineError):
        write_sample(folder, tag)
    assert not list(folder.glob("*.json"))


@pytest.mark.parametrize("name", ["../x.png", "reference/../../x.png", "/tmp/x.png", "x.png", "reference/x.json"])
def test_an_image_cannot_leave_the_folder(folder: Path, name: str) -> None:
    """Only `reference/<name>.png` is written."""
    baseline = sample_baseline(reference_png=None)
    with pytest.raises(BaselineError, match=r"is not 'reference/<name>\.png'"):
        write_baseline(folder, "tiny", baseline, stock_json(baseline), {name: picture_png()})


def test_an_image_that_an_older_baseline_needs_is_never_overwritten(folder: Path) -> None:
    """Same name with other content is refused and the old one stays whole."""
    baseline = sample_baseline()
    first = write_sample(folder)
    with pytest.raises(BaselineError, match="exists with other content"):
        write_baseline(folder, "tiny", baseline, stock_json(baseline), {baseline.reference_image: picture_png(shade=3)})
    assert read_baseline(first) == baseline


def test_a_replaced_or_missing_reference_image_is_an_error(folder: Path) -> None:
    """The reference image is part of the baseline."""
    path = write_sample(folder)
    image = folder / str(sample_baseline().reference_image)
    image.write_bytes(picture_png(shade=91))
    with pytest.raises(BaselineError, match=r"sha256 is .* the image was replaced or damaged"):
        read_baseline(path)
    image.unlink()
    with pytest.raises(BaselineError, match="cannot be read"):
        read_baseline(path)


def test_what_the_reader_would_refuse_is_not_written(folder: Path) -> None:
    """NaN, a stock part of other samples and a missing reference image are found before the file exists."""
    baseline = sample_baseline()
    level = baseline.levels["bf16"]
    broken = level.model_copy(update={"step_error": [float("nan")]})
    for odd, stock, images in (
        (baseline.model_copy(update={"levels": {"bf16": broken}}), stock_json(baseline), {}),
        (baseline.model_copy(update={"levels": {"bf16": level}}), stock_json(baseline), {}),
        (baseline, stock_json(baseline), {}),
        (baseline, {}, {baseline.reference_image: picture_png()}),
        (baseline, {**stock_json(baseline), "extra": 1}, {baseline.reference_image: picture_png()}),
    ):
        with pytest.raises(BaselineError):
            write_baseline(folder, "tiny", odd, stock, images)
    assert not list(folder.glob("*.json"))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    """An operating system error comes as BaselineError."""
    (tmp_path / "cpu").write_text("a file")
    with pytest.raises(BaselineError, match=r"cannot be written to .*; nothing was recorded"):
        write_sample(tmp_path / "cpu")


@pytest.mark.parametrize("result", [sample_result(), sample_result(measurement=None, failure=sample_failure())])
def test_results_are_read_back(tmp_path: Path, result: Result) -> None:
    """A result survives its file, measured or failed, and a second write replaces the first."""
    write_result(tmp_path / "result.json", sample_result("fp32"))
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


@pytest.mark.parametrize("name", ["../image.png", "/etc/passwd", "a/b.png", "..", ".hidden", "a\0b", ""])
def test_a_result_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    """Neither written nor read, in either of the two names."""
    good = sample_result()
    for field in ("image", "step_output"):
        odd = good.model_copy(update={"measurement": good.measurement.model_copy(update={field: name})})
        with pytest.raises(ResultError, match="plain name"):
            write_result(tmp_path / "result.json", odd)
        (tmp_path / "odd.json").write_text(odd.model_dump_json())
        with pytest.raises(ResultError, match="plain name"):
            read_result(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"result_schema": 2}, "schema 2 is newer than 1, which this checkout reads; update the checkout"),
        ({"result_schema": 0}, "schema 0 is older than 1"),
        ({"measurement": None}, "exactly one of"),
        ({"failure": sample_failure()}, "exactly one of"),
        ({"process": -1}, "process: Input should be greater"),
        ({"level": 3}, "level: Input should be a valid string"),
        (
            {"measurement": sample_result().measurement.model_copy(update={"proofs": []})},
            "measurement.proofs: List should have at least 1 item",
        ),
    ],
)
def test_an_odd_result_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """Schema, types and the choice between measurement and failure are checked."""
    path = tmp_path / "result.json"
    path.write_text(sample_result().model_copy(update=change).model_dump_json(warnings=False))
    with pytest.raises(ResultError, match=message):
        read_result(path)


def test_the_image_of_a_result_is_checked(tmp_path: Path) -> None:
    """Right sha256: an array; wrong, a link, or a failed result: an error."""
    png = picture_png()
    good = sample_result()
    update = {"image_sha256": hashlib.sha256(png).hexdigest()}
    good = good.model_copy(update={"measurement": good.measurement.model_copy(update=update)})
    path, image = tmp_path / "result.json", tmp_path / "image.png"
    image.write_bytes(png)
    assert result_image(path, good).shape == (16, 16, 3)
    with pytest.raises(ResultError, match="sha256"):
        result_image(path, sample_result())
    with pytest.raises(ResultError, match="failed and has no image"):
        result_image(path, sample_result(measurement=None, failure=sample_failure()))
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(ResultError, match="cannot be read"):
        result_image(path, good)


def test_a_png_bomb_is_not_decoded(tmp_path: Path) -> None:
    """A small file that claims 60000 x 60000 pixels is refused by its header, whoever's limit it meets first."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(StoreError):
        read_png(tmp_path / "bomb.png")
    (tmp_path / "large.png").write_bytes(picture_png(side=40))
    with pytest.raises(StoreError, match="40x40 pixels, at most 1000 are read"):
        read_png(tmp_path / "large.png", max_pixels=1000)


def test_every_truncation_of_a_png_is_one_sentence(tmp_path: Path) -> None:
    """Without a sha256 to tell, the decoder's many exceptions come as one; a lost end marker harms no pixel."""
    file, path = io.BytesIO(), tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save(file, "PNG")
    png = file.getvalue()
    for cut in range(len(png) - 24):
        path.write_bytes(png[:cut])
        with pytest.raises(StoreError):
            read_png(path)


def test_a_pipe_does_not_stop_the_reader(tmp_path: Path) -> None:
    """Opening a pipe that no one writes to would wait for ever."""
    os.mkfifo(tmp_path / "0001_tiny.json")
    with pytest.raises(BaselineError, match="not a regular file"):
        read_baseline(tmp_path / "0001_tiny.json")
