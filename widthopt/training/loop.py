"""The only training loop: the paper's recipe, checkpoints, and what one step minimises.

A *step* is one update of the parameters. Steps are numbered from 0 over the whole training,
and every draw a step makes depends on its number alone, so a training that was interrupted
and resumed at any step ends, on one machine's CPU, with the same bits as one that was not.
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
from widthopt.seeds import derived_seed
from widthopt.setting import Recipe, Runtime
from widthopt.training import checkpoints, distributed
from widthopt.training.devices import autocast, memory_format, resolve_device, to_device
from widthopt.training.evaluation import right_at_1_and_5


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

# Steps between two looks at an accelerator: a look waits for it. The CPU is looked at always.
_STEPS_UNREAD = 50
_REFRESH_SECONDS = 0.25


class Interrupted(Exception):  # noqa: N818 (the name is what happened)
    """Ctrl-C: the state is saved, and the same command goes on from there."""


class Diverged(Exception):  # noqa: N818 (the name is what happened)
    """The loss or a parameter is no longer a finite number; the last good checkpoint is kept."""


class Batches(Protocol):
    """Training images in batches, the same for the same epoch whenever asked."""

    @property
    def images(self) -> int:
        """Training images there are."""
        ...

    @property
    def batch_size(self) -> int:
        """Images in one step."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    def epoch(
        self, epoch: int, *, first_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch (from 0), from its step ``first_step`` on.

        Each is float32 images, ``batch channels height width``, and their int64 labels; of
        each batch the part that process ``rank`` of ``ranks`` trains on.
        """
        ...


class Log(Protocol):
    """Where a training writes what it sees as it goes; see `widthopt.tracking.Tracker`."""

    @property
    def every(self) -> int:
        """Steps between two rows; every epoch ends with one."""
        ...

    def resume(self, step: int) -> None:
        """The training goes on after so many steps, from 0: rows behind them are void."""
        ...

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """What was seen when so many steps had been taken."""
        ...

    def keep(self) -> None:
        """See that all rows last: a checkpoint is about to say that their steps are done."""
        ...


class Objective:
    """What one step minimises: the cross-entropy with label smoothing, unless subclassed.

    A width search subclasses it, so that the training loop exists once.
    """

    def __init__(self, *, label_smoothing: float) -> None:
        """Args: label_smoothing: In [0, 1)."""
        self.label_smoothing = label_smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy with label smoothing over the images, in float32."""
        return functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain data: what a checkpoint must agree in with the training that goes on from it."""
        return {"objective": type(self).__name__}

    def begin_step(self, step: int, *, images: int) -> None:
        """Called before the gradients of a step.

        Args:
            step: Its number in the whole training.
            images: Images of the whole step, of all processes that train together.
        """

    def backward(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of ``share`` times the loss of one micro-batch to the parameters'.

        Called under the loop's autocast.

        Args:
            model: The network, in training mode.
            images: Float32, ``batch channels height width``.
            labels: The class of each, int64.
            share: Part of the step's images, those of all processes, that are in this
                micro-batch; in (0, 1].

        Returns:
            The mean loss (no axes) and the logits, ``batch classes``, both detached.
        """
        logits = model(images)
        loss = self.loss(logits, labels)
        self.backpropagate(loss, share=share)
        return loss.detach(), logits.detach()

    def backpropagate(self, loss: Tensor, *, share: float) -> None:
        """Backward of ``share * loss``, outside autocast as it should be."""
        with torch.autocast(loss.device.type, enabled=False):
            (loss * share).backward()

    def before_step(self) -> None:
        """Called once in a step, when the gradients of all images of all processes are there."""

    def after_step(self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Called when a step has updated the parameters, under the loop's autocast.

        Args:
            step: Its number in the whole training.
            micro_batches: The images and labels of the step, as `backward` had them: those of
                this process.
        """

    def after_epoch(self, epoch: int) -> None:
        """Called when an epoch (from 0) has ended, before its checkpoint is written."""

    def step_metrics(self) -> dict[str, float]:
        """What is worth a row beside the loss, as it is now; one process asks, and reads."""
        return {}

    def epoch_metrics(self) -> dict[str, float]:
        """The same at the end of an epoch, after `after_epoch`."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of this objective."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave; these are on the CPU."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A training that has ended.

    Attributes:
        epochs: Epochs, from the first to the last.
        images: Images seen in all of them, one counted each time.
        steps: Updates of the parameters.
        seconds: Time spent on training, without writing checkpoints; of all the processes
            that took part, if it was interrupted and resumed.
        loss: Mean training loss of the last epoch.
        top1: Training accuracy of the last epoch, in per cent, while the network changed.
    """

    epochs: int
    images: int
    steps: int
    seconds: float
    loss: float
    top1: float


def learning_rate(recipe: Recipe, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate when ``step`` steps have been taken, that is, of the step so numbered.

    Linear from 0 to the peak over the warm-up, then half a cosine to 0. So step 0 is taken at
    a rate of 0 (it fills the momentum), and the rate would reach 0 again one step after the
    last. A training no longer than the warm-up spends half of its epochs on it.

    Args:
        recipe: Its batch size is the one in use.
        step: In [0, epochs * steps_per_epoch].
        steps_per_epoch: Steps in one epoch.
        epochs: Epochs of this training; the schedule spans them.

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
    """How far a training is; what a checkpoint keeps beside the tensors.

    The epoch's own numbers are sums over its images, in the order of the steps.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    epoch_images: int = 0
    epoch_loss: float = 0.0
    epoch_right: int = 0
    epoch_right5: int = 0  # among the first five

    def begin_epoch(self) -> None:
        """Forget the epoch before."""
        self.epoch_images, self.epoch_loss = 0, 0.0
        self.epoch_right, self.epoch_right5 = 0, 0

    @property
    def loss(self) -> float:
        """Mean loss of the epoch so far."""
        return self.epoch_loss / max(1, self.epoch_images)

    @property
    def top1(self) -> float:
        """Accuracy of the epoch so far, in per cent."""
        return 100 * self.epoch_right / max(1, self.epoch_images)

    @property
    def top5(self) -> float:
        """The same, among the first five."""
        return 100 * self.epoch_right5 / max(1, self.epoch_images)


class Loop:
    """The training step, and what has to be kept between two of them.

    Attributes:
        model: The network, on the device, in training mode.
        tally: How far it is; complete after `read`.
        objective: What a step minimises.
        device: Where it computes.
        read_every: Steps between two looks at the device.
        row_every: Steps between two rows of a log; 0 without one.
        seen: What the last look saw of its last step.
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
            recipe: Its batch size is the one in use.
            steps_per_epoch: Steps in one epoch.
            epochs: Epochs of the whole training.
            seed: The run's seed.
            runtime: Where to compute, and how.
            objective: What a step minimises; the recipe's cross-entropy if None.
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
            # The fused update is the fastest, on the CPU too, but it walks through memory
            # without a look at strides.
            fused=self.device.type in ("cpu", "cuda") and all(map(_dense, self._parameters)),
        )
        self._unread: list[tuple[int, int, Tensor, Tensor]] = []  # step, images, loss, right
        self.read_every = 1 if self.device.type == "cpu" else _STEPS_UNREAD
        self.row_every = 0
        self.seen: dict[str, float] = {}
        self._gradient_norm: Tensor | None = None

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self._recipe, step=step, **self._schedule)

    def row_due(self, steps: int) -> bool:
        """Whether a row is to be written when so many steps have been taken."""
        return self.row_every > 0 and (
            steps % self.row_every == 0 or steps % self._schedule["steps_per_epoch"] == 0
        )

    def step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Update the parameters once.

        Of several processes each is given its part of a whole batch; their gradients are summed
        once, after the last micro-batch. Draws from torch's own generators are a function of the
        seed and the step; the caller keeps their state if it wants it back.

        Args:
            images: Float32, ``batch channels height width``.
            labels: The class of each, int64.
            step: Its number in the whole training, from 0.

        Raises:
            Diverged: The loss of this step, or of one not looked at before, is not finite.
        """
        self._seed_draws(step)
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
        loss, right = self._gradients(micro_batches, images=count)
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
        self._optimizer.zero_grad(set_to_none=True)  # makes room for what comes after the step
        with autocast(self._runtime, self.device):
            self.objective.after_step(step, micro_batches)
        self.tally.step = step + 1
        self._unread.append((step, count, loss, right))
        if self.tally.step % self.read_every == 0:  # by its number, so that a resumption is alike
            self.read()

    def read(self) -> None:
        """Bring the tally up to date with the device.

        Raises:
            Diverged: The loss of a step is not finite.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        sums = torch.stack([torch.cat([loss[None], right.float()]) for *_, loss, right in unread])
        distributed.all_reduce_sum([sums])
        for (step, images, *_), (loss, right, right5) in zip(unread, sums.tolist(), strict=True):
            if not math.isfinite(loss):
                raise self._divergence(f"the loss is {loss}", step)
            self.tally.images += images
            self.tally.epoch_images += images
            self.tally.epoch_loss += loss * images
            self.tally.epoch_right += int(right)
            self.tally.epoch_right5 += int(right5)
            self.seen = {"loss": loss, "learning_rate": self.learning_rate(step)}
        if self._gradient_norm is not None:
            self.seen["gradient_norm"] = float(self._gradient_norm)
            self._gradient_norm = None

    def check(self) -> None:
        """See that what a checkpoint would keep is finite.

        Raises:
            Diverged: A loss, a parameter or its momentum is not; an update can spoil a
                parameter before any loss shows it.
        """
        self.read()
        for name, tensor in self._moving().items():
            if not tensor.isfinite().all():
                raise self._divergence(f"{name} is not finite", self.tally.step - 1)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the steps to come depend on."""
        kept = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        kept |= {name: t for name, t in self._moving().items() if name.startswith("momentum.")}
        return kept | {f"objective.{name}": t for name, t in self.objective.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.model.load_state_dict(_below("model.", tensors))
        momenta = _below("momentum.", tensors)
        for name, parameter in self.model.named_parameters():
            if name in momenta:
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(momenta[name])
                self._optimizer.state[parameter]["momentum_buffer"] = buffer
        self.objective.load_state_dict(_below("objective.", tensors))

    def _seed_draws(self, step: int) -> None:
        """Make what a step draws (dropout, for example) a function of the seed and the step.

        And of the process, which has other images.
        """
        rank = distributed.rank()
        drawn = derived_seed(self._seed, "model", step, *([rank] if rank else []))
        torch.default_generator.manual_seed(drawn)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(drawn)

    def _gradients(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], *, images: int
    ) -> tuple[Tensor, Tensor]:
        """Fill the gradients; the mean loss, and how many images were right, on the device.

        Those are two numbers: right at the first place, and among the first five.
        """
        total = torch.zeros((), device=self.device)
        right = torch.zeros(2, dtype=torch.int64, device=self.device)
        for pixels, classes in micro_batches:
            share = len(classes) / images
            with autocast(self._runtime, self.device):
                loss, logits = self.objective.backward(self.model, pixels, classes, share=share)
            total += share * loss
            right += right_at_1_and_5(logits, classes)
        return total, right

    def _moving(self) -> dict[str, Tensor]:
        """The parameters, and their momentum where they have one, by name."""
        moving: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            moving[name] = parameter.detach()
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                moving[f"momentum.{name}"] = momentum
        return moving

    def _divergence(self, what: str, step: int) -> Diverged:
        """The error of a step, with what to look at."""
        epoch = step // self._schedule["steps_per_epoch"]
        return Diverged(
            f"{what} at step {step:,} (epoch {epoch}) with a learning rate of "
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
    """Train ``model`` in place, or go on where the checkpoints in ``folder`` end.

    With a folder, a checkpoint is written after each epoch and on Ctrl-C, and a training that
    is complete is not run again: ``model`` gets its weights. The peak learning rate follows
    from the batch size of ``batches``. The caller's random generators are left as they were.

    Args:
        model: Left on the device, in training mode.
        batches: The training images.
        recipe: How to train.
        epochs: Epochs of the whole training, from 1.
        seed: The run's seed.
        runtime: Where to compute, and how; a resumed training may have another.
        objective: What a step minimises; the recipe's cross-entropy if None.
        folder: Where ``checkpoints/`` goes; nothing is written if None.
        label: What the progress bar or the log calls this training.
        log: Where rows are written; only the first of several processes writes any.

    Returns:
        What was done in all, over every resumption.

    Raises:
        InputError: The arguments cannot be met, the checkpoints are of another training, or
            the folder cannot be written.
        Interrupted: Ctrl-C; the state is saved. Without a folder, Ctrl-C is the ordinary
            ``KeyboardInterrupt``; so is a second one.
        Diverged: The loss or a parameter is not finite.

    Source: paper appendix A.
    """
    _possible(recipe, batches, model)
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
    saved = _CheckpointManager(loop, folder, _identity(loop, recipe, batches, epochs, seed))
    saved.resume()
    tally = loop.tally
    rows = _MetricWriter(loop, batches, log if distributed.rank() == 0 else None)
    with ExitStack() as stack:
        stack.enter_context(_generators_kept(loop.device))
        stop = stack.enter_context(_InterruptHandler(loop, active=folder is not None))
        shown = stack.enter_context(
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
                _run_epoch(loop, batches, stop, shown, rows)
                loop.check()
                rows.keep()
                saved.write()
                if stop.asked():
                    raise Interrupted(
                        f"interrupted after step {tally.step:,} of "
                        f"{epochs * batches.steps_per_epoch:,}; the state is saved in {folder}, "
                        "and the same command goes on from there"
                    )
        except Diverged as error:
            raise Diverged(f"{error}; {saved}; lower recipe.learning_rate") from None
    distributed.share_buffers(model)
    return Trained(
        epochs=epochs,
        images=tally.images,
        steps=tally.step,
        seconds=tally.seconds,
        loss=tally.loss,
        top1=tally.top1,
    )


def _possible(recipe: Recipe, batches: Batches, model: nn.Module) -> None:
    """Check what can be checked before the first step.

    Raises:
        InputError: It cannot be done.
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
    stop: "_InterruptHandler",
    shown: "_ProgressDisplay",
    rows: "_MetricWriter",
) -> None:
    """The rest of the epoch that the loop is in, or less if asked to stop."""
    tally = loop.tally
    epoch, first = divmod(tally.step, batches.steps_per_epoch)
    last = (epoch + 1) * batches.steps_per_epoch
    if first == 0:
        tally.begin_epoch()
    before, started = tally.seconds, time.perf_counter()
    rank, ranks = distributed.rank(), distributed.world_size()
    mine = batches.epoch(epoch, first_step=first, rank=rank, ranks=ranks)
    for images, labels in _prefetch(mine, stop):
        loop.step(images, labels, tally.step)
        stop.agree()
        tally.seconds = before + time.perf_counter() - started
        shown.step()
        rows.step()
        if stop.asked():
            break
    loop.read()
    if tally.step != last and not stop.asked():
        raise RuntimeError(f"epoch {epoch} ended at step {tally.step:,}, not at {last:,}")
    if tally.step == last:
        loop.objective.after_epoch(epoch)
        tally.seconds = before + time.perf_counter() - started
        shown.epoch(epoch)
        rows.epoch()


def _prefetch(
    epoch: Iterator[tuple[Tensor, Tensor]], stop: "_InterruptHandler"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``epoch`` until it ends or stopping is asked for.

    A terminal sends Ctrl-C to the processes that load images too; what their end then raises
    here is no fault.
    """
    while not stop.asked():
        try:
            batch = next(epoch)
        except StopIteration:
            return
        except RuntimeError:
            if stop.asked():
                return
            raise
        if not stop.asked():
            yield batch


class _CheckpointManager:
    """The checkpoints of one training."""

    def __init__(self, loop: Loop, folder: Path | None, identity: dict[str, Any]) -> None:
        self._loop = loop
        self._folder = None if folder is None else folder / "checkpoints"
        self._identity = identity
        self._step: int | None = None

    def __str__(self) -> str:
        """What is left to go back to."""
        if self._step is None:
            return "no checkpoint was written before"
        return f"the last good checkpoint, of step {self._step:,}, is kept in {self._folder}"

    def resume(self) -> None:
        """Take the loop to the newest checkpoint that is whole, if there is one.

        Raises:
            InputError: It is of another training.
        """
        found = None if self._folder is None else checkpoints.newest(self._folder)
        step = None if found is None else found.step
        if distributed.broadcast(step, device=self._loop.device) != step:
            raise RuntimeError(f"{self._folder} is not the same folder for all processes")
        if found is None:
            return
        other = differences(found.state["identity"], self._identity)
        if other:
            raise InputError(
                f"folder is {self._folder}, but its checkpoints are of another training ({other}); "
                "use another folder or remove this one"
            )
        self._loop.load_state_dict(found.tensors)
        for name, value in found.state["tally"].items():
            setattr(self._loop.tally, name, value)
        self._step = found.step
        logger.info("resumed at step %d from %s", found.step, self._folder)

    def write(self) -> None:
        """Write a checkpoint of the loop, which has been checked; of several processes, one does.

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
    """What a checkpoint must agree in with the training that goes on from it."""
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
    """Ctrl-C asks once to stop after the step; the second time it is what it always is.

    Only where that is possible: in the main thread, and where Ctrl-C is not ignored. Processes
    that train together stop after the same step, whichever of them was asked.
    """

    def __init__(self, loop: Loop, *, active: bool) -> None:
        self._loop = loop
        self._asked = False
        self._agreed = False
        self._before = signal.getsignal(signal.SIGINT)
        self._active = (
            active
            and threading.current_thread() is threading.main_thread()
            and self._before not in (None, signal.SIG_IGN)
        )

    def __enter__(self) -> Self:
        if self._active:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def asked(self) -> bool:
        """Whether Ctrl-C has been pressed."""
        return self._agreed if distributed.world_size() > 1 else self._asked

    def agree(self) -> None:
        """Hear, now and then, whether some process was asked; every process calls it alike."""
        if distributed.world_size() > 1 and self._loop.tally.step % self._loop.read_every == 0:
            self._agreed = distributed.all_reduce_any(self._asked, device=self._loop.device)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the first Ctrl-C."""
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _ProgressDisplay:
    """A progress bar on a terminal; one line in the log for each epoch, which a bar hides."""

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
            # No refreshing thread: it would take turns with the training.
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
        """Note a step; draw if it is time."""
        if self._bar and time.monotonic() >= self._next_refresh:
            self._draw(self._bar)
            self._next_refresh = time.monotonic() + _REFRESH_SECONDS

    def epoch(self, epoch: int) -> None:
        """Note the end of an epoch."""
        level = logging.INFO if self._bar is None else logging.DEBUG
        name = f"{self._label}: " if self._label else ""
        logger.log(level, "%sepoch %d of %d, %s", name, epoch + 1, self._epochs, self._text())

    def _draw(self, bar: Progress) -> None:
        """Draw the bar as it is."""
        epoch = min(self._tally.step // self._per_epoch + 1, self._epochs)
        text = f"epoch {epoch} of {self._epochs}, {self._text()}"
        bar.update(self._task, completed=self._tally.step, text=text, refresh=True)

    def _text(self) -> str:
        """Loss, accuracy, speed and the time left, at the speed of this process so far."""
        tally, (step, images, seconds) = self._tally, self._start
        spent, taken = tally.seconds - seconds, max(1, tally.step - step)
        left = round(spent / taken * (self._epochs * self._per_epoch - tally.step))
        return (
            f"loss {tally.loss:.4f}, top-1 {tally.top1:.2f} %, "
            f"{(tally.images - images) / max(spent, 1e-9):.0f} images/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )


class _MetricWriter:
    """What a training logs: at steps that follow from their number, where the device is read."""

    def __init__(self, loop: Loop, batches: Batches, log: Log | None) -> None:
        self._loop, self._log = loop, log
        self._per_epoch = batches.steps_per_epoch
        self._since = (loop.tally.images, loop.tally.seconds)
        if log is not None:
            if loop.device.type == "cuda":  # its peak is this training's, not one's before
                torch.cuda.reset_peak_memory_stats(loop.device)
            # A look at an accelerator waits for it: rows come when there is one anyway.
            loop.row_every = math.ceil(log.every / loop.read_every) * loop.read_every
            log.resume(loop.tally.step)

    def step(self) -> None:
        """Write a row if one is due; the last of an epoch is `epoch`'s."""
        taken = self._loop.tally.step
        if self._log is not None and taken % self._per_epoch and self._loop.row_due(taken):
            self._row(self._log, {})

    def epoch(self) -> None:
        """Write the row that an epoch ends with."""
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
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Give the caller's generators of torch back as they were."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with (
        torch.random.fork_rng(devices=devices, device_type=kind),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True),
    ):
        yield


def _dense(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is all its own, without gaps."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)  # noqa: PLR2004
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, which is taken off."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
