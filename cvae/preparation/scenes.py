"""The demo's pictures: drawn scenes of one to three coloured shapes, each with five captions.

A scene is a function of (seed, image id). Its shapes, colours, sizes, places and background are
captioned; the exact positions, sizes, angles and shades are random, so that no two pictures are equal.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIZE = 64
CAPTIONS_PER_IMAGE = 5
FIRST_VAL_ID = 1_000_001  # far behind the train ids, so that train may grow without overlap
_OVERSAMPLING = 4

# The words for each shape, size and place; captions choose among them at random.
SHAPES: dict[str, tuple[str, ...]] = {"circle": ("circle", "circle", "disc")}
SHAPES |= {name: (name,) for name in ("square", "triangle", "star", "heart")}
COLOURS = {
    "red": (226, 30, 45),
    "orange": (255, 130, 10),
    "yellow": (255, 214, 10),
    "green": (28, 165, 70),
    "blue": (30, 90, 235),
    "purple": (130, 45, 190),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "black": (22, 22, 26),
    "grey": (150, 155, 162),
    "light blue": (165, 218, 250),
    "beige": (240, 222, 188),
    "pink": (255, 190, 214),
}
SIZES = {"large": ("large", "big"), "small": ("small", "little", "tiny"), "": ("",)}
PLACES = {
    "centre": ("in the middle", "in the centre"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
# Sets of places without overlap, by number of things.
_LAYOUTS: dict[int, list[tuple[str, ...]]] = {
    1: [(place,) for place in PLACES],
    2: [("left", "right"), ("top", "bottom")],
    3: [("left", "centre", "right")],
}
# Lengths are in units of the image.
_FROM_CENTRE = {1: 0.19, 2: 0.245, 3: 0.32}
_POSITION_JITTER = 0.015
_SHADOW = (0.01, 0.02)
_RADIUS = {
    (1, "large"): 0.28,
    (1, "small"): 0.165,
    (2, "large"): 0.2,
    (2, "small"): 0.135,
    (3, ""): 0.13,
}
_SIZE_JITTER = 0.06  # share of the radius
_ANGLE_JITTER = 5  # degrees


@dataclass(frozen=True)
class Thing:
    """One shape. Its size is "" in scenes of three, which have shapes of one size."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


def generator(seed: int, image_id: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, image_id], np.uint64)))


def draw_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    places = _LAYOUTS[count][rng.integers(len(_LAYOUTS[count]))]
    shapes = rng.choice(list(SHAPES), size=count, replace=False)
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    sizes = rng.choice(["large", "small"], size=count, p=[0.6, 0.4]) if count < 3 else [""] * 3
    background = str(rng.choice(list(BACKGROUNDS)))
    things = zip(shapes, colours, sizes, places, strict=True)
    return Scene(tuple(Thing(*map(str, thing)) for thing in things), background)


def example(seed: int, image_id: int) -> tuple[Image.Image, list[str]]:
    """Returns the picture (RGB, 64×64) and the five captions of an image id."""
    rng = generator(seed, image_id)
    scene = draw_scene(rng)
    captions = describe(scene, rng)
    return render(scene, rng), captions


def captions_of(seed: int, image_id: int) -> list[str]:
    """Returns the captions of example() without drawing."""
    rng = generator(seed, image_id)
    return describe(draw_scene(rng), rng)


def render(scene: Scene, rng: np.random.Generator | None = None) -> Image.Image:
    """Draws a scene (RGB, 64×64), with random deviations from the description if there is an rng."""
    size = IMAGE_SIZE * _OVERSAMPLING
    jitter = rng.uniform(-1, 1, size=(len(scene.things) + 1, 5)) if rng else np.zeros((4, 5))
    shade = 1 + 0.04 * jitter[-1, 0]
    image = _gradient(size, BACKGROUNDS[scene.background], shade * 1.03, shade * 0.94)
    for thing, (dx, dy, scale, angle, light) in zip(scene.things, jitter, strict=False):
        x, y = _centre(scene, thing)
        x, y = x + _POSITION_JITTER * dx, y + _POSITION_JITTER * dy
        radius = _RADIUS[len(scene.things), thing.size] * (1 + _SIZE_JITTER * scale)
        degrees = _ANGLE_JITTER * angle
        shadow = _mask(size, thing.shape, x + _SHADOW[0], y + _SHADOW[1], radius, degrees)
        shadow = shadow.filter(ImageFilter.GaussianBlur(size / 60)).point(lambda v: v * 0.4)
        image.paste((0, 0, 0), mask=shadow)
        mask = _mask(size, thing.shape, x, y, radius, degrees)
        light = 1 + 0.06 * light
        image.paste(_gradient(size, COLOURS[thing.colour], light * 1.1, light * 0.88), mask=mask)
    return image.reduce(_OVERSAMPLING)


def _centre(scene: Scene, thing: Thing) -> tuple[float, float]:
    """Returns (x, y) of a thing as described."""
    far = _FROM_CENTRE[len(scene.things)]
    offsets = {"left": (-far, 0), "right": (far, 0), "top": (0, -far), "bottom": (0, far)}
    dx, dy = offsets.get(thing.place, (0, 0))
    return 0.5 + dx, 0.5 + dy


def _gradient(size: int, colour: tuple[int, int, int], top: float, bottom: float) -> Image.Image:
    rows = np.linspace(top, bottom, size)[:, None, None] * np.array(colour)
    column = Image.fromarray(np.clip(rows, 0, 255).round().astype(np.uint8))
    return column.resize((size, size), Image.Resampling.NEAREST)


def _mask(size: int, shape: str, x: float, y: float, radius: float, degrees: float) -> Image.Image:
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse([size * edge for edge in box], fill=255)
    else:
        turn = math.radians(degrees)
        cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
        corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _OUTLINES[shape]]
        draw.polygon([(size * u, size * v) for u, v in corners], fill=255)
    return mask


def _star() -> list[tuple[float, float]]:
    corners = [(1.12 if k % 2 == 0 else 0.48, math.pi * k / 5) for k in range(10)]
    return [(r * math.sin(a), -r * math.cos(a) + 0.06) for r, a in corners]


def _heart() -> list[tuple[float, float]]:
    # x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, scaled to the unit disc.
    turns: NDArray[np.float64] = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    xs = 16 * np.sin(turns) ** 3
    ys = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(u), float(v)) for u, v in zip(xs / 16.5, -(ys + 2.5) / 16, strict=True)]


# Corners of the unit shapes, y downwards.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.05, 0.82), (-1.05, 0.82)],
    "star": _star(),
    "heart": _heart(),
}


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Returns five true captions: four describe the whole scene, the last omits something."""
    full = rng.permutation(4)
    return [_full_caption(scene, int(style), rng) for style in full] + [_short_caption(scene, rng)]


def _full_caption(scene: Scene, style: int, rng: np.random.Generator) -> str:
    things = _enumerate([_thing(t, rng, place_first=False) for t in scene.things])
    ground = scene.background
    if style == 0:
        return f"{things} on a {ground} background"
    if style == 1:
        return f"{ground} background, {things}"
    if style == 2:
        return f"{things} on {ground}"
    placed = [_thing(t, rng, place_first=True) for t in scene.things]
    return f"{_enumerate(placed)}, on {ground}"


def _short_caption(scene: Scene, rng: np.random.Generator) -> str:
    style = int(rng.integers(3))
    if style == 0:
        return _enumerate([_thing(t, rng, place_first=False) for t in scene.things])
    if style == 1:
        things = [_article(f"{t.colour} {_pick(rng, SHAPES[t.shape])}") for t in scene.things]
        return f"{_enumerate(things)} on {scene.background}"
    return _enumerate([f"{t.colour} {t.shape} {_pick(rng, PLACES[t.place])}" for t in scene.things])


def _thing(thing: Thing, rng: np.random.Generator, place_first: bool) -> str:
    words = (_pick(rng, SIZES[thing.size]), thing.colour, _pick(rng, SHAPES[thing.shape]))
    noun = _article(" ".join(filter(None, words)))
    place = _pick(rng, PLACES[thing.place])
    return f"{place} {noun}" if place_first else f"{noun} {place}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _enumerate(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]
