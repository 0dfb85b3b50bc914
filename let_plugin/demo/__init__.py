"""The embedded default: English text, a tokenizer, and a small teacher that was pretrained on that text."""

from importlib.resources import files

ASSETS = str(files(__package__) / "assets")
TOKENIZER = f"{ASSETS}/tokenizer"
TEACHER = f"{ASSETS}/teacher"
TEXT = {split: f"{ASSETS}/text.{split}.jsonl.xz" for split in ("train", "validation", "test")}
