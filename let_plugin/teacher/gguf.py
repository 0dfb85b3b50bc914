"""`python -m let_plugin.teacher.gguf FILE.gguf --tokenizer DIR` writes its tokenizer in the form that torchtitan reads.

So a student can be trained on it.
"""

import argparse
from pathlib import Path

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, exit_with
from let_plugin.teacher.base import bad_path, require


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; SystemExit with code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m let_plugin.teacher.gguf", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE.gguf", help="the .gguf file")
    parser.add_argument("--tokenizer", metavar="DIR", required=True, help="folder to write its tokenizer to")
    options = parser.parse_args(arguments)
    try:
        require("transformers")
        from let_plugin.teacher.hf.checkpoint import Checkpoint

        tokenizer = Checkpoint(TeacherConfig(path=options.file)).tokenizer()
        if tokenizer is None or tokenizer.eos_token is None:  # torchtitan puts one between documents
            raise bad_path(options.file, "its tokenizer has no end-of-sequence token")
    except ConfigError as error:
        exit_with(error, parser.prog)
    tokenizer.save_pretrained(options.tokenizer)
    print(f"wrote {Path(options.tokenizer) / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
