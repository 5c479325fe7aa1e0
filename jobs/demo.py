"""`demo`: the whole journey on the generated corpus."""

from pathlib import Path

from r2scp.jobs.config import absolute, default_workers, tell
from r2scp.jobs.extract import Destination, Source, encoder_spec, pick_device
from r2scp.jobs.extract_command import run_with_progress
from r2scp.pipelines.demo_corpus import generate
from r2scp.pipelines.flows import Resources
from r2scp.store.feature_store import FeatureStore


def run_demo(folder: Path, clips: int, seed: int, num_workers: int | None) -> dict[str, object]:
    """Generate, extract, look: seconds of each, and what the store then holds."""
    workers = num_workers or default_workers()
    which = f"{clips}-seed{seed}"  # another corpus has clips of the same names: it gets a store of its own
    corpus, uri = absolute(folder) / f"corpus-{which}", str(absolute(folder) / f"store-{which}")
    tell(f"1/3 generating {clips} clips with their questions in {corpus}")
    generated = generate(corpus, clips=clips, seed=seed, workers=workers)
    tell(f"    {generated.written} written, {generated.questions} questions, {generated.seconds:.1f} s")
    tell(f"2/3 extracting them into {uri}")
    encoder = encoder_spec("imagebind-demo", None, pick_device(None))
    report = run_with_progress(
        Source("demo", corpus), Destination(uri), encoder, Resources(num_workers=workers)
    )
    tell(
        f"    {report.stored} stored, {report.unchanged} unchanged, {report.dead} dead,"
        f" {report.seconds:.1f} s"
    )
    tell("3/3 what the store holds")
    status = FeatureStore.open(uri, encoder.fingerprint).status()
    return {
        "generate_seconds": round(generated.seconds, 1),
        "extract_seconds": round(report.seconds, 1),
        "extract": {
            name: getattr(report, name) for name in ("inputs", "stored", "unchanged", "dead", "decoded")
        },
        **status,
        "try_next": f"r2scp-pipe status --store {uri}",
    }
