"""Load a causal LM from one GGUF file, quantised or not: configuration, tokenizer and weights as in transformers.

transformers needs 47 s for SmolLM2-135M instead of 5, and refuses to save the model. This module combines its parts: it
de-quantises the weights once a run, into an ordinary model that can be trained and saved as a folder.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer, reader
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from utils.script import UserError

# `general.architecture` of the file -> `model_type` of the configuration. All other look-ups use the name on the left:
# transformers lists the processor that subtracts 1 from Gemma's norms under "gemma3".
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
GGUF_ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
NEEDED_BY = {"qwen3": ("head_dim",), "gemma3": ("head_dim", "sliding_window")}
NOT_IN_THE_STATES = ("vocab_size", "tensor_data_layout", "final_logit_softcapping")  # settings that change no state
# Settings that no configuration made here can express; `load_config` refuses any other value.
ASSUMED = {"attention.causal": True, "rope.scaling.type": "none"}
ASSUMED_BY = {"gemma3": {"attention.sliding_window_pattern": 6, "rope.freq_base_swa": 1e4, "rope.local.freq_base": 1e4}}


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, reader.TensorInfo]]:
    """Settings and the table of weights. Raises UserError: no GGUF file, cut off, or of another architecture."""
    if not path.is_file():
        raise UserError(f"No file {path}. Correct --model_name, or fetch a model: python -m demo.real_llm smollm2")
    try:
        blob = np.memmap(path, mode="r")
        metadata, num_tensors, position = reader._read_metadata(blob, str(path))
        entries, position = reader._read_tensor_table(blob, num_tensors, position)
        start = position + -position % metadata.get("general.alignment", 32)
        tensors = {}
        for name, shape, kind, offset in entries:
            weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]  # weights and bytes of one block
            num_bytes = math.prod(shape) // weights * size
            tensors[name] = reader.TensorInfo(name, shape, kind, start + offset, num_bytes)
    except Exception as error:  # the bytes of a damaged header make the reader raise anything
        raise UserError(f"{path} is cut off or not a readable GGUF file ({error}). Fetch it again.") from None
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if len(blob) < end:
        raise UserError(f"{path} is cut off: it has {len(blob):,} of {end:,} bytes. Fetch it again.")
    if (architecture := metadata.get("general.architecture")) not in ARCHITECTURES:
        found = f"{path} holds a model of architecture {architecture!r}; readable are {', '.join(ARCHITECTURES)}"
        raise UserError(f"{found}. Take the model's folder or hub id instead.")
    return metadata, tensors


def quantisation(path: Path) -> str:
    """The file's own name of its quantisation (`Q4_1`, `F16`, ...), and the bits of a weight on average."""
    metadata, tensors = read_header(path)
    names = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    num_weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    name = names.get(metadata.get("general.file_type", -1), "unknown")
    return f"{name} ({8 * num_bytes / num_weights:.1f} bits a weight)"


def load_config(path: Path) -> PreTrainedConfig:
    """The model's configuration. Raises UserError: a setting is missing, wrong or unsupported."""
    metadata, tensors = read_header(path)
    architecture = metadata["general.architecture"]
    mapping: Any = GGUF_CONFIG_MAPPING
    names = {f"{architecture}.{theirs}": ours for theirs, ours in mapping[architecture].items()}
    names |= {f"{architecture}.attention.key_length": "head_dim"}
    names |= {f"tokenizer.{theirs}": ours for theirs, ours in mapping["tokenizer"].items()}
    found = {ours: metadata[theirs] for theirs, ours in names.items() if ours and theirs in metadata}
    found.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    if missing := [name for name in NEEDED + NEEDED_BY.get(architecture, ()) if not found.get(name)]:
        raise UserError(f"{path} does not state {', '.join(missing)}. Fetch the model again, or take its folder.")
    is_tied = "output.weight" not in tensors
    try:
        config = AutoConfig.for_model(ARCHITECTURES[architecture], **found, tie_word_embeddings=is_tied)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} states settings that do not fit together ({reason}). Fetch it again.") from None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assumed = {"rope.dimension_count": head_dim, "attention.value_length": head_dim, **ASSUMED}
    assumed |= ASSUMED_BY.get(architecture, {})
    for name, value in metadata.items():
        setting = name.removeprefix(f"{architecture}.")
        is_read = setting == name or name in names or setting in NOT_IN_THE_STATES
        is_as_assumed = value == assumed[setting] if setting in assumed else is_read or not value
        if not is_as_assumed:
            raise UserError(f"{path} states {name} = {value}, which is unsupported. Take the model's folder instead.")
    return config


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, padding on the right. Raises UserError: the file holds none that transformers knows."""
    read_header(path)
    try:
        architecture, vocabulary, options = get_gguf_tokenizer(str(path))
        backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"The tokenizer of {path} cannot be read ({error}). Name one with --tokenizer_name.") from None
    if vocabulary.get("pre_tokenizer_type") == "smollm":  # splits off each digit; transformers 5.23 does not know it
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **options)


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM on the CPU, de-quantised to `dtype`. Raises UserError: a weight is missing or misshapen."""
    config, (metadata, left) = load_config(path), read_header(path)
    architecture = metadata["general.architecture"]
    with torch.device("meta"):  # names and shapes only
        skeleton = AutoModelForCausalLM.from_config(config)
    expected, state = skeleton.state_dict(), {}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    names = gguf.get_tensor_name_map(GGUF_ARCHITECTURES[architecture], config.num_hidden_layers)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    blob = np.memmap(path, mode="r")
    for name, weight in expected.items():
        module, _, suffix = name.rpartition(".")
        stored_name = f"{names.get_name(module)}.{suffix}"
        stored = left.pop(stored_name, None)
        if stored is None or stored.shape != tuple(weight.shape):
            found = "nothing" if stored is None else stored.shape
            raise UserError(f"{path} has {found} for {stored_name}, not {tuple(weight.shape)}. Fetch it again.")
        rows = blob[stored.offset : stored.offset + stored.nbytes].reshape(*stored.shape[:-1], -1)
        weights = gguf.dequantize(rows, gguf.GGMLQuantizationType(stored.ggml_type))
        state[name] = torch.tensor(processor.process(weights=weights, name=stored_name).weights, dtype=dtype)
    if left:
        raise UserError(f"{path} holds {sorted(left)[0]}, which a {architecture} model does not use. Take its folder.")
    return type(skeleton).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
