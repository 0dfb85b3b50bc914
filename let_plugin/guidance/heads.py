"""A loss of the predictions that the student's own head makes from a block's output, in place of an alignment.

* `cross_entropy`, at an early block: what an auxiliary gradient there does without a teacher's knowledge.
* `distillation_from`, at the last block: logit distillation. What travels from the teacher to that block is its last
  state, as in LET; the logits of both are computed there, a few tokens at a time.

Norm and language-model head are the student's, and learn from both losses. Their whole weights are gathered once a
step; their gradients are summed over the microbatches, and added to the student's once, before these are clipped.

Shape legend: B batch, L sequence (this rank's part of it), D student width, E teacher width, T tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from let_plugin.alignment.losses import Alignment
from let_plugin.alignment.tap import PairFunction
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.guidance.projectors import sum_placements
from let_plugin.teacher.base import Teacher, TeacherSource

# (logits [T, V] in fp32, what the tap got for these tokens [T, ...]) -> sum of the tokens' losses.
LogitLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_CHUNK = 2048  # tokens whose logits are there at the same time
_TRIAL_TOKENS = 8  # that the teacher's head is tried out on
_TOLERANCE = 0.05  # of the teacher's states, which may be in bf16, relative to those of fp32


class AuxiliaryHead:
    """The student's final norm and language-model head, applied to the outputs of blocks.

    Every rank of the job makes one. Norm and head live on a pipeline's last stage: once a step their weights are
    broadcast to the other stages, and the gradients are summed over them.
    """

    def __init__(self, trainer: Trainer) -> None:
        config, dims, device = trainer.config, trainer.parallel_dims, trainer.device
        assert config.model_spec is not None
        model: Any = config.model_spec.model
        # Copies without parameters of their own: FSDP's hooks are on the student's modules.
        with torch.device("meta"):
            self._norm: nn.Module = model.norm.build()
            head: nn.Module = model.lm_head.build()
        shapes = {f"norm.{name}": p.shape for name, p in self._norm.named_parameters()}
        shapes |= {f"lm_head.{name}": p.shape for name, p in head.named_parameters()}
        # The student's own, by the same names; empty on the ranks that do not have them.
        self._parameters: dict[str, nn.Parameter] = {}
        for part in trainer.model_parts:
            if part.lm_head is not None:
                self._parameters = {name: part.get_parameter(name) for name in shapes}
        self._pipeline = dims.get_mesh("pp").get_group() if dims.pp_enabled else None
        # The rank of this pipeline that has norm and head.
        owner = torch.tensor(dist.get_rank() if self._parameters else -1, device=device)
        if self._pipeline is not None:
            dist.all_reduce(owner, dist.ReduceOp.MAX, group=self._pipeline)
        self._owner = int(owner.item())
        self._sequence_parallel = config.parallelism.enable_sequence_parallel
        self._dtype: torch.dtype = getattr(torch, config.let.math_dtype)
        self._weights = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._gradients = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        # Buffers of the parts: a pipeline's trial run puts them back (see AlignmentTap).
        self._parts = trainer.model_parts
        for part in self._parts:
            for name, gradient in self._gradients.items():
                part.register_buffer(_buffer_name(name), gradient, persistent=False)

    def start_step(self, step: int) -> None:
        """Gathers the weights for this step and clears the gradients."""
        for name, weight in self._weights.items():
            if self._parameters:
                weight.copy_(_whole(self._parameters[name]))
            if self._pipeline is not None:
                dist.broadcast(weight, self._owner, group=self._pipeline)
            self._gradients[name].zero_()

    def remove(self) -> None:
        for part in self._parts:
            for name in self._gradients:
                delattr(part, _buffer_name(name))

    def pair(self, loss: LogitLoss, weight: float) -> PairFunction:
        """What the tap calls for one block; the gradient of `loss` is taken times `weight`."""
        return partial(self._head_gradients, loss, weight)

    def reduce(self) -> None:
        """After the last microbatch: adds the gradients of all ranks to the student's."""
        if self._pipeline is not None:
            for gradient in self._gradients.values():
                dist.all_reduce(gradient, group=self._pipeline)
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue  # frozen by the student's own settings
            gradient = self._gradients[name]
            if isinstance(parameter, DTensor):
                placements = sum_placements(parameter, self._sequence_parallel)
                partial = DTensor.from_local(gradient, parameter.device_mesh, placements, run_check=False)
                gradient = partial.redistribute(placements=parameter.placements)
            assert parameter.grad is not None
            parameter.grad.add_(gradient.to(parameter.grad.dtype))  # in place: a captured step writes to this address

    def finish_step(self) -> None:
        pass

    def _head_gradients(
        self,
        loss: LogitLoss,
        weight: float,
        student_BLD: torch.Tensor,
        target_BL: torch.Tensor,
        coefficient: torch.Tensor,
    ) -> Alignment:
        gradients, total = [], coefficient.new_zeros(())
        chunks = zip(student_BLD.flatten(0, 1).split(_CHUNK), target_BL.flatten(0, 1).split(_CHUNK), strict=True)
        for hidden_TD, target_T in chunks:
            of_weights = partial(self._loss_of, loss, target_T)
            value, backward = torch.func.vjp(of_weights, self._weights, hidden_TD.to(self._dtype))  # type: ignore[misc]
            weight_gradients, gradient_TD = backward(coefficient * weight)
            for name, gradient in weight_gradients.items():
                self._gradients[name].add_(gradient)
            gradients.append(gradient_TD)
            total = total + value
        return Alignment(torch.cat(gradients).view_as(student_BLD), None, total)

    def _loss_of(
        self, loss: LogitLoss, target_T: torch.Tensor, weights: dict[str, torch.Tensor], hidden_TD: torch.Tensor
    ) -> torch.Tensor:
        cast = {name: weight.to(self._dtype) for name, weight in weights.items()}
        norm = {name.removeprefix("norm."): w for name, w in cast.items() if name.startswith("norm.")}
        normed_TD = torch.func.functional_call(self._norm, norm, (hidden_TD,))
        logits_TV = F.linear(normed_TD, cast["lm_head.weight"], cast.get("lm_head.bias"))
        return loss(logits_TV.float(), target_T)


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Sum of the tokens' cross-entropies with their labels, fp32."""
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def distillation(
    student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """temperature^2 * KL(p_teacher || p_student) of each token, [T], with p = softmax(logits / temperature).

    The factor keeps the gradient's size (Hinton et al., arXiv 1503.02531). Rows of either vocabulary beyond the other's
    (padding, mostly) are left out.
    """
    width = min(student_logits_TV.shape[-1], teacher_logits_TV.shape[-1])
    student_TV = (student_logits_TV[:, :width] / temperature).log_softmax(dim=-1)
    teacher_TV = (teacher_logits_TV[:, :width] / temperature).log_softmax(dim=-1)
    return temperature**2 * (teacher_TV.exp() * (teacher_TV - student_TV)).sum(dim=-1)


class TeacherHead:
    """The teacher's language-model head, whole on this rank: its last state, after the final norm, to logits.

    The whole model is loaded for a moment, in fp32, to take the head from it and to see that it is all that there is
    between the two. All ranks that share `teacher`, built for its last layer alone, make a head at the same time.
    ConfigError if its family makes logits in another way: scales or caps them, say.
    """

    @torch.no_grad()
    def __init__(self, source: TeacherSource, teacher: Teacher, *, dtype: torch.dtype, device: torch.device) -> None:
        model = source.language_model(dtype=torch.float32, device=device, seq_len=_TRIAL_TOKENS)
        weight, bias = model.head.weight, getattr(model.head, "bias", None)
        assert isinstance(weight, torch.Tensor)
        given: list[torch.Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda head, args: given.append(args[0]))
        tokens_BL = torch.arange(_TRIAL_TOKENS, device=device)[None] % source.info.vocab_size
        logits_BLV = model(tokens_BL, None)
        hook.remove()
        states_BLE = teacher(tokens_BL, None)
        is_product = torch.allclose(logits_BLV, F.linear(given[0], weight, bias), rtol=1e-3, atol=1e-3)
        difference = (states_BLE.float() - given[0]).norm() / given[0].norm()
        if not (is_product and difference < _TOLERANCE):
            message = "its logits are not just the product of its last state and its head; choose another teacher"
            raise ConfigError(Problem("let.target", f"{source.info.description}: {message}", "logits"))
        self._weight = weight.to(dtype, copy=True)
        self._bias = None if bias is None else bias.to(dtype, copy=True)

    def __call__(self, states_TE: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return F.linear(states_TE.to(self._weight.dtype), self._weight, self._bias)


def distillation_from(head: TeacherHead, *, temperature: float) -> LogitLoss:
    """From the student's logits and the teacher's states [T, E]; a token whose state is zero does not count."""

    def loss(logits_TV: torch.Tensor, states_TE: torch.Tensor) -> torch.Tensor:
        counts_T = states_TE.ne(0).any(dim=-1)
        losses_T = distillation(logits_TV, head(states_TE).float(), temperature=temperature)
        return (losses_T * counts_T).sum()

    return loss


def _buffer_name(parameter: str) -> str:
    return f"let_head_gradient__{parameter.replace('.', '__')}"


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()
