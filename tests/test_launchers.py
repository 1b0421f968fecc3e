"""Launchers: order and number of tasks, failures, progress, and registration in Hydra."""

import functools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from file_workload import FileWork
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

import hydra_plugins.widthopt_launchers as launchers
from hydra_plugins.widthopt_launchers.launcher import (
    WidthoptInProcessLauncher,
    WidthoptLocalLauncher,
)
from hydra_plugins.widthopt_launchers.local import TICK_SECONDS, Pool
from hydra_plugins.widthopt_launchers.progress import Progress
from hydra_plugins.widthopt_launchers.sweeper import expand_sweep
from hydra_plugins.widthopt_launchers.workload import Failed, Task
from widthopt.errors import InputError


CHAIN = {
    "a": ([], "well"),
    "b": ([], "fails"),
    "c": ([], "dies"),
    "of_a": (["a"], "well"),
    "of_b": (["b"], "well"),
    "of_c": (["c"], "well"),
    "of_of_b": (["of_b"], "well"),
    "d": ([], "well"),
}


class RecordedProgress:
    """A progress display that records its calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, args[0].name if args else None, *args[1:]))

    def names(self, kind):
        """Return the names of the tasks of one kind of call."""
        return [call[1] for call in self.calls if call[0] == kind]


def run_pool(folder, table, *, parallel=2, **options):
    progress = RecordedProgress()
    Pool("file_workload.run_spec", max_parallel=parallel, threads=1).run(
        FileWork(folder, table, **options), progress
    )
    return progress


MORE_THAN_A_TICK = 1.4 * TICK_SECONDS
"""Seconds of a task that still runs when the next tasks are started."""


def max_running(folder):
    """Return the largest number of tasks that ran at the same time."""
    most = now = 0
    for line in (folder / "notes").read_text().splitlines():
        now += 1 if line.startswith("begin") else -1
        most = max(most, now)
    return most


# ------------------------------------------------------------------------------------ local


def test_a_failure_blocks_only_dependent_tasks(tmp_path):
    progress = run_pool(tmp_path, CHAIN)
    assert sorted(progress.names("finish")) == ["a", "d", "of_a"]
    assert sorted(progress.names("fail")) == ["b", "c"]
    assert sorted(progress.names("block")) == ["of_b", "of_c", "of_of_b"]
    why = {call[1]: call[2] for call in progress.calls if call[0] == "fail"}
    assert why == {"b": "it was to fail", "c": "its process was ended by SIGKILL"}


@pytest.mark.parametrize("order", [("b", "of_b", "of_of_b"), ("of_of_b", "of_b", "b")])
def test_a_blocked_task_is_not_started(tmp_path, order):
    progress = run_pool(tmp_path, {name: CHAIN[name] for name in order})
    assert progress.names("start") == ["b"]
    assert sorted(progress.names("block")) == ["of_b", "of_of_b"]


def test_a_task_starts_after_the_tasks_that_it_needs(tmp_path):
    table = {"last": (["middle"], "well"), "middle": (["first"], "well"), "first": ([], "well")}
    run_pool(tmp_path, table, parallel=3, seconds=MORE_THAN_A_TICK)
    lines = [line.split()[:2] for line in (tmp_path / "notes").read_text().splitlines()]
    assert [name for word, name in lines if word == "begin"] == ["first", "middle", "last"]
    assert max_running(tmp_path) == 1


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_max_parallel_tasks_run_at_the_same_time(tmp_path, parallel):
    table = {str(number): ([], "well") for number in range(6)}
    run_pool(tmp_path, table, parallel=parallel, seconds=MORE_THAN_A_TICK, together=parallel)
    assert max_running(tmp_path) == parallel


def test_each_task_has_its_own_process_and_log(tmp_path):
    table = {str(number): ([], "well") for number in range(3)}
    run_pool(tmp_path, table)
    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    processes = {line[1]: line[2] for line in lines}
    assert len(set(processes.values())) == 3
    assert str(os.getpid()) not in processes.values()
    for number in table:
        log = (tmp_path / number / "log.txt").read_text()
        assert f"the item {number} says so" in log
        assert f"process {processes[number]}" in log


def test_the_log_of_a_failed_task_has_the_traceback(tmp_path):
    run_pool(tmp_path, {"b": ([], "fails")})
    assert "ValueError: it was to fail" in (tmp_path / "b" / "log.txt").read_text()


def test_a_task_that_exits_with_0_without_a_result_has_failed(tmp_path):
    progress = run_pool(tmp_path, {"x": ([], "lies"), "of_x": (["x"], "well")})
    assert progress.names("fail") == ["x"]
    assert progress.names("block") == ["of_x"]


@pytest.mark.parametrize("parallel", [0, -1, "two"])
def test_an_invalid_max_parallel_is_refused(parallel):
    with pytest.raises(InputError, match=rf"^hydra.launcher.max_parallel is {parallel}, but"):
        Pool("file_workload.run_spec", max_parallel=parallel, threads=None)


def test_processors_are_divided_among_the_tasks_by_default():
    processors = len(os.sched_getaffinity(0))
    assert Pool("file_workload.run_spec", max_parallel=1, threads=None)._threads == processors  # noqa: SLF001
    assert Pool("file_workload.run_spec", max_parallel=999, threads=None)._threads == 1  # noqa: SLF001


def test_the_imports_of_a_workload_are_done_once_for_all_tasks(tmp_path):
    table = {name: ([], "well") for name in "ab"}
    code = f"""
    import sys
    sys.path[:0] = [{str(Path(__file__).parent)!r}]
    from file_workload import FileWork
    from hydra_plugins.widthopt_launchers.local import Pool
    from hydra_plugins.widthopt_launchers.progress import Progress
    if __name__ == "__main__":
        workload = FileWork({str(tmp_path)!r}, {table!r})
        with Progress(workload.tasks()) as progress:
            Pool("file_workload.run_spec", max_parallel=2, threads=1).run(workload, progress)
        assert "mailbox" not in sys.modules
    """
    script = tmp_path / "script.py"  # a new process, because a process has only one fork server
    script.write_text(textwrap.dedent(code))
    subprocess.run([sys.executable, str(script)], check=True)  # noqa: S603 (fixed script)
    for name in table:
        assert "with mailbox: True" in (tmp_path / name / "log.txt").read_text()


def test_ctrl_c_ends_the_tasks_before_the_pool_ends(tmp_path):
    code = f"""
    import sys
    sys.path[:0] = [{str(Path(__file__).parent)!r}]
    from file_workload import FileWork
    from hydra_plugins.widthopt_launchers.local import Pool
    from hydra_plugins.widthopt_launchers.progress import Progress
    if __name__ == "__main__":
        table = {{name: ([], "well") for name in "abcd"}}
        workload = FileWork({str(tmp_path)!r}, table, seconds=30)
        with Progress(workload.tasks()) as progress:
            Pool("file_workload.run_spec", max_parallel=2, threads=1).run(workload, progress)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    process = subprocess.Popen(  # noqa: S603 (fixed script)
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True
    )
    notes = tmp_path / "notes"
    deadline = time.monotonic() + 60
    while not notes.exists() or len(notes.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT or "KeyboardInterrupt" in message
    for line in notes.read_text().splitlines():
        assert line.startswith("begin")
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[2]), 0)


def test_tasks_end_when_their_sweep_is_killed(tmp_path):
    """Tasks have their own process groups, so a signal to the group of the sweep skips them."""
    code = f"""
    import sys
    sys.path[:0] = [{str(Path(__file__).parent)!r}]
    from file_workload import FileWork
    from hydra_plugins.widthopt_launchers.local import Pool
    from hydra_plugins.widthopt_launchers.progress import Progress
    if __name__ == "__main__":
        workload = FileWork({str(tmp_path)!r}, {{name: ([], "well") for name in "ab"}}, seconds=60)
        with Progress(workload.tasks()) as progress:
            Pool("file_workload.run_spec", max_parallel=2, threads=1).run(workload, progress)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)  # noqa: S603
    notes = tmp_path / "notes"
    wait_until(lambda: notes.exists() and len(notes.read_text().splitlines()) == 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for line in notes.read_text().splitlines():
        wait_until(functools.partial(has_ended, line.split()[2]))
    for name in "ab":  # as after Ctrl-C, so a training saves its state
        assert "KeyboardInterrupt" in (tmp_path / name / "log.txt").read_text()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(number):
    """Return whether a process has ended; a zombie has ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# -------------------------------------------------------------------------------- in process


class Planned(FileWork):
    """A workload that a launcher creates from Hydra's loader and the points."""

    root_folder = Path()

    def __init__(self, _loader, points):
        super().__init__(self.root_folder, CHAIN | dict.fromkeys(points[0], ([], "well")))


@pytest.fixture
def importable_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Planned, "root_folder", tmp_path)
    monkeypatch.setitem(sys.modules, "work_of_this_test", sys.modules[__name__])
    monkeypatch.setitem(CHAIN, "c", ([], "fails"))  # "dies" would kill this process
    return tmp_path


@pytest.mark.parametrize("kind", [WidthoptInProcessLauncher, WidthoptLocalLauncher])
def test_a_launcher_runs_all_tasks_it_can_and_reports_the_others(importable_folder, kind):
    options = {"max_parallel": 2, "threads": 1} if kind is WidthoptLocalLauncher else {}
    launcher = kind(
        workload="work_of_this_test.Planned",
        run_spec="file_workload.run_spec",
        assume_yes=True,
        **options,
    )
    launcher.context = type("Context", (), {"config_loader": None})()
    with pytest.raises(
        Failed, match=r"^4 of 9 runs are done, 2 failed and 3 wait for those; the s"
    ):
        launcher.launch([["more"]], 0)
    assert (importable_folder / "began").read_text() == "True"
    assert (importable_folder / "ended").exists()
    assert all((importable_folder / name / "done").exists() for name in ("a", "of_a", "d", "more"))


@pytest.mark.parametrize("assume_yes", ["maybe", "false", 1, None])
def test_assume_yes_must_be_true_or_false(importable_folder, assume_yes):
    launcher = WidthoptInProcessLauncher(
        workload="work_of_this_test.Planned",
        run_spec="file_workload.run_spec",
        assume_yes=assume_yes,
    )
    launcher.context = type("Context", (), {"config_loader": None})()
    with pytest.raises(
        InputError, match=rf"^hydra.launcher.assume_yes is {assume_yes}, but it must be true or"
    ):
        launcher.launch([[]], 0)
    assert not (importable_folder / "began").exists()


class Failing(FileWork):
    """One task fails, and no task needs it."""

    root_folder = Path()

    def __init__(self, _loader, _points):
        super().__init__(self.root_folder, {"a": ([], "well"), "b": ([], "fails")})


def test_a_failure_that_blocks_no_task_is_reported(importable_folder, monkeypatch):
    monkeypatch.setattr(Failing, "root_folder", importable_folder)
    launcher = WidthoptInProcessLauncher(
        workload="work_of_this_test.Failing", run_spec="file_workload.run_spec", assume_yes=True
    )
    launcher.context = type("Context", (), {"config_loader": None})()
    with pytest.raises(Failed, match=r"^1 of 2 runs are done, 1 failed and 0 wait for those;"):
        launcher.launch([[]], 0)


# ---------------------------------------------------------------------------------- progress


TASKS = [Task(name, f"the task {name}", (), weight) for name, weight in (("a", 1), ("b", 3))]


def test_the_remaining_time_follows_from_the_remaining_work(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("hydra_plugins.widthopt_launchers.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("widthopt"), "propagate", True)
    with caplog.at_level(logging.INFO, "widthopt"), Progress(TASKS) as progress:
        progress.start(TASKS[0])
        now[0] += 60
        progress.finish(TASKS[0])  # a quarter of the work took one minute, so three remain
        assert "1 of 2 done, 0:03:00 left; done: the task a, 60.0 s" in caplog.text
        progress.start(TASKS[1])
        now[0] += 30
        progress.fail(TASKS[1], "no luck")
        assert "1 failed" in caplog.text
        assert "FAILED (no luck): the task b, 30.0 s" in caplog.text
    assert (progress.done, progress.failed, progress.blocked) == (1, 1, 0)


@pytest.mark.parametrize(("at_once", "left"), [(1, "0:41:40"), (2, "0:20:50")])
def test_the_remaining_time_is_accurate_for_small_tasks(monkeypatch, caplog, at_once, left):
    """Twenty large tasks took 100 s each. Fifty of the 80 small tasks of 50 s each remain.

    From their weights, these would take 25 s in total.
    """
    now = [0.0]
    monkeypatch.setattr("hydra_plugins.widthopt_launchers.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("widthopt"), "propagate", True)
    tasks = [Task(str(index), "a task", (), 200 if index < 20 else 1) for index in range(100)]
    with caplog.at_level(logging.INFO, "widthopt"), Progress(tasks) as progress:
        for first in range(0, 50, at_once):
            together = tasks[first : first + at_once]
            for task in together:
                progress.start(task)
            now[0] += 100 if first < 20 else 50
            for task in together:
                progress.finish(task)
        assert f"50 of 100 done, {left} left" in caplog.text


# -------------------------------------------------------------------------------------- Hydra


def test_registering_twice_has_no_effect():
    launchers.register()
    launchers.register()
    for kind in (Launcher, Sweeper):
        names = [item.__name__ for item in Plugins.instance().discover(kind)]
        ours = [name for name in names if name.startswith("Widthopt")]
        assert len(ours) == len(set(ours))


def expand_points(*words):
    with initialize_config_module("conf", version_base="1.3"):
        return expand_sweep(GlobalHydra.instance().config_loader(), list(words))


def test_points_are_the_product_of_the_swept_values():
    expanded = expand_points("projection.width=0.5,1", "seeds=[0],[1]", "network=resnet18")
    assert len(expanded) == 4
    assert ["projection.width=0.5", "seeds=[0]", "network=resnet18"] in expanded


def test_the_command_line_replaces_swept_values_of_an_experiment():
    expanded = expand_points("experiment=fig3_width", "projection.width=0.9", "seeds=[7]")
    assert len(expanded) == 2 * 3
    assert all("projection.width=0.9" in item and "seeds=[7]" in item for item in expanded)


def test_several_experiments_are_expanded_in_order():
    expanded = expand_points("experiment=fig3_width,uniform", "seeds=[0]")
    assert len(expanded) == 36 + 10
    assert [item[0] for item in expanded] == ["experiment=fig3_width"] * 36 + [
        "experiment=uniform"
    ] * 10


def test_experiments_can_be_selected_by_a_pattern():
    assert {point[0] for point in expand_points("experiment=glob(fig5*)")} == {
        "experiment=fig5_fraction", "experiment=fig5_resolution"
    }  # fmt: skip


def test_without_swept_values_there_is_one_point():
    assert expand_points("network=resnet18") == [["network=resnet18"]]
    assert expand_points() == [[]]


@pytest.mark.parametrize("name", ["inprocess", "local"])
def test_every_launcher_can_be_composed(name):
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", [f"hydra/launcher={name}"], _multirun())
    assert config.hydra.launcher._target_.startswith(
        "hydra_plugins.widthopt_launchers.launcher.Widthopt"
    )
    assert (
        config.hydra.sweeper._target_ == "hydra_plugins.widthopt_launchers.sweeper.WidthoptSweeper"
    )


def _multirun():
    from hydra.types import RunMode  # noqa: PLC0415 (used only here)

    return RunMode.MULTIRUN
