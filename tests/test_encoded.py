"""Token ids of a row: what is cut, and where a soft prompt stands afterwards."""

import itertools

import torch

from spul.data import Encoded
from spul.data.encoded import EncodedPrompt, left_padded, token_at

BOS = 100


def test_a_soft_prompt_stays_between_the_same_tokens_whatever_is_cut():
    """Tokens are numbered, so that those before and after the place are told apart."""
    for num, position, first in itertools.product(range(1, 7), range(7), (0, BOS)):
        ids = [first, *range(1, num)]
        if position > num:
            continue
        fields = [None, *(range(a, b) for a in range(position, num) for b in range(a + 1, num + 1))]
        for field, excess in itertools.product(fields, range(num)):
            plain = EncodedPrompt(ids, field).shortened(excess, BOS)
            found = EncodedPrompt(ids, field, position).shortened(excess, BOS)
            assert found.ids == plain.ids
            assert len(found.ids) == num - max(excess, 0)
            assert found.ids[: found.position] == [token for token in ids[:position] if token in found.ids]
            assert found.ids[found.position :] == [token for token in ids[position:] if token in found.ids]


def test_a_message_that_is_cut_from_its_start_keeps_the_prompt_in_front_of_its_rest():
    found = EncodedPrompt([BOS, 1, 2, 3, 4], None, 2).shortened(3, BOS)
    assert (found.ids, found.position) == ([BOS, 4], 1)


def test_the_token_at_a_character_is_the_first_that_holds_it_or_one_after_it():
    offsets = [(0, 0), (0, 4), (4, 9), (9, 9), (10, 12)]
    assert [token_at(offsets, i) for i in (0, 3, 4, 8, 9, 10, 11, 12)] == [1, 1, 2, 2, 4, 4, 4, 5]


def test_a_row_without_its_ending_keeps_its_position():
    row = Encoded([1, 2], [3, 4], num_ending=1, num_cut=5, prompt_position=1).without_ending()
    assert (row.completion_ids, row.num_cut, row.prompt_position) == ([3], 5, 1)


def test_prompts_are_padded_on_the_left_and_positions_count_no_pads():
    batch = left_padded([Encoded([1, 2, 3], [9], prompt_position=2), Encoded([4], [9], prompt_position=0)], pad=7)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 7, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(batch["prompt_position"], torch.tensor([2, 0]))
    assert "prompt_position" not in left_padded([Encoded([1], [9])], pad=7)
