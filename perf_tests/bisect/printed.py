"""The commands that a red run printed, read back from its JUnit file: a job asks what a person would paste.

    python3 -m perf_tests.bisect.printed junit.xml

prints them; the exit status is 1 if there is none, 2 if the file cannot be read. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

COMMAND: Final = ["python", "-m", "perf_tests", "bisect"]
PROPERTY: Final = "bisect"
"""Of a red test, one a command: what a worker logged is in the failure's text, and none of it is a question."""
INDEX_OPTION: Final = "--index-url"
"""Printed with the name of a variable, which no shell fills in here: whoever asks gives the option."""


def printed_questions(junit: Path) -> list[list[str]]:
    """The arguments of every `python -m perf_tests bisect` command of the red tests, in their order, none twice.

    Raises:
        ValueError: if the file cannot be read or holds another command.
    """
    try:
        properties = list(ElementTree.parse(junit).iter("property"))
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"--junit {junit}: not the JUnit XML of a run ({error})") from error
    questions: list[list[str]] = []
    for line in [one.get("value", "") for one in properties if one.get("name") == PROPERTY]:
        try:
            words = shlex.split(line)
        except ValueError:  # an open quote
            words = []
        if words[: len(COMMAND)] != COMMAND:
            raise ValueError(f"--junit {junit}: the property {PROPERTY!r} is no command of the suite: {line[:80]!r}")
        question = _without_index(words[len(COMMAND) :])
        if question not in questions:
            questions.append(question)
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


def main(arguments: Sequence[str]) -> int:
    """Print the questions of the file that is named."""
    parser = argparse.ArgumentParser(prog="python3 -m perf_tests.bisect.printed", description=__doc__)
    parser.add_argument("junit", type=Path)
    try:
        questions = printed_questions(parser.parse_args(arguments).junit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for question in questions:
        print(shlex.join([*COMMAND, *question]))
    return 0 if questions else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
