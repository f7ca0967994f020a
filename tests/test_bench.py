"""The benchmarks measure what they say."""

import json
from types import SimpleNamespace

import cuda_on_host
import pytest
import torch

from bench import choose, compare, compare_steps, host_cost, rehearsal, report, scaling, steps, timing
from pcmecl_fast.ops.operator import BACKENDS, Backend
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

compare.load_all()
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name, entry in compare.COMPARISONS.items() if entry.host])
def test_the_cost_of_a_call_is_measured_on_one_core(name, monkeypatch):
    used = []

    def alternate(timers, seconds):
        used.append(torch.get_num_threads())
        return [[1.0]] * len(timers)

    monkeypatch.setattr(compare, "alternate", alternate)
    threads = torch.get_num_threads()
    rows, failure = compare.compare(name, CPU, torch.float32, seconds=0.0)
    assert failure is None
    assert [row.side for row in rows] == ["eager", host_cost.HARNESS if "tree" in name else "fused"]
    assert used == [1]
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources")
def test_the_cost_of_tree_attention_is_that_of_the_cuda_backend(monkeypatch):
    installed, during = BACKENDS["cuda"], []
    monkeypatch.setattr(host_cost, "_call", lambda case: lambda backend: during.append(BACKENDS["cuda"]))
    compare.COMPARISONS["host_tree_attention"].build(CPU, torch.float32).sides[-1].run()
    assert during[0].takes(TREE_ATTENTION, "cpu")
    assert BACKENDS["cuda"] is installed


def test_on_a_gpu_every_backend_is_a_side(monkeypatch):
    monkeypatch.setattr(rehearsal, "_on", True)
    sides = {"tree_attention": "pcmecl_fast", "direction_loss": "fused", "stage1_step": "store and trees"}
    for name, ours in sides.items():
        named = [side.name for side in compare.COMPARISONS[name].build(CPU, torch.float32).sides]
        assert {"backend=cuda", "backend=triton"} <= set(named)
        assert ("backend=xformers" in named) == (name == "tree_attention")
        assert named[-1] == ours
        assert ("captured step" in named) == (name == "stage1_step")


@pytest.mark.parametrize("name", ["stage2_step", "stage2_step_tiny", "stage2_criterion_frames", "stage2_criterion"])
def test_a_careful_trainer_does_what_the_librarys_does_in_stage_2(name, monkeypatch):
    monkeypatch.setattr(rehearsal, "_on", True)
    work = compare.COMPARISONS[name].build(CPU, torch.float32)
    named = {side.name: side.run for side in work.sides}
    assert {"published trainer", "careful trainer", "backend=cuda"} <= named.keys()
    assert not work.skipped
    errors = compare.errors_against_the_first(work.sides)
    assert max(errors.values()) <= compare.TOLERANCES[torch.float32]
    assert all(float(x.detach().norm()) > 0 for x in work.sides[-1].run())


@pytest.mark.parametrize("side", ["careful trainer", "pcmecl_fast, --views 8", "pcmecl_fast"])
def test_every_step_that_is_timed_is_the_same(side, monkeypatch):
    monkeypatch.setattr(rehearsal, "_on", True)
    runs = {each.name: each.run for each in compare.COMPARISONS["stage2_step_tiny"].build(CPU, torch.float32).sides}
    first = [x.clone() for x in runs[side]()]
    assert all(map(torch.equal, runs[side](), first))


def test_with_views_that_are_kept_no_source_is_looked_at_again(monkeypatch):
    monkeypatch.setattr(rehearsal, "_on", True)
    looks, encode = [], compare_steps.Clip.encode_image

    def counted(self, frames, **options):
        looks.append(torch.is_grad_enabled())
        return encode(self, frames, **options)

    runs = {each.name: each.run for each in compare.COMPARISONS["stage2_step"].build(CPU, torch.float32).sides}
    monkeypatch.setattr(compare_steps.Clip, "encode_image", counted)
    for side, expected in {"pcmecl_fast, --views 8": [True], "pcmecl_fast": [False, True]}.items():
        looks.clear()
        runs[side]()
        assert looks == expected


def test_a_backend_without_kernels_for_the_operator_is_no_side(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setitem(BACKENDS, "other", Backend("other", missing=lambda: None))
    BACKENDS["other"].add(TREE_ATTENTION, TREE_ATTENTION.reference)
    assert "backend=other" in compare.backend_sides(lambda name: [], gpu, "tree_attention")
    assert "backend=other" not in compare.backend_sides(lambda name: [], gpu, "direction_loss")
    assert "backend=triton" in compare.backend_sides(lambda name: [], gpu, "direction_loss")


def test_a_side_that_disagrees_is_not_timed_and_the_others_are(added):
    added(plain=lambda: [torch.ones(2)], wrong=lambda: [torch.zeros(2)], ours=lambda: [torch.ones(2)])
    rows, failure = compare.compare("added", CPU, torch.float32, seconds=0.0)
    assert [row.side for row in rows] == ["plain", "ours"]
    assert failure == "wrong and plain disagree: relative error 1.0e+00"


def test_nothing_is_timed_if_ours_disagrees(added):
    added(plain=lambda: [torch.ones(2)], ours=lambda: [torch.full((2,), torch.nan)])
    rows, failure = compare.compare("added", CPU, torch.float32, seconds=0.0)
    assert not rows
    assert failure == "ours and plain disagree: relative error inf"


def test_a_comparison_that_breaks_off_leaves_the_others_their_turn(added, monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    added(plain=broken)
    path = tmp_path / "compare.json"
    command = ["bench.compare", "added", "host_clip_frames", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr("sys.argv", command)
    assert compare.main() == 1
    results = json.loads(path.read_text())
    assert results["added float32"]["disagreement"] == "broke off: RuntimeError: CUDA error: an illegal memory access"
    assert results["host_clip_frames float32"]["rows"]


@pytest.fixture
def added(monkeypatch):
    """A function that registers a comparison "added" of these sides."""

    def add(**sides):
        work = compare.Comparison([compare.Side(name, run) for name, run in sides.items()])
        entry = compare.Entry(lambda device, dtype: work, "added", (), {}, host=False)
        monkeypatch.setitem(compare.COMPARISONS, "added", entry)

    return add


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU: events read its clock, which a replay, a call and the spinning kernel move."""
    device = StandIn()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", device.spin)
    return device


class StandIn:
    def __init__(self):
        self.now, self.log = 0.0, []

    def event(self, enable_timing):
        return StandInEvent(self)

    def spin(self, cycles):
        self.log.append("spin")
        self.now += 7.0

    def run(self, name, milliseconds):
        self.log.append(name)
        self.now += milliseconds
        return [torch.ones(1)]


class StandInEvent:
    def __init__(self, device):
        self._device = device

    def record(self):
        self._device.log.append("event")
        self._at = self._device.now

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return later._at - self._at


def test_device_time_is_that_of_replays_enqueued_while_the_device_spins(gpu, monkeypatch):
    monkeypatch.setattr(timing, "rehearse", lambda step, inputs: step(*inputs))
    graph = SimpleNamespace(replay=lambda: gpu.run("replay", 0.25))
    monkeypatch.setattr(timing, "capture", lambda step, inputs: (graph, step(*inputs)))
    measure = timing.timer(lambda: gpu.run("call", 3.0), torch.device("cuda"))
    gpu.log.clear()
    assert measure() == pytest.approx(0.25e-3)
    assert gpu.log == ["spin", "event", *["replay"] * 4, "event"]


def test_what_cannot_be_captured_is_enqueued_call_after_call(gpu, monkeypatch):
    def waits(step, inputs):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(timing, "rehearse", waits)
    measure = timing.timer(lambda: gpu.run("call", 0.5), torch.device("cuda"))
    gpu.log.clear()
    assert measure() == pytest.approx(0.5e-3)
    assert gpu.log == ["spin", "event", "call", "call", "event"]


def test_a_training_step_is_timed_as_it_runs(gpu):
    measure = timing.timer(lambda: gpu.run("call", 3.0), torch.device("cuda"), as_it_runs=True)
    assert measure() == pytest.approx(3e-3)
    assert gpu.log == ["event", "call", "event"]


def result(**changes):
    """A GPU's results of correlation_loss."""
    rows = [side("torch.compile", 1), side("eager", 9), side("backend=cuda", 3), side("backend=triton", 2)]
    rows += [{"side": "backend=xformers", "note": "not run: not installed"}, side("fused", 3)]
    sources = compare.sources_digest("correlation_loss", "cuda")
    found = {"rows": rows, "disagreement": None, "sources": sources, "kind": "cuda"}
    return found | {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-24"} | changes


def side(name, median, spread=0.1):
    return {"side": name, "median_ms": median, "low_ms": median - spread, "high_ms": median + spread}


def write(path, found, dtype="float32"):
    path.write_text(json.dumps({f"correlation_loss {dtype}": found, "text_tower float32": {}}))
    return path


def test_the_fastest_backend_is_chosen_first(tmp_path):
    path = write(tmp_path / "compare.json", result(), "bfloat16")
    assert choose.choices(path) == [
        'Choice("correlation_loss", "NVIDIA H100 80GB HBM3", "bfloat16", ("triton", "cuda", "reference"), '
        f'"{path} 2026-11-24"),'
    ]


def test_backends_as_fast_as_each_other_stand_in_a_fixed_order():
    rows = [side("backend=triton", 2.0), side("backend=cuda", 2.1), side("backend=reference", 2.25)]
    assert choose.fastest_first(rows) == ["cuda", "triton", "reference"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cpu"}, "correlation_loss float32 was measured on a CPU; takes a GPU's results"),
        ({"sources": "0"}, "correlation_loss float32 is stale: a file whose speed it measures has changed"),
        ({"disagreement": "a and b disagree"}, "correlation_loss float32 cannot be trusted: a and b disagree"),
    ],
)
def test_results_that_say_nothing_are_refused_in_one_line(changes, message, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "compare.json", result(**changes))
    monkeypatch.setattr("sys.argv", ["bench.choose", str(path)])
    assert choose.main() == 1
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith(f"{path}: {message}")
    assert said.err.count("\n") == 1


def test_the_page_shows_the_hosts_time_where_it_was_measured():
    row = {"side": "fused", "note": "", "median_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "ratio": 1.0, "target": None}
    row |= {"error": 0.0, "peak_mb": 2.0, "limit_ms": None}
    about = {"what": "added", "disagreement": None, "command": "c --device cuda", "device": "GPU", "torch": "2.11"}
    about |= {"python": "3.12", "date": "2026-11-24"}
    plain = report.compare_section({"added float32": about | {"rows": [row]}})
    assert not any("host" in line for line in plain)
    with_host = report.compare_section({"added float32": about | {"rows": [row | {"host_us": 80.2}, row]}})
    assert [line.split(" | ")[-1] for line in with_host[2:6]] == ["host |", with_host[3], "80 µs |", " |"]


def test_the_page_leads_with_the_fastest_of_the_other_sides(tmp_path, monkeypatch):
    ratios = {
        "open_clip": (1.7, 1.2),
        "with F.sdpa": (0.98, None),
        "ours, recomputed": (0.9, None),
        "ours": (1.0, None),
    }
    rows = [
        {"side": name, "note": "", "ratio": ratio, "target": target, "peak_mb": 2.0}
        for name, (ratio, target) in ratios.items()
    ]
    results = {"tower float32": {"what": "a tower", "disagreement": None, "rows": rows}}
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "compare.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    against = [line.split(" | ")[1:3] for line in report.overview_table()[2:]]
    assert against == [["with F.sdpa", "0.98×"], ["open_clip", "1.70×"]]


@pytest.mark.parametrize(("module", "measuring", "kept"), [(steps, "measure", "rows"), (scaling, "timer", "points")])
def test_a_run_that_is_cut_off_keeps_what_it_has(module, measuring, kept, monkeypatch, tmp_path):
    whole, calls = getattr(module, measuring), []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    path = tmp_path / "results.json"
    monkeypatch.setattr(rehearsal, "_on", False)
    monkeypatch.setattr(module, measuring, once)
    monkeypatch.setattr("sys.argv", ["bench", "--rehearse", "--device", "cpu", "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert len(json.loads(path.read_text())[kept]) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        ("nonsense", "cannot be read as results of bench.compare"),
        ("[]", "holds no results of bench.compare"),
        ('{"a": 1}', "holds no results of bench.compare"),
        ("{}", "compares none of direction_logits"),
    ],
)
def test_a_file_that_holds_no_results_is_named_in_one_line(content, says, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("sys.argv", ["bench.choose", str(path)])
    assert choose.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: {says}")
