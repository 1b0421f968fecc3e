import dataclasses
import itertools
import json
import logging
import math
import multiprocessing
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, RUNTIME, Instrument, Small, SmallNetwork, Synthetic, digits, make_setting
from torch import nn
from torch.nn import functional

from widthopt.algorithms import SearchContext
from widthopt.algorithms.morphnet import MorphNet, _Pruning
from widthopt.algorithms.penalty import Penalty
from widthopt.algorithms.uniform import Uniform
from widthopt.data import Counts, Sizes, Split, search_counts, search_split
from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint
from widthopt.seeds import derive_seed
from widthopt.tracing import trace
from widthopt.training import checkpoints
from widthopt.training.evaluation import evaluate, recalibrate
from widthopt.training.loop import Interrupted, Loop, learning_rate, train
from widthopt.widths import match_macs


PRUNING = {"strength": 4.0, "threshold": 0.1}
"""What kills some channels of the small network, and not all, within three epochs."""

STILL = dataclasses.replace(RECIPE, search_epochs=1, learning_rate=1e-60, weight_decay=0.0)
"""One epoch that moves no weight: the result follows from the weights it starts with."""

DEFAULT = {
    "name": "morphnet",
    "strength": 1.0,
    "threshold": 0.01,
    "tie": "max",
    "depthwise": "double",
    "truncate": True,
    "floor": 2,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small are no work to share: threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setting(network=None, *, resolution=8, classes=4, width=1.0, fraction=1.0):
    return make_setting(
        network, classes=classes, width=width, resolution=resolution, fraction=fraction
    )


def search(folder, *, recipe=RECIPE, data=None, network=None, seed=0, where=None, **options):
    where = where or setting(network)
    if data is None:
        data = Split(Synthetic(), Synthetic(), 4)
    return MorphNet(**(DEFAULT | options)).search(
        where, data, budget_macs=1, context=SearchContext(recipe, RUNTIME, seed, folder)
    )


def result(found):
    """All of a result but the time, as a record would have it."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(found, seconds=0.0)), sort_keys=True)


def weights(folder):
    """Every tensor of the last checkpoint in a folder: weights, buffers and momenta."""
    return checkpoints.newest(folder / "checkpoints").tensors


# --------------------------------------------------- a search is a plain loop and a penalty


def textbook_penalty(model, threshold=0.1):
    """R/F0 of the small network at 8x8 pixels, from docs/algorithms/morphnet.md, 1.4."""

    def tie(*norms):
        return torch.stack([norm.weight.abs() for norm in norms]).amax(0)

    stem, inner = tie(model.bn0, model.bn2), tie(model.bn1)
    down, wide = tie(model.bn3, model.bn4), tie(model.bn5)
    total = 64 * 9 * 3 * stem.sum()
    for kappa, first, second in (
        (64 * 9, stem, inner),
        (64 * 9, inner, stem),
        (16 * 9, stem, down),
        (16, down, wide),
    ):
        alive = [int((size > threshold).sum()) for size in (first, second)]
        total = total + kappa * (alive[0] * second.sum() + alive[1] * first.sum())
    total = total + 2 * 16 * 9 * down.sum() + 4 * wide.sum()
    return total / F0


F0 = 64 * 9 * (3 * 8 + 8 * 6 + 6 * 8) + 16 * 9 * (8 * 12 + 12) + 16 * 12 * 10 + 10 * 4


def plain_search(recipe, seed=0):
    """The search as a loop written by hand, the penalty a term of the loss."""
    model = Blueprint(setting()).build(
        {"stem": 8, "inner": 6, "down": 12, "wide": 10}, seed=derive_seed(seed, "search weights")
    )
    data, epochs = Synthetic(), recipe.search_epochs
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-5, nesterov=True
    )
    for epoch in range(epochs):
        for number, (images, labels) in enumerate(data.epoch(epoch)):
            step = epoch * data.steps_per_epoch + number
            optimizer.param_groups[0]["lr"] = learning_rate(
                recipe, step=step, steps_per_epoch=data.steps_per_epoch, epochs=epochs
            )
            optimizer.zero_grad()
            for part, answer in zip(
                images.chunk(recipe.accumulation), labels.chunk(recipe.accumulation), strict=True
            ):
                logits = model(part)
                loss = functional.cross_entropy(logits, answer, label_smoothing=0.1)
                (loss / recipe.accumulation).backward()
            (4.0 * textbook_penalty(model)).backward()
            optimizer.step()
        if epoch < epochs - 1:
            for tie in ((model.bn0, model.bn2), (model.bn1,), (model.bn3, model.bn4), (model.bn5,)):
                size = torch.stack([norm.weight.detach().abs() for norm in tie]).amax(0)
                for norm in tie:
                    norm.weight.data[size <= 0.1] = 0
                    norm.bias.data[size <= 0.1] = 0
    return model


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_search_is_a_plain_loop_with_the_penalty_in_its_loss(tmp_path, accumulation):
    """docs/algorithms/morphnet.md, P10.

    The penalty comes once in a step, however many micro-batches it has.
    """
    recipe = dataclasses.replace(RECIPE, accumulation=accumulation)
    found = search(tmp_path, recipe=recipe, **PRUNING)
    model = plain_search(recipe)
    gammas = load_file(tmp_path / "gammas.safetensors")
    assert sorted(gammas) == [f"bn{number}.weight" for number in range(6)]
    for name, gamma in gammas.items():
        torch.testing.assert_close(gamma, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert found.details["alive_macs"] < 1  # enough happened for this to mean something
    assert any(epoch["dead"] for epoch in found.details["epochs"][:-1])
    assert found.details["epochs"][-1]["penalty"] == pytest.approx(
        textbook_penalty(model).item(), rel=1e-3
    )


def test_without_strength_a_search_is_a_plain_training_bit_for_bit(tmp_path):
    """docs/algorithms/morphnet.md, P11."""
    found = search(tmp_path / "search", strength=0.0)
    model = Blueprint(setting()).build(
        Blueprint(setting()).graph.channels, seed=derive_seed(0, "search weights")
    )
    train(
        model,
        Synthetic(),
        recipe=RECIPE,
        epochs=RECIPE.search_epochs,
        seed=derive_seed(0, "search"),
        runtime=RUNTIME,
        folder=tmp_path / "train",
    )
    searched, trained = weights(tmp_path / "search"), weights(tmp_path / "train")
    assert len(trained) > 40
    assert all(torch.equal(searched[name], item) for name, item in trained.items())
    assert found.diagnostics["unchanged"]
    assert found.multipliers == dict.fromkeys(("stem", "inner", "down", "wide"), 1.0)
    assert found.details["alive_macs"] == 1


def test_the_penalty_is_recorded_without_strength_too(tmp_path):
    """The control run shows what the penalty would have been."""
    found = search(tmp_path, strength=0.0)
    assert all(1.5 < epoch["penalty"] < 2.2 for epoch in found.details["epochs"])


def test_the_penalty_falls_from_epoch_to_epoch_and_what_it_started_at(tmp_path):
    """Issue 105 of the reference: one that was never added to the loss would not."""
    found = search(tmp_path, strength=1.0)  # gentle enough for momentum not to overshoot
    values = [found.details["penalty_at_start"]]
    values += [epoch["penalty"] for epoch in found.details["epochs"]]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.85 * values[0]


def test_a_search_without_truncation_keeps_small_scales(tmp_path):
    found = search(tmp_path, **PRUNING, truncate=False)
    gammas = torch.cat(list(load_file(tmp_path / "gammas.safetensors").values()))
    assert found.details["epochs"][1]["dead"] > 0
    assert gammas.ne(0).all()


def test_a_truncated_channel_is_silent(tmp_path):
    """docs/algorithms/morphnet.md, P17.

    Accuracy after the last truncation is that without the dead channels.
    """
    found = search(tmp_path, **PRUNING)
    model = Small(4)
    model.load_state_dict(
        {
            name.removeprefix("model."): tensor
            for name, tensor in weights(tmp_path).items()
            if name.startswith("model.")
        }
    )
    graph = trace(model, 8)
    Penalty(model, graph, threshold=0.1, tie="max", depthwise="double").truncate()
    recalibrate(model, Synthetic(), runtime=RUNTIME)
    masked = evaluate(model, Synthetic(), runtime=RUNTIME)
    assert found.details["top1_after_truncation"] == masked.top1
    assert not all(item.weight.all() for item in (model.bn0, model.bn1, model.bn3, model.bn5))


@pytest.mark.parametrize("step", [2, 4, 6, 9])
def test_a_search_that_was_interrupted_finds_the_same_bits(tmp_path, step):
    """docs/algorithms/morphnet.md, P22; steps 4 and 8 begin an epoch."""
    whole = search(tmp_path / "whole", **PRUNING)
    with pytest.raises(Interrupted):
        search(tmp_path / "parts", data=Split(Synthetic(interrupt=step), Synthetic(), 4), **PRUNING)
    again = search(tmp_path / "parts", **PRUNING)
    files = [tmp_path / name / "gammas.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert result(again) == result(whole)
    assert result(search(tmp_path / "parts", **PRUNING)) == result(whole)  # nothing left to do


def test_one_seed_gives_one_result_and_another_gives_another(tmp_path):
    first = search(tmp_path / "1", **PRUNING)
    assert result(search(tmp_path / "2", **PRUNING)) == result(first)
    search(tmp_path / "3", **PRUNING, seed=1)
    gammas = [load_file(tmp_path / item / "gammas.safetensors")["bn1.weight"] for item in "13"]
    assert not torch.equal(*gammas)


# --------------------------------------------------------------- two processes are as one


def steps_of(*, parts, rank=None):
    """The small network after eight steps, of which one process sees one half of the images."""
    recipe = dataclasses.replace(RECIPE, accumulation=parts)
    model = Blueprint(setting()).build({"stem": 8, "inner": 6, "down": 12, "wide": 10}, seed=5)
    penalty = Penalty(model, trace(model, 8), threshold=0.1, tie="max", depthwise="double")
    objective = _Pruning(penalty, MorphNet(**(DEFAULT | PRUNING)), recipe)
    loop = Loop(
        model,
        recipe=recipe,
        steps_per_epoch=4,
        epochs=3,
        seed=0,
        runtime=RUNTIME,
        objective=objective,
    )
    data = Synthetic()
    for epoch in range(2):
        for images, labels in data.epoch(epoch):
            part = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
            loop.step(images[part], labels[part], loop.tally.step)
        objective.after_epoch(epoch)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def process(rank, folder):
    """What one of two processes does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.save(steps_of(parts=1, rank=rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
def test_two_processes_prune_as_one_does(tmp_path):
    """docs/algorithms/morphnet.md, P10, D21: after the gradients are reduced, once in each process.

    BatchNorm sees the images of its own process, so the one process takes two micro-batches.
    """
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(rank, tmp_path)) for rank in range(2)]
    with warnings.catch_warnings():  # the children never touch the threads of this process
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        for item in started:
            item.start()
    alone = steps_of(parts=2)
    for item in started:
        item.join(timeout=60)
        assert item.exitcode == 0
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in alone.items():
            torch.testing.assert_close(together[name], parameter, rtol=0, atol=1e-6)
    assert any(item.eq(0).any() for name, item in alone.items() if "bn" in name)  # some died


# --------------------------------------------------------------------------- the overhead


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_overhead_is_what_the_layers_did(tmp_path, accumulation):
    recipe = dataclasses.replace(RECIPE, accumulation=accumulation)
    with Instrument() as instrument:
        found = search(tmp_path, recipe=recipe, **PRUNING)
    assert found.overhead_macs == instrument.total
    assert instrument.total == F0 * (3 * 3 * 64 + 2 * (64 + 64))
    assert found.details["searched_macs"] == F0


def test_the_overhead_on_real_data_is_that_of_the_closed_form(tmp_path):
    """Whole batches only, and a validation share: what was counted, hooked and foretold agree."""
    recipe = dataclasses.replace(RECIPE, batch_size=48, search_epochs=2, accumulation=2)
    dataset, where = digits(), setting(resolution=8, classes=10, width=1.5, fraction=0.3)
    data = search_split(
        dataset,
        resolution=8,
        fraction=0.3,
        seed=0,
        recipe=recipe,
        runtime=RUNTIME,
        device=torch.device("cpu"),
    )
    counts = search_counts(Sizes.of(dataset), fraction=0.3, validation=0.2, batch_size=48)
    assert counts.per_epoch < counts.per_epoch + counts.evaluation < 0.3 * 1438
    algorithm = MorphNet(**DEFAULT)
    with Instrument() as instrument:
        found = search(tmp_path, recipe=recipe, data=data, where=where)
    foretold = algorithm.overhead_macs(where, counts, recipe=recipe, budget_macs=1)
    assert found.overhead_macs == instrument.total == foretold
    assert isinstance(foretold, int)


def test_the_overhead_of_an_interrupted_search_is_that_of_a_whole_one(tmp_path):
    with pytest.raises(Interrupted):
        search(tmp_path, data=Split(Synthetic(interrupt=5), Synthetic(), 4))
    assert search(tmp_path).overhead_macs == F0 * (3 * 3 * 64 + 2 * (64 + 64))


# ------------------------------------------------------ from the scales to a width vector


def scales(**sizes):
    """A start with these scales in each norm; norms that are not named keep ones."""

    def start(model):
        for name, values in sizes.items():
            weight = model.get_submodule(name).weight
            weight.copy_(torch.tensor(values) if isinstance(values, list) else values)

    return start


def still(tmp_path, start, **options):
    return search(
        tmp_path, recipe=STILL, network=SmallNetwork(start), **({"strength": 0.0} | options)
    )


def test_the_direction_is_what_is_alive_of_each_variable(tmp_path):
    start = scales(
        bn0=[1.0] * 5 + [0.0] * 3,
        bn2=[0.0] * 4 + [1.0] * 2 + [0.0] * 2,  # with the stem's: the first six
        bn3=[-1.0] * 9 + [0.01] * 3,  # at the threshold is dead
        bn4=0.005,
    )
    found = still(tmp_path, start)
    assert found.multipliers == {"stem": 6 / 8, "inner": 1.0, "down": 9 / 12, "wide": 1.0}
    assert found.details["channels_alive"] == {"stem": 6, "inner": 6, "down": 9, "wide": 10}
    alive = 64 * 9 * (3 * 6 + 6 * 6 + 6 * 6) + 16 * 9 * (6 * 9 + 9) + 16 * 9 * 10 + 10 * 4
    assert found.details["alive_macs"] == alive / F0
    assert found.details["mixed_classes"] == 4 + 1 + 9  # alive in one norm, dead in the other
    assert not found.diagnostics["unchanged"]
    assert found.diagnostics["collapsed"] == []


@pytest.mark.parametrize("alive", [0, 1, 2])
def test_every_variable_keeps_two_classes(tmp_path, alive):
    """docs/algorithms/morphnet.md, P18.

    A variable with fewer falls back on its largest ones, and is flagged.
    """
    found = still(tmp_path, scales(bn1=[1.0] * alive + [0.001] * (6 - alive)))
    assert found.multipliers == {"stem": 1.0, "inner": 2 / 6, "down": 1.0, "wide": 1.0}
    assert found.diagnostics["collapsed"] == (["inner"] if alive < 2 else [])
    assert found.details["channels_alive"]["inner"] == alive
    assert found.diagnostics["cut"] == []  # a shortcut goes around it
    blueprint = Blueprint(setting())
    match = match_macs(blueprint.graph, found.multipliers, budget_macs=F0)
    model = blueprint.build(match.channels, seed=0)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert 0 <= F0 - match.macs < 0.05 * F0


@pytest.mark.parametrize("floor", [1, 3])
def test_the_floor_is_counted_after_what_is_alive(tmp_path, floor):
    """What was recorded as alive, and its MACs, are those before the floor."""
    found = still(tmp_path, scales(bn1=0.001), floor=floor)
    assert found.multipliers["inner"] == floor / 6
    assert found.details["channels_alive"]["inner"] == 0
    assert found.details["alive_macs"] == (F0 - 2 * 64 * 9 * 8 * 6) / F0


def test_a_variable_with_fewer_classes_than_the_floor_has_not_collapsed(tmp_path):
    """All of it is alive: nothing fell."""
    found = still(tmp_path, None, floor=7)
    assert found.diagnostics["collapsed"] == []
    assert found.multipliers["inner"] == 1
    found = still(tmp_path / "dead", scales(bn1=[1.0] * 5 + [0.0]), floor=7)
    assert found.diagnostics["collapsed"] == ["inner"]
    assert found.multipliers["inner"] == 1


@pytest.mark.parametrize(
    ("start", "variable"),
    [
        (scales(bn0=0.0, bn2=0.0), "stem"),
        (scales(bn3=0.0, bn4=0.0), "down"),
        (scales(bn5=0.0), "wide"),
    ],
)
def test_a_search_that_cuts_the_network_is_not_valid(tmp_path, caplog, start, variable):
    with caplog.at_level(logging.WARNING, "widthopt"):
        found = still(tmp_path, start)
    assert found.diagnostics["collapsed"] == found.diagnostics["cut"] == [variable]
    assert not found.diagnostics["valid"]
    assert f"the search cut the network at {variable}; the result is not valid" in caplog.text


@pytest.mark.parametrize(
    ("name", "bypassed", "cut"),
    [
        (
            "resnet18",
            [f"layer{stage}.{block}.conv1" for stage in "1234" for block in "01"],
            ["conv1", *(f"layer{stage}.0.conv2" for stage in "234")],
        ),
        ("vgg11_bn", [], ["features.0", "features.25", "classifier.0", "classifier.3"]),
        (
            "mobilenet_v2",
            # Blocks after the first of their stage have a shortcut; features.2 begins a stage.
            ["features.3.conv.0.0", "features.5.conv.0.0", "features.16.conv.0.0"],
            [
                "features.0.0",
                "features.1.conv.1",
                "features.2.conv.0.0",
                "features.2.conv.2",
                "features.7.conv.0.0",
                "features.17.conv.0.0",
                "features.18.0",
            ],
        ),
        ("densenet121", ["features.denseblock1.denselayer1.conv1"], ["features.transition1.conv"]),
        ("mobilenet_v3_large", ["features.4.block.2.fc1"], ["features.0.0"]),  # a squeeze
    ],
)
def test_a_network_is_connected_without_what_a_shortcut_goes_around(traced, name, bypassed, cut):
    _, graph = traced(name)
    assert all(graph.connected_without(item) for item in bypassed)
    assert not any(graph.connected_without(item) for item in cut)


def test_of_a_chain_nothing_can_go_and_of_a_residual_network_no_stream(traced):
    _, graph = traced("vgg11_bn")
    assert not any(graph.connected_without(name) for name in graph.free)
    _, graph = traced("resnet18")
    assert sum(graph.connected_without(name) for name in graph.free) == 8


@pytest.fixture(scope="module")
def trained():
    """The small network once it has learnt the classes without a fault."""
    model = Small(4)
    recipe = dataclasses.replace(RECIPE, weight_decay=0.0)
    train(model, Synthetic(), recipe=recipe, epochs=12, seed=0, runtime=RUNTIME)
    assert evaluate(model, Synthetic(), runtime=RUNTIME).top1 == 100
    return model.state_dict()


def test_a_layer_that_works_at_a_small_scale_is_suspect(tmp_path, trained):
    """docs/algorithms/morphnet.md, P16.

    The next BatchNorm undoes the scale, and only the absolute threshold is fooled.
    """

    def start(model):
        model.load_state_dict(trained)
        model.bn1.weight *= 0.005
        model.bn1.bias *= 0.005
        model.bn2.momentum = 1.0  # it has seen the new scale after one batch

    found = still(tmp_path, start)
    assert found.diagnostics["collapsed"] == found.diagnostics["suspect"] == ["inner"]
    assert found.diagnostics["cut"] == []
    assert found.multipliers["inner"] == 2 / 6
    assert found.details["multipliers_relative"]["inner"] == 1
    assert found.details["top1_before_truncation"] > 90
    assert found.details["largest_scale"]["inner"] < 0.01
    assert set(found.details["largest_scale"]) == {"stem", "inner", "down", "wide"}


def test_a_layer_that_is_truly_dead_is_not_suspect(tmp_path):
    found = still(tmp_path, scales(bn1=0.0))
    assert found.diagnostics["collapsed"] == ["inner"]
    assert found.diagnostics["suspect"] == []


def test_removing_channels_that_work_is_not_valid(tmp_path, caplog, trained):
    """docs/algorithms/morphnet.md, D6.

    All the classes hang on eight of the last layer's channels, at a small scale.
    """

    def start(model):
        model.load_state_dict(trained)
        model.bn5.weight[2:] *= 0.005
        model.bn5.bias[2:] *= 0.005
        model.head.weight[:, :2] = 0
        model.head.bias.copy_(torch.tensor([1e-6, 0, 0, 0]))

    with caplog.at_level(logging.WARNING, "widthopt"):
        found = still(tmp_path, start)
    before, after = (found.details[f"top1_{name}_truncation"] for name in ("before", "after"))
    assert found.diagnostics["collapsed"] == found.diagnostics["cut"] == []
    assert before > 60
    assert after == 25  # the first class for every image
    assert found.diagnostics["masked_accuracy_gap"] == before - after
    assert not found.diagnostics["valid"]
    assert "removing the dead channels cost" in caplog.text


def test_removing_channels_that_do_nothing_is_valid(tmp_path, trained):
    def start(model):
        model.load_state_dict(trained)
        model.bn5.weight[7:] = 0.001
        model.bn5.bias[7:] = 0
        model.head.weight[:, 7:] = 0

    found = still(tmp_path, start)
    assert found.multipliers["wide"] == 7 / 10
    assert found.diagnostics["masked_accuracy_gap"] == 0
    assert found.diagnostics["valid"]


def test_whole_groups_of_a_grouped_convolution_are_kept():
    """The floor is two classes, and a class there is a group."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, groups=4),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    graph = trace(model, 3)
    penalty = Penalty(model, graph, threshold=0.1, tie="max", depthwise="double")
    with torch.no_grad():
        model[1].weight.zero_()
        model[3].weight.zero_()[4] = 1.0
    assert penalty.counts() == {"0": 1}
    assert penalty.members() == {"0": 6}


# ------------------------------------------------------------------- before the first step


def test_the_start_of_a_search_is_recorded(tmp_path):
    """docs/algorithms/morphnet.md, P23.

    R/F0, and how far the schedule can move a scale of each variable.
    """
    found = search(tmp_path, strength=2.0)
    lost = (64 * 9 * 3 * 8 + 10 * 4) / F0
    assert found.details["penalty_at_start"] == pytest.approx(2 - lost, rel=1e-6)
    travel = 0.1 * sum(
        (step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 8)) / 2)
        for step in range(12)
    )
    assert found.details["travel"] == pytest.approx(10 * travel, rel=1e-9)
    one_more = 64 * 9 * 2 * 8  # an inner channel, read and written
    assert found.details["reach"]["inner"] == pytest.approx(
        2 * one_more / F0 * 10 * travel, rel=1e-6
    )


def test_a_schedule_too_short_to_prune_says_which_variables(tmp_path, caplog):
    recipe = dataclasses.replace(RECIPE, search_epochs=1, learning_rate=0.01)
    with caplog.at_level(logging.WARNING, "widthopt"):
        found = search(tmp_path, recipe=recipe)
    assert found.diagnostics["fixed"] == ["stem", "inner", "down", "wide"]
    assert (
        "the schedule is too short for the penalty to prune 4 of 4 width variables (first: stem); "
        "use more epochs or images, or a larger algorithm.strength" in caplog.text
    )
    assert "nothing was pruned; the penalty is too weak for this schedule" in caplog.text


def test_a_stream_needs_as_many_times_the_reach_as_it_has_members(tmp_path):
    """docs/algorithms/morphnet.md, 3.2.

    A class of k cannot go from 1 to 0 if its reach is below k.
    """
    recipe = dataclasses.replace(RECIPE, search_epochs=1)
    first = search(tmp_path / "1", recipe=recipe)
    factor = 1.5 / first.details["reach"]["stem"]
    reach = {name: factor * detail for name, detail in first.details["reach"].items()}
    found = search(tmp_path / "2", recipe=recipe, strength=factor)
    assert found.details["reach"] == pytest.approx(reach)
    expected = [n for n, k in (("stem", 2), ("inner", 1), ("down", 2), ("wide", 1)) if reach[n] < k]
    assert found.diagnostics["fixed"] == expected
    assert "stem" in expected


def test_flicker_above_the_threshold_is_told(tmp_path, caplog):
    """docs/algorithms/morphnet.md, D9: 2.2 x the peak learning rate x the largest pressure."""
    with caplog.at_level(logging.INFO, "widthopt"):
        search(tmp_path, strength=1.0)
    worst = 2.2 * 0.1 * max(
        64 * 9 * (3 + 12) + 16 * 9 * 12, 64 * 9 * 16, 16 * 9 * (8 + 2) + 16 * 10, 16 * 12 + 4
    ) / F0  # fmt: skip
    assert worst > 0.01
    assert (
        f"dead scales may oscillate up to {worst:.3g}, above algorithm.threshold 0.01, until the "
        "learning rate falls" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "widthopt"):
        search(tmp_path / "2", strength=1.0, threshold=1.01 * worst)
    assert "flicker" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strength": -1.0},
            r"algorithm.strength is -1, but it is a number of at least 0; the default is 1$",
        ),
        ({"strength": math.nan}, "algorithm.strength is nan, but"),
        ({"strength": math.inf}, "algorithm.strength is inf, but"),
        (
            {"threshold": -0.5},
            r"algorithm.threshold is -0.5, but it is a number of at least 0; the default is 0.01$",
        ),
        ({"threshold": math.inf}, "algorithm.threshold is inf, but"),
        (
            {"floor": 0},
            r"algorithm.floor is 0, but every layer keeps at least one channel; use an integer",
        ),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        MorphNet(**(DEFAULT | options))


def test_a_network_without_batchnorm_is_refused_before_and_in_a_search(tmp_path):
    where = setting(TorchvisionNetwork("squeezenet1_1"), resolution=32)
    message = "^algorithm is morphnet, but it searches by BatchNorm scales and no free width"
    with pytest.raises(InputError, match=message):
        MorphNet(**DEFAULT).overhead_macs(where, Counts(16, 4, 10), recipe=RECIPE, budget_macs=1)
    with pytest.raises(InputError, match=message):
        search(tmp_path, where=where)


def test_the_uniform_network_costs_nothing_to_find(tmp_path):
    uniform = Uniform("uniform")
    found = uniform.search(
        setting(),
        Split(Synthetic(), Synthetic(), 4),
        budget_macs=1,
        context=SearchContext(RECIPE, RUNTIME, 0, tmp_path),
    )
    assert found.multipliers == dict.fromkeys(("stem", "inner", "down", "wide"), 1.0)
    assert found.overhead_macs == 0
    assert uniform.overhead_macs(setting(), Counts(16, 4, 10), recipe=RECIPE, budget_macs=1) == 0
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ real images


@pytest.mark.slow
def test_a_stronger_penalty_leaves_fewer_macs_on_real_digits(tmp_path):
    """docs/algorithms/morphnet.md, P21.

    With each of two seeds; without strength nothing is pruned.
    """
    recipe = dataclasses.replace(
        RECIPE, batch_size=32, search_epochs=8, learning_rate=1.6, warmup_epochs=2
    )
    for seed in (0, 1):
        data = search_split(
            digits(),
            resolution=8,
            fraction=1.0,
            seed=seed,
            recipe=recipe,
            runtime=RUNTIME,
            device=torch.device("cpu"),
        )
        left, found = [], None
        for strength in (0.0, 0.3, 1.0, 3.0):
            found = search(
                tmp_path / f"{seed}-{strength}",
                recipe=recipe,
                data=data,
                where=setting(classes=10, width=3.0),
                seed=seed,
                strength=strength,
            )
            left.append(found.details["alive_macs"])
            if strength == 0:
                assert found.diagnostics["unchanged"]
                assert found.details["top1_before_truncation"] > 90
        assert left[0] == 1
        assert all(after <= before + 0.03 for before, after in itertools.pairwise(left))
        assert left[-1] < 0.7
