"""Request models that say what is wrong with a body, in a time in proportion to it.

Symptom: a body with an odd field or a huge integer is a 500, and a small one with many wrong
    elements holds the server up for seconds.
Cause: vLLM's models look into a body before its types are known; what the engine is sent has no
    room for integers of more than 64 bits; pydantic tells of every way in which each element of a
    list of unions is wrong.
Change: each of them is a 400 that names the field, and lists stop at their first wrong element,
    on every route.
Remove when: vLLM's models check types first, bound integers and fail fast.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from typing import Any, Final, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidatorFunctionWrapHandler, model_validator
from pydantic_core import SchemaValidator
from vllm.exceptions import VLLMValidationError

from hiprune_server.hardening.stumbling import STUMBLES, refused
from hiprune_server.wishes.details import settled
from hiprune_server.wishes.places import path_of, written
from hiprune_vllm.plan import PlanError

INTEGERS: Final = range(-(2**63), 2**64)
"""What the way to the engine can carry."""


class Readable(BaseModel):
    """Mixin: makes a 400 that names the field of what vLLM's own checks stumble over.

    They look into a body before its types are known; without this an odd one is a 500. Reading
    takes time in proportion to the body, whatever is in it.
    """

    @model_validator(mode="wrap")
    @classmethod
    def read(cls, body: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        for path, number in _large_integers(body):
            raise VLLMValidationError(
                f"{path} must be in [{INTEGERS[0]}, {INTEGERS[-1]}], got a number of "
                f"{len(f'{number:x}')} hexadecimal digits",
                parameter=path,
            )
        try:
            body = settled(body)
        except PlanError as error:
            raise refused(error) from error
        try:
            return handler(body)
        except STUMBLES as error:
            field = _stumbling_block(body, handler, cls.model_fields)
            raise VLLMValidationError(
                f"{field} must be what the API has there, got something that cannot be read",
                parameter=field,
            ) from error


Model = TypeVar("Model", bound=type[BaseModel])
Place = tuple[Any, Any] | None
"""The place around a value, and the value's key in it; None: the body itself."""


def _large_integers(body: Any) -> Iterator[tuple[str, int]]:
    """Path and value of integers that are out of range, without recursion, as deep as they are."""
    left: list[tuple[Any, Place]] = [(body, None)]
    while left:
        value, place = left.pop()
        if isinstance(value, dict):
            inner: Any = value.items()
        elif isinstance(value, list):
            inner = enumerate(value)
        else:
            continue
        for key, one in inner:
            if isinstance(one, (dict, list)):
                left.append((one, (place, key)))
            elif isinstance(one, int) and one not in INTEGERS:
                yield written(path_of((place, key))), one


def _stumbling_block(
    body: Any, handler: ValidatorFunctionWrapHandler, known: Collection[str]
) -> str:
    """The field without which the body could at least be checked.

    The checks look at fields that they know, and a body has few of these; halving them asks for the
    body to be checked a handful of times, however many keys it has.
    """
    fields = [field for field in body if field in known] if isinstance(body, dict) else []

    def readable_without(first: int) -> bool:
        left_out = set(fields[:first])
        try:
            handler({key: value for key, value in body.items() if key not in left_out})
        except STUMBLES:
            return False
        except (ValueError, VLLMValidationError):
            pass
        return True

    first = bisect_left(range(len(fields) + 1), True, key=readable_without)
    return str(fields[first - 1]) if 0 < first <= len(fields) else "body"


def first_error_only(model: Model) -> Model:
    """Makes a model's lists stop at their first element that is wrong.

    The API's items are unions of dozens of types: each wrong element is wrong in hundreds of ways,
    and 20 kB of them took pydantic 13 seconds to tell.
    """
    schema = _failing_fast(model.__pydantic_core_schema__)
    model.__pydantic_core_schema__ = schema
    model.__pydantic_validator__ = SchemaValidator(schema)
    return model


def stop_at_first_errors(app: FastAPI) -> None:
    """The same for the bodies of every route, vLLM's own among them."""
    for route in app.routes:
        for field in route.dependant.body_params if isinstance(route, APIRoute) else ():
            adapter = field._type_adapter
            adapter.validator = SchemaValidator(_failing_fast(adapter.core_schema))


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, dict):
        inner = {key: _failing_fast(value) for key, value in schema.items()}
        return inner | {"fail_fast": True} if schema.get("type") in ("list", "tuple") else inner
    return [_failing_fast(one) for one in schema] if isinstance(schema, list) else schema
