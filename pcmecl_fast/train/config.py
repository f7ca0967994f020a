"""The options of every command: typed defaults that become command lines and config files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pcmecl_fast.machine import default_workers
from pcmecl_fast.options import option_name
from pcmecl_fast.train.limits import LIMITS

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]

_FREE = "out resume overwrite checkpoint_every device backend cuda_graphs features workers accumulate"
FREE_ON_RESUME = frozenset(_FREE.split())
"""Where a run is kept, on what it runs and how often it saves: what may change between a kill and the resumption."""

Run = TypeVar("Run", bound="RunConfig")


@dataclass
class DataConfig:
    """Which frames to use."""

    data: str = "synthetic"
    """"synthetic" (drawn talking faces), a folder that `pcmecl-fast prepare` made, or any laid out as
    `<individual>/<emotion>/*.jpg|png|webp|mp4 …`."""
    size: int | None = None
    """Side in pixels that frames are resized to; by default 64 where they are drawn, and 256 from a folder."""
    emotions: list[str] | None = None
    """Emotions to use, in this order; by default those in the data."""
    individuals: int = 200
    """synthetic: how many people to draw for training."""
    clips: int = 2
    """synthetic: clips for each individual and emotion."""
    frames_per_clip: int = 2
    """synthetic: frames per clip."""
    missing: int = 0
    """synthetic: emotions (other than neutral) that each individual lacks in training."""
    split: Literal["clip", "individual", "frame", "mead"] = "clip"
    """folder: what is held out as a whole. clip: never frames of one clip on both sides; individual: people never seen
    in training; mead: MEAD's own test clips."""
    holdout: float = 0.2
    """folder: the fraction of the clips, individuals or frames held out for evaluation."""
    skip_broken: bool = False
    """folder: skip unreadable files with a warning that names them, instead of stopping."""
    workers: int | None = None
    """Processes that read frames ahead; by default none where frames are drawn, and from a folder one for each core, at
    most 4. Results do not depend on it."""

    @property
    def side(self) -> int:
        """`size`, or its default for this data."""
        return self.size or (64 if self.data == "synthetic" else 256)

    @property
    def readers(self) -> int:
        """`workers`, or its default for this data."""
        if self.workers is not None:
            return self.workers
        return 0 if self.data == "synthetic" else default_workers()


@dataclass
class RunConfig(DataConfig):
    """Where and how a run runs."""

    clip: str = "tiny-face"
    """tiny-face (built in) or any open_clip model name, such as ViT-B-32."""
    clip_pretrained: str | None = None
    """An open_clip weights tag (openai, laion2b_s34b_b79k …) or a checkpoint file."""
    clip_like: str | None = None
    """The weights tag whose preprocessing a checkpoint file follows, where the tags of --clip differ."""
    tower_dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Data type of CLIP's frozen towers; features, prompts and losses stay in float32. auto takes bfloat16 where the
    device is fast in it, else float32."""
    seed: int = 0
    """Seed of the data, the weights and the order of the batches."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    backend: Backend | None = None
    """Implementation of every operator, "reference" being plain PyTorch; by default what the variable PCMECL_BACKEND
    says, or else auto, the fastest that runs here."""
    features: Path | None = None
    """Folder of image features, to share them between runs; by default `features` inside the output folder. The
    reference backend does not use it."""
    features_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the stored features."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Autocast of the towers and the networks; the operators stay in float32."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder."""
    overwrite: bool = False
    """Replace the run that is in the output folder."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    out: Path = Path("runs")
    """Output folder."""

    command: ClassVar[str] = ""

    @property
    def features_folder(self) -> Path:
        return self.out / "features" if self.features is None else self.features

    def located(self: Run) -> Run:
        """The same with whole paths and the towers' dtype by its name, so that the configuration says what was done
        and where things are wherever it is read."""
        from pcmecl_fast.towers.precision import tower_dtype  # here, because it imports PyTorch

        places: dict[str, Any] = {
            name: Path(_whole(value))
            for name in ("features", "prompts")
            if (value := getattr(self, name, None)) is not None
        }
        if self.data != "synthetic":
            places["data"] = _whole(self.data)
        if self.clip_pretrained is not None and os.path.isfile(os.path.expanduser(self.clip_pretrained)):
            places["clip_pretrained"] = _whole(self.clip_pretrained)
        dtype = tower_dtype(self.tower_dtype, device_named(self.device))
        places["tower_dtype"] = str(dtype).removeprefix("torch.")
        return replace(self, size=self.side, **places)

    def what_counts(self) -> dict[str, Any]:
        """The options that change the result: a run is resumed only where they are the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE_ON_RESUME}


def _whole(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


@dataclass
class PromptsOptions:
    """Stage 1: what the prompts are and how they are learned."""

    descriptions: list[str] | None = None
    """One name or sentence for each emotion, in order; by default the emotions' names."""
    n_ctx: int = 8
    """M, the number of learned context tokens."""
    context: Literal["shared", "per-emotion"] = "shared"
    """One context for all emotions (CoCoOp) or one for each (CDRL)."""
    condition: Literal["individual", "frame", "none"] = "individual"
    """What personalizes a prompt: the mean of an individual's features, or those of one frame; none: the same prompts
    for all (CoOp, CDRL), for which --negatives distinct is right."""
    ending: str = ""
    """What follows each description in its prompt: "." as in CoOp and CoCoOp."""
    prompt_lr: float = 5e-3
    """Learning rate of V and h (AdamW)."""
    batch_individuals: int = 16
    """Individuals per step, over all ranks, each with all the emotions they have."""
    lambda_diff: float = 1.0
    """Weight of the correlation of differences, relative to the matching loss."""
    negatives: Literal["all", "within", "distinct"] = "all"
    """Which other changes of emotion count as negatives."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph: auto does so on a GPU if the step can be captured, and never on a CPU."""


@dataclass
class EditingOptions:
    """Stage 2: which generator, and how it is trained."""

    generator: str = "warp-paint"
    """warp-paint or warp-fields (built in), or your own as package.module:Class: docs/generators.md shows how to write
    one."""
    generator_options: dict[str, Any] = field(default_factory=dict)
    """The generator's own options: docs/generators.md lists those of the built-in ones."""
    batch: int = 24
    """Frames a step, over all ranks."""
    batch_early: int = 0
    """Frames a step in the first half of the steps, where fewer may do; 0: as many as later."""
    accumulate: int = 1
    """Parts that a step's frames are taken in, one after the other, for batches larger than memory."""
    optimizer: Literal["adam", "muon"] = "adam"
    """How the layers of the generator learn; all else learns by Adam. `demo` takes muon, which is measured on drawn
    faces alone."""
    lr: float = 3e-3
    """Learning rate of the generator."""
    critic_lr: float = 4e-4
    """Learning rate of the critic of patches."""
    emotion_lr: float = 2e-3
    """Learning rate of the critics that know the emotion."""
    emotion_fakes: float = 0.25
    """How far edits count against their target in these critics' loss; 0: they learn from real frames alone."""
    average: float = 0.95
    """Decay of the running average of the generator's weights, which is evaluated and saved; 0: the last weights."""
    contrast: float = 0.5
    """Weight of the contrast with other emotions inside PCMECL's loss."""
    min_change: float = 0.1
    """Length of a change of unit features up to which its cosine grows with it: keeps tiny edits' gradients calm."""
    strength: float = 0.4
    """Weight of the penalty inside PCMECL's loss on edits that fall short of real changes."""
    lengths: Literal["individual", "everybody"] = "individual"
    """Whose changes set how far to go: each individual's own or everyone's, as always with condition "frame"."""
    jitter: float = 0.06
    """Strength of the random shift, zoom, noise and mirroring applied to both frames before CLIP; 0 turns it off."""
    views: int = 0
    """How many such views each frame has: CLIP looks at each of a source once, and its features are kept, which pays
    where they are drawn again, in long runs with large towers. 0: a new one every time."""
    w_pcmecl: float = 7.0
    """Weight of PCMECL's loss."""
    w_adversarial: float = 0.5
    """Weight of looking like a real frame."""
    w_emotion: float = 0.0
    """Weight of being named as the target emotion by a critic that learns it from the labelled frames; `demo` takes
    3, which is measured on drawn faces alone."""
    w_emotion_mouth: float = 0.0
    """Weight of the mouth alone being named as the target emotion, by a critic of mouths: asks for teeth where they
    belong; `demo` takes 3. Mouths are what is in --mouth-box and a good width beside it."""
    emotion_mouth_early: float = 1.0
    """How many times that weight counts in the first half of the steps, before it falls to once: for teeth."""
    w_cycle: float = 0.0
    """Weight of editing back to the source (L1); takes a second pass of the generator."""
    w_reconstruction: float = 20.0
    """Weight of leaving a frame unchanged when its own emotion is the target (L1)."""
    w_recognition: float = 1.0
    """Weight of recognising the source's emotion (cross entropy), which the generator needs to know."""
    w_person: float = 5.0
    """Drawn faces: weight of remaining the same person to the frozen reader."""
    w_speech: float = 60.0
    """Drawn faces: weight of unchanged speech to the frozen reader; if w_person is 0 too, compares pixels instead."""
    w_identity: float = 1.5
    """Other faces: weight of changing few pixels and keeping coarse colours and shapes."""
    w_mouth: float = 40.0
    """Other faces: weight of keeping the middle of the mouth, where speech shows."""
    keep_from: float = 0.0
    """After which part of the steps the four terms above begin to count, in full a quarter of the steps later."""
    mouth_box: list[float] = field(default_factory=lambda: [0.42, 0.62, 0.58, 0.86])
    """Left, top, right, bottom of the middle of the mouth, as fractions of the frame."""


@dataclass
class PromptsConfig(RunConfig, PromptsOptions):
    """Learn personalized prompts on a data set and write a prompt bank (stage 1)."""

    steps: int = 1000
    """Optimiser steps."""
    out: Path = Path("runs/prompts")
    """Output folder."""

    command: ClassVar[str] = "prompts"


@dataclass
class TrainConfig(RunConfig, PromptsOptions, EditingOptions):
    """Train a generator under PCMECL (stage 2); learns the prompts first if none are given."""

    steps: int = 1000
    """Optimiser steps of the generator."""
    prompts: Path | None = None
    """Output folder of `pcmecl-fast prompts`; by default the prompts are learned first, with the options above."""
    prompt_steps: int = 1000
    """Optimiser steps of the prompts, if they are learned first."""
    out: Path = Path("runs/train")
    """Output folder."""

    command: ClassVar[str] = "train"

    def stage_one(self) -> PromptsConfig:
        """Stage 1's config: the same data, features and prompts; written to `prompts` or else inside `out`."""
        shared = {f.name: getattr(self, f.name) for f in fields(PromptsConfig)}
        own = {
            "steps": self.prompt_steps,
            "features": self.features_folder,
            "out": self.prompts or self.out / "prompts",
        }
        return PromptsConfig(**shared | own)


@dataclass
class DemoConfig(TrainConfig):
    """Synthetic faces, tiny-face, both stages, evaluation and a report: everything, in a few minutes on a laptop."""

    steps: int = 1800
    """Optimiser steps of the generator."""
    batch: int = 16
    """Frames a step, over all ranks."""
    batch_early: int = 10
    """Frames a step in the first half of the steps; 0: as many as later."""
    keep_from: float = 0.4
    """After which part of the steps person and speech begin to count; their weights are full a quarter later."""
    prompt_steps: int = 600
    """Optimiser steps of the prompts."""
    optimizer: Literal["adam", "muon"] = "muon"
    """How the layers of the generator learn; `train` takes adam."""
    contrast: float = 0.1
    """Weight of the contrast with other emotions inside PCMECL's loss: less where a critic names them, too."""
    strength: float = 0.8
    """Weight of the penalty inside PCMECL's loss on edits that fall short of real changes."""
    w_pcmecl: float = 5.0
    """Weight of PCMECL's loss."""
    w_emotion: float = 3.0
    """Weight of being named as the target emotion by a critic of real frames; `train` is without."""
    w_emotion_mouth: float = 3.0
    """Weight of the mouth alone being named as the target emotion; `train` is without."""
    emotion_mouth_early: float = 4.0
    """How many times that weight counts in the first half of the steps."""
    w_speech: float = 180.0
    """Drawn faces: weight of unchanged speech to the frozen reader."""
    out: Path = Path("runs/demo")
    """Output folder."""

    command: ClassVar[str] = "demo"


@dataclass
class AblateConfig(TrainConfig):
    """Train the same generator under every supervision, and judge the edits on paired truth."""

    quick: bool = False
    """The five main supervisions, one seed, few steps: a first look."""
    only: list[str] | None = None
    """Some of the supervisions, by their names in the table: none "personalized, differencing". By default all."""
    seed: int = 0
    """The first of the seeds."""
    seeds: int = 6
    """How many seeds of data, weights and batches, for the error bars."""
    around_seeds: int = 3
    """How many of the seeds to train the variations of PCMECL with."""
    workers: int = 0
    """Parallel training runs, each in its own process; 0 means one per CPU core, at most 8, and one on a GPU."""
    quick_steps: int = 300
    """Optimiser steps of each generator with --quick."""
    steps: int = 400
    """Optimiser steps of each generator."""
    individuals: int = 12
    """How many people to draw for training: few, so that the generator can learn each one's own style."""
    clips: int = 8
    """Clips for each individual and emotion."""
    frames_per_clip: int = 4
    """Frames per clip."""
    strength: float = 2.0
    """Weight of the penalty on edits that fall short of real changes; `train` keeps the mouth still instead."""
    w_speech: float = 45.0
    """Drawn faces: weight of unchanged speech to the frozen reader, as used for the committed results."""
    generator: str = "warp-fields"
    """warp-fields (of the committed results), warp-paint, or your own as package.module:Class."""
    average: float = 0.0
    """Decay of the running average of the generator's weights; the committed results are of the last weights."""
    w_direct: float = 60.0
    """w_pcmecl under direct similarity, whose gradients are smaller."""
    out: Path = Path("runs/ablation")
    """Output folder; what is done there already is kept, and what is missing is trained."""

    command: ClassVar[str] = "ablate"
    refuses: ClassVar[tuple[str, ...]] = ("data", "missing", "prompts")  # it sets them itself for each training run


@dataclass
class PrepareConfig:
    """Cut the faces out of a raw data set, with their sound: a folder that anyone can open, and `train` in seconds."""

    data: Path
    """The folder of a raw data set."""
    layout: str = "auto"
    """How it is laid out: mead, ravdess, crema-d, ned, folder (<individual>/<emotion>/<file>); auto looks and says."""
    individuals: list[str] | None = None
    """The individuals to prepare; by default all."""
    emotions: list[str] | None = None
    """The emotions to prepare; by default all."""
    views: list[str] | None = None
    """The cameras' views to prepare, such as front; by default all."""
    levels: list[str] | None = None
    """The levels of an emotion to prepare, such as 3 or strong; neutral, which has none, stays. By default all."""
    crop: Literal["faces", "centre"] = "faces"
    """faces: found, followed through time and cut out; centre: the centred square, for recordings framed already."""
    detector: str = "dlib"
    """What finds faces; dlib needs the extra [faces]."""
    face: Literal["largest", "left"] = "largest"
    """Which of several people: the one who is large and long present, or the one on the left."""
    margin: float = 70 / 256
    """Part of the side that is not face, NED's 70 of 256 pixels by default."""
    align: Literal["none", "eyes"] = "none"
    """eyes: turned so that the eyes are level, and placed by eyes and nose."""
    every: int = 5
    """Frames from one look for faces to the next."""
    size: int = 256
    """Side of a prepared frame in pixels."""
    fps: float | None = None
    """Frames a second, such as 25 or 30; by default the recording's own, also where they vary."""
    frames: Literal["mp4", "png"] = "mp4"
    """A clip as one video, or as a folder of numbered pictures, without loss and ten times the size."""
    crf: float = 14
    """x264's quality of videos: lower is better and larger."""
    sound: Literal["keep", "need", "drop"] = "keep"
    """keep the sound where there is one, in the recording or beside it; need: a recording without is an error."""
    skip_broken: bool = False
    """Leave out recordings that are broken or show no face without ending in an error; the report names them anyway."""
    share: str | None = None
    """Prepare one of equal shares, such as 3/16, the third of sixteen: each on its own machine, into one folder or into
    folders that are copied into one. Under torchrun each process takes its own."""
    workers: int = 0
    """Processes; 0 means one for each core."""
    overwrite: bool = False
    """Prepare again what was prepared with other options, or has changed since."""
    out: Path = Path("faces")
    """Output folder; what is prepared there already is kept."""

    command: ClassVar[str] = "prepare"


@dataclass
class EvaluateConfig:
    """Evaluate a finished run of `pcmecl-fast train` or `demo` again."""

    run: Path = Path("runs/demo")
    """Output folder of the run."""
    generator: str | None = None
    """The run's generator where it is not built in, as package.module:Class: its code runs only if it is named here."""
    data: str | None = None
    """Other data than the run's own: "synthetic" or a folder with the same emotions."""
    out: Path | None = None
    """Output folder; by default `evaluation` inside the run's folder."""
    overwrite: bool = False
    """Replace the evaluation that is in the output folder."""
    seed: int = 0
    """Seed for choosing the frames and targets."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    backend: Backend | None = None
    """Implementation of every operator; by default what PCMECL_BACKEND says, or else auto."""

    command: ClassVar[str] = "evaluate"

    @property
    def folder(self) -> Path:
        return self.run / "evaluation" if self.out is None else self.out


@dataclass
class EditConfig:
    """Change the emotion in pictures or videos of any size: faces are found, edited and laid back; sound is kept."""

    input: Path
    """A picture, a video, or a folder of them."""
    emotion: str | None = None
    """The emotion to show."""
    at: str | None = None
    """The emotions to show from times on, in place of --emotion: 0:02=happy,0:07=neutral. Before the first, nothing is
    edited."""
    run: Path = Path("runs/demo")
    """Output folder of the run whose generator is used."""
    generator: str | None = None
    """The run's generator where it is not built in, as package.module:Class: its code runs only if it is named here."""
    reference: Path | None = None
    """A picture of somebody showing the emotion, for generators driven by a reference."""
    strength: float = 1.0
    """How far the edit goes: 0 not at all, 1 as the generator was trained, at most 1.5."""
    smooth: float = 0.2
    """Seconds over which edits of a video are averaged, so that they do not flicker."""
    face: Literal["largest", "left", "all"] = "largest"
    """Of several people: whose face is edited."""
    crop: Literal["auto", "faces", "centre"] = "auto"
    """What is edited: the faces that are found; centre: the centred square, for clips that are framed already. auto
    finds faces, and takes the centred square of what no detector can find: drawn faces, pictures below 80 pixels."""
    detector: str = "dlib"
    """What finds faces."""
    every: int = 5
    """Frames between two in which faces are looked for; in between, they move on a line."""
    out: Path = Path("runs/edited")
    """Output folder; talk.mp4 becomes talk.happy.mp4 there."""
    format: Literal["mp4", "mkv", "webm", "mov", "png", "jpg"] | None = None
    """Format of the edited videos or pictures; by default the input's, or mp4 and png where that cannot be written."""
    crf: float = 16.0
    """Quality of edited videos, as x264 counts it: 0 is lossless, 16 hides its traces, and 23 is x264's own default."""
    compare: bool = False
    """Also write talk.happy.compare.mp4: source and edit side by side."""
    recursive: bool = False
    """Edit what is in the subfolders of a folder too; the output folder gets the same ones."""
    resume: bool = False
    """Edit only those files of a folder whose edits are not in the output folder yet."""
    overwrite: bool = False
    """Write over files of an earlier edit."""
    seed: int = 0
    """Seed for generators that use random numbers; the built-in one uses none."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    backend: Backend | None = None
    """Implementation of the operators that a generator calls; the built-in one calls none. By default what
    PCMECL_BACKEND says, or else auto."""

    command: ClassVar[str] = "edit"


@dataclass
class MeasureConfig:
    """Measure edited clips against real ones as the field does: FAD, CSIM, LSE, identity, landmarks, pixels."""

    edited: Path
    """The folder of edited clips: videos or folders of numbered pictures, as <individual>/<emotion>/<clip>, as
    `pcmecl-fast edit` names them, or as NED, CDRL and EAT do."""
    reference: Path
    """The folder of real ones: the recordings that were edited, and faces of the same people with the emotions."""
    sound: Path | None = None
    """A folder with the clips' sound, by the same names; by default the clips' own or their recordings'."""
    protocol: Literal["cdrl", "original"] = "cdrl"
    """How LSE-D and LSE-C are taken: as CDRL and NED's papers do, or as SyncNet's authors; their values differ."""
    weights: Path | None = None
    """A folder with the networks' files as their authors publish them: resnet18_110.pth (FAD),
    EfficientFace_Trained_on_AffectNet7.pth.tar (CSIM), syncnet_v2.model (LSE), emotion_model.hdf5 (emotion)."""
    metrics: list[str] | None = None
    """Some of fad, csim, lse, identity, emotion, lmd, psnr, ssim, fid, flicker; by default all that can run."""
    every: int = 10
    """Frames from one in which the face is looked for, for identity, emotion and landmarks, to the next."""
    quick: bool = False
    """A first look, in a fraction of the time on a CPU: FAD over 300 random frames a side and emotion, LSE of 10 clips
    an emotion, PSNR and SSIM of every fifth frame, faces in half as many. The protocol says so with every number."""
    workers: int = 0
    """Processes on a CPU; 0 means one for each core. A GPU is used by one."""
    out: Path = Path("runs/measure")
    """Output folder; what is measured there already, and has not changed since, is kept."""
    seed: int = 1
    """Of the random frames that CSIM is taken over."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""

    command: ClassVar[str] = "measure"


Command = RunConfig | EvaluateConfig | EditConfig | PrepareConfig | MeasureConfig


def device_named(name: str) -> str:
    """A device as PyTorch knows it.

    Raises:
        ValueError: it cannot be used here.
    """
    import torch  # here, because the command line's help can do without

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    why = None
    try:
        kind = torch.device(name).type
        if kind == "cuda" and not torch.cuda.is_available():
            why = "this PyTorch finds no CUDA device"
        else:
            torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # from devices that it was not built for
        known = re.fullmatch(r"[a-z]+(:\d+)?", name) and name.partition(":")[0] in ("cpu", "cuda")
        why = f"not here ({str(error).partition(chr(10))[0]})" if known else "no device that this PyTorch can use"
    if why is not None:
        raise ValueError(f"--device: {name}: {why}; --device cpu runs everywhere")
    return name


def check_options(config: Command) -> None:
    """Refuse a number out of its `LIMITS`, and a device that is not here.

    Raises:
        ValueError: names the option as it is written on the command line.
    """
    for name, limits in LIMITS.items():
        given = getattr(config, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not isinstance(value, str) and value not in limits:
                raise ValueError(f"{option_name(name)}: takes {limits}, got {value}")
    box = getattr(config, "mouth_box", [0, 0, 1, 1])
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"--mouth-box: takes left, top, right and bottom, the first two the smaller, got {box}")
    if hasattr(config, "device"):
        device_named(config.device)
