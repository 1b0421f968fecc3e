"""Sweeps on a real SLURM: sent, watched, disturbed in every way there is, and whole in the end."""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import one_line
from login import (
    EPOCHS,
    LONG,
    ONE,
    PATIENCE_SECONDS,
    SWEEP,
    Folder,
    is_complete,
    preempt,
    run_patched,
    start_patched,
)  # fmt: skip


# ------------------------------------------------------------------------------- as it should go


def test_a_sweep_with_shared_searches_and_failures_comes_to_its_report(folder):
    words = (
        *SWEEP, "projection.width=0.5,0.75,1", "recipe.learning_rate=0.2,1e30", "seeds=[0]",
    )  # fmt: skip
    started = time.monotonic()
    folder.send(*words, submitted=12)
    assert time.monotonic() - started < 60
    # Each training waits for one search; two arrays hold them all.
    assert len({job.partition("_")[0] for job in folder.queue()}) <= 2
    folder.until_over()
    counted = sorted((row["kind"], row["state"]) for row in folder.rows())
    assert counted == (
        [("search", "done")] * 3 + [("search", "failed")] * 3
        + [("train", "blocked")] * 3 + [("train", "done")] * 3
    )  # fmt: skip
    why = {row["why"] for row in folder.rows() if row["state"] == "failed"}
    assert all("the loss is nan" in item for item in why), why
    message = {}
    for row in folder.rows():
        text = folder.cluster.run("sacct", "-X", "-n", "-P", "-o", "State", "-j", row["job"])
        message.setdefault((row["kind"], row["state"]), set()).add(text.split()[0])
    assert message == {
        ("search", "done"): {"COMPLETED"}, ("train", "done"): {"COMPLETED"},
        ("search", "failed"): {"FAILED"}, ("train", "blocked"): {"CANCELLED"},
    }  # fmt: skip
    # What is done is not done again; what failed is, and what waited for it.
    folder.send(*words, submitted=6)
    folder.until_over()
    for row in folder.rows():
        expected = {"done": 1, "failed": 2}.get(row["state"])
        assert expected is None or len(folder.attempts(row["name"])) == expected
    report = folder.widthopt("report")
    assert report.returncode == 0, report.stderr


def test_trainings_share_their_searches(folder):
    words = (*SWEEP, "projection.width=0.5,0.75,1", "recipe.epochs=1,2,3", "seeds=[0]")
    folder.send(*words, submitted=12)
    arrays = {job.partition("_")[0] for job in folder.queue()}
    assert len(arrays) <= 4  # the searches, and three times a training that waits for each
    folder.until_over()
    counted = Counter((row["kind"], row["state"]) for row in folder.rows())
    assert counted == {("search", "done"): 3, ("train", "done"): 9}
    assert all(len(folder.attempts(row["name"])) == 1 for row in folder.rows())


def test_commands_know_a_run_from_any_shell(folder):
    with folder.slowly():
        folder.send(*ONE, LONG, submitted=2)
        search = folder.until_running()
        shown = json.loads(folder.widthopt("show", search["name"]).stdout)
        assert shown["job"] == search["job"]
        assert (shown["state"], shown["queue"]) == ("running", "RUNNING")
        assert folder.row("train")["state"] == "queued"
        assert "epoch 1 of" in folder.widthopt("logs", search["name"][:12]).stdout
        folder.send(*ONE, LONG, submitted=2 - 2)
        ended = folder.widthopt("cancel", "sweep")
        assert set(ended.stdout.split()) == {row["name"] for row in folder.rows()}
        assert folder.queue() == {}
        assert {row["state"] for row in folder.rows()} == {"stale"}
        assert folder.row("search")["why"].startswith("SLURM: CANCELLED")
    again = folder.widthopt("retry", "sweep")
    assert again.stderr.startswith("2 runs submitted"), again.stderr
    followed = folder.widthopt("logs", "-f", search["name"])
    assert f"epoch {EPOCHS} of {EPOCHS}" in followed.stdout
    folder.until_over()
    assert len(folder.attempts(search["name"])) == 2
    assert is_complete(folder, *ONE, LONG)


def test_what_another_sweep_needs_is_not_cancelled(folder):
    later = "+hydra.launcher.options.begin=now+600"
    folder.send(*ONE, later, submitted=2)
    (first,) = (folder.path / "runs" / "sweeps").iterdir()
    search, mine = folder.row("search")["name"], folder.row("train")["name"]
    folder.send(*ONE, "recipe.epochs=3", later, submitted=1)
    done = folder.widthopt("cancel", first.stem)
    assert done.stdout.split() == [mine]
    assert f"{search} continues, because another sweep needs it; --force cancels it" in done.stderr
    assert len(folder.queue()) == 2
    assert folder.widthopt("cancel", first.stem, "--force").stdout.split() == [search]
    folder.until_over()  # what needed it goes with it


def test_one_run_is_done_by_hand(folder):
    folder.send(*ONE, "+hydra.launcher.options.begin=now+600", submitted=2)
    folder.widthopt("cancel", "sweep")
    search, training = folder.row("search")["name"], folder.row("train")["name"]
    early = folder.widthopt("run", training)
    assert one_line(early, 2).startswith(f"{training} is a training that needs {search}, but")
    assert folder.widthopt("run", search).returncode == 0
    assert folder.widthopt("run", training).returncode == 0
    assert is_complete(folder, *ONE)


def test_a_sweep_waits_for_its_end_if_it_is_to(folder):
    done = folder.widthopt(*ONE, "hydra.launcher.wait=true")
    assert done.returncode == 0, done.stderr
    assert {row["state"] for row in folder.rows()} == {"done"}
    failing = folder.widthopt(*ONE, "recipe.learning_rate=1e30", "hydra.launcher.wait=true")
    assert failing.returncode == 1
    assert failing.stderr.splitlines()[-1].startswith("widthopt: 0 of 2 runs are done and 2 are")


def test_ctrl_c_ends_the_wait_and_no_job(folder):
    later = "+hydra.launcher.options.begin=now+600"
    process = folder.start(*ONE, "hydra.launcher.wait=true", later)
    while "2 runs submitted" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    (sweep,) = (folder.path / "runs" / "sweeps").iterdir()
    assert message.splitlines()[-1] == (
        "widthopt: stopped; submitted jobs continue; to end them: widthopt cancel "
        f"{sweep.stem} --root runs"
    )
    assert len(folder.queue()) == 2


def test_what_a_job_said_before_it_began_is_followed_too(folder):
    setup = 'hydra.launcher.setup=["set -e","echo there is no such module","exit 7"]'
    folder.send(*ONE, setup, "+hydra.launcher.options.begin=now+30", submitted=2)
    name = folder.row("search")["name"]
    assert folder.row("search")["state"] == "queued"
    assert "there is no such module" in folder.widthopt("logs", "-f", name).stdout


def test_arrays_are_no_longer_than_the_cluster_allows(folder):
    words = (*SWEEP, "projection.width=0.5,0.6,0.75,1", "seeds=[0]")
    small = "import hydra_plugins.widthopt_launchers.queue as q; q.array_size = lambda: 3"
    run_patched(folder, small, *words, "+hydra.launcher.options.begin=now+600")
    jobs = sorted(folder.queue())
    assert len(jobs) == 8
    arrays = {}
    for job in jobs:
        arrays.setdefault(job.partition("_")[0], []).append(job)
    assert max(map(len, arrays.values())) == 3


# ------------------------------------------------------------------------------------ disturbed


def requeue(folder, row):
    folder.cluster.run("scontrol", "requeue", row["job"])


def kill_node(folder, row):
    node = folder.attempts(row["name"])[-1]["host"]
    folder.cluster.kill_node(node)
    folder.until_started(row, 2)
    folder.cluster.start_node(node)


def restart_controller(folder, _row):
    folder.cluster.restart_controller()


@pytest.mark.parametrize(
    ("disturb", "starts"),
    [(preempt, 2), (requeue, 2), (kill_node, 2), (restart_controller, 1)],
)
def test_a_search_that_is_disturbed_ends_with_the_very_same_result(folder, disturb, starts):
    words = (*ONE, LONG, "hydra.launcher.resources.gpus_per_node=8")
    with folder.slowly():
        folder.send(*words, submitted=2)
        row = folder.until_running()
        disturb(folder, row)
        folder.until_started(row, starts)
    folder.until_over()
    assert len(folder.attempts(row["name"])) == starts
    log = (folder.path / "runs" / "stages" / row["name"] / "log.txt").read_text()
    # It went on from where it was, and did not begin anew.
    assert log.count(f"epoch 1 of {EPOCHS}") == 1, log
    assert is_complete(folder, *words)


def test_a_time_limit_is_a_pause(folder):
    """The search is stopped until the limit is near; SLURM may warn up to a minute earlier."""
    words = (*ONE, LONG, "hydra.launcher.resources.minutes=2", "hydra.launcher.warn_seconds=5")
    with folder.slowly():
        folder.send(*words, submitted=2)
        row = folder.until_running(epochs=1)
        log = folder.path / "runs" / "stages" / row["name"] / "log.txt"
        process = int(log.read_text().splitlines()[0].rpartition(" ")[2])
        os.kill(process, signal.SIGSTOP)
    folder.until(lambda: _is_warned(process))
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)
    folder.until_over()
    assert len(folder.attempts(row["name"])) == 2
    assert "is requeued and will resume" in log.read_text()
    assert log.read_text().count(f"epoch 1 of {EPOCHS}") == 1
    done = folder.cluster.run("sacct", "-D", "-X", "-n", "-P", "-o", "State", "-j", row["job"])
    assert "TIMEOUT" not in done
    assert is_complete(folder, *words)


def _is_warned(process):
    """Whether a process that is stopped has been sent SIGUSR2; SLURM may continue it, too."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", status, re.MULTILINE)
    return any(int(item, 16) >> (signal.SIGUSR2 - 1) & 1 for item in pending)


def test_a_job_that_is_put_back_too_often_is_given_up(folder):
    with folder.slowly():
        folder.send(*ONE, LONG, "hydra.launcher.max_requeues=0", submitted=2)
        requeue(folder, folder.until_running())
        folder.until_over()
    found = folder.row("search")
    assert (found["state"], folder.row("train")["state"]) == ("stale", "stale")
    assert found["why"] == (
        "hydra.launcher.max_requeues is 0, but this job was requeued 1 times; start the same "
        "sweep again"
    )


def test_without_the_right_to_requeue_the_same_command_goes_on(folder):
    words = (*ONE, LONG, "hydra.launcher.requeue=false")
    with folder.slowly():
        folder.send(*words, submitted=2)
        row = folder.until_running()
        folder.cluster.run("scancel", "--signal=USR2", row["job"])
        folder.until_over()
    assert folder.row("search")["why"] == "stopped before its end; start the same sweep again"
    folder.send(*words, submitted=2)
    folder.until_over()
    log = (folder.path / "runs" / "stages" / row["name"] / "log.txt").read_text()
    assert log.count(f"epoch 1 of {EPOCHS}") == 1
    assert is_complete(folder, *ONE, LONG)


def test_workers_that_load_images_take_no_warning(folder):
    # Only the paper's augmentation takes processes of their own here.
    words = (*ONE, "recipe.search_epochs=8", "runtime.workers=2", "recipe.augmentation=paper")
    with folder.slowly():
        folder.send(*words, submitted=2)
        row = folder.until_running(epochs=1)
        log = folder.path / "runs" / "stages" / row["name"] / "log.txt"
        process = log.read_text().splitlines()[0].rpartition(" ")[2]
        folder.until(lambda: len(_children(process)) >= 2)
        folder.cluster.run("scancel", "--signal=USR2", row["job"])
        folder.until_started(row, 2)
    folder.until_over()
    assert log.read_text().count("is requeued and will resume") == 1
    assert "Traceback" not in log.read_text()
    assert is_complete(folder, *words)


def _children(process):
    path = Path("/proc", process, "task", process, "children")
    return path.read_text().split()


def test_a_node_whose_slurmd_alone_is_killed_loses_nothing(folder):
    """SLURM, after half a minute of silence, starts its job elsewhere."""
    with folder.slowly():
        folder.send(*ONE, LONG, submitted=2)
        row = folder.until_running()
        node = folder.attempts(row["name"])[-1]["host"]
        folder.cluster.kill_daemon_of(node)
        folder.until_started(row, 2)
    folder.cluster.start_node(node)
    folder.until_over()
    log = (folder.path / "runs" / "stages" / row["name"] / "log.txt").read_text()
    assert log.count(f"epoch 1 of {EPOCHS}") == 1
    assert is_complete(folder, *ONE, LONG)


def test_code_that_is_edited_while_it_waits_changes_nothing(folder):
    folder.send(*ONE, "+hydra.launcher.options.begin=now+5", submitted=2)
    before = folder.network.read_text()
    folder.network.write_text("raise ValueError('edited')")
    folder.until_over()
    folder.network.write_text(before)
    assert is_complete(folder, *ONE)


# --------------------------------------------------------------------------------- at submission


HELD = """
    import pathlib, time
    import hydra_plugins.widthopt_launchers.slurm
    copy = hydra_plugins.widthopt_launchers.slurm.snapshot

    def held(*args, **kwargs):
        pathlib.Path("held").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.1)
        return copy(*args, **kwargs)

    hydra_plugins.widthopt_launchers.slurm.snapshot = held
"""


def test_two_submitters_at_once_send_each_run_once(folder):
    words = (*SWEEP, LONG, "projection.width=0.5,1", "seeds=[0]")
    first = start_patched(folder, HELD, *words)
    with folder.slowly():  # so that the second one finds them in the queue
        try:
            folder.until((folder.path / "held").exists)  # it has seen the queue, which is empty
            second = folder.start(*words)
            message = [second.stderr.readline()]
            while message[-1] and "waiting for it" not in message[-1]:
                message.append(second.stderr.readline())
            assert message[-1] == "another process submits from runs; waiting for it\n"
        finally:
            (folder.path / "go").touch()  # else it waits for ever
        ends = [item.communicate(timeout=PATIENCE_SECONDS)[1] for item in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ends
    assert ends[0].splitlines()[-1].startswith("4 runs submitted; see: ")
    assert ends[1].splitlines()[-1].startswith("0 runs submitted, 4 are in the queue already; ")
    folder.until_over()
    for row in folder.rows():
        assert (row["state"], len(folder.attempts(row["name"]))) == ("done", 1)


KILLED_AFTER = """
    import os, signal, submitit
    class Killed(submitit.SlurmExecutor):
        def {name}(self, *args, **kwargs):
            super().{name}(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
    submitit.SlurmExecutor = {kind}
    submitit.slurm.slurm.SlurmExecutor = Killed
"""


def test_jobs_whose_submitter_was_killed_before_it_noted_them_are_adopted(folder):
    words = (*SWEEP, LONG, "projection.width=0.5,1", "seeds=[0]")
    with folder.slowly():
        killed = run_patched(folder, KILLED_AFTER.format(name="map_array", kind="Killed"), *words)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(folder.queue()) == 2
        rows = folder.rows()
    assert [row["state"] for row in rows if row["kind"] == "train"] == ["missing", "missing"]
    # Nobody wrote their jobs down but those who asked for the state, which adopts them.
    assert all(row["job"] for row in rows if row["kind"] == "search")
    folder.send(*words, submitted=2)
    folder.until_over()
    for row in folder.rows():
        assert (row["state"], len(folder.attempts(row["name"]))) == ("done", 1)


def test_jobs_whose_orders_were_never_put_in_place_are_sent_again(folder):
    words = (*SWEEP, "projection.width=0.5,1", "seeds=[0]")
    patch = KILLED_AFTER.format(name="_submit_command", kind="submitit.SlurmExecutor")
    killed = run_patched(folder, patch, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder.send(*words, submitted=2)  # the orphans are in the queue, and known
    folder.until_over()
    assert "done" not in {row["state"] for row in folder.rows()}
    folder.send(*words, submitted=4)
    folder.until_over()
    for row in folder.rows():
        assert (row["state"], len(folder.attempts(row["name"]))) == ("done", 1)


# --------------------------------------------------------------------------- several processes


def test_four_processes_train_together(folder):
    words = (*ONE, "hydra.launcher.resources.tasks_per_node=4")
    folder.send(*words, submitted=2)
    folder.until_over()
    assert {row["state"] for row in folder.rows()} == {"done"}
    for row in folder.rows():
        stage = folder.path / "runs" / "stages" / row["name"]
        assert len(list(stage.glob("log-*.txt"))) == 3
        assert not list(stage.glob(".meeting*"))
        assert "epoch 2 of 2" in (stage / "log.txt").read_text()


def test_two_nodes_train_one_run_together_as_one_node_does(folder):
    """As where nodes have four GPUs each."""
    apart = (
        "hydra.launcher.resources.nodes=2", "hydra.launcher.resources.tasks_per_node=2",
        "hydra.launcher.resources.gpus_per_node=4",
    )  # fmt: skip
    folder.send(*ONE, *apart, submitted=2)
    folder.until_over()
    assert {row["state"] for row in folder.rows()} == {"done"}
    jobs = ",".join(row["job"] for row in folder.rows())
    done = folder.cluster.run("sacct", "-X", "-n", "-P", "-o", "NNodes,ReqTRES", "-j", jobs)
    assert len(done.split()) == 2
    for line in done.split():
        assert line.startswith("2|")
        assert "gres/gpu=8" in line
    folder.send(*ONE, "hydra.launcher.resources.tasks_per_node=4", "root=one_node", submitted=2)
    folder.until_over()
    assert folder.results() == folder.results("one_node") != {}


RANK_FAILS = """

import os


def failing(num_classes, width=16):
    network = MyNetwork(num_classes, width)
    if os.environ.get("RANK") == "2":
        raise ValueError("the third has no luck")
    return network
"""


def test_the_failure_of_any_process_is_the_jobs_and_is_told(folder):
    with folder.network.open("a") as file:
        file.write(RANK_FAILS)
    words = (*ONE, "network.factory=my_network.failing")
    words = tuple(word for word in words if word != "network.factory=my_network.MyNetwork")
    folder.send(*words, "hydra.launcher.resources.tasks_per_node=4", submitted=2)
    folder.until_over()
    row = folder.row("search")
    assert "the third has no luck" in row["why"]
    assert (row["state"], folder.row("train")["state"]) == ("failed", "blocked")
    done = folder.cluster.run("sacct", "-X", "-n", "-P", "-o", "State", "-j", row["job"])
    assert done.split() == ["FAILED"]


def test_a_process_of_several_that_is_killed_is_the_failure_of_its_run(folder):
    with folder.slowly():
        folder.send(*ONE, LONG, "hydra.launcher.resources.tasks_per_node=4", submitted=2)
        row = folder.until_running()
        log = folder.path / "runs" / "stages" / row["name"] / "log-2.txt"
        os.kill(int(log.read_text().splitlines()[0].rpartition(" ")[2]), signal.SIGKILL)
        folder.until_over()
    row = folder.row("search")
    assert row["state"] in {"failed", "stale"}, row  # as another process had time to say why or not
    assert row["why"]
    message = folder.widthopt("status")
    assert message.returncode == 0, message.stderr
    assert " ".join(row["why"].split()) in " ".join(message.stdout.split())
    assert folder.row("train")["state"] in {"blocked", "stale"}


SLOW = """

import os
import pathlib
import time


class Slow(nn.ReLU):
    def forward(self, images):
        alone = not self.training and os.environ.get("RANK") == "1"
        if alone and images.device.type != "meta" and pathlib.Path("slow").exists():
            pathlib.Path("sleeps").touch()
            time.sleep(600)
        return super().forward(images)


Slow.__module__ = "torch.nn"  # so that it is not traced into


def slow(num_classes, width=16):
    network = MyNetwork(num_classes, width)
    network.stem[2] = Slow()
    return network
"""


def test_a_warning_outside_of_training_frees_the_process_that_waits_for_another(folder):
    with folder.network.open("a") as file:
        file.write(SLOW)
    (folder.path / "slow").touch()
    words = (
        *(word for word in ONE if not word.startswith(("methods", "network.factory"))),
        "methods=[uniform]", "network.factory=my_network.slow",
        "hydra.launcher.resources.tasks_per_node=2",
    )  # fmt: skip
    folder.send(*words, submitted=1)
    folder.until((folder.path / "sleeps").exists)
    (folder.path / "slow").unlink()
    (row,) = folder.rows()
    folder.cluster.run("scancel", "--signal=USR2", row["job"])
    folder.until_over()
    assert len(folder.attempts(row["name"])) == 2
    (row,) = folder.rows()
    assert row["state"] == "done"
    assert not any("could not be requeued" in text for text in folder.logs().values())


def test_processes_that_are_preempted_agree_where_to_stop(folder):
    words = (
        *ONE, LONG, "hydra.launcher.resources.tasks_per_node=2",
        "hydra.launcher.resources.gpus_per_node=8",
    )  # fmt: skip
    with folder.slowly():
        folder.send(*words, submitted=2)
        row = folder.until_running()
        preempt(folder, row)
        folder.until_started(row, 2)
    folder.until_over()
    assert {item["state"] for item in folder.rows()} == {"done"}
    assert len(folder.attempts(row["name"])) == 2
    log = (folder.path / "runs" / "stages" / row["name"] / "log.txt").read_text()
    assert log.count(f"epoch 1 of {EPOCHS}") == 1
    disturbed = folder.results()
    # The same two processes undisturbed find the same, to the last bit.
    for path in (folder.path / "runs").glob("stages/*"):
        path.rename(folder.path / f"old-{path.name}")
    folder.send(*words, submitted=2)
    folder.until_over()
    assert folder.results() == disturbed


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra.launcher.options.partition=nowhere", "partition"),
        ("hydra.launcher.options.constraint=quantum", "Invalid feature"),
        ("hydra.launcher.resources.gpus_per_node=9", "node configuration"),
        ("hydra.launcher.options.account=strangers", "account"),
        ("+resources.train.gpus_per_node=9", "node configuration"),  # searches would be taken
    ],
)
def test_what_slurm_would_refuse_is_refused_before_anything_is_sent(folder, word, message):
    done = folder.widthopt(*ONE, word)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert line.startswith("widthopt: sbatch is given --"), line
    assert message in line
    assert "Traceback" not in done.stderr
    assert folder.queue() == {}
    assert not list(folder.path.glob("runs/stages/*/submission.json"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "hydra.launcher.options.partition=short",
            "hydra.launcher.resources.minutes is 60, but the time limit of partition short is 5;",
        ),
        ("hydra.launcher.gpus_as=shares", "hydra.launcher.gpus_as is shares, but it must be"),
        ("hydra.launcher.parallelism=0", "hydra.launcher.parallelism is 0, but it is an integer"),
        ("hydra.launcher.resources.nodes=0", "hydra.launcher.resources.nodes is 0, but it is a"),
        ("+resources.train.hours=3", "resources.train.hours is not a key, but the resources are"),
        ("+resources.train.minutes=long", "resources.train.minutes is long, but it is a number"),
        ("hydra.launcher.code=[elsewhere]", "hydra.launcher.code is elsewhere, but there is no"),
        (
            "+hydra.launcher.minutes=9",
            "hydra.launcher.minutes is 9, but the keys of this launcher are",
        ),
        (
            "+hydra.launcher.options.job_name=a",
            "hydra.launcher.options.job_name is a, but the laun",
        ),
        (
            "hydra.launcher.warn_seconds=1801",
            "hydra.launcher.warn_seconds is 1801, but it is at most half",
        ),
    ],
)
def test_a_wrong_value_is_one_line(folder, word, message):
    done = folder.widthopt(*ONE, word)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"widthopt: {message}"), done.stderr
    assert folder.queue() == {}


def test_without_sbatch_the_remedy_is_named(folder):
    folder.environment["PATH"] = os.path.dirname(sys.executable)  # noqa: PTH120
    line = one_line(folder.widthopt(*ONE), 2)
    assert line.endswith("start on a login node of the cluster, or use hydra/launcher=local")


def test_a_dead_controller_is_named_and_nothing_is_written(folder):
    conf = folder.path / "slurm.conf"
    text = Path(folder.environment["SLURM_CONF"]).read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort="))
    conf.write_text(text.replace(port, "SlurmctldPort=1") + "\nMessageTimeout=2\n")
    done = folder.widthopt(*ONE, SLURM_CONF=str(conf))
    assert done.returncode == 2
    assert "SLURM" in done.stderr.splitlines()[-1]
    assert not (folder.path / "runs").exists()


# --------------------------------------------------------------------------- without accounting


def test_nothing_needs_accounting(tmp_path, bare):
    folder = Folder(tmp_path, bare)
    with folder.slowly():
        folder.send(*ONE, LONG, submitted=2)
        bare.run("scancel", folder.until_running()["job"])
        folder.until_over()
    assert (folder.row("search")["state"], folder.row("train")["state"]) == ("stale", "stale")
    folder.send(*ONE, LONG, submitted=2)
    folder.until_over()
    assert is_complete(folder, *ONE, LONG)


# ---------------------------------------------------------------------------------------- doctor


def test_the_doctor_looks_at_the_folder_the_queue_and_a_node(folder):
    done = folder.widthopt("doctor", "hydra/launcher=slurm_8xv100", "runtime.device=cpu", "--job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    assert "8 processes" in done.stdout
    assert "a node sees the locks of this machine" in done.stdout
    assert list((folder.path / "runs").iterdir()) == []


def test_the_doctor_says_where_torch_does_not_see_the_gpus_that_were_asked_for(folder):
    done = folder.widthopt("doctor", "hydra/launcher=slurm_8xv100", "--job")
    assert done.returncode == 1
    (line,) = [item for item in done.stdout.splitlines() if item.startswith("FAIL")]
    assert line.startswith(
        f"FAIL GPUs            torch {torch.__version__} sees 0 of 8 requested per node;"
    )
    assert line.endswith("install a build of torch for them, or use runtime.device=cpu")


def test_the_doctor_names_what_is_wrong(folder):
    done = folder.widthopt(
        "doctor", "hydra.launcher.options.partition=nowhere", "--root", "/proc/no"
    )
    assert done.returncode == 1
    bad = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")}
    assert bad == {"root", "options"}
    line = one_line(folder.widthopt("doctor", "hydra/launcher=local"), 2)
    assert line.startswith("hydra/launcher does not submit to SLURM, but")
