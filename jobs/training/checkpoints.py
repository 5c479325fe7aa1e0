"""A run's folder, and the checkpoints in it.

    RUN/config.json     what is trained, on what
    RUN/metrics.jsonl   a line per epoch and every few steps
    RUN/tensorboard/    the same numbers for TensorBoard
    RUN/lock            locked while a training is running
    RUN/last.json best.json experts.json
    RUN/step-000131-9f86d081.safetensors   tensors, referenced by one or more of these three

A checkpoint is a JSON document that references its tensors by file name and hash. Tensor files are named by
content and never overwritten; the documents are renamed into place after them, `last` after the others. So a
kill at any time leaves the previous checkpoints intact, and `last` never refers to a best one that does not
exist. `last` is what a run resumes from and has the optimiser's state too, `best` answers questions,
`experts` is the best of stage I and where stage II starts.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from r2scp.jobs.settings import from_plain
from r2scp.jobs.training.config import TrainConfig
from r2scp.model.r2scp import R2SCP, Stage
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import CheckpointError, FingerprintMismatch, UsageError
from r2scp.store.feature_store import FeatureStore

CHECKOUT = Path(__file__).resolve().parents[2]  # unless installed from a wheel
FORMAT = 1
LAST, BEST, EXPERTS = "last", "best", "experts"
_TENSORS = re.compile(r"step-\d{6,}-[0-9a-f]{8}(\.optimiser)?\.safetensors")
#: Temporary files that a killed run leaves behind.
_PART = re.compile(rf"({_TENSORS.pattern}|({LAST}|{BEST}|{EXPERTS}|config)\.json|metrics\.jsonl)\.part\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model and its provenance.

    `epoch`: epochs of `stage` that are completed; `step` counts from the run's start. `store`: its address,
    encoder fingerprint, width and the pinned versions. `metrics`: of validation. `best`: the metrics of the
    best checkpoint so far. `code`: version of this program. `experts`: hash of the tensors that stage II
    started from, if another run trained them.
    """

    stage: Stage
    epoch: int
    step: int
    config: TrainConfig
    answers: list[str] | None  # the classes; None if each question has its own choices
    store: dict[str, object]
    metrics: dict[str, float]
    best: dict[str, float]
    code: str
    experts: str = ""
    tensors: str = ""  # file names and hashes, set when written
    sha256: str = ""
    optimiser: str = ""
    optimiser_sha256: str = ""
    folder: Path = Path()

    def model(self, device: torch.device | str = "cpu") -> R2SCP:
        """The model, in its stage and in evaluation mode. Raises `CheckpointError` for a damaged file."""
        model = R2SCP(self.config.model).set_stage(self.stage)
        self.load_into(model)
        return model.to(device).eval()

    @property
    def finished(self) -> bool:
        """Whether the training is complete."""
        mixing = self.config.stage_two.epochs > 0
        stage, length = (
            (Stage.MIXING, self.config.stage_two) if mixing else (Stage.EXPERTS, self.config.stage_one)
        )
        return self.stage is stage and self.epoch >= length.epochs

    def load_into(self, model: R2SCP) -> None:
        """Load the weights into a model. Raises `CheckpointError` if shapes differ."""
        tensors = self.read_tensors(self.tensors, self.sha256)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if different := sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name)):
            name = different[0]
            raise CheckpointError(
                f"{self.folder / self.tensors} does not fit this model: {len(different)} tensors differ, "
                f"{name} must be {expected.get(name, 'absent')}; got {shapes.get(name, 'none')}; use the "
                "settings it was trained with"
            )
        model.load_state_dict(tensors)

    def optimiser_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, by parameter and name. Raises `CheckpointError`."""
        return self.read_tensors(self.optimiser, self.optimiser_sha256)

    def read_tensors(self, name: str, sha256: str) -> dict[str, Tensor]:
        """The tensors of one file. Raises `CheckpointError` unless its hash is the document's."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; train again") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(f"{path} is damaged: its hash differs from the checkpoint's; train again")
        try:
            return load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def require_store(self, store: FeatureStore) -> None:
        """Raises `FingerprintMismatch` for a store of another encoder."""
        trained = self.store["fingerprint"]
        if trained != store.fingerprint:
            raise FingerprintMismatch(
                f"the checkpoint in {self.folder} was trained on features of encoder {trained}; the store at "
                f"{store.uri} holds those of {store.fingerprint}: use the store it was trained on, or train "
                "on this one"
            )


def write_checkpoint(
    folder: Path, names: list[str], checkpoint: Checkpoint, model: R2SCP, optimiser: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint under each of `names`, then delete tensor files that none references any more.

    Only `LAST` gets the optimiser's state.
    """
    stem = f"step-{checkpoint.step:06d}"
    tensors, sha256 = _write_tensors(folder / stem, "", model.state_dict())
    shared: dict[str, object] = {
        "format": FORMAT,
        "stage": checkpoint.stage.value,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "tensors": tensors,
        "sha256": sha256,
        "metrics": checkpoint.metrics,
        "best": checkpoint.best,
        "store": checkpoint.store,
        "answers": checkpoint.answers,
        "config": checkpoint.config.to_json(),
        "experts": checkpoint.experts,
        "code": checkpoint.code,
    }
    for name in sorted(names, key=lambda name: name == LAST):
        document = dict(shared)
        if name == LAST:
            file, hashed = _write_tensors(folder / stem, ".optimiser", optimiser)
            document |= {"optimiser": file, "optimiser_sha256": hashed}
        replace_file(folder / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())
    _delete_unreferenced(folder)


def read_checkpoint(path: Path, name: str = BEST) -> Checkpoint:
    """The checkpoint `name` of a run's folder, or the checkpoint whose JSON document is `path`.

    Raises `CheckpointError` if it does not exist or cannot be used.
    """
    document = path / f"{name}.json" if path.is_dir() else path
    try:
        values = json.loads(document.read_bytes())
    except (OSError, ValueError) as error:
        names = sorted(part.stem for part in path.glob("*.json") if part.stem in (LAST, BEST, EXPERTS))
        raise CheckpointError(
            f"there is no checkpoint {document} ({error}); {path} holds: {', '.join(names) or 'none'}"
        ) from error
    if not isinstance(values, dict) or "format" not in values or "tensors" not in values:
        raise CheckpointError(f"{document} is not a checkpoint of r2scp-pipe; give a run's folder")
    if values.pop("format") != FORMAT:
        raise CheckpointError(
            f"{document} has another checkpoint format; read it with the version of r2scp-pipe that wrote it"
        )
    try:
        checkpoint = from_plain(Checkpoint, values | {"folder": document.parent}, document.name)
    except UsageError as error:
        raise CheckpointError(f"{document} is not a checkpoint of this version: {error}") from error
    for tensors in (checkpoint.tensors, checkpoint.optimiser):
        if tensors and not _TENSORS.fullmatch(tensors):
            raise CheckpointError(f"{document} references tensors that no training writes: {tensors!r}")
    if not isinstance(checkpoint.store.get("versions"), dict) or "fingerprint" not in checkpoint.store:
        raise CheckpointError(f"{document} does not name the store it was trained on; train again")
    return checkpoint


def read_last(folder: Path) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a new run."""
    return read_checkpoint(folder, LAST) if (folder / f"{LAST}.json").exists() else None


def optimiser_tensors(optimiser: torch.optim.Optimizer, model: R2SCP) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `{parameter}.{name}`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{name}": value
        for parameter, state in optimiser.state.items()
        for name, value in state.items()
    }


def load_optimiser(optimiser: torch.optim.Optimizer, model: R2SCP, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimiser_tensors` returned."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        parameter, _, name = full.rpartition(".")
        # AdamW keeps its step count on the CPU
        device = value.device if name == "step" else parameters[parameter].device
        optimiser.state[parameters[parameter]][name] = value.to(device)


def code_version(root: Path = CHECKOUT) -> str:
    """The commit of the running checkout, or "" outside one. Read without starting git."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (git / name).exists():
            return (git / name).read_text().strip()
        packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
        return next((parts[0] for parts in packed if parts[1:] == [name]), "")
    except OSError:
        return ""


def _write_tensors(stem: Path, kind: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Write one file, named by content; its name and hash."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    path = stem.with_name(f"{stem.name}-{sha256[:8]}{kind}.safetensors")
    replace_file(path, data)
    return path.name, sha256


def _delete_unreferenced(folder: Path) -> None:
    """Delete tensor files that no document references, and temporary files of killed runs."""
    referenced = set()
    for name in (LAST, BEST, EXPERTS):
        document = folder / f"{name}.json"
        if document.exists():
            values = json.loads(document.read_bytes())
            referenced |= {values.get("tensors"), values.get("optimiser")}
    for path in folder.iterdir():
        if path.name not in referenced and (_TENSORS.fullmatch(path.name) or _PART.fullmatch(path.name)):
            path.unlink()
