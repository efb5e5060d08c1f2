"""`python -m perf_tests merge`: the processes of several runs of one kind of machine as one run.

    python -m perf_tests merge results/A results/B -o results/BOTH
    pytest perf_tests --replay results/BOTH --record-baseline

So that two GPUs of a kind record a baseline in half the time, each with half of its processes, and the spread between
the GPUs is in it. Confirmations stay behind: they belong to the run that looked red.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perf_tests.harness import store
from perf_tests.harness.files import StoreError, write_over
from perf_tests.harness.replay import ReadOnlySession, open_run
from perf_tests.harness.stored_run import RUN_FILE, read_facts

SAME = ("slug", "workload", "workload_digest", "levels", "unavailable")
"""What runs have to agree on, of `RunFacts`."""


def merge(folders: Sequence[Path], out: Path) -> None:
    """Copy the results of all `folders` into a new run, their processes numbered on.

    Args:
        folders: of at least two runs. out: must not exist; complete or not there at all.

    Raises:
        StoreError: one sentence: a folder is no run, is partial or named twice, the runs differ in what they measured,
            on what and with what, or `out` exists.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise StoreError(f"expected two different runs or more, got {', '.join(map(str, folders))}")
    if out.exists():
        raise StoreError(f"{out} exists already: name a new folder")
    facts = [read_facts(folder) for folder in folders]
    for name in SAME:
        for folder, own in zip(folders, facts, strict=True):
            one, other = getattr(own, name), getattr(facts[0], name)
            if one != other:
                raise StoreError(f"{folder} and {folders[0]} differ in {name}: {one!r} and {other!r}")
    sessions = [open_run(folder, None) for folder in folders]
    _require_one_environment(folders, sessions)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as temporary:
        whole = Path(temporary) / out.name
        for level in sessions[0].results:
            number = 0
            for session in sessions:
                for index, result in enumerate(session.results[level]):
                    place = whole / level / str(number)
                    shutil.copytree(session.place(level, index), place, symlinks=True)
                    store.write_result(place / "result.json", result.model_copy(update={"process": number}))
                    number += 1
        all_facts = facts[0].model_copy(update={"processes": sum(own.processes for own in facts)})
        write_over(whole / RUN_FILE, all_facts.model_dump_json(indent=1).encode())
        whole.rename(out)


def _require_one_environment(folders: Sequence[Path], sessions: Sequence[ReadOnlySession]) -> None:
    known = [session.environment.model_dump() if session.environment else {} for session in sessions]
    for folder, own in zip(folders, known, strict=True):
        if odd := sorted(name for name in own | known[0] if own.get(name) != known[0].get(name)):
            told = ", ".join(f"{name} {own.get(name)!r} and {known[0].get(name)!r}" for name in odd)
            raise StoreError(f"{folder} and {folders[0]} were measured in different environments: {told}")


def main(arguments: Sequence[str]) -> int:
    """Run the command; 2 after one sentence on stderr if the runs cannot be one."""
    parser = argparse.ArgumentParser(prog="python -m perf_tests merge", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, as in results/<run>")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the new run; must not exist")
    options = parser.parse_args(arguments)
    try:
        merge(options.runs, options.out)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(options.runs)} runs as one (judge it with pytest perf_tests --replay {options.out})")
    return 0
