"""The same scene in every mode and format gives the pixels of its 8-bit RGB picture.

Tolerances, in 8-bit steps: 0 where the mode holds every 8-bit value, else the mode's own rounding
as the case says. Lossy formats are held against what Pillow itself decodes of the same bytes.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms
from PIL.PngImagePlugin import PngInfo

from hiprune_server.hardening import pictures
from hiprune_server.hardening.pictures import PictureError, read
from tests.photos import photo
from tests.tiffs import tiff

FORMATS = ("AVIF", "BMP", "CUR", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG",
           "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP")  # fmt: skip
SCENE = photo("chelsea").resize((150, 100))
GREY = SCENE.convert("L")
VALUES = np.asarray(GREY)
PALETTE = SCENE.quantize(200)
ALPHA = Image.linear_gradient("L").resize(SCENE.size)
SEEN_THROUGH = Image.composite(SCENE, Image.new("RGB", SCENE.size, "white"), ALPHA)
GREY_SEEN_THROUGH = Image.composite(
    GREY.convert("RGB"), Image.new("RGB", SCENE.size, "white"), ALPHA
)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(values, *, depth, colour, clear=None):
    """A PNG of rows of packed bytes, as no library of the tests writes them."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">L", len(content)) + checked + struct.pack(">L", zlib.crc32(checked))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">LLBBBBB", *SCENE.size, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def without_adobe(jpeg):
    """A JPEG without Adobe's marker, which says that its CMYK is turned round."""
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]) :]


def off(found, expected):
    """The largest difference of a value."""
    assert found.mode == "RGB"
    assert found.size == expected.size
    expected = np.asarray(expected.convert("RGB")).astype(int)
    return int(np.abs(np.asarray(found).astype(int) - expected).max())


WIDE = VALUES.astype(np.uint16) * 257
"""16 bits: 255 is 65535."""
COLOUR_WIDE = np.asarray(SCENE).astype(np.uint16) * 257
WITH_ALPHA = np.dstack([np.asarray(SCENE), np.asarray(ALPHA)])
PREMULTIPLIED = np.rint(VALUES * (np.asarray(ALPHA) / 255.0)).astype(np.uint8)
SOLID = np.full_like(VALUES, 255)
UNCOMPRESSED = {
    "16-bit PNG": saved(Image.fromarray(WIDE)),
    "16-bit TIFF, little endian": tiff(WIDE),
    "16-bit TIFF, big endian": tiff(WIDE, ">"),
    "16-bit TIFF, LZW": saved(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"),
    "16-bit TIFF, big endian, deflate": saved(
        Image.frombytes("I;16B", GREY.size, WIDE.astype(">u2").tobytes()), "TIFF",
        compression="tiff_adobe_deflate"),
    "16-bit TIFF, 0 is white": tiff(65535 - WIDE, photometric=0),
    "8-bit TIFF, 0 is white": tiff(255 - VALUES, ">", photometric=0),
    "8-bit TIFF, 0 is white, LZW": saved(
        GREY, "TIFF", compression="tiff_lzw", tiffinfo={262: 0}),  # turned by Pillow
    "16-bit TIFF, 0 is white, LZW": saved(  # not turned by Pillow
        Image.fromarray(65535 - WIDE), "TIFF", compression="tiff_lzw", tiffinfo={262: 0}),
    "16-bit JPEG 2000": saved(Image.fromarray(WIDE), "JPEG2000"),
    "PGM to 65535": b"P5 150 100 65535\n" + WIDE.astype(">u2").tobytes(),
    "PGM to 255": b"P5 150 100 255\n" + VALUES.tobytes(),
    "I to 255": tiff(VALUES.astype(np.int32)),
    "I to 65535": tiff(WIDE.astype(np.int32), ">"),
    "I unsigned": tiff(WIDE.astype(np.uint32)),
    "F to 1": tiff((VALUES / 255).astype(np.float32)),
    "F to 255": tiff(VALUES.astype(np.float32), ">"),
    "F to 65535": tiff(WIDE.astype(np.float32)),
    "F, 0 is white": tiff(1 - (VALUES / 255).astype(np.float32), photometric=0),
    "PFM": saved(Image.fromarray((VALUES / 255).astype(np.float32)), "PPM"),
    "LA, opaque": saved(Image.merge("LA", (GREY, Image.fromarray(SOLID)))),
    "La, opaque": tiff(np.dstack([VALUES, SOLID]), extra=(1,)),
    "grey with a channel of no meaning": tiff(np.dstack([VALUES, VALUES]), extra=(0,)),
    "L": saved(GREY, "BMP"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOMPRESSED)
def test_grey_of_any_depth_is_the_8_bit_grey(name):
    assert off(read(UNCOMPRESSED[name], formats=FORMATS), GREY) == 0


COLOURS = {
    "16-bit PNG": png(COLOUR_WIDE.astype(">u2"), depth=16, colour=2),
    "16-bit TIFF": tiff(COLOUR_WIDE, photometric=2),
    "16-bit TIFF, big endian": tiff(COLOUR_WIDE, ">", photometric=2),
    "16-bit TIFF, RGBX": tiff(
        np.dstack([COLOUR_WIDE, COLOUR_WIDE[..., 0]]), photometric=2, extra=(0,)),
    "8-bit TIFF": tiff(np.asarray(SCENE), ">", photometric=2),
    "BMP": saved(SCENE, "BMP"),
    "PPM": saved(SCENE, "PPM"),
    "TGA": saved(SCENE, "TGA"),
    "QOI": saved(SCENE, "QOI"),
    "SGI": saved(SCENE, "SGI"),
    "PCX": saved(SCENE, "PCX"),
    "WebP": saved(SCENE, "WEBP", lossless=True),
    "JPEG 2000": saved(SCENE, "JPEG2000"),
    "PNG": saved(SCENE),
}  # fmt: skip


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_any_depth_are_the_8_bit_ones(name):
    assert off(read(COLOURS[name], formats=FORMATS), SCENE) == 0


def test_a_pgm_of_12_bits_and_a_tiff_of_12_bits_are_scaled_to_their_own_white():
    twelve = np.rint(VALUES * (4095 / 255)).astype(np.uint16)
    pgm = b"P5 150 100 4095\n" + twelve.astype(">u2").tobytes()
    assert off(read(pgm, formats=FORMATS), GREY) == 0
    first, second = twelve[:, ::2], twelve[:, 1::2]  # three bytes are two values
    packed = np.dstack([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    packed = packed.astype(np.uint8).reshape(100, 225)
    shown = tiff(packed, t256=(150,), t258=(12,))
    assert off(read(shown, formats=FORMATS), GREY) == 0


def test_16_bits_between_two_8_bit_values_become_the_nearest():
    wide = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(read(saved(Image.fromarray(wide)), formats=FORMATS))[..., 0]
    assert np.array_equal(found, np.rint(wide / 257))
    colour = np.asarray(read(png_of_wide(wide), formats=FORMATS))[..., 1]
    assert np.abs(colour - wide / 257).max() < 1  # the high byte


def png_of_wide(wide):
    return tiff(np.dstack([wide] * 3), photometric=2)


def test_grey_beyond_16_bits_or_below_0_is_seen_between_its_own_ends():
    for values in (VALUES * 1000.0 - 7, VALUES - 128.0, VALUES * 70_000.0):
        low, high = values.min(), values.max()
        wanted = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
        for kind in (np.int32, np.float32):
            found = read(tiff(values.astype(kind)), formats=FORMATS)
            assert off(found, Image.fromarray(wanted)) <= 1  # the tie at a half


def test_what_is_no_number_is_black_and_spoils_nothing():
    values = (VALUES / 255).astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    found = np.asarray(read(tiff(values), formats=FORMATS))
    assert not found[0, :3].any()
    assert np.array_equal(found[1:, :, 0], VALUES[1:])
    nothing = read(tiff(np.full((4, 4), np.nan, np.float32)), formats=FORMATS)
    assert not np.asarray(nothing).any()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("RGBA PNG", saved(Image.fromarray(WITH_ALPHA))),
        ("RGBA TIFF", tiff(WITH_ALPHA, photometric=2, extra=(2,))),
        ("16-bit RGBA PNG", png((WITH_ALPHA.astype(np.uint16) * 257).astype(">u2"), depth=16,
                                colour=6)),
        ("16-bit RGBA TIFF", tiff(WITH_ALPHA.astype(np.uint16) * 257, ">", photometric=2,
                                  extra=(2,))),
        ("WebP", saved(Image.fromarray(WITH_ALPHA), "WEBP", lossless=True, exact=True)),
        ("LA PNG", saved(Image.merge("LA", (GREY, ALPHA)))),
        ("16-bit LA PNG", png(np.dstack([WIDE, np.asarray(ALPHA) * np.uint16(257)]).astype(">u2"),
                              depth=16, colour=4)),
        ("LA TIFF", tiff(np.dstack([VALUES, np.asarray(ALPHA)]), extra=(2,))),
    ],
)  # fmt: skip
def test_a_picture_seen_through_stands_on_white(name, data):
    wanted = SEEN_THROUGH if "RGBA" in name or name == "WebP" else GREY_SEEN_THROUGH
    assert off(read(data, formats=FORMATS), wanted) == 0


def test_premultiplied_grey_is_divided_by_its_alpha():
    found = read(tiff(np.dstack([PREMULTIPLIED, np.asarray(ALPHA)]), extra=(1,)), formats=FORMATS)
    # What is multiplied was rounded to a step, what comes of the division to another.
    assert off(found, GREY_SEEN_THROUGH) <= 2


def test_the_background_can_be_another():
    data = saved(Image.fromarray(WITH_ALPHA))
    wanted = Image.composite(SCENE, Image.new("RGB", SCENE.size, (10, 200, 30)), ALPHA)
    assert off(read(data, formats=FORMATS, background=(10, 200, 30)), wanted) == 0


def test_a_palette_shows_its_colours_and_what_it_makes_clear():
    assert off(read(saved(PALETTE), formats=FORMATS), PALETTE) == 0
    assert off(read(saved(PALETTE, "GIF"), formats=FORMATS), PALETTE) == 0
    clear = np.asarray(PALETTE) == 7
    wanted = PALETTE.convert("RGB")
    wanted.paste("white", mask=Image.fromarray(clear))
    for kind in ("PNG", "GIF"):
        found = read(saved(PALETTE, kind, transparency=7), formats=FORMATS)
        assert off(found, wanted) == 0
    half = Image.fromarray(np.where(clear, 128, 255).astype(np.uint8))
    shown = read(saved(PALETTE, transparency=bytes([255] * 7 + [128])), formats=FORMATS)
    on_white = Image.composite(PALETTE.convert("RGB"), Image.new("RGB", SCENE.size, "white"), half)
    assert off(shown, on_white) == 0
    alphas = np.asarray(ALPHA)
    colours = PALETTE.getpalette()
    table = tuple(v * 257 for c in range(3) for v in (colours + [0] * 768)[c:768:3])
    page = tiff(np.dstack([np.asarray(PALETTE), alphas]), photometric=3, extra=(2,), t320=table)
    on_white = Image.composite(PALETTE.convert("RGB"), Image.new("RGB", SCENE.size, "white"), ALPHA)
    assert off(read(page, formats=FORMATS), on_white) == 0


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_grey_that_a_png_makes_clear_is_found_at_every_depth(depth):
    most = 2**depth - 1
    values = np.rint(VALUES * (most / 255)).astype(np.uint16)
    packed = {
        8: lambda: values.astype(np.uint8), 16: lambda: values.astype(">u2"),
    }.get(depth, lambda: np.packbits(
        (values[..., None] >> np.arange(depth - 1, -1, -1) & 1).astype(np.uint8).reshape(100, -1),
        axis=1))()  # fmt: skip
    clear = int(np.bincount(values.ravel()).argmax())
    data = png(packed, depth=depth, colour=0, clear=struct.pack(">H", clear))
    seen = np.rint(values * (255 / most))
    wanted = Image.fromarray(np.where(values == clear, 255, seen).astype(np.uint8))
    assert off(read(data, formats=FORMATS), wanted) == 0


@pytest.mark.parametrize("depth", [8, 16])
def test_the_colour_that_a_png_makes_clear_is_found_at_both_depths(depth):
    values = np.asarray(SCENE).astype(np.uint16) * (257 if depth == 16 else 1)
    clear = values[50, 50]
    packed = values.astype(">u2" if depth == 16 else np.uint8)
    data = png(packed, depth=depth, colour=2, clear=struct.pack(">HHH", *clear))
    wanted = SCENE.copy()
    wanted.paste("white", mask=Image.fromarray((values == clear).all(axis=2)))
    assert off(read(data, formats=FORMATS), wanted) == 0


def test_one_bit_a_pixel():
    one = GREY.convert("1")
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert off(read(saved(one, kind), formats=FORMATS), one) == 0
    faxed = saved(one, "TIFF", compression="group4")
    assert off(read(faxed, formats=FORMATS), one) == 0


def test_cmyk_with_and_without_adobes_inversion():
    cmyk = SCENE.convert("CMYK")  # black is 0 there: exact
    assert off(read(saved(cmyk, "TIFF"), formats=FORMATS), SCENE) == 0
    assert off(read(saved(cmyk, "TIFF", compression="tiff_lzw"), formats=FORMATS), SCENE) == 0
    wide = np.asarray(cmyk).astype(np.uint16) * 257
    assert off(read(tiff(wide, ">", photometric=5), formats=FORMATS), SCENE) == 0
    jpeg = saved(cmyk, "JPEG", quality=100, subsampling=0)
    plain = without_adobe(saved(ImageChops.invert(cmyk), "JPEG", quality=100, subsampling=0))
    # Quality 100: a step of the transform, rounded once when written and once when read.
    assert off(read(jpeg, formats=FORMATS), SCENE) <= 2
    assert off(read(plain, formats=FORMATS), SCENE) <= 2


def test_ycbcr():
    # Pillow cuts the values to whole ones: less than a step of Y and 1.772 of one of Cb.
    assert off(read(saved(SCENE.convert("YCbCr"), "TIFF"), formats=FORMATS), SCENE) <= 3
    jpeg = saved(SCENE, "JPEG")
    assert off(read(jpeg, formats=FORMATS), Image.open(io.BytesIO(jpeg))) == 0
    page = saved(SCENE, "TIFF", compression="jpeg", quality=100)
    assert off(read(page, formats=FORMATS), SCENE) <= 8  # colours of 2 x 2 pixels are one


def test_lab():
    lab = ImageCms.profileToProfile(
        SCENE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    found = np.asarray(read(saved(lab, "TIFF"), formats=FORMATS)).astype(int)
    # L has 2.55 steps a unit, a and b have 1: half of one is up to 3 steps of a dark colour's red.
    away = np.abs(found - np.asarray(SCENE))
    assert away.max() <= 6
    assert away.mean() < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # As a camera held that way writes it.
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = SCENE if back is None else SCENE.transpose(Image.Transpose(back))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0},
               "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})  # fmt: skip
    found = read(saved(stored, kind, exif=exif, **options), formats=FORMATS)
    assert off(found, SCENE) <= (0 if kind in ("PNG", "WEBP", "TIFF") else 4)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_compressed_tiff_of_16_bits_is_turned_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(WIDE).transpose(Image.Transpose(back))
    for compression in (None, "tiff_lzw"):
        data = saved(stored, "TIFF", exif=exif, compression=compression)
        assert off(read(data, formats=FORMATS), GREY) == 0


def test_an_orientation_that_cannot_be_read_leaves_the_picture_as_it_is():
    for exif in (b"Exif\0\0MM\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\x01" * 40):
        jpeg = saved(SCENE, "JPEG", exif=exif)
        assert off(read(jpeg, formats=FORMATS), Image.open(io.BytesIO(jpeg))) == 0
    for value in (0, 9, 65535):
        odd = Image.Exif()
        odd[0x0112] = value
        assert off(read(saved(SCENE, exif=odd), formats=FORMATS), SCENE) == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(kind):
    first = PALETTE.convert("RGB")
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"},
               "MPO": {"quality": 100, "subsampling": 0}}.get(kind, {})  # fmt: skip
    others = [Image.new("RGB", first.size, colour) for colour in ("red", "blue")]
    data = saved(first, kind, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    lossless = kind in ("WEBP", "PNG", "TIFF")
    # A GIF has 256 colours: those of the first frame are 200.
    assert off(read(data, formats=FORMATS), first) <= (0 if lossless or kind == "GIF" else 4)


def icon(*entries):
    """An icon of (what its directory says, bytes)."""
    offset = 6 + 16 * len(entries)
    directory, data = struct.pack("<HHH", 0, 1, len(entries)), b""
    for (width, height), content in entries:
        directory += struct.pack("<BBBBHHLL", width % 256, height % 256, 0, 0, 1, 32,
                                 len(content), offset + len(data))  # fmt: skip
        data += content
    return directory + data


def test_of_an_icon_the_largest_picture_is_read():
    square = SCENE.resize((128, 128))
    small = saved(Image.new("RGB", (16, 16), "red"))
    assert (
        off(read(saved(square, "ICO", sizes=[(16, 16), (128, 128)]), formats=FORMATS), square) == 0
    )
    bitmap = saved(square, "ICO", sizes=[(16, 16), (128, 128)], bitmap_format="bmp")
    assert off(read(bitmap, formats=FORMATS), square) == 0
    large = SCENE.resize((300, 300))
    told_256 = icon(((16, 16), small), ((256, 256), small), ((0, 0), saved(large)))
    assert off(read(told_256, formats=FORMATS), large) == 0
    clear = png(np.asarray(SCENE), depth=8, colour=2, clear=struct.pack(">HHH", 1, 2, 3))
    assert off(read(icon(((150, 100), clear)), formats=FORMATS), SCENE) == 0


def test_a_cut_or_spoiled_picture_is_refused_by_its_format():
    whole = {
        kind: saved(SCENE, kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF")
    }
    for kind, data in whole.items():
        for end in (20, len(data) // 2, len(data) - 200):
            with pytest.raises(PictureError, match=f"(?i)this {kind} "):
                read(data[:end], formats=FORMATS)
    spoiled = bytearray(whole["PNG"])
    spoiled[200:260] = bytes(60)
    with pytest.raises(PictureError, match="this PNG is damaged"):
        read(bytes(spoiled), formats=FORMATS)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "empty file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!doctype html>", "HTML"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (bytes(1000), "file"),
        (tiff(np.zeros((4, 4, 3), np.float32), photometric=2), "TIFF"),
        (tiff(np.zeros((4, 4), np.uint16), ">", photometric=0), "TIFF"),
        (tiff(np.zeros((4, 4), np.float64)), "TIFF"),
    ],
)
def test_what_cannot_be_read_is_named(data, name):
    with pytest.raises(PictureError, match=f"this {name} "):
        read(data, formats=FORMATS)


@pytest.fixture
def bound():
    before = Image.MAX_IMAGE_PIXELS
    pictures.bound_pixels(10_000)
    yield
    Image.MAX_IMAGE_PIXELS = before


def claiming(width, height):
    """A PNG of 8 x 8 that claims another size."""
    data = bytearray(saved(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">LL", width, height)
    data[29:33] = struct.pack(">L", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("RGB", (101, 100))),
        claiming(60_000, 60_000),
        icon(((16, 16), claiming(200, 100))),
        icon(((16, 16), claiming(60_000, 60_000))),
        icon(((16, 16), struct.pack("<LllHHLLllLL", 40, 30_000, 60_000, 1, 32, *[0] * 6))),
        saved(Image.new("RGB", (200, 200)), "GIF", save_all=True,
              append_images=[Image.new("RGB", (200, 200), "red")]),
        saved(Image.new("RGB", (200, 200)), "TIFF"),
        saved(Image.new("RGB", (512, 512)), "ICNS"),
    ],
)  # fmt: skip
def test_the_limit_of_pixels_holds_before_anything_is_decoded(data, bound):
    with pytest.raises(PictureError, match=r"pixels"):
        read(data, formats=FORMATS)


def test_a_picture_of_just_the_limit_is_read(bound):
    assert read(saved(Image.new("RGB", (100, 100))), formats=FORMATS).size == (100, 100)


def test_texts_that_blow_up_are_refused():
    info = PngInfo()
    info.add_text("a", " " * 2 * 2**20, zip=True)
    with pytest.raises(PictureError, match="PNG is damaged or of a kind that cannot be read"):
        read(saved(SCENE, pnginfo=info), formats=FORMATS)


def test_long_work_for_few_bytes_is_refused():
    scans = saved(SCENE, "JPEG", progressive=True)
    scan = scans.rindex(b"\xff\xda")
    with pytest.raises(PictureError, match="at most 100 scans"):
        read(scans[:scan] + scans[scan:-2] * 200 + scans[-2:], formats=FORMATS)
    plain = b"P2 2000 1001 255\n" + b"1 " * 10
    with pytest.raises(PictureError, match="a PPM of this kind must have at most 2000000 pixels"):
        read(plain, formats=FORMATS)
    assert read(b"P2 2 1 255\n0 255\n", formats=FORMATS).getpixel((1, 0)) == (255, 255, 255)


def test_formats_that_are_not_allowed_are_not_read():
    with pytest.raises(PictureError, match="this ICO "):
        read(saved(SCENE.resize((64, 64)), "ICO"), formats=("PNG",))
