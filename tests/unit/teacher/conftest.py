import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a family -> folder with a small random model of it."""
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    from tests.support import hf_models

    root = tmp_path_factory.mktemp("teachers")
    return {name: hf_models.save(root / name, hf_models.config_of(name)) for name in hf_models.FAMILIES}
