"""What MorphNet's penalty adds to a training step: tensor operations, and part of its time.

The operations are those dispatched by one `Penalty.add_gradient`: on an accelerator each is a
kernel to launch, whatever the network's depth. The time is a step of our loop with the
penalty over one without, less 1, and the penalty alone over that step.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Figure, alternating, main
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from widthopt.algorithms.penalty import Penalty
from widthopt.networks import TorchvisionNetwork
from widthopt.setting import Recipe, Runtime
from widthopt.tracing import trace
from widthopt.training.loop import Loop, Objective, resolve_device


RUNTIME = Runtime(
    device="auto",
    workers=0,
    precision="float32",
    memory_format="auto",
    backend="auto",
    progress=False,
)
RECIPE = Recipe(
    batch_size=64,
    accumulation=1,
    epochs=100,
    search_epochs=40,
    learning_rate=0.2,
    warmup_epochs=5,
    momentum=0.9,
    weight_decay=5e-5,
    label_smoothing=0.1,
    augmentation="none",
)
CLASSES = 100
RESOLUTION = 64


class Dispatched(TorchDispatchMode):
    """Counts the tensor operations dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch left it out
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Pruning(Objective):
    """The recipe's loss and the penalty, as a search has them."""

    def __init__(self, penalty: Penalty) -> None:
        super().__init__(label_smoothing=RECIPE.label_smoothing)
        self._penalty = penalty

    def before_step(self) -> None:
        """Add the penalty's gradient."""
        self._penalty.add_gradient(1.0)


def build_penalty(name: str) -> tuple[nn.Module, Penalty]:
    """A network on the device, and its penalty."""
    model = TorchvisionNetwork(name).build(depth=1, classes=CLASSES)
    graph = trace(model, RESOLUTION)
    model.to(resolve_device(RUNTIME))
    return model, Penalty(model, graph, threshold=0.01, tie="max", depthwise="double")


def operations(name: str) -> int:
    """Tensor operations of one call, once every scale has a gradient to add to."""
    _, penalty = build_penalty(name)
    penalty.add_gradient(1.0)
    dispatched = Dispatched()
    with dispatched:
        penalty.add_gradient(1.0)
    return dispatched.operations


def stepping(
    model: nn.Module, images: Tensor, labels: Tensor, penalty: Penalty | None
) -> Callable[[], None]:
    """A training step of `Loop`, with the penalty or without."""
    loop = Loop(
        model,
        recipe=RECIPE,
        steps_per_epoch=1000,
        epochs=100,
        seed=0,
        runtime=RUNTIME,
        objective=None if penalty is None else Pruning(penalty),
    )

    def step() -> None:
        loop.step(images, labels, loop.tally.step)

    return step


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield operations for networks of different depth, and the share of a step's time."""
    for name in ("resnet18", "resnet50", "mobilenet_v2"):
        yield Figure(f"penalty_operations/{name}/{RESOLUTION}", operations(name), "", "at most 40")
    name = "resnet18"
    draws = torch.Generator().manual_seed(0)
    device = resolve_device(RUNTIME)
    size = RECIPE.batch_size
    images = torch.randn(size, 3, RESOLUTION, RESOLUTION, generator=draws).to(device)
    labels = torch.randint(CLASSES, (size,), generator=draws).to(device)
    plain, _ = build_penalty(name)
    model, penalty = build_penalty(name)
    with_penalty, without, runs = alternating(
        stepping(model, images, labels, penalty),
        stepping(plain, images, labels, None),
        runs=10 if quick else 20,
        limit_seconds=15 if quick else math.inf,
    )
    yield Figure(
        f"penalty_extra/{name}/{RESOLUTION}",
        with_penalty / without - 1,
        f"{1000 * with_penalty:.1f} ms, without {1000 * without:.1f} ms; {runs} x {size} images",
    )
    penalty_seconds, step, runs = alternating(
        lambda: penalty.add_gradient(1.0),
        stepping(plain, images, labels, None),
        runs=10 if quick else 20,
        limit_seconds=10 if quick else math.inf,
    )
    yield Figure(
        f"penalty_share/{name}/{RESOLUTION}",
        penalty_seconds / step,
        f"{1000 * penalty_seconds:.2f} ms of {1000 * step:.1f} ms; {runs} x {size} images",
        "at most 0.02",
    )


if __name__ == "__main__":
    main(measure)
