"""ImageBind: one embedding space for frames, sound and text. Loading, saving and naming of its weights.

>>> model = ImageBind.load("imagebind_huge.pth")
>>> with torch.inference_mode():
...     keys_BD = model.vision(normalise_frames(frames))  # also model.audio(log_mel(...)), model.text(ids)

Weights are read by the published checkpoint's parameter names, at any size: widths, depths, the output
dimension, the vocabulary and the patch come from the tensors, head counts from the file's metadata.

Departures from the published model: every output is unit-norm (the published one scales audio by 20 and text
by a learned factor, which cosine does not see), and a still is not copied to two frames (see `VisionTower`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from r2scp.model.imagebind.packed_linear import pack_weight, unpack_weight
from r2scp.model.imagebind.towers import (
    IMAGE_SIDE,
    AudioTower,
    ImageBindConfig,
    TextOutput,
    TextTower,
    TowerConfig,
    VisionTower,
)
from r2scp.model.imagebind.weights_file import (
    WeightsError,
    config_of,
    read_weights,
    select_tensors,
    sha256_of,
    write_weights,
)

__all__ = [
    "Description",
    "ImageBind",
    "ImageBindConfig",
    "TextOutput",
    "TowerConfig",
    "WeightsError",
    "best_dtype",
    "normalise_frames",
]

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue; of values in 0 to 1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
REVISION = 1  # part of the fingerprint: raise it when the same weights come to give other embeddings
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Description(NamedTuple):
    """Properties of a model, known before it is loaded."""

    fingerprint: str
    dim: int
    dtype: torch.dtype
    sha256: str | None  # of the file; None for random weights


class ImageBind(nn.Module):
    """The three towers. `vision`, `audio` and `text` are modules: call them with a batch.

    `ImageBind(config)` is a new model, ready to train, with weights drawn from PyTorch's global generator.
    """

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.audio = AudioTower(config)
        self.text = TextTower(config)
        self._weights: str | None = None  # digest of the file, or random-SEED
        if not self.vision.stem.is_meta:
            self.initialise()

    @property
    def dim(self) -> int:
        """Length of every embedding."""
        return self.config.dim

    @property
    def dtype(self) -> torch.dtype:
        """The towers' precision; their outputs are always float32."""
        return self.vision.stem.dtype

    @property
    def device(self) -> torch.device:
        return self.vision.stem.device

    @property
    def fingerprint(self) -> str:
        """Stable name of the embeddings: dimension, weights, revision; safe as a folder's name.

        Examples: `imagebind-1024-d6f6c22bedcc-r1`, `imagebind-1024-random-7-r1`. The dtype is no part of it:
        bf16 and fp32 agree to a cosine of 0.999, so a store filled on a GPU can be queried on a laptop.
        Raises WeightsError for a new model that was not loaded.
        """
        if self._weights is None:
            raise WeightsError("a model that was never saved has no fingerprint: save it, then load it")
        return _fingerprint(self.dim, self._weights)

    @staticmethod
    def describe(
        source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> "Description":
        """Describe the model that `load` returns for the same arguments: a file is hashed, not loaded."""
        dtype = _check_dtype(dtype or best_dtype(device))
        if (seed := _random_seed(source)) is not None:
            dim = ImageBindConfig.huge().dim
            return Description(_fingerprint(dim, f"random-{seed}"), dim, dtype, None)
        path = Path(source)
        dim = ImageBind._skeleton(path)[0].dim
        digest = sha256_of(path)
        return Description(_fingerprint(dim, digest), dim, dtype, digest)

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        known_sha256: str | None = None,
    ) -> "ImageBind":
        """Read a `.pth` or `.safetensors` file, or draw random weights of the published size (`random:SEED`).

        `dtype` is float32, bfloat16 or float16; None means `best_dtype(device)`. `known_sha256`, the hex
        digest of the file (see `describe`), saves hashing it again. Float32 weights on the CPU stay mapped
        from the file and are shared between processes. Raises WeightsError.
        """
        dtype = _check_dtype(dtype or best_dtype(device))
        if (seed := _random_seed(source)) is not None:
            return cls._random(seed, device, dtype)
        path = Path(source)
        model, tensors = cls._skeleton(path)
        model.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
        model._weights = known_sha256 or sha256_of(path)
        return model.eval()

    @classmethod
    def _skeleton(cls, path: Path) -> tuple["ImageBind", dict[str, Tensor]]:
        """A model on the meta device, of the file's sizes, and the file's tensors for it, by our names."""
        tensors, metadata = read_weights(path)
        with torch.device("meta"):
            model = cls(config_of(tensors, metadata, path))
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return model, select_tensors(tensors, shapes, path)

    @classmethod
    def _random(cls, seed: int, device: str | torch.device, dtype: torch.dtype) -> "ImageBind":
        with torch.device("meta"):
            model = cls(ImageBindConfig.huge())
        model.to(dtype).to_empty(device=device)
        model.initialise(torch.Generator().manual_seed(seed))
        model._weights = f"random-{seed}"
        return model.eval()

    def pack(self) -> "ImageBind":
        """Lay out the blocks' matrices for the CPU's matrix unit, if it has one for this dtype.

        Embeddings agree with those before (up to bf16's rounding), memory does not grow, and saving writes
        the same tensors. The model can no longer train. Returns itself.
        """
        for tower in (self.vision, self.audio, self.text):
            for module in tower.blocks.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.ndim == 2 and (weight := pack_weight(parameter)) is not parameter:
                        setattr(module, name, nn.Parameter(weight, requires_grad=False))
                        self.requires_grad_(False)
        return self

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights: normal, scaled by fan-in and depth; norms 1, biases 0.

        Drawn in float32 on the CPU, then cast: a seed gives the same model on any device, in any dtype.
        """
        for name, parameter in self.named_parameters():
            tower, _, leaf = name.partition(".")
            sizes: TowerConfig = getattr(self.config, tower)
            if leaf.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = _init_std(leaf, parameter, sizes)
                parameter.copy_(
                    torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
                )

    def save(
        self, path: str | Path, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write a safetensors file with the published names, head counts and `metadata`.

        `dtype` is that of the tensors in the file (None: unchanged). The file is written whole or not at all.
        """
        tensors = self.state_dict().items()
        state = {name: unpack_weight(tensor.detach()).to("cpu", dtype) for name, tensor in tensors}
        write_weights(Path(path), state, self.config, metadata)


def best_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 if the device computes it natively, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def normalise_frames(frames_NHW3: Tensor) -> Tensor:
    """uint8 (N, 224, 224, 3) in red, green, blue -> float32 (N, 3, 224, 224) for the vision tower.

    The result stays channels-last in memory, which is fastest for the tower's first convolution.
    """
    if frames_NHW3.dtype != torch.uint8 or frames_NHW3.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE, 3):
        got = f"{frames_NHW3.dtype} {tuple(frames_NHW3.shape)}"
        raise ValueError(f"frames must be uint8 of shape (N, {IMAGE_SIDE}, {IMAGE_SIDE}, 3); got {got}")
    std_3 = torch.tensor(PIXEL_STD, device=frames_NHW3.device)
    mean_3 = torch.tensor(PIXEL_MEAN, device=frames_NHW3.device)
    return (frames_NHW3 / (255.0 * std_3) - mean_3 / std_3).permute(0, 3, 1, 2)


def _fingerprint(dim: int, weights: str) -> str:
    name = weights if weights.startswith("random-") else weights[:12].lower()
    return f"imagebind-{dim}-{name}-r{REVISION}"


def _check_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPE_NAMES:
        raise WeightsError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}; got {dtype}")
    return dtype


def _random_seed(source: str | Path) -> int | None:
    """The seed of `random:SEED`; None for a file. Raises WeightsError for an invalid SEED."""
    if not str(source).startswith("random:"):
        return None
    seed = str(source).removeprefix("random:")
    if not seed.isascii() or not seed.isdecimal() or int(seed) >= 2**63:
        raise WeightsError(
            f"random weights must be random:SEED with a whole number from 0; got {str(source)!r}"
        )
    return int(seed)


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware, as Linux reports it; elsewhere False."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    flags = next(
        (line.split(":")[-1].split() for line in lines if line.startswith(("flags", "Features"))), []
    )
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)


def _init_std(leaf: str, parameter: Tensor, sizes: TowerConfig) -> float:
    """Standard deviation of one weight: 1/sqrt(fan in), smaller if it adds to the residual stream."""
    if leaf in ("words", "positions", "class_token") or leaf.endswith(("bias_k", "bias_v")):
        return 0.02  # vectors, not matrices: they have no fan-in
    fan_in = parameter[0].numel()
    residual = leaf.endswith(("out_proj.weight", "fc2.weight"))
    return fan_in**-0.5 * ((2 * sizes.depth) ** -0.5 if residual else 1.0)
