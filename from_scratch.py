"""Train an LM from random weights, or all weights of a pretrained one, with a linear head on labelled texts.

    python from_scratch.py                                           # embedded architecture and data, random weights
    python from_scratch.py --init pretrained                         # full fine-tuning
    python from_scratch.py --batch_size 16 --num_steps 1500
    python from_scratch.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion

Reads the dataset and the model's configuration and tokenizer, and its weights only with --init pretrained.
Writes results/from_scratch/<model>/<dataset>/, with --init pretrained results/full_finetuning/<model>/<dataset>/:
metrics.json, history.csv, head.safetensors and the model itself in <model>+from_scratch+<dataset>/ (or
+full_finetuning+), a folder that every script takes as --model_name.

Head, optimiser, schedule and evaluation are those of lora_finetuning.py; only the model differs: the script trains
every weight, in float32, with products in bfloat16 (--dtype).
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from utils.data.load import load_splits
from utils.hub import hub_errors
from utils.models.load import load_causal_lm, load_config, load_tokenizer
from utils.models.states import decoder_of
from utils.models.table import repository
from utils.results import write_atomically
from utils.script import run_script
from utils.settings import Unrecorded, with_values
from utils.training.finetune import FinetuningConfig, Hyperparameters, Trainable, finetune


@dataclass(frozen=True)
class Output(Unrecorded):
    """Optional results."""

    save_model: bool = True  # also write the trained model, 4 bytes a parameter


@dataclass(frozen=True, kw_only=True)
class Config(FinetuningConfig):
    """Edit the defaults here, or override any of them from the shell."""

    init: Literal["random", "pretrained"] = "random"  # weights to start from; pretrained is full fine-tuning
    training: Hyperparameters = Hyperparameters(
        pooling="mean", dropout=0.05, num_steps=10000, batch_size=1, gradient_accumulation=1,
        learning_rate=1e-4, weight_decay=1e-5, warmup=0.05, steps_per_evaluation=500,
    )  # fmt: skip
    output: Output = Output()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "random" and self.model.adapter_dir:
            raise ValueError("--adapter_dir needs --init pretrained: random weights take no adapter")

    @property
    def kind(self) -> str:
        """The folder under `results_dir`, and part of the trained model's name."""
        return "from_scratch" if self.init == "random" else "full_finetuning"


def build(config: Config) -> Trainable:
    """The decoder of the causal LM, with all weights trainable in float32, and the function that saves the model."""
    from transformers import AutoModelForCausalLM

    if config.init == "pretrained":
        in_float32 = with_values(config.model, dtype="float32")
        model: Any = load_causal_lm(in_float32, config.run)
    else:
        model_config, trust = load_config(config.model, config.run), config.run.trust_remote_code
        with hub_errors(repository(config.model.model_name, config.model.revision)):
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, trust_remote_code=trust)
    model.config.use_cache = False
    name = f"{config.model.path_name}+{config.kind}+{config.data.path_name}"

    def save(folder: Path) -> None:
        if config.output.save_model:
            with write_atomically(folder / name) as temporary:
                model.save_pretrained(temporary)
                load_tokenizer(config.model, config.run, model.config).save_pretrained(temporary)

    return decoder_of(model), save


def main(config: Config) -> None:
    """Trains and writes the result, unless it exists already."""
    load_config(config.model, config.run)  # refuses a wrong name before it reads the data
    finetune(config, config.kind, build, load_splits(config.data, config.run))


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
