"""Prompts for vLLM: the files, the requests of the client, and where a chat's part lands.

The engine itself runs in test_serving_vllm_engine.py.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import sys

import pytest
import torch
from chats import TEMPLATES, chatty
from helpers import CONFIGS, build, make_tokenizer
from safetensors.torch import load_file, save_file

from spul import SoftPromptUnlearner
from spul.data.encoder import RowEncoder
from spul.serving import export_vllm, vllm_client
from spul.serving.vllm import JOIN_PARTS, PLACEHOLDER, chat_part, serve_command

P, WIDTH = 5, 32
IDS = [1, 40, 41, 42]


def with_prompt(kind="prompt_tuning", position="start", family="llama"):
    torch.manual_seed(1)
    return SoftPromptUnlearner(build(family), CONFIGS[kind](P), prompt_position=position).eval()


def client(folder):
    """The client as it lies in the folder, loaded by itself."""
    spec = importlib.util.spec_from_file_location("soft_prompt", folder / "soft_prompt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SoftPrompt()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    unlearner, folder = with_prompt(), tmp_path_factory.mktemp("exported") / "start"
    return unlearner, export_vllm(unlearner, chatty("turns"), folder)


@pytest.fixture(scope="module")
def message(tmp_path_factory):
    unlearner, folder = with_prompt(position="message"), tmp_path_factory.mktemp("exported") / "message"
    return unlearner, export_vllm(unlearner, chatty("turns"), folder)


def prompt_of(unlearner):
    return unlearner.get_prompt(1)[0].detach()


def logits_of(base, embeddings):
    with torch.no_grad():
        return base(inputs_embeds=embeddings[None]).logits[0]


# ---- the folder ----


def test_the_client_imports_torch_and_safetensors_alone(start):
    tree = ast.parse((start[1] / "soft_prompt.py").read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in found}
    assert {root for root in roots if root not in sys.stdlib_module_names} == {"torch", "safetensors"}


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_the_embeddings_are_those_that_the_base_reads(kind, tmp_path):
    unlearner = with_prompt(kind)
    export_vllm(unlearner, make_tokenizer(), tmp_path / "out")
    assert torch.equal(client(tmp_path / "out").embeddings, prompt_of(unlearner))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_the_table_has_what_the_first_layer_reads_for_every_token(family, tmp_path):
    unlearner = with_prompt(family=family)
    export_vllm(unlearner, make_tokenizer(), tmp_path / "out")
    base, table = unlearner.get_base_model(), load_file(tmp_path / "out" / "embeddings.safetensors")["embeddings"]
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits_of(base, table[IDS]), expected)


def test_the_facts_name_prompt_and_base(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    with_prompt().save_pretrained(str(tmp_path / "adapter"))
    unlearner = SoftPromptUnlearner.from_pretrained(str(tmp_path / "base"), tmp_path / "adapter")
    export_vllm(unlearner, make_tokenizer(), tmp_path / "out", with_embeddings=False)
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    record = json.loads((tmp_path / "adapter" / "spul_config.json").read_text())
    assert facts["base_fingerprint"] == record["base_fingerprint"]
    assert facts["adapter_sha256"] == record["weights_sha256"]
    assert (facts["num_virtual_tokens"], facts["width"], facts["prompt_position"]) == (P, WIDTH, "start")
    assert (facts["base_model_name_or_path"], facts["adapter"]) == ("base", "adapter")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"facts.json", "prompt.safetensors", "soft_prompt.py"}


def test_a_prompt_that_is_not_the_one_of_the_facts_is_refused(start, tmp_path):
    for path in start[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file({"embeddings": torch.zeros(P, WIDTH)}, tmp_path / "prompt.safetensors")
    with pytest.raises(ValueError, match=r"SHA-256.*copy the whole folder again"):
        client(tmp_path)


@pytest.mark.parametrize("kind", ["prefix_tuning"])
def test_keys_and_values_are_refused_with_what_to_do(kind, tmp_path):
    with pytest.raises(ValueError, match=r"keys and values.*PromptTuningConfig"):
        export_vllm(with_prompt(kind), make_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_unlearner_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"LlamaForCausalLM; expected a SoftPromptUnlearner"):
        export_vllm(build("llama"), make_tokenizer(), tmp_path / "out")


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"):
        export_vllm(with_prompt(), make_tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_link_and_the_working_directory_are_folders_too(tmp_path, monkeypatch):
    for name in ("here", "far"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "dangling").symlink_to(tmp_path / "ein Ort é")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "link", tmp_path / "dangling"):
        export_vllm(with_prompt(), make_tokenizer(), folder, with_embeddings=False)
    for name in ("here", "far", "ein Ort é"):
        assert (tmp_path / name / "facts.json").is_file()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def fails(base):
        raise KeyboardInterrupt

    monkeypatch.setattr("spul.serving.vllm.input_embeddings", fails)
    with pytest.raises(KeyboardInterrupt):
        export_vllm(with_prompt(), make_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- requests ----


def test_a_request_has_the_prompt_in_front_and_the_row_as_token_ids(start):
    unlearner, folder = start
    found = client(folder).request(IDS)
    assert found["prompt_token_ids"] == [0] * P + IDS
    assert found["prompt_is_token_ids"] == [False] * P + [True] * len(IDS)
    expected = torch.cat([prompt_of(unlearner), torch.zeros(len(IDS), WIDTH)])
    assert torch.equal(found["prompt_embeds"], expected)


def test_a_request_at_the_message_has_the_prompt_inside(message):
    unlearner, folder = message
    found = client(folder).request(IDS, position=3)
    assert found["prompt_token_ids"] == [*IDS[:3], *[0] * P, IDS[3]]
    assert found["prompt_is_token_ids"] == [True] * 3 + [False] * P + [True]
    assert torch.equal(found["prompt_embeds"][3 : 3 + P], prompt_of(unlearner))


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_completion_carries_the_embeddings_of_prompt_and_row(message, position):
    """A forward of the base over them has the logits of spul's own."""
    unlearner, folder = message
    saved = base64.b64decode(client(folder).completion(IDS, position)["prompt_embeds"])
    embeddings = torch.load(io.BytesIO(saved), weights_only=True)
    assert embeddings.shape == (P + len(IDS), WIDTH)
    with torch.no_grad():
        given = {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, len(IDS))}
        expected = unlearner(**given, prompt_position=torch.tensor([position])).logits[0, -1]
    torch.testing.assert_close(logits_of(unlearner.get_base_model(), embeddings)[-1], expected)


def test_the_saved_tensor_holds_no_more_than_itself(start):
    text = vllm_client.encoded(torch.zeros(1000, WIDTH)[:2])
    assert len(text) < 4000


def test_requests_that_cannot_be_right_are_refused(start, message, tmp_path):
    for wrong in (None, -1, 5):
        with pytest.raises(ValueError, match=r"stands at 'message': expected 0 to 4"):
            client(message[1]).request(IDS, wrong)
    with pytest.raises(ValueError, match=r"stands at 'start': expected 0"):
        client(start[1]).request(IDS, 1)
    with pytest.raises(ValueError, match="no token ids"):
        client(start[1]).request([])
    with pytest.raises(ValueError, match=r"token id 400; expected 0 to"):
        client(start[1]).completion([1, 400])
    export_vllm(with_prompt(), make_tokenizer(), tmp_path / "out", with_embeddings=False)
    with pytest.raises(FileNotFoundError, match="export again"):
        client(tmp_path / "out").completion(IDS)


# ---- parts of chats ----


CONVERSATION = [
    {"role": "user", "content": "about film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "about jane doe"},
]


def test_the_part_is_the_first_of_the_last_user_message(message):
    unlearner, folder = message
    found = client(folder).messages([*CONVERSATION, {"role": "assistant", "content": "an"}])
    assert found[:2] == CONVERSATION[:2]
    assert found[3] == {"role": "assistant", "content": "an"}
    part, text = found[2]["content"]
    assert (part["type"], text) == ("prompt_embeds", {"type": "text", "text": "about jane doe"})
    saved = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
    assert torch.equal(saved, prompt_of(unlearner))


def test_a_prompt_at_the_start_cannot_be_a_part(start):
    with pytest.raises(ValueError, match=r"start of every row.*completion\(ids, position\)"):
        client(start[1]).messages(CONVERSATION)


def test_messages_without_a_user_are_refused(message):
    with pytest.raises(ValueError, match="no message of the role"):
        client(message[1]).messages([{"role": "system", "content": "good"}])


@pytest.mark.parametrize("name", TEMPLATES)
def test_under_the_exported_template_the_part_stands_where_training_puts_it(name):
    agrees, template = chat_part(chatty(name))
    assert agrees is True
    theirs = chatty(name)
    theirs.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in CONVERSATION]
    parts[-1]["content"].insert(0, {"type": "text", "text": PLACEHOLDER})
    ids = theirs.apply_chat_template(
        parts, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    own = RowEncoder(chatty(name), 999, prompt_position="message").prompts([{"prompt": CONVERSATION}])
    at = ids.index(theirs.convert_tokens_to_ids(PLACEHOLDER))
    assert (at, ids[:at] + ids[at + 1 :]) == (int(own["prompt_position"]), own["input_ids"][0].tolist())


def test_by_itself_vllm_would_put_a_line_break_between_prompt_and_text():
    """With contents as strings it joins parts by a line break: other tokens than in training."""
    tokenizer = chatty("turns")
    joined = [{"role": "user", "content": f"{PLACEHOLDER}\nabout jane doe"}]
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    found = tokenizer.apply_chat_template(joined, tokenize=True, return_dict=False)
    found.remove(tokenizer.convert_tokens_to_ids(PLACEHOLDER))
    messages = [{"role": "user", "content": "about jane doe"}]
    assert found != tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_the_exported_template_changes_no_text_message():
    tokenizer = chatty("default")
    plain = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    template = JOIN_PARTS + tokenizer.chat_template
    assert tokenizer.apply_chat_template(CONVERSATION, chat_template=template, tokenize=False) == plain


def test_a_tokenizer_with_other_tokens_behind_the_prompt_gets_no_chat_part(tmp_path):
    """Behind a space the first word of a message has a token of its own, which a special token between them undoes."""
    tokenizer = chatty("turns")
    tokenizer.chat_template = "{% for m in messages %}about {{ m.content }}{% endfor %} :"
    agrees, template = chat_part(tokenizer)
    assert agrees is not True
    assert template is None
    export_vllm(with_prompt(position="message"), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot be served by a part of a chat"):
        client(tmp_path / "out").messages(CONVERSATION)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_without_a_chat_template_there_is_no_chat_part():
    assert chat_part(make_tokenizer()) == ("the tokenizer has no chat template, or several", None)


def test_the_command_that_serves_names_the_template_where_there_is_one(start, message):
    assert serve_command(start[1], "a base") == "vllm serve 'a base' --enable-prompt-embeds"
    command = serve_command(message[1], "base")
    assert command.endswith(f"--chat-template {message[1]}/chat_template.jinja --chat-template-content-format openai")
