"""How much attention each token receives, summed up while attention is computed some queries at a time.

transformers' eager attention can hand out its weights, but as a whole (B, H, S, S) tensor of every layer. Here a layer
holds them for a few queries only, adds what they give to each position, and forgets them.

Shapes: B sequences, S positions of this forward pass, H query heads, G heads of keys and values, Q queries of a chunk,
D size of a head's query and key, V size of its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final, final

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emberfed.errors import ModelError
from emberfed.models.families import part
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.padding import ModelInputs

IMPLEMENTATION: Final = "emberfed_received"
_CHUNK_ELEMENTS: Final = 2**20
"""Attention weights that are held at a time: 4 MiB in float32."""


def attend(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSV: torch.Tensor,
    mask_B1SS: torch.Tensor | None,
    scaling: float,
    sinks_H: torch.Tensor | None,
    real_BS: torch.Tensor,
    chunk_elements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax attention, and what each position receives of it.

    Position t receives 1 / (H n) times the sum over heads and real queries q of A[h, q, t], n being the sequence's real
    queries: without sinks the numbers of a sequence sum to 1. The sources say "mean attention received" and no more;
    padded queries count nowhere, and a sequence of padding alone receives nothing.

    Args:
        query_BHSD: Queries.
        key_BGSD: Keys; head h of the queries has those of head h // (H / G).
        value_BGSV: Values.
        mask_B1SS: What is added to the scores, as transformers' eager attention takes it; None adds nothing.
        scaling: What scores are multiplied by.
        sinks_H: A further score of each head that takes part in the softmax and has no value (GPT-OSS); None without.
        real_BS: Bool, which queries are no padding.
        chunk_elements: Weights to hold at a time; one query of all heads and sequences at least.

    Returns:
        What attention gives, (B, S, H, V), and what is received, float32 (B, S).
    """
    batch, heads, length, _ = query_BHSD.shape
    groups, value_size = key_BGSD.shape[1], value_BGSV.shape[3]
    key_BGDS = key_BGSD.transpose(2, 3)
    out_BHSV = query_BHSD.new_empty(batch, heads, length, value_size)
    received_BS = torch.zeros(batch, length, dtype=torch.float32, device=query_BHSD.device)
    step = max(1, chunk_elements // (batch * heads * length))
    for start in range(0, length, step):
        queries = slice(start, min(start + step, length))
        # Heads that share keys are further rows of one product: keys and values need not be repeated.
        rows_BGND = query_BHSD[:, :, queries].reshape(batch, groups, -1, query_BHSD.shape[3])
        scores_BHQS = (rows_BGND @ key_BGDS).mul_(scaling).view(batch, heads, -1, length)
        if mask_B1SS is not None:
            scores_BHQS += mask_B1SS[:, :, queries]
        weights_BHQS = _softmax(scores_BHQS, sinks_H)
        given_BQS = weights_BHQS.sum(dim=1).mul_(real_BS[:, queries, None])
        received_BS += given_BQS.sum(dim=1)
        weights_BGNS = weights_BHQS.to(value_BGSV.dtype).view(batch, groups, -1, length)
        out_BHSV[:, :, queries] = (weights_BGNS @ value_BGSV).view(batch, heads, -1, value_size)
    real_B1 = real_BS.sum(dim=1, keepdim=True).clamp(min=1)
    return out_BHSV.transpose(1, 2).contiguous(), received_BS.div_(heads * real_B1)


def _softmax(scores_BHQS: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax over the last dimension in float32, the sinks' share left out."""
    if sinks_H is None:
        return torch.softmax(scores_BHQS, dim=-1, dtype=torch.float32)
    sinks_1H11 = sinks_H.detach().float().view(1, -1, 1, 1)
    scores_BHQS = scores_BHQS.float()
    highest_BHQ1 = torch.maximum(scores_BHQS.amax(dim=-1, keepdim=True), sinks_1H11)
    weights_BHQS = scores_BHQS.sub_(highest_BHQ1).exp_()
    total_BHQ1 = weights_BHQS.sum(dim=-1, keepdim=True) + (sinks_1H11 - highest_BHQ1).exp()
    return weights_BHQS.div_(total_BHQ1)


@final
class ReceivedAttention:
    """What the positions of the present forward pass receive, layer by layer as they are computed."""

    def __init__(self, model: FoundationModel) -> None:
        """Follow the forward passes of `model` as soon as `receiving` has switched it over."""
        self._model = model
        self._inputs = ModelInputs(model.lm.base_model)
        self._mask_BS: torch.Tensor | None = None
        self._received: dict[nn.Module, torch.Tensor] = {}

    def of(self, layer: int) -> torch.Tensor:
        """Return what positions receive in the attention of a decoder layer in this pass, float32 (B, S).

        Raises: ModelError if the family's attention does not go through transformers' registry of attentions.
        """
        received_BS = self._received.get(part(self._model.layers[layer], self._model.family.attention))
        if received_BS is None:
            raise ModelError(
                f"no attention weights are available from {self._model.family.model_type} models (layer {layer} does "
                f"not compute its attention through transformers' attention interface); set "
                f"method.merge_weights=frequency"
            )
        return received_BS

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass of the decoder. Raises: ModelError if its mask is not 2-D."""
        self._received.clear()
        self._mask_BS = self._inputs.mask(args, kwargs)
        if self._mask_BS is not None and self._mask_BS.dim() != 2:
            raise ModelError(
                f"received attention needs a 2-D attention mask (batch, positions), found shape "
                f"{tuple(self._mask_BS.shape)}"
            )

    def attention(
        self,
        module: nn.Module,
        query_BHSD: torch.Tensor,
        key_BGSD: torch.Tensor,
        value_BGSV: torch.Tensor,
        mask_B1SS: torch.Tensor | None,
        scaling: float,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention of one layer, (B, S, H, V), and keep what its positions receive.

        Raises: ModelError if there are keys of an earlier pass.
        """
        batch, _, length, _ = query_BHSD.shape
        if key_BGSD.shape[2] != length:
            raise ModelError(
                f"received attention is of whole sequences: {length} positions with {key_BGSD.shape[2]} keys; call the "
                f"model with use_cache=False"
            )
        mask_BS = self._mask_BS
        real_BS = query_BHSD.new_ones(batch, length, dtype=torch.bool) if mask_BS is None else mask_BS != 0
        out_BSHV, self._received[module] = attend(
            query_BHSD, key_BGSD, value_BGSV, mask_B1SS, scaling, sinks_H, real_BS, _CHUNK_ELEMENTS
        )
        return out_BSHV


@contextmanager
def receiving(model: FoundationModel) -> Iterator[ReceivedAttention]:
    """Let the model's attention tell what positions receive inside the context; then it is as found, also after errors.

    Inside, the model computes what transformers' eager attention does, without gradients and without a cache.
    """
    config, received = model.lm.config, ReceivedAttention(model)
    before = config._attn_implementation
    with ExitStack() as stack:
        stack.callback(model.lm.base_model.register_forward_pre_hook(received.begin, with_kwargs=True).remove)
        for layer in model.layers:
            attention = part(layer, model.family.attention)
            attention.emberfed_received = received
            stack.callback(delattr, attention, "emberfed_received")
        config._attn_implementation = IMPLEMENTATION
        stack.callback(setattr, config, "_attn_implementation", before)
        yield received


@torch.no_grad()
def _registered(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with transformers' interface; sliding windows are in the mask already."""
    received: ReceivedAttention = module.emberfed_received
    return received.attention(module, query, key, value, attention_mask, scaling, s_aux), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _registered)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, eager_mask)
