"""Who is decayed, and how fast it learns: multipliers for groups of variables, and the reason for each."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import keras

MULTIPLIERS = ("lr", "weight_decay", "l1", "l2", "proximal_l1", "proximal_l2")


def path_of(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name


@dataclass(frozen=True)
class Selector:
    """Some variables: those whose `path` or `name` contains a match of a regular expression, one, or by a predicate."""

    kind: str  # "path", "name", "variable" or "predicate"
    value: Any  # a pattern, the path of the variable, or a callable
    key: Any = None  # of the variable itself, where it is known: paths need not be unique

    def __call__(self, variable: Any, key: Any) -> bool:
        if self.kind == "predicate":
            return bool(self.value(variable))
        if self.kind == "variable":
            return key == self.key if self.key is not None else path_of(variable) == self.value
        return re.search(self.value, path_of(variable) if self.kind == "path" else variable.name) is not None

    def __str__(self) -> str:
        if self.kind == "variable":
            return "listed"
        if self.kind == "predicate":
            return f"predicate {getattr(self.value, '__name__', type(self.value).__name__)}"
        return f"{self.kind} matches {self.value!r}"


@dataclass
class Group:
    """The variables that any of `selectors` takes, and what their hyperparameters are multiplied by."""

    selectors: list[Selector]
    multipliers: dict[str, float]
    exclusion: bool = False  # made by exclude_from_weight_decay, of which the last call counts

    def reason(self, variable: Any, key: Any) -> str | None:
        """Why the variable belongs to the group; None: it does not."""
        return next((str(s) for s in self.selectors if s(variable, key)), None)


@dataclass
class Choice:
    """What holds for one variable."""

    multipliers: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MULTIPLIERS, 1.0))
    reasons: list[str] = field(default_factory=list)


def choose(groups: Iterable[Group], variable: Any, key: Any) -> Choice:
    """A later group overrides the multipliers that it names; an exclusion stands above all groups."""
    choice = Choice()
    for group in sorted(groups, key=lambda g: g.exclusion):
        reason = group.reason(variable, key)
        if reason is not None:
            choice.multipliers |= group.multipliers
            choice.reasons.append(f"excluded: {reason}" if group.exclusion else reason)
    return choice


def selectors(variables: Any, key_of: Callable[[Any], Any]) -> list[Selector]:
    """Of a variable, a regular expression on the path, a predicate, or a list of those."""
    if not isinstance(variables, (list, tuple, set)):
        variables = [variables]
    found = []
    for one in variables:
        if isinstance(one, str):
            found.append(Selector("path", pattern("path", one)))
        elif hasattr(one, "shape"):
            found.append(Selector("variable", path_of(one), key_of(one)))
        elif callable(one):
            found.append(Selector("predicate", one))
        else:
            raise ValueError(f"variables are chosen by variable, regular expression or predicate, but found {one!r}")
    return found


def pattern(name: str, text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{name} {text!r} is no regular expression: {error}") from error
    return text


def multiplier(name: str, value: float) -> float:
    if name not in MULTIPLIERS:
        raise ValueError(f"{name!r} has no multiplier; those that have are {', '.join(MULTIPLIERS)}")
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"the multiplier of {name} must be finite and at least 0. Received: {name}={value}")
    return float(value)


def serialize(groups: Iterable[Group], variables: Iterable[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """As a config keeps them; with `variables`, pairs of variable and key, a predicate becomes those it takes."""
    variables = list(variables)
    config = []
    for group in groups:
        chosen = []
        for s in group.selectors:
            if s.kind != "predicate":
                chosen.append([s.kind, s.value])
            elif variables:
                chosen += [["variable", path_of(v)] for v, key in variables if s(v, key)]
            else:
                chosen.append([s.kind, keras.saving.serialize_keras_object(s.value)])
        config.append({"variables": chosen, "multipliers": group.multipliers, "exclusion": group.exclusion})
    return config


def deserialize(config: Iterable[dict[str, Any]], custom_objects: dict[str, Any] | None = None) -> list[Group]:
    def value_of(kind: str, value: Any) -> Any:
        if kind != "predicate":
            return value
        return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)

    return [
        Group(
            [Selector(kind, value_of(kind, value)) for kind, value in g["variables"]], g["multipliers"], g["exclusion"]
        )
        for g in config
    ]
