"""Where a question ends, worked out from what a call brings along. No model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from evengaze.engine.question import Clues, check_said, clues, questions
from evengaze.errors import ConfigError, LayoutError
from evengaze.layout import VisualLayout


def asked(spans, length, real=None, **known):
    layout = VisualLayout.from_spans(spans, (1, 2))
    if real is not None:
        real = torch.tensor(real, dtype=torch.bool)
    found = questions(layout, real, length, Clues(**known))
    if found is None:
        return None
    return [[(q.start, q.stop, q.text.tolist(), q.query, q.pinned) for q in row] for row in found]


def forward(labels=None, keep=0, drafted=0):
    return SimpleNamespace(labels=labels, ignored=-100, keep=keep, drafted=lambda length: drafted)


def flags(text):
    """One character a token: 1 is True; rows are divided by blanks."""
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def test_a_prompt_that_ends_with_its_row_in_text_needs_no_working_out():
    assert asked([(1, 3)], 6) is None
    assert asked([None, (0, 2)], 6, [[1] * 6, [1] * 5 + [0]]) is None


def test_labels_end_the_prompt():
    assert asked([(1, 3)], 8, answers=flags("00000111")) == [[(0, 2, [3, 4], 4, False)]]
    assert asked([(1, 3)], 8, answers=flags("00000000")) == [[(0, 2, [3, 4, 5, 6, 7], 7, False)]]  # nothing is labelled
    padded = [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 6 + [0, 0]]
    assert asked([(2, 4), (1, 3)], 8, padded, answers=flags("00000011 00000100")) == [
        [(0, 2, [4, 5], 5, False)],
        [(0, 2, [3, 4], 4, False)],
    ]


def test_every_turn_ranks_the_pictures_that_came_with_it():
    rows = asked([[(1, 3), (7, 9)]], 13, answers=flags("0000011000011"))
    assert rows == [[(0, 2, [3, 4], 4, False), (2, 4, [9, 10], 10, False)]]
    later = asked([(1, 3)], 13, answers=flags("0000011000011"))  # a second question about the same picture
    assert later == [[(0, 2, [3, 4], 4, False)]]


def test_labels_on_everything_leave_the_picture_to_ask_about_itself():
    """Nothing in front of the first label stands behind the picture; whatever the picture's own labels are."""
    for text in ("11111111", "10011111", "01111111"):
        assert asked([(1, 3)], 8, answers=flags(text)) == [[(0, 2, [], 2, True)]]


def test_the_first_logits_that_are_read_end_the_prompt():
    assert asked([(1, 3)], 8, read=5) == [[(0, 2, [3, 4, 5], 5, False)]]
    assert asked([(1, 3)], 8, [[1, 1, 1, 1, 1, 0, 1, 1]], read=5) == [[(0, 2, [3, 4], 4, False)]]
    assert asked([(3, 5)], 8, read=1) == [[(0, 2, [5, 6, 7], 7, False)]]  # in front of the picture: it does not ask


@pytest.mark.parametrize(
    ("keep", "first"),
    [(0, None), (1, None), (3, 5), (8, None), (9, None), (torch.tensor([-1]), None), (torch.tensor([6, 4]), 4)],
)
def test_logits_to_keep(keep, first):
    found = clues({}, forward(keep=keep), length=8, masked=True, past=0, said="logits_to_keep")
    assert found.read == first


def test_candidates_of_a_draft_stand_behind_the_prompt_and_logits_alone_say_nothing():
    drafted = clues({}, forward(keep=4, drafted=3), length=8, masked=True, past=0, said=5)
    assert drafted.read == 4 and drafted.said is None
    assert not clues({}, forward(keep=4), length=8, masked=True, past=0, said=None).any


def test_packed_rows_have_a_question_for_each_sample():
    samples = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    rows = asked([[(1, 3), (5, 7)]], 11, samples=samples)
    assert rows == [[(0, 2, [3], 3, False), (2, 4, [7, 8], 8, False)]]
    labelled = asked([[(1, 3), (5, 7)]], 11, samples=samples, answers=flags("00010000101"))
    assert labelled == [[(0, 2, [], 2, True), (2, 4, [7], 7, False)]]
    ends_in_picture = asked([[(2, 4), (5, 7)]], 11, samples=samples)
    assert ends_in_picture == [[(0, 2, [], 3, True), (2, 4, [7, 8], 8, False)]]


def arguments_of(**arguments):
    options = {"masked": False, "past": 0, **{k: arguments.pop(k) for k in ("masked", "past") if k in arguments}}
    return clues(arguments, forward(keep=1), length=5, said=None, **options).samples


def test_samples_are_known_by_positions_that_start_again():
    packed = torch.tensor([[0, 1, 0, 1, 2]])
    expected = [[0, 0, 1, 1, 1]]
    assert arguments_of(position_ids=packed).tolist() == expected
    assert arguments_of(position_ids=torch.cat([packed[None], torch.zeros(3, 1, 5).long()])).tolist() == expected
    assert arguments_of(cu_seq_lens_q=torch.tensor([0, 2, 5])).tolist() == expected
    assert arguments_of(position_ids=packed, masked=True) is None  # the mask decides what is seen
    assert arguments_of(position_ids=packed, past=3) is None
    assert arguments_of(position_ids=torch.arange(5)[None] + 7) is None
    assert arguments_of(position_ids=torch.zeros(3, 1, 5).long()) is None
    assert arguments_of(cu_seq_lens_q=torch.tensor([0, 5])) is None
    assert arguments_of() is None


def test_the_caller_says_it():
    for said in (5, [5], torch.tensor(5), torch.tensor([5]), flags("11111000")):
        assert asked([(1, 3)], 8, said=said) == [[(0, 2, [3, 4], 4, False)]]
    assert asked([(1, 3)], 8, said=flags("00001100")) == [[(0, 2, [4, 5], 5, False)]]
    assert asked([(1, 3)], 8, said=flags("11010000")) == [[(0, 2, [3], 3, False)]]
    assert asked([(1, 3)], 8, said=flags("11100000")) == [[(0, 2, [], 2, True)]]
    assert asked([(1, 3)], 8, said=3) == [[(0, 2, [], 2, True)]]
    two = asked([(1, 3), (1, 3)], 8, said=[5, 6])
    assert [row[0][3] for row in two] == [4, 5]
    beams = asked([(1, 3)] * 4, 8, said=[5, 6])
    assert [row[0][3] for row in beams] == [4, 4, 5, 5]


def test_what_the_caller_says_goes_before_labels():
    labels = torch.tensor([[-100] * 6 + [4, 4]])
    found = clues({}, forward(labels, 3), length=8, masked=True, past=0, said=5)
    assert found == Clues(said=5)
    found = clues({}, forward(labels, 3), length=8, masked=True, past=0, said=None)
    assert found.read is None and found.answers.sum() == 2


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (2, "visual token 2 stands behind it"),
        (0, "have 1 to 8 tokens"),
        (9, "have 1 to 8 tokens"),
        ([5, 6], "question has 2 rows, the call has 1"),
        (flags("1100000"), "7 tokens a row, the call has 8"),
        (flags("10000000"), "ends at token 0, and visual token 1"),
        (flags("00000000"), "has no token, and visual token 1"),
    ],
)
def test_a_question_that_does_not_fit_is_refused(said, message):
    with pytest.raises(LayoutError, match=message):
        asked([(1, 3)], 8, said=said)


def test_what_is_no_question_is_refused_where_it_is_given():
    for fine in (None, "logits_to_keep", 3, [3, 4], torch.tensor([3]), flags("010"), lambda ids: 3):
        check_said(fine)
    for wrong in ("what is it?", 2.5, True, [2.5], torch.tensor([2.5]), torch.tensor([True]), {"a": 1}):
        with pytest.raises(ConfigError, match="question must be"):
            check_said(wrong)
