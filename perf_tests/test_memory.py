"""Does any level hold more memory than its baseline?"""


def test_memory(level, suite):
    """The transformer's weights take the same bytes, and the peak is no higher than the baseline allows."""
    suite.require(suite.session.memory(level))
