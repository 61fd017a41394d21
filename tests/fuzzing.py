"""Shared by the tests that try random inputs made by hypothesis.

Each test counts how many of the inputs were accepted. So no test can pass by refusing everything.
"""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def fuzz_settings(n_trials: Callable[[int, int], int]) -> settings:
    """Some dozens of inputs, always the same; with --nightly, thousands of random ones.

    n_trials: the fixture of conftest.py.
    """
    count = n_trials(60, 2500)
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, suppress_health_check=quiet, database=None,
        derandomize=count < 100,
    )  # fmt: skip


class Count:
    """How many inputs there were, and how many of them were accepted."""

    def __init__(self):
        self.inputs = self.accepted = 0

    def fraction_accepted(self) -> float:
        return self.accepted / self.inputs


def mutations(original: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The same JSON with one value, anywhere in it, replaced or removed."""
    odd_values = st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
        st.just([]), st.just({}), st.just([[]]),
    )  # fmt: skip

    def mutate(change: tuple[tuple, Any]) -> dict[str, Any]:
        path, value = change
        mutated = copy.deepcopy(original)
        parent = mutated
        for key in path[:-1]:
            parent = parent[key]
        if value == "remove" and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        return mutated

    values = st.one_of(st.just("remove"), odd_values)
    return st.tuples(st.sampled_from(list(paths_in(original))), values).map(mutate)


def paths_in(node: Any, path: tuple = ()):
    """The paths to all values in nested dicts and lists; in long ones, to the first 12 values."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items)[:12]:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_in(value, (*path, key))
