"""The project's chores: ``nox -l`` lists them, ``nox -s lint types`` runs two.

The tests here run against the built wheel; ``pytest`` in a virtual environment with
``pip install -e '.[test]'`` runs them against the source.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|venv"
nox.options.sessions = ["lint", "types", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
OLDEST = PYTHONS[0]

# One Python with real containers, and under load, is enough: that is slow.
LEFT_OUT = ("docker", "podman", "bwrap", "claude", "slow")
WITHOUT_RUNTIMES = ("-m", " and ".join(f"not {mark}" for mark in LEFT_OUT))

CODE = ("src", "tests", "benchmarks", "container", "docs", "noxfile.py")


@nox.session(python=OLDEST, tags=["check"])
def lint(session: nox.Session) -> None:
    """Ruff, and flake8-async for what Ruff has no rule."""
    session.install("ruff", "flake8", "flake8-async")
    session.run("ruff", "check", "--output-format=concise")
    session.run("ruff", "format", "--check")
    session.run(
        "flake8",
        # Not 9: that each way through is a checkpoint is for public functions only.
        "--select=ASYNC1,ASYNC2",
        # 114 wants a list of names; 124 misfires where a protocol wants an async
        # function, 128 where task_status is passed on.
        "--extend-ignore=ASYNC114,ASYNC124,ASYNC128",
        *CODE,
    )


@nox.session(python=OLDEST, tags=["check"])
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Everything on the oldest Python; on newer ones without real runtimes."""
    session.install(".[test]")
    choice = () if session.python == OLDEST else WITHOUT_RUNTIMES
    session.run("pytest", *choice, *session.posargs)


@nox.session(python=OLDEST)
def tests_trio_floor(session: nox.Session) -> None:
    """The oldest Trio that we promise to work with, and the bot that needs it."""
    session.install(".[test,telegram]", "trio==0.28.*")
    choice = f"telegram or ({WITHOUT_RUNTIMES[1]})"
    demand = {"CLAWTRIO_DEMAND": "telegram,bwrap"}
    session.run("pytest", "-m", choice, *session.posargs, env=demand)


@nox.session(python=OLDEST)
def demo(session: nox.Session) -> None:
    """A run from an installed wheel, offline, in a sandbox."""
    session.install(".")
    session.run("clawtrio", "demo", "--runtime", "bwrap", *session.posargs)


@nox.session(python=OLDEST)
def package(session: nox.Session) -> None:
    """The sdist, and from it the wheel."""
    session.install("build")
    session.run("python", "-m", "build", *session.posargs)


@nox.session(python=OLDEST)
def bench(session: nox.Session) -> None:
    """Every benchmark; ``-- --out DIR`` says where its figures and plots go."""
    session.install(".[bench]")
    shared = {Path("benchmarks/bots.py"), Path("benchmarks/report.py")}
    for script in sorted({*Path("benchmarks").glob("*.py")} - shared):
        session.run("python", str(script), *session.posargs)


@nox.session(python=OLDEST)
def soak(session: nox.Session) -> None:
    """Random runs and faults for so many minutes: ``nox -s soak -- 60``."""
    session.install(".[test]")
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session(python=OLDEST)
def fuzz(session: nox.Session) -> None:
    """Property tests in depth, then libFuzzer: ``nox -s fuzz -- SECONDS``.

    SECONDS, 60 by default, are for all of it together, give or take what it started
    last. What is found is a failure, told with a command to see it again, and kept in
    build/fuzz. ``--keep``, in place of SECONDS, puts what goes new ways into the
    checked-in corpus.
    """
    session.install("-e", ".[fuzz]")
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session(python=OLDEST)
def mutants(session: nox.Session) -> None:
    """Changes that no test notices: ``nox -s mutants -- _turns``; docs/mutants.md."""
    session.install("-e", ".[test]", "cosmic-ray")
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session(python=OLDEST)
def docs(session: nox.Session) -> None:
    """The documentation, into build/docs; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "-q", "-b", "html", "docs", "build/docs")
