import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
from data import Batches, Scenes, open_picture, polygons_to_mask, resize_mask, rle_decode, rle_encode

FIXTURES = Path(__file__).parent / "fixtures"


# --- names


def test_instruct_adds_an_article_to_bare_names():
    template = "Produce a segmentation mask for {}."
    assert data.instruct("chair", template) == "Produce a segmentation mask for the chair."
    assert data.instruct("the red circle", template) == "Produce a segmentation mask for the red circle."
    assert data.instruct("everything blue", template) == "Produce a segmentation mask for everything blue."


# --- resizing


def test_resize_mask_keeps_simple_masks_exact():
    mask = np.zeros((64, 96), bool)
    mask[16:32, 24:72] = True
    small = np.zeros((32, 32), bool)
    small[8:16, 8:24] = True
    assert (resize_mask(mask, 32) == small).all()
    assert resize_mask(np.ones((1, 1), bool), 32).all()


def triangle(n, size):
    """Weights (size, n) of bilinear interpolation from n pixels to size, wider where it shrinks."""
    scale = n / size
    centers = (np.arange(size) + 0.5) * scale
    weights = 1 - np.abs(np.arange(n) + 0.5 - centers[:, None]) / max(1.0, scale)
    weights = weights.clip(0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape, size", [((375, 500), 256), ((90, 61), 128), ((40, 300), 64), ((130, 130), 384)])
def test_resizing_in_training_is_bilinear(shape, size):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (*(-(-n // 8) for n in shape), 3), np.uint8).repeat(8, 0).repeat(8, 1)
    picture = noise[: shape[0], : shape[1]]
    again = data.resize_pixels(picture, size).astype(int)
    assert np.abs(again - data.resize_picture(Image.fromarray(picture), size)).max() <= 1
    mask = picture[:, :, 0] > 127
    exact = triangle(shape[0], size) @ mask @ triangle(shape[1], size).T
    for layout in (np.ascontiguousarray(mask), np.asfortranarray(mask)):  # as a PNG and as RLE give it
        wrong = resize_mask(layout, size) != (exact >= 0.5)
        assert np.abs(exact[wrong] - 0.5).max(initial=0) < 1 / 128  # two roundings to 1 / 255
        assert wrong.mean() < 0.005


# --- batches


def batches(**options):
    def text_tokenizer(texts):
        return torch.tensor([[hash(text) % 1000] for text in texts])

    defaults = dict(batch_size=16, micro_batch_size=16, phrases=4, seed=3, hide=True)
    return Batches(Scenes("train", phrases=4), text_tokenizer, 32, 16, **(defaults | options))


def test_a_batch_does_not_depend_on_how_it_is_split():
    whole = batches()
    ranks = [batches(micro_batch_size=4, rank=r, world_size=2) for r in range(2)]
    assert ranks[0].accumulation == 2
    for step in range(2):
        want = whole[step]
        parts = [ranks[r][step * 2 + micro] for micro in range(2) for r in range(2)]
        assert want["ids"] == [i for p in parts for i in p["ids"]]
        for key in ("text_ids", "pictures", "masks", "hide"):
            assert torch.equal(want[key], torch.cat([p[key] for p in parts])), key
        assert len(set(want["ids"])) == 16
    assert whole[0]["pictures"].shape == (4, 32, 32, 3) and whole[0]["masks"].shape == (16, 32, 32)
    pixels = data.to_pixels(whole[0]["pictures"])
    assert pixels.shape == (4, 3, 32, 32) and -1 <= pixels.min() and pixels.max() <= 1


def test_an_epoch_shows_each_picture_once_and_in_another_order():
    b = Batches(range(10), None, 32, 16, 2, 2)
    epochs = [[b._index(e * 10 + i) for i in range(10)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]


def test_wrong_batch_sizes_are_refused():
    for wrong in (6, 2, 0):  # no divisor of 16, no multiple of 4 phrases, no batch
        with pytest.raises(ValueError, match=f"batch size 16 must be a multiple of micro-batch size {wrong} x 1 ranks"):
            batches(micro_batch_size=wrong)


# --- run-length encoding


def test_rle_equals_coco_byte_for_byte():
    cases = json.loads((FIXTURES / "rle" / "rle.json").read_text())["cases"]
    masks = np.load(FIXTURES / "rle" / "masks.npz")
    assert len(cases) > 20
    for case in cases:
        mask = masks[case["mask"]].astype(bool)
        assert rle_encode(mask) == {"size": case["size"], "counts": case["counts"]}, case["name"]
        for counts in (case["counts"], case["counts"].encode(), case["counts_uncompressed"]):
            assert np.array_equal(rle_decode({"size": case["size"], "counts": counts}), mask)


BIG = [10**6, 10**6]


@pytest.mark.parametrize("size", [BIG, [-2, -3], [2.0, 3], {}, ["2", "3"], [6], None])
def test_hostile_sizes_of_run_lengths_end_in_one_line(size):
    for counts in ([10**12], "PPYo1", [6]):
        with pytest.raises(ValueError, match="a run-length mask ") as caught:
            rle_decode({"size": size, "counts": counts})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("rle", [*({"size": [2, 3], "counts": counts} for counts in (
    [3.5, 2.5], ["6"], [-1, 7], [10**30], [[6]], None, {}, "\u00e9", "\ud800", [], "", [3, 4], "o",
    "o" * 11 + "0",  # 60 bits: sums of them leave int64
)), {"counts": [6]}, {"size": [2, 3]}, [6], None, "6"], ids=repr)
def test_hostile_run_lengths_end_in_one_line(rle):
    with pytest.raises(ValueError, match="run-length") as caught:
        rle_decode(rle)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_declared_size_is_compared_with_the_picture_first(monkeypatch):
    monkeypatch.setattr(np, "repeat", lambda *a: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"a run-length mask .*\[9000, 9000\].* \(expected size \[2, 3\]\)"):
        polygons_to_mask({"size": [9000, 9000], "counts": [9000 * 9000]}, 2, 3)
    for other in (None, 5, "m", True):
        with pytest.raises(ValueError, match="a mask is run-length or a list of polygons"):
            polygons_to_mask(other, 2, 3)


def test_polygons_and_counts_may_be_arrays():
    square = [1, 1, 5, 1, 5, 5, 1, 5]
    assert (polygons_to_mask([np.array(square), tuple(square)], 7, 9) == polygons_to_mask([square], 7, 9)).all()
    counts = np.array([2, 4])
    assert (rle_decode({"size": (np.int64(2), 3), "counts": counts}) == [[False, True, True]] * 2).all()


@pytest.mark.parametrize("polygon", [
    [0, 0, 5, 0, 5, float("nan")], [0, 0, 5, 0, 5, float("inf")], [0, 0, 1e300, 0, 5, 5], [0, 0, -19, 0, 5, 5],
    [0, 0, 10**400, 0, 5, 5], [0, 0, "x", 0, 5, 5], [0, 0, None, 0, 5, 5], [[0, 0], [5, 0, 5]], 5, "abcdef", None, [],
    [0, 0, 5, 0], [0, 0, 5, 0, 5], [-18, 0, 18, 0] * 20_000,  # an outline of 1,440,000 pixels
], ids=lambda polygon: str(polygon)[:40])
@pytest.mark.filterwarnings("error")
def test_hostile_polygons_end_in_one_line(polygon):
    with pytest.raises(ValueError, match="a list of polygons .* the picture of 9 x 7, got ") as caught:
        polygons_to_mask([polygon], 7, 9)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


# --- pictures


def test_pictures_of_every_kind_open_as_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 30), np.uint8)
    kinds = {
        "l.png": Image.fromarray(grey),
        "p.png": Image.fromarray(np.stack([grey] * 3, 2)).quantize(16),
        "rgba.png": Image.fromarray(np.stack([grey] * 4, 2)),
        "1.png": Image.fromarray(grey > 128),
        "cmyk.jpg": Image.fromarray(np.stack([grey] * 3, 2)).convert("CMYK"),
        "i16.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        opened = open_picture(tmp_path / name)
        assert opened.mode == "RGB" and opened.size == (30, 20), name
    assert (np.asarray(open_picture(tmp_path / "i16.png"))[..., 0] == grey).all()


def test_transparent_pixels_are_blended_as_alpha_compositing_does():
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for image in (Image.fromarray(np.stack([value, 255 - value, value // 2, alpha], -1)),
                  Image.fromarray(np.stack([value, alpha], -1))):
        blended = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        assert np.array_equal(data.to_rgb(image), blended.convert("RGB"))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 30)


def test_broken_pictures_end_in_one_line(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png"):
        with pytest.raises(ValueError) as caught:
            open_picture(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        open_picture(tmp_path / "nowhere.png")


@pytest.fixture
def pipe(tmp_path):
    """A named pipe from which 100 bytes can be read; whoever wants more waits for ever."""
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    os.write(end, b"x" * 100)
    yield path
    os.close(end)


def test_only_files_are_read_as_pictures_and_masks(pipe, tmp_path):
    for path in (pipe, Path("/dev/zero"), tmp_path):
        for read in (open_picture, data.read_label_map, data.read_mask):
            with pytest.raises(ValueError, match=f"{path}: .*not a file"):
                read(path)
    for read in (open_picture, data.read_label_map, data.read_mask):
        with pytest.raises(ValueError, match="null byte"):
            read(tmp_path / "a\0.png")


def test_pictures_of_many_pixels(tmp_path, monkeypatch):
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)  # Pillow refuses twice as many
    for read in (open_picture, data.read_label_map, data.read_mask):
        with pytest.raises(ValueError, match="a.png: .*exceeds limit of 198 pixels") as caught:
            read(tmp_path / "a.png")
        assert "\n" not in str(caught.value)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("the program was run"))
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="a.jpg: .*PostScript"):
        open_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["I;16", "I", "RGBA", "LA", "turned"])
def test_a_picture_is_held_in_memory_at_most_twice(tmp_path, mode):
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        pytest.skip("the peak of memory is read from Linux's /proc")
    width, height, exif = 4000, 2000, Image.Exif()
    if mode == "turned":
        exif[0x0112] = 6
    array = np.full((height, width), 4660, np.uint16 if mode == "I;16" else np.int32)
    image = Image.fromarray(array) if mode[0] == "I" else Image.new("RGB", (width, height), (9, 8, 7))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
    image.save(tmp_path / "a.tif", exif=exif)
    del array, image

    def megabytes(line):
        return int(next(row for row in status.read_text().splitlines() if row.startswith(line)).split()[1]) / 1024

    gc.collect()
    before = megabytes("VmRSS")
    reset.write_text("5")  # forget the peak
    opened = open_picture(tmp_path / "a.tif")
    # Two copies, and room for what else the process does. Float64 values of the whole picture would be four and more.
    assert opened.mode == "RGB" and megabytes("VmHWM") - before < 3.3 * width * height * 4 / 2**20


def colored(sheet, color):
    """The box (left, top, right, bottom) of the pixels of one color."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_contact_sheet_takes_any_caption_and_aspect(tmp_path):
    tall, wide = np.ones((30, 10), bool), Image.new("RGB", (400, 100), "red")
    cells = [("two\nlines", [tall, wide]), ("long " * 100_000, [wide])]
    data.contact_sheet(cells, tmp_path / "sheet.png", columns=1, tile=60)
    sheet = Image.open(tmp_path / "sheet.png")
    left, top, right, bottom = colored(sheet.crop((0, 0, sheet.width, 84)), (255, 0, 0))
    assert (right - left, bottom - top) == (60, 15) and sheet.getpixel((left, top - 5)) == (211, 211, 211)
    data.contact_sheet(cells, tmp_path / "named.png", columns=1, tile=60, headings=("mask", "picture"))
    named = Image.open(tmp_path / "named.png")  # the same below a line with the headings
    added = named.height - sheet.height
    assert added > 10 and np.array_equal(np.asarray(named)[added + 4 :], np.asarray(sheet)[4:])
    for j in range(2):  # one heading above each tile
        assert (np.asarray(named)[:added, 4 + 62 * j : 64 + 62 * j] < 200).any()


# --- the command


def test_preview_writes_a_contact_sheet(tmp_path, capsys):
    flags = ["preview", "scenes", "--first", "7", "--count", "3", "--out"]
    assert data.main([*flags, str(tmp_path / "sheet.png")]) == 0
    assert "sheet.png: examples 7 to 9 of scenes:train" in capsys.readouterr().out
    shown = [Scenes("train")[i] for i in (7, 8, 9)]
    data.contact_sheet([(e.phrase, [e.image, e.mask]) for e in shown], tmp_path / "own.png",
                       headings=("picture", "mask"))
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    assert data.main([*flags, str(tmp_path / "no" / "sheet.png")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as stopped:
        data.main(["preview", "nothing"])
    assert stopped.value.code == 2 and "unknown data set 'nothing': choose one of scenes" in capsys.readouterr().err


@pytest.mark.parametrize("line,flag", [
    ("preview scenes --root .", "--root"), ("preview scenes-rich --root .", "--root"),
    ("check scenes --root .", "--root"), ("check ade20k --root . --split-by unc", "--split-by"),
    ("check scenes --count 5 --all", "--count"), ("check jsonl:x --split val", "--split"),
    ("preview jsonl:x --split val", "--split"),
])
def test_flags_that_a_job_does_not_read_are_refused(line, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main(line.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"error: {flag} has no use") and error.count("\n") == 1


def test_preview_overwrites_no_data(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        data.main(["preview", f"jsonl:{tmp_path / 'x.jsonl'}", "--out", str(tmp_path / "x.jsonl")])
    assert stopped.value.code == 2 and "ends in .png" in capsys.readouterr().err
    assert (tmp_path / "x.jsonl").read_text() == "{}\n"


def test_a_stop_is_one_line(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load_dataset", stop)
    assert data.main(["check", "scenes"]) == 130 and capsys.readouterr().err == "stopped\n"


# --- mixtures


class Counted:
    """A data set of `count` examples whose ids tell where they are from."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        mask = np.zeros((4, 4), bool)
        return data.Example(Image.new("RGB", (4, 4)), "x", mask, f"{self.name}:{i}", "semantic")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mixture_keeps_its_weights_and_repeats_nothing_in_an_epoch(ranks):
    mixture = data.Mixture([Counted("a", 10), Counted("b", 40)], [1, 2])
    assert len(mixture) == 50 and mixture[10].id == "b:0"
    tokens = np.arange(50 * 3).reshape(50, 3).astype(np.uint16)
    loaders = [Batches(mixture, lambda texts: torch.zeros(len(texts), 2), 4, 4, 6, 6 // ranks, rank=rank,
                       world_size=ranks, mask_tokens=tokens) for rank in range(ranks)]
    seen = []
    for step in range(10):  # 60 examples: 20 of a (two epochs), 40 of b (one)
        for loader in loaders:
            batch = loader[step]
            seen += batch["ids"]
            rows = [int(id.split(":")[1]) + (10 if id[0] == "b" else 0) for id in batch["ids"]]
            assert torch.equal(batch["mask_tokens"], torch.from_numpy(tokens[rows].astype(np.int64)))
    assert sorted(seen) == sorted([f"a:{i}" for i in range(10)] * 2 + [f"b:{i}" for i in range(40)])
    for start in (0, 30):
        assert len({id for id in seen[start : start + 30] if id[0] == "a"}) == 10


def test_load_mixture_reads_names_and_weights(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    mixture = data.load_mixture(f"scenes-rich:3,jsonl:{tmp_path / 'x.jsonl'}:2", "val")
    assert mixture.weights == [3, 2] and len(mixture) == 2001 and mixture.datasets[0].world.clutter
    for text in ("nothing", "scenes:0", "scenes,,"):
        with pytest.raises(data.BadUsage):
            data.load_mixture(text, "val")


# --- pictures as SigLIP2 wants them


def test_pictures_are_prepared_as_the_official_processor_does():
    folder = FIXTURES / "siglip_preprocess"
    io, picture = load_file(folder / "io.safetensors"), open_picture(folder / "picture.png")
    for side in (64, 256):
        assert np.array_equal(data.resize_picture(picture, side), io[f"resized_uint8_{side}"].numpy())
    pixels = data.to_pixels(data.resize_picture(picture, 64)[None])
    torch.testing.assert_close(pixels, io["pixel_values_64"], atol=1e-6, rtol=0)
