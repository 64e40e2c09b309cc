"""Real LLMs: states, words and scores, of each that python -m demo.real_llm has fetched.

Expected numbers: tests/make_real_llm_golden.py, by transformers alone.
"""

import copy
import json

import numpy as np
import pytest
import torch

import cache
import K_sweep
from tests.conftest import ROOT, configure
from tests.data.test_real_data import DATASETS
from utils.models.load import load_causal_lm, load_config, load_tokenizer
from utils.models.states import decoder_of, visit_hidden_states
from utils.models.table import MODELS, models_dir
from utils.models.tokens import tokenize
from utils.script import UserError
from utils.settings import Model, Run

RUN, CPU = Run(device="cpu"), torch.device("cpu")
NAMES = ("smollm2", "gemma3-270m")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NAMES)
def model(request) -> Model:
    if not (models_dir() / MODELS[request.param].path).is_file():
        pytest.skip(f"{request.param} is not installed; {MODELS[request.param].command} fetches it")
    return Model(request.param)


@pytest.fixture(scope="module")
def golden(model) -> dict:
    return json.loads((ROOT / "tests" / "data" / f"{model.model_name}_golden.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model, RUN, load_config(model, RUN))


@pytest.fixture(scope="module")
def causal_lm(model):
    return load_causal_lm(model, RUN, CPU)


def test_hidden_states_of_a_padded_batch_are_those_of_transformers(model, causal_lm, golden, tokenizer):
    """The golden states come from each sentence alone; here the shorter two are padded."""
    texts = [sentence["text"] for sentence in golden["sentences"]]
    tokens = tokenize(texts, tokenizer, config := load_config(model, RUN))
    for sentence, ids in zip(golden["sentences"], np.split(tokens.token_ids, tokens.offsets[1:-1]), strict=True):
        assert ids.tolist() == sentence["input_ids"]
    input_ids, lengths = tokens.pad(np.arange(3))
    seen: dict[int, torch.Tensor] = {}

    def visit(layer: int, states: torch.Tensor) -> None:
        seen[layer] = states[torch.arange(3), lengths - 1].clone()

    visit_hidden_states(decoder_of(causal_lm), input_ids, visit)
    assert sorted(seen) == list(range(config.num_hidden_layers + 1))
    for row, sentence in enumerate(golden["sentences"]):
        for layer, expected in enumerate(sentence["layers"]):
            last = seen[layer][row]
            tolerance = 1e-4 * expected["norm"] / config.hidden_size**0.5  # of a coordinate of that state
            assert last[:4].tolist() == pytest.approx(expected["first"], rel=1e-4, abs=tolerance)
            assert last.mean().item() == pytest.approx(expected["mean"], rel=1e-4, abs=tolerance)
            assert last.norm().item() == pytest.approx(expected["norm"], rel=1e-4)


CONTINUATIONS = {
    "smollm2": "The capital of France is Paris.",
    "gemma3-270m": "<bos>The capital of France is the capital of the country of France. It is the largest city in France",  # noqa: E501
}


def test_greedy_continuation_is_that_of_transformers(model, causal_lm, golden, tokenizer):
    prompt = tokenizer(golden["continuation"]["prompt"], return_tensors="pt")
    new_ids = golden["continuation"]["new_ids"]
    output = causal_lm.generate(**prompt, max_new_tokens=len(new_ids), do_sample=False)[0]
    assert output[prompt["input_ids"].shape[1] :].tolist() == new_ids
    assert tokenizer.decode(output).startswith(CONTINUATIONS[model.model_name])


QUANTISATIONS = {"smollm2": "Q4_1 (5.7 bits a weight)", "gemma3-270m": "Q4_K_M (7.4 bits a weight)"}


@pytest.mark.skipif(not DATASETS.is_dir(), reason="no copies of hub datasets beside the repository")
def test_score_of_a_real_llm_on_real_texts(model, causal_lm, tmp_path, monkeypatch):
    name, config = model.model_name, load_config(model, RUN)
    monkeypatch.setattr(cache, "load_base_model", lambda *_: decoder_of(causal_lm))
    options = {
        "model_name": name, "dataset_name": "rotten_tomatoes", "datasets_dir": DATASETS, "max_samples": 30,
        "max_length": 16, "results_dir": tmp_path, "device": "cpu",
    }  # fmt: skip
    cache.main(configure(cache, **options, layers=(0, -1)))
    result = K_sweep.main(configure(K_sweep, **options, picture=False, num_null_draws=2, num_random_draws=2))
    assert result["num_samples"] == 30 and result["hidden_size"] == config.hidden_size
    assert [layer["layer"] for layer in result["layers"]] == [0, config.num_hidden_layers]
    assert result["moments"]["quantisation"] == f"{QUANTISATIONS[name]}, de-quantised once a run to float32"
    first, last = result["layers"]
    assert last["rank_u"] <= 30 and first["rank_v"] <= config.hidden_size  # no more directions than texts
    assert all(0 <= value <= 1 + 1e-9 for score in ("ntps", "retained") for value in last[score])


def test_float16_overflows_in_gemma_and_is_refused(model, causal_lm, rows_path, tmp_path, monkeypatch):
    if model.model_name != "gemma3-270m":
        pytest.skip("float16 holds the states of this model")
    monkeypatch.setattr(cache, "load_base_model", lambda *_: copy.deepcopy(decoder_of(causal_lm)).half())
    monkeypatch.setattr(cache, "self_check", lambda *_: None)  # it leaves non-finite states to the pass
    options = {"model_name": model.model_name, "dataset_name": str(rows_path), "results_dir": tmp_path, "device": "cpu"}
    with pytest.raises(UserError, match=r"Non-finite hidden states at layer .*\(torch\.float16\)"):
        cache.main(configure(cache, **options, dtype="float16", max_samples=3))
    assert not list(tmp_path.rglob("*.safetensors"))
