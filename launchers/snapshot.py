"""The code as it is now, copied, so that nothing edited later changes a run that waits."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from widthopt.errors import InputError


MAX_FILES, MAX_MEGABYTES = 5_000, 200
"""More than this is no code: a folder was named by mistake, or a package has data in it."""

_NO_CODE = {"__pycache__", "node_modules"}

_OTHERS = ("pyvenv.cfg", "conda-meta", "stages/store.json")
"""What is in a folder of an environment of Python, or of runs and the copies beside them."""

OWN = "own"
"""The folder of a copy that holds a user's own code. It comes last on the path of a job, so that
a user's ``random.py`` does not stand in for Python's."""

_MANY = 100
"""A folder of more names than this, none of them a module, holds data; it is not searched."""


def snapshot(packages: Sequence[str], folders: Sequence[str], *, into: Path) -> Path:
    """Copy code into a folder that is named by its content; the same code is copied once.

    Args:
        packages: Names of packages to copy, wherever they were imported from.
        folders: Folders whose Python files and packages are copied, for a user's own code.
        into: Where copies are kept.

    Returns:
        The copy: a folder that Python can import the packages from, and from `OWN` in it the rest.

    Raises:
        InputError: There is far too much of it.
    """
    files = _files(packages, folders)
    contents = {name: path.read_bytes() for name, path in sorted(files.items())}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    copy = into / digest.hexdigest()[:12]
    if copy.is_dir():
        return copy
    beside = into / f".{copy.name}.{uuid.uuid4().hex}.part"
    try:
        beside.mkdir(parents=True)
        for name, content in contents.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if not copy.is_dir():
            beside.rename(copy)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return copy


def _files(packages: Sequence[str], folders: Sequence[str]) -> dict[str, Path]:
    """Where each file of a copy comes from, by its name in it."""
    files: dict[str, Path] = {}
    for name in packages:
        where = import_module(name).__file__
        assert where is not None
        for path in _within(Path(where).parent):
            files[f"{name.replace('.', '/')}/{path.relative_to(Path(where).parent)}"] = path
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(
                f"hydra.launcher.code is {folder}, but there is no such folder; correct it"
            )
        for path in _code(folder):
            files.setdefault(f"{OWN}/{path.relative_to(folder)}", path)
        size = sum(path.stat().st_size for path in files.values())
        if len(files) > MAX_FILES or size > MAX_MEGABYTES * 1e6:
            raise InputError(
                f"hydra.launcher.code is {folder}, but it has more than {MAX_FILES} files or "
                f"{MAX_MEGABYTES} MB of code; start in the folder of your own modules, or name it"
            )
    return files


def _within(folder: Path) -> Iterator[Path]:
    """The files of a package, without those that Python makes."""
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if name not in _NO_CODE and name[0] != ".")
        yield from (Path(place, name) for name in sorted(files) if not name.endswith(".pyc"))


def _code(folder: Path) -> Iterator[Path]:
    """What Python would import from a folder: its modules, its packages, and such in folders."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.is_file():
            yield path
        elif (path / "__init__.py").is_file():
            yield from _within(path)
        elif path.is_dir() and _may_hold_code(path):
            yield from _code(path)


def _may_hold_code(folder: Path) -> bool:
    """Whether a folder without ``__init__.py`` may be there to import modules from."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    data = len(names) > _MANY and not any(name.endswith(".py") for name in names)
    loop = folder.parent.resolve().is_relative_to(folder.resolve())
    name = folder.name.isidentifier() and folder.name not in _NO_CODE
    return name and not data and not loop and not any((folder / one).exists() for one in _OTHERS)
