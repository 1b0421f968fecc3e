"""Runs that are tracked on a real SLURM: every row once, and no key anywhere."""

import importlib.util
import json
from pathlib import Path

import pytest
from login import LONG, ONE, SWEEP, is_complete, preempt
from test_wandb import assert_same_rows, inspect_segment, read_rows
from wandb_server import KEY, Server


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="W&B is not installed"
)


def with_tracking(words, mode):
    """The same words, but tracked, with a row for every second step."""
    return (*(entry for entry in words if not entry.startswith("tracking")),
            f"tracking={mode}", "tracking.log_every_steps=2")  # fmt: skip


def lasting(stage):
    """What the rows of a stage say, but for what depends on the clock."""
    return {
        step: {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
        for step, row in read_rows(stage).items()
    }


def test_a_run_that_is_put_back_has_every_row_once(folder):
    words = (
        *with_tracking(SWEEP, "offline"), "projection.width=0.5,1", "seeds=[0]",
        LONG, "hydra.launcher.resources.gpus_per_node=8",
    )  # fmt: skip
    folder.environment["HOME"] = str(folder.path)
    with folder.slowly():
        folder.send(*words, submitted=4)
        rows = folder.rows()
        stages = {row["name"]: folder.path / "runs" / "stages" / row["name"] for row in rows}
        searches = [stages[name] for name in stages if name.startswith("search")]
        for stage in searches:
            file = stage / "metrics.jsonl"
            folder.until(lambda file=file: file.exists() and len(read_rows(file.parent)) > 5)
        preempt(folder, None)
        for row in rows:
            if row["kind"] == "search":
                folder.until_started(row, 2)
    folder.until_over()
    assert [len(folder.attempts(stage.name)) for stage in searches] == [2, 2]
    assert is_complete(folder, *words)
    for name, stage in stages.items():
        lines = (stage / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps))
        # Not one row less or another one than the same run has that nothing disturbed.
        assert lasting(stage) == lasting(folder.path / "alone" / "stages" / name)
        (segment,) = stage.glob("wandb/offline-run-*/run-*.wandb")
        history = [
            entry["history"]["item"]
            for entry in inspect_segment(segment)
            if entry["type"] == "history"
        ]
        assert [row["_step"] for row in history] == steps
    with Server() as server:
        folder.environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = folder.widthopt("sync", "--pause", "0")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "4 sent, 0 had been sent before, 0 still run"
        assert server.runs.keys() == stages.keys()
        for name, run in server.runs.items():
            assert_same_rows(run, stages[name])
            assert (run.complete, run.exit_code) == (True, 0)


def processes():
    """The command lines of all processes."""
    history = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            history.append(path.read_bytes().decode("latin-1"))
        except OSError:
            continue
    return history


def test_a_key_in_the_environment_is_found_nowhere(folder):
    words = (*with_tracking(ONE, "online"), LONG)
    with Server() as server:
        folder.environment |= {
            "HOME": str(folder.path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY,
        }  # fmt: skip
        with folder.slowly():
            done = folder.widthopt(*words)
            outputs = [done.stdout, done.stderr, *processes()]
            folder.until_running()
            lines = processes()
        for row in folder.rows():
            outputs.append(folder.cluster.run("scontrol", "-dd", "show", "job", row["job"]))
            outputs.append(folder.cluster.run("scontrol", "write", "batch_script", row["job"], "-"))
            outputs += [folder.widthopt(name, row["name"]).stdout for name in ("show", "logs")]
        folder.until_over()
        names = {row["name"] for row in folder.rows()}
        # It was there to be found: the jobs had it from their submitter, and used it.
        assert server.runs.keys() == names
        assert {row["state"] for row in folder.rows()} == {"done"}
    # They were seen while they ran: the job's own process, and W&B's.
    assert any("submitit.core._submit" in entry for entry in lines)
    assert any("wandb-core" in entry for entry in lines)
    logs = [*folder.path.rglob("*"), *(folder.cluster.folder / "log").iterdir()]
    files = {str(entry): entry.read_bytes().decode("latin-1") for entry in logs if entry.is_file()}
    for kind in (".sh", ".pkl", "spec.json", "_log.err", "log.txt", ".wandb", "slurmctld.log"):
        assert any(name.endswith(kind) for name in files), kind
    assert [name for name, text in files.items() if KEY in text] == []
    assert [entry[:200] for entry in (*outputs, *lines) if KEY in entry] == []


def read_all(folder):
    """Everything below a folder, as far as it is files."""
    return b"".join(entry.read_bytes() for entry in folder.rglob("*") if entry.is_file())


def test_a_job_without_its_submitters_environment_leaves_the_key_not_even_with_slurm(folder):
    folder.environment["WANDB_API_KEY"] = KEY
    folder.send(*ONE, LONG, "+hydra.launcher.options.begin=now+600", submitted=2)
    state = folder.cluster.folder / "state"
    assert KEY.encode() in read_all(state)  # where only SLURM itself may look
    folder.widthopt("cancel", "sweep")
    second_key = KEY[::-1]
    folder.environment["WANDB_API_KEY"] = second_key
    with folder.slowly():
        folder.send(
            *ONE, LONG, "+hydra.launcher.options.export=NONE",
            'hydra.launcher.setup=["unset SLURM_EXPORT_ENV","export OMP_NUM_THREADS=1"]',
            submitted=2,
        )  # fmt: skip
        folder.until_running()
        assert second_key.encode() not in read_all(folder.cluster.folder)
    folder.until_over()
    assert is_complete(folder, *ONE, LONG)
