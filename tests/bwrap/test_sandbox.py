"""What an agent sees in a real sandbox, and what it cannot do."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import venv
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio._bwrap import BwrapRuntime

from .conftest import ENVIRONMENT, GID, IS_ROOT, UID, Sandbox, read_line

pytestmark = pytest.mark.bwrap


async def test_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent gets what it is given, and bwrap's PWD; nothing of the host's."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary")
    agent = """
        import json, sys
        with open("/proc/self/environ") as file:
            variables = file.read().split("\\0")[:-1]
        print(json.dumps({"environment": variables, "arguments": sys.argv[1:]}))
    """

    answer = (await sandbox.run(sandbox.spec(agent))).answer

    expected = {**ENVIRONMENT, "PWD": "/workspace/group"}
    assert sorted(answer["environment"]) == sorted(
        f"{name}={value}" for name, value in expected.items()
    )
    assert answer["arguments"] == ["one", "--two"]


async def test_identity(sandbox: Sandbox) -> None:
    """The agent is an ordinary user without any capability, for good."""
    agent = """
        import json, os, pwd
        with open("/proc/self/status") as file:
            status = dict(line.rstrip("\\n").split(":\\t", 1) for line in file)
        account = pwd.getpwuid(os.getuid())
        print(json.dumps([status, os.getgroups(), account.pw_name, account.pw_dir]))
    """

    status, groups, name, home = (await sandbox.run(sandbox.spec(agent))).answer

    assert status["Uid"].split() == [str(UID)] * 4
    assert status["Gid"].split() == [str(GID)] * 4
    assert 0 not in groups
    for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
        assert int(status[f"Cap{kind}"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert (name, home) == ("node", "/home/node")
    if IS_ROOT:
        assert groups == []


async def test_descriptors(sandbox: Sandbox) -> None:
    """Only the three pipes are open in the agent."""
    agent = """
        import json, os, stat
        fds = [int(name) for name in os.listdir("/proc/self/fd")]
        pipes = [stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in range(3)]
        closed = []
        for fd in range(3, 100):
            try:
                os.fstat(fd)
            except OSError:
                closed.append(fd)
        print(json.dumps([pipes, len(closed)]))
    """

    assert (await sandbox.run(sandbox.spec(agent))).answer == [[True] * 3, 97]


async def test_standard_streams_can_be_opened(sandbox: Sandbox) -> None:
    """A shell's ``>/dev/stderr`` works, as root and as a user."""
    agent = """
        import subprocess
        subprocess.run("echo out >/dev/stdout; echo err >/dev/stderr", shell=True)
    """

    result = await sandbox.run(sandbox.spec(agent))

    assert (result.stdout, result.stderr) == ("out\n", "err\n")


async def test_path(sandbox: Sandbox) -> None:
    """Without a PATH of its own, an agent finds its Python and what /usr has."""
    agent = """
        import json, os, shutil
        python = shutil.which("python3")
        print(json.dumps([os.environ["PATH"], python, "LD_X" in os.environ]))
    """
    spec = sandbox.spec(agent, environment={"HOME": "/home/node", "LD_X": "1"})

    path, python, linker = (await sandbox.run(spec)).answer

    own = Path(sys.executable).parent
    assert path == f"{own}:/usr/local/bin:/usr/bin:/bin"
    assert python == f"{own}/python3"
    assert not linker


async def test_writing(sandbox: Sandbox) -> None:
    """The agent writes where it may, under its own uid, and nowhere else."""
    readonly = sandbox.directory("readonly")
    (readonly / "there").touch(mode=0o666)
    agent = """
        import json, os
        answer = {}
        for path in json.loads(PATHS):
            try:
                with open(path, "r+" if os.path.exists(path) else "w") as file:
                    file.write("1")
                answer[path] = 0
            except OSError as exc:
                answer[path] = exc.errno
        print(json.dumps(answer))
    """
    allowed = [
        "/workspace/group/new",
        "/tmp/new",
        "/home/node/new",
        "/dev/shm/new",
        "/dev/null",
    ]
    refused = [
        "/new",
        "/etc/passwd",
        "/etc/new",
        "/usr/new",
        "/dev/new",
        "/app/src/new",
        "/app/src/__main__.py",
        "/workspace/new",
        "/workspace/extra/readonly/new",
        "/workspace/extra/readonly/there",
        "/proc/1/mem",
        "/proc/self/mem",
        "/proc/self/oom_score_adj",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/drop_caches",
    ]
    paths = repr(str([*allowed, *refused]).replace("'", '"'))
    mount = sandbox.hold(readonly, "/workspace/extra/readonly", readonly=True)
    spec = sandbox.spec(agent.replace("PATHS", paths), mounts=[mount])

    answer = (await sandbox.run(spec)).answer

    assert [path for path in allowed if answer[path] != 0] == []
    assert {answer[path] for path in refused} <= {errno.EROFS, errno.EACCES}
    assert (sandbox.group / "new").stat().st_uid == UID
    assert list(readonly.iterdir()) == [readonly / "there"]


async def test_what_is_visible(sandbox: Sandbox) -> None:
    """Of the host there are /usr, five places in /etc, Python and the mounts."""
    agent = """
        import json, os
        print(json.dumps({path: os.listdir(path) for path in ("/", "/etc", "/home",
            "/home/node", "/workspace", "/app", "/etc/ssl")}))
    """

    seen = (await sandbox.run(sandbox.spec(agent))).answer

    assert not {"root", "run", "srv", "sys", "var"} & {
        name for name in seen["/"] if not sys.base_prefix.startswith(f"/{name}/")
    }
    assert set(seen["/etc"]) <= {
        "alternatives",
        "group",
        "hosts",
        "ld.so.cache",
        "localtime",
        "passwd",
        "ssl",
    }
    assert seen["/home"] == ["node"]
    assert seen["/home/node"] == []
    assert seen["/workspace"] == ["group"]
    assert seen["/app"] == ["src"]
    assert set(seen["/etc/ssl"]) <= {"certs"}


async def test_processes(sandbox: Sandbox) -> None:
    """The agent is pid 2 under bwrap, in a session without a terminal."""
    agent = """
        import json, os
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
        try:
            open("/dev/tty").close()
            terminal = True
        except OSError:
            terminal = False
        print(json.dumps([pids, os.getpid(), terminal, os.uname().nodename]))
    """

    answer = (await sandbox.run(sandbox.spec(agent))).answer

    assert answer == [[1, 2], 2, False, "clawtrio"]


async def test_network(sandbox: Sandbox) -> None:
    """There is a loopback of its own, and no way to the host's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        agent = f"""
            import json, socket
            interfaces = [name for _, name in socket.if_nameindex()]
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)
                reached = True
            except OSError as exc:
                reached = exc.errno
            with socket.create_server(("127.0.0.1", 0)) as own:
                socket.create_connection(own.getsockname(), 1).close()
            print(json.dumps([interfaces, reached]))
        """

        answer = (await sandbox.run(sandbox.spec(agent))).answer

    assert answer == [["lo"], errno.ECONNREFUSED]


async def test_system_calls(sandbox: Sandbox) -> None:
    """The kernel refuses what the filter names, and threads and children still work."""
    agent = """
        import ctypes, errno, fcntl, json, os, platform, socket, subprocess, threading
        libc = ctypes.CDLL(None, use_errno=True)
        arm = platform.machine() == "aarch64"

        def call(number, *arguments):
            ctypes.set_errno(0)
            longs = [ctypes.c_long(argument) for argument in arguments]
            libc.syscall(ctypes.c_long(number), *longs)
            return ctypes.get_errno()

        answer = {
            "keyctl": call(219 if arm else 250, 0, -3, 0),
            "unshare": call(97 if arm else 272, 0x10000000),
            "setns": call(268 if arm else 308, 0, 0),
            "clone": call(220 if arm else 56, 0x10000011, 0, 0, 0, 0),
            "clone3": call(435, 0, 0),
            "mount": call(40 if arm else 165, 0, 0, 0, 0, 0),
            "umount2": call(39 if arm else 166, 0, 2),
            "fsopen": call(430, 0, 0),
            "ptrace": call(117 if arm else 101, 16, 1, 0, 0),
            "bpf": call(280 if arm else 321, 0, 0, 0),
            "io_uring_setup": call(425, 8, 0),
            "userfaultfd": call(282 if arm else 323, 0),
            "perf_event_open": call(241 if arm else 298, 0, 0, 0, 0, 0),
            "newer": call(467, 0),
            "x32": call(0x40000000, 0),
        }
        for family, protocol in ((40, 0), (38, 0), (17, 0), (16, 12), (2, 132)):
            try:
                socket.socket(family, socket.SOCK_STREAM, protocol).close()
                answer[f"{family}:{protocol}"] = 0
            except OSError as exc:
                answer[f"{family}:{protocol}"] = exc.errno
        leader, follower = os.openpty()
        try:
            fcntl.ioctl(follower, 0x5412, b"x")
            answer["TIOCSTI"] = 0
        except OSError as exc:
            answer["TIOCSTI"] = exc.errno
        done = []
        thread = threading.Thread(target=done.append, args=(1,))
        thread.start()
        thread.join()
        done.append(subprocess.run(["/bin/true"]).returncode)
        print(json.dumps([answer, done]))
    """

    answer, done = (await sandbox.run(sandbox.spec(agent))).answer

    assert done == [1, 0]
    for name in ("clone3", "newer", "x32"):
        assert answer.pop(name) == errno.ENOSYS
    for name in ("40:0", "38:0", "17:0"):
        assert answer.pop(name) == errno.EAFNOSUPPORT
    for name in ("16:12", "2:132"):
        assert answer.pop(name) == errno.EPROTONOSUPPORT
    assert answer == dict.fromkeys(answer, errno.EPERM)


async def test_limits(sandbox: Sandbox) -> None:
    """Memory, file size, processes and shared memory end before the host's do."""
    agent = """
        import json, os, resource, threading
        answer = {}
        try:
            bytearray(2**28)
        except MemoryError:
            answer["memory"] = "refused"
        try:
            with open("/dev/shm/file", "wb") as file:
                for _ in range(65):
                    file.write(b"x" * 2**20)
        except OSError as exc:
            answer["shm"] = exc.errno
        stop = threading.Event()
        started = 0
        limit = answer["limit"] = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        threading.stack_size(2**16)
        try:
            while started < limit + 10:
                threading.Thread(target=stop.wait).start()
                started += 1
        except RuntimeError:
            pass
        stop.set()
        answer["threads"] = started
        answer["core"] = resource.getrlimit(resource.RLIMIT_CORE)
        answer["fsize"] = resource.getrlimit(resource.RLIMIT_FSIZE)
        answer["space"] = resource.getrlimit(resource.RLIMIT_AS)[1]
        with open("/proc/self/oom_score_adj") as file:
            answer["oom"] = file.read()
        print(json.dumps(answer))
    """

    answer = (await sandbox.run(sandbox.spec(agent, memory=2**27, pids=32))).answer

    assert answer["memory"] == "refused"
    assert answer["shm"] == errno.ENOSPC
    # As root it counts what the user runs outside, too, as it was at the start.
    assert answer["limit"] >= 33 if IS_ROOT else answer["limit"] == 33
    assert answer["threads"] < answer["limit"]
    assert answer["core"] == [0, 0]
    assert answer["fsize"] == [2**30, 2**30]
    assert answer["space"] == -1
    assert answer["oom"] == "1000\n"


async def test_python_from_a_private_place(sandbox: Sandbox) -> None:
    """A virtual environment that is the bot's root works, and shows no secret."""
    root = sandbox.path / "home" / "bot"
    root.mkdir(parents=True)
    (sandbox.path / "home").chmod(0o700)
    venv.create(root, symlinks=True)
    (root / ".env").write_text("ANTHROPIC_API_KEY=canary")
    sandbox.runtime = BwrapRuntime(python=str(root / "bin" / "python"))
    agent = """
        import json, os, sys
        print(json.dumps([sys.prefix, sorted(os.listdir(sys.prefix))]))
    """

    prefix, entries = (await sandbox.run(sandbox.spec(agent))).answer

    assert prefix == str(root)
    assert (
        {"bin", "pyvenv.cfg"}
        <= set(entries)
        <= {
            "bin",
            "include",
            "lib",
            "lib64",
            "pyvenv.cfg",
        }
    )


async def test_swapped_source(sandbox: Sandbox) -> None:
    """What was checked is mounted, though a symlink has taken its place since."""
    checked = sandbox.directory("checked")
    (checked / "which").write_text("checked")
    secret = sandbox.directory("secret")
    (secret / "which").write_text("secret")
    mount = sandbox.hold(checked, "/workspace/extra/x", readonly=False)
    checked.rename(sandbox.path / "moved")
    checked.symlink_to(secret)
    agent = """
        import json
        with open("/workspace/extra/x/which") as file:
            print(json.dumps(file.read()))
    """

    result = await sandbox.run(sandbox.spec(agent, mounts=[mount]))

    assert result.answer == "checked"


async def test_deleted_source(sandbox: Sandbox) -> None:
    """A source that is gone means no agent, not another place."""
    gone = sandbox.directory("gone")
    mount = sandbox.hold(gone, "/workspace/extra/x", readonly=False)
    gone.rmdir()

    result = await sandbox.run(sandbox.spec("print(1)", mounts=[mount]))

    assert result.code == 1
    assert result.stdout == ""
    assert result.failure is not None
    assert result.failure.startswith("bwrap: Can't find source path")


async def test_planted_symlinks(sandbox: Sandbox) -> None:
    """A symlink in a writable mount leads nowhere on the host."""
    outside = sandbox.directory("outside")
    sandbox.directory("group")
    (sandbox.group / "link").symlink_to(outside)
    (sandbox.group / "file").symlink_to(outside / "new")
    agent = """
        import json, os
        answer = []
        for path in ("link/new", "file"):
            try:
                open(path, "w").close()
                answer.append(0)
            except OSError as exc:
                answer.append(exc.errno)
        print(json.dumps(answer))
    """

    answer = (await sandbox.run(sandbox.spec(agent))).answer

    assert answer == [errno.ENOENT, errno.ENOENT]
    assert list(outside.iterdir()) == []


async def test_file_and_socket_mounts(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single file can be mounted, and a Unix socket: the way to a proxy."""
    note = sandbox.path / "note"
    note.write_text("hello")
    directory = sandbox.directory("proxy")
    with socket.socket(socket.AF_UNIX) as server:
        # pytest's paths are too long for a socket.
        monkeypatch.chdir(directory)
        server.bind("s")
        server.listen()
        (directory / "s").chmod(0o666)
        agent = """
            import json, socket
            with socket.socket(socket.AF_UNIX) as client:
                client.connect("/run/clawtrio/s")
            with open("/workspace/extra/note") as file:
                print(json.dumps(file.read()))
        """
        mounts = [
            sandbox.hold(note, "/workspace/extra/note", readonly=True),
            sandbox.hold(directory, "/run/clawtrio", readonly=True),
        ]

        result = await sandbox.run(sandbox.spec(agent, mounts=mounts))

    assert result.answer == "hello"


async def test_home_holds_mounts(sandbox: Sandbox) -> None:
    """A mount inside HOME is there, cannot be moved, and the rest is writable."""
    sessions = sandbox.directory("sessions")
    agent = """
        import json, os
        open("/home/node/.claude/kept", "w").close()
        os.mkdir("/home/node/.cache")
        try:
            os.rename("/home/node/.claude", "/home/node/x")
            answer = 0
        except OSError as exc:
            answer = exc.errno
        print(json.dumps(answer))
    """
    mount = sandbox.hold(sessions, "/home/node/.claude", readonly=False)

    result = await sandbox.run(sandbox.spec(agent, mounts=[mount]))

    assert result.answer in (errno.EBUSY, errno.EPERM)
    assert (sessions / "kept").stat().st_uid == UID


async def test_special_files(sandbox: Sandbox) -> None:
    """What an agent leaves in a mount is not set-uid for the host, nor a device."""
    agent = """
        import json, os, stat
        errors = []
        try:
            os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except OSError as exc:
            errors.append(exc.errno)
        open("program", "w").close()
        os.chmod("program", 0o4755)
        print(json.dumps(errors))
    """

    answer = (await sandbox.run(sandbox.spec(agent))).answer

    assert answer == [errno.EPERM]
    found = (sandbox.group / "program").stat()
    assert found.st_uid == UID != 0
    assert stat.S_ISREG(found.st_mode)


def command_lines() -> list[bytes]:
    """Return what ps shows of all processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # Any of them may have ended meanwhile.
        with suppress(OSError):
            found.append((process / "cmdline").read_bytes())
    return found


async def test_argv_is_hidden(sandbox: Sandbox) -> None:
    """ps shows no mount, no option and no variable of a running sandbox."""
    agent = "import sys; print('up'); sys.stdin.read()"
    with trio.fail_after(20):
        async with sandbox.start(sandbox.spec(agent)) as container:
            assert await read_line(container) == "up"
            shown = command_lines()

    lines = [line for line in shown if b"\0--args\0" in line]
    assert lines
    assert not any(os.fsencode(sandbox.path) in line for line in lines)


def test_readable_argv_names_what_is_mounted(sandbox: Sandbox) -> None:
    """The printed command line has every option, and paths in place of descriptors."""
    spec = sandbox.spec("print(1)")

    argv = sandbox.runtime.argv(spec)

    place = argv.index("--bind-fd")
    assert argv[place + 1 : place + 3] == [str(sandbox.group), "/workspace/group"]
    assert "--args" not in argv
    assert argv[-3:] == ["/app/src", "one", "--two"]


@pytest.mark.skipif(not IS_ROOT, reason="only root could run it as root")
async def test_never_root(sandbox: Sandbox) -> None:
    """A sandbox for uid 0 is refused."""
    spec = attrs.evolve(sandbox.spec("print(1)"), uid=0)
    with pytest.raises(Exception, match="as root"):
        await sandbox.run(spec)
