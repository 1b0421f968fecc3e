"""A sweep on the disk: its points and runs as plain data."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from widthopt import identity
from widthopt.errors import InputError
from widthopt.runs.plan import Plan, Run
from widthopt.runs.states import State, mark_blocked
from widthopt.runs.store import Store, StoreEntry


FORMAT = 2
"""Version of a manifest's JSON form."""


@dataclass(frozen=True)
class Manifest:
    """A sweep on the disk: what was asked for, as plain data, so that nothing is composed again.

    Attributes:
        name: The sweep's name, also that of its file.
        points: Each with ``what`` it is in words, its ``method``, ``algorithm`` and ``seed``, the
            names of its ``train``ing and of the un-optimised network's beside it (``baseline``),
            and the ``figures`` that show it.
        runs: By name: ``kind`` and ``fields`` of the stage, ``needs``, ``what`` and ``macs``; of
            baselines beside them neither needs nor MACs.
        figures: By name, what a report draws, as ``figures`` in ``conf/experiment`` has it.
        tracking: How the figures are tracked, as ``conf/tracking`` has it; not at all if empty.
    """

    name: str
    points: Sequence[Mapping[str, Any]]
    runs: Mapping[str, Mapping[str, Any]]
    figures: Mapping[str, Mapping[str, Any]]
    tracking: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, *, title: str, tracking: Mapping[str, Any]) -> "Manifest":
        """The manifest of a plan.

        Args:
            plan: The plan.
            title: What its name begins with; the rest follows from its runs.
            tracking: How its figures are tracked, as ``conf/tracking`` has it.
        """
        figures: dict[str, Mapping[str, Any]] = {}
        points, runs = [], {}
        for run in plan.runs.values():
            runs[run.name] = {
                "kind": run.kind,
                "fields": run.stage.fields,
                "needs": list(run.needs),
                "what": run.what,
                "macs": run.macs,
            }
        for point in plan.points:
            request = point.point.request
            for figure in point.figures:
                kind = type(figure)
                name = f"{kind.__module__}.{kind.__qualname__}"
                figures[figure.name] = {"_target_": name, **asdict(figure)}
            baseline = point.point.train_entry("uniform", point.seed)
            if baseline.folder.name not in runs:
                beside = Run("train", baseline, point.point, "uniform", point.seed, (), macs=0)
                runs[baseline.folder.name] = {
                    "kind": "baseline",
                    "fields": baseline.fields,
                    "what": beside.what,
                }
            points.append(
                {
                    "what": plan.runs[point.train].what,
                    "method": point.method,
                    "algorithm": request.algorithm.name,
                    "seed": point.seed,
                    "train": point.train,
                    "baseline": baseline.folder.name,
                    "figures": [figure.name for figure in point.figures],
                }
            )
        key = identity.key("sweep", sorted(plan.runs))
        return cls(f"{title}-{key}", points, runs, figures, tracking)

    def to_json(self) -> str:
        """As text; `from_json` reads it back."""
        return json.dumps(identity.seal("sweep", asdict(self), format=FORMAT)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            InputError: It is something else, or it was changed since.
        """
        try:
            content = json.loads(text)
            version = content["format"]
            unchanged = version != FORMAT or identity.is_sealed(content, "sweep", format=FORMAT)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{name} is no sweep's file ({error}), but one is needed; give the same sweep again"
            ) from error
        if version != FORMAT:
            raise InputError(
                f"{name} has format {version}, but this version reads {FORMAT}; give the same "
                "sweep again"
            )
        if not unchanged:
            raise InputError(
                f"{name} was changed after it was written, but only what was planned is done; "
                "restore it, or give the same sweep again"
            )
        return cls(**content["sweep"])

    def entries(self, store: Store) -> dict[str, StoreEntry]:
        """The stages of its runs, by name; those of baselines too."""
        kinds = {name: run["kind"] for name, run in self.runs.items()}
        return {
            name: store.entry("train" if kinds[name] == "baseline" else kinds[name], run["fields"])
            for name, run in self.runs.items()
        }

    @property
    def own(self) -> dict[str, Mapping[str, Any]]:
        """Its runs without the baselines beside them, which are other sweeps' work."""
        return {name: run for name, run in self.runs.items() if run["kind"] != "baseline"}

    def states(self, store: Store, live: Collection[str] = ()) -> dict[str, State]:
        """How far each of its own runs is, by name."""
        stages = self.entries(store)
        states = {name: stages[name].state(live) for name in self.own}
        return mark_blocked(states, {name: run["needs"] for name, run in self.own.items()})


def load_manifests(root: Path, names: Sequence[str] = ()) -> list[Manifest]:
    """The sweeps that are kept below a root, by name.

    Args:
        root: The folder that runs are kept in.
        names: Those wanted, or how their names begin; all of them if there are none.

    Raises:
        InputError: There is no such sweep.
    """
    paths = sorted((root / "sweeps").glob("*.json"))
    for name in names:
        if not any(path.stem.startswith(name) for path in paths):
            known = ", ".join(path.stem for path in paths) or "none"
            raise InputError(f"{name} is no sweep in {root}, but the sweeps there are: {known}")
    chosen = [path for path in paths if not names or path.stem.startswith(tuple(names))]
    return [Manifest.from_json(path.read_bytes(), name=str(path)) for path in chosen]
