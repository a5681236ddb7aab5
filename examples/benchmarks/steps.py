"""One training step, three times: spul's, the published program's algorithm written plainly, and the floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModelForCausalLM
from torch import Tensor

from spul import SoftPromptUnlearner, UnlearningLoss

ALPHA, BETA, LEARNING_RATE = 1.0, 0.5, 1e-4


def spul_step(base: Any, config: PeftConfig, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """spul, as its trainer runs it: reference states from the cache, the LM head applied to them in the step."""
    unlearner = SoftPromptUnlearner(base, config, UnlearningLoss(ALPHA, BETA)).train()
    unlearner.to(batch["input_ids"].device)
    optimizer = torch.optim.AdamW([p for p in unlearner.parameters() if p.requires_grad], lr=LEARNING_RATE)
    rows = (~batch["is_forget"]).nonzero().flatten()
    with torch.no_grad():
        hidden = base.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    from spul.prefix import response_positions

    positions, _ = response_positions(batch["labels"])
    hidden = hidden.take_along_dim(positions[..., None], 1)[rows]
    head = base.get_output_embeddings()

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            ref = head(hidden)
            full = ref.new_zeros(len(batch["input_ids"]), *ref.shape[1:])
            full[rows] = ref
        unlearner(**batch, reference_logits=full).loss.backward()
        optimizer.step()

    return step


def plain_step(base: Any, config: PeftConfig, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """The published program's algorithm: the prompt before every row by PEFT, logits at every position.

    What the frozen model says is kept as float32 logits over the whole vocabulary, by row. The positions compared are
    those of the paper, and the gradients are spul's.
    """
    model: Any = PeftModelForCausalLM(base, config).train()
    model.to(batch["input_ids"].device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    is_response = batch["labels"][:, 1:] != -100
    reference: dict[int, Tensor] = {}
    for row, is_forget in enumerate(batch["is_forget"].tolist()):
        if not is_forget:
            with torch.no_grad():
                inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
                reference[row] = base(**inputs).logits[0, :-1][is_response[row]].float().cpu()

    def step() -> None:
        optimizer.zero_grad()
        p = config.num_virtual_tokens
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        logits = logits[:, p:-1]  # PEFT's logits stand for the virtual tokens too
        nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        nll = nll.view(is_response.shape).sum(dim=1)
        forget, retain = batch["is_forget"], ~batch["is_forget"]
        rows = retain.nonzero().flatten().tolist()
        said = F.log_softmax(torch.cat([logits[row][is_response[row]] for row in rows]), dim=-1)
        frozen = F.log_softmax(torch.cat([reference[row] for row in rows]).to(said.device), dim=-1)
        kl = F.kl_div(frozen, said, log_target=True, reduction="sum") / len(rows)
        (nll[forget].mean() + ALPHA * nll[retain].mean() + BETA * kl).backward()
        optimizer.step()

    return step


def floor_step(base: Any, config: PeftConfig, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """What nothing can undercut: the batch without a prompt, forward and backward through the frozen base.

    The gradient goes to the input embeddings; logits are computed at the response positions only.
    """
    base.requires_grad_(False).train()
    is_response = batch["labels"][:, 1:] != -100
    positions = is_response.long().argsort(dim=1, descending=True, stable=True)[:, : int(is_response.sum(1).max())]
    targets = batch["labels"][:, 1:].gather(1, positions)
    embeds = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def step() -> None:
        embeds.grad = None
        out = base(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            logits_to_keep=positions,
            use_cache=False,
        )
        F.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100).backward()

    return step


STEPS = {"spul": spul_step, "plain": plain_step, "floor": floor_step}
