"""What a job's processes do after SLURM's warning, each by itself; the rest is tests/slurm's."""

import os
import signal
import subprocess
import sys

import pytest


PUT_BACK = """
import sys
from hydra_plugins.widthopt_launchers.worker import Order, _requeue
order = Order(spec="", run_spec="", home="", requeue=len(sys.argv) > 2, max_requeues=1)
print("warned", flush=True)
_requeue(order, rank=int(sys.argv[1]), saving={saving})
"""


def start_and_warn(rank, *requeue, saving=True, **environment):
    process = subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", PUT_BACK.format(saving=saving), str(rank), *requeue],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stdout.readline() == "warned\n"
    return process


def test_the_first_process_says_that_it_stopped_and_ends():
    process = start_and_warn(0)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert message == "widthopt: stopped before its end; start the same sweep again\n"


def test_other_processes_wait_for_the_first_to_end_them():
    """It may still save, and srun would end it as soon as another one has ended."""
    process = start_and_warn(1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM
    process.communicate()


def test_where_nothing_is_saved_other_processes_wait_for_seconds_only():
    """The first one may be waiting for this one, where no signal gets at it."""
    process = start_and_warn(1, saving=False)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert message == "widthopt: stopped before its end; start the same sweep again\n"


def test_where_there_is_no_scontrol_the_process_says_so_and_ends(tmp_path):
    process = start_and_warn(0, "requeue", SLURM_JOB_ID="7", PATH=str(tmp_path))
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert message == (
        "widthopt: job 7 could not be requeued (there is no scontrol where it runs); start the "
        "same sweep again\n"
    )


FORKED = """
import os, signal, sys, time
from hydra_plugins.widthopt_launchers.worker import _Warning
warning = _Warning()
child = os.fork()
if child == 0:
    print("ready", flush=True)
    time.sleep(1)
    os._exit(7)
sys.stdin.readline()
os.kill(child, signal.SIGUSR2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), warning.received, flush=True)
try:
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(60)
except KeyboardInterrupt:
    print(warning.received)
"""


def test_a_warning_is_ctrl_c_here_and_nothing_in_what_was_forked():
    """SLURM signals all processes of a job, those that load images too."""
    done = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", FORKED], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert done.stdout.readline() == "ready\n"
    message, _ = done.communicate("go\n", timeout=60)
    assert message == "7 False\nTrue\n"
