"""Streams of rows: interleaved at a share, trained on, resumed; and refused where rows are needed by number."""

import itertools

import pytest
from datasets import Dataset, IterableDataset
from helpers import ONE_STEP, assert_same, make_collator, make_trainer, make_unlearner, prompt_state, rows

from spul import UnlearningTrainer
from spul.data import forget_retain_stream

STEPS = {**ONE_STEP, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}


def generated(name, num=40):
    """A stream whose columns nobody knows before it is read."""
    given = list(rows(name, num))
    return IterableDataset.from_generator(lambda: iter(given))


def stream(forget_fraction=0.25, seed=0, num=40):
    return forget_retain_stream(generated("jane", num), generated("film", num), forget_fraction, seed)


def seen(some):
    return [(row["prompt"], row["is_forget"]) for row in some]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_forget_rows_have_their_share_and_every_row_comes(share):
    found = seen(stream(share, num=200))
    flags = [flag for _, flag in found]
    assert sum(flags) / len(flags) == pytest.approx(share, abs=0.06)
    for name, flag in (("jane", True), ("film", False)):
        assert {prompt for prompt, is_forget in found if is_forget == flag} == {
            row["prompt"] for row in rows(name, 200)
        }


def test_a_seed_gives_one_order_and_another_another():
    assert seen(stream(seed=1)) == seen(stream(seed=1)) != seen(stream(seed=2))


def test_rows_are_read_as_they_are_needed():
    read = []

    def given(name):
        for i in itertools.count():
            read.append(name)
            yield {"prompt": f"{name} {i} :", "completion": " good"}

    endless = [IterableDataset.from_generator(given, gen_kwargs={"name": name}) for name in ("jane", "film")]
    assert len(list(forget_retain_stream(*endless, 0.5).take(20))) == 20
    assert len(read) < 40


def test_a_stream_continues_where_its_state_was_taken():
    whole, one, other = seen(stream()), stream(), stream()
    first = seen(itertools.islice(one, 17))
    other.load_state_dict(one.state_dict())
    assert first + seen(other) == whole


def test_a_data_set_is_read_as_a_stream_and_other_columns_stay():
    forget = rows("jane", 5).add_column("source", ["a"] * 5)
    found = list(forget_retain_stream(forget, rows("film", 5).add_column("source", ["b"] * 5), 0.5))
    assert {(row["source"], row["is_forget"]) for row in found} == {("a", True), ("b", False)}


@pytest.mark.parametrize("name", ["forget", "retain"])
@pytest.mark.parametrize("as_stream", [False, True])
def test_a_row_that_says_it_is_of_the_other_stream_is_refused_when_it_is_read(name, as_stream):
    flag = name == "forget"
    mixed = rows("doe", 4).add_column("is_forget", [flag, flag, not flag, flag])
    mixed = mixed.to_iterable_dataset() if as_stream else mixed
    made = forget_retain_stream(
        **{"forget": rows("jane", 4), "retain": rows("film", 4), name: mixed}, forget_fraction=0.5
    )
    with pytest.raises(ValueError, match=f"a row of {name} has is_forget={not flag}; expected {flag}"):
        list(made)
    agreeing = rows("doe", 4).add_column("is_forget", [flag] * 4)
    sets = {"forget": rows("jane", 4), "retain": rows("film", 4), name: agreeing}
    found = list(forget_retain_stream(**sets, forget_fraction=0.5))
    assert {row["is_forget"] for row in found} == {True, False}


def test_a_run_on_a_stream_resumes_to_the_same_prompt(tmp_path):
    settings = {"reference": "live", "dataset": stream(0.5), **STEPS}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **{**settings, "dataset": stream(0.5)})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(prompt_state(whole.model), prompt_state(resumed.model), rtol=0, atol=0)
    assert any(entry.get("kl_loss", 0) > 0 for entry in whole.state.log_history)


def test_tokenized_streams_make_the_steps_of_text(tmp_path):
    collator = make_collator()
    text = make_trainer(tmp_path, reference="live", dataset=stream(0.5), **ONE_STEP)
    text.train()
    sets = [rows(name, 40).map(collator.tokenize) for name in ("jane", "film")]
    tokens = make_trainer(tmp_path, reference="live", dataset=forget_retain_stream(*sets, 0.5), **ONE_STEP)
    tokens.train()
    assert_same(prompt_state(text.model), prompt_state(tokens.model), rtol=0, atol=1e-6)


def no_rows():
    return iter(())


def test_what_cannot_be_a_stream_is_refused():
    film = rows("film", 3)
    with pytest.raises(TypeError, match="forget is a list"):
        forget_retain_stream(list(film), film, 0.5)
    with pytest.raises(ValueError, match="retain has the columns"):
        forget_retain_stream(film, Dataset.from_list([{"text": "a"}]), 0.5)
    typed = IterableDataset.from_generator(no_rows, features=film.features)
    for empty in (film.select([]), IterableDataset.from_generator(no_rows), typed):
        with pytest.raises(ValueError, match="forget has no rows; expected at least one"):
            forget_retain_stream(empty, film, 0.5)
        with pytest.raises(ValueError, match="retain has no rows; expected at least one"):
            forget_retain_stream(IterableDataset.from_generator(film.__iter__), empty, 0.5)
    for seed in (-1, None, "1", 1.5):
        with pytest.raises(ValueError, match=f"seed={seed!r}: expected a whole number"):
            forget_retain_stream(film, film, 0.5, seed)
    for share in (0, 1, True, -0.1):
        with pytest.raises(ValueError, match="forget_fraction"):
            forget_retain_stream(film, film, share)


@pytest.mark.parametrize(
    ("options", "named"),
    [({}, "reference='live'"), ({"reference": "live", "forget_fraction": 0.5}, "forget_retain_stream")],
)
def test_options_that_need_rows_by_number_name_the_way_out(tmp_path, options, named):
    from helpers import arguments

    with pytest.raises(ValueError, match=named):
        UnlearningTrainer(make_unlearner(), arguments(tmp_path, **STEPS), make_collator(), stream(), **options)
