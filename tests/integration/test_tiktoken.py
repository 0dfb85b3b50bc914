"""A student and a teacher whose vocabulary is a tiktoken rank file, from a TOML file."""

import pytest

from tests.support import jobs
from tests.support.rank_files import EOS, write_demo, write_small

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


def cross_configs(folder, tiny_config):
    """The tiny run with a teacher of another vocabulary: as tokenizer.json, and as a rank file that says no more."""
    write_small(folder / "small")
    for name in ("json", "ranks"):
        text = tiny_config.read_text().replace("let_plugin/demo/assets/tokenizer", f"{folder}/small/{name}")
        text += "token_alignment = {enable = true, teacher_seq_len = 128}\n"
        (folder / f"cross_{name}.toml").write_text(text)
    table = f'{{pattern = "gpt2", special_tokens = {{"{EOS}" = 0}}, bos_token = "{EOS}", eos_token = "{EOS}"}}'
    with open(folder / "cross_ranks.toml", "a") as file:
        file.write(f"teacher.tiktoken = {table}\n")
    return folder / "cross_json.toml", folder / "cross_ranks.toml"


@pytest.mark.slow
def test_a_rank_file_trains_as_the_tokenizer_json_of_the_same_vocabulary(tmp_path, tiny_config):
    """Of student and teacher, and of a teacher alone that has another vocabulary than the student."""
    steps = ["--training.steps", 3, "--let.stop-step", 2]
    cross_json, cross_ranks = cross_configs(tmp_path, tiny_config)
    cases = {"json": tiny_config, "ranks": rank_file_config(tmp_path, tiny_config)}
    cases |= {"cross json": cross_json, "cross ranks": cross_ranks}
    runs = jobs.train_many(tmp_path, {name: (config, steps) for name, config in cases.items()}, processes=1)
    for result in runs.values():
        assert "error" not in result, result["error"]
    for name in ("ranks", "cross ranks"):
        run, same = runs[name], runs[name.replace("ranks", "json")]
        assert jobs.relative_difference(run["gradients"], same["gradients"]) == 0
        for got, expected in zip(run["logged"], same["logged"], strict=True):
            for key in ("loss", "let/cosine", "let/aligned_fraction"):
                assert got.get(key) == expected.get(key)
        assert run["logged"][0]["let/cosine"] != 0
        assert [line["let/active"] for line in run["logged"]] == [1, 1, 0]
    assert jobs.relative_difference(runs["cross ranks"]["gradients"], runs["ranks"]["gradients"]) > 1e-3
    assert runs["cross ranks"]["logged"][0]["let/aligned_fraction"] > 0.9


@pytest.mark.slow
def test_what_is_wrong_with_a_rank_file_is_said_before_anything_runs(tmp_path, tiny_config):
    config = rank_file_config(tmp_path, tiny_config)
    config.write_text(config.read_text().replace('= "gpt2"', '= "gpt3"'))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/a.tiktoken").write_text("YQ== 0\nYg== 0\n")
    teacher = ["--let.teacher.tokenizer-path", tmp_path / "teacher", "--let.teacher.tiktoken.patern", "gpt2"]
    result = jobs.run("let_plugin.train", config, "--check", *teacher, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{config}: tokenizer.pattern = 'gpt3': no vocabulary of that name; did you mean 'gpt2'?" in result.stderr
    assert "let.teacher.tiktoken.patern = 'gpt2': no such option; did you mean 'pattern'?" in result.stderr
    assert not (tmp_path / "out").exists()
