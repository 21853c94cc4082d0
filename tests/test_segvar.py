"""Seg-VAR: the color map and its inverse."""

import numpy as np
import pytest

from data import load_dataset
from metrics import PanopticQuality
from segvar import color_map, instances, palette


def as_set(masks):
    return {mask.tobytes() for mask in masks}


def boxes(height, width, *corners):
    """Masks of rectangles (top, left, bottom, right)."""
    masks = np.zeros((len(corners), height, width), bool)
    for mask, (top, left, bottom, right) in zip(masks, corners):
        mask[top:bottom, left:right] = True
    return masks


def cell_of(picture, mask, grid):
    """(row, column) of the cell whose color a mask has; None for black."""
    (color,) = np.unique(picture[mask], axis=0)
    number = int(np.flatnonzero((palette(grid) == color).all(1))[0])
    return divmod(number - 1, grid) if number else None


@pytest.mark.parametrize("grid,apart", [(1, 360), (2, 254), (3, 179), (4, 152), (8, 81), (16, 47)])
def test_the_colors_lie_far_apart_and_far_from_black(grid, apart):
    colors = palette(grid).astype(int)
    assert colors.shape == (grid * grid + 1, 3) and not colors[0].any()
    squares = ((colors[:, None] - colors) ** 2).sum(-1) + 10**6 * np.eye(len(colors), dtype=int)
    assert squares.min() >= apart**2
    # plain m x m x m levels with as many points are not farther apart
    assert squares.min() ** 0.5 >= 255 / (np.ceil(round((grid * grid + 1) ** (1 / 3), 6)) - 1) - 1


@pytest.mark.parametrize("grid", [1, 3, 8, 16])
def test_disjoint_masks_come_back_exactly(grid):
    rng = np.random.default_rng(grid)
    for trial in range(12):
        height, width = rng.integers(grid if trial % 3 == 0 else 1, 60, 2)
        count = min(int(rng.integers(0, grid * grid + 1)) if trial % 4 else grid * grid, height * width)
        # pixels of one mask anywhere; the last number is background
        owner = rng.integers(0, count + 1, (height, width)) if trial % 2 else np.minimum(
            rng.permutation(height * width), count).reshape(height, width)  # every mask has one pixel
        masks = owner == np.arange(count)[:, None, None]
        masks = masks[masks.any((1, 2))]
        picture = color_map(masks, grid)
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
        back = instances(picture, grid)
        assert back.dtype == bool and back.shape == masks.shape and as_set(back) == as_set(masks)


def test_drawn_scenes_come_back_with_panoptic_quality_1():
    metrics, dataset = PanopticQuality(), load_dataset("scenes-instances", "test")
    for i in range(0, 60, 2):
        gt = dataset[i]
        back = instances(color_map(gt.masks[gt.is_thing], 8), 8)
        label = {mask.tobytes(): label for mask, label in zip(gt.masks, gt.labels)}
        pred = [{"mask": mask, "label": label[mask.tobytes()]} for mask in back]
        metrics.update([*pred, {"mask": ~back.any(0), "label": "background"}], gt)
    assert metrics.compute()["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 9}


def test_an_instance_has_the_color_of_the_cell_of_its_center():
    masks = boxes(40, 80, (0, 0, 4, 4), (0, 76, 4, 80), (36, 0, 40, 4), (15, 30, 25, 50))
    picture = color_map(masks, 4)
    assert [cell_of(picture, mask, 4) for mask in masks] == [(0, 0), (0, 3), (3, 0), (2, 2)]  # on the border: the next
    assert not picture[~masks.any(0)].any()


def test_the_larger_keeps_its_cell_and_the_other_takes_the_nearest_free_one():
    small, large, third = boxes(40, 40, (14, 14, 16, 16), (11, 11, 14, 19), (16, 11, 18, 13))
    masks = np.stack([small, large, third])
    picture = color_map(masks, 4)
    assert cell_of(picture, large, 4) == (1, 1)
    assert cell_of(picture, small, 4) == (0, 1) and cell_of(picture, third, 4) == (1, 0)  # of one area: by place
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):  # the order of the masks says nothing
        assert np.array_equal(color_map(masks[order], 4), picture)
    full = np.arange(100) == np.arange(9)[:, None, None]  # nine in one corner cell of 3 x 3 fill all of them
    assert {cell_of(color_map(full, 3), mask, 3) for mask in full} == {divmod(k, 3) for k in range(9)}


def test_more_instances_than_cells_leave_the_smallest_black():
    masks = boxes(10, 20, (0, 0, 3, 3), (0, 10, 2, 12), (5, 0, 9, 4), (5, 10, 10, 20), (0, 19, 1, 20), (9, 0, 10, 1))
    picture = color_map(masks, 2)
    assert cell_of(picture, masks[4], 2) is None and cell_of(picture, masks[5], 2) is None
    assert as_set(instances(picture, 2)) == as_set(masks[:4])


def test_overlaps_empty_masks_and_crowds():
    large, small, empty = boxes(20, 20, (0, 0, 20, 10), (5, 5, 10, 15), (0, 0, 0, 0))
    for order in ([large, small, empty], [empty, small, large]):
        picture = color_map(np.stack(order), 4)
        assert as_set(instances(picture, 4)) == as_set([large & ~small, small])  # the smaller lies on top
    for none in (np.zeros((0, 5, 7), bool), np.zeros((3, 5, 7), bool)):
        picture = color_map(none, 4)
        assert picture.shape == (5, 7, 3) and not picture.any() and instances(picture, 4).shape == (0, 5, 7)
    hidden = np.stack([boxes(4, 4, (0, 0, 2, 2))[0]] * 2)  # twice the same: the second covers the first
    assert len(instances(color_map(hidden, 2), 2)) == 1
    is_crowd = np.array([False, True, False])  # a crowd is left out by whoever calls
    assert as_set(instances(color_map(np.stack([large, small, empty])[~is_crowd], 4), 4)) == as_set([large])


def test_noise_is_read_as_the_nearest_color():
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 5, (6, 8)).repeat(10, 0).repeat(10, 1)
    masks = owner == np.arange(4)[:, None, None]
    picture = color_map(masks, 8).astype(int)
    noisy = np.clip(picture + rng.integers(-20, 21, picture.shape), 0, 255).astype(np.uint8)
    assert as_set(instances(noisy, 8)) == as_set(masks)
    spot = noisy.copy()
    spot[0, :3] = palette(8)[60]
    assert len(instances(spot, 8)) == 5
    assert len(instances(spot, 8, least=4)) == 4


def test_a_resized_map_gets_no_new_instances():
    masks = boxes(16, 16, (2, 2, 8, 14), (8, 2, 14, 14))
    picture = color_map(masks, 8)
    back = instances(picture, 8, size=(48, 64))
    assert back.shape == (2, 48, 64)
    for mask, wanted in zip(sorted(back, key=lambda m: m[:24].sum()), masks[::-1]):
        wanted = wanted.repeat(3, 0).repeat(4, 1)
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9
    assert np.array_equal(instances(picture, 8, size=(16, 16)), instances(picture, 8))


def test_between_two_instances_no_third_one_appears():
    colors = palette(8).astype(int)
    a, b, c = next((a, b, c) for a in range(1, 65) for b in range(a + 1, 65) for c in range(1, 65)
                   if abs(colors[a] + colors[b] - 2 * colors[c]).max() <= 2 and c not in (a, b))  # c lies between
    owner = np.full((16, 16), a)
    owner[:, 8:], owner[12:, :4] = b, c
    masks = instances(palette(8)[owner], 8, size=(96, 96))
    third = masks[sorted((a, b, c)).index(c)]
    assert len(masks) == 3 and third[80:, :16].all() and not third[:, 30:].any()
    small = instances(palette(8)[owner.repeat(4, 0).repeat(4, 1)], 8, size=(16, 16))
    assert len(small) == 3 and small.sum(0).all()


@pytest.mark.parametrize("masks,grid", [(np.zeros((4, 4), bool), 8), (np.zeros((1, 4, 4), np.uint8), 8),
                                        (np.zeros((1, 0, 4), bool), 8), (np.zeros((1, 4, 4), bool), 0)])
def test_what_is_no_set_of_masks(masks, grid):
    with pytest.raises(ValueError, match="expected masks bool"):
        color_map(masks, grid)
    with pytest.raises(ValueError, match="expected a picture uint8"):
        instances(masks, 8)
