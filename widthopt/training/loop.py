"""The training loop: the paper's recipe, checkpoints, and the objective of a step.

A *step* is one update of the parameters. Steps are numbered from 0 over the complete training.
Every random draw depends only on the seed and the number of the step. A training that is
interrupted and resumed at any step therefore ends, on the same machine's CPU, with exactly the
same weights as an uninterrupted one.
"""

import dataclasses
import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from widthopt.errors import InputError
from widthopt.identity import canonical, differences
from widthopt.seeds import derive_seed
from widthopt.setting import Recipe, Runtime
from widthopt.training import checkpoints, distributed
from widthopt.training.devices import autocast, memory_format, resolve_device, to_device
from widthopt.training.evaluation import count_correct


__all__ = [
    "Batches",
    "Diverged",
    "Interrupted",
    "Log",
    "Loop",
    "Objective",
    "Trained",
    "learning_rate",
    "memory_format",
    "resolve_device",
    "train",
]

logger = logging.getLogger("widthopt")

# Steps between two reads of metrics from an accelerator, which wait for it. A CPU is read always.
_STEPS_UNREAD = 50
_REFRESH_SECONDS = 0.25


class Interrupted(Exception):  # noqa: N818 (names the event)
    """Ctrl-C was pressed: the state is saved, and the same command resumes from there."""


class Diverged(Exception):  # noqa: N818 (names the event)
    """The loss or a parameter is no longer finite; the last good checkpoint is kept."""


class Batches(Protocol):
    """Training images in batches; the batches of an epoch are the same in every call."""

    @property
    def images(self) -> int:
        """Number of training images."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of images in a step."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    def epoch(
        self, epoch: int, *, first_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch (from 0), starting at its step ``first_step``.

        A batch is float32 images, ``batch channels height width``, and their int64 labels. Of each
        batch, only the part of process ``rank`` of ``ranks`` is returned.
        """
        ...


class Log(Protocol):
    """Receives the metrics of a training; see `widthopt.tracking.Tracker`."""

    @property
    def every(self) -> int:
        """Steps between two rows; every epoch also ends with a row."""
        ...

    def resume(self, step: int) -> None:
        """Continue after this many steps (0 for a new training); later rows are discarded."""
        ...

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics after this many steps."""
        ...

    def keep(self) -> None:
        """Make all rows durable: a checkpoint with their steps is about to be written."""
        ...


class Objective:
    """The objective of a step: cross-entropy with label smoothing, unless subclassed.

    Width searches subclass it, so that there is only one training loop.
    """

    def __init__(self, *, label_smoothing: float) -> None:
        """Args: label_smoothing: In [0, 1)."""
        self.label_smoothing = label_smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy with label smoothing over the images, in float32."""
        return functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain data that must be equal in a checkpoint and in the resumed training."""
        return {"objective": type(self).__name__}

    def begin_step(self, step: int, *, images: int) -> None:
        """Hook that runs before the gradients of a step are computed.

        Args:
            step: Number of the step in the complete training.
            images: Number of images in the step, over all processes.
        """

    def backward(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of ``share`` times the loss of a micro-batch to the parameters.

        Runs under the loop's autocast.

        Args:
            model: The network, in training mode.
            images: Float32, ``batch channels height width``.
            labels: Class of each image, int64.
            share: Part of the step's images, over all processes, that are in this micro-batch; in
                (0, 1].

        Returns:
            The mean loss (0-d) and the logits, ``batch classes``, both detached.
        """
        logits = model(images)
        loss = self.loss(logits, labels)
        self.backpropagate(loss, share=share)
        return loss.detach(), logits.detach()

    def backpropagate(self, loss: Tensor, *, share: float) -> None:
        """Run the backward pass of ``share * loss``, outside autocast as torch recommends."""
        with torch.autocast(loss.device.type, enabled=False):
            (loss * share).backward()

    def before_step(self) -> None:
        """Hook that runs before the update, with the gradients of all images of all processes."""

    def after_step(self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hook that runs after the update of the parameters, under the loop's autocast.

        Args:
            step: Number of the step in the complete training.
            micro_batches: The images and labels of the step in this process, as passed to
                `backward`.
        """

    def after_epoch(self, epoch: int) -> None:
        """Hook that runs at the end of an epoch (from 0), before its checkpoint is written."""

    def step_metrics(self) -> dict[str, float]:
        """Return the current metrics to log with the loss; only rank 0 calls this."""
        return {}

    def epoch_metrics(self) -> dict[str, float]:
        """Return the metrics to log at the end of an epoch, after `after_epoch`."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must keep of this objective."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`, which are on the CPU."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Results of a complete training.

    Attributes:
        epochs: Number of epochs.
        images: Images processed in all epochs; an image counts once per epoch.
        steps: Number of updates of the parameters.
        seconds: Training time, without writing checkpoints, summed over all interruptions.
        loss: Mean training loss of the last epoch.
        top1: Training accuracy over the last epoch, in per cent, measured before each update.
    """

    epochs: int
    images: int
    steps: int
    seconds: float
    loss: float
    top1: float


def learning_rate(recipe: Recipe, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step.

    The rate is linear from 0 to the peak during the warm-up, then half a cosine to 0. Step 0 has a
    rate of 0 (it only fills the momentum), and the rate would be 0 again one step after the last.
    If a training is no longer than the warm-up, half of its epochs are warm-up.

    Args:
        recipe: The recipe, with the batch size in use.
        step: In [0, epochs * steps_per_epoch].
        steps_per_epoch: Number of steps in an epoch.
        epochs: Number of epochs of this training, which the schedule spans.

    Source: paper appendix A; Loshchilov and Hutter, 2017, "SGDR", equation 5; Goyal et al.,
    2017, "Accurate, Large Minibatch SGD", section 2.2.
    """
    warmup = recipe.warmup_epochs if recipe.warmup_epochs < epochs else epochs / 2
    done = step / steps_per_epoch
    if done < warmup:
        return recipe.peak_learning_rate * done / warmup
    return (
        recipe.peak_learning_rate
        * (1 + math.cos(math.pi * (done - warmup) / (epochs - warmup)))
        / 2
    )


@dataclass(slots=True)
class _TrainState:
    """Progress of a training, which a checkpoint stores beside the tensors.

    The numbers of the epoch are sums over its images, in the order of the steps.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    epoch_images: int = 0
    epoch_loss: float = 0.0
    epoch_right: int = 0
    epoch_right5: int = 0  # in the top 5

    def begin_epoch(self) -> None:
        """Reset the sums of the epoch."""
        self.epoch_images, self.epoch_loss = 0, 0.0
        self.epoch_right, self.epoch_right5 = 0, 0

    @property
    def loss(self) -> float:
        """Mean loss of the current epoch."""
        return self.epoch_loss / max(1, self.epoch_images)

    @property
    def top1(self) -> float:
        """Top-1 accuracy in the current epoch, in per cent."""
        return 100 * self.epoch_right / max(1, self.epoch_images)

    @property
    def top5(self) -> float:
        """Top-5 accuracy in the current epoch, in per cent."""
        return 100 * self.epoch_right5 / max(1, self.epoch_images)


class Loop:
    """The training step, and the state between two steps.

    Attributes:
        model: The network, on the device, in training mode.
        tally: Progress of the training; complete after `read`.
        objective: The objective of a step.
        device: The device it computes on.
        read_every: Steps between two reads of metrics from the device.
        row_every: Steps between two rows of a log; 0 without a log.
        seen: Metrics of the last step that was read.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        recipe: Recipe,
        steps_per_epoch: int,
        epochs: int,
        seed: int,
        runtime: Runtime,
        objective: Objective | None = None,
    ) -> None:
        """Prepare the first step.

        Args:
            model: Moved to the device and put in training mode.
            recipe: The recipe, with the batch size in use.
            steps_per_epoch: Number of steps in an epoch.
            epochs: Number of epochs of the complete training.
            seed: The run's seed.
            runtime: Where and how to compute.
            objective: The objective of a step; the recipe's cross-entropy if None.
        """
        self.device, self._layout = to_device(model, runtime)
        self.model = model.train()
        self.tally = _TrainState()
        self._recipe = recipe
        self._schedule = {"steps_per_epoch": steps_per_epoch, "epochs": epochs}
        self._seed = seed
        self._runtime = runtime
        self.objective = objective or Objective(label_smoothing=recipe.label_smoothing)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(
            self._parameters,
            lr=0.0,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
            # The fused update is the fastest, on the CPU too, but it ignores strides.
            fused=self.device.type in ("cpu", "cuda") and all(map(_is_dense, self._parameters)),
        )
        self._unread: list[tuple[int, int, Tensor, Tensor]] = []  # step, images, loss, correct
        self.read_every = 1 if self.device.type == "cpu" else _STEPS_UNREAD
        self.row_every = 0
        self.seen: dict[str, float] = {}
        self._gradient_norm: Tensor | None = None

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(self._recipe, step=step, **self._schedule)

    def row_due(self, steps: int) -> bool:
        """Whether a row is written after this many steps."""
        return self.row_every > 0 and (
            steps % self.row_every == 0 or steps % self._schedule["steps_per_epoch"] == 0
        )

    def step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Update the parameters once.

        With several processes, each gets its part of the batch; the gradients are summed once,
        after the last micro-batch. torch's global rngs are seeded by the seed and the step; the
        caller saves their state if it needs it.

        Args:
            images: Float32, ``batch channels height width``.
            labels: Class of each image, int64.
            step: Number of the step in the complete training, from 0.

        Raises:
            Diverged: The loss of this step, or of an earlier one not read before, is not finite.
        """
        self._seed_rngs(step)
        self._optimizer.zero_grad(set_to_none=True)
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=self._layout)
        labels = labels.to(self.device, non_blocking=True)
        parts = self._recipe.accumulation
        micro_batches = list(
            zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        )
        together = distributed.world_size() > 1
        count = self._recipe.batch_size if together else len(labels)
        self.objective.begin_step(step, images=count)
        loss, correct = self._compute_gradients(micro_batches, images=count)
        distributed.all_reduce_sum([p.grad for p in self._parameters if p.grad is not None])
        self.objective.before_step()
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        if self.row_due(step + 1):
            self._gradient_norm = nn.utils.get_total_norm(
                [p.grad for p in self._parameters if p.grad is not None]
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # frees memory for the hooks after the step
        with autocast(self._runtime, self.device):
            self.objective.after_step(step, micro_batches)
        self.tally.step = step + 1
        self._unread.append((step, count, loss, correct))
        if self.tally.step % self.read_every == 0:  # by number: the same after a resumption
            self.read()

    def read(self) -> None:
        """Read the metrics of the last steps from the device into the tally.

        Raises:
            Diverged: The loss of a step is not finite.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        sums = torch.stack([torch.cat([loss[None], hits.float()]) for *_, loss, hits in unread])
        distributed.all_reduce_sum([sums])
        for (step, images, *_), (loss, top1, top5) in zip(unread, sums.tolist(), strict=True):
            if not math.isfinite(loss):
                raise self._divergence(f"the loss is {loss}", step)
            self.tally.images += images
            self.tally.epoch_images += images
            self.tally.epoch_loss += loss * images
            self.tally.epoch_right += int(top1)
            self.tally.epoch_right5 += int(top5)
            self.seen = {"loss": loss, "learning_rate": self.learning_rate(step)}
        if self._gradient_norm is not None:
            self.seen["gradient_norm"] = float(self._gradient_norm)
            self._gradient_norm = None

    def check(self) -> None:
        """Check that all tensors of a checkpoint are finite.

        Raises:
            Diverged: A loss, a parameter or its momentum is not finite. An update can spoil a
                parameter before any loss shows it.
        """
        self.read()
        for name, tensor in self._updated_tensors().items():
            if not tensor.isfinite().all():
                raise self._divergence(f"{name} is not finite", self.tally.step - 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that later steps depend on."""
        kept = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        kept |= {
            name: t for name, t in self._updated_tensors().items() if name.startswith("momentum.")
        }
        return kept | {f"objective.{name}": t for name, t in self.objective.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`."""
        self.model.load_state_dict(_strip_prefix("model.", tensors))
        momenta = _strip_prefix("momentum.", tensors)
        for name, parameter in self.model.named_parameters():
            if name in momenta:
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(momenta[name])
                self._optimizer.state[parameter]["momentum_buffer"] = buffer
        self.objective.load_state_dict(_strip_prefix("objective.", tensors))

    def _seed_rngs(self, step: int) -> None:
        """Seed torch's global rngs (for dropout, for example) by the seed, the step and the rank.

        Ranks draw different numbers because they have different images.
        """
        rank = distributed.rank()
        seed = derive_seed(self._seed, "model", step, *([rank] if rank else []))
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _compute_gradients(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], *, images: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a step.

        Returns:
            The mean loss, and the counts of top-1 and top-5 correct images, on the device.
        """
        total = torch.zeros((), device=self.device)
        correct = torch.zeros(2, dtype=torch.int64, device=self.device)
        for pixels, classes in micro_batches:
            share = len(classes) / images
            with autocast(self._runtime, self.device):
                loss, logits = self.objective.backward(self.model, pixels, classes, share=share)
            total += share * loss
            correct += count_correct(logits, classes)
        return total, correct

    def _updated_tensors(self) -> dict[str, Tensor]:
        """Return the parameters, and their momentum where it exists, by name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[name] = parameter.detach()
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        return tensors

    def _divergence(self, problem: str, step: int) -> Diverged:
        """Return the error for a step, with its epoch and learning rate."""
        epoch = step // self._schedule["steps_per_epoch"]
        return Diverged(
            f"{problem} at step {step:,} (epoch {epoch}) with a learning rate of "
            f"{self.learning_rate(step):.6g}"
        )


def train(
    model: nn.Module,
    batches: Batches,
    *,
    recipe: Recipe,
    epochs: int,
    seed: int,
    runtime: Runtime,
    objective: Objective | None = None,
    folder: Path | None = None,
    label: str = "",
    log: Log | None = None,
) -> Trained:
    """Train ``model`` in place, or resume from the newest checkpoint in ``folder``.

    With a folder, a checkpoint is written after each epoch and on Ctrl-C. A complete training is
    not run again: ``model`` gets its weights. The peak learning rate follows from the batch size
    of ``batches``. The state of torch's global rngs is preserved.

    Args:
        model: Moved to the device and left in training mode.
        batches: The training images.
        recipe: How to train.
        epochs: Number of epochs of the complete training, at least 1.
        seed: The run's seed.
        runtime: Where and how to compute; may change when a training is resumed.
        objective: The objective of a step; the recipe's cross-entropy if None.
        folder: Folder of ``checkpoints/``; nothing is written if None.
        label: Name of this training in the progress bar and the log.
        log: Receives the metrics; only rank 0 writes.

    Returns:
        The results, over all resumptions.

    Raises:
        InputError: The arguments are invalid, the checkpoints are of another training, or the
            folder cannot be written.
        Interrupted: Ctrl-C was pressed; the state is saved. Without a folder, or when pressed
            again, Ctrl-C raises ``KeyboardInterrupt`` as usual.
        Diverged: The loss or a parameter is not finite.

    Source: paper appendix A.
    """
    _check_arguments(recipe, batches, model)
    recipe = dataclasses.replace(recipe, batch_size=batches.batch_size)
    loop = Loop(
        model,
        recipe=recipe,
        steps_per_epoch=batches.steps_per_epoch,
        epochs=epochs,
        seed=seed,
        runtime=runtime,
        objective=objective,
    )
    manager = _CheckpointManager(loop, folder, _identity(loop, recipe, batches, epochs, seed))
    manager.resume()
    tally = loop.tally
    rows = _MetricWriter(loop, batches, log if distributed.rank() == 0 else None)
    with ExitStack() as stack:
        stack.enter_context(_preserve_rngs(loop.device))
        interrupt = stack.enter_context(_InterruptHandler(loop, active=folder is not None))
        display = stack.enter_context(
            _ProgressDisplay(
                tally,
                batches,
                epochs=epochs,
                label=label,
                bar=runtime.progress and distributed.rank() == 0,
            )
        )
        try:
            while tally.step < epochs * batches.steps_per_epoch:
                _run_epoch(loop, batches, interrupt, display, rows)
                loop.check()
                rows.keep()
                manager.write()
                if interrupt.is_requested():
                    raise Interrupted(
                        f"interrupted after step {tally.step:,} of "
                        f"{epochs * batches.steps_per_epoch:,}; the state is saved in {folder}, "
                        "and the same command resumes from there"
                    )
        except Diverged as error:
            raise Diverged(f"{error}; {manager}; lower recipe.learning_rate") from None
    distributed.share_buffers(model)
    return Trained(
        epochs=epochs,
        images=tally.images,
        steps=tally.step,
        seconds=tally.seconds,
        loss=tally.loss,
        top1=tally.top1,
    )


def _check_arguments(recipe: Recipe, batches: Batches, model: nn.Module) -> None:
    """Check the batch size and the accumulation before the first step.

    Raises:
        InputError: There are too few images for a step or a micro-batch.
    """
    if batches.steps_per_epoch < 1:
        raise InputError(
            f"recipe.batch_size is {batches.batch_size:,}, but there are {batches.images:,} "
            "training images; lower it"
        )
    share = batches.batch_size // distributed.world_size()
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    if share // recipe.accumulation < (2 if normed else 1):
        key, value, remedy = (
            ("accumulation", recipe.accumulation, "lower it")
            if recipe.accumulation > 1
            else ("batch_size", batches.batch_size, "raise it, or use fewer processes")
        )
        raise InputError(
            f"recipe.{key} is {value:,}, but of the {share:,} images of a step that a process gets "
            f"each micro-batch takes at least {'two, for BatchNorm' if normed else 'one'}; {remedy}"
        )


def _run_epoch(
    loop: Loop,
    batches: Batches,
    interrupt: "_InterruptHandler",
    display: "_ProgressDisplay",
    rows: "_MetricWriter",
) -> None:
    """Run the rest of the current epoch, or less after an interrupt."""
    tally = loop.tally
    epoch, first = divmod(tally.step, batches.steps_per_epoch)
    last = (epoch + 1) * batches.steps_per_epoch
    if first == 0:
        tally.begin_epoch()
    before, started = tally.seconds, time.perf_counter()
    rank, ranks = distributed.rank(), distributed.world_size()
    parts = batches.epoch(epoch, first_step=first, rank=rank, ranks=ranks)
    for images, labels in _until_interrupt(parts, interrupt):
        loop.step(images, labels, tally.step)
        interrupt.agree()
        tally.seconds = before + time.perf_counter() - started
        display.step()
        rows.step()
        if interrupt.is_requested():
            break
    loop.read()
    if tally.step != last and not interrupt.is_requested():
        raise RuntimeError(f"epoch {epoch} ended at step {tally.step:,}, not at {last:,}")
    if tally.step == last:
        loop.objective.after_epoch(epoch)
        tally.seconds = before + time.perf_counter() - started
        display.epoch(epoch)
        rows.epoch()


def _until_interrupt(
    epoch: Iterator[tuple[Tensor, Tensor]], interrupt: "_InterruptHandler"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of ``epoch`` until it ends or an interrupt is requested.

    A terminal sends Ctrl-C to the processes that load images too. The error that their end then
    raises here is ignored.
    """
    while not interrupt.is_requested():
        try:
            batch = next(epoch)
        except StopIteration:
            return
        except RuntimeError:
            if interrupt.is_requested():
                return
            raise
        if not interrupt.is_requested():
            yield batch


class _CheckpointManager:
    """Reads and writes the checkpoints of a training."""

    def __init__(self, loop: Loop, folder: Path | None, identity: dict[str, Any]) -> None:
        self._loop = loop
        self._folder = None if folder is None else folder / "checkpoints"
        self._identity = identity
        self._step: int | None = None

    def __str__(self) -> str:
        """Return a description of the last checkpoint, for messages."""
        if self._step is None:
            return "no checkpoint was written before"
        return f"the last good checkpoint, of step {self._step:,}, is kept in {self._folder}"

    def resume(self) -> None:
        """Load the newest intact checkpoint, if there is one, into the loop.

        Raises:
            InputError: The checkpoint is of another training.
        """
        checkpoint = None if self._folder is None else checkpoints.newest(self._folder)
        step = None if checkpoint is None else checkpoint.step
        if distributed.broadcast(step, device=self._loop.device) != step:
            raise RuntimeError(f"{self._folder} is not the same folder for all processes")
        if checkpoint is None:
            return
        changes = differences(checkpoint.state["identity"], self._identity)
        if changes:
            raise InputError(
                f"folder is {self._folder}, but its checkpoints are of another training "
                f"({changes}); use another folder or remove this one"
            )
        self._loop.load_state_dict(checkpoint.tensors)
        for name, value in checkpoint.state["tally"].items():
            setattr(self._loop.tally, name, value)
        self._step = checkpoint.step
        logger.info("resumed at step %d from %s", checkpoint.step, self._folder)

    def write(self) -> None:
        """Write a checkpoint of the loop, which has been checked; only rank 0 writes.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        if self._folder is None:
            return
        tally = self._loop.tally
        state = {"identity": self._identity, "tally": dataclasses.asdict(tally)}
        if distributed.rank() == 0:
            tensors = self._loop.state_dict()
            checkpoints.save(self._folder, step=tally.step, state=state, tensors=tensors)
        distributed.barrier()
        self._step = tally.step


def _identity(
    loop: Loop, recipe: Recipe, batches: Batches, epochs: int, seed: int
) -> dict[str, Any]:
    """Return the data that must be equal in a checkpoint and in the resumed training."""
    shapes = {name: list(tensor.shape) for name, tensor in loop.model.named_parameters()}
    return {
        "recipe": dataclasses.asdict(recipe),
        "epochs": epochs,
        "seed": seed,
        "steps_per_epoch": batches.steps_per_epoch,
        **loop.objective.identity,
        "parameters": hashlib.sha256(canonical(shapes).encode()).hexdigest()[:12],
    }


class _InterruptHandler:
    """Lets the first Ctrl-C stop the training after the step; a second one acts as usual.

    Only active in the main thread, and if Ctrl-C is not ignored. Processes that train together
    stop after the same step, whichever of them got the signal.
    """

    def __init__(self, loop: Loop, *, active: bool) -> None:
        self._loop = loop
        self._requested = False
        self._agreed = False
        self._before = signal.getsignal(signal.SIGINT)
        self._active = (
            active
            and threading.current_thread() is threading.main_thread()
            and self._before not in (None, signal.SIG_IGN)
        )

    def __enter__(self) -> Self:
        if self._active:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def is_requested(self) -> bool:
        """Whether the training is to stop after this step."""
        return self._agreed if distributed.world_size() > 1 else self._requested

    def agree(self) -> None:
        """Learn, every `Loop.read_every` steps, whether any process got Ctrl-C; a collective."""
        if distributed.world_size() > 1 and self._loop.tally.step % self._loop.read_every == 0:
            self._agreed = distributed.all_reduce_any(self._requested, device=self._loop.device)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the first Ctrl-C."""
        self._requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _ProgressDisplay:
    """Shows a progress bar on a terminal; without one, logs a line for each epoch."""

    def __init__(
        self, tally: _TrainState, batches: Batches, *, epochs: int, label: str, bar: bool
    ) -> None:
        self._tally = tally
        self._per_epoch = batches.steps_per_epoch
        self._epochs = epochs
        self._label = label
        self._start = (tally.step, tally.images, tally.seconds)
        self._next_refresh = 0.0
        console = Console(stderr=True)
        self._bar = None
        if bar and console.is_terminal:
            # No refresh thread: it would compete with the training.
            text = "{task.description} {task.fields[text]}"
            self._bar = Progress(
                BarColumn(), TextColumn(text, markup=False), console=console, auto_refresh=False
            )
            self._task = self._bar.add_task(
                label, total=epochs * self._per_epoch, completed=tally.step, text=""
            )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._draw(self._bar)
            self._bar.stop()

    def step(self) -> None:
        """Count a step; redraw the bar if it is due."""
        if self._bar and time.monotonic() >= self._next_refresh:
            self._draw(self._bar)
            self._next_refresh = time.monotonic() + _REFRESH_SECONDS

    def epoch(self, epoch: int) -> None:
        """Log the end of an epoch."""
        level = logging.INFO if self._bar is None else logging.DEBUG
        name = f"{self._label}: " if self._label else ""
        logger.log(level, "%sepoch %d of %d, %s", name, epoch + 1, self._epochs, self._text())

    def _draw(self, bar: Progress) -> None:
        """Redraw the bar."""
        epoch = min(self._tally.step // self._per_epoch + 1, self._epochs)
        text = f"epoch {epoch} of {self._epochs}, {self._text()}"
        bar.update(self._task, completed=self._tally.step, text=text, refresh=True)

    def _text(self) -> str:
        """Return loss, accuracy, speed and the remaining time, at the average speed so far."""
        tally, (step, images, seconds) = self._tally, self._start
        spent, taken = tally.seconds - seconds, max(1, tally.step - step)
        left = round(spent / taken * (self._epochs * self._per_epoch - tally.step))
        return (
            f"loss {tally.loss:.4f}, top-1 {tally.top1:.2f} %, "
            f"{(tally.images - images) / max(spent, 1e-9):.0f} images/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )


class _MetricWriter:
    """Writes the rows of a training to its log, at steps where the device is read."""

    def __init__(self, loop: Loop, batches: Batches, log: Log | None) -> None:
        self._loop, self._log = loop, log
        self._per_epoch = batches.steps_per_epoch
        self._since = (loop.tally.images, loop.tally.seconds)
        if log is not None:
            if loop.device.type == "cuda":  # the peak of this training alone
                torch.cuda.reset_peak_memory_stats(loop.device)
            # Reading an accelerator waits for it, so rows are written only when it is read anyway.
            loop.row_every = math.ceil(log.every / loop.read_every) * loop.read_every
            log.resume(loop.tally.step)

    def step(self) -> None:
        """Write a row if it is due; `epoch` writes the last one of an epoch."""
        taken = self._loop.tally.step
        if self._log is not None and taken % self._per_epoch and self._loop.row_due(taken):
            self._row(self._log, {})

    def epoch(self) -> None:
        """Write the row at the end of an epoch."""
        if self._log is not None:
            tally = self._loop.tally
            more = {"epoch_loss": tally.loss, "top1": tally.top1, "top5": tally.top5}
            self._row(self._log, more | self._loop.objective.epoch_metrics())

    def keep(self) -> None:
        """See `Log.keep`."""
        if self._log is not None:
            self._log.keep()

    def _row(self, log: Log, more: Mapping[str, float]) -> None:
        loop, tally = self._loop, self._loop.tally
        (images, seconds), self._since = self._since, (tally.images, tally.seconds)
        values = {
            "epoch": tally.step / self._per_epoch,
            **loop.seen,
            **loop.objective.step_metrics(),
        }
        if tally.seconds > seconds:
            rate = (tally.images - images) / (tally.seconds - seconds)
            values["perf/images_per_second"] = rate
        if loop.device.type == "cuda":
            values["perf/gpu_memory_gib"] = torch.cuda.max_memory_allocated(loop.device) / 2**30
        log.row(tally.step, {**values, **more})


@contextmanager
def _preserve_rngs(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's global rngs at the end, and make cuDNN deterministic."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with (
        torch.random.fork_rng(devices=devices, device_type=kind),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True),
    ):
        yield


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)  # noqa: PLR2004
    )


def _strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, without the prefix."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
