"""Make torchvision importable beside a torch that its compiled extension was not built for.

torchvision's wheel carries an extension with the operators ``nms`` and ``qnms``. It is built
for one build of torch, and where another is installed (the CPU-only one, for example) it
does not load, and importing torchvision then fails because it describes operators that
nobody declared. Nothing of ours uses them, so it is enough that they exist. Import this
module before torchvision.
"""

import importlib.util
from pathlib import Path

import torch


def _extension_loads() -> bool:
    """Whether torchvision's own extension loads into this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: importing it will say so
    for library in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


def _declare() -> torch.library.Library:
    """Declare, without an implementation, the operators that torchvision describes."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


# The declaration lasts as long as the library object does.
DECLARED = None if _extension_loads() else _declare()
