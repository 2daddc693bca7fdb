"""Policy names and protected rows."""

from __future__ import annotations

import pytest

from edgespec.errors import InputError
from edgespec.policy import NAMES, Policy, parse


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name: str) -> None:
    found = parse(name, 4, 32, 64)
    assert found == Policy(name, 4, 32)
    assert found.evicts is (name != "none")


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (("lru", 4, 32, 64), "unknown policy 'lru'", "use one of: none, sinks, keydiff"),
        (("keydiff", -1, 32, 64), "sinks -1 and recent 32 must not be negative", "use --sinks 4 --recent 32"),
        (
            ("sinks", 4, 61, 64),
            "sinks 4 + recent 61 protect more rows than the budget 64 keeps",
            "use --budget 65 or more, or protect fewer rows",
        ),
    ],
)
def test_refusals(args: tuple, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*args)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_without_eviction_nothing_needs_protection() -> None:
    assert parse("none", 4, 61, 64).name == "none"
