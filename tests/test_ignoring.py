"""Labels that do not count, in any kind of integers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dacal_addon.ignoring import ignored_or_255, is_ignored, usual_is_class
from dacal_addon.metrics import CalibrationStats

KINDS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-(1 << 15), (1 << 15) - 1), torch.int64: (-99, 1 << 40)}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(KINDS)), st.data())
def test_a_label_is_compared_as_the_number_it_is(kind, data):
    """-1 is no 255 of uint8, nor 256 a 0."""
    low, high = KINDS[kind]
    near = [-257, -256, -1, 0, 1, 127, 128, 255, 256, 511, 1 << 16, 1 << 32]
    of_kind = st.one_of(st.integers(low, high), st.sampled_from([x for x in near if low <= x <= high]))
    values = data.draw(st.lists(of_kind, min_size=1, max_size=9))
    ignored = data.draw(st.lists(st.sampled_from(near), min_size=1, max_size=3))
    label = torch.tensor(values, dtype=kind)
    assert is_ignored(label, tuple(ignored)).tolist() == np.isin(np.array(values), ignored).tolist()
    assert is_ignored(label, ignored[0]).tolist() == [value == ignored[0] for value in values]


@pytest.mark.parametrize("first_label", [0, 1])
@pytest.mark.parametrize("classes", [2, 254, 255, 256, 300])
def test_there_is_one_answer_to_whether_255_is_a_class(classes, first_label):
    is_class = 255 in range(first_label, first_label + classes)
    assert usual_is_class(classes, first_label=first_label) == is_class
    if is_class:
        with pytest.raises(ValueError, match=rf"f: expected ignore_index to be given with {classes} classes"):
            ignored_or_255("f", None, classes, first_label=first_label)
        with pytest.warns(UserWarning, match="255 is a class here"):
            stats = CalibrationStats(classes, input="top1", reduce_zero_label=bool(first_label))
    else:
        assert ignored_or_255("f", None, classes, first_label=first_label) == 255
        stats = CalibrationStats(classes, input="top1", reduce_zero_label=bool(first_label))
    assert stats.ignore_index == (() if is_class else (255,))
    for said in (255, -1, (0, 255)):
        assert ignored_or_255("f", said, classes, first_label=first_label) == said
