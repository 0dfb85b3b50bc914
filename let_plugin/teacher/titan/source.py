"""Teachers that are torchtitan models: built, parallelized and compiled by torchtitan's own code."""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import set_default_dtype
from torchtitan.trainer import Trainer

from let_plugin.alignment.registry import Registry
from let_plugin.config import TeacherConfig, plan
from let_plugin.config.errors import ConfigError, Problem, lookup, suggest
from let_plugin.runtime import host, upstream
from let_plugin.teacher import base
from let_plugin.teacher.base import LanguageModel, Teacher, TeacherInfo, TeacherSource
from let_plugin.teacher.layers import LayerStates
from let_plugin.teacher.outer_layers import folded_head, plain_head, trial_tokens
from let_plugin.teacher.sharding import SPMD_BACKEND
from let_plugin.teacher.titan.spec import check_agrees, make_spec, read_hf_config
from let_plugin.teacher.titan.weights import TitanWeights
from let_plugin.tokens.vocabulary import open_tokenizer

if TYPE_CHECKING:
    from let_plugin.teacher.hf.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A torchtitan model that can be a teacher."""

    make_spec: Callable[[], ModelSpec]  # called anew for every teacher, since torchtitan writes into a specification
    path: str = ""  # folder of its weights, where `let.teacher.path` is empty
    tokenizer_path: str = ""  # folder of its tokenizer, where `let.teacher.tokenizer_path` is empty


TRANSFORMERS = "transformers"  # in place of a spec's name: transformers runs the teacher

TEACHER_SPECS: Registry[TeacherSpec] = Registry("teacher spec", "let_plugin.teacher_specs")


def register_teacher_spec(
    name: str, make_spec: Callable[[], ModelSpec], *, path: str = "", tokenizer_path: str = ""
) -> None:
    """Makes `let.teacher.spec = name` mean the torchtitan model that `make_spec()` describes (see TeacherSpec)."""
    TEACHER_SPECS.register(name, TeacherSpec(make_spec=make_spec, path=path, tokenizer_path=tokenizer_path))


class TitanTeacherSource(TeacherSource):
    """A torchtitan ModelSpec and its weights. ConfigError if they cannot be found, or do not fit each other.

    The `[let.teacher]` table has the name of the spec, and a folder with DCP or safetensors. Or else the config.json of
    `checkpoint`, for which there is no `obstacle` (see spec.py), is the spec.
    """

    def __init__(self, config: TeacherConfig, checkpoint: "Checkpoint | None" = None) -> None:
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self._spec = make_spec(checkpoint.model_config)
            host.adapt_model_spec(self._spec)
            self._weights = TitanWeights(config.path, self._spec, "of its config.json", checkpoint)
            self.info = _describe(self._spec, f"{checkpoint.where}, run by torchtitan (its config.json is a Llama's)")
            return
        self._config = config = with_spec_paths(config)
        self._spec = _find_spec(config.spec).make_spec()
        host.adapt_model_spec(self._spec)
        self._weights = TitanWeights(config.path, self._spec, config.spec)
        hf_config = read_hf_config(config.path)
        check_agrees(hf_config, self._spec, name=config.spec)
        self.info = _describe(self._spec, f"{self._weights.format} from {config.path}")
        self._weights.check(_meta_trunk(self._spec), self.info.num_layers)
        # A spec may allow more than what the weights were trained for.
        limits = filter(None, [hf_config.get("max_position_embeddings"), self.info.max_seq_len])
        self.info = replace(self.info, max_seq_len=min(limits, default=None))

    def tokenizer(self) -> Any | None:
        return open_tokenizer(self._config) if self._checkpoint is None else self._checkpoint.tokenizer()

    def build(
        self, config: Trainer.Config, device: torch.device, parallel_dims: ParallelDims, layers: Sequence[int | str]
    ) -> Teacher:
        dtype = plan.teacher_dtype(config)
        # See sharding.py. A model that only runs forward must give its gathered parameters back after each use, which
        # torchtitan's default does not do everywhere. Its states are whole on each rank: not sequence-parallel.
        parallelism = ParallelismConfig(
            data_parallel_replicate_degree=parallel_dims.dp_replicate,
            data_parallel_shard_degree=parallel_dims.dp_shard,
            tensor_parallel_degree=parallel_dims.tp,
            enable_sequence_parallel=False,
            fsdp_reshard_after_forward="always",
            spmd_backend=parallel_dims.spmd_backend,
        )
        off = {"disable_cuda_graphs": True, "enable_cpu_offload": False}
        training = replace(config.training, mixed_precision_param=str(dtype).removeprefix("torch."), **off)
        compile_config = CompileConfig(**asdict(config.compile))
        common: Any = {"training": training, "parallelism": parallelism}
        model_config = _model_config(self._spec, Trainer.Config(**common, compile=compile_config))
        with base.keep_rng_state(device):
            with torch.device("meta"), set_default_dtype(dtype):
                model = _trunk(model_config.build())
                _cut(model, layers, config.let.teacher.final_norm)
            if compile_config.enable:
                _compile_apart(model)
            common |= {"parallel_dims": parallel_dims, "compile_config": compile_config, "ac_config": None}
            model = self._spec.parallelize_fn(model, **common, dump_folder=config.dump_folder)
            if isinstance(model, FSDPModule):
                model.set_reshard_after_forward(True)  # torchtitan leaves the root, with the norm, to the default
            _allocate(model, device)
            self._weights.load(model, dtype, parallel_dims)
        student = config.model_spec.model if config.model_spec else None
        teacher = TitanTeacher(model, layers, takes_student_masks=_makes_same_masks(model_config, student))
        base.freeze(teacher)
        return teacher

    def language_model(self, *, dtype: torch.dtype, device: torch.device, seq_len: int) -> LanguageModel:
        model = self._whole(dtype, device, seq_len)
        return lambda tokens_BL, positions_BL: model(tokens_BL, *_positions_and_masks(model, tokens_BL, positions_BL))

    def outer_layers(self, *, head: bool) -> dict[str, torch.Tensor]:
        """See TeacherSource. Of DCP and safetensors, these layers alone are read."""
        model = self._whole(torch.float32, torch.device("cpu"), seq_len=1, blocks=False, head=head)
        embeddings_VE = model.tok_embeddings(torch.arange(self.info.vocab_size))
        if not head:
            return {"embeddings": embeddings_VE}
        tokens_T1 = trial_tokens(len(embeddings_VE))
        states_TE, logits_TV = embeddings_VE[tokens_T1[:, 0]], model(tokens_T1)[:, 0]
        head_VE = folded_head(model.lm_head.weight, model.norm.weight, model.norm.eps, states_TE, logits_TV)
        return {"embeddings": embeddings_VE, "head": head_VE}

    @torch.no_grad()
    def head(self) -> dict[str, torch.Tensor]:
        """See TeacherSource. Of DCP and safetensors, the outer layers alone are read."""
        model = self._whole(torch.float32, torch.device("cpu"), seq_len=1, blocks=False)
        seen: list[torch.Tensor] = []
        model.norm.register_forward_hook(lambda norm, args, output: seen.append(output))
        model.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
        logits_TV = model(trial_tokens(self.info.vocab_size))[:, 0]
        return plain_head(model.lm_head, seen[0][:, 0], seen[1][:, 0], logits_TV)

    def _whole(
        self, dtype: torch.dtype, device: torch.device, seq_len: int, *, blocks: bool = True, head: bool = True
    ) -> Any:
        """The model, unsharded and frozen; perhaps without its blocks, or without final norm and head."""
        training = TrainingConfig(seq_len=seq_len)
        parallelism = ParallelismConfig(spmd_backend=SPMD_BACKEND)
        model_config = _model_config(self._spec, Trainer.Config(training=training, parallelism=parallelism))
        with base.keep_rng_state(device):
            with torch.device("meta"), set_default_dtype(dtype):
                model = model_config.build()
                if not blocks:
                    model.layers.clear()
                if not head:
                    _trunk(model).norm = None
            _allocate(model, device)
        self._weights.load(model, dtype)
        base.freeze(model)
        return model


class TitanTeacher(Teacher):
    """The trunk of a torchtitan decoder, cut for `layers`; whether it would make the student's attention masks."""

    def __init__(self, model: Any, layers: Sequence[int | str], *, takes_student_masks: bool) -> None:
        super().__init__()
        self.model = model
        self._takes_student_masks = takes_student_masks
        blocks = list(model.layers.values())
        self._states = LayerStates(blocks, layers, output_layer=len(blocks) - 1)

    def forward(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None, masks: Any = None) -> torch.Tensor:
        if masks is not None and self._takes_student_masks:
            arguments = positions_BL, masks
        else:
            with record_function(base.MASK_RANGE):
                arguments = _positions_and_masks(self.model, tokens_BL, positions_BL)
        return self._states.collect(lambda: self.model(tokens_BL, *arguments))


def _describe(spec: ModelSpec, where: str) -> TeacherInfo:
    model_config: Any = spec.model
    trunk, attention = _meta_trunk(spec), model_config.first_attention
    return TeacherInfo(
        description=f"torchtitan {spec.name} {spec.flavor}, {where}",
        hidden_size=model_config.dim,
        num_layers=len(model_config.layers),
        vocab_size=model_config.vocab_size,
        max_seq_len=model_config.max_seq_len,
        num_trunk_params=sum(p.numel() for p in trunk.parameters()),
        num_embedding_params=sum(p.numel() for p in trunk.tok_embeddings.parameters()),
        block_params=tuple(sum(p.numel() for p in block.parameters()) for block in trunk.layers.values()),
        num_heads=getattr(attention, "n_heads", None),
        num_kv_heads=getattr(attention, "n_kv_heads", None),
        is_native=True,
    )


def describe_spec(name: str) -> TeacherInfo:
    """Describes what `let.teacher.spec = name` means, without any weights. ConfigError if it means nothing."""
    return _describe(_find_spec(name).make_spec(), "no weights")


def with_spec_paths(config: TeacherConfig) -> TeacherConfig:
    """The same table with the paths that its spec brings along, where it has none of its own."""
    spec = _find_spec(config.spec)
    path, tokenizer_path = config.path or spec.path, config.tokenizer_path or spec.tokenizer_path
    return replace(config, path=path, tokenizer_path=tokenizer_path)


def is_spec(name: str) -> bool:
    """Whether it is a registered teacher spec, or "model:flavor" of one of torchtitan's models."""
    return name in TEACHER_SPECS or (":" in name and name.partition(":")[0] in upstream.MODELS)


def _find_spec(name: str) -> TeacherSpec:
    model, colon, flavor = name.partition(":")
    if name in TEACHER_SPECS or not colon:
        return lookup(TEACHER_SPECS.get, name, key="let.teacher.spec")
    if model not in upstream.MODELS:
        message = f"torchtitan has no such model; {suggest(model, upstream.MODELS)}"
        raise ConfigError(Problem("let.teacher.spec", message, name))
    module = importlib.import_module(f"torchtitan.models.{model}")
    flavors = next((own for name, own in vars(module).items() if name.endswith("_configs")), {flavor})
    if flavor not in flavors:
        raise ConfigError(Problem("let.teacher.spec", f"{model} has no such flavor; {suggest(flavor, flavors)}", name))
    spec = module.model_registry(flavor)
    if not isinstance(spec.model, Decoder.Config):
        raise ConfigError(Problem("let.teacher.spec", "is no decoder; give one of a language model", name))
    return TeacherSpec(make_spec=lambda: spec)


def _model_config(spec: ModelSpec, config: Trainer.Config) -> Any:
    """A copy of the model's configuration, into which torchtitan writes what `config` asks for."""
    model_config: Any = copy.deepcopy(spec.model)
    config.model_spec = replace(spec, model=model_config)
    model_config.update_from_config(config=config)
    return model_config


def _allocate(model: Any, device: torch.device) -> None:
    """Memory for a model on the meta device. Its buffers (RoPE) get their values; its weights are still to be read."""
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)


def _meta_trunk(spec: ModelSpec) -> Any:
    model_config: Any = spec.model
    with torch.device("meta"):
        return _trunk(model_config.build())


def _trunk(model: Any) -> Any:
    """The model without its head, which is never run; tied weights live on in the embedding."""
    model.lm_head = None
    model.enable_weight_tying = False
    return model


def _cut(model: Any, layers: Sequence[int | str], final_norm: bool) -> None:
    """Takes away what no layer needs, as from a pipeline stage: it returns the state of its deepest block."""
    num_layers = len(model.layers)
    for name in list(model.layers)[base.num_blocks_to(layers) :]:
        del model.layers[name]
    if not (final_norm and num_layers - 1 in layers):
        model.norm = None


class _Block:
    """In front of the class of a compiled teacher's blocks: their `forward` with a code object of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _compile_apart(model: Any) -> None:
    """Keeps a student of the teacher's family compiled for its own shapes.

    Dynamo remembers by code object which sizes have been different, and makes those symbols in what it compiles next:
    after the teacher's blocks, the student's would be compiled for any width and number of heads, also after the stop.
    (On a GPU such a run failed while FlexAttention was compiled, its scale a symbol.)
    """
    classes = {cls: type(cls.__name__, (_Block, cls), {}) for cls in map(type, model.layers.values())}
    for block in model.layers.values():
        block.__class__ = classes[type(block)]


def _makes_same_masks(teacher: Any, student: Any) -> bool:
    """Whether two models, by their configurations, make the same attention masks of the same positions."""
    if not isinstance(student, Decoder.Config):
        return False
    for name in ("get_attention_masks", "_create_flex_attention_mask_for_document", "_create_flex_attention_mask"):
        # A model with masks of its own, such as sliding windows, overrides one of these.
        if any(getattr(config._owner, name, None) is not getattr(Decoder, name) for config in (teacher, student)):
            return False
    inner = [getattr(config.first_attention, "inner_attention", None) for config in (teacher, student)]
    return type(inner[0]) is type(inner[1]) and len({getattr(config, "block_size", None) for config in inner}) == 1


def _positions_and_masks(
    model: Any, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None
) -> tuple[torch.Tensor | None, Any]:
    """What a torchtitan decoder takes beside the tokens, so that no document sees another."""
    inner_attention = getattr(model.config.first_attention, "inner_attention", None)
    if not isinstance(inner_attention, (FlexAttention.Config, VarlenAttention.Config)):
        return positions_BL, None
    if positions_BL is None:  # one document per row; FlexAttention is not causal by itself
        positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
    return positions_BL, model.get_attention_masks(positions=positions_BL)
