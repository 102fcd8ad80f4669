"""Streams that are cancelled, an engine that is killed, a server that is told to stop."""

import os
import signal
import subprocess
import threading
import time

import httpx
import psutil
import pytest

from tests.e2e.offline import ENVIRONMENT
from tests.e2e.serving import BIN, content, running
from tests.photos import photo

VARIABLES = os.environ | ENVIRONMENT
LONG = 1500  # tokens: some seconds


@pytest.fixture
def start(tmp_path):
    command = [str(BIN / "hiprune-serve"), "--demo"]
    return lambda *flags: running([*command, *flags], tmp_path, model="hiprune-demo")


def request(server, tokens=LONG):
    """A stream that takes a while."""
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": content([photo("coffee").resize((336, 336))])}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "hiprune": {"tokens": 64},
    }


def reading(server, **options):
    """A thread that reads a stream, under way already, and the list that it puts the lines into."""
    seen = []

    def read():
        url, body = f"{server.url}/v1/chat/completions", request(server, **options)
        try:
            with httpx.stream("POST", url, json=body, timeout=60) as got:
                for line in got.iter_lines():
                    seen.append(line)  # noqa: PERF402 - read by others while it grows
        except httpx.TransportError as error:
            seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: len(seen) > 3, 30)
    return reader, seen


def under_way(server):
    return server.total("vllm:num_requests_running")


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def command_of(process):
    """Its command line; empty for a process that has ended (a zombie of anybody's)."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def engines(server):
    """The server's process, and those below it that run an engine core."""
    port = server.url.rsplit(":", 1)[1]
    root = next(
        process
        for process in psutil.process_iter()
        if port in command_of(process) and "hiprune-serve" in " ".join(command_of(process))
    )
    children = root.children(recursive=True)
    return root, [one for one in children if "EngineCore" in " ".join(command_of(one))]


def test_cancelled_streams_free_their_requests(start):
    with start() as server:
        for _ in range(3):
            with httpx.Client(timeout=60) as client:
                url = f"{server.url}/v1/chat/completions"
                with client.stream("POST", url, json=request(server)) as got:
                    assert got.status_code == 200
                    lines = got.iter_lines()  # dropping it would close the stream at once
                    next(lines)
                    until(lambda: under_way(server) == 1, 10)
            until(lambda: under_way(server) == 0, 10)
        reader, seen = reading(server)
        root, _ = engines(server)
        root.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 10)
        new = server.post("/v1/chat/completions", request(server))
        assert (new.status_code, new.json()["error"]["code"]) == (503, 503)
        assert root.wait(60) == 0
        reader.join(10)
        assert seen[-2:] == ["data: [DONE]", ""]  # drained, not cut off


@pytest.mark.long
def test_a_stream_that_outlasts_the_drain_does_not_keep_the_server(start):
    with start("--shutdown_timeout", "1") as server:  # vLLM takes either spelling
        reader, seen = reading(server, tokens=4000)
        root, _ = engines(server)
        root.send_signal(signal.SIGTERM)
        assert root.wait(30) == 0
        reader.join(10)
        assert not reader.is_alive()
        # Cut off after a second, not drained for 30; vLLM may still find time to say so.
        told = [line for line in seen if isinstance(line, str) and line.startswith("data: {")]
        assert len(told) < 4000
        assert not any('"finish_reason":"length"' in line for line in told)


@pytest.mark.long
def test_the_demo_needs_no_compiler(tmp_path):
    """vLLM's sampler compiles functions when they are first needed."""
    nothing = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [str(BIN / "hiprune-serve"), "--demo"]
    with running(command, tmp_path, model="hiprune-demo", environment=nothing) as server:
        for options in (
            {"logprobs": True, "top_logprobs": 3},
            {"temperature": 1, "top_p": 0.9, "extra_body": {"top_k": 5, "min_p": 0.1}},
        ):
            assert server.ask([photo("coffee")], **options).choices


@pytest.mark.long
def test_a_server_that_is_told_to_stop_while_it_loads_its_model_stops(tmp_path):
    command = [BIN / "hiprune-serve", "--demo", "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        server = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=VARIABLES)

    def below():
        return server.children(recursive=True)

    until(lambda: any("EngineCore" in " ".join(command_of(one)) for one in below()), 90)
    time.sleep(1)  # it waits for its engine now
    processes = below()
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(processes, 10)
    assert not alive


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_killed_engine_takes_the_server_down_so_that_it_is_restarted(start, processes):
    with start("--api-server-count", processes) as server:
        root, cores = engines(server)
        assert cores
        reader, _ = reading(server)
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
