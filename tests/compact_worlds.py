"""A method of clients that hold few experts, played hop by hop: surveys, roles, training, idle work, aggregation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from builders import token_ids
from federations import config

from emberfed import assembly, events, rounds
from emberfed.checkpoint import RunFolder
from emberfed.clients import Client
from emberfed.config import parse
from emberfed.data.shard import Shard
from emberfed.method import Method
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer

MATRICES = ("gate_proj", "up_proj", "down_proj")


def one_tier(**room: int) -> dict[str, Any]:
    """The `clients` section of a federation in which all have the same budget, with the checkpoint's own K."""
    return {"tiers": [{"name": "all", "share": 1.0, **room}]}


class CompactWorld:
    """A method, its state, and what its clients keep."""

    def __init__(self, model: Path, data: Path, /, **sections: Any) -> None:
        checked = parse(config(model, data, **sections))
        self.material = assembly.gather(checked)
        self.model = self.material.model
        self.method: Method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
        self.state = self.method.init(self.model, self.material.budgets, Seeds(0).at(purpose="init"))
        self.clients = {client.id: client for client in self.material.clients}
        self.memories: dict[str, Bundle] = {}

    def shard(self, id_: str) -> Shard:
        return self.material.shards[id_]

    def assign(self, round: int, *ids: str) -> None:
        """Ask new clients of a cohort for surveys, and give all of it their roles."""
        cohort = [self.clients[id_] for id_ in ids or self.clients]
        surveys = [self.survey(client, round) for client in self.method.unsurveyed(self.state, cohort)]
        self.state = self.method.assign(self.state, cohort, surveys, round)

    def survey(self, client: Client, round: int) -> Payload:
        memory, seeds = self.memories.get(client.id, Bundle()), Seeds(0).at(round=round, client=client.id)
        result = self.method.survey(self.model, client, self.shard(client.id), memory, seeds)
        self.memories[client.id] = result.memory
        return Payload(round, client.id, result.upload)

    def download(self, id_: str, round: int) -> Payload:
        return self.method.dispatch(self.state, self.clients[id_], round)

    def fit(self, id_: str, round: int) -> Payload:
        client, seeds = self.clients[id_], Seeds(0).at(round=round, client=id_)
        memory = self.memories.get(id_, Bundle())
        result = self.method.fit(self.model, self.download(id_, round), client, self.shard(id_), memory, seeds)
        self.memories[id_] = self.method.idle(self.model, client, self.shard(id_), result.memory)
        return Payload(round, id_, result.upload)

    def play(self, round: int, *ids: str) -> list[Payload]:
        """A whole round of these clients, or of all."""
        chosen = ids or tuple(self.clients)
        self.assign(round, *chosen)
        uploads = [self.fit(id_, round) for id_ in chosen]
        self.state = self.method.aggregate(self.state, uploads)
        return uploads

    def deployed(self) -> torch.Tensor:
        with self.method.deploy(self.state, self.model, self.material.budgets[0]):
            return logits(self.model.lm)

    def personal(self, id_: str, round: int) -> torch.Tensor:
        memory = self.memories.get(id_, Bundle())
        with self.method.personal(self.model, self.download(id_, round), self.clients[id_], memory) as model:
            return logits(model.lm)


def played(
    given: dict[str, Any], path: Path, materials: assembly.Materials, listen: events.Listener = events.ignore
) -> RunFolder:
    """A run without its report, begun or gone on with; its engine is closed."""
    checked = parse(given)
    material = materials.gather(checked)
    folder = RunFolder.open(path) if path.exists() else assembly.start(checked, path, material)
    federation = assembly.federate(checked, folder, material, listen)
    try:
        rounds.run(federation, folder, listen)
    finally:
        federation.engine.close()
    return folder


def logits(lm: Any) -> torch.Tensor:
    ids = token_ids(2, 9)
    with torch.inference_mode():
        answer: torch.Tensor = lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.clone()
    return answer


def loud(tensors: Mapping[str, torch.Tensor], size: float = 0.2) -> dict[str, torch.Tensor]:
    """The tensors with noise on top."""
    draw = torch.Generator().manual_seed(8)
    return {name: tensors[name] + size * torch.randn(tensors[name].shape, generator=draw) for name in sorted(tensors)}


def model_bits(model: FoundationModel) -> list[tuple[str, bytes]]:
    """All numbers of a model, the K of its routers, and how many hooks its modules have."""
    numbers = [*model.lm.named_parameters(), *model.lm.named_buffers()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.lm.modules())
    told = f"{model.top_k} {hooks} {model.lm.config.to_dict()}".encode()
    return [(name, tensor.detach().float().numpy().tobytes()) for name, tensor in numbers] + [("rest", told)]


def bundle_bits(bundle: Bundle) -> bytes:
    return bundle.to_bytes()


def places(experts: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    """(row, expert) of experts given by row."""
    return {(row, expert) for row, ids in enumerate(experts) for expert in ids}
