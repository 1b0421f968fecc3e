"""Shared parts of the benchmarks: options, alternating runs, the table and the JSON line."""

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
        value: The ratio or count that the benchmark measures.
        note: The measurements behind the value.
        bound: The wanted range, such as ``at most 1.15``; empty where there is none.
    """

    name: str
    value: float
    note: str = ""
    bound: str = ""


def main(measure: Callable[[bool], Iterable[Figure]]) -> None:
    """Run a benchmark: print a table, and with ``--json`` one JSON object as the last line.

    Args:
        measure: Yields the figures. Its argument is True for ``--quick``, which measures the same
            as a whole run on fewer sizes, within 50 seconds on two idle cores.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer sizes; ends within 50 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    figures = {}
    for figure in measure(options.quick):
        figures[figure.name] = figure.value
        print(
            f"{figure.name:<36} {figure.value:>10.4g}  {figure.bound:<13} {figure.note}", flush=True
        )
    if options.json:
        threads = torch.get_num_threads()
        print(json.dumps({"device": device_name(), "threads": threads, "figures": figures}))


def device_name() -> str:
    """Return the name of the accelerator, or of the processor if there is none."""
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
    """Time two functions in turns, so that both run under the same conditions.

    Args:
        first: Called once in each turn.
        second: Called once in each turn; the order alternates.
        runs: Number of timed turns, after two turns that are not timed.
        limit_seconds: No turn starts after this time, once one turn has been timed.

    Returns:
        The median seconds of each function, and the number of timed turns.
    """
    warmup = 2
    until = time.perf_counter() + limit_seconds
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(warmup + runs):
        if turn > warmup and time.perf_counter() > until:
            break
        pair = ((first, seconds[0]), (second, seconds[1]))
        for function, spent in pair if turn % 2 else reversed(pair):
            begin = now()
            function()
            duration = now() - begin
            if turn >= warmup:
                spent.append(duration)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), len(seconds[0])


def now() -> float:
    """Return the time in seconds after the accelerator has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
