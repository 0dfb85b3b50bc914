"""What a `[let]` table makes the run do."""

import math

import pytest
import torch
from torchtitan.config import CompileConfig

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.alignment.schedules import linear
from let_plugin.config import LetConfig, PairConfig, plan
from let_plugin.config.errors import ConfigError
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny


def config_of(steps=10, **let):
    config = with_let(tiny())
    config.training.steps = steps
    config.let = LetConfig(enable=True, **let)
    return config


def problem_of(function, *args):
    with pytest.raises(ConfigError) as info:
        function(*args)
    (problem,) = info.value.problems
    return problem


@pytest.mark.parametrize(
    ("steps", "let", "expected"),
    [
        (10, {}, 5),
        (11, {}, 5),  # rounded down
        (10, {"stop_fraction": 0.0}, 0),
        (10, {"stop_fraction": 1.0}, 10),
        (10, {"stop_step": 7}, 7),
        (10, {"stop_step": 0}, 0),  # 0 is a value, not "not given"
        (10, {"stop_step": 10}, 10),
        (10, {"stop_tokens": 0}, 0),
        (10, {"stop_tokens": 257}, 2),  # of 4 x 64 tokens; rounded up
        (10, {"stop_tokens": 2560}, 10),
        (100, {"stop_fraction": 0.29}, 29),  # as written: the nearest binary number is a little less
        (100, {"stop_fraction": 0.57}, 57),
        (1000, {"stop_fraction": 0.001}, 1),
        (10, {"schedule": "constant"}, 5),
    ],
)
def test_stop_step(steps, let, expected):
    assert plan.stop_step(config_of(steps, **let), 1) == expected


def test_a_stop_step_after_the_run():
    problem = problem_of(plan.stop_step, config_of(stop_step=11), 1)
    assert (problem.key, problem.value) == ("let.stop_step", 11)
    assert "at most training.steps = 10" in problem.message


def test_tokens_of_a_step_are_those_of_all_ranks():
    assert plan.tokens_per_step(config_of(), 1) == 4 * 64
    assert plan.tokens_per_step(config_of(), 8) == 8 * 4 * 64
    config = config_of()
    config.training.global_batch_size = 32
    assert plan.tokens_per_step(config, 2) == 32 * 64
    config.let.stop_tokens = 32 * 64 * 3
    assert plan.stop_step(config, 2) == 3


def test_a_stop_in_tokens_after_the_run():
    problem = problem_of(plan.stop_step, config_of(stop_tokens=2561), 1)
    assert (problem.key, problem.value) == ("let.stop_tokens", 2561)
    assert "2560" in problem.message


def test_one_stop_only():
    with pytest.raises(ConfigError) as info:
        plan.stop_step(config_of(stop_step=3, stop_fraction=0.5), 1)
    assert [problem.key for problem in info.value.problems] == ["let.stop_step", "let.stop_fraction"]


def test_a_warm_up_that_is_longer_than_the_alignment():
    problem = problem_of(plan.stop_step, config_of(stop_step=3, warmup_steps=4), 1)
    assert (problem.key, problem.value) == ("let.warmup_steps", 4)


def test_the_papers_schedule_is_the_default():
    schedule = plan.schedule(LetConfig())
    assert [schedule(step, stop_step=7) for step in range(9)] == [linear(step, stop_step=7) for step in range(9)]


def test_options_and_warm_up_of_a_schedule():
    schedule = plan.schedule(LetConfig(schedule="cosine", warmup_steps=1))
    assert [schedule(step, stop_step=3) for step in range(4)] == pytest.approx([0.5, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("mapping", "block"),
    [("L2E", 0), ("L2M", 1), ("L2L", 3)],  # of the tiny student's 4 blocks
)
def test_layer_mapping(mapping, block):
    assert plan.pairs(config_of(layer_mapping=mapping), 2) == [LayerPair(block, 1)]


def test_pairs_by_hand_count_from_the_end_too():
    pairs = [PairConfig(student=-1), PairConfig(student=0, teacher=0, weight=0.5)]
    pairs.append(PairConfig(student=-4, teacher="embedding"))
    got = plan.pairs(config_of(pairs=pairs), 2)
    assert got == [LayerPair(3, 1), LayerPair(0, 0, 0.5), LayerPair(0, "embedding")]
    assert plan.teacher_layers([*got, got[0]]) == [1, 0, "embedding"]


@pytest.mark.parametrize(
    ("pairs", "keys"),
    [
        ([PairConfig(student=4)], ["let.pairs.0.student"]),
        ([PairConfig(student=0, teacher=2), PairConfig(student=-5)], ["let.pairs.0.teacher", "let.pairs.1.student"]),
        ([PairConfig(student=0, weight=-1.0)], ["let.pairs.0.weight"]),
        ([PairConfig(student=0, weight=math.nan)], ["let.pairs.0.weight"]),
        ([PairConfig(student=0), PairConfig(student=-4, teacher=1)], ["let.pairs.1"]),  # the same pair
    ],
)
def test_pairs_that_there_are_not(pairs, keys):
    with pytest.raises(ConfigError) as info:
        plan.pairs(config_of(pairs=pairs), 2)
    assert [problem.key for problem in info.value.problems] == keys


def test_a_chosen_block_is_one_pair_and_not_beside_pairs():
    problem = problem_of(plan.pairs, config_of(student_block=1, layer_mapping="uniform"), 2)
    assert problem.key == "let.student_block" and "let.pairs" in problem.message
    problem = problem_of(plan.pairs, config_of(student_block=1, pairs=[PairConfig(student=0)]), 2)
    assert problem.key == "let.student_block"


def test_a_bad_option_of_a_mapping():
    config = config_of(layer_mapping_options={"early": 0.0})
    assert problem_of(plan.pairs, config, 2).key == "let.layer_mapping_options.early"
    config = config_of(layer_mapping_options={"erly": 0.5})
    problem = problem_of(plan.pairs, config, 2)
    assert problem.key == "let.layer_mapping_options.erly" and "'early'" in problem.message


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_chosen_block_overrides_the_mapping(block):
    pairs = plan.pairs(config_of(student_block=block, layer_mapping="L2L"), 2)
    assert pairs == [LayerPair(block, 1)]


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_the_student_does_not_have(block):
    problem = problem_of(plan.pairs, config_of(student_block=block), 2)
    assert (problem.key, problem.value) == ("let.student_block", block)
    assert "blocks 0 to 3" in problem.message


@pytest.mark.parametrize(
    ("field", "wrong", "right", "function"),
    [
        ("schedule", "linaer", "linear", lambda let: plan.schedule(let)),
        (
            "layer_mapping",
            "L2Early",
            "L2E",
            lambda let: plan.pairs(config_of(layer_mapping=let.layer_mapping), 2),
        ),
        ("dimension_match", "interpolat", "interpolate", lambda let: plan.dimension_match(let)),
        ("loss", "cosin", "cosine", lambda let: plan.loss(let)),
    ],
)
def test_an_unknown_name_names_its_field_and_suggests(field, wrong, right, function):
    problem = problem_of(function, LetConfig(**{field: wrong}))
    assert (problem.key, problem.value) == (f"let.{field}", wrong)
    assert f"did you mean '{right}'?" in problem.message


def test_a_bad_option_of_a_loss_a_match_and_a_schedule():
    assert problem_of(plan.loss, LetConfig(loss_options={"bta": 1})).key == "let.loss_options.bta"
    let = LetConfig(loss="smooth_l1", loss_options={"beta": 0.0})
    assert problem_of(plan.loss, let).key == "let.loss_options.beta"
    let = LetConfig(schedule="cosine", schedule_options={"final": 2})
    assert problem_of(plan.schedule, let).key == "let.schedule_options.final"
    let = LetConfig(dimension_match_options={"align_corners": 1})
    assert problem_of(plan.dimension_match, let).key == "let.dimension_match_options.align_corners"


def test_an_orthogonal_map_where_it_cannot_be():
    let = LetConfig(dimension_match="orthogonal")
    assert plan.dimension_match(let)(8, 12)(torch.ones(1, 1, 8)).shape == (1, 1, 12)
    problem = problem_of(plan.dimension_match(let), 12, 8)
    assert problem.key.startswith("let.dimension_match_options") and "let.projector.side" in problem.message
    let.projector.side = "student"
    assert plan.dimension_match(let)(12, 8)(torch.ones(1, 1, 8)).shape == (1, 1, 12)


def test_with_labels_for_a_target_each_block_occurs_once():
    assert plan.pairs(config_of(target="labels"), None) == [LayerPair(0, 3)]
    chosen = [PairConfig(student=2, weight=0.5), PairConfig(student=2, teacher=0), PairConfig(student=0)]
    got = plan.pairs(config_of(target="labels", pairs=chosen), None)
    assert [(pair.student, pair.weight) for pair in got] == [(2, 0.5), (0, 1.0)]


def test_without_a_teacher_its_layers_cannot_be_wrong():
    chosen = [PairConfig(student=-1, teacher=11), PairConfig(student=1, teacher="embedding")]
    got = plan.pairs(config_of(target="labels", pairs=chosen), None)
    assert [pair.student for pair in got] == [3, 1]
    with pytest.raises(ConfigError, match=r"let\.pairs\.0\.student = 4: the student has blocks 0 to 3"):
        plan.pairs(config_of(target="labels", pairs=[PairConfig(student=4, teacher=11)]), None)


@pytest.mark.parametrize(("name", "value"), [("pairs", [PairConfig(student=0)]), ("student_block", 1)])
def test_what_has_no_meaning_for_logits_is_refused(name, value):
    assert plan.pairs(config_of(target="logits"), 2) == [LayerPair(3, 1)]
    with pytest.raises(ConfigError, match=f"let.{name}"):
        plan.pairs(config_of(target="logits", **{name: value}), 2)


def test_a_pair_is_compiled_if_torchtitan_compiles(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)
    config = config_of()
    match = plan.dimension_match(config.let)(32, 48)
    plan.pair_alignment(config, match)
    config.compile = CompileConfig(enable=True, backend="aot_eager")
    plan.pair_alignment(config, match)
    assert calls == [{"backend": "aot_eager", "fullgraph": True, "isolate_recompiles": True}]
