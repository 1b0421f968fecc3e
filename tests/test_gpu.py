"""Searches on an accelerator: only these tests cover bfloat16 and the device's own kernels."""

import dataclasses

import pytest
import torch
from small import Small, SmallNetwork, Synthetic

from widthopt.algorithms import Conditions
from widthopt.config import compose
from widthopt.data import Split
from widthopt.setting import Runtime, Setting
from widthopt.surgery import Blueprint
from widthopt.tracking import About, open_tracker
from widthopt.tracking.files import TrackingFiles
from widthopt.training import train


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]

RUNTIME = Runtime(
    device="auto",
    workers=0,
    precision="float32",
    memory_format="auto",
    backend="slice",
    progress=False,
)
WHERE = Setting(SmallNetwork(), 4, 1.0, 1, 8, 1.0)


def search(folder, name, **runtime):
    request = compose([f"algorithm={name}", "recipe=smoke", "recipe.batch_size=16"])
    recipe = dataclasses.replace(request.recipe, search_epochs=6)
    return request.algorithm.search(
        WHERE,
        Split(Synthetic(), Synthetic(), 4),
        budget_macs=Blueprint(WHERE).graph.macs(),
        conditions=Conditions(recipe, dataclasses.replace(RUNTIME, **runtime), 0, folder),
    )


@pytest.mark.parametrize("name", ["dmcp", "autoslim", "morphnet"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_search_on_the_accelerator_costs_what_it_costs_on_the_cpu(tmp_path, name, precision):
    here = search(tmp_path / "here", name, precision=precision)
    there = search(tmp_path / "there", name, device="cpu")
    assert here.multipliers.keys() == there.multipliers.keys()
    assert here.overhead_macs == pytest.approx(there.overhead_macs, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells of its memory")
def test_the_memory_in_a_trainings_rows_is_its_own_peak(tmp_path):
    """At least its weights, their gradients and momenta; not what was in use before it."""
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
    weights = sum(one.nbytes for one in model.parameters())
    ((row, _),) = TrackingFiles(tmp_path).rows()
    assert 3 * weights / 2**30 < row["perf/gpu_memory_gib"] < 1


def test_slices_and_masks_move_the_chains_alike(tmp_path):
    ends = [search(tmp_path / one, "dmcp", backend=one).multipliers for one in ("slice", "mask")]
    for name, value in ends[0].items():
        assert ends[1][name] == pytest.approx(value, rel=0.02)
