"""Random draws that depend only on (seed, purpose, step).

No rng of the package lives longer than one purpose and step, so a draw does not depend on the
step at which a run resumes or on the world size.
"""

import hashlib
import random


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return the seed of one purpose and step: an integer in [0, 2**63).

    Args:
        seed: The seed of the run.
        purpose: The purpose of the draw, then the step, for example ``("augmentation", 120)``.
            Different purposes give unrelated seeds.

    Returns:
        The first 63 bits of the SHA-256 of the arguments.
    """
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> random.Random:
    """Return a Python rng for one purpose and step; see `derive_seed`."""
    return random.Random(derive_seed(seed, *purpose))  # noqa: S311 (not for secrets)
