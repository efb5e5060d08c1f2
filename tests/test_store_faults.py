"""Damage and murder: no damaged baseline is accepted, no killed writer harms another's file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from baseline_samples import WORKLOAD, sample_baseline, write_sample

from perf_tests.harness.files import canonical_digest, dump_json
from perf_tests.harness.recording import stock_json
from perf_tests.harness.schema import LevelBaseline, ProcessSamples
from perf_tests.harness.store import BaselineError, find_baseline, read_baseline

FORK = multiprocessing.get_context("fork")
DIGITS = {"sample": r'"samples_s": \[\s*0\.(\d)', "count": r'"observed": (\d)', "schema": r'"baseline_schema": (\d)',
          "digest": r'"fluxfast_digest": "\D*(\d)', "version": r'"torch": "(\d)', "date": r'"datetime": "(\d)',
          "median": r'"median": 0\.(\d)', "hash": r'"workload_digest": "\D*(\d)', "last": r"(\d)(?=,?\n)"}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole baseline file."""
    return write_sample(tmp_path / "cpu")


def assert_refused(path: Path, raw: bytes, *, search: bool = True) -> str:
    """The message: this content is a BaselineError of one sentence, for the reader and, if asked, for the search."""
    path.write_bytes(raw)
    with pytest.raises(BaselineError) as raised:
        read_baseline(path)
    if search:
        with pytest.raises(BaselineError):
            find_baseline(path.parent, "tiny")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def resigned(path: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file after `change`, with a digest that fits: what a careful forger or a faulty writer would leave."""
    document = json.loads(path.read_bytes())
    change(document)
    document.pop("fluxfast_digest")
    document["fluxfast_digest"] = canonical_digest(document)
    return dump_json(document)


def bf16(document: dict[str, Any]) -> dict[str, Any]:
    return document["fluxfast"]["levels"]["bf16"]


def test_every_truncation_is_refused(path: Path) -> None:
    """A small file cut at every byte, a larger one at 400 places and at each of its last 300 bytes."""
    raw = path.read_bytes()
    for cut in {*range(0, len(raw), len(raw) // 400), *range(len(raw) - 300, len(raw))}:
        assert_refused(path, raw[:cut])
    level = LevelBaseline(fields={}, processes=[ProcessSamples(samples_s=[0.2])])
    change = {"source": "published", "levels": {"bf16": level}, "reference_image": None, "reference_sha256": None}
    small = sample_baseline().model_copy(update=change)
    path.unlink()
    raw = write_sample(path.parent, "tiny", small).read_bytes()
    for cut in range(len(raw)):
        assert_refused(path, raw[:cut], search=False)


@pytest.mark.parametrize("kind", DIGITS)
def test_every_flipped_digit_is_refused(path: Path, kind: str) -> None:
    """Each class of digit, each other value of it; the last digits of floats too, where the value may not change."""
    text = path.read_text()
    places = [match.start(1) for match in re.finditer(DIGITS[kind], text)]
    assert places
    for place in places[:: max(1, len(places) // 20)]:
        for digit in set("0123456789") - {text[place]}:
            assert_refused(path, (text[:place] + digit + text[place + 1 :]).encode())


def test_every_flipped_bit_is_refused(path: Path) -> None:
    """One bit of one byte, 1500 drawn places: letters, brackets, spaces, line ends, no longer UTF-8."""
    raw, draw = path.read_bytes(), random.Random(0)
    for _ in range(1500):
        place = draw.randrange(len(raw))
        assert_refused(
            path, raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1 :], search=False
        )


@pytest.mark.parametrize("value", ["NaN", "0", "0.0", "-0.1", "Infinity", "-Infinity", "1e999", "null", '"0.1"', "true",
                                   "[0.1]", "9" * 5000])  # fmt: skip
def test_a_sample_that_is_no_time_is_refused(path: Path, value: str) -> None:
    """As text in the file; and, where it is JSON, in both parts under a digest that fits."""
    text = path.read_text()
    assert_refused(path, re.sub(r'("samples_s": \[\s*)[0-9.]+', lambda m: m[1] + value, text, count=1).encode())
    try:
        number = json.loads(value, parse_constant=lambda _: None)
        dump_json(number)
    except ValueError:
        return
    path.write_text(text)

    def both(document: dict[str, Any]) -> None:
        document["fluxfast"]["levels"]["bf16"]["processes"][0]["samples_s"][0] = number
        document["benchmarks"][1]["stats"]["data"][0] = number

    message = assert_refused(path, resigned(path, both))
    assert "levels.bf16.processes.0.samples_s.0" in message or "differ" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["fluxfast"].update(baseline_schema=0), "schema 0 is older than 1"),
        (lambda d: d["fluxfast"].update(baseline_schema=2, new=1), "schema 2 is newer than 1, .* update the checkout"),
        (lambda d: d["fluxfast"].update(baseline_schema=True), "schema True"),
        (lambda d: d["fluxfast"].pop("baseline_schema"), "schema None"),
        (lambda d: d["fluxfast"].update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda d: d.update(extra=1), "keys missing or unknown: extra"),
        (lambda d: d.pop("machine_info"), "keys missing or unknown: machine_info"),
        (lambda d: d.update(fluxfast=[]), "no 'fluxfast' block"),
        (lambda d: d.pop("fluxfast"), "plain pytest-benchmark file"),
        (lambda d: d["fluxfast"].update(levels={}), "levels: "),
        (lambda d: d["fluxfast"]["levels"].update(fa3=d["fluxfast"]["levels"].pop("bf16")), "different levels"),
        (lambda d: d["fluxfast"]["levels"].update({"../x": d["fluxfast"]["levels"].pop("bf16")}), "lower-case"),
        (lambda d: d["benchmarks"].append(d["benchmarks"][0]), "different levels or samples"),
        (lambda d: d["benchmarks"].pop(), "different levels or samples"),
        (lambda d: d["benchmarks"][0].update(name="test_latency[aoti]"), "different levels or samples"),
        (lambda d: d["benchmarks"][0]["stats"].update(median=0.1), "different levels or samples"),
        (lambda d: d["benchmarks"][0]["stats"]["data"].reverse(), "different levels or samples"),
        (lambda d: d["benchmarks"][0].pop("stats"), "not pytest-benchmark's"),
        (lambda d: d.update(benchmarks=7), "not pytest-benchmark's"),
        (lambda d: d.update(benchmarks=[3]), "not pytest-benchmark's"),
        (lambda d: d["fluxfast"].update(environment=None), "needs its environment"),
        (lambda d: d["fluxfast"].update(reference_sha256=None), "both or neither"),
        (lambda d: d["fluxfast"].update(reference_image="../../x.png"), "is not 'reference/<name>.png'"),
        (lambda d: d["fluxfast"].update(workload={}), "the workload has no id"),
        (lambda d: d["fluxfast"].update(workload={"id": "tiny"}), "needs a whole workload"),
        (lambda d: d["fluxfast"].update(workload_digest="0" * 16), "has workload_digest '0000"),
        (lambda d: d["fluxfast"]["workload"].update(seed=43), "that of its workload is"),
        (lambda d: d["fluxfast"]["workload"].update(rounds="x"), "needs a whole workload"),
        (lambda d: bf16(d)["processes"].pop(), "needs 5 processes of level 'bf16'"),
        (lambda d: bf16(d)["processes"][3]["samples_s"].pop(), "needs 3 rounds a process of level 'bf16'"),
        (lambda d: bf16(d).update(proofs=[]), "needs proofs of level 'bf16'"),
        (lambda d: bf16(d).update(peak_memory_bytes=[]), "needs peak memory of level 'bf16'"),
        (lambda d: bf16(d).update(transformer_weight_bytes=None), "needs weight bytes of level 'bf16'"),
        (lambda d: bf16(d).update(step_error=[]), "needs a step error of level 'bf16'"),
        (lambda d: d["fluxfast"].update(slug="H200 / x"), "slug: "),
        (lambda d: d["fluxfast"].update(source="guessed"), "source: "),
    ],
)
def test_a_digest_that_fits_excuses_nothing(path: Path, change: Callable[[Any], object], message: str) -> None:
    """Everything else is checked for itself, with a message that says what to do."""
    assert re.search(message, assert_refused(path, resigned(path, change)))


def test_duplicate_keys_are_refused(path: Path) -> None:
    """A parser would take the last and no one would see the first."""
    text = path.read_text()
    assert "twice in one object" in assert_refused(path, text.replace('"bf16": {', '"bf16": {}, "bf16": {', 1).encode())


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"[]", b"7", b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900,
                                 b"\xef\xbb\xbf{}", b'{"fluxfast": {"baseline_schema": 1}}'])  # fmt: skip
def test_what_is_no_baseline_is_refused(path: Path, raw: bytes) -> None:
    """Empty, binary, other JSON, nested without end."""
    assert_refused(path, raw)


@pytest.mark.parametrize("edit", [lambda t: t.replace("\n", "\r\n"), lambda t: t + "\n", lambda t: t.rstrip("\n")])
def test_another_spelling_of_the_same_values_is_refused(path: Path, edit: Callable[[str], str]) -> None:
    """The file is as it was written, to the byte."""
    assert "edited or damaged" in assert_refused(path, edit(path.read_text()).encode())


def writer(folder: Path, mark: int, started: Any) -> None:
    """Write one baseline that carries `mark`, then report its name by a file, which stands for success."""
    baseline = sample_baseline().model_copy(update={"source_note": str(mark)})
    stock_json(baseline)
    started.wait()
    path = write_sample(folder, "tiny", baseline)
    (folder.parent / "success" / f"{mark}").write_text(path.name)


def test_eight_writers_with_murders(tmp_path: Path) -> None:
    """50 rounds of 8 writers at once, some killed in the middle: every success is whole, unique and its own."""
    folder, draw = tmp_path / "cpu", random.Random(1)
    (tmp_path / "success").mkdir()
    killed = 0
    for round_ in range(50):
        started = FORK.Event()
        workers = [FORK.Process(target=writer, args=(folder, 8 * round_ + i, started)) for i in range(8)]
        for worker in workers:
            worker.start()
        started.set()
        victims = draw.sample(workers, 2) if round_ % 2 else []
        for victim in victims:
            time.sleep(draw.uniform(0, 0.05))
            os.kill(victim.pid or 0, signal.SIGKILL)
        for worker in workers:
            worker.join(30)
            assert worker.exitcode == 0 or (worker in victims and worker.exitcode == -signal.SIGKILL)
            killed += worker.exitcode == -signal.SIGKILL
    assert killed > 0
    reported = {int(p.name): p.read_text() for p in (tmp_path / "success").iterdir()}
    files = {p.name: read_baseline(p).source_note for p in folder.glob("*.json")}
    assert len(reported) >= 400 - killed
    assert len(set(reported.values())) == len(reported)
    assert all(files[name] == str(mark) for mark, name in reported.items())
    assert len({name[:4] for name in files}) == len(files)
    assert len(files) <= 400


def dying_writer(folder: Path, calls: int) -> None:
    """Write a baseline and be killed at the `calls`-th system call that matters; exit 3 if there are fewer."""
    left = calls

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    baseline = sample_baseline()
    stock_json(baseline)
    for name in ("open", "fsync", "link", "unlink", "close", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    write_sample(folder, "tiny", baseline)
    os._exit(3)


def test_killed_at_every_step(tmp_path: Path) -> None:
    """Wherever a writer dies, the older file is whole, the new one is whole or absent, and the next writer goes on."""
    for calls in range(100):
        folder = tmp_path / str(calls) / "cpu"
        older = write_sample(folder)
        worker = FORK.Process(target=dying_writer, args=(folder, calls))
        worker.start()
        worker.join(30)
        assert worker.exitcode in (-signal.SIGKILL, 3)
        for path in folder.glob("*.json"):
            read_baseline(path)
        found = find_baseline(folder, WORKLOAD.id)
        assert found is not None
        assert found >= older
        assert write_sample(folder).name == f"{int(found.name[:4]) + 1:04}_tiny.json"
        assert not list(folder.rglob("*.tmp"))
        if worker.exitcode == 3:
            assert calls > 5
            return
    raise AssertionError("the writer never got through")
