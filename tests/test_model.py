"""model.py against plain arithmetic, official-format weights and itself without a cache."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as M
from model import KVCache, Llama, LlamaConfig, LlamaSeg, LlamaSegConfig, SigLIP, SigLIPConfig
from tokenizer import MultiScaleQuantizer, VQGANConfig
from weights import without_numbers

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent / "fixtures"

TINY = LlamaSegConfig(
    siglip=SigLIPConfig(
        image_size=32, patch_size=8, vision_width=64, vision_layers=2, vision_heads=2, vision_mlp=96,
        vocab_size=50, text_length=5, text_width=48, text_layers=2, text_heads=2, text_mlp=80,
    ),
    llama=LlamaConfig(width=64, layers=2, heads=4, kv_heads=2, mlp=96),
    codebook_size=24, mask_grid=4, freeze_encoders=False,
)


def tiny_model(config=TINY, spread=True, device="cpu"):
    """spread: weights large enough that tokens matter to each other and the logits differ clearly."""
    torch.manual_seed(0)
    model = LlamaSeg(config)
    if spread:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=1.5 / math.sqrt(weight.shape[1]))
    return model.to(device)


def tiny_batch(rows=4, pictures=4, config=TINY, seed=1, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    c = config.siglip
    text_ids = torch.randint(0, c.vocab_size, (rows, c.text_length), generator=g)
    pixels = torch.rand(pictures, 3, c.image_size, c.image_size, generator=g) * 2 - 1
    mask_tokens = torch.randint(0, config.codebook_size, (rows, config.mask_tokens), generator=g)
    return text_ids.to(device), pixels.to(device), mask_tokens.to(device)


def score(model, text_ids, pixels, tokens):
    """Summed log-probability of each row of tokens, by the plain forward."""
    with torch.no_grad():
        logits, _ = model(text_ids, pixels, tokens)
    return logits.log_softmax(-1).gather(2, tokens[:, :, None]).sum(dim=(1, 2))


# ---- layers against plain arithmetic --------------------------------------------------------------------------------


def test_rms_norm_is_x_over_its_root_mean_square():
    norm = M.RMSNorm(6, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6)
    for b in range(2):
        for t in range(3):
            rms = math.sqrt(sum(v * v for v in x[b, t].tolist()) / 6 + 1e-6)
            torch.testing.assert_close(norm(x)[b, t], x[b, t] / rms * norm.weight)
    tiny = torch.full((1, 6), 1e-4)  # the eps is half of the mean square here
    torch.testing.assert_close(norm(tiny), tiny / math.sqrt(1e-8 + 1e-6) * norm.weight)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_rope_is_a_complex_rotation_of_split_halves():
    x = torch.randn(2, 3, 5, 8)
    positions = torch.arange(4, 9)
    cos, sin = M.rope_tables(positions, 8, 100.0)
    got = M.rotate(x, cos, sin)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    for i in range(4):
        for t, position in enumerate(positions.tolist()):
            want = pairs[:, :, t, i] * complex(math.cos(position * 100.0 ** (-i / 4)),
                                               math.sin(position * 100.0 ** (-i / 4)))
            torch.testing.assert_close(got[:, :, t, i].double(), want.real, atol=1e-5, rtol=0)
            torch.testing.assert_close(got[:, :, t, i + 4].double(), want.imag, atol=1e-5, rtol=0)


def test_swiglu_is_down_of_silu_gate_times_up():
    mlp = M.LlamaMLP(LlamaConfig(width=6, layers=1, heads=1, mlp=10))
    x = torch.randn(4, 6)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    want = (gate / (1 + torch.exp(-gate)) * up) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), want)


def test_grouped_kv_heads_equal_full_heads_with_repeated_weights():
    torch.manual_seed(0)
    grouped = Llama(LlamaConfig(width=64, layers=2, heads=4, kv_heads=2, mlp=96))
    full = Llama(LlamaConfig(width=64, layers=2, heads=4, kv_heads=4, mlp=96))
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64)
    full.load_state_dict(weights)
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-5, rtol=0)


# ---- official names and reference outputs ---------------------------------------------------------------------------


def test_siglip_has_the_official_parameter_names():
    want = {f"vision_model.embeddings.{n}" for n in
            ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")}
    want |= {f"text_model.embeddings.{n}.weight" for n in ("token_embedding", "position_embedding")}
    want |= {f"{n}.{kind}" for n in ("vision_model.post_layernorm", "text_model.final_layer_norm")
             for kind in ("weight", "bias")}
    for tower in ("vision_model", "text_model"):
        for layer in range(2):
            for n in ("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                      "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                want |= {f"{tower}.encoder.layers.{layer}.{n}.{kind}" for kind in ("weight", "bias")}
    assert set(SigLIP(TINY.siglip).state_dict()) == want


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def check(got, want, atol):
    """float32 within atol of each number; bfloat16 within 10 % of the whole, by the Euclidean norm."""
    got, bfloat16 = got.cpu(), got.dtype == torch.bfloat16
    if bfloat16:
        assert (got.float() - want).norm() < 0.1 * want.norm()
    else:
        torch.testing.assert_close(got, want, atol=atol, rtol=0)


@DTYPES
@torch.no_grad()
def test_siglip_matches_the_reference_outputs(device, dtype):
    siglip = SigLIP.from_pretrained(FIXTURES / "siglip", dtype).to(device)
    io = load_file(FIXTURES / "siglip/io.safetensors", str(device))
    check(siglip.encode_image(io["pixel_values"]), io["vision_last_hidden_state"].cpu(), 3e-5)
    check(siglip.encode_text(io["input_ids"]), io["text_last_hidden_state"].cpu(), 3e-5)


@DTYPES
@torch.no_grad()
def test_llama_matches_the_reference_outputs(device, dtype):
    llama = Llama.from_pretrained(FIXTURES / "hf_llama", dtype).to(device)
    weights = load_file(FIXTURES / "hf_llama/model.safetensors", str(device))
    embedding, head = weights["model.embed_tokens.weight"].to(dtype), weights["lm_head.weight"].to(dtype)
    io = load_file(FIXTURES / "hf_llama/io.safetensors")
    prompt, written = io["input_ids"].to(device), io["generated_ids"].to(device)
    hidden = llama(embedding[prompt])
    check(hidden, io["debug.hidden.3"], 2e-4)
    check(hidden @ head.T, io["logits"], 2e-4)

    check(llama(embedding[torch.cat([prompt, written], dim=1)]) @ head.T, io["full_logits"], 2e-4)
    cache, tokens = KVCache(llama.config, 2, 40, device, dtype), prompt
    for want_ids, want_logits in zip(written.T, io["generated_logits"].unbind(1), strict=True):
        logits = llama(embedding[tokens], cache)[:, -1] @ head.T
        check(logits, want_logits, 2e-4)
        assert dtype == torch.bfloat16 or torch.equal(logits.argmax(-1), want_ids)
        tokens = want_ids[:, None]


@torch.no_grad()
def test_a_rest_that_fills_no_patch_is_left_out():
    siglip = SigLIP(replace(TINY.siglip, image_size=30), text=False)  # three patches of 8 px and 6 px more
    patch = siglip.vision_model.embeddings.patch_embedding
    pixels = torch.randn(2, 3, 30, 30)
    want = F.conv2d(pixels, patch.weight, patch.bias, stride=8).flatten(2).transpose(1, 2)  # (B,9,D)
    want = want + siglip.vision_model.embeddings.position_embedding.weight
    for layer in siglip.vision_model.encoder.layers:
        want = layer(want)
    torch.testing.assert_close(siglip.encode_image(pixels), siglip.vision_model.post_layernorm(want))


# ---- official directories, whole and broken -------------------------------------------------------------------------


def edited(tmp_path, name, config=None, weights=None):
    """A copy of a fixture directory: `config` and `weights` take its dicts and change them."""
    folder = tmp_path / name
    folder.mkdir()
    content = json.loads((FIXTURES / name / "config.json").read_text())
    if config:
        config(content)
    (folder / "config.json").write_text(json.dumps(content))
    tensors = load_file(FIXTURES / name / "model.safetensors")
    if weights:
        weights(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def shard(folder, pickled=False):
    """Cut model.safetensors into two shards and an index, as Hugging Face does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names, places = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{i}-of-00002.{end}"
        content = {name: tensors[name] for name in part}
        torch.save(content, folder / file) if pickled else save_file(content, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name,cls", [("siglip", SigLIP), ("hf_llama", Llama)])
def test_shards_give_the_weights_of_the_whole_file(tmp_path, name, cls, pickled):
    folder = edited(tmp_path, name)
    shard(folder, pickled)
    whole, sharded = cls.from_pretrained(FIXTURES / name), cls.from_pretrained(folder)
    assert all(torch.equal(w, sharded.state_dict()[n]) for n, w in whole.state_dict().items())
    if cls is SigLIP:
        assert sharded.source == whole.source
    next(folder.glob("*-00002-of-00002.*")).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        cls.from_pretrained(folder)


def test_fields_that_the_config_leaves_out_have_the_official_defaults(tmp_path):
    for name, content in (("siglip", {"model_type": "siglip"}), ("llama", {"model_type": "llama"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    config = M.siglip_config(tmp_path / "siglip")  # the numbers of the class in transformers
    assert (config.image_size, config.patch_size, config.vocab_size, config.text_length) == (224, 16, 32000, 64)
    assert (config.vision_width, config.vision_layers, config.vision_heads, config.vision_mlp) == (768, 12, 12, 3072)
    assert (config.text_width, config.text_layers, config.text_heads, config.text_mlp) == (768, 12, 12, 3072)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors"):
        Llama.from_pretrained(tmp_path / "llama")


@torch.no_grad()
def test_rope_theta_may_lie_where_newer_files_keep_it(tmp_path):
    def config(content):
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": content.pop("rope_theta") * 7}
        del content["head_dim"], content["rope_scaling"]

    def weights(tensors):  # four heads of 10 instead of 16
        for name in list(tensors):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name] = tensors[name][:40].clone()
            if name.endswith("o_proj.weight"):
                tensors[name] = tensors[name][:, :40].clone()

    config = Llama.from_pretrained(edited(tmp_path, "hf_llama", config, weights)).config
    assert (config.rope_theta, config.head_dim) == (70000.0, 10)


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)
    return change


def cut(tensors):
    tensors["vision_model.post_layernorm.bias"] = tensors["vision_model.post_layernorm.bias"][:-1].clone()


@pytest.mark.parametrize("field,value", [
    ("hidden_size", "48"), ("num_hidden_layers", None), ("num_attention_heads", -4), ("num_attention_heads", 1.5),
    ("num_hidden_layers", 10**15), ("intermediate_size", True), ("rms_norm_eps", "x"), ("rope_theta", -1),
    ("rope_scaling", "linear"), ("head_dim", -2), ("num_key_value_heads", 3), ("hidden_act", "gelu"),
])
def test_odd_values_in_a_config_end_in_one_line(tmp_path, field, value):
    with pytest.raises(ValueError, match="config.json: |wrong shape: layers.0.self_attn.k_proj") as caught:
        Llama.from_pretrained(edited(tmp_path, "hf_llama", lambda c: c.update({"head_dim": None, field: value})))
    assert "\n" not in str(caught.value)


def test_tensors_of_another_kind_are_refused(tmp_path):
    def whole_numbers(tensors):
        tensors["model.norm.weight"] = torch.ones(40, dtype=torch.int64)

    with pytest.raises(ValueError, match="norm.weight holds torch.int64"):
        Llama.from_pretrained(edited(tmp_path, "hf_llama", weights=whole_numbers))


@pytest.mark.parametrize("change", [
    lambda w: w.to(torch.float8_e4m3fn), lambda w: w.to(torch.complex64), lambda w: w.bool(), lambda w: w.to_sparse(),
    lambda w: w.to("meta"), lambda w: [1.0] * len(w), lambda w: torch.ones(1).expand(10**12),
], ids=range(7))
def test_a_pickle_of_other_tensors_ends_in_one_line(tmp_path, change):
    folder = edited(tmp_path, "hf_llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="norm.weight (holds|.1000000000000,., expected)") as caught:
        Llama.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map, message", [
    ("../outside.safetensors", "index.json: expected a weight_map of files beside it"), ("/etc/passwd", "of files"),
    (".", "of files beside it"), (5, "of files beside it"), ("both", "b.safetensors: another file of .* holds .* too"),
    (None, "of files beside it"),
])
def test_an_index_names_files_beside_it(tmp_path, weight_map, message):
    folder = edited(tmp_path, "hf_llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in (tmp_path / "outside.safetensors", folder / "a.safetensors", folder / "b.safetensors"):
        save_file(tensors, file)
    files = ("a.safetensors", "b.safetensors") if weight_map == "both" else (weight_map, weight_map)
    places = {name: files[i % 2] for i, name in enumerate(tensors)}
    text = "[" * 100_000 if weight_map is None else json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("config,weights,message", [
    (None, rename("text_model.final_layer_norm.bias", "text_model.final_layer_norm.bais"),
     "missing: text_model.final_layer_norm.bias; left over: text_model.final_layer_norm.bais"),
    (None, rename("logit_scale", "another"), "left over: another"),
    (None, cut, r"wrong shape: vision_model.post_layernorm.bias \(47,\), expected \(48,\)"),
    (lambda c: c.update(model_type="siglip2"), None, "model_type is 'siglip2'"),
    (lambda c: c["text_config"].update(hidden_act="gelu"), None, "hidden_act is 'gelu', expected 'gelu_pytorch_tanh'"),
    (lambda c: c["vision_config"].update(num_attention_heads=5), None, "vision_width 48 .* vision_heads 5"),
])
def test_a_directory_that_does_not_fit_ends_in_one_line(tmp_path, config, weights, message):
    with pytest.raises(ValueError, match=message) as caught:
        SigLIP.from_pretrained(edited(tmp_path, "siglip", config, weights))
    assert "siglip" in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_or_missing_file_ends_in_one_line(tmp_path):
    folder = edited(tmp_path, "hf_llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors: damaged") as caught:
        Llama.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected a JSON object"):
        Llama.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        Llama.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="weights.py download siglip2-x"):
        SigLIP.from_pretrained(M.WEIGHTS / "siglip2-x")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"x": Path("p")}, folder / "pytorch_model.bin")  # a pickle with an object in it
    with pytest.raises(ValueError, match="pytorch_model.bin: refused, this pickle holds pathlib") as caught:
        Llama.from_pretrained(folder)
    assert "\n" not in str(caught.value)


# ---- presets and frozen parts ---------------------------------------------------------------------------------------


def test_the_papers_models_have_the_papers_sizes():
    for preset, count in (("llamaseg-b", 770e6), ("llamaseg-l", 1.5e9), ("llamaseg-b-384", 770e6)):
        model = without_numbers(lambda preset=preset: LlamaSeg(M.PRESETS[preset]))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert abs(trainable / count - 1) < 0.02
        tokens = (model.config.siglip.image_size // 16) ** 2
        assert model.config.mask_tokens == tokens == model.config.siglip.image_tokens
        assert not any(p.requires_grad for p in model.encoder.parameters())


def frozen_model():
    encoder = SigLIP.from_pretrained(FIXTURES / "siglip")
    torch.manual_seed(3)
    return LlamaSeg(replace(TINY, siglip=encoder.config, freeze_encoders=True), encoder)


@torch.no_grad()
def test_a_checkpoint_holds_only_what_was_trained(tmp_path):
    model = frozen_model()
    official = load_file(FIXTURES / "siglip/model.safetensors")
    assert all(torch.equal(w, official[n]) for n, w in model.encoder.state_dict().items())  # not initialised again
    model.save_pretrained(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert not any(name.startswith("encoder.") for name in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["frozen"])["encoder"]["name"] == "siglip"
    loaded = LlamaSeg.from_pretrained(tmp_path / "m.safetensors", FIXTURES / "siglip")
    batch = tiny_batch(config=model.config)
    assert torch.equal(loaded(*batch)[0], model(*batch)[0])
    with pytest.raises(FileNotFoundError, match="weights.py download siglip"):
        LlamaSeg.from_pretrained(tmp_path / "m.safetensors")


@torch.no_grad()
def test_an_encoder_that_is_trained_on_is_not_asked_for(tmp_path):
    """It starts from official weights, but the file holds it."""
    encoder = SigLIP.from_pretrained(FIXTURES / "siglip")
    model = LlamaSeg(replace(TINY, siglip=encoder.config), encoder)
    assert model.frozen == {}
    batch = tiny_batch(config=model.config)
    for frozen in ({}, {"encoder": encoder.source}):  # the second as files had it that were written before
        model.frozen = frozen
        model.save_pretrained(tmp_path / "m.safetensors")
        loaded = LlamaSeg.from_pretrained(tmp_path / "m.safetensors")
        assert torch.equal(loaded(*batch)[0], model(*batch)[0])


@torch.no_grad()
def test_another_encoder_is_refused_unless_told(tmp_path):
    frozen_model().save_pretrained(tmp_path / "m.safetensors")

    def change(tensors):
        tensors["text_model.encoder.layers.1.mlp.fc2.weight"][3, 4] += 1e-3

    other = edited(tmp_path, "siglip", weights=change)
    with pytest.raises(ValueError, match="was trained with the encoder siglip .*--any-weights"):
        LlamaSeg.from_pretrained(tmp_path / "m.safetensors", other)
    model = LlamaSeg.from_pretrained(tmp_path / "m.safetensors", other, any_weights=True)
    assert model.encoder.source != frozen_model().encoder.source


@torch.no_grad()
def test_weights_in_bfloat16_give_nearly_the_same_logits(tmp_path):
    model = frozen_model()
    model.save_pretrained(tmp_path / "m.safetensors")
    half = LlamaSeg.from_pretrained(tmp_path / "m.safetensors", FIXTURES / "siglip", torch.bfloat16)
    assert {w.dtype for w in half.parameters()} == {torch.bfloat16}
    text_ids, pixels, mask_tokens = tiny_batch(config=model.config)
    want, got = model(text_ids, pixels, mask_tokens)[0], half(text_ids, pixels, mask_tokens)[0].float()
    assert (got - want).norm() < 0.1 * want.norm()
    assert half.generate(text_ids, pixels).shape == mask_tokens.shape


# ---- KV cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [13] + [1] * 7, [4, 1, 6, 2, 7]], ids=str)
@torch.no_grad()
def test_cached_equals_uncached_at_every_position(device, kv_heads, chunks):
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(width=64, layers=2, heads=4, kv_heads=kv_heads, mlp=96)).to(device)
    x = torch.randn(3, 20, 64).to(device)
    cache = KVCache(llama.config, 3, 22, device)
    torch._foreach_add_(cache.keys, 1e4)  # a look at what is not written yet would show
    got = torch.cat([llama(part, cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(got, llama(x), atol=1e-5, rtol=0)
    assert cache.position == 20


@torch.no_grad()
def test_a_token_sees_the_blocks_up_to_its_own():
    """Three scales of 1, 4 and 9 tokens, in one pass and scale by scale, and two tokens of padding before one row."""
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(width=64, layers=2, heads=4, kv_heads=2, mlp=96))
    sizes = [1, 4, 9]
    blocks = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    x = torch.randn(2, 14, 64)
    whole = llama(x, blocks=blocks.expand(2, -1))
    other = x.clone()
    other[:, 3] += 1.0  # in the second scale: its own and the next scale see it, the first does not
    changed = (llama(other, blocks=blocks.expand(2, -1)) - whole).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] + [True] * 13
    cache = KVCache(llama.config, batch=2, length=14)
    parts = [llama(part, cache, ids) for part, ids in zip(x.split(sizes, 1), blocks.expand(2, -1).split(sizes, 1))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)

    padded, ids = torch.cat([torch.randn(2, 2, 64), x], dim=1), torch.arange(16).repeat(2, 1)
    ids[0, :2] = M.UNSEEN
    torch.testing.assert_close(llama(padded, blocks=ids)[0, 2:], llama(x)[0], atol=1e-5, rtol=0)
    assert (llama(padded, blocks=ids)[1, 2:] - llama(x)[1]).abs().max() > 0.01  # no padding there


def test_a_full_cache_says_so():
    llama = Llama(LlamaConfig(width=64, layers=1, heads=4, mlp=96))
    cache = KVCache(llama.config, batch=1, length=8)
    llama(torch.randn(1, 6, 64), cache)
    with pytest.raises(ValueError, match=r"6 \+ 3 tokens .* 8"):
        llama(torch.randn(1, 3, 64), cache)
    assert cache.position == 6


@torch.no_grad()
def test_repeated_and_reordered_cache_continues_the_chosen_rows():
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(width=64, layers=2, heads=4, mlp=96))
    prefix, middle, last = torch.randn(2, 5, 64), torch.randn(6, 2, 64), torch.randn(6, 1, 64)
    cache = KVCache(llama.config, batch=2, length=8)
    llama(prefix, cache)
    cache.repeat(3)
    llama(middle, cache)
    rows = torch.tensor([2, 0, 0, 4, 5, 4])  # within each example's three
    cache.copy_rows(rows, slice(None), start=5)
    whole = torch.cat([prefix.repeat_interleave(3, dim=0), middle[rows], last], dim=1)
    torch.testing.assert_close(llama(last, cache), llama(whole)[:, -1:], atol=1e-5, rtol=0)


# ---- forward --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_token_changes_only_the_logits_after_it(device):
    model = tiny_model(device=device)
    text_ids, pixels, tokens = tiny_batch(device=device)
    logits, _ = model(text_ids, pixels, tokens)
    for t in (0, 7, 14):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % TINY.codebook_size
        changed, _ = model(text_ids, pixels, other)
        assert torch.equal(changed[:, :t + 1], logits[:, :t + 1])
        assert not torch.allclose(changed[:, t + 1:], logits[:, t + 1:], atol=1e-3)


@torch.no_grad()
def test_every_part_of_the_prefix_reaches_the_first_mask_token():
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch()
    prefix = model.prefix(text_ids, pixels)
    assert prefix.shape == (4, 5 + 1 + 16 + 1, 64)
    assert torch.equal(prefix[:, 5], model.boi.expand(4, -1))
    assert torch.equal(prefix[:, -1], model.bom.expand(4, -1))
    first = model(text_ids, pixels, tokens)[0][:, 0]
    other_phrase = model((text_ids + 1) % 50, pixels, tokens)[0][:, 0]
    other_picture = model(text_ids, -pixels, tokens)[0][:, 0]
    assert (first - other_phrase).abs().max() > 1e-3 and (first - other_picture).abs().max() > 1e-3


@pytest.mark.parametrize("from_codebook", [False, True])
def test_first_loss_is_ln_of_the_codebook_size(from_codebook):
    model = tiny_model(replace(TINY, codebook_size=512), spread=False)
    if from_codebook:
        model.init_mask_tokens(torch.randn(512, 8))
    _, loss = model(*tiny_batch(config=model.config))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(512)) < 0.1


def test_residual_outputs_start_smaller_in_a_deeper_tower():
    model = LlamaSeg(replace(TINY, llama=replace(TINY.llama, layers=8)))
    for tower, depth, name in ((model.llama, 8, "self_attn.o_proj"), (model.llama, 8, "mlp.down_proj"),
                               (model.encoder.vision_model.encoder, 2, "self_attn.out_proj"),
                               (model.encoder.text_model.encoder, 2, "mlp.fc2")):
        std = tower.layers[0].get_submodule(name).weight.std().item()
        assert abs(std / (0.02 / math.sqrt(2 * depth)) - 1) < 0.1
    assert abs(model.llama.layers[0].mlp.up_proj.weight.std().item() / 0.02 - 1) < 0.1


def test_one_batch_overfits():
    model = tiny_model(spread=False)
    text_ids, pixels, tokens = tiny_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        _, loss = model(text_ids, pixels, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    assert torch.equal(model.generate(text_ids, pixels), tokens)


@torch.no_grad()
def test_phrases_that_share_a_picture_equal_a_repeated_picture():
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch(rows=6, pictures=2)
    repeated = pixels.repeat_interleave(3, dim=0)
    shared_logits, shared_loss = model(text_ids, pixels, tokens)
    logits, loss = model(text_ids, repeated, tokens)
    torch.testing.assert_close(shared_logits, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(shared_loss, loss)
    assert torch.equal(model.generate(text_ids, pixels), model.generate(text_ids, repeated))


@torch.no_grad()
def test_hidden_mask_tokens_are_not_seen():
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch()
    other = (tokens + 1) % TINY.codebook_size
    everything = torch.ones(4, 16, dtype=torch.bool)
    a, b = (model(text_ids, pixels, t, hide_tokens=everything)[0] for t in (tokens, other))
    assert torch.equal(a, b)

    rows = torch.tensor([True, False, True, False])
    c = model(text_ids, pixels, tokens, hide_tokens=rows[:, None].expand(4, 16))[0]
    plain = model(text_ids, pixels, tokens)[0]
    torch.testing.assert_close(c[rows], a[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(c[~rows], plain[~rows], atol=1e-5, rtol=0)

    one = torch.zeros(4, 16, dtype=torch.bool)
    one[:, 6] = True
    d = model(text_ids, pixels, tokens, hide_tokens=one)[0]
    assert torch.equal(d[:, :7], plain[:, :7]) and not torch.allclose(d[:, 7:], plain[:, 7:], atol=1e-3)


def test_wrong_shapes_stop_with_their_values():
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch()
    with pytest.raises(ValueError, match=r"mask_tokens .*\(4, 15\).*\(4, 16\)"):
        model(text_ids, pixels, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"text_ids .*\(4, 4\).*\(B, 5\)"):
        model(text_ids[:, 1:], pixels, tokens)
    with pytest.raises(ValueError, match=r"pixels .*\(4, 3, 16, 32\).*\(B, 3, 32, 32\)"):
        model(text_ids, pixels[:, :, 16:], tokens)


def test_freeze_encoders_trains_everything_else():
    model = tiny_model(replace(TINY, freeze_encoders=True))
    model(*tiny_batch())[1].backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == name.startswith("encoder."), name


def test_codes_that_look_alike_start_alike():
    model = tiny_model()
    codebook = torch.randn(24, 8)
    codebook[1] = codebook[0] * 3  # the same direction: the mask tokenizer compares l2-normalised rows
    model.init_mask_tokens(codebook)
    embedding, head = model.mask_embedding.weight.detach().clone(), model.head.weight.detach().clone()
    torch.testing.assert_close(embedding[0], embedding[1])
    torch.testing.assert_close(head[0], head[1])
    assert F.cosine_similarity(embedding[0], embedding[2], dim=0) < 0.9
    assert 0.015 < embedding.std() < 0.025
    model.init_mask_tokens(codebook)
    assert torch.equal(model.mask_embedding.weight, embedding)


@pytest.mark.parametrize("freeze_encoders, recompute", [(False, False), (False, True), (True, False)])
def test_a_compiled_training_step_is_one_graph(one_graph, device, freeze_encoders, recompute):
    config = replace(TINY, siglip=replace(TINY.siglip, vision_layers=1, text_layers=1), freeze_encoders=freeze_encoders)
    models = [tiny_model(config, device=device) for _ in range(2)]
    models[0].llama.recompute = recompute
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    with one_graph("eager"):
        called = torch.compile(models[0]), models[1]
        for seed in range(3):
            text_ids, pixels, tokens = tiny_batch(rows=4, pictures=2, seed=seed, device=device)
            hide_tokens, losses = torch.rand(4, 16, device=device) < 0.5, []
            for model, optimizer in zip(called, optimizers):
                with torch.autocast(device.type, torch.bfloat16):
                    losses.append(model(text_ids, pixels, tokens, hide_tokens, background_weight=0.4)[1])
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(*losses, atol=0.02, rtol=0)


# ---- decoding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_logits_equal_the_forward_pass_at_every_mask_token(device):
    model = tiny_model(device=device)
    text_ids, pixels, mask_tokens = tiny_batch(device=device)
    want, _ = model(text_ids, pixels, mask_tokens)  # (B,M,K)
    prefix = model.prefix(text_ids, pixels)
    cache = KVCache(model.config.llama, len(prefix), prefix.shape[1] + mask_tokens.shape[1] - 1, device)
    inputs = [prefix, *model.mask_embedding(mask_tokens[:, :-1]).split(1, dim=1)]
    logits = torch.cat([model.head(model.llama(part, cache)[:, -1:]) for part in inputs], dim=1)
    assert (logits - want).abs().max() < 1e-4  # of 6.5


@pytest.mark.parametrize("causal", [True, False])
def test_attention_written_out_equals_the_fused_kernel(causal):
    q, k, v = (torch.randn(2, 3, 7, 16, requires_grad=True) for _ in range(3))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    ours = M.attention(q, k, v, causal)  # with gradient on the CPU: written out
    assert (ours - fused).abs().max() < 1e-6
    grad = torch.randn_like(fused)
    for x, y in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(fused, (q, k, v), grad)):
        assert (x - y).abs().max() < 1e-5


def test_cached_greedy_equals_the_naive_one(device):
    model = tiny_model(device=device)
    text_ids, pixels, _ = tiny_batch(rows=4, pictures=2, device=device)
    stats = {}
    tokens = model.generate(text_ids, pixels, draft="none", stats=stats)
    assert tokens.dtype == torch.long and tokens.shape == (4, 16)
    assert len(tokens.unique()) > 4  # not all the same, or the test would show nothing
    assert torch.equal(tokens, model.generate_naive(text_ids, pixels))
    assert stats["passes"] == 15 and stats["prefill_ms"] > 0 and stats["decode_ms"] > 0
    assert stats["mask_passes"] == [15] * 4


@pytest.mark.parametrize("draft", ["jacobi", "hidden", "auto"])
@pytest.mark.parametrize("window", [2, 7, 50])
def test_drafts_change_the_passes_and_not_the_tokens(device, draft, window):
    """Weights of several sizes: from masks that are one run of a code to such that no guess is right."""
    for scale in (0.2, 0.5, 1.0):
        model = tiny_model(replace(TINY, hide=True), device=device)
        with torch.no_grad():
            for weight in model.llama.parameters():
                weight.mul_(scale if weight.dim() > 1 else 1.0)
        for rows in (1, 8):
            text_ids, pixels, _ = tiny_batch(rows=rows, pictures=1, seed=rows, device=device)
            stats = {}
            tokens = model.generate(text_ids, pixels, draft=draft, window=window, stats=stats)
            assert torch.equal(tokens, model.generate(text_ids, pixels, draft="none"))
            assert len(stats["mask_passes"]) == rows and max(stats["mask_passes"]) == stats["passes"] <= 15
            assert min(stats["mask_passes"]) >= math.ceil(15 / window)


@pytest.mark.parametrize("draft, window", [("none", None), ("hidden", 7), ("jacobi", 4)])
def test_compiled_passes_are_one_graph_and_change_no_token(one_graph, device, draft, window):
    model = tiny_model(replace(TINY, hide=True), device=device)
    model.fuse()
    with torch.no_grad():
        for weight in model.llama.parameters():
            weight.mul_(0.5 if weight.dim() > 1 else 1.0)  # some guesses are right then
    with one_graph():
        for seed in (1, 2, 3):
            text_ids, pixels, _ = tiny_batch(rows=3, pictures=1, seed=seed, device=device)
            stats = {}
            with torch.inference_mode(seed == 2):
                tokens = model.generate(text_ids, pixels, draft=draft, window=window, compiled=True, stats=stats)
            assert torch.equal(tokens, model.generate(text_ids, pixels, draft="none"))
            assert len(stats["mask_passes"]) == 3 and max(stats["mask_passes"]) == stats["passes"] <= 15
            assert draft == "none" or min(stats["mask_passes"]) < 15
    with pytest.raises(ValueError, match="compiled is True, expected False where decode is beam"):
        model.generate(text_ids, pixels, decode="beam", compiled=True)


@torch.no_grad()
@pytest.mark.parametrize("draft", ["jacobi", "hidden"])
def test_a_mask_that_is_easy_to_guess_takes_few_passes(draft):
    model = tiny_model(replace(TINY, hide=True))
    text_ids, pixels, _ = tiny_batch()
    model.head.weight[1:] = -model.head.weight[0] * torch.rand(23, 1)  # code 0 or another, by one number alone
    model.llama.norm.weight.zero_()  # and that number is 0: code 0 each time
    stats = {}
    assert not model.generate(text_ids, pixels, draft=draft, window=5, stats=stats).any()
    assert stats["mask_passes"] == [3] * 4  # 15 tokens after the first, 5 a pass


@torch.no_grad()
def test_fused_weights_give_the_same_logits_and_are_not_saved(tmp_path):
    model = tiny_model()
    batch = tiny_batch()
    before, weights = model(*batch)[0], sum(w.numel() for w in model.parameters())
    for _ in range(2):  # a second time changes nothing
        model.fuse()
        torch.testing.assert_close(model(*batch)[0], before, atol=1e-4, rtol=1e-4)
    assert sum(w.numel() for w in model.parameters()) == weights  # nothing is there twice
    model.double().float()
    torch.testing.assert_close(model(*batch)[0], before, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="m.safetensors: fused .* not saved"):
        model.save_pretrained(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_masks_that_are_done_leave_the_batch(monkeypatch):
    model = tiny_model()
    text_ids, pixels, _ = tiny_batch(rows=8, pictures=8)
    widths, real = [], model.llama.forward

    def forward(embeddings, *place, **more):
        widths.append(len(embeddings))
        return real(embeddings, *place, **more)

    monkeypatch.setattr(model.llama, "forward", forward)
    stats = {}
    model.generate(text_ids, pixels, draft="jacobi", window=4, stats=stats)
    assert len(set(stats["mask_passes"])) > 1  # or the test would show nothing
    assert widths[1:] == [sum(passes > k for passes in stats["mask_passes"]) for k in range(stats["passes"])]


@torch.no_grad()
def test_confidence_is_the_probability_of_each_token():
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch()
    logits, _ = model(text_ids, pixels, tokens)
    confidence = model.confidence(text_ids, pixels, tokens)
    shares = logits[2, 7].exp() / logits[2, 7].exp().sum()
    assert confidence[2, 7].item() == pytest.approx(shares[tokens[2, 7]].item())
    torch.testing.assert_close(confidence.log().sum(1), score(model, text_ids, pixels, tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mask_attention_is_what_the_last_layer_mixes(monkeypatch):
    """With values that are one for one mask token and zero for the others, the output is the weight on that token."""
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch(rows=2, pictures=2)
    weights = model.mask_attention(text_ids, pixels, tokens)
    assert weights.shape == (2, 15, 15) and (weights.triu(1) == 0).all() and (weights.sum(-1) < 1).all()
    found = []
    real = M.attention

    def attention(q, k, v, causal, mask=None):
        found.append((q, k))
        return real(q, k, v, causal)

    monkeypatch.setattr(M, "attention", attention)
    model(text_ids, pixels, tokens)
    q, k = found[-1]
    start = k.shape[2] - 15
    for column in (0, 6, 14):
        v = torch.zeros_like(k)
        v[:, :, start + column] = 1.0
        mixed = real(q, k, v, True).mean((1, 3))  # over heads, and over the equal entries of a head
        torch.testing.assert_close(weights[:, :, column], mixed[:, start:], atol=1e-6, rtol=1e-5)
    assert model.config.llama.kv_heads == 2  # grouped heads are in it


@torch.no_grad()
def test_mask_attention_does_not_look_at_padding():
    """Rows with padding at the left look at each other as the rows alone do."""
    model = tiny_model()
    text_ids, pixels, tokens = tiny_batch(rows=2, pictures=2)
    prefix, padding = model.prefix(text_ids, pixels), torch.tensor([[0], [4]])
    model.prefix = lambda *_: prefix
    model.blocks = lambda _, length: torch.where(torch.arange(length) < padding, M.UNSEEN, torch.arange(length))
    got = model.mask_attention(text_ids, pixels, tokens)
    model.blocks = lambda _, length: None
    for row in (0, 1):
        model.prefix = lambda *_, row=row: prefix[row:row + 1, padding[row]:]
        alone = model.mask_attention(text_ids[row:row + 1], pixels[row:row + 1], tokens[row:row + 1])
        torch.testing.assert_close(got[row:row + 1], alone, atol=1e-5, rtol=0)


def test_generate_leaves_no_gradient_and_works_under_autocast():
    model = tiny_model()
    text_ids, pixels, _ = tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(text_ids, pixels, decode="beam")
    assert not tokens.requires_grad and 0 <= tokens.min() and tokens.max() < 24


def plain_beam_search(model, text_ids, pixels, beams):
    """One example, lists of (score, tokens), the whole sequence computed anew for each beam at each step."""
    length = model.config.mask_tokens
    found = [(0.0, [])]
    for t in range(length):
        longer = []
        for total, tokens in found:
            padded = torch.tensor([tokens + [0] * (length - t)], device=pixels.device)
            logprobs = model(text_ids, pixels, padded)[0][0, t].log_softmax(-1)
            longer += [(total + p, tokens + [k]) for k, p in enumerate(logprobs.tolist())]
        found = sorted(longer, reverse=True)[:beams]
    return found[0][1]


@torch.no_grad()
def test_beam_search_equals_a_plain_one_and_beats_greedy(device):
    model = tiny_model(device=device)
    text_ids, pixels, _ = tiny_batch(rows=6, pictures=3, device=device)
    greedy = model.generate(text_ids, pixels)
    assert torch.equal(model.generate(text_ids, pixels, decode="beam", beams=1), greedy)
    beam = model.generate(text_ids, pixels, decode="beam", beams=3)
    for row in range(6):
        want = plain_beam_search(model, text_ids[row:row + 1], pixels[row // 2:row // 2 + 1], beams=3)
        assert beam[row].tolist() == want
    gain = score(model, text_ids, pixels, beam) - score(model, text_ids, pixels, greedy)
    assert (gain > -1e-4).all() and gain.max() > 0.01


def test_narrow_sampling_equals_greedy():
    model = tiny_model()
    text_ids, pixels, _ = tiny_batch()
    greedy = model.generate(text_ids, pixels)
    assert torch.equal(model.generate(text_ids, pixels, decode="top-k", top_k=1), greedy)
    assert torch.equal(model.generate(text_ids, pixels, decode="top-p", top_p=1e-6), greedy)
    assert torch.equal(model.generate(text_ids, pixels, decode="random", temperature=1e-4), greedy)


@pytest.mark.parametrize("decode", ["top-k", "top-p", "random"])
def test_a_seed_reproduces_its_draw(decode):
    model = tiny_model()
    text_ids, pixels, _ = tiny_batch()
    first = model.generate(text_ids, pixels, decode=decode, seed=3)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(model.generate(text_ids, pixels, decode=decode, seed=3), first)
    assert not torch.equal(model.generate(text_ids, pixels, decode=decode, seed=4), first)
    several = model.generate(text_ids, pixels, decode=decode, seed=[3, 8, 3, 2**63 - 1])
    assert torch.equal(several[::2], first[::2]) and not torch.equal(several[1], first[1])
    for row, seed in enumerate([3, 8, 3, 2**63 - 1]):  # the batch has no say either
        alone = model.generate(text_ids[row:row + 1], pixels[row:row + 1], decode=decode, seed=seed)
        assert torch.equal(alone, several[row:row + 1])
    with pytest.raises(ValueError, match="seed is .3, 4., expected .* or 4 of them"):
        model.generate(text_ids, pixels, decode=decode, seed=[3, 4])


@torch.no_grad()
def test_random_draws_from_the_softmax():
    config = replace(TINY, codebook_size=6, mask_grid=1)
    model = tiny_model(config)
    text_ids, pixels, tokens = tiny_batch(rows=1, pictures=1, config=config)
    logits, _ = model(text_ids, pixels, tokens)
    drawn = model.generate(text_ids.expand(2000, -1), pixels, decode="random", temperature=0.7, seed=list(range(2000)))
    frequency = torch.bincount(drawn.flatten(), minlength=6) / 2000
    want = (logits[0, 0] / 0.7).softmax(-1)
    assert want.max() < 0.9
    torch.testing.assert_close(frequency, want, atol=0.04, rtol=0)  # 3.5 standard deviations at p = 0.5


@pytest.mark.parametrize("decode, kept", [("top-k", [3, 0, 4]), ("top-p", [3, 0])])
def test_top_k_and_top_p_renormalise_what_they_keep(decode, kept):
    probs = torch.tensor([0.3, 0.02, 0.08, 0.5, 0.1])  # top_p 0.7: 0.5 does not reach it, 0.5 + 0.3 does
    uniform = torch.arange(5000) / 5000  # each share of the numbers from 0 to 1 draws its token, but for rounding
    drawn = M.draw(probs.log().expand(5000, -1), decode, top_k=3, top_p=0.7, temperature=1.0, uniform=uniform)
    frequency = torch.bincount(drawn, minlength=5) / 5000
    want = torch.zeros(5)
    want[kept] = probs[kept] / probs[kept].sum()
    torch.testing.assert_close(frequency, want, atol=0.001, rtol=0)
    assert (frequency[want == 0] == 0).all()


@pytest.mark.parametrize("decode", ["top-k", "top-p", "random"])
def test_no_draw_leaves_what_may_be_drawn(decode):
    """The ends of [0, 1), many tokens, a few of them impossible."""
    logits = torch.randn(64, 4096) * 5
    logits[:, ::3] = -math.inf
    for number in (0.0, 1 - 2**-24):
        drawn = M.draw(logits, decode, 7, 0.9, 1.0, torch.full((64,), number))
        probs = logits.softmax(-1).gather(1, drawn[:, None])[:, 0]
        assert (probs > 0).all()
        better = (logits > logits.gather(1, drawn[:, None])).sum(-1)
        assert decode != "top-k" or (better == (0 if number == 0 else 6)).all()
    want = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 0.9999])
    assert M.draw(want.log().expand(6, -1), "random", 3, 0.9, 1.0, uniform).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("options, message", [
    ({"decode": "topk"}, "decode is 'topk', expected one of greedy, beam, top-k, top-p, random"),
    ({"draft": "rows"}, "draft is 'rows', expected one of auto, none, jacobi"), ({"window": 0}, "window is 0"),
    ({"decode": "beam", "draft": "hidden"}, "draft is 'hidden', expected one of auto, none where decode is beam"),
    ({"beams": 25}, "beams is 25, expected 1 to 24"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 1.5}, "top_p is 1.5"),
    ({"temperature": 0.0}, "temperature is 0.0"), ({"draft": "none", "window": 8}, "window is 8, .* without a draft"),
    ({"decode": "beam", "window": 8}, "window is 8, .* without a draft"), ({"seed": -1}, "seed is .-1, .* an int from"),
    ({"seed": 2**63}, "seed is .9223372036854775808"), ({"seed": [1, 2, 3]}, "seed is .1, 2, 3., .* or 4 of them"),
    ({"seed": [0, 1, 2, None]}, "seed is"), ({"seed": 1.5}, "seed is .1.5"),
], ids=str)
def test_generate_refuses_what_it_cannot_do(options, message):
    text_ids, pixels, _ = tiny_batch()
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(text_ids, pixels, **options)


# ---- next-scale prediction ------------------------------------------------------------------------------------------


SCALED = replace(TINY, scales=(1, 2, 4), code_width=6)


def scaled_model(config=SCALED, device="cpu"):
    """A tiny model with scales, and the quantizer of a random multi-scale mask tokenizer."""
    model = tiny_model(config)
    model.quantizer = MultiScaleQuantizer(VQGANConfig(codebook_size=24, codebook_dim=6, scales=config.scales))
    model.quantizer.requires_grad_(False)
    return model.to(device)


@pytest.mark.parametrize("attention", ["block", "causal"])
@torch.no_grad()
def test_a_scale_is_written_from_the_coarser_ones(attention):
    """block: all tokens of a scale see each other's inputs, which are made of coarser tokens. A token never matters to
    its own scale or to a coarser one."""
    model = scaled_model(replace(SCALED, scale_attention=attention))
    text_ids, pixels, tokens = tiny_batch(config=SCALED)
    assert tokens.shape == (4, 21) and model.config.mask_tokens == 21
    logits = model(text_ids, pixels, tokens)[0]
    for t, first in ((0, 1), (3, 5), (4, 5), (20, 21)):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % 24
        changed = model(text_ids, pixels, other)[0]
        torch.testing.assert_close(changed[:, :first], logits[:, :first], atol=1e-5, rtol=0)
        assert first == 21 or (changed[:, first:] - logits[:, first:]).abs().amax((0, 2)).min() > 1e-4
    model.place_embedding.weight[20] += 5.0  # the input of the last place: of its scale block sees it, causal does not
    moved = (model(text_ids, pixels, tokens)[0] - logits).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [False] * 5 + [attention == "block"] * 15 + [True]


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_scales_with_a_cache_equal_those_without(attention, device):
    model = scaled_model(replace(SCALED, scale_attention=attention), device)
    text_ids, pixels, _ = tiny_batch(rows=4, pictures=2, config=SCALED, device=device)
    stats = {}
    tokens = model.generate(text_ids, pixels, stats=stats)
    assert torch.equal(tokens, model.generate_naive(text_ids, pixels)) and len(tokens.unique()) > 4
    assert stats["passes"] == 2 and stats["mask_passes"] == [2] * 4
    assert torch.equal(model(text_ids, pixels, tokens)[0].argmax(-1), tokens)  # as teacher forcing sees them
    assert model.confidence(text_ids, pixels, tokens).shape == (4, 21)
    alone = [model.generate(text_ids[i:i + 1], pixels[i // 2:i // 2 + 1], decode="random", seed=i) for i in range(4)]
    together = model.generate(text_ids, pixels, decode="random", seed=list(range(4)))
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(together, tokens)


@pytest.mark.parametrize("options, message", [
    ({"decode": "beam"}, "decode is .beam., expected one of greedy, top-k"),
    ({"compiled": True}, "compiled is True, .* False"),
    ({"draft": "jacobi"}, "draft is 'jacobi', expected one of auto, none"), ({"window": 4, "draft": "none"}, "window"),
], ids=str)
def test_what_scales_do_not_have_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scaled_model().generate(*tiny_batch(config=SCALED)[:2], **options)


def test_one_batch_overfits_with_scales(tmp_path):
    model = scaled_model()
    text_ids, pixels, tokens = tiny_batch(config=SCALED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        loss = model(text_ids, pixels, tokens)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1 and torch.equal(model.generate(text_ids, pixels), tokens)
    model.save_pretrained(tmp_path / "m.safetensors")
    again = LlamaSeg.from_pretrained(tmp_path / "m.safetensors")
    assert again.config == model.config and not any("quantizer" in name for name in again.trained_state())
    again.quantizer = model.quantizer
    assert torch.equal(again.generate(text_ids, pixels), tokens)
    with pytest.raises(ValueError, match=r"scales are \(1, 2\), expected 1 to mask_grid 4"):
        replace(SCALED, scales=[1, 2])


def test_a_compiled_training_step_with_scales_is_one_graph(one_graph):
    model = scaled_model(replace(SCALED, siglip=replace(TINY.siglip, vision_layers=1, text_layers=1)))
    with one_graph("eager"):
        compiled = torch.compile(model)
        for seed in range(3):
            batch = tiny_batch(rows=4, pictures=2, config=SCALED, seed=seed)
            loss = compiled(*batch)[1]
            loss.backward()
            torch.testing.assert_close(loss, model(*batch)[1])


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load_give_equal_logits(tmp_path):
    model = tiny_model()
    model.frozen["mask_tokenizer"] = {"name": "vq", "sha256": "12"}
    model.save_pretrained(tmp_path / "full.safetensors")
    loaded = LlamaSeg.from_pretrained(tmp_path / "full.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded(*tiny_batch())[0], model(*tiny_batch())[0])
    assert loaded.frozen == model.frozen

    model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    full, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    loaded = LlamaSeg.from_pretrained(tmp_path / "half.safetensors")
    assert all(weight.dtype == torch.float32 for weight in loaded.parameters())
    torch.testing.assert_close(loaded(*tiny_batch())[0], model(*tiny_batch())[0], atol=0.05, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.safetensors", "half.safetensors"]
    assert all(p.stat().st_mode & 0o044 for p in tmp_path.iterdir())  # others may read it


def test_a_loaded_model_trains(tmp_path):
    tiny_model(replace(TINY, freeze_encoders=True)).save_pretrained(tmp_path / "m.safetensors")
    model = LlamaSeg.from_pretrained(tmp_path / "m.safetensors")
    model(*tiny_batch())[1].backward()
    assert model.head.weight.grad is not None
    assert not any(weight.requires_grad for weight in model.encoder.parameters())


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    tiny_model().save_pretrained(path)
    before = path.read_bytes()

    def disk_full(weights, name, metadata):
        Path(name).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("weights.save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        tiny_model().save_pretrained(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def change_weights(path, change):
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata=header)


def change_header(path, **entries):
    save_file(load_file(path), path, metadata={"format": "llamaseg", **entries})


@pytest.mark.parametrize("damage, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
    (lambda p: p.write_bytes(p.read_bytes()[:50]), "damaged"),
    (lambda p: p.write_bytes(b""), "damaged"),
    (lambda p: p.write_text("<html>404</html>"), "damaged or not a .safetensors"),
    (lambda p: save_file({"weight": torch.zeros(2)}, p), "not a LlamaSeg checkpoint"),
    (lambda p: change_header(p), "not a LlamaSeg checkpoint"),
    (lambda p: change_header(p, config="{"), "config"),
    (lambda p: change_header(p, config="[1]"), "config"),
    (lambda p: change_header(p, config='{"depth": 3}'), "config .*depth"),
    (lambda p: change_header(p, config='{"a":' * 100_000), "expected .* whose config fits .*recursion"),
    (lambda p: change_header(p, config='{"hide": "no"}'), "hide is 'no', expected true or false"),
    (lambda p: change_header(p, config='{"codebook_size": 1e9}'), "codebook_size is 1000000000.0, expected an integer"),
    (lambda p: change_header(p, config='{"mask_grid": 2000000000}'), "mask_grid is 2000000000, expected an integer"),
    (lambda p: change_header(p, config="{}", frozen='{"encoder": null}'), "config"),
    (lambda p: change_header(p, config="{}", frozen='{"encoder": {"name": 5, "sha256": "x"}}'), "config"),
    (lambda p: change_header(p, config="{}", frozen='{"encoder": {"name": "../x", "sha256": "x"}}'), "frozen parts"),
    (lambda p: change_header(p, config="{}", frozen='{"encoder": {"name": "x", "sha256": 5}}'), "frozen parts"),
    (lambda p: change_weights(p, lambda w: w.update(bom=w["bom"].to(torch.int8))), "bom holds torch.int8"),
    (lambda p: change_weights(p, lambda w: w.update(bom=w["bom"].to(torch.float8_e5m2))), "bom holds torch.float8"),
    (lambda p: change_weights(p, lambda w: w.update(bom=w["bom"].to(torch.complex64))), "bom holds torch.complex64"),
    (lambda p: change_weights(p, lambda w: w.pop("head.weight")), "missing: head.weight"),
    (lambda p: change_weights(p, lambda w: w.update(spare=torch.zeros(1))), "left over: spare"),
    (lambda p: change_weights(p, lambda w: w.update(bom=torch.zeros(3))), r"wrong shape: bom \(3,\), expected \(64,\)"),
    (lambda p: change_weights(p, lambda w: w.update(bom=torch.full((64,), math.inf))), "not finite: bom"),
    (lambda p: change_weights(p, lambda w: [w.pop(n) for n in list(w) if "llama" in n]), "and 14 more"),
])
def test_a_file_that_cannot_be_loaded_is_refused_in_one_line(tmp_path, damage, message):
    path = tmp_path / "m.safetensors"
    tiny_model().save_pretrained(path)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        LlamaSeg.from_pretrained(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        LlamaSeg.from_pretrained(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("name", M.PRESETS)
def test_presets_survive_json(name):
    config = M.PRESETS[name]
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config


def test_configs_refuse_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="text_width 50 .* 12"):
        SigLIPConfig(text_width=50)


# ---- device and dtype -----------------------------------------------------------------------------------------------


def test_the_device_is_the_fastest_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for count, best, absent in ((2, "cuda", "cuda:2"), (0, "cpu", "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        assert M.pick_device() == torch.device(best) and M.pick_device("cpu") == torch.device("cpu")
        for name in (absent, "gpu", "mps"):
            with pytest.raises(ValueError, match=f"device '{name}' is not there, choose from auto, {best}"):
                M.pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert M.pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("fast, dtype, reason", [
    (True, torch.bfloat16, "in hardware"), (False, torch.float32, "no fast bfloat16"),
])
def test_the_dtype_is_what_the_device_multiplies_fast(monkeypatch, fast, dtype, reason):
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: fast, raising=False)
    found, why = M.compute_dtype(torch.device("cpu"))
    assert found == dtype and reason in why
    assert M.compute_dtype(torch.device("cpu"), "float32") == (torch.float32, "as asked")


# ---- image tokens that know whether their patch is in the mask ------------------------------------------------------


def test_the_patch_head_is_told_by_each_image_token():
    config = replace(TINY, patch_head=True)
    model, (text_ids, pixels, tokens) = tiny_model(config), tiny_batch(config=config)
    tokens[:, ::2] = 0  # plain background
    _, loss = model(text_ids, pixels, tokens)
    model.config = replace(config, patch_head=False)
    _, alone = model(text_ids, pixels, tokens)
    total = 0.0
    for row in range(4):
        for patch in range(16):  # its state from text and picture up to it, and nothing later
            place = config.siglip.text_length + 1 + patch
            prefix = model.prefix(text_ids[row:row + 1], pixels[row:row + 1])[:, :place + 1]
            logit = model.patch_head(model.llama(prefix)[0, -1])
            sign = 1.0 if tokens[row, patch] != 0 else -1.0
            total -= F.logsigmoid(sign * logit).item() / 64
    assert loss.item() - alone.item() == pytest.approx(total, abs=1e-4)


def test_a_patch_head_needs_a_mask_token_for_each_patch():
    with pytest.raises(ValueError, match="patch_head"):
        replace(TINY, patch_head=True, mask_grid=3)
    with pytest.raises(ValueError, match="patch_head"):
        replace(TINY, patch_head=True, scales=(1, 2, 4))
