"""Ranks are those of exact arithmetic: scores against SVDs of the data, for states that span less than d."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from transformers import AutoModel

import cache
import K_sweep
from tests.conftest import make_texts, states_of, write_rows
from tests.models.small import small_config
from utils.algebra.moments import LayerMoments, describe_texts, load_layer
from utils.algebra.scores import SCORES
from utils.data.load import LabelledTexts
from utils.models.tokens import TokenizedTexts
from utils.results import open_tensors, save_tensors
from utils.settings import Data, Model, Run, result_settings

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------ the reference: data matrices, float64, no moments
def span(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis of the columns of a data matrix (N, d), and W (d, rank) with data @ W equal to it."""
    norms = np.linalg.norm(data, axis=0)
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    left, values, right = np.linalg.svd(data * scale, full_matrices=False)
    kept = values > 1e-7 * values[0]  # others are 1e-4 and more; transformers' LayerNorm in float32 leaves 1e-8
    return left[:, kept], scale[:, None] * right[kept].T / values[kept]


def left_vectors(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vectors, values, _ = np.linalg.svd(matrix, full_matrices=False)
    kept = values > 1e-8 * values[0]
    return vectors[:, kept], values[kept]


def share_inside(basis: np.ndarray, vectors: np.ndarray, weights: np.ndarray) -> float:
    """Share of the squared lengths of the weighted vectors that is in the span of an orthonormal basis."""
    return np.square(basis.T @ vectors * weights).sum() / np.square(vectors * weights).sum()


def reference(states: list[np.ndarray], targets: np.ndarray, center: bool) -> dict:
    """Ranks and scores of one layer from the states (T, d) of each text and the labels (n, c)."""
    root = math.sqrt(len(states))
    pooled = np.stack([x.mean(0) for x in states])
    prefixes = np.concatenate([x.cumsum(0)[:-1] for x in states])
    following = np.concatenate([x[1:] for x in states])
    centred, labels = pooled - pooled.mean(0), targets - targets.mean(0)
    if center:
        prefixes, following = prefixes - prefixes.mean(0), following - following.mean(0)
    perceived, asked = (centred, labels) if center else (pooled, targets)
    of_pooled, of_centred, of_prefixes = (span(of / root) for of in (perceived, centred, prefixes))
    whitener, rank_u, rank_v = of_pooled[1], of_pooled[1].shape[1], of_prefixes[1].shape[1]
    directions, _ = left_vectors(of_prefixes[0].T @ following)
    ties = of_prefixes[1] @ scipy.linalg.null_space(directions.T)  # in order of variance: shortest first
    v = np.hstack([of_prefixes[1] @ directions, ties @ np.linalg.svd(ties, full_matrices=False)[2][::-1].T])
    u, values = left_vectors(of_pooled[0].T @ asked)
    equal = np.abs(values[:, None] - values) < 1e-8 * values[0]  # any basis of an eigenspace: the mean over it
    p, s = left_vectors(of_centred[0].T @ labels)
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for fraction in K_sweep.Config().fractions:
        k_u, k_v = (max(1, math.floor(fraction * rank + 1e-9)) for rank in (rank_u, rank_v))
        basis = scipy.linalg.orth(v[:, :k_v] / np.linalg.norm(v[:, :k_v], axis=0), rcond=1e-9)
        inside, whole = np.square(basis.T @ whitener @ u).sum(0), np.square(whitener @ u).sum(0)
        tied_inside = np.square(basis.T @ whitener).sum() - inside.sum()
        tied_whole = np.square(whitener).sum() - whole.sum()
        inside, whole = (equal @ of / equal.sum(1) for of in (inside, whole))
        share = max(0, k_u - u.shape[1]) / (rank_u - u.shape[1]) if rank_u > u.shape[1] else 0
        numerator, denominator = (
            of[:k_u].sum() + share * tied for of, tied in ((inside, tied_inside), (whole, tied_whole))
        )
        scores["ntps"].append(numerator / denominator)
        scores["ntps_label"].append(share_inside(basis, whitener @ u, np.ones(u.shape[1])))
        seen = of_centred[0].T @ centred @ v[:, :k_v]
        seen_basis = scipy.linalg.orth(seen / np.linalg.norm(seen, axis=0), rcond=1e-8)
        scores["ntps_whitened"].append(share_inside(seen_basis, p, np.ones(len(s))))
        scores["retained"].append(share_inside(seen_basis, p, s))
    return {"rank_u": rank_u, "rank_v": rank_v, **scores}


# ------------------------------------------------------------------ cases
def make_model(kind: str, d: int, vocab: int):
    """A random model with weights in its norms, and offsets if the architecture has them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": d, "intermediate_size": 2 * d, "head_dim": d // 4}
    config = small_config(kind, **sizes, num_key_value_heads=4, max_position_embeddings=512)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            parameter.copy_(parameter.bfloat16())  # the same weights in every dtype
    return model


def random_tokens(num_texts: int, shortest: int, longest: int, vocab: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    weights = 1 / np.arange(1, vocab + 1)
    lengths = random.integers(shortest, longest + 1, num_texts)
    return [random.choice(vocab, length, p=weights / weights.sum()) for length in lengths]


def words_of_several_tokens(num_texts: int) -> list[np.ndarray]:
    """Texts of whole words: tokens of a word come equally often, so that pooled states span less than prefixes."""
    random = np.random.default_rng(1)
    words = np.split(np.arange(53), np.sort(random.choice(np.arange(1, 53), 21, replace=False)))
    return [np.concatenate([words[i] for i in random.choice(22, random.integers(3, 15))]) for _ in range(num_texts)]


def labels_of(texts: list[np.ndarray], num_classes: int) -> LabelledTexts:
    random = np.random.default_rng(2)
    labels = [(text[0] + text[len(text) // 2] + (random.random() < 0.3)) % num_classes for text in texts]
    labels[:num_classes] = range(num_classes)
    return LabelledTexts([], np.array(labels), [f"class {number}" for number in range(num_classes)], "")


def layer_moments(model, texts, data, config: cache.Config, path) -> list[LayerMoments]:
    """The moments as K_sweep.py reads them from the file of cache.py."""
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    tokens = TokenizedTexts(np.concatenate(texts).astype(np.int32), offsets, 512)
    tensors = cache.accumulate(model, tokens, data, np.zeros(len(texts), int), config)
    layers = list(range(model.config.num_hidden_layers + 1))
    metadata = {"layers": layers, "config": result_settings(config), "class_counts": None}
    save_tensors(path, tensors, metadata | describe_texts(tokens.token_ids, offsets))
    with open_tensors(path) as (file, metadata):
        return [load_layer(file, metadata, layer, torch.device("cpu")) for layer in metadata["layers"]]


def exact_states(model, texts) -> list[list[np.ndarray]]:
    """The states of each layer in float64, text by text."""
    of_texts = (states_of(model, torch.from_numpy(text)[None]) for text in texts)
    return [[x[0].double().numpy() for x in of_layer] for of_layer in zip(*of_texts, strict=True)]


CASES = {
    "few texts": ("llama", 128, 300, functools.partial(random_tokens, 12, 3, 8), 3, {}),
    "few tokens at layer 0": ("llama", 96, 40, functools.partial(random_tokens, 150, 3, 16), 4, {}),
    "an alphabet": ("llama", 24, 12, functools.partial(random_tokens, 200, 5, 24), 3, {}),
    "words of several tokens": ("llama", 96, 53, lambda vocab: words_of_several_tokens(120), 4, {}),
    "long texts": ("llama", 64, 300, functools.partial(random_tokens, 20, 100, 160), 3, {}),
    "LayerNorm without offset": ("olmo", 64, 200, functools.partial(random_tokens, 200, 5, 24), 4, {}),
    "LayerNorm with weight": ("cohere", 64, 200, functools.partial(random_tokens, 200, 5, 24), 4, {}),
    "LayerNorm, centred": ("gpt_neox", 64, 200, functools.partial(random_tokens, 200, 5, 24), 4, {"center": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "product_dtype"), [("float32", "float32"), ("float32", "auto"), ("bfloat16", "auto")]
)
def test_rank_and_scores_are_those_of_exact_arithmetic(case, dtype, product_dtype, tmp_path):
    if (case, dtype) == ("an alphabet", "bfloat16"):
        pytest.skip("states that bfloat16 itself moves: their smallest variance is that of its rounding")
    kind, d, vocab, make, num_classes, options = CASES[case]
    model, texts = make_model(kind, d, vocab), make(vocab=vocab)
    data = labels_of(texts, num_classes)
    exact = exact_states(model.double(), texts)
    model = model.to(getattr(torch, dtype))
    run = Run(tokens_per_batch=512)
    config = cache.Config(model=Model(dtype=dtype), product_dtype=product_dtype, num_folds=1, run=run)
    options = {**options, "num_null_draws": 2}
    layers = layer_moments(model, texts, data, config, tmp_path / "moments.safetensors")
    tolerance = {"float32": {"float32": 2e-3, "auto": 1e-4}[product_dtype], "bfloat16": 0.02}[dtype]
    for layer, moments in enumerate(layers):
        found = K_sweep.sweep_layer(moments, None, K_sweep.Config(**options), layer).to_json()
        expected = reference(exact[layer], cache.one_hot_targets(data).numpy(), options.get("center", False))
        assert (found["rank_u"], found["rank_v"]) == (expected["rank_u"], expected["rank_v"]), layer
        for name in SCORES:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance, err_msg=f"{layer} {name}")


# ------------------------------------------------------------------ layers without a score
@pytest.mark.parametrize(
    ("texts", "pooling", "without_score"),
    [
        ([f"{text} ." for text in make_texts(24)], "last", [0]),  # layer 0 pools to the full stop
        (["the red house"] * 40, "mean", [0, 1, 2, 3]),
        (["e", "a", "t", "o"] * 10, "mean", [0, 1, 2, 3]),  # texts of one token
    ],
)
def test_a_layer_whose_states_tell_nothing_has_no_score(model_dirs, tmp_path, capsys, texts, pooling, without_score):
    rows = [{"text": text, "label": f"class {i % 3}"} for i, text in enumerate(texts)]
    data = Data(str(write_rows(tmp_path / "rows.jsonl", rows)))
    run = Run(results_dir=tmp_path, tokens_per_batch=128)
    groups = {"model": Model(str(model_dirs["llama"])), "data": data, "run": run}
    cache.main(cache.Config(split="all", pooling=pooling, **groups))
    result = K_sweep.main(K_sweep.Config(split="all", num_null_draws=3, **groups))
    for layer, name in itertools.product(result["layers"], SCORES):
        if layer["layer"] in without_score:
            assert layer[name] is layer["excess_loss"] is layer["null"] is None
        else:
            assert 0 <= min(layer[name]) <= max(layer[name]) <= 1 + 1e-9, (layer["layer"], name)
    assert (result["score"]["retained"]["value"] is None) == (3 in without_score)
    assert f"No score at layer {', '.join(map(str, without_score))}:" in capsys.readouterr().out
