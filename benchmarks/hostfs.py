"""What do the symlink-safe operations cost, next to the plain ones that they replace?

Both do the same to the same files, in turn, in this process. The plain ones are what a
careful program does that trusts the directory: an atomic write is a temporary file and
a rename there, too. ``python benchmarks/hostfs.py`` prints a table.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clawtrio._hostfs import Directory, Owner

ROUNDS = 15
CALLS = 300
#: The most that any of them may cost, in times of the plain one.
LIMIT = 3

Work = Callable[[int], object]


def pairs(base: Path, stack: ExitStack) -> Iterator[tuple[str, Work, Work]]:
    """Give what is compared: its name, the plain way and the safe one."""
    place = base / "place"
    for name in ("place/sub", "place/many", "trash", "plain-trash", "tree/a/b"):
        (base / name).mkdir(parents=True)
    (place / "file").write_bytes(b"x" * 1000)
    for number in range(100):
        (place / "many" / f"{number}.json").touch()
    for name in ("SKILL.md", "a/tool", "a/b/data"):
        (base / "tree" / name).write_bytes(b"x" * 2000)
    owner = Owner(os.getuid(), os.getgid())
    directory = stack.enter_context(Directory.at(str(place)))
    many = stack.enter_context(Directory.at(str(place / "many")))
    trash = stack.enter_context(Directory.at(str(base / "trash")))
    copies = stack.enter_context(Directory.at(str(base)))

    def write(number: int) -> None:
        temporary = place / f".{number}.tmp"
        temporary.write_bytes(b"x" * 1000)
        temporary.replace(place / "written")

    def open_existing(_: int) -> None:
        os.close(os.open(place / "sub", os.O_RDONLY | os.O_DIRECTORY))

    def make(number: int) -> None:
        (place / "new").mkdir()
        os.close(os.open(place / "new", os.O_RDONLY | os.O_DIRECTORY))
        (place / "new").rename(base / "plain-trash" / f"{number}")
        (base / "plain-trash" / f"{number}").rmdir()

    def make_safely(_: int) -> None:
        directory.subdirectory("new").close()
        directory.discard("new", trash)
        trash.empty(10)

    def copy_safely(_: int) -> None:
        with copies.subdirectory("copy") as copy, copies.subdirectory("tree") as tree:
            copy.copy_tree(tree, trash, owner)

    yield (
        "read a file of 1 kB",
        lambda _: (place / "file").read_bytes(),
        lambda _: directory.read("file"),
    )
    yield "write one atomically", write, lambda _: directory.write("x", b"x" * 1000)
    yield (
        "open a directory",
        open_existing,
        lambda _: directory.subdirectory("sub", trash=trash, owner=owner).close(),
    )
    yield "make, throw away, delete a directory", make, make_safely
    yield (
        "list 100 names",
        lambda _: sorted(path.name for path in (place / "many").iterdir()),
        lambda _: many.names(),
    )
    yield (
        "ask when a file was written",
        lambda _: (place / "file").stat().st_mtime,
        lambda _: directory.modified("file"),
    )
    yield (
        "copy a tree of 3 files",
        lambda _: shutil.copytree(base / "tree", base / "plain", dirs_exist_ok=True),
        copy_safely,
    )


def seconds(work: Work) -> float:
    """Return how long a call of *work* takes."""
    started = time.perf_counter()
    for number in range(CALLS):
        work(number)
    return (time.perf_counter() - started) / CALLS


def main() -> None:
    """Print the table; fail if something costs more than it may."""
    table = Table(title="Host I/O, medians of paired measurements")
    for name in ("operation", "plain, µs", "safe, µs", "ratio"):
        table.add_column(name, justify="right")
    worst = 0.0
    with tempfile.TemporaryDirectory() as base, ExitStack() as stack:
        for name, plain, safe in pairs(Path(base), stack):
            both = [(seconds(plain), seconds(safe)) for _ in range(ROUNDS)]
            ratio = statistics.median(ours / theirs for theirs, ours in both)
            worst = max(worst, ratio)
            medians = (statistics.median(column) for column in zip(*both, strict=True))
            figures = [f"{1e6 * median:.1f}" for median in medians]
            table.add_row(name, *figures, f"{ratio:.2f}")
    Console().print(table)
    if worst > LIMIT:
        raise SystemExit(f"{worst:.2f} is more than {LIMIT} times the plain one")


if __name__ == "__main__":
    main()
