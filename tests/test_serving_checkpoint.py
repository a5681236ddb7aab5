"""A prompt baked into a checkpoint: what transformers loads from the folder answers as the prompted base does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import httpx
import pytest
import torch
from chats import TEMPLATES
from helpers import CONFIGS, FAMILIES, build, make_tokenizer
from tokenizers import processors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from spul import SoftPromptUnlearner
from spul.serving import checkpoint, export_checkpoint

P = 5
TEXT = "the review is bad about jane doe :"


def with_prompt(base, kind="prompt_tuning", position="start", p=P, scale=0.3):
    torch.manual_seed(1)
    unlearner = SoftPromptUnlearner(base, CONFIGS[kind](p), prompt_position=position)
    with torch.no_grad():
        for parameter in unlearner.prompt_encoder.parameters():
            parameter.add_(scale * torch.randn_like(parameter))  # far enough to make a difference
    return unlearner.eval()


def with_bos():
    """A tokenizer that puts a beginning of sequence in front, and has a chat template."""
    tokenizer = make_tokenizer()
    own = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = own
    tokenizer.chat_template = TEMPLATES["turns"]
    return tokenizer


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def logits_of(model, ids):
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_prompted_base(family, kind, tmp_path):
    unlearner, tokenizer = with_prompt(build(family), kind), with_bos()
    before = {name: value.clone() for name, value in unlearner.get_base_model().state_dict().items()}
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    own, ids = tokenizer(TEXT)["input_ids"], baked(TEXT)["input_ids"]
    assert ids[P:] == own
    rows = len(unlearner.get_base_model().get_output_embeddings().weight)
    found, expected = logits_of(model, ids)[P:, :rows], logits_of(unlearner, own)[P:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits_of(unlearner.get_base_model(), own)).abs().max() > 0.01  # the prompt does something
    after = unlearner.get_base_model().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_base_whose_head_is_its_embeddings_keeps_that_head(tmp_path):
    base = build("gpt2")
    table = base.get_input_embeddings().weight
    assert base.get_output_embeddings().weight is table
    export_checkpoint(with_prompt(base), make_tokenizer(), tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    first = min(baked.convert_tokens_to_ids(checkpoint.TOKEN.format(i)) for i in range(P))
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.get_output_embeddings().weight[: len(table)], table)
    assert torch.equal(model.get_input_embeddings().weight[:first], table[:first])


@pytest.mark.parametrize("spare", [0, 2, 40])
def test_rows_that_the_vocabulary_has_to_spare_are_used_first(spare, tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + spare, **shape)).eval()
    head = base.get_output_embeddings().weight.detach().clone()
    export_checkpoint(with_prompt(base), tokenizer, tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    assert len(baked) == len(tokenizer) + P
    assert model.config.vocab_size == len(tokenizer) + max(spare, P) == len(model.get_input_embeddings().weight)
    found, first = model.get_output_embeddings().weight, len(tokenizer)
    assert torch.equal(found[:first], head[:first])
    assert torch.equal(found[first + P : len(head)], head[first + P :])
    assert all(torch.equal(row, head[checkpoint.least_likely(base)]) for row in found[first : first + P])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generation_is_that_of_the_prompted_base_and_never_gives_the_new_tokens(family, tmp_path):
    unlearner, tokenizer = with_prompt(build(family)), with_bos()
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    texts = [TEXT, "film :", "is it good about the plot"]
    baked.pad_token, baked.padding_side = "<pad>", "left"
    batch = baked(texts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    found = model.generate(**batch, **greedy)[:, batch["input_ids"].shape[1] :]
    for text, ids in zip(texts, found.tolist(), strict=True):
        one = torch.tensor([tokenizer(text)["input_ids"]])
        own = unlearner.generate(one, **greedy)[0, one.shape[1] :].tolist()
        assert [token for token in ids if token] == [token for token in own if token]
    first = len(tokenizer)
    assert model.generation_config.suppress_tokens == list(range(first, first + P))
    with torch.no_grad():
        model.get_output_embeddings().weight[first:] += 100 * model.get_output_embeddings().weight[first:].sign()
    sampled = model.generate(**batch, do_sample=True, max_new_tokens=40, pad_token_id=0, temperature=3.0)
    assert not (sampled[:, batch["input_ids"].shape[1] :] >= first).any()


def test_the_tokens_of_the_prompt_are_as_unlikely_as_the_least_likely_other(tmp_path):
    """For engines that read no suppress_tokens."""
    unlearner, tokenizer = with_prompt(build("llama")), make_tokenizer()
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")
    model, _ = loaded(tmp_path / "baked")
    head, first = model.get_output_embeddings().weight, len(tokenizer)
    least = checkpoint.least_likely(unlearner.get_base_model())
    assert all(torch.equal(row, head[least]) for row in head[first:])


def test_the_least_likely_token_is_one_that_no_position_answers_with():
    base = build("llama")
    own = base.get_output_embeddings()
    head = nn.Linear(own.in_features, own.out_features)
    with torch.no_grad():
        head.weight.copy_(own.weight)
        head.bias.zero_()[77] = -50.0
    base.set_output_embeddings(head)
    assert checkpoint.least_likely(base) == 77


def test_conversations_have_the_prompt_in_front_once(tmp_path):
    unlearner, tokenizer = with_prompt(build("llama")), with_bos()
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    messages = [{"role": "user", "content": "about jane doe"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    own = tokenizer.apply_chat_template(messages, **options)
    first = len(tokenizer)
    assert list(baked.apply_chat_template(messages, **options)) == [*range(first, first + P), *own]
    # As `transformers serve` does it.
    answer = pipeline("text-generation", model=model, tokenizer=baked)(messages, max_new_tokens=6, do_sample=False)
    expected = unlearner.generate(torch.tensor([own]), max_new_tokens=6, do_sample=False)[0, len(own) :]
    found = answer[0]["generated_text"][-1]["content"]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_token_ids_leave_the_prompt_out(tmp_path):
    """As the page says: it is no security boundary."""
    unlearner, tokenizer = with_prompt(build("llama")), with_bos()
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    ids = tokenizer(TEXT)["input_ids"]
    assert baked(TEXT, add_special_tokens=False)["input_ids"] == ids[1:]
    base = unlearner.get_base_model()
    rows = len(base.get_output_embeddings().weight)
    torch.testing.assert_close(logits_of(model, ids)[:, :rows], logits_of(base, ids))


def test_a_base_in_bfloat16_stays_in_it(tmp_path):
    unlearner = with_prompt(build("gemma3", torch.bfloat16))
    export_checkpoint(unlearner, make_tokenizer(), tmp_path / "baked")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "baked").dtype == torch.bfloat16


def test_the_facts_name_base_and_prompt(tmp_path):
    base, tokenizer = build("llama"), make_tokenizer()
    base.save_pretrained(tmp_path / "base")
    with_prompt(LlamaForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(str(tmp_path / "adapter"))
    unlearner = SoftPromptUnlearner.from_pretrained(str(tmp_path / "base"), tmp_path / "adapter")
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")
    facts = json.loads((tmp_path / "baked" / checkpoint.FACTS).read_text())
    record = json.loads((tmp_path / "adapter" / "spul_config.json").read_text())
    assert facts["base_fingerprint"] == record["base_fingerprint"]
    assert facts["adapter_sha256"] == record["weights_sha256"]
    assert (facts["kind"], facts["num_virtual_tokens"], facts["first_token_id"]) == ("checkpoint", P, len(tokenizer))
    assert facts["base_model_name_or_path"] == "base"


# ---- what is refused, with nothing written ----


class Squared(nn.Embedding):
    """Input embeddings that are more than rows times a number."""

    def forward(self, input):
        return super().forward(input) ** 2


def strange_base():
    base = build("llama")
    own = base.get_input_embeddings()
    base.set_input_embeddings(Squared(*own.weight.shape, _weight=own.weight.detach()))
    return with_prompt(base)


REFUSED = {
    "prefix tuning": (lambda: with_prompt(build("llama"), "prefix_tuning"), "PrefixTuningConfig.*PromptTuningConfig"),
    "the message": (lambda: with_prompt(build("llama"), position="message"), "in front of"),
    "embeddings of another kind": (strange_base, "times a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_baked_is_refused_before_anything_is_written(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export_checkpoint(make(), make_tokenizer(), tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_base_is_refused(tmp_path):
    unlearner = with_prompt(build("llama"))
    unlearner.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match=r"quantized.*bfloat16"):
        export_checkpoint(unlearner, make_tokenizer(), tmp_path / "baked")


def test_a_checkpoint_with_other_logits_is_refused(tmp_path, monkeypatch):
    """A family in which prompt rows come out changed, seen once the folder is loaded."""
    monkeypatch.setattr(checkpoint, "unscaled", lambda embeddings, prompt: 1.1 * prompt)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives other logits.*Nothing was written"):
        export_checkpoint(with_prompt(build("llama")), make_tokenizer(), tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_loses_the_prompt_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "baked_tokenizer", lambda tokenizer, num: tokenizer)
    with pytest.raises(ValueError, match=r"other tokens for a text.*Nothing was written"):
        export_checkpoint(with_prompt(build("llama")), make_tokenizer(), tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_carries_a_prompt_gets_no_second_one(tmp_path):
    export_checkpoint(with_prompt(build("llama")), make_tokenizer(), tmp_path / "baked")
    model, baked = loaded(tmp_path / "baked")
    with pytest.raises(ValueError, match="carries a prompt"):
        export_checkpoint(with_prompt(model), baked, tmp_path / "again")


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"):
        export_checkpoint(with_prompt(build("llama")), make_tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_empty_folder_becomes_the_checkpoint(tmp_path):
    (tmp_path / "baked").mkdir()
    export_checkpoint(with_prompt(build("llama")), make_tokenizer(), tmp_path / "baked")
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "baked").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


# ---- the server of transformers ----


@contextmanager
def transformers_serve(folder):
    """The address of `transformers serve FOLDER`, the whole program."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None, "it has ended"
            assert time.monotonic() < end, "it does not start"
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def test_transformers_serve_answers_chats_and_texts_under_the_prompt_and_takes_no_token_ids(tmp_path):
    pytest.importorskip("fastapi")
    unlearner, tokenizer = with_prompt(build("llama"), scale=1.0), with_bos()
    export_checkpoint(unlearner, tokenizer, tmp_path / "baked")

    def greedy(model, ids):
        ids = torch.tensor([ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    messages = [{"role": "user", "content": TEXT}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = tokenizer(TEXT)["input_ids"]
    base = unlearner.get_base_model()
    assert all(greedy(unlearner, ids) != greedy(base, ids) for ids in (chat, text))
    asked = {"model": str(tmp_path / "baked"), "max_tokens": 6}
    with transformers_serve(tmp_path / "baked") as url, httpx.Client(base_url=url, timeout=120) as client:
        said = client.post("/v1/chat/completions", json={**asked, "messages": messages}).json()
        assert said["choices"][0]["message"]["content"] == greedy(unlearner, chat)
        said = client.post("/v1/completions", json={**asked, "prompt": TEXT}).json()
        assert said["choices"][0]["text"] == greedy(unlearner, text)
        for other in ({**asked, "prompt": text}, {**asked, "model": "another", "prompt": TEXT}):
            assert client.post("/v1/completions", json=other).status_code == 400
