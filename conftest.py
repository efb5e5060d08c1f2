"""Wiring only: the suite's options and hooks live in perf_tests/harness/plugin.py."""

pytest_plugins = ["perf_tests.harness.plugin"]
