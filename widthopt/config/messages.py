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


CONFIG_MODULE = "widthopt.conf"
GROUPS = (
    "network", "dataset", "projection", "algorithm", "extrapolation", "recipe", "tracking"
)  # fmt: skip

_LAUNCHER = "hydra/launcher"
_NO_CHOICE = "Config group override must be a string"
"""Start of Hydra's ValueError about ``network=3``, which does not name the group."""


def _choices_with(group: str, key: str) -> list[str]:
    """Return the choices of a group that have a key, as they are typed."""
    folder = files(CONFIG_MODULE) / group
    if group not in (*GROUPS, _LAUNCHER) or not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".yaml"))
    return [
        f"{group}={name.removesuffix('.yaml')}"
        for name in names
        if key in list(OmegaConf.create((folder / name).read_text("utf-8")))
    ]


def unknown_key(key: str, names: Sequence[str]) -> str:
    """Return the message about a key that is not among ``names``, with the most similar one."""
    if key in names:  # Hydra does not add keys to a mapping without a plus sign
        return f"{key} is a mapping, but its keys are added one by one; write +{key}.NAME=VALUE"
    parent, _, last = key.rpartition(".")
    siblings = sorted(name for name in names if name.rpartition(".")[0] == parent) or sorted(names)
    by_last = {name.rpartition(".")[2]: name for name in siblings}
    close = difflib.get_close_matches(last, by_last, n=1)
    remedy = f"did you mean {by_last[close[0]]}?" if close else f"use one of {', '.join(siblings)}"
    if not close and (choices := _choices_with(parent.replace(".", "/"), last)):
        remedy = f"first choose {' or '.join(choices)}, which has it"
    return f"{key} is not a key, but only known keys are read; {remedy}"


def _not_in_all(key: str, words: Sequence[str]) -> str | None:
    """Return the message about a key that only some of the swept choices of its group have."""
    group, _, name = key.rpartition(".")
    swept = next((word for word in words if word.startswith(f"{group}=") and "," in word), None)
    choices = _choices_with(group, name)
    if swept is None or not choices:
        return None
    return (
        f"{key} is set, but not every choice of {swept} has it; sweep over the choices that have "
        f"it in a command of their own: {', '.join(choices)}"
    )


def missing_key(key: str) -> str:
    """Return the message about a required key without a value."""
    return f"{key} is missing, but this choice needs it; add {key}=... to the command"


def is_configuration_error(error: Exception) -> bool:
    """Return whether an error was raised because a configuration cannot be read.

    Hydra has no error of its own for a file that is not a mapping, is not UTF-8 or includes itself;
    such an error is recognised by Hydra's loader in its traceback.
    """
    if isinstance(error, InputError):
        return False
    return isinstance(error, HydraException | OmegaConfBaseException | YAMLError) or any(
        frame.f_globals.get("__name__") == ConfigLoaderImpl.__module__
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def to_input_error(error: Exception, words: Sequence[str] = ()) -> InputError:
    """Convert an error about a configuration to one line.

    Args:
        error: An error of Hydra, OmegaConf or the YAML parser.
        words: The arguments as typed.
    """
    text = str(error)
    reason = (
        _yaml_error(error)
        or _file_error(error, words)
        or _value_error(text, words)
        or _folder_error(text)
    )
    if reason:
        return InputError(reason)
    line = " ".join(text.split())
    if isinstance(error, OverrideParseException):
        return InputError(
            f"{error.override} is not an override, but arguments are KEY=VALUE or GROUP=CHOICE; "
            "see widthopt --help"
        )
    if match := re.search(r"Could not find '(.+)/(.+)'", text):
        options = text.partition("Available options")[2].partition("Config search path")[0]
        names = [name.strip() for name in options.split("\n")[1:] if name.strip()]
        return InputError(
            f"{match[1]} is {match[2]}, but there is no such choice; use one of "
            f"{', '.join(sorted(names))}"
        )
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return InputError(missing_key(match[1]))
    if match := re.search(r"Could not override '([^']+)'", text):
        return InputError(_not_in_all(match[1], words) or unknown_key(match[1], _keys(words)))
    key = getattr(error, "full_key", None) or "the configuration"
    return InputError(f"{key} cannot be read ({line}), but it must be valid; see widthopt --help")


def _yaml_error(error: Exception) -> str | None:
    """Return the message about a file that is not YAML."""
    if not isinstance(error, MarkedYAMLError) or not error.problem_mark:
        return None
    mark = error.problem_mark
    problem = " ".join(str(error.problem).split())
    return (
        f"{mark.name} is not YAML ({problem} in line {mark.line + 1}), but a configuration "
        "must be; correct it"
    )


def _file_error(error: Exception, words: Sequence[str]) -> str | None:
    """Return the message about the file of a choice that is not a mapping."""
    kinds = OSError | UnicodeDecodeError | RecursionError
    if isinstance(error, HydraException) or not isinstance(error, kinds):
        return None
    chosen = [word for word in words if word.partition("=")[0] in (*GROUPS, EXPERIMENT)]
    problem = "one includes itself" if isinstance(error, RecursionError) else str(error)
    return (
        f"{' '.join(chosen) or 'the configuration'} cannot be read, but each choice is a UTF-8 "
        f"file with a mapping of keys ({problem}); correct it"
    )


def _folder_error(text: str) -> str | None:
    """Return the message about a ``--config-dir`` that Hydra does not find."""
    match = re.search(r"Additional config directory '(.+)' not found", text)
    return no_config_dir(match[1]) if match else None


def no_config_dir(folder: str) -> str:
    """Return the message about a ``--config-dir`` that does not exist."""
    return (
        f"--config-dir is {folder}, but there is no such folder; name a folder with choices of "
        "your own"
    )


def _value_error(text: str, words: Sequence[str]) -> str | None:
    """Return the message about a value where another kind of value is expected."""
    if _NO_CHOICE in text:
        typed = [word for word in words if not word.startswith("-")]
        group, value = next(
            (override.key_or_group, str(override.input_line).partition("=")[2])
            for override in OverridesParser.create().parse_overrides(typed)
            if override.key_or_group in (*GROUPS, EXPERIMENT) or "/" in override.key_or_group
            if not isinstance(override.value(), str | list | dict)
        )
        return f"{group} is {value}, but a group takes the name of a choice; see widthopt --help"
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"{match[1]} is {match[2]}, but one run takes one value; add -m to run once for each, "
            "or write [a,b] for a list"
        )
    if match := re.search(r"Error merging override ([^=]+)=(.*)", text):
        return (
            f"{match[1]} is {match[2]}, but it replaces a value of another kind (a mapping, a list "
            "or a single value); see widthopt --help"
        )
    return None


def _keys(words: Sequence[str]) -> list[str]:
    """Return all keys, groups included, of the configuration with the choices among ``words``."""
    groups = (*GROUPS, EXPERIMENT, "hydra.searchpath", _LAUNCHER)
    chosen = [word for word in words if word.partition("=")[0] in groups and "," not in word]
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        try:
            composed = hydra_compose(CONFIG_NAME, overrides=chosen, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):  # the mistake may be in the choices
            composed = hydra_compose(CONFIG_NAME, return_hydra_config=True)
        launcher = OmegaConf.to_container(composed.hydra.launcher)
    config = OmegaConf.to_container(composed)
    assert isinstance(config, dict)
    del config["hydra"]
    config["hydra.launcher"] = launcher
    names: list[str] = []
    for group, values in config.items():
        names.append(str(group))
        if isinstance(values, dict):
            names += [f"{group!s}.{name!s}" for name in values if name != "_target_"]
    return names
