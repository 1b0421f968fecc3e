"""The request of a run as typed values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from widthopt.algorithms import WidthSearch
from widthopt.data import Dataset
from widthopt.errors import AxisError, InputError, check_fields
from widthopt.extrapolation import Extrapolation
from widthopt.networks.resize import Blueprint
from widthopt.records import METHODS, Record
from widthopt.setting import Network, Recipe, Resources, Runtime, Setting
from widthopt.tracking import Tracking


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Target:
    """The network axes of the target; its data is always the full data set.

    Attributes:
        width: Width multiplier.
        depth: Depth multiplier.
        resolution: Side of the square input, in pixels.
    """

    width: float
    depth: int
    resolution: int

    def __post_init__(self) -> None:
        check_fields(
            "target",
            self,
            ("depth", self.depth >= 1, "it must be an integer of at least 1"),
            ("resolution", self.resolution >= 1, "it must be an integer of at least 1"),
            remedy="correct it",
        )


class FigureTable(Protocol):
    """The numbers of a figure; `widthopt.reporting.figures.grid.TextTable` implements it."""

    def csv(self) -> str:
        """Return the columns and rows as CSV."""
        ...

    def markdown(self) -> str:
        """Return the title, the table and its notes as Markdown."""
        ...

    def html(self, *, omit: str = "") -> str:
        """Return the title, the table and its notes, except the note ``omit``, as HTML."""
        ...


class FigureSpec(Protocol):
    """A figure or table of the paper: it turns records into pictures and a table.

    A figure is a dataclass, and its fields are the values of ``figures`` in ``conf/experiment``.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """The stem of the names of its files."""
        ...

    @property
    def title(self) -> str:
        """The heading above it."""
        ...

    @property
    def claim(self) -> str:
        """The paper's claim about it in one sentence; may be empty."""
        ...

    def draw(self, records: Sequence[Record]) -> Mapping[str, "Figure"]:
        """Return the pictures by the stems of their files."""
        ...

    def table(self, records: Sequence[Record]) -> FigureTable:
        """Return the numbers that the pictures show."""
        ...


@dataclass(frozen=True)
class Request:
    """The request of a run, which `widthopt.config` builds from ``conf/`` and overrides.

    Attributes:
        projection: From the target to its proxy; for example `widthopt.projection.Projection`.
        figures: The figures that a report draws; for example of `widthopt.reporting.figures`.
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
    figures: tuple[FigureSpec, ...]
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(
                f"methods is [{', '.join(self.methods)}], but it must list some of "
                f"{', '.join(METHODS)}, each once; correct it"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(
                f"seeds is [{', '.join(map(str, self.seeds))}], but it must list integers of at "
                "least 0, each once; correct it"
            )

    @property
    def target_setting(self) -> Setting:
        """The target with the classes of the data set and all of its images."""
        target, classes = self.target, self.dataset.class_count()
        return Setting(self.network, classes, target.width, target.depth, target.resolution, 1.0)

    def blueprint(self, setting: Setting | None = None) -> Blueprint:
        """Return the network of a setting, or of the target if it is None.

        Raises:
            InputError: The network cannot be built; the message names the key that was typed.
        """
        setting = setting or self.target_setting
        try:
            return Blueprint(setting)
        except AxisError as error:
            # An axis that the projection leaves alone keeps the value typed for the target.
            typed = getattr(self.projection, error.axis, None) is not None
            projected = typed and getattr(self.target, error.axis) != getattr(setting, error.axis)
            group = "projection" if projected else "target"
            raise InputError(f"{group}.{error}") from error
