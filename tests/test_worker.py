"""What a job's processes do after SLURM's warning, each by itself; the rest is tests/slurm's."""

import os
import signal
import subprocess
import sys

import pytest


PUT_BACK = """
import sys
from launchers.worker import Order, _put_back
order = Order(spec="", perform="", home="", requeue=len(sys.argv) > 2, max_requeues=1)
print("warned", flush=True)
_put_back(order, rank=int(sys.argv[1]))
"""


def warned(rank, *requeue, **environment):
    process = subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", PUT_BACK, str(rank), *requeue], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stdout.readline() == "warned\n"
    return process


def test_the_first_process_says_that_it_stopped_and_ends():
    process = warned(0)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said == "widthopt: stopped before its end; give the same sweep again\n"


def test_other_processes_wait_for_the_first_to_end_them():
    """It may still save, and srun would end it as soon as another one has ended."""
    process = warned(1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM
    process.communicate()


def test_where_there_is_no_scontrol_the_process_says_so_and_ends(tmp_path):
    process = warned(0, "requeue", SLURM_JOB_ID="7", PATH=str(tmp_path))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said == (
        "widthopt: job 7 could not be put back (there is no scontrol where it runs); give the same "
        "sweep again\n"
    )
