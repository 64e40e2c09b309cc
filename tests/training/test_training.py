"""utils/training/loop.py and finetune.py: order, schedule, gradients, memory, evaluation; and several processes."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import from_scratch
import lora_finetuning
from tests.conftest import configure
from utils.data.load import LabelledTexts, load_splits, load_texts
from utils.models.openelm import OpenELMConfig
from utils.models.tokens import TokenizedTexts, load_tokens
from utils.results import result_path
from utils.script import UserError, message_of
from utils.training import loop
from utils.training.finetune import build_run, predict
from utils.training.loop import Progress, TrainingRun, accumulate_gradients, best_row, train_step
from utils.training.objective import BatchOrder, Objective, save_head

ARCHITECTURES = ("qwen2", "llama", "openelm")


def model_folder(architecture: str, model_dirs: dict[str, Path]) -> Path:
    """A random two-layer model of the architecture and its tokenizer; OpenELM beside the others."""
    if architecture != "openelm":
        return model_dirs[architecture]
    folder = model_dirs["qwen2"].parent / "random-openelm"
    if not folder.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(model_dirs["qwen2"])
        config = OpenELMConfig(
            vocab_size=len(tokenizer), num_transformer_layers=2, model_dim=32, head_dim=8, num_gqa_groups=2,
            ffn_dim_divisor=8, share_input_output_layers=True,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_run(script, config) -> TrainingRun:
    """A run as `finetune` builds it."""
    data, folder = load_splits(config.data, config.run), result_path("test", config.run, config.model, config.data)
    return build_run(config, script.build, data, loop.start_accelerator(config, folder), folder)


def tokens_of_test(config) -> TokenizedTexts:
    return load_tokens(load_texts(config.data, config.run, "test").texts, config.model, config.run)


def take_steps(run: TrainingRun, number: int) -> list[float]:
    """The losses of the first steps of a run."""
    progress = Progress()
    return [train_step(run, progress, run.model) for _ in range(number)]


@pytest.fixture
def settings(names, tmp_path) -> dict:
    """A few steps on made-up rows."""
    short = {"dtype": "float32", "num_steps": 20, "steps_per_evaluation": 10, "batch_size": 4}
    return names | short | {"device": "cpu", "results_dir": tmp_path}


@pytest.fixture
def run(settings) -> TrainingRun:
    """A run of from_scratch.py; in evaluation, as the masks of dropout depend on the batch."""
    made = make_run(from_scratch, configure(from_scratch, **settings, warmup=0.0))
    made.model.eval()
    return made


# ------------------------------------------------------------------ order
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("num_rows", "per_step"), [(103, 8), (16, 16), (5, 16), (7, 1)])
def test_every_row_comes_once_an_epoch_and_step_alone_says_which(num_rows, per_step, grouped):
    lengths = np.random.default_rng(0).integers(1, 90, num_rows) if grouped else None
    order = BatchOrder(num_rows, per_step, 3, lengths)
    steps = [order(step) for step in range(2 * order.steps_per_epoch)]
    first, second = steps[: order.steps_per_epoch], steps[order.steps_per_epoch :]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(num_rows)) and max(map(len, epoch)) <= per_step
    assert num_rows <= per_step or list(np.concatenate(first)) != list(np.concatenate(second))
    fresh = BatchOrder(num_rows, per_step, 3, lengths)
    assert np.array_equal(fresh(2 * len(first) - 1), second[-1]) and np.array_equal(fresh(0), first[0])  # out of order


def test_rows_of_like_length_come_together_in_random_order():
    lengths, padding = np.random.default_rng(0).geometric(0.03, 4000), []
    for order in (BatchOrder(4000, 16, 0), BatchOrder(4000, 16, 0, lengths)):
        batches = [order(step) for step in range(order.steps_per_epoch)]
        padding.append(sum(len(rows) * lengths[rows].max() for rows in batches) / lengths.sum())
    assert padding[1] < 1.1 < 2 < padding[0]
    longest = [lengths[rows].max() for rows in batches]
    assert abs(np.corrcoef(longest, np.arange(len(longest)) % 50)[0, 1]) < 0.2  # 50 are sorted: not long to short


# ------------------------------------------------------------------ objective and head
def test_regression_targets_are_scaled_and_a_saved_head_gives_raw_labels_for_raw_states(tmp_path):
    labels = np.random.default_rng(0).normal(5000, 40, 200)
    objective = Objective.of(LabelledTexts(["a"] * 200, labels, [], ""))
    targets = objective.targets(labels)
    assert targets.mean().abs() < 1e-5 and targets.std() == pytest.approx(1, abs=0.01)
    scores = objective.scores(torch.zeros(200, 1), targets)
    assert scores["mse"] == pytest.approx(labels.var(), rel=1e-4) and scores["loss"] == pytest.approx(1, rel=1e-4)
    assert objective.scores(targets[:, None], targets)["r2"] == pytest.approx(1)
    torch.manual_seed(0)
    states = torch.randn(50, 6) * torch.tensor([1, 10, 0.1, 3, 1, 1]) + 4
    head, mean, spread = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(6, 1)), states.mean(0), states.std(0)
    save_head(tmp_path / "head.safetensors", head.eval(), objective, {}, mean, spread)
    stored = load_file(tmp_path / "head.safetensors")
    expected = head((states - mean) / spread) * objective.scale + objective.mean
    torch.testing.assert_close(states @ stored["weight"].T + stored["bias"], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ optimiser and schedule
def test_learning_rates_are_the_documented_ones(settings):
    config = configure(from_scratch, **settings | {"num_steps": 40, "steps_per_evaluation": 1, "warmup": 0.25})
    run, used = make_run(from_scratch, config), []
    step = run.optimizer.step
    run.optimizer.step = lambda: used.append(run.optimizer.param_groups[0]["lr"]) or step()
    progress = loop.train(replace(run, evaluate=lambda model: {"test_accuracy": 0.0}))
    expected = [step / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / 30)) for step in range(40)]
    assert used == pytest.approx([1e-4 * factor for factor in expected], abs=1e-12)
    assert used == [row["learning_rate"] for row in progress.history]


def test_optimizer_and_defaults_are_the_papers(run):
    adafactor = {"lr": 1e-4, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None}
    adafactor |= {"weight_decay": 1e-5, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    assert adafactor.items() <= run.optimizer.param_groups[0].items()
    expected = {"num_steps": 5000, "batch_size": 1, "gradient_accumulation": 1, "steps_per_evaluation": 500}
    expected |= {"learning_rate": 1e-4, "weight_decay": 1e-5, "warmup": 0.05, "dropout": 0.05, "pooling": "mean"}
    assert vars(lora_finetuning.Config().training) == expected
    assert vars(from_scratch.Config().training) == expected | {"num_steps": 10000}


# ------------------------------------------------------------------ gradients and memory
def process(rank: int, run: TrainingRun) -> Any:
    """The accelerator of one of three processes; its sums are its own part alone."""
    real = run.accelerator
    methods = {"reduce": lambda tensor, how: tensor, "backward": real.backward, "no_sync": real.no_sync}
    return SimpleNamespace(process_index=rank, num_processes=3, **methods)


def gradients(run: TrainingRun, step: int = 0) -> dict[str, torch.Tensor]:
    run.optimizer.zero_grad(set_to_none=True)
    accumulate_gradients(run, step, run.model, run.order(step))
    return {name: torch.as_tensor(parameter.grad) for name, parameter in run.trained_parameters().items()}


def test_accumulation_gives_the_gradient_of_the_whole_batch(run):
    run = replace(run, batch_size=16, order=BatchOrder(168, 16, 0))
    expected = gradients(run)
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-3
    for batch_size in (4, 1):
        for name, gradient in gradients(replace(run, batch_size=batch_size)).items():
            torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5)


def test_texts_on_both_sides_of_a_rope_limit_never_share_a_forward_pass(settings, monkeypatch):
    monkeypatch.setattr("utils.models.tokens.rope_limit", lambda config: 15)
    run, sides = make_run(from_scratch, configure(from_scratch, **settings | {"batch_size": 168})), []
    run.model.register_forward_pre_hook(lambda model, inputs: sides.append({*(inputs[1] > 15).tolist()}))
    for work in (lambda: take_steps(run, 1), lambda: run.evaluate(run.model)):
        sides.clear()
        work()
        assert {True} in sides and {False} in sides and {True, False} not in sides


def test_a_device_too_small_for_a_batch_is_a_users_error():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert message_of(error).startswith("CUDA out of memory. Lower --tokens_per_batch or --max_length; in training")


def test_a_loss_that_is_not_finite_names_step_and_rows(run, monkeypatch):
    weights = {name: parameter.detach().clone() for name, parameter in run.trained_parameters().items()}
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *inputs: forward(*inputs) * torch.inf)
    with pytest.raises(UserError, match=f"step 2, rows {', '.join(map(str, run.order(1)))} of train"):
        train_step(run, Progress(step=1), run.model)
    for name, parameter in run.trained_parameters().items():
        assert torch.equal(parameter, weights[name])  # not spoilt by that step


# ------------------------------------------------------------------ evaluation and processes
@pytest.mark.parametrize(("architecture", "pooling"), [("openelm", "mean"), ("llama", "last")])
def test_evaluation_does_not_depend_on_batches_and_padding(settings, model_dirs, architecture, pooling):
    settings |= {"model_name": str(model_folder(architecture, model_dirs)), "pooling": pooling}
    config = configure(from_scratch, **settings)
    run, tokens = make_run(from_scratch, config), tokens_of_test(config)
    run.model.eval()
    alone = predict(run.model, tokens, 3, 1, run.accelerator)
    for budget in (100, 10**6):
        together = predict(run.model, tokens, 3, budget, run.accelerator)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert alone.abs().sum(1).min() > 0  # every text has been run


def test_processes_share_texts_and_steps_without_changing_a_number(run, settings):
    """Outputs of three processes add up to those of one; the mean of their gradients, which DDP takes, is its own.

    With two rows in all, the third process trains on a row of weight 0 and evaluates none.
    """
    run, tokens = replace(run, order=BatchOrder(168, 7, 0)), tokens_of_test(configure(from_scratch, **settings))
    shared = [replace(run, accelerator=process(rank, run)) for rank in range(3)]
    parts = [gradients(one) for one in shared]
    for name, gradient in gradients(run).items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, gradient, rtol=1e-4, atol=1e-6)
    two = replace(tokens, token_ids=tokens.token_ids[: tokens.offsets[2]], offsets=tokens.offsets[:3])
    for some in (tokens, two):
        outputs = [predict(run.model, some, 3, 100, one.accelerator) for one in shared]
        assert ((torch.stack(outputs) != 0).any(2).sum(0) == 1).all()
        torch.testing.assert_close(sum(outputs), predict(run.model, some, 3, 100, run.accelerator))
    assert not outputs[2].any()
    run.optimizer.zero_grad(set_to_none=True)
    assert accumulate_gradients(shared[2], 0, run.model, np.array([5, 7])) == 0
    for parameter in run.trained_parameters().values():
        assert parameter.grad is not None and not parameter.grad.any()


# ------------------------------------------------------------------ results
@pytest.mark.parametrize(
    ("score", "validated", "best"), [("accuracy", True, 2), ("r2", True, 2), ("accuracy", False, 3), ("r2", False, 4)]
)
def test_the_best_step_is_that_of_the_lowest_validation_loss_else_of_the_best_test_score(score, validated, best):
    """Each column has its best value, and its worst, at a step of its own."""
    columns = {"step": [1, 2, 3, 4, 5], "test_loss": [0.5, 0.6, 0.4, 0.3, 0.9]}
    columns[f"test_{score}"] = {"accuracy": [0.1, 0.5, 0.9, 0.8, 0.7], "r2": [0.3, 0.2, 0.4, 0.1, 0.9]}[score]
    columns |= {"validation_loss": [0.9, 0.1, 0.5, 0.6, 0.7]} if validated else {}
    history = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert best_row(history, is_regression=score == "r2")["step"] == best
