"""What a run costs in FLOPs: N parameters that are multiplied cost 2 N per token forward, and 4 N backward.

Attention between tokens is not counted, as in the preflight report.
"""

from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.config import plan
from let_plugin.preflight.report import Cost, Student, auxiliary_cost, cost
from let_plugin.teacher.open import open_source
from let_plugin.teacher.stored.features import Features


def active_cost(config: Trainer.Config, student: Student, dims: ParallelDims) -> Cost:
    """What LET, or a baseline that the `[let]` table says, costs while it is active. The configuration is checked."""
    if config.let.target == "labels":
        return auxiliary_cost(student, plan.pairs(config, None))
    source = open_source(config.let.teacher)
    features = source if isinstance(source, Features) else None
    return cost(config, student, source.info, plan.pairs(config, source.info.num_layers), dims, features)


def step_flops(student: Student, tokens_per_step: int) -> float:
    """FLOPs of a plain step of the whole job."""
    return 6.0 * student.num_matmul_params * tokens_per_step
