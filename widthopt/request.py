"""What one run is asked for, as typed values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from widthopt.algorithms import WidthSearch
from widthopt.data import Dataset
from widthopt.errors import InputError
from widthopt.extrapolation import Extrapolation
from widthopt.networks.resize import Blueprint
from widthopt.records import METHODS
from widthopt.setting import Network, Recipe, Resources, Runtime, Setting
from widthopt.tracking import Tracking


@dataclass(frozen=True, slots=True)
class Target:
    """The target's network axes; its data is always the whole data set.

    Attributes:
        width: Width multiplier.
        depth: Depth multiplier.
        resolution: Side of the square input, in pixels.
    """

    width: float
    depth: int
    resolution: int

    def __post_init__(self) -> None:
        if self.depth < 1 or self.resolution < 1:
            key = "depth" if self.depth < 1 else "resolution"
            raise InputError(
                f"target.{key} is {getattr(self, key)}, but it must be a whole number from 1 up; "
                "correct it"
            )


@dataclass(frozen=True)
class Request:
    """What one run is asked for; `widthopt.config` makes it from ``conf/`` and overrides.

    Attributes:
        projection: From the target to its proxy; `widthopt.projection.Projection` or another.
        figures: What a report draws of it, of `widthopt.reporting.figures`.
        fields: The composed values that results may depend on, as plain data.
    """

    network: Network
    dataset: Dataset
    projection: Callable[[Setting], Setting]
    algorithm: WidthSearch
    extrapolation: Extrapolation
    recipe: Recipe
    target: Target
    budget_macs: int | None
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    root: str
    runtime: Runtime
    resources: Resources
    tracking: Tracking
    figures: tuple[Any, ...]
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(
                f"methods is [{', '.join(self.methods)}], but it lists some of "
                f"{', '.join(METHODS)}, each once; correct it"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(
                f"seeds is [{', '.join(map(str, self.seeds))}], but it lists whole numbers from 0 "
                "up, each once; correct it"
            )

    @property
    def target_setting(self) -> Setting:
        """The target with the data set's classes and all of its images."""
        target, classes = self.target, self.dataset.class_count()
        return Setting(self.network, classes, target.width, target.depth, target.resolution, 1.0)

    def blueprint(self, setting: Setting | None = None) -> Blueprint:
        """The network of a setting, of the target's if None.

        Raises:
            InputError: There is no such network; the message names the key that was typed.
        """
        setting = setting or self.target_setting
        try:
            return Blueprint(setting)
        except InputError as error:
            axis = str(error).split(" ", 1)[0]
            if axis not in {"width", "depth", "resolution"}:
                raise
            typed = getattr(self.projection, axis, None) is not None
            projected = typed and getattr(self.target, axis) != getattr(setting, axis)
            group = "projection" if projected else "target"
            raise InputError(f"{group}.{error}") from error
