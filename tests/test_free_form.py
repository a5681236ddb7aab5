"""Answers are those of greedy decoding, one row at a time and nothing padded; ROUGE-L against hand counts."""

import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, make_tokenizer, prompted
from likelihoods import answer_collator, free_form, plain_logits
from peft import LoraConfig, PeftModel, get_peft_model
from rouge_score import rouge_scorer

from spul import ForgetRetainCollator
from spul.data import batching as batches
from spul.evaluation.metrics import generate_answers, rouge_l


def lively(model):
    """Weights so wide that answers hang on every token of the prompt; else random models say one word for ever."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "prompt_encoder" not in name:
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def plain_answer(model, row, collator, num, ends=(2,)):
    """Token after token, the whole row anew each time."""
    prompt, answer = collator.encoder.encode(row).prompt_ids, []
    while len(answer) < num:
        token = int(plain_logits(model, prompt, [*answer, 0])[-1].argmax())
        if token in ends:
            break
        answer.append(token)
    return make_tokenizer().decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3"])
def test_answers_of_a_bare_model_are_the_twins(family):
    model, rows, collator = lively(build(family, torch.float64)), free_form(6), answer_collator()
    found = generate_answers(model, rows, collator.encoder, batch_size=3, max_new_tokens=6)
    assert found == [plain_answer(model, row, collator, 6) for row in rows]
    assert len(set(found)) > 3


@pytest.mark.parametrize("prompt_type", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_of_a_prompted_model_are_the_twins(family, prompt_type):
    model, rows, collator = lively(prompted(family, prompt_type)), free_form(6), answer_collator()
    found = generate_answers(model, rows, collator.encoder, batch_size=3, max_new_tokens=6)
    assert found == [plain_answer(model, row, collator, 6) for row in rows]
    assert len(set(found)) > 3
    with model.disable_adapter():
        detached = generate_answers(model, rows, collator.encoder, max_new_tokens=6)
    assert detached == generate_answers(model.get_base_model(), rows, collator.encoder, max_new_tokens=6)
    assert detached != found


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_plain_peft_model_answers_as_the_unlearner_does(tmp_path, prompt_type):
    model = lively(prompted(prompt_type=prompt_type, dtype=torch.float32))
    model.save_pretrained(str(tmp_path))
    base = build("llama")
    base.load_state_dict(model.get_base_model().state_dict())
    plain, rows, collator = PeftModel.from_pretrained(base, str(tmp_path)), free_form(), answer_collator()
    found = generate_answers(plain, rows, collator.encoder, batch_size=3, max_new_tokens=6)
    assert found == generate_answers(model, rows, collator.encoder, batch_size=3, max_new_tokens=6)


def test_answers_under_lora_are_those_of_the_merged_model():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model, rows, collator = (
        get_peft_model(lively(build("llama", torch.float64)), config),
        free_form(),
        answer_collator(),
    )
    found = generate_answers(model, rows, collator.encoder, batch_size=3, max_new_tokens=6)
    with model.disable_adapter():
        assert generate_answers(model, rows, collator.encoder, max_new_tokens=6) != found
    assert generate_answers(model.merge_and_unload(), rows, collator.encoder, max_new_tokens=6) == found


def test_settings_of_the_model_do_not_change_greedy_decoding():
    model, rows, collator = lively(build("llama")), free_form(4), answer_collator()
    expected = generate_answers(model, rows, collator.encoder, max_new_tokens=8)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 9.0, 3
    config.repetition_penalty, config.num_beams, config.no_repeat_ngram_size = 5.0, 3, 1
    config.min_new_tokens, config.bad_words_ids, config.penalty_alpha = 7, [[5], [9]], 0.6
    config.suppress_tokens = config.begin_suppress_tokens = list(range(3, 90))
    assert generate_answers(model, rows, collator.encoder, max_new_tokens=8) == expected
    assert model.generation_config is config
    assert config.min_new_tokens == 7


def test_an_answer_stops_before_the_end_token():
    """The end tokens of the tokenizer and of the model count, and what other rows of the batch still say does not."""
    model, rows, collator = lively(build("llama", torch.float64)), free_form(4), answer_collator()
    collator.tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    free = [plain_answer(model, row, collator, 6, ends=()) for row in rows]
    assert generate_answers(model, rows, collator.encoder, max_new_tokens=6) == free
    prompt = collator.encoder.encode(rows[1]).prompt_ids
    third = []
    for _ in range(3):
        third.append(int(plain_logits(model, prompt, [*third, 0])[-1].argmax()))
    model.generation_config.eos_token_id = [third[-1], 119]
    found = generate_answers(model, rows, collator.encoder, max_new_tokens=6)
    assert found == [plain_answer(model, row, collator, 6, ends=(third[-1], 119)) for row in rows]
    assert len(found[1]) < len(free[1])


def test_answers_end_where_the_positions_do():
    model, collator = prompted("gpt2", dtype=torch.float32), answer_collator()
    row = {"prompt": "a " * 29 + ":", "completion": " b"}
    width = len(collator.encoder.encode(row).prompt_ids)
    rows = Dataset.from_list([row])
    generate_answers(model, rows, collator.encoder, max_new_tokens=500)  # 96 positions, 4 virtual tokens
    model.get_base_model().config.n_positions = width + 4
    for asked, answer in ((6, 6), (500, width // 2)):
        fits = width - answer
        with pytest.raises(ValueError, match=f"use max_length={fits}, which leaves {answer} tokens to an answer"):
            generate_answers(model, rows, collator.encoder, max_new_tokens=asked)
        generate_answers(model, rows, collator.encoder.with_max_length(fits), max_new_tokens=asked)


@pytest.mark.parametrize("prompt_type", ["none", *CONFIGS])
def test_how_long_an_answer_may_be_does_not_hang_on_other_rows_of_the_batch(prompt_type):
    """The first three rows have room for all of 20 tokens, the others for 19 and 3."""
    model = lively(build("gpt2", torch.float64) if prompt_type == "none" else prompted("gpt2", prompt_type))
    collator, room = ForgetRetainCollator(make_tokenizer(), None, max_length=96), 96 if prompt_type == "none" else 92
    collator.tokenizer.eos_token = model.generation_config.eos_token_id = None
    widths = [3, 4, room - 20, room - 19, room - 3, room - 3]
    texts = ["x" * (width - 1) + "abcdef"[i] for i, width in enumerate(widths)]
    rows = Dataset.from_list([{"prompt": text, "completion": " b"} for text in texts])
    assert [len(collator.encoder.encode(row).prompt_ids) for row in rows] == widths
    found = generate_answers(model, rows, collator.encoder, batch_size=6, max_new_tokens=20)
    lengths = [20, 20, 20, 19, 3, 3]
    assert found == [plain_answer(model, row, collator, num, ends=()) for row, num in zip(rows, lengths, strict=True)]
    assert found == generate_answers(model, rows, collator.encoder, batch_size=1, max_new_tokens=20)


def test_a_batch_has_fewer_rows_where_they_are_long(monkeypatch):
    model, collator = build("llama"), ForgetRetainCollator(make_tokenizer(), None, max_length=90)
    rows = Dataset.from_list([{"prompt": "x" * num, "completion": " b"} for num in (80, 5, 80, 5, 80, 5, 80, 5)])
    sizes, generate = [], model.generate

    def counted(input_ids, **kwargs):
        sizes.append(tuple(input_ids.shape))
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    monkeypatch.setattr(batches, "TOKENS_PER_ROW", 20)
    generate_answers(model, rows, collator.encoder, batch_size=8, max_new_tokens=3)
    assert sizes == [(2, 80), (2, 80), (4, 5)]  # at most 160 tokens


def test_rouge_l_by_hand():
    """The longest common subsequence of the first pair is `the cat`, or another of two words."""
    found = rouge_l(["the mat the cat ate", "", "The cats SAT on the mats!"], ["the cat sat on the mat"] * 3)
    np.testing.assert_allclose(found["rouge_l_recall"], [2 / 6, 0, 1])  # stems and letter case do not count
    np.testing.assert_allclose(found["rouge_l_f1"], [2 * (2 / 6) * (2 / 5) / (2 / 6 + 2 / 5), 0, 1])


def longest_common_subsequence(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common_subsequence(a[1:], b[1:])
    return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


def test_rouge_l_equals_a_recursive_twin():
    draws = np.random.default_rng(0)
    pairs = [[draws.choice(list("pqrxyz"), draws.integers(1, 9)).tolist() for _ in range(2)] for _ in range(20)]
    found = rouge_l([" ".join(a) for a, _ in pairs], [" ".join(b) for _, b in pairs])
    for (answer, truth), recall, f1 in zip(pairs, *found.values(), strict=True):
        common = longest_common_subsequence(answer, truth)
        assert recall == pytest.approx(common / len(truth))
        assert f1 == pytest.approx(2 * common / (len(truth) + len(answer)))  # the harmonic mean, simplified


def test_rouge_l_of_latin_script_is_that_of_the_package_whatever_the_answers_script():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    true = [
        "José's cats aren't in Zürich, “naïve” £5 ½ µm xª \u02bcOahu",
        "snake_case 2nd",
        "?!",
        "",
        "The films of 1999 — all 3",
    ]
    said = ["josé cat 张伟", "Zürich NAÏVE 5", "The film от 1999 all", "?!", "", "snake case 2"]
    pairs = [(one, other) for one in true for other in (*said, *true)]
    found = rouge_l([answer for _, answer in pairs], [target for target, _ in pairs])
    plain = [scorer.score(*pair)["rougeL"] for pair in pairs]
    assert found["rouge_l_recall"].tolist() == [one.recall for one in plain]
    assert found["rouge_l_f1"].tolist() == [one.fmeasure for one in plain]
    assert len({*found["rouge_l_f1"]}) > 5


@pytest.mark.parametrize(
    ("target", "answer", "common", "num_true", "num_said"),
    [
        ("Она родилась в Москве", "Родилась она в Киеве!", 2, 4, 4),
        ("张伟出生于北京。", "张伟。出生于上海", 5, 7, 7),
        ("प्रिया दिल्ली में", "प्रिया मुंबई में", 2, 3, 3),  # whole words, with their vowel signs
        ("กรุงเทพ", "กรุงพา", 4, 6, 5),  # characters, with their signs
        ("서울에서 태어났다", "서울에서", 4, 8, 4),
        ("ジェーンは猫", "ジェーン", 1, 3, 1),
        ("ولد في ١٩٩٩", "في ١٩٩٩", 2, 3, 2),
        (
            "\uff2aan\uff45 是 the writers' 朋友",
            "jane 是 writer",
            3,
            6,
            3,
        ),  # Latin words, here full width, have their stems
        ("Москва", "the cat", 0, 1, 2),
    ],
)
def test_rouge_l_of_other_scripts_counts_their_words(target, answer, common, num_true, num_said):
    found = rouge_l([answer, target, ""], [target] * 3)
    np.testing.assert_allclose(found["rouge_l_recall"], [common / num_true, 1, 0])
    np.testing.assert_allclose(found["rouge_l_f1"], [2 * common / (num_true + num_said), 1, 0])


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ValueError, match="1 answers and 2 references"):
        rouge_l(["a"], ["a", "b"])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        rouge_l(["a"], ["a"])
