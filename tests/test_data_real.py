"""CIFAR-100 and photographs, if they are beside the repository."""

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from small import RUNTIME, make_recipe

from widthopt.data import check, classes, search_split, target_split


REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"
RECIPE = make_recipe(batch_size=128, augmentation="crop")
CPU = torch.device("cpu")


def choice(name, **changes):
    conf = OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml")
    return instantiate(OmegaConf.merge(conf, changes))


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
    pack = SHARED / "cifar100"
    if not pack.is_dir():
        pytest.skip("CIFAR-100 is not in ../shared/data")
    root = tmp_path_factory.mktemp("cifar")
    script = SHARED / "unpack_cifar100.py"
    subprocess.run([sys.executable, script, pack, root], check=True, capture_output=True)  # noqa: S603
    return choice("cifar100", root=str(root))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    archive = SHARED / "photos" / "caltech101-subset.zip"
    if not archive.is_file():
        pytest.skip("the photographs are not in ../shared/data")
    root = tmp_path_factory.mktemp("photos")
    with zipfile.ZipFile(archive) as file:
        file.extractall(root)
    return choice("image_folder", root=str(root))


def test_cifar_100_has_its_published_size(cifar100):
    check(cifar100, fraction=0.05)
    assert len(classes(cifar100)) == 100
    assert Counter(cifar100.train().labels.tolist()) == dict.fromkeys(range(100), 500)
    assert Counter(cifar100.test().labels.tolist()) == dict.fromkeys(range(100), 100)


def test_cifar_100_is_normalised_to_mean_0_and_deviation_1(cifar100):
    """The configuration's numbers are rounded to four decimals."""
    pixels = cifar100.train().pixels.reshape(-1, 3)
    values = np.arange(256) / 255
    for channel in range(3):
        share = np.bincount(pixels[:, channel], minlength=256) / len(pixels)
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum() ** 0.5
        assert cifar100.mean[channel] == pytest.approx(mean, abs=1e-4)
        assert cifar100.std[channel] == pytest.approx(std, abs=1e-3)


def test_a_search_on_5_per_cent_of_cifar_100_sees_25_images_of_each_class(cifar100):
    split = search_split(
        cifar100,
        resolution=32,
        fraction=0.05,
        seed=0,
        recipe=RECIPE,
        runtime=RUNTIME,
        device=CPU,
    )
    held = Counter(label for _, labels in split.evaluation for label in labels.tolist())
    assert held == dict.fromkeys(range(100), 3)  # a tenth of 25 is 2.5
    assert split.train.images == 2200 // 128 * 128
    assert (split.classes, split.train.batch_size) == (100, 128)


def test_photographs_are_46_classes_of_40_and_20(photos):
    check(photos, fraction=0.05)
    assert len(classes(photos)) == 46
    assert set(Counter(photos.train().labels.tolist()).values()) == {40}
    assert set(Counter(photos.test().labels.tolist()).values()) == {20}


def test_photographs_of_all_sizes_are_evaluated_as_squares(photos):
    split = target_split(photos, resolution=32, seed=0, recipe=RECIPE, runtime=RUNTIME, device=CPU)
    images = torch.cat([images for images, _ in split.evaluation])
    assert images.shape == (920, 3, 32, 32)
    assert images.isfinite().all()
    assert len({image.numpy().tobytes() for image in images}) > 910  # the images differ
