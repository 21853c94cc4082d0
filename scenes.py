"""The drawn world: pictures of coloured shapes, and phrases whose masks are known exactly.

What Shakespeare is to nanoGPT: it needs no download and never ends. data.Scenes makes examples of it.
Legend: H W a picture's height and width. Masks are bool (H, W), True on the object. An outlined shape is the whole
shape: its mask includes what the line encloses.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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

WIDE_COLORS = COLORS | {  # with the dark ones that other programs have under these names
    "red": ((-12, 10), (0.72, 1.0), (0.5, 1.0)),
    "green": ((85, 155), (0.45, 1.0), (0.32, 1.0)),
    "blue": ((205, 245), (0.55, 1.0), (0.4, 1.0)),
    "purple": ((262, 302), (0.45, 1.0), (0.35, 0.9)),
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


SYNONYMS = {"circle": ("ball", "disk"), "square": ("box",), "ring": ("hoop",), "cross": ("plus",)}


@dataclass(frozen=True)
class World:
    """What a drawn world holds. Each entry of a tuple is as likely as the others."""

    seed: int  # worlds of different seeds show different scenes
    shapes: dict
    colors: dict
    phrases: dict  # how often each group of phrases is asked, where the scene has a phrase of it
    fills: tuple = ("plain",)
    most_objects: tuple = (5,)
    backgrounds: tuple = ("flat", "gradient", "noisy", "blotchy")
    effects: tuple = ("none",)  # of the finished picture
    radii: tuple = ((0.13, 0.4),)  # from, to, as shares of the shorter side
    clutter: bool = False  # thin lines and specks that no phrase names
    varied: bool = False  # pictures of many sizes and aspects, freely turned objects, coloured backgrounds
    absent: float = 0.0  # share of the training phrases that name what is not there


PLAIN_PHRASES = {"color shape": 0.30, "shape": 0.13, "color": 0.13, "extreme": 0.14, "size": 0.09,
                 "relation": 0.07, "reasoning": 0.12, "all": 0.02}
PHRASES = {"color shape": 0.20, "shape": 0.09, "color": 0.09, "synonym": 0.04, "extreme": 0.11, "side": 0.06,
           "corner": 0.04, "ordinal": 0.05, "size": 0.10, "several": 0.02, "relation": 0.08, "inside": 0.02,
           "and": 0.03, "but": 0.03, "reasoning": 0.09, "all": 0.02}

WORLDS = {  # by the names of their data sets
    "scenes": World(
        2, SHAPES, WIDE_COLORS, PHRASES, most_objects=(3, 5, 5, 12),
        fills=("plain",) * 6 + ("gradient", "striped", "dotted", "outlined", "thin", "bordered", "shadow", "soft"),
        backgrounds=("flat", "flat", "flat", "gradient", "noisy", "blotchy", "checkered", "banded", "lined", "halved",
                     "cloudy"),
        effects=("none",) * 4 + ("blur", "jpeg"), varied=True, absent=0.2,
        radii=((0.12, 0.4),) * 4 + ((0.06, 0.2),) * 2 + ((0.025, 0.06), (0.2, 0.5))),
    "scenes-plain": World(0, SHAPES, COLORS, PLAIN_PHRASES),
    "scenes-rich": World(1, RICH_SHAPES, RICH_COLORS, PLAIN_PHRASES, ("plain", "plain", "striped", "dotted"), (8,),
                         clutter=True),
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
    fill: str = "plain"  # or another of World.fills
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


def _background(height, width, world, rng):
    """A picture to draw on: float32 (H, W, 3) in [0, 1], of low saturation but for some of a varied world."""

    def tone():
        most = 1.0 if vivid else 0.2
        return _hsv_to_rgb(rng.uniform(0, 360), rng.uniform(0, most), rng.uniform(0.05, 1.0))

    vivid = world.varied and rng.random() < 0.25
    base, style = tone(), rng.choice(world.backgrounds)
    picture = np.tile(base, (height, width, 1))
    if style == "noisy":
        picture += rng.uniform(0.03, 0.15) * rng.standard_normal((height, width, 1), np.float32)
    elif style == "blotchy":
        for _ in range(int(rng.integers(1, 4))):
            blotches = _blotches(int(rng.integers(2, 24)), height, width, rng)
            picture += rng.uniform(0.05, 0.25) * (blotches - 0.5)
    elif style == "cloudy":  # as much contrast in every octave, as photographs have it
        strength = rng.uniform(0.1, 0.4)
        for octave in range(1, 6):
            picture += strength * (_blotches(2**octave, height, width, rng) - 0.5)
    elif style != "flat":
        picture += _weight(style, height, width, rng)[..., None] * (tone() - base)
    return np.clip(picture, 0, 1, out=picture)


def _blotches(cells, height, width, rng):
    """Smooth noise of so many cells along a side: float32 (H, W, 3) in [0, 1]."""
    patch = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    return np.asarray(patch.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255.0


def _weight(style, height, width, rng):
    """Where the second tone of a background goes: float32 (H, W) in [0, 1]."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * np.linspace(-1, 1, width) + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
    if style == "gradient":
        return ((ramp - ramp.min()) / np.ptp(ramp)).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    period = max(3.0, rng.uniform(0.04, 0.2) * min(height, width))
    if style == "checkered":
        weight = (x // period + y // period) % 2
    elif style == "banded":
        weight = (np.cos(angle) * x + np.sin(angle) * y) // period % 2
    elif style == "lined":  # a grid of thin lines
        thick = max(1.0, period * rng.uniform(0.05, 0.2))
        weight = (x % period < thick) | (y % period < thick)
    else:  # halved, as by a horizon
        weight = y + rng.uniform(-0.2, 0.2) * x > rng.uniform(0.3, 0.7) * height
    return weight.astype(np.float32)


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


def _place(width, height, others, radii, rng):
    """(x, y, radius) of an object that does not bury, and is not buried by, the ones drawn before; None: no room."""
    side = min(height, width)
    for radius in (side * rng.uniform(*radii), side * radii[0]):  # of any size, else a small one
        for _ in range(20):
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            # 0.75 of the summed radii lets neighbours overlap at the rim and keeps each one recognisable
            if all(np.hypot(x - o.x, y - o.y) > 0.75 * (radius + o.radius) for o in others):
                return x, y, radius
    return None


def _place_inside(others, rng):
    """(x, y, radius) in the hole of a ring that has room for it, None: there is none."""
    for ring in others:
        if ring.kind == "ring" and ring.radius > 20 and ring.fill == "plain":
            return (*(c + rng.uniform(-0.05, 0.05) * ring.radius for c in (ring.x, ring.y)),
                    ring.radius * rng.uniform(0.2, 0.38))
    return None


def draw_scene(rng, world, novel=False):
    """Draw one scene of a World.

    Returns picture uint8 (H, W, 3), owner int8 (H, W): the object seen at each pixel or -1, and the list of
    Shape. With `novel`, object 0 is a colour-shape pair from NOVEL; without, no object is.
    """
    if world.varied:
        side, aspect = np.exp(rng.uniform(np.log(64), np.log(320))), np.exp(np.clip(rng.normal(0, 0.45), -1.1, 1.1))
    else:
        side, aspect = rng.uniform(120, 220), np.exp(rng.uniform(-0.5, 0.5))  # width : height from 0.6 to 1.65
    height, width = round(side / aspect**0.5), round(side * aspect**0.5)
    picture = _background(height, width, world, rng)
    if world.clutter:
        _clutter(picture, rng)
    tint = picture.mean((0, 1))
    owner = np.full((height, width), -1, np.int8)
    radii, most = world.radii[rng.integers(len(world.radii))], world.most_objects[rng.integers(len(world.most_objects))]
    fills = (world.fills[rng.integers(len(world.fills))],) if world.varied and rng.random() < 0.5 else world.fills

    objects = []
    for _ in range(int(rng.integers(1, most + 1))):
        color, kind = _choose_class(objects, world, novel, rng)
        inside = _place_inside(objects, rng) if world.varied and len(objects) < 4 and rng.random() < 0.3 else None
        place = inside or _place(width, height, objects, radii, rng)
        if place is None:
            continue
        shape = Shape(kind, color, *place)
        if len(world.fills) > 1:
            shape.fill = fills[rng.integers(len(fills))]
        _draw_shape(picture, owner, len(objects), shape, world, tint, rng)
        objects.append(shape)

    if rng.random() < 0.5:  # grain over everything
        picture += rng.uniform(0.005, 0.05) * rng.standard_normal((height, width, 1), np.float32)
    picture = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return _finish(picture, world.effects[rng.integers(len(world.effects))], rng), owner, objects


def _finish(picture, effect, rng):
    """The picture, uint8 (H, W, 3), blurred or through a JPEG file of low quality."""
    if effect == "blur":
        blur = ImageFilter.GaussianBlur(rng.uniform(0.003, 0.012) * min(picture.shape[:2]))
        return np.asarray(Image.fromarray(picture).filter(blur))
    if effect == "jpeg":
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=int(rng.integers(5, 40)))
        return np.asarray(Image.open(file).convert("RGB"))
    return picture


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


def _draw_shape(picture, owner, index, shape, world, tint, rng):
    """Draw a Shape in place, into picture and owner; tint: the mean of the background, float32 (3,)."""
    seen, outlines = _outlines(shape, *owner.shape, world.varied, rng)
    region = picture[seen]
    cover = _coverage(outlines, region.shape)
    if world.varied:
        tint = region.mean((0, 1))
    if shape.fill == "shadow":
        offset = rng.uniform(0.06, 0.15, 2) * shape.radius
        shadow = Image.fromarray((_coverage([p + offset for p in outlines], region.shape) * 255).astype(np.uint8))
        shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.06 * shape.radius)), np.float32) / 255.0
        region *= 1 - 0.5 * shadow[..., None]
    solid = cover  # what belongs to the shape
    if shape.fill in ("outlined", "thin"):
        stroke = shape.radius * (rng.uniform(0.1, 0.2) if shape.fill == "outlined" else rng.uniform(0.04, 0.09))
        cover = _stroke(outlines, region.shape, max(1.2, stroke)) * cover
    elif shape.fill == "soft":
        blur = ImageFilter.GaussianBlur(rng.uniform(0.05, 0.12) * shape.radius)
        cover = np.asarray(Image.fromarray((cover * 255).astype(np.uint8)).filter(blur), np.float32) / 255.0
    _paint(region, cover, shape, world.colors[shape.color], tint, rng)
    if shape.fill == "bordered":
        line = _stroke(outlines, region.shape, max(1.0, rng.uniform(0.04, 0.14) * shape.radius)) * solid
        region += line[..., None] * (rng.choice([0.0, 0.0, 1.0, 0.3]) - region)
    owner[seen][solid >= 0.5] = index


def _outlines(shape, height, width, free, rng):
    """The outline of a Shape, turned a little or, if `free`, sometimes freely: (the part of the picture with it, as two
    slices, and the points (n, 2) of the outline and of a ring's hole, in pixels of that part)."""
    parts = [outline(shape.kind, rng)]
    if shape.kind == "ring":
        parts.append(parts[0] * rng.uniform(0.5, 0.68))  # its hole
    turn = np.radians(rng.uniform(-180, 180) if free and rng.random() < 0.3 else rng.uniform(-18, 18))
    matrix = shape.radius * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    parts = [points @ matrix + (shape.x, shape.y) for points in parts]
    margin = int(0.3 * shape.radius) if shape.fill in ("shadow", "soft") else 1
    left, top = np.maximum(np.floor(parts[0].min(0)) - margin, 0).astype(int)
    right, bottom = np.minimum(np.ceil(parts[0].max(0)).astype(int) + 1 + margin, (width, height))
    return (slice(top, bottom), slice(left, right)), [points - (left, top) for points in parts]


def _coverage(outlines, shape):
    """The share of each pixel inside the first outline and outside the second: float32 (h, w) in [0, 1]."""
    canvas = Image.new("L", (shape[1] * SUPERSAMPLE, shape[0] * SUPERSAMPLE))
    for points, value in zip(outlines, (255, 0)):
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in (points * SUPERSAMPLE - 0.5).tolist()], fill=value)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255.0


def _stroke(outlines, shape, width):
    """The share of each pixel within `width` pixels of an outline, on both its sides: float32 (h, w) in [0, 1]."""
    canvas = Image.new("L", (shape[1] * SUPERSAMPLE, shape[0] * SUPERSAMPLE))
    for points in outlines:
        points = [tuple(p) for p in (np.concatenate([points, points[:2]]) * SUPERSAMPLE - 0.5).tolist()]
        ImageDraw.Draw(canvas).line(points, fill=255, width=round(2 * width * SUPERSAMPLE), joint="curve")
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255.0


def _paint(region, cover, shape, ranges, tint, rng):
    """Paint a Shape in place into its part of the picture, float32 (h, w, 3); cover: from _coverage; ranges: of its
    color in COLORS; tint: the mean of the background, float32 (3,)."""
    for _ in range(10):  # a colour that stands out from the background
        paint = rgb = _hsv_to_rgb(*(rng.uniform(low, high) for low, high in ranges))
        if np.abs(rgb - tint).max() > 0.25:
            break
    if shape.fill in ("striped", "dotted"):
        other = rgb * 0.35 if rgb.mean() > 0.4 else rgb * 0.5 + 0.5
        paint = rgb + _pattern(shape.fill, *cover.shape, rng)[..., None] * (other - rgb)
    elif shape.fill == "gradient":
        ramp = _weight("gradient", *cover.shape, rng)[..., None]
        paint = rgb * (rng.uniform(0.4, 0.75) + ramp * rng.uniform(0.3, 0.6)).clip(0, 1)
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


def patch_view(owner, count, grid, size=16):
    """A scene as an encoder sees it, in grid x grid patches of size x size pixels. owner: int8 (H, W) of `count`
    objects -> owner at those pixels (N, size * size), and the share of each patch that each object fills (N, count)."""
    rows, columns = (((np.arange(grid * size) + 0.5) * n / (grid * size)).astype(int) for n in owner.shape)
    patches = owner[rows[:, None], columns].reshape(grid, size, grid, size).swapaxes(1, 2).reshape(-1, size * size)
    return patches, np.stack([(patches == index).mean(1) for index in range(count)], 1)


def patch_truth(patches, share, owner, objects, world):
    """What each patch of a picture shows: what an encoder can learn from a scene besides phrases.

    patches, share: what patch_view returns of owner (H, W). Returns float32 (N, n + 3 + 64 + 1): for each of the n
    colours and shapes, and for any object, whether it is in the patch; of the object that fills most of it the centre
    as seen from the patch, in quarters of the picture, the log of its radius, and its share of the 8 x 8 parts of the
    patch; whether there is one.
    """
    names = [*world.colors, *world.shapes]
    things = np.zeros((len(share), len(names) + 1), np.float32)
    for index, shape in enumerate(objects):
        for column in (names.index(shape.color), names.index(shape.kind), -1):
            things[share[:, index] > 0.02, column] = 1
    height, width = owner.shape
    centers = np.array([((s.box[0] + s.box[2]) / 2 / width, (s.box[1] + s.box[3]) / 2 / height) for s in objects])
    radii = np.log([s.radius / min(owner.shape) / 0.15 for s in objects])
    grid, size = (round(len(side) ** 0.5) for side in (patches, patches[0]))
    main, (y, x) = share.argmax(1), np.divmod(np.arange(len(share)), grid)
    offsets = 4 * (centers[main] - (np.stack([x, y], 1) + 0.5) / grid)
    cover = (patches == main[:, None]).reshape(-1, 8, size // 8, 8, size // 8).mean((2, 4)).reshape(-1, 64)
    there = share.max(1, keepdims=True) > 0.02
    return np.concatenate([things, offsets, radii[main][:, None], cover, there], 1).astype(np.float32)


# ---- phrases ---------------------------------------------------------------------------------------------

# word: (axis, sign) of the centre of an object's visible box
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
# words: (axis, sign) of the object's centre minus the other's
RELATIONS = {("left of", "to the left of"): (0, -1), ("right of", "to the right of"): (0, 1),
             ("above",): (1, -1), ("below",): (1, 1)}
# what people say instead: word: (before the noun, after it)
SIDES = {"leftmost": ("left", "on the left"), "rightmost": ("right", "on the right"),
         "topmost": ("top", "at the top"), "bottommost": ("bottom", "at the bottom")}
ABSENT = ("neither", "other color", "other shape", "relation")  # kinds of phrases for what is not there


def scene_phrases(objects, height, width):
    """Every phrase that fits the scene: {group: [(phrase, task, label, indices of its objects)]}.

    A class name, in any article or number ("circle", "the circles", "a red circle"), means every instance.
    Size, place and relation words pick exactly one object, with a margin that leaves no doubt.
    """
    groups = {name: [] for name in PHRASES}

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
            for word in SYNONYMS.get(kind, ()):
                one, several = _forms(f"{color} {word}")
                add("synonym", [one], "referring" if len(both) == 1 else "semantic", kind, both)
                add("synonym", several, "semantic", kind, both)
    for fill in ("striped", "dotted"):
        indices = [i for i, s in enumerate(objects) if s.fill == fill]
        if indices:
            add("color", (f"everything {fill}", f"the {fill} objects"), "semantic", None, indices)

    centers = [((s.box[0] + s.box[2]) / 2, (s.box[1] + s.box[3]) / 2) for s in objects]
    _add_relations(add, named, centers, (width, height))
    _add_sets(add, named, len(objects))
    _add_inside(add, named, objects)
    everything = range(len(objects))
    add("all", ("everything", "all objects", "the objects", "every shape"), "semantic", None, everything)
    if len(objects) == 1:
        phrases = [f"the {word} {noun}" for word in EXTREMES for noun in ("object", "shape")]
        add("extreme", phrases, "referring", None, everything)
    else:
        named |= {"object": everything, "shape": everything}
    for noun, indices in named.items():
        _add_sizes_and_places(add, noun, indices, objects, centers, (width, height))
    return groups


def _add_sizes_and_places(add, noun, indices, objects, centers, extent):
    """All phrases that tell the objects of a noun by their size or place; extent: (width, height) of the picture."""
    if len(indices) == 1:  # large or small in its picture
        share = objects[indices[0]].radius / min(extent)
        words = ("large", "big") if share > 0.28 else ("small", "little") if share < 0.18 else ()
        add("size", [f"the {word} {noun}" for word in words], "referring", None, indices)
    else:
        _add_sizes(add, noun, indices, objects)
        _add_extremes(add, noun, indices, objects, centers, extent)
        _add_ordinals(add, noun, indices, centers, extent)
    _add_corners(add, noun, indices, centers, extent)


def _plural(noun):
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _forms(noun):
    """A noun with "the", which can mean one object, and the forms that mean every one of them."""
    article, nouns = "an" if noun[0] in "aeiou" else "a", _plural(noun)
    return f"the {noun}", (noun, f"the {nouns}", nouns, f"all {nouns}", f"{article} {noun}")


def _add_sizes(add, noun, indices, objects):
    """ "the large circle", "the two biggest circles": those that are clearly larger than all others, or smaller."""
    for sign, words in ((-1, ("large", "big", "biggest", "largest")), (1, ("small", "little", "smallest"))):
        areas = sorted((sign * objects[i].area, i) for i in indices)
        radii = sorted((sign * objects[i].radius, i) for i in indices)
        for count in (1, 2) if len(indices) > 2 else (1,):
            first = {i for _, i in areas[:count]}
            # A ring or a star has less area than a circle of its extent, so area and radius must say the same.
            if first == {i for _, i in radii[:count]} and _apart(areas, count, 1.35) and _apart(radii, count, 1.15):
                if count == 1:
                    add("size", [f"the {word} {noun}" for word in words], "referring", None, first)
                else:
                    most = [f"the two {word} {_plural(noun)}" for word in words if word.endswith("st")]
                    add("several", most, "semantic", None, sorted(first))


def _apart(sizes, count, ratio):
    """True if the first `count` of sorted (size, index) differ from the next one by more than a ratio."""
    low, high = sorted(abs(size) for size, _ in sizes[count - 1:count + 1])
    return high > ratio * low


def _add_extremes(add, noun, indices, objects, centers, extent):
    """ "the leftmost circle": of several, the one that is so by its centre with a margin, and by its edge too."""
    for word, (axis, sign) in EXTREMES.items():
        *_, second, first = sorted(indices, key=lambda i: sign * centers[i][axis])
        edges = {i: sign * objects[i].box[axis + (2 if sign > 0 else 0)] for i in indices}
        clear = abs(centers[first][axis] - centers[second][axis]) > 0.05 * extent[axis]
        if clear and edges[first] == max(edges.values()):
            add("extreme", [f"the {word} {noun}"], "referring", None, [first])
            before, after = SIDES[word]
            nouns = (noun, "thing") if noun == "object" else (noun,)
            add("side", [f"the {n} {after}" for n in nouns] + [f"the {before} {noun}"], "referring", None, [first])


def _add_ordinals(add, noun, indices, centers, extent):
    """ "the second circle from the left", where the order is clear up to the one after it."""
    for axis, sign, side in ((0, 1, "left"), (0, -1, "right"), (1, 1, "top"), (1, -1, "bottom")):
        order = sorted(indices, key=lambda i: sign * centers[i][axis])
        gaps = [sign * (centers[b][axis] - centers[a][axis]) for a, b in zip(order, order[1:])]
        for place, word in ((1, "second"), (2, "third")):
            if place < len(order) and min(gaps[:place + 1]) > 0.05 * extent[axis]:
                add("ordinal", [f"the {word} {noun} from the {side}"], "referring", None, [order[place]])


def _add_corners(add, noun, indices, centers, extent):
    """ "the circle in the top left corner": the only one in that quarter of the picture, and not near its middle."""
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        place = {}  # how far from the corner, 0 to 1, along the worse axis
        for i in indices:
            share = [centers[i][axis] / extent[axis] for axis in (0, 1)]
            place[i] = max(1 - share[0] if right else share[0], 1 - share[1] if below else share[1])
        first, *others = sorted(place, key=place.get)
        if place[first] < 0.4 and (not others or place[others[0]] > 0.55):
            corner = f"{'bottom' if below else 'top'} {'right' if right else 'left'}"
            add("corner", (f"the {noun} in the {corner} corner", f"the {corner} {noun}", f"the {noun} at the {corner}"),
                "referring", None, [first])


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


def _add_sets(add, named, count):
    """ "the circle and the star", "everything but the star". named: {noun: indices}, of `count` objects."""
    said = {f"the {noun}" if len(indices) == 1 else f"the {_plural(noun)}": set(indices)
            for noun, indices in named.items() if not noun.endswith("object")}
    for first, a in said.items():
        if len(a) < count:
            rest = sorted(set(range(count)) - a)
            add("but", [f"everything {word} {first}" for word in ("but", "except")], "semantic", None, rest)
        for second, b in said.items():
            if not a & b and first.count(" ") == second.count(" "):
                add("and", [f"{first} and {second}"], "semantic", None, sorted(a | b))


def _add_inside(add, named, objects):
    """ "the star inside the ring": one object stands in the hole of the only ring of that name."""
    within = {(i, j) for i, o in enumerate(objects) for j, ring in enumerate(objects) if ring.kind == "ring" and i != j
              and np.hypot(o.x - ring.x, o.y - ring.y) + o.radius < 0.7 * ring.radius}
    for noun, indices in [*named.items(), ("object", range(len(objects)))] if within else ():
        for other, anchors in named.items():
            inside = [i for i in indices if (i, anchors[0]) in within]
            if len(anchors) == 1 and len(inside) == 1:
                phrases = [f"the {noun} {word} the {other}" for word in ("inside", "in")]
                add("inside", phrases, "referring", None, inside)


def absent_phrases(objects, world, height, width, rng):
    """Phrases for what is not in the scene: {kind of ABSENT: (phrase, task, label, ())}, one of each kind there is."""
    there, kinds, colors = {(s.color, s.kind) for s in objects}, {s.kind for s in objects}, {s.color for s in objects}
    nouns = {}
    for color in world.colors:
        for kind in world.shapes:
            # training names no pair of NOVEL, else it would learn that there is none
            if (color, kind) not in there | NOVEL:
                of_kind = ("other color" if kind in kinds else "other shape" if color in colors else "neither")
                nouns.setdefault(of_kind, []).append((color, kind))
    found = {}
    for of_kind, pairs in nouns.items():
        color, kind = pairs[rng.integers(len(pairs))]
        options = [f"{color} {kind}"] * 3 + [kind] * (kind not in kinds) + [f"{color} object"] * (color not in colors)
        one, several = _forms(options[rng.integers(len(options))])
        options = [one] * 4 + [*several, *(one.replace("the", f"the {w}") for w in (*EXTREMES, "large", "small"))]
        if of_kind == "neither" and rng.random() < 0.3:
            options = SHAPE_RIDDLES[kind] + COLOR_RIDDLES[color]
        found[of_kind] = options[rng.integers(len(options))], "referring", None, ()
    singles = [(noun, i) for i, s in enumerate(objects) for noun in (s.kind, f"{s.color} {s.kind}")
               if sum(noun in (o.kind, f"{o.color} {o.kind}") for o in objects) == 1]
    centers = [((s.box[0] + s.box[2]) / 2, (s.box[1] + s.box[3]) / 2) for s in objects]
    wrong = [f"the {noun} {word} the {other}" for noun, i in singles for other, j in singles if i != j
             for words, (axis, sign) in RELATIONS.items() for word in words
             if sign * (centers[j][axis] - centers[i][axis]) > 0.12 * (width, height)[axis]]
    if wrong:
        found["relation"] = wrong[rng.integers(len(wrong))], "referring", None, ()
    return {kind: found[kind] for kind in ABSENT if kind in found}


def scene_questions(objects, world, height, width):
    """Questions about the scene: {kind: [(question, answer, indices of the objects of the answer's mask)]}. An answer
    is words, or has one "<mask>". As in training's phrases, no pair of NOVEL is named."""
    found = {kind: [] for kind in ("count", "color", "shape", "yes", "no", "relation")}
    nouns = {(color, kind): [i for i, s in enumerate(objects) if color in ("", s.color) and kind in ("object", s.kind)]
             for color in ("", *world.colors) for kind in (*world.shapes, "object") if (color, kind) not in NOVEL}
    for (color, kind), indices in nouns.items():
        noun = f"{color} {kind}".strip()
        a = _forms(noun)[1][-1]
        found["yes" if indices else "no"] += [
            (f"is there {a}?", "yes." if indices else "no.", ()),
            (f"is there {a}? where?", "yes: <mask>." if indices else "no.", tuple(indices))]
        if indices or not color:
            found["count"].append((f"how many {_plural(noun)} are there?", f"{len(indices)}.", ()))
    single = {phrase: indices[0] for group in scene_phrases(objects, height, width).values()
              for phrase, _, _, indices in group if len(indices) == 1 and phrase.startswith("the ")}
    for phrase, i in single.items():
        if not set(phrase.split()) & world.colors.keys():
            found["color"].append((f"what color is {phrase}?", f"{objects[i].color}.", ()))
        if phrase.split()[-1] == "object":
            found["shape"].append((f"what shape is {phrase}?", f"{objects[i].kind}.", ()))
    for (color, kind), indices in nouns.items():
        anchor = objects[indices[0]] if len(indices) == 1 else None
        for words, (axis, sign) in RELATIONS.items() if anchor else ():
            apart = [sign * ((s.box[axis] + s.box[axis + 2]) - (anchor.box[axis] + anchor.box[axis + 2])) / 2
                     / (width, height)[axis] for s in objects]
            there = [s for s, far in zip(objects, apart) if far > 0.12]
            if len(there) == 1 and all(abs(far) > 0.12 for s, far in zip(objects, apart) if s is not anchor):
                answer = f"{_forms(f'{there[0].color} {there[0].kind}')[1][-1]}."
                found["relation"].append((f"what is {words[0]} the {f'{color} {kind}'.strip()}?", answer, ()))
    return {kind: questions for kind, questions in found.items() if questions}


def vocabulary(world):
    """(names, words): words that name shapes, colours, sizes and places in phrases of a World, and all of its words."""
    shapes = [*world.shapes, *(word for kind in world.shapes for word in SYNONYMS.get(kind, ())), "object", "shape"]
    names = {*shapes, *map(_plural, shapes), *world.colors, *EXTREMES, "left", "right", "large", "small", "little",
             "biggest", "largest", "smallest", "everything", "inside", "above", "below", "second", "third", "corner",
             "bottom", "thing", "things", "except", *(fill for fill in ("striped", "dotted") if fill in world.fills)}
    riddles = [text for kind in world.shapes for text in SHAPE_RIDDLES[kind]]
    riddles += [text for color in world.colors for text in COLOR_RIDDLES[color]]
    small = "a an the all every and but in at on of to from top two big one"
    return tuple(sorted(names)), tuple(sorted(names | set(" ".join([small, *riddles]).split())))


def pick_phrases(objects, height, width, count, rng, world, must=None, absent=0.0):
    """`count` phrases for a scene, different ones while there are; `must`: an object that each must name; absent: the
    share of those that name what is not there."""
    groups = [(world.phrases[group], [phrase for phrase in phrases if must is None or must in phrase[3]])
              for group, phrases in scene_phrases(objects, height, width).items() if group in world.phrases]
    groups = [(share, phrases) for share, phrases in groups if phrases]
    share = np.array([share for share, _ in groups])
    share /= share.sum()
    picked = []
    for _ in range(count):
        for _ in range(5):
            if absent and rng.random() < absent:
                options = list(absent_phrases(objects, world, height, width, rng).values())
            else:
                options = groups[rng.choice(len(groups), p=share)][1]
            choice = options[rng.integers(len(options))]
            if choice not in picked:
                break
        picked.append(choice)
    return picked
