"""Text as a source: a UTF-8 file, encoded once into tokens and read as windows of them that do not overlap."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from delest import errors, storage
from delest.data import fingerprints
from delest.data.packing import has_room
from delest.data.stored import Memory, PackedFile, Store, StoredSource, Viewed
from delest.data.targets import Wishes, refuse
from delest.records.source import Column, Schema, Target

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 128
_PIECE = 1 << 20  # characters that are decoded at a time
_CODE_POINTS = 0x110000


def open_text(path: Path, wishes: Wishes) -> StoredSource:
    """Windows of T tokens (`wishes.context`), each with the tokens that come one later: `tokens` and `next`, int64 [B, T] both.

    A token is a character, or what `wishes.tokenizer`, a JSON file of the package tokenizers, makes one. A window takes T + 1 tokens of the
    file, so that no token is in two of them; what is left at the end is not used. The encoded file lies in the cache where there is
    room, else in memory.

    Raises `BadInput` for a file that is no UTF-8, empty or shorter than a window, and for a tokenizer that cannot be read; `MissingExtra`.
    """
    refuse(
        [
            f"{path.name} is a text, which has no columns: leave --{option} out."
            for option, given in (("target", wishes.target), ("split-by", wishes.split_by))
            if given is not None
        ]
    )
    context = max(1, wishes.context or _CONTEXT)
    tokenizer = None if wishes.tokenizer is None else _read_tokenizer(Path(wishes.tokenizer))
    encoder = Characters(_alphabet(path)) if tokenizer is None else Subwords(tokenizer)
    content = fingerprints.of_files([path], path.parent, tokenizer or "characters")
    ids, dtype = _encoded(path, encoder, content)
    unit = "characters" if tokenizer is None else "tokens"
    count = len(ids) if isinstance(ids, np.ndarray) else ids.stat().st_size // dtype.itemsize
    rows = count // (context + 1)
    if not rows:
        raise errors.BadInput(
            f"{path} has {count:,} {unit}, and one window of {context} takes {context + 1:,}, as the last one's successor is learnt too: "
            "give a longer text, or shorter windows with --context."
        )
    windows: Store
    if isinstance(ids, np.ndarray):
        windows = Memory(ids[: rows * (context + 1)].reshape(rows, context + 1))
    else:
        windows = PackedFile(ids, (context + 1,), dtype, rows)
    return StoredSource(
        fingerprint=fingerprints.of_text(content, str(context)),
        schema=Schema(
            inputs=(Column(name="tokens", kind="tokens", shape=(context,), dtype="int64", tokenizer=tokenizer),),
            target=Target(name="next", kind="tokens", classes=encoder.vocabulary),
        ),
        stores={
            "tokens": Viewed(windows, lambda window: window[:, :-1].astype(np.int64)),
            "next": Viewed(windows, lambda window: window[:, 1:].astype(np.int64)),
        },
        description=f"{rows:,} windows of {context} {unit} in {path.name}",
    )


class Encoder(Protocol):
    """What makes ids of a text."""

    vocabulary: tuple[str, ...]  # what each id stands for

    def encode(self, text: str) -> NDArray[int64]:
        """Ids [N]."""


class Characters:
    """A token a character; id 0 stands for every one that is not in the vocabulary.

    >>> Characters((UNKNOWN, "a", "b")).encode("abc").tolist()
    [1, 2, 0]
    """

    def __init__(self, vocabulary: tuple[str, ...]):
        self.vocabulary = vocabulary
        self._ids = np.zeros(_CODE_POINTS, np.int64)
        self._ids[[ord(character) for character in vocabulary[1:]]] = np.arange(1, len(vocabulary))

    def encode(self, text: str) -> NDArray[int64]:
        return self._ids[_code_points(text)]


class Subwords:
    """Tokens of a tokenizer as the package tokenizers writes it, without its special tokens, padding and truncation."""

    def __init__(self, tokenizer: str):
        """Raises `MissingExtra` without that package, `BadInput` for JSON that it does not read."""
        try:
            import tokenizers
        except ImportError:
            raise errors.MissingExtra(
                "a tokenizer file needs the package tokenizers: pip install 'delest[text]', or leave --tokenizer out for characters."
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        except Exception as error:  # the package raises nothing narrower
            raise errors.BadInput(f"the tokenizer is none that the package tokenizers reads ({error}).") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        names = {number: token for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        self.vocabulary = tuple(names.get(number, "") for number in range(max(names, default=-1) + 1))

    def encode(self, text: str) -> NDArray[int64]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


def encoder_of(schema: Schema) -> Encoder:
    """What encoded the text of a schema, to encode another one alike. Raises `MissingExtra`."""
    tokenizer = schema.inputs[0].tokenizer
    return Characters(schema.vocabulary or ()) if tokenizer is None else Subwords(tokenizer)


def read_pieces(path: Path) -> Iterator[str]:
    """A text in pieces of about 1 MiB that end where a line does; every line ends with a newline alone, as Python reads files.

    Raises `BadInput` naming the first byte that is no UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            while piece := file.read(_PIECE):
                yield piece + file.readline(_PIECE)
    except UnicodeDecodeError:
        raise errors.BadInput(_not_utf8(path)) from None


def _not_utf8(path: Path) -> str:
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return f"{path} is UTF-16, not UTF-8: save it as UTF-8, as `iconv -f UTF-16 -t UTF-8` does."
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return (
                    f"{path} is no UTF-8 text: line {number:,} has the byte 0x{byte:02x} in place {error.start + 1:,}. "
                    "Save it as UTF-8 (from Latin-1: `iconv -f LATIN1 -t UTF-8`)."
                )
    return f"{path} is no UTF-8 text."


def _code_points(text: str) -> NDArray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _alphabet(path: Path) -> tuple[str, ...]:
    """`UNKNOWN`, then the characters of a text in order. Raises `BadInput` for an empty one."""
    seen = np.zeros(_CODE_POINTS, bool)
    for piece in read_pieces(path):
        seen[_code_points(piece)] = True
    seen[ord(UNKNOWN)] = False
    found = tuple(map(chr, np.flatnonzero(seen).tolist()))
    if not found:
        raise errors.BadInput(f"{path} holds no text: there is nothing to learn from.")
    return (UNKNOWN, *found)


def _read_tokenizer(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except FileNotFoundError:
        raise errors.BadInput(f"the tokenizer {path} does not exist (looked in {Path.cwd()}).") from None
    except (OSError, ValueError) as error:
        raise errors.BadInput(
            f"the tokenizer {path} cannot be read ({error}): give the tokenizer.json that the package tokenizers writes."
        ) from None
    return text


def _encoded(path: Path, encoder: Encoder, content: str) -> tuple[Path | NDArray, np.dtype]:
    """The ids of a whole text one after the other, as few bytes each as do: a file in the cache, else an array; and their type."""
    dtype = np.min_scalar_type(max(1, len(encoder.vocabulary) - 1))
    if has_room(path.stat().st_size * dtype.itemsize, of_any_size=True):
        packed = storage.cache_folder("packed") / f"{content}.tokens"
        if not packed.exists():
            with storage.written_atomically(packed) as file:
                _write(path, encoder, dtype, file)
        return packed, dtype
    return np.concatenate([np.empty(0, dtype), *(encoder.encode(piece).astype(dtype) for piece in read_pieces(path))]), dtype


def _write(path: Path, encoder: Encoder, dtype: np.dtype, file: BinaryIO) -> None:
    for piece in read_pieces(path):
        file.write(encoder.encode(piece).astype(dtype).tobytes())
