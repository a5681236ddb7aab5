"""A loss with a retain budget, and plain twins of its excess and of the rule by which alpha moves."""

from __future__ import annotations

from helpers import make_answers, make_collator

from spul import UnlearningLoss

BUDGET = UnlearningLoss(alpha=0.7, beta=0.0, retain_budget=0.05)


def batch_of(num=6, dataset=None):
    """Forget and retain rows with responses of one token and of many."""
    dataset = make_answers(3, 3) if dataset is None else dataset
    return make_collator()([dataset[i] for i in range(num)])


def plain_excess(logits_of, base_logits_of, batch):
    """Mean over retain rows of the mean over a row's tokens of log p0 - log p, a row and a token at a time."""
    rows = []
    for ids, mask, labels, is_forget in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["is_forget"], strict=True
    ):
        if not is_forget:
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            p, p0 = (logits(ids).log_softmax(-1) for logits in (logits_of, base_logits_of))
            at = [i for i in range(1, len(ids)) if labels[i] != -100]
            rows.append(sum(float(p0[i - 1, labels[i]] - p[i - 1, labels[i]]) for i in at) / len(at))
    return sum(rows) / len(rows)


def plain_alphas(excesses, alpha, budget, step_size, decay):
    """Alpha after each of a list of steps; None is a step without retain rows."""
    mean, found = None, []
    for excess in excesses:
        if excess is not None:
            mean = excess if mean is None else decay * mean + (1 - decay) * excess
            distance = (mean - budget) / budget
            if distance > 1:
                distance = 1.0
            elif distance < -1:
                distance = -1.0
            alpha = alpha + step_size * distance
            if alpha < 0:
                alpha = 0.0
        found.append(alpha)
    return found
