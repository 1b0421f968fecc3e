"""The files that tracking keeps in a run's folder; W&B is sent nothing else.

A run that continues, or whose server was unreachable, is sent again from these files.
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
    """How a run ended, and its results.

    Attributes:
        code: The exit code; 0 if the run is done.
        preempted: Whether it was interrupted and will continue.
        why: The error of a failed run, in one line; empty otherwise.
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
        metrics: The rows: one JSON object a line, with ``step``, ``time`` in seconds, and numbers
            by name. The file always ends with a complete line.
        widths: The widths of the run, once it is done.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: The run's folder."""
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.widths = folder / "widths.json"
        self._tracking = folder / "tracking"
        self._pending = b""

    def cut(self, step: float) -> None:
        """Remove the rows after this step; needs no free space, so it works on a full disk."""
        if self.metrics.exists():
            ends = [end for row, end in self.rows() if row["step"] <= step]
            os.truncate(self.metrics, max(ends, default=0))

    def append(self, *rows: Mapping[str, Any], durable: bool = False) -> None:
        """Append rows, after those that could not be written before.

        Args:
            rows: The rows.
            durable: Whether to wait until the disk has all rows.

        Raises:
            OSError: The file cannot be written; it is left as it was.
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
        """Yield each complete row from a byte of the file on, and the byte after it."""
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    start += len(line)
                    yield json.loads(line), start

    def begin(self, init: Mapping[str, Any]) -> None:
        """Write what the run is, as arguments of ``wandb.init``, and remove its earlier end."""
        self._tracking.mkdir(parents=True, exist_ok=True)
        (self._tracking / "end.json").unlink(missing_ok=True)
        self._write("wandb.json", redact(init))

    def write_end(self, end: End) -> None:
        """Write how the run ended."""
        self._write("end.json", redact(asdict(end)))

    @property
    def init(self) -> dict[str, Any] | None:
        """Arguments of ``wandb.init``; None if the run is not to be sent to W&B."""
        return self._read("wandb.json")

    @property
    def end(self) -> End | None:
        """How the run ended; None while it runs, or if its process was killed."""
        content = self._read("end.json")
        return None if content is None else End(**content)

    @property
    def is_fully_synced(self) -> bool:
        """Whether a server has everything as it is now."""
        return self._read("synced.json") == {"sha256": self._fingerprint()}

    def mark_synced(self) -> None:
        """Record that a server has everything as it is now, for W&B's own tool too."""
        for segment in self.folder.glob("wandb/offline-run-*/run-*.wandb"):
            segment.with_name(f"{segment.name}.synced").touch()
        self._write("synced.json", {"sha256": self._fingerprint()})

    def open_lock(self) -> tuple[int, bool]:
        """Open the lock that is held by whoever runs or sends the run, and try to take it.

        Returns:
            The file descriptor, whose copies share the lock, and whether the lock was free.
        """
        self._tracking.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._tracking / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(BlockingIOError):
            flock(lock, LOCK_EX | LOCK_NB)
            return lock, True
        return lock, False

    def _fingerprint(self) -> str:
        """Hash everything that a server is sent."""
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
