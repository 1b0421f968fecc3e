"""A checked request with its settings, networks, budget and store entries."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from widthopt import data, identity
from widthopt.algorithms import SearchContext, WidthSearch
from widthopt.algorithms.uniform import Uniform
from widthopt.data import Dataset, Sizes, Split
from widthopt.networks.resize import Blueprint
from widthopt.request import Request
from widthopt.runs.states import current_job
from widthopt.runs.store import Store, StoreEntry
from widthopt.setting import Setting
from widthopt.tracking import About
from widthopt.training.devices import resolve_device
from widthopt.training.loop import Log
from widthopt.widths import match_macs


class SizedRequest:
    """A checked request with its settings, networks and budget. Nothing is started or written.

    Raises:
        InputError: A value of the request is wrong, or the parts do not fit together.
    """

    def __init__(
        self, request: Request, *, images: bool = True, figures: Sequence[str] | None = None
    ) -> None:
        """Check a request and build its networks.

        Args:
            request: The request.
            images: Whether to check that the images exist, which a run needs.
            figures: Names of the figures that show it; those of the request if None.
        """
        self.request = request
        names = [figure.name for figure in request.figures] if figures is None else figures
        self.figures = tuple(names)
        if images:
            data.check(request.dataset, fraction=1.0)
        self.target = request.target_setting
        transfer = "transfer" in request.methods
        self.proxy = request.projection(self.target) if transfer else self.target
        if images and transfer:
            data.check(request.dataset, fraction=self.proxy.fraction)
        self.target_blueprint = request.blueprint(self.target)
        self.proxy_blueprint = request.blueprint(self.proxy)
        graph = self.target_blueprint.graph
        self.budget_macs = graph.macs() if request.budget_macs is None else request.budget_macs
        uniform = dict.fromkeys(graph.free, 1.0)
        match_macs(graph, uniform, budget_macs=self.budget_macs)
        if transfer:
            # Raises now if the widths of the proxy cannot be extrapolated.
            request.extrapolation(
                dict.fromkeys(self.proxy_blueprint.graph.free, 1.0),
                source=self.proxy_blueprint.graph,
                target=graph,
                budget_macs=self.budget_macs,
            )
        self.device = resolve_device(request.runtime)

    def with_seeds(self, seeds: Sequence[int]) -> "SizedRequest":
        """Return the same request with other seeds, without checking it again."""
        fields = {**self.request.fields, "seeds": tuple(seeds)}
        point = copy.copy(self)
        point.__dict__.pop("folder", None)  # depends on the fields
        point.request = replace(self.request, seeds=tuple(seeds), fields=fields)
        return point

    def setting(self, method: str) -> Setting:
        """Return the setting that a method searches."""
        return self.proxy if method == "transfer" else self.target

    def blueprint(self, method: str) -> Blueprint:
        """Return the network of `setting`."""
        return self.proxy_blueprint if method == "transfer" else self.target_blueprint

    def algorithm(self, method: str) -> WidthSearch:
        """Return the algorithm of a method."""
        return Uniform("uniform") if method == "uniform" else self.request.algorithm

    def context(self, seed: int, folder: Path, log: Log | None = None) -> SearchContext:
        """Return the context of a search."""
        return SearchContext(self.request.recipe, self.request.runtime, seed, folder, log)

    def about(self, kind: str, method: str, seed: int, entry: StoreEntry) -> About:
        """Return the description of an entry's tracked run."""
        request = self.request
        train = kind == "train"
        return About(
            id=request.tracking.run_id(entry.folder.name),
            kind="baseline" if train and method == "uniform" else kind,
            network=request.network.name,
            dataset=request.dataset.name,
            algorithm=self.algorithm(method).name,
            method=method,
            seed=seed,
            source=axis_values(self.setting(method)),
            target=axis_values(self.target) if train else None,
            figures=self.figures,
            tags=request.tracking.tags,
            fields={
                "stage": entry.fields,
                "budget_macs": self.budget_macs if train else self.search_budget(method),
                "search": None
                if not train or method == "uniform"
                else self.search_entry(method, seed).folder.name,
                "job": current_job(),
            },
            extrapolation=self.strategy(method) if train else "",
        )

    def search_data(self, setting: Setting, seed: int) -> Split:
        """Return the images of a search: training and validation images, but no test images."""
        return data.search_split(
            self.request.dataset,
            resolution=setting.resolution,
            fraction=setting.fraction,
            seed=seed,
            recipe=self.request.recipe,
            runtime=self.request.runtime,
            device=self.device,
        )

    @cached_property
    def sizes(self) -> Sizes:
        """Number of images of each split."""
        return Sizes.of(self.request.dataset)

    @property
    def train_macs(self) -> int:
        """MACs of the final training, at the budget."""
        recipe = self.request.recipe
        counts = data.target_counts(self.sizes, batch_size=recipe.batch_size)
        return 3 * self.budget_macs * counts.per_epoch * recipe.epochs

    def overhead_macs(self, method: str) -> int:
        """Return the MACs of the search of a method, in closed form."""
        setting, recipe = self.setting(method), self.request.recipe
        counts = data.search_counts(
            self.sizes,
            fraction=setting.fraction,
            validation=self.request.dataset.validation,
            batch_size=recipe.batch_size,
        )
        return self.algorithm(method).overhead_macs(
            setting, counts, recipe=recipe, budget_macs=self.search_budget(method)
        )

    @cached_property
    def store(self) -> Store:
        """The store of the request's folder of runs."""
        return Store.below(self.request.root)

    @cached_property
    def folder(self) -> Path:
        """Folder of this request, named by a hash of its content."""
        fields = self.request.fields
        key = identity.key("run", fields)
        name = f"{self.request.network.name}-{self.request.dataset.name}-{key}"
        return Path(self.request.root) / name.replace("/", "_")

    def search_entry(self, method: str, seed: int) -> StoreEntry:
        """Return the store entry of a search. Requests that need the same search share it."""
        setting, fields = self.setting(method), self.request.fields
        recipe = {key: value for key, value in fields["recipe"].items() if key != "epochs"}
        named = {
            "network": fields["network"],
            "dataset": _identity_fields(self.request.dataset, fields["dataset"]),
            "setting": axis_values(setting),
            "algorithm": fields["algorithm"],
            "recipe": recipe,
            "budget": self._budget_share,
            "seed": seed,
        }
        return self.store.entry("search", named)

    def train_entry(self, method: str, seed: int) -> StoreEntry:
        """Return the store entry of a final training, named by the origin of its channels.

        So its name is known before the search is done. The extrapolation strategy is part of the
        name only if the depths of proxy and target differ.
        """
        fields = self.request.fields
        recipe = {key: value for key, value in fields["recipe"].items() if key != "search_epochs"}
        named = {
            "network": fields["network"],
            "dataset": _identity_fields(self.request.dataset, fields["dataset"]),
            "setting": axis_values(self.target),
            "origin": {
                "search": None if method == "uniform" else self.search_entry(method, seed).key,
                "extrapolation": {**fields["extrapolation"], "strategy": self.strategy(method)},
                "budget": self._budget_share,
            },
            "recipe": recipe,
            "seed": seed,
        }
        return self.store.entry("train", named)

    def strategy(self, method: str) -> str:
        """Return the extrapolation strategy of a method; empty if the depths are equal."""
        deeper = self.setting(method).depth != self.target.depth
        return self.request.extrapolation.strategy if deeper else ""

    @property
    def _budget_share(self) -> float:
        """The budget relative to the MACs of the baseline (uniform widths)."""
        return self.budget_macs / self.target_blueprint.graph.macs()

    def search_budget(self, method: str) -> int:
        """Return the budget of a search: the same share of the MACs of the searched network."""
        return round(self._budget_share * self.blueprint(method).graph.macs())


def axis_values(setting: Setting) -> dict[str, float]:
    """Return width, depth, resolution and fraction of a setting by name."""
    return {
        "width": setting.width,
        "depth": setting.depth,
        "resolution": setting.resolution,
        "fraction": setting.fraction,
    }


def _identity_fields(dataset: Dataset, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the data set that results depend on."""
    excluded: frozenset[str] = getattr(dataset, "NON_IDENTITY_KEYS", frozenset())
    return {key: value for key, value in fields.items() if key not in excluded}
