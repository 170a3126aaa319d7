"""Pretraining of the built-in vision model: a small ViT that learns to name the built-in images' former classes.

Run `python -m emberfed.builtin.pretrain_vision` to make the model that ships with the package again (CPU, one thread,
about four minutes). The folder written holds a transformers model without a head, the processing of its images,
and `recipe.json`: the exact arguments and what came of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from emberfed.builtin import vision_model_path
from emberfed.builtin.images import FORMER_CLASSES, SIDE, Pictures, former_images
from emberfed.seeds import Seeds

_IMAGES_PER_CHUNK = 4800
_HELD_OUT_IMAGES = 960


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class VisionRecipe:
    """Everything the result depends on, besides library versions: sizes of the model and of its training."""

    seed: int = 0
    patch_size: int = 8
    hidden_size: int = 96
    mlp_size: int = 384
    layers: int = 4
    heads: int = 4
    batch_size: int = 64
    steps: int = 4000
    warmup_share: float = 0.1
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    threads: int = 1


def new_model(recipe: VisionRecipe) -> Any:
    """Return the recipe's model with fresh weights; the global random state is left as found."""
    config = ViTConfig(
        image_size=SIDE,
        patch_size=recipe.patch_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(FORMER_CLASSES),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Seeds(recipe.seed).integer("initial weights"))
        return ViTForImageClassification(config)


def processor() -> Any:
    """Return how the model wants its images: in its size, bytes to -1 to 1."""
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half)


def inputs(pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixel values, float32 (N, 3, S, S), as `processor` makes them, and labels (N,)."""
    pixels = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1, torch.from_numpy(pictures.labels)


def batches(recipe: VisionRecipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches without end; no image comes twice."""
    for chunk in count():
        pixels, labels = inputs(former_images(_IMAGES_PER_CHUNK, Seeds(recipe.seed).at(part="training", chunk=chunk)))
        yield from zip(torch.split(pixels, recipe.batch_size), torch.split(labels, recipe.batch_size), strict=True)


def pretrain(recipe: VisionRecipe, model: Any) -> float:
    """Train `model` in place with AdamW. Returns: mean cross-entropy over the last twentieth of the steps, in nats."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.steps,
        pct_start=recipe.warmup_share,
        cycle_momentum=False,
    )
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step, (pixels, labels) in enumerate(islice(batches(recipe), recipe.steps)):
        loss = F.cross_entropy(model(pixel_values=pixels).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            images_per_second = (step + 1) * recipe.batch_size / (time.perf_counter() - started)
            print(
                f"step {step + 1}/{recipe.steps}  loss {np.mean(losses[-50:]):.4f}  {images_per_second:.0f} images/s",
                flush=True,
            )
    return float(np.mean(losses[-max(1, recipe.steps // 20) :]))


def accuracy(recipe: VisionRecipe, model: Any) -> float:
    """Return the share of unseen images of the former classes that the model names rightly."""
    pixels, labels = inputs(former_images(_HELD_OUT_IMAGES, Seeds(recipe.seed).at(part="held out")))
    model.eval()
    parts = torch.split(pixels, recipe.batch_size)
    with torch.inference_mode():
        named = torch.cat([model(pixel_values=part).logits.argmax(dim=-1) for part in parts])
    return float((named == labels).float().mean())


def save(model: Any, folder: Path) -> None:
    """Write the model without its head, which names classes nobody asks for, and the processing of its images."""
    model.vit.save_pretrained(folder)
    processor().save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for their owner alone; the other files' mode is the user's
        weights.chmod((folder / "config.json").stat().st_mode)


def main() -> None:
    """Make the built-in vision model."""
    output, recipe = _arguments()
    torch.set_num_threads(recipe.threads)
    started = time.perf_counter()
    model = new_model(recipe)
    loss = pretrain(recipe, model)
    result = {
        "arguments": asdict(recipe),
        "parameters": model.vit.num_parameters(),
        "training_images": recipe.steps * recipe.batch_size,
        "final_loss": round(loss, 4),
        "accuracy": round(accuracy(recipe, model), 4),
        "seconds": round(time.perf_counter() - started),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }
    save(model, output)
    (output / "recipe.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _arguments() -> tuple[Path, VisionRecipe]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=vision_model_path(), help="folder to write")
    for option in fields(VisionRecipe):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    output: Path = arguments.pop("output")
    return output, VisionRecipe(**arguments)


if __name__ == "__main__":
    main()
