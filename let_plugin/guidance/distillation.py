"""Logit distillation: the teacher's predictions, made of its last states where the student's logits are.

Shape legend: B batch, C the part of the sequence whose logits are there at a time, E teacher width, T tokens, V this
rank's part of the student's vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.divergences import Divergence
from let_plugin.alignment.losses import Alignment
from let_plugin.config import plan
from let_plugin.guidance.controls import without_knowledge
from let_plugin.teacher.base import TeacherSource
from let_plugin.teacher.sharding import hand_out, read_once

MAX_LOGITS = 2**26  # that are held at a time, about: each of some tensors is 0.25 GiB in fp32


class Distillation:
    """What a LogitTap calls: from logits and the teacher's states to the gradient of a divergence.

    A token whose state is zero does not count. Of the teacher's head a rank keeps the rows of its part of the student's
    vocabulary; rows that one of the two models does not have (padding, mostly) are left out of both predictions.
    `channels` says where the last states lie in those that it is called with.

    All ranks that share the teacher, whose device meshes are `teacher_dims`, make one at the same time. ConfigError for
    a head that cannot be read, or is not all that there is between the teacher's last state and its logits.
    """

    @torch.no_grad()
    def __init__(
        self, trainer: Trainer, term: plan.Term, source: TeacherSource, teacher_dims: ParallelDims, channels: slice
    ) -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        self._channels = channels
        tensors, dtypes = read_once(source.head, teacher_dims)
        size, width = source.info.vocab_size, source.info.hidden_size
        shapes = {"weight": (size, width), "bias": (size,)}
        whole = {name: torch.empty(shapes[name], device=device) for name in dtypes}
        hand_out(tensors, whole.items(), teacher_dims)
        if config.let.control == "random_teacher":
            whole |= without_knowledge({"weight": whole["weight"]}, config.let.control)
        # As torchtitan cuts the student's head among its tensor-parallel ranks.
        head: Any = trainer.model_parts[-1].lm_head
        num_rows, first = head.out_features, 0
        if dims.tp_enabled:
            chunk = -(-num_rows // dims.tp)
            first = min(chunk * dims.get_mesh("tp").get_local_rank(), num_rows)
            num_rows = min(chunk, num_rows - first)
        known, dtype = slice(first, min(first + num_rows, size)), plan.teacher_dtype(config)
        rows = {name: tensor[known].to(dtype) for name, tensor in whole.items()}
        num_missing = num_rows - len(rows["weight"])
        self._weight_VE = F.pad(rows["weight"], (0, 0, 0, num_missing))
        self._bias_V = F.pad(rows["bias"], (0, num_missing)) if "bias" in rows else None
        self._exists_V = torch.arange(num_rows, device=device) < num_rows - num_missing if num_missing else None
        group = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
        let = term.config
        self._divergence = Divergence(let.divergence, let.temperature, let.top_k, group)
        self._gradients = self._of_tokens
        options = plan.compile_options(config)
        if options is not None and group is None:
            self._gradients = torch.compile(self._of_tokens, fullgraph=True, **options)

    def __call__(self, logits_BCV: torch.Tensor, states_BCE: torch.Tensor, coefficient: torch.Tensor) -> Alignment:
        num_tokens = max(1, MAX_LOGITS // logits_BCV.shape[-1])
        states_BCE = states_BCE[..., self._channels]
        logits, states = (x.flatten(0, 1).split(num_tokens) for x in (logits_BCV, states_BCE))
        parts = [self._gradients(*part, coefficient) for part in zip(logits, states, strict=True)]
        values, gradients = zip(*parts, strict=True)
        gradient_TV = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        return Alignment(gradient_TV.view_as(logits_BCV), None, torch.stack(values).sum())

    def _of_tokens(
        self, logits_TV: torch.Tensor, states_TE: torch.Tensor, coefficient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts_T = states_TE.ne(0).any(dim=-1)
        teacher_TV = F.linear(states_TE.to(self._weight_VE.dtype), self._weight_VE, self._bias_V)
        losses_T, gradient_TV = self._divergence(logits_TV.float(), teacher_TV.float(), self._exists_V)
        gradient_TV = gradient_TV * (coefficient * counts_T)[:, None]
        return (losses_T * counts_T).sum(), gradient_TV.to(logits_TV.dtype)
