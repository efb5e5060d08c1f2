"""Rows of perf_tests/quarantine.toml: tests that still run and report, but do not turn the night red, for a while."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import tomllib
from typing import Any

from fluxfast.levels import LEVELS
from perf_tests.harness.schema import Verdict

LONGEST = datetime.timedelta(days=14)
TESTS = {
    "test_latency": "perf_tests/test_latency.py",
    "test_image": "perf_tests/test_fidelity.py",
    "test_step_error": "perf_tests/test_fidelity.py",
    "test_memory": "perf_tests/test_memory.py",
}
"""Tests that may be quarantined, each with one case a level, and where they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One quarantined test.

    Attributes:
        test: pytest's node id, from the repository's root.
        issue: URL where it is being mended.
        owner: who does that.
        added, expires: the row holds up to and including `expires`.
    """

    test: str
    issue: str
    owner: str
    added: datetime.date
    expires: datetime.date

    def excuse(self, verdict: Verdict) -> str:
        """What to report instead of a failure: the whole verdict, and whose turn it is."""
        return f"quarantined until {self.expires} ({self.issue}, {self.owner}): {verdict.explain()}"


def load_quarantine(path: pathlib.Path, today: datetime.date) -> dict[str, Row]:
    """Test id -> its row.

    Raises:
        ValueError: one sentence for a file that cannot be read, a row with a missing, unknown or mistyped key, expired,
            longer than 14 days, from the future, on a structure test or one that does not exist, or given twice.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise ValueError(f"{path}: the quarantine cannot be read: {error}") from error
    if unknown := sorted(document.keys() - {"quarantine"}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; a row begins with [[quarantine]]")
    tables = document.get("quarantine", [])
    if not isinstance(tables, list):
        raise ValueError(f"{path}: 'quarantine' is not a list of rows; a row begins with [[quarantine]]")
    rows: dict[str, Row] = {}
    for number, table in enumerate(tables, start=1):
        row = _row(f"{path}: row {number}", table, today)
        if row.test in rows:
            raise ValueError(f"{path}: row {number}: {row.test!r} is quarantined twice; keep one row")
        rows[row.test] = row
    return rows


def _row(where: str, table: Any, today: datetime.date) -> Row:
    types = {"test": str, "issue": str, "owner": str, "added": datetime.date, "expires": datetime.date}
    if not isinstance(table, dict) or table.keys() != types.keys():
        given = ", ".join(table) if isinstance(table, dict) else repr(table)
        raise ValueError(f"{where} has to have exactly the keys {', '.join(types)}, got {given or 'none'}")
    for key, expected in types.items():
        # type() and not isinstance(): a date with a time is a datetime.date too.
        if type(table[key]) is not expected or not table[key]:
            raise ValueError(f"{where}: {key} = {table[key]!r} is not a {'date' if expected is not str else 'text'}")
    row = Row(**table)
    if not row.issue.startswith("https://"):
        raise ValueError(f"{where}: issue = {row.issue!r} is not an https URL")
    if "test_structure" in row.test:
        raise ValueError(f"{where}: {row.test!r} counts exactly and cannot be quarantined; mend it")
    name, _, level = row.test.rpartition("::")[2].removesuffix("]").partition("[")
    if level not in LEVELS or row.test != f"{TESTS.get(name)}::{name}[{level}]":
        known = ", ".join(f"{file}::{test}" for test, file in TESTS.items())
        raise ValueError(
            f"{where}: there is no test {row.test!r}; expected {known} with [LEVEL] of {', '.join(LEVELS)}"
        )
    if row.added > today:
        raise ValueError(f"{where}: added = {row.added} is in the future, today is {today}")
    if not row.added <= row.expires <= row.added + LONGEST:
        raise ValueError(f"{where}: expires = {row.expires} is not within {LONGEST.days} days of added = {row.added}")
    if row.expires < today:
        raise ValueError(
            f"{where}: {row.test!r} is in quarantine only until {row.expires}; mend the test or remove the row, "
            f"see {row.issue}"
        )
    return row
