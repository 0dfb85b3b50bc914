"""What the console says of a run: lines for people, and no warning of a library that its user can do nothing about."""

import logging
import os
import re
import sys
import warnings
from importlib.util import find_spec

STEPS = logging.getLogger("let_plugin.steps")  # what the one rank says that knows the loss: a line per logged step

# Warnings of libraries: (module, message). They are about code or machines that a user does not choose.
_WARNINGS = (
    (r"torch\.distributed\.tensor|torchtitan\.distributed\.utils", "DTensor .* support on cpu device mesh"),
    (r"torch\.distributed\.checkpoint", "torch.distributed is disabled, unavailable or uninitialized"),
    (r"torchdata\.stateful_dataloader", "'set_vital' is deprecated"),
    (r"torch\.(_inductor|optim\.lr_scheduler)", "Torchinductor .* for complex operators|To get the last learning rate"),
)
# The same of what they log: (logger, module, message). torchtitan logs to the root.
_LOGGED = (
    ("torch.utils._pytree", "_pytree", r".*register_constant\(\) on Enum subclasses is deprecated"),
    ("torch.utils.cpp_extension", "cpp_extension", "No CUDA runtime is found"),
    ("root", "utils", r"Error running lspci|Peak flops undefined for: CPU|ENV\[TORCH_NCCL_ASYNC"),
    ("root", "cudagraph", "CUDA graph capture is only supported"),
    ("root", "state_dict_adapter", "model.safetensors.index.json not found at hf_assets_path"),
    ("root", "metrics", ".*Pipeline Parallel loss is not visible"),  # it is: see STEPS
    ("root", "base", "initial_load_model_only=True has no effect"),  # config/load.py says so to those who have set it
)
# Of torchtitan's lines below a warning, those that tell a person something that the report has not told.
_KEPT = re.compile(
    r"\w+ capacity|Building device mesh.*=([2-9]|1\d)|Compiling each|TensorBoard|WandB|.*[Pp]rofil|.*memory snapshot"
    r"|Checkpointing active|Loading (the checkpoint|.*HF safetensors)|Training (starts|completed)"
    r"|Finished (saving|staging)|Last step checkpoint|Running with configs|Saved job configs"
)
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_TITAN = os.path.dirname(str(getattr(find_spec("torchtitan"), "origin", "")))


def quiet() -> None:
    """Silences `_WARNINGS` and `_LOGGED`, in this process and those that it forks; again: no-op."""
    for module, message in _WARNINGS:
        warnings.filterwarnings("ignore", message, module=module)
    for logger in {name for name, _, _ in _LOGGED}:
        logging.getLogger(logger).addFilter(_says_something)
    if not sys.stderr.isatty():  # a progress bar is none in a file
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def show(log: str) -> None:
    """Sets up the console's log: "titan", torchtitan's own, or "plain", of one rank, but for errors and `STEPS`."""
    from torchtitan.tools.logging import init_logger

    init_logger()
    if log == "plain":
        (handler,) = logging.getLogger().handlers
        handler.setFormatter(_Plain("%(asctime)s  %(who)s%(message)s", "%H:%M:%S"))
        handler.addFilter(_is_for_people)


def _says_something(record: logging.LogRecord) -> bool:
    return not any(
        (name, module) == (record.name, record.module) and re.match(message, record.getMessage())
        for name, module, message in _LOGGED
    )


def _is_for_people(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR or record.name == STEPS.name:
        return True
    if record.levelno >= logging.WARNING:
        return os.environ["LOCAL_RANK"] == "0"  # each machine's first rank: the others say the same
    is_librarys = record.name.startswith(("torchtitan.", "httpx")) or record.pathname.startswith(_TITAN)
    return os.environ["RANK"] == "0" and (not is_librarys or _KEPT.match(record.getMessage()) is not None)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        record.who = level if os.environ["RANK"] == "0" or not level else f"rank {os.environ['RANK']}, {level}"
        return _COLORS.sub("", super().format(record))
