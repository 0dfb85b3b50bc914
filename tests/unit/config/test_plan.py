"""What a `[let]` table makes the run do."""

import functools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.config import InitConfig, LetConfig, PairConfig, ProjectorConfig, TeacherConfig, TermConfig, plan
from let_plugin.config.errors import ConfigError
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny


def config_of(steps=10, **let):
    config = with_let(tiny())
    config.training.steps = steps
    config.let = LetConfig(enable=True, **let)
    return config


def stop_step(config, num_data_parallel):
    (term,) = plan.terms(config.let)
    return plan.stop_step(config, term, num_data_parallel)


def pairs_of(config, teacher_depth):
    (term,) = plan.terms(config.let)
    return plan.pairs(config, term, teacher_depth)


LOGITS = TermConfig(signal="logits", top_k=4)
# Settings -> what plan says of each: its key, and a word of the remedy.
WRONG = [
    ({"stop_step": 11}, {"stop_step": "training.steps = 10"}),
    ({"stop_tokens": 2561}, {"stop_tokens": "2560"}),
    ({"stop_step": 3, "stop_fraction": 0.5}, {"stop_step": "only", "stop_fraction": "only"}),
    ({"stop_step": 3, "warmup_steps": 4}, {"warmup_steps": "the stop step, 3"}),
    ({"pairs": [PairConfig(student=0, teacher=2), PairConfig(student=-5)]},
     {"pairs.0.teacher": "blocks 0 to 1", "pairs.1.student": "blocks 0 to 3"}),
    ({"signal": "labels", "pairs": [PairConfig(student=4, teacher=11)]}, {"pairs.0.student": "blocks 0 to 3"}),
    ({"pairs": [PairConfig(student=0), PairConfig(student=-4, teacher=1)]}, {"pairs.1": "meet twice"}),
    ({"student_block": 1, "layer_mapping": "uniform"}, {"student_block": "let.pairs"}),
    ({"student_block": 1, "pairs": [PairConfig(student=0)]}, {"student_block": "let.pairs"}),
    ({"student_block": -1}, {"student_block": "blocks 0 to 3"}),
    ({"signal": "logits", "pairs": [PairConfig(student=0)]}, {"pairs": "leave it out"}),
    ({"layer_mapping_options": {"early": 0.0}}, {"layer_mapping_options.early": ""}),
    ({"loss_options": {"bta": 1}}, {"loss_options.bta": "unknown; valid names"}),
    ({"loss": "smooth_l1", "loss_options": {"beta": 0.0}}, {"loss_options.beta": "must be"}),
    ({"loss": "smooth_l1", "loss_options": {"beta": float("nan")}}, {"loss_options.beta": "must be"}),
    ({"loss": "relational", "loss_options": {"stride": 0}}, {"loss_options.stride": "must be"}),
    ({"dimension_match": "mlp", "dimension_match_options": {"hidden_width": 0}},
     {"dimension_match_options.hidden_width": "at least 1"}),
    ({"dimension_match": "least_squares", "dimension_match_options": {"fit_steps": 0}},
     {"dimension_match_options.fit_steps": "at least 1"}),
    ({"dimension_match": "procrustes", "dimension_match_options": {"refit_every": 0}},
     {"dimension_match_options.refit_every": "at least 1"}),
    ({"dimension_match": "orthogonal", "projector": ProjectorConfig(side="student")},
     {"dimension_match_options": "let.projector.side"}),
    ({"layer_mapping": "uniform", "layer_mapping_options": {"num_pairs": 0}},
     {"layer_mapping_options.num_pairs": "must be"}),
    ({"schedule": "cosine", "schedule_options": {"final": 2}}, {"schedule_options.final": ""}),
    ({"dimension_match_options": {"align_corners": 1}}, {"dimension_match_options.align_corners": "true or false"}),
    ({"schedule": "linaer"}, {"schedule": "did you mean 'linear'?"}),
    ({"layer_mapping": "L2Early"}, {"layer_mapping": "did you mean 'L2E'?"}),
    ({"dimension_match": "interpolat"}, {"dimension_match": "did you mean 'interpolate'?"}),
    ({"loss": "cosin"}, {"loss": "did you mean 'cosine'?"}),
    # What no term reads.
    ({"temperature": 2.0}, {"temperature": "no meaning"}),
    ({"weight": 1.0, "terms": [LOGITS]}, {"weight": "each of which has its own"}),
    ({"terms": [TermConfig(signal="logits", loss="mse")]}, {"terms.0.loss": "no meaning"}),
    ({"terms": [LOGITS, TermConfig(signal="logits", alpha=0.5)]}, {"terms.1.alpha": "gradient of let.terms.0 as well"}),
    ({"terms": [TermConfig(signal="labels", alpha=0.5)]}, {"terms.0.alpha": "no meaning"}),
    ({"terms": [TermConfig(name="logits_1"), LOGITS, LOGITS]}, {"terms.2.name": "another"}),
    ({"terms": [TermConfig(name="a.b")]}, {"terms.0.name": "letters, digits and _"}),
    ({"terms": [LOGITS], "teacher": TeacherConfig(center=True)}, {"teacher.center": "last state as its head does"}),
    ({"signal": "logits", "teacher": TeacherConfig(final_norm=False)}, {"teacher.final_norm": "leave it out"}),
    ({"dimension_match": "random", "terms": [LOGITS]}, {"dimension_match": "write it there"}),
]  # fmt: skip


@pytest.mark.parametrize(("let", "expected"), WRONG)
def test_a_wrong_setting_names_its_key_and_the_remedy(let, expected):
    config, problems = config_of(**let), []
    checks = [functools.partial(plan.check_terms, config.let)]
    for term in plan.terms(config.let):
        checks += [functools.partial(check, term) for check in (plan.schedule, plan.loss)]
        checks.append(lambda term=term: plan.dimension_match(term.config, term.key)(32, 48))
        checks.append(functools.partial(plan.stop_step, config, term, 1))
        checks.append(functools.partial(plan.pairs, config, term, 2 if term.has_teacher else None))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    assert [problem.key for problem in problems] == [f"let.{key}" for key in expected]
    assert all(text in problem.message for problem, text in zip(problems, expected.values(), strict=True))


@pytest.mark.parametrize(
    ("steps", "let", "expected"),
    [
        (11, {}, 5),  # rounded down
        (10, {"stop_fraction": 0.0}, 0),
        (10, {"stop_fraction": 1.0}, 10),
        (10, {"stop_step": 0}, 0),  # 0 is a value, not "not given"
        (10, {"stop_step": 10}, 10),
        (10, {"stop_tokens": 0}, 0),
        (10, {"stop_tokens": 257}, 2),  # of 4 x 64 tokens; rounded up
        (10, {"stop_tokens": 2560}, 10),
        (100, {"stop_fraction": 0.29}, 29),  # as written: the nearest binary number is a little less
    ],
)
def test_stop_step(steps, let, expected):
    assert stop_step(config_of(steps, **let), 1) == expected


def test_tokens_of_a_step_are_those_of_all_ranks():
    assert plan.tokens_per_step(config_of(), 1) == 4 * 64
    assert plan.tokens_per_step(config_of(), 8) == 8 * 4 * 64
    config = config_of()
    config.training.global_batch_size = 32
    assert plan.tokens_per_step(config, 2) == 32 * 64
    config.let.stop_tokens = 32 * 64 * 3
    assert stop_step(config, 2) == 3


BY_HAND = [PairConfig(student=-1), PairConfig(student=0, teacher=0, weight=0.5)]
BY_HAND += [PairConfig(student=-4, teacher="embedding")]


@pytest.mark.parametrize(
    ("let", "pairs"),
    [
        ({"layer_mapping": "L2E"}, [LayerPair(0, 1)]),  # of the tiny student's 4 blocks and the teacher's 2
        ({"layer_mapping": "L2M"}, [LayerPair(1, 1)]),
        ({"layer_mapping": "L2L"}, [LayerPair(3, 1)]),
        ({"layer_mapping": "L2L", "student_block": 0}, [LayerPair(0, 1)]),
        ({"signal": "logits"}, [LayerPair(3, 1)]),
        ({"pairs": BY_HAND}, [LayerPair(3, 1), LayerPair(0, 0, 0.5), LayerPair(0, "embedding")]),
    ],
)
def test_the_pairs_of_a_mapping_a_target_or_by_hand(let, pairs):
    assert pairs_of(config_of(**let), 2) == pairs
    layers = plan.teacher_layers([*pairs, pairs[0]])  # by depth
    assert layers == sorted({pair.teacher for pair in pairs}, key=["embedding", 0, 1].index)


def test_an_orthogonal_map_goes_from_the_side_that_is_asked_for():
    let = LetConfig(dimension_match="orthogonal")
    assert plan.dimension_match(let)(8, 12)(torch.ones(1, 1, 8)).shape == (1, 1, 12)
    let.projector.side = "student"
    assert plan.dimension_match(let)(12, 8)(torch.ones(1, 1, 8)).shape == (1, 1, 12)


def test_with_labels_for_a_target_each_block_occurs_once_and_no_teacher_layer_is_wrong():
    assert pairs_of(config_of(signal="labels"), None) == [LayerPair(0, 3)]
    chosen = [PairConfig(student=-2, weight=0.5), PairConfig(student=2, teacher=11), PairConfig(student=0)]
    got = pairs_of(config_of(signal="labels", pairs=chosen), None)
    assert [(pair.student, pair.weight) for pair in got] == [(2, 0.5), (0, 1.0)]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 100))
def test_the_teacher_takes_as_many_rows_in_each_step_and_all_in_turn(num_rows, percent, step):
    let = LetConfig(teacher=TeacherConfig(rows=percent / 100))
    num = math.ceil(Fraction(percent, 100) * num_rows)
    steps = [range(num_rows)[plan.teacher_rows(let, i, num_rows)] for i in range(step, step + -(-num_rows // num))]
    assert {len(rows) for rows in steps} == {num}
    assert set().union(*steps) == set(range(num_rows))


def test_terms_have_names_of_their_own_and_the_start_takes_the_first_of_states():
    states = [TermConfig(dimension_match="random"), TermConfig(stop_step=7), TermConfig(name="deep", student_block=3)]
    config = config_of(terms=[LOGITS, *states, TermConfig(signal="labels", stop_step=9)])
    assert [term.name for term in plan.terms(config.let)] == ["logits", "states", "states_1", "deep", "labels"]
    assert plan.start_term(config.let).config is states[0]
    assert plan.last_step(config, 1) == 7  # of those that have a teacher
    assert plan.all_teacher_layers(config, 2) == [1]
    only_start = LetConfig(dimension_match="random", terms=[LOGITS], init=InitConfig(parts="both"))
    plan.check_terms(only_start)
    assert plan.start_term(only_start).config.dimension_match == "random"
