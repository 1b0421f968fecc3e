import dataclasses

import pytest
import torch
from torch import nn

from widthopt.errors import InputError
from widthopt.setting import Runtime
from widthopt.training.evaluation import evaluate


RUNTIME = Runtime(
    device="cpu",
    workers=0,
    precision="float32",
    memory_format="contiguous",
    backend="auto",
    progress=False,
)


class Scores(nn.Module):
    """Takes the first pixels of an image for its scores."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.flatten(1)[:, : self.classes]


class Listed(list):
    @property
    def images(self):
        return sum(len(labels) for _, labels in self)


def batches(scores, labels, size=7):
    images = torch.zeros(len(scores), 1, 4, 4)
    images.view(len(scores), -1)[:, : scores.shape[1]] = scores
    return Listed(zip(images.split(size), labels.split(size), strict=True))


def by_sorting(scores, labels, places):
    """Top-k accuracy in per cent, the slow and obvious way."""
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda place: -row[place])
        right += label in order[:places]
    return 100 * right / len(labels)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_accuracy_is_what_sorting_the_scores_by_hand_gives(classes):
    random = torch.Generator().manual_seed(classes)
    scores = torch.rand(40, classes, generator=random)
    labels = torch.randint(classes, (40,), generator=random)
    found = evaluate(Scores(classes), batches(scores, labels), runtime=RUNTIME)
    assert found.images == 40
    assert found.top1 == by_sorting(scores, labels, 1)
    assert found.top5 == by_sorting(scores, labels, 5)


def test_an_image_whose_scores_are_not_numbers_is_wrong():
    scores = torch.full((4, 6), torch.nan)
    scores[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    found = evaluate(Scores(6), batches(scores, torch.zeros(4).long()), runtime=RUNTIME)
    assert (found.top1, found.top5) == (25.0, 25.0)


def test_the_network_is_evaluated_in_evaluation_mode_and_its_modes_are_restored():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.99), Scores(4))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.eye(4).reshape(4, 1, 2, 2)
    found = evaluate(model, Listed([(images, torch.arange(4))]), runtime=RUNTIME)
    assert found.top1 == 100.0
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_modes_are_restored_when_a_batch_fails():
    model = Scores(4)
    with pytest.raises(RuntimeError):
        evaluate(model, Listed([(torch.zeros(2, 1, 1, 1), torch.zeros(3).long())]), runtime=RUNTIME)
    assert model.training


def test_what_a_network_keeps_from_an_evaluation_can_be_trained_on():
    class Keeping(Scores):
        def forward(self, images):
            self.kept = images * 2
            return super().forward(images)

    model = Keeping(4)
    evaluate(model, batches(torch.rand(3, 4), torch.zeros(3).long()), runtime=RUNTIME)
    weight = torch.ones(1, requires_grad=True)
    (model.kept * weight).sum().backward()
    assert weight.grad is not None


def test_bfloat16_is_used_where_it_is_asked_for():
    seen = []

    class Noting(nn.Linear):
        def forward(self, images):
            out = super().forward(images.flatten(1))
            seen.append(out.dtype)
            return out

    data = batches(torch.rand(3, 4), torch.zeros(3).long())
    for precision in ("float32", "auto", "bfloat16"):
        runtime = dataclasses.replace(RUNTIME, precision=precision)
        evaluate(Noting(16, 4), data, runtime=runtime)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


def test_no_images_are_an_error():
    with pytest.raises(InputError, match="the evaluation has 0 images, but needs at least 1"):
        evaluate(Scores(4), Listed(), runtime=RUNTIME)
