"""What a dispatcher keeps, in memory and in SQLite."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import trio
from hypothesis import given, strategies as st

from clawtrio import (
    Change,
    Contents,
    MemoryStore,
    Message,
    ScheduledTask,
    SqliteStore,
    Store,
    StoreBusyError,
)

from .helpers import open_descriptors

TASK: Final = ScheduledTask("t", "family", "Hi", "cron", "* * * * *", next_run="2030")
messages = st.builds(
    Message,
    id=st.integers(1, 5),
    chat_jid=st.text("ab", min_size=1),
    text=st.text(st.characters(exclude_categories=["Cs"])),
    task_id=st.none() | st.text("t"),
    isolated=st.booleans(),
    attempts=st.integers(0, 6),
    state=st.sampled_from(["waiting", "reached", "failed"]),
)
names = st.sampled_from(["x", "y"])
changes = st.builds(
    Change,
    put=st.lists(messages, unique_by=lambda message: message.id),
    ended=st.lists(st.integers(1, 5)),
    sessions=st.dictionaries(names, st.text("s")),
    tasks=st.dictionaries(names, st.none()),
) | st.builds(Change, tasks=st.just({"t": TASK}), put=st.lists(messages, max_size=1))


async def replay(store: Store, steps: list[Change]) -> Contents:
    """Make changes, and open the store anew."""
    await store.open()
    for change in steps:
        await store.write(change)
    await store.close()
    contents = await store.open()
    await store.close()
    return contents


@given(steps=st.lists(changes, max_size=6))
def test_both_stores_keep_the_same(
    steps: list[Change], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What one store holds after some changes, the other does, too."""
    path = tmp_path_factory.mktemp("store") / "bot.db"

    memory = trio.run(replay, MemoryStore(), steps)
    sqlite = trio.run(replay, SqliteStore(path), steps)

    assert sqlite == memory


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Both stores."""
    return MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "db")


async def test_an_id_is_never_used_again(store: Store) -> None:
    """The next id is higher than any that was, also of messages that have ended."""
    first = Change(put=[Message(id=7, chat_jid="a", text="Hi")])
    contents = await replay(store, [first, Change(ended=[7])])

    assert contents.messages == {}
    assert contents.next_id == 8


async def test_a_store_has_one_owner(store: Store) -> None:
    """It can be opened again only when it was closed."""
    await store.open()
    with pytest.raises(StoreBusyError) as caught:
        await store.open()
    assert "is in use by another dispatcher" in str(caught.value)
    await store.close()
    await store.open()
    await store.close()


async def test_nothing_is_changed_by_a_write_that_is_cancelled(store: Store) -> None:
    """Whoever is cancelled has written nothing."""
    await store.open()
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.write(Change(sessions={"a": "s"}))
    await store.close()

    assert scope.cancelled_caught
    assert (await store.open()).sessions == {}
    await store.close()


async def test_closing_is_not_cancelled(store: Store) -> None:
    """The next owner can come, whatever happened to the last one."""
    await store.open()
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.close()
    await store.open()
    await store.close()


async def test_another_process_is_kept_out(tmp_path: Path) -> None:
    """Two bots on one file would answer everything twice; a dead one has let go."""
    path = tmp_path / "db"
    program = (
        "import sys, trio, clawtrio\n"
        "async def main():\n"
        "    await clawtrio.SqliteStore(sys.argv[1]).open()\n"
        "    print(flush=True)\n"
        "    await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen(  # noqa: ASYNC220 - at most the time of a start
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        with pytest.raises(StoreBusyError):
            await SqliteStore(path).open()
        other.kill()
    store = SqliteStore(path)
    await store.open()
    await store.close()


async def test_a_change_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """A change that fails in its midst leaves no trace, and the store goes on."""
    store = SqliteStore(tmp_path / "db")
    await store.open()
    message = Message(id=1, chat_jid="a", text="Hi")
    bad = Change(put=[message], sessions={"a": "\ud83d"})
    with pytest.raises(UnicodeEncodeError):
        await store.write(bad)
    await store.write(Change(sessions={"b": "s"}))
    await store.close()

    contents = await store.open()
    await store.close()
    assert contents.messages == {}
    assert contents.sessions == {"b": "s"}


async def test_an_error_that_rolls_back_by_itself_comes_out(tmp_path: Path) -> None:
    """A full disk is what is said, not what we tried about it."""
    store = SqliteStore(tmp_path / "db")
    await store.open()
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count = 1")
    store._connection.execute(
        "CREATE TEMP TRIGGER full BEFORE INSERT ON message "
        "BEGIN SELECT RAISE(ROLLBACK, 'full'); END"
    )
    with pytest.raises(sqlite3.IntegrityError, match="full"):
        await store.write(Change(put=[Message(id=1, chat_jid="a", text="Hi")]))
    await store.close()


async def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    """Neither another version nor another format is touched, or held on to."""
    path = tmp_path / "db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    before = open_descriptors()
    with pytest.raises(sqlite3.DatabaseError, match="has version 2, not 1"):
        await SqliteStore(path).open()
    path.write_bytes(b"This is no database, but a text that is long enough. " * 99)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        await SqliteStore(path).open()
    (tmp_path / "directory").mkdir()
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        await SqliteStore(tmp_path / "directory").open()
    assert open_descriptors() == before


async def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    """Chats are their people's business."""
    path = tmp_path / "db"
    store = SqliteStore(path)
    await store.open()
    await store.write(Change(sessions={"a": "s"}))
    files = await trio.Path(tmp_path).iterdir()
    modes = {file.name: (await file.stat()).st_mode & 0o777 for file in files}
    await store.close()

    assert set(modes) >= {"db", "db.lock", "db-wal"}
    assert set(modes.values()) == {0o600}
