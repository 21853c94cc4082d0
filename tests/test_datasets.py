"""The public data sets against small trees in their official layouts; expected.json and masks.npz are independent."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import load_dataset, polygons_to_mask, rle_encode

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


def test_converted_maps_of_another_name_and_folder(tree):
    root = tree("cocostuff")
    raw = [(example.phrase, example.mask.sum()) for example in load_dataset("cocostuff", "val", root)]
    to_converted(root)
    for file in root.glob("annotations/*/*.png"):
        file.rename(file.with_name(f"{file.stem}_labelTrainIds.png"))
    (root / "annotations").rename(root / "stuffthingmaps")
    assert [(example.phrase, example.mask.sum()) for example in load_dataset("cocostuff", "val", root)] == raw


def test_cocostuff_is_never_guessed(tree):
    root = tree("cocostuff")
    for file in root.glob("annotations/*/*.png"):
        size = Image.open(file).size
        Image.fromarray(np.full(size[::-1], 5, np.uint8)).save(file)  # "bus", raw or converted
    with pytest.raises(ValueError, match="do not tell"):
        load_dataset("cocostuff", "val", root)
    mixed = root / "annotations" / "val2017" / "000000000140.png"
    Image.fromarray(np.array([[181]], np.uint8)).save(mixed)
    Image.fromarray(np.array([[11]], np.uint8)).save(mixed.with_name("000000000141.png"))  # one of each kind
    with pytest.raises(ValueError, match="000000000141.png: value 11 is none of the 171 classes"):
        load_dataset("cocostuff", "val", root)
    Image.fromarray(np.array([[181, 11]], np.uint8)).save(mixed)
    with pytest.raises(ValueError, match="000000000140.png: value 11 is none of the 171 classes"):
        load_dataset("cocostuff", "val", root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_voc20(tree, split):
    content, masks = expected("pascal_voc")
    images = [image for image in content["images"] if image["split"] == split]
    dataset = load_dataset("voc20", split, tree("pascal_voc"))
    assert_label_maps(dataset, images, masks, ("background_pixels", "void_pixels"))


FORMS = {"context": ["SegmentationClassContext", "ImageSets"], "prepared": ["annotations_detectron2"],
         "mat": ["trainval", "ImageSets"]}


def test_the_other_list_of_pascal_context(tree):
    base = tree("pascal_context_59") / "VOCdevkit" / "VOC2010"
    ids = [example.id for example in load_dataset("pc59", "val", base)]
    (base / "ImageSets" / "SegmentationContext" / "val.txt").rename(base / "pascalcontext_val.txt")
    assert [example.id for example in load_dataset("pc59", "val", base)] == ids != []


@pytest.mark.parametrize("name,form", [("pc59", form) for form in FORMS] + [
    ("pc459", form) for form in ("prepared", "mat")])
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


@pytest.mark.parametrize("content", [
    "[]", "5", "{", '"x"', "[" * 100_000, "\udcff", '{"stamp": "", "values": []}', '{"values": []}',
], ids=lambda content: content[:60])
def test_an_index_of_another_shape_is_made_again(tree, content):
    root = tree("ade20k")
    assert len(load_dataset("ade20k", "val", root)) == 7
    (cache,) = root.rglob("*.index.json")
    good = cache.read_text()
    cache.write_text(content, errors="surrogateescape")
    assert len(load_dataset("ade20k", "val", root)) == 7 and cache.read_text() == good


def test_a_folder_that_cannot_be_written_to(tree, monkeypatch):
    def refuse(*args):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(data, "whole", refuse)
    assert len(load_dataset("ade20k", "val", tree("ade20k"))) == 7


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_the_values_of_a_map_are_those_that_numpy_finds(dtype):
    rng = np.random.default_rng(0)
    top = min(np.iinfo(dtype).max, 70_000)
    for low, high in ((0, 9), (top - 9, top), *(((-5, 5),) if np.iinfo(dtype).min else ())):
        labels = rng.integers(low, high, (40, 30), endpoint=True).astype(dtype)
        assert data.values_in(labels) == np.unique(labels).tolist()
    assert data.values_in(np.zeros((0, 5), dtype)) == []


def test_opening_reads_no_picture(tree, monkeypatch):
    root = tree("ade20k")
    monkeypatch.setattr(data, "open_picture", lambda path: pytest.fail(f"opened {path}"))
    assert len(load_dataset("ade20k", "val", root)) == 7
    assert len(load_dataset("refcoco", "val", FIXTURES / "refcoco")) == 3


@pytest.mark.parametrize("name,case", [
    (name, case) for name in ("refcoco", "refclef") for case in expected(name)[0]["cases"]
], ids=lambda value: value if isinstance(value, str) else f"{value['dataset']}-{value['splitBy']}")
def test_referring_sets(name, case):
    masks = expected(name)[1]
    for split, count in (case.get("per_split") or case["query_counts"]).items():
        if not count["sentences"]:
            with pytest.raises(data.BadUsage, match=f"has no split '{split}'"):
                load_dataset(case["dataset"], split, FIXTURES / name, split_by=case["splitBy"])
            continue
        dataset = load_dataset(case["dataset"], split, FIXTURES / name, split_by=case["splitBy"])
        assert len(dataset) == count["sentences"] and dataset.counts["refs"] == count["refs"]
        examples = {example.id: example for example in (dataset[i] for i in range(len(dataset)))}
        assert len(examples) == len(dataset)
        for sample in (sample for sample in case["samples"] if sample["split"] == split):
            example = examples[f"{sample['image_id']}:{sample['sent_id']}"]
            assert example.phrase == sample["sent"].strip() and example.task == "referring"
            assert example.image.size == (sample["width"], sample["height"]) and example.image.mode == "RGB"
            assert np.array_equal(example.mask, masks[sample["mask"]].astype(bool))


@pytest.mark.parametrize("file", sorted((FIXTURES / "refcoco" / "must_refuse").iterdir()), ids=lambda file: file.name)
def test_pickles_that_name_anything_are_refused(tree, file):
    with pytest.raises(ValueError, match="refused.* names ") as caught:
        data.read_refs(file)
    assert file.name in str(caught.value) and "\n" not in str(caught.value)


REF = {"ref_id": 7, "image_id": 581857, "ann_id": 1719310, "split": "val",
       "sentences": [{"sent_id": 70, "sent": "the dog"}, {"sent_id": 71, "sent": "left dog"}]}


@pytest.fixture
def refs(tree):
    """Opens refCOCO with other refs or instances than the fixture's."""
    root = tree("refcoco")
    file, instances = root / "refcoco" / "refs(unc).p", root / "refcoco" / "instances.json"

    def write(refs=(REF,), change=None):
        file.write_bytes(pickle.dumps(list(refs), protocol=2))
        if change is not None:
            content = json.loads(instances.read_text())
            instances.write_text(json.dumps(change(content)))
        return load_dataset("refcoco", "val", root)

    write.root = root
    return write


@pytest.mark.parametrize("words", ["", " \t", None, 5, []])
def test_a_sentence_without_words_is_named_by_every_check(refs, words, capsys):
    many = [REF | {"ref_id": i, "sentences": [{"sent_id": i, "sent": "left dog"}]} for i in range(1000, 1020)]
    dataset = refs([REF, REF | {"ref_id": 8, "sentences": [{"sent_id": 72, "sent": words}]}, *many])
    assert dataset[1].phrase == "left dog" and dataset[1].id == "581857:71"
    with pytest.raises(ValueError, match=r"refs\(unc\).p: sentence 72: ") as caught:
        dataset[2]
    assert "\n" not in str(caught.value)
    assert data.main(["check", "refcoco", "--root", str(refs.root), "--split", "val", "--count", "1"]) == 1
    out = capsys.readouterr().out
    assert "sentence 72: " in out and "1 examples opened, 1 broken" in out


@pytest.mark.parametrize("change", [
    {"sentences": "the dog"}, {"sentences": 5}, {"sentences": ["the dog"]}, {"sentences": [{"sent": "x"}]},
    {"image_id": []}, {"ann_id": {}}, {"image_id": 5},
], ids=str)
def test_hostile_refs_end_in_one_line(refs, change):
    with pytest.raises(ValueError, match=r"refs\(unc\).p: broken refs file") as caught:
        refs([REF | change])
    assert "\n" not in str(caught.value)


def put(key, **values):
    """A change of the entries of instances.json."""
    return lambda content: content | {key: [entry | values for entry in content[key]]}


@pytest.mark.parametrize("change,message", [
    (lambda content: [content], "broken instances"), (lambda content: 5, "broken instances"),
    (lambda content: {"images": []}, "broken instances"),
    (lambda content: content | {"images": 5}, "broken instances"),
    (lambda content: content | {"annotations": [5]}, "broken instances"), (put("images", id=[]), "broken instances"),
    (put("images", width=10**6), r"has size \(64, 48\), expected \(1000000, 48\)"),
    (put("images", file_name=5), "annotation 1719310"),
    (put("images", height="48"), r"has size \(64, 48\), expected \(64, '48'\)"),
    (put("annotations", segmentation=5), "annotation 1719310"),
    (put("annotations", segmentation=[5]), "annotation 1719310"),
    (put("annotations", segmentation=[{"size": [10**6, 10**6], "counts": [10**12]}]), "a run-length mask has"),
    (put("annotations", segmentation=[[0, 0, 1e300, 0, 5, 5]]), "a mask is "),
    (lambda content: content | {"images": [{"id": image["id"]} for image in content["images"]]}, "annotation 1719310"),
])
def test_hostile_instances_end_in_one_line(refs, change, message):
    with pytest.raises(ValueError, match=f"instances.json: .*{message}") as caught:
        refs(change=change)[0]
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match="at least three points"):
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
        rows = (r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records)
        path.write_bytes(b"\n".join(rows) + b"\n\n")
        return load_dataset(f"jsonl:{path}", "val")

    return write, mask


def test_jsonl_with_each_kind_of_mask(lines):
    write, mask = lines
    base, corners = {"image": "a.png", "phrase": " the bar "}, [0.6, 1.6, 4.6, 1.6, 4.6, 3.6, 0.6, 3.6]
    dataset = write(base | {"mask": "m.png"}, base | {"mask": rle_encode(mask), "id": "x", "task": "reasoning"},
                    base | {"mask": [corners], "label": "bar", "task": "semantic"})
    assert len(dataset) == 3
    wanted = [("1", "referring", None), ("x", "reasoning", None), ("3", "semantic", "bar")]
    for example, (id, task, label) in zip((dataset[i] for i in range(3)), wanted):
        assert np.array_equal(example.mask, mask) and example.phrase == "the bar"
        assert (example.id, example.task, example.label) == (id, task, label)


def test_jsonl_reads_masks_as_metrics_does(lines, tmp_path):
    write, mask = lines
    palette = Image.fromarray(1 - mask.astype(np.uint8)).convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white: the object
    palette.save(tmp_path / "palette.png")
    Image.fromarray(mask).save(tmp_path / "bit.png")
    Image.fromarray(mask.astype(np.uint16) * 65535).save(tmp_path / "deep.png")
    Image.fromarray(mask.astype(np.uint8) + 100).save(tmp_path / "none.png")
    names = ("palette.png", "bit.png", "deep.png", "none.png")
    dataset = write(*({"image": "a.png", "phrase": "x", "mask": name} for name in names))
    for i in range(3):
        assert np.array_equal(dataset[i].mask, mask)
    with pytest.raises(ValueError, match="line 4: .*none.png: .*this holds the values 100, 101"):
        dataset[3]


X = {"image": "a.png", "phrase": "x", "mask": "m.png"}


@pytest.mark.parametrize("records,twice", [
    (({"id": "7"}, {"id": "8"}, {"id": 7}), "lines 1 and 3 have the same id"),
    (({"id": "2"}, {}), "lines 1 and 2 have the same id"),  # the second line's own number
    (({"id": 7, "label": "cat"}, {"id": 7, "label": "cat"}), "lines 1 and 2 have the same id"),
    (({"id": 7, "label": "cat"}, {"id": 7, "label": "dog"}, {"id": 7}, {"id": "7 "}, {"id": 7.0}), None),
    (({"id": []}, {"id": []}, "{", "{", "[" * 100_000, {"label": 5}), None),  # broken lines are found later
])
def test_ids_are_compared_when_the_file_is_opened(lines, records, twice):
    from metrics import SegmentationMetrics

    write, _ = lines
    records = [record if isinstance(record, str) else X | record for record in records]
    if twice is None:
        dataset, metrics = write(*records), SegmentationMetrics()
        assert len(dataset) == len(records)
        for i in range(len(dataset)):
            try:
                example = dataset[i]
            except ValueError as error:
                assert f"line {i + 1}: " in str(error)
                continue
            metrics.update(example.mask, example.mask, example.label, example.id)  # and it agrees
        return
    with pytest.raises(ValueError, match=f"mine.jsonl: {twice}"):
        write(*records)


def test_pictures_of_lines_are_told_apart_in_every_process(lines):
    write, _ = lines
    dataset = write(X, X | {"image": "b.png"}, "", X, "{", "[1]", {"phrase": "x"})
    one, other, again, *broken = dataset.picture_of.tolist()
    assert one == again != other and broken == [0, 0, 0]
    assert one == int.from_bytes(bytes.fromhex("e203797de73bf656"), "little", signed=True)  # b2sum -l 64 of a.png


@pytest.mark.parametrize("record,message", [
    ("[" * 100_000, "its brackets are nested too deeply"), (b"\xff{}", ".*invalid start byte"),
    (X | {"phrase": "\ud800"}, "it holds half of a surrogate pair"),
    (b'{"image": "a.png", "phrase": "x", "mask": "m.png", "\\uDFFF": 1}', "it holds half of a surrogate pair"),
    (b'{"image": "a.png", "phrase": "\xed\xa0\x80", "mask": "m.png"}', ".*invalid continuation byte"),
    (X | {"image": "a.png\0"}, ".*null byte"), (X | {"mask": "m.png\0"}, ".*null byte"),
    (X | {"image": "."}, ".*not a file"), (X | {"mask": "."}, ".*not a file"), (X | {"image": 5}, ""),
    (X | {"image": None}, ""), (X | {"mask": None}, "a mask is run-length or a list"),
    (X | {"mask": {"size": [10**6, 10**6], "counts": [10**12]}}, "a run-length mask has"),
    (X | {"mask": {"size": [6, 8]}}, "a run-length mask has"),
    (X | {"mask": [[0, 0, 1e300, 0, 5, 5]]}, "a mask is run-length or a list"),
    (b'{"image": "a.png", "phrase": "x", "mask": [[0, 0, NaN, 0, 5, 5]]}', "a mask is run-length or a list"),
    (X | {"phrase": 5}, "phrase 5"), (X | {"phrase": ["x"]}, "phrase "),
    (X | {"label": ["a"]}, r"id 2, label \['a'\]: expected"), (X | {"label": 5}, "id 2, label 5: expected"),
    (X | {"id": {}}, "id {}, label None: expected"),
    (X | {"id": True}, "id True, label None: expected"), (X | {"task": []}, r"task \[\]"), ("{", ""),
    ("[1]", ""), ({"image": "a.png", "phrase": "x"}, "no 'mask'"), (X | {"image": "b.png"}, ".*b.png: no such picture"),
    (X | {"phrase": " "}, "phrase ' '"), (X | {"mask": [[1, 2, 3, 4]]}, "a mask is run-length or a list"),
    (X | {"mask": {"size": [6, 8], "counts": "5"}}, "a run-length mask has .*do not fill the size"),
    (X | {"mask": {"size": [3, 2], "counts": [6]}}, "a run-length mask has"), (X | {"mask": "a.png"}, ".*mode RGB"),
    (X | {"task": "guessing"}, "task 'guessing'"),
])
def test_a_bad_line_is_named(lines, record, message):
    write, _ = lines
    dataset = write({"image": "a.png", "phrase": "x", "mask": "m.png"}, record)
    assert dataset[0].phrase == "x"
    with pytest.raises(ValueError, match=f"mine.jsonl: line 2: {message}") as caught:
        dataset[1]
    assert "\n" not in str(caught.value)


def test_a_mask_of_several_parts_is_their_union(lines):
    write, mask = lines
    other = np.zeros_like(mask)
    other[5, 7] = True
    corners = [0.6, 1.6, 4.6, 1.6, 4.6, 3.6, 0.6, 3.6]  # as a polygon, `mask`
    parts = ([rle_encode(mask), rle_encode(other)], [corners, rle_encode(other)], [rle_encode(other)] * 3 + [corners])
    dataset = write(*({"image": "a.png", "phrase": "x", "mask": list(part)} for part in parts))
    assert all(np.array_equal(dataset[i].mask, mask | other) for i in range(3))


@pytest.mark.parametrize("name,message", [("", "not a file"), ("pipe", "not a file"), ("none", "no such file")])
def test_jsonl_is_a_file(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path / name}: .*{message}"):
        load_dataset(f"jsonl:{tmp_path / name}", "val")


def test_jsonl_may_begin_with_a_byte_order_mark(lines, tmp_path):
    write, mask = lines
    dataset = write(b"\xef\xbb\xbf" + json.dumps(X).encode() + b"\r", X)
    assert np.array_equal(dataset[0].mask, mask) and [dataset[i].id for i in range(2)] == ["1", "2"]


def test_sa_ovrs_is_a_folder_of_such_lines(tmp_path, capsys):
    (tmp_path / "sa_000000").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "sa_000000" / "sa_1.jpg")
    record = {"image": "sa_000000/sa_1.jpg", "phrase": "the lamp", "mask": {"size": [6, 8], "counts": [0, 48]},
              "id": "sa_1:7", "task": "referring", "image_id": 1, "annotation_ids": [7]}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    (example,) = load_dataset("sa-ovrs", "train", tmp_path)
    assert example.mask.all() and example.id == "sa_1:7"
    with pytest.raises(FileNotFoundError, match="val.jsonl"):
        load_dataset("sa-ovrs", "val", tmp_path)
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    assert data.main(["check", "sa-ovrs", "--root", str(tmp_path)]) == 0
    assert "sa-ovrs:train: 1 examples\nsa-ovrs:val: 1 examples\n2 examples opened, 0" in capsys.readouterr().out


# --- trees that are not what they should be


def test_wrong_trees_end_in_one_line(tree, tmp_path):
    ade, voc, coco = tree("ade20k"), tree("pascal_voc"), tree("cocostuff")
    base = ade / "ADEChallengeData2016"
    (base / "images" / "validation" / "ADE_val_00000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="ADE_val_00000001.jpg"):
        load_dataset("ade20k", "val", ade)[0]
    Image.new("RGB", (9, 9)).save(base / "images" / "training" / "ADE_train_00000001.jpg")
    with pytest.raises(ValueError, match=r"labels of size \(64, 48\), .*ADE_train_00000001.jpg has \(9, 9\)"):
        load_dataset("ade20k", "train", ade)[0]
    file = base / "annotations" / "validation" / "ADE_val_00000001.png"
    Image.fromarray(np.full((48, 64), 151, np.uint8)).save(file)
    with pytest.raises(ValueError, match="ADE_val_00000001.png: value 151 is none of the 150 classes"):
        load_dataset("ade20k", "val", ade)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="ADE_val_00000001.png: broken label map"):
        load_dataset("ade20k", "val", ade)
    file = voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000032.png"
    Image.open(file).convert("RGB").save(file)
    with pytest.raises(ValueError, match="2007_000032.png: a picture of mode RGB"):
        load_dataset("voc20", "train", voc)
    shutil.rmtree(coco / "annotations" / "val2017")
    (coco / "annotations" / "COCO_train2014_000000000001.mat").touch()  # COCO-Stuff 10k
    with pytest.raises(FileNotFoundError, match="holds none of annotations/val2017, stuffthingmaps"):
        load_dataset("cocostuff", "val", coco)


@pytest.mark.parametrize("name,split,options,message", [
    ("imagenet", "val", {}, "unknown data set 'imagenet'"), ("ade20k", "test", {}, "no split 'test'"),
    ("scenes", "dev", {}, "scenes has no split 'dev'"), ("scenes", "val", {"poor": 1}, "no option 'poor'"),
    ("jsonl:x", "val", {"phrases": 2}, "no option 'phrases'"), ("voc20", "dev", {}, "no split 'dev'"),
    ("refcoco", "testC", {}, "no split 'testC'"), ("refcoco", "val", {"split_by": "umd"}, r"refs\(umd\).p: no such"),
    ("ade20k", "val", {"phrases": 2}, "no option 'phrases'"),
    ("pc59", "val", {}, "holds none of"), ("refcoco+", "val", {}, r"refs\(unc\).p: no such refs file"),
])
def test_wrong_use_ends_in_one_line(tree, name, split, options, message):
    root = tree("refcoco") if name.startswith("refcoco") else tree("ade20k")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_dataset(name, split, root, **options)
    assert "\n" not in str(caught.value)


def test_a_data_set_needs_its_root():
    with pytest.raises(ValueError, match="ade20k needs --root"):
        load_dataset("ade20k", "val")
    for name in ("ade20k", "refcoco", "sa-ovrs"):
        with pytest.raises(FileNotFoundError, match="no/such"):
            load_dataset(name, "val", "no/such")


# --- python data.py check | preview


def test_check_counts_opens_and_names_what_is_broken(tree, capsys):
    root = tree("refcoco")
    assert data.main(["check", "refcoco", "--root", str(root), "--all"]) == 0
    out = capsys.readouterr().out
    assert "refcoco:val: 1 refs (published: 3,811), 1 pictures (published: 1,500), 3 sentences" in out
    assert "11 examples opened, 0 broken" in out and "refcoco:testC" not in out
    assert data.main(["check", "refcoco", "--root", str(root), "--split-by", "google"]) == 0
    assert "refcoco:test: 1 refs (published: 5,000), 1 pictures (published: 4,527), " in capsys.readouterr().out
    picture = next((root / "images").rglob("COCO_train2014_000000581857.jpg"))
    picture.write_bytes(picture.read_bytes()[:300])
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
    assert f"error: {root}: holds none of " in capsys.readouterr().err


@pytest.mark.parametrize("flags,message", [
    ("check ade20k --count 0", "--count 0 must be at least 1"), ("check", "required: name"),
    ("check ade20k", "ade20k needs --root"), ("check imagenet", "unknown data set 'imagenet'"),
    ("preview scenes --first -1", "not negative"),
])
def test_wrong_flags_end_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main(flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_preview_of_a_public_set(tree, tmp_path, capsys):
    flags = ["preview", "voc20", "--root", str(tree("pascal_voc")), "--split", "val", "--out", str(tmp_path / "p.png")]
    assert data.main(flags) == 0
    assert f"wrote {tmp_path / 'p.png'}: examples 0 to 3 of voc20:val" in capsys.readouterr().out
