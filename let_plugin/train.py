"""Entry point: `let-train CONFIG.toml [--section.key VALUE ...]`, or torchrun with `-m let_plugin.train`.

Sets the host up, loads the configuration, checks it, and trains. Bad input ends with one clear message and exit code 2
before anything is written.
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from let_plugin.config import load
from let_plugin.config.errors import ConfigError, exit_with

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

USAGE = """\
usage: let-train CONFIG.toml [--check | --print-config] [--section.key VALUE ...]
       let-train new --base MODULE.FUNCTION --teacher PATH [--recipe] [--out FILE]

Trains a torchtitan configuration, given as TOML, with or without Late-to-Early Training.

  CONFIG.toml          base = "module.function", and tables that overlay its configuration
  --section.key VALUE  overrides one option, written as in TOML: --let.weight 0.2 --let.loss-options.beta 0.5
                       --let.pairs '[{student = 3, teacher = -1}]'
  --help [SECTION]     lists the options of the configuration, or of one of its sections: --help let
  --check              resolves and validates everything, prints the preflight report, trains nothing
  --print-config       prints the effective configuration as TOML, trains nothing
  --log plain|titan    a line per logged step (plain) or torchtitan's own output; under torchrun: --runtime.log
  new                  writes a configuration to start from, with comments

On N processes: torchrun --nproc-per-node N -m let_plugin.train CONFIG.toml ...
"""


def main(
    argv: list[str] | None = None,
    *,
    on_built: "Callable[[Trainer], None] | None" = None,
    on_loaded: "Callable[[Trainer.Config], None] | None" = None,
) -> None:
    """Runs the command line; SystemExit with code 2 for bad input.

    Args:
        argv: Its arguments; those of this process if not given.
        on_built: Called with the trainer before the first step, so that a caller can observe the run.
        on_loaded: Called with the configuration before it is checked, for what TOML cannot say.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    modes = {"--check", "--print-config"}.intersection(argv)
    try:
        if argv[0] == "new":
            from let_plugin.preflight import new_config

            return new_config.main(argv[1:])
        source = load.read([arg for arg in argv if arg not in modes])

        from let_plugin.runtime import host  # imports torch: not before `--help` and plain mistakes were dealt with

        host.set_up(source.runtime.device)
        loaded = load.resolve(source)
        if "--print-config" in modes:
            loaded.apply(lambda config: None)
            print(load.dump(loaded), end="")
            return
        if on_loaded is not None:
            on_loaded(loaded.config)

        from let_plugin.preflight import checks
        from let_plugin.runtime import data

        data.register()
        report = loaded.apply(checks.run)
        if os.environ["RANK"] == "0":
            print(report, flush=True)
        if "--check" not in modes:
            loaded.apply(lambda config: train(config, on_built))
    except ConfigError as error:
        exit_with(error)


def train(config: "Trainer.Config", on_built: "Callable[[Trainer], None] | None" = None) -> None:
    """Builds the trainer of a checked configuration, trains, and takes the process group down."""
    import torch
    from torchtitan.observability import structured_logger

    from let_plugin.runtime import console, host

    console.show(config.runtime.log)
    is_logged = config.debug.enable_structured_logging
    structured_logger.init_structured_logger(source="training", output_dir=config.dump_folder, enable=is_logged)
    host.adapt_model_spec(config.model_spec)
    trainer = config.build()
    try:
        if on_built is not None:
            on_built(trainer)
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
