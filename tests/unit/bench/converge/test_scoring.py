"""The loss of each document, against a document at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.bench.converge import scoring
from let_plugin.bench.converge.scoring import document_losses, kept

CPU = torch.device("cpu")
VOCAB_SIZE = 17
TABLE_VV = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def causal_model(tokens_BL, positions_BL):
    """Logits that depend on all tokens of the row up to each, and on their number."""
    counts_L = torch.arange(1, tokens_BL.shape[1] + 1)
    return TABLE_VV[tokens_BL].cumsum(dim=1) / counts_L[:, None]


@pytest.mark.parametrize("batch_tokens", [1, 24, 2**14])
def test_each_document_by_itself(monkeypatch, batch_tokens):
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", batch_tokens)
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 9, 8, 25, 2, 17]
    documents = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    found = list(document_losses(causal_model, documents, seq_len=8, vocab_size=VOCAB_SIZE, device=CPU))
    assert [count for _, count in found] == [n - 1 for n in lengths]
    for document, (loss, _) in zip(documents, found, strict=True):
        expected = 0.0
        for start in range(0, len(document) - 1, 8):  # each part predicted from itself alone
            part = torch.tensor(document[start : start + 9])
            logits_LV = causal_model(part[None, :-1], None)[0]
            expected += F.cross_entropy(logits_LV, part[1:], reduction="sum").item()
        assert loss == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.05, 0.95))
def test_the_best_are_kept_in_the_order_of_the_corpus(scores, keep):
    numbers = kept(scores, keep)
    assert numbers == sorted(set(numbers)) and len(numbers) == max(1, int(keep * len(scores)))
    left = set(range(len(scores))) - set(numbers)
    assert all(scores[i] >= scores[j] for i in numbers for j in left)


def test_of_equal_scores_the_first_are_kept():
    assert kept([1.0, 2.0, 2.0, 2.0, 0.0, 3.0], 0.5) == [1, 2, 5]
