"""A teacher that `transformers` builds, from a folder in Hugging Face format or from the hub.

* The trunk alone (`AutoModel`): a language-model head is never built, nor run.
* Safetensors only, and only a checkpoint that holds every weight: a newly initialised weight is an error.
* Cut behind the deepest layer that is asked for. The final norm runs all the same.
* Packed documents are isolated in every family that is accepted: see `hf_attention.py`. `build` tries it out.

Shape legend: B batch, L sequence, E teacher width.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from let_plugin.config import TeacherConfig
from let_plugin.errors import ConfigError, Problem
from let_plugin.teacher.base import (
    LanguageModel,
    Teacher,
    TeacherInfo,
    TeacherSource,
    freeze,
    keep_rng_state,
    num_blocks_to,
)
from let_plugin.teacher.hf_checks import (
    check_folder,
    check_is_decoder,
    check_isolates_documents,
    check_loading_info,
    check_safetensors,
    find_layers,
    remote_code_problem,
)
from let_plugin.teacher.language_model import TransformersLanguageModel, load_pretrained
from let_plugin.teacher.layers import LayerStates

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer
    from transformers import PreTrainedConfig

_PATH_KEY = "let.teacher.path"
_TOKENIZER_KEY = "let.teacher.tokenizer_path"
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_TRIAL_LENGTH = 6  # tokens of a document that a teacher is tried out with
_TOKENIZER_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


class HFTeacherSource(TeacherSource):
    """A `transformers` decoder in a local folder (config.json + safetensors, sharded or not), or on the hub.

    Args:
        config: The `[let.teacher]` table. `path` is a hub name only if it looks like one ("org/name") and there is no
            such path on this machine. A local teacher never touches the network.

    Raises:
        ConfigError: If there is no such teacher, or it is not a decoder that can be a teacher.
    """

    def __init__(self, config: TeacherConfig) -> None:
        import_transformers()
        self._teacher_config = config
        self._is_local = os.path.exists(config.path)
        if self._is_local:
            check_folder(config)
        elif not _HUB_NAME.match(config.path):
            message = 'there is no such folder, and it is not a hub name ("org/name"); give a folder with config.json'
            raise ConfigError(Problem(_PATH_KEY, f"{message} and *.safetensors", config.path))
        self._model_config = self._load_config()
        where = "folder" if self._is_local else "hub"
        self.info = teacher_info(self._model_config, f"{where} {config.path}", config)

    def vocabulary(self) -> dict[str, int] | None:
        """Token -> id, from tokenizer.json in `tokenizer_path` or the teacher's folder; None if there is none.

        Other formats go through `transformers`' AutoTokenizer. ConfigError if `tokenizer_path` holds no tokenizer, or
        a tokenizer cannot be read.
        """
        if self._teacher_config.tokenizer_path:
            return read_tokenizer_path(self._teacher_config.tokenizer_path)
        if self._is_local:
            return _read_vocabulary(self._teacher_config.path, _PATH_KEY)
        return _read_vocabulary_with_transformers(self._teacher_config.path, _PATH_KEY)

    def build(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: "Trainer.Config",
        parallel_dims: "ParallelDims",
        layers: Sequence[int | str],
        final_norm: bool,
    ) -> "HFTeacher":
        """See TeacherSource. Every rank reads the whole checkpoint into CPU memory before it keeps its shard."""
        from transformers import AutoModel

        from let_plugin.teacher.hf_attention import ATTENTION

        path = self._teacher_config.path
        if self._is_local:
            check_safetensors(Path(path))
        with keep_rng_state(device), quiet_transformers():
            try:
                trunk, loading_info = AutoModel.from_pretrained(
                    path,
                    config=self._model_config,
                    dtype=dtype,
                    attn_implementation=ATTENTION,
                    use_safetensors=True,
                    local_files_only=self._is_local,
                    trust_remote_code=self._teacher_config.trust_remote_code,
                    # Lists the mismatches in loading_info, which raises below: none is ever accepted.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            except Exception as error:  # safetensors, the hub client and transformers each have types of their own
                raise ConfigError(Problem(_PATH_KEY, f"the teacher cannot be loaded: {error}", path)) from error
            check_loading_info(loading_info, trunk, self.info.num_layers, path)
            return make_teacher(
                trunk,
                self.info,
                layers=layers,
                final_norm=final_norm,
                device=device,
                parallel_dims=parallel_dims,
                path=path,
            )

    def language_model(self, *, dtype: torch.dtype, device: torch.device, seq_len: int) -> LanguageModel:
        if self._is_local:
            check_safetensors(Path(self._teacher_config.path))
        with keep_rng_state(device), quiet_transformers():
            model, loading_info = load_pretrained(self._teacher_config, self._model_config, dtype)
        check_loading_info(loading_info, model, self.info.num_layers, self._teacher_config.path)
        return TransformersLanguageModel(model, device)

    def _load_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        path = self._teacher_config.path
        try:
            return AutoConfig.from_pretrained(
                path, local_files_only=self._is_local, trust_remote_code=self._teacher_config.trust_remote_code
            )
        except Exception as error:  # OSError, ValueError, JSON and hub errors, and whatever remote code raises
            if "trust_remote_code" in str(error):
                raise ConfigError(remote_code_problem()) from error
            remedy = "" if self._is_local else " (no local folder of that name either)"
            raise ConfigError(Problem(_PATH_KEY, f"its configuration cannot be read{remedy}: {error}", path)) from error


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

    def forward(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        """Returns the layers' states, concatenated along channels, [B, L, E], in the teacher's dtype.

        Reads no tensor on the host, except in families whose rotary frequencies depend on the length of the input
        ("dynamic" and "longrope" scaling): `transformers` does it there.

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token within its own document, int64: 0 starts a document. None: one
                document per row.
        """
        from let_plugin.teacher.hf_attention import DocumentMask

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


def teacher_info(config: "PreTrainedConfig", where: str, teacher_config: TeacherConfig) -> TeacherInfo:
    """Describes the trunk that `config` asks for, counted on the meta device.

    ConfigError if it is not a decoder, or one of a family in which packed documents cannot be kept apart.
    """
    path = teacher_config.path
    check_is_decoder(config, teacher_config)
    from transformers import AutoModel

    try:
        # Every family has "eager" attention, so that the check below can say what is the matter with the others.
        with torch.device("meta"), keep_rng_state(torch.device("cpu")):
            trunk = AutoModel.from_config(
                config, attn_implementation="eager", trust_remote_code=teacher_config.trust_remote_code
            )
    except Exception as error:  # a configuration that contradicts itself fails anywhere in the model's constructor
        raise ConfigError(Problem(_PATH_KEY, f"its configuration cannot be built: {error}", path)) from error
    check_isolates_documents(config, trunk, path)

    blocks = find_layers(trunk, config.num_hidden_layers)
    embeddings = [module for module in trunk.modules() if isinstance(module, nn.Embedding)]
    return TeacherInfo(
        description=f"{config.model_type} ({type(trunk).__name__}), {where}",
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


def make_teacher(
    trunk: nn.Module,
    info: TeacherInfo,
    *,
    layers: Sequence[int | str],
    final_norm: bool,
    device: torch.device,
    parallel_dims: "ParallelDims",
    path: str,
) -> HFTeacher:
    """Cuts and freezes a trunk on the CPU, tries it out, and moves it to `device`, sharded over data-parallel ranks.

    Its configuration stays as it is: `forward` runs the blocks that are there, with the types that it gives them.
    """
    blocks = find_layers(trunk, info.num_layers)
    states = LayerStates(list(blocks), layers, output_layer=info.num_layers - 1 if final_norm else None)
    teacher = HFTeacher(trunk, states)
    freeze(teacher)
    _cut(teacher, blocks, info, layers, path)
    _try_out(teacher, info, sum(info.width(layer, final_norm) for layer in layers), path)
    mesh = _shard_mesh(parallel_dims)
    if mesh is None:
        return teacher.to(device)

    from torch.distributed.fsdp import fully_shard

    # Explicit: by default FSDP2 leaves a root that never runs backward gathered. One layer at a time goes to the
    # device, where its shard stays.
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(trunk, mesh=mesh, reshard_after_forward=True)
    return teacher


def read_tokenizer_path(path: str) -> dict[str, int]:
    """Token -> id of the tokenizer in the folder `let.teacher.tokenizer_path`; ConfigError if there is none."""
    vocabulary = _read_vocabulary(path, _TOKENIZER_KEY) if os.path.isdir(path) else None
    if vocabulary is None:
        message = "no tokenizer there; give a folder with tokenizer.json, or leave it empty"
        raise ConfigError(Problem(_TOKENIZER_KEY, message, path))
    return vocabulary


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report that the language-model head was left out: `check_loading_info` reports."""
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


@torch.no_grad()
def _cut(teacher: HFTeacher, blocks: nn.ModuleList, info: TeacherInfo, layers: Sequence[int | str], path: str) -> None:
    """Takes away the blocks behind the deepest layer. ConfigError unless the layers' states stay as they were.

    They would not in a family that runs its blocks in loops: there, a later block comes before an earlier one.
    """
    num_blocks = num_blocks_to(layers)
    if num_blocks == info.num_layers:
        return
    tokens_BL, positions_BL = _two_documents(info)
    before_BLE = _run(teacher, info, tokens_BL, positions_BL, path)
    del blocks[num_blocks:]
    after_BLE = _run(teacher, info, tokens_BL, positions_BL, path)
    if not (after_BLE - before_BLE).float().norm() <= 1e-2 * before_BLE.float().norm():
        message = f"{info.description}: the states of these layers depend on blocks behind them; choose its last layer"
        raise ConfigError(Problem("let.pairs", message, list(layers)))


@torch.no_grad()
def _try_out(teacher: HFTeacher, info: TeacherInfo, width: int, path: str) -> None:
    """ConfigError unless the states have the width E = `width` and a document's do not depend on the one before it.

    Two documents of 6 tokens in each of 2 rows, on the CPU: milliseconds for a small teacher. A family that passes
    `check_isolates_documents` but has other ways from token to token (a convolution, say) is caught here.
    """
    length = _TRIAL_LENGTH
    tokens_BL, positions_BL = _two_documents(info)
    changed_BL = tokens_BL.clone()
    changed_BL[0, :length] = (changed_BL[0, :length] + 1) % info.vocab_size
    states_BLE = _run(teacher, info, tokens_BL, positions_BL, path)
    changed_BLE = _run(teacher, info, changed_BL, positions_BL, path)
    if states_BLE.shape[-1] != width:
        message = f"its states have width {states_BLE.shape[-1]}, its configuration says {width}"
        raise ConfigError(Problem(_PATH_KEY, message, path))
    # A masked token contributes exactly 0, but a mixture-of-experts layer groups tokens differently: hence a tolerance
    # relative to the effect that the change has where it may have one.
    effect = (changed_BLE - states_BLE)[0, :length].float().norm()
    leak = (changed_BLE - states_BLE)[0, length:].float().norm()
    if not leak <= 1e-2 * effect:
        message = f"{info.description}: a document's states depend on the document before it; choose another teacher"
        raise ConfigError(Problem(_PATH_KEY, message, path))


def _two_documents(info: TeacherInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BL and positions_BL to try a teacher out with: two documents in each of 2 rows."""
    tokens_BL = torch.arange(2 * _TRIAL_LENGTH).repeat(2, 1) % info.vocab_size
    return tokens_BL, torch.arange(_TRIAL_LENGTH).repeat(2, 2)


def _run(
    teacher: HFTeacher, info: TeacherInfo, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, path: str
) -> torch.Tensor:
    try:
        return teacher(tokens_BL, positions_BL)
    except Exception as error:  # whatever this family's code raises when it is given our arguments
        message = f"{info.description} cannot run over packed documents: {error}"
        raise ConfigError(Problem(_PATH_KEY, message, path)) from error


def _shard_mesh(parallel_dims: "ParallelDims") -> Any:
    """The 1-D mesh that the weights are sharded over, or None.

    Only the sharding axis of the (perhaps 2-D) data-parallel mesh: the replicas along the other axis hold the same
    frozen weights, and have no gradients to agree on.
    """
    return parallel_dims.get_mesh("fsdp") if parallel_dims.dp_shard_enabled else None


def _read_vocabulary(folder: str, key: str) -> dict[str, int] | None:
    file = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(file):
        return _read_vocabulary_with_transformers(folder, key)
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(file).get_vocab(with_added_tokens=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(Problem(key, f"tokenizer.json cannot be read: {error}", folder)) from error


def _read_vocabulary_with_transformers(path: str, key: str) -> dict[str, int] | None:
    tokenizer = load_tokenizer(path, key)
    return None if tokenizer is None else tokenizer.get_vocab()


def load_tokenizer(path: str, key: str) -> Any:
    """The tokenizer of a folder or hub name, through AutoTokenizer; None if there are no tokenizer files.

    ConfigError, naming the field `key`, if it cannot be read.
    """
    from transformers import AutoTokenizer

    is_local = os.path.isdir(path)
    if is_local and not any(Path(path, name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=is_local)
    except Exception as error:  # missing sentencepiece, damaged files, the hub
        raise ConfigError(Problem(key, f"its tokenizer cannot be read: {error}", path)) from error
