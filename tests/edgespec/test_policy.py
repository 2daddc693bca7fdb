"""Policy names, what they need, and protected rows."""

from __future__ import annotations

import pytest

from edgespec.errors import InputError
from edgespec.policy import BASES, NAMES, OVER, base_of, carries, check, queries


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name: str) -> None:
    check(name, 4, 32, 64, 16)
    assert base_of(name) in NAMES
    assert queries(name, 16, 8) in (0, 1, 8, 16)
    assert queries(name, 16, 8) == 16 or not carries(name)


def test_every_base_has_every_form() -> None:
    assert {f"{over}({base})" for over in OVER for base in BASES} <= set(NAMES)


def test_what_is_read() -> None:
    needs = {name: queries(name, 16, 8) for name in NAMES if "(" not in name}
    assert needs == {"none": 0, "sinks": 0, "keydiff": 0, "lru": 16, "tova": 1, "snapkv": 8, "h2o": 16}
    assert queries("caote(snapkv)", 16, 8) == 8
    assert [name for name in NAMES if carries(name)] == ["lru", "h2o", "caote(h2o)", "fastcaote(h2o)"]


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (("kivi", 4, 32, 64, 16), "unknown policy 'kivi'", f"use one of: {', '.join(NAMES)}"),
        (("caote", 4, 32, 64, 16), "unknown policy 'caote'", f"use one of: {', '.join(NAMES)}"),
        (("caote(sinks)", 4, 32, 64, 16), "unknown base 'sinks' of caote", f"use one of: {', '.join(NAMES)}"),
        (
            ("keydiff", -1, 32, 64, 16),
            "sinks -1 and recent 32 must not be negative",
            "use --sinks 4 --recent 32",
        ),
        (
            ("sinks", 4, 61, 64, 16),
            "sinks 4 + recent 61 protect more rows than the budget 64 keeps",
            "use --budget 65 or more, or protect fewer rows",
        ),
        (
            ("caote(h2o)", 4, 32, 70, 16),
            "caote(h2o) scores every block, and budget 70 is not a multiple of block 16",
            "use --budget 64, or another --policy",
        ),
    ],
)
def test_refusals(args: tuple, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        check(*args)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_without_eviction_nothing_needs_protection() -> None:
    check("none", 4, 61, 64, 16)
