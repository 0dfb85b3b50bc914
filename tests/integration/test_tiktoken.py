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


def rank_file_config(folder, tiny_config):
    """The tiny run with the demo's vocabulary as the student's rank file, and as the teacher's tokenizer.json."""
    write_ranks(folder / "tokenizer", "tokenizer.model")
    path = folder / "tiktoken.toml"
    path.write_text(f'hf_assets_path = "{folder}/tokenizer"\n{tiny_config.read_text()}{TOKENIZER}')
    return path


@pytest.mark.slow
def test_a_rank_file_trains_as_the_tokenizer_json_of_the_same_vocabulary(tmp_path, tiny_config):
    steps = ["--training.steps", 3, "--let.stop-step", 2]
    cases = {"json": tiny_config, "ranks": rank_file_config(tmp_path, tiny_config)}
    runs = jobs.train_many(tmp_path, {name: (config, steps) for name, config in cases.items()}, processes=1)
    for result in runs.values():
        assert "error" not in result, result["error"]
    assert jobs.relative_difference(runs["ranks"]["gradients"], runs["json"]["gradients"]) == 0
    for got, expected in zip(runs["ranks"]["logged"], runs["json"]["logged"], strict=True):
        assert got["loss"] == expected["loss"] and got.get("let/cosine") == expected.get("let/cosine")
    assert [line["let/active"] for line in runs["ranks"]["logged"]] == [1, 1, 0]


@pytest.mark.slow
def test_what_is_wrong_with_a_rank_file_is_said_before_anything_runs(tmp_path, tiny_config):
    config = rank_file_config(tmp_path, tiny_config)
    config.write_text(config.read_text().replace(json.dumps(GPT2_PATTERN), '"gpt3"'))
    result = jobs.run("let_plugin.train", config, "--check", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{config}: tokenizer.pattern = 'gpt3': loses text" in result.stderr
    assert not (tmp_path / "out").exists()
