"""Train an LM and a linear head on labelled texts, for lora_finetuning.py and from_scratch.py.

They build and save the model. Shapes: b texts of a batch, t tokens, d hidden size, c classes (1 for regression).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from utils.algebra.scores import SCORES
from utils.data.load import LabelledTexts
from utils.models.batches import token_batches
from utils.models.check import self_check
from utils.models.load import load_config, load_tokenizer
from utils.models.states import pool
from utils.models.tokens import TokenizedTexts, tokenize
from utils.results import result_path
from utils.settings import Data, Model, Run, Session, check
from utils.training.loop import TrainingRun, make_identity, train_once
from utils.training.objective import BatchOrder, Objective, make_head, save_head


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Hyperparameters of the head, the optimiser (Adafactor) and its schedule; the scripts give their values."""

    pooling: Literal["mean", "last"]  # pooled state of a text: mean of its tokens, or its last token
    dropout: float  # dropout on the pooled state
    num_steps: int  # optimiser steps
    batch_size: int  # texts of one forward pass, of similar length
    gradient_accumulation: int  # forward passes of one optimiser step, shared among the processes
    learning_rate: float  # peak of the learning rate
    weight_decay: float  # weight decay of Adafactor
    warmup: float  # share of the steps in which the learning rate rises; then half a cosine down to 0
    steps_per_evaluation: int  # optimiser steps between two evaluations on the whole test split

    def __post_init__(self) -> None:
        check(self, "at least 1", "num_steps", "batch_size", "gradient_accumulation", "steps_per_evaluation")
        check(self, "at least 0, below 3e38", "weight_decay")
        check(self, "positive, below 3e38", "learning_rate")
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
            raise ValueError("--dtype float16 does not train: its gradients underflow. Set --dtype bfloat16 or float32")


class Classifier(nn.Module):
    """Decoder, pooling over the tokens of the last hidden state, head: right-padded ids (b, t) -> (b, c) float32."""

    def __init__(self, decoder: nn.Module, head: nn.Module, pooling: str, dtype: str) -> None:
        super().__init__()
        self.decoder, self.head, self.pooling, self.dtype = decoder, head, pooling, dtype

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Outputs (b, c); the causal mask hides right padding from every valid token."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            states = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(pool(states.float(), lengths, self.pooling))  # never in half precision: sums over tokens


@torch.no_grad()
def predict(
    model: nn.Module, tokens: TokenizedTexts, num_labels: int, tokens_per_batch: int, accelerator: Any
) -> Tensor:
    """Outputs of all texts, (n, c) float32 on the CPU; every process fills in the rows of its batches."""
    device = next(model.parameters()).device
    outputs = torch.zeros(len(tokens.lengths), num_labels, device=device)
    batches = token_batches(tokens.lengths, tokens_per_batch, tokens.rope_limit)
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        outputs[torch.from_numpy(rows).to(device)] = model(*(tensor.to(device) for tensor in tokens.pad(rows)))
    return accelerator.reduce(outputs, "sum").cpu()


Trainable = tuple[Any, Callable[[Path], None]]  # a base model; the function that writes its trained part into a folder


def build_run(config: Any, build: Callable[[Any], Trainable], data: dict[str, LabelledTexts],
              accelerator: Any, folder: Path) -> TrainingRun:  # fmt: skip
    """Makes one run on train and test: classifier, optimiser, order of the rows and evaluation."""
    from transformers import Adafactor, get_cosine_schedule_with_warmup

    training, device = config.training, accelerator.device
    model_config = load_config(config.model, config.run)
    tokenizer = load_tokenizer(config.model, config.run, model_config)  # once: a large one takes seconds
    max_length = config.model.max_length
    tokens = {split: tokenize(part.texts, tokenizer, model_config, max_length) for split, part in data.items()}
    torch.manual_seed(config.data.seed)
    decoder, save = build(config)
    self_check(decoder.to(device), tokens["train"], config.model.model_name)
    objective = Objective.of(data["train"])
    targets = {split: objective.targets(part.labels) for split, part in data.items()}
    head = make_head(decoder.config.hidden_size, objective.num_labels, training.dropout)
    if config.session.gradient_checkpointing:
        decoder.activation_checkpointing_enable({"use_reentrant": False})
    model = Classifier(decoder, head, training.pooling, config.model.dtype).to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = {"scale_parameter": False, "relative_step": False, "weight_decay": training.weight_decay}
    optimizer = Adafactor(parameters, training.learning_rate, **plain)
    num_warmup = round(training.warmup * training.num_steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup, training.num_steps)
    rows_per_step = training.batch_size * training.gradient_accumulation
    identity = make_identity(config, data)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        outputs = predict(model, tokens["test"], objective.num_labels, config.run.batch_tokens(device), accelerator)
        return {f"test_{name}": value for name, value in objective.scores(outputs, targets["test"]).items()}

    def save_weights() -> None:
        save(folder)  # the largest file, written whole: if the disk is full, the old files stay
        save_head(folder / "head.safetensors", head, objective, identity)

    return TrainingRun(
        model=model,
        inputs=lambda rows: tuple(tensor.to(device) for tensor in tokens["train"].pad(rows)),
        targets=targets["train"].to(device),
        objective=objective,
        optimizer=optimizer,
        learning_rate=lambda step: training.learning_rate * schedule.lr_lambdas[0](step),
        order=BatchOrder(len(targets["train"]), rows_per_step, config.data.seed, tokens["train"].lengths),
        evaluate=evaluate,
        num_steps=training.num_steps,
        steps_per_evaluation=training.steps_per_evaluation,
        batch_size=training.batch_size,
        accelerator=accelerator,
        folder=folder,
        identity=identity,
        config=config,
        save_weights=save_weights,
        sides=tokens["train"].sides,
    )


def finetune(config: Any, kind: str, build: Callable[[Any], Trainable], data: dict[str, LabelledTexts]) -> dict:
    """Trains the model that `build` makes unless `kind` has its result; returns the metrics, in every process."""
    folder = result_path(kind, config.run, config.model, config.data)
    return train_once(config, folder, data, lambda accelerator: build_run(config, build, data, accelerator, folder))


def compare(before: dict, after: dict, probe: dict, lora: dict) -> dict[str, Any]:
    """Each score before and after LoRA; last accuracy (R2 for regression) of probe and LoRA; the gain, LoRA - probe.

    `before` and `after` are results of K_sweep.py, `probe` and `lora` are metrics.
    """
    name = "test_accuracy" if "test_accuracy" in lora["last"] else "test_r2"
    return {
        "config": lora["config"],
        "model_fingerprint": lora["model_fingerprint"],
        "rule": before["score"]["rule"],
        "ntps": {score: {"before": before["score"][score], "after": after["score"][score]} for score in SCORES},
        "score": name,
        "linear_probe": probe["last"][name],
        "lora": lora["last"][name],
        "gain": lora["last"][name] - probe["last"][name],
        "probe_settings": probe["config"],
    }


def print_comparison(result: dict) -> None:
    """Prints the table of `compare`."""
    rows = {name: [row["before"]["value"], row["after"]["value"]] for name, row in result["ntps"].items()}
    rows["linear probe, LoRA"] = [result["linear_probe"], result["lora"]]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["before", "after"]).astype(float)
    table["difference"] = table["after"] - table["before"]
    print("\n" + table.to_string(float_format="{:.4f}".format))
    print(f"NTPS: {result['rule']}; probe and LoRA: {result['score']} at the last step")
