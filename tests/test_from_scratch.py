"""from_scratch.py: random and pretrained starts, float32 weights, the saved model, the command line."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import cache
import from_scratch
from tests.conftest import run_command
from tests.test_training import ARCHITECTURES, make_run, model_folder
from utils.training import train_step


@pytest.fixture
def settings(model_dirs, rows_path, tmp_path) -> dict:
    """A few steps on made-up rows."""
    return {
        "model_name": str(model_dirs["qwen2"]),
        "dataset_name": str(rows_path),
        "results_dir": tmp_path,
        "device": "cpu",
        "num_steps": 8,
        "steps_per_evaluation": 4,
        "batch_size": 4,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_falls_and_every_weight_is_trained_in_float32(settings, model_dirs, architecture, dtype):
    folder = model_folder(architecture, model_dirs)
    changes = {"model_name": str(folder), "dtype": dtype, "learning_rate": 3e-3, "num_steps": 60}
    run, _ = make_run(from_scratch, from_scratch.Config(**settings | changes))
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert len(run.trained_parameters()) == len(list(run.model.parameters()))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    losses = [train_step(run, run.model) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not any(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())


def test_random_weights_follow_the_seed_and_are_not_the_pretrained_ones(settings):
    def weights(**changes):
        run, _ = make_run(from_scratch, from_scratch.Config(**settings, **changes))
        return run.model.decoder.layers[0].self_attn.q_proj.weight.detach()

    pretrained = AutoModelForCausalLM.from_pretrained(settings["model_name"], dtype=torch.float32)
    stored = pretrained.get_decoder().layers[0].self_attn.q_proj.weight
    assert torch.equal(weights(seed=3), weights(seed=3)) and not torch.equal(weights(seed=3), weights(seed=4))
    assert not torch.equal(weights(seed=3), stored)
    assert torch.equal(weights(init="pretrained"), stored)


def test_full_finetuning_starts_from_the_pretrained_weights_and_changes_them(settings):
    from_scratch.main(from_scratch.Config(**settings, init="pretrained"))
    [folder] = settings["results_dir"].glob("full_finetuning/*/*/model")
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_decoder().state_dict()
    pretrained = AutoModelForCausalLM.from_pretrained(settings["model_name"], dtype=torch.float32)
    for name, weight in pretrained.get_decoder().state_dict().items():
        assert 0 < (trained[name] - weight).abs().max() < 8 * 1e-4 * 20  # Adafactor: at most some rates a step
    assert not list(settings["results_dir"].glob("from_scratch/*"))


def test_command_line_writes_a_model_for_the_other_scripts(settings):
    call = ["from_scratch.py"]
    for name, value in settings.items():
        call += [f"--{name}", value]
    done = run_command(*call)
    assert done.returncode == 0, done.stderr
    [path] = settings["results_dir"].glob("from_scratch/*/*/metrics.json")
    assert done.stdout.strip().splitlines()[-1] == str(path)
    names = ["head.safetensors", "history.csv", "metrics.json", "model"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    metrics = json.loads(path.read_text())
    assert metrics["last"]["step"] == 8 and metrics["config"]["init"] == "random"
    cache.main(
        cache.Config(
            model_name=str(path.parent / "model"),
            dataset_name=settings["dataset_name"],
            results_dir=settings["results_dir"],
        )
    )
    assert list(settings["results_dir"].glob("moments/model/*/train.safetensors"))
    other = run_command(*call, "--init", "random", "--num_steps", "9")
    assert other.returncode == 1 and "num_steps: 8 there, 9 now" in other.stderr and "Traceback" not in other.stderr


def test_the_model_need_not_be_saved(settings):
    from_scratch.main(from_scratch.Config(**settings, save_model=False))
    [path] = settings["results_dir"].glob("from_scratch/*/*/metrics.json")
    assert not (path.parent / "model").exists()


def test_a_second_run_gives_the_same_history(settings):
    histories = []
    for place in ("one", "two"):
        config = from_scratch.Config(**settings | {"results_dir": settings["results_dir"] / place})
        from_scratch.main(dataclasses.replace(config, tokens_per_batch=100 if place == "one" else 8192))
        [path] = config.results_dir.glob("from_scratch/*/*/history.csv")
        histories.append([line.split(",")[:4] for line in path.read_text().splitlines()])
    assert histories[0] == histories[1]
