"""Change the source a little, and see whether the tests notice: mutation testing.

``nox -s mutants`` runs it, ``nox -s mutants -- _turns`` for one module. Cosmic Ray says
what to change. Each mutant is tried in a copy of the repository, by a fork of a process
that has everything but clawtrio imported, which is much faster than a new one. What
survives, and is not accepted in ``docs/mutants.md``, fails the session.
"""

from __future__ import annotations

import ast
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from difflib import ndiff
from multiprocessing import get_context
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from hypothesis import Phase, settings

import clawtrio  # noqa: F401 - for what it imports

#: Whose tests must notice a change in which module.
TESTS: Final = {
    "_markers": ["test_markers"],
    "_allowlist": ["test_allowlist", "test_cli_mounts"],
    "_codec_allowlist": ["test_allowlist"],
    "_turns": ["test_turns"],
    "_teardown": ["test_teardown"],
    # What most of them fail comes first.
    "_run": ["test_run", "test_events", "test_status", "test_runlog", "test_engine"],
}
#: Every operator in the place of every other would be much of the same.
#: ExceptionReplacer fails at names with a dot; Variable... must be told of names.
OPERATORS: Final = re.compile(
    r"core/(?!ReplaceBinaryOperator|Variable|ExceptionReplacer)"
    r"|core/ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_FloorDiv|Pow_Mul|BitOr_BitAnd)$"
)
MARKS: Final = ("docker", "podman", "bwrap", "claude", "node", "telegram", "slow")
PROCESSES: Final = 2
#: Of the processor, above what the tests need: for mutants that loop.
SPARE_SECONDS: Final = 5
#: A mutant that waits for what never comes needs no processor.
PATIENCE: Final = 400
#: Some mutants would eat all there is.
MAX_BYTES: Final = 4 * 2**30

ROOT: Final = Path(__file__).parents[1]
ACCEPTED: Final = ROOT / "docs" / "mutants.md"
FORK: Final = get_context("fork")

Change: TypeAlias = tuple[str, str, str]


@attrs.frozen
class Mutant:
    """A module with one change in it."""

    module: str
    line: int
    before: str
    after: str
    source: str

    @property
    def change(self) -> Change:
        """What tells it from others, wherever its line moves to."""
        return self.module, self.before, self.after


def meaning(source: str) -> str:
    """What Python takes *source* for, less its annotations, which are never run."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
    return ast.dump(tree)


def sources(original: str) -> Iterator[str]:
    """Make one change after another."""
    for name in filter(OPERATORS.match, sorted(operator_names())):
        occurrence = 0
        while source := mutate_code(original, get_operator(name)(), occurrence):
            occurrence += 1
            yield source


def mutants_of(module: str) -> list[Mutant]:
    """Make a module's mutants, less those that mean the same."""
    original = (ROOT / "src" / "clawtrio" / f"{module}.py").read_text()
    seen = {meaning(original)}
    found = []
    for source in sources(original):
        try:
            meant = meaning(source)
        except SyntaxError:
            continue
        if meant not in seen:
            seen.add(meant)
            found.append(compare(module, original, source))
    return sorted(found, key=lambda mutant: mutant.line)


def compare(module: str, original: str, source: str) -> Mutant:
    """Find the line that differs."""
    told = ndiff(original.splitlines(), source.splitlines())
    lines = [line for line in told if line[0] in "+- "]
    line = next(n for n, text in enumerate(lines, 1) if text[0] != " ")
    before, after = (
        " ".join(text[2:].strip() for text in lines if text[0] == sign).strip()
        for sign in "-+"
    )
    return Mutant(module, line, before, after, source)


def accepted() -> set[Change]:
    """Read which survivors are known to be harmless."""
    found = set()
    module = ""
    for line in ACCEPTED.read_text().splitlines():
        if heading := re.fullmatch(r"## `(\w+)\.py`", line):
            module = heading[1]
        elif entry := re.match(r"- `(.+)` → `(.*)`: ", line):
            found.add((module, entry[1], entry[2]))
    return found


def move_to_copy(parent: str) -> None:
    """Make a copy of the repository for this process, and go there."""
    copy = Path(tempfile.mkdtemp(dir=parent))
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, copy, ignore=leave_out, dirs_exist_ok=True)
    os.chdir(copy)
    sys.path.insert(0, str(copy / "src"))
    os.environ["PYTHONPATH"] = str(copy / "src")


def run_tests(module: str) -> None:
    """Run a module's tests, and exit as they end."""
    os.setsid()
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    for name in [name for name in sys.modules if name.partition(".")[0] == "clawtrio"]:
        del sys.modules[name]
    settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=25,
        # To fail is enough.
        phases=[Phase.explicit, Phase.generate],
    )
    settings.load_profile("mutants")
    marks = " and ".join(f"not {mark}" for mark in MARKS)
    files = [f"tests/{name}.py" for name in TESTS[module]]
    # The conftest asks for runtimes that are not used here.
    flags = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider", "-m", marks]
    flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main([*flags, *files]))


def fork(module: str, cpu_seconds: int) -> int | None:
    """Run a module's tests in a fork.

    Returns:
        How that exited; None if it was stopped.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    child = FORK.Process(target=limited, args=(module, cpu_seconds, most))
    child.start()
    child.join(PATIENCE)
    late = child.exitcode in {None, -signal.SIGXCPU}
    # Also what the tests started.
    with suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.join()
    return None if late else child.exitcode


def limited(module: str, cpu_seconds: int, most: int) -> None:
    """Run a module's tests within limits."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, most))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    run_tests(module)


def need_of(module: str) -> int:
    """Run the tests of a module that is as it should be.

    Returns:
        The seconds of the processor that a mutant may take.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = fork(module, 10 * PATIENCE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != 0:
        raise RuntimeError(f"the tests of {module} fail without a mutation: {code}")
    return int(2 * (after.ru_utime - before.ru_utime)) + SPARE_SECONDS


def fate_of(mutant: Mutant, cpu_seconds: int) -> str:
    """Try a mutant: survived, killed, or timed out."""
    place = Path("src", "clawtrio", f"{mutant.module}.py")
    original = place.read_text()
    place.write_text(mutant.source)
    # What the first run, without a mutation, left, would do for one of the same size.
    sys.dont_write_bytecode = True
    for cached in place.parent.glob(f"__pycache__/{mutant.module}.*"):
        cached.unlink()
    try:
        code = fork(mutant.module, cpu_seconds)
    finally:
        place.write_text(original)
    return "timed out" if code is None else "killed" if code else "survived"


def try_module(pool: ProcessPoolExecutor, module: str) -> list[Mutant]:
    """Try all of a module's mutants, and tell how it goes.

    Returns:
        Those that survived.
    """
    begin = time.monotonic()
    mutants = mutants_of(module)
    print(f"{module}: {len(mutants)} mutants", flush=True)
    need = pool.submit(need_of, module).result()
    fates = pool.map(fate_of, mutants, [need] * len(mutants))
    count: Counter[str] = Counter()
    survivors = []
    for mutant, fate in zip(mutants, fates, strict=True):
        count[fate] += 1
        if fate == "survived":
            survivors.append(mutant)
            tell(mutant)
        if count.total() % 20 == 0:
            print(f"{module}: {count.total()} of {len(mutants)}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    figures = ", ".join(f"{number} {fate}" for fate, number in sorted(count.items()))
    print(f"{module}: {figures}, in {minutes:.1f} minutes", flush=True)
    return survivors


def tell(mutant: Mutant) -> None:
    """Say what was changed, as it would have to be accepted."""
    where = f"{mutant.module}.py:{mutant.line}"
    print(f"{where}\n- `{mutant.before}` → `{mutant.after}`: ", flush=True)


def main() -> int:
    """Try the modules that were asked for, or all."""
    known = accepted()
    with (
        tempfile.TemporaryDirectory() as parent,
        ProcessPoolExecutor(PROCESSES, FORK, move_to_copy, (parent,)) as pool,
    ):
        modules = sys.argv[1:] or TESTS
        survivors = [one for name in modules for one in try_module(pool, name)]
    unknown = [mutant for mutant in survivors if mutant.change not in known]
    print(f"{len(survivors)} survived, {len(unknown)} of them not accepted:")
    for mutant in unknown:
        tell(mutant)
    return bool(unknown)


if __name__ == "__main__":
    sys.exit(main())
