"""Searches on an accelerator: only these tests cover bfloat16 and the device's own kernels."""

import dataclasses

import pytest
import torch
from small import Small, Synthetic, make_runtime, make_setting

from widthopt.algorithms import SearchContext
from widthopt.config.compose import compose
from widthopt.data import Split
from widthopt.networks.resize import Blueprint
from widthopt.tracking import About, open_tracker
from widthopt.tracking.files import TrackingFiles
from widthopt.training.loop import train


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]

RUNTIME = make_runtime(device="auto", memory_format="auto")
SETTING = make_setting()


def search(folder, name, **runtime):
    request = compose([f"algorithm={name}", "recipe=smoke", "recipe.batch_size=16"])
    recipe = dataclasses.replace(request.recipe, search_epochs=6)
    return request.algorithm.search(
        SETTING,
        Split(Synthetic(), Synthetic(), 4),
        budget_macs=Blueprint(SETTING).graph.macs(),
        context=SearchContext(recipe, dataclasses.replace(RUNTIME, **runtime), 0, folder),
    )


@pytest.mark.parametrize("name", ["dmcp", "autoslim", "morphnet"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_search_on_the_accelerator_costs_what_it_costs_on_the_cpu(tmp_path, name, precision):
    result = search(tmp_path / "accelerator", name, precision=precision)
    expected = search(tmp_path / "cpu", name, device="cpu")
    assert result.multipliers.keys() == expected.multipliers.keys()
    assert result.overhead_macs == pytest.approx(expected.overhead_macs, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA reports its memory")
def test_the_memory_in_a_trainings_rows_is_its_own_peak(tmp_path):
    """At least its weights, their gradients and momenta; not memory that was in use before."""
    torch.empty(2**30, dtype=torch.uint8, device="cuda")
    request = compose(["recipe=smoke", "recipe.batch_size=16", "tracking=disabled"])
    axes = {"width": 1.0, "depth": 1, "resolution": 8, "fraction": 1.0}
    about = About(
        id="train-0", kind="train", network="small", dataset="noise", algorithm="dmcp",
        method="direct", seed=0, source=axes, target=axes, figures=(), tags=(), fields={},
    )  # fmt: skip
    model = Small(4)
    with open_tracker(request.tracking, about, tmp_path) as log:
        train(
            model, Synthetic(), recipe=request.recipe, epochs=1, seed=0, runtime=RUNTIME, log=log
        )  # fmt: skip
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ((row, _),) = TrackingFiles(tmp_path).rows()
    assert 3 * weights / 2**30 < row["perf/gpu_memory_gib"] < 1


def test_slices_and_masks_update_the_chains_alike(tmp_path):
    sliced, masked = (
        search(tmp_path / backend, "dmcp", backend=backend).multipliers
        for backend in ("slice", "mask")
    )
    assert masked == pytest.approx(sliced, rel=0.02)
