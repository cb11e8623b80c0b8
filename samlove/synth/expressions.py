"""LAVS-synth's expressions, modelled on patterns counted in Ref-AVS, and the cues that each of them needs.

An expression is a list of conditions, each tagged with the cues it is read from: sight, sound, or time (the order and
duration of sounds). It is kept only if exactly one thing meets all conditions. It needs a cue if, without the
conditions that use this cue, the remaining ones no longer single out one thing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from samlove.synth.scene import Scene

Things = list[int]  # indices into scene.things
CUES = ("sight", "sound", "time")
LEFT, RIGHT = 0.42, 0.58  # fractions of the width: a thing that starts further out is on that side
# How often Ref-AVS uses each kind of expression, in percent: counted by words in its metadata.csv, and divided if
# several templates here stand for one kind there ("the object making a sound by being played by the man on the left" is
# of the kind "the sounding object on the left").
SHARES = {
    "category": 4.5, "colour": 4.5, "colour category": 4.5, "size category": 4.0, "place": 1.3, "category place": 1.3,
    "colour place": 1.3, "beside": 1.5, "sounding": 2.5, "source": 0.5, "sounding place": 9.0, "sounding beside": 9.0,
    "sounding category": 17.5, "sounding colour": 17.5, "loudest": 5.6, "lowest": 4.0, "always": 3.6, "first": 3.5,
    "longest": 1.7, "last": 0.7, "silent": 0.6, "silent place": 0.2, "silent category": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    cues: tuple[str, ...]
    choose: Callable[[Things], Things]  # of the given things, those that meet the condition


@dataclass(frozen=True)
class Expression:
    text: str
    template: str
    target: int  # index into scene.things
    sight: bool
    sound: bool
    time: bool


class Facts:
    """Properties of each thing in a scene; positions are those at second 0. A thing that is out of sight then has no
    place."""

    def __init__(self, scene: Scene) -> None:
        self.things = scene.things
        self.x = np.array([np.nan if thing.late else thing.path[0, 0] for thing in scene.things])
        self.sounds = np.array([thing.sounding.any() for thing in scene.things])
        self.length = np.array([thing.sounding.sum() for thing in scene.things])
        self.first = np.array([int(np.argmax(thing.sounding)) for thing in scene.things])

    def having(self, name: str, value: str) -> Condition:
        return Condition(("sight",), lambda among: [k for k in among if getattr(self.things[k], name) == value])

    def place(self, side: str) -> Condition:
        left = side == "left"
        return Condition(
            ("sight",), lambda among: [k for k in among if (self.x[k] < LEFT if left else self.x[k] > RIGHT)]
        )

    def beside(self, side: str, other: int) -> Condition:
        sign = 1 if side == "right" else -1
        near = 0.1  # of the width: for a smaller distance, the side is not obvious
        return Condition(
            ("sight",), lambda among: [k for k in among if k != other and sign * (self.x[k] - self.x[other]) > near]
        )

    def sounding(self, yes: bool = True) -> Condition:
        return Condition(("sound",), lambda among: [k for k in among if self.sounds[k] == yes])

    def most(self, value: str, sign: int, margin: float, cues: tuple[str, ...]) -> Condition:
        """Of the sounding things, the one whose value is the greatest (sign 1) or least (-1) by at least a margin.

        Pitch and loudness are compared as log2 of their ratio, times as differences in seconds.
        """

        def choose(among: Things) -> Things:
            heard = [k for k in among if self.sounds[k]]
            if len(heard) < 2:
                return heard
            amounts = {k: sign * self._amount(value, k) for k in heard}
            best, second = sorted(heard, key=lambda k: -amounts[k])[:2]
            return [best] if amounts[best] - amounts[second] >= margin else []

        return Condition(cues, choose)

    def _amount(self, value: str, k: int) -> float:
        if value in ("pitch", "loudness"):
            return float(np.log2(getattr(self.things[k], value)))
        return float(getattr(self, value)[k])

    def always(self) -> Condition:
        return Condition(
            ("sound", "time"), lambda among: [k for k in among if self.length[k] == len(self.things[k].sounding)]
        )


def _sentences(scene: Scene) -> Iterator[tuple[str, str, list[Condition]]]:
    """(template, text, conditions) of every candidate expression for a scene."""
    facts = Facts(scene)
    hear = [facts.sounding()]
    yield "sounding", "The sounding object.", hear
    yield "source", "The source of the sound.", hear
    yield "silent", "The object that didn't make any sound.", [facts.sounding(False)]
    if facts.sounds.sum() > 1:
        yield "loudest", "The object making the loudest sound.", [facts.most("loudness", 1, 1.0, ("sound",))]
        yield "lowest", "The object making the lowest sound.", [facts.most("pitch", -1, 0.5, ("sound",))]
        longest = facts.most("length", 1, 2, ("sound", "time"))
        yield "longest", "The object making the longest sound duration.", [longest]
        yield "first", "The first object to make a sound.", [facts.most("first", -1, 2, ("sound", "time"))]
        yield "last", "The last object to make a sound.", [facts.most("first", 1, 2, ("sound", "time"))]
    yield "always", "The object that keeps making sound at all times.", [facts.always()]
    for side in ("left", "right"):
        yield "place", f"The object on the {side}.", [facts.place(side)]
        yield "sounding place", f"The sounding object on the {side}.", [facts.place(side), *hear]
        yield "silent place", f"The silent object on the {side}.", [facts.place(side), facts.sounding(False)]
    for k, thing in enumerate(scene.things):
        kind, colour = facts.having("category", thing.category), facts.having("colour", thing.colour)
        yield "category", f"The {thing.category}.", [kind]
        yield "colour", f"The {thing.colour} object.", [colour]
        yield "colour category", f"The {thing.colour} {thing.category}.", [colour, kind]
        if thing.size != "medium":
            yield "size category", f"The {thing.size} {thing.category}.", [facts.having("size", thing.size), kind]
        yield "sounding category", f"The sounding {thing.category}.", [kind, *hear]
        yield "silent category", f"The silent {thing.category}.", [kind, facts.sounding(False)]
        yield "sounding colour", f"The sounding {thing.colour} object.", [colour, *hear]
        for side in ("left", "right"):
            yield "category place", f"The {thing.category} on the {side}.", [kind, facts.place(side)]
            yield (
                "colour place",
                f"The {thing.colour} {thing.category} on the {side}.",
                [colour, kind, facts.place(side)],
            )
            if sum(other.category == thing.category for other in scene.things) == 1:  # the reference must be unique
                beside = facts.beside(side, k)
                yield "beside", f"The object on the {side} of the {thing.category}.", [beside]
                yield "sounding beside", f"The sounding object on the {side} of the {thing.category}.", [beside, *hear]


def _meeting(conditions: list[Condition], among: Things) -> Things:
    # Sight comes first: a superlative about sound compares only what matches by sight, as a reader understands it.
    for condition in conditions:
        among = condition.choose(among)
    return among


def expressions(scene: Scene) -> list[Expression]:
    """Every expression that fits exactly one thing in a scene, with the cues it needs; each text once."""
    everything = list(range(len(scene.things)))
    found: dict[str, Expression] = {}
    for template, text, conditions in _sentences(scene):
        target = _meeting(conditions, everything)
        if len(target) != 1:
            continue
        needed = {cue: len(_meeting([c for c in conditions if cue not in c.cues], everything)) != 1 for cue in CUES}
        if any(needed.values()):  # otherwise it is redundant: no single cue is needed
            found.setdefault(text, Expression(text, template, target[0], **needed))
    return list(found.values())
