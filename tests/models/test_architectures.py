"""Each tested architecture: its states are those of each text alone in float64, or a sentence refuses it."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.conftest import ROOT
from utils.models.check import find_fault, self_check
from utils.models.states import decoder_of, visit_hidden_states
from utils.models.tokens import TokenizedTexts
from utils.script import UserError

SMALL = {  # under every name that configurations have for it
    "vocab_size": 300, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "ffn_dim": 48, "dff": 48, "max_position_embeddings": 64, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
    "is_decoder": True, "is_encoder_decoder": False,
}  # fmt: skip
LATENT_ATTENTION = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
OTHERS = {  # further settings that an architecture needs
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]},
    "bart": {"decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "falcon_h1": {**MAMBA_HEADS, "mamba_d_ssm": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "xlm": {"causal": True},
}  # fmt: skip
TABLE = re.findall(r"^\| ([^|]+?) \| (right|refused) \|", (ROOT / "docs/architectures.md").read_text(), re.MULTILINE)
RIGHT = [name for name, verdict in TABLE if verdict == "right"]
LENGTHS = (19, 1, 12, 7)


def small_config(model_type: str, **settings):
    """The configuration of an architecture with two narrow layers; its own name of each setting is used."""
    default = AutoConfig.for_model(model_type).get_text_config(decoder=True)
    known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    chosen = {name: value for name, value in SMALL.items() if name in known}
    return type(default)(**{**chosen, **OTHERS.get(model_type, {}), **settings})


def small_model(model_type: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(model_type, **settings), dtype=torch.float32).eval()


def make_tokens(lengths=LENGTHS) -> TokenizedTexts:
    random = np.random.default_rng(0)
    return TokenizedTexts(
        random.integers(1, 300, sum(lengths)).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]), 64
    )


def plain_states(decoder, input_ids, layers) -> list[torch.Tensor]:
    """For one text: input of the first layer, outputs of all layers but the last, and the decoder's output."""
    seen: list[torch.Tensor] = []

    def enter(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leave(module, args, output):
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(leave) for layer in layers[:-1]]
    with torch.no_grad():
        last = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return [*seen, last]


def layers_of(decoder) -> nn.ModuleList:
    """The layers by the names that architectures give them, independent of the tested search."""
    for name in ("layers", "h", "blocks", "layer", "encoder.layer", "decoder.layers"):
        try:
            return decoder.get_submodule(name)
        except AttributeError:
            continue
    raise AssertionError(type(decoder).__name__)


@pytest.mark.parametrize("model_type", RIGHT)
def test_states_of_a_padded_batch_are_those_of_each_text_alone_in_float64(model_type):
    decoder, tokens = decoder_of(small_model(model_type)), make_tokens()
    self_check(decoder, tokens, model_type)
    seen: dict[int, torch.Tensor] = {}
    visit_hidden_states(decoder, tokens.pad(np.arange(4))[0], lambda layer, x: seen.__setitem__(layer, x.clone()))
    assert sorted(seen) == [0, 1, 2]
    decoder.config._experts_implementation = "eager"  # the grouped products of the others know no float64
    if model_type != "xglm":  # its mask overflows in float64
        decoder.double()
    for row, ids in enumerate(np.split(tokens.token_ids, tokens.offsets[1:-1])):
        alone = plain_states(decoder, torch.from_numpy(ids.astype(np.int64))[None], layers_of(decoder))
        for layer, expected in enumerate(alone):
            found = seen[layer][row, : len(ids)].double()
            scale = expected.norm(dim=-1).max()
            assert (found - expected[0]).norm(dim=-1).max() < 2e-5 * scale, (layer, row)


def test_a_row_of_the_embeddings_that_no_text_uses_may_be_anything():
    decoder, tokens, finite = decoder_of(small_model("llama")), make_tokens(), []
    with torch.no_grad():
        decoder.get_input_embeddings().weight[[0, 299]] = torch.nan
    tokens.token_ids[tokens.token_ids == 299] = 298
    self_check(decoder, tokens, "with a row of nan")
    visit_hidden_states(decoder, tokens.pad(np.arange(4))[0], lambda layer, x: finite.append(x.isfinite().all()))
    assert len(finite) == 3 and all(finite)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "mamba", "qwen3_next"])
def test_half_precision_is_no_reason_to_refuse(model_type, dtype):
    assert find_fault(decoder_of(small_model(model_type)).to(dtype), make_tokens()) is None


# ------------------------------------------------------------------ refused
def bidirectional(model_type: str, **settings):
    torch.manual_seed(0)
    return AutoModel.from_config(small_config(model_type, is_decoder=False, **settings)).eval()


def llama_without_a_mask():
    decoder = decoder_of(small_model("llama"))
    decoder.config.is_causal = False
    for layer in decoder.layers:
        layer.self_attn.is_causal = False
    return decoder


REFUSED = {
    "bert (encoder)": (lambda: bidirectional("bert"), "its states change with the tokens and the padding after them"),
    "distilbert": (lambda: bidirectional("distilbert"), "its states change with the tokens and the padding after them"),
    "electra (encoder)": (lambda: bidirectional("electra"), "its states change with the tokens and the padding"),
    "llama (is_causal=False)": (llama_without_a_mask, "its states change with the tokens and the padding after them"),
    "opt (350M: width 512 between layers of 1,024)": (
        lambda: decoder_of(small_model("opt", word_embed_proj_dim=16)),
        "gives states of shape (4, 20, 16), not (4, 20, 32)",
    ),
    "xlm": (lambda: decoder_of(small_model("xlm")), "layer 1 is not a decoder layer's output"),
    "xlnet": (lambda: decoder_of(small_model("xlnet")), "gives states of shape"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_causal_lm_is_refused_by_name_of_the_fault(name, dtype):
    if name == "xlnet" and dtype == torch.bfloat16:
        pytest.skip("its own code fails in half precision")
    make, fault = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(fault)):
        self_check(make().to(dtype), make_tokens(), name)


@pytest.mark.parametrize(("model_type", "dtype"), [("llama", torch.float32), ("mixtral", torch.bfloat16)])
def test_states_that_depend_on_the_length_of_the_batch_are_refused(model_type, dtype):
    decoder = decoder_of(small_model(model_type)).to(dtype)
    decoder.layers[0].register_forward_hook(lambda layer, args, output: output * output.shape[1])
    with pytest.raises(UserError, match=r"its states change with the padding \(layer 1\)"):
        self_check(decoder, make_tokens(), model_type)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2,), (1,), (64, 64)])
def test_texts_of_any_number_and_length_will_do_and_the_mode_stays(lengths):
    decoder = decoder_of(small_model("qwen2")).train()
    self_check(decoder, make_tokens(lengths), "qwen2")
    assert decoder.training and not any(module._forward_hooks for module in decoder.modules())
    if max(lengths) > 1:  # with them a model that does not mask is found, too
        with pytest.raises(UserError):
            self_check(llama_without_a_mask(), make_tokens(lengths), "llama")


def test_the_table_of_the_documentation_is_what_is_tried_here():
    assert len(RIGHT) == 73
    refused = [name for name, verdict in TABLE if verdict == "refused"]
    assert refused == [*REFUSED, "bart (as published)", "t5"]
