"""What a model's weights really occupy, by kind of module: from the tensors' storage, not from a nominal width."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, final, get_args

from torch import nn

from emberfed.models.families import Family, family_of, part
from emberfed.models.stacked import StackedWeight

Kind = Literal[
    "embedding", "attention", "routers", "routed experts", "shared experts", "dense MLPs", "norms", "head", "other"
]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@final
@dataclass(frozen=True, slots=True)
class ModuleMemory:
    """What the weights of one kind of module occupy.

    Attributes:
        module: The kind, or `total`.
        weights: How many values; quantised ones count as what they stand for.
        stored_bytes: Bytes of memory they are stored in, shared storage once, scales of quantised weights included;
            weights on disk take none.
        formats: Number formats they are in, sorted: `float32`, `4 bit`, `float32 on disk`, ...
    """

    module: str
    weights: int
    stored_bytes: int
    formats: tuple[str, ...]

    @property
    def sixteen_bit_bytes(self) -> int:
        """Bytes the same weights take in 16 bit."""
        return 2 * self.weights

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes on average; NaN without weights."""
        return 8 * self.stored_bytes / self.weights if self.weights else float("nan")

    def json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return {**asdict(self), "sixteen_bit_bytes": self.sixteen_bit_bytes}


def memory_by_module(lm: Any) -> tuple[ModuleMemory, ...]:
    """Return what each kind of module of a transformers model occupies; kinds it does not have are left out.

    Tied weights count once, as embedding. Buffers count too; those that belong to nothing else are `other`.

    Raises: ModelError if the model is of no known family.
    """
    parts = list(_parts(lm, _kinds(lm, family_of(lm.config)), "other"))
    seen: set[Hashable] = set()
    counted = []
    for found in parts:
        if found.place not in seen:
            seen.add(found.place)
            counted.append(found)
    rows = (_sum(kind, (found for found in counted if found.kind == kind)) for kind in KINDS)
    return tuple(row for row in rows if row.formats)


def total(rows: Iterable[ModuleMemory]) -> ModuleMemory:
    """Return the sum of all rows."""
    rows = tuple(rows)
    return ModuleMemory(
        "total",
        sum(row.weights for row in rows),
        sum(row.stored_bytes for row in rows),
        tuple(sorted({name for row in rows for name in row.formats})),
    )


def parameter_count(lm: nn.Module) -> int:
    """Return the number of parameters, tied ones once; what stands for others counts as those."""
    replaced = sum(module.numel() for module in lm.modules() if isinstance(module, StackedWeight))
    return replaced + sum(parameter.numel() for parameter in lm.parameters())


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor, or what stands in the place of a stacked one."""

    kind: Kind
    place: Hashable
    weights: int
    stored_bytes: int
    format: str


def _sum(kind: Kind, parts: Iterable[_Part]) -> ModuleMemory:
    parts = tuple(parts)
    return ModuleMemory(
        kind,
        sum(part.weights for part in parts),
        sum(part.stored_bytes for part in parts),
        tuple(sorted({part.format for part in parts})),
    )


def _parts(module: nn.Module, kinds: dict[nn.Module, Kind], inherited: Kind) -> Iterator[_Part]:
    """Yield what a module holds; a module of no kind of its own is of the kind it is part of."""
    kind = kinds.get(module, "norms" if "Norm" in type(module).__name__ else inherited)
    if isinstance(module, StackedWeight):
        yield _Part(kind, module, module.numel(), module.nbytes, module.kept_as)
        return
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        storage = tensor.untyped_storage()
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield _Part(kind, (tensor.device, storage.data_ptr()), tensor.numel(), storage.nbytes(), dtype)
    for child in module.children():
        yield from _parts(child, kinds, kind)


def _kinds(lm: Any, family: Family) -> dict[nn.Module, Kind]:
    """Return the modules where a kind begins."""
    head = lm.get_output_embeddings() if family.head is None else part(lm, family.head)
    embeddings = [part(lm, path) for path in family.embeddings] or [lm.get_input_embeddings()]
    kinds: dict[nn.Module, Kind] = {head: "head", **dict.fromkeys(embeddings, "embedding")}
    for layer in part(lm, family.layers):
        block, mixture = part(layer, family.block), family.mixture
        router = None if mixture is None else getattr(block, mixture.router, None)
        kinds[part(layer, family.attention)] = "attention"
        if mixture is None or router is None:
            kinds[block] = "dense MLPs"
            continue
        # What else the block holds, a gate for instance, belongs to its shared experts.
        kinds[block] = "shared experts"
        kinds[router] = "routers"
        kinds[part(block, mixture.experts)] = "routed experts"
    return kinds
