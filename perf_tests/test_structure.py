"""Is every optimisation on? Counted exactly, in every process, never retried."""


def test_structure(level, suite):
    """Every proof of the level holds, and the same facts are counted as in the baseline."""
    suite.require(suite.session.structure(level))
