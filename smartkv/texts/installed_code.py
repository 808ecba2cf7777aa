"""Python code that every environment has: the standard library, and the packages that are installed beside it."""

import os
import site
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.texts.code_files import NO_CODE, in_turns, read_source, why_not
from smartkv.texts.documents import Document, split_of

SHORTEST = 500  # characters of a file
# folders that are left out: tests, copies of other packages, prose that is the source `builtin`
LEFT_OUT = NO_CODE | {
    *("test", "tests", "idle_test", "conftest.py"),
    *("_vendor", "_vendored", "vendor", "vendored", "externals", "_externals", "extern", "third_party"),
    *("pydoc_data", "smartkv"),
}
RELATED = {  # names whose code is copied or shared, and the name that decides the split of all of them
    name: group.split()[0]
    for group in (
        "lightning pytorch_lightning lightning_fabric",
        "setuptools pkg_resources distutils",
        "multiprocessing multiprocess",
        "asyncio aiohappyeyeballs",
        "importlib importlib_metadata importlib_resources zipp",
        "typing typing_extensions",
        "tomllib tomli",
        "zoneinfo dateutil",
        "lib2to3 tokenize",
        "torch torchgen functorch",
        "pytest _pytest py",
        "mypy mypyc",
        "click typer",
        "email imghdr sndhdr",
        "wave aifc sunau chunk",
        "bz2 lzma gzip",
        "posixpath ntpath",
        "abc _py_abc",
        "profile cProfile",
        "datetime _pydatetime",
        "decimal _pydecimal",
        "io _pyio",
    )
    for name in group.split()
}


@dataclass(frozen=True)
class InstalledCode:
    """The Python files of an environment, by package.

    All files of a package, or of a module of the standard library, are in the split that a hash of its name decides.

    Attributes:
        files: Path of each file, by package and by id of the document, which is its path below the folder of packages.
    """

    files: dict[str, dict[str, Path]]

    @classmethod
    def find(cls) -> "InstalledCode":
        """List the Python files of the running environment.

        Raises:
            SmartKVError: There is none.
        """
        paths = sysconfig.get_paths()
        roots = dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()])
        files: dict[str, dict[str, Path]] = {}
        for root in map(Path, roots):
            for path in _python_files(root):
                relative = path.relative_to(root)
                package = files.setdefault(relative.parts[0].removesuffix(".py"), {})
                package.setdefault(relative.as_posix(), path)
        if not files:
            raise SmartKVError(f"no Python file lies in {', '.join(roots)}: give the source a path to a folder of code")
        return cls(files)

    @property
    def count(self) -> int:
        """Number of files, of which some are left out when they are read."""
        return sum(map(len, self.files.values()))

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the files of a split, one of each package in turn.

        Generated files, tables of data, files that are not in UTF-8 and those of less than 500 characters are left out.
        """
        packages = {name: files for name, files in self.files.items() if split_of(RELATED.get(name, name)) == split}
        paths = {name: path for files in packages.values() for name, path in files.items()}
        for name in in_turns(packages):
            text = read_source(paths[name])
            if text is not None and len(text) >= SHORTEST and why_not(text) is None:
                yield Document(name, text)


def _python_files(root: Path) -> Iterator[Path]:
    """Yield the Python files of all packages in a folder."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name.isidentifier() and name not in LEFT_OUT]
        for name in names:
            stem = name.removesuffix(".py")
            if stem != name and stem.isidentifier() and name not in LEFT_OUT and not _is_test(stem):
                yield Path(folder, name)


def _is_test(stem: str) -> bool:
    return stem.startswith(("test_", "__editable__")) or stem.endswith("_test")
