"""lora_finetuning.py: what is trained and what is not, the saved adapter, resuming, and NTPS before and after."""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import tyro
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_finetuning
from tests.conftest import ROOT, run_command
from tests.test_training import ARCHITECTURES, make_run, model_folder
from utils.io import UserError
from utils.models import FAMILIES, load_base_model, run_base_model
from utils.training import train_step


@pytest.fixture
def settings(model_dirs, rows_path, tmp_path) -> dict:
    """A few steps on made-up rows, in float32."""
    return {
        "model_name": str(model_dirs["qwen2"]),
        "dataset_name": str(rows_path),
        "results_dir": tmp_path,
        "device": "cpu",
        "dtype": "float32",
        "num_steps": 12,
        "steps_per_evaluation": 6,
        "batch_size": 4,
    }


def result(results_dir):
    [path] = results_dir.glob("lora/*/*/metrics.json")
    return path.parent, json.loads(path.read_text())


# ------------------------------------------------------------------ what is trained
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_adapter_and_head_have_gradients_and_change(settings, model_dirs, architecture):
    folder = model_folder(architecture, model_dirs)
    config = lora_finetuning.Config(**settings | {"model_name": str(folder), "learning_rate": 1e-2, "warmup": 0.0})
    run, _ = make_run(lora_finetuning, config)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    for _ in range(3):
        train_step(run, run.model)
    trained = run.trained_parameters()
    assert {name.rsplit(".", 1)[-1] for name in trained if name.startswith("head.")} == {"weight", "bias"}
    for name, parameter in run.model.named_parameters():
        is_new = ".lora_A." in name or ".lora_B." in name or name.startswith("head.")
        assert (name in trained) == parameter.requires_grad == is_new
        assert torch.equal(parameter, before[name]) != is_new, name
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name}
    assert adapted == set(FAMILIES[architecture].lora_target_modules)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inside = dict(original.get_decoder().named_parameters())
    for name, parameter in run.model.decoder.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, inside[name.replace(".base_layer", "")])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_falls_and_the_saved_adapter_gives_the_trained_states(settings, model_dirs, architecture):
    """Trained in place, loaded by plain PEFT, and merged by cache.py's loader: three times the same hidden states."""
    folder = model_folder(architecture, model_dirs)
    changes = {"model_name": str(folder), "learning_rate": 1e-2, "num_steps": 60, "steps_per_evaluation": 20}
    config = lora_finetuning.Config(**settings | changes)
    run, made_of = make_run(lora_finetuning, config)
    losses = [train_step(run, run.model) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    run.model.eval()
    made_of["trainable"].save(config.results_dir)
    adapter_dir = config.results_dir / "adapter"
    input_ids, _ = made_of["tokens"][1].pad(torch.arange(5).numpy())
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        trained = run.model.decoder(input_ids=input_ids).last_hidden_state
        before = original.get_decoder()(input_ids=input_ids).last_hidden_state
        loaded = PeftModel.from_pretrained(original, adapter_dir)(input_ids, output_hidden_states=True).hidden_states[
            -1
        ]
    merged = run_base_model(load_base_model(config, torch.device("cpu"), adapter_dir), input_ids)
    assert (trained - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)


def test_start_layer_and_targets(settings):
    config = lora_finetuning.Config(**settings, start_layer=1, target_modules=("v_proj", "down_proj"), rank=4)
    run, _ = make_run(lora_finetuning, config)
    adapted = {name.split(".lora_")[0] for name in run.trained_parameters() if ".lora_" in name}
    assert adapted == {"decoder.layers.1.self_attn.v_proj", "decoder.layers.1.mlp.down_proj"}
    assert {parameter.shape[0] for name, parameter in run.trained_parameters().items() if ".lora_A." in name} == {4}


def test_dtype_is_of_the_frozen_weights_and_what_is_trained_is_float32(settings):
    run, _ = make_run(lora_finetuning, lora_finetuning.Config(**settings | {"dtype": "bfloat16"}))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in run.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    exact, _ = make_run(lora_finetuning, lora_finetuning.Config(**settings))
    losses = [[train_step(of, of.model) for _ in range(3)] for of in (run, exact)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_gradient_checkpointing_changes_no_number(settings, tmp_path):
    found = []
    for checkpointing in (False, True):
        config = lora_finetuning.Config(**settings, gradient_checkpointing=checkpointing)
        run, _ = make_run(lora_finetuning, config)
        found.append([train_step(run, run.model) for _ in range(6)])
        assert getattr(run.model.decoder, "is_gradient_checkpointing", checkpointing) == checkpointing
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ("q_proj", "query")}, "has no query; --target_modules can name .*q_proj"),
        ({"start_layer": 2}, "has layers 0 to 1"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_mistakes_are_named(settings, change, message):
    with pytest.raises((UserError, ValueError), match=message):
        lora_finetuning.main(lora_finetuning.Config(**settings | change))


def test_an_unknown_family_needs_targets(settings, monkeypatch):
    monkeypatch.delitem(FAMILIES, "qwen2")
    with pytest.raises(UserError, match=r"--target_modules; it has down_proj, .*q_proj"):
        make_run(lora_finetuning, lora_finetuning.Config(**settings))
    run, _ = make_run(lora_finetuning, lora_finetuning.Config(**settings, target_modules=("k_proj",)))
    assert len(run.trained_parameters()) == 2 * 2 + 2


# ------------------------------------------------------------------ command line
def arguments(settings, *more):
    call = ["lora_finetuning.py"]
    for name, value in settings.items():
        call += [f"--{name}", value]
    return [*call, *more]


def test_command_line_writes_reuses_and_refuses(settings, capsys):
    first = run_command(*arguments(settings, "--gradient_accumulation", "2"))
    assert first.returncode == 0, first.stderr
    folder, metrics = result(settings["results_dir"])
    assert first.stdout.strip().splitlines()[-1] == str(folder / "metrics.json")
    names = ["adapter", "head.safetensors", "history.csv", "metrics.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["bias"]) == (32, 32, "none")
    rows = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["6", "12"]
    assert metrics["last"]["step"] == 12 and metrics["best"]["step"] in (6, 12) and metrics["texts_per_step"] == 8
    assert {"test_loss", "test_accuracy", "test_balanced_accuracy", "test_macro_f1"} <= set(metrics["last"])
    assert {"majority", "bag_of_words"} <= set(metrics["baselines"])
    lora_finetuning.main(lora_finetuning.Config(**settings, gradient_accumulation=2))
    assert "reused" in capsys.readouterr().out
    other = run_command(*arguments(settings, "--rank", "8"))
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "rank: 32 there, 8 now" in other.stderr and "gradient_accumulation: 2 there, 1 now" in other.stderr


def test_a_killed_run_goes_on_with_the_same_history(settings, capsys):
    settings |= {"num_steps": 300, "steps_per_evaluation": 15}
    killed, whole = settings["results_dir"] / "killed", settings["results_dir"] / "whole"
    call = arguments(settings | {"results_dir": killed}, "--minutes_per_state", "0.003")
    process = subprocess.Popen([sys.executable, *map(str, call)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(killed.glob("lora/*/*/state.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(killed.glob("lora/*/*/metrics.json"))
    for place in (killed, whole):
        lora_finetuning.main(lora_finetuning.Config(**settings | {"results_dir": place}))
        assert ("going on from step" in capsys.readouterr().out) == (place == killed)
    folders = result(killed)[0], result(whole)[0]
    assert len({(folder / "history.csv").read_text() for folder in folders}) == 1
    for name in ("head.safetensors", "adapter/adapter_model.safetensors"):
        tensors = [load_file(folder / name) for folder in folders]
        assert tensors[0] and all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_ntps_before_and_after(settings):
    settings |= {"learning_rate": 1e-2, "num_steps": 30}
    first = run_command(*arguments(settings, "--ntps_after"))
    assert first.returncode == 0, first.stderr
    folder, metrics = result(settings["results_dir"])
    path = folder / "before_after.json"
    assert first.stdout.strip().splitlines()[-1] == str(path)
    table = json.loads(path.read_text())
    results = settings["results_dir"]
    name = folder.parent.name
    for row, model in (("before", name), ("after", f"{name}+lora")):
        scores = json.loads((results / "ntps" / model / f"{folder.name}.json").read_text())["score"]
        assert table["ntps"]["retained"][row] == scores["retained"] and table["ntps"]["ntps"][row] == scores["ntps"]
    assert abs(table["ntps"]["ntps"]["difference"]) > 1e-6
    [probe] = results.glob("linear_training/*/*/metrics.json")
    assert table["linear_probe"] == json.loads(probe.read_text())["last"]["test_accuracy"]
    assert table["gain"] == pytest.approx(metrics["last"]["test_accuracy"] - table["linear_probe"])
    assert "difference" in first.stdout and "retained" in first.stdout

    # another adapter in the same place: its moments must not be mistaken for the first one's
    config = lora_finetuning.Config(**settings | {"learning_rate": 3e-2}, ntps_after=True, overwrite=True)
    lora_finetuning.main(config)
    again = json.loads(path.read_text())
    assert again["ntps"]["ntps"]["before"] == table["ntps"]["ntps"]["before"]
    assert again["ntps"]["ntps"]["after"] != table["ntps"]["ntps"]["after"]


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(lora_finetuning.Config, args=["--help"])
    shown = capsys.readouterr().out.replace("_", "-")
    assert stop.value.code == 0
    for field in dataclasses.fields(lora_finetuning.Config):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "optimiser steps" in shown and "hub id" in shown  # the comments of both classes
