"""Train an LM and a linear head on labelled texts: what lora_finetuning.py and from_scratch.py share.

The two scripts differ in how the model is built and in what is saved of it; settings, data, optimiser, schedule,
evaluation and results are here. b texts of a batch, t tokens, d hidden size, c classes (1 for regression).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup
from transformers.optimization import Adafactor

from cache import pool
from utils.checkpoints import find_finished, make_identity, print_scores, result_folder, save_head, save_result
from utils.data import LabelledTexts, load_texts
from utils.io import UserError, set_seed
from utils.models import TokenizedTexts, load_config, load_tokenizer, token_batches, tokenize
from utils.training import BatchOrder, Head, Objective, Run, Track, make_accelerator, train


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Model, data and place of a run; the scripts add and give the hyperparameters."""

    # These change the result: stored in the file, compared when the file is reused.
    model_name: str = "tiny"  # hub id, local folder, or "tiny"
    dataset_name: str = "docstrings/library"  # key of the table, hub id, local file or folder, or docstrings/<task>
    max_length: int | None = None  # tokens per text; None: the model's context
    max_samples: int | None = None  # stratified sample of each split; None: all rows
    text_column: str | None = None  # for your own data
    label_column: str | None = None  # for your own data
    text_template: str | None = None  # for your own data, such as "{question} {choices}"
    task: Literal["auto", "classification", "regression"] = "auto"  # auto: regression if the labels are fractions
    ungrouped_split: bool = False  # `medical` split as in the paper, with questions on both sides
    seed: int = 0  # of initial weights, order, dropout, sampling and splits made here
    revision: str | None = None  # commit or tag of the model
    dataset_revision: str | None = None  # commit or tag of the dataset
    tokenizer_name: str | None = None  # another repository or folder for the tokenizer
    # Hyperparameters; their defaults stand in the scripts.
    dtype: Literal["float32", "bfloat16"]
    pooling: Literal["mean", "last"]
    dropout: float
    num_steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    weight_decay: float
    warmup: float
    steps_per_evaluation: int
    # These change only speed or place.
    gradient_checkpointing: bool = False  # compute activations twice and store few: less memory, a third slower
    tokens_per_batch: int = 8192  # upper limit of padded tokens in one forward pass of the evaluation
    minutes_per_state: float = 3.0  # time between two saved states of an unfinished run
    device: str = "auto"  # auto, cpu, cuda, cuda:1; under torchrun each process takes its own
    track: Track = "none"  # also send the history to a tracker
    results_dir: Path = Path("results")  # where results go
    overwrite: bool = False  # train again where a result, or part of one, is there
    trust_remote_code: bool = False  # let a model repository run its own code
    SPEED_OR_PLACE: ClassVar[tuple[str, ...]] = (
        *("gradient_checkpointing", "tokens_per_batch", "minutes_per_state", "device", "track", "results_dir"),
        *("overwrite", "trust_remote_code"),
    )

    def __post_init__(self) -> None:
        counts = ("num_steps", "batch_size", "gradient_accumulation", "steps_per_evaluation", "tokens_per_batch")
        for name in (*counts, "max_length", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must lie in [0, 1), not {getattr(self, name)}")


@dataclass
class Trainable:
    """A decoder ready for training, and how to write what was trained of it."""

    decoder: Any  # base model without lm_head; what requires a gradient is trained
    save: Callable[[Path], None]  # writes it under the result folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products


# ------------------------------------------------------------------ model
class Classifier(nn.Module):
    """Decoder, pooling over the tokens of the last hidden state, head: right-padded ids (b, t) -> (b, c) float32."""

    def __init__(self, decoder: nn.Module, head: Head, pooling: str, dtype: str) -> None:
        super().__init__()
        self.decoder, self.head, self.pooling, self.dtype = decoder, head, pooling, dtype

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """No mask: behind right padding the causal mask alone hides the padding from every valid token."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            states = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(pool(states.float(), lengths, self.pooling))  # never in half precision: sums over tokens


def build_optimizer(model: nn.Module, config: FinetuningConfig) -> tuple[Adafactor, torch.optim.lr_scheduler.LambdaLR]:
    """Adafactor without first moment and with a plain learning rate, and warm-up with half a cosine down to 0."""
    optimizer = Adafactor(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=None,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    # counted in optimiser steps and not wrapped by accelerate, which would step it once for each process
    num_warmup = round(config.warmup * config.num_steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup, config.num_steps)


@torch.no_grad()
def predict(
    model: nn.Module, tokens: TokenizedTexts, num_labels: int, tokens_per_batch: int, accelerator: Accelerator
) -> Tensor:
    """Outputs of all texts, (n, c) float32 on the CPU, the same whatever the batches; each text is run once.

    Every process fills in the rows of its batches, and the sum over processes has them all.

    Raises:
        UserError: the device has too little memory for a batch.
    """
    device = next(model.parameters()).device
    outputs = torch.zeros(len(tokens.lengths), num_labels, device=device)
    batches = token_batches(tokens.lengths, tokens_per_batch)
    try:
        for rows in batches[accelerator.process_index :: accelerator.num_processes]:
            outputs[torch.from_numpy(rows).to(device)] = model(*(tensor.to(device) for tensor in tokens.pad(rows)))
    except torch.OutOfMemoryError:
        raise UserError(f"Out of memory in the evaluation. Lower --tokens_per_batch ({tokens_per_batch}).") from None
    return accelerator.reduce(outputs, "sum").cpu()


# ------------------------------------------------------------------ run
def texts_per_step(config: FinetuningConfig, accelerator: Accelerator) -> int:
    """Texts of one optimiser step, over all processes.

    Raises:
        UserError: fewer than there are processes.
    """
    texts = config.batch_size * config.gradient_accumulation
    if texts < accelerator.num_processes:
        raise UserError(
            f"A step of --batch_size {config.batch_size} x --gradient_accumulation {config.gradient_accumulation} "
            f"texts cannot be shared by {accelerator.num_processes} processes. Raise one of them."
        )
    return texts


def build_run(
    config: FinetuningConfig,
    trainable: Trainable,
    data: tuple[LabelledTexts, LabelledTexts],
    tokens: tuple[TokenizedTexts, TokenizedTexts],
    place: tuple[Accelerator, torch.device, Path],
) -> Run:
    """Classifier, optimiser, schedule, order and evaluation of one run.

    Args:
        config: hyperparameters.
        trainable: the decoder.
        data: train and test.
        tokens: of train and test.
        place: processes, device, and the result folder.
    """
    (accelerator, device, folder), (train_tokens, test_tokens) = place, tokens
    objective = Objective.of(data[0])
    train_targets, test_targets = (objective.targets(of_split.labels) for of_split in data)
    head = Head(trainable.decoder.config.hidden_size, objective.num_labels, config.dropout)
    if config.gradient_checkpointing:
        trainable.decoder.activation_checkpointing_enable({"use_reentrant": False})
    model = Classifier(trainable.decoder, head, config.pooling, trainable.dtype).to(device)
    optimizer, scheduler = build_optimizer(model, config)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        outputs = predict(model, test_tokens, objective.num_labels, config.tokens_per_batch, accelerator)
        return {f"test_{name}": value for name, value in objective.scores(outputs, test_targets).items()}

    def inputs(rows):
        return tuple(tensor.to(device) for tensor in train_tokens.pad(rows))

    return Run(
        model=model,
        inputs=inputs,
        targets=train_targets.to(device),
        objective=objective,
        optimizer=optimizer,
        scheduler=scheduler,
        order=BatchOrder(len(train_targets), texts_per_step(config, accelerator), config.seed, train_tokens.lengths),
        evaluate=evaluate,
        num_steps=config.num_steps,
        steps_per_evaluation=config.steps_per_evaluation,
        batch_size=config.batch_size,
        seed=config.seed,
        accelerator=accelerator,
        state_path=folder / "state.safetensors",
        identity=make_identity(config, *data),
        minutes_per_state=config.minutes_per_state,
    )


def finetune(config: FinetuningConfig, kind: str, build: Callable[[FinetuningConfig, torch.device], Trainable]) -> dict:
    """Trains and writes the result, unless it is there already; returns the metrics.

    Args:
        config: of the script.
        kind: folder under `results_dir`.
        build: makes the decoder; everything random in it follows from the seed set before.
    """
    folder = result_folder(config, kind)
    data = load_texts(config, "train"), load_texts(config, "test")
    accelerator, device = make_accelerator(config, folder)
    if (stored := find_finished(folder, config, make_identity(config, *data), accelerator)) is not None:
        return stored
    model_config = load_config(config)
    tokenizer = load_tokenizer(config, model_config)
    train_tokens, test_tokens = (tokenize(part.texts, tokenizer, model_config, config.max_length) for part in data)
    set_seed(config.seed)
    run = build_run(config, trainable := build(config, device), data, (train_tokens, test_tokens),
                    (accelerator, device, folder))  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    train(run)
    if not accelerator.is_main_process:
        return {}
    save_head(folder / "head.safetensors", run.model.head, run.objective, run.identity)
    trainable.save(folder)
    extra = {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
    metrics = save_result(folder, run, *data, extra)
    print_scores(metrics)
    print(folder / "metrics.json")
    return metrics
