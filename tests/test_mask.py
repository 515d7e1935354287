"""Mask files: this program's own, and those that people write by hand."""

import pytest

from e3jax import files
from e3jax.errors import UserError
from e3jax.mask import Mask, read_mask


def test_written_and_read(tmp_path):
    theta, scores = (1.0, -2.0, -3.0, 0.5), (0.1, 0.2, 0.3, 0.4)
    mask = Mask(4, (0, 3), "e3", (2, 1), theta, scores, 0.25, 99, 7, "abc", "def")
    files.write_json(tmp_path / "mask.json", mask)
    assert read_mask(tmp_path / "mask.json", 4) == mask


def test_written_by_hand(tmp_path):
    files.write_json(tmp_path / "mine.json", {"keep": [0, 2], "num_layers": 4, "note": "ours"})
    mask = read_mask(tmp_path / "mine.json", 4)
    assert (mask.keep, mask.order, mask.tokens) == ((0, 2), (1, 3), 0)
    assert mask.chosen_by == "a mask of unknown origin"


def test_a_file_name_for_any_choice():
    assert Mask(4, (0, 3), order=(2, 1)).place == "without-1-2"
    deep = [Mask(126, range(kept, 126), order=tuple(range(kept))) for kept in (26, 100)]
    names = {mask.place for mask in deep}
    assert len(names) == 2 and max(map(len, names)) < 150


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"order": [1, 2]}, r"order is \[1, 2\]; expected the removed layers, \[1, 3\]"),
        ({"order": "1 3"}, r"not a mask file \(order: "),
        ({"keep": None}, r"not a mask file \(keep: .*expected keep, a list of layer numbers"),
        ({"keep": [0, "2"]}, r"not a mask file \(keep\.1: "),
        ({"num_layers": 4.0}, r"not a mask file \(num_layers: "),
        ({"selector": {"name": "mine"}}, r"not a mask file \(selector: "),
        ({"tokens": "many", "seed": 1.5}, r"not a mask file \(tokens: .*; seed: "),
        ({"num_layers": 5}, "a mask of 5 layers, and the model has 4"),
    ],
)
def test_bad_fields_are_named(tmp_path, more, message):
    files.write_json(tmp_path / "mask.json", {"keep": [0, 2], "num_layers": 4, **more})
    with pytest.raises(UserError, match=f"mask.json: {message}"):
        read_mask(tmp_path / "mask.json", 4)
