"""Published teachers that torchtitan runs natively: their architecture, under names that `let.teacher.spec` takes.

The numbers are those of each model's config.json on the Hugging Face hub. The weights are not here: `let.teacher.path`
names the folder with the model's safetensors (and its tokenizer). `hf_config.py` compares the two.
"""

from collections.abc import Callable
from functools import partial

from torchtitan.protocols.model_spec import ModelSpec

from let_plugin.runtime.models import Llama3RopeScaling, llama_spec

_SMOLLM_135M = {"dim": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "hidden_dim": 1536}
_SMOLLM_360M = {"dim": 960, "num_layers": 32, "num_heads": 15, "num_kv_heads": 5, "hidden_dim": 2560}
_SMOLLM = {"vocab_size": 49_152, "rope_theta": 10_000.0, "max_seq_len": 2048}
_SMOLLM2 = {"vocab_size": 49_152, "rope_theta": 100_000.0, "max_seq_len": 8192}
_LLAMA_3_2_1B = {
    "dim": 2048,
    "num_layers": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "hidden_dim": 8192,
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "rope_scaling": Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "max_seq_len": 131_072,
}


def _spec(name: str, *shape: dict) -> Callable[[], ModelSpec]:
    options = {key: value for part in shape for key, value in part.items()}
    return partial(llama_spec, name, **options, norm_eps=1e-5, tie_embeddings=True)


# Name -> function that makes the ModelSpec anew.
BUILT_IN_SPECS: dict[str, Callable[[], ModelSpec]] = {
    name: _spec(name, *shape)
    for name, shape in {
        "smollm-135m": (_SMOLLM_135M, _SMOLLM),
        "smollm-360m": (_SMOLLM_360M, _SMOLLM),
        "smollm2-135m": (_SMOLLM_135M, _SMOLLM2),
        "smollm2-360m": (_SMOLLM_360M, _SMOLLM2),
        "llama-3.2-1b": (_LLAMA_3_2_1B,),
    }.items()
}
