"""The soak itself: that it runs, finds nothing, and would find something."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import pytest

from clawtrio import AgentOutput
from clawtrio._handover import Handover

from .soak.__main__ import main, parse
from .soak.plans import draw

#: As short as can be: a round to warm up, and one that is measured.
BRIEFLY = ("0", "--runtime")
#: Its first rounds have as many runs at a time as there may be, and a dispatcher.
SEED = "257"
#: As many, and nothing beside them, which would wait for what is lost.
SEED_OF_RUNS = "601"


@pytest.mark.bwrap
@pytest.mark.slow
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    """A short soak in sandboxes loses nothing, and leaves nothing."""
    code = main(parse([*BRIEFLY, "bwrap", "--seed", SEED]))

    out = capsys.readouterr().out
    assert out.endswith(f"soak: nothing lost, nothing left (seed {SEED})\n"), out
    assert code == 0


@pytest.mark.slow
def test_it_sees_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output that is lost, or a descriptor left open, makes it fail, and is told."""
    give = Handover.give
    opened = []

    async def lose_the_second(self: Handover, output: AgentOutput) -> None:
        opened.append((tmp_path / "any").open("w"))
        if output.new_session_id != "2":
            await give(self, output)

    with patch.object(Handover, "give", lose_the_second):
        code = main(parse([*BRIEFLY, "fake", "--seed", SEED_OF_RUNS]))
    for file in opened:
        file.close()

    out = capsys.readouterr().out
    assert "lost, doubled or out of order: ['1', '3'" in out
    assert re.search(r"^left: \d+ descriptors, \d+ before$", out, re.MULTILINE)
    assert code == 1


def test_a_seed_is_a_plan() -> None:
    """The same seed gives the same plans, whenever; another one others."""
    plans = [draw(1, number, ["docker", "fake"]) for number in range(50)]

    assert plans == [draw(1, number, ["docker", "fake"]) for number in range(50)]
    assert plans != [draw(2, number, ["docker", "fake"]) for number in range(50)]
