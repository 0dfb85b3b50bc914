"""Old keys are gone, and what they are called now exists."""

import dataclasses

import pytest
from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from let_plugin.config.legacy_keys import OLD_KEYS, explain


@pytest.fixture(scope="module")
def config():
    return llama3_debugmodel()


def exists(config, key):
    for name in key.split("."):
        if isinstance(config, list):
            config = config[int(name)]
        elif isinstance(config, dict):
            if name not in config:
                return False
            config = config[name]
        elif dataclasses.is_dataclass(config) and hasattr(config, name):
            config = getattr(config, name)
        else:
            return False
    return True


@pytest.mark.parametrize("key", OLD_KEYS)
def test_old_key_is_gone(config, key):
    assert not exists(config, key)
    config = dataclasses.replace(
        config, activation_checkpoint=MemoryBudgetAC.Config(), compile=dataclasses.replace(config.compile, enable=True)
    )
    assert not exists(config, key)


@pytest.mark.parametrize("old", [old for old in OLD_KEYS.values() if old.new is not None])
def test_new_key_exists(config, old):
    keys_of_the_toml_layer = ("base", "activation_checkpoint.type")
    assert old.new in keys_of_the_toml_layer or exists(config, old.new)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.dataset", "an old torchtitan key; torchtitan 0.3 calls it dataloader.dataset"),
        ("profiling.profile_freq", "an old torchtitan key; torchtitan 0.3 calls it profiler.profile_freq"),
        ("training.dataloader.num_workers", "an old torchtitan key; torchtitan 0.3 calls it dataloader.num_workers"),
        ("job.description", "an old torchtitan key that torchtitan 0.3 does not have"),
        ("training.steps", None),
        ("metrics.enable_tensorboard", None),
        ("nonsense", None),
    ],
)
def test_explain(key, message):
    assert explain(key) == message


def test_explain_adds_the_note():
    assert explain("quantize.linear.float8.emulate").endswith("choose a `base` that has them)")
    assert "[beta1, beta2]" in explain("optimizer.beta1")
