"""Selection of documents, a baseline that LET is compared with: the teacher's knowledge goes into what is read.

`python -m let_plugin.bench.converge.data_selection CONFIG.toml --reference MODEL --out FILE.jsonl.xz --keep 0.5` reads
the training documents of CONFIG.toml and scores each by

    mean NLL of the reference - mean NLL of the teacher        (over the document's tokens, in nats)

The teacher is `let.teacher`, the reference a smaller or less trained model of the same tokenizer. The documents with
the highest scores are kept, in the order of the corpus (difference sampling of MiniPLM, arXiv 2410.17215). A run reads
them by `dataloader.dataset = "text_files"` and `dataset_path = "FILE.jsonl.xz"`. What it has cost lies beside it, in
FILE.jsonl.xz.costs.json.
"""

import argparse
import dataclasses
import gzip
import json
import lzma
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem

# torchtitan is imported in the functions: the command line sets the host up first.

_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open, ".jsonl": open}


def costs_path(out: Path) -> Path:
    """Where the costs of a selection lie."""
    return out.with_name(f"{out.name}.costs.json")


def read_costs(out: Path) -> dict[str, Any]:
    """`flops`, `tokens` and `seconds` of the selection that made a file. ConfigError if it is none of ours."""
    try:
        content = json.loads(costs_path(out).read_text())
        return {
            "flops": float(content["flops"]),
            "tokens": int(content["tokens"]),
            "seconds": float(content["seconds"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"no selection of let_plugin.bench.converge.data_selection: its costs cannot be read ({error})"
        raise ConfigError(Problem("--selected-text", message, str(out))) from error


def parse_model(text: str, key: str) -> TeacherConfig:
    """A model that the command line names: what `let.teacher.path` may be, or a table, '{spec = "x", path = "y"}'.

    ConfigError, naming the option `key`.
    """
    import tomli

    from let_plugin.config.overlay import Overlay

    table: Any = {"path": text}
    if text.lstrip().startswith("{"):
        try:
            table = tomli.loads(f"model = {text}")["model"]
        except tomli.TOMLDecodeError as error:
            raise ConfigError(Problem(key, f"not an inline table of TOML: {error}", text)) from error
    overlay = Overlay("")
    config = overlay.value(key, table, TeacherConfig, TeacherConfig())
    if overlay.problems:
        raise ConfigError(overlay.problems)
    return config


def select(config: Any, reference: TeacherConfig, out: Path, keep: float) -> dict[str, Any]:
    """Scores the documents, writes those that are kept to `out`, and what it took beside it.

    Returns:
        What was written beside it.

    Raises:
        ConfigError: Before any model is loaded, for what is wrong with the files; then for weights that are.
    """
    import torch
    from torchtitan.tools import utils

    from let_plugin.bench.converge.scoring import document_losses, kept
    from let_plugin.config import plan
    from let_plugin.teacher.open import open_teacher

    _check(config, out, keep)
    student_tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    sources = [open_teacher(dataclasses.replace(config.let.teacher, features="")), open_teacher(reference)]
    device = torch.device(utils.device_type)
    started = time.perf_counter()
    means: list[list[float]] = []
    flops = num_tokens = 0
    options = {"let.teacher": config.let.teacher, "--reference": reference}
    for source, (key, option) in zip(sources, options.items(), strict=True):
        _check_vocabulary(student_tokenizer, source, option, key)
    for source in sources:
        seq_len = min(config.training.seq_len, source.info.max_seq_len or config.training.seq_len)
        model = source.language_model(dtype=plan.teacher_dtype(config), device=device, seq_len=seq_len)
        ids = (student_tokenizer.encode(text, add_bos=True, add_eos=True) for text in _texts(config))
        vocab_size = source.info.vocab_size
        losses = list(document_losses(model, ids, seq_len=seq_len, vocab_size=vocab_size, device=device))
        del model
        num_tokens = sum(count for _, count in losses)
        flops += 2 * source.info.num_language_model_params * num_tokens
        means.append([loss / max(count, 1) for loss, count in losses])
    teacher_means, reference_means = means
    scores = [reference - teacher for teacher, reference in zip(teacher_means, reference_means, strict=True)]
    if not scores:
        raise ConfigError(Problem("dataloader.dataset", "there are no documents", config.dataloader.dataset))
    numbers = kept(scores, keep)
    wanted = set(numbers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _OPENERS[out.suffix](out, "wt", encoding="utf-8") as file:
        for number, text in enumerate(_texts(config)):
            if number in wanted:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    costs = {
        "flops": float(flops),
        "tokens": 2 * num_tokens,  # two models have read them
        "seconds": time.perf_counter() - started,
        "documents": len(scores),
        "kept": len(numbers),
        "lowest_score_kept": min(scores[number] for number in numbers),
        "mean_teacher_nll": sum(teacher_means) / len(scores),
        "mean_reference_nll": sum(reference_means) / len(scores),
        "teacher": sources[0].info.description,
        "reference": sources[1].info.description,
    }
    costs_path(out).write_text(json.dumps(costs, indent=1) + "\n")
    return costs


def _check(config: Any, out: Path, keep: float) -> None:
    from let_plugin.runtime.upstream import DATASETS

    problems = []
    if not 0 < keep < 1:
        problems.append(Problem("--keep", "must be between 0 and 1, a share of the documents", keep))
    if out.exists():
        problems.append(Problem("--out", "is there already; give a new file", str(out)))
    elif out.suffix not in _OPENERS or ".jsonl" not in out.suffixes[-2:]:
        problems.append(Problem("--out", "must end in .jsonl, .jsonl.xz or .jsonl.gz", str(out)))
    dataset = getattr(config.dataloader, "dataset", None)
    if dataset not in DATASETS:
        problems.append(Problem("dataloader", "has no documents of torchtitan's table of datasets", dataset))
    if problems:
        raise ConfigError(problems)


def _check_vocabulary(student_tokenizer: Any, source: Any, option: TeacherConfig, key: str) -> None:
    """Both models must read the student's tokens."""
    from let_plugin.tokens.vocabulary import compare_vocabularies

    if not option.check_vocabulary:
        return
    known = source.vocabulary()
    if not known:
        message = "it has no tokenizer to compare; name its tokenizer_path, or set check_vocabulary = false"
        raise ConfigError(Problem(key, message, option.path or option.spec))
    if difference := compare_vocabularies(student_tokenizer.get_vocab(), known).num_differing:
        message = f"its tokenizer is not the student's: {difference:,} ids differ"
        raise ConfigError(Problem(key, message, option.path or option.spec))


def _texts(config: Any) -> Iterator[str]:
    """The documents, in the order of the corpus."""
    from let_plugin.runtime.upstream import DATASETS

    entry = DATASETS[config.dataloader.dataset]
    for sample in entry.loader(config.dataloader.dataset_path or entry.path):
        yield entry.sample_processor(sample)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m let_plugin.bench.converge.data_selection",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="its documents, and let.teacher")
    parser.add_argument("--reference", required=True, metavar="MODEL", help="path, or a table as [let.teacher] has")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="new file: .jsonl, .jsonl.xz, .jsonl.gz"
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of the documents that is kept (0.5)")
    args, overrides = parser.parse_known_args(argv)

    from let_plugin.config import load as toml_config
    from let_plugin.runtime import data, host

    try:
        runtime = toml_config.read([str(args.config), *overrides]).runtime
        host.set_up(runtime.device)
        data.register()
        config: Any = toml_config.load(args.config, overrides).config
        costs = select(config, parse_model(args.reference, "--reference"), args.out, args.keep)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    print(
        f"wrote {args.out}: {costs['kept']:,} of {costs['documents']:,} documents; mean NLL per token and document: "
        f"teacher {costs['mean_teacher_nll']:.3f}, reference {costs['mean_reference_nll']:.3f}; "
        f"{costs['flops']:.3g} FLOPs, {costs['seconds']:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
