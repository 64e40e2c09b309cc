"""OpenELM against the numbers of the published code, and through every door by which a model comes in or goes out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from utils.models.openelm import (
    OpenELMConfig,
    OpenELMForCausalLM,
    OpenELMModel,
    OpenELMRMSNorm,
    apply_rotary,
    rotary_tables,
)

DATA = Path(__file__).parent.parent / "data"
GOLDEN = json.loads((DATA / "openelm_golden.json").read_text(encoding="utf-8"))
TENSORS = load_file(DATA / "openelm_golden.safetensors")
CASES = list(GOLDEN["cases"])
SIZES = list(GOLDEN["sizes"])


def relative_error(got: Tensor, expected: Tensor, valid: Tensor | None = None) -> float:
    """Largest absolute difference over largest absolute value, over the valid positions (b, t)."""
    if valid is not None:
        got, expected = got[valid], expected[valid]
    return ((got - expected).abs().max() / expected.abs().max()).item()


def golden(case: str, name: str) -> Tensor:
    return TENSORS[f"{case}.{name}"]


def batch(case: str) -> dict[str, Tensor]:
    return {"input_ids": golden(case, "input_ids"), "attention_mask": golden(case, "attention_mask")}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens, over the labels that are not -100."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small a second thread costs more than it brings, ten times more on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory) -> Path:
    """A folder like a published one: config.json with `auto_map`, weights, no code."""
    folder = tmp_path_factory.mktemp(f"openelm_{case}")
    config = GOLDEN["cases"][case]["config"]
    assert "auto_map" in config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    prefix = f"{case}.param."
    weights = {name.removeprefix(prefix): tensor for name, tensor in TENSORS.items() if name.startswith(prefix)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(checkpoint: Path, auto_class=AutoModelForCausalLM, **kwargs):
    """The model, after checking that the file and the model have the same parameters."""
    kwargs = {"dtype": torch.float32, "trust_remote_code": False, **kwargs}
    model, info = auto_class.from_pretrained(checkpoint, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


# ------------------------------------------------------------------ the published numbers
def test_golden(case, checkpoint):
    model = load(checkpoint)
    valid = golden(case, "attention_mask").bool()
    output = model(**batch(case), output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for layer, states in enumerate(output.hidden_states):
        assert relative_error(states, golden(case, f"hidden_states.{layer}"), valid) < 1e-5, layer
    assert relative_error(output.logits, golden(case, "logits"), valid) < 1e-5

    expected = GOLDEN["cases"][case]
    loss = next_token_loss(output.logits, golden(case, "labels"))
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_rms_norm_golden():
    norm = OpenELMRMSNorm(64)
    for dtype, tolerance in (("f32", 1e-6), ("bf16", 0)):
        x, weight, y = (TENSORS[f"unit.rmsnorm.{name}_{dtype}"] for name in ("x", "weight", "y"))
        norm.weight = torch.nn.Parameter(weight)
        torch.testing.assert_close(norm(x).detach(), y, rtol=tolerance, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_tables_golden(head_dim):
    positions = torch.tensor(GOLDEN["unit"]["rope_positions"])
    cos, sin = rotary_tables(positions[None], head_dim, GOLDEN["unit"]["rope_theta"])
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, len(positions), 1, head_dim // 2)
    # beyond position 31 the position magnifies the last bit of a frequency
    tolerance = torch.where(positions <= 31, 1e-6, 5e-4)[:, None]
    for got, name in ((cos, "cos"), (sin, "sin")):
        expected = TENSORS[f"unit.rope.{name}_{head_dim}"]
        assert ((torch.cat((got, got), -1)[0, :, 0] - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("name", ["q", "k"])
def test_apply_rotary_golden(name):
    x = TENSORS[f"unit.rope.{name}"].transpose(1, 2)
    tables = rotary_tables(torch.arange(x.shape[1])[None], x.shape[-1], GOLDEN["unit"]["rope_theta"])
    assert relative_error(apply_rotary(x, *tables).transpose(1, 2), TENSORS[f"unit.rope.{name}_out"]) < 1e-6
    rounded = apply_rotary(x.bfloat16(), *tables).transpose(1, 2).bfloat16()
    torch.testing.assert_close(rounded, TENSORS[f"unit.rope.{name}_out_bf16"])


# ------------------------------------------------------------------ configuration and sizes
def published_config(size: str, **changes) -> OpenELMConfig:
    names = ("model_dim", "num_transformer_layers", "head_dim", "num_gqa_groups", "qkv_multipliers", "ffn_multipliers")
    fields = {name: GOLDEN["sizes"][size][name] for name in names}
    return OpenELMConfig(**fields, normalize_qk_projections=True, share_input_output_layers=True, **changes)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    expected = GOLDEN["sizes"][size]
    config = published_config(size)
    assert config.num_query_heads == expected["num_query_heads"]
    assert config.num_kv_heads == expected["num_kv_heads"]
    assert [width for _, _, width in config.layer_sizes()] == expected["ffn_intermediate"]
    config.ffn_multipliers = expected["ffn_multipliers_range"]
    assert [width for _, _, width in config.layer_sizes()] == expected["ffn_intermediate"]

    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["num_parameters"]
    assert len(model.transformer.state_dict()) == 8 * config.num_hidden_layers + 2


def test_library_names():
    config = published_config("OpenELM-270M")
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (1280, 16, 2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_act) == (20, 5, "swish")
    assert config.tie_word_embeddings is True
    library_names: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    by_library_name = OpenELMConfig(**library_names)
    assert (by_library_name.model_dim, by_library_name.num_query_heads) == (256, [4, 4])


def test_configuration_file_round_trip(case, checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    assert type(config) is OpenELMConfig
    published = GOLDEN["cases"][case]["config"]
    assert config.dtype == torch.float32
    for name in published.keys() - {"torch_dtype", "transformers_version"}:
        assert getattr(config, name) == published[name], name
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    again.name_or_path = config.name_or_path
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_heads": [20] * 16}, "num_query_heads is .*Leave num_query_heads out"),
        ({"num_kv_heads": [3]}, "num_kv_heads is"),
        ({"num_transformer_layers": 4}, "ffn_multipliers has 16 entries"),
    ],
)
def test_contradictory_configuration_is_refused(changes, message):
    fields = {**published_config("OpenELM-270M").to_dict(), "num_query_heads": None, "num_kv_heads": None, **changes}
    with pytest.raises(ValueError, match=message):
        OpenELMConfig(**fields)


def test_initialisation_from_scratch():
    config = OpenELMConfig(vocab_size=500, model_dim=256, head_dim=32, num_transformer_layers=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, OpenELMForCausalLM) and model.dtype == torch.float32
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        # the residual stream gets 2 layers contributions
        expected = 256**-0.5 * (4**-0.5 if "out_proj" in name or "proj_2" in name else 1)
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name


# ------------------------------------------------------------------ loading and saving
def test_meta_device_loading_equals_direct_construction(case, checkpoint):
    direct = OpenELMForCausalLM(OpenELMConfig(**GOLDEN["cases"][case]["config"])).eval()
    incompatible = direct.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == (["lm_head.weight"], [])  # tied
    # twice, because memory that nobody initialised differs from time to time
    for _ in range(2):
        loaded = load(checkpoint)
        assert not list(loaded.buffers())
        assert torch.equal(loaded(**batch(case)).logits, direct(**batch(case)).logits)


def test_auto_model_gives_the_base_model(case, checkpoint):
    model, base = load(checkpoint), load(checkpoint, AutoModel)
    assert type(model) is OpenELMForCausalLM and type(base) is OpenELMModel
    assert model.base_model is model.transformer
    assert model.get_input_embeddings() is model.transformer.token_embeddings
    expected = model.transformer(**batch(case), output_hidden_states=True)
    output = base(**batch(case), output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.hidden_states[0], base.token_embeddings(golden(case, "input_ids")))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_round_trip(case, checkpoint, tmp_path):
    model = load(checkpoint)
    model.save_pretrained(tmp_path)
    saved, published = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    assert torch.equal(load(tmp_path)(**batch(case)).logits, model(**batch(case)).logits)


def test_untied_and_ungated_variants(tmp_path):
    """Never published, but the configuration file can say so."""
    sizes: dict[str, Any] = {"vocab_size": 50, "model_dim": 32, "head_dim": 8, "num_transformer_layers": 1}
    model = OpenELMForCausalLM(OpenELMConfig(**sizes, ffn_with_glu=False)).eval()
    assert not torch.equal(model.lm_head.weight, model.transformer.token_embeddings.weight)
    assert model.transformer.layers[0].ffn.proj_1.weight.shape == (256, 32)
    assert not any("q_norm" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    input_ids = torch.arange(6)[None]
    assert torch.equal(load(tmp_path)(input_ids).logits, model(input_ids).logits)


# ------------------------------------------------------------------ padding
def test_padding_and_company_change_nothing(case, checkpoint):
    model = load(checkpoint, AutoModel)
    input_ids, mask = golden(case, "input_ids"), golden(case, "attention_mask")
    masked = model(input_ids, attention_mask=mask).last_hidden_state
    bare = model(torch.where(mask.bool(), input_ids, 7)).last_hidden_state
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(input_ids[row : row + 1, :length]).last_hidden_state[0]
        for states in (masked[row, :length], bare[row, :length]):
            assert relative_error(states, alone) < 1e-5
    with pytest.raises(ValueError, match="padded on the right"):
        model(input_ids, attention_mask=mask.flip(1))


# ------------------------------------------------------------------ training and precision
def test_gradient_checkpointing_gives_equal_gradients(case, checkpoint):
    gradients = []
    for forwards in (1, 2):  # a checkpointed layer runs again in the backward pass
        model = load(checkpoint).train()
        calls: list[int] = []
        model.transformer.layers[0].attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        if forwards == 2:
            model.activation_checkpointing_enable()
        next_token_loss(model(**batch(case)).logits, golden(case, "labels")).backward()
        assert len(calls) == forwards
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_lora_on_qkv_proj(case, checkpoint):
    torch.manual_seed(0)
    model = get_peft_model(load(checkpoint), LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False))
    next_token_loss(model(**batch(case)).logits, golden(case, "labels")).backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(with_gradient) == 2 * model.config.num_hidden_layers
    assert all("qkv_proj.lora_" in name for name in with_gradient)
    unmerged = model(**batch(case)).logits
    assert relative_error(unmerged, golden(case, "logits"), golden(case, "attention_mask").bool()) > 0.01
    merged = model.merge_and_unload()
    assert type(merged) is OpenELMForCausalLM
    assert relative_error(merged(**batch(case)).logits, unmerged) < 1e-5


def test_bfloat16(case, checkpoint):
    valid = golden(case, "attention_mask").bool()
    loaded = load(checkpoint, dtype=torch.bfloat16)
    # a cast after loading must not round the rotary frequencies either
    cast = load(checkpoint).to(torch.bfloat16)
    output = loaded(**batch(case), output_hidden_states=True)
    assert {states.dtype for states in (*output.hidden_states, output.logits)} == {torch.bfloat16}
    assert output.logits.isfinite().all()
    assert torch.equal(cast(**batch(case)).logits, output.logits)
    # a precision of 2^-9 through three layers with random weights
    assert relative_error(output.logits.float(), golden(case, "logits"), valid) < 0.05


def test_bfloat16_autocast(case, checkpoint):
    model = load(checkpoint)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch(case), output_hidden_states=True)
    assert {states.dtype for states in output.hidden_states} == {torch.float32}
    assert output.logits.dtype == torch.bfloat16
    valid = golden(case, "attention_mask").bool()
    assert relative_error(output.logits.float(), golden(case, "logits"), valid) < 0.05
    next_token_loss(output.logits.float(), golden(case, "labels")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
