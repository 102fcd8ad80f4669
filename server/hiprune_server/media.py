"""Which pictures are fetched at all, and what is said of those that cannot be read."""

import re
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

NAME: Final = "hiprune"
"""What VLLM_MEDIA_CONNECTOR names it by."""


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class GuardedConnector(MediaConnector):
    """vLLM's media connector, closed where the operator has opened nothing.

    Data URLs are always read. Others are fetched only from `--allowed-media-domains`, files only
    below `--allowed-local-media-path`. Whatever is wrong with a picture is its sender's fault,
    HTTP 400, in words that tell nothing about the server.
    """

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        kind = self._kind(url)
        try:
            return super().load_from_url(url, media_io, **options)
        except Exception as error:
            raise _told(kind, error) from error

    async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
        kind = self._kind(url)
        try:
            return await super().load_from_url_async(url, media_io, **options)
        except Exception as error:
            raise _told(kind, error) from error

    async def fetch_image_embedding_async(self, data: str) -> Any:
        try:
            return await super().fetch_image_embedding_async(data)
        except Exception as error:
            if isinstance(error, VLLMValidationError):
                raise
            raise VLLMValidationError(
                "image_embeds must be a tensor as torch.save writes it, or an array as numpy.save "
                "does, in base64: this is none",
                parameter="image_embeds",
            ) from error

    def _kind(self, url: str) -> str:
        """The URL's scheme, where it may be read."""
        kind = url.partition(":")[0].lower()
        allowed = {
            "data": True,
            "http": bool(self.allowed_media_domains),
            "https": bool(self.allowed_media_domains),
            "file": self.allowed_local_media_path is not None,
        }
        if not allowed.get(kind, False):
            wanted = ", ".join(f"{name}:" for name, open_ in allowed.items() if open_)
            raise VLLMValidationError(
                f"image_url must be a URL that begins with one of {wanted} on this server "
                f"(--allowed-media-domains opens others), got {url[:40]!r}",
                parameter="image_url",
            )
        return kind


def _told(kind: str, error: Exception) -> Any:
    """What the client hears of an error: of a data URL all, of others nothing about the server."""
    if isinstance(error, VLLMValidationError):
        return error
    if kind == "data":
        # Pillow names an object and its address.
        reason = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "it", str(error))[:200]
        told = f"image_url must be a picture as a base64 data URL: {reason or type(error).__name__}"
    else:
        told = f"image_url must be a picture that this server can read, this {kind}: URL is none"
    return VLLMValidationError(told, parameter="image_url")
