"""From a picture to what the vision tower reads: open, resize, crop, normalise, as CLIP's image processor does.

Resizing and cropping happen on the host when a request is added and leave 8-bit pixels; scaling to numbers
happens on the device, for all pictures of a step at once.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastcache.errors import ImageError, ModelFolderError, UnsupportedArchitecture
from fastcache.models.config import read_json
from fastcache.models.vision_config import VisionConfig

Picture = str | Path | bytes | Image.Image
# A file of a few kilobytes can claim to be a picture of gigabytes: nothing larger is decoded, or made by resizing.
MAX_PIXELS = 64 * 2**20
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_picture(given: Picture) -> Image.Image:
    """The picture in RGB, fully decoded. Files are turned upright as their EXIF data says.

    Errors: `ImageError` for a file that is missing, not a picture, broken, or larger than `MAX_PIXELS`.
    """
    if isinstance(given, Image.Image):
        _check_size(given.size, "a picture")
        return given.convert("RGB")
    if not isinstance(given, str | Path | bytes):
        raise ImageError(
            f"a picture is given as {type(given).__name__}; allowed are a path, the bytes of a file, or a PIL image."
        )
    name = f"{len(given)} bytes" if isinstance(given, bytes) else str(given)
    try:
        with Image.open(io.BytesIO(given) if isinstance(given, bytes) else given, formats=FORMATS) as file:
            _check_size(file.size, name)
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"picture {name} does not exist.") from None
    except ImageError:
        raise
    except Exception as error:  # each of Pillow's decoders has its own exceptions for a malformed file
        raise ImageError(
            f"picture {name} cannot be read ({error}). Allowed are whole {', '.join(FORMATS)} files."
        ) from error


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError(
            f"{name} has {width} x {height} pixels; allowed is 1 to {MAX_PIXELS:,} in all. Make it smaller first."
        )


@dataclass(frozen=True)
class PictureProcessor:
    """The steps of CLIP's image processor, with the numbers of a model folder. Sizes are (height, width).

    resize_to: an int is the length of the shorter edge; None leaves the size. rescale, mean and std: a pixel x
    becomes (x * rescale - mean) / std.
    """

    crop: tuple[int, int]
    resize_to: int | tuple[int, int] | None
    center_crop: bool = True
    resample: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def pixels(self, picture: Image.Image) -> Tensor:
        """(3, height, width) uint8 of an RGB picture: resized, cropped. Errors: `ImageError`."""
        if self.resize_to is not None:
            height, width = self._resized(picture.size)
            _check_size((width, height), f"a picture of {picture.size[0]} x {picture.size[1]}, once resized,")
            picture = picture.resize((width, height), resample=self.resample)
        array = np.asarray(picture)
        if self.center_crop:
            array = _center_crop(array, self.crop)
        if array.shape[:2] != self.crop:
            raise ImageError(
                f"a picture has {array.shape[1]} x {array.shape[0]} pixels and this model's preprocessor does not "
                f"change that; the vision tower reads {self.crop[1]} x {self.crop[0]}."
            )
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = size
        if not isinstance(self.resize_to, int):
            return self.resize_to
        shorter, longer = self.resize_to, int(self.resize_to * max(size) / min(size))
        return (longer, shorter) if width <= height else (shorter, longer)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width) uint8 -> float32, on the same device. Rescaled in float64, as the original."""
        mean, std = (pixels.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (self.mean, self.std))
        return ((pixels.double() * self.rescale).float() - mean) / std


def digest(pixels: Tensor) -> bytes:
    """sha256 over what the vision tower will see."""
    return hashlib.sha256(pixels.numpy().tobytes()).digest()


def _center_crop(array: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """array: (height, width, 3). What lies outside the picture is black."""
    for axis, size in enumerate(crop):
        missing = max(size - array.shape[axis], 0)
        if missing:
            border = [(0, 0)] * array.ndim
            border[axis] = (ceil(missing / 2), missing // 2)
            array = np.pad(array, border)
    top, left = ((array.shape[axis] - size) // 2 for axis, size in enumerate(crop))
    return array[top : top + crop[0], left : left + crop[1]]


def load_processor(model: str, vision: VisionConfig) -> PictureProcessor:
    """What the model folder's preprocessor config says; CLIP's own numbers for dummy weights without a folder.

    Errors: `ModelFolderError` where it does not fit the tower, `UnsupportedArchitecture` for another processor.
    """
    folder, square = Path(model), (vision.image_size, vision.image_size)
    if (path := folder / "preprocessor_config.json").is_file():
        raw = read_json(path)
    elif (path := folder / "processor_config.json").is_file() and "image_processor" in read_json(path):
        raw = read_json(path)["image_processor"]
    else:
        return PictureProcessor(square, vision.image_size)
    kind = raw.get("image_processor_type", "CLIPImageProcessor")
    if not kind.startswith("CLIPImageProcessor") or raw.get("do_pad", False):
        raise UnsupportedArchitecture(
            f"{path}: image processor {kind} with do_pad {raw.get('do_pad', False)} is not implemented. "
            "Supported: CLIPImageProcessor without padding."
        )
    try:
        processor = _from_hf(raw, square)
    except KeyError as error:
        raise ModelFolderError(f"{path}: `size` or `crop_size` has no {error.args[0]!r}.") from None
    if processor.crop != square:
        raise ModelFolderError(
            f"{path}: pictures become {processor.crop[1]} x {processor.crop[0]} pixels, config.json's vision tower "
            f"reads {square[1]} x {square[0]}."
        )
    return processor


def _from_hf(raw: Mapping[str, Any], default: tuple[int, int]) -> PictureProcessor:
    """From a `preprocessor_config.json`; sizes are an int or an object there."""
    resize, crop = raw.get("size", {"shortest_edge": 224}), raw.get("crop_size", 224)
    if isinstance(resize, Mapping):
        resize = resize.get("shortest_edge") or (resize["height"], resize["width"])
    crop = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
    center_crop, normalise = raw.get("do_center_crop", True), raw.get("do_normalize", True)
    return PictureProcessor(
        crop=crop if center_crop else default,
        resize_to=resize if raw.get("do_resize", True) else None,
        center_crop=center_crop,
        resample=raw.get("resample", Image.Resampling.BICUBIC),
        rescale=raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0,
        mean=tuple(raw.get("image_mean") or CLIP_MEAN) if normalise else (0.0,) * 3,
        std=tuple(raw.get("image_std") or CLIP_STD) if normalise else (1.0,) * 3,
    )
