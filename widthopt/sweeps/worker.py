"""Do one run of a sweep from its spec.

Launchers import `run_spec` by its dotted name (``run_spec`` in ``conf/hydra/launcher``).
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


FORMAT = 3
"""Version of the format of a spec."""


_KEYS = {"kind", "method", "seed", "needs", "figures", "home", "config"}


def launch_folder(spec: Path) -> Path | None:
    """Return the folder in which the sweep of a spec was started, or None if it is gone.

    Raises:
        InputError: There is no spec at this path.
    """
    folder = Path(read_spec(spec)["home"])
    return folder if folder.is_dir() else None


def read_spec(spec: Path) -> dict[str, Any]:
    """Read a spec that `Sweep.write_spec` wrote.

    Raises:
        InputError: The file does not exist, or it is not a spec of this version.
    """
    content: dict[str, Any] = {}
    try:
        content = json.loads(spec.read_text("utf-8"))
        known = content.keys() >= _KEYS
        reason = "" if known and content["format"] == FORMAT else "of another version"
    except (OSError, KeyError, AttributeError, ValueError) as error:
        reason = str(error)
    if reason:
        raise InputError(
            f"{spec} is not the spec of a run ({reason}), but it must be one; start the same sweep "
            "again"
        )
    return content


def run_spec(spec: Path) -> None:
    """Do the run of a spec, unless its result is in the store.

    Raises:
        InputError: A run that it needs is not done, or the spec cannot be used.
    """
    content = read_spec(spec)
    rank = int(os.environ.get("RANK", "0"))
    try:
        _run_spec(spec, content, rank)
    except Exception as error:
        if not isinstance(error, Interrupted | _Unready):
            # Errors inside of the claim are recorded already. This records earlier ones.
            for entry in Store(spec.parent.parent).entries(content["kind"]):
                if entry.folder.name == spec.parent.name:
                    entry.fail(error, rank=rank)
        raise


class _Unready(InputError):  # noqa: N818 (not an error of the run)
    """A run that this run needs is not done."""


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
        entry_of = point.search_entry if content["kind"] == "search" else point.train_entry
        expected = entry_of(method, seed).folder.name
        if expected != spec.parent.name:
            raise InputError(
                f"{spec.parent.name}/spec.json belongs to another run ({expected}), but it must "
                "belong to its folder; start the same sweep again"
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
