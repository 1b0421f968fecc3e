"""What is made of the answers of SLURM's commands, where a real SLURM gives them too seldom."""

import pytest

from hydra_plugins.widthopt_launchers import queue
from widthopt.errors import InputError


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Commands that answer with what they are told to."""

    def say(name, text, *, code=0):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return say


def test_what_can_never_start_does_not_live(answers):
    answers(
        "squeue",
        "CLUSTER: here\n5|PENDING|DependencyNeverSatisfied\n6_1|PENDING|Priority\n7|RUNNING|None",
    )
    assert queue.live_jobs() == {"6_1": "PENDING (Priority)", "7": "RUNNING"}


def test_how_many_jobs_ended_is_asked_for_in_portions_that_the_system_takes(answers):
    answers("sacct", "1234567_89|TIMEOUT|0:0")
    answers("scontrol", "", code=1)
    jobs = [f"1234567_{index}" for index in range(30_000)]
    assert queue.job_endings(jobs)["1234567_89"] == "SLURM: TIMEOUT, exit code 0:0"


def test_a_controller_that_is_away_is_one_line_with_its_words(answers):
    answers("sbatch", "", code=1)
    answers("scontrol", "MaxArraySize = 0")
    assert queue.array_size() == 1
    with pytest.raises(InputError, match=r"^sbatch is given --time=5 --exclusive, but SLURM"):
        queue.check({"time": "5", "exclusive": ""})


@pytest.mark.parametrize(
    ("partition", "minutes", "refused"),
    [("", 6, "short"), ("", 5, ""), ("long", 6, ""), ("short,long", 6, ""), ("day", 1441, "day")],
)
def test_a_limit_is_that_of_the_partition_which_is_asked_for(answers, partition, minutes, refused):
    answers("sbatch", "")
    answers(
        "scontrol",
        "PartitionName=short Default=YES MaxTime=00:05:00\n"
        "PartitionName=long Default=NO MaxTime=UNLIMITED\n"
        "PartitionName=day Default=NO MaxTime=1-00:00:00",
    )
    options = {"time": str(minutes), **({"partition": partition} if partition else {})}
    if refused:
        with pytest.raises(InputError, match=f"the time limit of partition {refused} is"):
            queue.check(options)
    else:
        queue.check(options)


def test_nodes_at_this_machines_own_address_are_no_other_machines(answers):
    answers(
        "scontrol",
        "NodeName=a Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=gpu7 Version=22.05.8\n"
        "NodeName=b Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=b Version=22.05.8",
    )
    assert queue.hosts() == {"gpu7"}
