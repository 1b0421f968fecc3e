"""The manifest of a sweep: its points and runs as plain data, in a JSON file."""

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


FORMAT = 3
"""Version of a manifest's JSON form."""


@dataclass(frozen=True)
class Manifest:
    """The points, runs and figures of a sweep, which later commands use without composing it.

    Attributes:
        name: Name of the sweep and stem of the file.
        points: For each point a description (``what``), its ``method``, ``algorithm`` and
            ``seed``, the names of its training (``train``) and of the training of its
            ``baseline``, and the names of its ``figures``.
        runs: By name, the ``kind`` and ``fields`` of the store entry, and ``needs``, ``what`` and
            ``macs``. Baselines of other sweeps have neither needs nor MACs.
        figures: By name, the figures of the report, as in ``conf/experiment``.
        tracking: Tracking of the figures, as in ``conf/tracking``; empty for no tracking.
    """

    name: str
    points: Sequence[Mapping[str, Any]]
    runs: Mapping[str, Mapping[str, Any]]
    figures: Mapping[str, Mapping[str, Any]]
    tracking: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, *, title: str, tracking: Mapping[str, Any]) -> "Manifest":
        """Return the manifest of a plan.

        Args:
            plan: The plan.
            title: Start of the name; a hash of the runs follows.
            tracking: Tracking of the figures, as in ``conf/tracking``.
        """
        figures: dict[str, Mapping[str, Any]] = {}
        points, runs = [], {}
        for run in plan.runs.values():
            runs[run.name] = {
                "kind": run.kind,
                "fields": run.entry.fields,
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
                baseline_run = Run(
                    "train", baseline, point.point, "uniform", point.seed, (), macs=0
                )
                runs[baseline.folder.name] = {
                    "kind": "baseline",
                    "fields": baseline.fields,
                    "what": baseline_run.what,
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
        """Return the JSON string that `from_json` reads."""
        return json.dumps(identity.seal("sweep", asdict(self), format=FORMAT)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str) -> "Manifest":
        """Read the string that `to_json` returned.

        Raises:
            InputError: It is not a manifest of this version, or it was changed.
        """
        try:
            content = json.loads(text)
            version = content["format"]
            unchanged = version != FORMAT or identity.is_sealed(content, "sweep", format=FORMAT)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{name} is not the manifest of a sweep ({error}), but it must be one; start the "
                "same sweep again"
            ) from error
        if version != FORMAT:
            raise InputError(
                f"{name} has format {version}, but this version reads {FORMAT}; start the "
                "same sweep again"
            )
        if not unchanged:
            raise InputError(
                f"{name} was changed after it was written, but its checksum must match; restore "
                "it, or start the same sweep again"
            )
        return cls(**content["sweep"])

    def entries(self, store: Store) -> dict[str, StoreEntry]:
        """Return the store entries of all runs by name, baselines included."""
        kinds = {name: run["kind"] for name, run in self.runs.items()}
        return {
            name: store.entry("train" if kinds[name] == "baseline" else kinds[name], run["fields"])
            for name, run in self.runs.items()
        }

    @property
    def own(self) -> dict[str, Mapping[str, Any]]:
        """The runs of this sweep, without baselines that belong to other sweeps."""
        return {name: run for name, run in self.runs.items() if run["kind"] != "baseline"}

    def states(self, store: Store, live: Collection[str] = ()) -> dict[str, State]:
        """Return the states of `own` by name."""
        entries = self.entries(store)
        states = {name: entries[name].state(live) for name in self.own}
        return mark_blocked(states, {name: run["needs"] for name, run in self.own.items()})


def load_manifests(root: Path, names: Sequence[str] = ()) -> list[Manifest]:
    """Return the manifests of the sweeps in a folder of runs, sorted by name.

    Args:
        root: The folder of runs.
        names: Names or prefixes of names; empty for all sweeps.

    Raises:
        InputError: There is no such sweep, or a manifest cannot be read.
    """
    paths = sorted((root / "sweeps").glob("*.json"))
    for name in names:
        if not any(path.stem.startswith(name) for path in paths):
            known = ", ".join(path.stem for path in paths) or "none"
            raise InputError(f"no sweep {name!r} in {root}; available: {known}")
    chosen = [path for path in paths if not names or path.stem.startswith(tuple(names))]
    return [Manifest.from_json(path.read_bytes(), name=str(path)) for path in chosen]
