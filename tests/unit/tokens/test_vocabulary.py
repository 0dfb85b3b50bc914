"""A teacher's tokenizer, opened; vocabularies, compared."""

import hashlib
import json
import shutil

import pytest

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.tokens import tiktoken
from let_plugin.tokens.vocabulary import compare_vocabularies, open_tokenizer
from tests.support.tokenizer_kinds import EOS, write_ranks


def open_folder(folder, key="path", **fields):
    return open_tokenizer(TeacherConfig(**{key: str(folder)}, **fields))


def write_gpt2(folder, **config):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **config}))


@pytest.mark.parametrize("key", ["path", "tokenizer_path"])
def test_tokenizer_json_is_read_as_the_students_special_tokens_included(key, config, tmp_path):
    shutil.copy(f"{TOKENIZER}/tokenizer.json", tmp_path)
    shutil.copy(f"{TOKENIZER}/tokenizer_config.json", tmp_path)
    tokenizer = open_folder(tmp_path, key)
    student = config.tokenizer.build(tokenizer_path=TOKENIZER)
    assert type(tokenizer) is type(student) and tokenizer.bos_id == student.bos_id == 0
    vocabulary = tokenizer.get_vocab()
    assert vocabulary == student.get_vocab() and len(vocabulary) == 4096 and vocabulary[EOS] == 0


def test_other_files_are_read_by_transformers(tmp_path):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    write_gpt2(tmp_path)
    tokenizer = open_folder(tmp_path)
    assert tokenizer.get_vocab()["ab"] == 5 and tokenizer.encode("ab") == [5]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path = .* its tokenizer cannot be read"):
        open_folder(tmp_path)


def test_code_of_a_tokenizer_runs_only_if_it_is_trusted(tmp_path):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    write_gpt2(tmp_path, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    code = "from transformers import GPT2Tokenizer\nclass Own(GPT2Tokenizer):\n    is_own = True\n"
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(ConfigError, match=r"let\.teacher\.path = .*trust_remote_code"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, trust_remote_code=True).is_own


def test_of_rank_files_llama3s_alone(tmp_path, monkeypatch):
    path = write_ranks(tmp_path, "ranks.tiktoken")
    assert open_folder(tmp_path) is None
    monkeypatch.setattr(tiktoken, "LLAMA3_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert open_folder(tmp_path).encode("the end") == open_folder(TOKENIZER).encode("the end")


def test_a_tokenizer_that_is_not_there_or_damaged(tmp_path):
    assert open_folder(tmp_path) is None
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"let\.teacher\.tokenizer_path = .* no tokenizer there"):
            open_tokenizer(TeacherConfig(path=TEACHER, tokenizer_path=str(path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path = .*tokenizer\.json cannot be read"):
        open_folder(tmp_path)


def test_vocabularies_differ_where_a_students_id_is_another_token_to_the_teacher():
    student = {"a": 0, "b": 1, "c": 2}
    assert compare_vocabularies(student, {"f": 5, **dict(reversed(student.items()))}) == []
    differences = ["id 0: 'a' (student), 'A' (teacher)", "id 2: 'c' (student), 'no such id' (teacher)"]
    assert compare_vocabularies(student, {"A": 0, "b": 1}) == differences
