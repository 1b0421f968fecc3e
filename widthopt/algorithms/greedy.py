"""Greedy slimming of a trained supernet, the search of AutoSlim.

From its widest on, the supernet loses one *bin* at a time: the channels between a width
variable's count and the next lower entry of its *grid*. A *candidate* is the subnet after one
such step; the one with the fewest top-1 mistakes on the evaluation images is the *move* that
is made. Images come in *chunks*, the batches whose statistics BatchNorm takes; or it takes, anew
for every candidate, those of other images, which then go ahead of every chunk (*calibration*).

Two engines count the mistakes. ``naive`` runs every candidate as a subnet. ``fast`` makes the
same decisions from less arithmetic: a bin is taken away by zeros in the columns of the dense
layers that read it, for up to there every channel is computed by itself. So only these layers
and what depends on them are run again; all else is a value of the *base*, the pass at the
present counts, which is run once for all candidates.

Source: Yu and Huang, 2019, "AutoSlim"; specification of AutoSlim, sections 1.7 and 4.3.
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
"""How mistakes are counted; see the module."""

Grids = Mapping[str, Sequence[int]]
"""Channel counts that each free width variable may have, ascending up to the supernet's."""

Chunk = tuple[Tensor, Tensor]
"""Images, ``batch 3 height width``, and the labels of the last of them, or of all."""

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
        channels: What it has left.
        errors: Top-1 mistakes of every candidate, by the variable that would lose a bin.
        macs: MACs of the network after the move, of one image.
    """

    variable: str
    channels: int
    errors: dict[str, int]
    macs: int


@dataclass(frozen=True, slots=True)
class Slimmed:
    """What slimming found, and what it cost.

    Attributes:
        solutions: One for each budget, from the highest down.
        moves: The path.
        macs: MACs of all forward passes, of all images.
        seconds: Time of all moves, whichever process made them.
    """

    solutions: tuple[Solution, ...]
    moves: tuple[Move, ...]
    macs: int
    seconds: float


class _Entry(NamedTuple):
    """A move in the log, and what it cost to find."""

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
    """The subnets of a supernet that greedy slimming finds for each budget.

    One pass serves all budgets. Its choice is the fewest mistakes, among equals the variable
    that comes first in `WidthGraph.free`; it stops where a network costs a budget or less. The
    supernet is left as it was.

    Args:
        supernet: The trained supernet, on the device that is to compute.
        grids: By free width variable; one with a single entry keeps its count.
        chunks: Images in random order, held out of training; every pass normalises with the
            statistics of one chunk. Of processes that search together each has its own, whole
            ones: part of a chunk would have other statistics.
        budgets_macs: MACs of one image that a solution may cost, in any order.
        runtime: How to compute. With bfloat16, which rounds coarsely, the engines may decide
            otherwise where two candidates are nearly equal.
        rules: The tracing rules of the supernet's network.
        log: Where moves are kept as they are made. A search that was stopped, however that
            happened, goes on from there and ends with the same result.
        identity: Plain data, everything that the moves depend on beside grids and chunk sizes.
        engine: How mistakes are counted.
        cache_bytes: Memory for the fast engine's values of the base; what exceeds it is
            computed again.
        calibration: Images, ``batch 3 height width``, that BatchNorm takes its statistics from
            in the place of the chunks'; those of all processes are the same.

    Raises:
        InputError: A budget is out of reach or above the widest subnet, a grid does not ascend to
            the supernet's count, or the log is that of another search.

    Source: specification of AutoSlim, section 1.7 and decisions D8, D13 and D15.
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
                errors, spent = _of_all(counted, counter.macs - before, supernet.device)
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
    """Images in each chunk, of all processes; the first of each come first."""
    of_each = distributed.all_gather([len(images) for images, _ in chunks])
    return [size for row in zip_longest(*of_each) for size in row if size is not None]


def _of_all(
    errors: Mapping[str, int], macs: int, device: torch.device
) -> tuple[dict[str, int], int]:
    """Mistakes on the chunks of all processes, and the MACs that they took together."""
    sums = torch.tensor([*errors.values(), macs], dtype=torch.int64, device=device)
    distributed.all_reduce_sum([sums])
    *counts, total = sums.tolist()
    return dict(zip(errors, counts, strict=True)), total


def assumed_path(graph: WidthGraph, grids: Grids, budget_macs: int) -> list[str]:
    """A path to plan with, for the true one is not known before the search.

    It always takes a bin from the variable that has the largest part of its channels left.

    Args:
        graph: The supernet's.
        grids: As for `slim`.
        budget_macs: The lowest budget.

    Raises:
        InputError: As `slim`, about the budget.
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
    """MACs that the fast engine runs to find a path, in closed form.

    At each move, every candidate's readers and what follows them; and the base, once: all that
    some candidate does not run. Where there is a single chunk, its values outlive a move, but
    for those that had the bin that was lost.

    Args:
        graph: The supernet's.
        grids: As for `slim`.
        path: The variable that loses a bin, of each move.
        images: Evaluation images, of all chunks together.
        chunk: Images in one chunk, at most.
        calibration: Images ahead of every chunk, for BatchNorm's statistics.
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
    """The places of the layer calls that depend on a bin of a variable; or have it as well."""
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
    """The counts that the path begins with, in the order of the graph."""
    for name, grid in grids.items():
        count = graph.channels[name]
        if grid[-1] != count or any(first >= second for first, second in pairwise(grid)):
            raise InputError(
                f"grids is {list(grid)} for {name}, but it ascends, without equals, to the "
                f"supernet's {count} channels; sort it, and take out what is there twice"
            )
    narrowest = {name: grid[0] for name, grid in grids.items()}
    graph.check(narrowest)
    return dict(graph.channels)


def _check_budgets(graph: WidthGraph, grids: Grids, budgets: Iterable[int]) -> None:
    """Raise unless the path leads from above every budget to where it is met."""
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
    """The next lower entry of a grid."""
    return grid[grid.index(count) - 1]


def _steps(graph: WidthGraph, grids: Grids, channels: Mapping[str, int]) -> dict[str, int]:
    """What each variable that can lose a bin would have left, in the order that breaks ties."""
    return {
        name: _below(grids[name], channels[name])
        for name in graph.free
        if channels[name] > grids[name][0]
    }


def _solutions_met(
    budgets: Iterable[int], macs: int, channels: Mapping[str, int]
) -> list[Solution]:
    """Solutions for the budgets, of those that are open, that a network meets."""
    return [Solution(budget, dict(channels)) for budget in budgets if macs <= budget]


class _Journal:
    """The moves on disk, written whole after every move."""

    def __init__(self, path: Path | None, fields: Mapping[str, Any]) -> None:
        self._path = path
        # Through the text, since that is how the fields of a log that is read have come.
        self._fields = json.loads(canonical(dict(fields)))
        if path is not None and distributed.rank() == 0:
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)

    def read(self, grids: Grids, graph: WidthGraph) -> list[_Entry]:
        """The moves that were made before; none, with a warning, where the log is not whole.

        Raises:
            InputError: They are those of another search.
        """
        if self._path is None or not self._path.exists():
            return []
        try:
            record = json.loads(self._path.read_text("utf-8"))
            mismatch = differences(
                {"format": record["format"], **record["identity"]},
                {"format": FORMAT, **self._fields},
            )
            # Before the moves, which another search's grids do not allow.
            entries = [] if mismatch else list(_replay(record["moves"], grids, graph))
        except (KeyError, TypeError, ValueError):
            logger.warning("%s is not whole; the search begins anew", self._path)
            return []
        if mismatch:
            raise InputError(
                f"log is {self._path}, but it is of another search ({mismatch}); name another "
                "file, or delete this one"
            )
        return entries

    def write(self, entries: Iterable[_Entry]) -> None:
        """Make these the moves on disk."""
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
    """The moves of a log.

    Raises:
        KeyError, TypeError, ValueError: They are not a path through these grids.
    """
    channels = _widest(graph, grids)
    for record in moves:
        steps = _steps(graph, grids, channels)
        errors = {name: int(count) for name, count in dict(record["errors"]).items()}
        if steps.keys() != errors.keys():
            raise ValueError("the candidates are other ones")
        channels[record["variable"]] = steps[record["variable"]]
        move = Move(record["variable"], record["channels"], errors, record["macs"])
        yield _Entry(move, record["run_macs"], record["seconds"])


@contextmanager
def _evaluating(model: nn.Module, first: int) -> Iterator[None]:
    """Span passes without gradients in evaluation mode, and leave every module in its own.

    Args:
        model: The supernet's.
        first: Images of a batch that BatchNorm takes its statistics from; 0 for all of them.
    """
    before = [(module, module.training) for module in model.modules()]
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)] if first else []

    def calibrate(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0][:first].to(torch.promote_types(inputs[0].dtype, torch.float32))
        reduced = [dim for dim in range(seen.dim()) if dim != 1]
        # Over n - 1, as running statistics have it, for these images too, which training would
        # normalise over n: of hundreds of values it is nearly the same.
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
    """Counts the mistakes of candidates."""

    macs: int

    def errors(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """Mistakes at these counts with one variable, by name, at that of ``steps``."""
        ...

    def recall(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> None:
        """Take up a search that had got to these counts, from the next move on."""
        ...

    def on_move(self, name: str) -> None:
        """A variable has lost its bin."""
        ...


class _Naive:
    """Runs every candidate as a subnet."""

    def __init__(self, supernet: Supernet, chunks: Sequence[Chunk], runtime: Runtime) -> None:
        self.supernet, self.chunks, self.runtime = supernet, chunks, runtime
        self.macs = 0

    def batches(self, layout: torch.memory_format) -> Iterator[Chunk]:
        """The chunks, where they are needed."""
        device = self.supernet.device
        for images, labels in self.chunks:
            yield images.to(device, memory_format=layout), labels.to(device)

    def errors(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """Mistakes at these counts with one variable, by name, at that of ``steps``."""
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
        """Nothing is kept from one move to the next."""

    def on_move(self, name: str) -> None:
        """Nothing is kept from one move to the next."""


def _mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images are not recognised; an image with a NaN among its logits is not.

    Images that have no label were only seen by BatchNorm.
    """
    logits = logits[-len(labels) :]
    return ((logits.argmax(1) != labels) | logits.isnan().any(1)).sum()


class _Fast:
    """Runs what a candidate changes, on the values of the base."""

    def __init__(self, naive: _Naive, flow: Flow, cache_bytes: int) -> None:
        self.macs = 0
        self._naive, self._flow, self._cache_bytes = naive, flow, cache_bytes
        self._supernet, self._runtime = naive.supernet, naive.runtime
        # Channels last is the faster on every device, where nobody asked for another.
        contiguous = self._runtime.memory_format == "contiguous"
        self._layout = torch.contiguous_format if contiguous else torch.channels_last
        self._kept: dict[fx.Node, Any] = {}
        self._too_large: set[fx.Node] = set()

    def errors(self, channels: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """Mistakes at these counts with one variable, by name, at that of ``steps``."""
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
        # 0 times an infinity is not 0, so zeros did not take the bin away from what is broken.
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
        """Have the values of the base at these counts, as a search has that was not stopped.

        They are not counted again, so that a search costs the same however often it is stopped.
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
        """What the axes keep at these counts, the weights, and what each node costs."""
        extents = self._supernet.extents(channels)
        weights = {
            name: tensor.contiguous(memory_format=self._layout_of(tensor))
            for name, tensor in self._supernet.slice_weights(extents).items()
        }
        counts = _class_counts(self._supernet.graph, channels)
        costs = {node: _layer_macs(layer, counts) for node, layer in self._flow.layers.items()}
        return extents, weights, costs

    def on_move(self, name: str) -> None:
        """Drop what the lost bin was part of, or went into."""
        self._kept = {
            node: value for node, value in self._kept.items() if node not in self._flow.stale[name]
        }

    def _layout_of(self, tensor: Tensor) -> torch.memory_format:
        image = 4
        return self._layout if tensor.dim() == image else torch.contiguous_format

    def _without(
        self, name: str, count: int, counts: Mapping[int, int], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weights that read a variable, with zeros for its bin."""
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
        """Have the values of the base that candidates start from, as far as there is room."""
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
        """Span nodes, given in order, on values that are kept; a value goes with its last use.

        Args:
            todo: The nodes.
            wanted: Those whose values are returned.
            keep: Keep these values in the place of returning them.
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
        """Keep what fits, without the largest values.

        They are the early ones, and what depends on those is most of the network anyway.
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
    """Classes of each free variable, by its index."""
    return {
        index: channels[variable.name] // variable.unit
        for index, variable in enumerate(graph.variables)
        if variable.free
    }


def _present(axis: Axis, counts: Mapping[int, int]) -> Iterator[int]:
    """How many classes of each run of an axis there are at these counts."""
    for run in axis:
        count = counts.get(run.variable, run.start + run.classes)
        yield min(max(count - run.start, 0), run.classes)


def _length(axis: Axis, counts: Mapping[int, int]) -> int:
    return sum(
        run.repeat * classes for run, classes in zip(axis, _present(axis, counts), strict=True)
    )


def _layer_macs(layer: Layer, counts: Mapping[int, int]) -> int:
    """Multiply-adds of one call of a layer, of one image."""
    reads = _length(layer.reads, counts) if layer.kind == "dense" else 1
    return layer.coefficient * reads * _length(layer.writes, counts)


def _bin(axis: Axis, counts: Mapping[int, int], index: int, left: int) -> Iterator[range]:
    """The entries, of those at the present counts, that a variable with fewer classes loses."""
    position = 0
    after = _present(axis, {**counts, index: left})
    for run, classes, fewer in zip(axis, _present(axis, counts), after, strict=True):
        yield range(position + fewer * run.repeat, position + classes * run.repeat)
        position += classes * run.repeat
