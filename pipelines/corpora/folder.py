"""The `folder` corpus: any tree of media, with or without the user's own questions about it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from unicodedata import normalize

from r2scp.pipelines.corpora.corpus import AnnotationFile, ClipRow, Corpus, CorpusTally, Format
from r2scp.pipelines.corpora.media_tree import MediaTree, stem
from r2scp.pipelines.corpora.rows import AnnotationRow
from r2scp.pipelines.corpora.values import InvalidRow, RejectReason, excerpt


class FolderCorpus(Corpus):
    """Any tree of media: each file a clip, its path below the root its id, its folders its labels.

    The rows of question files name a video by its path below the root, with or without extension, or by
    its bare name where only one file has it. `split`: of clips in no row.
    """

    def __init__(
        self, name: str, layout: Format, files: Sequence[AnnotationFile], tree: MediaTree, split: str
    ) -> None:
        super().__init__(name, layout, files, tree)
        self.split = split

    def clips(self) -> Iterator[ClipRow]:
        """All media files in the order of their paths, then videos of rows that are not on the disk."""
        tally = self.clip_tally = CorpusTally()
        named = self._clips_by_id(tally)
        for file in self.tree.files:
            tally.unannotated += file not in named
            split, labels = named.pop(file, (self.split, ()))
            folders = tuple(file.split("/")[:-1])
            labels = (*folders, *(label for label in labels if label not in folders))
            yield self._clip(tally, file, split, labels, self.tree.uri(file))
        for video_id, (split, labels) in named.items():
            yield self._clip(tally, video_id, split, labels, "")

    def _clip(
        self, tally: CorpusTally, video_id: str, split: str, labels: tuple[str, ...], uri: str
    ) -> ClipRow:
        """In a named folder corpus the clip id is the source, so that two folders share no source."""
        clip = super()._clip(tally, video_id, split, labels, uri)
        return clip if self.name == "folder" else replace(clip, source_id=clip.clip_id)

    @cached_property
    def _files_by_name(self) -> dict[str, str]:
        """Every way to name a file -> the file; "" where it could be several."""
        names: dict[str, str] = {}
        for file in self.tree.files:
            for name in {file, file.rpartition(".")[0], file.rpartition("/")[2], stem(file)}:
                composed = normalize("NFC", name)  # some file systems decompose accents, few spreadsheets do
                names[composed] = file if names.get(composed, file) == file else ""
        names.update((file, file) for file in self.tree.files)
        return names

    def _resolve(self, row: AnnotationRow) -> AnnotationRow:
        names = self._files_by_name
        file = names.get(row.video_id, names.get(normalize("NFC", row.video_id), row.video_id))
        if not file:
            detail = f"several files have this name: {excerpt(row.video_id)}"
            raise InvalidRow(RejectReason.AMBIGUOUS_VIDEO, detail)
        return replace(row, video_id=file)
