"""Attention of a layer to a shared prompt and to the rows' own tokens: keys copied in front of each row's, or merged.

python examples/benchmarks/merged_attention.py --shapes sst2 yelp long --num-virtual-tokens 30 100

`copied` is what spul does: keys and values of the prompt in front of those of each row, and one call of torch's
attention. `merged` copies nothing: attention to the prompt, one matrix product for all rows, and attention to the
rows' own tokens are weighted by their log-sum-exp. `own tokens` has no prompt: the floor. Forward and backward, a
causal mask with padding, the heads and width of OPT-125M; the calls run in turn, ratios are medians within rounds.
"""

from __future__ import annotations

import statistics
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, WIDTH = 12, 64
# Torch's attention on a CPU that also returns the log-sum-exp, and its backward.
_attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def copied(query: Tensor, key: Tensor, value: Tensor, prompt: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attention (B, heads, n, width) of rows to a prompt and to themselves, over keys that stand in one block.

    Args:
        query: (B, heads, n, width).
        key: (B, heads, n, width).
        value: (B, heads, n, width).
        prompt: keys and values of the prompt, (1, heads, p, width) each.
        mask: (B, 1, n, n), which of a row's own tokens each token sees.
    """
    rows, num = len(query), prompt[0].shape[2]
    keys, values = (
        torch.cat([p.expand(rows, -1, -1, -1), own], 2) for p, own in zip(prompt, (key, value), strict=True)
    )
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=F.pad(mask, (num, 0), value=True))


def merged(query: Tensor, key: Tensor, value: Tensor, prompt: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """The same, without a copy of the prompt for each row; arguments as in `copied`. On a CPU only."""
    additive = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return _Merged.apply(query, key, value, *prompt, additive)


class _Merged(torch.autograd.Function):
    """Attention over two blocks of keys: each block's gradient is that of its kernel, given output and log-sum-exp of
    both (as in ring attention, arXiv 2310.01889)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Any:
        own, own_sum = _attention(query, key, value, 0.0, False, attn_mask=mask)
        scores = _folded(query) @ keys[0].transpose(1, 2) * query.shape[-1] ** -0.5  # (heads, B * n, p)
        prompt_sum = scores.logsumexp(-1)
        total = torch.logaddexp(_folded(own_sum[..., None])[..., 0], prompt_sum)
        weights = (scores - total[..., None]).exp_()
        share = (own_sum - _unfolded(total[..., None], query)[..., 0]).exp()
        out = own * share[..., None] + _unfolded(weights @ values[0], query)
        ctx.save_for_backward(query, key, value, keys, values, mask, out, weights, total)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, keys, values, mask, out, weights, total = ctx.saved_tensors
        gradient = gradients[0]
        total = _unfolded(total[..., None], query)[..., 0].contiguous()
        d_query, d_key, d_value = _backward(gradient, query, key, value, out, total, 0.0, False, attn_mask=mask)
        folded, flat = _folded(gradient), _folded(query)
        inner = (folded * _folded(out)).sum(-1, keepdim=True)
        d_scores = weights * (folded @ values[0].transpose(1, 2) - inner) * query.shape[-1] ** -0.5
        d_query = d_query + _unfolded(d_scores @ keys[0], query)
        return d_query, d_key, d_value, (d_scores.mT @ flat)[None], (weights.mT @ folded)[None], None


def _folded(rows: Tensor) -> Tensor:
    """(heads, B * n, width) of (B, heads, n, width): one matrix product for all rows."""
    return rows.transpose(0, 1).flatten(1, 2)


def _unfolded(flat: Tensor, like: Tensor) -> Tensor:
    return flat.unflatten(1, (len(like), like.shape[2])).transpose(0, 1)


def inputs(shape: common.Shape, num_virtual: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random queries, keys and values of a batch and a prompt, and the causal mask of rows padded on the right."""
    draw = torch.Generator().manual_seed(0)

    def random(rows: int, num: int) -> Tensor:
        states = torch.randn(rows, num, HEADS, WIDTH, generator=draw, dtype=dtype)  # as projections leave them
        return states.requires_grad_().transpose(1, 2)

    rows, longest = shape.batch_size, shape.max_tokens
    lengths = torch.tensor([len(row["input_ids"]) for row in common.make_rows(shape, 100)])
    mask = torch.ones(longest, longest, dtype=torch.bool).tril() & (torch.arange(longest) < lengths[:, None, None])
    query, key, value = (random(rows, longest) for _ in range(3))
    prompt = random(1, num_virtual), random(1, num_virtual)
    return {"query": query, "key": key, "value": value, "prompt": prompt, "mask": mask[:, None]}


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=common.SHAPES, default=["sst2", "yelp", "long"])
    parser.add_argument("--num-virtual-tokens", nargs="+", type=int, default=[30, 100])
    common.add_clock(parser)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("--device: the merged attention is written for torch's kernel on a CPU.")

    records: list[dict[str, Any]] = []
    for name in args.shapes:
        for num_virtual in args.num_virtual_tokens:
            given = inputs(common.SHAPES[name], num_virtual, common.dtype_of(args))
            own = {key: given[key] for key in ("query", "key", "value")}
            calls = {
                "own tokens": lambda own=own, given=given: _run(
                    F.scaled_dot_product_attention(**own, attn_mask=given["mask"])
                ),
                "copied": lambda given=given: _run(copied(**given)),
                "merged": lambda given=given: _run(merged(**given)),
            }
            seconds = common.alternate(calls, args.rounds, args.device, clock=common.clock_of(args))
            record = {"shape": name, "p": num_virtual, "all_seconds": seconds}
            record |= {call: statistics.median(found) for call, found in seconds.items()}
            record["merged / copied"] = common.ratio(seconds["merged"], seconds["copied"])
            records.append(record)
    where = {key: value for key, value in common.surroundings(args).items() if key != "model"}
    where["cpu_seconds"] = args.cpu_seconds
    columns = ["shape", "p", "own tokens", "copied", "merged", "merged / copied"]
    lines = [[str(r[key]) if key == "p" else r[key] for key in columns] for r in records]
    common.report("Attention of one layer, forward and backward, seconds", where, columns, lines)
    common.write_json(args.json, {"where": where, "records": records})


def _run(out: Tensor) -> None:
    out.sum().backward()


if __name__ == "__main__":
    main()
