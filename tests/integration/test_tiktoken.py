"""A student and a teacher whose vocabulary is a tiktoken rank file, from a TOML file."""

import pytest

from tests.support import jobs
from tests.support.rank_files import EOS, write_demo

TOKENIZER = f"""
[tokenizer]
type = "TikTokenTokenizer"
pattern = "gpt2"
bos_token = "{EOS}"
eos_token = "{EOS}"
[tokenizer.special_tokens]
"{EOS}" = 0
"""


def rank_file_config(folder, tiny_config):
    """The tiny run with the demo's vocabulary as a rank file, of the student and of the teacher."""
    write_demo(folder / "tokenizer", "tokenizer.model")
    text = tiny_config.read_text().replace("let_plugin/demo/assets/tokenizer", f"{folder}/tokenizer")
    path = folder / "tiktoken.toml"
    path.write_text(f'hf_assets_path = "{folder}/tokenizer"\n{text}{TOKENIZER}')
    return path


@pytest.mark.slow
def test_a_rank_file_trains_as_the_tokenizer_json_of_the_same_vocabulary(tmp_path, tiny_config):
    config = rank_file_config(tmp_path, tiny_config)
    steps = ["--training.steps", 3, "--let.stop-step", 2]
    runs = jobs.train_many(tmp_path, {"json": (tiny_config, steps), "ranks": (config, steps)}, processes=1)
    for result in runs.values():
        assert "error" not in result, result["error"]
    assert jobs.relative_difference(runs["ranks"]["gradients"], runs["json"]["gradients"]) == 0
    for got, expected in zip(runs["ranks"]["logged"], runs["json"]["logged"], strict=True):
        assert got["loss"] == expected["loss"] and got.get("let/cosine") == expected.get("let/cosine")
    assert runs["ranks"]["logged"][0]["let/cosine"] != 0
    assert [line["let/active"] for line in runs["ranks"]["logged"]] == [1, 1, 0]


@pytest.mark.slow
def test_what_is_wrong_with_a_rank_file_is_said_before_anything_runs(tmp_path, tiny_config):
    config = rank_file_config(tmp_path, tiny_config)
    config.write_text(config.read_text().replace('= "gpt2"', '= "gpt3"'))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/a.tiktoken").write_text("YQ== 0\nYg== 0\n")
    result = jobs.run(
        "let_plugin.train", config, "--check", "--let.teacher.tokenizer-path", tmp_path / "teacher", check=False
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{config}: tokenizer.pattern = 'gpt3': no vocabulary of that name; did you mean 'gpt2'?" in result.stderr
    assert not (tmp_path / "out").exists()
