"""Snapshots of code: named by their content, with all files that Python needs."""

import subprocess
import sys

import pytest

from hydra_plugins.widthopt_launchers import snapshot as module
from hydra_plugins.widthopt_launchers.snapshot import snapshot
from widthopt.errors import InputError


PACKAGES = ("widthopt", "widthopt.conf", "hydra_plugins.widthopt_launchers")


@pytest.fixture
def code_folder(tmp_path):
    """A folder with code, caches, data and notes."""
    folder = tmp_path / "code"
    (folder / "package" / "__pycache__").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "my_network.py").write_text("VALUE = 1")
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "table.csv").write_text("1,2")
    (folder / "package" / "__pycache__" / "old.pyc").write_text("")
    (folder / "data" / "script.py").write_text("VALUE = 3")
    (folder / "data" / "table.csv").write_text("1,2")
    (folder / "notes.txt").write_text("not code")
    return folder


def test_a_snapshot_has_the_files_that_python_imports(code_folder, tmp_path):
    copy = snapshot([], [str(code_folder)], into=tmp_path)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {
        "own/data/script.py", "own/my_network.py", "own/package/__init__.py",
        "own/package/table.csv",
    }  # fmt: skip


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta/history", "stages/store.json"])
def test_environments_and_runs_are_not_copied(code_folder, tmp_path, mark):
    before = snapshot([], [str(code_folder)], into=tmp_path)
    module = code_folder / "other" / "code" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("VALUE = 4")
    (code_folder / "other" / mark).parent.mkdir(exist_ok=True)
    (code_folder / "other" / mark).write_text("")
    assert snapshot([], [str(code_folder)], into=tmp_path) == before


def test_data_folders_are_skipped_and_link_cycles_cause_no_loop(code_folder, tmp_path):
    before = snapshot([], [str(code_folder)], into=tmp_path)
    for number in range(101):
        (code_folder / "images" / f"class{number}").mkdir(parents=True)
    (code_folder / "images" / "class0" / "module.py").write_text("VALUE = 5")
    (code_folder / "back").symlink_to(code_folder)
    assert snapshot([], [str(code_folder)], into=tmp_path) == before


def test_unchanged_code_is_copied_once_and_changed_code_again(code_folder, tmp_path):
    first = snapshot([], [str(code_folder)], into=tmp_path)
    assert snapshot([], [str(code_folder)], into=tmp_path) == first
    (code_folder / "my_network.py").write_text("VALUE = 2")
    second = snapshot([], [str(code_folder)], into=tmp_path)
    assert second != first
    assert (first / "own" / "my_network.py").read_text() == "VALUE = 1"
    assert not list(tmp_path.glob(".*"))


def test_python_runs_from_a_snapshot_only(code_folder, tmp_path):
    copy = snapshot(PACKAGES, [str(code_folder)], into=tmp_path)
    modules = (
        "widthopt.conf", "data.script", "hydra_plugins.widthopt_launchers.worker", "my_network",
        "widthopt.runs.store",
    )  # fmt: skip
    script = (
        "import sys; sys.path.append(sys.argv[1])\n"
        f"import {', '.join(modules)}\nprint({', '.join(f'{name}.__file__' for name in modules)})"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, copy / "own"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(word.startswith(str(copy)) for word in done.stdout.split()), done.stdout
    assert (copy / "widthopt" / "conf" / "config.yaml").exists()


def test_a_package_takes_precedence_over_a_user_module_of_its_name(code_folder, tmp_path):
    (code_folder / "widthopt").mkdir()
    (code_folder / "widthopt" / "__init__.py").write_text("raise ValueError")
    copy = snapshot(PACKAGES, [str(code_folder)], into=tmp_path)
    assert "raise ValueError" not in (copy / "widthopt" / "__init__.py").read_text()


def test_a_missing_or_too_large_folder_is_refused(code_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^hydra.launcher.code is nowhere, but there is no such"):
        snapshot([], ["nowhere"], into=tmp_path)
    for bound in ("MAX_FILES", "MAX_MEGABYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(module, bound, 0)
            with pytest.raises(InputError, match=r"but it has more than .* of code; start in"):
                snapshot([], [str(code_folder)], into=tmp_path)
    snapshot([], [str(code_folder)], into=tmp_path)
