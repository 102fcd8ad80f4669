"""vLLM endpoint plugin: puts the pruned handlers in place and adds the routes of our own."""

import argparse
import functools
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

import vllm
from fastapi import Depends, FastAPI, Request
from starlette.datastructures import State
from vllm.entrypoints.anthropic import api_router as anthropic_api
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion import api_router as chat_api
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses import api_router as responses_api
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.tasks import POOLING_TASKS

import hiprune_server.hardening.media  # noqa: F401 - registers the connector for vLLM to find
from hiprune_server.hardening.auth import Keys, close_administration, replace_vllms
from hiprune_server.hardening.bodies import BodyLimits
from hiprune_server.hardening.grammars import Grammars
from hiprune_server.hardening.guard import STOPPING, Guard
from hiprune_server.hardening.overload import bound_the_queue
from hiprune_server.hardening.reading import stop_at_first_errors
from hiprune_server.hardening.refusing import RefusingPlugin
from hiprune_server.hardening.stopping import stop_in_good_order
from hiprune_server.operations.banner import banner
from hiprune_server.operations.config import DISABLE, Config, load
from hiprune_server.pages import playground
from hiprune_server.routes import openapi
from hiprune_server.routes.chat import PrunedChat, PrunedMessages, PrunedResponses, pruned
from hiprune_server.routes.explain import Explainer, explain
from hiprune_server.routes.pooling import HANDLERS, take_budgets
from hiprune_server.routes.rendering import PrunedRenderer
from hiprune_server.routes.requests import (
    PrunedChatRequest,
    PrunedCountTokensRequest,
    PrunedMessagesRequest,
    PrunedResponsesRequest,
)
from hiprune_vllm import __version__
from hiprune_vllm.facade import WORKER_EXTENSION, Engine, Pruning
from hiprune_vllm.plan import (
    FIELD,
    FULL,
    LIMITS,
    NO_LIMITS,
    OF_VIDEOS,
    Encoder,
    PlanError,
    PruningPlan,
    complete,
)
from hiprune_vllm.reading import parse_plan, schema

CHAT = "/v1/chat/completions"


class HiPruneEndpointPlugin:
    """What vLLM's endpoint-plugin mechanism expects; loaded when named in VLLM_PLUGINS."""

    name = "hiprune_api"
    required_tasks = ("generate", *POOLING_TASKS)
    engine_died = False
    """Whether the last server of this process stopped because its engine was gone."""

    @staticmethod
    def refusing(reason: str) -> RefusingPlugin:
        """What stands in for this plugin where it may not be loaded."""
        return RefusingPlugin(reason)

    def attach_router(self, app: FastAPI) -> None:
        config = load({}, os.environ)
        check_engine_wide(config, app.state.args)
        json_only = [Depends(validate_json_request)]
        app.add_api_route("/v1/hiprune", describe, methods=["GET"])
        if any(getattr(route, "path", None) == CHAT for route in app.routes):
            for path, endpoint in (
                (CHAT, create_chat_completion),
                ("/v1/responses", create_responses),
                ("/v1/messages", create_messages),
                ("/v1/messages/count_tokens", count_tokens),
            ):
                app.add_api_route(path, endpoint, methods=["POST"], dependencies=json_only)
            # Plain `vllm serve` has no such extension, and nobody who could explain.
            extended = app.state.args.worker_extension_cls == WORKER_EXTENSION
            if config["explain"] and (extended or config[DISABLE]):
                app.add_api_route(
                    "/v1/hiprune/explain", explain, methods=["POST"], dependencies=json_only
                )
            if config["playground"]:
                playground.attach(app)
        openapi.describe(app)
        limits = BodyLimits(
            max_bytes=config["limits.max_body_bytes"],
            max_held=config["limits.max_held_bytes"],
            seconds=config["limits.body_seconds"],
            max_values=config["limits.max_body_values"],
        )
        keys = Keys.of(app.state.args, metrics=config["metrics_key"])
        app.add_middleware(Guard, keys=keys, limits=limits)
        replace_vllms(app)
        close_administration(app)
        stop_at_first_errors(app)
        vllm_lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with vllm_lifespan(app) as state:
                print(banner(app.state.args, _model_name(app.state)), flush=True)
                stopped = stop_in_good_order(app)
                setattr(app.state, STOPPING, stopped)
                yield state
                died = app.state.engine_client.errored and not stopped.is_set()
                HiPruneEndpointPlugin.engine_died = died

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: State, args: argparse.Namespace) -> None:
        config, off = load({}, os.environ), ""
        if config[DISABLE]:
            off = f"pruning is switched off ({config.values[DISABLE].source})"
        engine = Engine(engine_client, switched_off=off)
        state.hiprune = engine.pruning
        state.hiprune_presets = presets(config, state.hiprune.encoder)
        for name in HANDLERS:
            if (handler := getattr(state, name, None)) is not None:
                take_budgets(handler, state.hiprune)
        bound_the_queue(engine_client, args)
        grammars = Grammars(engine_client.vllm_config, config["limits.grammar_seconds"])
        engine_client.generate = functools.partial(grammars.generate, engine_client.generate)
        if getattr(state, "openai_serving_chat", None) is None:
            return  # a model that makes no text
        chat = state.openai_serving_chat
        renderer = PrunedRenderer.around(
            chat.online_renderer, state.hiprune, state.hiprune_presets, grammars
        )
        state.openai_serving_chat = pruned(chat, OpenAIServingChat, PrunedChat, renderer)
        state.openai_serving_responses = pruned(
            state.openai_serving_responses, OpenAIServingResponses, PrunedResponses, renderer
        )
        state.anthropic_serving_messages = pruned(
            state.anthropic_serving_messages, AnthropicServingMessages, PrunedMessages, renderer
        )
        state.hiprune_explainer = Explainer(state.openai_serving_chat, engine)


def check_engine_wide(config: Config, args: argparse.Namespace) -> None:
    """Refuses settings that are the engine's where `vllm serve` has not handed them on.

    Raises:
        RuntimeError: naming the flag that does.
    """
    given = args.mm_processor_kwargs or {}
    wanted: dict[str, object] = {}
    if config["default"]:
        wanted[FIELD] = config["default"]
    if config["default_video"]:
        wanted[OF_VIDEOS] = config["default_video"]
    if config.limits != NO_LIMITS:
        wanted[LIMITS] = {
            name: value
            for name, value in asdict(config.limits).items()
            if value != getattr(NO_LIMITS, name)
        }
    missing = {key: value for key, value in wanted.items() if key not in given}
    if missing and not config[DISABLE]:
        raise RuntimeError(
            f"HIPRUNE_DEFAULT and HIPRUNE_LIMITS_... are read by hiprune-serve; `vllm serve` takes "
            f"the same as --mm-processor-kwargs '{json.dumps(missing)}'"
        )


def presets(config: Config, encoder: Encoder | None) -> dict[str, PruningPlan]:
    """`detail` of an image -> its plan; none where the model cannot be pruned.

    Raises:
        RuntimeError: a preset that this model cannot serve.
    """
    if encoder is None:
        return {}
    found = {}
    for detail, wish in config.presets.items():
        try:
            plan = parse_plan(wish, encoder, field=f"presets.{detail}", for_one_image=True)
        except PlanError as error:
            raise RuntimeError(str(error)) from error
        found[detail] = replace(plan, of_operator=True)
    return found


def _model_name(state: State) -> str:
    name: str = state.openai_serving_models.base_model_paths[0].name
    return name


async def create_chat_completion(request: PrunedChatRequest, raw_request: Request) -> Any:
    """vLLM's `/v1/chat/completions`, with a plan."""
    return await chat_api.create_chat_completion(request, raw_request)


async def create_responses(request: PrunedResponsesRequest, raw_request: Request) -> Any:
    """vLLM's `/v1/responses`, with a plan."""
    request.check()
    return await responses_api.create_responses(request, raw_request)


async def create_messages(request: PrunedMessagesRequest, raw_request: Request) -> Any:
    """vLLM's `/v1/messages`, with a plan."""
    request.check()
    return await anthropic_api.create_messages(request, raw_request)


async def count_tokens(request: PrunedCountTokensRequest, raw_request: Request) -> Any:
    """vLLM's `/v1/messages/count_tokens`, of what a plan would keep."""
    request.check()
    return await anthropic_api.count_tokens(request, raw_request)


async def describe(raw_request: Request) -> dict[str, Any]:
    """What this server prunes, with which defaults and within which limits."""
    pruning: Pruning = raw_request.app.state.hiprune
    encoder = pruning.encoder
    answer: dict[str, Any] = {
        "model": _model_name(raw_request.app.state),
        "supported": encoder is not None,
        "versions": {"hiprune-vllm": __version__, "vllm": vllm.__version__},
    }
    if encoder is None:
        return answer | {"reason": pruning.unsupported}
    default = complete(pruning.default.over(FULL), encoder)
    if encoder.careful_ratio is not None:
        answer["careful_ratio"] = encoder.careful_ratio
    return answer | {
        "family": encoder.family,
        "about": pruning.about.to_dict() if pruning.about else None,
        "encoder": {"output_layer": encoder.output_layer, "has_cls": encoder.has_cls},
        "default": default.to_dict(),
        "videos": {
            "supported": pruning.videos,
            "default": pruning.of_videos.over(FULL).to_dict(),
        },
        "presets": {
            detail: plan.to_dict() for detail, plan in raw_request.app.state.hiprune_presets.items()
        },
        "limits": schema(encoder, pruning.limits)
        | {"max_full_tokens": pruning.limits.max_full_tokens},
    }
