"""What the README shows to newcomers works as it stands there."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest

import clawtrio
from clawtrio.testing import FakeRuntime

from .helpers import echoing, settings_for

README = Path(__file__).parents[1] / "README.md"


def test_the_newcomer_s_bot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers what is typed, and ends with the input."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (bot,) = [block for block in blocks if "open_dispatcher" in block]
    assert len(bot.splitlines()) <= 40
    reader, writer = os.pipe()
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        os.close(writer)

    settings = settings_for(tmp_path)
    fake = partial(clawtrio.open_engine, settings, FakeRuntime(echoing()))
    monkeypatch.chdir(tmp_path)
    with os.fdopen(reader, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr(clawtrio, "open_engine", fake)
        os.write(writer, b"What is on today?\n")
        exec(compile(bot, str(README), "exec"), {"print": hear})

    assert said == ["tg:42: What is on today?"]
