"""Is any level slower than its baseline, or does an optimisation no longer pay over its parent?"""


def test_latency(level, suite, benchmark):
    """The whole `pipeline(...)` call takes no longer than the baseline allows."""
    suite.show(level, benchmark)
    suite.require(suite.session.latency(level))
