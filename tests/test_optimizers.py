"""Adam in one pass over memory."""

import copy

import pytest
import torch
from torch import nn

from pcmecl_fast.train.optimizers import fused_adam

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
