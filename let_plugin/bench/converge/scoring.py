"""Scores of documents: how well a language model predicts each, and which of them are kept.

Shape legend: B batch, L sequence.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.config.plan import count_of
from let_plugin.teacher.base import LanguageModel
from let_plugin.teacher.language_model import row_loss_sums

_BATCH_TOKENS = 2**14  # that go through a model at a time, about


def document_losses(
    model: LanguageModel,
    documents: Iterable[Sequence[int]],
    *,
    seq_len: int,
    vocab_size: int,
    device: torch.device,
) -> Iterator[tuple[float, int]]:
    """(sum of the cross-entropy in nats, number of tokens predicted) of each document, in order.

    A document longer than `seq_len` is cut, as torchtitan's data loader cuts it: each part is predicted from itself
    alone, and the first token of the document is predicted from nothing, hence not at all.

    Args:
        model: On `device`.
        documents: Token ids.
        seq_len: Of a row.
        vocab_size: Of the model.
        device: Where it is.
    """
    max_rows = max(1, _BATCH_TOKENS // seq_len)
    rows: list[tuple[Sequence[int], Sequence[int]]] = []
    num_rows: list[int] = []  # of each document

    def flush() -> Iterator[tuple[float, int]]:
        length = max((len(tokens) for tokens, _ in rows), default=0)
        # Causal: what stands behind a row's end changes nothing before it.
        tokens_BL = torch.zeros(len(rows), length, dtype=torch.int64)
        labels_BL = torch.full((len(rows), length), IGNORE_INDEX)
        for i, (tokens, labels) in enumerate(rows):
            tokens_BL[i, : len(tokens)] = torch.tensor(tokens)
            labels_BL[i, : len(labels)] = torch.tensor(labels)
        sums_B2 = torch.zeros(len(rows), 2, dtype=torch.float64)
        for start in range(0, len(rows), max_rows):
            part = slice(start, start + max_rows)
            given = (tokens_BL[part].to(device), None, labels_BL[part].to(device))
            sums_B2[part] = row_loss_sums(model, *given, vocab_size=vocab_size).cpu()
        first = 0
        for count in num_rows:
            loss, num_tokens = sums_B2[first : first + count].sum(dim=0).tolist()
            yield loss, int(num_tokens)
            first += count
        rows.clear()
        num_rows.clear()

    for document in documents:
        inputs, labels = document[:-1], document[1:]
        cuts = range(0, len(inputs), seq_len)
        rows += [(inputs[cut : cut + seq_len], labels[cut : cut + seq_len]) for cut in cuts]
        num_rows.append(len(cuts))
        if len(rows) >= max_rows:
            yield from flush()
    yield from flush()


def kept(scores: Sequence[float], keep: float) -> list[int]:
    """Numbers of the documents with the highest scores, a share `keep` of them, at least one, in order.

    Of equal scores the first are kept.
    """
    count = max(1, count_of(keep, len(scores)))
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
