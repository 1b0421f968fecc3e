"""The clusters that the tests here share; without SLURM, or without the rights, they skip."""

from pathlib import Path

import pytest
from cluster import Cluster
from login import Folder


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for task in items:
        if Path(__file__).parent in task.path.parents:
            task.add_marker(pytest.mark.slurm)


def _start(**options):
    if obstacle := Cluster.obstacle():
        pytest.skip(obstacle)
    with Cluster(**options) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster():
    """Three nodes, with accounting."""
    yield from _start()


@pytest.fixture(scope="session")
def bare():
    """A node, without accounting."""
    yield from _start(nodes=1, accounting=False)


@pytest.fixture
def folder(tmp_path, cluster):
    """A person's on the login node of the cluster with accounting."""
    return Folder(tmp_path, cluster)


@pytest.fixture(autouse=True)
def _clean(request, monkeypatch):
    """The environment of a client; and after each test no jobs, and all daemons alive."""
    names = [name for name in ("bare", "cluster") if name in request.fixturenames]
    used = [request.getfixturevalue(name) for name in names]
    for item in used:
        monkeypatch.setenv("SLURM_CONF", item.environment["SLURM_CONF"])
    yield
    for item in used:
        item.repair()
        item.cancel_all()
