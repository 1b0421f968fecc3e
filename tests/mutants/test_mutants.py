"""Mutation tests: put a known fault into a copy of the project; the named test must fail there.

Each ``*.toml`` file lists mutants under ``fault``: ``what`` describes the fault, ``test`` names
the test that must fail, and ``edit`` (one or several) replaces ``old``, which occurs once in
``file``, by ``new``.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
MUTANTS = [
    pytest.param(mutant, id=f"{path.stem}: {mutant['what']}")
    for path in sorted(Path(__file__).parent.glob("*.toml"))
    for mutant in tomllib.loads(path.read_text())["fault"]
]
PARTS = [
    "README.md",
    "conf",
    "docs",
    "launchers",
    "pyproject.toml",
    "setup.cfg",
    "tests",
    "widthopt",
]
"""The files and folders that tests read."""
INSTALLED = {"widthopt/conf": "conf", "hydra_plugins/widthopt_launchers": "launchers"}
"""Where ``setup.cfg`` installs the folders whose import name differs from their path."""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
TIMEOUT_SECONDS = 300


def apply_mutant(root, mutant):
    """Edit the copy of the project at ``root``."""
    for edit in mutant["edit"]:
        path = root / edit["file"]
        before = path.read_text()
        count = before.count(edit["old"])
        assert count == 1, f"{edit['file']} has {count} places that read:\n{edit['old']}"
        path.write_text(before.replace(edit["old"], edit["new"]))


def copy_project(root, *, names):
    """Copy the named parts of the project to ``root``."""
    for name in names:
        ignored = shutil.ignore_patterns("__pycache__", "mutants")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)


def run_in_copy(root, command):
    """Run a command that imports every package of the project from the copy at ``root``."""
    for package, folder in INSTALLED.items():
        link = root / package
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(root / folder, target_is_directory=True)
    return subprocess.run(  # noqa: S603 (runs this project's own code)
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_applies_and_names_a_test(tmp_path, mutant):
    for edit in mutant["edit"]:
        (tmp_path / edit["file"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / edit["file"], tmp_path / edit["file"])
    apply_mutant(tmp_path, mutant)
    for edit in mutant["edit"]:
        if edit["file"].endswith(".py"):
            compile((tmp_path / edit["file"]).read_text(), edit["file"], "exec")
    file, name = mutant["test"].split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text()


def test_the_copy_imports_all_its_packages_from_itself(tmp_path):
    """Else a mutant in conf/ or launchers/ would never run."""
    copy_project(tmp_path, names=PARTS)
    code = (
        "import hydra_plugins.widthopt_launchers as a, widthopt.conf as b, widthopt as c\n"
        "import os\n"
        "for m in (a, b, c): print(os.path.realpath(m.__path__[0]))"
    )
    ran = run_in_copy(tmp_path, [sys.executable, "-c", code])
    places = [str((tmp_path / name).resolve()) for name in ("launchers", "conf", "widthopt")]
    assert ran.stdout.split() == places, ran.stderr


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_named_test_fails_on_the_mutant(tmp_path, mutant):
    copy_project(tmp_path, names=PARTS)
    apply_mutant(tmp_path, mutant)
    ran = run_in_copy(tmp_path, [*PYTEST, f"tests/{mutant['test']}"])
    assert ran.returncode == 1, ran.stdout[-3000:] + ran.stderr[-1000:]
