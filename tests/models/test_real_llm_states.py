"""Real LLMs: states, words and quantisation, of each that python -m demo.real_llm has fetched.

Expected numbers: tests/make_real_llm_golden.py, by transformers alone.
"""

import json

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, states_of
from utils.models.load import load_causal_lm, load_config, load_tokenizer, stored_as
from utils.models.states import decoder_of
from utils.models.table import MODELS, models_dir
from utils.models.tokens import tokenize
from utils.settings import Model, Run

RUN, CPU = Run(device="cpu"), torch.device("cpu")
QUANTISATIONS = {"smollm2": "Q4_1 (5.7 bits a weight)", "gemma3-270m": "Q4_K_M (7.4 bits a weight)"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=QUANTISATIONS)
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
    return load_causal_lm(model, RUN)


def test_hidden_states_of_a_padded_batch_are_those_of_transformers(model, causal_lm, golden, tokenizer):
    """The golden states come from each sentence alone; here the shorter two are padded."""
    texts = [sentence["text"] for sentence in golden["sentences"]]
    tokens = tokenize(texts, tokenizer, config := load_config(model, RUN))
    for sentence, ids in zip(golden["sentences"], np.split(tokens.token_ids, tokens.offsets[1:-1]), strict=True):
        assert ids.tolist() == sentence["input_ids"]
    input_ids, lengths = tokens.pad(np.arange(3))
    seen = states_of(decoder_of(causal_lm), input_ids)
    assert len(seen) == config.num_hidden_layers + 1
    assert stored_as(model)["quantisation"].startswith(f"{QUANTISATIONS[model.model_name]}, de-quantised once a run")
    for row, sentence in enumerate(golden["sentences"]):
        for layer, expected in enumerate(sentence["layers"]):
            last = seen[layer][row, lengths[row] - 1]
            tolerance = 1e-4 * expected["norm"] / config.hidden_size**0.5  # of a coordinate of that state
            assert last[:4].tolist() == pytest.approx(expected["first"], rel=1e-4, abs=tolerance)
            assert last.mean().item() == pytest.approx(expected["mean"], rel=1e-4, abs=tolerance)
            assert last.norm().item() == pytest.approx(expected["norm"], rel=1e-4)


def test_greedy_continuation_is_that_of_transformers(model, causal_lm, golden, tokenizer):
    prompt = tokenizer(golden["continuation"]["prompt"], return_tensors="pt")
    new_ids = golden["continuation"]["new_ids"]
    output = causal_lm.generate(**prompt, max_new_tokens=len(new_ids), do_sample=False)[0]
    assert output[prompt["input_ids"].shape[1] :].tolist() == new_ids
    assert tokenizer.decode(output) == golden["continuation"]["text"]
