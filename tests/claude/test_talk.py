"""What is said: prompts, answers, follow-ups, sessions."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import trio

from tests.anthropic_api import Text, ToolUse
from tests.test_agent_runner import INPUT, line, message

from .conftest import Talking


async def test_prompt_follow_ups_and_close(talking: Talking) -> None:
    """The session is told first; each answer comes whole, and then it waits."""
    async with talking(Text(("Hel", "lo")), Text(("again",))) as talk:
        await talk.start("what is it?")
        began, answer, waits = await talk.agent.next(3)
        session_id = began.pop("newSessionId")
        assert str(uuid.UUID(session_id)) == session_id
        assert began == {"status": "success", "result": None, "partial": True}
        context = {"newSessionId": session_id, "answers": 0}
        assert answer == {"status": "success", "result": "Hello", **context}
        assert waits == {"status": "success", "result": None, **context}

        started = trio.current_time()
        await talk.tell("what more?", 7)
        answer, waits = await talk.agent.next(2)
        assert (answer["result"], answer["answers"]) == ("again", 7)
        assert (waits["result"], waits["answers"]) == (None, 7)
        assert trio.current_time() - started < 5
        assert await talk.close() == []
        first, second = (json.dumps(turn.body["messages"]) for turn in talk.api.turns)
    assert "what is it?" in first
    assert "what more?" in second


async def test_follow_up_into_the_running_turn(talking: Talking) -> None:
    """What is sent while Claude works is answered, each under its number."""
    slow = ToolUse("Bash", {"command": "sleep 1"})
    async with talking(slow, Text(("first",)), Text(("second",))) as talk:
        await talk.start()
        await talk.api.wait_turns(1)
        await talk.tell("and this?", 1)
        frames = await talk.agent.next(3)
        if frames[-1].get("answers") != 1:
            frames += await talk.agent.next(1)
        assert frames[-1]["answers"] == 1
        assert frames[-1]["result"] is None or await talk.agent.next(1)
        assert any("and this?" in turn.said for turn in talk.api.turns)
        await talk.close()


async def test_close_lets_the_turn_end(talking: Talking) -> None:
    """A close that comes early waits for the answer that is due."""
    async with talking(Text(("a", "b"), pause=0.5)) as talk:
        await talk.start()
        await talk.api.wait_turns(1)
        frames = await talk.close()
    assert [frame["result"] for frame in frames] == [None, "ab", None]


async def test_partial_text(talking: Talking) -> None:
    """Where it is asked for, text comes while it grows, and then once more, whole."""
    async with talking(
        Text(("one ", "two"), pause=0.2), CLAWTRIO_PARTIAL_TEXT="1"
    ) as talk:
        await talk.start()
        frames = (await talk.agent.next(4))[1:]
        assert [(f["result"], f.get("partial")) for f in frames] == [
            ("one ", True),
            ("two", True),
            ("one two", None),
        ]
        await talk.close()


async def test_eof_mode(talking: Talking, workspace: Path) -> None:
    """Without a lifeline follow-ups are files, taken in order, gone once read."""
    inbox = workspace / "ipc" / "input"
    inbox.mkdir()
    prelude = f"import wire; wire.INBOX = Path({str(inbox)!r})"
    async with talking(
        Text(("1",)), Text(("2",)), Text(("3",)), prelude=prelude
    ) as talk:
        await talk.agent.send(line(INPUT))
        await talk.agent.hang_up()
        assert (await talk.agent.next(3))[1]["result"] == "1"
        write(inbox / "1.json", message("b", id=1))
        assert (await talk.agent.next(2))[0]["result"] == "2"
        write(inbox / "2.json", message("c"))
        assert (await talk.agent.next(2))[0]["result"] == "3"
        write(inbox / "_close", b"")
        assert await talk.agent.rest() == []
        assert talk.agent.process.returncode == 0
    assert names_in(inbox) == []


def write(path: Path, data: bytes) -> None:
    """Have a file there at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def names_in(directory: Path) -> list[str]:
    """List what is there."""
    return sorted(path.name for path in directory.iterdir())


async def test_session_is_resumed(talking: Talking) -> None:
    """A second start goes on in the first one's session, and knows what was said."""
    async with talking(Text(("noted",))) as talk:
        await talk.start("the number is 42")
        session_id = (await talk.agent.next(3))[0]["newSessionId"]
        await talk.close()
    async with talking(Text(("42",))) as talk:
        await talk.start("which number?", sessionId=session_id)
        frames = await talk.agent.next(3)
        assert {frame["newSessionId"] for frame in frames} == {session_id}
        assert "error" not in frames[1]
        history = json.dumps(talk.api.turns[0].body["messages"])
        assert "the number is 42" in history
        assert "noted" in history
        await talk.close()


@pytest.mark.parametrize("stale", ["echo-12", "01234567-89ab-4def-8123-456789abcdef"])
async def test_stale_session(talking: Talking, stale: str) -> None:
    """A session that is gone is replaced by a new one, and the answer says so."""
    async with talking(Text(("fresh",))) as talk:
        await talk.start(sessionId=stale)
        began, answer, waits = await talk.agent.next(3)
        assert began["newSessionId"] not in {None, stale}
        assert answer["result"] == "fresh"
        assert answer["status"] == "success"
        assert answer["error"].startswith(f"session {stale!r} cannot be resumed: ")
        assert "error" not in waits
        await talk.close()
        assert f"session {stale!r} cannot be" in "\n".join(await talk.agent.said())


async def test_what_claude_is_given(talking: Talking, workspace: Path) -> None:
    """Claude has shared memory, the extra places, the model and a task's preface."""
    (workspace / "global" / "CLAUDE.md").write_text("SHARED-MEMORY")
    (workspace / "group" / "CLAUDE.md").write_text("GROUP-MEMORY")
    (workspace / "extra" / "books").mkdir()
    async with talking(CLAWTRIO_MODEL="claude-haiku-4-5") as talk:
        await talk.start("go", isScheduledTask=True)
        await talk.agent.next(3)
        await talk.close()
        body = talk.api.turns[0].body
    assert body["model"] == "claude-haiku-4-5"
    system, messages = json.dumps(body["system"]), json.dumps(body["messages"])
    assert "SHARED-MEMORY" in system
    assert "GROUP-MEMORY" in system + messages
    assert str(workspace / "extra" / "books") in system + messages
    assert "[SCHEDULED TASK - " in messages
    names = {tool["name"] for tool in body["tools"]}
    assert {"Bash", "Write"} <= names
    assert talk.api.turns[0].headers["x-api-key"] == "token"


async def test_main_has_its_own_memory(talking: Talking, workspace: Path) -> None:
    """The main group is not told the shared memory: it writes it."""
    (workspace / "global" / "CLAUDE.md").write_text("SHARED-MEMORY")
    async with talking() as talk:
        await talk.start(isMain=True)
        await talk.agent.next(3)
        await talk.close()
        assert "SHARED-MEMORY" not in json.dumps(talk.api.turns[0].body)


async def test_tools_reach_the_host(talking: Talking, workspace: Path) -> None:
    """Claude writes files, and its messages and tasks are in the mailbox."""
    steps = (
        ToolUse("Write", {"file_path": f"{workspace}/group/a.txt", "content": "A"}),
        ToolUse("mcp__nanoclaw__send_message", {"text": "half-way"}),
        ToolUse(
            "mcp__nanoclaw__schedule_task",
            {
                "prompt": "water the plants",
                "schedule_type": "cron",
                "schedule_value": "0 9 * * 1",
            },
        ),
        ToolUse("mcp__nanoclaw__pause_task", {"task_id": "t", "more": 1}),
        Text(("done",)),
    )
    async with talking(*steps) as talk:
        await talk.start()
        assert (await talk.agent.next(3))[1]["result"] == "done"
        await talk.close()
        results = [turn.said for turn in talk.api.turns[1:]]
    assert results[1] == "Message sent."
    assert results[2].startswith("Task task-")
    assert "additional properties" in results[3].lower()
    assert (workspace / "group" / "a.txt").read_text() == "A"
    (sent,) = read_all(workspace / "ipc" / "messages")
    assert sent["text"] == "half-way"
    (task,) = read_all(workspace / "ipc" / "tasks")
    assert task["schedule_value"] == "0 9 * * 1"


def read_all(directory: Path) -> list[dict[str, object]]:
    """Read the files that are there."""
    return [json.loads(path.read_bytes()) for path in sorted(directory.iterdir())]


async def test_transcript_is_archived(talking: Talking, workspace: Path) -> None:
    """Before Claude shortens its memory, what was said is kept as Markdown."""
    async with talking(Text(("I see.",)), Text(("<summary>short</summary>",))) as talk:
        await talk.start("remember the milk", assistantName="Andy")
        await talk.agent.next(3)
        await talk.tell("/compact", 1)
        await talk.agent.next(2)
        await talk.close()
    (archived,) = (workspace / "group" / "conversations").iterdir()
    text = archived.read_text()
    assert "**User**: remember the milk" in text
    assert "**Andy**: I see." in text
