"""Where the teacher's weights and its work lie. `tests/integration/test_matrix.py` runs it on several processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchtitan.distributed import ParallelDims

from let_plugin.teacher.sharding import TeacherShare, num_peers, sequence_shards, teacher_parallel_dims

NAMES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def dims(**degrees):
    degrees = {name: degrees.get(name, 1) for name in (*NAMES, "ep")}
    return ParallelDims(**degrees, world_size=math.prod(degrees.values()))


@given(st.tuples(*[st.sampled_from([1, 2, 4])] * len(NAMES)))
def test_the_teacher_is_sharded_over_a_pipeline_stage_and_replicated_as_the_student(degrees):
    student = dims(**dict(zip(NAMES, degrees, strict=True)))
    teacher = teacher_parallel_dims(student)
    assert (teacher.pp, teacher.cp, teacher.tp, teacher.ep) == (1, 1, 1, 1)
    assert teacher.world_size == teacher.dp_replicate * teacher.dp_shard == student.world_size
    # A shard group lies within one pipeline stage and one replica: the innermost ranks.
    assert teacher.dp_shard == student.dp_shard * student.cp * student.tp

    cut = teacher_parallel_dims(student, tensor_parallel=True)
    assert (cut.pp, cut.dp_replicate, cut.dp_shard * cut.tp, cut.tp) == (
        1,
        teacher.dp_replicate,
        teacher.dp_shard,
        student.tp,
    )


@pytest.mark.parametrize(("sequence_parallel", "shards"), [(True, 8), (False, 2)])
def test_the_sequence_is_cut_by_context_and_sequence_parallelism(config, sequence_parallel, shards):
    config.parallelism.enable_sequence_parallel = sequence_parallel
    assert sequence_shards(config, dims(dp_shard=3, cp=2, tp=4)) == shards


@pytest.mark.parametrize(
    ("degrees", "alone", "cut"),
    [({"dp_shard": 4}, 1, 1), ({"tp": 2}, 2, 1), ({"cp": 2}, 2, 2), ({"cp": 2, "tp": 4}, 8, 2)],
)
def test_the_peers_of_a_teacher_that_is_cut_with_the_student_are_fewer(config, degrees, alone, cut):
    assert num_peers(config, dims(**degrees)) == alone
    config.let.teacher.tensor_parallel = True
    assert num_peers(config, dims(**degrees)) == cut


def test_a_rank_without_peers_keeps_all_rows_and_positions(config):
    share = TeacherShare(config, dims(), torch.device("cpu"))
    tokens_BL, states_BLE = torch.arange(12).view(3, 4), torch.randn(3, 4, 5)
    assert share.rows(tokens_BL) is tokens_BL
    assert share.deliver(states_BLE, 3) is states_BLE
    masks = object()
    assert share.masks(masks, 3) is masks
