"""Vocabularies, read and compared."""

import dataclasses
import json

import pytest
from tokenizers import Tokenizer, models

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.tokens.tiktoken import TikTokenTokenizer
from let_plugin.tokens.vocabulary import (
    WithoutSpecialTokens,
    compare_vocabularies,
    described_tokenizer,
    described_vocabulary,
    read_tokenizer,
    read_vocabulary,
)
from tests.support.rank_files import EOS, demo_tokenizer, write_demo

STUDENT = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}


def test_read_vocabulary_with_special_tokens(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(str(tmp_path)) == {"a": 0, "[UNK]": 1, "<eos>": 2}


def test_the_demos_vocabulary():
    vocabulary = read_vocabulary(TOKENIZER)
    assert sorted(vocabulary.values()) == list(range(4096))


@pytest.mark.parametrize("folder", ["", "absent"])
def test_no_tokenizer(tmp_path, folder):
    assert read_vocabulary(str(tmp_path / folder)) is None


def test_equal_vocabularies():
    difference = compare_vocabularies(STUDENT, dict(reversed(STUDENT.items())))
    assert (difference.num_differing, difference.num_student, difference.examples) == (0, 5, [])


def test_ids_that_only_the_teacher_has_do_not_matter():
    assert compare_vocabularies(STUDENT, {**STUDENT, "f": 5}).num_differing == 0


def test_swapped_missing_and_renamed_tokens():
    difference = compare_vocabularies(STUDENT, {"b": 0, "a": 1, "c": 2, "D": 3})
    assert (difference.num_differing, difference.num_student) == (4, 5)
    assert difference.examples == [  # the first three, by id
        "id 0: 'a' (student), 'b' (teacher)",
        "id 1: 'b' (student), 'a' (teacher)",
        "id 3: 'd' (student), 'D' (teacher)",
    ]


def test_an_id_that_the_teacher_lacks():
    difference = compare_vocabularies(STUDENT, {token: i for token, i in STUDENT.items() if token != "e"})
    assert difference.examples == ["id 4: 'e' (student), 'no such id' (teacher)"]


def test_the_same_tokens_under_other_ids_are_another_vocabulary():
    shifted = {token: i + 1 for token, i in STUDENT.items()}
    assert compare_vocabularies(STUDENT, shifted).num_differing == 5


def test_a_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path.*tokenizer\.json cannot be read"):
        read_vocabulary(str(tmp_path), key="let.teacher.path")


def test_a_rank_file_and_the_tokenizer_json_of_the_same_vocabulary(tmp_path):
    write_demo(tmp_path / "bare")
    write_demo(tmp_path / "told", tell_special_tokens=True)
    full = read_vocabulary(TOKENIZER)
    assert read_vocabulary(str(tmp_path / "told")) == full
    assert type(read_vocabulary(str(tmp_path / "told"))) is dict

    bare = read_vocabulary(str(tmp_path / "bare"))
    assert isinstance(bare, WithoutSpecialTokens) and bare == {t: i for t, i in full.items() if t != EOS}
    assert compare_vocabularies(full, bare).num_differing == 0
    assert compare_vocabularies(full, dict(bare)).examples == [f"id 0: {EOS!r} (student), 'no such id' (teacher)"]
    swapped = full | {"\u0120the": full["\u0120a"], "\u0120a": full["\u0120the"]}
    assert compare_vocabularies(swapped, bare).num_differing == 2


def test_a_tokenizer_json_comes_before_a_rank_file(tmp_path):
    write_demo(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(str(tmp_path)) == {"a": 0}


def test_read_tokenizer(tmp_path):
    assert read_tokenizer(TOKENIZER, key="let.teacher.path").eos_id == 0
    assert read_tokenizer(str(tmp_path), key="let.teacher.path") is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"let.teacher.path = .*the tokenizer cannot be read"):
        read_tokenizer(str(tmp_path), key="let.teacher.path")


# Rank files that `let.teacher.tiktoken` describes

DEMO = {"pattern": "gpt2", "special_tokens": {EOS: 0}, "eos_token": EOS}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Folder with the demo's vocabulary as a rank file and nothing else."""
    return str(write_demo(tmp_path_factory.mktemp("bare")).parent)


def problem_of(read, *args, **kwargs):
    with pytest.raises(ConfigError) as info:
        read(*args, **kwargs)
    (problem,) = info.value.problems
    return problem


@pytest.mark.parametrize("key", ["path", "tokenizer_path"])
def test_a_table_says_what_the_rank_file_does_not(bare, key):
    config = TeacherConfig(**{key: bare}, tiktoken=DEMO)
    tokenizer = described_tokenizer(config)
    assert tokenizer.encode("the end", add_bos=True, add_eos=True) == [*demo_tokenizer().encode("the end").ids, 0]
    vocabulary = described_vocabulary(config)
    assert vocabulary == read_vocabulary(TOKENIZER)
    assert not isinstance(vocabulary, WithoutSpecialTokens)


def test_every_kind_of_teacher_reads_it(bare):
    from let_plugin.demo import config_registry  # noqa: F401  registers it
    from let_plugin.teacher.sources import open_teacher

    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    for fields in ({"path": TEACHER}, {"spec": "demo_teacher"}):
        source = open_teacher(TeacherConfig(**fields, tokenizer_path=bare, tiktoken=DEMO))
        assert source.vocabulary() == read_vocabulary(TOKENIZER)
        assert source.tokenizer().encode("the end") == demo_tokenizer().encode("the end").ids
        source = open_teacher(TeacherConfig(**fields, tokenizer_path=bare))
        assert isinstance(source.vocabulary(), WithoutSpecialTokens)
        assert problem_of(source.tokenizer).key == "let.teacher.tiktoken.pattern"


def test_one_of_several_rank_files_even_beside_a_tokenizer_json(tmp_path):
    write_demo(tmp_path / "original", "tokenizer.model")
    write_demo(tmp_path, "a.tiktoken")
    write_demo(tmp_path, "b.tiktoken")
    for read in (read_tokenizer, read_vocabulary):
        problem = problem_of(read, str(tmp_path), key="let.teacher.path")
        assert problem.key == "let.teacher.tiktoken.rank_file" and "(a.tiktoken, b.tiktoken)" in problem.message
    Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    config = TeacherConfig(path=str(tmp_path), tiktoken={"rank_file": "original/tokenizer.model"})
    vocabulary = described_vocabulary(config)
    assert isinstance(vocabulary, WithoutSpecialTokens) and len(vocabulary) == 4095
    config.tiktoken |= DEMO
    assert len(described_vocabulary(config)) == 4096
    assert described_tokenizer(config).tokenizer.name == "tokenizer.model"


@pytest.mark.parametrize("where", [TOKENIZER, TEACHER, f"{TEACHER}/model.safetensors", "org/name"])
def test_a_table_for_a_tokenizer_that_is_no_rank_file(where):
    for read in (described_tokenizer, described_vocabulary):
        problem = problem_of(read, TeacherConfig(path=where, tiktoken=DEMO))
        assert problem.key == "let.teacher.tiktoken"
        assert f"there is none in let.teacher.path = {where!r}: leave it out" in problem.message


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({"patern": "gpt2"}, "patern", "no such option; did you mean 'pattern'?"),
        ({"pattern": 2}, "pattern", "is not an instance of str"),
        ({**DEMO, "special_tokens": {EOS: 0, "<b>": "5000"}}, "special_tokens", "is not an instance of int"),
        ({}, "pattern", "does not say how text is split"),
        ({"pattern": "gpt3"}, "pattern", "no vocabulary of that name; did you mean 'gpt2'?"),
        ({"pattern": "gpt2"}, "special_tokens", "names none: give a table"),
        ({"vocabulary": "llama3"}, "vocabulary", "has 128,000 tokens in its file"),
        ({**DEMO, "special_tokens": {EOS: 5}}, f"special_tokens.{EOS}", "that id is taken by b'%'"),
        ({**DEMO, "eos_token": "<|end|>"}, "eos_token", "not a special token"),
        ({**DEMO, "rank_file": "absent"}, "rank_file", "cannot be read"),
    ],
)
def test_a_table_that_is_wrong(bare, table, key, message):
    problem = problem_of(described_tokenizer, TeacherConfig(path=bare, tiktoken=table))
    assert problem.key == f"let.teacher.tiktoken.{key}" and message in problem.message, problem
    names = {field.name for field in dataclasses.fields(TikTokenTokenizer.Config)}
    assert problem.key.split(".")[3] in {*names, "patern"}


def test_a_damaged_file_is_named_by_the_key_of_its_folder(tmp_path):
    (tmp_path / "a.tiktoken").write_text("YQ== 0\n")
    for read in (read_tokenizer, read_vocabulary):
        assert problem_of(read, str(tmp_path), key="let.teacher.path").key == "let.teacher.path"
    config = TeacherConfig(path=TEACHER, tokenizer_path=str(tmp_path), tiktoken=DEMO)
    assert problem_of(described_tokenizer, config).key == "let.teacher.tokenizer_path"
    write_demo(tmp_path, "a.tiktoken", tell_special_tokens=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"0": {}}}))
    config = TeacherConfig(path=str(tmp_path), tiktoken={"pattern": "gpt2"})
    assert problem_of(described_tokenizer, config).key == str(tmp_path / "tokenizer_config.json")
