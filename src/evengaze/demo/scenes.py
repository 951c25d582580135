"""Synthetic pictures and the questions about them: what the embedded model is trained on and tested with.

A scene is a textured picture of 3 to 6 coloured things (shapes and digits) that do not overlap, of any aspect ratio,
with its longer side 112 pixels. Everything is drawn with integer arithmetic and without fonts, from the stream of
`numpy.random.RandomState`, which NumPy guarantees, so that a seed gives the same pixels everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 112
PATCH = 8
GRID = SIDE // PATCH
PAD_COLOR = (122, 116, 104)  # CLIP's mean colour, as LLaVA's image processor rounds it

PALETTE = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 222, 50),
    "orange": (245, 138, 25),
    "purple": (140, 50, 175),
    "white": (243, 243, 243),
    "black": (18, 18, 18),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "moon")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = SHAPES + NUMBERS
POSITIONS = ("left", "right", "top", "bottom")
TYPES = ("color", "shape", "digit", "exists", "count", "position")

# Rows of a 5 x 7 dot matrix, most significant bit left.
_GLYPHS = {
    "zero": (14, 17, 17, 17, 17, 17, 14),
    "one": (4, 12, 20, 4, 4, 4, 31),
    "two": (14, 17, 1, 6, 8, 16, 31),
    "three": (30, 1, 1, 14, 1, 1, 30),
    "four": (2, 6, 10, 18, 31, 2, 2),
    "five": (31, 16, 16, 30, 1, 1, 30),
    "six": (14, 16, 16, 30, 17, 17, 14),
    "seven": (31, 1, 2, 4, 8, 8, 8),
    "eight": (14, 17, 17, 14, 17, 17, 14),
    "nine": (14, 17, 17, 15, 1, 1, 14),
}
_STAR = ((0, -100), (24, -32), (95, -31), (38, 12), (59, 81), (0, 40), (-59, 81), (-38, 12), (-95, -31), (-24, -32))


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind: one of `KINDS`.
        color: one of `COLORS`.
        top: first pixel row, in the padded square.
        left: first pixel column, in the padded square.
        mask: its pixels, bool of shape (height, width).
    """

    kind: str
    color: str
    top: int
    left: int
    mask: NDArray[np.bool_]

    @property
    def center(self) -> tuple[int, int]:
        """Twice the offset (down, right) of its centre from the picture's centre; doubled to stay integer."""
        height, width = self.mask.shape
        return 2 * self.top + height - SIDE, 2 * self.left + width - SIDE


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        pixels: the picture without padding, uint8 of shape (height, width, 3).
        things: its objects; no two share a colour.
    """

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]

    def padded(self) -> NDArray[np.uint8]:
        """The picture centred in a square of CLIP's mean colour, uint8 of shape (112, 112, 3)."""
        square = np.empty((SIDE, SIDE, 3), np.uint8)
        square[:] = PAD_COLOR
        top, left = self._offset()
        square[top : top + self.pixels.shape[0], left : left + self.pixels.shape[1]] = self.pixels
        return square

    def padding_share(self) -> NDArray[np.float64]:
        """The share of padding in every patch, in raster order, shape (196,)."""
        padding = np.ones((SIDE, SIDE), bool)
        top, left = self._offset()
        padding[top : top + self.pixels.shape[0], left : left + self.pixels.shape[1]] = False
        return _per_patch(padding) / PATCH**2

    def coverage(self, thing: Thing) -> NDArray[np.int64]:
        """How many pixels of `thing` every patch shows, in raster order, shape (196,)."""
        where = np.zeros((SIDE, SIDE), bool)
        where[thing.top : thing.top + thing.mask.shape[0], thing.left : thing.left + thing.mask.shape[1]] = thing.mask
        return _per_patch(where)

    def patches(self, things: Sequence[Thing], pixels: int = 8) -> tuple[int, ...]:
        """Raster indices of the patches that show at least `pixels` pixels of one of `things`."""
        shown = np.zeros(GRID**2, bool)
        for thing in things:
            shown |= self.coverage(thing) >= pixels
        return tuple(int(index) for index in np.flatnonzero(shown))

    def _offset(self) -> tuple[int, int]:
        return (SIDE - self.pixels.shape[0]) // 2, (SIDE - self.pixels.shape[1]) // 2


@dataclass(frozen=True)
class SceneQuestion:
    """A question that needs local evidence.

    Attributes:
        text: the question, in lower case with its question mark.
        answer: the one-word answer.
        type: one of `TYPES`.
        things: the objects that show the answer; empty if the asked thing is absent.
    """

    text: str
    answer: str
    type: str
    things: tuple[Thing, ...]


def make_scene(*seed: int, most: int = 6) -> Scene:
    """Draw the scene of a seed.

    Args:
        *seed: non-negative integers, e.g. (split, seed, index).
        most: the largest number of things in it; fewer make easier scenes to begin training with.

    Returns:
        The scene; the same on every platform.
    """
    random = np.random.RandomState(list(seed))
    orientation = random.randint(5)
    short = SIDE if orientation == 4 else 2 * random.randint(28, 54)
    height, width = (short, SIDE) if orientation < 2 else (SIDE, short)
    pixels = _background(random, height, width)
    counted = SHAPES[random.randint(len(SHAPES))]
    kinds = [counted] * random.randint(1, 4)
    others = [kind for kind in random.permutation(SHAPES).tolist() if kind != counted]
    digits = random.permutation(NUMBERS).tolist()
    while len(kinds) < 6:
        kinds.append(others.pop() if random.randint(5) < 3 else digits.pop())
    kinds = kinds[: max(random.randint(4, 7), kinds.count(counted) + 1)]
    if len(kinds) > most:
        kinds = [kinds[index] for index in random.permutation(len(kinds))[:most]]
    colors = random.permutation(COLORS).tolist()
    free = np.ones((height, width), bool)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    things = []
    for kind, color in zip(kinds, colors, strict=False):
        mask = _mask(kind, random)
        spot = _place(random, free, *mask.shape)
        if spot is None:
            continue
        row, column = spot
        free[max(row - 2, 0) : row + mask.shape[0] + 2, max(column - 2, 0) : column + mask.shape[1] + 2] = False
        shade = np.array(PALETTE[color]) + random.randint(-12, 13, size=3)
        region = pixels[row : row + mask.shape[0], column : column + mask.shape[1]]
        region[mask] = np.clip(shade + random.randint(-6, 7, size=(int(mask.sum()), 1)), 0, 255)
        things.append(Thing(kind, color, top + row, left + column, mask))
    return Scene(pixels.astype(np.uint8), tuple(things))


def ask(scene: Scene, *seed: int) -> list[SceneQuestion]:
    """Every question of `TYPES` that a scene allows, in random order.

    Whether a thing is there is asked as often with the answer yes as with the answer no.

    Args:
        scene: the scene.
        *seed: non-negative integers.

    Returns:
        The questions; the number of them depends on the scene.
    """
    random = np.random.RandomState(list(seed))
    kinds = [thing.kind for thing in scene.things]
    questions = []
    for thing in scene.things:
        family = "shape" if thing.kind in SHAPES else "digit"
        questions.append(SceneQuestion(f"what {family} is {thing.color}?", thing.kind, family, (thing,)))
        if kinds.count(thing.kind) == 1:
            questions.append(SceneQuestion(f"what color is the {thing.kind}?", thing.color, "color", (thing,)))
            position = position_of(thing)
            if position is not None:
                questions.append(SceneQuestion(f"where is the {thing.kind}?", position, "position", (thing,)))
        questions.extend(_exists(scene, thing, random))
    # The first thing's shape is the one whose number was drawn evenly; for others "one" would be the usual answer.
    if scene.things and kinds[0] in SHAPES:
        counted = tuple(thing for thing in scene.things if thing.kind == kinds[0])
        questions.append(
            SceneQuestion(f"how many {PLURALS[kinds[0]]} are there?", NUMBERS[len(counted)], "count", counted)
        )
    return [questions[index] for index in random.permutation(len(questions))]


def position_of(thing: Thing) -> str | None:
    """In which direction from the picture's centre a thing lies, or None if that is not clear."""
    down, right = thing.center
    if max(abs(down), abs(right)) < 24 or abs(abs(down) - abs(right)) < 12:
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def _exists(scene: Scene, thing: Thing, random: Any) -> list[SceneQuestion]:
    """One question about a thing that is there, and one about a thing that is not."""
    kinds = {one.kind for one in scene.things}
    present = {(one.color, one.kind) for one in scene.things}
    absent = [kind for kind in KINDS if kind not in kinds]
    kind = absent[random.randint(len(absent))]
    style = random.randint(3)
    if style == 0:
        same = tuple(one for one in scene.things if one.kind == thing.kind)
        return [
            SceneQuestion(f"is there {_article(thing.kind)}?", "yes", "exists", same),
            SceneQuestion(f"is there {_article(kind)}?", "no", "exists", ()),
        ]
    color = thing.color
    if style == 2:  # a kind that is there in a colour that it does not have
        colors = [one for one in COLORS if (one, thing.kind) not in present]
        kind, color = thing.kind, colors[random.randint(len(colors))]
    return [
        SceneQuestion(f"is there {_article(thing.color + ' ' + thing.kind)}?", "yes", "exists", (thing,)),
        SceneQuestion(f"is there {_article(color + ' ' + kind)}?", "no", "exists", ()),
    ]


def _article(noun: str) -> str:
    return f"an {noun}" if noun.startswith(("orange", "eight")) else f"a {noun}"


def _background(random: Any, height: int, width: int) -> NDArray[np.int64]:
    """A greyish picture with blocks, stripes and noise, int of shape (height, width, 3)."""
    base = random.randint(75, 181) + random.randint(-18, 19, size=3)
    cell = random.randint(4, 17)
    blocks = random.randint(-16, 17, size=(-(-height // cell), -(-width // cell), 1))
    blocks = blocks.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    period, slope = random.randint(5, 25), random.randint(-3, 4)
    stripes = np.where((3 * rows + slope * columns) // period % 2 == 0, random.randint(0, 22), 0)
    noise = random.randint(-7, 8, size=(height, width, 1))
    pixels: NDArray[np.int64] = np.clip(base + blocks + stripes + noise, 0, 255).astype(np.int64)
    return pixels


def _mask(kind: str, random: Any) -> NDArray[np.bool_]:
    """The pixels of one kind, at a random size."""
    if kind in _GLYPHS:
        bits = np.array([[row >> shift & 1 for shift in (4, 3, 2, 1, 0)] for row in _GLYPHS[kind]], bool)
        return bits.repeat(random.randint(3, 5), 0).repeat(4, 1)
    size = int(random.randint(17, 26))
    axis: NDArray[np.int64] = (2 * np.arange(size) - size + 1) * 100 // (size - 1)  # -100 .. 100
    x, y = axis[None, :], axis[:, None]
    square = x * x + y * y
    if kind == "circle":
        return square <= 10000
    if kind == "square":
        return np.maximum(abs(x), abs(y)) <= 88
    if kind == "triangle":
        return (2 * abs(x) <= y + 100) & (y <= 85)
    if kind == "diamond":
        return abs(x) + abs(y) <= 100
    if kind == "cross":
        return np.minimum(abs(x), abs(y)) + 0 * x <= 30
    if kind == "ring":
        return (square <= 10000) & (square >= 3600)
    if kind == "moon":
        return (square <= 10000) & ((x - 45) ** 2 + y * y >= 6400)
    inside = np.zeros((size, size), bool)  # the star: even-odd rule
    for (ax, ay), (bx, by) in zip(_STAR, _STAR[1:] + _STAR[:1], strict=True):
        crossed = (ay > y) != (by > y)
        side = (x - ax) * (by - ay) - (y - ay) * (bx - ax)
        inside ^= crossed & ((side < 0) if by > ay else (side > 0))
    return inside


def _place(random: Any, free: NDArray[np.bool_], height: int, width: int) -> tuple[int, int] | None:
    for _ in range(60):
        row = random.randint(0, free.shape[0] - height + 1)
        column = random.randint(0, free.shape[1] - width + 1)
        if free[row : row + height, column : column + width].all():
            return row, column
    return None


def _per_patch(pixels: NDArray[np.bool_]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = pixels.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).reshape(-1)
    return counts
