"""OpenELM against the numbers of the published code, and through every door by which a model comes in or goes out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from utils.models.openelm import OpenELMConfig, OpenELMForCausalLM, OpenELMModel, rotary_tables

DATA = Path(__file__).parent.parent / "data"
GOLDEN = json.loads((DATA / "openelm_golden.json").read_text(encoding="utf-8"))
TENSORS = load_file(DATA / "openelm_golden.safetensors")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over largest absolute value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def golden(case: str, name: str) -> Tensor:
    return TENSORS[f"{case}.{name}"]


def batch(case: str) -> dict[str, Tensor]:
    return {"input_ids": golden(case, "input_ids"), "attention_mask": golden(case, "attention_mask")}


@pytest.fixture(scope="module", params=GOLDEN["cases"])
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


def load(checkpoint: Path, auto_class=AutoModelForCausalLM, dtype=torch.float32):
    """The model, after checking that the file and the model have the same parameters."""
    model, info = auto_class.from_pretrained(checkpoint, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    return model.eval()


def test_golden(case, checkpoint):
    model = load(checkpoint)
    valid = golden(case, "attention_mask").bool()
    assert not list(model.buffers())  # a buffer made on the meta device would be uninitialised memory
    output = model(**batch(case), output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for layer, states in enumerate(output.hidden_states):
        assert relative_error(states[valid], golden(case, f"hidden_states.{layer}")[valid]) < 1e-5, layer
    assert relative_error(output.logits[valid], golden(case, "logits")[valid]) < 1e-5

    expected, labels = GOLDEN["cases"][case], golden(case, "labels")
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_rms_norm_golden():
    norm = LlamaRMSNorm(64)
    for dtype, tolerance in (("f32", 1e-6), ("bf16", 0)):
        x, weight, y = (TENSORS[f"unit.rmsnorm.{name}_{dtype}"] for name in ("x", "weight", "y"))
        norm.weight = torch.nn.Parameter(weight)
        torch.testing.assert_close(norm(x).detach(), y, rtol=tolerance, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_tables_golden(head_dim):
    positions = torch.tensor(GOLDEN["unit"]["rope_positions"])
    cos, sin = rotary_tables(positions[None], head_dim, GOLDEN["unit"]["rope_theta"])
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, len(positions), head_dim)
    # beyond position 31 the position magnifies the last bit of a frequency
    tolerance = torch.where(positions <= 31, 1e-6, 5e-4)[:, None]
    for got, name in ((cos, "cos"), (sin, "sin")):
        expected = TENSORS[f"unit.rope.{name}_{head_dim}"]
        assert ((got[0] - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("size", GOLDEN["sizes"])
def test_published_sizes(size):
    expected = GOLDEN["sizes"][size]
    names = ("model_dim", "num_transformer_layers", "head_dim", "num_gqa_groups", "qkv_multipliers", "ffn_multipliers")
    config = OpenELMConfig(**{name: expected[name] for name in names}, share_input_output_layers=True)
    sizes = zip(expected["num_query_heads"], expected["num_kv_heads"], expected["ffn_intermediate"], strict=True)
    assert config.layer_sizes() == list(sizes)
    config.ffn_multipliers = expected["ffn_multipliers_range"]
    assert [width for _, _, width in config.layer_sizes()] == expected["ffn_intermediate"]
    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["num_parameters"]
    assert (config.hidden_size, config.num_hidden_layers) == (expected["model_dim"], len(expected["num_query_heads"]))


@pytest.mark.parametrize(("name", "factor"), [("qkv_proj", 1), ("out_proj", 0.5), ("proj_2", 0.5), ("token", 1)])
def test_random_weights_are_smaller_where_a_residual_branch_ends(name, factor):
    config = OpenELMConfig(vocab_size=500, model_dim=256, head_dim=32, num_transformer_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    weights = [weight for full_name, weight in model.named_parameters() if name in full_name]
    assert [weight.std().item() for weight in weights] == pytest.approx([factor * 256**-0.5] * len(weights), rel=0.02)


def test_base_model_and_saved_copy_have_the_numbers_of_the_published_one(case, checkpoint, tmp_path):
    model, base = load(checkpoint), load(checkpoint, AutoModel)
    assert type(model) is OpenELMForCausalLM and type(base) is OpenELMModel and type(model.config) is OpenELMConfig
    output = model(**batch(case), output_hidden_states=True)
    assert torch.equal(base(**batch(case)).last_hidden_state, output.hidden_states[-1])
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(**batch(case)).logits, output.logits)


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


def test_bfloat16(case, checkpoint):
    output = load(checkpoint, dtype=torch.bfloat16)(**batch(case))
    # a cast after loading must not round the rotary frequencies either
    assert torch.equal(load(checkpoint).to(torch.bfloat16)(**batch(case)).logits, output.logits)
    # a precision of 2^-9 through three layers with random weights
    valid = golden(case, "attention_mask").bool()
    assert relative_error(output.logits[valid].float(), golden(case, "logits")[valid]) < 0.05
