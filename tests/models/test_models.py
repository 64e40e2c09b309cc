"""Names, identities and tokens of models, and errors in loading one."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import errors
from tokenizers.processors import TemplateProcessing
from transformers import MambaConfig, Qwen2Config

from tests.conftest import make_texts, make_tokenizer, retrain, states_of
from tests.models.small import small_model
from utils.hub import hub_errors
from utils.models.batches import token_batches
from utils.models.check import self_check
from utils.models.load import load_config, load_tokenizer, model_fingerprint
from utils.models.openelm import OpenELMConfig
from utils.models.states import decoder_of
from utils.models.table import repository
from utils.models.tokens import rope_limit, tokenize
from utils.script import UserError
from utils.settings import Model, Run

CPU, RUN = torch.device("cpu"), Run()
RESPONSE = Mock(headers={})


def test_a_copy_is_the_same_model_and_a_retrained_one_is_another(model_dirs, tmp_path):
    original = model_fingerprint(Model(str(model_dirs["qwen2"])), RUN)
    copy = shutil.copytree(model_dirs["qwen2"], tmp_path / "copy", copy_function=shutil.copyfile)  # other file times
    (copy / "training_args.bin").write_bytes(b"decides nothing")
    assert model_fingerprint(Model(str(copy)), RUN) == original
    retrain(copy)
    retrained = model_fingerprint(Model(str(copy)), RUN)
    assert retrained != original
    llama = model_fingerprint(Model(str(model_dirs["llama"])), RUN)
    for other in ({"adapter_dir": model_dirs["llama"]}, {"tokenizer_name": str(model_dirs["llama"])}):
        assert model_fingerprint(Model(str(copy), **other), RUN) == f"{retrained}+{llama}"


@pytest.fixture(scope="module")
def config(model_dirs):
    return load_config(Model(str(model_dirs["qwen2"])), RUN)


def rows_of(tokens) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(tokens.token_ids, tokens.offsets[1:-1])]


def add_special_tokens(tokenizer, template: str):
    """The tokenizer, changed to place its only special token as the template does."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, None, [("<|endoftext|>", 0)])
    return tokenizer


def test_a_long_text_loses_its_end_whatever_the_tokenizer_has_saved(model_dirs, config, tmp_path):
    folder = shutil.copytree(model_dirs["qwen2"], tmp_path / "left")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    left = {"truncation_side": "left", "padding_side": "left", "pad_token": None, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | left))
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    texts = make_texts(6, seed=2, longest=60)
    tokens = tokenize(texts, load_tokenizer(Model(str(folder)), RUN, config), config, max_length=10)
    assert rows_of(tokens) == [make_tokenizer()(text)["input_ids"][:10] for text in texts]
    assert tokenize(["the river " * 99], make_tokenizer(), config).lengths.tolist() == [64]  # the model's context


def test_a_tokenizer_that_adds_bos_and_eos_keeps_them_and_nothing_else_changes(config):
    texts = make_texts(6, seed=2, longest=60)
    tokenizer = add_special_tokens(make_tokenizer(), "<|endoftext|> $A <|endoftext|>")
    expected = [[0, *make_tokenizer()(text)["input_ids"][:8], 0] for text in texts]
    assert rows_of(tokenize(texts, tokenizer, config, max_length=10)) == expected
    with pytest.raises(UserError, match="The tokenizer adds more than 1 tokens"):
        tokenize(texts, tokenizer, config, max_length=1)


def test_texts_that_the_model_cannot_read_are_refused_and_no_limit_is_none(config):
    with pytest.raises(UserError, match="--max_length 65 exceeds the 64 tokens that the model can read"):
        tokenize(["a"], make_tokenizer(), config, max_length=65)
    with pytest.raises(UserError, match=r"1 texts have no token; the first is row 1: ''\. Remove"):
        tokenize(["a", "", "b"], make_tokenizer(), config)
    with pytest.raises(UserError, match=r"the model has 20 tokens: they do not belong together.*--tokenizer_name"):
        tokenize(["the river"], make_tokenizer(), Qwen2Config(vocab_size=20))
    tokens = tokenize(["the river " * 1000], make_tokenizer(), MambaConfig(vocab_size=300))
    assert tokens.max_length is None and tokens.lengths[0] >= 2000


def test_the_own_limit_of_a_tokenizer_holds_and_the_texts_it_cuts_are_counted(config, capsys):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    texts = ["the river"] * 3 + ["the river " * 9, "the red house " * 9]
    lengths = [len(make_tokenizer()(text)["input_ids"]) for text in texts]
    tokens = tokenize(texts, tokenizer, config)
    assert tokens.max_length == 8 and tokens.lengths.tolist() == [min(length, 8) for length in lengths]
    assert tokens.num_cut == 2 and "2 of 5 texts cut at 8 tokens" in capsys.readouterr().out
    exact = tokenize(texts, tokenizer, config, max_length=max(lengths))  # the limit asked for goes before the own one
    assert exact.num_cut == 0 and exact.lengths.tolist() == lengths and "cut" not in capsys.readouterr().out


def test_texts_on_both_sides_of_the_limit_of_longrope_have_the_states_they_have_alone():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0]}
    decoder = decoder_of(small_model("phi3", original_max_position_embeddings=16, rope_parameters=rope))
    tokens = tokenize(make_texts(30, seed=3, longest=20), make_tokenizer(), decoder.config)
    assert tokens.rope_limit == 16 and 5 < (tokens.lengths > 16).sum() < 25
    self_check(decoder, tokens, "phi3")

    for rows in token_batches(tokens.lengths, 4096, tokens.rope_limit):
        together = torch.stack(states_of(decoder, tokens.pad(rows)[0]))
        for position, row in enumerate(rows):
            alone = torch.stack(states_of(decoder, tokens.pad(np.array([row]))[0]))[:, 0]
            torch.testing.assert_close(together[:, position, : tokens.lengths[row]], alone, rtol=0, atol=1e-5)
    assert rope_limit(Qwen2Config()) is None


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (errors.GatedRepoError("gated", response=RESPONSE), "Accept its terms"),
        (errors.RevisionNotFoundError("none", response=RESPONSE), "no revision 'v9'"),
        (errors.RepositoryNotFoundError("none", response=RESPONSE), "Did you mean Qwen/Qwen2-0.5B"),
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
    """A folder with a config that points to its own code is refused, and the code has not run."""
    folder, sign = tmp_path / "remote", tmp_path / "it_ran"
    folder.mkdir()
    (folder / "configuration_remote.py").write_text(f"open({str(sign)!r}, 'w').close()\nclass C: ...\n")
    auto_map = {"AutoConfig": "configuration_remote.C", "AutoModelForCausalLM": "configuration_remote.C"}
    (folder / "config.json").write_text(json.dumps({"model_type": "remote", "auto_map": auto_map}))
    with pytest.raises(UserError, match="--trust_remote_code"):
        load_config(Model(str(folder)), RUN)
    assert not sign.exists()


@pytest.mark.parametrize("name", ["large", "smollm2", "gemma3-270m"])
def test_a_demo_model_that_is_not_there_names_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.models.table.ROOT", tmp_path)
    monkeypatch.setenv("NTPS_MODELS_DIR", str(tmp_path / "models"))
    with pytest.raises(UserError, match=rf"No model at {tmp_path}/.*{name}.* Run: python -m demo\..*{name}"):
        load_config(Model(name), RUN)


def test_tokenizer_of_another_repository(tmp_path):
    """OpenELM's own repository has no tokenizer: an ungated copy is named by --tokenizer_name, and goes before any."""
    config = OpenELMConfig(vocab_size=300, model_dim=32, head_dim=8, num_transformer_layers=1)
    config.save_pretrained(tmp_path / "model")
    add_special_tokens(make_tokenizer(), "<|endoftext|> $A").save_pretrained(tmp_path / "tokenizer")
    named = Model(str(tmp_path / "model"), tokenizer_name=str(tmp_path / "tokenizer"))
    ours = load_tokenizer(named, RUN, load_config(named, RUN))
    assert ours("the river")["input_ids"] == [0, *make_tokenizer()("the river")["input_ids"]]
    with pytest.raises(UserError, match="meta-llama/Llama-2-7b-hf"):
        load_tokenizer(Model(str(tmp_path / "model")), RUN, config)
    with pytest.raises(UserError, match=r"folder or file \./nowhere does not exist\. Correct --tokenizer_name"):
        load_tokenizer(Model(str(tmp_path / "model"), tokenizer_name="./nowhere"), RUN, config)
    with pytest.raises(UserError, match="--revision v9 needs the hub"):
        load_config(Model("tiny", revision="v9"), RUN)
