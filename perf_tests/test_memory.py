"""Does any level hold more memory than its baseline?"""

import pytest

from perf_tests.harness.suite import LEVELS


@pytest.mark.parametrize("level", LEVELS)
def test_memory(level, suite):
    """The transformer's weights take the same bytes, and the peak is no higher than the baseline allows."""
    suite.require(suite.session.memory(level))
