"""torchtitan configuration functions of the evidence suite: `base = "benchmarks.evidence.student"`.

They read the corpus of `benchmarks/corpus.py` in assets/corpus. Of the 0.85 million parameters of the student's trunk
`weak_teacher` has 1.6 % and `strong_teacher` 12.6 %. All of them have 2,048 embeddings.
"""

from functools import partial
from typing import Any

from torchtitan.trainer import Trainer

from let_plugin.runtime.models import llama_spec, text_training
from let_plugin.runtime.upstream import default_adamw
from let_plugin.teacher.titan.source import register_teacher_spec

CORPUS = "assets/corpus"
_VOCAB_SIZE = 2048  # of the corpus's tokenizer
_SHAPES: dict[str, dict[str, Any]] = {
    "weak_teacher": {"dim": 32, "num_layers": 1, "num_heads": 1, "hidden_dim": 96, "tie_embeddings": True},
    "strong_teacher": {"dim": 64, "num_layers": 2, "num_heads": 1, "hidden_dim": 192, "tie_embeddings": True},
    # Initialized as Hugging Face's Llama: the alignment's gradient scales as 1/|h|, and torchtitan's 1.0 makes h large.
    "student": {"dim": 128, "num_layers": 4, "num_heads": 2, "hidden_dim": 384, "embedding_init_std": 0.02},
    "large_student": {"dim": 192, "num_layers": 4, "num_heads": 3, "hidden_dim": 576, "embedding_init_std": 0.02},
    "wide_student": {"dim": 1024, "num_layers": 8, "num_heads": 16, "hidden_dim": 2816, "embedding_init_std": 0.02},
    "gpu_teacher": {"dim": 256, "num_layers": 4, "num_heads": 4, "hidden_dim": 704, "tie_embeddings": True},
    "gpu_student": {"dim": 640, "num_layers": 8, "num_heads": 10, "hidden_dim": 1792, "embedding_init_std": 0.02},
}
_SPECS = {name: partial(llama_spec, name, vocab_size=_VOCAB_SIZE, **shape) for name, shape in _SHAPES.items()}
_TEACHER_STEPS = {"weak_teacher": 1000, "strong_teacher": 8000, "gpu_teacher": 6400}
for _name, _steps in _TEACHER_STEPS.items():
    _path = f"{CORPUS}/{_name}/checkpoint/step-{_steps}"
    register_teacher_spec(_name, _SPECS[_name], path=_path, tokenizer_path=f"{CORPUS}/tokenizer")


def _config(name: str) -> Trainer.Config:
    config: Any = text_training(_SPECS[name](), "text_files", "text_files")
    config.hf_assets_path = f"{CORPUS}/tokenizer"
    config.dataloader.dataset_path = f"{CORPUS}/train.jsonl"
    config.validator.dataloader.dataset_path = f"{CORPUS}/validation.jsonl"
    config.optimizer = default_adamw(lr=4e-3)
    config.training.local_batch_size, config.training.seq_len = 32, 128
    config.training.steps, config.lr_scheduler.warmup_steps = 1000, 50
    config.validator.freq, config.validator.steps = 100, 16
    config.metrics.enable_tensorboard = False
    config.compile.enable = True
    config.activation_checkpoint = None
    return config


def student() -> Trainer.Config:
    """4 blocks of width 128; 4.1 million tokens."""
    return _config("student")


def large_student() -> Trainer.Config:
    """4 blocks of width 192; 20.5 million tokens."""
    config = _config("large_student")
    config.training.steps = 5000
    return config


def wide_student() -> Trainer.Config:
    """8 blocks of width 1024, 107 million parameters: for what a step costs, not for training."""
    config = _config("wide_student")
    config.training.local_batch_size = 48
    return config


def gpu_student() -> Trainer.Config:
    """8 blocks of width 640, 42 million parameters; 105 million tokens, for one GPU."""
    config = _config("gpu_student")
    config.training.local_batch_size, config.training.steps = 256, 3200
    config.optimizer = default_adamw(lr=2e-3)  # not tuned; 4e-3 is that of a fifth of its width
    return config


def weak_teacher() -> Trainer.Config:
    """A block of width 32; 4.1 million tokens. The student passes it in the first quarter of its run."""
    return _teacher("weak_teacher")


def strong_teacher() -> Trainer.Config:
    """2 blocks of width 64; 33 million tokens. The student of 4.1 million tokens does not reach it."""
    return _teacher("strong_teacher")


def gpu_teacher() -> Trainer.Config:
    """4 blocks of width 256, 9 % of gpu_student; 210 million tokens, for one GPU."""
    config = _teacher("gpu_teacher")
    config.training.local_batch_size = 256
    return config


def _teacher(name: str) -> Trainer.Config:
    config: Any = _config(name)
    steps = _TEACHER_STEPS[name]
    config.dump_folder = f"{CORPUS}/{name}"
    config.training.steps = steps
    config.validator.freq = steps // 10
    config.checkpoint.enable = True
    config.checkpoint.interval = 500
    config.checkpoint.last_save_in_hf = True
    config.checkpoint.export_dtype = "bfloat16"
    return config
