"""Faults that tests notice: each is put into a copy of the project, and its test has to fail there.

A file of faults has a list ``fault``, each with ``what`` it is, the ``test`` that notices it, and
``edit``, one or several: in ``file``, the only place that reads ``old`` reads ``new``.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FAULTS = [
    pytest.param(fault, id=f"{path.stem}: {fault['what']}")
    for path in sorted(Path(__file__).parent.glob("*.toml"))
    for fault in tomllib.loads(path.read_text())["fault"]
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
"""What tests read."""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
SECONDS = 300


def put_into(root, fault):
    """Make a fault's edits in the project at a root."""
    for edit in fault["edit"]:
        path = root / edit["file"]
        before = path.read_text()
        count = before.count(edit["old"])
        assert count == 1, f"{edit['file']} has {count} places that read:\n{edit['old']}"
        path.write_text(before.replace(edit["old"], edit["new"]))


def copied(root, *, names):
    """Those parts of the project in a folder of their own."""
    for name in names:
        ignored = shutil.ignore_patterns("__pycache__", "mutants")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_place_in_the_code_and_its_test(tmp_path, fault):
    copied(tmp_path, names=sorted({edit["file"].split("/")[0] for edit in fault["edit"]}))
    put_into(tmp_path, fault)
    for edit in fault["edit"]:
        compile((tmp_path / edit["file"]).read_text(), edit["file"], "exec")
    file, name = fault["test"].split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.mutant
@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_of_a_fault_notices_it(tmp_path, fault):
    copied(tmp_path, names=PARTS)
    put_into(tmp_path, fault)
    ran = subprocess.run(  # noqa: S603 (our own tests)
        [*PYTEST, f"tests/{fault['test']}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout[-3000:] + ran.stderr[-1000:]
