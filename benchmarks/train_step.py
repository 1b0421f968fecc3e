"""What a step of our training costs beside a loop written by hand; 1 is the same, less is faster.

By hand: torchvision's own model, torch's cross-entropy and SGD as anyone would call them, the
same batch and recipe, and a look at the loss in each step.
"""

import math
from collections.abc import Callable, Iterator

import torch
from harness import Figure, alternating, main
from torch import Tensor, nn

from widthopt.setting import Recipe, Runtime
from widthopt.training.loop import Loop, resolve_device


# isort: split
import torchvision


RUNTIME = Runtime(
    device="auto",
    workers=0,
    precision="float32",
    memory_format="contiguous",
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


def by_hand(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step as a loop written by hand has it."""
    model.to(images.device).train()
    criterion = nn.CrossEntropyLoss(label_smoothing=RECIPE.label_smoothing)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=1e-3,
        momentum=RECIPE.momentum,
        weight_decay=RECIPE.weight_decay,
        nesterov=True,
    )

    def step() -> None:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise ArithmeticError("the loss is not finite")

    return step


def ours(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step of `Loop`."""
    loop = Loop(model, recipe=RECIPE, steps_per_epoch=1000, epochs=100, seed=0, runtime=RUNTIME)

    def step() -> None:
        loop.step(images, labels, loop.tally.step)

    return step


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the time of our step divided by that of a step written by hand."""
    device = resolve_device(RUNTIME)
    for name in ("resnet18",) if quick else ("resnet18", "mobilenet_v2"):
        for resolution in (32,) if quick else (32, 64):
            batch = RECIPE.batch_size
            draws = torch.Generator().manual_seed(0)
            images = torch.randn(batch, 3, resolution, resolution, generator=draws).to(device)
            labels = torch.randint(CLASSES, (batch,), generator=draws).to(device)
            models = [
                torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
                for _ in range(2)
            ]
            steps = ours(models[0], images, labels), by_hand(models[1], images, labels)
            mine, hand, runs = alternating(
                *steps, runs=20 if quick else 40, limit_seconds=10 if quick else math.inf
            )
            yield Figure(
                f"train_step/{name}/{resolution}",
                mine / hand,
                f"{1000 * mine:.1f} ms, by hand {1000 * hand:.1f} ms; {runs} x {batch} images",
                "at most 1.05",
            )


if __name__ == "__main__":
    main(measure)
