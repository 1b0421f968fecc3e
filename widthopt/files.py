"""Atomic writes, reads with one-line errors, and file locks."""

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
    """Turn an `OSError` of the block, which writes below ``folder``, into a one-line message.

    Raises:
        InputError: The block raised an `OSError`, for example on a full disk.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        remedy = "name a folder you may write to"
        if full:
            remedy = "make room on the disk and run the same command again"
        raise InputError(
            f"root is {folder}, but it cannot be written ({error.strerror or error}); {remedy}"
        ) from error


def write_through(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk.

    Raises:
        OSError: The write failed; part of the file may exist.
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
    """Wait until the names in ``folder`` are on the disk, if its file system supports that.

    Raises:
        OSError: The write failed.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not support it
            raise
    finally:
        os.close(file)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that ``path`` always is the complete old or the complete new file.

    Raises:
        InputError: The disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with writing(path.parent):
        try:
            write_through(part, content.encode() if isinstance(content, str) else content)
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def check_writable(root: Path) -> None:
    """Check, before any work, that results can be written below ``root``; create the folder.

    Raises:
        InputError: The folder cannot be written.
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
    """Turn an `OSError` of the block, which reads ``path``, into a one-line message.

    Raises:
        InputError: The block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"root is {root}, but {path} cannot be read ({error.strerror or error}); "
            "name a folder you may read"
        ) from error


def read_json(path: Path, root: Path) -> Any | None:
    """Return the content of a JSON file; None if it is missing, or incomplete (with a warning).

    Raises:
        InputError: The file cannot be read.
    """
    value = None
    with reading(path, root):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    # A file that is nested too deeply was not written by the program.
    with suppress(ValueError, RecursionError):
        value = json.loads(content.decode())
    if value is None:
        logger.warning("%s is incomplete; it is treated as missing", path)
    return value


def make_folder(folder: Path) -> None:
    """Create a folder and wait until its name is on the disk."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def try_lock(lock: int, kind: int) -> bool:
    """Lock an open file without waiting, and return whether that succeeded.

    Args:
        lock: File descriptor.
        kind: ``fcntl.LOCK_EX`` or ``fcntl.LOCK_SH``.
    """
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(lock: int) -> None:
    """Release the lock of an open file, if it is held, and close the file."""
    # Closing is not enough, because a child process may hold a copy of the descriptor.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def is_at(file: int, path: Path) -> bool:
    """Return whether ``path`` still names an open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
