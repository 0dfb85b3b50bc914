"""`let-teacher inspect PATH`: says what a teacher is, and how well it predicts a text.

A loss that is what one expects of the teacher shows that the right weights were loaded, and loaded correctly.
"""

import argparse
import importlib
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.runtime import data

if TYPE_CHECKING:
    import torch

    from let_plugin.teacher.base import TeacherInfo, TeacherSource

_MAX_SEQ_LEN = 1024  # longer documents are read in parts
_MIB = 2**20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand `inspect`."""
    parser = subparsers.add_parser("inspect", help="say what a teacher is, and how well it predicts a text")
    path_help = "as let.teacher.path: folder, .gguf file or hub name; without it, what follows from --spec alone"
    parser.add_argument("path", metavar="PATH", nargs="?", default="", help=path_help)
    parser.add_argument("--spec", default="", metavar="NAME", help="as let.teacher.spec: torchtitan runs the teacher")
    modules: dict[str, Any] = {"action": "append", "default": ["let_plugin.demo.config_registry"], "metavar": "MODULE"}
    parser.add_argument("--import", dest="modules", help="Python module that registers the spec", **modules)
    parser.add_argument("--text", metavar="FILE", help="measure the loss on this text; files as for text_files")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="of the text (default: 4096)")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="folder of the teacher's tokenizer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the teacher's maths")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="where it runs")
    parser.add_argument("--trust-remote-code", action="store_true", help="as let.teacher.trust_remote_code")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints what there is to say. ConfigError for what cannot be read."""
    from let_plugin.runtime import host

    device = host.set_up(options.device)  # before any other module of torchtitan is imported
    from let_plugin.teacher.open import open_teacher
    from let_plugin.teacher.titan.source import TRANSFORMERS, describe_spec, with_spec_paths

    sys.path.append(os.getcwd())  # which a console script does not have there
    for module in options.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(Problem("--import", f"cannot be imported: {error}", module)) from error
    if options.max_tokens < 1:
        raise ConfigError(Problem("--max-tokens", "must be at least 1", options.max_tokens))
    config = TeacherConfig(path=options.path, spec=options.spec, tokenizer_path=options.tokenizer)
    config.trust_remote_code = options.trust_remote_code
    if options.spec not in ("", TRANSFORMERS) and not with_spec_paths(config).path:
        weights = {"weights": "none given: this is what follows from the spec"}
        return _print(_describe(describe_spec(options.spec)) | weights)
    source = open_teacher(config)
    tokenizer = source.tokenizer()
    _print(_describe(source.info))
    if tokenizer is not None:
        _print({"tokenizer": f"{len(tokenizer.get_vocab()):,} tokens"})
        _print(_measure(source, tokenizer, options, device))
    elif options.text:
        raise ConfigError(Problem("--tokenizer", "missing; name a folder with the teacher's tokenizer.json"))
    else:
        _print({"tokenizer": "none there: the loss is not measured (--tokenizer FOLDER)"})


def _print(lines: dict[str, str]) -> None:
    for name, text in lines.items():
        print(f"{name:<11}{text}", flush=True)


def _describe(info: "TeacherInfo") -> dict[str, str]:
    num_multiplied = info.num_trunk_params - info.num_embedding_params
    heads = "" if info.num_heads is None else f", {info.num_heads} heads"
    if info.num_kv_heads not in (None, info.num_heads):
        heads += f" ({info.num_kv_heads} key-value)"
    inside = "" if info.residual_size in (None, info.hidden_size) else f" (inside: {info.residual_size})"
    return {
        "teacher": info.description,
        "blocks": f"{info.num_layers} of width {info.hidden_size}{inside}{heads}",
        "vocabulary": f"{info.vocab_size:,} rows",
        "positions": "without a limit of its own" if info.max_seq_len is None else f"at most {info.max_seq_len:,}",
        "trunk": f"{info.num_trunk_params:,} parameters: {info.num_embedding_params:,} in embeddings, "
        f"{num_multiplied:,} that are multiplied",
        "memory": f"of the trunk: {info.num_trunk_params * 2 / _MIB:,.1f} MiB in bfloat16, "
        f"{info.num_trunk_params * 4 / _MIB:,.1f} MiB in float32",
        "cost": f"{2 * num_multiplied / 1e9:.3g} GFLOPs per token, 2 for each parameter that is multiplied",
    }


def _measure(
    source: "TeacherSource", tokenizer: Any, options: argparse.Namespace, device: "torch.device"
) -> dict[str, str]:
    import torch

    from let_plugin.teacher.language_model import loss_sums
    from let_plugin.tokens.encoding import TextEncoder, Tokens

    info = source.info
    if (max_id := max(tokenizer.get_vocab().values())) >= info.vocab_size:
        message = f"it has ids up to {max_id}, the teacher {info.vocab_size} rows; it is not the teacher's"
        raise ConfigError(Problem("--tokenizer", message, options.tokenizer))
    seq_len = min(info.max_seq_len or _MAX_SEQ_LEN, _MAX_SEQ_LEN)
    try:
        encode = TextEncoder(tokenizer, tokens := Tokens(tokenizer))
    except ValueError as error:
        raise ConfigError(Problem("--tokenizer", str(error), options.tokenizer)) from error
    begin = [] if tokens.bos is None else [tokens.bos]
    parts: list[list[int]] = []
    num_bytes, num_left = 0, options.max_tokens
    for document in data.load_text_files(options.text or data.TEXT["test"], key="--text")["text"]:
        if num_left <= 0:
            break
        ids, ends = encode(document, at_start=True)
        ids, ends = [*begin, *ids][: num_left + 1], [*(0 for _ in begin), *ends][: num_left + 1]
        num_left -= max(len(ids) - 1, 0)
        num_bytes += ends[-1] - ends[0] if ends else 0
        # One token is in two parts: the last label of one is the first input of the next.
        parts += (ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len))
    if not parts:
        raise ConfigError(Problem("--text", "there is nothing in it to predict", options.text))
    model = source.language_model(dtype=getattr(torch, options.dtype), device=device, seq_len=seq_len)
    batches = ((torch.tensor([ids[:-1]]), None, torch.tensor([ids[1:]])) for ids in parts)
    loss_sum, num_tokens = loss_sums(model, batches, vocab_size=info.vocab_size, device=device).tolist()
    loss, bits = loss_sum / num_tokens, loss_sum / math.log(2) / max(num_bytes, 1)
    return {
        "text": options.text or "the test split of the package's demo, since no --text is given",
        "loss": f"{loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, {bits:.4f} bits per byte, over "
        f"{int(num_tokens):,} tokens and {num_bytes:,} bytes, in {options.dtype}",
    }
