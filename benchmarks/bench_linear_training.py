"""What 50 epochs of a linear probe cost on stored pooled states, and with the LM run again in every epoch.

    python benchmarks/bench_linear_training.py

Ours is all of linear_training.py's work on the model: the passes of cache.py over both splits (the moments included)
and every epoch. The other is a plain loop: batches of 64 texts in random order, padded to the longest of the batch,
through the base model without gradient, then head, loss and step; and the test split after the epoch. It is measured
for `epochs_measured` epochs and multiplied up to 50. Texts are cut at `max_length`: padding to docstrings of up to
1,024 tokens would cost the plain loop far more. Writes results/benchmarks/bench_linear_training.json.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts stand one folder up

import torch
from torch.nn.functional import cross_entropy

import cache
import linear_training
from utils.checkpoints import make_identity
from utils.data import LabelledTexts, load_texts
from utils.io import environment, pick_device, run_script, save_json, settings
from utils.models import TokenizedTexts, load_base_model, load_config, load_tokenizer, run_base_model, tokenize
from utils.training import BatchOrder, Head, Objective, make_accelerator, train


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


def ours(config: linear_training.Config, data: tuple[LabelledTexts, LabelledTexts]) -> tuple[float, float]:
    """Seconds of the passes through the LM and of the epochs."""
    start = time.perf_counter()
    states = (
        linear_training.pooled_states(config, "train", data[0]),
        linear_training.pooled_states(config, "test", data[1]),
    )
    passes = time.perf_counter() - start
    objective = Objective.of(data[0])
    targets = [objective.targets(part.labels) for part in data]
    parts = {name: (states[i], targets[i]) for i, name in enumerate(("train", "test"))}
    place = (*make_accelerator(config, config.results_dir), config.results_dir)
    run = linear_training.build_run(config, parts, objective, make_identity(config, *data), place)
    train(run)
    return passes, run.seconds


def plain_epochs(
    config: linear_training.Config,
    data: tuple[LabelledTexts, LabelledTexts],
    tokens: tuple[TokenizedTexts, TokenizedTexts],
    num_epochs: int,
) -> float:
    """Seconds of `num_epochs` epochs with the LM in the loop."""
    device = pick_device(config.device)
    model = load_base_model(config, device)
    objective = Objective.of(data[0])
    targets = [objective.targets(part.labels).to(device) for part in data]
    head = Head(model.config.hidden_size, objective.num_labels, config.dropout).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    orders = [BatchOrder(len(part.texts), config.batch_size, config.seed) for part in data]

    def outputs(split: int, rows):
        input_ids, lengths = (tensor.to(device) for tensor in tokens[split].pad(rows))
        return head(cache.pool(run_base_model(model, input_ids), lengths, "mean").clone())

    start = time.perf_counter()
    for step in range(num_epochs * orders[0].steps_per_epoch):
        rows = orders[0](step)
        loss = cross_entropy(outputs(0, rows), targets[0][torch.from_numpy(rows).to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % orders[0].steps_per_epoch == 0:
            with torch.no_grad():
                right = [
                    (outputs(1, rows).argmax(1) == targets[1][torch.from_numpy(rows).to(device)]).sum().item()
                    for rows in map(orders[1], range(orders[1].steps_per_epoch))
                ]
    print(f"plain loop: test accuracy {sum(right) / len(data[1].texts):.4f} after {num_epochs} epochs")
    return time.perf_counter() - start


def main(config: Config) -> None:
    """Measures both in one run, prints the table and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        probe = linear_training.Config(
            model_name=config.model_name,
            dataset_name=config.dataset_name,
            max_samples=config.max_samples,
            max_length=config.max_length,
            num_epochs=config.num_epochs,
            device=config.device,
            results_dir=Path(folder),
        )
        data = load_texts(probe, "train"), load_texts(probe, "test")
        model_config = load_config(probe)
        tokenizer = load_tokenizer(probe, model_config)
        train_tokens, test_tokens = (tokenize(part.texts, tokenizer, model_config, config.max_length) for part in data)
        passes, epochs = ours(probe, data)
        measured = plain_epochs(probe, data, (train_tokens, test_tokens), config.epochs_measured)
    plain = measured / config.epochs_measured * config.num_epochs
    result = {
        "ours_passes_seconds": passes,
        "ours_epochs_seconds": epochs,
        "ours_seconds": passes + epochs,
        "plain_epoch_seconds": measured / config.epochs_measured,
        "plain_seconds_extrapolated": plain,
        "ratio": plain / (passes + epochs),
    }
    print(f"\n{config.num_epochs} epochs of {config.model_name} on {len(data[0].texts)} + {len(data[1].texts)} texts")
    for name, value in result.items():
        print(f"{name:<30}{value:>10.2f}")
    path = config.results_dir / "benchmarks" / "bench_linear_training.json"
    save_json(path, {"config": settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
