"""The tracking files in the folder of a run; only their content is sent to W&B.

A run that was resumed, or whose server was unreachable, is sent again from these files.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from widthopt.files import write_atomically
from widthopt.tracking.secrets import redact


@dataclass(slots=True)
class End:
    """The outcome of a run, with its results.

    Attributes:
        code: The exit code; 0 for a finished run.
        preempted: Whether the run was interrupted and will be resumed.
        why: The error of a failed run in one line; empty otherwise.
        summary: Results by name.
        media: Pictures (PNG) and tables (CSV) by name, as paths relative to the run's folder.
    """

    code: int = 0
    preempted: bool = False
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    media: dict[str, str] = field(default_factory=dict)


class TrackingFiles:
    """The tracking files of one run.

    Attributes:
        folder: The run's folder.
        metrics: The file of the rows. Each line is a JSON object with ``step``, ``time`` in
            seconds, and numbers by name. Readers ignore an incomplete last line.
        widths: The file of the widths, written at the end of the run.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: The run's folder."""
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.widths = folder / "widths.json"
        self._tracking = folder / "tracking"
        self._pending = b""

    def cut(self, step: float) -> None:
        """Remove the rows after a step. It needs no free space, so it works on a full disk."""
        if self.metrics.exists():
            ends = [end for row, end in self.rows() if row["step"] <= step]
            os.truncate(self.metrics, max(ends, default=0))

    def append(self, *rows: Mapping[str, Any], durable: bool = False) -> None:
        """Append rows, preceded by rows that could not be written earlier.

        Args:
            rows: The rows.
            durable: Whether to wait until the disk has all rows.

        Raises:
            OSError: The file cannot be written; it is unchanged, and the rows are kept in memory.
        """
        self._pending += b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with self.metrics.open("ab") as file:
                file.write(self._pending)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.metrics, size)
            raise
        self._pending = b""

    def rows(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each complete row from a byte offset on, with the offset of its end."""
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    start += len(line)
                    yield json.loads(line), start

    def begin(self, init: Mapping[str, Any]) -> None:
        """Write the arguments of ``wandb.init``, and remove the outcome of an earlier attempt."""
        self._tracking.mkdir(parents=True, exist_ok=True)
        (self._tracking / "end.json").unlink(missing_ok=True)
        self._write("wandb.json", redact(init))

    def write_end(self, end: End) -> None:
        """Write the outcome of the run."""
        self._write("end.json", redact(asdict(end)))

    @property
    def init(self) -> dict[str, Any] | None:
        """The arguments of ``wandb.init``; None if the run is not sent to W&B."""
        return self._read("wandb.json")

    @property
    def end(self) -> End | None:
        """The outcome of the run; None while it runs, or if its process was killed."""
        content = self._read("end.json")
        return None if content is None else End(**content)

    @property
    def is_fully_synced(self) -> bool:
        """Whether a server has the current content of all files."""
        return self._read("synced.json") == {"sha256": self._fingerprint()}

    def mark_synced(self) -> None:
        """Record that a server has the current content, also for ``wandb sync``."""
        for segment in self.folder.glob("wandb/offline-run-*/run-*.wandb"):
            segment.with_name(f"{segment.name}.synced").touch()
        self._write("synced.json", {"sha256": self._fingerprint()})

    def open_lock(self) -> tuple[int, bool]:
        """Open the lock file of the run, and try to acquire the lock.

        A process holds the lock while it executes or sends the run.

        Returns:
            The file descriptor, whose copies share the lock, and whether the lock was acquired.
        """
        self._tracking.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._tracking / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(BlockingIOError):
            flock(lock, LOCK_EX | LOCK_NB)
            return lock, True
        return lock, False

    def _fingerprint(self) -> str:
        """Hash all content that is sent to a server."""
        names = ["tracking/wandb.json", "tracking/end.json", self.metrics.name, self.widths.name]
        digest = hashlib.sha256()
        for path in (self.folder / name for name in (*names, *(self.end or End()).media.values())):
            digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
        return digest.hexdigest()

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._tracking / name
        content: dict[str, Any] | None = json.loads(path.read_bytes()) if path.is_file() else None
        return content

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self._tracking / name, json.dumps(content, indent=2) + "\n")
