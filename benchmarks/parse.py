"""How fast is the parser, next to decoding alone? Does the size of the reads matter?

Every figure is a ratio of two measurements that were made in turn, in this process, on
the same bytes: machines are noisy. ``python benchmarks/parse.py`` prints a table.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console
from rich.table import Table

from clawtrio import MarkerParser
from clawtrio._codec import decode_output
from clawtrio.testing import framed

TOTAL = 8 * 2**20
ROUNDS = 7
READS = (4096, 65536, 2**20)


def payload(size: int) -> bytes:
    """Return an output of about *size* bytes, with a few characters beyond ASCII."""
    text = ("It is “fine”, 20 °C, and tomorrow too. " * (size // 40 + 1))[:size]
    output = {"status": "success", "result": text}
    return json.dumps(output, ensure_ascii=False).encode()


def parse(data: bytes, read: int) -> int:
    """Parse *data* in reads of *read* bytes; return the number of outputs."""
    parser = MarkerParser()
    outputs = 0
    for at in range(0, len(data), read):
        outputs += len(parser.feed(data[at : at + read]))
    return outputs + len(parser.close())


def decode(payloads: list[bytes]) -> int:
    """Decode *payloads*, and nothing else."""
    return sum(decode_output(data) is not None for data in payloads)


def seconds(work: Callable[[], int], expected: int) -> float:
    """Return how long *work* takes; it must come to *expected*."""
    started = time.perf_counter()
    outcome = work()
    elapsed = time.perf_counter() - started
    if outcome != expected:
        raise RuntimeError(f"{outcome} outputs in place of {expected}")
    return elapsed


def measure(size: int) -> Iterator[tuple[str, float, float]]:
    """Give, for each size of reads, MB/s and the ratio to decoding alone."""
    one = payload(size)
    payloads = [one] * max(1, TOTAL // len(one))
    data = b"".join(map(framed, payloads))
    for read in READS:
        rates, ratios = [], []
        for _ in range(ROUNDS):
            bound = seconds(partial(decode, payloads), len(payloads))
            ours = seconds(partial(parse, data, read), len(payloads))
            rates.append(len(data) / ours / 1e6)
            ratios.append(bound / ours)
        yield f"{read:,}", statistics.median(rates), statistics.median(ratios)


def main() -> None:
    """Print the table."""
    table = Table(title="MarkerParser, medians of paired measurements")
    for name in ("payload, bytes", "reads, bytes", "MB/s", "of decoding alone"):
        table.add_column(name, justify="right")
    for size in (100, 1024, 75 * 1024, 8 * 2**20):
        print(f"measuring outputs of {size:,} bytes", file=sys.stderr)
        for read, rate, ratio in measure(size):
            table.add_row(f"{size:,}", read, f"{rate:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
