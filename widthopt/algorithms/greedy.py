"""Greedy slimming of a trained supernet, the search of AutoSlim.

Slimming starts at the widest subnet and removes one *bin* per *move*: the channels between the
count of a width variable and the next lower entry of its *grid*. A *candidate* is a subnet with
one more bin removed. The move is the candidate with the fewest top-1 errors on the evaluation
images. The images come in *chunks*. BatchNorm uses the statistics of a chunk, or those of
*calibration* images, which are then put in front of every chunk.

Two engines count the errors. ``naive`` runs every candidate as a subnet. ``fast`` makes the same
decisions with fewer operations: it removes a bin by zeros in the columns of the dense layers that
read it, because before these layers each channel is computed independently. Only these layers and
the layers that depend on them run again. All other values come from the *base*, the pass at the
current counts, which runs once for all candidates.

Source: Yu and Huang, 2019, "AutoSlim"; docs/algorithms/autoslim.md, 1.7 and 4.3.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthopt.algorithms.flow import Flow
from widthopt.errors import InputError
from widthopt.files import write_atomically, writing
from widthopt.identity import canonical, differences
from widthopt.networks.supernet import Extent, Supernet
from widthopt.setting import Runtime
from widthopt.tracing import symbolic_trace
from widthopt.training import distributed
from widthopt.training.devices import autocast, memory_format
from widthopt.widthgraph import Axis, Layer, WidthGraph


logger = logging.getLogger("widthopt")

Engine = Literal["fast", "naive"]
"""How errors are counted; see the module."""

Grids = Mapping[str, Sequence[int]]
"""Channel counts that each free width variable may have, ascending up to the supernet's."""

Chunk = tuple[Tensor, Tensor]
"""Images, of shape ``(batch, 3, height, width)``, and the labels of all or of the last ones."""

FORMAT = 1
"""Version of the search log."""

_SHOW_SECONDS = 5.0


class Solution(NamedTuple):
    """The first network of the path that meets a budget."""

    budget_macs: int
    channels: dict[str, int]


class Move(NamedTuple):
    """One step of the path.

    Attributes:
        variable: The width variable that lost a bin.
        channels: Its channels after the move.
        errors: Top-1 errors of every candidate, by the variable that would lose a bin.
        macs: MACs of the network after the move, for one image.
    """

    variable: str
    channels: int
    errors: dict[str, int]
    macs: int


@dataclass(frozen=True, slots=True)
class Slimmed:
    """Result and cost of slimming.

    Attributes:
        solutions: One for each budget, the highest first.
        moves: The path.
        macs: MACs of all forward passes, over all images.
        seconds: Time of all moves, including those before a resume.
    """

    solutions: tuple[Solution, ...]
    moves: tuple[Move, ...]
    macs: int
    seconds: float


class _Entry(NamedTuple):
    """A move in the log, and its cost."""

    move: Move
    run_macs: int
    seconds: float


def slim(
    supernet: Supernet,
    grids: Grids,
    chunks: Sequence[Chunk],
    *,
    budgets_macs: Sequence[int],
    runtime: Runtime,
    rules: Mapping[Any, Any] | None = None,
    log: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    engine: Engine = "fast",
    cache_bytes: int = 8_000_000_000,
    calibration: Tensor | None = None,
) -> Slimmed:
    """Slim a supernet greedily, and return a subnet for each budget.

    One path serves all budgets. Each move has the fewest errors; ties go to the variable that comes
    first in `WidthGraph.free`. The path ends at the first network within the lowest budget. The
    supernet is not changed.

    Args:
        supernet: The trained supernet, on its device.
        grids: Grid of each free width variable; a grid of one entry keeps its count.
        chunks: Held-out images in random order. A pass normalizes with the statistics of one
            chunk. In distributed searches each process has different, complete chunks, because
            part of a chunk would have other statistics.
        budgets_macs: Largest MACs of a solution for one image; any number, in any order.
        runtime: Device and precision. With bfloat16, the engines may decide differently if two
            candidates are nearly equal.
        rules: The tracing rules of the supernet's network.
        log: File to which each move is written. A search that was stopped resumes from it with the
            same result.
        identity: Plain data that the moves depend on, in addition to grids and chunk sizes.
        engine: How errors are counted.
        cache_bytes: Memory for base values of the fast engine; further values are recomputed.
        calibration: Images, of shape ``(batch, 3, height, width)``, on which BatchNorm statistics
            are computed instead of the chunks; the same on all processes.

    Raises:
        InputError: A budget is out of reach or above the widest subnet, a grid does not ascend to
            the supernet's count, or the log belongs to another search.

    Source: docs/algorithms/autoslim.md, 1.7, D8, D13 and D15.
    """
    graph = supernet.graph
    first = 0 if calibration is None else len(calibration)
    if calibration is not None:
        chunks = [
            (torch.cat([calibration.to(images), images]), labels) for images, labels in chunks
        ]
    channels = _widest(graph, grids)
    budgets = sorted(budgets_macs, reverse=True)
    _check_budgets(graph, grids, budgets)
    fields = {
        **(identity or {}),
        "grids": {name: list(grid) for name, grid in grids.items()},
        "chunks": _sizes(chunks),
    }
    journal = _Journal(log, fields)
    entries: list[_Entry] = []
    solutions: list[Solution] = []
    for entry in journal.read(grids, graph):
        if graph.macs(channels) <= budgets[-1]:
            break
        entries.append(entry)
        channels[entry.move.variable] = entry.move.channels
        solutions += _solutions_met(budgets[len(solutions) :], entry.move.macs, channels)
    if len(solutions) < len(budgets):
        begin = shown = time.perf_counter()
        with _evaluating(supernet.model, first):
            naive = _Naive(supernet, chunks, runtime)
            counter: _Counter = naive
            if engine == "fast":
                flow = Flow(supernet, symbolic_trace(supernet.model, rules), rules or {})
                counter = _Fast(naive, flow, cache_bytes)
            if entries:
                last = entries[-1].move
                grid = list(grids[last.variable])
                above = {**channels, last.variable: grid[grid.index(last.channels) + 1]}
                counter.recall(above, _steps(graph, grids, above))
                counter.on_move(last.variable)
            while len(solutions) < len(budgets):
                before = counter.macs
                counted = counter.errors(channels, _steps(graph, grids, channels))
                errors, spent = _reduce_counts(counted, counter.macs - before, supernet.device)
                name = min(errors, key=errors.__getitem__)
                channels[name] = _below(grids[name], channels[name])
                counter.on_move(name)
                move = Move(name, channels[name], errors, graph.macs(channels))
                now = time.perf_counter()
                entries.append(_Entry(move, spent, now - begin))
                begin = now
                journal.write(entries)
                if now - shown > _SHOW_SECONDS:
                    shown = now
                    logger.info(
                        "slimming: %d moves, %.3g of %.3g MACs left to lose",
                        len(entries), max(0, move.macs - budgets[-1]), graph.macs() - budgets[-1],
                    )  # fmt: skip
                solutions += _solutions_met(budgets[len(solutions) :], move.macs, channels)
    return Slimmed(
        tuple(solutions),
        tuple(entry.move for entry in entries),
        sum(entry.run_macs for entry in entries),
        sum(entry.seconds for entry in entries),
    )


def _sizes(chunks: Sequence[Chunk]) -> list[int]:
    """Return the sizes of the chunks of all processes, interleaved."""
    sizes = distributed.all_gather([len(images) for images, _ in chunks])
    return [size for row in zip_longest(*sizes) for size in row if size is not None]


def _reduce_counts(
    errors: Mapping[str, int], macs: int, device: torch.device
) -> tuple[dict[str, int], int]:
    """Return the sums of errors and MACs over all processes."""
    sums = torch.tensor([*errors.values(), macs], dtype=torch.int64, device=device)
    distributed.all_reduce_sum([sums])
    *counts, total = sums.tolist()
    return dict(zip(errors, counts, strict=True)), total


def assumed_path(graph: WidthGraph, grids: Grids, budget_macs: int) -> list[str]:
    """Return an assumed path for cost estimates, since the real path is only known afterwards.

    Each move takes a bin from the variable with the largest fraction of its channels left.

    Args:
        graph: The graph of the supernet.
        grids: As for `slim`.
        budget_macs: The lowest budget.

    Raises:
        InputError: The budget is out of reach, as for `slim`.
    """
    channels = _widest(graph, grids)
    _check_budgets(graph, grids, [budget_macs])
    path = []
    while graph.macs(channels) > budget_macs:
        steps = _steps(graph, grids, channels)
        parts = {name: channels[name] / graph.free[name].channels for name in steps}
        path.append(max(parts, key=parts.__getitem__))
        channels[path[-1]] = steps[path[-1]]
    return path


def path_macs(
    graph: WidthGraph,
    grids: Grids,
    path: Iterable[str],
    *,
    images: int,
    chunk: int,
    calibration: int = 0,
) -> int:
    """Return the MACs of the fast engine along a path, in closed form.

    Each move runs the readers of every candidate and the layers after them, and once the layers of
    the base that some candidate does not run. With a single chunk, base values are reused by the
    next move unless they had the removed bin.

    Args:
        graph: The graph of the supernet.
        grids: As for `slim`.
        path: The variable that loses a bin, for each move.
        images: Number of evaluation images in all chunks.
        chunk: Largest number of images in a chunk.
        calibration: Number of calibration images in front of every chunk.
    """
    channels = _widest(graph, grids)
    again = {name: _run_again(graph, name) for name in grids}
    places = range(len(graph.layers))
    fresh = set(places)
    total = 0
    for name in path:
        steps = _steps(graph, grids, channels)
        counts = _class_counts(graph, channels)
        costs = [_layer_macs(layer, counts) for layer in graph.layers]
        runs = Counter(place for step in steps for place in again[step])
        total += sum(
            costs[place] * (runs[place] + (place in fresh and runs[place] < len(steps)))
            for place in places
        )
        channels[name] = steps[name]
        if images <= chunk:
            fresh = set(_run_again(graph, name, writers=True))
    return total * (images + calibration * -(-images // chunk))


def _run_again(graph: WidthGraph, name: str, *, writers: bool = False) -> list[int]:
    """Return the indices of layer calls that depend on a bin of a variable (or write it too)."""
    index = next(i for i, variable in enumerate(graph.variables) if variable.name == name)
    reached: set[int] = set()
    places: list[int] = []
    for place, layer in enumerate(graph.layers):
        reads = {run.variable for run in layer.reads}
        writes = {run.variable for run in layer.writes}
        has = writers and index in writes
        if has or reads & reached or (layer.kind == "dense" and index in reads):
            places.append(place)
            reached |= writes
    return places


def _widest(graph: WidthGraph, grids: Grids) -> dict[str, int]:
    """Return the counts at the start of the path, in the order of the graph."""
    for name, grid in grids.items():
        count = graph.channels[name]
        if grid[-1] != count or any(first >= second for first, second in pairwise(grid)):
            raise InputError(
                f"grids is {list(grid)} for {name}, but it must ascend strictly to the "
                f"supernet's {count} channels; sort it and remove duplicates"
            )
    narrowest = {name: grid[0] for name, grid in grids.items()}
    graph.check(narrowest)
    return dict(graph.channels)


def _check_budgets(graph: WidthGraph, grids: Grids, budgets: Iterable[int]) -> None:
    """Check that every budget is between the narrowest and the widest subnet."""
    widest = graph.macs()
    narrowest = graph.macs({name: grid[0] for name, grid in grids.items()})
    for budget in budgets:
        if budget >= widest:
            raise InputError(
                f"budget_macs is {budget:,}, but the widest subnet takes {widest:,} and there is "
                "nothing to slim; lower the budget, or enlarge the network more"
            )
        if budget < narrowest:
            raise InputError(
                f"budget_macs is {budget:,}, but the narrowest subnet takes {narrowest:,}; raise "
                "the budget, or let the grids begin lower"
            )


def _below(grid: Sequence[int], count: int) -> int:
    """Return the next lower entry of a grid."""
    return grid[grid.index(count) - 1]


def _steps(graph: WidthGraph, grids: Grids, channels: Mapping[str, int]) -> dict[str, int]:
    """Return the next lower count of each variable that can lose a bin, in the order of ties."""
    return {
        name: _below(grids[name], channels[name])
        for name in graph.free
        if channels[name] > grids[name][0]
    }


def _solutions_met(
    budgets: Iterable[int], macs: int, channels: Mapping[str, int]
) -> list[Solution]:
    """Return solutions for the remaining budgets that a network meets."""
    return [Solution(budget, dict(channels)) for budget in budgets if macs <= budget]


class _Journal:
    """The log file of the moves, written atomically after every move."""

    def __init__(self, path: Path | None, fields: Mapping[str, Any]) -> None:
        self._path = path
        # Through JSON, as the fields of a log that is read.
        self._fields = json.loads(canonical(dict(fields)))
        if path is not None and distributed.rank() == 0:
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)

    def read(self, grids: Grids, graph: WidthGraph) -> list[_Entry]:
        """Return the moves in the log; none, with a warning, if the log is incomplete.

        Raises:
            InputError: The log belongs to another search.
        """
        if self._path is None or not self._path.exists():
            return []
        try:
            record = json.loads(self._path.read_text("utf-8"))
            mismatch = differences(
                {"format": record["format"], **record["identity"]},
                {"format": FORMAT, **self._fields},
            )
            # Before the moves, which may not fit the grids of another search.
            entries = [] if mismatch else list(_replay(record["moves"], grids, graph))
        except (KeyError, TypeError, ValueError):
            logger.warning("%s is incomplete; the search starts again", self._path)
            return []
        if mismatch:
            raise InputError(
                f"log is {self._path}, but it belongs to another search ({mismatch}); name another "
                "file, or delete this one"
            )
        return entries

    def write(self, entries: Iterable[_Entry]) -> None:
        """Write the moves to the log."""
        if self._path is None or distributed.rank() > 0:
            return
        moves = [
            {**entry.move._asdict(), "run_macs": entry.run_macs, "seconds": entry.seconds}
            for entry in entries
        ]
        record = {"format": FORMAT, "identity": self._fields, "moves": moves}
        write_atomically(self._path, json.dumps(record, allow_nan=False) + "\n")


def _replay(
    moves: Iterable[Mapping[str, Any]], grids: Grids, graph: WidthGraph
) -> Iterator[_Entry]:
    """Yield the moves of a log.

    Raises:
        KeyError, TypeError, ValueError: The moves are not a path through these grids.
    """
    channels = _widest(graph, grids)
    for record in moves:
        steps = _steps(graph, grids, channels)
        errors = {name: int(count) for name, count in dict(record["errors"]).items()}
        if steps.keys() != errors.keys():
            raise ValueError("the candidates differ")
        channels[record["variable"]] = steps[record["variable"]]
        move = Move(record["variable"], record["channels"], errors, record["macs"])
        yield _Entry(move, record["run_macs"], record["seconds"])


@contextmanager
def _evaluating(model: nn.Module, first: int) -> Iterator[None]:
    """Set evaluation mode without gradients, and restore the mode of every module afterwards.

    Args:
        model: The model of the supernet.
        first: Number of images of a batch for BatchNorm statistics; 0 for all of them.
    """
    before = [(module, module.training) for module in model.modules()]
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)] if first else []

    def calibrate(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0][:first].to(torch.promote_types(inputs[0].dtype, torch.float32))
        reduced = [dim for dim in range(seen.dim()) if dim != 1]
        # The unbiased variance (n - 1), as in running statistics. The biased variance of training
        # is nearly the same for hundreds of values.
        module.running_var, module.running_mean = torch.var_mean(seen, reduced)

    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.running_mean = norm.running_var = None
        for module, training in before:
            module.training = training


class _Counter(Protocol):
    """Counts the errors of candidates."""

    macs: int

    def errors(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """Return the errors of the candidates, which set one variable to its count in ``steps``."""
        ...

    def recall(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> None:
        """Restore the state at these counts when a search resumes."""
        ...

    def on_move(self, name: str) -> None:
        """Update the state after a variable has lost a bin."""
        ...


class _Naive:
    """Counter that runs every candidate as a subnet."""

    def __init__(self, supernet: Supernet, chunks: Sequence[Chunk], runtime: Runtime) -> None:
        self.supernet, self.chunks, self.runtime = supernet, chunks, runtime
        self.macs = 0

    def batches(self, layout: torch.memory_format) -> Iterator[Chunk]:
        """Yield the chunks on the device."""
        device = self.supernet.device
        for images, labels in self.chunks:
            yield images.to(device, memory_format=layout), labels.to(device)

    def errors(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """Return the errors of the candidates, which set one variable to its count in ``steps``."""
        device = self.supernet.device
        counts = torch.zeros(len(steps), dtype=torch.int64, device=device)
        for place, (name, count) in enumerate(steps.items()):
            candidate = {**channels, name: count}
            subnet = self.supernet.subnet(candidate, backend="slice")
            for images, labels in self.batches(memory_format(self.runtime, device)):
                with autocast(self.runtime, device):
                    logits = subnet(images)
                counts[place] += _mistakes(logits, labels)
                self.macs += len(images) * self.supernet.graph.macs(candidate)
        return dict(zip(steps, counts.tolist(), strict=True))

    def recall(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> None:
        """Do nothing: no state depends on the moves."""

    def on_move(self, name: str) -> None:
        """Do nothing: no state depends on the moves."""


def _mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of errors. An image with a NaN in its logits is an error.

    Calibration images, which come first, have no labels and do not count.
    """
    logits = logits[-len(labels) :]
    return ((logits.argmax(1) != labels) | logits.isnan().any(1)).sum()


class _Fast:
    """Counter that runs only the layers that a candidate changes, on values of the base."""

    def __init__(self, naive: _Naive, flow: Flow, cache_bytes: int) -> None:
        self.macs = 0
        self._naive, self._flow, self._cache_bytes = naive, flow, cache_bytes
        self._supernet, self._runtime = naive.supernet, naive.runtime
        # Channels last is faster on every device.
        contiguous = self._runtime.memory_format == "contiguous"
        self._layout = torch.contiguous_format if contiguous else torch.channels_last
        self._kept: dict[fx.Node, Any] = {}
        self._too_large: set[fx.Node] = set()

    def errors(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """Return the errors of the candidates, which set one variable to its count in ``steps``."""
        supernet, device = self._supernet, self._supernet.device
        extents, weights, costs = self._at(channels)
        counts = _class_counts(supernet.graph, channels)
        mine = [name for name in steps if name not in self._flow.mixed]
        result = self._flow.result
        counted = torch.zeros(2, len(mine), dtype=torch.int64, device=device)
        with supernet.resize_forward(channels, extents), autocast(self._runtime, device):
            for images, labels in self._naive.batches(self._layout):
                self._keep(images, mine, weights, costs)
                for place, name in enumerate(mine):
                    todo = self._flow.nodes_to_run([result], self._kept, self._flow.changed[name])
                    without = self._without(name, steps[name], counts, weights)
                    with supernet.replace_parameters({**weights, **without}):
                        logits = self._run(todo, {result})[result]
                    self._count(todo, costs, images)
                    counted[0, place] += _mistakes(logits, labels)
                    counted[1, place] += logits.isnan().any()
        mistakes, broken = counted.tolist()
        errors = dict(zip(mine, mistakes, strict=True))
        # 0 times infinity is NaN, so zeros do not remove a bin with such values.
        slow = {
            name: count
            for name, count in steps.items()
            if name not in errors or broken[mine.index(name)]
        }
        before = self._naive.macs
        errors |= self._naive.errors(channels, slow)
        self.macs += self._naive.macs - before
        return {name: errors[name] for name in steps}

    def recall(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> None:
        """Compute the base values at these counts, which an uninterrupted search would have.

        Their MACs are not counted, so the overhead does not depend on interruptions.
        """
        if len(self._naive.chunks) > 1:
            return
        extents, weights, costs = self._at(channels)
        before = self.macs
        mine = [name for name in steps if name not in self._flow.mixed]
        with (
            self._supernet.resize_forward(channels, extents),
            autocast(self._runtime, self._supernet.device),
        ):
            for images, _ in self._naive.batches(self._layout):
                self._keep(images, mine, weights, costs)
        self.macs = before

    def _at(
        self, channels: Mapping[str, int]
    ) -> tuple[dict[Axis, Extent], dict[str, Tensor], dict[fx.Node, int]]:
        """Return the extents of the axes, the sliced weights, and the MACs of each node."""
        extents = self._supernet.extents(channels)
        weights = {
            name: tensor.contiguous(memory_format=self._layout_of(tensor))
            for name, tensor in self._supernet.slice_weights(extents).items()
        }
        counts = _class_counts(self._supernet.graph, channels)
        costs = {node: _layer_macs(layer, counts) for node, layer in self._flow.layers.items()}
        return extents, weights, costs

    def on_move(self, name: str) -> None:
        """Remove cached values that had the bin or depend on it."""
        self._kept = {
            node: value for node, value in self._kept.items() if node not in self._flow.stale[name]
        }

    def _layout_of(self, tensor: Tensor) -> torch.memory_format:
        image = 4
        return self._layout if tensor.dim() == image else torch.contiguous_format

    def _without(
        self, name: str, count: int, counts: Mapping[int, int], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weights that read a variable, with zeros for its bin."""
        graph = self._supernet.graph
        index = next(i for i, variable in enumerate(graph.variables) if variable.name == name)
        result: dict[str, Tensor] = {}
        for layer in self._flow.readers[name]:
            module = self._supernet.model.get_submodule(layer.name)
            dim = 0 if getattr(module, "transposed", False) else 1
            weight = weights[f"{layer.name}.weight"].clone()
            for entries in _bin(layer.reads, counts, index, count // graph.free[name].unit):
                weight.narrow(dim, entries.start, len(entries)).zero_()
            result[f"{layer.name}.weight"] = weight
        return result

    def _keep(
        self,
        images: Tensor,
        names: Iterable[str],
        weights: Mapping[str, Tensor],
        costs: Mapping[fx.Node, int],
    ) -> None:
        """Compute the base values that candidates start from, as far as they fit into memory."""
        if len(self._naive.chunks) > 1:
            self._kept.clear()
        self._kept[self._flow.images] = images
        wanted = set().union(*(self._flow.inputs[name] for name in names)) - self._too_large
        todo = self._flow.nodes_to_run(wanted, self._kept)
        self._count(todo, costs, images)
        with self._supernet.replace_parameters(weights):
            self._run(todo, wanted, keep=True)

    def _run(
        self, todo: Sequence[fx.Node], wanted: AbstractSet[fx.Node], *, keep: bool = False
    ) -> dict[fx.Node, Any]:
        """Run nodes on cached values. A value is freed after its last use.

        Args:
            todo: The nodes in order.
            wanted: Nodes whose values are returned.
            keep: Cache these values instead of returning them.
        """
        last = {source: node for node in todo for source in node.all_input_nodes}
        values = {node: self._kept[node] for node in last if node in self._kept}
        outliving = (self._kept.keys() - set(todo)) | wanted
        for node in todo:
            operands = {source: values[source] for source in node.all_input_nodes}
            for source in operands:
                if last[source] is node and (keep or source not in wanted):
                    del values[source]
            overwritten = self._flow.overwritten.get(node, frozenset())
            if not overwritten.isdisjoint(outliving):
                first = next(iter(operands))
                operands[first] = operands[first].clone()
            value = self._flow.call(node, operands)
            del operands
            if node in last or (node in wanted and not keep):
                values[node] = value
            if keep and node in wanted:
                self._kept[node] = value
                self._make_room()
        return values

    def _make_room(self) -> None:
        """Drop the largest cached values until the rest fits.

        Large values belong to early layers, on which most of the network depends.
        """
        sizes = {
            node: value.nbytes
            for node, value in self._kept.items()
            if isinstance(value, Tensor) and node is not self._flow.images
        }
        total = sum(sizes.values())
        while total > self._cache_bytes:
            largest = max(sizes, key=sizes.__getitem__)
            total -= sizes.pop(largest)
            del self._kept[largest]
            self._too_large.add(largest)

    def _count(self, todo: Iterable[fx.Node], costs: Mapping[fx.Node, int], images: Tensor) -> None:
        self.macs += len(images) * sum(costs.get(node, 0) for node in todo)


def _class_counts(graph: WidthGraph, channels: Mapping[str, int]) -> dict[int, int]:
    """Return the classes of each free variable by its index."""
    return {
        index: channels[variable.name] // variable.unit
        for index, variable in enumerate(graph.variables)
        if variable.free
    }


def _present_classes(axis: Axis, counts: Mapping[int, int]) -> Iterator[int]:
    """Yield the number of classes of each span of an axis at these counts."""
    for run in axis:
        count = counts.get(run.variable, run.start + run.classes)
        yield min(max(count - run.start, 0), run.classes)


def _length(axis: Axis, counts: Mapping[int, int]) -> int:
    return sum(
        run.repeat * classes
        for run, classes in zip(axis, _present_classes(axis, counts), strict=True)
    )


def _layer_macs(layer: Layer, counts: Mapping[int, int]) -> int:
    """Return the MACs of one call of a layer for one image."""
    reads = _length(layer.reads, counts) if layer.kind == "dense" else 1
    return layer.coefficient * reads * _length(layer.writes, counts)


def _bin(axis: Axis, counts: Mapping[int, int], index: int, left: int) -> Iterator[range]:
    """Yield the entries of an axis that a variable loses when it is reduced to ``left`` classes."""
    position = 0
    after = _present_classes(axis, {**counts, index: left})
    for run, classes, fewer in zip(axis, _present_classes(axis, counts), after, strict=True):
        yield range(position + fewer * run.repeat, position + classes * run.repeat)
        position += classes * run.repeat
