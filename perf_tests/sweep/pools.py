"""Which pool a command gets: a Ray cluster, or this machine where Ray is not installed."""

from __future__ import annotations

from collections.abc import Callable

from perf_tests.sweep.dispatch import Pool
from perf_tests.sweep.serial import SerialPool
from perf_tests.sweep.work import describe_machine


def open_pool(ray: str, say: Callable[[str], None]) -> Pool:
    """The running cluster (`auto`), one of this machine (`local`), or this machine without Ray, which is said.

    Raises:
        ConnectionError: if no cluster runs.
        ValueError: if this machine cannot tell what it is.
    """
    try:
        from perf_tests.sweep.ray_pool import RayPool
    except ImportError:
        say("Ray is not installed (`pip install -e '.[sweep]'`): one after another on this machine")
        return SerialPool(describe_machine())
    return RayPool("auto" if ray == "auto" else None)
