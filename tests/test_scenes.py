"""The scenes the shipped checkpoint is trained on, and the checker that judges its pictures."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from scene_checker import check, wanted
from scenes import COLOURS, POSITIONS, SLOTS, captions, held_out, render, sample

BATCH = 12


def draw(scenes):
    return (render(scenes) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def scenes():
    return sample(BATCH, torch.Generator().manual_seed(3), held_out_only=True)


@pytest.fixture(scope="module")
def pictures(scenes):
    return draw(scenes)


def test_checker_accepts_every_real_render(scenes, pictures):
    """A faithful picture is never marked wrong."""
    assert all(check(picture, text).ok for picture, text in zip(pictures, captions(scenes), strict=True))


def test_checker_refuses_another_colour(scenes, pictures):
    """The next colour in the table is told apart from the one the caption names, for each neighbour in hue."""
    other = replace(scenes, colour=(scenes.colour + 1) % len(COLOURS))
    assert not any(check(picture, text).ok for picture, text in zip(pictures, captions(other), strict=True))


def test_checker_refuses_another_place(scenes, pictures):
    """The right colours one cell further are wrong."""
    other = replace(scenes, position=(scenes.position + 1) % len(POSITIONS))
    assert not any(check(picture, text).ok for picture, text in zip(pictures, captions(other), strict=True))


def test_checker_refuses_a_shape_too_many(scenes):
    """Three shapes do not pass for a caption of one."""
    full, one = replace(scenes, count=torch.full((BATCH,), SLOTS)), replace(scenes, count=torch.ones(BATCH).long())
    assert not any(check(picture, text).ok for picture, text in zip(draw(full), captions(one), strict=True))


def test_checker_names_a_foreign_sentence():
    """A prompt that no scene has raises instead of counting as a picture without shapes."""
    with pytest.raises(ValueError, match="a cat"):
        wanted("a cat on a mat")


def test_training_never_draws_a_held_out_triple():
    """The split holds for every shape that is drawn, also in crowded scenes."""
    for crowded in (False, True):
        drawn = sample(300, torch.Generator().manual_seed(4), crowded=crowded)
        present = torch.arange(drawn.shape.shape[1]) < drawn.count[:, None]
        assert not (held_out(drawn.shape, drawn.colour, drawn.position) & present).any()


def test_seed_decides_what_the_caption_leaves_open(scenes, pictures):
    """One caption, another light, phase and offset: the same words, another picture, still accepted."""
    other = replace(scenes, light=scenes.light + 2, phase=scenes.phase + 0.3, offset_px=-scenes.offset_px)
    repainted = draw(other)
    assert captions(other) == captions(scenes)
    assert all((a != b).mean() > 0.005 for a, b in zip(pictures, repainted, strict=True))
    assert all(check(picture, text).ok for picture, text in zip(repainted, captions(other), strict=True))


def test_drawing_is_deterministic(scenes, pictures):
    """Same seed, same bytes."""
    assert (draw(sample(BATCH, torch.Generator().manual_seed(3), held_out_only=True)) == pictures).all()
