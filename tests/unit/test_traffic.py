"""The rules of traffic: shares that are right, callers that stay where they are, answers that are held to account."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from hedgerow.errors import ConfigError
from hedgerow.parameters import STICKY
from hedgerow.policies import Privacy
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Parameter, TensorSpec, tensor
from hedgerow.traffic.agreement import ByValue, difference, settle
from hedgerow.traffic.facts import payload_bytes, privacy
from hedgerow.traffic.rendezvous import Points, by_key, by_point

KEYS = [f"key-{number}".encode() for number in range(4000)]
weightings = st.dictionaries(
    st.text(max_size=3), st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0, 97.0]), min_size=1, max_size=5
).filter(lambda weights: any(weights.values()))
keys = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


def homes(weights: dict[str, float], some_keys: list[bytes]) -> list[str]:
    return [by_key(weights, key) for key in some_keys]


# -- who gets which target


@given(weightings, keys, st.sampled_from([2.0**-6, 2.0, 2.0**10]))
def test_a_choice_depends_on_proportions_alone_and_weightless_targets_get_nothing(
    weights: dict[str, float], some_keys: list[bytes], scale: float
) -> None:
    chosen = homes(weights, some_keys)
    assert all(weights[name] > 0 for name in chosen)
    assert homes({name: scale * weight for name, weight in reversed(weights.items())}, some_keys) == chosen


@given(weightings, keys, st.data(), st.sampled_from([0.25, 2.0, 100.0]))
def test_changing_one_weight_moves_keys_to_or_from_that_target_only(
    weights: dict[str, float], some_keys: list[bytes], data: st.DataObject, factor: float
) -> None:
    changed = data.draw(st.sampled_from([name for name in weights if weights[name]]))
    before, after = homes(weights, some_keys), homes({**weights, changed: factor * weights[changed]}, some_keys)
    for old, new in zip(before, after, strict=True):
        assert new == old or changed == (new if factor > 1 else old)


@given(weightings, keys, st.data())
def test_leaving_a_target_out_leaves_the_others_keys_where_they_are(
    weights: dict[str, float], some_keys: list[bytes], data: st.DataObject
) -> None:
    out = data.draw(st.sampled_from(sorted(weights)))
    rest = {name: weight for name, weight in weights.items() if name != out}
    assume(any(rest.values()))
    for old, new in zip(homes(weights, some_keys), homes(rest, some_keys), strict=True):
        assert old in {new, out}


def test_keys_are_shared_by_weight_and_no_more_of_them_move_than_have_to() -> None:
    before = homes({"stable": 90, "candidate": 10}, KEYS)
    after = homes({"stable": 80, "candidate": 20}, KEYS)
    assert Counter(before)["candidate"] == pytest.approx(400, abs=60)
    assert Counter(after)["candidate"] == pytest.approx(800, abs=80)
    moved = Counter(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
    assert moved.keys() == {("stable", "candidate")}
    assert moved.total() == Counter(after)["candidate"] - Counter(before)["candidate"]


@given(weightings, st.integers(0, 2**64 - 1), st.integers(1, 300))
def test_without_keys_any_stretch_of_requests_is_shared_by_weight(
    weights: dict[str, float], start: int, count: int
) -> None:
    points = Points(start)
    chosen = Counter(by_point(weights, points.take())[0] for _ in range(count))
    assert chosen.total() == count
    for name, weight in weights.items():
        fair = count * weight / sum(weights.values())
        assert abs(chosen[name] - fair) <= 5
        assert weight or not chosen[name]


@given(weightings, st.floats(0, 1, exclude_max=True))
def test_where_a_point_lies_is_a_point_again(weights: dict[str, float], point: float) -> None:
    _, place = by_point(weights, point)
    assert 0 <= place < 1


def test_the_requests_of_a_target_that_is_left_out_are_shared_by_the_others_weights() -> None:
    points, weights = Points(0), {"out": 50.0, "a": 30.0, "b": 20.0}
    rest = {"a": 30.0, "b": 20.0}
    chosen: Counter[str] = Counter()
    for _ in range(1000):
        name, place = by_point(weights, points.take())
        chosen[by_point(rest, place)[0] if name == "out" else name] += 1
    assert chosen["a"] == pytest.approx(600, abs=10)
    assert chosen["b"] == pytest.approx(400, abs=10)


def test_two_processes_do_not_go_through_the_same_points() -> None:
    assert Points().take() != Points().take()


# -- who may see a request


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        ({}, Privacy.DEFAULT),
        ({"priority": 1, STICKY: "a"}, Privacy.DEFAULT),
        ({"hedgerow_privacy": ""}, Privacy.DEFAULT),
        ({"hedgerow_privacy": "no-learning"}, Privacy.NO_LEARNING),
        ({"hedgerow_privacy": "edge-only"}, Privacy.EDGE_ONLY),
        ({"hedgerow_privacy": "edge_only"}, Privacy.EDGE_ONLY),
        ({"hedgerow_privacy": 0}, Privacy.EDGE_ONLY),
        ({"Hedgerow_Privacy": "edge-only"}, Privacy.EDGE_ONLY),
        ({"hedgerow-privacy": "no-learning"}, Privacy.EDGE_ONLY),
    ],
)
def test_what_is_not_understood_may_forbid_anything(parameters: dict[str, Parameter], allowed: Privacy) -> None:
    assert privacy(InferRequest(model="m", inputs=(), parameters=parameters)) is allowed


def test_the_size_of_a_request_is_that_of_what_it_holds() -> None:
    assert payload_bytes([tensor("a", np.zeros((3, 4), np.float32)), tensor("b", [b"xyz", b""])]) == 51


# -- whether two answers say the same


def answer(**outputs: ArrayLike) -> InferResponse:
    tensors = tuple(tensor(name, value) for name, value in outputs.items())
    return InferResponse(model="m", version="1", outputs=tensors)


F32, NAN, INF = np.float32, float("nan"), float("inf")
BIG = 2**62


@pytest.mark.parametrize(
    ("one", "other", "by_class", "by_value", "furthest"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], True, True, 0.0),
        ([[1.0, 2.0]], [[1.5, 9.0]], True, False, 7.0),
        ([[1.0, 2.0]], [[2.0, 1.0]], False, False, 1.0),
        ([[1.0, 2.0], [4.0, 3.0]], [[1.0, 2.0], [3.0, 4.0]], False, False, 1.0),
        ([[1.0], [2.0]], [[1.05], [2.0]], True, True, 0.05),
        ([[1.0], [2.0]], [[1.5], [2.0]], False, False, 0.5),
        (3.0, 3.0, True, True, 0.0),
        (NAN, NAN, True, True, 0.0),
        (INF, INF, True, True, 0.0),
        (NAN, 1.0, False, False, INF),
        (INF, -INF, False, False, INF),
        ([[NAN, 1.0]], [[0.0, 1.0]], False, False, INF),
        (np.zeros((0, 3)), np.zeros((0, 3)), True, True, 0.0),
        ([1.0, 2.0], [[1.0, 2.0]], False, False, INF),
        (np.array([1.0], F32), np.array([1.0]), False, False, INF),
        ([BIG], [BIG + 1], False, False, 1.0),
        (np.array([0], np.uint8), np.array([255], np.uint8), False, False, 255.0),
        ([True, False], [True, True], False, False, 0.0),
        ([b"a", b"b"], [b"a", b"b"], True, True, 0.0),
        ([b"a", b"b"], [b"a", b"c"], False, False, 0.0),
    ],
)
def test_answers_are_compared_by_class_or_by_value(
    one: ArrayLike, other: ArrayLike, by_class: bool, by_value: bool, furthest: float
) -> None:
    for left, right in ((one, other), (other, one)):
        classes = ByValue(0.1, classes=True)(answer(y=left), answer(y=right))
        values = ByValue(0.1)(answer(y=left), answer(y=right))
        assert (classes.agreed, values.agreed) == (by_class, by_value)
        assert values.furthest == classes.furthest == pytest.approx(furthest)


def test_brain_floats_are_compared_as_the_numbers_that_they_stand_for() -> None:
    one, other = (
        InferResponse(model="m", version="1", outputs=(tensor("y", np.array([bits], np.uint16), "BF16"),))
        for bits in (0x3F80, 0x4000)  # 1.0 and 2.0
    )
    assert ByValue(1.0)(one, other).furthest == 1.0
    assert ByValue(1.0)(one, other).agreed


def test_an_output_that_is_missing_is_a_difference_and_one_more_is_none() -> None:
    assert not ByValue()(answer(a=[1], b=[2]), answer(a=[1])).agreed
    assert ByValue()(answer(a=[1]), answer(b=[2], a=[1])).agreed
    assert not ByValue()(answer(a=[1], b=[2]), answer(a=[1], b=[3])).agreed, "all of them count"


# -- whether two models promise the same

X, Y, Z = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "INT64", (-1,))


def model(*outputs: TensorSpec, inputs: tuple[TensorSpec, ...] = (X,)) -> ModelMetadata:
    return ModelMetadata("m", ("1",), "python", inputs, outputs)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (model(Z, Y), ""),
        (model(Y), "output 'z' is INT64 [-1] here and missing there"),
        (model(Y, Z, TensorSpec("w", "FP32", ())), "output 'w' is missing here and FP32 [] there"),
        (model(Y, Z, inputs=()), "input 'x' is FP32 [-1, 4] here and missing there"),
        (
            model(Y, Z, inputs=(TensorSpec("x", "FP32", (1, 4)),)),
            "input 'x' is FP32 [-1, 4] here and FP32 [1, 4] there",
        ),
        (model(TensorSpec("y", "FP16", (-1, 2)), Z), "output 'y' is FP32 [-1, 2] here and FP16 [-1, 2] there"),
    ],
)
def test_a_difference_of_interfaces_is_named(other: ModelMetadata, text: str) -> None:
    assert difference(model(Y, Z), other) == text
    assert bool(difference(other, model(Y, Z))) == bool(text)


def test_before_anything_was_agreed_on_all_have_to_agree() -> None:
    assert settle({}, None) == (None, {})
    assert settle({"a": model(Y), "b": model(Y)}, None) == (model(Y), {})
    with pytest.raises(ConfigError, match="a and c are not interchangeable: output 'z'"):
        settle({"a": model(Y), "b": model(Y), "c": model(Z, Y)}, None)


def test_afterwards_who_differs_is_left_out_and_all_together_may_move_on() -> None:
    agreed, odd = settle({"a": model(Y), "b": model(Z)}, model(Y))
    assert agreed == model(Y)
    assert odd.keys() == {"b"}
    assert settle({}, model(Y)) == (model(Y), {})
    assert settle({"a": model(Z), "b": model(Z)}, model(Y)) == (model(Z), {})
    with pytest.raises(ConfigError, match="not interchangeable"):
        settle({"a": model(Z), "b": model(Y, Z)}, model(Y))


@given(st.lists(st.sampled_from([model(Y), model(Z), model(Y, Z)]), max_size=5), st.sampled_from([None, model(Y)]))
def test_who_is_not_left_out_has_the_interface_that_was_agreed_on(
    interfaces: list[ModelMetadata], before: ModelMetadata | None
) -> None:
    known = {str(number): interface for number, interface in enumerate(interfaces)}
    try:
        agreed, odd = settle(known, before)
    except ConfigError:
        assert any(difference(one, other) for one, other in itertools.pairwise(interfaces))
        return
    if known:
        assert len(odd) < len(known), "somebody is left to ask"
    for name, interface in known.items():
        assert agreed is not None
        assert bool(difference(agreed, interface)) == (name in odd)


def test_a_point_at_the_very_end_belongs_to_the_last() -> None:
    assert by_point({"a": 1.0, "b": 1e-9, "c": 0.0}, math.nextafter(1.0, 0.0))[0] == "b"
