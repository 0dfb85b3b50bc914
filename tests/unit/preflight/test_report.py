"""Every number of the report, against one that is worked out by hand."""

import pytest
import torch

from let_plugin.config import LetConfig, PairConfig, TermConfig
from let_plugin.config.errors import ConfigError
from let_plugin.config.load import load, load_base
from let_plugin.demo import TEACHER
from let_plugin.preflight import checks as preflight
from let_plugin.runtime.models import llama_spec
from tests.support.fields import set_all

# By hand, of the tiny models: 4 square matrices, 3 of the feed-forward network, 2 norms per block.
STUDENT_BLOCKS = 4 * (4 * 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48
STUDENT_EMBEDDING = 4096 * 48  # and as much in the head
STUDENT = STUDENT_BLOCKS + STUDENT_EMBEDDING  # what is multiplied: the head is a matrix product
TEACHER_BLOCKS = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
TEACHER_EMBEDDING = 4096 * 32
TEACHER_TRUNK = TEACHER_BLOCKS + TEACHER_EMBEDDING


def lines_of(config, world_size=1):
    """Name -> text of the report's lines; of several with the same name, joined."""
    lines = {}
    for text in preflight.run(config, world_size).splitlines()[1:]:
        lines.setdefault(text[2:13].strip(), []).append(text[13:])
    return {name: "\n".join(texts) for name, texts in lines.items()}


def spec(flavor, **shape):
    return llama_spec(flavor, vocab_size=4096, **shape)


def test_every_line_of_a_plain_run_with_let(config, tiny_teacher):
    overhead = TEACHER_BLOCKS / (3 * STUDENT)
    lines = lines_of(config)
    assert lines.pop("memory")  # see below
    assert lines == {
        "student": f"llama3 tiny: 4 blocks of width 48, {STUDENT + STUDENT_EMBEDDING:,} parameters",
        "teacher": f"torchtitan llama3 tiny_teacher, DCP from {tiny_teacher[0]}: 2 blocks of width 32, "
        f"{TEACHER_TRUNK:,} parameters in its trunk, float32",
        "alignment": "output of student block 0 (layers.0, of 0 to 3) with the teacher's last layer (after the final "
        "norm), width 32 to 48 by interpolate, cosine",
        "lambda": "0.5 at step 0, linear to 0 at step 2 of 4",
        "vocabulary": "the student's tokenizer and the teacher's agree token by token",
        "overhead": f"+ {overhead:.1%} FLOPs while active: N_T / (3 N_S) = {TEACHER_BLOCKS:,} / (3 x {STUDENT:,}), "
        "embeddings not counted",
        # n steps with LET, two of them of 1 + overhead, cost as much as 4 plain ones when n + 2 * overhead = 4.
        "break-even": f"at {4 / (4 - 2 * overhead):.3f}x fewer steps",
    }
    config.let.stop_step = 0
    assert lines_of(config)["teacher"] == "the alignment has ended at step 0; the teacher is not needed"


TIED = spec("tied", dim=48, num_layers=4, num_heads=2, hidden_dim=96, tie_embeddings=True)
WIDE = spec("wide", dim=32, num_layers=3, num_heads=2, hidden_dim=64)
PAIRS = [PairConfig(student=1, teacher=0, weight=0.5), PairConfig(student=3, teacher="embedding")]
CONTROL = {"let__signal": "labels", "let__pairs": [PairConfig(student=0), PairConfig(student=2)]}
STUDENT_SIDE = {"let__loss": "mse", "let__dimension_match": "linear", "let__projector__side": "student"}

LOGITS = TermConfig(signal="logits", weight=1.0, top_k=8, alpha=0.5, stop_step=1, schedule="constant")
TERMS = {"let__weight": 0.1, "let__stop_step": None}
TERMS |= {"let__terms": [TermConfig(stop_step=2), LOGITS, TermConfig(signal="labels", student_block=2, stop_step=4)]}
DISTILS = TEACHER_BLOCKS + TEACHER_EMBEDDING  # its head is as large as its embedding
OVERHEADS = [n / STUDENT for n in (TEACHER_BLOCKS / 3, DISTILS / 3, STUDENT_EMBEDDING)]
# Two steps of the states' overhead, in one of which the head's share is added, and four of that of the labels.
SPENT = 2 * OVERHEADS[0] + (OVERHEADS[1] - OVERHEADS[0]) + 4 * OVERHEADS[2]


@pytest.mark.parametrize(
    ("changes", "line", "text"),
    [
        ({"let__layer_mapping": "L2M"}, "alignment", "block 1 (layers.1, of 0 to 3)"),
        ({**STUDENT_SIDE, "let__pairs": PAIRS}, "alignment",
         "with the teacher's block 0 (of 0 to 1), width 48 to 32 by linear, mse, weight 0.5\noutput of student block 3 "
         "(layers.3, of 0 to 3) with the teacher's embedding, width 48 to 32 by linear, mse"),
        ({"model_spec": WIDE}, "alignment",
         "(layers.0, of 0 to 2) with the teacher's last layer (after the final norm), both of width 32, cosine"),
        # A tied matrix is the head as well: it is stored once and multiplied once.
        ({"model_spec": TIED}, "student", f"{STUDENT:,} parameters"),
        ({"model_spec": TIED}, "overhead", f" = {TEACHER_BLOCKS:,} / (3 x {STUDENT:,})"),
        ({"let__teacher__final_norm": False}, "alignment", "last layer (before the final norm)"),
        ({"let__warmup_steps": 1}, "lambda", "up to 0.5 at step 1, then linear to 0 at step 2 of 4"),
        (CONTROL, "blocks", "0, 2 (of 0 to 3)"),
        (CONTROL, "overhead", f"+ {2 * STUDENT_EMBEDDING / STUDENT:.1%} FLOPs while active: {STUDENT_EMBEDDING:,}"),
        (TERMS, "blocks", "labels: 2 (of 0 to 3)"),
        (TERMS, "alignment", "norm), width 32 to 48 by interpolate, cosine"),
        (TERMS, "signal", "logits: the student's predictions with the teacher's, forward_kl at temperature "
         "1, the 8 likeliest tokens, the student's own loss times 0.5 at first"),
        (TERMS, "lambda", "states: 0.1 at step 0, linear to 0 at step 2 of 4\nlogits: 1 at step 0, constant to 0 at "
         "step 1 of 4\nlabels: 0.1 at step 0, linear to 0 at step 4 of 4"),
        (TERMS, "overhead", "\n".join(f"{name}: + {overhead:.1%} FLOPs by itself" for name, overhead in
         zip(("states", "logits", "labels"), OVERHEADS, strict=True)) + f"\n+ {sum(OVERHEADS[1:]):.1%} FLOPs while"),
        (TERMS, "break-even", f"at {4 / (4 - SPENT):.3f}x"),
        (TERMS, "memory", f"teacher's head {TEACHER_EMBEDDING * 4 / 2**20:.1f} MiB"),
        # Without its second block. The final norm counts.
        ({"let__pairs": [PairConfig(student=0, teacher=0)]}, "overhead",
         f"= {(TEACHER_BLOCKS - 32) // 2 + 32:,} / (3 x {STUDENT:,})"),
    ],
)  # fmt: skip
def test_what_a_setting_changes(config, changes, line, text):
    set_all(config, **changes)
    assert text in lines_of(config)[line]


@pytest.mark.parametrize(
    ("teacher_dtype", "student_dtype", "teacher_bytes", "student_bytes"),
    [("auto", "float32", 4, 4), ("auto", "bfloat16", 2, 2), ("bfloat16", "float32", 2, 4)],
)
def test_memory(config, teacher_dtype, student_dtype, teacher_bytes, student_bytes):
    set_all(config, let__teacher__dtype=teacher_dtype, training__mixed_precision_param=student_dtype)
    set_all(config, training__local_batch_size=1024, training__seq_len=64)
    teacher = TEACHER_TRUNK * teacher_bytes / 2**20
    target = 1024 * 64 * 32 * teacher_bytes / 2**20
    gradient = 1024 * 64 * 48 * student_bytes / 2**20
    lines = lines_of(config)
    assert lines["memory"] == (
        f"+ {teacher + target + gradient:.1f} MiB per rank while active: teacher {teacher:.1f} MiB, "
        f"target {target:.1f} MiB, gradient {gradient:.1f} MiB"
    )
    assert lines["teacher"].endswith({2: "bfloat16", 4: "float32"}[teacher_bytes])


@pytest.mark.parametrize(("able", "dtype"), [({}, "bfloat16"), ({}, "float32"), ({"bf16": True}, "bfloat16")])
def test_a_cpu_that_has_to_emulate_bfloat16(config, monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    config.training.mixed_precision_param = dtype
    is_slow = not able and dtype == "bfloat16"
    assert ("precision" in lines_of(config)) == is_slow
    assert load_base("let_plugin.demo.student").training.mixed_precision_param == ("bfloat16" if able else "float32")


def test_memory_of_a_teacher_on_two_ranks(config):
    mib = TEACHER_TRUNK * 4 / 2**20
    assert f"teacher {mib / 2:.1f} MiB" in lines_of(config, 2)["memory"]
    set_all(config, parallelism__data_parallel_replicate_degree=2)  # DDP holds it whole
    assert f"teacher {mib:.1f} MiB" in lines_of(config, 2)["memory"]
    set_all(config, parallelism__data_parallel_replicate_degree=1, parallelism__tensor_parallel_degree=2)
    assert lines_of(config, 2)["teacher"].endswith(" parameters in its trunk, float32")
    config.let.teacher.tensor_parallel = True
    assert lines_of(config, 2)["teacher"].endswith(", float32, cut over 2 tensor-parallel ranks")


def test_the_dense_mask_of_a_teacher_that_transformers_runs_is_counted(config):
    pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    set_all(config, let__teacher__spec="", let__teacher__path=TEACHER)
    lines = lines_of(config)
    assert "run by torchtitan" in lines["teacher"] and "mask" not in lines["memory"]
    set_all(config, let__teacher__spec="transformers")
    lines = lines_of(config)
    assert "run by transformers (teacher.spec = 'transformers')" in lines["teacher"]
    mib = config.training.local_batch_size * config.training.seq_len**2 * (1 + 4) / 2**20
    assert f"teacher's dense attention mask {mib:.1f} MiB" in lines["memory"]


def test_a_base_that_is_no_decoder_runs_without_let_only(monkeypatch, tmp_path):
    """torchtitan's flux has no `layers`: the plain run is reported, and LET on it is refused with the reason."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    path = tmp_path / "run.toml"
    path.write_text('base = "flux.flux_debugmodel"\n')
    config = load(path, []).config
    config.dump_folder = str(tmp_path / "out")
    lines = lines_of(config)
    assert lines.keys() - {"precision"} == {"student", "LET"} and lines["LET"] == "off: plain torchtitan"
    assert lines["student"].startswith("flux flux-debug: ") and "blocks" not in lines["student"]
    config.let = LetConfig(enable=True)
    with pytest.raises(ConfigError, match=r"^let\.enable = True: LET aligns the blocks of a decoder, and flux"):
        preflight.run(config)
