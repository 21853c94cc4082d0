"""page.py over HTTP: what is streamed is what `generate` gives, and nothing that comes in does harm."""

import base64
import http.client
import io
import json
import random
import shutil
import socket
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

import page
from data import rle_decode
from model import LlamaSeg
from sample import Segmenter
from tokenizer import MultiScaleVQ, TextTokenizer, VQGANConfig


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    most = Image.MAX_IMAGE_PIXELS
    server = page.open_server(0, [str(tiny_checkpoint)])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    server.worker.shutdown()
    Image.MAX_IMAGE_PIXELS = most  # page.py lowers it


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def segmenter(server):
    return server.load(next(iter(server.names)))


def picture(size=(40, 30), seed=0):
    """A picture of noise and its PNG."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return Image.fromarray(noise), file.getvalue()


def call(server, method, path, body=None, **headers):
    """(status, content) of a request."""
    connection = http.client.HTTPConnection("localhost", server.server_port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def ask_path(server, **query):
    return "/ask?" + urlencode({"checkpoint": next(iter(server.names)), "prompt": "the red circle"} | query)


def ask(server, body, **query):
    """The events of a request, as a list of (name, values)."""
    status, content = call(server, "POST", ask_path(server, **query), body)
    assert status == 200, content
    lines = [part.split("\n") for part in content.decode().split("\n\n")[:-1]]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def mask_of(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(bool)


# ---- what is streamed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["auto", "none", "jacobi", "hidden"])
def test_the_stream_is_what_generate_gives(server, segmenter, draft):
    image, body = picture()
    events = ask(server, body, draft=draft)
    passes = [values for name, values in events if name == "tokens"]
    tokens, stats = sum((values["tokens"] for values in passes), []), {}
    seen, text = segmenter.prepare(image, ["the red circle"])[::-1]
    assert tokens == segmenter.model.generate(text, seen, draft=draft, stats=stats)[0].tolist()
    sure = segmenter.model.confidence(text, seen, torch.tensor([tokens]))[0]
    assert tokens == segmenter.model.generate_naive(text, seen)[0].tolist()
    assert len(passes) == stats["passes"] + 1
    assert [values["start"] for values in passes] == np.cumsum([0] + [len(v["tokens"]) for v in passes])[:-1].tolist()
    torch.testing.assert_close(torch.tensor(sum((values["sure"] for values in passes), [])), sure, atol=1e-5, rtol=0)
    for values in passes[1:]:
        if draft == "none":
            assert values["guesses"] is None and len(values["tokens"]) == 1
        else:  # all but the last token were guessed right, the last one was not, or it is the last guess
            known = len(values["tokens"])
            assert values["tokens"][:-1] == values["guesses"][:known - 1]
            assert known == len(values["guesses"]) or values["tokens"][-1] != values["guesses"][known - 1]
    names = [name for name, _ in events if name != "grown"]
    assert names == ["begin", *["tokens"] * len(passes), "mask", "end"]
    values = dict(events)["mask"]
    mask, = segmenter(image, ["the red circle"])
    assert np.array_equal(mask_of(values["mask"]), mask) and np.array_equal(rle_decode(values["rle"]), mask)
    assert dict(events)["end"]["there"] == pytest.approx(segmenter.there(inside_of(segmenter, image))[0], abs=1e-5)


def inside_of(segmenter, image):
    inside = {}
    segmenter.many([image], [["the red circle"]], inside)
    return inside


def test_the_masks_of_the_first_tokens_have_an_empty_rest(server, segmenter):
    events = ask(server, picture((256, 128))[1], draft="none")
    tokens = sum((values["tokens"] for name, values in events if name == "tokens"), [])
    grown = [values for name, values in events if name == "grown"]
    assert 0 < len(grown) <= 16
    for values in grown:
        whole = torch.tensor([tokens[:values["known"]] + segmenter.empty[0, values["known"]:].tolist()])
        assert np.array_equal(mask_of(values["mask"]), segmenter.decode(whole, [(128, 64)])[0])


@pytest.mark.parametrize("draft", ["none", "jacobi"])
def test_forced_tokens_stay_and_the_rest_follows_from_them(server, segmenter, draft):
    image, body = picture()
    free, force = inside_of(segmenter, image)["tokens"][0].tolist(), [3, 17, 5, 30]
    events = ask(server, body, draft=draft, force=",".join(map(str, force)))
    tokens = torch.tensor([sum((values["tokens"] for name, values in events if name == "tokens"), [])])
    text, pixels = segmenter.prepare(image, ["the red circle"])
    assert tokens[0, :4].tolist() == force != free[:4]
    teacher = segmenter.model(text, pixels, tokens)[0].argmax(-1)  # without a cache
    assert torch.equal(teacher[:, 4:], tokens[:, 4:])


@pytest.mark.parametrize("place", [0, 5, 15])
def test_what_a_token_looked_at_and_could_have_been(server, segmenter, place):
    image, body = picture((60, 40))
    inside = inside_of(segmenter, image)
    id = dict(ask(server, body))["mask"]["id"]
    found = json.loads(call(server, "POST", f"/look?id={id}&place={place}", b"")[1])
    seen = [inside[part] for part in ("text_ids", "pixels", "tokens")]
    assert len(found["picture"]) == segmenter.model.config.siglip.image_tokens and len(found["mask"]) == 15
    assert not any(found["mask"][place:]) and all(found["mask"][:place])  # tokens that did not exist yet
    assert 0 < sum(found["picture"]) + sum(found["mask"]) < 1
    if place:
        row = segmenter.model.mask_attention(*seen)[0, place - 1]
        torch.testing.assert_close(torch.tensor(found["mask"]), row, atol=1e-6, rtol=0)
    probabilities = segmenter.model(*seen)[0][0, place].softmax(-1)
    assert [token for token, _, _ in found["others"]] == probabilities.argsort(descending=True)[:6].tolist()
    for token, sure, mask in found["others"]:
        changed = seen[2].clone()
        changed[0, place] = token
        assert sure == pytest.approx(probabilities[token].item(), abs=1e-6)
        assert np.array_equal(mask_of(mask), segmenter.decode(changed, [(128, 85)])[0])


def test_scales_are_streamed_one_by_one(segmenter):
    config = replace(segmenter.model.config, scales=(1, 2, 4), code_width=6)
    vq = MultiScaleVQ(VQGANConfig(channels=8, channel_mult=(1, 1, 1, 1, 2), res_blocks=1, latent_channels=6,
                                  codebook_size=32, codebook_dim=6, norm_groups=4, scales=(1, 2, 4)))
    segmenter = Segmenter(LlamaSeg(config), vq, TextTokenizer(REPO / "assets" / "text.model", 24))
    image, told, inside = picture((64, 64))[0], [], {}
    mask = segmenter.stream(image, "the red circle", lambda *values: told.append(values), inside=inside)
    assert [(start, len(tokens), guesses) for start, tokens, _, guesses in told] == [(0, 1, None), (1, 4, None),
                                                                                     (5, 16, None)]
    tokens = torch.tensor([sum((tokens for _, tokens, _, _ in told), [])])
    assert torch.equal(tokens, segmenter.model.generate_naive(inside["text_ids"], inside["pixels"]))
    for known, decoded in zip((1, 5, 21), vq.decode_scales(tokens), strict=True):
        assert np.array_equal(segmenter.decode(tokens[:, :known], [(64, 64)])[0], decoded[0].mean(0).numpy() >= 0)
    assert np.array_equal(mask, segmenter(image, ["the red circle"])[0])
    picture_share, mask_share, _ = segmenter.look(inside, 3, (64, 64))  # its own scale, and all before
    assert len(mask_share) == 21 and all(mask_share[:5]) and not any(mask_share[5:]) and len(picture_share) == 16


def test_an_unknown_word_makes_an_empty_mask(server, segmenter, monkeypatch):
    monkeypatch.setattr(segmenter.model.config, "words", ("the", "red", "circle"))
    events = dict(ask(server, picture()[1], prompt="the red zebra"))
    assert events["mask"]["unknown"] == ["zebra"] and not mask_of(events["mask"]["mask"]).any()
    assert events["end"]["there"] == 0


@pytest.mark.parametrize("rows,options", [(1, {"decode": "beam"}), (1, {"compiled": True}), (2, {})])
def test_watch_is_for_one_greedy_mask(segmenter, rows, options):
    text, pixels = segmenter.prepare(picture()[0], ["a", "b"][:rows])
    with pytest.raises(ValueError, match="watch is for one mask"):
        segmenter.model.generate(text, pixels, watch=print, **options)


# ---- what comes in -----------------------------------------------------------------------------------------


def test_page_and_scene(server):
    status, content = call(server, "GET", "/")
    assert status == 200 and content == (REPO / "assets" / "page.html").read_bytes()
    scene = json.loads(call(server, "GET", "/scene")[1])
    assert scene["checkpoints"][1] == "embedded" and all(scene["phrases"])
    assert Image.open(io.BytesIO(base64.b64decode(scene["picture"]))).mode == "RGB"


def test_the_page_loads_nothing_from_elsewhere():
    text = (REPO / "assets" / "page.html").read_text("utf-8")
    assert "://" not in text and "default-src 'none'" in text
    assert text.count("\n") <= 400 and Path(page.__file__).read_text("utf-8").count("\n") <= 150


@pytest.mark.parametrize("headers,allowed", [
    ({"Host": "evil.example"}, False), ({"Host": "localhost.evil.example"}, False), ({"Host": ""}, False),
    ({"Host": "[::1"}, False), ({"Origin": "http://evil.example"}, False), ({"Origin": "null"}, False),
    ({"Origin": "http://localhost:1"}, False), ({"Host": "127.0.0.1"}, True), ({"Host": "LOCALHOST:9000"}, True),
    ({"Host": "localhost:9", "Origin": "http://localhost:9"}, True)])
def test_other_hosts_and_pages_are_not_answered(server, headers, allowed):
    for method, path in (("GET", "/scene"), ("GET", "/"), ("POST", ask_path(server))):
        status, content = call(server, method, path, picture()[1] if method == "POST" else None, **headers)
        assert (status == 200) == allowed and (allowed or content.count(b"\n") == 0)


def large(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("body,query,status,line", [
    (b"", {}, 400, "broken picture"), (b"no picture", {}, 400, "broken picture"),
    (picture()[1][:-300], {}, 400, "broken picture"), (large(10_000, 5_001), {}, 400, "exceeds limit"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 400, "PostScript"),
    (picture()[1], {"prompt": " "}, 400, "is empty"), (picture()[1], {"prompt": "x" * 9000}, 400, "tokens, the limit"),
    (picture()[1], {"checkpoint": "/etc/passwd"}, 400, "/etc/passwd"), (picture()[1], {"force": "32"}, 400, "range"),
    (picture()[1], {"force": "1,x"}, 400, "invalid literal"), (picture()[1], {"more": "&".join("x=1" * 9)}, 200, ""),
])
def test_what_is_wrong_is_said_in_one_line(server, body, query, status, line):
    answer, content = call(server, "POST", ask_path(server, **query), body)
    assert answer == status and line in content.decode() and (status == 200 or content.count(b"\n") == 0)


def test_limits_of_a_request(server):
    assert call(server, "POST", ask_path(server), None, **{"Content-Length": "20000001"})[0] == 413
    assert call(server, "POST", ask_path(server), None, **{"Content-Length": "-1"})[0] == 413
    assert call(server, "POST", "/look?id=1&place=0", b"")[0] == 400
    for path in ("/assets/model.safetensors", "/../page.py", "/page.html", "//[", "/%2e%2e/x", "/?a=b" + "&a=b" * 9):
        assert call(server, "GET", path)[0] == 400
    id = dict(ask(server, picture()[1]))["mask"]["id"]
    assert call(server, "POST", f"/look?id={id}&place=16", b"")[0] == 400


def raw(path, body):
    return f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_eight_wait_and_the_next_is_told_to_come_later(server):
    go, answers, body = threading.Event(), [], picture()[1]
    server.worker.submit(go.wait)  # the model is busy
    clients = [socket.create_connection(("localhost", server.server_port)) for _ in range(9)]
    for client in clients:
        client.sendall(raw(ask_path(server), body))
    while server.places._value:  # until all are in the queue
        pass
    assert call(server, "POST", ask_path(server), body)[0] == 503
    clients.pop(4).close()  # it goes away, and its place is free before its turn
    assert server.places.acquire(timeout=20)
    server.places.release()
    last = threading.Thread(target=lambda: answers.append(call(server, "POST", ask_path(server), body)[0]))
    last.start()
    go.set()
    last.join()
    assert answers == [200]
    for client in clients:
        content = b"".join(iter(lambda: client.recv(1 << 16), b""))  # noqa: B023, it is read before the next turn
        assert content.startswith(b"HTTP/1.0 200") and b"event: end" in content
        client.close()
    assert server.places._value == 9


def test_who_goes_away_ends_the_decoding(server, segmenter, monkeypatch):
    passes, closed, forward = [], threading.Event(), segmenter.model.llama.forward

    def slow(*args, **more):
        passes.append(closed.wait())
        return forward(*args, **more)

    monkeypatch.setattr(segmenter.model.llama, "forward", slow)
    client = socket.create_connection(("localhost", server.server_port))
    body = picture()[1]
    client.sendall(raw(ask_path(server, draft="none"), body))
    assert client.recv(12) == b"HTTP/1.0 200"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, as of a browser that stops
    client.close()
    closed.set()
    for _ in range(9):  # all places are free again
        assert server.places.acquire(timeout=20)
    server.places.release(9)
    assert len(passes) < 9  # of 16


def hostile(rng, paths, bodies):
    """The bytes of a request that is random, or nearly a good one."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(400))
    method = rng.choice(["GET", "POST", "POST", "POST", "POST", "POST", "HEAD", "PUT", "ge t", "\x00"])
    path = rng.choice(paths) + rng.choice(["", "", "", "&force=", "&force=99999999999", "&place=-9", "&prompt=%ff%00",
                                           "&draft=beam", "?" + "a=1;" * 99, "#", "%", "&checkpoint=../../etc", "\xff"])
    body = rng.choice(bodies)
    length = rng.choice([*[len(body)] * 9, "", "x", "1e3", "-5", "9" * 5000, 30_000_000, "²", 0])
    headers = [f"Host: {rng.choice(['localhost'] * 9 + ['127.0.0.1:8', 'evil', '[', '@localhost', ''])}",
               f"Content-Length: {length}", rng.choice(["Origin: null", "Origin: http://localhost", "X: " + "y" * 300,
                                                        "A: b", "Transfer-Encoding: chunked", ": ", "\x00"])]
    rng.shuffle(headers)
    head = f"{method} {path} {rng.choice(['HTTP/1.1'] * 9 + ['HTTP/1.0', 'HTTP/9', '', 'HTTP/1.x'])}\r\n"
    return (head + "\r\n".join(headers) + "\r\n\r\n").encode("latin-1") + body


def test_a_thousand_hostile_requests(server, capfd):
    rng, paths = random.Random(0), ["/", "/scene", "/look?id=1&place=1", "/ask", "/../..", "*"] + [ask_path(server)] * 7
    bodies = [b"", rng.randbytes(99), picture()[1], picture()[1][:99], large(9000, 9000)]
    files = sorted(path for path in REPO.iterdir())
    answers = Counter()
    for i in range(1000):
        if i % 20 == 0:
            assert dict(ask(server, picture()[1]))["end"]  # who asks well is answered meanwhile
        with socket.create_connection(("localhost", server.server_port), timeout=60) as client:
            try:
                client.sendall(hostile(rng, paths, bodies))
                client.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: client.recv(1 << 16), b""))  # noqa: B023
            except OSError:  # refused before it was sent
                continue
            answers[answer[9:12]] += 1
    assert answers[b"200"] and answers[b"400"] > 200 and not answers[b"500"]
    assert len(server.kept) <= page.MOST_KEPT and server.places._value == 9
    assert "Traceback" not in capfd.readouterr().err and sorted(path for path in REPO.iterdir()) == files


def test_command(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        page.main(["--port", "65536"])
    assert "must be from 0 to 65535" in capsys.readouterr().err
    monkeypatch.setattr(page.ThreadingHTTPServer, "serve_forever", lambda self: self.server_close())
    assert page.main(["--port", "0"]) == 0
    assert "open http://localhost:" in capsys.readouterr().out
    assert page.main(["--port", "0", "--checkpoint", "nowhere"]) == 1
    assert shutil.which("nowhere") is None and "nowhere" in capsys.readouterr().err
