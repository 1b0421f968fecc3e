"""What a tracked run is: its name, its place among others, and what a person finds it by."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from widthopt.tracking.secrets import hidden


LONGEST_TAG = 64
"""Characters of a tag at most: W&B takes no longer ones."""

Axes = Mapping[str, float]
"""A setting: width, depth, resolution and fraction."""


@dataclass(frozen=True, slots=True)
class About:
    """One run of W&B.

    Attributes:
        id: Its identity: the same for the same work, wherever and however often it is done.
        kind: ``search``, ``train``, ``baseline`` (an un-optimised training) or ``figures``.
        network: The network's name.
        dataset: The data set's name.
        algorithm: The algorithm's name; ``uniform`` for an un-optimised network.
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The run's seed.
        source: The setting whose widths are searched.
        target: The setting that is trained; None for a search, which serves many.
        figures: Names of the figures that show it.
        tags: More tags.
        fields: What else is worth knowing of it, as plain data.
        extrapolation: How widths are carried to another depth; empty where there is no need.
    """

    id: str
    kind: str
    network: str
    dataset: str
    algorithm: str
    method: str
    seed: int
    source: Axes
    target: Axes | None
    figures: tuple[str, ...]
    tags: tuple[str, ...]
    fields: Mapping[str, Any]
    extrapolation: str = ""

    @property
    def cell(self) -> str:
        """What is done, without the seed: ``w0.312>w1.732 d1 r224 f1``."""
        letters = {"width": "w", "depth": "d", "resolution": "r", "fraction": "f"}
        words = []
        for name, letter in letters.items():
            if name not in self.source:
                continue
            word = f"{letter}{self.source[name]:g}"
            if self.target is not None and self.target[name] != self.source[name]:
                word += f">{letter}{self.target[name]:g}"
            words.append(word)
        return " ".join(words)

    @property
    def name(self) -> str:
        """What a person reads: ``train resnet18 imagenet dmcp w0.312>w1.732 d1 r224 f1 s0``."""
        words = (self.kind, self.network, self.dataset, self.algorithm, self.cell)
        seed = ", ".join(self.figures) if self.kind == "figures" else f"s{self.seed}"
        return " ".join(word for word in (*words, seed) if word)

    @property
    def group(self) -> str:
        """Its cell, which it shares with the other seeds."""
        words = (self.kind, self.network, self.dataset, self.algorithm, self.cell)
        return "/".join(word.replace(" ", "-") for word in words if word)

    @property
    def labels(self) -> list[str]:
        """Its tags: figures, network, data set, algorithm, method and seed."""
        words = [*self.figures, self.network, self.dataset, self.algorithm, self.method]
        words += [] if self.kind == "figures" else [f"seed{self.seed}"]
        return [one[:LONGEST_TAG] for one in dict.fromkeys((*words, *self.tags)) if one]

    @property
    def config(self) -> dict[str, Any]:
        """Flat axes, for filters and groups; all else below ``fields``; no secrets."""
        flat: dict[str, Any] = {
            "kind": self.kind,
            "network": self.network,
            "dataset": self.dataset,
            "algorithm": self.algorithm,
            "method": self.method,
            "seed": self.seed,
            "figures": list(self.figures),
            "extrapolation": self.extrapolation,
        }
        flat |= {f"source_{name}": value for name, value in self.source.items()}
        flat |= {f"target_{name}": value for name, value in (self.target or {}).items()}
        result: dict[str, Any] = hidden({**flat, "fields": dict(self.fields)})
        return result

    def plain(self) -> dict[str, Any]:
        """As plain data without secrets; `of` reads it again."""
        result: dict[str, Any] = hidden(asdict(self))
        return result

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "About":
        """What `plain` gave."""
        return cls(**{**plain, "figures": tuple(plain["figures"]), "tags": tuple(plain["tags"])})
