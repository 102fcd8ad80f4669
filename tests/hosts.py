"""A host on 127.0.0.1 that serves a picture, or fails in each of the ways that hosts do."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def png(image=None):
    buffer = io.BytesIO()
    (image or Image.new("RGB", (8, 8), "red")).save(buffer, "PNG")
    return buffer.getvalue()


def wrapped(text, width=76, end="\n"):
    return end.join(text[i : i + width] for i in range(0, len(text), width)) + end


class Host(BaseHTTPRequestHandler):
    """Gives what its path says."""

    stopped = threading.Event()

    def do_GET(self):
        what = self.path.strip("/")
        if what.isdigit():
            self.send_response(int(what))
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        if what == "silence":
            self.stopped.wait(30)
            return
        if what == "break":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if what == "picture":
            self.wfile.write(png())
        elif what == "page":
            self.wfile.write(b"<!doctype html>")
        try:
            while what in ("endless", "trickle") and not self.stopped.is_set():
                self.wfile.write(bytes(2**16 if what == "endless" else 1))
                if what == "trickle":
                    time.sleep(0.05)
        except OSError:
            pass  # the other side has had enough, as it should

    def log_message(self, *_):
        pass


@contextmanager
def serving() -> Iterator[str]:
    """The host's URL, while it runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Host.stopped.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        Host.stopped.set()
        server.shutdown()


BAD_URLS = {
    "404": "its host answers 404",
    "403": "its host answers 403",
    "302": "its host answers 302, a redirect, which this server does not follow",
    "page": "this HTML cannot be read",
    "endless": "it has more than 1048576 bytes",
}
"""Path -> what is told to the client, whose fault it is. Bounds: 1 MiB, and seconds."""

BAD_HOSTS = {
    "500": (502, "its host answers 500"),
    "503": (502, "its host answers 503"),
    "429": (502, "its host answers 429"),
    "silence": (504, "its host has not answered in time"),
    "trickle": (504, "its host has not answered in time"),
    "break": (502, "its host cannot be reached, or broke off"),
}
"""Path -> HTTP status and what is told to the client, which can ask again."""
