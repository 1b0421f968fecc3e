"""How runs are put into arrays, without a cluster: what is sent, and what each waits for."""

import errno
import os
from dataclasses import replace

import pytest
from work import FileWork

from launchers import queue, slurm
from launchers.slurm import Slurm
from widthopt.errors import InputError


RESOURCES = {
    "minutes": 5, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1,
    "memory_gb": None,
}  # fmt: skip


@pytest.fixture
def sent(monkeypatch):
    """The submissions: names in their order, and the dependency."""
    found = []

    def sbatch(sender, items, _resources, after):
        job = 100 + len(found)
        found.append(([item.name for item in items], after))
        for place, item in enumerate(items):
            name = f"{job}_{place}" if len(items) > 1 else str(job)
            sender._jobs[item.name] = name  # noqa: SLF001 (it stands in for SLURM)
            sender._work.submitted(item.name, name)  # noqa: SLF001

    monkeypatch.setattr(slurm._Sender, "_sbatch", sbatch)  # noqa: SLF001
    monkeypatch.setattr(queue, "check", lambda _flags: None)
    monkeypatch.setattr(queue, "array_size", lambda: 3)
    monkeypatch.setattr(queue, "live", dict)
    return found


def launcher():
    return Slurm(
        perform="work.perform", resources=RESOURCES, options={}, gpus_as="none", parallelism=4,
        warn_seconds=60, requeue=True, max_requeues=1, setup=(), python=None, packages=(), code=(),
    )  # fmt: skip


def test_each_run_waits_for_its_own_search_alone(tmp_path, sent):
    table = {f"s{one}": ((), "well") for one in range(3)}
    table |= {"t0": (("s0",), "well"), "t1": (("s1",), "well"), "u1": (("s1",), "well")}
    assert launcher().submit(FileWork(tmp_path, table)) == 6
    # Most awaited first; then element by element, and what is left over on one element.
    assert sent == [
        (["s1", "s0", "s2"], ""), (["t1", "t0"], "aftercorr:100"), (["u1"], "afterok:100_0"),
    ]  # fmt: skip


def test_arrays_are_cut_to_what_the_cluster_allows(tmp_path, sent):
    table = {f"s{one}": ((), "well") for one in range(5)}
    launcher().submit(FileWork(tmp_path, table))
    assert [names for names, _ in sent] == [["s0", "s1", "s2"], ["s3", "s4"]]


def test_what_is_in_the_queue_is_waited_for_and_not_sent_again(tmp_path, sent, monkeypatch):
    work = FileWork(tmp_path, {"s": ((), "well"), "t": (("s",), "well")})
    work.submitted("s", "7_4")
    monkeypatch.setattr(queue, "live", lambda: {"7_4": "RUNNING"})
    assert launcher().submit(work) == 1
    assert sent == [(["t"], "afterok:7_4")]


def test_what_was_done_while_another_submitter_was_at_it_is_not_sent(tmp_path, sent):
    work = FileWork(tmp_path, {"s": ((), "well"), "t": (("s",), "well")})
    planned = work.items()
    work.items = lambda: planned
    (work.freeze("s").parent / "done").touch()
    assert launcher().submit(work) == 1
    assert sent == [(["t"], "")]


def test_a_root_without_locks_is_one_line(tmp_path, sent, monkeypatch):
    def flock(_file, _how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(slurm.fcntl, "flock", flock)
    with pytest.raises(
        InputError, match=f"^root is {tmp_path}, but it cannot be written \\(No loc"
    ):
        launcher().submit(FileWork(tmp_path, {"s": ((), "well")}))
    assert sent == []


def test_a_warning_that_leaves_no_time_to_work_is_refused(tmp_path, sent):
    work = FileWork(tmp_path, {"s": ((), "well")})
    with pytest.raises(InputError, match=r"^hydra.launcher.warn_seconds is 151, but of a time lim"):
        replace(launcher(), warn_seconds=151).submit(work)
    assert sent == []
    assert replace(launcher(), warn_seconds=150).submit(work) == 1
