"""Slow, plain twins: the published algorithm written out row by row, with PEFT's prompt and torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import make_batch
from peft import PeftModelForCausalLM
from transformers import DynamicCache


def row_logits(unlearner, ids, prompted: bool = True, before: int = 0):
    """Logits (n, V) that predict the tokens after a single row's own, no padding, no sharing.

    The prompt is concatenated, after `before` of the row's tokens, or prefixed.
    """
    base = unlearner.get_base_model()
    ids = ids[None]
    if not prompted:
        return base(ids).logits[0]
    config = unlearner.active_peft_config
    encoder = unlearner.prompt_encoder[unlearner.active_adapter]
    out = encoder(torch.arange(config.num_virtual_tokens)[None])
    if config.peft_type == "PREFIX_TUNING":
        heads = config.num_attention_heads
        states = out.view(1, config.num_virtual_tokens, config.num_layers, 2, heads, config.token_dim // heads)
        cache = DynamicCache(config=base.config)
        for layer in range(config.num_layers):
            cache.update(*(states[:, :, layer, i].transpose(1, 2) for i in (0, 1)), layer)
        return base(ids, past_key_values=cache).logits[0]
    embeds = unlearner.word_embeddings(ids)
    logits = base(inputs_embeds=torch.cat([embeds[:, :before], out, embeds[:, before:]], dim=1)).logits[0]
    if before == 0:
        return logits[config.num_virtual_tokens :]
    # The last token before the prompt predicts a virtual token; the last virtual token predicts the row's next one.
    return torch.cat([logits[: before - 1], logits[before + config.num_virtual_tokens - 1 :]])


def labeled_batch(side="right"):
    """Five rows of different lengths, with labels."""
    return {name: column for name, column in make_batch(side).items() if name != "is_forget"}


def peft_forward(unlearner, **kwargs):
    """PEFT's own, which puts the prompt before every row."""
    return PeftModelForCausalLM.forward(unlearner, **kwargs)


def assert_as_peft(unlearner, batch, **tolerance):
    """The next forward gives the logits that concatenation gives now."""
    with torch.no_grad():
        out, expected = unlearner(**batch), peft_forward(unlearner, **batch)
    torch.testing.assert_close(out.logits, expected.logits, **tolerance)


def plain_batch(side="right"):
    """Five rows of different lengths, without labels."""
    batch = make_batch(side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def real_rows(batch):
    """The token ids of each row, without padding."""
    return [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def continued(logits_of, ids, num=6):
    """The next tokens of a row, greedily and one by one, with the end of text (2) ruled out.

    Args:
        logits_of: of a row's token ids (n,), logits (n, V).
        ids: token ids.
        num: of new tokens.
    """
    with torch.no_grad():
        for _ in range(num):
            logits = logits_of(ids)[-1]
            logits[2] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None]])
    return ids[-num:].tolist()


def reduced(tokens, reduction):
    """A row's loss from those of its tokens."""
    mean = sum(tokens) / len(tokens)
    if reduction == "auto":
        return sum(tokens) if len(tokens) <= 3 else mean
    return mean if reduction == "mean" else sum(tokens)


def losses(unlearner, batch, alpha=1.0, beta=0.5, direction="reverse", reduction="auto"):
    """(loss, L_f, L_r, L_kl) of a batch, one row at a time; `reduction` is that of all terms."""
    groups = {"forget": [], "retain": [], "kl": []}
    before = batch.get("prompt_position", torch.zeros(len(batch["input_ids"]), dtype=torch.long)).tolist()
    for ids, mask, labels, is_forget, start in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["is_forget"], before, strict=True
    ):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        logits = row_logits(unlearner, ids, before=start)
        at = [i for i in range(1, len(ids)) if labels[i] != -100]
        nll = [-F.log_softmax(logits[i - 1], -1)[labels[i]] for i in at]
        groups["forget" if is_forget else "retain"].append(reduced(nll, reduction))
        if not is_forget:
            with torch.no_grad():
                frozen = row_logits(unlearner, ids, prompted=False)
            divergences = []
            for i in at:
                p, q = F.log_softmax(logits[i - 1], -1), F.log_softmax(frozen[i - 1], -1)
                divergences.append(
                    F.kl_div(q, p, log_target=True, reduction="sum")
                    if direction == "reverse"
                    else F.kl_div(p, q, log_target=True, reduction="sum")
                )
            groups["kl"].append(reduced(divergences, reduction))
    forget, retain, kl = (sum(g) / len(g) if g else torch.zeros(()) for g in groups.values())
    return forget + alpha * retain + beta * kl, forget, retain, kl


def plain_row(unlearner, name, ids):
    """Logits (n, V) of a row alone, by the plain twin."""
    if name == "__base__":
        return row_logits(unlearner, ids, prompted=False)
    before = unlearner.active_adapter
    unlearner.set_adapter(name)
    try:
        return row_logits(unlearner, ids)
    finally:
        unlearner.set_adapter(before)


def by_hand(unlearner, name, ids):
    """The greedy continuation of a row alone, by the plain twin."""
    return continued(lambda ids: plain_row(unlearner, name, ids), ids)
