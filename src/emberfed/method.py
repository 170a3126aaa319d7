"""The interface of a federated fine-tuning method, and the registry that finds them by file name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from emberfed import plugins
from emberfed.aggregation import LARGEST_VALUE, Update
from emberfed.clients import Budget, Client
from emberfed.costs import Work
from emberfed.data.shard import Shard
from emberfed.errors import AggregationError, ConfigError
from emberfed.models.compact import Compact
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.sections import Section, validate
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig
from emberfed.training import Trainer


@final
@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The model as a client holds it while it trains, before what it trains is attached.

    Attributes:
        model: With the client's K.
        compact: Its state if it holds fewer experts than it has.
        disk_bytes: Bytes of experts that the client read from disk to hold it so.
    """

    model: FoundationModel
    compact: Compact | None = None
    disk_bytes: int = 0


class Method(ABC):
    """One federated fine-tuning method. Concrete methods are final, one per file, and never import each other.

    The server calls `init`, `dispatch`, `expects`, `aggregate`; a client calls `fit` and `personal`; whoever wants to
    run the global model calls `deploy`. None of them may change its inputs, and all leave the model as found.

    Attributes:
        title: The method's name as its paper writes it.
        paper: Where it is published.
        Config: The options of the `method` section.
        AdapterConfig: The options of the `adapter` section.
        experts: Whose experts uploads' activation counts are of: the model's, or a sparse adapter's.
        idles: Whether clients have work of their own to do after training, while the server goes on.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[Section]]
    AdapterConfig: ClassVar[type[Section]]
    experts: ClassVar[Literal["model", "adapter"]] = "model"
    idles: ClassVar[bool] = False

    def __init__(self, config: Any, adapter: Any, trainer: Trainer) -> None:
        """Take the checked sections, instances of `Config` and `AdapterConfig`, and the local training loop."""
        self.config = config
        self.adapter = adapter
        self.trainer = trainer

    @abstractmethod
    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Return the server's state before round 1, for clients of these budgets.

        Raises: ConfigError if the model or a budget does not go with the method's options.
        """

    def unsurveyed(self, state: Bundle, cohort: Sequence[Client]) -> Sequence[Client]:
        """Return those clients of a round's cohort whose data the server must hear of before it can dispatch; none."""
        return ()

    def survey_expects(self, state: Bundle) -> Mapping[str, TensorSpec]:
        """Return every tensor that a client's survey must hold; anything else is refused."""
        return {}

    def survey(self, model: FoundationModel, client: Client, shard: Shard, memory: Bundle, seeds: Seeds) -> FitResult:
        """Describe, on the client, its data to the server; the memory returned is kept for its first training.

        Raises: ClientError if that cannot be done.
        """
        raise NotImplementedError(f"{self.title} asks no client for a survey")

    def assign(self, state: Bundle, cohort: Sequence[Client], surveys: Sequence[Payload], round: int) -> Bundle:
        """Return the state with what the server decides for a whole round: who of the cohort does what. Pure.

        Args:
            state: After the last round.
            cohort: The clients that will train, sorted by id.
            surveys: Those that came in, sorted by client id.
            round: From 1.
        """
        return state

    def idle(self, model: FoundationModel, client: Client, shard: Shard, memory: Bundle) -> Bundle:
        """Do the client's idle work after training: return its memory with what comes of it. Pure and deterministic.

        Nothing may be changed on `model`, which the server may be using at the same time. Once there is nothing left to
        do, the memory comes back as it is.
        """
        return memory

    @abstractmethod
    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Return what the server sends to `client` in `round` (counted from 1)."""

    @abstractmethod
    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Return every tensor that the answer to `download` must hold; anything else is refused."""

    @contextmanager
    def held(self, model: FoundationModel, download: Payload, client: Client) -> Iterator[Held]:
        """Give the model as the client holds it while it trains on a download; on exit it is as found.

        That is the whole model, unless a method says otherwise. Where it depends on the client's data, of which nothing
        is known here, all experts count as used alike.
        """
        with model.active_experts(download.content.meta["top_k"]):
            yield Held(model)

    def flops_beside(
        self, held: Held, download: Payload, client: Client, work: Work, trained: Mapping[str, Tensor]
    ) -> int:
        """Return about how many FLOPs a client's first round takes beside training; for plans, counted nowhere else.

        Args:
            held: What `held` gives, inside of it.
            download: What the client trains on.
            client: The client.
            work: Of one forward pass over all its examples on the model as it is held.
            trained: What it trains.
        """
        return 0

    @abstractmethod
    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train on the client's shard. `memory` is what the client kept from its last round; `seeds` is its address.

        The upload's meta must hold `examples` (its weight, > 0), `top_k` and `stats` (JSON, for `clients.jsonl`).

        Raises: ClientError if training cannot go on.
        """

    @abstractmethod
    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Return the next state from admitted uploads, sorted by client id and never empty. Pure."""

    @classmethod
    @abstractmethod
    def combine(
        cls, updates: Sequence[Update], config: Any, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return what the method makes of its clients' tensors: its rule of aggregation alone, without any state.

        `aggregate` goes through it, and so does `emberfed.aggregate`, for users of other frameworks.

        Args:
            updates: At least one; summed in the order given.
            config: An instance of `Config`.
            previous: What the clients began with; what nobody trained keeps its bits.

        Raises: AggregationError if the updates do not go together.
        """

    @abstractmethod
    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Give the global model as a device of that budget would run it; on exit the model is as found."""

    @abstractmethod
    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Give the model as the client itself runs it: what it was sent, with what it keeps; on exit it is as found.

        Raises: ClientError if the client's memory is not what the download needs.
        """

    @abstractmethod
    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return the files, by name, that let other programs open this state's adapter (PEFT's, where it can)."""


def method_names() -> list[str]:
    """Return the names that `load_method` takes."""
    return plugins.names("emberfed.methods")


def load_method(name: str) -> type[Method]:
    """Return the method of that name. Raises: ConfigError listing what exists if it is unknown."""
    return plugins.load("emberfed.methods", name, Method)  # type: ignore[type-abstract]


def aggregate(
    updates: Sequence[Update], *, method: str, previous: Mapping[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return what a method makes of clients' named tensors, for users of any framework. Stateless and pure.

    Args:
        updates: What the clients sent. The order does not matter: sums run by sorted client name.
        method: `a3smoe`, `flame`, `homolora`, `hetlora`, `flexlora` or `flora` (`emberfed methods` lists them).
        previous: The global tensors the clients began with. An expert, or a component of a LoRA, that nobody trained
            keeps its bits; without it such experts are averaged by data size.
        options: The method's options, as in the `method` section of a configuration.

    Returns:
        The global tensors by sorted name. HetLoRA's and FlexLoRA's are of the rank of `previous`, or the largest rank
        sent; `redistribute` cuts them for a client. FLoRA's is the stack, of rank sum r_c, to be merged into the base.

    Raises:
        ConfigError: if the method or an option is unknown.
        AggregationError: if the updates do not go together, or hold numbers that are not finite.
    """
    chosen = load_method(method)
    config = validate(chosen.Config, options, "options")
    if getattr(config, "server_optimizer", None) not in (None, ServerOptimizerConfig()):
        raise ConfigError("options.server_optimizer has a memory, and this function has none; leave it out")
    ordered = sorted(updates, key=lambda update: update.client)
    twice = [one.client for one, next_ in pairwise(ordered) if one.client == next_.client]
    if twice:
        raise AggregationError(f"client {twice[0]!r} has two updates; give one for each client")
    for update in ordered:
        for name in sorted(update.tensors):
            tensor = update.tensors[name]
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                raise AggregationError(
                    f"{update.client}: {name!r} is {getattr(tensor, 'dtype', type(tensor).__name__)}, expected a torch "
                    f"tensor of floating-point numbers; convert it with torch.as_tensor"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise AggregationError(f"{update.client}: {name!r} holds numbers that are not finite; leave it out")
            if bool((tensor.abs() > LARGEST_VALUE).any()):
                raise AggregationError(
                    f"{update.client}: {name!r} holds numbers above {LARGEST_VALUE:g}, too large to be aggregated; "
                    f"leave it out"
                )
        idle = sorted(prefix for prefix in update.activations if not any(map(_begins(prefix), update.tensors)))
        uncounted = [name for name, tensor in sorted(update.tensors.items()) if _is_uncounted(name, tensor, update)]
        if idle and uncounted:
            raise AggregationError(
                f"{update.client}: activations of {idle[0]!r} were given, with which no tensor's name begins, and none "
                f"of {uncounted[0]!r}; the keys of activations are the first parts of stacked tensors' names"
            )
    with torch.no_grad():
        return chosen.combine(ordered, config, previous)


def _is_uncounted(name: str, tensor: Tensor, update: Update) -> bool:
    """Tell whether a tensor looks stacked over experts whose use is not known."""
    return tensor.dim() >= 3 and not any(_begins(prefix)(name) for prefix in update.activations)


def _begins(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(f"{prefix.removesuffix('.')}.")
