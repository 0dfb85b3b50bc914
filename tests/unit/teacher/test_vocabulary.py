"""Vocabularies, read and compared."""

import pytest
from tokenizers import Tokenizer, models

from let_plugin.demo import TOKENIZER
from let_plugin.errors import ConfigError
from let_plugin.teacher.vocabulary import (
    WithoutSpecialTokens,
    compare_vocabularies,
    read_tokenizer,
    read_vocabulary,
)
from tests.support.rank_files import EOS, write_demo

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
