"""Every strategy, from a TOML file, in real runs: the same gradients in one process and in others.

pytest -m exhaustive    each strategy in FSDP2 and in a pipeline, beside all else that is left out otherwise
pytest                  in one of them; controls and baselines in every layout
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import jobs, tokenizer_kinds

pytestmark = pytest.mark.slow

STEPS = 3
# Name -> lines of the `[let]` table; every strategy and option is in one. The student has 4 blocks of width 48, the
# teacher 2 of width 32.
BY_GRADIENT = "a share of the student's gradient"
STRATEGIES = {
    "the paper's": "",
    "one block, two layers": 'pairs = [{student = 1}, {student = 1, teacher = "embedding", weight = 0.25}]',
    BY_GRADIENT: """\
weight_by = "gradient"
weight_momentum = 0.5
pairs = [{student = 0, teacher = 0}, {student = 3, weight = 0.5}]
schedule = "constant"
stop_fraction = 1""",
    "two blocks, one layer": "pairs = [{student = 0}, {student = 3, weight = 0.5}]",
    "centred, several layers": """\
pairs = [{student = 0, teacher = -1}, {student = 3, teacher = 0}, {student = 2, teacher = "embedding"}]
teacher.center = true
stop_step = 3""",
    "student's side, procrustes": 'dimension_match = "procrustes"\nprojector.side = "student"\nstop_step = 3',
    "least squares, then learned + two layers": """\
dimension_match = "least_squares"
dimension_match_options = {fit_steps = 1, ridge = 0.1, then = "learned"}
pairs = [{student = 0, teacher = 0}, {student = 2, teacher = -1}]
schedule = "constant"
stop_fraction = 1""",
    "linear + smooth_l1 + cosine + two pairs": """\
dimension_match = "linear"
dimension_match_options.align_corners = true
loss = "smooth_l1"
loss_options.beta = 0.5
schedule = "cosine"
pairs = [{student = 0, teacher = 0, weight = 0.5}, {student = 2, teacher = -1}]""",
    "mlp on the student's side + mse + warm-up + uniform": """\
dimension_match = "mlp"
projector.side = "student"
loss = "mse"
warmup_steps = 1
stop_step = 3
layer_mapping = "uniform"
layer_mapping_options.num_pairs = 2""",
    "M2E + align_corners + normalized mse + stop_fraction": """\
layer_mapping = "M2E"
layer_mapping_options.early = 0.5
dimension_match_options.align_corners = true
teacher.check_vocabulary = false
loss = "mse"
loss_options.normalize = true
stop_fraction = 1""",
    "L2L + random linear with its own optimizer + constant": """\
layer_mapping = "L2L"
dimension_match = "linear"
dimension_match_options = {init = "random", seed = 3}
projector = {lr_multiplier = 2, weight_decay = 0.5}
schedule = "constant"
stop_fraction = 1""",
    "M2L at other depths + smooth_l1 + constant + warm-up": """\
layer_mapping = "M2L"
layer_mapping_options = {middle = 0.5, late = 0.75}
loss = "smooth_l1"
schedule = "constant"
warmup_steps = 1
stop_step = 3""",
    "orthogonal + normalized mse + cosine + M2M + adaptive stop": """\
dimension_match = "orthogonal"
dimension_match_options.seed = 4
loss = "mse"
loss_options.normalize = true
schedule = "cosine"
layer_mapping = "M2M"
stop_step = 3
adaptive_stop = {criterion = "gradient", threshold = 2.0, smoothing = 0.5, patience = 2}""",
    "mlp on the student's side + relational + two pairs": """\
dimension_match = "mlp"
dimension_match_options = {hidden_width = 40, seed = 2}
projector.side = "student"
loss = "relational"
pairs = [{student = 0, teacher = 0, weight = 0.5}, {student = 2, teacher = -1}]""",
    "procrustes + relational + constant + L2M + centred": """\
dimension_match = "procrustes"
dimension_match_options.refit_every = 1
loss = "relational"
loss_options.stride = 4
schedule = "constant"
layer_mapping = "L2M"
student_block = 2
diagnosis_freq = 2
stop_step = 3
teacher.center = true
teacher.center_momentum = 0.5""",
    "truncate_or_pad + constant + before the final norm + pairs + tokens": """\
dimension_match = "truncate_or_pad"
projector.side = "student"
schedule = "constant"
teacher.final_norm = false
pairs = [{student = 3, teacher = 0}, {student = 0, teacher = "embedding"}, {student = 2}]
stop_tokens = 512""",
}

# Controls and baselines, in every layout. In a pipeline, the student's head is on another rank than the block that
# "labels" trains, and needed on both.
ANOTHER_TOKENIZER = "another tokenizer"
CONTROLS = {
    "logits": """\
signal = "logits"
temperature = 2.0
top_k = 100
alpha = 0.5
schedule = "constant"
stop_fraction = 1""",
    # Without the deepest of the teacher's layers from the second step on, and without a teacher from the third.
    "three terms": """\
terms = [
    {signal = "logits", divergence = "jensen_shannon", weight = 0.5, stop_step = 1},
    {pairs = [{student = 0, teacher = 0}, {student = 3, teacher = 0}], dimension_match = "linear", stop_step = 2},
    {signal = "labels", student_block = 1, weight = 0.2, schedule = "constant", stop_step = 3},
]
teacher.center = true""",
    "random teacher": 'control = "random_teacher"',
    "half of the rows": "teacher.rows = 0.5\nstop_step = 3",
    "shuffled targets": 'control = "shuffled_targets"\nteacher.tensor_parallel = true',
    "labels, two blocks": """\
signal = "labels"
pairs = [{student = 0}, {student = 2, teacher = 30, weight = 0.5}]
schedule = "cosine" """,
    ANOTHER_TOKENIZER: "stop_step = 2",
}
# What may hold on to a teacher, beside the strategies: its library and the compiler.
ENDS = {
    "transformers": ("", []),
    "compiled": ('dimension_match = "linear"', ["--compile.enable", "--compile.backend", "aot_eager"]),
}
ROWS = {**STRATEGIES, **CONTROLS}


def layouts_of(name):
    if name == "shuffled targets":
        # Among the rows that a rank runs the teacher on: those of a single process where ranks run it together.
        return ["TP", "TP without SP"]
    if name == "half of the rows":
        return ["TP", "TP without SP", "CP"]  # others have microbatches of fewer rows
    if name == "random teacher":
        return ["FSDP2"]
    return list(jobs.LAYOUTS) if name in CONTROLS else ["FSDP2", "pipeline"]


def always_runs(name, layout):
    """Several pairs in a pipeline, on whose stages they are, and the others where all is sharded."""
    if name in CONTROLS:
        return layout != "TP without SP" or name == "shuffled targets"
    return layout == ("pipeline" if "pairs" in ROWS[name] else "FSDP2")


SEVERAL = [
    pytest.param(
        name, layout, id=f"{name}, {layout}", marks=[] if always_runs(name, layout) else [pytest.mark.exhaustive]
    )
    for name in ROWS
    for layout in layouts_of(name)
]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, headed_teacher):
    """(layout, row) -> what the run did, of the rows that this session selects."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = [item.callspec.params for item in items]
    several = [(item["layout"], item["name"]) for item in selected if item.keys() >= {"layout", "name"}]
    single = {name for _, name in several} | {item["name"] for item in selected if "name" in item}
    folder = tmp_path_factory.mktemp("strategies")

    def write(file, lines):
        text = jobs.TINY.format(folder=file.with_suffix(""), teacher=headed_teacher[0]).replace("stop_step = 4", lines)
        file.write_text(text.replace("weight = 0.5\n", "", 1) if "terms = " in lines else text)
        return file

    start = jobs.seed_checkpoint(folder / "seed", write(folder / "plain.toml", ""))
    start += ["--training.steps", STEPS, "--training.max_norm", 1e9]
    configs = {name: write(folder / f"{i}.toml", ROWS[name]) for i, name in enumerate(single)}
    if ANOTHER_TOKENIZER in configs:
        tokenizer_kinds.write_for_teacher(folder / "tokenizer", configs[ANOTHER_TOKENIZER], 128)
    off = {("", "off"): (write(folder / "off.toml", "enable = false"), start)}
    one = off | {("", name): (config, start) for name, config in configs.items()}
    two = {(layout, name): (configs[name], [*start, *jobs.LAYOUTS[layout]]) for layout, name in several}
    hf_teacher = jobs.make_hf_teacher(folder / "hf")
    for layout in ("FSDP2", "pipeline"):
        for name, (lines, args) in ENDS.items():
            own = [*jobs.LAYOUTS[layout], *args, *(hf_teacher if name == "transformers" else ())]
            two[layout, name] = (write(folder / f"{name}.toml", lines), [*start, *own])
    return jobs.train_many(folder, one, 1, check=False) | jobs.train_many(folder, two, 2, check=False)


def result_of(runs, layout, name):
    result = runs[layout, name]
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize(("name", "layout"), SEVERAL)
def test_it_moves_the_student_and_is_the_same_in_every_layout(runs, name, layout):
    off, single, several = (result_of(runs, *key) for key in (("", "off"), ("", name), (layout, name)))
    student = {key: single["gradients"][key] for key in off["gradients"]}
    # A share of the gradient is too small to matter in the first step, before it has been measured.
    assert jobs.relative_difference(student, off["gradients"]) > 1e-4 or name == BY_GRADIENT
    assert jobs.relative_difference(several["gradients"], single["gradients"]) <= 1e-5
    for got, expected in zip(several["logged"], single["logged"], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        compared = {key for key in expected if re.search(r"/(cosine|lambda|aligned|\w+_loss)", key)}
        assert compared <= got.keys()
        for key in compared:
            assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("layout", ["", *jobs.LAYOUTS])
def test_nothing_is_left_of_an_alignment_that_has_ended(runs, layout):
    """On no rank, and with no further garbage collection: weak references to all that it brought along are dead."""
    num_ended = 0
    for (own_layout, name), result in runs.items():
        if own_layout != layout or "error" in result:
            continue  # an error fails the test of its row
        for watched, left in zip(result["watched"], result["leftovers"], strict=True):
            assert not left, (name, left)
            num_ended += left is not None and len(watched) > 1
    assert num_ended >= 2


def test_a_part_of_the_head_may_end_in_padded_rows(tmp_path, headed_teacher):
    """Of the student's 4,102 rows the teacher lacks the last six, which are in the second rank's part."""
    config = jobs.tiny(tmp_path, headed_teacher[0], 'signal = "logits"\ntop_k = 100\n')
    config.write_text(config.read_text().replace("tests.support.tiny", "tests.support.tiny_padded"))
    start = [*jobs.seed_checkpoint(tmp_path / "seed", config), "--training.steps", 1, "--let.stop_step", 1]
    one, two = (
        jobs.train_many(tmp_path, {"run": (config, [*start, *layout])}, processes)["run"]
        for processes, layout in ((1, []), (2, jobs.LAYOUTS["TP"]))
    )
    assert one["logged"][0]["let/distillation_loss"] > 0
    assert jobs.relative_difference(two["gradients"], one["gradients"]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("procrustes + relational + constant + L2M + centred", [1, 2]),
        ("M2L at other depths + smooth_l1 + constant + warm-up", [1, 2, 3]),
    ],
    ids=["every other step", "every step"],
)
def test_gradients_are_compared_as_often_as_one_asks(runs, name, steps):
    logged = result_of(runs, "", name)["logged"]
    for key in ("let/grad_cosine", "let/grad_ratio"):
        assert [step for step, line in enumerate(logged, start=1) if key in line] == steps


def test_strategies_of_another_package(tmp_path, tiny_config):
    """It is installed, not imported: its entry points are all that is known of it."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    source = shutil.copytree(jobs.ROOT / "tests/support/strategies_package", tmp_path / "source")
    subprocess.run([*pip, "--no-build-isolation", "--target", str(site), str(source)], check=True)
    lines = ['layer_mapping = "first_and_last"', 'loss = "angle"', 'schedule = "polynomial"']
    lines = "\n".join(["stop_step = 4", *lines, "schedule_options.power = 3"])
    tiny_config.write_text(tiny_config.read_text().replace("stop_step = 4", lines))
    jobs.run("let_plugin.train", tiny_config, PYTHONPATH=f"{jobs.ROOT}{os.pathsep}{site}")
    lines = jobs.metrics(tmp_path / "out")
    assert [line["let/lambda"] for line in lines] == pytest.approx([0.5 * (1 - step / 4) ** 3 for step in range(4)])
    assert {"let/cosine/0-1", "let/cosine/3-1"} <= lines[0].keys()
