"""Reading YAML: what the text says, where it says it, and what is refused unread."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.spec.reader import (
    MAX_BYTES,
    MAX_NODES,
    Document,
    Mark,
    Unreadable,
    as_scalar,
    parse,
    read_file,
)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(number: float) -> None:
    assert parse(f"lr: {number!r}").data == {"lr": number}


@given(st.integers(1, 9), st.integers(-30, 30), st.sampled_from("eE"), st.sampled_from(["", ".", ".5"]))
def test_exponents_need_neither_point_nor_sign(digit: int, power: int, letter: str, fraction: str) -> None:
    text = f"{digit}{fraction}{letter}{power}"
    assert parse(f"lr: {text}").data == {"lr": float(text)}


@given(st.integers(-(10**20), 10**20))
def test_every_whole_number_is_read_back(number: int) -> None:
    value = parse(f"n: {number}").data["n"]
    assert value == number
    assert type(value) is int


def is_plain(data: object) -> bool:
    """Nothing but what JSON has."""
    if isinstance(data, dict):
        return all(isinstance(key, str) and is_plain(value) for key, value in data.items())
    if isinstance(data, list):
        return all(is_plain(value) for value in data)
    return data is None or isinstance(data, bool | int | float | str)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    found = parsed_or_refused(text)
    assert found.problem.expected if isinstance(found, Unreadable) else is_plain(found.data)


def parsed_or_refused(text: str) -> Document | Unreadable:
    try:
        return parse(text)
    except Unreadable as error:
        return error


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", 1000),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("'3e-4'", "3e-4"),
        ('"true"', "true"),
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
    ],
)
def test_plain_words_and_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"key: {text}").data["key"]
    assert (found, type(found)) == (value, type(value))


def test_places_are_those_of_keys_and_values() -> None:
    document = parse("train:\n  steps: 20\ndata: {path: [a, b]}\n")
    assert document.keys == {
        "train": Mark(1, 1),
        "train.steps": Mark(2, 3),
        "data": Mark(3, 1),
        "data.path": Mark(3, 8),
    }
    assert document.values["train.steps"] == Mark(2, 10)
    assert document.values["data.path.1"] == Mark(3, 18)


def test_aliases_stand_for_what_they_name() -> None:
    assert parse("a: &x {b: 1}\nc: *x\n").data == {"a": {"b": 1}, "c": {"b": 1}}


@given(st.integers(0, 20), st.integers(0, 20))
def test_key_given_twice_names_both_lines(before: int, between: int) -> None:
    first, second = before + 1, before + between + 2
    text = "\n" * before + "a: 1\n" + "\n" * between + "a: 2\n"
    document = parse(text)
    (problem,) = document.problems
    assert str(problem) == f"{second}:1: a: given twice, in lines {first} and {second}; keep one"
    assert document.data == {"a": 1}


def test_the_same_key_in_two_sections_is_fine() -> None:
    assert parse("log: {every_steps: 1}\ncheckpoint: {every_steps: 1}\n").problems == []


@pytest.mark.parametrize("number", [".inf", "-.INF", ".nan", "1e999"])
def test_number_that_is_not_finite_is_a_problem(number: str) -> None:
    (problem,) = parse(f"lr: {number}").problems
    assert str(problem) == f"1:5: lr: found {number}, expected a finite number"


def test_quotes_are_what_makes_a_number_text() -> None:
    assert as_scalar("3e-4") == 3e-4
    assert as_scalar("fast") == "fast"
    assert as_scalar("[1]") == "[1]"
    assert math.isclose(float(str(as_scalar("1e3"))), 1000)


def alias_bomb(levels: int) -> str:
    """Ten to the power `levels` values in a few hundred bytes."""
    first = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    return first + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, levels))


def refusal(text: str) -> str:
    with pytest.raises(Unreadable) as error:
        parse(text)
    return str(error.value)


def test_alias_bomb_is_refused_long_before_it_goes_off() -> None:
    # 10^30 values would neither fit into any memory nor be counted in anyone's lifetime
    assert refusal(alias_bomb(30)).endswith("aliases expand to more than 10,000 values; write the values out")


def test_alias_of_itself_is_refused() -> None:
    assert refusal("a: &a [*a]") == "1:4: this value refers to itself; write it out"
    assert refusal("a: &a {b: [1, *a]}") == "1:4: this value refers to itself; write it out"


def test_too_many_values_are_refused() -> None:
    assert f"more than {MAX_NODES:,} keys and values" in refusal("a: [" + "1," * MAX_NODES + "]")
    assert len(parse("a: [" + "1," * 5000 + "]").data["a"]) == 5000


@pytest.mark.parametrize("text", ["[" * 2000, "{a: " * 2000, "- " * 2000])
def test_deep_nesting_is_refused(text: str) -> None:
    assert "nested more than 50 deep" in refusal(text)


def test_file_of_the_largest_size_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("a: 1\n#" + "x" * (MAX_BYTES - 6))
    assert read_file(path).data == {"a": 1}
    path.write_text("a: 1\n#" + "x" * (MAX_BYTES - 5))
    with pytest.raises(Unreadable, match="larger than 1 MiB"):
        read_file(path)


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_file(path).data == {"a": 1, "b": 2}
