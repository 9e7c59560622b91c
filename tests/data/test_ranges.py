"""Ranges: a contradiction is an error that says what came and how to put it right."""

import re
import warnings

import pytest
import torch

from vdiff.data import check_range, check_values


def test_agreement_passes_and_any_range_will_do_where_none_is_expected():
    check_range("image", (-1, 1), (-1.0, 1.0))
    check_range("image", None, None)
    check_range("image", (0, 255), None)


@pytest.mark.parametrize(
    "declared, expected, recipe",
    [
        ((0, 255), (-1, 1), "x / 127.5 - 1"),
        ((0, 1), (-1, 1), "x * 2 - 1"),
        ((-1, 1), (0, 1), "x / 2 + 0.5"),
        ((0, 255), (0, 1), "x / 255"),
        ((0, 2), (-1, 1), "x - 1"),
    ],
)
def test_a_contradiction_names_both_ranges_and_a_conversion_that_is_right(declared, expected, recipe):
    with pytest.raises(ValueError, match=re.escape(f"({recipe})")) as error:
        check_range("image", declared, expected, where="digits")
    assert "digits: 'image' is declared in [" in str(error.value)
    low, high = (eval(recipe, {"x": x}) for x in declared)
    assert (low, high) == pytest.approx(expected)


def test_a_field_without_a_range_is_an_error_where_one_is_expected():
    with pytest.raises(ValueError, match="no range is declared for 'video'"):
        check_range("video", None, (-1, 1))


@pytest.mark.parametrize(
    "values, message",
    [
        ([0.0, 255.0], r"values from 0 to 255 came. That looks like \[0, 255\]; convert with x / 127.5 - 1"),
        ([-3.0, 2.0], r"values from -3 to 2 came. Convert the values, or declare the range they have"),
        ([0.0, float("nan"), float("inf")], "2 of 3 values of 'image' are not finite"),
    ],
)
def test_values_outside_of_the_declared_range_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        check_values("image", torch.tensor(values), (-1, 1))


def test_values_that_only_fill_the_upper_half_are_suspicious():
    with pytest.warns(UserWarning, match=r"run from 0 to 0.9 only. If they are in \[0, 1\], convert with x \* 2 - 1"):
        check_values("image", torch.tensor([0.0, 0.9]), (-1, 1))


def test_values_inside_pass_in_silence_and_so_does_rounding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values("image", torch.tensor([-1.0005, 1.0005]), (-1, 1))
        check_values("image", torch.tensor([0, 128, 255], dtype=torch.uint8), (0, 255))
        check_values("image", torch.zeros(0), (-1, 1))
        check_values("image", torch.zeros(5), (-1, 1))  # one grey value says nothing about the range
