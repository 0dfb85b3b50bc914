"""What keys and tables of torchtitan's own TOML files (up to version 0.2) are called now, and one of `[let]`.

Only for error messages: an old key is never translated silently, because many of them mean something slightly
different now. Not listed are keys that have moved to another table, where every unknown key is looked for, or whose new
name is so much like the old one that it is suggested.
"""

_CONVERTERS = "gone; float8, MX and LoRA are part of the model: choose a `base` that has them"

OLD_KEYS = {
    "let.target": 'let.signal = "states" (once "teacher"), "labels" or "logits"; several of them are [[let.terms]]',
    "job": "dump_folder is a top-level key, print_config and save_config_file are in [debug]; leave out the rest",
    "profiling": "[profiler]",
    "model": "`base` chooses the model; hf_assets_path (once tokenizer_path, too) is a top-level key",
    "experimental": "[parallelism] and [compile]; a function of your own is named in `base`",
    "validation": "[validator]; the data set is in [validator.dataloader]",
    "float8": _CONVERTERS,
    "mx": _CONVERTERS,
    "quantize": _CONVERTERS,
    "metrics.enable_color_printing": "metrics.disable_color_printing, with the opposite value",
    "metrics.rank_0_only": "metrics.save_for_all_ranks, with the opposite value",
    "optimizer.name": "optimizer.param_groups.0.optimizer_name",
    "optimizer.beta1": "optimizer.param_groups.0.optimizer_kwargs.betas = [beta1, beta2]",
    "optimizer.beta2": "optimizer.param_groups.0.optimizer_kwargs.betas = [beta1, beta2]",
    "optimizer.fused": 'optimizer.implementation = "fused", "foreach" or "for-loop"',
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.compile": "compile.enable",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "activation_checkpoint.mode": 'activation_checkpoint.type = "selective", "full", "memory-budget" or "none"',
    "activation_checkpoint.selective_ac_option": 'gone; type = "selective" is what "op" was',
}
