"""Conversion of saved optimizer documents between ``state_dict()``'s layout and states by parameter.

Nothing is decoded here, and no array is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gockpt.state.value_decoder import is_mapping, items
from gockpt.state.value_encoder import join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.state.saved_document import SavedOptimizer
    from gockpt.state.value_encoder import Json

__all__ = ["Standard", "reordered_groups", "standard_form", "torch_form"]

STANDARD = ("state", "param_groups")


@dataclass(frozen=True, slots=True)
class Standard:
    """Parts of a form in torch's own layout.

    Attributes:
        saved: The optimizer, with the states and values of the form.
        beyond: Keys of the form that torch's own ``load_state_dict`` ignores.
    """

    saved: SavedOptimizer
    beyond: tuple[str, ...]


def standard_form(saved: SavedOptimizer) -> Standard | None:
    """Return the parts of an optimizer's form; ``None`` if it isn't in torch's layout."""
    numbers = _numbers(saved)
    if numbers is None or saved.form is None:
        return None
    top = dict(_pairs(saved.form))
    states: dict[str, Json] = {}
    values: list[tuple[Json, Json]] = []
    for key, value in items(top["state"]):
        if type(key) is int and key in numbers:
            states[numbers[key]] = value
        else:
            values.append((key, value))
    documents = top["param_groups"] if isinstance(top["param_groups"], list) else []
    groups = tuple(
        replace(group, options=join([pair for pair in items(document) if pair[0] != "params"]))
        for group, document in zip(saved.groups, documents, strict=True)
    )
    beyond = tuple(str(key) for key in top if key not in STANDARD)
    return Standard(replace(saved, groups=groups, states=states, values=join(values), more={}), beyond)


def torch_form(saved: SavedOptimizer) -> Json:
    """Return the document of torch's own ``state_dict()``, with the keys that an override added."""
    numbers: dict[str, int] = {}
    groups: list[Json] = []
    for group in saved.groups:
        ids: list[Json] = [numbers.setdefault(fqn, len(numbers)) for fqn in group.params]
        groups.append(join([*items(group.options), ("params", ids)]))
    states = [(numbers[fqn], state) for fqn, state in saved.states.items() if fqn in numbers]
    state = join([*states, *items(saved.values)])
    return join([("state", state), ("param_groups", groups), *items(saved.more)])


def reordered_groups(form: Json, order: Sequence[int]) -> Json | None:
    """Return a form with its param groups in another order; ``None`` if it isn't in torch's layout."""
    pairs = _pairs(form)
    groups = dict(pairs).get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(order):
        return None
    moved: Json = [groups[source] for source in order]
    return join([(key, moved if key == "param_groups" else value) for key, value in pairs])


def _pairs(form: Json) -> list[tuple[Json, Json]]:
    return (
        [(key if isinstance(key, str) else str(key), value) for key, value in items(form)]
        if is_mapping(form)
        else []
    )


def _numbers(saved: SavedOptimizer) -> dict[int, str] | None:
    """Return the parameter of each number in a form; ``None`` if it numbers no parameters."""
    top = dict(_pairs(saved.form))
    groups = top.get("param_groups")
    if not is_mapping(top.get("state")) or not isinstance(groups, list) or len(groups) != len(saved.groups):
        return None
    numbers: dict[int, str] = {}
    for document, group in zip(groups, saved.groups, strict=True):
        listed = dict(_pairs(document)).get("params")
        if isinstance(listed, dict):  # a long list, packed into an array: numbered consecutively
            listed = list(range(len(numbers), len(numbers) + len(group.params)))
        if not isinstance(listed, list) or len(listed) != len(group.params):
            return None
        for number, fqn in zip(listed, group.params, strict=True):
            if type(number) is not int:
                return None
            numbers[number] = fqn
    return numbers
