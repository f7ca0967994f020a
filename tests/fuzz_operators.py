"""Random calls of the operators against the float64 twin: `python tests/fuzz_operators.py --calls 10000 --seed 0`.

A call is drawn from its number and the seed alone, so that `--only 1234` repeats one. The suite runs the first few
hundred (`test_fuzz.py`). Features have norms from 1e-20 to 1e4 and ratios of up to 1e6 between them, logit scales go
up to 1e6. Texts are drawn apart from each other, or exactly alike: in between, where a difference is nothing but
rounding, no two computations agree. What rounding makes of a result is known: a cosine's error grows as 1 / |δ|, a
logit's with the scale, a gradient's with one over the length of what it belongs to.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cuda_on_host
import float64_twin as twin
import numpy as np
import torch
from tolerances import TOLERANCES
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast import ops
from pcmecl_fast.ops.backends import cuda
from pcmecl_fast.ops.operator import BACKENDS, Backend

Random = np.random.Generator

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
APART = 0.3  # how far two features lie from each other that are not the same


@dataclass
class Call:
    """One call of an operator, and the twin's."""

    operator: str
    backend: str | None
    floats: dict[str, Tensor | float]
    """The differentiable arguments, in the operator's order; a logit scale may be a number."""
    rest: dict[str, Any]
    twin: Callable[..., twin.Result]
    """Takes `floats` in float64."""
    deterministic: bool = False
    drawn: dict[str, str] = field(default_factory=dict)
    """What is special about it, for whoever reads of its failure."""
    unrounded: float | twin.Array = 1.0
    """How many times the tolerance rounding takes, of all or of each row of the features."""
    lengths: dict[str, twin.Array] = field(default_factory=dict)
    """Of each row of an argument; its gradient's size is one over it."""

    def __str__(self) -> str:
        shown = {**self.floats, **self.rest, **self.drawn, "deterministic": self.deterministic, "backend": self.backend}
        return f"{self.operator}({', '.join(f'{name}={_shown(value)}' for name, value in shown.items())})"

    def run(self) -> Tensor:
        return getattr(ops, self.operator)(**self.floats, **self.rest, backend=self.backend)

    def expected(self) -> twin.Result:
        return self.twin(*(_exact(value) for value in self.floats.values()))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.floats.values())).dtype


def check_call(call: Call, random: Random) -> str:
    """Run a call and compare it with the twin: "compared", or "refused" where its backend says that it cannot run it.

    Raises:
        AssertionError: what differs.
    """
    torch.use_deterministic_algorithms(call.deterministic)
    try:
        actual = call.run()
    except RuntimeError as error:
        if call.backend in BACKENDS and f"backend {call.backend!r} cannot run {call.operator}: " in str(error):
            return "refused"
        raise
    finally:
        torch.use_deterministic_algorithms(False)
    expected = call.expected()
    loss = call.operator.endswith("loss")
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    dtype = wide if loss else call.dtype
    assert actual.dtype == dtype, f"the result is {actual.dtype}, not {dtype}"
    _compare("the result", actual, expected.value, dtype, amplified=np.max(call.unrounded, initial=1.0))

    leaves = {name: x for name, x in call.floats.items() if isinstance(x, Tensor) and x.requires_grad}
    assert actual.requires_grad == bool(leaves), f"requires_grad is {actual.requires_grad} for {list(leaves)}"
    if leaves:
        upstream = torch.from_numpy(np.asarray(random.normal(size=actual.shape))).to(dtype)
        actual.backward(upstream)
        pulled = upstream.double().numpy()
        gradients = expected.gradients(pulled)
        for (name, x), gradient in zip(call.floats.items(), gradients, strict=True):
            if name in leaves:
                assert x.grad is not None, f"{name} has no gradient"
                assert x.grad.dtype == x.dtype, f"the gradient of {name} is {x.grad.dtype}"
                # That of a float64 scale beside half features is computed as they are.
                lengths = call.lengths.get(name, np.ones(())) / np.abs(pulled).max(initial=1.0)
                of_rows = name in ("source", "edited")
                amplified = call.unrounded if of_rows else np.max(call.unrounded, initial=1.0)
                what = f"the gradient of {name}"
                _compare(what, x.grad, gradient, _coarser(x.dtype, wide), amplified=amplified, lengths=lengths)
    return "compared"


def draw_call(number: int, seed: int) -> tuple[Call, Random]:
    """The call of this number, and the randomness for the rest of its check."""
    random = np.random.default_rng([seed, number])
    draw = (_direction_logits, _direction_loss, _correlation_loss, _tree_attention, _clip_frames)[number % 5]
    call = draw(random, _pick(random, list(TOLERANCES)))
    call.backend = _pick(random, [None, "auto", "reference", *_backends()])
    call.deterministic = bool(random.random() < 0.1)
    for name, value in call.floats.items():
        if isinstance(value, Tensor):
            call.floats[name] = _strided(random, value).requires_grad_(random.random() < 0.75)
    return call, random


@contextmanager
def cuda_as_on_host() -> Iterator[None]:
    """The backend "cuda" is the host harness of its kernels, where there is a compiler."""
    before = BACKENDS["cuda"]
    if cuda_on_host.compiler():
        BACKENDS["cuda"] = Backend("cuda", missing=lambda: None)
        cuda.add_kernels(BACKENDS["cuda"], cuda_on_host.load(), device="cpu")
    try:
        yield
    finally:
        BACKENDS["cuda"] = before


def fuzz(numbers: range, seed: int, *, progress: bool = False) -> tuple[Counter[str], list[str]]:
    """Check these calls: how many there were of each kind, and a line for each that failed."""
    counts: Counter[str] = Counter()
    failures = []
    with cuda_as_on_host():
        for number in tqdm(numbers, disable=not progress, unit="call"):
            call, random = draw_call(number, seed)
            try:
                outcome = check_call(call, random)
                counts[f"{call.operator} on {call.backend or 'the default'}: {outcome}"] += 1
            except Exception as error:  # whatever it is, the call is the finding
                counts["failed"] += 1
                again = f"python tests/fuzz_operators.py --seed {seed} --only {number}"
                failures.append(f"{call}\n    {type(error).__name__}: {error}\n    {again}")
                tqdm.write(failures[-1], file=sys.stderr)
    return counts, failures


def _direction_logits(random: Random, dtype: torch.dtype) -> Call:
    floats, indices, special = _direction(random, dtype)
    del indices["target_emotion"]

    def exact(source: twin.Array, edited: twin.Array, bank: twin.Array) -> twin.Result:
        rows = [index.tolist() for index in indices.values()]
        return twin.direction_logits(source, edited, bank, *rows, **special)

    return Call("direction_logits", None, floats, indices | special, exact, **_rounding(floats, special))


def _direction_loss(random: Random, dtype: torch.dtype) -> Call:
    floats, indices, options = _direction(random, dtype)
    options["contrast"] = _pick(random, [0.0, 0.5, float(random.uniform(0, 3))])
    options["reduction"] = _pick(random, ["mean", "sum", "none"])

    def exact(source: twin.Array, edited: twin.Array, bank: twin.Array, scale: twin.Array) -> twin.Result:
        rows = [index.tolist() for index in indices.values()]
        return twin.direction_loss(source, edited, bank, *rows, scale=float(scale), **options)

    rounding = _rounding(floats, options)
    floats["scale"] = _scale(random)
    rounding["unrounded"] = rounding["unrounded"] * _steepness(floats["scale"], options["contrast"])
    return Call("direction_loss", None, floats, indices | options, exact, **rounding)


def _direction(random: Random, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    batch, people, width = _size(random, 6), _size(random, 4), _width(random)
    emotions = 33 if random.random() < 0.02 else _size(random, 9)
    if not (people and emotions):
        batch = 0
    normalize = bool(random.random() < 0.7)
    options = {"normalize": normalize, "min_change": _pick(random, [0.0, 0.0, 0.01, 0.1, float(random.uniform(0, 2))])}
    source, edited = np.zeros((2, batch, width))
    for i in range(batch):
        while True:
            source[i], edited[i] = _edit(random, width, dtype, unit=normalize)
            if _is_clear(source[i], edited[i], options, dtype):
                break
    bank = np.array([_apart(random, emotions, width) for _ in range(people)]).reshape(people, emotions, width)
    drawn = {"source": source, "edited": edited, "bank": bank}
    floats = {name: torch.from_numpy(x).to(dtype) for name, x in drawn.items()}
    for n in range(people):
        _repeat(random, floats["bank"][n])
    tops = {"individual": people, "source_emotion": emotions, "target_emotion": emotions}
    return floats, {name: _index(random, top, batch) for name, top in tops.items()}, options


def _edit(random: Random, width: int, dtype: torch.dtype, *, unit: bool) -> twin.Array:  # (2, width)
    """The features of a frame and its edit, rounded to the dtype."""
    pair = _apart(random, 2, width, unit=unit)
    if random.random() < 0.3:
        pair[1] = pair[0] + 10 ** random.uniform(-3, 0) * (pair[1] - pair[0])
    if random.random() < 0.15:
        pair[1] = pair[0]
    if unit:
        norms = 10 ** random.uniform(-20, 4) * 10 ** np.array([0.0, _pick(random, [0.0, 0.0, random.uniform(-6, 6)])])
        # Halves hold neither small nor large numbers: there the twin is given what is left of them.
        pair *= norms[:, None].clip(max=2e4 if dtype == torch.float16 else 1e10)
    if random.random() < 0.05:
        pair[0] = 0
    return torch.from_numpy(pair).to(dtype).double().numpy()


def _is_clear(source: twin.Array, edited: twin.Array, options: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether no length is so near the one that decides on it that rounding would."""
    norms = [float(np.linalg.norm(x)) for x in (source, edited)]
    length, least = _change(source, edited, options["normalize"]), options["min_change"]
    limits = [(norm, 1e-8) for norm in norms if options["normalize"]]
    limits += [(length, 1e-8), (length, least)]
    # In float32 a change of unit vectors counts from 1e-6 on, and below it is made of rounding.
    nothing = options["normalize"] and dtype != torch.float64 and 0 < length < 1e-4 and not least
    return not nothing and all(not limit or not 0.8 < norm / limit < 1.25 for norm, limit in limits)


def _change(source: twin.Array, edited: twin.Array, normalize: bool) -> float:
    """|δ|."""
    if normalize:
        source, edited = (twin._Unit(x).value for x in (source, edited))
    return float(np.linalg.norm(edited - source))


def _rounding(floats: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """`unrounded` and `lengths` of a call: δ is right to a rounding of a feature's elements."""
    source, edited = (floats[name].double().numpy() for name in ("source", "edited"))
    norms = [np.linalg.norm(x, axis=1) for x in (source, edited)]
    changes = np.array([_change(*pair, options["normalize"]) for pair in zip(source, edited, strict=True)])
    longest = np.ones(len(source)) if options["normalize"] else np.maximum(*norms)
    divisor = np.maximum(changes, options["min_change"])
    unrounded = np.where(divisor > 1e-8, np.maximum(1, APART * longest / divisor.clip(min=1e-8)), 1)
    inside = divisor.clip(min=1e-8)
    lengths = [np.where(norm > 1e-8, norm, 1) * inside if options["normalize"] else inside for norm in norms]
    lengths.append(np.full(len(floats["bank"]), APART))
    return {"unrounded": unrounded, "lengths": dict(zip(("source", "edited", "bank"), lengths, strict=True))}


def _steepness(scale: Tensor | float, contrast: float) -> float:
    """How many times the tolerance, which has room for a scale of 100, the rounding of a cosine is in a logit."""
    return max(1.0, float(scale) * max(contrast, 1.0) / 100) if contrast else 1.0


def _correlation_loss(random: Random, dtype: torch.dtype) -> Call:
    people, width = _size(random, 5), _width(random)
    emotions = _size(random, 8 if people < 3 else 5)
    floats: dict[str, Tensor | float] = {}
    lengths = {}
    for name in ("visual", "text"):
        rows = [_apart(random, emotions, width) for _ in range(people)]
        features = np.array(rows).reshape(people, emotions, width)
        if random.random() < 0.2:
            features += random.normal(size=(people, 1, width))
        wide = dtype in (torch.float32, torch.float64)
        powers = random.uniform(-6, 4, people) if wide else random.uniform(-1, 1, people)
        lengths[name] = 10 ** (powers * (random.random(people) < 0.3))
        features = torch.from_numpy(features * lengths[name][:, None, None]).to(dtype)
        for n in range(people):
            _repeat(random, features[n])
            if n and random.random() < 0.1:
                features[n], lengths[name][n] = features[n - 1], lengths[name][n - 1]
        floats[name] = features
    mask, special = None, {}
    if random.random() < 0.6:
        mask = torch.from_numpy(random.random((people, emotions)) > _pick(random, [0.0, 0.3, 0.7, 1.0]))
        special["missing features"] = _pick(random, ["as others", "nan", "inf", "1e30"])
        if special["missing features"] != "as others":
            for features in floats.values():
                features[~mask] = float(special["missing features"])
    negatives = _pick(random, ["all", "within", "distinct"])

    def exact(visual: twin.Array, text: twin.Array, scale: twin.Array) -> twin.Result:
        present = None if mask is None else mask.numpy()
        return twin.correlation_loss(visual, text, scale=float(scale), mask=present, negatives=negatives)

    floats["scale"] = _scale(random)
    rest = {"mask": None if mask is None else _strided(random, mask), "negatives": negatives}
    lengths = {name: APART * length for name, length in lengths.items()}
    steepness = _steepness(floats["scale"], 1.0)
    return Call("correlation_loss", None, floats, rest, exact, drawn=special, unrounded=steepness, lengths=lengths)


def _tree_attention(random: Random, dtype: torch.dtype) -> Call:
    layout = ops.PromptTree(int(random.integers(1, 8)), tuple(random.integers(1, 6, random.integers(1, 6)).tolist()))
    people, heads, width = _size(random, 3), _size(random, 3), max(1, _width(random))
    # A kernel may keep its output in the dtype for its backward, as FlashAttention does: large halves lose by that.
    size = _pick(random, [0.3, 1.0, 3.0] if dtype in (torch.float32, torch.float64) else [0.3, 1.0])
    qkv = torch.from_numpy(size * random.normal(size=(people, layout.length, 3, heads, width))).to(dtype)

    def exact(values: twin.Array) -> twin.Result:
        return twin.tree_attention(values, prefix=layout.prefix, segment_lengths=layout.segment_lengths)

    return Call("tree_attention", None, {"qkv": qkv}, {"layout": layout}, exact)


def _clip_frames(random: Random, dtype: torch.dtype) -> Call:
    batch, height, width = _size(random, 3), *(int(n) for n in random.integers(1, 41, 2))
    frames = torch.from_numpy(random.uniform(-1, 1, (batch, 3, height, width))).to(dtype)
    options = {
        "size": int(random.integers(1, 31)),
        "mean": tuple(random.uniform(0, 1, 3).tolist()),
        "std": tuple(random.uniform(0.2, 1, 3).tolist()),
        "interpolation": ("bicubic", "bilinear")[int(random.integers(2))],
    }
    return Call("clip_frames", None, {"frames": frames}, options, lambda values: twin.clip_frames(values, **options))


def _apart(random: Random, count: int, width: int, *, unit: bool = False) -> twin.Array:  # (count, width)
    """Vectors that lie apart from each other, most of length 1; `unit`: all of it."""
    if not width:
        return np.zeros((count, 0))
    if width == 1:
        steps = np.arange(1, count + 1) * APART * random.choice([-1, 1], count)
        return (np.sign(steps) if unit else random.permutation(steps))[:, None]
    while True:
        vectors = random.normal(size=(count, width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        if width < 5 and not unit:
            vectors *= random.uniform(0.2, 4, (count, 1))  # few directions lie apart in few dimensions
        distances = np.linalg.norm(vectors[:, None] - vectors, axis=-1) + 9 * np.eye(count)
        if distances.min(initial=9) > APART:
            return vectors


def _repeat(random: Random, features: Tensor) -> None:
    """Now and then one emotion has the features of another."""
    if len(features) > 1 and random.random() < 0.15:
        one, other = random.choice(len(features), 2, replace=False)
        features[one] = features[other]


def _index(random: Random, top: int, count: int) -> Tensor:
    dtype = _pick(random, INTEGERS)
    if top and random.random() < 0.1:
        return torch.tensor(int(random.integers(top)), dtype=dtype).expand(count)
    return _strided(random, torch.from_numpy(random.integers(0, max(top, 1), count)).to(dtype))


def _scale(random: Random) -> Tensor | float:
    scale = _pick(random, [1.0, 14.3, 100.0, math.exp(random.uniform(-3, 4.6)), 10 ** random.uniform(2, 6)])
    if random.random() < 0.4:
        return scale
    dtypes = [dtype for dtype in TOLERANCES if scale < min(torch.finfo(dtype).max, 9e5)]
    return torch.tensor(scale, dtype=_pick(random, dtypes)) if dtypes else scale


def _size(random: Random, most: int) -> int:
    return 0 if random.random() < 0.04 else int(random.integers(1, most + 1))


def _width(random: Random) -> int:
    return int(_pick(random, [1, 2, 8, 16, 32, 33, random.integers(1, 41)]))


def _strided(random: Random, x: Tensor) -> Tensor:
    """The same values, laid out in memory in one of several ways."""
    way = random.integers(5)
    if way == 0 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if way == 1 and x.dim():
        return torch.stack([x, x], dim=-1)[..., 0]
    if way == 2:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.clone()


def _backends() -> list[str]:
    return [name for name in ("cpu", "cuda", "triton") if BACKENDS[name].missing() is None]


def _pick(random: Random, choices: Any) -> Any:
    return choices[random.integers(len(choices))]


def _exact(value: Tensor | float) -> twin.Array:
    return value.detach().double().numpy() if isinstance(value, Tensor) else np.array(value)


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _compare(
    what: str,
    actual: Tensor,
    expected: twin.Array,
    dtype: torch.dtype,
    *,
    amplified: float | twin.Array = 1.0,
    lengths: twin.Array = np.ones(()),  # noqa: B008 - it is not changed
) -> None:
    """At the dtype's tolerance; the absolute one is of a row's largest element, or of one over its length if more.

    What amplifies rounding does so before the result is rounded to its dtype.
    """
    assert tuple(actual.shape) == expected.shape, f"{what} has the shape {tuple(actual.shape)}, not {expected.shape}"
    tolerance, wide = TOLERANCES[dtype], TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]
    within = tuple(range(lengths.ndim, expected.ndim))
    largest = np.maximum(np.abs(expected).max(axis=within, initial=0.0), 1 / lengths)
    atol = (tolerance["atol"] + wide["atol"] * (np.asarray(amplified) - 1)) * largest
    atol = atol.reshape(*atol.shape, *[1] * len(within)) if atol.ndim else atol
    atol += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the step between the smallest numbers
    most = torch.finfo(dtype).max  # what is beyond it is infinite in that dtype, and rightly so
    values, expected = actual.detach().double().numpy().clip(-most, most), expected.clip(-most, most)
    off = np.abs(values - expected) - tolerance["rtol"] * np.abs(expected) - atol
    if not (off <= 0).all():  # which NaN is not either
        where = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape) if off.ndim else ()
        raise AssertionError(f"{what} is {values[where]:.9g} at {tuple(map(int, where))}, not {expected[where]:.9g}")


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if not value.dim() or (not value.is_floating_point() and value.numel() < 40):
        values = f"{value.tolist()} "
    else:
        values = f"{tuple(value.shape)} strides {value.stride()} "
    grad = " with gradient" if value.requires_grad else ""
    return f"<{values}{str(value.dtype).removeprefix('torch.')}{grad}>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    options = parser.parse_args()
    numbers = range(options.calls) if options.only is None else range(options.only, options.only + 1)
    counts, failures = fuzz(numbers, options.seed, progress=True)
    for kind, count in sorted(counts.items()):
        print(f"{count:6} {kind}")
    print(f"{len(numbers)} calls, {len(failures)} mismatches")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
