"""The criterion inside other people's trainers: DDP, DataParallel, mixed precision, compiled steps, copies."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from criteria import bank_for, sample
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank

EMOTIONS = ["neutral", "happy", "sad"]


class Model(nn.Module):
    """A trainer's module: a generator of one layer that computes its own losses."""

    def __init__(self, criterion, times=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Conv2d(3, 3, 3, padding=1)
        self.criterion, self.times = criterion, times

    def forward(self, source, *labels):
        edited = (source + 0.1 * self.generator(source)).clamp(-1, 1)
        return sum(self.criterion(source, edited, *labels) for _ in range(self.times)) / self.times


@pytest.fixture
def criterion(clip):
    return PCMECLCriterion(clip, bank_for(clip), contrast=0.3)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def expected_of(criterion, source, labels):
    model = Model(criterion)
    loss = model(source, *labels)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("times", [1, 2])
def test_a_model_with_it_trains_under_ddp(criterion, one_process, times):
    source, _, *labels = sample(4, 3, 24, 24)
    expected, by = expected_of(criterion, source, labels)
    model = DistributedDataParallel(Model(criterion, times))
    assert len(list(model.parameters())) == 2  # nothing of the clip is reduced
    # Two passes before the backward, as GANs have: what DDP sends between them damages no graph.
    loss = (model(source, *labels) + model(source, *labels)) / 2
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(gradients(model), by, rtol=1e-4, atol=1e-6)


def test_names_and_people_added_later_work_under_ddp(clip, one_process):
    prompts = PersonalizedPrompts(clip, EMOTIONS)
    rows = prompts(F.normalize(torch.randn(2, clip.embed_dim), dim=-1)).detach()
    criterion = PCMECLCriterion(clip, PromptBank(rows, ["anna", "ben"], EMOTIONS), prompts=prompts)
    model = DistributedDataParallel(Model(criterion))
    source, *_ = sample(2, 3, 24, 24)
    criterion.add_individual("carl", source)
    model(source, ["carl", "ben"], "neutral", ["happy", "sad"]).backward()
    assert all(gradient.ne(0).any() for gradient in gradients(model))


def test_a_step_with_it_compiles_into_one_graph(criterion):
    source, _, *labels = sample(4, 3, 24, 24)
    expected, by = expected_of(criterion, source, labels)
    model = Model(criterion)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(source, *labels)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), by, rtol=1e-3, atol=1e-5)


def test_a_step_with_bytes_and_a_mask_compiles_into_one_graph(clip):
    criterion = PCMECLCriterion(clip, bank_for(clip), value_range=(0, 1), channels="bgr")
    source, edited, *labels = sample(4, 3, 24, 24)
    source, edited = (source * 127.5 + 127.5).to(torch.uint8), edited.detach() / 2 + 0.5
    mask = torch.rand(4, 1, 24, 24) < 0.5
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    given = source, edited.requires_grad_(), *labels
    torch.testing.assert_close(compiled(*given, mask=mask), criterion(*given, mask=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler_stays_close(criterion, dtype):
    source, _, *labels = sample(4, 3, 24, 24)
    expected, by = expected_of(criterion, source, labels)
    model = Model(criterion)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(source, *labels)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(loss.detach(), expected, rtol=0.05, atol=0.05)
    for found, exact in zip(gradients(model), by, strict=True):
        assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.9
    scaler.step(optimizer)


# DataParallel


class OnMeta:
    """A replica as DataParallel makes it, on a device that every machine has: buffers are copied, nothing else is."""

    def __new__(cls, criterion):
        replica = criterion._replicate_for_data_parallel()
        for name, buffer in criterion._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.to("meta")
        return replica


def test_replicas_of_dataparallel_have_the_towers_on_their_own_device(clip):
    prompts = PersonalizedPrompts(clip, EMOTIONS)
    rows = prompts(F.normalize(torch.randn(2, clip.embed_dim), dim=-1)).detach()
    bank = PromptBank(rows, ["a", "b"], EMOTIONS, condition="frame")
    criterion = PCMECLCriterion(clip, bank, prompts=prompts)
    replica, another = OnMeta(criterion), OnMeta(criterion)
    assert replica.clip.device.type == "meta"
    assert replica.prompts.context.device.type == "meta"
    assert replica.prompts.clip is replica.clip
    assert another.clip is replica.clip  # made once, not at every step
    assert clip.device.type == criterion.clip.device.type == "cpu"
    source, edited, *_ = sample(2, 3, 24, 24)
    loss = replica(source.to("meta"), edited.to("meta"), None, "neutral", "happy")
    assert loss.device.type == "meta"


def test_threads_leave_pytorchs_attention_as_it_was(criterion):
    source, edited, *labels = sample(2, 3, 24, 24)
    assert torch.backends.mha.get_fastpath_enabled()
    threads = [threading.Thread(target=lambda: [criterion(source, edited, *labels) for _ in range(5)]) for _ in "four"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_the_same_and_independent(clip, copied):
    prompts = PersonalizedPrompts(clip, EMOTIONS)
    rows = prompts(F.normalize(torch.randn(2, clip.embed_dim), dim=-1)).detach()
    criterion = PCMECLCriterion(clip, PromptBank(rows, ["anna", "ben"], EMOTIONS), prompts=prompts)
    twin = copied(criterion)
    assert twin.clip is not clip
    assert twin.prompts.clip is twin.clip
    source, edited, *_ = sample(2, 3, 24, 24)
    labels = "anna", "neutral", "happy"
    assert twin(source, edited, *labels) == criterion(source, edited, *labels)
    twin.add_individual("carl", source)
    twin.to(torch.bfloat16)
    assert criterion.individuals == ["anna", "ben"]
    assert criterion.clip.dtype == criterion.features.dtype == torch.float32
    assert twin.prompts.context.dtype == torch.float32
