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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

import utils.openelm  # noqa: F401, registers the `openelm` architecture with the Auto classes
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
    """The hub id or local folder that `model_name` stands for.

    Raises:
        UserError: a model of the pretraining ladder that is not there yet, or a folder without a model.
    """
    spec = MODELS.get(model_name)
    if spec and spec.path.startswith("demo/"):
        if not (ROOT / spec.path / "config.json").is_file():
            raise UserError(f"No model at {spec.path}. Run: python -m demo.pretrain --size {model_name}")
        return str(ROOT / spec.path)
    if Path(model_name).is_dir() and not (Path(model_name) / "config.json").is_file():
        raise UserError(f"No model in {model_name}: it holds no config.json. Give a folder made by save_pretrained.")
    if "/" not in model_name and not Path(model_name).is_dir() and not spec:
        raise UserError(f"Unknown model {model_name!r}.{nearest(model_name, MODELS)} Known: {', '.join(MODELS)}.")
    return spec.path if spec else model_name


def repository(name: str, revision: str | None = None) -> Repository:
    """A model or tokenizer, for the sentence about what goes wrong with it."""
    return Repository(name, "Model", tuple(MODELS), "a local folder, or --model_name tiny", revision)


def load_config(model: Model, run: Run) -> PreTrainedConfig:
    """The model's configuration."""
    with hub_errors(repository(model.model_name, model.revision)):
        return AutoConfig.from_pretrained(
            model_source(model.model_name), revision=model.revision, trust_remote_code=run.trust_remote_code
        )


def load_tokenizer(model: Model, run: Run, config: PreTrainedConfig) -> Tokenizer:
    """The tokenizer, padding on the right, with a pad token (end of text where it has none of its own)."""
    name, revision = model_source(model.model_name), model.revision
    family = FAMILIES.get(config.model_type)
    if model.tokenizer_name:
        name, revision = model.tokenizer_name, None
    elif family and family.tokenizer_name and not Path(name, "tokenizer_config.json").is_file():
        name, revision = family.tokenizer_name, None
    with hub_errors(dataclasses.replace(repository(name, revision), instead="--tokenizer_name for an open copy")):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, padding_side="right", trust_remote_code=run.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"The tokenizer of {name} has no pad and no end-of-text token; use --tokenizer_name.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_weights(auto_class: type, model: Model, run: Run) -> PreTrainedModel:
    """The model of `auto_class` on the CPU.

    Raises:
        UserError: `hub_errors`, or a weight the checkpoint lacks; the library would fill it with random numbers.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports that lm_head is left out, which is what we want
    try:
        with hub_errors(repository(model.model_name, model.revision)):
            loaded, info = auto_class.from_pretrained(  # type: ignore[attr-defined]
                model_source(model.model_name),
                revision=model.revision,
                dtype=getattr(torch, model.dtype),
                trust_remote_code=run.trust_remote_code,
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model.model_name} lacks {len(missing)} weights, the first is {missing[0]}. Load it anew.")
    return loaded


def load_causal_lm(model: Model, run: Run, device: torch.device) -> PreTrainedModel:
    """The causal LM in evaluation mode, with a LoRA adapter merged if one is named.

    Raises:
        UserError: of `load_weights`, or a folder that holds no adapter.
    """
    causal_lm: Any = load_weights(AutoModelForCausalLM, model, run)
    if model.adapter_dir is not None:
        from peft import PeftModel  # only where an adapter is asked for: the import takes a second

        if not (model.adapter_dir / "adapter_config.json").is_file():
            raise UserError(f"No adapter at {model.adapter_dir}. Make one: python lora_finetuning.py --model_name ...")
        causal_lm = PeftModel.from_pretrained(causal_lm, model.adapter_dir).merge_and_unload()
    return causal_lm.to(device).eval()


def load_base_model(model: Model, run: Run, device: torch.device) -> PreTrainedModel:
    """The model without its lm_head, in evaluation mode: what hidden states are read from."""
    if model.adapter_dir is not None:  # adapters are made for the causal LM and carry its module names
        causal_lm = load_causal_lm(model, run, device)
        return getattr(causal_lm, causal_lm.base_model_prefix)
    base_model: Any = load_weights(AutoModel, model, run)
    return base_model.to(device).eval()


# ------------------------------------------------------------------ identity
# what of a folder decides the states: weights, architecture, tokens, code
DECIDING_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.py")
# what it may hold besides, which decides nothing
OTHER_FILES = ("pretraining.json", "generation_config.json", "training_args.bin", "metrics.json", "README.txt")


@functools.lru_cache(maxsize=256)
def file_digest(path: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file; its size and time of change are arguments so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def folder_fingerprint(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the names and contents of the files that decide a model's states."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in DECIDING_FILES for path in folder.glob(pattern)}):
        if path.name not in OTHER_FILES:
            stat = path.stat()
            digest.update(path.name.encode() + b"\0" + file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:16]


def model_fingerprint(model: Model, run: Run) -> str:
    """What tells two models of the same name apart: of a local one a SHA-256, of the hub's its commit; of each part.

    The parts are the model, a tokenizer or an adapter from elsewhere, joined by `+`.
    """
    source = model_source(model.model_name)
    parts = [folder_fingerprint(Path(source))] if Path(source).is_dir() else []
    if not parts:
        config = load_config(model, run)
        parts.append(getattr(config, "_commit_hash", None) or model.revision or "unknown")
    parts += [
        folder_fingerprint(Path(folder))
        for folder in (model.tokenizer_name, model.adapter_dir)
        if folder is not None and Path(folder).is_dir()
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


# ------------------------------------------------------------------ tokens
@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of n texts, end to end in one array: 4 bytes a token however many texts."""

    token_ids: np.ndarray  # (num_tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, text i is token_ids[offsets[i] : offsets[i + 1]]
    max_length: int

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per text, (n,)."""
        return np.diff(self.offsets)

    def pad(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """`input_ids` (b, t), right-padded with 0 (no valid token sees the padding), and `lengths` (b,)."""
        lengths = self.lengths[indices]
        positions = np.arange(lengths.max())
        inside = positions < lengths[:, None]
        input_ids = np.zeros(inside.shape, dtype=np.int64)
        input_ids[inside] = self.token_ids[(self.offsets[indices][:, None] + positions)[inside]]
        return torch.from_numpy(input_ids), torch.from_numpy(lengths)


def tokenize(
    texts: list[str], tokenizer: Tokenizer, config: PreTrainedConfig, max_length: int | None = None
) -> TokenizedTexts:
    """All texts as token ids, truncated to `max_length` or to the model's context.

    Raises:
        UserError: a text without any token, or a tokenizer that is not the model's.
    """
    context = min(config.max_position_embeddings, tokenizer.model_max_length)
    max_length = min(max_length or context, context)
    chunks: list[np.ndarray] = []
    lengths: list[int] = []
    for start in tqdm(range(0, len(texts), 4096), desc="tokenize", unit="chunk", leave=False):
        chunk = texts[start : start + 4096]
        encoded = tokenizer(chunk, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
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


def token_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Indices of the texts of each batch: sorted by length, longest first, at most `tokens_per_batch` padded tokens.

    Longest first, so that a batch that does not fit into memory fails at once. A text longer than the budget is a
    batch of its own; every text is in exactly one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


# ------------------------------------------------------------------ hidden states
def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a base model.

    Raises:
        UserError: no list of `num_hidden_layers` modules is found.
    """
    num_layers = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(f"{type(model).__name__} has no list of {num_layers} decoder layers to read hidden states from.")


@torch.inference_mode()
def visit_hidden_states(model: PreTrainedModel, input_ids: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Runs the model on right-padded `input_ids` (b, t) and calls `visit(layer, hidden_states)` as each layer appears.

    Layer 0 is the input of the first decoder layer, layer k the output of the k-th, layer L the model's output after
    the final norm: the entries of `output_hidden_states=True`, without holding more than one of them, (b, t, d).
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
