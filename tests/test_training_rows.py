"""Facts of a training's rows: counts, digests and identity, of data sets, streams and none."""

import pytest
from datasets import IterableDataset
from helpers import make_collator, make_dataset

from spul.data.rows import REWRITTEN_BY
from spul.records.digests import DataSummary, summarize_rows
from spul.training.training_rows import TrainingRows

KEY = bytes(range(32))


def facts(rows, key=None):
    return TrainingRows(rows, make_collator(), key)


def with_rewritten(rows, numbers):
    return rows.add_column(REWRITTEN_BY, ["case" if i in numbers else None for i in range(len(rows))])


def test_rows_are_counted_by_group_without_those_that_were_rewritten():
    rows = make_dataset(3, 5)
    assert facts(rows).flags == rows["is_forget"][:]
    assert facts(rows).summaries == (DataSummary(3), DataSummary(5))
    assert facts(rows).rewritten is None
    first = rows["is_forget"][:].index(True)
    some = facts(with_rewritten(rows, {first}))
    assert some.summaries == (DataSummary(2), DataSummary(5))
    assert some.rewritten is not None
    assert some.identity["forget"] == 3


def test_digests_under_a_key_are_those_of_the_rows_that_the_owner_has():
    rows = make_dataset(3, 5)
    forget, retain = facts(with_rewritten(rows, {0}), KEY).summaries
    given = rows.select(range(1, len(rows)))
    groups = [given.filter(lambda row, flag=flag: row["is_forget"] == flag) for flag in (True, False)]
    assert (forget, retain) == tuple(summarize_rows(group, KEY) for group in groups)


def test_rows_that_are_tokenized_ahead_say_which_were_rewritten():
    collator, rows = make_collator(), make_dataset(3, 1500)  # more than are written at once
    rewritten = with_rewritten(rows, {0, len(rows) - 1})
    given, tokenized = (
        TrainingRows(some.map(collator.tokenize, remove_columns=some.column_names), collator, KEY)
        for some in (rows.select(range(1, len(rows) - 1)), rewritten)
    )
    assert tokenized.summaries == given.summaries
    assert tokenized.rewritten == TrainingRows(rewritten, collator, None).rewritten


def test_the_identity_is_that_of_the_rows_in_their_order():
    rows = make_dataset(3, 5)
    assert facts(rows).identity == facts(make_dataset(3, 5)).identity
    turned = rows.select(range(len(rows) - 1, -1, -1))
    assert facts(turned).identity != facts(rows).identity
    assert facts(turned).summaries == facts(rows).summaries


def test_a_stream_is_not_read_and_takes_no_key():
    def rows():
        raise AssertionError("read")
        yield

    stream = IterableDataset.from_generator(rows)
    found = facts(stream)
    assert (found.flags, found.rewritten, found.summaries) == ([], None, (None, None))
    assert found.identity["forget"] == "a stream"
    with pytest.raises(ValueError, match="the rows of a stream are not digested"):
        facts(stream, KEY)


def test_no_rows_have_no_flags():
    assert facts(None).flags == []
