"""A user's own folder or file of texts: which files are read, and which split each document belongs to."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.code_files import ENDINGS, NO_CODE, in_turns, read_source, why_not
from smartkv.texts.documents import Document, split_of
from smartkv.texts.text_files import read_records, read_text

TEXTS, RECORDS = (".txt", ".md"), (".jsonl",)  # a document a file, a document a line
READ = ".txt, .md or .jsonl (each also with .gz)"
READ_CODE = "source files such as .py, .js, .c, .rs or .md"


@dataclass
class OwnTexts:
    """The files that are read of a folder, or of a single file.

    A `.txt` or `.md` file is one document, each line of a `.jsonl` file another, with its text in the field `text`.
    Capitals in an ending make no difference, and `.gz` may follow it. Folders behind links are read. Hidden files and
    editors' copies are not.

    As code, each source file is a document. All files of one subfolder of `path` are in the same split, and the
    subfolders take turns. Generated and minified files, tables of data and files that are not in UTF-8 are not read,
    nor the folders of environments and caches. A folder of code may well have a subfolder `test`: subfolders named like
    splits are the splits only if one of them is `train`.

    Attributes:
        path: The folder or file.
        code: Whether source files are read in place of texts.
        files: Files to read, with the folder that their names start from, by split; under "*" if there are no
            subfolders named like splits, and a hash of each document's id decides.
        skipped: Number of files that are not read, by kind.
    """

    path: Path
    code: bool = False
    files: dict[str, list[tuple[Path, Path]]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def find(cls, path: Path, code: bool = False) -> "OwnTexts":
        """List the files of a folder.

        Args:
            path: The folder or file.
            code: Whether source files are read in place of texts.

        Raises:
            SmartKVError: The path does not exist, cannot be read, or holds no file of text.
        """
        own, expected = cls(path, code), READ_CODE if code else READ
        if not path.is_dir():
            if not path.exists():
                raise SmartKVError(f"path {path} does not exist")
            own.files["*"] = [(path.parent, path)] if _kind(path.name) in own._kinds | {*RECORDS} else []
            if not own.files["*"]:
                raise SmartKVError(f"{path} is no file of {'code' if code else 'text'}: expected {expected}")
        else:
            everything = _walk(path, own.skipped if code else None)
            roots = {split: path / split for split in SPLITS if (path / split).is_dir()}
            if code and "train" not in roots:
                roots = {}
            for split, root in roots.items():
                own.files[split] = own._chosen([file for file in everything if root in file.parents], root)
            outside = [file for file in everything if not any(root in file.parents for root in roots.values())]
            if not roots:
                own.files["*"] = own._chosen(outside, path)
            elif outside:
                own.skipped[f"outside of {', '.join(roots)}"] += len(outside)
        if not any(own.files.values()):
            found = f"only files that are not read ({own.skipped_in_words})" if own.skipped else "no file"
            raise SmartKVError(f"{path} holds {found}: expected {expected}")
        return own

    @property
    def _kinds(self) -> frozenset[str]:
        """Endings of the files that are read in a folder."""
        return ENDINGS if self.code else frozenset(TEXTS + RECORDS)

    def _chosen(self, files: list[Path], root: Path) -> list[tuple[Path, Path]]:
        """Return the files that are read, and count the others."""
        chosen = []
        for file in files:
            kind = _not_read(file.relative_to(root), self._kinds)
            if kind is None and self.code:
                kind = why_not(read_source(file))
            if kind is None:
                chosen.append((root, file))
            else:
                self.skipped[kind] += 1
        if not self.code:
            return chosen
        subfolders: dict[str, list[str]] = {}
        for _, file in chosen:
            name = str(file.relative_to(root))
            subfolders.setdefault(_subfolder(name), []).append(name)
        return [(root, root / name) for name in in_turns(subfolders)]

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
        Without split folders a hash of the id divides them, of code a hash of the subfolder's name.

        Raises:
            SmartKVError: A file cannot be read rightly. The message names it.
        """
        for root, file in self.files.get(split, self.files.get("*", [])):
            for document in _documents(file, str(file.relative_to(root))):
                if "*" not in self.files or split_of(self._divided_by(document.id)) == split:
                    yield document

    def _divided_by(self, document_id: str) -> str:
        """Return the name whose hash decides the split of a document."""
        return _subfolder(document_id) if self.code and self.path.is_dir() else document_id

    def why_none(self, split: str) -> str:
        """Return why no document is in a split, and what to do, for a message."""
        if "*" not in self.files:
            return f"{self.path} has no text in a subfolder '{split}', only in {', '.join(self.files)}"
        counts = {each: sum(1 for _ in self.documents(each)) for each in SPLITS}
        spread = ", ".join(f"{each} {count}" for each, count in counts.items())
        return (
            f"a hash of each {'subfolder' if self.code else 'name'} divides its {sum(counts.values())} documents into "
            f"{spread}: give more {'subfolders' if self.code else 'documents'}, or subfolders {', '.join(SPLITS)}"
        )


def _walk(path: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """Return all files below a folder, also behind links, sorted. A folder that is reached twice is read once.

    If `left_out` is given, hidden folders and those of environments and caches are not entered, but counted in it.
    """
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
            if left_out is not None:
                left_out.update(f"{name}/" for name in folders if _holds_no_code(Path(folder, name)))
                folders[:] = [name for name in folders if not _holds_no_code(Path(folder, name))]
            found += [Path(folder, name) for name in names]
            waiting += sorted(link for link in (Path(folder, name) for name in folders) if link.is_symlink())
    return sorted(found)


def _holds_no_code(folder: Path) -> bool:
    """Whether a folder is hidden, a cache or an environment of packages."""
    return folder.name.startswith(".") or folder.name in NO_CODE or (folder / "pyvenv.cfg").exists()


def _subfolder(name: str) -> str:
    """Return the first folder in the path of a file, or the file itself."""
    return Path(name).parts[0]


def _kind(name: str) -> str:
    """Return the ending of a file's name in small letters, without `.gz`."""
    small = name.lower()
    return Path(small.removesuffix(".gz")).suffix


def _not_read(path: Path, kinds: frozenset[str]) -> str | None:
    """Return the kind of a file that is not read, for a message; None if it is read. `kinds` are the endings read."""
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return "hidden"
    if path.name.startswith(("#", "~$")) or path.name.endswith(("~", "#")):
        return "an editor's copy"
    kind = _kind(path.name)
    return None if kind in kinds else kind or "without an ending"


def _documents(file: Path, name: str) -> Iterator[Document]:
    """Yield the documents of a file. `name` is its path in the folder."""
    document_id = name.removesuffix(".jsonl" if name.endswith(".jsonl") else ".txt")
    if _kind(name) in RECORDS:
        for number, record in enumerate(read_records(file, "text")):
            yield Document(f"{document_id}/{number}", record["text"])
    else:
        yield Document(document_id, read_text(file))
