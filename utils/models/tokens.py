"""Turn texts into token ids: in bulk, truncated, and padded on the right batch by batch."""

import functools
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.models.load import load_config, load_tokenizer
from utils.script import UserError
from utils.settings import Model, Run

TEXTS_PER_CHUNK = 1024  # a fast tokenizer keeps hundreds of bytes for each token of a call, and splits it among cores
NO_LIMIT = 10**9  # a tokenizer without a limit states a larger one


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of n texts, end to end in one array: 2 bytes a token, or 4 if the vocabulary has 65,536 or more."""

    token_ids: np.ndarray  # (num_tokens,) integers
    offsets: np.ndarray  # (n + 1,) int64, text i is token_ids[offsets[i] : offsets[i + 1]]
    max_length: int | None  # None: no limit
    num_cut: int = 0  # texts that are longer than max_length and lost their end
    rope_limit: int | None = None  # a longer and a shorter text never share a batch

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per text, (n,)."""
        return np.diff(self.offsets)

    @property
    def sides(self) -> np.ndarray | None:
        """True for a text longer than `rope_limit`, (n,); None without such a limit."""
        return None if self.rope_limit is None else self.lengths > self.rope_limit

    def pad(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """`input_ids` (b, t), and `lengths` (b,); right-padded with each text's own last token."""
        # no token sees the padding, but 0 times a non-finite state is not 0: padding must not bring in other embeddings
        lengths = self.lengths[indices]
        positions = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        input_ids = self.token_ids[self.offsets[indices][:, None] + positions].astype(np.int64)
        return torch.from_numpy(input_ids), torch.from_numpy(lengths)


def context_length(config: Any) -> int | None:
    """The longest text that the model can read; None if its configuration sets no limit, as for recurrent models."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")
    limits = (getattr(config, name, None) for name in names)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def rope_limit(config: Any) -> int | None:
    """The length above which LongRoPE (arXiv 2402.13753) rotates all texts of a batch by other angles; else None."""
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(own for own in rope.values() if isinstance(own, dict))]  # own: of one type of layers
    name = "original_max_position_embeddings"
    limits = [own.get(name) or getattr(config, name, None) for own in settings if own.get("rope_type") == "longrope"]
    return min((limit for limit in limits if limit), default=None)


def load_tokens(texts: list[str], model: Model, run: Run) -> TokenizedTexts:
    """All texts as token ids of the model."""
    config = load_config(model, run)
    return tokenize(texts, load_tokenizer(model, run, config), config, model.max_length)


def tokenize(texts: list[str], tokenizer: Any, config: Any, max_length: int | None = None) -> TokenizedTexts:
    """All texts as token ids, truncated to `max_length`; prints how many lost their end.

    Without `max_length` the limit is the model's context or the tokenizer's own limit, the smaller one.
    Raises UserError: a text without any token, a tokenizer that is not the model's, or a length that it cannot read.
    """
    limit = context_length(config)
    if max_length and limit and max_length > limit:
        raise UserError(f"--max_length {max_length} exceeds the {limit} tokens that the model can read. Lower it.")
    if max_length is None:
        limits = (limit, tokenizer.model_max_length)
        max_length = min((length for length in limits if length and length < NO_LIMIT), default=None)
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    ids, lengths, num_cut = array("i"), array("q"), 0  # as compact as the arrays they become
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
    offsets, token_ids = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.frombuffer(ids, dtype=np.int32)
    if 0 in lengths:
        row = lengths.index(0)
        raise UserError(f"{lengths.count(0)} texts have no token; the first is row {row}: {texts[row]!r}. Remove them.")
    if token_ids.max() >= config.vocab_size:
        found = f"The tokenizer gives token {token_ids.max()}, but the model has {config.vocab_size} tokens"
        raise UserError(f"{found}: they do not belong together. Name the right one with --tokenizer_name.")
    token_ids = token_ids.astype(np.min_scalar_type(config.vocab_size))
    if max_length and max(lengths) > max_length:
        raise UserError(f"The tokenizer adds more than {max_length} tokens to each text. Raise --max_length.")
    if num_cut:
        print(f"{num_cut:,} of {len(texts):,} texts cut at {max_length} tokens")
    return TokenizedTexts(token_ids, offsets, max_length, num_cut, rope_limit(config))
