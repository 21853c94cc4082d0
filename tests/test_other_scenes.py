"""other_scenes.py: its shapes by points that are worked out by hand, its phrases by what is in the picture."""

import numpy as np
import other_scenes
import pytest
from scenes import COLORS, SHAPES, measure


@pytest.mark.parametrize("kind, inside, outside", [
    ("circle", [(0, 0.9), (0.6, 0.6)], [(0.7, 0.7)]), ("ring", [(0, 0.7), (-0.7, 0)], [(0, 0), (0.3, 0.3), (0, 1)]),
    ("square", [(0.7, 0.7), (-0.7, 0.7)], [(0.8, 0)]), ("cross", [(0.9, 0.2), (-0.2, -0.9)], [(0.5, 0.5)]),
    ("triangle", [(0, -0.9), (0.7, 0.45)], [(0.7, -0.2), (0, 0.6)]), ("heart", [(0, 0.5), (0.5, -0.3)], [(0, -0.6)]),
    ("hexagon", [(0, -0.95), (0.8, 0)], [(0.9, 0), (0.5, -0.9)]),
    ("star", [(0, -0.9), (0.8, -0.27)], [(0.5, -0.8), (0, 0.6)]),  # a notch is opposite to each tip
])
def test_shapes_by_hand(kind, inside, outside):
    signs = [[other_scenes.distance(kind, np.array(x), np.array(y)) for x, y in points] for points in (inside, outside)]
    assert max(signs[0]) < 0 < min(signs[1])


@pytest.mark.parametrize("style", [name for name in other_scenes.STYLES if name != "3000 px"])
def test_phrases_are_true_and_absent_ones_are_not(style):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        image, owner, shapes = other_scenes.draw(other_scenes.STYLES[style], rng)
        assert image.size == owner.shape[::-1] and (owner.max() == len(shapes) - 1) and shapes
        assert style in ("tiny", "64 px") or measure(owner, shapes)  # nothing is hidden
        pairs = {(s.color, s.kind) for s in shapes}
        for kind, phrase in other_scenes.absent_phrases(shapes, rng).items():
            _, color, *words = phrase.split()
            assert color in COLORS and words[0] in SHAPES
            assert kind == "relation" or (color, words[0]) not in pairs
        for _, indices in other_scenes.phrase_kinds(shapes, *owner.shape, rng).values():
            assert set(indices) <= set(range(len(shapes))) and indices
