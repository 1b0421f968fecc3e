"""Hydra's, OmegaConf's and YAML's errors about a configuration, each as one line."""

import difflib
import re
import traceback
from collections.abc import Sequence
from importlib.resources import files

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from hydra_plugins.widthopt_launchers.sweeper import CONFIG_NAME, EXPERIMENT
from widthopt.errors import InputError


def _with_key(group: str, key: str) -> list[str]:
    """The choices of a group, as they are typed, that have a key."""
    folder = files(CONFIG_MODULE) / group
    if group not in (*GROUPS, _LAUNCHER) or not folder.is_dir():
        return []
    found = sorted(one.name for one in folder.iterdir() if one.name.endswith(".yaml"))
    return [
        f"{group}={name.removesuffix('.yaml')}"
        for name in found
        if key in list(OmegaConf.create((folder / name).read_text("utf-8")))
    ]


def unknown_key(key: str, names: Sequence[str]) -> str:
    """What to say about a key that is not among ``names``; the nearest of its own table's."""
    if key in names:  # Hydra gives a table that is there no new keys unasked
        return f"{key} is a table, but its keys are added one by one; write +{key}.NAME=VALUE"
    table, _, last = key.rpartition(".")
    beside = sorted(name for name in names if name.rpartition(".")[0] == table) or sorted(names)
    near = {name.rpartition(".")[2]: name for name in beside}
    close = difflib.get_close_matches(last, near, n=1)
    remedy = f"did you mean {near[close[0]]}?" if close else f"choose among {', '.join(beside)}"
    if not close and (choices := _with_key(table.replace(".", "/"), last)):
        remedy = f"first choose {' or '.join(choices)}, which has it"
    return f"{key} is not a key, but only known keys are read; {remedy}"


def _not_in_all(key: str, words: Sequence[str]) -> str | None:
    """What to say about a key that some choices of a sweep over its group have, and not all."""
    group, _, name = key.rpartition(".")
    swept = next((word for word in words if word.startswith(f"{group}=") and "," in word), None)
    choices = _with_key(group, name)
    if swept is None or not choices:
        return None
    return (
        f"{key} is given, but not every choice of {swept} has it; sweep in another command over "
        f"those that have it, of {', '.join(choices)}"
    )


def missing_key(key: str) -> str:
    """The message about a key that a choice needs and nobody gave."""
    return f"{key} is missing, but this choice needs it; add {key}=... to the command"


_NO_CHOICE = "Config group override must be a string"
"""How Hydra's ValueError about ``network=3`` begins; it does not say which group."""


def is_configuration_error(error: Exception) -> bool:
    """Whether an error says that a configuration cannot be read: one of Hydra's, or any on its way.

    A file that is no table, that is not UTF-8 or that includes itself has no error of its own.
    """
    if isinstance(error, InputError):
        return False
    return isinstance(error, HydraException | OmegaConfBaseException | YAMLError) or any(
        frame.f_globals.get("__name__") == ConfigLoaderImpl.__module__
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def to_input_error(error: Exception, words: Sequence[str] = ()) -> InputError:
    """Hydra's error about a configuration, in one line.

    Args:
        error: What Hydra, OmegaConf or the reader of YAML raised.
        words: What was typed.
    """
    text = str(error)
    reason = _no_yaml(error) or _no_table(error, words) or _not_one(text, words) or _no_folder(text)
    if reason:
        return InputError(reason)
    line = " ".join(text.split())
    if isinstance(error, OverrideParseException):
        return InputError(
            f"{error.override} is not an override, but arguments are KEY=VALUE or GROUP=CHOICE; "
            "see widthopt --help"
        )
    if found := re.search(r"Could not find '(.+)/(.+)'", text):
        listed = text.partition("Available options")[2].partition("Config search path")[0]
        names = [name.strip() for name in listed.split("\n")[1:] if name.strip()]
        return InputError(
            f"{found[1]} is {found[2]}, but there is no such choice; use one of "
            f"{', '.join(sorted(names))}"
        )
    if found := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return InputError(missing_key(found[1]))
    if found := re.search(r"Could not override '([^']+)'", text):
        return InputError(_not_in_all(found[1], words) or unknown_key(found[1], _keys(words)))
    key = getattr(error, "full_key", None) or "the configuration"
    return InputError(f"{key} cannot be read, but it must be ({line}); see widthopt --help")


def _no_yaml(error: Exception) -> str | None:
    """What is wrong with a file that the reader of YAML gave up on."""
    if not isinstance(error, MarkedYAMLError) or not error.problem_mark:
        return None
    mark = error.problem_mark
    problem = " ".join(str(error.problem).split())
    return (
        f"{mark.name} is no YAML ({problem} in line {mark.line + 1}), but configurations are; "
        "correct it"
    )


def _no_table(error: Exception, words: Sequence[str]) -> str | None:
    """What is wrong with a choice whose file Hydra could not make a table of."""
    kinds = OSError | UnicodeDecodeError | RecursionError
    if isinstance(error, HydraException) or not isinstance(error, kinds):
        return None
    chosen = [word for word in words if word.partition("=")[0] in (*GROUPS, EXPERIMENT)]
    problem = "one includes itself" if isinstance(error, RecursionError) else str(error)
    return (
        f"{' '.join(chosen) or 'the configuration'} cannot be read, but each choice is a file of "
        f"UTF-8 with a table of keys ({problem}); correct it"
    )


def _no_folder(text: str) -> str | None:
    """What is wrong where Hydra does not find a person's choices."""
    found = re.search(r"Additional config directory '(.+)' not found", text)
    return no_config_dir(found[1]) if found else None


def no_config_dir(folder: str) -> str:
    """The message about a ``--config-dir`` that does not exist."""
    return f"--config-dir is {folder}, but there is no such folder; name one of your own choices"


def _not_one(text: str, words: Sequence[str]) -> str | None:
    """What is wrong where one choice or one value was wanted, and something else was given."""
    if _NO_CHOICE in text:
        typed = [word for word in words if not word.startswith("-")]
        group, value = next(
            (one.key_or_group, str(one.input_line).partition("=")[2])
            for one in OverridesParser.create().parse_overrides(typed)
            if one.key_or_group in (*GROUPS, "experiment") or "/" in one.key_or_group
            if not isinstance(one.value(), str | list | dict)
        )
        return f"{group} is {value}, but a group takes the name of a choice; see widthopt --help"
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"{found[1]} is {found[2]}, but one run takes one value; add -m to run once for each, "
            "or write [a,b] for a list"
        )
    if found := re.search(r"Error merging override ([^=]+)=(.*)", text):
        return (
            f"{found[1]} is {found[2]}, but it replaces a value of another kind (a table, a list "
            "or a single value); see widthopt --help"
        )
    return None


def _keys(words: Sequence[str]) -> list[str]:
    """Every key there is with the choices among ``words``, groups and values alike."""
    groups = (*GROUPS, EXPERIMENT, "hydra.searchpath", _LAUNCHER)
    chosen = [one for one in words if one.partition("=")[0] in groups and "," not in one]
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        try:
            composed = hydra_compose(CONFIG_NAME, overrides=chosen, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):  # there may be the mistake
            composed = hydra_compose(CONFIG_NAME, return_hydra_config=True)
        own = OmegaConf.to_container(composed.hydra.launcher)
    config = OmegaConf.to_container(composed)
    assert isinstance(config, dict)
    del config["hydra"]
    config["hydra.launcher"] = own
    names: list[str] = []
    for group, values in config.items():
        names.append(str(group))
        if isinstance(values, dict):
            names += [f"{group!s}.{name!s}" for name in values if name != "_target_"]
    return names


GROUPS = (
    "network", "dataset", "projection", "algorithm", "extrapolation", "recipe", "tracking"
)  # fmt: skip


CONFIG_MODULE = "widthopt.conf"


_LAUNCHER = "hydra/launcher"
