"""Arguments and settings of forward and generate: what the concatenated embeddings give, or an error beforehand."""

import pytest
import torch
from helpers import CONFIGS, build, build_unlearner, make_batch, make_tokenizer, stirred
from transformers import DynamicCache, GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

from spul.models.compat_cache import CHUNKS_FOLLOW_CACHE

IDS = torch.randint(5, 120, (1, 7), generator=torch.Generator().manual_seed(4))
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def decoded_by_hand(unlearner, ids, num_new=6):
    """Greedy decoding over the prompt's embeddings and those of all tokens so far, without any cache."""
    base = unlearner.get_base_model()
    for _ in range(num_new):
        embeds = torch.cat([unlearner.get_prompt(1), unlearner.word_embeddings(ids)], dim=1)
        logits = base(inputs_embeds=embeds, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids.tolist()


def refused(unlearner, message, **kwargs):
    with pytest.raises(ValueError, match=message):
        unlearner.generate(input_ids=IDS, **{**GREEDY, **kwargs})


def test_arguments_that_are_none_count_as_not_given():
    unlearner = build_unlearner()
    names = ("past_key_values", "cache", "inputs_embeds", "position_ids", "adapter_names", "assistant_model")
    nothing = dict.fromkeys((*names, "use_cache", "generation_config", "attention_mask"))
    assert unlearner.generate(input_ids=IDS, **nothing, **GREEDY).tolist() == decoded_by_hand(unlearner, IDS)
    nothing = dict.fromkeys(("past_key_values", "cache", "inputs_embeds", "position_ids", "adapter_names", "task_ids"))
    torch.testing.assert_close(unlearner(input_ids=IDS, **nothing).logits, unlearner(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
def test_a_cache_is_refused_by_all_its_names(name):
    unlearner = build_unlearner()
    out = unlearner(input_ids=IDS, use_cache=True)
    for cache in (DynamicCache(), out.past_key_values):
        with pytest.raises(ValueError, match=f"takes no {name}: it would put the prompt in again"):
            unlearner(input_ids=IDS[:, -1:], use_cache=True, **{name: cache})
        refused(unlearner, f"takes no {name}: pass input_ids", **{name: cache})


@pytest.mark.parametrize("name", ["position_ids", "cache_position", "task_ids", "alora_offsets"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_what_peft_takes_and_ignores_is_refused(name, prompt_type):
    unlearner = build_unlearner(prompt_type=prompt_type)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=f"takes no {name}"):
            unlearner(input_ids=IDS, **{name: torch.arange(7)[None]})
    refused(unlearner, f"takes no {name}", **{name: torch.arange(7)[None]})


def test_layers_refuse_adapter_names_and_a_training_batch_has_one_prompt():
    model = stirred(build("llama", torch.float64))
    for run in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names=\['a'\]: a batch runs under one adapter"):
            run(input_ids=IDS, adapter_names=["a"])
    with pytest.raises(TypeError, match="with is_forget, forward takes no adapter_names"):
        build_unlearner()(**make_batch(), adapter_names=["__base__"] * 5)


@pytest.mark.parametrize("settings", [{"num_beams": 0}, {"num_return_sequences": 0}])
def test_no_beams_and_no_sequences_are_refused(settings):
    with pytest.raises(ValueError, match="expected at least 1"):
        build_unlearner().generate(IDS, **settings)


def test_ids_and_embeddings_together_and_masks_of_other_shapes_are_refused():
    unlearner = build_unlearner()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds; found both"):
        unlearner(input_ids=IDS, inputs_embeds=unlearner.word_embeddings(IDS))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds; found neither"):
        unlearner()
    mask = torch.ones(1, 1, 7, 7)
    with pytest.raises(ValueError, match=r"is \(batch, tokens\), as input_ids are, \(1, 7\); found"):
        unlearner(input_ids=IDS, attention_mask=mask)
    refused(unlearner, r"is \(batch, tokens\), as input_ids are", attention_mask=mask)
    embeds, left = unlearner.word_embeddings(IDS), torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="left-padded rows under a prompt take no inputs_embeds"):
        unlearner(inputs_embeds=embeds, attention_mask=left)


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("where", ["base", "given", "config", "on the unlearner"])
def test_a_default_of_no_cache_keeps_the_prompt(where, prompt_type):
    unlearner, kwargs = build_unlearner(prompt_type=prompt_type), {}
    base = unlearner.get_base_model()
    if where == "base":
        base.generation_config.use_cache = False
    elif where == "config":
        base.config.use_cache = False
    elif where == "given":
        kwargs["generation_config"] = GenerationConfig(use_cache=False)
    else:
        unlearner.generation_config = GenerationConfig(use_cache=False)
    found = unlearner.generate(input_ids=IDS, **GREEDY, **kwargs)
    assert found.tolist() == decoded_by_hand(unlearner, IDS)
    if where == "given":
        assert kwargs["generation_config"].use_cache is False, "the caller's config is left as it was"


@pytest.mark.parametrize("kind", ["static", "quantized", "dynamic", "offloaded"])
def test_a_choice_of_cache_is_refused_by_its_name_wherever_it_is_made(kind):
    unlearner, message = build_unlearner(), f"cache_implementation='{kind}'"
    refused(unlearner, message, cache_implementation=kind)
    refused(unlearner, message, generation_config=GenerationConfig(cache_implementation=kind))
    unlearner.get_base_model().generation_config.cache_implementation = kind
    refused(unlearner, message)


def test_an_assistant_is_refused_on_either_side():
    unlearner, other = build_unlearner(), build("llama", torch.float64)
    refused(unlearner, "takes no assistant_model", assistant_model=other)
    with pytest.raises(ValueError, match="cannot be the assistant_model of another"):
        other.generate(IDS, assistant_model=unlearner, **GREEDY)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "does not decode by assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "does not decode by contrastive search"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"token_healing": True}, "token_healing"),
        ({"custom_generate": "somebody/else"}, "takes no custom_generate"),
    ],
)
def test_ways_of_decoding_that_leave_the_prompt_out_are_refused(setting, message):
    unlearner = build_unlearner()
    refused(unlearner, message, **setting)
    if "custom_generate" not in setting:
        refused(unlearner, message, generation_config=GenerationConfig(**setting))


def test_positional_arguments_are_known_by_their_names():
    unlearner, other = build_unlearner(), build("llama", torch.float64)
    with pytest.raises(ValueError, match="takes no assistant_model"):
        unlearner.generate(IDS, None, None, None, None, None, other)
    found = unlearner.generate(IDS, GenerationConfig(**GREEDY), None, None, lambda row, seen: [9])
    assert found[0, 7:].tolist() == [9] * 6


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "heal_tokens"])
def test_methods_of_the_base_that_generate_are_out_of_reach(name):
    unlearner = build_unlearner()
    with pytest.raises(AttributeError, match=f"{name} would run the base without the soft prompt"):
        getattr(unlearner, name)
    with unlearner.disable_adapter():
        assert getattr(unlearner, name, None) == getattr(unlearner.get_base_model(), name, None)


def test_chunked_prefill_keeps_the_prompt_or_is_refused(monkeypatch):
    unlearner = build_unlearner()
    if CHUNKS_FOLLOW_CACHE:
        found = unlearner.generate(IDS, prefill_chunk_size=3, **GREEDY)
        assert found.tolist() == decoded_by_hand(unlearner, IDS)
    monkeypatch.setattr("spul.prompts.arguments.CHUNKS_FOLLOW_CACHE", False)  # as below transformers 5.23
    refused(unlearner, "prefill_chunk_size=3: transformers below 5.23", prefill_chunk_size=3)
    monkeypatch.setattr("spul.prompts.arguments.CHUNKS_FOLLOW_CACHE", True)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0  # beyond a sliding window, rows of unequal length stand behind embeddings of the prompt
    with pytest.raises(ValueError, match="prefill_chunk_size=3: here the prompt stands as embeddings"):
        build_unlearner("mistral").generate(
            IDS.expand(2, -1), attention_mask=mask, generation_config=GenerationConfig(prefill_chunk_size=3, **GREEDY)
        )


def test_a_pipeline_and_a_streamer_keep_the_prompt():
    unlearner, tokenizer, streamed = build_unlearner(), make_tokenizer(), []
    run = pipeline("text-generation", model=unlearner, tokenizer=tokenizer, device="cpu")
    ids = tokenizer("the film is", return_tensors="pt").input_ids
    found = run("the film is", return_tensors=True, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = decoded_by_hand(unlearner, ids)
    assert found[0]["generated_token_ids"] == expected[0]

    class Streamer(BaseStreamer):
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            streamed.append("end")

    unlearner.generate(ids, streamer=Streamer(), **GREEDY)
    assert streamed == [*expected[0], "end"]


def test_what_is_no_batch_of_rows_is_refused_by_its_shape():
    unlearner, ids = build_unlearner("llama").eval(), torch.randint(5, 120, (3, 7))
    for run in (unlearner, unlearner.generate):
        for names in ({}, {"adapter_names": ["default"] * 3}):
            with pytest.raises(ValueError, match=r"shape \(0, 7\); expected \(batch, tokens\), with a row or more"):
                run(input_ids=ids[:0], **names)
            with pytest.raises(ValueError, match=r"shape \(7,\); expected \(batch, tokens\)"):
                run(input_ids=ids[0], **names)
            for shape in ((3, 5), (2, 7), (3, 1, 7, 7)):
                with pytest.raises(
                    ValueError, match=r"attention_mask under a soft prompt is \(batch, tokens\), as input_ids"
                ):
                    run(input_ids=ids, attention_mask=torch.ones(shape), **names)
            with pytest.raises(TypeError, match="input_ids is a list; expected a tensor"):
                run(input_ids=ids.tolist(), **names)
    with pytest.raises(TypeError, match="generation_config is a dict; expected a GenerationConfig"):
        unlearner.generate(ids, generation_config={"max_new_tokens": 2})


@pytest.mark.parametrize("name", ["group_counts", "reference_logits", "alpha", "is_rejected"])
def test_arguments_of_the_loss_without_is_forget_are_refused(name):
    unlearner, batch = build_unlearner(), make_batch()
    kept = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(TypeError, match=f"without is_forget, forward takes no {name}"):
        unlearner(**kept, **{name: torch.ones(2)})
