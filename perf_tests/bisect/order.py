"""What happens on a machine of the pool: a version's environment, one run of the suite in it, the run's files back."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from perf_tests.bisect import environments
from perf_tests.bisect.environments import BuildError, Recipe
from perf_tests.bisect.machines import BASELINES, ENVIRONMENTS, Build, Judge, not_judged
from perf_tests.bisect.state import Judged, Question
from perf_tests.harness.files import locked
from perf_tests.sweep.gather import read_tree, write_tree
from perf_tests.sweep.work import Delivery

JUDGED_FILE: Final = "judged.json"
"""In a run's folder: what was found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """One run of one version.

    Attributes:
        place: where the run will lie once it is gathered.
        folder: of this search on the machine, for environments.
        kept: versions whose environments stay on the machine: the bracket's and this step's.
        baselines: to judge by; none to record them, or to judge by those of the machine's checkout or by none.
        build: makes the environment.
        run_suite: judges, or records.
    """

    question: Question
    version: str
    recipe: Recipe
    place: Path
    folder: Path
    kept: Collection[str]
    baselines: Mapping[str, bytes]
    build: Build
    run_suite: Judge

    def run(self) -> Delivery:
        """The files of the run's folder and `judged.json`; what was recorded below `baselines`."""
        try:
            return self._run()
        except (BuildError, OSError) as error:
            ended = not_judged(error, self.place)
            return Delivery({}, ended) if isinstance(ended, str) else Delivery({JUDGED_FILE: _dump(ended)})

    def _run(self) -> Delivery:
        # Whatever else runs on this machine for this search belongs to the same step.
        environments.prune(self.folder / ENVIRONMENTS, self.kept)
        with locked(self.folder / "locks" / self.version):
            python = self.build(self.recipe, self.version, self.folder / ENVIRONMENTS / self.version)
        with tempfile.TemporaryDirectory(prefix="fluxfast-bisect-") as scratch:
            baselines = Path(scratch, BASELINES)
            write_tree(baselines, self.baselines)
            own = {"baseline_folder": str(baselines)} if self.question.baseline_folder else {}
            since = time.monotonic()
            judged = self.run_suite(self.question.model_copy(update=own), python, Path(scratch, "runs"))
            suite_s = time.monotonic() - since
            files = read_tree(Path(judged.folder))
            why = judged.why.replace(judged.folder, str(self.place))
            judged = judged.model_copy(update={"folder": str(self.place), "why": why})
            if not self.baselines:
                files |= {f"{BASELINES}/{name}": raw for name, raw in read_tree(baselines).items()}
            return Delivery(files | {JUDGED_FILE: _dump(judged)}, worker_s=suite_s)


def _dump(judged: Judged) -> bytes:
    return judged.model_dump_json(indent=1).encode()
