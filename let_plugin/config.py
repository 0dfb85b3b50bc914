"""The `[let]` and `[runtime]` tables, and how they join a torchtitan configuration.

Importing this module imports neither torch nor torchtitan: `[runtime] device` has to be known before they are.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """The `[runtime]` table: where the run executes."""

    device: Literal["auto", "cpu"] = "auto"
    """
    "auto" takes the accelerator that torch reports, and the CPU if there is none; "cpu" takes the CPU (gloo) even
    where there is an accelerator.
    """


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The `[let.teacher]` table: the small, frozen, pretrained model."""

    path: str = ""
    """
    Where the teacher is: a folder in Hugging Face format (config.json + safetensors), a hub name ("org/name"), a
    .gguf file, or, together with `spec`, a folder with a torchtitan checkpoint (DCP) or Hugging Face safetensors.
    Relative paths are relative to the working directory, as torchtitan's are.
    """

    spec: str = ""
    """
    Name of a torchtitan ModelSpec: one added by `register_teacher_spec`, or "model:flavor" of torchtitan's own
    ("llama3:1B"). The teacher is then torchtitan code throughout. Empty: `transformers` builds it from `path`. A
    registered spec may bring its own `path` and `tokenizer_path`.
    """

    tokenizer_path: str = ""
    """Folder with the teacher's tokenizer.json. Empty: the teacher's own folder, or the GGUF file itself."""

    check_vocabulary: bool = True
    """
    Compare the teacher's vocabulary with the student's tokenizer token by token at start-up, and refuse a mismatch.
    Only turn it off for a teacher that comes without a tokenizer and is known to share the student's.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the teacher's weights and maths. "auto": the student's `training.mixed_precision_param`."""

    trust_remote_code: bool = False
    """Let `transformers` run Python code that comes with the checkpoint. Off: such a teacher is refused."""


@dataclass(kw_only=True, slots=True)
class LetConfig:
    """The `[let]` table. Its presence in a TOML file turns LET on; without it the run is plain torchtitan."""

    enable: bool = False
    """Turns LET on or off. A `[let]` table in a TOML file sets it, unless the table says `enable = false`."""

    weight: float = 0.1
    """lambda0, the weight of the alignment loss at step 0 (0.1: best of the paper's grid 0.01 ... 3)."""

    schedule: str = "linear"
    """How lambda falls from `weight` to 0 at the stop step. "linear" is the paper's."""

    stop_step: int | None = None
    """
    S_stop in optimizer steps: from this step on (0-based) lambda is 0 and the teacher is gone. Overrides
    `stop_fraction`.
    """

    stop_fraction: float = 0.5
    """
    S_stop as a fraction of `training.steps`, rounded down, when `stop_step` is not given. (The paper does not state
    its S_stop.)
    """

    layer_mapping: str = "L2E"
    """
    Which student block meets which teacher layer. "L2E" (the paper's): the teacher's last layer and the student's
    block at one third of its depth; "L2M", "L2L": at two thirds, and the last block.
    """

    student_block: int | None = None
    """0-based index of the student block whose output is aligned; overrides `layer_mapping`'s choice."""

    dimension_match: str = "interpolate"
    """
    How the teacher's width becomes the student's. "interpolate" (the paper's): 1-D linear along the channels.
    "linear": a linear map, learned with the student's optimizer settings, that starts as the interpolation.
    """

    align_corners: bool = False
    """Convention of the interpolation, as in torch.nn.functional.interpolate. (The paper does not state it.)"""

    loss: str = "cosine"
    """Alignment loss per token. "cosine": the negative cosine similarity (the paper's)."""

    math_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the alignment maths: resizing, normalising, the loss and its gradient."""

    target_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """
    Data type in which the teacher's state waits for the block's output (and travels between ranks). "auto": the
    teacher's.
    """

    cuda_graphs: bool = False
    """
    Keep torchtitan's CUDA graph capture while LET is on. Off until a run on a GPU has shown it to be right: LET then
    sets `training.disable_cuda_graphs`, and says so.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
