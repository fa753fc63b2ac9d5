"""Image files <-> frames: uint8 tensors (3, H, W), RGB.

Frames come back as a permuted (H, W, 3) array, so that the channels lie innermost in memory: crops
are cut several times faster from that layout. EXIF orientation is ignored, as boxes are drawn on
the stored pixels.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trackkit.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
REDUCTIONS = (1, 2, 4, 8)
MAX_PIXELS = 89_478_485  # of a frame; from here on Pillow warns of a decompression bomb

# once, not around each frame: that would make Python forget which warnings it has shown
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(
    path: str | os.PathLike, reduce: int = 1, part: tuple[int, int, int, int] | None = None
) -> Tensor:
    """Read an image file as uint8 (3, H, W), RGB; with `reduce` 2, 4 or 8 as ceil(H / reduce) x
    ceil(W / reduce).

    A JPEG is decoded at the reduced size (libjpeg's scaled DCT), which takes a fraction of the
    time; other formats are averaged over blocks. Grey, palette and CMYK images become RGB, an alpha
    channel is dropped, 16-bit images keep their upper 8 bits. Of a frame that is needed in `part`
    only, (left, top, right, bottom) in pixels of the reduced size, no other pixel is copied.

    Raises DataError, with the file and what to do, when it is missing, empty, cut short, no image,
    or has more than `MAX_PIXELS`.
    """
    if reduce not in REDUCTIONS:
        raise DataError(f"a frame can be reduced by 1, 2, 4 or 8, not by {reduce!r}")
    try:
        with _opened(path) as image:
            reduced = _reduced(image, reduce)
            return _to_frame(reduced.crop(part) if part else reduced)
    except Exception as error:  # Pillow's decoders fail in many ways on damaged bytes
        raise _unreadable(path, error) from error


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height of an image file, from its header only. Raises DataError as `read_image`
    does.
    """
    try:
        with _opened(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def _opened(path: str | os.PathLike) -> Image.Image:
    image = Image.open(path)
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
