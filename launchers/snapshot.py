"""Copies of the code, so that later edits do not change a pending job."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from widthopt.errors import InputError


MAX_FILES, MAX_MEGABYTES = 5_000, 200
"""Limits of a copy. More is not code: the folder is wrong, or a package contains data."""

_SKIPPED = {"__pycache__", "node_modules"}

_NOT_CODE = ("pyvenv.cfg", "conda-meta", "stages/store.json")
"""Files of a virtual environment, a Conda environment and a folder of runs."""

OWN = "own"
"""The folder in a copy for a user's own code. A job appends it to ``sys.path``, so that a user's
``random.py`` does not hide Python's."""

_MAX_ENTRIES = 100
"""A folder with more entries, none of them a module, holds data and is not searched."""


def snapshot(packages: Sequence[str], folders: Sequence[str], *, into: Path) -> Path:
    """Copy code into a folder that is named by its content. The same code is copied once.

    Args:
        packages: Names of installed packages.
        folders: Folders with a user's own modules and packages.
        into: The folder of all copies.

    Returns:
        The copy. Packages are importable from it, and a user's own code from `OWN` in it.

    Raises:
        InputError: A folder does not exist, or the code is larger than the limits.
    """
    files = _files(packages, folders)
    contents = {name: path.read_bytes() for name, path in sorted(files.items())}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    copy = into / digest.hexdigest()[:12]
    if copy.is_dir():
        return copy
    partial = into / f".{copy.name}.{uuid.uuid4().hex}.part"
    try:
        partial.mkdir(parents=True)
        for name, content in contents.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if not copy.is_dir():
            partial.rename(copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return copy


def _files(packages: Sequence[str], folders: Sequence[str]) -> dict[str, Path]:
    """Return the source of each file of a copy, by its path in the copy."""
    files: dict[str, Path] = {}
    for name in packages:
        module_file = import_module(name).__file__
        assert module_file is not None
        folder = Path(module_file).parent
        for path in _package_files(folder):
            files[f"{name.replace('.', '/')}/{path.relative_to(folder)}"] = path
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(
                f"hydra.launcher.code is {folder}, but there is no such folder; correct it"
            )
        for path in _importable_files(folder):
            files.setdefault(f"{OWN}/{path.relative_to(folder)}", path)
        size = sum(path.stat().st_size for path in files.values())
        if len(files) > MAX_FILES or size > MAX_MEGABYTES * 1e6:
            raise InputError(
                f"hydra.launcher.code is {folder}, but it has more than {MAX_FILES} files or "
                f"{MAX_MEGABYTES} MB of code; start in the folder of your own modules, or name it"
            )
    return files


def _package_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a package without compiled ones."""
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if name not in _SKIPPED and name[0] != ".")
        yield from (Path(place, name) for name in sorted(files) if not name.endswith(".pyc"))


def _importable_files(folder: Path) -> Iterator[Path]:
    """Yield what Python can import from a folder: modules, packages, and namespace packages."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.is_file():
            yield path
        elif (path / "__init__.py").is_file():
            yield from _package_files(path)
        elif path.is_dir() and _may_hold_code(path):
            yield from _importable_files(path)


def _may_hold_code(folder: Path) -> bool:
    """Return whether a folder without ``__init__.py`` may be a namespace package."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    has_data = len(names) > _MAX_ENTRIES and not any(name.endswith(".py") for name in names)
    is_loop = folder.parent.resolve().is_relative_to(folder.resolve())
    is_name = folder.name.isidentifier() and folder.name not in _SKIPPED
    return (
        is_name
        and not has_data
        and not is_loop
        and not any((folder / name).exists() for name in _NOT_CODE)
    )
