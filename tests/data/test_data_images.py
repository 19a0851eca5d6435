"""Any mode to RGB, orientation, and files that must be refused."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kdcli.data.images import MAX_PIXELS, _to_rgb, check_image, check_images, read_image
from kdcli.errors import InputError

GREY = np.array([[0, 64, 128, 255]], dtype=np.uint8)


def saved(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    check_image(path)
    return np.asarray(image).astype(int)


def test_bilevel(tmp_path):
    image = Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)
    assert set(np.unique(pixels(saved(tmp_path, image)))) == {0, 255}


def test_grey_and_rgb_are_kept(tmp_path):
    assert (pixels(saved(tmp_path, Image.fromarray(GREY))) == GREY[..., None]).all()
    colour = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert (pixels(saved(tmp_path, Image.fromarray(colour))) == colour).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_composited_on_black(tmp_path, mode):
    image = Image.fromarray(np.full((1, 4), 200, np.uint8)).convert(mode)
    image.putalpha(Image.fromarray(GREY))
    assert np.abs(pixels(saved(tmp_path, image))[0, :, 0] - 200 * GREY[0].astype(int) / 255).max() <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_rare_alpha_modes_in_memory(mode):
    """Modes that no file of ours is saved in, so the conversion is asked directly."""
    alpha = [0, 255, 255, 0]
    if mode == "PA":
        image = Image.new("PA", (4, 1))
        image.putpalette([200, 100, 50])
        for x, opacity in enumerate(alpha):
            image.putpixel((x, 0), (0, opacity))
    else:
        image = Image.fromarray(np.full((1, 4), 200, np.uint8)).convert("LA" if mode == "La" else "RGBA")
        image.putalpha(Image.fromarray(np.array([alpha], np.uint8)))
        image = image.convert(mode)
    out = np.asarray(_to_rgb(image)).astype(int)
    assert np.abs(out[0, :, 0] - [0, 200, 200, 0]).max() <= 1


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert pixels(saved(tmp_path, image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(saved(tmp_path, image, "t.png", transparency=1)).tolist() == [[[10, 20, 30], [0, 0, 0]]]


def test_transparent_colour_of_an_rgb_png(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert pixels(saved(tmp_path, image, transparency=(9, 9, 9))).tolist() == [[[1, 2, 3], [0, 0, 0]]]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    out = pixels(saved(tmp_path, Image.fromarray(ramp), name))[..., 0]
    assert len(np.unique(out)) == 256
    assert np.abs(out - ramp / 257).max() <= 0.5


def test_integer_and_float_pixels(tmp_path):
    whole = Image.fromarray(np.array([[0, 257, 65535]], np.int32))
    assert pixels(saved(tmp_path, whole, "i.tif"))[0, :, 0].tolist() == [0, 1, 255]
    part = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert pixels(saved(tmp_path, part, "f.tif"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [70000, -1])
def test_integers_outside_the_range_are_refused(tmp_path, value):
    path = saved(tmp_path, Image.fromarray(np.array([[0, value]], np.int32)), "i.tif")
    with pytest.raises(InputError, match=r"outside 0\.\.65535"):
        read_image(path)


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_floats_outside_the_range_are_refused(tmp_path, value):
    path = saved(tmp_path, Image.fromarray(np.array([[0, value]], np.float32)), "f.tif")
    for use in (read_image, check_image):
        with pytest.raises(InputError, match=r"outside 0\.\.1"):
            use(path)


def test_cmyk_and_ycbcr(tmp_path):
    red = Image.new("RGB", (16, 16), (220, 30, 40))
    cmyk = pixels(saved(tmp_path, red.convert("CMYK"), "c.jpg", quality=95))
    ycbcr = pixels(saved(tmp_path, red.convert("YCbCr"), "y.tif"))
    for out in (cmyk, ycbcr):
        assert np.abs(out - [220, 30, 40]).max() <= 6


def test_lab_is_refused(tmp_path):
    path = saved(tmp_path, Image.new("LAB", (4, 4)), "l.tif")
    for use in (read_image, check_image):
        with pytest.raises(InputError, match="LAB"):
            use(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jpg"])
def test_exif_orientation(tmp_path, orientation, name):
    """Whatever the stored orientation, the upright picture is the same: dark on top, red at the left."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[8:] = 180
    upright[:, :8, 0] = 255
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(upright)
    stored = image.transpose(undo[orientation]) if orientation in undo else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if name.endswith("jpg") else {}
    out = pixels(saved(tmp_path, stored, name, exif=exif, **options))
    assert out.shape == upright.shape
    assert np.abs(out - upright).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4, 4)), "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(path).size == (4, 4)


def bomb(width: int, height: int) -> bytes:
    """A PNG that only claims its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 12000, 30000])
def test_bombs_are_refused_by_their_header(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    assert side * side > MAX_PIXELS
    for use in (read_image, check_image):
        with pytest.raises(InputError, match="more than 64 megapixels"):
            use(path)


def test_very_long_images_are_refused_by_their_header(tmp_path):
    """Their shorter side brought to a network's size, they would take any amount of memory."""
    path = tmp_path / "long.png"
    for width, height in ((100_000, 2), (101, 1), (3, 301)):
        path.write_bytes(bomb(width, height))
        for use in (read_image, check_image):
            with pytest.raises(InputError, match="more than 100 times as long as wide"):
                use(path)
    saved(tmp_path, Image.new("L", (3, 300)), "strip.png")
    check_image(tmp_path / "strip.png")
    assert read_image(tmp_path / "strip.png").size == (3, 300)


def test_damaged_files_are_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    bad = []
    for name in ("x.jpg", "x.png", "x.bmp", "x.tif", "x.webp", "x.ppm"):
        whole = saved(tmp_path, noise, name).read_bytes()
        check_image(tmp_path / name)
        bad.append(tmp_path / f"cut-{name}")
        bad[-1].write_bytes(whole[: len(whole) // 2])
    for name, content in (
        ("empty.jpg", b""),
        ("page.png", b"<html></html>"),
        ("eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    ):
        bad.append(tmp_path / name)
        bad[-1].write_bytes(content)
    bad.append(tmp_path / "absent.png")
    for path in bad:
        for use in (read_image, check_image):
            with pytest.raises(InputError, match=path.name):
                use(path)


def test_all_bad_files_are_listed_at_once(tmp_path):
    good = saved(tmp_path, Image.new("RGB", (4, 4)))
    paths = [os.fspath(good)] * 300
    for i in range(25):
        path = tmp_path / f"bad{i:02d}.png"
        path.write_bytes(b"no")
        paths.insert(i * 10, os.fspath(path))
    with pytest.raises(InputError) as caught:
        check_images(paths)
    message = caught.value.message
    assert message.startswith("25 of 325 images")
    assert "bad00.png" in message
    assert "bad19.png" in message
    assert "bad20.png" not in message
