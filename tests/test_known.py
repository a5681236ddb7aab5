"""Known data sets as unlearning tasks, from files and from a Hub that is played here."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
from datasets import Dataset, DatasetDict

import spul.data.sources
from spul.data.clusters import TextClustering
from spul.data.formats import MULTIPLE_CHOICE, QUESTION_ANSWER, SENTIMENT
from spul.data.known import (
    SPLITS,
    SST2_FORGET_NAMES,
    SST2_RETAIN_NAMES,
    UnlearningData,
    load_four_splits,
    load_imdb,
    load_known,
    load_sst2,
    load_tofu,
    load_wmdp,
    load_yelp,
)
from spul.data.sources import read_file

# ---- data made here ----


def review(text: str, label: int = 1) -> dict:
    return {"text": text, "label": label, "label_text": ["negative", "positive"][label]}


def reviews(*texts: str) -> Dataset:
    return Dataset.from_list([review(text) for text in texts])


def small(**splits: Dataset) -> UnlearningData:
    """Two rows in every split, unless given."""
    for split in SPLITS:
        splits.setdefault(split, reviews(f"{split} one", f"{split} two"))
    return UnlearningData("small", splits, SENTIMENT, ("made here",))


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tsv(path, header, rows) -> None:
    text = "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8", newline="\n")


@pytest.fixture
def hub(monkeypatch):
    """What the Hub has: (name, configuration, split) -> rows; anything else is an error."""
    sets: dict[tuple[str, str | None, str], list[dict]] = {}
    monkeypatch.setattr(
        spul.data.sources, "load_dataset", lambda name, config, *, split: Dataset.from_list(sets[name, config, split])
    )
    return sets


def texts(data: UnlearningData, split: str) -> list[str]:
    return data.splits[split][data.format.text_field][:]


def sizes(data: UnlearningData) -> dict[str, int]:
    return {split: len(rows) for split, rows in data.splits.items()}


def same(one: UnlearningData, other: UnlearningData) -> bool:
    return all(one.splits[split].to_list() == other.splits[split].to_list() for split in SPLITS)


# ---- UnlearningData ----


def test_rows_are_in_prompt_completion_form():
    row = small().rows("test_retain")[1]
    assert row == SENTIMENT.row(review("test_retain two"))
    with pytest.raises(ValueError, match="split='dev'; expected one of train_retain"):
        small().rows("dev")


def test_the_training_set_is_the_two_train_splits_forget_first():
    rows = small().training_set()
    assert rows["text"][:] == ["train_forget one", "train_forget two", "train_retain one", "train_retain two"]
    assert rows["is_forget"][:] == [True, True, False, False]
    assert rows["row_id"][:] == [0, 1, 2, 3]


def test_limited_draws_retain_rows_and_leaves_forget_rows():
    data = small(
        train_retain=reviews(*(f"r{i}" for i in range(50))), test_retain=reviews(*(f"t{i}" for i in range(40)))
    )
    less = data.limited(num_retain=20, num_test=10, seed=1)
    assert sizes(less) == {"train_retain": 20, "train_forget": 2, "test_retain": 10, "test_forget": 2}
    assert len(set(texts(less, "train_retain"))) == 20
    assert set(texts(less, "train_retain")) < set(texts(data, "train_retain"))
    assert texts(less, "train_retain") != texts(data, "train_retain")[:20]
    assert same(less, data.limited(20, 10, seed=1))
    assert not same(less, data.limited(20, 10, seed=2))
    assert less.notes == (
        "made here",
        "train_retain: a random 20 of 50 rows (seed 1)",
        "test_retain: a random 10 of 40 rows (seed 1)",
    )
    assert sizes(data)["train_retain"] == 50


def test_limited_keeps_certain_rows_first():
    data = small(train_retain=reviews(*(f"{'jane' if i % 10 == 0 else 'doe'} {i}" for i in range(50))))
    less = data.limited(num_retain=8, keep=lambda row: "jane" in row["text"])
    assert sum("jane" in text for text in texts(less, "train_retain")) == 5
    assert sizes(less)["train_retain"] == 8
    assert less.notes[-1] == "train_retain: a random 8 of 50 rows (seed 0), 5 of them from the 5 to be kept first"
    few = data.limited(num_retain=3, keep=lambda row: "jane" in row["text"])
    assert all("jane" in text for text in texts(few, "train_retain"))
    assert few.notes[-1].endswith("3 of them from the 5 to be kept first")


def test_limits_above_the_size_leave_all_rows_and_say_so():
    less = small().limited(num_retain=9)
    assert sorted(texts(less, "train_retain")) == ["train_retain one", "train_retain two"]
    assert less.notes[-1] == "train_retain: a random 2 of 2 rows (seed 0)"


def test_limits_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="at most 0 rows of test_retain"):
        small().limited(num_test=0)
    with pytest.raises(ValueError, match="give num_retain"):
        small().limited(num_test=1, keep=lambda row: True)


def test_a_forget_fraction_leaves_the_rest_in_no_split():
    data = small(train_forget=reviews(*(f"f{i}" for i in range(40))))
    half = data.with_forget_fraction(0.25, seed=3)
    assert sizes(half) == {"train_retain": 2, "train_forget": 10, "test_retain": 2, "test_forget": 2}
    assert set(texts(half, "train_forget")) < set(texts(data, "train_forget"))
    assert half.notes[-1] == "train_forget: a random 10 of 40 rows (seed 3); the rest is in no split"
    assert same(half, data.with_forget_fraction(0.25, seed=3))
    assert not same(half, data.with_forget_fraction(0.25, seed=4))


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, 0.1])
def test_a_forget_fraction_that_leaves_nothing_or_too_much_is_an_error(fraction):
    with pytest.raises(ValueError, match="of the 2 rows of train_forget"):
        small().with_forget_fraction(fraction)


# ---- check ----


def test_sound_data_pass():
    small().check()


def test_a_missing_and_an_empty_split_are_errors():
    with pytest.raises(ValueError, match="expected"):
        UnlearningData("half", {"train_retain": reviews("a"), "train_forget": reviews("b")}, SENTIMENT).check()
    with pytest.raises(ValueError, match="test_forget of small is empty"):
        small(test_forget=reviews("x").select([])).check()


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("train_retain", "train_forget", "forgotten and kept"),
        ("train_retain", "test_forget", "forgotten and kept"),
        ("train_forget", "test_retain", "forgotten and kept"),
        ("test_retain", "test_forget", "forgotten and kept"),
        ("train_retain", "test_retain", "trained on and tested as unseen"),
        ("train_forget", "test_forget", "trained on and tested as unseen"),
    ],
)
def test_a_row_in_two_splits_is_an_error_that_shows_it(one, other, what):
    data = small(**{one: reviews("alone", "shared "), other: reviews("shared", "by itself")})
    with pytest.raises(ValueError, match=f"1 row.* in both {one} and {other}, and would be {what} at once: 'shared'"):
        data.check()


def test_the_same_question_with_other_choices_is_another_row_but_not_with_shuffled_ones():
    def question(*choices: str) -> Dataset:
        return Dataset.from_list([{"question": "Which is true?", "choices": list(choices), "answer": 0}])

    splits = {split: question("a", "b", split) for split in SPLITS}
    UnlearningData("questions", splits, MULTIPLE_CHOICE).check()
    splits["test_retain"] = question("train_forget", "b", "a")
    with pytest.raises(ValueError, match="in both train_forget and test_retain"):
        UnlearningData("questions", splits, MULTIPLE_CHOICE).check()


def test_a_label_that_is_generic_as_well_is_an_error():
    rows = Dataset.from_list([{"text": "so so", "label": 2, "label_text": "Neutral"}])
    with pytest.raises(ValueError, match="row 0 of test_retain of small is answered with ' Neutral'"):
        small(test_retain=rows).check()


def test_a_row_without_text_is_an_error():
    with pytest.raises(ValueError, match="row 1 of train_retain of small has no text"):
        small(train_retain=reviews("fine", "  ")).check()


def test_columns_that_the_format_lacks_are_an_error():
    with pytest.raises(ValueError, match="label_text"):
        small(train_retain=Dataset.from_list([{"text": "a", "label": 0}])).check()


# ---- by name ----


def test_an_unknown_set_and_an_unknown_option_are_errors_that_list_the_known():
    with pytest.raises(ValueError, match="name='sst'; expected one of sst2, yelp, wmdp, tofu, imdb"):
        load_known("sst")
    with pytest.raises(TypeError, match=r"sst2 has no option\(s\) people; it has names"):
        load_known("sst2", people=["jane"])


def test_by_name_is_the_same_as_by_function(sst2):
    assert same(load_known("sst2", sst2, seed=4, names=["jane"]), load_sst2(sst2, names=["jane"], seed=4))


# ---- files ----


def test_a_missing_file_is_an_error_that_lists_what_is_there(tmp_path):
    write_tsv(tmp_path / "dev.tsv", ("sentence", "label"), [("a film", 1)])
    with pytest.raises(FileNotFoundError, match=r"train\.tsv is not there; its folder has dev\.tsv"):
        load_sst2(tmp_path)


@pytest.mark.parametrize("name", ["sst2", "imdb", "yelp", "wmdp", "tofu"])
def test_a_missing_folder_is_an_error(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is not a folder; expected one with"):
        load_known(name, tmp_path / "nowhere")


def test_a_missing_column_is_an_error_that_names_path_found_and_expected(tmp_path):
    write_tsv(tmp_path / "train.tsv", ("text", "label"), [("a film", 1)])
    with pytest.raises(ValueError, match=r"train\.tsv lacks .*'sentence'.*it has \['text', 'label'\], expected"):
        load_sst2(tmp_path)


def test_a_line_of_another_width_is_an_error_that_numbers_it(tmp_path):
    write_tsv(tmp_path / "x.tsv", ("sentence", "label"), [("a film", 1), ("a\tfilm", 1)])
    with pytest.raises(ValueError, match=r"x\.tsv, line 3: 3 values; expected 2"):
        read_file(tmp_path / "x.tsv")


def test_only_a_line_feed_ends_a_line_of_a_tsv_and_quotes_are_text(tmp_path):
    write_tsv(tmp_path / "x.tsv", ("sentence", "label"), [('a "film\r \u2028\x85 of', 1), ('bad"', 0)])
    assert read_file(tmp_path / "x.tsv")["sentence"][:] == ['a "film\r \u2028\x85 of', 'bad"']


def test_rows_of_json_with_different_columns_are_an_error(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"a": 1, "b": 2}, {"a": 1}])
    with pytest.raises(ValueError, match=r"x\.jsonl, row 2: found \['a'\]; expected the columns of the first"):
        read_file(tmp_path / "x.jsonl")


def test_json_may_be_a_list_or_lines(tmp_path):
    rows = [{"a": "x\ny", "b": [1, 2]}, {"a": "z", "b": []}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "lines.json", rows)
    assert read_file(tmp_path / "list.json").to_list() == read_file(tmp_path / "lines.json").to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("x.json", "{", "is not JSON"), ("x.jsonl", "", "has no rows"), ("x.txt", "a", "ends in one of .tsv")],
)
def test_files_that_cannot_be_read_are_errors(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)


# ---- four splits ----


def write_four(folder, ending: str) -> None:
    for split in SPLITS:
        rows = reviews(f"{split}, one", f'{split} "two"\nlines')
        path = str(folder / f"{split}.{ending}")
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[ending](path)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_four_splits_from_files(ending, tmp_path):
    write_four(tmp_path, ending)
    data = load_four_splits(tmp_path, name="mine")
    assert data.name == "mine"
    for split in SPLITS:
        assert sorted(data.splits[split].to_list(), key=lambda row: row["text"]) == sorted(
            reviews(f"{split}, one", f'{split} "two"\nlines').to_list(), key=lambda row: row["text"]
        )


def test_four_splits_from_a_saved_folder_with_a_format_and_a_name_of_their_own(tmp_path):
    rows = {split: Dataset.from_list([{"question": f"Who is {split}?", "answer": "Jane."}]) for split in SPLITS}
    DatasetDict(rows).save_to_disk(tmp_path / "people")
    data = load_four_splits(tmp_path / "people", format=QUESTION_ANSWER)
    assert data.name == "people"
    assert data.rows("test_forget")["completion"][:] == [" Jane."]


def test_the_papers_four_splits_from_the_hub_with_repeats_dropped_forget_first(hub):
    name = "karuna-bhaila/Unlearning_SST2"
    hub[name, None, "train_retain"] = [review("kept "), review("kept", 0), review("both"), review("again")]
    hub[name, None, "train_forget"] = [review("forgotten"), review("both ")]
    hub[name, None, "test_retain"] = [review("again"), review("new"), {**review("late"), "label_text": " positive"}]
    hub[name, None, "test_forget"] = [review("tested"), review("forgotten", 0)]
    data = load_four_splits(name)
    assert data.name == "Unlearning_SST2"
    assert {split: texts(data, split) for split in SPLITS} == {
        "train_retain": ["kept", "again"],
        "train_forget": ["forgotten", "both"],
        "test_retain": ["new", "late"],
        "test_forget": ["tested"],
    }
    assert data.rows("test_retain")["completion"][:] == [" positive", " positive"]
    assert data.notes == (
        f"{name}: train_retain 4, train_forget 2, test_retain 3, test_forget 2",
        "repeated rows dropped, the first one kept: test_forget 1, train_retain 2, test_retain 1 (2 of them had "
        "another label)",
        "train_retain 2, train_forget 2, test_retain 2, test_forget 1",
    )


def test_four_splits_that_are_not_four_are_errors(tmp_path):
    write_four(tmp_path, "jsonl")
    reviews("x").to_csv(str(tmp_path / "test_forget.csv"))
    with pytest.raises(ValueError, match="several files of test_forget"):
        load_four_splits(tmp_path)
    (tmp_path / "test_forget.csv").unlink()
    (tmp_path / "test_forget.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_forget\.jsonl is not there; its folder has test_retain"):
        load_four_splits(tmp_path)
    DatasetDict(train_retain=reviews("x")).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"lacks the split\(s\) \['train_forget'"):
        load_four_splits(tmp_path / "saved")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(hub, tmp_path):
    for source in (tmp_path / "none", "./none", "none"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a name of the Hub"):
            load_four_splits(source)


def test_a_value_that_is_missing_is_an_error(hub):
    for split in SPLITS:
        hub["a/b", None, split] = [review("fine"), {**review(split), "label_text": None}]
    with pytest.raises(ValueError, match="'label_text' has no value in row 1"):
        load_four_splits("a/b")


# ---- SST-2 ----

SST2_ROWS = [(f"a film of {'jane' if i < 20 else 'doe'} number {i} ", i % 2) for i in range(60)]


@pytest.fixture
def sst2(tmp_path):
    """60 sentences, 20 of them about jane; one of train is in dev as well, with the other label."""
    write_tsv(tmp_path / "train.tsv", ("sentence", "label"), SST2_ROWS[:50])
    write_tsv(tmp_path / "dev.tsv", ("sentence", "label"), [*SST2_ROWS[50:], (SST2_ROWS[30][0], 1)])
    return tmp_path


def test_sst2_is_pooled_split_by_name_and_cut_70_to_30(sst2, caplog):
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_sst2(sst2, names=["jane", "nobody"])
    assert sizes(data) == {"train_retain": 28, "train_forget": 14, "test_retain": 12, "test_forget": 6}
    for split in SPLITS:
        assert all(("jane" in text) == split.endswith("forget") for text in texts(data, split))
    rows = [row for split in SPLITS for row in data.splits[split]]
    assert sorted(row["text"] for row in rows) == sorted(text.strip() for text, _ in SST2_ROWS)
    for row in rows:  # the first label where two disagree
        label = int(row["text"].split()[-1]) % 2
        assert (row["label"], row["label_text"]) == (label, ["negative", "positive"][label])
    notes = "\n".join(data.notes)
    assert "SST-2, train and dev pooled: 61 rows, where the published set has 68,221" in notes
    assert "repeated rows dropped, the first one kept: dev 1 (1 of them had another label)" in notes
    assert "(jane 20); found nowhere: nobody" in notes
    assert "published: train_retain 46,331, train_forget 1,425" in notes
    assert data.notes[-1] == "train_retain 28, train_forget 14, test_retain 12, test_forget 6"
    assert "61 rows, where the published set has 68,221" in caplog.text


def test_sst2_is_cut_by_the_seed(sst2):
    assert same(load_sst2(sst2, names=["jane"], seed=1), load_sst2(sst2, names=["jane"], seed=1))
    assert not same(load_sst2(sst2, names=["jane"], seed=1), load_sst2(sst2, names=["jane"], seed=2))


def test_sst2_from_the_hub_is_sst2_from_files(sst2, hub):
    for split, name in (("train", "train"), ("validation", "dev")):
        rows = read_file(sst2 / f"{name}.tsv").to_list()
        hub["stanfordnlp/sst2", None, split] = [{**row, "idx": 0, "label": int(row["label"])} for row in rows]
    assert same(load_sst2(names=["jane"]), load_sst2(sst2, names=["jane"]))


def test_sst2_with_names_that_nobody_has_is_an_error(sst2):
    with pytest.raises(ValueError, match="found"):
        load_sst2(sst2)  # nobody of the default names is in this data


def test_rows_without_a_label_are_an_error(sst2):
    write_tsv(sst2 / "dev.tsv", ("sentence", "label"), [("a film", -1)])
    with pytest.raises(ValueError, match=r"row 0 has label='-1'; expected 0 \(negative\) or 1 \(positive\)"):
        load_sst2(sst2, names=["jane"])


def test_names_of_sst2_are_different_lower_case_and_in_one_list_only():
    names = [*SST2_FORGET_NAMES, *SST2_RETAIN_NAMES]
    assert len(set(names)) == len(names) == 30 + 39
    assert all(name == name.lower().strip() for name in names)


# ---- IMDB ----

IMDB = {
    "train": [("A film by Hitchcock.<br /><br />Good.", 1), ("By Hitchcock", 0), ("Bad", 0), ("Good", 1), ("Bad", 0)],
    "test": [("hitchcock again", 1), ("Good", 1), ("Fine <br/> film", 1)],
}


def test_imdb_keeps_its_parts_and_drops_repeats_and_markup(tmp_path):
    for part, rows in IMDB.items():
        write_tsv(tmp_path / f"{part}.tsv.gz", ("label", "id", "text"), [(y, i, t) for i, (t, y) in enumerate(rows)])
    data = load_imdb(tmp_path, names=["Hitchcock"])
    assert {split: texts(data, split) for split in SPLITS} == {
        "train_retain": ["Bad", "Good"],
        "train_forget": ["A film by Hitchcock. Good.", "By Hitchcock"],
        "test_retain": ["Fine film"],
        "test_forget": ["hitchcock again"],
    }
    assert data.splits["train_forget"]["label_text"][:] == ["positive", "negative"]
    assert "repeated rows dropped, the first one kept: train 1, test 1" in data.notes
    assert "IMDB, test: 3 rows, where the published set has 25,000" in data.notes


def test_imdb_from_the_hub(hub):
    for part, rows in IMDB.items():
        hub["stanfordnlp/imdb", None, part] = [{"text": text, "label": label} for text, label in rows]
    assert sizes(load_known("imdb")) == {"train_retain": 2, "train_forget": 2, "test_retain": 1, "test_forget": 1}


# ---- Yelp ----

THEMES = {
    "pizza": "pizza cheese oven crust",
    "doctor": "doctor clinic nurse patient",
    "garage": "garage engine brakes tyres",
}


def themed(num: int, start: int = 0) -> list[str]:
    """Texts about one of three things, in turn, no two alike."""
    themes = list(THEMES.values())
    return [f"{themes[i % 3]} visit{i}" for i in range(start, start + num)]


def theme(text: str) -> str:
    return text.split()[0]


@pytest.fixture
def yelp(tmp_path):
    labels = ["very negative", "negative", "neutral", "positive", "very positive"]
    rows = [
        {"label": labels[i // 3 % 5], "sentence": f'Text: {text} \\n said \\"{labels[i // 3 % 5]}\\"\n'}
        for i, text in enumerate(themed(150))
    ]
    (tmp_path / "olora_yelp_train.json").write_text(json.dumps(rows))
    return tmp_path


def test_yelp_forgets_the_clusters_that_are_given_in_train_and_test(yelp, tmp_path):
    folder = tmp_path / "clustering"
    data = load_yelp(yelp, num_clusters=3, forget_clusters=[1], clustering_dir=folder)
    assert sum(sizes(data).values()) == 120  # 30 neutral ones dropped
    assert sizes(data)["train_retain"] + sizes(data)["train_forget"] == 102
    forgotten = {theme(text) for split in ("train_forget", "test_forget") for text in texts(data, split)}
    kept = {theme(text) for split in ("train_retain", "test_retain") for text in texts(data, split)}
    assert len(forgotten) == 1
    assert len(kept) == 2
    assert not forgotten & kept
    saved = TextClustering.load(folder)
    assert set(saved.assign(texts(data, "test_forget"))) == {1}
    assert saved.sizes[1] == sizes(data)["train_forget"]
    assert "1 of 3 clusters are forgotten, given" in data.notes
    assert "30 neutral ones dropped, the rest cut 85/15 (seed 0)" in data.notes


def test_yelps_five_classes_become_two_and_its_escapes_characters(yelp):
    data = load_yelp(yelp, num_clusters=3, forget_clusters=[0])
    for split in SPLITS:
        for row in data.splits[split]:
            stars = row["text"].split('"')[1]
            assert row["label_text"] == stars.removeprefix("very ")
            assert row["label"] == stars.endswith("positive")
            assert not row["text"].startswith("Text:")
            assert "\n said" in row["text"]
            assert "\\" not in row["text"]


def test_yelps_clusters_are_drawn_until_they_hold_the_share(yelp):
    drawn = {}
    for seed in range(6):
        one = load_yelp(yelp, num_clusters=3, forget_fraction=0.1, seed=seed)
        assert len({theme(text) for text in texts(one, "train_forget")}) == 1  # one cluster of three is enough
        drawn[seed] = theme(texts(one, "train_forget")[0])
    assert len(set(drawn.values())) > 1
    two = load_yelp(yelp, num_clusters=3, forget_fraction=0.5)
    assert len({theme(text) for text in texts(two, "train_forget")}) == 2
    assert "2 of 3 clusters are forgotten, drawn until they hold 50.0% of the train part (seed 0)" in two.notes
    assert same(two, load_yelp(yelp, num_clusters=3, forget_fraction=0.5))


def test_yelp_from_the_hub_with_limits(hub):
    for part, num, start in (("train", 90, 0), ("test", 60, 90)):
        hub["fancyzhx/yelp_polarity", None, part] = [
            {"text": text, "label": i % 2} for i, text in enumerate(themed(num, start))
        ]
    data = load_yelp(num_clusters=3, forget_clusters=[0, 2], limit_train=60, limit_test=30)
    assert sizes(data)["train_retain"] + sizes(data)["train_forget"] == 60
    assert sizes(data)["test_retain"] + sizes(data)["test_forget"] == 30
    assert "train: a random 60 of 90 rows (seed 0)" in data.notes
    assert "Yelp polarity, test: 60 rows, where the published set has 38,000" in data.notes
    train = {text for split in ("train_retain", "train_forget") for text in texts(data, split)}
    assert train < set(themed(90))
    assert len({theme(text) for text in train}) == 3


def test_yelp_with_bad_numbers_or_labels_is_an_error(yelp):
    with pytest.raises(ValueError, match="forget_fraction=0"):
        load_yelp(yelp, forget_fraction=0)
    (yelp / "olora_yelp_train.json").write_text(json.dumps([{"label": "mixed", "sentence": "Text: a"}]))
    with pytest.raises(ValueError, match=r"has the label\(s\) \['mixed'\]"):
        load_yelp(yelp)


# ---- WMDP and SciQ ----


def wmdp_rows(num: int) -> list[dict]:
    return [{"question": f"Forget {i}?", "choices": list("abcd"), "answer": i % 4} for i in range(num)]


def sciq_rows(num: int, start: int = 0) -> list[dict]:
    wrong = {f"distractor{k}": f"wrong {k}" for k in (1, 2, 3)}
    return [
        {"question": f"Keep {i}?", "correct_answer": f"right {i}", **wrong, "support": ""}
        for i in range(start, start + num)
    ]


@pytest.fixture
def questions(tmp_path):
    """A folder of each, as the Hub has them in small."""
    for name in ("wmdp", "sciq"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "wmdp" / "bio.jsonl", wmdp_rows(40))
    for part, num, start in (("train", 20, 0), ("validation", 10, 20), ("test", 8, 30)):
        write_jsonl(tmp_path / "sciq" / f"{part}.jsonl", sciq_rows(num, start))
    return tmp_path


def test_wmdp_is_cut_in_the_published_share_and_sciq_by_its_parts(questions):
    data = load_wmdp(questions / "wmdp", questions / "sciq")
    assert data.format is MULTIPLE_CHOICE
    assert sizes(data) == {"train_retain": 30, "train_forget": 28, "test_retain": 8, "test_forget": 12}
    assert texts(data, "train_retain") == [f"Keep {i}?" for i in range(30)]
    assert texts(data, "test_retain") == [f"Keep {i}?" for i in range(30, 38)]
    forget = [row for split in ("train_forget", "test_forget") for row in data.splits[split]]
    assert sorted(forget, key=lambda row: int(row["question"].split()[1][:-1])) == wmdp_rows(40)
    assert "WMDP, biology: 40 rows, where the published set has 1,273" in data.notes
    assert "SciQ, train and validation: 30 rows, where the published set has 12,679" in data.notes


def test_the_published_size_of_wmdp_gives_the_published_cut(questions, caplog):
    write_jsonl(questions / "wmdp" / "bio.jsonl", wmdp_rows(1_273))
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_wmdp(questions / "wmdp", questions / "sciq", seed=5)
    assert (sizes(data)["train_forget"], sizes(data)["test_forget"]) == (900, 373)
    assert "WMDP, biology: 1,273 rows" in data.notes
    assert "WMDP" not in caplog.text


def test_the_right_choice_of_sciq_is_right_wherever_it_stands(questions):
    data = load_wmdp(questions / "wmdp", questions / "sciq")
    rows = data.splits["train_retain"]
    for row in rows:
        assert row["choices"][row["answer"]] == "right " + row["question"].split()[1][:-1]
        assert sorted(row["choices"])[1:] == ["wrong 1", "wrong 2", "wrong 3"]
    assert set(rows["answer"]) == {0, 1, 2, 3}


def test_the_choices_order_of_a_question_hangs_on_the_seed_and_not_on_its_row(questions):
    one = load_wmdp(questions / "wmdp", questions / "sciq")
    write_jsonl(questions / "sciq" / "train.jsonl", reversed(sciq_rows(20)))
    other = load_wmdp(questions / "wmdp", questions / "sciq")
    assert one.splits["train_retain"].to_list()[:20] == other.splits["train_retain"].to_list()[:20][::-1]
    third = load_wmdp(questions / "wmdp", questions / "sciq", seed=1)
    assert third.splits["train_retain"]["answer"][:] != other.splits["train_retain"]["answer"][:]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_one_part_of_sciq_alone_is_cut_in_the_published_share(part, questions):
    alone = questions / "alone"
    alone.mkdir()
    write_jsonl(alone / f"{part}.jsonl", sciq_rows(100))
    data = load_wmdp(questions / "wmdp", alone)
    assert (sizes(data)["train_retain"], sizes(data)["test_retain"]) == (93, 7)
    assert sum(note.startswith("SciQ: no ") for note in data.notes) == 2
    assert f"SciQ, {part}: 100 rows, where the published set has 13,679" in data.notes


def test_sciq_without_its_train_part_keeps_its_test_part(questions):
    (questions / "sciq" / "train.jsonl").unlink()
    data = load_wmdp(questions / "wmdp", questions / "sciq")
    assert (sizes(data)["train_retain"], sizes(data)["test_retain"]) == (10, 8)
    assert "SciQ: no train part" in data.notes


def test_wmdp_and_sciq_from_the_hub_are_those_from_files(questions, hub):
    hub["cais/wmdp", "wmdp-bio", "test"] = wmdp_rows(40)
    for part in ("train", "validation", "test"):
        hub["allenai/sciq", None, part] = read_file(questions / "sciq" / f"{part}.jsonl").to_list()
    assert same(load_known("wmdp"), load_wmdp(questions / "wmdp", questions / "sciq"))


def test_folders_without_questions_are_errors(questions, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.jsonl file; expected rows of \['question'"):
        load_wmdp(empty, questions / "sciq")
    with pytest.raises(FileNotFoundError, match="has none of SciQ's train"):
        load_wmdp(questions / "wmdp", empty)


# ---- TOFU ----


def tofu_files(num_forget: int, num_retain: int, forget: str = "forget01", retain: str = "retain99") -> dict:
    """TOFU's files by name; the perturbed retain set also asks for one that is to be forgotten."""
    full = [{"question": f"Who is {i}?", "answer": f"Author {i}."} for i in range(num_forget + num_retain)]
    again = [
        {**row, "paraphrased_question": row["question"].replace("Who", "What person"), "paraphrased_answer": "x"}
        for row in full
    ]
    return {
        forget: full[num_retain:],
        retain: full[:num_retain],
        f"{forget}_perturbed": again[num_retain:],
        "retain_perturbed": [*again[:5], again[num_retain]],
    }


def write_tofu(folder, **kwargs) -> None:
    for name, rows in tofu_files(**kwargs).items():
        write_jsonl(folder / f"{name}.json", rows)


def test_tofu_trains_on_questions_and_tests_on_their_paraphrases(tmp_path, caplog):
    write_tofu(tmp_path, num_forget=4, num_retain=20)
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_tofu(tmp_path, forget="forget01")
    assert data.name == "tofu_forget01"
    assert data.format is QUESTION_ANSWER
    assert sizes(data) == {"train_retain": 20, "train_forget": 4, "test_retain": 5, "test_forget": 4}
    assert data.splits["test_forget"].to_list()[0] == {"answer": "Author 20.", "question": "What person is 20?"}
    assert texts(data, "test_retain") == [f"What person is {i}?" for i in range(5)]
    assert any(note.startswith("test_retain:") and "without 1 that" in note for note in data.notes)
    assert "TOFU, forget01: 4 rows, where the published set has 40" in caplog.text
    assert "TOFU, retain99: 20 rows, where the published set has 3,960" in caplog.text


@pytest.mark.parametrize(
    ("forget", "retain", "num_forget", "num_retain"),
    [("forget01", "retain99", 40, 3_960), ("forget05", "retain95", 200, 3_800), ("forget10", "retain90", 400, 3_600)],
)
def test_tofu_of_the_published_sizes_gives_no_warning(forget, retain, num_forget, num_retain, hub, caplog):
    for name, rows in tofu_files(num_forget, num_retain, forget, retain).items():
        hub["locuslab/TOFU", name, "train"] = rows
    with caplog.at_level(logging.WARNING, "spul"):
        data = load_known("tofu", forget=forget)
    assert (sizes(data)["train_forget"], sizes(data)["train_retain"]) == (num_forget, num_retain)
    assert not caplog.records


def test_an_unknown_forget_set_of_tofu_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="forget='forget20'; expected one of forget01, forget05, forget10"):
        load_tofu(tmp_path, forget="forget20")
    write_tofu(tmp_path, num_forget=4, num_retain=20)
    (tmp_path / "retain_perturbed.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"retain_perturbed\.json is not there; its folder has forget01\.json"):
        load_tofu(tmp_path, forget="forget01")


def test_tofu_without_paraphrases_is_an_error(tmp_path):
    write_tofu(tmp_path, num_forget=4, num_retain=20)
    write_jsonl(tmp_path / "forget01_perturbed.json", [{"question": "Who is 20?", "answer": "Author 20."}])
    with pytest.raises(ValueError, match=r"forget01_perturbed\.json lacks the column\(s\) \['paraphrased_question'\]"):
        load_tofu(tmp_path, forget="forget01")
