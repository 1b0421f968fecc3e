"""The description of a tracked run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


LONGEST_TAG = 64
"""Largest length of a tag that W&B accepts."""


@dataclass(frozen=True, slots=True)
class About:
    """The description of one W&B run.

    Attributes:
        id: The W&B id. Equal work has equal ids, so a requeued job resumes its run.
        kind: ``search``, ``train``, ``baseline`` (training with uniform widths) or ``figures``.
        network: The name of the network.
        dataset: The name of the data set.
        algorithm: The name of the algorithm; ``uniform`` for a baseline.
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The seed.
        source: The searched setting, by axis.
        target: The trained setting, by axis; None for a search, which several targets may use.
        figures: Names of the figures that show the run, as known at its start.
        tags: Further tags.
        fields: Further configuration, as plain data.
        extrapolation: The strategy that extrapolates widths to another depth; empty if none is
            needed.
    """

    id: str
    kind: str
    network: str
    dataset: str
    algorithm: str
    method: str
    seed: int
    source: Mapping[str, float]
    target: Mapping[str, float] | None
    figures: tuple[str, ...]
    tags: tuple[str, ...]
    fields: Mapping[str, Any]
    extrapolation: str = ""

    @property
    def init(self) -> dict[str, Any]:
        """The arguments of ``wandb.init`` that describe the run.

        An example of a name is ``train resnet18 imagenet dmcp w0.312>w1.732 d1 r224 f1 s0``. The
        group has the same parts without the seed. The configuration is flat for filters and
        groups, except ``fields``.
        """
        seed = "" if self.kind == "figures" else f"seed{self.seed}"
        parts = [self.kind, self.network, self.dataset, self.algorithm]
        name = [*parts, *self._axes, f"s{self.seed}" if seed else ", ".join(self.figures)]
        tags = (*self.figures, *parts[1:], self.method, seed, *self.tags)
        flat = ("kind", "network", "dataset", "algorithm", "method", "seed", "extrapolation")
        return {
            "id": self.id,
            "job_type": self.kind,
            "name": " ".join(filter(None, name)),
            "group": "/".join(filter(None, [*parts, "-".join(self._axes)])),
            "tags": [tag[:LONGEST_TAG] for tag in dict.fromkeys(tags) if tag],
            "config": {
                **{name: getattr(self, name) for name in flat},
                **{f"source_{axis}": value for axis, value in self.source.items()},
                **{f"target_{axis}": value for axis, value in (self.target or {}).items()},
                "figures": list(self.figures),
                "fields": dict(self.fields),
            },
        }

    @property
    def _axes(self) -> list[str]:
        """Return the settings as short text: ``w0.312>w1.732``, ``d1``, ``r224``, ``f1``."""
        words = []
        for axis, source in self.source.items():
            target = source if self.target is None else self.target[axis]
            word = f"{axis[0]}{source:g}"
            words.append(word if target == source else f"{word}>{axis[0]}{target:g}")
        return words
