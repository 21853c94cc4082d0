import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data import load_dataset
from tokenizer import VQGAN, TextTokenizer, VQGANConfig, decode_masks, image_to_mask, k_means, mask_to_image

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def official():
    """Our VQGAN with the weights of a small official LlamaGen checkpoint, and the official outputs."""
    model = VQGAN(VQGANConfig(channels=32, latent_channels=32, codebook_size=64)).eval()
    state = torch.load(FIXTURES / "llamagen_vq16" / "vq_ds16.pt", weights_only=True)["model"]
    state.pop("quantize.codebook_used")  # statistics of the official trainer
    model.load_state_dict(state)  # strict: the names are the official ones
    return model, load_file(FIXTURES / "llamagen_vq16" / "io.safetensors")


@torch.no_grad()
def test_vqgan_gives_the_official_codes_and_pictures(official):
    model, io = official
    assert (model.encoder(io["images"]) - io["encoder_out"]).abs().max() < 2e-4
    assert (model.latents(io["images"]) - io["latent"]).abs().max() < 2e-4
    assert torch.equal(model.encode(io["images"]), io["codes"])
    assert (model.quantize.codebook - io["codebook_normalised"]).abs().max() < 1e-6
    assert (model.quantize.lookup(io["codes"], (4, 4)) - io["codebook_entry"]).abs().max() < 1e-6
    assert (model.decode(io["codes"]) - io["decoded"]).abs().max() < 1e-4


@torch.no_grad()
def test_vqgan_takes_pictures_that_are_not_square(official):
    model, io = official
    assert torch.equal(model.encode(io["nonsquare_image"]), io["nonsquare_codes"])
    assert (model.decode(io["nonsquare_codes"], grid=(4, 6)) - io["nonsquare_decoded"]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="24 tokens"):
        model.decode(io["nonsquare_codes"])
    with pytest.raises(ValueError, match="60x64"):
        model.encode(torch.zeros(1, 3, 60, 64))


def test_mask_and_picture_as_the_convention_says():
    io = load_file(FIXTURES / "mask_roundtrip" / "io.safetensors")
    masks = torch.from_numpy(np.load(FIXTURES / "mask_roundtrip" / "masks.npz")["masks"]).bool()
    assert torch.equal(mask_to_image(masks), io["rgb"])
    assert torch.equal(image_to_mask(io["rgb"]), masks)
    assert torch.equal(image_to_mask(io["noisy"]), io["noisy_mask"].bool())


def tiny(**options):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(channels=8, channel_mult=(1, 1, 1, 1, 2), res_blocks=1, latent_channels=8,
                             codebook_size=32, norm_groups=4, **options)).eval()  # fmt: skip


@torch.no_grad()
def test_tokens_are_the_brute_force_nearest_rows():
    model = tiny()
    latents = torch.randn(2, 8, 3, 5)
    z = F.normalize(latents, dim=1)
    for b in range(2):
        for n in range(15):
            distance = (z[b, :, n // 5, n % 5] - model.quantize.codebook).square().sum(1)
            assert model.quantize.nearest(latents)[b, n] == distance.argmin()


def test_straight_through_gradient_reaches_encoder_and_codebook():
    model = tiny()
    decoded, loss = model(mask_to_image(torch.rand(2, 32, 32) > 0.5))
    (decoded.square().mean() + loss).backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad.abs().sum() > 0
    tokens = model.encode(mask_to_image(torch.rand(1, 32, 32) > 0.5))
    with torch.no_grad():
        z = model.quantize.lookup(tokens, (2, 2))
        assert torch.allclose(model.decode_latents(z), model.decode(tokens), atol=1e-6)


def test_save_and_load(tmp_path):
    model, masks = tiny(), torch.rand(2, 32, 32) > 0.5
    model.save_pretrained(tmp_path / "a.safetensors")
    again = VQGAN.from_pretrained(tmp_path / "a.safetensors")
    assert again.config == model.config
    assert torch.equal(again.encode(mask_to_image(masks)), model.encode(mask_to_image(masks)))
    model.save_pretrained(tmp_path / "half.safetensors", torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "a.safetensors").stat().st_size
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "half.safetensors"}  # no temporary file left


def test_broken_files_end_in_one_line(tmp_path, tiny_checkpoint):
    whole = (tiny_checkpoint / "mask_tokenizer.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (tmp_path / "cut.safetensors", tmp_path / "text.safetensors", tiny_checkpoint / "model.safetensors"):
        with pytest.raises(ValueError) as caught:
            VQGAN.from_pretrained(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none"):
        VQGAN.from_pretrained(tmp_path / "none.safetensors")


@torch.no_grad()
def test_codes_do_not_depend_on_autocast():
    model = tiny()
    latents = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.quantize.nearest(latents)
    assert torch.equal(tokens, model.quantize.nearest(latents))


def test_k_means_finds_the_clusters():
    centers = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    points = F.normalize(centers.repeat(200, 1) + 0.01 * torch.randn(1000, 8), dim=-1)
    torch.manual_seed(0)
    found = k_means(points, 20)
    assert (found @ centers.T).max(0).values.min() > 0.99  # every cluster has a row
    with pytest.raises(ValueError, match="3"):
        k_means(points[:1].repeat(9, 1), 3)


def test_decode_masks_gives_each_picture_its_own_size():
    model = tiny()
    tokens = torch.randint(32, (3, 16))
    sizes = [(64, 64), (1, 1), (30, 200)]
    masks = decode_masks(model, tokens, sizes)
    assert [m.shape for m in masks] == sizes and all(m.dtype == bool for m in masks)
    assert (masks[0] == image_to_mask(model.decode(tokens))[0].numpy()).all()  # its own size: nothing is resized


def test_text_ids_equal_siglip2s():
    tokenizer = TextTokenizer(FIXTURES / "gemma_text" / "tokenizer.model", 64)
    cases = json.loads((FIXTURES / "gemma_text" / "io.json").read_text())["cases"]
    assert len(cases) >= 40
    ids = tokenizer([c["text"] for c in cases])
    for case, row in zip(cases, ids.tolist()):
        assert row == case["ids"], case["text"]
        assert bool(tokenizer.too_long(case["text"])) == (len(tokenizer._ids(case["text"])) > 63)


def test_text_tokenizer_refuses_other_files(tmp_path):
    (tmp_path / "x.model").write_text("no model")
    with pytest.raises(ValueError, match="x.model"):
        TextTokenizer(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="y.model"):
        TextTokenizer(tmp_path / "y.model")


def test_the_vocabulary_knows_the_words_of_scenes(tmp_path):
    import data
    import tokenizer

    tokenizer.train_text_tokenizer(itertools.islice(tokenizer.text_sentences(), 6000), tmp_path / "text.model", 640)
    for path in (tmp_path / "text.model", Path(__file__).parents[1] / "assets" / "text.model"):
        model = TextTokenizer(path, 24).model
        assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)
        for word in (*data.RICH_SHAPES, *data.RICH_COLORS, *data.EXTREMES, "the", "everything", "segmentation"):
            assert len(model.encode(word)) == 1, (path, word)
        assert model.unk_id() not in model.encode("a zebra, 7 quick (foxes)!")


def test_training_lowers_the_loss_and_fills_the_codebook(tmp_path, monkeypatch):
    import tokenizer

    monkeypatch.setattr(tokenizer, "SCENES", tiny().config)
    out = tmp_path / "vq.safetensors"
    flags = ["train", "--size", "32", "--save-every", "1000", "--device", "cpu", "--fit-masks", "200",
             "--out", str(out)]  # fmt: skip
    assert tokenizer.main([*flags, "--free-steps", "60", "--steps", "20", "--decoder-steps", "5"]) == 0
    model = VQGAN.from_pretrained(out)
    masks = tokenizer.mask_batch(load_dataset("scenes", "val"), 32, 0, 32)
    with torch.no_grad():
        before, after = (
            tokenizer.reconstruction_loss(m.decode(m.encode(mask_to_image(masks))), masks) for m in (tiny(), model)
        )
    assert after < 0.8 * before
    assert len(model.encode(mask_to_image(masks)).unique()) > 8 and out.with_suffix(".png").exists()

    more = tmp_path / "more.safetensors"  # the decoder alone: mask tokens must stay
    assert tokenizer.main([*flags[:-1], str(more), "--init-from", str(out), "--free-steps", "0",
                           "--steps", "0", "--decoder-steps", "3"]) == 0  # fmt: skip
    now, then = VQGAN.from_pretrained(more).state_dict(), model.state_dict()
    changed = {k for k in now if not torch.equal(now[k], then[k])}
    assert "decoder.conv_in.weight" in changed and all(k.startswith(("decoder.", "post_quant_conv.")) for k in changed)


def test_eval_reports_the_embedded_tokenizer(run, tmp_path):
    done = run("tokenizer.py", "eval", "--count", 40, "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["square"]["cIoU"] > 0.95 and result["own_size"]["cIoU"] > 0.95
    assert result["square"]["count"] == 40 and (tmp_path / "e.png").exists()


def test_wrong_use_of_the_command():
    import tokenizer

    for flags in (["train", "--save-every", "0"], ["eval", "--count", "0"], ["text", "--out", "no/such/folder/x"]):
        with pytest.raises(SystemExit) as stopped:
            tokenizer.main(flags)
        assert stopped.value.code == 2


def test_plain_background_is_one_code():
    model = VQGAN.from_pretrained(Path(__file__).parents[1] / "assets" / "mask_tokenizer.safetensors")
    masks = torch.zeros(1, 128, 128, dtype=torch.bool)
    masks[:, 40:60, 70:100] = True
    tokens = model.encode(mask_to_image(masks)).view(8, 8)
    corners = tokens[5:, :3]  # three patches and more away from the object
    assert (corners == 0).all() and 0 not in tokens[3, 5:6]
