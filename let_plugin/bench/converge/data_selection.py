"""Selection of documents, a baseline that LET is compared with: the teacher's knowledge goes into what is read.

`python -m let_plugin.bench.converge.data_selection CONFIG.toml --reference MODEL --out FILE.jsonl.xz --keep 0.5` reads
the training documents of CONFIG.toml and scores each by

    mean NLL of the reference - mean NLL of the teacher        (over the document's tokens, in nats)

The teacher is `let.teacher`, the reference a smaller or less trained model of the same tokenizer. The documents with
the highest scores are kept, in the order of the corpus (difference sampling of MiniPLM, arXiv 2410.17215). A run reads
them by `dataloader.dataset = "text_files"` and `dataset_path = "FILE.jsonl.xz"`. FILE.jsonl.xz.costs.json says what the
selection took.

Shape legend: B batch, L sequence.
"""

import argparse
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import fsspec

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError, Problem, exit_with

# torchtitan is imported in the functions: the command line sets the host up first.

_PROGRAM = "data_selection"
_BATCH_TOKENS = 2**14  # that go through a model at a time, about


def read_costs(out: Path) -> dict[str, Any]:
    """`flops`, `tokens` and `seconds` of the selection that made a file. ConfigError if it is not from here."""
    try:
        content = json.loads(Path(f"{out}.costs.json").read_text())
        return {name: content[name] for name in ("flops", "tokens", "seconds")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"no selection of let_plugin.bench.converge.data_selection: its costs cannot be read ({error})"
        raise ConfigError(Problem("--selected-text", message, str(out))) from error


def select(config: Any, reference: TeacherConfig, out: Path, keep: float) -> dict[str, Any]:
    """Scores the documents, writes those that are kept to `out`, and what it took beside it.

    ConfigError before any model is loaded, for what is wrong with the files; then for weights that are.
    """
    from let_plugin.teacher.open import open_teacher

    _check(config, out, keep)
    tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    models = {"let.teacher": dataclasses.replace(config.let.teacher, features=""), "--reference": reference}
    sources = {key: open_teacher(model) for key, model in models.items()}
    for key, source in sources.items():
        _check_vocabulary(tokenizer, source, models[key], key)
    started = time.perf_counter()
    means: list[list[float]] = []  # of the teacher, then of the reference
    flops = num_tokens = 0
    for source in sources.values():
        losses = document_losses(config, tokenizer, source)
        num_read = sum(count for _, count in losses)
        num_tokens += num_read
        flops += 2 * source.info.num_language_model_params * num_read
        means.append([loss / max(count, 1) for loss, count in losses])
    scores = [reference - teacher for teacher, reference in zip(*means, strict=True)]
    if not scores:
        raise ConfigError(Problem("dataloader.dataset", "there are no documents", config.dataloader.dataset))
    numbers = kept(scores, keep)
    out.parent.mkdir(parents=True, exist_ok=True)
    with fsspec.open(str(out), "wt", encoding="utf-8", compression="infer") as file:
        for number, text in enumerate(_texts(config)):
            if number in numbers:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    costs = {
        "flops": float(flops),
        "tokens": num_tokens,  # that two models have read
        "seconds": time.perf_counter() - started,
        "documents": len(scores),
        "kept": len(numbers),
        "mean_nll": {key: fmean(own) for key, own in zip(sources, means, strict=True)},
    }
    Path(f"{out}.costs.json").write_text(json.dumps(costs, indent=1) + "\n")
    return costs


def document_losses(config: Any, tokenizer: Any, source: Any) -> list[tuple[float, int]]:
    """(sum of the cross-entropy in nats, number of tokens predicted) of each document, under a model that is loaded.

    A document longer than the sequence is cut, as torchtitan's data loader cuts it: each part is predicted from itself
    alone, and the first token of the document is not predicted.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torchtitan.components.loss import IGNORE_INDEX
    from torchtitan.tools import utils

    from let_plugin.config import plan
    from let_plugin.teacher.language_model import row_loss_sums

    device = torch.device(utils.device_type)
    seq_len = min(config.training.seq_len, source.info.max_seq_len or config.training.seq_len)
    model = source.language_model(dtype=plan.teacher_dtype(config), device=device, seq_len=seq_len)
    documents = (tokenizer.encode(text, add_bos=True, add_eos=True) for text in _texts(config))
    parts = (
        (number, torch.tensor(document[start : start + seq_len + 1], dtype=torch.int64))
        for number, document in enumerate(documents)
        for start in range(0, max(len(document) - 1, 1), seq_len)
    )
    sums: list[list[float]] = []
    while batch := list(islice(parts, max(1, _BATCH_TOKENS // seq_len))):
        # Causal: what stands behind a row's end changes nothing before it.
        tokens_BL = pad_sequence([ids[:-1] for _, ids in batch], batch_first=True).to(device)
        labels_BL = pad_sequence([ids[1:] for _, ids in batch], batch_first=True, padding_value=IGNORE_INDEX).to(device)
        sums_B2 = torch.zeros(len(batch), 2)
        if tokens_BL.shape[1] > 0:
            sums_B2 = row_loss_sums(model, tokens_BL, None, labels_BL, vocab_size=source.info.vocab_size)
        for (number, _), (loss, count) in zip(batch, sums_B2.tolist(), strict=True):
            before = sums.pop() if number < len(sums) else [0.0, 0.0]
            sums.append([before[0] + loss, before[1] + count])
    return [(loss, int(count)) for loss, count in sums]


def kept(scores: Sequence[float], keep: float) -> set[int]:
    """Numbers of the documents with the highest scores: a share `keep`, at least one; of equal ones the first."""
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[: max(1, int(keep * len(scores)))])


def _check(config: Any, out: Path, keep: float) -> None:
    from let_plugin.runtime.upstream import DATASETS

    problems = []
    if not 0 < keep < 1:
        problems.append(Problem("--keep", "must be between 0 and 1, a share of the documents", keep))
    if out.exists():
        problems.append(Problem("--out", "is there already; give a new file", str(out)))
    elif not out.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        problems.append(Problem("--out", "must end in .jsonl, .jsonl.xz or .jsonl.gz", str(out)))
    dataset = getattr(config.dataloader, "dataset", None)
    if dataset not in DATASETS:
        problems.append(Problem("dataloader", "has no documents of torchtitan's table of datasets", dataset))
    if problems:
        raise ConfigError(problems)


def _check_vocabulary(tokenizer: Any, source: Any, model: TeacherConfig, key: str) -> None:
    """Both models must read the student's tokens."""
    from let_plugin.tokens.vocabulary import compare_vocabularies

    known = source.vocabulary() if model.check_vocabulary else None
    if known is not None and (not known or compare_vocabularies(tokenizer.get_vocab(), known)):
        message = "its tokenizer is not the student's"
        if not known:
            message = "it has no tokenizer to compare; name its tokenizer_path, or set check_vocabulary = false"
        raise ConfigError(Problem(key, message, model.path or model.spec))


def _texts(config: Any) -> Iterator[str]:
    """The documents, in the order of the corpus."""
    from let_plugin.runtime.upstream import DATASETS

    entry = DATASETS[config.dataloader.dataset]
    for sample in entry.loader(config.dataloader.dataset_path or entry.path):
        yield entry.sample_processor(sample)


def main(argv: list[str] | None = None) -> None:
    """The command line; SystemExit with code 2 for bad input."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="its documents, and let.teacher")
    help_ = "path, or options of let-train ('--let.teacher.spec x --let.teacher.path y'), for the reference"
    parser.add_argument("--reference", required=True, metavar="MODEL", help=help_)
    help_ = "new file: .jsonl, .jsonl.xz, .jsonl.gz"
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=help_)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the documents that is kept (0.5)")
    args, options = parser.parse_known_args(argv)

    from let_plugin.config import load as toml_config
    from let_plugin.runtime import data, host

    own = ["--let.teacher.path", args.reference, "--let.teacher.spec", ""]
    if args.reference.lstrip().startswith("--"):
        own = ["--let.teacher.path", "", *shlex.split(args.reference)]
    try:
        host.set_up(toml_config.read([str(args.config), *options]).runtime.device)
        data.register()
        config: Any = toml_config.load(args.config, options).config
        reference: Any = toml_config.load(args.config, [*options, "--let.teacher.features", "", *own]).config
        costs = select(config, reference.let.teacher, args.out, args.keep)
    except ConfigError as error:
        exit_with(error, _PROGRAM)
    print(
        f"wrote {args.out}: {costs['kept']:,} of {costs['documents']:,} documents; mean NLL per token and document: "
        f"{', '.join(f'{key} {nll:.3f}' for key, nll in costs['mean_nll'].items())}; "
        f"{costs['flops']:.3g} FLOPs, {costs['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
