"""The real LLM: its states, its words and its scores, where python -m demo.smollm2 has fetched it.

Expected numbers: tests/make_smollm2_golden.py, by transformers alone.
"""

import json

import numpy as np
import pytest
import torch

import cache
import K_sweep
from tests.conftest import ROOT, configure
from tests.data.test_real_data import DATASETS
from utils.models.gguf import SMOLLM2, models_dir
from utils.models.identity import load_config
from utils.models.load import load_base_model, load_causal_lm, load_tokenizer, tokenize
from utils.models.states import visit_hidden_states
from utils.settings import Model, Run

MODEL, RUN, CPU = Model("smollm2"), Run(device="cpu"), torch.device("cpu")
GOLDEN = json.loads((ROOT / "tests" / "data" / "smollm2_golden.json").read_text())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (models_dir() / SMOLLM2).is_file(), reason="SmolLM2 is not there; python -m demo.smollm2 fetches it"
    ),
]


def test_hidden_states_of_a_padded_batch_are_those_of_transformers():
    """Each sentence was run alone there; here the shorter two are padded."""
    config = load_config(MODEL, RUN)
    texts = [sentence["text"] for sentence in GOLDEN["sentences"]]
    tokens = tokenize(texts, load_tokenizer(MODEL, RUN, config), config)
    for sentence, ids in zip(GOLDEN["sentences"], np.split(tokens.token_ids, tokens.offsets[1:-1]), strict=True):
        assert ids.tolist() == sentence["input_ids"]
    input_ids, lengths = tokens.pad(np.arange(3))
    seen: dict[int, torch.Tensor] = {}

    def visit(layer: int, states: torch.Tensor) -> None:
        seen[layer] = states[torch.arange(3), lengths - 1].clone()

    visit_hidden_states(load_base_model(MODEL, RUN, CPU), input_ids, visit)
    assert sorted(seen) == list(range(31))
    for row, sentence in enumerate(GOLDEN["sentences"]):
        for layer, expected in enumerate(sentence["layers"]):
            last = seen[layer][row]
            tolerance = 1e-4 * expected["norm"] / 576**0.5  # of a coordinate of that state
            assert last[:4].tolist() == pytest.approx(expected["first"], rel=1e-4, abs=tolerance)
            assert last.mean().item() == pytest.approx(expected["mean"], rel=1e-4, abs=tolerance)
            assert last.norm().item() == pytest.approx(expected["norm"], rel=1e-4)


def test_greedy_continuation_is_that_of_transformers():
    tokenizer = load_tokenizer(MODEL, RUN, load_config(MODEL, RUN))
    prompt = tokenizer(GOLDEN["continuation"]["prompt"], return_tensors="pt")
    new_ids = GOLDEN["continuation"]["new_ids"]
    output = load_causal_lm(MODEL, RUN, CPU).generate(**prompt, max_new_tokens=len(new_ids), do_sample=False)[0]
    assert output[prompt["input_ids"].shape[1] :].tolist() == new_ids
    assert tokenizer.decode(output).startswith("The capital of France is Paris.")


@pytest.mark.slow
@pytest.mark.skipif(not DATASETS.is_dir(), reason="no copies of hub datasets beside the repository")
def test_score_of_a_real_llm_on_real_texts(tmp_path):
    options = {
        "model_name": "smollm2", "dataset_name": "rotten_tomatoes", "datasets_dir": DATASETS, "max_samples": 60,
        "max_length": 24, "results_dir": tmp_path, "device": "cpu",
    }  # fmt: skip
    for split in ("train", "test"):
        cache.main(configure(cache, **options, split=split))
    K_sweep.main(configure(K_sweep, **options, picture=False, num_null_draws=20))
    result = json.loads((tmp_path / "ntps" / "smollm2" / "rotten_tomatoes.json").read_text())
    assert result["num_samples"] == 60 and result["hidden_size"] == 576 and len(result["layers"]) == 31
    assert result["moments"]["quantisation"] == "Q4_1, de-quantised once a run to float32"
    for layer in result["layers"][1:]:
        assert layer["rank_u"] <= 60  # no more directions than texts
        assert all(0 <= value <= 1 + 1e-9 for name in ("ntps", "retained") for value in layer[name])
    assert result["layers"][0]["rank_v"] <= 576
