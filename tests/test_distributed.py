"""Several processes that train together do what one does: gloo on this machine's CPU."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from commands import ENVIRONMENT, NETWORK, TINY, widthopt
from small import RUNTIME, Chunks, Small, SmallNetwork, Synthetic
from torch import nn

from widthopt.algorithms import SearchContext, sandwich
from widthopt.algorithms.autoslim import AutoSlim
from widthopt.algorithms.dmcp import DMCP, _Architecture
from widthopt.algorithms.greedy import slim
from widthopt.config.compose import compose
from widthopt.data import Split
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
from widthopt.setting import Setting
from widthopt.training import distributed
from widthopt.training.evaluation import evaluate, recalibrate
from widthopt.training.loop import Interrupted, Loop, Objective, train


pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

RECIPE = dataclasses.replace(
    compose(["recipe=smoke"]).recipe,
    batch_size=16,
    epochs=3,
    search_epochs=2,
    learning_rate=0.8,
    warmup_epochs=1.0,
)
WHERE = Setting(SmallNetwork(), 4, 1.0, 1, 8, 1.0)
STEPS = 4


def member(function, rank, ranks, folder):
    """What one of several processes does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    torch.save(function(folder), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def process_group(function, ranks, folder):
    """What each of several processes returned, tensors and plain data."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    arguments = [(function, rank, ranks, folder) for rank in range(ranks)]
    started = [context.Process(target=member, args=one) for one in arguments]
    with warnings.catch_warnings():  # the children never touch the threads of this process
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        for one in started:
            one.start()
    for one in started:
        one.join(timeout=120)
        assert one.exitcode == 0
    return [
        torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)
    ]


def close(tensors, others, atol=1e-6):
    assert tensors.keys() == others.keys()
    for name, one in others.items():
        torch.testing.assert_close(tensors[name], one, rtol=0, atol=atol)


def equal(tensors, others):
    assert tensors.keys() == others.keys()
    assert all(torch.equal(one, others[name]) for name, one in tensors.items())


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def small(*, norm=True):
    """The small network with the same start everywhere, and with or without BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small(4)
    if not norm:
        for name, module in list(model.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(model, name, nn.Identity())
    return model


def run_training(*, parts=1, norm=True, folder=None, data=None, epochs=2):
    """A plain training: weights, and what was said of it."""
    model = small(norm=norm)
    recipe = dataclasses.replace(RECIPE, accumulation=parts)
    done = train(
        model,
        data or Synthetic(),
        recipe=recipe,
        epochs=epochs,
        seed=0,
        runtime=RUNTIME,
        folder=folder,
    )
    said = {"loss": done.loss, "top1": done.top1, "images": done.images, "steps": done.steps}
    return {"weights": weights(model), "said": said, "buffers": dict(model.named_buffers())}


# --------------------------------------------------------------------------- what is exchanged


def exchanged(_folder):
    rank = distributed.rank()
    one, other = torch.full((2, 3), 1.0 + rank).t(), torch.tensor([10.0 * rank])
    distributed.all_reduce_sum([one, other])
    cpu = torch.device("cpu")
    return {
        "one": one,
        "other": other,
        "ranks": distributed.world_size(),
        "first": distributed.broadcast({"rank": rank, "ways": ["mask"]}, device=cpu),
        "each": distributed.all_gather([rank, str(rank)]),
        "some": distributed.all_reduce_any(rank == 1, device=cpu),
        "none": distributed.all_reduce_any(rank > 2, device=cpu),
    }


def test_sums_and_messages_reach_every_process(tmp_path):
    for found in process_group(exchanged, 3, tmp_path / "three"):
        assert torch.equal(found["one"], torch.full((3, 2), 6.0))
        assert torch.equal(found["other"], torch.tensor([30.0]))
        assert found["ranks"] == 3
        assert found["first"] == {"rank": 0, "ways": ["mask"]}
        assert found["each"] == [[0, "0"], [1, "1"], [2, "2"]]
        assert (found["some"], found["none"]) == (True, False)


def test_a_process_alone_exchanges_nothing():
    one = torch.ones(2)
    distributed.all_reduce_sum([one])
    distributed.barrier()
    assert torch.equal(one, torch.ones(2))
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather("x") == ["x"]
    assert distributed.all_reduce_any(bool(one.all()), device=one.device)


# -------------------------------------------------------------------------------- training


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_train_as_one_does_on_as_many_micro_batches(tmp_path, ranks):
    """BatchNorm sees the images of its own process; 16 images on 3 processes are 5, 5 and 6."""
    found = process_group(lambda _: run_training(), ranks, tmp_path / "together")
    if ranks == 2:
        alone = run_training(parts=2)
        for one in found:
            close(one["weights"], alone["weights"])
            assert one["said"] == pytest.approx(alone["said"], rel=1e-5)
    for one in found[1:]:
        equal(one["weights"], found[0]["weights"])
        equal(one["buffers"], found[0]["buffers"])
        assert one["said"] == found[0]["said"]
        assert one["said"]["images"] == 2 * 64


@pytest.mark.parametrize("ranks", [2, 3])
def test_without_batchnorm_processes_train_as_one_does_on_whole_batches(tmp_path, ranks):
    alone = run_training(norm=False)
    for one in process_group(lambda _: run_training(norm=False), ranks, tmp_path / "together"):
        close(one["weights"], alone["weights"])
        assert one["said"] == pytest.approx(alone["said"], rel=1e-5)


class Pressed(Synthetic):
    """Ctrl-C comes to the second process only, in step 5."""

    def epoch(self, epoch, first_step=0, rank=0, ranks=1):
        for step, batch in enumerate(super().epoch(epoch, first_step, rank, ranks), first_step):
            if (epoch, step, rank) == (1, 1, 1):
                signal.raise_signal(signal.SIGINT)
            yield batch


def stopped(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_training(folder=folder / "run", data=Pressed())
    except Interrupted as error:
        return {"said": str(error)}
    raise AssertionError("it was not interrupted")


def test_all_processes_stop_after_the_same_step_and_go_on_to_the_same_bits(tmp_path):
    for one in process_group(stopped, 2, tmp_path / "stopped"):
        assert "interrupted after step 6 of 8" in one["said"]
    run = tmp_path / "stopped" / "run"
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(steps) == 2
    resumed = process_group(lambda _: run_training(folder=run), 2, tmp_path / "resumed")
    whole = process_group(lambda _: run_training(), 2, tmp_path / "whole")
    for one, other in zip(resumed, whole, strict=True):
        equal(one["weights"], other["weights"])
        equal(one["buffers"], other["buffers"])
        assert one["said"] == other["said"]


class Dropped(Objective):
    """Keeps what dropout let through."""

    def __init__(self):
        super().__init__(label_smoothing=0.0)
        self.draws = []

    def backward(self, model, images, labels, *, share):
        self.draws.append(nn.functional.dropout(torch.ones(64)))
        return super().backward(model, images, labels, share=share)


def dropped(_folder):
    objective = Dropped()
    train(
        small(), Synthetic(), recipe=RECIPE, epochs=1, seed=0, runtime=RUNTIME, objective=objective
    )
    return torch.stack(objective.draws)


def test_processes_draw_differently_for_their_different_images(tmp_path):
    one, other = process_group(dropped, 2, tmp_path / "two")
    assert not torch.equal(one, other)
    assert torch.equal(one, dropped(None))


# ------------------------------------------------------------------------------ evaluation


def measured(_folder):
    model = small()
    model.load_state_dict({**model.state_dict(), **run_training(epochs=1)["weights"]})
    passed = recalibrate(model, Synthetic(), runtime=RUNTIME)
    accuracy = evaluate(model, Synthetic(), runtime=RUNTIME)
    return {
        "buffers": {name: one for name, one in model.named_buffers() if "running" in name},
        "passed": passed,
        "accuracy": dataclasses.astuple(accuracy),
    }


def test_the_images_of_all_processes_are_evaluated(tmp_path):
    one, other = process_group(measured, 2, tmp_path / "two")
    equal(one["buffers"], other["buffers"])
    assert one["passed"] == other["passed"] == 64
    assert one["accuracy"] == other["accuracy"]
    assert one["accuracy"][2] == 64


def still(_folder):
    """Accuracy without anything that depends on who evaluates what."""
    return dataclasses.astuple(evaluate(small().eval(), Synthetic(), runtime=RUNTIME))


def test_accuracy_is_that_of_one_process_exactly(tmp_path):
    assert process_group(still, 2, tmp_path / "two") == [still(None)] * 2


def test_recalibration_is_the_mean_over_processes(tmp_path):
    """By hand: the first BatchNorm sees what the stem gives, whatever comes after it."""
    model = small()
    seen = []
    for images, _ in Synthetic().epoch(0):
        for part in images.split(8):
            stem = model.stem(part).detach()
            seen.append((stem.mean((0, 2, 3)), stem.var((0, 2, 3), unbiased=True)))
    mean, variance = (torch.stack(one).mean(0) for one in zip(*seen, strict=True))

    def recalibrated(_folder):
        model = small()
        recalibrate(model, Synthetic(), runtime=RUNTIME)
        return {"mean": model.bn0.running_mean, "variance": model.bn0.running_var}

    for one in process_group(recalibrated, 2, tmp_path / "two"):
        close(one, {"mean": mean, "variance": variance}, atol=1e-5)


# -------------------------------------------------------------------------------- searches


def dmcp_steps(*, parts=1):
    """DMCP's search, three steps of which move the chains (T18)."""
    algorithm = compose(["algorithm=dmcp", "algorithm.grid=even"]).algorithm
    supernet = Supernet(Blueprint(WHERE), enlarge=1.5, seed=0)
    objective = _Architecture(
        algorithm,
        supernet,
        algorithm.options(supernet.graph),
        steps=6,
        budget_macs=Blueprint(WHERE).graph.macs(),
        label_smoothing=0.1,
        seed=0,
    )
    loop = Loop(
        supernet.model,
        recipe=dataclasses.replace(RECIPE, accumulation=parts),
        steps_per_epoch=6,
        epochs=1,
        seed=0,
        runtime=RUNTIME,
        objective=objective,
    )
    widths = []
    rank, ranks = distributed.rank(), distributed.world_size()
    batches = [*Synthetic().epoch(0, 0, rank, ranks), *Synthetic().epoch(1, 0, rank, ranks)]
    for step, (images, labels) in enumerate(batches[:6]):
        loop.step(images, labels, step)
        widths.append([dict(one) for one in objective._students])  # noqa: SLF001
    return {
        "weights": weights(supernet.model),
        "alpha": objective.chains.alpha,
        "widths": widths,
        "macs": objective.macs,
    }


def test_two_processes_search_by_dmcp_as_one_does(tmp_path):
    """T18: the same widths in each step, the same alpha and weights afterwards."""
    one, other = process_group(lambda _: dmcp_steps(), 2, tmp_path / "two")
    equal(one["weights"], other["weights"])
    assert torch.equal(one["alpha"], other["alpha"])
    alone = dmcp_steps(parts=2)
    assert one["widths"] == other["widths"] == alone["widths"]
    assert one["macs"] == other["macs"] == alone["macs"]
    close(one["weights"], alone["weights"], atol=2e-6)
    torch.testing.assert_close(one["alpha"], alone["alpha"], rtol=0, atol=1e-6)
    assert one["alpha"].abs().max() > 0.01  # they did move


def slimmed(chunks=4):
    """A slimming of several chunks: its moves, and what they cost."""
    supernet = Supernet(Blueprint(WHERE), enlarge=1.5, seed=0)
    algorithm = compose(["algorithm=autoslim"]).algorithm
    sample = Synthetic().sample(64, batch_size=64 // chunks, seed=3)
    mine = Chunks(sample).share(distributed.rank(), distributed.world_size())
    found = slim(
        supernet,
        algorithm.options(supernet.graph),
        mine,
        budgets_macs=[round(0.8 * Blueprint(WHERE).graph.macs())],
        runtime=RUNTIME,
    )
    return {"moves": [move._asdict() for move in found.moves], "macs": found.macs}


@pytest.mark.parametrize(("chunks", "ranks"), [(4, 2), (5, 2), (1, 2), (4, 4)])
def test_slimming_counts_the_mistakes_of_all_processes_chunks(tmp_path, chunks, ranks):
    """Error count for error count (17); one of two processes may have no chunk at all."""
    found = process_group(lambda _: slimmed(chunks), ranks, tmp_path / "together")
    alone = slimmed(chunks)
    assert [one["moves"] for one in found] == [alone["moves"]] * ranks
    assert len({one["macs"] for one in found}) == 1
    if (chunks, ranks) in ((4, 2), (1, 2)):
        # With a single chunk of its own, a process keeps values between moves.
        assert found[0]["macs"] == alone["macs"]


def test_the_first_process_decides_how_a_supernet_runs(tmp_path, monkeypatch):
    """Each times for itself, and ways differ in rounding."""

    def timed(*_):
        backend = ("mask", "slice")[distributed.rank()]
        return sandwich._Way("contiguous", mixed=False, backend=backend)  # noqa: SLF001

    monkeypatch.setattr(sandwich, "_fastest", timed)
    monkeypatch.setattr(sandwich, "_stored_trial", lambda *_: None)  # of a folder not seen yet

    def backend(folder):
        runtime = dataclasses.replace(RUNTIME, backend="auto")
        context = SearchContext(RECIPE, runtime, 0, folder / "run")
        supernet, _ = sandwich.prepare_supernet(
            Blueprint(WHERE), context, enlarge=1.5, batch_size=16
        )
        return supernet.backend

    assert process_group(backend, 2, tmp_path / "two") == ["mask", "mask"]


def run_search(name, folder):
    request = compose([f"algorithm={name}", "algorithm.enlarge=1.5"])
    return dataclasses.asdict(
        request.algorithm.search(
            WHERE,
            Split(Synthetic(), Synthetic(), 4),
            budget_macs=Blueprint(WHERE).graph.macs(),
            context=SearchContext(RECIPE, RUNTIME, 0, folder / "run"),
        )
    )


@pytest.mark.parametrize("kind", [DMCP, AutoSlim])
def test_a_whole_search_is_the_same_in_every_process(tmp_path, kind):
    name = kind.__name__.lower()
    one, other = process_group(lambda folder: run_search(name, folder), 2, tmp_path / "two")
    for result in (one, other):
        result.pop("seconds")
        result["details"].pop("slimming_seconds", None)
    assert one == other
    if kind is DMCP:  # what slimming costs depends on its path
        assert one["overhead_macs"] == run_search(name, tmp_path)["overhead_macs"]


def test_processes_that_see_different_folders_are_stopped(tmp_path):
    run_training(folder=tmp_path / "0", epochs=1)

    def apart(folder):
        try:
            run_training(folder=folder.parent / str(distributed.rank()), epochs=2)
        except Exception as error:  # noqa: BLE001 (either process may be the one that sees it)
            return {"said": f"{type(error).__name__}: {error}"}
        return {"said": ""}

    found = process_group(apart, 2, tmp_path / "two")
    assert any("another training" in one["said"] or "same folder" in one["said"] for one in found)


# ------------------------------------------------------------------- the command, under torchrun


def torchrun(folder, *words):
    """The command in two processes, as torchrun starts them."""
    both = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, *both, "-m", "widthopt", *words],
        cwd=folder,
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def record(folder, root):
    (path,) = (folder / root).glob("*/record.json")
    (one,) = json.loads(path.read_text())["records"]
    return one


@pytest.mark.slow
def test_two_processes_of_torchrun_do_a_whole_run_as_one_does(tmp_path):
    (tmp_path / "my_network.py").write_text(NETWORK)
    words = (*TINY, "methods=[transfer]", "runtime.backend=slice")
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    alone = widthopt(*words, "recipe.accumulation=2", "root=alone", folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = record(tmp_path, "runs"), record(tmp_path, "alone")
    assert ours["found"]["channels"] == theirs["found"]["channels"]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
    for key in ("train_macs", "proxy", "target"):
        assert ours[key] == theirs[key]
    # Nothing is done again, by one process or by several; and only one of them reports.
    assert done.stdout.count("What this takes") == 1
    again = torchrun(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stderr
    assert record(tmp_path, "runs") == ours


@pytest.mark.slow
def test_the_failure_of_one_process_of_torchrun_is_the_commands(tmp_path):
    failing = """

import os


def failing(num_classes, width=16):
    if os.environ["RANK"] == "1":
        raise ValueError("the second has no luck")
    return MyNetwork(num_classes, width)
"""
    (tmp_path / "my_network.py").write_text(NETWORK + failing)
    words = [word.replace("my_network.MyNetwork", "my_network.failing") for word in TINY]
    done = torchrun(tmp_path, *words)
    assert done.returncode == 1
    assert "ValueError: the second has no luck" in done.stderr
    assert not list(tmp_path.glob("runs/stages/*/result.json"))
