"""Launchers: what is started when, how much at once, what a failure stops; and Hydra's side."""

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


class Told:
    """What a progress is told."""

    def __init__(self):
        self.words = []

    def __getattr__(self, name):
        return lambda *args: self.words.append((name, args[0].name if args else None, *args[1:]))

    def of(self, kind):
        return [word[1] for word in self.words if word[0] == kind]


def run_pool(folder, table, *, parallel=2, **options):
    reported = Told()
    Pool("file_workload.run_spec", max_parallel=parallel, threads=1).run(
        FileWork(folder, table, **options), reported
    )
    return reported


LONGER_THAN_A_TICK = 1.4 * TICK_SECONDS
"""What goes on still when the next are chosen."""


def most_at_once(folder):
    """How many items went on at the same time at most."""
    most = now = 0
    for line in (folder / "notes").read_text().splitlines():
        now += 1 if line.startswith("begin") else -1
        most = max(most, now)
    return most


# ------------------------------------------------------------------------------------ local


def test_one_failure_stops_nothing_but_what_needs_it(tmp_path):
    reported = run_pool(tmp_path, CHAIN)
    assert sorted(reported.of("finish")) == ["a", "d", "of_a"]
    assert sorted(reported.of("fail")) == ["b", "c"]
    assert sorted(reported.of("block")) == ["of_b", "of_c", "of_of_b"]
    why = {word[1]: word[2] for word in reported.words if word[0] == "fail"}
    assert why == {"b": "it was to fail", "c": "its process was ended by SIGKILL"}


@pytest.mark.parametrize("order", [("b", "of_b", "of_of_b"), ("of_of_b", "of_b", "b")])
def test_what_needs_something_that_cannot_be_done_is_not_begun(tmp_path, order):
    reported = run_pool(tmp_path, {name: CHAIN[name] for name in order})
    assert reported.of("start") == ["b"]
    assert sorted(reported.of("block")) == ["of_b", "of_of_b"]


def test_what_is_needed_comes_before_what_needs_it(tmp_path):
    table = {"last": (["middle"], "well"), "middle": (["first"], "well"), "first": ([], "well")}
    run_pool(tmp_path, table, parallel=3, seconds=LONGER_THAN_A_TICK)
    lines = [line.split()[:2] for line in (tmp_path / "notes").read_text().splitlines()]
    assert [name for word, name in lines if word == "begin"] == ["first", "middle", "last"]
    assert most_at_once(tmp_path) == 1


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_no_more_goes_on_at_once_than_was_said_and_no_less(tmp_path, parallel):
    table = {str(number): ([], "well") for number in range(6)}
    run_pool(tmp_path, table, parallel=parallel, seconds=LONGER_THAN_A_TICK, together=parallel)
    assert most_at_once(tmp_path) == parallel


def test_each_item_has_a_process_of_its_own_and_its_log(tmp_path):
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


def test_a_failure_leaves_its_traceback_in_the_log(tmp_path):
    run_pool(tmp_path, {"b": ([], "fails")})
    assert "ValueError: it was to fail" in (tmp_path / "b" / "log.txt").read_text()


def test_a_process_that_ends_well_without_a_result_has_failed(tmp_path):
    reported = run_pool(tmp_path, {"x": ([], "lies"), "of_x": (["x"], "well")})
    assert reported.of("fail") == ["x"]
    assert reported.of("block") == ["of_x"]


@pytest.mark.parametrize("parallel", [0, -1, "two"])
def test_no_run_at_a_time_is_refused(parallel):
    with pytest.raises(InputError, match=rf"^hydra.launcher.max_parallel is {parallel}, but"):
        Pool("file_workload.run_spec", max_parallel=parallel, threads=None)


def test_processors_are_shared_out_unless_said():
    processors = len(os.sched_getaffinity(0))
    assert Pool("file_workload.run_spec", max_parallel=1, threads=None)._threads == processors  # noqa: SLF001
    assert Pool("file_workload.run_spec", max_parallel=999, threads=None)._threads == 1  # noqa: SLF001


def test_what_takes_long_to_import_is_imported_once_for_all_items(tmp_path):
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
    script = tmp_path / "script.py"  # since a process has one that it forks from
    script.write_text(textwrap.dedent(code))
    subprocess.run([sys.executable, str(script)], check=True)  # noqa: S603 (our own script)
    for name in table:
        assert "with mailbox: True" in (tmp_path / name / "log.txt").read_text()


def test_ctrl_c_is_passed_on_once_and_waited_for(tmp_path):
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
    process = subprocess.Popen(  # noqa: S603 (our own script)
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


def test_items_end_with_a_sweep_that_is_killed(tmp_path):
    """They are in process groups of their own, so that what kills the sweep's leaves them."""
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
    until(lambda: notes.exists() and len(notes.read_text().splitlines()) == 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for line in notes.read_text().splitlines():
        until(functools.partial(has_ended, line.split()[2]))
    for name in "ab":  # as by Ctrl-C, so that a training saves its state
        assert "KeyboardInterrupt" in (tmp_path / name / "log.txt").read_text()


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(number):
    """Whether a process has ended, be it waited for or not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# -------------------------------------------------------------------------------- in process


class Planned(FileWork):
    """As a launcher makes it, of Hydra's loader and the points."""

    folder_of_all = Path()

    def __init__(self, _loader, points):
        super().__init__(self.folder_of_all, CHAIN | dict.fromkeys(points[0], ([], "well")))


@pytest.fixture
def named_here(monkeypatch, tmp_path):
    monkeypatch.setattr(Planned, "folder_of_all", tmp_path)
    monkeypatch.setitem(sys.modules, "work_of_this_test", sys.modules[__name__])
    monkeypatch.setitem(CHAIN, "c", ([], "fails"))  # nothing may kill this process
    return tmp_path


@pytest.mark.parametrize("kind", [WidthoptInProcessLauncher, WidthoptLocalLauncher])
def test_a_launcher_does_what_it_can_and_says_what_it_could_not(named_here, kind):
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
    assert (named_here / "began").read_text() == "True"
    assert (named_here / "ended").exists()
    assert all((named_here / name / "done").exists() for name in ("a", "of_a", "d", "more"))


@pytest.mark.parametrize("assume_yes", ["maybe", "false", 1, None])
def test_whether_a_sweep_is_meant_is_a_truth_value(named_here, assume_yes):
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
    assert not (named_here / "began").exists()


class Failing(FileWork):
    """One run fails, and none needs it."""

    folder_of_all = Path()

    def __init__(self, _loader, _points):
        super().__init__(self.folder_of_all, {"a": ([], "well"), "b": ([], "fails")})


def test_a_failure_that_blocks_nothing_is_one_nevertheless(named_here, monkeypatch):
    monkeypatch.setattr(Failing, "folder_of_all", named_here)
    launcher = WidthoptInProcessLauncher(
        workload="work_of_this_test.Failing", run_spec="file_workload.run_spec", assume_yes=True
    )
    launcher.context = type("Context", (), {"config_loader": None})()
    with pytest.raises(Failed, match=r"^1 of 2 runs are done, 1 failed and 0 wait for those;"):
        launcher.launch([[]], 0)


# ---------------------------------------------------------------------------------- progress


ITEMS = [Task(name, f"the item {name}", (), weight) for name, weight in (("a", 1), ("b", 3))]


def test_the_time_left_follows_from_the_work_that_is_left(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("hydra_plugins.widthopt_launchers.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("widthopt"), "propagate", True)
    with caplog.at_level(logging.INFO, "widthopt"), Progress(ITEMS) as progress:
        progress.start(ITEMS[0])
        now[0] += 60
        progress.finish(ITEMS[0])  # a quarter of the work in a minute: three more
        assert "1 of 2 done, 0:03:00 left; done: the item a, 60.0 s" in caplog.text
        progress.start(ITEMS[1])
        now[0] += 30
        progress.fail(ITEMS[1], "no luck")
        assert "1 failed" in caplog.text
        assert "FAILED (no luck): the item b, 30.0 s" in caplog.text
    assert (progress.done, progress.failed, progress.blocked) == (1, 1, 0)


@pytest.mark.parametrize(("at_once", "left"), [(1, "0:41:40"), (2, "0:20:50")])
def test_the_time_left_is_that_of_small_items_too(monkeypatch, caplog, at_once, left):
    """20 large ones took 100 s each; of 80 small ones, 50 s each with their start, 50 are left.

    By their weights they would take 25 s in all.
    """
    now = [0.0]
    monkeypatch.setattr("hydra_plugins.widthopt_launchers.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("widthopt"), "propagate", True)
    items = [Task(str(index), "an item", (), 200 if index < 20 else 1) for index in range(100)]
    with caplog.at_level(logging.INFO, "widthopt"), Progress(items) as progress:
        for first in range(0, 50, at_once):
            together = items[first : first + at_once]
            for task in together:
                progress.start(task)
            now[0] += 100 if first < 20 else 50
            for task in together:
                progress.finish(task)
        assert f"50 of 100 done, {left} left" in caplog.text


# -------------------------------------------------------------------------------------- Hydra


def test_registering_again_changes_nothing():
    launchers.register()
    launchers.register()
    for kind in (Launcher, Sweeper):
        names = [item.__name__ for item in Plugins.instance().discover(kind)]
        ours = [name for name in names if name.startswith("Widthopt")]
        assert len(ours) == len(set(ours))


def points(*words):
    with initialize_config_module("conf", version_base="1.3"):
        return expand_sweep(GlobalHydra.instance().config_loader(), list(words))


def test_points_are_the_product_of_what_is_swept():
    found = points("projection.width=0.5,1", "seeds=[0],[1]", "network=resnet18")
    assert len(found) == 4
    assert ["projection.width=0.5", "seeds=[0]", "network=resnet18"] in found


def test_the_command_line_wins_over_an_experiments_own_sweep():
    found = points("experiment=fig3_width", "projection.width=0.9", "seeds=[7]")
    assert len(found) == 2 * 3
    assert all("projection.width=0.9" in item and "seeds=[7]" in item for item in found)


def test_several_experiments_come_one_after_another():
    found = points("experiment=fig3_width,uniform", "seeds=[0]")
    assert len(found) == 36 + 10
    assert [item[0] for item in found] == ["experiment=fig3_width"] * 36 + [
        "experiment=uniform"
    ] * 10


def test_experiments_may_be_chosen_by_a_pattern():
    assert {point[0] for point in points("experiment=glob(fig5*)")} == {
        "experiment=fig5_fraction", "experiment=fig5_resolution"
    }  # fmt: skip


def test_nothing_swept_is_one_point():
    assert points("network=resnet18") == [["network=resnet18"]]
    assert points() == [[]]


@pytest.mark.parametrize("name", ["inprocess", "local"])
def test_every_choice_of_a_launcher_can_be_made(name):
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
    from hydra.types import RunMode  # noqa: PLC0415 (here alone)

    return RunMode.MULTIRUN
