"""The files for contributors agree with the Makefile, setup.cfg and constraints.txt."""

import configparser
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}
EXTRAS = SETUP["options.extras_require"].values()
REQUIREMENTS = [
    Requirement(line)
    for line in sorted({*"\n".join([SETUP["options"]["install_requires"], *EXTRAS]).split("\n")})
    if line
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_each_requirement_has_a_pin_in_its_range(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_hooks_run_the_versions_that_setup_cfg_pins():
    exact = {r.name for r in REQUIREMENTS if str(r.specifier).startswith("==")}
    assert exact == {"mypy", "ruff"}
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    commands = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert commands == {f".venv/bin/{name}" for name in exact}


def test_the_workflow_tests_every_supported_python():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    supported = SpecifierSet(SETUP["options"]["python_requires"])
    expected = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported]
    matrix = jobs["make"]["strategy"]["matrix"]
    assert (matrix["target"], matrix["python"]) == (["test"], expected)


def test_the_workflow_and_the_script_run_the_same_targets():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    matrix = jobs["make"]["strategy"]["matrix"]
    workflow = {*matrix["target"], *(row["target"] for row in matrix["include"])}
    workflow |= set(re.findall(r"make ([a-z-]+)", str(jobs["slurm"]["steps"])))
    (script,) = re.findall(r"for target in (.*);", (ROOT / ".ci" / "run").read_text())
    assert workflow | {"install"} == set(script.split())
    assert workflow <= TARGETS


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"]
)
def test_each_target_and_file_that_is_named_exists(name):
    path = ROOT / name
    text = path.read_text()
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text)) <= TARGETS
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert (path.parent / link).exists(), link


def test_the_citation_names_the_version_that_is_built():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == SETUP["metadata"]["version"]
