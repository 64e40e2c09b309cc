"""Small models of any architecture with random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {  # under every name that configurations have for it
    "vocab_size": 300, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "ffn_dim": 48, "dff": 48, "max_position_embeddings": 64, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
    "is_decoder": True, "is_encoder_decoder": False,
}  # fmt: skip
LATENT_ATTENTION = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
OTHERS = {  # further settings that an architecture needs
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]},
    "bart": {"decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "falcon_h1": {**MAMBA_HEADS, "mamba_d_ssm": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "xlm": {"causal": True},
}  # fmt: skip


def small_config(model_type: str, **settings):
    """The configuration of an architecture with two narrow layers; its own name of each setting is used."""
    default = AutoConfig.for_model(model_type).get_text_config(decoder=True)
    known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    chosen = {name: value for name, value in SMALL.items() if name in known}
    return type(default)(**{**chosen, **OTHERS.get(model_type, {}), **settings})


def small_model(model_type: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(model_type, **settings), dtype=torch.float32).eval()
