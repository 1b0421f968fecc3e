"""Status output with messages that contain markup."""

import pytest

from widthopt.reporting import console


ROWS = {
    "name": "search-0123456789ab", "kind": "search", "what": "a[/b] [red]search :smile:",
    "job": "7", "queue": "RUNNING",
}  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        "[/__w/pytorch/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "process 2: [enforce fail at pair.cc] and [bold]bold[/bold] and [Errno 28] :warning:",
    ],
)
def test_status_prints_the_message_of_a_failure_unchanged(message, capsys):
    row = {**ROWS, "state": "failed", "why": message}
    console.show_status([{"sweep": "sweep[/x]-1", "points": 1, "runs": [row]}], as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith(f"failed: {row['name']} ({row['what']}), job 7 RUNNING: {message}")
    assert text.startswith("sweep[/x]-1, 1 points")
