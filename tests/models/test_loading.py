"""Models and adapters as real folders have them: read for what they are, or refused in a sentence with the cause."""

import json
import re
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    Gemma3Config,
    LlamaConfig,
    T5Config,
)

import lora_finetuning
from tests.conftest import make_tokenizer, run_in_process
from utils.hub import nearest
from utils.models.adapters import save_base_model
from utils.models.load import load_base_model, load_causal_lm, load_config, load_tokenizer, model_fingerprint
from utils.script import UserError
from utils.settings import Model, Run

CPU, RUN = torch.device("cpu"), Run()
NARROW = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BART = {
    "vocab_size": 300, "d_model": 32, "decoder_layers": 2, "encoder_layers": 3, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip


def save_model(folder, config, auto_class=AutoModelForCausalLM, seed=0):
    torch.manual_seed(seed)
    auto_class.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def gpt2(architecture="gpt2"):
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(architecture, vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)


@pytest.fixture
def llama(model_dirs, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(model_dirs["llama"], tmp_path / "llama")


def load(folder):
    """Everything that a script loads of a model."""
    settings = Model(str(folder))
    config = load_config(settings, RUN)
    return load_tokenizer(settings, RUN, config), load_base_model(settings, RUN, CPU)


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


DAMAGED = "has weights or settings that are damaged, cut short"
QUANTISATION = {"bitsandbytes": {"load_in_4bit": True}, "GPTQ": {"bits": 4}, "AWQ": {"bits": 4}}
DAMAGES = {
    "safetensors cut short": (lambda f: cut(f / "model.safetensors"), f"Model .*llama {DAMAGED}"),
    "bin cut short": (as_pickle, f"llama {DAMAGED}"),
    "pointer": (lambda f: pointer(f / "model.safetensors"), "llama has weights .* a pointer of git-lfs"),
    "pointer for tokens": (lambda f: pointer(f / "tokenizer.json"), "Tokenizer of .*llama .* a pointer of git-lfs"),
    "tokenizer": (lambda f: cut(f / "tokenizer.json"), f"Tokenizer of .*llama {DAMAGED}"),
    "config": (lambda f: cut(f / "config.json"), rf"llama {DAMAGED} .*config\.json"),
    "vocabulary": (
        lambda f: change_config(f, vocab_size=307),
        r"lm_head\.weight is \(300, 32\) in its files and \(307, 32\) by its config",
    ),
    **{
        method: (
            lambda f, method=method, settings=settings: change_config(
                f, quantization_config={"quant_method": method.lower(), **settings}
            ),
            f"needs a package that is not installed.*{method}",
        )
        for method, settings in QUANTISATION.items()
    },
    "rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        r"cannot be loaded, as with a wrong config\.json.*spiral",
    ),
    "rope in its older form": (
        lambda f: change_config(f, rope_scaling={"type": "spiral", "factor": 2.0}, rope_parameters=None), "spiral",
    ),
    "list": (lambda f: change_config(f, intermediate_size=[48, 48]), "llama cannot be .*intermediate_size"),
    "null": (lambda f: change_config(f, num_attention_heads=None), r"llama .*num_attention_heads"),
    "text": (lambda f: change_config(f, hidden_size="wide"), r"llama .*hidden_size"),
    "architecture": (lambda f: change_config(f, model_type="spiral"), "spiral"),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "Tokenizer of .* has no file that holds its vocabulary.*--tokenizer_name",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_loader_raises_becomes_a_sentence_with_the_cause(llama, damage):
    make, message = DAMAGES[damage]
    make(llama)
    with pytest.raises(UserError, match=message) as raised:
        load(llama)
    assert "\n" not in str(raised.value)


def test_the_traceback_is_shown_when_asked_for(llama, rows_path, tmp_path, monkeypatch, capsys):
    cut(llama / "model.safetensors")
    common = ["--model_name", llama, "--dataset_name", rows_path, "--results_dir", tmp_path, "--max_samples", 30]
    message = run_in_process(monkeypatch, "cache.py", *common)
    assert "damaged, cut short" in message and "Traceback" not in capsys.readouterr().err
    assert run_in_process(monkeypatch, "cache.py", *common, "--debug") == message
    assert "SafetensorError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "auto_class"),
    [
        (gpt2(), AutoModel),
        (LlamaConfig(vocab_size=300, hidden_size=32, tie_word_embeddings=False, **NARROW), AutoModel),
        (BertConfig(vocab_size=300, hidden_size=32, is_decoder=True, **NARROW), AutoModelForCausalLM),
        (BartConfig(**BART, is_decoder=True, is_encoder_decoder=False), AutoModelForCausalLM),
    ],
    ids=["saved without its head", "without a head of its own", "bert decoder", "bart decoder"],
)
def test_a_decoder_is_read_whatever_class_saved_it(tmp_path, config, auto_class):
    _, decoder = load(save_model(tmp_path / "saved", config, auto_class))
    stored = list(load_file(tmp_path / "saved" / "model.safetensors").values())
    for name, parameter in decoder.named_parameters():
        assert any(torch.equal(parameter, tensor) for tensor in stored if tensor.shape == parameter.shape), name


@pytest.mark.parametrize(
    ("config", "auto_class", "message"),
    [
        (BartConfig(**BART), AutoModel, "bart. is an encoder-decoder"),
        (T5Config(vocab_size=300, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8), AutoModel, "t5. is an enc"),
        (
            AutoConfig.for_model("distilbert", vocab_size=300, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
            AutoModel,
            "distilbert. is not a causal LM",
        ),
    ],
    ids=["bart", "t5", "distilbert"],
)
def test_what_is_no_decoder_is_refused_by_its_configuration(tmp_path, config, auto_class, message):
    with pytest.raises(UserError, match=message):
        load(save_model(tmp_path / "saved", config, auto_class))


def test_of_a_multi_modal_model_the_text_decoder_is_read(tmp_path):
    text = {"vocab_size": 300, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8, **NARROW}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Gemma3Config(
        text_config={**text, "max_position_embeddings": 64}, vision_config={**vision, "image_size": 28}
    )
    folder = save_model(tmp_path / "gemma3", config, AutoModelForImageTextToText)
    assert load_config(Model(str(folder)), RUN).max_position_embeddings == 64
    _, decoder = load(folder)
    assert decoder.config.hidden_size == 32
    assert torch.equal(
        decoder.embed_tokens.weight,
        next(v for k, v in load_file(folder / "model.safetensors").items() if k.endswith("embed_tokens.weight")),
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("distilgpt2", "cannot be reached"),
        ("tinny", "cannot be reached.*Did you mean tiny"),
        ("./nowhere", "There is no folder ./nowhere"),
    ],
)
def test_the_hub_decides_about_a_name_and_before_the_data_are_read(name, message, tmp_path, monkeypatch):
    for script in ("cache.py", "linear_sklearn.py", "linear_training.py", "lora_finetuning.py", "from_scratch.py"):
        arguments = ["--model_name", name, "--dataset_name", tmp_path / "no_such.csv", "--results_dir", tmp_path]
        assert re.search(message, str(run_in_process(monkeypatch, script, *arguments)))
    assert nearest(name, [name]) == ""  # no name is suggested for itself


# ------------------------------------------------------------------ adapters
def states(model):
    input_ids = torch.arange(1, 10)[None]
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).last_hidden_state


def adapted_states(folder, adapter):
    return states(load_base_model(Model(str(folder), adapter_dir=adapter), RUN, CPU))


def save_adapter(place, model, **settings):
    """A foreign adapter, as PEFT saves it, and its model."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model.eval(), LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    peft_model.save_pretrained(place)
    return peft_model


def save_our_adapter(place, folder, **settings):
    """An adapter as lora_finetuning.py makes and saves it, with weights as after a training."""
    config = lora_finetuning.Config(model=Model(str(folder)), **settings)
    peft_model = lora_finetuning.add_adapter(load_causal_lm(config.model, RUN, CPU), config).eval()
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    peft_model.save_pretrained(str(place), save_embedding_layers=False)
    save_base_model(place, peft_model, config.model.model_name, model_fingerprint(config.model, RUN))
    return peft_model


def test_an_adapter_of_the_bare_model_is_applied(llama, tmp_path):
    peft_model = save_adapter(tmp_path / "bare", AutoModel.from_pretrained(llama), target_modules=["q_proj"])
    expected = states(peft_model)
    torch.testing.assert_close(adapted_states(llama, tmp_path / "bare"), expected, rtol=0, atol=1e-5)
    assert (expected - states(load_base_model(Model(str(llama)), RUN, CPU))).abs().max() > 1e-2


SOME = {"target_modules": ["q_proj", "v_proj"]}
RANDOM = {**SOME, "r": 4, "init_weights": False}
KINDS = {
    "rank-stabilised": peft.LoraConfig(**SOME, r=4, use_rslora=True),
    "dora": peft.LoraConfig(**SOME, r=4, use_dora=True),
    "embeddings": peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4),
    "saved head": peft.LoraConfig(**SOME, r=4, modules_to_save=["lm_head"]),
    "patterns": peft.LoraConfig(**SOME, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "one layer": peft.LoraConfig(**SOME, r=4, layers_to_transform=[1]),
    "adalora": peft.AdaLoraConfig(**SOME, r=4, total_step=10),
    "loha": peft.LoHaConfig(**RANDOM),
    "lokr": peft.LoKrConfig(**RANDOM),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(**SOME, oft_block_size=8),
    "boft": peft.BOFTConfig(**SOME, boft_block_size=8),
    "vera": peft.VeraConfig(target_modules=["q_proj", "o_proj"], init_weights=False),
    "hra": peft.HRAConfig(**RANDOM),
    "fourier": peft.FourierFTConfig(**SOME, n_frequency=20),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_of_any_kind_gives_the_states_of_the_live_one(llama, kind, tmp_path):
    torch.manual_seed(1)
    live = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), KINDS[kind]).eval()
    plain = states(load_base_model(Model(str(llama)), RUN, CPU))
    with torch.no_grad():
        for parameter in (parameter for parameter in live.parameters() if parameter.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    live.save_pretrained(tmp_path)
    expected = states(live.get_base_model().model)
    assert (adapted_states(llama, tmp_path) - expected).norm() < 1e-6 * expected.norm()
    assert (plain - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_an_adapter_trained_for_classification_is_applied_without_its_head(llama, task, tmp_path, capsys):
    """PEFT saves the head of a classifier beside the LoRA weights of the decoder."""
    auto_class = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
    classifier = auto_class.from_pretrained(llama, num_labels=3)
    classifier.config.pad_token_id = 0
    peft_model = save_adapter(tmp_path / "adapter", classifier, target_modules=["q_proj", "v_proj"], task_type=task)
    assert any("score" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    expected = states(peft_model.get_base_model().model)
    torch.testing.assert_close(adapted_states(llama, tmp_path / "adapter"), expected, rtol=0, atol=1e-5)
    assert "is left out (score)" in capsys.readouterr().out
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if "score" in name}, path)
    with pytest.raises(UserError, match="changes its head only"):
        adapted_states(llama, tmp_path / "adapter")
    save_file(weights, path)
    assert (expected - states(load_base_model(Model(str(llama)), RUN, CPU))).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["gpt2", "openai-gpt"])
def test_projections_as_conv1d_are_adapted(architecture, tmp_path):
    folder = save_model(tmp_path / "model", gpt2(architecture))
    with pytest.raises(UserError, match="c_attn, c_fc, c_proj"):
        save_our_adapter(tmp_path / "adapter", folder)
    peft_model = save_our_adapter(tmp_path / "adapter", folder, target_modules=("c_attn",))
    expected = states(peft_model.get_base_model().transformer)
    torch.testing.assert_close(adapted_states(folder, tmp_path / "adapter"), expected, rtol=0, atol=1e-5)
    assert (expected - states(load_base_model(Model(str(folder)), RUN, CPU))).abs().max() > 1e-2


def test_an_adapter_knows_its_model_in_any_copy(llama, tmp_path):
    save_our_adapter(tmp_path / "adapter", llama)
    expected = adapted_states(llama, tmp_path / "adapter")
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    (copy / "tokenizer.json").unlink()
    assert torch.equal(adapted_states(copy, tmp_path / "adapter"), expected)
    save_model(tmp_path / "other", AutoConfig.from_pretrained(llama), seed=9)
    with pytest.raises(UserError, match=r"was made for .*llama, or for other weights of that name, not for .*other"):
        adapted_states(tmp_path / "other", tmp_path / "adapter")


def wide():
    return LlamaConfig(**{**NARROW, "num_hidden_layers": 3}, vocab_size=300, hidden_size=64, max_position_embeddings=64)


def test_a_foreign_adapter_of_another_model_is_refused(llama, tmp_path):
    save_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(llama), target_modules=["q_proj"])
    save_model(tmp_path / "other", AutoConfig.from_pretrained(llama), seed=9)
    with pytest.raises(UserError, match=r"was made for .*llama, or .* not for .*other"):
        adapted_states(tmp_path / "other", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"was made for .*llama, or .* not for .*gpt2"):
        adapted_states(save_model(tmp_path / "gpt2", gpt2()), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"does not fit .*wide: .*size mismatch"):
        adapted_states(save_model(tmp_path / "wide", wide()), tmp_path / "adapter")


def test_every_weight_of_an_adapter_is_used_or_it_is_refused(llama, tmp_path):
    causal_lm = AutoModelForCausalLM.from_pretrained(llama)
    save_adapter(tmp_path / "adapter", causal_lm, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != first}, path)
    with pytest.raises(UserError, match=r"does not fit .* it lacks .*lora_A"):
        adapted_states(llama, tmp_path / "adapter")
    save_file(weights | {first.replace("q_proj", "k_proj"): weights[first].clone()}, path)
    with pytest.raises(UserError, match=r"does not fit .* it has .*k_proj.*, which is not used"):
        adapted_states(llama, tmp_path / "adapter")
    cut(path)
    with pytest.raises(UserError, match="adapter cannot be read: SafetensorError"):
        adapted_states(llama, tmp_path / "adapter")


def test_adapters_that_change_no_state_are_refused(llama, tmp_path):
    save_adapter(tmp_path / "head", AutoModelForCausalLM.from_pretrained(llama), target_modules=["lm_head"])
    with pytest.raises(UserError, match="changes lm_head only"):
        adapted_states(llama, tmp_path / "head")
    with pytest.raises(UserError, match=r"has no lm_head\. Choose --target_modules among .*q_proj"):
        save_our_adapter(tmp_path / "adapter", llama, target_modules=("lm_head",))
    prompt = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="PROMPT_TUNING: it adds tokens"):
        adapted_states(llama, tmp_path / "prompt")
