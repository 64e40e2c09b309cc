"""Scripts on a model in one GGUF file: its results name the quantisation, and training gives an ordinary model."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import random_twin
from tests.conftest import make_texts, make_tokenizer, run_in_process
from tests.gguf_files import write_gguf
from tests.models.test_gguf import EXTRA, random_model
from utils.models.gguf import load_model, load_tokenizer
from utils.models.load import load_base_model, load_causal_lm, load_config
from utils.models.table import model_source
from utils.script import UserError
from utils.settings import Model, Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8.gguf", random_model("llama"), make_tokenizer(), "Q8_0")


@pytest.fixture
def run(file, rows_path, tmp_path, monkeypatch):
    """Runs a script on the file and the rows; results go to `tmp_path`."""

    def run_script(script: str, *arguments: str) -> None:
        common = ("--model_name", file, "--dataset_name", rows_path, "--results_dir", tmp_path, "--device", "cpu")
        assert run_in_process(monkeypatch, script, *common, "--max_samples", "90", *arguments) == 0

    return run_script


@pytest.mark.slow
def test_moments_and_scores_name_the_quantisation(run, file, tmp_path):
    run("cache.py")
    run("K_sweep.py", "--no_picture", "--num_null_draws", "5")
    with safe_open(tmp_path / "moments" / "tiny.Q8" / "rows" / "train.safetensors", "pt") as stored:
        quantisation = json.loads(stored.metadata()["json"])["quantisation"]
    assert re.fullmatch(r"Q8_0 \(\d+\.\d bits a weight\), de-quantised once a run to float32", quantisation)
    scores = json.loads((tmp_path / "ntps/tiny.Q8/rows.json").read_text())
    assert scores["moments"]["quantisation"] == quantisation
    original = file.read_bytes()
    try:  # other weights in a file of the same name are another model
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(AssertionError, match="with other weights of the model"):
            run("cache.py")
    finally:
        file.write_bytes(original)


@pytest.mark.slow
def test_an_adapter_of_the_file_loads_in_plain_peft_and_a_trained_copy_is_an_ordinary_folder(run, file, tmp_path):
    training = ("--dtype", "float32", "--num_steps", "4", "--batch_size", "8")
    run("lora_finetuning.py", *training, "--learning_rate", "0.01")
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
    run("from_scratch.py", "--init", "pretrained", *training)
    [config] = tmp_path.rglob("full_finetuning/**/config.json")
    trained = AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32)
    change = (trained.model.embed_tokens.weight - load_model(file, torch.float32).model.embed_tokens.weight).abs().max()
    assert 0 < change < 0.01
    texts = make_texts(5)
    assert AutoTokenizer.from_pretrained(config.parent)(texts)["input_ids"] == load_tokenizer(file)(texts)["input_ids"]


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_real_llm_names_the_command_that_fetches_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NTPS_MODELS_DIR", str(tmp_path))
    expected = rf"No model at {tmp_path}/{name}/.*\.gguf\. Run: python -m demo\.real_llm {name}"
    with pytest.raises(UserError, match=expected):
        model_source(name)


def test_a_twin_has_the_architecture_and_tokens_but_random_weights(tmp_path):
    original = random_model("gemma3")
    path = write_gguf(tmp_path / "a.gguf", original, make_tokenizer(), extra=EXTRA["gemma3"], bos_token_id=7)
    twins, texts = [], make_texts(5)
    for folder, seed in ((tmp_path / "first", 0), (tmp_path / "again", 0), (tmp_path / "other", 1)):
        random_twin.main(random_twin.Config(str(path), seed, folder))
        model = Model(str(folder))
        twins.append(load_causal_lm(model, Run(), CPU).model.embed_tokens.weight)
        config = load_config(model, Run())
        for name in ("model_type", "hidden_size", "layer_types", "sliding_window", "rope_parameters"):
            assert getattr(config, name) == getattr(original.config, name), name
        ids = load_tokenizer(path)(texts)["input_ids"]
        assert AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == ids and all(row[0] == 7 for row in ids)
    assert torch.equal(twins[0], twins[1]) and not torch.allclose(twins[0], twins[2], atol=1e-3)
    assert not torch.allclose(twins[0], original.model.embed_tokens.weight, atol=1e-3)
