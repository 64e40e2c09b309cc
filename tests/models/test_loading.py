"""Models and adapters in realistic folders: read correctly, or refused in a sentence with the cause."""

import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lora_finetuning
from tests.conftest import make_tokenizer, run_in_process
from tests.models.small import small_config
from utils.hub import nearest
from utils.models.load import load_base_model, load_config, load_tokenizer
from utils.script import UserError
from utils.settings import Model, Run

CPU, RUN = torch.device("cpu"), Run()
BART, GPT2, DISTILBERT = (small_config(name) for name in ("bart", "gpt2", "distilbert"))
ENCODER = {"encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
WHOLE_BART = small_config("bart", is_decoder=False, is_encoder_decoder=True, **ENCODER)


def save_model(folder, config, auto_class=AutoModelForCausalLM, seed=0):
    torch.manual_seed(seed)
    auto_class.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


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
    def change(folder, name="config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGED = "has weights or settings that are damaged, cut short"
DAMAGES = {
    "safetensors cut short": (lambda f: cut(f / "model.safetensors"), f"Model .*llama {DAMAGED}"),
    "a weight is missing": (without_a_weight, r"lacks 1 weights, such as model\.layers\.1\.self_attn\.q_proj\.weight"),
    "config": (lambda f: cut(f / "config.json"), rf"llama {DAMAGED} .*config\.json"),
    "vocabulary": (change_config(vocab_size=307),
                   r"lm_head\.weight is \(300, 32\) in its files and \(307, 32\) by its config"),
    "GPTQ": (change_config(quantization_config={"quant_method": "gptq", "bits": 4}),
             "needs a package that is not installed.*GPTQ"),
    "rope": (change_config(rope_scaling={"type": "spiral", "factor": 2.0}, rope_parameters=None),
             r"cannot be loaded, as with a wrong config\.json.*spiral"),
    "list": (change_config(intermediate_size=[48, 48]), "llama cannot be .*intermediate_size"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")],
                     "Tokenizer of .* has no file that holds its vocabulary.*--tokenizer_name"),
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


@pytest.mark.parametrize(
    ("config", "auto_class"),
    [(GPT2, AutoModel), (BART, AutoModelForCausalLM)],
    ids=["saved without its head", "bart decoder"],
)
def test_a_decoder_is_read_whatever_class_saved_it(tmp_path, config, auto_class):
    _, decoder = load(save_model(tmp_path / "saved", config, auto_class))
    stored = list(load_file(tmp_path / "saved" / "model.safetensors").values())
    for name, parameter in decoder.named_parameters():
        assert any(torch.equal(parameter, tensor) for tensor in stored if tensor.shape == parameter.shape), name
    assert decoder.dtype == torch.float32 and not decoder.training
    assert load_base_model(Model(str(tmp_path / "saved"), dtype="bfloat16"), RUN, CPU).dtype == torch.bfloat16


@pytest.mark.parametrize(("config", "message"), [(WHOLE_BART, "is an encoder-dec"), (DISTILBERT, "is not a causal LM")])
def test_what_is_no_decoder_is_refused_by_its_configuration(tmp_path, config, message):
    with pytest.raises(UserError, match=rf"{config.model_type}\) {message}"):
        load(save_model(tmp_path / "saved", config, AutoModel))


def test_of_a_multi_modal_model_the_text_decoder_is_read(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision["image_size"] = 28
    config = transformers.Gemma3Config(text_config=small_config("gemma3_text"), vision_config=vision)
    folder = save_model(tmp_path / "gemma3", config, transformers.AutoModelForImageTextToText)
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
    for script in ("cache.py", "linear_training.py", "lora_finetuning.py", "from_scratch.py"):
        arguments = ["--model_name", name, "--dataset_name", tmp_path / "no_such.csv", "--results_dir", tmp_path]
        assert re.search(message, str(run_in_process(monkeypatch, script, *arguments)))
    assert nearest(name, [name]) == ""  # no name is suggested for itself


# ------------------------------------------------------------------ adapters
def states(decoder):
    with torch.no_grad():
        return decoder(input_ids=torch.arange(1, 10)[None], use_cache=False).last_hidden_state


def adapted_states(folder, adapter=None):
    return states(load_base_model(Model(str(folder), adapter_dir=adapter), RUN, CPU))


def save_adapter(place, model, config=None, **settings):
    """A foreign adapter with weights as after a training, as PEFT saves it; gives the PEFT model."""
    torch.manual_seed(1)
    live = get_peft_model(model.eval(), config or peft.LoraConfig(r=4, **settings)).eval()
    with torch.no_grad():
        for parameter in (parameter for parameter in live.parameters() if parameter.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    live.save_pretrained(place)
    return live


def save_our_adapter(place, folder, **settings):
    """An adapter as lora_finetuning.py saves it, in `place`/adapter, with weights as after a training."""
    decoder, save = lora_finetuning.build(lora_finetuning.Config(model=Model(str(folder)), **settings))
    torch.manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    save(place)
    return decoder.eval()


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
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_of_any_kind_gives_the_states_of_the_live_one(llama, kind, tmp_path):
    live = save_adapter(tmp_path, AutoModelForCausalLM.from_pretrained(llama), KINDS[kind])
    expected = states(live.get_base_model().model)
    assert (adapted_states(llama, tmp_path) - expected).norm() < 1e-6 * expected.norm()
    assert (adapted_states(llama) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", ["bare", "classifier", "conv1d"])
def test_adapters_of_the_bare_model_of_a_classifier_and_of_conv1d_are_applied(llama, kind, tmp_path, capsys):
    """PEFT saves the head of a classifier beside the LoRA weights of the decoder; the head is left out."""
    folder, adapter = llama, tmp_path
    if kind == "bare":
        expected = states(save_adapter(adapter, AutoModel.from_pretrained(folder), **SOME).get_base_model())
    elif kind == "classifier":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        expected = states(save_adapter(adapter, model, **SOME, task_type="SEQ_CLS").get_base_model().model)
    else:
        folder, adapter = save_model(tmp_path / "model", GPT2), tmp_path / "adapter"
        with pytest.raises(UserError, match="c_attn, c_fc, c_proj"):
            save_our_adapter(tmp_path, folder)
        expected = states(save_our_adapter(tmp_path, folder, target_modules=("c_attn",)))
    torch.testing.assert_close(adapted_states(folder, adapter), expected, rtol=0, atol=1e-5)
    assert ("is left out (classifier, score)" in capsys.readouterr().out) == (kind == "classifier")
    assert (expected - adapted_states(folder)).abs().max() > 1e-3


def test_an_adapter_is_for_its_model_in_any_copy_and_for_no_other(llama, tmp_path):
    ours, foreign = tmp_path / "adapter", tmp_path / "foreign"
    save_our_adapter(tmp_path, llama)
    save_adapter(foreign, AutoModelForCausalLM.from_pretrained(llama), target_modules=["q_proj"])
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    for adapter in (ours, foreign):
        assert torch.equal(adapted_states(copy, adapter), adapted_states(llama, adapter))
    save_model(tmp_path / "other", AutoConfig.from_pretrained(llama), seed=9)
    save_model(tmp_path / "gpt2", GPT2)
    for adapter, model in ((ours, "other"), (foreign, "other"), (foreign, "gpt2")):
        message = rf"was made for .*llama, or other weights of that name, not for .*{model}"
        with pytest.raises(UserError, match=message):
            adapted_states(tmp_path / model, adapter)
    change_config(base_model_name_or_path=None)(foreign, "adapter_config.json")
    save_model(tmp_path / "wide", small_config("llama", num_hidden_layers=3, hidden_size=64))
    for model, message in (("wide", "size mismatch"), ("gpt2", "it changes model, not the decoder")):
        with pytest.raises(UserError, match=rf"does not fit .*{model}: .*{message}"):
            adapted_states(tmp_path / model, foreign)


def test_every_weight_of_an_adapter_is_used_or_it_is_refused(llama, tmp_path):
    save_adapter(tmp_path, AutoModelForCausalLM.from_pretrained(llama), target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != first}, path)
    with pytest.raises(UserError, match=r"does not fit .* it lacks .*lora_A"):
        adapted_states(llama, tmp_path)
    save_file(weights | {first.replace("q_proj", "k_proj"): weights[first].clone()}, path)
    with pytest.raises(UserError, match=r"does not fit .* it has .*k_proj.*, which is not used"):
        adapted_states(llama, tmp_path)
    cut(path)
    for damage in (lambda: None, path.unlink):
        damage()
        with pytest.raises(UserError, match=r"No adapter can be read from .*Make one: python lora_finetuning\.py"):
            adapted_states(llama, tmp_path)


UNFIT = {"lm_head": peft.LoraConfig(target_modules=["lm_head"]),
         "prompt_embeddings": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")}  # fmt: skip


@pytest.mark.parametrize("part", UNFIT)
def test_adapters_that_change_no_weight_of_the_decoder_are_refused(llama, part, tmp_path):
    save_adapter(tmp_path, AutoModelForCausalLM.from_pretrained(llama), UNFIT[part])
    with pytest.raises(UserError, match=f"it changes {part}, not the decoder"):
        adapted_states(llama, tmp_path)
