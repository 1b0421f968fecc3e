"""The store with killed processes, full disks, wrong clocks and truncated files."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from widthopt.errors import InputError
from widthopt.files import write_atomically
from widthopt.runs.store import Store


ROOT = Path(__file__).parents[1]
NAMES = ["open", "write", "fsync", "rename", "replace", "unlink", "mkdir"]
OLD, NEW = {"top1": 1.0}, {"top1": 0.1 + 0.2}
YEARS = 20 * 365 * 86_400

# Does one step of work on an entry, by name.
STEPS = """
import os
from widthopt.runs.store import Store
from widthopt.files import write_atomically

NEW = {"top1": 0.1 + 0.2}

def do_step(step, root):
    store = Store(root)
    entry = store.entry("search", {"width": 0.5})
    if step == "write":
        write_atomically(store.root / "a", "new" * 1000)
    elif step == "check":
        store.check()
    elif step == "submit":
        entry.record_job("8")
    elif step == "finish unclaimed":
        entry.finish(NEW)
    else:
        with entry.claim(job="8"):
            if step == "finish":
                entry.finish(NEW)
            elif step == "fail":
                entry.fail(ValueError("new"))
"""

# For each line "number, how, step, root", forks a child that exits at that system call.
KILLING = """
def exit_at_call(name, number, how, count):
    call = getattr(os, name)
    def count_calls(*arguments, **options):
        count[0] += 1
        if count[0] == number:
            if how == "halfway" and name == "write":
                call(arguments[0], arguments[1][:len(arguments[1]) // 2])
            os._exit(9)
        return call(*arguments, **options)
    setattr(os, name, count_calls)

for line in sys.stdin:
    number, how, step, root = json.loads(line)
    child = os.fork()
    if not child:
        count = [0]
        for name in NAMES:
            exit_at_call(name, number, how, count)
        try:
            do_step(step, root)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

do_step = {}
exec(STEPS, do_step)  # noqa: S102 (fixed code, here and in the processes below)
do_step = do_step["do_step"]


def start_python(script, *arguments):
    """Start a Python process that runs ``script``."""
    return subprocess.Popen(  # noqa: S603 (fixed arguments)
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def kill():
    """A function that does a step in a process that exits at a system call.

    It returns whether the process reached that call.
    """
    script = f"import json, os, sys, traceback\n{STEPS}\nNAMES = {NAMES}\n{KILLING}"
    with start_python(script) as server:

        def kill_step(number, how, step, root):
            server.stdin.write(json.dumps([number, how, step, str(root)]) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            assert code in (0, 9)
            return code == 9

        yield kill_step
        server.stdin.close()


def prepare(root, before):
    """Return an entry in the state ``before``, in a new root that also has the file ``a``."""
    root.mkdir()
    (root / "a").write_text("old")
    entry = Store(root).entry("search", {"width": 0.5})
    if before == "failed":
        entry.record_job("7")
        with entry.claim(job="7"):
            entry.fail(ValueError("old"))
    elif before == "done":
        with entry.claim(job="7"):
            entry.finish(OLD)
    elif before == "killed":
        leave_claim(entry)
    return entry


def leave_claim(entry, **changes):
    """Leave the claim file of a killed process, with these changes."""
    with entry.claim():
        claim = json.loads((entry.folder / "claim.json").read_text())
    (entry.folder / "claim.json").write_text(json.dumps({**claim, **changes}) + "\n")


def read_files(root):
    """Return the content of each file below a root."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


BEFORE = ["missing", "failed", "killed", "done"]
STATE = {"missing": "missing", "failed": "failed", "killed": "stale", "done": "done"}
AFTER = {"finish": "done", "finish unclaimed": "done", "fail": "failed"}
AFTER |= {"submit": "queued", "claim": "missing"}


# A claim that ends normally leaves no file. The claim of a killed process leaves its file.
CLAIMED = {"missing": {"stale"}, "failed": {"stale"}, "killed": {"missing"}}


def allowed_states(step, before):
    """Return the states that an entry may have after a step was interrupted."""
    if before == "done":
        return {"done"}
    states = {STATE[before], AFTER.get(step, STATE[before])}
    if step in ("claim", "finish", "fail"):
        states |= CLAIMED[before]
    return states - ({"missing"} if before == "failed" else set())


def check_consistent(entry, step, before):
    """Check that the entry has its old or its new content, and nothing else."""
    # The job that claimed the entry has ended with its process; a submitted job is live.
    live = {"8"} if step == "submit" else set()
    state = entry.state(live)
    assert state in allowed_states(step, before)
    result, failure = entry.result(), entry.failure()
    old = OLD if before == "done" else None
    assert result in ([old, NEW] if step.startswith("finish") else [old])
    assert (state == "done") == (result is not None)
    if failure is not None:
        messages = {"old"} if before == "failed" else set()
        assert failure["message"] in messages | ({"new"} if step == "fail" else set())
    written = (entry.folder.parent / "a").read_text()
    assert written in ({"old", "new" * 1000} if step == "write" else {"old"})


def check_repeat(entry, step, before, caplog):
    """Check that repeating the step gives the same result as without the fault."""
    root = entry.folder.parent
    do_step(step, root)
    assert caplog.text == ""
    live = {"8"} if step == "submit" else set()
    if step == "write":
        assert (root / "a").read_text() == "new" * 1000
    elif step == "check":
        assert json.loads((root / "store.json").read_text()) == {"format": 2}
    elif before == "done":
        assert entry.result() == (NEW if step.startswith("finish") else OLD)
    elif step == "claim" and before == "failed":
        assert entry.state() == "stale"  # because the submitted job has ended
    elif not (step == "submit" and before == "killed"):
        assert entry.state(live) == AFTER[step]
    if step in ("claim", "finish", "fail"):
        assert not (entry.folder / "claim.json").exists()
        for name in ("claim", "failed", "result"):
            assert not [*entry.folder.glob(f".{name}.json.*")]


CASES = [(step, before) for step in ["claim", "finish", "fail", "submit"] for before in BEFORE]
CASES += [("write", "missing"), ("check", "missing")]
CASES += [("finish unclaimed", "missing"), ("finish unclaimed", "failed")]


@pytest.mark.parametrize(("step", "before"), CASES)
def test_a_process_killed_at_any_system_call_leaves_old_or_new_content(
    tmp_path, kill, step, before, caplog
):
    number = 0
    killed = True
    while killed:
        number += 1
        for how in ("before", "halfway"):
            root = tmp_path / f"{number}{how}"
            entry = prepare(root, before)
            killed = kill(number, how, step, root)
            check_consistent(entry, step, before)
            assert caplog.text == ""
            assert killed or not [*root.rglob("*.part")]
            check_repeat(entry, step, before, caplog)
    assert number > 5  # open, write, fsync, replace, open and fsync of the folder


class FailingCalls:
    """System calls that fail as on a full disk.

    Only call ``number`` fails, or from this call on all that need space.
    """

    def __init__(self, patch, number, how):
        self.number, self.how, self.count, self.failed = number, how, 0, False
        for name in NAMES:
            patch.setattr(os, name, self.call(name, getattr(os, name)))

    def call(self, name, call):
        def count_calls(*arguments, **options):
            if name == "mkdir" and Path(arguments[0]).is_dir():  # raises an error on any disk
                return call(*arguments, **options)
            self.count += 1
            needs_space = name != "unlink" and not (
                name == "open" and not arguments[1] & os.O_CREAT
            )
            always = self.how == "from then on" and self.count >= self.number and needs_space
            if always or (self.how == "once" and self.count == self.number):
                self.failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return count_calls


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("how", ["once", "from then on"])
def test_a_disk_full_at_any_system_call_leaves_old_or_new_content(
    tmp_path, monkeypatch, case, how, caplog
):
    step, before = case
    number = 0
    failed = True
    while failed:
        number += 1
        root = tmp_path / str(number)
        entry = prepare(root, before)
        error = None
        with monkeypatch.context() as patch:
            calls = FailingCalls(patch, number, how)
            try:
                do_step(step, root)
            except InputError as caught:
                error = str(caught)
        failed = calls.failed
        left = "claim.json could not be removed, which does no harm" in caplog.text
        assert bool(error) == (failed and not left)
        if error:
            assert error.startswith(f"root is {root}")
            assert "cannot be written (No space left on device); make room on the" in error
            assert "\n" not in error
        check_consistent(entry, step, before)
        assert not [*root.rglob("*.part")]
        caplog.clear()
        check_repeat(entry, step, before, caplog)
    assert number > 5


@pytest.mark.parametrize(("step", "before"), CASES)
def test_writes_of_one_byte_at_a_time_are_complete(tmp_path, monkeypatch, step, before, caplog):
    entry = prepare(tmp_path / "runs", before)
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda file, data: write(file, data[:1]))
        do_step(step, tmp_path / "runs")
    check_consistent(entry, step, before)
    check_repeat(entry, step, before, caplog)


@pytest.mark.parametrize("before", ["missing", "failed", "done"])
def test_files_are_synced_before_renaming_and_written_in_order(tmp_path, monkeypatch, before):
    entry = prepare(tmp_path / "runs", before)
    dirty, events = set(), []
    real = {name: getattr(os, name) for name in NAMES}

    def write(file, data):
        dirty.add(os.fstat(file).st_ino)
        return real["write"](file, data)

    def fsync(file):
        dirty.discard(os.fstat(file).st_ino)
        events.append(("fsync", os.fstat(file).st_ino))
        return real["fsync"](file)

    def replace(old, new):
        assert Path(old).stat().st_ino not in dirty, "the file is renamed before it is synced"
        events.append(("replace", Path(new).name))
        return real["replace"](old, new)

    def unlink(path, **options):
        events.append(("unlink", Path(path).name))
        return real["unlink"](path, **options)

    with monkeypatch.context() as patch:
        for call in (write, fsync, replace, unlink):
            patch.setattr(os, call.__name__, call)
        do_step("finish", tmp_path / "runs")
    folder = ("fsync", entry.folder.stat().st_ino)
    for place, event in enumerate(events):
        if event[0] == "replace":
            assert events[place + 1] == folder, "the folder is not synced after the rename"
    claimed, done = (
        events.index(("replace", "claim.json")),
        events.index(("replace", "result.json")),
    )
    removals = [place for place, event in enumerate(events) if event == ("unlink", "failed.json")]
    assert claimed < removals[0] < done < removals[-1]
    assert done < events.index(("unlink", "claim.json"))


# Concurrent processes.

WORKING = """
import os, random, sys, time
from pathlib import Path
from widthopt.runs.store import Store

root, me = Path(sys.argv[1]), sys.argv[2]
log = os.open(root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
order = list(range(20))
random.Random(me).shuffle(order)
sys.stdin.readline()
for number in order:
    entry = Store(root).entry("search", number)
    with entry.claim():
        if entry.result() is None:
            os.write(log, f"worked {number} {me}\\n".encode())
            time.sleep(0.003)  # so that most of the time goes into work
            entry.finish({"number": number, "by": me})
            os.write(log, f"finished {number} {me}\\n".encode())
print("through", flush=True)
"""


def race(root, count, disturb=lambda _workers: None):
    """Run processes that work on twenty entries, and return the lines of their log by kind."""
    root.mkdir()
    workers = [start_python(WORKING, root, me) for me in range(count)]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    killed = disturb(workers)
    for worker in workers:
        output = worker.communicate(timeout=30)[0]
        assert worker is killed or (output, worker.returncode) == ("through\n", 0)
    log = {"worked": [], "finished": []}
    for line in (root / "log").read_text().splitlines():
        what, number, who = line.split()
        log[what].append((int(number), int(who)))
    entries = list(Store(root).entries())
    assert sorted(entry.fields for entry in entries) == list(range(20))
    assert {entry.state() for entry in entries} == {"done"}
    for entry in entries:
        assert entry.result()["number"] == entry.fields
        assert (entry.fields, int(entry.result()["by"])) in log["worked"]
    return log


@pytest.mark.parametrize("count", [2, 6])
def test_concurrent_processes_do_each_entry_once(tmp_path, count):
    log = race(tmp_path / "runs", count)
    for what in ("worked", "finished"):
        assert sorted(number for number, _ in log[what]) == list(range(20))
    assert sorted(log["worked"]) == sorted(log["finished"])


@pytest.mark.parametrize("attempt", range(6))
def test_the_other_processes_finish_when_one_is_killed(tmp_path, attempt):
    def disturb(workers):
        for _ in range(3000):  # until the first entry is started
            if (tmp_path / "runs" / "log").exists() and (tmp_path / "runs" / "log").stat().st_size:
                break
            time.sleep(0.001)
        time.sleep(random.Random(attempt).uniform(0, 0.06))  # noqa: S311 (not for security)
        workers[0].send_signal(signal.SIGKILL)
        return workers[0]

    log = race(tmp_path / "runs", 3, disturb)
    finished = Counter(number for number, _ in log["finished"])
    assert max(finished.values()) == 1
    assert sum(finished.values()) >= 19  # the killed process may not have logged its last entry
    begun = Counter(number for number, who in log["worked"] if who != 0)
    assert max(begun.values()) == 1
    assert sum(who == 0 for _, who in log["worked"]) - sum(
        who == 0 for _, who in log["finished"]
    ) in (0, 1)


def start_and_kill(root):
    """Start a process, kill it while it works, and return its id."""
    script = f"{STEPS}\nimport sys, time\n" + textwrap.dedent(
        """
        with Store(sys.argv[1]).entry("search", {"width": 0.5}).claim(job="7"):
            print("working", flush=True)
            time.sleep(60)
        """
    )
    with start_python(script, root) as worker:
        assert worker.stdout.readline() == "working\n"
        state = Store(root).entry("search", {"width": 0.5}).state()
        worker.kill()
    assert state == "running"
    return worker.pid


def test_an_entry_of_a_killed_process_is_stale_and_can_be_claimed(tmp_path):
    entry = Store(tmp_path).entry("search", {"width": 0.5})
    process = start_and_kill(tmp_path)
    assert json.loads((entry.folder / "claim.json").read_text())["process"] == process
    assert entry.state() == "stale"
    assert entry.state(live={"7"}) == "running"  # the queue starts the job again
    with entry.claim(wait=False, job="8"):
        assert json.loads((entry.folder / "claim.json").read_text())["process"] == os.getpid()
        assert entry.state() == "running"
        entry.finish(NEW)
    assert (entry.state(), entry.result()) == ("done", NEW)


@pytest.mark.parametrize("locked", [True, False])
def test_a_claim_from_another_host_is_stale_without_its_lock(tmp_path, locked):
    entry = Store(tmp_path).entry("search", {"width": 0.5})
    if locked:
        leave_claim(entry, host="node17", process=os.getpid())
    else:  # a folder that was copied without its lock
        entry.folder.mkdir()
        text = json.dumps({"host": "node17", "process": 1, "job": "7", "started": 0})
        (entry.folder / "claim.json").write_text(text)
    assert entry.state() == "stale"
    with entry.claim(wait=False):
        assert json.loads((entry.folder / "claim.json").read_text())["host"] != "node17"
    assert entry.state() == "missing"


# Clocks.


def shift_times(entry, seconds):
    """Shift the times of all files of an entry, and the times in their content."""
    for path in [*entry.folder.iterdir(), entry.folder]:
        os.utime(path, (time.time() + seconds,) * 2)
    for name, field in (("claim.json", "started"), ("failed.json", "time")):
        path = entry.folder / name
        if path.exists():
            content = json.loads(path.read_text())
            path.write_text(json.dumps({**content, field: content[field] + seconds}))
            os.utime(path, (time.time() + seconds,) * 2)


@pytest.mark.parametrize("seconds", [-YEARS, YEARS])
def test_states_do_not_depend_on_the_clock(tmp_path, monkeypatch, seconds):
    now = time.time
    entries = {before: prepare(tmp_path / before, before) for before in BEFORE}
    entries["queued"] = prepare(tmp_path / "queued", "failed")
    entries["queued"].record_job("8")
    expected = {**STATE, "queued": "queued"}
    for before, entry in entries.items():
        state = entry.state({"8"})
        assert state == expected[before]
        if entry.folder.exists():
            shift_times(entry, seconds)
        assert entry.state({"8"}) == state
        monkeypatch.setattr(time, "time", lambda: now() - seconds)
        assert entry.state({"8"}) == state
        with entry.claim():
            shift_times(entry, seconds)
            assert entry.state({"8"}) == ("done" if before == "done" else "running")
            assert entry.failure() is None
        monkeypatch.setattr(time, "time", now)


# Truncated files.

FILES = ["result.json", "claim.json", "failed.json", "submission.json", "fields.json"]


def make_full_entry(root):
    """Return an entry with all of its files, and their contents."""
    entry = Store(root).entry("search", {"width": 0.5})
    entry.record_job("7")
    leave_claim(entry, job="7")
    entry.finish(NEW)
    entry.fail(ValueError("old"))
    return entry, {name: (entry.folder / name).read_bytes() for name in FILES}


def leave_file(entry, name, content):
    """Write one file of an entry, and remove all others."""
    for second in FILES:
        (entry.folder / second).unlink(missing_ok=True)
    (entry.folder / name).write_bytes(content)


def state_of(entry, name, live):
    """Return the state of an entry that has only this file."""
    if name == "fields.json":
        return ["missing", "named"][len(list(Store(entry.folder.parent).entries()))]
    return entry.state(live)


STATE_OF_FILE = {"result.json": "done", "claim.json": "running", "failed.json": "failed"}
STATE_OF_FILE |= {"submission.json": "queued", "fields.json": "named"}


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_treated_as_missing(tmp_path, name, caplog):
    entry, contents = make_full_entry(tmp_path)
    complete = contents[name]
    leave_file(entry, name, complete)
    assert state_of(entry, name, {"7"}) == STATE_OF_FILE[name]
    assert complete.endswith(b"}\n")
    for length in range(len(complete) - 1):  # without the final newline, which has no meaning
        for content in (complete[:length], complete[:length] + b"\0" * (len(complete) - length)):
            caplog.clear()
            leave_file(entry, name, content)
            assert state_of(entry, name, {"7"}) == "missing"
            assert f"{name} is incomplete; it is treated as missing" in caplog.text
            assert (entry.result(), entry.failure()) == (None, None)
    with entry.claim(wait=False):
        entry.finish(NEW)
    assert (entry.result(), entry.state()) == (NEW, "done")
    assert [second.key for second in Store(tmp_path).entries()] == [entry.key]


def test_a_truncated_store_file_is_written_again(tmp_path, caplog):
    store = Store(tmp_path)
    store.check()
    path = tmp_path / "store.json"
    complete = path.read_bytes()
    for length in range(len(complete) - 1):
        caplog.clear()
        path.write_bytes(complete[:length])
        store.check(write=False)
        assert "store.json is incomplete; it is treated as missing" in caplog.text
        assert path.read_bytes() == complete[:length]
        store.check()
        assert path.read_bytes() == complete


def test_a_result_with_a_changed_byte_is_never_another_result(tmp_path):
    entry = Store(tmp_path).entry("search", {"width": 0.5})
    entry.finish(NEW)
    path = entry.folder / "result.json"
    complete = path.read_bytes()
    outcomes = Counter()
    for place in range(len(complete)):
        for byte in (b"0", b"7", b" ", b"x", b"-", b'"', b"\xff"):
            path.write_bytes(complete[:place] + byte + complete[place + 1 :])
            try:
                result = entry.result()
            except InputError:
                outcomes["refused"] += 1
            else:
                assert result in (None, NEW)
                outcomes["unchanged" if result else "missing"] += 1
    assert min(outcomes[name] for name in ("refused", "missing", "unchanged")) > 10


def test_temporary_files_are_removed_by_the_next_claim(tmp_path):
    entry = Store(tmp_path).entry("search", {"width": 0.5})
    entry.record_job("7")
    for name in ("claim", "failed", "result"):
        (entry.folder / f".{name}.json.00000000.part").write_text('{"to')
    (entry.folder / ".other.json.00000000.part").write_text("of another program")
    with entry.claim():
        pass
    assert [path.name for path in entry.folder.glob(".*")] == [".other.json.00000000.part"]
    assert entry.result() is None


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_file):
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "a", "new")
    assert read_files(tmp_path) == {"a": b"old"}
