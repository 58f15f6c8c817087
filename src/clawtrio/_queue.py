"""Who runs next, and who makes room: a dispatcher's decisions. There is no I/O here.

Each chat has a lane of messages that wait. A lane whose turn it is gets a run, which is
given all that waits then. The rules:

- One run per group, and at most *slots* of them.
- Whose message has waited longest is next: ids rise in order of arrival.
- In a lane, tasks go before messages, and have runs of their own. They go before a
  message once, though: tasks that come while others overtake it wait behind it, or a
  chat would be mute for as long as its tasks keep coming.
- A message that failed waits for its time. If an agent failed with it, it is then tried
  alone, so that others do not fail for its sake.
- Into a live run go new messages of its chat, unless somebody waits for its place: or a
  chat where people never stop talking would keep others waiting for ever.
- A run that has nothing to answer makes room for whoever waits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import takewhile

import attrs

from ._store import Message


class RunState(Enum):
    """What a lane's run is doing."""

    WORKING = "working"
    """Something is unanswered."""

    IDLE = "idle"
    """It has answered everything."""

    LEAVING = "leaving"
    """It was told to finish."""


@attrs.define(eq=False)
class Lane:
    """What waits in one chat, and what its run is up to.

    Attributes:
        chat_jid: Which chat.
        group_key: What the lanes of one group have in common.
        tasks: The tasks that wait, in order.
        messages: The messages that wait, in order.
        state: What its run is doing; None if it has none.
        alone: Whether its run is given nothing more.
        suspicious: Whether what failed last may itself be to blame.
        idle_since: When its run became idle, in seconds.
    """

    chat_jid: str
    group_key: str
    tasks: list[Message] = attrs.field(factory=list)
    messages: list[Message] = attrs.field(factory=list)
    state: RunState | None = None
    alone: bool = False
    suspicious: bool = False
    idle_since: float = 0.0
    _due: dict[int, float] = attrs.field(factory=dict, init=False)
    _heads: list[Message] = attrs.field(factory=list, init=False)
    _last_overtaker: float = attrs.field(default=math.inf, init=False)

    @property
    def delayed(self) -> bool:
        """Whether somebody waits for a time."""
        return bool(self._due)

    def add(self, messages: Iterable[Message], due: float | None = None) -> None:
        """Have messages wait, until *due* if that is said."""
        for message in messages:
            waiting = self.messages if message.task_id is None else self.tasks
            waiting.append(message)
            waiting.sort(key=lambda waiter: waiter.id)
            if due is not None:
                self._due[message.id] = due
        self._order()

    def remove(self, messages: Iterable[Message]) -> list[Message]:
        """Have messages wait no longer; return them."""
        for message in (removed := list(messages)):
            waiting = self.messages if message.task_id is None else self.tasks
            waiting.remove(message)
            self._due.pop(message.id, None)
        self._order()
        return removed

    def _order(self) -> None:
        """Decide who may be next, in order, were they due."""
        last = self._last_overtaker
        self._heads = [task for task in self.tasks if task.id <= last]
        self._heads += self.messages[:1]
        self._heads += [task for task in self.tasks if task.id > last]

    def ready(self, now: float) -> list[Message]:
        """Return who may begin a run, the first one first."""
        due = self._due
        return [head for head in self._heads if due.get(head.id, now) <= now]

    def rank(self, now: float) -> int:
        """Return the id of the one who has waited longest of those who may begin."""
        return min(message.id for message in self.ready(now))

    def next_due(self, now: float) -> float:
        """Tell when somebody who waits for a time may begin a run."""
        times = (self._due.get(head.id, now) for head in self._heads)
        return min((time for time in times if time > now), default=math.inf)

    def ready_messages(self, now: float) -> Iterator[Message]:
        """Give the messages that may be sent, in order."""
        return takewhile(lambda m: self._due.get(m.id, now) <= now, self.messages)

    def take(self, now: float) -> list[Message]:
        """Remove and return what a run is given at its start."""
        first = self.ready(now)[0]
        self.alone = first.task_id is not None
        if self.alone:
            if self.messages and self._last_overtaker == math.inf:
                self._last_overtaker = self.tasks[-1].id
            return self.remove([first])
        self._last_overtaker = math.inf
        self.alone = self.suspicious and first.attempts > 0
        return self.remove([first] if self.alone else self.ready_messages(now))


class Queue:
    """All lanes, and which of them have a run.

    Args:
        slots: How many may.

    Attributes:
        lanes: By chat: those where something waits or runs.
        closed: Whether nothing more begins.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._busy: dict[str, Lane] = {}
        self._of_group: defaultdict[str, list[Lane]] = defaultdict(list)
        self.lanes: dict[str, Lane] = {}
        self.closed = False

    def lane(self, chat_jid: str, group_key: str) -> Lane:
        """Return the lane of a chat, made if need be."""
        if chat_jid not in self.lanes:
            self.lanes[chat_jid] = Lane(chat_jid, group_key)
            self._of_group[group_key].append(self.lanes[chat_jid])
        return self.lanes[chat_jid]

    def waiting(self, now: float) -> Iterator[Lane]:
        """Give the lanes that could have a run if there was a slot."""
        for lane in self.lanes.values():
            if lane.group_key not in self._busy and lane.ready(now):
                yield lane

    def begin(self, now: float) -> tuple[Lane, list[Message]] | None:
        """Give a slot to whoever is next; return the lane, and what its run gets."""
        if self.closed or len(self._busy) >= self._slots:
            return None
        lane = min(self.waiting(now), key=lambda o: o.rank(now), default=None)
        if lane is None:
            return None
        lane.state = RunState.WORKING
        self._busy[lane.group_key] = lane
        return lane, lane.take(now)

    def end(self, lane: Lane) -> None:
        """Take note that a lane's run is over."""
        lane.state = None
        del self._busy[lane.group_key]
        self.forget_empty(lane)

    def forget_empty(self, lane: Lane) -> None:
        """Let go of a lane that has nothing in it."""
        if lane.state is None and not lane.tasks and not lane.messages:
            del self.lanes[lane.chat_jid]
            self._of_group[lane.group_key].remove(lane)

    def to_send(self, now: float) -> list[tuple[Lane, Message]]:
        """Return the messages that go into live runs, in order."""
        if self.closed or any(self.waiting(now)):
            return []
        return [
            (lane, message)
            for lane in self._busy.values()
            if lane.state is not RunState.LEAVING and not lane.alone
            if not self._is_wanted(lane, now)
            for message in lane.ready_messages(now)
        ]

    def _is_wanted(self, lane: Lane, now: float) -> bool:
        """Tell whether the group has something to do that needs another run."""
        return any(
            waiter is not lane or message.task_id is not None
            for waiter in self._of_group[lane.group_key]
            for message in waiter.ready(now)
        )

    def to_finish(self, now: float) -> list[Lane]:
        """Return the lanes whose runs should make room, once others have been sent."""
        staying = [o for o in self._busy.values() if o.state is not RunState.LEAVING]
        if self.closed:
            return staying
        idle = [lane for lane in staying if lane.state is RunState.IDLE]
        # What waits in its own lane was not to be sent.
        useless = [o for o in idle if o.ready(now) or self._is_wanted(o, now)]
        others = sorted(
            (lane for lane in idle if lane not in useless),
            key=lambda lane: lane.idle_since,
        )
        coming = self._slots - len(staying) + len(useless)
        lacking = max(0, sum(1 for _ in self.waiting(now)) - coming) if others else 0
        return useless + others[:lacking]

    def next_due(self, now: float) -> float:
        """Tell when somebody who waits for a time may begin a run."""
        lanes = self.lanes.values()
        return min((o.next_due(now) for o in lanes if o.delayed), default=math.inf)
