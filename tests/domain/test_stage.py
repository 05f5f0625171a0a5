"""Keys of stages: what changes them, what cannot, and what is said about a change."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.domain.stage import KEY_LENGTH, Stage, canonical_json, changed_fields

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
RECIPES = st.dictionaries(TEXT, JSON, max_size=5)

MODEL = Stage("model", 1, {"id": "pico"})
SCORE = Stage(
    "score", 2, {"metric": "angular", "calibration": {"samples": 8, "fields": ["text"]}}, {"model": MODEL}, "pico"
)


def reversed_order(value: Any) -> Any:
    """The same JSON value with every mapping written backwards."""
    if isinstance(value, dict):
        return {name: reversed_order(value[name]) for name in reversed(value)}
    return [reversed_order(item) for item in value] if isinstance(value, list) else value


@given(RECIPES)
def test_order_of_a_mapping_does_not_change_the_key(recipe: dict[str, Any]) -> None:
    other = reversed_order(recipe)
    assert Stage("score", 1, recipe).key == Stage("score", 1, other).key


@given(JSON)
def test_canonical_json_loses_nothing(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(JSON, JSON)
def test_different_values_have_different_encodings(one: Any, other: Any) -> None:
    assert (canonical_json(one) == canonical_json(other)) == (json.dumps(one, sort_keys=True) == json.dumps(
        other, sort_keys=True))  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "rank"},
        {"version": 3},
        {"recipe": {**SCORE.recipe, "metric": "influence"}},
        {"recipe": {**SCORE.recipe, "calibration": {"samples": 9, "fields": ["text"]}}},
        {"recipe": {**SCORE.recipe, "calibration": {"samples": 8, "fields": ["text", "title"]}}},
        {"recipe": {**SCORE.recipe, "new": None}},
        {"recipe": {"metric": "angular"}},
        {"inputs": {"model": Stage("model", 1, {"id": "other"})}},
        {"inputs": {"model": Stage("model", 2, {"id": "pico"})}},
        {"inputs": {"checkpoint": MODEL}},
        {"inputs": {}},
        {"inputs": {"model": MODEL, "rows": MODEL}},
    ],
    ids=repr,
)
def test_every_part_of_the_identity_changes_the_key(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(SCORE, **changes).key != SCORE.key


def test_a_change_far_upstream_reaches_the_key() -> None:
    def last(seed: int) -> Stage:
        first = Stage("rows", 1, {"seed": seed})
        return Stage("merge", 1, {}, {"adapter": Stage("finetune", 1, {}, {"distilled": first})})

    assert last(0).key == last(0).key
    assert last(0).key != last(1).key


def test_slug_and_input_slugs_are_for_people_only() -> None:
    renamed = Stage("score", 2, SCORE.recipe, {"model": dataclasses.replace(MODEL, slug="x")}, slug="other")
    assert renamed.key == SCORE.key
    assert renamed.address == f"score/other-{SCORE.key[:KEY_LENGTH]}"
    assert len(SCORE.key) == 64


def test_swapped_inputs_are_another_stage() -> None:
    other = Stage("model", 1, {"id": "other"})
    one = Stage("merge", 1, {}, {"first": MODEL, "second": other})
    assert one.key != Stage("merge", 1, {}, {"first": other, "second": MODEL}).key


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"names": {"b", "a"}}, "$.names"),
        ({"rate": float("nan")}, "$.rate"),
        ({"rate": float("inf")}, "$.rate"),
        ({"list": [1, {"deep": -float("inf")}]}, "$.list[1].deep"),
        ({"by": {1: "one"}}, "$.by"),
        ({"by": {None: "one"}}, "$.by"),
        ({"what": object()}, "$.what"),
        ({"raw": b"bytes"}, "$.raw"),
        ({"z": 1j}, "$.z"),
    ],
    ids=repr,
)
def test_what_json_cannot_hold_is_refused_by_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError) as caught:
        canonical_json(value)
    assert str(caught.value).startswith(f"{where}:")
    with pytest.raises(TypeError):
        _ = Stage("score", 1, value).key


def test_tuples_and_lists_are_one_thing() -> None:
    assert canonical_json({"fields": ("a", "b")}) == canonical_json({"fields": ["a", "b"]}) == '{"fields":["a","b"]}'


def test_changed_fields_gives_dotted_names_with_both_values() -> None:
    old = {
        "version": 1,
        "recipe": {"calibration": {"samples": 8, "seed": 0}, "metric": "angular"},
        "inputs": {"m": "a"},
    }
    new = {
        "version": 2,
        "recipe": {"calibration": {"samples": 9, "seed": 0}, "metric": "angular"},
        "inputs": {"m": "b"},
    }
    assert changed_fields(old, new) == [
        'inputs.m: "a" -> "b"',
        "recipe.calibration.samples: 8 -> 9",
        "version: 1 -> 2",
    ]
    assert changed_fields(old, old) == []


def test_changed_fields_of_a_setting_that_came_or_went() -> None:
    assert changed_fields({"a": 1}, {"a": 1, "b": 2}) == ["b: absent -> 2"]
    assert changed_fields({"a": 1, "b": 2}, {"a": 1}) == ["b: 2 -> absent"]


def test_a_new_setting_that_is_null_is_named() -> None:
    """It changes the key, so a plan must be able to say what changed."""
    (change,) = changed_fields({"recipe": {}}, {"recipe": {"limit": None}})
    assert change.startswith("recipe.limit")


@given(RECIPES, RECIPES)
def test_two_keys_that_differ_have_a_changed_field(one: dict[str, Any], other: dict[str, Any]) -> None:
    differ = Stage("score", 1, one).key != Stage("score", 1, other).key
    assert bool(changed_fields(one, other)) == differ


def test_long_values_are_shortened() -> None:
    (change,) = changed_fields({"text": "x" * 500}, {"text": "y" * 500})
    assert len(change) < 100 and change.startswith('text: "xxx')
