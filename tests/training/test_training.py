"""utils/training/loop.py and finetune.py: order, schedule, gradients, memory, evaluation; and what several share."""

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
from utils.data.load import LabelledTexts, load_splits
from utils.models.load import load_config, load_tokenizer
from utils.models.openelm import OpenELMConfig
from utils.models.tokens import tokenize
from utils.results import result_path
from utils.script import UserError, set_seed
from utils.training.finetune import build_run, predict
from utils.training.loop import (
    Progress,
    TrainingRun,
    accumulate_gradients,
    best_row,
    make_identity,
    start_accelerator,
    train,
    train_step,
)
from utils.training.objective import BatchOrder, Objective, make_head, save_head

ARCHITECTURES = ("qwen2", "llama", "openelm")


def model_folder(architecture: str, model_dirs: dict[str, Path]) -> Path:
    """A random two-layer model of the architecture and its tokenizer; OpenELM beside the others."""
    if architecture != "openelm":
        return model_dirs[architecture]
    folder = model_dirs["qwen2"].parent / "random-openelm"
    if not folder.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(model_dirs["qwen2"])
        config = OpenELMConfig(
            vocab_size=len(tokenizer), max_context_length=64, num_transformer_layers=2, model_dim=32, head_dim=8,
            num_gqa_groups=2, ffn_dim_divisor=8, normalize_qk_projections=True, share_input_output_layers=True,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_run(script, config) -> tuple[TrainingRun, dict]:
    """A run as `finetune` builds it; the function that saves it, and the tokens of train and test."""
    data, folder = load_splits(config.data, config.run), result_path("test", config.run, config.model, config.data)
    accelerator = start_accelerator(config, folder)
    model_config = load_config(config.model, config.run)
    tokenizer = load_tokenizer(config.model, config.run, model_config)
    tokens = {split: tokenize(part.texts, tokenizer, model_config) for split, part in data.items()}
    set_seed(config.data.seed)
    decoder, save = script.build(config)
    return build_run(config, decoder, data, tokens, accelerator, folder), {"save": save, "tokens": tokens}


def take_steps(run: TrainingRun, number: int) -> list[float]:
    """The losses of the first steps of a run."""
    progress = Progress()
    return [train_step(run, progress, run.model) for _ in range(number)]


@pytest.fixture
def settings(model_dirs, rows_path, tmp_path) -> dict:
    """A few steps on made-up rows."""
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "results_dir": tmp_path}
    return names | {"device": "cpu", "dtype": "float32", "num_steps": 20, "steps_per_evaluation": 10, "batch_size": 4}


# ------------------------------------------------------------------ order
@pytest.mark.parametrize(("num_rows", "per_step"), [(103, 8), (16, 16), (5, 16), (7, 1)])
@pytest.mark.parametrize("grouped", [True, False])
def test_every_row_comes_once_an_epoch_and_step_alone_says_which(num_rows, per_step, grouped):
    lengths = np.random.default_rng(0).integers(1, 90, num_rows) if grouped else None
    order = BatchOrder(num_rows, per_step, 3, lengths)
    steps = [order(step) for step in range(2 * order.steps_per_epoch)]
    first, second = (np.concatenate(steps[: len(steps) // 2]), np.concatenate(steps[len(steps) // 2 :]))
    assert sorted(first) == sorted(second) == list(range(num_rows))
    if num_rows > per_step:
        assert list(first) != list(second)
    fresh = BatchOrder(num_rows, per_step, 3, lengths)
    for step in (len(steps) - 1, 0):  # backwards, as a resumed run would jump
        assert np.array_equal(fresh(step), steps[step])
    assert max(map(len, steps)) <= per_step


def test_rows_of_like_length_come_together_in_random_order():
    lengths = np.random.default_rng(0).geometric(0.03, 4000)

    def padded(order):
        batches = [order(step) for step in range(order.steps_per_epoch)]
        return sum(len(rows) * lengths[rows].max() for rows in batches) / lengths.sum(), batches

    plain, _ = padded(BatchOrder(4000, 16, 0))
    grouped, batches = padded(BatchOrder(4000, 16, 0, lengths))
    assert grouped < 1.1 < 2 < plain
    longest = [lengths[rows].max() for rows in batches]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.2  # not from long to short


# ------------------------------------------------------------------ objective and head
def test_regression_targets_are_scaled_and_scored_in_their_own_unit():
    labels = np.random.default_rng(0).normal(5000, 40, 200)
    data = LabelledTexts(["a"] * 200, labels, [], "")
    objective = Objective.of(data)
    targets = objective.targets(labels)
    assert targets.mean().abs() < 1e-5 and targets.std() == pytest.approx(1, abs=0.01)
    scores = objective.scores(torch.zeros(200, 1), targets)
    assert scores["mse"] == pytest.approx(labels.var(), rel=1e-4) and scores["loss"] == pytest.approx(1, rel=1e-4)
    assert objective.scores(targets[:, None], targets)["r2"] == pytest.approx(1)


@pytest.mark.parametrize("regression", [True, False])
def test_a_saved_head_takes_raw_states_and_gives_raw_labels(tmp_path, regression):
    torch.manual_seed(0)
    states = torch.randn(50, 6) * torch.tensor([1, 10, 0.1, 3, 1, 1]) + 4
    head = make_head(6, 1 if regression else 3, 0.5).eval()
    objective = Objective(1, True, 7.0, 3.0) if regression else Objective(3, False)
    mean, spread = states.mean(0), states.std(0)
    save_head(tmp_path / "head.safetensors", head, objective, {}, mean, spread)
    stored = load_file(tmp_path / "head.safetensors")
    expected = head((states - mean) / spread) * objective.scale + objective.mean
    torch.testing.assert_close(states @ stored["weight"].T + stored["bias"], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ optimiser and schedule
def test_learning_rates_are_the_documented_ones(settings):
    config = configure(from_scratch, **settings | {"num_steps": 40, "steps_per_evaluation": 1, "warmup": 0.25})
    run, _ = make_run(from_scratch, config)
    progress = train(replace(run, evaluate=lambda model: {"test_accuracy": 0.0}))
    rates = [row["learning_rate"] for row in progress.history]
    expected = [step / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / 30)) for step in range(40)]
    assert rates == pytest.approx([1e-4 * factor for factor in expected], abs=1e-12)
    assert run.scheduler.last_epoch == 40  # behind its end the cosine would rise again


def test_optimizer_is_the_papers_adafactor(settings):
    run, _ = make_run(from_scratch, configure(from_scratch, **settings, warmup=0.0))
    group = run.optimizer.param_groups[0]
    expected = {"lr": 1e-4, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None}
    expected |= {"weight_decay": 1e-5, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    assert {name: group[name] for name in expected} == expected
    bias = run.model.head[1].bias
    before = bias.detach().clone()
    accumulate_gradients(run, 0, run.model, run.order(0))
    gradient = bias.grad.clone()
    run.optimizer.step()  # the second moment is that of this step alone: the update is the sign of the gradient
    torch.testing.assert_close(bias.detach(), before * (1 - 1e-9) - 1e-4 * gradient.sign(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("script", [lora_finetuning, from_scratch])
def test_defaults_are_the_papers(script):
    config, training = script.Config(), script.Config().training
    assert training.num_steps == (5000 if script is lora_finetuning else 10000)
    assert (training.batch_size, training.gradient_accumulation, training.steps_per_evaluation) == (1, 1, 500)
    assert (training.learning_rate, training.weight_decay) == (1e-4, 1e-5)
    assert (training.warmup, training.dropout) == (0.05, 0.05)
    if script is lora_finetuning:
        assert (config.rank, config.alpha, config.lora_dropout, config.start_layer) == (32, 32, 0.05, 0)


# ------------------------------------------------------------------ gradients and memory
def process(rank: int, run: TrainingRun) -> Any:
    """The accelerator of one of three processes, whose sums are its own part alone."""
    real = run.accelerator
    return SimpleNamespace(
        process_index=rank, num_processes=3, reduce=lambda tensor, how: tensor, backward=real.backward,
        no_sync=real.no_sync,
    )  # fmt: skip


def gradients(run: TrainingRun) -> dict[str, torch.Tensor]:
    run.model.eval()  # without dropout, whose masks depend on the batch
    accumulate_gradients(run, 0, run.model, run.order(0))
    return {name: torch.as_tensor(parameter.grad) for name, parameter in run.trained_parameters().items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accumulation_gives_the_gradient_of_the_whole_batch(settings, model_dirs, architecture):
    settings["model_name"] = str(model_folder(architecture, model_dirs))
    found = []
    for batch_size, accumulation in ((16, 1), (4, 4), (1, 16)):
        settings |= {"batch_size": batch_size, "gradient_accumulation": accumulation}
        run, _ = make_run(from_scratch, configure(from_scratch, **settings))
        found.append(gradients(run))
    scale = max(gradient.abs().max() for gradient in found[0].values())
    assert scale > 1e-3
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name] / scale, gradient / scale, rtol=0, atol=1e-5)


def test_a_device_too_small_for_a_batch_is_a_users_error(settings, monkeypatch):
    run, _ = make_run(from_scratch, configure(from_scratch, **settings))

    def tiny_device(input_ids, lengths):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.model, "forward", tiny_device)
    with pytest.raises(UserError, match=r"step 1 with --batch_size 4. Try a smaller --batch_size with more --gradient"):
        take_steps(run, 1)
    with pytest.raises(UserError, match=r"evaluation. Lower --tokens_per_batch \(1,?024\)"):
        run.evaluate(run.model)


def test_a_loss_that_is_not_finite_names_step_and_rows(settings, monkeypatch):
    run, _ = make_run(lora_finetuning, configure(lora_finetuning, **settings))
    progress = Progress()
    train_step(run, progress, run.model)
    weights = {name: parameter.detach().clone() for name, parameter in run.trained_parameters().items()}
    rows = ", ".join(map(str, run.order(1)))
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *inputs: forward(*inputs) * torch.inf)
    with pytest.raises(UserError, match=f"step 2, rows {rows} of the train split"):
        train_step(run, progress, run.model)
    for name, parameter in run.trained_parameters().items():
        assert torch.equal(parameter, weights[name])  # not spoilt by that step


# ------------------------------------------------------------------ evaluation
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_evaluation_does_not_depend_on_batches_and_padding(settings, model_dirs, architecture, pooling):
    settings |= {"model_name": str(model_folder(architecture, model_dirs)), "pooling": pooling}
    run, made_of = make_run(from_scratch, configure(from_scratch, **settings))
    tokens = made_of["tokens"]["test"]
    run.model.eval()
    alone, small, large = (predict(run.model, tokens, 3, budget, run.accelerator) for budget in (1, 100, 10**6))
    torch.testing.assert_close(small, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(large, alone, rtol=0, atol=1e-5)
    assert alone.abs().sum(1).min() > 0  # every text has been run


def test_processes_share_the_texts_without_counting_one_twice(settings):
    """What each of three processes fills in adds up to what one does."""
    run, made_of = make_run(from_scratch, configure(from_scratch, **settings))
    run.model.eval()
    tokens = made_of["tokens"]["test"]
    parts = [predict(run.model, tokens, 3, 100, process(rank, run)) for rank in range(3)]
    assert ((torch.stack(parts) != 0).any(2).sum(0) == 1).all()
    torch.testing.assert_close(sum(parts), predict(run.model, tokens, 3, 100, run.accelerator))


def test_processes_share_a_step_without_changing_its_gradient(settings):
    """The mean over three processes of the gradients of their shares is the gradient of the step; DDP takes it."""
    settings["batch_size"] = 7
    run, _ = make_run(from_scratch, configure(from_scratch, **settings))
    expected = gradients(run)
    found = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for rank in range(3):
        run.optimizer.zero_grad(set_to_none=True)
        for name, gradient in gradients(replace(run, accelerator=process(rank, run))).items():
            found[name] += gradient / 3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["gradients", "outputs"])
def test_a_process_without_a_row_adds_nothing(settings, of):
    """Two rows, three processes: the third runs a row with weight 0 in training, and none in an evaluation."""
    run, made_of = make_run(from_scratch, configure(from_scratch, **settings | {"batch_size": 3}))
    run.model.eval()
    third, tokens = process(2, run), made_of["tokens"]["test"]
    if of == "outputs":
        few = replace(tokens, token_ids=tokens.token_ids[: tokens.offsets[2]], offsets=tokens.offsets[:3])
        assert (
            not predict(run.model, few, 3, 10**6, third).any()
            and predict(run.model, few, 3, 10**6, run.accelerator).all()
        )
        return
    shared = replace(run, accelerator=third)
    assert accumulate_gradients(shared, 0, run.model, np.array([5, 7])) == 0
    for parameter in run.trained_parameters().values():
        assert parameter.grad is not None and not parameter.grad.any()


# ------------------------------------------------------------------ results
@pytest.mark.parametrize(
    ("names", "is_regression", "best"),
    [
        (("validation_loss", "test_loss", "test_accuracy"), False, 2),
        (("validation_loss", "test_loss", "test_r2"), True, 2),
        (("test_loss", "test_accuracy"), False, 3),
        (("test_loss", "test_r2"), True, 4),
    ],
)
def test_the_best_step_is_that_of_the_lowest_validation_loss_else_of_the_best_test_score(names, is_regression, best):
    """Each column has its best value, and its worst, at a step of its own."""
    columns = {
        "validation_loss": [0.9, 0.1, 0.5, 0.6, 0.7],
        "test_accuracy": [0.1, 0.5, 0.9, 0.8, 0.7],
        "test_loss": [0.5, 0.6, 0.4, 0.3, 0.9],
        "test_r2": [0.3, 0.2, 0.4, 0.1, 0.9],
    }
    history = [{"step": step + 1} | {name: columns[name][step] for name in names} for step in range(5)]
    assert best_row(history, is_regression)["step"] == best


@pytest.mark.parametrize("split", ["train", "test"])
def test_changed_rows_of_either_split_alone_are_another_run(settings, split):
    config = configure(from_scratch, **settings)
    data = load_splits(config.data, config.run)
    identity = make_identity(config, data)
    data[split] = replace(data[split], fingerprint="of other rows")
    changed = make_identity(config, data)
    assert {name for name, value in identity.items() if changed[name] != value} == {f"{split}_fingerprint"}


def test_settings_are_checked():
    for change in ({"batch_size": 0}, {"num_steps": 0}, {"dropout": 1.0}, {"warmup": -0.1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            configure(from_scratch, **change)
