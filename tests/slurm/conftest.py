"""Clusters that tests share, or a reason why there are none."""

import pytest
from cluster import Cluster, why_not


def pytest_collection_modifyitems(items):
    for item in items:
        if "slurm" in item.path.parts:
            item.add_marker(pytest.mark.slurm)


def _started(**options):
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(**options) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared():
    yield from _started(accounting=True)


@pytest.fixture(scope="session")
def shared_bare():
    yield from _started(accounting=False, nodes=1, prefix="bare")


@pytest.fixture
def cluster(shared):
    """A cluster with accounting, and no jobs."""
    shared.cancel_all()
    yield shared
    shared.cancel_all()


@pytest.fixture
def bare(shared_bare):
    """A cluster without accounting, and no jobs."""
    shared_bare.cancel_all()
    yield shared_bare
    shared_bare.cancel_all()
