"""What holds for every algorithm alike, and how a third party adds one."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from widthopt.config import compose
from widthopt.errors import InputError
from widthopt.pipeline import Point, plan, run
from widthopt.records import from_json


CONF = Path(__file__).parents[1] / "conf" / "algorithm"
CHOICES = sorted(path.stem for path in CONF.glob("*.yaml"))
SEARCHES = [name for name in CHOICES if name != "uniform"]
SMALL = (
    "network=resnet18",
    "target.width=0.125",
    "target.resolution=24",
    "recipe=smoke",
    "recipe.batch_size=128",
    "projection.width=0.1",
    "projection.fraction=0.3",
    "runtime.device=cpu",
    "runtime.backend=slice",
    "runtime.memory_format=contiguous",
    "runtime.progress=false",
)


@pytest.mark.parametrize("name", CHOICES)
def test_every_algorithm_takes_a_request_from_search_to_record(name, tmp_path):
    point = Point(compose([*SMALL, f"algorithm={name}", f"root={tmp_path}", "methods=[transfer]"]))
    assert [one.done for one in plan(point)] == [False, None]
    (record,) = run(point)
    graph = point.target_blueprint.graph
    assert record.found.macs == graph.macs(record.found.channels) <= graph.macs()
    assert record.found.macs >= 0.99 * graph.macs()
    assert record.found.overhead_macs == pytest.approx(
        point.overhead_macs("transfer", 0), rel=0.25 if name == "autoslim" else 0.1
    )
    assert [one.done for one in plan(point)] == [True, True]
    again = run(Point(point.request))
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
        plan(Point(compose([*words, f"algorithm={name}", "dataset=digits", "methods=[direct]"])))
    assert not list(tmp_path.iterdir())


def test_no_algorithm_knows_a_networks_name():
    folder = Path(__file__).parents[1] / "widthopt"
    sources = [*(folder / "algorithms").glob("*.py"), folder / "supernet.py"]
    assert len(sources) > 8
    for source in sources:
        text = source.read_text().lower()
        code = "\n".join(line for line in text.splitlines() if "==" in line or " in " in line)
        assert "resnet" not in code
        assert "mobilenet" not in code


# ------------------------------------------------------------------- one file and one conf file


def test_a_third_party_adds_an_algorithm_by_one_file_and_one_conf_file(tmp_path):
    """The README's recipe: the code below is the one that stands there."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
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
