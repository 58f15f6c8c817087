"""What our parser is measured against: asyncio's StreamReader, line by line.

It knows frames of whole lines only, which is less than ours does; the decoder is ours.
Orders come by stdin, an object a line: the file to read, and the size of the reads in
bytes. For each, a line says how long it took and how many frames there were.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from clawtrio._codec import decode_output

START = b"---NANOCLAW_OUTPUT_START---"
END = b"---NANOCLAW_OUTPUT_END---"
#: The longest line.
LIMIT = 128 * 2**20


async def count(reader: asyncio.StreamReader) -> int:
    """Decode all frames; return how many there were."""
    frames = 0
    body: list[bytes] | None = None
    while line := await reader.readline():
        marker = line.strip() if line.startswith(b"---") else b""
        if marker == START:
            body = []
        elif body is not None and marker == END:
            frames += 1
            decode_output(b"".join(body))
            body = None
        elif body is not None:
            body.append(line)
    return frames


async def parse(reads: list[bytes]) -> int:
    """Feed *reads* one by one; return the number of frames."""
    reader = asyncio.StreamReader(limit=LIMIT)
    async with asyncio.TaskGroup() as group:
        counting = group.create_task(count(reader))
        for read in reads:
            reader.feed_data(read)
            await asyncio.sleep(0)
        reader.feed_eof()
    return counting.result()


def main() -> None:
    """Carry out the orders."""
    for line in sys.stdin:
        order = json.loads(line)
        data, size = Path(order["file"]).read_bytes(), order["read"]
        reads = [data[at : at + size] for at in range(0, len(data), size)]
        started = time.perf_counter()
        frames = asyncio.run(parse(reads))
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "frames": frames}), flush=True)


if __name__ == "__main__":
    main()
