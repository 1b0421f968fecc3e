"""The names of all that is logged, in one place: the dashboard shows no others.

A star in a name stands for one of each width variable, random subnet, figure or network.
"""

from collections.abc import Mapping, Sequence
from typing import Any


BY_STEP: Mapping[str, str] = {
    "epoch": "epochs done, in parts",
    "loss": "the step's loss; a supernet's: the widest subnet's",
    "learning_rate": "the step's learning rate",
    "gradient_norm": "length of the step's gradient, before the update",
    "epoch_loss": "mean loss of the epoch",
    "top1": "accuracy on the epoch's own images, in per cent",
    "top5": "the same, among the first five",
}
"""What every training logs, ``train/...`` or ``search/...``; ``epoch`` stands alone."""

PERFORMANCE: Mapping[str, str] = {
    "perf/images_per_second": "images trained on in a second, since the row before",
    "perf/gpu_memory_gib": "the most memory that was in use on the accelerator, GiB",
}

SEARCH: Mapping[str, str] = {
    "search/penalty": "MorphNet: R/F0, about 2 at the start",
    "search/macs_share": "MorphNet: MACs of what is alive, of the searched network's",
    "search/dead_classes": "MorphNet: classes of channels that are dead",
    "search/mixed_classes": "MorphNet: classes with dead and living slots",
    "search/revived_classes": "MorphNet: classes that came back to life in the epoch",
    "search/loss_narrowest": "AutoSlim, DMCP: distillation loss of the narrowest subnet",
    "search/loss_random_*": "AutoSlim, DMCP: distillation loss of a random subnet",
    "search/budget_share": "DMCP: expected MACs, of the budget",
    "search/architecture_loss": "DMCP: loss of the mixture that the chains learn from",
    "search/chains_learning_rate": "DMCP: learning rate of the chains",
    "search/steps_below": "DMCP: steps that were below the band around the budget",
    "search/steps_within": "DMCP: steps within it",
    "search/steps_above": "DMCP: steps above the budget",
    "channels/*": "channels of a width variable: alive, or expected; by epoch",
    "scales/*": "MorphNet: the largest scale of a width variable; by epoch",
    "slimming/move": "AutoSlim: moves of greedy slimming",
    "slimming/macs": "AutoSlim: MACs after the move",
    "slimming/errors": "AutoSlim: mistakes on the validation images after it",
    "layer/index": "place of a width variable, in forward order",
    "layers/*/channels": "its channels; the star is the network's name in a training, or `search`",
    "layers/*/multiplier": "the same as a part of the un-enlarged network's",
}

OUTCOME: Mapping[str, str] = {
    "test/top1": "accuracy of the last epoch on images that no training sees, in per cent",
    "test/top5": "the same, among the first five",
    "alpha": "factor that restores the budget",
    "macs": "MACs of the network",
    "budget_macs": "MACs that it may cost",
    "parameters": "its parameters",
    "overhead_macs": "MACs that its search took",
    "overhead_saved_pct": "what was saved of a direct search's, in per cent",
    "seconds": "time of the search or the training",
    "widths/variables": "names of the width variables",
    "widths/channels": "channels of each",
    "flags/*": "what went wrong, or did not",
    "details/*": "what else the search says",
}
"""In the summary of a run."""

CURVES: Mapping[str, str] = {
    "figures/*/saved_pct": "what was saved, for the figures that show the run",
    "figures/*/top1": "accuracy, for the same; with the network's name behind theirs too",
}
"""Once for each figure, so that a panel shows its own runs and no others."""

MEDIA: Mapping[str, str] = {
    "figures/*": "a figure, as the report draws it",
    "tables/*": "a table, as the report has it",
}

X_AXES: Mapping[str, Sequence[str]] = {
    "epoch": ("train/*", "search/*", "perf/*", "channels/*", "scales/*"),
    "layer/index": ("layers/*",),
    "slimming/move": ("slimming/macs", "slimming/errors"),
}
"""What rows are drawn over."""


def in_figure(
    figure: str, *, network: str, saved_pct: float, top1: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """A training's row for the lines of a figure that shows it, and its part of the summary."""
    saved = {f"figures/{figure}/saved_pct": saved_pct}
    return (
        {**saved, f"figures/{figure}/{network}/top1": top1},
        {**saved, f"figures/{figure}/top1": top1},
    )


def known(name: str) -> bool:
    """Whether a name is one of those above."""
    head, _, tail = name.partition("/")
    if head in {"train", "search"} and tail in BY_STEP and tail != "epoch":
        return True
    names = ("epoch", *PERFORMANCE, *SEARCH, *OUTCOME, *CURVES, *MEDIA)
    return any(_matches(name, one) for one in names)


def _matches(name: str, pattern: str) -> bool:
    """Whether a name is the pattern, in which one star stands for anything."""
    before, star, after = pattern.partition("*")
    if not star:
        return name == pattern
    return name.startswith(before) and name.endswith(after) and len(name) > len(before + after)
