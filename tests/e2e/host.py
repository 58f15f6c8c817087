"""A bot in a process of its own, for tests that kill it or run it as somebody else.

    python host.py JSON

The JSON has settings, groups, prompt, single_turn. A line is printed for each output
and each result, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import trio

from clawtrio import Engine, Group, Settings, open_engine


def tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)  # noqa: T201 - what it is for


async def talk(engine: Engine, folder: str, wanted: dict[str, Any]) -> None:
    group = Group(name=folder, folder=folder)
    run_it = engine.open_run(
        group, wanted["prompt"], chat_jid="tg:1", single_turn=wanted["single_turn"]
    )
    async with run_it as run:
        async for output in run:
            tell(group=folder, result=output.result)
    tell(group=folder, ending=run.result.ending.name, status=run.result.status)


async def main(wanted: dict[str, Any]) -> None:
    settings = Settings(**wanted["settings"])
    async with open_engine(settings) as engine, trio.open_nursery() as nursery:
        for folder in wanted["groups"]:
            nursery.start_soon(talk, engine, folder, wanted)


if __name__ == "__main__":
    trio.run(main, json.loads(sys.argv[1]))
