"""Clusters that differ: what a person writes then, and what they see where it is wrong."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from commands import one_line
from login import EPOCHS, LONG, ONE, SWEEP, Folder, is_complete, preempt
from PIL import Image


LATER = "+hydra.launcher.options.begin=now+600"


def job_report(folder, kind):
    """What SLURM knows of the job of a search or a training."""
    return folder.cluster.run("scontrol", "-o", "show", "job", folder.row(kind)["job"])


# -------------------------------------------------------------------------------- what jobs ask for


def test_options_are_sbatchs_own(folder):
    folder.send(
        *ONE, LATER, "hydra.launcher.options.partition=high",
        "hydra.launcher.options.constraint=volta32gb", "hydra.launcher.options.account=root",
        "hydra.launcher.options.qos=normal", "+hydra.launcher.options.exclusive=true",
        "+hydra.launcher.options.mail_user=someone", "+hydra.launcher.options.mail_type=END",
        "+hydra.launcher.options.comment=width",
        "hydra.launcher.resources.memory_gb=3", submitted=2,
    )  # fmt: skip
    for kind in ("search", "train"):
        message = job_report(folder, kind)
        for words in (
            "Partition=high", "Features=volta32gb", "Account=root", "QOS=normal",
            "OverSubscribe=NO", "MailUser=someone", "Comment=width", "MinMemoryNode=3G",
        ):  # fmt: skip
            assert words in message


@pytest.mark.parametrize("way", ["gpus-per-node", "gres", "none"])
def test_resources_are_those_of_each_kind_of_run(folder, way):
    folder.send(
        *ONE, f"hydra.launcher.gpus_as={way}", "+resources.search.minutes=7",
        "+resources.train.gpus_per_node=3", LATER,
    )  # fmt: skip
    assert "TimeLimit=00:07:00" in job_report(folder, "search")
    assert "gpu:3" not in job_report(folder, "search")
    assert "TimeLimit=01:00:00" in job_report(folder, "train")
    assert ("gres:gpu:3" in job_report(folder, "train")) == (way != "none")


def test_gpus_may_have_a_type(folder):
    typed = "+hydra.launcher.options.gres=gpu:v100:8"
    folder.send(*ONE, LATER, "hydra.launcher.gpus_as=none", typed, submitted=2)
    assert "gres:gpu:v100:8" in job_report(folder, "search")


def test_a_persons_habits_hide_no_job_from_us(folder):
    folder.send(*ONE, LATER, submitted=2)
    habits = {"SQUEUE_STATES": "RUNNING", "SQUEUE_PARTITION": "high", "SQUEUE_FORMAT": "%j"}
    folder.environment |= {**habits, "LOGNAME": "nobody", "USER": "nobody"}
    folder.send(*ONE, LATER, submitted=0)
    assert {row["state"] for row in folder.rows()} == {"queued"}


def test_what_the_launcher_is_given_goes_before_sbatchs_own_variables(folder):
    folder.environment |= {
        "SBATCH_PARTITION": "short", "SBATCH_TIMELIMIT": "1", "SBATCH_JOB_NAME": "mine",
        "SBATCH_SIGNAL": "INT@5", "SBATCH_CONSTRAINT": "volta32gb",
        "SUBMITIT_PREEMPT_SIGNAL": "USR1",
    }  # fmt: skip
    folder.send(*ONE, LATER, "hydra.launcher.options.partition=main", submitted=2)
    message = job_report(folder, "search")
    assert "Partition=main" in message
    assert "TimeLimit=01:00:00" in message
    assert "JobName=widthopt-" in message
    assert "Features=volta32gb" in message
    script = folder.cluster.run(
        "scontrol", "write", "batch_script", folder.row("search")["job"], "-"
    )
    assert "#SBATCH --signal=USR2@120" in script
    # What it is not given is theirs, and its limits are those that count.
    words = (*(word for word in ONE if not word.startswith("seeds")), "seeds=[1]")
    line = folder.widthopt(*words).stderr.splitlines()[-1]
    assert "60, but the time limit of partition short is 5;" in line


def test_a_job_that_is_submitted_from_inside_another_one_is_its_own(folder):
    folder.environment |= {
        "SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "99", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere",
    }  # fmt: skip
    folder.send(*ONE, submitted=2)
    folder.until_over()
    for row in folder.rows():
        (attempt,) = folder.attempts(row["name"])
        assert (row["state"], attempt["job"], attempt["restart"]) == ("done", row["job"], 0)


# ------------------------------------------------------------------------------ how a job starts


WRAPPER = """#!/bin/bash
echo "$(hostname) $MARK" >> {folder}/inside
sleep {seconds}
exec "$@"
"""


def wrapper(folder, *, seconds=0):
    """A command that starts another one inside of something, as those of containers do."""
    path = folder.path / "inside.sh"
    path.write_text(WRAPPER.format(folder=folder.path, seconds=seconds))
    path.chmod(0o755)
    return f'hydra.launcher.python="{path} {sys.executable}"'


def test_lines_of_shell_and_a_command_around_python(folder):
    setup = 'hydra.launcher.setup=["export MARK=set","false"]'
    folder.send(*ONE, setup, wrapper(folder), "hydra.launcher.options.partition=high", submitted=2)
    folder.until_over()
    assert is_complete(folder, *ONE)
    lines = (folder.path / "inside").read_text().split()
    assert lines[1::2] == ["set", "set"]
    assert set(lines[::2]) <= set(folder.cluster.nodes)
    words = (*(word for word in ONE if not word.startswith("seeds")), "seeds=[1]")
    folder.send(*words, 'hydra.launcher.setup=["set -e","exit 7"]', submitted=2)
    folder.until_over()
    why = {row["why"] for row in folder.rows() if row["kind"] == "search" and row["why"]}
    assert why == {"SLURM: FAILED, exit code 7:0"}


MODULES = Path("/etc/profile.d/modules.sh")


@pytest.mark.skipif(not MODULES.exists(), reason="environment-modules is not installed")
def test_modules_are_loaded(folder):
    (folder.path / "modules").mkdir()
    (folder.path / "modules" / "mine").write_text("#%Module1.0\nsetenv MARK loaded\n")
    lines = f'"source {MODULES}","module use {folder.path}/modules","module load mine"'
    folder.send(*ONE, f"hydra.launcher.setup=[{lines}]", wrapper(folder), submitted=2)
    folder.until_over()
    assert (folder.path / "inside").read_text().split()[1::2] == ["loaded", "loaded"]
    assert {row["state"] for row in folder.rows()} == {"done"}


def test_a_warning_that_comes_before_python_can_take_it_ends_nothing(folder):
    folder.send(
        *ONE, wrapper(folder, seconds=4), "+hydra.launcher.options.begin=now+15", submitted=2
    )
    job = folder.row("search")["job"]
    folder.until((folder.path / "inside").exists)
    folder.cluster.run("scancel", "--signal=USR2", job)
    folder.until_over()
    assert is_complete(folder, *ONE)


# ------------------------------------------------------------------------------- where files are


def test_images_are_copied_to_a_scratch_folder_of_each_node(folder):
    shared = folder.path / "images"
    for number in range(64):
        for split in ("train", "val"):
            path = shared / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (4 * number, 128 * (number % 2), 0)).save(path)
    there = folder.cluster.scratch / folder.path.name / "images"
    there.parent.mkdir()
    there.symlink_to(shared)
    words = (*ONE, "dataset=image_folder", f"dataset.root={there}", "recipe.batch_size=16")
    folder.send(*words, submitted=2)
    folder.until_over()
    assert "there is no such folder" in folder.row("search")["why"]  # a node has its own
    copy = f"mkdir -p {there.parent}; flock {there.parent} cp -ru {shared} {there.parent}/"
    words = (*words, f'hydra.launcher.setup=["{copy}"]')
    folder.send(*words, submitted=2)
    folder.until_over()
    assert is_complete(folder, *words)


def test_a_root_in_memory_is_refused(folder):
    root = Path("/dev/shm", folder.path.name)  # noqa: S108
    line = folder.widthopt(*ONE, f"root={root}").stderr.splitlines()[-1]
    shutil.rmtree(root)
    assert line == (
        f"widthopt: root is {root}, but tmpfs is not visible to other nodes; name a folder on "
        "a shared file system"
    )
    assert folder.queue() == {}


def test_a_root_that_cannot_be_written_is_refused(folder):
    done = folder.widthopt(*ONE, "root=/proc/no")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "widthopt: root is /proc/no, but it cannot be written (No such file or directory); name a "
    )
    assert folder.queue() == {}


def test_a_root_that_nodes_do_not_see_is_said_by_the_doctor_and_by_the_state(folder):
    root = folder.cluster.scratch / folder.path.name
    done = folder.widthopt("doctor", "--job", "--root", str(root))
    assert done.returncode == 1
    (line,) = [item for item in done.stdout.splitlines() if item.startswith("FAIL")]
    assert line.startswith("FAIL node ")
    assert "no node has written" in line
    done = folder.widthopt(*ONE, f"root={root}")
    assert done.returncode == 0
    folder.until_over()
    stdout = folder.widthopt("status", "--root", str(root)).stdout
    assert "no node has written" in " ".join(stdout.split())


# ------------------------------------------------------------------------------ SLURM is away


REFUSING = """#!/bin/bash
case " $* " in *" --test-only "*) exec {sbatch} "$@";; esac
if [ -e {folder}/sent ]; then
    echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2
    exit 1
fi
touch {folder}/sent
exec {sbatch} "$@"
"""


def test_a_limit_that_is_met_in_the_midst_loses_nothing(folder):
    words = (*SWEEP, "projection.width=0.5,1", "seeds=[0]")
    fake = folder.path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(REFUSING.format(sbatch=shutil.which("sbatch"), folder=folder.path))
    fake.chmod(0o755)
    done = folder.widthopt(*words, PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "SLURM refuses it (AssocMaxSubmitJobLimit; Batch job submission failed" in line
    assert line.endswith("2 runs were submitted before, and the same command sends the rest")
    folder.send(*words, submitted=2)
    folder.until_over()
    assert {(row["state"], len(folder.attempts(row["name"]))) for row in folder.rows()} == {
        ("done", 1)
    }


def test_a_limit_on_jobs_is_filled_and_the_same_command_sends_the_rest(folder):
    """A real one, below the length of an array: two jobs of a user at once."""
    words = (*SWEEP, "projection.width=0.5,0.75,1", "seeds=[0]")

    def limit(jobs):
        change = ("modify", "user", "where", "name=root", "set", f"MaxSubmitJobs={jobs}")
        folder.cluster.run("sacctmgr", "--immediate", *change)

    limit(2)
    try:
        for _ in range(2):
            done = folder.widthopt(*words)
            assert done.returncode == 2
            line = done.stderr.splitlines()[-1]
            assert "AssocMaxSubmitJobLimit" in line
            assert line.endswith(
                "2 runs were submitted before, and the same command sends the rest"
            )
            folder.until_over()
    finally:
        limit(-1)
    folder.send(*words, submitted=2)
    folder.until_over()
    assert {(row["state"], len(folder.attempts(row["name"]))) for row in folder.rows()} == {
        ("done", 1)
    }


def test_a_command_that_waits_outlives_the_controllers_absence(folder):
    with folder.slowly():
        process = folder.start(*ONE, LONG, "hydra.launcher.wait=true")
        folder.until(lambda: (folder.path / "runs" / "sweeps").exists() and folder.rows()[0]["job"])
        folder.until_running()
        folder.cluster.restart_controller(away_seconds=30)
    _, message = process.communicate(timeout=240)
    assert process.returncode == 0, message
    assert "trying again" in message
    assert {row["state"] for row in folder.rows()} == {"done"}


def test_on_a_machine_without_slurm_the_state_says_what_is_not_known(folder):
    folder.send(*ONE, LATER, submitted=2)
    done = folder.widthopt("status", PATH=os.path.dirname(sys.executable))  # noqa: PTH120
    assert done.returncode == 0
    assert done.stderr.startswith(
        "--root is runs, whose runs are SLURM jobs, but there is no squeue"
    )
    assert "queued: 2 from its files; the queue does not answer" in done.stdout
    assert folder.queue()


# --------------------------------------------------------------------------- the whole of an array


def test_the_elements_of_an_array_are_put_back_and_their_trainings_wait(folder):
    words = (
        *SWEEP, "projection.width=0.5,0.75,1", "seeds=[0]", LONG,
        "hydra.launcher.resources.gpus_per_node=8",
    )  # fmt: skip
    with folder.slowly():
        folder.send(*words, submitted=6)
        searches = [row for row in folder.rows() if row["kind"] == "search"]
        assert {row["job"].partition("_")[2] for row in searches} == {"0", "1", "2"}
        for row in searches:
            log = folder.path / "runs" / "stages" / row["name"] / "log.txt"
            folder.until(lambda log=log: log.exists() and ": epoch 3 " in log.read_text())
        preempt(folder, None)
        for row in searches:
            folder.until_started(row, 2)
    folder.until_over()
    assert {len(folder.attempts(row["name"])) for row in searches} == {2}
    trainings = [row["name"] for row in folder.rows() if row["kind"] == "train"]
    assert {len(folder.attempts(name)) for name in trainings} == {1}
    assert is_complete(folder, *words)


def test_a_value_that_is_no_list_is_one_line(folder):
    line = one_line(folder.widthopt(*ONE, "hydra.launcher.setup=module_load_cuda"), 2)
    assert line.startswith("hydra.launcher.setup is module_load_cuda, but it is a list; write")
    assert folder.queue() == {}


def test_where_slurm_does_not_warn_a_run_goes_on_from_its_last_epoch(tmp_path):
    if obstacle := Cluster.obstacle():
        pytest.skip(obstacle)
    with Cluster(
        nodes=1, accounting=False, settings={"SlurmctldParameters": "idle_on_node_suspend"}
    ) as silent:
        folder = Folder(tmp_path, silent)
        words = (*ONE, LONG, "hydra.launcher.resources.gpus_per_node=8")
        # For longer than the ten seconds that SLURM leaves a job that it takes away.
        with folder.slowly():
            folder.send(*words, submitted=2)
            row = folder.until_running()
            preempt(folder, row)
            folder.until_started(row, 2)
        folder.until_over()
        assert len(folder.attempts(row["name"])) == 2
        log = (folder.path / "runs" / "stages" / row["name"] / "log.txt").read_text()
        assert "is requeued and will resume" not in log
        assert log.count(f"epoch 1 of {EPOCHS}") == 1
        assert is_complete(folder, *words)
