"""Faults put into a copy of the gate: test_gate.py or test_noise.py has to notice every one."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HARNESS = "perf_tests/harness"
CORE_TESTS = ("tests/test_noise.py", "tests/test_gate.py")
COPIED = (
    "fluxfast/levels.py",
    "perf_tests/__init__.py",
    *(
        f"{HARNESS}/{name}.py"
        for name in ("__init__", "cpu", "exact", "gate", "noise", "obstacles", "policy", "schema")
    ),
    "tests/gate_samples.py",
    *CORE_TESTS,
)

MUTATIONS = {
    "comparison reversed": ("noise", "(self.low > self.limit)", "(self.low < self.limit)"),
    "limit ignored": ("noise", "(self.low > self.limit)", "(self.low > 0)"),
    "interval ignored": ("noise", "low=ratio - half", "low=ratio"),
    "min for max": ("noise", "tonight.min(axis=-1) > base.max(axis=-1)", "tonight.min(axis=-1) > base.min(axis=-1)"),
    "other levels' spread ignored": ("noise", "np.minimum(alike, policy.pool_df)", "1e-9"),
    "unlike levels lend as alike ones": ("noise", "alike = np.maximum(", "alike = 1e3 + np.maximum("),
    "chance makes levels unlike": ("noise", "ddof=1) - by_chance)", "ddof=1))"),
    "one wild level for all": ("noise", "np.clip(logs, middle - reach, middle + reach)", "logs"),
    "quiet levels made alike": ("noise", "1e-4 * least", "least"),
    "no least spread": ("noise", "+ _mean_log(alike)), least)", "+ _mean_log(alike)), 0.0)"),
    "history ignored": ("noise", "np.square(nights).sum(axis=-1)", "0.0"),
    "cap removed": ("noise", "policy.floor, policy.cap)", "policy.floor, None)"),
    "confirmation dropped": ("gate", "[rule for rule in rules if second.looks_red(level, rule)]", "rules"),
    "confirmation not asked for": ("gate", 'REGRESSED, level, "unconfirmed"', 'PASS, level, "unconfirmed"'),
    "least for median": ("gate", "float(np.median(of_process))", "float(np.min(of_process))"),
    "divisor dropped": ("gate", "logs[level][:n] - logs[over][:n]", "logs[level][:n]"),
    "ladder dropped": ("gate", '("interval", "ladder") if', '("interval",) if'),
    "faster parent blamed on the child": ("gate", '(rule == "interval" or own.slower or behind)', "True"),
    "loop not looked at": ("gate", "policy=loop.policy), LOOP: loop}", "policy=loop.policy)}"),
    "loop with a ladder": ("gate", '== CALL else ("interval",)', '== CALL else ("interval", "ladder")'),
    "loop for call": ("gate", "decisive = min(", "decisive = max("),
    "error of two looks doubled": ("policy", "alpha=self.alpha / series", "alpha=self.alpha"),
    "improvement over a published number": ("gate", '.faster and first.baseline.source == "recorded"', ".faster"),
    "throttling ignored": ("obstacles", '"hw_slowdown_ns", "power_brake_ns"', '"power_brake_ns"'),
    "fidelity upside down": ("exact", '1.0 if direction(metric) == "higher', '1.0 if direction(metric) != "higher'),
    "step errors of other levels ignored": ("exact", "min(max(ranges), policy.step_error_cap)", "ranges[0]"),
    "weights only bounded": ("exact", "observed != expected.transformer", "observed > expected.transformer"),
}  # fmt: skip


def run_core_tests(copy: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *CORE_TESTS]
    # Plugins of the environment are of no use here and slow to load; hypothesis' strategies need no plugin.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": "", "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def copy(tmp_path):
    for name in COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "fluxfast" / "__init__.py").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_the_unchanged_copy_passes(copy):
    """Otherwise every mutation would be caught for the wrong reason."""
    done = run_core_tests(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_gate_is_caught(copy, name):
    """The fault is in the source exactly once, the core tests run, and one of them fails."""
    module, old, new = MUTATIONS[name]
    file = copy / HARNESS / f"{module}.py"
    source = file.read_text()
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module}.py; write the mutation anew"
    file.write_text(source.replace(old, new))
    done = run_core_tests(copy)
    assert done.returncode == 1 and "1 failed" in done.stdout, f"not caught: {done.stdout[-2000:]}"
