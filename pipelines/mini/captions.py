"""Captions of scenes: a small grammar with several phrasings, its vocabulary, and the parser that reads the facts
back."""

from __future__ import annotations

import re

import numpy as np

from .world import COLORS, DIAGONALS, PATTERNS, SHAPES, TONES, Scene

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
NUMBERS = {2: "two", 3: "three"}
#: Motion -> phrasings; the singular verb is written with an s that plural subjects drop.
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "slides to the left", "drifts leftward"),
    "right": ("moves right", "slides to the right", "drifts rightward"),
    "up": ("moves up", "rises", "drifts upward"),
    "down": ("moves down", "sinks", "drifts downward"),
    **{d: (f"moves diagonally to the {d}", f"drifts toward the {d} corner") for d in DIAGONALS},
    "still": ("stays still", "rests", "does not move"),
    "grow": ("grows", "gets bigger"),
    "rotate": ("rotates", "spins in place", "turns around itself"),
    "circling": ("moves in a circle", "circles around", "orbits the middle"),
}
SPEED_WORDS = {"slow": ("slowly",), "normal": ("",), "fast": ("quickly", "fast")}
POSITION_PHRASES = {
    "center": ("",),
    "top": ("near the top", "at the top"),
    "bottom": ("near the bottom", "at the bottom"),
    "left": ("near the left side", "at the left side"),
    "right": ("near the right side", "at the right side"),
}
PATTERN_WORDS = {
    "plain": ("", "plain"),
    "gradient": ("gradient",),
    "striped": ("striped",),
    "checkered": ("checkered",),
}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("", "medium"), "large": ("large", "big")}
TEMPLATES = (
    "{subject} {action} on {background}",
    "on {background}, {subject} {action}",
    "{subject} {action}, {background}",
)

_PLURAL_VERBS = {"does": "do"}
_SPACES = re.compile(r"\s+")


def _clean(text: str) -> str:
    return _SPACES.sub(" ", text).replace(" ,", ",").strip()


def _plural(phrase: str) -> str:
    verb, *rest = phrase.split(" ")
    return " ".join([_PLURAL_VERBS.get(verb, verb[:-1] if verb.endswith("s") else verb), *rest])


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One English sentence with every fact of ``scene``; ``rng`` picks among phrasings, None takes the first of
    each."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))] if rng is not None else options[0]

    size, speed = pick(SIZE_WORDS[scene.size]), pick(SPEED_WORDS[scene.speed])
    action = pick(MOTION_PHRASES[scene.motion])
    noun = PLURALS[scene.shape] if scene.count > 1 else scene.shape
    look = _clean(f"{size} {scene.color} {noun}")
    subject = f"{NUMBERS[scene.count]} {look}" if scene.count > 1 else _article(look)
    if scene.second is not None:
        subject = f"{subject} {scene.relation} {_article(' '.join(scene.second))}"
    if scene.count > 1:
        action = _plural(action)
    action = f"{action} {speed} {pick(POSITION_PHRASES[scene.position])}"
    panning = "panning" if scene.panning else ""
    background = _article(_clean(f"{panning} {pick(PATTERN_WORDS[scene.pattern])} {scene.tone} background"))
    return _clean(pick(TEMPLATES).format(subject=subject, action=action, background=background))


def _words(*groups: object) -> list[str]:
    found: dict[str, None] = {}
    for text in groups:
        for word in str(text).replace(",", " , ").split():
            found.setdefault(word)
    return list(found)


def vocabulary() -> list[str]:
    """Every word of the grammar in a fixed order; the tokenizer's ids follow it."""
    phrases = [p for options in MOTION_PHRASES.values() for p in options]
    spatial = [p for options in POSITION_PHRASES.values() for p in options]
    return _words(
        *COLORS,
        *TONES,
        *SHAPES,
        *PLURALS.values(),
        *PATTERNS,
        *(w for words in SIZE_WORDS.values() for w in words),
        *NUMBERS.values(),
        *phrases,
        *(_plural(p) for p in phrases),
        *(w for words in SPEED_WORDS.values() for w in words),
        *spatial,
        "left of above a an on background panning ,",
    )


_TONE = "|".join(TONES)
_BACKGROUND = re.compile(rf"\ban? (panning )?(?:({'|'.join(PATTERNS)}) )?({_TONE}) background\b")
_NOUNS = {**{s: s for s in SHAPES}, **{p: s for s, p in PLURALS.items()}}
_NOUN = "|".join(sorted(_NOUNS, key=len, reverse=True))
_SUBJECT = re.compile(rf"\b(an?|two|three) (?:(small|little|medium|large|big) )?({'|'.join(COLORS)}) ({_NOUN})\b")


def parse(text: str) -> Scene:
    """Reads the facts of a caption back (``seed`` 0); raises ``ValueError`` naming what it cannot find."""
    plain = _clean(text.lower().rstrip(". "))
    background = _BACKGROUND.search(plain)
    subjects = _SUBJECT.findall(plain)
    if background is None or not subjects:
        missing = "subject (such as 'a small red circle')"
        if background is None:
            missing = "background (such as 'a striped gray background')"
        raise ValueError(
            f"no {missing} in the caption {text!r}; captions follow the grammar of dit_accel.pipelines.mini.captions"
        )
    number, size_word, color, noun = subjects[0]
    size = next((s for s, words in SIZE_WORDS.items() if size_word and size_word in words), "medium")
    facts: dict[str, object] = {"size": size, "count": {"two": 2, "three": 3}.get(number, 1)}
    relation = re.search(r"\b(left of|above)\b", plain)
    if relation and len(subjects) > 1:
        facts |= {"relation": relation[1], "second": (subjects[1][2], _NOUNS[subjects[1][3]])}
    rest = _SUBJECT.sub(" ", _BACKGROUND.sub(" ", plain))
    facts["motion"] = _longest(rest, {m: (*p, *map(_plural, p)) for m, p in MOTION_PHRASES.items()})
    if facts["motion"] is None:
        raise ValueError(
            f"no motion in the caption {text!r}; use one of {', '.join(p[0] for p in MOTION_PHRASES.values())}"
        )
    facts["speed"] = _longest(rest, SPEED_WORDS) or "normal"
    facts["position"] = _longest(rest, POSITION_PHRASES) or "center"
    return Scene(
        color,
        _NOUNS[noun],
        tone=background[3],
        pattern=background[2] or "plain",
        panning=background[1] is not None,
        **facts,
    )


def _longest(text: str, table: dict[str, tuple[str, ...]]) -> str | None:
    """The key of the longest phrase of ``table`` in ``text``: 'moves in a circle' must win over a shorter match."""
    found = [(len(p), key) for key, options in table.items() for p in options if p and re.search(rf"\b{p}\b", text)]
    return max(found)[1] if found else None
