import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from widthopt.errors import InputError
from widthopt.store import Store, writable, write_atomically


ROOT = Path(__file__).parents[1]


def python(script, *arguments, **options):
    """A Python process of its own that runs ``script``."""
    return subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def stage(tmp_path):
    return Store(tmp_path / "runs").stage("search", {"width": 0.5})


def test_a_stage_has_a_folder_named_by_kind_and_content(stage, tmp_path):
    assert stage.folder == tmp_path / "runs" / f"search-{stage.key}"
    assert Store(tmp_path / "runs").stage("search", {"width": 0.7}).folder != stage.folder
    assert not stage.folder.exists()


def test_a_finished_stage_has_its_result_and_an_unfinished_one_has_none(stage, tmp_path):
    with stage.claim():
        assert stage.result() is None
        stage.finish({"top1": 70.25, "multipliers": {"conv1": 1.5}})
    again = Store(tmp_path / "runs").stage("search", {"width": 0.5})
    assert again.result() == {"top1": 70.25, "multipliers": {"conv1": 1.5}}


def test_a_claim_writes_down_what_names_the_stage(stage):
    with stage.claim():
        pass
    written = json.loads((stage.folder / "fields.json").read_text())
    assert written == {"kind": "search", "fields": {"width": 0.5}}


@pytest.mark.parametrize("content", [b"", b'{"top1": 70.2', b"[1]", b"\xff\xfe", b"{}}"])
def test_a_result_that_is_not_whole_is_not_believed(stage, caplog, content):
    stage.finish({"top1": 70.25})
    (stage.folder / "result.json").write_bytes(content)
    assert stage.result() is None
    assert "result.json is not whole; it is treated as missing" in caplog.text


def test_a_result_that_is_not_a_number_is_not_written(stage):
    with pytest.raises(ValueError, match="not JSON compliant"):
        stage.finish({"top1": float("nan")})
    assert stage.result() is None


WORK = """
    import logging, sys, time
    from pathlib import Path
    from widthopt.store import Store
    logging.basicConfig(format="%(message)s")
    root, go = Path(sys.argv[1]), Path(sys.argv[2])
    stage = Store(root).stage("search", {"width": 0.5})
    print("ready", flush=True)
    with stage.claim():
        if stage.result() is None:
            print("working", flush=True)
            for _ in range(2000):
                if go.exists():
                    break
                time.sleep(0.01)
            stage.finish({"top1": 1.0})
        else:
            print("found", flush=True)
"""


def test_two_processes_claim_a_stage_and_only_one_works(tmp_path):
    go = tmp_path / "go"
    first = python(WORK, tmp_path / "runs", go)
    assert [first.stdout.readline(), first.stdout.readline()] == ["ready\n", "working\n"]
    second = python(WORK, tmp_path / "runs", go)
    assert second.stdout.readline() == "ready\n"
    assert "another process works on" in second.stderr.readline()
    go.touch()
    assert first.communicate(timeout=20)[0] == ""
    assert second.communicate(timeout=20)[0] == "found\n"


def test_a_claim_ends_with_a_process_that_is_killed(tmp_path, stage):
    first = python(WORK, tmp_path / "runs", tmp_path / "never")
    assert [first.stdout.readline(), first.stdout.readline()] == ["ready\n", "working\n"]
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=20)
    with stage.claim():
        assert stage.result() is None


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    killed = python(
        """
        import os, signal, sys
        from pathlib import Path
        from widthopt.store import write_atomically
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(Path(sys.argv[1]), "new" * 1000)
        """,
        tmp_path / "a",
    )
    killed.communicate(timeout=20)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"


def test_the_disk_has_the_content_before_the_file_takes_the_name(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "a", "x")
    assert seen == ["fsync", "rename", "fsync"]


def test_content_that_is_written_in_pieces_arrives_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    write_atomically(tmp_path / "a", "0123456789" * 10)
    assert (tmp_path / "a").read_text() == "0123456789" * 10


def refusing(number):
    """What stands in for a system call that fails with this error."""

    def call(*_arguments):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refusing(errno.ENOSPC))
        with pytest.raises(InputError) as caught:
            write_atomically(tmp_path / "a", "new")
    assert str(caught.value) == (
        f"root is {tmp_path}, but it cannot be written (No space left on device); "
        "make room and run the same again"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_read_only_file_system_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", refusing(errno.EROFS))
    with pytest.raises(InputError, match=r"\(Read-only file system\); name a folder you may"):
        writable(tmp_path)


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from widthopt.errors import InputError
    from widthopt.store import Store, writable
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    root = Path(sys.argv[1])
    for attempt in (lambda: writable(root), lambda: Store(root).stage("a", 1).claim().__enter__()):
        try:
            attempt()
        except InputError as error:
            print(error)
"""


def test_a_read_only_folder_is_one_line_before_any_work(tmp_path):
    root = tmp_path / "runs"
    root.mkdir(mode=0o555)
    lines = python(READ_ONLY, root).communicate(timeout=20)[0].splitlines()
    assert lines[0].startswith(f"root is {root}, but it cannot be written (Permission denied); ")
    assert lines[1].startswith(f"root is {root}/a-")
    assert len(lines) == 2


def test_a_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"root is .*/runs, but it cannot be written \(File exis"):
        writable(tmp_path / "runs")


def test_a_writable_root_is_made_and_left_empty(tmp_path):
    writable(tmp_path / "new" / "runs")
    assert list((tmp_path / "new" / "runs").iterdir()) == []
