"""JPEG, PNG and WebP to pixels, strip by strip, so that no picture is held more often than once."""

import io
import re

import numpy as np
from PIL import Image, ImageOps

from datamodules.media.limits import DecodeLimits, check_format, check_pixels, require

IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # those that a length follows, and the end
MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each passes over all pixels
STRIP_PIXELS = 2**20  # of a picture that are converted at a time


def decode_image(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """JPEG, PNG or WebP to uint8 (H, W, 3), upright as EXIF says; transparency is laid on white, 16 bits are cut to 8."""
    check_format("image", format, IMAGE_FORMATS)
    with Image.open(io.BytesIO(data), formats=tuple(set(IMAGE_FORMATS.values()))) as image:
        check_pixels(image.width, image.height, limits)
        if image.format == "JPEG":
            scans = _num_scans(data)
            require(scans <= MAX_SCANS, f"this JPEG has {scans} scans; allowed: at most {MAX_SCANS}", "too many scans")
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
        rows = max(1, STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):  # each whole copy of a picture would take four bytes a pixel
            pixels[top : top + rows] = _rgb(image.crop((0, top, image.width, min(top + rows, image.height))))
        return pixels


def _num_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end marker."""
    position, scans = 2, 0
    while (found := JPEG_MARKER.search(data, position)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return scans


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))
