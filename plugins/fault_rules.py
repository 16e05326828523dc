"""When a fault strikes: rules as the user writes them, and what becomes of a request that meets them. No nbdkit in here.

The language of the rules is explained in fault.py.

Rules:
1. The same requests in the same order meet the same faults: chance comes from the seed, the rule and how many requests the
   rule has seen.
2. A request meets the rules in the order they were added. `delay` and `hang` only make it wait; the first of the others
   decides, and those after it do not see the request.
"""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from control import parse_probability, parse_size
from tally import Tally
from volatile_disk import chance

if TYPE_CHECKING:
    from collections.abc import Callable

_CHANGES: Final = frozenset({"write", "zero", "trim"})
_RANGED: Final = _CHANGES | {"read", "extents", "cache", "fua", "fast-zero"}
KINDS: Final = _RANGED | {"flush", "connect", "open"}

# Does the first so many bytes of a request, or fails.
CarryOut: TypeAlias = "Callable[[int], None]"

_NO_VALUE: Final = ("hang", "lie", "crash")
_WHEN: Final = ("before", "unanswered", "answered")
ACTIONS: Final = {
    "error": KINDS,
    "delay": KINDS,
    "hang": KINDS,
    "disconnect": KINDS,
    "crash": KINDS,
    "torn": _CHANGES,
    "short": _CHANGES | {"extents"},
    "lie": _CHANGES | {"flush", "fua"},
}


@dataclass
class Rule:
    """One fault, and when: the value is an errno, seconds, bytes or a moment, as the action has it."""

    number: int
    text: str
    kinds: frozenset[str]
    action: str
    value: Any
    start: int
    end: float
    first: float
    times: float
    probability: float
    seen: int = 0
    hits: int = 0

    def fires(self, seed: int, kind: str, offset: int, length: int) -> bool:
        """Whether this request, which is counted, gets the fault."""
        if kind not in self.kinds or (kind in _RANGED and not self.start - length < offset < self.end):
            return False
        self.seen += 1
        if self.seen < self.first or self.hits >= self.times or chance(seed, self.number, self.seen) >= self.probability:
            return False
        self.hits += 1
        return True


def parse_rule(number: int, text: str) -> Rule:
    """What the user wrote; raises ValueError."""
    kinds, *words = text.split() or [""]
    settings = {name: value for name, _, value in (word.partition("=") for word in words)}
    actions = [name for name in settings if name in ACTIONS]
    if len(actions) != 1 or len(settings) != len(words):
        raise ValueError(f"fault={text}: needs one action of {', '.join(ACTIONS)}, and each option once")
    action = actions[0]
    chosen = KINDS if kinds == "any" else frozenset(kinds.split(","))
    if wrong := sorted(chosen - ACTIONS[action]):
        raise ValueError(
            f"fault={text}: there is no {action} of {', '.join(wrong)}, only of {', '.join(sorted(ACTIONS[action]))}"
        )
    try:
        rule = Rule(
            number,
            text,
            chosen,
            action,
            value=_value(action, settings.pop(action)),
            start=parse_size(settings.pop("from", "0")),
            end=parse_size(settings.pop("to")) if "to" in settings else inf,
            first=_number(settings.pop("at", "1")),
            times=_number(settings.pop("times")) if "times" in settings else inf,
            probability=parse_probability(settings.pop("p", "1")),
        )
    except ValueError as error:
        raise ValueError(f"fault={text}: {error}") from None
    if settings:
        raise ValueError(f"fault={text}: no such option: {', '.join(settings)}; there are from, to, at, times and p")
    return rule


def _number(text: str, kind: type[int | float] = int) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < inf:
        raise ValueError(f"{text!r} is no number")
    return value


def _value(action: str, text: str) -> float | str | None:
    if action in _NO_VALUE:
        if text:
            raise ValueError(f"{action} takes no value")
        return None
    if action == "error":
        if not isinstance(getattr(errno, text, None), int):
            raise ValueError(f"{text!r} is no error's name, as EIO is")
        return int(getattr(errno, text))
    if action == "disconnect":
        if text not in _WHEN:
            raise ValueError(f"disconnect is one of {', '.join(_WHEN)}")
        return text
    if action == "delay":
        return _number(text, float)
    return parse_size(text) if text or action == "short" else None


class Faults:
    """The rules that hold, what hangs, and what is counted.

    `log` takes what is worth a line. `inflict` is handed the rule that decides, a number in [0, 1) for it, and the request.
    """

    def __init__(self, seed: int, log: Callable[[str], object], inflict: Callable[[Rule, float, CarryOut, int], None]) -> None:
        self._seed, self._log, self._inflict = seed, log, inflict
        self._rules: list[Rule] = []
        self._added = 0
        self._changed = threading.Condition()
        self._releases = 0
        self._hanging = 0
        self._tally = Tally()

    def add(self, text: str) -> dict[str, int]:
        """Add a rule behind the others; its number. Raises ValueError."""
        with self._changed:
            self._rules.append(parse_rule(self._added + 1, text))
            self._added += 1
            return {"rule": self._added}

    def remove(self, number: str) -> dict[str, int]:
        """Remove one rule; raises ValueError."""
        with self._changed:
            left = [rule for rule in self._rules if str(rule.number) != number]
            if len(left) == len(self._rules):
                raise ValueError(f"there is no rule {number!r}")
            self._rules = left
            return {"left": len(left)}

    def clear(self, _rest: str = "") -> dict[str, int]:
        """Remove all rules and let go what hangs."""
        with self._changed:
            self._rules = []
            return self.release()

    def release(self, _rest: str = "") -> dict[str, int]:
        """Let go what hangs now."""
        with self._changed:
            self._releases += 1
            self._changed.notify_all()
            return {"released": self._hanging}

    def counts(self) -> dict[str, object]:
        """What has come in, what of it is not answered, and what each rule has seen and hit."""
        with self._changed:
            return {
                "seed": self._seed,
                **self._tally.counts(),
                "hanging": self._hanging,
                "faults": [
                    {"rule": rule.number, "fault": rule.text, "seen": rule.seen, "hits": rule.hits} for rule in self._rules
                ],
            }

    def request(self, kind: str, carry_out: CarryOut, offset: int = 0, length: int = 0) -> None:
        """Do what was asked for, or what the rules say."""
        with self._tally.request(kind, length):
            with self._changed:
                waits, last = self._met(kind, offset, length)
                lot = chance(self._seed, "lot", last.number, last.hits) if last else 0
            for rule in waits:
                self._log(f"fault: rule {rule.number} ({rule.text}) holds up {kind} of {length} bytes at {offset}")
                self._wait(rule)
            if last:
                self._log(f"fault: rule {last.number} ({last.text}) hits {kind} of {length} bytes at {offset}")
                self._inflict(last, lot, carry_out, length)
            else:
                carry_out(length)

    def _met(self, kind: str, offset: int, length: int) -> tuple[list[Rule], Rule | None]:
        waits: list[Rule] = []
        for rule in self._rules:
            if rule.fires(self._seed, kind, offset, length):
                if rule.action not in {"delay", "hang"}:
                    return waits, rule
                waits.append(rule)
        return waits, None

    def _wait(self, rule: Rule) -> None:
        if rule.action == "delay":
            time.sleep(rule.value)
            return
        with self._changed:
            self._hanging += 1
            releases = self._releases
            self._changed.wait_for(lambda: self._releases > releases)
            self._hanging -= 1
