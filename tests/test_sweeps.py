"""Sweeps from the command line, on small networks: sharing, resuming, reports and errors."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, NETWORK, TINY, command, one_line, prepare, widthopt
from PIL import Image

from widthopt.errors import InputError
from widthopt.runs.execute import record_of
from widthopt.runs.manifest import load_manifests
from widthopt.runs.store import Store, failure_reason
from widthopt.sweeps.worker import run_spec


SWEEP = (
    "-m", *(word for word in TINY if not word.startswith("projection")),
    "projection.width=0.5,0.75,1", "seeds=[0],[1]", "methods=[transfer]",
    "runtime.backend=slice", "runtime.memory_format=contiguous",
)  # fmt: skip
"""Six points: six searches, six trainings."""

EXTENDING = Path(__file__).parents[1] / "docs" / "extending.md"

FIGURES = """# @package _global_
figures:
  - _target_: search_seconds.SearchSeconds
    name: search_seconds
    title: What a search takes
    claim: ""
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


def recipe(name):
    """Return the code of a file in docs/extending.md."""
    code = EXTENDING.read_text().partition(f"`{name}`")[2].partition("```")[2].partition("\n")[2]
    return textwrap.dedent(code.partition("```")[0])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_network.py").write_text(NETWORK)
    return tmp_path


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory):
    """Run a sweep without interruption; its folder and the completed command."""
    folder = tmp_path_factory.mktemp("finished_sweep")
    prepare(folder, FIGURES)
    (folder / "search_seconds.py").write_text(recipe("search_seconds.py"))
    done = widthopt(
        "--config-dir", "conf", *SWEEP, "experiment=mine", "hydra/launcher=local", folder=folder
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def read_entries(folder, kind=None):
    """Return the store entries of a sweep, of one kind if it is given."""
    return list(Store(folder / "runs" / "stages").entries(kind))


def read_records(folder):
    """Return all records by key, without their times."""
    stored = {}
    for entry in read_entries(folder, "train"):
        result = entry.result()
        if result is not None:
            record = record_of(result, method="transfer", algorithm="any")
            item = dataclasses.replace(record.found, search_seconds=0.0)
            stored[entry.key] = dataclasses.replace(record, found=item, train_seconds=0.0)
    return stored


def logged_epochs(folder, kind):
    """Return the epochs in the log of each entry, by key."""
    return {
        entry.key: re.findall(r"epoch (\d+) of", (entry.folder / "log.txt").read_text())
        for entry in read_entries(folder, kind)
    }


# ----------------------------------------------------------------------------- complete sweeps


def test_a_sweep_does_every_run_once(finished_sweep):
    folder, done = finished_sweep
    assert len(read_entries(folder, "search")) == len(read_entries(folder, "train")) == 6
    assert len(read_records(folder)) == 6
    for kind, epochs in (("search", ["1", "2"]), ("train", ["1", "2"])):
        assert set(map(tuple, logged_epochs(folder, kind).values())) == {tuple(epochs)}
    assert "for 6 points" not in done.stdout  # a short plan lists each run
    assert done.stdout.count("search, seed 0") == 3
    assert "12 of 12 done" in done.stderr


def test_the_same_command_again_starts_no_run(finished_sweep):
    folder, _ = finished_sweep
    before = read_records(folder)
    done = widthopt(
        "--config-dir", "conf", *SWEEP, "experiment=mine", "hydra/launcher=local", folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert "done:" not in done.stderr
    assert read_records(folder) == before
    assert set(map(tuple, logged_epochs(folder, "train").values())) == {("1", "2")}


def test_a_sweep_draws_its_figures_and_a_page(finished_sweep):
    folder, done = finished_sweep
    report = folder / "runs" / "report"
    for name in ("mine.png", "mine.pdf", "mine.csv", "mine.md", "index.html"):
        assert (report / name).stat().st_size > 0
    assert (report / "mine.png").read_bytes().startswith(b"\x89PNG")
    reported = done.stdout.splitlines()
    place = reported.index("mine: Mine (6 records, 2 points missing)")
    assert reported[place + 1 : place + 3] == [
        "  missing: my_network.MyNetwork on digits, (1, 1, 12, 100%): training, baseline, seed "
        f"{seed}"
        for seed in (0, 1)
    ]
    assert "runs/report/index.html" in done.stdout
    page = (report / "index.html").read_text()
    assert "my_network.MyNetwork on digits, (1, 1, 12, 100%): training, baseline, seed 0" in page


def test_a_figure_is_added_with_one_module_and_one_experiment(finished_sweep):
    """Follow the recipe of docs/extending.md with the code that it shows."""
    place, _, _ = FIGURES.partition("\n")[2].partition("  - _target_: w")
    assert f"```yaml\n{place}```" in EXTENDING.read_text()
    folder, _ = finished_sweep
    report = folder / "runs" / "report"
    assert (report / "search_seconds.png").stat().st_size > 0
    head, *rows = (report / "search_seconds.csv").read_text().splitlines()
    assert head == "search s,top-1 %"
    results = [entry.result() for entry in read_entries(folder, "train")]
    shown = sorted(row.partition(",")[2] for row in rows)
    assert shown == sorted(f"{item['top1']:.1f}" for item in results)


def test_a_projection_is_added_with_one_module_and_one_conf_file(folder):
    """Follow the recipe of docs/extending.md with the code that it shows."""
    for name in ("half_everything.py", "conf/projection/half_everything.yaml"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe(name))
    words = [word for word in TINY if not word.startswith("projection")]
    done = widthopt(
        "plan", "--config-dir", "conf", "projection=half_everything", "projection.times=1,2",
        *words, "methods=[transfer]", "--json", folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whats = [run["what"] for run in json.loads(done.stdout)["runs"]]
    assert sum("(0.5, 1, 12, 50%): morphnet search" in what for what in whats) == 1
    assert sum("(0.25, 1, 12, 25%): morphnet search" in what for what in whats) == 1


def test_a_report_of_the_same_records_gives_the_same_files(finished_sweep):
    folder, _ = finished_sweep
    report = folder / "runs" / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir() if path.is_file()}
    done = widthopt("report", folder=folder)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in report.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_report_draws_one_figure_by_its_name(finished_sweep):
    folder, _ = finished_sweep
    report = folder / "runs" / "report"
    (report / "mine.png").write_bytes(b"old")
    numbers = (report / "search_seconds.csv").read_bytes()
    (report / "search_seconds.csv").write_bytes(b"old")
    page = (report / "index.html").read_bytes()
    (report / "index.html").write_bytes(b"old")
    done = widthopt("report", "search_s", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (report / "search_seconds.csv").read_bytes() == numbers
    assert (report / "mine.png").read_bytes() == (report / "index.html").read_bytes() == b"old"
    assert done.stdout.splitlines()[0].startswith("search_seconds: ")
    assert "runs/report/search_seconds.png" in done.stdout
    assert "index.html" not in done.stdout
    # The full name of a figure selects the figure, even if a sweep's name starts with it.
    done = widthopt("report", "mine", folder=folder)
    assert (report / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert "index.html" not in done.stdout
    (sweep,) = (folder / "runs" / "sweeps").glob("mine*")
    done = widthopt("report", sweep.stem, folder=folder)
    assert (report / "index.html").read_bytes() == page
    nothing = widthopt("report", "figure9", folder=folder)
    assert nothing.returncode == 2
    assert nothing.stderr.strip() == (
        "widthopt: no sweep or figure 'figure9' in runs; available: "
        f"{sweep.stem}; figures: search_seconds, mine"
    )


def test_status_shows_the_states_of_the_runs(finished_sweep):
    folder, _ = finished_sweep
    done = widthopt("status", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(done.stdout)
    assert table["sweep"].startswith("mine-")
    assert table["points"] == 6
    assert [run["state"] for run in table["runs"]] == ["done"] * 12
    shown = widthopt("status", "mine", folder=folder)
    assert shown.returncode == 0
    assert "trainings" in shown.stdout
    assert one_line(widthopt("status", "other", folder=folder), 2).startswith("no sweep 'other'")


@pytest.mark.slow
def test_swept_values_name_the_rows_and_are_not_averaged(folder):
    varied = ("algorithm.strength=4,5", "recipe.epochs=1,2", "seeds=[0],[1]")
    words = [word for word in TINY if not word.startswith("algorithm.strength")]
    done = widthopt("-m", *words, *varied, "methods=[uniform,transfer]", folder=folder)
    assert done.returncode == 0, done.stderr
    again = widthopt("report", folder=folder)
    for message in (done.stdout, again.stdout):
        shown = message[message.index("epochs 1\n") :]
        for title in ("epochs 1", "epochs 2"):
            table = shown.partition(f"{title}\n")[2].partition("runs/report/")[0]
            lines = [re.sub(" {2,}", "|", line.strip()) for line in table.splitlines()]
            rows = [line.split("|") for line in lines if re.match(r"-\||morphnet.*\|", line)]
            assert sorted((item[0], item[1]) for item in rows[:3]) == [
                ("-", "uniform"), ("morphnet strength 4", "transfer"),
                ("morphnet strength 5", "transfer"),
            ]  # fmt: skip
            assert all("±" in item[-2] for item in rows[:3])
            assert [item[-1] for item in rows[3:]] == ["2 of 2"] * 2
    folders = sorted(path.parent.name for path in folder.glob("runs/report/*/accuracy.png"))
    assert [name[-9:] for name in folders] == ["-epochs-1", "-epochs-2"]


def test_runs_of_a_sweep_have_folders_like_single_runs(finished_sweep):
    folder, _ = finished_sweep
    runs = [path.parent for path in (folder / "runs").glob("*/record.json")]
    assert len(runs) == 3  # one for each width, with both seeds
    for run in runs:
        assert len(list((run / "channels").iterdir())) == 2
        assert len(json.loads((run / "record.json").read_text())["records"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inprocess", "local"])
def test_other_runs_continue_after_a_failure_and_the_exit_code_is_1(folder, launcher):
    words = (
        *SWEEP[:-4], "projection.width=0.5", "seeds=[0]", "methods=[transfer],[uniform]",
        "recipe.search_epochs=1,2", "recipe.learning_rate=0.1,1e9", f"hydra/launcher={launcher}",
    )  # fmt: skip
    words = tuple(word for word in words if word != "projection.width=0.5,0.75,1")
    done = widthopt(*words, folder=folder)
    assert done.returncode == 1
    # At rate 1e9 two searches fail, which blocks their trainings, and the baseline fails.
    assert done.stderr.splitlines()[-1] == (
        "widthopt: 5 of 10 runs are done, 3 failed and 2 wait for those; the same command tries "
        "them again"
    )
    assert done.stderr.count("lower recipe.learning_rate") == 3
    (table,) = json.loads(widthopt("status", "--json", folder=folder).stdout)
    states = [run["state"] for run in table["runs"]]
    assert {state: states.count(state) for state in set(states)} == {
        "done": 5, "failed": 3, "blocked": 2
    }  # fmt: skip
    assert all("learning rate" in run["why"] for run in table["runs"] if run["state"] == "failed")
    again = widthopt(*words, folder=folder)
    assert again.returncode == 1
    assert "0 of 5 runs are done, 3 failed" in again.stderr
    if launcher == "local":  # which runs each task from its spec
        failed = next(run["name"] for run in table["runs"] if run["state"] == "failed")
        single = widthopt("run", failed, folder=folder)
        assert single.returncode == 1
        assert "lower recipe.learning_rate" in single.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------- interruptions


def start_sweep(folder, *words):
    return subprocess.Popen(  # noqa: S603 (fixed arguments)
        command(*words), cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def count_results(folder):
    return len(list((folder / "runs" / "stages").glob("*/result.json")))


@pytest.mark.slow
@pytest.mark.parametrize("done_before", [1, 7])
def test_a_killed_sweep_resumes_to_the_same_records(finished_sweep, folder, done_before):
    words = (*SWEEP, "hydra/launcher=local")
    process = start_sweep(folder, *words)
    wait_for(lambda: count_results(folder) >= done_before)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for path in (folder / "runs" / "stages").glob("*/claim.json"):  # and workers that still run
        try:
            os.kill(json.loads(path.read_text())["process"], signal.SIGKILL)
        except (OSError, ValueError):
            continue
    assert count_results(folder) < 12
    done = widthopt(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert read_records(folder) == read_records(finished_sweep[0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inprocess", "local"])
def test_a_sweep_ended_by_ctrl_c_resumes_to_the_same_records(finished_sweep, folder, launcher):
    words = (*SWEEP, f"hydra/launcher={launcher}")
    process = start_sweep(folder, *words)
    wait_for(lambda: count_results(folder) >= 2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes from" in message
    assert not list((folder / "runs" / "stages").glob("*/failed.json"))
    assert not list((folder / "runs" / "stages").glob("*/claim.json"))
    done = widthopt(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert read_records(folder) == read_records(finished_sweep[0])


@pytest.mark.slow
def test_two_concurrent_sweeps_do_every_run_once(finished_sweep, folder):
    words = (*SWEEP, "hydra/launcher=local")
    both = [start_sweep(folder, *words) for _ in range(2)]
    for process in both:
        _, message = process.communicate(timeout=200)
        assert process.returncode == 0, message
    assert read_records(folder) == read_records(finished_sweep[0])
    for kind in ("search", "train"):
        assert set(map(tuple, logged_epochs(folder, kind).values())) == {("1", "2")}


# --------------------------------------------------------------------------------- mistakes


def test_a_sweep_of_many_gpu_hours_needs_a_confirmation(folder):
    words = (*SWEEP, "recipe.epochs=2000000000")
    line = one_line(widthopt(*words, folder=folder), 2)
    assert re.match(
        r"the sweep takes [\d,]+ GPU hours, but more than 24 need a confirmation; add "
        r"--yes, or make the sweep smaller$",
        line,
    )
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["projection.widht=1,2"], "projection.widht is not a key"),
        (["projection.width=1,abc"], "projection.width is abc, but it must be a number"),
        (["experiment=fig9"], "experiment is fig9, but there is no such choice"),
        (["experiment=glob(fig9*)"], "experiment is glob(fig9*), but nothing matches it"),
        (["seeds=[0]", "seeds=[1]"], "seeds is [0] and [1], but it has one value"),
        (["hydra.launcher.max_parallel=0", "hydra/launcher=local"], "hydra.launcher.max_parallel"),
        (["hydra/launcher=moon"], "hydra/launcher is moon, but there is no such choice"),
        (
            ["root=one,other"],
            "root is one and other, but all points of a sweep must have the same one",
        ),
    ],
)
def test_an_invalid_sweep_prints_one_line_and_starts_nothing(folder, words, message):
    base = [word for word in SWEEP if not word.startswith(("projection", "seeds"))]
    line = one_line(widthopt(*base, *words, folder=folder), 2)
    assert message in line
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "my_network.py"
    ]


@pytest.mark.slow
def test_a_root_of_another_version_is_refused(folder):
    (folder / "runs" / "stages").mkdir(parents=True)
    (folder / "runs" / "stages" / "store.json").write_text('{"format": 1}')
    for words in (SWEEP, ("plan", *SWEEP[1:])):
        line = one_line(widthopt(*words, folder=folder), 2)
        assert "it belongs to another version" in line
    assert os.listdir(folder / "runs" / "stages") == ["store.json"]  # noqa: PTH208 (names)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable for root")
def test_a_root_that_cannot_be_written_is_refused(folder):
    (folder / "runs").mkdir(mode=0o500)
    assert "it cannot be written" in one_line(widthopt(*SWEEP, folder=folder), 2)


@pytest.mark.slow
def test_an_edited_result_is_refused(finished_sweep, folder):
    (folder / "runs").symlink_to(finished_sweep[0] / "runs")
    path = next((folder / "runs" / "stages").glob("train-*/result.json"))
    before = path.read_text()
    try:
        path.write_text(re.sub(r'"top1": [\d.]+', '"top1": 99.9', before))
        for words in (["report"], ["status"], list(SWEEP)):
            line = one_line(widthopt(*words, folder=folder), 2)
            assert "was changed after it was written; restore it, or delete it" in line
    finally:
        path.write_text(before)


def test_a_run_that_fails_before_its_claim_reports_the_reason(folder):
    """The module of its network is removed, so its process fails before it claims the entry."""
    process = start_sweep(folder, *SWEEP, "hydra/launcher=local")
    wait_for((folder / "runs" / "sweeps").exists)
    (folder / "my_network.py").rename(folder / "another.py")
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "FAILED (network.factory is my_network.MyNetwork, but my_network cannot be" in message


@pytest.fixture(scope="module")
def small_sweep(tmp_path_factory):
    """Run a sweep of one point with relative paths in the folder ``there``, and return it."""
    there = tmp_path_factory.mktemp("small_sweep") / "there"
    for number in range(8):
        for split in ("train", "val"):
            path = there / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (30 * number, 128 * (number % 2), 0)).save(path)
    (there / "my_network.py").write_text(NETWORK)
    done = widthopt(
        "-m", *TINY, "seeds=[0]", "methods=[transfer]", "dataset=image_folder",
        "dataset.root=images", "recipe.batch_size=4", folder=there,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return there


def remove_results(root):
    """Remove all results below a root, and return the names of the runs, searches first."""
    entries = list(Store(root / "stages").entries())
    for entry in entries:
        (entry.folder / "result.json").unlink(missing_ok=True)
    return [entry.folder.name for entry in entries]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run", "search", "train"), ("retry", "sweep")])
@pytest.mark.parametrize("moved", [False, True])
def test_run_and_retry_work_from_any_folder(small_sweep, tmp_path, words, moved):
    """Relative paths start from the folder of the sweep; the root may have moved."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = small_sweep / "runs"
    if moved:
        root = Path(shutil.copytree(root, tmp_path / "moved"))
    names = remove_results(root)
    for name in words[1:]:
        where = os.path.relpath(root, elsewhere)
        done = widthopt(words[0], name, "--root", where, folder=elsewhere)
        assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in root.glob("stages/*/result.json")) == names
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("logs train --rank 7", "KEY is {train}, but its process 7 has no output; {show}"),
        ("show nothing", "KEY is nothing, but no run matches in {root}; list the runs with {all}"),
        ("show ''", "KEY is , but 2 runs match in {root}; list the runs with {all}"),
        ("report sweep", "--root is {root}, but no point of {sweep} is done; {status}"),
        ("status other", "no sweep 'other' in {root}; available: {sweep}"),
    ],
)
def test_a_message_about_a_missing_item_names_a_command_to_type(
    small_sweep, tmp_path, words, message
):
    root = Path(shutil.copytree(small_sweep / "runs", tmp_path / "of mine"))
    _, train = remove_results(root)
    (sweep,) = (path.stem for path in root.glob("sweeps/*.json"))
    done = widthopt(*shlex.split(words), "--root", str(root), folder=tmp_path)
    assert done.returncode == 2
    message = message.format(
        root=root,
        train=train,
        sweep=sweep,
        all=f"widthopt status --all --root '{root}'",
        status=f"see widthopt status --root '{root}'",
        show=f"see widthopt show {train} --root '{root}'",
    )
    assert done.stderr.splitlines()[-1] == f"widthopt: {message}"


@pytest.fixture
def failing_queue(small_sweep, tmp_path):
    """Two runs with jobs, one of them claimed, and SLURM commands that fail."""
    root = Path(shutil.copytree(small_sweep / "runs", tmp_path / "runs"))
    (root / "jobs").mkdir()
    for number, name in enumerate(remove_results(root)):
        (root / "stages" / name / "submission.json").write_text(f'{{"job": "7_{number}"}}')
    (root / "stages" / name / "claim.json").write_text('{"job": "7_1"}')
    for name in ("sbatch", "squeue", "scontrol", "sacct", "scancel"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"#!/bin/sh\necho {name} >> {tmp_path}/calls\necho no controller >&2; exit 1"
        )
        path.chmod(0o755)

    def run_command(*words):
        return subprocess.run(  # noqa: S603
            command(*words), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
            env={**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )  # fmt: skip

    return run_command, tmp_path / "calls"


def test_a_queue_that_does_not_answer_is_queried_once_and_ends_no_run(failing_queue):
    run_command, calls = failing_queue
    done = run_command("status", "--json")
    assert done.returncode == 0, done.stderr
    assert calls.read_text().split() == ["squeue"]
    assert "no controller" in done.stderr
    (table,) = json.loads(done.stdout)
    assert [(row["state"], row["queue"]) for row in table["runs"]] == [
        ("queued", "from its files; the queue does not answer"),
        ("running", "from its files; the queue does not answer"),
    ]


def test_cancel_fails_if_the_queue_does_not_answer(failing_queue):
    run_command, _ = failing_queue
    line = one_line(run_command("cancel", "sweep"), 2)
    assert line.startswith("squeue is refused by SLURM (no controller), but it must succeed;")


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("widthopt: this job was requeued 3 times", "this job was requeued 3 times"),
        (
            "torch.OutOfMemoryError: CUDA out of memory",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("2026-01-02 03:04:05,678 INFO search: epoch 3 of 5, loss 1.2", ""),
        ("submitit WARNING (2026-01-02 03:04:05,678) - Bypassing signal SIGTERM", ""),
    ],
)
def test_failure_reason_ignores_log_lines_without_a_reason(tmp_path, last, reason):
    entry = Store(tmp_path).entry("search", {})
    entry.folder.mkdir()
    (entry.folder / "log.txt").write_text(f"2026-01-02 03:04:05, job 7\n{last}\n")
    assert failure_reason(entry) == reason


@pytest.mark.parametrize(
    ("left", "reason"), [({}, "unknown"), ({"type": "MemoryError", "message": " "}, "MemoryError")]
)
def test_failure_reason_without_a_message_is_the_type_of_the_error(tmp_path, left, reason):
    entry = Store(tmp_path).entry("search", {})
    entry.folder.mkdir()
    (entry.folder / "failed.json").write_text(json.dumps(left))
    assert failure_reason(entry) == reason


def test_a_training_without_the_result_of_its_search_is_refused(finished_sweep, tmp_path):
    """The worker checks the search again."""
    root = finished_sweep[0] / "runs"
    (manifest,) = load_manifests(root)
    name = next(name for name, run in manifest.own.items() if run["kind"] == "train")
    spec = json.loads((root / "stages" / name / "spec.json").read_text())
    folder = tmp_path / "stages" / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "my_network.py").write_text(NETWORK)
    needed = manifest.own[name]["needs"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(InputError, match=rf"that needs {needed}, but that is not done"):
            run_spec(folder / "spec.json")


@pytest.mark.parametrize("kind", ["search", "train"])
def test_an_edited_spec_is_refused(finished_sweep, folder, kind):
    """It describes another run, so the run of its folder would never be done."""
    shutil.copytree(finished_sweep[0] / "runs", folder / "runs")
    name = read_entries(folder, kind)[0].folder.name
    path = folder / "runs" / "stages" / name / "spec.json"
    spec = json.loads(path.read_text())
    spec["config"]["recipe"]["search_epochs" if kind == "search" else "epochs"] = 1
    path.write_text(json.dumps(spec))
    line = one_line(widthopt("run", name, folder=folder), 2)
    assert re.fullmatch(
        rf"{name}/spec.json belongs to another run \({kind}-[0-9a-f]{{12}}\), "
        "but it must belong to its folder; start the same sweep again",
        line,
    )
    assert {entry.folder.name for entry in read_entries(folder)} == {
        entry.folder.name for entry in read_entries(finished_sweep[0])
    }


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "search"}'])
def test_a_file_that_is_not_a_spec_is_refused(tmp_path, text):
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not the spec of a run"):
        run_spec(path)
    with pytest.raises(InputError, match="is not the spec of a run"):
        run_spec(Path("nowhere"))
