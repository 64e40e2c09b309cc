"""Train an LM and a linear head on labelled texts: the shared part of lora_finetuning.py and from_scratch.py.

The two scripts differ in how the model is built and in what is saved of it; settings, data, optimiser, schedule,
evaluation and results are here. b texts of a batch, t tokens, d hidden size, c classes (1 for regression).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from utils.data.load import LabelledTexts
from utils.models.batches import token_batches
from utils.models.check import self_check
from utils.models.load import load_config, load_tokenizer
from utils.models.states import pool
from utils.models.tokens import TokenizedTexts, tokenize
from utils.results import result_path
from utils.script import UserError, set_seed
from utils.settings import Data, Model, Run, Session, check
from utils.training.loop import METRICS, TrainingRun, make_identity, train_once
from utils.training.objective import BatchOrder, Objective, make_head, save_head

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Hyperparameters of the head, the optimiser (Adafactor) and its schedule; the scripts give their values."""

    pooling: Literal["mean", "last"]  # pooled state of a text: mean of its tokens, or its last token
    dropout: float  # on the pooled state
    num_steps: int  # optimiser steps
    batch_size: int  # texts of one forward pass; texts of like length come together
    gradient_accumulation: int  # forward passes of one optimiser step, shared among the processes
    learning_rate: float  # peak
    weight_decay: float  # as Adafactor takes it
    warmup: float  # share of the steps in which the learning rate rises; then half a cosine down to 0
    steps_per_evaluation: int  # on the whole test split

    def __post_init__(self) -> None:
        check(self, "at least 1", "num_steps", "batch_size", "gradient_accumulation", "steps_per_evaluation")
        check(self, "positive", "learning_rate")
        check(self, "in [0, 1)", "dropout", "warmup")


@dataclass(frozen=True)
class FinetuningSession(Session):
    """Settings of states and trackers of a training run; they cannot affect its results."""

    gradient_checkpointing: bool = False  # compute activations twice and store few: less memory, a third slower


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Settings that lora_finetuning.py and from_scratch.py share."""

    training: Hyperparameters
    model: Model = Model(dtype="bfloat16")
    data: Data = Data()
    session: FinetuningSession = FinetuningSession()
    run: Run = Run()

    def __post_init__(self) -> None:
        if self.model.dtype == "float16":
            raise ValueError("--dtype float16 does not train: its gradients underflow. Take bfloat16 or float32")


# a decoder (base model without lm_head, whose parameters that require a gradient are trained), and the function that
# writes its trained part into the folder of the result
Trainable = tuple[Any, Callable[[Path], None]]


# ------------------------------------------------------------------ model
class Classifier(nn.Module):
    """Decoder, pooling over the tokens of the last hidden state, head: right-padded ids (b, t) -> (b, c) float32."""

    def __init__(self, decoder: nn.Module, head: nn.Module, pooling: str, dtype: str) -> None:
        super().__init__()
        self.decoder, self.head, self.pooling, self.dtype = decoder, head, pooling, dtype

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """No mask: behind right padding the causal mask alone hides the padding from every valid token."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            states = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(pool(states.float(), lengths, self.pooling))  # never in half precision: sums over tokens


def build_optimizer(model: nn.Module, config: Hyperparameters) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Adafactor without first moment and with a plain learning rate, and warm-up with half a cosine down to 0."""
    from transformers import Adafactor, get_cosine_schedule_with_warmup

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = {"scale_parameter": False, "relative_step": False}
    optimizer = Adafactor(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, **plain)
    # not wrapped by accelerate, which would step it once for each process
    num_warmup = round(config.warmup * config.num_steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup, config.num_steps)


@torch.no_grad()
def predict(model: nn.Module, tokens: TokenizedTexts, num_labels: int, tokens_per_batch: int,
            accelerator: "Accelerator") -> Tensor:  # fmt: skip
    """Outputs of all texts, (n, c) float32 on the CPU, the same whatever the batches; each text is run once.

    Every process fills in the rows of its batches, and the sum over processes has them all.

    Raises:
        UserError: the device has too little memory for a batch.
    """
    device = next(model.parameters()).device
    outputs = torch.zeros(len(tokens.lengths), num_labels, device=device)
    batches = token_batches(tokens.lengths, tokens_per_batch, tokens.rope_limit)
    try:
        for rows in batches[accelerator.process_index :: accelerator.num_processes]:
            outputs[torch.from_numpy(rows).to(device)] = model(*(tensor.to(device) for tensor in tokens.pad(rows)))
    except torch.OutOfMemoryError:
        raise UserError(f"Out of memory in the evaluation. Lower --tokens_per_batch ({tokens_per_batch}).") from None
    return accelerator.reduce(outputs, "sum").cpu()


# ------------------------------------------------------------------ run
def build_run(config: FinetuningConfig, decoder: Any, data: dict[str, LabelledTexts],
              tokens: dict[str, TokenizedTexts], accelerator: "Accelerator", folder: Path) -> TrainingRun:  # fmt: skip
    """Classifier, optimiser, schedule, order and evaluation of one run; `data` and `tokens` are of train and test."""
    training, device = config.training, accelerator.device
    texts_per_step = training.batch_size * training.gradient_accumulation
    objective = Objective.of(data["train"])
    train_targets, test_targets = (objective.targets(data[split].labels) for split in ("train", "test"))
    head = make_head(decoder.config.hidden_size, objective.num_labels, training.dropout)
    if config.session.gradient_checkpointing:
        decoder.activation_checkpointing_enable({"use_reentrant": False})
    model = Classifier(decoder, head, training.pooling, config.model.dtype).to(device)
    optimizer, scheduler = build_optimizer(model, training)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        outputs = predict(model, tokens["test"], objective.num_labels, config.run.batch_tokens(device), accelerator)
        return {f"test_{name}": value for name, value in objective.scores(outputs, test_targets).items()}

    return TrainingRun(
        model=model,
        inputs=lambda rows: tuple(tensor.to(device) for tensor in tokens["train"].pad(rows)),
        targets=train_targets.to(device),
        objective=objective,
        optimizer=optimizer,
        scheduler=scheduler,
        order=BatchOrder(len(train_targets), texts_per_step, config.data.seed, tokens["train"].lengths),
        evaluate=evaluate,
        num_steps=training.num_steps,
        steps_per_evaluation=training.steps_per_evaluation,
        batch_size=training.batch_size,
        accelerator=accelerator,
        folder=folder,
        identity=make_identity(config, data),
        session=config.session,
        sides=tokens["train"].sides,
    )


def finetune(config: Any, kind: str, build: Callable[[Any], Trainable], data: dict[str, LabelledTexts]) -> dict:
    """Trains and writes the result, unless it exists already; returns the metrics, in every process.

    Args:
        config: settings of the script, a FinetuningConfig.
        kind: folder under `results_dir`.
        build: makes the decoder from `config`; its random numbers follow from the seed set before.
        data: train and test.
    """
    folder = result_path(kind, config.run, config.model, config.data)

    def prepare(accelerator: "Accelerator") -> tuple[TrainingRun, Callable[[], None]]:
        model_config = load_config(config.model, config.run)
        tokenizer = load_tokenizer(config.model, config.run, model_config)
        tokens = {
            split: tokenize(part.texts, tokenizer, model_config, config.model.max_length)
            for split, part in data.items()
        }
        set_seed(config.data.seed)
        decoder, save = build(config)
        decoder.to(accelerator.device)
        self_check(decoder, tokens["train"], config.model.model_name)
        run = build_run(config, decoder, data, tokens, accelerator, folder)

        def save_weights() -> None:
            save(folder)  # the largest, and in one piece: if it does not fit, the old files stay
            (folder / METRICS).unlink(missing_ok=True)  # of an earlier run
            save_head(folder / "head.safetensors", run.model.head, run.objective, run.identity)

        return run, save_weights

    return train_once(config, folder, data, prepare)
