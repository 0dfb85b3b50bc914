"""Small random models of many families of `transformers`, saved as checkpoints, and teachers made of them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.config import TeacherConfig
from let_plugin.teacher.base import Teacher, TeacherSource
from let_plugin.teacher.open import open_teacher
from let_plugin.trainer import with_let

FILE = "model.safetensors"
VOCAB_SIZE = 61
SEQ_LEN = 24
LENGTHS = [[7, 12, 5], [1, 3, 20]]  # of the packed documents
DROPOUT = 0.25  # of every kind that a family has: a teacher that does not turn it off has other states
WINDOW = 5  # shorter than the longest document, so that a lost window shows
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALED |= {"original_max_position_embeddings": 16}
_CAPPED = {"sliding_window": WINDOW, "final_logit_softcapping": 1.0}
_CONFIGS = {  # name: (family, fields)
    "llama": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama3_rope": ("llama", {**GROUPED, "max_position_embeddings": 128, "rope_parameters": _SCALED}),
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_350m_like": ("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", {**SIZES, "intermediate_size": 48}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "qwen2": ("qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "phi": ("phi", GROUPED),
    "phi3": ("phi3", {**GROUPED, "sliding_window": WINDOW}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **_CAPPED}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
}
FAMILIES = tuple(_CONFIGS)


def config_of(name: str):
    """The configuration of a small model, by a name out of FAMILIES."""
    import transformers

    family, fields = _CONFIGS[name]
    config = transformers.AutoConfig.for_model(family, **fields)
    for field, value in config.to_dict().items():
        if "drop" in field and type(value) in (int, float):
            setattr(config, field, DROPOUT)
    return config


def save(folder: Path, config) -> Path:
    """A random model, with its language-model head, as safetensors in `folder`; weights large enough to see leaks."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


# Damage: functions of a checkpoint's folder


def config_with(**fields):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def weights(edit):
    return lambda folder: save_file(edit(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


def without(part):
    return weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def content(damaged, name=FILE):
    return lambda folder: (folder / name).write_bytes(damaged)


def reference_of(folder: Path):
    """The trunk as transformers itself runs it."""
    import transformers

    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()  # SDPA has no soft cap


def opened(path: Path | str = "", **fields) -> TeacherSource:
    return open_teacher(TeacherConfig(path=str(path), **fields))


def source_of(path: Path | str, **fields) -> TeacherSource:
    """Of `transformers`, also if torchtitan could run it."""
    return opened(path, spec="transformers", **fields)


def build(source, dtype=torch.float32, layers=None, final_norm=True, config=None, parallel_dims=None) -> Teacher:
    """The teacher in this process; of its last layer unless `layers` says otherwise."""
    one_rank = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    config = config or with_let(Trainer.Config())
    teacher = replace(config.let.teacher, dtype=str(dtype).removeprefix("torch."), final_norm=final_norm)
    config = replace(config, let=replace(config.let, teacher=teacher))
    layers = [source.info.num_layers - 1] if layers is None else layers
    return source.build(config, torch.device("cpu"), parallel_dims or one_rank, layers)


def language_model(source, dtype=torch.float32):
    return source.language_model(dtype=dtype, device=torch.device("cpu"), seq_len=SEQ_LEN)


def packed_batch(vocab_size: int = VOCAB_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BL and positions_BL: 3 documents per row, other boundaries in each."""
    tokens_BL = torch.randint(vocab_size, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    return tokens_BL, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def alone(states_of, tokens_BL: torch.Tensor) -> torch.Tensor:
    """`states_of` each packed document by itself, put back in its place: [B, L, ...]."""
    rows = zip(tokens_BL.split(1), LENGTHS, strict=True)
    return torch.cat([torch.cat([states_of(d) for d in row_1L.split(lengths, 1)], 1) for row_1L, lengths in rows])
