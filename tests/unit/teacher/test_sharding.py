"""Where the teacher's weights and its work lie. `tests/integration/test_matrix.py` runs it on several processes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torchtitan.distributed import ParallelDims

from let_plugin.teacher.sharding import masks_of, teacher_parallel_dims

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
    assert (cut.pp, cut.dp_replicate, cut.tp) == (1, teacher.dp_replicate, student.tp)
    assert cut.dp_shard * cut.tp == teacher.dp_shard


def test_the_attention_masks_of_some_rows():
    """They see the documents of these rows, not those of as many first ones."""
    documents_BL = torch.randint(3, (4, 256)).sort().values

    def sees(b, h, q, kv):
        return (q >= kv) & (documents_BL[b, q] == documents_BL[b, kv])

    dense_B1LL = create_mask(sees, 4, None, 256, 256, device="cpu")
    assert torch.equal(masks_of(dense_B1LL, slice(1, 3)), dense_B1LL[1:3])
    found = masks_of(blocks := create_block_mask(sees, 4, None, 256, 256, device="cpu"), slice(1, 3))
    assert torch.equal(found.to_dense(), blocks.to_dense()[1:3])
    assert torch.equal(create_mask(found.mask_mod, 2, None, 256, 256, device="cpu"), dense_B1LL[1:3])
    assert masks_of(dense_B1LL[:1], slice(1, 3)).shape[0] == 1 and masks_of(object(), slice(1, 3)) is None
