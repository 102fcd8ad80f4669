"""A small EAGLE3 head beside a Qwen2.5-VL checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OF_TARGET = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_parameters",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def build_eagle3(target: Path, folder: Path, *, seed: int = 5) -> None:
    """Writes a head with 3-D rotary positions, of one layer with random weights.

    It passes the target's last hidden state on to the target's own norm and head, so that it is
    right wherever a token repeats.

    Args:
        target: a small Qwen2.5-VL checkpoint.
        folder: existing folder to write into.
        seed: of the weights.
    """
    text = json.loads((target / "config.json").read_text())["text_config"]
    config = {
        **{name: text[name] for name in OF_TARGET},
        "architectures": ["Eagle3Qwen2_5vlForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "num_hidden_layers": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "draft_vocab_size": text["vocab_size"],
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    width, inner, heads = text["hidden_size"], text["intermediate_size"], 32 * 2
    own = load_file(target / "model.safetensors")
    made = {
        "fc.weight": torch.cat([torch.zeros(width, 2 * width), torch.eye(width)], dim=1),
        "norm.weight": own["model.norm.weight"].clone(),
        "lm_head.weight": own["lm_head.weight"].clone(),
    }
    drawn = torch.Generator().manual_seed(seed)
    for name, *shape in (
        *((f"self_attn.{one}_proj", heads, 2 * width) for one in "qkv"),
        ("self_attn.o_proj", width, heads),
        *((f"mlp.{one}_proj", inner, width) for one in ("gate", "up")),
        ("mlp.down_proj", width, inner),
    ):
        made[f"midlayer.{name}.weight"] = 0.05 * torch.randn(*shape, generator=drawn)
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        made[f"midlayer.{name}.weight"] = torch.ones(width)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
