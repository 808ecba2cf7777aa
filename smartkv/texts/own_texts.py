"""A user's own folder or file of texts: which files are read, and which split each document belongs to."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Document, split_of
from smartkv.texts.text_files import read_records, read_text

TEXTS, RECORDS = (".txt", ".md"), (".jsonl",)  # a document a file, a document a line
READ = ".txt, .md or .jsonl (each also with .gz)"


@dataclass
class OwnTexts:
    """The files that are read of a folder, or of a single file.

    A `.txt` or `.md` file is one document, each line of a `.jsonl` file another, with its text in the field `text`.
    Capitals in an ending make no difference, and `.gz` may follow it. Folders behind links are read. Hidden files and
    editors' copies are not.

    Attributes:
        path: The folder or file.
        files: Files to read, with the folder that their names start from, by split; under "*" if there are no
            subfolders named like splits, and a hash of each document's id decides.
        skipped: Number of files that are not read, by kind.
        read: Function that takes a file and its name in the folder, and yields its documents.
    """

    path: Path
    files: dict[str, list[tuple[Path, Path]]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    read: Callable[[Path, str], Iterator[Document]] = field(default_factory=lambda: _documents)

    @classmethod
    def find(cls, path: Path) -> "OwnTexts":
        """List the files of a folder.

        Raises:
            SmartKVError: The path does not exist, cannot be read, or holds no file of text.
        """
        own = cls(path)
        if not path.is_dir():
            if not path.exists():
                raise SmartKVError(f"path {path} does not exist")
            own.files["*"] = [(path.parent, path)] if _kind(path.name) in TEXTS + RECORDS else []
            if not own.files["*"]:
                raise SmartKVError(f"{path} is no file of text: expected {READ}")
        else:
            everything = _walk(path)
            roots = {split: path / split for split in SPLITS if (path / split).is_dir()}
            for split, root in roots.items():
                own.files[split] = own._chosen([file for file in everything if root in file.parents], root)
            outside = [file for file in everything if not any(root in file.parents for root in roots.values())]
            if not roots:
                own.files["*"] = own._chosen(outside, path)
            elif outside:
                own.skipped[f"outside of {', '.join(roots)}"] += len(outside)
        if not any(own.files.values()):
            found = f"only files that are not read ({own.skipped_in_words})" if own.skipped else "no file"
            raise SmartKVError(f"{path} holds {found}: expected {READ}")
        return own

    def _chosen(self, files: list[Path], root: Path) -> list[tuple[Path, Path]]:
        """Return the files that are read, and count the others."""
        chosen = []
        for file in files:
            if (kind := _not_read(file.relative_to(root))) is None:
                chosen.append((root, file))
            else:
                self.skipped[kind] += 1
        return chosen

    @property
    def count(self) -> int:
        """Number of files that are read."""
        return sum(map(len, self.files.values()))

    @property
    def skipped_in_words(self) -> str:
        """The files that are not read, such as "2 .pdf, 1 hidden"."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of one split.

        A document's id is its path in the folder, without the ending `.txt` or `.jsonl`; a record's number follows.

        Raises:
            SmartKVError: A file cannot be read rightly. The message names it.
        """
        for root, file in self.files.get(split, self.files.get("*", [])):
            for document in self.read(file, str(file.relative_to(root))):
                if "*" not in self.files or split_of(document.id) == split:
                    yield document

    def why_none(self, split: str) -> str:
        """Return why no document is in a split, and what to do, for a message."""
        if "*" not in self.files:
            return f"{self.path} has no text in a subfolder '{split}', only in {', '.join(self.files)}"
        counts = {each: sum(1 for _ in self.documents(each)) for each in SPLITS}
        spread = ", ".join(f"{each} {count}" for each, count in counts.items())
        return (
            f"a hash of each name divides its {sum(counts.values())} documents into {spread}: "
            f"give more documents, or subfolders {', '.join(SPLITS)}"
        )


def _walk(path: Path) -> list[Path]:
    """Return all files below a folder, also behind links, sorted. A folder that is reached twice is read once."""
    found, seen, waiting = list[Path](), set[str](), [path]

    def fail(error: OSError) -> None:
        raise SmartKVError(f"{error.filename} cannot be read: {error.strerror}") from error

    while waiting:  # links come last, so that a folder inside keeps its own name
        for folder, folders, names in os.walk(waiting.pop(0), onerror=fail):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            found += [Path(folder, name) for name in names]
            waiting += sorted(link for link in (Path(folder, name) for name in folders) if link.is_symlink())
    return sorted(found)


def _kind(name: str) -> str:
    """Return the ending of a file's name in small letters, without `.gz`."""
    small = name.lower()
    return Path(small.removesuffix(".gz")).suffix


def _not_read(path: Path) -> str | None:
    """Return the kind of a file that is not read, for a message; None if it is read."""
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return "hidden"
    if path.name.startswith(("#", "~$")) or path.name.endswith(("~", "#")):
        return "an editor's copy"
    kind = _kind(path.name)
    return None if kind in TEXTS + RECORDS else kind or "without an ending"


def _documents(file: Path, name: str) -> Iterator[Document]:
    """Yield the documents of a file. `name` is its path in the folder."""
    document_id = name.removesuffix(".jsonl" if name.endswith(".jsonl") else ".txt")
    if _kind(name) in TEXTS:
        yield Document(document_id, read_text(file))
    else:
        for number, record in enumerate(read_records(file, "text")):
            yield Document(f"{document_id}/{number}", record["text"])
