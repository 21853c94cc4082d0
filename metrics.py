"""Masks in, numbers out: IoU, its averages over a set (cIoU, gIoU, mIoU) and the average Hausdorff distance. For all
segments of a picture at once: panoptic quality (PQ) and COCO's average precision (AP).

    python metrics.py predictions/ masks/                       # PRED_DIR GT_DIR: two folders of masks
    python metrics.py predictions/ masks/ --json numbers.json
    python metrics.py out_masks/refcoco-val.jsonl               # adds up again what `sample.py --dataset` wrote

Masks are PNG files, paired by name without ending: PRED_DIR/cat.png with GT_DIR/cat.png. Each must have a
counterpart of the same size; files that are not .png are not looked at. A mask has one channel (1 bit, grey of 8 or
16 bits, or a palette, which is first turned to grey). 0 is background and any other value is object, also 255: there
is no "ignore" value. A file with values other than 0 and one more, or 0, 1 and 255, is no mask; the run stops there.

    I, U    pixels in the intersection, in the union, of prediction and ground truth
    IoU     I / U of one example; 1 for two empty masks, 0 for one empty mask
    cIoU    sum of I / sum of U over all examples (elsewhere oIoU)
    gIoU    mean of IoU over the examples (LISA's name; not the generalized IoU of boxes)
    mIoU    mean over the labels of (sum of I / sum of U over the examples of that label); file names hold no label
    Pr@t    share of the examples with IoU >= t
    AHD     average Hausdorff distance of the boundaries X and Y: 1/2 (mean over x of min |x - y| + the same over y)
    mAHD@t  mean AHD of the examples with IoU > t, in pixels of a 256 x 256 picture; lower is better
    pairs   how many examples a number is the mean of; "-" (null in JSON) is a number that is not defined

cIoU, gIoU and the rule for empty masks follow LISA (train_ds.py, validate; utils/utils.py, intersectionAndUnionGPU),
per expression and at the picture's own size. The formula of AHD, its 256 pixels and its thresholds follow the paper.
Exit code: 0 fine; 1 something is wrong with the files, and one line "error: ..." says what; 2 wrong usage.
"""

import argparse
import json
import math
import os
import re
import stat
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# Pillow refuses pictures above 179 megapixels. Its warning about those above 89 would only disturb the output.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

AHD_SIDE = 256
# Literals, not arange(0.5, 1, 0.1): that gives 0.7999999999999999, which an IoU of exactly 4/5 would exceed.
AHD_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def _masks(**named):
    """The named arrays as bool (H, W) of one shape, in the order given; ValueError that names the odd one."""
    for name, mask in named.items():
        named[name] = mask = np.asarray(mask)
        if mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"{name} must be a mask (H, W) with at least one pixel, got shape {mask.shape}")
        kind = mask.dtype.kind
        if kind not in "biu" or kind != "b" and (mask.min() < 0 or mask.max() > 1):
            found = _some_values(np.unique(mask)) if kind in "iu" else f"dtype {mask.dtype}"
            raise ValueError(f"{name} must be bool or integers in {{0, 1}}, got {found}")
    if len({mask.shape for mask in named.values()}) > 1:
        shapes = ", ".join(f"{name} {mask.shape}" for name, mask in named.items())
        raise ValueError(f"masks must have one shape, got {shapes}")
    return [mask.astype(bool, copy=False) for mask in named.values()]


def _some_values(values):
    return f"the values {', '.join(str(v) for v in values[:6])}{', ...' if len(values) > 6 else ''}"


def iou(pred, gt) -> float:
    """Intersection over union of two masks (H, W), in [0, 1]. Two empty masks agree: IoU 1 (LISA; LAVT counts 0). One
    empty mask: IoU 0. ValueError for different shapes and for anything but bool or integers in {0, 1}."""
    pred, gt = _masks(pred=pred, gt=gt)
    return float(_ratio(np.count_nonzero(pred & gt), np.count_nonzero(pred | gt)))


def _ratio(intersection, union):
    return intersection / union if union else 1.0


def boundary(mask) -> np.ndarray:
    """The pixels of a mask (H, W) that have a 4-neighbour outside the mask, as bool (H, W). Outside the picture counts
    as outside: a full mask's boundary is the picture's frame. ValueError as in `iou`. Paper: which pixels form the
    boundary is not stated; we use this (MedPy's default erosion gives the same)."""
    (mask,) = _masks(mask=mask)
    interior = np.zeros_like(mask)  # a pixel at the picture's edge is never interior
    interior[1:-1, 1:-1] = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return mask & ~interior


def average_hausdorff_distance(pred, gt) -> float:
    """AHD between the boundaries of two masks (H, W), in pixels of these masks; nan if either is empty. ValueError as
    in `iou`. It is the mean of two means, as the paper writes it, not the mean over both point sets pooled (MedPy assd,
    MONAI symmetric)."""
    masks = _masks(pred=pred, gt=gt)
    if not all(mask.any() for mask in masks):
        return math.nan
    # rows and columns (n, 2) of the boundaries; np.argwhere takes three times as long
    points = [np.stack(np.divmod(np.flatnonzero(boundary(mask)), float(mask.shape[1])), axis=1) for mask in masks]
    x_to_y, y_to_x = _nearest(*points)
    return float((x_to_y.mean() + y_to_x.mean()) / 2)


def _nearest(x, y):
    """Distance of each point of x (n, 2) to the nearest of y (m, 2), and the other way round; float64."""
    if len(x) * len(y) > 4_000_000 or max(x.max(), y.max()) > 2000:
        from scipy.spatial import cKDTree  # takes a third of a second

        return cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]
    # For the usual few hundred points a table of all squared distances takes 0.6 of the trees' time. It is one matrix
    # product, (r, c, r^2 + c^2, 1) of x times (-2 r, -2 c, 1, r^2 + c^2) of y: integers that float32 holds exactly.
    rows, columns = np.ones((len(x), 4), np.float32), np.ones((len(y), 4), np.float32)
    rows[:, :2], rows[:, 2] = x, (x**2).sum(1)
    columns[:, :2], columns[:, 3] = -2 * y, (y**2).sum(1)
    table = rows @ columns.T  # (n, m)
    return [np.sqrt(table.min(axis).astype(np.float64)) for axis in (1, 0)]


def ahd_256(pred, gt) -> float:
    """AHD in pixels of a 256 x 256 picture, so that sizes compare; nan if either mask is, or becomes, empty; ValueError
    as in `iou`. Square masks: AHD on the given grid times 256 / side, which loses no detail. Others: both are first
    resized to 256 x 256 with the nearest pixel, source index floor((i + 0.5) n / 256) (PIL's NEAREST, torch's
    nearest-exact); that can make a thin object vanish. Paper: distances are at 256 pixels, how other sizes get there is
    not stated; we use this."""
    pred, gt = _masks(pred=pred, gt=gt)
    height, width = pred.shape
    if height == width:
        return average_hausdorff_distance(pred, gt) * (AHD_SIDE / height)
    odd = 2 * np.arange(AHD_SIDE) + 1  # 2 (i + 0.5): integers, so floor is exact
    grid = np.ix_(odd * height // (2 * AHD_SIDE), odd * width // (2 * AHD_SIDE))
    return average_hausdorff_distance(pred[grid], gt[grid])


def box_areas(boxes):
    """Boxes (M, 4), x0 y0 x1 y1 -> areas (M,); 0 if x1 <= x0 or y1 <= y0."""
    return (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)


def box_iou(a, b):
    """Boxes (D, 4) and (M, 4), x0 y0 x1 y1 -> IoU (D, M) float64; 0 where both are empty."""
    x0, y0, x1, y1 = a.T[:, :, None]
    inter = ((np.minimum(x1, b[:, 2]) - np.maximum(x0, b[:, 0])).clip(0)
             * (np.minimum(y1, b[:, 3]) - np.maximum(y0, b[:, 1])).clip(0))
    union = box_areas(a)[:, None] + box_areas(b) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


class SegmentationMetrics:
    """Gathers examples one by one and gives the numbers of the whole set. One row per example is kept, no masks, so the
    object pickles and can be gathered from all ranks and merged: the numbers do not depend on the order.

        metrics = SegmentationMetrics()
        metrics.update(pred, gt, label="dog", id="000042")
        metrics.compute()["gIoU"]
    """

    def __init__(self):
        self.rows = []  # (I, U, label, AHD at 256 pixels or nan)
        self._seen = set()  # (id, label) of the examples that have an id

    def update(self, pred, gt, label=None, id=None, ignore=None):
        """Add one example: masks pred and gt (H, W), best at the picture's own size. Returns the row that was added.

        label   the class name, for mIoU; None: the example does not enter mIoU
        id      one per picture and phrase; an (id, label) seen before raises ValueError. None: not checked
        ignore  mask (H, W), True where nothing is scored: those pixels become background in both masks. They
                leave I and U; a mask that reaches into them ends at their edge and has boundary there

        Two empty masks (of what is scored) have IoU 1 and add nothing to cIoU and mIoU. ValueError also as in `iou`.
        """
        pred, gt, *ignored = _masks(pred=pred, gt=gt, **({} if ignore is None else {"ignore": ignore}))
        for mask in ignored:
            pred, gt = pred & ~mask, gt & ~mask
        intersection, union = int(np.count_nonzero(pred & gt)), int(np.count_nonzero(pred | gt))
        # The distance is the slow part, and no threshold asks for it at or below the lowest.
        scored = _ratio(intersection, union) > AHD_THRESHOLDS[0]
        self.add(intersection, union, ahd_256(pred, gt) if scored else math.nan, label, id)
        return self.rows[-1]

    def add(self, intersection, union, ahd, label=None, id=None):
        """Add one example by its numbers: I, U and AHD at 256 pixels (None or nan: none), as `update` counts them."""
        if id is not None and (id, label) in self._seen:
            raise ValueError(f"example counted twice: id {id!r}, label {label!r}")
        self.rows.append((intersection, union, label, math.nan if ahd is None else ahd))
        if id is not None:
            self._seen.add((id, label))

    def merge(self, other):
        """Add another rank's examples. An (id, label) on both sides raises ValueError and changes nothing; this catches
        a sampler that pads its last batch with repeated examples."""
        if twice := sorted(self._seen & other._seen, key=str):
            raise ValueError(f"examples counted twice: {len(twice)}, first id {twice[0][0]!r}, label {twice[0][1]!r}")
        self.rows += other.rows
        self._seen |= other._seen

    def compute(self) -> dict:
        """The numbers of all examples so far; the keys are always the same, an undefined number is None.

        "cIoU", "gIoU", "mIoU" and "Pr@0.5" to "Pr@0.9" are fractions in [0, 1], "mAHD@0.5" to "mAHD@0.9" pixels at 256.
        "count" is the number of examples, "count@t" of those in mAHD@t; fewer make mAHD look better, so report both.
        Labels whose summed U is 0 are left out of mIoU. An example in which a mask is empty has no AHD and is in no
        count@t, even if both are empty (IoU 1). Paper: whether IoU = t counts is not stated; we use IoU > t.
        """
        intersections, unions = Counter(), Counter()  # summed by label
        for i, u, label, _ in self.rows:
            intersections[label] += i
            unions[label] += u
        ious = [_ratio(i, u) for i, u, _, _ in self.rows]
        numbers = {
            "cIoU": intersections.total() / unions.total() if unions.total() else None,
            "gIoU": _mean(ious),
            "mIoU": _mean([intersections[label] / u for label, u in unions.items() if label is not None and u]),
            "count": len(ious),
        }
        for t in AHD_THRESHOLDS:
            chosen = [ahd for iou, (*_, ahd) in zip(ious, self.rows) if iou > t and not math.isnan(ahd)]
            numbers |= {f"Pr@{t}": _mean([iou >= t for iou in ious]), f"mAHD@{t}": _mean(chosen)}
            numbers[f"count@{t}"] = len(chosen)
        return numbers


def _mean(values):
    # fsum rounds once, at the end: the same examples in another order give the same float.
    return math.fsum(values) / len(values) if values else None


# ---- all segments of a picture: panoptic quality and average precision ----------------------------------------------


class _Pictures:
    """What PQ and AP share: `rows`, the little that is kept of each picture, {id: {label: tuple}}."""

    def __init__(self):
        self.rows = {}

    def merge(self, other):
        """Add another rank's pictures. A picture on both sides raises ValueError and changes nothing."""
        self._add(other.rows)

    def _add(self, rows):
        if twice := sorted(self.rows.keys() & rows.keys()):
            raise ValueError(f"pictures counted twice: {len(twice)}, first id {twice[0]!r}")
        self.rows |= rows

    def _columns(self):
        """The tuples of each label as columns, pictures in COCO's order, which decides between equal scores."""
        rows = [self.rows[id] for id in sorted(self.rows, key=lambda id: (len(id), id))]
        return [zip(*(row[label] for row in rows if label in row)) for label in set().union(*rows)]


def _predicted(pred, gt):
    """The masks of a list of {"mask", ...} as bool (P, H, W); ValueError unless all have the size of gt's."""
    size = gt.masks.shape[1:]
    masks = {f"picture {gt.id}: predicted mask {k}": segment["mask"] for k, segment in enumerate(pred)}
    return np.array(_masks(picture=np.zeros(size, bool), **masks)[1:], bool).reshape(-1, *size)


def _shared(masks, others):
    """Masks (n, H, W) and (m, H, W) -> how many pixels each two have in common, (n, m)."""
    return np.array([[np.count_nonzero(a & b) for b in others] for a in masks], int).reshape(len(masks), len(others))


class PanopticQuality(_Pictures):
    """PQ, SQ and RQ of a set of pictures (Kirillov et al. 2019), by the rules of panopticapi's evaluation.py.

    A predicted and a true segment of one class match if their IoU exceeds 0.5; each has at most one match. Per class:

        SQ = mean IoU of the matches    RQ = TP / (TP + FP / 2 + FN / 2)    PQ = SQ * RQ

    Void, the pixels of no true segment and of gt.ignore, is taken out of unions. A crowd matches nothing and is never
    missed (FN). An unmatched prediction with more than half of its pixels on void or on the crowd of its class is no
    FP; of several crowds of a class panopticapi looks at the last alone, and so does this.
    """

    def update(self, pred, gt):
        """Add one picture. pred: list of {"mask" (H, W), "label"}, without overlaps; gt: a data.Panoptic.

        A true segment without a scored pixel is not counted. Whether a class that is nowhere true is a thing is said by
        gt.classes or "is_thing" of the prediction; if by neither, it counts in "All" alone.
        ValueError for overlaps, a predicted mask that is empty or of another size, a label that is not in gt.classes.
        """
        masks, labels = _predicted(pred, gt), [segment["label"] for segment in pred]
        areas, there, known = masks.sum((1, 2)), gt.masks.any(0), gt.classes or {}
        if (np.count_nonzero(masks.any(0)) < areas.sum() or np.count_nonzero(there) < np.count_nonzero(gt.masks)
                or not areas.all() or not {*labels} <= {*(known or labels)}):
            raise ValueError(f"picture {gt.id}: expected masks that do not overlap and predictions of the data set's "
                             f"classes that are not empty, got {labels} with {areas.tolist()} pixels")
        scored = there if gt.ignore is None else there & ~gt.ignore
        true, void = gt.masks & scored, areas - (masks & scored).sum((1, 2))
        shared, true_areas = _shared(true, masks), true.sum((1, 2))
        ious = shared / np.maximum(true_areas[:, None] + areas - shared - void, 1)  # (true segments, predictions)
        things = {s["label"]: s.get("is_thing") for s in pred} | dict(zip(gt.labels, gt.is_thing)) | known
        row = {label: [[], 0, 0, is_thing] for label, is_thing in things.items()}  # IoUs of the matches, FP, FN
        hidden, matched = void.copy(), set()  # hidden: pixels of each prediction on void or on the crowd of its class
        for k, label in enumerate(gt.labels):
            same = [j for j, other in enumerate(labels) if other == label]
            if gt.is_crowd[k]:
                hidden[same] = void[same] + shared[k, same]
            elif true_areas[k]:
                match = [j for j in same if ious[k, j] > 0.5]
                matched.update(match)
                row[label][0] += ious[k, match].tolist()
                row[label][2] += not match
        for j, label in enumerate(labels):
            row[label][1] += j not in matched and bool(hidden[j] / areas[j] <= 0.5)
        self._add({gt.id: {label: kept for label, kept in row.items() if any(kept[:3])}})

    def compute(self) -> dict:
        """{"All", "Things", "Stuff": {"pq", "sq", "rq", "n"}}: means over the n classes with TP + FP + FN > 0, in
        [0, 1], None where n is 0. SQ is 0 for a class without a match, as panopticapi has it.
        """
        quality = {"All": [], "Things": [], "Stuff": []}
        for ious, false, missed, things in self._columns():
            ious = list(chain(*ious))
            sq, rq = _mean(ious) or 0.0, len(ious) / (len(ious) + sum(false) / 2 + sum(missed) / 2)
            for group in ("All", *(["Things"] if True in things else ["Stuff"] if False in things else [])):
                quality[group].append((sq * rq, sq, rq))
        return {group: {name: _mean([values[k] for values in found]) for k, name in enumerate(("pq", "sq", "rq"))}
                | {"n": len(found)} for group, found in quality.items()}


class AveragePrecision(_Pictures):
    """COCO's average precision of masks, as pycocotools' COCOeval computes it by default.

    Per picture and class the 100 predictions of the highest scores each take, in the order of their scores, the free
    true object of the highest IoU, if it reaches a threshold of 0.50, 0.55 ... 0.95. Precision, made to fall with
    recall, is read at the 101 recalls 0, 0.01 ... 1. AP is its mean over recalls, thresholds and classes; APs, APm and
    APl are those of small, medium and large objects. Crowds and objects of other areas are neither found nor missed: a
    prediction that takes one of those is left out, and so is one of another area that takes none. Many may take one
    crowd, and their IoU is their share that lies on it. Stuff and gt.ignore play no part.
    """

    AREAS = {"AP": (0, 1e10), "APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e10)}  # in pixels
    THRESHOLDS = np.linspace(0.5, 0.95, 10)  # with the areas K = 40 ways to count

    def update(self, pred, gt):
        """Add one picture. pred: list of {"mask" (H, W), "label", "score"}; gt: a data.Panoptic; masks may overlap.
        ValueError for a mask of another size, a score that is not finite, a picture seen before."""
        masks, scores = _predicted(pred, gt), np.array([segment["score"] for segment in pred], np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"picture {gt.id}: the scores must be finite, got {scores.tolist()}")
        areas = gt.masks.sum((1, 2)) if gt.areas is None else np.array(gt.areas)
        things = [label if is_thing else None for label, is_thing in zip(gt.labels, gt.is_thing)]
        is_crowd, row = np.array(gt.is_crowd, bool), {}
        for label in {*things, *(segment["label"] for segment in pred)} - {None}:
            d = [k for k in np.argsort(-scores, kind="stable") if pred[k]["label"] == label][:100]
            g = [k for k, other in enumerate(things) if other == label]
            row[label] = scores[d], *self._match(masks[d], gt.masks[g], is_crowd[g], areas[g])
        self._add({gt.id: row})

    def _match(self, masks, true, is_crowd, true_areas):
        """Predictions (D, H, W) in the order of their scores and true objects (G, H, W) of a class -> verdicts
        int8 (D, K), 1 found, 0 false, -1 left out, and how many objects there are to be found, (K,)."""
        shared, areas = _shared(masks, true), masks.sum((1, 2))
        ious = shared / np.maximum(areas[:, None] + np.where(is_crowd, 0, true.sum((1, 2)) - shared), 1)
        least = np.tile(self.THRESHOLDS, len(self.AREAS))[:, None]
        low, high = np.repeat([*self.AREAS.values()], len(self.THRESHOLDS), 0).T[:, :, None]  # (K, 1) as least
        verdicts = -((areas < low) | (areas > high)).T.astype(np.int8)
        skip = is_crowd | (true_areas < low) | (true_areas > high)  # (K, G)
        free = np.ones(skip.shape, bool)
        for d in np.flatnonzero(ious.max(1, initial=0) >= least[0]):
            # An object that is scored comes before all that are not, and of equal ones the last is taken.
            value = np.where(free & (ious[d] >= least), ious[d] + 2.0 * ~skip, -1)
            k = np.flatnonzero(value.max(1) >= 0)
            g = len(true) - 1 - value[k, ::-1].argmax(1)
            verdicts[d, k] = np.where(skip[k, g], -1, 1)
            free[k, g] = is_crowd[g]
        return verdicts, (~skip).sum(1)

    def compute(self) -> dict:
        """{"AP", "AP50", "AP75", "APs", "APm", "APl"} in [0, 1]; None where no class has a true object of that area."""
        aps = []  # (K,) of each class
        for scores, verdicts, objects in self._columns():
            order, objects = np.argsort(-np.concatenate(scores), kind="stable"), sum(objects)
            found, false = ((np.concatenate(verdicts)[order] == verdict).cumsum(0) for verdict in (1, 0))
            precision = np.maximum.accumulate((found / (found + false + np.spacing(1)))[::-1])[::-1]
            precision = np.append(precision, np.zeros((1, len(objects))), 0)  # 0 where recall never gets
            aps.append(np.full(len(objects), math.nan))
            for k in np.flatnonzero(objects):
                aps[-1][k] = precision[np.searchsorted(found[:, k] / objects[k], np.linspace(0, 1, 101)), k].mean()
        aps = np.reshape(aps, (-1, len(self.AREAS), len(self.THRESHOLDS)))
        chosen = {"AP": aps[:, 0], "AP50": aps[:, 0, 0], "AP75": aps[:, 0, 5],
                  "APs": aps[:, 1], "APm": aps[:, 2], "APl": aps[:, 3]}
        return {name: _mean(values[~np.isnan(values)].tolist()) for name, values in chosen.items()}


# ---- what all commands share ----------------------------------------------------------------------------------------


class BadUsage(ValueError):
    """A name, split or option that does not exist: the command ends with exit code 2, not 1."""


@contextmanager
def whole(path):
    """Yield a temporary path beside `path`. It is renamed to `path`, or removed if the block ends with an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as a JSON file, or to standard output for "-"."""
    text = json.dumps(value, indent=2, allow_nan=False)
    if path == "-":
        print(text)
    else:
        with whole(path) as temporary:
            temporary.write_text(text + "\n")


def printable(text) -> str:
    """Text for a terminal: control characters and halves of surrogate pairs become escapes such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def parse_json(content):
    """JSON (UTF-8 bytes or str) -> value; ValueError with one line for everything that is wrong with it."""
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89abcdefABCDEF]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    return value


def regular(path):
    """The path itself; ValueError for a folder, a pipe or a device: reading a pipe can wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a folder, a pipe or a device, not a file")
    return path


class Parser(argparse.ArgumentParser):
    """The argument parser of all scripts: an error is one line, and a flag must be written in full."""

    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for before, arg in zip(["", *args], args):
            if arg == "" or re.fullmatch("--[a-z-]+=", arg):
                self.error(f"the argument {arg or 'after ' + before} is empty")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (all flags: {self.prog} --help)\n")

    def run(self, job, *args, stopped="stopped"):
        """Run the job of a command. Returns the exit code: the job's or 0, 1 for bad data, 130 after Ctrl-C."""
        try:
            code = job(*args) or 0
            print(end="", flush=True)
            return code
        except BadUsage as error:
            self.error(str(error))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes to it again at its exit
            return 1
        except (ValueError, OSError) as error:
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
            return 130

    def check_read(self, args, job, names):
        """Error for a flag that was given although `job` does not read it; names: of the flags that it reads."""
        for action in self._actions:
            if action.dest not in names and getattr(args, action.dest, action.default) != action.default:
                self.error(f"{action.option_strings[0]} has no use with {job}")


# ---- command --------------------------------------------------------------------------------------------------------


def values_in(labels):
    """The sorted values in an integer array. Small ones are counted: np.unique sorts all pixels, which is slow."""
    if labels.min(initial=0) < 0 or labels.max(initial=0) > 65535:
        return np.unique(labels).tolist()
    return np.flatnonzero(np.bincount(labels.ravel())).tolist()


def read_mask(path):
    """The PNG at path as bool (H, W), by the rules at the top; ValueError names the file and what it holds."""
    try:
        with Image.open(regular(path), formats=["PNG"]) as picture:
            if picture.mode == "P":
                picture = picture.convert("L")  # by its colours: index 0 of a palette need not be black
            mode, pixels = picture.mode, np.asarray(picture)
    except Exception as error:  # Pillow meets damage with OSError, SyntaxError, ValueError, zlib.error, ...
        raise ValueError(f"{path}: not a readable PNG ({type(error).__name__}: {error})") from error
    if pixels.ndim != 2:
        raise ValueError(f"{path}: a mask has one channel, this picture has mode {mode}")
    values = values_in(pixels)
    if len(set(values) - {0}) > 1 and not set(values) <= {0, 1, 255}:
        raise ValueError(f"{path}: a mask holds 0 and one other value, this holds {_some_values(values)}")
    return pixels != 0


def _compare_folders(pred_dir, gt_dir):
    files = [sorted((path for path in folder.iterdir() if path.suffix.lower() == ".png"), key=lambda path: path.stem)
             for folder in (pred_dir, gt_dir)]
    preds, gts = (Counter(path.stem for path in paths) for paths in files)
    odd = sorted(stem for stem in preds | gts if not preds[stem] == gts[stem] == 1)
    if odd or not preds:
        name = odd[0] if odd else "*"
        raise ValueError(f"each mask must be one PNG in both folders: {name}.png is {preds[name]} times in {pred_dir}, "
                         f"{gts[name]} times in {gt_dir} ({len(odd)} such names)")
    metrics = SegmentationMetrics()
    # disable=None: no bar when stderr is a file; `with` ends the bar's line before an error is printed.
    with tqdm(zip(*files), total=len(preds), unit="pair", disable=None) as pairs:
        for paths in pairs:
            pred, gt = map(read_mask, paths)
            if pred.shape != gt.shape:
                raise ValueError(f"{paths[0]}, {paths[1]}: different sizes, {pred.shape} and {gt.shape}")
            metrics.update(pred, gt)
    return metrics.compute()


def read_records(path):
    """Lines of a .jsonl that sample.py --dataset wrote -> (header, list of records); ValueError names a broken line.
    A last line without its end, as a killed run leaves it, is not counted."""
    read = []
    with open(regular(path), "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = parse_json(line)
                read.append({**record["run"]} if number == 1 else _check_record(record))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}: line {number} is not what sample.py writes: {error!r:.200}") from None
    if not read:
        raise ValueError(f"{path}: empty, expected what sample.py --dataset writes")
    return read[0], read[1:]


def _check_record(record):
    """The record; KeyError, TypeError or ValueError unless it is broken or an example can have its numbers."""
    if {"broken", "segments"}.isdisjoint(record):  # what could not be opened, or is segvar.py's, has no numbers
        fits = 0 <= record["intersection"] <= record["union"] < math.inf and 0 <= (record["ahd"] or 0) <= 2 * AHD_SIDE
        texts = isinstance(record["label"], str | None) and all(isinstance(record[key], str) for key in ("id", "task"))
        if not (fits and texts):
            raise ValueError("intersection, union, ahd, label, id or task is out of range or of another type")
    return record


def add_up(records):
    """Records of read_records -> (SegmentationMetrics of all that are not broken, {task: SegmentationMetrics})."""
    total, by_task = SegmentationMetrics(), {}
    for r in (record for record in records if "broken" not in record):
        for metrics in (total, by_task.setdefault(r["task"], SegmentationMetrics())):
            metrics.add(r["intersection"], r["union"], r["ahd"], r["label"], r["id"])
    return total, by_task


def _add_up_file(path):
    """The numbers of a .jsonl of sample.py; ValueError unless it has all examples of its run."""
    header, records = read_records(path)
    if any("segments" in record for record in records):
        raise ValueError(f"{path}: holds all segments of pictures, whose numbers segvar.py writes")
    count = header.get("count")
    if count is not None and not len(records) == len({record["index"] for record in records}) == count:
        raise ValueError(f"{path}: {len(records)} records of a run over {count} examples: let the run end first")
    numbers = add_up(records)[0].compute()
    if numbers["count"] < len(records):
        print(f"{len(records) - numbers['count']} of {len(records)} examples are broken and left out")
    return numbers


def compare(pred, gt, json_file):
    """Print the numbers of two folders of masks or, without `gt`, of a .jsonl; write them to a file if one is given."""
    numbers = _compare_folders(pred, gt) if gt else _add_up_file(pred)
    print("metric       value   pairs")
    for key in ("cIoU", "gIoU", "mIoU", *(f"{kind}@{t}" for kind in ("Pr", "mAHD") for t in AHD_THRESHOLDS)):
        value, pairs = numbers[key], numbers[f"count{key[4:]}" if key.startswith("mAHD") else "count"]
        pairs = 0 if value is None else pairs
        print(f"{key:<8} {'-' if value is None else f'{value:.4f}':>9} {pairs:>7}")
    if json_file:
        write_json(json_file, numbers)


def main(argv=None) -> int:
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage (argparse)."""
    parser = Parser(description=__doc__)
    parser.add_argument("pred_dir", metavar="PRED_DIR", type=Path, help="folder of predicted masks, or a .jsonl")
    parser.add_argument("gt_dir", metavar="GT_DIR", type=Path, nargs="?", help="folder of ground-truth masks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to FILE, unrounded")
    args = parser.parse_args(argv)
    if args.json and args.json.suffix.lower() in (".png", ".jsonl"):
        parser.error(f"--json {args.json}: a name as masks and records have it, which this could overwrite")
    if args.gt_dir is None and args.pred_dir.suffix != ".jsonl":
        parser.error("GT_DIR is missing: give two folders, or one .jsonl that sample.py --dataset wrote")
    return parser.run(compare, args.pred_dir, args.gt_dir, args.json)


if __name__ == "__main__":
    sys.exit(main())
