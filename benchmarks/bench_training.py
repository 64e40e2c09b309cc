"""Compare steps per second and memory of our training loop with a plain loop: same model, optimiser and batch size.

    python -m benchmarks.bench_training
    python -m benchmarks.bench_training --kind full_finetuning --model_name smollm2

The plain loop (PEFT's model for LoRA) takes rows in random order, passes an attention mask and, as a data collator
does, pads every batch to its longest text. Ours groups texts of like length. Both run the decoder alone and take the
same number of texts a step, in turns; ratios are of the fastest rounds. Memory: on a GPU the peak of allocated memory,
on a CPU the activations that the largest step keeps for its backward pass.
Writes results/benchmarks/bench_training.<model>.<kind>.json.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import from_scratch
import lora_finetuning
from benchmarks.harness import alternate, write_result
from utils.data.load import load_splits
from utils.models.tokens import TokenizedTexts, load_tokens
from utils.script import pick_device, run_script
from utils.settings import Data, Model, Run, with_values
from utils.training.finetune import build_run
from utils.training.loop import Progress, TrainingRun, start_accelerator, train_step
from utils.training.objective import BatchOrder


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    kind: Literal["lora", "full_finetuning"] = "lora"  # weights to train
    batch_size: int = 16  # texts per step
    num_steps: int = 20  # steps of a round
    num_rounds: int = 3  # rounds; the fastest counts
    model: Model = Model(max_length=128)  # bfloat16 is slow on a CPU without instructions for it
    data: Data = Data()
    run: Run = Run(device="cpu")


def make_run(config: Config) -> tuple[TrainingRun, TokenizedTexts]:
    """Makes a run with the paper's hyperparameters and this batch size; also returns its training tokens."""
    script: Any = lora_finetuning if config.kind == "lora" else from_scratch
    options = {"batch_size": config.batch_size} | ({} if config.kind == "lora" else {"init": "pretrained"})
    with tempfile.TemporaryDirectory() as folder:
        settings = script.Config(model=config.model, data=config.data, run=config.run)
        settings = with_values(settings, **options, results_dir=Path(folder))
        data = load_splits(settings.data, settings.run)
        run = build_run(settings, script.build, data, start_accelerator(settings, Path(folder)), Path(folder))
    return run, load_tokens(data["train"].texts, settings.model, settings.run)


def make_plain(run: TrainingRun, tokens: TokenizedTexts) -> TrainingRun:
    """Turns the run into the plain loop, with an attention mask and random order."""
    device, decoder = run.targets.device, run.model.decoder.forward

    def inputs(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        input_ids, lengths = tokens.pad(rows)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long().to(device)
        run.model.decoder.forward = partial(decoder, attention_mask=mask)
        return input_ids.to(device), lengths.to(device)

    order = BatchOrder(len(tokens.lengths), run.order.rows_per_step, run.order.seed)
    return replace(run, inputs=inputs, order=order)


def steps(run: TrainingRun, progress: Progress, num_steps: int) -> None:
    """Runs `num_steps` optimiser steps."""
    run.model.train()
    for _ in range(num_steps):
        train_step(run, progress, run.model)


def peak_memory(run: TrainingRun, progress: Progress, num_steps: int) -> int:
    """Peak memory in bytes: on a GPU of allocated memory, on a CPU of tensors that the largest step keeps."""
    if run.targets.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        steps(run, progress, num_steps)
        return torch.cuda.max_memory_allocated()
    weights = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    sizes: list[dict[int, int]] = []  # for each step, address -> bytes of every storage that it keeps

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(num_steps):
            sizes.append({})
            steps(run, progress, 1)
    return max(sum(size for address, size in step.items() if address not in weights) for step in sizes)


def main(config: Config) -> None:
    """Measures both loops in one run, prints the table and writes it."""
    device = pick_device(config.run.device)
    both = {"ours": make_run(config)[0], "plain": make_plain(*make_run(config))}
    progress = {name: Progress() for name in both}
    runs = {name: partial(steps, run, progress[name], config.num_steps) for name, run in both.items()}
    alternate(runs, 1, device)  # warm-up
    table = {
        name: {
            "steps_per_second": config.num_steps / min(rounds),
            "peak_bytes": float(peak_memory(both[name], progress[name], config.num_steps)),
        }
        for name, rounds in alternate(runs, config.num_rounds, device).items()
    }
    table["ratio"] = {key: value / table["plain"][key] for key, value in table["ours"].items()}
    for name, row in table.items():
        print(f"{name:<6}" + "".join(f"{value:14,.2f} {key.replace('_', ' ')}" for key, value in row.items()))
    write_result(config, f"bench_training.{config.model.path_name}.{config.kind}", table)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
