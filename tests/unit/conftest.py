import functools
import logging

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torchtitan.components.loss import IGNORE_INDEX

from let_plugin.config import LetConfig, TeacherConfig
from let_plugin.demo import TOKENIZER
from let_plugin.runtime import data, host
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.titan.source import TEACHER_SPECS, register_teacher_spec
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny
from tests.support.fork_server import end_at_once

end_at_once()


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test counts the compilations of another: torch compiles the same code a limited number of times."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def same_log_level():
    """What a command line says is not to be heard of, others are: torchtitan's logger is the root."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(scope="module")
def parallel_dims():
    """torchtitan's meshes of one process, with the process group (gloo) that they stand on."""
    from torchtitan.distributed import ParallelDims

    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{get_free_port()}", rank=0, world_size=1)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    dims.build_mesh()
    yield dims
    torch.distributed.destroy_process_group()


@pytest.fixture
def config(tmp_path, tiny_teacher, monkeypatch):
    """The tiny student with the tiny teacher; nothing is wrong with it."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    data.register()
    config = with_let(tiny())
    config.dump_folder = str(tmp_path / "out")
    teacher = TeacherConfig(spec="tiny_teacher", path=str(tiny_teacher[0]), tokenizer_path=TOKENIZER)
    config.let = LetConfig(enable=True, weight=0.5, stop_step=2, teacher=teacher)
    return config


@pytest.fixture
def trainer(config, parallel_dims):
    """torchtitan's trainer with LET, of the configuration as it is by then; the process group is there already."""
    from torchtitan.observability import structured_logger

    structured_logger.init_structured_logger(source="training", output_dir=config.dump_folder, enable=False)
    host.adapt_model_spec(config.model_spec)
    trainer = config.build()
    yield trainer
    trainer.close()


@pytest.fixture
def batch():
    """(input_dict, labels) of two rows of 64 tokens; every fifth label does not count."""
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(4096, (2, 64), generator=generator)
    labels_BL = tokens_BL.roll(-1, dims=1)
    labels_BL[:, ::5] = IGNORE_INDEX
    return {"input": tokens_BL, "positions": torch.arange(64).repeat(2, 1)}, labels_BL


@pytest.fixture
def short_teacher():
    """Name of a teacher spec like the tiny one, for 32 tokens."""
    yield from registered("short_teacher", num_layers=2, max_seq_len=32)


@pytest.fixture
def padded_teacher():
    """Name of a teacher spec like the tiny one, with a few rows more than there are tokens."""
    yield from registered("padded_teacher", num_layers=2, vocab_size=4103)


def registered(name, **shape):
    shape = {"dim": 32, "num_heads": 2, "hidden_dim": 64, "vocab_size": 4096, **shape}
    make_spec = functools.partial(llama_spec, name, **shape)
    register_teacher_spec(name, make_spec)
    yield name
    del TEACHER_SPECS._entries[name]
