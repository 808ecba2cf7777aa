"""Conversations of a user's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.sources import SourceConfig, resolve_source
from smartkv.texts.windows import plan_windows
from tests.models import tiny_tokenizer
from tests.smartkv.texts.fixtures import assert_disjoint, by_split, quiet, write_jsonl


def talk(number: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": f"say {number}"}]
    }


@pytest.mark.parametrize("name", ["chat", "recall_chat"])
def test_each_line_is_a_conversation_and_other_files_are_counted(name: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "talks.jsonl", [talk(number) for number in range(40)])
    (tmp_path / "notes.md").write_text("not a conversation")
    lines: list[str] = []
    found = by_split(resolve_source(SourceConfig(name, path=str(tmp_path)), lines.append))
    assert_disjoint(found)
    contents = [message.content for split in SPLITS for document in found[split] for message in document.messages]
    assert sorted(contents) == sorted(f"{word} {number}" for number in range(40) for word in ("ask", "say"))
    assert lines == [f"source '{name}': 1 file in {tmp_path}; not read: 1 .md"]


def test_windows_are_in_the_template_of_the_model(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train" / "talks.jsonl", [talk(number) for number in range(40)])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    lines: list[str] = []
    config = [SourceConfig("chat", path=str(path.parent.parent))]
    plan = plan_windows(config, {"train": 2}, tokenizer, 128, say=lines.append)
    text = tokenizer.decode(plan.tokens[0].tolist())
    assert text.startswith("<user>ask 0</><assistant>say 0</><user>ask 1</><assistant>say 1</>") and len(lines) == 1


def test_a_tokenizer_without_a_template_is_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train" / "talks.jsonl", [talk(number) for number in range(40)])
    lines: list[str] = []
    config = [SourceConfig("chat", path=str(path.parent.parent))]
    plan = plan_windows(config, {"train": 2}, tiny_tokenizer(), 128, say=lines.append)
    assert lines[1] == "source 'chat': the tokenizer has no chat template: turns are lines 'User: …'"
    assert tiny_tokenizer().decode(plan.tokens[0].tolist()).startswith("User: ask 0\nAssistant: say 0\n")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a text"}, "line 2: expected an object with a list"),
        ({"messages": []}, "line 2: expected an object with a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 2: a role in 'messages' must be one of system, user"),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "line 2: each of 'messages' must be an object with a string",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "line 2: a message has half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(record: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "train" / "talks.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(talk(0)) + "\n" + json.dumps(record) + "\n")
    source = resolve_source(SourceConfig("chat", path=str(tmp_path)), quiet)
    with pytest.raises(SmartKVError, match=reason):
        list(source.documents("train"))


def test_a_folder_without_conversations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a conversation")
    with pytest.raises(SmartKVError, match=r"source 'chat': .* holds no conversations: expected .jsonl"):
        resolve_source(SourceConfig("chat", path=str(tmp_path)), quiet)
