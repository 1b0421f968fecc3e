"""A real SLURM of several nodes on this one machine, for tests.

Its daemons belong to the tests: they have a folder of their own, listen on loopback alone, and
are told from all others by their environment, which names that folder. Nodes have eight GPUs
that are links to ``/dev/null``, and names of their own.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


CONTROLLER, ADDRESS = "localhost", "127.0.0.1"
"""The controller's name and where everything listens."""

MARK = "# loopback cluster of tests in"
HOSTS = Path("/etc/hosts")
PORTS = range(15000, 20000, 500)
"""First ports of blocks: above them are those that the system gives away."""

START_SECONDS = 60
DAEMONS = ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged")

CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a job waits that was put back; SLURM's own are two minutes.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
# Listen where the daemon's own host name points to, and nowhere else.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SrunPortRange={srun_first}-{srun_last}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
# Jobs are ordinary processes: nothing is bound, limited or put into groups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# What nodes have is what is written here, whatever this machine has.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=1000
GresTypes=gpu
# Job numbers go on from one cluster to the next, as on a real one.
FirstJobId={first_job}
MaxArraySize=1001
MaxJobCount=20000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=3600
MessageTimeout=10
"""

ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={dbd_port}
# Connections to slurmdbd take the socket of munge from here, and not from AuthInfo.
AccountingStoragePass={folder}/run/munge.sock
AccountingStorageTRES=gres/gpu
# Unknown accounts are refused.
AccountingStorageEnforce=associations
"""

DATABASE_DAEMON = """
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CommunicationParameters=NoInAddrAny
DbdHost={controller}
DbdAddr={address}
DbdPort={dbd_port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""

DATABASE = """
[mariadbd]
user=root
datadir={folder}/db
socket={folder}/run/mysqld.sock
pid-file={folder}/run/mariadbd.pid
log-error={folder}/log/mariadbd.log
skip-networking
skip-name-resolve
skip-log-bin
performance-schema=OFF
innodb_buffer_pool_size=32M
innodb_log_file_size=8M
innodb_flush_log_at_trx_commit=0
innodb_flush_method=nosync
innodb_lock_wait_timeout=900
"""


def why_not():
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid():
        return "only root can start a SLURM of its own"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not _found(name)]
    return f"no {', '.join(missing)} on this machine" if missing else ""


def _found(name):
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Use it in a ``with`` statement.

    Attributes:
        environment: What a client needs in its environment.
        nodes: The names of its nodes.
        folder: Where all of it is.
    """

    def __init__(self, *, nodes=3, accounting=True, prefix="node", gpus=8):
        self.accounting, self.gpus = accounting, gpus
        self._mariadbd = None
        self.nodes = [f"{prefix}{number}" for number in range(1, nodes + 1)]
        # Sockets have short names: not a folder deep in others.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.cancel_all()
        for name in DAEMONS:
            if name == "mariadbd":
                _end(self._jobs())  # left by nodes that were killed
            _end(self._daemons(name))
        _with_hosts(lambda lines: [one for one in lines if not one.endswith(self._mark)])
        if self._mariadbd:
            self._mariadbd.wait()
        left = [pid for name in DAEMONS for pid in self._daemons(name)]
        assert not left, f"still running: {left}"
        shutil.rmtree(self.folder)

    def run(self, *words):
        """What a command of SLURM's says.

        Raises:
            RuntimeError: It failed; with what it said.
        """
        done = subprocess.run(  # noqa: S603
            words, env={**os.environ, **self.environment}, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def cancel_all(self):
        """End every job, and wait until the queue is empty."""
        # Also those that wait for a moment between two attempts.
        until = time.monotonic() + 60
        while jobs := self.run("squeue", "-h", "-o", "%A").split():
            assert time.monotonic() < until, jobs
            self.run("scancel", *sorted(set(jobs)))
            time.sleep(0.2)

    def kill_node(self, node, *, told=True):
        """End a node as if its power went; SLURM is told, or finds out by itself."""
        _kill([*self._slurmd(node), *self._jobs(node)])
        (self.folder / "run" / f"slurmd-{node}.pid").unlink(missing_ok=True)
        if told:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def kill_daemon_of(self, node):
        """End a node's daemon alone; its jobs run on."""
        _kill(self._slurmd(node))
        (self.folder / "run" / f"slurmd-{node}.pid").unlink(missing_ok=True)

    def start_node(self, node):
        """Start a node's daemon again, and wait until SLURM has the node back."""
        self._daemon(node, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
        usable = ("idle", "mixed", "allocated", "completing")
        _until(
            lambda: self.run("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T").strip() in usable
        )

    def restart_controller(self):
        """End the controller and start it again; it reads its queue from the disk.

        That is written every five seconds: what happened since is forgotten by a real one too,
        so it is given that time first.
        """
        time.sleep(6)
        _kill(self._daemons("slurmctld"))
        (self.folder / "run" / "slurmctld.pid").unlink(missing_ok=True)
        self._daemon(CONTROLLER, "slurmctld", "-f", self.environment["SLURM_CONF"])
        _until(lambda: "is UP" in self.run("scontrol", "ping"))

    # -------------------------------------------------------------------------------- starting

    def _start(self):
        for name in ("etc", "run", "log", "state", "spool", "dev", "db", "munge"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        for name in ("db", "munge", "state"):
            (self.folder / name).chmod(0o700)
        with open(__file__) as file:  # noqa: PTH123 (two clusters must not choose one port)
            fcntl.flock(file, fcntl.LOCK_EX)
            self._configure(_free_ports())
            names = " ".join([ADDRESS, *self.nodes])
            _with_hosts(lambda lines: [*lines, f"{names} {self._mark}"])
            self._munge()
            if self.accounting:
                self._database()
            self._daemon(CONTROLLER, "slurmctld", "-f", self.environment["SLURM_CONF"], "-c")
            for node in self.nodes:
                (self.folder / "spool" / node).mkdir()
                self._daemon(node, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
        _until(lambda: self.states() == ["idle"] * len(self.nodes), self._words)

    def states(self):
        """What SLURM says of each node."""
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    @property
    def _mark(self):
        return f"{MARK} {self.folder}"

    def _configure(self, port):
        self.port = port
        values = {
            "folder": self.folder, "controller": CONTROLLER, "address": ADDRESS, "port": port,
            "dbd_port": port + 1, "slurmd_port": port + 10, "srun_first": port + 100,
            "srun_last": port + 499, "first_job": 100_000 + int(time.time()) % 60_000_000,
        }  # fmt: skip
        text = CONFIGURATION
        text += ACCOUNTING if self.accounting else "AccountingStorageType=accounting_storage/none\n"
        text = text.format(**values)
        gpus = f"Gres=gpu:v100:{self.gpus} " if self.gpus else ""
        for number, node in enumerate(self.nodes, start=1):
            text += (
                f"NodeName={node} NodeHostname={node} NodeAddr={ADDRESS} Port={port + 10 + number} "
                "CPUs=80 Boards=1 SocketsPerBoard=2 CoresPerSocket=20 ThreadsPerCore=2 "
                f"RealMemory=512000 Feature=v100,volta32gb {gpus}State=UNKNOWN\n"
            )
        partitions = [("main", 10, "INFINITE", "YES"), ("high", 100, "INFINITE", "NO")]
        for name, tier, most, default in [*partitions, ("short", 10, 5, "NO")]:
            text += (
                f"PartitionName={name} Nodes=ALL Default={default} PriorityTier={tier} "
                f"PreemptMode=REQUEUE GraceTime=10 DefaultTime=5 MaxTime={most} State=UP\n"
            )
        self._write("slurm.conf", text)
        # The number at the end of a device's name is the one that CUDA_VISIBLE_DEVICES gives.
        for number in range(self.gpus):
            (self.folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        self._write(
            "gres.conf",
            f"AutoDetect=off\nNodeName={','.join(self.nodes)} Name=gpu Type=v100 "
            f"File={self.folder}/dev/nvidia[0-{self.gpus - 1}]\n"
            if self.gpus
            else "",
        )
        # slurmd asks for it although nothing uses it; version 1 does nothing until it is used.
        self._write("cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        self._write("slurmdbd.conf", DATABASE_DAEMON.format(**values))
        (self.folder / "etc" / "slurmdbd.conf").chmod(0o600)  # or it is refused
        self._write("my.cnf", DATABASE.format(**values))

    def _write(self, name, text):
        (self.folder / "etc" / name).write_text(text)

    def _munge(self):
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        run = self.folder / "run"
        self._command(
            "munged", f"--socket={run}/munge.sock", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self.folder}/munge/seed", f"--origin={ADDRESS}",
        )  # fmt: skip

    def _database(self):
        defaults, sock = (
            f"--defaults-file={self.folder}/etc/my.cnf",
            self.folder / "run/mysqld.sock",
        )
        self._command(
            "mariadb-install-db", defaults, "--auth-root-authentication-method=socket",
            "--skip-test-db",
        )  # fmt: skip
        with (self.folder / "log" / "mariadbd.out").open("ab") as log:
            self._mariadbd = subprocess.Popen(  # noqa: S603
                [_found("mariadbd"), defaults], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        sql = ["mariadb", "--no-defaults", f"--socket={sock}", "-u", "root", "-e"]
        _until(lambda: self.run(*sql, "SELECT 1"))
        self.run(*sql, "CREATE DATABASE slurm_acct")
        # The client's library reads where the socket is from here; slurmdbd has no option for it.
        self._daemon(CONTROLLER, "slurmdbd", MYSQL_UNIX_PORT=str(sock))
        _until(lambda: self.run("sacctmgr", "-n", "list", "cluster") is not None)
        self.run("sacctmgr", "-i", "add", "cluster", "loopback")
        self.run("sacctmgr", "-i", "add", "account", "tests")
        self.run("sacctmgr", "-i", "add", "user", "root", "account=tests")
        self.run("sacctmgr", "-i", "modify", "user", "root", "set", "defaultaccount=tests")

    def _daemon(self, host, name, *words, **more):
        """Start a daemon on a host of this name, which decides where it listens."""
        script = 'hostname "$0" && exec "$@"'
        self._command("unshare", "--uts", "sh", "-c", script, host, _found(name), *words, **more)

    def _command(self, name, *words, **more):
        with (self.folder / "log" / "started.out").open("ab") as log:
            done = subprocess.run(  # noqa: S603
                [_found(name), *words], env={**os.environ, **self.environment, **more},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=120,
            )  # fmt: skip
        assert done.returncode == 0, (name, words, self._words())

    def _words(self):
        """The last that the daemons said."""
        texts = sorted((self.folder / "log").glob("*"))
        return "\n".join(
            f"{one.name}: {one.read_text('utf-8', 'replace')[-1500:]}" for one in texts
        )

    # -------------------------------------------------------------------------- its own processes

    def _ours(self):
        """The numbers and environments of processes that know this cluster."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "environ").read_bytes().split(b"\0")
                if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in words:
                    yield int(path.name), words

    def _daemons(self, name):
        found = []
        for pid, _ in self._ours():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(pid)
        return found

    def _slurmd(self, node):
        return [
            pid
            for pid in self._daemons("slurmd")
            if f"\0-N\0{node}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def _jobs(self, node=None):
        """Processes of jobs and those that look after them; of one node, or of all."""
        found = []
        for pid, words in self._ours():
            with contextlib.suppress(OSError):
                keeper = Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd"
                inside = any(word.startswith(b"SLURM_JOB_ID=") for word in words)
                if keeper and node is not None:  # it keeps its node's log open
                    logs = [str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()]
                    keeper = any(one.endswith(f"/slurmd-{node}.log") for one in logs)
                elif inside and node is not None:
                    inside = f"SLURMD_NODENAME={node}".encode() in words
                if pid != os.getpid() and (keeper or inside):
                    found.append(pid)
        return found


def _until(fits, words=lambda: ""):
    """Wait until a question is answered yes."""
    until = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(RuntimeError):
            if fits():
                return
        assert time.monotonic() < until, words()
        time.sleep(0.1)


def _kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end(pids):
    """End processes, kindly at first."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + 10
    while (left := [pid for pid in pids if _lives(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    _kill(left)


def _lives(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _free_ports():
    """The first of five hundred ports that nobody listens on."""
    busy = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            busy.add(int(line.split()[1].rpartition(":")[2], 16))
    return next(first for first in PORTS if not busy & set(range(first, first + 500)))


def _with_hosts(change):
    """Change the lines of ``/etc/hosts``, in place: in a container it is mounted."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = change(file.read().splitlines())
        file.seek(0)
        file.truncate()
        file.write("\n".join(lines) + "\n")


def listeners():
    """Where the processes of this machine listen: address and port, of IPv4."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            host, _, port = words[1].partition(":")
            found.append((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found
