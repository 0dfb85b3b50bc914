"""`python -m let_plugin.teacher.gguf`: writes the tokenizer of a GGUF file to a folder."""

import sys

from let_plugin.teacher.hf.gguf import main

if __name__ == "__main__":
    sys.exit(main())
