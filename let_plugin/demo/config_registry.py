"""torchtitan configuration functions of the demo: `base = "let_plugin.demo.student"`.

The TOML files in train_configs/ overlay these.
"""

from functools import partial
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.runtime.models import llama_spec
from let_plugin.runtime.upstream import (
    CheckpointManager,
    HuggingFaceTextDataLoader,
    LRSchedulersContainer,
    default_adamw,
)
from let_plugin.teacher.titan.source import register_teacher_spec

_VOCAB_SIZE = 4096  # of the demo's tokenizer
# The student is initialized as Hugging Face's Llama: the alignment's gradient scales as 1/|h|, and torchtitan's 1.0
# makes h large.
_STUDENT: dict[str, Any] = {"dim": 256, "num_layers": 6, "num_heads": 4, "hidden_dim": 768, "embedding_init_std": 0.02}
_TEACHER: dict[str, Any] = {"dim": 128, "num_layers": 4, "num_heads": 2, "hidden_dim": 352, "tie_embeddings": True}

_teacher_spec = partial(llama_spec, "demo_teacher", vocab_size=_VOCAB_SIZE, **_TEACHER)
register_teacher_spec("demo_teacher", _teacher_spec, path=TEACHER, tokenizer_path=TOKENIZER)


def _config(model_spec: ModelSpec) -> Trainer.Config:
    return Trainer.Config(
        model_spec=model_spec,
        hf_assets_path=TOKENIZER,
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(model_spec))
        ),
        optimizer=default_adamw(lr=2e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=10, decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(local_batch_size=32, seq_len=256, steps=120, disable_cuda_graphs=True),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="let_demo_train"),
        validator=Validator.Config(
            enable=True,
            freq=10,
            steps=4,
            dataloader=HuggingFaceTextDataLoader.Config(dataset="let_demo_validation", infinite=False),
        ),
        metrics=MetricsProcessor.Config(log_freq=10, enable_tensorboard=True),
        checkpoint=CheckpointManager.Config(interval=1000),
        debug=DebugConfig(seed=0),
    )


def student() -> Trainer.Config:
    """A student of 7.2 million parameters: 6 blocks of width 256."""
    return _config(llama_spec("demo_student", vocab_size=_VOCAB_SIZE, **_STUDENT))


def teacher() -> Trainer.Config:
    """The demo's teacher, 1.3 million parameters: 4 blocks of width 128, tied embeddings."""
    return _config(_teacher_spec())


def smollm2_student() -> Trainer.Config:
    """The demo's student with SmolLM2's vocabulary, 30 million parameters, most of them embeddings."""
    return _config(llama_spec("demo_student", vocab_size=49_152, **_STUDENT))
