"""Who is decayed, and how fast it learns: multipliers for groups of variables, and the reason for each."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
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
    key: Any = None  # of the variable itself, where it is known
    index: int | None = None  # of a variable from a file
    reason: str = ""  # that the file gives

    def __call__(self, variable: Any, key: Any) -> bool:
        if self.kind == "predicate":
            return bool(self.value(variable))
        if self.kind == "variable":
            return key == self.key if self.key is not None else path_of(variable) == self.value
        return re.search(self.value, path_of(variable) if self.kind == "path" else variable.name) is not None

    def __str__(self) -> str:
        if self.kind == "variable":
            return self.reason or "listed"
        if self.kind == "predicate":
            return f"predicate {getattr(self.value, '__name__', type(self.value).__name__)}"
        return f"{self.kind} matches {self.value!r}"


def find(variables: Sequence[Any], path: str, index: int | None) -> int | None:
    """The index of the variable that had this path and index when it was saved; None: it is not there.

    A model that is loaded may have other paths: without the model's own name in front, or with layers numbered anew.
    So the index counts, if there is one and the variable has the same name, and else the path, or how it ends.
    """
    paths = [path_of(v) for v in variables]
    name = path.rpartition("/")[2]
    if index is not None and index < len(paths) and paths[index].rpartition("/")[2] == name:
        return index
    if path in paths:
        return paths.index(path)
    ends = [i for i, p in enumerate(paths) if p.endswith(f"/{path}") or path.endswith(f"/{p}")]
    return ends[0] if len(ends) == 1 else None


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
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} {text!r} is no regular expression: {error}") from error
    return text


def multiplier(name: str, value: float) -> float:
    if name not in MULTIPLIERS:
        raise ValueError(f"{name!r} has no multiplier; those that have are {', '.join(MULTIPLIERS)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"the multiplier of {name} must be a finite number of at least 0. Received: {name}={value!r}")
    return number


def serialize(groups: Iterable[Group], variables: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """As a config keeps them; with `variables`, pairs of variable and key, as those that each group takes."""
    config = []
    for group in groups:
        if variables:
            reasons = [(path_of(v), i, group.reason(v, key)) for i, (v, key) in enumerate(variables)]
            chosen = {"variables": [list(r) for r in reasons if r[2] is not None]}
        else:
            chosen = {"selectors": [[s.kind, _value(s, _serialize_predicate)] for s in group.selectors]}
        config.append(chosen | {"multipliers": group.multipliers, "exclusion": group.exclusion})
    return config


def deserialize(config: Iterable[dict[str, Any]], custom_objects: dict[str, Any] | None = None) -> list[Group]:
    def load(value: Any) -> Any:
        return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)

    groups = []
    for g in config:
        chosen = [Selector(kind, _value(Selector(kind, value), load)) for kind, value in g.get("selectors", [])]
        chosen += [Selector("variable", path, index=i, reason=reason) for path, i, reason in g.get("variables", [])]
        groups.append(Group(chosen, dict(g["multipliers"]), g["exclusion"]))
    return groups


def _serialize_predicate(predicate: Callable[[Any], bool]) -> Any:
    if keras.saving.get_registered_object(keras.saving.get_registered_name(predicate)) is None:
        raise ValueError(
            f"the predicate {predicate} is saved as the variables that it takes once the optimizer is built, and "
            "before only if it is registered by keras.saving.register_keras_serializable"
        )
    return keras.saving.serialize_keras_object(predicate)


def _value(selector: Selector, of_predicate: Callable[[Any], Any]) -> Any:
    return of_predicate(selector.value) if selector.kind == "predicate" else selector.value
