"""Streams that are cancelled, an engine that is killed, a server that is told to stop."""

import signal
import threading
import time

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.serving import BIN, content, running
from tests.photos import photo

LONG = 1500  # tokens: some seconds


@pytest.fixture
def start(tmp_path):
    command = [str(BIN / "hiprune-serve"), "--demo"]
    return lambda *flags: running([*command, *flags], tmp_path, model="hiprune-demo")


def stream(server, seen, *, tokens=LONG):
    """Reads a long answer's chunks into `seen` until it ends or the connection breaks."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": content([photo("coffee").resize((336, 336))])}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "hiprune": {"tokens": 64},
    }
    try:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=60
        ) as got:
            for line in got.iter_lines():
                seen.append(line)
    except httpx.TransportError as error:
        seen.append(error)


def under_way(server):
    text = httpx.get(f"{server.url}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:num_requests_running"
    )


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def engines(server):
    """Processes of the server's tree that run an engine core."""
    port = server.url.rsplit(":", 1)[1]
    (root,) = [
        process
        for process in psutil.process_iter()
        if port in process.cmdline() and "hiprune-serve" in " ".join(process.cmdline())
    ][:1]
    children = root.children(recursive=True)
    return root, [one for one in children if "EngineCore" in one.name() + " ".join(one.cmdline())]


def test_cancelled_streams_free_their_requests(start):
    with start() as server:
        for _ in range(3):
            with httpx.Client(timeout=60) as client:
                body = {
                    "model": server.model,
                    "messages": [{"role": "user", "content": "Hello"}],
                    "max_tokens": LONG, "ignore_eos": True, "stream": True,
                }  # fmt: skip
                url = f"{server.url}/v1/chat/completions"
                with client.stream("POST", url, json=body) as got:
                    assert got.status_code == 200
                    lines = got.iter_lines()  # dropping it would close the stream at once
                    next(lines)
                    until(lambda: under_way(server) == 1, 10)
            until(lambda: under_way(server) == 0, 10)
        seen = []
        reader = threading.Thread(target=stream, args=(server, seen))
        reader.start()
        until(lambda: len(seen) > 3, 30)
        root, _ = engines(server)
        root.send_signal(signal.SIGTERM)
        assert root.wait(60) == 0
        reader.join(10)
        assert seen[-2:] == ["data: [DONE]", ""]  # drained, not cut off


def test_a_stream_that_outlasts_the_drain_does_not_keep_the_server(start):
    with start("--shutdown-timeout", "1") as server:
        seen = []
        reader = threading.Thread(target=stream, args=(server, seen), kwargs={"tokens": 4000})
        reader.start()
        until(lambda: len(seen) > 3, 30)
        root, _ = engines(server)
        root.send_signal(signal.SIGTERM)
        assert root.wait(30) == 0
        reader.join(10)
        assert not reader.is_alive()


def test_a_killed_engine_takes_the_server_down_so_that_it_is_restarted(start):
    with start() as server:
        root, cores = engines(server)
        assert cores
        seen = []
        reader = threading.Thread(target=stream, args=(server, seen))
        reader.start()
        until(lambda: len(seen) > 3, 30)
        for core in cores:
            core.kill()

        def healthy():
            try:
                return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(lambda: not healthy(), 10)
        assert root.wait(30) != 0
        reader.join(10)
        assert not reader.is_alive()
