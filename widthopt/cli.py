"""The command ``widthopt``: a Hydra application with subcommands.

Torch, and every module that needs it, is imported only when a command computes something.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hydra_plugins.widthopt_launchers.workload import Failed
from widthopt.errors import InputError


logger = logging.getLogger("widthopt")

YES = "--yes"
"""The flag that starts a sweep without a question, however large it is."""

PAPER = (
    "fig3_width", "fig3_depth", "fig4_extrapolation", "fig5_resolution", "fig5_fraction",
    "fig6_compound", "table1",
)  # fmt: skip
"""Experiments that draw the paper's figures."""

WRONG_INPUT, FAILED, STOPPED = 2, 1, 130
"""Exit codes: wrong input, a failure while running, Ctrl-C."""


def main() -> None:
    """Run the command line of this process."""
    _append_current_folder()
    # Waiting OpenMP threads spin for a few microseconds. On a busy machine longer spinning slows
    # training down by a factor of three to ten; without spinning small networks take twice as
    # long on an idle machine. OpenMP reads the variables when torch is first imported.
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
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        from widthopt.config.messages import is_configuration_error, to_input_error  # noqa: PLC0415 (imports torch)

        if not is_configuration_error(error):
            raise
        _end(to_input_error(error, words), WRONG_INPUT)
    except KeyboardInterrupt as error:
        _end(str(error) or "stopped; the same command resumes from the last checkpoint", STOPPED)


def _append_current_folder() -> None:
    """Append the current folder to ``sys.path``: a user's own network may be a module there."""
    current = os.getcwd()  # noqa: PTH109 (as it stands in the path)
    sys.path[:] = [folder for folder in sys.path if folder not in ("", current)]
    sys.path.append(current)


class _Stderr(logging.StreamHandler[TextIO]):
    """A handler that looks up ``sys.stderr`` for each record, since a progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    """Print log records of level INFO; the log file of a run has those of level DEBUG too."""
    handler = _Stderr()
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def _end(message: object, code: int) -> NoReturn:
    sys.stderr.write(f"widthopt: {message}\n")
    sys.exit(code)


def _hydra() -> None:
    """Start Hydra, which composes a run, or a sweep with ``-m``."""
    import hydra_plugins.widthopt_launchers as launchers  # noqa: PLC0415 (only this command needs them)
    from hydra_plugins.widthopt_launchers.sweeper import check_once  # noqa: PLC0415

    launchers.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # `main` reports errors in one line
    check_once(sys.argv[1:])
    if YES in sys.argv:
        sys.argv[sys.argv.index(YES)] = "hydra.launcher.assume_yes=true"
    sys.argv[1:] = _options_last(sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path="pkg://widthopt.conf", config_name="config")(
            _run
        )()
    except Exception as error:
        from widthopt.training.loop import Interrupted  # noqa: PLC0415 (imports torch)

        if isinstance(error, Interrupted):  # raised by a run of a sweep in this process
            _end(error, STOPPED)
        raise


def _options_last(words: Sequence[str]) -> list[str]:
    """Move options behind the overrides, since Hydra accepts none between two overrides."""
    overrides: list[str] = []
    options: list[str] = []
    takes_value = False
    for word in words:
        option = word.startswith("-")
        belongs_to_option = option or (takes_value and "=" not in word and not word.startswith("~"))
        (options if belongs_to_option else overrides).append(word)
        takes_value = option and "=" not in word
    return [*overrides, *options]


def _run(config: DictConfig) -> None:
    """Run a composed configuration, and show its table and figures."""
    from widthopt.config.typed import build_request  # noqa: PLC0415 (imports torch)
    from widthopt.reporting.console import run_and_report  # noqa: PLC0415
    from widthopt.runs.execute import run_request  # noqa: PLC0415
    from widthopt.runs.point import SizedRequest  # noqa: PLC0415
    from widthopt.training.devices import resolve_device  # noqa: PLC0415
    from widthopt.training.distributed import process_group, rank  # noqa: PLC0415
    from widthopt.training.loop import Diverged, Interrupted  # noqa: PLC0415

    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if launcher != "inprocess":
        _end(
            f"hydra/launcher is {launcher}, but only a sweep has a launcher, and this is a single "
            "run; add -m",
            WRONG_INPUT,
        )
    try:
        request = build_request(config)
        with process_group(
            resolve_device(request.runtime), meeting=Path(request.root) / "meeting.json"
        ):
            if rank() == 0:
                run_and_report(request)
            else:
                for handler in logger.handlers:
                    handler.setLevel(logging.WARNING)
                run_request(SizedRequest(request), show=logger.debug)
    except InputError as error:
        _end(error, WRONG_INPUT)
    except Diverged as error:
        _end(error, FAILED)
    except Interrupted as error:
        _end(error, STOPPED)


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def _report(words: Sequence[str]) -> None:
    """``widthopt report [FIGURE, SWEEP or RUN ...] [--root FOLDER]``."""
    parser = _Parser(
        "widthopt report",
        description="Draw the figures and tables of sweeps from the available records, or compare "
        "runs side by side.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="names or prefixes of figures or sweeps, or folders of runs; default: all",
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder of all runs")
    arguments = parser.parse_args(words)
    from widthopt.reporting.compare import compare, runs  # noqa: PLC0415 (imports torch)
    from widthopt.reporting.sweeps import draw, select_sweeps, show  # noqa: PLC0415

    root = arguments.root
    folders = [folder for name in arguments.names if (folder := _folder(name, root))]
    if not folders:
        sweeps, only = select_sweeps(_existing(root), arguments.names)
        drawn = [sweep for sweep in sweeps if sweep.figures]
        if drawn:
            draw(root, drawn, only=only)
            return
        folders = [] if arguments.names else runs(root)
        if not folders and sweeps:
            show(root, sweeps)
            return
    if not folders:
        raise InputError(f"--root is {root}, but no run in it has a record; run one first")
    compare(folders, into=root / "report")


def _existing(root: Path) -> Path:
    """Return the root, which must exist.

    Raises:
        InputError: There is no such folder.
    """
    if not root.is_dir():
        raise InputError(
            f"--root is {root}, but there is no such folder; name the folder of your runs"
        )
    return root


def _folder(name: str, root: Path) -> Path | None:
    """Return the folder of a run, given its path or its name below the root."""
    if os.sep in name or Path(name).is_dir():
        return Path(name)
    return root / name if (root / name).is_dir() else None


def _status(words: Sequence[str]) -> None:
    """``widthopt status [SWEEP ...] [--root FOLDER] [--all] [--json]``."""
    parser = _Parser("widthopt status", description="Show the state of sweeps and their runs.")
    parser.add_argument("sweeps", nargs="*", help="names or prefixes of sweeps; default: all")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder of all runs")
    parser.add_argument("--all", action="store_true", help="list every run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    from widthopt.reporting.console import show_status  # noqa: PLC0415
    from widthopt.runs.manifest import load_manifests  # noqa: PLC0415
    from widthopt.sweeps.control import states  # noqa: PLC0415 (imports torch)

    root = _existing(arguments.root)
    tables = states(root, load_manifests(root, arguments.sweeps))
    if not tables and not arguments.json:
        print(f"no sweeps in {root}; widthopt report shows single runs")  # noqa: T201
    show_status(tables, as_json=arguments.json, every=arguments.all)


def _run_parser(name: str, text: str, *, what: str = "KEY") -> _Parser:
    """Return the parser of a command about one run or sweep."""
    parser = _Parser(f"widthopt {name}", description=text)
    parser.add_argument("name", metavar=what, help="name or prefix")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder of all runs")
    return parser


def _logs(words: Sequence[str]) -> None:
    """``widthopt logs KEY [-f] [--rank N] [--root FOLDER]``."""
    parser = _run_parser("logs", "Print the output of a run.")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="follow the output until the run ends"
    )
    parser.add_argument("--rank", type=int, default=0, help="the rank of the process")
    arguments = parser.parse_args(words)
    from widthopt.sweeps.control import logs, write  # noqa: PLC0415 (imports torch)

    rank, follow = arguments.rank, arguments.follow
    write(logs(arguments.root, arguments.name, rank=rank, follow=follow))


def _show(words: Sequence[str]) -> None:
    """``widthopt show KEY [--root FOLDER]``."""
    arguments = _run_parser("show", "Show everything recorded for a run, as JSON.").parse_args(
        words
    )
    from widthopt.sweeps.control import show  # noqa: PLC0415 (imports torch)

    sys.stdout.write(json.dumps(show(arguments.root, arguments.name), indent=2) + "\n")


def _cancel(words: Sequence[str]) -> None:
    """``widthopt cancel SWEEP|KEY [--force] [--root FOLDER]``."""
    parser = _run_parser("cancel", "Cancel the jobs of a sweep or of a run.", what="SWEEP|KEY")
    parser.add_argument("--force", action="store_true", help="also jobs that other sweeps need")
    arguments = parser.parse_args(words)
    from widthopt.sweeps.control import cancel  # noqa: PLC0415 (imports torch)

    cancelled = cancel(arguments.root, arguments.name, force=arguments.force)
    sys.stdout.write("".join(f"{name}\n" for name in cancelled))
    logger.info("%d jobs cancelled", len(cancelled))


def _doctor(words: Sequence[str]) -> None:
    """``widthopt doctor [hydra/launcher=...] [OVERRIDE ...] [--root FOLDER] [--job]``."""
    parser = _Parser(
        "widthopt doctor", description="Check the folder of runs, SLURM and a compute node."
    )
    parser.add_argument("overrides", nargs="*", help="hydra/launcher=... and its keys")
    parser.add_argument("--config-dir", help="a folder with choices of your own")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder of all runs")
    parser.add_argument(
        "--job", action="store_true", help="submit a job that checks a compute node"
    )
    arguments = parser.parse_intermixed_args(words)
    from hydra_plugins.widthopt_launchers.doctor import checks  # noqa: PLC0415
    from widthopt.config.compose import compose_launcher  # noqa: PLC0415 (imports torch)

    overrides = ["hydra/launcher=slurm", *arguments.overrides]
    if any(word.startswith("hydra/launcher=") for word in arguments.overrides):
        overrides = arguments.overrides
    values, device = compose_launcher(overrides, config_dir=arguments.config_dir)
    if "setup" not in values:
        raise InputError(
            "hydra/launcher does not submit to SLURM, but doctor checks launchers that do; use "
            "hydra/launcher=slurm or one of your own"
        )
    options = {
        key: value
        for key, value in values.items()
        if key not in {"_target_", "workload", "assume_yes"}
    }
    failures = 0
    for check in checks(arguments.root, options, device=device, job=arguments.job):
        mark = "ok  " if check.passed else "FAIL"
        sys.stdout.write(f"{mark} {check.name:<15} {check.message}\n")
        sys.stdout.flush()
        failures += not check.passed
    if failures:
        raise Failed(f"{failures} checks failed; fix the lines marked FAIL")


def _retry(words: Sequence[str]) -> None:
    """``widthopt retry SWEEP|KEY [--root FOLDER]``."""
    text = "Run again what failed or is missing, from its spec, with the current code."
    arguments = _run_parser("retry", text, what="SWEEP|KEY").parse_args(words)
    from widthopt.sweeps.control import retry  # noqa: PLC0415 (imports torch)

    retry(arguments.root, arguments.name)


def _run_again(words: Sequence[str]) -> None:
    """``widthopt run KEY [--root FOLDER]``."""
    arguments = _run_parser("run", "Run one run of a sweep in this process.").parse_args(words)
    from widthopt.sweeps.control import run_now  # noqa: PLC0415 (imports torch)
    from widthopt.training.loop import Diverged, Interrupted  # noqa: PLC0415

    try:
        run_now(arguments.root, arguments.name)
        logger.info("%s is done", arguments.name)
    except Diverged as error:
        _end(error, FAILED)
    except Interrupted as error:
        _end(error, STOPPED)


def _dashboard(words: Sequence[str]) -> None:
    """``widthopt dashboard show|push [EXPERIMENT ...] [--project P] [--entity E]``."""
    parser = _Parser(
        "widthopt dashboard",
        description="Show the W&B dashboard of the paper's figures as JSON, or send it.",
    )
    parser.add_argument("what", choices=["show", "push"], help="print its JSON, or send it")
    parser.add_argument(
        "experiments", nargs="*", help="experiments with the figures; default: the paper's"
    )
    parser.add_argument("--config-dir", help="a folder with choices of your own")
    parser.add_argument("--project", help="W&B project; default: tracking.project")
    parser.add_argument("--entity", help="W&B user or team; default: tracking.entity")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder of all runs")
    arguments = parser.parse_args(words)
    from widthopt.config.compose import compose  # noqa: PLC0415 (imports torch)
    from widthopt.reporting import dashboard  # noqa: PLC0415
    from widthopt.request import FigureSpec  # noqa: PLC0415
    from widthopt.tracking.secrets import error_line  # noqa: PLC0415

    tracking = compose([]).tracking
    project: str = arguments.project or tracking.project
    entity: str | None = arguments.entity or tracking.entity
    if arguments.what == "push" and entity is None:
        raise InputError(
            "--entity is missing, but a dashboard belongs to a user or team; add --entity=..."
        )
    experiments = arguments.experiments or PAPER
    figures: dict[str, FigureSpec] = {}
    for name in experiments:
        request = compose([f"experiment={name}"], config_dir=arguments.config_dir)
        for figure in request.figures:
            figures.setdefault(figure.name, figure)
    shown = dashboard.sections(figures.values())
    if entity is None or arguments.what == "show":
        sys.stdout.write(
            dashboard.as_json(dashboard.workspace(shown, project=project, entity=entity)) + "\n"
        )
        return
    sent = arguments.root / "dashboard.json"
    try:
        urls = dashboard.push(shown, project=project, entity=entity, sent=sent)
    except InputError:
        raise
    except Exception as error:
        raise Failed(
            f"the dashboard was not sent ({error_line(error)}); run the same command again"
        ) from error
    for url in urls:
        logger.info("%s", url)


def _sync(words: Sequence[str]) -> None:
    """``widthopt sync [SWEEP ...] [--root FOLDER] [--pause S] [--dry-run]``."""
    parser = _Parser(
        "widthopt sync",
        description="Send offline runs to Weights & Biases. A second call sends only what is new. "
        "Needs `wandb login` once.",
    )
    parser.add_argument("sweeps", nargs="*", help="names or prefixes of sweeps; default: all runs")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder of all runs")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two runs")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent")
    arguments = parser.parse_args(words)
    if not arguments.pause >= 0:
        raise InputError(
            f"--pause is {arguments.pause:g}, but it is a number of at least 0; correct it"
        )
    from widthopt.tracking.send import sync, tracked_runs  # noqa: PLC0415

    root, names = _existing(arguments.root), None
    if arguments.sweeps:
        from widthopt.reporting.sweeps import figures_run  # noqa: PLC0415
        from widthopt.runs.manifest import load_manifests  # noqa: PLC0415

        chosen = load_manifests(root, arguments.sweeps)
        names = {name for sweep in chosen for name in (*sweep.runs, figures_run(sweep))}
    runs = tracked_runs(root, names)
    if arguments.dry_run:
        left = [files.folder.name for files in runs if not files.is_fully_synced]
        for name in left:
            sys.stdout.write(f"{name}\n")
        logger.info("%d of %d runs are to be sent", len(left), len(runs))
        return
    counts = {"sent": 0, "known": 0, "running": 0, "refused": 0}
    for name, state, reason in sync(runs, pause_seconds=arguments.pause):
        counts[state] += 1
        if state == "sent":
            logger.info("%s", name)
        elif state == "refused":
            logger.warning("%s was not sent (%s)", name, reason)
    sent, known, running, refused = counts.values()
    logger.info("%d sent, %d had been sent before, %d still run", sent, known, running)
    if refused:
        raise Failed(f"{refused} were not sent; run the same command again")


def _plan(words: Sequence[str]) -> None:
    """``widthopt plan [OVERRIDE ...] [--config-dir FOLDER] [--nodes N] [--rate R] [--json]``."""
    parser = _Parser(
        "widthopt plan", description="Show the runs of a command and their cost; starts nothing."
    )
    parser.add_argument("overrides", nargs="*", help="as for widthopt itself")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="no effect: swept values are recognised"
    )
    parser.add_argument("--config-dir", help="a folder with choices of your own")
    parser.add_argument(
        "--nodes", type=int, default=1, help="number of nodes with eight accelerators"
    )
    parser.add_argument(
        "--rate", type=float, help="MACs per second of one accelerator; default: a V100"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args(words)
    for name, value in (("--nodes", arguments.nodes), ("--rate", arguments.rate)):
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value:g}, but it is a number above 0; correct it")
    from hydra_plugins.widthopt_launchers.sweeper import check_once  # noqa: PLC0415
    from widthopt.config.compose import compose_sweep  # noqa: PLC0415 (imports torch)
    from widthopt.reporting.console import show_plan  # noqa: PLC0415
    from widthopt.runs.plan import GPU_MACS_PER_SECOND, Plan  # noqa: PLC0415

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
        "widthopt macs", description="Show MACs, parameters and width variables of the target."
    )
    parser.add_argument("overrides", nargs="*", help="as for widthopt itself")
    parser.add_argument("--config-dir", help="a folder with choices of your own")
    parser.add_argument("--channels", type=Path, help="JSON file with channel counts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args(words)
    from widthopt.config.compose import compose  # noqa: PLC0415 (imports torch)
    from widthopt.reporting.console import show_macs  # noqa: PLC0415

    show_macs(
        compose(arguments.overrides, config_dir=arguments.config_dir),
        channels=arguments.channels,
        as_json=arguments.json,
    )
