"""The parts of the agent that need neither the SDK nor a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

SOURCE = Path(__file__).parents[1] / "container" / "agent_runner"
sys.path.insert(0, str(SOURCE))

import archive  # noqa: E402 - it is no package
import children  # noqa: E402
import dialogue  # noqa: E402
import options  # noqa: E402
import tools  # noqa: E402
import wire  # noqa: E402

sys.path.remove(str(SOURCE))

GIVEN = wire.AgentInput("hi", "family", "tg:1", is_main=False)
MAIN = wire.AgentInput("hi", "main", "tg:0", is_main=True)


# Dialogue


def talk(*texts: str) -> tuple[dialogue.Dialogue, list[str]]:
    """Begin a dialogue in session s, with messages 0, 1, ... and their UUIDs."""
    begun = dialogue.Dialogue(session_id="s")
    return begun, [begun.put(wire.Message(t, n), 0.0) for n, t in enumerate(texts)]


def frame(answers: int | None = None, **fields: Any) -> dict[str, Any]:
    """Give a frame in session s."""
    numbered = {} if answers is None else {"answers": answers}
    return {**fields, "new_session_id": "s", **numbered}


def test_session_is_told_once() -> None:
    """Each turn begins with the session; it is told when it changes."""
    begun = dialogue.Dialogue()
    heartbeat = {"partial": True, "new_session_id": "a"}
    assert begun.hear(dialogue.Began("a"), 0) == [heartbeat]
    assert begun.hear(dialogue.Began("a"), 0) == []
    assert begun.hear(dialogue.Began("b"), 0) == [{**heartbeat, "new_session_id": "b"}]


def test_answer_then_waits() -> None:
    """An answer that leaves nothing open is followed by the frame that it waits."""
    begun, keys = talk("a")
    assert begun.unanswered == [(keys[0], "a")]
    assert begun.hear(dialogue.Ended("A", uuids=tuple(keys)), 1) == [
        frame(0, result="A"),
        frame(0),
    ]
    assert begun.idle


def test_answers_one_by_one() -> None:
    """While something is open, it does not wait."""
    begun, keys = talk("a", "b")
    assert begun.hear(dialogue.Ended("A", uuids=(keys[0],)), 1) == [
        frame(0, result="A")
    ]
    assert begun.hear(dialogue.Ended("B", uuids=(keys[1],)), 1) == [
        frame(1, result="B"),
        frame(1),
    ]


def test_one_answer_for_all_up_to_it() -> None:
    """A result that took in several messages answers the last, and all before it."""
    begun, keys = talk("a", "b", "c")
    ended = dialogue.Ended("AB", uuids=(keys[1], "of somebody else"))
    assert begun.hear(ended, 1) == [frame(1, result="AB")]
    assert [text for _, text in begun.unanswered] == ["c"]


@pytest.mark.parametrize("uuids", [(), ("unknown",)])
def test_result_that_names_nothing(uuids: tuple[str, ...]) -> None:
    """A result without a name of ours is the oldest message's."""
    begun, _ = talk("a", "b")
    assert begun.hear(dialogue.Ended("A", uuids=uuids), 1) == [frame(0, result="A")]


def test_background_result() -> None:
    """What work in the background leads to is said, and answers nothing new."""
    begun, keys = talk("a")
    background = dialogue.Ended("by the way", ours=False)
    assert begun.hear(background, 1) == [frame(result="by the way")]
    begun.hear(dialogue.Ended("A", uuids=tuple(keys)), 1)
    assert begun.hear(background, 1) == [frame(0, result="by the way"), frame(0)]
    assert begun.hear(dialogue.Ended(None, ours=False), 1) == [frame(0)]


def test_error_is_no_text() -> None:
    """What goes wrong is an error that answers, and then it waits."""
    begun, keys = talk("a")
    assert begun.hear(dialogue.Ended(None, "401", tuple(keys)), 1) == [
        frame(0, status="error", error="401"),
        frame(0),
    ]


def test_empty_answer_is_an_answer() -> None:
    """A turn that ends without a word has answered all the same."""
    begun, keys = talk("a")
    (answer, _) = begun.hear(dialogue.Ended(None, uuids=tuple(keys)), 1)
    assert answer == frame(0, result="")


def test_note_comes_with_the_next_answer() -> None:
    """What the caller should know is said once."""
    begun, keys = talk("a", "b")
    begun.note = "a new session"
    first, *_ = begun.hear(dialogue.Ended("A", uuids=(keys[0],)), 1)
    second, *_ = begun.hear(dialogue.Ended("B", uuids=(keys[1],)), 1)
    assert first == frame(0, result="A", error="a new session")
    assert second == frame(1, result="B")


def test_message_without_number() -> None:
    """An answer to a message that has no number names none."""
    begun = dialogue.Dialogue(session_id="s")
    key = begun.put(wire.Message("a"), 0)
    assert begun.hear(dialogue.Ended("A", uuids=(key,)), 1)[0] == frame(result="A")


def test_failure_answers_all() -> None:
    """When Claude is broken, that is the answer to all that is open."""
    begun, _ = talk("a", "b")
    assert begun.fail("gone") == frame(1, status="error", error="gone")
    assert begun.idle
    assert dialogue.Dialogue().fail("gone") == {"status": "error", "error": "gone"}


def test_growing_text_is_partial() -> None:
    """Text that grows is told as such."""
    begun, _ = talk("a")
    assert begun.hear(dialogue.Grew("x"), 1) == [{"partial": True, "result": "x"}]


def test_signs_of_life() -> None:
    """It is alive while it owes an answer and is heard of, and no tool hangs."""
    limit = dialogue.LONGEST_SILENCE
    begun, keys = talk("a")
    assert begun.is_alive(limit - 1)
    assert not begun.is_alive(limit)
    assert begun.hear(None, 100) == []
    assert begun.is_alive(limit + 99)

    assert begun.hear(dialogue.ToolBegan("t"), 200) == []
    begun.hear(None, 2000)
    assert begun.is_alive(limit + 199)
    assert not begun.is_alive(limit + 200)
    assert begun.hear(dialogue.ToolEnded("t"), 2100) == []
    assert begun.is_alive(limit + 200)

    begun.hear(dialogue.ToolBegan("u"), 2200)
    begun.hear(dialogue.Ended("A", uuids=tuple(keys)), 2300)
    assert not begun.is_alive(2300)
    begun.put(wire.Message("b", 1), 9000)
    assert begun.is_alive(9001)


@given(st.data())
def test_every_message_is_answered_once(data: st.DataObject) -> None:
    """Whatever results name, numbers only grow, and the last answer is the last."""
    begun, keys = talk(*map(str, range(data.draw(st.integers(1, 6)))))
    seen = [-1]
    while not begun.idle:
        named = data.draw(st.lists(st.sampled_from([*keys, "other"]), max_size=3))
        told = begun.hear(dialogue.Ended("x", uuids=tuple(named)), 1)
        seen += [frame["answers"] for frame in told]
    assert seen == sorted(seen)
    assert seen[-1] == len(keys) - 1


# Options


@pytest.fixture
def workspace(tmp_path: Path) -> options.Workspace:
    """Make the places that are mounts in a container."""
    for name in ("group", "ipc", "global", "extra"):
        (tmp_path / name).mkdir()
    return options.Workspace(tmp_path)


def test_arguments(workspace: options.Workspace) -> None:
    """Claude starts in the group's folder, free, with what the operator chose."""
    found = options.arguments(
        GIVEN, workspace, {"CLAWTRIO_MODEL": "m", "CLAWTRIO_PARTIAL_TEXT": "1"}
    )
    assert found["cwd"] == workspace.root / "group"
    assert found["permission_mode"] == "bypassPermissions"
    assert found["model"] == "m"
    assert found["include_partial_messages"]
    assert found["system_prompt"] == {"type": "preset", "preset": "claude_code"}
    assert found["env"] == options.ENVIRONMENT


def test_operator_has_the_last_word(workspace: options.Workspace) -> None:
    """What is set in the environment stays, and nothing else is asked for."""
    found = options.arguments(GIVEN, workspace, {"API_TIMEOUT_MS": "1"})
    assert "API_TIMEOUT_MS" not in found["env"]
    assert found["model"] is None
    assert not found["include_partial_messages"]


def test_shared_memory(workspace: options.Workspace) -> None:
    """All groups but main are told the shared memory, as far as it can be passed."""
    memory = workspace.root / "global" / "CLAUDE.md"
    memory.write_bytes(b"x\0" + b"\xc3\xa9" * 100_000)
    prompt = options.arguments(GIVEN, workspace, {})["system_prompt"]
    assert prompt["append"].startswith("xé")
    assert len(prompt["append"].encode()) < 2**17
    assert "append" not in options.arguments(MAIN, workspace, {})["system_prompt"]


def test_extra_directories(workspace: options.Workspace) -> None:
    """Every directory in extra is Claude's, too; a file is none."""
    for name in ("b", "a"):
        (workspace.root / "extra" / name).mkdir()
    (workspace.root / "extra" / "file").touch()
    names = [path.name for path in options.arguments(GIVEN, workspace, {})["add_dirs"]]
    assert names == ["a", "b"]
    (workspace.root / "extra").rename(workspace.root / "elsewhere")
    assert options.arguments(GIVEN, workspace, {})["add_dirs"] == []


def test_first_prompt() -> None:
    """A task that a schedule asks for says so."""
    scheduled = wire.AgentInput("go", "g", "c", is_main=False, is_scheduled_task=True)
    assert options.first_prompt(GIVEN) == "hi"
    assert options.first_prompt(scheduled).splitlines()[1:] == ["", "go"]
    assert options.first_prompt(scheduled).startswith("[SCHEDULED TASK")


def test_places() -> None:
    """The places are those of the mounts."""
    assert options.WORKSPACE.group == Path("/workspace/group")
    assert options.WORKSPACE.ipc == Path("/workspace/ipc")
    assert str(options.WORKSPACE.conversations) == "/workspace/group/conversations"


# Archive

NOW = datetime(2026, 2, 1, 9, 5)  # noqa: DTZ001 - a local time

TRANSCRIPT: list[Any] = [
    {"type": "user", "message": {"content": "hello"}},
    {
        "type": "assistant",
        "message": {"content": [{"type": "text", "text": "hi "}, {"text": "there"}]},
    },
    {"type": "assistant", "message": {"content": [{"type": "tool_use"}, 5]}},
    {"type": "user", "message": {"content": [{"type": "text", "text": "x" * 3000}]}},
    {"type": "user", "message": {"content": 5}},
    {"type": "user", "message": "no"},
    {"type": "summary"},
    ["no"],
]


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    """Give a transcript with all sorts of lines."""
    path = tmp_path / "transcript.jsonl"
    lines = [*map(json.dumps, TRANSCRIPT), "not JSON", "", "[" * 100_000]
    path.write_text("\n".join(lines))
    return path


def kept(transcript: Path, name: str) -> str:
    """Archive *transcript*, which gets this name; give the text."""
    path = archive.archive(
        transcript,
        transcript.parent / "new" / "conversations",
        session_id="s",
        assistant="Andy",
        now=NOW,
    )
    assert path is not None
    assert path.name == name
    return path.read_text()


def test_archive(transcript: Path) -> None:
    """What people and the assistant said is kept, each of it bounded."""
    assert kept(transcript, "2026-02-01-conversation-0905.md") == (
        "# Conversation\n\nArchived: Feb 01, 2026, 09:05\n\n---\n\n"
        f"**User**: hello\n\n**Andy**: hi there\n\n**User**: {'x' * 2000}...\n"
    )


@pytest.mark.parametrize(
    ("summary", "name"),
    [
        ("Plans: the *big* trip!", "plans-the-big-trip"),
        ("a" * 99, "a" * 50),
        ("...", "conversation-0905"),
        ("", "conversation-0905"),
        (5, "conversation-0905"),
    ],
)
def test_archive_is_named_after_the_summary(
    transcript: Path, summary: object, name: str
) -> None:
    """A summary that Claude has made is its name, as far as a file can have it."""
    entries = [5, {"sessionId": "t"}, {"sessionId": "s", "summary": summary}]
    index = transcript.with_name("sessions-index.json")
    index.write_text(json.dumps({"entries": entries}))
    kept(transcript, f"2026-02-01-{name}.md")


@pytest.mark.parametrize(
    "index", ["not JSON", "[]", '{"entries": 5}', '{"entries":[]}']
)
def test_index_that_is_none(transcript: Path, index: str) -> None:
    """An index that says nothing of the session is none."""
    transcript.with_name("sessions-index.json").write_text(index)
    kept(transcript, "2026-02-01-conversation-0905.md")


def test_nothing_to_archive(tmp_path: Path) -> None:
    """A transcript in which nobody spoke is not kept."""
    empty = tmp_path / "t"
    empty.touch()
    found = archive.archive(empty, tmp_path, session_id="", assistant="", now=NOW)
    assert found is None


# Tools


@pytest.fixture
def mailbox(tmp_path: Path) -> tools.Mailbox:
    """Give the mailbox of a group that is not main."""
    return tools.Mailbox(tmp_path, "tg:1", "family", is_main=False)


@pytest.fixture
def main_mailbox(tmp_path: Path) -> tools.Mailbox:
    """Give the mailbox of main."""
    return tools.Mailbox(tmp_path, "tg:0", "main", is_main=True)


def use(mailbox: tools.Mailbox, tool: str, /, **arguments: object) -> str:
    """Use a tool."""
    (found,) = (known for known in tools.ALL if known.name == tool)
    return found.use(mailbox, arguments)


def posted(mailbox: tools.Mailbox, directory: str = "tasks") -> dict[str, Any]:
    """Take the one file that was written, without its time."""
    (path,) = (mailbox.directory / directory).iterdir()
    assert path.suffix == ".json"
    value: dict[str, Any] = json.loads(path.read_bytes())
    path.unlink()
    stamp = value.pop("timestamp")
    assert datetime.fromisoformat(stamp).tzinfo is not None
    assert stamp.endswith("Z")
    return value


def test_send_message(mailbox: tools.Mailbox) -> None:
    """A message goes to the chat that asked, from whoever speaks."""
    expected = {
        "type": "message",
        "chatJid": "tg:1",
        "text": "half \ud83d",
        "groupFolder": "family",
    }
    assert use(mailbox, "send_message", text="half \ud83d") == "Message sent."
    assert posted(mailbox, "messages") == expected
    use(mailbox, "send_message", text="half \ud83d", sender="Researcher")
    assert posted(mailbox, "messages") == {**expected, "sender": "Researcher"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("cron", "*/5 * * * *"),
        ("cron", "0 9 * * 1-5"),
        ("interval", "300000"),
        ("once", "2026-02-01T15:30:00"),
        ("once", "2026-02-01T15:30"),
    ],
)
def test_schedule_task(mailbox: tools.Mailbox, kind: str, value: str) -> None:
    """A task is written as the host's scheduler takes it, and its id is told."""
    said = use(
        mailbox,
        "schedule_task",
        prompt="water",
        schedule_type=kind,
        schedule_value=value,
    )
    task = posted(mailbox)
    assert said == f"Task {task.pop('taskId')} scheduled: {kind} {value}"
    assert task == {
        "type": "schedule_task",
        "prompt": "water",
        "schedule_type": kind,
        "schedule_value": value,
        "context_mode": "group",
        "targetJid": "tg:1",
        "createdBy": "family",
    }


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("cron", "every day", "no cron expression"),
        ("cron", "61 * * * *", "no cron expression"),
        ("cron", "0 0 30 2 *", "no cron expression"),
        ("interval", "5 minutes", "no interval"),
        ("interval", "0", "no interval"),
        ("interval", "-5", "no interval"),
        ("interval", "\u0665", "no interval"),
        ("interval", "9" * 5000, "no interval"),
        ("once", "tomorrow", "no local time"),
        ("once", "2026-02-01", "no local time"),
        ("once", "2026-02-01T15:30:00Z", "no local time"),
        ("once", "2026-02-01T15:30:00+01:00", "no local time"),
    ],
)
def test_schedule_that_means_nothing(
    mailbox: tools.Mailbox, kind: str, value: str, problem: str
) -> None:
    """What no scheduler could take is refused in words, and nothing is written."""
    for name, others in [("schedule_task", {"prompt": "x"}), ("update_task", {})]:
        with pytest.raises(tools.ToolError, match=problem):
            use(
                mailbox,
                name,
                task_id="t",
                schedule_type=kind,
                schedule_value=value,
                **others,
            )
    assert not (mailbox.directory / "tasks").exists()


def test_only_main_schedules_for_others(
    mailbox: tools.Mailbox, main_mailbox: tools.Mailbox
) -> None:
    """A group schedules for itself; main for any."""
    given = {"prompt": "x", "schedule_type": "interval", "schedule_value": "1"}
    with pytest.raises(tools.ToolError, match="only the main group"):
        use(mailbox, "schedule_task", target_group_jid="tg:2", **given)
    use(mailbox, "schedule_task", target_group_jid="tg:1", **given)
    assert posted(mailbox)["targetJid"] == "tg:1"
    use(main_mailbox, "schedule_task", target_group_jid="tg:2", **given)
    assert posted(main_mailbox)["targetJid"] == "tg:2"


TASKS: list[Any] = [
    {
        "id": "t1",
        "groupFolder": "family",
        "prompt": "water\nthe plants",
        "schedule_type": "cron",
        "schedule_value": "0 9 * * *",
        "status": "active",
        "next_run": "2026-02-01T09:00:00Z",
    },
    {"id": "t2", "groupFolder": "work", "prompt": "x" * 99},
    5,
]


def test_list_tasks(mailbox: tools.Mailbox, main_mailbox: tools.Mailbox) -> None:
    """A group sees its own tasks, main sees all, each on a line."""
    assert use(mailbox, "list_tasks") == "No scheduled tasks."
    (mailbox.directory / "current_tasks.json").write_text(json.dumps(TASKS))
    first = (
        "- [t1] water the plants (cron: 0 9 * * *) - active, next: 2026-02-01T09:00:00Z"
    )
    assert use(mailbox, "list_tasks").splitlines() == ["Scheduled tasks:", first]
    _, again, other = use(main_mailbox, "list_tasks").splitlines()
    assert again == first
    assert other == f"- [t2] {'x' * 50}... (None: None) - None, next: never"


@pytest.mark.parametrize("content", ["no", "[" * 100_000])
def test_list_that_cannot_be_read(mailbox: tools.Mailbox, content: str) -> None:
    """A list that is none is an error, not an empty list."""
    (mailbox.directory / "current_tasks.json").write_text(content)
    with pytest.raises(tools.ToolError, match="cannot be read"):
        use(mailbox, "list_tasks")


def test_list_of_another_shape(mailbox: tools.Mailbox) -> None:
    """A value that is no list has no tasks."""
    (mailbox.directory / "current_tasks.json").write_text("{}")
    assert use(mailbox, "list_tasks") == "No scheduled tasks."


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_changes(mailbox: tools.Mailbox, verb: str) -> None:
    """A task is changed by its id, and by who asks."""
    assert use(mailbox, f"{verb}_task", task_id="t1") == f"Asked to {verb} task t1."
    assert posted(mailbox) == {
        "type": f"{verb}_task",
        "taskId": "t1",
        "groupFolder": "family",
        "isMain": False,
    }


def test_update_task(main_mailbox: tools.Mailbox) -> None:
    """Only what is given is changed."""
    expected = {
        "type": "update_task",
        "taskId": "t",
        "groupFolder": "main",
        "isMain": "true",
    }
    use(main_mailbox, "update_task", task_id="t", prompt="y")
    assert posted(main_mailbox) == {**expected, "prompt": "y"}
    use(main_mailbox, "update_task", task_id="t", schedule_value="60000")
    assert posted(main_mailbox) == {**expected, "schedule_value": "60000"}
    given = {"schedule_type": "once", "schedule_value": "2026-01-01T00:00"}
    use(main_mailbox, "update_task", task_id="t", **given)
    assert posted(main_mailbox) == {**expected, **given}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "nothing to change"),
        ({"schedule_type": "cron"}, "needs its schedule_value"),
        ({"schedule_value": "whenever"}, "no cron.*; .*no interval.*; .*no local"),
    ],
)
def test_update_that_means_nothing(
    mailbox: tools.Mailbox, given: dict[str, str], problem: str
) -> None:
    """A change that changes nothing, or is none, is refused."""
    with pytest.raises(tools.ToolError, match=problem):
        use(mailbox, "update_task", task_id="t", **given)


def test_register_group(mailbox: tools.Mailbox, main_mailbox: tools.Mailbox) -> None:
    """Main registers groups; others are not offered it, and cannot."""
    given = {
        "jid": "tg:5",
        "name": "Dev",
        "folder": "telegram_dev",
        "trigger": "@Andy",
    }
    with pytest.raises(tools.ToolError, match="only the main group"):
        use(mailbox, "register_group", **given)
    use(main_mailbox, "register_group", **given)
    assert posted(main_mailbox) == {"type": "register_group", **given}
    assert len(tools.offered(mailbox)) == 7
    assert len(tools.offered(main_mailbox)) == 8


def test_schemas_are_strict() -> None:
    """No tool takes what it does not know, nor an empty text."""
    for tool in tools.ALL:
        assert tool.schema["additionalProperties"] is False
        assert set(tool.schema["required"]) <= set(tool.properties)
        assert all(p["minLength"] == 1 for p in tool.properties.values())


def test_mailbox_that_cannot_be_written(mailbox: tools.Mailbox) -> None:
    """Where a file stands in the way that is said, and nothing half-done is left."""
    (mailbox.directory / "messages").touch()
    with pytest.raises(tools.ToolError, match="the mailbox cannot be written"):
        use(mailbox, "send_message", text="x")


def test_message_that_is_too_large(mailbox: tools.Mailbox) -> None:
    """What the host would not take is refused here."""
    with pytest.raises(tools.ToolError, match="too large"):
        use(mailbox, "send_message", text="x" * 2**20)


# Children


@pytest.fixture
def shell() -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell that has a child of its own, and says so."""
    argv = ["sh", "-c", "sleep 60 & echo; wait"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_descendants_are_killed(shell: subprocess.Popen[bytes]) -> None:
    """Children and theirs are gone, and then there are none to signal."""
    below = children._descendants()
    assert shell.pid in below
    assert len(below) >= 2
    children.kill_all()
    assert shell.wait(10) == -signal.SIGKILL
    assert shell.pid not in children._descendants()


def test_nobody_to_signal(tmp_path: Path) -> None:
    """A process without children has nobody to signal."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "import children; assert not children.signal_all(15)\n"
        "children.kill_all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_processes_that_go_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is gone before it is looked at, or signalled, is no error."""
    assert children._parent_of(Path("/proc/no-such")) is None
    monkeypatch.setattr(children, "_descendants", lambda: [2**30])
    children.kill_all()
    assert os.getpid() > 0
