"""What is particular to a .gguf file: its checks, and its tokenizer."""

import os
from pathlib import Path
from typing import Any

from let_plugin.teacher.base import bad_path, require
from let_plugin.teacher.hf.files import linked


def check_file(path: str) -> None:
    """ConfigError if a package or the file is missing; `transformers` says whether it is GGUF."""
    require("transformers", "gguf", "accelerate")
    if not os.path.isfile(path):  # a pipe would be waited for
        raise bad_path(path, "no such file (or it is a folder or a pipe); give the path of a .gguf file")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a .gguf file, as `transformers` makes it. ConfigError if there is none."""
    check_file(path)
    from transformers import AutoTokenizer

    from let_plugin.teacher.hf.checkpoint import quiet_transformers

    try:
        with quiet_transformers(), linked([Path(path)]) as folder:
            return AutoTokenizer.from_pretrained(folder, gguf_file=os.listdir(folder)[0], local_files_only=True)
    except Exception as error:  # a damaged file fails in numpy, struct or the reader: any type of error
        message = f"its tokenizer cannot be read: the file is truncated, damaged or of an unknown kind; {error}"
        raise bad_path(path, message) from error
