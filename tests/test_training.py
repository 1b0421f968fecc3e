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
from torch import nn

from widthopt.errors import InputError
from widthopt.setting import Recipe, Runtime
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
RUNTIME = Runtime(
    device="cpu",
    workers=0,
    precision="float32",
    memory_format="contiguous",
    backend="auto",
    progress=False,
)
RECIPE = Recipe(
    batch_size=16,
    accumulation=1,
    epochs=3,
    search_epochs=3,
    learning_rate=1.6,  # a peak of 0.1 for 16 images
    warmup_epochs=1,
    momentum=0.9,
    weight_decay=5e-5,
    label_smoothing=0.1,
    augmentation="none",
)
# Appendix A: 0.8 for a batch of 1024 after 5 epochs of warm-up, 100 epochs in all.
PAPER = dataclasses.replace(
    RECIPE, batch_size=1024, epochs=100, search_epochs=40, learning_rate=0.2, warmup_epochs=5
)
EPOCHS, STEPS = 3, 4


class Synthetic:
    """64 images of 4 classes, noise upon a pattern for each class, in a new order each epoch."""

    images, classes = 64, 4

    def __init__(self, batch_size=16, spoilt=None):
        random = torch.Generator().manual_seed(0)
        patterns = torch.randn(4, 3, 8, 8, generator=random)
        self.labels = torch.arange(64) % 4
        self.pixels = patterns[self.labels] + torch.randn(64, 3, 8, 8, generator=random)
        self.batch_size = batch_size
        self.steps_per_epoch = 64 // batch_size
        self.spoilt = spoilt  # the step that gets an image that is not a number

    def epoch(self, epoch, first_step=0, rank=0, ranks=1):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        part = slice(rank * self.batch_size // ranks, (rank + 1) * self.batch_size // ranks)
        for step, chosen in enumerate(batch[part] for batch in order.split(self.batch_size)):
            if step >= first_step:
                pixels = self.pixels[chosen].clone()
                if epoch * self.steps_per_epoch + step == self.spoilt:
                    pixels[0] = torch.nan
                yield pixels, self.labels[chosen]

    def __iter__(self):
        return self.epoch(0)


def network(seed=0, *, norm=True, dropout=0.3):
    """A small network; it draws in each step if it has dropout."""
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
    """Has a state of its own, and sends this process Ctrl-C once before a step ends."""

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


def same(one, other):
    """Whether two networks are equal bit for bit, buffers too."""
    ones, others = one.state_dict(), other.state_dict()
    return ones.keys() == others.keys() and all(torch.equal(ones[k], others[k]) for k in ones)


def summary(trained):
    """All of a `Trained` but the time."""
    return dataclasses.replace(trained, seconds=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted():
    """A network trained in one go, and what `train` said of it."""
    model = network()
    return model, run(model, objective=Watched())


# ------------------------------------------------------------------------------- learning


def test_the_loss_falls_on_64_images():
    model = network(dropout=0.0)
    one = run(network(dropout=0.0), epochs=1)
    trained = run(model, epochs=15, recipe=dataclasses.replace(RECIPE, label_smoothing=0.0))
    assert one.loss > 0.8
    assert trained.loss < 0.1
    assert trained.top1 > 99
    assert evaluate(model, Synthetic(), runtime=RUNTIME).top1 == 100.0


def test_what_was_done_is_counted(uninterrupted):
    _, trained = uninterrupted
    assert (trained.epochs, trained.steps, trained.images) == (3, 12, 192)
    assert 0 < trained.seconds < 60


def test_the_loss_and_accuracy_of_the_last_epoch_are_means_over_its_images():
    """At this learning rate the network stands still, so they can be computed afterwards."""
    model = network(norm=False, dropout=0.0)
    still = dataclasses.replace(RECIPE, learning_rate=1e-30)
    trained = run(model, recipe=still)
    data = Synthetic()
    logits = model(data.pixels)
    chosen = logits.log_softmax(1)
    loss = -(0.9 * chosen[torch.arange(64), data.labels] + 0.1 * chosen.mean(1)).mean()
    assert trained.loss == pytest.approx(loss.item(), rel=1e-5)
    assert trained.top1 == 100 * (logits.argmax(1) == data.labels).double().mean().item()


def test_equal_seeds_give_equal_weights_and_other_seeds_others():
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, seed=seed, epochs=1)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_training_leaves_the_generators_of_its_caller_alone_and_does_not_depend_on_them():
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
        (2.5, 0.4),  # half way up to 0.2 * 1024 / 256
        (5, 0.8),
        (28.75, 0.8 * (1 + 2**-0.5) / 2),  # a quarter of the cosine
        (52.5, 0.4),
        (100, 0.0),
    ],
)
def test_learning_rates_are_those_of_the_papers_recipe(epoch, rate):
    found = learning_rate(PAPER, step=int(epoch * 1252), steps_per_epoch=1252, epochs=100)
    assert found == pytest.approx(rate, abs=1e-12)


def test_a_search_squeezes_the_cosine_into_its_own_epochs():
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
        run(model, recipe=dataclasses.replace(RECIPE, batch_size=stated), epochs=1)
    assert same(*models)


def test_steps_are_those_of_sgd_with_nesterov_momentum_decay_and_smoothing_by_hand():
    """A linear network in numpy and double precision; rates 0, 0.05 and 0.1 of the warm-up."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    recipe = dataclasses.replace(RECIPE, warmup_epochs=2, weight_decay=0.01)
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


def test_what_comes_after_a_step_sees_the_weights_that_the_step_has_left():
    """So the chains of DMCP learn from the weights just updated (its specification, 1.7.3)."""

    class Seeing(Objective):
        def after_step(self, step, micro_batches):  # noqa: ARG002
            self.seen = loop.model[0].weight.detach().clone()

    objective = Seeing(label_smoothing=0.0)
    loop = Loop(
        network(), recipe=RECIPE, steps_per_epoch=STEPS, epochs=EPOCHS, seed=0, runtime=RUNTIME,
        objective=objective,
    )  # fmt: skip
    before = loop.model[0].weight.detach().clone()
    loop.step(*next(Synthetic().epoch(0)), STEPS)  # at the peak of the learning rate
    assert not torch.equal(objective.seen, before)
    assert torch.equal(objective.seen, loop.model[0].weight)


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulating_over_parts_of_a_batch_is_one_batch(parts):
    """Without BatchNorm, which sees its micro-batch only; 3 do not divide 16 evenly."""
    models = [network(norm=False, dropout=0.0) for _ in range(2)]
    objective = Watched()
    whole = run(models[0])
    split = run(
        models[1],
        recipe=dataclasses.replace(RECIPE, accumulation=parts),
        objective=objective,
    )
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert split.top1 == whole.top1
    assert objective.updates == 12  # once in a step, however many the parts


def test_channels_last_changes_no_more_than_rounding():
    models = [network(dropout=0.0) for _ in range(2)]
    run(models[0])
    run(models[1], runtime=dataclasses.replace(RUNTIME, memory_format="channels_last"))
    assert models[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_gradient_that_lies_otherwise_in_memory_updates_the_same_weights():
    """torch's fused SGD looks at no strides: left to itself it would mix the weights up."""

    class Relaid(Objective):
        def before_step(self):
            weight = model[0].weight
            weight.grad = weight.grad.contiguous()
            assert weight.grad.stride() != weight.stride()

    last = dataclasses.replace(RUNTIME, memory_format="channels_last")
    plain, model = network(), network()
    run(plain, runtime=last)
    run(model, runtime=last, objective=Relaid(label_smoothing=0.1))
    assert same(plain, model)


def test_weights_with_gaps_in_memory_are_updated_right():
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
    half = dataclasses.replace(RUNTIME, precision="bfloat16")
    trained = run(model, epochs=10, runtime=half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert trained.top1 > 90
    exact = network(dropout=0.0)
    run(exact, epochs=10)
    assert not same(model, exact)


# -------------------------------------------------------------------- stop, go on, resume


@pytest.mark.parametrize("step", [1, 4, 6, 12])
def test_stopping_after_any_step_and_going_on_changes_no_bit(tmp_path, uninterrupted, step):
    expected, trained = uninterrupted
    with pytest.raises(Interrupted, match=f"after step {step} of 12; the state is saved in .*"):
        run(network(), objective=Watched(interrupt=step), folder=tmp_path)
    model, objective = network(seed=9), Watched()
    again = run(model, objective=objective, folder=tmp_path)
    assert same(model, expected)
    assert summary(again) == summary(trained)
    assert objective.updates == 12


def test_stopping_and_going_on_with_weights_in_channels_last_changes_no_bit(tmp_path):
    last = dataclasses.replace(RUNTIME, memory_format="channels_last")
    expected, model = network(), network()
    run(expected, runtime=last, objective=Watched())
    with pytest.raises(Interrupted):
        run(network(), runtime=last, objective=Watched(interrupt=6), folder=tmp_path)
    run(model, runtime=last, objective=Watched(), folder=tmp_path)
    assert same(model, expected)


def test_ctrl_c_is_what_it_was_before_and_after_training(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        run(network(), objective=Watched(interrupt=2), folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(network(), objective=Watched(interrupt=2, presses=2), folder=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_does_not_wait_where_nothing_is_saved():
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
    """Train, in a process of its own; say when step 6 begins, and wait for a line there."""

    class Talking(Watched):
        def before_step(self):
            super().before_step()
            if self.updates == 6:
                print("step 6", flush=True)  # noqa: T201 (the other process waits for it)
                sys.stdin.readline()

    torch.set_num_threads(1)
    try:
        run(network(), objective=Talking(), folder=Path(folder))
    except Interrupted as error:
        sys.exit(str(error))


def test_a_process_that_gets_ctrl_c_leaves_a_run_that_ends_with_the_same_weights(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_training as t; "
    process = subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", script + "t.child(sys.argv[2])", str(TESTS), str(tmp_path)],
        cwd=TESTS.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "step 6\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate("go on\n", timeout=30)[1]
    assert said.startswith("interrupted after step 6 of 12; the state is saved in")
    assert process.returncode == 1

    class Talking(Watched):
        """The objective's name is part of what a checkpoint belongs to."""

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
    ("change", "said"),
    [
        ({"epochs": 4}, "epochs is 3 there and 4 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        (
            {"recipe": dataclasses.replace(RECIPE, momentum=0.8)},
            r"recipe\.momentum is 0\.9 there and 0\.8 here",
        ),
        (
            {"objective": Objective(label_smoothing=0.1)},
            'objective is "Watched" there and "Objective" here',
        ),
    ],
)
def test_checkpoints_of_another_training_are_refused(tmp_path, change, said):
    with pytest.raises(Interrupted):
        run(network(), objective=Watched(interrupt=2), folder=tmp_path)
    with pytest.raises(InputError, match=rf"folder is .*, but its checkpoints are .*\({said}"):
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
    """A folder of this test's own with the checkpoints of steps 8 and 12."""
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


def test_a_damaged_checkpoint_does_not_push_out_the_whole_ones(resumable):
    folder = resumable / "checkpoints"
    shorten(folder / "step-00000012" / "tensors.safetensors")
    for step in (9, 10):
        checkpoints.save(folder, step=step, state={}, tensors={})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000010"]


@settings(deadline=None, max_examples=25)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**40))
def test_numbers_and_tensors_come_back_as_they_went(tmp_path_factory, number, count):
    folder = tmp_path_factory.mktemp("checkpoints")
    shared = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors = {"a": shared, "b": shared, "none": torch.zeros(0), "count": torch.tensor(count)}
    checkpoints.save(folder, step=7, state={"number": number}, tensors=tensors)
    found = checkpoints.newest(folder)
    assert found.step == 7
    assert str(found.state["number"]) == str(number)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


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


def test_a_process_killed_while_it_wrote_a_checkpoint_leaves_the_one_before(
    resumable, uninterrupted
):
    """What such a process leaves: part of a folder under another name."""
    folder = resumable / "checkpoints"
    (folder / "step-00000012").rename(folder / ".step-00000012.part")
    shorten(folder / ".step-00000012.part" / "tensors.safetensors")
    model = network()
    run(model, objective=Watched(), folder=resumable)
    assert same(model, uninterrupted[0])
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]


# ----------------------------------------------------------------------------- divergence


def test_a_loss_that_is_not_a_number_stops_with_step_rate_and_the_last_good_checkpoint(tmp_path):
    """Step 6, the third of epoch 1: half way down the cosine of 3 epochs, 1 of them warm-up."""
    rate = 0.1 * (1 + math.cos(math.pi / 4)) / 2
    message = (
        rf"^the loss is nan at step 6 \(epoch 1\) with a learning rate of {rate:.6g}; the last "
        r"good checkpoint, of step 4, is kept in .*/checkpoints; lower recipe\.learning_rate$"
    )
    with pytest.raises(Diverged, match=message):
        run(network(), Synthetic(spoilt=6), folder=tmp_path)
    kept = checkpoints.newest(tmp_path / "checkpoints")
    assert kept.step == 4
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


def test_a_loss_that_is_not_a_number_stops_a_training_without_checkpoints_too():
    with pytest.raises(Diverged, match=r"the loss is nan at step 1 .*; no checkpoint was written"):
        run(network(), Synthetic(spoilt=1))


def test_weights_that_the_last_step_of_an_epoch_spoilt_are_not_saved(tmp_path):
    """The loss of that step is fine: it was computed before the update."""

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


def test_a_terminal_shows_a_bar_with_loss_accuracy_speed_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    run(network(), label="resnet18", runtime=dataclasses.replace(RUNTIME, progress=True))
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    shown = drawn[drawn.rindex("resnet18") :]
    for part in ("epoch 3 of 3, loss ", ", top-1 ", " images/s, 0:00:00 left"):
        assert part in shown


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_one_line_with_those_that_are(device):
    with pytest.raises(InputError, match=rf"runtime\.device is {device}, but .*use one of auto, c"):
        resolve_device(dataclasses.replace(RUNTIME, device=device))


def test_channels_last_is_automatic_on_cuda_only():
    auto = dataclasses.replace(RUNTIME, memory_format="auto")
    assert memory_format(auto, torch.device("cuda")) == torch.channels_last
    assert memory_format(auto, torch.device("cpu")) == torch.contiguous_format
    assert memory_format(RUNTIME, torch.device("cuda")) == torch.contiguous_format


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": Synthetic(65)}, "recipe.batch_size is 65, but there are 64 training images"),
        (
            {"recipe": dataclasses.replace(RECIPE, batch_size=32, accumulation=17)},
            "recipe.accumulation is 17, but of the 16 images .* takes at least two, for BatchNorm",
        ),
        (
            {"recipe": dataclasses.replace(RECIPE, accumulation=9)},
            "recipe.accumulation is 9, but of the 16 images .* takes at least two, for BatchNorm",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_the_first_step(change, message):
    with pytest.raises(InputError, match=message):
        run(network(), **change)
