"""Old keys are gone, and what they are called now exists."""

import re

from torchtitan.models.llama3.config_registry import llama3_debugmodel

from let_plugin.config.legacy_keys import OLD_KEYS
from let_plugin.config.schema import walk


def test_old_keys_are_gone_and_new_ones_exist():
    keys = {key for key, _, _ in walk(llama3_debugmodel())}
    assert not keys & set(OLD_KEYS)
    new = {key for text in OLD_KEYS.values() for key in re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", text)}
    new |= {table for text in OLD_KEYS.values() for table in re.findall(r"\[([a-z_.]+)\]", text)}
    assert len(new) > 15
    assert new - keys == {"activation_checkpoint.type"}
