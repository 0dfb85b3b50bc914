"""From the `[let.teacher]` table to the teacher that it means."""

import os

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.base import TeacherSource


def open_teacher(config: TeacherConfig) -> TeacherSource:
    """Finds the teacher and reads what its files say of it, not its weights. ConfigError says what is missing or wrong.

    Each kind of teacher is imported when it is asked for: `transformers` and `gguf` are optional dependencies.
    """
    if config.spec:
        from let_plugin.teacher.titan.source import TitanTeacherSource

        return TitanTeacherSource(config)
    if not config.path:
        raise ConfigError(
            Problem(
                "let.teacher.path",
                "no teacher is given; set it to a folder in Hugging Face format, a hub name or a .gguf file",
                config.path,
            )
        )
    if config.path.endswith(".gguf") or (os.path.isfile(config.path) and not config.path.endswith(".safetensors")):
        from let_plugin.teacher.hf.gguf import GGUFTeacherSource

        return GGUFTeacherSource(config)
    from let_plugin.teacher.hf.source import HFTeacherSource

    return HFTeacherSource(config)
