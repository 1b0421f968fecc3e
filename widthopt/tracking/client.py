"""A run of W&B, fed from a thread of its own, so that nothing W&B does holds up the work.

What is told to W&B follows from files of ours (`Kept`): the rows, the end, and what is to be
shown. So a run that goes on, or whose server went away, is told again as far as the server lacks
it, and no row is lost or sent twice.
"""

import csv
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path
from typing import Any, Literal

from widthopt.errors import InputError
from widthopt.files import write_atomically
from widthopt.tracking import lines
from widthopt.tracking.about import About
from widthopt.tracking.lines import Row
from widthopt.tracking.metrics import X_AXES, in_figure
from widthopt.tracking.secrets import hidden


logger = logging.getLogger("widthopt")

FLUSH_SECONDS = 2.0
"""Time after which W&B's own file on the disk has what was told."""

HURRY_SECONDS = 10.0
"""Time at most for the end of a run whose job is being taken away."""

_TEARDOWN_SECONDS = 5.0
"""Time at most for W&B to take note that its own process was ended."""

SYNCED = ".synced"
"""What W&B adds to the name of a file that it has sent."""

_FATAL = "fatal error: filestream"
"""What stands in W&B's own log of a run whose rows a server has refused."""

_STEP = re.compile(r'"_step":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Where:
    """How W&B is reached.

    Attributes:
        mode: ``offline`` writes beside the run, and no network is touched; ``online`` sends.
        project: W&B's project.
        entity: A user or team; the key's own if None.
        start_seconds: Time at most until a server has answered.
        finish_seconds: Time at most for sending what is left, at the end.
    """

    mode: Literal["offline", "online"]
    project: str
    entity: str | None
    start_seconds: float
    finish_seconds: float


@dataclass(slots=True)
class End:
    """How a run ended, and what is shown of it.

    Attributes:
        code: 0 where it is done.
        preempted: Whether it was interrupted and will go on.
        why: What it failed with, in one line; empty where it did not.
        summary: Its outcome by name.
        widths: The file of the widths that were found, beside the run.
        media: Pictures (PNG) and tables (CSV) by name.
    """

    code: int = 0
    preempted: bool = False
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    widths: str | None = None
    media: dict[str, str] = field(default_factory=dict)


class Kept:
    """What is kept of a run in its folder, and is the truth of what W&B is told."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: The run's."""
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self._tracking = folder / "tracking"

    def begin(self, about: About, *, project: str, entity: str | None) -> None:
        """Write down what the run is; what it ended with before is forgotten.

        Args:
            about: What it is.
            project: W&B's project that it is sent to.
            entity: The user or team.
        """
        self._tracking.mkdir(parents=True, exist_ok=True)
        (self._tracking / "end.json").unlink(missing_ok=True)
        content = {"about": about.plain(), "project": project, "entity": entity}
        self._write("run.json", content)

    def end(self, end: End) -> None:
        """Write down how it ended."""
        content = {name: getattr(end, name) for name in End.__slots__}
        self._write("end.json", hidden(content))

    def sent(self, step: int) -> None:
        """Write down that a server has all rows up to this step, and the end as it is."""
        content = {"step": step, "end": self._fingerprint(), "to": self._to}
        self._write("sent.json", content)

    def show_in(self, figures: Sequence[str]) -> None:
        """Write down that figures show the run which did not when it began.

        A training has the rows of these figures then, and its end their part of the summary.
        """
        about, end = self.about, self.ended
        assert about is not None
        assert end is not None
        if about.kind == "train":
            told = lines.rows(self.metrics)
            known = {name for row in told for name in row}
            step = told[-1]["step"] if told else -1
            added = []
            for figure in figures:
                row, summary = in_figure(
                    figure,
                    network=about.network,
                    saved_pct=end.summary["overhead_saved_pct"],
                    top1=end.summary["test/top1"],
                )
                end.summary |= summary
                if known.isdisjoint(row):
                    step += 1
                    added.append({"step": step, "time": round(time.time(), 3), **row})
            write_atomically(self.metrics, lines.text([*told, *added]))
            self.end(end)
        # W&B's own files do not have it, so that a server has not all of it, whoever sends them.
        self._write("sent.json", {"step": self.sent_step, "end": "", "to": self._to})
        shown = replace(about, figures=(*about.figures, *figures))
        self._write("run.json", {**(self._read("run.json") or {}), "about": shown.plain()})

    @property
    def _to(self) -> list[str | None]:
        """What a server knows the run by."""
        found = self._read("run.json") or {}
        return [found.get("entity"), found.get("project"), found.get("about", {}).get("id")]

    @property
    def about(self) -> About | None:
        """What the run is; None where W&B was to know nothing of it."""
        found = self._read("run.json")
        return None if found is None else About.of(found["about"])

    @property
    def home(self) -> tuple[str, str | None]:
        """W&B's project that the run is sent to, and the user or team."""
        found = self._read("run.json") or {}
        return str(found["project"]), found["entity"]

    @property
    def ended(self) -> End | None:
        """How it ended; None while it runs, or where its process was killed."""
        found = self._read("end.json")
        return None if found is None else End(**found)

    @property
    def whole(self) -> bool:
        """Whether a server has everything there is."""
        found = self._sent
        if found is None:  # by W&B's own tool, perhaps
            mine = self.segments(synced=True)
            return bool(mine) and self.ended is not None and not self.segments(synced=False)
        told = lines.rows(self.metrics)
        same = found["end"] == self._fingerprint()
        return same and (not told or told[-1]["step"] <= found["step"])

    @property
    def sent_step(self) -> int:
        """The last step that a server has."""
        found = self._sent
        ours = -1 if found is None else int(found["step"])
        return max([ours, *(_last_step(one) for one in self.segments(synced=True))])

    @property
    def _sent(self) -> dict[str, Any] | None:
        """What a server was sent of this very run; None for nothing that is known of."""
        found = self._read("sent.json")
        return found if found is not None and found.get("to") == self._to else None

    def segments(self, *, synced: bool) -> list[Path]:
        """W&B's files of this run that were sent, or that were not, the oldest first."""
        found = sorted(self.folder.glob("wandb/offline-run-*/run-*.wandb"))
        if not synced:
            return [one for one in found if not _whole(one)]
        mine = f"run-{self._to[-1]}.wandb"
        return [one for one in found if _whole(one) and one.name == mine]

    def leave_out(self, *, remove: bool) -> None:
        """See that what is told again is not sent from W&B's older files too."""
        for one in self.segments(synced=False):
            if remove:
                shutil.rmtree(one.parent)
            else:
                _synced(one).touch()

    @contextmanager
    def alone(self, *, wait: bool) -> Iterator[bool]:
        """Whether nobody else tells W&B about this run; if so, nobody does before the block ends.

        Args:
            wait: Whether to wait until it is so.
        """
        self._tracking.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._tracking / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                flock(lock, LOCK_EX if wait else LOCK_EX | LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                flock(lock, LOCK_UN)
        finally:
            os.close(lock)

    def _fingerprint(self) -> str:
        """Of the end, and of the files that it shows: a figure is drawn again under its name."""
        end = self.ended or End()
        shown = [json.dumps(self._read("end.json"), sort_keys=True).encode()]
        for name in (*end.media.values(), *filter(None, [end.widths])):
            path = self.folder / name
            shown.append(path.read_bytes() if path.is_file() else b"")
        return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in shown)).hexdigest()

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self._tracking / name).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self._tracking / name, json.dumps(content, indent=2) + "\n")


def _whole(segment: Path) -> bool:
    """Whether a file of W&B's was sent after it had been written, and not while it grew."""
    try:
        return _synced(segment).stat().st_mtime_ns >= segment.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _synced(segment: Path) -> Path:
    return segment.with_name(segment.name + SYNCED)


def _last_step(segment: Path) -> int:
    """The last step in a file of W&B's, asked of its own tool."""
    said = subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    found = [int(one) for one in _STEP.findall(said.stdout)]
    return max(found, default=-1)


class Client:
    """One run of W&B from its begin to its end."""

    def __init__(self, where: Where, kept: Kept, about: About) -> None:
        """Prepare; nothing happens before `begin`.

        Args:
            where: How W&B is reached.
            kept: What is kept of the run.
            about: What the run is.
        """
        self._where, self._kept, self._about = where, kept, about
        self._queue: queue.SimpleQueue[Row | End] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._last = -1
        self._refused = False

    def begin(self, rows: Sequence[Row]) -> None:
        """Start telling, beginning with these rows as far as they are not known already."""
        _set_environment(self._where, self._kept.folder)  # here: others read it meanwhile
        started = threading.Event()
        thread = threading.Thread(
            target=self._work, args=(list(rows), started), name="tracking", daemon=True
        )
        thread.start()
        self._thread = thread
        if self._where.mode == "offline":  # takes no longer than it must; then nothing is forked
            started.wait(self._where.start_seconds)

    def row(self, row: Row) -> None:
        """Tell a row; returns at once."""
        if not self._failure:
            self._queue.put(row)

    def end(self, end: End, *, hurry: bool) -> str:
        """Tell the end, and wait for a bounded time; what went wrong, or nothing.

        Args:
            end: How it ended.
            hurry: Whether the process is being taken away.
        """
        if self._thread is None:
            return ""
        self._queue.put(end)
        seconds = self._where.finish_seconds
        seconds = min(seconds, HURRY_SECONDS) if hurry else seconds
        ended = False
        try:
            self._thread.join(seconds + 5)
            ended = not self._thread.is_alive()
        finally:
            if self._failure or not ended:  # also where Ctrl-C ends the waiting
                # It may wait for ever, and W&B would do so again when the process ends.
                _abandon()
        return self._failure if ended else f"no end within {seconds:g} s"

    def _work(self, rows: list[Row], started: threading.Event) -> None:
        """All that is told, in the thread."""
        try:
            with self._kept.alone(wait=True):
                self._tell(rows, started)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (nothing of W&B's may hurt the work)
            logger.debug("W&B: %s", hidden(traceback.format_exc()))
            self._failure = reason(error)
        finally:
            started.set()

    def _tell(self, rows: list[Row], started: threading.Event) -> None:
        offline, known = self._where.mode == "offline", -1
        if offline:
            known = self._kept.sent_step
            self._kept.leave_out(remove=True)
        run = _init(self._where, self._kept.folder, self._about, refused=self._refuse)
        if not offline:
            known = run.starting_step - 1
            if not rows:
                logger.info("W&B shows it at %s", run.url)
        self._last = known
        started.set()
        for row in rows:
            self._log(run, row)
        while isinstance(said := self._queue.get(), Mapping):
            self._log(run, said)
        log = Path(run.dir).parent / "logs" / "debug-internal.log"
        self._finish(run, said)
        # W&B itself ends well where a server has refused what was streamed.
        if self._refused or (log.is_file() and _FATAL in log.read_text("utf-8", "replace")):
            raise InputError(
                "W&B takes no more of this run: its quota is used up, or it was stopped"
            )
        if not offline:
            self._kept.leave_out(remove=False)
            self._kept.sent(self._last)

    def _refuse(self) -> None:
        """Called by W&B, which would interrupt the process otherwise."""
        self._refused = True

    def _log(self, run: Any, row: Row) -> None:
        """One row, unless it is known."""
        if row["step"] <= self._last:
            return
        self._last = row["step"]
        values = {name: one for name, one in row.items() if name not in ("step", "time")}
        run.log({**values, "_timestamp": row["time"]}, step=row["step"])

    def _finish(self, run: Any, end: End) -> None:
        import wandb  # noqa: PLC0415 (takes a second)

        if end.media:
            paths = {name: self._kept.folder / one for name, one in end.media.items()}
            media = {name: _media(wandb, one) for name, one in paths.items() if one.is_file()}
            self._last += 1
            run.log(media, step=self._last)
        run.summary.update(end.summary)
        if end.widths is not None and (self._kept.folder / end.widths).is_file():
            artifact = wandb.Artifact(f"widths-{self._about.id}", type="widths")
            # Not copied to W&B's own folder, which the sending machine may not have; and found
            # from wherever W&B's own tool is started.
            path = str((self._kept.folder / end.widths).absolute())
            artifact.add_file(path, policy="immutable", skip_cache=True)
            run.log_artifact(artifact, aliases=[f"seed{self._about.seed}"])
        if end.why:
            run.alert(title=f"{self._about.kind} failed", text=end.why)
        if end.preempted:
            run.mark_preempting()
        run.finish(exit_code=end.code)


def _media(wandb: Any, path: Path) -> Any:
    """A picture, or a table, as W&B shows it."""
    if path.suffix == ".png":
        return wandb.Image(str(path))
    with path.open(encoding="utf-8", newline="") as file:
        header, *data = list(csv.reader(file))
    numbers = [_numbers([row[place] for row in data]) for place in range(len(header))]
    return wandb.Table(columns=header, data=[list(row) for row in zip(*numbers, strict=True)])


def _numbers(column: Sequence[str]) -> Sequence[str | float | None]:
    """A table's column as numbers, if it has nothing else: so W&B can sort it."""
    try:
        return [float(one) if one else None for one in column]
    except ValueError:
        return column


def _set_environment(where: Where, folder: Path) -> None:
    """Set what W&B, its process and its tools find in the environment.

    Telemetry is off, and offline is offline from the very first call on: W&B's process looks up
    a server's name otherwise.
    """
    own = folder.parents[1] / ".wandb"
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ["WANDB_MODE"] = where.mode
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB__SERVICE_WAIT", "300")
    for name in ("DATA", "CACHE", "ARTIFACT"):  # else below the home folder, as its settings are
        os.environ.setdefault(f"WANDB_{name}_DIR", str(own / name.lower()))


def _init(where: Where, folder: Path, about: About, *, refused: Callable[[], None]) -> Any:
    """Begin a run with W&B."""
    import wandb  # noqa: PLC0415 (takes a second)

    run = wandb.init(
        mode=where.mode,
        entity=where.entity,
        project=where.project,
        id=about.id,
        resume="allow",
        reinit="create_new",
        dir=folder,
        group=about.group,
        job_type=about.kind,
        name=about.name,
        tags=about.labels,
        config=about.config,
        settings=wandb.Settings(
            init_timeout=where.start_seconds,
            finish_timeout=where.finish_seconds,
            finish_timeout_raises=True,
            silent=True,
            stop_fn=refused,
            stop_on_fatal_error=True,
            # Nothing about the machine, the code or what is printed.
            console="off",
            host="-",
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        ),
    )
    for axis, names in X_AXES.items():
        run.define_metric(axis, hidden=True)
        for name in names:
            run.define_metric(name, step_metric=axis)
    return run


def _abandon() -> None:
    """End W&B's own process, which has not ended by itself: it would hold up the end of ours."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            parent = re.search(r"^PPid:\s*(\d+)", status.read_text(), re.MULTILINE)
            words = (status.parent / "cmdline").read_bytes().split(b"\0")
            if parent and int(parent[1]) == os.getpid() and words[0].endswith(b"wandb-core"):
                os.kill(int(status.parent.name), signal.SIGKILL)
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        # In a thread, since it may hang, or end the process with its own's exit code.
        thread = threading.Thread(target=_teardown, args=(wandb,), daemon=True)
        thread.start()
        thread.join(_TEARDOWN_SECONDS)


def _teardown(wandb: Any) -> None:
    with suppress(Exception):
        wandb.teardown()


def reason(error: BaseException) -> str:
    """What went wrong, in one line without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    result: str = hidden(text)
    return result
