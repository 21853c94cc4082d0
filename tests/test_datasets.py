"""The public data sets against small trees in their official layouts; expected.json and masks.npz are independent."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import load_dataset, polygons_to_mask, rle_decode, rle_encode

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def tree(tmp_path):
    """A fixture tree, copied: an index is written beside the label maps."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def expected(name):
    return json.loads((FIXTURES / name / "expected.json").read_text()), np.load(FIXTURES / name / "masks.npz")


def assert_label_maps(dataset, images, masks, ignored_keys=("ignored_pixels",), classes_key="classes"):
    """Every class of every picture, in any order, and nothing else; pixels that are not scored add up."""
    found = {example.id: example for example in (dataset[i] for i in range(len(dataset)))}
    wanted = {(image["id"], c["label"]): (image, c) for image in images for c in image[classes_key]}
    assert len(found) == len(dataset) == len(wanted)
    for example in found.values():
        picture = next(image["id"] for image in images if image["id"] in example.id)
        image, c = wanted.pop((picture, example.label))
        assert example.phrase == example.label and example.task == "semantic"
        assert example.image.mode == "RGB" and example.image.size == (image["width"], image["height"])
        assert np.array_equal(example.mask, masks[c["mask"]].astype(bool)) and example.mask.sum() == c["area"]
        ignored = sum(image[key] for key in ignored_keys)
        assert (example.ignore is None) == (ignored == 0)
        if ignored:
            assert example.ignore.sum() == ignored and not (example.ignore & example.mask).any()
    assert not wanted


@pytest.mark.parametrize("split,folder", [("train", "training"), ("val", "validation")])
def test_ade20k(tree, split, folder):
    content, masks = expected("ade20k")
    images = [image for image in content["images"] if image["split"] == folder]
    root = tree("ade20k")
    for _ in range(2):  # the second time from the cached index
        assert_label_maps(load_dataset("ade20k", split, root), images, masks)


@pytest.mark.parametrize("split", ["train", "val"])
def test_cocostuff(tree, split):
    content, masks = expected("cocostuff")
    images = [image for image in content["images"] if image["split"] == f"{split}2017"]
    assert_label_maps(load_dataset("cocostuff", split, tree("cocostuff")), images, masks)


def to_converted(root):
    """Write the 171-id twins over the raw maps."""
    content, _ = expected("cocostuff")
    index = {c["pixel_value"]: c["index"] for image in content["images"] for c in image["classes"]}
    table = np.array([index.get(value, 255) for value in range(256)], np.uint8)
    for file in root.glob("annotations/*/*.png"):
        Image.fromarray(table[np.asarray(Image.open(file))]).save(file)


@pytest.mark.parametrize("split", ["train", "val"])
def test_converted_cocostuff_gives_the_same_examples(tree, split):
    root = tree("cocostuff")
    to_converted(root)
    content, masks = expected("cocostuff")
    images = [image for image in content["images"] if image["split"] == f"{split}2017"]
    assert_label_maps(load_dataset("cocostuff", split, root), images, masks)


def test_cocostuff_is_never_guessed(tree):
    root = tree("cocostuff")
    for file in root.glob("annotations/*/*.png"):
        size = Image.open(file).size
        Image.fromarray(np.full(size[::-1], 5, np.uint8)).save(file)  # "bus", raw or converted
    with pytest.raises(ValueError, match="do not tell .* labels='raw' or 'converted'"):
        load_dataset("cocostuff", "val", root)
    assert load_dataset("cocostuff", "val", root, labels="raw")[0].label == "bus"
    Image.fromarray(np.array([[181, 11]], np.uint8)).save(root / "annotations" / "val2017" / "000000000139.png")
    with pytest.raises(ValueError, match="of the raw 182 ids and of the converted 171"):
        load_dataset("cocostuff", "val", root)
    shutil.copytree(root / "annotations", root / "stuffthingmaps")
    with pytest.raises(ValueError, match="annotations and stuffthingmaps: say which"):
        load_dataset("cocostuff", "val", root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_voc20(tree, split):
    content, masks = expected("pascal_voc")
    images = [image for image in content["images"] if image["split"] == split]
    dataset = load_dataset("voc20", split, tree("pascal_voc"))
    assert_label_maps(dataset, images, masks, ("background_pixels", "void_pixels"))


FORMS = {"context": ["SegmentationClassContext", "ImageSets"], "prepared": ["annotations_detectron2"],
         "mat": ["trainval", "ImageSets"], "json": ["trainval_merged.json"]}  # fmt: skip


@pytest.mark.parametrize("name,form", [("pc59", form) for form in FORMS] + [
    ("pc459", form) for form in ("prepared", "mat")])  # fmt: skip
def test_pascal_context_in_each_of_its_forms(tree, name, form):
    content, masks = expected("pascal_context_59")
    root = tree("pascal_context_59")
    base = root / "VOCdevkit" / "VOC2010"
    for path in base.iterdir():
        if path.name not in (*FORMS[form], "JPEGImages"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for split in ("train", "val"):
        if (form, split) == ("prepared", "train"):
            continue  # only the evaluation part is published so
        images = [image for image in content["images"] if image["split"] == split]
        ignored = ("unlabelled_for_59",) if name == "pc59" else ()
        assert_label_maps(load_dataset(name, split, root), images, masks, ignored, name.replace("pc", "classes_"))


def test_all_classes_asks_for_the_absent_ones_too(tree):
    root = tree("pascal_voc")
    dataset = load_dataset("voc20", "val", root, classes="all")
    assert len(dataset) == 2 * 20 and len({dataset[i].id for i in range(40)}) == 40
    assert sum(dataset[i].mask.any() for i in range(40)) == len(load_dataset("voc20", "val", root)) == 4


def test_the_index_follows_its_files(tree, monkeypatch):
    root, reads = tree("ade20k"), []
    real = data.read_label_map
    monkeypatch.setattr(data, "read_label_map", lambda path: reads.append(path) or real(path))
    assert len(load_dataset("ade20k", "val", root)) == 7 and len(reads) == 2
    assert len(load_dataset("ade20k", "val", root)) == 7 and len(reads) == 2  # from the cache
    file = root / "ADEChallengeData2016" / "annotations" / "validation" / "ADE_val_00002000.png"
    Image.fromarray(np.full((50, 70), 4, np.uint8)).save(file)
    assert len(load_dataset("ade20k", "val", root)) == 5


def test_opening_reads_no_picture(tree, monkeypatch):
    root = tree("ade20k")
    monkeypatch.setattr(data, "open_picture", lambda path: pytest.fail(f"opened {path}"))
    assert len(load_dataset("ade20k", "val", root)) == 7
    assert len(load_dataset("refcoco", "val", FIXTURES / "refcoco")) == 3


CASES = [(name, case) for name in ("refcoco", "refclef") for case in range(3 if name == "refcoco" else 2)]


@pytest.mark.parametrize("name,case", CASES)
def test_referring_sets(name, case):
    content, masks = expected(name)
    if case >= len(content["cases"]):
        pytest.fail("the fixture has fewer cases")
    case = content["cases"][case]
    counts = case.get("per_split") or case["query_counts"]
    for split, count in counts.items():
        dataset = load_dataset(case["dataset"], split, FIXTURES / name, split_by=case["splitBy"])
        assert len(dataset) == count["sentences"] and dataset.refs == count["refs"]
    for split in {sample["split"] for sample in case["samples"]}:
        samples = [sample for sample in case["samples"] if sample["split"] == split]
        if split not in counts:
            continue
        dataset = load_dataset(case["dataset"], split, FIXTURES / name, split_by=case["splitBy"])
        examples = {example.id: example for example in (dataset[i] for i in range(len(dataset)))}
        assert len(examples) == len(dataset)
        for sample in samples:
            example = examples[f"{sample['image_id']}:{sample['sent_id']}"]
            assert example.phrase == sample["sent"].strip() and example.task == "referring"
            assert example.image.size == (sample["width"], sample["height"]) and example.image.mode == "RGB"
            assert np.array_equal(example.mask, masks[sample["mask"]].astype(bool))


@pytest.mark.parametrize("file", sorted((FIXTURES / "refcoco" / "must_refuse").iterdir()), ids=lambda file: file.name)
def test_pickles_that_name_anything_are_refused(tree, file):
    with pytest.raises(ValueError, match="refused.* names ") as caught:
        data.read_refs(file)
    assert file.name in str(caught.value) and "\n" not in str(caught.value)


def test_polygons_are_filled_as_pycocotools_does():
    cases = json.loads((FIXTURES / "rle" / "rle.json").read_text())["polygons"]
    assert len(cases) >= 24
    for case in cases:
        mask = polygons_to_mask(case["segmentation"], *case["size"])
        assert rle_encode(mask) == case["rle"] and mask.sum() == case["area"]


def test_polygons_against_even_odd_at_pixel_centres():
    rng = np.random.default_rng(0)
    for _ in range(20):  # stars that cross themselves, partly outside: all but edge pixels must agree
        points = rng.uniform(-20, 120, (7, 2)).round(2)
        mask = polygons_to_mask([points.ravel().tolist()], 90, 100)
        y, x = np.mgrid[:90, :100] + 0.5
        inside = np.zeros((90, 100), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0 if y1 != y0 else 1))
        assert (mask ^ inside).mean() < 0.02
    with pytest.raises(ValueError, match="polygon of 2 points"):
        polygons_to_mask([[1, 2, 3, 4]], 5, 5)


# --- one's own data


@pytest.fixture
def lines(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:5] = True
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.png")

    def write(*records):
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n\n")
        return load_dataset(f"jsonl:{path}", "val")

    return write, mask


def test_jsonl_with_each_kind_of_mask(lines):
    write, mask = lines
    base, corners = {"image": "a.png", "phrase": " the bar "}, [0.6, 1.6, 4.6, 1.6, 4.6, 3.6, 0.6, 3.6]
    dataset = write(base | {"mask": "m.png"}, base | {"mask": rle_encode(mask), "id": "x", "task": "reasoning"},
                    base | {"mask": [corners], "label": "bar", "task": "semantic"})  # fmt: skip
    assert len(dataset) == 3
    wanted = [("1", "referring", None), ("x", "reasoning", None), ("3", "semantic", "bar")]
    for example, (id, task, label) in zip((dataset[i] for i in range(3)), wanted):
        assert np.array_equal(example.mask, mask) and example.phrase == "the bar"
        assert (example.id, example.task, example.label) == (id, task, label)


@pytest.mark.parametrize("record,message", [
    ("{", "line 2: "), ("[1]", "line 2: "), ({"image": "a.png", "phrase": "x"}, "line 2: no 'mask'"),
    ({"image": "b.png", "phrase": "x", "mask": "m.png"}, "line 2: .*b.png: no such picture"),
    ({"image": "a.png", "phrase": " ", "mask": "m.png"}, "line 2: phrase ' '"),
    ({"image": "a.png", "phrase": "x", "mask": [[1, 2, 3, 4]]}, "line 2: a polygon of 2 points"),
    ({"image": "a.png", "phrase": "x", "mask": {"size": [6, 8], "counts": "5"}}, "line 2: run-length counts add up"),
    ({"image": "a.png", "phrase": "x", "mask": {"size": [3, 2], "counts": [6]}}, "line 2: a run-length mask of"),
    ({"image": "a.png", "phrase": "x", "mask": "a.png"}, "line 2: .*mode RGB"),
    ({"image": "a.png", "phrase": "x", "mask": "m.png", "task": "guessing"}, "line 2: task 'guessing'"),
])  # fmt: skip
def test_a_bad_line_is_named(lines, record, message):
    write, _ = lines
    dataset = write({"image": "a.png", "phrase": "x", "mask": "m.png"}, record)
    assert dataset[0].phrase == "x"
    with pytest.raises(ValueError, match=f"mine.jsonl: {message}") as caught:
        dataset[1]
    assert "\n" not in str(caught.value)


def test_sa_ovrs_is_a_folder_of_such_lines(tmp_path):
    (tmp_path / "sa_000000").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "sa_000000" / "sa_1.jpg")
    record = {"image": "sa_000000/sa_1.jpg", "phrase": "the lamp", "mask": {"size": [6, 8], "counts": [0, 48]},
              "id": "sa_1:7", "task": "referring", "image_id": 1, "annotation_ids": [7]}  # fmt: skip
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    (example,) = load_dataset("sa-ovrs", "train", tmp_path)
    assert example.mask.all() and example.id == "sa_1:7"
    with pytest.raises(FileNotFoundError, match="val.jsonl"):
        load_dataset("sa-ovrs", "val", tmp_path)


# --- trees that are not what they should be


def test_wrong_trees_end_in_one_line(tree, tmp_path):
    ade, voc, coco = tree("ade20k"), tree("pascal_voc"), tree("cocostuff")
    base = ade / "ADEChallengeData2016"
    (base / "images" / "validation" / "ADE_val_00000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="ADE_val_00000001.jpg"):
        load_dataset("ade20k", "val", ade)[0]
    Image.new("RGB", (9, 9)).save(base / "images" / "training" / "ADE_train_00000001.jpg")
    with pytest.raises(ValueError, match="64 x 48 labels for .*ADE_train_00000001.jpg of 9 x 9"):
        load_dataset("ade20k", "train", ade)[0]
    file = base / "annotations" / "validation" / "ADE_val_00000001.png"
    Image.fromarray(np.full((48, 64), 151, np.uint8)).save(file)
    with pytest.raises(ValueError, match="ADE_val_00000001.png: value 151 is none of the 150 classes"):
        load_dataset("ade20k", "val", ade)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="ADE_val_00000001.png: broken label map"):
        load_dataset("ade20k", "val", ade)
    (ade / "index_ade20k.pkl").touch()
    with pytest.raises(ValueError, match="full ADE20K"):
        load_dataset("ade20k", "val", ade)
    file = voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000032.png"
    Image.open(file).convert("RGB").save(file)
    with pytest.raises(ValueError, match="2007_000032.png: a picture of mode RGB"):
        load_dataset("voc20", "train", voc)
    (coco / "imageLists").mkdir()
    with pytest.raises(ValueError, match="COCO-Stuff 10k"):
        load_dataset("cocostuff", "val", coco)


@pytest.mark.parametrize("name,split,options,message", [
    ("imagenet", "val", {}, "unknown data set 'imagenet'"), ("ade20k", "test", {}, "no split 'test'"),
    ("refcoco", "testC", {}, "no split 'testC'"), ("refcoco", "val", {"split_by": "umd"}, "no split_by 'umd'"),
    ("ade20k", "val", {"rich": True}, "no option 'rich'"), ("ade20k", "val", {"classes": "some"}, "classes 'some'"),
    ("pc59", "val", {}, "holds none of"), ("refcoco+", "val", {}, r"refs\(unc\).p: no such file"),
])  # fmt: skip
def test_wrong_use_ends_in_one_line(tree, name, split, options, message):
    root = tree("refcoco") if name.startswith("refcoco") else tree("ade20k")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_dataset(name, split, root, **options)
    assert "\n" not in str(caught.value)


def test_a_data_set_needs_its_root():
    with pytest.raises(ValueError, match="ade20k needs --root"):
        load_dataset("ade20k", "val")
    with pytest.raises(FileNotFoundError, match="no/such"):
        load_dataset("ade20k", "val", "no/such")


def test_rle_decode_of_every_official_case():
    content, masks = json.loads((FIXTURES / "rle" / "rle.json").read_text()), np.load(FIXTURES / "rle" / "masks.npz")
    for case in content["cases"]:
        mask = masks[case["mask"]].astype(bool)
        for counts in (case["counts"], case["counts"].encode(), case["counts_uncompressed"]):
            assert np.array_equal(rle_decode({"size": case["size"], "counts": counts}), mask)
        assert rle_encode(mask) == {"size": case["size"], "counts": case["counts"]}


# --- python data.py check | preview


def test_check_counts_opens_and_names_what_is_broken(tree, capsys):
    root = tree("refcoco")
    assert data.main(["check", "refcoco", "--root", str(root), "--all"]) == 0
    out = capsys.readouterr().out
    assert "refcoco:val: 1 refs (published: 3,811), 1 pictures (published: 1,500), 3 sentences" in out
    assert "0 broken" in out and "refcoco:testC" not in out
    assert data.main(["check", "refcocog", "--root", str(root), "--split-by", "umd"]) == 0
    picture = next((root / "images").rglob("COCO_train2014_000000581857.jpg"))
    picture.write_bytes(picture.read_bytes()[:300])
    capsys.readouterr()
    assert data.main(["check", "refcoco", "--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "broken: " in out and "COCO_train2014_000000581857.jpg: broken picture" in out


def test_check_of_label_maps_and_lines(tree, tmp_path, capsys):
    root = tree("ade20k")
    assert data.main(["check", "ade20k", "--root", str(root)]) == 0
    assert "ade20k:train: 3 pictures (published: 20,210), 6 examples" in capsys.readouterr().out
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert data.main(["check", f"jsonl:{tmp_path / 'x.jsonl'}"]) == 1
    assert "line 1: no 'image'" in capsys.readouterr().out
    assert data.main(["check", "voc20", "--root", str(root)]) == 1
    for flags in (["check", "ade20k", "--count", "0"], ["check"], ["check", "ade20k"], ["check", "imagenet"]):
        with pytest.raises(SystemExit) as stopped:
            data.main(flags)
        assert stopped.value.code == 2


def test_preview_of_a_public_set(tree, tmp_path):
    flags = ["preview", "voc20", "--root", str(tree("pascal_voc")), "--split", "val", "--out", str(tmp_path / "p.png")]
    assert data.main(flags) == 0
    assert Image.open(tmp_path / "p.png").size[0] > 300
