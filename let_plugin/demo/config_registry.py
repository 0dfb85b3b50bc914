"""torchtitan configuration functions of the demo, for TOML files: `base = "let_plugin.demo.student"`."""

from functools import partial
from typing import Any

from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec, text_training
from let_plugin.runtime.upstream import default_adamw
from let_plugin.teacher.titan.source import register_teacher_spec

_VOCAB_SIZE = 4096  # of the demo's tokenizer
# The student is initialized as Hugging Face's Llama: the alignment's gradient scales as 1/|h|, and torchtitan's 1.0
# makes h large.
_STUDENT: dict[str, Any] = {"dim": 256, "num_layers": 6, "num_heads": 4, "hidden_dim": 768, "embedding_init_std": 0.02}
_TEACHER: dict[str, Any] = {"dim": 128, "num_layers": 4, "num_heads": 2, "hidden_dim": 352, "tie_embeddings": True}

_teacher_spec = partial(llama_spec, "demo_teacher", vocab_size=_VOCAB_SIZE, **_TEACHER)
register_teacher_spec("demo_teacher", _teacher_spec, path=TEACHER, tokenizer_path=TOKENIZER)


def _config(model_spec: ModelSpec) -> Trainer.Config:
    config: Any = text_training(model_spec, "let_demo_train", "let_demo_validation")
    config.hf_assets_path = TOKENIZER
    config.optimizer = default_adamw(lr=2e-3)
    config.lr_scheduler.warmup_steps = 10
    config.training.local_batch_size, config.training.seq_len, config.training.steps = 32, 256, 120
    config.validator.freq, config.validator.steps = 10, 4
    config.checkpoint.interval = 1000
    if host.emulates_bfloat16():
        config.training.mixed_precision_param = "float32"
    return config


def student() -> Trainer.Config:
    """A student of 7.2 million parameters: 6 blocks of width 256."""
    return _config(llama_spec("demo_student", vocab_size=_VOCAB_SIZE, **_STUDENT))


def teacher() -> Trainer.Config:
    """The demo's teacher, 1.3 million parameters: 4 blocks of width 128, tied embeddings."""
    return _config(_teacher_spec())


def smollm2_student() -> Trainer.Config:
    """The demo's student with SmolLM2's vocabulary, 30 million parameters, most of them embeddings."""
    return _config(llama_spec("demo_student", vocab_size=49_152, **_STUDENT))
