"""A student whose vocabulary is a tiktoken rank file, from a TOML file."""

import json

import pytest

from tests.support import jobs
from tests.support.tokenizer_kinds import EOS, GPT2_PATTERN, write_ranks

TOKENIZER = f"""
[tokenizer]
type = "TikTokenTokenizer"
pattern = {json.dumps(GPT2_PATTERN)}
bos_token = "{EOS}"
eos_token = "{EOS}"
[tokenizer.special_tokens]
"{EOS}" = 0
"""


@pytest.mark.slow
def test_a_rank_file_trains_as_the_tokenizer_json_of_the_same_vocabulary(tmp_path, tiny_config):
    steps = ["--training.steps", 3, "--let.stop-step", 2]
    # The demo's vocabulary as the student's rank file, and as the teacher's tokenizer.json.
    write_ranks(tmp_path / "tokenizer", "tokenizer.model")
    ranks = tmp_path / "tiktoken.toml"
    ranks.write_text(f'hf_assets_path = "{tmp_path}/tokenizer"\n{tiny_config.read_text()}{TOKENIZER}')
    cases = {"json": tiny_config, "ranks": ranks}
    runs = jobs.train_many(tmp_path, {name: (config, steps) for name, config in cases.items()}, processes=1)
    assert jobs.relative_difference(runs["ranks"]["gradients"], runs["json"]["gradients"]) == 0
    for got, expected in zip(runs["ranks"]["logged"], runs["json"]["logged"], strict=True):
        assert got["loss"] == expected["loss"] and got.get("let/cosine") == expected.get("let/cosine")
    assert [line["let/active"] for line in runs["ranks"]["logged"]] == [1, 1, 0]
