"""What is installed from a wheel has all that a checkout has: its launchers, and its ``conf``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, NETWORK, TINY, command, one_line


ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel of this checkout installs, and nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("conf", "launchers", "widthopt"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    subprocess.run([*PIP, *wheel], check=True)  # noqa: S603 (our own words)
    (built,) = folder.glob("*.whl")
    install = ("install", "-q", "--no-deps", "--target", folder / "there", built)
    subprocess.run([*PIP, *install], check=True)  # noqa: S603
    return folder / "there"


def started(folder, installed, *words, **environment):
    (folder / "my_network.py").write_text(NETWORK)
    return subprocess.run(  # noqa: S603
        words, cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": str(installed), **environment},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_is_started_from_a_wheel(installed, tmp_path):
    where = "import conf, launchers; print(conf.__file__, launchers.__file__)"
    said = started(tmp_path, installed, sys.executable, "-c", where).stdout.split()
    assert [one.startswith(str(installed)) for one in said] == [True] * 2
    words = command("-m", *TINY, "methods=[uniform]", "hydra/launcher=local")
    done = started(tmp_path, installed, *words)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/stages/train-*/result.json")
    assert json.loads(path.read_text())["result"]["found"]["method"] == "uniform"


@pytest.mark.slow
def test_slurms_launchers_are_in_a_wheel(installed, tmp_path):
    """They are found, and miss SLURM alone."""
    words = command("-m", *TINY, "hydra/launcher=slurm_8xv100")
    done = started(tmp_path, installed, *words, PATH=os.path.dirname(sys.executable))  # noqa: PTH120
    assert one_line(done, 2).startswith("hydra/launcher is one of SLURM's, but there is no squeue")
