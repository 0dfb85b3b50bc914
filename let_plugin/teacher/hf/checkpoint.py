"""A checkpoint that `transformers` can read: a folder, a hub name or a .gguf file.

`from_pretrained` reads it, from safetensors or GGUF, never from pickles. At start-up it does so on the meta device,
which compares the files' headers with the configuration and reads no weights.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.base import bad_path, freeze, keep_rng_state, may_be_on_hub, require
from let_plugin.teacher.hf import hub
from let_plugin.teacher.hf.checks import check_is_decoder, check_isolates_documents, find_layers
from let_plugin.teacher.hf.files import check_finite, check_names, linked, read_headers, some_names, weight_files
from let_plugin.tokens.vocabulary import open_tokenizer

_OLD_BUFFERS = r"(inv_freq|masked_bias|\.attn\.bias|attention\.bias)"  # which no version reads now
_MISFITS = "tensors that are not as its configuration says"


class Checkpoint:
    """A checkpoint that has been found and compared with its configuration; its weights are not read yet.

    Its path is a hub name only if it looks like one ("org/name") and there is no such path on this machine: a local
    teacher never touches the network. ConfigError if there is no such checkpoint, it is not a decoder that can be a
    teacher, or its weights are not those that its configuration asks for.

    `folder` is where its files are, on this machine, `where` what and where it is, for people; `model_config` is its
    configuration, `trunk` the model without a head, whole, on the meta device. `is_bare`: saved as a trunk alone, whose
    tensors have other names.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.is_gguf = config.path.endswith(".gguf") or (
            os.path.isfile(config.path) and not config.path.endswith(".safetensors")
        )
        is_on_hub = may_be_on_hub(config.path)
        if config.revision and not is_on_hub:
            raise ConfigError(Problem("let.teacher.revision", "only a teacher on the hub has one", config.revision))
        self._options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
        if self.is_gguf:
            require("gguf", "accelerate")
            if not os.path.isfile(config.path):  # a pipe would be waited for
                raise bad_path(config.path, "no such file (or it is a folder or a pipe); give a .gguf file's path")
            self._alone = linked([Path(config.path)])  # transformers would prefer a config.json that lies beside it
            self.folder = self._alone.name
            self._options["gguf_file"] = os.listdir(self.folder)[0]
            self.where = f"GGUF {config.path}"
        elif os.path.isdir(config.path):
            self.folder, self.where = config.path, f"folder {config.path}"
            check_names(os.listdir(config.path), config.path)
        elif is_on_hub:
            commit = hub.find(config)
            self.folder = hub.fetch(config, commit, weights=False)
            self.where = f"hub {config.path} ({'commit ' + commit[:8] if commit else 'in the cache'})"
        else:
            message = 'there is no such folder, and it is no hub name ("org/name"); give a folder with *.safetensors'
            raise bad_path(self.config.path, message)
        self.model_config: PreTrainedConfig = self._read(AutoConfig, "configuration")
        check_is_decoder(self.model_config, config)
        try:
            # Every family has "eager" attention, so that the checks can say what is the matter with the others.
            self.trunk = self.on_meta(attention="eager")
        except Exception as error:  # a configuration that contradicts itself fails anywhere in the model's constructor
            raise bad_path(self.config.path, f"its configuration cannot be built: {error}") from error
        check_isolates_documents(self.model_config, self.trunk, config.path)
        if is_on_hub:
            self.folder = hub.fetch(config, commit, weights=True)
        self.is_bare = False
        if self.is_gguf:
            self._check_gguf()
        else:
            headers = read_headers(weight_files(Path(self.folder)))
            self.is_bare = not any(name.startswith(f"{self.trunk.base_model_prefix}.") for name in headers)
            integers = {name for name, stored in headers.items() if not stored.is_floating}
            self._from_pretrained(AutoModel, integers, device_map="meta", dtype=torch.float32)

    def on_meta(self, *, attention: str, dtype: torch.dtype = torch.float32) -> Any:
        """A new trunk on the meta device, with the attention function of that name."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return AutoModel.from_config(
                self.model_config,
                trust_remote_code=self.config.trust_remote_code,
                attn_implementation=attention,
                dtype=dtype,
            )

    def load(self, dtype: torch.dtype, *, head: bool = False, attention: str | None = None) -> Any:
        """Reads the whole trunk, or with `head` the whole causal language model, into CPU memory, frozen.

        ConfigError that names the tensors which cannot be read, or hold NaN or infinities.
        """
        auto_class = AutoModelForCausalLM if head else AutoModel
        with keep_rng_state(torch.device("cpu")):
            model = self._from_pretrained(auto_class, dtype=dtype, attn_implementation=attention)
        check_finite(model.state_dict(), self.config.path)
        freeze(model)
        return model

    def tokenizer(self) -> Any | None:
        """That of `tokenizer_path` if given, or else the checkpoint's own; None if it comes without one."""
        if self.is_gguf and not self.config.tokenizer_path:
            return self._read(AutoTokenizer, "tokenizer")
        return open_tokenizer(dataclasses.replace(self.config, path=self.folder))

    def _read(self, auto_class: Any, what: str) -> Any:
        try:
            with quiet_transformers():
                return auto_class.from_pretrained(self.folder, **self._options)
        except Exception as error:  # OSError, ValueError, JSON errors, and whatever remote code or a .gguf file raises
            if "trust_remote_code" in str(error):
                message = "the checkpoint comes with Python code of its own; set it to true if you trust that code"
                raise ConfigError(Problem("let.teacher.trust_remote_code", message, False)) from error
            raise self._unreadable(what, error) from error

    def _from_pretrained(self, auto_class: Any, integers: Collection[str] = (), **options: Any) -> Any:
        """The model. `integers`: the stored tensors that hold no floating-point numbers."""
        with quiet_transformers() as said:
            try:
                model, info = auto_class.from_pretrained(
                    self.folder,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **self._options,
                    **{name: value for name, value in options.items() if value is not None},
                )
            except Exception as error:  # whatever a damaged file brings about in a reader or converter
                if names := set(re.findall(r"destined for ([\w.]*\w)", "\n".join(said))):
                    raise bad_path(self.config.path, f"{_MISFITS}: {some_names(names)} ({error})") from error
                raise self._unreadable("weights", error) from error
        wrong = [f"{n} (file {tuple(f)}, configuration {tuple(w)})" for n, f, w in info["mismatched_keys"]]
        state = model.state_dict()
        for name in set(integers) - set(info["unexpected_keys"]):
            if all(t.is_floating_point() for key, t in state.items() if name.endswith(key)):
                wrong.append(f"{name} (file integers, configuration floating-point numbers)")
        messages = []
        if missing := info["missing_keys"]:
            messages.append(f"the checkpoint lacks tensors that its configuration asks for: {some_names(missing)}")
        if wrong:
            messages.append(f"{_MISFITS}: {some_names(wrong)}")
        if surplus := self._surplus(model, info["unexpected_keys"]):
            depth = self.model_config.num_hidden_layers
            messages.append(f"its layers have more than its configuration ({depth} layers): {some_names(surplus)}")
        if messages:
            raise bad_path(self.config.path, *messages)
        return model

    def _surplus(self, model: nn.Module, unexpected: Iterable[str]) -> list[str]:
        """A head, or a buffer of an old version, may be left over; what is in a layer means a wrong config.json."""
        layers = find_layers(model, self.model_config.num_hidden_layers)
        path = next(name for name, module in model.named_modules() if module is layers)
        in_layers = re.compile(rf"(\w+\.)?{re.escape(path)}\.\d+\.(?!.*{_OLD_BUFFERS}$)")
        return list(filter(in_layers.match, unexpected))

    def _check_gguf(self) -> None:
        """`transformers` leaves out what it does not know of a .gguf file, without a word: that is refused here."""
        from gguf import GGUFReader

        reader = GGUFReader(self.config.path)
        names = [tensor.name for tensor in reader.tensors]
        lost = [name for name in names if name.startswith("rope_")]
        lost += [n for n, x in reader.fields.items() if n.endswith(".rope.scaling.type") and x.contents() != "none"]
        biases = [name for name in names if name.startswith("blk.") and name.endswith(".bias")]
        if len(biases) > sum(name.endswith(".bias") for name, _ in self.trunk.named_parameters()):
            lost += biases
        if lost:
            message = f"transformers would leave out {some_names(lost)}; take the same model as a folder of safetensors"
            raise bad_path(self.config.path, message)

    def _unreadable(self, what: str, error: Exception) -> ConfigError:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if self.is_gguf:
            size = os.path.getsize(self.config.path)
            reason = f"the file is truncated ({size} bytes), damaged or of an unknown kind; {reason}"
        return bad_path(self.config.path, f"its {what} cannot be read: {reason}")


@contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """No progress bars and no messages of `transformers`, which are collected instead: Checkpoint reports."""
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with hub.collected_log("transformers") as said:
            yield said
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter or buffer, those that no checkpoint holds included."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
