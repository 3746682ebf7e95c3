"""The tools for data against a small hub on this machine, in one process, since the libraries take seconds to import;
then again without it."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from loopback_hub import LoopbackHub
from test_hub import IMPATIENT, half_of_each_file

from manual_backprop.data.datasets import download
from manual_backprop.data.datasets.named import dataset_named

COMMANDS = """
import contextlib, importlib, io, json, sys
from manual_backprop.common.exit_codes import exit_code_of

for module, *arguments in json.loads(sys.argv[1]):
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = exit_code_of(lambda: importlib.import_module(f"manual_backprop.tools.{module}").main(arguments))
    print(json.dumps({"code": code, "out": out.getvalue(), "error": said.getvalue()}), flush=True)
"""
TRAIN = [f"story number {number}" for number in range(50)]
VALIDATION = [f"held back {number}" for number in range(30)]
LARGE = [hashlib.shake_128(bytes([number])).hexdigest(10_000) for number in range(200)]
FINEWEB = """\
---
configs:
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""
CASES = {
    "download": ["download_dataset", "owner/stories"],
    "again": ["download_dataset", "owner/stories"],
    "other": ["download_dataset", "owner/stories", "--split", "train"],
    "subset": ["download_dataset", "owner/stories", "--subset", "20", "--output", "few"],
    "stream": ["download_dataset", "fineweb", "--subset", "20", "--revision", "main", "--output", "pages"],
    "by its place": ["download_dataset", "HuggingFaceFW/fineweb", "--revision", "main", "--output", "same pages"],
    "part": ["download_dataset", "owner/large", "--subset", "7", "--output", "part"],
    "cut off": ["download_dataset", "owner/large"],
    "one split": ["download_dataset", "owner/stories", "--split", "validation", "--output", "held back"],
    "from one split": ["tokenization", "train", "registry", "held back", "270"],
    "column": ["download_dataset", "owner/lessons", "--text-key", "story"],
    "lessons": ["download_dataset", "owner/lessons", "--text-key", "textbook"],
    "split": ["download_dataset", "owner/stories", "--split", "tran", "--output", "none"],
    "gated": ["download_dataset", "owner/gated"],
    "missing": ["download_dataset", "owner/missing"],
    "inspect": ["inspect", "owner/stories", "--rows", "2"],
    "inspect the folder": ["inspect", "outputs/datasets/lessons", "--rows", "1", "--tokenizer", "byte"],
    "inspect a column": ["inspect", "owner/lessons"],
    "train": ["tokenization", "train", "registry", "owner/stories", "280"],
    "pretokenize": ["tokenization", "pretokenize", "owner/stories", "stories-280"],
}


def table(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)


def leave_a_part(file: Path, blobs: Path) -> None:
    """What a download that was cut off in the middle of a file leaves in the cache."""
    content = file.read_bytes()
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha1(content).hexdigest()}.going_on").write_bytes(content[:1_500_000])


def ask(
    cases: dict[str, list[str]], folder: Path, environment: dict[str, str], script: str = COMMANDS
) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(cases.values()))],
        env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def online(place: Path) -> dict[str, Any]:
    owner = place / "hub/datasets/owner"
    for name in ("stories", "gated"):
        table(owner / name / "data/train-00000-of-00001.parquet", TRAIN)
        table(owner / name / "data/validation-00000-of-00001.parquet", VALIDATION)
    table(owner / "lessons/data/train-00000-of-00001.parquet", TRAIN, "textbook")
    pages = place / "hub/datasets/HuggingFaceFW/fineweb"
    table(pages / "sample/10BT/000_00000.parquet", TRAIN)
    (pages / "README.md").write_text(FINEWEB)
    table(owner / "large/data/train-00000-of-00001.parquet", LARGE)
    leave_a_part(owner / "large/data/train-00000-of-00001.parquet", place / "home/hub/datasets--owner--large/blobs")
    with LoopbackHub(place / "hub", gated=("owner/gated",)) as hub:
        commit = hub.commit("datasets", "owner/stories")
        return ask(CASES, place, hub.environment(place / "home")) | {"commit": commit}


def test_a_download_is_a_folder_that_can_be_trained_on(online: dict[str, Any], place: Path) -> None:
    from manual_backprop.config.schema import TokenizerConfig
    from manual_backprop.data.datasets.named import dataset_named
    from manual_backprop.data.tokens.corpus import prepare_corpus

    assert online["download"]["code"] == 0, online["download"]["error"]
    folder = place / "outputs/datasets/stories"
    loaded = datasets.load_from_disk(str(folder))
    assert {name: list(split["text"]) for name, split in loaded.items()} == {"train": TRAIN, "validation": VALIDATION}
    source = json.loads((folder / "source.json").read_text())
    assert source["revision"] == online["commit"]
    assert source["rows"] == {"train": 50, "validation": 30}
    assert "dataset=saved dataset.path=outputs/datasets/stories" in online["download"]["out"]
    corpus = prepare_corpus(dataset_named(folder), TokenizerConfig("byte"), place / "cache")
    assert (corpus.train_documents, corpus.validation_documents) == (50, 30)
    assert dataset_named(place / "outputs/datasets/lessons").text_column == "textbook"
    assert "dataset.text_column=textbook" in online["lessons"]["out"]


def test_a_second_download_finds_the_first(online: dict[str, Any], place: Path) -> None:
    assert online["again"]["code"] == 0
    assert "it was there already" in online["again"]["out"]
    assert online["other"]["code"] == 2
    assert "exists and holds other data (split)" in online["other"]["error"]
    assert len(datasets.load_from_disk(str(place / "few"))["train"]) == 20


def test_a_stream_is_taken_up_to_its_bound(online: dict[str, Any], place: Path) -> None:
    assert online["stream"]["code"] == 0, online["stream"]["error"]
    assert list(datasets.load_from_disk(str(place / "pages"))["train"]["text"]) == TRAIN[:20]
    assert not list(place.glob(".pages*/*"))


def test_the_place_of_a_shipped_dataset_means_its_entry(online: dict[str, Any], place: Path) -> None:
    assert online["by its place"]["code"] == 0, online["by its place"]["error"]
    assert "streamed: downloads only the parts of its files with the first 10,000 rows" in online["by its place"]["out"]
    assert list(datasets.load_from_disk(str(place / "same pages"))["train"]["text"]) == TRAIN
    given = dataset_named("nampdn-ai/tiny-textbooks")
    assert given == dataset_named("tiny_textbooks")
    assert (given.text_column, len(given.revision or "")) == ("textbook", 40)


def test_what_is_downloaded_is_said_before_and_a_part_is_streamed(online: dict[str, Any], place: Path) -> None:
    files = [*(place / "hub/datasets/owner/stories/data").iterdir()]
    size = sum(file.stat().st_size for file in files)
    lines = online["download"]["out"].splitlines()
    assert lines[1] == f"to download: {size / 1e6:,.1f} MB ({size:,} bytes) in 2 files"
    large = (place / "hub/datasets/owner/large/data/train-00000-of-00001.parquet").stat().st_size
    assert f"({large - 1_500_000:,} bytes) in 1 file" in online["cut off"]["out"]
    assert "streamed: downloads only the parts of its files with the first 7 rows" in online["part"]["out"]
    splits = datasets.load_from_disk(str(place / "part"))
    assert list(splits["train"]["text"]) == LARGE[:7]


def test_a_download_that_was_cut_off_goes_on(online: dict[str, Any], place: Path) -> None:
    assert "going on at 1.5 MB" in online["cut off"]["out"]
    assert list(datasets.load_from_disk(str(place / "outputs/datasets/large"))["train"]["text"]) == LARGE
    assert not list((place / "home/hub").rglob("*going_on*"))


def test_a_stream_that_was_cut_off_goes_on_after_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files whose rows are kept need not be there any more: nothing of them is fetched again."""
    files = [tmp_path / f"{number}.parquet" for number in range(4)]
    for number, file in enumerate(files):
        table(file, [f"row {row}" for row in range(10 * number, 10 * number + 10)])
    monkeypatch.setattr(download, "SHARD", 8)
    said: list[str] = []

    def fetch() -> list[str]:
        paths = [str(file) for file in files]
        stream = datasets.load_dataset("parquet", data_files={"train": paths}, streaming=True)["train"].take(35)
        return list(download._taken_from_stream(stream, tmp_path / "kept/train", said.append)["text"])

    third = files[2].read_bytes()
    files[2].write_bytes(b"cut off")
    with pytest.raises(Exception, match=r"Parquet|parquet"):
        fetch()
    assert len(list((tmp_path / "kept/train").iterdir())) == 2  # 16 rows of 20
    files[2].write_bytes(third)
    table(files[0], ["another text"] * 10)
    assert fetch() == [f"row {row}" for row in range(35)]
    assert said == ["train: resuming after the first 16 rows"]
    assert fetch() == [f"row {row}" for row in range(35)], "all of them are there"


@pytest.mark.parametrize(
    ("case", "cause", "way_out"),
    [
        ("column", "owner/lessons has no column 'story', only 'textbook'", "--text-key NAME"),
        ("split", "--split tran: owner/stories has no such split", "train, validation"),
        ("gated", "owner/gated is gated", "hf auth login"),
        ("missing", "owner/missing is not on the hub", "check the spelling"),
        ("inspect a column", "owner/lessons has no column 'text', only 'textbook'", "--text-key NAME"),
    ],
)
def test_what_goes_wrong_is_one_sentence(online: dict[str, Any], case: str, cause: str, way_out: str) -> None:
    assert online[case]["code"] == 2
    assert cause in online[case]["error"]
    assert way_out in online[case]["error"]
    assert "dataset." not in online[case]["error"]
    assert len(online[case]["error"].splitlines()) == 1


def test_what_failed_left_nothing(online: dict[str, Any], place: Path) -> None:
    shown = {path.name for path in (place / "outputs/datasets").iterdir() if not path.name.endswith(".lock")}
    assert shown == {"stories", "lessons", "large"}
    assert not (place / "none").exists()


def test_inspect_shows_splits_and_rows(online: dict[str, Any]) -> None:
    assert online["inspect"]["code"] == 0, online["inspect"]["error"]
    shown = online["inspect"]["out"]
    assert "train: " in shown
    assert "validation: " in shown
    assert "columns: text (string)" in shown
    assert '{"text": "story number 1"}' in shown
    assert "    held back 1\n" in shown
    assert "story number 2" not in shown
    saved = online["inspect the folder"]["out"]
    assert "train: 50 rows" in saved
    assert "s|t|o|r|y| |n|u|m" in saved


def test_tokens_of_a_dataset_of_the_hub(online: dict[str, Any], place: Path) -> None:
    from manual_backprop.data.tokens.token_shards import load_pretokenized, manifest_of

    assert online["pretokenize"]["code"] == 0, online["pretokenize"]["error"]
    folder = place / online["pretokenize"]["out"].splitlines()[2]
    settings = manifest_of(folder)["settings"]
    assert settings["dataset"]["source"]["revision"] == online["commit"]
    tokens = load_pretokenized(folder, "validation")
    assert [tokens.tokenizer.decode(tokens.document(number).tolist()) for number in range(30)] == VALIDATION


def test_what_is_advised_for_one_split_can_be_pasted(
    online: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manual_backprop.config.schema import TokenizerConfig
    from manual_backprop.data.tokens.corpus import prepare_corpus
    from manual_backprop.training.command_line import check

    assert online["one split"]["code"] == 0, online["one split"]["error"]
    monkeypatch.chdir(place)
    words = shlex.split(online["one split"]["out"].splitlines()[-1])
    dataset = check(words[words.index("manual_backprop.run") + 1 :]).jobs[0].config.dataset
    assert (dataset.path, dataset.split) == ("held back", "validation")
    corpus = prepare_corpus(dataset, TokenizerConfig("byte"), place / "cache")
    assert corpus.train_documents + corpus.validation_documents == 30
    assert online["from one split"]["code"] == 0, online["from one split"]["error"]


def test_a_download_that_breaks_off_says_that_it_goes_on(online: dict[str, Any], place: Path, tmp_path: Path) -> None:
    with LoopbackHub(place / "hub") as hub:
        hub.server.RequestHandlerClass = half_of_each_file(hub.server.RequestHandlerClass)
        found = ask(
            {"download": ["download_dataset", "owner/stories"]},
            tmp_path,
            hub.environment(tmp_path / "home"),
            IMPATIENT + COMMANDS,
        )["download"]
    assert found["code"] == 2
    (said,) = [line for line in found["error"].splitlines() if "broke off" in line]
    assert "Give the command again: it resumes the download" in said
    assert "Traceback" not in found["error"]
    assert not (tmp_path / "outputs/datasets/stories").exists()


def test_without_a_hub_other_tokenizers_are_advised_that_this_tool_takes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(TRAIN))
    gone = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = ask({"gpt2": ["tokenization", "pretokenize", "text.txt", "gpt2"]}, tmp_path, gone)["gpt2"]
    assert found["code"] == 2
    assert "give byte, or the folder of a tokenizer that tools.tokenization train learned" in found["error"]
    assert "tokenizer=" not in found["error"]


@pytest.mark.slow
def test_without_a_hub_the_tools_use_what_was_downloaded(online: dict[str, Any], place: Path, tmp_path: Path) -> None:
    cases = {
        "analyze": ["tokenization", "analyze", "owner/stories"],
        "inspect": ["inspect", "owner/stories", "--rows", "1"],
        "download": ["download_dataset", "owner/stories"],
        "absent": ["download_dataset", "owner/absent"],
    }
    found = ask(cases, tmp_path, {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"})
    assert [found[case]["code"] for case in cases] == [0, 0, 0, 2], found
    assert "train: 50 rows" in found["inspect"]["out"]
    assert (tmp_path / "outputs/analysis/stories.png").is_file()
    assert (tmp_path / "outputs/datasets/stories/source.json").is_file()
    assert "the hub cannot be reached" in found["absent"]["error"]
