"""A text model as the decoder beside the encoder that is made of it: causal, with cross-attention in every layer.

Both start from one decoder-only model; cross-attention starts from its layer's self-attention, projections and norms, and
looks at all of the encoder's states without positions.

Source: T5Gemma (arXiv 2504.06225); a Gemma 2 becomes transformers' T5Gemma exactly. As there, the decoder has its own
embeddings, which it also writes with.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from datamodules.processors.inputs import Inputs
from lightning_modules.encoder.packing import NAME

# Decoders whose layers are those that `DecoderLayer` knows; each is tested.
FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


class Decoder(nn.Module):
    """What the encoder read and what was written so far to the next token's logits.

    Letters: N sequences; L tokens of the longest that the decoder reads, U of all; S and T those of the encoder; H width.

    Args:
        text: The text model, of which a copy is taken; it may have been made bidirectional.

    Raises:
        ValueError: It is none of the decoders that are known here.
    """

    def __init__(self, text: Any) -> None:
        super().__init__()
        family = text.config.model_type
        if family not in FAMILIES:
            raise ValueError(
                f"the text model is a {family}, which is no decoder that can be adapted; name one of {', '.join(FAMILIES)}"
            )
        self.text: Any = copy.deepcopy(text)
        self.text.config.is_causal = True
        if self.text.config._attn_implementation == NAME:
            self.text.set_attn_implementation("sdpa")
        self.text.layers = nn.ModuleList([DecoderLayer(layer) for layer in self.text.layers])

    def forward(self, inputs: Inputs, encoder_inputs: Inputs, states_TH: Tensor) -> Tensor:
        """Logits of the next token behind each (U, vocabulary), in fp32.

        Args:
            inputs: What was written so far (N items).
            encoder_inputs: What the encoder read (N items).
            states_TH: Its states.
        """
        _, mask_NS, places_T = encoder_inputs.padded()
        memory = states_TH.new_zeros(mask_NS.numel(), states_TH.shape[1]).index_copy(0, places_T, states_TH)
        token_ids_NL, _, places_U = inputs.padded()  # on the right, where a causal mask hides it
        embeddings = self.text.get_input_embeddings()
        out = self.text(
            inputs_embeds=embeddings(token_ids_NL),
            memory_NSH=memory.view(*mask_NS.shape, -1),
            memory_mask_NS=mask_NS.bool(),
        )
        logits = F.linear(out.last_hidden_state.flatten(0, 1)[places_U], embeddings.weight).float()
        softcap = getattr(self.text.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class DecoderLayer(GradientCheckpointingLayer):
    """A decoder's layer with cross-attention between self-attention and feed-forward network.

    Norms stand before each of the three (Llama, Qwen), in later Gemmas behind each as well.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.norms_behind = hasattr(layer, "pre_feedforward_layernorm")
        self.cross_attn = CrossAttention(layer.self_attn)
        self.pre_cross_attn_layernorm = copy.deepcopy(layer.input_layernorm)
        self.post_cross_attn_layernorm = copy.deepcopy(layer.post_attention_layernorm) if self.norms_behind else nn.Identity()

    def forward(self, hidden_states: Tensor, *, memory_NSH: Tensor, memory_mask_NS: Tensor, **more: Any) -> Tensor:
        layer, states_NLH = self.layer, hidden_states
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(states_NLH), **more)
        states_NLH = states_NLH + (layer.post_attention_layernorm(attended) if self.norms_behind else attended)
        crossed = self.cross_attn(self.pre_cross_attn_layernorm(states_NLH), memory_NSH, memory_mask_NS)
        states_NLH = states_NLH + self.post_cross_attn_layernorm(crossed)
        if self.norms_behind:
            return states_NLH + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(states_NLH)))
        return states_NLH + layer.mlp(layer.post_attention_layernorm(states_NLH))


class CrossAttention(nn.Module):
    """Attention of the decoder's states to the encoder's, from a self-attention's weights. w is a head's width."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = copy.deepcopy(attention.q_proj), copy.deepcopy(attention.k_proj)
        self.v_proj, self.o_proj = copy.deepcopy(attention.v_proj), copy.deepcopy(attention.o_proj)
        self.q_norm, self.k_norm = (copy.deepcopy(getattr(attention, name, nn.Identity())) for name in ("q_norm", "k_norm"))
        self.head_dim, self.scaling, self.dropout = attention.head_dim, attention.scaling, attention.attention_dropout
        self.softcap: float | None = getattr(attention, "attn_logit_softcapping", None)

    def forward(self, states_NLH: Tensor, memory_NSH: Tensor, mask_NS: Tensor) -> Tensor:
        query_NLhw, key_NSgw, value_NSgw = (
            states.unflatten(-1, (-1, self.head_dim))
            for states in (self.q_proj(states_NLH), self.k_proj(memory_NSH), self.v_proj(memory_NSH))
        )
        query, key, value = (x.transpose(1, 2) for x in (self.q_norm(query_NLhw), self.k_norm(key_NSgw), value_NSgw))
        mask, dropout = mask_NS[:, None, None], self.dropout if self.training else 0.0
        if self.softcap is None:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.scaling, enable_gqa=True
            )
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            scores = self.softcap * torch.tanh(query @ key.mT * self.scaling / self.softcap)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
            out = F.dropout(weights, dropout) @ value
        return self.o_proj(out.transpose(1, 2).flatten(2))
