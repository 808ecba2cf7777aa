"""Mutation tests: `mutation.py [--package cache] [--again] [--workers 2]`, for `make mutation`.

mutmut changes one expression of a package of `smartkv/` at a time, and the package's own tests run against it. A change
that no test notices survives. The table counts them by module. `build/mutation/PACKAGE/survivors.diff` shows each one.
A run that was stopped goes on where it stopped.
"""

import argparse
import difflib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mutation"
PACKAGES = ["policies", "labels", "shards", "cache"]  # smallest first; tests/smartkv/PACKAGE judges each
TOO_SLOW = [
    "tests/smartkv/cache/test_real_model.py",  # loads SmolLM2
    "tests/smartkv/cache/test_uncompiled.py::test_a_compiled_model_attends_through_the_cache",  # compiles
    "tests/smartkv/shards/test_shard_file.py::test_equal_content_gives_equal_bytes_in_another_process",  # starts Python
]
# they write, or collect garbage for half a second in each of thousands of sessions
PLUGINS_OFF = ["cacheprovider", "unraisableexception", "threadexception"]
NEEDED = ["smartkv", "tests", "configs", "docs"]
# an error's wording is no promise, so the arguments of a `raise` stay as they are, and so do lines of prose
WORDING = [r"\braise \w+\(", r"\bwarnings\.warn\(", r"""^\s*\(?f?"[^"]* [^"]* [^"]*"[,)]*$"""]
# exit codes of pytest and mutmut; a mutant that crashes Python is killed too, one that no test calls is unseen
KINDS = KILLED, TIMED_OUT, SURVIVED, UNSEEN = {1, 3, -6, -9, -11}, {24, -24, 152}, {0}, {5, 33}
HEADERS = {"---", "+++", "@@ "}  # of a diff
COLUMNS = ["killed", "timed out", "survived", "no test", "to do", "score"]  # to do: without a verdict


def settings(package: str) -> str:
    """Return the checkout's pyproject.toml with mutmut's settings for one package."""
    mutmut = {
        "source_paths": ["smartkv"],
        "only_mutate": [f"smartkv/{package}/*"],
        "also_copy": ["conftest.py", *(name for name in NEEDED if name != "smartkv")],
        "do_not_mutate_patterns": WORDING,
        "pytest_add_cli_args": [f"-pno:{name}" for name in PLUGINS_OFF] + [f"--deselect={name}" for name in TOO_SLOW],
        "pytest_add_cli_args_test_selection": [f"tests/smartkv/{package}"],
        "process_isolation": "forkserver",  # forks a process that has imported torch and the tests, and has run none
        "timeout_multiplier": 5.0,  # a mutant times out after 5 × (its tests' time + 5 s)
        "timeout_constant": 5.0,
        "track_dependencies": False,
        "use_git_change_detection": False,
        "on_dependency_change": "ignore",
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in mutmut.items()]
    return "\n".join([(ROOT / "pyproject.toml").read_text(), "[tool.mutmut]", *lines, ""])


def prepare(package: str) -> Path:
    """Make or refresh the folder in which mutmut works: links to the checkout and mutmut's settings."""
    folder = FOLDER / package
    folder.mkdir(parents=True, exist_ok=True)
    for name in NEEDED:
        (folder / name).unlink(missing_ok=True)  # the folder may have been copied from another checkout
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    (folder / "conftest.py").write_text((ROOT / "scripts" / "mutation_conftest.py").read_text())
    (folder / "pyproject.toml").write_text(settings(package))
    return folder


def results(folder: Path, package: str) -> dict[str, dict[str, int | None]]:
    """Return module -> mutant -> exit code of its tests, None where they have not run."""
    files = sorted((folder / "mutants" / "smartkv" / package).glob("*.meta"))
    return {file.name.removesuffix(".py.meta"): json.loads(file.read_text())["exit_code_by_key"] for file in files}


def forget(folder: Path, package: str, survivors: bool) -> None:
    """Have mutants without a verdict tested again, and on request survivors: for tests that are new or better now."""
    verdicts = set().union(*(KILLED, TIMED_OUT) if survivors else KINDS)
    for file in (folder / "mutants" / "smartkv" / package).glob("*.meta"):
        meta = json.loads(file.read_text())
        codes = meta["exit_code_by_key"]
        codes.update({name: None for name, code in codes.items() if code not in verdicts})
        file.write_text(json.dumps(meta))
    if survivors:
        (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which test calls which function


def survivors(folder: Path, package: str) -> Iterator[str]:
    """Yield each surviving mutant as a diff."""
    for module, codes in results(folder, package).items():
        source = folder / "mutants" / "smartkv" / package / f"{module}.py"
        lines = source.read_text().splitlines()
        spans = json.loads(source.with_name(f"{module}.py.spans").read_text())["spans"]
        for name in (name for name, code in codes.items() if code in SURVIVED | UNSEEN):
            mutant = name.rpartition(".")[2]
            original = f"{mutant.rpartition('__mutmut_')[0]}__mutmut_orig"
            (first, last), (start, end) = spans[original], spans[mutant]
            before, after = lines[first - 1 : last], [line.replace(mutant, original) for line in lines[start - 1 : end]]
            changed = [
                line for line in difflib.unified_diff(before, after, lineterm="", n=0) if line[:3] not in HEADERS
            ]
            yield "\n".join([f"# {name}", *changed, ""])


def row(codes: dict[str, int | None]) -> list[str]:
    """Return what COLUMNS names, for some mutants; killed and timed out ones count for the score."""
    count = Counter(codes.values())
    killed, timed_out, survived, unseen = (sum(count[code] for code in kind) for kind in KINDS)
    judged = killed + timed_out + survived + unseen
    score = f"{(killed + timed_out) / judged:.1%}" if judged else "-"
    return [*map(str, (killed, timed_out, survived, unseen, len(codes) - judged)), score]


def summary(package: str) -> None:
    """Print the table of a package and write its survivors."""
    folder = FOLDER / package
    modules = results(folder, package)
    rows = {f"{package}/{module}": row(codes) for module, codes in modules.items() if codes}
    rows[package] = row({name: code for codes in modules.values() for name, code in codes.items()})
    width = max(map(len, rows))
    print(" ".join([" " * width, *(f"{column:>9}" for column in COLUMNS)]))
    for name, cells in rows.items():
        print(" ".join([f"{name:<{width}}", *(f"{cell:>9}" for cell in cells)]))
    file = folder / "survivors.diff"
    file.write_text("\n".join(survivors(folder, package)))
    print(f"survivors: {file.relative_to(ROOT)}\n")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=PACKAGES, help="default: all of them, the smallest first")
    parser.add_argument("--again", action="store_true", help="test survivors of earlier runs again")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time, each with one thread")
    args = parser.parse_args()
    # some functions are called by minutes of tests: the quickest judge first, and more of them what they let pass
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MUTATION_SECONDS": "60" if args.again else "10"}
    for package in [args.package] if args.package else PACKAGES:
        folder = prepare(package)
        forget(folder, package, survivors=args.again)
        command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", str(args.workers)]
        code = subprocess.run(command, cwd=folder, env=os.environ | environment).returncode
        if code:
            sys.exit(code)
        summary(package)


if __name__ == "__main__":
    main()
