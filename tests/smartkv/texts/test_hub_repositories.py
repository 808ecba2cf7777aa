"""Every named source from its repository on a hub, read by `datasets`' own client over HTTP."""

import gzip
import io
import json
import os
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from smartkv.shards.manifest import SPLITS
from smartkv.texts.known_sources import ALTERNATIVES, KNOWN
from tests.conftest import ROOT
from tests.smartkv.texts.fixtures import wikitext
from tests.smartkv.texts.hub_server import Repositories, hub_server

READ = """
import json, sys
from smartkv.texts.sources import SourceConfig, resolve_source
found = {}
for name in sys.argv[1:]:
    source = resolve_source(SourceConfig(name, origins=["hub"]), lambda line: print(line, file=sys.stderr))
    documents = {split: [[d.id, d.text] for d in source.documents(split)] for split in ("train", "validation", "test")}
    found[name] = {"origin": source.origin, "documents": documents}
print(json.dumps(found))
"""


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records), file)
    return file.getvalue()


def as_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def card(configuration: str, files: dict[str, str]) -> bytes:
    """A data set's card that says where its splits are; file names are those of the real repositories."""
    data = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in files.items())
    return f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{data}---\n".encode()


def book(split: str, number: int) -> dict[str, Any]:
    return {
        "short_book_title": f"{split} book {number}",
        "publication_date": 1900,
        "url": "",
        "text": f"{split} {number}",
    }


FIRST = {"train": 0, "validation": 10, "test": 20}  # number of the first article of each split


def lines(first: int) -> list[dict[str, Any]]:
    """Rows of WikiText: a line each, and one whose text is empty for a blank line."""
    return [{"text": line if line.strip() else ""} for line in wikitext(first, 3).splitlines(keepends=True)]


def article(split: str, number: int) -> dict[str, Any]:
    return {"article": f"{split} news {number}", "highlights": "short", "id": f"{number:040x}"}


def repositories() -> Repositories:
    """Tiny data sets with the columns, splits and file formats of the real ones."""
    question = lambda split, i: {"question": f"{split} {i}?", "answer": f"#### {i}"}  # noqa: E731
    problem = lambda i: {"problem": f"p{i}", "solution": f"s{i}", "answer": str(i)}  # noqa: E731
    page = lambda i: {"text": f"page {i}", "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{i}"}  # noqa: E731
    pages = [page(i) for i in range(30)]
    return {
        "emozilla/pg19": {
            "README.md": card("default", {split: f"data/{split}-*" for split in SPLITS}),
            **{f"data/{s}-00000-of-00001.parquet": as_parquet([book(s, i) for i in range(3)]) for s in SPLITS},
        },
        "openai/gsm8k": {
            "README.md": card("main", {split: f"main/{split}-*" for split in ("train", "test")}),
            "main/train-00000-of-00001.parquet": as_parquet([question("train", i) for i in range(40)]),
            "main/test-00000-of-00001.parquet": as_parquet([question("test", i) for i in range(5)]),
        },
        "HuggingFaceH4/MATH-500": {
            "README.md": b"---\n---\n",
            "test.jsonl": as_lines([problem(i) | {"unique_id": f"test/algebra/{i}.json"} for i in range(40)]),
        },
        "HuggingFaceH4/aime_2024": {
            "README.md": card("default", {"train": "data/train-*"}),
            "data/train-00000-of-00001.parquet": as_parquet([problem(i) | {"id": 60 + i} for i in range(30)]),
        },
        "allenai/c4": {
            "README.md": card("en", {"validation": "en/c4-validation.*.json.gz"}),
            "en/c4-validation.00000-of-00008.json.gz": gzip.compress(as_lines(pages[:15])),
            "en/c4-validation.00001-of-00008.json.gz": gzip.compress(as_lines(pages[15:])),
        },
        "HuggingFaceFW/fineweb-edu": {
            "README.md": card("sample-10BT", {"train": "sample/10BT/*"}),
            "sample/10BT/000_00000.parquet": as_parquet([page(i) | {"id": f"<urn:uuid:{i}>"} for i in range(30)]),
        },
        "Salesforce/wikitext": {
            "README.md": card("wikitext-103-raw-v1", {split: f"wikitext-103-raw-v1/{split}-*" for split in SPLITS}),
            **{
                f"wikitext-103-raw-v1/{split}-00000-of-00001.parquet": as_parquet(lines(first))
                for split, first in FIRST.items()
            },
        },
        "abisee/cnn_dailymail": {
            "README.md": card("3.0.0", {split: f"3.0.0/{split}-*" for split in SPLITS}),
            **{
                f"3.0.0/{split}-00000-of-00001.parquet": as_parquet([article(split, i) for i in range(3)])
                for split in SPLITS
            },
        },
    }


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own reads of all sources: the client takes its endpoint when it is imported."""
    cache = tmp_path_factory.mktemp("hub")
    with hub_server(repositories()) as endpoint:
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", READ, *KNOWN, *ALTERNATIVES]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def documents(read: dict[str, Any], name: str) -> dict[str, dict[str, str]]:
    """Texts by id and split of one source, whose ids are unique."""
    by_split = {split: dict(pairs) for split, pairs in read[name]["documents"].items()}
    assert all(len(by_split[split]) == len(pairs) for split, pairs in read[name]["documents"].items())
    return by_split


def test_every_named_source_is_served_here(read: dict[str, Any]) -> None:
    assert {hub for hub, _, _ in (known.hub for known in KNOWN.values())} == set(repositories())
    assert set(read) == {*KNOWN, *ALTERNATIVES} and all(found["origin"] == "hub" for found in read.values())


def test_books_keep_the_splits_of_the_hub(read: dict[str, Any]) -> None:
    found = documents(read, "pg19")
    assert found == {split: {f"{split} book {i}": f"{split} {i}" for i in range(3)} for split in SPLITS}


def test_problems_of_gsm8k_are_divided_and_its_test_problems_kept_apart(read: dict[str, Any]) -> None:
    found = documents(read, "gsm8k")
    assert found["train"] and found["validation"] and not found["train"].keys() & found["validation"].keys()
    harvested = {*found["train"].values(), *found["validation"].values()}
    assert harvested < {f"Question: train {i}?\nAnswer: #### {i}" for i in range(40)} and len(harvested) > 30
    assert list(found["test"].values()) == [f"Question: test {i}?\nAnswer: #### {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("math500", [f"Problem: p{i}\nSolution: s{i}" for i in range(40)]),
        ("aime24", [f"Problem: p{i}\nSolution: s{i}" for i in range(30)]),
        ("c4", [f"page {i}" for i in range(30)]),
        ("fineweb_edu", [f"page {i}" for i in range(30)]),
    ],
)
def test_a_source_of_one_split_is_divided_by_id_and_loses_nothing(
    name: str, texts: list[str], read: dict[str, Any]
) -> None:
    found = documents(read, name)
    ids = [set(found[split]) for split in SPLITS]
    assert ids[0] and ids[1] and not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert sorted(text for split in SPLITS for text in found[split].values()) == sorted(texts)


def test_web_pages_are_those_of_fineweb_edu_where_the_hub_has_them(read: dict[str, Any]) -> None:
    assert read["web"] == read["fineweb_edu"]


def test_articles_of_the_encyclopaedia_are_put_together_from_rows(read: dict[str, Any]) -> None:
    found = documents(read, "encyclopaedia")
    assert {split: list(texts) for split, texts in found.items()} == {
        split: [f"Town {number}" for number in range(first, first + 3)] for split, first in FIRST.items()
    }
    assert found["validation"]["Town 11"] == (
        "# Town 11\n\nTown 11 has 1,1100 people.\n\n## History\n\nIt was built in 11."
    )


def test_news_keep_the_splits_of_the_hub(read: dict[str, Any]) -> None:
    found = documents(read, "news")
    assert {split: list(texts.values()) for split, texts in found.items()} == {
        split: [f"{split} news {number}" for number in range(3)] for split in SPLITS
    }
