"""Stratified nested fractions and the held-out validation images."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from widthopt.data.digits import Digits
from widthopt.data.subsets import fraction_of, smallest_fraction, split_validation, stratify


COUNTS = st.lists(st.integers(2, 60), min_size=2, max_size=5)
SEEDS = st.integers(0, 2**31)
PER_CENT = st.integers(1, 100)


def shuffled_labels(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


def digits():
    return Digits(
        name="digits",
        resolution=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop=1.0,
        flip=False,
        train_scale=1.0,
        validation=0.1,
        memory_limit_gb=1.0,
    )


@given(COUNTS, SEEDS, PER_CENT, PER_CENT)
def test_a_smaller_fraction_is_a_subset_of_a_larger_one(counts, seed, first, second):
    labels = shuffled_labels(counts, seed)
    small, large = (
        stratify(labels, classes=len(counts), fraction=part / 100, seed=seed)
        for part in sorted([first, second])
    )
    for inner, outer in zip(small, large, strict=True):
        assert outer[: len(inner)].tolist() == inner.tolist()


@given(COUNTS, SEEDS, PER_CENT)
def test_a_fraction_takes_the_same_part_of_every_class_rounded_to_an_image(counts, seed, part):
    labels = shuffled_labels(counts, seed)
    drawn = stratify(labels, classes=len(counts), fraction=part / 100, seed=seed)
    for label, (indices, count) in enumerate(zip(drawn, counts, strict=True)):
        assert set(labels[indices]) <= {label}
        assert len(set(indices.tolist())) == len(indices)
        assert abs(len(indices) - Fraction(part * count, 100)) <= Fraction(1, 2)


@given(COUNTS, SEEDS)
def test_fraction_1_takes_every_image_once(counts, seed):
    labels = shuffled_labels(counts, seed)
    drawn = np.concatenate(stratify(labels, classes=len(counts), fraction=1.0, seed=seed))
    assert sorted(drawn.tolist()) == list(range(len(labels)))


def test_another_seed_draws_other_images():
    labels = shuffled_labels([50, 50], 0)
    first, second = (stratify(labels, classes=2, fraction=0.2, seed=seed) for seed in (0, 1))
    assert sorted(first[0]) != sorted(second[0])


def test_the_images_drawn_from_a_class_do_not_depend_on_other_classes():
    """Images are added to the second class and the first stays the same."""
    few = stratify(np.repeat([0, 1], [40, 10]), classes=2, fraction=0.5, seed=3)
    more = stratify(np.repeat([0, 1], [40, 30]), classes=2, fraction=0.5, seed=3)
    assert few[0].tolist() == more[0].tolist()


@given(COUNTS, SEEDS, st.integers(1, 99))
def test_training_and_validation_images_are_disjoint_and_together_all(counts, seed, part):
    labels = shuffled_labels(counts, seed)
    drawn = stratify(labels, classes=len(counts), fraction=1.0, seed=seed)
    train, validate = split_validation(drawn, validation=part / 100)
    assert sorted([*train, *validate]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels[validate]) == set(range(len(counts)))


@pytest.mark.parametrize(
    ("images", "validation", "expected"), [(2, 0.1, 1), (2, 0.9, 1), (40, 0.1, 4), (14, 0.1, 1)]
)
def test_the_validation_share_is_rounded_and_each_class_has_images_on_both_sides(
    images, validation, expected
):
    _, validate = split_validation([np.arange(images), np.arange(images)], validation=validation)
    assert len(validate) == 2 * expected


@pytest.mark.parametrize(
    ("images", "fraction", "expected"), [(40, 0.05, 2), (500, 0.05, 25), (3, 0.5, 2), (7, 1.0, 7)]
)
def test_a_fraction_of_a_class_is_rounded_with_halves_up(images, fraction, expected):
    assert fraction_of(images, fraction) == expected


@given(st.integers(2, 10**7))
def test_the_suggested_smallest_fraction_is_enough_and_a_smaller_one_is_not(images):
    suggested = smallest_fraction(images)
    assert fraction_of(images, suggested) == 2
    assert suggested <= 1
    assert fraction_of(images, suggested - 0.11 * suggested) < 2 or images < 4


def test_four_fifths_of_each_class_of_digits_are_training_images():
    dataset = digits()
    train, test = dataset.train(), dataset.test()
    assert len(train.labels) + len(test.labels) == 1797  # the size scikit-learn documents
    in_train, in_test = Counter(train.labels.tolist()), Counter(test.labels.tolist())
    for label in range(10):
        total = in_train[label] + in_test[label]
        assert abs(in_train[label] - 0.8 * total) <= 0.5


def test_digits_keep_the_pixels_and_labels_of_scikit_learn():
    from sklearn.datasets import load_digits  # noqa: PLC0415

    loaded = load_digits()
    original = Counter(
        (label, tuple(int(value * 255 / 16 + 0.5) for value in image.ravel()))
        for label, image in zip(loaded.target.tolist(), loaded.images, strict=True)
    )
    dataset = digits()
    split_images = Counter(
        (label, tuple(pixels.ravel().tolist()))
        for split in (dataset.train(), dataset.test())
        for label, pixels in zip(split.labels.tolist(), split.pixels, strict=True)
    )
    assert split_images == original
