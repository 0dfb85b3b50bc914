"""Teachers that are torchtitan models: built, parallelised and compiled by torchtitan's own code."""

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import CompileConfig, ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.compile import apply_compile
from torchtitan.models import _supported_models
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import set_default_dtype
from torchtitan.trainer import Trainer

from let_plugin import host
from let_plugin.config import TeacherConfig
from let_plugin.errors import ConfigError, Problem, suggest
from let_plugin.registry import Registry
from let_plugin.teacher import quantization
from let_plugin.teacher.base import Teacher, TeacherInfo, TeacherSource, freeze, keep_rng_state, num_blocks_to
from let_plugin.teacher.layers import LayerStates
from let_plugin.teacher.safetensors_files import some_names
from let_plugin.teacher.sharding import raise_together
from let_plugin.teacher.vocabulary import read_tokenizer, read_vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A torchtitan model that can be a teacher.

    Attributes:
        make_spec: Returns its ModelSpec. Called anew for every teacher, since torchtitan writes into a specification.
        path: Folder of its weights; used where `let.teacher.path` is empty.
        tokenizer_path: Folder of its tokenizer; used where `let.teacher.tokenizer_path` is empty.
    """

    make_spec: Callable[[], ModelSpec]
    path: str = ""
    tokenizer_path: str = ""


TEACHER_SPECS: Registry[TeacherSpec] = Registry("teacher spec", "let_plugin.teacher_specs")


def register_teacher_spec(
    name: str, make_spec: Callable[[], ModelSpec], *, path: str = "", tokenizer_path: str = ""
) -> None:
    """Makes `let.teacher.spec = name` mean the torchtitan model that `make_spec()` describes (see TeacherSpec)."""
    TEACHER_SPECS.register(name, TeacherSpec(make_spec=make_spec, path=path, tokenizer_path=tokenizer_path))


class TitanTeacherSource(TeacherSource):
    """A torchtitan ModelSpec and a folder with its weights: DCP, or safetensors through the spec's adapter."""

    def __init__(self, config: TeacherConfig) -> None:
        teacher_spec = _find_spec(config.spec)
        config = dataclasses.replace(
            config,
            path=config.path or teacher_spec.path,
            tokenizer_path=config.tokenizer_path or teacher_spec.tokenizer_path,
        )
        quantization.check(config)
        self._config = config
        self._spec = teacher_spec.make_spec()
        host.adapt_model_spec(self._spec)
        self._format = _weights_format(config.path, self._spec)
        model_config: Any = self._spec.model
        with torch.device("meta"):
            trunk = _trunk(model_config.build())
        self.info = TeacherInfo(
            description=f"torchtitan {self._spec.name} {self._spec.flavor}, {self._format} from {config.path}",
            hidden_size=model_config.dim,
            num_layers=len(model_config.layers),
            vocab_size=model_config.vocab_size,
            max_seq_len=model_config.max_seq_len,
            num_trunk_params=sum(p.numel() for p in trunk.parameters()),
            num_embedding_params=sum(p.numel() for p in trunk.tok_embeddings.parameters()),
            block_params=tuple(sum(p.numel() for p in block.parameters()) for block in trunk.layers.values()),
            num_linear_params=quantization.num_linear_params(trunk),
            block_linear_params=tuple(quantization.num_linear_params(block) for block in trunk.layers.values()),
        )

    def vocabulary(self) -> dict[str, int] | None:
        key = "let.teacher.tokenizer_path" if self._config.tokenizer_path else "let.teacher.path"
        return read_vocabulary(self._config.tokenizer_path or self._config.path, key=key)

    def tokenizer(self) -> HuggingFaceTokenizer | None:
        key = "let.teacher.tokenizer_path" if self._config.tokenizer_path else "let.teacher.path"
        return read_tokenizer(self._config.tokenizer_path or self._config.path, key=key)

    def build(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: Trainer.Config,
        parallel_dims: ParallelDims,
        layers: Sequence[int | str],
        final_norm: bool,
    ) -> Teacher:
        # Data-parallel only (see sharding.py). A model that only runs forward must give its gathered parameters back
        # after each use, which torchtitan's default does not do everywhere.
        parallelism = ParallelismConfig(
            data_parallel_replicate_degree=parallel_dims.dp_replicate,
            data_parallel_shard_degree=parallel_dims.dp_shard,
            fsdp_reshard_after_forward="always",
            spmd_backend=parallel_dims.spmd_backend,
        )
        offloads = self._config.cpu_offload
        training = dataclasses.replace(
            config.training,
            mixed_precision_param=str(dtype).removeprefix("torch."),
            disable_cuda_graphs=True,
            enable_cpu_offload=offloads,
        )
        compile_config = CompileConfig(**dataclasses.asdict(config.compile))
        model_config: Any = self._spec.model
        model_config.update_from_config(
            config=Trainer.Config(
                model_spec=self._spec, training=training, parallelism=parallelism, compile=compile_config
            )
        )
        with keep_rng_state(device):
            with torch.device("meta"), set_default_dtype(dtype):
                model = _trunk(model_config.build())
                _cut(model, layers, final_norm)
            if self._config.quantization == "none":
                model = self._spec.parallelize_fn(
                    model,
                    parallel_dims=parallel_dims,
                    training=training,
                    parallelism=parallelism,
                    compile_config=compile_config,
                    ac_config=None,
                    dump_folder=config.dump_folder,
                )
                if isinstance(model, FSDPModule):
                    model.set_reshard_after_forward(True)  # torchtitan leaves the root, with the norm, to the default
            elif compile_config.enable and "model" in compile_config.components:
                # Held whole: FSDP2, which torchtitan always applies, cannot hold int8 weights.
                apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
            model.to_empty(device="cpu" if offloads else device)
            with torch.no_grad():
                # The buffers (RoPE); the weights are overwritten below.
                model.init_weights(buffer_device=device if offloads else None)
            raise_together(self._problems_of_loading(model), parallel_dims)
            if self._config.quantization != "none":
                quantization.quantize_linear(model)
        teacher = TitanTeacher(model, layers)
        freeze(teacher)
        return teacher

    def _problems_of_loading(self, model: Any) -> list[Problem]:
        """Reads this rank's shards, and returns what is wrong with them: tensors that hold NaN or infinities, too."""
        try:
            self._load(model)
        except ConfigError as error:
            return error.problems
        local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
        bad = [name for name, tensor in local.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
        if not bad:
            return []
        message = f"these tensors hold NaN or infinite values: {some_names(bad)}; fetch the files again"
        return [Problem("let.teacher.path", message, self._config.path)]

    def _load(self, model: Any) -> None:
        """Reads each rank's own shards into `model`. Every parameter must be found, in its shape."""
        state_dict = model.state_dict()
        path = self._config.path
        try:
            # no_dist: every rank plans and reads for itself, so that ranks without a teacher need not take part.
            if self._format == "DCP":
                reader = dcp.FileSystemReader(path)
                _refuse_surplus_blocks(reader.read_metadata().state_dict_metadata, self.info.num_layers)
                dcp.load(state_dict, storage_reader=reader, no_dist=True)
            else:
                assert self._spec.state_dict_adapter is not None
                adapter = self._spec.state_dict_adapter(self._spec.model, path)
                hf_state_dict = adapter.to_hf(state_dict)
                reader = adapter.get_hf_storage_reader(path)
                _refuse_surplus_blocks(reader.read_metadata().state_dict_metadata, self.info.num_layers)
                dcp.load(hf_state_dict, storage_reader=reader, no_dist=True)
                state_dict = {k: v for k, v in adapter.from_hf(hf_state_dict).items() if k in state_dict}
        except (Exception, CheckpointException) as error:  # the latter is no Exception, only a BaseException
            # Whatever the reader stumbles over (a truncated file, a missing tensor, another shape), it is the file's.
            raise ConfigError(
                Problem(
                    "let.teacher.path",
                    f"the weights do not fit the teacher spec {self._config.spec!r} or cannot be read: "
                    f"{_first_cause(error)}",
                    path,
                )
            ) from error
        model.load_state_dict(state_dict)


class TitanTeacher(Teacher):
    """The trunk of a torchtitan decoder, cut for some layers. Shape legend: B batch, L sequence, E teacher width."""

    def __init__(self, model: Any, layers: Sequence[int | str]) -> None:
        super().__init__()
        self.model = model
        blocks = list(model.layers.values())
        self._states = LayerStates(blocks, layers, output_layer=len(blocks) - 1)
        attention = model.config.first_attention
        self._takes_masks = isinstance(
            getattr(attention, "inner_attention", None), (FlexAttention.Config, VarlenAttention.Config)
        )

    def forward(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        masks = None
        if self._takes_masks and positions_BL is not None:
            masks = self.model.get_attention_masks(positions=positions_BL)
        return self._states.collect(lambda: self.model(tokens_BL, positions_BL, masks))


def _find_spec(name: str) -> TeacherSpec:
    if name in TEACHER_SPECS:
        return TEACHER_SPECS.get(name, key="let.teacher.spec")
    model, colon, flavor = name.partition(":")
    if not colon:
        TEACHER_SPECS.get(name, key="let.teacher.spec")  # raises, with the nearest name
    if model not in _supported_models:
        raise ConfigError(
            Problem("let.teacher.spec", f"torchtitan has no such model; {suggest(model, _supported_models)}", name)
        )
    module = importlib.import_module(f"torchtitan.models.{model}")
    flavors = getattr(module, f"{model}_configs", None)
    if flavors is not None and flavor not in flavors:
        raise ConfigError(Problem("let.teacher.spec", f"{model} has no such flavor; {suggest(flavor, flavors)}", name))
    return TeacherSpec(make_spec=lambda: module.model_registry(flavor))


def _weights_format(path: str, spec: ModelSpec) -> str:
    if not path:
        raise ConfigError(Problem("let.teacher.path", "set it to the folder with the teacher's weights", path))
    if not os.path.isdir(path):
        raise ConfigError(Problem("let.teacher.path", "no such folder", path))
    files = os.listdir(path)
    if ".metadata" in files:
        return "DCP"
    if any(f.endswith(".safetensors") for f in files):
        if spec.state_dict_adapter is None:
            raise ConfigError(
                Problem(
                    "let.teacher.path",
                    f"{spec.name} has no adapter for Hugging Face weights; give a torchtitan checkpoint (DCP)",
                    path,
                )
            )
        return "safetensors"
    raise ConfigError(
        Problem("let.teacher.path", "the folder holds neither a torchtitan checkpoint (DCP) nor *.safetensors", path)
    )


def _trunk(model: Any) -> Any:
    """The model without its head, which is never run; tied weights live on in the embedding."""
    model.lm_head = None
    model.enable_weight_tying = False
    return model


def _cut(model: Any, layers: Sequence[int | str], final_norm: bool) -> None:
    """Takes away what no layer needs, as from a pipeline stage: it returns the state of its deepest block."""
    num_layers = len(model.layers)
    for name in list(model.layers)[num_blocks_to(layers) :]:
        del model.layers[name]
    if not (final_norm and num_layers - 1 in layers):
        model.norm = None


def _refuse_surplus_blocks(names: Iterable[str], num_blocks: int) -> None:
    """A deeper model's weights would load into its lower blocks, and make another model of it."""
    blocks = [int(match[1]) for name in names if (match := re.match(r"(?:model\.)?layers\.(\d+)\.", name))]
    if max(blocks, default=-1) >= num_blocks:
        raise ValueError(f"the checkpoint has {max(blocks) + 1} blocks, the spec {num_blocks}")


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # holds, for each rank, what it caught
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".splitlines()[0]
