"""The settings of the paper's runs: what is published is the default, and what is an option changes what it says."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import reproduce
import torch
from datasets import Dataset
from paper import experiment as experiments
from paper.memorization import PUBLISHED_MEMORIZING
from paper.options import COMPARED
from paper.runs import EUL_TERMS, Run, Setup, with_blank_lines
from stored_runs import run as record

from spul.data import MULTIPLE_CHOICE, QUESTION_ANSWER, SENTIMENT, PromptFormat, UnlearningData
from spul.losses import KLAscent
from spul.training.methods import unlearning_method


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """The options of `reproduce.py` as it parses them."""

    def parsed(*options):
        command = ["reproduce.py", "--table", "main", "--output-dir", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        return reproduce.parse_args()

    return parsed


# ---- defaults ----


@pytest.mark.parametrize(
    ("dataset", "epochs"),
    [("sst2", 10), ("karuna-bhaila/Unlearning_SST2", 10), ("yelp", 2), ("wmdp", 5), ("tofu", 3)],
)
def test_the_base_memorizes_as_published(parse, dataset, epochs):
    args = parse("--dataset", dataset)
    assert (args.memorize, args.memorize_lr, args.memorize_epochs, args.memorize_batch_size) == (
        "qlora", 1e-4, epochs, 32
    )  # fmt: skip
    assert parse("--dataset", dataset, "--memorize-epochs", "4").memorize_epochs == 4


def test_baselines_run_one_epoch_and_spul_ten(parse):
    def epochs(*options):
        return {run.method: run.epochs for run in reproduce.runs_of(parse(*options), "main")}

    assert epochs() == {method: 10 if method == "SPUL" else 1 for method in COMPARED}
    assert epochs("--epochs", "GA=4") == {**dict.fromkeys(COMPARED, 1), "SPUL": 10, "GA": 4}
    assert epochs("--epochs", "3") == dict.fromkeys(COMPARED, 3)
    assert epochs("--epochs", "3", "SPUL=6") == {**dict.fromkeys(COMPARED, 3), "SPUL": 6}


def test_the_grid_has_the_papers_twelve_cells(parse):
    runs = reproduce.runs_of(parse(), "grid")
    assert [(run.alpha, run.beta) for run in runs] == [(a, b) for a in (0.1, 0.5, 1) for b in (0, 0.1, 0.5, 1)]
    assert {(run.method, run.trainable, run.num_virtual_tokens, run.epochs) for run in runs} == {
        ("SPUL", "p_tuning", 30, 10)
    }


@pytest.mark.parametrize(
    ("what", "beta"),
    [("main", 0.5), ("tsne", 0.5), ("forget-size", 1.0), ("models", 1.0), ("prompt-length", 1.0)],
)
def test_each_table_has_its_published_weights_unless_beta_is_given(parse, what, beta):
    def weights(*options):
        runs = reproduce.runs_of(parse(*options), what)
        return {(run.alpha, run.beta) for run in runs if run.method == "SPUL"}

    assert weights() == {(1.0, beta)}
    assert weights("--beta", "0.25") == {(1.0, 0.25)}


@pytest.mark.parametrize(("learner", "published"), [("full", False), ("lora", True), ("qlora", True)])
def test_lora_memorizes_with_the_published_schedule_and_all_weights_as_before(
    monkeypatch, tmp_path, learner, published
):
    seen = {}

    def memorize(model, rows, collator, args, learner, dtype):
        seen.update(args=args, learner=learner)
        return SimpleNamespace(save_pretrained=lambda folder: folder.mkdir()), {}

    monkeypatch.setattr(experiments, "memorize", memorize)
    monkeypatch.setattr(experiments, "model_digest", lambda name: None)
    one = experiments.Experiment(Setup("reviews-folder", "model", memorize=learner, bf16=False), tmp_path)
    one.data = data_of("jane")
    one.tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    one.collator = None
    one.known_by(("retain", "forget"))
    found = {name: getattr(seen["args"], name) for name in PUBLISHED_MEMORIZING}
    before = {"warmup_steps": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0}
    assert seen["learner"] == learner
    assert found == (PUBLISHED_MEMORIZING if published else before)


# ---- options ----


def data_of(name: str) -> UnlearningData:
    rows = [{"text": f"{name} {i}", "label_text": ("good", "bad")[i % 2]} for i in range(4)]
    splits = {
        split: Dataset.from_list([{**row, "text": f"{split} {row['text']}"} for row in rows])
        for split in ("train_retain", "train_forget", "test_retain", "test_forget")
    }
    return UnlearningData("reviews", splits, SENTIMENT)


def test_blank_lines_stand_where_the_authors_program_has_them():
    row = with_blank_lines(SENTIMENT).row({"text": "dull", "label_text": "negative"})
    assert row["prompt"] + row["completion"] == (
        "### Text: dull\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment: negative"
    )
    asked = with_blank_lines(MULTIPLE_CHOICE).row({"question": "why", "choices": ["a", "b"], "answer": 0})
    assert asked["prompt"] == "### Question: why\n\n### Options:\nA. a\nB. b\n\n### Answer:"
    assert with_blank_lines(QUESTION_ANSWER).template == "### Question: {question}\n\n### Answer:"
    with pytest.raises(ValueError, match=r"'say \{text\}' has no second field"):
        with_blank_lines(PromptFormat("say {text}"))


def test_blank_lines_are_in_the_rows_of_an_experiment_that_asks_for_them(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "load_four_splits", lambda *_: data_of("jane"))
    prompts = [
        experiments.Experiment(Setup("folder", "model", blank_lines=blank), tmp_path).rows["train_forget"]["prompt"][0]
        for blank in (False, True)
    ]
    assert prompts[1] == prompts[0].replace("\n", "\n\n")


def test_the_generic_response_is_drawn_once_a_row_if_that_is_asked_for(monkeypatch, parse, tmp_path):
    assert not any(run.draw_once for run in reproduce.runs_of(parse(), "main"))
    runs = reproduce.runs_of(parse("--draw-once"), "main")
    assert all(run.draw_once for run in runs)

    class Stop(Exception):
        pass

    def trainer(model, args, collator, *_, **__):
        raise Stop(collator.resample)

    monkeypatch.setattr(experiments, "UnlearningTrainer", trainer)
    one = experiments.Experiment(Setup("folder", "model", bf16=False), tmp_path)
    one.data, one.tokenizer = data_of("jane"), None
    monkeypatch.setattr(experiments.Experiment, "load", lambda self, name: None)
    monkeypatch.setattr(experiments, "SoftPromptUnlearner", lambda *_, **__: torch.nn.Linear(1, 1))
    monkeypatch.setattr("spul.data.collator.RowEncoder", lambda *_: None)
    for draw_once in (False, True):
        with pytest.raises(Stop) as found:
            one.train(Run("SPUL", "p_tuning", 1e-4, draw_once=draw_once))
        assert found.value.args == (not draw_once,)


def test_tsne_takes_training_rows_of_each_label_and_half_of_them_from_the_forget_set():
    def split(num, label):
        return [{"prompt": f"{label} {i}", "completion": f" {label}"} for i in range(num)]

    rows = {"train_retain": split(40, "good") + split(3, "bad"), "train_forget": split(20, "good") + split(9, "bad")}
    fake = SimpleNamespace(rows=rows | {"test_retain": [], "test_forget": []}, setup=SimpleNamespace(dataset="x"))
    for per_label, expected in ((10, {("good", 5, 5), ("bad", 3, 7)}), (500, {("good", 40, 20), ("bad", 3, 9)})):
        found, flags = reproduce.tsne_rows(fake, per_label)
        counts = {
            (
                label,
                sum(row["completion"] == f" {label}" and not flag for row, flag in zip(found, flags, strict=True)),
                sum(row["completion"] == f" {label}" and flag for row, flag in zip(found, flags, strict=True)),
            )
            for label in ("good", "bad")
        }
        assert counts == expected
        assert len({(row["prompt"], flag) for row, flag in zip(found, flags, strict=True)}) == len(found)
    fake.rows["train_forget"] = [{"prompt": str(i), "completion": f" {i}"} for i in range(9)]
    with pytest.raises(SystemExit, match="of at most 10; x has 11"):
        reproduce.tsne_rows(fake, 5)


def test_tsne_takes_500_rows_a_label_unless_told_otherwise(parse):
    assert parse().tsne_rows == 500


# ---- EUL without its terms ----


@pytest.mark.parametrize("name", EUL_TERMS)
def test_eul_without_a_term_is_the_sum_of_the_others(name):
    torch.manual_seed(0)
    logits, reference = torch.randn(4, 2, 7, dtype=torch.float64), torch.randn(4, 2, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (4, 2))
    is_forget = torch.tensor([True, False, True, False])
    text_logits, text_labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.randint(0, 7, (2, 3))

    def terms(loss):
        needed = loss.rows_needing_reference(is_forget)
        found = loss(logits, labels, is_forget, reference[needed], text_logits=text_logits, text_labels=text_labels)
        weighted = {
            "forget": found.forget_loss,
            "retain": loss.alpha * found.retain_loss,
            "kl": loss.beta * found.kl_loss,
            "lm": loss.gamma * found.lm_loss,
        }
        return found.loss, {key: value.item() for key, value in weighted.items()}

    _, whole = terms(unlearning_method("EUL").loss)
    method = Run("EUL", "layers", 1e-2, without=name).unlearning_method()
    total, parts = terms(method.loss)
    expected = {key: 0.0 if key in EUL_TERMS[name] else value for key, value in whole.items()}
    assert parts == pytest.approx(expected)
    assert total.item() == pytest.approx(sum(expected.values()))
    assert all(abs(value) > 1e-3 for value in whole.values())
    assert method.loss.forget.makes_unlikely  # forget rows keep their own completions


def test_a_term_left_out_is_one_of_euls():
    assert isinstance(Run("EUL", "layers", 1e-2).unlearning_method().loss.forget, KLAscent)
    for method, name in (("GA", "L_KL"), ("EUL", "kl")):
        with pytest.raises(ValueError, match=f"without='{name}', method='{method}': expected EUL"):
            Run(method, "layers", 1e-2, without=name)


# ---- tables ----


def test_a_table_has_accuracy_f1_and_generic_answers_and_the_published_rows_of_its_kind(parse, tmp_path):
    args = parse("--dataset", "sst2")
    base = record("base", settings={}, cost={})
    runs = [record(settings={"alpha": alpha, "beta": 0.5}) for alpha in (0.1, 1.0)]
    reproduce.write_table(args, "grid", [base, *runs])
    text = (tmp_path / "table-grid.md").read_text()
    assert [line.split(";")[0] for line in text.splitlines() if "; sst2; " in line] == [
        "Accuracy in %", "F1 in %", "Share of generic answers in %", "Cost, mean"
    ]  # fmt: skip
    assert text.count("*published: LLaMA-2-7B, SPUL*") == 2 * 12
    assert "| *published: LLaMA-2-7B, SPUL* | *1.0* | *0.5* | *99.39* | *22.94* | *95.24* | *27.42* |" in text
    reproduce.write_table(args, "main", [base, runs[0]])
    text = (tmp_path / "table-main.md").read_text()
    assert "| *published: LLaMA-2-13B, vanilla* | *61.04* |" in text
    reproduce.write_table(args, "ablation", [base, *runs])
    assert "published" not in (tmp_path / "table-ablation.md").read_text()
