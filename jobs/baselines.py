"""What a model must beat, trained as fairly as it: same data, sizes, rates and epochs."""

from dataclasses import replace

from r2scp.jobs.train_config import TrainConfig

QUESTION_ONLY = "question-only"
NO_RECOVERY = "no-recovery"
NO_RECOVERY_DROPOUT = "no-recovery-dropout"


def baselines(config: TrainConfig) -> dict[str, TrainConfig]:
    """Name -> config.

    `question-only` gets neither sound nor picture. `no-recovery` drops what is missing and has learned from
    complete data alone, as in the paper's Table 2; `no-recovery-dropout` has learned to do without as well.
    """
    without = replace(config, model=replace(config.model, cmr=False, cap=False))
    only_stage = config.stage_one if config.stage_one.epochs else config.stage_two
    blind = replace(config, stage_one=only_stage, stage_two=replace(config.stage_two, epochs=0))
    return {
        QUESTION_ONLY: replace(blind, sees="question"),
        NO_RECOVERY: replace(without, loss=replace(config.loss, modality_dropout=False)),
        NO_RECOVERY_DROPOUT: replace(without, loss=replace(config.loss, modality_dropout=True)),
    }


def takes_experts(config: TrainConfig) -> bool:
    """Whether a baseline begins where stage I of the model that it is compared with ended."""
    return config.sees == "everything"
