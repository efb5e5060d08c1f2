"""Errors of this package. Each message says what was observed, what was expected, and what to do."""

from __future__ import annotations


class FluxFastError(Exception):
    """Root of the package's own errors."""


class StepNotApplied(FluxFastError):
    """A level's field is on, and a count shows that it had no effect: its timing would repeat its parent's."""


class LevelUnavailable(FluxFastError):
    """This machine cannot run what the level adds to its parent."""


class CheckpointError(FluxFastError):
    """A checkpoint is missing, incomplete or damaged."""


class PackageError(FluxFastError):
    """A compiled package does not belong to this machine, these versions or this model."""
