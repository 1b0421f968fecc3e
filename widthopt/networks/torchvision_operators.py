"""Make torchvision importable with a torch that its compiled extension was not built for.

torchvision's wheel contains an extension that declares the operators ``nms`` and ``qnms``. It is
built for one build of torch. With another build (the CPU-only one, for example) it does not load,
and importing torchvision fails because it registers functions for operators that do not exist.
widthopt uses neither operator, so it is enough to declare them.

`widthopt` installs an import hook that calls `declare_operators` before torchvision is imported.
"""

from collections.abc import Iterable
from pathlib import Path

import torch


# A declaration lasts as long as its library object.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare_operators(folders: Iterable[str]) -> None:
    """Declare, without an implementation, the operators that nothing else has declared.

    Does nothing if torchvision's extension loads.

    Args:
        folders: Where the package torchvision is.
    """
    if any(_extension_loads(Path(folder)) for folder in folders):
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _extension_loads(folder: Path) -> bool:
    """Load torchvision's extension from a folder; return whether it loads into this torch."""
    for library in sorted(folder.glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
