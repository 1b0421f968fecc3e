"""What a run writes down as it goes, without W&B; `test_wandb.py` has W&B's real client."""

import json
import os
import resource
import sys
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from commands import NETWORK, TINY, one_line, widthopt
from small import RUNTIME, Small, SmallNetwork, Synthetic

from widthopt import training
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
from widthopt.tracking import About, Tracker, tracked
from widthopt.tracking.client import End, Kept
from widthopt.tracking.lines import Lines, rows
from widthopt.tracking.metrics import known
from widthopt.tracking.secrets import HIDDEN, hidden
from widthopt.tracking.sync import sync
from widthopt.training.loop import Diverged, Interrupted, Loop, _Rows, train


TRACKING = replace(compose(["tracking=disabled"]).tracking, every=3)
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


def repeated(folder):
    """The rows of a run, without what depends on the clock."""
    return [
        {name: value for name, value in row.items() if name not in NOT_REPEATED}
        for row in rows(folder / "metrics.jsonl")
    ]


def run_training(folder, data, log):
    torch.manual_seed(0)
    model = Small(4)
    train(
        model, data, recipe=RECIPE, epochs=4, seed=0, runtime=RUNTIME, folder=folder, log=log
    )  # fmt: skip
    return model


def found_by(name, folder, log, interrupt=None):
    """What a search of a small network finds."""
    algorithm = compose([f"algorithm={name}"]).algorithm
    if name == "dmcp":
        algorithm = replace(algorithm, grid="even")
    where = Setting(SmallNetwork(), 4, 1.0, 1, 8, 1.0)
    return algorithm.search(
        where,
        Split(Synthetic(interrupt=interrupt), Synthetic(), 4),
        budget_macs=Blueprint(where).graph.macs(),
        context=SearchContext(RECIPE, RUNTIME, 0, folder, log),
    )


def run_search(name, folder, interrupt=None, tracking=TRACKING):
    """The same, tracked: its rows are in the folder."""
    about = replace(ABOUT, kind="search")
    with tracked(tracking, about, folder, interruptions=(Interrupted,)) as log:
        return found_by(name, folder, log, interrupt)


# What is written.


def test_a_training_ends_each_epoch_with_a_row_and_has_others_between(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    run_training(tmp_path, Synthetic(), log)
    found = rows(tmp_path / "metrics.jsonl")
    # Four epochs of four steps, and every third step.
    assert [row["step"] for row in found] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert ["train/top1" in row for row in found] == [row["step"] % 4 == 0 for row in found]
    assert [row["epoch"] for row in found] == [row["step"] / 4 for row in found]
    assert all(row["perf/images_per_second"] > 0 for row in found)


def test_images_per_second_are_those_since_the_row_before(tmp_path, monkeypatch):
    """Every batch of 16 images takes two seconds, and in the last epoch one."""
    clock = [0.0]

    class Slow(Synthetic):
        def epoch(self, epoch, first_step=0, rank=0, ranks=1):
            for batch in super().epoch(epoch, first_step, rank, ranks):
                clock[0] += 1.0 if epoch == 3 else 2.0
                yield batch

    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    run_training(tmp_path, Slow(), Tracker(TRACKING, ABOUT, tmp_path))
    rates = [row["perf/images_per_second"] for row in rows(tmp_path / "metrics.jsonl")]
    assert rates == [8.0] * 6 + [16.0] * 2


def test_the_loss_and_the_gradient_in_a_row_are_those_of_its_step(tmp_path):
    """The first step is taken at a rate of zero, so its gradient is that of the fresh network."""
    log = Tracker(replace(TRACKING, every=1), ABOUT, tmp_path)
    run_training(tmp_path, Synthetic(), log)
    first = rows(tmp_path / "metrics.jsonl")[0]
    torch.manual_seed(0)
    model = Small(4).train()
    images, labels = next(iter(Synthetic().epoch(0)))
    loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    loss.backward()
    length = sum(float(one.grad.double().square().sum()) for one in model.parameters()) ** 0.5
    assert first["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["train/gradient_norm"] == pytest.approx(length, rel=1e-4)
    assert first["train/learning_rate"] == 0


def test_a_training_is_the_same_to_the_bit_whether_it_is_tracked_or_not(tmp_path):
    plain = run_training(tmp_path / "plain", Synthetic(), None)
    logged = run_training(tmp_path / "logged", Synthetic(), Tracker(TRACKING, ABOUT, tmp_path))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, logged.state_dict()[name]), name


def test_accuracies_in_an_epochs_row_are_those_of_its_own_images(tmp_path, monkeypatch):
    """At this learning rate the network stands still, so they can be found one by one."""
    monkeypatch.setitem(globals(), "RECIPE", replace(RECIPE, learning_rate=1e-30))
    torch.manual_seed(2)
    model = Small(10)
    log = Tracker(TRACKING, ABOUT, tmp_path)
    train(
        model, Synthetic(), recipe=RECIPE, epochs=4, seed=0, runtime=RUNTIME, folder=tmp_path,
        log=log,
    )  # fmt: skip
    last, places = rows(tmp_path / "metrics.jsonl")[-1], []
    for images, labels in Synthetic().epoch(3):
        for scores, label in zip(model(images).tolist(), labels.tolist(), strict=True):
            places.append(sum(one > scores[label] for one in scores))
    assert last["train/top1"] == 100 * sum(place < 1 for place in places) / 64
    assert last["train/top5"] == 100 * sum(place < 5 for place in places) / 64
    assert 0 < last["train/top1"] < last["train/top5"] < 100


def test_the_accelerators_memory_is_the_peak_since_the_training_began(tmp_path, monkeypatch):
    """A processor stands in for an accelerator; `test_gpu.py` has a real one."""
    told = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: told.append("begin"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**29)
    loop = Loop(
        Small(4), recipe=RECIPE, steps_per_epoch=4, epochs=4, seed=0, runtime=RUNTIME
    )  # fmt: skip
    loop.device = torch.device("cuda")
    _Rows(loop, Synthetic(), Tracker(TRACKING, ABOUT, tmp_path)).epoch()
    assert told == ["begin"]
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["perf/gpu_memory_gib"] == 1.5


@pytest.mark.parametrize("name", ["morphnet", "dmcp", "autoslim"])
def test_a_search_logs_only_what_is_declared_and_finds_what_it_would_untracked(name, tmp_path):
    found = run_search(name, tmp_path / "tracked")
    names = {key for row in repeated(tmp_path / "tracked") for key in row} - {"step"}
    assert [one for one in sorted(names) if not known(one)] == []
    plain = found_by(name, tmp_path / "plain", None)
    assert plain.multipliers == found.multipliers
    assert plain.overhead_macs == found.overhead_macs


@pytest.mark.parametrize(
    ("name", "wanted"),
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
def test_a_search_logs_the_diagnostics_that_its_specification_asks_for(name, wanted, tmp_path):
    run_search(name, tmp_path)
    names = {key for row in repeated(tmp_path) for key in row}
    assert wanted <= names


def test_the_narrowest_subnets_loss_is_the_mean_over_the_steps_images(tmp_path, monkeypatch):
    """Two micro-batches: what is logged is the mean of what each of them lost."""
    seen = []

    class Watching(Sandwich):
        def backpropagate(self, loss, *, share):
            seen.append(loss.item())
            super().backpropagate(loss, share=share)

    monkeypatch.setattr("widthopt.algorithms.autoslim.Sandwich", Watching)
    monkeypatch.setitem(globals(), "RECIPE", replace(RECIPE, accumulation=2))
    run_search("autoslim", tmp_path, tracking=replace(TRACKING, every=1))
    # In each micro-batch the widest, the narrowest and two random ones.
    narrowest = [(one + other) / 2 for one, other in zip(seen[1::8], seen[5::8], strict=True)]
    logged = [row["search/loss_narrowest"] for row in repeated(tmp_path) if row["step"] <= 16]
    assert logged == pytest.approx(narrowest, rel=1e-6)


# Interruptions.


@pytest.mark.parametrize("step", [2, 4, 6, 15])
def test_a_training_that_was_interrupted_leaves_the_rows_of_one_that_was_not(step, tmp_path):
    run_training(tmp_path / "whole", Synthetic(), Tracker(TRACKING, ABOUT, tmp_path / "whole"))
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        run_training(folder, Synthetic(interrupt=step), Tracker(TRACKING, ABOUT, folder))
    run_training(folder, Synthetic(), Tracker(TRACKING, ABOUT, folder))
    assert repeated(folder) == repeated(tmp_path / "whole")


@pytest.mark.parametrize("name", ["morphnet", "dmcp", "autoslim"])
def test_a_search_that_was_interrupted_leaves_the_rows_of_one_that_was_not(name, tmp_path):
    run_search(name, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_search(name, tmp_path / "parts", interrupt=10)
    run_search(name, tmp_path / "parts")
    assert repeated(tmp_path / "parts") == repeated(tmp_path / "whole")


def test_rows_behind_the_checkpoint_of_a_process_that_was_killed_are_written_once(tmp_path):
    class Killed(Exception):  # noqa: N818
        pass

    class Deadly(Tracker):
        def row(self, step, values):
            super().row(step, values)
            if step == 15:  # the checkpoint is of step 12
                raise Killed

    run_training(tmp_path / "whole", Synthetic(), Tracker(TRACKING, ABOUT, tmp_path / "whole"))
    folder = tmp_path / "parts"
    with pytest.raises(Killed):
        run_training(folder, Synthetic(), Deadly(TRACKING, ABOUT, folder))
    assert repeated(folder)[-1]["step"] == 15
    run_training(folder, Synthetic(), Tracker(TRACKING, ABOUT, folder))
    assert repeated(folder) == repeated(tmp_path / "whole")


def test_rows_last_before_the_checkpoint_that_says_so(tmp_path):
    """When a checkpoint is written, the file ends with the row of its step."""
    seen = []

    class Watching(Tracker):
        def keep(self):
            super().keep()
            last = rows(tmp_path / "metrics.jsonl")[-1]["step"]
            seen.append((last, (tmp_path / "checkpoints" / f"step-{last:08d}").exists()))

    run_training(tmp_path, Synthetic(), Watching(TRACKING, ABOUT, tmp_path))
    assert seen == [(4, False), (8, False), (12, False), (16, False)]


def test_a_run_that_ended_before_its_training_began_keeps_its_rows(tmp_path):
    with pytest.raises(Interrupted):
        run_training(tmp_path, Synthetic(interrupt=10), Tracker(TRACKING, ABOUT, tmp_path))
    before = rows(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError), tracked(TRACKING, ABOUT, tmp_path):
        raise InputError("the images are not there today")
    assert rows(tmp_path / "metrics.jsonl") == before != []


def test_a_result_is_kept_before_w_and_b_is_waited_for(tmp_path, monkeypatch):
    """A job may be taken away while it waits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_results.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    seen, close = [], Tracker.close

    def watching(self):
        seen.append(sorted(one.parent.name[:6] for one in tmp_path.glob("*/stages/*/result.json")))
        close(self)

    monkeypatch.setattr(Tracker, "close", watching)
    words = [one for one in TINY if not one.startswith("network.factory")]
    words += ["network.factory=network_of_results.MyNetwork", "methods=[transfer]"]
    run_request(SizedRequest(compose(words)))
    assert seen == [["search"], ["search", "train-"]]


def test_what_cannot_be_shown_of_a_search_loses_no_result(tmp_path, monkeypatch, caplog):
    """An algorithm of one's own may call something ``moves`` that is none of slimming's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_moves.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    words = [one for one in TINY if not one.startswith("network.factory")]
    asked = compose([*words, "network.factory=network_of_moves.MyNetwork", "methods=[transfer]"])

    class Own(type(asked.algorithm)):
        def search(self, *args, **options):
            found = super().search(*args, **options)
            return replace(found, details={"moves": ["a knight's"]})

    values = {one.name: getattr(asked.algorithm, one.name) for one in fields(asked.algorithm)}
    (record,) = run_request(SizedRequest(replace(asked, algorithm=Own(**values))))
    assert record.top1 > 0
    assert [one for one in caplog.records if "cannot be written" in one.message]


# The file.


def test_a_line_that_was_cut_short_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert rows(path) == [{"step": 1, "a": 1}]
    lines = Lines(path)
    assert lines.cut(7) == [{"step": 1, "a": 1}]
    lines.add({"step": 2, "a": 3})
    assert rows(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 3}]


@contextmanager
def files_no_longer_than(size):
    """A disk that takes no more than so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_would_not_take_is_one_warning_and_is_written_later(tmp_path, caplog):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.resume(0)
    with files_no_longer_than(100):
        for step in range(1, 6):
            log.row(step, {"loss": 1.0})
    whole = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in whole] == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    log.row(6, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    warnings = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path / 'metrics.jsonl'} cannot be written (")


def test_rows_that_had_no_place_at_the_start_are_written_once_there_is_one(tmp_path, caplog):
    folder = tmp_path / "stages" / "train-0"
    (tmp_path / "stages").write_text("no folder")
    log = Tracker(TRACKING, ABOUT, folder)
    log.resume(0)
    log.row(1, {"loss": 1.0})
    (tmp_path / "stages").unlink()
    log.row(2, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    assert [one.levelname for one in caplog.records].count("WARNING") == 1


def test_a_row_that_found_no_room_is_written_at_the_end(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.resume(0)
    with files_no_longer_than(10):
        log.row(1, {"loss": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == []
    log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]


def test_numbers_of_any_kind_are_written_and_what_is_none_hurts_no_run(tmp_path, caplog):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.row(1, {"loss": torch.tensor(0.5), "top1": 3})
    log.row(2, {"loss": "much"})
    log.row(3, {"loss": 1.0})
    log.summary({"flags/cut": [object()]})
    log.close()
    found = [
        {name: one for name, one in row.items() if name != "time"}
        for row in rows(tmp_path / "metrics.jsonl")
    ]
    assert found == [
        {"step": 1, "train/loss": 0.5, "train/top1": 3}, {"step": 3, "train/loss": 1.0},
    ]  # fmt: skip
    assert [one.levelname for one in caplog.records].count("WARNING") == 1


def test_what_is_not_finite_is_left_out(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.row(1, {"loss": float("nan"), "top1": 3.0})
    log.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row.keys() == {"step", "time", "train/top1"}


def test_widths_are_a_file_rows_by_layer_and_lists(tmp_path):
    log = Tracker(TRACKING, ABOUT, tmp_path)
    log.row(7, {"loss": 1.0})
    log.widths({"conv1": 30, "conv2": 8}, {"conv1": 0.5, "conv2": 2.0}, alpha=1.5)
    log.close()
    assert json.loads((tmp_path / "widths.json").read_text()) == {
        "channels": {"conv1": 30, "conv2": 8},
        "multipliers": {"conv1": 0.5, "conv2": 2.0},
        "alpha": 1.5,
    }
    told = rows(tmp_path / "metrics.jsonl")[1:]
    names = ("step", "layer/index", "layers/small/channels", "layers/small/multiplier")
    assert [tuple(row[name] for name in names) for row in told] == [(8, 0, 30, 0.5), (9, 1, 8, 2.0)]
    assert log.end.summary["widths/channels"] == [30, 8]


def test_widths_of_a_search_are_no_network_that_a_figure_shows(tmp_path):
    log = Tracker(TRACKING, replace(ABOUT, kind="search"), tmp_path)
    log.widths({"conv1": 30}, {"conv1": 0.5})
    log.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row.keys() - {"step", "time"} == {
        "layer/index", "layers/search/channels", "layers/search/multiplier",
    }  # fmt: skip


# How runs end.


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
def test_a_run_ends_as_its_work_did(error, code, preempted, why, tmp_path):
    kept = []

    def work():
        with tracked(TRACKING, ABOUT, tmp_path, interruptions=(Interrupted,)) as log:
            kept.append(log)
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    end = kept[0].end
    assert (end.code, end.preempted, end.why) == (code, preempted, why)


def test_a_tracked_run_that_goes_on_untracked_ends_as_its_work_did(tmp_path):
    """A server is told so with the next sync, and nothing else is begun for W&B."""
    kept = Kept(tmp_path)
    kept.begin(ABOUT, project="p", entity=None)
    kept.end(End(code=1, preempted=True))
    with tracked(TRACKING, ABOUT, tmp_path) as log:
        log.row(1, {"loss": 2.0})
        log.summary({"test/top1": 50.0})
    assert (kept.ended.code, kept.ended.preempted) == (0, False)
    assert kept.ended.summary == {"test/top1": 50.0}
    assert not kept.whole
    with tracked(TRACKING, ABOUT, tmp_path / "another") as log:
        log.row(1, {"loss": 2.0})
    assert not (tmp_path / "another" / "tracking").exists()


# Names.


def test_a_run_is_found_by_figure_network_algorithm_and_seed():
    assert ABOUT.name == "train small noise dmcp w0.312>w1.732 d1 r8 f1 s2"
    assert ABOUT.group == "train/small/noise/dmcp/w0.312>w1.732-d1-r8-f1"
    assert ABOUT.labels == ["fig3_width", "small", "noise", "dmcp", "transfer", "seed2", "mine"]
    assert (ABOUT.config["source_width"], ABOUT.config["target_width"]) == (0.312, 1.732)


def test_seeds_share_a_group_and_nothing_else_does():
    assert replace(ABOUT, seed=0).group == ABOUT.group
    assert replace(ABOUT, seed=0).name != ABOUT.name
    for other in (
        replace(ABOUT, algorithm="morphnet"),
        replace(ABOUT, network="large"),
        replace(ABOUT, source={**AXES, "width": 0.5}),
        replace(ABOUT, kind="search", target=None),
    ):
        assert other.group != ABOUT.group


def test_tags_are_no_longer_than_w_and_b_takes():
    assert max(map(len, replace(ABOUT, network="n" * 99).labels)) == 64


def test_the_id_of_a_run_is_its_stages_and_a_salt_makes_another():
    one = SizedRequest(compose(["target.resolution=32"]), images=False)
    stage = one.search_entry("transfer", 3)
    assert one.about("search", "transfer", 3, stage).id == stage.folder.name
    salted = SizedRequest(compose(["target.resolution=32", "tracking.salt=again"]), images=False)
    assert salted.search_entry("transfer", 3).folder.name == stage.folder.name
    other = salted.about("search", "transfer", 3, stage).id
    assert other.startswith(stage.folder.name)
    assert other != stage.folder.name


def test_tracking_names_no_run_and_is_frozen_with_it():
    one = compose(["tracking=online", "tracking.tags=[a,b]", "tracking.every=7"])
    other = compose(["tracking=disabled"])
    assert one.fields == other.fields
    again = build_request(_config(to_plain(one)))
    assert again.tracking == one.tracking
    assert again.tracking.every == 7


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
            "tracking.every=0",
            (
                "tracking.every is 0, but it is a number of steps; use a whole number from 1 up; "
                "correct it"
            ),
        ),
        (
            "tracking.project=''",
            "tracking.project is , but it has 1 to 128 characters, and none of /\\#?%:; correct it",
        ),
        (
            "tracking.project=me/mine",
            (
                "tracking.project is me/mine, but it has 1 to 128 characters, and none of "
                "/\\#?%:; correct it"
            ),
        ),
        (
            f"tracking.tags=[{'x' * 65}]",
            f"tracking.tags is [{'x' * 65}], but a tag has 1 to 64 characters; correct it",
        ),
        (
            "tracking.finish_seconds=0",
            "tracking.finish_seconds is 0.0, but it is a number above 0; correct it",
        ),
    ],
)
def test_a_mistake_in_tracking_is_one_line(override, line):
    with pytest.raises(InputError) as caught:
        compose([override])
    assert str(caught.value) == line


# Secrets.


def test_what_is_called_a_secret_goes_and_what_looks_like_one_is_hidden(monkeypatch):
    key = "a1" * 20
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    assert hidden(
        {
            "api_key": "x",
            "nested": {"Password": "y", "path": f"/home/me/{key}/data", "list": [key, 3, None]},
            "said": "it was correct-horse-battery",
            "sentence": "a path/of/many_short_parts is no key: " + "/".join(["word"] * 20),
            "key": "0123456789ab",
        }
    ) == {
        "nested": {"path": f"/home/me/{HIDDEN}/data", "list": [HIDDEN, 3, None]},
        "said": f"it was {HIDDEN}",
        "sentence": "a path/of/many_short_parts is no key: " + "/".join(["word"] * 20),
        "key": "0123456789ab",
    }


# What is not loaded.


def test_nothing_but_a_tracked_run_loads_wandb(tmp_path):
    code = (
        "import sys, widthopt; widthopt.trace; import widthopt.sweeps;"
        "import widthopt.tracking.sync, widthopt.reporting.dashboard;"
        "sys.exit(any(one.startswith('wandb') for one in sys.modules))"
    )
    import subprocess  # noqa: PLC0415

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)  # noqa: S603
    assert done.returncode == 0


def test_wandb_imported_ahead_starts_nothing(tmp_path):
    code = (
        "import os, threading, widthopt.tracking.preload\n"
        "assert os.environ['WANDB_ERROR_REPORTING'] == 'false'\n"
        "assert threading.active_count() == 1\n"
        "own = '/proc/self/fd/'\n"
        "links = [os.readlink(own + one) for one in os.listdir(own)[:-1]]\n"
        "assert not any('socket' in one for one in links), links\n"
        "try: os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError: print('no child')\n"
    )
    import subprocess  # noqa: PLC0415

    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "no child\n"
    assert list(tmp_path.iterdir()) == []


def test_sync_of_nothing_says_so(tmp_path):
    (tmp_path / "runs").mkdir()
    done = widthopt("sync", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "0 sent, 0 had been sent before, 0 still run\n")


def test_runs_are_sent_with_a_pause_between_them_and_tried_again_after_a_while(
    tmp_path, monkeypatch
):
    """Without a server: what is looked at is when a run is told, and what is waited for."""
    for name in ("train-a", "train-b", "train-c"):
        kept = Kept(tmp_path / "stages" / name)
        kept.begin(ABOUT, project="width-transfer", entity=None)
        kept.end(End())
    seen = []
    answers = iter(["", "full", "full", "", ""])

    def tell(kept, seconds):
        seen.append((kept.folder.name, seconds))
        return next(answers)

    monkeypatch.setattr("widthopt.tracking.sync._tell", tell)
    found = list(sync(tmp_path, pause_seconds=7.0, wait=seen.append, finish_seconds=9.0))
    assert [(one.name, one.state) for one in found] == [
        ("train-a", "sent"), ("train-b", "sent"), ("train-c", "sent"),
    ]  # fmt: skip
    b = ("train-b", 9.0)
    assert seen == [("train-a", 9.0), 7.0, b, 5.0, b, 20.0, b, 7.0, ("train-c", 9.0)]


def test_sync_names_what_is_no_sweep(tmp_path):
    (tmp_path / "runs").mkdir()
    assert one_line(widthopt("sync", "fig3", folder=tmp_path), 2) == (
        "fig3 is no sweep in runs, but the sweeps there are: none"
    )
    assert one_line(widthopt("sync", "--pause", "-1", folder=tmp_path), 2) == (
        "--pause is -1, but it is from 0 up; correct it"
    )
