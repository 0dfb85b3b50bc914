"""Every number of the report, and every mistake that is found before anything is built."""

import functools
import json
import math
import os
import re

import pytest

from let_plugin import data, preflight
from let_plugin.config import LetConfig, TeacherConfig
from let_plugin.demo import TOKENIZER
from let_plugin.errors import ConfigError
from let_plugin.models import llama_spec
from let_plugin.teacher.titan import TEACHER_SPECS, register_teacher_spec
from let_plugin.trainer import with_let
from tests.support import config_registry as tiny

# By hand, of the tiny models: 4 square matrices, 3 of the feed-forward network, 2 norms per block.
STUDENT_BLOCKS = 4 * (4 * 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48
STUDENT_EMBEDDING = 4096 * 48  # and as much in the head
TEACHER_BLOCKS = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
TEACHER_EMBEDDING = 4096 * 32


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    data.register()


@pytest.fixture
def config(tmp_path, tiny_teacher):
    """The tiny student with the tiny teacher; nothing is wrong with it."""
    config = with_let(tiny.tiny())
    config.dump_folder = str(tmp_path / "out")
    teacher = TeacherConfig(spec="tiny_teacher", path=str(tiny_teacher[0]), tokenizer_path=TOKENIZER)
    config.let = LetConfig(enable=True, weight=0.5, stop_step=2, teacher=teacher)
    return config


@pytest.fixture
def short_teacher():
    """Name of a teacher spec like the tiny one, for 32 tokens."""
    yield from registered("short_teacher", num_layers=2, max_seq_len=32)


@pytest.fixture
def large_teacher():
    """Name of a teacher spec like the tiny one, of four times as many blocks."""
    yield from registered("large_teacher", num_layers=8)


def registered(name, **shape):
    make_spec = functools.partial(llama_spec, name, dim=32, num_heads=2, hidden_dim=64, vocab_size=4096, **shape)
    register_teacher_spec(name, make_spec)
    yield name
    TEACHER_SPECS.unregister(name)


def set_all(config, **values):
    for key, value in values.items():
        *path, name = key.split("__")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, name, value)


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


def line(report, name):
    (found,) = [text for text in report.splitlines() if text.startswith(f"  {name} ")]
    return found.split(maxsplit=1)[1]


# The report


def test_models(config, tiny_teacher):
    report = preflight.run(config)
    num_student = STUDENT_BLOCKS + 2 * STUDENT_EMBEDDING
    assert line(report, "student") == f"llama3 tiny: 4 blocks of width 48, {num_student:,} parameters"
    num_teacher = TEACHER_BLOCKS + TEACHER_EMBEDDING
    assert line(report, "teacher") == (
        f"torchtitan llama3 tiny_teacher, DCP from {tiny_teacher[0]}: 2 blocks of width 32, "
        f"{num_teacher:,} parameters in its trunk, float32"
    )


@pytest.mark.parametrize(("mapping", "block"), [("L2E", 0), ("L2M", 1), ("L2L", 3)])
def test_alignment_line_names_both_layers(config, mapping, block):
    config.let.layer_mapping = mapping
    assert line(preflight.run(config), "alignment") == (
        f"output of student block {block} (layers.{block}, of 0 to 3) with the teacher's last layer (after the final "
        "norm), width 32 to 48 by interpolate"
    )


def test_alignment_line_of_equal_widths(config):
    config.model_spec = llama_spec("wide", dim=32, num_layers=3, num_heads=2, hidden_dim=64, vocab_size=4096)
    text = line(preflight.run(config), "alignment")
    assert text.startswith("output of student block 0 (layers.0, of 0 to 2)")
    assert text.endswith("both of width 32")


def test_lambda_and_vocabulary_lines(config):
    report = preflight.run(config)
    assert line(report, "lambda") == "0.5 at step 0, linear to 0 at step 2 of 4"
    assert line(report, "vocabulary") == "the student's tokenizer and the teacher's agree token by token"


def test_overhead_counts_the_matrices_and_not_the_embeddings(config):
    num_student = STUDENT_BLOCKS + STUDENT_EMBEDDING  # the head is a matrix product
    text = line(preflight.run(config), "overhead")
    assert f"N_T / (3 N_S) = {TEACHER_BLOCKS:,} / (3 x {num_student:,})" in text
    assert f"+ {TEACHER_BLOCKS / (3 * num_student):.1%} FLOPs while active" in text


def test_overhead_of_a_tied_student_is_the_same(config):
    """A tied matrix is the head as well: it is stored once and multiplied once."""
    shape = {"dim": 48, "num_heads": 2, "num_layers": 4, "hidden_dim": 96, "vocab_size": 4096}
    untied = line(preflight.run(config), "overhead")
    config.model_spec = llama_spec("tied", **shape, tie_embeddings=True)
    report = preflight.run(config)
    assert line(report, "overhead") == untied
    assert f"{STUDENT_BLOCKS + STUDENT_EMBEDDING:,} parameters" in line(report, "student")


def test_break_even(config):
    # stop_step of steps cost 1 + overhead; n steps with LET cost as much as 4 plain ones when n + 2 * overhead = 4.
    overhead = TEACHER_BLOCKS / (3 * (STUDENT_BLOCKS + STUDENT_EMBEDDING))
    assert line(preflight.run(config), "break-even") == f"at {4 / (4 - 2 * overhead):.3f}x fewer steps"
    config.let.stop_step = 0
    assert line(preflight.run(config), "break-even") == "at 1.000x fewer steps"


def test_a_teacher_that_never_pays(config, large_teacher):
    """More than three times the student, to the end: four steps cost more than four plain ones by themselves."""
    config.model_spec = llama_spec("narrow", dim=2, num_layers=1, num_heads=1, hidden_dim=2, vocab_size=4096)
    set_all(config, let__teacher__spec=large_teacher, let__stop_step=4)
    overhead = 4 * (TEACHER_BLOCKS - 32) / (3 * (4 * 4 + 3 * 4 + 3 * 2 + 4096 * 2))
    assert overhead > 1
    assert line(preflight.run(config), "break-even") == "never: the teacher costs more than the whole plain run"


@pytest.mark.parametrize(
    ("teacher_dtype", "student_dtype", "teacher_bytes", "student_bytes"),
    [
        ("auto", "float32", 4, 4),
        ("auto", "bfloat16", 2, 2),
        ("bfloat16", "float32", 2, 4),
        ("float32", "bfloat16", 4, 2),
    ],
)
def test_memory(config, teacher_dtype, student_dtype, teacher_bytes, student_bytes):
    set_all(config, let__teacher__dtype=teacher_dtype, training__mixed_precision_param=student_dtype)
    set_all(config, training__local_batch_size=1024, training__seq_len=64)
    teacher = (TEACHER_BLOCKS + TEACHER_EMBEDDING) * teacher_bytes / 2**20
    target = 1024 * 64 * 32 * teacher_bytes / 2**20
    gradient = 1024 * 64 * 48 * student_bytes / 2**20
    report = preflight.run(config)
    assert line(report, "memory") == (
        f"+ {teacher + target + gradient:.1f} MiB per rank while active: teacher {teacher:.1f} MiB, "
        f"target {target:.1f} MiB, gradient {gradient:.1f} MiB"
    )
    assert line(report, "teacher").endswith({2: "bfloat16", 4: "float32"}[teacher_bytes])


def test_memory_of_a_sharded_teacher(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    mib = (TEACHER_BLOCKS + TEACHER_EMBEDDING) * 4 / 2**20
    assert f"teacher {mib / 2:.1f} MiB" in line(preflight.run(config), "memory")
    set_all(config, parallelism__data_parallel_replicate_degree=2)  # DDP holds it whole
    assert f"teacher {mib:.1f} MiB" in line(preflight.run(config), "memory")


def test_without_let_the_report_says_so_and_needs_no_teacher(config):
    config.let = LetConfig(enable=False)
    report = preflight.run(config)
    assert line(report, "LET") == "off: plain torchtitan"
    assert "teacher" not in report


def test_nothing_is_written_and_the_configuration_stays_as_it_is(config, tmp_path):
    before = repr(config)
    preflight.run(config)
    assert repr(config) == before
    assert not (tmp_path / "out").exists()


# Mistakes


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
    assert line(preflight.run(config), "lambda").startswith(f"{weight:g} at step 0")


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


def test_hf_assets_path_that_is_not_there(config, tmp_path):
    config.hf_assets_path = str(tmp_path / "none")
    assert "no such folder" in problem_of(config, "hf_assets_path").message


def test_hf_assets_path_without_a_tokenizer(config, tmp_path):
    config.hf_assets_path = str(tmp_path)
    assert "the tokenizer cannot be loaded" in problem_of(config, "hf_assets_path").message


def test_damaged_tokenizer(config, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    config.hf_assets_path = str(tmp_path)
    assert "the tokenizer cannot be loaded" in problem_of(config, "hf_assets_path").message


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


def test_vocabulary_mismatch(config, swapped):
    config.let.teacher.tokenizer_path = swapped
    message = problem_of(config, "let.teacher.path").message
    assert "2 of 4,096 ids differ" in message
    assert re.search(r"id 100: .* \(student\), .* \(teacher\); id 200: ", message)


def test_vocabulary_mismatch_that_the_user_wants(config, swapped):
    set_all(config, let__teacher__tokenizer_path=swapped, let__teacher__check_vocabulary=False)
    assert "not compared" in line(preflight.run(config), "vocabulary")


def test_teacher_without_a_tokenizer(config):
    config.let.teacher.tokenizer_path = ""  # the folder with the weights has none
    message = problem_of(config, "let.teacher.tokenizer_path").message
    assert "the teacher's tokenizer has no vocabulary" in message and "check_vocabulary = false" in message
    config.let.teacher.check_vocabulary = False
    preflight.run(config)


@pytest.mark.parametrize("kind", ["pipeline", "tensor", "context"])
def test_parallelism_that_let_does_not_have_yet(config, monkeypatch, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    set_all(config, **{f"parallelism__{kind}_parallel_degree": 2})
    problem = problem_of(config, f"parallelism.{kind}_parallel_degree")
    assert problem.value == 2
    assert "DDP, FSDP2, HSDP" in problem.message
    config.let = LetConfig(enable=False)
    preflight.run(config)  # plain torchtitan has it


def test_full_dtensor_is_refused(config):
    config.parallelism.spmd_backend = "full_dtensor"
    assert problem_of(config, "parallelism.spmd_backend").value == "full_dtensor"


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
    set_all(config, let__teacher__spec=short_teacher, training__seq_len=33)
    problem = problem_of(config, "training.seq_len")
    assert problem.value == 33
    assert "at most 32 tokens" in problem.message
    config.training.seq_len = 32
    preflight.run(config)


def test_sequences_longer_than_the_student_was_built_for(config):
    shape = {"dim": 48, "num_layers": 4, "num_heads": 2, "hidden_dim": 96, "vocab_size": 4096}
    config.model_spec = llama_spec("short", **shape, max_seq_len=32)
    (problem,) = problems_of(config).values()
    assert "32" in problem.message and "64" in problem.message
