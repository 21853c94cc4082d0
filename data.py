"""Examples (picture, phrase, mask) and the batches made of them.

`scenes` is the embedded data set: drawn shapes with phrases whose masks are known exactly, what
Shakespeare is to nanoGPT. It needs no download and never ends.

    python data.py preview scenes          # a contact sheet: picture, phrase, mask
    python data.py download NAME           # official weights, into weights/NAME

Legend: H W a picture's own height and width, S the side of the square that the model sees, P phrases per
picture, B phrases in a batch. Masks are bool (H, W), True on the object.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------
# Example: what every data set yields


@dataclass
class Example:
    """One picture, one phrase, one mask. DESIGN: the front door of every data set."""

    image: Image.Image  # RGB, any size
    phrase: str  # the bare label or expression, without an instruction around it
    mask: np.ndarray  # bool (H, W) at the picture's own size
    id: str  # unique in its split; holds the data set's own picture id
    task: str  # "semantic" | "referring" | "reasoning"
    label: str | None = None  # the class name, for mIoU
    ignore: np.ndarray | None = None  # bool (H, W): pixels that are not scored


# The paper's example is the first; the paper says there are ten and does not print the others.
TEMPLATES = (
    "Produce a segmentation mask for {}.",
    "Segment {}.",
    "Please segment {} in this picture.",
    "Generate the mask of {}.",
    "Where is {}?",
    "Show me {}.",
    "Find {} in the image.",
    "Can you outline {}?",
    "Mark every pixel of {}.",
    "Please give the mask for {}.",
)
_DETERMINERS = ("the", "a", "an", "all", "every", "everything", "something", "what", "whatever")


def instruct(phrase, template):
    """Put `phrase` into an instruction `template`; a bare class name gets the paper's "the" before it."""
    if phrase.split()[0].lower() not in _DETERMINERS:
        phrase = "the " + phrase
    return template.format(phrase)


# ----------------------------------------------------------------------------------------------------------
# scenes: the vocabulary

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "hexagon")
# name: hue in degrees, saturation, value. Ranges are wide on purpose: they hold the usual RGB of each name.
COLORS = {
    "red": ((-12, 10), (0.72, 1.0), (0.6, 1.0)),
    "green": ((85, 155), (0.5, 1.0), (0.4, 0.95)),
    "blue": ((205, 245), (0.6, 1.0), (0.5, 1.0)),
    "yellow": ((48, 64), (0.6, 1.0), (0.85, 1.0)),
    "purple": ((262, 302), (0.5, 1.0), (0.4, 0.85)),
    "orange": ((20, 40), (0.75, 1.0), (0.85, 1.0)),
    "cyan": ((170, 192), (0.55, 1.0), (0.75, 1.0)),
    "pink": ((315, 355), (0.22, 0.6), (0.9, 1.0)),
}
RICH_SHAPES = SHAPES + ("diamond", "crescent", "arrow")
RICH_COLORS = COLORS | {
    "brown": ((18, 30), (0.5, 0.8), (0.3, 0.5)),
    "white": ((0, 360), (0.0, 0.05), (0.93, 1.0)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.12)),
    "gray": ((0, 360), (0.0, 0.05), (0.4, 0.65)),
}
# Pairs that train, val and test never show; the split `novel` always asks for one of them.
NOVEL = {("red", "hexagon"), ("green", "ring"), ("blue", "cross"), ("yellow", "triangle"),
         ("purple", "square"), ("orange", "heart"), ("cyan", "star"), ("pink", "circle")}  # fmt: skip

# Reasoning phrases name neither the shape nor the colour.
SHAPE_RIDDLES = {
    "circle": ("something round like the full moon", "something shaped like a coin", "what a ball looks like"),
    "square": ("the shape with four equal sides", "something shaped like a box"),
    "triangle": ("the shape with three sides", "the shape with three corners", "something like a slice of pizza"),
    "star": ("something that twinkles at night", "what a sheriff wears", "the shape with five points"),
    "heart": ("a sign of love", "something for valentine's day"),
    "cross": ("a plus sign", "the sign of first aid", "what stands between two numbers to add"),
    "ring": ("something to wear on a finger", "the shape with a hole", "something like a donut"),
    "hexagon": ("the shape with six sides", "the shape with six corners", "a cell of a honeycomb"),
    "diamond": ("a kite without a tail", "the suit of cards that looks like a gem"),
    "crescent": ("the moon when it is not full", "something shaped like a banana"),
    "arrow": ("something that shows the way", "what an archer shoots"),
}
COLOR_RIDDLES = {
    "red": ("whatever has the color of blood", "whatever has the color of a ripe tomato"),
    "green": ("whatever has the color of grass", "whatever has the color of leaves"),
    "blue": ("whatever has the color of the deep sea", "whatever has the color of jeans"),
    "yellow": ("whatever has the color of a lemon", "whatever has the color of the sun"),
    "purple": ("whatever has the color of grapes", "whatever has the color of an eggplant"),
    "orange": ("whatever has the color of a carrot", "whatever has the color of a pumpkin"),
    "cyan": ("whatever has the color of turquoise", "whatever has the color of a swimming pool"),
    "pink": ("whatever has the color of a flamingo", "whatever has the color of bubble gum"),
    "brown": ("whatever has the color of chocolate", "whatever has the color of wood"),
    "white": ("whatever has the color of snow", "whatever has the color of milk"),
    "black": ("whatever has the color of coal", "whatever is as dark as night"),
    "gray": ("whatever has the color of ash", "whatever has the color of concrete"),
}


def plural(shape):
    """English plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


# ----------------------------------------------------------------------------------------------------------
# scenes: drawing


@dataclass
class Shape:
    """One drawn object; x, y, radius in pixels, area in visible pixels."""

    kind: str
    color: str
    x: float
    y: float
    radius: float
    fill: str = "plain"  # rich scenes also have "striped" and "dotted"
    area: int = 0
    box: tuple = (0, 0, 0, 0)  # of the visible pixels: left, top, right, bottom


def _regular(n, inner=None, start=-90.0):
    """Points of a regular polygon of n corners on the unit circle, or of a star with radius `inner`."""
    count = n if inner is None else 2 * n
    angle = np.radians(start + 360.0 / count * np.arange(count))
    radius = np.ones(count)
    if inner is not None:
        radius[1::2] = inner
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def outline(kind, rng):
    """Outline of a shape within the unit circle, y down: (points (n, 2), points of a hole or None)."""
    if kind == "circle":
        return _regular(48), None
    if kind == "square":
        return _regular(4, start=45), None
    if kind == "triangle":
        return _regular(3), None
    if kind == "star":
        return _regular(5, inner=rng.uniform(0.38, 0.5)), None
    if kind == "hexagon":
        return _regular(6, start=rng.choice([0, 30])), None
    if kind == "ring":
        return _regular(48), _regular(48) * rng.uniform(0.5, 0.68)
    if kind == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 17, None
    if kind == "cross":
        a, b = 0.95, rng.uniform(0.28, 0.38)
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                         (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]), None  # fmt: skip
    if kind == "diamond":
        return _regular(4) * (rng.uniform(0.55, 0.75), 1.0), None
    if kind == "crescent":  # the outer arc, then back along an arc that is set off to the right
        t = np.radians(np.linspace(50, 310, 40))
        edge = np.stack([np.cos(t), np.sin(t)], 1)
        back = edge[::-1] * (rng.uniform(0.35, 0.55), 1.0)
        return np.concatenate([edge, back + (edge[-1] - back[0])]), None
    if kind == "arrow":
        b = rng.uniform(0.2, 0.3)
        return np.array([(1, 0), (0.2, -0.75), (0.2, -b), (-1, -b), (-1, b), (0.2, b), (0.2, 0.75)]), None
    raise ValueError(f"unknown shape {kind!r}: choose one of {', '.join(RICH_SHAPES)}")


SUPERSAMPLE = 4


def _coverage(points, hole, left, top, width, height):
    """Share of each pixel inside the outline: float32 (height, width) in [0, 1], for the box at (left, top)."""
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for outline_points, value in ((points, 255), (hole, 0)):
        if outline_points is not None:
            corners = (outline_points - (left, top)) * SUPERSAMPLE - 0.5
            draw.polygon([tuple(p) for p in corners.tolist()], fill=value)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255.0


def _hsv_to_rgb(hue, saturation, value):
    """Degrees, [0, 1], [0, 1] -> float32 (3,) in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60.0) % 6.0
    return (value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)).astype(np.float32)


def _background(height, width, rng):
    """A picture to draw on: float32 (H, W, 3) in [0, 1], of low saturation; flat, gradient, noisy or blotchy."""

    def tone():
        return _hsv_to_rgb(rng.uniform(0, 360), rng.uniform(0, 0.2), rng.uniform(0.05, 1.0))

    base = tone()
    style = rng.choice(["flat", "gradient", "noisy", "blotchy"])
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = base
    if style == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (np.cos(angle) * np.linspace(-1, 1, width)[None, :]
                + np.sin(angle) * np.linspace(-1, 1, height)[:, None])  # fmt: skip
        ramp = ((ramp - ramp.min()) / np.ptp(ramp)).astype(np.float32)[..., None]
        picture += ramp * (tone() - base)
    elif style == "noisy":
        picture += rng.uniform(0.03, 0.15) * rng.standard_normal((height, width, 1), np.float32)
    elif style == "blotchy":
        for _ in range(int(rng.integers(1, 4))):
            cells = int(rng.integers(2, 24))
            patch = rng.integers(0, 256, (cells, cells, 3), np.uint8)
            blotch = Image.fromarray(patch).resize((width, height), Image.Resampling.BICUBIC)
            picture += rng.uniform(0.05, 0.25) * (np.asarray(blotch, np.float32) / 255.0 - 0.5)
    return np.clip(picture, 0, 1, out=picture)


def _pattern(fill, height, width, rng):
    """Where the second colour of a striped or dotted object goes: float32 (height, width) in [0, 1]."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 9)
    y, x = np.mgrid[:height, :width]
    u = (np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period)
    v = (np.cos(angle) * y - np.sin(angle) * x) * (2 * np.pi / period)
    wave = np.sin(u) if fill == "striped" else np.sin(u) + np.sin(v) - 1.0
    return np.clip(wave * 2 + 0.5, 0, 1).astype(np.float32)


def _clutter(picture, rng):
    """Thin lines and specks that no phrase names, drawn in place."""
    image = Image.fromarray((picture * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    height, width = picture.shape[:2]
    for _ in range(int(rng.integers(2, 10))):
        x0, x1 = rng.uniform(0, width, 2)
        y0, y1 = rng.uniform(0, height, 2)
        color = tuple(rng.integers(0, 256, 3).tolist())
        if rng.random() < 0.5:
            draw.line((x0, y0, x1, y1), fill=color)
        else:
            draw.ellipse((x0, y0, x0 + 3, y0 + 3), fill=color)
    picture[:] = np.asarray(image, np.float32) / 255.0


def _place(radius, width, height, others, rng):
    """A centre for an object of `radius` px that does not bury, and is not buried by, the ones drawn before."""
    for _ in range(20):
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        # 0.75 of the summed radii lets neighbours overlap at the rim and keeps each one recognisable
        if all(np.hypot(x - o.x, y - o.y) > 0.75 * (radius + o.radius) for o in others):
            return x, y
    return None


def draw_scene(rng, novel=False, rich=False):
    """Draw one scene.

    Returns picture uint8 (H, W, 3), owner int8 (H, W): the object seen at each pixel or -1, and the list of
    Shape. With `novel`, object 0 is a colour-shape pair from NOVEL; without, no object is.
    """
    shapes, colors = (RICH_SHAPES, RICH_COLORS) if rich else (SHAPES, COLORS)
    color_names = tuple(colors)
    side, aspect = rng.uniform(120, 220), np.exp(rng.uniform(-0.5, 0.5))  # width : height from 0.6 to 1.65
    height, width = round(side / aspect**0.5), round(side * aspect**0.5)
    picture = _background(height, width, rng)
    if rich:
        _clutter(picture, rng)
    tint = picture.mean((0, 1))
    owner = np.full((height, width), -1, np.int8)

    objects = []
    novel_pairs = sorted(NOVEL)
    for index in range(int(rng.integers(1, 9 if rich else 6))):
        if novel and index == 0:
            color, kind = novel_pairs[rng.integers(len(novel_pairs))]
        else:
            while True:
                repeat = objects and rng.random() < 0.3  # look-alikes make "the large", "leftmost" mean something
                like = objects[rng.integers(len(objects))] if repeat else None
                color = like.color if repeat and rng.random() < 0.7 else color_names[rng.integers(len(colors))]
                kind = like.kind if repeat and rng.random() < 0.7 else shapes[rng.integers(len(shapes))]
                if novel or (color, kind) not in NOVEL:
                    break
        radius = min(height, width) * rng.uniform(0.13, 0.4)
        centre = _place(radius, width, height, objects, rng)
        if centre is None:  # no room: try it small, else leave it out
            radius = 0.13 * min(height, width)
            centre = _place(radius, width, height, objects, rng)
            if centre is None:
                continue
        shape = Shape(kind, color, *centre, radius)
        if rich:
            shape.fill = ("plain", "plain", "striped", "dotted")[rng.integers(4)]

        points, hole = outline(kind, rng)
        turn = np.radians(rng.uniform(-18, 18))
        matrix = radius * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        points = points @ matrix + centre
        hole = None if hole is None else hole @ matrix + centre
        left, top = np.maximum(np.floor(points.min(0)) - 1, 0).astype(int)
        right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (width, height))
        cover = _coverage(points, hole, left, top, right - left, bottom - top)

        rgb = _object_color(colors[color], tint, rng)
        region = picture[top:bottom, left:right]
        alpha = cover[..., None]
        paint = rgb
        if shape.fill != "plain":
            other = rgb * 0.35 if rgb.mean() > 0.4 else rgb * 0.5 + 0.5
            paint = rgb + _pattern(shape.fill, *cover.shape, rng)[..., None] * (other - rgb)
        elif rng.random() < 0.2:  # a little shading from top to bottom
            paint = rgb * np.linspace(*rng.uniform(0.8, 1.0, 2), len(cover), dtype=np.float32)[:, None, None]
        region += alpha * (paint - region)
        owner[top:bottom, left:right][cover >= 0.5] = len(objects)
        objects.append(shape)

    if rng.random() < 0.5:  # grain over everything
        picture += rng.uniform(0.005, 0.05) * rng.standard_normal((height, width, 1), np.float32)
    np.clip(picture, 0, 1, out=picture)
    picture *= 255
    picture += 0.5
    return picture.astype(np.uint8), owner, objects


def _object_color(ranges, tint, rng):
    """A colour within the ranges of its name that stands out from the background's mean `tint`."""
    for _ in range(10):
        rgb = _hsv_to_rgb(*(rng.uniform(low, high) for low, high in ranges))
        if np.abs(rgb - tint).max() > 0.25:
            break
    return rgb


# ----------------------------------------------------------------------------------------------------------
# scenes: phrases

EXTREMES = {  # word: (axis, sign) of the centre of an object's visible box
    "leftmost": (0, -1),
    "rightmost": (0, 1),
    "topmost": (1, -1),
    "bottommost": (1, 1),
}
RELATIONS = {  # words: (axis, sign) of the object's centre minus the other's
    ("left of", "to the left of"): (0, -1),
    ("right of", "to the right of"): (0, 1),
    ("above",): (1, -1),
    ("below",): (1, 1),
}


def _winner(values, clear):
    """Of {index: value} the index of the largest, if it is a clear winner: clear(best, second best); else None."""
    ranked = sorted(values, key=values.get, reverse=True)
    return ranked[0] if clear(values[ranked[0]], values[ranked[1]]) else None


def scene_phrases(objects, height, width):
    """Every phrase that fits the scene: {group: [(phrase, task, label, indices of its objects)]}.

    A class name, in any article or number ("circle", "the circles", "a red circle"), means every instance.
    Size, place and relation words pick exactly one object, with a margin that leaves no doubt.
    """
    groups = {name: [] for name in PHRASE_SHARE}
    everything = tuple(range(len(objects)))

    def add(group, phrases, task, label, indices):
        groups[group] += [(phrase, task, label, tuple(indices)) for phrase in phrases]

    def names_of(noun, nouns):  # of one thing or of several
        article = "an" if noun[0] in "aeiou" else "a"
        return (f"the {noun}", noun, f"the {nouns}", nouns, f"all {nouns}", f"{article} {noun}")

    named = {}  # what can stand after "the large", "the leftmost": noun -> indices
    for kind in sorted({s.kind for s in objects}):
        named[kind] = [i for i in everything if objects[i].kind == kind]
        task = "referring" if len(named[kind]) == 1 else "semantic"
        singular, bare, *rest = names_of(kind, plural(kind))
        add("shape", [singular], task, kind, named[kind])
        add("shape", [bare, *rest], "semantic", kind, named[kind])
        add("reasoning", SHAPE_RIDDLES[kind], "reasoning", None, named[kind])
    for color in sorted({s.color for s in objects}):
        indices = [i for i in everything if objects[i].color == color]
        named[f"{color} object"] = indices
        forms = (f"everything {color}", f"the {color} objects", f"all {color} shapes", f"{color} things")
        add("color", forms + forms[:1] * 2, "semantic", color, indices)
        if len(indices) == 1:
            add("color", (f"the {color} object", f"the {color} one"), "referring", color, indices)
        add("reasoning", COLOR_RIDDLES[color], "reasoning", None, indices)
        for kind in sorted({objects[i].kind for i in indices}):
            noun = f"{color} {kind}"
            named[noun] = [i for i in indices if objects[i].kind == kind]
            task = "referring" if len(named[noun]) == 1 else "semantic"
            singular, bare, *rest = names_of(noun, plural(noun))
            add("color shape", [singular, singular, singular], task, kind, named[noun])
            add("color shape", [bare, bare, *rest], "semantic", kind, named[noun])
    add("all", ("everything", "all objects", "the objects", "every shape"), "semantic", None, everything)
    for fill in ("striped", "dotted"):
        indices = [i for i in everything if objects[i].fill == fill]
        if indices:
            add("color", (f"everything {fill}", f"the {fill} objects"), "semantic", None, indices)

    centers = [((s.box[0] + s.box[2]) / 2, (s.box[1] + s.box[3]) / 2) for s in objects]
    named["object"] = everything
    named["shape"] = everything
    for word in EXTREMES if len(objects) == 1 else ():
        add("extreme", (f"the {word} object", f"the {word} shape"), "referring", None, everything)
    for noun, indices in named.items():
        if len(indices) == 1:
            alone = noun in ("object", "shape")
            if not alone and objects[indices[0]].radius > 0.28 * min(height, width):
                add("size", [f"the large {noun}", f"the big {noun}"], "referring", None, indices)
            elif not alone and objects[indices[0]].radius < 0.18 * min(height, width):
                add("size", [f"the small {noun}", f"the little {noun}"], "referring", None, indices)
            continue
        # A ring or a star has less area than a circle of its extent, so both must say the same.
        radii = {i: objects[i].radius for i in indices}
        biggest = _winner({i: objects[i].area for i in indices}, lambda a, b: a > 1.35 * b)
        if biggest is not None and biggest == _winner(radii, lambda a, b: a > 1.15 * b):
            add("size", [f"the {w} {noun}" for w in ("large", "big", "biggest", "largest")],
                "referring", None, [biggest])  # fmt: skip
        smallest = _winner({i: -objects[i].area for i in indices}, lambda a, b: 1.35 * a > b)
        if smallest is not None and smallest == _winner({i: -radii[i] for i in radii}, lambda a, b: 1.15 * a > b):
            add("size", [f"the {w} {noun}" for w in ("small", "little", "smallest")],
                "referring", None, [smallest])  # fmt: skip
        for word, (axis, sign) in EXTREMES.items():
            margin = 0.05 * (width, height)[axis]
            places = {i: sign * centers[i][axis] for i in indices}
            first = _winner(places, lambda best, second, margin=margin: best - second > margin)
            edges = {i: sign * objects[i].box[axis + (2 if sign > 0 else 0)] for i in indices}
            if first is not None and edges[first] == max(edges.values()):  # centre and edge agree
                add("extreme", [f"the {word} {noun}"], "referring", None, [first])

    for noun, indices in named.items():
        if noun in ("object", "shape"):
            continue
        for other, (anchor, *more) in named.items():
            if more or other in ("object", "shape") or anchor in indices:
                continue
            for words, (axis, sign) in RELATIONS.items():
                offsets = [sign * (centers[i][axis] - centers[anchor][axis]) for i in indices]
                extent = (width, height)[axis]
                inside = [i for i, offset in zip(indices, offsets) if offset > 0.12 * extent]
                unsure = [offset for offset in offsets if abs(offset) <= 0.12 * extent]
                if len(inside) == 1 and not unsure:
                    add("relation", [f"the {noun} {w} the {other}" for w in words], "referring", None, inside)
    return groups


# How often each group is asked, where the scene has a phrase of it.
PHRASE_SHARE = {"color shape": 0.30, "shape": 0.13, "color": 0.13, "extreme": 0.14, "size": 0.09,
                "relation": 0.07, "reasoning": 0.12, "all": 0.02}  # fmt: skip


def pick_phrases(objects, height, width, count, rng, must=None):
    """`count` phrases for a scene, different ones while there are; `must`: an object that each must name."""
    groups = scene_phrases(objects, height, width)
    if must is not None:
        groups = {g: [p for p in phrases if must in p[3]] for g, phrases in groups.items()}
    names = [g for g in groups if groups[g]]
    share = np.array([PHRASE_SHARE[g] for g in names])
    share /= share.sum()
    picked = []
    for _ in range(count):
        for _ in range(5):
            options = groups[names[rng.choice(len(names), p=share)]]
            choice = options[rng.integers(len(options))]
            if choice not in picked:
                break
        picked.append(choice)
    return picked


# ----------------------------------------------------------------------------------------------------------
# run-length encoding, as COCO stores masks: runs down the columns, the first one of background


def rle_encode(mask):
    """bool (H, W) -> {"size": [H, W], "counts": compressed COCO string}."""
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0] if len(flat) and flat[0] else [], changes, [len(flat)]]).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    return {"size": list(mask.shape), "counts": _pack_counts(counts.tolist())}


def rle_decode(rle):
    """COCO run-length encoding, compressed (str or bytes) or a plain list of counts -> bool (H, W).

    Raises ValueError where the counts do not fill the size.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    counts = np.asarray(counts if isinstance(counts, list) else _unpack_counts(counts), np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"run-length counts add up to {counts.sum()}, not to {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def _pack_counts(counts):
    """Counts -> COCO's string: from the fourth on the difference to the last but one, 5 bits a character."""
    out = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, rest = rest & 0x1F, rest >> 5
            more = rest != (-1 if bits & 0x10 else 0)  # done when the sign bit tells the rest
            out.append(chr(48 + bits + (0x20 if more else 0)))
    return "".join(out)


def _unpack_counts(text):
    """The inverse of _pack_counts."""
    counts, value, shift = [], 0, 0
    for code in text if isinstance(text, bytes) else text.encode("ascii"):
        code -= 48
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError("the run-length string ends in the middle of a count")
    return counts


# ----------------------------------------------------------------------------------------------------------
# pictures from files


def open_picture(source):
    """Open a picture of any kind as an upright 8-bit RGB PIL image; `source`: a path or a binary file.

    EXIF rotation is applied, transparency goes onto white, 16-bit grey is scaled to 8 bits.
    Raises FileNotFoundError, or ValueError with one line for a file that is no whole picture.
    """
    name = source if isinstance(source, (str, Path)) else "standard input"
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture") from None
    except IsADirectoryError:
        raise ValueError(f"{name}: a folder, not a picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a picture that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind for a damaged file
        raise ValueError(f"{name}: broken picture ({error})") from None
    return to_rgb(image)


def to_rgb(image):
    """PIL picture of any mode -> 8-bit RGB: transparency goes onto white, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        # I;16 has a known range; I and F do not say theirs
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0 if values.max() > 1 else 1.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top) + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------------------------------------
# to the square that the model sees


def resize_picture(image, size):
    """PIL picture -> uint8 (size, size, 3): PIL's bilinear, aspect ratio not kept, as SigLIP2 does it."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask, size):
    """bool (H, W) -> bool (size, size): True where bilinear interpolation gives at least one half.

    Paper: not stated. Nearest neighbour would shift every edge by up to half a pixel of the source at random,
    which alone costs 0.01 to 0.02 of IoU at 128 px and which no model can foresee.
    """
    image = Image.fromarray(mask.view(np.uint8) * 255).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image) >= 128


def to_pixels(pictures):
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


# ----------------------------------------------------------------------------------------------------------
# data sets


class Scenes:
    """Drawn scenes; example i is phrase i % P of picture i // P, and a function of (split, i) alone.

    split: "train" (a million pictures), "val", "test" (no colour-shape pair of NOVEL in any of the three) and
    "novel" (every phrase names an object of a NOVEL pair). rich: more of everything. phrases: P.
    """

    SPLITS = {"train": 1_000_000, "val": 2_000, "test": 2_000, "novel": 2_000}

    def __init__(self, split="train", rich=False, phrases=1):
        if split not in self.SPLITS:
            raise ValueError(f"scenes has no split {split!r}: choose one of {', '.join(self.SPLITS)}")
        self.split, self.rich, self.phrases = split, rich, phrases
        self._recent = OrderedDict()  # the last few scenes: the P phrases of a picture are asked in a row

    def __len__(self):
        return self.SPLITS[self.split] * self.phrases

    def scene(self, index):
        """Picture `index`: (PIL image, owner int8 (H, W), list of Shape, list of P picked phrases)."""
        if index not in self._recent:
            rng = np.random.default_rng([list(self.SPLITS).index(self.split), index, int(self.rich)])
            novel = self.split == "novel"
            while True:  # an object can end up almost hidden behind later ones: draw another scene
                picture, owner, objects = draw_scene(rng, novel=novel, rich=self.rich)
                if _measure(owner, objects):
                    break
            picked = pick_phrases(objects, *owner.shape, self.phrases, rng, must=0 if novel else None)
            self._recent[index] = Image.fromarray(picture), owner, objects, picked
            while len(self._recent) > 4:
                self._recent.popitem(last=False)
        return self._recent[index]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        image, owner, _, picked = self.scene(i // self.phrases)
        phrase, task, label, indices = picked[i % self.phrases]
        return Example(image, phrase, np.isin(owner, indices), f"{self.split}-{i:07d}", task, label)


def _measure(owner, objects):
    """Fill in each object's visible area and box; False if one is hidden by more than 60 % or below 24 px."""
    areas = np.bincount(owner.ravel() + 1, minlength=len(objects) + 1)[1:]
    for index, shape in enumerate(objects):
        shape.area = int(areas[index])
        if shape.area < 24 or shape.area < 0.4 * _full_area(shape):
            return False
        seen = owner == index
        rows, cols = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        shape.box = (int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1)
    return True


def _full_area(shape):
    """A rough area of the whole object in pixels, hidden part included."""
    share = {"circle": 3.1, "square": 2.0, "triangle": 1.3, "star": 1.2, "heart": 1.9, "cross": 1.8,
             "ring": 2.0, "hexagon": 2.6, "diamond": 1.2, "crescent": 0.9, "arrow": 1.2}  # fmt: skip
    return share[shape.kind] * shape.radius**2


def load_dataset(name, split, root=None, **options):
    """Open a data set: a sequence of Example. DESIGN lists the names; `scenes` takes rich= and phrases=.

    root: the folder in which the official archives were unpacked; `scenes` needs none.
    Raises ValueError for an unknown name, split or option.
    """
    if name != "scenes":
        raise ValueError(f"unknown data set {name!r}: choose one of scenes")
    unknown = set(options) - {"rich", "phrases"}
    if unknown:
        raise ValueError(f"scenes has no option {sorted(unknown)[0]!r}: it takes rich and phrases")
    return Scenes(split, **options)



# ----------------------------------------------------------------------------------------------------------
# batches


class Batches(torch.utils.data.Dataset):
    """Training micro-batches of one rank: item k is a function of (seed, k, rank) alone, so a run can stop
    and go on anywhere, on any number of workers, with no random state to keep.

    A batch (all ranks, all accumulation) is `batch_size` phrases; P phrases in a row share a picture, and the
    picture comes once. Two ranks never share an example; the union does not depend on how it is split.

    Items: text_ids (b, L), pixels float (b/P, 3, S, S) in [-1, 1], masks bool (b, m, m), hide bool (b, M), ids list
    of b strings; b = micro_batch_size, m = mask_size (default: S).
    """

    def __init__(self, dataset, text_tokenizer, size, tokens, batch_size, micro_batch_size, phrases=1,
                 rank=0, world_size=1, seed=0, hide=False, mask_size=None):  # fmt: skip
        if micro_batch_size < 1 or batch_size % (micro_batch_size * world_size) or micro_batch_size % phrases:
            raise ValueError(
                f"batch size {batch_size} must be a multiple of micro-batch size {micro_batch_size} x {world_size} "
                f"ranks, and the micro-batch size a multiple of {phrases} phrases a picture"
            )
        self.dataset, self.text_tokenizer, self.size, self.tokens = dataset, text_tokenizer, size, tokens
        self.mask_size = mask_size or size
        self.batch_size, self.micro_batch_size, self.phrases = batch_size, micro_batch_size, phrases
        self.rank, self.world_size, self.seed, self.hide = rank, world_size, seed, hide
        self.accumulation = batch_size // (micro_batch_size * world_size)  # micro-batches a rank, a step
        self._order = None, None  # epoch, permutation

    def __getitem__(self, k):
        step, micro = divmod(k, self.accumulation)
        first = step * self.batch_size + (micro * self.world_size + self.rank) * self.micro_batch_size
        text, pictures, masks, hidden, ids = [], [], [], [], []
        for position in range(first, first + self.micro_batch_size):
            rng = np.random.default_rng([self.seed, position])
            example = self.dataset[self._index(position)]
            choice = rng.integers(2 * len(TEMPLATES))  # half of the phrases bare, half through one of the templates
            text.append(instruct(example.phrase, TEMPLATES[choice]) if choice < len(TEMPLATES) else example.phrase)
            if position % self.phrases == 0:
                pictures.append(resize_picture(example.image, self.size))
            masks.append(resize_mask(example.mask, self.mask_size))
            # Share of the mask tokens that the model does not get to see as input (LlamaSeg.forward, `hide`):
            # none for a fifth of the examples, all for a fifth, anything between for the rest.
            share = rng.uniform(-0.33, 1.33) if self.hide else 0.0
            hidden.append(rng.random(self.tokens) < share)
            ids.append(example.id)
        return {
            "text_ids": self.text_tokenizer(text),
            "pixels": to_pixels(np.stack(pictures)),
            "masks": torch.from_numpy(np.stack(masks)),
            "hide": torch.from_numpy(np.stack(hidden)),
            "ids": ids,
        }

    def _index(self, position):
        """The example at a position of the endless training sequence: each epoch is a new order of pictures."""
        groups = len(self.dataset) // self.phrases
        epoch, group = divmod(position // self.phrases, groups)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(groups)
        return int(self._order[1][group]) * self.phrases + position % self.phrases


# ----------------------------------------------------------------------------------------------------------
# pictures for people


def contact_sheet(cells, path, columns=4, tile=112):
    """Write a PNG of cells; a cell is (caption, [tiles]) and a tile a PIL picture or a bool mask (H, W)."""
    font = ImageFont.load_default(11)
    count = max(len(tiles) for _, tiles in cells)
    width, height, gap = count * (tile + 2) + 10, tile + 24, 4
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, tiles) in enumerate(cells):
        x, y = gap + i % columns * width, gap + i // columns * height
        while font.getlength(caption) > width - 8:
            caption = caption[:-2].rstrip("… ") + "…"
        draw.text((x, y), caption, fill="black", font=font)
        for j, picture in enumerate(tiles):
            if not isinstance(picture, Image.Image):
                picture = Image.fromarray(picture.astype(np.uint8) * 255)
            picture = picture.convert("RGB")
            picture.thumbnail((tile, tile), Image.Resampling.BILINEAR)
            sheet.paste(picture, (x + j * (tile + 2), y + 16))
    write_picture(sheet, path)


def write_picture(image, path):
    """Save a PIL picture as PNG under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------
# downloads

_SIGLIP2_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                  "preprocessor_config.json", "special_tokens_map.json")  # fmt: skip

# our name: (repository of the Hugging Face hub, or bucket of Google Cloud Storage as gs://..., files)
DOWNLOADS = {
    "vq_ds16_c2i": ("FoundationVision/LlamaGen", ("vq_ds16_c2i.pt",)),
    "vq_ds16_t2i": ("peizesun/llamagen_t2i", ("vq_ds16_t2i.pt",)),
    **{f"siglip2-{size}-patch16-{side}": (f"google/siglip2-{size}-patch16-{side}", _SIGLIP2_FILES)
       for size in ("base", "large", "so400m") for side in (256, 384)},
    "janus-pro-1b": ("deepseek-ai/Janus-Pro-1B", ("config.json", "pytorch_model.bin", "tokenizer.json",
                     "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
                     "special_tokens_map.json")),
    "var-vq": ("FoundationVision/var", ("vae_ch160v4096z32.pth",)),
    "gemma-tokenizer": ("gs://big_vision", ("gemma_tokenizer.model",)),
    "paligemma-tokenizer": ("gs://big_vision", ("paligemma_tokenizer.model",)),
}  # fmt: skip


def address(place, file, revision="main"):
    """The URL of a file; a mirror may stand in for the hub (HF_ENDPOINT) or for the bucket (STORAGE_EMULATOR_HOST)."""
    if place.startswith("gs://"):
        host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
        return f"{host.rstrip('/')}/{place.removeprefix('gs://')}/{file}"
    return f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{place}/resolve/{revision}/{file}"


def sha256_of(path):
    """SHA-256 of a file as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class TryAgain(Exception):
    """A download that broke for a reason that may pass; `pause`: seconds that the server asked for."""

    def __init__(self, reason, pause=0.0):
        super().__init__(reason)
        self.pause = pause


def fetch(url, path, token=None, attempts=6, wait=1.0):
    """Download `url` to `path`: streamed to path.part, checked, then renamed. Returns its SHA-256.

    A stopped download goes on where it was, if the server's file is still the same one. Broken connections and the
    answers 429 and 5xx are tried again after wait, 2 wait, 4 wait ... seconds, `attempts` times without progress.
    Size: as the server announces it. Hash: the one recorded beside the file (path.sha256), else the hub's own for
    large files; without either it is recorded. A file that is already there is only checked.
    A proxy comes from the usual variables (HTTPS_PROXY). token: sent as a bearer token, for gated files.
    Raises OSError (network, disk) or ValueError (wrong size or hash), in one line.
    """
    import requests

    path = Path(path)
    part, record = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.sha256")
    recorded = record.read_text().split()[0] if record.exists() and record.read_text().strip() else None
    if path.exists():
        found = sha256_of(path)
        if recorded and found != recorded:
            raise ValueError(f"{path}: its SHA-256 is {found}, recorded was {recorded}: delete it and run this again, "
                             "or delete the .sha256 if the change is yours")  # fmt: skip
        write_text(record, f"{found}  {path.name}\n")
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, most = 0, 0
    with requests.Session() as session, tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        session.headers["Accept-Encoding"] = "identity"  # sizes and ranges are those of the file itself
        if token:
            session.headers["Authorization"] = f"Bearer {token}"
        while True:
            try:
                size, announced = receive(session, url, part, bar)
                break
            except (TryAgain, requests.RequestException) as error:
                if isinstance(error, ValueError):  # how requests says that this is no address at all
                    raise ValueError(f"{url}: {error}") from None
                reason, pause = str(error).splitlines()[0][:200], getattr(error, "pause", 0)
            came = part.stat().st_size if part.exists() else 0
            failures, most = (0 if came > most else failures) + 1, max(came, most)
            if failures >= attempts:
                raise OSError(f"{url}: gave up after {failures} attempts ({reason}); what came is kept: run this again")
            pause = max(pause, wait * 2 ** (failures - 1))
            tqdm.write(f"{path.name}: {reason}; again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    found, expected, came = sha256_of(part), recorded or announced, part.stat().st_size
    wrong = None
    if size is not None and came != size:
        wrong = f"{came:,} bytes came, expected {size:,}"
    elif expected and found != expected:
        wrong = f"its SHA-256 is {found}, expected {expected}"
    part.with_suffix(".etag").unlink(missing_ok=True)
    if wrong:
        part.unlink()
        raise ValueError(f"{url}: {wrong}: deleted, run this again")
    write_text(record, f"{found}  {path.name}\n")
    os.replace(part, path)
    return found


def receive(session, url, part, bar):
    """One attempt of `fetch`: appends what is missing to `part`; returns (size, SHA-256), None where not announced."""
    tag = part.with_suffix(".etag")  # of the file that `part` belongs to
    have = part.stat().st_size if part.exists() else 0
    resume = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have and tag.exists() else {}
    with session.get(url, headers=resume, stream=True, timeout=60) as answer:
        status = f"{answer.status_code} {answer.reason}"
        if answer.status_code == 429 or answer.status_code >= 500:
            after = answer.headers.get("Retry-After", "")
            raise TryAgain(f"the server answers {status}", float(after) if after.isdigit() else 0.0)
        if answer.status_code == 416 and resume:
            if answer.headers.get("Content-Range") == f"bytes */{have}":  # it was all there
                return have, hub_hash(answer)
            part.unlink()
            raise TryAgain("the part on disk does not belong to it, starting again")
        if answer.status_code in (401, 403):
            raise OSError(f"{url}: the server answers {status}: a gated file needs a token in HF_TOKEN")
        if answer.status_code not in (200, 206):
            raise OSError(f"{url}: the server answers {status}")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise OSError(f"{url}: a web page came instead of the file: is a proxy or a login in between?")
        have = have if answer.status_code == 206 else 0
        length, linked = answer.headers.get("Content-Length"), answer.headers.get("X-Linked-Size")
        size = have + int(length) if length else None
        for redirect in answer.history:
            linked = linked or redirect.headers.get("X-Linked-Size")
        etag = answer.headers.get("ETag", "W/")
        if etag.startswith("W/"):
            tag.unlink(missing_ok=True)  # nothing to tell the file by: no going on later
        else:
            write_text(tag, etag)
        free = shutil.disk_usage(part.parent).free
        if size and size - have > free:
            raise OSError(f"{part}: {size - have:,} bytes to come, the disk has {free:,} left: make room, then go on")
        bar.total, bar.n = size, have
        with open(part, "ab" if have else "wb") as file:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        return int(linked) if linked else size, hub_hash(answer)


def hub_hash(answer):
    """The SHA-256 that the hub gives for large files in X-Linked-Etag, before the redirect, or in ETag; else None."""
    for one in [*answer.history, answer]:
        for name in ("X-Linked-Etag", "ETag"):
            value = one.headers.get(name, "").strip('"')
            if re.fullmatch("[0-9a-f]{64}", value):
                return value
    return None


def write_text(path, text):
    """Write a small text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def download(args):
    """Fetch official weights into ROOT/NAME/. Stop it at any time and run it again: it goes on where it was.

    HF_ENDPOINT names a mirror of the hub, HF_TOKEN is sent for gated files, HTTPS_PROXY is respected.
    """
    place, files = DOWNLOADS[args.name]
    token = None if place.startswith("gs://") else os.environ.get("HF_TOKEN")
    for file in files:
        path = args.root / args.name / file
        print(f"{path}: sha256 {fetch(address(place, file, args.revision), path, token)}")


# ----------------------------------------------------------------------------------------------------------
# python data.py preview | download


def preview(args):
    """Write a contact sheet of a data set: picture, phrase, mask."""
    options = {"rich": True} if args.rich else {}
    dataset = load_dataset(args.name, args.split, **options)
    if args.first >= len(dataset):
        raise ValueError(f"--first {args.first}: {args.name}:{args.split} has {len(dataset)} examples")
    chosen = [dataset[i] for i in range(args.first, min(args.first + args.count, len(dataset)))]
    contact_sheet([(e.phrase, [e.image, e.mask]) for e in chosen], args.out)
    print(f"wrote {args.out}: examples {args.first} to {args.first + len(chosen) - 1} of {args.name}:{args.split}")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("preview", help="write a contact sheet", description=preview.__doc__)
    p.add_argument("name", choices=["scenes"], help="data set")
    p.add_argument("--split", default="train", choices=list(Scenes.SPLITS), help="default: train")
    p.add_argument("--rich", action=argparse.BooleanOptionalAction, default=False, help="more of everything")
    p.add_argument("--first", type=int, default=0, help="first example (default: 0)")
    p.add_argument("--count", type=int, default=24, help="how many (default: 24)")
    p.add_argument("--out", type=Path, default=Path("preview.png"), help="default: preview.png")
    p.set_defaults(job=preview)
    p = commands.add_parser("download", help="fetch official weights", description=download.__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("name", choices=DOWNLOADS, metavar="NAME", help=", ".join(DOWNLOADS))
    p.add_argument("--root", type=Path, default=Path(__file__).parent / "weights",
                   help="default: weights/ beside this file, where train.py and sample.py look")
    p.add_argument("--revision", default="main", help="of the repository (default: main)")
    p.set_defaults(job=download)
    args = parser.parse_args(argv)
    if args.job is preview and (args.first < 0 or args.count < 1):
        parser.error(f"--first {args.first} must not be negative and --count {args.count} at least 1")
    try:
        args.job(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run this again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
