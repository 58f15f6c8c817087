"""What every benchmark shares: tables, figures with limits, plots, and their files."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import attrs
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from rich.console import Console
from rich.table import Table


@attrs.frozen
class Grid:
    """A table: one text for each column, in each row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@attrs.frozen(kw_only=True)
class Figure:
    """One measured number, and what it should come to."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether it is within its limits."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def cells(self) -> tuple[str, str, str, str]:
        """Say it as a row: name, value, limit, verdict."""
        low = "" if self.at_least is None else f"≥ {self.at_least:g}"
        high = "" if self.at_most is None else f"≤ {self.at_most:g}"
        limit = " ".join(filter(None, (low, high)))
        verdict = ("yes" if self.reached else "NOT REACHED") if limit else ""
        return self.name, f"{self.value:.3g} {self.unit}".strip(), limit, verdict


class Report:
    """What one benchmark found. Reads ``--out`` and ``--strict`` from *argv*."""

    def __init__(self, name: str, argv: Sequence[str] | None = None) -> None:
        options = argparse.ArgumentParser(name)
        options.add_argument("--out", type=Path, default=Path("build/bench"))
        options.add_argument("--strict", action="store_true")
        given = options.parse_args(argv)
        self._name = name
        self._out: Path = given.out
        self._strict: bool = given.strict
        self._tables: list[Grid] = []
        self._figures: list[Figure] = []
        self._out.mkdir(parents=True, exist_ok=True)

    def table(
        self, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]
    ) -> None:
        """Add a table."""
        texts = tuple(tuple(map(str, row)) for row in rows)
        self._tables.append(Grid(title, tuple(columns), texts))

    def figure(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a number, and the limits that it should keep.

        Raises:
            ValueError: If it is none that JSON can say.
        """
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        figure = Figure(
            name=name, value=value, unit=unit, at_least=at_least, at_most=at_most
        )
        self._figures.append(figure)

    def plot(self, name: str, draw: Callable[[Canvas], None]) -> None:
        """Write what *draw* draws as ``NAME-name.svg``; equal data give equal bytes."""
        with rc_context({"svg.hashsalt": self._name}):
            canvas = Canvas(layout="constrained")
            draw(canvas)
            path = self._out / f"{self._name}-{name}.svg"
            canvas.savefig(path, metadata={"Date": None})

    def finish(self) -> int:
        """Print all, and write ``NAME.json`` and ``NAME.md``.

        Returns:
            The exit code: 1 if a limit is not kept and ``--strict`` was given.
        """
        rows = tuple(figure.cells() for figure in self._figures)
        columns = ("figure", "value", "limit", "reached")
        figures = Grid(f"Figures of {self._name}", columns, rows)
        grids = [*self._tables, *([figures] if rows else [])]
        for grid in grids:
            _print(grid)
        found = {
            "machine": {"python": platform.python_version(), "cpus": os.cpu_count()},
            "figures": [attrs.asdict(figure) for figure in self._figures],
            "tables": [attrs.asdict(grid) for grid in self._tables],
        }
        text = json.dumps(found, ensure_ascii=False, indent=1)
        (self._out / f"{self._name}.json").write_text(text + "\n", "utf-8")
        page = "\n".join(map(_markdown, grids))
        (self._out / f"{self._name}.md").write_text(page, "utf-8")
        missed = not all(figure.reached for figure in self._figures)
        return int(self._strict and missed)


def paired(
    rounds: int, first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float, float]:
    """Time two things in turn, since a machine's speed changes.

    Returns:
        Medians: the seconds of *first*, those of *second*, and first/second.
    """
    pairs = [(_seconds(first), _seconds(second)) for _ in range(rounds)]
    firsts, seconds = zip(*pairs, strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    return statistics.median(firsts), statistics.median(seconds), ratio


def memory_of(process: int | str = "self") -> int:
    """Return the bytes of a process that are in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _print(grid: Grid) -> None:
    table = Table(*grid.columns, title=grid.title)
    for row in grid.rows:
        table.add_row(*row)
    Console().print(table)


def _markdown(grid: Grid) -> str:
    rows = [grid.columns, ("---",) * len(grid.columns), *grid.rows]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return f"**{grid.title}**\n\n" + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
