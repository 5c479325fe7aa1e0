"""What all tests share."""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg
import pytest
import ray
import torch

from r2scp.jobs.extract import encoder_spec
from r2scp.model.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.embed import EncoderSpec
from r2scp.pipelines.flows import RAY_ENVIRONMENT

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
OBJECT_STORE_BYTES = 256 << 20  # of the Ray that the flow tests share


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real media, real annotations and reference tensors, kept beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no real media or reference tensors beside the repository (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ImageBind, small enough to embed hundreds of seconds in one, as a file."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ImageBind(
            ImageBindConfig(
                vision=TowerConfig(width=64, depth=2, heads=2),
                audio=TowerConfig(width=64, depth=2, heads=2),
                text=TowerConfig(width=48, depth=1, heads=2),
                dim=32,
                patch=14,
            )
        )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_encoder(tiny_weights: Path) -> EncoderSpec:
    """`tiny_weights` as the flow gets it."""
    return encoder_spec("imagebind-demo", str(tiny_weights), "cpu")


@pytest.fixture(scope="session")
def render() -> Callable[[Path, Sequence[str]], Path]:
    """`render(path, arguments)`: run the packaged ffmpeg to make one media file."""
    program = imageio_ffmpeg.get_ffmpeg_exe()

    def run(path: Path, arguments: Sequence[str]) -> Path:
        command = [program, "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *arguments, str(path)]
        subprocess.run(command, check=True, timeout=120)
        return path

    return run


def picture_and_sound(seconds: float, hertz: int = 440, picture: str = "testsrc") -> list[str]:
    """ffmpeg's arguments for a clip with both streams."""
    return [
        *("-f", "lavfi", "-i", f"{picture}=size=64x64:rate=8:duration={seconds}"),
        *("-f", "lavfi", "-i", f"sine=frequency={hertz}:sample_rate=16000:duration={seconds}"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", "-shortest"),
    ]


@pytest.fixture(scope="session")
def clip_arguments() -> Callable[..., list[str]]:
    """`picture_and_sound`, for tests that render clips of their own."""
    return picture_and_sound


@pytest.fixture(scope="session")
def rendered_media(
    tmp_path_factory: pytest.TempPathFactory, render: Callable[[Path, Sequence[str]], Path]
) -> Mapping[str, bytes]:
    """Name -> content of a few real recordings and one impostor."""
    folder = tmp_path_factory.mktemp("rendered")
    render(folder / "both.mp4", picture_and_sound(2.0))
    render(folder / "other.mp4", picture_and_sound(1.0, 880, "testsrc2"))
    silent = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=8:duration=1", "-c:v", "libx264"]
    render(folder / "silent.mp4", [*silent, "-preset", "ultrafast", "-pix_fmt", "yuv420p"])
    render(folder / "sound.wav", ["-f", "lavfi", "-i", "sine=frequency=330:sample_rate=16000:duration=1.5"])
    (folder / "text.mp4").write_text("this is a letter and no film\n" * 40)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def media_folder(tmp_path: Path, rendered_media: Mapping[str, bytes]) -> Path:
    """A folder of one's own with `rendered_media` in it."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name, content in rendered_media.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two cores for all flow tests of this process."""
    os.environ.update(RAY_ENVIRONMENT)
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()
