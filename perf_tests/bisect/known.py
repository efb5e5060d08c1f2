"""What the stored nights already say of the good version, before an environment is built."""

from __future__ import annotations

from pathlib import Path

from perf_tests.bisect.oracle import split_test
from perf_tests.bisect.state import Question
from perf_tests.bisect.versions import VersionError, same
from perf_tests.harness.culprit import version_of
from perf_tests.harness.runner import ROOT
from perf_tests.harness.schema import Outcome
from perf_tests.history import store

DEFAULT = ROOT / "results" / store.NAME


def require_good(history: Path, question: Question) -> None:
    """Look up the nights that ran the good version; a history without such a night says nothing.

    Nor does the default one where it is not there: no night was yet.

    Raises:
        VersionError: the test was red in some of them and passed in none.
        HistoryError: the history cannot be read, or another than the default was named and is not there.
    """
    if history == DEFAULT and not history.exists():
        return
    (name, level), good = split_test(question.test), question.versions[0]
    environments = store.documents(history)
    nights: dict[str, str] = {}
    for point in store.points(history, level=level, workload=question.workload):
        version = version_of(question.axis, environments.get(point.environment or "", {}))
        outcome = point.outcome_by_test().get(name)
        if version and outcome and same(good, version):
            nights[point.run] = outcome
    bad = {Outcome.REGRESSED, Outcome.ERROR} if question.bad_is_error else {Outcome.REGRESSED}
    red = [run for run, outcome in nights.items() if outcome in bad]
    if red and not {Outcome.PASS, Outcome.IMPROVED} & set(nights.values()):
        raise VersionError(
            f"--good {good} is bad already: {question.test} was red in {len(red)} of {len(nights)} stored night(s) "
            f"with {question.axis} {good}, last in {red[-1]}, and passed in none; name an earlier --good, or another "
            "--history"
        )
