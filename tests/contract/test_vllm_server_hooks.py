"""Every vLLM hook that the server relies on, so that an upgrade says what moved."""

import importlib
import inspect
from http import HTTPStatus

import zmq
from vllm.connections import HTTPConnection
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion import api_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.media import VideoMediaIO
from vllm.multimodal.media.connector import MediaConnector
from vllm.multimodal.media.image import ImageMediaIO
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.renderers import BaseRenderer, chat_utils
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine import utils as engine_utils

from hiprune_server.hardening.media import GuardedConnector
from hiprune_server.routes.endpoint import HiPruneEndpointPlugin


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_endpoint_plugin_is_one():
    plugin = HiPruneEndpointPlugin()
    assert isinstance(plugin, EndpointPlugin)
    assert parameters(plugin.init_state) == parameters(EndpointPlugin.init_state)[1:]


def test_the_chat_handler_has_the_methods_that_are_overridden():
    assert inspect.iscoroutinefunction(OpenAIServingChat.chat_completion_full_generator)
    assert inspect.isasyncgenfunction(OpenAIServingChat.chat_completion_stream_generator)
    for name in ("chat_completion_full_generator", "chat_completion_stream_generator"):
        assert parameters(getattr(OpenAIServingChat, name))[:6] == [
            "self",
            "request",
            "result_generator",
            "request_id",
            "model_name",
            "conversation",
        ]
    source = inspect.getsource(OpenAIServingChat._create_chat_completion)
    assert "await self.render_chat_request(request)" in source
    assert "self.online_renderer" in inspect.getsource(OpenAIServingChat.render_chat_request)
    assert "openai_serving_chat" in inspect.getsource(api_router.chat)


def test_the_responses_handler_has_the_methods_that_are_overridden():
    handler = OpenAIServingResponses
    for name in ("responses_full_generator", "responses_stream_generator"):
        assert parameters(getattr(handler, name))[:4] == [
            "self",
            "request",
            "sampling_params",
            "result_generator",
        ]
    assert inspect.isasyncgenfunction(handler.responses_stream_generator)
    assert "self.online_renderer.render_responses(" in inspect.getsource(
        handler._render_resolved_response_inputs
    )


def test_the_messages_handler_goes_through_chat():
    handler = AnthropicServingMessages
    assert issubclass(handler, OpenAIServingChat)
    assert "self.create_chat_completion(chat_req" in inspect.getsource(handler.create_messages)
    assert "self.render_chat_request(chat_req)" in inspect.getsource(handler.count_tokens)
    assert parameters(handler.messages_full_converter) == ["self", "generator"]
    assert parameters(handler.message_stream_converter) == ["self", "generator"]
    # What a picture's wish travels behind.
    source = {"type": "base64", "media_type": "image/png", "data": "AA#wish"}
    assert handler._convert_image_source_to_url(source) == "data:image/png;base64,AA#wish"


def test_all_messages_are_rendered_in_one_place():
    renderer = OnlineRenderer
    assert parameters(renderer.preprocess_chat)[:3] == ["self", "request", "messages"]
    for method in (renderer.render_chat, renderer.render_responses):
        assert "await self.preprocess_chat(" in inspect.getsource(method)
        assert "skip_mm_cache" in parameters(method)


def test_messages_can_be_put_through_the_template_again():
    """What `templates.left_out` does, with pictures that are named alone and so not loaded."""
    source = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert "request.build_chat_params(" in source
    assert ").with_defaults(" in source
    assert parameters(BaseRenderer.render_messages_async) == ["self", "messages", "params"]
    part = {"type": "image_url", "image_url": None, "uuid": "-"}
    parse = (  # since 0.33 it is public
        getattr(chat_utils, "_parse_chat_message_content_mm_part", None)
        or importlib.import_module(f"{chat_utils.__name__}.chat_message")
    )
    parse = getattr(parse, "parse_chat_message_content_mm_part", parse)
    assert parse(part) == ("image_url", None)


def test_an_echo_takes_the_last_messages_content_for_text():
    """What `chat.spoken` is for."""
    source = inspect.getsource(OpenAIServingChat)  # of a whole answer and of a stream
    assert source.count('last_msg_content = conversation[-1]["content"] or ""') == 2


def test_pictures_are_loaded_by_a_connector_of_ones_own():
    from vllm import envs

    assert "VLLM_MEDIA_CONNECTOR" in envs.environment_variables
    for method in (MediaConnector.load_from_url, MediaConnector.load_from_url_async):
        assert parameters(method)[:3] == ["self", "url", "media_io"]
    assert parameters(MediaConnector.fetch_image_embedding_async) == ["self", "data"]
    assert GuardedConnector().connection is not MediaConnector().connection


def test_pictures_are_decoded_by_a_class_of_ones_own():
    for fetch in (MediaConnector.fetch_image, MediaConnector.fetch_image_async):
        source = inspect.getsource(getattr(MediaConnector, "_image_io", fetch))  # since 0.33
        assert "ImageMediaIO(" in source
    assert set(vars(ImageMediaIO())) >= {"image_mode", "rgba_background_color"}
    assert parameters(ImageMediaIO.load_base64) == ["self", "media_type", "data"]
    assert "self.image_io.load_base64" in inspect.getsource(VideoMediaIO.load_base64)
    hashed = inspect.getsource(MultiModalHasher.serialize_item)
    assert '{"io_config": obj.io_config, "data": obj.original_bytes}' in hashed


def test_hosts_are_asked_through_a_client_of_ones_own():
    for load in (MediaConnector.load_from_url, MediaConnector.load_from_url_async):
        assert "get_bytes(" in inspect.getsource(load)
        assert "max_bytes=" in inspect.getsource(load)
    assert "await self.get_async_client()" in inspect.getsource(HTTPConnection.get_async_response)
    error = create_error_response(GracefulHTTPError("Later", HTTPStatus.GATEWAY_TIMEOUT)).error
    assert (error.code, error.type, error.message) == (504, "Gateway Timeout", "Later")
    assert parameters(MediaConnector.fetch_image_embedding_async) == ["self", "data"]


def test_an_interrupt_is_still_dropped_while_an_engine_is_waited_for():
    """What `let_a_start_be_stopped` is for, and where it takes hold."""
    with engine_utils.zmq_socket_ctx(f"inproc://{__name__}", zmq.ROUTER, bind=True):
        raise KeyboardInterrupt
    assert "zmq_socket_ctx(" in inspect.getsource(engine_utils.launch_core_engines)


def test_requests_keep_unknown_fields_for_us():
    request = ChatCompletionRequest(messages=[], model="m", hiprune={"tokens": 5})
    assert request.model_extra == {"hiprune": {"tokens": 5}}


def test_the_renderer_asks_before_it_takes_processor_options():
    assert parameters(validate_request_mm_kwargs) == [
        "mm_processor_kwargs",
        "media_io_kwargs",
        "trust_request_mm_kwargs",
    ]
    source = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert "trust_request_mm_kwargs=self.trust_request_mm_kwargs" in source


def test_what_waits_in_the_engine_has_the_limits_that_we_set():
    """Both are read at each request, so that they may be set once the engine is known."""
    from vllm.config import SchedulerConfig
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import GracefulHTTPError, MaxQueuedTokensError, QueueOverflowError
    from vllm.v1.engine.async_llm import AsyncLLM

    limits = SchedulerConfig.default_factory()
    assert limits.max_num_queued_reqs is None
    assert limits.max_num_queued_tokens is None
    check = inspect.getsource(AsyncLLM.check_admission)
    assert "self.scheduler_config.max_num_queued_reqs" in check
    assert "self.scheduler_config.max_num_queued_tokens" in check
    assert list(inspect.signature(AsyncLLM.check_admission).parameters)[:2] == ["self", "n"]
    assert "self.check_admission(request_id=" in inspect.getsource(AsyncLLM._add_request)
    assert "self.engine_client.check_admission(n)" in inspect.getsource(
        GenerateBaseServing._preflight
    )
    for error in (QueueOverflowError(), MaxQueuedTokensError()):
        assert isinstance(error, GracefulHTTPError)
        assert error.http_status == 503
