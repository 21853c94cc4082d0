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
