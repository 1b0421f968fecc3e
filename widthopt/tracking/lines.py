"""The rows of one run in a file of its own: one JSON object a line, in the order of the steps."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from widthopt.files import write_atomically


Row = Mapping[str, Any]
"""What was seen at one step: ``step``, ``time`` in seconds, and numbers by name."""


class Lines:
    """The file, which always ends with a whole line.

    What the disk will not take is tried again with whatever comes next.
    """

    def __init__(self, path: Path) -> None:
        """Args: path: Where it is, or will be."""
        self._path = path
        self._file: int | None = None
        self._size = 0
        self._cut = math.inf
        self._left = b""  # what the disk would not take

    def cut(self, step: float) -> list[Row]:
        """The rows up to this step; what lies behind them is removed from the file.

        Raises:
            OSError: The disk would not.
            InputError: The same.
        """
        self._close()
        self._cut = step
        return self._open()

    def add(self, row: Row) -> None:
        """Write a row; with it those that the disk would not take before.

        Raises:
            OSError: The disk would not; the file is as it was.
            InputError: The same.
        """
        self._left += _line(row).encode()
        self._write()

    def keep(self) -> None:
        """Wait until the disk has all rows.

        Raises:
            OSError: It would not.
            InputError: The same.
        """
        self._write()
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """The same, and let go of the file.

        Raises:
            OSError: The disk would not.
            InputError: The same.
        """
        try:
            self.keep()
        finally:
            self._close()

    def _open(self) -> list[Row]:
        kept = [row for row in rows(self._path) if row["step"] <= self._cut]
        content = text(kept).encode()
        if not self._path.exists() or self._path.read_bytes() != content:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, content)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._size = len(content)
        return kept

    def _write(self) -> None:
        if not self._left:
            return
        if self._file is None:
            self._open()
        assert self._file is not None
        try:
            written = 0
            while written < len(self._left):
                written += os.write(self._file, self._left[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(self._left)
        self._left = b""

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def rows(path: Path) -> list[Row]:
    """The rows of a file; what was cut short, and all behind it, is left out."""
    found: list[Row] = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict) or "step" not in row:
            break
        found.append(row)
    return found


def text(told: Iterable[Row]) -> str:
    """The file of these rows."""
    return "".join(map(_line, told))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
