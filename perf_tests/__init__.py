"""The performance suite: `pytest perf_tests --benchmark-compare`."""
