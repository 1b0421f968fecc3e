import dataclasses
import errno
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import RECIPE, RUNTIME, Synthetic, make_recipe, make_runtime
from torch import nn

from widthopt.errors import InputError
from widthopt.training import checkpoints
from widthopt.training.evaluation import evaluate
from widthopt.training.loop import (
    Diverged,
    Interrupted,
    Loop,
    Objective,
    learning_rate,
    memory_format,
    resolve_device,
    train,
)


TESTS = Path(__file__).parent
# Appendix A: 0.8 for a batch of 1024 after 5 epochs of warm-up, 100 epochs in total.
PAPER = make_recipe(
    batch_size=1024, epochs=100, search_epochs=40, learning_rate=0.2, warmup_epochs=5
)
EPOCHS, STEPS = 3, 4


def network(seed=0, *, norm=True, dropout=0.3):
    """Return a small network; with dropout, it draws random numbers in each step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 4),
        )


class Watched(Objective):
    """Counts updates in its state dict, and can press Ctrl-C before a step ends."""

    def __init__(self, *, interrupt=None, presses=1):
        super().__init__(label_smoothing=RECIPE.label_smoothing)
        self.interrupt, self.presses = interrupt, presses
        self.updates = torch.zeros((), dtype=torch.int64)
        self.ended = []

    def before_step(self):
        self.updates += 1
        if self.updates == self.interrupt:
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)

    def after_epoch(self, epoch):
        self.ended.append(epoch)

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, tensors):
        self.updates.copy_(tensors["updates"])


def run(model, batches=None, **options):
    defaults = {"recipe": RECIPE, "epochs": EPOCHS, "seed": 0, "runtime": RUNTIME}
    return train(model, batches or Synthetic(), **(defaults | options))


def same(first, second):
    """Whether the state dicts of two networks are equal bit for bit."""
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def summary(trained):
    """Return a `Trained` without its time."""
    return dataclasses.replace(trained, seconds=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: for networks this small, more threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted():
    """A network trained without interruption, and its `Trained`."""
    model = network()
    return model, run(model, objective=Watched())


# ------------------------------------------------------------------------------- learning


def test_the_loss_falls_on_64_images():
    model = network(dropout=0.0)
    first = run(network(dropout=0.0), epochs=1)
    trained = run(model, epochs=15, recipe=make_recipe(label_smoothing=0.0))
    assert first.loss > 0.8
    assert trained.loss < 0.1
    assert trained.top1 > 99
    assert evaluate(model, Synthetic(), runtime=RUNTIME).top1 == 100.0


def test_epochs_steps_and_images_are_counted(uninterrupted):
    _, trained = uninterrupted
    assert (trained.epochs, trained.steps, trained.images) == (3, 12, 192)
    assert 0 < trained.seconds < 60


def test_the_loss_and_accuracy_of_the_last_epoch_are_means_over_its_images():
    """At this learning rate no weight changes, so they can be computed afterwards."""
    model = network(norm=False, dropout=0.0)
    still = make_recipe(learning_rate=1e-30)
    trained = run(model, recipe=still)
    data = Synthetic()
    logits = model(data.pixels)
    chosen = logits.log_softmax(1)
    loss = -(0.9 * chosen[torch.arange(64), data.labels] + 0.1 * chosen.mean(1)).mean()
    assert trained.loss == pytest.approx(loss.item(), rel=1e-5)
    assert trained.top1 == 100 * (logits.argmax(1) == data.labels).double().mean().item()


def test_the_weights_depend_on_the_seed():
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, seed=seed, epochs=1)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_training_preserves_the_global_rng_state_and_does_not_depend_on_it():
    models = network(), network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(models[0], epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    run(models[1], epochs=1)
    assert same(*models)


# ---------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.0),
        (2.5, 0.4),  # half of 0.2 * 1024 / 256
        (5, 0.8),
        (28.75, 0.8 * (1 + 2**-0.5) / 2),  # a quarter of the cosine
        (52.5, 0.4),
        (100, 0.0),
    ],
)
def test_learning_rates_are_those_of_the_papers_recipe(epoch, rate):
    result = learning_rate(PAPER, step=int(epoch * 1252), steps_per_epoch=1252, epochs=100)
    assert result == pytest.approx(rate, abs=1e-12)


def test_the_schedule_of_a_search_spans_its_own_epochs():
    rates = [
        learning_rate(PAPER, step=epoch * 10, steps_per_epoch=10, epochs=40)
        for epoch in (5, 22.5, 40)
    ]
    assert rates == pytest.approx([0.8, 0.4, 0.0], abs=1e-12)


@settings(deadline=None)
@given(
    epochs=st.integers(1, 12),
    steps=st.integers(1, 9),
    warmup=st.floats(0, 20, allow_subnormal=False),
)
def test_the_learning_rate_rises_once_then_falls_to_zero(epochs, steps, warmup):
    recipe = dataclasses.replace(PAPER, warmup_epochs=warmup)
    rates = [
        learning_rate(recipe, step=step, steps_per_epoch=steps, epochs=epochs)
        for step in range(epochs * steps + 1)
    ]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) <= 0.8
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_training_no_longer_than_the_warm_up_warms_up_for_half_of_it():
    rates = [learning_rate(PAPER, step=s, steps_per_epoch=2, epochs=2) for s in range(5)]
    assert rates == pytest.approx([0.0, 0.4, 0.8, 0.4, 0.0], abs=1e-12)


def test_the_peak_follows_the_batch_size_in_use():
    models = network(), network()
    for model, stated in zip(models, (16, 999), strict=True):
        run(model, recipe=make_recipe(batch_size=stated), epochs=1)
    assert same(*models)


def test_steps_equal_sgd_with_nesterov_momentum_decay_and_smoothing_in_numpy():
    """A linear network in double precision; learning rates 0, 0.05 and 0.1 of the warm-up."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    recipe = make_recipe(warmup_epochs=2, weight_decay=0.01)
    loop = Loop(model, recipe=recipe, steps_per_epoch=1, epochs=4, seed=0, runtime=RUNTIME)
    weights = [p.detach().double().numpy().copy() for p in model.parameters()]
    momenta = [np.zeros_like(w) for w in weights]
    batches = list(Synthetic().epoch(0))[:3]
    for step, ((images, labels), rate) in enumerate(zip(batches, (0, 0.05, 0.1), strict=True)):
        loop.step(images, labels, step)
        flat = images.flatten(1).double().numpy()
        scores = flat @ weights[0].T + weights[1]
        chance = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        target = np.eye(4)[labels.numpy()] * 0.9 + 0.1 / 4
        by_score = (chance - target) / len(flat)
        for place, gradient in enumerate((by_score.T @ flat, by_score.sum(0))):
            decayed = gradient + 0.01 * weights[place]
            momenta[place] = 0.9 * momenta[place] + decayed
            weights[place] = weights[place] - rate * (decayed + 0.9 * momenta[place])
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-4, atol=1e-6)


def test_after_step_sees_the_updated_weights():
    """DMCP's chains learn from the updated weights (docs/algorithms/dmcp.md, 1.7.3)."""

    class Recording(Objective):
        def after_step(self, step, micro_batches):  # noqa: ARG002
            self.weight = loop.model[0].weight.detach().clone()

    objective = Recording(label_smoothing=0.0)
    loop = Loop(
        network(), recipe=RECIPE, steps_per_epoch=STEPS, epochs=EPOCHS, seed=0, runtime=RUNTIME,
        objective=objective,
    )  # fmt: skip
    before = loop.model[0].weight.detach().clone()
    loop.step(*next(Synthetic().epoch(0)), STEPS)  # at the peak of the learning rate
    assert not torch.equal(objective.weight, before)
    assert torch.equal(objective.weight, loop.model[0].weight)


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulation_equals_a_step_on_the_full_batch(parts):
    """Without BatchNorm, which normalises each micro-batch; 3 does not divide 16."""
    models = [network(norm=False, dropout=0.0) for _ in range(2)]
    objective = Watched()
    full = run(models[0])
    split = run(
        models[1],
        recipe=make_recipe(accumulation=parts),
        objective=objective,
    )
    for full_weight, split_weight in zip(*map(nn.Module.parameters, models), strict=True):
        torch.testing.assert_close(split_weight, full_weight, rtol=0, atol=1e-6)
    assert split.loss == pytest.approx(full.loss, rel=1e-6)
    assert split.top1 == full.top1
    assert objective.updates == 12  # once in a step


def test_channels_last_changes_no_more_than_rounding():
    models = [network(dropout=0.0) for _ in range(2)]
    run(models[0])
    run(models[1], runtime=make_runtime(memory_format="channels_last"))
    assert models[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    for full_weight, split_weight in zip(*map(nn.Module.parameters, models), strict=True):
        torch.testing.assert_close(split_weight, full_weight, rtol=0, atol=1e-4)


def test_a_gradient_in_another_memory_format_updates_the_same_weights():
    """torch's fused SGD ignores strides, so it would update the wrong weights."""

    class Contiguous(Objective):
        def before_step(self):
            weight = model[0].weight
            weight.grad = weight.grad.contiguous()
            assert weight.grad.stride() != weight.stride()

    last = make_runtime(memory_format="channels_last")
    plain, model = network(), network()
    run(plain, runtime=last)
    run(model, runtime=last, objective=Contiguous(label_smoothing=0.1))
    assert same(plain, model)


def test_weights_with_gaps_in_memory_are_updated_correctly():
    class Gapped(nn.Linear):
        def __init__(self):
            super().__init__(192, 4)
            self.weight = nn.Parameter(torch.zeros(4, 200)[:, :192])

    gapped, plain = nn.Sequential(nn.Flatten(), Gapped()), nn.Sequential(nn.Flatten(), Gapped())
    plain[1].weight = nn.Parameter(torch.zeros(4, 192))
    plain.load_state_dict(gapped.state_dict())
    for model in (gapped, plain):
        run(model, epochs=1)
    torch.testing.assert_close(gapped[1].weight, plain[1].weight, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_the_parameters_in_float32_and_learns():
    model = network(dropout=0.0)
    trained = run(model, epochs=10, runtime=make_runtime(precision="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert trained.top1 > 90
    exact = network(dropout=0.0)
    run(exact, epochs=10)
    assert not same(model, exact)


# --------------------------------------------------------------- interruption, resumption


@pytest.mark.parametrize("step", [1, 4, 6, 12])
def test_resuming_after_any_step_gives_equal_bits(tmp_path, uninterrupted, step):
    expected, trained = uninterrupted
    with pytest.raises(Interrupted, match=f"after step {step} of 12; the state is saved in .*"):
        run(network(), objective=Watched(interrupt=step), folder=tmp_path)
    model, objective = network(seed=9), Watched()
    again = run(model, objective=objective, folder=tmp_path)
    assert same(model, expected)
    assert summary(again) == summary(trained)
    assert objective.updates == 12


def test_resuming_in_channels_last_gives_equal_bits(tmp_path):
    last = make_runtime(memory_format="channels_last")
    expected, model = network(), network()
    run(expected, runtime=last, objective=Watched())
    with pytest.raises(Interrupted):
        run(network(), runtime=last, objective=Watched(interrupt=6), folder=tmp_path)
    run(model, runtime=last, objective=Watched(), folder=tmp_path)
    assert same(model, expected)


def test_the_handler_of_ctrl_c_is_restored_after_training(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        run(network(), objective=Watched(interrupt=2), folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(network(), objective=Watched(interrupt=2, presses=2), folder=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_does_not_wait_without_a_folder():
    with pytest.raises(KeyboardInterrupt):
        run(network(), objective=Watched(interrupt=2))


def test_a_loader_that_ctrl_c_ended_leaves_a_resumable_run(tmp_path, uninterrupted):
    class Ended(Synthetic):
        def epoch(self, epoch, first_step=0, rank=0, ranks=1):
            for step, batch in enumerate(super().epoch(epoch, first_step, rank, ranks)):
                if (epoch, step) == (1, 2):
                    signal.raise_signal(signal.SIGINT)
                    raise RuntimeError("DataLoader worker exited unexpectedly")
                yield batch

    with pytest.raises(Interrupted, match="after step 6 of 12"):
        run(network(), Ended(), objective=Watched(), folder=tmp_path)
    model = network()
    run(model, objective=Watched(), folder=tmp_path)
    assert same(model, uninterrupted[0])


def child(folder):
    """Train in a separate process; print a line in step 6, and wait for one there."""

    class Talking(Watched):
        def before_step(self):
            super().before_step()
            if self.updates == 6:
                print("step 6", flush=True)  # noqa: T201 (the parent waits for it)
                sys.stdin.readline()

    torch.set_num_threads(1)
    try:
        run(network(), objective=Talking(), folder=Path(folder))
    except Interrupted as error:
        sys.exit(str(error))


def test_a_process_that_gets_ctrl_c_leaves_a_run_that_ends_with_the_same_weights(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_training as t; "
    process = subprocess.Popen(  # noqa: S603 (a fixed command)
        [sys.executable, "-c", script + "t.child(sys.argv[2])", str(TESTS), str(tmp_path)],
        cwd=TESTS.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "step 6\n"
    process.send_signal(signal.SIGINT)
    message = process.communicate("continue\n", timeout=30)[1]
    assert message.startswith("interrupted after step 6 of 12; the state is saved in")
    assert process.returncode == 1

    class Talking(Watched):
        """Has the name of the objective of the child, which is part of a checkpoint's identity."""

    model, expected = network(), network()
    run(model, objective=Talking(), folder=tmp_path)
    run(expected, objective=Talking())
    assert same(model, expected)


def test_a_training_that_is_complete_is_not_run_again(tmp_path, uninterrupted):
    run(network(), objective=Watched(), folder=tmp_path)

    class Closed(Synthetic):
        def epoch(self, *_, **__):
            raise AssertionError("no batch is needed")

    model, objective = network(seed=3), Watched()
    again = run(model, Closed(), objective=objective, folder=tmp_path)
    assert same(model, uninterrupted[0])
    assert summary(again) == summary(uninterrupted[1])
    assert objective.ended == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, "epochs is 3 there and 4 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        (
            {"recipe": make_recipe(momentum=0.8)},
            r"recipe\.momentum is 0\.9 there and 0\.8 here",
        ),
        (
            {"objective": Objective(label_smoothing=0.1)},
            'objective is "Watched" there and "Objective" here',
        ),
    ],
)
def test_checkpoints_of_another_training_are_refused(tmp_path, change, message):
    with pytest.raises(Interrupted):
        run(network(), objective=Watched(interrupt=2), folder=tmp_path)
    with pytest.raises(InputError, match=rf"folder is .*, but its checkpoints are .*\({message}"):
        run(network(), **({"objective": Watched(), "folder": tmp_path} | change))


def test_checkpoints_of_another_network_are_refused(tmp_path):
    with pytest.raises(Interrupted):
        run(network(), objective=Watched(interrupt=2), folder=tmp_path)
    with pytest.raises(
        InputError, match=r"parameters is .*; use another folder or remove this one"
    ):
        run(network(norm=False), objective=Watched(), folder=tmp_path)


# ---------------------------------------------------------------------------- checkpoints


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(network(), objective=Watched(), folder=folder)
    return folder


def test_the_two_newest_checkpoints_are_kept_as_tensors_and_json(finished):
    names = sorted(str(p.relative_to(finished / "checkpoints")) for p in finished.rglob("*.*"))
    assert names == [
        f"step-{step:08}/{name}"
        for step in (8, 12)
        for name in ("state.json", "tensors.safetensors")
    ]


@pytest.fixture
def resumable(finished, tmp_path):
    """A copy of the folder with the checkpoints of steps 8 and 12."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    resumable, uninterrupted, caplog, damage, name
):
    damage(resumable / "checkpoints" / "step-00000012" / name)
    model, objective = network(), Watched()
    again = run(model, objective=objective, folder=resumable)
    assert "step-00000012 is damaged" in caplog.text
    assert objective.ended == [2]
    assert same(model, uninterrupted[0])
    assert summary(again) == summary(uninterrupted[1])
    assert checkpoints.newest(resumable / "checkpoints").step == 12


def test_a_training_whose_checkpoints_are_all_damaged_starts_again(
    resumable, uninterrupted, caplog
):
    for path in resumable.rglob("*.safetensors"):
        shorten(path)
    model = network()
    run(model, objective=Watched(), folder=resumable)
    assert caplog.text.count("is damaged") == 2
    assert same(model, uninterrupted[0])


def test_a_damaged_checkpoint_does_not_displace_intact_ones(resumable):
    folder = resumable / "checkpoints"
    shorten(folder / "step-00000012" / "tensors.safetensors")
    for step in (9, 10):
        checkpoints.save(folder, step=step, state={}, tensors={})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000010"]


@settings(deadline=None, max_examples=25)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**40))
def test_numbers_and_tensors_survive_a_round_trip(tmp_path_factory, number, count):
    folder = tmp_path_factory.mktemp("checkpoints")
    shared = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors = {"a": shared, "b": shared, "none": torch.zeros(0), "count": torch.tensor(count)}
    checkpoints.save(folder, step=7, state={"number": number}, tensors=tensors)
    checkpoint = checkpoints.newest(folder)
    assert checkpoint.step == 7
    assert str(checkpoint.state["number"]) == str(number)
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_stops_with_one_line_and_the_checkpoint_before_is_kept(
    tmp_path, uninterrupted, monkeypatch, call
):
    class Filling(Watched):
        def after_epoch(self, epoch):
            if epoch == 1 and filling:
                monkeypatch.setattr(os, call, full)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    filling = True
    folder = tmp_path / "checkpoints"
    message = rf"^root is {folder}, but it cannot be written \(No space left on device\); make room"
    with pytest.raises(InputError, match=message):
        run(network(), objective=Filling(), folder=tmp_path)
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    filling = False
    model = network()
    run(model, objective=Filling(), folder=tmp_path)
    assert same(model, uninterrupted[0])


def test_a_process_killed_while_writing_a_checkpoint_leaves_the_one_before(
    resumable, uninterrupted
):
    """Such a process leaves an incomplete folder under another name."""
    folder = resumable / "checkpoints"
    (folder / "step-00000012").rename(folder / ".step-00000012.part")
    shorten(folder / ".step-00000012.part" / "tensors.safetensors")
    model = network()
    run(model, objective=Watched(), folder=resumable)
    assert same(model, uninterrupted[0])
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]


# ----------------------------------------------------------------------------- divergence


def test_a_loss_that_is_not_a_number_stops_with_step_rate_and_the_last_good_checkpoint(tmp_path):
    """Step 6, the third of epoch 1: a quarter of the cosine of 3 epochs, 1 of them warm-up."""
    rate = 0.1 * (1 + math.cos(math.pi / 4)) / 2
    message = (
        rf"^the loss is nan at step 6 \(epoch 1\) with a learning rate of {rate:.6g}; the last "
        r"good checkpoint, of step 4, is kept in .*/checkpoints; lower recipe\.learning_rate$"
    )
    with pytest.raises(Diverged, match=message):
        run(network(), Synthetic(spoilt=6), folder=tmp_path)
    checkpoint = checkpoints.newest(tmp_path / "checkpoints")
    assert checkpoint.step == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())


def test_a_loss_that_is_not_a_number_stops_a_training_without_checkpoints_too():
    with pytest.raises(Diverged, match=r"the loss is nan at step 1 .*; no checkpoint was written"):
        run(network(), Synthetic(spoilt=1))


def test_weights_that_the_last_step_of_an_epoch_spoilt_are_not_saved(tmp_path):
    """The loss of that step is finite: it is computed before the update."""

    class Spoiling(Watched):
        def before_step(self):
            super().before_step()
            if self.updates == 8:
                model[7].bias.grad[0] = torch.inf

    model = network()
    with pytest.raises(Diverged, match=r"^7\.bias is not finite at step 7 \(epoch 1\) with a lea"):
        run(model, objective=Spoiling(), folder=tmp_path)
    assert checkpoints.newest(tmp_path / "checkpoints").step == 4


# -------------------------------------------------------------------- progress and inputs


def test_each_epoch_is_one_line_in_the_log(caplog):
    caplog.set_level(logging.INFO, "widthopt")
    run(network(), label="resnet18")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for epoch, line in enumerate(lines, 1):
        assert line.startswith(f"resnet18: epoch {epoch} of 3, loss ")
    assert lines[2].endswith(" images/s, 0:00:00 left")


def test_a_terminal_shows_a_bar_with_loss_accuracy_speed_and_remaining_time(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat the stream as a terminal
    monkeypatch.setenv("COLUMNS", "160")
    run(network(), label="resnet18", runtime=make_runtime(progress=True))
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    bar = output[output.rindex("resnet18") :]
    for part in ("epoch 3 of 3, loss ", ", top-1 ", " images/s, 0:00:00 left"):
        assert part in bar


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta", ""])
def test_a_missing_device_is_refused_with_a_list_of_devices(device):
    with pytest.raises(InputError, match=rf"runtime\.device is {device}, but .*use one of auto, c"):
        resolve_device(make_runtime(device=device))


def test_channels_last_is_automatic_on_cuda_only():
    auto = make_runtime(memory_format="auto")
    assert memory_format(auto, torch.device("cuda")) == torch.channels_last
    assert memory_format(auto, torch.device("cpu")) == torch.contiguous_format
    assert memory_format(RUNTIME, torch.device("cuda")) == torch.contiguous_format


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": Synthetic(65)}, "recipe.batch_size is 65, but there are 64 training images"),
        (
            {"recipe": make_recipe(batch_size=32, accumulation=17)},
            "recipe.accumulation is 17, but of the 16 images .* takes at least two, for BatchNorm",
        ),
        (
            {"recipe": make_recipe(accumulation=9)},
            "recipe.accumulation is 9, but of the 16 images .* takes at least two, for BatchNorm",
        ),
    ],
)
def test_a_batch_size_that_cannot_be_trained_is_refused_before_the_first_step(change, message):
    with pytest.raises(InputError, match=message):
        run(network(), **change)
