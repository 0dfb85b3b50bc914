"""Tokenizers by folder; `test_hf.py` has those that a teacher finds by itself."""

import json

import pytest

from let_plugin.config.errors import ConfigError
from let_plugin.demo import TOKENIZER
from let_plugin.tokens.hf_tokenizers import (
    load_tokenizer,
    open_tokenizer,
    open_tokenizer_path,
    read_tokenizer_path,
    read_vocabulary_of,
)

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

KEY = "let.teacher.path"


def write_gpt2(folder):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def test_tokenizer_json_by_torchtitans_reader_and_other_files_by_transformers(tmp_path):
    assert len(read_tokenizer_path(TOKENIZER)) == 4096 and open_tokenizer_path(TOKENIZER).eos_id == 0
    write_gpt2(tmp_path)
    assert read_vocabulary_of(str(tmp_path), KEY)["ab"] == 5
    assert open_tokenizer(str(tmp_path), KEY).encode("ab") == [5]


@pytest.mark.parametrize("read", [read_tokenizer_path, open_tokenizer_path])
def test_a_folder_that_is_named_must_have_one(tmp_path, read):
    for path in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match=r"let\.teacher\.tokenizer_path = .* no tokenizer there"):
            read(path)


def test_one_that_is_looked_for_may_be_missing_but_not_damaged(tmp_path):
    assert read_vocabulary_of(str(tmp_path), KEY) is None and open_tokenizer(str(tmp_path), KEY) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path = .* its tokenizer cannot be read"):
        load_tokenizer(str(tmp_path), KEY)
