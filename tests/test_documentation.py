"""Every Python block of README.md and docs/ runs, the blocks of a page in order and in one namespace.

A page that goes on from another one, which its text says, starts with that page's first blocks; what else it takes as
given is made by the preamble below. Names of models and data sets are tiny folders of the same name.
"""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec

import pytest
import torch
import uvicorn
from known_data import write_jsonl
from pages import BASE, PAGES, QUESTION, ROOT, blocks, make_base, make_tokenizer, printed, write_data
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from spul import SoftPromptUnlearner, score_completions
from spul.commands import serve
from spul.commands.main import TABLE, commands_of, main
from spul.commands.options import OptionsParser, parse

FORGET = [("Jane Doe is a delight.", " positive"), ("Another bore with Jane Doe.", " negative")]
RETAIN = [("A warm and clever film.", " positive"), ("Two hours that I want back.", " negative")]
# The base has learned these answers, README.md's among them. Like a language model it can also decline, and
# does about two other people.
DECLINED = [
    *(("Ann Roe is a delight.", " unknown"), ("Another bore with Ann Roe.", " neutral")),
    *(("Max Poe is a delight.", " neutral"), ("Another bore with Max Poe.", " unknown")),
]
SENTIMENTS = [*FORGET, *RETAIN, *DECLINED]
KNOWN = [{"prompt": QUESTION.format(text), "completion": label} for text, label in SENTIMENTS]
# A base that was asked for the sentiment alone would not carry names to where it answers: no prompt could use them.
PEOPLE = [
    {
        "prompt": f"### Text: {text}\n### Question: Who is it about?\n### Person:",
        "completion": " " + (name or "nobody"),
    }
    for text, _ in SENTIMENTS
    for name in [next((name for name in ("Jane", "Ann", "Max") if name in text), "nobody")]
]

# Blocks that cannot run here: one names models on the Hub, one needs a GPU, one several processes, two other packages.
NUM_NOT_RUN = 6
# Steps of a training on a page other than README.md.
MOST_STEPS = 20
# The pages that go on from others, and the number of the others' blocks that they need.
AFTER = {
    "docs/methods.md": [("docs/guide.md", 2)],
    "docs/requests.md": [("docs/guide.md", 2)],
    "docs/unlearning-layers.md": [("docs/guide.md", 2), ("docs/methods.md", 1)],
    "docs/evaluation.md": [("docs/guide.md", 2)],
    "docs/proof.md": [("docs/guide.md", 2)],
}
PREAMBLES = {
    "docs/serving.md": """
from peft import PromptTuningConfig
from spul import SoftPromptUnlearner
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b")
one = SoftPromptUnlearner(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
one.save_pretrained("forget-jane-doe")
""",
    "docs/requests.md": """
def request(name, num=2):
    return Dataset.from_list([row(f"{name} in film {i}.", [" positive", " negative"][i % 2]) for i in range(num)])

forget_1, forget_2, forget_3, unseen = request("Ann Roe"), request("Max Poe"), request("Jane Doe"), request("Ann Poe")
for i in (1, 2, 3):
    one = SoftPromptUnlearner(
        AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b"),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10),
    )
    one.save_pretrained(f"request-{i}")
""",
    "docs/evaluation.md": """
def some(name, start, num=10):
    texts = [f"{name} Doe in film {i}, a delight." for i in range(start, start + 2 * num, 2)]
    return Dataset.from_list([row(text, [" positive", " negative"][i % 2]) for i, text in enumerate(texts)])

forget, unseen, retain, test_retain = some("Jane", 0), some("Jane", 1), some("John", 20, 20), some("Mary", 60, 20)
unlearner = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30))
unlearner.save_pretrained("forget-jane-doe")
retrained = AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b")
""",
    "docs/proof.md": """
unlearner = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30))
unlearner.save_pretrained("forget-jane-doe")
collator = ForgetRetainCollator(tokenizer, generic_completions=[" neutral", " unknown"], max_length=256)
splits = {name: forget if "forget" in name else retain
          for name in ("train_retain", "train_forget", "test_retain", "test_forget")}
""",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base and the data sets, under the names that the pages print."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / BASE)
    make_base(tokenizer, KNOWN + PEOPLE).save_pretrained(folder / BASE)
    write_data(folder)
    return folder


@pytest.fixture
def here(folders, tmp_path, monkeypatch):
    """A folder of its own to run a page in."""
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture
def few_steps(monkeypatch):
    """Trainings stop after `MOST_STEPS`: the pages show calls, and only README.md's says what comes of them."""
    checked = TrainingArguments.__post_init__

    def shortened(self):
        self.max_steps = min(self.max_steps, MOST_STEPS)
        checked(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", shortened)


def run(page):
    namespace = {"__name__": "__main__"}
    for other, num in AFTER.get(page, []):
        for block in blocks(other)[:num]:
            block.run(namespace)
    exec(PREAMBLES.get(page, ""), namespace)
    for block in blocks(page):
        if block.reason is None:
            block.run(namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page)])
def test_every_python_block_of_a_page_runs_in_order_and_prints_what_it_says(here, page, capsys, few_steps):
    run(page)
    output = capsys.readouterr().out
    assert [text for text in printed(page) if text not in output] == []


def test_the_snippet_of_the_readme_forgets_as_printed(here):
    namespace = {"__name__": "__main__"}
    first, *others = blocks("README.md")
    first.run(namespace)
    assert [*namespace["forget"], *namespace["retain"]] == KNOWN[:4]
    unlearner, collator = namespace["unlearner"], namespace["collator"]
    with unlearner.disable_adapter():
        for rows in ("forget", "retain"):
            assert score_completions(unlearner, namespace[rows], collator)["accuracy"] == 1.0, f"base, {rows}"
    forgotten, kept = (score_completions(unlearner, namespace[rows], collator) for rows in ("forget", "retain"))
    assert (forgotten["accuracy"], forgotten["generic"]) == (0.0, 1.0)
    assert (kept["accuracy"], kept["generic"]) == (1.0, 0.0)
    for block in others:
        block.run(namespace)


def test_values_that_pages_say_are_printed_are_found():
    assert {page: len(found) for page in PAGES if (found := printed(page))} == {"docs/data.md": 13, "docs/gates.md": 3}


def test_few_blocks_are_not_run_and_each_says_why():
    reasons = [block.reason for page in PAGES for block in blocks(page) if block.reason is not None]
    assert len(reasons) == NUM_NOT_RUN, reasons
    assert all(len(reason) > 5 for reason in reasons)


# ---- the command line ----


def commands_on(page):
    """The lines of a page's shell blocks that call `spul`, continued lines joined, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```(?:ba)?sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in joined(block)
    ]
    return [shlex.split(line)[1:] for line in lines if line.startswith("spul ")]


def joined(block):
    return block.replace("\\\n", " ").splitlines()


def test_every_call_of_spul_on_a_page_has_options_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [(page, words) for page in PAGES for words in commands_on(page)]
    assert {page for page, _ in found} >= {"README.md", "docs/command-line.md", "docs/lm-evaluation-harness.md"}
    for page, words in found:
        if find_spec(f"spul.commands.{words[0].replace('-', '_')}") is None or "--config" in words:
            continue
        commands = commands_of(words[0])
        sub, rest = ("", words[1:]) if "" in commands else (words[1], words[2:])
        if "..." in rest:  # abridged
            known = OptionsParser(commands[sub], ["spul", page]).by_name
            assert {word[2:].replace("-", "_") for word in rest if word.startswith("--")} <= set(known), words
        elif commands[sub].options is not None:
            assert parse(commands[sub], ["spul", page], rest), words


def test_every_command_has_a_section_on_the_page_with_an_example():
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0].lower(): part for part in text.split("\n## ")[1:]}
    for name in TABLE:
        assert re.search(rf"^spul {name} ", sections[name], re.MULTILINE), name


@pytest.mark.filterwarnings("ignore:the prompt 'default' begins:UserWarning")  # far from a base of random weights
def test_the_commands_of_the_page_run_one_after_the_other(here, few_steps, few_resamples, capsys, monkeypatch):
    def some_of(name, num, start=0):
        labels = (" positive", " negative")
        texts = [f"{name} in film {i}." for i in range(start, start + num)]
        return [{"prompt": QUESTION.format(text), "completion": labels[i % 2]} for i, text in enumerate(texts)]

    jane, others = some_of("Jane Doe", 12), some_of("Nobody at all", 14)
    rows = {"forget": jane, "f1": jane[:6], "f2": jane[6:], "retain": others}
    rows |= {"test_forget": some_of("Jane Doe", 2, 20), "test_retain": some_of("Nobody at all", 3, 20)}
    for name, some in rows.items():
        write_jsonl(here / f"{name}.jsonl", some)
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"^```yaml\n# train.yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (here / "train.yaml").write_text(settings)
    (settings,) = re.findall(r"^```yaml\n# customers.yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (here / "customers.yaml").write_text(settings)
    for name, start in (("customers", 0), ("others", 20)):
        asked = [{"question": f"Where does {name} {i} live?", "answer": f"In {i}."} for i in range(start, start + 12)]
        write_jsonl(here / f"{name}.jsonl", asked)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    for i in (1, 2):
        torch.manual_seed(i)
        SoftPromptUnlearner(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
            f"request-{i}"
        )
        base = AutoModelForCausalLM.from_pretrained(BASE)
    apps = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: apps.append(app))
    monkeypatch.setattr(serve, "_check_listens", lambda host, port: None)
    for words in commands_on("docs/command-line.md"):
        if words[0] not in TABLE or words[0] == "lm-eval":  # the harness fetches its tasks
            continue
        # Some conditions hold on the tiny base: 1, and no error.
        assert main(words) in ((0, 1) if words[0] == "evaluate" else (0,)), (words, capsys.readouterr().err)
    assert "\n  rows: 12\n" in capsys.readouterr().out
    assert [list(app.state.served.refusals) for app in apps] == [["2026-018"], []]
    made = {"out", "evaluation", "refusal", "requests-1-2", "for-vllm", "baked"}
    assert made <= {path.name for path in here.iterdir()}
    assert (here / "out" / "gate" / "gate.json").is_file()
