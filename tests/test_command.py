"""The command line: exit codes, output, and the files that it writes."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ENVIRONMENT, NETWORK, TINY, command, one_line, widthopt
from PIL import Image

from widthopt.config.compose import compose
from widthopt.records import from_json
from widthopt.reporting.console import show_macs


@pytest.fixture
def folder(tmp_path):
    """A folder of a user, with a network and no files of the project."""
    (tmp_path / "my_network.py").write_text(NETWORK)
    return tmp_path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """An uninterrupted run: its working folder and the completed process."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "my_network.py").write_text(NETWORK)
    done = widthopt(*TINY, "methods=[uniform,direct,transfer]", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def run_folder(folder):
    """Return the folder of the only run."""
    (run,) = (path for path in (folder / "runs").iterdir() if path.name != "stages")
    return run


def results(folder):
    """Return the records of a run without times, with digests of the weights."""
    run = run_folder(folder)
    records = from_json((run / "record.json").read_text())
    return {
        record.found.method: (
            record.top1,
            record.train_loss,
            record.found.channels,
            record.found.diagnostics,
            record.stages,
            weights(run / f"train-{record.found.method}-seed0"),
        )
        for record in records
    }


def weights(stage):
    """Return the digest of the last checkpoint of a stage."""
    newest = max(stage.glob("checkpoints/step-*"))
    return hashlib.sha256((newest / "tensors.safetensors").read_bytes()).hexdigest()


def file_names(folder):
    return sorted(path.name for path in folder.rglob("*") if "__pycache__" not in path.parts)


# Input errors.


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("recipe.epoch=3",),
            "recipe.epoch is not a key, but only known keys are read; did you mean recipe.epochs?",
        ),
        (
            ("projection=0.5",),
            "projection is 0.5, but a group takes the name of a choice; see widthopt --help",
        ),
        (
            ("hydra/launcher=slurm",),
            (
                "hydra/launcher is slurm, but only a sweep has a launcher, and this is a single "
                "run; add -m"
            ),
        ),
        (
            ("root=file/runs", "recipe=smoke"),
            (
                "root is file/runs, but it cannot be written (Not a directory); name a folder "
                "you may "
                "write to"
            ),
        ),
    ],
)
def test_an_input_error_is_one_line_and_writes_nothing(tmp_path, words, line):
    (tmp_path / "file").touch()
    assert one_line(widthopt(*words, folder=tmp_path), 2) == line
    assert file_names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("plan", "--nodes"),
            "widthopt plan: argument --nodes: expected one argument; see widthopt plan --help",
        ),
        (
            ("status", "-v"),
            "widthopt status: unrecognized arguments: -v; see widthopt status --help",
        ),
        *(
            (
                (name, "--root", "none"),
                ("--root is none, but there is no such folder; name the folder of your runs"),
            )
            for name in ("report", "status", "sync")
        ),
        (
            ("recipe=smoke", "--config-dir", "none"),
            (
                "--config-dir is FOLDER/none, but there is no such folder; name a folder with "
                "choices of your own"
            ),
        ),
    ],
)
def test_an_error_in_the_options_of_a_command_is_one_line(tmp_path, words, line):
    message = one_line(widthopt(*words, folder=tmp_path), 2)
    assert message.replace(str(tmp_path.resolve()), "FOLDER") == line
    assert file_names(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [
        ("projection=half", "--config-dir", "own", "recipe.epoch=3"),
        ("projection=half", "-m", "--config-dir=own", "seeds=[0],[1]", "--yes", "recipe.epoch=3"),
        ("-m", "projection=half", "--config-dir", "own", "~seeds", "recipe.epoch=3"),
    ],
)
def test_options_may_stand_between_overrides(tmp_path, words):
    (tmp_path / "own" / "projection").mkdir(parents=True)
    (tmp_path / "own" / "projection" / "half.yaml").write_text("defaults:\n  - width\n")
    assert one_line(widthopt(*words, folder=tmp_path), 2) == (
        "recipe.epoch is not a key, but only known keys are read; did you mean recipe.epochs?"
    )


def test_a_diverged_training_stops_with_its_step_and_learning_rate(folder):
    line = one_line(
        widthopt(*TINY, "recipe.learning_rate=1e9", "methods=[uniform]", folder=folder), 1
    )
    assert " at step " in line
    assert "with a learning rate of " in line
    assert line.endswith("lower recipe.learning_rate")
    assert "no checkpoint was written before" in line or "is kept in" in line
    assert not list(folder.rglob("result.json"))


def test_commands_without_sweeps_say_so(tmp_path):
    (tmp_path / "runs").mkdir()
    done = widthopt("status", folder=tmp_path)
    assert (done.returncode, done.stdout) == (
        0, "no sweeps in runs; widthopt report shows single runs\n"
    )  # fmt: skip
    assert widthopt("status", "--json", folder=tmp_path).stdout == "[]\n"
    assert one_line(widthopt("show", "search-abc", folder=tmp_path), 2) == (
        "KEY is search-abc, but runs contains no sweep, and only runs of sweeps have keys; start a "
        "sweep with -m, or show single runs with widthopt report"
    )


# Help.


HEAVY = ("torch", "torchvision", "numpy", "matplotlib", "sklearn", "wandb")


def output_and_imports(folder, *words):
    """Return the output of a command, and the expensive modules that it imports."""
    script = (
        f"import sys\nsys.argv = ['widthopt', *{words!r}]\n"
        "from widthopt.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))\n"
    )
    done = subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-c", script],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    message, _, loaded = done.stdout.rpartition("loaded:")
    return message, loaded.split()


def test_help_lists_commands_and_choices_without_importing_torch(tmp_path):
    message, loaded = output_and_imports(tmp_path, "--help")
    assert loaded == []
    for word in ("widthopt plan", "widthopt macs", "network: ", "resnet18", "seeds:", "morphnet"):
        assert word in message
    assert file_names(tmp_path) == []


def test_a_custom_network_is_planned_without_importing_torchvision(tmp_path):
    (tmp_path / "my_network.py").write_text(NETWORK)
    _, loaded = output_and_imports(tmp_path, "plan", *TINY)
    assert "torch" in loaded
    assert not {"torchvision", "wandb"} & set(loaded)


# MACs and parameters.


def test_macs_are_the_published_ones_without_any_data(tmp_path):
    done = widthopt("macs", "dataset=imagenet", "--json", folder=tmp_path)
    content = json.loads(done.stdout)
    # Published: 1.81 GMACs and 11,689,512 parameters (torchvision).
    assert (content["macs"], content["parameters"]) == (1_814_073_344, 11_689_512)
    assert (content["network"], content["resolution"]) == ("resnet18", 224)
    assert len(content["channels"]) == 12
    assert file_names(tmp_path) == []


def test_macs_follow_the_width_multiplier(capsys):
    request = compose(["dataset=imagenet", "network=mobilenet_v2", "target.width=0.5"])
    show_macs(request, channels=None, as_json=True)
    content = json.loads(capsys.readouterr().out)
    # All width variables are halved, including the last of 1280, and not rounded to 8.
    assert content["macs"] == 83_402_176
    assert len(content["channels"]) == 25


def test_macs_of_channels_from_a_file_are_those_of_the_run(ran):
    folder, _ = ran
    path = run_folder(folder) / "channels" / "transfer-seed0.json"
    done = widthopt("macs", *TINY, "--channels", str(path), "--json", folder=folder)
    content, written = json.loads(done.stdout), json.loads(path.read_text())
    for key in ("channels", "macs", "parameters"):
        assert content[key] == written[key]


def test_the_table_of_macs_has_a_row_for_each_width_variable(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(folder)
    show_macs(compose([*TINY, "+network.arguments.width=8"]), channels=None, as_json=False)
    shown = capsys.readouterr().out
    # Computed by hand: 36 positions, then 9; the branches read 8 channels and write 20 and 12.
    macs = 36 * (27 * 8 + 8 * 24 + 9 * 24 * 8) + 9 * (9 * 8 * 20 + 8 * 12) + 32 * 10
    assert f"my_network.MyNetwork, width 1, depth 1, 12 pixels: {macs:,} MACs" in shown
    for name in ("stem.0", "residual.0.0", "wide.0", "narrow.0"):
        assert f"│ {name} " in shown


# Plans.


def test_a_plan_starts_nothing_and_writes_nothing(folder):
    done = widthopt("plan", *TINY, "--json", folder=folder)
    assert done.returncode == 0
    planned = json.loads(done.stdout)
    name = "my_network.MyNetwork on digits"
    assert [run["what"] for run in planned["runs"]] == [
        f"{name}, (0.5, 1, 12, 100%): morphnet search, seed 0",
        f"{name}, (1, 1, 12, 100%): training, baseline, seed 0",
        f"{name}, (1, 1, 12, 100%): training, morphnet at (0.5, 1, 12, 100%), seed 0",
    ]
    assert [run["state"] for run in planned["runs"]] == ["missing"] * 3
    assert planned["macs_left"] == sum(run["macs"] for run in planned["runs"])
    assert file_names(folder) == ["my_network.py"]


# Runs.


def test_a_run_shows_a_table_of_its_methods(ran):
    folder, done = ran
    for record in from_json((run_folder(folder) / "record.json").read_text()):
        rows = [line.strip("│ ").split() for line in done.stdout.splitlines()]
        assert any(row[:1] == [record.found.method] and f"{record.top1:.1f}" in row for row in rows)
    assert "Plan" in [line.strip() for line in done.stdout.splitlines()]
    assert done.stdout.splitlines()[-1].endswith("channels")
    assert (run_folder(folder) / "table.txt").read_text("utf-8") in done.stdout


def test_a_run_writes_all_its_files(ran):
    folder, _ = ran
    run = run_folder(folder)
    methods = ("uniform", "direct", "transfer")
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [
            "channels", "config.yaml", "figures", "graph.json", "record.json", "run.log",
            "table.txt", "search-direct-seed0", "search-transfer-seed0",
            *(f"train-{method}-seed0" for method in methods),
        ]
    )  # fmt: skip
    assert {path.name for path in (run / "channels").iterdir()} == {
        f"{method}-seed0.json" for method in methods
    }
    for name in ("channels", "accuracy"):
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    for link in (path for path in run.iterdir() if path.is_symlink()):
        assert link.resolve().parent == folder / "runs" / "stages"
        assert (link / "checkpoints").is_dir()
    for word in ("strength: 5.0", "factory: my_network.MyNetwork", "resolution: 12"):
        assert word in (run / "config.yaml").read_text()
    assert "epoch 2 of 2" in (run / "run.log").read_text()
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "my_network.py", "runs"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_same_command_again_repeats_no_work(ran):
    folder, _ = ran
    run = run_folder(folder)
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("tensors.safetensors")}
    done = widthopt(*TINY, "methods=[uniform,direct,transfer]", folder=folder)
    assert done.returncode == 0
    assert "epoch" not in done.stderr
    assert "│ to do " not in done.stdout
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == before
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("tensors.safetensors")} == times


@pytest.mark.parametrize("when", ["train", pytest.param("search", marks=pytest.mark.slow)])
def test_a_run_resumed_after_ctrl_c_has_the_same_results(ran, folder, when):
    words = (*TINY, "methods=[uniform,direct,transfer]")
    started = subprocess.Popen(  # noqa: S603 (our own words)
        command(*words),
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Wait for the first checkpoint of such a stage; its second epoch is in progress then.
    while not list(folder.glob(f"runs/stages/{when}-*/checkpoints/step-*")):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.005)
    started.send_signal(signal.SIGINT)
    _, message = started.communicate(timeout=60)
    assert started.returncode == 130, message
    (line,) = (line for line in message.splitlines() if line.startswith("widthopt: "))
    assert line == message.splitlines()[-1]
    assert "the same command resumes from" in line
    # Before a search, the training of the baseline is done and has its record.
    assert (run_folder(folder) / "record.json").exists() == (when == "search")

    again = widthopt(*words, folder=folder)
    assert again.returncode == 0, again.stderr
    assert results(folder) == results(ran[0])


@pytest.mark.slow
def test_a_sweep_runs_all_its_values(folder):
    words = [item for item in TINY if not item.startswith("algorithm")]
    done = widthopt(
        "-m", *words, "algorithm=uniform", "methods=[uniform]", "recipe.epochs=1",
        "seeds=[0],[1]", "root=kept", folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "kept").glob("*/record.json")
    assert [record.found.seed for record in from_json(path.read_text())] == [0, 1]
    assert len(list((folder / "kept" / "stages").glob("train-*"))) == 2
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "kept", "my_network.py"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_custom_network_and_custom_images_need_no_change_of_the_project(folder):
    existing = Path(__file__).parents[1] / "runs"  # of the demo, if it was run here
    before = sorted(existing.glob("*"))
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for label, name in enumerate(("dark", "light", "noisy")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 50, (20, 24, 3)) * (3 if label == 2 else 1)
                image = Image.fromarray((pixels + 150 * (label == 1)).astype(np.uint8))
                image.save(folder / "photos" / split / name / f"{number}.png")
    done = widthopt(
        *TINY, "dataset=image_folder", "dataset.root=photos", "recipe.batch_size=16",
        "network.name=mine", "recipe.epochs=4", folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = run_folder(folder)
    assert run.name.startswith("mine-image_folder-")
    records = from_json((run / "record.json").read_text())
    assert [record.found.method for record in records] == ["uniform", "transfer"]
    for record in records:
        assert record.found.channels.keys() == {"stem.0", "residual.0.0", "wide.0", "narrow.0"}
        assert record.top1 > 100 / 3
    assert sorted(existing.glob("*")) == before


@pytest.mark.parametrize("package", [False, True])
def test_a_folder_conf_of_the_user_does_not_replace_ours(folder, package):
    (folder / "conf").mkdir()
    (folder / "conf" / "config.yaml").write_text("mine: true\n")
    if package:
        (folder / "conf" / "__init__.py").write_text("")
    words = ["network=custom", "network.factory=my_network.MyNetwork", "--cfg", "job"]
    done = widthopt(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "mine" not in done.stdout
    assert "my_network.MyNetwork" in done.stdout


def test_report_compares_runs(ran, folder):
    done = widthopt("report", str(run_folder(ran[0])), folder=folder)
    assert done.returncode == 0, done.stderr
    for word in ("uniform", "transfer", "seeds", "direct", "budget", "accuracy.png"):
        assert word in done.stdout
    assert list(folder.glob("runs/report/*/accuracy.png"))
    named = widthopt("report", run_folder(ran[0]).name, folder=ran[0])
    assert (named.returncode, named.stdout) == (0, done.stdout)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["report", "--root", "."], "--root is ., but no run in it has a record; run one first"),
        (
            ["report", "nowhere", "--root", "."],
            "no sweep or figure 'nowhere' in .; available: none",
        ),
        (
            ["report", "no/where"],
            (
                "RUN is no/where, but it contains no record (No such file or directory); give the "
                "folder of a finished run, for example runs/resnet18-digits-..."
            ),
        ),
    ],
)
def test_a_report_without_records_is_one_line(folder, words, line):
    done = widthopt(*words, folder=folder)
    assert (done.returncode, done.stderr) == (2, f"widthopt: {line}\n")
