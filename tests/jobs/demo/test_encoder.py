"""The shipped demo encoder recognises what is in an unseen second, and its training works as described.

All clips are of worlds used neither in training nor for the figures of the card. Thresholds are far above
chance and a little below what was measured.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import r2scp.model.imagebind
from r2scp.jobs.demo.contrasts import Contrasts, Towers, embed_frames, embed_melspecs
from r2scp.jobs.demo.encoder import CLIPS_PER_WORLD, CONFIG, RENDERED_SECONDS, Batches, Pairs, render, train
from r2scp.jobs.demo.measures import (
    Embedded,
    embed_clip,
    embed_scenes,
    keys,
    probe,
    recall,
    same_ensemble,
)
from r2scp.model.imagebind.imagebind import ImageBind
from r2scp.model.imagebind.tokenizer import Tokenizer
from r2scp.pipelines.decoding.decode import decode
from r2scp.pipelines.demo.captions import SHARED_GROUPS
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.demo.questions import TEMPLATES, fill_template
from r2scp.pipelines.demo.scene import make_scene

WEIGHTS_FILE = Path(r2scp.model.imagebind.__file__).parent / "data" / "imagebind-demo.safetensors"
WORLD = 4900  # neither trained on nor measured for the card
CLIPS = 40

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> ImageBind:
    return ImageBind.load(WEIGHTS_FILE, dtype=torch.float32)


@pytest.fixture(scope="module")
def embedded(model: ImageBind) -> Embedded:
    return embed_scenes(model, [make_scene(WORLD, index) for index in range(CLIPS)])


def test_the_file_is_small_and_has_its_card(model: ImageBind) -> None:
    assert WEIGHTS_FILE.stat().st_size <= 12_000_000
    assert model.config == CONFIG
    assert WEIGHTS_FILE.with_suffix(".md").read_text().startswith("# imagebind-demo")


def test_sound_finds_its_picture_and_picture_its_sound(embedded: Embedded) -> None:
    visual, audio = keys(embedded.visual_NTD), keys(embedded.audio_NTD)
    for queries, bank in ((visual, audio), (audio, visual)):
        assert recall(queries, bank, 1) >= 5 / CLIPS  # chance: 1 / CLIPS
        assert recall(queries, bank, 3) >= 12 / CLIPS  # chance: 3 / CLIPS


@pytest.mark.parametrize(("sense", "threshold"), [("vision", 0.8), ("audio", 0.85)])
def test_a_second_matches_the_phrases_of_its_instruments(
    model: ImageBind, embedded: Embedded, sense: str, threshold: float
) -> None:
    """Zero-shot: is "with violin" or "without violin" nearer to the embedding of the second?"""
    sequence = embedded.visual_NTD if sense == "vision" else embedded.audio_NTD
    labels = embedded.vision_labels_NTG if sense == "vision" else embedded.audio_labels_NTG
    truth = labels[..., -len(SHARED_GROUPS) :] == 1
    with torch.inference_mode():
        phrases = model.text(
            Tokenizer().encode([phrase for group in SHARED_GROUPS for phrase in group])
        ).sentence_BD
    score = (sequence @ phrases.T).unflatten(-1, (len(SHARED_GROUPS), 2))
    predicted = (score[..., 1] > score[..., 0]).numpy()
    f1 = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    assert f1 > threshold


def test_neighbours_are_of_the_same_ensemble(embedded: Embedded) -> None:
    visual, audio = keys(embedded.visual_NTD), keys(embedded.audio_NTD)
    assert same_ensemble(visual, visual, embedded.ensemble_N) > 0.7
    assert same_ensemble(audio, audio, embedded.ensemble_N) > 0.5


def test_different_questions_are_distinguishable(model: ImageBind) -> None:
    texts = [
        fill_template(template, tuple({"<Object>": name}.get(slot, "left") for slot in template.slots))
        for template in TEMPLATES
        for name in ("violin", "drum")
        if "<Object>" in template.slots or name == "violin"
    ]
    with torch.inference_mode():
        sentence = model.text(Tokenizer().encode(texts)).sentence_BD
    similarity = sentence @ sentence.T - 2 * torch.eye(len(texts))
    assert float(similarity.max()) < 0.97


def test_coded_clips_embed_as_rendered_ones_do(model: ImageBind, embedded: Embedded, tmp_path: Path) -> None:
    generate(tmp_path / "corpus", clips=3, seed=WORLD)
    for index in range(3):
        path = str(tmp_path / "corpus" / "videos" / f"{make_scene(WORLD, index).video_id}.mp4")
        clip = decode(path)
        assert clip.frames is not None
        assert clip.waveform is not None
        visual, audio = embed_clip(model, clip.frames, clip.waveform[:160_000])
        assert (visual * embedded.visual_NTD[index]).sum(dim=-1).min() > 0.95
        assert (audio * embedded.audio_NTD[index]).sum(dim=-1).min() > 0.95


# -- the training


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return render(tmp_path_factory.mktemp("pairs"), worlds=1, workers=1)


def filename(pairs: Pairs) -> str:
    assert isinstance(pairs.frames, np.memmap)
    return str(pairs.frames.filename)


def test_rendered_pairs_are_kept(pairs: Pairs, tmp_path: Path) -> None:
    assert pairs.frames.shape[:2] == (CLIPS_PER_WORLD, RENDERED_SECONDS)
    assert pairs.frames.std(axis=(2, 3, 4)).min() > 10  # every picture has something on it
    folder = Path(filename(pairs)).parent
    before = filename(pairs), (folder / "frames.npy").stat().st_mtime_ns
    again = render(folder, worlds=1, workers=1)
    assert (filename(again), (folder / "frames.npy").stat().st_mtime_ns) == before


def test_batches_draw_pairs_of_clips_of_a_world(pairs: Pairs) -> None:
    batches = Batches(pairs, 0)
    index = batches.draw()
    frames, melspecs, identical = batches.frames(index), batches.melspecs(index), batches.identical(index)
    assert frames.shape == (len(index[0]), 3, 224, 224)
    assert melspecs.shape == (len(index[0]), 1, 128, 204)
    assert identical.diagonal().all()
    assert torch.equal(identical, identical.T)
    different = torch.from_numpy(index[0][:, None] != index[0])
    assert not (identical & different).any()


def test_with_all_patches_the_result_is_that_of_the_towers(model: ImageBind) -> None:
    frames, melspecs = torch.randn(2, 3, 224, 224), torch.randn(2, 1, 128, 204)
    nearly_one = 1 - 1e-9  # keeps every patch, in the branch that drops some
    with torch.inference_mode():
        torch.testing.assert_close(
            embed_frames(model.vision, frames, nearly_one), model.vision(frames), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            embed_melspecs(model.audio, melspecs, nearly_one), model.audio(melspecs), atol=1e-4, rtol=0
        )


def test_towers_in_parallel_give_the_gradients_of_towers_in_sequence() -> None:
    torch.manual_seed(0)
    model = ImageBind(CONFIG)
    frames, melspecs = torch.randn(4, 3, 224, 224), torch.randn(4, 1, 128, 204)
    weight = torch.randn(CONFIG.dim)
    towers = Towers(model)
    outputs = towers(lambda: frames, lambda: melspecs, (1.0, 1.0))
    leaves = tuple(output.detach().requires_grad_() for output in outputs)
    (torch.stack(leaves).sum(dim=0) @ weight).sum().backward()
    towers.backward(outputs, leaves)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    ((model.vision(frames) + model.audio(melspecs)) @ weight).sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            similarity = torch.cosine_similarity(gradients[name].flatten(), parameter.grad.flatten(), dim=0)
            assert similarity > 0.98, name  # the audio tower runs in bfloat16
    assert {name.split(".")[0] for name in gradients} == {"vision", "audio"}


def test_the_pair_contrast_leaves_out_seconds_with_the_same_content() -> None:
    contrasts = Contrasts(ImageBind(CONFIG), np.random.default_rng(0))
    same = torch.nn.functional.normalize(torch.ones(2, CONFIG.dim), dim=-1)
    diagonal = torch.eye(2, dtype=torch.bool)
    assert contrasts.pair(same, same, diagonal).item() == pytest.approx(np.log(2), abs=1e-5)
    assert contrasts.pair(same, same, torch.ones(2, 2, dtype=torch.bool)).item() == pytest.approx(
        0.0, abs=1e-5
    )


def test_training_moves_all_three_towers_and_its_file_loads(pairs: Pairs, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, saved = ImageBind(CONFIG), []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, pairs, 1e-6, 0, lambda trained, step: saved.append((trained, step)))
    assert saved == [(model, 1)]  # however short, one step is taken
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.save(tmp_path / "small.safetensors", dtype=torch.float16)
    assert ImageBind.load(tmp_path / "small.safetensors").dim == CONFIG.dim


# -- the measures


def test_recall_and_same_ensemble_on_hand_made_keys() -> None:
    eye = torch.eye(4)
    assert recall(eye, eye, 1) == 1.0
    assert recall(eye, eye.roll(1, 0) + 0.5 * eye, 1) == 0.0
    assert recall(eye, eye.roll(1, 0) + 0.5 * eye, 2) == 1.0
    near = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=-1
    )
    assert same_ensemble(near, near, np.array([0, 0, 1, 1])) == 1.0
    assert same_ensemble(near, near, np.array([0, 1, 0, 1])) == 0.0
    assert same_ensemble(near, near, np.array([0, 0, 1, 2])) == 1.0  # singletons do not count


def test_the_probe_learns_what_is_linear_and_nothing_else() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=rng)
    linear = (x[:, :2] > 0).int().numpy()
    assert probe(x[:200], linear[:200], x[200:], linear[200:])["f1"] > 0.95
    noise = torch.randint(0, 2, (400, 2), generator=rng).numpy()
    assert probe(x[:200], noise[:200], x[200:], noise[200:])["exact"] < 0.5
