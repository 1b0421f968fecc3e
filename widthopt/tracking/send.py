"""Sends runs to W&B from their tracking files.

Each run is sent by a separate process, since W&B may hang, fail or be killed. The training process
does not import W&B, and waits for the separate process only at the end of the run.
"""

import csv
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from fcntl import LOCK_EX, LOCK_UN, flock
from pathlib import Path
from typing import Any, Literal

from widthopt.errors import InputError
from widthopt.tracking.files import End, TrackingFiles
from widthopt.tracking.secrets import error_line


MARGIN_SECONDS = 5.0
"""Time after the limit of `SendProcess.finish` at which the process is killed."""

POLL_SECONDS = 1.0
"""Interval between two reads of the rows, and between two flushes of W&B's file."""

INIT_SECONDS, FINISH_SECONDS = 60.0, 300.0
"""Time limits of ``widthopt sync``: for the first response of the server, and for one run."""

REFUSED_IN_A_ROW = 3
"""Consecutive failures after which ``widthopt sync`` stops, since the server is at fault."""

State = Literal["sent", "known", "running", "refused"]
"""The outcome for one run: ``known`` if the server is up to date, ``running`` if it is skipped."""

X_AXES = {
    "epoch": ("train/*", "search/*", "perf/*", "channels/*", "scales/*"),
    "layer/index": ("layers/*",),
    "slimming/move": ("slimming/macs", "slimming/errors"),
}
"""Names of metrics, by their x axis."""


class SendProcess:
    """Sends the rows of a run while they are written, and then its outcome."""

    def __init__(
        self, files: TrackingFiles, lock: int, mode: str, init_seconds: float, finish_seconds: float
    ) -> None:
        """Start the process.

        Args:
            files: The tracking files of the run.
            lock: The descriptor of `TrackingFiles.open_lock`, which this object closes. The
                process waits for the lock and shares it.
            mode: ``offline`` to write W&B's files beside the run, ``online`` to send to a server.
            init_seconds: Time limit for the first response of W&B.
            finish_seconds: Time limit for sending the rest at the end of the run.
        """
        self._lock = lock
        arguments = [str(files.folder), mode, str(lock), str(init_seconds), str(finish_seconds)]
        self._process = subprocess.Popen(  # noqa: S603 (no outside input)
            [sys.executable, "-c", f"from {__name__} import main; main()", *arguments],
            env=_environment(files, mode),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C in a terminal reaches only the parent
        )

    def finish(self, seconds: float) -> str:
        """Announce the end of the run, wait for the process, and return its error message.

        The message is empty if the run was sent. The process is killed `MARGIN_SECONDS` after the
        time limit.
        """
        try:  # a line and not EOF, since other processes may have copies of the pipe open
            _, errors = self._process.communicate("end\n", timeout=seconds + MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            return f"no answer within {seconds:g} s"
        finally:  # also after Ctrl-C; W&B's service ends with its parent
            self._process.kill()
            self._process.wait()
            flock(self._lock, LOCK_UN)
            os.close(self._lock)
        code = self._process.returncode
        return (errors.splitlines() or [f"exit code {code}"])[-1] if code else ""


def _environment(files: TrackingFiles, mode: str) -> dict[str, str]:
    """Return an environment without telemetry, and with W&B's caches beside the runs.

    It contains the mode, since without it W&B looks up the server name even offline.
    """
    base = files.folder.parents[1] / ".wandb"
    return {
        **{f"WANDB_{name.upper()}_DIR": str(base / name) for name in ("data", "cache", "artifact")},
        "WANDB__SERVICE_WAIT": "300",
        **os.environ,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_MODE": mode,
        "WANDB_SILENT": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def tracked_runs(root: Path, names: Collection[str] | None = None) -> list[TrackingFiles]:
    """Return the tracked runs below a root; only those with these names, if they are given."""
    patterns = ("stages/*/tracking/wandb.json", "report/*/tracking/wandb.json")
    folders = sorted(path.parents[1] for pattern in patterns for path in root.glob(pattern))
    return [TrackingFiles(path) for path in folders if names is None or path.name in names]


def sync(
    runs: Collection[TrackingFiles], *, pause_seconds: float
) -> Iterator[tuple[str, State, str]]:
    """Send runs that the server does not have completely, with a pause after each.

    After a refusal the next run is tried, since a server refuses runs that were deleted there.

    Yields:
        The name of the run's folder, the outcome, and the reason of a refusal.
    """
    refused = 0
    for files in runs:
        state, reason = _sync_run(files)
        yield files.folder.name, state, reason
        if state in ("sent", "refused"):
            refused = refused + 1 if state == "refused" else 0
            if refused == REFUSED_IN_A_ROW:
                return
            time.sleep(pause_seconds)


def _sync_run(files: TrackingFiles) -> tuple[State, str]:
    try:
        lock, is_free = files.open_lock()
        if not is_free or files.is_fully_synced:
            os.close(lock)
            return "known" if is_free else "running", ""
        process = SendProcess(files, lock, "online", INIT_SECONDS, FINISH_SECONDS)
    except OSError as error:  # such as a folder of another user
        return "refused", error_line(error)
    reason = process.finish(INIT_SECONDS + FINISH_SECONDS)
    return "refused" if reason else "sent", reason


def main() -> None:
    """Send the run given on the command line; the entry point of `SendProcess`."""
    # Signals to all processes of a job are handled by the parent, which announces the end.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    folder, mode, lock, init_seconds, finish_seconds = sys.argv[1:]
    try:
        flock(int(lock), LOCK_EX)
        _send(TrackingFiles(Path(folder)), mode, float(init_seconds), float(finish_seconds))
    except BaseException as error:  # noqa: BLE001 (the parent reports the message)
        sys.stderr.write(f"{error_line(error)}\n")
        sys.stderr.flush()
        os._exit(1)  # W&B may hang while the interpreter exits


def _send(files: TrackingFiles, mode: str, init_seconds: float, finish_seconds: float) -> None:
    """Send rows until the end of the run, then its outcome.

    A run whose process was killed has no outcome, and is sent as preempted.
    """
    if mode == "offline":
        for folder in files.folder.glob("wandb/offline-run-*"):
            shutil.rmtree(folder)  # all rows are written again
    run = _init(files, init_seconds, finish_seconds)
    offset, step, ended = 0, run.starting_step - 1, False  # the server has the steps before
    while not ended:
        # Standard input is readable once the end is announced or the parent is dead.
        ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        for row, end_of_row in files.rows(offset):
            offset = end_of_row
            if row["step"] > step:
                step = row["step"]
                values = {name: row[name] for name in row if name not in ("step", "time")}
                run.log({**values, "_timestamp": row["time"]}, step=step)
    signal.alarm(math.ceil(finish_seconds + 2 * MARGIN_SECONDS))  # the parent may be dead
    _finish(run, files, files.end or End(code=1, preempted=True), step=step + 1)
    # W&B reports only in its log that a server refuses the rows of a run.
    log = Path(run.dir).parent / "logs" / "debug-internal.log"
    if log.is_file() and "fatal error: filestream" in log.read_text("utf-8", "replace"):
        raise InputError("the server refuses the rows of this run; its quota may be used up")
    if mode == "online":
        files.mark_synced()


def _init(files: TrackingFiles, init_seconds: float, finish_seconds: float) -> Any:
    """Start or resume the W&B run."""
    import wandb  # noqa: PLC0415 (optional)

    settings = wandb.Settings(
        init_timeout=init_seconds,
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
        silent=True,
        x_transaction_log_flush_interval=POLL_SECONDS,
        # Do not record the machine, the code or the console output.
        console="off",
        host="-",
        disable_code=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    run = wandb.init(**(files.init or {}), resume="allow", dir=files.folder, settings=settings)
    for axis, names in X_AXES.items():
        run.define_metric(axis, hidden=True)
        for name in names:
            run.define_metric(name, step_metric=axis)
    return run


def _finish(run: Any, files: TrackingFiles, end: End, *, step: int) -> None:
    """Send the outcome: media at a separate step, summary, widths, alert and exit code."""
    import wandb  # noqa: PLC0415 (optional)

    paths = {name: files.folder / path for name, path in end.media.items()}
    media = {name: _load(path) for name, path in paths.items() if path.is_file()}
    if media:
        run.log(media, step=step)
    run.summary.update(end.summary)
    if files.widths.is_file() and end.code == 0:
        artifact = wandb.Artifact(f"widths-{run.id}", type="widths")
        # Do not copy the file to W&B's cache: the machine that sends the run may not have it.
        artifact.add_file(str(files.widths.absolute()), policy="immutable", skip_cache=True)
        run.log_artifact(artifact, aliases=[f"seed{run.config['seed']}"])
    if end.why:
        run.alert(title=f"{run.job_type} failed", text=end.why)
    if end.preempted:
        run.mark_preempting()
    run.finish(exit_code=end.code)


def _load(path: Path) -> Any:
    """Load a picture or a table as a W&B object."""
    import wandb  # noqa: PLC0415 (optional)

    if path.suffix == ".png":
        return wandb.Image(str(path))
    with path.open(encoding="utf-8", newline="") as file:
        header, *data = list(csv.reader(file))
    columns = [_numbers(column) for column in zip(*data, strict=True)]
    return wandb.Table(columns=[*header], data=[list(row) for row in zip(*columns, strict=True)])


def _numbers(column: Sequence[str]) -> Sequence[str | float | None]:
    """Convert a column without other text to numbers, so that W&B can sort it."""
    try:
        return [float(cell) if cell else None for cell in column]
    except ValueError:
        return column
