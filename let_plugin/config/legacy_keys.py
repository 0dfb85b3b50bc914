"""What the keys of torchtitan's own TOML files (up to version 0.2) are called in torchtitan 0.3.0.

Only for error messages: an old key is never translated silently, because many of them mean something slightly
different now. A unit test proves that every key here is gone and that every new name exists.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class OldKey:
    """One key, or a whole table, of torchtitan <= 0.2.

    Attributes:
        new: Dotted key in torchtitan 0.3.0, for a table the table's; None if there is none.
        note: What else to know, or what to do instead.
    """

    new: str | None = None
    note: str = ""


_KWARGS = "optimizer.param_groups.0.optimizer_kwargs"
_BASE_CHOOSES_MODEL = OldKey("base", 'the configuration function chooses the model: base = "llama3.llama3_debugmodel"')
_CONVERTERS = OldKey(
    None, "converters (float8, MX, NVFP4, LoRA) are part of the model specification: choose a `base` that has them"
)
_ESTIMATION = OldKey(None, 'comm.mode = "fake_backend" runs without communication')
_FAULT_TOLERANCE = OldKey(None, "choose a `base` in torchft.llama3")

OLD_KEYS: dict[str, OldKey] = {
    "job": OldKey(),
    "job.config_file": OldKey(None, "give the TOML file as the first argument"),
    "job.custom_config_module": OldKey(None, "subclass the Config class in Python and name a function in `base`"),
    "job.dump_folder": OldKey("dump_folder", "a top-level key"),
    "job.print_args": OldKey("debug.print_config"),
    "job.print_config": OldKey("debug.print_config"),
    "job.save_config_file": OldKey("debug.save_config_file"),
    "profiling": OldKey("profiler"),
    "metrics.enable_color_printing": OldKey("metrics.disable_color_printing", "with the opposite value"),
    "metrics.rank_0_only": OldKey("metrics.save_for_all_ranks", "with the opposite value"),
    "model": OldKey(),
    "model.name": _BASE_CHOOSES_MODEL,
    "model.flavor": _BASE_CHOOSES_MODEL,
    "model.norm_type": _BASE_CHOOSES_MODEL,
    "model.hf_assets_path": OldKey("hf_assets_path", "a top-level key"),
    "model.tokenizer_path": OldKey("hf_assets_path", "a top-level key; a folder with tokenizer.json"),
    "model.converters": _CONVERTERS,
    "optimizer.name": OldKey("optimizer.param_groups.0.optimizer_name"),
    "optimizer.lr": OldKey(f"{_KWARGS}.lr"),
    "optimizer.beta1": OldKey(f"{_KWARGS}.betas", "[beta1, beta2]"),
    "optimizer.beta2": OldKey(f"{_KWARGS}.betas", "[beta1, beta2]"),
    "optimizer.eps": OldKey(f"{_KWARGS}.eps"),
    "optimizer.weight_decay": OldKey(f"{_KWARGS}.weight_decay"),
    "optimizer.fused": OldKey("optimizer.implementation", '"fused", "foreach" or "for-loop"'),
    "optimizer.early_step_in_backward": OldKey(),
    "lr_scheduler.lr_min": OldKey("lr_scheduler.min_lr_factor"),
    "training.batch_size": OldKey("training.local_batch_size"),
    "training.dataset": OldKey("dataloader.dataset"),
    "training.dataset_path": OldKey("dataloader.dataset_path"),
    "training.dataloader": OldKey("dataloader"),
    "training.warmup_steps": OldKey("lr_scheduler.warmup_steps"),
    "training.seed": OldKey("debug.seed"),
    "training.deterministic": OldKey("debug.deterministic"),
    "training.debug_moe_force_load_balance": OldKey("debug.moe_force_load_balance"),
    "training.compile": OldKey("compile.enable"),
    "training.data_parallel_degree": OldKey("parallelism.data_parallel_shard_degree"),
    "training.data_parallel_replicate_degree": OldKey("parallelism.data_parallel_replicate_degree"),
    "training.data_parallel_shard_degree": OldKey("parallelism.data_parallel_shard_degree"),
    "training.fsdp_reshard_after_forward": OldKey("parallelism.fsdp_reshard_after_forward"),
    "training.tensor_parallel_degree": OldKey("parallelism.tensor_parallel_degree"),
    "training.disable_loss_parallel": OldKey(),
    "training.enable_loss_parallel": OldKey(),
    "parallelism.enable_async_tensor_parallel": OldKey("compile.enable_async_tensor_parallel"),
    "parallelism.disable_loss_parallel": OldKey(),
    "parallelism.enable_compiled_autograd": OldKey(),
    "parallelism.context_parallel_rotate_method": OldKey(),
    "parallelism.pipeline_parallel_split_points": OldKey("parallelism.module_fqns_per_model_part"),
    "parallelism.pipeline_parallel_expert_parallel_overlap": OldKey(),
    "parallelism.expert_tensor_parallel_degree": OldKey(),
    "parallelism.expert_parallel_comm_backend": OldKey(
        None, "part of the model specification: choose a `base` that has it"
    ),
    "experimental": OldKey(),
    "experimental.custom_import": OldKey(None, "name a function of your own module in `base`"),
    "experimental.custom_args_module": OldKey(None, "name a function of your own module in `base`"),
    "experimental.custom_model_path": OldKey(None, "name a function of your own module in `base`"),
    "experimental.context_parallel_degree": OldKey("parallelism.context_parallel_degree"),
    "experimental.pipeline_parallel_degree": OldKey("parallelism.pipeline_parallel_degree"),
    "experimental.pipeline_parallel_schedule": OldKey("parallelism.pipeline_parallel_schedule"),
    "experimental.pipeline_parallel_schedule_csv": OldKey("parallelism.pipeline_parallel_schedule_csv"),
    "experimental.pipeline_parallel_split_points": OldKey("parallelism.module_fqns_per_model_part"),
    "experimental.pipeline_parallel_microbatches": OldKey(
        "parallelism.pipeline_parallel_microbatch_size", "the size of a microbatch, not their number"
    ),
    "experimental.enable_async_tensor_parallel": OldKey("compile.enable_async_tensor_parallel"),
    "checkpoint.enable_checkpoint": OldKey("checkpoint.enable"),
    "checkpoint.model_weights_only": OldKey("checkpoint.last_save_model_only"),
    "checkpoint.last_save_model_weights_only": OldKey("checkpoint.last_save_model_only"),
    "checkpoint.initial_load_model_weights_only": OldKey("checkpoint.initial_load_model_only"),
    "checkpoint.interval_type": OldKey(None, "the interval counts steps"),
    "checkpoint.enable_ft_dataloader_checkpoints": _FAULT_TOLERANCE,
    "activation_checkpoint.mode": OldKey(
        "activation_checkpoint.type", '"selective", "full", "memory-budget" or "none"'
    ),
    "activation_checkpoint.selective_ac_option": OldKey(None, 'type = "selective" is what "op" was'),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": OldKey(
        "activation_checkpoint.force_recompute_mm_shapes_by_fqns"
    ),
    "activation_checkpoint.early_stop": OldKey(),
    "validation": OldKey("validator"),
    "validation.dataset": OldKey("validator.dataloader.dataset"),
    "validation.dataset_path": OldKey("validator.dataloader.dataset_path"),
    "validation.local_batch_size": OldKey("training.local_batch_size", "which validation uses, too"),
    "validation.seq_len": OldKey("training.seq_len", "which validation uses, too"),
    "float8": _CONVERTERS,
    "mx": _CONVERTERS,
    "quantize": _CONVERTERS,
    "memory_estimation": _ESTIMATION,
    "fault_tolerance": _FAULT_TOLERANCE,
}


def explain(key: str) -> str | None:
    """What an old key is called now, as a sentence; None if `key` was never one of torchtitan's."""
    table, rest = key, ""
    while table not in OLD_KEYS:
        table, dot, last = table.rpartition(".")
        if not dot:
            return None
        rest = f".{last}{rest}"
    old = OLD_KEYS[table]
    note = f" ({old.note})" if old.note else ""
    if old.new is None:
        return f"an old torchtitan key that torchtitan 0.3 does not have{note}"
    return f"an old torchtitan key; torchtitan 0.3 calls it {old.new}{rest}{note}"
