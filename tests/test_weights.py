"""Downloads from a server of our own."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import weights

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges. server.plan is a list of misbehaviours, one per request, after which all is well: a
    status, headers of a redirect or of a 503, or a name."""

    def log_message(self, *args):
        pass

    def answer(self, status, headers):
        """An answer without content."""
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        misbehaviour = server.plan.pop(0) if server.plan else None
        if isinstance(misbehaviour, int):
            self.answer(misbehaviour, {"Retry-After": "0"})
            return
        if isinstance(misbehaviour, dict):
            self.answer(302 if "Location" in misbehaviour else 503, misbehaviour)
            return
        start, resume = 0, self.headers.get("Range")
        if resume and self.headers.get("If-Range") == server.etag and misbehaviour != "no ranges":
            start = int(resume.removeprefix("bytes=").rstrip("-"))
        if start >= len(CONTENT):
            self.answer(416, {"Content-Range": f"bytes */{len(CONTENT)}"})
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if misbehaviour == "cut":  # the connection breaks in the middle
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(body)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.plan, server.requests, server.headers, server.etag = [], [], {}, '"one"'
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_download_arrives_whole_with_its_hash(server, tmp_path):
    path = tmp_path / "x.bin"
    assert weights.fetch(f"{server.url}/x.bin", path) == SHA256
    assert path.read_bytes() == CONTENT and path.with_name("x.bin.sha256").read_text() == f"{SHA256}  x.bin\n"
    assert {p.name for p in path.parent.iterdir()} == {"x.bin", "x.bin.sha256"}
    assert weights.fetch(f"{server.url}/x.bin", path) == SHA256 and len(server.requests) == 1  # checked, not fetched
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ValueError, match=f"x.bin: its SHA-256 is .*, expected {SHA256}"):
        weights.fetch(f"{server.url}/x.bin", path)


def test_a_broken_connection_goes_on_where_it_was(server, tmp_path):
    server.plan = ["cut", "cut", 503]
    assert weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", wait=0.001) == SHA256
    first, *ranges = (headers.get("Range") for _, headers in server.requests)
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in ranges]
    assert first is None and 0 < starts[0] <= 150_000 < starts[1] == starts[2]
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_a_stopped_download_goes_on_in_the_next_run(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "x.bin.etag").write_text(server.etag)
    assert weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin") == SHA256
    assert server.requests[0][1]["Range"] == "bytes=999-"  # the last byte again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.bin.sha256"]
    (tmp_path / "y.bin.part").write_bytes(CONTENT)  # killed just before the renaming
    (tmp_path / "y.bin.etag").write_text(server.etag)
    assert weights.fetch(f"{server.url}/y.bin", tmp_path / "y.bin") == SHA256
    assert server.requests[-1][1]["Range"] == f"bytes={len(CONTENT) - 1}-" and len(server.requests) == 2


@pytest.mark.parametrize("etag,plan", [('"other"', []), ('"one"', ["no ranges"])])
def test_a_part_of_another_file_is_thrown_away(server, tmp_path, etag, plan):
    server.plan = plan
    (tmp_path / "x.bin.part").write_bytes(b"?" * 1000)
    (tmp_path / "x.bin.etag").write_text(etag)
    assert weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin") == SHA256
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("headers,message", [
    ({"X-Linked-Etag": '"' + "0" * 64 + '"'}, f"its SHA-256 is {SHA256}, expected 0000"),
    ({"Content-Type": "text/html; charset=utf-8"}, "came as a web page"),
])
def test_a_wrong_hash_or_kind_leaves_nothing(server, tmp_path, headers, message):
    server.headers = headers
    with pytest.raises((ValueError, OSError), match=message):
        weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", wait=0.001)
    assert not list(tmp_path.iterdir())


def test_a_recorded_hash_is_kept_to(server, tmp_path):
    (tmp_path / "x.bin.sha256").write_text("1" * 64 + "  x.bin\n")
    with pytest.raises(ValueError, match="expected 1111"):
        weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("status,requests,message", [
    (404, 1, "404 Client Error: Not Found"), (401, 1, "401 .* HF_TOKEN"), (403, 1, "403 .* HF_TOKEN"),
    (503, 6, "503 Server Error: Service Unavailable .* what came is kept, run this again"),
    (429, 6, "429 Client Error: Too Many Requests"), (408, 6, "408 Client Error"),
])
def test_answers_that_stay_bad(server, tmp_path, status, requests, message):
    server.plan = [status] * 20
    with pytest.raises(OSError, match=message) as caught:
        weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", wait=0.001)
    assert len(server.requests) == requests and not (tmp_path / "x.bin").exists()
    assert server.url in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_does_not_follow_to_another_host(server, tmp_path):
    """The hub's redirect: it announces the hash, another host has the file and gets no token."""
    port, linked = server.server_port, {"X-Linked-Etag": f'"{SHA256}"'}
    server.plan = [{"Location": f"http://localhost:{port}/y.bin", **linked}]
    assert weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", token="secret") == SHA256
    assert [path for path, _ in server.requests] == ["/x.bin", "/y.bin"]
    assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer secret", None]
    server.plan = [{"Location": f"http://localhost:{port}/y.bin", "X-Linked-Etag": f'"{"0" * 64}"'}]
    with pytest.raises(ValueError, match=f"its SHA-256 is {SHA256}, expected 0000"):
        weights.fetch(f"{server.url}/x.bin", tmp_path / "z.bin")


@pytest.mark.parametrize("pause", ["soon", "-1", "Fri, 99 Foo 2026"])
def test_an_odd_retry_after_is_one_line(server, tmp_path, pause):
    server.plan = [{"Retry-After": pause}] * 6
    with pytest.raises(OSError, match="run this") as caught:
        weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", wait=0.001)
    assert server.url in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_cannot_be_reached_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.bin"
    with pytest.raises(OSError, match=f"{url}: .*Connection refused.*: what came is kept, run this again") as caught:
        weights.fetch(url, tmp_path / "x.bin", wait=0.001)
    assert "\n" not in str(caught.value)


def test_a_token_is_never_printed(server, tmp_path):
    with pytest.raises(ValueError, match="HF_TOKEN") as caught:
        weights.fetch(f"{server.url}/x.bin", tmp_path / "x.bin", token="hf_SECRET\n")
    assert "SECRET" not in str(caught.value)


def test_the_command_uses_mirror_and_token(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert weights.main(["download", "siglip2-base-patch16-256", "--root", str(tmp_path)]) == 0
    assert weights.main(["download", "gemma-tokenizer", "--root", str(tmp_path)]) == 0
    assert SHA256 in capsys.readouterr().out
    paths = [path for path, _ in server.requests]
    assert "/google/siglip2-base-patch16-256/resolve/main/model.safetensors" in paths
    assert len(paths) == 7 and paths[-1] == "/big_vision/gemma_tokenizer.model"
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    assert "Authorization" not in server.requests[-1][1]  # the token is the hub's
    assert (tmp_path / "siglip2-base-patch16-256" / "tokenizer.json").exists()
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    assert weights.main(["download", "vq_ds16_c2i", "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "nowhere/FoundationVision/LlamaGen" in error and "Traceback" not in error
    with pytest.raises(SystemExit) as stopped:
        weights.main(["download", "siglip3"])
    assert stopped.value.code == 2


def test_an_index_brings_its_files_and_says_how_much_comes(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "argenseg-8b"
    folder.mkdir()
    index = {"metadata": {"total_size": 16.44e9}, "weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights.main(["download", "argenseg-8b", "--root", str(tmp_path)]) == 0
    assert "argenseg-8b: 16.4 GB of weights in 2 files" in capsys.readouterr().out
    assert [path.rpartition("/")[2] for path, _ in server.requests] == [
        "config.json", "tokenizer_config.json", "tokenizer.model", "one.safetensors", "two.safetensors"]
    for name in ("../x.safetensors", "x.sh"):
        index["weight_map"]["c"] = name
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index))
        path.with_name(f"{path.name}.sha256").unlink()
        assert weights.main(["download", "argenseg-8b", "--root", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and repr(name) in error and len(server.requests) == 5


def test_two_downloads_never_write_into_one_file(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    (tmp_path / "gemma-tokenizer").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", code, tmp_path / "gemma-tokenizer" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert weights.main(["download", "gemma-tokenizer", "--root", str(tmp_path)]) == 1
        assert "another process" in capsys.readouterr().err and not server.requests
        other.communicate(b"\n")
    assert weights.main(["download", "gemma-tokenizer", "--root", str(tmp_path)]) == 0


def test_every_frozen_part_that_a_preset_needs_can_be_downloaded():
    import model
    import train

    for preset in train.PRESETS:
        args = train.parse_args(["--preset", preset])
        for path in (args.encoder, args.mask_tokenizer):
            assert path is None or path.exists() or path.name in weights.DOWNLOADS
    assert set(model.SIGLIP2) <= set(weights.DOWNLOADS)


def test_a_stop_says_that_a_download_can_go_on(monkeypatch, tmp_path, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "fetch", stop)
    assert weights.main(["download", "var-vq", "--root", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped: run this again to go on\n"
