"""Whatever allows TF32, products between the CUDA kernels are without it, and the setting is then as it was."""

import threading

import pytest
import torch

from pcmecl_fast.ops.backends.cuda.products import WithoutTF32, exact_products

MATMUL = torch.backends.cuda.matmul


def by_the_old_flag():
    MATMUL.allow_tf32 = True


def by_the_old_flag_and_the_new_one_for_cpus():
    MATMUL.allow_tf32 = True
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def for_products():
    MATMUL.fp32_precision = "tf32"


def for_all_of_pytorch():
    torch.backends.fp32_precision = "tf32"


def for_both():
    torch.backends.fp32_precision = "ieee"
    MATMUL.fp32_precision = "tf32"


def high():
    torch.set_float32_matmul_precision("high")


def medium():
    torch.set_float32_matmul_precision("medium")


def medium_but_not_on_cpus():
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def not_at_all():
    pass


WAYS = [
    *(by_the_old_flag, by_the_old_flag_and_the_new_one_for_cpus, for_products, for_all_of_pytorch, for_both),
    *(high, medium, medium_but_not_on_cpus, not_at_all),
]


@pytest.fixture(autouse=True)
def as_at_the_start():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def settings():
    """What each interface says, PyTorch's refusal of a mixture included."""
    interfaces = (
        lambda: MATMUL.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.fp32_precision,
        lambda: MATMUL.allow_tf32,
        torch.get_float32_matmul_precision,
    )
    found = []
    for interface in interfaces:
        try:
            found.append(interface())
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("allow", WAYS, ids=lambda way: way.__name__)
def test_it_is_turned_off_for_every_interface_and_then_as_it_was(allow):
    allow()
    before = settings()
    with WithoutTF32():
        assert MATMUL.fp32_precision != "tf32"
        assert MATMUL.allow_tf32 is False  # and not a mixture, which some products refuse
        with WithoutTF32():
            assert MATMUL.fp32_precision != "tf32"
        assert MATMUL.fp32_precision != "tf32"
    assert settings() == before


def test_an_error_leaves_it_as_it_was():
    for_products()
    with pytest.raises(ZeroDivisionError), WithoutTF32():
        raise ZeroDivisionError
    assert MATMUL.fp32_precision == "tf32"


def test_what_followed_a_wider_setting_follows_it_still():
    for_all_of_pytorch()
    with WithoutTF32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert MATMUL.fp32_precision == "ieee"


def test_no_thread_turns_it_on_under_another():
    for_products()
    seen = []

    def multiply():
        with WithoutTF32():
            seen.append(MATMUL.fp32_precision)

    other = threading.Thread(target=multiply)
    with WithoutTF32():
        other.start()
        other.join(timeout=0.2)
        assert seen == []
    other.join()
    assert seen == ["ieee"]
    assert MATMUL.fp32_precision == "tf32"


def test_autocast_narrows_no_product():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with exact_products(x):
            assert (x @ x).dtype == torch.float32
