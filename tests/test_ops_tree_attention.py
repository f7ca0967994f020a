"""tree_attention and PromptTree against plain causal attention over each prompt on its own."""

import pytest
import torch
from operators import attention_input, seed
from tolerances import DTYPES, assert_close_for
from torch import Tensor

from pcmecl_fast.ops import PromptTree, tree_attention

pytestmark = pytest.mark.usefixtures("each_backend")

LAYOUTS = [
    PromptTree(prefix=9, segment_lengths=(2, 2, 3, 2, 2, 2, 2)),  # a shared context of 8, one-word names
    PromptTree(prefix=1, segment_lengths=(11, 10, 13)),  # a context per emotion: SOS alone is shared
    PromptTree(prefix=3, segment_lengths=(1, 5)),
    PromptTree(prefix=1, segment_lengths=(1,)),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.prefix}+{layout.segment_lengths}")


def test_a_layout_reads_as_the_packed_sequence():
    tree = PromptTree(prefix=2, segment_lengths=(3, 1, 2))
    assert tree.length == 8
    assert tree.segments.tolist() == [-1, -1, 0, 0, 0, 1, 2, 2]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 2, 2, 3]
    assert tree.eos.tolist() == [4, 5, 7]
    assert tree.mask().int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_layouts_are_equal_and_hash_by_their_lengths():
    assert PromptTree(3, (1, 5)) == PromptTree(3, [1, 5])
    assert len({PromptTree(3, (1, 5)), PromptTree(3, [1, 5]), PromptTree(3, (5, 1))}) == 2


def test_a_mask_is_made_once_per_device():
    assert PromptTree(3, (1, 5)).mask("cpu") is PromptTree(3, (1, 5)).mask(torch.device("cpu"))
    assert PromptTree(3, (1, 5)).mask("meta").device.type == "meta"


def test_a_mask_first_made_in_inference_mode_works_in_training():
    tree = PromptTree(2, (3, 1, 4, 1, 5, 9, 2, 6))  # a layout no other test makes a mask of
    qkv = attention_input(1, tree.length, 1, 4, dtype=torch.float32)
    with torch.inference_mode():
        tree_attention(qkv.detach(), tree)
    tree_attention(qkv, tree).sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e3, 3e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_any_supported_size_are_finite(dtype, size):
    tree = PromptTree(4, (2, 3, 1))
    qkv = attention_input(2, tree.length, 2, 16, dtype=dtype)
    qkv.data *= size  # logits go up to some size²
    exact = qkv.detach().double().requires_grad_()
    out, expected = tree_attention(qkv, tree), tree_attention(exact, tree, backend="reference")
    close = {"rtol": 1e-4, "atol": 1e-5 * size} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2 * size}
    torch.testing.assert_close(out.double(), expected, **close)
    out.sum().backward()
    expected.sum().backward()
    assert qkv.grad.isfinite().all()
    # The values', as each is given the weights of those that see it: the others' are differences of huge numbers.
    torch.testing.assert_close(qkv.grad[:, :, 2].double(), exact.grad[:, :, 2], rtol=1e-2, atol=1e-2)


def test_heads_of_no_width_are_refused():
    with pytest.raises(ValueError, match=r"qkv: got shape \(1, 3, 3, 2, 0\); takes .* with d ≥ 1"):
        tree_attention(torch.zeros(1, 3, 3, 2, 0), PromptTree(1, (2,)))


@layouts
@pytest.mark.parametrize("heads", [(1, 1, 8), (3, 2, 5), (2, 8, 64)])  # N, H, d
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_its_gradient_are_those_of_each_prompt_on_its_own(dtype, heads, layout):
    people, count, width = heads
    qkv = attention_input(people, layout.length, count, width, dtype=dtype)
    out = tree_attention(qkv, layout)
    assert out.dtype == dtype
    assert out.shape == (people, layout.length, count, width)
    assert out.is_contiguous()

    exact = qkv.detach().double().requires_grad_()
    expected = oracle(exact, layout)
    assert_close_for(dtype)(out, expected)
    weights = torch.randn(out.shape, generator=seed(1), dtype=torch.float64).to(dtype)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert_close_for(dtype)(qkv.grad, exact.grad)


@layouts
def test_gradcheck(layout):
    qkv = attention_input(2, layout.length, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda qkv: tree_attention(qkv, layout), (qkv,), fast_mode=True)


def test_gradcheck_of_every_element():
    layout = PromptTree(2, (1, 2))
    assert torch.autograd.gradcheck(
        lambda x: tree_attention(x, layout), (attention_input(1, 5, 2, 3, dtype=torch.float64),)
    )


@layouts
def test_no_token_sees_another_segment_or_its_own_future(layout):
    qkv = attention_input(1, layout.length, 1, 4, dtype=torch.float32)
    mask = layout.mask()
    for token in range(layout.length):
        (heard,) = torch.autograd.grad(tree_attention(qkv, layout)[0, token].sum(), qkv)
        assert torch.equal(heard[0, :, 2].abs().sum(dim=(-1, -2)) > 0, mask[token])


def test_large_logits_do_not_overflow():
    layout = LAYOUTS[0]
    qkv = (1e4 * attention_input(1, layout.length, 2, 8, dtype=torch.float32)).detach().requires_grad_()
    out = tree_attention(qkv, layout)
    out.sum().backward()
    assert out.isfinite().all()
    assert qkv.grad.isfinite().all()


def test_an_empty_batch_is_empty_with_a_graph():
    qkv = attention_input(0, LAYOUTS[0].length, 2, 8, dtype=torch.float32)
    out = tree_attention(qkv, LAYOUTS[0])
    assert out.shape == (0, LAYOUTS[0].length, 2, 8)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(dtype):
    qkv = attention_input(2, LAYOUTS[0].length, 2, 8, dtype=dtype)
    plain = tree_attention(qkv, LAYOUTS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tree_attention(qkv, LAYOUTS[0]), plain)


def test_strided_inputs_are_supported():
    qkv = attention_input(2, LAYOUTS[0].length, 2, 8, dtype=torch.float32)
    strided = qkv.transpose(0, 3).contiguous().transpose(0, 3)
    assert_close_for(torch.float32)(tree_attention(strided, LAYOUTS[0]), tree_attention(qkv, LAYOUTS[0]))


def test_compiles_into_one_graph_and_leaves_no_fake_tensor_behind():
    layout = PromptTree(4, (2, 7, 1, 8))  # a layout no other test makes a mask of
    qkv = attention_input(2, layout.length, 2, 8, dtype=torch.float32)
    out = torch.compile(lambda x: tree_attention(x, layout), fullgraph=True, backend="aot_eager")(qkv)
    assert_close_for(torch.float32)(out, tree_attention(qkv, layout))
    out.sum().backward()
    assert qkv.grad.isfinite().all()


# Each row: the wrong arguments, the exception, and its message.
QKV = torch.zeros(2, 6, 3, 2, 4)
WRONG = [
    ({"qkv": None}, TypeError, "qkv: got NoneType; takes a tensor"),
    ({"qkv": QKV.int()}, TypeError, "qkv: got torch.int32; takes float16, bfloat16, float32 or float64"),
    ({"qkv": QKV[0]}, ValueError, r"qkv: got shape \(6, 3, 2, 4\); takes \(N, S, 3, H, d\)"),
    ({"qkv": QKV[:, :, :2]}, ValueError, r"qkv: got shape \(2, 6, 2, 2, 4\); takes \(N, S, 3, H, d\)"),
    ({"qkv": QKV[:, :5]}, ValueError, r"qkv: got shape \(2, 5, 3, 2, 4\); .* with S = 6, as in layout"),
    ({"layout": (1, (2, 3))}, TypeError, "layout: got tuple; takes a PromptTree"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'; takes one of reference, cpu, triton, cuda, xformers, auto"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_wrong_argument_is_named(wrong, error, says):
    with pytest.raises(error, match=says):
        tree_attention(**{"qkv": QKV, "layout": PromptTree(1, (2, 3))} | wrong)


@pytest.mark.parametrize(
    ("prefix", "lengths", "error", "says"),
    [
        (0, (1,), ValueError, "prefix: got 0; takes at least 1"),
        (1.0, (1,), TypeError, "prefix: got float; takes an int"),
        (1, (), ValueError, "segment_lengths: got none; takes at least one segment"),
        (1, (2, 0), ValueError, r"segment_lengths\[1\]: got 0; takes at least 1"),
        (1, (2, True), TypeError, r"segment_lengths\[1\]: got bool; takes an int"),
        (1, 3, TypeError, "segment_lengths: got int; takes a tuple of integers"),
        (1, "12", TypeError, "segment_lengths: got str; takes a tuple of integers"),
    ],
)
def test_a_wrong_layout_is_named(prefix, lengths, error, says):
    with pytest.raises(error, match=says):
        PromptTree(prefix, lengths)


def oracle(qkv: Tensor, layout: PromptTree) -> Tensor:
    """Attention of each prompt as its own causal sequence; the prefix's rows, equal in all, are kept once."""
    prefix, start, rows = layout.prefix, layout.prefix, []
    for segment, length in enumerate(layout.segment_lengths):
        prompt = torch.cat([qkv[:, :prefix], qkv[:, start : start + length]], dim=1)
        out = causal_attention(prompt)
        rows.append(out if segment == 0 else out[:, prefix:])
        start += length
    return torch.cat(rows, dim=1)


def causal_attention(qkv: Tensor) -> Tensor:
    query, key, value = qkv.unbind(dim=2)  # each (N, S, H, d)
    out = []
    for token in range(qkv.shape[1]):
        logits = (query[:, token : token + 1] * key[:, : token + 1]).sum(dim=-1) / qkv.shape[-1] ** 0.5  # (N, S, H)
        weights = logits.softmax(dim=1)
        out.append((weights[..., None] * value[:, : token + 1]).sum(dim=1))
    return torch.stack(out, dim=1)
