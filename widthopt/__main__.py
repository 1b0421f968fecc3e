"""The command: a Hydra application, and the words that may stand first instead.

torch and everything that needs it is imported only once there is something to compute.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launchers.work import Failed
from widthopt.errors import InputError


logger = logging.getLogger("widthopt")

YES = "--yes"
"""A sweep's flag: do not ask, however much it is."""

PAPER = (
    "fig3_width", "fig3_depth", "fig4_extrapolation", "fig5_resolution", "fig5_fraction",
    "fig6_compound", "table1",
)  # fmt: skip
"""Experiments that draw the paper's figures."""

WRONG_INPUT, FAILED, STOPPED = 2, 1, 130
"""Exit codes: what was asked for cannot be done; it went wrong; Ctrl-C."""


def main() -> None:
    """Run the command that the process was started with."""
    _find_ours_first()
    # Threads that wait may spin for some microseconds only: where there is other work on the
    # machine, longer spinning slows training three to ten times, and none at all makes small
    # networks half as fast on an idle one. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _log_to_stderr()
    words = sys.argv[1:]
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "cancel": _cancel,
        "dashboard": _dashboard,
        "doctor": _doctor,
        "logs": _logs,
        "macs": _macs,
        "plan": _plan,
        "report": _report,
        "retry": _retry,
        "run": _run_again,
        "show": _show,
        "status": _status,
        "sync": _sync,
    }
    try:
        if words and words[0] in commands:
            commands[words[0]](words[1:])
        else:
            _hydra()
    except InputError as error:
        _end(error, WRONG_INPUT)
    except Failed as error:
        _end(error, FAILED)
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        from widthopt.config import of_configuration, refusal  # noqa: PLC0415 (imports torch)

        if not of_configuration(error):
            raise
        _end(refusal(error, words), WRONG_INPUT)
    except KeyboardInterrupt as error:
        _end(str(error) or "stopped; the same command goes on from the last checkpoint", STOPPED)


def _find_ours_first() -> None:
    """Let a user's own network be found in the current folder, but not a ``conf`` of theirs."""
    here = os.getcwd()  # noqa: PTH109 (as it stands in the path)
    sys.path[:] = [folder for folder in sys.path if folder not in ("", here)]
    for name in ("conf", "launchers"):
        with suppress(ModuleNotFoundError):  # run from a checkout that is not installed
            import_module(name)
    sys.path.append(here)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is now: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    """Show what is logged; a run's own log file has the details as well."""
    handler = _Stderr()
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def _end(message: object, code: int) -> NoReturn:
    sys.stderr.write(f"widthopt: {message}\n")
    sys.exit(code)


def _hydra() -> None:
    """Compose and run, or sweep with ``-m``, as Hydra applications do."""
    import launchers  # noqa: PLC0415 (Hydra's launchers register when they are wanted)
    from launchers.sweeper import check_once  # noqa: PLC0415

    launchers.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to `main`, which words them
    check_once(sys.argv[1:])
    if YES in sys.argv:
        sys.argv[sys.argv.index(YES)] = "hydra.launcher.sure=true"
    sys.argv[1:] = _options_last(sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(_run)()
    except Exception as error:
        from widthopt.training import Interrupted  # noqa: PLC0415 (imports torch)

        if isinstance(error, Interrupted):  # of a run in a sweep in this process
            _end(error, STOPPED)
        raise


def _options_last(words: Sequence[str]) -> list[str]:
    """The overrides, then options with what they take: Hydra reads none between two overrides."""
    overrides: list[str] = []
    options: list[str] = []
    takes = False
    for word in words:
        option = word.startswith("-")
        own = option or (takes and "=" not in word and not word.startswith("~"))
        (options if own else overrides).append(word)
        takes = option and "=" not in word
    return [*overrides, *options]


def _run(config: DictConfig) -> None:
    """One run of Hydra's: from a composed configuration to the table and the figures."""
    from widthopt.config import request  # noqa: PLC0415 (imports torch)
    from widthopt.devices import resolve_device  # noqa: PLC0415
    from widthopt.distributed import rank, together  # noqa: PLC0415
    from widthopt.pipeline import Point, run  # noqa: PLC0415
    from widthopt.report import report  # noqa: PLC0415
    from widthopt.training import Diverged, Interrupted  # noqa: PLC0415

    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if launcher != "inprocess":
        _end(
            f"hydra/launcher is {launcher}, but that starts sweeps, and this is a single run in "
            "this process; add -m",
            WRONG_INPUT,
        )
    try:
        asked = request(config)
        with together(resolve_device(asked.runtime), meeting=Path(asked.root) / "meeting.json"):
            if rank() == 0:
                report(asked)
            else:
                for handler in logger.handlers:
                    handler.setLevel(logging.WARNING)
                run(Point(asked), show=logger.debug)
    except InputError as error:
        _end(error, WRONG_INPUT)
    except Diverged as error:
        _end(error, FAILED)
    except Interrupted as error:
        _end(error, STOPPED)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def _report(words: Sequence[str]) -> None:
    """``widthopt report [FIGURE, SWEEP or RUN ...] [--root FOLDER]``."""
    parser = _Parser(
        "widthopt report",
        description="The figures and tables of sweeps, from the records there are; or runs side by "
        "side.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="how the names of figures or sweeps begin, or folders of runs; all by default",
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are kept")
    arguments = parser.parse_args(words)
    from widthopt.report import compare, runs  # noqa: PLC0415 (imports torch)
    from widthopt.sweeps import asked_for, draw, show  # noqa: PLC0415

    root = arguments.root
    folders = [folder for name in arguments.names if (folder := _folder(name, root))]
    if not folders:
        found, only = asked_for(_existing(root), arguments.names)
        drawn = [one for one in found if one.figures]
        if drawn:
            draw(root, drawn, only=only)
            return
        folders = [] if arguments.names else runs(root)
        if not folders and found:
            show(root, found)
            return
    if not folders:
        raise InputError(f"--root is {root}, but no run there has a record; run one first")
    compare(folders, into=root / "report")


def _existing(root: Path) -> Path:
    """A root that is read.

    Raises:
        InputError: There is no such folder.
    """
    if not root.is_dir():
        raise InputError(
            f"--root is {root}, but there is no such folder; name the one that runs are kept in"
        )
    return root


def _folder(name: str, root: Path) -> Path | None:
    """The folder of a run that a word names, by its path or as it is called below a root."""
    if os.sep in name or Path(name).is_dir():
        return Path(name)
    return root / name if (root / name).is_dir() else None


def _status(words: Sequence[str]) -> None:
    """``widthopt status [SWEEP ...] [--root FOLDER] [--all] [--json]``."""
    parser = _Parser("widthopt status", description="How far sweeps are.")
    parser.add_argument("sweeps", nargs="*", help="how their names begin; all by default")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--all", action="store_true", help="name every run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    from widthopt.control import states  # noqa: PLC0415 (imports torch)
    from widthopt.report import show_status  # noqa: PLC0415
    from widthopt.sweeps import manifests  # noqa: PLC0415

    root = _existing(arguments.root)
    tables = states(root, manifests(root, arguments.sweeps))
    if not tables and not arguments.json:
        print(f"no sweeps in {root}; widthopt report shows single runs")  # noqa: T201
    show_status(tables, as_json=arguments.json, every=arguments.all)


def _one(name: str, text: str, *, what: str = "KEY") -> _Parser:
    """A parser of a command about one run, or about a sweep too."""
    parser = _Parser(f"widthopt {name}", description=text)
    parser.add_argument("name", metavar=what, help="its name, or how it begins")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are kept")
    return parser


def _logs(words: Sequence[str]) -> None:
    """``widthopt logs KEY [-f] [--rank N] [--root FOLDER]``."""
    parser = _one("logs", "What a run has printed.")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument("--rank", type=int, default=0, help="which of its processes")
    arguments = parser.parse_args(words)
    from widthopt.control import logs, write  # noqa: PLC0415 (imports torch)

    rank, follow = arguments.rank, arguments.follow
    write(logs(arguments.root, arguments.name, rank=rank, follow=follow))


def _show(words: Sequence[str]) -> None:
    """``widthopt show KEY [--root FOLDER]``."""
    arguments = _one("show", "All that is known of a run, as JSON.").parse_args(words)
    from widthopt.control import show  # noqa: PLC0415 (imports torch)

    sys.stdout.write(json.dumps(show(arguments.root, arguments.name), indent=2) + "\n")


def _cancel(words: Sequence[str]) -> None:
    """``widthopt cancel SWEEP|KEY [--force] [--root FOLDER]``."""
    parser = _one("cancel", "End the jobs of a sweep or of a run.", what="SWEEP|KEY")
    parser.add_argument("--force", action="store_true", help="also what other sweeps need")
    arguments = parser.parse_args(words)
    from widthopt.control import cancel  # noqa: PLC0415 (imports torch)

    ended = cancel(arguments.root, arguments.name, force=arguments.force)
    sys.stdout.write("".join(f"{name}\n" for name in ended))
    logger.info("%d jobs were ended", len(ended))


def _doctor(words: Sequence[str]) -> None:
    """``widthopt doctor [hydra/launcher=...] [OVERRIDE ...] [--root FOLDER] [--job]``."""
    parser = _Parser(
        "widthopt doctor", description="Check this site: its folder, its SLURM, its nodes."
    )
    parser.add_argument("overrides", nargs="*", help="hydra/launcher=... and its values")
    parser.add_argument("--config-dir", help="a folder of further choices")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--job", action="store_true", help="send a job that looks at a node")
    arguments = parser.parse_intermixed_args(words)
    from launchers.doctor import checks  # noqa: PLC0415
    from widthopt.config import launcher  # noqa: PLC0415 (imports torch)

    overrides = ["hydra/launcher=slurm", *arguments.overrides]
    if any(word.startswith("hydra/launcher=") for word in arguments.overrides):
        overrides = arguments.overrides
    values, device = launcher(overrides, config_dir=arguments.config_dir)
    if "setup" not in values:
        raise InputError(
            "hydra/launcher is none of SLURM's, but those are what is checked; use "
            "hydra/launcher=slurm or one of your own"
        )
    options = {key: one for key, one in values.items() if key not in {"_target_", "work", "sure"}}
    bad = 0
    for one in checks(arguments.root, options, device=device, job=arguments.job):
        sys.stdout.write(f"{'ok ' if one.well else 'BAD'} {one.what:<15} {one.said}\n")
        sys.stdout.flush()
        bad += not one.well
    if bad:
        raise Failed(f"{bad} of the checks went badly; correct what they name")


def _retry(words: Sequence[str]) -> None:
    """``widthopt retry SWEEP|KEY [--root FOLDER]``."""
    text = "Do again what failed or is missing, as it was frozen, with the code of today."
    arguments = _one("retry", text, what="SWEEP|KEY").parse_args(words)
    from widthopt.control import retry  # noqa: PLC0415 (imports torch)

    retry(arguments.root, arguments.name)


def _run_again(words: Sequence[str]) -> None:
    """``widthopt run KEY [--root FOLDER]``."""
    arguments = _one("run", "Do one run of a sweep here and now.").parse_args(words)
    from widthopt.control import do  # noqa: PLC0415 (imports torch)
    from widthopt.training import Diverged, Interrupted  # noqa: PLC0415

    try:
        do(arguments.root, arguments.name)
        logger.info("%s is done", arguments.name)
    except Diverged as error:
        _end(error, FAILED)
    except Interrupted as error:
        _end(error, STOPPED)


def _dashboard(words: Sequence[str]) -> None:
    """``widthopt dashboard show|push [EXPERIMENT ...] [--project P] [--entity E]``."""
    parser = _Parser(
        "widthopt dashboard",
        description="Weights & Biases' dashboard of the paper's figures: as JSON, or sent.",
    )
    parser.add_argument("what", choices=["show", "push"], help="print its JSON, or send it")
    parser.add_argument("experiments", nargs="*", help="whose figures; the paper's by default")
    parser.add_argument("--config-dir", help="a folder of further choices")
    parser.add_argument("--project", help="W&B's project; tracking.project by default")
    parser.add_argument("--entity", help="a user or team; tracking.entity by default")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are kept")
    arguments = parser.parse_args(words)
    from widthopt import dashboard  # noqa: PLC0415
    from widthopt.config import compose  # noqa: PLC0415 (imports torch)
    from widthopt.tracking.secrets import error_line  # noqa: PLC0415

    experiments = arguments.experiments or PAPER
    figures: dict[str, Any] = {}
    for name in experiments:
        asked = compose([f"experiment={name}"], config_dir=arguments.config_dir)
        for one in asked.figures:
            figures.setdefault(one.name, one)
    shown = dashboard.sections(figures.values())
    tracking = compose([]).tracking
    project: str = arguments.project or tracking.project
    entity: str | None = arguments.entity or tracking.entity
    if arguments.what == "show":
        sys.stdout.write(
            dashboard.as_json(dashboard.workspace(shown, project=project, entity=entity)) + "\n"
        )
        return
    if entity is None:
        raise InputError("--entity is missing, but a dashboard belongs to one; add --entity=...")
    sent = arguments.root / "dashboard.json"
    try:
        urls = dashboard.push(shown, project=project, entity=entity, sent=sent)
    except InputError:
        raise
    except Exception as error:
        raise Failed(
            f"the dashboard was not sent ({error_line(error)}); the same command sends it again"
        ) from error
    for url in urls:
        logger.info("%s", url)


def _sync(words: Sequence[str]) -> None:
    """``widthopt sync [SWEEP ...] [--root FOLDER] [--pause S] [--dry-run]``."""
    parser = _Parser(
        "widthopt sync",
        description="Send to Weights & Biases what was tracked offline; again it sends only what "
        "is new. Needs `wandb login` once.",
    )
    parser.add_argument("sweeps", nargs="*", help="how their names begin; all runs by default")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two runs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent")
    arguments = parser.parse_args(words)
    if not arguments.pause >= 0:
        raise InputError(f"--pause is {arguments.pause:g}, but it is from 0 up; correct it")
    from widthopt.tracking.send import sync, tracked_runs  # noqa: PLC0415

    root, names = _existing(arguments.root), None
    if arguments.sweeps:
        from widthopt.sweeps import figures_run, manifests  # noqa: PLC0415

        chosen = manifests(root, arguments.sweeps)
        names = {name for one in chosen for name in (*one.runs, figures_run(one))}
    runs = tracked_runs(root, names)
    if arguments.dry_run:
        left = [files.folder.name for files in runs if not files.is_fully_synced]
        for name in left:
            sys.stdout.write(f"{name}\n")
        logger.info("%d of %d runs are to be sent", len(left), len(runs))
        return
    counts = {"sent": 0, "known": 0, "running": 0, "refused": 0}
    for name, state, why in sync(runs, pause_seconds=arguments.pause):
        counts[state] += 1
        if state == "sent":
            logger.info("%s", name)
        elif state == "refused":
            logger.warning("%s was not sent (%s)", name, why)
    sent, known, running, refused = counts.values()
    logger.info("%d sent, %d had been sent before, %d still run", sent, known, running)
    if refused:
        raise Failed(f"{refused} were not sent; the same command goes on with the rest")


def _plan(words: Sequence[str]) -> None:
    """``widthopt plan [OVERRIDE ...] [--config-dir FOLDER] [--nodes N] [--rate R] [--json]``."""
    parser = _Parser(
        "widthopt plan", description="What a run or a sweep would do, and what it costs."
    )
    parser.add_argument("overrides", nargs="*", help="as for widthopt itself")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="of no effect: what is swept is seen"
    )
    parser.add_argument("--config-dir", help="a folder of further choices")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of eight accelerators")
    parser.add_argument("--rate", type=float, help="MACs per second of one; a V100's by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args(words)
    for name, value in (("--nodes", arguments.nodes), ("--rate", arguments.rate)):
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value:g}, but it is above 0; correct it")
    from launchers.sweeper import check_once  # noqa: PLC0415
    from widthopt.config import compose_sweep  # noqa: PLC0415 (imports torch)
    from widthopt.planning import GPU_MACS_PER_SECOND, Plan  # noqa: PLC0415
    from widthopt.report import show_plan  # noqa: PLC0415

    check_once(arguments.overrides)
    requests = compose_sweep(arguments.overrides, config_dir=arguments.config_dir)
    plan = Plan.of(requests, images=False)
    show_plan(
        plan,
        plan.states(),
        as_json=arguments.json,
        nodes=arguments.nodes,
        macs_per_second=arguments.rate or GPU_MACS_PER_SECOND,
    )


def _macs(words: Sequence[str]) -> None:
    """``widthopt macs [OVERRIDE ...] [--channels FILE] [--config-dir FOLDER] [--json]``."""
    parser = _Parser(
        "widthopt macs", description="MACs, parameters and width variables of the target."
    )
    parser.add_argument("overrides", nargs="*", help="as for widthopt itself")
    parser.add_argument("--config-dir", help="a folder of further choices")
    parser.add_argument("--channels", type=Path, help="a JSON file of channel counts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args(words)
    from widthopt.config import compose  # noqa: PLC0415 (imports torch)
    from widthopt.report import show_macs  # noqa: PLC0415

    show_macs(
        compose(arguments.overrides, config_dir=arguments.config_dir),
        channels=arguments.channels,
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
