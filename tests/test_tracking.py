"""Tracking without W&B; `test_wandb.py` has the tests with W&B's real client."""

import json
import resource
import sys
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from commands import NETWORK, TINY, one_line, widthopt
from small import RUNTIME, Small, SmallNetwork, Synthetic

from widthopt.algorithms import SearchContext
from widthopt.algorithms.sandwich import Sandwich
from widthopt.config.compose import compose
from widthopt.config.typed import build_request, to_plain
from widthopt.data import Split
from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint
from widthopt.runs.execute import run_request
from widthopt.runs.point import SizedRequest
from widthopt.setting import Setting
from widthopt.tracking import About, Tracker, open_tracker
from widthopt.tracking.files import End, TrackingFiles
from widthopt.tracking.secrets import HIDDEN, redact
from widthopt.tracking.send import sync, tracked_runs
from widthopt.training import loop as training
from widthopt.training.loop import Diverged, Interrupted, Loop, _MetricWriter, train


TRACKING = replace(compose(["tracking=disabled"]).tracking, log_every_steps=3)
RECIPE = replace(compose(["recipe=smoke"]).recipe, batch_size=16, search_epochs=4, epochs=4)
AXES = {"width": 0.312, "depth": 1, "resolution": 8, "fraction": 1.0}
ABOUT = About(
    id="train-0",
    kind="train",
    network="small",
    dataset="noise",
    algorithm="dmcp",
    method="transfer",
    seed=2,
    source=AXES,
    target={**AXES, "width": 1.732},
    figures=("fig3_width",),
    tags=("mine",),
    fields={},
)
NOT_REPEATED = ("time", "perf/images_per_second")


def rows(folder):
    """Return the complete rows of a run."""
    return [row for row, _ in TrackingFiles(folder).rows()]


def rows_without_clock(folder):
    """Return the rows of a run, without values that depend on the clock."""
    return [
        {name: value for name, value in row.items() if name not in NOT_REPEATED}
        for row in rows(folder)
    ]


def run_training(folder, data, log):
    torch.manual_seed(0)
    model = Small(4)
    train(
        model, data, recipe=RECIPE, epochs=4, seed=0, runtime=RUNTIME, folder=folder, log=log
    )  # fmt: skip
    return model


def search(name, folder, log, interrupt=None):
    """Return the result of a search of a small network."""
    algorithm = compose([f"algorithm={name}"]).algorithm
    if name == "dmcp":
        algorithm = replace(algorithm, grid="even")
    setting = Setting(SmallNetwork(), 4, 1.0, 1, 8, 1.0)
    return algorithm.search(
        setting,
        Split(Synthetic(interrupt=interrupt), Synthetic(), 4),
        budget_macs=Blueprint(setting).graph.macs(),
        context=SearchContext(RECIPE, RUNTIME, 0, folder, log),
    )


def run_search(name, folder, interrupt=None, tracking=TRACKING):
    """Return the result of a tracked search, whose rows are in the folder."""
    about = replace(ABOUT, kind="search")
    with open_tracker(tracking, about, folder, interruptions=(Interrupted,)) as log:
        return search(name, folder, log, interrupt)


# Rows.


def test_a_training_writes_rows_at_epoch_ends_and_between_them(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    run_training(tmp_path, Synthetic(), log)
    result = rows(tmp_path)
    # Four epochs of four steps, and every third step.
    assert [row["step"] for row in result] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert ["train/top1" in row for row in result] == [row["step"] % 4 == 0 for row in result]
    assert [row["epoch"] for row in result] == [row["step"] / 4 for row in result]
    assert all(row["perf/images_per_second"] > 0 for row in result)


def test_images_per_second_are_those_since_the_previous_row(tmp_path, monkeypatch):
    """A batch of 16 images takes two seconds, and in the last epoch one second."""
    clock = [0.0]

    class Slow(Synthetic):
        def epoch(self, epoch, first_step=0, rank=0, ranks=1):
            for batch in super().epoch(epoch, first_step, rank, ranks):
                clock[0] += 1.0 if epoch == 3 else 2.0
                yield batch

    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    run_training(tmp_path, Slow(), Tracker(TRACKING, ABOUT, tmp_path))
    rates = [row["perf/images_per_second"] for row in rows(tmp_path)]
    assert rates == [8.0] * 6 + [16.0] * 2


def test_loss_and_gradient_norm_of_a_row_are_those_of_its_step(tmp_path):
    """The first step has learning rate 0, so its gradient is that of the initial network."""
    log = Tracker(replace(TRACKING, log_every_steps=1), ABOUT, tmp_path)
    run_training(tmp_path, Synthetic(), log)
    first = rows(tmp_path)[0]
    torch.manual_seed(0)
    model = Small(4).train()
    images, labels = next(iter(Synthetic().epoch(0)))
    loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    loss.backward()
    length = sum(float(entry.grad.double().square().sum()) for entry in model.parameters()) ** 0.5
    assert first["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["train/gradient_norm"] == pytest.approx(length, rel=1e-4)
    assert first["train/learning_rate"] == 0


def test_tracking_does_not_change_a_bit_of_a_training(tmp_path):
    plain = run_training(tmp_path / "plain", Synthetic(), None)
    logged = run_training(tmp_path / "logged", Synthetic(), Tracker(TRACKING, ABOUT, tmp_path))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, logged.state_dict()[name]), name


def test_accuracies_of_an_epoch_are_those_of_its_training_images(tmp_path, monkeypatch):
    """At this learning rate the network does not change, so they can be computed afterwards."""
    monkeypatch.setitem(globals(), "RECIPE", replace(RECIPE, learning_rate=1e-30))
    torch.manual_seed(2)
    model = Small(10)
    log = Tracker(TRACKING, ABOUT, tmp_path)
    train(
        model, Synthetic(), recipe=RECIPE, epochs=4, seed=0, runtime=RUNTIME, folder=tmp_path,
        log=log,
    )  # fmt: skip
    last, ranks = rows(tmp_path)[-1], []
    for images, labels in Synthetic().epoch(3):
        for scores, label in zip(model(images).tolist(), labels.tolist(), strict=True):
            ranks.append(sum(score > scores[label] for score in scores))
    assert last["train/top1"] == 100 * sum(rank < 1 for rank in ranks) / 64
    assert last["train/top5"] == 100 * sum(rank < 5 for rank in ranks) / 64
    assert 0 < last["train/top1"] < last["train/top5"] < 100


def test_gpu_memory_is_the_peak_since_the_training_began(tmp_path, monkeypatch):
    """This test simulates CUDA; `test_gpu.py` uses a GPU."""
    logged_rows = []
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda _: logged_rows.append("begin")
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**29)
    loop = Loop(
        Small(4), recipe=RECIPE, steps_per_epoch=4, epochs=4, seed=0, runtime=RUNTIME
    )  # fmt: skip
    loop.device = torch.device("cuda")
    _MetricWriter(loop, Synthetic(), Tracker(TRACKING, ABOUT, tmp_path)).epoch()
    assert logged_rows == ["begin"]
    (row,) = rows(tmp_path)
    assert row["perf/gpu_memory_gib"] == 1.5


@pytest.mark.parametrize("name", ["morphnet", "dmcp", "autoslim"])
def test_tracking_does_not_change_the_widths_of_a_search(name, tmp_path):
    result = run_search(name, tmp_path / "tracked")
    plain = search(name, tmp_path / "plain", None)
    assert plain.multipliers == result.multipliers
    assert plain.overhead_macs == result.overhead_macs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("morphnet", {"search/penalty", "search/dead_classes", "channels/wide", "scales/wide"}),
        ("autoslim", {"search/loss_narrowest", "search/loss_random_1", "search/loss_random_2"}),
        (
            "dmcp",
            {
                "search/budget_share", "search/architecture_loss", "search/steps_within",
                "search/loss_random_2", "channels/wide",
            },
        ),
    ],
)  # fmt: skip
def test_a_search_logs_its_diagnostics(name, expected, tmp_path):
    run_search(name, tmp_path)
    names = {key for row in rows_without_clock(tmp_path) for key in row}
    assert expected <= names


def test_the_loss_of_the_narrowest_subnet_is_the_mean_over_the_step(tmp_path, monkeypatch):
    """The step has two micro-batches; the logged loss is the mean of theirs."""
    seen = []

    class Watching(Sandwich):
        def backpropagate(self, loss, *, share):
            seen.append(loss.item())
            super().backpropagate(loss, share=share)

    monkeypatch.setattr("widthopt.algorithms.autoslim.Sandwich", Watching)
    monkeypatch.setitem(globals(), "RECIPE", replace(RECIPE, accumulation=2))
    run_search("autoslim", tmp_path, tracking=replace(TRACKING, log_every_steps=1))
    # Each micro-batch has the losses of the widest, the narrowest and two random subnets.
    narrowest = [(entry + second) / 2 for entry, second in zip(seen[1::8], seen[5::8], strict=True)]
    logged = [
        row["search/loss_narrowest"] for row in rows_without_clock(tmp_path) if row["step"] <= 16
    ]
    assert logged == pytest.approx(narrowest, rel=1e-6)


# Interruptions.


@pytest.mark.parametrize("step", [2, 4, 6, 15])
def test_an_interrupted_training_has_the_same_rows(step, tmp_path):
    run_training(
        tmp_path / "reference", Synthetic(), Tracker(TRACKING, ABOUT, tmp_path / "reference")
    )
    folder = tmp_path / "resumed"
    with pytest.raises(Interrupted):
        run_training(folder, Synthetic(interrupt=step), Tracker(TRACKING, ABOUT, folder))
    run_training(folder, Synthetic(), Tracker(TRACKING, ABOUT, folder))
    assert rows_without_clock(folder) == rows_without_clock(tmp_path / "reference")


@pytest.mark.parametrize("name", ["morphnet", "dmcp", "autoslim"])
def test_an_interrupted_search_has_the_same_rows(name, tmp_path):
    run_search(name, tmp_path / "reference")
    with pytest.raises(Interrupted):
        run_search(name, tmp_path / "resumed", interrupt=10)
    run_search(name, tmp_path / "resumed")
    assert rows_without_clock(tmp_path / "resumed") == rows_without_clock(tmp_path / "reference")


def test_rows_after_the_last_checkpoint_of_a_killed_process_are_written_once(tmp_path):
    class Killed(Exception):  # noqa: N818
        pass

    class KillingTracker(Tracker):
        def row(self, step, values):
            super().row(step, values)
            if step == 15:  # the checkpoint is of step 12
                raise Killed

    run_training(
        tmp_path / "reference", Synthetic(), Tracker(TRACKING, ABOUT, tmp_path / "reference")
    )
    folder = tmp_path / "resumed"
    with pytest.raises(Killed):
        run_training(folder, Synthetic(), KillingTracker(TRACKING, ABOUT, folder))
    assert rows_without_clock(folder)[-1]["step"] == 15
    run_training(folder, Synthetic(), Tracker(TRACKING, ABOUT, folder))
    assert rows_without_clock(folder) == rows_without_clock(tmp_path / "reference")


def test_rows_are_flushed_before_their_checkpoint(tmp_path):
    """When a checkpoint is written, the file ends with the row of its step."""
    seen = []

    class Watching(Tracker):
        def keep(self):
            super().keep()
            last = rows(tmp_path)[-1]["step"]
            seen.append((last, (tmp_path / "checkpoints" / f"step-{last:08d}").exists()))

    run_training(tmp_path, Synthetic(), Watching(TRACKING, ABOUT, tmp_path))
    assert seen == [(4, False), (8, False), (12, False), (16, False)]


def test_a_run_that_fails_before_its_training_begins_keeps_its_rows(tmp_path):
    with pytest.raises(Interrupted):
        run_training(tmp_path, Synthetic(interrupt=10), Tracker(TRACKING, ABOUT, tmp_path))
    before = rows(tmp_path)
    with pytest.raises(InputError), open_tracker(TRACKING, ABOUT, tmp_path):
        raise InputError("the images are not there today")
    assert rows(tmp_path) == before != []


def test_a_result_is_stored_before_the_wait_for_w_and_b(tmp_path, monkeypatch):
    """The job may be preempted during the wait."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_results.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    seen, close = [], Tracker.close

    def watching(self):
        seen.append(
            sorted(entry.parent.name[:6] for entry in tmp_path.glob("*/stages/*/result.json"))
        )
        close(self)

    monkeypatch.setattr(Tracker, "close", watching)
    words = [entry for entry in TINY if not entry.startswith("network.factory")]
    words += ["network.factory=network_of_results.MyNetwork", "methods=[transfer]"]
    run_request(SizedRequest(compose(words)))
    assert seen == [["search"], ["search", "train-"]]


def test_a_search_whose_details_cannot_be_logged_keeps_its_result(tmp_path, monkeypatch, caplog):
    """A custom algorithm may have ``moves`` in another format than those of AutoSlim."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_moves.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    words = [entry for entry in TINY if not entry.startswith("network.factory")]
    composed = compose([*words, "network.factory=network_of_moves.MyNetwork", "methods=[transfer]"])

    class Custom(type(composed.algorithm)):
        def search(self, *args, **options):
            result = super().search(*args, **options)
            return replace(result, details={"moves": ["a knight's"]})

    values = {
        entry.name: getattr(composed.algorithm, entry.name) for entry in fields(composed.algorithm)
    }
    (record,) = run_request(SizedRequest(replace(composed, algorithm=Custom(**values))))
    assert record.top1 > 0
    assert [entry for entry in caplog.records if "cannot be written" in entry.message]


# The file.


def test_an_incomplete_line_is_not_a_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert rows(tmp_path) == [{"step": 1, "a": 1}]
    files = TrackingFiles(tmp_path)
    files.cut(7)
    files.append({"step": 2, "a": 3})
    assert rows(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 3}]


@contextmanager
def limit_file_size(size):
    """Limit the size of files in bytes, which simulates a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_warning_and_rows_are_written_later(tmp_path, caplog):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.resume(0)
    with limit_file_size(100):
        for step in range(1, 6):
            log.row(step, {"loss": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    log.row(6, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    warnings = [entry.message for entry in caplog.records if entry.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path / 'metrics.jsonl'} cannot be written (")


def test_rows_are_written_once_the_folder_can_be_created(tmp_path, caplog):
    folder = tmp_path / "stages" / "train-0"
    (tmp_path / "stages").write_text("no folder")
    log = Tracker(TRACKING, ABOUT, folder)
    log.resume(0)
    log.row(1, {"loss": 1.0})
    (tmp_path / "stages").unlink()
    log.row(2, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert [entry.levelname for entry in caplog.records].count("WARNING") == 1


def test_a_row_that_could_not_be_written_is_written_at_the_end(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.resume(0)
    with limit_file_size(10):
        log.row(1, {"loss": 1.0})
    assert rows(tmp_path) == []
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_numbers_of_any_type_are_written_and_other_values_are_one_warning(tmp_path, caplog):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.row(1, {"loss": torch.tensor(0.5), "top1": 3})
    log.row(2, {"loss": "much"})
    log.row(3, {"loss": 1.0})
    log.summary({"flags/cut": [object()]})
    log.close()
    result = [
        {name: entry for name, entry in row.items() if name != "time"} for row in rows(tmp_path)
    ]
    assert result == [
        {"step": 1, "train/loss": 0.5, "train/top1": 3}, {"step": 3, "train/loss": 1.0},
    ]  # fmt: skip
    assert [entry.levelname for entry in caplog.records].count("WARNING") == 1


def test_values_that_are_not_finite_are_left_out(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.row(1, {"loss": float("nan"), "top1": 3.0})
    log.close()
    (row,) = rows(tmp_path)
    assert row.keys() == {"step", "time", "train/top1"}


def test_widths_are_logged_as_a_file_as_rows_and_as_lists(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.row(7, {"loss": 1.0})
    log.widths({"conv1": 30, "conv2": 8}, {"conv1": 0.5, "conv2": 2.0}, alpha=1.5)
    log.close()
    assert json.loads((tmp_path / "widths.json").read_text()) == {
        "channels": {"conv1": 30, "conv2": 8},
        "multipliers": {"conv1": 0.5, "conv2": 2.0},
        "alpha": 1.5,
    }
    logged_rows = rows(tmp_path)[1:]
    names = ("step", "layer/index", "layers/small/channels", "layers/small/multiplier")
    assert [tuple(row[name] for name in names) for row in logged_rows] == [
        (8, 0, 30, 0.5),
        (9, 1, 8, 2.0),
    ]
    assert log.end.summary["widths/channels"] == [30, 8]


def test_widths_of_a_search_are_logged_separately_from_those_of_its_network(tmp_path):
    log = Tracker(TRACKING, replace(ABOUT, kind="search"), tmp_path)
    log.widths({"conv1": 30}, {"conv1": 0.5})
    log.close()
    (row,) = rows(tmp_path)
    assert row.keys() - {"step", "time"} == {
        "layer/index", "layers/search/channels", "layers/search/multiplier",
    }  # fmt: skip


# The end of a run.


@pytest.mark.parametrize(
    ("error", "code", "preempted", "why"),
    [
        (None, 0, False, ""),
        (Interrupted("later"), 1, True, ""),
        (KeyboardInterrupt(), 1, True, ""),
        (SystemExit(-1), 1, True, ""),
        (Diverged("the loss is nan"), 1, False, "Diverged: the loss is nan"),
    ],
)
def test_the_outcome_of_a_run_is_that_of_the_block(error, code, preempted, why, tmp_path):
    trackers = []

    def work():
        with open_tracker(TRACKING, ABOUT, tmp_path, interruptions=(Interrupted,)) as log:
            trackers.append(log)
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    end = trackers[0].end
    assert (end.code, end.preempted, end.why) == (code, preempted, why)


def test_the_outcome_of_a_tracked_run_that_resumes_untracked_is_written(tmp_path):
    """The next sync sends it. Runs that were never tracked get no tracking files."""
    files = TrackingFiles(tmp_path)
    files.begin({**ABOUT.init, "project": "p", "entity": None})
    files.write_end(End(code=1, preempted=True))
    with open_tracker(TRACKING, ABOUT, tmp_path) as log:
        log.row(1, {"loss": 2.0})
        log.summary({"test/top1": 50.0})
    assert (files.end.code, files.end.preempted) == (0, False)
    assert files.end.summary == {"test/top1": 50.0}
    assert not files.is_fully_synced
    with open_tracker(TRACKING, ABOUT, tmp_path / "another") as log:
        log.row(1, {"loss": 2.0})
    assert not (tmp_path / "another" / "tracking").exists()


# Names.


def test_name_and_tags_of_a_run_have_its_figures_network_algorithm_and_seed():
    init = ABOUT.init
    assert init["name"] == "train small noise dmcp w0.312>w1.732 d1 r8 f1 s2"
    assert init["group"] == "train/small/noise/dmcp/w0.312>w1.732-d1-r8-f1"
    assert init["tags"] == ["fig3_width", "small", "noise", "dmcp", "transfer", "seed2", "mine"]
    config = init["config"]
    assert (config["source_width"], config["target_width"]) == (0.312, 1.732)


def test_runs_that_differ_only_in_the_seed_share_a_group():
    group = ABOUT.init["group"]
    assert replace(ABOUT, seed=0).init["group"] == group
    assert replace(ABOUT, seed=0).init["name"] != ABOUT.init["name"]
    for about in (
        replace(ABOUT, algorithm="morphnet"),
        replace(ABOUT, network="large"),
        replace(ABOUT, source={**AXES, "width": 0.5}),
        replace(ABOUT, kind="search", target=None),
    ):
        assert about.init["group"] != group


def test_tags_are_cut_to_the_length_that_w_and_b_accepts():
    assert max(map(len, replace(ABOUT, network="n" * 99).init["tags"])) == 64


def test_the_id_of_a_run_is_the_name_of_its_folder_and_changes_with_the_salt():
    point = SizedRequest(compose(["target.resolution=32"]), images=False)
    entry = point.search_entry("transfer", 3)
    assert point.about("search", "transfer", 3, entry).id == entry.folder.name
    salted = SizedRequest(compose(["target.resolution=32", "tracking.salt=again"]), images=False)
    assert salted.search_entry("transfer", 3).folder.name == entry.folder.name
    second = salted.about("search", "transfer", 3, entry).id
    assert second.startswith(entry.folder.name)
    assert second != entry.folder.name


def test_tracking_is_not_part_of_the_identity_and_is_stored_with_a_run():
    entry = compose(["tracking=online", "tracking.tags=[a,b]", "tracking.log_every_steps=7"])
    second = compose(["tracking=disabled"])
    assert entry.fields == second.fields
    again = build_request(_config(to_plain(entry)))
    assert again.tracking == entry.tracking
    assert again.tracking.log_every_steps == 7


def _config(values):
    from omegaconf import OmegaConf  # noqa: PLC0415

    return OmegaConf.create(values)


def test_offline_is_the_default():
    assert compose([]).tracking.mode == "offline"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "tracking=onlin",
            (
                "tracking is onlin, but there is no such choice; use one of disabled, offline, "
                "online"
            ),
        ),
        (
            "tracking.mode=on",
            "tracking.mode is on, but it must be one of offline, online, disabled; correct it",
        ),
        (
            "tracking.log_every_steps=0",
            ("tracking.log_every_steps is 0, but it must be an integer of at least 1; correct it"),
        ),
        (
            "tracking.project=''",
            (
                "tracking.project is , but a project has 1 to 128 characters, and none of "
                "/\\#?%:; correct it"
            ),
        ),
        (
            "tracking.project=me/mine",
            (
                "tracking.project is me/mine, but a project has 1 to 128 characters, and none of "
                "/\\#?%:; correct it"
            ),
        ),
        (
            f"tracking.tags=[{'x' * 65}]",
            f"tracking.tags is [{'x' * 65}], but a tag has 1 to 64 characters; correct it",
        ),
        (
            "tracking.finish_seconds=0",
            "tracking.finish_seconds is 0.0, but it must be a finite number above 0; correct it",
        ),
    ],
)
def test_an_invalid_key_of_tracking_is_one_line(override, line):
    with pytest.raises(InputError) as caught:
        compose([override])
    assert str(caught.value) == line


# Secrets.


def test_entries_named_like_secrets_are_removed_and_text_like_keys_is_hidden(monkeypatch):
    key = "a1" * 20
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    assert redact(
        {
            "api_key": "x",
            "nested": {"Password": "y", "path": f"/home/me/{key}/data", "list": [key, 3, None]},
            "message": "it was correct-horse-battery",
            "sentence": "a path/of/many_short_parts is no key: " + "/".join(["word"] * 20),
            "key": "0123456789ab",
        }
    ) == {
        "nested": {"path": f"/home/me/{HIDDEN}/data", "list": [HIDDEN, 3, None]},
        "message": f"it was {HIDDEN}",
        "sentence": "a path/of/many_short_parts is no key: " + "/".join(["word"] * 20),
        "key": "0123456789ab",
    }


# Imports, and widthopt sync.


def test_wandb_is_not_imported_with_the_package(tmp_path):
    code = (
        "import sys, widthopt; widthopt.trace; import widthopt.sweeps;"
        "import widthopt.tracking.send, widthopt.reporting.dashboard;"
        "sys.exit(any(name.startswith('wandb') for name in sys.modules))"
    )
    import subprocess  # noqa: PLC0415

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)  # noqa: S603
    assert done.returncode == 0


def test_a_sync_without_runs_says_so(tmp_path):
    (tmp_path / "runs").mkdir()
    done = widthopt("sync", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "0 sent, 0 had been sent before, 0 still run\n")


def test_runs_are_sent_one_after_another_until_three_in_a_row_are_refused(tmp_path, monkeypatch):
    """Without a server: the test looks at the order of calls and pauses."""
    for name in "abcdefg":
        TrackingFiles(tmp_path / "stages" / name).begin(ABOUT.init)
    calls, answers = [], iter(["sent", "refused", "refused", "sent", *["refused"] * 3])

    def send(files):
        calls.append(files.folder.name)
        return next(answers), ""

    monkeypatch.setattr("widthopt.tracking.send._sync_run", send)
    monkeypatch.setattr("widthopt.tracking.send.time.sleep", calls.append)
    runs = tracked_runs(tmp_path, "abcdefg")
    assert [state for _, state, _ in sync(runs, pause_seconds=7.0)][-3:] == ["refused"] * 3
    assert calls == ["a", 7.0, "b", 7.0, "c", 7.0, "d", 7.0, "e", 7.0, "f", 7.0, "g"]
    assert [files.folder.name for files in tracked_runs(tmp_path, ["b", "c"])] == ["b", "c"]


def test_a_sync_of_an_unknown_sweep_is_one_line(tmp_path):
    (tmp_path / "runs").mkdir()
    assert one_line(widthopt("sync", "fig3", folder=tmp_path), 2) == (
        "no sweep 'fig3' in runs; available: none"
    )
    assert one_line(widthopt("sync", "--pause", "-1", folder=tmp_path), 2) == (
        "--pause is -1, but it is a number of at least 0; correct it"
    )
