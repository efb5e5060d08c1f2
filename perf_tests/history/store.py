"""The history as one SQLite file. It holds nothing that the results do not: losing it loses no night.

`document` keeps environments and effective fields once each; a night has the same ones at most levels.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict, Json, TypeAdapter, ValidationError

from perf_tests.harness.files import StoreError, canonical_digest, printable
from perf_tests.harness.schema import Limit, Moment, Ratio
from perf_tests.history.night import LevelNight, Night, night_folders, read_night

NAME = "history.db"
VERSION = 1
"""`user_version` of the file; raised when the tables change. A file of another version is rebuilt, never migrated."""
APPLICATION = 0x464C5558
"""`application_id`, "FLUX": tells the history from another program's database."""
WAIT_S = 10.0
"""How long a writer waits for another one: a night is added in milliseconds."""

TABLES = """
CREATE TABLE document (digest TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE run (
    run TEXT PRIMARY KEY, date TEXT NOT NULL, slug TEXT NOT NULL, workload TEXT NOT NULL,
    workload_digest TEXT NOT NULL, method TEXT NOT NULL, baseline TEXT, exit_status INTEGER
) WITHOUT ROWID;
CREATE TABLE level (
    run TEXT NOT NULL REFERENCES run ON DELETE CASCADE, level TEXT NOT NULL, medians_s TEXT NOT NULL, value REAL,
    unit TEXT NOT NULL, ratio REAL, latency_limit REAL, fields TEXT NOT NULL REFERENCES document,
    environment TEXT REFERENCES document, mark TEXT, PRIMARY KEY (run, level)
) WITHOUT ROWID;
CREATE TABLE verdict (
    run TEXT NOT NULL REFERENCES run ON DELETE CASCADE, level TEXT NOT NULL, test TEXT NOT NULL,
    outcome TEXT NOT NULL, rule TEXT NOT NULL, excuse TEXT, message TEXT, PRIMARY KEY (run, level, test)
) WITHOUT ROWID;
CREATE INDEX series ON run (slug, workload, date);
"""

DOCUMENTS = TypeAdapter(dict[str, Json[dict[str, Any]]])


class HistoryError(StoreError):
    """A history that cannot be read or written: observed, expected, how to rebuild it."""


class DamagedHistory(HistoryError):
    """A file that no one can use as a history, so that a rebuilt one may take its place."""


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True))
class Point:
    """One night of one level, as trends and lists show it. `ratio` and `limit` are over that night's baseline."""

    run: str
    date: Moment
    slug: str
    workload: str
    level: str
    value: Ratio | None
    unit: str
    ratio: Ratio | None
    limit: Limit | None
    mark: str | None
    outcomes: str
    """`test=outcome` of every test, comma-separated, in the order of their names."""
    environment: str | None
    """Digest, for `documents`."""
    series: str
    """Workload digest and method: values of two series do not compare."""

    def outcome_by_test(self) -> dict[str, str]:
        """`outcomes`, by the name of the test."""
        pairs = (pair.partition("=") for pair in self.outcomes.split(",") if pair)
        return {test: outcome for test, _, outcome in pairs}


@contextlib.contextmanager
def opened(path: Path, *, is_new: bool = False, file: Path | None = None) -> Iterator[sqlite3.Connection]:
    """The history at `path`, for one transaction; made with its tables if `is_new` and it is not there.

    Args:
        file: opened instead, to become `path`.

    Raises:
        HistoryError: missing, locked, corrupt, of another version or program, or not a regular file.
    """
    rebuild = f"rebuild it with `python -m perf_tests history --rebuild --history {path} --results RESULTS`"
    if not is_new and not os.path.exists(path):
        raise HistoryError(f"{path}: there is no history; runs make one, or {rebuild}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise HistoryError(f"{path}: not a regular file; name another with --history")
    try:
        with contextlib.closing(sqlite3.connect(file or path, timeout=WAIT_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE" if is_new else "BEGIN")
            _check(connection, path, rebuild, is_new)
            yield connection
            connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if "no such" in str(error) or "decode" in str(error):
            raise DamagedHistory(f"{path}: {error}; the results are safe; {rebuild}") from error
        action = f"wait for the program that holds it, then {rebuild}" if "locked" in str(error) else rebuild
        raise HistoryError(f"{path}: {error}; the results are safe; {action}") from error
    except (sqlite3.DatabaseError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DamagedHistory(f"{path}: not a sound history ({said}); the results are safe; {rebuild}") from error


def _check(connection: sqlite3.Connection, path: Path, rebuild: str, is_new: bool) -> None:
    (application,), (version,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    is_empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if is_empty and application == version == 0:
        if not is_new:
            raise DamagedHistory(f"{path}: an empty file; the results are safe; {rebuild}")
        for statement in TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    elif application != APPLICATION:
        raise HistoryError(f"{path}: a database, but not a history of this suite; name another file with --history")
    elif version != VERSION:
        raise DamagedHistory(f"{path}: history version {version}, this checkout reads {VERSION}; {rebuild}")


def append(path: Path, nights: Sequence[Night], *, is_partial: bool = False) -> list[str]:
    """Add nights, all or none; a run that is there already is replaced.

    Args:
        is_partial: leave out a night that does not fit the tables, instead of raising.

    Returns:
        A sentence on each that was left out.

    Raises:
        HistoryError: nothing was added, or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise HistoryError(f"{path}: its folder cannot be made ({error}); name another with --history") from error
    if os.path.lexists(path):
        return _write(path, path, nights, is_partial)
    with _beside(path) as new:  # where writing fails, no empty file is left that is no history
        left = _write(path, new, nights, is_partial)
        try:
            os.link(new, path)
        except (OSError, ValueError):  # another run was first, or the file system has no links
            return _write(path, path, nights, is_partial)
    return left


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Name of a file that is to become `path`, in one step."""
    new = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield new
    finally:
        with contextlib.suppress(OSError, ValueError):  # mostly: not there, it was renamed
            new.unlink()


def _write(path: Path, file: Path, nights: Sequence[Night], is_partial: bool) -> list[str]:
    left = []
    with opened(path, is_new=True, file=file) as connection:
        for night in nights:
            connection.execute("SAVEPOINT night")
            try:
                _add(connection, night)
            except (sqlite3.IntegrityError, sqlite3.DataError, ValueError, OverflowError) as error:
                sentence = f"run {night.run} does not fit the history ({error}); measure again"
                if not is_partial:
                    raise HistoryError(sentence) from error
                connection.execute("ROLLBACK TO night")
                left.append(printable(sentence))
            connection.execute("RELEASE night")
    return left


def _add(connection: sqlite3.Connection, night: Night) -> None:
    connection.execute("DELETE FROM run WHERE run = ?", (night.run,))
    connection.execute(
        "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            night.run, night.date, night.slug, night.workload, night.workload_digest, night.method, night.baseline,
            night.exit_status,
        ),
    )  # fmt: skip
    for level in night.levels:
        _insert(connection, night.run, level)


def _insert(connection: sqlite3.Connection, run: str, level: LevelNight) -> None:
    connection.execute(
        "INSERT INTO level VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            run, level.level, json.dumps(level.medians_s), level.value, level.unit, level.ratio, level.limit,
            _document(connection, level.fields),
            None if level.environment is None else _document(connection, level.environment), level.mark,
        ),
    )  # fmt: skip
    connection.executemany(
        "INSERT INTO verdict VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            # The text of a pass is in verdicts.json; here it would be most of the file.
            (run, level.level, own.test, own.verdict.outcome.value, own.verdict.rule, own.excuse,
             None if own.verdict.ok else own.verdict.message)
            for own in level.judged
        ],
    )  # fmt: skip


def _document(connection: sqlite3.Connection, content: dict[str, Any]) -> str:
    digest = canonical_digest(content)[:16]
    connection.execute("INSERT OR IGNORE INTO document VALUES (?, ?)", (digest, json.dumps(content, sort_keys=True)))
    return digest


def points(path: Path, **equal: str | None) -> list[Point]:
    """Every level of every night, oldest first; `slug`, `workload`, `workload_digest`, `method`, `level`, `run` filter.

    Raises:
        HistoryError: see `opened`.
    """
    chosen = {column: value for column, value in equal.items() if value is not None}
    where = " AND ".join(f"{column} = ?" for column in chosen) or "1"
    query = f"""
        SELECT run, date, slug, workload, level, value, unit, ratio, latency_limit, mark,
            coalesce((SELECT group_concat(test || '=' || outcome) FROM verdict v
                      WHERE v.run = level.run AND v.level = level.level), ''), environment,
            workload_digest || ' ' || method
        FROM run JOIN level USING (run) WHERE {where} ORDER BY date, run"""
    with opened(path) as connection:
        return [Point(*row) for row in connection.execute(query, tuple(chosen.values()))]


def documents(path: Path) -> dict[str, dict[str, Any]]:
    """Digest -> environment or fields.

    Raises:
        HistoryError: see `opened`.
    """
    with opened(path) as connection:
        return DOCUMENTS.validate_python(dict(connection.execute("SELECT digest, json FROM document").fetchall()))


def rebuild(path: Path, results: Path) -> tuple[int, list[str]]:
    """Put every run below `results` into the history; a damaged one is set aside as `<name>.damaged`, `.damaged.2`, ...

    Nights whose folders are gone stay, if the history can be read. A new file takes a damaged one's place only when it
    is whole, so that one or the other is there at any moment.

    Returns:
        How many runs it now holds of those, and a sentence on each that was left out.

    Raises:
        StoreError: if there are no results, or the history is locked, another program's, no regular file, or cannot be
            written. It is as it was.
    """
    nights, left = [], []
    for folder in night_folders(results):
        try:
            nights.append(read_night(folder))
        except StoreError as error:
            left.append(str(error))
    try:
        _check_whole(path)
    except DamagedHistory as error:
        unfit, kept = _replace(path, nights)
        left.append(f"{error}. That file was kept as {kept.name}")
    else:
        unfit = append(path, nights, is_partial=True)
    return len(nights) - len(unfit), left + unfit


def _check_whole(path: Path) -> None:
    """Raise DamagedHistory for a file that cannot be read to its end; one that is not there, or empty, is whole."""
    if not os.path.exists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return
    with opened(path) as connection:
        (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(said)
    points(path)
    documents(path)


def _replace(path: Path, nights: Sequence[Night]) -> tuple[list[str], Path]:
    """A new file in the place of a damaged one: sentences on nights that do not fit, and where the old one now lies."""
    if path.is_symlink():
        raise HistoryError(f"{path}: a link to a damaged history; name the file itself with --history")
    with _beside(path) as new:
        unfit = _write(path, new, nights, is_partial=True)
        try:
            kept = _set_aside(path)
            os.replace(new, path)
        except OSError as error:
            raise HistoryError(f"{path}: damaged, and cannot be replaced ({error}); move it away") from error
    return unfit, kept


def _set_aside(path: Path) -> Path:
    """Give the file a second name that nothing has; it keeps its own until another takes it."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.damaged" + (f".{number}" if number > 1 else ""))
        try:
            os.link(path, kept)
            break
        except FileExistsError:
            continue
    for suffix in ("-journal", "-wal", "-shm"):  # of a writer that died: SQLite would play it into the new file
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{kept}{suffix}")
    return kept
