"""Lists of texts become rows for the text tower."""

import numpy as np
import pytest

from navit_jax.data.texts import pack_alone
from navit_jax.data.tokenizer import open_tokenizer
from navit_jax.errors import DataError

TOKENIZER = open_tokenizer(length=8)
TEXTS = ["a dog", " ", "a very long text about many other things", "moon", "", "dog"]


@pytest.mark.parametrize("slots", [1, 3])
def test_every_text_stands_whole_in_its_slot_and_nothing_else_does(slots):
    texts = TEXTS * 9
    rows = pack_alone(texts, TOKENIZER, 20, slots)
    used = np.zeros(rows.segment_ids.shape, bool)
    for text, (row, slot), known in zip(texts, rows.places, rows.known, strict=True):
        ids = TOKENIZER.encode(text)
        assert known == bool(len(ids))
        if known:
            own = rows.segment_ids[row] == slot + 1
            (places,) = np.nonzero(own)
            assert (np.diff(places) == 1).all()
            np.testing.assert_array_equal(rows.tokens[row, own], ids)
            np.testing.assert_array_equal(rows.coords[row, own, 0], range(len(ids)))
            used[row] |= own
        else:
            assert (row, slot) == (-1, -1)
    np.testing.assert_array_equal(used, rows.segment_ids > 0)
    places = rows.places[rows.known]
    assert len(np.unique(places, axis=0)) == len(places) == 36
    for row in range(len(rows.tokens)):
        # In the order that they were given, from slot 0.
        own = places[places[:, 0] == row, 1]
        np.testing.assert_array_equal(own, range(len(own)))
        assert len(own) <= slots


def test_no_text_is_no_row_and_a_row_too_short_is_refused():
    assert pack_alone([], TOKENIZER, 20, 3).tokens.shape == (0, 20)
    assert pack_alone([" "], TOKENIZER, 20, 3).tokens.shape == (0, 20)
    with pytest.raises(DataError, match="does not fit"):
        pack_alone(TEXTS, TOKENIZER, 7, 3)
