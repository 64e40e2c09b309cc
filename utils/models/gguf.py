"""Causal LMs in one GGUF file, quantised or not: configuration, tokenizer and weights as transformers has them.

transformers reads these files too, but parses the vocabulary anew for each of the three and twice for the weights: 47 s
for SmolLM2-135M instead of 5. So its own parts are put together here: its fast reader of the header, its names of the
settings, its tokenizers, its order of the rows. The weights are de-quantised once a run, into an ordinary model that
can be trained and saved as a folder; transformers refuses to save the one that it makes of a GGUF file.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf import reader as header
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from utils.script import ROOT, UserError

SMOLLM2 = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in `models_dir()`
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


class StoredTensor(NamedTuple):
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int  # in bytes
    end: int


class Header(NamedTuple):
    """All of a GGUF file but its weights."""

    metadata: dict  # of the vocabulary's arrays the length only
    tensors: dict[str, StoredTensor]  # by the name the file gives them


def models_dir() -> Path:
    """Where fetched models lie: $NTPS_MODELS_DIR, which several clones can share, or demo/runs."""
    return Path(os.environ.get("NTPS_MODELS_DIR") or ROOT / "demo" / "runs")


def is_gguf(model_name: str) -> bool:
    """Whether `model_name` is the path of a GGUF file."""
    return model_name.lower().endswith(".gguf")


def read_header(path: Path) -> Header:
    """The settings and the table of weights of a GGUF file.

    Raises:
        UserError: no such file, not GGUF, cut off, or of an architecture that is not read here.
    """
    if not path.is_file():
        raise UserError(f"No file {path}. `--model_name smollm2` names the model that python -m demo.smollm2 fetches.")
    size = path.stat().st_size
    try:
        blob = np.memmap(path, mode="r")
        metadata, num_tensors, position = header._read_metadata(blob, str(path))
        entries, position = header._read_tensor_table(blob, num_tensors, position)
        alignment = metadata.get("general.alignment", 32)
        start = -(-position // alignment) * alignment
        tensors = {name: place(shape, kind, start + offset) for name, shape, kind, offset in entries}
    except struct.error:  # a number was to be read behind the end
        raise UserError(f"{path} is cut off: it ends within its header, at {size:,} bytes. Fetch it again.") from None
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a readable GGUF file ({error}). Fetch it again.") from None
    end = max((tensor.end for tensor in tensors.values()), default=start)
    if size < end:
        raise UserError(f"{path} is cut off: it has {size:,} of {end:,} bytes. Fetch it again.")
    if (architecture := metadata["general.architecture"]) not in ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r}; from GGUF files these are read: "
            f"{', '.join(ARCHITECTURES)}. Take the model's folder or hub id instead."
        )
    return Header(metadata, tensors)


def place(shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
    """Where a tensor that starts at byte `start` ends."""
    quantisation = gguf.GGMLQuantizationType(kind)
    weights, size = gguf.GGML_QUANT_SIZES[quantisation]  # of one block
    return StoredTensor(shape, quantisation, start, start + math.prod(shape) // weights * size)


def quantisation(path: Path) -> str:
    """How most of the weights are stored, as the file says: `Q4_1`, `Q8_0`, `F16`, ..."""
    file_type = read_header(path).metadata.get("general.file_type", -1)
    try:
        return gguf.LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown"


def load_config(path: Path) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        UserError: of `read_header`, or a setting is missing.
    """
    return config_of(read_header(path), path)


def config_of(file: Header, path: Path) -> PreTrainedConfig:
    """The configuration that a header states.

    Raises:
        UserError: a setting is missing, or the positions are scaled, which a configuration made here would not say.
    """
    architecture = file.metadata["general.architecture"]
    mapping: Any = GGUF_CONFIG_MAPPING
    found = {
        ours: file.metadata[f"{group}.{theirs}"]
        for group in (architecture, "tokenizer")
        for theirs, ours in mapping[group].items()
        if ours and f"{group}.{theirs}" in file.metadata
    }
    found.setdefault("vocab_size", file.metadata.get("tokenizer.ggml.tokens"))
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if not found.get(name)]:
        raise UserError(f"{path} does not state {', '.join(missing)}. Fetch the model again, or take its folder.")
    if scaling := [name for name in file.metadata if ".rope.scaling." in name]:
        raise UserError(f"{path} scales its positions ({scaling[0]}), which is not read here. Take the model's folder.")
    if f"{architecture}.attention.key_length" in file.metadata:
        found["head_dim"] = file.metadata[f"{architecture}.attention.key_length"]
    try:
        return AutoConfig.for_model(architecture, **found, tie_word_embeddings="output.weight" not in file.tensors)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} states settings that do not fit together ({reason}). Fetch it again.") from None


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, padding on the right.

    Raises:
        UserError: of `read_header`, or the file holds no tokenizer that transformers knows.
    """
    read_header(path)
    try:
        architecture, vocabulary, options = get_gguf_tokenizer(str(path))
        backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"The tokenizer of {path} cannot be read ({error}). Name one with --tokenizer_name.") from None
    if (
        vocabulary.get("pre_tokenizer_type") == "smollm"
    ):  # splits off each digit first; transformers 5.23 does not know it
        digits, words = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = PreTokenizers([digits, words])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **options)


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM on the CPU, its weights de-quantised.

    Args:
        path: the GGUF file.
        dtype: of the de-quantised weights.

    Raises:
        UserError: of `read_header` and `config_of`, or the weights are not those of the architecture.
    """
    file = read_header(path)
    config = config_of(file, path)
    state = state_dict(file, config, path, dtype)
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return causal_lm.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def state_dict(file: Header, config: PreTrainedConfig, path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by the names that the causal LM gives them.

    Raises:
        UserError: a weight is missing, has another shape, or is not known to the architecture.
    """
    with torch.device("meta"):  # names and shapes only
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
    blob = np.memmap(path, mode="r")
    state, left = {}, dict(file.tensors)
    for name, weight in expected.items():
        module, _, suffix = name.rpartition(".")
        stored_name = f"{names.get_name(module)}.{suffix}"
        stored = left.pop(stored_name, None)
        if stored is None or stored.shape != tuple(weight.shape):
            found = "nothing" if stored is None else stored.shape
            raise UserError(f"{path} has {found} for {stored_name}, not {tuple(weight.shape)}. Fetch it again.")
        weights, size = gguf.GGML_QUANT_SIZES[stored.kind]
        rows = blob[stored.start : stored.end].reshape(*stored.shape[:-1], stored.shape[-1] // weights * size)
        values = processor.process(weights=gguf.dequantize(rows, stored.kind), name=stored_name).weights
        state[name] = torch.tensor(values, dtype=dtype)
    if left:
        raise UserError(f"{path} holds {sorted(left)[0]}, which a {config.model_type} model here would not use.")
    return state
