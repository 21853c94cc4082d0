"""Pictures that people may draw with the words of scenes.py, by another program: for measuring, never for training.

    python tests/other_scenes.py --count 40                         # the embedded default; so many scenes per style
    python tests/other_scenes.py --checkpoint out --json other.json
    python tests/other_scenes.py --preview styles.png               # look at the styles

The shapes are distance functions over the whole picture, in NumPy, where scenes.py has polygons and Pillow. Palettes,
backgrounds and styles are its own. Phrases are those of scenes.py. It prints three tables: gIoU and cIoU of each style,
with the mean IoU of true masks through the mask tokenizer and back, which is the ceiling; gIoU and cIoU of each kind of
phrase; how often a phrase for something that is not there gets a mask. An outlined shape includes what it encloses.
"""

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from data import contact_sheet, resize_mask  # noqa: E402
from metrics import SegmentationMetrics, iou, write_json  # noqa: E402
from sample import Segmenter, print_table  # noqa: E402
from scenes import COLORS, SHAPES, Shape, scene_phrases  # noqa: E402
from tokenizer import decode_masks, mask_to_image  # noqa: E402

PALETTE = {
    "red": ((255, 0, 0), (220, 20, 60), (178, 34, 34), (231, 76, 60)),
    "green": ((0, 128, 0), (46, 204, 113), (34, 139, 34), (76, 187, 23)),
    "blue": ((0, 0, 255), (30, 80, 220), (41, 98, 255), (25, 25, 160)),
    "yellow": ((255, 255, 0), (255, 221, 51), (250, 218, 94), (241, 230, 60)),
    "purple": ((128, 0, 128), (142, 68, 173), (106, 27, 154), (148, 0, 211)),
    "orange": ((255, 140, 0), (255, 165, 0), (243, 122, 24), (230, 126, 34)),
    "cyan": ((0, 255, 255), (0, 206, 209), (64, 224, 230), (0, 188, 212)),
    "pink": ((255, 105, 180), (255, 182, 193), (248, 150, 190), (255, 140, 200)),
}


@dataclass(frozen=True)
class Style:
    """What differs from a plain drawing. Sizes are shares of the shorter side."""

    background: str = "flat"
    fill: str = "flat"
    radius: tuple = (0.1, 0.22)
    objects: tuple = (2, 5)
    size: tuple = (200, 256)  # pixels of the shorter side
    aspect: float = 1.0  # width over height
    turn: float = 10.0  # degrees, at most
    after: str = ""  # what happens to the finished picture


STYLES = {
    "plain": Style(), "thin stroke": Style(fill="thin stroke"), "outlined": Style(fill="outlined"),
    "gradient": Style(fill="gradient"), "striped": Style(fill="striped"), "black outline": Style(fill="black outline"),
    "shadow": Style(fill="shadow"), "soft edge": Style(fill="soft edge"),
    "tiny": Style(radius=(0.025, 0.045)), "huge": Style(radius=(0.38, 0.5), objects=(1, 1)),
    "many": Style(radius=(0.06, 0.11), objects=(10, 12)), "rotated": Style(turn=180.0),
    "4:1": Style(aspect=4.0), "1:3": Style(aspect=1 / 3),
    "checkerboard": Style(background="checkerboard"), "stripes": Style(background="stripes"),
    "grid paper": Style(background="grid paper"), "sky and grass": Style(background="sky and grass"),
    "photo-like": Style(background="photo-like"), "blur": Style(after="blur"), "JPEG 8": Style(after="JPEG 8"),
    "64 px": Style(size=(64, 64)), "3000 px": Style(size=(3000, 3000)),
}


def distance(kind, x, y):
    """Signed distance of the points x, y (y down) to the edge of a shape of about radius 1: below 0 inside."""
    r = np.hypot(x, y)
    if kind == "circle":
        return r - 0.95
    if kind == "ring":
        return np.abs(r - 0.72) - 0.22
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.75
    if kind == "cross":
        return np.minimum(np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.92), np.maximum(np.abs(y) - 0.3, np.abs(x) - 0.92))
    if kind == "heart":  # two discs and a turned square
        x, y = np.abs(x), 0.35 - y
        square = np.maximum(np.abs(x + y), np.abs(x - y)) / 2**0.5 - 0.6
        return np.minimum(square, np.hypot(x - 0.424, y - 0.424) - 0.6)
    corners = {"triangle": 3, "hexagon": 6, "star": 5}[kind]
    step = 2 * np.pi / corners
    angle = (np.arctan2(x, -y) + step / 2) % step - step / 2  # from the nearest corner, which points up
    if kind == "star":  # the line from a tip to the notch beside it
        px, py = r * np.abs(np.sin(angle)), r * np.cos(angle)
        nx, ny = 0.42 * np.sin(step / 2), 0.42 * np.cos(step / 2)
        return (px * (1 - ny) - (1 - py) * nx) / np.hypot(nx, 1 - ny)
    angle = np.abs(angle) - step / 2  # from the middle of a side
    return r * np.cos(angle) - np.cos(step / 2)


def background(name, height, width, rng):
    """float32 (H, W, 3) in [0, 255]."""
    def flat():
        return rng.uniform(40, 255) + rng.uniform(-12, 12, 3)

    y, x = np.mgrid[:height, :width]
    period = rng.uniform(0.05, 0.12) * min(height, width)
    first, second = flat(), flat()
    if name == "checkerboard":
        weight = ((x // period + y // period) % 2)[..., None]
    elif name == "stripes":
        weight = ((np.cos(angle := rng.uniform(0, np.pi)) * x + np.sin(angle) * y) // period % 2)[..., None]
    elif name == "grid paper":
        first, second = np.full(3, 250.0), np.array([170, 195, 225.0])
        weight = ((x % period < period * 0.1) | (y % period < period * 0.1))[..., None]
    elif name == "sky and grass":
        first, second = np.array([150, 200, 235.0]), np.array([110, 150, 80.0])
        weight = (y > rng.uniform(0.4, 0.7) * height)[..., None]
    elif name == "photo-like":  # noise with as much power in every octave, as photographs have it
        weight = np.zeros((height, width, 3))
        for octave in range(5):
            grid = rng.standard_normal((2 + 2**octave * 2, 2 + 2**octave * 2, 3))
            weight += ndimage.zoom(grid, (height / grid.shape[0], width / grid.shape[1], 1), order=1)[:height, :width]
        weight = 0.5 + weight / 5
    else:
        weight = np.zeros((height, width, 1))
    return (first + weight * (second - first)).clip(0, 255).astype(np.float32)


def draw(style, rng):
    """A scene: picture uint8 (H, W, 3), owner int8 (H, W), the shape seen at each pixel or -1, and its Shapes."""
    side = int(rng.integers(style.size[0], style.size[1] + 1))
    height, width = (side, round(side * style.aspect)) if style.aspect >= 1 else (round(side / style.aspect), side)
    picture = background(style.background, height, width, rng)
    owner, shapes = np.full((height, width), -1, np.int8), []
    for _ in range(200):
        if len(shapes) >= rng.integers(style.objects[0], style.objects[1] + 1):
            break
        radius = side * rng.uniform(*style.radius)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if all(np.hypot(x - s.x, y - s.y) > 1.05 * (radius + s.radius) for s in shapes):
            shape = Shape(str(rng.choice(list(SHAPES))), str(rng.choice(list(COLORS))), x, y, radius)
            paint(picture, owner, shape, len(shapes), style, rng)
            shapes.append(shape)
    if style.after == "blur":
        picture = ndimage.gaussian_filter(picture, (0.008 * side, 0.008 * side, 0))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    if style.after == "JPEG 8":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=8)
        image = Image.open(file).convert("RGB")
    for index, shape in enumerate(shapes):
        seen = owner == index
        shape.area, shape.box = int(seen.sum()), Image.fromarray(seen).getbbox()
    return image, owner, shapes


def paint(picture, owner, shape, index, style, rng):
    """Draw a Shape in place, into picture and owner."""
    turn = np.radians(rng.uniform(-style.turn, style.turn))
    reach = int(1.6 * shape.radius) + 4  # only the part around it
    top, left = max(0, int(shape.y) - reach), max(0, int(shape.x) - reach)
    region = picture[top:int(shape.y) + reach, left:int(shape.x) + reach]
    y, x = np.mgrid[:region.shape[0], :region.shape[1]]
    x, y = (x + left - shape.x) / shape.radius, (y + top - shape.y) / shape.radius

    def pixels(dx=0.0, dy=0.0):
        u, v = (x - dx) * np.cos(turn) + (y - dy) * np.sin(turn), (y - dy) * np.cos(turn) - (x - dx) * np.sin(turn)
        return shape.radius * distance(shape.kind, u, v)

    inside = pixels()
    cover = (0.5 - inside).clip(0, 1)
    color = np.array(PALETTE[shape.color][rng.integers(4)], np.float32)
    paint = np.broadcast_to(color, region.shape)
    stroke = max(1.0, {"thin stroke": 0.06, "outlined": 0.16, "black outline": 0.1}.get(style.fill, 0) * shape.radius)
    if style.fill in ("thin stroke", "outlined"):
        cover = (stroke / 2 + 0.5 - np.abs(inside + stroke / 2)).clip(0, 1)
    elif style.fill == "black outline":
        paint = np.where((inside > -stroke)[..., None], 0, paint)
    elif style.fill == "gradient":
        paint = paint * (0.75 - 0.35 * y)[..., None].clip(0.4, 1)
    elif style.fill == "striped":
        paint = np.where((np.floor(6 * (x + y)) % 2 == 0)[..., None], paint, 0.45 * paint)
    elif style.fill == "soft edge":
        cover = (0.5 - inside / (0.2 * shape.radius)).clip(0, 1)
    elif style.fill == "shadow":
        region *= 1 - 0.45 * (0.5 - pixels(0.12, 0.12) / (0.1 * shape.radius)).clip(0, 1)[..., None]
    region += cover[..., None] * (paint - region)
    owner[top:top + len(inside), left:left + inside.shape[1]][inside <= 0] = index


def phrase_kinds(shapes, height, width, rng):
    """{kind: (phrase, indices of its shapes)}: one phrase of each kind that the scene has."""
    groups = {kind: phrases for kind, phrases in scene_phrases(shapes, height, width).items() if phrases}
    return {kind: phrases[rng.integers(len(phrases))][::3] for kind, phrases in groups.items()}


def absent_phrases(shapes, rng):
    """{kind: phrase} for what is not in the scene."""
    there, kinds, colors = {(s.color, s.kind) for s in shapes}, {s.kind for s in shapes}, {s.color for s in shapes}
    pairs = [(color, kind) for color in COLORS for kind in SHAPES if (color, kind) not in there]
    rng.shuffle(pairs)
    found = {}
    for color, kind in pairs:
        name = {(True, True): "other pair", (False, True): "other color", (True, False): "other shape",
                (False, False): "neither"}[str(color) in colors, str(kind) in kinds]
        found.setdefault(name, f"the {color} {kind}")
    if len(shapes) > 1:  # a relation that does not hold
        a, b = shapes[:2]
        if abs(a.x - b.x) > a.radius + b.radius:
            found["relation"] = f"the {a.color} {a.kind} {'left' if a.x > b.x else 'right'} of the {b.color} {b.kind}"
            if sum((s.color, s.kind) in ((a.color, a.kind), (b.color, b.kind)) for s in shapes) > 2:
                del found["relation"]
    return found


@torch.inference_mode()
def measure(segmenter, count):
    """The three tables, lists of rows."""
    size = segmenter.model.config.mask_grid * segmenter.mask_tokenizer.config.downsample
    by_kind, alarms, styles = {}, {}, []
    for name, style in tqdm(STYLES.items(), desc="styles"):
        scores, ceiling = SegmentationMetrics(), []
        for i in range(count):
            rng = np.random.default_rng([i, *name.encode()])
            image, owner, shapes = draw(style, rng)
            asked = list(phrase_kinds(shapes, *owner.shape, rng).items())
            absent = list(absent_phrases(shapes, rng).items())
            prompts = [phrase for _, (phrase, _) in asked] + [phrase for _, phrase in absent]
            (masks,) = segmenter.many([image], [prompts])
            truths = [np.isin(owner, indices) for _, (_, indices) in asked]
            for (kind, (phrase, _)), mask, truth in zip(asked, masks, truths):
                scores.update(mask, truth, id=f"{i} {kind} {phrase}")
                by_kind.setdefault(kind, SegmentationMetrics()).update(mask, truth, id=f"{name} {i} {phrase}")
            for (kind, _), mask in zip(absent, masks[len(asked):]):
                alarms.setdefault(kind, []).append(mask.any())
            small = torch.from_numpy(np.stack([resize_mask(truth, size) for truth in truths])).bool()
            tokens = segmenter.mask_tokenizer.encode(mask_to_image(small.to(segmenter.device)))
            back = decode_masks(segmenter.mask_tokenizer, tokens, [owner.shape] * len(truths))
            ceiling += [iou(mask, truth) for mask, truth in zip(back, truths)]
        numbers = scores.compute()
        styles.append({"style": name, "gIoU": numbers["gIoU"], "cIoU": numbers["cIoU"],
                       "mask tokenizer": float(np.mean(ceiling)), "phrases": numbers["count"]})
    kinds = [{"kind": kind} | {key: numbers[key] for key in ("gIoU", "cIoU", "count")}
             for kind, numbers in sorted((kind, scores.compute()) for kind, scores in by_kind.items())]
    false = [{"absent": kind, "gets a mask": float(np.mean(masks)), "phrases": len(masks)}
             for kind, masks in sorted(alarms.items())]
    return {"styles": styles, "kinds": kinds, "absent": false}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="scenes per style (default: 20)")
    parser.add_argument("--checkpoint", type=Path, help="default: the embedded one")
    parser.add_argument("--json", type=Path, help="also write the tables as JSON")
    parser.add_argument("--preview", type=Path, help="write a picture of the styles instead")
    args = parser.parse_args()
    if args.preview:
        cells = []
        for name, style in STYLES.items():
            image, owner, _ = draw(style, np.random.default_rng([0, *name.encode()]))
            cells.append((name, [image, owner >= 0]))
        contact_sheet(cells, args.preview, headings=("picture", "objects"))
        return
    tables = measure(Segmenter.load(args.checkpoint), args.count)
    for rows in tables.values():
        print_table(rows, sys.stdout, digits=3)
        print()
    if args.json:
        write_json(args.json, tables)


if __name__ == "__main__":
    main()
