import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from widthopt.errors import InputError
from widthopt.files import check_writable, write_atomically
from widthopt.runs.states import current_job, mark_blocked
from widthopt.runs.store import Store, Taken


ROOT = Path(__file__).parents[1]


def start_python(script, *arguments, **options):
    """Start a Python process that runs ``script``."""
    return subprocess.Popen(  # noqa: S603 (fixed arguments)
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def entry(tmp_path):
    return Store(tmp_path / "runs").entry("search", {"width": 0.5})


def test_an_entry_folder_is_named_by_kind_and_fields(entry, tmp_path):
    assert entry.folder == tmp_path / "runs" / f"search-{entry.key}"
    assert Store(tmp_path / "runs").entry("search", {"width": 0.7}).folder != entry.folder
    assert not entry.folder.exists()


def test_the_result_is_none_until_the_entry_is_finished(entry, tmp_path):
    with entry.claim():
        assert entry.result() is None
        entry.finish({"top1": 70.25, "multipliers": {"conv1": 1.5}})
    again = Store(tmp_path / "runs").entry("search", {"width": 0.5})
    assert again.result() == {"top1": 70.25, "multipliers": {"conv1": 1.5}}


def test_a_claim_writes_the_fields_of_the_entry(entry):
    with entry.claim():
        pass
    written = json.loads((entry.folder / "fields.json").read_text())
    assert written == {"kind": "search", "fields": {"width": 0.5}}


INCOMPLETE = [b"", b'{"top1": 70.2', b"\xff\xfe", b"{}}", b"null", b"\0" * 300, b"[" * 100_000]


@pytest.mark.parametrize("content", INCOMPLETE, ids=range(len(INCOMPLETE)))
def test_an_incomplete_result_is_treated_as_missing(entry, caplog, content):
    entry.finish({"top1": 70.25})
    (entry.folder / "result.json").write_bytes(content)
    assert entry.result() is None
    assert "result.json is incomplete; it is treated as missing" in caplog.text
    assert entry.state() == "missing"


def test_a_result_file_has_its_format_key_and_checksum(entry):
    entry.finish({"top1": 70.25, "flags": []})
    assert json.loads((entry.folder / "result.json").read_text()) == {
        "format": 1,
        "key": entry.key,
        "sha256": hashlib.sha256(b'{"flags":[],"top1":70.25}').hexdigest(),
        "result": {"top1": 70.25, "flags": []},
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("70.25", "71.25"),
        ("70.25", "7025"),
        ("70.25", "NaN"),
        ("70.25", "1e999"),
        ("70.25", "[" * 400 + "]" * 400),
        ("top1", "top5"),
        ('"format": 1', '"format": 2'),
        ('"key": "', '"key": "0'),
        ('"sha256": "', '"sha256": "0'),
        ('"result": {', '"note": 1, "result": {'),
    ],
)
def test_a_changed_result_raises_a_one_line_error(entry, before, after):
    entry.finish({"top1": 70.25})
    path = entry.folder / "result.json"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    for read in (entry.result, entry.state):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value) == (
            f"root is {entry.folder.parent}, but {path} was changed after it was written; "
            "restore it, or delete it to do the work again"
        )


def test_a_result_of_another_entry_raises_an_error(entry, tmp_path):
    second = Store(tmp_path / "runs").entry("search", {"width": 0.7})
    second.finish({"top1": 1.0})
    entry.finish({"top1": 70.25})
    shutil.copy(second.folder / "result.json", entry.folder)
    with pytest.raises(InputError, match="was changed after it was written"):
        entry.result()


@pytest.mark.parametrize("content", ["[1]", "{}", '{"top1": 70.25}', '{"result": 3}', "3"])
def test_json_that_is_not_a_result_raises_an_error(entry, content):
    entry.finish({"top1": 70.25})
    (entry.folder / "result.json").write_text(content)
    with pytest.raises(InputError, match="restore it, or delete it to do the work again"):
        entry.result()


def test_a_result_with_another_json_layout_is_valid(entry):
    entry.finish({"top1": 70.25})
    path = entry.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert entry.result() == {"top1": 70.25}


def test_an_unreadable_result_raises_a_one_line_error(entry):
    (entry.folder / "result.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"result\.json cannot be read \(Is a directory\); name a"):
        entry.result()


@given(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)))
def test_floats_are_stored_exactly(tmp_path_factory, result):
    entry = Store(tmp_path_factory.mktemp("runs")).entry("a", 1)
    entry.finish(result)
    stored = entry.result()
    assert {name: number.hex() for name, number in stored.items()} == {
        name: number.hex() for name, number in result.items()
    }


def test_a_result_with_nan_is_not_written(entry):
    with pytest.raises(ValueError, match="not JSON compliant"):
        entry.finish({"top1": float("nan")})
    assert entry.result() is None


WORK = """
    import logging, sys, time
    from pathlib import Path
    from widthopt.runs.store import Store
    logging.basicConfig(format="%(message)s")
    root, go = Path(sys.argv[1]), Path(sys.argv[2])
    entry = Store(root).entry("search", {"width": 0.5})
    print("ready", flush=True)
    with entry.claim():
        if entry.result() is None:
            print("working", flush=True)
            for _ in range(2000):
                if go.exists():
                    break
                time.sleep(0.01)
            entry.finish({"top1": 1.0})
        else:
            print("found", flush=True)
"""


def test_only_one_of_two_processes_works_on_an_entry(tmp_path):
    go = tmp_path / "go"
    first = start_python(WORK, tmp_path / "runs", go)
    assert [first.stdout.readline(), first.stdout.readline()] == ["ready\n", "working\n"]
    second = start_python(WORK, tmp_path / "runs", go)
    assert second.stdout.readline() == "ready\n"
    assert "another process works on" in second.stderr.readline()
    go.touch()
    assert first.communicate(timeout=20)[0] == ""
    assert second.communicate(timeout=20)[0] == "found\n"


def test_a_claim_ends_when_its_process_is_killed(tmp_path, entry):
    first = start_python(WORK, tmp_path / "runs", tmp_path / "never")
    assert [first.stdout.readline(), first.stdout.readline()] == ["ready\n", "working\n"]
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=20)
    with entry.claim():
        assert entry.result() is None


def test_a_write_replaces_the_file_and_leaves_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_process_killed_during_a_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    killed = start_python(
        """
        import os, signal, sys
        from pathlib import Path
        from widthopt.files import write_atomically
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(Path(sys.argv[1]), "new" * 1000)
        """,
        tmp_path / "a",
    )
    killed.communicate(timeout=20)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"


def test_the_content_is_synced_before_the_file_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "a", "x")
    assert calls == ["fsync", "rename", "fsync"]


def test_partial_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    write_atomically(tmp_path / "a", "0123456789" * 10)
    assert (tmp_path / "a").read_text() == "0123456789" * 10


def make_failing_call(number):
    """Return a replacement of a system call that fails with this error."""

    def call(*_arguments):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_raises_a_one_line_error_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, make_failing_call(errno.ENOSPC))
        with pytest.raises(InputError) as caught:
            write_atomically(tmp_path / "a", "new")
    assert str(caught.value) == (
        f"root is {tmp_path}, but it cannot be written (No space left on device); "
        "make room on the disk and run the same command again"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_read_only_file_system_raises_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", make_failing_call(errno.EROFS))
    with pytest.raises(InputError, match=r"\(Read-only file system\); name a folder you may"):
        check_writable(tmp_path)


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from widthopt.errors import InputError
    from widthopt.runs.store import Store
    from widthopt.files import check_writable
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    root = Path(sys.argv[1])
    claim = Store(root).entry("a", 1).claim()
    for attempt in (lambda: check_writable(root), claim.__enter__):
        try:
            attempt()
        except InputError as error:
            print(error)
"""


def test_a_read_only_folder_raises_a_one_line_error_before_any_work(tmp_path):
    root = tmp_path / "runs"
    root.mkdir(mode=0o555)
    lines = start_python(READ_ONLY, root).communicate(timeout=20)[0].splitlines()
    assert lines[0].startswith(f"root is {root}, but it cannot be written (Permission denied); ")
    assert lines[1].startswith(f"root is {root}/a-")
    assert len(lines) == 2


def test_a_root_that_is_a_file_raises_a_one_line_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"root is .*/runs, but it cannot be written \(File exis"):
        check_writable(tmp_path / "runs")


def test_check_writable_creates_the_root_and_leaves_it_empty(tmp_path):
    check_writable(tmp_path / "new" / "runs")
    assert list((tmp_path / "new" / "runs").iterdir()) == []


# Claims.


def test_a_claim_records_its_process_and_is_removed_at_its_end(entry):
    with entry.claim(job="7_1"):
        claim = json.loads((entry.folder / "claim.json").read_text())
        assert abs(claim.pop("started") - time.time()) < 60
        assert claim == {"host": os.uname().nodename, "process": os.getpid(), "job": "7_1"}
    assert sorted(path.name for path in entry.folder.iterdir()) == ["fields.json", "lock"]


def test_a_claim_without_a_job_records_an_empty_string(entry):
    with entry.claim():
        assert json.loads((entry.folder / "claim.json").read_text())["job"] == ""


def test_a_claim_is_removed_after_an_error(entry):
    with pytest.raises(KeyError), entry.claim():
        raise KeyError
    assert not (entry.folder / "claim.json").exists()
    with entry.claim(wait=False):
        pass


def test_a_claim_without_waiting_raises_taken_with_the_process(entry, tmp_path):
    second = Store(tmp_path / "runs").entry("search", {"width": 0.5})
    with entry.claim(job="7"):
        with pytest.raises(Taken, match=rf"process {os.getpid()}, host .*, job 7\)"):
            second.claim(wait=False).__enter__()
        assert (entry.folder / "claim.json").exists()
        assert second.state() == "running"
    with second.claim(wait=False):
        pass


def test_reading_the_state_does_not_count_as_working(entry):
    with entry.claim():
        pass
    with entry._check_idle() as idle:  # noqa: SLF001 (as `state` does)
        assert idle
        assert entry.state() == "missing"
        with pytest.raises(Taken):  # no process can start now
            entry.claim(wait=False).__enter__()
    with entry.claim(wait=False):
        pass


def test_a_claim_file_that_cannot_be_removed_does_not_block_the_entry(entry, monkeypatch, caplog):
    with monkeypatch.context() as patch, entry.claim():
        entry.finish({"top1": 1.0})
        patch.setattr(os, "unlink", make_failing_call(errno.EIO))
    assert "claim.json could not be removed, which does no harm" in caplog.text
    assert entry.state() == "done"
    with entry.claim(wait=False):
        pass


def test_a_claim_file_is_removed_before_the_lock_is_released(entry, monkeypatch):
    unlink, states = os.unlink, []

    def record_and_unlink(path, **options):
        if Path(path).name == "claim.json":
            states.append(entry.state())
        return unlink(path, **options)

    with entry.claim():
        monkeypatch.setattr(os, "unlink", record_and_unlink)
    assert states == ["running"]


def test_an_entry_deleted_during_a_wait_is_claimed_by_one_process(tmp_path, entry):
    with ExitStack() as deleted:
        deleted.enter_context(entry.claim())
        waiting = start_python(WORK, tmp_path / "runs", tmp_path)
        assert waiting.stdout.readline() == "ready\n"
        assert "another process works on" in waiting.stderr.readline()
        shutil.rmtree(entry.folder)
        with entry.claim(wait=False):
            deleted.close()  # ends the claim that the process waiting for
            assert "another process works on" in waiting.stderr.readline()
    assert waiting.communicate(timeout=20)[0] == "working\n"
    assert entry.result() == {"top1": 1.0}


# Failures and states.


def break_lock():
    raise OSError(5, "no such\ndevice")


def record_failure(entry, job=""):
    with entry.claim(job=job):
        try:
            break_lock()
        except OSError as error:
            entry.fail(error)


def test_a_failure_records_the_error_and_its_process(entry):
    assert entry.failure() is None
    record_failure(entry, job="7")
    failure = entry.failure()
    assert abs(failure.pop("time") - time.time()) < 60
    assert "in break_lock" in failure.pop("traceback")
    assert failure == {
        "type": "OSError",
        "message": "[Errno 5] no such\ndevice",
        "host": os.uname().nodename,
        "process": os.getpid(),
        "rank": 0,
        "job": "7",
    }
    assert entry.result() is None


def test_only_the_first_failure_is_recorded(entry):
    with entry.claim():
        entry.fail(ValueError("the cause"), rank=3)
        entry.fail(RuntimeError("connection closed by peer"))
        assert (entry.failure()["message"], entry.failure()["rank"]) == ("the cause", 3)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "12"}, "12"),
        # SLURM_JOB_ID of an array element is not the id that the queue shows.
        ({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0"),
    ],
)
def test_the_current_job_has_the_id_that_the_queue_shows(environment, job, monkeypatch):
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert current_job() == job


def test_a_failure_is_removed_when_the_next_attempt_starts(entry):
    record_failure(entry)
    assert entry.state() == "failed"
    with entry.claim():
        assert (entry.failure(), entry.state()) == (None, "running")
    assert entry.state() == "missing"


def test_a_failure_is_removed_when_the_work_is_done(entry):
    with entry.claim():
        entry.fail(KeyError("a"))
        entry.finish({})
    assert (entry.failure(), entry.state()) == (None, "done")


def test_reading_writes_nothing(entry, tmp_path):
    store = Store(tmp_path / "runs")
    assert entry.state() == "missing"
    assert (entry.result(), entry.failure(), list(store.entries())) == (None, None, [])
    store.check(write=False)
    assert list(tmp_path.iterdir()) == []
    entry.record_job("7")
    assert entry.state() == "stale"
    assert entry.result() is None
    names = sorted(path.name for path in entry.folder.iterdir())
    assert names == ["fields.json", "submission.json"]


def test_a_submitted_entry_is_queued_while_its_job_is_live(entry):
    entry.record_job("7")
    assert json.loads((entry.folder / "submission.json").read_text()) == {"job": "7"}
    assert entry.state(live={"7"}) == "queued"
    assert entry.state(live={"8"}) == entry.state() == "stale"
    with entry.claim(job="7"):
        assert entry.state(live={"7"}) == "running"
        entry.finish({})
    assert entry.state(live={"7"}) == entry.state() == "done"


def test_a_failed_entry_that_is_submitted_again_is_queued(entry):
    entry.record_job("7")
    record_failure(entry, job="7")
    assert entry.state() == "failed"
    entry.record_job("8")
    assert entry.state(live=["8"]) == "queued"


def test_a_claim_of_a_live_job_is_running_even_without_a_lock(entry):
    with entry.claim(job="7"):
        claim = (entry.folder / "claim.json").read_text()
    (entry.folder / "claim.json").write_text(claim)
    assert entry.state(live={"7"}) == "running"
    assert entry.state(live={"8"}) == "stale"


def test_entries_that_need_a_failed_entry_are_blocked():
    states = {
        "a": "failed",
        "b": "missing",
        "c": "stale",
        "d": "done",
        "e": "missing",
        "f": "queued",
        "g": "missing",
    }
    needs = {"b": ["a"], "c": ["b", "elsewhere"], "d": ["a"], "e": ["d"], "f": ["a"], "g": ["f"]}
    before = dict(states)
    assert mark_blocked(states, needs) == {**states, "b": "blocked", "c": "blocked"}
    assert states == before


def test_entries_that_need_each_other_cause_no_endless_loop():
    needs = {"a": ["b"], "b": ["a", "c"]}
    states = {"a": "missing", "b": "missing", "c": "failed"}
    assert mark_blocked(states, needs) == {"a": "blocked", "b": "blocked", "c": "failed"}
    assert mark_blocked({**states, "c": "done"}, needs) == {**states, "c": "done"}


def test_all_entries_of_a_long_chain_are_blocked():
    needs = {str(place): [str(place - 1)] for place in range(1, 5000)}
    states = dict.fromkeys(needs, "missing")
    assert set(mark_blocked({"0": "blocked", **states}, needs).values()) == {"blocked"}


def test_the_states_of_a_thousand_entries_take_less_than_a_second(tmp_path):
    store = Store(tmp_path)
    result = {"channels": {f"layer{n}": 64 + n for n in range(20)}, "top1": 70.25}
    first = store.entry("search", {"seed": 0})
    with first.claim():
        first.finish(result)
    done = json.loads((first.folder / "result.json").read_text())
    for seed in range(1, 1000):
        second = store.entry("search", {"seed": seed})
        second.folder.mkdir()
        for name in ("fields.json", "lock"):
            shutil.copy(first.folder / name, second.folder)
        if seed < 500:
            text = json.dumps({**done, "key": second.key})
            (second.folder / "result.json").write_text(text)
    before = time.process_time()
    states = [store.entry("search", {"seed": seed}).state() for seed in range(1000)]
    assert time.process_time() - before < 1
    assert (states.count("done"), states.count("missing")) == (500, 500)


# Roots.


def test_check_writes_the_format_of_a_new_root_once(tmp_path):
    store = Store(tmp_path / "new" / "runs")
    store.check()
    assert [path.name for path in store.root.iterdir()] == ["store.json"]
    assert json.loads((store.root / "store.json").read_text()) == {"format": 2}
    before = (store.root / "store.json").stat().st_mtime_ns
    store.check()
    store.check(write=False)
    assert (store.root / "store.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    ("content", "stated"), [('{"format": 3}', "3"), ("{}", "None"), ("[2]", "None")]
)
def test_a_root_of_another_version_raises_a_one_line_error(tmp_path, write, content, stated):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(InputError) as caught:
        Store(tmp_path).check(write=write)
    assert str(caught.value) == (
        f"root is {tmp_path}, but it belongs to another version (format {stated} in store.json, "
        "2 here); name another folder"
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


@pytest.mark.parametrize("write", [True, False])
def test_a_store_whose_root_is_a_file_raises_an_error(tmp_path, write):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"root is .*/runs, but that is a file; name a folder"):
        Store(tmp_path / "runs").check(write=write)


def test_check_detects_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", make_failing_call(errno.ENOSPC))
    with pytest.raises(InputError, match="make room on the disk and run the same command again"):
        Store(tmp_path).check()
    Store(tmp_path).check(write=False)


def test_entries_yields_the_entries_on_the_disk(tmp_path):
    store = Store(tmp_path)
    store.check()
    created = [store.entry("search", {"width": 0.5}), store.entry("train", [1, 2.0, "a", None])]
    created[0].finish({"top1": 1.0})
    created[1].record_job("7")
    (tmp_path / "resnet18-run").mkdir()
    store.entry("search", "killed before its fields were written").folder.mkdir()
    stored = list(store.entries())
    assert [(item.kind, item.fields) for item in stored] == [
        (item.kind, item.fields) for item in created
    ]
    assert [item.folder for item in stored] == [item.folder for item in created]
    assert [item.state() for item in stored] == ["done", "stale"]
    assert [item.kind for item in store.entries("train")] == ["train"]


@pytest.mark.parametrize(
    "content",
    [
        '{"kind":"search","fields":{"width":0.7}}',
        '{"kind":"train","fields":{"width":0.5}}',
        '{"kind":"search","fields":NaN}',
        '{"kind":1,"fields":{}}',
        '{"kind":"search","fields":' + "[" * 600 + "]" * 600 + "}",
        '{"kind":"search"}',
        "[]",
    ],
)
def test_a_folder_with_the_fields_of_another_entry_is_skipped(entry, caplog, content):
    entry.finish({})
    (entry.folder / "fields.json").write_text(content)
    assert list(Store(entry.folder.parent).entries()) == []
    assert "fields.json does not belong to its folder; the folder is skipped" in caplog.text
    with entry.claim():
        pass
    assert [item.key for item in Store(entry.folder.parent).entries()] == [entry.key]


def test_a_root_that_cannot_be_listed_raises_a_one_line_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"cannot be read \(Not a directory\); name a folder you"):
        list(Store(tmp_path / "runs").entries())
