"""The eight models of the paper, as small random models of their architecture, and what can go wrong in loading one."""

import json
import shutil
from dataclasses import replace

import httpx2 as httpx
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    Qwen2Config,
    XLNetConfig,
)

from tests.conftest import make_texts, make_tokenizer, retrain, run_in_process
from utils.hub import hub_errors
from utils.models.batches import token_batches
from utils.models.check import self_check
from utils.models.load import load_base_model, load_causal_lm, load_config, load_tokenizer, model_fingerprint
from utils.models.openelm import OpenELMConfig
from utils.models.states import decoder_of, visit_hidden_states
from utils.models.table import FAMILIES, MODELS, repository
from utils.models.tokens import rope_limit, tokenize
from utils.script import UserError
from utils.settings import Model, Run

CPU, RUN = torch.device("cpu"), Run()


def qwen2(heads: int, key_value_heads: int, tied: bool) -> Qwen2Config:
    """Qwen2 with the published ratio of heads, rope base and tying."""
    return Qwen2Config(
        vocab_size=300, hidden_size=8 * heads, intermediate_size=43 * heads, num_hidden_layers=2, rope_theta=1e6,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, tie_word_embeddings=tied, eos_token_id=0,
        max_position_embeddings=64, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip


def openelm(model_dim: int, head_dim: int = 8) -> OpenELMConfig:
    """OpenELM whose heads and feed-forward width grow over three layers; published multipliers and groups of four."""
    options = {
        "vocab_size": 300, "max_context_length": 64, "num_transformer_layers": 3, "model_dim": model_dim,
        "head_dim": head_dim, "num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0],
        "ffn_dim_divisor": 16, "normalize_qk_projections": True, "share_input_output_layers": True,
        "eos_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    return OpenELMConfig(**options)


CONFIGS = {
    "Qwen/Qwen2-0.5B": qwen2(14, 2, tied=True),
    "Qwen/Qwen2-1.5B": qwen2(12, 2, tied=True),
    "Qwen/Qwen2-7B": qwen2(28, 4, tied=False),
    "apple/OpenELM-270M": openelm(160),
    "apple/OpenELM-450M": openelm(192),
    "apple/OpenELM-1_1B": openelm(256),
    "apple/OpenELM-3B": openelm(384, head_dim=16),
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=224, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0, pad_token_id=None, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model and a tokenizer for each of the eight names."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("family") / name.split("/")[1]
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made[name])
        make_tokenizer().save_pretrained(made[name])
    return made


def states_of(model, input_ids) -> list[torch.Tensor]:
    seen = {}
    visit_hidden_states(model, input_ids, lambda layer, states: seen.__setitem__(layer, states.clone()))
    return [seen[layer] for layer in sorted(seen)]


def test_the_table_names_the_eight_models_of_the_paper():
    assert set(CONFIGS) == {name for name in MODELS if "/" in name}
    assert {config.model_type for config in CONFIGS.values()} | {"gemma3_text"} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_the_library(folders, name):
    """Layer count + 1 states, the last after the final norm, and one layer alive at a time changes nothing."""
    settings = Model(str(folders[name]))
    model = load_base_model(settings, RUN, CPU)
    input_ids = torch.randint(0, 300, (3, 11))
    states = states_of(model, input_ids)
    assert len(states) == model.config.num_hidden_layers + 1 and not model.training
    assert load_base_model(replace(settings, dtype="bfloat16"), RUN, CPU).dtype == torch.bfloat16 != model.dtype
    with torch.no_grad():
        expected = model(input_ids=input_ids, output_hidden_states=True)
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(states[-1], expected.last_hidden_state, rtol=0, atol=1e-6)
    root_mean_square = states[-1].square().mean(-1).sqrt()
    torch.testing.assert_close(root_mean_square, torch.ones(3, 11), rtol=0, atol=0.05)  # its norm weights are 1 here
    causal = load_causal_lm(settings, RUN, CPU)  # the base model holds the weights of the causal LM, not fresh ones
    with torch.no_grad():
        logits = causal(input_ids=input_ids).logits
        from_states = states[-1] @ causal.get_output_embeddings().weight.T
    torch.testing.assert_close(logits, from_states, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_goes_from_rows_to_score(folders, rows_path, name, tmp_path, monkeypatch, capsys):
    common = ["--model_name", folders[name], "--dataset_name", rows_path, "--results_dir", tmp_path]
    assert run_in_process(monkeypatch, "cache.py", *common, "--max_samples", 90) == 0
    assert run_in_process(monkeypatch, "K_sweep.py", *common, "--num_null_draws", 5, "--no_picture") == 0
    path = tmp_path / "ntps" / folders[name].name / "rows.json"
    assert capsys.readouterr().out.strip().endswith(str(path))
    result = json.loads(path.read_text())
    assert len(result["layers"]) == CONFIGS[name].num_hidden_layers + 1
    assert all(0 <= value <= 1 for layer in result["layers"] for value in layer["ntps"])


# ------------------------------------------------------------------ identity
def test_a_copy_is_the_same_model_and_a_retrained_one_is_another(model_dirs, tmp_path):
    original = model_fingerprint(Model(str(model_dirs["qwen2"])), RUN)
    copy = shutil.copytree(model_dirs["qwen2"], tmp_path / "copy", copy_function=shutil.copyfile)  # other file times
    (copy / "training_args.bin").write_bytes(b"decides nothing")
    assert model_fingerprint(Model(str(copy)), RUN) == original
    retrain(copy)
    retrained = model_fingerprint(Model(str(copy)), RUN)
    assert retrained != original
    both = model_fingerprint(Model(str(copy), adapter_dir=model_dirs["llama"]), RUN)
    assert both.startswith(retrained) and both != retrained
    other_tokenizer = model_fingerprint(Model(str(copy), tokenizer_name=str(model_dirs["llama"])), RUN)
    assert other_tokenizer.startswith(f"{retrained}+") and len(other_tokenizer) == 2 * len(retrained) + 1


# ------------------------------------------------------------------ tokens
def test_a_long_text_loses_its_end_whatever_the_tokenizer_has_saved(folders, tmp_path):
    folder = tmp_path / "left"
    shutil.copytree(folders["Qwen/Qwen2-0.5B"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    left = {"truncation_side": "left", "padding_side": "left", "pad_token": None, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | left))
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    config = load_config(Model(str(folder)), RUN)
    texts = make_texts(6, seed=2, longest=60)
    tokens = tokenize(texts, load_tokenizer(Model(str(folder)), RUN, config), config, max_length=10)
    for text, ids in zip(texts, np.split(tokens.token_ids, tokens.offsets[1:-1]), strict=True):
        assert ids.tolist() == make_tokenizer()(text)["input_ids"][:10]
    assert tokenize(["the river " * 99], make_tokenizer(), config).lengths.tolist() == [64]  # the model's context


def test_texts_that_the_model_cannot_read_are_refused_and_no_limit_is_none(folders):
    config = load_config(Model(str(folders["Qwen/Qwen2-0.5B"])), RUN)
    with pytest.raises(UserError, match="--max_length 65 is more than the model can read: 64 tokens"):
        tokenize(["a"], make_tokenizer(), config, max_length=65)
    with pytest.raises(UserError, match=r"1 texts have no token, the first is row 1: ''\. Remove"):
        tokenize(["a", "", "b"], make_tokenizer(), config)
    config.vocab_size = 20
    with pytest.raises(UserError, match=r"the model knows 20: they do not belong together.*--tokenizer_name"):
        tokenize(["the river"], make_tokenizer(), config)
    for unlimited in (MambaConfig(vocab_size=300), XLNetConfig(vocab_size=300), BloomConfig(vocab_size=300)):
        tokens = tokenize(["the river " * 1000], make_tokenizer(), unlimited)
        assert tokens.max_length is None and tokens.lengths[0] >= 2000


def test_the_own_limit_of_a_tokenizer_holds_and_the_texts_it_cuts_are_counted(folders, capsys):
    config = load_config(Model(str(folders["Qwen/Qwen2-0.5B"])), RUN)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    texts = ["the river"] * 3 + ["the river " * 9, "the red house " * 9]
    lengths = [len(make_tokenizer()(text)["input_ids"]) for text in texts]
    tokens = tokenize(texts, tokenizer, config)
    assert tokens.max_length == 8 and tokens.lengths.tolist() == [min(length, 8) for length in lengths]
    assert tokens.num_cut == 2 and "2 of 5 texts cut at 8 tokens" in capsys.readouterr().out
    exact = tokenize(texts, tokenizer, config, max_length=max(lengths))  # the limit asked for goes before the own one
    assert exact.num_cut == 0 and exact.lengths.tolist() == lengths
    assert "cut" not in capsys.readouterr().out


def test_a_tokenizer_that_adds_bos_keeps_it_and_nothing_else_changes(folders):
    config = load_config(Model(str(folders["Qwen/Qwen2-0.5B"])), RUN)
    plain, tokenizer, texts = make_tokenizer(), make_tokenizer(), make_texts(6, seed=2, longest=60)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokens = tokenize(texts, tokenizer, config, max_length=10)
    for text, ids in zip(texts, np.split(tokens.token_ids, tokens.offsets[1:-1]), strict=True):
        assert ids.tolist() == [0, *plain(text)["input_ids"]][:10]


# ------------------------------------------------------------------ LongRoPE
def test_texts_on_both_sides_of_the_limit_of_longrope_have_the_states_they_have_alone():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0], "original_max_position_embeddings": 16}
    config = Phi3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = decoder_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    texts = make_texts(30, seed=3, longest=20)
    tokens = tokenize(texts, make_tokenizer(), decoder.config)
    assert tokens.rope_limit == 16 and 5 < (tokens.lengths > 16).sum() < 25
    self_check(decoder, tokens, "phi3")
    for rows in token_batches(tokens.lengths, 4096, tokens.rope_limit):
        together = states_of(decoder, tokens.pad(rows)[0])
        for position, row in enumerate(rows):
            alone = states_of(decoder, tokens.pad(np.array([row]))[0])
            for batch_state, single_state in zip(together, alone, strict=True):
                found = batch_state[position, : tokens.lengths[row]]
                torch.testing.assert_close(found, single_state[0], rtol=0, atol=1e-5)
    assert rope_limit(CONFIGS["Qwen/Qwen2-0.5B"]) is None


# ------------------------------------------------------------------ what the hub can answer
def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example"))


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (errors.GatedRepoError("gated", response=response(403)), "Accept its terms"),
        (errors.RevisionNotFoundError("none", response=response(404)), "no revision 'v9'"),
        (errors.RepositoryNotFoundError("none", response=response(404)), "Did you mean Qwen/Qwen2-0.5B"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
    ],
)
def test_what_the_hub_answers_becomes_a_sentence(cause, message):
    with pytest.raises(UserError, match=message), hub_errors(repository("Qwen/Qwen2-0.5", "v9")):
        try:
            raise cause
        except Exception as error:
            raise OSError("wrapped, as transformers does") from error


def test_no_code_of_a_repository_runs_unasked(tmp_path):
    """A folder whose config points to code of its own: refused, and the code has not run."""
    folder, sign = tmp_path / "remote", tmp_path / "it_ran"
    folder.mkdir()
    code = (
        f"open({str(sign)!r}, 'w').close()\nfrom transformers import PretrainedConfig\nclass C(PretrainedConfig): ...\n"
    )
    (folder / "configuration_remote.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_remote.C", "AutoModelForCausalLM": "configuration_remote.C"}
    (folder / "config.json").write_text(json.dumps({"model_type": "remote", "auto_map": auto_map}))
    with pytest.raises(UserError, match="--trust_remote_code"):
        load_config(Model(str(folder)), RUN)
    assert not sign.exists()


def test_a_demo_model_that_is_not_trained_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.models.table.ROOT", tmp_path)
    with pytest.raises(UserError, match=r"python -m demo\.pretrain --size large"):
        load_config(Model("large"), RUN)


def test_tokenizer_of_another_repository(folders, tmp_path):
    """OpenELM's own repository has no tokenizer: an ungated copy is named by --tokenizer_name, and goes before any."""
    other = make_tokenizer()
    other.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    other.save_pretrained(tmp_path)
    settings = Model(str(folders["apple/OpenELM-270M"]), tokenizer_name=str(tmp_path))
    ours = load_tokenizer(settings, RUN, load_config(settings, RUN))
    assert ours("the river")["input_ids"] == [0, *make_tokenizer()("the river")["input_ids"]]
    (folders["apple/OpenELM-270M"] / "tokenizer_config.json").rename(folders["apple/OpenELM-270M"] / "away")
    try:
        with pytest.raises(UserError, match="meta-llama/Llama-2-7b-hf"):
            load_tokenizer(Model(str(folders["apple/OpenELM-270M"])), RUN, load_config(settings, RUN))
    finally:
        (folders["apple/OpenELM-270M"] / "away").rename(folders["apple/OpenELM-270M"] / "tokenizer_config.json")


def test_missing_weights_are_refused_not_made_up(folders, tmp_path):
    name = "Qwen/Qwen2-7B"
    tensors = load_file(folders[name] / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    shutil.copytree(folders[name], tmp_path / "partial")
    save_file(tensors, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    for load in (load_base_model, load_causal_lm):
        with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
            load(Model(str(tmp_path / "partial")), RUN, CPU)
