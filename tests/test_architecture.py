"""The rows of the design, read from the imports."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "widthopt"

# A module imports only from rows above its own; the modules inside one folder count as one.
ROWS = [
    ["errors"],
    ["seeds", "setting", "widthgraph", "identity"],
    ["widths", "projection", "store", "operators"],
    ["extrapolation"],  # solves alpha with widths
    ["tracing", "networks", "data", "devices", "checkpoints", "distributed"],
    ["surgery", "tracking"],
    ["supernet"],
    ["evaluation"],
    ["training"],
    ["algorithms"],
    ["records"],  # what figures read and the pipeline writes
    ["pipeline", "figures", "costs"],
    ["planning"],
    ["config", "report", "dashboard"],
    ["sweeps"],
    ["control"],
    ["__main__"],
]
PURE = {"errors", "seeds", "setting", "widthgraph", "identity", "widths", "projection", "store"}
PURE |= {"extrapolation"}
HEAVY = {"torch", "torchvision", "numpy", "timm"}
MAY_LAUNCH = {"config", "sweeps", "control", "__main__"}

PLACE = {module: number for number, row in enumerate(ROWS) for module in row}


def module_of(path):
    """The row's name of a file: that of its module or of its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source):
    """Dotted names that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{one.name}" for one in node.names)


def faults(module, source):
    """What the rows forbid in a module's source."""
    found = []
    for name in imports(source):
        package, *rest = name.split(".")
        if package == "launchers" and module not in MAY_LAUNCH:
            found.append(f"{module} imports {name}")
        if package in HEAVY and module in PURE:
            found.append(f"{module} imports {name}")
        if package != "widthopt" or not rest or rest[0] == module:
            continue
        if PLACE[rest[0]] >= PLACE[module]:
            found.append(f"{module} imports {rest[0]}, which is not in a row above it")
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rows_above_its_own(path):
    assert module_of(path) in PLACE, "give the module a row in the design and here"
    assert faults(module_of(path), path.read_text()) == []


def test_the_package_itself_imports_no_module_until_a_name_is_asked_for():
    assert list(imports((PACKAGE / "__init__.py").read_text())) == [
        "importlib.import_module",
        "typing.Any",
    ]


LAUNCHERS = ROOT / "launchers"


@pytest.mark.parametrize("path", sorted(LAUNCHERS.rglob("*.py")), ids=lambda path: path.name)
def test_launchers_know_nothing_of_widths(path):
    """They are given the names of what plans a sweep and of what does one run."""
    known = {"widthopt.errors", "widthopt.identity", "widthopt.store"}
    for name in imports(path.read_text()):
        package = ".".join(name.split(".")[:2])
        assert not name.startswith("widthopt") or package in known
        assert name.split(".")[0] not in HEAVY


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("widths", "import torch"),
        ("widths", "def f():\n    from numpy import array"),
        ("widths", "from widthopt.extrapolation import stack_blocks"),
        ("widths", "from widthopt import projection"),
        ("tracing", "import widthopt.surgery"),
        ("surgery", "from launchers import slurm"),
        ("networks", "from widthopt.tracing import trace"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("extrapolation", "from widthopt.widths import match_macs"),
        ("tracing", "from widthopt.tracing.labels import Channels"),
        ("tracing", "import torch\nfrom widthopt.widthgraph import Run"),
        ("__main__", "from launchers import slurm\nfrom widthopt import config"),
    ],
)
def test_an_import_from_a_row_above_is_no_fault(module, source):
    assert faults(module, source) == []
