"""Submission of runs as job arrays, without a cluster: the arrays and their dependencies."""

import errno
import fcntl
import os
import re
import socket
from dataclasses import fields, replace

import pytest
from file_workload import FileWork

import hydra_plugins.widthopt_launchers.launcher
from hydra_plugins.widthopt_launchers import queue, slurm
from hydra_plugins.widthopt_launchers.launcher import WidthoptSlurmLauncher
from hydra_plugins.widthopt_launchers.slurm import Slurm
from widthopt.errors import InputError


RESOURCES = {
    "minutes": 5, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1,
    "memory_gb": None,
}  # fmt: skip


@pytest.fixture
def sent(monkeypatch):
    """The submissions in order: the names of the runs, and the dependency."""
    submissions = []

    def sbatch(sender, items, _resources, after):
        job = 100 + len(submissions)
        submissions.append(([task.name for task in items], after))
        for place, task in enumerate(items):
            name = f"{job}_{place}" if len(items) > 1 else str(job)
            sender._jobs[task.name] = name  # noqa: SLF001 (as SLURM would)
            sender._workload.record_job(task.name, name)  # noqa: SLF001

    monkeypatch.setattr(slurm._Sender, "_sbatch", sbatch)  # noqa: SLF001
    monkeypatch.setattr(queue, "check", lambda _flags: None)
    monkeypatch.setattr(queue, "array_size", lambda: 3)
    monkeypatch.setattr(queue, "live_jobs", dict)
    monkeypatch.setattr(queue, "hosts", set)
    return submissions


@pytest.fixture
def limited(monkeypatch, sent):
    """Limit the jobs that the queue accepts to the item of the returned list; see `sent`."""
    room, submit = [0], slurm._Sender._sbatch  # noqa: SLF001

    def sbatch(sender, items, resources, after):
        if sum(len(names) for names, _ in sent) + len(items) > room[0]:
            raise slurm._LimitReachedError(f"{sender._sent} were sent")  # noqa: SLF001
        submit(sender, items, resources, after)

    monkeypatch.setattr(slurm._Sender, "_sbatch", sbatch)  # noqa: SLF001
    return room


def make_launcher():
    return Slurm(
        run_spec="file_workload.run_spec", resources=RESOURCES, options={}, gpus_as="none",
        parallelism=4,
        warn_seconds=60, requeue=True, max_requeues=1, setup=(), python=None, packages=(), code=(),
    )  # fmt: skip


def test_each_training_depends_only_on_its_search(tmp_path, sent):
    table = {f"s{index}": ((), "well") for index in range(3)}
    table |= {"t0": (("s0",), "well"), "t1": (("s1",), "well"), "u1": (("s1",), "well")}
    assert make_launcher().submit(FileWork(tmp_path, table)) == 6
    # The search with most trainings comes first. The last training depends on one element.
    assert sent == [
        (["s1", "s0", "s2"], ""), (["t1", "t0"], "aftercorr:100"), (["u1"], "afterok:100_0"),
    ]  # fmt: skip


def test_arrays_are_split_at_the_limit_of_the_cluster(tmp_path, sent):
    table = {f"s{index}": ((), "well") for index in range(5)}
    make_launcher().submit(FileWork(tmp_path, table))
    assert [names for names, _ in sent] == [["s0", "s1", "s2"], ["s3", "s4"]]


@pytest.mark.parametrize(
    ("room", "arrays"),
    [
        (0, []),
        (2, [(["s0"], ""), (["s1"], "")]),
        (4, [(["s0", "s1", "s2"], ""), (["t0"], "aftercorr:100")]),
        (5, [(["s0", "s1", "s2"], ""), (["t0"], "aftercorr:100"), (["t1"], "afterok:100_1")]),
    ],
)
def test_runs_are_submitted_up_to_the_limit_of_the_queue(tmp_path, sent, limited, room, arrays):
    """An array that exceeds the limit is submitted run by run."""
    table = {f"s{index}": ((), "well") for index in range(3)}
    table |= {f"t{index}": ((f"s{index}",), "well") for index in range(3)}
    limited[0] = room
    with pytest.raises(InputError, match="were sent"):
        make_launcher().submit(FileWork(tmp_path, table))
    assert sent == arrays


def test_a_queued_run_is_a_dependency_and_is_not_submitted_again(tmp_path, sent, monkeypatch):
    workload = FileWork(tmp_path, {"s": ((), "well"), "t": (("s",), "well")})
    workload.record_job("s", "7_4")
    monkeypatch.setattr(queue, "live_jobs", lambda: {"7_4": "RUNNING"})
    assert make_launcher().submit(workload) == 1
    assert sent == [(["t"], "afterok:7_4")]


def test_a_run_that_is_done_meanwhile_is_not_submitted(tmp_path, sent):
    workload = FileWork(tmp_path, {"s": ((), "well"), "t": (("s",), "well")})
    planned = workload.tasks()
    workload.tasks = lambda: planned
    (workload.write_spec("s").parent / "done").touch()
    assert make_launcher().submit(workload) == 1
    assert sent == [(["t"], "")]


@pytest.mark.parametrize("where", ["submit", "info", "watch"])
def test_ctrl_c_reports_that_submitted_jobs_continue(tmp_path, sent, monkeypatch, where):
    def interrupt(*_args):
        raise KeyboardInterrupt

    waiting = WidthoptSlurmLauncher(workload="", run_spec="", assume_yes=True)
    waiting.slurm, waiting.wait = make_launcher(), True
    place = {
        "submit": Slurm,
        "info": hydra_plugins.widthopt_launchers.launcher.logger,
        "watch": slurm,
    }[where]
    monkeypatch.setattr(place, where, interrupt)
    message = r"^stopped; .* to end them: widthopt cancel sweep-of-files --root \S+$"
    with pytest.raises(KeyboardInterrupt, match=message):
        waiting.carry_out(FileWork(tmp_path, {"s": ((), "well")}))
    assert len(sent) == (where != "submit")


@pytest.mark.parametrize(
    "case",  # file system, host of a node, number of warnings
    [("ext4", "node1", 1), ("nfs4", "node1", 0), ("xfs", "login", 0)],
)
@pytest.mark.usefixtures("sent")
def test_a_root_on_a_disk_of_the_login_node_logs_a_warning(tmp_path, monkeypatch, caplog, case):
    """The disk may be exported to the nodes, so this is not an error."""
    kind, host, reported = case
    monkeypatch.setattr(slurm, "file_system", lambda _folder: kind)
    monkeypatch.setattr(socket, "gethostname", lambda: "login.cluster")
    monkeypatch.setattr(queue, "hosts", lambda: {host})
    assert make_launcher().submit(FileWork(tmp_path, {"s": ((), "well")})) == 1
    warning = (
        f"root is {tmp_path}, on a disk of this machine ({kind}); runs fail on nodes that do not "
        f"see it: check one with widthopt doctor --job --root {tmp_path}"
    )
    assert [record.getMessage() for record in caplog.records] == [warning] * reported


def test_a_root_without_locks_raises_a_one_line_error(tmp_path, sent, monkeypatch):
    def flock(_file, _how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(slurm.fcntl, "flock", flock)
    with pytest.raises(
        InputError, match=f"^root is {tmp_path}, but it cannot be written \\(No loc"
    ):
        make_launcher().submit(FileWork(tmp_path, {"s": ((), "well")}))
    assert sent == []


def test_reading_the_state_does_not_wait_for_a_submission(tmp_path):
    intent = tmp_path / "submissions" / "widthopt-1.json"
    intent.parent.mkdir()
    intent.write_text("of a submission that has not ended")
    with (tmp_path / "submit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        slurm.adopt(tmp_path)
    assert intent.exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("setup", None, "hydra.launcher.setup is null, but it is a list; write 'hydra.launcher"),
        ("code", 3, "hydra.launcher.code is 3, but it is a list; write 'hydra.launcher.code=[\"3"),
        (
            "resources",
            None,
            "hydra.launcher.resources is null, but it is a mapping; set its values",
        ),
        ("options", "gpu", "hydra.launcher.options is gpu, but it is a mapping; set its values"),
        (
            "wait",
            "perhaps",
            "hydra.launcher.wait is perhaps, but it must be true or false; correct it",
        ),
    ],
)
def test_a_value_of_a_wrong_type_raises_a_one_line_error(name, value, message):
    values = {field.name: getattr(make_launcher(), field.name) for field in fields(make_launcher())}
    values = {**values, "wait": False, name: value}
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        WidthoptSlurmLauncher(workload="", assume_yes=False, **values).prepare()


def test_warn_seconds_above_half_the_time_limit_are_refused(tmp_path, sent):
    workload = FileWork(tmp_path, {"s": ((), "well")})
    with pytest.raises(InputError, match=r"^hydra.launcher.warn_seconds is 151, but it is at most"):
        replace(make_launcher(), warn_seconds=151).submit(workload)
    assert sent == []
    assert replace(make_launcher(), warn_seconds=150).submit(workload) == 1
