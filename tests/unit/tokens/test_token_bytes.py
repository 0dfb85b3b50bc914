"""The bytes of tokens. That those of a text's tokens are the text: see `test_text_encoding.py`."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.encoding import TextEncoder, Tokens
from let_plugin.tokens.token_bytes import token_bytes
from tests.support import tokenizer_kinds as kinds


@pytest.mark.parametrize("make", [kinds.demo, kinds.llama2, kinds.metaspace])
def test_special_tokens_have_no_bytes_and_other_added_ones_stand_for_their_text(make):
    tokenizer = Tokenizer.from_str(make().to_str())
    known = token_bytes(tokenizer)
    assert [i for i, value in enumerate(known) if value is None] == ([0] if make is kinds.demo else [0, 1, 2])
    tokenizer.add_tokens([AddedToken("  \u4f60<tool>", normalized=False)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    assert token_bytes(tokenizer) == [*known, "  \u4f60<tool>".encode(), None]
    ids = kinds.ids_of(tokenizer, "a  \u4f60<tool>")
    assert b"".join(token_bytes(tokenizer)[i] for i in ids).decode().endswith("a  \u4f60<tool>")


def test_tokenizers_of_torchtitan_and_transformers():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=kinds.demo())
    for tokenizer in (fast, HuggingFaceTokenizer(tokenizer_path=TOKENIZER)):
        assert token_bytes(tokenizer) == token_bytes(kinds.demo())


def test_torchtitan_makes_special_tokens_of_all_that_are_listed_and_we_do_not(tmp_path):
    own = Tokenizer.from_str(kinds.demo().to_str())
    own.add_tokens([AddedToken("\n\n", normalized=False)])
    own.save(str(tmp_path / "tokenizer.json"))
    added = own.token_to_id("\n\n")
    listed = {"added_tokens_decoder": {added: {"content": "\n\n", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(tmp_path))
    assert tokenizer.tokenizer.get_added_tokens_decoder()[added].special
    assert token_bytes(tokenizer) == token_bytes(own)
    assert added in TextEncoder(tokenizer, Tokens(tokenizer))("a\n\nb", at_start=True)[0]


def test_tokens_that_do_not_say_their_bytes_are_refused():
    word_piece = models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")
    for model in (word_piece, models.BPE({"a": 0, "b": 1}, []), models.WordLevel({"a": 0})):
        with pytest.raises(ValueError, match=rf"\({type(model).__name__}\) do not say which bytes"):
            token_bytes(Tokenizer(model))
    with pytest.raises(ValueError, match="of a dict"):
        token_bytes({})
