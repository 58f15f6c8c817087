"""Root's tests of the sandbox again, as an ordinary user with a user namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .conftest import GID, IS_ROOT, UID

pytestmark = [
    pytest.mark.bwrap,
    pytest.mark.skipif(not IS_ROOT, reason="only root can become another user"),
]

HERE = Path(__file__).parent
# setpriv executes with root's capabilities still there; env shows what a user can run.
AS_USER = ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups", "env"]


def test_as_an_ordinary_user() -> None:
    """All that root's sandboxes do, a user's do as well."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = [
            *AS_USER,
            python,
            "-c",
            "import pytest, pytest_trio, clawtrio._bwrap",
        ]
        found = subprocess.run(command, env=environment, check=False, cwd="/")
        if found.returncode == 0:
            break
    else:
        pytest.skip("no Python here that an ordinary user can run our tests with")

    # pytest's own directories are root's, and closed to others.
    configuration = HERE.parent.parent / "pyproject.toml"
    base = Path(tempfile.mkdtemp(prefix="clawtrio-"))
    try:
        os.chown(base, UID, GID)
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={base}/tmp"]
        options += ["-c", str(configuration), "-m", "not slow"]
        again = subprocess.run(
            [*AS_USER, python, "-m", "pytest", *options, HERE],
            env={**environment, "HOME": str(base)},
            cwd=HERE.parent.parent,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=170,
        )
    finally:
        shutil.rmtree(base)
    assert again.returncode == 0, again.stdout
    assert " passed" in again.stdout
