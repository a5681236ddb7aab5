"""The model card: what it says, and what it never says."""

from __future__ import annotations

import ast
import re

import pytest
from huggingface_hub import ModelCard

from spul import SpulConfig, UnlearningLoss
from spul.records.card import LAYERS_THREAT_MODEL, THREAT_MODEL, layers_card, model_card
from spul.records.digests import DataSummary, RewrittenRows, summarize_rows

KEY = bytes(range(32))
FORGET = [{"prompt": "a film about jane doe:", "completion": " splendid"}]
RETAIN = [{"prompt": f"a plot about nobody {i}:", "completion": " dreadful"} for i in range(1234)]
CONFIG = SpulConfig(
    loss=UnlearningLoss(alpha=0.1, beta=0.5).to_dict(),
    generic_completions=[" neutral", " unknown"],
    base_model_name_or_path="facebook/opt-1.3b",
    base_fingerprint="0123456789abcdef" * 4,
    forget=summarize_rows(FORGET, KEY),
    retain=summarize_rows(RETAIN, KEY),
    metrics={
        "test_forget": {"accuracy": 0.02, "f1": 0.031, "generic": 0.98},
        "test_retain": {"accuracy": 0.955, "loss": 0.25},
    },
    versions={"spul": "0.1.0", "torch": "2.6.0"},
)


def make(config: SpulConfig = CONFIG, prompt_type: str = "PROMPT_TUNING") -> ModelCard:
    return model_card(config, prompt_type=prompt_type, num_virtual_tokens=30, num_parameters=61440)


@pytest.fixture
def card(tmp_path) -> ModelCard:
    """The card, saved and read again as the Hub reads it."""
    make().save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def section(card: ModelCard, title: str) -> str:
    """The text of one section."""
    found = re.search(rf"^## {re.escape(title)}\n\n(.*?)(?=\n## |\Z)", card.text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1].strip()


def test_the_metadata_are_what_the_hub_needs_to_find_and_load_it(card):
    assert card.data.to_dict() == {
        "base_model": "facebook/opt-1.3b",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["spul", "unlearning", "prompt-tuning", "base_model:adapter:facebook/opt-1.3b"],
    }


@pytest.mark.parametrize("prompt_type", ["P_TUNING", "PREFIX_TUNING"])
def test_the_prompts_type_is_a_tag_and_named(prompt_type):
    card = make(prompt_type=prompt_type)
    assert prompt_type.lower().replace("_", "-") in card.data.tags
    assert f"- prompt: {prompt_type}, 30 virtual tokens, 61,440 parameters" in section(card, "How it was trained")


def test_the_sections_stand_in_order(card):
    assert re.findall("^#+ .*$", card.text, flags=re.MULTILINE) == [
        "# Unlearning prompt",
        "## What it forgets",
        "## How it was trained",
        "## Metrics",
        "## How to load it",
        "## What it does and does not protect against",
    ]


def test_the_sets_are_named_by_count_and_digest(card):
    lines = section(card, "What it forgets").splitlines()
    assert lines[0] == f"- forget set: 1 rows, HMAC-SHA256 `{CONFIG.forget.digest}`"
    assert lines[1] == f"- retain set: 1,234 rows, HMAC-SHA256 `{CONFIG.retain.digest}`"


def test_sets_without_a_digest_are_named_by_count():
    text = section(make(SpulConfig(forget=summarize_rows(FORGET))), "What it forgets")
    assert text.splitlines()[0] == "- forget set: 1 rows"
    assert text.endswith("\n\nThe rows are not part of this card.")


@pytest.mark.parametrize("keyed", ["forget", "retain", "combined_from"])
def test_a_digest_is_explained_where_one_is_written(keyed):
    summary = summarize_rows(FORGET, KEY)
    config = SpulConfig(**{keyed: [None, summary] if keyed == "combined_from" else summary})
    layers = layers_card(config, {"reduction": 8, "activation": "relu", "num_requests": 1}, 1)
    for text in (section(make(config), "What it forgets"), section(layers, "What they forget")):
        assert text.endswith("this card. A digest is keyed: only who has the key can compare rows with it.")


def test_rewritten_rows_are_named_apart_from_the_sets():
    config = SpulConfig(forget=summarize_rows(FORGET), rewritten=RewrittenRows(2_000, 17, ["spaces"]))
    assert section(make(config), "What it forgets").splitlines()[:3] == [
        "- forget set: 1 rows",
        "- retain set: not recorded",
        "- rewritten rows, trained on beside these: 2,000 made of forget rows, 17 made of retain rows (spaces)",
    ]
    assert "rewritten" not in make().text


def test_the_card_claims_a_training_and_no_success():
    layers = layers_card(CONFIG, {"reduction": 8, "activation": "relu", "num_requests": 1}, 1).text
    for text in (make().text, layers):
        assert "trained to make it" in text
        assert "only an evaluation tells" in text
        assert "that make" not in text


def test_a_combined_prompt_names_the_forget_set_of_each_part():
    config = SpulConfig(combined_from=[summarize_rows(FORGET, KEY), None])
    assert section(make(config), "What it forgets").splitlines()[:5] == [
        "- forget set: not recorded",
        "- retain set: not recorded",
        "- combined from 2 requests that were trained separately:",
        f"    - request 1, forget set: 1 rows, HMAC-SHA256 `{CONFIG.forget.digest}`",
        "    - request 2, forget set: not recorded",
    ]


def test_no_row_of_the_data_is_in_the_card(card):
    for row in [*FORGET, *RETAIN[:5]]:
        assert row["prompt"] not in card.content
        assert row["completion"].strip() not in card.content
    assert "jane" not in card.content


def test_the_training_is_described(card):
    text = section(card, "How it was trained")
    assert "- loss: L_f + 0.1 L_r + 0.5 L_kl, with forget = CrossEntropy(reduction='auto')" in text
    assert "kl = KLDivergence(reduction='auto', direction='reverse')" in text
    assert "- generic responses: `neutral`, `unknown`" in text
    assert f"- fingerprint of the base's weights: `{CONFIG.base_fingerprint}`" in text
    assert "- spul 0.1.0, torch 2.6.0" in text


def test_the_metrics_are_a_table_with_a_row_per_split(card):
    assert section(card, "Metrics").splitlines() == [
        "| split | accuracy | f1 | generic | loss |",
        "|---|---|---|---|---|",
        "| test_forget | 0.0200 | 0.0310 | 0.9800 |  |",
        "| test_retain | 0.9550 |  |  | 0.2500 |",
    ]


def test_both_ways_of_loading_are_shown_and_are_valid_python(card):
    snippets = re.findall(r"```python\n(.*?)```", section(card, "How to load it"), flags=re.DOTALL)
    with_spul, with_peft = snippets
    for snippet in snippets:
        compile(snippet, "card", "exec")
    assert "from spul import SoftPromptUnlearner" in with_spul
    assert 'SoftPromptUnlearner.from_pretrained("facebook/opt-1.3b", "THIS_ADAPTER")' in with_spul
    assert "spul" not in with_peft
    assert 'AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b")' in with_peft
    assert 'PeftModel.from_pretrained(base, "THIS_ADAPTER")' in with_peft


def test_the_threat_model_says_that_the_weights_still_know(card):
    text = section(card, "What it does and does not protect against")
    assert text == THREAT_MODEL
    assert "does not delete anything from the weights" in text


def test_a_config_that_knows_nothing_makes_a_card_that_says_so(tmp_path):
    make(SpulConfig()).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert card.data.tags == ["spul", "unlearning", "prompt-tuning"]
    assert section(card, "What it forgets").splitlines()[:2] == [
        "- forget set: not recorded",
        "- retain set: not recorded",
    ]
    assert section(card, "Metrics") == "Not evaluated."
    assert section(card, "How it was trained").splitlines() == [
        "- prompt: PROMPT_TUNING, 30 virtual tokens, 61,440 parameters"
    ]
    assert "None" not in section(card, "How to load it")


def test_unusual_names_do_not_break_the_metadata(tmp_path):
    config = SpulConfig(base_model_name_or_path="me/a: 'b' #c", forget=DataSummary(0, "cd"))
    make(config).save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "me/a: 'b' #c"


def test_no_text_of_the_user_breaks_out_of_its_place():
    odd = 'a`b\n\n## Injected\n```\n<script>|*x* "q"'
    config = SpulConfig(
        loss=UnlearningLoss().to_dict(),
        generic_completions=[odd, "", "`tick`"],
        base_model_name_or_path=odd,
        base_fingerprint=odd,
        forget=DataSummary(1, odd),
        combined_from=[DataSummary(1, odd)],
        metrics={odd: {odd: 1.0}},
        versions={odd: odd},
    )
    config.loss["forget"] = {"type": odd, "name": odd}
    plain, text = make(), make(config).content
    assert re.findall("^#+ .*$", text, flags=re.MULTILINE) == re.findall("^#+ .*$", plain.content, flags=re.MULTILINE)
    assert re.findall("^```.*$", text, flags=re.MULTILINE) == ["```python", "```"] * 2
    for snippet in re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL):
        compile(snippet, "card", "exec")
    lines = [line for line in text.split("## Metrics")[1].splitlines() if line.startswith("|")]
    escaped = r'a\`b ## Injected \`\`\` &lt;script&gt;\|\*x\* "q"'
    assert lines == [f"| split | {escaped} |", "|---|---|", f"| {escaped} | 1.0000 |"]
    span = '````a`b ## Injected ``` <script>|*x* "q"````'
    assert f"- generic responses: {span}, `  `, `` `tick` ``" in text
    assert f"- forget set: 1 rows, HMAC-SHA256 {span}" in text
    assert f"A soft prompt for {span}, trained to make it give" in text


@pytest.mark.parametrize(
    "name", ['a")\nimport os  # "', "a\\", "``` '", "\u2028\x85\x0b\x7f", '""" + x + """', "{{ 7 }}", "%s"]
)
def test_a_bases_name_is_one_string_in_the_cards_blocks(name):
    text = make(SpulConfig(base_model_name_or_path=name)).content
    blocks = re.findall(r"^```python\n(.*?)\n```$", text, flags=re.DOTALL | re.MULTILINE)
    loaded = [
        call.args[0].value
        for block in blocks
        for call in ast.walk(ast.parse(block))
        if isinstance(call, ast.Call) and "from_pretrained" in ast.unparse(call.func)
        if isinstance(call.args[0], ast.Constant)
    ]
    assert (len(blocks), loaded) == (2, [name, name])


def test_layers_have_a_card_of_the_same_sections(tmp_path):
    layers_card(CONFIG, {"reduction": 8, "activation": "relu", "num_requests": 3}, 12345).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["tags"][2:] == ["unlearning-layers", "base_model:adapter:facebook/opt-1.3b"]
    assert re.findall("^#+ .*$", card.text, flags=re.MULTILINE) == [
        "# Unlearning layers",
        "## What they forget",
        "## How they were trained",
        "## Metrics",
        "## How to load them",
        "## What they do and do not protect against",
    ]
    lines = section(card, "How they were trained").splitlines()
    assert lines[:2] == ["- layers: reduction 8, 12,345 parameters, relu", "- fused from the layers of 3 requests"]
    assert lines[2:] == section(make(), "How it was trained").splitlines()[1:]
    for title, same in (("What they forget", "What it forgets"), ("Metrics", "Metrics")):
        assert section(card, title) == section(make(), same)
    (snippet,) = re.findall(r"```python\n(.*?)```", section(card, "How to load them"), flags=re.DOTALL)
    compile(snippet, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b")' in snippet
    assert section(card, "What they do and do not protect against") == LAYERS_THREAT_MODEL


def test_a_local_base_is_named_by_its_folder_alone(tmp_path):
    folder = tmp_path / "my-base"
    folder.mkdir()
    card = make(SpulConfig(base_model_name_or_path=str(folder)))
    assert card.data.base_model == "my-base"
    assert str(tmp_path) not in card.content
    assert 'from_pretrained("PATH/TO/my-base"' in card.content


@pytest.mark.parametrize(
    "path", ["/home/jane/my-base", "~/jane/my-base", "C:\\Users\\jane\\my-base", "/jane/my-base/"]
)
def test_nor_does_a_folder_that_is_elsewhere_tell_its_path(tmp_path, path):
    config = SpulConfig(base_model_name_or_path=path)
    card = make(config)
    assert "jane" not in card.content
    assert 'from_pretrained("PATH/TO/my-base"' in card.content
    config.save(tmp_path)
    assert SpulConfig.load(tmp_path / "spul_config.json").base_model_name_or_path == "my-base"
