"""Adam in one pass over memory, and Muon."""

import copy

import pytest
import torch
from tolerances import TOLERANCES
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pcmecl_fast.train.optimizers import Learning, Muon, fused_adam, matrices_of, orthogonal

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def a_network(layout):
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 4).to(memory_format=layout)


def steps(network, optimizer, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        network(torch.randn(2, 3, 9, 9, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_a_checkpoint_goes_on_in_another_layout(before, after):
    first = a_network(before)
    optimizer = fused_adam(first.parameters(), lr=0.01)
    steps(first, optimizer, seed=1)

    found = {}
    for make in (fused_adam, torch.optim.Adam):
        network = a_network(after)
        network.load_state_dict(first.state_dict())
        resumed = make(network.parameters(), lr=0.01)
        state = copy.deepcopy(optimizer.state_dict())  # whoever loads it goes on with its tensors
        resumed.load_state_dict(state | {"param_groups": resumed.state_dict()["param_groups"]})
        steps(network, resumed, seed=2)
        found[make] = network.weight.detach()
    torch.testing.assert_close(found[fused_adam], found[torch.optim.Adam])


def test_complex_parameters_are_optimised_too():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fused_adam([parameter], lr=0.1)
    (parameter.abs() ** 2).sum().backward()
    optimizer.step()
    assert parameter.abs().max() < 1


# Muon


def by_newton_and_schulz(x):
    """As it is written, on each matrix by itself."""
    turned = x.shape[0] > x.shape[1]
    x = x.mT if turned else x
    x = x / x.norm()
    for _ in range(5):
        product = x @ x.mT
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x.mT if turned else x


SHAPES = ((7, 64), (64, 7), (16, 16), (16, 45), (1, 9), (16, 300))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_steps_on_products_are_those_on_the_matrices(dtype):
    generator = torch.Generator().manual_seed(0)
    # Of singular values far apart the small ones are lost to rounding, and do not matter.
    matrices = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in SHAPES if shape != (16, 16)]
    expected = [by_newton_and_schulz(x) for x in matrices]
    for found, wanted in zip(orthogonal([x.to(dtype) for x in matrices]), expected, strict=True):
        torch.testing.assert_close(found, wanted.to(dtype), **TOLERANCES[dtype])


def test_what_is_made_orthogonal_keeps_its_directions():
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        seen = u.mT @ orthogonal([x])[0] @ vh.mT
        lengths = seen.diagonal()
        torch.testing.assert_close(seen, torch.diag(lengths), **TOLERANCES[torch.float64])
        assert lengths.min() > (0.65 if shape != (16, 16) else 0)
        assert lengths.max() < 1.15


def test_no_gradient_is_no_step():
    frozen, still = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    still.grad = torch.zeros(4, 6)
    Muon([frozen, still], lr=1.0).step()
    assert torch.equal(frozen, torch.ones(4, 6))
    assert torch.equal(still, torch.ones(4, 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_as_long_as_it_says(layout):
    filters = a_network(layout).weight
    before = filters.detach().clone()
    filters.grad = torch.randn_like(filters)
    Muon([filters], lr=0.1).step()
    expected = orthogonal([filters.grad.flatten(1)])[0].reshape(8, 3, 4, 4)
    torch.testing.assert_close(filters.detach() - before, -0.1 * 0.2 * 48**0.5 * expected)


def test_muon_learns_the_weights_of_layers_and_adam_all_else():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 4), nn.GroupNorm(8, 8), nn.Linear(4, 5), nn.Embedding(3, 4), spectral_norm(nn.Linear(4, 4)),
        nn.Linear(2, 2, dtype=torch.complex64), nn.Linear(3, 3, bias=False).requires_grad_(False),
    )  # fmt: skip
    matrices = matrices_of(network)
    assert [id(x) for x in matrices] == [id(network[0].weight), id(network[2].weight)]
    learning = Learning([(network, 1e-3)], matrices)
    assert [len(o.param_groups[0]["params"]) for o in (learning.adam, learning.muon)] == [10, 2]


def test_networks_that_learn_together_go_on_from_a_checkpoint_at_their_own_rates():
    def networks():
        torch.manual_seed(0)
        return nn.Conv2d(3, 8, 4), nn.Conv2d(3, 8, 4)

    def learned(first, second):
        return Learning([(first, 1e-2), (second, 0.0)], [*matrices_of(first), *matrices_of(second)])

    def step(pair, learning, seed):
        generator = torch.Generator().manual_seed(seed)
        learning.set_rates(0.5)
        learning.zero_grad()
        sum(x(torch.randn(2, 3, 9, 9, generator=generator)).square().mean() for x in pair).backward()
        learning.step(torch.amp.GradScaler("cpu", enabled=False))

    whole, cut = networks(), networks()
    start = [x.detach().clone() for x in whole[1].parameters()]
    learning = learned(*whole)
    step(whole, learning, 1)
    for x, y in zip(cut, whole, strict=True):
        x.load_state_dict(y.state_dict())
    resumed = learned(*cut)
    resumed.load_state_dict(copy.deepcopy(learning.state_dict()))
    for pair, optimisers in ((whole, learning), (cut, resumed)):
        step(pair, optimisers, 2)
    assert all(torch.equal(x, y) for x, y in zip(whole[0].parameters(), cut[0].parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(whole[1].parameters(), start, strict=True))
    assert not torch.equal(whole[0].weight, whole[1].weight)


def test_a_network_of_matrices_alone_learns_in_half_precision_too():
    network = nn.Linear(4, 3, bias=False)
    learning = Learning([(network, 1e-2)], matrices_of(network))
    scaler = torch.amp.GradScaler("cpu")
    before = network.weight.detach().clone()
    scaler.scale(network(torch.ones(2, 4)).square().mean()).backward()
    learning.set_rates(1.0)
    learning.unscale(scaler)
    learning.step(scaler)
    scaler.update()
    assert not torch.equal(network.weight, before)
