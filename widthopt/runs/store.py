"""The store of results: one folder per search or training, named by its content.

A `StoreEntry` is named by its kind and by every value that its result depends on. Its folder,
``<root>/<kind>-<key>``, contains

- ``fields.json``: the values that it is named by;
- ``lock``: locked by the process that works on the entry; released when that process ends;
- ``claim.json``: the host and process id of that process. If the file exists and the lock is
  free, the process was killed;
- ``submission.json``: the job that was submitted for the entry;
- ``failed.json``: the error of the last attempt;
- ``result.json``: the result. It is written last and atomically, so it exists only if the work
  is done.

``<root>/store.json`` contains the version of this format. The *state* of an entry follows from
these files and from the live jobs of the queue, never from the clock.
"""

import fcntl
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from widthopt import identity
from widthopt.errors import InputError
from widthopt.files import (
    check_writable,
    is_at,
    make_folder,
    read_json,
    reading,
    try_lock,
    unlock,
    write_atomically,
    writing,
)
from widthopt.runs.states import State


logger = logging.getLogger("widthopt")


_ROOT_FORMAT = 2


_RESULT_FORMAT = 1


_FOLDER = re.compile(r"(.+)-[0-9a-f]{12}")


class Taken(Exception):  # noqa: N818 (not an error)
    """Another process works on the entry."""


class StoreEntry:
    """One search or training in the store: its folder, state and result.

    Attributes:
        kind: ``search`` or ``train``.
        fields: Every value that the result depends on, as plain data.
        key: Twelve hex digits, a hash of both; see `widthopt.identity.key`.
        folder: Folder of the entry. It is created when the entry is claimed or submitted.
    """

    def __init__(self, root: Path, kind: str, fields: Any) -> None:
        self.kind = kind
        self.fields = fields
        self.key = identity.key(kind, fields)
        self.folder = root / f"{kind}-{self.key}"
        self._job = ""

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None if the work is not done.

        An incomplete file is treated as missing, with a warning, so the work is repeated.

        Raises:
            InputError: The file was changed after it was written, or it cannot be read.
        """
        path = self.folder / "result.json"
        document = read_json(path, self.folder.parent)
        if document is None:
            return None
        with suppress(KeyError, TypeError):  # JSON of another form
            if identity.is_sealed(document, "result", format=_RESULT_FORMAT, key=self.key):
                result: dict[str, Any] = document["result"]
                return result
        raise InputError(
            f"root is {self.folder.parent}, but {path} was changed after it was written; "
            "restore it, or delete it to do the work again"
        )

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result. The entry is done after this call.

        Args:
            result: Values that JSON can represent; floats must be finite.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        sealed = identity.seal("result", result, format=_RESULT_FORMAT, key=self.key)
        self._describe()
        write_atomically(self.folder / "result.json", json.dumps(sealed, indent=2) + "\n")
        self._remove("failed.json")

    def fail(self, error: BaseException, *, rank: int = 0) -> None:
        """Record the error that ended the work. Call this inside of `claim`.

        If several processes work together, only the first error is recorded, because it
        causes the others.

        Args:
            error: The error.
            rank: Rank of the process that raised it.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        if self.failure() is not None:
            return
        self._describe()
        self._write(
            "failed.json",
            {
                "type": type(error).__qualname__,
                "message": str(error),
                "traceback": "".join(traceback.format_exception(error)),
                "host": os.uname().nodename,
                "process": os.getpid(),
                "rank": rank,
                "job": self._job,
                "time": time.time(),
            },
        )

    def forget_failure(self) -> None:
        """Remove the recorded error, because another attempt starts.

        Raises:
            InputError: The folder cannot be written.
        """
        self._remove("failed.json")

    def failure(self) -> dict[str, Any] | None:
        """Return what `fail` recorded for the last attempt, or None.

        Raises:
            InputError: The file cannot be read.
        """
        return self._read("failed.json")

    def record_job(self, job: str, **details: str) -> None:
        """Record the job that was submitted for this entry.

        Args:
            job: Its id in the queue.
            details: Further values to record, for example the path of its log.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        self._describe()
        self._write("submission.json", {"job": job, **details})

    def submission(self) -> dict[str, Any] | None:
        """Return what `record_job` recorded for the last job, or None.

        Raises:
            InputError: The file cannot be read.
        """
        return self._read("submission.json")

    def state(self, live: Collection[str] = ()) -> State:
        """Return the state, from the files and the queue. Nothing is written.

        The state is never "blocked", which depends on other entries: see `mark_blocked`.

        Args:
            live: The ids of pending and running jobs.

        Raises:
            InputError: A file cannot be read, or the result was changed.
        """
        with self._check_idle() as idle:
            if self.result() is not None:
                return "done"
            claim = self._read("claim.json")
            if not idle or _job(claim) in live:
                return "running"
            submission = self._read("submission.json")
            if _job(submission) in live:
                return "queued"
            if self.failure() is not None:
                return "failed"
            return "missing" if claim is None and submission is None else "stale"

    @contextmanager
    def claim(self, *, wait: bool = True, job: str = "") -> Iterator[None]:
        """Hold an exclusive claim on this entry. A second process waits for the first.

        Read `result` inside of the claim, because the previous holder may have finished the work.
        The claim ends when its process ends for any reason. It is not reentrant. The recorded
        error of an earlier attempt is removed.

        Args:
            wait: Whether to wait for a process that works on the entry.
            job: The job that this process belongs to, if any; see `current_job`.

        Raises:
            Taken: Another process works on the entry, and ``wait`` is False.
            InputError: The folder cannot be written, or its file system has no locks.
        """
        lock = self._take(wait=wait)
        try:
            try:
                self._begin(job)
                yield
            finally:
                self._leave()
        finally:
            unlock(lock)

    def _take(self, *, wait: bool) -> int:
        """Return the descriptor of the lock file, locked."""
        while True:
            with writing(self.folder):
                make_folder(self.folder)
                lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    self._lock(lock, wait=wait)
                    if is_at(lock, self.folder / "lock"):
                        return lock
                except BaseException:
                    unlock(lock)
                    raise
                unlock(lock)  # the folder was deleted meanwhile

    def _lock(self, lock: int, *, wait: bool) -> None:
        """Lock exclusively.

        A process that reads the state holds a shared lock for a moment; it does not count as
        working on the entry.
        """
        for _ in range(100):
            if try_lock(lock, fcntl.LOCK_EX):
                return
            if not try_lock(lock, fcntl.LOCK_SH):
                break
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(0.001)
        if not wait:
            claim = self._read("claim.json") or {}
            known = [
                f"{name} {claim[name]}" for name in ("process", "host", "job") if name in claim
            ]
            raise Taken(f"another process works on {self.folder} ({', '.join(known) or 'unknown'})")
        logger.warning("another process works on %s; waiting for it", self.folder)
        fcntl.flock(lock, fcntl.LOCK_EX)

    @contextmanager
    def _check_idle(self) -> Iterator[bool]:
        """Yield whether no process works on this entry. If so, none starts inside of the block."""
        with reading(self.folder / "lock", self.folder.parent):
            try:
                lock = os.open(self.folder / "lock", os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                lock = None
        if lock is None:
            yield True
            return
        try:
            with reading(self.folder / "lock", self.folder.parent):
                idle = try_lock(lock, fcntl.LOCK_SH)
            yield idle
        finally:
            unlock(lock)

    def _begin(self, job: str) -> None:
        """Record this process, and after that remove the recorded error of an earlier attempt."""
        self._job = job
        for name in ("claim", "failed", "result"):  # temporary files of a killed process
            for part in self.folder.glob(f".{name}.json.*.part"):
                self._remove(part.name)
        self._describe()
        claim = {"host": os.uname().nodename, "process": os.getpid(), "job": job}
        self._write("claim.json", {**claim, "started": time.time()})
        self._remove("failed.json")

    def _leave(self) -> None:
        """Remove the record of this process."""
        self._job = ""
        try:
            self._remove("claim.json")
        except InputError as error:  # must not hide an error of the work itself
            logger.warning(
                "%s could not be removed, which does no harm (%s)",
                self.folder / "claim.json",
                error,
            )

    def _describe(self) -> None:
        """Create the folder and ``fields.json`` if they do not exist."""
        kind, fields = json.dumps(self.kind), identity.canonical(self.fields)
        text = f'{{"kind":{kind},"fields":{fields}}}\n'
        path = self.folder / "fields.json"
        with writing(self.folder):
            make_folder(self.folder)
            exists = path.exists() and path.read_bytes() == text.encode()
        if not exists:
            write_atomically(path, text)

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return the content of a file of this entry, or None."""
        content = read_json(self.folder / name, self.folder.parent)
        return content if isinstance(content, dict) else None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of this entry."""
        write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")

    def _remove(self, name: str) -> None:
        """Remove a file of this entry if it exists."""
        with writing(self.folder):
            (self.folder / name).unlink(missing_ok=True)


class Store:
    """The entries below one folder. Nothing is written before an entry is claimed or submitted."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @classmethod
    def below(cls, root: Path | str) -> "Store":
        """Return the store of a folder of runs, the value of ``root`` in ``conf/config.yaml``."""
        return cls(Path(root) / "stages")

    def entry(self, kind: str, fields: Any) -> StoreEntry:
        """Return the entry of this kind and these fields, which need not exist on the disk."""
        return StoreEntry(self.root, kind, fields)

    def entries(self, kind: str | None = None) -> Iterator[StoreEntry]:
        """Yield the entries on the disk by name, or those of one kind.

        A folder without ``fields.json`` is skipped. If its fields belong to another name, the
        folder is skipped with a warning.

        Raises:
            InputError: The root or a file cannot be read.
        """
        with reading(self.root, self.root):
            try:
                names = sorted(path.name for path in self.root.iterdir())
            except FileNotFoundError:
                names = []
        for name in names:
            match = _FOLDER.fullmatch(name)
            if not match or kind not in (None, match[1]):
                continue
            path = self.root / name / "fields.json"
            content = read_json(path, self.root)
            if content is None:
                continue
            entry = self._entry_of(content)
            if entry is not None and entry.folder.name == name:
                yield entry
            else:
                logger.warning("%s does not belong to its folder; the folder is skipped", path)

    def check(self, *, write: bool = True) -> None:
        """Check, before any work, that the folder has the format of this version.

        Args:
            write: Create the folder, write the format, and check that files can be written.
                Otherwise nothing is written.

        Raises:
            InputError: The folder has another format, or it cannot be written or read.
        """
        if self.root.is_file():
            raise InputError(f"root is {self.root}, but that is a file; name a folder")
        path = self.root / "store.json"
        content = read_json(path, self.root)
        if content is not None:
            stated = content.get("format") if isinstance(content, dict) else None
            if stated != _ROOT_FORMAT:
                raise InputError(
                    f"root is {self.root}, but it belongs to another version (format {stated!r} "
                    f"in store.json, {_ROOT_FORMAT} here); name another folder"
                )
        if write:
            check_writable(self.root)
            if content is None:
                write_atomically(path, json.dumps({"format": _ROOT_FORMAT}) + "\n")

    def _entry_of(self, content: Any) -> StoreEntry | None:
        """Return the entry that the content of ``fields.json`` describes, or None."""
        if not isinstance(content, dict) or content.keys() != {"kind", "fields"}:
            return None
        if not isinstance(content["kind"], str):
            return None
        try:
            return self.entry(content["kind"], content["fields"])
        except (InputError, RecursionError):  # a float that is not finite, or nested too deeply
            return None


def _job(content: dict[str, Any] | None) -> str | None:
    """Return the job in the content of a file, or None."""
    job = content.get("job") if content else None
    return job if isinstance(job, str) and job else None


_REASON = re.compile(r"(widthopt: )?(?P<text>(?(1).*|[\w.]*(Error|Exception|Interrupt)\b.*))")
"""Last line of a log that gives a reason: a message of widthopt, or an exception."""


def failure_reason(entry: StoreEntry) -> str:
    """Return why the work of an entry failed, in one line; empty if unknown."""
    failure = entry.failure()
    if failure is not None:
        rank = f"process {failure['rank']}: " if failure.get("rank") else ""
        message = " ".join(str(failure.get("message", "")).split())
        return rank + (message or str(failure.get("type", "unknown")))
    # The process ended before it claimed the entry. The last line of its log may give a reason.
    log = entry.folder / "log.txt"
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    match = _REASON.fullmatch(lines[-1]) if lines else None
    return match["text"] if match else ""
