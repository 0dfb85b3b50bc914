"""A tokenizer for torchtitan that reads a tiktoken rank file of this machine, such as Llama-3's tokenizer.model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiktoken import Encoding
from torchtitan.components.tokenizer import BaseTokenizer

from let_plugin.config.errors import ConfigError, Problem, suggest
from let_plugin.tokens import rank_files
from let_plugin.tokens.rank_files import KNOWN, RankFile, SpecialTokens

_FOLDER_KEY = "hf_assets_path"
# tiktoken's regular expressions overflow their stack in longer runs of white space (seen at a million characters); the
# number is that of Llama-3's own code, so that the ids are the same.
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_MAX_RUN + 1},}}|(?<!\s)\s{{{_MAX_RUN + 1},}}")
# Something of every kind that the patterns tell apart.
_SAMPLE = "It's \u00c9t\u00e9 12345,\t\u4f60\u597d e\u0301  \u00a0\r\n \u0000#/ \U0001f600\n\n  "


class TikTokenTokenizer(BaseTokenizer):
    """Byte-level BPE by tiktoken.

    Text is text: what looks like a special token in it becomes ordinary tokens. Any text comes back from `decode`, but
    for lone surrogates, which become U+FFFD.

    Args:
        config: Its table in the configuration, `[tokenizer]`.
        tokenizer_path: Folder with the rank file.

    Raises:
        ConfigError: If the rank file is missing or damaged, or the configuration does not fit it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        rank_file: str = ""
        """
        The rank file, relative to `hf_assets_path`. Empty: the only one in that folder (*.tiktoken, tokenizer.model or
        tiktoken.model).
        """

        vocabulary: str = ""
        """
        The published vocabulary that the file is: "llama3", "llama3.1", "gpt2", "p50k_base", "cl100k_base" or
        "o200k_base". It brings all that follows. Empty: told by the file's SHA-256.
        """

        pattern: str = ""
        """How a text is split first: the name of a vocabulary that splits so, or a regular expression of tiktoken's."""

        special_tokens: dict[str, int] = field(default_factory=dict)
        """
        Token -> id. Empty: the vocabulary's if it is named above, else those in tokenizer_config.json beside the file
        (`added_tokens_decoder`), else those of the vocabulary that the file is.
        """

        bos_token: str | None = None
        """The special token that begins a document; "": none does. Not given: as the special tokens say."""

        eos_token: str | None = None
        """The special token that ends a document. Not given: as the special tokens say."""

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()
        file = _rank_file(config, tokenizer_path)
        pattern = _pattern(config, file)
        special = _special_tokens(config, file)
        try:
            self.tokenizer = Encoding(
                file.path.name, pat_str=pattern, mergeable_ranks=file.ranks, special_tokens=dict(special.ids)
            )
        except ValueError as error:
            raise ConfigError(Problem("tokenizer.pattern", f"not a regular expression: {error}", pattern)) from error
        self._vocabulary = rank_files.vocabulary(file.ranks, special.ids)
        self.bos_token, self.eos_token = special.bos_token, special.eos_token
        self.bos_id = None if special.bos_token is None else special.ids[special.bos_token]
        self.eos_id = None if special.eos_token is None else special.ids[special.eos_token]
        if self.decode(self.encode(_SAMPLE)) != _SAMPLE:
            message = "loses text: what it does not match would be left out; let it match every character"
            raise ConfigError(Problem("tokenizer.pattern", message, pattern))

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The ids of `text`, between those that begin and end a document if asked for (and if there are such)."""
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        for piece in _without_long_runs(text):
            ids += self.tokenizer.encode_ordinary(piece)
        return [*ids, self.eos_id] if add_eos and self.eos_id is not None else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. KeyError for an id that there is not."""
        if skip_special_tokens:
            token_ids = [i for i in token_ids if not self.tokenizer.is_special_token(i)]
        return self.tokenizer.decode(list(token_ids))

    @property
    def vocab_size(self) -> int:
        """The largest id, and one: what an embedding needs. Fewer tokens than that if there are gaps."""
        return self.tokenizer.n_vocab

    def get_vocab_size(self) -> int:
        """See `vocab_size`."""
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, special tokens included, as in the tokenizer.json of the same vocabulary."""
        return self._vocabulary


def _rank_file(config: TikTokenTokenizer.Config, folder: str) -> RankFile:
    if config.rank_file:
        return rank_files.read(Path(folder, config.rank_file), key="tokenizer.rank_file")
    path = rank_files.find(folder, key="tokenizer.rank_file")
    if path is None:
        message = "no tiktoken rank file there (*.tiktoken, tokenizer.model or tiktoken.model); name it by rank_file"
        raise ConfigError(Problem(_FOLDER_KEY, f"{message} in [tokenizer]", folder))
    return rank_files.read(path, key=_FOLDER_KEY)


def _known_as(config: TikTokenTokenizer.Config, file: RankFile) -> list[str]:
    """The names of the published vocabulary that the file is said to be, or is."""
    if not config.vocabulary:
        return file.known_as
    if config.vocabulary not in KNOWN:
        raise ConfigError(Problem("tokenizer.vocabulary", f"unknown; {suggest(config.vocabulary, KNOWN)}"))
    wanted = KNOWN[config.vocabulary].num_ranks
    if len(file.ranks) != wanted:
        message = f"has {wanted:,} tokens in its file, and {file.path} has {len(file.ranks):,}"
        raise ConfigError(Problem("tokenizer.vocabulary", message, config.vocabulary))
    return [config.vocabulary]


def _pattern(config: TikTokenTokenizer.Config, file: RankFile) -> str:
    if config.pattern in KNOWN:
        return KNOWN[config.pattern].pattern
    if re.fullmatch(r"[\w.-]+", config.pattern):  # as a regular expression, it would match itself
        message = f"no vocabulary of that name; {suggest(config.pattern, KNOWN)}; or a regular expression"
        raise ConfigError(Problem("tokenizer.pattern", message, config.pattern))
    if config.pattern:
        return config.pattern
    known = _known_as(config, file)
    if not known:
        message = f"{file.path} does not say how text is split before tokens are looked for: name a vocabulary that"
        message = f"{message} splits so ({', '.join(sorted(KNOWN))}), or give the regular expression"
        raise ConfigError(Problem("tokenizer.pattern", message))
    return KNOWN[known[0]].pattern


def _special_tokens(config: TikTokenTokenizer.Config, file: RankFile) -> SpecialTokens:
    """The special tokens, checked against the file."""
    known = _known_as(config, file)
    if config.special_tokens:
        special: SpecialTokens | None = SpecialTokens(config.special_tokens)
    elif config.vocabulary:
        special = KNOWN[known[0]].special_tokens
    else:
        special = file.special_tokens()
    if special is None:
        if known:
            message = (
                f"name one of {', '.join(known)}: {file.path} is the file of each, and their special tokens differ"
            )
            raise ConfigError(Problem("tokenizer.vocabulary", message))
        message = f"{file.path} names none: give a table, token = id, or tokenizer_config.json beside it"
        raise ConfigError(Problem("tokenizer.special_tokens", message))
    _check_ids(special.ids, file)
    bos_token = special.bos_token if config.bos_token is None else config.bos_token or None
    eos_token = special.eos_token if config.eos_token is None else config.eos_token or None
    for name, token in (("bos_token", bos_token), ("eos_token", eos_token)):
        if token is not None and token not in special.ids:
            message = f"not a special token; {suggest(token, special.ids)}"
            raise ConfigError(Problem(f"tokenizer.{name}", message, token))
    if eos_token is None:
        message = f"missing: which of the special tokens ends a document? {suggest('end of text', special.ids)}"
        raise ConfigError(Problem("tokenizer.eos_token", message))
    return SpecialTokens(special.ids, bos_token, eos_token)


def _check_ids(ids: Mapping[str, int], file: RankFile) -> None:
    taken = {rank: repr(token) for token, rank in file.ranks.items()}
    ordinary = set(rank_files.vocabulary(file.ranks, {}))
    problems = []
    for token, i in ids.items():
        key = f"tokenizer.special_tokens.{token}"
        if i in taken:
            problems.append(Problem(key, f"that id is taken by {taken[i]}", i))
        elif not 0 <= i < 2**31:
            problems.append(Problem(key, "must be an id, 0 or more", i))
        elif not token or token in ordinary:
            problems.append(Problem(key, f"there is an ordinary token of that name in {file.path}", i))
        taken.setdefault(i, repr(token))
    if problems:
        raise ConfigError(problems)


def _without_long_runs(text: str) -> Iterator[str]:
    """The text in pieces none of which has more than 25,000 characters of white space, or of others, in a row."""
    start = 0
    if len(text) > _MAX_RUN:
        for run in _LONG_RUN.finditer(text):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield text[start:end]
                start = end
    yield text[start:]
