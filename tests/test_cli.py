"""The command line, as somebody at a terminal, a script or a service has it."""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import trio

from clawtrio import (
    _cli,
    _cli_care,
    _cli_demo,
    _cli_doctor,
    _cli_runs,
    _cli_terminal,
    _engine,
)
from clawtrio._cli import execute
from clawtrio._cli_doctor import doctor
from clawtrio._groups import Places, open_places
from clawtrio._runtimes import (
    LABEL_ENGINE,
    LABEL_RUN,
    ContainerSpec,
    FoundContainer,
)
from clawtrio._settings import GIB, Settings
from clawtrio.testing import FakeAgent, FakeRuntime, framed, scripted_agent

from .upstream import SECRET, Call, Handler, open_api, silent

COMMANDS: Final = (
    *("run", "chat", "demo", "doctor", "ps", "sweep", "logs", "reset", "proxy"),
    "top",
)
COMMAND: Final = (sys.executable, "-m", "clawtrio")
#: Seconds for anything here: podman takes two on a busy machine.
PATIENCE: Final = 60.0

every_runtime = pytest.mark.parametrize(
    "runtime",
    [pytest.param(n, marks=getattr(pytest.mark, n)) for n in _cli_care.RUNTIMES],
)

_SAY: Final = """
import json, signal, sys, time
given = json.loads(sys.stdin.readline())
def say(**frame):
    print("---NANOCLAW_OUTPUT_START---", json.dumps(frame),
          "---NANOCLAW_OUTPUT_END---", sep="\\n", flush=True)
"""
#: Answers in part, then hears nothing of what goes on.
SLEEPER: Final = (
    _SAY + "say(status='success', result='at work', partial=True)\ntime.sleep(3600)"
)
STUBBORN: Final = _SAY.replace(
    "given", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ngiven"
) + SLEEPER.removeprefix(_SAY)
#: What a terminal would obey: a title, a colour, a C1 control, a bidi override; markup.
NASTY: Final = "\x1b]0;owned\x07\x1b[31mred\x9b31m\u202eleft\x7f[/nope]"


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """What is started here ignores no signal, though pytest does under nohup."""
    ignored = [
        number
        for number in (signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no settings but those of the test, and the agent that works offline."""
    for name in os.environ:
        if name.startswith(("CLAWTRIO_", "ANTHROPIC_", "CLAUDE_CODE_OAUTH_")) or (
            name in ("NO_COLOR", "FORCE_COLOR")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLAWTRIO_AGENT", "echo")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a bot's directory."""
    place = tmp_path / "bot"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have an agent of one's own, in Python."""

    def choose(source: str) -> None:
        monkeypatch.setenv(
            "CLAWTRIO_AGENT_COMMAND", json.dumps(["python3", "-c", source])
        )

    return choose


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeAgent], FakeRuntime]:
    """Have runtimes that need nothing, in this process."""

    def choose(agent: FakeAgent) -> FakeRuntime:
        runtime = FakeRuntime(agent)
        for module in (_engine, _cli_care, _cli_demo, _cli_doctor):
            monkeypatch.setattr(module, "choose_runtime", lambda _: runtime)
        return runtime

    return choose


class Process:
    """A running command with pipes, whose output is read as it comes."""

    def __init__(self, *arguments: str, stdin: int = subprocess.PIPE) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._seen = b""

    def wait_for(self, text: bytes) -> None:
        """Read until *text* was said."""
        assert self.popen.stdout is not None
        assert self.popen.stderr is not None
        deadline = time.monotonic() + PATIENCE
        while text not in self._seen:
            left = deadline - time.monotonic()
            readable, *_ = select.select([self.popen.stdout], [], [], max(0, left))
            chunk = os.read(self.popen.stdout.fileno(), 4096) if readable else b""
            assert chunk, (self._seen, self.popen.stderr.read())
            self._seen += chunk

    def end(self, data: bytes | None = None) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout, stderr."""
        out, err = self.popen.communicate(data, timeout=PATIENCE)
        return self.popen.returncode, (self._seen + out).decode(), err.decode()


@contextmanager
def running(*arguments: str, stdin: int = subprocess.PIPE) -> Iterator[Process]:
    process = Process(*arguments, stdin=stdin)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


def call(*arguments: str, data: str = "") -> tuple[int, str, str]:
    """Run a command to its end: exit code, stdout, stderr."""
    with running(*arguments) as process:
        return process.end(data.encode())


@contextmanager
def typed(data: bytes, *, then_close: bool = True) -> Iterator[int]:
    """Have *data* on this process's own stdin."""
    saved = os.dup(0)
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    os.write(writer, data)
    if then_close:
        os.close(writer)
    try:
        yield writer
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        if not then_close:
            os.close(writer)


def without_warnings(stderr: str) -> str:
    """Leave out what bwrap always says where there is no systemd."""
    return "".join(
        line for line in stderr.splitlines(keepends=True) if "WARNING" not in line
    )


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def success(result: str | None, **more: object) -> bytes:
    return framed(json.dumps({"status": "success", "result": result, **more}).encode())


# ---------------------------------------------------------------- the front door


def test_help_fits_a_screen_and_has_no_colours_in_a_pipe(root: Path) -> None:
    """The overview names every command on 24 lines of 80 characters."""
    code, out, err = call("--help")

    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 23
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    for name in (*COMMANDS, "image"):
        assert f"│ {name} " in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command has a help text that tells of every option."""
    assert execute([name, "--help"]) == 0

    out = capsys.readouterr().out
    assert "--root" in out
    assert "--debug" in out
    assert all(
        re.search(r"\w", line) for line in re.findall(r"(?m)^│ --[\w-]+(.*)│$", out)
    )


def test_says_its_version() -> None:
    """Both ways to call it are the same program."""
    script = Path(sys.executable).with_name("clawtrio")
    done = subprocess.run(
        [script, "--version"], capture_output=True, timeout=PATIENCE, check=True
    )

    assert done.stdout.startswith(b"clawtrio ")
    assert call("--version") == (0, done.stdout.decode(), "")


def test_main_module_runs_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m clawtrio`` exits with what the command line returns."""
    monkeypatch.setattr(sys, "argv", ["clawtrio", "--version"])

    with pytest.raises(SystemExit) as caught:
        runpy.run_module("clawtrio", run_name="__main__")

    assert caught.value.code == 0
    assert "clawtrio" in capsys.readouterr().out
    # Tools that import every module are not to run it.
    importlib.reload(importlib.import_module("clawtrio.__main__"))


def test_main_copes_without_standard_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service without stdout is no reason to fail before anything was done."""
    monkeypatch.setattr(sys, "argv", ["clawtrio", "nope"])
    monkeypatch.setattr(sys, "stdout", None)

    with pytest.raises(SystemExit) as caught:
        _cli.main()

    assert caught.value.code == 2


@pytest.mark.bwrap
@pytest.mark.parametrize(
    ("closed", "expected"),
    [("<&-", b"x\n"), (">&-", b""), ("2>&-", b"x\n"), ("<&- >&- 2>&-", b"")],
)
def test_closed_standard_streams(root: Path, closed: str, expected: bytes) -> None:
    """Files that are opened later do not get what was meant for a closed stream."""
    command = ("/bin/sh", "-c", f'"$@" {closed}', "sh", *COMMAND)
    done = subprocess.run(
        [*command, "run", "x", "--runtime", "bwrap"],
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )

    assert done.stdout == expected
    for path in [*(root / "data/locks").iterdir(), *(root / "data/engines").iterdir()]:
        assert path.read_bytes() == b""


def test_closed_stream_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is closed is replaced by what swallows everything."""
    opened: list[str] = []

    def fstat(fd: int) -> None:
        if fd == 1:
            raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        patch.setattr(os, "open", lambda path, _: opened.append(path))
        _cli_terminal.prepare()

    assert opened == [os.devnull]


def test_importing_the_library_imports_no_terminal() -> None:
    """A bot does not pay for the command line."""
    source = "import clawtrio, sys; print({'cyclopts', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )

    assert done.stdout == b"set()\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nope"], 'Unknown command "nope"'),
        (["run"], "PROMPT requires an argument"),
        (["run", "--nope", "x"], "Unknown option: --nope"),
        (["run", "x", "--runtime", "lxc"], "Choose from"),
        (["run", "x", "--agent", "nobody"], "agent: must be one of claude, echo"),
        (["run", "x", "--group", "../x"], "group folder '../x'"),
        (["run", "  "], "the prompt is empty"),
        (["run", "-"], "the prompt is empty"),
        (["logs", "--last", "0"], "Must be >= 1"),
        (["logs", "a\x1bb"], r"group folder 'a\\x1bb'"),
        (["reset", "global"], "is reserved"),
        (["image", "build", "--runtime", "bwrap"], "Choose from"),
    ],
)
def test_misuse_is_one_line_and_code_2(
    root: Path,
    arguments: list[str],
    complaint: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What makes no sense on the command line is said in one line, not done."""
    with typed(b""):
        assert execute(arguments) == 2

    out, err = capfd.readouterr()
    assert complaint.replace("\\\\", "\\") in err
    assert (out, err.count("\n"), err[:10]) == ("", 1, "clawtrio: ")
    assert not list(root.iterdir())


def test_senseless_setting_is_code_2(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A setting that makes no sense is named."""
    monkeypatch.setenv("CLAWTRIO_IDLE_TIMEOUT", "0")

    assert execute(["doctor"]) == 2
    assert capfd.readouterr() == (
        "",
        "clawtrio: idle_timeout: must be above 0, not 0\n",
    )


def test_image_for_bwrap_makes_no_sense(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where runs need no image, building one takes a choice."""
    monkeypatch.setenv("CLAWTRIO_RUNTIME", "bwrap")

    assert execute(["image", "build"]) == 2
    assert "bwrap needs no image" in capfd.readouterr().err


def test_root_that_does_not_exist_is_code_1(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A place that cannot be used is named in one line."""
    assert execute(["run", "x", "--runtime", "bwrap", "--root", "nowhere"]) == 1

    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "nowhere" in err
    assert "make it first" in err


def test_os_error_is_one_line(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the system refuses is said as it says it, with the place."""
    (root / "groups").write_text("")

    assert execute(["run", "x", "--runtime", "bwrap"]) == 1

    err = capfd.readouterr().err
    assert re.fullmatch(r"clawtrio: '.*/groups': File exists\n", err)


def test_os_error_without_a_place(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error of the system that names no place is said all the same."""
    assert fail_with(monkeypatch, OSError("no luck")) == 1
    assert capfd.readouterr().err == "clawtrio: no luck\n"


def fail_with(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str
) -> int:
    def app(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(_cli, "app", app)
    return execute(arguments)


def test_bug_is_one_line_and_a_traceback_on_demand(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bug of ours is owned up to; where it is, only --debug shows."""
    error = ExceptionGroup("tasks", [ValueError("oh\nno")])

    assert fail_with(monkeypatch, error) == 1
    assert (
        capfd.readouterr().err
        == "clawtrio: a bug: ValueError: oh\\nno (--debug shows where)\n"
    )
    assert fail_with(monkeypatch, error, "--debug") == 1
    assert "Traceback" in capfd.readouterr().err
    assert fail_with(monkeypatch, error, "run", "--", "--debug") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_interrupt_before_the_work_is_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A Ctrl-C while the command line is read is no traceback."""
    assert fail_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capfd.readouterr() == ("", "")


def test_foreign_base_exceptions_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither an error nor an interrupt is not ours to explain."""
    with pytest.raises(GeneratorExit):
        fail_with(monkeypatch, BaseExceptionGroup("x", [GeneratorExit()]))


def test_log_records_are_lines(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever a log message quotes, it is one line, without controls."""

    def app(*_: object, **__: object) -> int:
        logging.getLogger("clawtrio.x").warning("said %s", "a\n\x1b[31mb")
        logging.getLogger("clawtrio.x").info("not told")
        return 0

    monkeypatch.setattr(_cli, "app", app)

    assert execute([]) == 0
    assert capfd.readouterr().err == "clawtrio: WARNING: said a\\n\\x1b[31mb\n"
    assert execute(["--debug"]) == 0
    assert "not told" in capfd.readouterr().err


# ---------------------------------------------------------------- run


@every_runtime
def test_run_prints_each_output(root: Path, runtime: str) -> None:
    """What the agent says comes on stdout, line by line, and the code is 0."""
    code, out, err = call("run", "one\ntwo", "--runtime", runtime)

    assert (code, out, without_warnings(err)) == (0, "one\ntwo\n", "")


@every_runtime
def test_run_as_json(root: Path, runtime: str) -> None:
    """Each output is a line of JSON in wire form; the last line is the result."""
    code, out, _ = call("run", "one\ntwo", "--json", "--runtime", runtime)

    *outputs, result = lines_of(out)
    assert code == 0
    assert [o["result"] for o in outputs] == ["one", "two", None]
    assert all("type" not in output for output in outputs)
    assert outputs[1] == {
        "status": "success",
        "result": "two",
        "partial": False,
        "answers": 0,
    }
    session = outputs[2]["newSessionId"]
    assert Path(result.pop("logPath")).is_relative_to(root / "data" / "logs" / "main")
    assert result.pop("duration") > 0
    assert result == {
        "type": "result",
        "status": "success",
        "ending": "exited",
        "error": None,
        "newSessionId": session,
        "exitCode": 0,
        "outputs": 3,
        "droppedFrames": 0,
        "unanswered": [],
        "refusedMounts": [],
        "usage": None,
    }


@pytest.mark.bwrap
def test_prompt_from_stdin(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A dash is what comes on stdin, all of it."""
    with typed("hä?\nja\r\n".encode()):
        assert execute(["run", "-", "--runtime", "bwrap"]) == 0

    assert capfd.readouterr().out == "häja\n".replace("ä", "ä?\n")


@pytest.mark.bwrap
def test_session_is_resumed_until_it_is_forgotten(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next run of a group goes on, unless it is told not to, or was reset."""

    def session(*more: str) -> str:
        arguments = ["run", "x", "--json", "--runtime", "bwrap", *more]
        assert execute(arguments) == 0
        return str(lines_of(capfd.readouterr().out)[-1]["newSessionId"])

    first = session()
    assert session() == first
    assert session("--group", "other") != first
    second = session("--new-session")
    assert second != first
    assert session() == second
    assert execute(["reset", "MAIN"]) == 0
    assert capfd.readouterr().err == "clawtrio: MAIN: forgotten\n"
    assert session() not in (first, second)
    assert (root / "data/cli/main.session").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"[" * 5000,
        b"[]",
        b'{"echo": 5}',
        b'{"echo": ""}',
        b'{"echo": "a\\u001bb"}',
        b'{"echo": "' + b"x" * 300 + b'"}',
        b"\xff",
        b" " * 2**15,
    ],
)
def test_worthless_session_files_are_ignored(
    root: Path,
    content: bytes,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is in the file is bounded and printable, or not there."""
    (root / "data/cli").mkdir(parents=True)
    (root / "data/cli/main.session").write_bytes(content)
    given: list[dict[str, Any]] = []

    async def agent(pipes: Any) -> int:
        line = b""
        while not line.endswith(b"\n"):
            line += await pipes.stdin.receive_some()
        given.append(json.loads(line))
        await pipes.stdout.send_all(success("x", newSessionId="fresh"))
        return 0

    fake(agent)

    assert execute(["run", "x"]) == 0
    assert "sessionId" not in given[0]
    assert execute(["run", "x"]) == 0
    assert given[1]["sessionId"] == "fresh"


def test_failed_resumption_hints_at_a_new_session(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """After a run that resumed and failed, one learns how not to resume."""
    fake(scripted_agent(success("x", newSessionId="stale"), exit_code=1))

    assert execute(["run", "x"]) == 1
    assert "--new-session" not in capfd.readouterr().err
    assert execute(["run", "x"]) == 1

    err = capfd.readouterr().err
    assert "exited with code 1" in err
    assert "--new-session" in err
    assert err.count("\n") == 1


@pytest.mark.bwrap
def test_agent_cannot_reach_the_terminal(
    root: Path, agent: Callable[[str], None]
) -> None:
    """Escape sequences of an agent come out as text, in outputs, errors and logs."""
    agent(
        _SAY
        + f"nasty = {NASTY!r}\n"
        + "say(status='success', result=nasty, partial=True)\n"
        + "say(status='error', error=nasty)\n"
        + "print(nasty, file=sys.stderr)\nsys.exit(3)"
    )

    code, out, err = call("run", "x", "--runtime", "bwrap")
    log = call("logs")
    as_json = call("run", "x", "--runtime", "bwrap", "--json")

    assert code == 1
    safe = r"\x1b]0;owned\x07\x1b[31mred\x9b31m\u202eleft\x7f[/nope]"
    assert out == safe + "\n"
    assert f"the agent reports: {safe}\n" in err
    assert safe in log[1]
    assert lines_of(as_json[1])[0]["result"] == NASTY
    for text in (out, err, *log[1:], *as_json[1:]):
        assert text.replace("\n", "").isprintable()


def test_agent_error_without_a_text(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An error that says nothing is reported, too."""
    fake(scripted_agent(framed(b'{"status": "error"}'), exit_code=0))

    assert execute(["run", "x"]) == 1
    assert "the agent reports: an error\n" in capfd.readouterr().err


@pytest.mark.bwrap
def test_dry_run_starts_nothing(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--dry-run prints one command line, and there is no log of a run."""
    assert execute(["run", "x", "--dry-run", "--runtime", "bwrap"]) == 0

    out = capfd.readouterr().out
    assert out.count("\n") == 1
    assert "bwrap" in out
    assert "/app/src echo" in out
    assert not list((root / "data/logs").iterdir())


@pytest.mark.docker
def test_dry_run_of_docker_can_be_pasted(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of docker it is what one would type."""
    assert execute(["run", "x", "--dry-run", "--runtime", "docker"]) == 0
    assert capfd.readouterr().out.startswith("docker run -i --rm ")


@pytest.mark.bwrap
def test_busy_group_is_one_line(root: Path, agent: Callable[[str], None]) -> None:
    """A group with a live run is not asked again, and its session not forgotten."""
    agent(SLEEPER)
    with running("run", "x", "--runtime", "bwrap") as process:
        process.wait_for(b"at work")

        again = call("run", "y", "--runtime", "bwrap")
        reset = call("reset", "main")

    complaint = "clawtrio: group 'main' has a live run already\n"
    assert (again[0], again[1], without_warnings(again[2])) == (1, "", complaint)
    assert reset == (1, "", complaint)


@pytest.mark.bwrap
def test_reader_that_leaves_ends_it_quietly(
    root: Path, agent: Callable[[str], None]
) -> None:
    """With ``| head -1``, the run is stopped, and nobody complains."""
    agent(
        _SAY
        + "for n in range(10**6):\n"
        + "    say(status='success', result=f'line {n}', partial=True)"
    )
    with running("run", "x", "--runtime", "bwrap") as process:
        process.wait_for(b"line 0\n")
        assert process.popen.stdout is not None
        process.popen.stdout.close()
        process.popen.stdout = None
        assert process.popen.stderr is not None
        err = process.popen.stderr.read().decode()
        code = process.popen.wait(PATIENCE)

    assert (code, without_warnings(err)) == (141, "")
    assert call("ps", "--runtime", "bwrap")[1] == ""


def test_nobody_reads_here(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A broken pipe is a code as of a shell, and no complaint."""
    fake(scripted_agent(success("x"), exit_code=0))
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    try:
        code = execute(["run", "x"])
    finally:
        os.dup2(saved, 1)
        os.close(saved)

    assert code == 141
    assert capfd.readouterr().err == ""


@pytest.mark.bwrap
def test_full_disk_is_one_line(root: Path) -> None:
    """A stdout that takes nothing is an error, said once."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "run", "x", "--runtime", "bwrap"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
        )

    assert done.returncode == 1
    assert without_warnings(done.stderr) == "clawtrio: No space left on device\n"


@pytest.mark.bwrap
def test_terminal_of_another_encoding(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the terminal has no character for is escaped, in errors, too."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")

    assert call("run", "ä", "--runtime", "bwrap")[:2] == (0, "\\xe4\n")
    assert "group folder '\\xe4'" in call("logs", "ä")[2]


# ---------------------------------------------------------------- signals


@every_runtime
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_signal_stops_the_container(
    root: Path,
    agent: Callable[[str], None],
    runtime: str,
    number: signal.Signals,
    expected: int,
) -> None:
    """One signal: what was said is out, the container gone, no traceback, in 5 s."""
    agent(SLEEPER)
    with running("run", "x", "--json", "--runtime", runtime) as process:
        process.wait_for(b"at work")
        started = time.monotonic()
        process.popen.send_signal(number)
        code, out, err = process.end()

    assert code == expected
    assert time.monotonic() - started < 5
    *_, result = lines_of(out)
    assert result["ending"] == "stopped"
    assert result["unanswered"] == ["x"]
    assert without_warnings(err).splitlines() == [
        "clawtrio: stopping; the same again leaves at once",
        "clawtrio: stopped",
    ]
    assert call("ps", "--runtime", runtime)[1] == ""


@pytest.mark.bwrap
def test_second_signal_leaves_at_once(root: Path, agent: Callable[[str], None]) -> None:
    """Who does not want to wait for an agent that ignores SIGTERM does not have to."""
    agent(STUBBORN)
    with running("run", "x", "--runtime", "bwrap") as process:
        process.wait_for(b"at work")
        process.popen.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGTERM)
        started = time.monotonic()
        code, _, err = process.end()

    assert code == 143
    assert time.monotonic() - started < 2
    assert "Traceback" not in err


@pytest.mark.bwrap
def test_signal_while_the_terminal_stands_still(
    root: Path, agent: Callable[[str], None]
) -> None:
    """Behind a pager that does not read on, Ctrl-C still stops the container."""
    agent(
        _SAY
        + "say(status='success', result='x' * 10**6, partial=True)\ntime.sleep(3600)"
    )
    with running("run", "x", "--runtime", "bwrap") as process:
        process.wait_for(b"x")
        process.popen.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 5
        while call("ps", "--runtime", "bwrap")[1]:
            assert time.monotonic() < deadline
        process.popen.send_signal(signal.SIGINT)
        code = process.popen.wait(5)

    assert code == 130


def test_signal_before_there_is_a_run(root: Path, tmp_path: Path) -> None:
    """An engine that does not answer can be left with Ctrl-C."""
    docker = fake_docker(tmp_path, 'touch "$0.asked"; exec sleep 3600')
    with running("run", "x", "--runtime", "docker") as process:
        wait_until(Path(f"{docker}.asked").exists)
        process.popen.send_signal(signal.SIGINT)
        code, out, err = process.end()

    assert (code, out) == (130, "")
    assert err.splitlines() == ["clawtrio: stopping; the same again leaves at once"]


def test_ignored_signals_stay_ignored(root: Path, tmp_path: Path) -> None:
    """What nohup has ignored does not stop it."""
    docker = fake_docker(
        tmp_path, 'touch "$0.asked"; sleep 1; echo no luck >&2; exit 1'
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running("run", "x", "--runtime", "docker") as process:
            wait_until(Path(f"{docker}.asked").exists)
            process.popen.send_signal(signal.SIGHUP)
            code, _, err = process.end()
    finally:
        signal.signal(signal.SIGHUP, before)

    assert code == 1
    assert err.startswith("clawtrio: docker: no luck")


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt_once(is_time: Callable[[], bool], *numbers: int) -> threading.Thread:
    """Send signals to this process, half a second apart, when it is time."""

    def work() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    return once(is_time, work)


def once(is_time: Callable[[], bool], work: Callable[[], object]) -> threading.Thread:
    """Do something in a thread when it is time."""

    def wait_and_work() -> None:
        wait_until(is_time)
        work()

    thread = threading.Thread(target=wait_and_work)
    thread.start()
    return thread


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_here(
    root: Path,
    signals: int,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first signal stops the run; a second one would end the process."""
    codes: list[int] = []
    runtime = FakeRuntime(scripted_agent(), ignores_stop=signals > 1)
    monkeypatch.setattr(_engine, "choose_runtime", lambda _: runtime)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("CLAWTRIO_STOP_GRACE", "1")

    thread = interrupt_once(lambda: bool(runtime.specs), *[signal.SIGTERM] * signals)
    code = execute(["run", "x"])
    thread.join()

    assert code == 143
    assert codes == [143] * (signals - 1)
    assert "clawtrio: stopped\n" in capfd.readouterr().err


# ---------------------------------------------------------------- chat


@every_runtime
def test_chat_by_pipe(root: Path, runtime: str) -> None:
    """Each line is a message into one run; the end of the input is the end of it."""
    code, out, err = call("chat", "--runtime", runtime, data="one\n\ntwo\r\nthree")

    assert (code, out, without_warnings(err)) == (0, "one\ntwo\nthree\n", "")
    assert len(list((root / "data/logs/main").iterdir())) == 1


@pytest.mark.bwrap
@pytest.mark.parametrize(
    ("data", "expected", "said"),
    [
        (b"one\n\ntwo\n", (0, "one\ntwo\n"), ""),
        (b"one\n/quit\nmore\n", (0, "one\n"), ""),
        (b"", (0, ""), ""),
        (b"/quit\n", (0, ""), ""),
        (b"/stop\n", (0, ""), "clawtrio: stopped\n"),
    ],
)
def test_chat_here(
    root: Path,
    data: bytes,
    expected: tuple[int, str],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A conversation ends with its input, or a command."""
    with typed(data):
        code = execute(["chat", "--runtime", "bwrap"])

    out, err = capfd.readouterr()
    assert (code, out) == expected
    assert without_warnings(err) == said


def test_chat_is_stopped(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """/stop does not wait for an answer; what is said then is a new run's."""
    runtime = fake(scripted_agent())

    with typed(b"one\n", then_close=False) as writer:
        sent = once(
            lambda: bool(runtime.specs), lambda: os.write(writer, b"/stop\n/quit\n")
        )
        assert execute(["chat"]) == 1
        sent.join()

    assert capfd.readouterr() == ("", "clawtrio: stopped\n")


def test_chat_goes_on_when_the_agent_has_left(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Who comes back after a while is answered by a new run, in the same session."""
    monkeypatch.setenv("CLAWTRIO_ANSWER_TIMEOUT", "0.3")
    runtime = fake(scripted_agent(success("Hello", newSessionId="s"), exit_code=0))
    was_said = root / "data/cli/main.session"

    with typed(b"one\n", then_close=False) as writer:
        sent = once(was_said.exists, lambda: os.write(writer, b"two\n/quit\n"))
        assert execute(["chat"]) == 0
        sent.join()

    assert capfd.readouterr() == ("Hello\nHello\n", "")
    assert len(runtime.specs) == 2
    assert json.loads(was_said.read_text()) == {"echo": "s"}


def test_chat_says_why_there_is_no_answer(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is asked once; the next message gets its chance."""
    runtime = fake(scripted_agent(exit_code=3))

    with typed(b"one\ntwo\n"):
        assert execute(["chat"]) == 1

    out, err = capfd.readouterr()
    assert out == ""
    assert 1 <= len(runtime.specs) <= 2
    assert err.count("clawtrio: ") == len(runtime.specs)
    assert "code 3" in err
    assert str(root / "data/logs/main") in err


def test_chat_tells_of_an_error_with_its_text(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The agent may say something, and that it went wrong."""
    error = b'{"status": "error", "result": "Half", "error": "overloaded"}'
    fake(scripted_agent(framed(error), exit_code=0))

    with typed(b"one\n"):
        execute(["chat"])

    out, err = capfd.readouterr()
    assert out == "Half\n"
    assert "clawtrio: the agent reports: overloaded\n" in err


def test_chat_that_nobody_reads(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It stops, and waits for no more lines."""

    async def say(_: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(_cli_runs, "say", say)
    fake(scripted_agent(success("Hello")))

    with typed(b"one\n", then_close=False):
        assert execute(["chat"]) == 141

    assert "bug" not in capfd.readouterr().err


def test_chat_is_interrupted(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A signal stops the agent, and then it is over."""
    runtime = fake(scripted_agent())
    thread = interrupt_once(lambda: bool(runtime.specs), signal.SIGTERM)

    with typed(b"one\n", then_close=False):
        assert execute(["chat"]) == 143
    thread.join()

    assert capfd.readouterr().out == ""


def test_chat_with_too_much_to_say(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Messages that do not fit into the run wait for another, or for /stop."""
    fake(scripted_agent())
    lines = b"one\n" + b"x" * 2**20 + b"\n" + b"y" * 2**20 + b"\n/stop\n/quit\n"

    code, feeder = 0, threading.Thread()
    with typed(b"", then_close=False) as writer:
        feeder = threading.Thread(target=lambda: _write_all(writer, lines), daemon=True)
        feeder.start()
        code = execute(["chat"])
        feeder.join()

    assert code == 1
    assert "clawtrio: stopped\n" in capfd.readouterr().err


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@pytest.mark.bwrap
def test_chat_at_a_terminal(root: Path) -> None:
    """A person is told how to leave, and when it is their turn."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "chat", "--runtime", "bwrap"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ) as process:
        os.close(slave)
        seen = b""
        said = [b"hello\n", b"/quit\n"]
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            assert time.monotonic() < deadline, seen
            if select.select([master], [], [], 0.1)[0]:
                try:
                    seen += os.read(master, 4096)
                except OSError:
                    break
            if said and seen.count(b"> ") == 3 - len(said):
                os.write(master, said.pop(0))
        code = process.wait(PATIENCE)
    os.close(master)

    assert code == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", seen.decode())
    assert "/quit leaves after the answers" in text
    assert "> hello\r\nhello\r\n> /quit\r\n" in text


def test_chat_at_a_terminal_here(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The sign that it is one's turn comes when the agent waits."""
    monkeypatch.setattr(os, "isatty", lambda _: True)
    part, answer = success("Hel", partial=True), success("Hello")
    fake(scripted_agent(part, answer, success(None), exit_code=0))

    with typed(b"\none\n"):
        assert execute(["chat"]) == 0

    assert capfd.readouterr().out == "> > Hel\nHello\n> "


def test_session_that_cannot_be_kept(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The answer comes all the same."""
    fake(scripted_agent(success("Hello", newSessionId="s"), exit_code=0))
    (root / "data/cli/main.session").mkdir(parents=True)

    assert execute(["run", "x"]) == 0

    out, err = capfd.readouterr()
    assert out == "Hello\n"
    assert err.startswith("clawtrio: the session cannot be remembered: ")


def test_non_blocking_stdin(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A terminal that somebody made non-blocking is read all the same."""
    fake(scripted_agent(success("Hello"), exit_code=0))
    with typed(b"", then_close=False) as writer:
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_NONBLOCK)
        timer = threading.Timer(0.3, os.write, (writer, b"one\n/quit\n"))
        timer.start()
        assert execute(["chat"]) == 0
        timer.join()

    assert capfd.readouterr().out == "Hello\n"


# ---------------------------------------------------------------- demo


@every_runtime
def test_demo(root: Path, runtime: str) -> None:
    """A newcomer sees the whole story in ten lines, and nothing is left or kept."""
    code, out, err = call("demo", "--runtime", runtime)

    assert (code, err) == (0, "")
    words = [line.split()[2] for line in out.splitlines()[:-1]]
    assert words[:5] == ["engine", "started", "asked", "answered", "answered"]
    assert words[5:] == ["follow-up", "answered", "finish", "exited", "clean"]
    assert out.endswith("All of it came back, in order.\n")
    assert not list(root.iterdir())


@pytest.mark.bwrap
def test_demo_here(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where nothing is chosen, it is bwrap; with --root, one can look at the log."""
    monkeypatch.setenv("CLAWTRIO_AGENT_COMMAND", '["false"]')

    assert execute(["demo"]) == 0
    assert execute(["demo", "--debug", "--root", ".", "--runtime", "bwrap"]) == 0

    assert " bwrap works here" in capfd.readouterr().out
    assert list((root / "data/logs/demo").iterdir())


_Steps = list[bytes | float]
_WAITS: Final = success(None)
_FIRST: Final[_Steps] = [success(line) for line in _cli_demo._PROMPT.splitlines()]
#: Until it was asked again.
_A_WHILE: Final = 0.3
_GOOD: Final[_Steps] = [
    *_FIRST,
    _WAITS,
    _A_WHILE,
    success(_cli_demo._FOLLOW_UP),
    _WAITS,
]


@pytest.mark.parametrize(
    ("agent", "problem"),
    [
        (scripted_agent(success("What?")), "expected 'Hello from the host!', not"),
        (scripted_agent(framed(b'{"status": "error"}')), "expected 'Hello"),
        (scripted_agent(exit_code=1), "exited with code 1"),
        (scripted_agent(*_FIRST, _WAITS, _A_WHILE, exit_code=0), "without an answer"),
        (scripted_agent(*_FIRST, exit_code=0), "the agent has left"),
        (
            scripted_agent(*_GOOD, success("more"), exit_code=0),
            "more than it was asked",
        ),
        (scripted_agent(*_GOOD, exit_code=3), "exited with code 3"),
    ],
)
def test_demo_fails_if_anything_is_wrong(
    root: Path,
    agent: FakeAgent,
    problem: str,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is only right if it is all right."""
    fake(agent)

    assert execute(["demo"]) == 1

    err = capfd.readouterr().err
    assert problem in err
    assert err.startswith("clawtrio: the demo failed: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("leaves_at_last", [True, False])
def test_demo_fails_if_anything_is_left(
    root: Path,
    *,
    leaves_at_last: bool,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A container may take a moment to go, but it has to."""
    looks = []

    async def find(_: object) -> Sequence[FoundContainer]:
        await trio.lowlevel.checkpoint()
        looks.append(1)
        if leaves_at_last and len(looks) > 6:
            return []
        return [FoundContainer("abc", {})]

    runtime = fake(scripted_agent(*_GOOD, exit_code=0))
    monkeypatch.setattr(runtime, "find", find)
    monkeypatch.setattr(_cli_demo, "_REMOVAL", 1.5)
    monkeypatch.setenv("CLAWTRIO_COMMAND_TIMEOUT", "0.1")

    code = execute(["demo"])

    err = capfd.readouterr().err
    assert (code, "left behind" in err) == ((0, False) if leaves_at_last else (1, True))


# ---------------------------------------------------------------- doctor


def fake_docker(place: Path, script: str, name: str = "docker") -> Path:
    """Put a client of one's own first on the PATH."""
    programs = place / "programs"
    programs.mkdir(exist_ok=True)
    program = programs / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    path = os.environ["PATH"]
    if not path.startswith(str(programs)):
        os.environ["PATH"] = f"{programs}:{path}"
    return program


@pytest.fixture(autouse=True)
def same_path_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what fake_docker does to the PATH."""
    monkeypatch.setenv("PATH", os.environ["PATH"])


@every_runtime
def test_doctor_finds_nothing_wrong(root: Path, runtime: str) -> None:
    """Where runs are possible it says so, in a pipe without colours."""
    code, out, err = call("doctor", "--runtime", runtime)

    assert (code, err) == (0, "")
    assert f"ok  {runtime}, by runtime={runtime} " in re.sub(" +", " ", out).replace(
        "ok ", "ok  "
    )
    assert out.endswith(f"Runs are possible here, by {runtime}.\n")
    assert "\x1b" not in out
    assert all(f" {name}" in out for name in ("python", "trio", "user", "disk"))


@pytest.mark.bwrap
def test_doctor_here(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is not installed is no news where it is not chosen."""
    which = shutil.which

    def find(name: str) -> str | None:
        return None if name in ("docker", "podman") else which(name)

    monkeypatch.setattr(shutil, "which", find)

    assert execute(["doctor"]) == 0

    out = capfd.readouterr().out
    assert "bwrap, by runtime=auto" in out
    assert out.count("not installed, and not needed") == 2


def test_doctor_says_what_to_do(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A chosen runtime that is down is broken, with a remedy; another one is not."""
    fake_docker(tmp_path, "echo Cannot connect to the Docker daemon >&2; exit 1")
    fake_docker(tmp_path, "echo Error: no luck >&2; exit 125", "podman")

    assert execute(["doctor"]) == 1

    out = capfd.readouterr().out
    assert re.search(r"BROKEN +docker, by runtime=auto +Cannot connect", out)
    assert re.search(r"\n +-> Start it", out)
    assert re.search(r"\n- +podman +no luck\n +->", out)
    assert "Runs are impossible here: see docker, by runtime=auto.\n" in out


def test_doctor_knows_foreign_images(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An image with an agent of its own is accepted, and said to be one."""
    info = {"SecurityOptions": ["name=seccomp"], "NCPU": 2, "ClientInfo": {}}
    info |= {"MemoryLimit": True, "PidsLimit": True}
    fake_docker(tmp_path, f"[ $1 = info ] && echo '{json.dumps(info)}' || echo null")

    assert execute(["doctor", "--runtime", "docker"]) == 0
    assert "a foreign one: its own agent is run" in capfd.readouterr().out


def test_doctor_says_how_to_label(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Docker labels nothing for SELinux that is mounted by path: the operator does."""
    info = {"SecurityOptions": ["name=seccomp", "name=selinux"], "NCPU": 2}
    info |= {"MemoryLimit": True, "PidsLimit": True, "ClientInfo": {}}
    fake_docker(tmp_path, f"[ $1 = info ] && echo '{json.dumps(info)}' || echo null")

    assert execute(["doctor", "--runtime", "docker"]) == 0
    out = capfd.readouterr().out
    assert "chcon -R -t container_file_t" in out
    assert str(root) in out


@pytest.mark.parametrize("contained", [True, False])
@pytest.mark.parametrize("chosen", ["bwrap", "docker"])
def test_doctor_tells_whether_memory_is_contained(
    root: Path,
    *,
    contained: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A sandbox without a cgroup is a warning where sandboxes are chosen."""

    class Sandboxes(FakeRuntime):
        def argv(self, spec: ContainerSpec) -> Sequence[str]:  # noqa: ARG002
            return ("/usr/bin/systemd-run" if contained else "choom", "bwrap")

    def choose(settings: Settings) -> FakeRuntime:
        runtime = Sandboxes(scripted_agent())
        # A name is an attribute of the class here, and a property elsewhere.
        monkeypatch.setattr(runtime, "name", settings.runtime, raising=False)
        return runtime

    for module in (_cli_care, _cli_doctor):
        monkeypatch.setattr(module, "choose_runtime", choose)

    assert execute(["doctor", "--runtime", chosen]) == 0

    out = capfd.readouterr().out
    if contained:
        assert re.search(r"ok +bwrap's memory +limited by a cgroup", out)
    else:
        mark = "!" if chosen == "bwrap" else "-"
        assert re.search(rf"\n{mark} +bwrap's memory +limited per process only", out)


def test_doctor_on_bad_ground(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Directories, disk and an old Trio are each broken in their own row."""
    fake(scripted_agent())

    assert execute(["doctor", "--root", "nowhere"]) == 1
    assert "make it first" in capfd.readouterr().out

    monkeypatch.setattr(Places, "free", lambda _: (GIB, 5))
    monkeypatch.setattr(_cli_doctor, "version", lambda _: "0.27.0")
    assert execute(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "only 5 inodes free" in out
    assert "pip install 'trio>=0.28'" in out

    monkeypatch.setattr(Places, "free", lambda _: (GIB - 1, None))
    assert execute(["doctor"]) == 1
    assert "lower CLAWTRIO_MIN_FREE_BYTES" in capfd.readouterr().out

    (root / "groups").rmdir()
    (root / "groups").write_text("")
    assert execute(["doctor"]) == 1
    assert "/groups': File exists" in capfd.readouterr().out


def judging(status: int) -> Handler:
    """Be an API that has one answer for everybody."""

    async def judge(call: Call) -> None:
        await call.read()
        await call.reply(b"{}", status)

    return judge


@pytest.mark.parametrize(
    ("status", "agent", "code", "row"),
    [
        (400, "claude", 0, r"ok +credential +alive: "),
        (401, "claude", 1, r"BROKEN +credential +dead: "),
        (401, "echo", 0, r"! +credential +dead: "),
    ],
)
async def test_doctor_asks_the_api(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
    *,
    status: int,
    agent: Literal["claude", "echo"],
    code: int,
    row: str,
) -> None:
    """Whether the API takes the credential is one line, and never the credential."""
    fake(scripted_agent())
    async with open_api(judging(status)) as api:
        where = f"http://127.0.0.1:{api.port}"
        (root / ".env").write_text(
            f"CLAUDE_CODE_OAUTH_TOKEN={SECRET}\nANTHROPIC_BASE_URL={where}\n"
        )
        with trio.fail_after(PATIENCE):
            assert await doctor(Settings(root=str(root), agent=agent)) == code
        assert len(api.calls) == 1

    out = capfd.readouterr().out
    said = f"{where} answers {status} to CLAUDE_CODE_OAUTH_TOKEN"
    assert re.search(f"\n{row}{said}", out)
    assert ("-> Renew CLAUDE_CODE_OAUTH_TOKEN: in .env" in out) == (status == 401)
    assert SECRET not in out


async def test_doctor_does_not_wait_for_the_api(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where nobody answers, or listens, that is said within seconds: no verdict."""
    fake(scripted_agent())

    async def look(port: int) -> None:
        where = f"http://127.0.0.1:{port}"
        (root / ".env").write_text(
            f"ANTHROPIC_API_KEY={SECRET}\nANTHROPIC_BASE_URL={where}"
        )
        with trio.fail_after(15):
            assert await doctor(Settings(root=str(root), agent="claude")) == 0
        out = capfd.readouterr().out
        assert re.search(rf"\n! +credential +unreachable: {where}", out)
        assert SECRET not in out

    async with open_api(silent) as api:
        await look(api.port)
    await look(api.port)


@pytest.mark.parametrize(
    ("changes", "is_needed"),
    [
        ({"agent": "claude"}, True),
        ({"agent": "echo"}, False),
        ({"agent": "claude", "agent_command": ("true",)}, False),
    ],
)
async def test_doctor_misses_a_credential(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    *,
    is_needed: bool,
) -> None:
    """Without one, our own agent can do nothing; another one may not need it."""
    fake(scripted_agent())

    code = await doctor(Settings(root=str(root), **changes))

    out = capfd.readouterr().out
    mark = "BROKEN" if is_needed else "-"
    assert re.search(rf"\n{mark} +credential +no credential in {root}/\.env nor", out)
    assert ("-> Set one of ANTHROPIC_API_KEY, " in out) == is_needed
    assert code == int(is_needed)


# ---------------------------------------------------------------- ps, sweep


@pytest.mark.parametrize("command", ["ps", "sweep", "reset x"])
def test_looking_after_nothing_makes_nothing(
    root: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where nothing ever ran there is nothing to do, and no directory is made."""
    assert execute(command.split()) == 0

    assert "nothing has run here yet" in capfd.readouterr().err
    assert not list(root.iterdir())


@every_runtime
def test_what_the_dead_left_is_seen_and_swept(
    root: Path, agent: Callable[[str], None], runtime: str
) -> None:
    """A live run is listed as that; what a SIGKILL leaves is listed, and swept."""
    agent(SLEEPER)
    with running("run", "x", "--runtime", runtime) as process:
        process.wait_for(b"at work")
        code, live, err = call("ps", "--runtime", runtime)
        process.popen.kill()
        process.popen.wait()
    left = call("ps", "--runtime", runtime)
    swept = call("sweep")
    again = call("ps", "--runtime", runtime)

    assert (code, err) == (0, "")
    header, row = live.splitlines()
    assert header.split() == ["CONTAINER", "RUN", "ENGINE", "STATE"]
    assert row.endswith("live")
    run = row.split()[1]
    # A sandbox dies with its engine; a container needs an agent that listens.
    if runtime != "bwrap":
        assert left[1].splitlines()[1].endswith("left behind")
        assert "clawtrio sweep" in left[2]
        assert re.search(rf"(?m)^{runtime}: removed \w{{12}}, run {run}$", swept[1])
    assert (swept[0], swept[2]) == (0, "")
    assert again[1] == ""
    assert f"{runtime} has no container" in again[2]


def test_states_of_engines(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An engine lives if its lock is held, is dead if not, unknown without a file."""
    runtime = fake(scripted_agent())

    async def find(_: object) -> Sequence[FoundContainer]:
        await trio.lowlevel.checkpoint()
        return [
            FoundContainer("1" * 64, {LABEL_ENGINE: "live", LABEL_RUN: "r\x1b1"}),
            FoundContainer("2", {LABEL_ENGINE: "dead", LABEL_RUN: "r2"}),
            FoundContainer("3", {}),
        ]

    monkeypatch.setattr(runtime, "find", find)
    with open_places(Settings(root=str(root))) as places:
        places.engines.write("dead", b"fake")
        with places.engines.lock("live"):
            assert execute(["ps"]) == 0

    assert [line.split() for line in capfd.readouterr().out.splitlines()[1:]] == [
        ["1" * 12, "r\\x1b1", "live", "live"],
        ["2", "r2", "dead", "left", "behind"],
        ["3", "?", "?", "unknown"],
    ]

    assert execute(["sweep", "--runtime", "docker"]) == 0
    assert capfd.readouterr().out == "fake: removed 2, run r2\n"

    async def only_live(_: object) -> Sequence[FoundContainer]:
        await trio.lowlevel.checkpoint()
        return [FoundContainer("3", {})]

    monkeypatch.setattr(runtime, "find", only_live)
    assert execute(["ps"]) == 0
    assert capfd.readouterr().err == ""


def test_no_containers(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """That there are none is said where it does not disturb a script."""
    (root / "data").mkdir()
    fake(scripted_agent())

    assert execute(["ps"]) == 0
    assert capfd.readouterr() == ("", f"clawtrio: fake has no container of {root}\n")


def test_runtimes_that_do_not_answer(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Listing and sweeping are bounded, and say which runtime could not be asked."""
    (root / "data").mkdir()
    fake_docker(tmp_path, "exec sleep 3600")
    fake_docker(tmp_path, "echo Error: no luck >&2; exit 125", "podman")
    monkeypatch.setenv("CLAWTRIO_COMMAND_TIMEOUT", "0.2")

    assert execute(["ps", "--runtime", "docker"]) == 1
    assert "docker: did not answer within 0.2 s" in capfd.readouterr().err

    assert execute(["sweep"]) == 1
    out, err = capfd.readouterr()
    assert out == "bwrap: nothing to remove\n"
    first, second = err.splitlines()
    assert first.startswith("clawtrio: docker: did not answer within 0.2 s")
    assert second.startswith("clawtrio: podman: no luck")

    assert execute(["sweep", "--runtime", "bwrap"]) == 0
    assert capfd.readouterr() == ("bwrap: nothing to remove\n", "")


# ---------------------------------------------------------------- logs, reset, image


@pytest.mark.parametrize("makes", [[], ["data"], ["data/logs/main"]])
def test_no_logs(
    root: Path, makes: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A group that never ran has no logs: that is code 1."""
    for name in makes:
        (root / name).mkdir(parents=True)

    assert execute(["logs"]) == 1
    assert "group 'main' has no run logs\n" in capfd.readouterr().err


def test_newest_logs(
    root: Path,
    fake: Callable[[FakeAgent], FakeRuntime],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The newest comes last, where one looks; of several each is named."""
    fake(scripted_agent(success("x"), exit_code=0))
    for _ in range(3):
        assert execute(["run", "x", "--group", "g"]) == 0
    capfd.readouterr()

    assert execute(["logs", "g"]) == 0
    newest = capfd.readouterr().out
    assert execute(["logs", "g", "--last", "2", "--path"]) == 0
    paths = capfd.readouterr().out.splitlines()
    assert execute(["logs", "g", "--last", "2"]) == 0
    both = capfd.readouterr().out

    assert newest.startswith("=== Container Run Log ===\n")
    assert paths == sorted(map(str, (root / "data/logs/g").iterdir()))[1:]
    assert Path(paths[-1]).read_text() == newest
    assert both.endswith(newest)
    assert [line for line in both.splitlines() if line.startswith("==>")] == [
        f"==> {path} <==" for path in paths
    ]


def test_nothing_to_forget(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Forgetting what nobody knows is no error."""
    with open_places(Settings(root=str(root))):
        pass

    assert execute(["reset", "main"]) == 0
    assert capfd.readouterr().err == "clawtrio: main: there was no session to forget\n"


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.podman),
    ],
)
def test_image_is_built(
    root: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build is told as it goes, and what it makes can be run."""
    name = f"clawtrio-test-cli-{os.getpid()}"
    monkeypatch.setenv("CLAWTRIO_IMAGE", name)
    try:
        code, out, err = call(
            *("image", "build", "--runtime", runtime),
            *("--base-image", "clawtrio-base:bookworm"),
        )
        ran = call("run", "hello", "--runtime", runtime)
    finally:
        subprocess.run(
            [runtime, "rmi", "-f", name], check=False, capture_output=True, timeout=60
        )

    assert (code, err) == (0, "")
    assert re.search(rf"\n{runtime} has built {name} in [\d.]+ s\n$", out)
    assert ran == (0, "hello\n", "")


def test_image_is_built_here(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a build says is fit for a terminal; what stops it, is one line."""
    fake_docker(tmp_path, r"""[ "$1" = image ] || printf 'step\033[31m\n'""")

    assert execute(["image", "build", "--runtime", "docker"]) == 0
    assert re.fullmatch(
        r"step\\x1b\[31m\ndocker has built clawtrio-agent:latest in [\d.]+ s\n",
        capfd.readouterr().out,
    )

    fake_docker(tmp_path, "echo no luck >&2; exit 1")
    assert execute(["image", "build"]) == 1
    assert "clawtrio: docker: the build failed: no luck" in capfd.readouterr().err
