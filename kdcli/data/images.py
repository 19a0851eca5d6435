"""One image file to RGB, whatever its mode, with a documented answer for each.

| mode | becomes |
|---|---|
| RGB | itself (16 bits per channel: the high byte, as the decoder gives it) |
| 1, L, P | grey or palette colours |
| LA, La, PA, RGBA, RGBa, or a transparent colour | composited on black, the colour the crops are padded with |
| I;16 (any byte order), I within 0..65535 | v/257 rounded: the 16-bit range maps onto 0..255, nothing is clipped |
| F within 0..1 | 255*v rounded |
| CMYK, YCbCr, HSV | converted |
| anything else, I and F outside their range | refused |

The EXIF orientation (1..8) is applied. Files above 64 megapixels, and those more than 100 times as long as
wide, are refused by their header, before decoding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image

from kdcli.errors import InputError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
MAX_PIXELS = 64 * 1024 * 1024
# Of the sides: with the shorter one brought to a network's size, two long rows of pixels would fill the memory.
MAX_RATIO = 100

# Only these decoders are tried: a file's name must not be able to start one of Pillow's stranger ones.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns between 89 and 179 megapixels; those are refused here with a sentence of our own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# "Corrupt EXIF data": see `_upright`.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")


def threads() -> int:
    """Threads that decode: Pillow releases the interpreter lock, so all cores help; more than 16 no longer do."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The file as an upright 8-bit RGB image, see the table above.

    Raises:
        InputError: missing, damaged, truncated, not an image, of a refused mode, or too large.
    """
    with _reporting(path), _open(path) as image:
        image.load()
        return _upright(_to_rgb(image), image)


def check_image(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless the file looks whole, without decoding it where the format allows that.

    A PNG is read through and its checksums compared; a JPEG must end in its end marker, else it is decoded to see. The
    other formats have neither and are decoded.
    """
    with _reporting(path):
        with _open(path) as image:
            kind, mode = image.format, image.mode
            if kind in ("PNG", "JPEG", "MPO"):
                image.verify()
        whole = kind == "PNG" or (kind in ("JPEG", "MPO") and _ends_as_jpeg(path))
        if not whole or mode in ("I", "F", "LAB"):
            read_image(path)


def check_images(paths: list[str]) -> None:
    """Check every file, in threads, and name all the bad ones at once.

    Raises:
        InputError: with the count and the first 20 names.
    """

    def check(piece: list[str]) -> list[str]:
        bad = []
        for path in piece:
            try:
                check_image(path)
            except InputError as error:
                bad.append(error.message)
        return bad

    # In pieces, because a future per image would cost more memory than the list of a million paths itself.
    pieces = [paths[at : at + 256] for at in range(0, len(paths), 256)]
    with ThreadPoolExecutor(threads()) as pool:
        refuse([message for bad in pool.map(check, pieces) for message in bad], len(paths))


def refuse(bad: list[str], total: int) -> None:
    """Raise InputError listing what is wrong with the bad files, if there are any."""
    if bad:
        shown = "; ".join(bad[:20]) + ("; …" if len(bad) > 20 else "")
        raise InputError(f"{len(bad)} of {total} images are unusable: {shown}", hint="repair or remove them")


@contextmanager
def _reporting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a decoder throws becomes an InputError: damaged files raise almost anything."""
    name = os.fspath(path)
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{name} cannot be read: {error.strerror}") from error
        raise InputError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from error


def _too_large(path: str | os.PathLike[str]) -> InputError:
    return InputError(f"{os.fspath(path)} has more than {MAX_PIXELS >> 20} megapixels")


def _open(path: str | os.PathLike[str]) -> Image.Image:
    image = Image.open(path, formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(path)
    shorter, longer = sorted(image.size)
    if longer > MAX_RATIO * shorter:
        image.close()
        raise InputError(
            f"{os.fspath(path)} is more than {MAX_RATIO} times as long as wide ({longer} by {shorter} pixels)"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_to_bytes(image)).convert("RGB")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        straight = image.convert("LA") if mode == "La" else image
        colours = straight.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), colours).convert("RGB")
    if mode == "P" and image.palette is not None and image.palette.mode != "RGB":
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), colours).convert("RGB")
    if mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB")
    raise ValueError(f"mode {mode} is not supported")


def _to_bytes(image: Image.Image) -> np.ndarray:
    """Grey levels of more than 8 bits as uint8 [H,W]. `convert("RGB")` would clip them at 255 instead."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point pixels outside 0..1")
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels outside 0..65535")
    return ((values + 128) // 257).astype(np.uint8)


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """`rgb` turned as the EXIF block of `source` asks. A damaged block is no block: the pixels are still good.

    Read after decoding, because Pillow turns TIFF files itself and then drops the tag.
    """
    try:
        orientation = source.getexif().get(_ORIENTATION, 1)
    except Exception:
        orientation = 1
    turn = _TRANSPOSE.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _ends_as_jpeg(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(-min(64, file.tell()), os.SEEK_END)
        return b"\xff\xd9" in file.read()
