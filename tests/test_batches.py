"""One pass over rows: of many rows, those of one batch are in memory."""

import gc
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, build, longrope_unlearner, make_collator, prompted

from spul.data.encoded import Encoded
from spul.evaluation.metrics import batches
from spul.evaluation.metrics.batches import length_batches, map_responses
from spul.evaluation.metrics.likelihood import kl_to
from spul.evaluation.metrics.membership import attack_scores
from spul.evaluation.metrics.scoring import collect_answers, score_completions
from spul.models.causal_lm import evaluation_mode
from spul.models.compat_devices import TensorMemory


def many(num):
    """Rows of two lengths, in turn."""
    return Dataset.from_list(
        [{"prompt": f"review {'x ' * (i % 2 * 3)}{i} :", "completion": " positive"} for i in range(num)]
    )


def encoded_now():
    return sum(isinstance(one, Encoded) for one in gc.get_objects())


def test_every_row_is_in_one_batch_and_the_longest_come_first():
    rows, encoder = many(2500), make_collator().encoder  # more than are read at once
    found = list(length_batches(build("llama"), rows, encoder.encode, 64))
    assert sorted(i for batch in found for i in batch) == list(range(2500))
    assert {i % 2 for i in found[0]} == {1}
    assert {i % 2 for i in found[-1]} == {0}


def test_rows_of_a_module_without_a_config_are_batched_by_length_alone():
    assert list(length_batches(torch.nn.Linear(1, 1), many(4), make_collator().encoder.encode, 2)) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("multiple", [None, 4])
def test_with_longrope_scores_of_a_row_do_not_depend_on_the_others(multiple):
    """Behind the 4 virtual tokens and without them, on both sides of a switch at 12."""
    unlearner, collator = longrope_unlearner(), make_collator(pad_to_multiple_of=multiple, max_length=40)
    given = [{"prompt": "film " * num + ":", "completion": " positive"} for num in (3, 4, 5, 6, 7, 8, 9, 12, 15, 20)]
    rows = Dataset.from_list(given)
    lengths = [len(collator.encoder.encode(row)) for row in rows]
    assert min(lengths) <= 8
    assert any(8 < length <= 12 for length in lengths)
    assert max(lengths) > 12
    together = kl_to(unlearner, rows, collator.encoder, batch_size=len(rows))
    alone = [kl_to(unlearner, rows.select([i]), collator.encoder) for i in range(len(rows))]
    for name, values in together.items():
        assert values == pytest.approx([float(one[name][0]) for one in alone], rel=1e-6)
    answers = collect_answers(unlearner, rows, collator, len(rows), range(len(rows)))
    one_by_one = collect_answers(unlearner, rows, collator, 1, range(len(rows)))
    assert answers.nll == pytest.approx(one_by_one.nll, rel=1e-6)


def test_tokens_of_one_batch_are_in_memory():
    seen = []

    def measure(batch):
        seen.append(encoded_now())
        return batch.indices

    assert map_responses(build("llama"), many(200), make_collator().encoder, measure, batch_size=8) == list(range(200))
    assert len(seen) == 25
    assert max(seen) <= 16


MEASURES = {"scores": score_completions, "kl": kl_to, "attacks": attack_scores}


def peaks(measure, num):
    """Of one pass over `num` rows, in bytes: Python's objects, and the tensors of a batch."""
    model, collator, rows = prompted(), make_collator(), many(num)
    given = collator if measure is score_completions else collator.encoder
    with TensorMemory(VOCABULARY, model.parameters()) as tensors:
        gc.collect()
        gc.freeze()  # in a process with many objects, cycles would wait long to be collected
        tracemalloc.start()
        try:
            measure(model, rows, given, batch_size=50)
            return tracemalloc.get_traced_memory()[1], tensors.peak + tensors.peak_of_last
        finally:
            tracemalloc.stop()
            gc.unfreeze()


def print_peaks():
    """Of 200 and of 1,000 rows, for each of `MEASURES`, behind a first pass that imports what it needs."""
    batches.ROWS_READ_AT_ONCE = 50
    found = {name: [peaks(measure, num) for num in (100, 200, 1000)][1:] for name, measure in MEASURES.items()}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found_peaks():
    """From a process of their own: here, threads that other tests left allocate as well."""
    code = "import test_batches; test_batches.print_peaks()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("measure", MEASURES)
def test_a_further_row_takes_a_few_numbers(measure, found_peaks):
    """In bytes, with a result of a few arrays for each: less than its tokens alone would take as lists."""
    (few, of_batch), (most, of_its_batch) = found_peaks[measure]
    assert (most - few) / 800 < 1000
    assert of_its_batch < 1.2 * of_batch


def test_answers_are_in_the_order_of_the_rows_that_are_picked():
    rows, model, collator = many(9), build("llama"), make_collator()
    whole = collect_answers(model, rows, collator, 4, range(9))
    some = collect_answers(model, rows, collator, 4, range(1, 9, 3))
    assert some.nll == pytest.approx([whole.nll[i] for i in (1, 4, 7)], abs=1e-5)
    with evaluation_mode(model):
        assert collect_answers(model, rows, collator, 4, range(0)).nll == []
