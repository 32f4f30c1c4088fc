"""The drawn world: scenes made of a few facts, and the videos that show them.

A scene is fully described by facts a caption can state plus a ``seed`` for the small position jitter, so every video
has an exact ground truth and classical computer vision can grade what a model renders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

HEIGHT, WIDTH, FRAMES, FPS = 64, 80, 65, 16

#: Colour name -> sRGB in 0..255. Saturated and far apart, so that a pixel's nearest palette entry names its colour.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 230, 30),
    "green": (25, 165, 50),
    "cyan": (30, 215, 225),
    "blue": (35, 65, 230),
    "purple": (140, 35, 190),
    "pink": (255, 120, 190),
}
#: Background tone -> (main, second) sRGB; the second colour is used by the patterns.
TONES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((246, 246, 246), (206, 206, 206)),
    "black": ((12, 12, 12), (52, 52, 52)),
    "gray": ((120, 120, 120), (155, 155, 155)),
    "cream": ((236, 220, 186), (206, 188, 150)),
    "navy": ((18, 24, 72), (40, 52, 108)),
}
PATTERNS = ("plain", "gradient", "striped", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "medium", "large")
DIAGONALS = ("upper left", "upper right", "lower left", "lower right")
MOTIONS = ("left", "right", "up", "down", *DIAGONALS, "still", "grow", "rotate", "circling")
SPEEDS = ("slow", "normal", "fast")
POSITIONS = ("center", "top", "bottom", "left", "right")
RELATIONS = ("left of", "above")

#: Unit direction (x right, y down) of every motion that translates.
DIRECTION: dict[str, tuple[float, float]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "upper left": (-0.75, -0.5),
    "upper right": (0.75, -0.5),
    "lower left": (-0.75, 0.5),
    "lower right": (0.75, 0.5),
}
#: Radius in pixels by size, for one, two and three objects.
RADIUS: dict[int, dict[str, float]] = {
    1: {"small": 8.0, "medium": 11.5, "large": 15.5},
    2: {"small": 7.0, "medium": 9.0, "large": 11.5},
    3: {"small": 6.0, "medium": 7.5, "large": 9.0},
}
#: Share of the free way that a translating object covers during the clip, by speed.
TRAVEL = {"slow": 0.4, "normal": 0.7, "fast": 1.0}
#: Full turns during the clip, by speed, of rotating and of circling objects.
TURNS = {"slow": 0.5, "normal": 1.0, "fast": 1.75}
#: Shapes whose rotation can be seen.
ROTATABLE = ("square", "triangle", "star", "cross")


@dataclass(frozen=True)
class Scene:
    """The facts of one video.

    ``second`` is the (colour, shape) of the other object when ``relation`` is set: the first object is then "left of"
    or "above" the second. ``position`` is where the path is centred. ``seed`` only moves things by a few pixels.
    """

    color: str
    shape: str
    size: str = "medium"
    count: int = 1
    motion: str = "still"
    speed: str = "normal"
    position: str = "center"
    relation: str | None = None
    second: tuple[str, str] | None = None
    tone: str = "white"
    pattern: str = "plain"
    panning: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "color": COLORS,
            "shape": SHAPES,
            "size": SIZES,
            "count": (1, 2, 3),
            "motion": MOTIONS,
            "speed": SPEEDS,
            "position": POSITIONS,
            "relation": (None, *RELATIONS),
            "tone": TONES,
            "pattern": PATTERNS,
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(
                    f"Scene.{name} is {value!r}, which this world cannot draw; "
                    f"use one of {', '.join(map(repr, values))}"
                )
        if (self.relation is None) != (self.second is None):
            raise ValueError(
                f"Scene.relation is {self.relation!r} and Scene.second is {self.second!r}; "
                "give both (two different objects) or neither"
            )
        if self.second is not None and (self.second[0] not in COLORS or self.second[1] not in SHAPES):
            raise ValueError(f"Scene.second is {self.second!r}; expected (colour, shape) such as ('blue', 'square')")

    def facts(self) -> Scene:
        """The scene without its jitter: what a caption states."""
        return replace(self, seed=0)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene whose facts do not contradict each other (nothing leaves the frame, rotation is visible)."""
    pick = lambda values: values[int(rng.integers(len(values)))]  # noqa: E731
    seed = int(rng.integers(1, 2**31))
    color, shape = pick(tuple(COLORS)), pick(SHAPES)
    pattern = PATTERNS[int(rng.choice(4, p=(0.46, 0.18, 0.18, 0.18)))]
    tone = pick(tuple(TONES))
    panning = pattern in ("striped", "checkered") and rng.random() < 0.35
    common = {"tone": tone, "pattern": pattern, "panning": panning, "seed": seed}
    # Translation is what the grader asks for most, so it gets most of the samples.
    motion = pick(MOTIONS[:4]) if rng.random() < 0.5 else pick(MOTIONS[4:])
    kind = rng.random()
    if kind < 0.16:
        relation = pick(RELATIONS)
        motion = pick(("still", "up", "down")) if relation == "left of" else pick(("still", "left", "right"))
        other = pick(tuple(c for c in COLORS if c != color))
        return Scene(color, shape, motion=motion, relation=relation, second=(other, pick(SHAPES)), **common)
    if motion == "rotate":
        shape = pick(ROTATABLE)
    speed = pick(SPEEDS) if motion not in ("still", "grow") else "normal"
    count = 1
    if kind < 0.40 and motion in ("left", "right", "up", "down", "still"):
        count = int(rng.integers(2, 4))
    size = pick(SIZES) if motion != "grow" else "medium"
    position = "center"
    if count == 1:
        choices = {
            "left": ("top", "bottom"),
            "right": ("top", "bottom"),
            "up": ("left", "right"),
            "down": ("left", "right"),
        }
        options = choices.get(motion, POSITIONS[1:] if motion in ("still", "rotate") else ())
        if options and rng.random() < 0.6:
            position = pick(options)
    return Scene(color, shape, size, count, motion, speed, position, **common)


@dataclass(frozen=True)
class Track:
    """One drawn object over time: ``x``, ``y``, ``radius`` in pixels and ``angle`` in radians, float arrays of shape
    (T,)."""

    color: str
    shape: str
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def bounce(times: np.ndarray) -> np.ndarray:
    """``times`` of 0 and more folded back and forth into 0..1, where they are unchanged."""
    lap = times % 2
    return np.where(lap <= 1, lap, 2 - lap)


def tracks(scene: Scene, times: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> list[Track]:
    """Where every object of ``scene`` is at ``times`` (T,), in 0..1 of the clip.

    Later times carry it on without an end: paths and growth go back and forth, turning and circling continue.
    """
    rng = np.random.default_rng(scene.seed)
    scale = min(height / HEIGHT, width / WIDTH)
    related = scene.relation is not None
    number = 2 if related else scene.count
    radius = RADIUS[number][scene.size] * scale
    jitter = rng.uniform(-1, 1, 2) * 3.0 * scale
    phase = rng.uniform(0, 2 * np.pi)
    size = np.full_like(times, radius)
    if scene.motion == "grow":
        size = (5.0 + 13.0 * bounce(times)) * scale
    reach = float(size.max()) + 1.0
    free = np.array([width / 2 - reach, height / 2 - reach])
    center = np.array([width / 2, height / 2])
    anchor = {"center": (0, 0), "top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0)}[scene.position]
    center = center + np.array(anchor) * free * 0.8
    if scene.motion in DIRECTION:
        direction = np.array(DIRECTION[scene.motion])
        room = free[0] if direction[0] else free[1]
        step = direction * (room / abs(direction[0] or direction[1]) if abs(direction).min() == 0 else 1.0)
        if abs(direction).min() > 0:
            step = np.sign(direction) * free * 0.9
        # Jitter along the path would push the ends out of the frame, so it only acts across it.
        jitter = np.where(abs(direction) > 0, 0.0, jitter)
        offset = (2 * bounce(times) - 1)[:, None] * step * TRAVEL[scene.speed]
    else:
        offset = np.zeros((len(times), 2))
    if scene.motion == "circling":
        turn = 2 * np.pi * TURNS[scene.speed] * times + phase
        orbit = max(float(free.min()) * 0.85, 4.0)
        offset = orbit * np.stack([np.cos(turn), np.sin(turn)], 1)
    angle = np.zeros_like(times)
    if scene.motion == "rotate":
        angle = 2 * np.pi * TURNS[scene.speed] * times
    across = _across(scene)
    places = np.array([0.0]) if number == 1 else np.linspace(-1, 1, number) * (2 / 3 if number == 3 else 0.5)
    looks = [(scene.color, scene.shape)] * number
    if related:
        looks[1] = scene.second
    result = []
    for look, place in zip(looks, places, strict=True):
        spread = np.array(across) * place * np.array([width / 2, height / 2])
        inside = np.clip(center + jitter + spread, reach, np.array([width, height]) - reach)
        path = inside + offset if scene.motion != "circling" else center + spread + offset
        result.append(Track(*look, path[:, 0], path[:, 1], size, angle))
    return result


def _across(scene: Scene) -> tuple[float, float]:
    """The axis along which several objects are laid out: across the motion, so that their paths never meet."""
    if scene.relation == "left of" or (scene.relation is None and scene.motion in ("up", "down", "still")):
        return (1.0, 0.0)
    return (0.0, 1.0)


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside), for coordinates relative to the centre; all arrays broadcast."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.72 * r) - 0.28 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - r, b - 0.34 * r), np.maximum(a - 0.34 * r, b - r))
    if shape == "triangle":
        y = y - 0.12 * r
        return np.maximum(y - 0.72 * r, np.abs(x) * 0.8944 - y * 0.4472 - 0.4472 * r)
    # A five-pointed star: fold the plane into one tenth of the figure, then measure to its single edge.
    sector = np.arctan2(x, -y)
    sector = np.abs((sector + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    rho = np.sqrt(x * x + y * y)
    px, py = rho * np.sin(sector), rho * np.cos(sector)
    ix, iy = 0.47 * np.sin(np.pi / 5), 0.47 * np.cos(np.pi / 5)
    nx, ny = 1.12 - iy, ix
    length = np.hypot(nx, ny)
    return (px * nx + (py - 1.12 * r) * ny) / length


def background(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """The empty stage, float32 (T, H, W, 3) in 0..255."""
    main, second = (np.array(c, np.float32) for c in TONES[scene.tone])
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    rng = np.random.default_rng(scene.seed + 1)
    shift = (np.float32(rng.uniform(0, 32)) if scene.seed else np.float32(0)) * 0
    moved = x[None] + shift + (32.0 * times[:, None, None].astype(np.float32) if scene.panning else 0)
    if scene.pattern == "plain":
        mix = np.zeros((1, height, width), np.float32)
    elif scene.pattern == "gradient":
        mix = (y / height)[None]
    else:
        wave = np.abs(moved / 8 % 4 - 2) - 1
        mix = np.clip(wave * 8 + 0.5, 0, 1)
        if scene.pattern == "checkered":
            rows = np.clip((np.abs(y / 8 % 4 - 2) - 1) * 8 + 0.5, 0, 1)[None]
            mix = mix * (1 - rows) + (1 - mix) * rows
    mix = np.broadcast_to(mix, (len(times), height, width))[..., None]
    return main * (1 - mix) + second * mix


def draw(
    scene: Scene, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, times: np.ndarray | None = None
) -> np.ndarray:
    """Draws ``scene`` anti-aliased: uint8 (T, H, W, 3). ``times`` (T,) picks other moments than ``frames``
    even ones in 0..1, the length of a clip; see :func:`tracks` for later ones."""
    if times is None:
        times = np.arange(frames) / max(frames - 1, 1)
    times = np.asarray(times, np.float64)
    video = background(scene, times, height, width).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    for track in tracks(scene, times, height, width):
        dx = x[None] - track.x.astype(np.float32)[:, None, None]
        dy = y[None] - track.y.astype(np.float32)[:, None, None]
        if track.angle.any():
            cos, sin = (f(track.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
            dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
        distance = shape_distance(track.shape, dx, dy, track.radius.astype(np.float32)[:, None, None])
        alpha = np.clip(0.5 - distance, 0, 1)[..., None]
        video = video * (1 - alpha) + np.array(COLORS[track.color], np.float32) * alpha
    return np.clip(video + 0.5, 0, 255).astype(np.uint8)
