"""What do the symlink-safe operations cost, next to the plain ones that they replace?

Both do the same to the same files, in turn, in this process. The plain ones are what a
careful program does that trusts the directory: an atomic write is a temporary file and
a rename there, too. ``python benchmarks/hostfs.py`` prints tables.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from report import Report, paired

from clawtrio._hostfs import Directory, Owner

ROUNDS = 15
CALLS = 100
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


def repeat(work: Work) -> None:
    """Do *work* CALLS times."""
    for number in range(CALLS):
        work(number)


def main() -> int:
    """Measure all; return the exit code."""
    report = Report("hostfs")
    rows = []
    with tempfile.TemporaryDirectory() as base, ExitStack() as stack:
        for name, plain, safe in pairs(Path(base), stack):
            print(f"hostfs: {name}", file=sys.stderr)
            ours, theirs, ratio = paired(
                ROUNDS, partial(repeat, safe), partial(repeat, plain)
            )
            times = (f"{1e6 * time / CALLS:.1f}" for time in (theirs, ours))
            rows.append((name, *times))
            report.figure(f"{name}: safe/plain", ratio, at_most=LIMIT)
    columns = ("operation", "plain, µs", "safe, µs")
    report.table("Host I/O, medians of paired measurements", columns, rows)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
