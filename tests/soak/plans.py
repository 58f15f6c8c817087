"""A seed and a number -> a plan. The same ones give the same plan, always."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import attrs

from clawtrio import Ending

from .agent import NUMBERED, Step

Caller: TypeAlias = Literal[
    "listens", "waits", "cancels", "raises", "leaves", "stops", "finishes"
]
Attack: TypeAlias = Literal["none", "client", "container"]

#: How often which, relative to each other.
CALLERS: Final[Mapping[Caller, int]] = {
    "listens": 10,
    "waits": 1,
    "cancels": 3,
    "raises": 2,
    "leaves": 2,
    "stops": 3,
    "finishes": 2,
}
STEPS: Final = {
    "say": 40,
    "part": 8,
    "fail": 3,
    "ready": 3,
    "heartbeat": 3,
    "garbage": 3,
    "oversize": 1,
    "noise": 5,
    "complain": 5,
    "ask": 5,
    "sleep": 8,
}
LAST_STEPS: Final = {
    "exit": 6,
    "crash": 2,
    "die": 2,
    "tear": 2,
    "stay": 3,
    "listen": 7,
}
#: Callers that have ended the run themselves: not all outputs were for them.
ENDS_IT: Final = frozenset({"waits", "cancels", "raises", "leaves"})

MAX_FRAME_BYTES: Final = 2**20
#: Seconds of silence after which an agent that ends in it is stopped, and enough for
#: one that does not, on a busy machine.
SHORT: Final = 2.0
LONG: Final = 60.0


@attrs.frozen(kw_only=True)
class Plan:
    """One run: what its agent does, and what its caller.

    Attributes:
        number: Unique among the plans of a seed.
        runtime: The name of the runtime.
        steps: What the agent does.
        caller: What its caller does.
        moment: Seconds from start to that, and to the attack.
        count: Outputs up to that.
        slowness: Seconds that the caller spends on each output.
        follow_ups: Seconds between those that the caller sends.
        single_turn: As in the call.
        by_callback: Whether the outputs go to a callback, rather than a loop.
        patience: Seconds of silence allowed.
        attack: What is killed.
    """

    number: int
    runtime: str
    steps: tuple[Step, ...]
    caller: Caller
    moment: float
    count: int
    slowness: float
    follow_ups: tuple[float, ...]
    single_turn: bool
    by_callback: bool
    patience: float
    attack: Attack

    @property
    def prompt(self) -> str:
        """What the agent is told."""
        return json.dumps({"note": self.note, "steps": self.steps})

    @property
    def note(self) -> str:
        """The name of the file in which the agent counts."""
        return f"run-{self.number}"

    @property
    def is_complete(self) -> bool:
        """Whether the caller must have got all that the agent has written.

        What a client of docker or podman had read, and not yet written, dies with it.
        """
        lossy = self.attack == "client" and self.runtime in {"docker", "podman"}
        return self.caller not in ENDS_IT and not lossy

    @property
    def endings(self) -> frozenset[Ending]:
        """How the run may end."""
        if self.caller in ENDS_IT or self.caller == "stops" or self.attack != "none":
            return frozenset(Ending) - {Ending.NOT_STARTED}
        kind, *code = self.steps[-1]
        if kind == "listen":
            return frozenset({Ending.EXITED, Ending.IDLE, Ending.TIMED_OUT})
        if kind == "stay":
            return frozenset({Ending.IDLE, Ending.TIMED_OUT})
        return frozenset({Ending.EXITED if code == [0] else Ending.FAILED})

    @property
    def is_undisturbed(self) -> bool:
        """Whether nobody keeps the agent from its last step."""
        return self.caller in {"listens", "finishes"} and self.attack == "none"

    @property
    def exit_code(self) -> int:
        """What the agent exits with, if it gets to its last step."""
        kind, *code = self.steps[-1]
        return 137 if kind == "die" else sum(code)

    @property
    def dropped(self) -> int:
        """How many frames are dropped, if the agent gets to its last step."""
        bad = {"garbage", "oversize", "tear"}
        return sum(kind in bad for kind, *_ in self.steps)

    @property
    def asked(self) -> tuple[int, int, int]:
        """How many requests there are, bytes of theirs, and bytes of the answers."""
        sizes = [step[1] for step in self.steps if step[0] == "ask"]
        return len(sizes), sum(sizes), sum(sizes)

    @property
    def outputs(self) -> int:
        """How many outputs there are before the last step."""
        return sum(kind in NUMBERED for kind, *_ in self.steps)


def choose(chance: random.Random, weights: Mapping[Any, int]) -> Any:
    """Choose one, by weight."""
    return chance.choices(list(weights), list(weights.values()))[0]


def draw(seed: int, number: int, runtimes: Sequence[str]) -> Plan:
    """Make the plan with that number."""
    chance = random.Random(f"{seed}/{number}")
    runtime = chance.choice(runtimes)
    caller = choose(chance, CALLERS)
    steps = tuple(_steps(chance))
    attacks: Sequence[Attack] = ("none",) * 6 + ("client", "container")
    return Plan(
        number=number,
        runtime=runtime,
        steps=steps,
        caller=caller,
        moment=chance.uniform(0, 1.5),
        count=chance.randint(1, 6),
        slowness=chance.choice((0.0, 0.0, 0.0, 0.01, 0.1)),
        follow_ups=tuple(
            chance.uniform(0, 0.5) for _ in range(chance.choice((0, 0, 1, 3)))
        ),
        single_turn=chance.random() < 0.5,
        by_callback=caller not in {"waits", "leaves"} and chance.random() < 0.4,
        patience=SHORT if steps[-1][0] in {"stay", "listen"} else LONG,
        # A fake has no process.
        attack="none" if runtime == "fake" else chance.choice(attacks),
    )


def _steps(chance: random.Random) -> list[Step]:
    steps: list[Step] = [[kind] for kind in ("deaf", "fork") if chance.random() < 0.15]
    for _ in range(chance.randint(0, 30)):
        kind = choose(chance, STEPS)
        more: list[Any] = []
        if kind == "sleep":
            more = [round(chance.uniform(0, 0.3), 3)]
        elif kind == "oversize":
            more = [MAX_FRAME_BYTES + chance.randint(0, MAX_FRAME_BYTES)]
        elif kind in {"say", "noise", "complain", "ask"}:
            # Mostly small, sometimes far more than a pipe holds.
            more = [int(math.exp(chance.uniform(0, math.log(MAX_FRAME_BYTES // 2))))]
        steps.append([kind, *more])
    last = choose(chance, LAST_STEPS)
    if last == "tear":
        steps += [[last]]
    if last in {"tear", "crash"}:
        steps.append(["exit", chance.choice((1, 3, 42))])
    else:
        steps.append(["exit", 0] if last == "exit" else [last])
    return steps
