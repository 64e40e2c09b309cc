"""Models in one GGUF file, against transformers' own reading of the same file."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cache
import K_sweep
from demo import random_twin
from tests.conftest import configure, make_texts, make_tokenizer
from tests.gguf_files import write_gguf
from tests.models.small import small_config
from utils.models.gguf import load_config, load_model, load_tokenizer, quantisation, read_header
from utils.script import UserError

SIZES = {"intermediate_size": 64, "bos_token_id": None}  # whole blocks of quantised weights
CONFIGS = {
    "llama": small_config("llama", **SIZES, tie_word_embeddings=True, rope_theta=5e4),
    "qwen2": small_config("qwen2", **SIZES, tie_word_embeddings=False),
    "qwen3": small_config("qwen3", **SIZES, tie_word_embeddings=True),
    "gemma3": small_config("gemma3_text", **SIZES, num_hidden_layers=7, sliding_window=5),  # one full attention
}
EXTRA = {  # settings beside those of every architecture
    "qwen3": {"qwen3.attention.key_length": 8},
    "gemma3": {"gemma3.attention.key_length": 8, "gemma3.attention.sliding_window": 5},
}


NEUTRAL = {  # settings at the values that the configuration has
    "rope.dimension_count": 8, "expert_count": 0, "vocab_size": 300, "attention.causal": True,
    "attention.sliding_window_pattern": 6, "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0,
}  # fmt: skip


def random_model(architecture: str):
    """A random model, with random biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def theirs(auto_class, path: Path, **options):
    """Configuration, tokenizer and model as transformers reads them from the file."""
    return auto_class.from_pretrained(str(path.parent), gguf_file=path.name, **options)


@pytest.mark.parametrize(("architecture", "more"), [*((name, {}) for name in CONFIGS), ("gemma3", NEUTRAL)])
def test_an_unquantised_file_gives_the_model_it_was_made_from(architecture, more, tmp_path):
    model = random_model(architecture)
    extra = EXTRA.get(architecture, {}) | {f"{architecture}.{name}": value for name, value in more.items()}
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), extra=extra)
    input_ids = torch.randint(0, 300, (2, 17))
    with torch.no_grad():
        found, expected = (m(input_ids, output_hidden_states=True) for m in (load_model(path, torch.float32), model))
    pairs = zip((*found.hidden_states, found.logits), (*expected.hidden_states, expected.logits), strict=True)
    for ours, original in pairs:
        torch.testing.assert_close(ours, original, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "Q4_1"), ("qwen2", "F16"), ("gemma3", "Q8_0")])
def test_a_quantised_file_gives_weights_settings_and_tokens_that_transformers_reads(architecture, kind, tmp_path):
    extra = EXTRA.get(architecture)
    path = write_gguf(tmp_path / "model.gguf", random_model(architecture), make_tokenizer(), kind, extra=extra)
    ours, reference = load_model(path, torch.float32).state_dict(), theirs(AutoModelForCausalLM, path).state_dict()
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], weight.float()) for name, weight in reference.items())
    assert quantisation(path).startswith(f"{kind} (")
    settings, expected = load_config(path).to_dict(), theirs(AutoConfig, path).to_dict()
    names = {*settings, *expected} - {"_name_or_path", "_model_name_or_path"}
    assert {name: settings.get(name) for name in names} == {name: expected.get(name) for name in names}
    tokenizer, original = load_tokenizer(path), theirs(AutoTokenizer, path)
    texts = [*make_texts(20), "<|endoftext|> x  12\n\n", "ünï ☃"]
    assert tokenizer(texts)["input_ids"] == original(texts)["input_ids"] == make_tokenizer()(texts)["input_ids"]
    assert (tokenizer.padding_side, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("right", 0, None)


def test_bos_is_kept_and_the_model_is_saved_as_an_ordinary_folder(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), make_tokenizer(), bos_token_id=7)
    texts, folder = make_texts(5), tmp_path / "folder"
    model, tokenizer = load_model(path, torch.bfloat16), load_tokenizer(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # as random twins and trained models are saved
    with_bos = [[7, *ids] for ids in make_tokenizer()(texts)["input_ids"]]
    assert tokenizer(texts)["input_ids"] == AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == with_bos
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_smollm_splits_off_each_digit_before_it_looks_for_words(tmp_path):
    """The same as its own tokenizer.json and llama.cpp: white space before a digit then stays together."""
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), make_tokenizer(), pre_tokenizer="smollm")
    pieces = load_tokenizer(path).backend_tokenizer.pre_tokenizer.pre_tokenize_str("see  12\n\n3 red")
    assert [piece for piece, _ in pieces] == ["see", "ĠĠ", "1", "2", "ĊĊ", "3", "Ġred"]


def test_a_file_cut_anywhere_is_one_sentence(tmp_path):
    cut = write_gguf(tmp_path / "cut.gguf", random_model("llama"), make_tokenizer())
    whole = cut.read_bytes()
    weights = min(tensor.offset for tensor in read_header(cut)[1].values())
    for size in (0, 3, 4, 20, 40, 200, weights // 2, weights - 100, weights + 1, len(whole) - 5000):
        cut.write_bytes(whole[:size])
        for read in (load_config, load_tokenizer, quantisation, lambda path: load_model(path, torch.float32)):
            with pytest.raises(UserError, match=r"cut off|not a readable GGUF file"):
                read(cut)


def test_a_path_without_a_gguf_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"No file .*absent\.gguf.*python -m demo\.real_llm"):
        load_config(tmp_path / "absent.gguf")
    (tmp_path / "a.gguf").write_bytes(b"<!doctype html>" * 99)
    with pytest.raises(UserError, match="does not start with the GGUF magic"):
        load_config(tmp_path / "a.gguf")


WRONG = {  # message -> the model, and how its file differs
    r"architecture 'mamba'.*llama, qwen2, qwen3, gemma3": ("llama", {"architecture": "mamba"}),
    "does not state num_hidden_layers, hidden_size": ("llama", {"without": ("block_count", "embedding_length")}),
    "settings that do not fit together.*head_dim": ("llama", {"extra": {"llama.attention.key_length": 8.5}}),
    "has nothing for blk.1.ffn_up.weight": ("llama", {"without": ("blk.1.ffn_up.weight",)}),
    r"holds blk\.0\.attn_k\.bias, which a llama model does not use": ("qwen2", {"architecture": "llama"}),
    "does not state head_dim, sliding_window": ("gemma3", {}),
}
INEXPRESSIBLE = {  # settings that no configuration has
    "llama.rope.scaling.type": "linear",
    "llama.rope.dimension_count": 4,  # positions in half of a head
    "llama.attention.causal": False,
    "llama.expert_count": 8,
    "gemma3.attention.sliding_window_pattern": 4,
}
for name, value in INEXPRESSIBLE.items():
    architecture, _, _ = name.partition(".")
    extra = EXTRA.get(architecture, {f"{architecture}.attention.key_length": 8}) | {name: value}
    WRONG[rf"states {name} = .*Take the model's folder"] = (architecture, {"extra": extra})


@pytest.mark.parametrize("message", WRONG)
def test_a_model_that_would_be_read_wrongly_is_refused(message, tmp_path):
    architecture, options = WRONG[message]
    path = write_gguf(tmp_path / "model.gguf", random_model(architecture), make_tokenizer(), **options)
    with pytest.raises(UserError, match=message):
        load_model(path, torch.float32)


def test_moments_and_scores_name_the_quantisation_and_other_weights_are_refused(rows_path, tmp_path):
    file = write_gguf(tmp_path / "tiny.Q8.gguf", random_model("llama"), make_tokenizer(), "Q8_0")
    names = {"model_name": str(file), "dataset_name": str(rows_path), "results_dir": tmp_path, "max_samples": 60}
    cache.main(configure(cache, **names))
    scores = K_sweep.main(configure(K_sweep, **names, picture=False, num_null_draws=2))
    expected = r"Q8_0 \(\d+\.\d bits a weight\), de-quantised once a run to float32"
    assert re.fullmatch(expected, scores["moments"]["quantisation"])
    original = file.read_bytes()
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(UserError, match="with other weights of the model"):
        cache.main(configure(cache, **names))


def test_a_twin_has_the_architecture_and_tokens_but_random_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = random_model("gemma3")
    path = write_gguf(tmp_path / "a.gguf", original, make_tokenizer(), extra=EXTRA["gemma3"], bos_token_id=7)
    twins, texts = [], make_texts(5)
    for name, seed in (("a-random", 0), ("again", 0), ("a-seed1-random", 1)):
        folder = Path("demo/runs") / name
        random_twin.main(random_twin.Config(str(path), seed, folder if name == "again" else None))
        twins.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        for name in ("model_type", "hidden_size", "layer_types", "sliding_window", "rope_parameters"):
            assert getattr(twins[-1].config, name) == getattr(original.config, name), name
        ids = load_tokenizer(path)(texts)["input_ids"]
        assert AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == ids and all(row[0] == 7 for row in ids)
    first, again, other, own = (model.model.embed_tokens.weight for model in (*twins, original))
    assert torch.equal(first, again) and not any(torch.allclose(first, one, atol=1e-3) for one in (other, own))
