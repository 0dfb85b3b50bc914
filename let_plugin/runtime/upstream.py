"""The one seam to torchtitan: its names that are private, or that moved or vanished after 0.3.0.

Every other module imports them from here, so a port to the next release starts in this file (see `docs/design.md`).
torchtitan's stable names (`Trainer`, `ParallelDims`, `ModelSpec`, ...) are imported where they are used. This module
imports nothing of let_plugin, so every room may import it. It is as expensive as torchtitan's trainer.
"""

import functools
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.checkpointer import TRAIN_STATE as TRAIN_STATE
from torchtitan.components.checkpointer import CheckpointManager as CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader as BaseDataLoader
from torchtitan.components.metrics import _get_metrics_rank
from torchtitan.components.optimizer import LRSchedulersContainer as LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer as OptimizersContainer
from torchtitan.components.optimizer import default_adamw as default_adamw
from torchtitan.config import ConfigManager
from torchtitan.config.manager import custom_registry
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.distributed.cudagraph import cudagraph_teardown, wrap_with_cuda_graph
from torchtitan.experiments import _supported_experiments
from torchtitan.hf_datasets import DatasetConfig as DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS as DATASETS
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader as HuggingFaceTextDataLoader
from torchtitan.models import _supported_models
from torchtitan.models.llama3 import _build_llama3_layers, _output_linear_init
from torchtitan.trainer import Trainer

llama3_layers, llama3_head_init = _build_llama3_layers, _output_linear_init

MODELS: frozenset[str] = _supported_models  # packages of torchtitan.models
# Modules with configuration functions that torchtitan knows by a short name, such as "llama3", and where it looks.
SHORT_MODULES: frozenset[str] = _supported_models | _supported_experiments
PACKAGES = ("torchtitan.models", "torchtitan.experiments", "torchtitan.experiments.rl.examples")


@functools.cache
def tyro_registry() -> Any:
    """torchtitan's rules for tyro."""
    ConfigManager()  # adds them, once per call
    return custom_registry


def latest_checkpoint_step(folder: str) -> int:
    """The step of the last checkpoint in `folder`, by torchtitan's own rule; -1 if there is none."""
    # The method asks nothing of the manager where the folder is given.
    return CheckpointManager._find_load_step(cast(Any, None), folder)


def logs_on_this_rank(trainer: Trainer) -> bool:
    """Whether this rank is the one that writes torchtitan's metrics."""
    schedule = trainer.config.parallelism.pipeline_parallel_schedule
    return torch.distributed.get_rank() == _get_metrics_rank(parallel_dims=trainer.parallel_dims, pp_schedule=schedule)


def recapture_cuda_graph(trainer: Trainer) -> None:
    """Makes the trainer capture its forward and backward pass anew, after its inputs or hooks have changed."""
    cudagraph_teardown()
    trainer.fwd_bwd_fn = wrap_with_cuda_graph(trainer._forward_backward_body)


def context_parallel_part(index_L: torch.Tensor, mesh: DeviceMesh, load_balancer: str | None) -> torch.Tensor:
    """This rank's part of the positions `index_L`, cut as torchtitan cuts the student's inputs."""
    kwargs: dict[str, Any] = {"positions": index_L[None]}
    prepare_context_parallel_input(index_L[None], index_L[None], kwargs, mesh, index_L.device, load_balancer)
    return kwargs["positions"][0]
