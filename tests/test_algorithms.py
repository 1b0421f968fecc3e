"""What holds for every algorithm alike, and how a third party adds one."""

import ast
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from small import RUNTIME, Synthetic, make_setting

from widthopt.algorithms import SearchContext
from widthopt.config.compose import compose
from widthopt.data import Split
from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint
from widthopt.records import from_json
from widthopt.runs.execute import run_request
from widthopt.runs.plan import Plan
from widthopt.runs.point import SizedRequest
from widthopt.training import checkpoints


CONF = Path(__file__).parents[1] / "conf" / "algorithm"
CHOICES = sorted(path.stem for path in CONF.glob("*.yaml"))
SEARCHES = [name for name in CHOICES if name not in {"pyramid", "uniform"}]
SMALL = (
    "network=resnet18",
    "target.width=0.125",
    "target.resolution=24",
    "recipe=smoke",
    "recipe.batch_size=128",
    "projection.width=0.1",
    "projection.fraction=0.3",
    "runtime.device=cpu",
    "tracking=disabled",
    "runtime.backend=slice",
    "runtime.memory_format=contiguous",
    "runtime.progress=false",
)


@pytest.mark.parametrize("name", CHOICES)
def test_every_algorithm_takes_a_request_from_search_to_record(name, tmp_path):
    point = SizedRequest(
        compose([*SMALL, f"algorithm={name}", f"root={tmp_path}", "methods=[transfer]"])
    )
    assert set(Plan.of([point.request]).states().values()) == {"missing"}
    (record,) = run_request(point)
    graph = point.target_blueprint.graph
    assert record.found.macs == graph.macs(record.found.channels) <= graph.macs()
    assert record.found.macs >= 0.99 * graph.macs()
    assert record.found.overhead_macs == pytest.approx(
        point.overhead_macs("transfer"), rel=0.25 if name == "autoslim" else 0.1
    )
    assert set(Plan.of([point.request]).states().values()) == {"done"}
    again = run_request(SizedRequest(point.request))
    assert again == [record]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_network_that_no_algorithm_can_search_is_refused_before_anything(name, tmp_path):
    words = [
        "network=torchvision",
        "network.name=vgg11",
        "target.resolution=32",
        f"root={tmp_path}",
    ]
    with pytest.raises(
        InputError, match=r"but it searches by BatchNorm .*use a network with Batch"
    ):
        Plan.of([compose([*words, f"algorithm={name}", "dataset=digits", "methods=[direct]"])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["autoslim", "dmcp"])
@pytest.mark.parametrize(
    "changed", [{"label_smoothing": 0.3}, {"random_subnets": 1}, {"reduction": "mean"}]
)
def test_a_supernet_is_trained_as_the_configuration_says(name, changed, tmp_path):
    """What each value does is tested with the sandwich rule; here, that it gets there."""
    weights = []
    for number, values in enumerate(({}, changed)):
        request = compose(["recipe=smoke", f"algorithm={name}"])
        recipe = dataclasses.replace(request.recipe, batch_size=16, search_epochs=1)
        algorithm = request.algorithm
        if "label_smoothing" in values:
            recipe = dataclasses.replace(recipe, **values)
        else:
            algorithm = dataclasses.replace(algorithm, **values)
        folder = tmp_path / str(number)
        algorithm.search(
            WHERE,
            Split(Synthetic(), Synthetic(), 4),
            budget_macs=Blueprint(WHERE).graph.macs(),
            context=SearchContext(recipe, RUNTIME, 0, folder),
        )
        tensors = checkpoints.newest(folder / "checkpoints").tensors
        weights.append(tensors["model.stem.weight"])
    assert not torch.equal(*weights)


def words_of_code(tree):
    """Every name and text of a module but its docstrings, which are expressions by themselves."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str) and id(node) not in prose:
                yield word.lower()


def names_of_networks(tree):
    """What each ``network.name`` of a module stands in."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and ast.unparse(child).endswith("network.name"):
                yield node


def test_no_algorithm_knows_a_networks_name():
    """One may only keep it: a value in a table of what a log is of."""
    folder = Path(__file__).parents[1] / "widthopt"
    sources = [*(folder / "algorithms").glob("*.py"), folder / "networks" / "supernet.py"]
    assert len(sources) > 8
    for source in sources:
        tree = ast.parse(source.read_text())
        words = list(words_of_code(tree))
        assert len(words) > 30, source.name
        for family in ("resnet", "mobilenet", "densenet", "efficientnet", "regnet", "vgg"):
            assert not [word for word in words if family in word], source.name
        assert all(isinstance(network, ast.Dict) for network in names_of_networks(tree)), (
            source.name
        )


# ------------------------------------------------------------------- one file and one conf file


@pytest.mark.slow
def test_a_third_party_adds_an_algorithm_by_one_file_and_one_conf_file(tmp_path):
    """The README's recipe: the code below is the one that stands there."""
    readme = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    for name in ("first_wide.py", "conf/algorithm/first_wide.yaml"):
        before, _, rest = readme.partition(f"`{name}`")
        assert before, name
        assert rest, name
        code = rest.partition("```")[2].partition("\n")[2].partition("```")[0]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))
    done = subprocess.run(  # noqa: S603 (our own command)
        [
            sys.executable, "-m", "widthopt", "--config-dir", "conf", "algorithm=first_wide",
            "algorithm.factor=3", *SMALL, "methods=[transfer]",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/*/record.json")
    (record,) = from_json(path.read_text())
    assert record.algorithm == "first_wide"
    first, second, *_ = record.found.searched.values()
    assert first == 3 * second
    assert "first_wide" in done.stdout


# ------------------------------------------------------------------------------- kill -9

WHERE = make_setting()


def search(name, folder):
    """A search of the small network, as JSON without its times, into a file of its own."""
    torch.set_num_threads(1)
    recipe = compose(["recipe=smoke"]).recipe
    recipe = dataclasses.replace(recipe, batch_size=16, search_epochs=4)
    found = compose([f"algorithm={name}"]).algorithm.search(
        WHERE,
        Split(Synthetic(), Synthetic(), 4),
        budget_macs=Blueprint(WHERE).graph.macs(),
        context=SearchContext(recipe, RUNTIME, 0, folder),
    )
    plain = found.to_plain()
    plain.pop("seconds")
    plain["details"].pop("slimming_seconds", None)
    (folder / "found.json").write_text(json.dumps(plain, sort_keys=True))


def killed_at(name, folder, rename):
    """The same in a process that kills itself as it is about to rename a file."""
    numbers, ours = itertools.count(1), os.rename

    def count_and_rename(*args, **kwargs):
        if next(numbers) == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        return ours(*args, **kwargs)

    os.rename = os.replace = count_and_rename
    search(name, folder)


def run_in_fork(function, *arguments, kill_after=None):
    """How a process of its own ends."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    with warnings.catch_warnings():  # the child never touches the threads of this process
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name.partition("_")[0] for name in SEARCHES}))
@pytest.mark.parametrize("when", ["as it renames a file", "at any time"])
def test_a_search_that_is_killed_again_and_again_ends_the_same(name, when, tmp_path):
    """At one of the second to sixth renames of each process, or from outside."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert run_in_fork(search, name, tmp_path / "whole") == 0
    draws, kills = random.Random(0), 0  # noqa: S311 (nothing here is a secret)
    while not (tmp_path / "killed" / "found.json").exists():
        assert kills < 60
        if when == "at any time":
            wait = draws.uniform(0.1, 0.3) + 0.05 * kills
            code = run_in_fork(search, name, tmp_path / "killed", kill_after=wait)
        else:
            code = run_in_fork(killed_at, name, tmp_path / "killed", draws.randint(2, 6))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills > 0
    found = [(tmp_path / item / "found.json").read_text() for item in ("whole", "killed")]
    assert found[0] == found[1]
