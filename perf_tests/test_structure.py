"""Is every optimisation on? Counted exactly, in every process, never retried."""

import pytest

from perf_tests.harness.suite import LEVELS


@pytest.mark.parametrize("level", LEVELS)
def test_structure(level, suite):
    """Every proof of the level holds, and the same facts are counted as in the baseline."""
    suite.require(suite.session.structure(level))
