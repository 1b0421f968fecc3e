"""The import order of the packages, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import widthopt


ROOT = Path(__file__).parents[1]
LAUNCHERS = "hydra_plugins.widthopt_launchers"

# A module imports only from rows above its own. The modules of one package count as one.
ROWS = [
    # The pure core: no torch, no Hydra.
    ["errors"],
    ["seeds", "setting", "widthgraph", "identity"],
    ["files", "widths", "projection"],
    ["extrapolation", "records"],
    ["training", "tracing"],
    ["networks", "tracking"],
    ["data"],
    ["algorithms"],
    ["request"],
    ["runs"],
    ["launchers"],
    ["config"],
    ["reporting"],
    ["sweeps"],
    ["cli"],
    ["__main__"],
]
PLACE = {module: number for number, row in enumerate(ROWS) for module in row}
PURE = {module for row in ROWS[:4] for module in row}
HEAVY = {"torch", "torchvision", "numpy", "timm", "hydra"}
LAUNCHERS_KNOW = {
    "widthopt.errors", "widthopt.files", "widthopt.identity", "widthopt.runs.states",
}  # fmt: skip
"""What launchers may import: they know tasks and files, and nothing about widths."""


def imports(source):
    """Dotted names that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(name):
    """The row's name of an imported name, or None if the name is not ours."""
    if name == LAUNCHERS or name.startswith(f"{LAUNCHERS}."):
        return "launchers"
    top, *rest = name.split(".")
    return rest[0] if top == "widthopt" and rest and rest[0] in PLACE else None


def faults(module, source):
    """What the rows forbid in a module's source."""
    result = []
    for name in imports(source):
        top, package = name.split(".")[0], package_of(name)
        if module in PURE and top in HEAVY:
            result.append(f"{module} imports {name}")
        if module == "launchers" and top in HEAVY - {"hydra"}:
            result.append(f"{module} imports {name}")
        if package is None or package == module:
            continue
        if PLACE[package] >= PLACE[module]:
            result.append(f"{module} imports {package}, which is not in a row above it")
        elif module == "launchers" and not name.startswith(tuple(LAUNCHERS_KNOW)):
            result.append(f"{module} imports {name}")
    return result


def sources():
    """Every source file with the name of its row."""
    for path in sorted((ROOT / "widthopt").rglob("*.py")):
        parts = path.relative_to(ROOT / "widthopt").parts
        if parts != ("__init__.py",):
            yield parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "launchers").rglob("*.py")):
        yield "launchers", path


@pytest.mark.parametrize(
    ("module", "path"),
    [pytest.param(*pair, id=str(pair[1].relative_to(ROOT))) for pair in sources()],
)
def test_a_module_imports_only_from_rows_above_its_own(module, path):
    assert module in PLACE, "give the module a row here and in CONTRIBUTING.md"
    assert faults(module, path.read_text()) == []


def test_every_row_names_a_module_that_exists():
    assert {module for module, _ in sources()} == PLACE.keys()


def test_the_package_imports_no_module_until_a_name_is_used():
    script = (
        "import sys, widthopt; before = set(sys.modules); widthopt.InputError;"
        "print(sorted(n for n in before if n.startswith(('widthopt.', 'torch', 'hydra'))));"
        "print(sorted(n for n in set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.splitlines() == ["[]", "['widthopt.errors']"]


def test_dir_shows_the_public_names_and_each_can_be_imported():
    assert set(widthopt.__all__) <= set(dir(widthopt))
    assert [name for name in widthopt.__all__ if not callable(getattr(widthopt, name))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("widths", "import torch"),
        ("widths", "def f():\n    from numpy import array"),
        ("widths", "from widthopt.extrapolation import stack_blocks"),
        ("widths", "from widthopt import projection"),
        ("tracing", "import widthopt.networks.resize"),
        ("networks", f"from {LAUNCHERS} import slurm"),
        ("training", "from widthopt.networks import resize"),
        ("launchers", "from widthopt.runs.plan import Plan"),
        ("launchers", "import torch"),
        ("config", "from widthopt.reporting.console import show_plan"),
    ],
)
def test_a_forbidden_import_is_detected(module, source):
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("extrapolation", "from widthopt.widths import match_macs"),
        ("tracing", "from widthopt.tracing.labels import Channels"),
        ("tracing", "import torch\nfrom widthopt.widthgraph import Span"),
        ("launchers", "from widthopt.runs.states import State"),
        ("cli", f"from {LAUNCHERS} import slurm\nfrom widthopt import config"),
    ],
)
def test_an_import_from_a_row_above_is_allowed(module, source):
    assert faults(module, source) == []
