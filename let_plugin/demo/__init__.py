"""The embedded default: English text, a tokenizer, and a small teacher that was pretrained on that text."""

from let_plugin.runtime.data import ASSETS, TEACHER, TEXT, TOKENIZER

__all__ = ["ASSETS", "TEACHER", "TEXT", "TOKENIZER"]
