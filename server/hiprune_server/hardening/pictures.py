"""Pictures as a person sees them: encoded bytes of many formats and modes -> 8-bit RGB pixels.

Symptom: 16-bit scans are all white, CMYK is inverted, photographs lie on their side; few bytes take
    seconds to decode, in which the process does nothing else.
Cause: vLLM has Pillow convert to RGB, which clips and ignores what a file says of itself; Pillow
    bounds pixels, but neither scans nor what decoders written in Python take.
Change: each mode is read by its own rule, and what would be long work is refused before it begins.
Remove when: vLLM reads every mode as it is seen, and bounds work rather than pixels.
"""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
from PIL import IcoImagePlugin, Image, ImageChops, ImageCms, UnidentifiedImageError

WHITE: Final = (255, 255, 255)
"""What is seen through a picture where nothing else is asked for."""
MAX_SCANS: Final = 100
"""Of a JPEG: each costs a pass over all pixels, however few bytes it has. Writers use up to 20."""
MAX_PYTHON_PIXELS: Final = 2_000_000
MAX_PYTHON_BYTES: Final = 16 * 2**20
"""Of a picture whose decoder is no machine code (QOI, PPM as text, BMP with run lengths, ...): it
takes about a microsecond a pixel, in which nothing else of the process runs."""

_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_ICON: Final = b"\0\0\1\0"
_SIGNATURES: Final = {
    _PNG: "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "BigTIFF",
    b"MM\0+": "BigTIFF",
    b"BM": "BMP",
    _ICON: "ICO",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"<!doc": "HTML",
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_MIN_IS_WHITE, _UNSIGNED = 0, 1
_MOST: Final = 2**16 - 1


class PictureError(ValueError):
    """A picture that cannot be read; the message is for its sender."""


def bound_pixels(most: int) -> None:
    """Makes Pillow refuse a picture of more than `most` pixels before it decodes it; 0: any.

    For all of this process, so that it holds for what is inside of other pictures (an icon's PNG)
    too. By itself Pillow warns from a limit on, and refuses from twice as many pixels.
    """
    # Pillow multiplies it by 2 and compares; nothing says that it must be whole.
    Image.MAX_IMAGE_PIXELS = most / 2 if most > 0 else None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read(
    data: bytes,
    *,
    formats: tuple[str, ...],
    background: tuple[int, int, int] = WHITE,
    admit: Callable[[int], None] | None = None,
) -> Image.Image:
    """Decodes a picture: its first frame or page, an icon's largest size, turned upright.

    Args:
        data: as in a file.
        formats: Pillow's names of those that may be read.
        background: red, green and blue in [0, 255] of what is seen through the picture.
        admit: is told how many pixels there are before they are decoded, and may raise a
            PictureError.

    Returns:
        Mode RGB, 8 bits. A picture of other depths has each value's nearest: 16-bit grey is
        divided by 257 (colours keep their high byte); a profile of colours is not applied.

    Raises:
        PictureError: the bytes are no such picture, are damaged, or ask for too much work.
    """
    try:
        if data.startswith(_ICON) and "ICO" in formats:
            image, data = _of_icon(data)
        else:
            image = Image.open(io.BytesIO(data), formats=formats)
        _check_work(image, data)
        if admit is not None:
            admit(image.width * image.height)
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _rgb(image, data, background)
        return rgb if turn is None else rgb.transpose(turn)
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PictureError(f"this {_named(data)} cannot be read") from None
    except Image.DecompressionBombError:
        most = int((Image.MAX_IMAGE_PIXELS or 0) * 2)
        raise PictureError(
            f"a picture must have at most {most} pixels (limits.max_image_pixels), "
            f"this {_named(data)} has more"
        ) from None
    except Exception as error:
        # Decoders raise whatever comes of damaged bytes, and those alone decide what they do.
        told = f"this {_named(data)} is damaged or of a kind that cannot be read"
        raise PictureError(told) from error


def _named(data: bytes) -> str:
    """The format by its first bytes, for a message."""
    head = data[:16].lstrip().lower()
    if data[:4] == b"RIFF":
        return data[8:12].decode("ascii", "replace").strip()
    if data[4:8] == b"ftyp":
        return data[8:12].decode("ascii", "replace").strip().upper()
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature) or head.startswith(signature.lower()):
            return name
    return "file" if data else "empty file"


def _of_icon(data: bytes) -> tuple[Image.Image, bytes]:
    """The icon's largest picture by its own size (its directory's ends at 256), and its bytes."""
    icons = IcoImagePlugin.IcoFile(io.BytesIO(data))

    def is_png(index: int) -> bool:
        return data.startswith(_PNG, icons.entry[index].offset)

    def pixels(index: int) -> int:
        start = icons.entry[index].offset
        if is_png(index):
            width, height = struct.unpack_from(">II", data, start + 16)
        else:  # a bitmap above its mask
            width, height = struct.unpack_from("<ii", data, start + 4)
            height //= 2
        return abs(int(width) * int(height))

    best = max(range(len(icons.entry)), key=lambda i: (pixels(i), icons.entry[i].color_depth))
    if pixels(best) > MAX_PYTHON_PIXELS:
        raise PictureError(
            f"an icon must have at most {MAX_PYTHON_PIXELS} pixels, this has {pixels(best)}"
        )
    if not is_png(best):
        return icons.frame(best), data
    data = data[icons.entry[best].offset :]
    return Image.open(io.BytesIO(data), formats=["PNG"]), data


def _check_work(image: Image.Image, data: bytes) -> None:
    """Refuses what few bytes, or few pixels, make long work."""
    pixels = image.width * image.height
    in_python = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    if in_python and (pixels > MAX_PYTHON_PIXELS or len(data) > MAX_PYTHON_BYTES):
        raise PictureError(
            f"a {image.format} of this kind must have at most {MAX_PYTHON_PIXELS} pixels and "
            f"{MAX_PYTHON_BYTES} bytes, this has {pixels} and {len(data)}: send a PNG"
        )
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise PictureError(f"a JPEG must have at most {MAX_SCANS} scans, this has more")


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; upright where the picture says nothing that can be read.

    What is damaged there is not the picture. Pillow has turned a TIFF by its own tag already.
    """
    try:
        number = image.getexif().get(_ORIENTATION)
        return int(number) if isinstance(number, int) else 1
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return 1


def _rgb(image: Image.Image, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        return _of_16_bits(image, background)
    if mode in ("I", "F"):
        return _grey(image).convert("RGB")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return cast(Image.Image, ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    if mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes the values of every CMYK JPEG for turned round, as Adobe's are.
        image = ImageChops.invert(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.format == "PNG" and mode in ("L", "RGB"):
        image.info["transparency"] = _to_8_bits(image.info["transparency"], depth=data[24])
    if mode == "La":
        image = image.convert("LA")
    clear = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, background)
    rgb.paste(clear, mask=clear.getchannel("A"))
    return rgb


def _to_8_bits(colour: Any, *, depth: int) -> Any:
    """The colour that a PNG names as clear, which it does in its own depth, in that of pixels."""
    if isinstance(colour, tuple):
        return tuple(value >> 8 for value in colour) if depth == 16 else colour
    return colour * 255 // (2**depth - 1) if depth < 8 else colour


def _tag(image: Image.Image, number: int) -> Any:
    """A TIFF's tag, the first of several; None where there is none."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _of_16_bits(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    values = np.asarray(image)
    most = 2**12 - 1 if _tag(image, _BITS) == 12 else _MOST
    seen = np.arange(_MOST + 1, dtype=np.uint32)
    seen = np.minimum((seen * 255 + most // 2) // most, 255).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _MIN_IS_WHITE:
        seen = 255 - seen
    rgb = Image.fromarray(seen[values]).convert("RGB")
    clear = image.info.get("transparency")
    if clear is not None:
        rgb.paste(background, mask=Image.fromarray(values == clear))
    return rgb


def _grey(image: Image.Image) -> Image.Image:
    """Grey of 32 bits, whose format does not say which value is white.

    White is the least of the ends that are in use (1 for fractions, 255, 65535) which no value is
    above; where some value is below 0 or above 65535, black and white are the picture's own least
    and greatest. A PGM is scaled to 65535 by Pillow. What is no number is black.
    """
    values = np.asarray(image)
    if values.dtype == np.int32 and _tag(image, _SAMPLE_FORMAT) == _UNSIGNED:
        values = values.view(np.uint32)
    known = np.isfinite(values)
    of_value = values[known]
    least, most = (float(of_value.min()), float(of_value.max())) if of_value.size else (0.0, 0.0)
    ends = [1, 255, _MOST] if image.mode == "F" else [255, _MOST]
    if image.mode == "I" and image.format == "PPM":
        ends = [_MOST]
    if least >= 0 and most <= _MOST:
        least, most = 0.0, next(float(end) for end in ends if most <= end)
    seen = np.zeros(values.shape, np.uint8)
    if most > least:
        # By rows: the numbers in between are eight times as large as what they become.
        for row, of_row in enumerate(values):
            scaled = (np.where(known[row], of_row, least) - least) * (255 / (most - least))
            seen[row] = np.rint(scaled)
    if _tag(image, _PHOTOMETRIC) == _MIN_IS_WHITE:
        seen = 255 - seen
    return Image.fromarray(seen)
