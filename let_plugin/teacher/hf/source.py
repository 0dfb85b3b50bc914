"""Teachers that `transformers` builds.

* The trunk alone (`AutoModel`): a language-model head is never built, nor run.
* Cut behind the deepest layer that is asked for. The final norm runs all the same.
* Read by one of the ranks that share it, and sharded from there: see `sharding.read_once`.
* Packed documents are isolated in every family that is accepted: see `attention.py`. `build` tries it out.

Shape legend: B batch, L sequence, E teacher width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from let_plugin.alignment.layer_mapping import EMBEDDING
from let_plugin.config import plan
from let_plugin.teacher.base import LanguageModel, Teacher, TeacherInfo, TeacherSource, freeze, num_blocks_to
from let_plugin.teacher.hf import checks
from let_plugin.teacher.hf.attention import ATTENTION, model_inputs
from let_plugin.teacher.hf.checkpoint import Checkpoint, quiet_transformers, tensors_of
from let_plugin.teacher.layers import LayerStates
from let_plugin.teacher.outer_layers import entering_embeddings, folded_head, plain_head, trial_tokens
from let_plugin.teacher.sharding import hand_out, read_once

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer


class HFTeacher(Teacher):
    """A frozen `transformers` trunk: an `AutoModel` with the attention function of `attention.py`."""

    def __init__(self, trunk: nn.Module, states: LayerStates) -> None:
        super().__init__()
        self.trunk = trunk
        self._states = states

    def forward(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None, masks: Any = None) -> torch.Tensor:
        """See Teacher. `masks` are not used: `transformers` has its own kind."""
        # Reads no tensor on the host, except in families whose rotary frequencies depend on the length of the input
        # ("dynamic" and "longrope" scaling): `transformers` does it there.
        inputs = model_inputs(tokens_BL, positions_BL)
        return self._states.collect(lambda: self.trunk(**inputs).last_hidden_state)


class HFTeacherSource(TeacherSource):
    """A checkpoint run by `transformers`; for the report, the reason why it is not run by torchtitan."""

    def __init__(self, checkpoint: Checkpoint, reason: str) -> None:
        self._checkpoint = checkpoint
        self.info = _describe(checkpoint, reason)

    def tokenizer(self) -> Any | None:
        return self._checkpoint.tokenizer()

    def build(
        self, config: "Trainer.Config", device: torch.device, parallel_dims: "ParallelDims", layers: Sequence[int | str]
    ) -> HFTeacher:
        """See TeacherSource. Each shard group's first rank holds the teacher in CPU memory while it is read."""
        dtype, final_norm = plan.teacher_dtype(config), config.let.teacher.final_norm
        with quiet_transformers():
            tensors, dtypes = read_once(lambda: tensors_of(self._checkpoint.load(dtype)), parallel_dims)
            trunk = self._checkpoint.on_meta(attention=ATTENTION, dtype=dtype)
            for name, parameter in trunk.named_parameters():  # some families keep some weights in fp32
                parameter.data = parameter.data.to(dtypes[name])
            blocks = checks.find_layers(trunk, self.info.num_layers)
            del blocks[num_blocks_to(layers) :]
            states = LayerStates(list(blocks), layers, output_layer=self.info.num_layers - 1 if final_norm else None)
            teacher = HFTeacher(trunk, states)
            freeze(teacher)
            if parallel_dims.dp_shard_enabled:
                # Only the sharding axis of the (perhaps 2-D) data-parallel mesh: the replicas along the other axis hold
                # the same frozen weights, and have no gradients to agree on. To be resharded is said of each: by
                # default FSDP2 leaves a root that never runs backward gathered.
                for module in (trunk.get_input_embeddings(), *blocks, trunk):
                    fully_shard(module, mesh=parallel_dims.get_mesh("fsdp"), reshard_after_forward=True)
            trunk._apply(lambda t: torch.empty_like(t, device=device))
            hand_out(tensors, tensors_of(trunk).items(), parallel_dims)
            width = sum(self.info.width(layer, final_norm) for layer in layers)
            path = self._checkpoint.config.path
            checks.try_out(teacher, blocks, self.info, layers=layers, width=width, path=path)
        return teacher

    def language_model(self, *, dtype: torch.dtype, device: torch.device, seq_len: int) -> LanguageModel:
        model = nn.Module.to(self._checkpoint.load(dtype, head=True, attention=ATTENTION), device)
        # Everything that its family does to the logits (soft caps, scales) is done.
        return lambda tokens_BL, positions_BL: model(**model_inputs(tokens_BL, positions_BL)).logits

    @torch.no_grad()
    def outer_layers(self, *, head: bool) -> dict[str, torch.Tensor]:
        """See TeacherSource. Holds the whole teacher meanwhile."""
        model = self._checkpoint.load(torch.float32, head=head, attention=ATTENTION)
        blocks, last = checks.find_layers(model, self.info.num_layers), self.info.num_layers - 1
        # What it returns, logits perhaps, counts as one more layer.
        states = LayerStates(list(blocks), [EMBEDDING, last, last + 1], output_layer=last + 1)
        inputs, width = model_inputs(trial_tokens(self.info.vocab_size), None), self.info.hidden_size
        seen = states.collect(lambda: model(**inputs)[0])[:, 0]
        entering_TE, leaving_TE, logits_TV = seen.tensor_split((width, 2 * width), dim=-1)
        layers = {"embeddings": entering_embeddings(model.get_input_embeddings().weight, entering_TE)}
        if head:
            # Outside the blocks, the vectors of the states' width are the final norm's; a bias among them comes last.
            in_blocks = set(blocks.parameters())
            norm_E = next(p for p in model.parameters() if p.shape == leaving_TE.shape[1:] and p not in in_blocks)
            eps = getattr(self._checkpoint.model_config, "rms_norm_eps", 0.0)
            layers["head"] = folded_head(model.get_output_embeddings().weight, norm_E, eps, leaving_TE, logits_TV)
        return layers

    @torch.no_grad()
    def head(self) -> dict[str, torch.Tensor]:
        """See TeacherSource. Holds the whole teacher meanwhile."""
        model = self._checkpoint.load(torch.float32, head=True, attention=ATTENTION)
        inputs, given, head = model_inputs(trial_tokens(self.info.vocab_size), None), [], model.get_output_embeddings()
        head.register_forward_pre_hook(lambda head, args: given.append(args[0][:, 0]))
        logits_TV = model(**inputs).logits[:, 0]
        last_TE = model.base_model(**inputs).last_hidden_state[:, 0]
        return plain_head(head, last_TE, given[0], logits_TV)


def _describe(checkpoint: Checkpoint, reason: str) -> TeacherInfo:
    trunk, config = checkpoint.trunk, checkpoint.model_config
    blocks = checks.find_layers(trunk, config.num_hidden_layers)
    embeddings = [module for module in trunk.modules() if isinstance(module, nn.Embedding)]
    return TeacherInfo(
        description=f"{config.model_type} ({type(trunk).__name__}), {checkpoint.where}, run by transformers ({reason})",
        # OPT-350m alone projects its last hidden state back to the width of its embedding.
        hidden_size=getattr(config, "word_embed_proj_dim", None) or config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=trunk.get_input_embeddings().weight.shape[0],
        max_seq_len=getattr(config, "max_position_embeddings", None),
        num_trunk_params=sum(parameter.numel() for parameter in trunk.parameters()),
        num_embedding_params=sum(module.weight.numel() for module in embeddings),
        block_params=tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks),
        residual_size=config.hidden_size,
        num_heads=getattr(config, "num_attention_heads", None),
        num_kv_heads=getattr(config, "num_key_value_heads", None),
    )
