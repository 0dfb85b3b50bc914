"""`let-bench select`: data selection, a baseline that LET is compared with. The teacher chooses what is read.

Each training document of a configuration gets the score

    mean NLL of the reference - mean NLL of the teacher        (over the document's tokens, in nats)

The teacher is `let.teacher`, the reference a smaller or less trained model of the same tokenizer. The documents with
the highest scores are kept, in the order of the corpus (difference sampling of MiniPLM, arXiv 2410.17215).

Shape legend: B batch, L sequence, D documents.
"""

import argparse
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch.nn.utils.rnn import pad_sequence
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools import utils

from let_plugin.config import load as toml_config
from let_plugin.config import plan
from let_plugin.config.errors import ConfigError, Problem, raise_if_any
from let_plugin.preflight.checks import student_tokenizer
from let_plugin.runtime.upstream import DATASETS
from let_plugin.teacher.language_model import row_loss_sums
from let_plugin.teacher.open import open_teacher
from let_plugin.tokens.vocabulary import compare_vocabularies

_BATCH_TOKENS = 2**14  # that go through a model at a time, about


def costs_file(out: str | Path | None) -> Path:
    """What a selection has taken lies beside what it wrote: its `flops`, `tokens` and `seconds`, as JSON."""
    return Path(f"{out}.costs.json")


def run(args: argparse.Namespace, options: Sequence[str]) -> str:
    """Writes the documents that are kept to `--out`, and its `costs_file`; returns a summary.

    ConfigError before any model is loaded, for what is wrong with the files; then for weights that are.
    """
    reference = ["--let.teacher.path", args.reference, "--let.teacher.spec", ""]
    if args.reference.lstrip().startswith("--"):
        try:
            reference = ["--let.teacher.path", "", *shlex.split(args.reference)]
        except ValueError as error:
            raise ConfigError(Problem("--reference", f"not options of let-train: {error}", args.reference)) from error
    common = [*options, "--let.teacher.features", ""]
    config: Any = toml_config.load(args.config, common).config
    second: Any = toml_config.load(args.config, [*common, *reference]).config
    _check(config, args.out)
    tokenizer = student_tokenizer(config)
    teachers = {"let.teacher": config.let.teacher, "--reference": second.let.teacher}
    sources = {key: open_teacher(teacher) for key, teacher in teachers.items()}
    for key, source in sources.items():
        known = source.vocabulary() if teachers[key].check_vocabulary else None
        if known is not None and (not known or compare_vocabularies(tokenizer.get_vocab(), known)):
            message = "its tokenizer is not the student's, or not known: name its tokenizer_path"
            raise ConfigError(Problem(key, message, teachers[key].path))
    started = time.perf_counter()
    sums_D2 = {key: _document_losses(config, tokenizer, source) for key, source in sources.items()}
    num_tokens = int(sums_D2["let.teacher"][:, 1].sum())
    nll_D = {key: sums[:, 0] / sums[:, 1].clamp(min=1) for key, sums in sums_D2.items()}
    # Of equal scores the first ones.
    order_D = torch.argsort(nll_D["--reference"] - nll_D["let.teacher"], descending=True, stable=True)
    kept = set(order_D[: max(1, int(plan.part(args.keep, len(order_D))))].tolist())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with fsspec.open(str(args.out), "wt", encoding="utf-8", compression="infer") as file:
        for number, text in enumerate(_texts(config)):
            if number in kept:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    flops = 2.0 * num_tokens * sum(source.info.num_language_model_params for source in sources.values())
    seconds = time.perf_counter() - started
    costs = {"flops": flops, "tokens": num_tokens * len(sources), "seconds": seconds}  # tokens: each model reads them
    costs_file(args.out).write_text(json.dumps(costs, indent=1) + "\n")
    means = ", ".join(f"{key} {nll.mean():.3f}" for key, nll in nll_D.items())
    written = f"wrote {args.out}: {len(kept):,} of {len(order_D):,} documents"
    return f"{written}; mean NLL per token and document: {means}; {flops:.3g} FLOPs, {seconds:.0f} s"


def _document_losses(config: Any, tokenizer: Any, source: Any) -> torch.Tensor:
    """Sum of the cross-entropy in nats, and number of tokens predicted, of each document: [D, 2], fp64.

    A document longer than the sequence is cut, as torchtitan's data loader cuts it: each part is predicted from itself
    alone, and the first token of the document is not predicted.
    """
    device = torch.device(utils.device_type)
    seq_len = min(config.training.seq_len, source.info.max_seq_len or config.training.seq_len)
    model = source.language_model(dtype=plan.teacher_dtype(config), device=device, seq_len=seq_len)
    documents = (tokenizer.encode(text, add_bos=True, add_eos=True) for text in _texts(config))
    parts = (
        (number, torch.tensor(document[start : start + seq_len + 1], dtype=torch.int64))
        for number, document in enumerate(documents)
        for start in range(0, max(len(document) - 1, 1), seq_len)
    )
    numbers: list[int] = []  # of the documents that the parts belong to
    sums: list[torch.Tensor] = []
    while batch := list(islice(parts, max(1, _BATCH_TOKENS // seq_len))):
        # Causal: what stands behind a row's end changes nothing before it.
        tokens_BL = pad_sequence([ids[:-1] for _, ids in batch], batch_first=True).to(device)
        labels_BL = pad_sequence([ids[1:] for _, ids in batch], batch_first=True, padding_value=IGNORE_INDEX).to(device)
        sums_B2 = torch.zeros(len(batch), 2, dtype=torch.float64)
        if tokens_BL.shape[1] > 0:
            sums_B2 = row_loss_sums(model, tokens_BL, None, labels_BL, vocab_size=source.info.vocab_size).cpu()
        numbers += [number for number, _ in batch]
        sums.append(sums_B2)
    if not sums:
        raise ConfigError(Problem("dataloader.dataset", "there are no documents", config.dataloader.dataset))
    return torch.zeros(numbers[-1] + 1, 2, dtype=torch.float64).index_add(0, torch.tensor(numbers), torch.cat(sums))


def _check(config: Any, out: Path) -> None:
    problems = []
    if out.exists():
        problems.append(Problem("--out", "is there already; give a new file", str(out)))
    elif not out.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        problems.append(Problem("--out", "must end in .jsonl, .jsonl.xz or .jsonl.gz", str(out)))
    dataset = getattr(config.dataloader, "dataset", None)
    if dataset not in DATASETS:
        problems.append(Problem("dataloader", "has no documents of torchtitan's table of datasets", dataset))
    raise_if_any(problems)


def _texts(config: Any) -> Iterator[str]:
    """The documents, in the order of the corpus."""
    entry = DATASETS[config.dataloader.dataset]
    for sample in entry.loader(config.dataloader.dataset_path or entry.path):
        yield entry.sample_processor(sample)
