"""from_scratch.py: random and pretrained starts, float32 weights, the saved model, the command line."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import from_scratch
from tests.conftest import configure, flags, only_result, run_in_process
from tests.training.test_training import make_run, model_folder, take_steps

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(names, tmp_path) -> dict:
    """A few steps on made-up rows."""
    short = {"num_steps": 8, "steps_per_evaluation": 4, "batch_size": 4}
    return names | short | {"device": "cpu", "results_dir": tmp_path}


@pytest.mark.parametrize(("architecture", "dtype"), [("openelm", "bfloat16"), ("qwen2", "float32")])
def test_loss_falls_and_every_weight_is_trained_in_float32(settings, model_dirs, architecture, dtype):
    settings |= {"model_name": str(model_folder(architecture, model_dirs)), "num_steps": 40}
    run = make_run(from_scratch, configure(from_scratch, **settings, dtype=dtype, learning_rate=3e-3))
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    losses = take_steps(run, 40)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not any(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())


def test_random_weights_follow_the_seed_and_full_finetuning_starts_from_the_pretrained_ones(settings):
    def weights(**changes):
        run = make_run(from_scratch, configure(from_scratch, **settings, **changes))
        return run.model.decoder.layers[0].self_attn.q_proj.weight.detach()

    pretrained = AutoModelForCausalLM.from_pretrained(settings["model_name"], dtype=torch.float32)
    stored = pretrained.get_decoder().layers[0].self_attn.q_proj.weight
    assert torch.equal(weights(seed=3), weights(seed=3)) and not torch.equal(weights(seed=3), weights(seed=4))
    assert not torch.equal(weights(seed=3), stored)
    assert torch.equal(weights(init="pretrained"), stored)


def test_command_line_writes_an_ordinary_model(settings, monkeypatch, capsys):
    assert run_in_process(monkeypatch, "from_scratch.py", *flags(settings | {"init": "pretrained"})) == 0
    path, metrics = only_result(settings["results_dir"], "full_finetuning/*/*/metrics.json")
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path) and metrics["last"]["step"] == 8
    name = f"{path.parent.parent.name}+full_finetuning+rows"
    files = ["head.safetensors", "history.csv", "metrics.json", name]
    assert sorted(file.name for file in path.parent.iterdir()) == files
    trained = AutoModelForCausalLM.from_pretrained(path.parent / name, dtype=torch.float32).get_decoder().state_dict()
    pretrained = AutoModelForCausalLM.from_pretrained(settings["model_name"], dtype=torch.float32)
    for key, weight in pretrained.get_decoder().state_dict().items():
        assert 0 < (trained[key] - weight).abs().max() < 8 * 1e-4 * 20  # Adafactor: at most some rates a step


def test_a_second_run_gives_the_same_history_and_need_not_save_the_model(settings):
    histories = []
    for name, changes in (("one", {"tokens_per_batch": 100}), ("two", {"save_model": False})):
        results_dir = settings["results_dir"] / name
        from_scratch.main(configure(from_scratch, **settings | changes | {"results_dir": results_dir}))
        [path] = results_dir.glob("from_scratch/*/*/history.csv")
        histories.append([line.split(",")[:4] for line in path.read_text().splitlines()])
        assert len(list(path.parent.glob("*/config.json"))) == (name == "one")
    assert histories[0] == histories[1]
