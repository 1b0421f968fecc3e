"""Random draws that depend on nothing but (seed, purpose, step).

Nothing in the package draws from a generator that lives longer than one purpose and one
step, so resuming at any step, or running on any number of ranks, changes no draw.
"""

import hashlib
import random


def derived_seed(seed: int, *purpose: str | int) -> int:
    """The seed of one purpose and step: a whole number in [0, 2**63).

    Args:
        seed: The run's seed.
        purpose: What the draw is for, then the step it is for, for example
            ``("augmentation", 120)``. Different purposes give unrelated seeds.

    Returns:
        The first 63 bits of the SHA-256 of the arguments.
    """
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> random.Random:
    """Python's generator for one purpose and step; see `derived_seed`."""
    return random.Random(derived_seed(seed, *purpose))  # noqa: S311 (nothing here is a secret)
