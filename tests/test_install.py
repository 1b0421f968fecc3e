"""The two kinds of installation: one namespace, and a user's folder changes nothing."""

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
SWEEP = (*TINY, "methods=[uniform]", "hydra/launcher=local")
SHADOWED = ("queue.py", "random.py", "numpy.py", "conf/__init__.py", "launchers/__init__.py")
"""Modules of a user that have the names of Python's, of a dependency's and of our folders."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with what a wheel of this checkout installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("conf", "launchers", "widthopt"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    subprocess.run([*PIP, *build], check=True)  # noqa: S603 (fixed arguments)
    (built,) = folder.glob("*.whl")
    install = ("install", "-q", "--no-deps", "--target", folder / "target", built)
    subprocess.run([*PIP, *install], check=True)  # noqa: S603
    return folder / "target"


@pytest.fixture(params=["editable", "wheel"])
def python_path(request):
    """The folders of ``PYTHONPATH`` for an editable installation, and for a wheel."""
    return [] if request.param == "editable" else [str(request.getfixturevalue("wheel"))]


@pytest.fixture
def folder(tmp_path):
    """A user's folder whose modules raise an error if anything imports them."""
    (tmp_path / "my_network.py").write_text(NETWORK)
    for name in SHADOWED:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError({name!r})")
    return tmp_path


def run(folder, python_path, *words, **environment):
    python_path = os.pathsep.join(python_path)
    return subprocess.run(  # noqa: S603
        words, cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": python_path, **environment},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def script(folder, python_path, text):
    done = run(folder, python_path, sys.executable, "-c", text)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_installs_one_namespace(wheel):
    names = {path.name.partition("-")[0] for path in wheel.iterdir()}
    assert names == {"bin", "hydra_plugins", "widthopt"}
    assert [path.name for path in (wheel / "hydra_plugins").iterdir()] == ["widthopt_launchers"]
    configs = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert {
        path.relative_to(wheel / "widthopt" / "conf") for path in wheel.rglob("*.yaml")
    } == configs


@pytest.mark.slow
def test_modules_come_from_the_installation(tmp_path, python_path):
    text = (
        "import widthopt.conf, hydra_plugins.widthopt_launchers.worker as worker;"
        "print(widthopt.__file__, widthopt.conf.__file__, worker.__file__)"
    )
    start = python_path[0] if python_path else str(ROOT)
    assert all(path.startswith(start) for path in script(tmp_path, python_path, text).split())


@pytest.mark.slow
@pytest.mark.parametrize("words", [("-m", *SWEEP), (*TINY, "methods=[uniform]")])
def test_modules_of_a_users_folder_change_nothing(folder, python_path, words):
    """A local sweep, with its fork server and the processes of its runs, and a single run."""
    done = run(folder, python_path, *command(*words))
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("runs/stages/train-*/result.json")
    assert json.loads(path.read_text())["result"]["found"]["method"] == "uniform"


@pytest.mark.slow
def test_packages_on_pythonpath_change_nothing(folder, python_path, tmp_path_factory):
    foreign = tmp_path_factory.mktemp("foreign")
    for name in ("conf", "launchers"):
        (foreign / name).mkdir()
        (foreign / name / "__init__.py").write_text("raise ImportError")
    path = [str(foreign), *python_path]
    done = run(folder, path, *command("-m", *SWEEP))
    assert done.returncode == 0, done.stderr
    text = "import widthopt; print(widthopt.search(*%r, 'algorithm=uniform').macs)" % (TINY[:3],)
    assert int(script(folder, path, text)) > 0


@pytest.mark.slow
def test_the_library_searches_in_such_a_folder(folder, python_path):
    overrides = [*TINY, "algorithm=uniform"]
    overrides.remove("algorithm=morphnet")
    overrides.remove("algorithm.strength=5")
    text = f"import widthopt; print(widthopt.search(*{overrides}).channels)"
    assert "'stem" in script(folder, python_path, text)


@pytest.mark.slow
def test_slurms_launchers_are_in_a_wheel(wheel, folder):
    """They are found, and miss SLURM alone."""
    words = command("-m", *TINY, "hydra/launcher=slurm_8xv100")
    path = os.path.dirname(sys.executable)  # noqa: PTH120
    done = run(folder, [str(wheel)], *words, PATH=path)
    assert one_line(done, 2).startswith("hydra/launcher is one of SLURM's, but there is no squeue")


@pytest.mark.slow
def test_help_of_a_wheel_loads_no_torch(wheel, tmp_path):
    """Hydra imports every module that it finds below ``hydra_plugins``."""
    text = (
        "import sys; sys.argv = ['widthopt', '--help']\n"
        "from widthopt.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'submitit', 'wandb'} & set(sys.modules)))"
    )
    assert "heavy: []" in script(tmp_path, [str(wheel)], text)
