"""Random teachers are as large as they were asked to be."""

import pytest

from let_plugin.bench.throughput import suite
from let_plugin.preflight.report import Student
from let_plugin.runtime.models import llama_spec
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny


def num_params(dim, num_layers, hidden_dim, **_):
    """Of the trunk, embeddings not counted."""
    return num_layers * (4 * dim * dim + 3 * dim * hidden_dim + 2 * dim) + dim


@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 256, "num_layers": 6, "num_heads": 4, "hidden_dim": 768},  # the demo's
        {"dim": 4096, "num_layers": 32, "num_heads": 32, "hidden_dim": 11008},  # 7B
    ],
)
def test_shares(shape):
    config = with_let(tiny())
    config.model_spec = llama_spec("student", vocab_size=4096, **shape)
    each = Student(config)
    for share in (0.02, 0.1, 1.0):
        size = suite.teacher_shape(each, share)
        assert num_params(**size) / each.num_matmul_params == pytest.approx(share, rel=0.05)
        head_width, rest = divmod(size["dim"], size["num_heads"])
        assert rest == 0 and head_width % 16 == 0
        # Shaped like the student, as far as so few parameters can be.
        assert 0.4 < (size["dim"] / size["num_layers"]) / (each.width / each.num_blocks) < 2.5
