"""Copies of code: named by what is in them, and all that Python needs."""

import subprocess
import sys

import pytest

from hydra_plugins.widthopt_launchers import snapshot as module
from hydra_plugins.widthopt_launchers.snapshot import snapshot
from widthopt.errors import InputError


PACKAGES = ("widthopt", "widthopt.conf", "hydra_plugins.widthopt_launchers")


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    (folder / "package" / "__pycache__").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "my_network.py").write_text("VALUE = 1")
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "table.csv").write_text("1,2")
    (folder / "package" / "__pycache__" / "old.pyc").write_text("")
    (folder / "data" / "script.py").write_text("VALUE = 3")
    (folder / "data" / "table.csv").write_text("1,2")
    (folder / "notes.txt").write_text("no code")
    return folder


def test_a_copy_is_what_python_would_import(mine, tmp_path):
    copy = snapshot([], [str(mine)], into=tmp_path)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {
        "data/script.py", "my_network.py", "package/__init__.py", "package/table.csv",
    }  # fmt: skip


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta/history", "stages/store.json"])
def test_environments_and_runs_are_not_copied(mine, tmp_path, mark):
    before = snapshot([], [str(mine)], into=tmp_path)
    module = mine / "other" / "code" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("VALUE = 4")
    (mine / "other" / mark).parent.mkdir(exist_ok=True)
    (mine / "other" / mark).write_text("")
    assert snapshot([], [str(mine)], into=tmp_path) == before


def test_folders_of_data_are_not_searched_and_a_way_back_is_no_loop(mine, tmp_path):
    before = snapshot([], [str(mine)], into=tmp_path)
    for number in range(101):
        (mine / "images" / f"class{number}").mkdir(parents=True)
    (mine / "images" / "class0" / "module.py").write_text("VALUE = 5")
    (mine / "back").symlink_to(mine)
    assert snapshot([], [str(mine)], into=tmp_path) == before


def test_the_same_code_is_copied_once_and_other_code_beside_it(mine, tmp_path):
    first = snapshot([], [str(mine)], into=tmp_path)
    assert snapshot([], [str(mine)], into=tmp_path) == first
    (mine / "my_network.py").write_text("VALUE = 2")
    second = snapshot([], [str(mine)], into=tmp_path)
    assert second != first
    assert (first / "my_network.py").read_text() == "VALUE = 1"
    assert not list(tmp_path.glob(".*"))


def test_python_runs_from_a_copy_alone(mine, tmp_path):
    copy = snapshot(PACKAGES, [str(mine)], into=tmp_path)
    modules = (
        "widthopt.conf", "data.script", "hydra_plugins.widthopt_launchers.worker", "my_network",
        "widthopt.runs.store",
    )  # fmt: skip
    script = (
        f"import {', '.join(modules)}\nprint({', '.join(f'{name}.__file__' for name in modules)})"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=True
    )
    assert all(word.startswith(str(copy)) for word in done.stdout.split()), done.stdout
    assert (copy / "widthopt" / "conf" / "config.yaml").exists()


def test_a_package_comes_before_a_users_module_of_its_name(mine, tmp_path):
    (mine / "widthopt").mkdir()
    (mine / "widthopt" / "__init__.py").write_text("raise ValueError")
    copy = snapshot(PACKAGES, [str(mine)], into=tmp_path)
    assert "raise ValueError" not in (copy / "widthopt" / "__init__.py").read_text()


def test_a_folder_that_is_no_code_is_refused(mine, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^hydra.launcher.code is nowhere, but there is no such"):
        snapshot([], ["nowhere"], into=tmp_path)
    for bound in ("MAX_FILES", "MAX_MEGABYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(module, bound, 0)
            with pytest.raises(InputError, match=r"but it has more than .* of code; start in"):
                snapshot([], [str(mine)], into=tmp_path)
    snapshot([], [str(mine)], into=tmp_path)
