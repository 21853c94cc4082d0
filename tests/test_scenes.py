"""The drawn world: its phrases against a second reader, its masks against the pixels."""

import re

import numpy as np
import pytest
from scipy import ndimage

from data import TEMPLATES, Scenes, instruct, load_dataset
from scenes import (
    ABSENT, NOVEL, RICH_COLORS, RICH_SHAPES, SHAPES, WORLDS, absent_phrases, draw_scene, patch_truth, patch_view,
    scene_phrases, scene_questions, vocabulary,
)
from tokenizer import TextTokenizer
from weights import ASSETS


@pytest.fixture(scope="module")
def drawn():
    """The first scenes that are trained on: (owner, objects) of each."""
    dataset = Scenes("train")
    return [dataset.scene(i)[1:3] for i in range(150)]


def test_the_plain_world_stays_as_it_was():
    """So that figures of different dates can be compared: phrases and pixels of the first test scenes."""
    dataset = Scenes("test", "scenes-plain")
    assert [(dataset[i].phrase, int(dataset[i].mask.sum())) for i in range(12)] == [
        ("a cell of a honeycomb", 3014), ("everything yellow", 9718), ("orange hexagons", 2316), ("the green one", 496),
        ("blue circle", 2296), ("purple things", 1890), ("a green triangle", 6858), ("the leftmost shape", 749),
        ("purple things", 2394), ("triangles", 1037), ("blue circle", 5680), ("all crosses", 1213)]


def same(a, b):
    return (a.phrase, a.id, a.task) == (b.phrase, b.id, b.task) and (a.mask == b.mask).all() and a.image == b.image


def test_example_depends_on_split_and_index_alone():
    one, two = Scenes("train", phrases=3), Scenes("train", phrases=3)
    backwards = {i: two[i] for i in reversed(range(12))}
    assert all(same(one[i], backwards[i]) for i in range(12))
    assert not same(Scenes("val")[5], Scenes("test")[5])
    assert not same(Scenes("val")[5], Scenes("val", "scenes-rich")[5])


def test_examples_are_well_formed():
    for name, world in WORLDS.items():
        dataset = Scenes("test", name)
        for i in range(60):
            example = dataset[i]
            assert example.image.mode == "RGB" and example.image.size == example.mask.shape[::-1]
            assert example.mask.dtype == bool and example.mask.any()
            assert example.task in ("semantic", "referring", "reasoning")
            _, owner, objects, _ = dataset.scene(i)
            assert 1 <= len(objects) <= max(world.most_objects)
            assert set(np.unique(owner)) - {-1} == set(range(len(objects)))


def test_novel_pairs_are_kept_for_the_novel_split(drawn):
    assert not any((o.color, o.kind) in NOVEL for _, objects in drawn for o in objects)
    for split in ("val", "test"):
        dataset = Scenes(split)
        assert not any((o.color, o.kind) in NOVEL for i in range(60) for o in dataset.scene(i)[2])
    novel = Scenes("novel")
    for i in range(60):
        _, owner, objects, picked = novel.scene(i)
        assert (objects[0].color, objects[0].kind) in NOVEL
        assert 0 in picked[0][3]  # the phrase names it
        assert (novel[i].mask & (owner == 0)).any()


def matching(phrase, objects):
    """Independent reading of the always-understood phrases: which objects does `phrase` name? None: not one of them."""
    words = [w for w in phrase.split() if w not in ("the", "a", "an", "all")]
    colors, kinds = RICH_COLORS, RICH_SHAPES
    names = {name: kind for kind in kinds for name in (kind, kind + "s", kind + "es")}
    if len(words) == 1 and words[0] in names:
        return {i for i, o in enumerate(objects) if o.kind == names[words[0]]}
    if len(words) == 2 and words[0] in colors and words[1] in names:
        return {i for i, o in enumerate(objects) if (o.color, o.kind) == (words[0], names[words[1]])}
    if len(words) == 2 and words[0] == "everything" and words[1] in colors:
        return {i for i, o in enumerate(objects) if o.color == words[1]}
    ends = {"leftmost": (0, min), "rightmost": (0, max), "topmost": (1, min), "bottommost": (1, max)}
    if len(words) == 2 and words[0] in ends and words[1] in ("object", "shape"):
        axis, pick = ends[words[0]]
        middle = [center(o)[axis] for o in objects]
        return {middle.index(pick(middle))}
    return None


def center(shape):
    return (shape.box[0] + shape.box[2]) / 2, (shape.box[1] + shape.box[3]) / 2


def matching_more(phrase, objects, extent):
    """The same for phrases of several objects, of order and of corners; extent: (width, height)."""
    everything = set(range(len(objects)))
    if " and " in phrase:
        one, other = (matching(part, objects) for part in phrase.split(" and "))
        return one | other
    for word in ("everything but ", "everything except "):
        if phrase.startswith(word):
            return everything - matching(phrase.removeprefix(word), objects)
    words = phrase.split()
    if " from the " in phrase:
        noun, side = " ".join(words[2:-3]), words[-1]
        of_noun = everything if noun in ("object", "shape") else matching(noun, objects)
        if of_noun is None:  # "red object"
            of_noun = matching(f"everything {words[2]}", objects)
        key = {"left": lambda i: center(objects[i])[0], "right": lambda i: -center(objects[i])[0],
               "top": lambda i: center(objects[i])[1], "bottom": lambda i: -center(objects[i])[1]}[side]
        return {sorted(of_noun, key=key)[("first", "second", "third").index(words[1])]}
    if words[-1] == "corner" and words[1] in ("object", "shape"):
        ends = [extent[0] * (words[-2] == "right"), extent[1] * (words[-3] == "bottom")]
        reach = [max(abs(c - end) / size for c, end, size in zip(center(o), ends, extent)) for o in objects]
        return {reach.index(min(reach))}
    if phrase in ("the two biggest shapes", "the two smallest objects"):
        order = sorted(everything, key=lambda i: objects[i].area, reverse="biggest" in phrase)
        return set(order[:2])
    if words[1:3] == ["object", "inside"]:
        ring = matching(" ".join(words[3:]), objects)
        if ring is None:  # "the red object"
            return None
        (ring,) = ring
        left, top, right, bottom = objects[ring].box
        return {i for i, o in enumerate(objects) if i != ring and left < o.box[0] and top < o.box[1]
                and o.box[2] < right and o.box[3] < bottom and abs(center(o)[0] - center(objects[ring])[0]) < 10}
    return None


def test_phrases_of_order_place_and_several_objects(drawn):
    seen = set()
    for owner, objects in drawn:
        for group, phrases in scene_phrases(objects, *owner.shape).items():
            for phrase, _, _, indices in phrases if group in ("and", "but", "ordinal", "corner", "several", "inside") \
                    else ():
                wanted = matching_more(phrase, objects, owner.shape[::-1])
                if wanted is not None:
                    assert set(indices) == wanted, (phrase, [(o.color, o.kind, o.box) for o in objects])
                    seen.add(group)
    assert seen == {"and", "but", "ordinal", "corner", "several", "inside"}


def test_absent_phrases_name_nothing_that_is_there(drawn):
    seen, rng = set(), np.random.default_rng(0)
    for owner, objects in drawn:
        colors, kinds = {o.color for o in objects}, {o.kind for o in objects}
        true = {phrase for group in scene_phrases(objects, *owner.shape).values() for phrase, *_ in group}
        for kind, (phrase, _, _, indices) in absent_phrases(objects, WORLDS["scenes"], *owner.shape, rng).items():
            assert indices == () and phrase not in true
            assert not matching(phrase, objects)
            words = phrase.split()
            assert not any((a, b) in NOVEL for a, b in zip(words, words[1:]))
            if kind == "neither":
                assert not colors & set(words) and not kinds & set(words)
            if kind == "relation":
                places = " (?:to the )?(?:left of|right of|above|below) the "
                first, other = re.split(places, phrase.removeprefix("the "))
                assert all(any(name in (o.kind, f"{o.color} {o.kind}") for o in objects) for name in (first, other))
            seen.add(kind)
    assert seen == set(ABSENT)


def test_absent_split_and_share():
    dataset = Scenes("absent")
    for i in range(40):
        example = dataset[i]
        assert not example.mask.any() and example.task == "referring"
    asked = [phrase for i in range(150) for phrase in Scenes("train", phrases=8).scene(i)[3]]
    assert 0.15 < np.mean([phrase[3] == () for phrase in asked]) < 0.25
    assert all(Scenes("test")[i].mask.any() for i in range(60))


def test_vocabulary_is_what_the_phrases_have(drawn):
    world, seen = WORLDS["scenes"], set()
    names, words = vocabulary(world)
    rng = np.random.default_rng(0)
    for owner, objects in drawn:
        for group in scene_phrases(objects, *owner.shape).values():
            seen |= {word for phrase, *_ in group for word in phrase.split()}
        for phrase, *_ in absent_phrases(objects, world, *owner.shape, rng).values():
            seen |= set(phrase.split())
    assert seen <= set(words) and len(set(words) - seen) <= 2 and set(names) <= set(words)


def test_a_lone_object_is_every_extreme(drawn):
    owner, objects = next(scene for scene in drawn if len(scene[1]) == 1)
    extremes = {p[0] for p in scene_phrases(objects, *owner.shape)["extreme"]}
    assert {f"the {w} object" for w in ("leftmost", "rightmost", "topmost", "bottommost")} <= extremes


def test_extremes_agree_by_centre_and_by_edge(drawn):
    seen = 0
    for owner, objects in drawn:
        for phrase, _, _, (target,) in scene_phrases(objects, *owner.shape)["extreme"]:
            if phrase == "the leftmost object":
                seen += 1
                assert all(o.box[0] >= objects[target].box[0] for o in objects)
            if phrase == "the bottommost object":
                assert all(o.box[3] <= objects[target].box[3] for o in objects)
    assert seen > 50


def test_phrases_name_what_a_second_reader_says(drawn):
    checked = 0
    for i, (owner, objects) in enumerate(drawn[:60]):
        for group in scene_phrases(objects, *owner.shape).values():
            for phrase, task, _, indices in group:
                wanted = matching(phrase, objects)
                if wanted is not None:
                    assert set(indices) == wanted, (i, phrase)
                    checked += 1
                assert task != "referring" or len(indices) == 1, phrase
    assert checked > 1000


def test_relations_and_sizes_hold_with_a_margin(drawn):
    seen = set()
    for owner, objects in drawn:
        ys, xs = np.mgrid[: owner.shape[0], : owner.shape[1]]
        groups = scene_phrases(objects, *owner.shape)
        for phrase, _, _, (target,) in groups["relation"]:
            for word, axis, sign in (("left of", xs, -1), ("right of", xs, 1), ("above", ys, -1), ("below", ys, 1)):
                if f" {word} " in phrase:
                    other = phrase.split(f"{word} the ")[1]
                    names = [(o.kind, f"{o.color} {o.kind}", f"{o.color} object") for o in objects]
                    anchors = [k for k, nouns in enumerate(names) if other in nouns]
                    assert len(anchors) == 1
                    centre = [(axis[owner == k].min() + axis[owner == k].max()) / 2 for k in (target, anchors[0])]
                    assert sign * (centre[0] - centre[1]) > 0.1 * owner.shape[1 if axis is xs else 0], phrase
                    seen.add(word)
        for phrase, _, _, (target,) in groups["size"]:
            if phrase in ("the biggest object", "the smallest object"):
                areas = [(owner == k).sum() for k in range(len(objects))]
                assert areas[target] == (max if "biggest" in phrase else min)(areas)
                seen.add(phrase)
    assert seen == {"left of", "right of", "above", "below", "the biggest object", "the smallest object"}


def test_masks_are_the_visible_pixels():
    # On a flat background without grain a pixel differs from it exactly where an object is, but for soft edges.
    checked = 0
    for seed in range(200):
        picture, owner, objects = draw_scene(np.random.default_rng(seed), WORLDS["scenes-plain"])
        flat = [tuple(c) for c in (picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1])]
        if len(set(flat)) > 1 or (owner[[0, 0, -1, -1], [0, -1, 0, -1]] >= 0).any():
            continue
        other = (picture != flat[0]).any(2)
        if other.mean() > (owner >= 0).mean() + 0.15:  # noise or grain that happened to agree in the corners
            continue
        solid = ndimage.binary_erosion(owner >= 0, iterations=1, border_value=1)
        near = ndimage.binary_dilation(owner >= 0, iterations=2)
        assert other[solid].mean() > 0.99 and other[~near].mean() < 0.01, seed
        checked += 1
    assert checked > 10


def test_every_phrase_fits_the_text_length():
    tokenizer = TextTokenizer(ASSETS / "text.model", 24)
    dataset = Scenes("train", "scenes-rich", phrases=6)
    for i in range(300):
        phrase = dataset[i].phrase
        assert not any(tokenizer.too_long(instruct(phrase, template)) for template in TEMPLATES)
    assert len(TEMPLATES) == 10


def test_patches_tell_what_the_picture_shows(drawn):
    world = WORLDS["scenes"]
    names = [*world.colors, *world.shapes, "any"]
    for owner, objects in drawn[:20]:
        patches, share = patch_view(owner, len(objects), grid=6)
        truth = patch_truth(patches, share, owner, objects, world)
        assert patches.shape == (36, 256) and share.shape == (36, len(objects)) and truth.shape == (36, 17 + 3 + 64 + 1)
        things, places, cover, there = np.split(truth, [17, 20, 84], axis=1)
        for patch in range(36):
            seen = {i for i in range(len(objects)) if (patches[patch] == i).sum() > 0.02 * 256}
            wanted = {name for i in seen for name in (objects[i].color, objects[i].kind, "any")}
            assert {name for name, value in zip(names, things[patch]) if value} == wanted
            assert bool(there[patch]) == bool(seen)
            if seen:  # the largest, whose centre is told from the patch's centre
                main = objects[max(range(len(objects)), key=lambda i: (patches[patch] == i).sum())]
                at = [(patch % 6 + 0.5) / 6 + places[patch, 0] / 4, (patch // 6 + 0.5) / 6 + places[patch, 1] / 4]
                assert np.allclose(np.multiply(at, owner.shape[::-1]), center(main), atol=1e-3)
                assert np.isclose(0.15 * np.exp(places[patch, 2]) * min(owner.shape), main.radius, rtol=1e-4)
                assert np.isclose(cover[patch].mean(), (patches[patch] == objects.index(main)).mean(), atol=1e-6)


def test_questions_have_the_answers_of_the_picture():
    """Found again from the list of objects by the words of the question alone."""
    dataset, seen, kinds = Scenes("train"), set(), {"objects": None, **{f"{kind}s": kind for kind in SHAPES}}
    kinds |= {"crosses": "cross", "object": None} | {kind: kind for kind in SHAPES}
    for i in range(40):
        _, owner, objects, _ = dataset.scene(i)
        height, width = owner.shape

        def fitting(noun, objects=objects):
            *color, kind = noun.split()
            return [o for o in objects if o.color in (color or [o.color]) and o.kind == (kinds[kind] or o.kind)]

        def middle(o, size=(width, height)):
            return (o.box[0] + o.box[2]) / 2 / size[0], (o.box[1] + o.box[3]) / 2 / size[1]

        for kind, questions in scene_questions(objects, dataset.world, height, width).items():
            seen.add(kind)
            for question, answer, which in questions:
                assert not any(f"{color} {shape}" in question for color, shape in NOVEL)
                assert bool(which) == ("<mask>" in answer)
                if kind == "count":
                    assert answer == f"{len(fitting(re.fullmatch('how many (.*) are there.', question)[1]))}."
                elif kind in ("yes", "no"):
                    there = fitting(re.match(r"is there an? (.*?)\?", question)[1])
                    assert answer.startswith("yes" if there else "no") and kind == ("yes" if there else "no")
                    assert not which or [objects[k] for k in which] == there
                elif kind == "relation":
                    words, noun = re.fullmatch(r"what is (.*?) the (.*)\?", question).groups()
                    (anchor,), axis = fitting(noun), 0 if "of" in words else 1
                    sign = 1 if words in ("right of", "below") else -1
                    (there,) = [o for o in objects if sign * (middle(o)[axis] - middle(anchor)[axis]) > 0.1]
                    assert re.fullmatch(f"an? {there.color} {there.kind}.", answer)
                elif "most object" in question and len(objects) > 1:
                    word = question.split()[4].removesuffix("?")
                    key = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}[word]
                    first = min(objects, key=lambda o: key[1] * middle(o)[key[0]])
                    assert answer == f"{first.color if kind == 'color' else first.kind}."
    assert seen == {"count", "color", "shape", "yes", "no", "relation"}


def test_half_of_the_conversations_are_questions():
    dataset = load_dataset("scenes-questions", "train", phrases=4)
    talks = [dataset[i] for i in range(400)]
    asked = sum(talk.messages[0].endswith("?") for talk in talks)
    assert 160 < asked < 240
    for talk in talks:
        assert len(talk.masks) == talk.messages[1].count("<mask>") and all(mask.any() for mask in talk.masks)
