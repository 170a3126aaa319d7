"""What a training step holds in memory, in bytes, counted before it is run.

How much autograd keeps for backward depends on every operation of a decoder layer, and families differ in all of them.
So it is counted, not derived: a few small forward passes are run, and the distinct tensors that autograd saves are
added up by layer. Those bytes are a polynomial in the number of sequences B and their length L; six batches fix it, and
it then holds for every other (a single sequence may keep less, since some copies are then views). Images are all of one
length: two batches do. The rest are counts of tensors.

A step's peak is the largest of these moments. A(l) is what layer l keeps, A(end) what the final norm keeps, G(l) the
gradients of its part of the adapter, H the logits, X the hidden states of all positions, W what backward of a layer's
experts or MLP needs beside them:

    backward begins          A(all) + A(end) + 3 H
    backward of layer l      A(0..l) + G(l..last) + 4 X + W     without G(l) if the layer has no experts
    optimiser                G(all)

With gradient checkpointing a layer keeps X, its input, and A(l) while its own backward runs.

Not counted: what the allocator, the libraries and Python itself hold, the load-balancing loss, and lengths beyond a
sliding window. On CPUs oneDNN keeps a kernel for each shape it met, which can come to some hundred megabytes.

Shapes: L layers with experts, E experts, P parts (decoder layers, and what comes after them), C terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor, nn

from emberfed.costs import tensor_bytes
from emberfed.models import expert_tuning, lora, sparse_adapter
from emberfed.models.compact import Compact
from emberfed.models.footprint import memory_by_module, total
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.groups import ExpertViews, TrainableGroups
from emberfed.models.head import is_head
from emberfed.models.sparse_adapter_layout import num_experts
from emberfed.models.trainable import Trainable
from emberfed.models.tuning_layout import Rows, is_full

_FLOAT32_BYTES = 4
_SEQUENCES = (2, 3)
_LENGTHS = (8, 12, 16)
_ADAM_MOMENTS = 2
_LOGITS = 3
"""Copies of the logits when backward begins: their log-softmax, its gradient, and their own."""
_HIDDEN = 4
"""Copies of the hidden states in backward of a layer: the gradient that comes in, its own, and two in between."""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step of local training.

    Attributes:
        sequences: Sequences, or images, of one forward pass.
        length: Positions of each.
        head_positions: Positions of each whose logits are computed; 1 in a classifier.
        micro_batches: Forward and backward passes per step.
        checkpointing: Whether layers are run again in backward.
        anchored: Whether FedProx holds the adapter to a copy of what it was.
        adapter_top_k: K of a sparse adapter; 0 if the adapter is LoRA.
    """

    sequences: int
    length: int
    head_positions: int
    micro_batches: int = 1
    checkpointing: bool = False
    anchored: bool = False
    adapter_top_k: int = 0


@final
@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What training holds, in bytes.

    Attributes:
        weight_bytes: The frozen model as it is stored.
        adapter_bytes: The adapter, float32, and FedProx's copy of it if there is one.
        optimizer_bytes: Adam's two moments, float32.
        gradient_bytes: Gradients of one step, float32; of experts only where tokens went.
        activation_bytes: What autograd keeps at most.
        working_bytes: The most that gradients, activations and temporary tensors take together at one moment, which is
            less than their sum: activations go as gradients come.
    """

    weight_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    working_bytes: int

    @property
    def step_bytes(self) -> int:
        """What training needs on top of the model."""
        return self.adapter_bytes + self.optimizer_bytes + self.working_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.step_bytes

    def json(self) -> dict[str, int]:
        """Return the parts and the total."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def training_memory(
    model: FoundationModel, adapter: Mapping[str, Tensor], step: Step, touched_LE: Tensor | None = None
) -> TrainingMemory:
    """Return what training an adapter holds at most, with the model's present K and under the caller's autocast.

    Args:
        model: The model, without an adapter; a few small forward passes are run on it.
        adapter: The adapter's tensors.
        step: The largest step.
        touched_LE: Boolean (layers with experts, experts), experts that get tokens: the model's, or those of a sparse
            adapter. None: in a step as many as a router that chooses uniformly would reach on average, and all of them
            in the course of training.

    Raises: ModelError if the adapter does not fit the model; ConfigError if its K is impossible.
    """
    weights = total(memory_by_module(model.lm)).stored_bytes
    with _attached(model, adapter, step) as attached:
        saved = SavedBytes.count(model, attached.parameters)
        groups = attached.trainable_groups()
    one_expert = [_expert_bytes(model, step, model.top_k / model.num_experts)] * model.num_layers
    reached = _reached(model, adapter, step)
    return _memory(model, adapter, step, touched_LE, _Counted(weights, saved, groups, one_expert, reached))


def tuning_memory(
    model: FoundationModel,
    compact: Compact,
    tensors: Mapping[str, Tensor],
    rows: Rows,
    step: Step,
    touched_LE: Tensor | None = None,
    pairs_L: Sequence[float] | None = None,
) -> TrainingMemory:
    """Return what training some experts of a compact model holds at most, as `training_memory`.

    Weights are those of the slots, and all else of the model. Where the whole base is in memory, its experts wait there
    until the model is whole again, and are not counted: a client that has no room for them has them on disk.

    Args:
        model: The model, inside `compact.compacted` and without an adapter.
        compact: What that gave.
        tensors: Stacks of the tuned experts.
        rows: Which experts those are.
        step: The largest step.
        touched_LE: Boolean, by original experts; None: as in `training_memory`.
        pairs_L: For each layer with experts, the (token, slot) pairs that are computed for a real token on average.
            None: as many as there can be.

    Raises: ModelError if the stacks do not fit the model.
    """
    weights = total(memory_by_module(model.lm)).stored_bytes
    most_L = [min(model.top_k, layer.slots) for layer in compact.plan]
    pairs_L = most_L if pairs_L is None else pairs_L
    with expert_tuning.attached(model, tensors, rows, alpha=1.0) as attached:
        with compact.sending(1):
            fewest = SavedBytes.count(model, attached.parameters)
        with compact.sending(model.top_k):
            most = SavedBytes.count(model, attached.parameters)
        groups = attached.trainable_groups()
    shares = {
        layer: (pairs - 1) / (limit - 1) if limit > 1 else 1.0
        for layer, pairs, limit in zip(model.shape.sparse_layers, pairs_L, most_L, strict=True)
    }
    one_expert = [
        _expert_bytes(model, step, pairs / layer.slots) for pairs, layer in zip(pairs_L, compact.plan, strict=True)
    ]
    if any(map(is_full, tensors)):
        restored = 2 * model.shape.hidden * model.shape.expert_intermediate * _FLOAT32_BYTES
        one_expert = [size + restored for size in one_expert]
    reached = _reached(model, {}, step)
    counted = _Counted(weights, fewest.towards(most, shares), groups, one_expert, reached)
    return _memory(model, tensors, step, touched_LE, counted)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Counted:
    """What was found out about a model with something attached.

    Attributes:
        weights: Bytes of the frozen model.
        saved: What autograd keeps.
        groups: What is trained.
        one_expert: W of each layer with experts.
        reached: Share of a layer's experts that tokens of a step reach, if nothing is known of them.
    """

    weights: int
    saved: SavedBytes
    groups: TrainableGroups
    one_expert: Sequence[int]
    reached: float


def _memory(
    model: FoundationModel, adapter: Mapping[str, Tensor], step: Step, touched_LE: Tensor | None, counted: _Counted
) -> TrainingMemory:
    # Bytes of each stacked tensor, with the layer it is in.
    stacked = [(lora.layer_of(views.name), views, _bytes(views.stacked)) for views in counted.groups.experts]
    dense = [0] * (model.shape.num_layers + 1)
    for name, tensor in counted.groups.dense.items():
        dense[-1 if is_head(name) else lora.layer_of(name)] += _bytes(tensor)

    def gradient_bytes(share: Callable[[ExpertViews], float]) -> list[int]:
        """Return the gradients' bytes of each layer, and then of the head, where a share of a stack is reached."""
        sizes = [float(size) for size in dense]
        for layer, views, size in stacked:
            sizes[layer] += size * share(views)
        return [round(size) for size in sizes]

    if touched_LE is None:
        gradients, ever = gradient_bytes(lambda _: counted.reached), gradient_bytes(lambda _: 1)
    else:
        touched = touched_LE.double()
        gradients = ever = gradient_bytes(lambda views: float(touched[views.row, list(views.experts)].mean()))
    activations, working = _moments(model, step, counted.saved, gradients, counted.one_expert)
    return TrainingMemory(
        weight_bytes=counted.weights,
        adapter_bytes=tensor_bytes(adapter) * (2 if step.anchored else 1),
        optimizer_bytes=_ADAM_MOMENTS * sum(ever),
        gradient_bytes=sum(gradients),
        activation_bytes=activations,
        working_bytes=working,
    )


def _attached(model: FoundationModel, adapter: Mapping[str, Tensor], step: Step) -> AbstractContextManager[Trainable]:
    if step.adapter_top_k:
        return sparse_adapter.attached(model, adapter, step.adapter_top_k)
    return lora.attached(model, adapter, alpha=1.0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * _FLOAT32_BYTES


def _moments(
    model: FoundationModel, step: Step, saved: SavedBytes, gradients: Sequence[int], one_expert: Sequence[int]
) -> tuple[int, int]:
    """Return the most bytes of activations, and of activations, gradients and temporary tensors together."""
    *layers, after = saved.parts(step.sequences, step.length)
    hidden = step.sequences * step.length * model.shape.hidden * model.lm.dtype.itemsize
    kept = [hidden if layer else 0 for layer in layers] if step.checkpointing else layers
    below = list(accumulate(kept, initial=0))[:-1]
    present = [under + layer for under, layer in zip(below, layers, strict=True)]
    # The head's come first, and are there in every layer's backward.
    formed = list(accumulate(reversed(gradients)))[:0:-1]
    sparse = set(model.shape.sparse_layers)
    experts, mlp = dict(zip(model.shape.sparse_layers, one_expert, strict=True)), _mlp_bytes(model, step)
    beside = [_HIDDEN * hidden + experts.get(layer, mlp) for layer in range(len(layers))]
    # A mixture is one node and has its gradients at once; an MLP's come as its activations go.
    formed = [grown if layer in sparse else grown - gradients[layer] for layer, grown in enumerate(formed)]
    logits = _LOGITS * step.sequences * step.head_positions * model.shape.vocabulary * _FLOAT32_BYTES
    earlier = sum(gradients) if step.micro_batches > 1 else 0
    backward_begins = sum(kept) + after + logits
    layers_backward = max(map(sum, zip(present, formed, beside, strict=True)))
    optimiser = sum(gradients)
    return max(sum(kept) + after, *present), max(earlier + backward_begins, earlier + layers_backward, optimiser)


def _reached(model: FoundationModel, adapter: Mapping[str, Tensor], step: Step) -> float:
    """Return the share of a layer's experts that a router choosing uniformly reaches on average."""
    tokens = step.sequences * step.length * step.micro_batches
    if step.adapter_top_k:
        return 1 - (1 - step.adapter_top_k / num_experts(adapter)) ** tokens
    return 1 - (1 - model.top_k / model.num_experts) ** tokens


def _expert_bytes(model: FoundationModel, step: Step, share: float) -> int:
    """Return W of a layer with experts: the tensors of one in backward, where it gets that share of the rows."""
    shape = model.shape
    rows = step.sequences * step.length * share
    return round(rows * (3 * shape.hidden + 7 * shape.expert_intermediate) * _FLOAT32_BYTES)


def _mlp_bytes(model: FoundationModel, step: Step) -> int:
    """Return W of a layer without experts: gradients of its MLP's two halves; that of their product replaces itself."""
    half: int = step.sequences * step.length * model.shape.dense_intermediate * model.lm.dtype.itemsize
    return 2 * half


@final
@dataclass(frozen=True, slots=True, eq=False)
class SavedBytes:
    """What autograd keeps for backward, for any batch.

    Attributes:
        coefficients_PC: float64, rows are the layers and then what comes after them, up to the head; columns the terms
            of `_terms`.
        of_images: Whether inputs are images, which are all of one length.
    """

    coefficients_PC: Tensor
    of_images: bool

    @staticmethod
    def count(model: FoundationModel, adapter: Mapping[str, Tensor]) -> SavedBytes:
        """Count on the model as it stands: K set, under the caller's autocast, and with the adapter attached.

        Args:
            model: The model.
            adapter: The attached adapter's own parameters, which are not counted.
        """
        image = model.shape.image
        lengths = _LENGTHS if image is None else (image.positions,)
        batches = [(sequences, length) for sequences in _SEQUENCES for length in lengths]
        terms_BC = torch.tensor([_terms(*batch, image is not None) for batch in batches], dtype=torch.float64)
        counts_BP = torch.tensor([count_saved(model, adapter, *batch) for batch in batches], dtype=torch.float64)
        return SavedBytes(torch.linalg.solve(terms_BC, counts_BP).T, image is not None)

    def towards(self, other: SavedBytes, shares: Mapping[int, float]) -> SavedBytes:
        """Return what is kept a share of the way from here to `other`: by layer, all of the way where none is given."""
        share_P1 = torch.ones(len(self.coefficients_PC), 1, dtype=torch.float64)
        for layer, share in shares.items():
            share_P1[layer] = share
        return SavedBytes(torch.lerp(self.coefficients_PC, other.coefficients_PC, share_P1), self.of_images)

    def parts(self, sequences: int, length: int) -> tuple[int, ...]:
        """Return the bytes of each layer, from the first to the last, and then of what comes after them."""
        terms_C = torch.tensor(_terms(sequences, length, self.of_images), dtype=torch.float64)
        return tuple(round(value) for value in (self.coefficients_PC @ terms_C).tolist())


def _terms(sequences: int, length: int, of_images: bool) -> tuple[int, ...]:
    """Return 1, L, L^2 and the same times B: positions and masks may or may not be kept for each sequence.

    Of images, whose L is always the same, 1 and B.
    """
    powers = (1,) if of_images else (1, length, length**2)
    return *powers, *(sequences * power for power in powers)


def count_saved(model: FoundationModel, adapter: Mapping[str, Tensor], sequences: int, length: int) -> tuple[int, ...]:
    """Run a forward pass without the head and return the bytes autograd keeps, as `SavedBytes.parts` does.

    Tensors that share storage count once, where they are first kept; parameters and buffers do not. The last position
    of each text is padding, so that there is a mask, as in most batches.
    """
    saved = _Saved((*model.lm.parameters(), *model.lm.buffers(), *adapter.values()))
    with torch.enable_grad(), saved.following(model.layers):
        model.lm.base_model(**_inputs(model, sequences, length))
    return tuple(saved.parts)


def _inputs(model: FoundationModel, sequences: int, length: int) -> dict[str, Any]:
    """Return what the model is called with; `length` is only of texts."""
    image, device = model.shape.image, model.device
    if image is not None:
        return {"pixel_values": torch.zeros(sequences, image.channels, image.height, image.width, device=device)}
    words = model.lm.get_input_embeddings().num_embeddings
    ids = torch.arange(2, sequences * length + 2, device=device).view(sequences, length) % words
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@final
class _Saved:
    """Adds up what autograd saves, by the decoder layer that is running."""

    def __init__(self, owned: Iterable[Tensor]) -> None:
        """Leave out what is there anyway."""
        self.parts: list[int] = []
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in owned}
        self._seen: dict[int, Tensor] = {}

    @contextmanager
    def following(self, layers: nn.ModuleList) -> Iterator[None]:
        """Follow one forward pass."""
        self.parts = [0]

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen and storage.data_ptr() not in self._owned:
                self._seen[storage.data_ptr()] = tensor  # alive, so that its address is not given to another
                self.parts[-1] += storage.nbytes()
            return tensor

        def end(*_: Any) -> None:
            self.parts.append(0)

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_hook(end).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
            yield
