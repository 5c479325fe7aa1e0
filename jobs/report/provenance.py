"""The section of a report on where its numbers come from, and the command lines that make them again."""

import json
from collections.abc import Sequence

from r2scp.jobs.report.builder import Section
from r2scp.jobs.report.facts.run_folder import RunFacts, command
from r2scp.jobs.training.checkpoints import Checkpoint, code_version
from r2scp.jobs.training.config import PRESETS, TrainConfig
from r2scp.jobs.training.evaluate import BASELINES
from r2scp.jobs.training.study.trainings import index_options

NOT_SET = ("seed", "model.encoder_dim", "model.classes")  # from an option of their own, or from the store


def provenance_section(runs: Sequence[RunFacts], asked: Sequence[str]) -> Section:
    """`asked`: the words of the command that made the report."""
    section = Section(name="provenance", heading="Where it comes from")
    now = code_version() or "not known: not run from a checkout"
    section.add_definitions([("program that made this page", now), ("its command", command(*asked))])
    known = [(run, run.checkpoint) for run in runs if run.checkpoint]
    for run, checkpoint in known:
        section.add_heading(f"Run {run.name}")
        preset, differences = nearest_preset(checkpoint.config)
        versions = checkpoint.store["versions"]
        section.add_definitions(
            [
                ("folder", str(run.folder)),
                ("trained by program", checkpoint.code or "not known"),
                ("evaluated by program", (run.evaluation.code if run.evaluation else "") or "not known"),
                (
                    "checkpoint",
                    f"stage {checkpoint.stage.value}, epoch {checkpoint.epoch}, step {checkpoint.step}",
                ),
                ("its SHA-256", checkpoint.sha256),
                ("seed", checkpoint.config.seed),
                ("settings", f"preset {preset}" + (", but:" if differences else ", unchanged")),
                *((f"· {name}", f"{mine!r} (preset: {theirs!r})") for name, mine, theirs in differences),
                ("store", str(checkpoint.store["uri"])),
                ("encoder", str(checkpoint.store["fingerprint"])),
                (
                    "versions read",
                    ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
                ),
            ]
        )
        section.add_text("To make it again, from a store of the same content:")
        for line in commands(run, checkpoint):
            section.command(line)
    if len(known) > 1:
        _between(section, known)
    return section


def nearest_preset(config: TrainConfig) -> tuple[str, list[tuple[str, object, object]]]:
    """The preset that a config differs from least, and (setting, here, there) of each difference."""
    found = {
        name: [
            one
            for one in differences(config, preset(config.model.encoder_dim, config.model.classes))
            if one[0] not in NOT_SET
        ]
        for name, preset in PRESETS.items()
    }
    name = min(found, key=lambda name: len(found[name]))
    return name, found[name]


def differences(here: TrainConfig, there: TrainConfig) -> list[tuple[str, object, object]]:
    """(setting, here, there), such as ("model.k", 1, 5)."""
    mine, theirs = _flat(here.to_json()), _flat(there.to_json())
    return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]


def commands(run: RunFacts, checkpoint: Checkpoint) -> list[str]:
    """What fills `neighbours`, trains and evaluates, on the store that the run was trained on."""
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


def _between(section: Section, known: Sequence[tuple[RunFacts, Checkpoint]]) -> None:
    section.add_heading("Differences between the runs")
    (_, first), *others = known
    names = [name for _, other in others for name, _, _ in differences(first.config, other.config)]
    names = list(dict.fromkeys(names))
    flat = [(run.name, _flat(one.config.to_json())) for run, one in known]
    if not names:
        section.add_text("The runs have the same settings, seeds included.")
        return
    rows = [[name, *(json.dumps(values.get(name)) for _, values in flat)] for name in names]
    section.add_table("Settings that differ", ["setting", *(name for name, _ in flat)], rows)
    if names == ["seed"]:
        section.add_text("The runs differ in their seeds alone.")


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    """Settings by their dotted names, as `--set` takes them."""
    flat: dict[str, object] = {}
    assert isinstance(values, dict)
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _plain(value)}
    return flat


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
