import os

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: its threads would wait for those of pytest-xdist's other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from let_plugin.runtime import host

# However busy the machine is; and the same examples each time, so that a change is judged by what it changes.
settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Unit tests build torchtitan's parts in this process: it has to be set up before they are imported.
host.set_up("cpu")

from tests.support import jobs  # noqa: E402


def pytest_collection_modifyitems(items):
    """The longest files first: none of them is to run alone in the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/integration/", "tests/unit/teacher/")))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """(folder of a DCP checkpoint, its weights) of the tiny teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    return folder, jobs.make_teacher(folder)


@pytest.fixture(scope="session")
def headed_teacher(tmp_path_factory):
    """The same of the tiny teacher with a head."""
    folder = tmp_path_factory.mktemp("headed")
    return folder, jobs.make_teacher(folder, with_head=True)


@pytest.fixture
def tiny_config(tmp_path, tiny_teacher):
    """Path of a TOML file that trains the tiny student with the tiny teacher."""
    return jobs.tiny(tmp_path, tiny_teacher[0])
