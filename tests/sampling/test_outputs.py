"""Grids that keep a prompt's pictures together, captions in any script, and the way to every picture."""

import pytest
import torch
from PIL import Image

from ldm.sampling import outputs
from ldm.sampling.outputs import captioned_grid, grid_of_prompts, writable
from ldm.sampling.trajectory import Trajectory

CELL = 160 + 12


def picture(prompt, number):
    return Image.new("RGB", (16, 16), (40 * prompt, 10 * number, 200))


def cells(grid, height):
    """What stands in each cell, row by row: the (prompt, number) of a picture, or None."""
    found = []
    for y in range(20, grid.height, height):
        colours = [grid.getpixel((x, y)) for x in range(20, grid.width, CELL)]
        found.append([(c[0] // 40, c[1] // 10) if c != outputs.PAPER else None for c in colours])
    return found


@pytest.mark.parametrize(
    "count, shape", [(2, (1, 2)), (3, (1, 3)), (8, (1, 8)), (9, (2, 5)), (16, (2, 8)), (17, (3, 6))]
)
def test_every_prompt_begins_a_row(count, shape):
    grid = grid_of_prompts([[picture(p, n) for n in range(count)] for p in range(3)], ["a", "b", "c"])
    found = cells(grid, 160 + 12 + 24)
    assert (len(found), len(found[0])) == (3 * shape[0], shape[1])
    for p in range(3):
        block = [cell for row in found[p * shape[0] : (p + 1) * shape[0]] for cell in row]
        assert block == [(p, n) for n in range(count)] + [None] * (len(block) - count)


def test_one_picture_each_goes_on_from_row_to_row():
    found = cells(grid_of_prompts([[picture(p, 0)] for p in range(5)], list("abcde")), 160 + 12 + 24)
    assert [len([c for c in row if c]) for row in found] == [4, 1]


@pytest.mark.parametrize("fonts", [(), outputs._FONTS])
def test_no_caption_is_a_row_of_boxes(monkeypatch, fonts):
    monkeypatch.setattr(outputs, "_FONTS", fonts)
    outputs._fonts.cache_clear()
    for caption in ("東京 の 狐", "звезда", "naïve café ß", "a\u202eb\nc", "🦊", "plain"):
        text, font = writable(caption)
        assert text and all(c.isprintable() for c in text)
        missing = bytes(font.getmask("\U0010ffff"))
        assert all(bytes(font.getmask(c)) != missing for c in text if c != " "), text
    outputs._fonts.cache_clear()


def test_without_other_fonts_accents_are_dropped_and_the_rest_is_escaped(monkeypatch):
    monkeypatch.setattr(outputs, "_FONTS", ())
    outputs._fonts.cache_clear()
    assert writable("naïve café")[0] == "naive cafe"
    assert writable("東 ring")[0] == "\\u6771 ring"
    outputs._fonts.cache_clear()
    captioned_grid([picture(1, 1)], ["東" * 200])  # wrapped and cut, never wider than its picture for long


def test_each_picture_has_its_way():
    class Model:
        def decode(self, latents, tile=None):
            return latents

    watch = Trajectory(num_steps=20, count=3, frames=4)
    for step in range(20):
        watch(step, torch.zeros(5, 1, 1, 1), torch.arange(5.0).view(5, 1, 1, 1) + 10 * step)
    assert len(watch.steps) == 4 and watch.steps[0] == 0 and watch.steps[-1] == 19
    for i in range(3):
        assert watch.pictures(Model(), i).flatten().tolist() == [i + 10 * step for step in watch.steps]
