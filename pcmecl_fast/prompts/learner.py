"""Personalized prompts: a learned context V, shifted by a network h of the individual's image features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import Clip
from pcmecl_fast.ops.operator import requested_backend
from pcmecl_fast.prompts.tree import PackedPrompts
from pcmecl_fast.towers.precision import GradientRange
from pcmecl_fast.towers.text import (
    check_pooling,
    encode_padded,
    encode_tree,
    eos_positions,
    text_parameters,
    token_embedding,
    tree_obstacle,
)

logger = logging.getLogger("pcmecl_fast")


class PersonalizedPrompts(nn.Module):
    """Text features of one prompt per individual and emotion, with a learned context.

        prompt[n, e]   = [SOS] [V(e)_1 + h(c[n])] … [V(e)_M + h(c[n])] [tokens of description e + ending] [EOS]
        features[n, e] = unit(text_tower(prompt[n, e]))

    With `condition=None` there is no h, and every individual has the same prompts: CoOp's and CDRL's.

    Only V (`context`) and h (`condition_net`) are parameters of this module, in at least float32 whatever the tower's
    dtype. The clip is used, not owned: its weights are not in `state_dict()` and `.to()` does not move them (move it
    yourself, before or after). Its text tower is frozen here (`requires_grad_(False)`).

    Args:
        clip: the model; its text tower and tokenizer are used.
        descriptions: E different names ("angry") or sentences, tokenized as given.
        n_ctx: M, the number of context tokens, at least 1.
        context: "shared", one V for all descriptions (as CoCoOp), or "per-emotion", V(e) (as CDRL).
        condition: "features", h shifts V by image features; None, it does not.
        ending: what follows each description, tokenized with it: "." ends the sentence as CoOp and CoCoOp do.
        init: None: V starts at N(0, 0.02²). A string of exactly `n_ctx` tokens: V starts at their embeddings.

    Attributes:
        context: V, (M, W) if shared, (E, M, W) if per-emotion; W is the width of the text tower.
        descriptions: the list of strings, without the ending.
        condition, ending: as given.

    Raises:
        ValueError: no description, a blank or repeated one, one that does not fit in the tower's context length along
            with the context, n_ctx < 1, an unknown `context` or `condition`, an `init` with the wrong number of tokens.
        TypeError: descriptions, or an ending, that are not strings.

    Source: CoCoOp (V, h), CDRL (V per emotion, M = 8), the paper's abstract (prompts conditioned on the individual).
    """

    tokens: Tensor

    def __init__(
        self,
        clip: Clip,
        descriptions: Sequence[str],
        *,
        n_ctx: int = 8,
        context: str = "shared",
        condition: str | None = "features",
        ending: str = "",
        init: str | None = None,
    ) -> None:
        super().__init__()
        if context not in ("shared", "per-emotion"):
            raise ValueError(f"context: got {context!r}, takes 'shared' or 'per-emotion'")
        if condition not in ("features", None):
            raise ValueError(f"condition: got {condition!r}, takes 'features' or None")
        if not isinstance(ending, str):
            raise TypeError(f"ending: got {ending!r}, takes a string")
        if n_ctx < 1:
            raise ValueError(
                f"n_ctx: got {n_ctx}, takes 1 or more (prompts without a context have nothing to learn: "
                "use clip.model.encode_text)"
            )
        self.descriptions = _checked_descriptions(descriptions)
        self.condition, self.ending = condition, ending
        check_pooling(clip.model)
        # A tuple keeps the clip out of the module tree: state_dict(), parameters() and .to() do not see it.
        self._clip = (clip,)
        for parameter in text_parameters(clip.model):
            parameter.requires_grad_(False)

        frame = _PromptFrame(clip.tokenizer, [description + ending for description in self.descriptions])
        embedding = token_embedding(clip.model)
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self._start = frame.start
        tokens = frame.with_context(n_ctx)
        self.register_buffer("tokens", tokens.to(device), persistent=False)
        self._packed = self._pack(tokens, n_ctx, context == "shared")

        width = weight.shape[1]
        shape = (n_ctx, width) if context == "shared" else (len(self.descriptions), n_ctx, width)
        values = 0.02 * torch.randn(shape) if init is None else _word_embeddings(frame, embedding, init, n_ctx)
        self.context = nn.Parameter(values.to(device, dtype).expand(shape).clone())
        self.condition_net = None if condition is None else _condition_net(clip.embed_dim, width).to(device, dtype)

    @property
    def clip(self) -> Clip:
        """The model whose text tower is used."""
        return self._clip[0]

    def forward(
        self,
        condition: Tensor | None = None,  # (N, D)
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Unit text features, (N, E, D), in the dtype of `context`.

        Args:
            condition: image features of N individuals (or frames), any float dtype: c[n], usually unit. Prompts
                without a condition give equal rows, as many as there are here, or one if it is None.
            backend: "reference" runs the usual padded batch; all others run the prompt tree, if it is exact for this
                tower. None takes `use_backend`, PCMECL_BACKEND, "auto", in that order.

        Raises:
            ValueError: a condition of the wrong shape, dtype or device.
        """
        self._check(condition)
        context = self._contexts(condition)
        half = next(token_embedding(self.clip.model).parameters()).dtype is torch.float16
        scaled = GradientRange() if half and context.requires_grad else None
        if scaled is not None:
            context = scaled.enter(context)
        backend = requested_backend(backend)
        if backend == "reference" or self._packed is None:
            features = encode_padded(self.clip.model, self.tokens, context, self._start)
        else:
            features = encode_tree(self.clip.model, self._packed, context, backend=backend)
        features = features.to(self.context.dtype)
        unit = F.normalize(features if scaled is None else scaled.leave(features), dim=-1)
        return unit if self.condition_net is not None or condition is None else unit.expand(len(condition), -1, -1)

    def shift(
        self,
        condition: Tensor,  # (N, D)
    ) -> Tensor:
        """h(c): the shift that an individual's condition adds to every context token, (N, W); 0 without a condition."""
        if self.condition_net is None:
            return self.context.new_zeros(len(condition), self.context.shape[-1])
        return self.condition_net(condition.to(self.context.dtype))

    def extra_repr(self) -> str:
        kind = "shared" if self.context.dim() == 2 else "per-emotion"
        size = f"{len(self.descriptions)} descriptions, n_ctx={self.context.shape[-2]}"
        return f"{size}, context={kind!r}, condition={self.condition!r}, ending={self.ending!r}"

    def _contexts(self, condition: Tensor | None) -> Tensor:
        """The context of each row that differs: (N, M, W), or (N, E, M, W) if V is each emotion's own."""
        if self.condition_net is None or condition is None:
            return self.context[None]
        shift = self.shift(condition)[:, None]
        return self.context + (shift if self.context.dim() == 2 else shift[:, None])

    def _pack(self, tokens: Tensor, n_ctx: int, shared: bool) -> PackedPrompts | None:
        """The prompts as trees; None, and a line in the log, if they would not match the padded path."""
        model = self.clip.model
        obstacle = tree_obstacle(model)
        if obstacle is None:
            eos = eos_positions(model, tokens)
            if not (eos >= self._start + n_ctx).all():
                obstacle = "the tower finds no EOS after the descriptions"
            elif not shared and self._start == 0:
                obstacle = "the tokenizer puts no token before the context, so the prompts share none"
            else:
                return PackedPrompts(tokens, eos, start=self._start, n_ctx=n_ctx, shared=shared).to(self.tokens.device)
        logger.info("prompts take the padded path, at full length: %s", obstacle)
        return None

    def _check(self, condition: Tensor | None) -> None:
        size = self.clip.embed_dim
        if condition is None:
            if self.condition is not None:
                raise ValueError(f"condition: got None, takes (N, {size}) (or make the prompts with condition=None)")
            return
        if condition.dim() != 2 or condition.shape[1] != size:
            raise ValueError(f"condition: got shape {tuple(condition.shape)}, takes (N, {size})")
        if not condition.is_floating_point():
            raise ValueError(f"condition: got {condition.dtype}, takes a floating dtype")
        tower = next(token_embedding(self.clip.model).parameters()).device
        if not condition.device == self.context.device == tower:
            raise ValueError(
                f"condition: on {condition.device}, the prompts on {self.context.device}, the clip on {tower}: "
                "takes all three on one device"
            )


def _condition_net(size: int, width: int) -> nn.Sequential:
    """h: (N, size) image features to shifts (N, width).

    It starts at zero, so that the prompts start exactly at V. PyTorch's default, used by CoCoOp, draws the last bias
    with a standard deviation of 0.1, five times V's: it would drown out V and the words given by `init`. The first
    layer's gradient is zero only for the first step.
    """
    hidden = max(1, size // 16)
    last = nn.Linear(hidden, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), last)


def _checked_descriptions(descriptions: Sequence[str]) -> list[str]:
    if isinstance(descriptions, str) or not all(isinstance(d, str) for d in descriptions):
        raise TypeError(f"descriptions: got {descriptions!r}, takes a sequence of strings")
    if not descriptions:
        raise ValueError("descriptions: got none, takes at least one")
    seen: set[str] = set()
    for description in descriptions:
        if not description.strip():
            raise ValueError(f"descriptions: got {description!r}, which is blank")
        if description in seen:
            raise ValueError(f"descriptions: got {description!r} twice, takes different ones")
        seen.add(description)
    return list(descriptions)


def _word_embeddings(frame: _PromptFrame, embedding: nn.Module, words: str, n_ctx: int) -> Tensor:
    ids = frame.words(words)
    if len(ids) != n_ctx:
        raise ValueError(f"init: {words!r} has {len(ids)} tokens, takes exactly n_ctx = {n_ctx}")
    with torch.no_grad():
        return embedding(ids[None].to(next(embedding.parameters()).device))[0]


class _PromptFrame:
    """Where a tokenizer puts a text's own tokens among its special ones, inferred from the empty text.

    CLIP's makes [SOS] text [EOS] pads; SigLIP's text [EOS] pads, with EOS = pad; BERT's [CLS] text [SEP] pads; some
    end with a class token after the pads. So: `start` special tokens, the text, `stop` special tokens, pads, `end`
    special tokens.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor], descriptions: list[str]) -> None:
        self.tokenizer = tokenizer
        self.rows = tokenizer(descriptions)  # (E, L)
        self.empty = empty = tokenizer([""])[0]  # (L,)
        differs = (self.rows != empty).long()
        for description, differing in zip(descriptions, differs, strict=True):
            if not differing.any():
                raise ValueError(f"descriptions: the tokenizer finds no token in {description!r}")
        self.start = int(differs.argmax(1).min())
        first, past = _longest_run(empty[self.start :].tolist())
        self.pad = int(empty[self.start + first])
        self.end = len(empty) - self.start - past
        self.stop = first or 1  # EOS may be the pad itself: then one pad of the run is the EOS
        self.eos_is_pad = first == 0
        self.sizes = [self._size(row) for row in self.rows]
        self.descriptions = descriptions

    def with_context(self, n_ctx: int) -> Tensor:
        """(E, L) ids with placeholders for `n_ctx` tokens before each description."""
        length = self.rows.shape[1]
        for description, size in zip(self.descriptions, self.sizes, strict=True):
            # A row without pads may have been truncated by the tokenizer, and never has room for a context.
            needed = self.start + n_ctx + size + self.stop + self.end
            if needed > length:
                raise ValueError(
                    f"descriptions: {description!r} takes at least {size} tokens, and with n_ctx = {n_ctx} and "
                    f"{self.start + self.stop + self.end} special tokens is longer than the tower's {length}"
                )
        placeholder = self._ordinary_id().expand(len(self.rows), n_ctx)
        before, after = self.rows[:, : self.start], self.rows[:, self.start :]
        text, end = after[:, : length - self.start - n_ctx - self.end], self.rows[:, length - self.end :]
        return torch.cat([before, placeholder, text, end], dim=1)

    def _ordinary_id(self) -> Tensor:
        """The id of an ordinary word, neither EOS nor a pad: towers look for those by id."""
        words = self.rows[~torch.isin(self.rows, self.empty)]
        if not len(words):
            raise ValueError(f"descriptions: the tokenizer makes only special tokens of {self.descriptions}")
        return words[0]

    def words(self, text: str) -> Tensor:
        """The ids of a text's own tokens."""
        row = self.tokenizer([text])[0]
        return row[self.start : self.start + self._size(row)]

    def _size(self, row: Tensor) -> int:
        ids = row[self.start : len(row) - self.end].tolist()
        while ids and ids[-1] == self.pad:
            ids.pop()
        return len(ids) - (0 if self.eos_is_pad else self.stop)


def _longest_run(ids: list[int]) -> tuple[int, int]:
    """Start and stop of the longest run of one id."""
    best, start = (0, 1), 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[start]:
            if i - start > best[1] - best[0]:
                best = (start, i)
            start = i
    return best
