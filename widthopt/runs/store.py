"""Results by content: what is done is a question that the disk can answer.

A *stage* is one piece of work, named by its kind and by everything that its result depends
on. It has one folder, ``<root>/<kind>-<key>``, with

- ``fields.json``: what names it;
- ``lock``: locked by the process that works on it, and released however that ends;
- ``claim.json``: who that process is. Left without a lock, the process was killed;
- ``submission.json``: the job of a queue that is to work on it;
- ``failed.json``: the error that the last attempt ended with;
- ``result.json``: written last and whole, so that it is there only when the work is done.

``<root>/store.json`` says which format this is. The *state* of a stage follows from these
files and from the jobs that live, and from no clock.
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


class Taken(Exception):  # noqa: N818 (nothing went wrong: someone else is at it)
    """Someone else works on the stage."""


class StoreEntry:
    """One piece of work: its folder, its state, and its result once there is one.

    Attributes:
        kind: What sort of work, for example ``search``.
        fields: Plain data, everything that the result depends on.
        key: Twelve hex digits made from both; see `widthopt.identity.key`.
        folder: Where it lives; there once it has been claimed or submitted.
    """

    def __init__(self, root: Path, kind: str, fields: Any) -> None:
        self.kind = kind
        self.fields = fields
        self.key = identity.key(kind, fields)
        self.folder = root / f"{kind}-{self.key}"
        self._job = ""

    def result(self) -> dict[str, Any] | None:
        """The result, or None while there is none.

        A file that is not whole counts as none, with a warning: the work is done again.

        Raises:
            InputError: The file is whole, but it is not what was written; or it cannot be read.
        """
        path = self.folder / "result.json"
        found = read_json(path, self.folder.parent)
        if found is None:
            return None
        with suppress(KeyError, TypeError):  # some JSON
            if identity.is_sealed(found, "result", format=_RESULT_FORMAT, key=self.key):
                result: dict[str, Any] = found["result"]
                return result
        raise InputError(
            f"root is {self.folder.parent}, but {path} was changed after it was written; "
            "restore it, or delete it to do the work again"
        )

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result; the last thing that the work does.

        Args:
            result: What JSON can hold, without infinities and not-a-numbers.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        sealed = identity.seal("result", result, format=_RESULT_FORMAT, key=self.key)
        self._describe()
        write_atomically(self.folder / "result.json", json.dumps(sealed, indent=2) + "\n")
        self._remove("failed.json")

    def fail(self, error: BaseException, *, rank: int = 0) -> None:
        """Write down what ended the work, inside the claim.

        Where several processes work together, what the first of them says is kept: the others
        fail because of it.

        Args:
            error: What ended it.
            rank: Which of the processes failed.

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
        """Forget what an earlier attempt ended with, since another one is about to begin.

        Raises:
            InputError: The folder cannot be written.
        """
        self._remove("failed.json")

    def failure(self) -> dict[str, Any] | None:
        """What the last attempt ended with: what `fail` wrote, or None.

        Raises:
            InputError: The file cannot be read.
        """
        return self._read("failed.json")

    def record_job(self, job: str, **details: str) -> None:
        """Write down that a job of a queue is to work on this stage.

        Args:
            job: Its name in the queue.
            details: What else is worth knowing of it.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        self._describe()
        self._write("submission.json", {"job": job, **details})

    def submission(self) -> dict[str, Any] | None:
        """The job that was last to work on this stage: what `submitted` wrote, or None.

        Raises:
            InputError: The file cannot be read.
        """
        return self._read("submission.json")

    def state(self, live: Collection[str] = ()) -> State:
        """How far this stage is, from its files and the queue alone; nothing is written.

        Never "blocked", which depends on other stages: see `mark_blocked`.

        Args:
            live: The jobs that the queue knows as waiting or running.

        Raises:
            InputError: A file cannot be read, or the result was changed.
        """
        with self._at_rest() as rests:
            if self.result() is not None:
                return "done"
            claim = self._read("claim.json")
            if not rests or _job(claim) in live:
                return "running"
            submission = self._read("submission.json")
            if _job(submission) in live:
                return "queued"
            if self.failure() is not None:
                return "failed"
            return "missing" if claim is None and submission is None else "stale"

    @contextmanager
    def claim(self, *, wait: bool = True, job: str = "") -> Iterator[None]:
        """Work on this stage alone: whoever comes second waits until the first has left.

        Ask for `result` inside the claim, since the one before may have finished it. The
        claim ends with the process that holds it, however that ends. It is not reentrant.
        What an earlier attempt failed with is forgotten once the claim is written down.

        Args:
            wait: Whether to wait for someone else who works on it.
            job: The job of a queue that this process is a part of, if any; see `current_job`.

        Raises:
            Taken: Someone else works on it, and ``wait`` is off.
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
        """The open lock file, locked."""
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
        """Lock for this process alone.

        Whoever asks for the state shares the lock for a moment, and is not someone at work.
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
    def _at_rest(self) -> Iterator[bool]:
        """Whether nobody works on this stage; if so, nobody begins before the block ends."""
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
                rests = try_lock(lock, fcntl.LOCK_SH)
            yield rests
        finally:
            unlock(lock)

    def _begin(self, job: str) -> None:
        """Write down who works on it, and only then forget what it failed with before."""
        self._job = job
        for name in ("claim", "failed", "result"):  # of a process that was killed as it wrote
            for left in self.folder.glob(f".{name}.json.*.part"):
                self._remove(left.name)
        self._describe()
        claim = {"host": os.uname().nodename, "process": os.getpid(), "job": job}
        self._write("claim.json", {**claim, "started": time.time()})
        self._remove("failed.json")

    def _leave(self) -> None:
        """Nobody works on it any more."""
        self._job = ""
        try:
            self._remove("claim.json")
        except InputError as error:  # not worth hiding how the work itself ended
            logger.warning("%s is left; it stops nobody (%s)", self.folder / "claim.json", error)

    def _describe(self) -> None:
        """Make the folder and write what names this stage, unless it is there."""
        kind, fields = json.dumps(self.kind), identity.canonical(self.fields)
        text = f'{{"kind":{kind},"fields":{fields}}}\n'
        path = self.folder / "fields.json"
        with writing(self.folder):
            make_folder(self.folder)
            there = path.exists() and path.read_bytes() == text.encode()
        if not there:
            write_atomically(path, text)

    def _read(self, name: str) -> dict[str, Any] | None:
        """What one of this stage's files says, or None."""
        found = read_json(self.folder / name, self.folder.parent)
        return found if isinstance(found, dict) else None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Write one of this stage's files."""
        write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")

    def _remove(self, name: str) -> None:
        """Remove one of this stage's files, if it is there."""
        with writing(self.folder):
            (self.folder / name).unlink(missing_ok=True)


class Store:
    """The stages below one root folder; nothing is written before one is claimed or submitted."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def entry(self, kind: str, fields: Any) -> StoreEntry:
        """The stage of this kind (a word that can name a folder) and these fields."""
        return StoreEntry(self.root, kind, fields)

    def entries(self, kind: str | None = None) -> Iterator[StoreEntry]:
        """The stages that are on the disk, by name; those of one kind if it is given.

        A folder that does not say what names it is passed over, with a warning if it says
        something else.

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
            found = read_json(path, self.root)
            if found is None:
                continue
            stage = self._entry_of(found)
            if stage is not None and stage.folder.name == name:
                yield stage
            else:
                logger.warning("%s does not name its folder; the folder is passed over", path)

    def check(self, *, write: bool = True) -> None:
        """Check, before any work, that this is a root for this version.

        Args:
            write: Whether results are to be written: then the root is made, marked with this
                version's format, and tried out. Otherwise nothing is written.

        Raises:
            InputError: The root belongs to another version, or it cannot be written or read.
        """
        if self.root.is_file():
            raise InputError(f"root is {self.root}, but that is a file; name a folder")
        path = self.root / "store.json"
        found = read_json(path, self.root)
        if found is not None:
            stated = found.get("format") if isinstance(found, dict) else None
            if stated != _ROOT_FORMAT:
                raise InputError(
                    f"root is {self.root}, but it belongs to another version (format {stated!r} "
                    f"in store.json, {_ROOT_FORMAT} here); name another folder"
                )
        if write:
            check_writable(self.root)
            if found is None:
                write_atomically(path, json.dumps({"format": _ROOT_FORMAT}) + "\n")

    def _entry_of(self, found: Any) -> StoreEntry | None:
        """The stage that ``fields.json`` names, or None if that is not what the file does."""
        if not isinstance(found, dict) or found.keys() != {"kind", "fields"}:
            return None
        if not isinstance(found["kind"], str):
            return None
        try:
            return self.entry(found["kind"], found["fields"])
        except (InputError, RecursionError):  # a number that is not finite, or such depth
            return None


def _job(found: dict[str, Any] | None) -> str | None:
    """The job that a file names, or None."""
    job = found.get("job") if found else None
    return job if isinstance(job, str) and job else None


_REASON = re.compile(r"(widthopt: )?(?P<text>(?(1).*|[\w.]*(Error|Exception|Interrupt)\b.*))")
"""What a process says last: one of our own messages, or the exception below a traceback."""


def failure_reason(stage: StoreEntry) -> str:
    """Why a stage was not done, in one line; empty if nothing is known."""
    found = stage.failure()
    if found is not None:
        rank = f"process {found['rank']}: " if found.get("rank") else ""
        message = " ".join(str(found.get("message", "")).split())
        return rank + (message or str(found.get("type", "unknown")))
    # It ended before it began: the last line that its process left says why, if it is a reason.
    log = stage.folder / "log.txt"
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    match = _REASON.fullmatch(lines[-1]) if lines else None
    return match["text"] if match else ""
