"""Load a causal LM, tokenise in bulk, visit its hidden states one layer at a time, and pool them."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

import utils.openelm  # noqa: F401, registers the `openelm` architecture with the Auto classes
from utils import gguf
from utils.hub import Repository, hub_errors, nearest
from utils.io import ROOT, UserError
from utils.settings import Model, Run


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """What one architecture needs beyond the AutoModel defaults."""

    lora_target_modules: tuple[str, ...]  # the attention input projections
    tokenizer_name: str | None = None  # None: the tokenizer of the model's own repository


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One row of the table of models the repository knows by name."""

    path: str  # hub id, or folder relative to the repository root
    parameters: str
    access: str  # what a user has to accept before the download, and where


FAMILIES = {  # keyed by `config.model_type`
    "qwen2": ModelFamily(("q_proj", "k_proj", "v_proj")),
    "llama": ModelFamily(("q_proj", "k_proj", "v_proj")),
    "openelm": ModelFamily(("qkv_proj",), tokenizer_name="meta-llama/Llama-2-7b-hf"),
}
OPEN = "open"
LLAMA_2 = "tokenizer: accept the licence of meta-llama/Llama-2-7b-hf, or --tokenizer_name mlx-community/OpenELM-270M"
MODELS = {
    "tiny": ModelSpec("demo/tiny-lm", "1.4M", "in this repository"),
    "micro": ModelSpec("demo/runs/micro", "0.4M", "python -m demo.pretrain --size micro"),
    "small": ModelSpec("demo/runs/small", "3.7M", "python -m demo.pretrain --size small"),
    "medium": ModelSpec("demo/runs/medium", "12M", "python -m demo.pretrain --size medium"),
    "large": ModelSpec("demo/runs/large", "29M", "python -m demo.pretrain --size large"),
    "smollm2": ModelSpec(f"demo/runs/{gguf.SMOLLM2}", "135M", "python -m demo.smollm2"),
    "Qwen/Qwen2-0.5B": ModelSpec("Qwen/Qwen2-0.5B", "0.5B", OPEN),
    "Qwen/Qwen2-1.5B": ModelSpec("Qwen/Qwen2-1.5B", "1.5B", OPEN),
    "Qwen/Qwen2-7B": ModelSpec("Qwen/Qwen2-7B", "7B", OPEN),
    "apple/OpenELM-270M": ModelSpec("apple/OpenELM-270M", "270M", LLAMA_2),
    "apple/OpenELM-450M": ModelSpec("apple/OpenELM-450M", "450M", LLAMA_2),
    "apple/OpenELM-1_1B": ModelSpec("apple/OpenELM-1_1B", "1.1B", LLAMA_2),
    "apple/OpenELM-3B": ModelSpec("apple/OpenELM-3B", "3B", LLAMA_2),
    "meta-llama/Meta-Llama-3-8B": ModelSpec(
        "meta-llama/Meta-Llama-3-8B", "8B", "accept the licence at huggingface.co/meta-llama/Meta-Llama-3-8B"
    ),
}


# ------------------------------------------------------------------ loading
def model_source(model_name: str) -> str:
    """The hub id, local folder or GGUF file that `model_name` stands for.

    Raises:
        UserError: a model of the demo that is not there yet, or a folder without a model.
    """
    if model_name == "smollm2":
        if not (path := gguf.models_dir() / gguf.SMOLLM2).is_file():
            raise UserError(f"No model at {path}. Run: python -m demo.smollm2")
        return str(path)
    if gguf.is_gguf(model_name):
        return model_name
    spec = MODELS.get(model_name)
    if spec and spec.path.startswith("demo/"):
        if not (ROOT / spec.path / "config.json").is_file():
            raise UserError(f"No model at {spec.path}. Run: python -m demo.pretrain --size {model_name}")
        return str(ROOT / spec.path)
    if Path(model_name).is_dir() and not (Path(model_name) / "config.json").is_file():
        raise UserError(f"No model in {model_name}: it holds no config.json. Give a folder made by save_pretrained.")
    if (model_name.startswith((".", "/", "~")) or model_name.count("/") > 1) and not Path(model_name).is_dir():
        raise UserError(f"There is no folder {model_name}.{nearest(model_name, MODELS)} See --model_name.")
    return spec.path if spec else model_name


def repository(name: str, revision: str | None = None) -> Repository:
    """A model or tokenizer, for the sentence about what goes wrong with it."""
    source = MODELS[name].path if name in MODELS else name
    folder = ROOT / source if source.startswith("demo/") else Path(source)
    known = (*MODELS, "gpt2", "distilgpt2")
    return Repository(name, "Model", known, "a local folder, or --model_name tiny", revision, folder=folder)


def read_config(model: Model, run: Run) -> PreTrainedConfig:
    """The configuration as the model has it, of all its parts.

    Raises:
        UserError: there is no such model, or it is an encoder-decoder.
    """
    if gguf.is_gguf(source := model_source(model.model_name)):
        return gguf.load_config(Path(source))
    with hub_errors(repository(model.model_name, model.revision)):
        config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=run.trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{model.model_name} ({config.model_type}) is an encoder-decoder; NTPS is of a causal LM, a decoder that "
            "reads the text alone. Choose another --model_name; docs/architectures.md lists what can be used."
        )
    return config


def load_config(model: Model, run: Run) -> PreTrainedConfig:
    """The configuration of the model, of a multi-modal one that of its text decoder.

    Raises:
        UserError: of `read_config`, or the text decoder cannot be told.
    """
    config = read_config(model, run)
    with hub_errors(repository(model.model_name, model.revision)):
        text_config = config.get_text_config(decoder=True)
    text_config._commit_hash = getattr(config, "_commit_hash", None)
    return text_config


def load_tokenizer(model: Model, run: Run, config: PreTrainedConfig) -> Tokenizer:
    """The tokenizer; a long text loses its end, whatever the tokenizer's own settings say.

    Raises:
        UserError: of `hub_errors`.
    """
    name, revision = model_source(model.model_name), model.revision
    family = FAMILIES.get(config.model_type)
    if model.tokenizer_name:
        name, revision = model.tokenizer_name, None
    elif family and family.tokenizer_name and not Path(name, "tokenizer_config.json").is_file():
        name, revision = family.tokenizer_name, None
    if gguf.is_gguf(name):
        return gguf.load_tokenizer(Path(name))
    sought = repository(name, revision)
    with hub_errors(dataclasses.replace(sought, kind="Tokenizer of", instead="--tokenizer_name for an open copy")):
        return AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            padding_side="right",
            truncation_side="right",
            trust_remote_code=run.trust_remote_code,
        )


def load_weights(model: Model, run: Run) -> PreTrainedModel:
    """The causal LM on the CPU; of a multi-modal model all of it.

    Raises:
        UserError: `hub_errors`, an architecture without causal LM, a weight of another shape, or one of the decoder
            that the checkpoint lacks; the library would fill it with random numbers.
    """
    if gguf.is_gguf(source := model_source(model.model_name)):
        return gguf.load_model(Path(source), getattr(torch, model.dtype))
    config = read_config(model, run)
    is_causal = type(config) in AutoModelForCausalLM._model_mapping  # type: ignore[attr-defined]
    is_visual = type(config) in AutoModelForImageTextToText._model_mapping  # type: ignore[attr-defined]
    auto_class: Any = AutoModelForImageTextToText if is_visual and not is_causal else AutoModelForCausalLM
    if not is_causal and not is_visual and "AutoModelForCausalLM" not in getattr(config, "auto_map", {}):
        raise UserError(
            f"{model.model_name} ({config.model_type}) is not a causal LM: transformers has none of this architecture. "
            "Choose another --model_name; docs/architectures.md lists what can be used."
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports what is left out, which is what we want
    try:
        with hub_errors(repository(model.model_name, model.revision)):
            loaded, info = auto_class.from_pretrained(
                source,
                revision=model.revision,
                dtype=getattr(torch, model.dtype),
                trust_remote_code=run.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # said below, by name
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    for name, stored, wanted in info["mismatched_keys"]:
        raise UserError(
            f"{model.model_name}: {name} is {tuple(stored)} in its files and {tuple(wanted)} by its config.json. One "
            "of them is of another model: download it again."
        )
    decoder = decoder_of(loaded)
    [place] = [name for name, module in loaded.named_modules() if module is decoder]
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(f"{place}.")):
        raise UserError(f"{model.model_name} lacks {len(missing)} weights, the first is {missing[0]}. Load it anew.")
    return loaded


def decoder_of(causal_lm: Any) -> Any:
    """The decoder inside a causal LM: what gives the hidden states that its head reads.

    Raises:
        UserError: it is not apart from the head.
    """
    base = causal_lm.base_model
    if base is causal_lm:
        parts = [module for module in causal_lm.children() if isinstance(module, PreTrainedModel)]
        if len(parts) != 1:
            raise UserError(f"{type(causal_lm).__name__} has no decoder apart from its head; it cannot be used.")
        base = parts[0]
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if num_layers := getattr(decoder.config, "decoder_layers", None):  # BART: `num_hidden_layers` is the encoder's
        decoder.config.num_hidden_layers = num_layers
    return decoder


def load_causal_lm(model: Model, run: Run, device: torch.device) -> PreTrainedModel:
    """The causal LM in evaluation mode, with a LoRA adapter merged if one is named.

    Raises:
        UserError: of `load_weights`, or of `merge_adapter`.
    """
    causal_lm: Any = load_weights(model, run)
    if model.adapter_dir is not None:
        from utils.adapters import merge_adapter  # only where one is asked for: the import of PEFT takes a second

        causal_lm = merge_adapter(causal_lm, model, run)
    return causal_lm.to(device).eval()


def load_base_model(model: Model, run: Run, device: torch.device) -> PreTrainedModel:
    """The decoder without its lm_head, in evaluation mode: what hidden states are read from."""
    decoder = decoder_of(load_causal_lm(model, run, torch.device("cpu")))
    return decoder.to(device).eval()


# ------------------------------------------------------------------ identity
# what of a folder decides the states: weights, architecture, tokens, code
DECIDING_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.py")
# what it may hold besides, which decides nothing
OTHER_FILES = (
    "pretraining.json",
    "generation_config.json",
    "training_args.bin",
    "metrics.json",
    "README.txt",
    "base_model.json",
)


@functools.lru_cache(maxsize=256)
def file_digest(path: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file; its size and time of change are arguments so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def local_fingerprint(place: Path) -> str:
    """First 16 hex digits of the SHA-256 over the names and contents of the files that decide a model's states.

    Args:
        place: folder, or a GGUF file, whose own name decides nothing.
    """
    digest = hashlib.sha256()
    if place.is_file():
        stat = place.stat()
        return file_digest(place, stat.st_size, stat.st_mtime_ns).hex()[:16]
    for path in sorted({path for pattern in DECIDING_FILES for path in place.glob(pattern)}):
        if path.name not in OTHER_FILES:
            stat = path.stat()
            digest.update(path.name.encode() + b"\0" + file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:16]


def model_fingerprint(model: Model, run: Run) -> str:
    """What tells two models of the same name apart: of a local one a SHA-256, of the hub's its commit; of each part.

    The parts are the model, a tokenizer or an adapter from elsewhere, joined by `+`.
    """
    source = model_source(model.model_name)
    parts = [local_fingerprint(Path(source))] if Path(source).exists() else []
    if not parts:
        config = load_config(model, run)
        parts.append(getattr(config, "_commit_hash", None) or model.revision or "unknown")
    parts += [
        local_fingerprint(Path(place))
        for place in (model.tokenizer_name, model.adapter_dir)
        if place is not None and Path(place).exists()
    ]
    return "+".join(parts)


def known_fingerprint(model: Model, run: Run) -> str | None:
    """As `model_fingerprint`, None where the model is not on this machine: moments can be solved without it."""
    if model.adapter_dir is not None and not model.adapter_dir.is_dir():
        return None
    try:
        return model_fingerprint(model, run)
    except UserError:
        return None


def stored_as(model: Model) -> dict[str, str]:
    """`quantisation`, for what is kept about a result of a model in a GGUF file; nothing for any other."""
    if not gguf.is_gguf(source := model_source(model.model_name)):
        return {}
    return {"quantisation": f"{gguf.quantisation(Path(source))}, de-quantised once a run to {model.dtype}"}


# ------------------------------------------------------------------ tokens
@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of n texts, end to end in one array: 4 bytes a token however many texts."""

    token_ids: np.ndarray  # (num_tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, text i is token_ids[offsets[i] : offsets[i + 1]]
    max_length: int | None  # None: no limit

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per text, (n,)."""
        return np.diff(self.offsets)

    def pad(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """`input_ids` (b, t), and `lengths` (b,); right-padded with each text's own last token.

        No valid token sees the padding, but 0 times a state that is not finite is not 0: an embedding that no text
        uses must not come in.
        """
        lengths = self.lengths[indices]
        positions = np.arange(lengths.max())
        at = self.offsets[indices][:, None] + np.minimum(positions, lengths[:, None] - 1)
        input_ids = self.token_ids[at].astype(np.int64)
        return torch.from_numpy(input_ids), torch.from_numpy(lengths)


NO_LIMIT = 10**9  # what a tokenizer says that knows no length is far above


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest text the model can read, None where its configuration sets no limit, as that of a recurrent model."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "context_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def tokenize(
    texts: list[str], tokenizer: Tokenizer, config: PreTrainedConfig, max_length: int | None = None
) -> TokenizedTexts:
    """All texts as token ids, truncated to `max_length` or to the model's context, if it has one.

    Raises:
        UserError: a text without any token, a tokenizer that is not the model's, or a length that it cannot read.
    """
    limit = context_length(config)
    if max_length and limit and max_length > limit:
        raise UserError(f"--max_length {max_length} is more than the model can read: {limit} tokens. Lower it.")
    if max_length is None:
        own = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
        max_length = min((length for length in (limit, own) if length), default=None)
    chunks: list[np.ndarray] = []
    lengths: list[int] = []
    for start in tqdm(range(0, len(texts), 4096), desc="tokenize", unit="chunk", leave=False):
        chunk = texts[start : start + 4096]
        encoded = tokenizer(
            chunk,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        lengths.extend(map(len, encoded))
        chunks.append(np.fromiter((token for ids in encoded for token in ids), dtype=np.int32))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        first = texts[empty[0]]
        raise UserError(f"{len(empty)} texts have no token, the first is row {empty[0]}: {first!r}. Remove them.")
    token_ids = np.concatenate(chunks)
    if token_ids.max() >= config.vocab_size:
        raise UserError(
            f"The tokenizer gives token {token_ids.max()}, the model knows {config.vocab_size}: "
            "they do not belong together. Name the right one with --tokenizer_name."
        )
    return TokenizedTexts(token_ids, offsets, max_length)


# ------------------------------------------------------------------ hidden states
def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a base model: of the lists of that length the one that holds most of the weights.

    `self_check` finds out whether they are what they seem.

    Raises:
        UserError: no list of `num_hidden_layers` modules is found.
    """
    num_layers = model.config.num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers to read hidden states from."
        )
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


@torch.inference_mode()
def visit_hidden_states(model: PreTrainedModel, input_ids: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Runs the model on right-padded `input_ids` (b, t) and calls `visit(layer, hidden_states)` as each layer appears.

    Layer 0 is the input of the first decoder layer, layer k the output of the k-th, layer L the model's output after
    the final norm; no more than one of them, (b, t, d), is held. For most models these are the entries of
    `output_hidden_states=True`; that list is shifted by one for Mamba and RWKV. `self_check` tries the model.
    """
    layers = decoder_layers(model)

    def first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        visit(0, args[0] if args else kwargs["hidden_states"])

    def inner(layer: int) -> Callable:
        return lambda module, args, output: visit(layer, output if isinstance(output, Tensor) else output[0])

    handles = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [layers[k - 1].register_forward_hook(inner(k)) for k in range(1, len(layers))]
    try:
        visit(len(layers), run_base_model(model, input_ids))
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def run_base_model(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The last hidden states, (b, t, d), of right-padded `input_ids`.

    No mask tensor: behind right padding the causal mask alone hides the padding from every valid token, and without a
    mask tensor the fast attention kernels apply. The states of the padding itself are meaningless.
    """
    return model(input_ids=input_ids, use_cache=False).last_hidden_state


def pool(hidden_states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """The pooled state m of each text: mean over its tokens, or its last token.

    Args:
        hidden_states: (b, t, d), right-padded.
        lengths: tokens per text, (b,).
        pooling: "mean" or "last".

    Returns:
        (b, d), in the dtype of `hidden_states`.
    """
    if pooling == "last":
        return hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    positions = torch.arange(hidden_states.shape[1], device=lengths.device)
    inside = (positions < lengths[:, None]).to(hidden_states.dtype)
    return torch.bmm(inside[:, None], hidden_states)[:, 0] / lengths[:, None].to(hidden_states.dtype)
