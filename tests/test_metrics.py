"""metrics.py against stored numbers, brute force, and masks small enough to work out by hand."""

import json
import math
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metrics
from metrics import SegmentationMetrics, ahd_256, average_hausdorff_distance, boundary, iou

REPO = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "ahd"
STORED = json.loads((FIXTURES / "ahd.json").read_text())
CASES = STORED["cases"]
with np.load(FIXTURES / "masks.npz") as archive:
    MASKS = {name: archive[name] for name in archive.files}  # uint8 {0, 1}
KEYS = {"cIoU", "gIoU", "mIoU", "count"} | {f"{n}@0.{d}" for n in ("Pr", "mAHD", "count") for d in range(5, 10)}


def draw(text):
    """'#' is object; one row of the mask per line."""
    return np.array([[c == "#" for c in line] for line in text.split()])


def square(top, left, side=3, size=6):
    mask = np.zeros((size, size), bool)
    mask[top:top + side, left:left + side] = True
    return mask


def random_pairs(count=30, seed=0):
    """Small masks of all densities, square and not, neither empty."""
    rng = np.random.default_rng(seed)
    while count:
        shape = rng.integers(1, 13, 2)
        pred, gt = (rng.random(shape) < rng.random() for _ in range(2))
        if pred.any() and gt.any():
            count -= 1
            yield pred, gt


def brute_boundary(mask):
    height, width = mask.shape
    out = np.zeros_like(mask)
    for r in range(height):
        for c in range(width):
            for rr, cc in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if not (0 <= rr < height and 0 <= cc < width and mask[rr, cc]):
                    out[r, c] = mask[r, c]
    return out


def brute_ahd(pred, gt):
    x, y = (np.argwhere(brute_boundary(m)) for m in (pred, gt))
    to_gt = [min(math.dist(a, b) for b in y) for a in x]
    to_pred = [min(math.dist(a, b) for a in x) for b in y]
    return (sum(to_gt) / len(to_gt) + sum(to_pred) / len(to_pred)) / 2


# ---- IoU ---------------------------------------------------------------------------------------------------


def test_iou_by_hand():
    # two 3x3 squares one column apart share 3 x 2 = 6 pixels of 9 + 9 - 6 = 12
    assert iou(square(1, 1), square(1, 2)) == 0.5
    # two 3x3 squares one row and one column apart share 2 x 2 = 4 pixels of 9 + 9 - 4 = 14
    assert iou(square(1, 1), square(2, 2)) == 4 / 14
    assert iou(square(0, 0), square(3, 3)) == 0.0
    # a 3x3 square in a full 6x6 picture
    assert iou(square(1, 1), np.ones((6, 6), bool)) == 0.25


def test_iou_of_empty_masks():
    empty, some = np.zeros((6, 6), bool), square(1, 1)
    assert iou(empty, empty) == 1.0
    assert iou(empty, some) == iou(some, empty) == 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["gt"])
def test_iou_equals_stored(case):
    assert iou(MASKS[case["pred"]], MASKS[case["gt"]]) == pytest.approx(case["iou"], abs=1e-12)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int64, np.uint16])
def test_any_integer_0_1_mask_is_a_mask(dtype):
    pred, gt = square(1, 1).astype(dtype), square(1, 2).astype(dtype)
    assert iou(pred, gt) == 0.5
    assert boundary(pred).dtype == bool


BAD = {
    "0 and 255": (square(1, 1).astype(np.uint8) * 255, "0, 255"),
    "class map": (np.arange(36).reshape(6, 6), "0, 1, 2, 3, 4, 5, ..."),
    "negative": (-square(1, 1).astype(int), "-1, 0"),
    "float": (square(1, 1).astype(np.float32), "float32"),
    "text": (np.full((6, 6), "x"), "<U1"),
    "three axes": (np.ones((1, 6, 6), bool), "(1, 6, 6)"),
    "one axis": (np.ones(6, bool), "(6,)"),
    "no pixels": (np.ones((0, 6), bool), "(0, 6)"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", [iou, average_hausdorff_distance, ahd_256, SegmentationMetrics().update])
def test_what_is_no_mask_is_refused(function, bad):
    mask, found = BAD[bad]
    for name, pair in (("pred", (mask, square(1, 1))), ("gt", (square(1, 1), mask))):
        with pytest.raises(ValueError) as error:
            function(*pair)
        message = str(error.value)
        assert message.startswith(name) and found in message and "\n" not in message


@pytest.mark.parametrize("function", [iou, average_hausdorff_distance, ahd_256, SegmentationMetrics().update])
def test_different_shapes_are_refused_even_if_they_broadcast(function):
    with pytest.raises(ValueError, match=r"pred \(6, 6\), gt \(1, 6\)"):
        function(square(1, 1), np.ones((1, 6), bool))


def test_boundary_refuses_what_is_no_mask():
    with pytest.raises(ValueError, match="float64"):
        boundary(np.zeros((6, 6)))


# ---- boundary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, expected",
    [
        # a 4x4 square: its inner 2x2 has all four neighbours
        ("...... .####. .####. .####. .####. ......", "...... .####. .#..#. .#..#. .####. ......"),
        # in the corner the same square has its picture-side pixels on the boundary too
        ("####.. ####.. ####.. ####.. ...... ......", "####.. #..#.. #..#.. ####.. ...... ......"),
        # a full picture: only its frame
        ("###### ###### ###### ###### ###### ######", "###### #....# #....# #....# #....# ######"),
        # a hole makes boundary of its 4-neighbours, not of the diagonal ones such as (1, 1)
        ("##### ##### ##.## ##### #####", "##### #.#.# ##.## #.#.# #####"),
        # one pixel and a line are all boundary
        ("...... ..#... ......", "...... ..#... ......"),
        ("######", "######"),
        ("...... ......", "...... ......"),
    ],
)
def test_boundary_by_hand(mask, expected):
    np.testing.assert_array_equal(boundary(draw(mask)), draw(expected))


def test_boundary_equals_brute_force():
    for mask, _ in random_pairs():
        np.testing.assert_array_equal(boundary(mask), brute_boundary(mask))


def test_boundary_leaves_its_argument_alone():
    mask = square(1, 1, side=4)
    before = mask.copy()
    boundary(mask)[:] = False
    np.testing.assert_array_equal(mask, before)


# ---- average Hausdorff distance ----------------------------------------------------------------------------


def test_ahd_by_hand():
    # single pixels 3 rows and 4 columns apart: sqrt(9 + 16) both ways
    assert average_hausdorff_distance(square(0, 0, 1), square(3, 4, 1)) == 5.0
    # 3x3 squares one column apart; each boundary is the 8 pixels around the centre.
    #   pred at columns 1..3, gt at columns 2..4: pred's column 1 (3 pixels) is 1 from gt's column 2;
    #   pred's column 2 has its top and bottom on gt's boundary (0), it has no middle (the centre (2, 2));
    #   pred's column 3: top and bottom on gt's boundary (0), the middle is gt's centre: 1 to its neighbours
    #   -> (3 * 1 + 2 * 0 + 2 * 0 + 1) / 8 = 1/2, and the mirror image gives the same the other way
    assert average_hausdorff_distance(square(1, 1), square(1, 2)) == 0.5


def test_ahd_is_the_mean_of_two_means_not_pooled():
    # pred: pixels (0, 0) and (0, 4); gt: pixel (0, 0). One way (0 + 4) / 2 = 2, other way 0: AHD 1.
    # Pooled over the three points it would be 4/3, the maximum of the two means 2.
    assert average_hausdorff_distance(draw("#...#."), draw("#.....")) == 1.0


def test_ahd_of_a_full_picture_reaches_its_frame():
    # gt: pixel (2, 2) of a full 5x5 picture, whose boundary is the frame of 16 pixels around it.
    # gt to pred: 2. pred to gt: 4 pixels at 2, 8 at sqrt(5), 4 corners at sqrt(8).
    frame = (4 * 2 + 8 * math.sqrt(5) + 4 * math.sqrt(8)) / 16
    expected = (2 + frame) / 2
    full, middle = np.ones((5, 5), bool), square(2, 2, 1, 5)
    assert average_hausdorff_distance(full, middle) == pytest.approx(expected, abs=1e-12)


def test_ahd_with_an_empty_mask_is_nan():
    empty, some = np.zeros((6, 6), bool), square(1, 1)
    for function in (average_hausdorff_distance, ahd_256):
        assert all(math.isnan(function(*pair)) for pair in ((empty, some), (some, empty), (empty, empty)))


def test_ahd_equals_brute_force_and_is_symmetric():
    for pred, gt in random_pairs():
        ahd = average_hausdorff_distance(pred, gt)
        assert ahd == pytest.approx(brute_ahd(pred, gt), abs=1e-12)
        assert ahd == average_hausdorff_distance(gt, pred)
        assert average_hausdorff_distance(gt, gt) == 0.0


def test_ahd_of_moved_and_turned_masks_is_the_same():
    for pred, gt in random_pairs(10, seed=1):
        ahd = average_hausdorff_distance(pred, gt)
        for change in (lambda m: np.pad(m, ((5, 1), (2, 7))), np.rot90, np.transpose):
            assert average_hausdorff_distance(change(pred), change(gt)) == pytest.approx(ahd, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["gt"])
def test_ahd_equals_stored(case):
    pred, gt = MASKS[case["pred"]], MASKS[case["gt"]]
    assert np.count_nonzero(boundary(pred)) == case["boundary_points_pred"]
    assert np.count_nonzero(boundary(gt)) == case["boundary_points_gt"]
    assert average_hausdorff_distance(pred, gt) == pytest.approx(case["ahd_pixels"], abs=1e-9)
    assert ahd_256(pred, gt) == pytest.approx(case["ahd_256"], abs=1e-9)
    if case["normalisation"] == "resize":
        assert ahd_256(pred, gt) == average_hausdorff_distance(MASKS[case["pred_256"]], MASKS[case["gt_256"]])


def test_ahd_256_scales_squares_and_resizes_the_rest():
    # square of side 64: pixels 5 apart become 5 * 256 / 64 = 20
    pred, gt = square(0, 0, 1, 64), square(3, 4, 1, 64)
    assert ahd_256(pred, gt) == 20.0
    for height, width in ((7, 5), (100, 256), (256, 100), (400, 300), (333, 1000), (1, 9)):
        pred, gt = (np.random.default_rng(seed).random((height, width)) < 0.3 for seed in (2, 3))
        resized = [np.asarray(Image.fromarray(m).resize((256, 256), Image.Resampling.NEAREST)) for m in (pred, gt)]
        assert ahd_256(pred, gt) == average_hausdorff_distance(*resized)


# ---- SegmentationMetrics -----------------------------------------------------------------------------------


def gathered(examples):
    total = SegmentationMetrics()
    for example in examples:
        total.update(*example[:2], **(example[2] if len(example) > 2 else {}))
    return total


def tenths(k, of=10):
    """A pair whose IoU is exactly k / of: `of` object pixels, k of them found."""
    gt = np.zeros((4, 30), bool)
    gt[1, :of] = True
    pred = gt & (np.arange(30) < k)
    return pred, gt


def test_nothing_yet_has_all_keys_and_is_valid_json():
    numbers = SegmentationMetrics().compute()
    assert set(numbers) == KEYS
    assert all(value == 0 if key.startswith("count") else value is None for key, value in numbers.items())
    json.dumps(numbers, allow_nan=False)


def test_averages_by_hand():
    numbers = gathered([
        (*tenths(8), {"label": "cat"}),  # I 8, U 10
        (*tenths(2), {"label": "cat"}),  # I 2, U 10
        (*tenths(15, 20), {"label": "dog"}),  # I 15, U 20
        (*tenths(1), {}),  # I 1, U 10, no label
    ]).compute()
    assert set(numbers) == KEYS
    assert numbers["cIoU"] == (8 + 2 + 15 + 1) / (10 + 10 + 20 + 10)
    assert numbers["gIoU"] == pytest.approx((0.8 + 0.2 + 0.75 + 0.1) / 4, abs=1e-12)
    # cat (8 + 2) / 20 = 0.5, dog 0.75: the mean over the labels; without the example that has none
    assert numbers["mIoU"] == (0.5 + 0.75) / 2
    assert [numbers[key] for key in ("count", "count@0.5", "count@0.7", "count@0.8")] == [4, 2, 2, 0]
    assert numbers["mAHD@0.8"] is None
    assert [numbers[f"Pr@0.{d}"] for d in range(5, 10)] == [0.5, 0.5, 0.5, 0.25, 0]  # 0.8 reaches 0.8


def test_empty_masks_in_the_averages():
    empty = np.zeros((6, 6), bool)
    # both empty: IoU 1, U 0. One empty: IoU 0, U 9 and 9.
    pairs = [(empty, empty, {"label": "a"}), (empty, square(0, 0), {"label": "b"}), (square(0, 0), empty)]
    numbers = gathered(pairs).compute()
    assert numbers["cIoU"] == 0.0
    assert numbers["gIoU"] == pytest.approx(1 / 3)
    assert numbers["mIoU"] == 0.0  # of b; a has no pixels on either side
    assert (numbers["count"], numbers["count@0.5"], numbers["mAHD@0.5"]) == (3, 0, None)
    numbers = gathered(pairs[:1]).compute()
    assert (numbers["cIoU"], numbers["gIoU"], numbers["mIoU"]) == (None, 1.0, None)


def test_thresholds_are_strict():
    # IoU 0.5, 0.6, ... 0.9 and 1: an example with IoU t is not counted at t
    numbers = gathered([tenths(k) for k in range(5, 11)]).compute()
    assert [numbers[f"count@0.{d}"] for d in range(5, 10)] == [5, 4, 3, 2, 1]
    assert numbers["mAHD@0.9"] == 0.0


def test_mahd_equals_stored():
    pairs = CASES + STORED["empty_cases"]
    numbers = gathered([(MASKS[c["pred"]], MASKS[c["gt"]]) for c in pairs]).compute()
    assert numbers["count"] == 43
    for row in STORED["per_threshold"]:
        assert numbers[f"count@{row['iou_above']}"] == row["pairs"]
        assert numbers[f"mAHD@{row['iou_above']}"] == pytest.approx(row["mAHD"], abs=1e-9)


def test_an_object_that_vanishes_in_256_pixels_is_not_counted():
    # 600 wide: of three columns about one is kept, so a one-pixel column can fall between
    gt = np.zeros((10, 600), bool)
    gt[:, 0] = True  # the first kept column is floor(0.5 * 600 / 256) = 1
    numbers = gathered([(gt, gt)]).compute()
    assert (numbers["gIoU"], numbers["count@0.5"], numbers["mAHD@0.5"]) == (1.0, 0, None)


def test_ignored_pixels_are_background_on_both_sides():
    # gt columns 1..3, pred columns 1..4, rows 1..3; ignoring columns 3 and on leaves both with columns 1..2
    gt, pred = square(1, 1), square(1, 1) | square(1, 2)
    ignore = np.zeros((6, 6), bool)
    ignore[:, 3:] = True
    numbers = gathered([(pred, gt, {"ignore": ignore})]).compute()
    assert numbers["cIoU"] == 1.0 and numbers["mAHD@0.5"] == 0.0
    assert gathered([(pred, gt)]).compute()["cIoU"] == 9 / 12


def test_ignored_pixels_end_the_boundary():
    # rows 1..3: gt columns 0..3, pred columns 1..3; column 3 and on is ignored. Scored are gt 3x3 at columns
    # 0..2, boundary all but its centre (2, 1), and pred 3x2 at columns 1..2, all boundary: IoU 6/9.
    # pred to gt: five points on it, (2, 1) at 1 -> 1/6. gt to pred: column 0 at 1, the rest on it -> 3/8.
    # Had the cut at column 2 no boundary, gt's (2, 2) would not be on it.
    gt, pred, ignore = np.zeros((3, 8, 8), bool)
    gt[1:4, 0:4] = pred[1:4, 1:4] = ignore[:, 3:] = True
    numbers = gathered([(pred, gt, {"ignore": ignore})]).compute()
    assert numbers["cIoU"] == 6 / 9
    assert numbers["mAHD@0.5"] == pytest.approx((1 / 6 + 3 / 8) / 2 * 256 / 8, abs=1e-12)


def test_ignore_must_be_a_mask_of_the_same_shape():
    for ignore, found in ((np.full((6, 6), 255, np.uint8), "255"), (np.ones((6, 5), bool), r"ignore \(6, 5\)")):
        with pytest.raises(ValueError, match=found):
            SegmentationMetrics().update(square(1, 1), square(1, 1), ignore=ignore)


def test_an_id_counts_once_for_each_label():
    total = gathered([(*tenths(8), {"id": "7", "label": "cat"}), (*tenths(8), {"id": "7", "label": "dog"})])
    before = total.compute()
    with pytest.raises(ValueError, match="id '7', label 'cat'"):
        total.update(*tenths(9), id="7", label="cat")
    assert total.compute() == before
    total.update(*tenths(8), id=0)
    with pytest.raises(ValueError, match="id 0, label None"):  # 0 is an id like any other
        total.update(*tenths(8), id=0)
    for _ in range(2):
        total.update(*tenths(8))  # without an id there is nothing to compare
    assert total.compute()["count"] == 5


def test_a_refused_example_leaves_no_trace():
    total = SegmentationMetrics()
    with pytest.raises(ValueError):
        total.update(square(1, 1), np.zeros((6, 6)), id="a")
    total.update(square(1, 1), square(1, 1), id="a")
    assert total.compute()["count"] == 1


def test_merged_ranks_equal_one_process_in_any_order():
    examples = [(*pair, {"id": n, "label": "abc"[n % 3]}) for n, pair in enumerate(random_pairs(40, seed=4))]
    examples += [(gt, gt.copy(), {"id": f"{n}", "label": "d"}) for n, (_, gt) in enumerate(random_pairs(5))]
    examples += [(MASKS[c["pred"]], MASKS[c["gt"]], {"id": c["gt"]}) for c in CASES]
    expected = gathered(examples).compute()
    assert expected["count@0.5"] > 30
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = SegmentationMetrics()
        for rank in order:
            total.merge(pickle.loads(pickle.dumps(gathered(examples[rank::4]))))
        assert total.compute() == expected


def test_merge_refuses_an_example_seen_by_both_ranks():
    one = gathered([(*tenths(8), {"id": "a"}), (*tenths(8), {"id": "b", "label": "cat"})])
    two = gathered([(*tenths(9), {"id": "b", "label": "cat"}), (*tenths(9), {"id": "c"})])
    before = one.compute()
    with pytest.raises(ValueError, match="id 'b', label 'cat'"):
        one.merge(two)
    assert one.compute() == before
    two_again = gathered([(*tenths(9), {"id": "b", "label": "dog"})])
    one.merge(two_again)
    with pytest.raises(ValueError, match="label 'dog'"):  # merged ids are remembered
        one.update(*tenths(9), id="b", label="dog")
    assert two_again.compute()["count"] == 1


# ---- command -----------------------------------------------------------------------------------------------


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)


def run(*args):
    command = [sys.executable, str(REPO / "metrics.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folders(tmp_path):
    """Two folders with the stored square pairs, ground truth as grey 0/255, predictions as 1 bit."""
    for case in CASES:
        if case["normalisation"] == "scale":
            save(tmp_path / "pred" / f"{case['gt']}.png", MASKS[case["pred"]].astype(bool))
            save(tmp_path / "gt" / f"{case['gt']}.png", MASKS[case["gt"]] * 255)
    return tmp_path


def test_command_prints_the_numbers_and_writes_them(folders):
    (folders / "gt" / "README.txt").write_text("not a picture")
    result = run(folders / "pred", folders / "gt", "--json", folders / "out.json")
    assert result.returncode == 0 and result.stderr == ""
    cases = [c for c in CASES if c["normalisation"] == "scale"]
    numbers = json.loads((folders / "out.json").read_text())
    assert set(numbers) == KEYS and numbers["mIoU"] is None and numbers["count"] == len(cases)
    assert numbers["gIoU"] == pytest.approx(np.mean([c["iou"] for c in cases]), abs=1e-12)
    near = [c["ahd_256"] for c in cases if c["iou"] > 0.8]
    assert numbers["mAHD@0.8"] == pytest.approx(np.mean(near), abs=1e-9) and numbers["count@0.8"] == len(near)
    lines = result.stdout.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert [f"{numbers['gIoU']:.4f}", str(len(cases))] == lines[2].split()[1:]
    assert ["mAHD@0.8", f"{numbers['mAHD@0.8']:.4f}", str(len(near))] in [line.split() for line in lines]
    assert ["mIoU", "-", "0"] in [line.split() for line in lines]
    assert sorted(p.name for p in folders.iterdir()) == ["gt", "out.json", "pred"]  # no temporary file stays


def test_command_reports_bad_data_and_wrong_usage_by_exit_code(folders):
    save(folders / "gt" / "gt00.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    result = run(folders / "pred", folders / "gt")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "gt00.png" in result.stderr and "0, 1, 2, 3, 4, 5, ..." in result.stderr
    for args in ((folders / "pred",), (folders / "pred", folders / "gt", "--jso", "x")):
        result = run(*args)
        assert result.returncode == 2 and "error: " in result.stderr and "Traceback" not in result.stderr


def test_help_explains_the_numbers():
    text = run("--help").stdout
    assert all(word in text for word in ("PRED_DIR", "GT_DIR", "--json", "mAHD@t", "Exit code", "255"))


# The other cases call main() itself: starting an interpreter for each would take the suite's time.
A = square(1, 1).astype(np.uint8)


KINDS = {"0 1": A, "0 255": A * 255, "0 7": A * 7, "1 bit": A.astype(bool), "16 bit": A.astype(np.uint16) * 65535,
         "0 1 255": np.where(A == 1, np.where(np.eye(6), 1, 255), 0).astype(np.uint8)}  # all but 0 is object


@pytest.mark.parametrize("array", KINDS.values(), ids=KINDS)
def test_command_reads_every_kind_of_mask(tmp_path, array, capsys):
    save(tmp_path / "pred" / "a.png", array)
    save(tmp_path / "gt" / "a.PNG", A * 255)
    assert metrics.main([str(tmp_path / "pred"), str(tmp_path / "gt")]) == 0
    assert "gIoU        1.0000       1" in capsys.readouterr().out


def test_command_reads_a_palette_by_its_colours(tmp_path, capsys):
    picture = Image.fromarray(1 - A).convert("P")
    picture.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white: the object
    (tmp_path / "pred").mkdir()
    picture.save(tmp_path / "pred" / "a.png")
    save(tmp_path / "gt" / "a.png", A)
    assert metrics.main([str(tmp_path / "pred"), str(tmp_path / "gt")]) == 0
    assert "gIoU        1.0000       1" in capsys.readouterr().out


def test_command_takes_full_and_empty_pictures(tmp_path):
    save(tmp_path / "pred" / "full.png", np.full((6, 6), 255, np.uint8))
    save(tmp_path / "gt" / "full.png", np.full((6, 6), 1, np.uint8))
    for name in ("pred", "gt"):
        save(tmp_path / name / "empty.png", np.zeros((6, 6), np.uint8))
    assert metrics.main([str(tmp_path / "pred"), str(tmp_path / "gt"), "--json", str(tmp_path / "n.json")]) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert (numbers["cIoU"], numbers["gIoU"], numbers["count@0.9"]) == (1.0, 1.0, 1)


def cut_off(path):
    save(path, np.random.default_rng(0).integers(0, 2, (200, 200), np.uint8))
    path.write_bytes(path.read_bytes()[:200])


def without_rows(path):
    content = path.read_bytes()
    header = b"IHDR" + (0).to_bytes(4, "big") + content[20:29]
    path.write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:])


# Beside pred/a.png and gt/a.png, which are fine: a file, what is done to its path, and words of the error.
REFUSED = {
    "missing in pred": ("gt/b.png", lambda path: save(path, A), "b.png is 0 times in"),
    "missing in gt": ("pred/b.png", lambda path: save(path, A), "b.png is 1 times in"),
    "sizes differ": ("gt/a.png", lambda path: save(path, A[:, :5]), "different sizes, (6, 6) and (6, 5)"),
    "no picture": ("pred/a.png", lambda path: path.write_bytes(b"not a picture"), "a.png: not a readable PNG"),
    "cut off": ("pred/a.png", cut_off, "a.png: not a readable PNG"),
    "jpeg": ("pred/a.png", lambda path: Image.fromarray(A).save(path, format="JPEG"), "a.png: not a readable PNG"),
    "folder": ("pred/a.png", lambda path: (path.unlink(), path.mkdir()), "a.png: not a readable PNG"),
    "no rows": ("pred/a.png", without_rows, "a.png: not a readable PNG"),
    "grey levels": ("pred/a.png", lambda path: save(path, np.array([[0, 100], [200, 255]], np.uint8)),
                    "a.png: a mask holds 0 and one other value, this holds the values 0, 100, 200, 255"),
    "no background": ("pred/a.png", lambda path: save(path, A * 100 + 100), "this holds the values 100, 200"),
    "color": ("pred/a.png", lambda path: save(path, np.zeros((6, 6, 3), np.uint8)), "this picture has mode RGB"),
    "alpha": ("pred/a.png", lambda path: Image.fromarray(A).convert("LA").save(path), "this picture has mode LA"),
    "empty folder": ("pred/a.png", lambda path: path.unlink(), "a.png is 0 times in"),
    "no folder": ("gt/a.png", lambda path: (path.unlink(), path.parent.rmdir()), "No such file or directory: "),
    "same stem": ("pred/a.PNG", lambda path: save(path, A), "a.png is 2 times in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_command_refuses_with_one_line(tmp_path, capsys, case):
    file, spoil, found = REFUSED[case]
    pred, gt = tmp_path / "pred", tmp_path / "gt"
    save(pred / "a.png", A)
    save(gt / "a.png", A)
    spoil(tmp_path / file)
    code = metrics.main([str(pred), str(gt), "--json", str(tmp_path / "out.json")])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and found in captured.err
    assert not (tmp_path / "out.json").exists()


RUN = {"run": {"dataset": "x"}}
ROW = {"index": 0, "rank": 0, "id": "a", "task": "referring", "label": None, "intersection": 8, "union": 10, "ahd": 1.5}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row,found", [
    ("[" * 100_000, "nested too deeply"), ("{", "Expecting"), ("[1]", "list indices"), ("5", "int"),
    ('{"index": 0, "id": "\\ud800"}', "half of a surrogate pair"),
    *((ROW | {"intersection": value}, "out of range or of another type") for value in (-1, 11, float("nan"))),
    *((ROW | {"union": value}, "out of range or of another type") for value in (float("inf"), 7)),
    *((ROW | {"ahd": value}, "out of range or of another type") for value in (-1, float("nan"), float("inf"), 1e300)),
    *((ROW | {name: "1"}, "not supported between") for name in ("intersection", "union", "ahd")),
    *((ROW | change, "of another type") for change in ({"id": 5}, {"id": []}, {"label": {}}, {"task": None})),
    ({key: value for key, value in ROW.items() if key != "task"}, "KeyError('task')"),
    (ROW, "example counted twice: id 'a', label None"),
])
def test_hostile_records_end_in_one_line(tmp_path, capsys, row, found):
    assert metrics.main([str(lines(tmp_path / "a.jsonl", RUN, ROW, {"index": 1, "broken": "why"}))]) == 0
    assert "gIoU        0.8000       1" in capsys.readouterr().out
    assert metrics.main([str(lines(tmp_path / "a.jsonl", RUN, ROW, row))]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and found in captured.err
    assert captured.out == "" and len(captured.err) < 400


def test_command_overwrites_no_input(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", RUN, ROW)
    for target in (path, tmp_path / "mask.PNG"):
        with pytest.raises(SystemExit) as stopped:
            metrics.main([str(path), "--json", str(target)])
        assert stopped.value.code == 2 and "--json" in capsys.readouterr().err
    assert path.read_text().count("\n") == 2


def test_large_pictures_are_read_without_a_warning(tmp_path):
    save(tmp_path / "pred" / "a.png", A)
    save(tmp_path / "gt" / "a.png", A)
    code = "import sys; from PIL import Image; Image.MAX_IMAGE_PIXELS = 20; import metrics; metrics.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, tmp_path / "pred", tmp_path / "gt"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.stderr == "" and "gIoU        1.0000       1" in result.stdout


def test_a_stop_ends_in_one_line(folders, monkeypatch, capsys):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "read_mask", stop)
    assert metrics.main([str(folders / "pred"), str(folders / "gt")]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_numbers_are_printed_before_a_file_that_cannot_be_written(folders, capsys):
    for target in (folders / "none" / "out.json", folders / "pred"):
        assert metrics.main([str(folders / "pred"), str(folders / "gt"), "--json", str(target)]) == 1
        captured = capsys.readouterr()
        assert captured.out.startswith("metric ") and str(target.parent) in captured.err
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_records_of_a_run_that_has_not_ended_are_not_added_up(tmp_path, capsys):
    path, run = tmp_path / "run.jsonl", {"run": {"count": 2}}
    assert metrics.main([str(lines(path, run, ROW))]) == 1
    assert "1 records of a run over 2 examples" in capsys.readouterr().err
    assert metrics.main([str(lines(path, run, ROW, ROW | {"id": "b"}))]) == 1  # one index twice
    assert "2 records of a run over 2 examples" in capsys.readouterr().err
    assert metrics.main([str(lines(path, run, ROW, {"index": 1, "broken": "none.png"}))]) == 0
    assert "1 of 2 examples are broken and left out" in capsys.readouterr().out
    assert metrics.main([str(lines(path, run, {"index": 0, "segments": []}))]) == 1  # of segvar.py
    assert "all segments of pictures" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    command = [sys.executable, str(REPO / "metrics.py"), str(tmp_path), str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "Trace" not in done.stderr
