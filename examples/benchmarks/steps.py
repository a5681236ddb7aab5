"""One training step: of spul, of the published algorithm written plainly, and the lower bound (the floor)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Shape, make_collator, make_rows
from peft import PeftConfig, PeftModelForCausalLM, PrefixTuningConfig
from torch import Tensor

from spul import ReferenceCache, SoftPromptUnlearner, UnlearningLoss
from spul.losses import CrossEntropy, KLDivergence
from spul.prompts.row_prompts import RowPrompts

ALPHA, BETA, LEARNING_RATE = 1.0, 0.5, 1e-4


def on_device(batch: dict[str, Tensor], base: Any) -> dict[str, Tensor]:
    return {name: tensor.to(base.device) for name, tensor in batch.items()}


class OneWay(SoftPromptUnlearner):
    """An unlearner whose prompt and rows pass the base in one way, which spul else chooses by device and shape."""

    way: Callable[..., Tensor]  # of `RowPrompts`, which it takes first
    takes_ids = False  # or the rows' embeddings

    def response_logits(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self.enabled:
            return super().response_logits(input_ids, attention_mask, positions, *args, **kwargs)
        rows = input_ids if self.takes_ids else self.word_embeddings(input_ids)
        return type(self).way(RowPrompts(self, len(input_ids)), rows, attention_mask, positions)


class TwoPasses(OneWay):
    """The prompt has a pass of its own, as on a CPU."""

    way, takes_ids = RowPrompts.shared_logits, True


class OnePass(OneWay):
    """The prompt is a row of the batch, as on a GPU."""

    way = RowPrompts.joint_logits


class Concatenating(OneWay):
    """The prompt stands in front of every row, as on a base that shares none."""

    way = RowPrompts.concatenated_logits


def spul_step(
    base: Any,
    config: PeftConfig,
    shape: Shape,
    reference: str = "cached",
    prompt_position: str = "start",
    kind: type[SoftPromptUnlearner] = SoftPromptUnlearner,
) -> Callable[[], Any]:
    """The step of `UnlearningTrainer`: reference states from the cache, the LM head applied in the step."""
    answers = CrossEntropy(reduction="sum")
    summed = {"forget": answers, "retain": answers, "kl": KLDivergence(reduction="sum")}  # as published
    loss, vocab_size = UnlearningLoss(ALPHA, BETA, **summed), base.config.vocab_size
    unlearner = kind(base, config, loss, prompt_position=prompt_position).train()
    rows, collator = make_rows(shape, vocab_size), make_collator(shape, vocab_size, prompt_position)
    batch = on_device(collator(rows), base)
    optimizer = torch.optim.AdamW([p for p in unlearner.parameters() if p.requires_grad], lr=LEARNING_RATE)
    folder = tempfile.TemporaryDirectory()
    cache = ReferenceCache.build(unlearner, rows, collator, folder.name, batch_size=8, progress=False)

    def step() -> float:
        optimizer.zero_grad()
        loss = unlearner(**batch, reference_logits=cache.logits(batch) if reference == "cached" else None).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step.folder = folder  # type: ignore[attr-defined]  # lives as long as the step
    return step


def live_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """The same with `reference="live"`: a pass of the base is part of every step."""
    return spul_step(base, config, shape, reference="live")


def message_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """The same with the prompt inside every row, `prompt_position="message"`: no keys and values are shared."""
    return spul_step(base, config, shape, prompt_position="message")


def two_passes_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """The same with a pass of its own for the prompt, on any device."""
    return spul_step(base, config, shape, kind=TwoPasses)


def one_pass_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """The same with the prompt as a row of the batch, on any device."""
    return spul_step(base, config, shape, kind=OnePass)


def concatenated_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """The same with the prompt in front of every row: the fallback of a base that shares no prompt."""
    return spul_step(base, config, shape, kind=Concatenating)


def plain_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """The algorithm of the published program: PEFT puts the prompt before every row; logits at every position.

    Reference logits are cached in float32 over the whole vocabulary and found by row. The compared positions are those
    of the paper, so that loss and gradients equal spul's.
    """
    model: Any = PeftModelForCausalLM(base, config).train()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    vocab_size = base.config.vocab_size
    batch = on_device(make_collator(shape, vocab_size)(make_rows(shape, vocab_size)), base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    is_response = batch["labels"][:, 1:] != -100
    retain_rows = (~batch["is_forget"]).nonzero().flatten().tolist()
    is_prefix = isinstance(config, PrefixTuningConfig)  # keys and values, in a cache that PEFT makes
    num_embedded = 0 if is_prefix else config.num_virtual_tokens
    options: dict[str, Any] = {} if is_prefix else {"use_cache": False}
    reference: dict[int, Tensor] = {}
    for row in retain_rows:
        with torch.no_grad():
            inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            reference[row] = base(**inputs).logits[0, :-1][is_response[row]].float().cpu()

    def step() -> float:
        optimizer.zero_grad()
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        logits = out.logits[:, num_embedded:-1].float()  # PEFT's stand for the virtual tokens too
        nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        nll = nll.view(is_response.shape).sum(dim=1)
        log_p = F.log_softmax(torch.cat([logits[row][is_response[row]] for row in retain_rows]), dim=-1)
        log_ref = F.log_softmax(torch.cat([reference[row] for row in retain_rows]).to(log_p.device), dim=-1)
        kl = F.kl_div(log_ref, log_p, log_target=True, reduction="sum") / len(retain_rows)
        is_forget = batch["is_forget"]
        loss = nll[is_forget].mean() + ALPHA * nll[~is_forget].mean() + BETA * kl
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def floor_step(base: Any, config: PeftConfig, shape: Shape) -> Callable[[], Any]:
    """A lower bound: the batch without a prompt, forward and backward through the frozen base.

    The gradient goes to the input embeddings; logits are computed at the response positions only.
    """
    base.requires_grad_(False).train()
    vocab_size = base.config.vocab_size
    batch = on_device(make_collator(shape, vocab_size)(make_rows(shape, vocab_size)), base)
    is_response = batch["labels"][:, 1:] != -100
    positions = is_response.long().argsort(dim=1, descending=True, stable=True)[:, : int(is_response.sum(1).max())]
    targets = batch["labels"][:, 1:].gather(1, positions)
    embeds = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def step() -> Tensor:
        embeds.grad = None
        inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "use_cache": False}
        logits = base(**inputs, logits_to_keep=positions).logits.float()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        assert embeds.grad is not None
        return embeds.grad

    return step


STEPS = {
    "spul": spul_step,
    "plain": plain_step,
    "floor": floor_step,
    "spul, live reference": live_step,
    "spul, at the message": message_step,
    "spul, one pass": one_pass_step,
    "spul, two passes": two_passes_step,
    "spul, concatenated": concatenated_step,
}
