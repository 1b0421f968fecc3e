"""Sweeps as a person starts them: shared, resumed, killed, reported; on small networks."""

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

README = Path(__file__).parents[1] / "docs" / "extending.md"

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
    """The code of a file that the README shows."""
    code = README.read_text().partition(f"`{name}`")[2].partition("```")[2].partition("\n")[2]
    return textwrap.dedent(code.partition("```")[0])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_network.py").write_text(NETWORK)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed sweep: its folder, and what the command said."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder, FIGURES)
    (folder / "search_seconds.py").write_text(recipe("search_seconds.py"))
    done = widthopt(
        "--config-dir", "conf", *SWEEP, "experiment=mine", "hydra/launcher=local", folder=folder
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def entries(folder, kind=None):
    return list(Store(folder / "runs" / "stages").entries(kind))


def records(folder):
    """All records, without their times."""
    found = {}
    for stage in entries(folder, "train"):
        result = stage.result()
        if result is not None:
            record = record_of(result, method="transfer", algorithm="any")
            item = dataclasses.replace(record.found, search_seconds=0.0)
            found[stage.key] = dataclasses.replace(record, found=item, train_seconds=0.0)
    return found


def logged_epochs(folder, kind):
    """How often each epoch was trained, by stage."""
    return {
        stage.key: re.findall(r"epoch (\d+) of", (stage.folder / "log.txt").read_text())
        for stage in entries(folder, kind)
    }


# ----------------------------------------------------------------------------- whole sweeps


def test_a_sweep_does_every_run_once(whole):
    folder, done = whole
    assert len(entries(folder, "search")) == len(entries(folder, "train")) == 6
    assert len(records(folder)) == 6
    for kind, epochs in (("search", ["1", "2"]), ("train", ["1", "2"])):
        assert set(map(tuple, logged_epochs(folder, kind).values())) == {tuple(epochs)}
    assert "for 6 points" not in done.stdout  # so few runs are listed one by one
    assert done.stdout.count("search, seed 0") == 3
    assert "12 of 12 done" in done.stderr


def test_the_same_again_starts_nothing(whole):
    folder, _ = whole
    before = records(folder)
    done = widthopt(
        "--config-dir", "conf", *SWEEP, "experiment=mine", "hydra/launcher=local", folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert "done:" not in done.stderr
    assert records(folder) == before
    assert set(map(tuple, logged_epochs(folder, "train").values())) == {("1", "2")}


def test_a_sweep_ends_with_its_figures_and_a_page(whole):
    folder, done = whole
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


def test_a_third_party_adds_a_figure_by_one_file_and_one_experiment(whole):
    """The README's recipe: the code is the one that stands there."""
    place, _, _ = FIGURES.partition("\n")[2].partition("  - _target_: w")
    assert f"```yaml\n{place}```" in README.read_text()
    folder, _ = whole
    report = folder / "runs" / "report"
    assert (report / "search_seconds.png").stat().st_size > 0
    head, *rows = (report / "search_seconds.csv").read_text().splitlines()
    assert head == "search s,top-1 %"
    found = [stage.result() for stage in entries(folder, "train")]
    shown = sorted(row.partition(",")[2] for row in rows)
    assert shown == sorted(f"{item['top1']:.1f}" for item in found)


def test_a_third_party_adds_a_projection_by_one_file_and_one_conf_file(folder):
    """The README's recipe: the code is the one that stands there."""
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


def test_the_same_records_give_the_same_files(whole):
    folder, _ = whole
    report = folder / "runs" / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir() if path.is_file()}
    done = widthopt("report", folder=folder)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in report.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_a_figure_is_drawn_alone_by_its_name(whole):
    folder, _ = whole
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
    # A figure's whole name is the figure, though the sweep's name begins so.
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


def test_the_status_is_that_of_the_files(whole):
    folder, _ = whole
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
def test_what_a_sweep_varies_names_its_rows_and_is_never_averaged_over(folder):
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
            found = [line.split("|") for line in lines if re.match(r"-\||morphnet.*\|", line)]
            assert sorted((item[0], item[1]) for item in found[:3]) == [
                ("-", "uniform"), ("morphnet strength 4", "transfer"),
                ("morphnet strength 5", "transfer"),
            ]  # fmt: skip
            assert all("±" in item[-2] for item in found[:3])
            assert [item[-1] for item in found[3:]] == ["2 of 2"] * 2
    folders = sorted(path.parent.name for path in folder.glob("runs/report/*/accuracy.png"))
    assert [name[-9:] for name in folders] == ["-epochs-1", "-epochs-2"]


def test_runs_of_a_sweep_have_folders_like_any_run(whole):
    folder, _ = whole
    found = [path.parent for path in (folder / "runs").glob("*/record.json")]
    assert len(found) == 3  # one for each width, with both seeds
    for run in found:
        assert len(list((run / "channels").iterdir())) == 2
        assert len(json.loads((run / "record.json").read_text())["records"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inprocess", "local"])
def test_a_failing_run_stops_nothing_else_and_the_exit_code_says_so(folder, launcher):
    words = (
        *SWEEP[:-4], "projection.width=0.5", "seeds=[0]", "methods=[transfer],[uniform]",
        "recipe.search_epochs=1,2", "recipe.learning_rate=0.1,1e9", f"hydra/launcher={launcher}",
    )  # fmt: skip
    words = tuple(word for word in words if word != "projection.width=0.5,0.75,1")
    done = widthopt(*words, folder=folder)
    assert done.returncode == 1
    # Of rate 1e9: two searches fail and block their trainings, and the baseline's.
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
        by_hand = widthopt("run", failed, folder=folder)
        assert by_hand.returncode == 1
        assert "lower recipe.learning_rate" in by_hand.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------- interruptions


def start(folder, *words):
    return subprocess.Popen(  # noqa: S603 (our own words)
        command(*words), cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def results(folder):
    return len(list((folder / "runs" / "stages").glob("*/result.json")))


@pytest.mark.slow
@pytest.mark.parametrize("done_before", [1, 7])
def test_a_sweep_that_is_killed_goes_on_to_the_very_same_records(whole, folder, done_before):
    words = (*SWEEP, "hydra/launcher=local")
    process = start(folder, *words)
    wait_for(lambda: results(folder) >= done_before)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for path in (folder / "runs" / "stages").glob("*/claim.json"):  # and those who still work
        try:
            os.kill(json.loads(path.read_text())["process"], signal.SIGKILL)
        except (OSError, ValueError):
            continue
    assert results(folder) < 12
    done = widthopt(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert records(folder) == records(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inprocess", "local"])
def test_ctrl_c_ends_a_sweep_that_goes_on_to_the_very_same_records(whole, folder, launcher):
    words = (*SWEEP, f"hydra/launcher={launcher}")
    process = start(folder, *words)
    wait_for(lambda: results(folder) >= 2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues from" in message
    assert not list((folder / "runs" / "stages").glob("*/failed.json"))
    assert not list((folder / "runs" / "stages").glob("*/claim.json"))
    done = widthopt(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert records(folder) == records(whole[0])


@pytest.mark.slow
def test_two_sweeps_at_once_do_nothing_twice(whole, folder):
    words = (*SWEEP, "hydra/launcher=local")
    both = [start(folder, *words) for _ in range(2)]
    for process in both:
        _, message = process.communicate(timeout=200)
        assert process.returncode == 0, message
    assert records(folder) == records(whole[0])
    for kind in ("search", "train"):
        assert set(map(tuple, logged_epochs(folder, kind).values())) == {("1", "2")}


# --------------------------------------------------------------------------------- mistakes


def test_a_sweep_of_many_gpu_hours_wants_to_be_meant(folder):
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
def test_a_mistake_in_a_sweep_is_one_line_and_starts_nothing(folder, words, message):
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
def test_a_record_that_was_edited_by_hand_is_refused(whole, folder):
    (folder / "runs").symlink_to(whole[0] / "runs")
    path = next((folder / "runs" / "stages").glob("train-*/result.json"))
    before = path.read_text()
    try:
        path.write_text(re.sub(r'"top1": [\d.]+', '"top1": 99.9', before))
        for words in (["report"], ["status"], list(SWEEP)):
            line = one_line(widthopt(*words, folder=folder), 2)
            assert "was changed after it was written; restore it, or delete it" in line
    finally:
        path.write_text(before)


def test_a_run_that_cannot_even_begin_says_why(folder):
    """Its network is gone by then: no process of its own gets as far as a claim."""
    process = start(folder, *SWEEP, "hydra/launcher=local")
    wait_for((folder / "runs" / "sweeps").exists)
    (folder / "my_network.py").rename(folder / "another.py")
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "FAILED (network.factory is my_network.MyNetwork, but my_network cannot be" in message


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A sweep of one point that was started in the folder ``there``, with relative paths."""
    there = tmp_path_factory.mktemp("by_hand") / "there"
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
    """The names of the runs below a root, searches first, whose results are removed."""
    found = list(Store(root / "stages").entries())
    for stage in found:
        (stage.folder / "result.json").unlink(missing_ok=True)
    return [stage.folder.name for stage in found]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run", "search", "train"), ("retry", "sweep")])
@pytest.mark.parametrize("moved", [False, True])
def test_runs_are_done_again_where_they_lie_from_any_folder(by_hand, tmp_path, words, moved):
    """Other paths mean what they meant where the sweep was given; the root may have moved."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = by_hand / "runs"
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
def test_what_is_not_there_is_said_with_what_to_type(by_hand, tmp_path, words, message):
    root = Path(shutil.copytree(by_hand / "runs", tmp_path / "of mine"))
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
def unanswered(by_hand, tmp_path):
    """Two runs with jobs, of which one began, and no controller; asked by a command."""
    root = Path(shutil.copytree(by_hand / "runs", tmp_path / "runs"))
    (root / "jobs").mkdir()
    for number, name in enumerate(remove_results(root)):
        (root / "stages" / name / "submission.json").write_text(f'{{"job": "7_{number}"}}')
    (root / "stages" / name / "claim.json").write_text('{"job": "7_1"}')
    for name in ("sbatch", "squeue", "scontrol", "sacct", "scancel"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"#!/bin/sh\necho {name} >> {tmp_path}/asked\necho no controller >&2; exit 1"
        )
        path.chmod(0o755)

    def request(*words):
        return subprocess.run(  # noqa: S603
            command(*words), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
            env={**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )  # fmt: skip

    return request, tmp_path / "asked"


def test_a_queue_that_does_not_answer_is_asked_once_and_ends_no_run(unanswered):
    request, questions = unanswered
    done = request("status", "--json")
    assert done.returncode == 0, done.stderr
    assert questions.read_text().split() == ["squeue"]
    assert "no controller" in done.stderr
    (table,) = json.loads(done.stdout)
    assert [(row["state"], row["queue"]) for row in table["runs"]] == [
        ("queued", "from its files; the queue does not answer"),
        ("running", "from its files; the queue does not answer"),
    ]


def test_where_the_queue_does_not_answer_nothing_is_cancelled_and_that_is_said(unanswered):
    request, _ = unanswered
    line = one_line(request("cancel", "sweep"), 2)
    assert line.startswith("squeue is refused by SLURM (no controller), but it must succeed;")


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("widthopt: this job was put back 3 times", "this job was put back 3 times"),
        (
            "torch.OutOfMemoryError: CUDA out of memory",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("2026-01-02 03:04:05,678 INFO search: epoch 3 of 5, loss 1.2", ""),
        ("submitit WARNING (2026-01-02 03:04:05,678) - Bypassing signal SIGTERM", ""),
    ],
)
def test_only_a_reason_is_told_as_one(tmp_path, last, reason):
    stage = Store(tmp_path).entry("search", {})
    stage.folder.mkdir()
    (stage.folder / "log.txt").write_text(f"2026-01-02 03:04:05, job 7\n{last}\n")
    assert failure_reason(stage) == reason


@pytest.mark.parametrize(
    ("left", "reason"), [({}, "unknown"), ({"type": "MemoryError", "message": " "}, "MemoryError")]
)
def test_a_failure_that_says_little_is_told_nevertheless(tmp_path, left, reason):
    stage = Store(tmp_path).entry("search", {})
    stage.folder.mkdir()
    (stage.folder / "failed.json").write_text(json.dumps(left))
    assert failure_reason(stage) == reason


def test_a_training_whose_search_is_gone_is_refused(whole, tmp_path):
    """The worker looks again."""
    root = whole[0] / "runs"
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
def test_a_frozen_run_that_was_edited_is_refused(whole, folder, kind):
    """It would be another run, and this one never done."""
    shutil.copytree(whole[0] / "runs", folder / "runs")
    name = entries(folder, kind)[0].folder.name
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
    assert {entry.folder.name for entry in entries(folder)} == {
        entry.folder.name for entry in entries(whole[0])
    }


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "search"}'])
def test_what_is_no_frozen_run_is_refused(tmp_path, text):
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not the spec of a run"):
        run_spec(path)
    with pytest.raises(InputError, match="is not the spec of a run"):
        run_spec(Path("nowhere"))
