"""torchvision can be imported with a torch that its extension was not built for."""

import subprocess
import sys

import pytest


DECLARE = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""A program that declares the operators itself."""

DECLARE_NMS = DECLARE.replace('("nms", "qnms")', '("nms",)')

USE = """
import torch, torchvision
assert torch.ops.torchvision.nms.default and torch.ops.torchvision.qnms.default
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
assert torchvision.ops.box_iou(boxes, boxes)[0, 1] == 0.5
assert torchvision.models.resnet18(num_classes=3).fc.out_features == 3
"""


def run(script):
    done = subprocess.run(  # noqa: S603 (a fixed command)
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def extension_loads():
    """Whether torchvision can be imported here without widthopt."""
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0  # noqa: S603


@pytest.mark.parametrize(
    "script",
    [
        "import widthopt",
        "import widthopt.networks",
        "import widthopt.networks.zoo",
        "import torch, widthopt",
        "import widthopt, importlib; importlib.reload(widthopt)",
    ],
)
def test_torchvision_works_after_an_import_of_the_package(script):
    run(f"{script}\n{USE}")


@pytest.mark.parametrize(
    "script",
    [
        f"{DECLARE}\nimport widthopt",
        f"{DECLARE}\nimport widthopt.networks.zoo",
        f"import widthopt\n{DECLARE}",
        f"import widthopt.networks.resize\n{DECLARE}",
        f"{DECLARE_NMS}\nimport widthopt",
    ],
    ids=["before", "before-zoo", "after", "after-resize", "only nms"],
)
def test_a_program_may_declare_the_operators_itself(script):
    if extension_loads():
        pytest.skip("the extension of this torchvision declares the operators")
    run(f"{script}\n{USE}")


def test_nothing_is_declared_if_the_extension_loads(tmp_path):
    (tmp_path / "_C.so").touch()
    run(f"""
import torch
from widthopt.networks.torchvision_operators import declare_operators
libraries = []
torch.ops.load_library = libraries.append
declare_operators([{str(tmp_path)!r}])
assert libraries == [{str(tmp_path / "_C.so")!r}]
assert not hasattr(torch.ops.torchvision, "nms")
""")


def test_the_package_and_a_search_for_torchvision_do_not_import_torch():
    script = """
import importlib.util, sys, time
start = time.perf_counter()
import widthopt
seconds = time.perf_counter() - start
spec = importlib.util.find_spec("torchvision")
assert spec.origin.endswith("__init__.py") and spec.loader.is_package("torchvision")
assert "torch" not in sys.modules and "torchvision" not in sys.modules
print(seconds)
"""
    assert min(float(run(script)) for _ in range(3)) < 0.1


def test_torchvision_keeps_no_trace_of_the_import_hook():
    run("""
import widthopt, inspect, torchvision
from importlib.machinery import SourceFileLoader
assert type(torchvision.__spec__.loader) is type(torchvision.__loader__) is SourceFileLoader
assert "extension" in inspect.getsource(torchvision)
""")


def test_a_missing_torchvision_is_reported_as_usual():
    run("""
import sys, widthopt
sys.path[:] = []
sys.path_importer_cache.clear()
for finder in list(sys.meta_path):
    if "editable" in getattr(finder, "__module__", ""):
        sys.meta_path.remove(finder)
try:
    import torchvision
except ModuleNotFoundError as error:
    assert error.name == "torchvision" and "torch" not in sys.modules
else:
    raise AssertionError("it was imported")
""")


def test_a_module_of_the_same_name_is_imported_unchanged(tmp_path):
    (tmp_path / "torchvision.py").write_text("value = 3\n")
    run(f"""
import sys, widthopt
sys.path.insert(0, {str(tmp_path)!r})
import torchvision
assert torchvision.value == 3 and "torch" not in sys.modules
""")
