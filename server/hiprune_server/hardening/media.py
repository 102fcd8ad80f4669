"""Which pictures are fetched at all, and what is said of those that cannot be read.

Symptom: a client has the server fetch from the operator's own network; a damaged picture or a
    host that is down is a 500; errors tell paths and addresses; a picture is read otherwise than
    a person sees it.
Cause: vLLM's connector is open unless it is closed, lets errors of its libraries through, and
    converts modes as Pillow does by default.
Change: a connector of our own that is closed unless it is opened, says whose fault it is, and reads
    pictures with `pictures.read`.
Remove when: vLLM closes its connector by default and tells a host's fault from the client's.
"""

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import pybase64
import requests
from vllm import envs
from vllm.connections import (
    HTTPConnection,
    HTTPResponseSizeExceededError,
    MediaDownloadSizeExceededError,
)
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import init_logger
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MediaWithBytes, VideoMediaIO
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from hiprune_server.hardening.pictures import PictureError, bound_pixels, read
from hiprune_server.hardening.releases import MediaRequestDownloadSizeExceededError

NAME: Final = "hiprune"
"""What VLLM_MEDIA_CONNECTOR names it by."""
_KINDS: Final = {
    "Image": ("image_url", "a picture"),
    "Video": ("video_url", "a video"),
    "Audio": ("audio_url", "a sound"),
}
"""Beginning of a decoder's class -> the request's field, and what it has to be."""
_logger = init_logger(f"vllm.{__name__}")  # vLLM's own are the ones that are shown

bound_pixels(envs.VLLM_MAX_IMAGE_PIXELS)


class Pictures(ImageMediaIO):
    """vLLM's decoder of pictures, which reads every mode as a person sees it."""

    @classmethod
    def instead(cls, media_io: Any) -> Any:
        """A decoder in the place of vLLM's: this for pictures and a video's single frames."""
        if type(media_io) is ImageMediaIO:
            own = cls.__new__(cls)
            own.__dict__.update(media_io.__dict__)
            return own
        if isinstance(media_io, VideoMediaIO):
            media_io.image_io = cls.instead(media_io.image_io)
        return media_io

    def load_bytes(self, data: bytes) -> Any:
        if self.image_mode != "RGB":  # the operator wants the picture's own
            return super().load_bytes(data)
        background = self.rgba_background_color
        formats = ALLOWED_IMAGE_FORMATS
        image = read(data, formats=formats, background=background, admit=self._charge)
        # Its identity in all caches is made of the bytes and of what decided how they are read.
        return MediaWithBytes(
            image, data, {"image_mode": "RGB", "rgba_background_color": background}
        )

    def _charge(self, pixels: int) -> None:
        """Counts a picture to what its request may decode, where vLLM counts that (0.33)."""
        budget = getattr(self, "decoded_budget", None)
        if budget is None:
            return
        try:
            budget.charge(4 * pixels)
        except ValueError:
            most = envs.VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES
            raise PictureError(
                f"a request's pictures must have at most {most} bytes once they are decoded, 4 a "
                "pixel (VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES), with this one they have more"
            ) from None

    def load_base64(self, media_type: str, data: str) -> Any:
        return self.load_bytes(from_base64(data))


_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
_PIECE: Final = 2**20


def from_base64(text: str) -> bytes:
    """What a text in base64 says: of either alphabet, in lines or in one, with or without padding.

    Raises:
        PictureError: it is no base64.
    """
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:  # not the plain form
        pass
    try:
        # In pieces, so that a large body does not hold all other work up while it is rewritten.
        plain = b"".join(_plain_pieces(text))
        return pybase64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise PictureError("it is not base64") from None


def _plain_pieces(text: str) -> Iterator[bytes]:
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE].encode("ascii")
        yield piece.translate(_STANDARD, b" \t\r\n\f\v")


_LATER: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals of a host that are not for good."""


class FetchError(Exception):
    """A host did not give what a URL names.

    Attributes:
        status: what the client is answered: 400 for its own fault, 502 or 504 for the host's.
    """

    def __init__(self, status: HTTPStatus, told: str) -> None:
        super().__init__(told)
        self.status = status


class _Hosts(HTTPConnection):
    """vLLM's client of other hosts, which says whose fault it is that nothing came."""

    _session: aiohttp.ClientSession | None = None

    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=True, raise_for_status=_check_status)
        return self._session

    async def async_get_bytes(self, url: str, **options: Any) -> bytes:
        try:
            return await super().async_get_bytes(url, **options)
        except Exception as error:
            raise _whose(error) from error

    def get_bytes(self, url: str, **options: Any) -> bytes:
        try:
            return super().get_bytes(url, **options)
        except Exception as error:
            raise _whose(error) from error


async def _check_status(response: aiohttp.ClientResponse) -> None:
    """Of every status but a success; by itself a redirect that is not followed is an empty body."""
    if response.status >= HTTPStatus.MULTIPLE_CHOICES:
        raise aiohttp.ClientResponseError(
            response.request_info, response.history, status=response.status
        )


def _whose(error: Exception) -> Exception:
    """What a failed fetch means to the client; other errors as they are."""
    told: tuple[HTTPStatus, str]
    if isinstance(error, aiohttp.ClientResponseError):
        told = _of_status(error.status)
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        told = _of_status(error.response.status_code)
    elif isinstance(error, MediaDownloadSizeExceededError | HTTPResponseSizeExceededError):
        told = HTTPStatus.BAD_REQUEST, f"it has more than {error.max_bytes} bytes"
    elif isinstance(error, MediaRequestDownloadSizeExceededError):
        most = envs.VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB
        told = (
            HTTPStatus.BAD_REQUEST,
            f"with it the request's downloads have more than {most} MiB "
            "(VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB)",
        )
    elif isinstance(error, TimeoutError | requests.Timeout):
        told = HTTPStatus.GATEWAY_TIMEOUT, "its host has not answered in time"
    elif isinstance(error, ValueError):
        told = HTTPStatus.BAD_REQUEST, "it is no URL"
    elif isinstance(error, aiohttp.ClientError | requests.RequestException | OSError):
        told = HTTPStatus.BAD_GATEWAY, "its host cannot be reached, or broke off"
    else:
        return error
    return FetchError(*told)


def _of_status(status: int) -> tuple[HTTPStatus, str]:
    if status < HTTPStatus.BAD_REQUEST:
        told = f"its host answers {status}, a redirect, which this server does not follow"
        return HTTPStatus.BAD_REQUEST, told
    of_host = status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _LATER
    whose = HTTPStatus.BAD_GATEWAY if of_host else HTTPStatus.BAD_REQUEST
    return whose, f"its host answers {status}"


_HOSTS: Final = _Hosts()


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class GuardedConnector(MediaConnector):
    """vLLM's media connector, closed where the operator has opened nothing.

    Data URLs are always read. Others are fetched only from `--allowed-media-domains`, files only
    below `--allowed-local-media-path`. Whatever is wrong with a picture is its sender's fault,
    HTTP 400, and what is wrong with the host that has it is 502 or 504, which clients ask again:
    both in words that tell nothing about the server.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection = _HOSTS

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        kind = self._kind(url, media_io)
        try:
            return super().load_from_url(url, Pictures.instead(media_io), **options)
        except Exception as error:
            raise _told(kind, url, media_io, error) from error

    async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
        kind = self._kind(url, media_io)
        try:
            return await super().load_from_url_async(url, Pictures.instead(media_io), **options)
        except Exception as error:
            raise _told(kind, url, media_io, error) from error

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

    def _kind(self, url: str, media_io: Any) -> str:
        """The URL's scheme, where it may be read."""
        kind = url.partition(":")[0].lower()
        allowed = {
            "data": True,
            "http": bool(self.allowed_media_domains),
            "https": bool(self.allowed_media_domains),
            "file": self.allowed_local_media_path is not None,
        }
        if not allowed.get(kind, False):
            field, _ = _asked(media_io)
            wanted = ", ".join(f"{name}:" for name, open_ in allowed.items() if open_)
            raise VLLMValidationError(
                f"{field} must be a URL that begins with one of {wanted} on this server "
                f"(--allowed-media-domains opens others), got {url[:40]!r}",
                parameter=field,
            )
        return kind


def _asked(media_io: Any) -> tuple[str, str]:
    """The field of the request that this decoder is for, and what it has to be."""
    name = type(media_io).__name__
    return next((told for kind, told in _KINDS.items() if name.startswith(kind)), _KINDS["Image"])


def _told(kind: str, url: str, media_io: Any, error: Exception) -> Exception:
    """What the client hears of an error: of a data URL all, of others nothing about the server."""
    if isinstance(error, VLLMValidationError | MemoryError):
        return error
    field, thing = _asked(media_io)
    if isinstance(error, FetchError) and error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _logger.warning("%s on %s: %s (%r)", field, _host(url), error, error.__cause__)
        return GracefulHTTPError(f"{field} cannot be fetched now: {error}", error.status)
    if kind == "data":
        # Pillow names an object and its address.
        reason = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "it", str(error))[:200]
        told = f"{field} must be {thing} as a base64 data URL: {reason or type(error).__name__}"
    elif isinstance(error, PictureError | FetchError):
        told = f"{field} must be {thing} that this server can read: {error}"
    else:
        told = f"{field} must be {thing} that this server can read, this {kind}: URL is none"
    return VLLMValidationError(told, parameter=field)


def _host(url: str) -> str:
    """Without what may be secret in a URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
