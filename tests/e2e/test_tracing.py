"""A trace of a request, received as a collector receives it, has the request's budget."""

import http.server
import threading
import time

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.e2e.serving import BIN, running
from tests.photos import photo

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
CAT, CUP = photo("chelsea"), photo("coffee")


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        told = ExportTraceServiceRequest()
        told.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in told.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        body = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        collector.spans = []
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        command = [str(BIN / "hiprune-serve"), "--demo", "--otlp-traces-endpoint", address]
        environment = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        folder = tmp_path_factory.mktemp("traced")
        with running(command, folder, model="hiprune-demo", environment=environment) as server:
            yield server, collector
        collector.shutdown()


def span_of(traced, request_id):
    """Attributes of a request's span, and its trace."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for span in traced[1].spans:
            found = {one.key: plain(one.value) for one in span.attributes}
            if span.name == "llm_request" and found.get("gen_ai.request.id") == request_id:
                return found, span.trace_id.hex()
        time.sleep(0.2)
    raise AssertionError(f"no span of {request_id}: {[span.name for span in traced[1].spans]}")


def plain(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(one) for one in value.array_value.values]
    return getattr(value, kind)


def budgets(found):
    return {key: value for key, value in found.items() if key.startswith("hiprune.")}


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_span_says_what_of_each_picture_was_kept_and_why(traced, tokens):
    server, _ = traced
    answer = server.ask(
        [CAT, CUP],
        max_tokens=tokens,
        extra_body={"hiprune": {"tokens": 64, "method": "stride"}},
        extra_headers={"traceparent": PARENT},
    )
    found, trace = span_of(traced, answer.id)
    assert trace == TRACE
    assert budgets(found) == {
        "hiprune.tokens_full": [576, 576],
        "hiprune.tokens_kept": [64, 64],
        "hiprune.method": ["stride", "stride"],
        "hiprune.source": ["request", "request"],
    }
    assert found["gen_ai.usage.prompt_tokens"] == answer.usage.prompt_tokens


def test_a_stream_has_it_as_well_and_a_request_without_pictures_has_none(traced):
    server, _ = traced
    chunks = list(server.ask([CAT], stream=True, extra_body={"hiprune": {"ratio": 0.25}}))
    found, _ = span_of(traced, chunks[0].id)
    assert budgets(found)["hiprune.tokens_kept"] == [144]
    answer = server.ask([])
    found, _ = span_of(traced, answer.id)
    assert not budgets(found)
