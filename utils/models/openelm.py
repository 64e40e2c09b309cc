"""OpenELM (Mehta et al. 2024, arXiv 2404.14619) as a native `transformers` model.

Importing this module registers it with the Auto classes: the checkpoints published as
apple/OpenELM-{270M,450M,1_1B,3B} and their -Instruct variants load unchanged and without remote code. Give
`from_pretrained` a dtype: the published weights are float32, config.json says bfloat16.

Written from the paper, the published names and shapes, and the measured behaviour of the published model
(tests/models/test_openelm.py). Heads and feed-forward width grow from the first layer to the last ("layer-wise
scaling", section 2.1 there). It gives hidden states and logits of right-padded texts; no cache, no generation.

Shapes: b batch, t tokens, d `hidden_size`, h `head_dim`, v `vocab_size`.
"""

# ruff: noqa: RUF012 - the library reads these class attributes, and nothing writes them
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# ------------------------------------------------------------------ configuration
class OpenELMConfig(PreTrainedConfig):
    """The fields of the published config.json that matter here; `attribute_map` holds the library's names."""

    model_type = "openelm"
    attribute_map = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "hidden_act": "activation_fn_name",
        "tie_word_embeddings": "share_input_output_layers",
    }

    vocab_size: int = 32000
    max_context_length: int = 2048
    num_transformer_layers: int = 12
    model_dim: int = 2048
    head_dim: int = 128
    qkv_multipliers: tuple[float, ...] | list[float] = (1.0, 1.0)  # query heads times h / d; form: see ffn_multipliers
    num_gqa_groups: int = 1  # query heads per key/value head, despite the name
    ffn_multipliers: tuple[float, ...] | list[float] = (4.0, 4.0)  # width / d: first and last layer, or one per layer
    ffn_dim_divisor: int = 256
    activation_fn_name: str = "swish"
    share_input_output_layers: bool = False
    rope_freq_constant: float = 10000
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def layer_sizes(self) -> list[tuple[int, int, int]]:
        """(query heads, key/value heads, feed-forward width) per layer (arXiv 2404.14619, section 2.1)."""
        sizes = []
        group_size = self.head_dim * self.num_gqa_groups
        multipliers = map(self.multiplier_per_layer, (self.qkv_multipliers, self.ffn_multipliers))
        for _, query, width in zip(range(self.num_transformer_layers), *multipliers, strict=True):
            # whole groups, so that every key/value head serves the same number of query heads
            num_groups = round_to_multiple(query * self.model_dim, group_size) // group_size
            ffn_width = round_to_multiple(width * self.model_dim, self.ffn_dim_divisor)
            sizes.append((num_groups * self.num_gqa_groups, num_groups, ffn_width))
        return sizes

    def multiplier_per_layer(self, multipliers: Sequence[float]) -> Sequence[float]:
        """One multiplier per layer; two numbers are a range, also in a model of two layers."""
        if len(multipliers) != 2:
            return multipliers
        first, last = multipliers
        num_steps = max(self.num_transformer_layers - 1, 1)
        # two decimals as published: unrounded, three of the four published models get other head counts
        return [round(first + (last - first) * i / num_steps, 2) for i in range(self.num_transformer_layers)]


def round_to_multiple(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor`; the next one if that is below 0.9 `value`."""
    nearest = max(divisor, int((value + divisor / 2) // divisor) * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


# ------------------------------------------------------------------ parts of a layer
def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of p / theta^(2j/h), j = 0..h/2-1, twice (RoPE, arXiv 2104.09864): p (b, t) -> (b, t, h)."""
    # Not a buffer: from_pretrained leaves buffers uninitialised, model.to(bfloat16) rounds them. On the CPU, for the
    # same bits on every device: the position multiplies a difference by up to 2047.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    # a broadcast product: autocast and TF32 would round a matrix product
    angles = position_ids[..., None].float() * frequencies.to(position_ids.device).repeat(2)
    return angles.cos(), angles.sin()


class ResidualLinear(nn.Linear):
    """A Linear that closes a residual branch; a class of its own because it is initialised smaller."""


class OpenELMAttention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys: (b, t, d) -> (b, t, d)."""

    def __init__(self, config: OpenELMConfig, query_heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.split_sizes = [query_heads, kv_heads, kv_heads]  # heads of query, key and value in the output
        self.qkv_proj = nn.Linear(config.model_dim, sum(self.split_sizes) * config.head_dim, bias=False)
        self.q_norm = LlamaRMSNorm(config.head_dim)
        self.k_norm = LlamaRMSNorm(config.head_dim)
        self.out_proj = ResidualLinear(query_heads * config.head_dim, config.model_dim, bias=False)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # (b, t, all heads, h)
        query, key, value = heads.split(self.split_sizes, dim=2)
        query, key = apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), *rotary, unsqueeze_dim=2)  # in float32
        query, key, value = (states.to(value.dtype).transpose(1, 2) for states in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class OpenELMFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) with one fused input projection: (b, t, d) -> (b, t, d)."""

    def __init__(self, config: OpenELMConfig, width: int) -> None:
        super().__init__()
        self.activation = ACT2FN[config.activation_fn_name]
        self.proj_1 = nn.Linear(config.model_dim, 2 * width, bias=False)
        self.proj_2 = ResidualLinear(width, config.model_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.proj_1(hidden_states).chunk(2, dim=-1)
        return self.proj_2(self.activation(gate) * up)


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + ffn(norm(x)): (b, t, d) -> (b, t, d)."""

    def __init__(self, config: OpenELMConfig, query_heads: int, kv_heads: int, width: int) -> None:
        super().__init__()
        self.attn_norm = LlamaRMSNorm(config.model_dim)
        self.attn = OpenELMAttention(config, query_heads, kv_heads)
        self.ffn_norm = LlamaRMSNorm(config.model_dim)
        self.ffn = OpenELMFeedForward(config, width)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), rotary)
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))


# ------------------------------------------------------------------ models
class OpenELMPreTrainedModel(PreTrainedModel):
    """Names that the library looks up, and the initialisation for training from scratch."""

    config: OpenELMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "token_embeddings"
    _no_split_modules = ["OpenELMDecoderLayer"]
    _can_record_outputs = {"hidden_states": OpenELMDecoderLayer}
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises as published: deviation d^-1/2, or (2 layers d)^-1/2 at the end of a residual branch; norms 1."""
        std = self.config.model_dim**-0.5
        if isinstance(module, ResidualLinear):
            nn.init.normal_(module.weight, std=std * (2 * self.config.num_transformer_layers) ** -0.5)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, LlamaRMSNorm):
            nn.init.ones_(module.weight)


class OpenELMModel(OpenELMPreTrainedModel):
    """The decoder without output head."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMDecoderLayer(config, *sizes) for sizes in config.layer_sizes())
        self.norm = LlamaRMSNorm(config.model_dim)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """The states (b, t, d) after the final norm; with `output_hidden_states=True` also those of each layer."""
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("OpenELM reads texts padded on the right: set padding_side='right'.")
        hidden_states = self.token_embeddings(input_ids)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_freq_constant)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class OpenELMForCausalLM(OpenELMPreTrainedModel):
    """`OpenELMModel` and next-token logits, in the published models from the embedding matrix."""

    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}
    prepare_inputs_for_generation = None  # PEFT looks it up; this model cannot generate

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        """Next-token logits (b, t, v); arguments as in `OpenELMModel.forward`."""
        outputs = self.transformer(input_ids, **kwargs)
        return CausalLMOutput(logits=self.lm_head(outputs.last_hidden_state), hidden_states=outputs.hidden_states)


AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
AutoModel.register(OpenELMConfig, OpenELMModel, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
