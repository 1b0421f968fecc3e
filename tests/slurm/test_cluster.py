"""The cluster that the other tests here believe in is a real one, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError


HOSTS = Path("/etc/hosts")
PATIENCE_SECONDS = 60


def until(fits):
    """Wait for something; what it was."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := fits()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def until_over(cluster):
    until(lambda: not cluster.run("squeue", "-h"))


def submit(cluster, out, script, *words):
    """Submit a line of shell that prints into a file; the job."""
    done = cluster.run(
        "sbatch", "--parsable", "--open-mode=append", f"--output={out}", *words, "--wrap", script
    )
    return done.strip()


def wait_for_output(out):
    """What a job has printed, as soon as that is something."""
    return until(lambda: out.exists() and out.read_text().split())


def processes(folder):
    """All that know a folder, in whatever way."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            content = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in content and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found


def listeners(pids):
    """Addresses as the kernel writes them, and ports, where processes listen on TCP."""
    links = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                links.add(os.readlink(link))  # noqa: PTH115 (of a socket, which is no path)
            except OSError:
                continue
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in links:
                address, port = words[1].split(":")
                found.add((address, int(port, 16)))
    return found


# -------------------------------------------------------------------------------------- its nodes


def test_all_nodes_are_idle_and_have_eight_gpus(cluster):
    lines = cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T %G").splitlines()
    assert sorted(lines) == [f"node{number} idle gpu:v100:8" for number in (1, 2, 3)]


def test_a_job_sees_its_gpus_and_its_nodes_name(cluster, tmp_path):
    out = tmp_path / "out"
    submit(cluster, out, "echo $(hostname) $CUDA_VISIBLE_DEVICES", "-w", "node2", "--gpus=3")
    assert wait_for_output(out) == ["node2", "0,1,2"]


def test_two_jobs_on_a_node_share_its_gpus_out(cluster, tmp_path):
    for name in ("one", "other"):
        submit(cluster, tmp_path / name, "echo $CUDA_VISIBLE_DEVICES; sleep 60", "--gpus=4")
    seen = {wait_for_output(tmp_path / name)[0] for name in ("one", "other")}
    assert seen == {"0,1,2,3", "4,5,6,7"}


def test_each_task_of_a_job_on_two_nodes_runs_on_its_node(cluster, tmp_path):
    out = tmp_path / "out"
    submit(cluster, out, "srun hostname", "-N2", "--ntasks-per-node=2")
    until_over(cluster)
    assert sorted(wait_for_output(out)) == ["node1", "node1", "node2", "node2"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--gpus-per-node=9", "node configuration is not available"),
        ("--account=strangers", "Invalid account"),
        ("--qos=unheard", "Invalid qos"),
        ("--partition=none", "invalid partition"),
    ],
)
def test_what_it_cannot_give_is_refused(cluster, words, why):
    with pytest.raises(ClusterError, match=why):
        submit(cluster, "/dev/null", "true", words)


def test_a_job_longer_than_the_short_partition_allows_waits(cluster):
    submit(cluster, "/dev/null", "true", "-p", "short", "--time=6")
    until(lambda: "PartitionTimeLimit" in cluster.run("squeue", "-h", "-o", "%r"))


# --------------------------------------------------------------------------------- its accounting


def test_accounting_tells_how_a_job_ended(cluster):
    job = submit(cluster, "/dev/null", "exit 3")
    until(
        lambda: (
            cluster.run("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job)
            == "FAILED|3:0\n"
        )
    )


def test_without_accounting_there_is_no_sacct(bare):
    with pytest.raises(ClusterError, match="accounting storage is disabled"):
        bare.run("sacct")


# ----------------------------------------------------------------------------------------- its jobs


def test_an_array_runs_no_more_at_once_than_it_may(cluster, tmp_path):
    out = tmp_path / "out"
    submit(cluster, out, "date +%s.%N; sleep 1; date +-%s.%N", "--array=0-3%2")
    until_over(cluster)
    times = sorted((float(word.strip("-")), word[0] == "-") for word in wait_for_output(out))
    running = [sum(-1 if ends else 1 for _, ends in times[: end + 1]) for end in range(8)]
    assert max(running) == 2


def test_an_array_ends_where_it_was_set_to(cluster):
    submit(cluster, "/dev/null", "true", "--hold", "--array=0-1000")
    with pytest.raises(ClusterError, match="Invalid job array"):
        submit(cluster, "/dev/null", "true", "--array=0-1001")


def test_a_job_that_makes_room_is_warned_and_put_back(cluster, tmp_path):
    out = tmp_path / "out"
    script = "trap 'echo warned; exit 0' USR2; echo starts; sleep 60 & wait"
    submit(cluster, out, script, "-N3", "--gpus-per-node=8", "--signal=B:USR2@10", "--requeue")
    assert wait_for_output(out) == ["starts"]
    submit(cluster, tmp_path / "high", "echo there", "-p", "high", "--gpus=8")
    assert wait_for_output(tmp_path / "high") == ["there"]
    assert wait_for_output(out)[:2] == ["starts", "warned"]


def test_the_job_of_a_killed_node_starts_again_elsewhere(cluster, tmp_path):
    out = tmp_path / "out"
    submit(cluster, out, "hostname; sleep 60")
    (first,) = wait_for_output(out)
    started = time.monotonic()
    cluster.kill_node(first)
    until(lambda: len(wait_for_output(out)) == 2)
    # With SLURM's own settings this takes two minutes.
    assert time.monotonic() - started < 30
    assert wait_for_output(out)[1] != first
    cluster.start_node(first)
    assert cluster.states().count("idle") == 2


def test_a_node_can_die_unnoticed(cluster):
    cluster.kill_node("node3", reported=False)
    assert cluster.states() == ["idle"] * 3
    cluster.start_node("node3")


def test_a_job_outlives_the_daemon_of_its_node(cluster, tmp_path):
    out = tmp_path / "out"
    submit(cluster, out, f"hostname; until test -e {tmp_path}/go; do sleep 0.1; done; echo end")
    (node,) = wait_for_output(out)
    cluster.kill_daemon_of(node)
    (tmp_path / "go").touch()
    until(lambda: len(wait_for_output(out)) == 2)
    cluster.start_node(node)
    until_over(cluster)


def test_the_controller_restarts_with_its_queue(cluster, tmp_path):
    running = submit(cluster, tmp_path / "out", "echo starts; sleep 60")
    assert wait_for_output(tmp_path / "out") == ["starts"]
    held = submit(cluster, "/dev/null", "true", "--hold")
    cluster.restart_controller()
    lines = cluster.run("squeue", "-h", "-o", "%A %T").splitlines()
    assert sorted(lines) == [f"{running} RUNNING", f"{held} PENDING"]
    assert wait_for_output(tmp_path / "out") == ["starts"]


def test_cancelling_all_ends_jobs_that_do_not_want_to(cluster, tmp_path):
    submit(cluster, tmp_path / "out", "trap '' TERM; echo starts; while true; do sleep 1; done")
    wait_for_output(tmp_path / "out")
    cluster.cancel_all()
    assert not cluster.run("squeue", "-h")


def test_what_was_killed_is_repaired(cluster):
    cluster.kill_node("node1")
    cluster.kill_daemon_of("node2")
    cluster.repair()
    assert cluster.states() == ["idle"] * 3


# ----------------------------------------------------------------------- with the rest of the world


def test_only_the_loopback_is_listened_on(cluster, tmp_path):
    submit(cluster, "/dev/null", f"srun sh -c 'echo starts >> {tmp_path}/out; sleep 60'", "-N2")
    until(lambda: len(wait_for_output(tmp_path / "out")) == 2)
    found = listeners(processes(cluster.folder))
    # The controller, the database's daemon, three nodes; and srun.
    assert len(found) > 5
    assert {address for address, _ in found} == {"0100007F"}
    assert len({port // 500 for _, port in found}) == 1
    assert max(port for _, port in found) < 20_000


def test_two_clusters_side_by_side_do_not_know_each_other(cluster, bare, tmp_path):
    job = submit(cluster, "/dev/null", "true", "--hold")
    submit(bare, tmp_path / "out", "hostname")
    until_over(bare)
    assert wait_for_output(tmp_path / "out") == ["node1"]
    bare.cancel_all()
    assert cluster.run("squeue", "-h", "-o", "%A").split() == [job]
    blocks = [
        {port // 500 for _, port in listeners(processes(item.folder))} for item in (cluster, bare)
    ]
    assert not blocks[0] & blocks[1]


def test_tests_are_clients_of_their_cluster(cluster):
    done = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, check=True)  # noqa: S607
    assert done.stdout == cluster.run("sinfo", "-h")


@pytest.fixture
def possible():
    if obstacle := Cluster.obstacle():
        pytest.skip(obstacle)


@pytest.mark.usefixtures("possible")
def test_a_cluster_that_is_stopped_leaves_nothing(tmp_path):
    with Cluster(nodes=1) as item:
        folder = item.folder
        stubborn = "trap '' TERM; setsid sleep 600 & echo starts; sleep 600"
        submit(item, tmp_path / "out", stubborn)
        wait_for_output(tmp_path / "out")
        # Four daemons and one that slurmctld starts; slurmd; slurmstepd and three of the job's.
        assert len(processes(folder)) >= 9
        assert str(folder) in HOSTS.read_text()
    assert processes(folder) == []
    assert str(folder) not in HOSTS.read_text()
    assert not folder.exists()


@pytest.mark.usefixtures("possible")
def test_a_cluster_that_does_not_start_says_why_and_leaves_nothing(monkeypatch):
    item = Cluster(nodes=1, accounting=False, settings={"SelectType": "select/unheard"})
    with tempfile.TemporaryDirectory() as place:  # a shorter path than those that tests are given
        Path(place).chmod(0o755)  # as munged wants it
        monkeypatch.setattr(tempfile, "tempdir", place)
        with pytest.raises(ClusterError, match="find plugin for select/unheard"):
            item.start()
        assert list(Path(place).iterdir()) == []
        assert place not in HOSTS.read_text()


@pytest.mark.usefixtures("possible")
def test_a_cluster_whose_owner_was_killed_is_stopped_by_the_next():
    script = (
        "import signal\nfrom cluster import Cluster\none = Cluster(nodes=1, accounting=False)\n"
        "one.start()\nprint(one.folder, flush=True)\nsignal.pause()"
    )
    with subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", script], cwd=Path(__file__).parent, text=True, stdout=subprocess.PIPE
    ) as owner:
        folder = Path(owner.stdout.readline().strip())
        with Cluster(nodes=1, accounting=False):
            assert processes(folder)
        owner.send_signal(signal.SIGKILL)
    with Cluster(nodes=1, accounting=False):
        assert processes(folder) == []
        assert str(folder) not in HOSTS.read_text()
        assert not folder.exists()
