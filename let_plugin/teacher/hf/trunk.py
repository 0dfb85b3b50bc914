"""A frozen decoder that `transformers` builds, whatever its weights come out of.

* The trunk alone (`AutoModel`): a language-model head is never built, nor run.
* Cut behind the deepest layer that is asked for. The final norm runs all the same.
* Made on the meta device, cut and sharded there; then each rank reads its own rows: see `hf_weights.py`.
* Packed documents are isolated in every family that is accepted: see `hf_attention.py`. `make_teacher` tries it out.

Shape legend: B batch, L sequence, E teacher width.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher import quantization
from let_plugin.teacher.base import LanguageModel, Teacher, TeacherInfo, freeze, keep_rng_state
from let_plugin.teacher.hf import trials as hf_trials
from let_plugin.teacher.hf import weights as hf_weights
from let_plugin.teacher.hf.checks import check_is_decoder, check_isolates_documents, find_layers
from let_plugin.teacher.language_model import TransformersLanguageModel
from let_plugin.teacher.layers import LayerStates
from let_plugin.teacher.sharding import raise_together

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from transformers import PreTrainedConfig

_PATH_KEY = "let.teacher.path"


class HFTeacher(Teacher):
    """A frozen `transformers` trunk. Made by `make_teacher`.

    Args:
        trunk: An `AutoModel` with the attention function of `hf_attention.py`.
        states: Takes the layers' states out of it.
    """

    def __init__(self, trunk: nn.Module, states: LayerStates) -> None:
        super().__init__()
        self.trunk = trunk
        self._states = states

    def forward(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None, student_masks: Any = None
    ) -> torch.Tensor:
        """Returns the layers' states, concatenated along channels, [B, L, E], in the teacher's dtype.

        Reads no tensor on the host, except in families whose rotary frequencies depend on the length of the input
        ("dynamic" and "longrope" scaling): `transformers` does it there.

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token within its own document, int64: 0 starts a document. None: one
                document per row.
            student_masks: Not used: `transformers` has its own kind.
        """
        from let_plugin.teacher.hf.attention import DocumentMask

        documents = DocumentMask(positions_BL)
        if positions_BL is None:
            positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        arguments = {"input_ids": tokens_BL, "position_ids": positions_BL, "let_documents": documents}
        return self._states.collect(lambda: self.trunk(**arguments, use_cache=False).last_hidden_state)


def import_transformers() -> Any:
    """The `transformers` module; ConfigError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        message = "this teacher needs the transformers package: pip install let-plugin[hf]"
        raise ConfigError(Problem(_PATH_KEY, message)) from error
    return transformers


def make_whole_trunk(config: "PreTrainedConfig", teacher_config: TeacherConfig) -> Any:
    """The trunk that `config` asks for, on the meta device.

    ConfigError if it is not a decoder, one of a family in which packed documents cannot be kept apart, or has nothing
    to quantise where that is asked for.
    """
    check_is_decoder(config, teacher_config)
    try:
        # Every family has "eager" attention, so that the check below can say what is the matter with the others.
        trunk = _on_meta(config, teacher_config, attn_implementation="eager")
    except Exception as error:  # a configuration that contradicts itself fails anywhere in the model's constructor
        message = f"its configuration cannot be built: {error}"
        raise ConfigError(Problem(_PATH_KEY, message, teacher_config.path)) from error
    check_isolates_documents(config, trunk, teacher_config.path)
    quantization.check_has_linear(teacher_config, trunk)
    return trunk


def teacher_info(whole_trunk: Any, where: str) -> TeacherInfo:
    """Describes a trunk that `make_whole_trunk` made."""
    config = whole_trunk.config
    blocks = find_layers(whole_trunk, config.num_hidden_layers)
    embeddings = [module for module in whole_trunk.modules() if isinstance(module, nn.Embedding)]
    return TeacherInfo(
        description=f"{config.model_type} ({type(whole_trunk).__name__}), {where}",
        # OPT-350m alone projects its last hidden state back to the width of its embedding.
        hidden_size=getattr(config, "word_embed_proj_dim", None) or config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=whole_trunk.get_input_embeddings().weight.shape[0],
        max_seq_len=getattr(config, "max_position_embeddings", None),
        num_trunk_params=sum(parameter.numel() for parameter in whole_trunk.parameters()),
        num_embedding_params=sum(module.weight.numel() for module in embeddings),
        block_params=tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks),
        residual_size=config.hidden_size,
        num_linear_params=quantization.num_linear_params(whole_trunk),
        block_linear_params=tuple(quantization.num_linear_params(block) for block in blocks),
        num_heads=getattr(config, "num_attention_heads", None),
        num_kv_heads=getattr(config, "num_key_value_heads", None),
    )


def make_teacher(
    model_config: "PreTrainedConfig",
    info: TeacherInfo,
    steps: Iterable[hf_weights.Step],
    *,
    config: TeacherConfig,
    dtype: torch.dtype,
    device: torch.device,
    parallel_dims: "ParallelDims",
    layers: Sequence[int | str],
    final_norm: bool,
) -> HFTeacher:
    """Makes a trunk on the meta device, cuts, freezes and shards it, reads its weights, and tries it out.

    Its configuration stays as it is: `forward` runs the blocks that are there, with the types that it gives them.
    Collective over the ranks that it is sharded over, which all raise the same ConfigError.
    """
    from let_plugin.teacher.hf.attention import ATTENTION

    with keep_rng_state(device), quiet_transformers():
        trunk = _on_meta(model_config, config, attn_implementation=ATTENTION, dtype=dtype)
        _keep_in_fp32(trunk, dtype)
        trunk.eval()
        blocks = find_layers(trunk, info.num_layers)
        order_is_known = hf_trials.cut(trunk, blocks, info, layers)
        _init_buffers(trunk)
        states = LayerStates(list(blocks), layers, output_layer=info.num_layers - 1 if final_norm else None)
        teacher = HFTeacher(trunk, states)
        freeze(teacher)
        _place(trunk, blocks, device, parallel_dims, config)
        raise_together(hf_weights.load(trunk, steps, device, config.path), parallel_dims)
        hf_trials.try_out(
            teacher,
            blocks,
            info,
            layers=layers,
            width=sum(info.width(layer, final_norm) for layer in layers),
            in_order=not order_is_known,
            device=device,
            path=config.path,
        )
    return teacher


def make_language_model(
    model_config: "PreTrainedConfig",
    config: TeacherConfig,
    fit: Callable[[Any], hf_weights.Fit],
    *,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LanguageModel:
    """The whole model with its language-model head on `device`, read and checked as a trunk is.

    `fit` matches it, on the meta device, with what is stored.
    """
    from transformers import AutoModelForCausalLM

    from let_plugin.teacher.hf.attention import ATTENTION

    with keep_rng_state(device), quiet_transformers():
        model = _on_meta(model_config, config, AutoModelForCausalLM, attn_implementation=ATTENTION, dtype=dtype)
        fitted = fit(model)
        fitted.check(model, num_layers, config.path)
        _keep_in_fp32(model, dtype)
        freeze(model)
        _init_buffers(model)
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        model.tie_weights()
        if problems := hf_weights.load(model, fitted.steps, device, config.path):
            raise ConfigError(problems)
    return TransformersLanguageModel(model)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report that the language-model head was left out: `hf_weights.Fit` reports."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()


def _on_meta(config: "PreTrainedConfig", teacher_config: TeacherConfig, auto_class: Any = None, **options: Any) -> Any:
    """The model of one of the "Auto" classes, AutoModel's if none is given: the trunk."""
    from transformers import AutoModel

    with torch.device("meta"), keep_rng_state(torch.device("cpu")):
        return (auto_class or AutoModel).from_config(
            config, trust_remote_code=teacher_config.trust_remote_code, **options
        )


def _keep_in_fp32(trunk: Any, dtype: torch.dtype) -> None:
    """Makes fp32 what a family keeps so in every data type, as `from_pretrained` does (routers of some mixtures)."""
    kept = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in trunk._get_dtype_plan(dtype)]
    for name, parameter in trunk.named_parameters():
        if any(pattern.search(name) for pattern in kept):
            parameter.data = parameter.data.float()


def _init_buffers(trunk: Any) -> None:
    """Computes, on the CPU, the buffers of a trunk on the meta device that no checkpoint holds (rotary frequencies).

    By the family's own initialisation, as `from_pretrained` does. What is to be read is marked as initialised, and is
    on the meta device still: it costs nothing.
    """
    for module in trunk.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for tensor in trunk.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    trunk.initialize_weights()


def _place(
    trunk: Any, blocks: nn.ModuleList, device: torch.device, parallel_dims: "ParallelDims", config: TeacherConfig
) -> None:
    """Shards a trunk on the meta device, and makes its tensors, without values, where they will stay.

    Linear weights that will be quantised are left on the meta device: `hf_weights.load` makes them one by one.
    """
    offloads = config.cpu_offload
    left: set[int] = set()
    if config.quantization != "none":
        left = {id(layer.weight) for layer in quantization.linear_layers(trunk)}
    elif offloads or parallel_dims.dp_shard_enabled:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        # Only the sharding axis of the (perhaps 2-D) data-parallel mesh: the replicas along the other axis hold the
        # same frozen weights, and have no gradients to agree on. It is there with one rank too, for offloading.
        mesh = parallel_dims.get_mesh("fsdp")
        policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offloads else OffloadPolicy()
        # Explicit: by default FSDP2 leaves a root that never runs backward gathered.
        for module in (trunk.get_input_embeddings(), *blocks, trunk):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in left:
            return tensor
        own_device = torch.device("cpu") if offloads and isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=own_device) if tensor.is_meta else tensor.to(own_device)

    trunk._apply(place)
