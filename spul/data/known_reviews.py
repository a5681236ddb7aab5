"""Known sets of reviews with a sentiment: SST-2, IMDB and Yelp; and any set stored as four splits."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_from_disk

from .clusters import TextClustering
from .formats import SENTIMENT, PromptFormat
from .rows import column_values
from .sources import check_folder, read_file, read_hub
from .splits import SplitReport, split_by_cluster, split_by_entity, train_test
from .unlearning_data import PRECEDENCE, SPLITS, UnlearningData, checked, size_note, without_repeats

SST2_FORGET_NAMES = (
    *("spielberg", "sandler", "chan", "murphy", "washington", "bond", "soderbergh", "seagal", "williams", "scorsese"),
    *("wilde", "shyamalan", "polanski", "kissinger", "woody allen", "de niro", "bullock", "herzog", "sarandon"),
    *("broomfield", "hopkins", "witherspoon", "chabrol", "godard", "madonna", "kidman", "fiennes", "schwarzenegger"),
    *("nicholson", "clooney"),
)
"""People of SST-2 to forget: 1,219 of its 67,850 different sentences name one of them."""

SST2_RETAIN_NAMES = (
    *("jackson", "hoffman", "lawrence", "benigni", "moore", "eastwood", "lopez", "solondz", "dickens", "willis"),
    *("britney", "freeman", "rohmer", "kaufman", "kahlo", "huppert", "duvall", "tarantino", "judd", "caine"),
    *("bruckheimer", "shakespeare", "auteuil", "affleck", "hewitt", "hartley", "gibson", "hitchcock", "costner"),
    *("binoche", "assayas", "mcdormand", "jolie", "carpenter", "pryor", "tsai", "diesel", "kapur", "cage"),
)
"""Other people of SST-2: 938 of its sentences name one of them; 77 of these are forget rows for another name."""

IMDB_FORGET_NAMES = (
    *("hitchcock", "spielberg", "kubrick", "tarantino", "scorsese", "polanski", "kurosawa", "coppola", "woody allen"),
    *("orson welles", "david lynch", "fellini", "godard", "de palma", "cronenberg", "argento"),
)
"""Film directors to forget."""

LABEL_TEXTS = ("negative", "positive")
YELP_LABELS = {"very negative": 0, "negative": 0, "positive": 1, "very positive": 1}


def load_four_splits(
    source: str | os.PathLike[str], format: PromptFormat = SENTIMENT, name: str | None = None
) -> UnlearningData:
    """Load a data set that is stored as four splits, such as the SPUL paper's: train and test, retain and forget.

    Repeated texts are dropped; one that is in a forget split is dropped from the retain splits.

    Args:
        source: folder that `DatasetDict.save_to_disk` wrote; folder of `train_retain`, `train_forget`, `test_retain`
            and `test_forget`, each `.jsonl`, `.csv` or `.parquet`; or a name on the Hub, such as the paper's own
            `"karuna-bhaila/Unlearning_SST2"` and `"karuna-bhaila/Unlearning_Yelp_Polarity"`.
        format: prompt format; the default requires the columns `text` and `label_text`.
        name: name of the data set; the last part of `source` unless given.

    Raises:
        FileNotFoundError: if a file is missing, or `source` is neither a folder nor a name on the Hub.
        ValueError: if columns or rows are missing, or the rows do not suit the format.
    """
    splits = {split: _stripped(rows, format) for split, rows in _read_four(source).items()}
    notes = [f"{source}: " + ", ".join(f"{split} {len(splits[split]):,}" for split in SPLITS)]
    splits, repeats = without_repeats({split: splits[split] for split in PRECEDENCE}, format)
    return checked(name or Path(source).name, splits, format, notes + repeats)


def load_sst2(
    source: str | os.PathLike[str] | None = None, names: Sequence[str] = SST2_FORGET_NAMES, seed: int = 0
) -> UnlearningData:
    """Load SST-2 (GLUE), with the sentences that name certain people as forget rows, as in the SPUL paper.

    Train and dev sets are pooled, repeated sentences dropped, and both groups divided 70/30 into train and test. The
    paper's selection of people is not published; `load_four_splits` loads its data.

    Args:
        source: folder with `train.tsv` and `dev.tsv`; None for `stanfordnlp/sst2` on the Hub.
        names: people to forget, compared as whole words.
        seed: seed of the division into train and test.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if columns are missing, or none of `names` is found.
    """
    columns = ("sentence", "label")
    if source is None:
        parts = {split: read_hub("stanfordnlp/sst2", split, columns) for split in ("train", "validation")}
    else:
        folder = check_folder(source, "train.tsv and dev.tsv")
        parts = {part: read_file(folder / f"{part}.tsv", columns) for part in ("train", "dev")}
    notes = [size_note("SST-2, train and dev pooled", sum(map(len, parts.values())), 68_221)]
    different, repeats = without_repeats({p: _reviews(rows, "sentence") for p, rows in parts.items()}, SENTIMENT)
    split = split_by_entity(concatenate_datasets(list(different.values())), names=names)
    notes += [
        *repeats,
        _rule_note(split.report),
        f"both groups cut 70/30 into train and test (seed {seed})",
        "published: train_retain 46,331, train_forget 1,425, test_retain 19,855, test_forget 610, with repeated "
        "sentences and with the authors' own selection of people, which is not published",
    ]
    return checked("sst2", train_test(split, test_fraction=0.3, seed=seed), SENTIMENT, notes)


def load_imdb(
    source: str | os.PathLike[str] | None = None, names: Sequence[str] = IMDB_FORGET_NAMES, seed: int = 0
) -> UnlearningData:
    """Load IMDB, with the reviews that name certain people as forget rows, in the official train/test split.

    Line-break markup becomes a space. A repeated review stays once, in the train part if it is in both.

    Args:
        source: folder with `train.tsv.gz` and `test.tsv.gz`; None for `stanfordnlp/imdb` on the Hub.
        names: people to forget, compared as whole words in any letter case.
        seed: not used, since nothing is drawn; all loaders have it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if columns are missing, or none of `names` is found in one of the parts.

    Source: Maas et al., *Learning Word Vectors for Sentiment Analysis*, ACL 2011
    """
    columns, parts, notes = ("text", "label"), {}, []
    folder = None if source is None else check_folder(source, "train.tsv.gz and test.tsv.gz")
    for part in ("train", "test"):
        if folder is None:
            rows = read_hub("stanfordnlp/imdb", part, columns)
        else:
            rows = read_file(folder / f"{part}.tsv.gz", columns)
        notes.append(size_note(f"IMDB, {part}", len(rows), 25_000))
        parts[part] = _reviews(rows, "text", _without_markup)
    parts, repeats = without_repeats(parts, SENTIMENT)
    notes += [*repeats, "line-break markup replaced by a space"]
    splits = {}
    for part, rows in parts.items():
        split = split_by_entity(rows, names=names)
        splits[f"{part}_forget"], splits[f"{part}_retain"] = split.forget, split.retain
        notes.append(f"{part}: {_rule_note(split.report)}")
    return checked("imdb", splits, SENTIMENT, notes)


def load_yelp(
    source: str | os.PathLike[str] | None = None,
    num_clusters: int = 100,
    forget_clusters: Sequence[int] | None = None,
    forget_fraction: float = 0.05,
    embedder: str = "tfidf",
    seed: int = 0,
    clustering_dir: str | os.PathLike[str] | None = None,
    limit_train: int = 100_000,
    limit_test: int = 20_000,
) -> UnlearningData:
    """Load Yelp reviews, with some clusters of similar ones as forget rows, as in the SPUL paper.

    The train part is clustered (`TextClustering`), and the same centers assign the test part. Unless `forget_clusters`
    is given, clusters are drawn uniformly, one by one, until they hold `forget_fraction` of the train part; the last
    one can raise the share above it.

    Args:
        source: folder with `olora_yelp_train.json`, whose neutral class is dropped and 15 % of the rest drawn as the
            test part; None for `fancyzhx/yelp_polarity` on the Hub.
        num_clusters: number of clusters.
        forget_clusters: indices of the clusters to forget, from 0; drawn unless given.
        forget_fraction: share of the train part to forget, if clusters are drawn.
        embedder: as in `TextClustering.fit`.
        seed: seed of all draws and of the clustering.
        clustering_dir: folder to save the clustering in; not saved unless given.
        limit_train: maximum number of rows of the train part, drawn at random before all else.
        limit_test: the same for the test part.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if columns are missing, a label is unknown, a number is out of range, or a split would be empty.
    """
    if not 0 < forget_fraction < 1 or limit_train < 1 or limit_test < 1:
        raise ValueError(
            f"forget_fraction={forget_fraction}, limit_train={limit_train}, limit_test={limit_test}; expected a share "
            "between 0 and 1, and limits of at least 1."
        )
    parts, notes = _read_yelp(source, seed)
    for part, most in (("train", limit_train), ("test", limit_test)):
        if most < len(parts[part]):
            notes.append(f"{part}: a random {most:,} of {len(parts[part]):,} rows (seed {seed})")
            parts[part] = parts[part].select(random.Random(seed).sample(range(len(parts[part])), most))
    parts = {part: _reviews(rows, "text", _unescaped) for part, rows in parts.items()}
    parts, repeats = without_repeats(parts, SENTIMENT)
    clustering = TextClustering.fit(parts["train"]["text"][:], num_clusters, embedder=embedder, seed=seed)
    if clustering_dir is not None:
        clustering.save(Path(clustering_dir))
    selection = "given"
    if forget_clusters is None:
        forget_clusters = _draw_clusters(clustering.sizes, forget_fraction, seed)
        selection = f"drawn until they hold {forget_fraction:.1%} of the train part (seed {seed})"
    notes += [*repeats, f"{len(forget_clusters)} of {num_clusters} clusters are forgotten, {selection}"]
    splits = {}
    for part, rows in parts.items():
        split = split_by_cluster(rows, clustering, forget_clusters)
        splits[f"{part}_forget"], splits[f"{part}_retain"] = split.forget, split.retain
        notes.append(f"{part}: {_rule_note(split.report)}")
    notes.append(
        "published: train_retain 95,012, train_forget 5,081, test_retain 18,089, test_forget 885, of rows and "
        "clusters that are not those drawn here"
    )
    return checked("yelp", splits, SENTIMENT, notes)


def _read_four(source: str | os.PathLike[str]) -> dict[str, Dataset]:
    folder = Path(source)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
            raise FileNotFoundError(f"source={str(source)!r} is neither a folder nor a name on the Hub (owner/name).")
        return {split: read_hub(str(source), split) for split in SPLITS}
    if (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        if missing := [split for split in SPLITS if split not in saved]:
            raise ValueError(f"{folder} lacks the split(s) {missing}; it has {sorted(saved)}.")
        return {split: saved[split] for split in SPLITS}
    splits = {}
    for split in SPLITS:
        files = [folder / f"{split}.{ending}" for ending in ("jsonl", "csv", "parquet")]
        found = [path for path in files if path.is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} has several files of {split}: {[path.name for path in found]}; keep one.")
        splits[split] = read_file(found[0] if found else files[0])
    return splits


def _stripped(rows: Dataset, prompts: PromptFormat) -> Dataset:
    """The rows without outer white space in texts and labels: the format puts a space before a completion."""
    for column in {prompts.text_field, "label_text"} & set(rows.column_names):
        values = column_values(rows, column)
        if None in values:
            raise ValueError(f"column {column!r} has no value in row {values.index(None)}: {rows[values.index(None)]}")
        rows = rows.remove_columns(column).add_column(column, [str(value).strip() for value in values])
    return rows


def _reviews(rows: Dataset, text_column: str, clean: Callable[[str], str] = str.strip) -> Dataset:
    """`text`, `label` (0 or 1) and `label_text` of each review."""
    reviews = []
    texts, labels = column_values(rows, text_column), column_values(rows, "label")
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if str(label) not in ("0", "1"):
            raise ValueError(
                f"row {number} has label={label!r}; expected 0 (negative) or 1 (positive): {text[:160]!r}"
            )
        reviews.append({"text": clean(text).strip(), "label": int(label), "label_text": LABEL_TEXTS[int(label)]})
    return Dataset.from_list(reviews)


def _read_yelp(source: str | os.PathLike[str] | None, seed: int) -> tuple[dict[str, Dataset], list[str]]:
    """`train` and `test`, with columns `text` and `label` (0 or 1)."""
    parts, notes = {}, []
    if source is None:
        for part, size in (("train", 560_000), ("test", 38_000)):
            parts[part] = read_hub("fancyzhx/yelp_polarity", part, ("text", "label"))
            notes.append(size_note(f"Yelp polarity, {part}", len(parts[part]), size))
    else:
        path = check_folder(source, "olora_yelp_train.json") / "olora_yelp_train.json"
        rows = read_file(path, ("sentence", "label"))
        if unknown := sorted(set(column_values(rows, "label")) - {*YELP_LABELS, "neutral"}):
            raise ValueError(f"{path} has the label(s) {unknown}; expected {[*YELP_LABELS, 'neutral']}.")
        polar = [
            {"text": row["sentence"].removeprefix("Text: "), "label": YELP_LABELS[row["label"]]}
            for row in rows
            if row["label"] != "neutral"
        ]
        order = random.Random(seed).sample(range(len(polar)), len(polar))
        cut = round(0.85 * len(polar))
        shuffled = Dataset.from_list([polar[i] for i in order])
        parts = {"train": shuffled.select(range(cut)), "test": shuffled.select(range(cut, len(polar)))}
        notes.append(size_note("Yelp reviews in five classes", len(rows), 5_000))
        notes.append(f"{len(rows) - len(polar):,} neutral ones dropped, the rest cut 85/15 (seed {seed})")
    notes.append('line breaks and quotes that the source writes as \\n and \\" are written as themselves')
    return parts, notes


def _without_markup(text: str) -> str:
    return re.sub(r"(?:\s*<br\s*/?>\s*)+", " ", text)


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace('\\"', '"')


def _draw_clusters(sizes: Sequence[int], fraction: float, seed: int) -> list[int]:
    drawn: list[int] = []
    for cluster in random.Random(seed).sample(range(len(sizes)), len(sizes)):
        if sum(sizes[i] for i in drawn) >= fraction * sum(sizes):
            break
        drawn.append(cluster)
    return sorted(drawn)


def _rule_note(report: SplitReport) -> str:
    found = ", ".join(f"{name} {count:,}" for name, count in report.groups.items() if count)
    missing = f"; found nowhere: {', '.join(report.unmatched)}" if report.unmatched else ""
    return f"forgotten: {report.num_forget:,} {report.rule} ({found}){missing}"
