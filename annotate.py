"""From pictures with nameless masks (SA-1B) to SA-OVRS: masks with labels, referring and reasoning expressions.

Paper, section 4. Each stage is a command of its own. Two servers look at the pictures: a vision-language model (VLM)
behind an OpenAI-compatible endpoint, and GroundingDINO behind the Hugging Face zero-shot-object-detection schema.

    labels     the VLM names at most 10 objects per picture
    detect     the detector gives boxes with scores for each label
    match      boxes meet masks: which masks have which label (no server)
    entities   the VLM says which labels are discrete things
    refer      one referring expression for each mask of a thing, checked against the others of its label
    reason     one expression that does not name the object, for things that appear once
    all        the six stages above, archive by archive
    export     writes OUT/train.jsonl and OUT/val.jsonl, which load_dataset("sa-ovrs") reads, and the labelled masks
               before merging, OUT/instances-train.jsonl and OUT/instances-val.jsonl; none of them holds a picture
    stats      writes OUT/stats.json: counts, reject rates, labels

    python annotate.py all --input sa1b --out ovrs \\
        --vlm-url http://localhost:8000/v1 --vlm-model Qwen/Qwen2-VL-72B-Instruct \\
        --detector-url http://localhost:9000/
    python annotate.py export --out ovrs

Stop it at any time, even with kill -9, and run it again: what is finished is not asked again. A unit of work is one
picture in one stage. It ends as one line of OUT/journals/PART/STAGE.jsonl, either ok or failed with its reason; PART
is one archive or one folder of the input. OUT/settings.json records the models, the prompts and --max-side. To go on
with others is refused, because it would mix two data sets. Memory: the names of one part.

Sharding: --shard i --num-shards n takes every n-th part. All shards share OUT, and the next run may have another
number of them. Keys come from the environment, VLM_API_KEY and DETECTOR_API_KEY, and are never written anywhere.

Exit code: 0 the stage ran to its end (failed pictures are recorded, --retry-failed tries them again); 1 damaged input,
a server that is away or gives no useful answers, or every picture failed; 2 wrong usage.

Legend: D detected boxes, M masks, H W a picture's height and width. Boxes are x0 y0 x1 y1 in pixels of the upright
picture, x1 and y1 just outside the object.
"""

import base64
import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import unicodedata
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import dropwhile, islice
from pathlib import Path, PurePosixPath

import numpy as np
import requests
from PIL import Image, ImageOps
from requests.adapters import HTTPAdapter
from scipy import ndimage
from tqdm import tqdm
from urllib3.exceptions import ProtocolError, ReadTimeoutError
from urllib3.util import Retry

from data import open_picture, rle_decode, rle_encode, to_rgb
from metrics import BadUsage, Parser, box_areas, box_iou, printable, whole, write_json


class Failure(Exception):
    """A unit of work that ends without its answer. It is recorded with `reason`, and the run goes on."""

    def __init__(self, reason, detail=""):
        super().__init__(reason)
        self.reason, self.detail = reason, str(detail)[:300]


class BadAnswer(Failure):
    """An answer that is of no use; it is asked for once more."""


class Stop(OSError):
    """The run cannot go on; the message is one line. What is not finished is done by the next run."""


@contextmanager
def failing(reason, kind=Failure):
    """Whatever goes wrong in the block ends its unit of work for this reason. kind: Failure or BadAnswer."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:  # files and answers of others: Pillow's decoders alone raise nearly every kind
        raise kind(reason, f"{type(error).__name__}: {error}") from None


# ---- prompts. paper: their words are not printed; these are ours -------------------------------------------

PROMPTS = {
    "labels": """\
List the objects that are clearly visible in this picture, at most 10, the most prominent first.
- Each is a common noun in the singular, of one to four words, lower case, such as "dog" or "traffic light".
- No object twice, no two names for one object, no names of people.
- No words for the whole picture or for light: no "scene", "background", "shadow".""",
    "entities": """\
These labels were found in this picture: %(labels)s
Which of them are discrete things, objects that can be counted one by one, such as "dog", "cup" or "window"?
Leave out stuff without a shape of its own, such as "sky", "grass", "water" or "road".
Use the labels exactly as they are written.""",
    "expression": """\
One object in this picture has a green line around it.
Label: %(label)s
Task: write one referring expression in English that fits this object and nothing else in the picture.
- Say what sets it apart: its own look, its place (left and right are the viewer's), what it does, what is beside it.
- A noun phrase of at most 20 words, such as "the small brown dog lying on the left".
- Never mention the line, a marking, an outline or its colour.""",
    "verify": """\
One object in this picture has an orange line around it.
Label: %(label)s
Expression: %(expression)s
Does the expression fit the object with the orange line? Judge this object alone, and leave out the line itself.""",
    "reasoning": """\
There is one %(label)s in this picture.
Write one expression in English that a reader can find it by only after some thought: from its use, its parts, what
people do with it, or its role in this picture.
- Do not use the words "%(label)s", their plural, parts or synonyms.
- A noun phrase of at most 25 words, such as "what keeps the rain off the people waiting for the bus".""",
}
_LABELS = {"type": "array", "items": {"type": "string", "maxLength": 80}, "maxItems": 10}
_EXPRESSION = {"type": "string", "minLength": 1, "maxLength": 300}
# prompt: (key of the answer, JSON schema of its value, max_tokens)
ANSWERS = {
    "labels": ("labels", _LABELS, 256),
    "entities": ("entities", _LABELS, 256),
    "expression": ("expression", _EXPRESSION, 128),
    "verify": ("fits", {"type": "boolean"}, 32),
    "reasoning": ("expression", _EXPRESSION, 128),
}
_FORMS = {"array": '["...", "..."]', "string": '"..."', "boolean": "true or false"}
for _name, (_key, _schema, _) in ANSWERS.items():
    PROMPTS[_name] += f'\nAnswer with JSON only: {{"{_key}": {_FORMS[_schema["type"]]}}}'


# ---- words. Each rule is one that the prompts state; no word is ever changed into another one --------------

MAX_LABELS = 10  # paper, section 4
NO_OBJECTS = ("scene", "background", "shadow")
IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet",
             "tooth": "teeth", "mouse": "mice", "leaf": "leaves", "knife": "knives", "shelf": "shelves"}
ARTICLES = ("a", "an", "the")
SMALL_WORDS = frozenset("a an the of with in on for and or to at by".split())
# An expression about our line instead of the object.
_MARKING = re.compile(r"\b(outlined?|highlighted|bounding box|(green|orange) (line|outline))\b")
# A refusal begins with these words; within an expression they may be what a sign says.
_REFUSAL = re.compile(r"\W*(sorry|i['\u2019]?m (very )?sorry|i am sorry|i can['\u2019]?t|i cannot|i['\u2019]?m unable|"
                      r"i am unable|as an ai)\b", re.IGNORECASE)


def same_noun(a, b):
    """Whether two lower-case nouns are the same, or one is the plural of the other: s, es, ies for y, or irregular."""
    plurals = [{one + "s", one + "es", re.sub("y$", "ies", one), IRREGULAR.get(one, one)} for one in (a, b)]
    return a in plurals[1] or b in plurals[0] or a == b


def normal_label(text):
    """A label as we keep it: lower case, without accents, punctuation or an article before it; may be ""."""
    text = unicodedata.normalize("NFKD", text).lower().replace("\u2019", "'")
    text = "".join(c for c in text if not unicodedata.combining(c))  # "cafe" for its accented form
    words = re.sub(r"[^\w\-' ]|_", " ", text).split()  # a dot would end the label in GroundingDINO's text
    return " ".join(dropwhile(lambda word: word in ARTICLES, words))


def clean_labels(named):
    """What the VLM named -> (labels to go on with, [[label, rule it fell by], ...])."""
    kept, rejected = [], []
    for text in named:
        label = normal_label(text)
        if not label or not label.isascii():
            rejected.append([text, "no_english_word"])  # GroundingDINO knows no others
        elif label in NO_OBJECTS:
            rejected.append([text, "no_object"])
        elif len(label.split()) > 4:
            rejected.append([text, "too_long"])
        elif any(same_noun(label, other) for other in kept):
            rejected.append([text, "duplicate"])  # so that of a noun and its plural the first one stays
        elif len(kept) == MAX_LABELS:
            rejected.append([text, "too_many"])
        else:
            kept.append(label)
    return kept, rejected


def words_of(text):
    """Lower-case words of a text; a hyphen parts words."""
    return re.findall(r"[a-z0-9]+", unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'"))


def names_object(expression, label):
    """Whether an expression says a word of the label, or the singular or plural of one."""
    parts = [word for word in words_of(label) if word not in SMALL_WORDS and len(word) > 1]
    said = words_of(expression)
    said += [a + b for a, b in zip(said, said[1:])]  # "traffic light" says "trafficlight", and the other way round
    return any(same_noun(a, b) for a in said for b in [*parts, "".join(parts)])


def expression_fault(expression, label):
    """The rule that an expression breaks by its words alone, or None."""
    words, marking = words_of(expression), _MARKING.search(expression.lower())
    if not words or sum(not c.isascii() for c in expression) > 0.1 * len(expression) or not expression.isprintable():
        return "not_english"
    if len(words) > 40:  # paper: not stated; we allow about twice what the prompts ask for
        return "too_long"
    if marking and set(words_of(marking[0])).isdisjoint(words_of(label)):
        return "mentions_marking"
    if [word for word in words if word not in ARTICLES] == words_of(label):
        return "only_the_label"  # the semantic record says as much, and of a missed second object it would be wrong
    return None


def judge_expressions(written):
    """[(label, annotation id, expression, fault or None)] of one picture -> the result of `refer` or `reason`.

    paper: not stated; an expression said of two objects of a picture is dropped for both, case and spaces aside.
    """
    count = Counter(tuple(words_of(expression)) for _, _, expression, fault in written if not fault)
    kept, rejected = [], []
    for label, id, expression, fault in written:
        if fault or count[tuple(words_of(expression))] > 1:
            rejected.append([expression, fault or "duplicate"])
        else:
            kept.append({"label": label, "annotation_id": id, "expression": expression})
    return {"kept": kept, "rejected": rejected}


# ---- the input: SA-1B archives, read where they lie, or folders: sa_N.jpg with sa_N.json -------------------

PICTURES = (".jpg", ".jpeg", ".png")


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
        with failing("unreadable"), open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise Failure("unreadable", f"{path} ends within {self.image}")
        return content


def pictures_of(name, path):
    """A part (see `find_parts`) -> (its Pictures, sorted by name; [what is wrong with it]). Memory: its names.

    Half a pair is a Picture, too, if it is a picture or is named sa_N.json.
    """
    if path.is_file():
        places, problems = read_archive(path)
    else:
        places, problems = {e.name: (e.path, 0, -1) for e in os.scandir(path) if e.name[0] != "."}, []
    images = {}
    for file in sorted(places):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in PICTURES and images.setdefault(stem, file) != file:
            problems.append(f"{path}: {file} and {images[stem]} share a name: the first is left out")
    for stem in (file[:-5] for file in places if re.search(r"(^|/)sa_[^/]*\.json$", file)):
        images.setdefault(stem, f"{stem}.jpg")
    return [Picture(os.path.join(name, stem), os.path.join(name, image), places.get(image), places.get(f"{stem}.json"))
            for stem, image in sorted(images.items())], problems


def find_parts(source):
    """The parts of an archive, or of a folder with all archives and folders below it: {name: path}, sorted.

    A part is one archive, or one folder without those below it. Its name is its path below `source` without .tar, ""
    for `source` itself. Links to folders are followed, and a folder that is reached twice is read once. Left out are
    hidden files, and a folder beside its archive (sa_000000/ and sa_000000.tar), which holds the same pictures.
    """
    def unreadable(error):
        raise error

    if source.is_file():
        return {source.stem: source}
    found, seen = {}, set()
    for folder, folders, files in os.walk(source, followlinks=True, onerror=unreadable):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        archives = {name.removesuffix(".tar") for name in files if name.endswith(".tar") and name[0] != "."}
        for name in archives.intersection(folders):
            print(f"{Path(folder, name)}: left out, {name}.tar beside it is read instead", file=sys.stderr)
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in archives)
        below = os.path.relpath(folder, source).removeprefix(".")
        found |= {os.path.join(below, name): Path(folder, f"{name}.tar") for name in archives}
        if any(name.lower().endswith(PICTURES) or re.fullmatch(r"sa_.*\.json", name) for name in files):
            found[below] = Path(folder)
    return dict(sorted(found.items()))


def read_archive(path):
    """A .tar, not unpacked -> ({path of a member: place}, [what is wrong]); of a cut one, what is whole is found.

    Left out are hidden members, such as the ._x.jpg of macOS, and those that lead out of the archive.
    """
    places, problems = {}, []
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all
                name = PurePosixPath(member.name)
                if not member.isreg() or any(part[0] in "./" for part in name.parts):
                    continue
                if str(name) in places:
                    problems.append(f"{path}: {name} comes twice: the last is read")
                places[str(name)] = (path, member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)
            if not archive.offset or archive.fileobj.read(512) != bytes(512):
                problems.append(f"{path}: damaged: the archive ends in the middle")
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(f"{path}: damaged or not a plain .tar archive ({error})")
    return places, problems


def read_annotations(picture, size):
    """A mask file -> (ids, boxes float64 (M, 4), run-length masks); `size`: (width, height) of its picture.

    Taken is {"annotations": [{"id", "segmentation": COCO RLE, "bbox"}, ...]}, or the list alone. Without bbox the box
    is measured. With it, the box is [x, y, x + w + 1, y + h + 1], because SA-1B's w and h are one less than the extent.
    Raises Failure for anything else, or for masks of another size than the picture.
    """
    ids, boxes, segmentations = [], [], []
    with failing("broken_masks"):
        content = json.loads(picture.read("masks"))
        for number, annotation in enumerate(content["annotations"] if isinstance(content, dict) else content, 1):
            rle = annotation["segmentation"]
            if rle["size"] != [size[1], size[0]]:
                raise ValueError(f"a mask of {rle['size']}, the picture is {size[1]} x {size[0]} (height, width)")
            if "bbox" in annotation:
                x, y, w, h = (float(v) for v in annotation["bbox"])
                boxes.append((x, y, x + w + 1, y + h + 1))
            else:
                boxes.append(Image.fromarray(rle_decode(rle)).getbbox() or (0, 0, 0, 0))
            ids.append(annotation.get("id", number))
            segmentations.append({"size": rle["size"], "counts": rle["counts"]})
        if len(set(ids)) < len(ids):
            raise ValueError("an annotation id comes twice")
    return ids, np.array(boxes, np.float64).reshape(-1, 4), segmentations


# ---- pictures for the servers ------------------------------------------------------------------------------

DILATE = 20  # pixels, paper, section 4
GREEN, ORANGE = (0, 255, 0), (255, 128, 0)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def original(picture, max_side=0):
    """A Picture's file as it is -> (bytes, media type, (width, height) upright).

    It is encoded again only if it must be: turned by EXIF, no JPEG or PNG, or with a side above `max_side` (0: any).
    """
    content = picture.read("picture")
    with failing("broken_picture"), Image.open(io.BytesIO(content)) as image:
        turned = image.getexif().get(0x0112, 1)
        size = image.size[::-1] if turned > 4 else image.size
        complete = image.format in _ENDS and content.endswith(_ENDS[image.format]) and image.mode in ("RGB", "L")
        large = max_side and max(size) > max_side
        if complete and turned == 1 and not large:
            return content, Image.MIME[image.format], size
        if large and image.format == "JPEG":
            image.thumbnail((max_side, max_side))  # the decoder itself makes it small: half the time
        upright = to_rgb(ImageOps.exif_transpose(image))
    return *encode(upright, max_side), size


def encode(image, max_side=0):
    """PIL RGB, made smaller in place if a side is above `max_side` (0: any) -> (bytes, media type)."""
    if max_side:
        image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    if image.width * image.height <= 512 * 512:  # JPEG smears thin lines
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), "image/png"
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue(), "image/jpeg"


def outline(mask, width=1):
    """bool (H, W) -> bool (H, W): the inner rim, `width` px thick, of the mask dilated by 20 px, closed at the border.

    It is dilated so that the object's own edge stays visible. paper: the shape is not stated; we use a disk.
    """
    line = np.zeros(mask.shape, bool)
    for sides in ndimage.find_objects(mask.view(np.uint8)):  # the rectangle of the mask; none if it is empty
        box = tuple(slice(max(side.start - DILATE - 1, 0), side.stop + DILATE + 1) for side in sides)
        grown = ndimage.distance_transform_edt(~mask[box]) <= DILATE
        line[box] = grown & ~ndimage.binary_erosion(grown, iterations=width)
    return line


def mark(image, line, color, max_side):
    """PIL RGB and a line from `outline` -> the encoded picture (bytes, media type) with the line in `color`."""
    marked = image.copy()
    marked.paste(color, mask=Image.fromarray(line))
    return encode(marked, max_side)


# ---- servers -----------------------------------------------------------------------------------------------

ATTEMPTS = 8  # tries of one request
WAIT = 1.0  # seconds before the third try, doubled before each further one; the second try comes at once
LONGEST_PAUSE = 300  # seconds that a server may ask for with Retry-After
TIMEOUT = 120  # seconds for one request
STOP_AFTER = 100  # pictures in a row without one useful answer: the run stops
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # other errors would come again, too


class Server:
    """One HTTP server, shared by all threads. url: where requests go; variable: the environment has its key there."""

    def __init__(self, url, variable, concurrency):
        self.url, self.variable, self.concurrency = url, variable, concurrency
        self.name = url.partition("?")[0]  # what messages call it
        self.key = os.environ.get(variable, "")
        if not (self.key.isascii() and self.key.isprintable()):
            raise BadUsage(f"{variable} holds characters that no key has: set it again")
        self.session = requests.Session()
        self.session.auth = lambda request: request  # so that no .netrc puts in another key
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"

    def first(self, body, kind):
        """POST a small request once; Stop tells what is wrong. Later ones are tried again where that may help."""
        try:
            answer = self.post(body)
        except Failure as failure:
            raise Stop(f"{self.name}: the first request failed: {failure.reason} {failure.detail}") from None
        if not isinstance(answer, kind):
            raise Stop(f"{self.name}: answers {json.dumps(answer)[:80]}: expected a JSON {kind.__name__}")
        retries = Retry(ATTEMPTS - 1, read=2, status_forcelist=_TRY_AGAIN, allowed_methods=None, raise_on_status=False,
                        backoff_factor=WAIT / 2, backoff_jitter=WAIT / 4, retry_after_max=LONGEST_PAUSE)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=self.concurrency, max_retries=retries))

    def post(self, body):
        """POST a JSON body -> the answer's JSON. Raises Failure if there is no answer to this request, and Stop if
        there would be none to any: nobody listens, the key is refused, the address or the model does not exist.
        """
        try:
            response = self.session.post(self.url, json=body, timeout=(10, TIMEOUT), allow_redirects=False)
            status = response.status_code
            if status == 200:
                return json.loads(response.content)
        except (requests.ConnectionError, requests.Timeout) as error:
            cause = getattr(error.args[0], "reason", error.args[0])  # urllib3's own error, below its count of the tries
            if isinstance(cause, ReadTimeoutError | ProtocolError):  # it was there, and took the request
                raise Failure("timeout" if isinstance(cause, ReadTimeoutError) else "connection", cause) from None
            raise Stop(f"{self.name}: no server answers ({type(cause).__name__}): start it first") from None
        except (requests.RequestException, ValueError, RecursionError) as error:
            raise BadAnswer("cut_response", error) from None
        text = " ".join(response.text.split()).replace(self.key or "\n", "***")[:300]
        if status in (401, 403):
            raise Stop(f"{self.name}: refuses the key ({status} {text}): put the right one into {self.variable}")
        if status == 404 or 300 <= status < 400:
            raise Stop(f"{self.name}: {status} {text}: check the address, and the model's name")
        raise Failure(f"http_{status}", text)


def probe(args, stages):
    """Send each server that the stages ask one small request."""
    white = encode(Image.new("RGB", (64, 64), "white"))
    if any(STAGES[stage][2] for stage in stages):
        args.vlm.first(chat_body(args, "labels", white), dict)
    if "detect" in stages:
        args.detector.first(detect_body(white[0], ["cup"]), list)


def detect_body(content, labels):
    """The body that asks the detector for the boxes of labels in an encoded image (bytes)."""
    parameters = {"candidate_labels": labels, "threshold": ASK_SCORE}
    return {"inputs": base64.b64encode(content).decode(), "parameters": parameters}


def chat_body(args, name, image, turn=0, **words):
    """The body of a chat completion that asks prompt `name` about an encoded image (bytes, media type)."""
    key, schema, max_tokens = ANSWERS[name]
    schema = {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}
    url = f"data:{image[1]};base64,{base64.b64encode(image[0]).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPTS[name] % words}]
    return {
        "model": args.vlm_model, "messages": [{"role": "user", "content": content}],
        "temperature": 0.7 * turn, "top_p": 1.0, "repetition_penalty": 1.05, "seed": turn, "max_tokens": max_tokens,
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}},
    }


def ask_twice(log, once):
    """What once(0) makes of a server's answer. If that is of no use, once(1); raises Failure."""
    for turn in (0, 1):
        log["requests"] += 1
        try:
            value = once(turn)
            log["answers"] += 1
            return value
        except BadAnswer:
            if turn == 1:
                raise


def ask(args, log, name, image, **words):
    """Ask the VLM prompt `name` about an encoded image (bytes, media type) -> the checked value of its answer."""
    return ask_twice(
        log, lambda turn: read_answer(args.vlm.post(chat_body(args, name, image, turn, **words)), name, log))


def read_answer(answer, name, log):
    """A chat completion -> the value of its JSON content; BadAnswer if it is cut, refused or another thing."""
    key, schema, _ = ANSWERS[name]
    with failing("wrong_response", BadAnswer):
        finish, message = answer["choices"][0]["finish_reason"], answer["choices"][0]["message"]
        content, refusal = message["content"], message.get("refusal")
    log["raw"].append(refusal or content)
    if refusal or _REFUSAL.match(f"{content}"):
        raise BadAnswer("refused", refusal or content)
    if finish != "stop":  # cut by max_tokens, by a content filter, ...
        raise BadAnswer(f"finish_{finish}", f"{content}"[-200:])
    try:
        value = json.loads(re.search(r'\{\s*"[^{}]*\}', content)[0])  # it may stand in a fence or in prose
    except (TypeError, ValueError, RecursionError):
        raise BadAnswer("no_json", content) from None
    if set(value) != {key} or not fits_schema(value[key], schema):
        raise BadAnswer("wrong_schema", content)
    if not isinstance(value[key], str):
        return value[key]
    if _REFUSAL.match(value[key]):
        raise BadAnswer("refused", value[key])
    return " ".join(value[key].split()).strip(". \"'")  # one line, without the full stop at its end


def fits_schema(value, schema):
    """Whether a value is what one of ANSWERS asks for. maxItems is not held against it: what is too much is cut."""
    if schema["type"] == "array":
        return isinstance(value, list) and all(fits_schema(v, schema["items"]) for v in value)
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    return isinstance(value, str) and schema.get("minLength", 0) <= len(value.strip()) <= schema["maxLength"]


# ---- matching (paper, section 4) ---------------------------------------------------------------------------

MATCH_RULES = "match-2"  # in the settings of a run: change it with the rules of `match`
MAX_BOXES = 4  # a label with more boxes is dropped
NESTED_IOU = 0.97
MIN_SCORE = 0.3
MIN_IOU_ONE, MIN_IOU_SEVERAL = 0.85, 0.9
ASK_SCORE = 0.25  # of the detector; paper: not stated; a weak box tells of an instance that we must not miss
# GroundingDINO often boxes one object several times. paper: not stated; we use the value of Grounded-SAM's labelling.
SAME_BOX_IOU = 0.5


def suppress(detections):
    """Non-maximum suppression: detections of one label -> those that no better one covers, the best first."""
    order, kept = sorted(detections, key=lambda d: (-d["score"], d["box"])), []
    boxes = np.array([detection["box"] for detection in order], np.float64)
    same = box_iou(boxes, boxes) > SAME_BOX_IOU
    for i in range(len(order)):
        if not same[i, kept].any():
            kept.append(i)
    return [order[i] for i in kept]


def match(detections, mask_boxes):
    """Which masks have which label. Pure: no files, no models. Paper, section 4.

    detections: [{"label", "score" in [0, 1], "box": x0 y0 x1 y1}]; mask_boxes: (M, 4) x0 y0 x1 y1, both in pixels.
    Returns ([(label, mask index, score, iou)], sorted; [[label, rule it fell by], ...]). After `suppress`, for a label:

    (a) more than 4 boxes: the label is dropped;
    (b) of the masks that reach the IoU below with one of its boxes, those are left out whose box has IoU > 0.97 with
        a larger mask's (same size: with an earlier mask's);
    (c) each box takes the mask with the highest IoU (same IoU: the earlier). Every score must be above 0.3 and every
        IoU above 0.9, or 0.85 if the label has a single box; else the label is dropped.

    paper: not stated which boxes (b) compares and when; we use the boxes of the masks that come into question for the
    label, before (c), so that a box cannot choose the part instead of the whole. "Every" is taken at its word: one bad
    box drops its label, for the rest would be half of a semantic mask. paper: not stated; one mask never serves two
    labels: they come in the order of their mean score (then mean IoU, then name), and one that needs a mask that is
    already taken is dropped whole.
    """
    mask_boxes = np.asarray(mask_boxes, np.float64).reshape(-1, 4)
    found, rejected = [], []
    for label in sorted({detection["label"] for detection in detections}):
        boxes = suppress([detection for detection in detections if detection["label"] == label])
        masks, rule = masks_of_label(boxes, mask_boxes)
        if rule:
            rejected.append([label, rule])
        else:
            mean = [sum(values) / len(values) for values in zip(*masks.values())]
            found.append((-mean[0], -mean[1], label, masks))
    taken, matches = set(), []
    for *_, label, masks in sorted(found, key=lambda entry: entry[:3]):
        if not taken.isdisjoint(masks):
            rejected.append([label, "mask_taken"])
            continue
        taken |= masks.keys()
        matches += [(label, m, score, iou) for m, (score, iou) in masks.items()]
    return sorted(matches), sorted(rejected)


def masks_of_label(boxes, mask_boxes):
    """Rules (a) to (c) of `match` for one label's boxes -> ({mask index: (score, iou)}, rule it fell by or None)."""
    floor = MIN_IOU_ONE if len(boxes) == 1 else MIN_IOU_SEVERAL
    if len(boxes) > MAX_BOXES:
        return {}, "too_many_boxes"
    if not all(box["score"] > MIN_SCORE for box in boxes):
        return {}, "low_score"
    iou = box_iou(np.array([box["box"] for box in boxes], np.float64), mask_boxes)  # (D, M)
    near = np.flatnonzero((iou > floor).any(0))
    order = near[np.argsort(-box_areas(mask_boxes[near]), kind="stable")]  # large to small
    nested = np.triu(box_iou(mask_boxes[order], mask_boxes[order]) > NESTED_IOU, 1).any(0)
    left = np.sort(order[~nested])
    best = left[iou[:, left].argmax(1)] if len(left) else []
    if not len(left) or not all(iou[i, m] > floor for i, m in enumerate(best)):
        return {}, "low_iou"
    # Two boxes cannot take one mask: both would have IoU > 0.9 with it, and with each other more than SAME_BOX_IOU.
    return {int(m): (float(boxes[i]["score"]), float(iou[i, m])) for i, m in enumerate(best)}, None


# ---- the stages --------------------------------------------------------------------------------------------


def name_labels(picture, past, args, log):
    """Stage 1: kept is a list of labels."""
    picture.read("masks")  # without them nobody is asked
    kept, rejected = clean_labels(ask(args, log, "labels", original(picture, args.max_side)[:2]))
    return {"kept": kept, "rejected": rejected}


def detect(picture, past, args, log):
    """Stage 2: kept is [{"label", "score", "box"}]; "size" is the picture's (width, height)."""
    content, _, size = original(picture)  # at full size: the detector makes it small itself
    labels, kept, rejected = past["labels"]["kept"], [], []
    if labels:
        body = detect_body(content, labels)
        kept, rejected = ask_twice(log, lambda turn: read_boxes(args.detector.post(body), labels, size, log))
    return {"kept": kept, "rejected": rejected, "size": size}


def read_boxes(answer, labels, size, log):
    """The detector's answer -> (detections, [[label, rule it fell by], ...]); BadAnswer if it is no list of boxes.

    Boxes are cut at the picture's border; labels that were not asked for and empty boxes go.
    """
    kept, rejected = [], []
    log["raw"].append(answer)
    with failing("wrong_schema", BadAnswer):
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
    return kept, rejected


def match_masks(picture, past, args, log):
    """Stage 3: kept is [{"label", "annotation_id", "score", "iou", "segmentation"}], the instance records.

    "merged" has the semantic mask of each label with several; "size" is (width, height).
    """
    size = past["detect"]["size"]
    ids, boxes, segmentations = read_annotations(picture, size)
    matches, rejected = match(past["detect"]["kept"], boxes)
    kept, unions = [], {}
    with failing("broken_masks"):
        for label, m, score, iou in matches:
            rle, mask = segmentations[m], rle_decode(segmentations[m])
            if not mask.any():
                raise ValueError(f"annotation {ids[m]}: a mask without a pixel")
            if not isinstance(rle["counts"], str):
                rle = rle_encode(mask)
            unions[label] = mask | unions[label] if label in unions else mask
            kept.append({"label": label, "annotation_id": ids[m], "score": score, "iou": iou, "segmentation": rle})
    several = {label for label, count in Counter(item["label"] for item in kept).items() if count > 1}
    merged = {label: rle_encode(unions[label]) for label in unions if label in several}
    return {"kept": kept, "rejected": rejected, "size": size, "merged": merged}


def choose_entities(picture, past, args, log):
    """Stage 4: kept is the list of labels that are discrete things."""
    labels = sorted({found["label"] for found in past["match"]["kept"]})
    answer = []
    if labels:
        answer = ask(args, log, "entities", original(picture, args.max_side)[:2], labels=json.dumps(labels))
    named = set(map(normal_label, answer))
    return {"kept": [label for label in labels if label in named],
            "rejected": [[label, "stuff"] for label in labels if label not in named]}


def things(past):
    """The matched objects of each label that is a discrete thing: {label: [object, ...]}."""
    return {label: [found for found in past["match"]["kept"] if found["label"] == label]
            for label in past["entities"]["kept"]}


def refer(picture, past, args, log):
    """Stage 5: kept is [{"label", "annotation_id", "expression"}], at most one per mask.

    A green line marks the object to describe. Then an orange line marks each other object of the label, and the
    expression must fit none of them. A label with one object has nothing to be checked against.
    """
    written, groups = [], things(past)
    with failing("broken_picture"):
        image = open_picture(io.BytesIO(picture.read("picture"))) if groups else None
    for label, objects in groups.items():
        # paper: the line's width is not stated; we use 1/300 of the short side
        lines = [outline(rle_decode(o["segmentation"]), max(1, round(min(image.size) / 300))) for o in objects]
        for i, target in enumerate(objects):
            try:
                marked = mark(image, lines[i], GREEN, args.max_side)
                expression = ask(args, log, "expression", marked, label=label)
                fault = expression_fault(expression, label)
                others = (mark(image, line, ORANGE, args.max_side) for line in lines[:i] + lines[i + 1:])
                if not fault and any(ask(args, log, "verify", other, label=label, expression=expression)
                                     for other in others):
                    fault = "fits_another"
            except BadAnswer as answer:  # the picture's other objects need not suffer
                expression, fault = answer.detail, answer.reason
            written.append((label, target["annotation_id"], expression, fault))
    return judge_expressions(written)


def reason(picture, past, args, log):
    """Stage 6: kept is [{"label", "annotation_id", "expression"}] for objects whose label appears once.

    paper: not stated; only discrete things are asked for, with the unmarked picture.
    """
    written, once = [], [(label, found[0]) for label, found in things(past).items() if len(found) == 1]
    image = original(picture, args.max_side)[:2] if once else None
    for label, target in once:
        try:
            expression = ask(args, log, "reasoning", image, label=label)
            fault = "names_object" if names_object(expression, label) else expression_fault(expression, label)
        except BadAnswer as answer:
            expression, fault = answer.detail, answer.reason
        written.append((label, target["annotation_id"], expression, fault))
    return judge_expressions(written)


# stage: (its function, the stages whose results it reads, the prompts that it sends to the VLM)
STAGES = {
    "labels": (name_labels, (), ("labels",)),
    "detect": (detect, ("labels",), ()),
    "match": (match_masks, ("detect",), ()),
    "entities": (choose_entities, ("match",), ("entities",)),
    "refer": (refer, ("match", "entities"), ("expression", "verify")),
    "reason": (reason, ("match", "entities"), ("reasoning",)),
}


# ---- journals: OUT/journals/PART/STAGE.jsonl ---------------------------------------------------------------


class Journal:
    """The lines of one stage and one part: append-only, and of several lines of one picture the last one counts.

    A last line without its end, as a killed run leaves it, does not count. With `write` it is cut off, and nobody else
    may write the file meanwhile (flock, which a network file system must support). Memory: a small entry per picture.
    """

    def __init__(self, out, part, stage, write=False):
        path = out / "journals" / part / f"{stage}.jsonl"
        self.places, self.failed, self.end = {}, set(), 0  # places: {picture: (offset, bytes)}
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path if write or path.exists() else os.devnull, "ab+" if write else "rb")
        try:
            if write:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process writes it: wait for its end, or give each its --shard") from None
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._note(json.loads(line), len(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is damaged ({error!r}): delete it") from None
        if write:
            self.file.truncate(self.end)

    def _note(self, record, length):
        self.places[record["id"]] = (self.end, length)
        (self.failed.discard if record["status"] == "ok" else self.failed.add)(record["id"])
        self.end += length

    def append(self, record):
        """Add a line; it is on its way to the disk when this returns."""
        line = json.dumps(record).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        self._note(record, len(line))

    def read(self, key):
        """The record of a picture. Threads may call it at the same time."""
        offset, length = self.places[key]
        return json.loads(os.pread(self.file.fileno(), length, offset))

    def good(self, key):
        """Whether a picture is done and did not fail."""
        return key in self.places and key not in self.failed

    def close(self):
        self.file.close()


def read_settings(out):
    """OUT/settings.json, {stage: settings}; empty if no stage has begun."""
    path = out / "settings.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}): take another --out") from None


def record_settings(args, stages):
    """Write what the stages' results depend on into OUT/settings.json; BadUsage if OUT was begun with others."""
    with open(args.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # shards may begin at the same time
        settings = read_settings(args.out)
        for stage in stages:
            hashes = {name: hashlib.sha256(PROMPTS[name].encode()).hexdigest()[:8] for name in STAGES[stage][2]}
            now = {"model": args.vlm_model, "max_side": args.max_side, "prompts": hashes}
            now = {"detect": {"model": args.detector_model, "threshold": ASK_SCORE},
                   "match": {"rules": MATCH_RULES}}.get(stage, now)
            if settings.setdefault(stage, now) != now:
                raise BadUsage(f"{stage}: {args.out} was begun with {settings[stage]}, this run has {now}: go on with "
                               "the same, or take another --out")
        write_json(args.out / "settings.json", settings)


# ---- running -----------------------------------------------------------------------------------------------


def in_parallel(job, units, concurrency):
    """Yield job(unit) for each unit, as they come to an end; at most `concurrency` are under way at any time.

    `units` is drawn from only when there is room. The first exception of a job is raised here.
    """
    pool, units, under_way = ThreadPoolExecutor(concurrency), iter(units), set()
    try:
        while True:
            under_way |= {pool.submit(job, unit) for unit in islice(units, concurrency - len(under_way))}
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def do_picture(stage, picture, before, args):
    """Do a picture in a stage -> its record. before: {stage: Journal} of the stages that it needs."""
    record = {"id": picture.key, "image": picture.image, "status": "ok", "reason": None, "detail": None,
              "requests": 0, "answers": 0, "raw": [], "result": None}
    past = {name: journal.read(picture.key)["result"] for name, journal in before.items()}
    try:
        record["result"] = STAGES[stage][0](picture, past, args, record)
    except Failure as failure:
        record |= {"status": "failed", "reason": failure.reason, "detail": failure.detail}
    return record


def run_stage(stage, part, pictures, journals, args, tally):
    """Do what is left of a stage in one part; the stages before it must have done theirs."""
    journal, before = journals[stage], {name: journals[name] for name in STAGES[stage][1]}
    todo = [picture for picture in pictures if picture.key not in journal.places
            or args.retry_failed and picture.key in journal.failed]
    ready = [picture for picture in todo if all(past.good(picture.key) for past in before.values())]
    if ready and args.to_probe:
        probe(args, args.to_probe)
        args.to_probe = ()
    useful_end = journal.end  # of the lines before the useless ones
    threads = 1 if stage == "match" else args.concurrency  # match waits for no server, threads would only take turns
    try:
        with closing(in_parallel(lambda picture: do_picture(stage, picture, before, args), ready, threads)) as records:
            for record in tqdm(records, f"{part} {stage}", len(ready), unit=" pictures", leave=False):
                journal.append(record)
                tally[record["reason"]] += 1
                tally["useless"] = 0 if record["answers"] else tally["useless"] + (record["requests"] > 0)
                useful_end = useful_end if tally["useless"] else journal.end
                if tally["useless"] >= STOP_AFTER:
                    why = f"{record['reason'] or ''} {record['detail'] or record['raw'][-1:]}"[:300]
                    raise Stop(f"{stage}: no useful answer for {STOP_AFTER} pictures in a row, such as {record['id']}: "
                               f"{why}: look at the server, then run this again")
    except (Stop, KeyboardInterrupt):
        journal.file.truncate(useful_end)  # so that a server that breaks down costs no picture
        raise
    tally.update(ok=len(journal.places) - len(journal.failed), failed=len(journal.failed),
                 waiting=len(todo) - len(ready))


def annotate(args, stages):
    """Do what is left of the stages in this shard, part by part. Returns the exit code."""
    parts, problems = find_parts(args.input), []
    if not parts:
        raise ValueError(f"{args.input}: no pictures (.jpg, .png with a .json beside it, or .tar of such)")
    args.out.mkdir(parents=True, exist_ok=True)
    record_settings(args, stages)
    tallies = {stage: Counter() for stage in stages}
    needed = [stage for stage in STAGES if stage in stages or any(stage in STAGES[other][1] for other in stages)]
    args.to_probe = stages
    for part, path in [*parts.items()][args.shard::args.num_shards]:
        pictures, wrong = pictures_of(part, path)
        problems += wrong
        with ExitStack() as stack:
            journals = {stage: stack.enter_context(closing(Journal(args.out, part, stage, write=stage in stages)))
                        for stage in needed}
            for stage in stages:
                run_stage(stage, part, pictures, journals, args, tallies[stage])
    for stage, tally in tallies.items():
        told = {kind: count for kind, count in tally.items() if count and kind not in (None, "useless")}
        print(f"{stage}: " + (", ".join(f"{count} {kind}" for kind, count in told.items()) or "nothing to do"))
        if tally["failed"] and not tally["ok"]:
            problems.append(f"{stage}: every picture failed: {args.out / 'journals'} has the reasons")
    for problem in problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


# ---- export and stats --------------------------------------------------------------------------------------


def parts_done(out, stage):
    """The names of the parts that have a journal of a stage, sorted; ValueError if there are no journals."""
    if not (out / "journals").is_dir():
        raise ValueError(f"{out}: holds no journals: run the stages first")
    return sorted(os.path.relpath(path.parent, out / "journals") for path in (out / "journals").rglob(f"{stage}.jsonl"))


def records_of(match, others, settings):
    """The records of a picture: from its line of `match` and [(task, stage, line)] of `refer` and `reason`, if any.

    Semantic records are labels with all their masks; referring and reasoning records have one mask. Instance records
    are the masks with their labels before merging.
    """
    width, height = match["result"]["size"]
    by_mask = {(found["label"], found["annotation_id"]): found for found in match["result"]["kept"]}

    def record(task, name, phrase, found, segmentation, *stages):
        return {"id": f"{match['id']}:{task}:{name}", "image": match["image"], "width": width, "height": height,
                "task": task, "label": found[0]["label"], "phrase": phrase,
                "annotation_ids": [one["annotation_id"] for one in found], "segmentation": segmentation,
                "score": min(one["score"] for one in found),
                "provenance": {stage: settings.get(stage) for stage in ("labels", "detect", "match", *stages)}}

    for label in sorted({found["label"] for found in match["result"]["kept"]}):
        found = [one for one in match["result"]["kept"] if one["label"] == label]
        merged = match["result"]["merged"].get(label, found[0]["segmentation"])
        yield record("semantic", label, label, found, merged)
        for one in found:
            yield record("instance", f"{one['annotation_id']}:{label}", label, [one], one["segmentation"])
    for task, stage, line in others:
        for entry in line["result"]["kept"]:
            one = by_mask[entry["label"], entry["annotation_id"]]
            yield record(task, f"{entry['annotation_id']}:{entry['label']}", entry["expression"], [one],
                         one["segmentation"], "entities", stage)


def export(args):
    """Write train.jsonl, val.jsonl and the instances of each, from what all parts have finished. Memory: one part.

    All lines of a picture are in one split. Nothing in them depends on the order in which answers came.
    """
    parts, count, files = parts_done(args.out, "match"), Counter(), {}
    settings = read_settings(args.out)
    with ExitStack() as stack:
        for name in ("train", "val", "instances-train", "instances-val"):
            temporary = stack.enter_context(whole(args.out / f"{name}.jsonl"))
            files[name] = stack.enter_context(open(temporary, "w"))
        for part in tqdm(parts, desc="export", unit=" parts"):
            match, refer, reason = (Journal(args.out, part, stage) for stage in ("match", "refer", "reason"))
            for key in sorted(filter(match.good, match.places)):
                place = int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8]) / 2**64  # a hash never changes
                split = "val" if place < args.val_share else "train"
                others = [(task, stage, journal.read(key)) for task, stage, journal in
                          (("referring", "refer", refer), ("reasoning", "reason", reason)) if journal.good(key)]
                for record in records_of(match.read(key), others, settings):
                    name = f"instances-{split}" if record["task"] == "instance" else split
                    files[name].write(json.dumps(record) + "\n")
                    count[f"{split} {record['task']}"] += 1
            for journal in (match, refer, reason):
                journal.close()
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(count.items())) or "no records"
    print(f"export: wrote {', '.join(f'{name}.jsonl' for name in files)} in {args.out}: {told}")


def stats(args):
    """Write OUT/stats.json and print the counts: failures by reason, rejects by rule, labels. Memory: one part."""
    numbers, labels = {}, Counter()
    for stage in STAGES:
        count, reasons, rules = Counter(pictures=0, kept=0, requests=0), Counter(), Counter()
        for part in tqdm(parts_done(args.out, stage), desc=f"stats {stage}", unit=" parts", leave=False):
            with closing(Journal(args.out, part, stage)) as journal:
                for record in map(journal.read, journal.places):
                    if record["status"] == "failed":
                        reasons[record["reason"]] += 1
                    result = record["result"] or {"kept": [], "rejected": []}
                    kept = result["kept"]
                    if stage == "match":
                        labels.update(found["label"] for found in kept)
                        kept = {found["label"] for found in kept}  # as its rules are on labels
                    rules.update(rule for _, rule in result["rejected"])
                    count.update(pictures=1, kept=len(kept), requests=record["requests"])
        judged = count["kept"] + rules.total()
        rejected = {rule: {"count": n, "rate": n / judged} for rule, n in rules.most_common()}
        numbers[stage] = {**count, "failed": dict(reasons.most_common()), "rejected": rejected}
        print(f"{stage:9}{count['pictures']:9} pictures {reasons.total():7} failed {count['kept']:9} kept",
              *(f"{rule['count']} {name} ({rule['rate']:.1%})" for name, rule in rejected.items()), sep="  ")
    write_json(args.out / "stats.json", {**numbers, "labels_of_masks": dict(labels.most_common())})


# ---- python annotate.py STAGE ------------------------------------------------------------------------------

_WALK = {"input", "shard", "num_shards", "retry_failed"}
_VLM = _WALK | {"vlm_url", "vlm_model", "max_side", "concurrency"}
_DETECT = _WALK | {"detector_url", "detector_model", "concurrency"}
# the flags that a command reads besides --out
READS = {"labels": _VLM, "detect": _DETECT, "match": _WALK, "entities": _VLM, "refer": _VLM, "reason": _VLM,
         "all": _VLM | _DETECT, "export": {"val_share"}, "stats": set()}


def work(args):
    """Look at every value, then run what the command line asks for; returns the exit code."""
    missing = [f"--{name.replace('_', '-')}" for name in ("input", "vlm_url", "vlm_model", "detector_url")
               if name in READS[args.stage] and getattr(args, name) is None]
    if missing:
        raise BadUsage(f"{args.stage} needs {' '.join(missing)}")
    for name, url in (("--vlm-url", args.vlm_url), ("--detector-url", args.detector_url)):
        if url is not None and not re.match("https?://[^/@]+(/|$)", url):
            raise BadUsage(f"{name} {url.split('@')[-1]}: expected http://HOST:PORT/... (keys go into the environment)")
    for name, low, high in (("num_shards", 1, 10**6), ("shard", 0, args.num_shards - 1), ("concurrency", 1, 10**4),
                            ("max_side", 0, 10**6), ("val_share", 0, 1)):
        if not low <= getattr(args, name) <= high:
            raise BadUsage(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {low} to {high}")
    if args.stage in ("export", "stats"):
        return (export if args.stage == "export" else stats)(args)
    if args.vlm_url is not None:
        address = args.vlm_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        args.vlm = Server(address, "VLM_API_KEY", args.concurrency)
    if args.detector_url is not None:
        args.detector = Server(args.detector_url, "DETECTOR_API_KEY", args.concurrency)
    return annotate(args, tuple(STAGES) if args.stage == "all" else (args.stage,))


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data or a server that is away, 2 for bad usage."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("stage", choices=READS, help="what to run, as above")
    add("--input", type=Path, metavar="PATH", help="an SA-1B .tar, or a folder of such archives or of pictures, each "
        "with NAME.json beside it: SA-1B's format, or any with COCO run-length masks")
    add("--out", type=Path, metavar="DIR", required=True, help="folder of the journals and the export")
    add("--vlm-url", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    add("--vlm-model", metavar="NAME", help="model to ask for there; recorded in the provenance")
    add("--detector-url", metavar="URL", help="zero-shot-object-detection endpoint, the whole address")
    add("--detector-model", metavar="NAME", default="grounding-dino", help="name to record (default: grounding-dino)")
    add("--concurrency", type=int, default=64, metavar="N", help="requests under way (default: 64)")
    add("--max-side", type=int, default=0, metavar="PX", help="longest side of pictures for the VLM; larger ones are "
        "made small (default: 0, files are sent as they are)")
    add("--shard", type=int, default=0, metavar="i", help="this process's share of the parts, from 0 (default: 0)")
    add("--num-shards", type=int, default=1, metavar="n", help="how many shares there are (default: 1)")
    add("--retry-failed", action="store_true", help="do the pictures that failed again, too")
    add("--val-share", type=float, default=0.005, metavar="P", help="share of the pictures that export puts into "
        "val.jsonl (default: 0.005; paper: not stated)")
    args = parser.parse_args(argv)
    parser.check_read(args, args.stage, {"stage", "out", "help", *READS[args.stage]})
    return parser.run(work, args, stopped="stopped: run this again to go on")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a run that was stopped does not wait for the answers that are under way
