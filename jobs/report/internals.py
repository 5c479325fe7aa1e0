"""The sections of a report on what lies behind answers: joint vectors, retrieval, a gallery."""

from r2scp.jobs.answer.answerer import AnswerMeans
from r2scp.jobs.report.builder import Making, Section, share_cell
from r2scp.jobs.report.facts.precision import Purity, purity_of
from r2scp.jobs.report.facts.probe import NEAREST, SPLIT, probe
from r2scp.jobs.report.facts.run_folder import Gap
from r2scp.jobs.report.figures import evidence as report_evidence
from r2scp.jobs.report.gallery import gallery_section
from r2scp.jobs.training.evaluate import questions_of
from r2scp.store.errors import R2SCPError


def vectors(made: Making) -> None:
    with made.part("vectors", "Joint vectors") as section:
        store, rows = made.opened(), []
        for run in made.runs:
            if run.checkpoint is None:
                continue
            try:
                made.probes[run.name] = found = probe(run.checkpoint, store, made.wanted.device)
            except R2SCPError as error:
                made.lack(section, Gap(section="vectors", what=run.name, why=str(error)))
                continue
            rows += [[run.name, *row] for row in found.numbers()]
        shown = next(iter(made.probes), None)
        drawing = report_evidence.joint_vectors(made.probes[shown]) if shown else None
        if shown and len(made.probes) > 1:
            section.say(f"The pictures are of {shown}; the table has all runs.")
        if not section.figure(drawing) and shown:
            made.lack(
                section,
                Gap(section="vectors", what="t-SNE (Fig. 7)", why="too few validation questions to place"),
            )
        if drawing and rows:
            columns = ["run", *drawing.columns]
            note = f"{NEAREST} nearest by cosine in the full space: mean over questions, interval over clips."
            section.table("How far joint vectors of one answer lie together", columns, rows, note)


def purity(made: Making) -> None:
    with made.part("purity", "Retrieval") as section:
        if made.store is None:
            made.opened()
        for run in made.runs:
            if run.name not in made.probes:
                continue
            found = made.probes[run.name]
            config = found.opened.config
            if not config.model.cmr:
                made.lack(section, Gap(section="purity", what=run.name, why="this model retrieves nothing"))
                continue
            purity = purity_of(found.opened, questions_of(found.opened, SPLIT))
            _pure(made, section, purity)
            section.figure(report_evidence.dissonance(found, config.model.k))
            others = len(made.runs) - 1
            if others:
                section.say(f"Of {run.name}; the other {others} are not shown here.")
            break
        if not section.blocks:
            made.lack(
                section, Gap(section="purity", what="Retrieval", why="no run could be asked, see above")
            )


def _pure(made: Making, section: Section, purity: Purity) -> None:
    if not purity.labelled:
        made.lack(
            section, Gap(section="purity", what="Agreement in label", why="no clip of the store has labels")
        )
    if not section.figure(report_evidence.purity_by_rank(purity)):
        why = "no neighbour of a validation clip has a label, or the same question in training"
        made.lack(section, Gap(section="purity", what="Retrieval purity", why=why))
    rows = []
    for (kind, missing, side), one in purity.agreements.items():
        share = one.share(slice(purity.n))
        if share.pairs:
            ends = f"({100 * share.interval[0]:.0f}–{100 * share.interval[1]:.0f})"
            cell = {"text": f"{100 * share.share:.1f}", "value": share.share, "minor": ends}
            rows.append(
                [
                    kind,
                    report_evidence.MODALITY_NAMES[missing],
                    side,
                    cell,
                    share_cell(share.chance),
                    share.pairs,
                    share.clips,
                ]
            )
    if rows:
        columns = ["agree in", "missing", "side", f"first {purity.n}, %", "chance, %", "pairs", "clips"]
        section.table("Retrieval purity", columns, rows, "In brackets 95 % intervals over clips.")
    section.figure(report_evidence.scores(purity))
    leaks = [
        [report_evidence.MODALITY_NAMES[missing], side, hits, clips, of]
        for missing, sides in purity.leaks.items()
        for side, (hits, clips, of) in sides.items()
    ]
    what = (
        "were kept away by the leak guard"
        if purity.leak_guard
        else "are in the lists: there was NO leak guard"
    )
    note = (
        f"Hits of a clip's own source that would be among its {purity.depth}, over all clips of the store; "
        f"they {what}. A clip of the bank ({purity.serving:,} clips) is such a hit of itself."
    )
    section.table(
        "Hits of the clip's own source",
        ["missing", "side", "hits", "clips with any", "clips searched for"],
        leaks,
        note,
    )


def gallery(made: Making) -> None:
    if not made.wanted.gallery:
        return
    with made.part("gallery", "Answered questions") as section:
        store = made.opened()
        run = next((run for run in made.runs if run.name in made.probes), None)
        if run is None:
            raise R2SCPError("no run could be asked, see above")
        means = AnswerMeans(weights=made.wanted.weights, device=made.wanted.device)
        found = gallery_section(run, made.probes[run.name], store, made.wanted.gallery, means)
        section.blocks = found.blocks
        if not any(block["kind"] == "card" for block in section.blocks):
            made.gaps.append(
                Gap(section="gallery", what="Gallery", why="none of the questions could be asked again")
            )
