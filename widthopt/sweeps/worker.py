"""One run of a sweep, from what was written down of it.

Launchers know `perform` by name alone (``conf/hydra/launcher``).
"""

import json
import os
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from widthopt.config.typed import build_request
from widthopt.errors import InputError
from widthopt.runs.execute import log_to_file, run_search, run_training
from widthopt.runs.point import SizedRequest
from widthopt.runs.states import current_job
from widthopt.runs.store import Store
from widthopt.training import distributed
from widthopt.training.loop import Interrupted


FORMAT = 2
"""Version of what is frozen of a run."""


_SPECIFIED = {"kind", "method", "seed", "needs", "figures", "home", "config"}


def launch_folder(spec: Path) -> Path | None:
    """The folder that a frozen run was given in, if it is still there.

    Raises:
        InputError: There is no frozen run at this path.
    """
    folder = Path(read_spec(spec)["home"])
    return folder if folder.is_dir() else None


def read_spec(spec: Path) -> dict[str, Any]:
    """What `Sweep.write_spec` wrote.

    Raises:
        InputError: It is not there, or something else.
    """
    content: dict[str, Any] = {}
    try:
        content = json.loads(spec.read_text("utf-8"))
        known = content.keys() >= _SPECIFIED
        fault = "" if known and content["format"] == FORMAT else "of another version"
    except (OSError, KeyError, AttributeError, ValueError) as error:
        fault = str(error)
    if fault:
        raise InputError(
            f"{spec} is no frozen run ({fault}), but one is needed; give the same sweep again"
        )
    return content


def run_spec(spec: Path) -> None:
    """Do the run that was frozen at this path; done before, it is not done again.

    Raises:
        InputError: What it needs is not there, or it cannot be done.
    """
    content = read_spec(spec)
    rank = int(os.environ.get("RANK", "0"))
    try:
        _run_spec(spec, content, rank)
    except Exception as error:
        if not isinstance(error, Interrupted | _Unready):
            # Said already if it went wrong inside the stage; here it may not have come so far.
            for stage in Store(spec.parent.parent).entries(content["kind"]):
                if stage.folder.name == spec.parent.name:
                    stage.fail(error, rank=rank)
        raise


class _Unready(InputError):  # noqa: N818 (the name is what it is)
    """What a run needs is not done: no failure of its own."""


def _run_spec(spec: Path, content: Mapping[str, Any], rank: int) -> None:
    method, seed, needs = content["method"], content["seed"], content["needs"]
    spec = spec.resolve()
    root = spec.parents[2]  # it is <root>/stages/<name>/spec.json
    start = f"{current_job() or 'here'}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    meeting = spec.parent / f".meeting-{start}.json"
    log = f"log-{rank}.txt" if rank else "log.txt"
    with chdir(launch_folder(spec) or "."):
        request = build_request(OmegaConf.create({**content["config"], "root": str(root)}))
        point = SizedRequest(request, figures=content["figures"])
        staged = point.search_entry if content["kind"] == "search" else point.train_entry
        meant = staged(method, seed).folder.name
        if meant != spec.parent.name:
            raise InputError(
                f"{spec.parent.name}/spec.json is of another run ({meant}), but what it says names "
                "its folder; give the same sweep again"
            )
        with (
            distributed.process_group(point.device, meeting=meeting),
            log_to_file(spec.parent / log),
        ):
            if content["kind"] == "search":
                run_search(point, method, seed)
                return
            if needs and point.search_entry(method, seed).result() is None:
                raise _Unready(
                    f"{spec.parent.name} is a training that needs {needs[0]}, but that is not "
                    "done; do it first"
                )
            run_training(point, method, seed)
