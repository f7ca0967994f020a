"""Other libraries' kernels on the part of our work they can do, on equal inputs; if a peer wins, the table shows it.

The contrastive losses get what they need, the difference features, and contrast each change of an individual's face
with each change of all texts: the loss of `ops.correlation_loss` with negatives="all". Every side computes the
difference features itself, since the gradient must reach the features.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rehearsal
from bench.cases import CASES, PEERS_SCALE, SHARED, SOURCES, D, E, differentiated
from bench.compare import Candidates, Comparison, Missing, Side, backend_sides, comparison, those_that_run
from pcmecl_fast.ops import PromptTree, reference

Loss = Callable[[Tensor, Tensor], Tensor]
"""Contrastive loss of unit rows (n, D) against unit rows (n, D)."""


@comparison(
    "peers_contrastive",
    "every change of the face against every change of the text, 64 (CPU) or 512 (GPU) individuals, with backward",
    sources=SOURCES,
)
def peers_contrastive(device: torch.device, dtype: torch.dtype) -> Comparison:
    case = CASES["correlation_loss_peers"].on(device, dtype)
    before, after = reference.ordered_pairs(E, device)

    def differences(x: Tensor) -> Tensor:
        return F.normalize(x[:, after] - x[:, before], dim=-1).flatten(0, 1)

    def plain(loss: Loss) -> Callable[[], list[Tensor]]:
        return lambda: differentiated(
            lambda visual, text: loss(differences(visual), differences(text)), case.inputs, None
        )

    candidates: Candidates = {
        "F.cross_entropy, both ways": lambda: plain(_cross_entropy),
        "open_clip ClipLoss": lambda: plain(_open_clip()),
        "torch.compile of the reference": lambda: partial(case.compiled().run, "reference"),
        "inf-cl": lambda: plain(_inf_cl(device)),
        "memeff": lambda: plain(_memeff(device)),
        "liger-kernel": lambda: plain(_liger(device)),
        **backend_sides(case.run, device, case.operator),
    }
    sides, skipped = those_that_run(candidates)
    individuals = len(case.inputs[0])
    # S = V Tᵀ once forward and twice backward; features and gradients once.
    return Comparison(
        [*sides, Side("pcmecl_fast", partial(case.run, "auto"))],
        operations=3 * 2 * (individuals * E) ** 2 * D,
        moved=4 * individuals * E * D * dtype.itemsize,
        skipped=skipped,
    )


@comparison(
    "tree_attention",
    "attention of 64 prompt trees of 30 tokens, 8 heads of 64, with backward",
    sources=SOURCES,
    targets={"cpu": {"SDPA with the mask": 1.0}, "cuda": {"SDPA with the mask": 1.5}},
)
def tree_attention(device: torch.device, dtype: torch.dtype) -> Comparison:
    case = CASES["tree_attention"].on(device, dtype)

    def side(attend: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: differentiated(attend, case.inputs, case.weight)

    candidates: Candidates = {
        "SDPA with the mask": lambda: side(lambda x: _sdpa(x, SHARED.mask(device))),
        "FlexAttention": lambda: side(_flex(SHARED, device)),
        "xformers": lambda: side(_xformers(SHARED, device, dtype)),
        **backend_sides(case.run, device, case.operator),
    }
    if rehearsal.as_on_gpu(device):
        candidates["backend=reference"] = lambda: partial(case.run, "reference")
    sides, skipped = those_that_run(candidates)
    ours = Side("pcmecl_fast", partial(case.run, "auto"))
    return Comparison([*sides, ours], operations=case.operations, moved=case.moved, skipped=skipped)


def _cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    logits, own = PEERS_SCALE * (a @ b.T).float(), torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _open_clip() -> Loss:
    loss = importlib.import_module("open_clip.loss").ClipLoss()
    return lambda a, b: loss(a, b, PEERS_SCALE)


def _inf_cl(device: torch.device) -> Loss:
    peer = _import("inf_cl", device)
    return lambda a, b: (
        (peer.cal_flash_loss(a, b, scale=PEERS_SCALE) + peer.cal_flash_loss(b, a, scale=PEERS_SCALE)).mean() / 2
    )


def _memeff(device: torch.device) -> Loss:
    peer = _import("memeff", device)
    return peer.MemoryEfficientCLIPLoss(temperature=1 / PEERS_SCALE, normalized_inputs=True, stable=False)


def _liger(device: torch.device) -> Loss:
    """It has no contrastive loss; its fused linear cross entropy does one direction of one."""
    _import("liger_kernel", device)
    fused = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        own = torch.arange(len(a), device=a.device)
        return (fused(b, PEERS_SCALE * a, own) + fused(a, PEERS_SCALE * b, own)) / 2

    return loss


def _sdpa(qkv: Tensor, mask: Tensor) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _flex(tree: PromptTree, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type == "cpu":
        raise Missing("needs a GPU: on a CPU it has no backward")
    allowed = tree.mask(device)
    mask = create_block_mask(lambda b, h, q, k: allowed[q, k], None, None, tree.length, tree.length, device=str(device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return compiled(query, key, value, block_mask=mask).transpose(1, 2)

    return attend


def _xformers(tree: PromptTree, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    peer = _import("xformers", device)
    operators = importlib.import_module(f"{peer.__name__}.ops")
    # Its kernels need the mask's rows aligned to eight elements.
    length = 8 * math.ceil(tree.length / 8)
    bias = torch.zeros(1, 8, length, length, device=device, dtype=dtype)
    bias.masked_fill_(~F.pad(tree.mask(device), (0, length - tree.length) * 2, value=True), -torch.inf)
    bias = bias[..., : tree.length, : tree.length]

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unbind(2)
        expanded = bias.expand(len(qkv), -1, -1, -1)
        return operators.memory_efficient_attention(query, key, value, attn_bias=expanded)

    return attend


def _import(name: str, device: torch.device) -> Any:
    if device.type != "cuda":
        raise Missing("needs a CUDA GPU")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})") from error
