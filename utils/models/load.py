"""Load a causal LM and its tokenizer, and tokenise in bulk."""

import atexit
import dataclasses
import functools
import shutil
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

import utils.models.openelm  # noqa: F401, registers the `openelm` architecture with the Auto classes
from utils.hub import hub_errors
from utils.models import gguf
from utils.models.identity import read_config
from utils.models.states import decoder_of
from utils.models.table import FAMILIES, model_source, repository
from utils.results import remove_abandoned, temporary_path
from utils.script import UserError
from utils.settings import Model, Run


# ------------------------------------------------------------------ loading
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


def auto_class_of(model: Model, config: PreTrainedConfig) -> Any:
    """What makes the causal LM of a configuration; of a multi-modal model all of it.

    Raises:
        UserError: an architecture without causal LM.
    """
    is_causal = type(config) in AutoModelForCausalLM._model_mapping  # type: ignore[attr-defined]
    is_visual = type(config) in AutoModelForImageTextToText._model_mapping  # type: ignore[attr-defined]
    if not is_causal and not is_visual and "AutoModelForCausalLM" not in getattr(config, "auto_map", {}):
        raise UserError(
            f"{model.model_name} ({config.model_type}) is not a causal LM: transformers has none of this architecture. "
            "Choose another --model_name; docs/architectures.md lists what can be used."
        )
    return AutoModelForImageTextToText if is_visual and not is_causal else AutoModelForCausalLM


def load_weights(model: Model, run: Run, device_map: str | None = None) -> PreTrainedModel:
    """The causal LM on the CPU, or by a device map where there is room; of a multi-modal model all of it.

    Raises:
        UserError: `hub_errors`, `auto_class_of`, a weight of another shape, or one of the decoder that the checkpoint
            lacks; the library would fill it with random numbers.
    """
    if gguf.is_gguf(source := model_source(model.model_name)):
        if device_map:
            raise UserError(f"{model.model_name} is a GGUF file, which --device_map cannot spread. Leave it away.")
        return gguf.load_model(Path(source), getattr(torch, model.dtype))
    auto_class = auto_class_of(model, read_config(model, run))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports what is left out, which is what we want
    try:
        with hub_errors(repository(model.model_name, model.revision)):
            loaded, info = auto_class.from_pretrained(
                source,
                revision=model.revision,
                dtype=getattr(torch, model.dtype),
                trust_remote_code=run.trust_remote_code,
                device_map=device_map,
                offload_folder=offload_folder(run) if device_map else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # said below, by name
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    for name, stored, wanted in sorted(info["mismatched_keys"], key=str):  # a set: any order without it
        raise UserError(
            f"{model.model_name}: {name} is {tuple(stored)} in its files and {tuple(wanted)} by its config.json. One "
            "of them is of another model: download it again."
        )
    decoder = decoder_of(loaded)
    [place] = [name for name, module in loaded.named_modules() if module is decoder]
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(f"{place}.")):
        raise UserError(f"{model.model_name} lacks {len(missing)} weights, the first is {missing[0]}. Load it anew.")
    return loaded


def offload_folder(run: Run) -> Path:
    """Where weights go that fit into no memory; made where it is needed, removed when the process ends."""
    remove_abandoned(name := run.results_dir / "offloaded")
    folder = temporary_path(name)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_causal_lm(model: Model, run: Run, device: torch.device) -> PreTrainedModel:
    """The causal LM in evaluation mode, with a LoRA adapter merged if one is named.

    Raises:
        UserError: of `load_weights`, or of `merge_adapter`.
    """
    causal_lm: Any = load_weights(model, run)
    if model.adapter_dir is not None:
        from utils.models.adapters import (
            merge_adapter,  # only where one is asked for: the import of PEFT takes a second
        )

        causal_lm = merge_adapter(causal_lm, model, run)
    return causal_lm.to(device).eval()


def load_base_model(model: Model, run: Run, device: torch.device, device_map: str = "none") -> PreTrainedModel:
    """The decoder without its lm_head, in evaluation mode: what hidden states are read from.

    Args:
        model: which.
        run: how hubs are asked.
        device: where it goes.
        device_map: "auto" puts its layers where there is room, on all devices, in main memory and on disk.
    """
    if device_map == "none":
        return decoder_of(load_causal_lm(model, run, torch.device("cpu"))).to(device).eval()
    if model.adapter_dir is not None:
        raise UserError("--device_map auto takes no --adapter_dir: an adapter is merged on one device.")
    return decoder_of(load_weights(model, run, device_map)).eval()


# ------------------------------------------------------------------ tokens
@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of n texts, end to end in one array: 4 bytes a token however many texts."""

    token_ids: np.ndarray  # (num_tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64, text i is token_ids[offsets[i] : offsets[i + 1]]
    max_length: int | None  # None: no limit
    num_cut: int = 0  # texts that are longer than max_length and lost their end
    rope_limit: int | None = None  # texts on both sides of this length never share a batch

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per text, (n,)."""
        return np.diff(self.offsets)

    @property
    def sides(self) -> np.ndarray | None:
        """True for a text longer than `rope_limit`, (n,); None without such a limit."""
        return None if self.rope_limit is None else self.lengths > self.rope_limit

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


TEXTS_PER_CHUNK = 1024  # a fast tokenizer keeps hundreds of bytes for each token of a call, and splits it among cores
NO_LIMIT = 10**9  # what a tokenizer says that knows no length is far above


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest text the model can read, None where its configuration sets no limit, as that of a recurrent model."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "context_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def rope_limit(config: PreTrainedConfig) -> int | None:
    """The length above which LongRoPE (arXiv 2402.13753) rotates every position of a batch by other angles.

    The states of a short text then depend on the longest text of its batch. None for other models.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [settings for settings in rope.values() if isinstance(settings, dict)]
    limits = [
        settings.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for settings in (rope, *per_layer_type)
        if settings.get("rope_type") == "longrope"
    ]
    return min((limit for limit in limits if limit), default=None)


def tokenize(
    texts: list[str], tokenizer: Tokenizer, config: PreTrainedConfig, max_length: int | None = None
) -> TokenizedTexts:
    """All texts as token ids, truncated to `max_length` or to the context; prints how many lost their end.

    Without `max_length` the limit is the model's context or the tokenizer's own limit, the smaller one.

    Raises:
        UserError: a text without any token, a tokenizer that is not the model's, or a length that it cannot read.
    """
    limit = context_length(config)
    if max_length and limit and max_length > limit:
        raise UserError(f"--max_length {max_length} is more than the model can read: {limit} tokens. Lower it.")
    if max_length is None:
        own = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
        max_length = min((length for length in (limit, own) if length), default=None)
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    ids, lengths = array("i"), array("q")  # as compact as what is returned, which they become without a copy
    num_cut = 0
    for start in tqdm(range(0, len(texts), TEXTS_PER_CHUNK), desc="tokenize", unit="chunk", leave=False):
        chunk = texts[start : start + TEXTS_PER_CHUNK]
        encoded = tokenizer(chunk, truncation=max_length is not None, max_length=max_length, **options)["input_ids"]
        for text_ids in encoded:
            ids.extend(text_ids)
            lengths.append(len(text_ids))
        full = [text for text, text_ids in zip(chunk, encoded, strict=True) if len(text_ids) == max_length]
        if full and max_length is not None:
            whole = tokenizer(full, truncation=False, **options)["input_ids"]
            num_cut += sum(len(text_ids) > max_length for text_ids in whole)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        first = texts[empty[0]]
        raise UserError(f"{len(empty)} texts have no token, the first is row {empty[0]}: {first!r}. Remove them.")
    token_ids = np.frombuffer(ids, dtype=np.int32)
    if token_ids.max() >= config.vocab_size:
        raise UserError(
            f"The tokenizer gives token {token_ids.max()}, the model knows {config.vocab_size}: "
            "they do not belong together. Name the right one with --tokenizer_name."
        )
    if num_cut:
        print(f"{num_cut:,} of {len(texts):,} texts cut at {max_length} tokens")
    return TokenizedTexts(token_ids, offsets, max_length, num_cut, rope_limit(config))
