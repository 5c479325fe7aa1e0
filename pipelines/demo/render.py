"""The picture of a scene of the demo corpus: a backdrop and players, drawn with signed distances.

`LOOKS` is a table of shapes per instrument; a player who moves sways through `POSES` poses, with
strokes of motion on both sides; one who does not move stands upright.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from r2scp.pipelines.demo.scene import Part, Scene
from r2scp.pipelines.demo.world import EMBLEMS, HUES, PLACES, SECONDS, TEXTURES, Backdrop

SIZE = 224  # pixels
FPS = 8
FRAMES = SECONDS * FPS
POSES = 8
SWAY_HZ = 1.7
PLAYER_W, PLAYER_H = 64, 112  # pixels
PLAYER_TOP = 100
PLAYER_LEFT = {"left": 8, "middle": 80, "right": 152}
EMBLEM_X = {"left": 40.0, "middle": 112.0, "right": 184.0}
EMBLEM_Y, EMBLEM_RADIUS = 48.0, 26.0

# HUES in RGB
PALETTE = np.array(
    [
        (214, 45, 45),
        (230, 126, 34),
        (241, 205, 40),
        (150, 205, 45),
        (40, 150, 60),
        (20, 128, 120),
        (70, 210, 220),
        (95, 160, 240),
        (40, 70, 190),
        (120, 60, 190),
        (205, 60, 205),
        (240, 140, 170),
    ],
    np.float32,
)
assert len(PALETTE) == len(HUES)

WOOD, DARK, WHITE, SILVER, GOLD = (
    (193, 120, 55),
    (25, 22, 24),
    (245, 243, 235),
    (200, 208, 216),
    (250, 200, 30),
)
SKIN = (226, 178, 145)


@dataclass(frozen=True, slots=True)
class Shape:
    """An ellipse (`disc`) or a box around (x, y), half sizes (w, h), turned by `turn` radians.

    `sway` (dx, dy, turn) is added times the pose's swing, −1 … 1.
    """

    kind: str
    x: float
    y: float
    w: float
    h: float
    turn: float
    colour: tuple[int, int, int]
    sway: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _row(count: int, first: Shape, step: tuple[float, float]) -> tuple[Shape, ...]:
    """`count` copies of `first`, each moved on by `step`."""
    return tuple(replace(first, x=first.x + i * step[0], y=first.y + i * step[1]) for i in range(count))


# In a box of 64 × 112 pixels; the player's head is at (32, 16), the body below it.
LOOKS: dict[str, tuple[Shape, ...]] = {
    "accordion": (
        Shape("box", 32, 58, 27, 16, 0, (190, 20, 40), (2, 0, 0.12)),
        *_row(5, Shape("box", 18, 58, 1.6, 16, 0, WHITE, (4, 0, 0.12)), (7, 0)),
        Shape("box", 7, 58, 3, 18, 0, DARK, (-2, 0, 0.12)),
    ),
    "acoustic_guitar": (
        Shape("box", 46, 44, 20, 2.5, -0.7, (92, 58, 30), (0, 0, 0.15)),
        Shape("disc", 24, 64, 16, 14, 0, (222, 150, 60), (0, 0, 0.15)),
        Shape("disc", 34, 55, 10, 9, 0, (222, 150, 60), (0, 0, 0.15)),
        Shape("disc", 27, 61, 5, 5, 0, DARK),
        Shape("disc", 22, 66, 4, 4, 0, SKIN, (3, 8, 0)),
    ),
    "bassoon": (
        Shape("box", 33, 54, 4.5, 46, 0.45, (95, 15, 35), (0, 0, 0.16)),
        Shape("box", 38, 44, 6, 3, 0.45, SILVER, (2, 0, 0.16)),
        Shape("box", 28, 68, 6, 3, 0.45, SILVER, (-2, 0, 0.16)),
        Shape("disc", 52, 13, 5, 4, 0, WHITE, (6, 0, 0)),
    ),
    "clarinet": (
        Shape("box", 32, 52, 4, 30, 0, DARK, (0, 0, 0.3)),
        Shape("disc", 32, 82, 8, 5, 0, DARK, (-6, 0, 0)),
        *_row(5, Shape("disc", 32, 36, 2.2, 2.2, 0, SILVER, (1, 0, 0)), (0, 9)),
    ),
    "congas": (
        Shape("box", 18, 82, 12, 24, 0.04, (150, 85, 35)),
        Shape("box", 47, 82, 12, 24, -0.04, (120, 50, 25)),
        Shape("disc", 18, 58, 13, 5, 0, (255, 236, 190)),
        Shape("disc", 47, 58, 13, 5, 0, (255, 236, 190)),
        Shape("disc", 18, 49, 5, 4, 0, SKIN, (0, 8, 0)),
        Shape("disc", 47, 49, 5, 4, 0, SKIN, (0, -8, 0)),
    ),
    "drum": (
        Shape("disc", 32, 80, 28, 27, 0, (30, 60, 200)),
        Shape("disc", 32, 80, 23, 22, 0, WHITE),
        Shape("disc", 32, 80, 8, 8, 0, (30, 60, 200)),
        Shape("box", 14, 46, 14, 2, 0.7, GOLD, (0, 4, 0.6)),
        Shape("box", 50, 46, 14, 2, -0.7, GOLD, (0, -4, 0.6)),
    ),
    "electric_bass": (
        Shape("box", 42, 46, 26, 2.5, -0.5, (240, 235, 215), (0, 0, 0.15)),
        Shape("box", 21, 63, 14, 11, -0.5, (140, 230, 30), (0, 0, 0.15)),
        Shape("box", 21, 63, 6, 4, -0.5, DARK, (0, 0, 0.15)),
        Shape("disc", 60, 34, 4, 4, 0, (140, 230, 30), (0, 3, 0)),
    ),
    "flute": (
        Shape("box", 42, 28, 25, 2.6, -0.1, SILVER, (0, 0, 0.22)),
        *_row(4, Shape("disc", 34, 29, 2, 2, 0, (60, 80, 110), (0, 1, 0)), (8, -0.8)),
    ),
    "piano": (
        Shape("box", 32, 82, 31, 26, 0, (16, 14, 18)),
        Shape("box", 32, 72, 28, 6, 0, WHITE),
        *_row(7, Shape("box", 8, 70, 1.8, 4, 0, DARK), (8, 0)),
        Shape("disc", 20, 66, 5, 4, 0, SKIN, (9, 0, 0)),
        Shape("disc", 44, 66, 5, 4, 0, SKIN, (-9, 0, 0)),
    ),
    "trumpet": (
        Shape("box", 42, 31, 18, 3, 0.1, GOLD, (0, 0, 0.25)),
        Shape("disc", 58, 33, 5, 11, 0, GOLD, (0, 5, 0)),
        Shape("box", 42, 37, 8, 7, 0.1, (205, 150, 20), (0, 2, 0.25)),
        *_row(3, Shape("box", 38, 27, 1.4, 4, 0, DARK, (0, 2, 0)), (4, 0)),
    ),
    "violin": (
        Shape("disc", 40, 36, 9, 7, 0.2, (160, 62, 22), (0, 0, 0.1)),
        Shape("disc", 50, 38, 7, 6, 0.2, (160, 62, 22), (0, 0, 0.1)),
        Shape("box", 58, 40, 6, 1.5, 0.2, DARK, (0, 0, 0.1)),
        Shape("box", 42, 46, 24, 1.3, -1.0, WHITE, (8, 5, 0)),
    ),
    "xylophone": (
        *(
            Shape("box", 7 + 8.3 * i, 74, 3.6, 20 - 1.8 * i, 0, colour)
            for i, colour in enumerate(
                (
                    (230, 40, 50),
                    (245, 140, 30),
                    (250, 225, 40),
                    (60, 190, 70),
                    (50, 200, 215),
                    (60, 90, 225),
                    (160, 60, 200),
                )
            )
        ),
        Shape("disc", 20, 52, 5, 5, 0, WHITE, (0, 9, 0)),
        Shape("disc", 44, 52, 5, 5, 0, WHITE, (0, -9, 0)),
    ),
}


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    return np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))


def _cover(shape: Shape, swing: float, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Coverage 0 … 1 of each pixel, anti-aliased over one pixel."""
    turn = shape.turn + shape.sway[2] * swing
    x, y = xs - (shape.x + shape.sway[0] * swing), ys - (shape.y + shape.sway[1] * swing)
    u = x * np.cos(turn) + y * np.sin(turn)
    v = y * np.cos(turn) - x * np.sin(turn)
    if shape.kind == "disc":
        distance = (np.hypot(u / shape.w, v / shape.h) - 1.0) * min(shape.w, shape.h)
    else:
        distance = np.maximum(np.abs(u) - shape.w, np.abs(v) - shape.h)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _shapes(instrument: str, swing: float | None, costume: tuple[int, int, int]) -> tuple[Shape, ...]:
    body = (
        Shape("box", 32, 104, 11, 12, 0, (50, 50, 60)),
        Shape("disc", 32, 62, 19, 36, 0, costume, (1.5, 0, 0.05)),
        Shape("disc", 32, 16, 11, 13, 0, SKIN, (3, 0, 0.1)),
        Shape("disc", 32, 8, 11, 6, 0, (60, 40, 30), (3, 0, 0.1)),
    )
    strokes = (
        ()
        if swing is None
        else tuple(
            Shape("box", x, y, 2.2, 9, turn, WHITE, (0, 4, 0))
            for x, turn in ((4, 0.4), (60, -0.4))
            for y in (16, 92)
        )
    )
    return body + LOOKS[instrument] + strokes


@lru_cache(maxsize=256)
def _poses(instrument: str, costume: int) -> tuple[np.ndarray, np.ndarray]:
    """A player at rest (index 0) and in motion: colour (1+POSES, 112, 64, 3), cover (1+POSES, 112, 64, 1)."""
    xs, ys = _grid(PLAYER_W, PLAYER_H)
    colour = np.zeros((1 + POSES, PLAYER_H, PLAYER_W, 3), np.float32)
    cover = np.zeros((1 + POSES, PLAYER_H, PLAYER_W, 1), np.float32)
    red, green, blue = (int(v) for v in PALETTE[costume] * 0.6)
    for pose in range(1 + POSES):
        swing = None if pose == 0 else float(np.sin(2 * np.pi * (pose - 0.5) / POSES))
        for shape in _shapes(instrument, swing, (red, green, blue)):
            inside = _cover(shape, swing or 0.0, xs, ys)[..., None]
            colour[pose] += inside * (np.array(shape.colour, np.float32) - colour[pose])
            cover[pose] = np.maximum(cover[pose], inside)
    return colour, cover


def _texture(name: str, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """A pattern 0 or 1 with a period of 28 pixels."""
    if name == "plain":
        return np.zeros_like(xs)
    wave = {
        "rows": np.sin(ys * (np.pi / 14)),
        "columns": np.sin(xs * (np.pi / 14)),
        "checks": np.sin(xs * (np.pi / 14)) * np.sin(ys * (np.pi / 14)),
        "dots": 7.0 - np.hypot(xs % 28 - 14, ys % 28 - 14),
        "diagonals": np.sin((xs + ys) * (np.pi / 20)),
        "rings": np.sin(np.hypot(xs - 112, ys - 150) * (np.pi / 14)),
        "waves": np.sin(ys * (np.pi / 14) + 2.5 * np.sin(xs * (np.pi / 28))),
    }[name]
    return np.clip(wave * 4 + 0.5, 0.0, 1.0)


def _emblem(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coverage of an emblem of radius 1 around the origin."""
    radius = np.hypot(x, y)
    angle = np.arctan2(x, -y)
    distance = {
        "disc": radius - 0.9,
        "square": np.maximum(np.abs(x), np.abs(y)) - 0.8,
        "triangle": np.maximum(np.abs(x) * 0.87 - y * 0.5, y) - 0.5,
        "star": radius - 0.62 - 0.36 * np.cos(5 * angle),
        "cross": np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.28, np.maximum(np.abs(x), np.abs(y)) - 0.95),
        "ring": np.abs(radius - 0.7) - 0.24,
        "diamond": np.abs(x) * 1.5 + np.abs(y) - 1.0,
        "crescent": np.maximum(radius - 0.95, 0.8 - np.hypot(x - 0.45, y)),
    }[name]
    return np.clip(0.5 - distance * EMBLEM_RADIUS, 0.0, 1.0)[..., None]


@lru_cache(maxsize=64)
def _backdrop(backdrop: Backdrop) -> np.ndarray:
    """The empty stage: float32 (224, 224, 3), 0 … 255."""
    xs, ys = _grid(SIZE, SIZE)
    base = PALETTE[backdrop.hue]
    pattern = _texture(backdrop.texture, xs, ys)[..., None]
    picture = base * (1.0 - 0.45 * pattern) * 0.85
    frame, floor = ((150, 205, 245), (70, 140, 50)) if backdrop.outdoor else ((58, 20, 26), (120, 78, 45))
    outside = (xs < 9) | (xs > SIZE - 10) | (ys < 14)
    picture[outside] = frame
    picture[ys > 176] = floor
    if backdrop.outdoor:
        for x, y, radius, colour in (
            (208, 6, 14, (255, 235, 90)),
            (4, 168, 20, (25, 95, 35)),
            (220, 168, 20, (25, 95, 35)),
        ):
            picture[np.hypot(xs - x, ys - y) < radius] = colour
    else:
        picture[(ys > 176) & (ys % 12 < 1.5)] = (80, 50, 28)
        for x in (56, 168):
            picture[np.hypot(xs - x, ys - 4) < 8] = (255, 250, 215)
    x, y = (xs - EMBLEM_X[backdrop.emblem_place]) / EMBLEM_RADIUS, (ys - EMBLEM_Y) / EMBLEM_RADIUS
    plate = np.clip(0.5 - (np.hypot(x, y) - 1.12) * EMBLEM_RADIUS, 0.0, 1.0)[..., None]
    picture += plate * (np.array(WHITE, np.float32) - picture)
    mark = _emblem(backdrop.emblem, x, y)
    return picture + mark * (PALETTE[backdrop.emblem_hue] * 0.9 - picture)


def _pose_at(part: Part, time_s: float, phase: float) -> int:
    """Index of the pose at `time_s`; 0 is at rest."""
    if not part.moves_at(int(time_s)):
        return 0
    return 1 + int(POSES * (SWAY_HZ * time_s + phase)) % POSES


def render_frame(scene: Scene, time_s: float) -> np.ndarray:
    """The picture at `time_s` (0 ≤ time_s < 10): uint8 (224, 224, 3), RGB."""
    return render_frames(scene, np.array([time_s]))[0]


def render_frames(scene: Scene, times_s: np.ndarray) -> np.ndarray:
    """The pictures at `times_s` (T,) seconds: uint8 (T, 224, 224, 3), RGB."""
    rng = np.random.default_rng([scene.seed, 5, scene.index])
    empty = _backdrop(scene.backdrop)
    frames = np.empty((len(times_s), SIZE, SIZE, 3), np.uint8)
    frames[:] = np.clip(empty * scene.light, 0, 255)
    for part in scene.parts:
        if not part.visible:
            continue
        dx, dy = (int(v) for v in rng.integers(-4, 5, size=2))
        phase = float(rng.random())
        top, left = PLAYER_TOP + dy, PLAYER_LEFT[part.place] + dx
        box = np.s_[top : top + PLAYER_H, left : left + PLAYER_W]
        colour, cover = _poses(part.instrument, scene.costume)
        drawn = np.clip((empty[box] + cover * (colour - empty[box])) * scene.light, 0, 255).astype(np.uint8)
        poses = [_pose_at(part, float(time_s), phase) for time_s in times_s]
        frames[:, box[0], box[1]] = drawn[poses]
    return frames


assert set(EMBLEM_X) == set(PLAYER_LEFT) == set(PLACES)
assert len(TEXTURES) == len(EMBLEMS) == 8
