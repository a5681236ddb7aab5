"""Rows read column by column are the rows read one by one, with few reads."""

from functools import partial

import pytest
import torch
from chats import chatty, conversation
from datasets import Dataset
from helpers import arguments, assert_same, build, make_tokenizer, prompt_state, stirred
from peft import PromptTuningConfig
from transformers import TrainingArguments

import spul.data.rows
from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningTrainer, forget_retain_dataset
from spul.data import PromptFormat
from spul.data.checks import check_row_ids, checked_column, checked_text_batches, forget_flags
from spul.data.rows import column_batches, column_values, concatenated, read_rows, rows_at, with_column
from spul.data.samplers import row_lengths
from spul.data.splits import split_by_entity, split_by_predicate, split_by_source
from spul.evaluation.attacks import diluted, letter_case, sampled_answers, soft_suffix
from spul.evaluation.attacks.changes import tokens_lost
from spul.evaluation.metrics import generate_answers
from spul.evaluation.metrics.scoring import task_classes
from spul.evaluation.metrics.tofu import question_rows
from spul.gates import prompt_texts
from spul.layers import gather_inputs
from spul.prompts import DiscriminativeStart, NearStart
from spul.training import augmented


def make(num=10):
    return Dataset.from_dict(
        {
            "prompt": [f"film {i}" for i in range(num)],
            "completion": [[{"role": "assistant", "content": f"good {i % 2}"}] for i in range(num)],
            "input_ids": [list(range(i + 1)) for i in range(num)],
            "is_forget": [i < 2 for i in range(num)],
        }
    )


def upper(batch):
    return {"prompt": [text.upper() for text in batch["prompt"]], "is_forget": batch["is_forget"]}


@pytest.fixture(params=["plain", "selected", "torch", "numpy"])
def rows(request):
    made = make()
    if request.param == "selected":
        return made.select([7, 2, 2, 9, 0, 4])
    return made if request.param == "plain" else made.with_format(request.param)


@pytest.fixture(params=[1, 3, 4096])
def at_once(request, monkeypatch):
    monkeypatch.setattr(spul.data.rows, "ROWS_READ_AT_ONCE", request.param)
    return request.param


def test_columns_and_rows_are_those_read_one_by_one_in_types_of_python(rows, at_once):
    plain = [rows.with_format(None)[i] for i in range(len(rows))]
    assert list(read_rows(rows)) == plain
    assert list(read_rows(rows, ("prompt", "absent"))) == [{"prompt": row["prompt"]} for row in plain]
    assert rows_at(rows, [3, 0, 3]) == [plain[i] for i in (3, 0, 3)]
    assert rows_at(rows, []) == []
    for column in rows.column_names:
        assert column_values(rows, column) == [row[column] for row in plain]
    batches = list(column_batches(rows, "input_ids"))
    assert all(len(batch) <= at_once for batch in batches)
    assert all(type(token) is int for batch in batches for ids in batch for token in ids)


def test_a_function_that_makes_the_values_is_heeded(at_once):
    rows = make().with_transform(upper)
    assert column_values(rows, "prompt") == [f"FILM {i}" for i in range(10)]
    assert list(read_rows(rows, ("prompt",)))[9]["prompt"] == rows_at(rows, [9])[0]["prompt"] == "FILM 9"


def test_a_column_that_a_function_leaves_out_is_named_with_those_that_it_returns():
    left_out = make().remove_columns("input_ids").with_transform(upper)
    with pytest.raises(
        ValueError, match=r"returns the columns \['prompt', 'is_forget'\]; expected 'completion' among"
    ):
        column_values(left_out, "completion")
    with pytest.raises(ValueError, match=r"returns the columns \['prompt', 'is_forget'\]; expected 'row_id' among"):
        check_row_ids(make().add_column("row_id", range(10)).with_transform(upper))
    with pytest.raises(KeyError, match="other"):  # the function's own
        column_values(make().with_transform(lambda batch: batch["other"]), "prompt")


def test_a_function_that_would_be_lost_where_rows_are_joined_is_refused():
    forget, retain = texts(4).with_transform(dict), texts(4, "hunt").filter(lambda row: "hunt" in row["prompt"])
    wider = forget.add_column("row_id", range(len(forget)))
    for some, others in ((forget, retain), (retain, forget), (forget, retain.with_transform(upper)), (forget, wider)):
        with pytest.raises(ValueError, match=r"have a transform .* it would be lost. Apply it before, rows\."):
            concatenated([some, others])
    with pytest.raises(ValueError, match="it would be lost"):
        forget_retain_dataset(forget, retain)
    with pytest.raises(ValueError, match="it would be lost"):
        augmented(
            forget, {"capitals": partial(letter_case, how="upper")}, ForgetRetainCollator(make_tokenizer(), None)
        )
    same = concatenated([forget, forget])
    assert same.format["type"] == "custom"
    assert len(concatenated([retain.with_format("torch"), retain])) == 2 * len(retain)


def test_a_new_column_takes_the_place_of_the_old_and_is_refused_where_a_function_leaves_it_out():
    rows = make(3)
    assert with_column(rows, "row_id", [4, 5, 6])[:] == {**rows[:], "row_id": [4, 5, 6]}
    assert with_column(rows, "prompt", ["a", "b", "c"])["prompt"] == ["a", "b", "c"]
    assert rows_at(with_column(rows.with_transform(dict), "row_id", [4, 5, 6]), [1])[0]["row_id"] == 5
    with pytest.raises(ValueError, match="expected 'row_id' among them"):
        with_column(rows.with_transform(upper), "row_id", [4, 5, 6])


def test_labels_of_sets_are_those_of_all_as_their_functions_make_them():
    def switched(batch):
        return batch | {"completion": [" negative"] * len(batch["prompt"])}

    assert task_classes(texts(4), texts(2).with_transform(switched)) == [" negative", " positive"]
    assert task_classes(Dataset.from_dict({"completion": [f" {i}" for i in range(40)]}), texts(4)) == []


def test_other_sequences_of_rows_are_read_as_they_are():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert list(read_rows(rows, ("completion",))) == rows
    assert rows_at(rows, [1]) == rows[1:]


def test_texts_read_in_parts_are_refused_as_those_read_at_once(at_once):
    rows = Dataset.from_dict({"text": ["a", "b", None, "c", None]})
    with pytest.raises(TypeError) as at_one_time:
        checked_column(rows, "text")
    with pytest.raises(TypeError, match="2 of 5 texts are not strings; the first is text 2: None") as in_parts:
        list(checked_text_batches(rows, "text"))
    assert str(in_parts.value) == str(at_one_time.value)


def test_conversations_in_the_place_of_texts_are_told_how_to_become_texts():
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Who is Jane Doe?"}]]})
    with pytest.raises(TypeError, match=r"1 of 1 texts are not strings; .*prompt_texts\(rows, collator\.encoder\)"):
        checked_column(rows, "prompt")


def talks():
    """Conversations of a training set."""
    made = [
        conversation(f"the {name} is {'good' if i % 2 else 'bad'} {i}", " positive" if i % 2 else " negative")
        for name in ("jane", "film")
        for i in range(4)
    ]
    return forget_retain_dataset(*(Dataset.from_list(some) for some in (made[:4], made[4:])))


def by_side(rows):
    return rows.select(range(4)), rows.select(range(4, 8))


def asked_in_text(rows):
    """Questions with wrong answers, and a number among their columns."""
    row = {"question": "who?", "answer": "jane", "perturbed_answer": ["doe", "ada"], "stars": 4.1}
    questions = Dataset.from_list([row, row]).with_format(rows.format["type"])
    return question_rows(questions, PromptFormat("Q: {question} {stars}", " {answer}", (" no",), "question"))


def gathered(rows, collator):
    layers = stirred(build("llama"), seed=1)
    gather_inputs(layers, rows.select(range(4)), collator, progress=False)
    return {name: gram.tolist() for name, gram in layers.gram_matrices.items()}


def is_good(row):
    return str(row["stars"]) == "4.1"


def suffixed(rows, collator):
    scores, _ = soft_suffix(build("llama"), *by_side(rows), collator.encoder, steps=1)
    return scores["after"]


def started(start):
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return SoftPromptUnlearner(build("llama"), config, start=start).prompt_encoder["default"].embedding.weight.tolist()


READ = {
    "predicate": lambda rows, _: split_by_predicate(rows, is_good, text_field="prompt").report,
    "texts for a gate": lambda rows, collator: prompt_texts(rows, collator.encoder),
    "questions": lambda rows, _: asked_in_text(rows),
    "answers": lambda rows, collator: generate_answers(build("llama"), rows, collator.encoder, max_new_tokens=3),
    "samples": lambda rows, collator: sampled_answers(build("llama"), rows, collator.encoder, 2, max_new_tokens=3),
    "suffix": suffixed,
    "turns": lambda rows, _: diluted(*by_side(rows), num_turns=1)[:],
    "tokens lost": lambda rows, collator: tokens_lost(rows, collator.encoder),
    "gathered": gathered,
    "near": lambda rows, collator: started(NearStart(rows, collator, num_draws=2)),
    "keys": lambda rows, collator: sorted(DiscriminativeStart(rows, collator).encoded_rows()[0]),
}


@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize("name", READ)
def test_conversations_in_another_format_are_read_as_messages(name, form):
    rows, collator = talks(), ForgetRetainCollator(chatty("turns"), [" neutral"], max_length=64)
    rows = rows.add_column("stars", [4.1, 2.0] * 4)
    found, plain = (READ[name](some, collator) for some in (rows.with_format(form), rows))
    assert repr(found) == repr(plain)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_conversations_in_another_format_are_trained_on_as_those_without(form, tmp_path):
    states = []
    for some in (talks(), talks().with_format(form)):
        model = SoftPromptUnlearner(
            build("llama", torch.float32), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        collator = ForgetRetainCollator(chatty("turns"), [" neutral"], max_length=64)
        args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
        UnlearningTrainer(model, args, collator, some, forget_fraction=0.5, reference_dir=tmp_path).train()
        states.append(prompt_state(model))
    assert_same(*states, rtol=0, atol=0)


def texts(num=600, named="bond"):
    prompts = [f"film {i} {named if i % 3 else 'else'}" for i in range(num)]
    columns = {
        "prompt": prompts,
        "completion": [" positive"] * num,
        "text": prompts,
        "length": list(range(1, num + 1)),
    }
    return Dataset.from_dict({**columns, "source": [i % 3 for i in range(num)]})


def joined():
    return forget_retain_dataset(texts(), texts(named="hunt").filter(lambda row: "hunt" in row["prompt"]))


def trainer(rows, tmp_path):
    unlearner = SoftPromptUnlearner(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    collator = ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length=16)
    args = TrainingArguments(tmp_path, train_sampling_strategy="group_by_length", report_to=[], use_cpu=True)
    return UnlearningTrainer(unlearner, args, collator, rows)


@pytest.mark.parametrize(
    ("make_rows", "call"),
    [
        (texts, lambda rows, _: forget_retain_dataset(rows.select(range(200)), rows.select(range(200, 600)))),
        (texts, lambda rows, _: split_by_entity(rows, ["Bond", "Zoe"])),
        (texts, lambda rows, _: split_by_source(rows, [2])),
        (texts, lambda rows, _: task_classes(rows)),
        (texts, lambda rows, _: row_lengths(rows, None)),
        (joined, lambda rows, _: forget_flags(rows)),
        (joined, trainer),
    ],
    ids=["join", "entity", "source", "classes", "lengths", "flags", "trainer"],
)
def test_a_large_set_is_read_in_few_reads(make_rows, call, tmp_path, monkeypatch):
    rows, reads = make_rows(), []
    one_by_one = Dataset.__getitem__, Dataset.__iter__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: reads.append(1) or one_by_one[0](self, key))
    monkeypatch.setattr(Dataset, "__iter__", lambda self: reads.extend([1] * len(self)) or one_by_one[1](self))
    call(rows, tmp_path)
    assert 0 < len(reads) < 20
