"""Llama models of any size, built from torchtitan's parts, and their training on text."""

from functools import partial

import torch.nn as nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from let_plugin.runtime import upstream


def llama_spec(
    flavor: str,
    *,
    dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    vocab_size: int,
    num_kv_heads: int | None = None,
    rope_theta: float = 10_000.0,
    max_seq_len: int = 131_072,
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
    embedding_init_std: float = 1.0,
) -> ModelSpec:
    """A llama3-type ModelSpec of the given size, initialized as torchtitan initializes its own.

    Args:
        dim: Width D of the residual stream; each head is `dim // num_heads` wide.
        hidden_dim: Width of the feed-forward network (SwiGLU).
        num_kv_heads: Key/value heads (grouped-query attention); None: `num_heads`.
        max_seq_len: Longest sequence in tokens.
        tie_embeddings: Share the token embedding with the language-model head.
        embedding_init_std: Standard deviation of the token embedding at initialization (1: torchtitan's).
    """
    init = skip_param_init if tie_embeddings else partial(nn.init.normal_, std=embedding_init_std)
    model = Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        enable_weight_tying=tie_embeddings,
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=dim, param_init={"weight": init}),
        norm=RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_}),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=upstream.llama3_head_init(dim)),
        layers=upstream.llama3_layers(
            n_layers=num_layers,
            dim=dim,
            n_heads=num_heads,
            n_kv_heads=num_kv_heads,
            hidden_dim=hidden_dim,
            rope=ComplexRoPE.Config(dim=dim // num_heads, max_seq_len=max_seq_len, theta=rope_theta),
            attn_backend="flex",
        ),
    )
    for _, norm, _, _ in model.traverse(RMSNorm.Config):
        norm.eps = norm_eps
    return ModelSpec(
        name="llama3",
        flavor=flavor,
        model=model,
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )


def text_training(model_spec: ModelSpec, dataset: str, validation: str) -> Trainer.Config:
    """Training on one dataset and validation on another, with a cosine schedule; its sizes are the caller's to set."""
    loss_fn = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(model_spec))
    held_out = upstream.HuggingFaceTextDataLoader.Config(dataset=validation, infinite=False)
    return Trainer.Config(
        model_spec=model_spec,
        loss=ChunkedLossWrapper.Config(loss_fn=loss_fn),
        optimizer=upstream.default_adamw(),
        lr_scheduler=upstream.LRSchedulersContainer.Config(decay_type="cosine", min_lr_factor=0.1),
        # Without CUDA graphs also where LET is off: a run and its baseline are to differ in LET alone.
        training=TrainingConfig(disable_cuda_graphs=True),
        dataloader=upstream.HuggingFaceTextDataLoader.Config(dataset=dataset),
        validator=Validator.Config(enable=True, dataloader=held_out),
        metrics=MetricsProcessor.Config(log_freq=10, enable_tensorboard=True),
        debug=DebugConfig(seed=0),
    )
