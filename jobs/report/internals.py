"""The sections on the model's internals: joint vectors, retrieval, answered questions."""

from r2scp.jobs.answer.answerer import AnswerOptions
from r2scp.jobs.report.builder import ReportBuilder, Section, interval_cell, share_cell
from r2scp.jobs.report.facts.precision import RetrievalPrecision, retrieval_precision
from r2scp.jobs.report.facts.probe import NEAREST_VECTORS, SPLIT, Probe, probe
from r2scp.jobs.report.facts.run_folder import MissingPart
from r2scp.jobs.report.figures.evidence import (
    agreement_figure,
    dissonance_figure,
    joint_vectors_figure,
    scores_figure,
)
from r2scp.jobs.report.gallery import gallery_section
from r2scp.jobs.training.evaluate import questions_of
from r2scp.store.errors import R2SCPError
from r2scp.store.schema import MODALITY_NAMES


def add_joint_vectors(builder: ReportBuilder) -> None:
    with builder.section("vectors", "Joint vectors") as section:
        store, rows = builder.require_store(), []
        for run in builder.runs:
            if run.checkpoint is None:
                continue
            try:
                builder.probes[run.name] = probe(run.checkpoint, store, builder.request.device)
            except R2SCPError as error:
                builder.add_missing(section, run.name, str(error))
                continue
            rows += [[run.name, *row] for row in builder.probes[run.name].metrics()]
        if not builder.probes:
            return
        name, first = next(iter(builder.probes.items()))
        figure = joint_vectors_figure(first)
        if len(builder.probes) > 1:
            section.add_text(f"The figure shows {name}; the table has all runs.")
        if not section.add_figure(figure):
            builder.add_missing(section, "t-SNE (Fig. 7)", "too few validation questions to plot")
        elif figure:
            note = (
                f"{NEAREST_VECTORS} nearest by cosine in the full space: mean over questions, with a 95 % "
                "interval over clips."
            )
            caption = "How often nearby joint vectors share the answer"
            section.add_table(caption, ["run", *figure.columns], rows, note)


def add_retrieval(builder: ReportBuilder) -> None:
    with builder.section("purity", "Retrieval") as section:
        builder.require_store()
        for name, run_probe in builder.probes.items():
            if not run_probe.opened.config.model.cmr:
                builder.add_missing(section, name, "this model retrieves nothing")
                continue
            _add_precision(builder, section, run_probe)
            if others := len(builder.runs) - 1:
                section.add_text(f"This section is about {name}; the other {others} are not shown here.")
            break
        if not section.blocks:
            builder.add_missing(section, "Retrieval", "no run could be evaluated; see Joint vectors")


def _add_precision(builder: ReportBuilder, section: Section, run_probe: Probe) -> None:
    opened = run_probe.opened
    precision = retrieval_precision(opened, questions_of(opened, SPLIT))
    if not precision.labelled:
        builder.add_missing(section, "Label agreement", "no clip of the store has labels")
    if not section.add_figure(agreement_figure(precision)):
        why = "no neighbour of a validation clip has a label, or the same question in training"
        builder.add_missing(section, "Retrieval precision", why)
    _add_precision_table(section, precision)
    section.add_figure(scores_figure(precision))
    _add_same_source_table(section, precision)
    section.add_figure(dissonance_figure(run_probe, opened.config.model.k))


def _add_precision_table(section: Section, precision: RetrievalPrecision) -> None:
    rows = []
    for (kind, missing, side), agreements in precision.agreements.items():
        share = agreements.share(slice(precision.n))
        if share.pairs:
            cells = interval_cell(share.share, *share.interval), share_cell(share.chance)
            rows.append([kind, MODALITY_NAMES[missing], side, *cells, share.pairs, share.clips])
    if rows:
        columns = [
            "agreement in",
            "missing",
            "side",
            f"first {precision.n}, %",
            "chance, %",
            "pairs",
            "clips",
        ]
        section.add_table("Retrieval precision", columns, rows, "In brackets: 95 % intervals over clips.")


def _add_same_source_table(section: Section, precision: RetrievalPrecision) -> None:
    rows = [
        [MODALITY_NAMES[missing], side, hits, clips, searched]
        for missing, sides in precision.same_source.items()
        for side, (hits, clips, searched) in sides.items()
    ]
    outcome = (
        "The leak guard excluded them."
        if precision.leak_guard
        else "They are in the neighbour lists: there was NO leak guard."
    )
    note = (
        f"Clips of the query's own source video that would be among its {precision.depth} neighbours, over "
        f"all clips of the store. {outcome} Each of the {precision.bank_size:,} clips in the memory bank "
        "counts as such a hit of itself."
    )
    columns = ["missing", "side", "hits", "clips with any", "clips searched for"]
    section.add_table("Same-source hits", columns, rows, note)


def add_gallery(builder: ReportBuilder) -> None:
    if not builder.request.gallery:
        return
    with builder.section("gallery", "Answered questions") as section:
        store = builder.require_store()
        run = next((run for run in builder.runs if run.name in builder.probes), None)
        if run is None:
            raise R2SCPError("no run could be evaluated; see Joint vectors")
        options = AnswerOptions(weights=builder.request.weights, device=builder.request.device)
        gallery = gallery_section(run, builder.probes[run.name], store, builder.request.gallery, options)
        section.blocks = gallery.blocks
        if not any(block["kind"] == "card" for block in section.blocks):
            part = MissingPart(section="gallery", what="Gallery", why="no question could be answered again")
            builder.missing.append(part)
