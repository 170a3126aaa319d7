"""What methods share, whatever they train: adapters among other tensors, uploads as updates, the server's step.

Free functions over bundles. The adapter's tensors are those named `layers.*` (`models.lora_layout`,
`models.sparse_adapter`) and `head.*` (`models.head`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

from torch import Tensor, int64

from emberfed import server_optimizer
from emberfed.aggregation import Update, Weights
from emberfed.data.shard import Shard
from emberfed.records import ACTIVATION_COUNTS, Bundle, Json, Payload, TensorSpec
from emberfed.server_optimizer import ServerOptimizerConfig
from emberfed.training import FitStats

ADAPTER_PREFIXES = ("layers.", "head.")
"""How the names of an adapter's tensors begin."""


def adapter_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are the adapter's."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(ADAPTER_PREFIXES)}


def specs(tensors: Mapping[str, Tensor], meta: Mapping[str, Json]) -> dict[str, TensorSpec]:
    """Return what an answer must hold: these tensors, trained, and the activation counts if there are experts."""
    wanted = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    shape = (len(meta["sparse_layers"]), meta["num_experts"])
    return {**wanted, **({ACTIVATION_COUNTS: TensorSpec(shape, int64)} if meta["sparse_layers"] else {})}


def upload(trained: Mapping[str, Tensor], stats: FitStats, shard: Shard, given: Mapping[str, Json]) -> Bundle:
    """Return the content of an upload: what was trained, how its experts were used, and how much it weighs.

    Args:
        trained: The adapter's tensors.
        stats: What training did.
        shard: What it was done on.
        given: What else the server is to be told; numbers of active experts come back as they were given.
    """
    ranks = {tensor.shape[-2] for name, tensor in trained.items() if name.endswith(".lora_A")}
    told = {**stats.json(), **({"rank": max(ranks)} if ranks else {})}
    # Of one expert, which every token passes, there is nothing to count.
    counts = {ACTIVATION_COUNTS: stats.counts_LE} if stats.counts_LE.shape[-1] > 1 and len(stats.counts_LE) else {}
    meta = {"examples": len(shard.examples), "tokens": stats.tokens, **given, "stats": told}
    return Bundle({**trained, **counts}, meta)


def updates_of(uploads: Sequence[Payload], meta: Mapping[str, Json]) -> list[Update]:
    """Return uploads as aggregation sees them; tensors are still read only when asked for."""
    return [
        Update(
            client=upload.client,
            tensors=_Adapter(upload.content.tensors),
            examples=upload.content.meta["examples"],
            tokens=upload.content.meta["tokens"],
            top_k=upload.content.meta.get("adapter_top_k", upload.content.meta["top_k"]),
            activations=_activations(upload.content, meta),
        )
        for upload in uploads
    ]


def _activations(content: Bundle, meta: Mapping[str, Json]) -> dict[str, Tensor]:
    if not meta["sparse_layers"]:
        return {}
    rows = content.tensors[ACTIVATION_COUNTS].unbind()
    where = meta.get("experts", "experts")
    return {f"layers.{layer}.{where}.": row for layer, row in zip(meta["sparse_layers"], rows, strict=True)}


@final
class _Adapter(Mapping[str, Tensor]):
    """The adapter's tensors among others, without reading any."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._names = [name for name in tensors if name.startswith(ADAPTER_PREFIXES)]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stepped(
    config: ServerOptimizerConfig, state: Bundle, combined: Mapping[str, Tensor], updates: Sequence[Update]
) -> dict[str, Tensor]:
    """Return the next adapter and the optimiser's memory: `combined` as it is, or taken as a pseudo-gradient.

    Experts that nobody used keep their bits, and their moments.
    """
    weights = Weights(updates)
    untouched = {name: ~used_E for name in combined if (used_E := weights.used(name)) is not None}
    memory = {name: tensor for name, tensor in state.tensors.items() if name.startswith("optimizer.")}
    tensors, memory = server_optimizer.step(config, adapter_of(state.tensors), combined, memory, untouched)
    return {**tensors, **memory}
