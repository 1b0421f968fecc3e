"""Tracking with W&B's real client: its offline files, and runs sent to a substitute server."""

import fcntl
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import ENVIRONMENT, NETWORK, TINY, command, prepare
from wandb_server import KEY, Server

from widthopt.tracking import About
from widthopt.tracking.files import End, TrackingFiles
from widthopt.tracking.send import X_AXES


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="W&B is not installed"
)

ISOLATED = shutil.which("unshare") is not None and (
    subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode == 0  # noqa: S607
)
BARE = {name: entry for name, entry in ENVIRONMENT.items() if not name.startswith("WANDB")}
WORDS = (
    *(entry for entry in TINY if not entry.startswith("tracking")),
    "tracking.log_every_steps=5",
)
SWEEP = (
    "-m", "--config-dir", "conf", *WORDS, "experiment=mine", "seeds=[0],[1]",
    "recipe.learning_rate=0.4,1e12", "methods=[transfer]",
)  # fmt: skip
"""A sweep of four points; the searches at one of the learning rates diverge."""

FIGURE = """# @package _global_
# A figure of this test.
figures:
  - _target_: widthopt.reporting.figures.transfer.Transfer
    name: mine
    title: Mine
    axis: width
    series: algorithm
    panels: {my_network.MyNetwork: Mine}
    claim: Widths carry over.
    paper_saved: {}
hydra:
  mode: MULTIRUN
"""

CHILD = textwrap.dedent("""
    import json, logging, sys, time
    from pathlib import Path
    from widthopt.tracking import About, Tracking, open_tracker

    options = json.loads(sys.argv[1])
    logging.basicConfig(format="%(levelname)s %(message)s")
    tracking = Tracking(mode=options["mode"], project="width-transfer", entity=None, tags=(),
                        salt="", log_every_steps=50,
                        init_timeout_seconds=options.get("init_timeout_seconds", 8),
                        finish_seconds=options.get("finish_seconds", 4))
    axes = {"width": 1.0, "depth": 1, "resolution": 8, "fraction": 1.0}

    def track(name, wait_at):
        about = About(id=name, kind="train", network="n", dataset="d", algorithm="dmcp",
                      method="direct", seed=0, source=axes, target=axes, figures=("fig3",),
                      tags=(), fields=options.get("fields", {}))
        with open_tracker(tracking, about, Path(options["folder"]) / name) as log:
            log.resume(options.get("from", -1))
            for step in range(options.get("from", 0) + 1, options["steps"] + 1):
                log.row(step, {"loss": 1 / step, "epoch": step / 10})
                if step == wait_at:
                    print("waiting", flush=True)
                    sys.stdin.readline()
            log.widths({"conv": 3}, {"conv": 1.0})
            log.summary({"alpha": 1.5})
            print(f"closing {time.time()}", flush=True)

    for name in options.get("names", ["train-x"]):
        track(name, options.get("wait_at") if name == "train-x" else None)
    print(f"closed {time.time()}", flush=True)
""")


def environment(server=None, key=KEY, **others):
    """Return an environment with no other configuration of W&B than this."""
    collected = {**BARE, **others, "PYTHONPATH": str(Path(__file__).parents[1])}
    if server is not None:
        collected["WANDB_BASE_URL"] = server if isinstance(server, str) else server.url
    if key:
        collected["WANDB_API_KEY"] = key
    return collected


def child(folder, env, **options):
    """Start a process that tracks a run with some rows."""
    given = {"folder": str(folder / "stages"), "mode": "online", "steps": 20, **options}
    return subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", CHILD, json.dumps(given)],
        cwd=folder, env={**env, "HOME": str(folder)}, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_end(process):
    """Wait for a process; return its error output, and how long it waited for W&B at the end."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    times = dict(line.split() for line in output.splitlines() if line.startswith("clos"))
    return errors, float(times["closed"]) - float(times["closing"])


def start(folder, *words, env, prefix=()):
    return subprocess.run(  # noqa: S603 (our own words)
        [*prefix, *command(*words)],
        cwd=folder, env={**env, "HOME": str(folder)}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


def sync(folder, server, **others):
    return start(folder, "sync", "--pause", "0", env=environment(server, **others))


def inspect_segment(segment):
    """Return the records of a file of W&B, read with W&B's tool."""
    done = subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def read_rows(folder):
    """Return the rows of a run on the disk, by step."""
    return {row["step"]: row for row, _ in TrackingFiles(folder).rows()}


def assert_same_rows(run, folder):
    """Assert that the server has each row exactly once."""
    stored = read_rows(folder)
    assert run.steps == sorted(stored)
    for row in run.history:
        received = {name: entry for name, entry in row.items() if not name.startswith("_")}
        local = {k: v for k, v in stored[row["_step"]].items() if k not in ("step", "time")}
        assert received == pytest.approx(local)


# A sweep on a machine without a network.


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """An offline sweep with failing runs, in a namespace without a network where possible."""
    folder = tmp_path_factory.mktemp("swept")
    prepare(folder, FIGURE)
    prefix = ("unshare", "-rn") if ISOLATED else ()
    with Server() as server:
        done = start(folder, *SWEEP, env=environment(server), prefix=prefix)
        reached = list(server.requests)
    return folder, done, reached


def stages(folder):
    return sorted((folder / "runs" / "stages").glob("*-*"))


@pytest.mark.slow
def test_a_sweep_runs_without_a_network_and_sends_no_request(swept):
    _, done, reached = swept
    assert done.returncode == 1, done.stderr
    assert "4 of 8 runs are done, 2 failed and 2 wait" in done.stderr
    assert "tracking" not in done.stderr
    assert reached == []


LISTENER = textwrap.dedent("""
    import socket, subprocess, sys, threading
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "--bind", "resolv.conf", "/etc/resolv.conf"], check=True)
    lookups = []
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 53))

    def listen():
        while True:
            query, sender = names.recvfrom(4096)
            lookups.append(query[12:].hex())
            names.sendto(query[:2] + b"\\x81\\x83" + query[4:], sender)

    threading.Thread(target=listen, daemon=True).start()
    done = subprocess.run([sys.executable, *sys.argv[1:]], stdin=subprocess.DEVNULL)
    print("lookups", len(lookups))
    sys.exit(done.returncode)
""")


def count_lookups(folder, *words):
    """Return the number of DNS lookups of a process, in a namespace with only a DNS server."""
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (folder / "listener.py").write_text(LISTENER)
    done = subprocess.run(  # noqa: S603
        ["unshare", "-rnm", sys.executable, "listener.py", *words],  # noqa: S607
        cwd=folder, env={**environment(None, key=""), "HOME": str(folder)}, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("lookups")[-1])


@pytest.mark.skipif(
    not ISOLATED or shutil.which("ip") is None, reason="needs namespaces and the command ip"
)
def test_an_offline_run_looks_up_no_name(tmp_path):
    options = {"folder": str(tmp_path / "stages"), "mode": "offline", "steps": 3}
    assert count_lookups(tmp_path, "-c", CHILD, json.dumps(options)) == 0
    # Neither does a run that resumes after its first part was sent with wandb sync.
    (segment,) = tmp_path.glob("stages/train-x/wandb/offline-run-*/run-*.wandb")
    segment.with_name(f"{segment.name}.synced").touch()
    assert count_lookups(tmp_path, "-c", CHILD, json.dumps({**options, "from": 3, "steps": 9})) == 0
    # The listener does count lookups.
    lookup = (
        "import socket, contextlib\nwith contextlib.suppress(OSError): socket.getaddrinfo('a.b', 1)"
    )
    assert count_lookups(tmp_path, "-c", lookup) > 0


@pytest.mark.slow
def test_the_offline_files_of_a_run_have_its_rows_widths_and_configuration(swept):
    folder, _, _ = swept
    done = [entry for entry in stages(folder) if (entry / "result.json").exists()]
    assert sorted(entry.name.partition("-")[0] for entry in done) == ["search"] * 2 + ["train"] * 2
    for stage in done:
        (segment,) = stage.glob("wandb/offline-run-*/run-*.wandb")
        records = inspect_segment(segment)
        (run,) = [entry["run"] for entry in records if entry["type"] == "run"]
        kind = stage.name.partition("-")[0]
        assert run["run_id"] == stage.name
        assert run["job_type"] == kind
        assert run["project"] == "width-transfer"
        axes = "w0.5>w1-d1-r12-f1" if kind == "train" else "w0.5-d1-r12-f1"
        assert run["run_group"] == f"{kind}/my_network.MyNetwork/digits/morphnet/{axes}"
        assert {"mine", "my_network.MyNetwork", "morphnet", "transfer"} < set(run["tags"])
        assert run["host"] == "-"
        config = run["config"]["update"]
        assert f"seed{config['seed']}" in run["tags"]
        history = [entry["history"]["item"] for entry in records if entry["type"] == "history"]
        stored = read_rows(stage)
        assert [entry["_step"] for entry in history] == sorted(stored)
        assert [entry.get(f"{kind}/loss") for entry in history] == [
            stored[step].get(f"{kind}/loss") for step in sorted(stored)
        ]
        widths = json.loads((stage / "widths.json").read_text())["channels"]
        summaries = [entry["summary"]["update"] for entry in records if entry["type"] == "summary"]
        lists = [entry["widths/channels"] for entry in summaries if "widths/channels" in entry]
        assert lists[-1] == pytest.approx(list(widths.values()))
        assert [entry["exit"] for entry in records if entry["type"] == "exit"][-1].get(
            "exit_code", 0
        ) == 0


@pytest.mark.slow
def test_curves_are_shown_in_a_terminal_without_an_account(swept):
    """The command of docs/wandb.md."""
    folder, _, _ = swept
    (stage, *_) = [
        entry
        for entry in stages(folder)
        if entry.name.startswith("train") and list(entry.glob("wandb"))
    ]
    terminal, inner = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = {**environment(None, key=""), "HOME": str(folder), "TERM": "xterm-256color"}
    process = subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-m", "wandb", "leet", str(stage / "wandb")],
        env=env, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    seen, until = b"", time.monotonic() + 60
    wanted = (stage.name.encode(), b"Finished", b"epoch")  # the name of the first curve
    while time.monotonic() < until and not all(entry in seen for entry in wanted):
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)
    os.write(terminal, b"q")
    with suppress(OSError):  # raised at the end of the terminal's output
        while os.read(terminal, 65536):
            pass
    os.close(terminal)
    assert process.wait(timeout=30) == 0
    assert [entry for entry in wanted if entry not in seen] == []


@pytest.mark.slow
def test_the_file_of_widths_is_not_copied_to_a_folder_of_w_and_b(swept):
    """The machine that sends the run may not have such a folder."""
    folder, _, _ = swept
    for stage in stages(folder):
        if (stage / "result.json").exists():
            widths = (stage / "widths.json").read_bytes()
            files = [entry for entry in (folder / "runs").rglob("*") if entry.is_file()]
            same = [entry for entry in files if entry.read_bytes() == widths]
            assert [entry.parent.resolve() for entry in same] == [stage.resolve()]


@pytest.mark.slow
def test_a_key_in_the_environment_is_in_no_file_of_a_sweep(swept):
    """This includes the specs of runs, W&B's files and the logs."""
    folder, done, _ = swept
    texts = [done.stdout.encode(), done.stderr.encode()]
    texts += [entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()]
    assert len(texts) > 50
    assert not any(KEY.encode() in entry for entry in texts)


@pytest.mark.slow
def test_the_tracked_widths_are_those_of_the_result(swept):
    folder, _, _ = swept
    for stage in stages(folder):
        if stage.name.startswith("train") and (stage / "result.json").exists():
            result = json.loads((stage / "result.json").read_text())["result"]
            shown = json.loads((stage / "widths.json").read_text())
            assert shown["channels"] == result["found"]["channels"]
            assert shown["alpha"] == result["found"]["alpha"]


def check_server(server, folder):
    """Assert that the server has every run, row and artifact of the sweep once."""
    figures = sorted(
        entry.parent.parent.name for entry in folder.glob("runs/report/*/tracking/wandb.json")
    )
    assert sorted(server.runs) == sorted(
        [*(entry.name for entry in stages(folder) if (entry / "tracking").exists()), *figures]
    )
    codes = {}
    for stage in stages(folder):
        if stage.name in server.runs:
            run = server.runs[stage.name]
            assert_same_rows(run, stage)
            assert run.complete
            codes[stage.name] = run.exit_code
            failed = not (stage / "result.json").exists()
            assert run.exit_code == int(failed)
            names = {entry["_step"] for entry in run.history}
            assert len(names) == len(run.history)
    assert sorted(codes.values()) == [0, 0, 0, 0, 1, 1]
    widths = sorted(
        entry["runName"]
        for entry in server.artifacts.values()
        if entry["artifactTypeName"] == "widths"
    )
    assert widths == sorted(name for name, code in codes.items() if code == 0)
    tables = [
        entry["runName"] for entry in server.artifacts.values() if entry["runName"] in figures
    ]
    assert tables == figures  # each has one table
    assert {entry["state"] for entry in server.artifacts.values()} == {"COMMITTED"}
    for name in widths:
        local = (folder / "runs" / "stages" / name / "widths.json").read_bytes()
        assert local in server.blobs.values()
    assert server.unknown == []


@pytest.mark.slow
def test_a_sweep_is_sent_completely_and_only_once(swept, tmp_path):
    folder, _, _ = swept
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    with Server() as server:
        done = sync(tmp_path, server)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "7 sent, 0 had been sent before, 0 still run"
        check_server(server, tmp_path)
        (figures,) = [
            entry for entry in server.runs.values() if entry.fields["jobType"] == "figures"
        ]
        (row,) = figures.history
        assert row["figures/mine"]["_type"] == "image-file"
        assert row["tables/mine"]["_type"] == "table-file"
        alerts = [entry["title"] for entry in server.alerts]
        assert alerts == ["search failed", "search failed"]
        before = list(server.operations)
        done = sync(tmp_path, server)
        assert done.stderr.splitlines()[-1] == "0 sent, 7 had been sent before, 0 still run"
        assert server.operations == before
        # wandb sync does not send it again either.
        own = start_wandb_sync(tmp_path, server)
        assert "No runs to sync" in own.stdout + own.stderr
        check_server(server, tmp_path)


def start_wandb_sync(folder, server):
    """Run wandb sync on all runs, as W&B documents it."""
    segments = sorted(str(entry) for entry in folder.glob("runs/*/*/wandb/offline-run-*"))
    return subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-m", "wandb", "sync", "--yes", *segments],
        cwd=folder / "runs",  # artifacts are found from any folder
        env={**environment(server), "HOME": str(folder)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_wandb_sync_sends_a_sweep(swept, tmp_path):
    folder, _, _ = swept
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    with Server() as server:
        own = start_wandb_sync(tmp_path, server)
        assert own.returncode == 0, own.stderr
        check_server(server, tmp_path)


@pytest.mark.slow
def test_a_dry_run_lists_the_runs_without_sending_them(swept, tmp_path):
    folder, _, _ = swept
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    waiting_runs(tmp_path, "train-other")
    done = start(tmp_path, "sync", "--dry-run", env=environment(None, key=""))
    assert done.returncode == 0, done.stderr
    named = start(tmp_path, "sync", "--dry-run", "mine", env=environment(None, key=""))
    local = named.stdout.splitlines()  # the runs of the sweep, and its figures
    assert len(local) == 7
    assert sorted(done.stdout.splitlines()) == sorted([*local, "train-other"])


def waiting_runs(folder, *names):
    """Write finished runs that have not been sent."""
    axes = {"width": 1.0, "depth": 1, "resolution": 8, "fraction": 1.0}
    for name in names:
        files = TrackingFiles(folder / "runs" / "stages" / name)
        about = About(
            id=name, kind="train", network="n", dataset="d", algorithm="dmcp", method="direct",
            seed=0, source=axes, target=axes, figures=(), tags=(), fields={},
        )  # fmt: skip
        files.begin({**about.init, "project": "width-transfer", "entity": None})
        files.append({"step": 1, "time": 1.5, "train/loss": 1.0})
        files.write_end(End())


def test_runs_after_a_refused_one_are_sent(tmp_path):
    """A server refuses a run that was deleted there."""
    waiting_runs(tmp_path, "train-a", "train-b", "train-c")
    with Server() as server:
        server.deleted = {"train-a"}
        done = sync(tmp_path, server)
        assert (done.returncode, done.stdout) == (1, "")
        refused, *sent, total, end = done.stderr.splitlines()
        assert refused.startswith("train-a was not sent (")
        assert sent == ["train-b", "train-c"]
        assert total == "2 sent, 0 had been sent before, 0 still run"
        assert end == "widthopt: 1 were not sent; run the same command again"
        assert sorted(server.runs) == ["train-b", "train-c"]


@pytest.mark.slow
def test_a_run_in_progress_is_left_for_the_next_sync(tmp_path):
    process = child(tmp_path, environment(None, key=""), mode="offline", wait_at=10)
    assert process.stdout.readline() == "waiting\n"
    with Server() as server:
        words = ("sync", "--root", ".")
        done = start(tmp_path, *words, env=environment(server))
        assert done.stderr.splitlines() == ["0 sent, 0 had been sent before, 1 still run"]
        assert server.requests == []
        wait_for_end(process)
        done = start(tmp_path, *words, env=environment(server))
        assert done.stderr.splitlines()[-1] == "1 sent, 0 had been sent before, 0 still run"
        assert_same_rows(server.runs["train-x"], tmp_path / "stages" / "train-x")


@pytest.mark.slow
def test_a_sync_stops_after_three_refused_runs_in_a_row(tmp_path):
    names = [f"train-{letter}" for letter in "abcde"]
    waiting_runs(tmp_path, *names)
    with Server() as server:
        server.deleted = set(names)
        done = sync(tmp_path, server)
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()[:-2]] == names[:3]
    assert done.stderr.splitlines()[-2] == "0 sent, 0 had been sent before, 0 still run"


@pytest.mark.slow
def test_changed_figures_are_sent_again_and_missing_files_are_left_out(tmp_path):
    waiting_runs(tmp_path, "figures-x")
    report = tmp_path / "runs" / "report"
    (tmp_path / "runs" / "stages").rename(report)
    files = TrackingFiles(report / "figures-x")
    files.metrics.unlink()
    (report / "mine.csv").write_text("top1\n71\n")
    files.write_end(End(media={"figures/mine": "../mine.png", "tables/mine": "../mine.csv"}))
    with Server() as server:
        assert sync(tmp_path, server).returncode == 0
        (run,) = server.runs.values()
        assert [sorted(entry for entry in row if entry[0] != "_") for row in run.history] == [
            ["tables/mine"]
        ]
        assert files.is_fully_synced
        (report / "mine.csv").write_text("top1\n72\n")
        assert not files.is_fully_synced
        assert sync(tmp_path, server).returncode == 0
        assert run.steps == [0, 1]
        assert run.complete


@pytest.mark.slow
def test_a_report_of_a_tracked_sweep_is_tracked(swept, tmp_path):
    """On a cluster only `widthopt report` draws the figures of a sweep."""
    folder, _, _ = swept
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "report")
    with Server() as server:
        env = environment(server)
        assert start(tmp_path, "report", env=env).returncode == 0
        assert server.requests == []
        assert sync(tmp_path, server).returncode == 0
        (figures,) = [
            entry for entry in server.runs.values() if entry.fields["jobType"] == "figures"
        ]
        (row,) = figures.history
        assert {"figures/mine", "tables/mine"} < row.keys()
        # Unchanged figures are not sent again, not even by wandb sync.
        assert start(tmp_path, "report", env=env).returncode == 0
        assert start_wandb_sync(tmp_path, server).returncode == 0
        assert sync(tmp_path, server).returncode == 0
        assert figures.steps == [0]
        # Changed figures are.
        (stage, *_) = tmp_path.glob("runs/stages/train-*/result.json")
        stage.unlink()
        assert start(tmp_path, "report", env=env).returncode == 0
        assert sync(tmp_path, server).returncode == 0
        assert figures.steps == [0, 1]


@pytest.mark.slow
def test_a_sync_that_is_repeated_after_a_kill_sends_each_row_once(tmp_path):
    wait_for_end(child(tmp_path, environment(None, key=""), mode="offline", steps=20_000))
    stage = tmp_path / "stages" / "train-x"
    with Server() as server:
        stream = server.stream

        def stream_slowly(name, content):
            time.sleep(0.3)
            stream(name, content)

        server.stream = stream_slowly
        words = command("sync", "--root", str(tmp_path))
        env = {**environment(server), "HOME": str(tmp_path)}
        process = subprocess.Popen(words, env=env)  # noqa: S603
        assert server.wait_for(
            lambda: server.runs.get("train-x") and server.runs["train-x"].history
        )
        for pid in (process.pid, *(pid for pid, _ in descendants(process.pid))):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)
        server.stream = stream
        done = start(tmp_path, "sync", "--root", ".", env=environment(server))
        assert done.returncode == 0, done.stderr
        assert_same_rows(server.runs["train-x"], stage)


@pytest.mark.slow
def test_a_sync_without_a_key_names_the_runs_that_were_not_sent(swept, tmp_path):
    folder, _, _ = swept
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    done = start(tmp_path, "sync", env=environment(None, key=""))
    assert done.returncode == 1
    *refused, total, end = done.stderr.splitlines()
    assert len(refused) == 3
    assert all("was not sent (No API key configured" in line for line in refused)
    assert total == "0 sent, 0 had been sent before, 0 still run"
    assert end == "widthopt: 3 were not sent; run the same command again"


# Interrupted, killed and requeued.


def one_run(folder, server, *words, key=KEY):
    return start(folder, *WORDS, "methods=[uniform]", *words, env=environment(server, key=key))


@pytest.fixture
def network(tmp_path):
    (tmp_path / "my_network.py").write_text(NETWORK)
    return tmp_path


LONG = ("recipe.epochs=20", "recipe.batch_size=16")


def interrupt_training(folder, server, mode, number):
    """Start a training and interrupt it with a signal; return its folder, exit code and errors."""
    words = (*WORDS, "methods=[uniform]", f"tracking={mode}", *LONG)
    env = {**environment(server), "HOME": str(folder)}
    process = subprocess.Popen(  # noqa: S603 (our own words)
        command(*words), cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 60
    path = folder / "runs" / "stages"
    while time.monotonic() < until:
        (stage,) = list(path.glob("train-*")) or [path / "none"]
        segments = list(stage.glob("wandb/*run-*"))
        if segments and len(read_rows(stage)) > 60:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return stage, process.returncode, errors.decode()


def is_unlocked(stage):
    """Return whether no process executes or sends the run."""
    lock, is_free = TrackingFiles(stage).open_lock()
    os.close(lock)
    return is_free


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_requeued_offline_run_is_one_run_with_each_row_once(number, network):
    stage, code, _ = interrupt_training(network, None, "offline", number)
    assert code == (-number if number == signal.SIGKILL else 130)
    done = one_run(network, None, "tracking=offline", *LONG, key="")
    assert done.returncode == 0, done.stderr
    assert len(list(stage.glob("wandb/offline-run-*"))) == 1
    with Server() as server:
        own = start_wandb_sync(network, server)
        assert own.returncode == 0, own.stderr
        (run,) = server.runs.values()
        assert_same_rows(run, stage)
        assert (run.complete, run.exit_code) == (True, 0)
        trained = [row for row in run.history if "train/loss" in row]
        assert trained[-1]["epoch"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_requeued_online_run_is_one_run_with_each_row_once(number, network):
    with Server() as server:
        stage, _, errors = interrupt_training(network, server, "online", number)
        (run,) = server.runs.values()
        if number == signal.SIGINT:
            assert "tracking" not in errors
            assert (run.preempting > 0, run.complete, run.exit_code) == (True, True, 1)
        done = one_run(network, server, "tracking=online", *LONG)
        assert done.returncode == 0, done.stderr
        assert "tracking" not in done.stderr
        assert list(server.runs) == [stage.name]
        assert run.steps == sorted(read_rows(stage))
        assert (run.complete, run.exit_code) == (True, 0)
        assert run.summary["test/top1"] == max(
            row.get("test/top1", 0) for row in read_rows(stage).values()
        )


@pytest.mark.slow
def test_a_run_that_was_synced_while_interrupted_continues_on_the_server(network):
    stage, _, _ = interrupt_training(network, None, "offline", signal.SIGKILL)
    with Server() as server:
        assert server.wait_for(lambda: is_unlocked(stage))  # the sending process has ended
        assert sync(network, server).returncode == 0
        (run,) = server.runs.values()
        assert (run.exit_code, run.preempting > 0) == (1, True)
        assert len(run.history) > 0
        done = one_run(network, None, "tracking=offline", *LONG, key="")
        assert done.returncode == 0, done.stderr
        assert sync(network, server).returncode == 0
        assert run.steps == sorted(read_rows(stage))
        assert (run.complete, run.exit_code) == (True, 0)


@pytest.mark.slow
def test_a_run_that_resumes_untracked_is_complete_after_the_next_sync(network):
    stage, _, _ = interrupt_training(network, None, "offline", signal.SIGINT)
    done = one_run(network, None, "tracking=disabled", *LONG, key="")
    assert done.returncode == 0, done.stderr
    with Server() as server:
        assert sync(network, server).returncode == 0
        (run,) = server.runs.values()
        assert run.steps == sorted(read_rows(stage))
        assert (run.complete, run.exit_code) == (True, 0)


# A server that fails.


def warnings_in(errors):
    return [line for line in errors.splitlines() if line.startswith("WARNING")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "limits", "reason"),
    [
        ("unreachable", {"finish_seconds": 60}, "connection refused"),
        ("no key", {"finish_seconds": 60}, "No API key configured"),
        ("refuses", {"finish_seconds": 60}, "Error initializing run"),
        ("silent", {"finish_seconds": 60}, "context deadline exceeded"),
        ("silent", {"finish_seconds": 4, "init_timeout_seconds": 60}, "no answer within 4 s"),
    ],
)
def test_an_unavailable_server_is_one_warning_and_the_run_is_complete(
    fault, limits, reason, tmp_path
):
    with Server() as server:
        env = environment("http://127.0.0.1:9" if fault == "unreachable" else server)
        if fault == "no key":
            del env["WANDB_API_KEY"]
        server.silent = fault == "silent"
        server.refuse = {"UpsertBucket"} if fault == "refuses" else set()
        errors, seconds = wait_for_end(child(tmp_path, env, **limits))
    (warning,) = warnings_in(errors)
    assert "tracking=online failed" in warning
    assert reason in warning
    assert "`widthopt sync` sends them later" in warning
    assert seconds < limits["finish_seconds"] + 11  # the process is killed 5 s after the limit
    stage = tmp_path / "stages" / "train-x"
    assert sorted(read_rows(stage)) == list(range(1, 22))
    with Server() as server:
        done = start(tmp_path, "sync", "--root", ".", env=environment(server))
        assert done.returncode == 0, done.stderr
        assert_same_rows(server.runs["train-x"], stage)
        (artifact,) = server.artifacts.values()
        assert artifact["state"] == "COMMITTED"
        aliases = {
            (alias["artifactCollectionName"], alias["alias"]) for alias in artifact["aliases"]
        }
        assert aliases == {("widths-train-x", "seed0"), ("widths-train-x", "latest")}
        expected = {name: axis for axis, names in X_AXES.items() for name in names}
        assert x_axes(server.runs["train-x"]) == expected


def x_axes(run):
    """Return the x axis of each metric that has one; W&B's client sends indices from 1."""
    received = run.config["_wandb"]["m"]
    return {
        entry.get("1", entry.get("2")): received[entry["5"] - 1]["1"]
        for entry in received
        if entry.get("5", 0) > 0
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dead", "silent", "quota"])
def test_a_server_that_fails_during_a_run_is_one_warning_and_a_limited_wait(fault, tmp_path):
    with Server() as server:
        process = child(tmp_path, environment(server), wait_at=10, steps=30)
        assert process.stdout.readline() == "waiting\n"
        assert server.wait_for(
            lambda: server.runs.get("train-x") and server.runs["train-x"].history
        )
        setattr(server, fault, True)
        before = time.monotonic()
        errors, seconds = wait_for_end(process)
        assert time.monotonic() - before < 25
        assert seconds < 15
        (warning,) = warnings_in(errors)
        assert "tracking=online failed" in warning
        setattr(server, fault, False)
        server.silent = False
        done = start(tmp_path, "sync", "--root", ".", env=environment(server))
        assert done.returncode == 0, done.stderr
        assert_same_rows(server.runs["train-x"], tmp_path / "stages" / "train-x")


@pytest.mark.slow
def test_a_server_that_hangs_at_the_end_is_one_warning_and_a_limited_wait(tmp_path):
    with Server() as server:
        process = child(tmp_path, environment(server), wait_at=30, steps=30)
        assert process.stdout.readline() == "waiting\n"
        assert server.wait_for(
            lambda: server.runs.get("train-x") and server.runs["train-x"].history
        )
        server.silent = True
        errors, seconds = wait_for_end(process)
        (warning,) = warnings_in(errors)
        assert "tracking=online failed" in warning
        assert seconds < 15


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_waits_for_a_server(tmp_path):
    with Server() as server:
        process = child(
            tmp_path, environment(server), wait_at=30, steps=30, finish_seconds=60
        )  # fmt: skip
        assert process.stdout.readline() == "waiting\n"
        assert server.wait_for(lambda: "train-x" in server.runs)
        server.silent = True
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("closing")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        before = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
        assert time.monotonic() - before < 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_next_run_is_tracked_after_a_process_of_w_and_b_was_killed(mode, tmp_path):
    """A signal to all processes of a job reaches it too."""
    with Server() as server:
        env = environment(server) if mode == "online" else environment(None, key="")
        names = ["train-x", "train-y"]
        process = child(tmp_path, env, mode=mode, wait_at=10, steps=30, names=names)
        assert process.stdout.readline() == "waiting\n"
        assert server.wait_for(
            lambda: any("wandb-core" in words for _, words in descendants(process.pid))
        )
        for pid, words in descendants(process.pid):
            if "wandb-core" in words:
                os.kill(pid, signal.SIGKILL)
        errors, _ = wait_for_end(process)
        (warning,) = warnings_in(errors)
        assert f"tracking={mode} failed" in warning
        assert errors.splitlines() == [warning]
        for name in names:
            assert len(read_rows(tmp_path / "stages" / name)) == 31
        done = start(tmp_path, "sync", "--root", ".", env=environment(server))
        assert done.returncode == 0, done.stderr
        sent = 2 if mode == "offline" else 1
        assert done.stderr.splitlines()[-1].startswith(f"{sent} sent, {2 - sent} had been sent")
        for name in names:
            assert_same_rows(server.runs[name], tmp_path / "stages" / name)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_does_not_end_the_sending_process(tmp_path):
    with Server() as server:
        process = child(tmp_path, environment(server), wait_at=10, steps=30)
        assert process.stdout.readline() == "waiting\n"
        assert server.wait_for(lambda: "train-x" in server.runs)
        for pid, _ in descendants(process.pid):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        errors, _ = wait_for_end(process)
        assert warnings_in(errors) == []
        assert_same_rows(server.runs["train-x"], tmp_path / "stages" / "train-x")


@pytest.mark.slow
def test_processes_of_w_and_b_do_not_outlive_a_run_that_killed_the_sending_process(tmp_path):
    with Server() as server:
        process = child(tmp_path, environment(server), wait_at=3, steps=5)
        assert process.stdout.readline() == "waiting\n"
        assert server.wait_for(lambda: "train-x" in server.runs)
        core = [entry for entry in descendants(process.pid) if "wandb-core" in entry[1]]
        assert core
        server.silent = True
        wait_for_end(process)
        for pid, _ in core:
            status = Path(f"/proc/{pid}/status")
            assert not status.exists() or "zombie" in status.read_text()


def descendants(parent):
    """Return all descendants of a process, with their command lines."""
    processes = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            words = (status.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if re.search(rf"^PPid:\s*{parent}$", text, re.MULTILINE):
            pid = int(status.parent.name)
            processes += [(pid, words), *descendants(pid)]
    return processes


@pytest.mark.skipif(not ISOLATED, reason="needs namespaces")
def test_a_full_disk_is_one_warning_and_the_run_continues(tmp_path):
    """The disk has 300 kB; no checkpoint is written to it, so only tracking fills it."""
    options = {
        "folder": str(tmp_path / "disk" / "stages"), "mode": "offline", "steps": 8000,
    }  # fmt: skip
    (tmp_path / "disk").mkdir()
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    run = f"{sys.executable} child.py '{json.dumps(options)}'"
    words = f"mount -t tmpfs -o size=300k none disk && {run}"
    env = {**environment(None, key=""), "HOME": str(tmp_path)}
    process = subprocess.Popen(  # noqa: S603
        ["unshare", "-rm", "sh", "-c", words], cwd=tmp_path, env=env, text=True,  # noqa: S607
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    errors, seconds = wait_for_end(process)
    (warning,) = warnings_in(errors)
    assert "metrics.jsonl cannot be written (" in warning
    assert seconds < 15


# Servers set with `wandb login --host`.


def test_a_run_is_sent_to_the_server_of_wandb_login(tmp_path):
    """The address of the server is in one file of the home folder, and the key in another."""
    with Server() as server:
        settings = tmp_path / ".config" / "wandb" / "settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(f"[default]\nbase_url = {server.url}\n")
        netrc = tmp_path / ".netrc"
        netrc.write_text(f"machine {server.url[7:]}\n  login user\n  password {KEY}\n")
        netrc.chmod(0o600)
        errors, _ = wait_for_end(child(tmp_path, environment(None, key="")))
        assert warnings_in(errors) == []
        assert_same_rows(server.runs["train-x"], tmp_path / "stages" / "train-x")
    # No other file is written to the home folder.
    local = {
        entry for entry in tmp_path.rglob("*") if entry.is_file() and "stages" not in entry.parts
    }
    assert {entry for entry in local if ".wandb" not in entry.parts} == {settings, netrc}


# Secrets.


@pytest.mark.slow
def test_a_key_reaches_no_file_no_log_and_no_process_list(network):
    """This is for an online run, and for one that is sent later."""
    seen = set()
    with Server() as server:
        words = (*WORDS, "methods=[uniform]", "tracking=online", *LONG)
        env = {**environment(server, key=KEY), "HOME": str(network)}
        with subprocess.Popen(  # noqa: S603 (our own words)
            command(*words), cwd=network, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            while process.poll() is None:
                seen.update(line for _, line in descendants(process.pid))
                time.sleep(0.2)
            output = process.stdout.read()
        assert process.returncode == 0, output
        done = sync(network, server)
        assert "wandb-core" in " ".join(seen)
    texts = [output, done.stdout, done.stderr, *seen]
    texts += [
        entry.read_bytes().decode("latin-1") for entry in network.rglob("*") if entry.is_file()
    ]
    assert len(texts) > 20
    assert [entry[:200] for entry in texts if KEY in entry] == []


def test_text_that_looks_like_a_key_is_removed_from_the_configuration(tmp_path):
    secret = "f00dfeed" * 5
    fields = {"root": f"/data/{secret}", "api_key": "short", "kept": "value"}
    wait_for_end(child(tmp_path, environment(None, key=""), mode="offline", fields=fields))
    texts = [entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()]
    assert not any(secret.encode() in entry or b"short" in entry for entry in texts)
    assert any(b"kept" in entry for entry in texts)


# Several processes, and no W&B.


def test_only_rank_0_tracks(tmp_path):
    script = tmp_path / "member.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        import torch
        from widthopt.tracking import About, Tracking, open_tracker
        rank = int(sys.argv[1])
        torch.distributed.init_process_group(
            "gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
        axes = {{"width": 1.0, "depth": 1, "resolution": 8, "fraction": 1.0}}
        about = About(id="train-x", kind="train", network="n", dataset="d", algorithm="dmcp",
                      method="direct", seed=0, source=axes, target=axes, figures=(), tags=(),
                      fields={{}})
        tracking = Tracking(mode="offline", project="p", entity=None, tags=(), salt="",
                            log_every_steps=50, init_timeout_seconds=60, finish_seconds=60)
        with open_tracker(tracking, about, Path("{tmp_path}/stages") / str(rank)) as log:
            if log is not None:
                log.row(1, {{"loss": 1.0}})
        print(rank, log is None, "wandb" in sys.modules)
        torch.distributed.destroy_process_group()
        """)
    )
    env = {**environment(None, key=""), "HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(  # noqa: S603 (our own words)
            [sys.executable, str(script), str(rank)], env=env, text=True, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=60)[0] for process in processes]
    assert output == ["0 False False\n", "1 True False\n"]
    assert [entry.name for entry in (tmp_path / "stages").iterdir()] == ["0"]


def test_a_run_without_w_and_b_installed_is_one_warning(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('No module named wandb')")
    env = environment(None, key="")
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    errors, _ = wait_for_end(child(tmp_path, env, mode="offline"))
    (warning,) = warnings_in(errors)
    assert "tracking=offline failed (No module named wandb)" in warning
    assert len(read_rows(tmp_path / "stages" / "train-x")) == 21
