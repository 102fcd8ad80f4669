"""Base64 as people write it, and whose fault it is that a picture did not come."""

import asyncio
import base64
import importlib
import os
import time

import numpy as np
import pybase64
import pytest
from PIL import Image
from vllm import envs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher

from hiprune_server.hardening import media
from hiprune_server.hardening.media import GuardedConnector, from_base64
from hiprune_server.hardening.pictures import PictureError
from tests import hosts
from tests.hosts import BAD_HOSTS, BAD_URLS, png, wrapped

DATA = os.urandom(10_000)
PLAIN = base64.b64encode(DATA).decode()


def url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.rstrip("="),
        wrapped(PLAIN),
        wrapped(PLAIN, 64, "\r\n"),
        wrapped(PLAIN, 100, " \t"),
        "\n" + PLAIN,
        base64.urlsafe_b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        wrapped(base64.urlsafe_b64encode(DATA).decode()),
    ],
)
def test_base64_of_either_alphabet_wrapped_or_not_is_read(text):
    assert from_base64(text) == DATA


@pytest.mark.parametrize("text", ["%%%", "a", "äöü=", "a=b=", "AAAA=AAA", PLAIN + "!", "\x00AAA"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(PictureError, match="not base64"):
        from_base64(text)


def test_a_large_body_in_lines_is_read_in_time_that_grows_with_its_size_alone():
    def seconds(data):
        text = wrapped(pybase64.b64encode(data).decode())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert from_base64(text) == data
            times.append(time.perf_counter() - start)
        return min(times)

    data = os.urandom(24 * 2**20)
    assert seconds(data) < 4 * seconds(data[: len(data) // 2])  # 2 where it is linear


@pytest.fixture
def connector():
    return GuardedConnector()


def refused(connector, text, fetch="fetch_image"):
    with pytest.raises(VLLMValidationError) as refusal:
        getattr(connector, fetch)(text)
    return refusal.value


def test_a_picture_of_any_mode_comes_as_rgb(connector):
    wide = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    for text in (url(png(wide)), wrapped(url(png(wide))), url(png(wide)).rstrip("=")):
        image = connector.fetch_image(text)
        assert image.media.mode == "RGB"
        assert image.media.getpixel((0, 0)) == (128, 128, 128)


def test_the_operators_background_and_mode_stay_his():
    clear = png(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    blue = GuardedConnector({"image": {"rgba_background_color": [0, 0, 255]}})
    assert blue.fetch_image(url(clear)).media.getpixel((0, 0)) == (0, 0, 255)
    assert GuardedConnector().fetch_image(url(clear)).media.getpixel((0, 0)) == (255, 255, 255)
    kept = GuardedConnector({"image": {"image_mode": None}}).fetch_image(url(clear))
    assert kept.media.mode == "RGBA"


def test_two_pictures_never_share_an_identity_and_one_has_but_one(connector):
    """What vLLM makes of a decoded picture for all its caches."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = Image.merge("LA", (grey, Image.new("L", (8, 8), 128)))
    blue = GuardedConnector({"image": {"rgba_background_color": [0, 0, 255]}})

    def identity(data, by=connector):
        return MultiModalHasher.hash_kwargs("blake3", image=by.fetch_image(url(data)))

    found = [identity(png(one)) for one in (grey, wide, clear)] + [identity(png(clear), blue)]
    assert len(set(found)) == 4
    assert identity(png(clear)) == found[2]
    assert identity(png(clear), blue) == found[3]


def test_single_frames_of_a_video_are_read_like_pictures(connector):
    lines = wrapped(base64.b64encode(png()).decode())
    frames, _ = connector.fetch_video(f"data:video/jpeg;base64,{lines},{lines}").media
    assert frames.shape == (2, 8, 8, 3)
    assert (frames == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("fetch", "field"),
    [("fetch_image", "image_url"), ("fetch_video", "video_url"), ("fetch_audio", "audio_url")],
)
def test_the_field_is_the_one_that_was_asked_by(connector, fetch, field):
    for text in ("data:image/png;base64,AAAA", "http://10.0.0.1/secret", "file:///etc/passwd", "x"):
        error = refused(connector, text, fetch)
        assert error.parameter == field
        assert str(error).startswith(field)


def test_a_damaged_picture_is_told_by_its_format(connector):
    told = str(refused(connector, url(png(Image.effect_noise((40, 40), 9))[:-300])))
    assert "image_url must be a picture as a base64 data URL: this PNG is damaged" in told


@pytest.fixture
def logged(monkeypatch):
    """Warnings of the connector; whether they are shown is vLLM's configuration's business."""
    told = []
    monkeypatch.setattr(media._logger, "warning", lambda text, *of: told.append(text % of))
    return told


@pytest.fixture(scope="module")
def host():
    with hosts.serving() as url:
        yield url


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "1")
    monkeypatch.setenv("VLLM_VIDEO_FETCH_TIMEOUT", "1")
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "1")
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    assert envs.VLLM_MEDIA_FETCH_MAX_RETRIES == 1
    return GuardedConnector(allowed_media_domains=["127.0.0.1"])


def fetched(connector, text, fetch="fetch_image_async"):
    """The picture or the error, each in an event loop of its own."""

    async def ask():
        connector.connection = type(connector.connection)()
        try:
            return await getattr(connector, fetch)(text)
        finally:
            await (await connector.connection.get_async_client()).close()

    try:
        return asyncio.run(ask())
    except (VLLMValidationError, GracefulHTTPError) as error:
        return error


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("path", BAD_URLS)
def test_what_is_wrong_with_a_url_is_its_senders_fault(guarded, host, path, kind):
    if kind == "video" and path == "page":
        pytest.skip("what is no video is told by its decoder")
    error = fetched(guarded, f"{host}/{path}", f"fetch_{kind}_async")
    assert isinstance(error, VLLMValidationError)
    assert error.parameter == f"{kind}_url"
    assert BAD_URLS[path] in str(error)
    assert host.removeprefix("http://") not in str(error)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("path", BAD_HOSTS)
def test_what_is_wrong_with_a_host_is_told_as_such_and_logged(guarded, host, path, kind, logged):
    error = fetched(guarded, f"{host}/{path}", f"fetch_{kind}_async")
    status, told = BAD_HOSTS[path]
    assert isinstance(error, GracefulHTTPError)
    assert (error.http_status, str(error)) == (status, f"{kind}_url cannot be fetched now: {told}")
    assert len(logged) == 1
    assert f"{kind}_url on 127.0.0.1: {told}" in logged[0]


def test_a_host_that_refuses_connections_is_a_502(guarded):
    error = fetched(guarded, "http://127.0.0.1:9/x.png")
    assert error.http_status == 502
    assert "127.0.0.1" not in str(error)


def test_a_host_that_was_not_allowed_is_asked_for_nothing(guarded):
    error = fetched(guarded, "http://169.254.169.254/latest/meta-data")
    assert isinstance(error, VLLMValidationError)
    assert "169.254" not in str(error).replace("parameter=", "")


def test_a_picture_of_a_host_that_works_is_served(guarded, host):
    assert fetched(guarded, f"{host}/picture").media.getpixel((0, 0)) == (255, 0, 0)


def counted(*modules_and_names):
    """vLLM's counters of one request's media."""
    for module, name in modules_and_names:
        found = getattr(importlib.import_module(module), name, None)
        if found is None:
            pytest.skip("vLLM counts what a request loads from 0.33 on")
        yield found()


def test_what_a_request_decodes_is_counted_before_it_is_decoded(monkeypatch):
    (budget,) = counted(("vllm.multimodal.media.base", "MediaDecodedBudget"))
    monkeypatch.setenv("VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES", "1000")
    connector = GuardedConnector(decoded_budget=budget)
    small, large = (url(png(Image.new("L", (side, side)))) for side in (10, 13))
    assert connector.fetch_image(small).media.size == (10, 10)
    assert budget.used == 400
    error = refused(connector, large)
    assert error.parameter == "image_url"
    assert "at most 1000 bytes once they are decoded, 4 a pixel" in str(error)
    assert "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES" in str(error)
    assert budget.used == 400


def test_what_a_request_downloads_is_counted(guarded, host, monkeypatch):
    (budget,) = counted(("vllm.connections", "MediaRequestDownloadBudget"))
    guarded.download_budget = budget
    assert fetched(guarded, f"{host}/picture").media
    assert budget.used > 0
    monkeypatch.setenv("VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB", "1")
    budget.used = 2**20 - 1
    error = fetched(guarded, f"{host}/picture")
    assert error.parameter == "image_url"
    assert "with it the request's downloads have more than 1 MiB" in str(error)
