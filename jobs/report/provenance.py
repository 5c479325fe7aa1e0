"""The provenance section: code, settings and data behind the numbers, and commands that reproduce them."""

import json
from collections.abc import Sequence

from r2scp.jobs.report.builder import Section
from r2scp.jobs.report.facts.run_folder import RunFacts, command
from r2scp.jobs.training.checkpoints import Checkpoint, code_version
from r2scp.jobs.training.config import PRESETS, TrainConfig
from r2scp.jobs.training.evaluate import BASELINES
from r2scp.jobs.training.study.trainings import index_options

#: Settings that differ without `--set`: from an option of their own, or from the store.
WITHOUT_SET = ("seed", "model.encoder_dim", "model.classes")
UNKNOWN = "unknown"

Difference = tuple[str, object, object]  # setting, here, there: such as ("model.k", 1, 5)


def provenance_section(runs: Sequence[RunFacts], command_words: Sequence[str]) -> Section:
    """`command_words`: the command that made the report."""
    section = Section(name="provenance", heading="Provenance")
    code = code_version() or "unknown: not run from a git checkout"
    section.add_definitions([("code of this report", code), ("its command", command(*command_words))])
    trained = [(run, run.checkpoint) for run in runs if run.checkpoint]
    for run, checkpoint in trained:
        section.add_heading(f"Run {run.name}")
        section.add_definitions(_definitions(run, checkpoint))
        section.add_text("To reproduce it, from a store with the same contents:")
        for line in commands(run, checkpoint):
            section.add_command(line)
    if len(trained) > 1:
        _add_differences(section, trained)
    return section


def _definitions(run: RunFacts, checkpoint: Checkpoint) -> list[tuple[str, object]]:
    preset, changed = nearest_preset(checkpoint.config)
    versions = checkpoint.store["versions"]
    return [
        ("folder", str(run.folder)),
        ("code at training", checkpoint.code or UNKNOWN),
        ("code at evaluation", (run.evaluation.code if run.evaluation else "") or UNKNOWN),
        ("checkpoint", f"stage {checkpoint.stage.value}, epoch {checkpoint.epoch}, step {checkpoint.step}"),
        ("its SHA-256", checkpoint.sha256),
        ("seed", checkpoint.config.seed),
        ("settings", f"preset {preset}" + (", except:" if changed else ", unchanged")),
        *((f"· {name}", f"{mine!r} (preset: {theirs!r})") for name, mine, theirs in changed),
        ("store", str(checkpoint.store["uri"])),
        ("encoder", str(checkpoint.store["fingerprint"])),
        (
            "table versions",
            ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
        ),
    ]


def nearest_preset(config: TrainConfig) -> tuple[str, list[Difference]]:
    """The preset with the fewest differences from a config, and those differences."""
    changes = {
        name: [
            difference
            for difference in differences(config, preset(config.model.encoder_dim, config.model.classes))
            if difference[0] not in WITHOUT_SET
        ]
        for name, preset in PRESETS.items()
    }
    name = min(changes, key=lambda name: len(changes[name]))
    return name, changes[name]


def differences(here: TrainConfig, there: TrainConfig) -> list[Difference]:
    mine, theirs = _flat(here.to_json()), _flat(there.to_json())
    return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]


def commands(run: RunFacts, checkpoint: Checkpoint) -> list[str]:
    """The commands that index, train and evaluate, on the store that the run was trained on."""
    config, store = checkpoint.config, str(checkpoint.store["uri"])
    lines = []
    if config.model.cmr and config.sees == "everything":
        lines.append(f"{command('index', store=store)} {index_options(config.index, config.retrieval)}")
    preset, changed = nearest_preset(config)
    words = ["train", str(run.folder), "--preset", preset, "--seed", str(config.seed)]
    for name, value, _ in changed:
        words += ["--set", f"{name}={json.dumps(value)}"]
    if not (run.folder / BASELINES).is_dir():
        words.append("--no-baselines")
    lines.append(command(*words, store=store))
    rates = ["--missing-rates"] if run.evaluation and run.evaluation.ours.rates else []
    split = ["--split", run.evaluation.split] if run.evaluation and run.evaluation.split != "test" else []
    return [*lines, command("evaluate", str(run.folder), *split, *rates, store=store)]


def _add_differences(section: Section, trained: Sequence[tuple[RunFacts, Checkpoint]]) -> None:
    section.add_heading("Differences between the runs")
    (_, first), *others = trained
    changed = [name for _, other in others for name, _, _ in differences(first.config, other.config)]
    names = list(dict.fromkeys(changed))
    if not names:
        section.add_text("The runs have the same settings, including the seed.")
        return
    settings = [(run.name, _flat(checkpoint.config.to_json())) for run, checkpoint in trained]
    rows = [[name, *(json.dumps(values.get(name)) for _, values in settings)] for name in names]
    section.add_table("Settings that differ", ["setting", *(name for name, _ in settings)], rows)
    if names == ["seed"]:
        section.add_text("The runs differ only in their seed.")


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    """Settings by dotted name, as in `--set`."""
    flat: dict[str, object] = {}
    assert isinstance(values, dict)
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _plain(value)}
    return flat


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
