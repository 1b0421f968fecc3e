import pytest
import torch
from small import RUNTIME, ListedBatches, make_runtime
from torch import nn

from widthopt.errors import InputError
from widthopt.training.evaluation import evaluate


class Scores(nn.Module):
    """Returns the first pixels of an image as its scores."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.flatten(1)[:, : self.classes]


def batches(scores, labels, size=7):
    images = torch.zeros(len(scores), 1, 4, 4)
    images.view(len(scores), -1)[:, : scores.shape[1]] = scores
    return ListedBatches(zip(images.split(size), labels.split(size), strict=True))


def by_sorting(scores, labels, places):
    """Return the top-k accuracy in per cent, by sorting."""
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda place: -row[place])
        right += label in order[:places]
    return 100 * right / len(labels)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_accuracy_equals_that_of_sorted_scores(classes):
    random = torch.Generator().manual_seed(classes)
    scores = torch.rand(40, classes, generator=random)
    labels = torch.randint(classes, (40,), generator=random)
    accuracy = evaluate(Scores(classes), batches(scores, labels), runtime=RUNTIME)
    assert accuracy.images == 40
    assert accuracy.top1 == by_sorting(scores, labels, 1)
    assert accuracy.top5 == by_sorting(scores, labels, 5)


def test_an_image_with_nan_scores_counts_as_wrong():
    scores = torch.full((4, 6), torch.nan)
    scores[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    accuracy = evaluate(Scores(6), batches(scores, torch.zeros(4).long()), runtime=RUNTIME)
    assert (accuracy.top1, accuracy.top5) == (25.0, 25.0)


def test_the_network_is_evaluated_in_evaluation_mode_and_its_modes_are_restored():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.99), Scores(4))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.eye(4).reshape(4, 1, 2, 2)
    accuracy = evaluate(model, ListedBatches([(images, torch.arange(4))]), runtime=RUNTIME)
    assert accuracy.top1 == 100.0
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_modes_are_restored_when_a_batch_fails():
    model = Scores(4)
    broken = ListedBatches([(torch.zeros(2, 1, 1, 1), torch.zeros(3).long())])
    with pytest.raises(RuntimeError):
        evaluate(model, broken, runtime=RUNTIME)
    assert model.training


def test_tensors_that_a_network_caches_in_an_evaluation_can_be_used_in_training():
    class Keeping(Scores):
        def forward(self, images):
            self.kept = images * 2
            return super().forward(images)

    model = Keeping(4)
    evaluate(model, batches(torch.rand(3, 4), torch.zeros(3).long()), runtime=RUNTIME)
    weight = torch.ones(1, requires_grad=True)
    (model.kept * weight).sum().backward()
    assert weight.grad is not None


def test_bfloat16_is_used_only_if_selected_on_a_cpu():
    dtypes = []

    class Recording(nn.Linear):
        def forward(self, images):
            logits = super().forward(images.flatten(1))
            dtypes.append(logits.dtype)
            return logits

    data = batches(torch.rand(3, 4), torch.zeros(3).long())
    for precision in ("float32", "auto", "bfloat16"):
        evaluate(Recording(16, 4), data, runtime=make_runtime(precision=precision))
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]


def test_an_evaluation_without_images_is_refused():
    with pytest.raises(InputError, match="the evaluation has 0 images, but needs at least 1"):
        evaluate(Scores(4), ListedBatches(), runtime=RUNTIME)
