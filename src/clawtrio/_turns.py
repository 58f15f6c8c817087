"""Who owes whom an answer: the state of a run's conversation. There is no I/O here.

What an agent's silence means follows from it, and in the end whether the run was a
success:

=========  ==============================  =======================================
state      while                           silence leads to
=========  ==============================  =======================================
working    something is unanswered         TIMED_OUT after ``answer_timeout``
leaving    finished, nothing unanswered    IDLE after ``close_grace``
waiting    the agent said that it waits    finish, after ``idle_timeout``
answered   otherwise                       IDLE after ``answer_timeout``
=========  ==============================  =======================================
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

import attrs

from ._models import AgentOutput, Ending, Status

State: TypeAlias = Literal["working", "leaving", "waiting", "answered"]


class Then(Enum):
    """What follows when the agent has been silent for too long."""

    FINISH = "finish"
    IDLE = "idle"
    TIME_OUT = "time out"


@attrs.frozen(kw_only=True)
class Timeouts:
    """How many seconds of silence are allowed, by state."""

    answer: float
    idle: float
    close: float


class Turns:
    """What was asked in a run, and what became of it.

    Args:
        prompt: The first message, with the number 0.
        timeouts: The patience to have.
        answers_then_waits: Whether an agent that has answered waits, without saying
            so: the way of ``eof`` mode.
    """

    def __init__(
        self, prompt: str, timeouts: Timeouts, *, answers_then_waits: bool
    ) -> None:
        self._timeouts = timeouts
        self._answers_then_waits = answers_then_waits
        self._asked = 0
        self._unanswered = {0: prompt}
        self._waiting = False
        self._failure: AgentOutput | None = None
        self.session_id: str | None = None
        self.finished = False

    @property
    def unanswered(self) -> tuple[str, ...]:
        """The texts that got no answer, in order."""
        return tuple(self._unanswered.values())

    @property
    def pending(self) -> tuple[int, ...]:
        """The numbers of the messages that got no answer, in order."""
        return tuple(self._unanswered)

    @property
    def state(self) -> State:
        """Where the conversation is; see above."""
        if self._unanswered:
            return "working"
        if self.finished:
            return "leaving"
        return "waiting" if self._waiting else "answered"

    @property
    def next_number(self) -> int:
        """The number of the next follow-up."""
        return self._asked + 1

    def ask(self, text: str) -> None:
        """Note a follow-up that was sent."""
        self._asked += 1
        self._unanswered[self._asked] = text

    def take(self, output: AgentOutput, unread: frozenset[int]) -> None:
        """Note what an output means.

        Args:
            output: The output.
            unread: The messages that the agent cannot have read when it wrote.
        """
        self.session_id = output.new_session_id or self.session_id
        if output.partial:
            return
        if output.status == "success" and output.result is not None:
            # Before anything was read, text can only be for the prompt; a failure, or
            # being ready, is no answer to it.
            unread -= {0}
        last = self._asked if output.answers is None else output.answers
        answered = [n for n in self._unanswered if n <= last and n not in unread]
        for number in answered:
            del self._unanswered[number]
        if output.status == "error":
            self._failure = output
        elif answered or output.result is not None:
            # A bare "I wait" after a failed turn does not make good for it.
            self._failure = None
        said_so = output.status == "success" and output.result is None
        self._waiting = said_so or self._answers_then_waits

    def patience(self) -> tuple[float, Then]:
        """Return the seconds that the agent may be silent for, and what then."""
        return {
            "working": (self._timeouts.answer, Then.TIME_OUT),
            "leaving": (self._timeouts.close, Then.IDLE),
            "waiting": (self._timeouts.idle, Then.FINISH),
            "answered": (self._timeouts.answer, Then.IDLE),
        }[self.state]

    def verdict(self, ending: Ending, problem: str | None) -> tuple[Status, str | None]:
        """Return the run's status, and the error if that is not success.

        Args:
            ending: Why the run is over.
            problem: What is to be said of an ending that is a failure as such.
        """
        if ending is Ending.TIMED_OUT:
            return "error", f"Container timed out after {self._timeouts.answer:.12g} s"
        if ending in {Ending.NOT_STARTED, Ending.FAILED}:
            return "error", problem
        if self._unanswered:
            how = "exited" if ending is Ending.EXITED else "stopped"
            return "error", f"Container {how} without an answer"
        if self._failure is not None:
            failure = self._failure.error or self._failure.result
            return "error", failure or "The agent reported an error"
        return "success", None
