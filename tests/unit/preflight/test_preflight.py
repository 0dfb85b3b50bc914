"""Every mistake that is found before anything is built."""

import functools
import json
import os
import re
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.models import muse_glimmer

from let_plugin.alignment.adaptive_stop import AdaptiveStop
from let_plugin.config import AdaptiveStopConfig, LetConfig, PairConfig, TeacherConfig
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.preflight import checks as preflight
from let_plugin.runtime.models import llama_spec
from tests.support import hf_models, problems
from tests.support.fields import set_all

problem_of, problems_of = (functools.partial(f, preflight.run) for f in (problems.problem_of, problems.problems_of))


def student(num_heads=2, vocab_size=4096, **fields):
    shape = {"dim": 48, "num_layers": 4, "hidden_dim": 96}
    return llama_spec("student", **shape, num_heads=num_heads, vocab_size=vocab_size, **fields)


def test_nothing_is_written_and_the_configuration_stays_as_it_is(config, tmp_path):
    before = repr(config)
    preflight.run(config)
    assert repr(config) == before
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of things that a path may name by mistake; `swapped` is the demo's tokenizer with two tokens swapped."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("empty", "damaged", "swapped"):
        (folder / name).mkdir()
    (folder / "file").touch()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "damaged" / "tokenizer.json").write_text("{")
    with open(os.path.join(TOKENIZER, "tokenizer.json")) as file:
        content = json.load(file)
    vocabulary = content["model"]["vocab"]
    one, other = (token for token in vocabulary if vocabulary[token] in (100, 200))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "swapped" / "tokenizer.json").write_text(json.dumps(content))
    hf_models.save(folder / "small", hf_models.config_of("llama"))
    return str(folder)


TWO = {"world_size": 2}
TEXT_FILES = {"dataloader__dataset": "text_files"}
CUT_SEQUENCE = {**TWO, "parallelism__context_parallel_degree": 2}
TP = {**TWO, "parallelism__tensor_parallel_degree": 2}
TP_3 = {"world_size": 3, "parallelism__tensor_parallel_degree": 3, "model_spec": student(num_heads=6)}
CUT_TEACHER = {"let__teacher__tensor_parallel": True}
PTRR = {**CUT_SEQUENCE, "parallelism__context_parallel_load_balancer": "ptrr"}
RELATIONAL = {"let__loss": "relational"}
STAGES = [["tok_embeddings", "layers.0"], ["layers.2", "layers.3", "norm", "lm_head"]]
PIPELINE = {**TWO, "parallelism__pipeline_parallel_degree": 2, "parallelism__module_fqns_per_model_part": STAGES}
ORTHOGONAL = {"let__dimension_match": "orthogonal"}  # 32 to 48; on the student's side 48 to 32
VALIDATION = {"let__adaptive_stop": AdaptiveStopConfig(criterion="validation"), "validator__enable": True}
GRADIENT = {"let__adaptive_stop": AdaptiveStopConfig(criterion="gradient")}
UNCHECKED = {"let__teacher__check_vocabulary": False}
SHORT = {"let__teacher__spec": "short_teacher"}
BATCH, LOAD = "training__global_batch_size", "checkpoint__initial_load_path"
INIT, ZERO = {"let__init__parts": "both"}, {"let__init__upper_blocks": "zero"}

# What is set, and the error: its start, and a part of the message, as regular expressions. {files} is the folder above.
MISTAKES = [
    ({**GRADIENT, "let__diagnosis_freq": 0}, "let.diagnosis_freq = 0", "must be at least 1"),
    ({"dataloader__dataset": "let_demo_trian"}, "dataloader.dataset = 'let_demo_trian'", "mean 'let_demo_train'?"),
    (TEXT_FILES, "dataloader.dataset_path = ''", "no such file; give a file, a folder or a glob pattern"),
    ({BATCH: 0}, "training.global_batch_size = 0", "must be a multiple of .*degree, 4; -1"),
    ({**TWO, BATCH: 12}, "training.global_batch_size = 12", "must be a multiple of .*degree, 8; -1"),
    *(({"hf_assets_path": f"{{files}}/{name}"}, f"hf_assets_path = '{{files}}/{name}'", "it must be a folder")
      for name in ("absent", "empty", "damaged")),
    ({"model_spec": student(vocab_size=4095)}, "hf_assets_path = .*", "ids go up to 4095, the model has 4095"),
    ({"let__teacher__path": "{files}/absent"}, "let.teacher.path = '{files}/absent'", "no such folder"),
    ({"let__teacher": TeacherConfig()}, "let.teacher.path = ''", "no teacher is given; set it to"),
    ({"let__teacher__tokenizer_path": "{files}/swapped"}, "let.teacher.path = '.*'",
     r"2 of 4,096 ids differ \(id 100: .* \(student\), .* \(teacher\); id 200: .*Train the student on"),
    ({**UNCHECKED, "let__teacher__spec": "", "let__teacher__path": "{files}/small"}, "let.teacher.path = '.*'",
     "61 rows, the student's tokenizer ids up to 4,095; take another teacher"),
    # The folder with the weights has no tokenizer.
    ({"let__teacher__tokenizer_path": ""}, "let.teacher.tokenizer_path = ''", "no vocabulary .*_vocabulary = false"),
    ({**TP_3, **CUT_TEACHER}, "let.teacher.tensor_parallel = True", "2 heads do not divide by .* = 3; leave this off"),
    ({"let__teacher__rows": 0.8}, "let.teacher.rows = 0.8", "a microbatch has 4 rows.*leave this at 1"),
    ({"let__teacher__rows": 0.5, "let__signal": "labels"}, "let.teacher.rows = 0.5", "no teacher runs; leave"),
    (PTRR, "parallelism.context_parallel_load_balancer = 'ptrr'", 'choose "headtail" or "none"'),
    *(({**cut, **RELATIONAL}, "let.loss = 'relational'", "take a loss per token") for cut in (CUT_SEQUENCE, TP)),
    ({**VALIDATION, "let__signal": "labels"}, "let.adaptive_stop.teacher_loss", "no teacher to measure: give"),
    ({**VALIDATION, "let__token_alignment__enable": True}, "let.adaptive_stop.teacher_loss = None", "must be given"),
    ({**ORTHOGONAL, "let__cuda_graphs": True}, "let.cuda_graphs = True", "not with 'orthogonal'"),
    ({**ORTHOGONAL, "let__projector__side": "student"}, "let.dimension_match_options", "let.projector.side"),
    ({**PIPELINE, "let__student_block": 1}, "parallelism.module_fqns_per_model_part", "no stage has layers.1"),
    *(({f"parallelism__{key}": degree, "world_size": n}, f"parallelism: {key} = {degree}", f"processes, {n}; start")
      for n, key, degree in ((1, "data_parallel_shard_degree", 3), (3, "tensor_parallel_degree", 2),
                             (1, "context_parallel_degree", 0))),
    ({"dump_folder": "{files}/file/below"}, "dump_folder = '{files}/file/below'", "{files}/file is a file; choose"),
    ({"dump_folder": "/proc/below"}, "dump_folder = '/proc/below'", "/proc is not writable"),  # for root, too
    ({**SHORT, "training__seq_len": 40}, "training.seq_len = 40", "the teacher was built for at most 32 tokens"),
    ({**INIT, **ORTHOGONAL}, "let.dimension_match = 'orthogonal'", 'changes while .* take "interpolate"'),
    ({**INIT, "model_spec": student(tie_embeddings=True)}, "let.init.parts = 'both'", "one tensor.*choose one of them"),
    ({**INIT, "checkpoint__enable": True, LOAD: "{files}"}, "checkpoint.initial_load_.*", "not together with let.init"),
    ({**INIT, "let__weight": 0.0, "let__teacher__path": ""}, "let.teacher.path = ''", ""),
    ({**INIT, "let__weight": 0.0, "let__teacher__tokenizer_path": "{files}/swapped"}, "let.teacher.path = '.*'",
     "2 of 4,096 ids differ"),
    ({**ZERO, "let__student_block": 3}, "let.init.upper_blocks = 'zero'", 'no block above layers.3.*choose "keep"'),
    ({"let__init__embedding_scale": 0.0}, "let.init.embedding_scale = 0.0", "must be more than 0"),
    ({"training__seq_len": 33}, "training.seq_len = 33", "must be a multiple of loss.num_chunks = 8"),
    ({"model_spec": student(max_seq_len=32)}, "training", "64.*32"),
]  # fmt: skip

LOGITS = {"let__signal": "logits", "let__top_k": 4, "let__alpha": 0.5}
# What is set, and a part of the report.
RIGHT = [
    ({"let__weight": 0.0}, "0 at step 0"),
    ({"let__stop_step": 0, "let__teacher__path": "{files}/absent"}, "has ended at step 0"),
    ({"validator__enable": False, "validator__dataloader__dataset": "nonsense"}, ""),
    ({**TEXT_FILES, "dataloader__dataset_path": "{files}/*.jsonl"}, ""),
    *(({"world_size": n, BATCH: size}, "") for n, size in ((1, -1), (1, 12), (2, 8))),
    ({**UNCHECKED, "let__teacher__tokenizer_path": "{files}/swapped"}, "not compared"),
    ({**UNCHECKED, "let__teacher__tokenizer_path": ""}, "not compared"),
    (TP_3, ""),
    ({**PTRR, "let": LetConfig(enable=False)}, "off: plain torchtitan"),
    ({**TP, **RELATIONAL, "parallelism__enable_sequence_parallel": False}, "relational"),
    ({**TWO, **RELATIONAL}, "relational"),
    (VALIDATION, ""),  # the teacher's loss is measured
    (GRADIENT, ""),
    ({"let__signal": "labels", "let__teacher__path": "/nowhere"}, "teacher    none"),
    (ORTHOGONAL, "32 to 48 by orthogonal"),
    ({**INIT, "model_spec": student(vocab_size=4100)},
     "99.9% of the tokens take a row of the teacher's, 0.0% a mean of rows, 0.1% keep their own"),
    *(({**INIT, **ZERO, **without}, "blocks 1 and up at 0") for without in ({"let__weight": 0.0}, LOGITS)),
    ({**INIT, "let__signal": "labels"}, "embeddings as large as the student's own and head times 0.8122, width 32"),
    ({**INIT, "let__init__parts": "head", "model_spec": student(tie_embeddings=True)}, "start      head times"),
    ({**PIPELINE, "let__student_block": 2}, "student block 2"),
    ({**SHORT, "training__seq_len": 32}, ""),
]  # fmt: skip


def apply(config, changes, files):
    """Sets what a row of a table says, and returns the number of processes."""
    texts = {key: value.format(files=files) for key, value in changes.items() if isinstance(value, str)}
    changes = changes | texts
    world_size = changes.pop("world_size", 1)
    set_all(config, **changes)
    return world_size


@pytest.mark.parametrize(("changes", "start", "message"), MISTAKES, ids=[f"{row[1]}: {row[2]}" for row in MISTAKES])
def test_a_mistake_is_refused_with_its_key_and_the_remedy(config, files, short_teacher, changes, start, message):
    problem = problem_of(config, apply(config, changes, files))
    assert re.match(f"{start}: .*{message}".replace("{files}", files), str(problem))


@pytest.mark.parametrize(("changes", "line"), RIGHT)
def test_what_is_no_mistake_runs(config, files, short_teacher, changes, line):
    assert line in preflight.run(config, apply(config, changes, files))


def test_stored_states_have_no_predictions_to_measure(config):
    set_all(config, **VALIDATION, let__teacher__features="/nowhere")
    assert "not its predictions" in problems_of(config)["let.adaptive_stop.teacher_loss"].message


def test_embeddings_that_are_more_than_a_weight_get_no_start(config):
    set_all(config, **INIT, model_spec=muse_glimmer.model_registry("debugmodel"))
    assert "more than one weight" in problems_of(config)["let.init.parts"].message


def test_a_teacher_of_transformers_cannot_be_cut_and_one_with_two_widths_gives_no_start(config, tmp_path):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    set_all(config, let__teacher__spec="transformers", let__teacher__path=TEACHER, **CUT_TEACHER)
    message = problem_of(config).message
    assert "transformers runs this teacher; leave this off" in message
    folder = hf_models.save(tmp_path, hf_models.config_of("opt_350m_like"))
    set_all(config, **INIT, let__weight=0.0, let__teacher=TeacherConfig(path=str(folder)))
    assert "another width than its blocks" in problem_of(config).message


# A run that resumes after the end of the alignment


def save(folder, step):
    """A checkpoint whose adaptive stop has measured something and, from step 2 on, has ended the alignment there."""
    stop = AdaptiveStop(threshold=0, smoothing=0.5, patience=1)
    stop.update(1.0 if step < 2 else -1.0, next_step=min(step, 2))
    state = {"train_state": {"step": step, "ntokens_seen": 0}, "let_adaptive_stop": stop, "weight": torch.ones(2)}
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)


@pytest.fixture
def resumed(config, tmp_path):
    """Function that saves checkpoints of these steps, and one elsewhere; the run's teacher is not there."""
    set_all(config, checkpoint__enable=True, training__steps=8, let__stop_step=4)
    config.let.teacher = TeacherConfig(path=str(tmp_path / "deleted"))

    def make(*steps):
        for step in steps:
            save(f"{config.dump_folder}/checkpoint/step-{step}", step)
        save(tmp_path / "elsewhere", 6)
        return config

    return make


ALL_OF_IT = {"checkpoint__initial_load_model_only": False}
# Steps of the run's own checkpoints, what is set, and the report or the key that is complained about.
RESUMED = [
    ([6, 3], {}, "has ended at step 4"),  # the latest
    ([6, 3], {"checkpoint__load_step": 3}, "let.teacher.path"),
    ([6, 3], {"checkpoint__load_step": 5}, "checkpoint.load_step"),
    ([6], {"checkpoint__exclude_from_loading": ["train_state"]}, "let.teacher.path"),  # it starts to count at 0
    ([6], {"checkpoint__enable": False}, "let.teacher.path"),
    ([], {LOAD: "{files}/elsewhere"}, "let.teacher.path"),  # its weights alone: a run of its own
    ([], {LOAD: "{files}/elsewhere", **ALL_OF_IT}, "has ended at step 4"),
    ([], {LOAD: "{files}/nowhere"}, "checkpoint.initial_load_path"),
    ([3], GRADIENT, "has ended at step 2"),
    ([3], {}, "let.teacher.path"),  # what the checkpoint knows counts only if it is asked for
    ([1], GRADIENT, "let.teacher.path"),
]


@pytest.mark.parametrize(("steps", "changes", "expected"), RESUMED)
def test_the_checkpoint_that_torchtitan_takes_decides(resumed, tmp_path, steps, changes, expected):
    config = resumed(*steps)
    apply(config, changes, tmp_path)
    if "." in expected:
        assert expected in problems_of(config)
    else:
        assert expected in preflight.run(config)


def test_after_the_end_of_the_alignment_nothing_of_the_teacher_is_looked_at(resumed, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    config = resumed(4)
    config.let.pairs = [PairConfig(student=0, teacher=99)]
    assert "the alignment has ended at step 4; the teacher is not needed" in preflight.run(config)
    config.let.weight = -1.0  # the rest is checked
    assert problem_of(config).key == "let.weight"


def test_a_checkpoint_of_weights_alone_is_the_end_of_a_run_and_a_damaged_one_is_refused(resumed):
    config = resumed(6)
    folder = f"{config.dump_folder}/checkpoint/step-6"
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    assert "has the weights of a run that has ended" in problems_of(config)["checkpoint.load_step"].message
    with open(f"{folder}/.metadata", "wb") as file:
        file.write(b"nothing")
    assert "cannot be read" in problems_of(config)["checkpoint.load_step"].message
    os.link(f"{folder}/.metadata", f"{folder}/model.safetensors")  # as `last_save_in_hf` leaves it
    assert "take another dump_folder" in problems_of(config)["checkpoint.load_step"].message
