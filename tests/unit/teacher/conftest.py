import functools
from importlib.util import find_spec

import pytest

from tests.support import hf_models

if find_spec("transformers") is None:  # pip install let-plugin[hf]
    collect_ignore_glob = ["hf/*", "titan/test_spec.py", "test_language_model.py", "test_outer_layers.py"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a family -> folder with a small random model of it."""
    root = tmp_path_factory.mktemp("teachers")
    return {name: hf_models.save(root / name, hf_models.config_of(name)) for name in hf_models.FAMILIES}


@pytest.fixture
def build(config, parallel_dims):
    """Loads a source's teacher for the tiny student."""
    return functools.partial(hf_models.build, config=config, parallel_dims=parallel_dims)
