"""The harness's model: log-likelihoods and answers are spul's own, in batches of 1 and of 8."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_files import write_base, write_prompt
from datasets import Dataset
from helpers import CHAT_TEMPLATE, CONFIGS, GENERIC, build, layers_on, lora, make_tokenizer, prompted, rows
from likelihoods import free_form

import spul
from spul import ForgetRetainCollator, SoftPromptUnlearner, score_completions
from spul.evaluation.harness import Requests, _before
from spul.evaluation.metrics import generate_answers, response_likelihoods
from spul.gates import GatedUnlearner, NameGate

FAMILIES = ("llama", "opt", "gemma3")


def model_of(family="llama", prompt_type="prompt_tuning", **options):
    return Requests(prompted(family, prompt_type), tokenizer=make_tokenizer(), **options)


def asked(*pairs):
    """Requests as the harness gives them."""
    return [SimpleNamespace(args=pair) for pair in pairs]


def scored(lm, some):
    """The harness's requests of rows: pairs of token ids, scored."""
    pairs = [lm._encode_pair(row["prompt"], row["completion"]) for row in some]
    return lm._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
def test_log_likelihoods_are_those_of_spul_in_batches_of_1_and_of_8(family, prompt_type):
    some = free_form(9)
    found = {size: scored(model_of(family, prompt_type, batch_size=size), some) for size in (1, 8)}
    lm = model_of(family, prompt_type)
    plain = response_likelihoods(lm.model, some, lm.encoder, 4)
    for scores in found.values():
        np.testing.assert_allclose([score for score, _ in scores], [one.log_probs.sum() for one in plain], rtol=1e-9)
        assert [greedy for _, greedy in scores] == [bool(one.is_greedy.all()) for one in plain]


def test_loss_and_accuracy_are_those_of_score_completions():
    some, lm = rows("jane", 6), model_of(batch_size=8)
    liked = [lm.tokenizer.decode([int(scored_first(lm, row["prompt"]))]) for row in free_form(9)]
    known = [{"prompt": row["prompt"], "completion": text} for row, text in zip(free_form(9), liked, strict=True)]
    some = Dataset.from_list([*some, *(row for row in known if row["completion"].strip())])
    collator = ForgetRetainCollator(lm.tokenizer, GENERIC, max_length=64)
    plain = score_completions(lm.model, some, collator)
    scores = scored(lm, some)
    assert -np.mean([score for score, _ in scores]) == pytest.approx(plain["loss"], rel=1e-6)
    assert np.mean([greedy for _, greedy in scores]) >= plain["accuracy"] > 0


def scored_first(lm, prompt):
    """The token that the model likes best after a prompt."""
    batch = lm.encoder.batch([{"prompt": prompt, "completion": " a"}])
    position = batch["labels"].ne(-100).long().argmax(dim=1, keepdim=True) - 1
    with torch.no_grad():
        return lm.model.response_logits(batch["input_ids"], batch["attention_mask"], position)[0, 0].argmax()


def test_the_prompt_counts_in_the_length_and_long_contexts_lose_their_start():
    lm = model_of()
    assert lm.max_length == 96 - 4
    long, answer = "the review " * 120, " is good"
    (score,) = scored(lm, [{"prompt": long, "completion": answer}])
    ids = lm.tokenizer(long)["input_ids"]
    own = lm.encoder.completion_ids(answer)
    (plain,) = lm._loglikelihood_tokens([(None, ids[-(lm.max_length - len(own)) :], own)], disable_tqdm=True)
    assert score[0] == pytest.approx(plain[0], rel=1e-9)
    with pytest.raises(ValueError, match="beside its virtual tokens the model has 92 positions"):
        model_of(max_length=93)


def test_the_vocabulary_stays_as_it_is():
    lm = model_of()
    assert lm.model.get_base_model().get_input_embeddings().weight.shape[0] == 120


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 8])
def test_answers_are_those_of_spul_up_to_the_first_stop_text(family, size):
    some = free_form(7)
    lm = model_of(family, batch_size=size)
    plain = generate_answers(lm.model, some, lm.encoder, 1, max_new_tokens=12)
    wanted = {"until": [], "max_gen_toks": 12}
    assert lm.generate_until(asked(*((prompt, wanted) for prompt in some["prompt"])), disable_tqdm=True) == plain
    stop = next(text[2] for text in plain if len(text) > 2)
    cut = lm.generate_until(asked(*((p, {**wanted, "until": stop}) for p in some["prompt"])), disable_tqdm=True)
    assert cut == [text.split(stop)[0] for text in plain]
    assert cut != plain


PENALTIES = [("repetition_penalty", 3.0), ("no_repeat_ngram_size", 1), ("no_repeat_ngram_size", 2)]
PENALTIES += [("encoder_no_repeat_ngram_size", 1), ("encoder_repetition_penalty", 3.0)]
PENALIZED = [("base", *one) for one in PENALTIES]
PENALIZED += [(kind, *PENALTIES[i]) for i in (0, 2) for kind in ("lora", "layers", "prompt", "disabled")]


@pytest.mark.parametrize(("kind", "name", "value"), PENALIZED)
def test_a_penalty_does_not_count_the_pads_of_rows_beside_longer_ones(kind, name, value):
    """The pad token is one that the model would say, and that some requests begin with."""
    kinds = {"base": lambda: build("llama"), "lora": lambda: lora(build("llama"))}
    kinds |= {"layers": lambda: layers_on(build("llama")), "prompt": prompted, "disabled": prompted}
    model, tokenizer, settings = kinds[kind]().eval(), make_tokenizer(), {"max_gen_toks": 12, "do_sample": False}
    texts = ["the film", "good plot of the review", "jane", "the film is good . the plot is bad . of the review"]

    def answers(size, **more):
        lm = Requests(model, tokenizer=tokenizer, batch_size=size)
        given = asked(*((text, {**settings, **more}) for text in texts))
        with model.disable_adapter() if kind == "disabled" else nullcontext():
            return lm.generate_until(given, disable_tqdm=True)

    free = answers(1)
    said = [token for text in free for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(max(set(said), key=said.count))
    alone, together = answers(1, **{name: value}), answers(4, **{name: value})
    assert together == alone
    # No request has a token that is said: only a pad would be one.
    assert (alone == free) == (name == "encoder_no_repeat_ngram_size")


def test_requests_of_different_settings_keep_their_order():
    lm = model_of(batch_size=4)
    given = [("the film", {"max_gen_toks": 2}), ("good plot of", {"max_gen_toks": 5}), ("jane", {"max_gen_toks": 2})]
    together = lm.generate_until(asked(*given), disable_tqdm=True)
    assert together == [lm.generate_until(asked(one), disable_tqdm=True)[0] for one in given]
    with pytest.raises(ValueError, match="max_gen_toks=92 leaves no room"):
        lm.generate_until(asked(("the film", {"max_gen_toks": 92})), disable_tqdm=True)


def test_sampling_follows_the_settings():
    lm = model_of()
    request = asked(("the film", {"max_gen_toks": 8, "temperature": 0.9, "do_sample": True}))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found += lm.generate_until(request, disable_tqdm=True)
    assert found[0] == found[1] != found[2]


def test_a_text_ends_before_the_first_of_several_stops():
    assert _before("a b c", ["c", "b"]) == "a "
    assert _before("a b c", []) == "a b c"


def test_a_base_without_a_prompt_is_scored_in_the_same_way(tmp_path):
    base = write_base(tmp_path / "base")
    lm = Requests(base, batch_size=8)
    plain = response_likelihoods(build("llama"), free_form(4), lm.encoder, 1)
    found = [score for score, _ in scored(lm, free_form(4))]
    np.testing.assert_allclose(found, [one.log_probs.sum() for one in plain], rtol=1e-5)
    with_prompt = Requests(base, adapter=write_prompt(tmp_path / "adapter"))
    assert isinstance(with_prompt.model, SoftPromptUnlearner)
    assert with_prompt.max_length == lm.max_length - 4


def test_gates_see_the_request_alone():
    gated = GatedUnlearner(prompted(), make_tokenizer(), {"default": NameGate(["jane"])})
    lm, bare = (Requests(one, tokenizer=make_tokenizer()) for one in (gated, build("llama").double()))
    some = [{"prompt": "the film", "completion": " jane"}, {"prompt": "about jane", "completion": " good"}]
    (missed, flagged), (base, other) = scored(lm, some), scored(bare, some)
    assert missed[0] == pytest.approx(base[0], rel=1e-9)
    assert flagged[0] != pytest.approx(other[0], rel=1e-6)


def test_gates_see_a_running_text_whole(lm_eval):
    from spul.evaluation.harness import harness_class

    def score(model, text):
        lm = harness_class()(model, tokenizer=make_tokenizer())
        return lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)[0]

    gated = GatedUnlearner(prompted(), make_tokenizer(), {"default": NameGate(["jane"])})
    text = "the film is good " * 30 + "about jane"  # the name is in the last window, behind a context of its own
    assert score(gated, "the film") == pytest.approx(score(build("llama").double(), "the film"), rel=1e-9)
    assert score(gated, "about jane") == pytest.approx(score(prompted(), "about jane"), rel=1e-9)
    assert score(gated, text) != pytest.approx(score(build("llama").double(), text), rel=1e-6)


def test_messages_are_rendered_by_the_chat_template():
    lm = model_of()
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    assert lm.apply_chat_template([{"role": "user", "content": "who"}]) == "<s>user\nwho</s><s>assistant\n"
    ids, _ = lm._encode_pair("<s>user\nwho</s><s>assistant\n", "a")
    assert ids.count(lm.tokenizer.bos_token_id) == 2, "one for each message, and none before"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": "auto"}, ValueError, "expected a whole number"),
        ({"batch_size": 0}, ValueError, "expected a whole number"),
        ({"tokenizer": None}, TypeError, "comes with its tokenizer"),
        ({"adapter": "out"}, TypeError, "comes with its tokenizer"),
    ],
)
def test_options_that_cannot_be_honored_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Requests(prompted(), **{"tokenizer": make_tokenizer(), **options})


def test_a_prompt_at_the_message_is_refused():
    at_message = SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](), prompt_position="message")
    with pytest.raises(ValueError, match="which do not say where"):
        Requests(at_message, tokenizer=make_tokenizer())


def test_without_the_harness_its_class_is_an_error_that_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from spul.commands.main import main\nsys.exit(main(['lm-eval', '--help']))"
    )
    root = Path(spul.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("spul lm-eval: lm-evaluation-harness is not installed: pip install lm_eval")


# ---- within the harness ----


@pytest.fixture
def lm_eval(monkeypatch):
    found = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    pytest.importorskip("lm_eval.api.registry")
    return found


def write_task(folder: Path, name: str, some: Dataset) -> None:
    """A task by log-likelihood, and one that generates, of the rows."""
    labels = sorted(set(some["completion"]))
    given = [{"prompt": r["prompt"], "choices": labels, "answer": labels.index(r["completion"])} for r in some]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
    }
    choice = {"task": name, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    generated = {
        "task": f"{name}_answers",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for one in (choice, generated):
        (folder / f"{one['task']}.yaml").write_text(json.dumps({**shared, **one}))  # JSON is YAML


def test_the_harness_runs_the_model_by_its_name_on_a_task(lm_eval, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    from spul.evaluation.harness import register

    register()
    register()  # again does no harm
    base, adapter = write_base(tmp_path / "base"), write_prompt(tmp_path / "adapter")
    write_task(tmp_path, "toy", rows("jane", 5))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = {}
    for size in (1, 8):
        result = lm_eval.simple_evaluate(
            model="spul",
            model_args={"pretrained": base, "adapter": adapter, "dtype": "float32"},
            tasks=["toy", "toy_answers"],
            task_manager=tasks,
            batch_size=size,
            bootstrap_iters=0,
            log_samples=True,
        )
        found[size] = [
            [float(one[0]) for sample in result["samples"]["toy"] for one in sample["filtered_resps"]],
            [sample["filtered_resps"] for sample in result["samples"]["toy_answers"]],
        ]
    np.testing.assert_allclose(found[1][0], found[8][0], rtol=1e-5)
    assert found[1][1] == found[8][1]
    loaded = SoftPromptUnlearner.from_pretrained(base, adapter)
    labels = (" negative", " positive")
    pairs = [{"prompt": row["prompt"], "completion": label} for row in rows("jane", 5) for label in labels]
    lm = Requests(loaded, tokenizer=make_tokenizer())
    plain = response_likelihoods(loaded, Dataset.from_list(pairs), lm.encoder, 1)
    np.testing.assert_allclose(found[1][0], [one.log_probs.sum() for one in plain], rtol=1e-5)


def test_running_texts_are_scored_in_windows_each_token_once(lm_eval):
    from spul.evaluation.harness import harness_class

    lm = harness_class()(prompted(), tokenizer=make_tokenizer(), batch_size=3)
    short, long = "the film is good", "the review is positive about jane doe " * 12
    found = lm.loglikelihood_rolling(asked((short,), (long,)), disable_tqdm=True)
    ids = lm.tokenizer(short, add_special_tokens=False)["input_ids"]
    ((plain, _),) = lm._loglikelihood_tokens([(None, [lm.prefix_token_id], ids)], disable_tqdm=True)
    assert found[0] == pytest.approx(plain, rel=1e-9)
    ids = lm.tokenizer(long, add_special_tokens=False)["input_ids"]
    size = lm.max_length - 1
    assert len(ids) > size
    windows = [([lm.prefix_token_id], ids[:size])]
    rest = len(ids) - size
    while rest > 0:
        num = min(size, rest)
        end = len(ids) - rest + num
        windows.append((ids[end - size - 1 : end - num], ids[end - num : end]))
        rest -= num
    plain = sum(score for score, _ in lm._loglikelihood_tokens([(None, *w) for w in windows], disable_tqdm=True))
    assert found[1] == pytest.approx(plain, rel=1e-9)


def test_an_empty_context_begins_with_the_beginning_of_sequence_token(lm_eval):
    from spul.evaluation.harness import harness_class

    lm = harness_class()(prompted(), tokenizer=make_tokenizer())
    (found,) = lm.loglikelihood(asked(("", " good film")), disable_tqdm=True)
    ids = lm.tokenizer(" good film", add_special_tokens=False)["input_ids"]
    (plain,) = lm._loglikelihood_tokens([(None, [lm.prefix_token_id], ids)], disable_tqdm=True)
    assert found == plain
