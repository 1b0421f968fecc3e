"""User errors about data: each is a message of one line before the run starts."""

import gzip
import shutil
import struct
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torchvision import datasets

from widthopt.data import check, classes
from widthopt.errors import InputError


CONF = Path(__file__).parent.parent / "conf" / "dataset"


def choice(name, **changes):
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes))


def fill(root, counts, *, splits=("train", "val")):
    """Write a number of images of each class to each split."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_fraction_lies_above_0_and_at_most_1(fraction):
    with pytest.raises(
        InputError,
        match=rf"^projection\.fraction is {fraction}, but it is a part "
        r"of the training images; use a number above 0 and at most 1$",
    ):
        check(choice("digits"), fraction=fraction)


def test_the_message_names_the_key_of_the_fraction_as_typed():
    with pytest.raises(InputError, match=r"^point\.fraction is 2, but"):
        check(choice("digits"), fraction=2, key="point.fraction")


def test_a_fraction_leaves_each_class_two_images(tmp_path):
    fill(tmp_path, {"ant": 30, "bee": 10})
    with pytest.raises(
        InputError,
        match=r"^projection\.fraction is 0\.1, but it leaves class "
        r"bee 1 image of 10 and a class needs 2, one of them for validation; use at least "
        r"0\.15$",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=0.1)
    check(choice("image_folder", root=str(tmp_path)), fraction=0.15)


def test_a_class_with_one_image_is_named_whatever_the_fraction(tmp_path):
    fill(tmp_path, {"ant": 3, "bee": 1})
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but class bee has 1 image for "
        r"training and a class needs 2, .*; add images or remove the class$",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def test_two_classes_are_the_least(tmp_path):
    fill(tmp_path, {"ant": 3})
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but it has fewer than two "
        r"classes \(ant\) and .*; use a data set of two classes or more$",
    ):
        classes(choice("image_folder", root=str(tmp_path)))


def test_a_missing_folder_is_named_as_it_was_typed():
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is ~/no/such/images, but there is no "
        r"such folder; use the folder that contains train/<class> and val/<class>$",
    ):
        check(choice("image_folder", root="~/no/such/images"), fraction=1.0)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "photos", {"ant": 3, "bee": 3})
    assert classes(choice("image_folder", root="~/photos")) == ("ant", "bee")


@pytest.mark.parametrize(("split", "missing"), [("val", "train"), ("train", "val or test")])
def test_a_missing_split_is_named(tmp_path, split, missing):
    fill(tmp_path, {"ant": 3, "bee": 3}, splits=(split,))
    with pytest.raises(
        InputError,
        match=rf"^dataset\.root is \S+, but it has no folder {missing}; "
        r"arrange the images as train/<class> and val/<class>$",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def test_the_folder_test_is_read_if_there_is_no_val(tmp_path):
    fill(tmp_path, {"ant": 3, "bee": 4}, splits=("train", "test"))
    dataset = choice("image_folder", root=str(tmp_path))
    check(dataset, fraction=1.0)
    assert len(dataset.test().labels) == 7


def test_a_class_folder_without_images_is_named(tmp_path):
    fill(tmp_path, {"ant": 3, "bee": 3})
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but not every class folder in "
        r"train has images \(.*cow.*\); add images or remove the empty folders$",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def test_training_and_test_images_have_the_same_classes(tmp_path):
    fill(tmp_path, {"ant": 3, "bee": 3})
    shutil.move(tmp_path / "val" / "bee", tmp_path / "val" / "wasp")
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but its training and test images "
        r"differ in their classes \(bee, wasp\); give them the same classes$",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def test_each_unreadable_image_is_named_and_counted(tmp_path):
    fill(tmp_path, {"ant": 5, "bee": 5})
    truncate(tmp_path / "train" / "ant" / "03.png")
    (tmp_path / "train" / "bee" / "00.png").write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but 2 of 10 images cannot be "
        r"read \(train/ant/03\.png, train/bee/00\.png\); [^\n]*"
        r"dataset\.allow_unreadable=true\)$",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def test_a_truncated_photograph_is_unreadable(tmp_path):
    """Its header is complete, so that only decoding finds the error."""
    fill(tmp_path, {"ant": 5, "bee": 5})
    path = tmp_path / "val" / "ant" / "99.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"1 of 11 images cannot be read \(val/ant/99\.jpg\)"):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def test_ten_of_many_unreadable_images_are_named_and_the_others_counted(tmp_path):
    fill(tmp_path, {"ant": 13, "bee": 5})
    for path in (tmp_path / "train" / "ant").iterdir():
        truncate(path)
    with pytest.raises(
        InputError,
        match=r"but 13 of 18 images cannot be read \(train/ant/00\.png, "
        r".*train/ant/09\.png and 3 more\);",
    ):
        check(choice("image_folder", root=str(tmp_path)), fraction=1.0)


def test_unreadable_images_are_skipped_with_a_warning_if_allowed(tmp_path):
    fill(tmp_path, {"ant": 5, "bee": 5})
    truncate(tmp_path / "train" / "ant" / "03.png")
    dataset = choice("image_folder", root=str(tmp_path), allow_unreadable=True, verify=False)
    with pytest.warns(
        UserWarning,
        match=r"^dataset\.root is \S+, and 1 of 10 images cannot be "
        r"read \(train/ant/03\.png\); they are skipped because "
        r"dataset\.allow_unreadable is true$",
    ):
        images = dataset.train()
    assert images.labels.tolist() == [0] * 4 + [1] * 5
    assert not any(path.endswith("ant/03.png") for path in images.paths)
    check(dataset, fraction=1.0)  # images are listed once, with one warning


@pytest.mark.parametrize("verify", [True, False])
def test_every_image_is_read_before_a_run_only_if_verify_is_true(tmp_path, monkeypatch, verify):
    fill(tmp_path, {"ant": 5, "bee": 5})
    paths, open_image = [], Image.open

    def record(path):
        paths.append(path)
        return open_image(path)

    monkeypatch.setattr(Image, "open", record)
    check(choice("image_folder", root=str(tmp_path), verify=verify), fraction=1.0)
    images = sorted(str(path) for path in tmp_path.rglob("*.png"))
    assert sorted(paths) == (images if verify else [])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_missing_data_set_can_be_downloaded(tmp_path, name):
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but torchvision finds no complete "
        r"(CIFAR10|CIFAR100|FashionMNIST) in it \(dataset not found[^\n]*\); "
        r"download it with dataset\.download=true, or set dataset\.root to the "
        r"folder that contains it$",
    ):
        check(choice(name, root=str(tmp_path)), fraction=1.0)


def test_a_failed_download_gives_the_reason_and_the_alternative(tmp_path, monkeypatch):
    def refuse(self):  # noqa: ARG001
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR100, "download", refuse)
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but .*no route to host.*; copy the "
        r"unpacked files of CIFAR100 to it$",
    ):
        check(choice("cifar100", root=str(tmp_path), download=True), fraction=1.0)


def test_missing_archives_of_imagenet_are_named(tmp_path):
    with pytest.raises(
        InputError,
        match=r"^dataset\.root is \S+, but torchvision finds no complete "
        r"ImageNet in it \([^\n]*\); copy ILSVRC2012_devkit_t12\.tar\.gz, .*, or use "
        r"dataset=image_folder for unpacked folders$",
    ):
        check(choice("imagenet", root=str(tmp_path)), fraction=1.0)


def test_imagenet_is_not_downloaded():
    with pytest.raises(
        InputError,
        match=r"^dataset\.download is True, but torchvision cannot "
        r"download ImageNet; .* set dataset\.download=false$",
    ):
        replace(choice("imagenet"), download=True)


def test_an_unknown_data_set_of_torchvision_is_refused_with_the_choices():
    with pytest.raises(
        InputError,
        match=r"^dataset\.dataset is MNISTY, but the choices are CIFAR10, "
        r"CIFAR100, FashionMNIST, ImageNet; use one of them, or "
        r"dataset=image_folder for your own images$",
    ):
        replace(choice("cifar10"), dataset="MNISTY")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 0}, r"^dataset\.resolution is 0, but .*; use an integer of at least 1$"),
        ({"crop": 0}, r"^dataset\.crop is 0, but .*; use a number above 0 and at most 1$"),
        ({"crop": 1.2}, r"^dataset\.crop is 1\.2, but .*; use a number above 0 and at most 1$"),
        ({"validation": 0}, r"^dataset\.validation is 0, but .*; use a number between 0 and 1$"),
        ({"validation": 1}, r"^dataset\.validation is 1, but .*; use a number between 0 and 1$"),
        ({"train_scale": 0}, r"^dataset\.train_scale is 0, but .*; use a number above 0, or null$"),
        ({"memory_limit_gb": -1}, r"^dataset\.memory_limit_gb is -1, but .*; use 0 to .* above 0$"),
        ({"mean": (0.5,)}, r"^dataset\.mean is \[0\.5\], but .*; give one number for each of .*$"),
        ({"std": (1, 1)}, r"^dataset\.std is \[1, 1\], but .*; give one number for each of .*$"),
        ({"std": (1, 0, 1)}, r"^dataset\.std is \[1, 0, 1\], but .*; use numbers above 0$"),
    ],
)
def test_a_value_outside_its_range_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(choice("digits"), **changes)


def test_imagenet_is_read_from_torchvisions_folders(tmp_path):
    """The layout is that of archives that torchvision unpacked."""
    fill(tmp_path, {"n02": 3, "n01": 3})
    words = {"n01": ("crane",), "n02": ("crane", "derrick")}
    torch.save((words, ["n01"] * 3 + ["n02"] * 3), tmp_path / "meta.bin")
    dataset = choice("imagenet", root=str(tmp_path))
    check(dataset, fraction=1.0)
    assert classes(dataset) == ("n01 crane", "n02 crane")
    assert dataset.train().labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert all("/val/" in path for path in dataset.test().paths)


def test_fashion_mnist_is_converted_from_greyscale_to_rgb(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = (np.arange(40) % 10).astype(np.uint8)
    for split in ("train", "t10k"):
        head = struct.pack(">IIII", 2051, 40, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">II", 2049, 40)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    dataset = choice("fashion_mnist", root=str(tmp_path))
    check(dataset, fraction=1.0)
    assert classes(dataset)[9] == "Ankle boot"
    image = np.asarray(dataset.train().image(7))
    assert all(np.array_equal(image[:, :, channel], pixels[7]) for channel in range(3))


def test_a_damaged_cifar_file_is_refused(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(gzip.compress(b"not these"))
    with pytest.raises(
        InputError,
        match=r"finds no complete CIFAR100 in it \(dataset not found or "
        r"corrupted\)",
    ):
        check(choice("cifar100", root=str(tmp_path)), fraction=1.0)
