"""Files that are whole or absent: atomic writes, reads that say what is wrong, and locks."""

import errno
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from widthopt.errors import InputError


logger = logging.getLogger("widthopt")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write below ``folder`` into the one line a user needs.

    Raises:
        InputError: An `OSError` came out of the block: a full disk, a read-only folder.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        remedy = "make room and run the same again" if full else "name a folder you may write to"
        raise InputError(
            f"root is {folder}, but it cannot be written ({error.strerror or error}); {remedy}"
        ) from error


def write_through(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it.

    Raises:
        OSError: The system would not; part of the file may be there.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in ``folder``, where its file system can say so.

    Raises:
        OSError: The system could not write them.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such call
            raise
    finally:
        os.close(file)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Make ``content`` the file at ``path``; whatever happens, the old or the new is there whole.

    Raises:
        InputError: The disk is full or the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with writing(path.parent):
        try:
            write_through(beside, content.encode() if isinstance(content, str) else content)
            beside.replace(path)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def check_writable(root: Path) -> None:
    """Check, before any work, that results can be written below ``root``; make the folder.

    Raises:
        InputError: They cannot.
    """
    probe = root / f".writable.{secrets.token_hex(4)}"
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        try:
            write_through(probe, b"widthopt")
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def reading(path: Path, root: Path) -> Iterator[None]:
    """Turn the system's refusal to read ``path`` into the one line a user needs."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"root is {root}, but {path} cannot be read ({error.strerror or error}); "
            "name a folder you may read"
        ) from error


def read_json(path: Path, root: Path) -> Any | None:
    """What a JSON file says; None if it is not there, or with a warning if it is not whole."""
    found = None
    with reading(path, root):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    # Deeper than the program can follow is nothing that it wrote.
    with suppress(ValueError, RecursionError):
        found = json.loads(content.decode())
    if found is None:
        logger.warning("%s is not whole; it is treated as missing", path)
    return found


def make_folder(folder: Path) -> None:
    """Make a folder, and see that the disk has its name."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def try_lock(lock: int, kind: int) -> bool:
    """Whether the lock could be had at once; if so, it is."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(lock: int) -> None:
    """Let go of the lock, if it is held, and close its file."""
    # Not by closing alone: a child process may hold a copy of the descriptor.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
