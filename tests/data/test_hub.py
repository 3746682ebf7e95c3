"""Datasets of the hub: the `datasets` library itself, against a small hub on this machine, then without one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from loopback_hub import LoopbackHub

# One process prepares many corpora, since the libraries take seconds to import. It is asked, and answers, in JSON.
PREPARE = """
import json, logging, sys
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from pathlib import Path
from manual_backprop.data.tokens.corpus import prepare_corpus
from manual_backprop.data.tokens.labelled_corpus import open_test_split as open_labelled_test, prepare_labelled
from manual_backprop.data.tokens.pair_corpus import prepare_pairs
from manual_backprop.data.tokens.test_split import open_test_split
from manual_backprop.common.errors import InputError

logging.basicConfig(level=logging.WARNING)
for case in json.loads(sys.argv[1]):
    dataset = {"name": "hub", "split": "train", "text_column": "text", **case.get("dataset", {})}
    tokenizer = {"name": "byte", **case.get("tokenizer", {})}
    try:
        if dataset["name"] == "pairs":
            pairs = DatasetConfig(**{**dataset, "text_column": None})
            corpus = prepare_pairs(pairs, TokenizerConfig("char"), True, Path(sys.argv[2]))
            answer = {name: len(split) for name, split in corpus.splits.items()} | {"notes": corpus.notes}
            answer |= {"where": corpus.splits["train"].where(0), "digest": corpus.dataset_digest}
            print(json.dumps(answer), flush=True)
            continue
        if dataset["name"] == "labelled":
            labelled = DatasetConfig(**{**dataset, "text_column": None})
            corpus = prepare_labelled(labelled, TokenizerConfig(**tokenizer), Path(sys.argv[2]))
            test, _ = open_labelled_test(labelled, corpus)
            answer = {name: len(split) for name, split in (*corpus.splits.items(), ("test", test))}
            first = corpus.tokenizer.decode(test.ids(0).tolist()[:-1]), corpus.labels[test.labels[0]]
            answer |= {"labels": corpus.labels, "first": first, "digest": corpus.dataset_digest}
            print(json.dumps(answer), flush=True)
            continue
        corpus = prepare_corpus(DatasetConfig(**dataset), TokenizerConfig(**tokenizer), sys.argv[2])
        split = lambda tokens, offsets: [
            corpus.tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())
        ]
        answer = {
            "train": split(corpus.train, corpus.train_offsets),
            "validation": split(corpus.validation, corpus.validation_offsets),
            "notes": corpus.notes,
            "digest": corpus.dataset_digest,
            "vocab_size": corpus.tokenizer.vocab_size,
        }
        if case.get("test"):
            held_out, notes = open_test_split(DatasetConfig(**dataset), corpus, sys.argv[2])
            answer |= {"test": split(held_out.tokens, held_out.offsets), "test notes": notes}
    except InputError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""
TRAIN = [f"story number {number}" for number in range(50)]
IMPATIENT = "import time\ntime.sleep = lambda seconds: None\n"  # the libraries ask a broken hub many times
VALIDATION = [f"held back {number}" for number in range(30)]
TEST = [f"never seen {number}" for number in range(40)]


def table(path: Path, texts: list[str | None], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(texts, pyarrow.string())}), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    owner = root / "datasets/owner"
    for name in ("stories", "gated"):
        table(owner / name / "data/train-00000-of-00001.parquet", list(TRAIN))
        table(owner / name / "data/validation-00000-of-00001.parquet", list(VALIDATION))
    table(owner / "tested/data/train-00000-of-00001.parquet", list(TRAIN), "story")
    table(owner / "tested/data/test-00000-of-00001.parquet", list(VALIDATION), "story")
    table(owner / "late/data/validation-00000-of-00001.parquet", list(VALIDATION))
    for split, texts in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        table(owner / f"three/data/{split}-00000-of-00001.parquet", list(texts))
    both = [{"en": text, "de": f"{text}!"} for text in TRAIN]
    (owner / "translated/data").mkdir(parents=True)
    translated = owner / "translated/data/train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"translation": both}), translated)
    classes = {
        "label": {"names": ["odd", "even"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    for split, texts in (("train", TRAIN), ("test", TEST)):
        numbers = pyarrow.table({"text": texts, "label": [(n + 1) % 2 for n in range(len(texts))]})
        described = numbers.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": classes}})})
        (owner / "labelled/data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(described, owner / f"labelled/data/{split}-00000-of-00001.parquet")
    (owner / "lines").mkdir()
    (owner / "lines/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN))
    table(owner / "holes/data/train-00000-of-00001.parquet", [*TRAIN, None])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAIN, trainer)
    (root / "models/openai/gpt2").mkdir(parents=True)
    tokenizer.save(str(root / "models/openai/gpt2/tokenizer.json"))
    return root


TRANSLATED = {"name": "pairs", "format": "hub", "path": "owner/translated"}
TRANSLATED |= {"source_column": "translation.en", "target_column": "translation.de"}
LABELLED = {"name": "labelled", "format": "hub", "path": "owner/labelled", "validation": 0.2}
GPT2 = {"name": "gpt2", "repository": "openai/gpt2"}
CASES: dict[str, dict[str, Any]] = {
    "stories": {"dataset": {"repository": "owner/stories"}},
    "again": {"dataset": {"repository": "owner/stories"}, "tokenizer": {"name": "char"}},
    "subset": {"dataset": {"repository": "owner/stories", "subset_size": 20}},
    "share": {"dataset": {"repository": "owner/stories", "validation": 0.2}},
    "named": {"dataset": {"repository": "owner/stories", "validation": "train", "split": "validation"}},
    "stream": {"dataset": {"repository": "owner/stories", "subset_size": 20, "streaming": True}},
    "lines": {"dataset": {"repository": "owner/lines"}},
    "tested": {"dataset": {"repository": "owner/tested", "text_column": "story"}},
    "three": {"dataset": {"repository": "owner/three"}, "test": True},
    "three streamed": {"dataset": {"repository": "owner/three", "subset_size": 30, "streaming": True}, "test": True},
    "validation tests": {"dataset": {"repository": "owner/three", "test": "validation"}, "test": True},
    "no test": {"dataset": {"repository": "owner/stories"}, "test": True},
    "gpt2": {"dataset": {"repository": "owner/stories"}, "tokenizer": GPT2},
    "column": {"dataset": {"repository": "owner/stories", "text_column": "story"}},
    "streamed column": {
        "dataset": {"repository": "owner/stories", "text_column": "story", "subset_size": 9, "streaming": True}
    },
    "split": {"dataset": {"repository": "owner/stories", "split": "tran"}},
    "config": {"dataset": {"repository": "owner/stories", "config": "no"}},
    "revision": {"dataset": {"repository": "owner/stories", "revision": "no"}},
    "gated": {"dataset": {"repository": "owner/gated"}},
    "missing": {"dataset": {"repository": "owner/missing"}},
    "null": {"dataset": {"repository": "owner/holes"}},
    "trained on": {"dataset": {"repository": "owner/stories", "validation": "train"}},
    "held back alone": {"dataset": {"repository": "owner/late", "split": "validation"}},
    "pairs": {"dataset": TRANSLATED},
    "pairs without": {"dataset": TRANSLATED | {"source_column": "translation.fr"}},
    "labelled": {"dataset": LABELLED},
    "labelled without": {"dataset": LABELLED | {"label_column": "kind"}},
    "labelled split": {"dataset": LABELLED | {"split": "tran"}},
    "endless": {"dataset": {"repository": "owner/stories", "streaming": True}},
}


def prepare(
    cases: dict[str, dict[str, Any]], cache: Path, environment: dict[str, str], script: str = PREPARE
) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(cases.values())), cache],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True)) | {"said": done.stderr}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def commit(folder: Path) -> str:
    return LoopbackHub(folder).commit("datasets", "owner/stories")


@pytest.fixture(scope="module")
def online(folder: Path, home: Path, commit: str) -> dict[str, Any]:
    """What the cases came to; the hub is gone afterwards, and what `datasets` downloaded lies in home."""
    pinned = {
        "pinned": {"dataset": {"repository": "owner/stories", "subset_size": 9, "streaming": True, "revision": commit}}
    }
    with LoopbackHub(folder, gated=("owner/gated",)) as hub:
        return prepare(CASES | pinned, home / "cache", hub.environment(home)) | {"url": hub.url}


def test_a_dataset_with_a_validation_split(online: dict[str, Any]) -> None:
    assert online["stories"]["train"] == TRAIN
    assert online["stories"]["validation"] == VALIDATION
    assert [note for note in online["stories"]["notes"] if "split" in note] == []
    assert online["again"]["digest"] == online["stories"]["digest"]


def test_pairs_of_the_hub(online: dict[str, Any]) -> None:
    found = online["pairs"]
    assert found["train"] + found["validation"] == 50
    assert found["where"] in {f"owner/translated, split train, row {row}" for row in range(1, 9)}
    assert "a tenth of its documents is used for validation" in found["notes"][0]
    assert "no column 'translation.fr', only 'translation.en', 'translation.de'" in online["pairs without"]["error"]
    assert "dataset.source_column=NAME" in online["pairs without"]["error"]


def test_labelled_texts_of_the_hub(online: dict[str, Any]) -> None:
    """Numbers of classes are their names; a test split is the dataset's own."""
    found = online["labelled"]
    assert found["labels"] == ["even", "odd"]
    assert [found[name] for name in ("train", "validation", "test")] == [40, 10, 40]
    assert found["first"] == [TEST[0], "even"]
    assert "no column 'kind', only 'label', 'text'" in online["labelled without"]["error"].replace(
        "'text', 'label'", "'label', 'text'"
    )
    assert "dataset.split=tran: owner/labelled has no such split, only train, test" in online["labelled split"]["error"]


def test_subsets_and_shares(online: dict[str, Any]) -> None:
    assert online["subset"]["train"] == TRAIN[:20]
    assert online["subset"]["validation"] == VALIDATION[:2]
    assert sorted(online["share"]["train"] + online["share"]["validation"]) == sorted(TRAIN)
    assert 7 <= len(online["share"]["validation"]) <= 10
    assert online["named"]["train"] == VALIDATION
    assert online["named"]["validation"] == TRAIN


def test_a_stream_is_taken_up_to_its_bound(online: dict[str, Any]) -> None:
    assert online["stream"]["train"] == TRAIN[:20]
    assert online["stream"]["validation"] == VALIDATION[:2]
    assert "needs a limit" in online["endless"]["error"]
    assert "dataset.subset_size=NUMBER" in online["endless"]["error"]


def test_without_a_validation_split_it_says_what_validates(online: dict[str, Any]) -> None:
    assert online["tested"]["validation"] == VALIDATION
    assert online["tested"]["notes"][:1] == [
        "owner/tested has no validation split: its test split is used for validation"
    ]
    assert sorted(online["lines"]["train"] + online["lines"]["validation"]) == sorted(TRAIN)
    assert len(online["lines"]["validation"]) == 5
    assert online["lines"]["notes"][:1] == [
        "owner/lines has no validation split: a tenth of its documents is used for validation"
    ]


def test_a_validation_split_that_is_trained_on_is_not_said_to_be_absent(online: dict[str, Any]) -> None:
    assert online["held back alone"]["notes"][:1] == [
        "owner/late has no validation split but validation, the training split: a tenth of its documents is used for "
        "validation"
    ]


def test_a_test_split_is_read_beside_the_others(online: dict[str, Any]) -> None:
    assert (online["three"]["train"], online["three"]["validation"]) == (TRAIN, VALIDATION)
    assert online["three"]["test"] == TEST
    assert online["three"]["test notes"] == []
    assert online["three streamed"]["test"] == TEST[:3]
    assert online["validation tests"]["test"] == VALIDATION
    assert online["validation tests"]["digest"] == online["three"]["digest"]
    assert online["validation tests"]["test notes"] == [
        "split validation of owner/three is the validation split, the same text"
    ]
    assert online["no test"]["error"] == "owner/stories has no split 'test', only train, validation."


def test_a_revision_that_is_no_commit_is_said(online: dict[str, Any], commit: str) -> None:
    (said,) = online["stream"]["notes"]
    assert said.startswith(f"dataset.revision=null pins no commit of owner/stories; this run read {commit},")
    assert f"dataset.revision={commit} " in said
    assert online["pinned"]["notes"] == []


def test_a_tokenizer_of_the_hub(online: dict[str, Any]) -> None:
    assert online["gpt2"]["train"] == TRAIN
    assert online["gpt2"]["vocab_size"] == 300


@pytest.mark.parametrize(
    ("case", "cause", "way_out"),
    [
        ("column", "has no column 'story', only 'text'", "dataset.text_column=NAME"),
        ("streamed column", "has no column 'story', only 'text'", "dataset.text_column=NAME"),
        ("split", "dataset.split=tran: owner/stories has no such split", "train, validation"),
        ("trained on", "the split 'train' of owner/stories is the training split", "dataset.validation=0.1"),
        ("config", "dataset.config=no: owner/stories needs another one", "Available: ['default']"),
        ("revision", "dataset.revision=no: owner/stories has no such revision", "null for the newest"),
        ("gated", "owner/gated is gated", "hf auth login"),
        ("missing", "owner/missing is not on the hub", "check the spelling"),
        ("null", "split train, row 51: 'text' should be text but is null", "on_bad_row=skip"),
    ],
)
def test_what_goes_wrong_is_a_sentence_with_a_way_out(
    online: dict[str, Any], case: str, cause: str, way_out: str
) -> None:
    message = online[case]["error"]
    assert cause in message
    assert way_out in message
    assert "\n" not in message


def test_without_a_hub_what_was_downloaded_is_used(online: dict[str, Any], home: Path, tmp_path: Path) -> None:
    """From the cache of `datasets` into an empty one of ours; quickly, and also where nobody says HF_HUB_OFFLINE."""
    absent = {"absent": {"dataset": {"repository": "owner/absent"}}}
    cases = {name: CASES[name] for name in ("stories", "gpt2")} | absent
    gone = {"HF_HOME": str(home), "HF_ENDPOINT": online["url"].rpartition(":")[0] + ":9"}  # nothing listens there
    for extra in ({"HF_HUB_OFFLINE": "1"}, {}):
        begin = time.monotonic()
        found = prepare(cases, tmp_path / f"cache {len(extra)}", gone | extra)
        assert time.monotonic() - begin < 30
        assert found["stories"] == online["stories"]
        assert found["gpt2"] == online["gpt2"]
        message = found["absent"]["error"]
        assert "owner/absent cannot be downloaded, since the hub cannot be reached" in message
        assert "dataset=text dataset.path=PATH" in message
    assert found["said"].count("cannot be reached: only what was downloaded before") == 1


def test_without_a_hub_what_was_prepared_is_used(
    online: dict[str, Any], home: Path, tmp_path: Path, commit: str
) -> None:
    """A stream leaves nothing in the cache of `datasets`; what it came to lies in ours."""
    gone = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    pinned = {"dataset": {"repository": "owner/stories", "subset_size": 9, "streaming": True, "revision": commit}}
    cases = {"stream": CASES["stream"], "pinned": pinned}
    found = prepare(cases, home / "cache", gone)
    assert found["stream"] == online["stream"]
    assert found["pinned"] == online["pinned"]
    assert f"using revision {commit}, which was prepared before" in found["said"]


def test_a_connection_that_breaks_off_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    dataset = {"repository": "owner/stories", "subset_size": 20}
    cases: dict[str, Any] = {"whole": {"dataset": dataset}, "streamed": {"dataset": dataset | {"streaming": True}}}
    with LoopbackHub(folder) as hub:
        hub.server.RequestHandlerClass = half_of_each_file(hub.server.RequestHandlerClass)
        found = prepare(cases, tmp_path / "cache", hub.environment(tmp_path / "home"), IMPATIENT + PREPARE)
    for case in cases:
        message = found[case]["error"]
        assert "owner/stories cannot be read: the hub answered, and then the connection to it broke off" in message
        assert "Give the command again" in message
        assert "cannot be reached" not in message
        assert "\n" not in message
    assert "resumes the download" in found["whole"]["error"]


def half_of_each_file(handler: Any) -> Any:
    class Half(handler):  # type: ignore[misc]
        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            if self.command == "GET" and "resolve" in self.path and status == 200:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            super()._send(status, headers, body)

    return Half


@pytest.mark.parametrize("address", ["foo", "https://", "http://[::1", "http://127.0.0.1:port"])
def test_an_endpoint_that_is_no_address(address: str) -> None:
    from manual_backprop.common.errors import InputError
    from manual_backprop.data.sources.hub import _hub_answers

    with pytest.raises(InputError, match=r"^HF_ENDPOINT=.*: this is not the address of a hub\. Give one") as caught:
        _hub_answers(address)
    assert f"HF_ENDPOINT={address}:" in str(caught.value)


def test_a_split_that_was_saved_alone_has_its_own_name(tmp_path: Path) -> None:
    import datasets

    from manual_backprop.common.errors import InputError
    from manual_backprop.config.schema import DatasetConfig
    from manual_backprop.data.sources.hub import SavedDataset

    def documents(**options: Any) -> int:
        return len(list(SavedDataset(str(tmp_path), DatasetConfig("saved", str(tmp_path), **options)).rows()))

    datasets.Dataset.from_dict({"text": TRAIN}, split="valid").save_to_disk(str(tmp_path))
    assert documents() == documents(split="train") == documents(split="valid") == 50
    with pytest.raises(InputError, match=r"dataset\.split=foo: .* has no such split, only valid\."):
        documents(split="foo")
    with pytest.raises(InputError, match=r"dataset\.validation=train: the split 'train' of .* is the training split"):
        documents(validation="train")
    with pytest.raises(InputError, match="is the training split"):
        documents(split="valid", validation="valid")


def test_a_saved_dataset_without_rows(tmp_path: Path) -> None:
    import datasets

    from manual_backprop.common.errors import InputError
    from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
    from manual_backprop.data.tokens.corpus import prepare_corpus

    some, none = (datasets.Dataset.from_dict({"text": texts}) for texts in (TRAIN, []))
    none.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": some, "validation": none}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        with pytest.raises(InputError, match=r"has no rows, and such a dataset cannot be loaded\. Save it again"):
            prepare_corpus(DatasetConfig("saved", str(tmp_path / name)), TokenizerConfig("byte"), tmp_path / "cache")


def test_a_test_file_that_was_trained_on_is_refused(tmp_path: Path) -> None:
    from manual_backprop.common.errors import InputError
    from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
    from manual_backprop.data.tokens.corpus import prepare_corpus
    from manual_backprop.data.tokens.test_split import open_test_split

    (tmp_path / "text.txt").write_text(" ".join(TRAIN))
    (tmp_path / "link.txt").symlink_to("text.txt")
    dataset = DatasetConfig("text", str(tmp_path / "text.txt"), test=str(tmp_path / "link.txt"))
    corpus = prepare_corpus(dataset, TokenizerConfig("byte"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"link\.txt: the model was trained on this text"):
        open_test_split(dataset, corpus, tmp_path / "cache")


def test_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    from manual_backprop.common.errors import InputError
    from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
    from manual_backprop.data.tokens.corpus import prepare_corpus

    train, test = (datasets.Dataset.from_dict({"text": texts}) for texts in (TRAIN, VALIDATION))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "saved"))
    train.save_to_disk(str(tmp_path / "one"))
    byte = TokenizerConfig("byte")
    corpus = prepare_corpus(DatasetConfig("saved", str(tmp_path / "saved")), byte, tmp_path / "cache")
    assert corpus.train_documents == 50
    assert corpus.validation_documents == 30
    assert corpus.notes == (f"{tmp_path / 'saved'} has no validation split: its test split is used for validation",)
    corpus = prepare_corpus(DatasetConfig("saved", str(tmp_path / "one")), byte, tmp_path / "cache")
    assert corpus.train_documents + corpus.validation_documents == 50
    with pytest.raises(InputError, match=r"text_column=NAME"):
        prepare_corpus(
            DatasetConfig("saved", str(tmp_path / "one"), text_column="story"), byte, tmp_path / "other cache"
        )
    (tmp_path / "no dataset").mkdir()
    (tmp_path / "no dataset/file").write_text("text")
    with pytest.raises(InputError, match="is not a dataset that can be loaded"):
        prepare_corpus(DatasetConfig("saved", str(tmp_path / "no dataset")), byte, tmp_path / "cache")
