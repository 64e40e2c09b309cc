"""Pretrain a small causal language model on docstrings by next-token prediction: the embedded models.

    python -m demo.pretrain --overwrite --compile  # the committed tiny-lm again: half an hour on two CPU cores
    python -m demo.pretrain --size micro           # the committed micro-lm; small, medium, large go to demo/runs/

Reads the docstrings through utils/data/docstrings.py, without the test texts of the tasks. Writes demo/<size>-lm/ for
tiny and micro, demo/runs/<size>/ for the others: model.safetensors in bfloat16, config.json, the tokenizer and
pretraining.json, all at once.

Architecture Qwen2 with tied embeddings; byte-level BPE of 4,096 tokens. Every epoch shuffles the documents,
joins them with <|endoftext|> behind each, and cuts them into windows; attention runs across document ends.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from utils.data.docstrings import first_paragraph, load_rows, pretraining_corpus, text_hash
from utils.results import check_replaceable, find_result, save_json, write_atomically
from utils.script import ROOT, UserError, environment, pick_device, run_script
from utils.settings import Run, Unrecorded, check, command_line, result_settings, with_values

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
MAX_POSITIONS = 1024
HELD_OUT_ONE_IN = 50  # one document in so many measures the held-out loss


@dataclass(frozen=True)
class Size:
    """A model size and its defaults."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    learning_rate: float  # peak
    epochs: float = 2.5
    product_dtype: Literal["bfloat16", "float32"] = "bfloat16"


SIZES = {
    "micro": Size(64, 192, 2, 2, 6e-3, epochs=0.5, product_dtype="float32"),  # 0.4 million parameters
    "tiny": Size(128, 384, 4, 4, 4e-3),  # 1.4
    "small": Size(192, 576, 6, 6, 3e-3),  # 3.7
    "medium": Size(320, 960, 8, 5, 2e-3),  # 12
    "large": Size(512, 1536, 8, 8, 1e-3),  # 29
}


@dataclass(frozen=True)
class Output(Unrecorded):
    """Device and files; these change no number."""

    device: str = "auto"  # auto, cpu, cuda, ...
    compile: bool = False  # torch.compile; needs a C++ compiler on CPU
    output_dir: Path | None = None  # by default demo/<size>-lm for tiny and micro, demo/runs/<size> for the others
    overwrite: bool = False  # replace a finished run


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    size: Literal["micro", "tiny", "small", "medium", "large"] = "tiny"  # model size
    epochs: float | None = None  # passes over the corpus; by default those of the size
    learning_rate: float | None = None  # peak of the learning rate; by default that of the size
    batch_size: int = 16  # windows per step
    window: int = 256  # tokens per window
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    weight_decay: float = 0.1  # weight decay of matrices; norms and biases have none
    gradient_clip: float = 1.0  # largest gradient norm
    max_documents: int | None = None  # read only this many documents, the first ones
    max_steps: int | None = None  # end after this many steps, and fit the schedule to them
    product_dtype: Literal["bfloat16", "float32"] | None = None  # by default that of the size; float32 suits many CPUs
    seed: int = 0  # seed of the initial weights and of the document order
    output: Output = Output()

    def __post_init__(self) -> None:
        check(self, "at least 1", "batch_size", "window", "max_documents", "max_steps")
        check(self, "positive, below 3e38", "learning_rate", "epochs")
        check(self, "from 0 to 4294967295", "seed")


# ------------------------------------------------------------------ data
def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents; docstrings with the same first paragraph stay together."""
    held_out = [text_hash(first_paragraph(text)) // 5 % HELD_OUT_ONE_IN == 0 for text in documents]
    train = [text for text, out in zip(documents, held_out, strict=True) if not out]
    return train, [text for text, out in zip(documents, held_out, strict=True) if out]


def train_tokenizer(documents: list[str]) -> Any:
    """Trains a byte-level BPE tokenizer of `VOCAB_SIZE` tokens that puts nothing before or behind a text.

    It takes the normaliser and the pre-tokeniser of Qwen2: AutoTokenizer chooses the class by the model's type and
    builds these two anew; any others would be lost on loading.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend, alphabet = Qwen2Tokenizer().backend_tokenizer, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(documents, trainer)
    trained = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in trained["merges"]]
    # type: the annotation of `merges` is narrower than the accepted type
    return Qwen2Tokenizer(trained["vocab"], merges=merges, padding_side="right", model_max_length=MAX_POSITIONS)


def encode(documents: list[str], tokenizer: Any) -> list[np.ndarray]:
    """Token ids of each document with the end-of-text token behind them, uint16."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [np.array([*encoding.ids, tokenizer.eos_token_id], np.uint16) for encoding in encodings]


def cut_windows(tokens: np.ndarray, window: int) -> np.ndarray:
    """Consecutive windows of `window` inputs and the token after them, (n, window + 1); neighbours share one token."""
    num_windows = (len(tokens) - 1) // window
    return np.lib.stride_tricks.sliding_window_view(tokens, window + 1)[: num_windows * window : window]


def batches(documents: list[np.ndarray], config: Config) -> Iterator[Tensor]:
    """Yields batches (batch_size, window + 1) without end."""
    num_windows = steps_per_epoch(documents, config) * config.batch_size
    for epoch in itertools.count():
        random = np.random.default_rng((config.seed, epoch))
        order = random.permutation(len(documents))
        windows = cut_windows(np.concatenate([documents[index] for index in order]), config.window)
        shuffled = random.permutation(len(windows))
        for start in range(0, num_windows, config.batch_size):
            yield torch.from_numpy(windows[shuffled[start : start + config.batch_size]].astype(np.int64))


def steps_per_epoch(documents: list[np.ndarray], config: Config) -> int:
    """Number of full batches in one pass over the corpus. Raises UserError if the corpus does not fill one."""
    num_tokens, tokens_per_batch = sum(map(len, documents)), config.batch_size * config.window
    steps = (num_tokens - 1) // tokens_per_batch
    if steps == 0:
        remedy = "Lower --batch_size or --window, or raise --max_documents."
        raise UserError(f"{num_tokens:,} tokens fill no batch of {tokens_per_batch:,}. {remedy}")
    return steps


def unigram_loss(train: list[np.ndarray], held_out: list[np.ndarray]) -> float:
    """Held-out nats per token of a model that knows only how frequent each token is (add-one smoothing)."""
    counts = np.bincount(np.concatenate(train), minlength=VOCAB_SIZE) + 1.0
    return float(-np.log(counts / counts.sum())[np.concatenate(held_out)].mean())


# ------------------------------------------------------------------ model and loss
def build_model(size: Size, tokenizer: Any) -> Any:
    """A randomly initialised Qwen2 with tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_attention_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def learning_rate_at(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to zero; `step` counts from 0."""
    num_warmup = max(1, round(warmup * num_steps))
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def next_token_loss(model: Callable, windows: Tensor, config: Config) -> Tensor:
    """Mean nats per token, float32; windows (n, window + 1) on the model's device."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=config.product_dtype == "bfloat16"):
        logits = model(input_ids=windows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, held_out: list[np.ndarray], config: Config) -> float:
    """Held-out nats per token over the documents joined in their order."""
    tokens = np.concatenate(held_out)
    windows = torch.from_numpy(cut_windows(tokens, min(config.window, len(tokens) - 1)).astype(np.int64))
    model.eval()
    total = 0.0
    for part in windows.split(64):
        total += next_token_loss(model, part.to(model.device), config).item() * len(part)
    return total / len(windows)


# ------------------------------------------------------------------ training
def train(model: Any, documents: list[np.ndarray], config: Config) -> dict[str, Any]:
    """Trains in place; returns the number of steps, seconds and the loss. Raises UserError."""
    num_steps = config.max_steps or round((config.epochs or 0) * steps_per_epoch(documents, config))
    peak = config.learning_rate or SIZES[config.size].learning_rate
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    run_model = torch.compile(model) if config.output.compile else model
    started = time.monotonic()
    smoothed: float | None = None
    bar = tqdm(itertools.islice(batches(documents, config), num_steps), f"pretraining {config.size}", num_steps)
    for step, windows in enumerate(bar):
        rate = learning_rate_at(step, num_steps, peak, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = next_token_loss(run_model, windows.to(model.device), config)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"The loss became {value}. Lower --learning_rate (now {rate:g}).")
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *vectors], config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
        bar.set_postfix_str(f"loss {smoothed:.3f}", refresh=False)
    return {"step": num_steps, "seconds": time.monotonic() - started, "train_loss": smoothed}


# ------------------------------------------------------------------ run
def complete_settings(config: Config) -> Config:
    """The config with the defaults of its size, and its output folder."""
    size = SIZES[config.size]
    folder = f"{config.size}-lm" if config.size in ("tiny", "micro") else f"runs/{config.size}"
    return with_values(
        config,
        epochs=size.epochs if config.epochs is None else config.epochs,
        product_dtype=config.product_dtype or size.product_dtype,
        output_dir=config.output.output_dir or ROOT / "demo" / folder,
    )


def main(config: Config) -> None:
    """Trains tokenizer and model, measures the held-out loss and writes the checkpoint."""
    command = command_line("-m demo.pretrain", config, set(result_settings(config)))
    config = complete_settings(config)
    folder = Path(str(config.output.output_dir))
    check_replaceable(folder, "pretraining.json")
    identity = {"config": result_settings(config), "fingerprint": load_rows()[1][:16]}
    if find_result(folder / "pretraining.json", identity, Run(overwrite=config.output.overwrite)):
        print(f"already complete, --overwrite trains it again\n{folder}")
        return
    train_texts, held_out_texts = split_documents(pretraining_corpus()[: config.max_documents])
    if not held_out_texts:
        raise UserError(f"None of the {len(train_texts)} documents is held out. Raise --max_documents.")
    tokenizer = train_tokenizer(train_texts)
    documents, held_out = encode(train_texts, tokenizer), encode(held_out_texts, tokenizer)
    print(f"{len(documents):,} documents of {sum(map(len, documents)):,} tokens, {len(held_out):,} held out")

    torch.manual_seed(config.seed)
    model = build_model(SIZES[config.size], tokenizer).to(pick_device(config.output.device))
    trained = train(model, documents, config)
    for parameter in model.parameters():  # measured as saved; not model.bfloat16(), which would round the rotary angles
        parameter.data = parameter.data.bfloat16().float()
    report = {
        **identity,
        **trained,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": trained["step"] * config.batch_size * config.window,
        "held_out_loss": evaluate(model, held_out, config),
        "unigram_loss": unigram_loss(documents, held_out),
        "command": command,
        "environment": environment(),
    }
    with write_atomically(folder) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        tokenizer.backend_tokenizer.save(str(temporary / "tokenizer.json"), pretty=False)  # indented: twice as large
        save_json(temporary / "pretraining.json", report)
    print(f"held-out loss {report['held_out_loss']:.4f} nats per token, unigram {report['unigram_loss']:.4f}")
    print(folder)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
