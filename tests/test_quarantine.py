"""The quarantine: short, owned, never for structure."""

from __future__ import annotations

import datetime
import pathlib
import re

import pytest

from perf_tests.harness.quarantine import TESTS, load_quarantine
from perf_tests.harness.schema import Outcome, Verdict

TODAY = datetime.date(2026, 3, 10)
ROW = {
    "test": '"perf_tests/test_latency.py::test_latency[fa3_fp8]"',
    "issue": '"https://github.com/o/r/issues/1"',
    "owner": '"someone"',
    "added": "2026-03-01",
    "expires": "2026-03-15",
}


def write(path: pathlib.Path, *rows: dict[str, str]) -> pathlib.Path:
    text = "".join("[[quarantine]]\n" + "".join(f"{k} = {v}\n" for k, v in row.items()) for row in rows)
    file = path / "quarantine.toml"
    file.write_text(text)
    return file


def test_a_row_holds_up_to_and_including_its_last_day(tmp_path):
    """The excuse carries the whole verdict, the issue and the owner."""
    rows = load_quarantine(write(tmp_path, ROW), datetime.date(2026, 3, 15))
    row = rows["perf_tests/test_latency.py::test_latency[fa3_fp8]"]
    verdict = Verdict(outcome=Outcome.REGRESSED, level="fa3_fp8", rule="interval", message="slower.")
    excuse = row.excuse(verdict)
    assert verdict.explain() in excuse and "issues/1" in excuse and "someone" in excuse and "2026-03-15" in excuse


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expires": "2026-03-09"}, "only until 2026-03-09"),
        ({"expires": "2026-03-16"}, "not within 14 days"),
        ({"expires": "2026-02-28"}, "not within 14 days"),
        ({"added": "2026-03-11"}, "in the future"),
        ({"test": '"perf_tests/test_structure.py::test_structure[aoti]"'}, "cannot be quarantined"),
        *(
            ({"test": f'"perf_tests/{test}"'}, "there is no test")
            for test in (
                "test_latency.py::test_latency[nosuch]",
                "test_latency.py::test_latency",
                "test_latency.py::test_latency[aoti",
                "test_latency.py::test_image[aoti]",
                "test_latency.py::test_speed[aoti]",
                "test_latency.py",
            )
        ),
        ({"issue": '"later"'}, "not an https URL"),
        ({"owner": '""'}, "owner = ''"),
        ({"owner": "3"}, "owner = 3"),
        ({"expires": "2026-03-12T00:00:00"}, "is not a date"),
        ({"expires": '"2026-03-12"'}, "is not a date"),
        ({"reason": '"flaky"'}, "exactly the keys"),
        ({"issue": None}, "exactly the keys"),
    ],
)
def test_a_bad_row_fails_collection_in_one_sentence(tmp_path, change, words):
    """Expired, too long, unowned, mistyped or on a structure test: the error names file, row and fault."""
    row = {key: value for key, value in (ROW | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"quarantine\.toml: row 1") as error:
        load_quarantine(write(tmp_path, row), TODAY)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["quarantine = 3", "[[quarantin]]", "[[quarantine]", "quarantine = [3]", "\xff"])
def test_a_bad_file_fails_collection(tmp_path, text):
    """Another table, no list, no TOML, no UTF-8."""
    file = tmp_path / "quarantine.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"quarantine\.toml"):
        load_quarantine(file, TODAY)


def test_every_test_but_structure_can_be_named(tmp_path):
    """The table of tests is that of the files."""
    folder = pathlib.Path(__file__).parents[1] / "perf_tests"
    found = {
        name: f"perf_tests/{path.name}"
        for path in folder.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(level, suite", path.read_text(), re.MULTILINE)
    }
    assert found.pop("test_structure") and found == TESTS
    names = [f"{file}::{test}[aoti]" for test, file in TESTS.items()]
    rows = [ROW | {"test": f'"{name}"'} for name in names]
    assert list(load_quarantine(write(tmp_path, *rows), TODAY)) == names


def test_a_missing_file_and_a_row_given_twice_fail(tmp_path):
    """Neither is taken for an empty quarantine or for the later row."""
    with pytest.raises(ValueError, match="cannot be read"):
        load_quarantine(tmp_path / "quarantine.toml", TODAY)
    with pytest.raises(ValueError, match="quarantined twice"):
        load_quarantine(write(tmp_path, ROW, ROW), TODAY)


def test_the_committed_quarantine_can_be_read():
    """Today, so that an expired row turns this test red too."""
    path = pathlib.Path(__file__).parents[1] / "perf_tests" / "quarantine.toml"
    load_quarantine(path, datetime.datetime.now(datetime.UTC).date())
