"""annotate.py against stub servers that speak the real schemas, know the truth, and misbehave when told to.

`python tests/test_annotate.py` prints the longer measurements: 300 noisy scenes, throughput, memory.
"""

import base64
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import types
from collections import Counter, defaultdict
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import annotate
from annotate import clean_labels, match, names_object, normal_label, outline
from data import load_dataset, rle_decode, rle_encode
from scenes import WORLDS, draw_scene, scene_phrases

FIXTURE = Path(__file__).parent / "fixtures" / "sa1b"

# ----------------------------------------------------------------------------------------------------------
# a world that the stubs know: pictures, masks, labels, expressions


class Thing:
    """One object: its label, mask and expression; `fits`: the expressions that are true of it."""

    def __init__(self, label, mask, id, expression=None, fits=()):
        self.label, self.mask, self.id, self.expression = label, mask, id, expression
        self.fits = set(fits) | {expression}
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        self.box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        self._line = None

    @property
    def line(self):
        """The outline by brute force: every disk offset, then every pixel's four neighbours."""
        if self._line is None:
            self._line = slow_outline(self.mask)
        return self._line


def slow_outline(mask):
    height, width = mask.shape
    grown = np.zeros((height + 80, width + 80), bool)
    for dy in range(-20, 21):
        for dx in range(-20, 21):
            if dy * dy + dx * dx <= 400:
                grown[40 + dy : 40 + dy + height, 40 + dx : 40 + dx + width] |= mask
    inside = np.zeros((height + 2, width + 2), bool)
    inside[1:-1, 1:-1] = grown[40:-40, 40:-40]
    neighbours = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return inside[1:-1, 1:-1] & ~neighbours


class World:
    """Pictures by the hash of their file and by their pixels, each with its things."""

    def __init__(self):
        self.things, self.pixels, self.by_hash = {}, {}, {}

    def add(self, key, content, things):
        self.things[key] = things
        self.pixels[key] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        self.by_hash[hashlib.sha256(content).hexdigest()] = key

    def key_of(self, content):
        return self.by_hash[hashlib.sha256(content).hexdigest()]

    def marked(self, content, color):
        """(picture, thing) of a picture with a line; only a line that is right to the pixel is found."""
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        for key, original in self.pixels.items():
            if original.shape == pixels.shape:
                for thing in self.things[key]:
                    drawn = original.copy()
                    drawn[thing.line] = color
                    if np.array_equal(drawn, pixels):
                        return key, thing
        raise AssertionError("a marked picture that is nobody's")

    def labels(self, key):
        return list(dict.fromkeys(thing.label for thing in self.things[key]))


def sa1b_json(key, size, masks):
    """SA-1B's own format; masks: {id: bool (H, W)}."""
    annotations = []
    for id, mask in masks.items():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]), int(rows[-1] - rows[0])]
        annotations.append({"id": id, "segmentation": rle_encode(mask), "bbox": box, "area": int(mask.sum())})
    image = {"image_id": 1, "width": size[0], "height": size[1], "file_name": f"{key}.jpg"}
    return json.dumps({"image": image, "annotations": annotations})


def scenes_world(folder, count, seed=0):
    """Drawn scenes as an SA-1B folder: the shapes' masks, and nameless ones besides."""
    world, folder = World(), Path(folder)
    folder.mkdir(parents=True)
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        picture, owner, objects = draw_scene(rng, WORLDS["scenes"])
        height, width = owner.shape
        seen = [i for i in range(len(objects)) if (owner == i).sum() > 60]
        for i, shape in enumerate(objects):
            rows, columns = np.nonzero(owner == i)
            shape.area = len(rows)
            if len(rows):
                shape.box = (columns.min(), rows.min(), columns.max(), rows.max())
        fits = defaultdict(set)
        if len(seen) == len(objects):
            for group in scene_phrases(objects, height, width).values():
                for phrase, _, _, indices in group:
                    fits[phrase] |= set(indices)
        masks, things = {}, []
        for i in seen:
            masks[1000 * n + i] = owner == i
            mine = sorted(phrase for phrase in fits if i in fits[phrase])
            unique = [p for p in mine if len(fits[p]) == 1 and objects[i].kind in p.split()]
            default = f"the {objects[i].color} {objects[i].kind}"
            things.append(Thing(objects[i].kind, owner == i, 1000 * n + i, unique[0] if unique else default, mine))
        masks[1000 * n + 500] = owner < 0
        masks[1000 * n + 501] = np.arange(width)[None, :] < width // 2 + np.zeros((height, 1))
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        (folder / f"sa_{n}.jpg").write_bytes(buffer.getvalue())
        (folder / f"sa_{n}.json").write_text(sa1b_json(f"sa_{n}", (width, height), masks))
        world.add(f"sa_{n}", buffer.getvalue(), things)
    return world


def fixture_world():
    """The SA-1B fixture: three pictures, two in an archive; every mask gets a label of ours."""
    import tarfile

    world, masks = World(), np.load(FIXTURE / "masks.npz")
    names = ["lamp", "cup", "lamp", "sky", "dog", "chair"]
    for image in json.loads((FIXTURE / "expected.json").read_text())["images"]:
        stem = Path(image["image"]).stem
        if image["shard"].endswith(".tar"):
            with tarfile.open(FIXTURE / image["shard"]) as archive:
                content = archive.extractfile(f"./{stem}.jpg").read()
        else:
            content = (FIXTURE / image["shard"] / f"{stem}.jpg").read_bytes()
        folder = image["shard"].removesuffix(".tar").rstrip("/")
        things = [Thing(names[i], masks[a["mask"]] > 0, a["id"], f"the {names[i]} number {i}")
                  for i, a in enumerate(image["annotations"])]  # fmt: skip
        world.add(f"{folder}/{stem}", content, things)
    return world


# ----------------------------------------------------------------------------------------------------------
# the stubs


class Stub(ThreadingHTTPServer):
    """Both servers in one: /v1/chat/completions (OpenAI) and /detect (Hugging Face zero-shot-object-detection).

    answer(name, image bytes, text) gives the VLM's answers, boxes(image bytes, labels) the detector's. `fault` gets
    (kind, picture key or None, number of the request for that unit); it returns None for a right answer, or "drop",
    one of COVERS, or what Handler.reply takes.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(self, world):
        super().__init__(("127.0.0.1", 0), Handler)
        self.world, self.fault, self.delay = world, lambda kind, key, n: None, 0
        self.asked, self.lock, self.healthy = Counter(), threading.Lock(), True
        self.bodies, self.headers, self.under_way, self.most = [], [], 0, 0
        self.rng, self.errors, self.second = random.Random(0), [], threading.Event()
        self.second.set()  # cleared by a test in which the first request waits until a second one is there
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a killed client is no news
            self.errors.append(sys.exc_info()[1])
            super().handle_error(request, client_address)

    def flags(self, *more):
        return ["--vlm-url", f"{self.url}/v1", "--vlm-model", "stub-vlm", "--detector-url", f"{self.url}/detect",
                "--wait", "0.01", "--patience", "5", "--concurrency", "8", *map(str, more)]  # fmt: skip

    # the truth
    def answer(self, name, content, text):
        world = self.world
        if name == "labels":
            return {"labels": world.labels(world.key_of(content))}
        if name == "entities":
            return {"entities": [label for label in world.labels(world.key_of(content)) if label != "sky"]}
        if name == "expression":
            return {"expression": world.marked(content, (0, 255, 0))[1].expression}
        if name == "verify":
            expression = re.search("^Expression: (.*)$", text, re.MULTILINE)[1]
            return {"fits": expression in world.marked(content, (255, 128, 0))[1].fits}
        label = re.search("There is one (.*) in this picture", text)[1]
        return {"expression": f"what {len(label)} people think of on a {world.key_of(content)[-1]} day"}

    def boxes(self, content, labels):
        things = enumerate(self.world.things[self.world.key_of(content)])
        return [box_item(thing.label, thing.box, 0.9 - 0.01 * i) for i, thing in things if thing.label in labels]


def box_item(label, box, score=0.5):
    """One entry of the zero-shot-object-detection answer."""
    return {"score": score, "label": label, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box))}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def reply(self, status, value, headers=(), cut=0):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers:
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) - cut])
        if cut:
            self.close_connection = True

    def do_GET(self):
        if self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": "stub-vlm", "object": "model"}]})
        elif self.path == "/health":
            self.reply(200 if self.server.healthy else 503, b"")
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self):
        stub = self.server
        with stub.lock:
            stub.under_way += 1
            stub.most = max(stub.most, stub.under_way)
            if stub.under_way > 1:
                stub.second.set()
        try:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if len(content) == int(self.headers["Content-Length"]):  # else the client was killed
                self.answer(stub, content)
        finally:
            with stub.lock:
                stub.under_way -= 1

    def answer(self, stub, content):
        body = json.loads(content)
        stub.headers.append(dict(self.headers))
        stub.second.wait(30)
        if stub.delay:
            time.sleep(stub.rng.random() * stub.delay)
        if self.path == "/detect":
            kind, text = "detect", ""
            image = base64.b64decode(body["inputs"], validate=True)
            labels = body["parameters"]["candidate_labels"]
        else:
            assert self.path == "/v1/chat/completions" and body["model"] == "stub-vlm"
            form = body["response_format"]
            assert form["type"] == "json_schema" and form["json_schema"]["strict"]
            kind = form["json_schema"]["name"]
            (message,) = body["messages"]
            picture, words = message["content"]
            text = words["text"]
            image = base64.b64decode(picture["image_url"]["url"].partition(";base64,")[2], validate=True)
        key = stub.world.by_hash.get(hashlib.sha256(image).hexdigest())
        with stub.lock:
            stub.asked[kind, key] += 1
            number = stub.asked[kind, key]
            stub.bodies.append((kind, body))
        fault = stub.fault(kind, key, number)
        cover = COVERS.get(fault, "{}") if fault is None or isinstance(fault, str) else None
        if cover and fault != "drop":
            value = stub.boxes(image, labels) if kind == "detect" else stub.answer(kind, image, text)
            if kind == "detect":
                return self.reply(200, value)
            return self.reply(200, chat(cover.replace("{}", json.dumps(value))))
        if fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(2)
        return self.reply(*fault)


def chat(content, finish="stop", **message):
    """A chat completion with one choice."""
    message = {"role": "assistant", "content": content, "refusal": None} | message
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "stub-vlm",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "stop_reason": None}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}  # fmt: skip


# what is around the right answer, and must not matter
COVERS = {"fenced": "```json\n{}\n```", "prose": "Sure! Here you are:\n\n{}\n\nI hope this helps {you}."}
OVERFLOW = (400, {"error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 9",
                            "type": "BadRequestError", "param": None, "code": 400}})  # fmt: skip


@pytest.fixture
def stubs():
    """Starts stubs, and stops them after the test."""
    started = []

    def start(world):
        started.append(Stub(world))
        return started[-1]

    yield start
    for stub in started:
        stub.shutdown()
        stub.server_close()
        assert stub.errors == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of six scenes and their world."""
    folder = tmp_path_factory.mktemp("scenes") / "in"
    return folder, scenes_world(folder, 6)


def annotate_all(stage, source, out, *flags):
    return annotate.main([stage, "--input", str(source), "--out", str(out), *map(str, flags)])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def journal(out, stage):
    """{picture: record} of a stage of an unsharded run; no picture may be there twice."""
    records = lines(Path(out) / f"{stage}.0-of-1.jsonl")
    assert len({r["id"] for r in records}) == len(records)
    return {r["id"]: r for r in records}


# ----------------------------------------------------------------------------------------------------------
# matching


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    area = lambda box: max(box[2] - box[0], 0) * max(box[3] - box[1], 0)  # noqa: E731
    union = area(a) + area(b) - inter
    return inter / union if union > 0 else 0.0


def slow_match(detections, masks, share):
    """The rules of `match`, one after the other, with loops."""
    candidates = []
    for label in {d["label"] for d in detections}:
        boxes = [d for d in detections if d["label"] == label]
        if len(boxes) > 4:
            continue
        floor = 0.85 if len(boxes) == 1 else 0.9
        near = [m for m in range(len(masks)) if any(slow_iou(d["box"], masks[m]) > floor for d in boxes)]

        def larger(a, b):
            size = [(masks[m][2] - masks[m][0]) * (masks[m][3] - masks[m][1]) for m in (a, b)]
            return size[0] > size[1] or size[0] == size[1] and a < b

        left = [m for m in near if not any(larger(o, m) and slow_iou(masks[o], masks[m]) > 0.97 for o in near)]
        chosen = {}
        for d in boxes:
            best = None
            for m in left:
                if best is None or slow_iou(d["box"], masks[m]) > slow_iou(d["box"], masks[best]):
                    best = m
            if best is None or not d["score"] > 0.3 or not slow_iou(d["box"], masks[best]) > floor:
                break
            chosen.setdefault(best, []).append((d["score"], slow_iou(d["box"], masks[best])))
        else:
            chosen = {m: max(values) for m, values in chosen.items()}
            score, iou = (sum(v[k] for v in chosen.values()) / len(chosen) for k in (0, 1))
            candidates.append((-score, -iou, label, chosen))
    result, used = [], set()
    for _, _, label, chosen in sorted(candidates, key=lambda c: c[:3]):
        if share or not used & set(chosen):
            used |= set(chosen)
            result += [(label, m, *values) for m, values in chosen.items()]
    return sorted(result)


def random_case(rng):
    """Boxes near masks, near twins among the masks, scores and IoU around the thresholds."""
    masks, detections = [], []
    for _ in range(rng.randint(0, 4)):
        x, y, w, h = rng.randint(0, 60), rng.randint(0, 60), rng.randint(20, 120), rng.randint(20, 120)
        masks.append([x, y, x + w, y + h])
        while rng.random() < 0.4:
            masks.append([v + rng.choice((0, 0, 0, 1, -1, 2)) for v in masks[-1]])
    for _ in range(rng.randint(0, 7)):
        base = rng.choice(masks) if masks and rng.random() < 0.9 else [5, 5, 50, 50]
        detections.append({"label": rng.choice("abc"), "score": rng.choice((0.2, 0.3, 0.31, 0.5, 0.5, 0.8)),
                           "box": [v + rng.choice((0, 0, 0, 1, -1, 3)) for v in base]})  # fmt: skip
    return detections, masks


def test_match_is_the_brute_force_of_its_rules():
    rng, filled = random.Random(0), 0
    for n in range(10_000):
        detections, masks = random_case(rng)
        expected = slow_match(detections, masks, share=n % 4 == 0)
        assert match(detections, np.array(masks).reshape(-1, 4), share=n % 4 == 0) == expected, (detections, masks)
        if n % 5 == 0:  # in whatever order they come
            rng.shuffle(detections)
            assert match(detections, masks, share=n % 4 == 0) == expected
        filled += bool(expected)
    assert filled > 2000


def detection(label, box, score=0.6):
    return {"label": label, "score": score, "box": box}


def test_match_rules_one_by_one():
    square, other = [0, 0, 100, 100], [200, 0, 300, 100]
    assert match([detection("a", square)], [other, square]) == [("a", 1, 0.6, 1.0)]
    assert match([detection("a", square, 0.3)], [square]) == []  # above, not at
    assert match([detection("a", [0, 0, 100, 86])], [square]) == [("a", 0, 0.6, 0.86)]
    assert match([detection("a", [0, 0, 100, 85])], [square]) == []
    # with two boxes 0.86 is not enough, and the good one falls, too
    assert match([detection("a", other), detection("a", [0, 0, 100, 86])], [square, other]) == []
    assert [m for _, m, *_ in match([detection("a", square), detection("a", other)], [square, other])] == [0, 1]
    assert len(match([detection("a", [200 * i, 0, 200 * i + 90, 90]) for i in range(4)],
                     [[200 * i, 0, 200 * i + 90, 90] for i in range(5)])) == 4  # fmt: skip
    assert match([detection("a", square)] * 5, [square]) == []
    # whole and part: the box is the part's, the whole is taken
    assert match([detection("a", [0, 0, 100, 98])], [[0, 0, 100, 98], square]) == [("a", 1, 0.6, 0.98)]
    assert match([detection("a", [0, 0, 100, 96])], [[0, 0, 100, 96], square]) == [("a", 0, 0.6, 1.0)]
    # one mask, two labels
    both = [detection("a", square, 0.5), detection("b", square, 0.7)]
    assert match(both, [square]) == [("b", 0, 0.7, 1.0)]
    assert [label for label, *_ in match(both, [square], share=True)] == ["a", "b"]
    assert match([], np.zeros((0, 4))) == match([], [square]) == match(both, np.zeros((0, 4))) == []


def test_why_a_label_fell():
    square = [0, 0, 100, 100]
    detections = [detection("many", square)] * 5 + [detection("weak", square, 0.2), detection("off", [0, 0, 9, 9]),
                  detection("x", square), detection("y", square, 0.4)]  # fmt: skip
    matches, rejected = annotate.match_or_reject(detections, [square])
    assert [m[0] for m in matches] == ["x"]
    assert rejected == [["many", "too_many_boxes"], ["off", "low_iou"], ["weak", "low_score"], ["y", "mask_taken"]]


# ----------------------------------------------------------------------------------------------------------
# words


@pytest.mark.parametrize("text,label", [
    ("Dogs", "dog"), ("a dog.", "dog"), ("The Traffic Lights", "traffic light"),
    ("bottles of water", "bottle of water"), ("glasses", "glasses"), ("bus", "bus"),
    ("buses", "bus"), ("people", "person"), ("grass", "grass"),
    ("men with hats", "man with hats"), ("two potted plants", "potted plant"), ("boxes", "box"), ("cherries", "cherry"),
    ("Café table", "cafe table"), ("t-shirts", "t-shirt"), ("wine glass", "wine glass"), ("benches!", "bench"),
    ("cactus", "cactus"), ("the", ""), ("...", ""), ("leaves", "leaf"), ("houses", "house"), ("shoes", "shoe"),
    ("tennis racket", "tennis racket"), ("dog’s bowls", "dog bowl"), ("ＤＯＧ", "dog"), ("potatoes", "potato"),
])  # fmt: skip
def test_normal_label(text, label):
    assert normal_label(text) == label
    assert normal_label(label) == label


def test_clean_labels_keeps_ten_and_says_why_not():
    words = ["Dogs", "a dog", "dog", "background", "猫", "very small red racing car", ""]
    words += [f"thing{c}x" for c in "abcdefghij"]
    kept, rejected = clean_labels(words)
    assert kept == ["dog", *(f"thing{c}x" for c in "abcdefghi")]
    rules = dict((text, rule) for text, rule in rejected)
    assert rules == {"a dog": "duplicate", "dog": "duplicate", "background": "no_object", "猫": "no_english_word",
                     "": "no_english_word", "very small red racing car": "too_long", "thingjx": "too_many"}  # fmt: skip


@pytest.mark.parametrize("expression,label,named", [
    ("what barks at the postman", "dog", False), ("the Dogs of the house", "dog", True),
    ("man's best friend", "dog", False), ("the puppy by the door", "dog", True), ("the dog's place", "dog", True),
    ("what a driver sits in", "red car", False),
    ("the red thing that drives", "red car", True), ("an automobile", "red car", True),
    ("many children", "child", True),
    ("where fire trucks get water", "fire hydrant", True), ("it tells when to cross", "traffic light", False),
    ("what shows trafficlight colors", "traffic light", True), ("glasses to drink from", "glass", True),
    ("what one looks through", "glasses", False), ("boxes of all kinds", "box", True),
    ("a person of the law", "people", True), ("keeps rain off", "umbrella of the man", False),
])  # fmt: skip
def test_reasoning_must_not_name_the_object(expression, label, named):
    assert names_object(expression, label) == named


@pytest.mark.parametrize("expression,label,fault", [
    ("the dog on the left", "dog", None), ("the green car", "car", None),
    ("the dog outlined in green", "dog", "mentions_marking"), ("the highlighted cup", "cup", "mentions_marking"),
    ("the car with the green line around it", "car", "mentions_marking"),
    ("左边的狗", "dog", "not_english"), ("!!!", "dog", "not_english"), ("a dog\ud800", "dog", "not_english"),
    ("very " * 41 + "old dog", "dog", "too_long"),
    ("the road marking on the left", "road marking", None),
])  # fmt: skip
def test_expression_faults(expression, label, fault):
    assert annotate.expression_fault(expression, label) == fault


def test_an_expression_said_twice_is_dropped_for_both():
    found = [{"expression": e} for e in ("The red dog", "the  red-dog", "a cat")]
    assert annotate.split_duplicates(found) == (found[2:], found[:2])


# ----------------------------------------------------------------------------------------------------------
# answers


GOOD, LONG = '{"labels": ["a", "b"]}', json.dumps({"labels": ["x" * 81]})


@pytest.mark.parametrize("answer,expected", [
    (chat(GOOD), ["a", "b"]), (chat(f"```json\n{GOOD}\n```"), ["a", "b"]), (chat('{"labels": []}'), []),
    (chat(f"Here {{it}} is: {GOOD} {GOOD}"), ["a", "b"]), (chat(GOOD[:-4]), "no_json"),
    (chat(GOOD, finish="length"), "finish_length"),
    (chat(GOOD, finish="content_filter"), "finish_content_filter"), (chat(None), "wrong_response"),
    (chat(None, refusal="no"), "refused"), (chat("I'm sorry, but I can't help with that."), "refused"),
    (chat('{"labels": "a"}'), "wrong_schema"), (chat('{"labels": [1]}'), "wrong_schema"),
    (chat('{"label": ["a"]}'), "wrong_schema"), (chat('{"labels": ["a"], "more": 1}'), "wrong_schema"),
    (chat(LONG), "wrong_schema"), (chat("[]"), "no_json"), (chat("{" * 3000), "no_json"), ([], "wrong_response"),
    ({"choices": []}, "wrong_response"), ({"error": "x"}, "wrong_response"),
])  # fmt: skip
def test_read_answer(answer, expected):
    log = {"usage": {}, "raw": []}
    key, schema, _ = annotate.ANSWERS["labels"]
    if isinstance(expected, list):
        assert annotate.read_answer(answer, key, schema, log) == expected
        assert log["usage"] == {"prompt_tokens": 7, "completion_tokens": 3} and len(log["raw"]) == 1
    else:
        with pytest.raises(annotate.Failure) as caught:
            annotate.read_answer(answer, key, schema, log)
        assert caught.value.reason == expected


@pytest.mark.parametrize("value,good", [("the cup", True), ("", False), (" ", False), (3, False), ("x" * 301, False),
                                        ("I'm sorry, I cannot help", False)])  # fmt: skip
def test_read_expression(value, good):
    key, schema, _ = annotate.ANSWERS["expression"]
    try:
        result = annotate.read_answer(chat(json.dumps({key: value})), key, schema, {"usage": {}, "raw": []})
    except annotate.Failure:
        result = None
    assert (result == value) == good


@pytest.mark.parametrize("value", [1, "true", None])
def test_fits_is_a_boolean(value):
    key, schema, _ = annotate.ANSWERS["verify"]
    with pytest.raises(annotate.Failure, match="wrong_schema"):
        annotate.read_answer(chat(json.dumps({key: value})), key, schema, {"usage": {}, "raw": []})


def test_read_boxes_cuts_and_checks():
    tiny = (1, 1, 3, 3)
    answer = [box_item("cup", (-5, 2, 50, 200)), box_item("Cup.", tiny), box_item("cu", tiny),
              *(box_item("cup", box) for box in ((101, 0, 120, 9), (9, 9, 9, 12), (9, 9, 2, 12)))]  # fmt: skip
    kept, rejected = annotate.read_boxes(answer, ["cup"], (100, 80))
    assert [k["box"] for k in kept] == [[0, 2, 50, 80], [1, 1, 3, 3]] and {k["label"] for k in kept} == {"cup"}
    assert [rule for _, rule in rejected] == ["unknown_label", *["outside_or_empty"] * 3]
    for bad in ({"error": "x"}, {}, [box_item("cup", (1, 2, 3))], [box_item("cup", (1, 2, 3, float("nan")))], 7,
                [box_item("cup", tiny, 2)], [box_item(None, tiny)], [[box_item("cup", tiny)]]):  # fmt: skip
        with pytest.raises(annotate.Failure, match="wrong_schema"):
            annotate.read_boxes(bad, ["cup"], (100, 80))


def test_retry_after_is_seconds_or_a_date(monkeypatch):
    assert annotate.retry_after("7") == 7 and annotate.retry_after("-3") == annotate.retry_after(None) == 0
    assert annotate.retry_after("soon") == annotate.retry_after("nan") == 0 and annotate.retry_after("99999") == 300
    noon = types.SimpleNamespace(now=lambda zone: datetime(2026, 1, 1, 12, tzinfo=zone))
    monkeypatch.setattr(annotate, "datetime", noon)
    assert annotate.retry_after("Thu, 01 Jan 2026 12:01:00 GMT") == 60


# ----------------------------------------------------------------------------------------------------------
# lines on pictures


@pytest.mark.parametrize("seed", range(6))
def test_outline_is_the_rim_of_the_mask_dilated_by_20_pixels(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((90, 140), bool)
    x, y = rng.integers(0, 110), rng.integers(0, 70)  # often within 20 px of the border
    mask[y : y + rng.integers(1, 40), x : x + rng.integers(1, 60)] = True
    mask &= rng.random(mask.shape) < (1, 0.05)[seed % 2]
    mask[rng.integers(0, 90), rng.integers(0, 140)] = True
    assert np.array_equal(outline(mask), slow_outline(mask))
    thick, grown = outline(mask, 4), outline(mask, 200)
    assert not (thick & ~grown).any() and not (outline(mask) & ~thick).any() and thick.sum() > outline(mask).sum()
    assert np.array_equal(grown & mask, mask)  # thick enough, it is the dilated mask itself


def test_draw_outline_changes_the_line_and_nothing_else():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (80, 120, 3), np.uint8))
    mask = np.zeros((80, 120), bool)
    mask[30:40, 50:70] = True
    line = slow_outline(mask)
    for color in (annotate.GREEN, annotate.ORANGE):
        drawn = np.asarray(Image.open(io.BytesIO(annotate.encode(annotate.draw_outline(picture, line, color))[0])))
        assert (drawn[line] == color).all() and np.array_equal(drawn[~line], np.asarray(picture)[~line])
    assert annotate.GREEN == (0, 255, 0) and annotate.ORANGE == (255, 128, 0)
    assert not outline(np.zeros((5, 5), bool)).any()


# ----------------------------------------------------------------------------------------------------------
# input


def test_the_fixture_is_read_from_archive_and_folder():
    expected = json.loads((FIXTURE / "expected.json").read_text())["images"]
    masks = np.load(FIXTURE / "masks.npz")
    found = {p.key: p for p in annotate.pictures(FIXTURE)}
    assert sorted(found) == ["sa_000000/sa_1", "sa_000000/sa_37", "sa_000020/sa_223750"]
    for image in expected:
        (picture,) = [p for p in found.values() if p.key.endswith("/" + Path(image["image"]).stem)]
        content, kind, size = annotate.original(picture)
        assert size == (image["width"], image["height"]) and kind == "image/jpeg" and content == picture.read("picture")
        ids, boxes, rles = annotate.read_annotations(picture, size)
        assert ids == [a["id"] for a in image["annotations"]]
        for annotation, box, rle in zip(image["annotations"], boxes, rles):
            x, y, w, h = annotation["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]  # the tight box, though the file's is one less
            assert np.array_equal(rle_decode(rle), masks[annotation["mask"]] > 0)
    assert [p.key for p in annotate.pictures(FIXTURE / "sa_000000.tar")] == ["sa_000000/sa_1", "sa_000000/sa_37"]
    assert [p.key for p in annotate.pictures(FIXTURE / "sa_000020")] == ["sa_223750"]


def test_boxes_are_measured_where_the_file_has_none(tmp_path):
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:5] = True
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    counts = [8, 2, 4, 2, 4, 2, 4, 2, 20]
    (tmp_path / "a.json").write_text(json.dumps([{"segmentation": {"size": [6, 8], "counts": counts}}]))
    (picture,) = annotate.pictures(tmp_path)
    ids, boxes, rles = annotate.read_annotations(picture, (8, 6))
    assert ids == [1] and boxes.tolist() == [[1, 2, 5, 4]] and np.array_equal(rle_decode(rles[0]), mask)


EMPTY = {"size": [6, 8], "counts": [48]}


@pytest.mark.parametrize("text", [
    "", "{", "7", "{}", '{"annotations": 3}', "[[]]", "[" * 99999, *map(json.dumps, (
        [{"segmentation": [[1, 2, 3]]}], [{"segmentation": EMPTY | {"size": [8, 6]}}], [{"segmentation": {"size": 1}}],
        [{"segmentation": EMPTY | {"counts": [9]}}], [{"segmentation": EMPTY, "bbox": 3}],
        [{"segmentation": EMPTY | {"counts": None}}], [{"segmentation": EMPTY, "bbox": [10**400, 1, 1, 1]}],
        [{"id": 1, "segmentation": EMPTY}, {"id": 1, "segmentation": EMPTY}], [{"id": [], "segmentation": EMPTY}],
    )),
], ids=lambda text: text[:40])  # fmt: skip
def test_mask_files_that_are_none(tmp_path, text):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(text)
    (picture,) = annotate.pictures(tmp_path)
    with pytest.raises(annotate.Failure, match="broken_masks"):
        annotate.read_annotations(picture, (8, 6))


def test_rle_union_is_the_union_of_the_pixels():
    rng = np.random.default_rng(0)
    for n in range(300):
        height, width = rng.integers(1, 12, 2)
        masks = [rng.random((height, width)) < rng.choice([0.1, 0.5, 0.95, 1.1]) for _ in range(rng.integers(1, 5))]
        masks = [m for m in masks if m.any()] or [np.ones((height, width), bool)]
        parts = [rle_encode(m) for m in masks]
        if n % 2:  # a plain list, with runs of nothing in it
            ends = np.flatnonzero(np.diff(masks[0].ravel(order="F"), prepend=False)).tolist() + [height * width]
            parts[0]["counts"] = [0, 0, *np.diff(ends, prepend=0).tolist(), 0]
        runs = [annotate.rle_runs(part) for part in parts]
        assert annotate.rle_union(runs, (height, width)) == rle_encode(np.logical_or.reduce(masks))
    for counts in ([12], [5, 0, 7], [3, 3], [13, -1], "0", [0, 13]):
        with pytest.raises(ValueError):
            annotate.rle_runs({"size": [3, 4], "counts": counts})


@pytest.mark.parametrize("length", [1024, 5000, 9000, 9728])
def test_a_cut_archive_gives_what_is_whole_and_a_problem(tmp_path, length):
    content = (FIXTURE / "sa_000000.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:length])
    *found, problem = annotate.pictures(tmp_path)
    assert isinstance(problem, ValueError) and "x.tar" in str(problem)
    for picture in found:
        for kind in ("picture", "masks"):
            try:
                assert picture.read(kind) in content
            except annotate.Failure as failure:
                assert failure.reason in ("unreadable", "no_masks")


def test_pictures_are_sent_as_they_are_unless_they_cannot_be(tmp_path):
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).resize((1000, 600))

    def sent(name, max_side=0, **options):
        base.save(tmp_path / name, **options)
        picture = annotate.Picture("x", name, (tmp_path / name, 0, -1), None)
        content, kind, size = annotate.original(picture, max_side)
        return content == picture.read("picture"), Image.open(io.BytesIO(content)), kind, size

    assert sent("a.jpg")[0] and sent("a.png")[0] and sent("a.jpg", 1000)[0]
    same, image, kind, size = sent("a.jpg", 500)
    assert not same and image.size == (500, 300) and kind == "image/png" and size == (1000, 600)
    exif = Image.Exif()
    exif[0x0112] = 6
    same, image, _, size = sent("turned.jpg", exif=exif)
    assert not same and image.size == size == (600, 1000)
    whole = (tmp_path / "a.jpg").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"GIF"):
        (tmp_path / "b.jpg").write_bytes(broken)
        with pytest.raises(annotate.Failure, match="broken_picture"):
            annotate.original(annotate.Picture("x", "b.jpg", (tmp_path / "b.jpg", 0, -1), None))
    large = Image.fromarray(rng.integers(0, 256, (600, 700, 3), np.uint8))
    assert annotate.encode(large)[1] == "image/jpeg" and annotate.encode(large, 300)[1] == "image/png"


# ----------------------------------------------------------------------------------------------------------
# whole runs


def expected_records(world):
    """What the export must hold when nothing goes wrong, from the truth: {(picture, task, label, ids): phrase}."""
    records = {}
    for key, things in world.things.items():
        for label in world.labels(key):
            mine = [t for t in things if t.label == label]
            if len(mine) > 4:
                continue
            records[key, "semantic", label, tuple(sorted(t.id for t in mine))] = label
            if label == "sky":
                continue
            for t in mine:
                if not any(t.expression in o.fits for o in mine if o is not t):
                    records[key, "referring", label, (t.id,)] = t.expression
    return records


def test_the_fixture_through_all_stages(stubs, tmp_path, capsys):
    world = fixture_world()
    stub = stubs(world)
    assert annotate_all("all", FIXTURE, tmp_path / "out", *stub.flags()) == 0
    exported = lines(tmp_path / "out" / "sa-ovrs.jsonl")
    got = {(r["image"].removesuffix(".jpg"), r["task"], r["label"], tuple(sorted(r["annotation_ids"]))): r["phrase"]
           for r in exported if r["task"] != "reasoning"}  # fmt: skip
    expected = expected_records(world)
    assert got == expected and len(expected) > 10
    assert len({r["id"] for r in exported}) == len(exported)
    for r in exported:
        assert list(r) == ["id", "image", "width", "height", "task", "label", "phrase", "annotation_ids",
                           "segmentation", "score", "provenance"]  # fmt: skip
        things = world.things[r["image"].removesuffix(".jpg")]
        union = np.logical_or.reduce([t.mask for t in things if t.id in r["annotation_ids"]])
        assert np.array_equal(rle_decode(r["segmentation"]), union) and union.shape == (r["height"], r["width"])
        assert r["provenance"]["labels"]["model"] == "stub-vlm" and 0.8 < r["score"] <= 0.9
        assert r["provenance"]["labels"]["prompts"] == [annotate.prompt_version("labels")]
        assert r["provenance"]["detect"]["model"] == "grounding-dino"
        assert ("refer" in r["provenance"]) == (r["task"] == "referring")
    reasoning = [r for r in exported if r["task"] == "reasoning"]
    assert reasoning and all(len(r["annotation_ids"]) == 1 and r["label"] != "lamp" for r in reasoning)
    # one object of its label is not checked, the others are, each against each
    asked = Counter(kind for kind, _ in stub.bodies)
    groups = [[t for t in things if t.label == label] for key, things in world.things.items()
              for label in world.labels(key) if label != "sky"]  # fmt: skip
    assert asked["verify"] == sum(len(g) * (len(g) - 1) for g in groups) > 0
    assert asked["expression"] == sum(map(len, groups))
    assert asked["labels"] == asked["detect"] == asked["entities"] == len(world.things)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["labels"]["pictures"] == 3
    assert stats["match"]["kept"] == sum(task == "semantic" for _, task, _, _ in expected)
    assert stats["labels_of_masks"]["lamp"] == sum(t.label == "lamp" for ts in world.things.values() for t in ts)
    assert Image.open(tmp_path / "out" / "stats.png").size[0] == 640
    # again: nothing is asked, nothing is written
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.suffix == ".jsonl"}
    count = len(stub.bodies)
    assert annotate_all("all", FIXTURE, tmp_path / "out", *stub.flags()) == 0
    assert len(stub.bodies) == count and before == {n: (tmp_path / "out" / n).read_bytes() for n in before}
    assert "referring" in capsys.readouterr().out


def test_the_export_is_a_data_set(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    assert annotate_all("all", folder, tmp_path / "out", *stub.flags()) == 0
    root = tmp_path / "root"
    shutil.copytree(folder, root)
    shutil.copy(tmp_path / "out" / "sa-ovrs.jsonl", root / "sa-ovrs.jsonl")
    dataset = load_dataset("sa-ovrs", "train", root)
    records = lines(root / "sa-ovrs.jsonl")
    assert len(dataset) == len(records) > 20
    for example, record in zip((dataset[i] for i in range(len(dataset))), records):
        things = world.things[record["image"].removesuffix(".jpg")]
        assert (example.id, example.task, example.label) == (record["id"], record["task"], record["label"])
        assert example.phrase == record["phrase"] and example.mask.shape == example.image.size[::-1]
        assert np.array_equal(example.mask, sum(t.mask for t in things if t.id in record["annotation_ids"]) > 0)


# (kind of request, fault, how often, the reason that is recorded or None where it passes or does no harm)
ALWAYS = 10**9
FAULTS = [
    ("labels", OVERFLOW, ALWAYS, "context_overflow"),
    ("labels", (401, {"error": "Unauthorized"}), ALWAYS, "http_401"),
    ("labels", (404, {"object": "error", "message": "The model `x` does not exist", "code": 404}), ALWAYS, "http_404"),
    ("detect", (500, b"<html>Internal Server Error</html>"), ALWAYS, "http_500"),
    ("labels", (200, chat('{"labels": ["circle", "squ')), ALWAYS, "no_json"),
    ("labels", (200, chat("I'm sorry, I can't assist with that request.")), ALWAYS, "refused"),
    ("labels", (200, chat('{"labels": ["dog", "dog", "dog"', finish="length")), ALWAYS, "finish_length"),
    ("detect", "drop", ALWAYS, "connection"),
    ("detect", (200, {"error": "loading"}), ALWAYS, "wrong_schema"),
    ("entities", (200, b'{"id": "chatcmpl-1", "choices": [{"ind'), ALWAYS, "cut_response"),
    ("labels", (200, chat(None, finish="content_filter")), ALWAYS, "finish_content_filter"),
    ("labels", (429, {"error": {"message": "slow down", "code": 429}}, [("Retry-After", "0.05")]), 6, None),
    ("detect", (503, {"error": "loading", "estimated_time": 1.0}), 2, None),
    ("labels", "drop", 1, None),
    ("labels", (500, {"error": {"message": "one bad request", "code": 500}}), 2, None),
    ("labels", "fenced", ALWAYS, None),
    ("entities", "prose", ALWAYS, None),
    ("labels", (200, chat("nonsense")), 1, None),
    ("labels", (200, {"choices": [{}]}), 1, None),
    ("labels", (200, chat('{"labels": ["Circles", "a circle", "the circle."]}')), ALWAYS, None),
    ("detect", (200, []), ALWAYS, None),
]  # fmt: skip


def test_servers_that_misbehave(stubs, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    world = scenes_world(folder, len(FAULTS), seed=3)
    stub = stubs(world)
    assert annotate_all("all", folder, tmp_path / "good", *stub.flags()) == 0

    def fault(kind, key, number):
        if key is None:  # a marked picture, or the one that did not fit and was made smaller
            return OVERFLOW if kind == "labels" else None
        asked, trouble, times, _ = FAULTS[int(key[3:])]
        return trouble if kind == asked and number <= times else None

    stub.fault = fault
    stub.asked.clear()
    assert annotate_all("all", folder, out, *stub.flags("--attempts", 3)) == 0
    stages = list(annotate.STAGES)
    for number, (kind, _, _, reason) in enumerate(FAULTS):
        for stage in stages:  # nothing is lost, nothing is done on top of what failed
            record = journal(out, stage).get(f"sa_{number}")
            if reason and stages.index(stage) > stages.index(kind):
                assert record is None
            else:
                wanted = ("failed", reason) if reason and stage == kind else ("ok", None)
                assert (record["status"], record["reason"]) == wanted, (number, stage, record)
    last = {f"sa_{len(FAULTS) - 2}", f"sa_{len(FAULTS) - 1}"}  # answered, only not as before
    circles = journal(out, "labels")[min(last)]["result"]
    assert circles == {"kept": ["circle"], "rejected": [["a circle", "duplicate"], ["the circle.", "duplicate"]]}
    assert journal(out, "detect")[max(last)]["result"]["kept"] == []
    assert "1 http_401" in capsys.readouterr().out

    # plain resuming leaves failures alone; --retry-failed does them again, and only them
    stub.fault = lambda kind, key, number: None
    stub.bodies.clear()
    assert annotate_all("all", folder, out, *stub.flags()) == 0 and not stub.bodies
    assert annotate_all("all", folder, out, *stub.flags("--retry-failed")) == 0
    assert sum(k == "labels" for k, _ in stub.bodies) == sum(k == "labels" and r is not None for k, _, _, r in FAULTS)
    exports = [[line for line in open(f / "sa-ovrs.jsonl") if json.loads(line)["image"][:-4] not in last]
               for f in (out, tmp_path / "good")]  # fmt: skip
    assert exports[0] == exports[1] and len(exports[0]) > 30


def test_a_too_long_prompt_is_tried_with_a_smaller_picture(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)

    def fault(kind, key, number):
        return OVERFLOW if key else (200, chat('{"labels": ["circle"]}'))  # a picture that was made small has no key

    stub.fault = fault
    assert annotate_all("labels", folder, tmp_path / "out", *stub.flags()) == 0
    assert all(r["status"] == "ok" and r["attempts"] == 2 for r in journal(tmp_path / "out", "labels").values())
    sizes = defaultdict(list)
    for _, body in stub.bodies:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        sizes[image.width > image.height].append(max(image.size))
    originals = sorted(max(p.shape[:2]) for p in world.pixels.values())
    assert sorted(s for group in sizes.values() for s in group) == sorted(originals + [side // 2 for side in originals])


def test_bodies_are_what_the_servers_expect(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    assert annotate_all("all", folder, tmp_path / "out", *stub.flags()) == 0
    for kind, body in stub.bodies:
        if kind == "detect":
            assert set(body) == {"inputs", "parameters"}
            assert all("." not in label for label in body["parameters"]["candidate_labels"])
            continue
        schema = body["response_format"]["json_schema"]["schema"]
        (key,) = schema["required"]
        assert list(schema["properties"]) == [key] and schema["additionalProperties"] is False
        assert {"labels": "labels", "entities": "entities", "expression": "expression", "verify": "fits",
                "reasoning": "expression"}[kind] == key  # fmt: skip
        assert body["temperature"] == 0 and 0 < body["max_tokens"] <= 512


# --- stopping, going on


def killed_after(argv, seconds):
    """Run annotate.main in a forked process and kill -9 it after some seconds; True if it had ended by itself."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent, and would stay held after a kill
        os._exit(annotate.main(argv))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def test_killed_12_times_the_export_is_that_of_the_unbroken_run(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    began = time.monotonic()
    assert annotate_all("all", folder, tmp_path / "whole", *stub.flags()) == 0
    length = time.monotonic() - began
    expected = (tmp_path / "whole" / "sa-ovrs.jsonl").read_bytes()
    alone = len(stub.bodies)
    stub.delay = 0.004
    kills, rounds, rng = 0, 0, random.Random(1)
    while kills < 12:
        out, rounds = tmp_path / f"out{rounds}", rounds + 1
        argv = ["all", "--input", str(folder), "--out", str(out), *stub.flags("--concurrency", 3)]
        stub.bodies.clear()
        here = 0
        while not killed_after(argv, rng.uniform(0.02, 0.5 * length) if kills < 12 else 60):
            kills, here = kills + 1, here + 1
        assert (out / "sa-ovrs.jsonl").read_bytes() == expected
        for stage in annotate.STAGES:
            assert len(journal(out, stage)) == len(world.things)
        # only what was under way at a kill is asked again: three pictures, at most 4 x 4 requests each and a few more
        assert len(stub.bodies) <= alone + here * 3 * 20
        assert not list(out.glob("*.tmp"))


def test_a_torn_line_is_dropped_and_a_damaged_one_is_told(stubs, small, tmp_path, capsys):
    folder, world = small
    stub = stubs(world)
    out = tmp_path / "out"
    assert annotate_all("labels", folder, out, *stub.flags()) == 0
    path = out / "labels.0-of-1.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    count = len(stub.bodies)
    assert annotate_all("labels", folder, out, *stub.flags()) == 0
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines()) and len(stub.bodies) == count + 1
    for damage, message in ((b"{}\n" + whole, "line 1 is damaged"), (whole + whole, "a second time")):
        path.write_bytes(damage)
        assert annotate_all("labels", folder, out, *stub.flags()) == 1
        assert message in capsys.readouterr().err and path.read_bytes() == damage


def test_two_writers_are_refused(stubs, small, tmp_path, capsys):
    folder, world = small
    stub = stubs(world)
    out = tmp_path / "out"
    out.mkdir()
    first = annotate.Journal(out / "labels.0-of-1.jsonl", write=True)
    assert annotate_all("labels", folder, out, *stub.flags()) == 1
    assert "another process writes it" in capsys.readouterr().err and not stub.bodies
    first.append({"id": "a", "status": "failed"})
    first.forget_failures()  # a new file: the lock must be on it, too
    assert annotate_all("labels", folder, out, *stub.flags()) == 1
    first.close()
    assert annotate_all("labels", folder, out, *stub.flags()) == 0


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_together_are_the_whole(stubs, small, tmp_path, shards):
    folder, world = small
    stub = stubs(world)
    assert annotate_all("all", folder, tmp_path / "whole", *stub.flags()) == 0
    whole = (tmp_path / "whole" / "sa-ovrs.jsonl").read_bytes()
    union = []
    for shard in range(shards):
        flags = stub.flags("--shard", shard, "--num-shards", shards)
        assert annotate_all("all", folder, tmp_path / "together", *flags) == 0
        assert annotate_all("all", folder, tmp_path / str(shard), *flags) == 0
        union += (tmp_path / str(shard) / "sa-ovrs.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "together" / "sa-ovrs.jsonl").read_bytes() == whole
    assert sorted(union) == sorted(whole.splitlines(keepends=True)) and len(union) > 20
    sizes = [len(lines(tmp_path / str(s) / f"labels.{s}-of-{shards}.jsonl")) for s in range(shards)]
    assert sum(sizes) == len(world.things)


def test_the_answer_does_not_depend_on_concurrency_or_time(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    exports = []
    for concurrency in (1, 4, 32):
        stub.delay, stub.most = 0.004, 0
        if concurrency > 1:
            stub.second.clear()
        assert annotate_all("all", folder, tmp_path / str(concurrency), *stub.flags("--concurrency", concurrency)) == 0
        exports.append((tmp_path / str(concurrency) / "sa-ovrs.jsonl").read_bytes())
        assert stub.most <= concurrency and (stub.most > 1 or concurrency == 1)
    assert exports[0] == exports[1] == exports[2]


def test_input_is_drawn_only_when_there_is_room():
    drawn, running = [], threading.Semaphore(0)

    def units():
        for n in range(50):
            drawn.append(n)
            yield n

    def job(n):
        running.acquire()
        return n

    results = annotate.in_parallel(job, units(), 4)
    threading.Timer(0.1, lambda: [drawn.append(len(drawn)), running.release()]).start()
    next(results)
    assert drawn.count(4) == 1 and drawn[:5] == [0, 1, 2, 3, 4] and len(drawn) == 5  # four units, then the count 4
    for _ in range(49):
        running.release()
    assert sorted([0, *results]) != [] and len(drawn) == 51


def test_a_job_that_breaks_ends_the_run():
    def job(n):
        return 1 // n

    with pytest.raises(ZeroDivisionError):
        list(annotate.in_parallel(job, range(5), 2))


# --- servers that are away


def test_a_server_that_goes_away_costs_nothing(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    assert annotate_all("labels", folder, tmp_path / "good", *stub.flags()) == 0
    away = threading.Event()

    def fault(kind, key, number):
        if len(stub.bodies) > before + 3 and not away.is_set():
            if stub.healthy:
                stub.healthy = False
                threading.Timer(0.4, lambda: [away.set(), setattr(stub, "healthy", True)]).start()
            return 503, {"error": {"message": "Engine is dead", "code": 503}}
        return None

    before = len(stub.bodies)
    stub.fault = fault
    assert annotate_all("labels", folder, tmp_path / "out", *stub.flags("--concurrency", 2)) == 0
    records, good = journal(tmp_path / "out", "labels"), journal(tmp_path / "good", "labels")
    assert {k: r["result"] for k, r in records.items()} == {k: r["result"] for k, r in good.items()}
    assert away.is_set()
    # while it was away, nearly nothing was asked: 0.4 s at pauses of 10 ms would be forty requests a thread
    assert sum(r["attempts"] for r in records.values()) < len(records) + 12


def test_no_server_at_all_ends_in_one_line(small, tmp_path, capsys):
    folder, _ = small
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
    flags = ["--vlm-url", f"http://127.0.0.1:{port}/v1", "--vlm-model", "m", "--patience", "0.2", "--wait", "0.01"]
    assert annotate_all("labels", folder, tmp_path / "out", *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: http://127.0.0.1") and "no server answers" in error
    assert (tmp_path / "out" / "labels.0-of-1.jsonl").read_bytes() == b""  # nothing is burned


def test_wrong_key_or_model_stops_before_the_work(stubs, small, tmp_path, capsys, monkeypatch):
    folder, world = small
    stub = stubs(world)
    missing = {"error": {"message": "The model `other` does not exist", "code": 404}}
    flags = stub.flags()
    flags[flags.index("stub-vlm")] = "other"
    monkeypatch.setattr(Handler, "answer", lambda self, stub, content: self.reply(404, missing))
    assert annotate_all("labels", folder, tmp_path / "out", *flags) == 1
    assert "--vlm-model other: the server has stub-vlm" in capsys.readouterr().err
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply(401, {"error": "Unauthorized"}))
    assert annotate_all("labels", folder, tmp_path / "out", *flags) == 1
    assert "VLM_API_KEY" in capsys.readouterr().err
    assert (tmp_path / "out" / "labels.0-of-1.jsonl").read_bytes() == b""


def test_a_hundred_failures_in_a_row_stop_the_run(stubs, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    for n in range(130):
        (folder / f"{n}.png").write_bytes(content.getvalue())
        (folder / f"{n}.json").write_text("[]")
    stub = stubs(World())
    stub.fault = lambda kind, key, number: (401, {"error": "Unauthorized"})
    assert annotate_all("labels", folder, tmp_path / "out", *stub.flags()) == 1
    assert "100 requests in a row failed" in capsys.readouterr().err
    assert len(journal(tmp_path / "out", "labels")) < 100


def test_keys_are_sent_and_never_written(stubs, small, tmp_path, capsys, monkeypatch):
    folder, world = small
    stub = stubs(world)
    monkeypatch.setenv("VLM_API_KEY", "sk-secret-vlm")
    monkeypatch.setenv("DETECTOR_API_KEY", "sk-secret-detector")
    stub.fault = lambda kind, key, number: (
        (400, {"error": {"message": f"no sk-secret-{'detector' if kind == 'detect' else 'vlm'} today"}})
        if key in ("sa_1", "sa_2") and (kind == "labels") == (key == "sa_1") else None)  # fmt: skip
    assert annotate_all("all", folder, tmp_path / "out", *stub.flags()) == 0
    keys = {(headers["Authorization"]) for headers in stub.headers}
    assert keys == {"Bearer sk-secret-vlm", "Bearer sk-secret-detector"}
    assert journal(tmp_path / "out", "detect")["sa_2"]["detail"] == "no *** today"
    for path in (tmp_path / "out").iterdir():
        assert b"sk-secret" not in path.read_bytes()
    assert "sk-secret" not in "".join(capsys.readouterr())


# --- broken input, wrong usage


def test_every_broken_picture_is_a_record(stubs, tmp_path, capsys):
    folder = tmp_path / "in"
    world = scenes_world(folder, 6, seed=5)
    stub = stubs(world)
    whole = (folder / "sa_0.jpg").read_bytes()
    (folder / "sa_0.jpg").write_bytes(whole[:300])
    (folder / "sa_1.json").unlink()
    (folder / "sa_2.jpg").unlink()
    (folder / "sa_3.json").write_text("{")
    record = json.loads((folder / "sa_4.json").read_text())
    for annotation in record["annotations"]:
        annotation["segmentation"]["counts"] = "0"
    (folder / "sa_4.json").write_text(json.dumps(record))
    (folder / "z.tar").write_bytes(b"no archive")
    assert annotate_all("all", folder, tmp_path / "out", *stub.flags()) == 1  # the archive is lost
    assert re.search(r"error: .*z\.tar: damaged", capsys.readouterr().err)
    labels, matched = journal(tmp_path / "out", "labels"), journal(tmp_path / "out", "match")
    assert {key: record["reason"] for key, record in labels.items()} == {
        "sa_0": "broken_picture", "sa_1": "no_masks", "sa_2": "no_picture", "sa_3": None, "sa_4": None, "sa_5": None}
    assert {key: record["reason"] for key, record in matched.items()} == {
        "sa_3": "broken_masks", "sa_4": "broken_masks", "sa_5": None}  # fmt: skip
    assert {r["image"] for r in lines(tmp_path / "out" / "sa-ovrs.jsonl")} == {"sa_5.jpg"}


URLS = ["--vlm-url", "http://h/v1", "--vlm-model", "m", "--detector-url", "http://h"]


@pytest.mark.parametrize("stage,flags,message", [
    ("labels", [], "labels needs --vlm-url --vlm-model"), ("detect", [], "detect needs --detector-url"),
    ("all", URLS[:4], "all needs --detector-url"),
    ("all", [*URLS, "--concurrency", "0"], "--concurrency 0: expected at least 1"),
    ("all", [*URLS[:-1], "localhost:9"], "--detector-url localhost:9: expected http://"),
    ("all", [*URLS[:-1], "http://me:secret@h"], "--detector-url h: expected http://"),
    ("all", [*URLS, "--shard", "1"], "--shard and --num-shards go together"),
    ("all", [*URLS, "--shard", "2", "--num-shards", "2"], "--shard 2: expected 0 to 1"),
    ("all", [*URLS, "--timeout", "0"], "--timeout 0.0"), ("match", ["--concurency", "3"], "unrecognized arguments"),
    ("paint", [], "invalid choice: 'paint'"),
])  # fmt: skip
def test_wrong_usage_is_2(small, tmp_path, capsys, stage, flags, message):
    with pytest.raises(SystemExit) as stopped:
        annotate_all(stage, small[0], tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "secret" not in error
    assert not (tmp_path / "out").exists()


def test_another_number_of_shards_is_refused(stubs, small, tmp_path, capsys, monkeypatch):
    folder, world = small
    stub = stubs(world)
    assert annotate_all("labels", folder, tmp_path / "out", *stub.flags()) == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        annotate_all("labels", folder, tmp_path / "out", *stub.flags())
    assert "--num-shards 2" in capsys.readouterr().err
    shutil.copy(tmp_path / "out" / "labels.0-of-1.jsonl", tmp_path / "out" / "labels.0-of-3.jsonl")
    monkeypatch.delenv("RANK")
    assert annotate.main(["export", "--out", str(tmp_path / "out")]) == 1
    assert "different --num-shards" in capsys.readouterr().err


def slurm(**numbers):
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize("environment,expected", [
    ({}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)), (slurm(ID=4, COUNT=10), (4, 10)),
    (slurm(ID=4, COUNT=10, MIN=1), (3, 10)), (slurm(ID=6, COUNT=4, MIN=0, STEP=2), (3, 4)),
])  # fmt: skip
def test_the_shard_comes_from_torchrun_or_slurm(environment, expected):
    assert annotate.shard_from_environment(environment) == expected


def test_a_slurm_array_with_holes_is_refused():
    with pytest.raises(ValueError, match="holes"):
        annotate.shard_from_environment(slurm(ID=7, COUNT=2, MIN=3))


def test_bad_paths_are_1(stubs, tmp_path, capsys):
    stub = stubs(World())
    assert annotate_all("all", tmp_path / "nowhere", tmp_path / "out", *stub.flags()) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert annotate_all("all", tmp_path / "empty", tmp_path / "out", *stub.flags()) == 1
    assert "empty: no pictures" in capsys.readouterr().err
    assert annotate.main(["export", "--out", str(tmp_path / "nowhere")]) == 1
    assert annotate.main(["stats", "--out", str(tmp_path / "empty")]) == 1
    assert "holds no journals" in capsys.readouterr().err


def test_help_and_the_command_line(run, stubs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        annotate.main(["--help"])
    shown = capsys.readouterr().out
    for word in (*annotate.STAGES, "export", "stats", "--retry-failed", "--num-shards", "VLM_API_KEY", "kill -9"):
        assert word in shown and stopped.value.code == 0
    stub = stubs(fixture_world())
    done = run("annotate.py", "all", "--input", FIXTURE / "sa_000000.tar", "--out", tmp_path / "out", *stub.flags())
    assert done.returncode == 0, done.stderr.decode()
    images = {r["image"] for r in lines(tmp_path / "out" / "sa-ovrs.jsonl")}
    assert images == {"sa_000000/sa_1.jpg", "sa_000000/sa_37.jpg"}


# ----------------------------------------------------------------------------------------------------------
# noise: servers that miss, invent and mistake


class Noisy(Stub):
    """Knows the truth and errs: misses labels and boxes, invents both, draws boxes badly, tells wrong captions."""

    missed, wrong, caption = 0.08, 0.08, 0.15

    def dice(self, *what):
        return random.Random("/".join(map(str, what)))

    def answer(self, name, content, text):
        truth = super().answer(name, content, text)
        if name == "labels":
            rng = self.dice("labels", self.world.key_of(content))
            labels = [label for label in truth["labels"] if rng.random() > self.missed]
            labels += [label for label in ("dog", "heart", "traffic light") if rng.random() < self.wrong]
            return {"labels": labels}
        if name == "expression":
            key, thing = self.world.marked(content, (0, 255, 0))
            rng = self.dice("caption", thing.id)
            others = [o.expression for o in self.world.things[key] if o.label == thing.label and o is not thing]
            if rng.random() < self.caption:
                return {"expression": rng.choice([f"the {thing.label}", *others])}
        return truth

    def boxes(self, content, labels):
        key, boxes = self.world.key_of(content), []
        things = self.world.things[key]
        rng = self.dice("boxes", key)
        for label in labels:
            for thing in things:
                if thing.label == label and rng.random() > self.missed:
                    slack = [rng.choice((-1, 0, 0, 0, 1)) for _ in range(4)]
                    boxes.append((rng.uniform(0.35, 0.9), label, [v + s for v, s in zip(thing.box, slack)]))
            if rng.random() < self.wrong:  # anywhere
                x, y = rng.uniform(0, 80), rng.uniform(0, 80)
                boxes.append((rng.uniform(0.25, 0.6), label, [x, y, x + rng.uniform(10, 90), y + rng.uniform(10, 90)]))
            if rng.random() < self.wrong:  # on another object
                boxes.append((rng.uniform(0.25, 0.5), label, rng.choice(things).box))
        return [box_item(label, box, score) for score, label, box in sorted(boxes, reverse=True)]


def score_export(world, path):
    """Precision of the labels, mask by mask, and how many referring expressions fit more than one object."""
    right = wrong = whole = semantic = unique = ambiguous = other = 0
    for record in lines(path):
        things = {t.id: t for t in world.things[record["image"].removesuffix(".jpg")]}
        if record["task"] == "semantic":
            for id in record["annotation_ids"]:
                good = id in things and things[id].label == record["label"]
                right, wrong = right + good, wrong + (not good)
            semantic += 1
            whole += set(record["annotation_ids"]) == {t.id for t in things.values() if t.label == record["label"]}
        elif record["task"] == "referring":
            fitting = [t.id for t in things.values() if record["phrase"] in t.fits]
            unique, ambiguous = unique + (len(fitting) == 1), ambiguous + (len(fitting) != 1)
            other += len(fitting) == 1 and fitting != record["annotation_ids"]
    return {"labelled masks": right + wrong, "label precision": right / max(right + wrong, 1),
            "semantic records": semantic, "semantic complete": whole / max(semantic, 1),
            "referring": unique + ambiguous, "ambiguous": ambiguous, "unique but of another object": other}  # fmt: skip


def test_noise_is_filtered(tmp_path):
    world = scenes_world(tmp_path / "in", 40, seed=7)
    stub = Noisy(world)
    assert annotate_all("all", tmp_path / "in", tmp_path / "out", *stub.flags()) == 0
    numbers = score_export(world, tmp_path / "out" / "sa-ovrs.jsonl")
    stub.shutdown()
    assert numbers["label precision"] >= 0.98 and numbers["labelled masks"] > 40, numbers
    phrases = Counter((r["image"], r["phrase"].lower()) for r in lines(tmp_path / "out" / "sa-ovrs.jsonl")
                      if r["task"] == "referring")  # fmt: skip
    assert len(phrases) > 30 and max(phrases.values()) == 1
    rules = json.loads((tmp_path / "out" / "stats.json").read_text())["refer"]["rejected"]
    assert rules["fits_another"]["count"] > 0


# ----------------------------------------------------------------------------------------------------------
# python tests/test_annotate.py: the longer measurements


def in_another_process(make_stub, *arguments):
    """Serve a stub from a forked process, so that its work is not the client's; returns (its process id, its port)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        stub = make_stub(*arguments)
        os.write(write, str(stub.server_address[1]).encode())
        threading.Event().wait()
    return pid, int(os.read(read, 10))


class AtOnce(Handler):
    """Answers without looking: ten labels, or no boxes."""

    def answer(self, stub, content):
        self.reply(200, [] if self.path == "/detect" else chat('{"labels": ["dog", "cat", "cup"]}'))


def make_at_once():
    stub = Stub(World())
    stub.RequestHandlerClass = AtOnce
    return stub


def measure_noise(folder, count=300):
    """End to end on noisy servers: precision of the labels, uniqueness of the expressions."""
    world = scenes_world(folder / "in", count, seed=11)
    stub = Noisy(world)
    began = time.monotonic()
    annotate_all("all", folder / "in", folder / "out", *stub.flags())
    print(json.dumps(score_export(world, folder / "out" / "sa-ovrs.jsonl") | {"seconds": time.monotonic() - began}))
    shutil.copy(folder / "out" / "sa-ovrs.jsonl", folder / "in" / "sa-ovrs.jsonl")


def photograph(seed=0, size=(2250, 1500)):
    """JPEG bytes of about 1 MB that look like a photograph to an encoder."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (size[1] // 6, size[0] // 6, 3), np.uint8))
    buffer = io.BytesIO()
    noise.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure_speed(folder, count=200):
    """Pictures/s of one client process, with servers that answer at once in another process."""
    (folder / "in").mkdir(parents=True)
    content, (width, height) = photograph(), (2250, 1500)
    masks = {}
    for i in range(100):
        mask = np.zeros((height, width), bool)
        x, y = 20 * i, 10 * i
        mask[y : y + 300, x : x + 200] = True
        masks[i] = mask
    text = sa1b_json("x", (width, height), masks)
    for n in range(count):
        (folder / "in" / f"sa_{n}.jpg").write_bytes(content)
        (folder / "in" / f"sa_{n}.json").write_text(text)
    pid, port = in_another_process(make_at_once)
    try:
        servers = ["--vlm-url", f"http://127.0.0.1:{port}/v1", "--vlm-model", "stub-vlm"]
        servers += ["--detector-url", f"http://127.0.0.1:{port}/detect"]
        for name, stage, flags in (("labels, as they are", "labels", []), ("labels, --max-side 1024", "labels",
                                   ["--max-side", 1024]), ("detect", "detect", [])):  # fmt: skip
            out = folder / name.replace(" ", "")
            if stage == "detect":
                out = folder / "labels,astheyare"
            began = time.monotonic()
            assert annotate_all(stage, folder / "in", out, *servers, *flags) == 0
            print(f"{name}: {count / (time.monotonic() - began):.0f} pictures/s ({len(content) / 1e6:.2f} MB each)")
    finally:
        os.kill(pid, signal.SIGKILL)
    rng = random.Random(0)
    boxes = [[20 * i, 10 * i, 20 * i + 200, 10 * i + 300] for i in range(100)]
    detections = [detection(f"label {i // 2}", boxes[rng.randrange(100)], 0.5) for i in range(20)]
    began = time.monotonic()
    for _ in range(500):
        match(detections, boxes)
    print(f"match: {500 / (time.monotonic() - began):.0f} pictures/s (100 masks, 20 boxes)")
    path = folder / "labels,astheyare" / "detect.0-of-1.jsonl"
    records = lines(path)
    for record in records:
        record["result"]["kept"] = detections
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    began = time.monotonic()
    assert annotate_all("match", folder / "in", folder / "labels,astheyare") == 0
    print(f"match, the stage with its files: {count / (time.monotonic() - began):.0f} pictures/s")


def measure_memory(folder, count=20_000):
    """Resident memory while 20,000 pictures go through labels, detect and match."""
    (folder / "in").mkdir(parents=True)
    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "JPEG")
    import tarfile

    mask = np.zeros((64, 64), bool)
    mask[4:20, 4:30] = True
    text = sa1b_json("x", (64, 64), {1: mask}).encode()
    for part in range(4):
        with tarfile.open(folder / "in" / f"sa_{part:06}.tar", "w") as archive:
            for n in range(count // 4):
                for suffix, data in ((".jpg", content.getvalue()), (".json", text)):
                    member = tarfile.TarInfo(f"./sa_{part * count // 4 + n}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    pid, port = in_another_process(make_at_once)
    sizes, ended = [], threading.Event()

    def watch():
        while not ended.wait(0.5):
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)

    threading.Thread(target=watch, daemon=True).start()
    try:
        for stage in ("labels", "detect", "match"):
            sizes.clear()
            began = time.monotonic()
            servers = ["--vlm-url", f"http://127.0.0.1:{port}/v1", "--vlm-model", "stub-vlm",
                       "--detector-url", f"http://127.0.0.1:{port}/detect"]  # fmt: skip
            assert annotate_all(stage, folder / "in", folder / "out", *servers) == 0
            seconds, tenth = time.monotonic() - began, len(sizes) // 10
            print(f"{stage}: {count / seconds:.0f} pictures/s; MiB after a tenth, half, at the end: "
                  f"{sizes[tenth]:.0f} {sizes[len(sizes) // 2]:.0f} {sizes[-1]:.0f}")  # fmt: skip
    finally:
        ended.set()
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    import tempfile

    for measure in (measure_noise, measure_speed, measure_memory):
        if len(sys.argv) < 2 or sys.argv[1] in measure.__name__:
            target = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / measure.__name__
            print(f"{measure.__name__} in {target}")
            measure(target)
