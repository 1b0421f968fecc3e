"""A real SLURM of emulated nodes on this machine's loopback, started and stopped by tests.

What makes a cluster is a folder that holds all its files, the environment variable
``SLURM_CONF``, by which its processes and its clients know it, and a line in ``/etc/hosts``. That
line makes the nodes' names known, as those who take a job's first node for the address to meet at
need it; and it reserves the cluster's ports.
"""

import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self


_ADDRESS = "127.0.0.1"
_DAEMONS = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"}
_GPUS = 8
_HOSTS = Path("/etc/hosts")
_MARK = "# loopback-slurm"
_PATIENCE_SECONDS = 60.0
_SAVING_SECONDS = 6.0
"""The controller saves its state within five seconds of a change."""
_PORTS = range(10_000, 20_000, 500)
"""Beginnings of blocks. What is above is for the jobs' own meetings and for the kernel's choice."""
_FOLDER_LENGTH = 70
"""At most; below it are unix sockets, whose paths have 107 characters at most."""


class ClusterError(RuntimeError):
    """A cluster, or a command on it, did not do what it was to do; says why."""


class _Process(NamedTuple):
    pid: int
    name: str
    node: str | None


class Cluster:
    """A SLURM cluster of ``node1``, ``node2``, ...; as a context, started and stopped.

    Each node claims to have 80 CPUs, 512 GB, and 8 GPUs of the type ``v100``. The partitions are
    ``main``, which is the default, ``high``, whose jobs take the place of others, and ``short``,
    which allows 5 minutes. Jobs are ordinary processes of this machine and belong to root.

    A cluster whose owner was killed is stopped when the next one starts.

    Args:
        nodes: How many, up to 80.
        accounting: Whether there is a database of jobs; without it, `sacct` fails.
        max_array: The end of an array's indices, exclusive.
        settings: Further lines of ``slurm.conf``, or other values for those that it has.
    """

    def __init__(
        self,
        nodes: int = 3,
        *,
        accounting: bool = True,
        max_array: int = 1001,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        assert 1 <= nodes <= 80, nodes
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.accounting, self.max_array, self.settings = accounting, max_array, settings or {}
        self._folder: Path | None = None
        self._owner: IO[str] | None = None

    @staticmethod
    def obstacle() -> str:
        """Why no cluster can be started here, or an empty string."""
        if os.geteuid() != 0:
            return "a cluster is started by root, for slurmd starts jobs as whom they belong to"
        for command in ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd"):
            if shutil.which(command) is None:
                return f"{command} is not installed, but a cluster needs it; run `make test-slurm`"
        named = ["unshare", "--uts", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]  # noqa: S108
        if subprocess.run(named, capture_output=True, check=False).returncode:  # noqa: S603 (ours)
            return (
                "a process may not have a host name or mounts of its own here, but nodes need both"
            )
        return ""

    @property
    def folder(self) -> Path:
        """Where everything of it is, its ``log`` among it; only while it is started."""
        assert self._folder is not None, "this cluster is not started"
        return self._folder

    @property
    def scratch(self) -> Path:
        """A folder that is another one on each node, and on the login node."""
        return self.folder / "scratch"

    @property
    def environment(self) -> dict[str, str]:
        """What a client of this cluster has in its environment."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    # ------------------------------------------------------------------------- start and stop

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until all its nodes are idle.

        Raises:
            ClusterError: It cannot be started here, or did not start; what its logs say.
        """
        assert self._folder is None, "this cluster is started already"
        if obstacle := self.obstacle():
            raise ClusterError(obstacle)
        _stop_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        try:
            self._start()
        except BaseException as error:
            ends = self._log_ends()
            self.stop()
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}\n{ends}") from error
            raise

    def stop(self) -> None:
        """End all its processes, those of its jobs among them, and remove all that it made."""
        if self._folder is None:
            return
        # All at once: nothing that they would still put in order is kept.
        self._kill(lambda _: True)
        _unreserve(self.folder)
        shutil.rmtree(self.folder)
        if self._owner is not None:
            self._owner.close()
        self._folder = self._owner = None

    def _start(self) -> None:
        self.folder.chmod(0o755)  # munged's clients must get to its socket
        if len(str(self.folder)) > _FOLDER_LENGTH:
            raise ClusterError(
                f"TMPDIR is {self.folder.parent}, but unix sockets need a short path; set another"
            )
        for name in (
            "etc",
            "run",
            "log",
            "dev",
            "scratch",
            *(f"spool/{node}" for node in self.nodes),
        ):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        for name in ("munge", "database", "state"):
            (self.folder / name).mkdir(mode=0o700)
        self._owner = _take_ownership(self.folder)
        assert self._owner is not None
        port = _reserve(self.folder, self.nodes)
        for node in self.nodes:
            if (found := socket.gethostbyname(node)) != _ADDRESS:
                raise ClusterError(f"{node} is {found}, but it must be {_ADDRESS}; see {_HOSTS}")
        self._configure(port)
        self._start_munge()
        if self.accounting:
            self._start_accounting(port + 1)
        self._start_controller()
        for node in self.nodes:
            self._start_daemon_of(node)
        self._wait_until(lambda: set(self.states()) == {"idle"})

    def _log_ends(self) -> str:
        """The last lines of each log."""
        ends = []
        for path in sorted(self.folder.glob("log/*")):
            lines = path.read_text(errors="replace").splitlines()[-10:]
            ends += [f"--- {path.name}", *lines] if lines else []
        return "\n".join(ends)

    # --------------------------------------------------------------------------------- in use

    def run(self, *command: str | Path) -> str:
        """What a client of this cluster, such as ``squeue``, prints.

        Raises:
            ClusterError: It failed; what it printed as errors.
        """
        done = subprocess.run(  # noqa: S603 (the tests' own words)
            command,
            env=self._whole_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_SECONDS,
        )
        if done.returncode != 0:
            raise ClusterError(
                f"{shlex.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}"
            )
        return done.stdout

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until there are none."""
        # More than once: a job may put itself back into the queue meanwhile.
        self._wait_until(self._is_empty_or_cancelled)

    def _is_empty_or_cancelled(self) -> bool:
        if not self.run("squeue", "--noheader"):
            return True
        with suppress(ClusterError):  # they were over already
            self.run("scancel", "--user=root")
            self.run("scancel", "--user=root", "--signal=KILL", "--full")  # some ignore SIGTERM
        return False

    def kill_node(self, name: str, *, reported: bool = True) -> None:
        """End a node as if its power went: its slurmd, and all processes of jobs on it.

        Args:
            name: Name of the node.
            reported: Whether to tell the controller; otherwise it notices after 30 seconds or more.
        """
        assert name in self.nodes, name
        self._kill(lambda process: process.node == name)
        if reported:
            self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def kill_daemon_of(self, name: str) -> None:
        """End the slurmd of a node; the jobs on it run on."""
        assert name in self.nodes, name
        self._kill(lambda process: process.name == "slurmd" and process.node == name)

    def start_node(self, name: str) -> None:
        """Start a node again, unless it runs, and wait until it takes jobs."""
        assert name in self.nodes, name
        if not any(
            process.name == "slurmd" and process.node == name for process in self._processes()
        ):
            self._start_daemon_of(name)
        working = {"idle", "mixed", "allocated", "completing"}
        self._wait_until(lambda: self.states()[self.nodes.index(name)] in working)

    def restart_controller(self, *, away_seconds: float = 0.0) -> None:
        """Kill the controller, and start it again with the state that it had saved.

        It is given the time to save all, for otherwise it forgets the last jobs.

        Args:
            away_seconds: How long nobody answers meanwhile.
        """
        time.sleep(_SAVING_SECONDS)
        self._kill(lambda process: process.name in {"slurmctld", "slurmscriptd"})
        time.sleep(away_seconds)
        self._start_controller()
        self._wait_until(lambda: not any(state.startswith("unk") for state in self.states()))

    def repair(self) -> None:
        """Start again what was killed and not started again."""
        if not self._controls():
            self._start_controller()
        for node in self.nodes:
            self.start_node(node)

    def states(self) -> list[str]:
        """Each node's, such as ``idle``; it ends with ``*`` if the node does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        found = dict(line.split() for line in lines)
        return [found[node] for node in self.nodes]

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds.

        Raises:
            ClusterError: It does not hold within a minute; what is queued, and the nodes' states.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not holds():
            if time.monotonic() > deadline:
                seen = ""
                with suppress(ClusterError):
                    seen = self.run("squeue") + self.run("sinfo", "-N", "-l")
                raise ClusterError(f"not within {_PATIENCE_SECONDS:.0f} seconds\n{seen}")
            time.sleep(0.1)

    # -------------------------------------------------------------------------- its processes

    def _processes(self) -> Iterator[_Process]:
        """Its daemons and the processes of its jobs, but none of its clients."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                content = os.fsdecode((folder / "environ").read_bytes())
                name = (folder / "comm").read_text().strip()
            except OSError:  # it has ended meanwhile
                continue
            pairs = (pair.partition("=") for pair in content.split("\0"))
            environment = {key: value for key, _, value in pairs}
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if ours and (name in _DAEMONS or "SLURM_JOB_ID" in environment):
                yield _Process(int(folder.name), name, environment.get("SLURMD_NODENAME"))

    def _kill(self, chosen: Callable[[_Process], bool]) -> None:
        """End those of its processes that are chosen, and wait until there are none."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        looks = 0  # that found none; one that is just starting can be missed once
        while looks < 2:
            found = [process for process in self._processes() if chosen(process)]
            if time.monotonic() > deadline:
                raise ClusterError(f"SIGKILL did not end {found}")
            looks = 0 if found else looks + 1
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)

    def _whole_environment(self, **more: str) -> dict[str, str]:
        """The environment of its processes and clients, without what another SLURM's job has."""
        foreign = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return {**kept, **self.environment, **more}

    def _launch(self, *command: str, host: str | None = None, **environment: str) -> None:
        """Start what goes into the background by itself.

        Args:
            command: The program and its words.
            host: What the host is called for it. SLURM's daemons listen on the address of their
                own host's name, and `hostname` in a job says that of its slurmd. It has a scratch
                folder of its own.
            environment: What it has in addition.
        """
        if host is not None:
            script = f'hostname "$0" && mount -t tmpfs none {self.scratch} && exec "$@"'
            command = ("unshare", "--uts", "--mount", "sh", "-c", script, host, *command)
        with (self.folder / "log" / "launch.log").open("a") as log:
            done = subprocess.run(  # noqa: S603 (our own words)
                command,
                cwd=self.folder,
                env=self._whole_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
                start_new_session=True,
                timeout=_PATIENCE_SECONDS,
            )
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(command)} ended with {done.returncode}")

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._launch(
            "munged",
            f"--socket={self.folder}/run/munge.sock",
            f"--key-file={key}",
            f"--pid-file={self.folder}/run/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self.folder}/munge/munged.seed",
            f"--origin={_ADDRESS}",
        )

    def _start_accounting(self, port: int) -> None:
        """Start slurmdbd and, for it alone, a MariaDB that listens on a unix socket only."""
        listens = self.folder / "run" / "mysqld.sock"
        options = self._write(
            "my.cnf",
            "[mariadbd]",
            "user=root",
            f"datadir={self.folder}/database",
            f"tmpdir={self.folder}/run",  # two servers that start at once share names in /tmp
            f"socket={listens}",
            f"pid-file={self.folder}/run/mariadbd.pid",
            f"log-error={self.folder}/log/mariadbd.log",
            "skip-networking",
            "skip-name-resolve",
            "skip-log-bin",
            "performance-schema=OFF",
            # Small, and with no care for what a loss of power would do.
            "innodb_buffer_pool_size=32M",
            "innodb_log_file_size=8M",
            "innodb_flush_log_at_trx_commit=0",
            "innodb_flush_method=nosync",
            "innodb_lock_wait_timeout=900",
        )
        self._launch(
            "mariadb-install-db",
            f"--defaults-file={options}",
            "--auth-root-authentication-method=socket",
            "--skip-test-db",
        )
        self._launch("setsid", "--fork", "mariadbd", f"--defaults-file={options}")
        self._wait_until(lambda: _answers(listens))
        self._write(
            "slurmdbd.conf",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder}/run/munge.sock",
            "CommunicationParameters=NoInAddrAny",
            "DbdHost=localhost",
            f"DbdAddr={_ADDRESS}",
            f"DbdPort={port}",
            "SlurmUser=root",
            f"LogFile={self.folder}/log/slurmdbd.log",
            f"PidFile={self.folder}/run/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            "StorageLoc=accounting",
        )
        # It has no option for MariaDB's socket, but the library that it uses reads this.
        self._launch("slurmdbd", host="localhost", MYSQL_UNIX_PORT=str(listens))
        self._wait_until(self._has_accounting)
        # With the cluster come the account and the user root.
        self.run("sacctmgr", "--immediate", "add", "cluster", "loopback")

    def _has_accounting(self) -> bool:
        with suppress(ClusterError):
            self.run("sacctmgr", "--noheader", "list", "cluster")
            return True
        return False

    def _start_controller(self) -> None:
        self._launch("slurmctld", host="localhost")
        self._wait_until(self._has_controller)

    def _controls(self) -> bool:
        return any(process.name == "slurmctld" for process in self._processes())

    def _has_controller(self) -> bool:
        if not self._controls():
            time.sleep(0.2)  # one that is just putting itself into the background can be missed
            if not self._controls():
                raise ClusterError("slurmctld ended as soon as it was started")
        with suppress(ClusterError):
            return "is UP" in self.run("scontrol", "ping")
        return False

    def _start_daemon_of(self, node: str) -> None:
        # What jobs have in their environment anyway, and thereby slurmd and slurmstepd too.
        self._launch("slurmd", "-N", node, host=node, SLURMD_NODENAME=node)

    # -------------------------------------------------------------------------- configuration

    def _write(self, name: str, *lines: str) -> Path:
        path = self.folder / "etc" / name
        path.write_text("".join(f"{line}\n" for line in lines))
        path.chmod(0o600)  # slurmdbd refuses any other
        return path

    def _configure(self, port: int) -> None:
        settings = {**self._settings(port), **self.settings}
        nodes = (
            f"NodeName={node} NodeHostname={node} NodeAddr={_ADDRESS} Port={port + 11 + number} "
            "CPUs=80 Boards=1 SocketsPerBoard=2 CoresPerSocket=20 ThreadsPerCore=2 "
            f"RealMemory=512000 Feature=v100,volta32gb Gres=gpu:v100:{_GPUS} State=UNKNOWN"
            for number, node in enumerate(self.nodes)
        )
        partitions = (
            f"PartitionName={name} Nodes=ALL Default={default} PriorityTier={tier} "
            f"PreemptMode=REQUEUE GraceTime=10 DefaultTime={minutes} MaxTime={limit} State=UP"
            for name, default, tier, minutes, limit in (
                ("main", "YES", 10, 60, "INFINITE"),
                ("high", "NO", 100, 60, "INFINITE"),
                ("short", "NO", 10, 5, 5),
            )
        )
        lines = (f"{key}={value}" for key, value in settings.items())
        self._write("slurm.conf", *lines, *nodes, *partitions)

        # The index that a job sees is the number at the end of a device's name; a link to some
        # device is a device.
        for index in range(_GPUS):
            (self.folder / "dev" / f"nvidia{index}").symlink_to("/dev/null")
        devices = f"{self.folder}/dev/nvidia[0-{_GPUS - 1}]"
        self._write(
            "gres.conf",
            "AutoDetect=off",
            f"NodeName={','.join(self.nodes)} Name=gpu Type=v100 File={devices}",
        )
        # Nothing here uses cgroups, but slurmd does not start where those that it finds do not
        # work, as in a container; version 1 does nothing until it is used.
        self._write("cgroup.conf", "CgroupPlugin=cgroup/v1", "CgroupAutomount=no")

    def _settings(self, port: int) -> dict[str, str]:
        accounting = {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": _ADDRESS,
            "AccountingStoragePort": str(port + 1),
            # The munge socket again; AuthInfo does not hold for what goes to slurmdbd.
            "AccountingStoragePass": f"{self.folder}/run/munge.sock",
            "AccountingStorageTRES": "gres/gpu",
            "AccountingStorageEnforce": "associations,limits,qos",
        }
        none = {"AccountingStorageType": "accounting_storage/none"}
        return {
            "ClusterName": "loopback",
            "SlurmctldHost": f"localhost({_ADDRESS})",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            # The second is also how long a job that was put back waits; 2 minutes if not set.
            "AuthInfo": f"socket={self.folder}/run/munge.sock,cred_expire=5",
            # Listen on the address of the host's name instead of all.
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "SlurmctldPort": str(port),
            "SlurmdPort": str(port + 10),
            "SrunPortRange": f"{port + 100}-{port + 499}",
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmctldPidFile": f"{self.folder}/run/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/run/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{self.folder}/log/slurmd-%n.log",
            "SlurmctldDebug": "verbose",
            "SlurmdDebug": "verbose",
            # Jobs are ordinary processes: not bound, not limited, not measured.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "PropagateResourceLimits": "NONE",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            # What a node claims to have counts, whatever this machine has.
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SlurmdParameters": "config_overrides",
            "DefMemPerCPU": "1000",  # without it, a job that does not ask takes all of a node's
            "GresTypes": "gpu",
            # Clients keep results by the job's id, so those of an earlier cluster must not recur.
            "FirstJobId": str(100_000 + int(time.time()) % 60_000_000),
            "MaxJobCount": "100000",
            "MaxArraySize": str(self.max_array),
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": (
                "sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0"
            ),
            "PriorityType": "priority/basic",
            # A job that has to make room is sent the signal that it asked for, then put back.
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
            "JobRequeue": "1",
            "KillWait": "5",
            "ReturnToService": "2",  # a node that was down is up as soon as it is there
            "SlurmctldTimeout": "30",
            "SlurmdTimeout": "30",  # of silence; then a node is down
            "InactiveLimit": "0",
            "MinJobAge": "3600",
            "MessageTimeout": "10",
            **(accounting if self.accounting else none),
        }


# ----------------------------------------------------------------------- what clusters share


@contextmanager
def _hosts() -> Iterator[list[str]]:
    """The lines of ``/etc/hosts``, to be changed, while no other cluster reads or changes them."""
    with _HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines()
        before = list(lines)
        yield lines
        if lines != before:
            # In place: in a container the file is a mount, and nothing can be put there instead.
            file.seek(0)
            file.write("".join(f"{line}\n" for line in lines))
            file.truncate()


def _reserve(folder: Path, nodes: list[str]) -> int:
    """Enter a cluster into ``/etc/hosts``; the first port of its block."""
    with _hosts() as lines:
        taken = {port for _, port in _parse_reservations(lines)}
        taken |= {port - port % _PORTS.step for port in _listening()}
        free = [port for port in _PORTS if port not in taken]
        if not free:
            raise ClusterError(f"all ports from {_PORTS.start} to {_PORTS.stop} are taken")
        lines.append(f"{_ADDRESS} {' '.join(nodes)} {_MARK} {folder} {free[0]}")
    return free[0]


def _parse_reservations(lines: list[str]) -> list[tuple[Path, int]]:
    """Folder and first port of each cluster."""
    marked = (line.partition(f" {_MARK} ")[2].split() for line in lines)
    return [(Path(words[0]), int(words[1])) for words in marked if words]


def _unreserve(folder: Path) -> None:
    with _hosts() as lines:
        lines[:] = [line for line in lines if folder not in dict(_parse_reservations([line]))]


def _listening() -> set[int]:
    """The TCP ports on which someone listens, on whatever address."""
    ports = set()
    for name in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == "0A":
                    ports.add(int(local.rpartition(":")[2], 16))
    return ports


def _take_ownership(folder: Path) -> IO[str] | None:
    """A lock that its owner holds as long as it lives; None if another has it, or it is gone."""
    try:
        file = (folder / "owner").open("a")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _stop_abandoned() -> None:
    """Stop the clusters whose owners have ended without."""
    with _hosts() as lines:
        reserved = _parse_reservations(lines)
    for folder, _ in reserved:
        if not (folder / "owner").exists():
            _unreserve(folder)
        elif owner := _take_ownership(folder):
            cluster = Cluster()
            cluster._folder, cluster._owner = folder, owner  # noqa: SLF001
            cluster.stop()


def _answers(path: Path) -> bool:
    """Whether someone listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
