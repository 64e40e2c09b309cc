"""linear_training.py: epochs over stored states are epochs through the LM; early stopping; states and kills."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

import cache
import linear_training
from tests.conftest import configure, only_result
from tests.processes import exit_codes, start
from utils.algebra.moments import load_pooled
from utils.data.load import load_texts
from utils.script import UserError
from utils.settings import Run, with_values
from utils.training import loop

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(names, tmp_path):
    """A config of a few epochs on made-up rows."""
    return configure(linear_training, **names, results_dir=tmp_path, device="cpu", num_epochs=4)


def result(results_dir):
    """Folder, metrics and history of the only result below a folder."""
    path, metrics = only_result(results_dir, "linear_training/*/*/metrics.json")
    return path.parent, metrics, list(csv.DictReader((path.parent / "history.csv").read_text().splitlines()))


def train_through_the_model(config) -> list[float]:
    """Plain loop: every batch of every epoch goes through the frozen LM; mean training loss of each epoch.

    Written without utils/training/loop.py, but for the two conventions that make runs comparable: a permutation per
    (seed, epoch), dropout masks per (seed, step, process).
    """
    model = AutoModel.from_pretrained(config.model.model_name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.model.model_name, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    data = load_texts(config.data, config.run, "train")
    labels = torch.from_numpy(data.labels)
    torch.manual_seed(config.data.seed)
    head = torch.nn.Linear(model.config.hidden_size, data.num_labels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    losses = []
    for epoch in range(config.num_epochs):
        order = np.random.default_rng((config.data.seed, epoch)).permutation(len(labels))
        for rows in np.split(order, range(config.batch_size, len(order), config.batch_size)):
            batch = tokenizer([data.texts[row] for row in rows], padding=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            pooled = (states * mask).sum(1) / mask.sum(1)
            seed = np.random.SeedSequence((config.data.seed, len(losses), 0)).generate_state(1)[0]
            torch.manual_seed(int(seed))
            loss = cross_entropy(head(torch.dropout(pooled, config.dropout, train=True)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return np.reshape(losses, (config.num_epochs, -1)).mean(1).tolist()


def test_epochs_over_stored_states_equal_epochs_through_the_model(settings, tmp_path, monkeypatch):
    config = with_values(settings, dropout=0.2, learning_rate=1e-2)
    expected = train_through_the_model(config)
    for split in ("train", "test"):  # states of every layer serve too
        moments = cache.Config(split, num_folds=3, model=config.model, data=config.data, run=config.run)
        cache.main(with_values(moments, save_pooled="all"))
    monkeypatch.setattr(cache, "load_base_model", lambda *_: pytest.fail("the model runs again"))
    linear_training.main(config)
    losses = [float(row["train_loss"]) for row in result(tmp_path)[2]]
    assert losses == pytest.approx(expected, abs=1e-5) and losses[0] - losses[-1] > 0.05
    linear_training.main(with_values(config, dropout=0.0, overwrite=True))
    others = [float(row["train_loss"]) for row in result(tmp_path)[2]]
    assert abs(others[-1] - expected[-1]) > 1e-3  # the comparison can tell two runs apart


def test_the_saved_head_scores_as_reported_on_raw_states(settings, tmp_path):
    config = with_values(settings, standardize=True, learning_rate=1e-2, num_epochs=20)
    linear_training.main(config)
    folder, metrics, _ = result(tmp_path)
    head = load_file(folder / "head.safetensors")
    [moments] = tmp_path.glob("moments/*/*/test.safetensors")
    labels = torch.from_numpy(load_texts(config.data, config.run, "test").labels)
    outputs = load_pooled(moments, -1) @ head["weight"].T + head["bias"]
    accuracy = (outputs.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(metrics["last"]["test_accuracy"], abs=1e-6)
    assert cross_entropy(outputs, labels).item() == pytest.approx(metrics["last"]["test_loss"], abs=1e-4)
    assert accuracy > metrics["baselines"]["majority"]["accuracy"] + 0.1


def test_patience_stops_and_the_best_epoch_is_the_validations(settings, tmp_path, monkeypatch):
    """Planted losses: training stops after two epochs without progress, not one; on test another epoch is the best."""
    losses, accuracies = iter([3, 2, 2.5, 1, 4, 5, 0.1, 0.1]), iter([0.1, 0.2, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1])

    def planted(*_):
        return {"validation_loss": next(losses), "test_loss": 1.0, "test_accuracy": next(accuracies)}

    monkeypatch.setattr(linear_training, "evaluate", planted)
    linear_training.main(with_values(settings, validation_share=0.2, patience=2, num_epochs=8, batch_size=200))
    _, metrics, rows = result(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert metrics["num_steps"] == metrics["last"]["step"] == 6
    assert metrics["best"]["step"] == 4 and metrics["best_rule"] == "validation loss"


def test_validation_rows_are_kept_out_of_training_and_of_the_standardisation(settings, monkeypatch):
    runs = []
    monkeypatch.setattr(loop, "train", lambda run: runs.append(run) or pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception):
        linear_training.main(with_values(settings, standardize=True, validation_share=0.4))
    [states] = runs[0].inputs(np.arange(len(runs[0].targets)))
    assert len(states) == 101 and states.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(states.std(0, correction=0), torch.ones(32), rtol=0, atol=1e-6)
    data = load_texts(settings.data, Run(), "train")
    kept, held_out = linear_training.validation_rows(data, 0.25, seed=1)
    assert sorted([*kept, *held_out]) == list(range(len(data.texts)))
    assert np.bincount(data.labels[held_out]).tolist() == pytest.approx([len(held_out) / 3] * 3, abs=1)


def test_standardised_probes_stand_beside_the_others(settings, tmp_path, capsys):
    linear_training.main(settings)
    folder, metrics, _ = result(tmp_path)
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(folder / "metrics.json")
    assert sorted(path.name for path in folder.iterdir()) == ["head.safetensors", "history.csv", "metrics.json"]
    linear_training.main(with_values(settings, standardize=True))
    assert (folder.parent / f"{folder.name}.standardized" / "metrics.json").is_file()
    assert json.loads((folder / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1)])
def test_sigterm_at_one_process_ends_all_with_a_state(settings, tmp_path, capfd, size, rank):
    """SIGTERM does not reach all machines at once: a process that ended alone would leave the others waiting."""
    whole, ended = (with_values(settings, results_dir=tmp_path / name) for name in ("whole", "ended"))

    def run(own):
        step = loop.train_step

        def terminated(run, progress, model):
            if own == rank and progress.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(run, progress, model)

        loop.train_step = terminated
        linear_training.main(with_values(ended, minutes_per_state=60.0))

    assert exit_codes(start(run, size)) == [143] * size
    capfd.readouterr()
    for config in (ended, whole):
        assert exit_codes(start(lambda _, config=config: linear_training.main(config), size)) == [0] * size
    assert capfd.readouterr().out.count("going on from step 5 of") == 1
    assert result(tmp_path / "whole")[2] == result(tmp_path / "ended")[2]


def test_with_overwrite_the_same_command_goes_on_and_the_old_result_stays_until_then(settings, tmp_path, monkeypatch):
    linear_training.main(settings)
    folder, old, _ = result(tmp_path)
    again, step, first_steps = with_values(settings, learning_rate=1e-2, overwrite=True), loop.train_step, []

    def interrupted(run, progress, model):
        first_steps.append(progress.step)
        if len(first_steps) == 7:
            raise KeyboardInterrupt
        return step(run, progress, model)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        linear_training.main(with_values(again, minutes_per_state=0.0))
    assert result(tmp_path)[1] == old and (folder / "state.safetensors").is_file()
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"state\.safetensors was made with other settings"):
        linear_training.main(with_values(settings, dropout=0.5))
    linear_training.main(again)
    assert first_steps[7] == 6 and result(tmp_path)[1]["config"]["learning_rate"] == 1e-2
