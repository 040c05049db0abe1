"""What data are: columns, the schema that a model factory receives, and the protocol of every source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

ColumnKind = Literal["image", "array", "number", "category", "tokens"]
ROLES = ("train", "validation", "selection", "test")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One input column of a source."""

    name: str
    kind: ColumnKind
    shape: tuple[int, ...] = ()  # of one row as `Source.read` gives it; images are (height, width, channels)
    dtype: str = "float32"  # as stored
    categories: tuple[str, ...] | None = (
        None  # known values of a category column; code 0 is missing or unknown, code i is categories[i - 1]
    )
    missing: int = 0  # rows without a value
    tokenizer: str | None = None  # of tokens: the JSON of what made them; None: each is a character

    @property
    def cardinality(self) -> int | None:
        """Number of codes of a category column, code 0 (missing or unknown) included: the rows of an embedding."""
        return None if self.categories is None else len(self.categories) + 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be predicted: a class (codes 0 .. K-1), a number, for each token of a text the next one (ids 0 .. V-1), or an array that
    the job's own `step` reads (boxes, masks)."""

    name: str
    kind: Literal["class", "number", "tokens", "array"]
    classes: tuple[str, ...] | None = None  # of tokens: the vocabulary
    shape: tuple[int, ...] = ()  # of one row of an array


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Shapes, classes, columns: what a model factory may ask for.

    `inputs` are in the order in which the model receives them. How a row reaches the model:

    - one image column: a float32 tensor [B, C, H, W], standardised per channel;
    - one array column: a tensor [B, ...], floating and integer-pixel data standardised as float32;
    - number columns only: one float32 tensor [B, D];
    - number and category columns: keywords `numbers` float32 [B, D] and `categories` int64 [B, K]
      (`numbers` is left out where there is none);
    - several array columns: keywords by column name, or positional arguments where the data came as a tuple;
    - one column of tokens: an int64 tensor [B, T] of ids, for which a model gives scores [B, T, V] of what comes next.

    D is the number of number columns plus one 0/1 column for each number column with missing values.
    """

    inputs: tuple[Column, ...]
    target: Target | None = None

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if self.target is None else self.target.classes

    @property
    def numbers(self) -> tuple[Column, ...]:
        return tuple(column for column in self.inputs if column.kind == "number")

    @property
    def categories(self) -> tuple[Column, ...]:
        return tuple(column for column in self.inputs if column.kind == "category")

    @property
    def is_image(self) -> bool:
        return len(self.inputs) == 1 and self.inputs[0].kind == "image"

    @property
    def is_table(self) -> bool:
        return bool(self.numbers or self.categories)

    @property
    def is_text(self) -> bool:
        return len(self.inputs) == 1 and self.inputs[0].kind == "tokens"

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """What each token id of a text stands for; None for other data."""
        return self.classes if self.is_text else None

    @property
    def number_width(self) -> int:
        """D: number columns and their missing-value indicators."""
        return len(self.numbers) + sum(1 for column in self.numbers if column.missing)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row as a model with a single input receives it: (C, H, W) for images, (D,) for numbers."""
        if self.is_image:
            height, width, channels = self.inputs[0].shape
            return channels, height, width
        if self.is_table:
            return (self.number_width,)
        return self.inputs[0].shape

    @property
    def outputs(self) -> int:
        """How many values a model gives for a row, or for a token of a text: the number of classes, or 1."""
        return len(self.classes) if self.classes is not None else 1


class Source(Protocol):
    """Rows that can be read in any order, one call a batch."""

    fingerprint: str  # of the content: equal data, equal fingerprint
    schema: Schema
    description: str  # in words: "10,000 images of 28x28x1 in digits.npz"
    left_out: tuple[str, ...]  # rows or files that could not be used, each with its reason (`skip_bad`)

    def __len__(self) -> int: ...

    def sizes(self) -> NDArray[int64] | None:
        """Per row, where rows differ in size (names the worst batch); None where all are equal."""

    def read(self, index: NDArray[int64]) -> dict[str, NDArray]:
        """Rows by number: input columns and target by name. Images are uint8 [B, H, W, C]; number columns are
        float64 [B] with NaN for a missing value; category columns are int64 codes [B]; a class target is int64
        codes [B], a number target float64 [B], an array target float32 or int64 [B, ...]; tokens, also as target, are int64 ids [B, T]."""

    def values(self, name: str) -> NDArray:
        """One column whole as it is stored (never an image column): for stratifying and splitting."""

    def roles(self) -> NDArray | None:
        """Per row one of `ROLES` where the data bring their own division (a file or folder a role); else None."""
