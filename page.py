"""Draw a picture or drop one, ask for a mask and watch it being written, token by token: open http://localhost:8000.
Only this computer is answered, and nothing that a browser sends names a file or is written to one.

    python page.py --port 8000 --checkpoint out     # --checkpoint: with your own besides the embedded ones
"""

import base64
import io
import json
import select
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

from data import load_dataset, open_picture, rle_encode
from metrics import Parser, printable
from sample import EXAMPLE_PROMPTS, Segmenter
from weights import ASSETS

MOST_BYTES, MOST_PIXELS, MOST_WAITING, MOST_KEPT = 20_000_000, 50_000_000, 8, 16


class Handler(BaseHTTPRequestHandler):
    """GET /: the page. GET /scene: a drawn picture, phrases and the names of the checkpoints, JSON.
    POST /ask?checkpoint=&prompt=&draft=&force=FIRST,TOKENS, the body is a picture: server-sent events "begin", "tokens"
    (of a pass), "grown" (the mask of the first tokens), "mask" and "end". POST /look?id=&place=: of a token, JSON."""
    timeout, begun, log_message = 20, False, lambda *args: None  # seconds of a read or write; has the answer begun?

    def handle(self):
        with suppress(OSError):  # a client that goes away is no error
            super().handle()

    def do_GET(self):
        doors = {"GET /": lambda: self.reply((ASSETS / "page.html").read_text("utf-8"), "text/html"),
                 "GET /scene": self.scene, "POST /ask": lambda: self.queued(self.ask),
                 "POST /look": lambda: self.queued(self.look)}
        try:
            url, host = urlsplit(self.path), self.headers.get("Host", "")
            if (urlsplit(f"//{host}").hostname not in ("localhost", "127.0.0.1")  # other names can lead here, too
                    or self.headers.get("Origin", f"http://{host}") != f"http://{host}"):
                return self.reply("only the page of http://localhost is answered", "text/plain", 403)
            self.query = dict(parse_qsl(url.query, max_num_fields=9))
            doors[f"{self.command} {url.path}"]()
        except (ValueError, LookupError, FileNotFoundError) as error:
            self.reply(printable(error), "text/plain", 400)
    do_POST = do_GET

    def reply(self, content, kind="application/json", status=200):
        if not self.begun:
            self.begun = True
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
        self.wfile.write(content.encode())

    def scene(self):
        example = load_dataset("scenes-plain", "test")[time.time_ns() % 2000]  # the embedded checkpoint's world
        self.reply(json.dumps({"picture": png(example.image), "phrases": [example.phrase, *EXAMPLE_PROMPTS],
                               "checkpoints": list(self.server.names)}))

    def queued(self, job):
        """Let the worker do the job with the body, unless the queue is full or the client leaves it."""
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length <= MOST_BYTES:
            return self.reply(f"a picture has at most {MOST_BYTES} bytes", "text/plain", 413)
        body = [self.rfile.read(length)]
        if not self.server.places.acquire(blocking=False):
            return self.reply("the model is busy and the queue is full: try again soon", "text/plain", 503)
        future = self.server.worker.submit(job, body)
        future.add_done_callback(lambda done: self.server.places.release())
        while not wait([future], 0.2).done:
            if select.select([self.connection], [], [], 0)[0] and future.cancel():  # the client said good-bye
                return body.clear()  # the worker drops the job only at its turn
        future.result()

    def event(self, name, **values):
        self.reply(f"event: {name}\ndata: {json.dumps(values)}\n\n", "text/event-stream")

    def ask(self, body):
        name, prompt, begun = self.query["checkpoint"], self.query.get("prompt", ""), time.perf_counter()
        image, segmenter = open_picture(io.BytesIO(body[0])), self.server.load(name)
        segmenter.check([prompt])
        c, inside, tokens, ends, shown = segmenter.model.config, {}, [], [], {0}
        force = [range(c.codebook_size)[int(token)] for token in self.query.get("force", "").split(",") if token]
        small = [max(1, round(side * 128 / max(image.size))) for side in image.size]
        self.event("begin", tokens=c.mask_tokens, scales=c.scales, grid=c.mask_grid)

        def grown(known):
            self.event("grown", known=known, mask=png(*segmenter.decode([tokens[:known]], [small])))
            shown.add(known)

        def tell(start, found, sure, guesses):
            tokens.extend(found)
            ends.append(len(tokens))
            self.event("tokens", start=start, tokens=found, sure=sure, guesses=guesses)
            if time.perf_counter() > begun + 0.5 * len(shown):  # rarely: it takes time from the tokens
                grown(len(tokens))

        mask = segmenter.stream(image, prompt, tell, force, inside, draft=self.query.get("draft", "auto"))
        self.server.kept = dict([*self.server.kept.items(), (str(begun), (name, small, inside))][-MOST_KEPT:])
        self.event("mask", id=str(begun), mask=png(mask), rle=rle_encode(mask), read_as=inside["prompts"][0],
                   unknown=inside["unknown"][0], answer=inside.get("answers"))
        for known in [n for n in ends[:-1] if n not in shown][::1 + len(ends) // 8]:
            grown(known)
        self.event("end", there=segmenter.there(inside)[0] if tokens else None)

    def look(self, body):
        name, small, inside = self.server.kept[self.query["id"]]
        picture, mask, others = self.server.load(name).look(inside, int(self.query["place"]), small)
        others = [(token, sure, png(changed)) for token, sure, changed in others]
        self.reply(json.dumps({"picture": picture, "mask": mask, "others": others}))


def png(picture):
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def open_server(port, paths=()):
    """A server with the checkpoints at `paths` and the embedded ones. One worker does all that needs a model."""
    server, found = ThreadingHTTPServer(("127.0.0.1", port), Handler), ASSETS.glob("*/model.safetensors")
    server.names = {path: path for path in paths} | {"embedded": None} | {f.parent.name: f.parent for f in found}
    server.load, server.kept = lru_cache(2)(lambda name: Segmenter.load(server.names[name])), {}  # kept: masks by id
    server.worker, server.places = ThreadPoolExecutor(1), BoundedSemaphore(1 + MOST_WAITING)
    server.worker.submit(server.load, next(iter(server.names))).result()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses twice as many
    print(f"open http://localhost:{server.server_port} (Ctrl-C ends it)", flush=True)
    return server


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free one")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="PATH", help="what sample.py takes")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port} must be from 0 to 65535")
    return parser.run(lambda: open_server(args.port, args.checkpoint).serve_forever())


if __name__ == "__main__":
    raise SystemExit(main())
