"""Pictures with nameless masks (SA-1B) to SA-OVRS: masks with labels, referring and reasoning expressions.

Paper, section 4. Seven stages, each its own sub-command; `all` runs them in turn. Two servers do the looking: a
vision-language model behind an OpenAI-compatible endpoint, and GroundingDINO behind the Hugging Face
zero-shot-object-detection schema.

    labels     the VLM names at most 10 objects a picture
    detect     the detector gives boxes with scores for each label
    match      boxes meet masks: which masks have which label (no server)
    entities   the VLM says which labels are discrete things
    refer      one referring expression for each mask of a thing, checked against the others of its label
    reason     one expression that does not name the object, for things that appear once
    export     OUT/sa-ovrs.jsonl, what load_dataset("sa-ovrs") reads; it holds no pictures
    stats      OUT/stats.json and OUT/stats.png: counts, reject rates, labels

    python annotate.py all --input sa_000000.tar --out sa-ovrs \\
        --vlm-url http://localhost:8000/v1 --vlm-model Qwen/Qwen2-VL-72B-Instruct \\
        --detector-url http://localhost:9000/

Stop it at any time, even with kill -9, and run it again: what is finished is not asked again. A unit of work is one
picture in one stage; it ends as one line of OUT/STAGE.SHARD-of-SHARDS.jsonl, either ok or failed with its reason.

Legend: D detected boxes, M masks, H W a picture's height and width. Boxes are x0 y0 x1 y1 in pixels of the upright
picture, x1 and y1 just outside the object.
"""

import argparse
import base64
import email.utils
import fcntl
import hashlib
import io
import json
import math
import os
import queue
import random
import re
import sys
import tarfile
import threading
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage
from tqdm import tqdm

from data import BadUsage, open_picture, pack_counts, rle_decode, to_rgb, unpack_counts, write_picture
from metrics import write_json


class Failure(Exception):
    """A unit of work that ends without its answer: it is recorded with `reason` and the run goes on."""

    def __init__(self, reason, detail=""):
        super().__init__(reason)
        self.reason, self.detail = reason, str(detail)[:300]


class Stop(Exception):
    """The run cannot go on, in one line; what is not finished stays unfinished and is done by the next run."""


# ----------------------------------------------------------------------------------------------------------
# prompts. Each has a version; with the hash of its words it is in the provenance of every record.

PROMPTS = {
    "labels": ("1", """\
List the objects that are clearly visible in this picture, at most 10, the most prominent first.
- Each is a common noun in the singular, of one to four words, lower case, such as "dog" or "traffic light".
- No object twice, no two names for one object, no names of people.
- No words for the whole picture or for light: no "scene", "background", "shadow".
Answer with JSON only: {"labels": ["...", "..."]}"""),
    "entities": ("1", """\
These labels were found in this picture: %(labels)s
Which of them are discrete things, objects that can be counted one by one, such as "dog", "cup" or "window"?
Leave out stuff without a shape of its own, such as "sky", "grass", "water" or "road".
Use the labels exactly as they are written. Answer with JSON only: {"entities": ["...", "..."]}"""),
    "expression": ("1", """\
One object in this picture has a green line around it.
Label: %(label)s
Task: write one referring expression in English that fits this object and nothing else in the picture.
- Say what sets it apart: its own look, its place (left and right are the viewer's), what it does, what is beside it.
- A noun phrase of at most 20 words, such as "the small brown dog lying on the left".
- Never mention the line, a marking, an outline or its colour.
Answer with JSON only: {"expression": "..."}"""),
    "verify": ("1", """\
One object in this picture has an orange line around it.
Label: %(label)s
Expression: %(expression)s
Does the expression fit the object with the orange line? Judge this object alone and leave the line itself out of it.
Answer with JSON only: {"fits": true} or {"fits": false}"""),
    "reasoning": ("1", """\
There is one %(label)s in this picture.
Write one expression in English that a reader can find it by only after some thought: from its use, its parts, what
people do with it, or its role in this picture.
- Do not use the words "%(label)s", their plural, parts or synonyms.
- A noun phrase of at most 25 words, such as "what keeps the rain off the people waiting for the bus".
Answer with JSON only: {"expression": "..."}"""),
}  # fmt: skip
# schema name of response_format: (key of the answer, JSON schema of its value, max_tokens)
ANSWERS = {
    "labels": ("labels", {"type": "array", "items": {"type": "string", "maxLength": 80}, "maxItems": 10}, 256),
    "entities": ("entities", {"type": "array", "items": {"type": "string", "maxLength": 80}, "maxItems": 10}, 256),
    "expression": ("expression", {"type": "string", "minLength": 1, "maxLength": 300}, 128),
    "verify": ("fits", {"type": "boolean"}, 32),
    "reasoning": ("expression", {"type": "string", "minLength": 1, "maxLength": 300}, 128),
}


def prompt_version(name):
    """Name, version and hash of a prompt's words, such as "labels-1-0a1b2c3d"."""
    version, text = PROMPTS[name]
    return f"{name}-{version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ----------------------------------------------------------------------------------------------------------
# words

MAX_LABELS = 10  # paper, section 4
_ARTICLES = ("a", "an", "the", "some", "several", "many", "two", "three")
# paper: not stated; we use this list of words that name no object
_NO_OBJECTS = frozenset("scene background foreground picture image photo photograph shadow reflection light lighting "
                        "view object thing item stuff color colour texture nothing none unknown".split())  # fmt: skip
_PLURALS = dict(pair.split(":") for pair in (
    "people:person men:man women:woman children:child policemen:policeman firemen:fireman feet:foot teeth:tooth "
    "geese:goose mice:mouse leaves:leaf knives:knife shelves:shelf bookshelves:bookshelf wolves:wolf loaves:loaf "
    "scarves:scarf calves:calf halves:half buses:bus lenses:lens cookies:cookie movies:movie hoodies:hoodie "
    "brownies:brownie smoothies:smoothie zombies:zombie shoes:shoe horseshoes:horseshoe canoes:canoe toes:toe "
    "axes:axe cacti:cactus"
).split())  # fmt: skip
# what ends in s and is no plural, or is one of a thing that has no other number
_SINGULARS = frozenset("glasses sunglasses eyeglasses scissors pants jeans shorts trousers tights leggings underpants "
                       "binoculars goggles headphones earphones pliers tongs tweezers pyjamas pajamas clothes stairs "
                       "gas lens canvas atlas christmas pancreas series species news swiss".split())  # fmt: skip


def singular(word):
    """English singular of a lower-case noun; a word that is no plural, or that we are not sure of, stays."""
    if word in _PLURALS:
        return _PLURALS[word]
    if word in _SINGULARS or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")):
        return word[:-2]
    return word[:-1]


def normal_label(text):
    """A label as we keep it: NFKD, lower case, no accent, article or punctuation, head noun singular; may be "".

    Dots must go: one within a label confuses GroundingDINO's text, in which a dot ends a label.
    """
    text = unicodedata.normalize("NFKD", text).lower().replace("\u2019", "'").replace("'s ", " ")
    text = "".join(c for c in text if not unicodedata.combining(c))  # "cafe" for its accented form
    words = re.sub(r"[^\w\- ]|_", " ", text).split()
    while words and words[0] in _ARTICLES:
        words = words[1:]
    head = next((i for i, w in enumerate(words) if i and w in ("of", "with", "in", "on", "for")), len(words)) - 1
    return " ".join(singular(w) if i == head else w for i, w in enumerate(words))


def clean_labels(named):
    """What the VLM named -> (labels to go on with, [[label, rule it fell by], ...])."""
    kept, rejected = [], []
    for text in named:
        label = normal_label(text)
        if not label or not label.isascii():  # paper: not stated; we ask for English and take nothing else
            rejected.append([text, "no_english_word"])
        elif label in _NO_OBJECTS:
            rejected.append([text, "no_object"])
        elif len(label.split()) > 4:  # paper: not stated; we use four words
            rejected.append([text, "too_long"])
        elif label in kept:
            rejected.append([text, "duplicate"])
        elif len(kept) == MAX_LABELS:
            rejected.append([text, "too_many"])
        else:
            kept.append(label)
    return kept, rejected


# paper: not stated; groups of words that name one thing, for the reasoning expressions
SYNONYMS = [set(group.split()) for group in """\
person human people pedestrian someone somebody; man guy male gentleman person; woman lady female person; child kid
toddler person; boy kid child person; girl kid child person; baby infant child; dog puppy hound canine; cat kitten
feline; horse pony mare stallion foal; cow bull cattle ox calf; sheep lamb ram; pig hog piglet; chicken hen rooster;
bird fowl; car automobile vehicle sedan auto; truck lorry pickup vehicle; bus coach vehicle; van minivan vehicle;
motorcycle motorbike bike scooter vehicle; bicycle bike cycle; airplane plane aircraft jet aeroplane; boat ship
vessel sailboat yacht; train locomotive railway; couch sofa settee; chair seat armchair stool; table desk; bed cot
mattress; television tv telly; telephone phone cellphone smartphone mobile; computer laptop pc notebook; monitor
screen display; cup mug; glass tumbler goblet; bottle flask; plate dish platter; bowl dish; bag handbag purse
backpack rucksack satchel; suitcase luggage baggage; hat cap helmet; shoe boot sneaker sandal; jacket coat; shirt
tee tshirt blouse; pants trousers jeans; dress gown frock; glasses spectacles eyeglasses sunglasses; umbrella
parasol brolly; lamp light lantern; streetlight streetlamp lamppost; picture painting photo photograph; rug carpet
mat; curtain drape; house home building; building tower skyscraper house; shop store; street road avenue lane;
sidewalk pavement footpath; rock stone boulder; hill mountain; sea ocean; river stream creek; flower blossom bloom;
tree sapling; bush shrub hedge; grass lawn; trash rubbish garbage bin; refrigerator fridge freezer; stove cooker
oven; faucet tap; sink basin washbasin; toilet lavatory loo; clock watch; ball football basketball baseball; circle
disc disk ring; square rectangle box
""".split(";")]
_SMALL_WORDS = frozenset("a an the of with in on for and or to at by".split())
# an expression about our line instead of the object; paper: not stated
_MARKING = re.compile(r"\b(outlin\w*|contour\w*|highlight\w*|annotat\w*|bounding|marked|marking|markings|encircled|"
                      r"circled|(?:green|orange) (?:line|border|edge|boundary|frame|box))\b")  # fmt: skip
_REFUSAL = re.compile(r"\b(i'?m sorry|i am sorry|i can'?t|i cannot|i'?m unable|i am unable|as an ai|unable to assist|"
                      r"can'?t (?:assist|help)|cannot (?:assist|help))\b", re.IGNORECASE)  # fmt: skip


def words_of(text):
    """Lower-case words of a text; a hyphen parts words."""
    return re.findall(r"[a-z0-9]+", unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'"))


def _forms(word):
    """A word and everything that it may be the plural of."""
    return {word, singular(word)} | ({word[:-1]} if word.endswith("s") else set()) | (
        {word[:-2]} if word.endswith("es") else set())  # fmt: skip


def names_object(expression, label):
    """Whether an expression says the label: one of its words, a plural of one, or a synonym from SYNONYMS."""
    banned, parts = set(), [w for w in words_of(label) if w not in _SMALL_WORDS and len(w) > 1]
    for word in [*parts, "".join(parts)]:
        banned |= _forms(word).union(*(group for group in SYNONYMS if not group.isdisjoint(_forms(word))))
    said = words_of(expression)
    said += [a + b for a, b in zip(said, said[1:])]  # "fire hydrant" says "firehydrant"
    return any(not banned.isdisjoint(_forms(word)) for word in said)


def expression_fault(expression, label):
    """The rule that an expression breaks by its words alone, or None. paper: not stated; these are ours."""
    words, marking = words_of(expression), _MARKING.search(expression.lower())
    foreign = sum(not c.isascii() for c in expression)
    if not words or foreign > 0.1 * len(expression) or not expression.isprintable():
        return "not_english"
    if len(words) > 40:
        return "too_long"
    if marking and marking[0] not in label:
        return "mentions_marking"
    if [word for word in words if word not in ("the", "a", "an")] == words_of(label):
        return "only_the_label"  # the semantic record says as much, and of a missed second object it would be wrong
    return None


def tidy(expression):
    """An expression on one line without the full stop at its end."""
    return " ".join(expression.split()).rstrip(".").strip("\"' ")


def split_duplicates(found):
    """[{"expression", ...}] of one picture -> (those said once, those said more often), case and spaces aside."""
    count = Counter(tuple(words_of(e["expression"])) for e in found)
    once = [e for e in found if count[tuple(words_of(e["expression"]))] == 1]
    return once, [e for e in found if e not in once]


# ----------------------------------------------------------------------------------------------------------
# the input: SA-1B archives, read where they lie, or folders: sa_N.jpg with sa_N.json


@dataclass(frozen=True)
class Picture:
    """A picture and its mask file, not read yet. A place is (file, offset, size), size -1 for a whole file."""

    key: str  # path below the input without suffix, an archive counting as a folder: "sa_000000/sa_1"
    image: str  # the same with suffix: what `image` in the export is
    picture: tuple | None
    masks: tuple | None

    def read(self, kind):
        """The bytes of its "picture" or its "masks"; raises Failure if they are not there, or not all."""
        if getattr(self, kind) is None:
            raise Failure(f"no_{kind}", f"{self.key} has no such file")
        path, offset, size = getattr(self, kind)
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise Failure("unreadable", error) from None
        if len(content) < size:
            raise Failure("unreadable", f"{path} ends within {self.image}")
        return content


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


def pictures(path, skip=None):
    """Every Picture of an archive or folder, archives within it included, in one fixed order; nothing is unpacked.

    Yields a ValueError in place of what a damaged archive lost, so that the rest is still found. `skip`: a folder to
    stay out of. Memory: the names of one folder or one archive.
    """
    path = Path(path)
    if path.is_file():
        yield from _pictures_of_archive(path, path.parent)
    else:
        skip = skip and skip.resolve()
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(folder, f).resolve() != skip)
            names = sorted(f for f in files if not f.startswith("."))
            yield from _pair({name: (Path(folder, name), 0, -1) for name in names}, Path(folder).relative_to(path))
            for name in names:
                if name.endswith(".tar"):
                    yield from _pictures_of_archive(Path(folder, name), path)


def _pictures_of_archive(path, root):
    places, problem = {}, None
    try:
        with tarfile.open(path, "r:") as archive:  # not compressed: members are read where they lie
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all
                if member.isreg():
                    places[Path(member.name).name] = (path, member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)
            if not archive.offset or any(archive.fileobj.read(512)) or path.stat().st_size <= archive.offset:
                problem = "ends in the middle"
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = str(error)
    yield from _pair(places, path.with_suffix("").relative_to(root))
    if problem:
        yield ValueError(f"{path}: damaged or not a plain .tar archive ({problem})")


def _pair(places, folder):
    """Pictures with their mask files; half a pair is a Picture, too, if it is a picture or is named sa_N.json."""
    names = {}
    for name in places:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in PICTURE_SUFFIXES:
            if stem in names:
                yield ValueError(f"{folder / name} and {names[stem]}: two pictures of one name, the second is left out")
            names.setdefault(stem, name)
        elif suffix == ".json" and stem.startswith("sa_"):
            names.setdefault(stem, f"{stem}.jpg")
    for stem, name in sorted(names.items()):
        image = (folder / name).as_posix()
        yield Picture((folder / stem).as_posix(), image, places.get(name), places.get(f"{stem}.json"))


def read_annotations(picture, size):
    """A mask file -> (ids, boxes float64 (M, 4), run-length masks); `size`: (width, height) of its picture.

    Taken is {"annotations": [{"id", "segmentation": COCO RLE, "bbox"}, ...]}, or the list alone. Without bbox the box
    is measured. With it, the box is [x, y, x + w + 1, y + h + 1], because SA-1B's w and h are one less than the extent.
    Raises Failure for anything else, or for masks of another size than the picture.
    """
    try:
        content = json.loads(picture.read("masks"))
        annotations = content["annotations"] if isinstance(content, dict) else content
        ids, boxes, segmentations = [], [], []
        shape = [size[1], size[0]]
        for number, annotation in enumerate(annotations, 1):
            rle = annotation["segmentation"]
            if rle["size"] != shape:
                raise ValueError(f"a mask of {rle['size']}, the picture is {shape} (height, width)")
            if "bbox" in annotation:
                x, y, w, h = (float(v) for v in annotation["bbox"])
                box = (x, y, x + w + 1, y + h + 1)
            else:
                rows, columns = (np.flatnonzero(rle_decode(rle).any(axis)) for axis in (1, 0))
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
            ids.append(annotation.get("id", number))
            boxes.append(box)
            segmentations.append({"size": shape, "counts": rle["counts"]})
        if len(set(ids)) < len(ids) or not all(isinstance(i, int | str) for i in ids):
            raise ValueError("annotation ids must be numbers or words, each once")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise Failure("broken_masks", f"{type(error).__name__}: {error}") from None
    return ids, np.array(boxes, np.float64).reshape(-1, 4), segmentations


def rle_runs(rle):
    """Where a COCO run-length mask's object runs begin and end, down the columns: int64 (2, n).

    Raises ValueError for counts that do not fill the size, or for a mask without any pixel.
    """
    height, width = rle["size"]
    packed = rle["counts"]
    counts = np.asarray(packed, np.int64) if isinstance(packed, list) else unpack_counts(packed)
    ends = counts.cumsum()
    runs = np.flatnonzero(counts[1::2]) * 2 + 1
    if not len(runs) or ends[-1] != height * width or counts.min() < 0:
        raise ValueError(f"{len(runs)} runs that add up to {counts.sum()}, the picture has {height} x {width}")
    return np.stack([ends[runs] - counts[runs], ends[runs]])


def rle_union(parts, size):
    """Runs of several masks, as of `rle_runs`, and (height, width) -> the COCO run-length mask of their union."""
    begins, ends = np.concatenate(parts, axis=1)
    place, step = np.concatenate([begins, ends]), np.repeat([1, -1], len(begins))
    order = np.lexsort((-step, place))  # a run that begins where another ends goes on
    place, step = place[order], step[order]
    depth = step.cumsum()
    edges = place[(depth == 0) | (depth == step)]  # where the first one begins, where the last one ends
    rest = [size[0] * size[1]] if edges[-1] < size[0] * size[1] else []
    return {"size": list(size), "counts": pack_counts(np.diff([*edges, *rest], prepend=0))}


def shard_of(key, shards):
    """The shard in 0 .. shards - 1 that a picture belongs to, by a hash that never changes."""
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8]) % shards


# ----------------------------------------------------------------------------------------------------------
# pictures for the servers

DILATE = 20  # pixels, paper, section 4
GREEN, ORANGE = (0, 255, 0), (255, 128, 0)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def original(picture, max_side=0):
    """A Picture's file as it is -> (bytes, media type, (width, height) upright).

    It is encoded again only if it must be: turned by EXIF, no JPEG or PNG, or with a side above `max_side` (0: any).
    """
    content = picture.read("picture")
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = image.getexif().get(0x0112, 1)
            size = image.size[::-1] if turned > 4 else image.size
            whole = image.format in _ENDS and content.endswith(_ENDS[image.format]) and image.mode in ("RGB", "L")
            large = max_side and max(size) > max_side
            if whole and turned == 1 and not large:
                return content, Image.MIME[image.format], size
            if large and image.format == "JPEG":
                image.thumbnail((max_side, max_side))  # the decoder itself makes it small: half the time
            upright = to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise nearly every kind for a damaged file
        raise Failure("broken_picture", error) from None
    return *encode(upright, max_side), size


def decode(content):
    """Bytes of a picture file -> upright PIL RGB, or Failure."""
    try:
        return open_picture(io.BytesIO(content))
    except ValueError as error:
        raise Failure("broken_picture", error) from None


def encode(image, max_side=0):
    """PIL RGB -> (bytes, media type), no side above `max_side` (0: any): PNG if small, as JPEG smears thin lines."""
    if max_side and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    if image.width * image.height <= 512 * 512:
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), "image/png"
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue(), "image/jpeg"


def outline(mask, width=1):
    """bool (H, W) -> bool (H, W): the inner rim, `width` px thick, of the mask dilated by 20 px.

    Dilated so that the object's own edge stays visible. Paper: the shape is not stated; we use a disk, every pixel at
    most 20 px from the mask. Outside the picture counts as outside, so the line is closed at the picture's border.
    """
    line = np.zeros(mask.shape, bool)
    if mask.any():
        # the rectangle that the dilated mask lies in, one pixel to spare
        used = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = tuple(slice(max(u[0] - DILATE - 1, 0), u[-1] + DILATE + 2) for u in used)
        grown = ndimage.distance_transform_edt(~mask[box]) <= DILATE
        line[box] = grown & ~ndimage.binary_erosion(grown, iterations=width)
    return line


def line_width(size):
    """Thickness of the line in pixels for a (width, height): paper: not stated; we use 1/300 of the short side."""
    return max(1, round(min(size) / 300))


def draw_outline(image, line, color):
    """PIL RGB and a line from `outline` -> a copy with the line in `color`."""
    pixels = np.array(image)
    pixels[line] = color
    return Image.fromarray(pixels)


# ----------------------------------------------------------------------------------------------------------
# servers

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # tried again; other errors would come again, too
_DOWN = (500, 502, 503, 504)
DOWN_AFTER = 3  # failures in a row after which /health is asked before anything else is
STOP_AFTER = 100  # requests in a row without one answer that is fine: the run stops


class Server:
    """One HTTP server, shared by all threads: retries with pauses, and nobody asks while it is down.

    url: where requests go; health: what is asked while it is down; key: bearer token or None.
    timeout: seconds for one request; attempts: tries of one request; wait: the first pause in seconds, doubled each
    time; patience: seconds that the server may be away before the run stops.
    """

    def __init__(self, url, key, timeout, attempts, wait, patience):
        self.url, self.key, self.timeout, self.attempts = url, key, timeout, attempts
        self.wait, self.patience = wait, patience
        self.name = url.partition("?")[0]  # what messages call it
        self.health = "{0.scheme}://{0.netloc}/health".format(urlsplit(url))
        self.local, self.lock, self.gate = threading.local(), threading.Lock(), threading.Lock()
        self.down = self.missed = 0  # failures in a row: of the server, of anything
        self.reached = False
        self.suspicion = None  # what the first look at the server found wrong

    def send(self, method, url, timeout=10, content=None):
        """One request, no retries -> requests.Response; its connection stays open for this thread's next one."""
        if not hasattr(self.local, "session"):
            self.local.session = session = requests.Session()
            session.auth = lambda request: request  # so that no .netrc puts in another key
            session.headers["Content-Type"] = "application/json"
            if self.key:
                session.headers["Authorization"] = f"Bearer {self.key}"
        return self.local.session.request(method, url, data=content, timeout=(10, timeout))

    def post(self, body, log):
        """POST a JSON body until it is answered -> the answer's JSON. Counts into log["attempts"].

        Raises Failure with the reason once the tries are used up or the server says that it never will; Stop if the
        server is away for longer than `patience`, or has not given one good answer in STOP_AFTER requests.
        429 costs patience, not tries: the server only asks for time.
        """
        content, tries, began = json.dumps(body).encode(), 0, time.monotonic()
        while True:
            self.wait_until_up()
            log["attempts"] += 1
            tries += 1
            pause = 0.0
            try:
                response = self.send("POST", self.url, self.timeout, content)
                status, reason = response.status_code, f"http_{response.status_code}"
                if status == 200:
                    answer = response.json()
                    with self.lock:
                        self.down, self.missed, self.reached = 0, 0, True
                    return answer
                detail, code = self.error_of(response)
                if status == 429:
                    tries -= time.monotonic() - began < self.patience
                pause = retry_after(response.headers.get("Retry-After"))
            except (requests.exceptions.JSONDecodeError, RecursionError):
                status, reason, detail = 200, "cut_response", "the body is not whole JSON"
            except requests.Timeout:
                status, reason, detail = None, "timeout", f"no answer in {self.timeout:g} s"
            except requests.RequestException as error:
                status, reason, detail = None, "connection", type(error).__name__
            with self.lock:
                self.down = self.down + 1 if status is None or status in _DOWN else 0
                self.reached |= status is not None
            if status in (None, 200, *_BUSY) and tries < self.attempts:
                time.sleep(max(pause, self.wait * 2 ** max(tries - 1, 0) * random.uniform(0.75, 1.25)))
                continue
            if status in (401, 403, 404) and self.suspicion:
                raise Stop(f"{self.suspicion} ({reason}: {detail})")
            with self.lock:
                self.missed += 1
                if self.missed >= STOP_AFTER:
                    raise Stop(f"{self.name}: {self.missed} requests in a row failed, the last: {reason} {detail}")
            if status == 400 and (code == "context_length_exceeded"
                                  or re.search("context length|max_tokens must be at least", detail)):  # fmt: skip
                reason = "context_overflow"
            raise Failure(reason, detail)

    def error_of(self, response):
        """(message, code) of an error answer: {"error": {...}}, {"error": "..."}, {"message": ...} or anything else."""
        try:
            value = response.json()
            value = value.get("error", value)
            message, code = (value.get("message"), value.get("code")) if isinstance(value, dict) else (value, None)
        except (ValueError, AttributeError):
            message, code = response.text, None
        message = " ".join(str(message).split())
        return (message.replace(self.key, "***") if self.key else message)[:300], code

    def wait_until_up(self):
        """Return at once unless the server failed several times in a row; then ask /health until it answers."""
        if self.down < DOWN_AFTER:
            return
        with self.gate:  # one thread asks, the others queue here
            began, pause = time.monotonic(), self.wait
            while self.down >= DOWN_AFTER:
                try:
                    if self.send("GET", self.health).status_code not in _DOWN:
                        self.down, self.reached = 0, True
                        return
                except requests.RequestException:
                    pass
                patience = self.patience if self.reached else min(10, self.patience)  # never seen: a typing mistake?
                if time.monotonic() - began > patience:
                    raise Stop(f"{self.name}: no server answers, for {patience:g} s: start it, then run this again")
                time.sleep(pause)
                pause = min(2 * pause, 10)

    def look(self, model):
        """Ask an OpenAI-compatible server which models it has, so that a wrong key or name is told before the work."""
        try:
            response = self.send("GET", self.url.removesuffix("/chat/completions") + "/models")
            self.reached = True
            if response.status_code in (401, 403):
                raise Stop(f"{self.name}: refuses the key ({response.status_code}): put the right one into VLM_API_KEY")
            served = [entry["id"] for entry in response.json()["data"]] if response.status_code == 200 else [model]
            if model not in served:
                self.suspicion = f"--vlm-model {model}: the server has {', '.join(map(str, served)) or 'no model'}"
        except requests.exceptions.JSONDecodeError:
            pass
        except requests.RequestException:
            self.down = DOWN_AFTER
        except (KeyError, TypeError):  # a server that has no such list
            pass


def retry_after(text):
    """A Retry-After header, seconds or a date, -> seconds to wait, 0 to 300."""
    try:
        seconds = float(text or 0)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            seconds = 0.0
    return min(max(seconds, 0.0), 300.0) if math.isfinite(seconds) else 0.0


def ask(args, log, name, image, **words):
    """Ask the VLM prompt `name` about an encoded image (bytes, media type) -> the checked value of its answer.

    An answer that does not fit the schema is asked for once more, a little warmer; a prompt that is too long once
    with half the picture's sides. Raw answers and token counts go into `log`. Raises Failure.
    """
    text, (key, schema, max_tokens) = PROMPTS[name][1] % words, ANSWERS[name]
    turn, halved = 0, False
    while True:
        url = f"data:{image[1]};base64,{base64.b64encode(image[0]).decode()}"
        body = {
            "model": args.vlm_model,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                                      {"type": "text", "text": text}]}],
            "temperature": 0.7 * turn, "top_p": 1.0, "repetition_penalty": 1.05, "seed": turn, "max_tokens": max_tokens,
            "response_format": {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": {
                "type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}}},
        }  # fmt: skip
        try:
            answer = args.vlm.post(body, log)
        except Failure as failure:
            if failure.reason != "context_overflow" or halved:
                raise
            halved = True
            smaller = decode(image[0])
            image = encode(smaller, max(smaller.size) // 2)
            continue
        try:
            return read_answer(answer, key, schema, log)
        except Failure:
            if turn:
                raise
            turn = 1


def read_answer(answer, key, schema, log):
    """A chat completion -> the value of `key` in its JSON content; Failure if it is cut, refused or another thing."""
    try:
        choice = answer["choices"][0]
        finish, message = choice["finish_reason"], choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        for kind in ("prompt_tokens", "completion_tokens"):
            log["usage"][kind] = log["usage"].get(kind, 0) + ((answer.get("usage") or {}).get(kind) or 0)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Failure("wrong_response", f"not a chat completion ({error!r})") from None
    log["raw"].append(content if isinstance(content, str) else refusal)
    if refusal:
        raise Failure("refused", refusal)
    if finish != "stop":  # cut by max_tokens, by a content filter, ...
        raise Failure(re.sub(r"[^a-z_]+", "_", f"finish_{finish}")[:30], f"{content}"[-200:])
    if not isinstance(content, str):
        raise Failure("wrong_response", "no content")
    value = first_object(content)
    if value is None:
        raise Failure("refused" if _REFUSAL.search(content) else "no_json", content)
    if set(value) != {key} or not fits_schema(value[key], schema):
        raise Failure("wrong_schema", content)
    if isinstance(value[key], str) and _REFUSAL.search(value[key]):
        raise Failure("refused", value[key])
    return value[key]


def first_object(text):
    """The first JSON object within a text, in a fence or in prose; None if there is none."""
    for start in (m.start() for m in re.finditer(r"\{", text[:20000])):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return value
    return None


def fits_schema(value, schema):
    """Whether a value is what one of ANSWERS asks for. maxItems is not held against it: what is too much is cut."""
    if schema["type"] == "array":
        return isinstance(value, list) and all(fits_schema(v, schema["items"]) for v in value)
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    return isinstance(value, str) and schema.get("minLength", 0) <= len(value.strip()) <= schema["maxLength"]


# ----------------------------------------------------------------------------------------------------------
# matching (paper, section 4)

MATCH_RULES = "match-1"
MAX_BOXES = 4  # a label with more boxes is dropped
NESTED_IOU = 0.97
MIN_SCORE = 0.3
MIN_IOU_ONE, MIN_IOU_SEVERAL = 0.85, 0.9
ASK_SCORE = 0.25  # of the detector; paper: not stated; a weak box tells of an instance that we must not miss


def box_iou(a, b):
    """Boxes (D, 4) and (M, 4), x0 y0 x1 y1 -> IoU (D, M) float64; 0 where both are empty."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a, b))
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def match(detections, mask_boxes, share=False):
    """Which masks have which label. Pure: no files, no models. Paper, section 4.

    detections: [{"label", "score" in [0, 1], "box": x0 y0 x1 y1}]; mask_boxes: (M, 4) x0 y0 x1 y1, both in pixels.
    Returns [(label, mask index, score, iou)], sorted by label, then mask: for each label

    (a) more than 4 boxes: the label is dropped;
    (b) of the masks that reach the IoU below with one of its boxes, those are left out whose box has IoU > 0.97 with
        a larger mask's (same size: with an earlier mask's);
    (c) each box takes the mask with the highest IoU (same IoU: the earlier). Every score must be above 0.3 and every
        IoU above 0.9, or 0.85 if the label has a single box; else the label is dropped.

    paper: not stated which boxes (b) compares and when; we use the boxes of the masks that come into question for the
    label, before (c), so that a box cannot choose the part instead of the whole. "Every" is taken at its word: one bad
    box drops its label, for the rest would be half of a semantic mask.
    paper: not stated; two boxes that take one mask give one record, with the higher (score, iou).
    paper: not stated; one mask never serves two labels unless `share`: labels come in the order of their mean score
    (then mean IoU, then name), and one that needs a mask that is already taken is dropped whole.
    """
    return match_or_reject(detections, mask_boxes, share)[0]


def match_or_reject(detections, mask_boxes, share=False):
    """`match`, and why the other labels are not in it: (matches, [[label, rule], ...])."""
    mask_boxes = np.asarray(mask_boxes, np.float64).reshape(-1, 4)
    sizes = np.prod(np.maximum(mask_boxes[:, 2:] - mask_boxes[:, :2], 0), axis=1)
    groups = {}
    for detection in detections:
        groups.setdefault(detection["label"], []).append(detection)
    found, rejected = [], []
    for label, boxes in sorted(groups.items()):
        floor = MIN_IOU_ONE if len(boxes) == 1 else MIN_IOU_SEVERAL
        if len(boxes) > MAX_BOXES:
            rejected.append([label, "too_many_boxes"])
            continue
        if not all(box["score"] > MIN_SCORE for box in boxes):
            rejected.append([label, "low_score"])
            continue
        iou = box_iou([box["box"] for box in boxes], mask_boxes)  # (D, M)
        near = np.flatnonzero((iou > floor).any(0))
        order = near[np.argsort(-sizes[near], kind="stable")]  # large to small
        nested = np.triu(box_iou(mask_boxes[order], mask_boxes[order]) > NESTED_IOU, 1).any(0)
        left = np.sort(order[~nested])
        best = left[iou[:, left].argmax(1)] if len(left) else []
        if not len(left) or not all(iou[i, m] > floor for i, m in enumerate(best)):
            rejected.append([label, "low_iou"])
            continue
        masks = {}
        for i, m in enumerate(best):
            masks[int(m)] = max(masks.get(int(m), (0.0, 0.0)), (float(boxes[i]["score"]), float(iou[i, m])))
        mean = [sum(values) / len(values) for values in zip(*masks.values())]
        found.append((-mean[0], -mean[1], label, masks))
    taken, matches = set(), []
    for *_, label, masks in sorted(found, key=lambda entry: entry[:3]):
        if not share and not taken.isdisjoint(masks):
            rejected.append([label, "mask_taken"])
            continue
        taken |= masks.keys()
        matches += [(label, m, score, iou) for m, (score, iou) in masks.items()]
    return sorted(matches), sorted(rejected)


# ----------------------------------------------------------------------------------------------------------
# the stages: (picture, results of the stages before, args, log) -> {"kept": [...], "rejected": [[what, rule], ...]}


def name_labels(picture, past, args, log):
    """Stage 1: kept is a list of labels."""
    if picture.masks is None:
        raise Failure("no_masks", f"{picture.key}.json is not there")
    kept, rejected = clean_labels(ask(args, log, "labels", original(picture, args.max_side)[:2]))
    return {"kept": kept, "rejected": rejected}


def detect(picture, past, args, log):
    """Stage 2: kept is [{"label", "score", "box"}]; "size" is the picture's (width, height)."""
    content, _, size = original(picture)  # at full size: the detector makes it small itself
    labels = past["labels"]["kept"]
    body = {"inputs": base64.b64encode(content).decode(),
            "parameters": {"candidate_labels": labels, "threshold": ASK_SCORE}}  # fmt: skip
    for turn in range(2):
        answer = args.detector.post(body, log) if labels else []
        log["raw"].append(answer)
        try:
            kept, rejected = read_boxes(answer, labels, size)
            return {"kept": kept, "rejected": rejected, "size": size}
        except Failure:
            if turn:
                raise


def read_boxes(answer, labels, size):
    """The detector's answer -> (detections, [[label, rule it fell by], ...]); Failure if it is no list of boxes.

    Boxes are cut at the picture's border; labels that were not asked for and empty boxes go.
    """
    kept, rejected = [], []
    try:
        for item in answer if isinstance(answer, list) else [answer]:
            box = [float(item["box"][side]) for side in ("xmin", "ymin", "xmax", "ymax")]
            label, score = item["label"].strip().rstrip(".").strip().lower(), float(item["score"])
            if not (all(map(math.isfinite, box)) and 0 <= score <= 1):
                raise ValueError(f"box {box}, score {score}")
            box = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, (*size, *size))]
            if label not in labels:
                rejected.append([item["label"], "unknown_label"])
            elif box[0] >= box[2] or box[1] >= box[3]:
                rejected.append([label, "outside_or_empty"])
            else:
                kept.append({"label": label, "score": score, "box": box})
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise Failure("wrong_schema", f"not a list of boxes: {error!r}") from None
    return kept, rejected


def match_masks(picture, past, args, log):
    """Stage 3: kept is [{"label", "annotation_id", "score", "iou", "segmentation"}], the instance records.

    "merged" has the semantic mask of each label with several; "size" is (width, height).
    """
    size = past["detect"]["size"]
    ids, boxes, segmentations = read_annotations(picture, size)
    matches, rejected = match_or_reject(past["detect"]["kept"], boxes, args.share_masks)
    kept, by_label = [], {}
    for label, m, score, iou in matches:
        segmentation = segmentations[m]
        try:
            runs = rle_runs(segmentation)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise Failure("broken_masks", f"annotation {ids[m]}: {error}") from None
        by_label.setdefault(label, []).append(runs)
        if isinstance(segmentation["counts"], list):
            segmentation = rle_union([runs], size[::-1])
        kept.append({"label": label, "annotation_id": ids[m], "score": score, "iou": iou, "segmentation": segmentation})
    merged = {label: rle_union(parts, size[::-1]) for label, parts in by_label.items() if len(parts) > 1}
    return {"kept": kept, "rejected": rejected, "size": size, "merged": merged}


def choose_entities(picture, past, args, log):
    """Stage 4: kept is the list of labels that are discrete things."""
    labels = sorted({o["label"] for o in past["match"]["kept"]})
    if not labels:
        return {"kept": [], "rejected": []}
    image = original(picture, args.max_side)[:2]
    named = {normal_label(text) for text in ask(args, log, "entities", image, labels=json.dumps(labels))}
    rejected = [[label, "stuff"] for label in labels if label not in named]
    return {"kept": [label for label in labels if label in named], "rejected": rejected}


def things(past):
    """The matched objects of each label that is a discrete thing: {label: [object, ...]}."""
    groups = {label: [] for label in past["entities"]["kept"]}
    for found in past["match"]["kept"]:
        if found["label"] in groups:
            groups[found["label"]].append(found)
    return groups


def refer(picture, past, args, log):
    """Stage 5: kept is [{"label", "annotation_id", "expression"}], one for a mask at most.

    A green line marks the object to describe; then an orange one marks each other object of the label, and the
    expression must fit none of them. A label with one object has nothing to be checked against.
    paper: not stated; an expression said of two objects of a picture is dropped for both.
    """
    found, rejected, groups = [], [], things(past)
    if not groups:
        return {"kept": [], "rejected": []}
    image = decode(picture.read("picture"))
    for label, objects in groups.items():
        lines = [outline(rle_decode(o["segmentation"]), line_width(image.size)) for o in objects]

        def marked(i, color, lines=lines):
            return encode(draw_outline(image, lines[i], color), args.max_side)

        for i, target in enumerate(objects):
            try:
                expression = tidy(ask(args, log, "expression", marked(i, GREEN), label=label))
                fault = expression_fault(expression, label)
                for j in range(len(objects)):
                    if not fault and j != i:
                        words = {"label": label, "expression": expression}
                        fault = "fits_another" if ask(args, log, "verify", marked(j, ORANGE), **words) else None
            except Failure as failure:  # the other objects need not suffer
                log["failures"].append(failure)
                continue
            if fault:
                rejected.append([expression, fault])
            else:
                found.append({"label": label, "annotation_id": target["annotation_id"], "expression": expression})
    kept, twice = split_duplicates(found)
    return {"kept": kept, "rejected": rejected + [[e["expression"], "duplicate"] for e in twice]}


def reason(picture, past, args, log):
    """Stage 6: kept is [{"label", "annotation_id", "expression"}] for objects whose label appears once.

    paper: not stated; only discrete things are asked for, with the unmarked picture.
    """
    found, rejected, image = [], [], None
    for label, objects in things(past).items():
        if len(objects) != 1:
            continue
        image = image or original(picture, args.max_side)[:2]
        try:
            expression = tidy(ask(args, log, "reasoning", image, label=label))
        except Failure as failure:
            log["failures"].append(failure)
            continue
        fault = "names_object" if names_object(expression, label) else expression_fault(expression, label)
        if fault:
            rejected.append([expression, fault])
        else:
            found.append({"label": label, "annotation_id": objects[0]["annotation_id"], "expression": expression})
    kept, twice = split_duplicates(found)
    return {"kept": kept, "rejected": rejected + [[e["expression"], "duplicate"] for e in twice]}


# stage: (its function, the stages that it needs, the prompts that it uses)
STAGES = {
    "labels": (name_labels, (), ("labels",)),
    "detect": (detect, ("labels",), ()),
    "match": (match_masks, ("detect",), ()),
    "entities": (choose_entities, ("match",), ("entities",)),
    "refer": (refer, ("match", "entities"), ("expression", "verify")),
    "reason": (reason, ("match", "entities"), ("reasoning",)),
}


# ----------------------------------------------------------------------------------------------------------
# journals: OUT/STAGE.SHARD-of-SHARDS.jsonl, one line for each picture


class Journal:
    """The lines of one stage and shard, found by picture. With `write`, nobody else may write it meanwhile.

    A last line without its end, as a killed run leaves it, does not count, and goes once we write.
    Memory: one small entry a picture; the lines stay on disk. (The lock is flock: on a network file system it must be
    supported there.)
    """

    def __init__(self, path, write=False):
        self.path, self.places, self.failed = path, {}, set()  # picture: (offset, bytes)
        self.file = self.old = None
        if write:
            self.file = open(path, "ab+", buffering=0)
            self._lock(self.file)
            path.with_suffix(".tmp").unlink(missing_ok=True)
            self.file.truncate(self._index())
        elif path.exists():
            self._index()

    def _lock(self, file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return
        except BlockingIOError:
            pass
        file.close()
        raise ValueError(f"{self.path}: another process writes it: wait for its end, or give each its own --shard")

    def _index(self):
        """Where each line lies; returns where the last whole line ends."""
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    key, failed = record["id"], record["status"] != "ok"
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}: line {number} is damaged ({error!r})") from None
                if key in self.places:
                    raise ValueError(f"{self.path}: line {number} has {key} a second time")
                self.places[key] = (offset, len(line))
                if failed:
                    self.failed.add(key)
                offset += len(line)
        return offset

    def forget_failures(self):
        """Write the journal again without its failed lines, so that they are work to be done; the lock stays held."""
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            for key in self.places:
                if key not in self.failed:
                    file.write(os.pread(self.file.fileno(), *reversed(self.places[key])))
            file.flush()
            os.fsync(file.fileno())
        self.old, self.file = self.file, open(temporary, "ab+", buffering=0)  # the old lock holds until the end
        fcntl.flock(self.file, fcntl.LOCK_EX)
        os.replace(temporary, self.path)
        self.places, self.failed = {}, set()
        self._index()

    def append(self, record):
        """Add a line; it is on its way to the disk when this returns."""
        line = memoryview(json.dumps(record).encode() + b"\n")
        while line:
            line = line[self.file.write(line) :]

    def read(self, key):
        """The record of a picture. The file is not kept open: an export of many shards would run out of handles."""
        offset, length = self.places[key]
        with open(self.path, "rb") as file:
            file.seek(offset)
            line = file.read(length)
        if not line.startswith(json.dumps({"id": key})[:-1].encode()):
            raise ValueError(f"{self.path}: was changed while it was read: run this again")
        return json.loads(line)

    def good(self, key):
        """Whether a picture is done and did not fail."""
        return key in self.places and key not in self.failed

    def close(self):
        """Let go of the file and the lock."""
        for file in (self.file, self.old):
            if file:
                file.close()


def journal_path(out, stage, shard, shards):
    """Where a stage of a shard is written."""
    return out / f"{stage}.{shard}-of-{shards}.jsonl"


def shards_in(out):
    """Into how many shards the journals of a folder are cut, 0 if there are none; ValueError if they disagree."""
    counts = {}
    for path in out.glob("*-of-*.jsonl"):
        name = re.fullmatch(r"(\w+)\.(\d+)-of-(\d+)\.jsonl", path.name)
        if name and name[1] in STAGES:
            counts[int(name[3])] = path.name
    if len(counts) > 1:
        raise ValueError(f"{out}: holds files of runs with different --num-shards: {', '.join(counts.values())}")
    return next(iter(counts), 0)


# ----------------------------------------------------------------------------------------------------------
# running


def in_parallel(job, units, concurrency):
    """Yield job(unit) for each unit, as they come to an end; at most `concurrency` are under way at any time.

    `units` is drawn from only when there is room. The first exception of a job is raised here. The threads are daemons,
    so that a stopped run ends at once instead of waiting for its requests.
    """
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        while (unit := todo.get()) is not None:
            try:
                done.put((job(unit), None))
            except BaseException as error:
                done.put((None, error))

    def result():
        value, error = done.get()
        if error:
            raise error
        return value

    for _ in range(concurrency):
        threading.Thread(target=work, daemon=True).start()
    under_way = 0
    try:
        for unit in units:
            todo.put(unit)
            under_way += 1
            while under_way == concurrency or not done.empty():
                under_way -= 1
                yield result()
        for _ in range(under_way):
            yield result()
    finally:
        for _ in range(concurrency):
            todo.put(None)


def maker_of(stage, args):
    """What makes a stage's records, for their provenance. MATCH_RULES: change it with the rules of `match`."""
    if stage == "match":
        return {"rules": MATCH_RULES, "share_masks": args.share_masks}
    if stage == "detect":
        return {"model": args.detector_model, "threshold": ASK_SCORE}
    return {"model": args.vlm_model, "prompts": [prompt_version(prompt) for prompt in STAGES[stage][2]]}


def run_stage(stage, args):
    """Do what is left of a stage for this shard. Returns what is wrong with the input or the whole stage, by line."""
    function, needs, _ = STAGES[stage]
    journal = Journal(journal_path(args.out, stage, args.shard, args.num_shards), write=True)
    past = {name: Journal(journal_path(args.out, name, args.shard, args.num_shards)) for name in needs}
    seen, problems, reasons, waiting = set(), [], Counter(), 0
    if args.retry_failed:
        journal.forget_failures()
    before = len(journal.places)

    def units():
        nonlocal waiting
        for picture in pictures(args.input, skip=args.out):
            if isinstance(picture, ValueError):
                problems.append(str(picture))
                continue
            if shard_of(picture.key, args.num_shards) != args.shard:
                continue
            if picture.key in seen:
                raise ValueError(f"{args.input}: {picture.key} is there twice: is an archive unpacked beside itself?")
            seen.add(picture.key)
            if picture.key in journal.places:
                continue
            if all(past[name].good(picture.key) for name in needs):
                yield picture
            else:
                waiting += 1

    def job(picture):
        log = {"attempts": 0, "usage": {}, "raw": [], "failures": []}
        records, result = {name: past[name].read(picture.key) for name in needs}, None
        try:
            result = function(picture, {name: record["result"] for name, record in records.items()}, args, log)
        except Failure as failure:
            log["failures"].append(failure)
        first = log.pop("failures")[:1]
        made = {}
        for record in records.values():
            made |= record["made"]
        return {"id": picture.key, "stage": stage, "status": "failed" if first else "ok", "image": picture.image,
                "reason": first[0].reason if first else None, "detail": first[0].detail if first else None,
                "made": made | {stage: maker_of(stage, args)}, **log, "result": result}  # fmt: skip

    total = min(map(len, (p.places for p in past.values()))) if needs else None
    try:
        with tqdm(desc=stage, unit=" pictures", initial=before, total=total) as bar:
            # match has no server to wait for, and threads would only take turns
            for record in in_parallel(job, units(), 1 if stage == "match" else args.concurrency):
                journal.append(record)
                if record["reason"]:
                    reasons[record["reason"]] += 1
                    bar.set_postfix(failed=reasons.total())
                bar.update()
        if not seen and not problems and args.num_shards == 1:
            raise ValueError(f"{args.input}: no pictures (.jpg, .png with a .json beside it, or .tar of such)")
    finally:
        journal.close()
    summary = Journal(journal.path)
    failed = len(summary.failed)
    print(f"{stage}: {len(summary.places) - failed} pictures ok, {failed} failed"
          + (f" (now: {', '.join(f'{count} {reason}' for reason, count in reasons.most_common())})" if reasons else "")
          + (f", {waiting} wait for a stage before" if waiting else ""))  # fmt: skip
    if failed and failed == len(summary.places):
        record = summary.read(next(iter(summary.places)))
        problems.append(f"{stage}: every picture failed, the first with {record['reason']}: {record['detail']}")
    return problems


# ----------------------------------------------------------------------------------------------------------
# export and stats


def open_journals(out, stages):
    """Every shard's journals -> {stage: {picture: Journal}}; ValueError if a picture is in two shards."""
    count, found = shards_in(out), {}
    if not count:
        raise ValueError(f"{out}: holds no journals: run the stages first")
    for stage in stages:
        found[stage] = {}
        for shard in range(count):
            journal = Journal(journal_path(out, stage, shard, count))
            twice = found[stage].keys() & journal.places.keys()
            if twice:
                raise ValueError(f"{journal.path}: {min(twice)} is in another shard, too")
            found[stage] |= dict.fromkeys(journal.places, journal)
    return found


def records_of(match, others):
    """The SA-OVRS records of a picture: from its line of `match` and its lines of `refer` and `reason`, if any."""
    width, height = match["result"]["size"]
    objects = {}
    for found in match["result"]["kept"]:
        objects.setdefault(found["label"], []).append(found)

    def record(task, name, label, phrase, ids, segmentation, score, made):
        return {"id": f"{match['id']}:{task}:{name}", "image": match["image"], "width": width, "height": height,
                "task": task, "label": label, "phrase": phrase, "annotation_ids": ids, "segmentation": segmentation,
                "score": score, "provenance": made}  # fmt: skip

    for label, found in sorted(objects.items()):
        segmentation = match["result"]["merged"].get(label, found[0]["segmentation"])
        yield record("semantic", label, label, label, [o["annotation_id"] for o in found], segmentation,
                     min(o["score"] for o in found), match["made"])  # fmt: skip
    by_mask = {(o["label"], o["annotation_id"]): o for found in objects.values() for o in found}
    for task, line in others:
        for entry in line["result"]["kept"] if line["result"] else ():
            found = by_mask[entry["label"], entry["annotation_id"]]
            name = f"{entry['annotation_id']}:{entry['label']}"
            yield record(task, name, entry["label"], entry["expression"], [entry["annotation_id"]],
                         found["segmentation"], found["score"], line["made"])  # fmt: skip


@contextmanager
def alone(out):
    """Hold the folder's lock, so that shards which end together write its files one after the other."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        for left in (*out.glob("sa-ovrs.*.tmp"), *out.glob(".stats.*.tmp"), *out.glob("stats.*.tmp")):
            left.unlink()  # of a process that was killed
        os.close(folder)


def export(args):
    """Stage 7: write OUT/sa-ovrs.jsonl from what all shards have finished, sorted by picture.

    Semantic records are labels with all their masks; referring and reasoning records have one mask. Nothing in it
    depends on the order in which answers came.
    """
    path, temporary, count = args.out / "sa-ovrs.jsonl", args.out / "sa-ovrs.jsonl.tmp", Counter()
    journals = open_journals(args.out, ("match", "refer", "reason"))
    with open(temporary, "w", encoding="utf-8") as file:
        for key in tqdm(sorted(journals["match"]), desc="export", unit=" pictures"):
            match = journals["match"][key].read(key)
            if match["status"] != "ok":
                continue
            others = [(task, journals[stage][key].read(key)) for task, stage in
                      (("referring", "refer"), ("reasoning", "reason")) if key in journals[stage]]  # fmt: skip
            for record in records_of(match, others):
                file.write(json.dumps(record) + "\n")
                count[record["task"]] += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    print(f"export: wrote {path}: {', '.join(f'{n} {task}' for task, n in sorted(count.items())) or 'no records'}")


def stats(args):
    """Write OUT/stats.json and OUT/stats.png and print the counts: failures by reason, rejects by rule, labels."""
    journals, numbers, labels = open_journals(args.out, STAGES), {}, Counter()
    for stage, found in journals.items():
        reasons, rules, kept, attempts, usage = Counter(), Counter(), 0, 0, Counter()
        for key in tqdm(found, desc=f"stats {stage}", unit=" pictures", leave=False):
            record = found[key].read(key)
            result = record["result"] or {"kept": [], "rejected": []}
            attempts += record["attempts"]
            usage.update(record["usage"])
            if record["reason"]:
                reasons[record["reason"]] += 1
            rules.update(rule for _, rule in result["rejected"])
            names = {o["label"] for o in result["kept"]} if stage == "match" else result["kept"]  # rules are on labels
            kept += len(names)
            if stage == "match":
                labels.update(o["label"] for o in result["kept"])
        judged = kept + rules.total()
        numbers[stage] = {"pictures": len(found), "failed": dict(reasons.most_common()), "kept": kept,
                          "rejected": {rule: {"count": n, "rate": n / judged} for rule, n in rules.most_common()},
                          "requests": attempts, **usage}  # fmt: skip
        print(f"{stage:9}{len(found):9} pictures {reasons.total():7} failed {kept:9} kept",
              *(f"{n} {rule} ({n / judged:.1%})" for rule, n in rules.most_common()), sep="  ")  # fmt: skip
    numbers["labels_of_masks"] = dict(sorted(labels.items(), key=lambda pair: (-pair[1], pair[0])))
    write_json(args.out / "stats.json", numbers)
    write_picture(draw_bars(numbers["labels_of_masks"]), args.out / "stats.png")
    print(f"stats: wrote {args.out / 'stats.json'} and stats.png ({len(labels)} labels on {labels.total()} masks)")


def draw_bars(counts, most=30):
    """{label: count}, the largest first -> PIL picture of the first `most` as bars."""
    rows, font = list(counts.items())[:most], ImageFont.load_default(13)
    picture = Image.new("RGB", (640, 20 * max(len(rows), 1) + 34), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), f"masks per label: {len(rows)} of {len(counts)} labels", fill="black", font=font)
    for i, (label, count) in enumerate(rows):
        y, length = 28 + 20 * i, round(330 * count / rows[0][1])
        draw.text((180, y + 1), label[:26], fill="black", font=font, anchor="ra")
        draw.rectangle((188, y, 188 + length, y + 14), fill=(70, 120, 180))
        draw.text((194 + length, y + 1), f"{count:,}", fill="black", font=font)
    return picture


# ----------------------------------------------------------------------------------------------------------
# python annotate.py STAGE

EPILOG = """\
Keys come from the environment, VLM_API_KEY and DETECTOR_API_KEY, and are never written anywhere.

Sharding: --shard i --num-shards n takes every picture whose hash falls to i. Without the flags, torchrun's RANK and
WORLD_SIZE or the variables of a Slurm array mean the same. All shards may share OUT: `export` puts together what is
there, and `all` ends with it, so that the last shard to end writes the whole file. Only one process may write a shard.

Exit code: 0 the stage ran to its end (failed pictures are recorded, --retry-failed tries them again); 1 damaged input,
a server that is away, or every picture failed; 2 wrong usage.
"""
# what a stage cannot do without
_REQUIRED = {"labels": ("input", "vlm_url", "vlm_model"), "detect": ("input", "detector_url"), "match": ("input",),
             **dict.fromkeys(("entities", "refer", "reason"), ("input", "vlm_url", "vlm_model")),
             "export": (), "stats": (), "all": ("input", "vlm_url", "vlm_model", "detector_url")}  # fmt: skip


def shard_from_environment(environ):
    """(shard, shards) as torchrun or a Slurm array gives them, else (0, 1). BadUsage for an array with holes."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_TASK_COUNT" in environ:
        first, step = (int(environ.get(f"SLURM_ARRAY_TASK_{name}", d)) for name, d in (("MIN", 0), ("STEP", 1)))
        count, position = int(environ["SLURM_ARRAY_TASK_COUNT"]), int(environ["SLURM_ARRAY_TASK_ID"]) - first
        if position % step or position // step >= count:
            raise BadUsage("the Slurm array has holes: give --shard and --num-shards")
        return position // step, count
    return 0, 1


def check_arguments(args):
    """Fill in the shard and look at every value before the work; BadUsage says what is wrong."""
    missing = [f"--{name.replace('_', '-')}" for name in _REQUIRED[args.stage] if getattr(args, name) is None]
    if missing:
        raise BadUsage(f"{args.stage} needs {' '.join(missing)}")
    for name in ("vlm_url", "detector_url"):
        url = getattr(args, name)
        if url is not None and (not re.match("https?://[^/]", url) or "@" in urlsplit(url).netloc):
            raise BadUsage(f"--{name.replace('_', '-')} {url.split('@')[-1]}: expected http://HOST:PORT/... "
                           "(a key goes into the environment)")  # fmt: skip
    for name in ("VLM_API_KEY", "DETECTOR_API_KEY"):
        if not (os.environ.get(name, "").isascii() and os.environ.get(name, "").isprintable()):
            raise BadUsage(f"{name} holds characters that no key has: set it again")
    if (args.shard is None) != (args.num_shards is None):
        raise BadUsage("--shard and --num-shards go together")
    if args.shard is None:
        args.shard, args.num_shards = shard_from_environment(os.environ)
    if not 0 <= args.shard < args.num_shards:
        raise BadUsage(f"--shard {args.shard}: expected 0 to {args.num_shards - 1} for --num-shards {args.num_shards}")
    lowest = {"concurrency": 1, "attempts": 1, "timeout": 0.001, "wait": 0, "patience": 0, "max_side": 0}
    for name, low in lowest.items():
        if not getattr(args, name) >= low:
            raise BadUsage(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low:g}")
    if args.input is not None and args.input.resolve() == args.out.resolve():
        raise BadUsage(f"--out {args.out}: expected another folder than --input")
    if _REQUIRED[args.stage]:
        there = shards_in(args.out) if args.out.is_dir() else 0
        if there not in (0, args.num_shards):
            raise BadUsage(f"--num-shards {args.num_shards}: {args.out} has {there}: use it, or another --out")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data or a server that is away, 2 for bad usage."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("stage", choices=_REQUIRED, help="the stage to run, or all of them")
    group = parser.add_argument_group("files")
    group.add_argument("--input", type=Path, metavar="PATH", help="an SA-1B .tar, or a folder of such archives or of "
                       "pictures, each with NAME.json beside it: SA-1B's format, or any with COCO run-length masks")
    group.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the journals and the export")
    group = parser.add_argument_group("servers")
    group.add_argument("--vlm-url", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    group.add_argument("--vlm-model", metavar="NAME", help="model to ask for there; recorded in the provenance")
    group.add_argument("--detector-url", metavar="URL", help="zero-shot-object-detection endpoint, the whole address")
    group.add_argument("--detector-model", metavar="NAME", default="grounding-dino",
                       help="its name in the provenance (default: grounding-dino)")
    group.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests under way (default: 64)")
    group.add_argument("--max-side", type=int, default=0, metavar="PX", help="longest side of pictures for the VLM; "
                       "larger ones are made small (default: 0, files are sent as they are)")
    group.add_argument("--timeout", type=float, default=120, metavar="S", help="for one request (default: 120)")
    group.add_argument("--attempts", type=int, default=5, metavar="N", help="tries of one request (default: 5)")
    group.add_argument("--wait", type=float, default=0.5, metavar="S", help="before the second try, doubled before "
                       "each further one; a server's Retry-After goes above it (default: 0.5)")
    group.add_argument("--patience", type=float, default=600, metavar="S", help="how long a server may be away before "
                       "the run stops (default: 600; 10 if it was never there)")
    group = parser.add_argument_group("what to do")
    group.add_argument("--shard", type=int, metavar="i", help="this process's part, from 0 (default: see below)")
    group.add_argument("--num-shards", type=int, metavar="n", help="how many parts there are")
    group.add_argument("--retry-failed", action="store_true", help="first forget failed pictures, then do them again")
    group.add_argument("--share-masks", action="store_true", help="let one mask serve several labels")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        if _REQUIRED[args.stage]:
            if not args.input.exists():
                raise FileNotFoundError(f"{args.input}: no such folder or archive")
            args.out.mkdir(parents=True, exist_ok=True)
        elif not args.out.is_dir():
            raise FileNotFoundError(f"{args.out}: no such folder")
        flags = (args.timeout, args.attempts, args.wait, args.patience)
        if args.vlm_url is not None:
            address = args.vlm_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
            args.vlm = Server(address, os.environ.get("VLM_API_KEY"), *flags)
            if args.stage not in ("match", "detect", "export", "stats"):
                args.vlm.look(args.vlm_model)
        if args.detector_url is not None:
            args.detector = Server(args.detector_url, os.environ.get("DETECTOR_API_KEY"), *flags)
        problems = {}
        for stage in STAGES if args.stage == "all" else [args.stage] if args.stage in STAGES else ():
            problems |= dict.fromkeys(run_stage(stage, args))
        if args.stage in ("export", "stats", "all"):
            with alone(args.out):
                for last in (export, stats):
                    if args.stage in (last.__name__, "all"):
                        last(args)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return 1 if problems else 0
    except BadUsage as error:
        parser.error(str(error))
    except (ValueError, OSError, Stop) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run this again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
