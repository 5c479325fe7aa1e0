"""What it costs to feed a training from the store, and to train: `python -m benchmarks.training --help`.

The store is generated at MUSIC-AVQA's size (9,288 clips of 60 s, two modalities, D = 1024, float16: 2.3 GB;
31,927 questions). Batches of 64 questions in shuffled order, as `train` makes them.

- *feed*: batches alone. Of stage I (sound, picture, words, sentence, answer) and of stage II before the
  experts (also the 3 nearest and 3 farthest neighbours of the missing modality). Against the same sequences
  as torch tensors in memory, in np.memmap's files, and from Ray Data. Caches are warm; each contender's
  first batches are compared with ours, tensor by tensor.
- *first*: the first pass, for which ours has nothing in memory yet, with the files in the page cache of the
  system and without.
- *step*: a whole training step at the default sizes on the CPU: from the store, from tensors in memory, and
  with batches that were made beforehand (no feed at all). Stage II also without its frozen experts' states.
- *memory*: of a process that reads a whole epoch, for three sizes of store, and with a small cache.

Fair: all contenders hold the words and the sentence of each distinct question once, and masks are made by
each. Ray Data is given the sequences in its object store (*gather*), or a table joined beforehand
(*joined*).
"""

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, reason, run, timed
from benchmarks.training.memory import memory_rows
from benchmarks.training.peers import Make, RayData, cool, in_memory, mapped, tensors_of
from benchmarks.training.site import Site, open_site
from benchmarks.training.steps import READY, STORE, step_seconds
from benchmarks.training.store import Scale
from r2scp.model.batch import Batch, Neighbours
from r2scp.pipelines.batches.dataset import NO_MODALITY, BatchRequest
from r2scp.pipelines.batches.prefetch import prefetch

PARTS = ("feed", "first", "step", "memory")
CHECKED = 3  # batches of each contender that are compared with ours
OURS, RAM, MAPPED = "ours", "tensors in memory", "np.memmap"
AHEAD = ", made ahead by a thread"  # as in a training
AT_ONCE, JOINED = "Ray Data, gather", "Ray Data, joined"
AUDIO = 0  # the missing modality, where one is
RAY_QUESTIONS = 2_048  # a pass of Ray Data's, so that it ends
SHORT_CLIPS = 400


def ask(rows: np.ndarray, missing: int) -> BatchRequest:
    """As stage I does, where `missing` is NO_MODALITY, or as stage II with experts that learn."""
    return BatchRequest.uniform(len(rows), missing, hide=False, farthest=missing != NO_MODALITY)


def ours(site: Site) -> Make:
    """Batches as the thread of a training makes them."""
    return lambda rows, missing: site.dataset.batch(rows, ask(rows, missing))


def same(batch: Batch, expected: Batch) -> None:
    """Raises AssertionError where two batches differ in anything."""
    for name in ("audio_BLC", "visual_BLC", "words_BWC", "words_mask_BW", "sentence_BC", "target_B"):
        _equal(getattr(batch, name), getattr(expected, name), name)
    for name in ("audio_mask_BL", "visual_mask_BL", "present_BM"):
        _equal(getattr(batch, name), getattr(expected, name), name)
    for name in ("retrieved", "farthest"):
        one, two = getattr(batch, name), getattr(expected, name)
        assert (one is None) is (two is None), name
        if isinstance(one, Neighbours) and isinstance(two, Neighbours):
            for part, other in zip(one, two, strict=True):
                _equal(part, other, name)


def _equal(one: Tensor, two: Tensor, name: str) -> None:
    assert one.dtype == two.dtype, f"{name}: {one.dtype} and {two.dtype}"
    assert one.equal(two), f"{name} differs"


def feed(site: Site, stage: str, missing: int, options: argparse.Namespace) -> tuple[Sheet, list[Grade]]:
    """One pass of batches by each contender, in turn."""
    neighbours = missing != NO_MODALITY
    batches = site.order[: options.batches]
    questions = sum(map(len, batches))
    makers = {OURS: ours(site), MAPPED: mapped(site.arrays, neighbours)}
    makers[RAM] = in_memory(site.arrays, tensors_of(site.arrays), neighbours)
    for make in makers.values():
        for rows in batches[:CHECKED]:
            same(make(rows, missing), makers[OURS](rows, missing))

    def through(make: Make) -> None:
        for rows in batches:
            make(rows, missing)

    def ahead(make: Make) -> None:
        with closing(prefetch(lambda rows: make(rows, missing), batches)) as prefetched:
            for _ in prefetched:
                pass

    works = {name: partial(through, make) for name, make in makers.items()}
    works |= {name + AHEAD: partial(ahead, makers[name]) for name in (OURS, MAPPED)}
    seconds = contest(works, options.rounds)
    peers = _ray_rows(site, batches, options.rounds) if neighbours else []
    rates = {
        name: [questions / one for one in taken]
        for name, taken in seconds.items()
        if not isinstance(taken, str)
    }
    rows, grades = [], []
    for name, rate in rates.items():
        of = {"of np.memmap": ratios(rate, rates[MAPPED])}
        rows.append(Row(name=name, figures={"questions/s": Spread.of(rate)} | of))
    for row in peers:
        rate = row.figures.get("questions/s")
        if isinstance(rate, Spread):
            share = rate.median / Spread.of(rates[MAPPED]).median
            row = Row(name=row.name, figures={**row.figures, "of np.memmap": f"{share:.3f}"})
        rows.append(row)
    for how in ("", AHEAD):
        reached = ratios(rates[OURS + how], rates[MAPPED + how]).median
        what = f"feed of stage {stage}{how}, of np.memmap"
        grades.append(Grade(what=what, goal=0.9, reached=reached))
    megabytes = sum(part.nbytes for part in _tensors(makers[MAPPED](batches[0], missing))) / 1e6
    title = f"Feed, stage {stage}: {questions:,} questions a pass, {megabytes:.0f} MB a batch, caches warm"
    return Sheet(title=title, rows=rows), grades


def _tensors(batch: Batch) -> Sequence[Tensor]:
    neighbour_parts = [part.tokens_BNLC for part in (batch.retrieved, batch.farthest) if part is not None]
    return [batch.audio_BLC, batch.visual_BLC, batch.words_BWC, *neighbour_parts]


def _ray_rows(site: Site, batches: Sequence[np.ndarray], rounds: int) -> list[Row]:
    """Both ways of Ray Data, their content checked. Times include the start of tasks, not of the session."""
    data = RayData(site.arrays, site.opened.config.batch_size, site.folder)
    try:
        rows = np.concatenate(batches)[:RAY_QUESTIONS]
        table = data.write_joined()
        ways = {AT_ONCE: lambda: data.gather(rows), JOINED: lambda: data.joined(table)}
        results = []
        for name, way in ways.items():
            try:
                count = sum(_checked(site, batch) for batch in way())
                taken = [count / timed(lambda way=way: deque(way(), maxlen=0)) for _ in range(rounds)]
                results.append(Row(name=name, figures={"questions/s": Spread.of(taken)}))
            except Exception as error:  # a peer may raise anything
                results.append(Row(name=name, unable=reason(error)))
        return results
    finally:
        data.close()


def _checked(site: Site, batch: dict[str, Tensor]) -> int:
    """Compare one of Ray Data's batches with ours; its questions."""
    rows = batch["row"].numpy()
    expected = site.dataset.batch(rows, ask(rows, AUDIO))
    assert expected.retrieved is not None
    assert expected.farthest is not None
    assert expected.target_B is not None
    pairs = (
        ("audio", expected.audio_BLC),
        ("visual", expected.visual_BLC),
        ("near", expected.retrieved.tokens_BNLC),
        ("far", expected.farthest.tokens_BNLC),
        ("sentence", expected.sentence_BC),
        ("target", expected.target_B),
    )
    for name, tensor in pairs:
        _equal(batch[name].reshape(tensor.shape), tensor, name)
    words = batch["words"].reshape(len(rows), -1, expected.words_BWC.shape[2])
    _equal(words[:, : expected.words_BWC.shape[1]], expected.words_BWC, "words")
    return len(rows)


def first(site: Site, options: argparse.Namespace) -> Sheet:
    """The first pass of stage I: ours begins with an empty cache each time."""
    files = [site.folder / f"{name}.npy" for name in ("audio", "visual")]
    tables = [path for path in Path(site.store.uri).rglob("*") if path.is_file()]
    batches = site.order[: options.batches]
    questions = sum(map(len, batches))

    def through(make: Make) -> None:
        for at in batches:
            make(at, NO_MODALITY)

    rows = []
    for name, paths in (("files in the page cache", []), ("files dropped from it", [*files, *tables])):
        rates: dict[str, list[float]] = {OURS: [], MAPPED: []}
        for _ in range(options.rounds):
            cool(paths, site.arrays)
            fresh = replace(site, dataset=site.again())
            rates[OURS].append(questions / timed(partial(through, ours(fresh))))
            cool(paths, site.arrays)
            make = mapped(site.arrays.reopened(), neighbours=False)
            rates[MAPPED].append(questions / timed(partial(through, make)))
            del fresh, make  # mapped files stay in the page cache
        share = ratios(rates[OURS], rates[MAPPED])
        for who, rate in rates.items():
            figures: dict[str, Spread | float | str] = {"questions/s": Spread.of(rate)}
            figures |= {"of np.memmap": share} if who == OURS else {}
            rows.append(Row(name=f"{who}, {name}", figures=figures))
    return Sheet(title=f"First pass of stage I, {questions:,} questions", rows=rows)


def steps(site: Site, options: argparse.Namespace) -> tuple[list[Sheet], list[Grade]]:
    """Whole steps of both stages, and what kept states save."""
    sheets, grades = [], []
    for stage, taken, states in step_seconds(site, options.steps, 1 if options.short else options.rounds):
        rows = [
            Row(
                name=name,
                figures={"seconds": Spread.of(seconds), "speed, of ready": ratios(taken[READY], seconds)},
            )
            for name, seconds in taken.items()
        ]
        sheets.append(Sheet(title=f"A step of stage {stage}: 64 questions, default sizes, CPU", rows=rows))
        what = f"step of stage {stage} from the store, of one whose batches were ready"
        grades.append(Grade(what=what, goal=0.95, reached=ratios(taken[READY], taken[STORE]).median))
        if states is not None:
            sheets.append(states)
    return sheets, grades


def benchmark(options: argparse.Namespace) -> Report:
    """Runs the selected parts."""
    scale = Scale.of(options.clips or (SHORT_CLIPS if options.short else Scale().clips))
    if options.short:
        options.batches, options.steps = min(options.batches, 20), 1
    sheets, grades = [], []
    with tempfile.TemporaryDirectory(prefix="r2scp-training-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        site = open_site(folder, scale)
        settings = {
            "clips": scale.clips,
            "questions": scale.train,
            "seconds to fill": time.perf_counter() - began,
        }
        if "feed" in options.parts:
            for stage, missing in (("I", NO_MODALITY), ("II", AUDIO)):
                sheet, more = feed(site, stage, missing, options)
                sheets.append(sheet)
                grades += more
        if "first" in options.parts:
            sheets.append(first(site, options))
        if "step" in options.parts:
            more_sheets, more = steps(site, options)
            sheets += more_sheets
            grades += more
        if "memory" in options.parts:
            sheets.append(
                Sheet(
                    title="Memory of a process after an epoch", rows=memory_rows(folder, scale, options.short)
                )
            )
    return Report(sheets=sheets, grades=grades, settings=settings)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--clips", type=int, help="in the store (default: 9288; short: 400)")
    parser.add_argument("--batches", type=int, default=500, help="of a pass, at most (default: an epoch)")
    parser.add_argument(
        "--steps", type=int, default=5, help="of a training, in each round (short: 1, and one round)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--folder", type=Path, help="keep the store here, and use it if it exists")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    assert __doc__ is not None
    return run("training", __doc__, add_options, benchmark, arguments)
