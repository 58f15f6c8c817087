"""The checked-in inputs: a file a target, an input a line, as Python writes it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_DIRECTORY: Final = Path(__file__).parent / "corpus"


def read_corpus(target: str) -> list[bytes]:
    """Return the inputs of a target."""
    lines = (_DIRECTORY / f"{target}.txt").read_text().splitlines()
    return [ast.literal_eval(line) for line in lines]


def write_corpus(target: str, inputs: Iterable[bytes]) -> None:
    """Replace the inputs of a target; the shortest come first."""
    _DIRECTORY.mkdir(exist_ok=True)
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    text = "".join(f"{data!r}\n" for data in ordered)
    (_DIRECTORY / f"{target}.txt").write_text(text)
