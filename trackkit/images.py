"""Image files <-> frames: uint8 tensors (3, H, W), RGB.

Frames come back as a permuted (H, W, 3) array, so that the channels lie innermost in memory: crops
are cut several times faster from that layout. EXIF orientation is ignored, as boxes are drawn on
the stored pixels.

Baseline JPEGs, which is what data sets have, are decoded by libjpeg-turbo itself (simplejpeg):
half the time of Pillow, which has the same decoder but hands rows on one by one as four bytes a
pixel. All else is Pillow's, damaged files included; where both can read a file they give the same
pixels.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trackkit.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
REDUCTIONS = (1, 2, 4, 8)
MAX_PIXELS = 89_478_485  # of a frame; from here on Pillow warns of a decompression bomb

# once, not around each frame: that would make Python forget which warnings it has shown
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Picture:
    """An image file that is opened once: its size at once, pixels when asked for.

    Raises DataError, with the file and what to do, when it is missing, empty, no image, or has more
    than `MAX_PIXELS`; `pixels` also when it is cut short or damaged.

    Attributes:
        size: width and height in pixels.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        try:
            with open(path, "rb", buffering=0) as file:
                self._bytes = file.read()
            self._baseline = _baseline(self._bytes)
            if self._baseline:
                self.size = self._baseline.width, self._baseline.height
            else:
                with _opened(self._bytes) as image:
                    self.size = image.size
        except Exception as error:  # Pillow's decoders fail in many ways on damaged bytes
            raise _unreadable(path, error) from error

    def pixels(self, reduce: int = 1, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """uint8 (3, H, W), see `read_image`."""
        try:
            whole = self._baseline and _decode(self._bytes, self._baseline, reduce, part)
            if whole is not None:
                left, top, right, bottom = part or (0, 0, whole.shape[1], whole.shape[0])
                return torch.from_numpy(whole[top:bottom, left:right]).permute(2, 0, 1)
            with _opened(self._bytes) as image:
                reduced = _reduced(image, reduce)
                return _to_frame(reduced.crop(part) if part else reduced)
        except Exception as error:
            raise _unreadable(self.path, error) from error


def read_image(
    path: str | os.PathLike, reduce: int = 1, part: tuple[int, int, int, int] | None = None
) -> Tensor:
    """Read an image file as uint8 (3, H, W), RGB; with `reduce` 2, 4 or 8 as ceil(H / reduce) x
    ceil(W / reduce).

    A JPEG is decoded at the reduced size (libjpeg's scaled DCT), which takes a fraction of the
    time; other formats are averaged over blocks. Grey, palette and CMYK images become RGB, an alpha
    channel is dropped, 16-bit images keep their upper 8 bits. Of a frame that is needed in `part`
    only, (left, top, right, bottom) in pixels of the reduced size, inside the frame, a baseline
    JPEG is decoded down to `bottom` and no farther.

    Raises DataError as `Picture` does.
    """
    if reduce not in REDUCTIONS:
        raise DataError(f"a frame can be reduced by 1, 2, 4 or 8, not by {reduce!r}")
    return Picture(path).pixels(reduce, part)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height of an image file, from its header only. Raises DataError as `Picture`
    does.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            head = _baseline(file.read(1 << 12), whole=False)
        if head:
            return head.width, head.height
        with _opened(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


class _Baseline(NamedTuple):
    """What the frame header of a baseline JPEG says: where it lies, the size of the frame, and how
    many rows of pixels are coded together.
    """

    at: int
    width: int
    height: int
    rows: int


def _baseline(data: bytes, whole: bool = True) -> _Baseline | None:
    """The frame header of a baseline JPEG, grey or of three colours; None for anything else. With
    `whole` also None for a file without its end, for Pillow to judge.
    """
    if data[:2] != b"\xff\xd8" or (whole and data[-2:] != b"\xff\xd9"):
        return None
    at = 2
    while len(data) >= at + 20 and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in (0xC0, 0xC1):
            bits, components = data[at + 4], data[at + 9]
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            if bits != 8 or components not in (1, 3) or min(width, height) < 16:
                return None
            if width * height > MAX_PIXELS or length != 8 + 3 * components:
                return None
            sampled = max(data[at + 11 + 3 * i] & 15 for i in range(components))
            return _Baseline(at, width, height, 8 * sampled)
        if not 0xC4 <= kind <= 0xFE or kind in (*range(0xC5, 0xDB), 0xDE, 0xDF) or length < 2:
            return None
        at += 2 + length
    return None


def _decode(
    data: bytes, header: _Baseline, reduce: int, part: tuple[int, int, int, int] | None
) -> np.ndarray | None:
    """Pixels (h, W, 3) of a baseline JPEG, down to the bottom of `part`; None where the bytes are
    damaged beyond libjpeg's repair.
    """
    height = header.height
    if part:
        # a lower frame in the header ends the decoder early; one coded row more than needed, as the
        # colours of the last row of pixels blend with the next
        height = min(height, (part[3] * reduce // header.rows + 1) * header.rows)
        data = b"".join((data[: header.at + 5], height.to_bytes(2, "big"), data[header.at + 7 :]))
    wanted = -(-height // reduce), -(-header.width // reduce)
    try:
        # not strict: what libjpeg only warns of, Pillow accepts too
        pixels = simplejpeg.decode_jpeg(
            data, min_height=wanted[0], min_width=wanted[1], strict=False
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (*wanted, 3) else None


def _opened(source: str | os.PathLike | bytes) -> Image.Image:
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels; make it smaller")
    return image


def encode_jpeg(frame: Tensor, quality: int = 90) -> bytes:
    """A uint8 frame (3, H, W) as JPEG bytes: 4:2:0, default DCT, no metadata, the same bytes every
    time.

    Raises DataError for another shape or type.
    """
    if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != 3:
        raise DataError(
            f"a frame must be uint8 of shape (3, H, W), got {frame.dtype} {tuple(frame.shape)}"
        )
    buffer = io.BytesIO()
    pixels = np.ascontiguousarray(frame.cpu().permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _reduced(image: Image.Image, reduce: int) -> Image.Image:
    width, height = image.size
    # rounding down makes draft() pick the scale 1/reduce itself
    if image.format == "JPEG" and reduce > 1:
        image.draft("RGB", (max(width // reduce, 1), max(height // reduce, 1)))
    done = next(
        r for r in REDUCTIONS if -(-width // r) <= image.width and -(-height // r) <= image.height
    )
    if image.mode.startswith("I"):
        image = _upper_bits(image)
    elif image.mode not in ("L", "RGB", "CMYK", "F"):
        # palette numbers must not be averaged, nor colours weighted by the alpha that is dropped
        image.info.pop("transparency", None)  # of a palette; Pillow would advise to keep it
        image = image.convert("RGB")
    return image if done == reduce else image.reduce(reduce // done)


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale to 8 bits; Pillow's own conversion clips at 255."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise OSError("it has integers outside 0..65535; save it with 8 or 16 bits a channel")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _to_frame(image: Image.Image) -> Tensor:
    if image.mode == "F":
        raise OSError(
            "floating-point pixels have no fixed range; save it with 8 or 16 bits a channel"
        )
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unreadable(path: str | os.PathLike, error: Exception) -> DataError:
    path = Path(path)
    if not os.path.exists(path):
        missing = "such file" if os.path.isdir(path.parent) else f"folder {path.parent}"
        state = f"there is no {missing}"
    elif path.is_file() and path.stat().st_size == 0:
        state = "the file is empty"
    elif isinstance(error, UnidentifiedImageError):
        state = "it is not an image in a known format"
    else:
        state = str(error) or type(error).__name__
    return DataError(f"cannot read frame {path}: {state}. Extract or download this sequence again")
