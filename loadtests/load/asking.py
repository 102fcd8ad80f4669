"""One request over the OpenAI API as a client sees it: streamed, every token timed."""

import json
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from loadtests.load.cells import Asking
from loadtests.load.records import (
    CANCELLED,
    CUT,
    IN_STREAM,
    LOST,
    NO_REPORT,
    OK,
    REFUSED,
    SLOW,
    TIMEOUT,
    UNREADABLE,
    Record,
)

PATH: Final = "/v1/chat/completions"

SLOW_READ_S = 0.2
"""How long a slow client waits before it reads each event."""
_WORDS = (
    "what", "is", "in", "this", "picture", "and", "where", "are", "the", "things", "that", "can",
    "be", "seen", "tell", "me", "about", "their", "colour", "shape", "size", "number", "please",
)  # fmt: skip


def body(
    asking: Asking, plan: dict[str, Any], url: str, number: int, *, identity: str = ""
) -> dict[str, Any]:
    """The request about picture `number`.

    Args:
        plan: its `hiprune` object.
        url: of the picture.
        identity: what the server's caches are to know the picture by (vLLM's `uuid`); empty for
            its contents.
    """
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
    if identity:
        part["uuid"] = identity
    length = answer_length(asking, number)
    wished: dict[str, Any] = {
        "model": asking.model,
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": question(asking, number)}]}
        ],
        "max_tokens": length,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "hiprune": plan,
    }
    if asking.exact:
        wished |= {"ignore_eos": True, "min_tokens": length}
    return wished


def question(asking: Asking, number: int) -> str:
    """As many words as wished, the same for the same number."""
    words = _between(asking.question, asking.seed, number, 1)
    return " ".join(_WORDS[i % len(_WORDS)] for i in range(words)) + "?"


def answer_length(asking: Asking, number: int) -> int:
    """Tokens to generate, the same for the same number."""
    return _between(asking.answer, asking.seed, number, 2)


def _between(limits: tuple[int, int], *seeds: int) -> int:
    low, high = limits
    # Python's own generator is slow to seed; this is a hash of a few small integers.
    mixed = hash((*seeds, 0x9E3779B9)) & 0x7FFFFFFF
    return low + mixed % (high - low + 1)


class Client:
    """Sends requests to one server, each on a connection of its own.

    Args:
        url: of the server, without `/v1`.
        headers: sent with every request.
        timeout_s: of one request as a whole.
    """

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._where: dict[str, Any] = {
            "host": parts.hostname or "",
            "port": parts.port or (443 if secure else 80),
            "ssl": secure,
            "concurrency": 1,
            "connection_timeout": timeout_s,
            "network_timeout": timeout_s,
        }
        self._path = parts.path.rstrip("/") + PATH
        self._headers = {"Content-Type": "application/json", **headers}
        self._timeout = timeout_s

    def ask(
        self, wished: dict[str, Any], record: Record, *, cancel: bool = False, slow: bool = False
    ) -> None:
        """Sends a request and fills in `record` as the answer comes; raises nothing.

        Args:
            cancel: close the connection after the first token.
            slow: wait before each read.
        """
        content = json.dumps(wished).encode()
        client = HTTPClient(**self._where)
        limit = gevent.Timeout(self._timeout)
        limit.start()
        try:
            response = client.request("POST", self._path, content, self._headers)
            if response.status_code != 200:
                record.outcome = f"HTTP {response.status_code}"
                record.detail = _said(response.read(2000))
            else:
                stream(response.readline, record, cancel=cancel, slow=slow)
        except gevent.Timeout as passed:
            if passed is not limit:
                raise
            record.outcome = TIMEOUT
        except ConnectionRefusedError:
            record.outcome = REFUSED
        except TimeoutError:
            record.outcome = TIMEOUT
        except (OSError, ssl.SSLError, socket.gaierror, HTTPParseError, EOFError) as error:
            record.outcome = CUT if record.ttft is not None else LOST
            record.detail = f"{type(error).__name__}: {error}"[:200]
        finally:
            limit.close()
            client.close()
        record.ended = time.monotonic()


def stream(
    readline: Callable[[bytes], bytes], record: Record, *, cancel: bool = False, slow: bool = False
) -> None:
    """Reads server-sent events into `record`.

    Args:
        readline: gives the next line with its end, empty at the end of the stream.
    """
    record.outcome = CUT
    last = 0.0
    while line := readline(b"\n"):
        if not line.startswith(b"data:"):
            continue
        if slow:
            gevent.sleep(SLOW_READ_S)
        now = time.monotonic()
        text = line[5:].strip()
        if text == b"[DONE]":
            record.outcome = SLOW if slow else OK
            break
        try:
            event = json.loads(text)
            token = _note(event, record)
        except (ValueError, KeyError, TypeError, AttributeError):
            record.outcome, record.detail = UNREADABLE, text[:200].decode(errors="replace")
            return
        if "error" in event:
            record.outcome, record.detail = IN_STREAM, _said(text)
            return
        if token:
            if record.ttft is None:
                record.ttft = now - record.started
            else:
                record.gaps.append(now - last)
            last = now
            if cancel:
                record.outcome = CANCELLED
                return
    if record.outcome == OK and record.ttft is None:
        record.outcome, record.detail = UNREADABLE, "no token came"
    elif record.outcome == OK and record.kept is None:
        record.outcome = NO_REPORT


def _note(event: dict[str, Any], record: Record) -> bool:
    """Takes down what an event reports; whether it carries a token."""
    report = event.get("hiprune")
    if report:
        record.full = sum(image["tokens_full"] for image in report["images"])
        record.kept = sum(image["tokens_kept"] for image in report["images"])
    usage = event.get("usage")
    if usage:
        record.prompt, record.answer = usage["prompt_tokens"], usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        record.cached = details.get("cached_tokens")
    metrics = event.get("metrics")
    if metrics:
        record.queue = _seconds(metrics.get("queue_time_ms"))
        record.prefill = _seconds(metrics.get("time_to_first_token_ms"))
        record.decode = _seconds(metrics.get("generation_time_ms"))
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        # The first event of some servers has the role alone, before anything was computed. A token
        # without text of its own (a part of a character) is one all the same.
        if delta.get("content") or ("content" in delta and "role" not in delta):
            return True
    return False


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _said(answer: bytes) -> str:
    """The message in an error's envelope, or what came instead of one."""
    try:
        error = json.loads(answer)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:200]
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")
