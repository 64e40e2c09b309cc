"""Train an LM from random weights, or all weights of a pretrained one, with a linear head on labelled texts.

    python from_scratch.py                                           # embedded architecture and data, random weights
    python from_scratch.py --init pretrained                         # full fine-tuning
    python from_scratch.py --batch_size 16 --num_steps 1500
    python from_scratch.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion

Reads the dataset, and of the model its configuration and tokenizer (its weights only with --init pretrained).
Writes results/from_scratch/<model>/<dataset>/, with --init pretrained results/full_finetuning/<model>/<dataset>/:
metrics.json, history.csv, head.safetensors and model/, which every script takes as --model_name.

Head, optimiser, schedule and evaluation are those of lora_finetuning.py; only the model is built otherwise: every
weight is trained, in float32, with products in bfloat16 (--dtype).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoModelForCausalLM

from utils.checkpoints import replace_folder
from utils.finetuning import FinetuningConfig, Trainable, finetune
from utils.io import run_script
from utils.models import hub_errors, load_causal_lm, load_config, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(FinetuningConfig):
    """Edit the defaults here, or override any of them from the shell."""

    init: Literal["random", "pretrained"] = "random"  # weights to start from; pretrained is full fine-tuning
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the products; the weights are float32
    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text: mean of its tokens, or its last token
    dropout: float = 0.05  # on the pooled state
    num_steps: int = 10000  # optimiser steps
    batch_size: int = 1  # texts of one forward pass; texts of like length come together
    gradient_accumulation: int = 1  # forward passes of one optimiser step, shared among the processes
    learning_rate: float = 1e-4  # peak, of Adafactor
    weight_decay: float = 1e-5  # of Adafactor
    warmup: float = 0.05  # share of the steps in which the learning rate rises; then half a cosine down to 0
    steps_per_evaluation: int = 500  # on the whole test split
    save_model: bool = True  # write the trained model too, 4 bytes a parameter
    SPEED_OR_PLACE: ClassVar = (*FinetuningConfig.SPEED_OR_PLACE, "save_model")


def build(config: FinetuningConfig, device: torch.device) -> Trainable:
    """The causal LM with float32 weights, whatever its configuration says; its decoder, of which all is trained."""
    assert isinstance(config, Config)
    in_float32 = replace(config, dtype="float32")
    if config.init == "pretrained":
        model: Any = load_causal_lm(in_float32, torch.device("cpu"))
    else:
        with hub_errors(config.model_name, config.revision):
            model = AutoModelForCausalLM.from_config(
                load_config(config), dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    model.config.use_cache = False

    def save(folder: Path) -> None:
        if config.save_model:
            with replace_folder(folder / "model") as temporary:
                model.save_pretrained(temporary)
                load_tokenizer(config, model.config).save_pretrained(temporary)

    return Trainable(getattr(model, model.base_model_prefix), save, config.dtype)


def main(config: Config) -> None:
    """Trains and writes the result, unless it is there already."""
    finetune(config, "from_scratch" if config.init == "random" else "full_finetuning", build)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
