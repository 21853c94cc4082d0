"""The drawn world: pictures of coloured shapes, and phrases whose masks are known exactly.

What Shakespeare is to nanoGPT: it needs no download and never ends. data.Scenes makes examples of it.
Legend: H W a picture's height and width. Masks are bool (H, W), True on the object.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# ---- vocabulary ------------------------------------------------------------------------------------------

# name: the rough area of a whole one over its radius squared
SHAPES = {"circle": 3.1, "square": 2.0, "triangle": 1.3, "star": 1.2, "heart": 1.9, "cross": 1.8, "ring": 2.0,
          "hexagon": 2.6}
RICH_SHAPES = SHAPES | {"diamond": 1.2, "crescent": 0.9, "arrow": 1.2}

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
RICH_COLORS = COLORS | {
    "brown": ((18, 30), (0.5, 0.8), (0.3, 0.5)),
    "white": ((0, 360), (0.0, 0.05), (0.93, 1.0)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.12)),
    "gray": ((0, 360), (0.0, 0.05), (0.4, 0.65)),
}

# Pairs that train, val and test never show; the split `novel` always asks for one of them.
NOVEL = {("red", "hexagon"), ("green", "ring"), ("blue", "cross"), ("yellow", "triangle"),
         ("purple", "square"), ("orange", "heart"), ("cyan", "star"), ("pink", "circle")}

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


@dataclass(frozen=True)
class World:
    """What a drawn world holds. seed: worlds of different seeds show different scenes."""

    seed: int
    shapes: dict
    colors: dict
    fills: tuple
    clutter: bool  # thin lines and specks that no phrase names
    most_objects: int


WORLDS = {  # by the names of their data sets
    "scenes": World(0, SHAPES, COLORS, ("plain",), False, 5),
    "scenes-rich": World(1, RICH_SHAPES, RICH_COLORS, ("plain", "plain", "striped", "dotted"), True, 8),
}

# ---- drawing ---------------------------------------------------------------------------------------------

SUPERSAMPLE = 4  # The edges of objects are drawn on a canvas this many times as fine.

REGULAR = {"circle": (48,), "ring": (48,), "square": (4, 45), "triangle": (3,)}  # arguments of _regular


@dataclass
class Shape:
    """One drawn object; x, y, radius in pixels, area in visible pixels."""

    kind: str
    color: str
    x: float
    y: float
    radius: float
    fill: str = "plain"  # or "striped", "dotted"
    area: int = 0
    box: tuple = (0, 0, 0, 0)  # of the visible pixels: left, top, right, bottom


def _regular(n, start=-90.0):
    """The n corners of a regular polygon on the unit circle, the first one at `start` degrees: (n, 2)."""
    angle = np.radians(start + 360.0 / n * np.arange(n))
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def outline(kind, rng):
    """The outline of a shape within the unit circle, y down: points (n, 2)."""
    if kind in REGULAR:
        return _regular(*REGULAR[kind])
    if kind == "star":
        points = _regular(10)
        points[1::2] *= rng.uniform(0.38, 0.5)
        return points
    if kind == "hexagon":
        return _regular(6, start=rng.choice([0, 30]))
    if kind == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 17
    if kind == "cross":
        a, b = 0.95, rng.uniform(0.28, 0.38)
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                         (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    if kind == "diamond":
        return _regular(4) * (rng.uniform(0.55, 0.75), 1.0)
    if kind == "crescent":  # the outer arc, then back along an arc that is set off to the right
        t = np.radians(np.linspace(50, 310, 40))
        edge = np.stack([np.cos(t), np.sin(t)], 1)
        back = edge[::-1] * (rng.uniform(0.35, 0.55), 1.0)
        return np.concatenate([edge, back + (edge[-1] - back[0])])
    b = rng.uniform(0.2, 0.3)  # an arrow
    return np.array([(1, 0), (0.2, -0.75), (0.2, -b), (-1, -b), (-1, b), (0.2, b), (0.2, 0.75)])


def _hsv_to_rgb(hue, saturation, value):
    """Degrees, [0, 1], [0, 1] -> float32 (3,) in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60.0) % 6.0
    return (value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)).astype(np.float32)


def _background(height, width, rng):
    """A picture to draw on: float32 (H, W, 3) in [0, 1], of low saturation; flat, gradient, noisy or blotchy."""

    def tone():
        return _hsv_to_rgb(rng.uniform(0, 360), rng.uniform(0, 0.2), rng.uniform(0.05, 1.0))

    base, style = tone(), rng.choice(["flat", "gradient", "noisy", "blotchy"])
    picture = np.tile(base, (height, width, 1))
    if style == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.cos(angle) * np.linspace(-1, 1, width) + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
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
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    wave = np.sin(u * (2 * np.pi / period))
    if fill == "dotted":
        wave = wave + np.sin(v * (2 * np.pi / period)) - 1.0
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


def _place(width, height, others, rng):
    """(x, y, radius) of an object that does not bury, and is not buried by, the ones drawn before; None: no room."""
    side = min(height, width)
    for radius in (side * rng.uniform(0.13, 0.4), side * 0.13):  # of any size, else a small one
        for _ in range(20):
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            # 0.75 of the summed radii lets neighbours overlap at the rim and keeps each one recognisable
            if all(np.hypot(x - o.x, y - o.y) > 0.75 * (radius + o.radius) for o in others):
                return x, y, radius
    return None


def draw_scene(rng, world, novel=False):
    """Draw one scene of a World.

    Returns picture uint8 (H, W, 3), owner int8 (H, W): the object seen at each pixel or -1, and the list of
    Shape. With `novel`, object 0 is a colour-shape pair from NOVEL; without, no object is.
    """
    side, aspect = rng.uniform(120, 220), np.exp(rng.uniform(-0.5, 0.5))  # width : height from 0.6 to 1.65
    height, width = round(side / aspect**0.5), round(side * aspect**0.5)
    picture = _background(height, width, rng)
    if world.clutter:
        _clutter(picture, rng)
    tint = picture.mean((0, 1))
    owner = np.full((height, width), -1, np.int8)

    objects = []
    for _ in range(int(rng.integers(1, world.most_objects + 1))):
        color, kind = _choose_class(objects, world, novel, rng)
        place = _place(width, height, objects, rng)
        if place is None:
            continue
        shape = Shape(kind, color, *place)
        if len(world.fills) > 1:
            shape.fill = world.fills[rng.integers(len(world.fills))]
        seen, cover = _coverage(shape, height, width, rng)
        _paint(picture[seen], cover, shape, world.colors[color], tint, rng)
        owner[seen][cover >= 0.5] = len(objects)
        objects.append(shape)

    if rng.random() < 0.5:  # grain over everything
        picture += rng.uniform(0.005, 0.05) * rng.standard_normal((height, width, 1), np.float32)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), owner, objects


def _choose_class(objects, world, novel, rng):
    """(color, kind) of the next object, often those of one before it: look-alikes give "the large" a meaning."""
    if novel and not objects:
        pairs = sorted(NOVEL)
        return pairs[rng.integers(len(pairs))]
    colors, kinds = tuple(world.colors), tuple(world.shapes)
    while True:
        repeat = objects and rng.random() < 0.3
        like = objects[rng.integers(len(objects))] if repeat else None
        color = like.color if repeat and rng.random() < 0.7 else colors[rng.integers(len(colors))]
        kind = like.kind if repeat and rng.random() < 0.7 else kinds[rng.integers(len(kinds))]
        if novel or (color, kind) not in NOVEL:
            return color, kind


def _coverage(shape, height, width, rng):
    """Draw the outline of a Shape, turned a little: (the part of the picture with it, as two slices, and the share of
    each of its pixels inside the outline, float32 (h, w) in [0, 1])."""
    parts = [outline(shape.kind, rng)]
    if shape.kind == "ring":
        parts.append(parts[0] * rng.uniform(0.5, 0.68))  # its hole
    turn = np.radians(rng.uniform(-18, 18))
    matrix = shape.radius * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    parts = [points @ matrix + (shape.x, shape.y) for points in parts]
    left, top = np.maximum(np.floor(parts[0].min(0)) - 1, 0).astype(int)
    right, bottom = np.minimum(np.ceil(parts[0].max(0)).astype(int) + 2, (width, height))
    canvas = Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    for points, value in zip(parts, (255, 0)):
        points = (points - (left, top)) * SUPERSAMPLE - 0.5
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in points.tolist()], fill=value)
    return (slice(top, bottom), slice(left, right)), np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255.0


def _paint(region, cover, shape, ranges, tint, rng):
    """Paint a Shape in place into its part of the picture, float32 (h, w, 3); cover: from _coverage; ranges: of its
    color in COLORS; tint: the mean of the background, float32 (3,)."""
    for _ in range(10):  # a colour that stands out from the background
        paint = rgb = _hsv_to_rgb(*(rng.uniform(low, high) for low, high in ranges))
        if np.abs(rgb - tint).max() > 0.25:
            break
    if shape.fill != "plain":
        other = rgb * 0.35 if rgb.mean() > 0.4 else rgb * 0.5 + 0.5
        paint = rgb + _pattern(shape.fill, *cover.shape, rng)[..., None] * (other - rgb)
    elif rng.random() < 0.2:  # a little shading from top to bottom
        paint = rgb * np.linspace(*rng.uniform(0.8, 1.0, 2), len(cover), dtype=np.float32)[:, None, None]
    region += cover[..., None] * (paint - region)


def measure(owner, objects):
    """Fill in each object's visible area and box; False if one is hidden by more than 60 % or below 24 px."""
    for index, shape in enumerate(objects):
        seen = owner == index
        shape.area = int(seen.sum())
        if shape.area < 24 or shape.area < 0.4 * RICH_SHAPES[shape.kind] * shape.radius**2:
            return False
        shape.box = Image.fromarray(seen).getbbox()
    return True


# ---- phrases ---------------------------------------------------------------------------------------------

# How often each group of phrases is asked, where the scene has a phrase of it.
PHRASE_SHARE = {"color shape": 0.30, "shape": 0.13, "color": 0.13, "extreme": 0.14, "size": 0.09,
                "relation": 0.07, "reasoning": 0.12, "all": 0.02}

# word: (axis, sign) of the centre of an object's visible box
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
# words: (axis, sign) of the object's centre minus the other's
RELATIONS = {("left of", "to the left of"): (0, -1), ("right of", "to the right of"): (0, 1),
             ("above",): (1, -1), ("below",): (1, 1)}


def scene_phrases(objects, height, width):
    """Every phrase that fits the scene: {group: [(phrase, task, label, indices of its objects)]}.

    A class name, in any article or number ("circle", "the circles", "a red circle"), means every instance.
    Size, place and relation words pick exactly one object, with a margin that leaves no doubt.
    """
    groups = {name: [] for name in PHRASE_SHARE}

    def add(group, phrases, task, label, indices):
        groups[group] += [(phrase, task, label, tuple(indices)) for phrase in phrases]

    named = {}  # what can stand after "the large": {noun: indices}
    for kind in sorted({s.kind for s in objects}):
        indices = named[kind] = [i for i, s in enumerate(objects) if s.kind == kind]
        one, several = _forms(kind)
        add("shape", [one], "referring" if len(indices) == 1 else "semantic", kind, indices)
        add("shape", several, "semantic", kind, indices)
        add("reasoning", SHAPE_RIDDLES[kind], "reasoning", None, indices)
    for color in sorted({s.color for s in objects}):
        indices = named[f"{color} object"] = [i for i, s in enumerate(objects) if s.color == color]
        several = (f"everything {color}", f"the {color} objects", f"all {color} shapes", f"{color} things")
        add("color", several + several[:1] * 2, "semantic", color, indices)
        if len(indices) == 1:
            add("color", (f"the {color} object", f"the {color} one"), "referring", color, indices)
        add("reasoning", COLOR_RIDDLES[color], "reasoning", None, indices)
        for kind in sorted({objects[i].kind for i in indices}):
            both = named[f"{color} {kind}"] = [i for i in indices if objects[i].kind == kind]
            one, several = _forms(f"{color} {kind}")
            add("color shape", [one] * 3, "referring" if len(both) == 1 else "semantic", kind, both)
            add("color shape", several[:1] + several, "semantic", kind, both)
    for fill in ("striped", "dotted"):
        indices = [i for i, s in enumerate(objects) if s.fill == fill]
        if indices:
            add("color", (f"everything {fill}", f"the {fill} objects"), "semantic", None, indices)

    centers = [((s.box[0] + s.box[2]) / 2, (s.box[1] + s.box[3]) / 2) for s in objects]
    _add_relations(add, named, centers, (width, height))
    everything = range(len(objects))
    add("all", ("everything", "all objects", "the objects", "every shape"), "semantic", None, everything)
    if len(objects) == 1:
        phrases = [f"the {word} {noun}" for word in EXTREMES for noun in ("object", "shape")]
        add("extreme", phrases, "referring", None, everything)
    else:
        named |= {"object": everything, "shape": everything}
    for noun, indices in named.items():
        if len(indices) == 1:  # large or small in its picture
            radius = objects[indices[0]].radius
            words = (("large", "big") if radius > 0.28 * min(height, width) else
                     ("small", "little") if radius < 0.18 * min(height, width) else ())
            add("size", [f"the {word} {noun}" for word in words], "referring", None, indices)
        else:
            _add_sizes(add, noun, indices, objects)
            _add_extremes(add, noun, indices, objects, centers, (width, height))
    return groups


def _forms(noun):
    """A noun with "the", which can mean one object, and the forms that mean every one of them."""
    article = "an" if noun[0] in "aeiou" else "a"
    nouns = noun + ("es" if noun.endswith("s") else "s")
    return f"the {noun}", (noun, f"the {nouns}", nouns, f"all {nouns}", f"{article} {noun}")


def _add_sizes(add, noun, indices, objects):
    """ "the large circle": the one that is clearly the largest of several."""
    areas = sorted(indices, key=lambda i: objects[i].area)
    radii = sorted(indices, key=lambda i: objects[i].radius)
    for first, second, words in ((-1, -2, ("large", "big", "biggest", "largest")),
                                 (0, 1, ("small", "little", "smallest"))):
        area = sorted(objects[areas[place]].area for place in (first, second))
        radius = sorted(objects[radii[place]].radius for place in (first, second))
        # A ring or a star has less area than a circle of its extent, so area and radius must say the same.
        if areas[first] == radii[first] and area[1] > 1.35 * area[0] and radius[1] > 1.15 * radius[0]:
            add("size", [f"the {word} {noun}" for word in words], "referring", None, [areas[first]])


def _add_extremes(add, noun, indices, objects, centers, extent):
    """ "the leftmost circle": of several, the one that is so by its centre with a margin, and by its edge too."""
    for word, (axis, sign) in EXTREMES.items():
        *_, second, first = sorted(indices, key=lambda i: sign * centers[i][axis])
        edges = {i: sign * objects[i].box[axis + (2 if sign > 0 else 0)] for i in indices}
        clear = abs(centers[first][axis] - centers[second][axis]) > 0.05 * extent[axis]
        if clear and edges[first] == max(edges.values()):
            add("extreme", [f"the {word} {noun}"], "referring", None, [first])


def _add_relations(add, named, centers, extent):
    """ "the circle left of the star": there is one star, and one circle is left of it while no circle is nearly so."""
    anchors = {noun: indices[0] for noun, indices in named.items() if len(indices) == 1}
    for noun, indices in named.items():
        for other, anchor in anchors.items():
            for words, (axis, sign) in RELATIONS.items() if anchor not in indices else ():
                margin = 0.12 * extent[axis]
                offsets = [sign * (centers[i][axis] - centers[anchor][axis]) for i in indices]
                inside = [i for i, offset in zip(indices, offsets) if offset > margin]
                if len(inside) == 1 and all(abs(offset) > margin for offset in offsets):
                    add("relation", [f"the {noun} {word} the {other}" for word in words], "referring", None, inside)


def pick_phrases(objects, height, width, count, rng, must=None):
    """`count` phrases for a scene, different ones while there are; `must`: an object that each must name."""
    groups = [(PHRASE_SHARE[group], [phrase for phrase in phrases if must is None or must in phrase[3]])
              for group, phrases in scene_phrases(objects, height, width).items()]
    groups = [(share, phrases) for share, phrases in groups if phrases]
    share = np.array([share for share, _ in groups])
    share /= share.sum()
    picked = []
    for _ in range(count):
        for _ in range(5):
            options = groups[rng.choice(len(groups), p=share)][1]
            choice = options[rng.integers(len(options))]
            if choice not in picked:
                break
        picked.append(choice)
    return picked
