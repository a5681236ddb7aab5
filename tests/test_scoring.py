"""Scoring: what greedy decoding would answer, by one look at the response positions."""

import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, SELECTS_POSITIONS, build, make_tokenizer, probed
from peft import PeftModel
from sklearn.metrics import f1_score

from spul import ForgetRetainCollator, SoftPromptUnlearner
from spul.evaluation.metrics.scoring import (
    NEITHER,
    Answers,
    DivergedError,
    check_not_diverged,
    collect_answers,
    score_completions,
    summarize,
)


def collator(generic=(" neutral", " unknown")):
    return ForgetRetainCollator(make_tokenizer(), list(generic), max_length=48)


def greedy_text(model, prompt, num_tokens):
    ids = make_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(params=["base", *CONFIGS])
def model(request, tmp_path):
    base = build("llama")
    if request.param == "base":
        return base
    torch.manual_seed(5)
    return SoftPromptUnlearner(base, CONFIGS[request.param](4)).eval()


def test_answers_are_those_of_greedy_decoding(model):
    """Labels and generic texts of one, two and three tokens, made from what the model itself would say."""
    tokenizer, prompts = make_tokenizer(), [f"review {c} :" for c in "abcdefgh"]
    said = [greedy_text(model, prompt, 3) for prompt in prompts]
    completions = []
    for i, tokens in enumerate(said):
        kept = tokens[: 1 + i % 3]
        completions.append(tokenizer.decode(kept) if i % 2 else " positive")
    candidates = {text: collator().encoder.completion_ids(text) for text in [*completions, " neutral", " unknown"]}
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)])
    found = collect_answers(model, rows, collator(), 3, range(len(rows)))
    assert found.true == completions
    for i in range(len(said)):
        given = [t for t, ids in candidates.items() if greedy_text(model, prompts[i], len(ids)) == ids]
        longest = max(given, key=lambda text: len(candidates[text]), default=NEITHER)
        assert found.predicted[i] == longest
    assert any(found.predicted[i] != NEITHER for i in range(len(rows)))


@pytest.mark.skipif(not SELECTS_POSITIONS, reason="transformers below 5.21 computes logits at all positions")
def test_logits_are_computed_at_the_response_positions_only(model):
    heads = []
    base = model.get_base_model() if isinstance(model, SoftPromptUnlearner) else model
    base.get_output_embeddings().register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[1]))
    if isinstance(model, SoftPromptUnlearner):
        probed(model)
        heads.clear()
    rows = Dataset.from_list([{"prompt": "the film " * 10 + ":", "completion": " positive"}])
    score_completions(model, rows, collator())
    assert max(heads) <= max(len(collator().encoder.completion_ids(text)) for text in (" positive", " unknown"))


def test_the_loss_is_the_log_likelihood_of_the_true_completion(model):
    rows = Dataset.from_list([{"prompt": "the film :", "completion": " positive"}])
    found = score_completions(model, rows, collator())
    tokenizer = make_tokenizer()
    prompt, answer = tokenizer("the film :")["input_ids"], collator().encoder.completion_ids(" positive")
    expected = 0.0
    for k, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:k]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        expected -= torch.log_softmax(logits, -1)[token].item()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_plain_peft_model_scores_as_the_unlearner_does(tmp_path, prompt_type):
    torch.manual_seed(5)
    model = SoftPromptUnlearner(build("llama"), CONFIGS[prompt_type](4)).eval()
    model.save_pretrained(str(tmp_path))
    rows = Dataset.from_list([{"prompt": f"review {c} :", "completion": " positive"} for c in "abcd"])
    plain = PeftModel.from_pretrained(build("llama"), str(tmp_path))
    expected = score_completions(model, rows, collator())
    assert score_completions(plain, rows, collator()) == pytest.approx(expected, rel=1e-5)
    with plain.disable_adapter(), model.disable_adapter():
        bare = score_completions(build("llama"), rows, collator())
        assert score_completions(plain, rows, collator()) == pytest.approx(bare, rel=1e-5)
        assert score_completions(model, rows, collator()) == pytest.approx(bare, rel=1e-5)
    assert bare["loss"] != pytest.approx(expected["loss"], rel=1e-3)


def test_numbers_equal_scikit_learns_and_hand_counts():
    answers = Answers(
        true=["a", "a", "b", "b", "b"], predicted=["a", "g", "b", "a", NEITHER], nll=[1.0, 2.0, 3.0, 4.0, 5.0]
    )
    found = summarize(answers, ["g", "h"])
    assert found["accuracy"] == 2 / 5
    assert found["generic"] == 1 / 5
    assert found["loss"] == 3.0
    # By hand: a has precision 1/2, recall 1/2; b has precision 1, recall 1/3.
    assert found["f1"] == pytest.approx((2 * 0.5 + 3 * 0.5) / 5)
    labels = {"labels": ["a", "b"], "average": "weighted", "zero_division": 0}
    assert found["f1"] == f1_score(answers.true, answers.predicted, **labels)


def test_the_order_of_rows_and_the_batch_size_do_not_matter(model):
    rows = Dataset.from_list(
        [
            {"prompt": "the review " * (1 + i % 4) + ":", "completion": (" positive", " negative")[i % 2]}
            for i in range(9)
        ]
    )
    one = score_completions(model, rows, collator(), batch_size=1)
    assert score_completions(model, rows.select(range(8, -1, -1)), collator(), batch_size=4) == pytest.approx(one)


def test_modes_are_put_back_and_bad_rows_raise(model):
    modes = {name: module.training for name, module in model.named_modules()}
    rows = Dataset.from_list([{"prompt": "a :", "completion": " b"}])
    score_completions(model, rows, collator())
    assert modes == {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="rows is empty"):
        score_completions(model, rows.select([]), collator())
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['completion'\]"):
        score_completions(model, rows.remove_columns("completion"), collator())


def test_a_tokenizer_in_the_place_of_a_collator_is_refused(model):
    rows = Dataset.from_list([{"prompt": "a :", "completion": " b"}])
    with pytest.raises(TypeError, match=r"collator is a .*, such as ForgetRetainCollator\(tokenizer"):
        score_completions(model, rows, collator().tokenizer)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_logits_without_a_finite_maximum_have_diverged_and_those_of_a_fixed_text_have_not(value):
    logits = torch.zeros(2, 3, 5)
    logits[..., 1:] = -torch.inf  # all other tokens have probability 0
    check_not_diverged(logits)
    logits[1, 2, 0] = value
    with pytest.raises(DivergedError, match="logits are NaN or infinite"):
        check_not_diverged(logits)


def test_a_model_that_has_diverged_raises_on_the_rows_where_it_has(model):
    """Where only some rows come out as NaN, no row among the others is enough to hide it."""
    texts = [*(f"review {c} :" for c in "abc"), "review 7 :"]
    rows = Dataset.from_list([{"prompt": text, "completion": " positive"} for text in texts])
    sound = score_completions(model, rows.select([0, 1, 2]), collator())
    base = model.get_base_model() if isinstance(model, SoftPromptUnlearner) else model
    token = set(make_tokenizer()(texts[-1])["input_ids"]) - set(make_tokenizer()("".join(texts[:-1]))["input_ids"])
    with torch.no_grad():
        base.get_input_embeddings().weight[list(token)] = torch.nan
    assert score_completions(model, rows.select([0, 1, 2]), collator()) == sound
    for batch_size in (1, 4):
        with pytest.raises(DivergedError, match="has diverged, there is nothing to measure"):
            score_completions(model, rows, collator(), batch_size)


CHAT = "{% for m in messages %}{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else ':' }}{% endfor %}"


def test_generic_answers_in_conversations_are_recognized():
    """The template adds an end token, and the generic text's leading space goes."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    chat = ForgetRetainCollator(tokenizer, [" neutral", " unknown"], max_length=48)
    row = {"prompt": [{"role": "user", "content": "film"}], "completion": [{"role": "assistant", "content": "good"}]}
    answer = chat.encoder.encode(row, " neutral").completion_ids

    class Says(torch.nn.Module):
        """Answers `neutral</s>` to everything."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, use_cache=None):
            from types import SimpleNamespace

            start = len(chat.encoder.encode(row).prompt_ids) - 1
            logits = torch.zeros(*input_ids.shape, 120)
            for k, token in enumerate(answer):
                if start + k < input_ids.shape[1]:
                    logits[:, start + k, token] = 1.0
            return SimpleNamespace(logits=logits)

    found = score_completions(Says(), Dataset.from_list([row]), chat)
    assert (found["generic"], found["accuracy"]) == (1.0, 0.0)


def test_the_end_of_an_answer_is_not_scored(model):
    prompts, tokenizer = [f"review {name} {i} :" for i in range(6) for name in ("jane", "film")], make_tokenizer()
    answers = [tokenizer.decode(greedy_text(model, prompt, 1)) for prompt in prompts]
    texts = [" the plot" if i % 2 or not answer.strip() else answer for i, answer in enumerate(answers)]
    rows = Dataset.from_list([{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)])
    plain, ended = (ForgetRetainCollator(tokenizer, [" good", " bad"], 64, append_eos=flag) for flag in (False, True))
    found = score_completions(model, rows, ended)
    assert found == pytest.approx(score_completions(model, rows, plain), rel=1e-5)
    assert found["accuracy"] > 0
