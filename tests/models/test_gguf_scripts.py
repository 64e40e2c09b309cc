"""Every script on a model in one GGUF file, through its command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_texts, make_tokenizer, run_in_process
from tests.gguf_files import write_gguf
from tests.models.test_gguf import random_model
from utils.models.gguf import load_model, load_tokenizer
from utils.models.identity import load_config, model_fingerprint
from utils.models.load import load_base_model
from utils.models.table import model_source
from utils.script import UserError
from utils.settings import Model, Run

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8.gguf", random_model("llama"), make_tokenizer(), "Q8_0")


@pytest.fixture
def run(file, rows_path, tmp_path, monkeypatch):
    """Runs a script on the file and the rows; results go to `tmp_path`."""

    def run_script(script: str, *arguments: str) -> None:
        common = ("--model_name", file, "--dataset_name", rows_path, "--results_dir", tmp_path, "--device", "cpu")
        assert run_in_process(monkeypatch, script, *common, *arguments) == 0

    return run_script


@pytest.mark.slow
def test_from_the_moments_to_the_scores_and_pictures(run, file, tmp_path):
    for split in ("train", "test"):
        run("cache.py", "--split", split)
    run("K_sweep.py")
    run("alignment_vis.py")
    run("linear_sklearn.py")
    run("linear_training.py", "--num_epochs", "2")
    moments = tmp_path / "moments" / "tiny.Q8" / "rows" / "train.safetensors"
    with safe_open(moments, "pt") as stored:
        metadata = json.loads(stored.metadata()["json"])
    stored_as = r"Q8_0 \(\d+\.\d bits a weight\), de-quantised once a run to float32"
    assert re.fullmatch(stored_as, metadata["quantisation"])
    for result in (
        "ntps/tiny.Q8/rows.json",
        "linear_sklearn/tiny.Q8/rows.json",
        "linear_training/tiny.Q8/rows/metrics.json",
    ):
        content = json.loads((tmp_path / result).read_text())
        assert content.get("moments", content)["quantisation"] == metadata["quantisation"]
    assert list(tmp_path.glob("alignment/tiny.Q8/*.png"))


def test_pooled_states_are_those_of_the_file(run, file, rows_path, tmp_path):
    run("cache.py", "--save_pooled", "all", "--max_samples", "20")
    [path] = (tmp_path / "moments" / "tiny.Q8" / "rows").glob("*pooled*")
    with safe_open(path, "pt") as stored:
        pooled = stored.get_tensor("pooled")
    model, tokenizer = load_model(file, torch.float32), load_tokenizer(file)
    means = set()
    for text in (json.loads(line)["text"] for line in rows_path.read_text().splitlines()):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        means.add(tuple(np.round(torch.stack([s[0].mean(0)[:3] for s in states]).flatten().numpy(), 4)))
    for row in range(pooled.shape[1]):
        assert tuple(np.round(pooled[:, row, :3].flatten().numpy(), 4)) in means


def test_lora_writes_an_adapter_that_plain_peft_loads(run, file, tmp_path):
    run("lora_finetuning.py", "--dtype", "float32", "--num_steps", "4", "--batch_size", "8", "--learning_rate", "0.01")
    folder = tmp_path / "lora" / "tiny.Q8" / "rows"
    assert json.loads((folder / "metrics.json").read_text())["quantisation"].startswith("Q8_0")
    adapted = PeftModel.from_pretrained(load_model(file, torch.float32), folder / "adapter")
    merged = load_base_model(Model(str(file), adapter_dir=folder / "adapter"), Run(), CPU)
    input_ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        expected = adapted.get_base_model().model(input_ids).last_hidden_state
        torch.testing.assert_close(merged(input_ids).last_hidden_state, expected, rtol=0, atol=1e-5)
        plain = load_base_model(Model(str(file)), Run(), CPU)(input_ids).last_hidden_state
    assert not torch.allclose(plain, expected, atol=1e-5)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_trained_models_are_ordinary_folders(run, file, tmp_path, init):
    run("from_scratch.py", "--init", init, "--dtype", "float32", "--num_steps", "2", "--batch_size", "8")
    [config] = tmp_path.rglob("config.json")
    trained = AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32)
    start = load_model(file, torch.float32)
    change = (trained.model.embed_tokens.weight - start.model.embed_tokens.weight).abs().max()
    assert 0 < change < 0.01 if init == "pretrained" else change > 0.01
    texts = make_texts(5)
    assert AutoTokenizer.from_pretrained(config.parent)(texts)["input_ids"] == load_tokenizer(file)(texts)["input_ids"]
    assert load_config(Model(str(config.parent)), Run()).hidden_size == 32


# ------------------------------------------------------------------ identity, and what is missing
def test_other_weights_in_a_file_of_the_same_name_are_another_model(run, file, tmp_path, monkeypatch):
    run("cache.py")
    original = file.read_bytes()
    changed = bytearray(original)
    changed[-1] ^= 1
    fingerprint = model_fingerprint(Model(str(file)), Run())
    try:
        file.write_bytes(changed)
        assert model_fingerprint(Model(str(file)), Run()) != fingerprint
        with pytest.raises(AssertionError, match="with other weights of the model"):
            run("cache.py")
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_real_llm_names_the_command_that_fetches_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NTPS_MODELS_DIR", str(tmp_path))
    expected = rf"No model at {tmp_path}/{name}/.*\.gguf\. Run: python -m demo\.real_llm {name}"
    with pytest.raises(UserError, match=expected):
        model_source(name)


@pytest.mark.parametrize("script", ["cache.py", "lora_finetuning.py", "from_scratch.py"])
def test_a_damaged_file_is_one_sentence(file, rows_path, tmp_path, monkeypatch, script):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    places = ("--dataset_name", rows_path, "--results_dir", tmp_path, "--device", "cpu")
    message = run_in_process(monkeypatch, script, "--model_name", cut, *places)
    assert isinstance(message, str) and message.startswith("error: ") and "is cut off: it has" in message
