"""Examples (picture, phrase, mask) and the batches made of them; pictures with all their segments (Panoptic).

`scenes` is the embedded data set, drawn by scenes.py: it needs no download.

    python data.py preview scenes          # a contact sheet: picture, phrase, mask
    python data.py check ade20k --root R   # counts and broken files of a public data set

Legend: H W a picture's own height and width, S the side of the square that the model sees, P phrases per
picture, B phrases in a batch. Masks are bool (H, W), True on the object.
"""

import hashlib
import json
import pickle
import re
import sys
from array import array
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from multiprocessing.pool import ThreadPool
from operator import index
from pathlib import Path
from reprlib import repr as short  # of a value that may be long

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

from metrics import BadUsage, Parser, parse_json, printable, read_mask, regular, values_in, whole
from scenes import ABSENT, WORLDS, absent_phrases, draw_scene, measure, patch_truth, patch_view, pick_phrases
from weights import ASSETS, sha256_of

# ---- Example: what every data set yields -----------------------------------------------------------------


@dataclass
class Example:
    """One picture, one phrase, one mask: what every data set of phrases consists of."""

    image: Image.Image  # RGB, any size
    phrase: str  # the bare label or expression, without an instruction around it
    mask: np.ndarray  # bool (H, W) at the picture's own size
    id: str  # unique in its split; holds the data set's own picture id
    task: str  # "semantic" | "referring" | "reasoning"
    label: str | None = None  # the class name, for mIoU
    ignore: np.ndarray | None = None  # bool (H, W): pixels that are not scored


@dataclass
class Panoptic:
    """One picture and all of its n segments: what the data sets for PQ and AP consist of."""

    image: Image.Image  # RGB, any size
    id: str  # unique in its split: the data set's own picture id
    masks: np.ndarray  # bool (n, H, W) at the picture's own size; those of coco-instances may overlap
    labels: list  # n class names
    is_thing: list  # n bools: things are counted, stuff is not
    is_crowd: list  # n bools: one mask over many things of a class that nobody told apart
    ignore: np.ndarray | None = None  # bool (H, W): pixels that are not scored
    areas: list | None = None  # COCO's areas, by which AP parts small from large objects; None: the masks' pixels
    classes: dict | None = None  # all classes of the data set, in its order: {name: is it a thing?}


# The paper's example is the first; the paper says there are ten and does not print the others.
TEMPLATES = (
    "Produce a segmentation mask for {}.", "Segment {}.", "Please segment {} in this picture.",
    "Generate the mask of {}.", "Where is {}?", "Show me {}.", "Find {} in the image.", "Can you outline {}?",
    "Mark every pixel of {}.", "Please give the mask for {}.",
)
_DETERMINERS = ("the", "a", "an", "all", "every", "everything", "something", "what", "whatever")


def instruct(phrase, template):
    """Put `phrase` into an instruction `template`. A bare class name gets the paper's "the" before it."""
    if phrase.split()[0].lower() not in _DETERMINERS:
        phrase = "the " + phrase
    return template.format(phrase)


# ---- run-length encoding, as COCO stores masks: runs down the columns, the first one of background -------

MOST_PIXELS = 178_956_970  # of a mask; Pillow refuses larger pictures


def rle_encode(mask):
    """bool (H, W) -> {"size": [H, W], "counts": compressed COCO string}."""
    mask = np.asarray(mask, bool)
    height, width = mask.shape
    # The pixels that differ from the one before them, down the columns. Turning the whole mask would take longer.
    rows, columns = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), max(width, 1))
    across = np.flatnonzero(mask[:1, 1:] != mask[-1:, :-1]) + 1
    changes = np.sort(np.concatenate([columns * height + rows + 1, across * height]))
    ends = np.concatenate([[0] if mask[:1, :1].any() else [], changes, [mask.size]]).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    return {"size": list(mask.shape), "counts": pack_counts(counts)}


def rle_decode(rle, size=None):
    """COCO run-length encoding, compressed (str or bytes) or a plain list of counts -> bool (H, W).

    size: the (H, W) that it must declare, where it is known; another one is then never allocated.
    ValueError for anything else, and where the counts do not fill the size.
    """
    try:
        height, width = map(index, rle["size"])
        if size not in (None, (height, width)) or min(height, width) < 0 or height * width > MOST_PIXELS:
            raise ValueError(f"expected size {list(size)}" if size else f"expected at most {MOST_PIXELS:,} pixels")
        counts = rle["counts"]
        packed = isinstance(counts, (str, bytes))
        counts = unpack_counts(counts) if packed else np.fromiter(map(index, counts), np.int64)
        if (counts < 0).any() or (counts > MOST_PIXELS).any() or counts.sum() != height * width:
            raise ValueError("the counts do not fill the size")
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("a run-length mask has whole numbers as size [H, W] and as counts, got "
                         f"{short(rle)} ({error})") from None
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def pack_counts(counts):
    """Counts -> COCO's string: from the fourth on the difference to the last but one, 5 bits per character."""
    values = np.asarray(counts, np.int64).copy()
    values[3:] -= np.asarray(counts, np.int64)[1:-2]
    # k characters hold 5 k bits with the sign: -16 .. 15, -512 .. 511 ...
    size = np.maximum(values, ~values)  # how far from 0, as two's complement counts it
    last = sum((size >= 16 << 5 * k).astype(np.int64) for k in range(int(size.max(initial=0)).bit_length() // 5 + 1))
    place = np.arange(last.max(initial=0) + 1)
    codes = 48 + (values[:, None] >> 5 * place & 0x1F) + np.where(place < last[:, None], 0x20, 0)  # (n, characters)
    return codes[place <= last[:, None]].astype(np.uint8).tobytes().decode()


def unpack_counts(text):
    """The inverse of pack_counts, for counts below 2^34."""
    text = text if isinstance(text, bytes) else text.encode()
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 0x20 == 0)
    lengths = np.diff(ends, prepend=-1)  # characters of each count
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20 or lengths.max() > 7:
        raise ValueError("no string of run-length counts")
    starts = ends - lengths + 1
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 0x1F) << 5 * place, starts)
    values -= np.where(codes[ends] & 0x10, 1 << 5 * lengths, 0)
    values[1::2] = values[1::2].cumsum()  # undo the differences to the last but one,
    values[2::2] = values[2::2].cumsum()  # which begin at the fourth
    return values


def polygons_to_mask(polygons, height, width):
    """A COCO segmentation in pixels -> bool (height, width), the union of its parts: a list of polygons
    [x0, y0, x1, y1, ...] and run-length masks, or one run-length mask.

    A polygon is filled by even-odd at pixel centres as pycocotools does it (cocoapi, common/maskApi.c): vertices on a
    grid five times as fine, the outline walked there, its crossings of pixel columns kept.
    ValueError for a polygon of fewer than three points, or one that goes far outside the picture.
    """
    mask = np.zeros((height, width), bool, order="F")
    for part in polygons if isinstance(polygons, (list, tuple, np.ndarray)) else [polygons]:
        mask |= rle_decode(part, (height, width)) if isinstance(part, dict) else _fill(part, height, width)
    return mask


def _fill(polygon, height, width):
    """One polygon [x0, y0, x1, y1, ...] -> bool (height, width)."""
    points = np.zeros((0, 2))
    with suppress(TypeError, ValueError, OverflowError):
        points = np.array(polygon, np.float64).reshape(-1, 2)
    # Our bounds: coordinates up to twice the longer side, an outline of up to a million pixels. Walking a longer one
    # would take too long; real annotations stay far below both.
    if (len(points) < 3 or not (np.abs(points) <= 2 * max(height, width)).all()  # NaN too
            or np.abs(points - np.roll(points, -1, axis=0)).max(1).sum() > 1_000_000):
        raise ValueError("a mask is run-length or a list of polygons x0, y0, x1, y1, ... of at least three points in "
                         f"or near the picture of {width} x {height}, got {short(polygon)}")
    corners = np.trunc(5 * points + 0.5).astype(np.int64)
    outline = []  # of the pixels (x, y) between each two corners
    for start, end in zip(corners, np.roll(corners, -1, axis=0)):
        along = int(np.abs(end - start).argmax())  # the axis on which it goes farther
        flip = start[along] > end[along]  # walk from the smaller end, so that both ways give the same pixels
        if flip:
            start, end = end, start
        steps = np.arange(end[along] - start[along] + 1)
        walk = np.empty((len(steps), 2), np.int64)
        walk[:, along] = start[along] + steps
        walk[:, 1 - along] = np.trunc(start[1 - along] + (end - start)[1 - along] / max(steps[-1], 1) * steps + 0.5)
        outline.append(walk[::-1] if flip else walk)
    x, y = np.concatenate(outline).T
    turn = np.flatnonzero(x[1:] != x[:-1])  # the outline goes on to another fine column between these and the next
    left, right = x[turn], x[turn + 1]
    column = (np.where(right < left, right, right - 1) + 0.5) / 5 - 0.5
    row = np.ceil(np.clip((np.minimum(y[turn], y[turn + 1]) + 0.5) / 5 - 0.5, 0, height)).astype(np.int64)
    keep = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    crossings = column[keep].astype(np.int64) * height + row[keep]  # in column-major order
    inside = np.bincount(crossings, minlength=height * width + 1)[:-1].cumsum() % 2 == 1
    return inside.reshape((height, width), order="F")


# ---- pictures from files ---------------------------------------------------------------------------------


@contextmanager
def _reading(where, what=None):
    """Every error while something is read becomes one line: decoders raise nearly every kind for a damaged file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and str(error.filename) == str(where):
            raise FileNotFoundError(f"{where}: no such {what}") from None
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{where}: " + (f"broken {what} ({reason})" if what else f"{reason}")) from None


def open_picture(source):
    """Open a picture of any kind as an upright 8-bit RGB PIL image; `source`: a path or a binary file.

    EXIF rotation is applied, transparency goes onto white, 16-bit grey is scaled to 8 bits.
    FileNotFoundError, or ValueError with one line for a file that is no whole picture.
    """
    path = isinstance(source, (str, Path))
    with _reading(source if path else "standard input", "picture"):
        with Image.open(regular(source) if path else source) as image:
            if image.format == "EPS":
                raise ValueError("a PostScript program, which is not run")  # Pillow would start Ghostscript
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def to_rgb(image):
    """PIL picture of any mode -> 8-bit RGB: transparency goes onto white, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        # I;16 has a known range; I and F do not say theirs
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0 if values.max() > 1 else 1.0
        grey = np.empty(values.shape, np.uint8)
        for row, line in zip(grey, values):  # one row at a time: float64 takes eight times the picture's memory
            row[:] = line.astype(np.float64).clip(0, top) * (255.0 / top) + 0.5
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


# ---- to the square that the model sees -------------------------------------------------------------------


def resize_picture(image, size):
    """PIL picture -> uint8 (size, size, 3): PIL's bilinear, aspect ratio not kept, as SigLIP2 does it."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_pixels(pixels, size):
    """uint8 (H, W, C) -> uint8 (size, size, C): the same filter in torch, four times as fast, for training.

    At most 1 of 255 away from `resize_picture`, which official outputs agree with to the last digit.
    """
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, C, H, W)
    small = F.interpolate(channels, (size, size), mode="bilinear", antialias=True)  # (1, C, size, size)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def resize_mask(mask, size):
    """bool (H, W) -> bool (size, size): True where bilinear interpolation gives at least one half.

    Paper: not stated. Nearest neighbour would shift every edge by up to half a pixel of the source at random,
    which alone costs 0.01 to 0.02 of IoU at 128 px and which no model can foresee.
    """
    if mask.flags.f_contiguous and not mask.flags.c_contiguous:  # as rle_decode gives it: no copy to turn it
        return resize_mask(mask.T, size).T
    return resize_pixels(mask.view(np.uint8)[:, :, None] * 255, size)[:, :, 0] >= 128


def padded_box(width, height, size):
    """Where a picture stands in a square of `size` with its longer side filling it: (left, top, width, height).

    As Janus' image processor has it: the other side is cut to an integer, at least 14, and centred.
    """
    long = max(width, height)
    w, h = max(int(width / long * size), 14), max(int(height / long * size), 14)
    return (size - w) // 2, (size - h) // 2, w, h


def pad_picture(image, size):
    """PIL picture -> uint8 (size, size, 3) as Janus sees it: aspect ratio kept, PIL's bicubic, on grey (127)."""
    left, top, w, h = padded_box(*image.size, size)
    square = Image.new("RGB", (size, size), (127, 127, 127))
    square.paste(to_rgb(image).resize((w, h), Image.Resampling.BICUBIC), (left, top))
    return np.array(square)


def pad_mask(mask, size):
    """bool (H, W) -> bool (size, size) in the place that pad_picture gives the picture, background around it."""
    left, top, w, h = padded_box(*mask.shape[::-1], size)
    square = np.zeros((size, size), bool)
    image = Image.fromarray(mask.view(np.uint8) * 255).resize((w, h), Image.Resampling.BILINEAR)
    square[top : top + h, left : left + w] = np.asarray(image) >= 128
    return square


def to_pixels(pictures):
    """uint8 (B, S, S, 3), array or tensor on any device -> float32 (B, 3, S, S) in [-1, 1] there."""
    planes = torch.as_tensor(pictures).permute(0, 3, 1, 2).contiguous()  # while it is a quarter of the size
    return planes.float().div_(127.5).sub_(1)


# ---- data sets -------------------------------------------------------------------------------------------


class Scenes:
    """Drawn scenes; example i is phrase i % P of picture i // P, and a function of (split, i) alone.

    split: "train" (a million pictures), "val", "test" (no colour-shape pair of NOVEL in any of the three), "novel"
    (every phrase names an object of a NOVEL pair) and "absent" (every phrase names what is not there, the kinds of
    scenes.ABSENT in turn). name: of a world of scenes.py. phrases: P.
    """

    SPLITS = {"train": 1_000_000, "val": 2_000, "test": 2_000, "novel": 2_000, "absent": 2_000}

    def __init__(self, split="train", name="scenes", root=None, phrases=1):  # they need no root
        self.split, self.world, self.phrases = split, WORLDS[name], phrases
        self._recent = None, None  # the last scene: the P phrases of a picture are asked in a row

    def __len__(self):
        return self.SPLITS[self.split] * self.phrases

    def scene(self, index):
        """Picture `index`: (PIL image, owner int8 (H, W), list of Shape, list of P picked phrases)."""
        if not 0 <= index < self.SPLITS[self.split]:
            raise IndexError(f"picture {index} of {self.SPLITS[self.split]}")
        if self._recent[0] != index:
            rng = np.random.default_rng([list(self.SPLITS).index(self.split), index, self.world.seed])
            picked = []
            while not picked:
                picture, owner, objects = draw_scene(rng, self.world, self.split == "novel")
                if measure(owner, objects):  # else an object is almost hidden behind later ones: draw another scene
                    picked = self._phrases(index, owner, objects, rng)
            self._recent = index, (Image.fromarray(picture), owner, objects, picked)
        return self._recent[1]

    def _phrases(self, index, owner, objects, rng):
        """P phrases for a scene; none if it has no phrase of the kind that the split wants."""
        if self.split == "absent":
            found = absent_phrases(objects, self.world, *owner.shape, rng)
            return [found[kind] for kind in (ABSENT[index % len(ABSENT)],) * self.phrases if kind in found]
        must = 0 if self.split == "novel" else None
        absent = self.world.absent if self.split == "train" else 0.0
        return pick_phrases(objects, *owner.shape, self.phrases, rng, self.world, must, absent)

    def __getitem__(self, i):
        image, owner, _, picked = self.scene(i // self.phrases)
        phrase, task, label, indices = picked[i % self.phrases]
        return Example(image, phrase, np.isin(owner, indices), f"{self.split}-{i:07d}", task, label)


class SceneInstances(Scenes):
    """The pictures of `scenes-plain` with all objects: the shapes are classes of things, the background is stuff."""

    SPLITS = {split: count for split, count in Scenes.SPLITS.items() if split != "absent"}
    classes = {**dict.fromkeys(WORLDS["scenes-plain"].shapes, True), "background": False}

    def __init__(self, split, name, root=None):
        super().__init__(split, "scenes-plain")

    def _phrases(self, *scene):
        return [None]  # nothing is asked here

    def __getitem__(self, i):
        image, owner, objects, _ = self.scene(i)
        masks = owner == np.reshape([*range(len(objects)), -1], (-1, 1, 1))  # -1 owns the background
        labels = [*(shape.kind for shape in objects), "background"]
        is_thing, no_crowds = [self.classes[label] for label in labels], [False] * len(labels)
        return Panoptic(image, f"{self.split}-{i:07d}", masks, labels, is_thing, no_crowds, classes=self.classes)


# ---- public data sets, in the layouts of their official archives. Opening one reads no picture. ----------

def _lines(file):
    return (ASSETS / "labels" / f"{file}.txt").read_text().splitlines()


def _find(root, *candidates):
    """The first of some paths below root that exists."""
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise FileNotFoundError(f"{root}: holds none of {', '.join(map(str, candidates))}")


# --- label maps: one example for each picture and class


def read_label_map(path, modes=("L", "P", "I;16", "I")):
    """A PNG or TIFF or a .mat of PASCAL Context -> integer array (H, W), (H, W, 3) if RGB: raw values, never colors."""
    with _reading(path, "label map"):
        if path.suffix == ".mat":
            from scipy.io import loadmat  # takes a third of a second

            return loadmat(regular(path), variable_names=["LabelMap"])["LabelMap"].astype(np.int64)
        with Image.open(regular(path)) as image:
            mode, labels = image.mode, np.asarray(image)
    if mode not in modes:
        raise ValueError(f"{path}: a picture of mode {mode}, expected a map of numbers, mode {' or '.join(modes)}")
    return labels


class LabelMaps:
    """Examples of pictures with a map of classes: picture, class name, the pixels of that class.

    name: of LAYOUTS. classes: "present" asks for the classes that a picture has; "all" asks for every class, with an
    empty mask where it is absent.
    """

    def __init__(self, split, name, root, classes="present"):
        stems, pictures, maps, end, values, self.ignored = LAYOUTS[name](split, name, root)
        self.names = dict(zip(values, _lines(name)))
        self.items = [(stem, pictures / f"{stem}.jpg", maps / f"{stem}{end}") for stem in stems]
        self.counts, cache = {"pictures": len(stems)}, maps.with_name(f"{maps.name}.{name}-{split}.index.json")
        self.pairs = []
        for i, values in enumerate(_values_of_maps(self.items, cache)):
            unknown = sorted(set(values) - set(self.names) - set(self.ignored))
            if unknown:
                raise ValueError(f"{self.items[i][2]}: value {unknown[0]} is none of the {len(self.names)} classes")
            present = [value for value in values if value in self.names]
            self.pairs += [(i, value) for value in (self.names if classes == "all" and present else present)]
        self._recent = None, None, None

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        index, value = self.pairs[i]
        if self._recent[0] != index:  # the classes of one picture are asked in a row
            _, picture, file = self.items[index]
            image, labels = open_picture(picture), read_label_map(file)
            if labels.shape != image.size[::-1]:
                raise ValueError(f"{file}: labels of size {labels.shape[::-1]}, {picture} has {image.size}")
            self._recent = index, image, labels
        _, image, labels = self._recent
        name, ignore = self.names[value], np.isin(labels, self.ignored)
        return Example(image, name, labels == value, f"{self.items[index][0]}:{value}", "semantic", name,
                       ignore if ignore.any() else None)


def _values_of_maps(items, cache):
    """The sorted values in each label map. They take long to find, so they are kept in the file `cache`, with a hash of
    the name, size and time of each map."""
    stats = [(file.name, stat.st_size, stat.st_mtime_ns) for _, _, file in items for stat in [file.stat()]]
    stamp = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is not ours
        content = parse_json(regular(cache).read_bytes())
        if content["stamp"] == stamp:
            return content["values"]
    with ThreadPool(8) as pool:  # Pillow decodes without holding the interpreter's lock
        rows = pool.imap(lambda item: values_in(read_label_map(item[2])), items)
        values = list(tqdm(rows, desc=f"index {cache.name}", total=len(items), disable=len(items) < 200))
    with suppress(OSError), whole(cache) as temporary:  # in a folder that cannot be written to they are found again
        temporary.write_text(json.dumps({"stamp": stamp, "values": values}))
    return values


def _files(folder, end, wanted=None):
    """{stem: path} of the files below a folder that end in a digit and `end`, sorted; ValueError unless their stems are
    those `wanted` (default: at least one)."""
    found = {path.name.removesuffix(end): path for path in sorted(folder.rglob(f"*[0-9]{end}"))}
    odd = sorted(found.keys() ^ set(found if wanted is None else wanted)) or ["*"] * (not found)
    if odd:
        reason = "has no annotations" if odd[0] in found else "is missing"
        raise ValueError(f"{folder}: {odd[0]}{end} {reason} ({len(odd)} files do not fit)")
    return found


# The layouts of the data sets: (split, name, root) -> stems, pictures, maps, end, the values in a map of the classes,
# values that are not scored. The files of a picture are pictures / STEM.jpg and maps / (STEM + end), its id is STEM.
ADE20K_FOLDERS = {"train": "training", "val": "validation"}


def _ade20k(split, name, root):
    """ADEChallengeData2016 (150 classes): 0 is not scored, k is row k of objectInfo150.txt."""
    base = _find(root, "ADEChallengeData2016/annotations", "annotations").parent
    maps = base / "annotations" / ADE20K_FOLDERS[split]
    return list(_files(maps, ".png")), base / "images" / maps.name, maps, ".png", range(1, 151), (0,)


def _cocostuff(split, name, root):
    """COCO-Stuff 164k: raw maps (label id - 1, 182 ids) or converted ones (0 .. 170); 255 is not scored."""
    folder = f"{split}2017"
    places = ("annotations", "stuffthingmaps_trainval2017", "stuffthingmaps", "cocostuff", "annotations_detectron2",
              "stuffthingmaps_detectron2")
    maps = _find(root, *(f"{place}/{folder}" for place in places)).parent
    # converted maps may lie beside the raw ones, which are read then
    end = ".png" if any(maps.glob(f"{folder}/*[0-9].png")) else "_labelTrainIds.png"
    stems = [f"{folder}/{stem}" for stem in _files(maps / folder, end)]
    used = list(map(int, _lines("cocostuff_raw_ids")))
    never = set(range(171)) - set(used)  # ids without pixels in raw maps
    for file in chain((maps / f"{stem}{end}" for stem in stems), maps.glob(f"*2017/*[0-9]{end}")):
        values = set(values_in(read_label_map(file))) - {255}
        if max(values, default=0) > 170 or values & never:  # the first map that tells decides
            used = used if max(values) > 170 else range(171)
            break
    else:
        raise ValueError(f"{maps}: its maps do not tell whether they are raw (182 ids) or converted (171)")
    return stems, _find(root, f"images/{folder}", folder).parent, maps, end, used, (255,)


def _voc20(split, name, root):
    """PASCAL VOC 2012, 20 classes: background and void are not scored ("PAS-20")."""
    base = _find(root, "VOCdevkit/VOC2012/ImageSets", "VOC2012/ImageSets", "ImageSets").parent
    stems = _find(base, f"ImageSets/Segmentation/{split}.txt").read_text(errors="replace").split()
    return stems, base / "JPEGImages", base / "SegmentationClass", ".png", range(1, 21), (0, 255)


def _pascal_context(split, name, root):
    """PASCAL Context, 59 or all 459 classes, in whichever of its published forms is there.

    The 59 are in rising order of their 459 ids, as mmsegmentation, SAN and CAT-Seg have them; the maps that OVSeg
    prepares lie in a folder of the same name in another order and cannot be told from these.
    """
    base = _find(root, "VOCdevkit/VOC2010/JPEGImages", "VOC2010/JPEGImages", "JPEGImages").parent
    lists = [base / "ImageSets" / "SegmentationContext" / f"{split}.txt", base / f"pascalcontext_{split}.txt"]
    listed = next(filter(Path.exists, lists), None)
    prepared = f"annotations_detectron2/{name}_{split}"  # one folder per split: needs no list
    ids = list(map(int, _lines("pc59_of_459_ids")))
    forms = {"pc59": [("SegmentationClassContext", ".png", range(1, 60), (0,)), (prepared, ".png", range(59), (255,)),
                      ("trainval", ".mat", ids, tuple(set(range(460)) - set(ids)))],
             "pc459": [(prepared, ".tif", range(459), (459, 65535)), ("trainval", ".mat", range(1, 460), (0,))]}[name]
    for folder, end, values, ignored in forms:
        maps = base / folder
        if maps.is_dir() and (folder == prepared or listed):
            stems = list(_files(maps, end)) if folder == prepared else listed.read_text(errors="replace").split()
            return stems, base / "JPEGImages", maps, end, values, ignored
    raise FileNotFoundError(f"{base}: holds none of {', '.join(folder for folder, *_ in forms)} with a list of {split}")


LAYOUTS = {"ade20k": _ade20k, "cocostuff": _cocostuff, "voc20": _voc20, "pc59": _pascal_context,
           "pc459": _pascal_context}


# --- referring expressions: one example for each sentence


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers, as the refs files hold; refuses every name of a class or function."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"refused: it names {module}.{name}")


def read_refs(file):
    """refs(SPLITTER).p, a Python 2 pickle -> list of dicts; ValueError if anything but plain values is in it."""
    with _reading(file, "refs file"), open(regular(file), "rb") as opened:
        return PlainUnpickler(opened, encoding="latin1").load()


class Refer:
    """refCOCO, refCOCO+, refCOCOg, refCLEF (github.com/lichengunc/refer): an example is a sentence and its object.

    The phrase is the cleaned sentence (`sent`), as LISA takes it; the id is "IMAGE_ID:SENT_ID". Splits match as in
    refer.py: a ref of testAB is in testA, in testB and in test.
    """

    SPLITTERS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}  # unless split_by says

    def __init__(self, split, name, root, split_by=None):
        split_by = split_by or self.SPLITTERS[name]
        self.file, self.instances = root / name / f"refs({split_by}).p", root / name / "instances.json"
        refs = read_refs(self.file)
        with _reading(self.instances, "instances of a refer set"):
            content = parse_json(regular(self.instances).read_bytes())
            images = {image["id"]: image for image in content["images"]}
            annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
        self.pictures = _find(root, *(["images/saiapr_tc-12"] if name == "refclef" else
                                      ["images/mscoco/images/train2014", "images/train2014", "train2014"]))
        with _reading(self.file, "refs file"):
            chosen = [ref for ref in refs if ref["split"] == split or split[4:] in ref["split"][4:]
                      and split.startswith("test") and ref["split"].startswith("test")]
            self.rows = [(images[ref["image_id"]], annotations[ref["ann_id"]], sentence["sent"], sentence["sent_id"])
                         for ref in chosen for sentence in ref["sentences"]]
        if not self.rows:
            raise BadUsage(f"{name} ({split_by}) has no split {split!r}: choose one of "
                           f"{', '.join(sorted({str(ref['split']) for ref in refs}))}")
        pictures = {image["id"] for image, *_ in self.rows}
        self.counts = {"refs": len(chosen), "pictures": len(pictures), "sentences": len(self.rows)}

    def __len__(self):
        return len(self.rows)

    def phrase(self, i):
        with _reading(f"{self.file}: sentence {self.rows[i][3]}"):
            return _words(self.rows[i][2])

    def __getitem__(self, i):
        image, annotation, _, sentence_id = self.rows[i]
        phrase, number = self.phrase(i), image["id"]
        with _reading(f"{self.instances}: annotation {annotation['id']}"):
            files = (image["file_name"], f"{number // 1000:02d}/images/{number}.jpg", f"{number}.jpg")  # they vary
            file = next((file for file in files if (self.pictures / file).exists()), files[0])
            picture = open_picture(self.pictures / file)
            if picture.size != (image["width"], image["height"]):
                raise ValueError(f"{file} has size {picture.size}, expected {image['width'], image['height']}")
            # parts of fewer than three points enclose nothing
            parts = [part for part in annotation["segmentation"] if isinstance(part, dict) or len(part) >= 6]
            mask = polygons_to_mask(parts, *picture.size[::-1])
        return Example(picture, phrase, mask, f"{number}:{sentence_id}", "referring")


def _words(phrase):
    """A phrase without the white space around it; ValueError if it is no text or has no words."""
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"phrase {short(phrase)}: expected words")
    return phrase.strip()


# --- all segments: one Panoptic for each picture


class Segments:
    """Pictures with all their segments. name: of SEGMENTS, which has a function of (split, name, root) that returns
    {class: is it a thing?} and rows, and one that reads a map of numbers. A row is a picture's id, its path, its map or
    None, its size or None, and its segments, each (number or shape, label, is it a crowd?, area).
    """

    def __init__(self, split, name, root):
        layout, self.read = SEGMENTS[name]
        self.classes, self.rows = layout(split, name, root)
        self.counts = {"pictures": len(self.rows)}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        id, picture, file, size, segments = self.rows[i]
        image = open_picture(picture)
        with _reading(f"segments of {picture}"):
            if file:
                numbers, segments = self.read(file, segments)
                masks = numbers == np.array([number for number, *_ in segments], numbers.dtype).reshape(-1, 1, 1)
                ignore, areas = ~masks.any(0), None
            else:  # they may overlap, and what is none of them is not void
                masks = np.array([polygons_to_mask(shape, *size) for shape, *_ in segments], bool).reshape(-1, *size)
                ignore, areas = None, [area for *_, area in segments]
            if masks.shape[1:] != image.size[::-1]:
                raise ValueError(f"they have size {masks.shape[:0:-1]}, the picture has {image.size}")
        labels, is_crowd = [label for _, label, *_ in segments], [is_crowd for _, _, is_crowd, _ in segments]
        is_thing = [self.classes[label] for label in labels]
        return Panoptic(image, id, masks, labels, is_thing, is_crowd, ignore, areas, self.classes)


def _coco(split, name, root):
    """COCO's JSON. A segment is polygons or a run-length mask (instances), or a number in a PNG of the picture."""
    if name == "ade20k-panoptic":
        base, stem = _find(root, "ADEChallengeData2016/images", "images").parent, f"ade20k_panoptic_{split}"
        pictures = base / "images" / ADE20K_FOLDERS[split]
    else:
        base, stem = _find(root, "coco/annotations", "annotations").parent, f"{name[5:]}_{split}2017"
        pictures = _find(base, f"{split}2017", f"images/{split}2017")
    file, panoptic = _find(base, f"annotations/{stem}.json", f"{stem}.json"), name != "coco-instances"
    with _reading(file, "annotations"):
        content = parse_json(regular(file).read_bytes())
        names = {category["id"]: category["name"].strip() for category in content["categories"]}
        classes = {names[c["id"]]: not panoptic or bool(c["isthing"]) for c in content["categories"]}
        found = {image["id"]: (Path(image["file_name"]).stem, (image["height"], image["width"]), [])
                 for image in content["images"]}
        for annotation in content["annotations"]:
            found[annotation["image_id"]][2].extend(
                (s["id" if panoptic else "segmentation"], names[s["category_id"]], bool(s["iscrowd"]), s["area"])
                for s in (annotation["segments_info"] if panoptic else [annotation]))
    stems = [stem for stem, *_ in found.values()]
    pictures = _files(pictures, ".jpg", stems)
    maps = _files(_find(base, stem, f"annotations/{stem}"), ".png", stems) if panoptic else dict.fromkeys(stems)
    return classes, [(str(id), pictures[stem], maps[stem], *more) for id, (stem, *more) in found.items()]


def _read_panoptic(file, segments):
    numbers = read_label_map(file, ("RGB",)) @ np.array([1, 256, 65536], np.int32)  # (H, W); 0 is void
    there, listed = sorted({*np.unique(numbers).tolist()} - {0}), sorted(number for number, *_ in segments)
    if there != listed:
        raise ValueError(f"{file} holds the numbers {short(there)}, the JSON lists {short(listed)}")
    return numbers, segments


def _cityscapes(split, name, root):
    """Maps of labelId, or of labelId * 1000 + k for one thing; 19 classes are evaluated, the rest is void."""
    base = _find(root, "cityscapes/gtFine", "gtFine").parent
    maps = _files(_find(base, f"gtFine/{split}"), "_gtFine_instanceIds.png")
    pictures = _files(_find(base, f"leftImg8bit/{split}"), "_leftImg8bit.png", maps)
    names = dict(zip(map(int, _lines("cityscapes_ids")), _lines("cityscapes")))  # of the evaluated labelIds
    return ({name: label >= 24 for label, name in names.items()},  # from "person" on they are things
            [(stem, pictures[stem], file, None, names) for stem, file in maps.items()])


def _read_cityscapes(file, names):
    numbers = read_label_map(file)
    labels = {number: number // 1000 or number for number in values_in(numbers)}
    if max(labels.values()) > 33:
        raise ValueError(f"{file}: value {max(labels)} is no labelId of 0 to 33, nor 1000 times one + k")
    # A thing without k is a crowd, as cityscapesScripts' createPanopticImgs.py has it.
    return numbers, [(n, names[label], 24 <= n < 1000, None) for n, label in labels.items() if label in names]


SEGMENTS = {"coco-panoptic": (_coco, _read_panoptic), "ade20k-panoptic": (_coco, _read_panoptic),
            "coco-instances": (_coco, None), "cityscapes": (_cityscapes, _read_cityscapes)}


# --- one JSON object per line


class JSONLines:
    """Your own data: a text file with one JSON object per line.

        {"image": "photos/1.jpg", "phrase": "the cup on the left", "mask": "masks/1.png"}
        {"image": "photos/1.jpg", "phrase": "the table", "mask": {"size": [480, 640], "counts": "..."}}
        {"image": "photos/2.jpg", "phrase": "dogs", "mask": [[10, 10, 60, 10, 60, 40]], "label": "dog"}

    image: a path, from the folder of the file (or from `root`). mask: a PNG of one channel, black where there is no
    object (metrics.read_mask), a COCO run-length mask, or COCO polygons [x0, y0, x1, y1, ...] in pixels.
    Optional: id, a string or a number (default: the line's number); task (default: referring); label, a string (the
    class name, for mIoU). Lines with the same label need different ids, which is checked when the file is opened.
    A line that is broken in another way raises ValueError when it is read.
    picture_of: int64 per line, a hash of `image`, the same in every process; 0 for a broken line.

    SA-OVRS, as annotate.py writes it, is ROOT/SPLIT.jsonl of such lines, images from ROOT. There the mask is called
    `segmentation`; annotation_ids, score and provenance are not read here.
    """

    def __init__(self, split, name, root=None):
        path = root / f"{split}.jsonl" if name == "sa-ovrs" else Path(name.removeprefix("jsonl:"))
        self.path, self.root = path, root or path.parent
        rows, start = array("q"), 0  # 32 bytes per line
        with _reading(path, "file"), open(regular(path), "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = _record(line, number)
                        picture, key = _hash(record["image"]), _hash(repr((record["id"], record["label"])))
                    except (ValueError, KeyError):
                        picture = key = 0
                    rows.extend((start, number, picture, key))
                start += len(line)
        self.starts, self.numbers, self.picture_of, keys = np.array(rows).reshape(-1, 4).T.copy()
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero((np.diff(keys[order]) == 0) & (keys[order][1:] != 0))
        if len(again):
            first, second = self.numbers[order[again[0] : again[0] + 2]]
            raise ValueError(f"{path}: lines {first} and {second} have the same id and label (an id left out is the "
                             "line's number)")

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        number = int(self.numbers[i])
        with _reading(f"{self.path}: line {number}"):
            with open(self.path, "rb") as file:
                file.seek(self.starts[i])
                record = _record(file.readline(), number)
            image, phrase, task = record["image"], _words(record["phrase"]), record.get("task", "referring")
            mask = record["segmentation"] if "segmentation" in record else record["mask"]
            if task not in ("semantic", "referring", "reasoning"):
                raise ValueError(f"task {short(task)}: expected semantic, referring or reasoning")
            picture = open_picture(self.root / image)
            size = picture.size[::-1]
            mask = read_mask(self.root / mask) if isinstance(mask, str) else polygons_to_mask(mask, *size)
            if mask.shape != size:
                raise ValueError(f"a mask of size {mask.shape[::-1]}, {image} has {picture.size}")
        return Example(picture, phrase, mask, record["id"], task, record["label"])


def _record(line, number):
    """A line of JSON -> dict, with its "id" as text and its "label", text or None; ValueError for anything else."""
    record = parse_json(line)
    if not isinstance(record, dict) or not isinstance(record.get("image", ""), str):
        raise ValueError(f"{short(record)}: expected an object whose image is a path")
    id, label = record.get("id"), record.get("label")
    id = number if id is None else id
    if type(id) not in (str, int, float) or not isinstance(label, (str, type(None))):
        raise ValueError(f"id {short(id)}, label {short(label)}: expected a string or a number, and a string")
    return record | {"id": str(id), "label": label}


def _hash(text):
    """64 bits of a hash that is the same in every process, as Python's own is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


# --- by name

DATASETS = {**dict.fromkeys(WORLDS, Scenes), **dict.fromkeys(LAYOUTS, LabelMaps),
            **dict.fromkeys(Refer.SPLITTERS, Refer), "sa-ovrs": JSONLines, "jsonl:PATH": JSONLines,
            "scenes-instances": SceneInstances, **dict.fromkeys(SEGMENTS, Segments)}


def load_dataset(name, split, root=None, **options):
    """Open a data set: a sequence of Example or, for the last two lines of names, of Panoptic.

    name, with its splits and options:
        scenes scenes-rich                   train val test novel; phrases=
        ade20k cocostuff voc20 pc59 pc459    train val; classes="present" | "all"
        refcoco refcoco+ refcocog refclef    train val test testA testB testC, as the splitter has them; split_by=
        sa-ovrs                              any split of which ROOT holds SPLIT.jsonl
        jsonl:PATH                           your own data, see JSONLines; the split is not used
        scenes-instances                     train val test novel
        coco-panoptic coco-instances ade20k-panoptic cityscapes             train val
    root: the folder in which the official archives were unpacked; the drawn worlds need none.
    FileNotFoundError, or ValueError with one line for an unknown name, split or option, or a tree of another kind.
    """
    kind = "jsonl:PATH" if name.startswith("jsonl:") else name
    if kind not in DATASETS:
        raise BadUsage(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    for option in options:
        if option not in signature(DATASETS[kind]).parameters:
            raise BadUsage(f"{name} has no option {option!r}")
    if root is None and kind == name and not issubclass(DATASETS[name], Scenes):
        raise BadUsage(f"{name} needs --root, the folder in which its archives were unpacked")
    splits = getattr(DATASETS[kind], "SPLITS", ("train", "val") if name in (*LAYOUTS, *SEGMENTS) else [split])
    if split not in splits:
        raise BadUsage(f"{name} has no split {split!r}: choose one of {', '.join(splits)}")
    return DATASETS[kind](split, name, root and Path(root), **options)


def load_examples(name, split, root=None, **options):
    """load_dataset for those who ask for phrases: BadUsage for a data set of Panoptic."""
    if name in (*SEGMENTS, "scenes-instances"):
        raise BadUsage(f"{name} has all segments of a picture and no phrases: choose a data set of phrases and masks")
    return load_dataset(name, split, root, **options)


def load_segments(name, split, root=None):
    """load_dataset for those who ask for all segments: BadUsage for a data set of Example."""
    if name not in (*SEGMENTS, "scenes-instances"):
        raise BadUsage(f"{name} has phrases and masks, not all segments of a picture: choose one of "
                       f"scenes-instances, {', '.join(SEGMENTS)}")
    return load_dataset(name, split, root)


# ---- batches ---------------------------------------------------------------------------------------------


class Mixture(ConcatDataset):
    """Several data sets; of each sum(weights) training examples weights[k] are of datasets[k], in a fixed pattern.

    Each data set goes through its own epochs: none of its examples comes twice in one of them. As a sequence it is
    the data sets one after the other.
    """

    def __init__(self, datasets, weights):
        super().__init__(datasets)
        self.weights = weights

    def file_hashes(self):
        """[[name, SHA-256], ...] of its files of JSON lines, which people edit: caches and checkpoints record them."""
        parts = [getattr(part, "dataset", part) for part in self.datasets]  # the whole of a Subset
        return [[part.path.name, sha256_of(part.path)] for part in parts if isinstance(part, JSONLines)]


def load_mixture(text, split, root=None, **options):
    """"refcoco" or "ade20k:1,refcoco:2", names with weights -> Mixture of one split. `options`: of drawn worlds."""
    datasets, weights = [], []
    for part in text.split(","):
        name, weight = re.fullmatch(r"(.*?)(?::([1-9]\d{0,2}))?", part.strip()).groups()  # a weight is 1 to 999
        datasets.append(load_examples(name, split, root, **(options if name in WORLDS else {})))
        weights.append(int(weight or 1))
        if len(datasets[-1]) == 0:
            raise ValueError(f"{name}:{split} has no examples")
    return Mixture(datasets, weights)


def hold_out(datasets, share=0.05):
    """Data sets, the first of them JSONLines -> (data sets to train on, validation set) without a common picture.

    Validation has `share` of the pictures of the first data set. Their names decide which ones. They are left out of
    all JSONLines. A first data set of one picture is validated on as it is.
    """
    first = datasets[0]
    pictures = np.unique(first.picture_of[first.picture_of != 0])  # 0: a line that is no JSON
    if len(pictures) < 2:
        return datasets, first
    held = pictures[: max(1, round(share * len(pictures)))]
    train = [Subset(dataset, np.flatnonzero(~np.isin(dataset.picture_of, held)))
             if isinstance(dataset, JSONLines) else dataset for dataset in datasets]
    return train, Subset(first, np.flatnonzero(np.isin(first.picture_of, held)))


class Batches(Dataset):
    """Training micro-batches of one rank: item k is a function of (seed, k, rank) alone. A run can therefore stop and
    go on anywhere, on any number of workers, with no random state to keep.

    A batch (all ranks, all accumulation) is `batch_size` phrases. P phrases in a row share a picture, and the picture
    comes once. Two ranks never share an example. What they see together does not depend on how the batch is split.

    dataset: a Mixture, or any sequence of Example. No picture is flipped: phrases say left and right.
    mask_tokens: int array (len(dataset), M) of cached mask tokens (tokenizer.py encode), or None.
    padded: pictures and masks keep their aspect ratio, as pad_picture has it.

    Items: text_ids (b, L), pictures uint8 (b/P, S, S, 3) for `to_pixels`, masks bool (b, m, m), hide bool (b, M), ids
    list of b strings; b = micro_batch_size, m = mask_size (default: S). With mask_tokens, mask_tokens (b, M) for masks.
    """

    def __init__(self, dataset, text_tokenizer, size, tokens, batch_size, micro_batch_size, phrases=1, rank=0,
                 world_size=1, seed=0, hide=False, mask_size=None, mask_tokens=None, padded=False):
        if micro_batch_size < 1 or batch_size % (micro_batch_size * world_size) or micro_batch_size % phrases:
            raise ValueError(f"batch size {batch_size} must be a multiple of micro-batch size {micro_batch_size} x "
                             f"{world_size} ranks, and the micro-batch size one of {phrases} phrases per picture")
        self.mixture = dataset if isinstance(dataset, Mixture) else Mixture([dataset], [1])
        self.text_tokenizer, self.size, self.tokens = text_tokenizer, size, tokens
        self.mask_size, self.mask_tokens, self.padded = mask_size or size, mask_tokens, padded
        # which data set a group of phrases is from, in turn, and how many groups of that one came before in the turn
        self.turn = [(k, n) for k, weight in enumerate(self.mixture.weights) for n in range(weight)]
        self.batch_size, self.micro_batch_size, self.phrases = batch_size, micro_batch_size, phrases
        self.rank, self.world_size, self.seed, self.hide = rank, world_size, seed, hide
        self.accumulation = batch_size // (micro_batch_size * world_size)  # micro-batches per rank and step
        self._orders = {}  # of each data set: epoch, permutation

    def indices(self, k):
        """The examples of item k, and the position of the first one in the endless training sequence."""
        step, micro = divmod(k, self.accumulation)
        first = step * self.batch_size + (micro * self.world_size + self.rank) * self.micro_batch_size
        return [self._index(position) for position in range(first, first + self.micro_batch_size)], first

    def __getitem__(self, k):
        indices, first = self.indices(k)
        pictures, masks, text, hidden, ids = [], [], [], [], []
        for position, i in enumerate(indices, first):
            rng = np.random.default_rng([self.seed, position])
            example = self.mixture[i]
            choice = rng.integers(2 * len(TEMPLATES))  # half of the phrases bare, half through one of the templates
            text.append(instruct(example.phrase, TEMPLATES[choice]) if choice < len(TEMPLATES) else example.phrase)
            if position % self.phrases == 0:
                pictures.append(pad_picture(example.image, self.size) if self.padded else
                                resize_pixels(np.array(to_rgb(example.image)), self.size))
            if self.mask_tokens is None:
                masks.append((pad_mask if self.padded else resize_mask)(example.mask, self.mask_size))
            # Share of the mask tokens that the model does not get to see as input (LlamaSeg.forward, `hide`):
            # none for a fifth of the examples, all for a fifth, anything between for the rest.
            share = rng.uniform(-0.33, 1.33) if self.hide else 0.0
            hidden.append(rng.random(self.tokens) < share)
            ids.append(example.id)
        batch = {"text_ids": self.text_tokenizer(text), "pictures": torch.from_numpy(np.array(pictures)),
                 "hide": torch.from_numpy(np.array(hidden)), "ids": ids}
        if self.mask_tokens is None:
            return batch | {"masks": torch.from_numpy(np.array(masks))}
        return batch | {"mask_tokens": torch.from_numpy(self.mask_tokens[indices].astype(np.int64))}

    def _index(self, position):
        """The example at a position of the endless training sequence: each epoch is a new order of pictures."""
        turns, place = divmod(position // self.phrases, len(self.turn))
        k, before = self.turn[place]
        count = len(self.mixture.datasets[k])
        epoch, group = divmod(turns * self.mixture.weights[k] + before, count // self.phrases)
        if self._orders.get(k, (None,))[0] != epoch:
            self._orders[k] = epoch, np.random.default_rng([self.seed, epoch, k]).permutation(count // self.phrases)
        start = self.mixture.cumulative_sizes[k] - count
        return start + int(self._orders[k][1][group]) * self.phrases + position % self.phrases


class Patches(Dataset):
    """Batches for train.PatchReader: item k is a function of (k, rank) alone.

    Items: pictures uint8 (b, S, S, 3) of a drawn world's training split, from its end, truth (b, N, ...) of
    scenes.patch_truth, text_ids (b * P, L) of P phrases about each, named float32 (b * P, N): 1 where a patch has
    something of what a phrase names.
    """

    def __init__(self, name, text_tokenizer, size, grid, batch_size, phrases=16, rank=0, world_size=1):
        self.scenes, self.text_tokenizer = Scenes("train", name, phrases=phrases), text_tokenizer
        self.size, self.grid = size, grid
        self.batch_size, self.rank, self.world_size = batch_size // world_size, rank, world_size

    def __getitem__(self, k):
        pictures, truth, text, named, first = [], [], [], [], (k * self.world_size + self.rank) * self.batch_size
        for i in range(first, first + self.batch_size):
            image, owner, objects, picked = self.scenes.scene(self.scenes.SPLITS["train"] - 1 - i)
            pictures.append(resize_pixels(np.array(image), self.size))
            patches, share = patch_view(owner, len(objects), self.grid, self.size // self.grid)
            truth.append(patch_truth(patches, share, owner, objects, self.scenes.world))
            for j, (phrase, _, _, indices) in enumerate(picked):  # every second one through a template, as in Batches
                text.append(instruct(phrase, TEMPLATES[(i + j) % len(TEMPLATES)]) if j % 2 else phrase)
                named.append(share[:, list(indices)].sum(1) > 0.02)
        return {"pictures": torch.from_numpy(np.array(pictures)), "truth": torch.from_numpy(np.array(truth)),
                "text_ids": self.text_tokenizer(text), "named": torch.from_numpy(np.array(named, np.float32))}


# ---- pictures for people ---------------------------------------------------------------------------------


def contact_sheet(cells, path, columns=4, tile=112, headings=()):
    """Write a PNG of cells; a cell is (caption, [tiles]) and a tile a PIL picture or a bool mask (H, W).

    A tile keeps its aspect, on grey. headings: what the tiles of a cell are, written once above each column of cells.
    """
    font = ImageFont.load_default(11)
    width, height = max(len(tiles) for _, tiles in cells) * (tile + 2) + 10, tile + 24
    gap, top = 4, 18 if headings else 4
    sheet = Image.new("RGB", (columns * width + gap, -(-len(cells) // columns) * height + top), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, tiles) in enumerate(cells):
        x, y = gap + i % columns * width, top + i // columns * height
        for j, heading in enumerate(headings if i < columns else ()):
            draw.text((x + (j + 0.5) * (tile + 2), 2), heading, "dimgray", font, anchor="ma")
        caption = printable(caption[:200])
        while font.getlength(caption) > width - 8:
            caption = caption[:-2].rstrip("… ") + "…"
        draw.text((x, y), caption, fill="black", font=font)
        for j, picture in enumerate(tiles):
            picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            picture = ImageOps.pad(picture.convert("RGB"), (tile, tile), Image.Resampling.BILINEAR, "lightgray")
            sheet.paste(picture, (x + j * (tile + 2), y + 16))
    write_picture(sheet, path)


def paint_segments(panoptic):
    """A Panoptic -> PIL picture with each segment in a color of its own, the rest black."""
    colors = np.random.default_rng(1).integers(60, 256, (len(panoptic.masks), 1, 1, 3), np.uint8)
    return Image.fromarray((colors * panoptic.masks[..., None]).max(0, initial=0))


def write_picture(image, path):
    """Save a PIL picture as PNG."""
    with whole(path) as temporary:
        image.save(temporary, "PNG")


# ---- python data.py preview | check ----------------------------------------------------------------------


def check(args):
    """Count a data set's splits against the published counts and open its examples; 1 if any of them is broken.

    A sample spread over each split, or with --all every example. Broken ones are named, one per line.
    """
    options = {"split_by": args.split_by} if args.split_by else {}
    # {data set: {split: [pictures], or for the referring sets [refs, pictures, sentences]}}; null: unknown
    published = json.loads((ASSETS / "published_counts.json").read_text())
    published = published.get(f"{args.name} {args.split_by or Refer.SPLITTERS.get(args.name, '')}".strip(), {})
    splits = [args.split] if args.split else published or getattr(DATASETS.get(args.name), "SPLITS", ["train"])
    opened = broken = 0
    for split in splits:
        dataset = load_dataset(args.name, split, args.root, **options)
        counts = [f"{count:,} {kind} (published: {'?' if wanted is None else f'{wanted:,}'})" for (kind, count), wanted
                  in zip(getattr(dataset, "counts", {}).items(), published.get(split) or [None] * 3)]
        print(printable(f"{args.name}:{split}: {', '.join([*counts, f'{len(dataset):,} examples'])}"))
        step = 1 if args.all else max(1, len(dataset) // args.count)
        looked_at = range(0, len(dataset), 1 if isinstance(dataset, Refer) else step)  # all phrases: it takes no time
        for i in tqdm(looked_at, desc=f"open {split}", disable=len(looked_at) < 200):
            try:
                dataset.phrase(i) if i % step else dataset[i]
            except (ValueError, OSError) as error:
                tqdm.write(printable(f"broken: {error}"))
                broken += 1
        opened += -(-len(dataset) // step)
    print(f"{opened:,} examples opened, {broken} broken")
    return 1 if broken or not opened else 0


def preview(args):
    """Write a contact sheet of a data set: picture, phrase, mask; or picture, classes, segments."""
    dataset = load_dataset(args.name, args.split, args.root)
    if args.first >= len(dataset):
        raise ValueError(f"--first {args.first}: {args.name}:{args.split} has {len(dataset)} examples")
    chosen = [dataset[i] for i in range(args.first, min(args.first + args.count, len(dataset)))]
    cells = [(", ".join(e.labels), [e.image, paint_segments(e)]) if isinstance(e, Panoptic) else
             (e.phrase, [e.image, e.mask]) for e in chosen]
    contact_sheet(cells, args.out, headings=("picture", "mask"))
    last = args.first + len(chosen) - 1
    print(printable(f"wrote {args.out}: examples {args.first} to {last} of {args.name}:{args.split}"))


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage (argparse)."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for job, split, count, summary in (
            (preview, "train", 24, "write a contact sheet"),
            (check, None, 100, "count a data set, open its files, name the broken ones")):
        p = commands.add_parser(job.__name__, help=summary, description=job.__doc__)
        p.add_argument("name", help="data set: scenes, ade20k, refcoco, jsonl:PATH ... (README has the table)")
        p.add_argument("--root", type=Path, help="folder in which the official archives were unpacked")
        p.add_argument("--split", default=split, help=f"default: {split or 'all that the data set has'}")
        p.add_argument("--count", type=int, default=count, help=f"how many examples (default: {count})")
        p.set_defaults(job=job, parser=p)
    p.add_argument("--split-by", help="splitter of the referring sets, as in refs(umd).p")
    p.add_argument("--all", action="store_true", help="open every example")
    p = commands.choices["preview"]
    p.add_argument("--first", type=int, default=0, help="first example (default: 0)")
    p.add_argument("--out", type=Path, default=Path("preview.png"), help="default: preview.png")
    args = parser.parse_args(argv)
    if args.count < 1 or getattr(args, "first", 0) < 0:
        parser.error(f"--count {args.count} must be at least 1, and --first not negative")
    if args.command == "preview" and args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: the contact sheet is a PNG, so its name ends in .png")
    reads = {"root": DATASETS.get(args.name) not in (Scenes, SceneInstances), "split_by": args.name in Refer.SPLITTERS,
             "split": not args.name.startswith("jsonl:"), "count": not getattr(args, "all", False)}
    args.parser.check_read(args, " ".join(argv or sys.argv[1:]), [f for f in vars(args) if reads.get(f, True)])
    return parser.run(args.job, args)


if __name__ == "__main__":
    sys.exit(main())
