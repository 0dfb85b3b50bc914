"""`[let.init]`: a run from scratch starts in the teacher's basis.

Shape legend: V the student's vocabulary, D student width, E teacher width.
"""

import gc
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.guidance.controls import without_knowledge
from let_plugin.runtime import checkpoint
from let_plugin.teacher.base import TeacherSource
from let_plugin.teacher.open import open_source, open_teacher
from let_plugin.teacher.retokenized import teacher_tokenizer
from let_plugin.teacher.sharding import hand_out, read_once, teacher_parallel_dims
from let_plugin.tokens.encoding import teacher_pieces

# What the attention and the feed-forward network of a block of torchtitan's end with, experts included.
OUTPUT_PROJECTION = re.compile(r"\.(?:(?:wo|out_proj|w2)\.(?:weight|bias)|w2_EDF|mlp2_weight_EDF|mlp2_bias_ED)$")


@torch.no_grad()
def initialize(trainer: Trainer) -> None:
    """Sets what `[let.init]` names in a run from scratch, before it starts. Every rank of the job must call it.

    ConfigError for layers of the teacher that cannot be read, or are not what the formula takes them for.
    """
    config = trainer.config
    if not (config.let.enable and plan.changes_the_start(config.let)) or checkpoint.find(config) is not None:
        return
    if config.let.init.parts != "none":
        _set_outer_layers(trainer, open_teacher(config.let.teacher))
        gc.collect()  # torchtitan has switched off the automatic collection
        utils.device_module.empty_cache()
    if config.let.init.upper_blocks == "zero":
        first = first_upper_block(config)
        for part in trainer.model_parts:
            for name, parameter in part.layers.named_parameters():
                if int(name.split(".")[0]) >= first and OUTPUT_PROJECTION.search(name):
                    parameter.zero_()
    logger.info("LET: the student's first weights are set as let.init says")


def first_upper_block(config: Trainer.Config) -> int:
    """The number of the block above the deepest one that is aligned or, without an alignment, would be."""
    let = config.let
    teacher_depth = open_source(let.teacher).info.num_layers if plan.teacher_terms(let) else None
    of_blocks = [term for term in plan.terms(let) if term.config.signal == "states"] or [plan.start_term(let)]
    return max(pair.student for term in of_blocks for pair in plan.pairs(config, term, teacher_depth)) + 1


def token_pieces(config: Trainer.Config, tokenizer: Any, source: TeacherSource) -> list[list[int]]:
    """By the student's id, the teacher's rows whose mean it starts from; none: it keeps its own random row."""
    assert config.model_spec is not None
    size, teacher_size = config.model_spec.model.vocab_size, source.info.vocab_size
    if config.let.token_alignment.enable:
        pieces = teacher_pieces(tokenizer, teacher_tokenizer(config, tokenizer, source))
    else:
        pieces = [[i] for i in range(teacher_size)]
    known = [[i for i in piece if i < teacher_size] for piece in pieces[:size]]
    return known + [[]] * (size - len(known))


def _set_outer_layers(trainer: Trainer, source: TeacherSource) -> None:
    config, init, device = trainer.config, trainer.config.let.init, trainer.device
    basis = plan.basis(config, source.info.hidden_size)
    pieces = token_pieces(config, trainer.tokenizer, source)
    lengths_V = torch.tensor([len(piece) for piece in pieces], device=device)
    flat_N = torch.tensor([i for piece in pieces for i in piece], device=device)
    parallel_dims = teacher_parallel_dims(trainer.parallel_dims)
    parallel_dims.build_mesh()
    tensors, dtypes = read_once(lambda: source.outer_layers(head=init.parts != "embeddings"), parallel_dims)
    layers = {name: torch.empty(source.info.vocab_size, source.info.hidden_size, device=device) for name in dtypes}
    hand_out(tensors, layers.items(), parallel_dims)
    layers = without_knowledge(layers, config.let.control)
    scales = {"embeddings": init.embedding_scale, "head": init.head_scale or basis.logit_scale}
    maps_DE = {"embeddings": basis.into_DE, "head": basis.back_ED.T}
    for part in trainer.model_parts:
        for name, module in (("embeddings", part.tok_embeddings), ("head", part.lm_head)):
            if module is not None and init.parts in (name, "both"):
                rows_VE = F.embedding_bag(flat_N, layers[name], lengths_V.cumsum(0) - lengths_V, mode="mean")
                _set_rows(module.weight, F.linear(rows_VE, maps_DE[name].to(device)), lengths_V > 0, scales[name])


def _set_rows(parameter: torch.Tensor, new_VD: torch.Tensor, known_V: torch.Tensor, scale: float | None) -> None:
    """Sets the known rows of a parameter, which may be sharded in any way; as large as they were if `scale` is None."""
    own_VD = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    own_VD = own_VD.to(new_VD.device)
    if scale is None:
        own, new = (torch.linalg.vector_norm(x_VD[known_V], dtype=torch.float64) for x_VD in (own_VD, new_VD))
        scale = float(own / new)
    new_VD = new_VD * scale
    whole_VD = torch.where(known_V[:, None], new_VD.to(own_VD.dtype), own_VD)
    if isinstance(parameter, DTensor):  # each rank takes its own shard of what it has
        whole_VD = distribute_tensor(whole_VD, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole_VD)
