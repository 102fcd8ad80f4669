"""The server's OpenAPI document: vLLM's own, with the `hiprune` fields where they are read."""

from typing import Any, Final

from fastapi import FastAPI

from hiprune_vllm.plan import NO_LIMITS, Encoder, Limits
from hiprune_vllm.reading import schema

ANY_ENCODER: Final = Encoder(family="", output_layer=2**31, object_layer=1, has_cls=True)
WHOLE: Final = (
    "PrunedChatRequest",
    "PrunedResponsesRequest",
    "PrunedMessagesRequest",
    "PrunedCountTokensRequest",
    "ExplainRequest",
)
"""Request schemas with a plan for all their images."""
PARTS: Final = (
    "ChatCompletionContentPartImageParam",
    "ChatCompletionContentPartVideoParam",
    "ResponseInputImageParam",
    "AnthropicContentBlock",
)
"""Schemas of image and video parts with a plan of their own."""
ANSWERS: Final = ("/v1/chat/completions", "/v1/responses", "/v1/messages")

_COUNT: Final = {"type": "integer", "minimum": 1}
_OF_IMAGE: Final[dict[str, Any]] = {
    "tokens_full": _COUNT,
    "tokens_kept": _COUNT,
    "method": {"type": "string"},
    "source": {"enum": ["image", "detail", "request", "default"]},
}
_OF_VIDEO: Final = {
    "kind": {"const": "video"},
    "frames": _COUNT,
    **_OF_IMAGE,
    "source": {"enum": ["video", "request", "default"]},
}
_GIVEN: Final = {"type": "object", "required": list(_OF_IMAGE), "properties": _OF_IMAGE}
_NUMBERS: Final = {"type": "array", "items": {"type": "number"}}
_EXPLAINED: Final = {
    "type": "object",
    "required": [*_OF_IMAGE, "plan", "counts", "parts"],
    "properties": {
        **_OF_IMAGE,
        "plan": {"$ref": "#/components/schemas/HiPrunePlan"},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "parts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tile", "grid", "kept", "roles", "scores"],
                "properties": {
                    "tile": {"type": "integer", "minimum": 0},
                    "grid": {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2},
                    "kept": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "roles": {
                        "type": "array",
                        "items": {"enum": ["anchor", "buffer", "register", "other"]},
                    },
                    "scores": {
                        "type": "object",
                        "properties": {"object": _NUMBERS, "output": _NUMBERS},
                    },
                },
            },
        },
        "overlay": {"type": "string", "description": "A PNG as a data URL, where asked for."},
    },
}


def describe(app: FastAPI) -> None:
    """Makes `app.openapi` tell of our fields, with the ranges of the model that is served."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        pruning = getattr(app.state, "hiprune", None)
        document = stock()
        extend(
            document,
            getattr(pruning, "encoder", None) or ANY_ENCODER,
            getattr(pruning, "limits", NO_LIMITS),
        )
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def extend(document: dict[str, Any], encoder: Encoder, limits: Limits = NO_LIMITS) -> None:
    """Adds our fields to an OpenAPI document; doing it again changes nothing."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    knobs = schema(encoder, limits)
    told = "Visual-token budget; at most one of tokens, ratio and total_tokens."
    plan = {"type": "object", "additionalProperties": False, "description": told}
    schemas["HiPrunePlan"] = {**plan, "properties": knobs}
    of_one = {knob: allowed for knob, allowed in knobs.items() if knob != "total_tokens"}
    schemas["HiPruneImagePlan"] = {**plan, "properties": of_one}
    schemas["HiPruneReport"] = {
        "type": "object",
        "required": ["images"],
        "properties": {
            "images": {"type": "array", "items": _GIVEN},
            "videos": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["kind", *_OF_IMAGE],
                    "properties": _OF_VIDEO,
                },
            },
        },
    }
    schemas["HiPruneExplanation"] = _EXPLAINED
    for names, kind in ((WHOLE, "HiPrunePlan"), (PARTS, "HiPruneImagePlan")):
        for name in names:
            if name in schemas:
                schemas[name].setdefault("properties", {})["hiprune"] = _ref(kind)
    answer = {"type": "object", "properties": {"hiprune": _ref("HiPruneReport")}}
    for path in ANSWERS:
        _answers(document, path)["application/json"] = {"schema": answer}
    explained = _answers(document, "/v1/hiprune/explain")
    explained["application/json"] = {"schema": _ref("HiPruneExplanation")}
    explained["image/png"] = {"schema": {"type": "string", "format": "binary"}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answers(document: dict[str, Any], path: str) -> dict[str, Any]:
    """What a POST to `path` is answered with, by media type; nowhere if there is no such route."""
    operation = document["paths"].get(path, {}).get("post", {"responses": {}})
    found: dict[str, Any] = (
        operation["responses"].setdefault("200", {"description": "OK"}).setdefault("content", {})
    )
    return found
