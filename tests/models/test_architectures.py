"""Each tested architecture: its states are those of each text alone in float64, or a sentence refuses it."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.conftest import ROOT, states_of
from tests.models.small import small_config, small_model
from utils.models.check import find_fault, self_check
from utils.models.states import decoder_of
from utils.models.tokens import TokenizedTexts
from utils.script import UserError

TABLE = re.findall(r"^\| ([^|]+?) \| (right|refused) \|", (ROOT / "docs/architectures.md").read_text(), re.MULTILINE)
RIGHT = [name for name, verdict in TABLE if verdict == "right"]
LENGTHS = (19, 1, 12, 7)
SHIFTED = ("mamba", "mamba2", "falcon_mamba", "rwkv")  # their `hidden_states` begin with the output of layer 1


def make_tokens(lengths=LENGTHS) -> TokenizedTexts:
    random = np.random.default_rng(0)
    return TokenizedTexts(
        random.integers(1, 300, sum(lengths)).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]), 64
    )


def plain_states(decoder, input_ids) -> list[torch.Tensor]:
    """For one text: input of the first layer, outputs of all layers but the last, and the decoder's output."""
    with torch.no_grad():
        output = decoder(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        states = output.hidden_states[:-1]
        if decoder.config.model_type in SHIFTED:
            states = (decoder.get_input_embeddings()(input_ids), *states[:-1])
    return [*states, output.last_hidden_state]


@pytest.mark.parametrize("model_type", RIGHT)
def test_states_of_a_padded_batch_are_those_of_each_text_alone_in_float64(model_type):
    decoder, tokens = decoder_of(small_model(model_type)), make_tokens()
    self_check(decoder, tokens, model_type)
    seen = states_of(decoder, tokens.pad(np.arange(4))[0])
    assert len(seen) == 3
    decoder.config._experts_implementation = "eager"  # the grouped products of the others know no float64
    if model_type != "xglm":  # its mask overflows in float64
        decoder.double()
    for row, ids in enumerate(np.split(tokens.token_ids, tokens.offsets[1:-1])):
        alone = plain_states(decoder, torch.from_numpy(ids.astype(np.int64))[None])
        for layer, expected in enumerate(alone):
            found = seen[layer][row, : len(ids)].double()
            scale = expected.norm(dim=-1).max()
            assert (found - expected[0]).norm(dim=-1).max() < 2e-5 * scale, (layer, row)


def test_a_row_of_the_embeddings_that_no_text_uses_may_be_anything():
    decoder, tokens = decoder_of(small_model("llama")), make_tokens()
    with torch.no_grad():
        decoder.get_input_embeddings().weight[[0, 299]] = torch.nan
    tokens.token_ids[tokens.token_ids == 299] = 298
    self_check(decoder, tokens, "with a row of nan")
    assert all(states.isfinite().all() for states in states_of(decoder, tokens.pad(np.arange(4))[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "mamba", "qwen3_next"])
def test_half_precision_is_no_reason_to_refuse(model_type, dtype):
    assert find_fault(decoder_of(small_model(model_type)).to(dtype), make_tokens()) is None


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
    "opt (350M: width 512 between layers of 1,024)": (lambda: decoder_of(small_model("opt", word_embed_proj_dim=16)),
                                                      "gives states of shape (4, 20, 16), not (4, 20, 32)"),
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


ODD = [(torch.float32, 1.3, "its states change with the padding (layer 1)"), (torch.bfloat16, 1.3, None),
       (torch.float16, torch.inf, None)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "factor", "fault"), ODD)
def test_half_precision_may_round_one_token_badly_and_an_overflow_is_left_to_the_pass(dtype, factor, fault):
    """The fifth state of a text in a batch is 1.3 times that of the text alone, or infinite."""
    decoder, factors = decoder_of(small_model("llama")).to(dtype), torch.ones(20, 1, dtype=dtype)
    factors[4] = factor
    decoder.layers[0].register_forward_hook(
        lambda layer, args, output: output * factors[: output.shape[1]] if len(output) > 1 else output
    )
    assert find_fault(decoder, make_tokens()) == fault


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
