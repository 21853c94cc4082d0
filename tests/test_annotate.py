"""annotate.py against stub servers that speak the real schemas, know the truth, and misbehave when told to."""

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
import tarfile
import threading
import time
import types
from collections import Counter, defaultdict
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import annotate
from annotate import clean_labels, match, names_object, normal_label, outline
from data import load_dataset, rle_decode, rle_encode
from scenes import WORLDS, draw_scene, scene_phrases

FIXTURE = Path(__file__).parent / "fixtures" / "sa1b"

# ---- a world that the stubs know: pictures, masks, labels, expressions ----------------------------------------------


class Thing:
    """One object: its label, mask and expression; `fits`: the expressions that are true of it."""

    def __init__(self, label, mask, id, expression=None, fits=()):
        self.label, self.mask, self.id, self.expression = label, mask, id, expression
        self.fits = set(fits) | {expression}
        self.box = Image.fromarray(mask).getbbox()

    @cached_property
    def line(self):
        return slow_outline(self.mask)


def slow_outline(mask):
    """The outline by brute force: every disk offset, then every pixel's four neighbours."""
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
        x0, y0, x1, y1 = Image.fromarray(mask).getbbox()
        box = [x0, y0, x1 - x0 - 1, y1 - y0 - 1]
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
                  for i, a in enumerate(image["annotations"])]
        world.add(f"{folder}/{stem}", content, things)
    return world


# ---- the stubs ------------------------------------------------------------------------------------------------------


class Stub(ThreadingHTTPServer):
    """Both servers in one: /v1/chat/completions (OpenAI) and /detect (Hugging Face zero-shot-object-detection).

    answer(name, image bytes, text) gives the VLM's answers, boxes(image bytes, labels) the detector's. `fault` gets
    (kind, picture key or None, number of the request for that unit); it returns None for a right answer, or "drop",
    one of COVERS, or what Handler.reply takes.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(self, world):
        super().__init__(("127.0.0.1", 0), Handler)
        self.world, self.delay = world, 0
        self.fault = lambda kind, key, n: None
        self.probe_fault, self.probes = lambda kind: None, []  # of the first request, about a white picture
        self.asked, self.lock = Counter(), threading.Lock()
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
                "--concurrency", "8", *map(str, more)]

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
        if self.path == "/detect":
            kind, text = "detect", ""
            image = base64.b64decode(body["inputs"], validate=True)
            labels = body["parameters"]["candidate_labels"]
            assert set(body) == {"inputs", "parameters"} and not any("." in label for label in labels)
        else:
            assert self.path == "/v1/chat/completions" and body["model"] == "stub-vlm"
            form = body["response_format"]
            assert form["type"] == "json_schema" and form["json_schema"]["strict"]
            kind, schema = form["json_schema"]["name"], form["json_schema"]["schema"]
            assert schema["required"] == list(schema["properties"]) == [annotate.ANSWERS[kind][0]]
            assert schema["additionalProperties"] is False and 0 < body["max_tokens"] <= 512
            assert body["temperature"] == 0.7 * body["seed"]  # of the first try 0
            (message,) = body["messages"]
            picture, words = message["content"]
            text = words["text"]
            image = base64.b64decode(picture["image_url"]["url"].partition(";base64,")[2], validate=True)
        if image == WHITE:
            stub.probes.append(kind)
            right = (200, [] if kind == "detect" else chat('{"labels": []}'))
            return self.reply(*(stub.probe_fault(kind) or right))
        stub.second.wait(30)
        if stub.delay:
            time.sleep(stub.rng.random() * stub.delay)
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
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}


WHITE = annotate.encode(Image.new("RGB", (64, 64), "white"))[0]
# what is around the right answer, and must not matter
COVERS = {"fenced": "```json\n{}\n```", "prose": "Sure! Here you are:\n\n{}\n\nI hope this helps {you}."}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Pauses between tries are measured in one test and are very short in the others."""
    monkeypatch.setattr(annotate, "WAIT", 0.001)


@pytest.fixture
def stubs():
    """Starts stubs, and stops them after the test."""
    started = []

    def start(world):
        started.append(Stub(world))
        return started[-1]

    yield start
    for thread in threading.enumerate():  # a run that was stopped leaves requests under way; another test's stub may
        if thread.name.startswith("ThreadPoolExecutor"):  # get the port of this one, and must not see them
            thread.join(60)
            assert not thread.is_alive()
    for stub in started:
        stub.shutdown()
        stub.server_close()
        assert stub.errors == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of six scenes and their world."""
    folder = tmp_path_factory.mktemp("scenes") / "in"
    return folder, scenes_world(folder, 6)


@pytest.fixture(scope="module")
def parts(small, tmp_path_factory):
    """The six scenes again: two in an archive, two in a folder, two in a folder of a folder."""
    top = tmp_path_factory.mktemp("parts") / "in"
    for number, name in enumerate(("b", "c/d", "unpacked")):
        (top / name).mkdir(parents=True)
        for n in (2 * number, 2 * number + 1):
            for suffix in (".jpg", ".json"):
                shutil.copy(small[0] / f"sa_{n}{suffix}", top / name)
    make_tar(top / "a.tar", {path.name: path.read_bytes() for path in sorted((top / "unpacked").iterdir())})
    shutil.rmtree(top / "unpacked")
    return top


def make_tar(path, members):
    """Write an archive of (name, bytes) pairs or a dict."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def annotate_all(stage, source, out, *flags):
    """Run a stage with those of the flags that it reads."""
    chosen, flags = [], [*map(str, flags)]
    while flags:
        name = flags.pop(0)
        values = [] if name == "--retry-failed" else [flags.pop(0)]
        if name[2:].replace("-", "_") in annotate.READS[stage]:
            chosen += [name, *values]
    return annotate.main([stage, "--input", str(source), "--out", str(out), *chosen])


def annotate_and_export(source, out, *flags):
    """All stages and the export, all of it into train.jsonl -> its records."""
    assert annotate_all("all", source, out, *flags) == 0
    return export(out)


def export(out):
    """Export everything into train.jsonl -> its records."""
    assert annotate.main(["export", "--out", str(out), "--val-share", "0"]) == 0
    assert (out / "val.jsonl").read_bytes() == b""
    return lines(out / "train.jsonl")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def journal(out, stage):
    """{picture: the last record} of a stage, over all parts."""
    return {r["id"]: r for path in (Path(out) / "journals").rglob(f"{stage}.jsonl") for r in lines(path)}


# ---- matching -------------------------------------------------------------------------------------------------------


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    area = lambda box: max(box[2] - box[0], 0) * max(box[3] - box[1], 0)  # noqa: E731
    union = area(a) + area(b) - inter
    return inter / union if union > 0 else 0.0


def slow_match(detections, masks):
    """The rules of `match`, one after the other, with loops."""
    candidates = []
    for label in {d["label"] for d in detections}:
        boxes = []
        for d in sorted((d for d in detections if d["label"] == label), key=lambda d: (-d["score"], d["box"])):
            if all(slow_iou(d["box"], better["box"]) <= 0.5 for better in boxes):
                boxes.append(d)
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
            assert best not in chosen
            chosen[best] = (d["score"], slow_iou(d["box"], masks[best]))
        else:
            score, iou = (sum(v[k] for v in chosen.values()) / len(chosen) for k in (0, 1))
            candidates.append((-score, -iou, label, chosen))
    result, used = [], set()
    for _, _, label, chosen in sorted(candidates, key=lambda c: c[:3]):
        if not used & set(chosen):
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
    for _ in range(rng.randint(0, 9)):
        base = rng.choice(masks) if masks and rng.random() < 0.9 else [5, 5, 50, 50]
        detections.append({"label": rng.choice("abc"), "score": rng.choice((0.2, 0.3, 0.31, 0.5, 0.5, 0.8)),
                           "box": [v + rng.choice((0, 0, 0, 1, -1, 3)) for v in base]})
    return detections, masks


def test_match_is_the_brute_force_of_its_rules():
    rng, filled = random.Random(0), 0
    for n in range(4000):
        detections, masks = random_case(rng)
        expected = slow_match(detections, masks)
        assert match(detections, np.array(masks).reshape(-1, 4))[0] == expected, (detections, masks)
        if n % 5 == 0:  # in whatever order they come
            rng.shuffle(detections)
            assert match(detections, masks)[0] == expected
        filled += bool(expected)
    assert filled > 1000


def detection(label, box, score=0.6):
    return {"label": label, "score": score, "box": box}


def test_match_rules_one_by_one():
    square, other = [0, 0, 100, 100], [200, 0, 300, 100]
    found = lambda detections, masks: match(detections, masks)[0]  # noqa: E731
    assert found([detection("a", square)], [other, square]) == [("a", 1, 0.6, 1.0)]
    assert match([detection("a", square, 0.3)], [square]) == ([], [["a", "low_score"]])  # above, not at
    assert found([detection("a", [0, 0, 100, 86])], [square]) == [("a", 0, 0.6, 0.86)]
    assert match([detection("a", [0, 0, 100, 85])], [square]) == ([], [["a", "low_iou"]])
    # with two boxes 0.86 is not enough, and the good one falls, too
    assert found([detection("a", other), detection("a", [0, 0, 100, 86])], [square, other]) == []
    assert [m for _, m, *_ in found([detection("a", square), detection("a", other)], [square, other])] == [0, 1]
    row = [[200 * i, 0, 200 * i + 90, 90] for i in range(5)]
    assert len(found([detection("a", box) for box in row[:4]], row)) == 4
    assert match([detection("a", box) for box in row], row) == ([], [["a", "too_many_boxes"]])
    # whole and part: the box is the part's, the whole is taken
    assert found([detection("a", [0, 0, 100, 98])], [[0, 0, 100, 98], square]) == [("a", 1, 0.6, 0.98)]
    assert found([detection("a", [0, 0, 100, 96])], [[0, 0, 100, 96], square]) == [("a", 0, 0.6, 1.0)]
    # one mask, two labels
    both = [detection("a", square, 0.5), detection("b", square, 0.7)]
    assert match(both, [square]) == ([("b", 0, 0.7, 1.0)], [["a", "mask_taken"]])
    assert found([], np.zeros((0, 4))) == found([], [square]) == found(both, np.zeros((0, 4))) == []


def test_a_detector_that_repeats_itself_does_not_cost_the_label():
    square, other = [0, 0, 100, 100], [200, 0, 300, 100]
    again = [[0, 0, 100, 100 - i] for i in range(5)]  # five boxes on one object, the best score on the best box
    boxes = [detection("a", box, 0.9 - 0.14 * i) for i, box in enumerate(again)]  # the last ones below 0.3, too
    assert match(boxes, [square]) == ([("a", 0, 0.9, 1.0)], [])
    assert [m for _, m, *_ in match([*boxes, detection("a", other)], [square, other])[0]] == [0, 1]
    # half of an object is another box: IoU 0.5 is not above 0.5
    assert match([detection("a", square), detection("a", [0, 0, 100, 50])], [square]) == ([], [["a", "low_iou"]])


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,label", [
    ("a dog.", "dog"), ("The Traffic Light", "traffic light"), ("bottle of water", "bottle of water"),
    ("octopuses", "octopuses"), ("bus", "bus"), ("Café table", "cafe table"), ("t-shirt", "t-shirt"),
    ("bench!", "bench"), ("the", ""), ("...", ""), ("dog’s bowl", "dog's bowl"), ("ＤＯＧ", "dog"),
])
def test_normal_label(text, label):
    assert normal_label(text) == label
    assert normal_label(label) == label


def test_clean_labels_keeps_ten_and_says_why_not():
    words = ["Dog", "a dog", "dogs", "background", "猫", "very small red racing car", ""]
    words += [f"thing{c}x" for c in "abcdefghij"]
    kept, rejected = clean_labels(words)
    assert kept == ["dog", *(f"thing{c}x" for c in "abcdefghi")]
    rules = dict((text, rule) for text, rule in rejected)
    assert rules == {"a dog": "duplicate", "dogs": "duplicate", "background": "no_object", "猫": "no_english_word",
                     "": "no_english_word", "very small red racing car": "too_long", "thingjx": "too_many"}


@pytest.mark.parametrize("one,many", [
    ("octopus", "octopuses"), ("wine glass", "wine glasses"), ("dog", "dogs"), ("cherry", "cherries"), ("box", "boxes"),
    ("person", "people"), ("shelf", "shelves"), ("house", "houses"),
])
def test_of_a_noun_and_its_plural_the_first_stays(one, many):
    assert clean_labels([one, many]) == ([one], [[many, "duplicate"]])
    assert clean_labels([many, one]) == ([many], [[one, "duplicate"]])


def test_no_word_is_changed_into_another():
    words = ["glasses", "bus", "gas", "grass", "octopus", "series", "lens", "news"]
    assert clean_labels(words) == (words, [])


@pytest.mark.parametrize("expression,label,named", [
    ("what barks at the postman", "dog", False), ("the Dogs of the house", "dog", True),
    ("man's best friend", "dog", False), ("the dog's place", "dog", True), ("what a driver sits in", "red car", False),
    ("the red thing that drives", "red car", True), ("many children", "child", True),
    ("where fire trucks get water", "fire hydrant", True), ("it tells when to cross", "traffic light", False),
    ("what shows trafficlight colors", "traffic light", True), ("glasses to drink from", "glass", True),
    ("what one looks through", "glasses", False), ("boxes of all kinds", "box", True),
    ("a person of the law", "people", True), ("keeps rain off", "umbrella of the man", False),
])
def test_reasoning_must_not_name_the_object(expression, label, named):
    assert names_object(expression, label) == named


@pytest.mark.parametrize("expression,label,fault", [
    ("the dog on the left", "dog", None), ("the green car", "car", None), ("the green box on the left", "box", None),
    ("the orange frame of the door", "frame", None), ("the green line on the floor", "line", None),
    ("the dog outlined in green", "dog", "mentions_marking"), ("the highlighted cup", "cup", "mentions_marking"),
    ("the car with the green line around it", "car", "mentions_marking"), ("the dog", "dog", "only_the_label"),
    ("左边的狗", "dog", "not_english"), ("!!!", "dog", "not_english"), ("a dog\ud800", "dog", "not_english"),
    ("very " * 41 + "old dog", "dog", "too_long"), ("the road marking on the left", "road marking", None),
])
def test_expression_faults(expression, label, fault):
    assert annotate.expression_fault(expression, label) == fault


def test_an_expression_said_twice_is_dropped_for_both():
    written = [("dog", 1, "The red dog", None), ("dog", 2, "the  red-dog", None), ("cat", 3, "a cat", None),
               ("cat", 4, "a cat", "fits_another")]
    assert annotate.judge_expressions(written) == {
        "kept": [{"label": "cat", "annotation_id": 3, "expression": "a cat"}],
        "rejected": [["The red dog", "duplicate"], ["the  red-dog", "duplicate"], ["a cat", "fits_another"]]}


# ---- answers --------------------------------------------------------------------------------------------------------


GOOD, LONG = '{"labels": ["a", "b"]}', json.dumps({"labels": ["x" * 81]})


@pytest.mark.parametrize("answer,expected", [
    (chat(GOOD), ["a", "b"]), (chat(f"```json\n{GOOD}\n```"), ["a", "b"]), (chat('{"labels": []}'), []),
    (chat(f"Here {{it}} is: {GOOD} {GOOD}"), ["a", "b"]), (chat(GOOD[:-4]), "no_json"),
    (chat(GOOD, finish="length"), "finish_length"),
    (chat(GOOD, finish="content_filter"), "finish_content_filter"), (chat(None), "no_json"),
    (chat(None, refusal="no"), "refused"), (chat("I'm sorry, but I can't help with that."), "refused"),
    (chat('{"labels": "a"}'), "wrong_schema"), (chat('{"labels": [1]}'), "wrong_schema"),
    (chat('{"label": ["a"]}'), "wrong_schema"), (chat('{"labels": ["a"], "more": 1}'), "wrong_schema"),
    (chat(LONG), "wrong_schema"), (chat("[]"), "no_json"), (chat("{" * 3000), "no_json"), ([], "wrong_response"),
    ({"choices": []}, "wrong_response"), ({"error": "x"}, "wrong_response"),
])
def test_read_answer(answer, expected):
    log = {"raw": []}
    if isinstance(expected, list):
        assert annotate.read_answer(answer, "labels", log) == expected and len(log["raw"]) == 1
    else:
        with pytest.raises(annotate.BadAnswer, match=f"^{expected}$"):
            annotate.read_answer(answer, "labels", log)


@pytest.mark.parametrize("name,value,read", [
    *(("expression", text, text) for text in ("the cup", "the sign that says I can't wait", "a card: I'm sorry")),
    *(("expression", value, None) for value in ("", " ", 3, "x" * 301, "I'm sorry, I cannot help", "I can’t see it")),
    ("expression", ' "the  old\ncup." ', "the old cup"), ("verify", False, False),
    *(("verify", value, None) for value in (1, "true", None)),
])
def test_read_other_answers(name, value, read):
    answer = chat(json.dumps({annotate.ANSWERS[name][0]: value}))
    if read is None:
        with pytest.raises(annotate.BadAnswer, match="wrong_schema|refused"):
            annotate.read_answer(answer, name, {"raw": []})
    else:
        assert annotate.read_answer(answer, name, {"raw": []}) == read


def test_read_boxes_cuts_and_checks():
    tiny = (1, 1, 3, 3)
    answer = [box_item("cup", (-5, 2, 50, 200)), box_item("Cup.", tiny), box_item("cu", tiny),
              *(box_item("cup", box) for box in ((101, 0, 120, 9), (9, 9, 9, 12), (9, 9, 2, 12)))]
    kept, rejected = annotate.read_boxes(answer, ["cup"], (100, 80), {"raw": []})
    assert [k["box"] for k in kept] == [[0, 2, 50, 80], [1, 1, 3, 3]] and {k["label"] for k in kept} == {"cup"}
    assert [rule for _, rule in rejected] == ["unknown_label", *["outside_or_empty"] * 3]
    for bad in ({"error": "x"}, {}, [box_item("cup", (1, 2, 3))], [box_item("cup", (1, 2, 3, float("nan")))], 7,
                [box_item("cup", tiny, 2)], [box_item(None, tiny)], [[box_item("cup", tiny)]]):
        with pytest.raises(annotate.Failure, match="wrong_schema"):
            annotate.read_boxes(bad, ["cup"], (100, 80), {"raw": []})


@pytest.mark.parametrize("header,pauses", [
    ([], [1, 2, 4, 8]), ([("Retry-After", "7")], [7] * 5), ([("Retry-After", "0")], [1, 2, 4, 8]),
    ([("Retry-After", "99999")], [300] * 5),
])
def test_the_pauses_of_a_busy_server_grow(stubs, small, tmp_path, monkeypatch, header, pauses):
    waited = []
    monkeypatch.setattr("urllib3.util.retry.time", types.SimpleNamespace(sleep=waited.append, time=time.time))
    monkeypatch.setattr(annotate, "WAIT", 1.0)
    stub = stubs(small[1])
    stub.fault = lambda kind, key, n: (429, {"error": "slow"}, header) if key == "sa_0" and n <= 5 else None
    assert annotate_all("labels", small[0], tmp_path / "out", *stub.flags()) == 0
    assert len(waited) == len(pauses) and all(p <= w <= p + 0.25 for p, w in zip(pauses, waited)), waited
    assert journal(tmp_path / "out", "labels")["sa_0"]["status"] == "ok" and stub.asked["labels", "sa_0"] == 6


# ---- lines on pictures ----------------------------------------------------------------------------------------------


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
        drawn = np.asarray(Image.open(io.BytesIO(annotate.mark(picture, line, color, 0)[0])))
        assert (drawn[line] == color).all() and np.array_equal(drawn[~line], np.asarray(picture)[~line])
    assert annotate.GREEN == (0, 255, 0) and annotate.ORANGE == (255, 128, 0)
    assert not outline(np.zeros((5, 5), bool)).any()


# ---- input ----------------------------------------------------------------------------------------------------------


def all_pictures(source):
    """({key: Picture}, what is wrong) of all parts of an input."""
    found, problems = {}, []
    for part in annotate.find_parts(Path(source)).items():
        pictures, wrong = annotate.pictures_of(*part)
        assert not found.keys() & {picture.key for picture in pictures}
        found |= {picture.key: picture for picture in pictures}
        problems += wrong
    return found, problems


def test_the_fixture_is_read_from_archive_and_folder():
    expected = json.loads((FIXTURE / "expected.json").read_text())["images"]
    masks = np.load(FIXTURE / "masks.npz")
    found, problems = all_pictures(FIXTURE)
    assert sorted(found) == ["sa_000000/sa_1", "sa_000000/sa_37", "sa_000020/sa_223750"] and not problems
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
    assert sorted(all_pictures(FIXTURE / "sa_000000.tar")[0]) == ["sa_000000/sa_1", "sa_000000/sa_37"]
    assert sorted(all_pictures(FIXTURE / "sa_000020")[0]) == ["sa_223750"]


def test_an_archive_beside_its_unpacked_folder_is_read_once(stubs, tmp_path, capsys):
    top = tmp_path / "in"
    shutil.copytree(FIXTURE, top)
    with tarfile.open(top / "sa_000000.tar") as archive:
        archive.extractall(top / "sa_000000", filter="data")
    assert list(all_pictures(top)[0]) == ["sa_000000/sa_1", "sa_000000/sa_37", "sa_000020/sa_223750"]
    assert "sa_000000: left out, sa_000000.tar beside it is read instead" in capsys.readouterr().err
    stub = stubs(fixture_world())
    records = annotate_and_export(top, tmp_path / "out", *stub.flags())
    assert records == annotate_and_export(FIXTURE, tmp_path / "other", *stub.flags()) and len(records) > 10
    assert all((top / record["image"]).is_file() for record in records)  # where the README has them unpacked


def test_links_to_folders_are_followed_once(tmp_path):
    top, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    shutil.copytree(FIXTURE / "sa_000020", elsewhere / "photos")
    top.mkdir()
    for name in ("first", "second"):
        (top / name).symlink_to(elsewhere)
    (elsewhere / "photos" / "again").symlink_to(top)  # a circle
    assert sorted(all_pictures(top)[0]) == ["first/photos/sa_223750"]


def test_members_of_an_archive(tmp_path):
    make_tar(tmp_path / "x.tar", [
        ("./a/1.jpg", b"a1"), ("b/1.jpg", b"b1"), ("b/1.json", b"[]"), ("b/._1.jpg", b"mac"), ("._2.jpg", b"mac"),
        ("__MACOSX/.hidden/3.jpg", b"mac"), ("4.jpg", b"one"), ("4.jpg", b"two"), ("5.png", b"png"), ("5.JPG", b"jpg"),
        ("../6.jpg", b"out"), ("sa_7.json", b"[]"), ("sa_8.json", b"[]"), ("sa_8.png", b"8"),
    ])
    found, problems = all_pictures(tmp_path)
    read = {key: picture.read("picture") for key, picture in found.items() if picture.picture}
    assert read == {"x/a/1": b"a1", "x/b/1": b"b1", "x/4": b"two", "x/5": b"jpg", "x/sa_8": b"8"}
    assert found.keys() - read == {"x/sa_7"} and found["x/b/1"].read("masks") == b"[]"
    assert [re.sub(".*x.tar: ", "", problem) for problem in problems] == [
        "4.jpg comes twice: the last is read", "5.png and 5.JPG share a name: the first is left out"]


def test_boxes_are_measured_where_the_file_has_none(tmp_path):
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:5] = True
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    counts = [8, 2, 4, 2, 4, 2, 4, 2, 20]
    (tmp_path / "a.json").write_text(json.dumps([{"segmentation": {"size": [6, 8], "counts": counts}}]))
    (picture,) = all_pictures(tmp_path)[0].values()
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
], ids=lambda text: text[:40])
def test_mask_files_that_are_none(tmp_path, text):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(text)
    (picture,) = all_pictures(tmp_path)[0].values()
    with pytest.raises(annotate.Failure, match="broken_masks"):
        annotate.read_annotations(picture, (8, 6))


@pytest.mark.parametrize("length", [1024, 5000, 9000, 9728])
def test_a_cut_archive_gives_what_is_whole_and_a_problem(tmp_path, length):
    content = (FIXTURE / "sa_000000.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:length])
    found, problems = all_pictures(tmp_path)
    assert len(problems) == 1 and "x.tar: damaged" in problems[0]
    for picture in found.values():
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


# ---- whole runs -----------------------------------------------------------------------------------------------------


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
    world, out = fixture_world(), tmp_path / "out"
    stub = stubs(world)
    exported = annotate_and_export(FIXTURE, out, *stub.flags())
    got = {(r["image"].removesuffix(".jpg"), r["task"], r["label"], tuple(sorted(r["annotation_ids"]))): r["phrase"]
           for r in exported if r["task"] != "reasoning"}
    expected = expected_records(world)
    assert got == expected and len(expected) > 10
    instances = lines(out / "instances-train.jsonl")
    assert len({r["id"] for r in exported + instances}) == len(exported) + len(instances)
    for r in exported + instances:
        assert list(r) == ["id", "image", "width", "height", "task", "label", "phrase", "annotation_ids",
                           "segmentation", "score", "provenance"]
        things = world.things[r["image"].removesuffix(".jpg")]
        union = np.logical_or.reduce([t.mask for t in things if t.id in r["annotation_ids"]])
        assert np.array_equal(rle_decode(r["segmentation"]), union) and union.shape == (r["height"], r["width"])
        made = r["provenance"]
        assert made["labels"]["model"] == "stub-vlm" and list(made["labels"]["prompts"]) == ["labels"]
        assert made["detect"]["model"] == "grounding-dino" and ("refer" in made) == (r["task"] == "referring")
        assert 0.8 < r["score"] <= 0.9
    # the masks with labels before merging, each once
    assert sorted((r["image"][:-4], r["label"], *r["annotation_ids"]) for r in instances) == sorted(
        (key, task_label, id) for key, task, task_label, ids in expected if task == "semantic" for id in ids)
    reasoning = [r for r in exported if r["task"] == "reasoning"]
    assert reasoning and all(len(r["annotation_ids"]) == 1 and r["label"] != "lamp" for r in reasoning)
    # one object of its label is not checked, the others are, each against each
    asked = Counter(kind for kind, _ in stub.bodies)
    groups = [[t for t in things if t.label == label] for key, things in world.things.items()
              for label in world.labels(key) if label != "sky"]
    assert asked["verify"] == sum(len(g) * (len(g) - 1) for g in groups) > 0
    assert asked["expression"] == sum(map(len, groups))
    assert asked["labels"] == asked["detect"] == asked["entities"] == len(world.things)
    assert stub.probes == ["labels", "detect"]
    assert annotate.main(["stats", "--out", str(out)]) == 0
    stats = json.loads((out / "stats.json").read_text())
    assert stats["labels"]["pictures"] == 3
    assert stats["match"]["kept"] == sum(task == "semantic" for _, task, _, _ in expected)
    assert stats["labels_of_masks"]["lamp"] == sum(t.label == "lamp" for ts in world.things.values() for t in ts)
    # again: nothing is asked, nothing is written
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    count = len(stub.bodies)
    assert export(out) == exported and annotate_all("all", FIXTURE, out, *stub.flags()) == 0
    assert len(stub.bodies) == count and before == {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    assert "train referring" in capsys.readouterr().out and not list(out.rglob("*.tmp"))


def test_the_export_is_a_data_set_and_no_picture_is_in_both_splits(stubs, small, tmp_path):
    folder, world = small
    stub, out = stubs(world), tmp_path / "out"
    together = annotate_and_export(folder, out, *stub.flags())
    assert annotate.main(["export", "--out", str(out), "--val-share", "0.5"]) == 0
    root, pictures = tmp_path / "root", {}
    shutil.copytree(folder, root)
    for split in ("train", "val"):
        shutil.copy(out / f"{split}.jsonl", root)
        dataset, records = load_dataset("sa-ovrs", split, root), lines(root / f"{split}.jsonl")
        assert len(dataset) == len(records) > 3
        for example, record in zip((dataset[i] for i in range(len(dataset))), records):
            things = world.things[record["image"].removesuffix(".jpg")]
            assert (example.id, example.task, example.label) == (record["id"], record["task"], record["label"])
            assert example.phrase == record["phrase"] and example.mask.shape == example.image.size[::-1]
            assert np.array_equal(example.mask, sum(t.mask for t in things if t.id in record["annotation_ids"]) > 0)
        pictures[split] = {r["image"] for r in records}
        assert pictures[split] == {r["image"] for r in lines(out / f"instances-{split}.jsonl")}
        assert records == [r for r in together if r["image"] in pictures[split]]
    assert not pictures["train"] & pictures["val"] and len(pictures["train"] | pictures["val"]) == len(world.things)


# (kind of request, fault, how often, the reason that is recorded or None where it passes or does no harm)
ALWAYS = 10**9
FAULTS = [
    ("labels", (400, {"object": "error", "message": "bad image", "code": 400}), ALWAYS, "http_400"),
    ("detect", (500, b"<html>Internal Server Error</html>"), ALWAYS, "http_500"),
    ("labels", (200, chat('{"labels": ["circle", "squ')), ALWAYS, "no_json"),
    ("labels", (200, chat("I'm sorry, I can't assist with that request.")), ALWAYS, "refused"),
    ("labels", (200, chat('{"labels": ["dog", "dog", "dog"', finish="length")), ALWAYS, "finish_length"),
    ("detect", "drop", ALWAYS, "connection"),
    ("detect", (200, {"error": "loading"}), ALWAYS, "wrong_schema"),
    ("entities", (200, b'{"id": "chatcmpl-1", "choices": [{"ind'), ALWAYS, "cut_response"),
    ("labels", (200, chat(None, finish="content_filter")), ALWAYS, "finish_content_filter"),
    ("labels", (429, {"error": {"message": "slow down", "code": 429}}, []), 2, None),
    ("detect", (503, {"error": "loading", "estimated_time": 1.0}), 2, None),
    ("labels", "drop", 1, None),
    ("labels", (500, {"error": {"message": "one bad request", "code": 500}}), 2, None),
    ("labels", "fenced", ALWAYS, None),
    ("entities", "prose", ALWAYS, None),
    ("labels", (200, chat("nonsense")), 1, None),
    ("labels", (200, {"choices": [{}]}), 1, None),
    ("labels", (200, chat('{"labels": ["Circle", "a circle", "the circles."]}')), ALWAYS, None),
    ("detect", (200, []), ALWAYS, None),
]


def test_servers_that_misbehave(stubs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(annotate, "ATTEMPTS", 3)
    folder, out = tmp_path / "in", tmp_path / "out"
    world = scenes_world(folder, len(FAULTS), seed=3)
    stub = stubs(world)
    good = annotate_and_export(folder, tmp_path / "good", *stub.flags())

    def fault(kind, key, number):
        if key is None:  # a marked picture
            return None
        asked, trouble, times, _ = FAULTS[int(key[3:])]
        return trouble if kind == asked and number <= times else None

    stub.fault = fault
    stub.asked.clear()
    assert annotate_all("all", folder, out, *stub.flags()) == 0
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
    assert circles == {"kept": ["circle"], "rejected": [["a circle", "duplicate"], ["the circles.", "duplicate"]]}
    assert journal(out, "detect")[max(last)]["result"]["kept"] == []
    assert "1 http_500" in capsys.readouterr().out

    # plain resuming leaves failures alone; --retry-failed does them again, and only them
    stub.fault = lambda kind, key, number: None
    stub.bodies.clear()
    assert annotate_all("all", folder, out, *stub.flags()) == 0 and not stub.bodies
    assert annotate_all("all", folder, out, *stub.flags("--retry-failed")) == 0
    assert sum(k == "labels" for k, _ in stub.bodies) == sum(k == "labels" and r is not None for k, _, _, r in FAULTS)
    exports = [[r for r in records if r["image"][:-4] not in last] for records in (export(out), good)]
    assert exports[0] == exports[1] and len(exports[0]) > 30


# --- stopping, going on


def killed(argv, prepare):
    """Run annotate.main in a forked process, `prepare` first, which may make it kill itself; True if it was killed."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        signal.alarm(120)  # should it hang, it ends, and the test fails
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent, and would stay held after a kill
        prepare()
        os._exit(annotate.main(argv))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def dies_within_line(number):
    """Let this process kill -9 itself in the middle of writing the number-th line of its journals."""
    left, append = [number], annotate.Journal.append

    def append_or_die(self, record):
        left[0] -= 1
        if left[0]:
            return append(self, record)
        self.file.write(json.dumps(record).encode()[:40])
        os.kill(os.getpid(), signal.SIGKILL)

    annotate.Journal.append = append_or_die


def test_killed_again_and_again_the_export_is_that_of_the_unbroken_run(stubs, small, tmp_path):
    folder, world = small
    stub, out = stubs(world), tmp_path / "out"
    expected = annotate_and_export(folder, tmp_path / "whole", *stub.flags())
    alone, kills = len(stub.bodies), 0
    stub.bodies.clear()
    argv = ["all", "--input", str(folder), "--out", str(out), *stub.flags("--concurrency", 3)]
    while killed(argv, lambda: dies_within_line(4)):  # six pictures in six stages are 36 lines
        kills += 1
    assert kills == 11 and export(out) == expected
    for stage in annotate.STAGES:
        assert len(lines(out / "journals" / f"{stage}.jsonl")) == len(world.things)
    # only what was under way at a kill is asked again: three pictures, at most 4 x 4 requests each and a few more
    assert len(stub.bodies) <= alone + kills * 3 * 20


def test_an_export_that_is_killed_leaves_the_old_files_whole(stubs, small, tmp_path):
    folder, world = small
    stub, out, names = stubs(world), tmp_path / "out", ("train", "val", "instances-train", "instances-val")
    annotate_and_export(folder, out, *stub.flags())
    old = {name: (out / f"{name}.jsonl").read_bytes() for name in names}

    argv = ["export", "--out", str(out), "--val-share", "0.5"]
    for module, name in ((annotate, "records_of"), (os, "replace")):
        assert killed(argv, lambda: setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL)))  # noqa: B023
        assert old == {name: (out / f"{name}.jsonl").read_bytes() for name in names}
    assert annotate.main(argv) == 0
    assert len((out / "val.jsonl").read_bytes() + (out / "train.jsonl").read_bytes()) == len(old["train"])


def test_a_torn_line_is_dropped_and_a_damaged_one_is_told(stubs, small, tmp_path, capsys):
    folder, world = small
    stub = stubs(world)
    out = tmp_path / "out"
    assert annotate_all("labels", folder, out, *stub.flags()) == 0
    path = out / "journals" / "labels.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    count = len(stub.bodies)
    assert annotate_all("labels", folder, out, *stub.flags()) == 0
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines()) and len(stub.bodies) == count + 1
    path.write_bytes(b"{}\n" + whole)
    assert annotate_all("labels", folder, out, *stub.flags()) == 1
    assert "line 1 is damaged" in capsys.readouterr().err and path.read_bytes() == b"{}\n" + whole


def test_ctrl_c_keeps_what_is_finished(stubs, small, tmp_path, monkeypatch, capsys):
    stub, out, done, do_picture = stubs(small[1]), tmp_path / "out", [], annotate.do_picture
    for stage in ("labels", "detect"):
        assert annotate_all(stage, small[0], out, *stub.flags()) == 0

    def stops_at_the_fourth(*arguments):
        done.append(arguments)
        if len(done) == 4:
            raise KeyboardInterrupt
        return do_picture(*arguments)

    monkeypatch.setattr(annotate, "do_picture", stops_at_the_fourth)
    assert annotate_all("match", small[0], out) == 130 and "run this again" in capsys.readouterr().err
    assert list(journal(out, "match")) == ["sa_0", "sa_1", "sa_2"]
    assert annotate_all("match", small[0], out) == 0 and len(done) == 4 + 3 and len(journal(out, "match")) == 6


def test_the_last_line_of_a_picture_wins(stubs, small, tmp_path):
    folder, world = small
    stub, out = stubs(world), tmp_path / "out"
    assert annotate_all("labels", folder, out, *stub.flags()) == 0
    record = journal(out, "labels")["sa_2"]
    with open(out / "journals" / "labels.jsonl", "a") as file:
        for status, labels in (("failed", ["old"]), ("ok", ["new"])):
            file.write(json.dumps(record | {"status": status, "result": {"kept": labels, "rejected": []}}) + "\n")
    assert annotate_all("detect", folder, out, *stub.flags()) == 0
    asked = [body["parameters"]["candidate_labels"] for kind, body in stub.bodies if kind == "detect"]
    assert ["new"] in asked and ["old"] not in asked and len(asked) == 6


def test_two_writers_are_refused(stubs, small, tmp_path, capsys):
    folder, world = small
    stub = stubs(world)
    out = tmp_path / "out"
    first = annotate.Journal(out, "", "labels", write=True)
    assert annotate_all("labels", folder, out, *stub.flags()) == 1
    assert "another process writes it" in capsys.readouterr().err and not stub.bodies
    first.close()
    assert annotate_all("labels", folder, out, *stub.flags()) == 0


def test_another_model_prompt_or_size_is_refused(stubs, small, tmp_path, capsys, monkeypatch):
    folder, world = small
    stub, out = stubs(world), tmp_path / "out"
    assert annotate_all("labels", folder, out, *stub.flags()) == 0
    before, asked = (out / "journals" / "labels.jsonl").read_bytes(), len(stub.bodies)

    def refused(*flags, stage="labels"):
        with pytest.raises(SystemExit) as stopped:
            annotate_all(stage, folder, out, *stub.flags(*flags))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and "was begun with" in error
        assert (out / "journals" / "labels.jsonl").read_bytes() == before and len(stub.bodies) == asked
        return error

    assert re.search("'max_side': 0.*this run has.*'max_side': 64", refused("--max-side", 64))
    assert re.search("'stub-vlm'.*this run has.*'other'", refused("--vlm-model", "other", stage="all"))
    with monkeypatch.context() as patch:
        patch.setitem(annotate.PROMPTS, "labels", annotate.PROMPTS["labels"] + " Please.")
        assert "prompts" in refused()
    assert annotate_all("detect", folder, out, *stub.flags()) == 0
    asked = len(stub.bodies)
    assert "'grounding-dino'" in refused("--detector-model", "other", stage="detect")
    assert annotate_all("all", folder, out, *stub.flags()) == 0
    (out / "settings.json").write_text("[")
    assert annotate_all("all", folder, out, *stub.flags()) == 1 == annotate.main(["export", "--out", str(out)])
    assert capsys.readouterr().err.count("settings.json: damaged") == 2


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_together_are_the_whole(stubs, small, parts, tmp_path, shards):
    stub, out = stubs(small[1]), tmp_path / "out"
    whole = annotate_and_export(parts, tmp_path / "whole", *stub.flags())
    assert {Path(r["image"]).parent.as_posix() for r in whole} == {"a", "b", "c/d"}
    for shard in range(shards):  # more shards than parts: two have nothing to do
        before = len(journal(out, "reason"))
        assert annotate_all("all", parts, out, *stub.flags("--shard", shard, "--num-shards", shards)) == 0
        assert len(journal(out, "reason")) - before == 2 * len(range(shard, 3, shards))
    assert export(out) == whole
    # going on with another number of shards: what is finished is not asked again
    assert annotate_all("all", parts, tmp_path / "more", *stub.flags("--shard", 0, "--num-shards", 3)) == 0
    count = len(stub.bodies)
    assert annotate_all("all", parts, tmp_path / "more", *stub.flags()) == 0
    again = {key for (kind, key), n in stub.asked.items() if kind == "labels" and n > 3}
    assert export(tmp_path / "more") == whole and len(stub.bodies) > count and not again


def test_the_answer_does_not_depend_on_concurrency_or_time(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    exports = []
    for concurrency in (1, 4, 32):
        stub.delay, stub.most = 0.004, 0
        if concurrency > 1:
            stub.second.clear()
        out = tmp_path / str(concurrency)
        exports.append(annotate_and_export(folder, out, *stub.flags("--concurrency", concurrency)))
        assert stub.most <= concurrency and (stub.most > 1 or concurrency == 1)
    assert exports[0] == exports[1] == exports[2]


def test_input_is_drawn_only_when_there_is_room():
    drawn, taken = [], []

    def units():
        for n in range(50):
            drawn.append(n)
            assert len(drawn) - len(taken) <= 4
            yield n

    for result in annotate.in_parallel(lambda n: n, units(), 4):
        taken.append(result)
    assert sorted(taken) == drawn == list(range(50))


# --- servers that are away


def test_a_server_that_goes_away_for_a_while_costs_nothing(stubs, small, tmp_path):
    folder, world = small
    stub = stubs(world)
    good = annotate_and_export(folder, tmp_path / "good", *stub.flags())
    faults = ["drop", (503, {"error": {"message": "Engine is dead", "code": 503}}), (502, b"<html>Bad Gateway</html>")]
    stub.asked.clear()
    stub.fault = lambda kind, key, number: faults[number % 3] if key and number < 6 and number != 4 else None
    assert annotate_and_export(folder, tmp_path / "out", *stub.flags()) == good


@pytest.mark.parametrize("fault,reason", [
    ((200, {"hello": "world"}), "wrong_response"), ((200, b"<html>Welcome</html>"), "cut_response"),
    ((200, chat("what a nice picture")), "no_json"), ((429, {"error": "slow down"}), "http_429"),
    ((503, b"no server behind this proxy"), "http_503"), ("drop", "connection"),
])
def test_a_server_that_never_gives_a_useful_answer_stops_the_run(stubs, small, tmp_path, capsys, monkeypatch, fault,
                                                                 reason):
    monkeypatch.setattr(annotate, "STOP_AFTER", 4)
    folder, world = small
    stub, out = stubs(world), tmp_path / "out"
    flags = stub.flags("--concurrency", 1)
    stub.fault = lambda kind, key, number: fault if key != "sa_0" else None
    assert annotate_all("labels", folder, out, *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: labels: no useful answer for 4 pictures in a row") and reason in error
    assert list(journal(out, "labels")) == ["sa_0"]  # nothing else is burned
    assert {key for _, key in stub.asked} == {f"sa_{n}" for n in range(5)}
    stub.fault = lambda kind, key, number: None
    assert annotate_all("labels", folder, out, *flags) == 0
    assert all(record["status"] == "ok" for record in journal(out, "labels").values())


def test_pictures_that_fail_by_themselves_do_not_stop_the_run(stubs, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(annotate, "STOP_AFTER", 2)
    shutil.copytree(small[0], tmp_path / "in")
    for n in range(5):
        (tmp_path / "in" / f"sa_{n}.json").unlink()
    stub = stubs(small[1])
    assert annotate_all("all", tmp_path / "in", tmp_path / "out", *stub.flags()) == 0
    assert "labels: 5 no_masks, 1 ok, 5 failed" in capsys.readouterr().out
    # they are tried again when it is asked for, and the last line counts
    shutil.copy(small[0] / "sa_1.json", tmp_path / "in")
    for flags, good in (([], ["sa_5"]), (["--retry-failed"], ["sa_1", "sa_5"])):
        assert annotate_all("labels", tmp_path / "in", tmp_path / "out", *stub.flags(*flags)) == 0
        records = journal(tmp_path / "out", "labels")
        assert sorted(key for key, record in records.items() if record["status"] == "ok") == good and len(records) == 6


@pytest.mark.parametrize("kind,fault,message", [
    ("labels", (401, {"error": "Unauthorized"}), "put the right one into VLM_API_KEY"),
    ("detect", (403, {"error": "Forbidden"}), "put the right one into DETECTOR_API_KEY"),
    ("refer", (404, {"error": {"message": "The model `stub-vlm` does not exist", "code": 404}}), "`stub-vlm` does not"),
    ("detect", (302, b"", [("Location", "http://127.0.0.1:1/")]), "check the address"),
])
def test_what_no_retry_can_mend_stops_at_once(stubs, small, tmp_path, capsys, kind, fault, message):
    folder, world = small
    stub, out = stubs(world), tmp_path / "out"
    flags = stub.flags("--concurrency", 1)
    asked = "expression" if kind == "refer" else kind
    stub.fault = lambda kind, *_: fault if kind == asked and sum(k == kind for k, _ in stub.bodies) > 3 else None
    assert annotate_all("all", folder, out, *flags) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sum(kind == asked for kind, _ in stub.bodies) == 4  # the fourth is the last
    assert all(r["status"] == "ok" for stage in annotate.STAGES for r in journal(out, stage).values())
    stub.fault = lambda kind, key, number: None
    assert annotate_and_export(folder, out, *flags) == annotate_and_export(folder, tmp_path / "good", *flags)


@pytest.mark.parametrize("kind,fault,message", [
    ("labels", (401, {"error": "Unauthorized"}), "refuses the key (401 "),
    ("detect", (401, {"error": "Unauthorized"}), "put the right one into DETECTOR_API_KEY"),
    ("labels", (404, {"error": {"message": "The model `stub-vlm` does not exist"}}), "`stub-vlm` does not exist"),
    ("detect", (404, {"detail": "Not Found"}), "/detect: 404"), ("detect", (503, {"error": "loading"}), "loading"),
    ("detect", (200, {"predictions": []}), "expected a JSON list"),
    ("labels", (200, []), "expected a JSON dict"), ("labels", (200, b"<html>"), "cut_response"),
])
def test_both_servers_are_looked_at_before_the_work(stubs, small, tmp_path, capsys, kind, fault, message):
    stub, out = stubs(small[1]), tmp_path / "out"
    stub.probe_fault = lambda asked: fault if asked == kind else None
    assert annotate_all("all", small[0], out, *stub.flags()) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not stub.bodies and (out / "journals" / "labels.jsonl").read_bytes() == b""


def test_no_server_at_all_ends_in_one_line(stubs, small, tmp_path, capsys):
    stub = stubs(small[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
    for missing in (["--detector-url", f"http://127.0.0.1:{port}/detect"], ["--vlm-url", f"http://127.0.0.1:{port}/v1"]):
        assert annotate_all("all", small[0], tmp_path / "out", *stub.flags(*missing)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: http://127.0.0.1:{port}/") and "no server answers" in error
    assert (tmp_path / "out" / "journals" / "labels.jsonl").read_bytes() == b"" and not stub.bodies


def test_keys_are_sent_and_never_written(stubs, small, tmp_path, capsys, monkeypatch):
    folder, world = small
    stub = stubs(world)
    monkeypatch.setenv("VLM_API_KEY", "sk-secret-vlm")
    monkeypatch.setenv("DETECTOR_API_KEY", "sk-secret-detector")
    stub.fault = lambda kind, key, number: (
        (400, {"error": {"message": f"no sk-secret-{'detector' if kind == 'detect' else 'vlm'} today"}})
        if key in ("sa_1", "sa_2") and (kind == "labels") == (key == "sa_1") else None)
    annotate_and_export(folder, tmp_path / "out", *stub.flags())
    keys = {(headers["Authorization"]) for headers in stub.headers}
    assert keys == {"Bearer sk-secret-vlm", "Bearer sk-secret-detector"}
    assert journal(tmp_path / "out", "detect")["sa_2"]["detail"] == json.dumps({"error": {"message": "no *** today"}})
    for path in (tmp_path / "out").rglob("*.json*"):
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
        "sa_3": "broken_masks", "sa_4": "broken_masks", "sa_5": None}
    assert {r["image"] for r in export(tmp_path / "out")} == {"sa_5.jpg"}


URLS = ["--vlm-url", "http://h/v1", "--vlm-model", "m", "--detector-url", "http://h"]


@pytest.mark.parametrize("stage,flags,message", [
    ("labels", [], "labels needs --vlm-url --vlm-model"), ("detect", [], "detect needs --detector-url"),
    ("all", URLS[:4], "all needs --detector-url"),
    ("all", [*URLS, "--concurrency", "0"], "--concurrency 0: expected 1"),
    ("all", [*URLS[:-1], "localhost:9"], "--detector-url localhost:9: expected http://"),
    ("all", [*URLS[:-1], "http://me:secret@h"], "--detector-url h: expected http://"),
    ("all", [*URLS, "--shard", "1"], "--shard 1: expected 0 to 0"),
    ("all", [*URLS, "--shard", "2", "--num-shards", "2"], "--shard 2: expected 0 to 1"),
    ("match", ["--concurency", "3"], "unrecognized arguments"), ("paint", [], "invalid choice: 'paint'"),
    ("match", ["--vlm-model", "m"], "--vlm-model has no use with match"),
    ("export", ["--val-share", "0.5"], "--input has no use with export"),
])
def test_wrong_usage_is_2(small, tmp_path, capsys, stage, flags, message):
    with pytest.raises(SystemExit) as stopped:
        annotate.main([stage, "--input", str(small[0]), "--out", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "secret" not in error
    assert not (tmp_path / "out").exists()


def test_bad_paths_are_1(stubs, tmp_path, capsys):
    stub = stubs(World())
    assert annotate_all("all", tmp_path / "nowhere", tmp_path / "out", *stub.flags()) == 1
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()
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
    for word in (*annotate.READS, "--retry-failed", "--num-shards", "VLM_API_KEY", "kill -9"):
        assert word in shown and stopped.value.code == 0
    stub = stubs(fixture_world())
    done = run("annotate.py", "all", "--input", FIXTURE / "sa_000000.tar", "--out", tmp_path / "out", *stub.flags())
    assert done.returncode == 0, done.stderr.decode()
    images = {r["image"] for r in export(tmp_path / "out")}
    assert images == {"sa_000000/sa_1.jpg", "sa_000000/sa_37.jpg"}


# ---- noise: servers that miss, invent and mistake -------------------------------------------------------------------


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


def label_precision(world, records):
    """(how many masks have a label, the share of them whose label is right)."""
    right = []
    for record in records:
        things = {t.id: t for t in world.things[record["image"].removesuffix(".jpg")]}
        if record["task"] == "semantic":
            right += [id in things and things[id].label == record["label"] for id in record["annotation_ids"]]
    return len(right), sum(right) / max(len(right), 1)


def test_noise_is_filtered(tmp_path):
    world = scenes_world(tmp_path / "in", 40, seed=7)
    stub = Noisy(world)
    records = annotate_and_export(tmp_path / "in", tmp_path / "out", *stub.flags())
    count, precision = label_precision(world, records)
    stub.shutdown()
    stub.server_close()
    assert precision >= 0.98 and count > 40, (precision, count)
    phrases = Counter((r["image"], r["phrase"].lower()) for r in records if r["task"] == "referring")
    assert len(phrases) > 30 and max(phrases.values()) == 1
    assert annotate.main(["stats", "--out", str(tmp_path / "out")]) == 0
    rules = json.loads((tmp_path / "out" / "stats.json").read_text())["refer"]["rejected"]
    assert rules["fits_another"]["count"] > 0
