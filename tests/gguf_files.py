"""Writes a small model as a GGUF file, as llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from utils.models.gguf import ARCHITECTURES, GGUF_ARCHITECTURES


def architecture_of(config: PreTrainedConfig) -> str:
    """The name of a model's architecture in a GGUF file."""
    return next(name for name, model_type in ARCHITECTURES.items() if model_type == config.model_type)


def interleave_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj in the order that llama.cpp rotates: each head's (2, dim / 2) becomes (dim / 2, 2)."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    quantisation: str = "F32",
    architecture: str | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, float | str] | None = None,
    pre_tokenizer: str = "gpt-2",
    bos_token_id: int | None = None,
) -> Path:
    """A causal LM and its byte-level BPE tokenizer in one file.

    Settings and weights named in `without` are left out, `extra` settings are added; `pre_tokenizer` names the rule
    that cuts a text into words; the tokenizer puts `bos_token_id` before each text unless it is None.
    """
    config = model.config
    name = architecture or architecture_of(config)
    writer = gguf.GGUFWriter(path, name)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    settings = {f"{name}.{key}": value for key, value in numbers.items() if key not in without} | (extra or {})
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        add[type(value)](key, value)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if quantisation == 'F32' else 'MOSTLY'}_{quantisation}"])
    add_tokenizer(writer, tokenizer, pre_tokenizer, bos_token_id)
    add_weights(writer, model, gguf.GGMLQuantizationType[quantisation], without)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre_tokenizer: str, bos_token_id: int | None
) -> None:
    """Vocabulary, merges and the end-of-text token."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([kinds[i in tokenizer.all_special_ids] for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(bos_token_id is not None)
    if bos_token_id is not None:
        writer.add_bos_token_id(bos_token_id)


def add_weights(
    writer: gguf.GGUFWriter, model: PreTrainedModel, kind: gguf.GGMLQuantizationType, without: tuple[str, ...]
) -> None:
    """Every weight by its GGUF name; norms and biases stay float32."""
    config = model.config
    names = gguf.get_tensor_name_map(GGUF_ARCHITECTURES[architecture_of(config)], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for hf_name, weight in model.state_dict().items():
        module, _, suffix = hf_name.rpartition(".")
        name = f"{names.get_name(module)}.{suffix}"
        if name in without or (hf_name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = weight.float().numpy()
        if config.model_type == "llama" and module.endswith(tuple(heads)):
            values = interleave_halves(values, heads[module.rpartition(".")[2]])
        if config.model_type == "gemma3_text" and "norm" in name:
            values = values + 1  # the file holds the factor itself
        is_exact = values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]
        own = gguf.GGMLQuantizationType.F32 if is_exact else kind
        writer.add_tensor(name, gguf.quantize(values, own), raw_dtype=own)
