"""The soak itself: that it runs, finds nothing, and would find something."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from clawtrio._handover import Handover

from .soak.__main__ import main, parse
from .soak.plans import draw

#: As short as can be: a round to warm up, and one that is measured.
BRIEFLY = ["0", "--seed", "7"]


@pytest.mark.bwrap
@pytest.mark.slow
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    """A short soak in sandboxes loses nothing, and leaves nothing."""
    code = main(parse([*BRIEFLY, "--runtime", "bwrap"]))

    out = capsys.readouterr().out
    assert out.endswith("soak: nothing lost, nothing left (seed 7)\n"), out
    assert code == 0


@pytest.mark.slow
def test_it_sees_what_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """An output that is lost on the way makes it fail, and is told of."""
    give = Handover.give

    async def give_all_but_the_second(self: Handover, output: Any) -> None:
        if output.new_session_id != "2":
            await give(self, output)

    with patch.object(Handover, "give", give_all_but_the_second):
        code = main(parse([*BRIEFLY, "--runtime", "fake"]))

    assert "lost, doubled or out of order: ['1', '3'" in capsys.readouterr().out
    assert code == 1


@pytest.mark.slow
def test_it_sees_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A descriptor that stays open makes it fail, and is told of."""
    opened = []
    give = Handover.give

    async def open_and_give(self: Handover, output: Any) -> None:
        opened.append((tmp_path / "any").open("w"))
        await give(self, output)

    with patch.object(Handover, "give", open_and_give):
        code = main(parse([*BRIEFLY, "--runtime", "fake"]))
    for file in opened:
        file.close()

    assert "descriptors, " in capsys.readouterr().out
    assert code == 1


def test_a_seed_is_a_plan() -> None:
    """The same seed gives the same plans, whenever; another one others."""
    plans = [draw(1, number, ["docker", "fake"]) for number in range(50)]

    assert plans == [draw(1, number, ["docker", "fake"]) for number in range(50)]
    assert plans != [draw(2, number, ["docker", "fake"]) for number in range(50)]
