"""What the documentation names exists: decisions, files, modules, messages, options and keys."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CODE = [
    path
    for folder in ("widthopt", "launchers", "tests", "conf")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".yaml", ".toml"} and path != Path(__file__)
]

ID = re.compile(r"[A-Z]?\d+(?:\.\d+)*")
CITATION = re.compile(
    rf"docs/algorithms/(\w+)\.md(?:, (?:sections? )?((?:{ID.pattern}(?:, | and | or |-)?)+))?"
)
ANCHOR = re.compile(r"\{ #(\S+) \}|<a id=\"(\S+)\">")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
FILE = re.compile(r"`((?:benchmarks|conf|docs|launchers|tests|widthopt)/[\w./*-]+)`")
NAME = re.compile(r"`(widthopt(?:\.\w+)+)`")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
YOURS = {"conf/algorithm/first_wide.yaml", "conf/projection/half_everything.yaml"}
"""Files that the reader of a page makes."""


def anchors(path):
    return {first or second for first, second in ANCHOR.findall(path.read_text("utf-8"))}


def citations(text):
    """The pages and entries that a text cites, such as ``docs/algorithms/dmcp.md, D2 and D12``."""
    joined = re.sub(r"\s*\n\s*(?:#\s*)?", " ", text)
    return [(page, ID.findall(entries)) for page, entries in CITATION.findall(joined)]


def test_citations_are_read_as_they_are_written():
    text = """
    # See docs/algorithms/dmcp.md, D2,
    # 1.4 and T13, which docs/algorithms/morphnet.md lists; docs/algorithms/greedy.md, P1-P3.
    """
    assert citations(text) == [
        ("dmcp", ["D2", "1.4", "T13"]), ("morphnet", []), ("greedy", ["P1", "P3"])
    ]  # fmt: skip


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_decision_that_is_cited_has_its_entry(path):
    for page, entries in citations(path.read_text("utf-8")):
        target = DOCS / "algorithms" / f"{page}.md"
        assert target.is_file(), page
        missing = [entry for entry in entries if entry not in anchors(target)]
        assert missing == [], f"{target.name} has no {', '.join(missing)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_file_and_name_on_a_page_exists(path):
    text = path.read_text("utf-8")
    for link, anchor in LINK.findall(text):
        target = path.parent / link if link else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w]+", "-", head.lower()).strip("-") for head in headings}
            assert anchor in slugs | anchors(target) | generated_sections(target), (
                f"{link}#{anchor}"
            )
    for name in set(FILE.findall(text)) - YOURS:
        assert list(ROOT.glob(name.rstrip("/"))), name
    for name in set(NAME.findall(text)):
        assert exists(name), name


def generated_sections(path):
    """The sections that the configuration reference has beside those in its file."""
    return set(configuration().GROUPS) if path.name == "configuration.md" else set()


def exists(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


# ------------------------------------------------------------------------------------ messages


def template(node):
    """A string of the code with ``…`` for each value, as the page shows messages."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_every_message_in_troubleshooting_is_one_of_the_code():
    sources = [*(ROOT / "widthopt").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]
    messages = {
        template(node) for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8")))
    }
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    shown = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(shown) > 30
    unknown = []
    for message in shown:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        if not any(pattern.search(known) for known in messages):
            unknown.append(message)
    assert unknown == []


# ------------------------------------------------------------------- command line and configuration


def commands():
    """The commands of the command line, read from its code."""
    tree = ast.parse((ROOT / "widthopt" / "cli.py").read_text("utf-8"))
    (table,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "commands"
    ]
    return [key.value for key in table.keys]


def sections():
    """The sections of the page of the command line, by command."""
    _, *parts = re.split(r"^## ", (DOCS / "cli.md").read_text("utf-8"), flags=re.MULTILINE)
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_every_command_has_its_section():
    assert set(sections()) == {"widthopt", *commands()}


@pytest.mark.parametrize("name", commands())
def test_a_section_has_the_options_of_its_command(name):
    done = subprocess.run(  # noqa: S603 (our own command)
        [sys.executable, "-m", "widthopt", name, "--help"],
        env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    options = set(OPTION.findall(done.stdout)) - {"-h", "--help"}
    assert set(OPTION.findall(sections()[name])) == options


def configuration():
    """The module that writes the configuration reference."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "generate_configuration.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_has_every_key_with_its_meaning():
    text = configuration().reference()
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| `.+` \| \S.* \|$", text, re.MULTILINE)
    for key in (
        "target.resolution", "budget_macs", "runtime.backend", "algorithm.random_subnets",
        "recipe.search_epochs", "tracking.project", "projection.fraction", "dataset.validation",
        "hydra.launcher.resources.minutes", "extrapolation.round_to", "network.factory",
    ):  # fmt: skip
        assert key in rows


def test_a_key_without_a_meaning_is_refused(tmp_path, monkeypatch):
    module = configuration()
    (tmp_path / "recipe").mkdir()
    for path in (ROOT / "conf").rglob("*.yaml"):
        target = tmp_path / path.relative_to(ROOT / "conf")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text("utf-8"))
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("\nnothing_known: 3\n")
    monkeypatch.setattr(module, "CONF", tmp_path)
    with pytest.raises(ValueError, match=r"config\.yaml: nothing_known have no meaning"):
        module.reference()
