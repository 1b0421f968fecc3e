"""Data-parallel processes compute what a single process does; gloo on the CPU."""

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
from small import RUNTIME, Small, Synthetic, make_runtime, make_setting
from torch import nn

from widthopt.algorithms import SearchContext, sandwich
from widthopt.algorithms.autoslim import AutoSlim
from widthopt.algorithms.dmcp import DMCP, _Architecture
from widthopt.algorithms.greedy import slim
from widthopt.config.compose import compose
from widthopt.data import Split
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
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
SETTING = make_setting()
STEPS = 4


def run_member(function, rank, ranks, folder):
    """Run a function as one process of a group; save its result."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    torch.save(function(folder), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run_group(function, ranks, folder):
    """Run a function in several processes; return their results, tensors and plain data."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    arguments = [(function, rank, ranks, folder) for rank in range(ranks)]
    processes = [context.Process(target=run_member, args=values) for values in arguments]
    with warnings.catch_warnings():  # the children do not use the threads of this process
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_close(tensors, expected, atol=1e-6):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=atol)


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def small(*, norm=True):
    """Return the small network with the same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small(4)
    if not norm:
        for name, module in list(model.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(model, name, nn.Identity())
    return model


def run_training(*, parts=1, norm=True, folder=None, data=None, epochs=2):
    """Train without a search; return the weights, the buffers and the results."""
    model = small(norm=norm)
    recipe = dataclasses.replace(RECIPE, accumulation=parts)
    trained = train(
        model,
        data or Synthetic(),
        recipe=recipe,
        epochs=epochs,
        seed=0,
        runtime=RUNTIME,
        folder=folder,
    )
    keys = ("loss", "top1", "images", "steps")
    return {
        "weights": weights(model),
        "buffers": dict(model.named_buffers()),
        "results": {key: getattr(trained, key) for key in keys},
    }


# -------------------------------------------------------------------------------- collectives


def run_collectives(_folder):
    rank = distributed.rank()
    matrix, vector = torch.full((2, 3), 1.0 + rank).t(), torch.tensor([10.0 * rank])
    distributed.all_reduce_sum([matrix, vector])
    cpu = torch.device("cpu")
    return {
        "matrix": matrix,
        "vector": vector,
        "world_size": distributed.world_size(),
        "broadcast": distributed.broadcast({"rank": rank, "ways": ["mask"]}, device=cpu),
        "all_gather": distributed.all_gather([rank, str(rank)]),
        "true_in_rank_1": distributed.all_reduce_any(rank == 1, device=cpu),
        "true_in_no_rank": distributed.all_reduce_any(rank > 2, device=cpu),
    }


def test_collectives_give_every_process_the_same_result(tmp_path):
    for result in run_group(run_collectives, 3, tmp_path / "three"):
        assert torch.equal(result["matrix"], torch.full((3, 2), 6.0))
        assert torch.equal(result["vector"], torch.tensor([30.0]))
        assert result["world_size"] == 3
        assert result["broadcast"] == {"rank": 0, "ways": ["mask"]}
        assert result["all_gather"] == [[0, "0"], [1, "1"], [2, "2"]]
        assert (result["true_in_rank_1"], result["true_in_no_rank"]) == (True, False)


def test_collectives_do_nothing_without_a_process_group():
    tensor = torch.ones(2)
    distributed.all_reduce_sum([tensor])
    distributed.barrier()
    assert torch.equal(tensor, torch.ones(2))
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather("x") == ["x"]
    assert distributed.all_reduce_any(bool(tensor.all()), device=tensor.device)


# -------------------------------------------------------------------------------- training


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_train_as_a_single_one_does_on_as_many_micro_batches(tmp_path, ranks):
    """BatchNorm sees the images of its own process; 16 images on 3 processes are 5, 5 and 6."""
    trainings = run_group(lambda _: run_training(), ranks, tmp_path / "together")
    if ranks == 2:
        expected = run_training(parts=2)
        for training in trainings:
            assert_close(training["weights"], expected["weights"])
            assert training["results"] == pytest.approx(expected["results"], rel=1e-5)
    first = trainings[0]
    for training in trainings[1:]:
        assert_equal(training["weights"], first["weights"])
        assert_equal(training["buffers"], first["buffers"])
        assert training["results"] == first["results"]
        assert training["results"]["images"] == 2 * 64


@pytest.mark.parametrize("ranks", [2, 3])
def test_without_batchnorm_processes_train_as_a_single_one_does_on_full_batches(tmp_path, ranks):
    expected = run_training(norm=False)
    for training in run_group(lambda _: run_training(norm=False), ranks, tmp_path / "together"):
        assert_close(training["weights"], expected["weights"])
        assert training["results"] == pytest.approx(expected["results"], rel=1e-5)


class Interrupting(Synthetic):
    """Presses Ctrl-C in step 5, in rank 1 only."""

    def epoch(self, epoch, first_step=0, rank=0, ranks=1):
        for step, batch in enumerate(super().epoch(epoch, first_step, rank, ranks), first_step):
            if (epoch, step, rank) == (1, 1, 1):
                signal.raise_signal(signal.SIGINT)
            yield batch


def interrupt_training(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_training(folder=folder / "run", data=Interrupting())
    except Interrupted as error:
        return str(error)
    raise AssertionError("it was not interrupted")


def test_all_processes_stop_after_the_same_step_and_resume_with_equal_bits(tmp_path):
    for message in run_group(interrupt_training, 2, tmp_path / "interrupted"):
        assert "interrupted after step 6 of 8" in message
    run = tmp_path / "interrupted" / "run"
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(steps) == 2
    resumed = run_group(lambda _: run_training(folder=run), 2, tmp_path / "resumed")
    uninterrupted = run_group(lambda _: run_training(), 2, tmp_path / "uninterrupted")
    for training, expected in zip(resumed, uninterrupted, strict=True):
        assert_equal(training["weights"], expected["weights"])
        assert_equal(training["buffers"], expected["buffers"])
        assert training["results"] == expected["results"]


class DrawingObjective(Objective):
    """Records the output of dropout."""

    def __init__(self):
        super().__init__(label_smoothing=0.0)
        self.draws = []

    def backward(self, model, images, labels, *, share):
        self.draws.append(nn.functional.dropout(torch.ones(64)))
        return super().backward(model, images, labels, share=share)


def draw_dropout(_folder):
    objective = DrawingObjective()
    train(
        small(), Synthetic(), recipe=RECIPE, epochs=1, seed=0, runtime=RUNTIME, objective=objective
    )
    return torch.stack(objective.draws)


def test_processes_draw_different_random_numbers(tmp_path):
    first, second = run_group(draw_dropout, 2, tmp_path / "two")
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_dropout(None))


# ------------------------------------------------------------------------------ evaluation


def recalibrate_and_evaluate(_folder):
    model = small()
    model.load_state_dict({**model.state_dict(), **run_training(epochs=1)["weights"]})
    images = recalibrate(model, Synthetic(), runtime=RUNTIME)
    accuracy = evaluate(model, Synthetic(), runtime=RUNTIME)
    return {
        "buffers": {name: t for name, t in model.named_buffers() if "running" in name},
        "images": images,
        "accuracy": dataclasses.astuple(accuracy),
    }


def test_the_images_of_all_processes_are_evaluated(tmp_path):
    first, second = run_group(recalibrate_and_evaluate, 2, tmp_path / "two")
    assert_equal(first["buffers"], second["buffers"])
    assert first["images"] == second["images"] == 64
    assert first["accuracy"] == second["accuracy"]
    assert first["accuracy"][2] == 64


def evaluate_untrained(_folder):
    """Return an accuracy that does not depend on the number of processes."""
    return dataclasses.astuple(evaluate(small().eval(), Synthetic(), runtime=RUNTIME))


def test_accuracy_equals_that_of_a_single_process(tmp_path):
    expected = evaluate_untrained(None)
    assert run_group(evaluate_untrained, 2, tmp_path / "two") == [expected] * 2


def test_recalibration_is_the_mean_over_processes(tmp_path):
    """Computed by hand for the first BatchNorm, which reads the output of the stem."""
    model = small()
    moments = []
    for images, _ in Synthetic().epoch(0):
        for part in images.split(8):
            stem = model.stem(part).detach()
            moments.append((stem.mean((0, 2, 3)), stem.var((0, 2, 3), unbiased=True)))
    mean, variance = (torch.stack(values).mean(0) for values in zip(*moments, strict=True))

    def recalibrate_small(_folder):
        model = small()
        recalibrate(model, Synthetic(), runtime=RUNTIME)
        return {"mean": model.bn0.running_mean, "variance": model.bn0.running_var}

    for statistics in run_group(recalibrate_small, 2, tmp_path / "two"):
        assert_close(statistics, {"mean": mean, "variance": variance}, atol=1e-5)


# -------------------------------------------------------------------------------- searches


def run_dmcp_steps(*, parts=1):
    """Run six steps of DMCP's search, three of which update the chains."""
    algorithm = compose(["algorithm=dmcp", "algorithm.grid=even"]).algorithm
    supernet = Supernet(Blueprint(SETTING), enlarge=1.5, seed=0)
    objective = _Architecture(
        algorithm,
        supernet,
        algorithm.options(supernet.graph),
        steps=6,
        budget_macs=Blueprint(SETTING).graph.macs(),
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
        widths.append([dict(student) for student in objective._students])  # noqa: SLF001
    return {
        "weights": weights(supernet.model),
        "alpha": objective.chains.alpha,
        "widths": widths,
        "macs": objective.macs,
    }


def test_two_processes_search_by_dmcp_as_a_single_one_does(tmp_path):
    """docs/algorithms/dmcp.md, T18: equal widths in each step, equal alpha and weights."""
    first, second = run_group(lambda _: run_dmcp_steps(), 2, tmp_path / "two")
    assert_equal(first["weights"], second["weights"])
    assert torch.equal(first["alpha"], second["alpha"])
    expected = run_dmcp_steps(parts=2)
    assert first["widths"] == second["widths"] == expected["widths"]
    assert first["macs"] == second["macs"] == expected["macs"]
    assert_close(first["weights"], expected["weights"], atol=2e-6)
    torch.testing.assert_close(first["alpha"], expected["alpha"], rtol=0, atol=1e-6)
    assert first["alpha"].abs().max() > 0.01  # the chains were updated


def slim_chunks(chunks=4):
    """Run greedy slimming on several chunks; return its moves and their MACs."""
    supernet = Supernet(Blueprint(SETTING), enlarge=1.5, seed=0)
    algorithm = compose(["algorithm=autoslim"]).algorithm
    sample = Synthetic().sample(64, batch_size=64 // chunks, seed=3)
    slimmed = slim(
        supernet,
        algorithm.options(supernet.graph),
        sample.share(distributed.rank(), distributed.world_size()),
        budgets_macs=[round(0.8 * Blueprint(SETTING).graph.macs())],
        runtime=RUNTIME,
    )
    return {"moves": [move._asdict() for move in slimmed.moves], "macs": slimmed.macs}


@pytest.mark.parametrize(("chunks", "ranks"), [(4, 2), (5, 2), (1, 2), (4, 4)])
def test_slimming_counts_the_mistakes_in_the_chunks_of_all_processes(tmp_path, chunks, ranks):
    """docs/algorithms/autoslim.md, property 17; a process may have no chunk at all."""
    results = run_group(lambda _: slim_chunks(chunks), ranks, tmp_path / "together")
    expected = slim_chunks(chunks)
    assert [result["moves"] for result in results] == [expected["moves"]] * ranks
    assert len({result["macs"] for result in results}) == 1
    if (chunks, ranks) in ((4, 2), (1, 2)):
        # A process with a single chunk keeps values between moves.
        assert results[0]["macs"] == expected["macs"]


def test_rank_0_decides_how_a_supernet_runs(tmp_path, monkeypatch):
    """Every process measures its own times, and the ways differ in rounding."""

    def choose(*_):
        backend = ("mask", "slice")[distributed.rank()]
        return sandwich._Way("contiguous", mixed=False, backend=backend)  # noqa: SLF001

    monkeypatch.setattr(sandwich, "_fastest", choose)
    monkeypatch.setattr(sandwich, "_stored_trial", lambda *_: None)  # none is stored yet

    def backend(folder):
        context = SearchContext(RECIPE, make_runtime(backend="auto"), 0, folder / "run")
        supernet, _ = sandwich.prepare_supernet(
            Blueprint(SETTING), context, enlarge=1.5, batch_size=16
        )
        return supernet.backend

    assert run_group(backend, 2, tmp_path / "two") == ["mask", "mask"]


def run_search(name, folder):
    request = compose([f"algorithm={name}", "algorithm.enlarge=1.5"])
    return dataclasses.asdict(
        request.algorithm.search(
            SETTING,
            Split(Synthetic(), Synthetic(), 4),
            budget_macs=Blueprint(SETTING).graph.macs(),
            context=SearchContext(RECIPE, RUNTIME, 0, folder / "run"),
        )
    )


@pytest.mark.parametrize("kind", [DMCP, AutoSlim])
def test_a_complete_search_is_the_same_in_every_process(tmp_path, kind):
    name = kind.__name__.lower()
    first, second = run_group(lambda folder: run_search(name, folder), 2, tmp_path / "two")
    for result in (first, second):
        result.pop("seconds")
        result["details"].pop("slimming_seconds", None)
    assert first == second
    if kind is DMCP:  # the cost of slimming depends on its path
        assert first["overhead_macs"] == run_search(name, tmp_path)["overhead_macs"]


def test_processes_that_see_different_folders_are_stopped(tmp_path):
    run_training(folder=tmp_path / "0", epochs=1)

    def train_apart(folder):
        try:
            run_training(folder=folder.parent / str(distributed.rank()), epochs=2)
        except Exception as error:  # noqa: BLE001 (either process may raise it)
            return str(error)
        return ""

    messages = run_group(train_apart, 2, tmp_path / "two")
    assert any("another training" in text or "same folder" in text for text in messages)


# ------------------------------------------------------------------- the command, under torchrun


def torchrun(folder, *words):
    """Run the command in two processes that torchrun starts."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(  # noqa: S603 (a fixed command)
        [sys.executable, *launcher, "-m", "widthopt", *words],
        cwd=folder,
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def read_record(folder, root):
    (path,) = (folder / root).glob("*/record.json")
    (record,) = json.loads(path.read_text())["records"]
    return record


@pytest.mark.slow
def test_two_processes_of_torchrun_complete_a_run_as_a_single_one_does(tmp_path):
    (tmp_path / "my_network.py").write_text(NETWORK)
    words = (*TINY, "methods=[transfer]", "runtime.backend=slice")
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    single = widthopt(*words, "recipe.accumulation=2", "root=single", folder=tmp_path)
    assert single.returncode == 0, single.stderr
    record, expected = read_record(tmp_path, "runs"), read_record(tmp_path, "single")
    assert record["found"]["channels"] == expected["found"]["channels"]
    assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    for key in ("train_macs", "proxy", "target"):
        assert record[key] == expected[key]
    # A complete run is not run again, and only rank 0 prints.
    assert done.stdout.count("Plan  ") == 1
    again = torchrun(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stderr
    assert read_record(tmp_path, "runs") == record


@pytest.mark.slow
def test_the_command_fails_if_a_process_of_torchrun_fails(tmp_path):
    failing = """

import os


def failing(num_classes, width=16):
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 fails")
    return MyNetwork(num_classes, width)
"""
    (tmp_path / "my_network.py").write_text(NETWORK + failing)
    words = [word.replace("my_network.MyNetwork", "my_network.failing") for word in TINY]
    done = torchrun(tmp_path, *words)
    assert done.returncode == 1
    assert "ValueError: rank 1 fails" in done.stderr
    assert not list(tmp_path.glob("runs/stages/*/result.json"))
