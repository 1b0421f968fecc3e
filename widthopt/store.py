"""Results by content: what is done is a question that the disk can answer.

A *stage* is one piece of work, named by its kind and by everything that its result depends
on. It has one folder, ``<root>/<kind>-<key>``, with ``fields.json`` (what names it),
``result.json`` (written last, so that it is there only when the work is done) and ``lock``.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from widthopt import identity
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
            sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def writable(root: Path) -> None:
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


class Stage:
    """One piece of work: its folder, and its result once there is one.

    Attributes:
        kind: What sort of work, for example ``search``.
        fields: Plain data, everything that the result depends on.
        key: Twelve hex digits made from both; see `widthopt.identity.key`.
        folder: Where it lives; there once it has been claimed.
    """

    def __init__(self, root: Path, kind: str, fields: Any) -> None:
        self.kind = kind
        self.fields = fields
        self.key = identity.key(kind, fields)
        self.folder = root / f"{kind}-{self.key}"

    def result(self) -> dict[str, Any] | None:
        """The result, or None while there is none.

        A file that is not whole counts as none, with a warning: the work is done again.
        """
        path = self.folder / "result.json"
        try:
            result = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            result = None
        if isinstance(result, dict):
            return result
        logger.warning("%s is not whole; it is treated as missing", path)
        return None

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result; the last thing that the work does.

        Args:
            result: What JSON can hold, without infinities and not-a-numbers.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "result.json", text)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Work on this stage alone: whoever comes second waits until the first has left.

        Ask for `result` inside the claim, since the one before may have finished it. The
        claim ends with the process that holds it, however that ends. It is not reentrant.

        Raises:
            InputError: The folder cannot be written, or its file system has no locks.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with writing(self.folder):
                self._take(lock)
            self._describe()
            yield
        finally:
            # Not by closing alone: a child process may hold a copy of the descriptor.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _take(self, lock: int) -> None:
        """Wait for the lock."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process works on %s; waiting for it", self.folder)
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _describe(self) -> None:
        """Write what names this stage, unless it is there."""
        text = f'{{"kind":"{self.kind}","fields":{identity.canonical(self.fields)}}}\n'
        path = self.folder / "fields.json"
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomically(path, text)


class Store:
    """The stages below one root folder; nothing is written before a stage is claimed."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def stage(self, kind: str, fields: Any) -> Stage:
        """The stage of this kind (a word that can name a folder) and these fields."""
        return Stage(self.root, kind, fields)
