"""The report of prompts says of each individual whether changes find their text, and what is taken for what."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pcmecl_fast import PersonalizedPrompts, PromptBank, load_clip
from pcmecl_fast.commands import run_command
from pcmecl_fast.evaluate.changes import Changes, _retrieved, change_view, changes_table
from pcmecl_fast.evaluate.metrics import draw_trials
from pcmecl_fast.synthetic import SyntheticFaces


def test_a_change_is_found_where_its_text_is_the_closest():
    text = torch.eye(4)
    assert _retrieved(2 * text + 3, text, torch.ones(4, dtype=torch.bool)) == (12, 12)
    swapped = text[[0, 2, 1, 3]]
    assert _retrieved(swapped, text, torch.ones(4, dtype=torch.bool)) == (6, 12)  # those to 0 and to 3
    assert _retrieved(text, text, torch.tensor([True, False, False, True])) == (2, 2)
    assert _retrieved(text, text, torch.tensor([True, False, False, False])) == (0, 0)


def test_drawn_people_are_seen_one_by_one():
    clip = load_clip()
    faces = SyntheticFaces(
        3, emotions=["neutral", "happy", "sad"], clips=1, frames_per_clip=2, missing=[(2, 1), (2, 2)]
    )
    prompts = PersonalizedPrompts(clip, faces.emotions)
    bank = PromptBank.build(prompts, torch.zeros(3, clip.embed_dim), faces.individuals, faces.emotions, clip=clip)
    found = change_view(clip, bank, faces, draw_trials(faces, len(faces)))
    assert found.individuals == faces.individuals
    assert found.changes == [6, 6, 0]
    assert found.confusion.sum(1).tolist() == [6, 4, 4]
    # The same with everything at once.
    features = F.normalize(clip.encode_image(faces.frames(range(len(faces)))), dim=-1)
    named = (features @ bank.features[0].float().T).argmax(1)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    expected.index_put_((faces.emotion_index, named), torch.tensor(1), accumulate=True)
    assert torch.equal(found.confusion, expected)


def test_the_table_has_the_weakest_first_and_leaves_out_who_has_no_changes():
    changes = Changes(["a", "b", "c"], ["x", "y", "z"], [5, 1, 0], [6, 6, 0], torch.zeros(3, 3))
    table = changes_table(changes)
    assert [(row.name, row.cells[0].text) for row in table.rows] == [("y", "16.7 %"), ("x", "83.3 %")]
    assert "50 % find their text; guessing finds 50 %" in table.note
    assert not changes_table(Changes(["a"], ["x"], [0], [0], torch.zeros(1, 1))).rows


def test_the_report_shows_them(tmp_path):
    words = ["--individuals", "3", "--clips", "1", "--frames-per-clip", "1", "--size", "32", "--steps", "1"]
    assert run_command(["prompts", *words, "--out", str(tmp_path / "p")]) == 0
    page = (tmp_path / "p/report.html").read_text()
    assert "Changes that find their text, by individual" in page
    assert "What is taken for what" in page
