"""Exit statuses by which a worker says why it gave no measurement. Both sides of the process boundary import this."""

from __future__ import annotations

from typing import Final

from perf_tests.harness.schema import ErrorKind

OOM: Final = 10
"""The device or the host had no memory left."""
STEP_NOT_APPLIED: Final = 11
"""An optimisation of the level had no effect."""
BAD_INPUT: Final = 12
"""The user named something that is not there or not whole: one sentence, no traceback."""
IMPORT: Final = 13
"""A package could not be imported."""
NON_FINITE: Final = 14
"""A number that cannot be: a NaN in the image, a step faster than the chip."""

KINDS: Final[dict[int, ErrorKind]] = {
    OOM: ErrorKind.OOM,
    STEP_NOT_APPLIED: ErrorKind.STEP_NOT_APPLIED,
    BAD_INPUT: ErrorKind.BAD_INPUT,
    IMPORT: ErrorKind.IMPORT,
    NON_FINITE: ErrorKind.NON_FINITE,
}
"""Any other positive status is `ErrorKind.EXCEPTION`; a negative one is the signal of an `ErrorKind.CRASH`."""
