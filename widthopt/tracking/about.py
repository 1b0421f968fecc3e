"""The description of a tracked run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


LONGEST_TAG = 64
"""The most characters that W&B accepts in a tag."""


@dataclass(frozen=True, slots=True)
class About:
    """One run of W&B.

    Attributes:
        id: The identity: equal for equal work, wherever and however often it is done.
        kind: ``search``, ``train``, ``baseline`` (training with uniform widths) or ``figures``.
        network: The name of the network.
        dataset: The name of the data set.
        algorithm: The name of the algorithm; ``uniform`` for a baseline.
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The run's seed.
        source: The setting whose widths are searched, by axis.
        target: The setting that is trained; None for a search, which serves many.
        figures: Names of the figures that show the run, as known when it starts.
        tags: Further tags.
        fields: Further configuration, as plain data.
        extrapolation: The strategy that carries widths to another depth; empty if none is needed.
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

        The name is such as ``train resnet18 imagenet dmcp w0.312>w1.732 d1 r224 f1 s0``; the group
        is the same without the seed. The configuration is flat, for filters and groups, but for
        the further ``fields``.
        """
        seed = "" if self.kind == "figures" else f"seed{self.seed}"
        what = [self.kind, self.network, self.dataset, self.algorithm]
        name = [*what, *self._axes, f"s{self.seed}" if seed else ", ".join(self.figures)]
        tags = (*self.figures, *what[1:], self.method, seed, *self.tags)
        flat = ("kind", "network", "dataset", "algorithm", "method", "seed", "extrapolation")
        return {
            "id": self.id,
            "job_type": self.kind,
            "name": " ".join(filter(None, name)),
            "group": "/".join(filter(None, [*what, "-".join(self._axes)])),
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
        """The settings in short: ``w0.312>w1.732``, ``d1``, ``r224``, ``f1``."""
        words = []
        for axis, source in self.source.items():
            target = source if self.target is None else self.target[axis]
            word = f"{axis[0]}{source:g}"
            words.append(word if target == source else f"{word}>{axis[0]}{target:g}")
        return words
