"""Both stages over ranks end with one process's weights: in float64, where rounding does not grow to anything."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pcmecl_fast import load_clip, ops
from pcmecl_fast.data.features import LiveFeatures
from pcmecl_fast.distributed import AnotherRankFailed, agree, alone, from_main, joined, rank, ranks, share, shares
from pcmecl_fast.models import Edit, Generator
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train import generator as stage2
from pcmecl_fast.train import prompts as stage1
from pcmecl_fast.train.config import PromptsConfig, TrainConfig

EMOTIONS = ["neutral", "happy", "sad"]


@pytest.mark.parametrize("condition", ["individual", "frame", "none"])
def test_stage_1_ends_with_the_same_prompts_on_any_number_of_ranks(crew, tmp_path, condition):
    expected, curves = crew(1, learn, tmp_path / "1", condition)[0]
    for count in (2, 4) if condition == "individual" else (2,):  # of 5 people, four ranks have 1, 1, 1 and 2
        for weights, others in crew(count, learn, tmp_path / str(count), condition):
            assert_same(weights, expected)
            assert_same(others, curves)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_painting_generator_and_the_critic_of_emotions_are_the_same_on_any_number_of_ranks(
    crew, tmp_path, optimizer
):
    options = {"generator": "warp-paint", "emotion": 1.0, "optimizer": optimizer}
    expected, curves = crew(1, partial(train, **options), tmp_path / "1", 1, 0.0)[0]
    for count, accumulate in ((2, 1), (1, 2), (2, 2)):
        for weights, others in crew(
            count, partial(train, **options), tmp_path / f"{count}-{accumulate}", accumulate, 0.0
        ):
            assert_same(weights, expected)
            assert_same(others, curves, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("adversarial", [0.5, 0.0])
def test_stage_2_ends_with_the_same_generator_on_any_number_of_ranks_and_in_parts(crew, tmp_path, adversarial):
    expected, curves = crew(1, train, tmp_path / "1", 1, adversarial)[0]
    # A part is a pass of its own of the critic, whose spectral norms take a step in each.
    for count, accumulate in ((2, 1), (4, 1)) if adversarial else ((1, 2), (2, 2)):
        for weights, others in crew(count, train, tmp_path / f"{count}-{accumulate}", accumulate, adversarial):
            assert_same(weights, expected)
            if adversarial:
                assert_same(others, curves, rtol=3e-6, atol=1e-7)  # some of the terms are float32


def test_kept_views_are_the_same_on_any_number_of_ranks_and_in_parts(crew, tmp_path):
    kept = {"backend": "auto", "views": 2}
    expected, _ = crew(1, partial(train, **kept), tmp_path / "1", 1, 0.0)[0]
    plain, _ = crew(1, partial(train, views=2), tmp_path / "plain", 1, 0.0)[0]
    assert_same(plain, expected)
    for count, accumulate in ((2, 1), (1, 2), (2, 2)):
        for weights, _ in crew(count, partial(train, **kept), tmp_path / f"{count}-{accumulate}", accumulate, 0.0):
            assert_same(weights, expected)


def test_a_batch_that_cannot_be_divided_is_refused(crew, tmp_path):
    for message in crew(2, with_batch, tmp_path, 6, 2):
        assert message == "batch: 6 frames cannot be divided among 2 ranks of 2 parts; takes a multiple of 4"


def test_a_parameter_that_no_edit_uses_is_named(crew, tmp_path):
    for message in crew(2, with_spare_parameter, tmp_path):
        assert "no gradient reaches spare" in message


def test_ranks_with_other_data_are_named(crew):
    first, second = crew(2, with_other_facts)
    assert first == "ValueError: rank 1 differs from rank 0 in the frames in --data: ranks compute one thing"
    assert second.startswith("AnotherRankFailed: rank 0 failed: rank 1 differs")


def test_the_first_ranks_result_and_error_reach_the_others(crew):
    assert crew(3, results_of_main) == [([0, 1, 0], {"a": 1})] * 3
    first, second = crew(2, error_of_main)
    assert first == "ValueError: it broke"
    assert second == "AnotherRankFailed: rank 0 failed: it broke"


def test_shares_are_whole_contiguous_and_even():
    for count in (0, 1, 5, 16):
        for of in (1, 3, 7):
            parts = [range(count)[share(count, of=of, at=k)] for k in range(of)]
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shares(5) == [5]


# ---- What the ranks do -----------------------------------------------------------------------------------------------


def assert_same(found, expected, rtol=1e-8, atol=1e-9):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        pair = torch.as_tensor(found[key]), torch.as_tensor(value)
        torch.testing.assert_close(*pair, rtol=rtol, atol=atol, msg=partial("{}: {}".format, key))


def faces():
    return SyntheticFaces(5, emotions=EMOTIONS, clips=1, frames_per_clip=2, size=32)


def curves_of(loop):
    return {name: [value for _, value in points] for name, points in loop.curves.items()}


def learn(out: Path, condition: str):
    clip, data = load_clip().double(), faces()
    seen = LiveFeatures(load_clip(), data)[torch.arange(len(data))].double()
    stage1.frame_features = lambda *of: seen
    out.mkdir(exist_ok=True)
    config = PromptsConfig(out=out, steps=8, batch_individuals=6, condition=condition, checkpoint_every=100)
    with ops.use_backend("reference"):
        prompts, _, loop = stage1.learn_prompts(clip, data, config)
    assert prompts.context.dtype == torch.float64
    return dict(prompts.state_dict()), curves_of(loop)


class InFloat64(SyntheticFaces):
    def frames(self, index):
        return super().frames(index).double()


def train(
    out: Path, accumulate: int, adversarial: float = 0.5, *, batch: int = 8, generator: str = "warp-fields",
    views: int = 0, backend: str = "reference", emotion: float = 0.0, optimizer: str = "adam",
):  # fmt: skip
    torch.set_default_dtype(torch.float64)
    try:
        clip, data = load_clip().double(), InFloat64(5, emotions=EMOTIONS, clips=1, frames_per_clip=2, size=32)
        bank = torch.nn.functional.normalize(torch.randn(5, 3, clip.embed_dim, generator=seeded()), dim=-1)
        from pcmecl_fast.prompts import PromptBank, Tower

        bank = PromptBank(bank, data.individuals, EMOTIONS, tower=Tower.of(clip))
        out.mkdir(exist_ok=True)
        config = TrainConfig(
            out=out, steps=6, batch=batch, accumulate=accumulate, size=32, strength=0.0, w_cycle=1.0, w_person=0.0,
            w_speech=0.0, w_adversarial=adversarial, checkpoint_every=4, generator=generator, views=views,
            w_emotion=emotion, w_emotion_mouth=emotion, optimizer=optimizer,
        )  # fmt: skip
        with ops.use_backend(backend):
            trained, loop = stage2.train_generator(clip, bank, data, config)
        return dict(trained.state_dict()), curves_of(loop)
    finally:
        torch.set_default_dtype(torch.float32)


def seeded():
    return torch.Generator().manual_seed(0)


def with_batch(out: Path, batch: int, accumulate: int):
    try:
        train(out, accumulate, batch=batch)
    except ValueError as error:
        return str(error)


class WithSpare(Generator):
    """A generator with a parameter that does nothing."""

    def __init__(self, emotions, size, config=None):
        super().__init__(emotions, size, config)
        self.shift = nn.Parameter(torch.zeros(len(emotions)))
        self.spare = nn.Parameter(torch.zeros(3))

    def edit(self, frames, target):
        return Edit(frames + self.shift[target][:, None, None, None], {})


def with_spare_parameter(out: Path):
    try:
        train(out, 1, generator="test_training_ranks:WithSpare")
    except ValueError as error:
        return str(error)


def with_other_facts():
    try:
        agree({"the options": "same", "the frames in --data": f"{rank()}"})
    except (ValueError, AnotherRankFailed) as error:
        return told(error)


def results_of_main():
    def do():
        return [rank(), ranks(), 0]

    result = from_main(do)
    with alone():
        assert ranks() == 1
    time.sleep(0.1 * rank())
    return result, from_main(lambda: {"a": 1})


def error_of_main():
    def do():
        raise ValueError("it broke")

    try:
        from_main(do)
    except (ValueError, AnotherRankFailed) as error:
        return told(error)


def told(error):
    from pcmecl_fast.distributed import _shared_failure

    shared = _shared_failure(error)
    return f"{type(shared).__name__}: {shared}"


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu"):
        assert (rank(), ranks(), from_main(lambda: 3)) == (0, 1, 3)


def test_incomplete_variables_of_torchrun_are_named(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ValueError, match="RANK is set, MASTER_ADDR, MASTER_PORT are not: start the ranks with torchrun"),
        joined("cpu"),
    ):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for threads in /proc")
def test_nothing_of_the_group_is_left_when_the_ranks_part(tmp_path):
    """Its threads would meet the end of the interpreter: now and then they abort it."""
    part = tmp_path / "part.py"
    part.write_text("""
import os
from pathlib import Path
from torch import nn
from pcmecl_fast.distributed import joined

def threads():
    return any("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))

with joined("cpu"):
    nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    during = threads()
Path(__file__).with_name(f"rank {os.environ['RANK']}").write_text(f"{during} {threads()}")
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", part]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank {rank}").read_text() for rank in range(2)] == ["True False"] * 2
