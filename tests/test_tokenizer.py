import argparse
import itertools
import json
import os
import random
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import tokenizer
from data import load_dataset
from tokenizer import (
    VQGAN, MultiScaleVQ, TextTokenizer, VQGANConfig, decode_masks, image_to_mask, k_means, mask_to_image,
)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def official():
    """A small official LlamaGen checkpoint, and its official outputs."""
    model = VQGAN.from_pretrained(FIXTURES / "llamagen_vq16" / "vq_ds16.pt")
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
    with pytest.raises(RuntimeError, match="24"):
        model.decode(io["nonsquare_codes"])
    with pytest.raises(ValueError, match="60x64"):
        model.encode(torch.zeros(1, 3, 60, 64))


@torch.no_grad()
def test_of_two_weight_sets_the_averaged_one_counts(official):
    io = official[1]
    model = VQGAN.from_pretrained(FIXTURES / "llamagen_vq16" / "vq_ds16_ema.pt")  # `model` beside `ema` is a decoy
    assert (model.latents(io["images"]) - io["ema_latent"]).abs().max() < 2e-4
    assert torch.equal(model.encode(io["images"]), io["ema_codes"])
    assert (model.decode(io["ema_codes"])[:1] - io["ema_decoded"]).abs().max() < 1e-4


def official_weights():
    weights = torch.load(FIXTURES / "llamagen_vq16" / "vq_ds16.pt", weights_only=True)["model"]
    return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["pickle", "legacy", "safetensors", "shards", "trainer"])
@torch.no_grad()
def test_the_same_weights_in_other_containers(official, tmp_path, kind):
    model, io = official
    weights = official_weights()
    janus = {f"gen_vision_model.{name}": tensor for name, tensor in weights.items()}
    janus["language_model.lm_head.weight"] = torch.zeros(3)
    path = tmp_path / "pytorch_model.bin"
    if kind == "pickle":
        torch.save(janus, path)
    elif kind == "legacy":  # what torch wrote before it wrote zip files
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(janus, path)
    elif kind == "shards":
        path, names = tmp_path, sorted(janus)
        for i in range(2):
            save_file({n: janus[n] for n in names[i::2]}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    else:  # the official trainer leaves its flags and the discriminator in the file
        torch.save({"model": weights, "discriminator": {}, "steps": 3, "args": argparse.Namespace(lr=1e-4)}, path)
    again = VQGAN.from_pretrained(path)
    assert again.config == model.config and again.source["sha256"] == model.source["sha256"]
    assert torch.equal(again.encode(io["images"]), io["codes"])


@torch.no_grad()
def test_widths_are_read_off_the_tensors(tmp_path):
    config = VQGANConfig(channels=32, channel_mult=(1, 2, 3), decoder_mult=(2, 1, 4), res_blocks=1, latent_channels=64,
                         codebook_size=20, codebook_dim=5)
    torch.manual_seed(0)
    model = VQGAN(config).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "vq.pt")
    again = VQGAN.from_pretrained(tmp_path / "vq.pt")
    assert again.config == config and config.downsample == 4
    tokens = model.encode(torch.linspace(-1, 1, 3 * 8 * 12).view(1, 3, 8, 12))
    assert torch.equal(again.decode(tokens, grid=(2, 3)), model.decode(tokens, grid=(2, 3)))


@pytest.mark.parametrize("change,message", [
    (lambda w: w.pop("decoder.mid.1.q.weight"), "vq.pt: .*missing: decoder.mid.1.q.weight"),
    (lambda w: w.pop("encoder.conv_in.weight"), "expected a mask tokenizer .*encoder.conv_in.weight"),
    (lambda w: w.update(extra=torch.zeros(2)), "vq.pt: .*left over: extra"),
    (lambda w: w.update({"quant_conv.bias": torch.zeros(9)}), r"wrong shape: quant_conv.bias \(9,\), expected \(8,\)"),
    (lambda w: w["decoder.mid.1.q.weight"].mul_(float("nan")), "not finite: decoder.mid.1.q.weight"),
    (lambda w: w.update({"quant_conv.bias": torch.ones(8, dtype=torch.int8)}), "quant_conv.bias holds torch.int8"),
    (lambda w: w.update({"quant_conv.bias": torch.ones(8).to_sparse()}), "quant_conv.bias holds torch.float32"),
    (lambda w: w.update({"encoder.conv_in.weight": torch.ones(8)}), "expected a mask tokenizer .*must be divisible"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    weights = official_weights()
    change(weights)
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=message) as caught:
        VQGAN.from_pretrained(tmp_path / "vq.pt")
    assert "vq.pt" in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    """Pickled, this would run a command when it is opened."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content, message", [
    ({"model": Payload()}, "refused, this pickle holds posix.system; expected tensors only"),
    ({"model": [1, 2]}, "model holds list, expected floating-point"), ({"a": 1}, "a holds int, expected floating-p"),
    ([3], "'list' object"), ({5: torch.ones(1)}, "'int' object"),
])
def test_a_pickle_with_anything_but_tensors_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=f"vq.pt: .*{message}") as caught:
        VQGAN.from_pretrained(tmp_path / "vq.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "pwned").exists()


def test_mask_and_picture_as_the_convention_says():
    io = load_file(FIXTURES / "mask_roundtrip" / "io.safetensors")
    masks = torch.from_numpy(np.load(FIXTURES / "mask_roundtrip" / "masks.npz")["masks"]).bool()
    assert torch.equal(mask_to_image(masks), io["rgb"])
    assert torch.equal(image_to_mask(io["rgb"]), masks)
    assert torch.equal(image_to_mask(io["noisy"]), io["noisy_mask"].bool())


def tiny(**options):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(channels=8, channel_mult=(1, 1, 1, 1, 2), res_blocks=1, latent_channels=8,
                             codebook_size=32, norm_groups=4, **options)).eval()


# ---- several scales


@pytest.fixture(scope="module")
def var():
    """A small checkpoint in the layout of VAR, and its official outputs."""
    return (MultiScaleVQ.from_pretrained(FIXTURES / "var_vqvae" / "vae.pth", (1, 2, 3, 4)),
            load_file(FIXTURES / "var_vqvae" / "io.safetensors"))


def close(got, want, atol):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@torch.no_grad()
def test_var_gives_the_official_tokens_and_pictures(var):
    model, io = var
    close(model.latents(io["images"]), io["latent"], 1e-4)
    tokens = model.encode(io["images"])
    assert torch.equal(tokens, io["idx"])
    close(torch.stack(list(model.quantize.sums(tokens))), io["f_hat_per_scale"], 1e-5)
    close(model.decode(tokens), io["recon"], 1e-4)
    pictures = model.decode_scales(tokens)
    assert len(pictures) == 4 and torch.equal(pictures[3], model.decode(tokens))
    close(pictures[1], model.decode_latents(io["f_hat_per_scale"][1]).clamp(-1, 1), 1e-4)
    close(model.teacher_inputs(tokens), io["var_input"], 1e-5)
    with pytest.raises(ValueError, match=r"\(32, 32\) px have latents of \(2, 2\), expected the last scale, 4"):
        model.encode(io["images"][:, :, :32, :32])


@pytest.mark.parametrize("size, scales", [(256, tokenizer.VAR_SCALES), (512, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))])
@torch.no_grad()
def test_the_official_schedules(var, size, scales):
    model, io = MultiScaleVQ.from_pretrained(FIXTURES / "var_vqvae" / "vae.pth", scales), var[1]
    assert model.scales == scales and model.quantize.phi_of == io[f"q{size}_phi_index"].tolist()
    tokens = model.quantize.encode(io[f"q{size}_f"])
    assert torch.equal(tokens, io[f"q{size}_idx"])
    close(list(model.quantize.sums(tokens))[-1], io[f"q{size}_f_hat"], 1e-5)
    close(model.teacher_inputs(tokens), io[f"q{size}_var_input"], 1e-5)


@pytest.mark.parametrize("phi_of", ["0123", "01223", "001233", "001122233", "0011122333", "00011112222333"])
def test_each_scale_has_the_official_phi(phi_of):
    config = VQGANConfig(latent_channels=4, codebook_dim=4, codebook_size=4, scales=range(1, len(phi_of) + 1))
    assert tokenizer.MultiScaleQuantizer(config).phi_of == list(map(int, phi_of))


@torch.no_grad()
def test_what_is_read_for_a_scale_depends_on_coarser_tokens_alone(var):
    model, io = var
    other = io["idx"].clone()
    other[:, 5:14] = (other[:, 5:14] + 1) % 80  # all of the third scale
    changed = (model.teacher_inputs(other) != model.teacher_inputs(io["idx"])).any(-1)  # (2,29)
    assert not changed[:, :13].any() and changed[:, 13:].all()


def test_a_multi_scale_file_is_known_by_its_contents(var, tmp_path):
    model = var[0]
    model.save_pretrained(tmp_path / "ms.safetensors")
    again = VQGAN.from_pretrained(tmp_path / "ms.safetensors")
    assert isinstance(again, MultiScaleVQ) and again.config == model.config and again.scales == (1, 2, 3, 4)
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    with pytest.raises(ValueError, match="vq_ds16.pt: expected a mask tokenizer .it has one scale"):
        MultiScaleVQ.from_pretrained(FIXTURES / "llamagen_vq16" / "vq_ds16.pt")
    weights = torch.load(FIXTURES / "var_vqvae" / "vae.pth", weights_only=True)
    weights["quantize.quant_resi.qresi_ls.4.bias"] = weights.pop("quantize.quant_resi.qresi_ls.3.bias")
    torch.save(weights, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="missing: quantize.phi.3.bias; left over: quantize.phi.4.bias"):
        MultiScaleVQ.from_pretrained(tmp_path / "vae.pth")


def test_a_multi_scale_tokenizer_is_made_of_a_plain_one(tmp_path, monkeypatch, capsys):
    import data

    few = [data.Scenes("val")[i] for i in range(12)]
    monkeypatch.setattr(data, "load_dataset", lambda *args: few)
    plain, out = tiny(), tmp_path / "ms.safetensors"
    plain.save_pretrained(tmp_path / "plain.safetensors")
    flags = ["train", "--size", "64", "--scales", "1,2,4", "--save-every", "1000", "--device", "cpu", "--fit-masks",
             "40", "--out", str(out), "--init-from", str(tmp_path / "plain.safetensors")]
    for more, message in (([], "--free-steps 0"), (["--free-steps", "0", "--size", "128"], "the last one is 8 for"),
                          (["--free-steps", "0", "--scales", "1,4,2"], "--scales")):
        with pytest.raises(SystemExit):
            tokenizer.main([*flags, *more])
        assert message in capsys.readouterr().err
    assert tokenizer.main([*flags, "--free-steps", "0", "--steps", "6", "--decoder-steps", "3"]) == 0
    model = VQGAN.from_pretrained(out)
    assert model.scales == (1, 2, 4)
    before, now = plain.state_dict(), model.state_dict()
    close(torch.cat([now[name].flatten() for name in before if name.startswith("encoder.")]),
          torch.cat([w.flatten() for name, w in before.items() if name.startswith("encoder.")]), 1e-3)  # float16
    assert model.quantize.codebook.norm(dim=-1).argmin() == 0  # for where nothing is left to say

    again = [*flags[:-3], str(tmp_path / "again.safetensors"), "--init-from", str(out), "--free-steps", "0"]
    assert tokenizer.main([*again, "--steps", "0", "--decoder-steps", "2"]) == 0  # as the advice after a stop has it
    assert torch.equal(VQGAN.from_pretrained(tmp_path / "again.safetensors").quantize.codebook, model.quantize.codebook)

    more = ["--size", "64", "--mask-tokenizer", str(out)]
    assert tokenizer.main(["eval", "--count", "12", *more, "--out", str(tmp_path / "e.png")]) == 0
    scores = json.loads((tmp_path / "e.json").read_text())
    assert list(scores["total IoU after each scale"]) == ["1", "2", "4"]
    assert "total IoU after each scale: 1 x 1" in capsys.readouterr().out
    assert scores["total IoU after each scale"]["4"] == pytest.approx(scores["square"]["cIoU"], abs=1e-6)


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
    again = VQGAN.from_pretrained(tmp_path)  # the only file of weights in its folder
    assert again.source["sha256"] == VQGAN.from_pretrained(tmp_path / "a.safetensors").source["sha256"]
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
        message = "expected a mask tokenizer" if path.name == "model.safetensors" else "damaged or not a .safetensors"
        with pytest.raises(ValueError, match=f"{path}: {message}") as caught:
            VQGAN.from_pretrained(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="expected a mask tokenizer"):
        VQGAN.from_pretrained(tmp_path)
    for name, message in (("none.safetensors", "no such file$"), ("empty", "has neither model.safetensors"),
                          ("vq_ds16_c2i", "no such file: python weights.py download vq_ds16_c2i$")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=f"{name}: {message}"):
            VQGAN.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("config", ['{"norm_groups": 3}', '{"norm_groups": 0}', '{"norm_groups": NaN}',
                                    '{"norm_groups": Infinity}', '{"norm_groups": null}', "{}",
                                    "[1]", "[" * 100_000], ids=lambda config: config[:25])
def test_a_header_that_does_not_fit_ends_in_one_line(tmp_path, config):
    save_file(tiny().state_dict(), tmp_path / "vq.safetensors", metadata={"format": "vqgan", "config": config})
    with pytest.raises(ValueError, match="vq.safetensors: expected a mask tokenizer") as caught:
        VQGAN.from_pretrained(tmp_path / "vq.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@torch.no_grad()
def test_codes_do_not_depend_on_autocast():
    model = tiny()
    latents = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.quantize.nearest(latents)
    assert torch.equal(tokens, model.quantize.nearest(latents))


def test_codes_are_chosen_without_tf32_whatever_the_rest_does(monkeypatch):
    model, images = tiny(), mask_to_image(torch.rand(1, 32, 32) > 0.5)

    def settings():
        return (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"))

    found, before = [], settings()
    model.encoder.register_forward_hook(lambda *_: found.append(settings()))
    kind, real = type(model.quantize), type(model.quantize).codebook
    monkeypatch.setattr(kind, "codebook", property(lambda q: found.append(settings()) or real.fget(q)))
    try:
        torch.set_float32_matmul_precision("high")  # as train.py does; convolutions have TF32 as PyTorch's default
        high = settings()
        assert high[:3] == ("high", True, True)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.encode(images)
            assert settings() == (*high[:3], True)
        assert found == [("highest", False, False, False)] * 2 and settings() == high
        with pytest.raises(ValueError, match="30x30"):
            model.encode(images[:, :, :30, :30])
        with pytest.raises(RuntimeError):
            model.encode(images[:, :2])
        assert settings() == high
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert settings() == before and torch.equal(model.encode(images), tokens)


def test_k_means_finds_the_clusters():
    centers = F.normalize(torch.randn(5, 8), dim=-1)
    points = F.normalize(centers.repeat(200, 1) + 0.01 * torch.randn(1000, 8), dim=-1)
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
    text_tokenizer = TextTokenizer(FIXTURES / "gemma_text" / "tokenizer.model", 64)
    cases = json.loads((FIXTURES / "gemma_text" / "io.json").read_text())["cases"]
    assert len(cases) >= 40
    ids = text_tokenizer([c["text"] for c in cases])
    for case, row in zip(cases, ids.tolist()):
        assert row == case["ids"], case["text"]
        needed = len(text_tokenizer._ids(case["text"])) + 1
        assert text_tokenizer.too_long(case["text"]) == (needed if needed > 64 else 0)


def test_half_of_a_surrogate_pair_is_refused():
    text_tokenizer = TextTokenizer(FIXTURES / "gemma_text" / "tokenizer.model", 64)
    for ask in (text_tokenizer.too_long, lambda text: text_tokenizer([text])):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            ask("half \ud83d")


def test_tokenizer_json_gives_the_ids_of_tokenizer_model():
    folder = FIXTURES / "gemma_text"
    sentencepiece, from_json = (TextTokenizer(folder / f"tokenizer.{end}") for end in ("model", "json"))
    cases = json.loads((folder / "io.json").read_text())["cases"]
    assert from_json([c["text"] for c in cases]).tolist() == [c["ids"] for c in cases]
    model = from_json.model
    assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)

    draw = random.Random(0)  # text of single characters and of whole pieces, control tokens and bytes among them
    parts = list("abc the   \n\n\t\bABC é日😀▁0123,.'") + [model.id_to_piece(i) for i in range(model.vocab_size())]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randrange(30)))
        assert model.encode(text) == sentencepiece.model.encode(text), repr(text)


def test_merges_may_be_written_as_strings(tmp_path):
    content = json.loads((FIXTURES / "gemma_text" / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    texts = ["the red circle\n\n  on the left", "something to sit on"]
    old = TextTokenizer(FIXTURES / "gemma_text" / "tokenizer.model")
    assert torch.equal(TextTokenizer(tmp_path)(texts), old(texts))  # found in its folder


@pytest.mark.parametrize("change", [
    lambda c: c.pop("model"), lambda c: c["model"].update(type="Unigram"), lambda c: c["model"]["vocab"].pop("<eos>"),
    lambda c: c["model"].update(byte_fallback=False), lambda c: c["model"]["vocab"].update(zzz=9999),
    lambda c: c["model"]["vocab"].update({"\ud800": len(c["model"]["vocab"])}), lambda c: c.update(added_tokens=5),
])
def test_another_kind_of_tokenizer_json_is_refused(tmp_path, change):
    content = json.loads((FIXTURES / "gemma_text" / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json: expected Gemma's") as caught:
        TextTokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_text_tokenizer_refuses_other_files(tmp_path):
    (tmp_path / "x.model").write_text("no model")
    with pytest.raises(ValueError, match="x.model"):
        TextTokenizer(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="y.model"):
        TextTokenizer(tmp_path / "y.model")


def test_the_vocabulary_knows_the_words_of_scenes(tmp_path, monkeypatch):
    from scenes import EXTREMES, RICH_COLORS, RICH_SHAPES

    some = list(itertools.islice(tokenizer.text_sentences(), 5000))
    monkeypatch.setattr(tokenizer, "text_sentences", lambda: some)
    assert tokenizer.main(["text", "--out", str(tmp_path / "text.model")]) == 0
    for path in (tmp_path / "text.model", Path(__file__).parents[1] / "assets" / "text.model"):
        model = TextTokenizer(path, 24).model
        assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)
        for word in (*RICH_SHAPES, *RICH_COLORS, *EXTREMES, "the", "everything", "segmentation"):
            assert len(model.encode(word)) == 1, (path, word)
        assert model.unk_id() not in model.encode("a zebra, 7 quick (foxes)!")


def test_training_lowers_the_loss_and_fills_the_codebook(tmp_path, monkeypatch):
    import data

    monkeypatch.setattr(tokenizer, "SCENES", tiny().config)
    few = {split: [data.Scenes(split)[i] for i in range(n)] for split, n in (("train", 60), ("val", 8))}
    monkeypatch.setattr(data, "load_dataset", lambda name, split, root: few[split])
    real = tokenizer.evaluate  # 8 validation masks instead of 128
    monkeypatch.setattr(tokenizer, "evaluate", lambda *args: real(*args[:3], 8))
    out = tmp_path / "vq.safetensors"
    flags = ["train", "--size", "32", "--save-every", "1000", "--device", "cpu", "--fit-masks", "60",
             "--out", str(out)]
    assert tokenizer.main([*flags, "--free-steps", "20", "--steps", "8", "--decoder-steps", "2"]) == 0
    model = VQGAN.from_pretrained(out)
    masks = tokenizer.mask_batch(few["val"], 32, 0, 8)
    with torch.no_grad():
        before, after = (
            tokenizer.reconstruction_loss(m.decode(m.encode(mask_to_image(masks))), masks) for m in (tiny(), model)
        )
    assert after < 0.8 * before
    assert len(model.encode(mask_to_image(masks)).unique()) > 8

    more = tmp_path / "more.safetensors"  # the decoder alone: mask tokens must stay
    assert tokenizer.main([*flags[:-1], str(more), "--init-from", str(out), "--free-steps", "0",
                           "--steps", "0", "--decoder-steps", "3"]) == 0
    now, then = VQGAN.from_pretrained(more).state_dict(), model.state_dict()
    changed = {k for k in now if not torch.equal(now[k], then[k])}
    assert "decoder.conv_in.weight" in changed and all(k.startswith(("decoder.", "post_quant_conv.")) for k in changed)


@torch.no_grad()
def test_pictures_of_eval_keep_their_aspect():
    mask = np.zeros((20, 90), bool)
    mask[5:15, 30:60] = True
    example = argparse.Namespace(image=Image.new("RGB", (90, 20)), mask=mask, phrase="x", id=None)
    _, _, used, cells, after = tokenizer.evaluate(tiny(), [example] * 30, 64, 30)
    assert len(cells) == 24 and 0 < used <= 16 and after == {}
    phrase, (picture, shown, again) = cells[0]
    assert phrase == "x" and picture is example.image and shown is mask and again.shape == (20, 90)


def test_eval_reports_the_embedded_tokenizer(tmp_path, capsys):
    assert tokenizer.main(["eval", "--data", "scenes-plain", "--count", "12", "--out", str(tmp_path / "e.png")]) == 0
    said = capsys.readouterr().out
    assert "scenes-plain:test, 12 masks" in said and (tmp_path / "e.png").exists()
    assert json.loads((tmp_path / "e.json").read_text())["square"]["count"] == 12
    assert [float(iou) > 0.95 for iou in re.findall(r"total IoU (\S+),", said)] == [True, True]


def test_cached_mask_tokens_are_those_of_the_encoder(tmp_path, tiny_checkpoint, monkeypatch):
    import train

    model = train.LlamaSeg.from_pretrained(tiny_checkpoint / "model.safetensors")
    monkeypatch.setitem(train.PRESETS, "scenes", model.config)
    vqgan = tiny_checkpoint / "mask_tokenizer.safetensors"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "phrase": "x", "mask": [[i, 0, 40, i, 20, 30]]} for i in range(7)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    name = f"jsonl:{tmp_path / 'mine.jsonl'}"
    flags = ["encode", "--data", name, "--size", "64", "--batch-size", "3", "--mask-tokenizer", str(vqgan)]
    assert tokenizer.main([*flags, "--out", str(tmp_path / "t.npy")]) == 0
    table = np.load(tmp_path / "t.npy")
    assert table.dtype == np.uint16
    masks = tokenizer.mask_batch(load_dataset(name, "train"), 64, 0, 7)
    tokens = VQGAN.from_pretrained(vqgan).encode(mask_to_image(masks))
    assert np.array_equal(table, tokens.numpy())

    run = ["--data", name, "--mask-tokenizer", str(vqgan), "--max-steps", "3", "--batch-size", "4", "--device", "cpu",
           "--eval-count", "2", "--dtype", "float32"]
    assert train.main([*run, "--out-dir", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(VQGAN, "encode", lambda *_: pytest.fail("the encoder should rest"))
    assert train.main([*run, "--out-dir", str(tmp_path / "b"), "--mask-tokens", str(tmp_path / "t.npy")]) == 0
    losses = [[json.loads(line).get("loss") for line in (tmp_path / d / "log.jsonl").read_text().splitlines()]
              for d in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_cached_mask_tokens_are_of_the_very_masks_that_are_trained(tmp_path, tiny_checkpoint):
    """A cache of stretched masks has an IoU of about 0.5 with the padded ones that Janus is trained on."""
    from data import load_mixture

    for i in range(4):
        Image.new("RGB", (40, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [{"image": f"{i}.png", "phrase": "x", "mask": [[0, 0, 40, 0, 40, 20, 0, 20]]} for i in range(4)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    name, path = f"jsonl:{tmp_path / 'mine.jsonl'}", tmp_path / "t.npy"
    flags = ["encode", "--data", name, "--size", "64", "--out", str(path), "--padded",
             "--mask-tokenizer", str(tiny_checkpoint / "mask_tokenizer.safetensors")]
    assert tokenizer.main(flags) == 0
    index = json.loads((tmp_path / "t.json").read_text())
    assert len(np.unique(np.load(path)[0])) > 1  # object in the middle, background above and below
    expected = {"data": name, "split": "train", "size": 64, "padded": True,
                "files": load_mixture(name, "train").file_hashes()}
    ask = [path, (4, 16), index["mask_tokenizer"]]
    assert tokenizer.read_tokens(*ask, **expected).shape == (4, 16)
    for change in ({"data": "other"}, {"padded": False}, {"size": 128}, {"split": "val"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} .*, expected .*: encode again"):
            tokenizer.read_tokens(*ask, **expected | change)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines[::-1])))
    expected["files"] = load_mixture(name, "train").file_hashes()
    with pytest.raises(ValueError, match="files .* encode again"):
        tokenizer.read_tokens(*ask, **expected)


@pytest.mark.parametrize("flags, message", [
    ("train --save-every 0", "--save-every 0 must be at least 1"),
    ("eval --count 0", "--count 0"),
    ("text --out no/such/folder/x", "there is no folder no/such/folder"),
    ("train --steps -1", "--steps -1 must be at least 0"),
    ("train --start -1", "--start -1"),
    ("train --device nope", "argument --device: .*'nope'"),
    ("train --device cuda:99", "argument --device: .*'cuda:99'"),
    ("train --lr nan", "--lr nan must be at least 1e-12"),
    ("train --lr 0", "--lr 0.0"),
    ("train --data typo", "unknown data set 'typo': choose one of scenes, scenes-plain, scenes-rich, "),
    ("eval --data refcoco", "refcoco needs --root"),
    ("eval --split typo", "scenes has no split 'typo'"),
    ("text --out tests", "--out tests"),
    ("train --out vq.png", "must end in .safetensors"),
    ("text --lr 3", "unrecognized arguments: --lr 3"),
])
def test_wrong_use_of_the_command(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    try:
        code = tokenizer.main(flags.split())
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    assert [path.name for path in tmp_path.rglob("*")] == ["tests"]


@pytest.mark.parametrize("at", [0, 2, 3, 5])  # two steps in each of three phases; at 2 the codebook cannot be made
def test_training_that_is_stopped_saves_and_says_how_to_go_on(at, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "SCENES", tiny().config)
    monkeypatch.setattr(tokenizer, "mask_batch", lambda data, size, start, n: torch.rand(n, size, size) > 0.5)
    steps, real = [], tokenizer.reconstruction_loss

    def k_means(points, count, start):
        if len(steps) == at == 2:
            raise ValueError("3 different latents cannot fill a codebook")
        return F.normalize(torch.randn(count, 8), dim=-1)

    monkeypatch.setattr(tokenizer, "k_means", k_means)

    def loss(images, masks):
        steps.append(len(masks))
        if len(steps) == at + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(images, masks)

    monkeypatch.setattr(tokenizer, "reconstruction_loss", loss)
    out = tmp_path / "vq.safetensors"
    flags = ["train", "--size", "32", "--batch-size", "1", "--device", "cpu", "--out", str(out), "--save-every", "99",
             "--fit-masks", "20"]
    sheet = [("x", [np.zeros((4, 4), bool)])]
    monkeypatch.setattr(tokenizer, "evaluate", lambda *_: (dict.fromkeys(["cIoU", "gIoU", "mAHD@0.5"]), 0, 0, sheet))
    asked = [*flags, "--free-steps", "2", "--steps", "2", "--decoder-steps", "2"]
    assert tokenizer.main(asked) == (1 if at == 2 else 130)
    error = capsys.readouterr().err
    if at == 0:
        assert "nothing was saved: no step was done" in error and not list(tmp_path.iterdir())
        return
    VQGAN.from_pretrained(out)
    assert f"saved {out} after {at} of 6 steps" in error and ("codebook is not trained yet" in error) == (at <= 2)
    more = re.search(r"the same command with (.*)", error)[1].split()
    left = {1: (1, 2, 2), 2: (1, 2, 2), 3: (0, 1, 2), 4: (0, 0, 2), 5: (0, 0, 1)}[at]
    assert more == ["--init-from", str(out), "--start", str(2 * at), "--free-steps", str(left[0]), "--steps",
                    str(left[1]), "--decoder-steps", str(left[2])]
    steps.clear()
    monkeypatch.setattr(tokenizer, "reconstruction_loss", lambda *args: steps.append(1) or real(*args))
    assert tokenizer.main([*flags, *more]) == 0 and len(steps) == sum(left)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    model = tiny()
    model.save_pretrained(tmp_path / "vq.safetensors")
    before = (tmp_path / "vq.safetensors").read_bytes()
    model.quant_conv.bias.data[0] = 1e6  # more than float16 holds
    with pytest.raises(ValueError, match="vq.safetensors: not written, the weights are no longer finite"):
        model.save_pretrained(tmp_path / "vq.safetensors", torch.float16)
    assert (tmp_path / "vq.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_line_with_the_path(tmp_path, tiny_checkpoint, capsys):
    from model import LlamaSeg

    vqgan, model = tiny(), LlamaSeg.from_pretrained(tiny_checkpoint / "model.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writers = {"vq.safetensors": vqgan.save_pretrained, "model.safetensors": model.save_pretrained}
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes: as a full disk, writing ends in an error
        try:
            with pytest.raises(OSError) as caught:
                write(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_outputs_overwrite_nothing_of_others(tmp_path, capsys):
    out, records = tmp_path / "vq.safetensors", tmp_path / "t.json"
    out.write_bytes(b"weeks of work")
    records.write_text("{}")
    cache = str(records.with_suffix(".npy"))
    for flags, message in ((["train", "--out", str(out)], "there is such a file already"),
                           (["encode", "--out", cache], "the .json beside it is there already"),
                           (["eval", "--data", "jsonl:x", "--split", "val"], "--split has no use with --data jsonl:x")):
        with pytest.raises(SystemExit) as stopped:
            tokenizer.main(flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert out.read_bytes() == b"weeks of work" and records.read_text() == "{}"


def test_ctrl_c_says_that_nothing_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command, inside in (("eval", "evaluate"), ("text", "text_sentences")):
        monkeypatch.setattr(tokenizer, inside, lambda *_, **more: os.kill(os.getpid(), signal.SIGINT))
        assert tokenizer.main([command]) == 130
        assert capsys.readouterr().err == "stopped: nothing was written\n" and not list(tmp_path.iterdir())


def test_plain_background_is_one_code():
    model = VQGAN.from_pretrained(Path(__file__).parents[1] / "assets" / "mask_tokenizer.safetensors")
    masks = torch.zeros(1, 128, 128, dtype=torch.bool)
    masks[:, 40:60, 70:100] = True
    tokens = model.encode(mask_to_image(masks)).view(8, 8)
    corners = tokens[5:, :3]  # three patches and more away from the object
    assert (corners == 0).all() and 0 not in tokens[3, 5:6]
