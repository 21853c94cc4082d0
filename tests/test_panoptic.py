"""Panoptic quality and average precision: the figures of a COCO tree, worked examples, and the slow way beside ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Panoptic, load_dataset, rle_decode
from metrics import AveragePrecision, PanopticQuality, SegmentationMetrics

FIXTURE = Path(__file__).parent / "fixtures" / "coco_panoptic"


def truth(masks, labels, crowds=(), stuff=(), id="1", ignore=None, **more):
    """A Panoptic without a picture; crowds: indices, stuff: class names."""
    masks = np.array(masks, bool)
    return Panoptic(None, id, masks, list(labels), [label not in stuff for label in labels],
                    [k in crowds for k in range(len(labels))], ignore, **more)


def cells(text, letters):
    """Masks (n, H, W), one for each of the letters in a drawing of rows that are separated by blanks."""
    rows = np.array([list(row) for row in text.split()])
    return np.array([rows == letter for letter in letters])


# --- the fixture


def predicted_segments(image_id, names):
    """The panoptic prediction of the fixture for a picture."""
    content = json.loads((FIXTURE / "predictions" / "panoptic_pred.json").read_text())
    annotation = next(a for a in content["annotations"] if a["image_id"] == image_id)
    pixels = np.asarray(Image.open(FIXTURE / "predictions" / "panoptic_pred" / annotation["file_name"])).astype(int)
    numbers = pixels @ [1, 256, 65536]
    return [{"mask": numbers == s["id"], "label": names[s["category_id"]]} for s in annotation["segments_info"]]


@pytest.fixture(scope="module")
def fixture():
    names = {c["id"]: c["name"] for c in json.loads(
        (FIXTURE / "coco" / "annotations" / "panoptic_val2017.json").read_text())["categories"]}
    return json.loads((FIXTURE / "expected.json").read_text()), names


def test_panoptic_quality_of_the_fixture(fixture):
    expected, names = fixture
    metrics = PanopticQuality()
    for gt in load_dataset("coco-panoptic", "val", FIXTURE):
        metrics.update(predicted_segments(int(gt.id), names), gt)
    numbers = metrics.compute()
    assert numbers.keys() == expected["pq"].keys()
    for group, wanted in expected["pq"].items():
        assert numbers[group] == pytest.approx(wanted, abs=1e-9)
    counts = {}
    for row in metrics.rows.values():
        for label, (ious, fp, fn, _) in row.items():
            total = counts.setdefault(label, {"iou": 0, "tp": 0, "fp": 0, "fn": 0})
            for key, value in zip(total, (sum(ious), len(ious), fp, fn)):
                total[key] += value
    assert counts == {names[int(id)]: pytest.approx(c) for id, c in expected["pq_counts_per_category"].items()}


def test_average_precision_of_the_fixture(fixture):
    expected, names = fixture
    metrics = AveragePrecision()
    results = json.loads((FIXTURE / "predictions" / "instances_pred.json").read_text())
    for gt in load_dataset("coco-instances", "val", FIXTURE):
        metrics.update([{"mask": rle_decode(r["segmentation"]), "label": names[r["category_id"]], "score": r["score"]}
                        for r in results if r["image_id"] == int(gt.id)], gt)
    numbers = metrics.compute()
    for key in set(expected["ap"]) - {"rule"}:
        assert numbers[key] == pytest.approx(expected["ap"][key], abs=1e-9)


def test_miou_of_the_fixture_adds_up_from_segments(fixture):
    """Per class and picture the union of its segments, without void: SegmentationMetrics does the rest."""
    expected, names = fixture
    metrics = SegmentationMetrics()
    for gt in load_dataset("coco-panoptic", "val", FIXTURE):
        pred = predicted_segments(int(gt.id), names)
        void = ~gt.masks.any(0) if gt.ignore is None else gt.ignore
        for label in {*gt.labels, *(s["label"] for s in pred)}:
            p, g = (np.any([m for m, other in segments if other == label] or [0 * void], 0) & ~void for segments in (
                [(s["mask"], s["label"]) for s in pred], list(zip(gt.masks, gt.labels))))
            metrics.add(int((p & g).sum()), int((p | g).sum()), None, label)
    assert metrics.compute()["mIoU"] == pytest.approx(expected["miou"]["value"], abs=1e-9)


# --- panoptic quality by hand


def segments(text, labels):
    """Predicted segments: one for each letter of a drawing, labels: {letter: class name}."""
    return [{"mask": mask, "label": label} for mask, label in zip(cells(text, labels), labels.values())]


def counts(pred, gt):
    """What PanopticQuality keeps of one picture: {label: [IoUs of the matches, FP, FN, is it a thing?]}."""
    metrics = PanopticQuality()
    metrics.update(pred, gt)
    return metrics.rows[gt.id]


def test_a_worked_example():
    gt = truth(cells("aaaaa.... bbbbbcccc", "abc"), ["cat", "cat", "sky"], stuff=["sky"])
    pred = segments("aaaa..... bbccccccc", {"a": "cat", "b": "cat", "c": "sky"})
    metrics = PanopticQuality()
    # cat a: 4 of 5; cat b: 2 of 5, no match: one FP and one FN; sky: 4 of 7
    metrics.update(pred, gt)
    assert metrics.rows["1"] == {"cat": [[0.8], 1, 1, True], "sky": [[4 / 7], 0, 0, False]}
    assert metrics.compute() == {
        "All": {"pq": pytest.approx((0.4 + 4 / 7) / 2), "sq": pytest.approx((0.8 + 4 / 7) / 2), "rq": 0.75, "n": 2},
        "Things": {"pq": pytest.approx(0.4), "sq": 0.8, "rq": 0.5, "n": 1},
        "Stuff": {"pq": pytest.approx(4 / 7), "sq": pytest.approx(4 / 7), "rq": 1.0, "n": 1}}


def test_an_iou_of_a_half_is_no_match():
    assert counts(segments("aa..", {"a": "x"}), truth(cells("aaaa", "a"), ["x"])) == {"x": [[], 1, 1, True]}


def test_void_leaves_unions_and_hides_predictions():
    gt = truth(cells("aaa....... bbbbbbbbbb", "ab"), ["x", "y"])  # dots: void
    pred = segments("aaaaaaa.cc bbbbbbbbbb", {"a": "x", "b": "y", "c": "x"})
    assert counts(pred, gt) == {"x": [[1.0], 0, 0, True], "y": [[1.0], 0, 0, True]}
    # the same, said in another way
    ignored = truth(cells("aaabbbbbbb", "ab"), ["x", "y"], ignore=cells("...bbbbbbb", "b")[0])
    row = counts(segments("aaaaaaa.cc", {"a": "x", "c": "x"}), ignored)
    assert row == {"x": [[1.0], 0, 0, True]}
    row = counts(segments(".aa.", {"a": "x"}), truth(cells("..bb", "b"), ["y"]))  # half is too little
    assert row == {"x": [[], 1, 0, None], "y": [[], 0, 1, True]}


def test_crowds_are_neither_missed_nor_matched_and_hide_their_own_class():
    gt = truth(cells("ccccccbb", "cb"), ["x", "y"], crowds=[0])
    row = counts(segments("aaaaaabb", {"a": "x", "b": "y"}), gt)
    assert row == {"y": [[1.0], 0, 0, True]}
    row = counts(segments("aaaaaabb", {"a": "z", "b": "y"}), gt)
    assert row == {"y": [[1.0], 0, 0, True], "z": [[], 1, 0, None]}
    assert counts([], gt) == {"y": [[], 0, 1, True]}
    two = truth(cells("ccccddbb", "cdb"), ["x", "x", "y"], crowds=[0, 1])  # the last of them alone, as panopticapi
    assert counts(segments("aaaa..bb", {"a": "x", "b": "y"}), two)["x"] == [[], 1, 0, True]


def test_what_no_picture_can_tell():
    metrics = PanopticQuality()
    assert metrics.compute()["All"] == {"pq": None, "sq": None, "rq": None, "n": 0}
    gt = truth(cells("aab", "ab"), ["x", "y"])
    pred = segments("abc", {"a": "x", "b": "y", "c": "z"})
    metrics.update(pred, gt)
    assert [metrics.compute()[group]["n"] for group in ("All", "Things", "Stuff")] == [3, 2, 0]
    pred[2]["is_thing"] = False
    metrics.update(pred, truth(gt.masks, gt.labels, id="2"))
    assert [metrics.compute()[group]["n"] for group in ("All", "Things", "Stuff")] == [3, 2, 1]
    known = PanopticQuality()
    known.update(pred[:2] + [pred[2] | {"is_thing": None}],
                 truth(gt.masks, gt.labels, classes={"x": True, "y": True, "z": False}))
    assert known.compute()["Stuff"]["n"] == 1
    nothing = truth(np.zeros((0, 2, 3)), [])
    for pred in ([], segments("aaa bbb", {"a": "x"})):
        assert counts(pred, nothing) == {}


@pytest.mark.parametrize("pred,message", [
    ([("aab", "a", "x"), ("baa", "a", "y")], "overlap"),
    ([("bbb", "a", "x")], r"not empty, got \['x'\] with \[0\] pixels"),
    ([("aab", "a", "q")], r"data set's classes .*, got \['q'\]"), ([("aab bbb", "a", "x")], "one shape"),
])
def test_predictions_that_panoptic_quality_refuses(pred, message):
    gt = truth(cells("aab", "ab"), ["x", "y"], classes={"x": True, "y": True}, id="7")
    with pytest.raises(ValueError, match=message):
        counts([{"mask": cells(text, key)[0], "label": label} for text, key, label in pred], gt)
    with pytest.raises(ValueError, match="picture 7: expected masks that do not overlap"):
        counts([], truth([[[1, 1]], [[0, 1]]], ["x", "x"], id="7"))


# --- against the slow way, on random pictures


def random_picture(rng, id):
    """(predictions, Panoptic) of a picture with void, crowds, broken and invented segments."""
    height, width = rng.integers(12, 30, 2)
    points = rng.uniform(0, 1, (9, 2)) * (height, width)
    y, x = np.mgrid[:height, :width]
    owner = np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in points], 0)
    guess = np.where(rng.random((height, width)) < 0.15, rng.integers(0, 9, (height, width)), owner)
    labels = rng.choice(["a", "b", "c", "d"], 9)
    there = [k for k in range(8) if (owner == k).any()]  # the ninth is void
    crowds = [n for n, k in enumerate(there) if labels[k] in "ab" and rng.random() < 0.3]
    gt = truth([owner == k for k in there], labels[there], crowds, stuff=["c", "d"], id=id,
               classes={"a": True, "b": True, "c": False, "d": False})
    names = np.where(rng.random(9) < 0.2, rng.choice(["a", "b", "c", "d"], 9), labels)
    return [{"mask": guess == k, "label": str(names[k]), "score": float(rng.integers(1, 6)) / 5}
            for k in rng.permutation(9) if (guess == k).any()], gt


def slow_panoptic_quality(pictures):
    """panopticapi's evaluation, written with sets of pixels."""
    total = {}
    for pred, gt in pictures:
        void, crowd_of, matched = ~gt.masks.any(0), {}, set()
        for mask, label, crowd in zip(gt.masks, gt.labels, gt.is_crowd):
            hits = [(k, (s["mask"] & mask).sum() / ((s["mask"] | mask) & ~(s["mask"] & void)).sum())
                    for k, s in enumerate(pred) if s["label"] == label]
            hits = [(k, iou) for k, iou in hits if iou > 0.5 and not crowd]
            matched |= {k for k, _ in hits}
            t = total.setdefault(label, [[], 0, 0])
            t[0] += [iou for _, iou in hits]
            t[2] += not hits and not crowd
            if crowd:
                crowd_of[label] = mask
        for k, s in enumerate(pred):
            hidden = s["mask"] & (void | crowd_of.get(s["label"], False))
            total.setdefault(s["label"], [[], 0, 0])[1] += k not in matched and hidden.sum() / s["mask"].sum() <= 0.5
    return {label: sum(ious) / (len(ious) + fp / 2 + fn / 2) for label, (ious, fp, fn) in total.items()
            if ious or fp or fn}


def test_panoptic_quality_against_sets_of_pixels_and_over_ranks():
    rng = np.random.default_rng(0)
    pictures = [random_picture(rng, str(i)) for i in range(60)]
    whole, ranks = PanopticQuality(), [PanopticQuality() for _ in range(3)]
    for i, picture in enumerate(pictures):
        whole.update(*picture)
        ranks[i % 3].update(*picture)
    slow = slow_panoptic_quality(pictures)
    numbers = whole.compute()
    assert numbers["All"]["pq"] == pytest.approx(np.mean(list(slow.values())), abs=1e-12)
    assert numbers["Things"]["pq"] == pytest.approx((slow["a"] + slow["b"]) / 2, abs=1e-12)
    assert sum(sum(gt.is_crowd) for _, gt in pictures) > 20 and 0.2 < numbers["All"]["pq"] < 0.9
    ranks[0].merge(ranks[2])
    ranks[0].merge(ranks[1])
    assert ranks[0].compute() == numbers
    with pytest.raises(ValueError, match="counted twice: 20, first id '1'"):
        ranks[0].merge(ranks[1])
    with pytest.raises(ValueError, match="counted twice"):
        whole.update(*pictures[3])
    assert whole.compute() == numbers


def slow_average_precision(pictures, low=0, high=1e10):
    """COCOeval's loops, one range of areas. Pictures in the order of their ids."""
    aps = []
    for label in sorted({label for _, gt in pictures for label in gt.labels}):
        for threshold in np.linspace(0.5, 0.95, 10):
            judged, count = [], 0
            for pred, gt in pictures:
                true = [k for k, other in enumerate(gt.labels) if other == label and gt.is_thing[k]]
                areas = [gt.masks[k].sum() for k in true] if gt.areas is None else [gt.areas[k] for k in true]
                skip = [gt.is_crowd[k] or not low <= area <= high for k, area in zip(true, areas)]
                count += skip.count(False)
                taken = set()
                for s in sorted((s for s in pred if s["label"] == label), key=lambda s: -s["score"])[:100]:
                    best, value = None, min(threshold, 1 - 1e-10)
                    for n in sorted(range(len(true)), key=lambda n: skip[n]):
                        if n in taken and not gt.is_crowd[true[n]]:
                            continue
                        if best is not None and not skip[best] and skip[n]:
                            break
                        mask = gt.masks[true[n]]
                        union = s["mask"].sum() if gt.is_crowd[true[n]] else (s["mask"] | mask).sum()
                        iou = (s["mask"] & mask).sum() / union if union else 0
                        if iou >= value:
                            best, value = n, iou
                    if best is not None:
                        taken.add(best)
                        if not skip[best]:
                            judged.append((s["score"], 1))
                    elif low <= s["mask"].sum() <= high:
                        judged.append((s["score"], 0))
            judged = sorted(judged, key=lambda pair: -pair[0])
            found = np.cumsum([right for _, right in judged])
            precision = [found[i] / (i + 1 + np.spacing(1)) for i in range(len(judged))]
            reached = [[p for p, f in zip(precision, found) if f / count >= recall] for recall in np.linspace(0, 1, 101)
                       ] if count else []
            aps += [np.mean([max(values, default=0) for values in reached])] if count else []
    return np.mean(aps) if aps else None


def test_average_precision_against_plain_loops_and_over_ranks():
    rng = np.random.default_rng(1)
    pictures = [random_picture(rng, str(i)) for i in range(25)]
    for _, gt in pictures[::2]:
        gt.areas = [float(mask.sum()) + rng.normal() for mask in gt.masks]
    whole, ranks = AveragePrecision(), [AveragePrecision() for _ in range(2)]
    for i in rng.permutation(25):
        whole.update(*pictures[i])
        ranks[i % 2].update(*pictures[i])
    numbers = whole.compute()
    assert numbers["AP"] == pytest.approx(slow_average_precision(pictures), abs=1e-12) and 0.1 < numbers["AP"] < 0.9
    assert numbers["APl"] is None and numbers["AP50"] > numbers["AP"] > numbers["AP75"]
    ranks[1].merge(ranks[0])
    assert ranks[1].compute() == numbers


@pytest.mark.parametrize("bounds", [(0, 30), (30, 60), (60, 1e10)])
def test_average_precision_of_other_areas(monkeypatch, bounds):
    monkeypatch.setattr(AveragePrecision, "AREAS", {"AP": (0, 1e10), "APs": bounds, "APm": bounds, "APl": bounds})
    rng = np.random.default_rng(2)
    pictures, metrics = [random_picture(rng, str(i)) for i in range(20)], AveragePrecision()
    for picture in pictures:
        metrics.update(*picture)
    assert metrics.compute()["APm"] == pytest.approx(slow_average_precision(pictures, *bounds), abs=1e-12)


def test_average_precision_by_hand():
    gt = truth(cells("aab. bbb.", "ab"), ["x", "x"])
    masks = cells("aab. bbc.", "cba")
    pred = [{"mask": mask, "label": "x", "score": score} for mask, score in zip(masks, (0.9, 0.8, 0.7))]
    metrics = AveragePrecision()
    metrics.update(pred, gt)
    # false, IoU 3/4, IoU 1: precision 2/3 for every recall up to 0.75; above it the second is false as well
    assert metrics.compute() == {"AP50": pytest.approx(2 / 3), "AP75": pytest.approx(2 / 3), "APm": None, "APl": None,
                                 "AP": pytest.approx((6 * 2 / 3 + 4 * 51 / 101 / 3) / 10), "APs": pytest.approx(
                                     (6 * 2 / 3 + 4 * 51 / 101 / 3) / 10)}
    assert AveragePrecision().compute() == dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"))


def test_the_hundred_and_first_prediction_does_not_count():
    gt = truth(cells("ab", "a"), ["x"])
    wrong = [{"mask": cells("ab", "b")[0], "label": "x", "score": 0.5}] * 100
    for others, ap in ((wrong[:99], 0.01), (wrong, 0.0)):
        metrics = AveragePrecision()
        metrics.update([*others, {"mask": cells("ab", "a")[0], "label": "x", "score": 0.4}], gt)
        assert metrics.compute()["AP"] == pytest.approx(ap)


def test_a_crowd_takes_any_number_and_no_detection_of_stuff_counts():
    gt = truth(cells("aaaaaabbcc", "abc"), ["x", "x", "sky"], crowds=[0], stuff=["sky"])
    pred = segments("ddeeffggcc", {"d": "x", "e": "x", "f": "x", "g": "x", "c": "sky"})
    metrics = AveragePrecision()
    metrics.update([s | {"score": 0.9 - k / 10} for k, s in enumerate(pred)], gt)
    assert metrics.compute()["AP"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="scores must be finite"):
        metrics.update([pred[0] | {"score": float("nan")}], gt)
    with pytest.raises(ValueError, match="counted twice"):
        metrics.update([], gt)
