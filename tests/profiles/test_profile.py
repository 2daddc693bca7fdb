"""Device profiles: every shipped one is complete and sensible, and a wrong figure is refused by name."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from edgespec.errors import InputError
from edgespec.profiles import load, names
from edgespec.profiles.profile import BASES, OPTIONAL, RANGES, parse, to_toml

WANTED = (
    "snapdragon-7-gen-3 snapdragon-8-gen-2 snapdragon-8-gen-3 snapdragon-8-elite snapdragon-8-elite-gen-5 "
    "snapdragon-x-elite snapdragon-x2-elite dimensity-9300 dimensity-9400 exynos-2400 tensor-g5 "
    "apple-a18-pro apple-a19-pro"
)
TEXT = files("edgespec.profiles").joinpath("devices", "snapdragon-8-elite.toml").read_text("utf-8")


def changed(name: str, value: str) -> str:
    """The 8 Elite's file with another value of a figure."""
    text, times = re.subn(rf"({name} = {{ value = )[^,]+", rf"\g<1>{value}", TEXT)
    assert times == 1
    return text


def test_the_issues_devices_have_a_profile() -> None:
    assert set(WANTED.split()) <= set(names())


@pytest.mark.parametrize("name", [n for n in names() if n != "this-machine"])
def test_every_figure_says_where_it_comes_from(name: str) -> None:
    profile = load(name)
    assert profile.name == name
    for figure in profile.figures().values():
        if figure is not None:
            assert figure.basis in BASES and re.fullmatch(r"20\d\d-\d\d-\d\d", figure.date) and figure.source
    assert profile.energy_j_per_byte is None  # nobody has published one: never a default
    assert profile.bandwidth_kv_bytes_per_s.value < profile.bandwidth_weights_bytes_per_s.value


def test_a_fitted_figure_names_a_published_source() -> None:
    sources = tomllib.loads(files("edgespec.profiles").joinpath("published.toml").read_text("utf-8"))[
        "source"
    ]
    texts = {item["text"] for item in sources.values()}
    fitted = [f for n in names() for f in load(n).figures().values() if f and f.basis == "fit"]
    assert len(fitted) > 10
    assert all(set(f.source.split("; ")) <= texts for f in fitted)


def test_a_slip_of_a_thousand_never_fits_its_range() -> None:
    for name, (least, most) in RANGES.items():
        assert least == 0 or most / least <= 1000, name


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (changed("dispatch_s", "-0.001"), "dispatch_s is -0.001, which is no positive number", "measure it"),
        (changed("dispatch_s", "nan"), "dispatch_s is nan, which is no positive number", "measure it"),
        (changed("dispatch_s", "true"), "dispatch_s is True, which is no positive number", "measure it"),
        (changed("dispatch_s", "0.9"), "dispatch_s 0.9 is not 5e-06 to 0.004", "write it in seconds"),
        (
            changed("bandwidth_peak_bytes_per_s", "84.8"),
            "bandwidth_peak_bytes_per_s 84.8 is not 3e+09 to 1e+12",
            "write it in bytes a second: is it a thousand times off?",
        ),
        (
            changed("bandwidth_weights_bytes_per_s", "9e10"),
            "bandwidth_weights_bytes_per_s 9e+10 is more than the peak 8.48e+10",
            "what a device sustains is below its peak",
        ),
        (changed("ops_int8_per_s", "45"), "ops_int8_per_s 45 is not 1e+12 to 9e+14", "operations a second"),
        (re.sub(r"\ndispatch_s.*", "", TEXT), "figure dispatch_s is missing", "write dispatch_s = {"),
        (TEXT.replace('kind = "npu"', 'kind = "gpu"'), "kind 'gpu' is unknown", "use npu or cpu"),
        (TEXT.replace("schema = 1", "schema = 2"), "has schema 2, not 1", "write schema = 1"),
        (TEXT + "speed = 1\n", "unknown field 'speed'", "use one of: name"),
        (TEXT.replace("dispatch_s = {", "dispatch_s = ["), "is not TOML", "compare"),
        ('schema = 1\nname = "x"', "title is missing", 'write title = "..."'),
    ],
)  # fmt: skip
def test_a_senseless_file_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, "mine.toml")
    assert message in caught.value.message and caught.value.message.startswith("profile mine.toml: ")
    assert hint in caught.value.hint


def test_a_figure_without_its_source_is_refused() -> None:
    with pytest.raises(InputError, match="needs value, source, date and basis"):
        parse(re.sub(r"(dispatch_s = ).*", r"\g<1>0.001", TEXT), "x")
    with pytest.raises(InputError, match="has the basis 'guess'"):
        parse(re.sub(r'(dispatch_s .*basis = )"\w+"', r'\g<1>"guess"', TEXT), "x")
    with pytest.raises(InputError, match="has no source"):
        parse(re.sub(r'(dispatch_s .*source = )"[^"]+"', r'\g<1>" "', TEXT), "x")


def test_what_is_unknown_may_be_left_out() -> None:
    for name in OPTIONAL:
        assert parse(re.sub(rf"{name} = .*\n", "", TEXT), "x").value(name) is None


def test_an_unknown_name_lists_those_near() -> None:
    with pytest.raises(InputError, match="no profile is called 'snapdragon-8-elit'") as caught:
        load("snapdragon-8-elit")
    assert caught.value.hint.startswith("did you mean snapdragon-8-elite or ")
    with pytest.raises(InputError) as caught:
        load("zzz")
    assert caught.value.hint.startswith("use one of: apple-a18-pro, ")


def test_a_profile_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="does not exist") as caught:
        load("this-machine")
    assert caught.value.hint == "make it: edgespec profile measure BUNDLE"
    with pytest.raises(InputError) as caught:
        load(tmp_path / "none.toml")
    assert caught.value.hint == "see edgespec profile list"
    own = tmp_path / "edgespec" / "profiles" / "this-machine.toml"
    own.parent.mkdir(parents=True)
    own.write_text(to_toml(load("snapdragon-8-elite")).replace('"snapdragon-8-elite"', '"this-machine"'))
    assert "this-machine" in names() and load("this-machine").kind == "npu"


@pytest.mark.parametrize("name", [n for n in names() if n != "this-machine"])
def test_written_and_read_again(name: str) -> None:
    profile = load(name)
    assert parse(to_toml(profile), "x") == profile
