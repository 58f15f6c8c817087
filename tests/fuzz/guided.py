"""One target under libFuzzer: ``python -m tests.fuzz.guided TARGET [OPTION | FILE]...``

With files it runs the target on these, which is how a finding is reproduced.
"""

from __future__ import annotations

import logging
import shlex
import sys

import atheris

# Before anything imports them: to see which way an input takes, they are changed.
with atheris.instrument_imports(include=["clawtrio", "h11", "wire"]):
    from .targets import TARGETS


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    _, target, *options = sys.argv
    # What libFuzzer has a shell run to merge, with options behind it.
    program = shlex.join([sys.executable, "-m", "tests.fuzz.guided", target])
    # To write what agents do wrong would take longer than to look at it.
    logging.disable()
    atheris.Setup([program, *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
