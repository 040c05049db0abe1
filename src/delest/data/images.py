"""Pictures as a source: a folder a class, or Parquet with encoded bytes; decoded once, packed, read by `pread`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from delest import errors, storage
from delest.data import fingerprints
from delest.data.encoded import Encoded
from delest.data.packing import has_room
from delest.data.splitting import choose_rows
from delest.data.stored import Memory, PackedFile, Store, StoredSource
from delest.data.targets import Wishes, refuse
from delest.records.source import Column, Schema, Target

if TYPE_CHECKING:
    from numpy import int64, uint8
    from numpy.typing import NDArray

LARGEST_DEFAULT_SIDE = 224
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_TURNS = {  # EXIF orientation: what brings the picture upright (Exif 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes | Path, channels: int) -> Image.Image:
    """A picture from its file's bytes or path, upright, as grey (1 channel) or RGB (3).

    Transparency is dropped and 16 bits a channel become 8. Raises `OSError`, `ValueError` or `SyntaxError` (Pillow's)
    where it cannot be read whole.
    """
    with _opened(data) as image:
        return _upright(image, channels)


def fit(image: Image.Image, side: int | None) -> NDArray[uint8]:
    """A picture [side, side, C] uint8: its shorter side resized to `side`, then the centre cropped; None keeps the size.

    Bilinear with antialiasing, as `Image.resize(BILINEAR)` does. The longer side becomes floor(long * side / short + 1/2)
    and floor((long - side) / 2) pixels are cut before the square: the exported graph does the same.
    """
    if image.mode not in ("L", "RGB"):
        image = _in_mode(image, "L" if _is_grey(image) else "RGB")
    if side is not None and image.size != (side, side):
        short = min(image.size)
        width, height = ((2 * length * side + short) // (2 * short) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fit_pixels(pixels: NDArray[uint8], side: int) -> NDArray[uint8]:
    """`fit` for pictures [B, H, W, C] with 1, 3 or 4 channels: [B, side, side, C]."""
    channels = pixels.shape[-1]
    if channels == 3:
        return np.array([fit(Image.fromarray(rows), side) for rows in pixels], np.uint8).reshape(-1, side, side, 3)
    planes = [[fit(Image.fromarray(rows[..., c]), side)[..., 0] for c in range(channels)] for rows in pixels]
    return np.moveaxis(np.array(planes, np.uint8).reshape(-1, channels, side, side), 1, -1)


def open_images(
    encoded: Encoded, codes: NDArray[int64], target: Target, roles: NDArray | None, wishes: Wishes, left_out: Sequence[str] = ()
) -> StoredSource:
    """A source of encoded pictures with their classes: sampled, checked, decoded and packed where there is room.

    Raises `BadInput` naming each picture that cannot be read, unless `wishes.skip_bad` leaves them out.
    """
    index = np.arange(len(codes)) if wishes.rows is None else choose_rows(codes, roles, wishes.rows, wishes.seed)
    fingerprint = fingerprints.of_text(encoded.fingerprint, *([] if len(index) == len(codes) else [index.tobytes()]))
    pixels, plan, bad = _packed_before(fingerprint, wishes, len(index)) or _pack(encoded, index, fingerprint, wishes)
    if bad and not wishes.skip_bad:
        _refuse_bad(encoded, index, bad)
    kept = np.setdiff1d(np.arange(len(index)), np.array(sorted(bad), np.int64))
    rows = index[kept]
    shape = "x".join(map(str, plan.shape))
    return StoredSource(
        fingerprint=fingerprints.of_text(fingerprint, kept.tobytes()) if bad else fingerprint,
        schema=Schema(inputs=(Column(name="image", kind="image", shape=plan.shape, dtype="uint8"),), target=target),
        stores={"image": pixels, target.name: Memory(codes[rows])},
        description=f"{len(rows):,} images of {shape} in {encoded.where}",
        left_out=(*left_out, *(f"{encoded.name(int(index[place]))}: {reason}" for place, reason in sorted(bad.items()))),
        image_size=plan.side,
        given_roles=None if roles is None else roles[rows],
        extra={name: values[rows] for name, values in encoded.extra.items()},
    )


class Decoding:
    """Pictures that are decoded each time they are read, on a few threads: for those too large to pack."""

    decodes = True

    def __init__(self, encoded: Encoded, index: NDArray[int64], plan: _Plan):
        self._encoded, self._index, self._plan = encoded, index, plan
        self.shape: tuple[int, ...] = plan.shape
        self.dtype = np.dtype(np.uint8)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __len__(self) -> int:
        return len(self._index)

    def take(self, index: NDArray[int64]) -> NDArray:
        out = np.empty((len(index), *self.shape), np.uint8)

        def place(work: tuple[int, int]) -> None:
            position, row = work
            try:
                out[position] = self._plan.pixels(self._encoded.load(row))
            except _UNREADABLE as error:
                raise errors.BadInput(
                    f"{self._encoded.name(row)} cannot be read ({error}). Replace or remove it, or leave out such files with --skip-bad."
                ) from None

        for _ in self._threads().map(place, enumerate(self._index[index].tolist())):
            pass
        return out

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
        return self._pool[1]


@dataclass(frozen=True)
class _Plan:
    """How a picture becomes pixels: [H, W, C] and the side that it is fitted to (None: stored so)."""

    shape: tuple[int, int, int]
    side: int | None

    def pixels(self, data: bytes | Path, like: tuple[int, int, bool] | None = None) -> NDArray[uint8]:
        """Decoded and fitted; raises `_NotAlike` where the header differs from `like` in a way that changes the plan."""
        with _opened(data) as image:
            header = _header(image)
            if like is not None and (header[2] != like[2] or (self.side is None and header != like)):
                raise _NotAlike
            pixels = fit(_upright(image, self.shape[2]), self.side)
        if pixels.shape != self.shape:
            raise ValueError(f"it has changed: {pixels.shape} now, {self.shape} when it was looked at")
        return pixels


class _NotAlike(Exception):
    """A picture differs from the first."""


# What Pillow raises for damaged files; the bomb error guards against headers that claim absurd sizes.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError)
_Found = tuple[Store, _Plan, dict[int, str]]


def _is_grey(image: Image.Image) -> bool:
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def _orientation(image: Image.Image) -> int:
    if image.format not in ("JPEG", "MPO") or "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata are no damaged picture
        return 1


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16"):  # Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


@contextlib.contextmanager
def _opened(data: bytes | Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata; what matters raises
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            yield image


def _upright(image: Image.Image, channels: int) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    return _in_mode(image if turn is None else image.transpose(turn), "L" if channels == 1 else "RGB")


def _header(image: Image.Image) -> tuple[int, int, bool]:
    """Width, height (upright) and whether it is grey, without decoding."""
    width, height = image.size if _orientation(image) < 5 else image.size[::-1]
    return width, height, _is_grey(image)


def _look(data: bytes | Path) -> tuple[int, int, bool]:
    with _opened(data) as image:
        return _header(image)


def _plan_for(looks: NDArray[int64], side: int | None) -> _Plan:
    """Shape and side from the headers [N, 3] of all readable pictures."""
    channels = 1 if looks[:, 2].all() else 3
    if side is None and (looks[:, :2] == looks[0, :2]).all():
        return _Plan((int(looks[0, 1]), int(looks[0, 0]), channels), None)
    if side is None:
        side = min(LARGEST_DEFAULT_SIDE, int(np.median(looks[:, :2].min(1))))
    return _Plan((side, side, channels), side)


def _pack(encoded: Encoded, index: NDArray[int64], fingerprint: str, wishes: Wishes) -> _Found:
    """Decode all pictures into one file of the cache, where there is room for it."""
    first = next((look for _, look in _readable(encoded, index, {}, _look)), None)
    if first is not None:
        # Most often all are alike: then a single pass decodes them, and only a difference makes a look at all worthwhile.
        plan = _plan_for(np.array([first]), wishes.image_size)
        if has_room(int(np.prod(plan.shape)) * len(index)):
            with contextlib.suppress(_NotAlike):
                return _write_pack(encoded, index, fingerprint, wishes, plan, {}, lambda data: plan.pixels(data, first))
    bad: dict[int, str] = {}
    looks = np.array([look for _, look in _readable(encoded, index, bad, _look)], np.int64).reshape(-1, 3)
    if not len(looks):
        _refuse_bad(encoded, index, bad)
    plan = _plan_for(looks, wishes.image_size)
    if has_room(int(np.prod(plan.shape)) * len(looks)):
        return _write_pack(encoded, index, fingerprint, wishes, plan, bad, plan.pixels)
    if wishes.skip_bad:  # what cannot be read must be known before rows are numbered
        for _ in _readable(encoded, index, bad, plan.pixels):
            pass
    return Decoding(encoded.at_random(), np.delete(index, sorted(bad)), plan), plan, bad


def _write_pack(
    encoded: Encoded,
    index: NDArray[int64],
    fingerprint: str,
    wishes: Wishes,
    plan: _Plan,
    bad: dict[int, str],
    read: Callable[[bytes | Path], NDArray[uint8]],
) -> _Found:
    path = _pack_path(fingerprint, wishes)
    with storage.written_atomically(path) as file:
        for _, pixels in _readable(encoded, index, bad, read):
            file.write(pixels.tobytes())
        if (bad and not wishes.skip_bad) or len(bad) == len(index):
            _refuse_bad(encoded, index, bad)
    storage.write_json(path.with_suffix(".json"), {"shape": plan.shape, "side": plan.side, "bad": bad})
    return PackedFile(path, plan.shape, np.uint8, len(index) - len(bad)), plan, bad


def _readable(
    encoded: Encoded, index: NDArray[int64], bad: dict[int, str], read: Callable[[bytes | Path], Any]
) -> Iterator[tuple[int, Any]]:
    """Place and `read(picture)` of each picture that is not known as bad; those that fail become so."""
    for place, data in enumerate(encoded.stream(index)):
        if place in bad:
            continue
        try:
            found = read(data)
        except _UNREADABLE as error:
            bad[place] = _unreadable(error)
            continue
        yield place, found


def _unreadable(error: Exception) -> str:
    text = str(error)
    if "cannot identify image file" in text:
        return "it is no picture that can be read, or its beginning is damaged"
    return f"it is damaged or cut off ({text})"


def _pack_path(fingerprint: str, wishes: Wishes) -> Path:
    key = fingerprints.of_text(fingerprint, str(wishes.image_size))
    return storage.cache_folder("packed") / f"{key}.bin"


def _packed_before(fingerprint: str, wishes: Wishes, rows: int) -> _Found | None:
    """The pack of an earlier opening, if it is whole."""
    try:
        path = _pack_path(fingerprint, wishes)
        meta = json.loads(path.with_suffix(".json").read_text())
        size = path.stat().st_size
    except (OSError, json.JSONDecodeError):
        return None
    plan = _Plan((meta["shape"][0], meta["shape"][1], meta["shape"][2]), meta["side"])
    bad = {int(place): reason for place, reason in meta["bad"].items()}
    if size != int(np.prod(plan.shape)) * (rows - len(bad)):
        return None
    return PackedFile(path, plan.shape, np.uint8, rows - len(bad)), plan, bad


def _refuse_bad(encoded: Encoded, index: NDArray[int64], bad: dict[int, str]) -> None:
    advice = "Replace or remove it, or leave out such files with --skip-bad."
    refuse([f"{encoded.name(int(index[place]))}: {reason}. {advice}" for place, reason in sorted(bad.items())])
