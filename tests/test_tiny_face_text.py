"""How the text tower of tiny-face learns: its captions, and that nothing but the text tower is trained."""

import random

import pytest
import torch
from safetensors.torch import load_file

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.synthetic.captions import EMOTION_WORDS, UNIT_PHRASES, UNSEEN_TEMPLATES
from pcmecl_fast.synthetic.tiny_face_text import TextConfig, describe, emotion_sentence, strewn, train


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_sentences_name_the_emotion_and_are_not_among_the_test_wordings(emotion):
    words = random.Random(0)
    unseen = {template.format(word) for template in UNSEEN_TEMPLATES for word in EMOTION_WORDS[emotion]}
    sentences = {emotion_sentence(emotion, words) for _ in range(500)}
    assert len(sentences) > 200
    assert all(any(word in sentence for word in EMOTION_WORDS[emotion]) for sentence in sentences)
    assert not sentences & unseen


def test_details_come_before_the_emotion_as_well_as_after():
    words, faces = random.Random(1), SyntheticFaces(2, clips=1, frames_per_clip=1)
    index = int((faces.emotion_index == EMOTIONS.index("happy")).nonzero()[0, 0])
    captions = [describe(faces, index, words) for _ in range(300)]
    smile = UNIT_PHRASES["lip_corner_pull"]
    places = [
        caption.index(smile) < caption.index(word)
        for caption in captions
        for word in EMOTION_WORDS["happy"]
        if smile in caption and word in caption
    ]
    assert 0.2 < sum(places) / len(places) < 0.9
    assert any(smile in caption and not any(w in caption for w in EMOTION_WORDS["happy"]) for caption in captions)


def test_unrelated_words_describe_no_face_and_name_no_emotion():
    words = random.Random(2)
    added = {word for _ in range(300) for word in strewn("", words, 1.0).split()}
    assert len(added) > 200
    assert not added & {"smile", "brows", "left", "right", "slight", "strong", "hair", "happy", "sad"}
    assert strewn("a happy face", words, 0.0) == "a happy face"


def test_training_changes_the_text_tower_only(tmp_path):
    accuracy = train(TextConfig(steps=2, batch=4, individuals=2, views=1, out=tmp_path))
    before, after = (load_file(folder / "tiny-face.safetensors") for folder in (ASSETS, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("visual") for name in changed)
    assert 0.5 < accuracy <= 1
