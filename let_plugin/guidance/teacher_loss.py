"""The teacher's own loss on the data that the student is validated on, for a stop that compares the two."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.runtime.held_out import TwoSplitValidator
from let_plugin.teacher.base import keep_rng_state
from let_plugin.teacher.language_model import loss_sums
from let_plugin.teacher.open import open_teacher


def is_measurable(validator: BaseValidator.Config) -> bool:
    """Whether the teacher can be given what this validator gives the student: torchtitan's own, or one built on it."""
    owner = validator._owner
    known = Validator.validate, TwoSplitValidator.validate
    return owner is not None and issubclass(owner, Validator) and owner.validate in known


def measure_teacher_loss(trainer: Trainer) -> float:
    """Mean cross-entropy of the teacher, in nats per valid token, as torchtitan's validator would find it.

    Identical on every rank, each of which must call it. Each holds a whole copy of the teacher and its head meanwhile,
    and runs it over the rows of its data-parallel rank. ConfigError if the teacher has no head.
    """
    config, device = trainer.config, trainer.device
    logger.info("LET: measuring the teacher's own loss on the validation data (let.adaptive_stop.teacher_loss)")
    source = open_teacher(config.let.teacher)
    model = source.language_model(dtype=plan.teacher_dtype(config), device=device, seq_len=config.training.seq_len)
    with keep_rng_state(device):  # a data loader draws a seed
        sums = loss_sums(model, _batches(trainer.validator), vocab_size=source.info.vocab_size, device=device)
    del model
    gc.collect()  # torchtitan has switched off the automatic collection
    utils.device_module.empty_cache()
    # Ranks of one data-parallel rank have the same sums: both totals are multiplied alike.
    torch.distributed.all_reduce(sums)
    loss, num_tokens = sums.tolist()
    return loss / num_tokens


def _batches(validator: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """(token ids, positions, labels) of this data-parallel rank, [B, L] each, as `Validator.validate` reads them."""
    # With pipeline parallelism a step is several microbatches.
    rows, per_step = validator.local_batch_size, 1
    if validator.parallel_dims.pp_enabled:
        rows = validator.parallelism.pipeline_parallel_microbatch_size
        per_step = validator.local_batch_size // rows
    loader = validator.dl_config.build(
        dp_world_size=validator.dp_world_size,
        dp_rank=validator.dp_rank,
        tokenizer=validator.tokenizer,
        seq_len=validator.seq_len,
        local_batch_size=rows,
    )
    steps = zip(*[iter(loader)] * per_step, strict=False)  # an incomplete one, at the end of the data, does not count
    num_steps = validator.config.steps
    for step in itertools.islice(steps, num_steps if num_steps > 0 else None):  # -1: all of the data
        for input_dict, labels_BL in step:
            yield input_dict["input"], input_dict.get("positions"), labels_BL
