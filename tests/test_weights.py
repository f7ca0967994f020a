"""CLIP's weights from files: OpenAI's archives and everybody's state dicts, of which nothing but tensors is read."""

import io
import logging
import os
import pickle
import zipfile

import open_clip
import pytest
import torch
from architectures import register
from open_clip.pretrained import _pcfg
from safetensors.torch import save_file
from torch import nn

from pcmecl_fast import load_clip
from pcmecl_fast.weights import OPENAI_EXTRAS, read_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of what it traces


@pytest.fixture
def model(monkeypatch):
    """A tiny model with quick-GELU, as OpenAI's are, under a name that has a tag."""
    register(monkeypatch, "tiny", {"some": _pcfg()}, quick_gelu=True)
    torch.manual_seed(0)
    return open_clip.create_model("tiny", pretrained=None).eval()


@pytest.fixture
def archive(model, tmp_path):
    """A stand-in for OpenAI's ViT-B-32.pt: traced, with its three numbers, and a mask that is no weight."""
    for name in OPENAI_EXTRAS:
        delattr(model, name) if hasattr(model, name) else None
        model.register_buffer(name, torch.tensor(32))
    traced = torch.jit.trace(model, (torch.randn(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long)), check_trace=False)
    torch.jit.save(traced, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def without_extras(model):
    return {key: value for key, value in model.state_dict().items() if key not in OPENAI_EXTRAS}


def assert_holds(clip, model):
    state, expected = clip.model.state_dict(), without_extras(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_openais_archive_loads(model, archive, caplog):
    assert set(torch.jit.load(archive).state_dict()) >= OPENAI_EXTRAS
    caplog.clear()
    clip = load_clip("tiny", str(archive))
    assert_holds(clip, model)
    assert not caplog.records


def test_a_scripted_archive_in_half_precision_keeps_its_buffers_and_leaves_out_plain_tensors(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4).t())
            self.register_buffer("mean", torch.arange(3))
            self.mask = torch.ones(2)
            self.sizes = [1, 2]

        def forward(self, x: torch.Tensor):
            return x @ self.weight + self.mask.sum()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Inner(), Inner()])
            self.scale = nn.Parameter(torch.ones([]))
            self.empty = nn.Parameter(torch.empty(0, 3))

        def forward(self, x: torch.Tensor):
            return self.layers[0](x) * self.scale

    script = torch.jit.script(Outer().half())
    torch.jit.save(script, tmp_path / "x.pt")
    read, openai = read_weights(tmp_path / "x.pt")
    expected = script.state_dict()
    assert not openai
    assert read.keys() == expected.keys()
    assert all(read[key].dtype == value.dtype and torch.equal(read[key], value) for key, value in expected.items())


def test_an_archives_code_never_runs(archive, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the archive's code is set up"))
    load_clip("tiny", str(archive))


@pytest.mark.parametrize("place", ["archive", "state dict", "old state dict"])
def test_a_file_that_would_run_code_is_refused_in_one_line(model, archive, tmp_path, place):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "trap.pt"
    if place == "archive":
        with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(path, "w") as changed:
            for name in whole.namelist():
                content = pickle.dumps(Trap(), protocol=2) if name.endswith("/data.pkl") else whole.read(name)
                changed.writestr(name, content)
    else:
        torch.save({"weight": Trap()}, path, _use_new_zipfile_serialization=place == "state dict")
    with pytest.raises(RuntimeError) as caught:
        load_clip("tiny", str(path))
    assert not (tmp_path / "trapped").exists()
    message = str(caught.value)
    assert "\n" not in message
    assert ".mkdir" in message
    if place != "archive":
        assert "where you trust the file, make a state dict of it: python -c" in message
        assert "add_safe_globals" not in message


@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "parallel", "both"])
def test_state_dicts_with_openais_extra_keys_load(model, tmp_path, wrap):
    state = {"input_resolution": 32, "context_length": torch.tensor(77), "vocab_size": 49408, **model.state_dict()}
    if wrap in ("parallel", "both"):
        state = {f"module.{key}": value for key, value in state.items()}
    if wrap in ("checkpoint", "both"):
        state = {"epoch": 3, "state_dict": state}
    torch.save(state, tmp_path / "weights.pt")
    assert_holds(load_clip("tiny", str(tmp_path / "weights.pt")), model)


def test_safetensors_load(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert_holds(load_clip("tiny", str(tmp_path / "weights.safetensors")), model)


def test_openais_file_under_an_architecture_with_another_activation_is_pointed_out(monkeypatch, archive, caplog):
    register(monkeypatch, "plain", {"some": _pcfg()})
    register(monkeypatch, "plain-quickgelu", {"some": _pcfg()}, quick_gelu=True)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pcmecl_fast"):
        load_clip("plain", str(archive))
    (record,) = caplog.records
    said = f"{archive} is OpenAI's, made for quick-GELU, and plain has another activation: load it as plain-quickgelu"
    assert record.getMessage() == said


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ValueError: it ends too early to hold weights"),
        (b"not weights", "ValueError: torch.load finds no weights in it"),
        (saved([1, 2]), "ValueError: it holds a list, not the names and tensors of a state dict"),
        (saved({}), "ValueError: it holds a dict, not the names and tensors"),
        (saved({"a": torch.ones(1), "b": 3}), "ValueError: its 'b' is a int; a state dict has names and tensors alone"),
        (
            saved({"a": torch.ones(1)}),
            r'Missing key\(s\) in state_dict: "[\w.]+", "[\w.]+" and \d+ more. Unexpected key',
        ),
    ],
    ids=["empty", "text", "list", "nothing", "number", "strange keys"],
)
def test_the_cause_is_whole_and_on_one_line(model, tmp_path, content, says):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=says) as caught:
        load_clip("tiny", str(path))
    message = str(caught.value)
    assert message.startswith(f"pretrained: the weights '{path}' of 'tiny' could not be loaded (")
    assert "\n" not in message
    assert len(message) < 600


def test_weights_of_another_size_name_the_first_tensors(monkeypatch, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    register(monkeypatch, "wider", {"some": _pcfg()}, vision={"width": 48, "head_width": 16})
    with pytest.raises(
        RuntimeError, match=r"size mismatch for visual.* copying .* size mismatch for .* more"
    ) as caught:
        load_clip("wider", str(tmp_path / "weights.pt"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
