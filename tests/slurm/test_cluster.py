"""The cluster that other tests believe in is a real one."""

import os
import time
from pathlib import Path

import pytest
from cluster import HOSTS, Cluster, listeners, why_not


def until_over(cluster):
    until = time.monotonic() + 60
    while cluster.run("squeue", "-h"):
        assert time.monotonic() < until
        time.sleep(0.2)


def submit(cluster, folder, script, *words):
    """Submit a line of shell; the job, and where it writes."""
    out = folder / f"out-{len(list(folder.iterdir()))}"
    job = cluster.run(
        "sbatch", "--parsable", f"--output={out}", "--open-mode=append", *words, "--wrap", script
    )
    return job.strip(), out


def test_its_nodes_have_eight_gpus_and_names_of_their_own(cluster, tmp_path):
    assert cluster.states() == ["idle"] * 3
    _, out = submit(
        cluster, tmp_path, "echo $(hostname) $CUDA_VISIBLE_DEVICES", "--gpus-per-node=8"
    )
    until_over(cluster)
    name, devices = out.read_text().split()
    assert name in cluster.nodes
    assert devices == "0,1,2,3,4,5,6,7"
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        submit(cluster, tmp_path, "true", "--gpus-per-node=9")


def test_accounts_are_kept_or_not(cluster, bare, tmp_path):
    job, _ = submit(cluster, tmp_path, "exit 3")
    until_over(cluster)
    end = time.monotonic() + 10
    while "FAILED" not in (said := cluster.run("sacct", "-X", "-n", "-j", job)):
        assert time.monotonic() < end, said
        time.sleep(0.2)
    assert "3:0" in said
    with pytest.raises(RuntimeError, match="accounting storage is disabled"):
        bare.run("sacct")
    with pytest.raises(RuntimeError, match="Invalid account"):
        submit(cluster, tmp_path, "true", "--account=strangers")


def test_an_array_runs_no_more_at_once_than_it_may(cluster, tmp_path):
    submit(cluster, tmp_path, "sleep 1", "--array=0-5%2")
    most = 0
    while jobs := cluster.run("squeue", "-h", "-r", "-o", "%T").split():
        most = max(most, jobs.count("RUNNING"))
        time.sleep(0.1)
    assert most == 2


def test_the_job_of_a_killed_node_starts_again_elsewhere(cluster, tmp_path):
    _, out = submit(cluster, tmp_path, "hostname; sleep 8", "--requeue")
    end = time.monotonic() + 30
    while not out.exists() or not out.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    first = out.read_text().split()[0]
    cluster.kill_node(first)
    until_over(cluster)
    cluster.start_node(first)
    assert len(out.read_text().split()) == 2
    assert cluster.states() == ["idle"] * 3


def test_a_job_survives_its_nodes_daemon_and_the_controller(cluster, tmp_path):
    job, out = submit(cluster, tmp_path, "hostname; sleep 12; echo end")
    held, _ = submit(cluster, tmp_path, "true", "--hold")
    end = time.monotonic() + 30
    while not out.exists() or not out.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    node = out.read_text().split()[0]
    cluster.kill_daemon_of(node)
    cluster.restart_controller()
    cluster.start_node(node)
    assert held in cluster.run("squeue", "-h", "-o", "%A").split()
    cluster.run("scontrol", "release", held)
    until_over(cluster)
    assert out.read_text().split()[1:] == ["end"]
    assert "COMPLETED" in cluster.run("sacct", "-X", "-n", "-j", job)


def test_nothing_listens_outside_and_nothing_is_left(cluster):
    if reason := why_not():
        pytest.skip(reason)
    before = set(listeners())
    with Cluster(nodes=1, accounting=False, prefix="second") as second:
        assert second.states() == ["idle"]
        assert cluster.states() == ["idle"] * 3
        new = set(listeners()) - before
        assert new
        assert {address for address, _ in new} == {"127.0.0.1"}
        assert "second1" in HOSTS.read_text()
        conf = second.environment["SLURM_CONF"].encode()
        folder = second.folder
    assert "second1" not in HOSTS.read_text()
    assert not folder.exists()
    for path in Path("/proc").glob("[0-9]*"):
        if path.name != str(os.getpid()):
            try:
                assert b"SLURM_CONF=" + conf not in (path / "environ").read_bytes()
            except OSError:
                continue
