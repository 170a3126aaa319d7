"""The built-in images and the vision model pretrained on other classes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoImageProcessor, ViTModel

from emberfed.builtin import vision_model_path
from emberfed.builtin.images import CLASSES, FORMER_CLASSES, SIDE, former_images, images
from emberfed.builtin.pretrain_vision import VisionRecipe, batches, inputs, new_model, pretrain, processor, save
from emberfed.seeds import Seeds

TINY = VisionRecipe(patch_size=16, hidden_size=16, mlp_size=16, layers=1, heads=2, batch_size=32, steps=3)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.integers(0, 9))
def test_classes_are_balanced_and_images_come_from_the_seed_alone(count: int, seed: int) -> None:
    made = images(count, Seeds(seed))
    assert made.pixels.shape == (count, SIDE, SIDE, 3)
    assert made.pixels.dtype == np.uint8
    sizes = np.bincount(made.labels, minlength=len(CLASSES))
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1
    again = images(count, Seeds(seed))
    assert np.array_equal(made.pixels, again.pixels)
    assert np.array_equal(made.labels, again.labels)
    assert not np.array_equal(made.pixels, images(count, Seeds(seed + 1)).pixels)


def test_no_image_comes_twice() -> None:
    made = images(1000, Seeds(0))
    assert len({pixels.tobytes() for pixels in made.pixels}) == 1000


def test_the_order_of_classes_is_shuffled() -> None:
    labels = images(100, Seeds(0)).labels
    assert not np.array_equal(labels, np.sort(labels))


def test_former_classes_share_neither_figure_nor_pattern_with_the_new_ones() -> None:
    assert (len(CLASSES), len(FORMER_CLASSES)) == (10, 24)
    words = {word for name in CLASSES for word in name.split(maxsplit=1)}
    former = {word for name in FORMER_CLASSES for word in name.split(maxsplit=1)}
    assert words.isdisjoint(former)
    assert list(CLASSES) == sorted(CLASSES)
    assert set(former_images(48, Seeds(0)).labels.tolist()) == set(range(24))


def test_neither_colour_nor_brightness_tells_the_class() -> None:
    """The nearest mean colour over the picture names one class in ten by chance; three times that would be a leak."""
    made = images(2000, Seeds(0))
    colours = np.concatenate([made.pixels.mean(axis=(1, 2)), made.pixels.std(axis=(1, 2))], axis=1)
    train, test = slice(0, 1500), slice(1500, 2000)
    means = np.stack([colours[train][made.labels[train] == label].mean(axis=0) for label in range(10)])
    named = np.linalg.norm(colours[test][:, None] - means, axis=-1).argmin(axis=1)
    assert (named == made.labels[test]).mean() < 0.3


def test_inputs_are_what_the_processor_makes() -> None:
    made = images(4, Seeds(0))
    pixels, labels = inputs(made)
    expected = torch.from_numpy(np.stack(processor()(list(made.pixels))["pixel_values"]))
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert labels.tolist() == made.labels.tolist()


def test_pretraining_is_the_recipe_s_alone() -> None:
    one, other = new_model(TINY), new_model(TINY)
    state = torch.get_rng_state()
    losses = [pretrain(TINY, model) for model in (one, other)]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_pretraining_learns() -> None:
    """A guess among 24 classes costs log 24 = 3.18 nats."""
    recipe = replace(TINY, patch_size=8, hidden_size=32, mlp_size=64, steps=100, learning_rate=1e-2)
    assert pretrain(recipe, new_model(recipe)) < 3.0


def test_batches_go_on_after_a_chunk_with_other_images() -> None:
    recipe = replace(TINY, batch_size=4800)
    stream = batches(recipe)
    first, second = next(stream)[0], next(stream)[0]
    assert not torch.equal(first, second)


def test_what_is_saved_has_no_head_and_its_processing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("vision")
    model = new_model(TINY)
    save(model, folder)
    loaded = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    for name, weight in model.vit.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").size == {"height": SIDE, "width": SIDE}


def test_the_model_that_ships_is_small_and_says_how_it_was_made() -> None:
    folder = vision_model_path()
    files = Counter({file.name: file.stat().st_size for file in folder.iterdir()})
    assert set(files) == {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.json"}
    assert files["model.safetensors"] < 3_000_000
    told = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    assert VisionRecipe(**told["arguments"]) == VisionRecipe()
    assert told["accuracy"] > 0.5


def test_the_model_that_ships_tells_new_classes_apart_without_having_seen_them() -> None:
    """The nearest class mean of its features, against one in ten by chance."""
    model = ViTModel.from_pretrained(vision_model_path(), add_pooling_layer=False).eval()
    pixels, labels = inputs(images(600, Seeds(3)))
    with torch.inference_mode():
        features = model(pixel_values=pixels).last_hidden_state[:, 0]
    means = torch.stack([features[:400][labels[:400] == label].mean(dim=0) for label in range(10)])
    named = torch.cdist(features[400:], means).argmin(dim=1)
    assert float((named == labels[400:]).float().mean()) > 0.3
