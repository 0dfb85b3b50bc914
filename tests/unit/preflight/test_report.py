"""Every number of the report, against one that is worked out by hand."""

import pytest

from let_plugin.bench.throughput import random_teacher
from let_plugin.config import LetConfig, PairConfig
from let_plugin.config.errors import ConfigError
from let_plugin.config.load import load
from let_plugin.demo import TEACHER
from let_plugin.preflight import checks as preflight
from let_plugin.runtime.models import llama_spec
from tests.support.fields import set_all

# By hand, of the tiny models: 4 square matrices, 3 of the feed-forward network, 2 norms per block.
STUDENT_BLOCKS = 4 * (4 * 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48
STUDENT_EMBEDDING = 4096 * 48  # and as much in the head
TEACHER_BLOCKS = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
TEACHER_EMBEDDING = 4096 * 32


def line(report, name):
    (found,) = [text for text in report.splitlines() if text.startswith(f"  {name} ")]
    return found.split(maxsplit=1)[1]


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
        "norm), width 32 to 48 by interpolate, cosine"
    )


def test_alignment_lines_of_several_pairs(config):
    config.let.pairs = [PairConfig(student=1, teacher=0, weight=0.5), PairConfig(student=3, teacher="embedding")]
    config.let.loss, config.let.dimension_match = "mse", "linear"
    config.let.projector.side = "student"
    lines = [text for text in preflight.run(config).splitlines() if text.startswith("  alignment")]
    assert len(lines) == 2
    assert lines[0].endswith("with the teacher's block 0 (of 0 to 1), width 48 to 32 by linear, mse, weight 0.5")
    assert lines[1].endswith("with the teacher's embedding, width 48 to 32 by linear, mse")


def test_a_teacher_that_ends_early_costs_less(config):
    def overhead(layer):
        config.let.pairs = [PairConfig(student=0, teacher=layer)]
        return int(
            line(preflight.run(config), "overhead").split("N_T / (3 N_S) = ")[1].split(" / ")[0].replace(",", "")
        )

    norm = 32
    assert overhead(0) - norm == (overhead(1) - norm) / 2  # of two blocks


def test_a_warm_up_and_a_norm_that_is_left_out(config):
    config.let.warmup_steps, config.let.teacher.final_norm = 1, False
    report = preflight.run(config)
    assert line(report, "lambda") == "up to 0.5 at step 1, then linear to 0 at step 2 of 4"
    assert "last layer (before the final norm)" in line(report, "alignment")


def test_the_control_without_a_teacher(config):
    config.let.target = "labels"
    config.let.pairs = [PairConfig(student=0), PairConfig(student=2)]
    report = preflight.run(config)
    head, num_student = 4096 * 48, STUDENT_BLOCKS + STUDENT_EMBEDDING
    assert line(report, "blocks") == "0, 2 (of 0 to 3)"
    assert f"+ {2 * head / num_student:.1%} FLOPs while active: {head:,} parameters" in line(report, "overhead")


def test_alignment_line_of_equal_widths(config):
    config.model_spec = llama_spec("wide", dim=32, num_layers=3, num_heads=2, hidden_dim=64, vocab_size=4096)
    text = line(preflight.run(config), "alignment")
    assert text.startswith("output of student block 0 (layers.0, of 0 to 2)")
    assert text.endswith("both of width 32, cosine")


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
    assert line(preflight.run(config), "teacher") == "the alignment has ended at step 0; the teacher is not needed"


def test_a_teacher_that_never_pays(config, tmp_path):
    """More than three times the student, to the end: four steps cost more than four plain ones by themselves."""
    config.model_spec = llama_spec("narrow", dim=2, num_layers=1, num_heads=1, hidden_dim=2, vocab_size=4096)
    # Like the tiny one, of four times as many blocks.
    path = random_teacher.write({"dim": 32, "num_layers": 8, "num_heads": 2, "hidden_dim": 64}, 4096, tmp_path)
    set_all(config, let__teacher__spec="", let__teacher__path=str(path), let__stop_step=4)
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


def test_the_dense_mask_of_a_teacher_that_transformers_runs_is_counted(config):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    set_all(config, let__teacher__spec="", let__teacher__path=TEACHER)
    assert "run by torchtitan" in line(preflight.run(config), "teacher")
    assert "mask" not in line(preflight.run(config), "memory")
    set_all(config, let__teacher__spec="transformers")
    assert "run by transformers (teacher.spec = 'transformers')" in line(preflight.run(config), "teacher")
    mib = config.training.local_batch_size * config.training.seq_len**2 * (1 + 4) / 2**20
    assert f"teacher's dense attention mask {mib:.1f} MiB" in line(preflight.run(config), "memory")


def test_a_teacher_that_is_cut(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    set_all(config, parallelism__tensor_parallel_degree=2)
    assert line(preflight.run(config), "teacher").endswith(" parameters in its trunk, float32")
    config.let.teacher.tensor_parallel = True
    assert line(preflight.run(config), "teacher").endswith(", float32, cut over 2 tensor-parallel ranks")


def test_a_base_that_is_no_decoder_runs_without_let_only(monkeypatch, tmp_path):
    """torchtitan's flux has no `layers`: the plain run is reported, and LET on it is refused with the reason."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    path = tmp_path / "run.toml"
    path.write_text('base = "flux.flux_debugmodel"\n')
    config = load(path, []).config
    config.dump_folder = str(tmp_path / "out")
    report = preflight.run(config)
    assert line(report, "student").startswith("flux flux-debug: ") and "blocks" not in report
    config.let = LetConfig(enable=True)
    with pytest.raises(ConfigError, match=r"^let\.enable = True: LET aligns the blocks of a decoder, and flux"):
        preflight.run(config)


def test_without_let_the_report_says_so_and_needs_no_teacher(config):
    config.let = LetConfig(enable=False)
    report = preflight.run(config)
    assert line(report, "LET") == "off: plain torchtitan"
    assert "teacher" not in report
