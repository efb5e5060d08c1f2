"""The commands that a red run printed, read back from its JUnit file: a job asks what a person would paste."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

COMMAND: Final = ["python", "-m", "perf_tests", "bisect"]
INDEX_OPTION: Final = "--index-url"
"""Printed with the name of a variable, which no shell fills in here: whoever asks gives the option."""


def printed_questions(junit: Path) -> list[list[str]]:
    """The arguments of every `python -m perf_tests bisect` command in the red tests, in their order, none twice.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        cases = list(ElementTree.parse(junit).iter("failure"))
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"--junit {junit}: not the JUnit XML of a run ({error})") from error
    questions: list[list[str]] = []
    for case in cases:
        for line in f"{case.text or ''}".splitlines():
            if not line.startswith(" ".join(COMMAND)):
                continue
            words = _without_index(shlex.split(line)[len(COMMAND) :])
            if words not in questions:
                questions.append(words)
    return questions


def asked_by(junit: Path, more: Sequence[str]) -> list[str] | None:
    """The first question with the caller's own options behind it; None if no red test names a moved package.

    Raises:
        ValueError: if the file cannot be read.
    """
    questions = printed_questions(junit)
    return [*questions[0], *more] if questions else None


def _without_index(words: Sequence[str]) -> list[str]:
    if INDEX_OPTION not in words:
        return list(words)
    at = words.index(INDEX_OPTION)
    return [*words[:at], *words[at + 2 :]]
