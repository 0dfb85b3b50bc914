"""Every mistake that is found before anything is built."""

import json
import math
import os
import re
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.config import AdaptiveStopConfig, LetConfig, PairConfig, ProjectorConfig, TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.preflight import checks as preflight
from let_plugin.runtime.models import llama_spec
from let_plugin.tokens.tiktoken import TikTokenTokenizer
from tests.support.fields import set_all
from tests.support.rank_files import EOS, GPT2_PATTERN, write_demo


def problems_of(config):
    """Dotted key -> problem."""
    with pytest.raises(ConfigError) as info:
        preflight.run(config)
    problems = {problem.key: problem for problem in info.value.problems}
    assert len(problems) == len(info.value.problems), "a field is complained about twice"
    return problems


def problem_of(config, key):
    """The one problem that there must be."""
    problems = problems_of(config)
    assert list(problems) == [key]
    return problems[key]


def test_nothing_is_written_and_the_configuration_stays_as_it_is(config, tmp_path):
    before = repr(config)
    preflight.run(config)
    assert repr(config) == before
    assert not (tmp_path / "out").exists()


def test_all_mistakes_at_once(config, tmp_path):
    set_all(config, training__steps=0, let__weight=-1.0, let__schedule="linaer", dump_folder=__file__)
    set_all(config, dataloader__dataset="let_demo_trian", hf_assets_path=str(tmp_path / "none"))
    set_all(config, let__teacher__path=str(tmp_path / "absent"))
    assert sorted(problems_of(config)) == [
        "dataloader.dataset",
        "dump_folder",
        "hf_assets_path",
        "let.schedule",
        "let.stop_step",  # 2 of 0 steps
        "let.teacher.path",
        "let.weight",
        "training.steps",
    ]


@pytest.mark.parametrize(
    ("key", "value", "minimum"),
    [
        ("training.local_batch_size", 0, 1),
        ("training.seq_len", -5, 1),
        ("training.max_norm", -0.5, 0),
        ("training.max_norm", math.nan, 0),
        ("training.gc_freq", 0, 1),
        ("metrics.log_freq", 0, 1),
        ("validator.freq", 0, 1),
        ("lr_scheduler.warmup_steps", -1, 0),
        ("let.weight", -0.1, 0),
        ("let.weight", math.nan, 0),
        ("let.weight", math.inf, 0),
        ("let.stop_fraction", math.nan, 0),
    ],
)
def test_numbers_that_make_no_sense(config, key, value, minimum):
    set_all(config, **{key.replace(".", "__"): value})
    problem = problem_of(config, key)
    assert problem.value is value
    assert f"at least {minimum}" in problem.message


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(config, steps):
    config.training.steps = steps
    assert problems_of(config)["training.steps"].value == steps


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_weights_that_make_sense(config, weight):
    config.let.weight = weight
    assert f"{weight:g} at step 0" in preflight.run(config)


@pytest.mark.parametrize("key", ["dataloader", "validator.dataloader"])
def test_unknown_dataset(config, key):
    set_all(config, validator__enable=True)
    set_all(config, **{f"{key.replace('.', '__')}__dataset": "let_demo_trian"})
    problem = problem_of(config, f"{key}.dataset")
    assert problem.value == "let_demo_trian"
    assert "did you mean 'let_demo_train'?" in problem.message


def test_the_dataset_of_a_validator_that_is_off_does_not_matter(config):
    set_all(config, validator__enable=False, validator__dataloader__dataset="nonsense")
    preflight.run(config)


@pytest.mark.parametrize("path", [None, "absent", "empty"])
def test_text_files_that_are_not_there(config, tmp_path, path):
    (tmp_path / "empty").mkdir()
    path = path and str(tmp_path / path)
    set_all(config, dataloader__dataset="text_files", dataloader__dataset_path=path)
    problem = problem_of(config, "dataloader.dataset_path")
    assert problem.value == (path or "")
    assert "give a file, a folder or a glob pattern" in problem.message


def test_text_files_that_are_there(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    set_all(config, dataloader__dataset="text_files", dataloader__dataset_path=str(tmp_path / "*.jsonl"))
    preflight.run(config)


@pytest.mark.parametrize(("world_size", "global_batch_size"), [(1, 6), (1, 0), (2, 4), (2, 12)])
def test_global_batch_size(config, monkeypatch, world_size, global_batch_size):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config.training.global_batch_size = global_batch_size
    problem = problem_of(config, "training.global_batch_size")
    assert problem.value == global_batch_size
    assert f"the data-parallel degree, {4 * world_size};" in problem.message


@pytest.mark.parametrize(("world_size", "global_batch_size"), [(1, -1), (1, 4), (1, 12), (2, 8), (2, 16)])
def test_global_batch_sizes_that_fit(config, monkeypatch, world_size, global_batch_size):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config.training.global_batch_size = global_batch_size
    preflight.run(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such folder"), ("", "the tokenizer cannot be loaded"), ("{", "the tokenizer cannot be loaded")],
    ids=["no folder", "no tokenizer", "damaged"],
)
def test_a_tokenizer_that_cannot_be_loaded(config, tmp_path, content, message):
    folder = tmp_path / "assets"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "tokenizer.json").write_text(content)
    config.hf_assets_path = str(folder)
    assert message in problem_of(config, "hf_assets_path").message


def test_tokenizer_with_more_ids_than_the_model_has_embeddings(config):
    config.model_spec = llama_spec("small", dim=48, num_layers=4, num_heads=2, hidden_dim=96, vocab_size=4095)
    problem = problem_of(config, "hf_assets_path")
    assert "ids up to 4095, the model only 4095 embeddings" in problem.message


@pytest.mark.parametrize(("path", "message"), [("absent", "no such folder"), ("", "set it to the folder")])
def test_teacher_that_is_not_there(config, tmp_path, path, message):
    config.let.teacher.path = path and str(tmp_path / path)
    problem = problem_of(config, "let.teacher.path")
    assert message in problem.message
    assert problem.value == config.let.teacher.path


def test_no_teacher_at_all(config):
    config.let.teacher = TeacherConfig()
    assert "no teacher is given" in problem_of(config, "let.teacher.path").message


@pytest.fixture
def swapped(tmp_path):
    """(folder of the demo's tokenizer with two tokens swapped, their ids)."""
    with open(os.path.join(TOKENIZER, "tokenizer.json")) as file:
        content = json.load(file)
    vocabulary = content["model"]["vocab"]
    one, other = (token for token in vocabulary if vocabulary[token] in (100, 200))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("degree", "changes", "message"),
    [
        (3, {}, "2 heads do not divide by parallelism.tensor_parallel_degree = 3"),
        (1, {"let__teacher__spec": "transformers", "let__teacher__path": TEACHER}, "transformers runs this teacher"),
    ],
)
def test_a_teacher_that_cannot_be_cut(config, monkeypatch, degree, changes, message):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    monkeypatch.setenv("WORLD_SIZE", str(degree))
    set_all(config, let__teacher__tensor_parallel=True, parallelism__tensor_parallel_degree=degree, **changes)
    config.model_spec = llama_spec("student", dim=48, hidden_dim=96, vocab_size=4096, num_layers=4, num_heads=6)
    problem = problem_of(config, "let.teacher.tensor_parallel")
    assert message in problem.message and "leave this off" in problem.message
    config.let.teacher.tensor_parallel = False
    preflight.run(config)


def test_a_teacher_that_can_be_cut(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    set_all(config, let__teacher__tensor_parallel=True, parallelism__tensor_parallel_degree=2)
    preflight.run(config)


def test_vocabulary_mismatch(config, swapped):
    config.let.teacher.tokenizer_path = swapped
    message = problem_of(config, "let.teacher.path").message
    assert "2 of 4,096 ids differ" in message
    assert re.search(r"id 100: .* \(student\), .* \(teacher\); id 200: ", message)


def test_vocabulary_mismatch_that_the_user_wants(config, swapped):
    set_all(config, let__teacher__tokenizer_path=swapped, let__teacher__check_vocabulary=False)
    assert "not compared" in preflight.run(config)


def test_a_student_with_a_tiktoken_tokenizer(config, tmp_path):
    write_demo(tmp_path)
    config.hf_assets_path = str(tmp_path)
    config.let.teacher.tokenizer_path = TOKENIZER
    config.tokenizer = TikTokenTokenizer.Config(pattern=GPT2_PATTERN, special_tokens={EOS: 0}, eos_token=EOS)
    assert "agree token by token" in preflight.run(config)
    config.tokenizer = TikTokenTokenizer.Config(pattern=GPT2_PATTERN, special_tokens={"<eos>": 0}, eos_token="<eos>")
    assert "id 0: '<eos>' (student), '<|endoftext|>' (teacher)" in problem_of(config, "let.teacher.path").message


def test_a_tiktoken_tokenizer_says_what_is_wrong_with_it(config, tmp_path):
    config.hf_assets_path = str(tmp_path)
    config.tokenizer = TikTokenTokenizer.Config(pattern=GPT2_PATTERN, special_tokens={EOS: 0}, eos_token=EOS)
    assert "no tiktoken rank file there" in problem_of(config, "hf_assets_path").message
    write_demo(tmp_path).write_text("hello\n")
    assert "'hello' is not" in problem_of(config, "hf_assets_path").message
    write_demo(tmp_path)
    config.tokenizer.special_tokens = {EOS: 0, "<|far|>": 5000}
    assert "ids up to 5000, the model only 4096" in problem_of(config, "hf_assets_path").message


def test_teacher_without_a_tokenizer(config):
    config.let.teacher.tokenizer_path = ""  # the folder with the weights has none
    message = problem_of(config, "let.teacher.tokenizer_path").message
    assert "the teacher's tokenizer has no vocabulary" in message and "check_vocabulary = false" in message
    config.let.teacher.check_vocabulary = False
    preflight.run(config)


def test_a_load_balancer_that_cuts_each_batch_differently_is_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    set_all(config, parallelism__context_parallel_degree=2, parallelism__context_parallel_load_balancer="ptrr")
    assert '"headtail"' in problem_of(config, "parallelism.context_parallel_load_balancer").message
    config.let = LetConfig(enable=False)
    preflight.run(config)  # plain torchtitan has it


@pytest.mark.parametrize(
    ("degrees", "refused"),
    [
        ({"parallelism__context_parallel_degree": 2}, True),
        ({"parallelism__tensor_parallel_degree": 2}, True),
        ({"parallelism__tensor_parallel_degree": 2, "parallelism__enable_sequence_parallel": False}, False),
        ({"parallelism__data_parallel_shard_degree": 2}, False),
    ],
)
@pytest.mark.parametrize("loss", ["relational"])
def test_a_loss_that_compares_tokens_needs_whole_sequences(config, monkeypatch, degrees, refused, loss):
    monkeypatch.setenv("WORLD_SIZE", "2")
    set_all(config, **degrees)
    config.let.loss = loss
    if refused:
        assert "per token" in problem_of(config, "let.loss").message
        config.let.loss = "mse"
    preflight.run(config)


def test_all_mistakes_in_strategies_at_once(config):
    config.let.loss_options = {"beta": 1}
    config.let.schedule = "linaer"
    config.let.dimension_match_options = {"align": True}
    config.let.pairs = [PairConfig(student=9), PairConfig(student=0, teacher=5)]
    config.let.projector = ProjectorConfig(lr_multiplier=-1.0)
    assert set(problems_of(config)) == {
        *("let.loss_options.beta", "let.schedule", "let.dimension_match_options.align"),
        *("let.pairs.0.student", "let.pairs.1.teacher", "let.projector.lr_multiplier"),
    }


def test_what_an_adaptive_stop_needs(config):
    config.let.adaptive_stop = AdaptiveStopConfig(criterion="validation", smoothing=1.0, patience=0, teacher_loss=0.0)
    assert set(problems_of(config)) == {
        *("let.adaptive_stop.smoothing", "let.adaptive_stop.patience", "let.adaptive_stop.teacher_loss"),
        "validator.enable",
    }
    config.let.adaptive_stop = AdaptiveStopConfig(criterion="validation")
    config.validator.enable = True
    preflight.run(config)  # the teacher's loss is measured ...
    config.let.target = "labels"  # ... if there is a teacher
    assert "no teacher" in problem_of(config, "let.adaptive_stop.teacher_loss").message
    config.let.target = "teacher"
    config.let.token_alignment.enable = True
    assert "two tokenizers" in problem_of(config, "let.adaptive_stop.teacher_loss").message
    config.let.token_alignment.enable = False
    config.let.teacher.features = "/nowhere"
    problem = problems_of(config)["let.adaptive_stop.teacher_loss"]
    assert "not its predictions" in problem.message
    config.let.teacher.features = ""
    config.let.adaptive_stop = AdaptiveStopConfig(criterion="gradient")
    preflight.run(config)
    config.let.diagnosis_freq = 0
    assert "at least 1" in problem_of(config, "let.diagnosis_freq").message


def test_the_control_needs_no_teacher(config):
    config.let.target = "labels"
    config.let.teacher.path = "/nowhere"
    text = preflight.run(config)
    assert "teacher    none" in text and "blocks     0 (of 0 to 3)" in text


def test_an_orthogonal_map_that_narrows(config):
    config.let.dimension_match = "orthogonal"
    preflight.run(config)  # 32 to 48
    config.let.projector.side = "student"
    assert "let.projector.side" in problem_of(config, "let.dimension_match_options").message


def test_a_block_on_no_pipeline_stage(config, monkeypatch):
    """torchtitan leaves it out without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stages = [["tok_embeddings", "layers.0"], ["layers.2", "layers.3", "norm", "lm_head"]]
    set_all(config, parallelism__pipeline_parallel_degree=2, parallelism__module_fqns_per_model_part=stages)
    config.let.student_block = 1
    assert "layers.1" in problem_of(config, "parallelism.module_fqns_per_model_part").message
    config.let.student_block = 2
    preflight.run(config)


def test_degrees_that_do_not_fit_the_number_of_processes(config):
    config.parallelism.data_parallel_shard_degree = 3
    (problem,) = problems_of(config).values()
    assert problem.key.startswith("parallelism") and "3" in problem.message


def test_dump_folder_that_is_a_file(config, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        config.dump_folder = str(path)
        problem = problem_of(config, "dump_folder")
        assert problem.value == str(path)
        assert f"{tmp_path / 'file'} is a file" in problem.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_dump_folder_that_is_not_writable(config, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    config.dump_folder = str(tmp_path / "locked" / "out")
    assert "not writable" in problem_of(config, "dump_folder").message


def test_sequences_longer_than_the_teacher_was_built_for(config, short_teacher):
    set_all(config, let__teacher__spec=short_teacher, training__seq_len=40)
    problem = problem_of(config, "training.seq_len")
    assert problem.value == 40
    assert "at most 32 tokens" in problem.message
    config.training.seq_len = 32
    preflight.run(config)


def test_sequences_that_the_loss_cannot_cut_into_chunks(config):
    config.training.seq_len = 33
    assert "multiple of loss.num_chunks = 8" in problem_of(config, "training.seq_len").message
    config.training.seq_len = 40
    preflight.run(config)


def test_sequences_longer_than_the_student_was_built_for(config):
    shape = {"dim": 48, "num_layers": 4, "num_heads": 2, "hidden_dim": 96, "vocab_size": 4096}
    config.model_spec = llama_spec("short", **shape, max_seq_len=32)
    (problem,) = problems_of(config).values()
    assert "32" in problem.message and "64" in problem.message


# A run that resumes after the end of the alignment


@pytest.fixture
def resumed(config, tmp_path):
    """step, adaptive stop -> the configuration of a run with a checkpoint of that step, whose teacher is not there."""
    set_all(config, checkpoint__enable=True, training__steps=8, let__stop_step=4)
    config.let.teacher = TeacherConfig(path=str(tmp_path / "deleted"))

    def make(step, adaptive=None, folder=None):
        state = {"train_state": {"step": step, "ntokens_seen": 0}, "weight": torch.ones(2)}
        state |= {} if adaptive is None else {"let_adaptive_stop": adaptive}
        folder = folder or os.path.join(config.dump_folder, "checkpoint", f"step-{step}")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
        return config

    return make


def adaptive_stop(step):
    """One that has ended the alignment before that step, or, if None, has measured something."""
    stop = AdaptiveStop(threshold=0, smoothing=0.5, patience=1)
    stop.update(1.0 if step is None else -1.0, next_step=3 if step is None else step)
    return stop


@pytest.mark.parametrize("step", [4, 6])
def test_after_the_end_of_the_alignment_nothing_of_the_teacher_is_looked_at(resumed, monkeypatch, step):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    config = resumed(step)
    config.let.pairs = [PairConfig(student=0, teacher=99)]
    assert "the alignment has ended at step 4; the teacher is not needed" in preflight.run(config)
    config.let.weight = -1.0  # the rest is checked
    assert list(problems_of(config)) == ["let.weight"]


def test_before_its_end_the_teacher_is_needed(resumed):
    assert problem_of(resumed(3), "let.teacher.path").message.startswith("there is no such folder")


def test_the_checkpoint_that_torchtitan_takes_decides(resumed):
    resumed(6)
    config = resumed(3)
    preflight.run(config)  # the latest
    config.checkpoint.load_step = 3
    problem_of(config, "let.teacher.path")
    config.checkpoint.load_step = 5
    assert "checkpoint.load_step" in problems_of(config)
    set_all(config, checkpoint__load_step=-1, checkpoint__exclude_from_loading=["train_state"])
    problem_of(config, "let.teacher.path")  # it starts to count at 0
    set_all(config, checkpoint__exclude_from_loading=[], checkpoint__enable=False)
    problem_of(config, "let.teacher.path")


def test_a_checkpoint_from_elsewhere(resumed, tmp_path):
    config = resumed(6, folder=tmp_path / "elsewhere")
    config.checkpoint.initial_load_path = str(tmp_path / "elsewhere")
    problem_of(config, "let.teacher.path")  # its weights alone: a run of its own
    config.checkpoint.initial_load_model_only = False
    assert "has ended at step 4" in preflight.run(config)
    config.checkpoint.initial_load_path = str(tmp_path / "nowhere")
    assert "there is no checkpoint" in problems_of(config)["checkpoint.initial_load_path"].message


def test_a_checkpoint_of_weights_alone_says_nothing_of_the_end(resumed, config):
    folder = os.path.join(config.dump_folder, "checkpoint", "step-6")
    config = resumed(6, folder=folder)
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    problem_of(config, "let.teacher.path")


def test_a_damaged_checkpoint_is_said(resumed, config):
    resumed(6)
    with open(os.path.join(config.dump_folder, "checkpoint", "step-6", ".metadata"), "wb") as file:
        file.write(b"nothing")
    assert "cannot be read" in problems_of(config)["checkpoint.load_step"].message


@pytest.mark.parametrize(("ended", "needed"), [(2, False), (None, True)])
def test_an_adaptive_stop_has_ended_it_earlier(resumed, ended, needed):
    config = resumed(3, adaptive_stop(ended))
    config.let.adaptive_stop = AdaptiveStopConfig(criterion="gradient")
    if needed:
        problem_of(config, "let.teacher.path")
    else:
        assert f"has ended at step {ended}" in preflight.run(config)
        config.let.adaptive_stop = AdaptiveStopConfig()  # what the checkpoint knows counts only if it is asked for
        problem_of(config, "let.teacher.path")


def test_an_alignment_of_no_step_needs_no_teacher(config, tmp_path):
    set_all(config, let__stop_step=0, let__teacher__path=str(tmp_path / "absent"))
    assert "has ended at step 0" in preflight.run(config)
    config.let.stop_step = 2
    config.let.weight = 0.0  # it measures the cosine
    problem_of(config, "let.teacher.path")
