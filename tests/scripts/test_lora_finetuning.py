"""lora_finetuning.py: trained and frozen weights, the saved adapter, resuming, and NTPS before and after."""

import contextlib
import io
import json
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cache
import K_sweep
import lora_finetuning
from fig_plot import collect
from tests.conftest import configure, flags, only_result, run_in_process
from tests.processes import exit_codes, start
from tests.training.test_training import ARCHITECTURES, make_run, model_folder, take_steps, tokens_of_test
from utils.data import load as data_module
from utils.models.load import load_base_model
from utils.models.states import run_base_model
from utils.models.table import LORA_TARGET_MODULES
from utils.results import save_json
from utils.script import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(names, tmp_path) -> dict:
    """A few steps on made-up rows, in float32."""
    short = {"dtype": "float32", "num_steps": 12, "steps_per_evaluation": 6, "batch_size": 4}
    return names | short | {"device": "cpu", "results_dir": tmp_path}


OPTIONS = {"num_null_draws": 7, "num_random_draws": 3, "fractions": [0.3, 0.7]}  # of K_sweep.py


def result(results_dir):
    """Folder and metrics of the only run below a folder."""
    path, metrics = only_result(results_dir, "lora/*/*/metrics.json")
    return path.parent, metrics


# ------------------------------------------------------------------ trained weights
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_and_head_alone_are_trained_and_the_saved_adapter_gives_the_trained_states(
    settings, model_dirs, architecture
):
    """The adapter gives the same hidden states trained in place, loaded by plain PEFT, and merged by cache.py."""
    settings |= {"model_name": str(model_folder(architecture, model_dirs)), "learning_rate": 1e-2, "num_steps": 60}
    config = configure(lora_finetuning, **settings, warmup=0.0)
    run, input_ids = make_run(lora_finetuning, config), tokens_of_test(config).pad(np.arange(5))[0]
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    losses, trained = take_steps(run, 60), run.trained_parameters()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert {"head.1.weight", "head.1.bias"} < set(trained)
    for name, parameter in run.model.named_parameters():
        is_new = ".lora_A." in name or ".lora_B." in name or name.startswith("head.")
        assert (name in trained) == parameter.requires_grad == is_new
        assert torch.equal(parameter, before[name]) != is_new, name
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name}
    assert adapted == set(LORA_TARGET_MODULES[architecture])

    run.model.eval()
    run.save_weights()
    adapter_dir = run.folder / "adapter"
    original = AutoModelForCausalLM.from_pretrained(config.model.model_name, dtype=torch.float32).eval()
    with torch.no_grad():
        states = run.model.decoder(input_ids=input_ids).last_hidden_state
        untrained = original.get_decoder()(input_ids=input_ids).last_hidden_state
        by_peft = PeftModel.from_pretrained(original, adapter_dir)(input_ids, output_hidden_states=True)
    with_adapter = replace(config.model, adapter_dir=adapter_dir)
    merged = run_base_model(load_base_model(with_adapter, config.run, torch.device("cpu")), input_ids)
    assert (states - untrained).abs().max() > 1e-2
    torch.testing.assert_close(by_peft.hidden_states[-1], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, states, rtol=0, atol=1e-4)


def test_start_layer_targets_rank_and_dtype(settings):
    """The frozen weights have the dtype, and what is trained is float32."""
    changes = {"start_layer": 1, "target_modules": ("v_proj", "down_proj"), "rank": 4}
    run, exact = (
        make_run(lora_finetuning, configure(lora_finetuning, **settings | {"dtype": dtype}, **changes))
        for dtype in ("bfloat16", "float32")
    )
    trained = run.trained_parameters()
    adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert adapted == {"decoder.layers.1.self_attn.v_proj", "decoder.layers.1.mlp.down_proj"}
    assert {parameter.shape[0] for name, parameter in trained.items() if ".lora_A." in name} == {4}
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in run.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    losses = [take_steps(each, 3) for each in (run, exact)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_gradient_checkpointing_changes_no_number(settings):
    found = []
    for checkpointing in (False, True):
        run = make_run(lora_finetuning, configure(lora_finetuning, **settings, gradient_checkpointing=checkpointing))
        run.model.train()  # a model that only evaluates stores no activations
        calls: list[int] = []  # a checkpointed layer is run once more in the backward pass
        run.model.decoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        found.append(take_steps(run, 6))
        assert len(calls) == 6 * (1 + checkpointing)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# ------------------------------------------------------------------ command line
def test_command_line_writes_adapter_head_history_and_metrics(settings, monkeypatch, capsys):
    assert run_in_process(monkeypatch, "lora_finetuning.py", *flags(settings | {"gradient_accumulation": 2})) == 0
    folder, metrics = result(settings["results_dir"])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(folder / "metrics.json")
    names = ["adapter", "head.safetensors", "history.csv", "metrics.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["bias"]) == (32, 32, "none")
    assert [line.split(",")[0] for line in (folder / "history.csv").read_text().splitlines()] == ["step", "6", "12"]
    assert metrics["last"]["step"] == 12 and metrics["best"]["step"] in (6, 12) and metrics["texts_per_step"] == 8
    assert {"test_loss", "test_accuracy", "test_balanced_accuracy", "test_macro_f1"} <= set(metrics["last"])


def test_a_killed_run_goes_on_with_the_same_history(settings, capsys):
    settings |= {"num_steps": 60, "steps_per_evaluation": 15}
    killed, whole = settings["results_dir"] / "killed", settings["results_dir"] / "whole"
    config = configure(lora_finetuning, **settings | {"results_dir": killed}, minutes_per_state=0.003)
    [process] = started = start(lambda _: lora_finetuning.main(config))
    while process.is_alive() and not list(killed.glob("lora/*/*/state.safetensors")):
        time.sleep(0.01)
    process.kill()
    assert exit_codes(started) == [-signal.SIGKILL] and not list(killed.glob("lora/*/*/metrics.json"))
    for results_dir in (killed, whole):
        lora_finetuning.main(configure(lora_finetuning, **settings | {"results_dir": results_dir}))
        assert ("going on from step" in capsys.readouterr().out) == (results_dir == killed)
    folders = result(killed)[0], result(whole)[0]
    assert len({(folder / "history.csv").read_text() for folder in folders}) == 1
    for name in ("head.safetensors", "adapter/adapter_model.safetensors"):
        tensors = [load_file(folder / name) for folder in folders]
        assert tensors[0] and all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


# ------------------------------------------------------------------ NTPS before and after
def scores_of(results, model) -> dict:
    """The result of K_sweep.py for a model."""
    return only_result(results, f"ntps/{model}/*.json")[1]


@pytest.fixture(scope="module")
def compared(names, tmp_path_factory) -> dict:
    """Settings of a run with --ntps_after, behind scores without test moments; tests work on copies of its results."""
    shared = names | {"device": "cpu", "max_samples": 80, "results_dir": tmp_path_factory.mktemp("compared")}
    cache.main(configure(cache, **shared, dtype="bfloat16", pooling="last", num_folds=3))
    assert not K_sweep.main(configure(K_sweep, **shared, picture=False, **OPTIONS))["held_out"]
    settings = shared | {"dtype": "float32", "pooling": "last", "num_steps": 30, "batch_size": 4, "learning_rate": 1e-2}
    reads, find_source, printed = [], data_module.find_source, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(data_module, "find_source", lambda *given: reads.append(given) or find_source(*given))
        patch.setattr("sys.argv", ["lora_finetuning.py", *flags(settings)])  # its --pooling and --dtype are LoRA's own
        lora_finetuning.main(configure(lora_finetuning, **settings, ntps_after=True))
    printed = printed.getvalue()
    assert printed.strip().splitlines()[-1].endswith("before_after.json") and "difference" in printed
    assert len(reads) == 1 and printed.count("168 train and 72 test texts") == 1  # the splits are read once
    return settings


def test_ntps_before_and_after_equals_the_results_of_the_scripts_with_the_settings_of_the_scores_before(compared):
    """Pooling is that of LoRA; dtype, folds and options come from the stored scores."""
    results = compared["results_dir"]
    folder, metrics = result(results)
    table = json.loads((folder / "before_after.json").read_text())
    for row, model in (("before", folder.parent.name), ("after", f"{folder.parent.name}+lora")):
        scores = scores_of(results, model)
        made = scores["moments"]["config"]
        assert scores["held_out"] and OPTIONS.items() <= scores["config"].items()
        assert (made["dtype"], made["pooling"], made["num_folds"]) == ("bfloat16", "last", 3)
        assert all(table["ntps"][name][row] == scores["score"][name] for name in ("retained", "ntps"))
    assert table["ntps"]["ntps"]["before"] != table["ntps"]["ntps"]["after"]
    _, probe = only_result(results, "linear_training/*/*/metrics.json")
    assert (probe["config"]["dtype"], probe["config"]["pooling"]) == ("bfloat16", "last")
    assert table["linear_probe"] == probe["last"]["test_accuracy"]
    assert table["gain"] == pytest.approx(metrics["last"]["test_accuracy"] - table["linear_probe"])


def test_a_retrained_adapter_renews_its_moments_and_scores(compared, tmp_path, capsys):
    """The scores before stay, also without their moments, which a study deletes; stale scores enter no table."""
    results = tmp_path / "results"
    shutil.copytree(compared["results_dir"], results)
    folder, _ = result(results)
    model = folder.parent.name
    before, after = scores_of(results, model), scores_of(results, f"{model}+lora")
    shutil.rmtree(results / "moments" / model)
    [moments] = results.glob(f"moments/{model}+lora/*/train.safetensors")
    stale, settings = moments.read_bytes(), compared | {"results_dir": results, "learning_rate": 3e-2}
    lora_finetuning.main(configure(lora_finetuning, **settings, overwrite=True))
    assert not (folder / "before_after.json").exists() and scores_of(results, f"{model}+lora") == after
    collect.main(collect.Config(results_dir=results))
    assert f"{model}+lora/rows.json scores an earlier adapter" in capsys.readouterr().err
    lora_finetuning.main(configure(lora_finetuning, **settings, ntps_after=True))
    renewed = scores_of(results, f"{model}+lora")["score"]["ntps"]
    assert moments.read_bytes() != stale and renewed["value"] != after["score"]["ntps"]["value"]
    assert scores_of(results, model) == before
    assert json.loads((folder / "before_after.json").read_text())["ntps"]["ntps"]["after"] == renewed


@pytest.mark.parametrize(
    ("result_of", "part", "name", "value", "message"),
    [
        ("linear_training", "config", "pooling", "mean", "pooling: 'mean' there, 'last' now"),
        ("ntps", "moments", "fingerprint", "of others", "other rows"),
        ("ntps", "held_out", "fingerprint", "of others", "other rows"),
    ],
)
def test_results_that_do_not_fit_are_refused_before_the_training(
    compared, tmp_path, monkeypatch, result_of, part, name, value, message
):
    """Moments are deleted once they are read, as in a study."""
    results = tmp_path / "results"
    shutil.copytree(compared["results_dir"], results, ignore=shutil.ignore_patterns("lora", "moments", "*+lora"))
    path, content = only_result(results / result_of, "**/*.json")
    content[part][name] = value
    save_json(path, content)
    monkeypatch.setattr(lora_finetuning, "finetune", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        lora_finetuning.main(configure(lora_finetuning, **compared | {"results_dir": results}, ntps_after=True))
    assert not (results / "moments").exists()
