"""Known sets of reviews, from files and from a Hub that is played here."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset, DatasetDict
from known_data import review, reviews, same, sizes, texts, write_tsv

from spul.data.clusters import TextClustering
from spul.data.formats import QUESTION_ANSWER
from spul.data.known import load_known
from spul.data.known_reviews import (
    SST2_FORGET_NAMES,
    SST2_RETAIN_NAMES,
    load_four_splits,
    load_imdb,
    load_sst2,
    load_yelp,
)
from spul.data.sources import read_file
from spul.data.unlearning_data import SPLITS

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
    with pytest.raises(FileNotFoundError, match=r"test_forget\.jsonl does not exist; its folder has test_retain"):
        load_four_splits(tmp_path)
    DatasetDict(train_retain=reviews("x")).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"lacks the split\(s\) \['train_forget'"):
        load_four_splits(tmp_path / "saved")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(hub, tmp_path):
    for source in (tmp_path / "none", "./none", "none"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a name on the Hub"):
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


# ---- by name ----


def test_an_unknown_set_and_an_unknown_option_are_errors_that_list_the_known():
    with pytest.raises(ValueError, match="name='sst'; expected one of sst2, yelp, wmdp, tofu, imdb"):
        load_known("sst")
    with pytest.raises(TypeError, match=r"sst2 has no option\(s\) people; expected some of names"):
        load_known("sst2", people=["jane"])


def test_by_name_is_the_same_as_by_function(sst2):
    assert same(load_known("sst2", sst2, seed=4, names=["jane"]), load_sst2(sst2, names=["jane"], seed=4))
