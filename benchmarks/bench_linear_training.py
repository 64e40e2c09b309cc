"""What 50 epochs of a linear probe cost on stored pooled states, and with the LM run again in every epoch.

    python -m benchmarks.bench_linear_training

Ours is all of linear_training.py's work on the model: the passes of cache.py over both splits (the moments included)
and every epoch. The other is a plain loop: batches of 64 texts in random order, padded to the longest of the batch,
through the base model without gradient, then head, loss and step; and the test split after the epoch. It is measured
for `epochs_measured` epochs and multiplied up to 50. Texts are cut at `max_length`: padding to docstrings of up to
1,024 tokens would cost the plain loop far more. Writes results/benchmarks/bench_linear_training.json.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import linear_training
from utils.data.load import LabelledTexts, load_splits
from utils.models.identity import load_config
from utils.models.load import TokenizedTexts, load_base_model, load_tokenizer, tokenize
from utils.models.states import pool, run_base_model
from utils.results import save_json
from utils.script import environment, pick_device, run_script
from utils.settings import all_settings, with_values
from utils.training.loop import make_identity, start_accelerator, train
from utils.training.objective import BatchOrder, Head, Objective


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str = "tiny"  # hub id, local folder, or "tiny"
    dataset_name: str = "docstrings/library"  # as in linear_training.py
    max_samples: int | None = None  # stratified sample of each split; None: all rows
    max_length: int = 128  # tokens per text
    num_epochs: int = 50  # epochs compared
    epochs_measured: int = 1  # epochs of the plain loop that are really run
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    results_dir: Path = Path("results")  # where the result goes


def ours(config: linear_training.Config, data: dict[str, LabelledTexts]) -> tuple[float, float]:
    """Seconds of the passes through the LM and of the epochs."""
    start = time.perf_counter()
    states = {
        "train": linear_training.pooled_states(config, "train", data["train"]),
        "test": linear_training.pooled_states(config, "test", data["test"]),
    }
    passes = time.perf_counter() - start
    objective = Objective.of(data["train"])
    parts = {split: (states[split], objective.targets(part.labels)) for split, part in data.items()}
    accelerator = start_accelerator(config, config.run.results_dir)
    identity = make_identity(config, data)
    run = linear_training.build_run(config, parts, objective, identity, accelerator, config.run.results_dir)
    return passes, train(run).seconds


def plain_epochs(
    config: linear_training.Config,
    data: dict[str, LabelledTexts],
    tokens: dict[str, TokenizedTexts],
    num_epochs: int,
) -> float:
    """Seconds of `num_epochs` epochs with the LM in the loop."""
    device = pick_device(config.run.device)
    model = load_base_model(config.model, config.run, device)
    objective = Objective.of(data["train"])
    targets = {split: objective.targets(part.labels).to(device) for split, part in data.items()}
    head = Head(model.config.hidden_size, objective.num_labels, config.dropout).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    orders = {split: BatchOrder(len(part.texts), config.batch_size, config.data.seed) for split, part in data.items()}

    def outputs(split: str, rows: np.ndarray) -> torch.Tensor:
        input_ids, lengths = (tensor.to(device) for tensor in tokens[split].pad(rows))
        return head(pool(run_base_model(model, input_ids), lengths, "mean").clone())

    def num_right(rows: np.ndarray) -> int:
        right = outputs("test", rows).argmax(1) == targets["test"][torch.from_numpy(rows).to(device)]
        return int(right.sum())

    start = time.perf_counter()
    for step in range(num_epochs * orders["train"].steps_per_epoch):
        rows = orders["train"](step)
        loss = cross_entropy(outputs("train", rows), targets["train"][torch.from_numpy(rows).to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % orders["train"].steps_per_epoch == 0:
            with torch.no_grad():
                right = sum(map(num_right, map(orders["test"], range(orders["test"].steps_per_epoch))))
    print(f"plain loop: test accuracy {right / len(data['test'].texts):.4f} after {num_epochs} epochs")
    return time.perf_counter() - start


def main(config: Config) -> None:
    """Measures both in one run, prints the table and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("model_name", "dataset_name", "max_samples", "max_length", "num_epochs", "device")
        asked = {name: getattr(config, name) for name in names}
        probe = with_values(linear_training.Config(), **asked, results_dir=Path(folder))
        data = load_splits(probe.data, probe.run)
        model_config = load_config(probe.model, probe.run)
        tokenizer = load_tokenizer(probe.model, probe.run, model_config)
        tokens = {
            split: tokenize(part.texts, tokenizer, model_config, config.max_length) for split, part in data.items()
        }
        passes, epochs = ours(probe, data)
        measured = plain_epochs(probe, data, tokens, config.epochs_measured)
    plain = measured / config.epochs_measured * config.num_epochs
    result = {
        "ours_passes_seconds": passes,
        "ours_epochs_seconds": epochs,
        "ours_seconds": passes + epochs,
        "plain_epoch_seconds": measured / config.epochs_measured,
        "plain_seconds_extrapolated": plain,
        "ratio": plain / (passes + epochs),
    }
    sizes = " + ".join(str(len(part.texts)) for part in data.values())
    print(f"\n{config.num_epochs} epochs of {config.model_name} on {sizes} texts")
    for name, value in result.items():
        print(f"{name:<30}{value:>10.2f}")
    path = config.results_dir / "benchmarks" / "bench_linear_training.json"
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
