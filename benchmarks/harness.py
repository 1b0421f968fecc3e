"""What the benchmarks share: options, alternating runs, the table and the JSON line."""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a benchmark.

    Attributes:
        name: ``<algorithm or part>/<network>/<size>``.
        value: The ratio or count that the benchmark is about.
        note: What it was made from, for a person.
    """

    name: str
    value: float
    note: str = ""


def main(measure: Callable[[bool], Iterable[Figure]]) -> None:
    """Run a benchmark from the command line: a small table, with ``--json`` a last line of JSON.

    Args:
        measure: Called with whether to be quick (at most 50 seconds); its figures are printed
            as they come.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="end within 50 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    figures = {}
    for figure in measure(options.quick):
        figures[figure.name] = figure.value
        print(f"{figure.name:<36} {figure.value:>12.6g}  {figure.note}", flush=True)
    if options.json:
        threads = torch.get_num_threads()
        print(json.dumps({"device": device_name(), "threads": threads, "figures": figures}))


def device_name() -> str:
    """What the processor, or the accelerator if there is one, calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processors = Path("/proc/cpuinfo")
    if processors.exists():
        for line in processors.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def alternating(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    runs: int,
    limit_seconds: float = math.inf,
) -> tuple[float, float, int]:
    """Median seconds of a run of each, taken in turns so that both meet the same machine.

    Args:
        first: Done once in each turn.
        second: The same; they change places every turn.
        runs: Turns that are timed, after two that are not.
        limit_seconds: Begin no further turn after so long, if one has been timed: what keeps
            a quick benchmark quick on a busy machine.

    Returns:
        The median of each, and the turns that were timed.
    """
    warmup = 2
    until = time.perf_counter() + limit_seconds
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(warmup + runs):
        if turn > warmup and time.perf_counter() > until:
            break
        pair = ((first, seconds[0]), (second, seconds[1]))
        for work, spent in pair if turn % 2 else reversed(pair):
            begin = now()
            work()
            duration = now() - begin
            if turn >= warmup:
                spent.append(duration)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), len(seconds[0])


def now() -> float:
    """Seconds on a clock, once the accelerator has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
