"""Work for launchers that is no more than files: what they start, when, how much at once."""

import json
import os
import sys
import time
from pathlib import Path

from hydra_plugins.widthopt_launchers.workload import Task


class FileWork:
    """Items that note when they begin and end; some fail, some kill their process.

    Attributes:
        table: By name, what an item needs, and how it goes: ``well``, ``fails`` or ``dies``.
    """

    interruptions = ()
    imports = ("mailbox",)  # of all modules one that nothing here imports
    name = "sweep-of-files"

    def __init__(self, folder, table, *, seconds=0.0, together=1):
        self.folder, self.table, self.seconds = Path(folder), table, seconds
        self.root = self.folder
        self.together = together  # items end when so many have begun

    def begin(self, *, assume_yes, live=()):  # noqa: ARG002 (there is no queue)
        (self.folder / "began").write_text(str(assume_yes))

    def tasks(self):
        return [
            Task(
                name,
                f"the item {name}",
                tuple(need for need in needs if not self.is_done(need)),
                1.0,
            )
            for name, (needs, _) in self.table.items()
            if not self.is_done(name)
        ]

    def job(self, name):
        path = self.root / "stages" / name / "submission.json"
        return json.loads(path.read_text())["job"] if path.exists() else ""

    def record_job(self, name, job, **details):
        path = self.root / "stages" / name / "submission.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"job": job, **details}))

    def write_spec(self, name):
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        content = {"how": self.table[name][1], "seconds": self.seconds, "together": self.together}
        (folder / "spec.json").write_text(json.dumps(content))
        return folder / "spec.json"

    def is_done(self, name):
        return (self.folder / name / "done").exists()

    def failure(self, name):
        path = self.folder / name / "failed"
        return path.read_text() if path.exists() else ""

    def end(self):
        (self.folder / "ended").touch()


def run_spec(spec):
    """One task: its beginning and end go into one file, a line each."""
    content = json.loads(spec.read_text())
    folder = spec.parent
    _note(folder, "begin")
    deadline = time.monotonic() + 60
    while (folder.parent / "notes").read_text().count("begin") < content["together"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(content["seconds"])
    print(f"the item {folder.name} says so", flush=True)  # noqa: T201 (it goes into its log)
    print(f"with mailbox: {'mailbox' in sys.modules}")  # noqa: T201
    _note(folder, "end")
    if content["how"] == "fails":
        (folder / "failed").write_text("it was to fail")
        raise ValueError("it was to fail")
    if content["how"] == "dies":
        os.kill(os.getpid(), 9)
    if content["how"] == "lies":
        return
    (folder / "done").touch()


def _note(folder, what):
    with (folder.parent / "notes").open("a") as file:
        file.write(f"{what} {folder.name} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
