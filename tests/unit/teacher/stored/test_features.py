"""Stored states are read as they were written, by the runs that they are for, and by no other."""

import functools
import json
import re
import shutil

import pytest
import torch

from let_plugin.alignment.tap import TARGET_KWARG
from let_plugin.config import PairConfig, TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.guidance.guidance import Guidance
from let_plugin.preflight import checks as preflight
from let_plugin.runtime.batch_extras import take_extras
from let_plugin.teacher.open import open_source
from let_plugin.teacher.stored.features import Features, StoredStates
from tests.support import exports
from tests.support.fields import set_all
from tests.support.problems import problem_of, problems_of


@pytest.fixture
def folder(config, parallel_dims, tmp_path):
    """An export of the two steps that the configuration aligns; the configuration then reads it."""
    path = tmp_path / "features"
    config.let.teacher.dtype = "bfloat16"  # stored as they are
    exports.run(config, "--out", path)
    config.let.teacher = TeacherConfig(features=str(path), dtype="bfloat16")
    return path


problems = functools.partial(problems_of, preflight.run)


def test_a_run_that_it_is_for_is_reported(config, folder):
    report = preflight.run(config)
    assert f"states     {folder}: bfloat16, 64 bytes per token, 0.0 MiB per local batch" in report
    assert "overhead   + 0.0% FLOPs while active: the states are read, no teacher runs" in report
    assert "memory     + 0.1 MiB per rank while active: target 0.0 MiB, gradient 0.0 MiB, encoded states 0.0" in report


def test_the_target_is_the_teachers_and_there_is_none(config, folder, trainer, tiny_teacher):
    stored = Guidance(trainer, trainer.terms, 0)
    assert stored.teacher is None
    stored.start_step()
    assert stored.metrics()["let/teacher_tokens_per_second"] == 0  # no time has passed in a teacher
    batches = iter(trainer.dataloader)  # with what the guidance has told it to add
    config.let.teacher = TeacherConfig(spec="tiny_teacher", path=str(tiny_teacher[0]), dtype="bfloat16")
    online = Guidance(trainer, trainer.terms, 0)
    assert Features(str(folder)).info == open_source(config.let.teacher).info
    for _ in range(2):
        input_dict, labels_BL = next(batches)
        extras = take_extras(input_dict)
        assert set(extras) == {"1.values"}
        assert torch.equal(
            stored.targets(input_dict, labels_BL, extras)[TARGET_KWARG],
            online.targets(input_dict, labels_BL)[TARGET_KWARG],
        )
    # The third step's rows were not exported: an error, but only for whom they are to be aligned.
    input_dict, labels_BL = next(batches)
    extras = take_extras(input_dict)
    with pytest.raises(ConfigError, match=r"let.teacher.features = .*: a row of the training data is not stored there"):
        stored.targets(input_dict, labels_BL, extras)[TARGET_KWARG]


def test_only_the_layers_that_are_asked_for_are_read(config, trainer, tmp_path):
    config.let.pairs = [PairConfig(student=0, teacher=0), PairConfig(student=1, teacher=1)]
    exports.run(config, "--out", tmp_path / "features")
    features = Features(str(tmp_path / "features"))
    alone, both = (StoredStates(features, layers, dtype=torch.float32) for layers in ([1], [1, 0]))
    batch, labels_BL = next(iter(trainer.dataloader))
    assert set(alone.make_extras(batch, labels_BL)) == {"1.values"}
    of_both, of_one = (provider.states(provider.make_extras(batch, labels_BL)) for provider in (both, alone))
    assert of_both.states_BLE.shape == (4, 64, 64) and of_both.states_BLE.dtype == torch.float32
    assert torch.equal(of_both.states_BLE[..., :32], of_one.states_BLE)
    assert of_both.num_tokens == 0


def test_tokens_that_were_stored_without_a_state_have_none(folder):
    """As those of another tokenizer's; with the same tokenizer there are none."""
    values = torch.ones(2, 3, 32)
    values[0, 1] = 0
    features = Features(str(folder))
    provider = StoredStates(features, [1], dtype=torch.float32)
    assert provider.states({"1.values": values}).known_BL is None
    features.is_partial = True
    assert provider.states({"1.values": values}).known_BL.tolist() == [[True, False, True], [True, True, True]]


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"training__seq_len": 32}, "training.seq_len", "= 32: .* was made with 64"),
        ({"dataloader__ignore_every": 5}, "dataloader.ignore_every", "= 5: .* was made with 7"),
        ({"dataloader__dataset": "let_demo_test"}, "dataloader.dataset", "was made with 'let_demo_train'"),
        ({"let__teacher__dtype": "float32"}, "let.teacher.dtype", "'float32': .* was made with 'bfloat16'"),
        ({"let__teacher__final_norm": False}, "let.teacher.final_norm", "was made with True"),
        ({"let__layer_mapping": "M2E"}, "let.teacher.features", r"teacher's layers \[1\], not of \[0\]"),
        ({"let__stop_step": 3}, "let.teacher.features", r"2 steps; the alignment lasts 3; set let.stop_step = 2"),
        ({"training__global_batch_size": 8}, "let.teacher.features", r"1 steps; the alignment lasts 2; set"),
        ({"let__teacher__spec": "demo_teacher"}, "let.teacher.spec", "not the teacher whose states are in"),
        ({"let__teacher__path": "org/other"}, "let.teacher.path", "org/other@unknown"),
    ],
)
def test_a_run_that_it_is_not_for_is_refused(config, folder, changes, key, message):
    set_all(config, **changes)
    assert re.search(message, str(problems(config)[key]))


def test_other_degrees_and_tokenizers_are_refused_with_all_else_at_once(config, folder, tmp_path):
    tokenizer = shutil.copytree(config.hf_assets_path, tmp_path / "tokenizer") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    set_all(config, hf_assets_path=str(tokenizer.parent), let__stop_step=3)
    found = problems(config, world_size=2)
    assert set(found) == {"hf_assets_path", "parallelism", "let.teacher.features"}
    assert "not the tokenizer" in found["hf_assets_path"].message
    assert "export again with --parallelism.data_parallel_shard_degree 2" in found["parallelism"].message


def test_what_changes_nothing_is_not_refused(config, folder, tiny_teacher):
    set_all(config, let__stop_step=1, dataloader__num_workers=2, let__weight=2.0, debug__seed=5)
    set_all(config, training__local_batch_size=2, training__global_batch_size=4)
    set_all(config, let__teacher__spec="tiny_teacher", let__teacher__path=str(tiny_teacher[0]))
    preflight.run(config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no manifest.json there"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 99}'), "in format 99, this version reads 2"),
        (lambda folder: change(folder, result=None), "is not complete; run the same let-teacher export again"),
        (lambda folder: change(folder, result={}), "lacks 'num_shards'"),
        (lambda folder: next(folder.glob("rows-*")).unlink(), "there are 0 files of rows instead of 1"),
    ],
)
def test_a_folder_that_is_not_a_whole_export_is_one_clear_error(config, folder, damage, message):
    damage(folder)
    problem = problem_of(preflight.run, config)
    assert problem.key == "let.teacher.features" and message in problem.message


def change(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
