"""torchtitan configuration functions of the paper's scale: `base = "let_plugin.bench.paper.llama_1_4b_smollm"`.

The paper (arXiv 2602.05393) trains LLaMA-architecture students on The Pile with small public teachers, and states
neither their dimensions nor learning rate, batch and sequence length. What is chosen here, and in the TOML files in
train_configs/paper/ that overlay it, `docs/paper_scale.md` gives reasons for. There is one function for each pair of a
size and a vocabulary, since the student is trained on its teacher's tokenizer.
"""

from functools import partial
from typing import Any

from torchtitan.config import CompileConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.trainer import Trainer

from let_plugin.runtime.models import llama_spec, text_training

# Depth and width of Pythia-1.4B (arXiv 2304.01373, table 1) with LLaMA's SwiGLU, its width 8/3 of the model's, rounded
# up to a multiple of 128.
_1_4B = {"dim": 2048, "num_layers": 24, "num_heads": 16, "hidden_dim": 5504}
# Llama-3.2-3B. OpenLLaMA-3B, the other well-known LLaMA of that size, has heads of width 100, which attention kernels
# pad to 128; here they are 128 wide.
_3B = {"dim": 3072, "num_layers": 28, "num_heads": 24, "num_kv_heads": 8, "hidden_dim": 8192}
# LLaMA-7B (arXiv 2302.13971, table 2).
_7B = {"dim": 4096, "num_layers": 32, "num_heads": 32, "hidden_dim": 11_008}

# Rows of the teacher's own embedding. Those of OPT and Pythia are padded: their tokenizers have 50,265 and 50,277 ids.
_OPT, _PYTHIA, _SMOLLM, _LLAMA3 = 50_272, 50_304, 49_152, 128_256

_SEQ_LEN = 2048


def _config(flavor: str, dimensions: dict[str, Any], vocab_size: int) -> Trainer.Config:
    """What all runs have in common. Batch, steps and learning rate are in the TOML files."""
    # As Hugging Face's Llama. The alignment's gradient scales as 1/|h|, and torchtitan's 1.0 makes h large.
    size = {**dimensions, "vocab_size": vocab_size, "max_seq_len": _SEQ_LEN, "embedding_init_std": 0.02}
    config: Any = text_training(llama_spec(flavor, **size), "pile_train", "pile_validation")
    config.training.seq_len = _SEQ_LEN
    config.activation_checkpoint = SelectiveAC.Config()
    config.compile = CompileConfig(enable=True)
    config.validator.freq, config.validator.steps = 500, 20
    config.checkpoint.enable, config.checkpoint.interval = True, 1000
    return config


llama_1_4b_opt = partial(_config, "1.4B_opt", _1_4B, _OPT)
llama_1_4b_pythia = partial(_config, "1.4B_pythia", _1_4B, _PYTHIA)
llama_1_4b_smollm = partial(_config, "1.4B_smollm", _1_4B, _SMOLLM)
llama_3b_opt = partial(_config, "3B_opt", _3B, _OPT)
llama_3b_pythia = partial(_config, "3B_pythia", _3B, _PYTHIA)
llama_3b_smollm = partial(_config, "3B_smollm", _3B, _SMOLLM)
llama_7b_llama3 = partial(_config, "7B_llama3", _7B, _LLAMA3)
