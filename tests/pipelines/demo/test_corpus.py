"""The generated corpus: picture and sound match the scene, also on disk.

Sound is checked with Fourier spectra against the designed partials, pictures against the colours of the
shapes, files by decoding them with ffmpeg and reading them with the corpus adapter.
"""

import subprocess
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.demo.captions import AUDIO_GROUPS, VISION_GROUPS, audio_labels, caption, vision_labels
from r2scp.pipelines.demo.corpus import generate, split_of
from r2scp.pipelines.demo.questions import make_questions
from r2scp.pipelines.demo.render import FPS, LOOKS, PLAYER_H, PLAYER_W, render_frame
from r2scp.pipelines.demo.scene import Part, Scene, make_scene
from r2scp.pipelines.demo.sound import SAMPLE_RATE, TIMBRES, render_audio, tone
from r2scp.pipelines.demo.world import ENSEMBLES, INSTRUMENTS, OFFSTAGE, PLACES, SECONDS, Room, make_world
from r2scp.store.errors import CorpusError

SEED = 11
CLIPS = 12
QUIET_ROOM = Room(reverb=0, whine=0, air=0, flutter=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "corpus"
    report = generate(root, clips=CLIPS, seed=SEED, workers=2)
    assert (report.clips, report.written) == (CLIPS, CLIPS)
    return root


def part(
    instrument: str, *, start: int = 0, end: int = SECONDS, loudness: int = 0, place: str = "middle"
) -> Part:
    return Part(
        instrument=instrument,
        place=place,
        start=start,
        end=end,
        loudness=loudness,
        rate=0,
        move_start=start,
        move_end=end,
    )


def stage(*parts: Part) -> Scene:
    return replace(make_scene(SEED, 0), parts=parts, room=QUIET_ROOM, voice_start=0, voice_end=0)


def band_energy(wave: np.ndarray, low_hz: float, high_hz: float) -> float:
    power = np.square(np.abs(np.fft.rfft(wave)))
    hz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    return float(power[(hz >= low_hz) & (hz < high_hz)].sum())


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    forward = [make_scene(SEED, index) for index in range(20)]
    make_world.cache_clear()
    assert [make_scene(SEED, index) for index in reversed(range(20))] == forward[::-1]
    assert make_scene(SEED + 1, 0) != make_scene(SEED, 0)
    assert make_questions(forward[3]) == make_questions(make_scene(SEED, 3))
    assert np.array_equal(render_audio(forward[3]), render_audio(make_scene(SEED, 3)))
    assert np.array_equal(render_frame(forward[3], 4.5), render_frame(make_scene(SEED, 3), 4.5))


def test_ensembles_have_a_long_tail_and_share_line_ups() -> None:
    drawn = Counter(make_scene(SEED, index).ensemble for index in range(3000))
    counts = sorted((drawn[i] for i in range(ENSEMBLES)), reverse=True)
    assert counts[0] > 100
    assert 2 <= np.median(counts) <= 8
    visible = defaultdict(list)
    for ensemble in make_world(SEED).ensembles:
        visible[tuple((m.instrument, m.place) for m in ensemble.members)].append(ensemble)
    shared = [group for group in visible.values() if len(group) > 1]
    assert sum(len(group) for group in shared) > 0.9 * ENSEMBLES
    differ = [len({(*(m.sounds for m in e.members), e.has_guest) for e in group}) > 1 for group in shared]
    assert np.mean(differ) > 0.8  # what is seen does not determine what is heard


def test_shows_keep_their_habits_most_of_the_time() -> None:
    kept = []
    for index in range(2000):
        scene = make_scene(SEED, index)
        ensemble = make_world(SEED).ensembles[scene.ensemble]
        kept.append((scene.voice_end > scene.voice_start) == ensemble.voiceover)
    assert 0.82 < np.mean(kept) < 0.88
    assert 0.90 < np.mean([make_scene(SEED, index).at_home for index in range(2000)]) < 0.94


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_a_tone_has_the_spectrum_it_was_designed_with(instrument: str) -> None:
    timbre = TIMBRES[instrument]
    hz = timbre.low_hz * 1.2
    wave = tone(instrument, hz, 1.0, np.random.default_rng(0))
    assert np.sqrt(np.mean(wave**2)) == pytest.approx(1.0, abs=1e-3)
    width = 12.0 + hz * 2 * timbre.vibrato[1] * max(ratio for ratio, _ in timbre.partials)
    regions = [(ratio * hz - width, ratio * hz + width) for ratio, _ in timbre.partials]
    if timbre.noise[2]:
        regions.append(timbre.noise[:2])
    inside = np.zeros(len(wave) // 2 + 1, bool)
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    for low, high in regions:
        inside |= (frequency >= low) & (frequency <= high)
    power = np.abs(np.fft.rfft(wave)) ** 2
    assert power[inside].sum() > 0.9 * power.sum()
    strongest = max(timbre.partials, key=lambda partial: partial[1])[0] * hz
    if not timbre.noise[2] or timbre.noise[2] < 0.1:
        assert band_energy(wave, strongest - width, strongest + width) > 0.1 * power.sum()


def test_all_timbres_differ_from_each_other() -> None:
    edges = np.geomspace(30, 8000, 25)
    spectra = []
    for instrument in INSTRUMENTS:
        wave = render_audio(stage(part(instrument)))[: 4 * SAMPLE_RATE]
        spectra.append([np.sqrt(band_energy(wave, *edge)) for edge in pairwise(edges)])
    unit = np.array(spectra) / np.linalg.norm(spectra, axis=1, keepdims=True)
    similarity = unit @ unit.T - np.eye(len(INSTRUMENTS))
    assert similarity.max() < 0.97


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_a_part_sounds_in_its_seconds_and_is_silent_in_the_others(instrument: str) -> None:
    wave = render_audio(stage(part(instrument, start=3, end=7)))
    rms = np.sqrt(np.square(wave.reshape(SECONDS, SAMPLE_RATE)).mean(axis=1))
    assert np.flatnonzero(rms > 0.02).tolist() == [3, 4, 5, 6]
    assert rms[[0, 1, 2, 7, 8, 9]].max() < 0.006  # the ambience


def test_each_loudness_step_is_six_decibels() -> None:
    levels = [np.std(render_audio(stage(part("clarinet", loudness=rank)))) for rank in range(3)]
    steps_db = 20 * np.log10(np.array(levels[:-1]) / levels[1:])
    assert steps_db == pytest.approx([6.0, 6.0], abs=0.3)


def test_an_off_stage_part_is_heard_and_not_seen() -> None:
    hidden = stage(part("piano", place=OFFSTAGE))
    assert np.array_equal(render_frame(hidden, 2.5), render_frame(stage(), 2.5))
    assert np.std(render_audio(hidden)) > 10 * np.std(render_audio(stage()))


@pytest.mark.parametrize(("instrument", "place"), list(zip(INSTRUMENTS, 4 * PLACES, strict=True)))
def test_a_player_is_drawn_at_its_place_in_the_colours_of_its_instrument(instrument: str, place: str) -> None:
    lit = replace(stage(part(instrument, place=place)), light=1.0)
    empty = replace(stage(), light=1.0)
    frame = render_frame(lit, 4.5)
    changed = np.argwhere((frame != render_frame(empty, 4.5)).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert (left + right) / 2 == pytest.approx({"left": 40, "middle": 112, "right": 184}[place], abs=20)
    assert right - left <= PLAYER_W
    assert bottom - top <= PLAYER_H
    colour = max(LOOKS[instrument], key=lambda shape: shape.w * shape.h).colour
    near = np.abs(frame[changed[:, 0], changed[:, 1]].astype(int) - colour).max(axis=1) < 12
    assert near.sum() > 60


def test_only_a_player_who_moves_changes_from_second_to_second() -> None:
    still = replace(part("accordion", place="left"), move_start=0, move_end=0)
    mover = part("violin", place="right", start=2, end=9)
    frames = [render_frame(stage(still, mover), second + 0.5).astype(int) for second in (0, 1, 3, 4)]
    assert np.array_equal(frames[0], frames[1])
    assert np.abs(frames[2] - frames[3])[:, 144:].max() > 50
    assert np.array_equal(frames[2][:, :76], frames[0][:, :76])


def test_labels_and_captions_are_true_of_their_second() -> None:
    parts = (
        part("violin", place="left", start=2, end=9),
        replace(part("drum", place="right"), start=0, end=0, loudness=-1, move_start=0, move_end=0),
        part("flute", place=OFFSTAGE, start=4, loudness=1),
    )
    scene = stage(*parts)
    seen = caption(VISION_GROUPS, vision_labels(scene, 5), range(len(VISION_GROUPS)))
    heard = caption(AUDIO_GROUPS, audio_labels(scene, 5), range(len(AUDIO_GROUPS)))
    for phrase in ("violin on the left", "nothing in the middle", "drum on the right"):
        assert phrase in seen
    for phrase in (
        "two instruments on stage",
        "player on the left is moving",
        "player on the right is still",
    ):
        assert phrase in seen
    for phrase in ("loud violin sound", "medium flute sound", "no drum sound", "the violin is the loudest"):
        assert phrase in heard
    assert "silence" in caption(AUDIO_GROUPS, audio_labels(scene, 1), range(len(AUDIO_GROUPS)))


def test_clips_decode_to_ten_seconds_of_what_was_rendered(corpus: Path) -> None:
    scene = make_scene(SEED, 4)
    path = str(corpus / "videos" / f"{scene.video_id}.mp4")
    ffmpeg = [get_ffmpeg_exe(), "-v", "error", "-i", path]

    def decoded(*options: str) -> bytes:
        return subprocess.run([*ffmpeg, *options, "pipe:1"], capture_output=True, check=True).stdout

    frames = np.frombuffer(decoded("-f", "rawvideo", "-pix_fmt", "rgb24"), np.uint8).reshape(-1, 224, 224, 3)
    assert len(frames) == SECONDS * FPS
    for second in (0, 5, 9):
        middle = frames[second * FPS + FPS // 2].astype(int)
        assert np.abs(middle - render_frame(scene, second + 0.5)).mean() < 8
    wave = np.frombuffer(decoded("-f", "f32le", "-ac", "1"), np.float32)
    assert len(wave) == pytest.approx(SECONDS * SAMPLE_RATE, abs=1100)
    rendered = render_audio(scene)
    assert np.corrcoef(wave[: len(rendered)], rendered[: len(wave)])[0, 1] > 0.99


def test_the_corpus_adapter_reads_it(corpus: Path) -> None:
    opened = open_corpus("demo", corpus)
    clips, read = list(opened.clips()), list(opened.questions())
    assert sorted(clip.video_id for clip in clips) == [make_scene(SEED, i).video_id for i in range(CLIPS)]
    assert all(clip.uri and Path(clip.uri).is_file() for clip in clips)
    assert {clip.video_id: clip.split for clip in clips} == {
        make_scene(SEED, i).video_id: split_of(i) for i in range(CLIPS)
    }
    rows = [row for index in range(CLIPS) for row in make_questions(make_scene(SEED, index))]
    assert len(read) == len({question.question_id for question in read}) == len(rows)
    assert Counter(question.answer for question in read) == Counter(row["anser"] for row in rows)
    assert all("<" not in question.question for question in read)


def test_a_second_call_writes_only_what_is_missing(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert generate(corpus, clips=CLIPS, seed=SEED).written == 0
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    lost = corpus / "videos" / f"{make_scene(SEED, 2).video_id}.mp4"
    content = lost.read_bytes()
    lost.unlink()
    assert generate(corpus, clips=CLIPS, seed=SEED).written == 1
    assert lost.read_bytes() == content


def test_a_used_folder_is_rejected(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="another demo corpus"):
        generate(corpus, clips=CLIPS + 1, seed=SEED)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(CorpusError, match="new or empty folder"):
        generate(tmp_path, clips=2, seed=SEED)
    with pytest.raises(CorpusError, match="clips ≥ 1"):
        generate(tmp_path / "new", clips=0, seed=SEED)
    assert not (tmp_path / "new").exists()
