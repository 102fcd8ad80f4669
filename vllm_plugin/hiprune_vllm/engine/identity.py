"""Who a picture is: what caches know it by, and what is remembered of it by that name."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cachetools import LRUCache
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems, VideoProcessorItems
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from hiprune_vllm.engine.checks import not_at_hand
from hiprune_vllm.plan import TokenCount
from hiprune_vllm.pruning.budget import ImageBudget

REMEMBERED = 8192
"""Images of which the front end remembers something, least recently used out first."""


class KnownImages:
    """Sizes of images and where their random draws begin, by vLLM's identity of an image.

    A client may name an image by its `uuid` alone once it was seen: neither is at hand then.
    """

    def __init__(self) -> None:
        self._counts: LRUCache[str, TokenCount] = LRUCache(REMEMBERED)
        self._seeds: LRUCache[str, int] = LRUCache(REMEMBERED)
        self._lock = threading.Lock()

    def count(
        self, images: Any, index: int, identity: str, counted: Callable[[], TokenCount]
    ) -> TokenCount:
        """Tokens of an image that is at hand (`counted`) or was seen. Raises otherwise."""
        found = counted() if images.get(index) is not None else None
        return self._noted(self._counts, identity, found, index)

    def likely(
        self, videos: VideoProcessorItems, index: int, identity: str, guessed: Callable[[], int]
    ) -> TokenCount:
        """Tokens of a video that was seen, or is at hand and likely has as many as `guessed`."""
        with self._lock:
            found = self._counts.get(identity)
        if found is not None:
            return found

        def counted() -> TokenCount:
            count = guessed()
            return TokenCount(count, count)

        return self.count(videos, index, identity, counted)

    def correct(self, identity: str, count: int) -> None:
        """Notes what was made of a video."""
        self._noted(self._counts, identity, TokenCount(count, count), 0)

    def seeds(
        self, plain: ProcessorInputs, modality: str, identities: Sequence[str], algorithm: Any
    ) -> list[int]:
        """What each image's `random` draw begins with: a number of its content, whatever its name.

        vLLM's identity has the model's name in it too, which may be a folder: without it the draw
        is the same wherever the checkpoint lies.
        """
        images = plain.mm_data_items[modality]
        sources = by_content(plain, modality).get_mm_hashes("", algorithm)[modality]
        seeds = []
        for i, (source, identity) in enumerate(zip(sources, identities, strict=True)):
            found = None
            if images.get(i) is not None:
                found = int(MultiModalHasher.hash_kwargs(algorithm, seed=source)[:15], 16)
            seeds.append(self._noted(self._seeds, identity, found, i))
        return seeds

    def _noted(self, known: LRUCache[str, Any], identity: str, found: Any, index: int) -> Any:
        with self._lock:
            if found is None:
                found = known.get(identity)
            else:
                known[identity] = found
        if found is None:
            raise not_at_hand(index)
        return found


def by_content(plain: ProcessorInputs, modality: str) -> ProcessorInputs:
    """The same inputs without the names (`uuid`) that a client gives to its images."""
    named = plain.mm_uuid_items or {}
    others = {kind: items for kind, items in named.items() if kind != modality}
    data = plain.mm_data_items
    items = [data[modality].get(i) for i in range(len(data[modality]))] if modality in data else []
    if any(isinstance(item, dict) and item.get("uuid") for item in items):  # it is there as well
        unnamed = [{**item, "uuid": None} if isinstance(item, dict) else item for item in items]
        data = type(data)({**data, modality: type(data[modality])(unnamed)})
    return replace(plain, mm_data_items=data, mm_uuid_items=others)


def names(plain: ProcessorInputs, modality: str) -> Sequence[str | None]:
    """The client's name for each image."""
    images = plain.mm_data_items[modality]
    return (plain.mm_uuid_items or {}).get(modality) or [None] * len(images)


def identify(plain: ProcessorInputs, modality: str) -> ProcessorInputs:
    """The inputs with the names that can be relied on.

    Without a cache images are known by their content alone: a `uuid` cannot bring them back then,
    and where there is no prefix cache either vLLM writes a running number in its place, which a
    client can write as well.

    Raises:
        VLLMValidationError: there is no cache, and an image is named by its `uuid` alone.
    """
    if plain.cache is not None:
        return plain
    all_at_hand(plain, modality)
    return by_content(plain, modality)


def all_at_hand(inputs: ProcessorInputs, modality: str) -> None:
    """Raises vLLM's validation error where an image is named by its `uuid` alone."""
    images = inputs.mm_data_items.get(modality, ())
    for i in range(len(images)):
        if images.get(i) is None:
            raise not_at_hand(i, modality)


def with_budget(
    identity: str,
    name: str | None,
    budget: ImageBudget,
    sizes: Mapping[str, int],
    algorithm: Any,
) -> str:
    """An image's final identity (a digest), of vLLM's own (its content or its name) and its budget.

    And of what it is scaled to: another size may come to as many tokens.

    Of unpruned images too, and of what vLLM's own is made of: a client that names its image by the
    identity of somebody else's must not meet it, nor an entry of another length.
    """
    digest: str = MultiModalHasher.hash_kwargs(
        algorithm,
        identity=identity,
        named=name is not None,
        hiprune=[*budget.to_ints(), *sizes.values()],
    )
    return digest


def of_kind(identity: str, kind: str, algorithm: Any) -> str:
    """The identity (a digest) of what is no picture to be encoded, a video say.

    vLLM takes a client's name as it is, which could be what a picture goes by: both would share an
    entry of its caches, of another length.
    """
    digest: str = MultiModalHasher.hash_kwargs(algorithm, identity=identity, kind=kind)
    return digest


class _PushedOut(Exception):
    """An item that was in the cache has made room for another one of the same request."""


class CachedProcessing(BaseMultiModalProcessor):
    """Mixin: vLLM's processing with a cache, also of what the cache does not hold (any more)."""

    modality: Any

    def _get_cache_missing_items(
        self, cache: Any, mm_data_items: Any, mm_hashes: Mapping[str, list[str]]
    ) -> Any:
        for kind, items in mm_data_items.items():
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                continue
            for i, known in enumerate(cache.is_cached(mm_hashes.get(kind, []))):
                if not known and items.get(i) is None:
                    raise not_at_hand(i, kind)
        return super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """vLLM's own; all over without the cache where that is smaller than the request."""
        try:
            return super()._cached_apply_hf_processor(inputs, timing_ctx)
        except _PushedOut:
            for kind in inputs.mm_data_items:
                all_at_hand(inputs, kind)
            return self._apply_hf_processor(inputs, timing_ctx)

    def _merge_mm_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._merge_mm_kwargs(*args, **kwargs)
        except AssertionError as error:  # vLLM asserts that what was in the cache still is
            raise _PushedOut from error
