"""Models that need files of the Hugging Face Hub, on a machine without a network: one line, at once."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
from one_line import wrong

from pcmecl_fast import clip, hub, load_clip


@pytest.fixture
def closed(monkeypatch, tmp_path):
    """A machine without a network and without a cache, on which nothing is tried twice."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))


@pytest.mark.parametrize(
    ("load", "needs", "bring"),
    [
        (lambda: load_clip("ViT-B-32", "openai"), "'ViT-B-32' needs the weights 'openai'", "('ViT-B-32', 'openai')"),
        (
            lambda: clip._open_clip_tokenizer("ViT-B-16-SigLIP"),
            "'ViT-B-16-SigLIP' needs the tokenizer 'timm/ViT-B-16-SigLIP'",
            "('ViT-B-16-SigLIP').tokenizer",
        ),
        (
            lambda: load_clip("hf-hub:nobody/nothing"),
            "'hf-hub:nobody/nothing' needs its files",
            "('hf-hub:nobody/nothing')",
        ),
    ],
    ids=["weights", "tokenizer", "model"],
)
def test_what_cannot_be_fetched_is_named_at_once_with_the_way_to_bring_it(closed, tmp_path, load, needs, bring):
    with pytest.raises(RuntimeError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"name: {needs}, which this machine does not have, and http://127.0.0.1:9 cannot be reac")
    assert f'python -c "from pcmecl_fast import load_clip; load_clip{bring}"' in message
    assert str(tmp_path) in message
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_command_says_so_in_its_own_words(closed, capsys, tmp_path):
    line = wrong(capsys, "prompts", "--clip", "ViT-B-32", "--clip-pretrained", "openai", "--out", tmp_path / "out")
    assert line.startswith("pcmecl-fast prompts: --clip: 'ViT-B-32' needs the weights 'openai', which this machine")


def test_what_is_on_this_machine_needs_no_network(closed):
    def load():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        return "found"

    assert hub.from_hub(load, subject="name: 'x'", what="its files", bring="load_clip('x')") == "found"


def test_other_mistakes_are_not_blamed_on_the_network(closed):
    def load():
        raise ValueError("the file is broken")

    with pytest.raises(ValueError, match="the file is broken"):
        hub.from_hub(load, subject="name: 'x'", what="its files", bring="load_clip('x')")


def test_where_the_hub_answers_it_is_asked_as_ever(closed, monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *words):
            pass

    def load():
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
        raise ValueError("the file is broken")

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ValueError, match="the file is broken"):
            hub.from_hub(load, subject="name: 'x'", what="its files", bring="load_clip('x')")


def test_a_command_asks_for_the_tokenizer_before_it_works(monkeypatch):
    from pcmecl_fast import run
    from pcmecl_fast.train.config import PromptsConfig

    def refuse(name):
        raise RuntimeError(f"name: {name!r} needs its tokenizer")

    monkeypatch.setattr(clip, "_open_clip_tokenizer", refuse)
    with pytest.raises(RuntimeError, match="name: 'ViT-S-32-alt' needs its tokenizer"):
        run.load_clip_for(PromptsConfig(clip="ViT-S-32-alt", device="cpu"))


@pytest.fixture
def gateway(closed, monkeypatch):
    """A gateway that shows the hub's front page, and answers all that is behind it with a status of the test's."""
    status = [503]

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/" else status[0])
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield status
        server.shutdown()


BEHIND = {
    "SigLIP2's weights": (lambda: load_clip("ViT-B-16-SigLIP2", "webli"), "the weights 'webli'"),
    "SigLIP2's tokenizer": (lambda: clip._open_clip_tokenizer("ViT-B-16-SigLIP2"), "the tokenizer 'timm/ViT-B-16-S"),
    "CLIPA's weights": (lambda: load_clip("ViT-L-14-CLIPA", "datacomp1b"), "the weights 'datacomp1b'"),
    "CLIPA's tokenizer": (lambda: clip._open_clip_tokenizer("ViT-L-14-CLIPA"), "the tokenizer 'bert-base-uncased'"),
    "roberta": (lambda: load_clip("roberta-ViT-B-32"), "the configuration 'roberta-base' of its text tower"),
    "roberta's weights": (
        lambda: load_clip("roberta-ViT-B-32", "laion2b_s12b_b32k"),
        "the weights 'laion2b_s12b_b32k' and the configuration 'roberta-base' of its text tower",
    ),
    "a repository": (lambda: load_clip("hf-hub:nobody/nothing"), "its files"),
}


@pytest.mark.parametrize("status", [503, 504, 403, 429])
@pytest.mark.parametrize(("load", "needs"), BEHIND.values(), ids=BEHIND)
def test_a_gateway_that_hands_nothing_out_is_told_from_a_hub_at_once(gateway, load, needs, status):
    gateway[0] = status
    with pytest.raises(hub.HubError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert f" needs {needs}" in message
    assert f"cannot be reached (it answers {status})" in message
    assert "None" not in message


def test_a_tokenizer_that_does_not_load_says_so_in_one_line(closed, monkeypatch):
    def broken(name):
        raise ValueError("its file\nis broken")

    monkeypatch.setattr(clip.open_clip, "get_tokenizer", broken)
    with pytest.raises(
        RuntimeError, match=r"name: the tokenizer of 'ViT-B-16-SigLIP2' could not be loaded .* is broken"
    ):
        clip._open_clip_tokenizer("ViT-B-16-SigLIP2")
