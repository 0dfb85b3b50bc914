"""Makes the corpus of the convergence suite: English documentation packages of Debian 12, about 100 MB of text.

    python benchmarks/corpus.py assets/corpus            # needs apt-get and dpkg; downloads about 180 MB
    python benchmarks/corpus.py assets/corpus --debs DIR # packages that are there already

Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` (a document per line: "source", "text"), `tokenizer/` (a
byte-level BPE trained on the training split), and `manifest.json`: version, SHA-256 and licences of each package, size
and SHA-256 of each split. `benchmarks/corpus_manifest.json` is the manifest of the corpus of the committed rows;
nothing else is committed. A package may have been updated since: the splits then differ, and the script says so.
Needs lxml.

A paragraph occurs once in the whole corpus: of equal ones only the first is kept, so no held-out paragraph is in the
training split.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lxml.etree
import lxml.html
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# What is read of each package: the suffixes of its files.
PACKAGES = {
    "anarchism": (".html",),
    "apache2-doc": (".html.en", ".html"),
    "debian-handbook": (".html",),
    "debian-policy": (".html",),
    "developers-reference": (".html",),
    "dict-foldoc": (".dz",),
    "dict-gcide": (".dz",),
    "gimp-help-en": (".html",),
    "libreoffice-help-en-us": (".html",),
    "linux-doc-6.1": (".html",),
    "octave-doc": (".html",),
    "openjdk-17-doc": (".html",),
    "perl-doc": (".pod",),
    "postgresql-doc-15": (".html",),
    "python-django-doc": (".html",),
    "python3.11-doc": (".html",),
    "rust-doc": (".html",),
    "sqlite3-doc": (".html",),
    "wordnet-base": ("data.adj", "data.adv", "data.noun", "data.verb"),
}
HTML = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True)
NO_TEXT = ("script", "style", "nav", "head", "pre", "table", "footer")
BLOCKS = ("p", "li", "dd")
MAX_CHARS, MIN_CHARS = 12_000, 200  # of a document
HELD_OUT = 400  # documents, in the validation and in the test split each
VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
MANIFEST = Path(__file__).with_name("corpus_manifest.json")


def unpack(package: str, debs: Path, into: Path) -> dict[str, object]:
    """Unpacks a package; downloads it first if it is not in `debs`. Returns its line of the manifest."""
    if not (found := sorted(debs.glob(f"{package}_*.deb"))):
        subprocess.run(["apt-get", "-qq", "download", package], cwd=debs, check=True)
        found = sorted(debs.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg", "-x", found[-1], into], check=True)
    version = subprocess.check_output(["dpkg-deb", "-f", found[-1], "Version"], text=True).strip()
    copyrights = "".join(read(path) for path in into.glob("usr/share/doc/*/copyright"))
    licences = sorted(set(re.findall(r"^License: *([\w.+-]+)$", copyrights, flags=re.M)))
    return {"version": version, "sha256": sha256(found[-1]), "licences": licences or ["in its copyright file"]}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode(errors="replace")


def paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a file that are sentences: mostly letters, at least nine words."""
    if ".html" in path.suffixes:
        root = lxml.html.document_fromstring(path.read_bytes(), parser=HTML)
        lxml.etree.strip_elements(root, *NO_TEXT, with_tail=False)
        blocks = [e.text_content() for e in root.iter(*BLOCKS) if next(e.iterdescendants(*BLOCKS), None) is None]
    elif path.name.startswith("data."):  # WordNet: words | gloss
        lines = [line.partition("|") for line in read(path).splitlines() if not line.startswith("  ")]
        blocks = [f"{words.split()[4].replace('_', ' ')}: {gloss}" for words, _, gloss in lines]
    else:
        text = re.sub(r"[A-Z]<+ ?([^<>]*) ?>+", r"\1", read(path))  # POD's marks
        blocks = [block for block in re.split(r"\n\s*\n", text) if not block.startswith(("=", " "))]
    for block in blocks:
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if paragraph.count(" ") >= 8 and letters > 0.75 * len(paragraph):
            yield paragraph


def documents(package: str, folder: Path, seen: set[str]) -> Iterator[str]:
    """The documents of a package: its files, without the paragraphs in `seen`, cut at about MAX_CHARS."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    for path in files:
        if not path.name.endswith(PACKAGES[package]) or (package == "debian-handbook" and "en-US" not in path.parts):
            continue
        document = ""
        for paragraph in paragraphs(path):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            if document and len(document) + len(paragraph) > MAX_CHARS:
                yield document
                document = ""
            document += paragraph + "\n"
        if len(document) >= MIN_CHARS:
            yield document


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(out: Path, splits: dict[str, list[dict[str, str]]]) -> dict[str, object]:
    """Writes the splits and the tokenizer; returns their lines of the manifest."""
    tokenizer = train_tokenizer([document["text"] for document in splits["train"]])
    (out / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer/tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (out / "tokenizer/tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    described: dict[str, object] = {"tokenizer": {"sha256": sha256(out / "tokenizer/tokenizer.json")}}
    for name, rows in splits.items():
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        encodings = tokenizer.encode_batch_fast([row["text"] for row in rows])
        described[name] = {
            "documents": len(rows),
            "characters": sum(len(row["text"]) for row in rows),
            "tokens": sum(len(encoding.ids) + 2 for encoding in encodings),
            "sha256": sha256(path),
        }
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write to")
    parser.add_argument("--debs", type=Path, metavar="DIR", help="where the packages are, or are downloaded to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, packages, seen = [], {}, set[str]()
    with tempfile.TemporaryDirectory() as temporary:
        debs = args.debs or Path(temporary) / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            folder = Path(temporary) / package
            folder.mkdir()
            packages[package] = unpack(package, debs, folder)
            texts = list(documents(package, folder, seen))
            packages[package] |= {"documents": len(texts), "characters": sum(map(len, texts))}
            rows += [{"source": package, "text": text} for text in texts]
            print(package, json.dumps(packages[package]), flush=True)
    random.Random(0).shuffle(rows)
    splits = {
        "train": rows[2 * HELD_OUT :],
        "validation": rows[:HELD_OUT],
        "test": rows[HELD_OUT : 2 * HELD_OUT],
    }
    manifest = {"packages": packages, **write(args.out, splits)}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps({name: manifest[name] for name in ("train", "validation", "test", "tokenizer")}, indent=2))
    if MANIFEST.exists() and json.loads(MANIFEST.read_text())["train"] != manifest["train"]:
        print(f"note: this is not the text of {MANIFEST.name}: a package has been updated since")


if __name__ == "__main__":
    main()
