"""Who owes whom an answer."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from clawtrio import AgentOutput, Ending
from clawtrio._turns import Then, Timeouts, Turns

ANSWER, IDLE, CLOSE = 1.0, 2.0, 3.0
TIMEOUTS = Timeouts(answer=ANSWER, idle=IDLE, close=CLOSE)
NOBODY: frozenset[int] = frozenset()


def turns_of(*, eof: bool = False) -> Turns:
    """Begin a conversation."""
    return Turns("prompt", TIMEOUTS, answers_then_waits=eof)


TEXT = AgentOutput("success", "text")
WAITS = AgentOutput("success")
ERROR = AgentOutput("error", error="broke")


# -- a model, from the contract's table alone ------------------------------------------


class Conversation(RuleBasedStateMachine):
    """Turns beside a model that is as simple as the contract's table."""

    @initialize(eof=st.booleans())
    def begin(self, *, eof: bool) -> None:
        """A run begins with a prompt."""
        self.turns = turns_of(eof=eof)
        self.eof = eof
        self.texts = ["prompt"]
        self.open = {0}
        self.state = "working"
        self.last_turn: AgentOutput | None = None
        self.session: str | None = None
        self.finished = False

    @rule(text=st.text())
    def ask(self, text: str) -> None:
        """The caller sends a follow-up."""
        assert self.turns.next_number == len(self.texts)
        self.turns.ask(text)
        self.open.add(len(self.texts))
        self.texts.append(text)

    @rule()
    def finish(self) -> None:
        """The caller wants no more."""
        self.turns.finished = self.finished = True

    @rule(
        status=st.sampled_from(["success", "error"]),
        result=st.sampled_from([None, "", "text"]),
        error=st.sampled_from([None, "", "broke"]),
        session=st.sampled_from([None, "a", "b"]),
        partial=st.booleans(),
        answers=st.none() | st.integers(-1, 6),
        unread=st.frozensets(st.integers(0, 6)),
    )
    def hear(self, unread: frozenset[int], session: str | None, **fields: Any) -> None:
        """The agent says something, before it can have read some of what was sent."""
        output = AgentOutput(new_session_id=session, **fields)
        self.turns.take(output, unread)
        self.session = session or self.session
        if output.partial:
            return
        last = 10**9 if output.answers is None else output.answers
        if output.status == "success" and output.result is not None:
            # Who says something without having read anything answers the prompt.
            unread -= {0}
        answered = {n for n in self.open if n <= last} - unread
        self.open -= answered
        if output.status == "error":
            self.last_turn = output
            self.state = "waiting" if self.eof else "answered"
            return
        if answered or output.result is not None:
            self.last_turn = output
        self.state = "waiting" if output.result is None or self.eof else "answered"

    @invariant()
    def the_texts_that_got_no_answer_are_known(self) -> None:
        """In order, each as it was asked."""
        assert self.turns.unanswered == tuple(self.texts[n] for n in sorted(self.open))
        assert self.turns.pending == tuple(sorted(self.open))
        assert self.turns.session_id == self.session

    @invariant()
    def silence_means_what_the_table_says(self) -> None:
        """By state, so long, and then."""
        if self.open:
            expected = (ANSWER, Then.TIME_OUT)
        elif self.finished:
            expected = (CLOSE, Then.IDLE)
        elif self.state == "waiting":
            expected = (IDLE, Then.FINISH)
        else:
            expected = (ANSWER, Then.IDLE)
        assert self.turns.patience() == expected

    @invariant()
    def the_verdict_is_the_contract_s(self) -> None:
        """Success: nothing unanswered, no error last, and none of three endings."""
        failed = self.last_turn is not None and self.last_turn.status == "error"
        for ending in Ending:
            status, error = self.turns.verdict(ending, "problem")
            bad = ending in {Ending.NOT_STARTED, Ending.TIMED_OUT, Ending.FAILED}
            good = not (self.open or failed or bad)
            assert (status == "success") is good
            assert (error is None) is good


TestConversation = Conversation.TestCase
TestConversation.settings = settings(stateful_step_count=20)


# -- examples --------------------------------------------------------------------------


@pytest.mark.parametrize("eof", [False, True])
def test_a_prompt_is_work(*, eof: bool) -> None:
    """Silence after the prompt is a timeout."""
    assert turns_of(eof=eof).patience() == (ANSWER, Then.TIME_OUT)


@pytest.mark.parametrize("result", ["", "text"])
def test_text_is_an_answer(result: str) -> None:
    """Even an empty text answers; an agent that then is silent is idle."""
    turns = turns_of()
    turns.take(AgentOutput("success", result), NOBODY)

    assert turns.unanswered == ()
    assert turns.patience() == (ANSWER, Then.IDLE)


def test_null_says_that_the_agent_waits() -> None:
    """An agent that waits is kept, then asked to leave, then given time to."""
    turns = turns_of()
    turns.take(WAITS, NOBODY)
    assert turns.patience() == (IDLE, Then.FINISH)
    turns.finished = True

    assert turns.patience() == (CLOSE, Then.IDLE)


@pytest.mark.parametrize("output", [TEXT, WAITS, ERROR])
def test_every_answer_in_eof_mode_means_waiting(output: AgentOutput) -> None:
    """NanoClaw's agent waits after whatever it says; an error is like a text."""
    turns = turns_of(eof=True)
    turns.take(output, NOBODY)

    assert turns.patience() == (IDLE, Then.FINISH)


def test_an_error_is_an_answer_that_failed() -> None:
    """An error frame answers, changes the state like a text, and fails the run."""
    turns = turns_of()
    turns.take(ERROR, NOBODY)

    assert turns.unanswered == ()
    assert turns.patience() == (ANSWER, Then.IDLE)
    assert turns.verdict(Ending.EXITED, None) == ("error", "broke")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (AgentOutput("error", error="broke", result="why"), "broke"),
        (AgentOutput("error", result="why"), "why"),
        (AgentOutput("error"), "The agent reported an error"),
        (AgentOutput("error", error=""), "The agent reported an error"),
    ],
)
@pytest.mark.parametrize("ending", [Ending.EXITED, Ending.IDLE, Ending.STOPPED])
def test_what_an_error_frame_says(
    output: AgentOutput, said: str, ending: Ending
) -> None:
    """The last error frame is the run's error, or at least that there was one."""
    turns = turns_of()
    turns.take(output, NOBODY)

    assert turns.verdict(ending, None) == ("error", said)


def test_only_text_answers_a_prompt_that_was_not_read() -> None:
    """One that fails, or is ready, before it was told the prompt owes an answer."""
    turns = turns_of()
    for output in (ERROR, WAITS):
        turns.take(output, frozenset({0}))
        assert turns.unanswered == ("prompt",)
    turns.take(TEXT, frozenset({0}))
    assert turns.unanswered == ()


def test_a_later_answer_makes_good_for_an_error() -> None:
    """What counts is the last turn."""
    turns = turns_of()
    turns.take(ERROR, NOBODY)
    turns.take(WAITS, NOBODY)
    assert turns.verdict(Ending.EXITED, None)[0] == "error"
    turns.ask("again")
    turns.take(WAITS, NOBODY)

    assert turns.verdict(Ending.EXITED, None) == ("success", None)


def test_an_answer_says_how_far_it_goes() -> None:
    """A frame answers all up to its number, or all that was read before."""
    turns = turns_of()
    for text in ("one", "two", "three"):
        turns.ask(text)
    left = [turns.unanswered]
    for answers, unread in ((1, NOBODY), (None, frozenset({3})), (99, NOBODY)):
        turns.take(attrs.evolve(TEXT, answers=answers), unread)
        left.append(turns.unanswered)

    assert left == [
        ("prompt", "one", "two", "three"),
        ("two", "three"),
        ("three",),
        (),
    ]


def test_partial_text_answers_nothing() -> None:
    """Of a partial frame only the session counts."""
    turns = turns_of()
    turns.take(WAITS, NOBODY)
    turns.ask("one")
    turns.take(AgentOutput("success", "so far", "s-1", partial=True), NOBODY)
    turns.take(AgentOutput("error", None, partial=True), NOBODY)

    assert turns.unanswered == ("one",)
    assert turns.session_id == "s-1"
    turns.take(WAITS, NOBODY)
    assert turns.verdict(Ending.EXITED, None) == ("success", None)


def test_a_follow_up_is_work_again() -> None:
    """An agent that waits and is asked something has to answer."""
    turns = turns_of()
    turns.take(WAITS, NOBODY)
    turns.ask("one")
    assert turns.patience() == (ANSWER, Then.TIME_OUT)
    turns.finished = True

    assert turns.patience() == (ANSWER, Then.TIME_OUT)


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        (Ending.EXITED, "Container exited without an answer"),
        (Ending.STOPPED, "Container stopped without an answer"),
        (Ending.FAILED, "the problem"),
        (Ending.NOT_STARTED, "the problem"),
        (Ending.TIMED_OUT, "Container timed out after 1 s"),
    ],
)
def test_the_errors_of_endings(ending: Ending, error: str) -> None:
    """What is said of an unanswered prompt follows from how the run ended."""
    assert turns_of().verdict(ending, "the problem") == ("error", error)


@pytest.mark.parametrize("seconds", [0.5, 1800.0, 2592000.0])
def test_a_timeout_is_told_in_plain_seconds(seconds: float) -> None:
    """However long it is, a timeout reads as a number of seconds."""
    turns = Turns(
        "prompt",
        attrs.evolve(TIMEOUTS, answer=seconds),
        answers_then_waits=False,
    )

    _, error = turns.verdict(Ending.TIMED_OUT, None)

    assert error == f"Container timed out after {str(seconds).removesuffix('.0')} s"
