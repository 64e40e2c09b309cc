"""Models and adapters in realistic folders: read correctly, or refused in a sentence with the cause."""

import json
import re
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
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
NARROW = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW |= {"intermediate_size": 48, "max_position_embeddings": 64}
BART = BartConfig(
    vocab_size=300, d_model=32, decoder_layers=2, encoder_layers=3, decoder_attention_heads=4,
    encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip
T5 = T5Config(vocab_size=300, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8)
DISTILBERT = AutoConfig.for_model("distilbert", vocab_size=300, dim=32, n_layers=2, n_heads=4, hidden_dim=48)


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
    """Loads all parts of a model that a script loads."""
    settings = Model(str(folder))
    config = load_config(settings, RUN)
    return load_tokenizer(settings, RUN, config), load_base_model(settings, RUN, CPU)


def change_config(**settings):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def spiral(**rope):
    return change_config(**rope), r"cannot be loaded, as with a wrong config\.json.*spiral"


DAMAGED = "has weights or settings that are damaged, cut short"
NO_PACKAGE = "needs a package that is not installed.*"
DAMAGES = {
    "safetensors cut short": (lambda f: cut(f / "model.safetensors"), f"Model .*llama {DAMAGED}"),
    "bin cut short": (as_pickle, f"llama {DAMAGED}"),
    "pointer": (lambda f: pointer(f / "model.safetensors"), "llama has weights .* a pointer of git-lfs"),
    "pointer for tokens": (lambda f: pointer(f / "tokenizer.json"), "Tokenizer of .*llama .* a pointer of git-lfs"),
    "config": (lambda f: cut(f / "config.json"), rf"llama {DAMAGED} .*config\.json"),
    "vocabulary": (
        change_config(vocab_size=307), r"lm_head\.weight is \(300, 32\) in its files and \(307, 32\) by its config",
    ),
    "GPTQ": (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), f"{NO_PACKAGE}GPTQ"),
    "bits": (
        change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        f"{NO_PACKAGE}bitsandbytes",
    ),
    "rope": spiral(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    "rope in its older form": spiral(rope_scaling={"type": "spiral", "factor": 2.0}, rope_parameters=None),
    "list": (change_config(intermediate_size=[48, 48]), "llama cannot be .*intermediate_size"),
    "null": (change_config(num_attention_heads=None), r"llama .*num_attention_heads"),
    "text": (change_config(hidden_size="wide"), r"llama .*hidden_size"),
    "architecture": (change_config(model_type="spiral"), "spiral"),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "Tokenizer of .* has no file that holds its vocabulary.*--tokenizer_name",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"No model in .*llama: it holds no config\.json"),
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
        (LlamaConfig(**NARROW, tie_word_embeddings=False), AutoModel),
        (BertConfig(**NARROW, is_decoder=True), AutoModelForCausalLM),
        (BartConfig(**{**BART.to_dict(), "is_decoder": True, "is_encoder_decoder": False}), AutoModelForCausalLM),
    ],
    ids=["saved without its head", "without a head of its own", "bert decoder", "bart decoder"],
)
def test_a_decoder_is_read_whatever_class_saved_it(tmp_path, config, auto_class):
    _, decoder = load(save_model(tmp_path / "saved", config, auto_class))
    stored = list(load_file(tmp_path / "saved" / "model.safetensors").values())
    for name, parameter in decoder.named_parameters():
        assert any(torch.equal(parameter, tensor) for tensor in stored if tensor.shape == parameter.shape), name


@pytest.mark.parametrize(
    ("config", "message"), [(BART, "is an encoder-dec"), (T5, "is an encoder-dec"), (DISTILBERT, "is not a causal LM")]
)
def test_what_is_no_decoder_is_refused_by_its_configuration(tmp_path, config, message):
    with pytest.raises(UserError, match=rf"{config.model_type}\) {message}"):
        load(save_model(tmp_path / "saved", config, AutoModel))


def test_of_a_multi_modal_model_the_text_decoder_is_read(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**NARROW, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28})
    folder = save_model(tmp_path / "gemma3", config, AutoModelForImageTextToText)
    assert load_config(Model(str(folder)), RUN).max_position_embeddings == 64
    _, decoder = load(folder)
    stored = load_file(folder / "model.safetensors")
    [embeddings] = [weight for name, weight in stored.items() if name.endswith("embed_tokens.weight")]
    assert decoder.config.hidden_size == 32 and torch.equal(decoder.embed_tokens.weight, embeddings)


@pytest.mark.parametrize(
    ("name", "message"),
    [("tinny", "cannot be reached.*Did you mean tiny"), ("./nowhere", "The folder ./nowhere does not exist")],
)
def test_the_hub_decides_about_a_name_and_before_the_data_are_read(name, message, tmp_path, monkeypatch):
    for script in ("cache.py", "linear_sklearn.py", "linear_training.py", "lora_finetuning.py", "from_scratch.py"):
        arguments = ["--model_name", name, "--dataset_name", tmp_path / "no_such.csv", "--results_dir", tmp_path]
        assert re.search(message, str(run_in_process(monkeypatch, script, *arguments)))
    assert nearest(name, [name]) == ""  # no name is suggested for itself


# ------------------------------------------------------------------ adapters
def states(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 10)[None], use_cache=False).last_hidden_state


def adapted_states(folder, adapter=None):
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
    with torch.no_grad():
        for parameter in (parameter for parameter in live.parameters() if parameter.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    live.save_pretrained(tmp_path)
    expected = states(live.get_base_model().model)
    assert (adapted_states(llama, tmp_path) - expected).norm() < 1e-6 * expected.norm()
    assert (adapted_states(llama) - expected).norm() > 1e-3 * expected.norm()


CLASSIFIERS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


@pytest.mark.parametrize("task", [None, *CLASSIFIERS])
def test_an_adapter_of_the_bare_model_or_of_a_classifier_is_applied_without_its_head(llama, task, tmp_path, capsys):
    """PEFT saves the head of a classifier beside the LoRA weights of the decoder."""
    model = CLASSIFIERS[task].from_pretrained(llama, num_labels=3) if task else AutoModel.from_pretrained(llama)
    model.config.pad_token_id = 0
    peft_model = save_adapter(tmp_path / "adapter", model, **SOME, task_type=task)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    assert any("score" in name for name in weights) == bool(task)
    base = peft_model.get_base_model()
    expected = states(base.model if task else base)
    torch.testing.assert_close(adapted_states(llama, tmp_path / "adapter"), expected, rtol=0, atol=1e-5)
    assert ("is left out (score)" in capsys.readouterr().out) == bool(task)
    assert (expected - adapted_states(llama)).abs().max() > 1e-2
    if task:
        save_file({name: weight for name, weight in weights.items() if "score" in name}, path)
        with pytest.raises(UserError, match="changes its head only"):
            adapted_states(llama, tmp_path / "adapter")


@pytest.mark.parametrize("architecture", ["gpt2", "openai-gpt"])
def test_projections_as_conv1d_are_adapted(architecture, tmp_path):
    folder = save_model(tmp_path / "model", gpt2(architecture))
    with pytest.raises(UserError, match="c_attn, c_fc, c_proj"):
        save_our_adapter(tmp_path / "adapter", folder)
    peft_model = save_our_adapter(tmp_path / "adapter", folder, target_modules=("c_attn",))
    expected = states(peft_model.get_base_model().transformer)
    torch.testing.assert_close(adapted_states(folder, tmp_path / "adapter"), expected, rtol=0, atol=1e-5)
    assert (expected - adapted_states(folder)).abs().max() > 1e-2


def test_an_adapter_is_for_its_model_in_any_copy_and_for_no_other(llama, tmp_path):
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    save_our_adapter(ours, llama)
    save_adapter(foreign, AutoModelForCausalLM.from_pretrained(llama), target_modules=["q_proj"])
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    (copy / "tokenizer.json").unlink()
    assert torch.equal(adapted_states(copy, ours), adapted_states(llama, ours))
    save_model(tmp_path / "other", AutoConfig.from_pretrained(llama), seed=9)
    save_model(tmp_path / "gpt2", gpt2())
    for adapter, model in ((ours, "other"), (foreign, "other"), (foreign, "gpt2")):
        message = rf"was made for .*llama, or for other weights of that name, not for .*{model}"
        with pytest.raises(UserError, match=message):
            adapted_states(tmp_path / model, adapter)
    path = foreign / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    save_model(tmp_path / "wide", LlamaConfig(**NARROW | {"num_hidden_layers": 3, "hidden_size": 64}))
    with pytest.raises(UserError, match=r"does not fit .*wide: .*size mismatch"):
        adapted_states(tmp_path / "wide", foreign)
    with pytest.raises(UserError, match=r"does not fit .*gpt2"):
        adapted_states(tmp_path / "gpt2", foreign)


def test_every_weight_of_an_adapter_is_used_or_it_is_refused(llama, tmp_path):
    save_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(llama), target_modules=["q_proj"])
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
    prompt = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="PROMPT_TUNING: it adds tokens"):
        adapted_states(llama, tmp_path / "prompt")
    answers = AutoModelForQuestionAnswering.from_pretrained(llama)  # it names its decoder as no causal LM does
    save_adapter(tmp_path / "answers", answers, target_modules=["q_proj"])
    with pytest.raises(UserError, match="it changes transformer of another architecture"):
        adapted_states(llama, tmp_path / "answers")
    (tmp_path / "head" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"No adapter at .*head: it needs"):
        adapted_states(llama, tmp_path / "head")
