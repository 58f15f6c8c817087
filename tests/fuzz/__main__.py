"""Fuzz for some time: ``python -m tests.fuzz SECONDS``, or ``--keep`` what was found.

First property tests, with many examples, for a third of the time; then libFuzzer, for
each target alike, which changes inputs and keeps what goes new ways. What it finds
stays in build/fuzz, where the next run goes on. ``--keep`` adds the few inputs that go
those ways to the corpus that is checked in.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Final

from .corpus import read_corpus, write_corpus
from .targets import TARGETS, WORDS

_ROOT: Final = Path(__file__).parents[2]
_BUILD: Final = _ROOT / "build" / "fuzz"
#: Where the property tests are of what is fuzzed.
_PROPERTIES: Final = (
    *("fuzz", "test_allowlist.py", "test_codec.py", "test_grants.py"),
    *("test_markers.py", "test_proxy_limits.py", "test_proxy_usage.py"),
)
_PROPERTY_SHARE: Final = 1 / 3
#: What the checked-in corpus of a target may have at most.
_MOST_INPUTS: Final = 300
_LONGEST_INPUT: Final = 2048


def main(arguments: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    if arguments == ["--keep"]:
        for target in TARGETS:
            _keep(target)
        return 0
    (seconds,) = arguments or ["60"]
    return _fuzz(float(seconds))


def _fuzz(seconds: float) -> int:
    end = time.monotonic() + seconds
    failed = _test_properties(seconds * _PROPERTY_SHARE)
    for left, target in enumerate(TARGETS):
        share = (end - time.monotonic()) / (len(TARGETS) - left)
        failed |= _guided(target, max(int(share), 1))
    _say("FAILED" if failed else "nothing found")
    return int(failed)


def _test_properties(seconds: float) -> bool:
    """Run the property tests, file after file; tell if one fails."""
    end = time.monotonic() + seconds
    # A short time is not enough for all of them: each run has others.
    for name in cycle(random.sample(_PROPERTIES, len(_PROPERTIES))):
        command = (
            *(sys.executable, "-m", "pytest", "-q", "-m", "hypothesis"),
            *("--hypothesis-profile=deep", "--hypothesis-seed=random"),
            f"tests/{name}",
        )
        if subprocess.run(command, cwd=_ROOT, check=False).returncode:
            return True
        if time.monotonic() >= end:
            break
    return False


def _guided(target: str, seconds: int) -> bool:
    """Fuzz a target; tell whether something was found."""
    place = _BUILD / target
    found = place / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    _put_corpus(target, found)
    words = place / "words"
    words.write_text("".join(_entry(word) for word in WORDS[target]))
    _say(f"{target} for {seconds} s")
    done = _libfuzzer(
        target,
        *(f"-max_total_time={seconds}", f"-max_len={_LONGEST_INPUT}", "-seed=0"),
        *("-timeout=20", "-print_final_stats=1", "-verbosity=1"),
        *(f"-dict={words}", f"-artifact_prefix={place}/", str(found)),
    )
    if done:
        for path in sorted(place.glob("*-*")):
            command = f"{sys.executable} -m tests.fuzz.guided {target} {path}"
            _say(f"found {path}; to see it again:\n    {command}")
    return done != 0


def _say(text: str) -> None:
    print(f"fuzz: {text}", flush=True)  # noqa: T201 - it is a command


def _entry(word: bytes) -> str:
    return '"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in word))


def _put_corpus(target: str, place: Path) -> None:
    for data in read_corpus(target):
        name = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        (place / name).write_bytes(data)


def _keep(target: str) -> None:
    """Add what goes ways that the checked-in inputs, which all stay, do not."""
    place = _BUILD / target
    merged = place / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    _put_corpus(target, merged)
    if _libfuzzer(target, "-merge=1", str(merged), str(place / "corpus")):
        sys.exit(f"fuzz: the corpus of {target} stays as it is")
    had = read_corpus(target)
    new = {path.read_bytes() for path in merged.iterdir()}.difference(had)
    room = max(_MOST_INPUTS - len(had), 0)
    write_corpus(target, [*had, *sorted(new, key=len)[:room]])
    _say(f"{target}: {len(had)} inputs, and {min(len(new), room)} of {len(new)} new")


def _libfuzzer(target: str, *options: str) -> int:
    command = (sys.executable, "-m", "tests.fuzz.guided", target, *options)
    return subprocess.run(command, cwd=_ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
