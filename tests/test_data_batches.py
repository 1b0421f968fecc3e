"""The content of batches, which depends only on seed, epoch and step."""

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from small import make_recipe, make_runtime
from torchvision import transforms

from widthopt.config.compose import compose
from widthopt.data import check, classes, search_split, target_split
from widthopt.data.augmentation import CropDraws, crop_draws, crop_images
from widthopt.data.batches import Placement
from widthopt.data.cache import CachedFullImages, eval_crop, load_full_images
from widthopt.data.dataset import DatasetChoice
from widthopt.data.images import ArrayImages, FileImages, reduce_image
from widthopt.errors import InputError


CONF = Path(__file__).parent.parent / "conf" / "dataset"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Noise(DatasetChoice):
    """Different random images of one size, which identify the images of a batch."""

    side: int
    per_class: int

    def train(self):
        return self._images(1)

    def test(self):
        return self._images(2)

    def _images(self, seed):
        count = 3 * self.per_class
        shape = (count, self.side, self.side + 3, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        return ArrayImages(np.arange(count) % 3, ("a", "b", "c"), pixels)


class Untested(Noise):
    def test(self):
        raise AssertionError("a search used the test images")


def noise(kind=Noise, **changes):
    values = {
        "name": "noise",
        "resolution": 16,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "crop": 0.875,
        "flip": True,
        "train_scale": 256 / 224,
        "validation": 0.2,
        "memory_limit_gb": 1.0,
        "side": 20,
        "per_class": 10,
    }
    return kind(**{**values, **changes})


def recipe(augmentation="crop", *, batch_size=8, accumulation=1):
    return make_recipe(batch_size=batch_size, accumulation=accumulation, augmentation=augmentation)


def runtime(*, workers=0, memory_format="contiguous"):
    return make_runtime(workers=workers, memory_format=memory_format)


def target(dataset, *, augmentation="crop", seed=0, workers=0, resolution=16, **changes):
    return target_split(
        dataset,
        resolution=resolution,
        seed=seed,
        recipe=recipe(augmentation, **changes),
        runtime=runtime(workers=workers),
        device=CPU,
    )


def search(dataset, *, fraction=1.0, seed=0, augmentation="none"):
    return search_split(
        dataset,
        resolution=16,
        fraction=fraction,
        seed=seed,
        recipe=recipe(augmentation),
        runtime=runtime(),
        device=CPU,
    )


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) > 0 and all(
        torch.equal(x, u) and torch.equal(y, v)
        for (x, y), (u, v) in zip(first, second, strict=True)
    )


def images_of(batches):
    """Return each image as bytes, which identify it."""
    return [image.numpy().tobytes() for images, _ in batches for image in images]


@pytest.mark.parametrize("memory_limit_gb", [1.0, 0.0])
@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
def test_worker_processes_do_not_change_batches(augmentation, memory_limit_gb):
    dataset = noise(memory_limit_gb=memory_limit_gb)
    expected = target(dataset, augmentation=augmentation, workers=0)
    result = target(dataset, augmentation=augmentation, workers=2)
    assert same(result.train.epoch(1), expected.train.epoch(1))
    assert same(result.evaluation, expected.evaluation)


@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
def test_an_epoch_from_a_later_step_has_the_batches_of_an_uninterrupted_epoch(augmentation):
    train = target(noise(), augmentation=augmentation).train
    assert same(list(train.epoch(2))[2:], train.epoch(2, first_step=2))


@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
def test_the_parts_of_all_ranks_are_the_batch_of_a_single_process(augmentation):
    train = target(noise(), augmentation=augmentation, batch_size=10).train
    parts = zip(*(train.epoch(0, rank=rank, ranks=3) for rank in range(3)), strict=True)
    joined = [tuple(torch.cat(tensors) for tensors in zip(*part, strict=True)) for part in parts]
    assert same(joined, train.epoch(0))


def test_the_parts_of_all_ranks_evaluate_every_image_once():
    evaluation = target(noise(per_class=9)).evaluation
    parts = [evaluation.part(rank, 4) for rank in range(4)]
    assert sum(part.images for part in parts) == evaluation.images == 27
    together = [name for part in parts for name in images_of(part)]
    assert sorted(together) == sorted(images_of(evaluation))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["paper", "crop"])
def test_the_global_rngs_are_unchanged(augmentation, workers):
    train = target(noise(), augmentation=augmentation, workers=workers).train
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    expected = (random.random(), np.random.random(), torch.rand(()).item())  # noqa: NPY002, S311
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    assert len(list(train.epoch(0))) == train.steps_per_epoch
    after = (random.random(), np.random.random(), torch.rand(()).item())  # noqa: NPY002, S311
    assert after == expected


@pytest.mark.parametrize("augmentation", ["paper", "crop"])
def test_batches_do_not_depend_on_the_global_rngs(augmentation):
    train = target(noise(), augmentation=augmentation).train
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    first = list(train.epoch(0))
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert same(first, train.epoch(0))


@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
def test_epochs_and_seeds_differ(augmentation):
    train = target(noise(), augmentation=augmentation).train
    second = target(noise(), augmentation=augmentation, seed=1).train
    assert not same(train.epoch(0), train.epoch(1))
    assert not same(train.epoch(0), second.epoch(0))


@pytest.mark.parametrize("augmentation", ["paper", "crop"])
def test_every_step_of_every_epoch_has_different_random_numbers(augmentation):
    """All images are equal, so that batches differ only in augmentation."""

    class Equal(Noise):
        def _images(self, seed):
            images = super()._images(seed)
            return replace(images, pixels=np.repeat(images.pixels[:1], 30, axis=0))

    train = target(noise(Equal), augmentation=augmentation).train
    batches = [images for epoch in range(3) for images, _ in train.epoch(epoch)]
    assert len({images.numpy().tobytes() for images in batches}) == 9


def test_the_same_image_is_augmented_differently_within_a_batch():
    dataset = noise(side=16)
    augmentation = target(dataset, augmentation="paper").train._augmented  # noqa: SLF001
    twice = augmentation(np.array([5, 5, 5, 5]), part=slice(None), seed=0)
    assert len({image.tobytes() for image in twice}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_each_image_at_most_once_and_drops_an_incomplete_batch(workers):
    train = target(noise(), augmentation="none", workers=workers, batch_size=8).train
    assert (train.images, train.batch_size, train.steps_per_epoch) == (24, 8, 3)
    seen = images_of(train.epoch(0))
    assert len(seen) == len(set(seen)) == 24


def test_a_batch_size_above_the_number_of_images_gives_a_batch_of_all_images():
    train = target(noise(), batch_size=1024).train
    assert (train.images, train.batch_size, train.steps_per_epoch) == (30, 30, 1)
    ((images, labels),) = train.epoch(0)
    assert len(images) == len(labels) == 30


def test_labels_stay_with_their_images():
    dataset = noise()
    split = target(dataset, augmentation="none")
    label_of = dict(
        zip(images_of(split.train.epoch(0)), label_list(split.train.epoch(0)), strict=True)
    )
    second = dict(
        zip(images_of(split.train.epoch(1)), label_list(split.train.epoch(1)), strict=True)
    )
    shared = label_of.keys() & second.keys()
    assert len(shared) > 10
    assert {name: label_of[name] for name in shared} == {name: second[name] for name in shared}
    assert label_list(split.evaluation) == dataset.test().labels.tolist()


def label_list(batches):
    return [label for _, labels in batches for label in labels.tolist()]


def test_the_validation_images_of_a_search_are_not_trained_on():
    split = search(noise(per_class=20))
    train = {name for epoch in range(6) for name in images_of(split.train.epoch(epoch))}
    held = set(images_of(split.evaluation))
    assert split.evaluation.images == len(held) == 12  # a fifth of 20, in 3 classes
    assert len(train) == 48
    assert not train & held


def test_a_search_does_not_use_the_test_images():
    split = search(noise(Untested))
    assert len(images_of(split.evaluation)) == 6


def test_a_search_uses_a_part_of_each_class():
    split = search(noise(per_class=20), fraction=0.25)
    labels = label_list(split.train.epoch(0)) + label_list(split.evaluation)
    assert len(labels) == 8 + 3  # 5 of each class: 4 to train on, in batches of 8, and 1 held out
    assert sorted(label_list(split.evaluation)) == [0, 1, 2]


def test_a_final_training_is_evaluated_on_the_test_images():
    dataset = noise()
    expected = [
        np.asarray(eval_crop(dataset.test().image(i), resolution=16, crop=0.875)).mean()
        for i in range(30)
    ]
    split = target(dataset, augmentation="none")
    scale, shift = torch.tensor(dataset.std), torch.tensor(dataset.mean)
    means = [
        (255 * (image * scale[:, None, None] + shift[:, None, None])).mean().item()
        for images, _ in split.evaluation
        for image in images
    ]
    assert means == pytest.approx(expected, abs=1e-3)  # float32 values up to 255


def test_a_sample_of_the_evaluation_images_is_in_random_order():
    """A data set may be sorted by class, and BatchNorm uses the statistics of a batch."""
    evaluation = target(noise()).evaluation
    ordered = images_of(evaluation)
    drawn = images_of(evaluation.sample(30, batch_size=10, seed=0))
    assert sorted(drawn) == sorted(ordered)
    # About one of 30 images in random order keeps its position.
    assert sum(image == before for image, before in zip(drawn, ordered, strict=True)) < 6
    labels = label_list(evaluation.sample(30, batch_size=10, seed=0))
    # A third of 29 steps in random order goes to a lower class; none does in the order of classes.
    assert sum(after < before for before, after in pairwise(labels)) > 4
    assert images_of(evaluation.sample(12, batch_size=5, seed=0)) == drawn[:12]
    assert images_of(evaluation.sample(30, batch_size=10, seed=1)) != drawn


@pytest.mark.parametrize("accumulation", [1, 2])
def test_evaluation_uses_micro_batches_and_every_image(accumulation):
    evaluation = target(noise(), batch_size=8, accumulation=accumulation).evaluation
    sizes = [len(labels) for _, labels in evaluation]
    assert sum(sizes) == evaluation.images == 30
    assert max(sizes) == 8 // accumulation


def photo(width, height, seed=0):
    """Return a smooth image with noise, similar to a photograph."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    grain = generator.integers(-9, 10, smooth.shape)
    return Image.fromarray((smooth.astype(int) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(50, 50), (64, 47), (47, 64), (301, 80), (20, 31)])
@pytest.mark.parametrize(("resolution", "crop", "short_side"), [(28, 0.875, 32), (31, 1.0, 31)])
def test_evaluation_resizes_the_short_side_and_crops_the_centre(size, resolution, crop, short_side):
    oracle = transforms.Compose([transforms.Resize(short_side), transforms.CenterCrop(resolution)])
    image = photo(*size)
    result = eval_crop(image, resolution=resolution, crop=crop)
    assert np.array_equal(np.asarray(result), np.asarray(oracle(image)))


def test_evaluation_batches_are_those_of_a_torchvision_pipeline():
    dataset = noise(side=40)
    oracle = transforms.Compose(
        [
            transforms.Resize(18),  # 16 / 0.875 is 18.3
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(dataset.mean, dataset.std),
        ]
    )
    pixels = dataset.test().pixels
    expected = torch.stack([oracle(Image.fromarray(array)) for array in pixels])
    result = torch.cat([images for images, _ in target(dataset).evaluation])
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)  # float32 in another order


def test_pixels_are_normalised_by_mean_and_deviation_of_each_channel():
    dataset = noise(mean=(0.0, 0.2, 0.5), std=(1.0, 0.4, 0.25))
    placement = Placement.of(dataset, runtime=runtime(), device=CPU)
    pixels = np.array([[0, 255], [51, 51], [255, 0]], dtype=np.uint8).reshape(1, 3, 1, 2)
    ((images, labels),) = placement.stream(
        lambda _: (pixels, np.array([7])), range(1), in_memory=True
    )
    expected = torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, -2.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert (images.dtype, labels.dtype, labels.tolist()) == (torch.float32, torch.int64, [7])


@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
@pytest.mark.parametrize("memory_format", ["auto", "contiguous", "channels_last"])
def test_batches_have_the_requested_memory_format(memory_format, augmentation):
    split = target_split(
        noise(),
        resolution=16,
        seed=0,
        recipe=recipe(augmentation),
        runtime=runtime(memory_format=memory_format),
        device=CPU,
    )
    expected = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    for images, _ in (next(split.train.epoch(0)), next(iter(split.evaluation))):
        assert images.shape[1:] == (3, 16, 16)
        assert images.is_contiguous(memory_format=expected)


def test_the_memory_format_does_not_change_values():
    splits = [
        target_split(
            noise(),
            resolution=16,
            seed=0,
            recipe=recipe("crop"),
            runtime=runtime(memory_format=memory_format),
            device=CPU,
        )
        for memory_format in ("contiguous", "channels_last")
    ]
    assert same(*(split.train.epoch(0) for split in splits))


def slow_crop(pixels, draws, padding):
    """Crop and mirror with a loop over the pixels."""
    count, channels, height, width = pixels.shape
    out = np.zeros_like(pixels)
    for i in range(count):
        for y in range(height):
            for x in range(width):
                row = y + draws.rows[i] - padding
                offset = width - 1 - x if draws.mirrored[i] else x
                column = offset + draws.columns[i] - padding
                if 0 <= row < height and 0 <= column < width:
                    for channel in range(channels):
                        out[i, channel, y, x] = pixels[i, channel, row, column]
    return out


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_padded_crops_are_those_of_a_loop_over_pixels(padding):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 7, 7), dtype=np.uint8)
    draws = crop_draws(12, padding=padding, flip=True, seed=4)
    assert 0 < draws.mirrored.sum() < 12
    result = crop_images(pixels, draws, padding=padding)
    assert np.array_equal(result, slow_crop(pixels, draws, padding))


def test_crops_reach_every_offset_equally_often_and_half_are_mirrored():
    draws = crop_draws(50_000, padding=2, flip=True, seed=0)
    for offsets in (draws.rows, draws.columns):
        counts = np.bincount(offsets)
        assert len(counts) == 5
        assert abs(counts - 10_000).max() < 450  # five standard deviations
    assert abs(draws.mirrored.sum() - 25_000) < 560
    assert (
        np.bincount(draws.rows * 5 + draws.columns).min() > 1_750
    )  # rows and columns are independent


def test_no_image_is_mirrored_if_flip_is_false():
    assert not crop_draws(1_000, padding=2, flip=False, seed=0).mirrored.any()
    draws = CropDraws(np.array([1]), np.array([1]), np.array([False]))
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    assert np.array_equal(crop_images(pixels, draws, padding=1), pixels)


def test_the_papers_augmentation_mirrors_images_only_if_flip_is_true():
    """Images that are dark on the left are brighter on the left only if they are mirrored."""

    @dataclass(frozen=True, kw_only=True)
    class Halves(Noise):
        def _images(self, seed):  # noqa: ARG002
            pixels = np.full((90, 20, 20, 3), 60, dtype=np.uint8)
            pixels[:, :, 10:] = 190
            return ArrayImages(np.arange(90) % 3, ("a", "b", "c"), pixels)

    def brighter_left(*, flip):
        train = target(noise(Halves, flip=flip), augmentation="paper", batch_size=90).train
        ((images, _),) = train.epoch(0)
        sides = images.mean(dim=(1, 2))
        return int((sides[:, :8].mean(1) > sides[:, 8:].mean(1) + 0.1).sum())

    # RandAugment inverts and solarises a few, which are then brighter on the left too.
    assert brighter_left(flip=False) < 20
    assert brighter_left(flip=True) > 30


@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
def test_the_cache_does_not_change_batches_of_files(augmentation, photos):
    cached = target(photos(memory_limit_gb=1.0), augmentation=augmentation, resolution=24)
    decoded = target(photos(memory_limit_gb=0.0), augmentation=augmentation, resolution=24)
    assert same(cached.train.epoch(0), decoded.train.epoch(0))
    assert same(cached.evaluation, decoded.evaluation)


@pytest.mark.parametrize("train_scale", [256 / 224, None])
@pytest.mark.parametrize("side", [12, 16, 40])
@pytest.mark.parametrize("augmentation", ["paper", "crop", "none"])
def test_the_cache_does_not_change_batches_of_arrays(augmentation, side, train_scale):
    cached, decoded = (
        target(
            noise(side=side, train_scale=train_scale, memory_limit_gb=limit),
            augmentation=augmentation,
        )
        for limit in (1.0, 0.0)
    )
    assert same(cached.train.epoch(0), decoded.train.epoch(0))


@pytest.fixture
def photos(tmp_path):
    """Return a function that builds the data set of a folder of different photographs."""
    sizes = [(61, 50), (50, 67), (200, 150), (30, 30), (90, 20), (64, 64)]
    for split, extra in (("train", 0), ("val", 100)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, size in enumerate(sizes):
                image = photo(*size, seed=extra + 10 * label + i)
                if i == 1:
                    image = image.convert("L")
                image.save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")

    def choice(**changes):
        conf = OmegaConf.load(CONF / "image_folder.yaml")
        return instantiate(OmegaConf.merge(conf, {"root": str(tmp_path), **changes}))

    return choice


def test_the_folders_of_photographs_are_the_classes(photos):
    dataset = photos()
    check(dataset, fraction=0.5)
    assert classes(dataset) == ("cat", "dog")
    assert dataset.train().labels.tolist() == [0] * 6 + [1] * 6
    assert len(dataset.test().labels) == 12


def test_photographs_are_evaluated_as_torchvision_does_from_the_file(photos):
    dataset = photos()
    oracle = transforms.Compose([transforms.Resize(27), transforms.CenterCrop(24)])
    result = torch.cat([images for images, _ in target(dataset, resolution=24).evaluation])
    scale = torch.tensor(dataset.std).view(3, 1, 1) * 255
    shift = torch.tensor(dataset.mean).view(3, 1, 1) * 255
    for image, path in zip(result, dataset.test().paths, strict=True):
        with Image.open(path) as file:
            expected = np.asarray(oracle(file.convert("RGB"))).transpose(2, 0, 1)
        assert np.array_equal((image * scale + shift).round().numpy(), expected)


def test_an_image_is_reduced_to_its_short_side_and_never_enlarged():
    assert reduce_image(photo(200, 150), 75).size == (100, 75)
    assert reduce_image(photo(150, 200), 75).size == (75, 100)
    assert reduce_image(photo(200, 150), 150).size == (200, 150)
    assert reduce_image(photo(8, 8), 32).size == (8, 8)


def test_a_photograph_decoded_at_a_smaller_scale_looks_like_one_decoded_in_full(tmp_path):
    path = tmp_path / "photo.jpg"
    photo(401, 300).save(path, quality=95)
    images = FileImages(str(tmp_path), np.array([0]), ("a",), (str(path),))
    reduced = np.asarray(images.image(0, short_side=30), dtype=int)
    full = np.asarray(reduce_image(images.image(0), 30), dtype=int)
    assert reduced.shape == full.shape == (30, 40, 3)
    assert abs(reduced - full).mean() < 2  # of 255


def test_cached_photographs_are_reduced_to_the_resolution(photos):
    train = photos().train()
    cached = load_full_images(train, np.arange(12), short_side=32, limit_bytes=1e9, progress=False)
    assert isinstance(cached, CachedFullImages)
    assert cached(0).size == (39, 32)
    assert cached(3).size == (30, 30)
    assert cached.stored_bytes == sum(3 * cached(i).width * cached(i).height for i in range(12))


def test_the_memory_limit_applies_to_training_and_evaluation_together():
    """Either split has 30 images of 16 x 16 x 3 bytes, which are 23,040 bytes."""
    train_only = target(noise(memory_limit_gb=30_000e-9))
    both_splits = target(noise(memory_limit_gb=47_000e-9))
    stored = [
        (split.train._augmented._images.stored_bytes, split.evaluation._crops.stored_bytes)  # noqa: SLF001
        for split in (train_only, both_splits)
    ]
    assert stored == [(23_040, 0), (23_040, 23_040)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_becomes_unreadable_in_training_is_named(photos, tmp_path, workers):
    train = target(photos(memory_limit_gb=0.0, verify=False), workers=workers, batch_size=12).train
    (tmp_path / "train" / "dog" / "2.jpg").write_bytes(b"gone")
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is [^\n]*1 of 12 images cannot be "
        r"read \(train/dog/2\.jpg\); [^\n]*$",
    ):
        list(train.epoch(0))


def test_all_images_that_cannot_be_cached_are_named(photos, tmp_path):
    for name in ("1.png", "4.jpg"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"gone")
    with pytest.raises(
        InputError,
        match=r"2 of 12 images cannot be read "
        r"\(train/cat/1\.png, train/cat/4\.jpg\)",
    ):
        target(photos(verify=False))


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_of_the_configuration_builds_the_data_set_it_names(path):
    dataset = compose([f"dataset={path.stem}"]).dataset
    assert path.stem.startswith(dataset.name)  # a choice may change only the resolution
    assert isinstance(dataset.mean, tuple)


def test_importing_the_choices_does_not_import_torch():
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    code = "import sys, widthopt.data.vision, widthopt.data.digits; print('torch' in sys.modules)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONF.parent.parent,
    )
    assert done.stdout.strip() == "False"
