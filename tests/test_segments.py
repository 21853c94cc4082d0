"""The data sets of Panoptic: a COCO tree, and ADE20K and Cityscapes trees made here in their official layouts."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import Panoptic, Scenes, load_dataset, polygons_to_mask

FIXTURE = Path(__file__).parent / "fixtures" / "coco_panoptic"


@pytest.fixture
def coco(tmp_path):
    """The fixture, copied."""
    return Path(shutil.copytree(FIXTURE / "coco", tmp_path / "coco"))


def write_picture(path, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)


def segment_map(text, numbers):
    """A drawing and {letter: segment id} -> uint8 (H, W, 3) as panoptic PNGs have it."""
    numbers = np.array([[numbers.get(letter, 0) for letter in row] for row in text.split()])
    return np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], 2).astype(np.uint8)


@pytest.fixture
def ade20k(tmp_path):
    """ADE20K in the panoptic form, a picture for each split: 5 x 2, wall, two beds and void."""
    base = tmp_path / "ADEChallengeData2016"
    for split, folder in (("train", "training"), ("val", "validation")):
        stem = f"ADE_{split}_00000001"
        write_picture(base / "images" / folder / f"{stem}.jpg", (5, 2))
        (base / f"ade20k_panoptic_{split}").mkdir()
        pixels = segment_map("aabb. aacc.", {"a": 7, "b": 300, "c": 70000})
        Image.fromarray(pixels).save(base / f"ade20k_panoptic_{split}" / f"{stem}.png")
        segments = [{"id": id, "category_id": c, "iscrowd": int(id == 70000), "area": 1, "bbox": [0, 0, 1, 1]}
                    for id, c in ((7, 0), (300, 7), (70000, 7))]
        (base / f"ade20k_panoptic_{split}.json").write_text(json.dumps({
            "images": [{"id": stem, "file_name": f"{stem}.jpg", "width": 5, "height": 2}],
            "annotations": [{"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments}],
            "categories": [{"id": 0, "name": "wall", "isthing": 0}, {"id": 7, "name": "bed ", "isthing": 1}]}))
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    """Two cities of val, one of train; a map has road, two cars, a group of people, an unlabelled part."""
    for split, city, number in (("val", "ulm", 3), ("val", "bern", 7), ("train", "aachen", 1)):
        stem = f"{city}_{number:06d}_000019"
        write_picture(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", (6, 2))
        folder = tmp_path / "gtFine" / split / city
        folder.mkdir(parents=True)
        values = {"r": 7, "a": 26000, "b": 26001, "p": 24, "u": 4, "t": 29002, "s": 23}
        numbers = np.array([[values[letter] for letter in row] for row in ("rrabps", "rrauut")], np.uint16)
        Image.fromarray(numbers).save(folder / f"{stem}_gtFine_instanceIds.png")
        for end in ("labelIds.png", "color.png", "polygons.json"):
            (folder / f"{stem}_gtFine_{end}").write_bytes(b"not read")
    return tmp_path


# --- what is in them


def test_coco_panoptic_is_what_the_fixture_says():
    expected, masks = json.loads((FIXTURE / "expected.json").read_text()), np.load(FIXTURE / "masks.npz")
    for root in (FIXTURE, FIXTURE / "coco"):
        dataset = load_dataset("coco-panoptic", "val", root)
        found = {p.id: p for p in dataset}
        assert len(dataset) == 3 and found.keys() == {str(image["image_id"]) for image in expected["images"]}
        for image in expected["images"]:
            p, wanted = found[str(image["image_id"])], image["segments"]
            assert isinstance(p, Panoptic) and p.image.mode == "RGB"
            assert p.image.size == (image["width"], image["height"])
            assert p.masks.dtype == bool and np.array_equal(p.masks, [masks[s["mask"]].astype(bool) for s in wanted])
            assert p.labels == [s["category"] for s in wanted]
            assert p.is_thing == [bool(s["isthing"]) for s in wanted]
            assert p.is_crowd == [bool(s["iscrowd"]) for s in wanted]
            assert p.ignore.sum() == image["void_pixels"] and not (p.ignore & p.masks.any(0)).any()
        assert len(p.classes) == 133 and sum(p.classes.values()) == 80


def test_coco_instances_have_masks_crowds_and_areas():
    content = json.loads((FIXTURE / "coco" / "annotations" / "instances_val2017.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    count = 0
    for p in load_dataset("coco-instances", "val", FIXTURE):
        wanted = [a for a in content["annotations"] if a["image_id"] == int(p.id)]
        assert p.labels == [names[a["category_id"]] for a in wanted] and all(p.is_thing) and p.ignore is None
        assert p.is_crowd == [a["iscrowd"] == 1 for a in wanted] and p.areas == [a["area"] for a in wanted]
        size = p.image.size[::-1]
        assert np.array_equal(p.masks, [polygons_to_mask(a["segmentation"], *size) for a in wanted])
        count += len(wanted)
    assert count == len(content["annotations"]) == 9 and len(p.classes) == 80


def test_a_picture_without_instances(coco):
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": []}))
    p = load_dataset("coco-instances", "val", coco)[0]
    assert p.masks.shape == (0, *p.image.size[::-1]) and p.labels == p.is_crowd == p.areas == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_ade20k_panoptic(ade20k, split):
    for root in (ade20k, ade20k / "ADEChallengeData2016"):
        (p,) = load_dataset("ade20k-panoptic", split, root)
        assert p.id == f"ADE_{split}_00000001" and p.classes == {"wall": False, "bed": True}
        assert p.labels == ["wall", "bed", "bed"] and p.is_thing == [False, True, True]
        assert p.is_crowd == [False, False, True]
        assert p.masks.sum((1, 2)).tolist() == [4, 2, 2] and p.masks[1, 0, 2:4].all()
        assert p.ignore.tolist() == [[False] * 4 + [True]] * 2


def test_cityscapes(cityscapes):
    dataset = load_dataset("cityscapes", "val", cityscapes)
    assert [p.id for p in dataset] == ["bern_000007_000019", "ulm_000003_000019"]
    p = dataset[0]
    assert dict(zip(p.labels, p.is_thing)) == {"road": False, "sky": False, "person": True, "car": True}
    by_label = {(label, crowd): mask for label, crowd, mask in zip(p.labels, p.is_crowd, p.masks)}
    assert by_label.keys() == {("road", False), ("sky", False), ("person", True), ("car", False)}
    assert p.labels.count("car") == 2 and by_label["road", False].sum() == 4 and by_label["person", True][0, 4]
    assert p.ignore.tolist() == [[False] * 6, [False] * 3 + [True] * 3]  # unlabelled, and a trailer
    assert len(p.classes) == 19 and sum(p.classes.values()) == 8
    assert len(load_dataset("cityscapes", "train", cityscapes)) == 1
    for split in ("test", "minival"):
        with pytest.raises(data.BadUsage, match="choose one of train, val"):
            load_dataset("cityscapes", split, cityscapes)


def test_scenes_instances_show_the_pictures_of_plain_scenes():
    for split in ("train", "val", "test", "novel"):
        dataset, scenes = load_dataset("scenes-instances", split), Scenes(split, "scenes-plain")
        assert len(dataset) == len(scenes)
        for i in (0, 5, len(dataset) - 1):
            p, (image, owner, objects, _) = dataset[i], scenes.scene(i)
            assert p.id == scenes[i].id and np.array_equal(p.image, image)
            assert p.labels == [shape.kind for shape in objects] + ["background"] and p.ignore is None
            assert p.is_thing == [True] * len(objects) + [False] and not any(p.is_crowd)
            assert p.masks.any((1, 2)).all() and (p.masks.sum(0) == 1).all()
            assert all(np.array_equal(mask, owner == k) for k, mask in enumerate(p.masks[:-1]))
    assert len(p.classes) == 9 and sum(p.classes.values()) == 8
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    for wrong in ({"split": "absent"}, {"split": "val", "phrases": 2}):
        with pytest.raises(data.BadUsage):
            load_dataset("scenes-instances", **wrong)


# --- what is wrong with them


def edited(file, edit):
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def assert_one_line(message, name, root, split="val"):
    """Opening the data set and reading all of it ends in one line."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as stopped:
        list(load_dataset(name, split, root))
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("damage,message", [
    (lambda c: (c / "panoptic_val2017" / "000000000139.png").unlink(), r"139\.png is missing \(1 files"),
    (lambda c: (c / "val2017" / "000000000139.jpg").unlink(), r"139\.jpg is missing"),
    (lambda c: shutil.copy(c / "panoptic_val2017" / "000000000139.png", c / "panoptic_val2017" / "000000000001.png"),
     r"000000000001\.png has no annotations"),
    (lambda c: shutil.copy(c / "val2017" / "000000000139.jpg", c / "val2017" / "000000000001.jpg"),
     r"000000000001\.jpg has no annotations"),
    (lambda c: (c / "annotations" / "panoptic_val2017.json").write_text("{"), "broken annotations"),
    (lambda c: (c / "annotations" / "panoptic_val2017.json").unlink(), "holds none of annotations/panoptic_"),
    (lambda c: shutil.rmtree(c / "panoptic_val2017"), "holds none of panoptic_val2017, annotations/"),
    (lambda c: shutil.rmtree(c / "val2017"), "holds none of val2017"),
    (lambda c: shutil.copy(c / "annotations" / "instances_val2017.json", c / "annotations" / "panoptic_val2017.json"),
     "no 'isthing'"),
    (lambda c: edited(c / "annotations" / "panoptic_val2017.json",
                      lambda j: j["annotations"][0]["segments_info"][0].update(category_id=999)), "no 999"),
    (lambda c: edited(c / "annotations" / "panoptic_val2017.json",
                      lambda j: j["annotations"][0]["segments_info"].pop()), "139.png holds the numbers .* lists"),
    (lambda c: edited(c / "annotations" / "panoptic_val2017.json",
                      lambda j: j["annotations"][0]["segments_info"].append(j["annotations"][0]["segments_info"][0])),
     "139.png holds the numbers"),
    (lambda c: edited(c / "annotations" / "panoptic_val2017.json",
                      lambda j: j["annotations"].append(j["annotations"][0])), "139.png holds the numbers"),
    (lambda c: Image.new("RGB", (9, 9)).save(c / "val2017" / "000000000139.jpg"), r"size \(96, 72\), .* has \(9, 9\)"),
    (lambda c: Image.new("L", (96, 72)).save(c / "panoptic_val2017" / "000000000139.png"), "mode L, .* mode RGB"),
    (lambda c: (c / "panoptic_val2017" / "000000000139.png").write_bytes(b"?"), "139.png: broken label map"),
    (lambda c: (c / "val2017" / "000000000139.jpg").write_bytes(b"?"), "139.jpg: broken picture"),
])
def test_a_broken_coco_panoptic(coco, damage, message):
    damage(coco)
    assert_one_line(message, "coco-panoptic", coco)


@pytest.mark.parametrize("damage,message", [
    (lambda c: (c / "val2017" / "000000000139.jpg").unlink(), r"139\.jpg is missing"),
    (lambda c: edited(c / "annotations" / "instances_val2017.json",
                      lambda j: j["annotations"][0].update(image_id=77)), r"broken annotations \(no 77\)"),
    (lambda c: edited(c / "annotations" / "instances_val2017.json",
                      lambda j: j["annotations"][0].update(category_id=12)), r"broken annotations \(no 12\)"),
    (lambda c: edited(c / "annotations" / "instances_val2017.json",
                      lambda j: j["annotations"][0].update(segmentation=[[1, 2, 3]])), r"139\.jpg: .*three points"),
    (lambda c: edited(c / "annotations" / "instances_val2017.json",
                      lambda j: j["images"][0].update(width=95)), r"size \(95, 72\), .* has \(96, 72\)"),
    (lambda c: edited(c / "annotations" / "instances_val2017.json",
                      lambda j: j["annotations"][0].pop("iscrowd")), "no 'iscrowd'"),
])
def test_broken_coco_instances(coco, damage, message):
    damage(coco)
    assert_one_line(message, "coco-instances", coco)


def test_a_broken_ade20k_panoptic(ade20k):
    base = ade20k / "ADEChallengeData2016"
    (base / "images" / "validation" / "ADE_val_00000002.jpg").write_bytes(b"")
    assert_one_line("ADE_val_00000002.jpg has no annotations", "ade20k-panoptic", ade20k)
    shutil.rmtree(base / "ade20k_panoptic_train")
    assert_one_line("holds none of ade20k_panoptic_train", "ade20k-panoptic", ade20k, "train")
    assert_one_line("holds none of ADEChallengeData2016/images, images", "ade20k-panoptic", base / "images")


@pytest.mark.parametrize("damage,message", [
    (lambda f: f.unlink(), r"ulm_000003_000019_leftImg8bit\.png has no annotations"),
    (lambda f: shutil.rmtree(f.parents[2] / "val"), "holds none of gtFine/val"),
    (lambda f: [x.unlink() for x in f.parents[1].rglob("*Ids.png")], r"val: \*_gtFine_instanceIds\.png is missing"),
    (lambda f: shutil.copy(f, f.with_name("ulm_000004_000019_gtFine_instanceIds.png")), "ulm_000004_.* is missing"),
    (lambda f: Image.fromarray(np.full((2, 6), 65535, np.uint16)).save(f), "value 65535 is no labelId"),
    (lambda f: Image.fromarray(np.full((2, 6), 40, np.uint16)).save(f), "value 40 is no labelId"),
    (lambda f: Image.fromarray(np.full((3, 6), 7, np.uint16)).save(f), r"size \(6, 3\), .* has \(6, 2\)"),
    (lambda f: Image.new("RGB", (6, 2)).save(f), "mode RGB"),
])
def test_broken_cityscapes(cityscapes, damage, message):
    damage(cityscapes / "gtFine" / "val" / "ulm" / "ulm_000003_000019_gtFine_instanceIds.png")
    assert_one_line(message, "cityscapes", cityscapes)


# --- the commands


def test_check(cityscapes, coco, capsys):
    assert data.main(["check", "cityscapes", "--root", str(cityscapes)]) == 0
    out = capsys.readouterr().out
    assert "cityscapes:val: 2 pictures (published: 500), 2 examples" in out and "3 examples opened, 0 broken" in out
    flags = ["--root", str(coco), "--split", "val"]
    for name in ("coco-panoptic", "coco-instances"):
        assert data.main(["check", name, *flags, "--all"]) == 0
        assert f"{name}:val: 3 pictures (published: 5,000), 3 examples" in capsys.readouterr().out
    (coco / "panoptic_val2017" / "000000000139.png").write_bytes(b"?")
    assert data.main(["check", "coco-panoptic", *flags]) == 1
    assert "000000000139.png: broken label map" in capsys.readouterr().out
    (coco / "panoptic_val2017" / "000000000139.png").unlink()
    assert data.main(["check", "coco-panoptic", *flags]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_preview_shows_each_segment(ade20k, tmp_path, capsys):
    flags = ["preview", "ade20k-panoptic", "--root", str(ade20k), "--split", "val", "--out", str(tmp_path / "p.png")]
    assert data.main(flags) == 0
    assert "examples 0 to 0 of ade20k-panoptic:val" in capsys.readouterr().out
    painted = np.asarray(data.paint_segments(load_dataset("ade20k-panoptic", "val", ade20k)[0]))
    assert painted.shape == (2, 5, 3) and not painted[:, 4].any()
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 4
    assert data.main(["preview", "scenes-instances", "--count", "2", "--out", str(tmp_path / "s.png")]) == 0
    with pytest.raises(SystemExit):
        data.main(["preview", "scenes-instances", "--root", "."])
    assert "--root has no use" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scenes-instances", "coco-panoptic"])
def test_who_asks_for_phrases_gets_none_of_these(name, tmp_path, capsys):
    import sample
    import train

    for main, flags in ((sample.main, ["--dataset", name, "--split", "val"]),
                        (train.main, ["--data", f"scenes,{name}", "--out-dir", str(tmp_path), "--max-steps", "1"])):
        with pytest.raises(SystemExit) as stopped:
            sys.exit(main(flags))
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and "and no phrases" in err
