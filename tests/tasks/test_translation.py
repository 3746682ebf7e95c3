"""task=translation: its scores, its batches, and a run, from its first step to what is asked of it."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_tools import metric, newest, resume, same_process

from manual_backprop import convert, evaluate, generate
from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.batch import IGNORED
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.data.tokens.pair_corpus import PairSplit
from manual_backprop.served_model import _load_pyfunc
from manual_backprop.tasks.translation.rows import PairRows, TargetIds
from manual_backprop.tasks.translation.scores import chrf, scores_of
from manual_backprop.tracking.mlflow_model import write_model
from manual_backprop.training.command_line import check
from manual_backprop.training.plan import Planner
from manual_backprop.training.runner import run_job

SMALL = ("task=translation", "tokenizer=char", "task.shared_tokenizer=false", "model=tiny", "model.d_model=32")
SMALL += ("model.n_blocks=1", "model.d_ffn=64", "model.max_seq_len=12", "training=smoke", "training.batch_size=16")
SMALL += ("training.gradient_accumulation_steps=1", "training.eval_every=120", "training.save_every=60")
SMALL += ("training.log_every=20", "tracking=none", "device=cpu", "device.threads=1", "kernels.compile=never")
PAIRS = [(f"{a}{b} {b}{a}", f"<{b}{b}{a}>") for a in "abcdefgh" for b in "ijklmnopqrs"]


def train(root: Path, *overrides: str) -> Path:
    run_job(check([*SMALL, *overrides]).jobs[0].config, root)
    return newest(root)


# Scores


def corpora() -> dict[str, tuple[list[str], list[str]]]:
    generator = random.Random(1)
    words = ["das", "Haus", "\u65e5\u672c", "stra\u00dfe", "a", "l'\u00e9t\u00e9", "42,5", "x"]
    lines = [" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(30)]
    noisy = [line.replace("a", "o", 1)[: len(line) - index % 4] for index, line in enumerate(lines)]
    return {
        "the same": (lines, list(lines)),
        "nearly the same": (noisy, lines),
        "others": (generator.sample(lines, 30), lines),
        "short": (["a", "", "ab c"], ["a", "x", "abc"]),
        "nothing": (["", " "], ["a", "b"]),
        "no reference": (["abc"], [""]),
        "one letter too many": (["abcdefg", "xy"], ["abcdef", "x"]),
    }


@pytest.mark.parametrize("name", list(corpora()))
def test_chrf_is_that_of_sacrebleu(name: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    found, wanted = corpora()[name]
    assert chrf(found, wanted) == pytest.approx(sacrebleu.corpus_chrf(found, [wanted]).score, abs=1e-9)


def test_exact_match() -> None:
    scores = scores_of(["a", "b ", "c"], ["a", "b", "c"])
    assert (scores.exact_match, scores.texts) == (2 / 3, 3)
    assert scores_of([], []).exact_match == 0


# Batches


def split_of(sources: list[list[int]], targets: list[list[int]]) -> PairSplit:
    sides: list[Any] = []
    for rows in (sources, targets):
        sides += [np.concatenate([np.array(row, dtype=np.uint32) for row in rows]), np.cumsum([0, *map(len, rows)])]
    places = np.array([[0, row + 1] for row in range(len(sources))])
    return PairSplit(*sides, places, np.zeros(len(sources), dtype=np.int64), ("a.tsv, line",), ("",))


def config_of(own: int | None = None, length: int = 4) -> CustomTransformerConfig:
    return CustomTransformerConfig(
        vocab_size=9, max_seq_len=length, d_model=8, network="encoder_decoder", source_vocab_size=own
    )


@pytest.mark.parametrize("own", [None, 7])
def test_a_batch_of_pairs(own: int | None) -> None:
    """With V = 9: 6 padding, 7 beginning, 8 end. A source of its own vocabulary has no padding, and needs none."""
    rows = PairRows(split_of([[1, 2], [3]], [[4], [5, 1, 2]]), config_of(own), False, "train")
    assert rows.lengths.tolist() == [3, 5]
    batch = rows.batch(np.array([0, 1]), rows.target_lengths + 1, first_row=3)
    no, pad = IGNORED, 6 if own is None else 0
    assert (batch.source.tolist(), batch.source_lengths.tolist()) == ([[1, 2], [3, pad]], [2, 1])
    assert batch.tokens.tolist() == [[7, 4, 6, 6], [7, 5, 1, 2]]
    assert batch.targets.tolist() == [[4, 8, no, no], [5, 1, 2, 8]]
    assert batch.first_row == 3
    assert TargetIds.of(9).generated([1, 6, 2, 7, 8, 3]) == [1, 2]


def test_pairs_that_are_too_long() -> None:
    """A target has its beginning before it: one token fewer than max_seq_len."""
    split = split_of([[1] * 4, [1] * 5, [1], [2]], [[1], [1], [1] * 4, [1] * 3])
    with pytest.raises(InputError) as refused:
        PairRows(split, config_of(), False, "train")
    assert str(refused.value).startswith(
        "a.tsv, line 2: the source has 5 tokens, but the network reads at most 4 (2 of 4"
    )
    for words in ("Use model.max_seq_len=5", "dataset.on_bad_row=skip"):
        assert words in str(refused.value)
    rows = PairRows(split, config_of(), True, "train")
    assert (len(rows), rows.left_out, rows.sources(np.array([1]))) == (2, 2, [[2]])
    with pytest.raises(InputError, match="All 4 pairs for validation have a side that is longer"):
        PairRows(split_of([[1] * 9] * 4, [[1]] * 4), config_of(), True, "validation")


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("translation")
    (root / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    with same_process():
        return train(root, f"dataset.path='{root / 'pairs.tsv'}'", "training.max_steps=120", "dataset.validation=0.2")


@pytest.fixture
def copied(finished: Path, tmp_path: Path, here: None) -> Path:
    """That run in a folder of its own, with no data beside it; commands are given there."""
    shutil.copytree(finished.parents[1], tmp_path / "outputs", ignore=shutil.ignore_patterns("datasets"))
    return tmp_path / "outputs/runs" / finished.name


def test_it_learns_and_says_so(finished: Path) -> None:
    assert metric(finished, "validation/exact_match")[-1] > 0.8
    assert metric(finished, "validation/chrf")[-1] > 80
    log = (finished / "run.log").read_text()
    assert re.search(r"\d\d tokens \(char\) for sources, \d\d tokens \(char\) for targets", log)
    assert "copying the source: exact match 0.0%" in log
    assert "gradient check: passed" in log
    samples = (finished / "samples/step-000120.txt").read_text()
    assert "\u2713" in samples
    assert " -> <" in samples
    assert (finished / "cross_attention.png").read_bytes()[:4] == b"\x89PNG"
    saved = load_checkpoint(finished / "checkpoints/step-000120")
    assert saved.metric_name == "validation/chrf"
    assert {"tokenizer.json", "source_tokenizer.json"} <= {path.name for path in saved.path.iterdir()}
    network = saved.state["network"]
    tokens = [
        len(json.loads((saved.path / f"{side}tokenizer.json").read_text())["characters"]) for side in ("source_", "")
    ]
    assert [network["source_vocab_size"], network["vocab_size"] - 3] == tokens
    assert network["padding_token_id"] == network["vocab_size"] - 3


def test_it_goes_on_and_is_evaluated(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with same_process():
        root = finished.parents[2]
        exact = metric(finished, "validation/exact_match")[-1]
        resume(root, f"resume={finished.name}", "training.max_steps=125")
        evaluate.main([f"{finished.name}@120", "--predictions", "3"])
        printed = capsys.readouterr().out
        assert f"exact match  {exact:.2%} of the targets" in printed
        assert printed.count(" -> ") >= 3
        assert "Logged to the run as evaluation/validation_* at step 120" in printed
        evaluate.main([finished.name, "--split", "train", "--max-batches", "1"])
        assert "train: 16 pairs of" in capsys.readouterr().out
        (tmp_path / "t.tsv").write_text("ai ia\t<iia>\n")
        evaluate.main([finished.name, "--split", "test", "--test", str(tmp_path / "t.tsv")])
        assert "test: 1 pairs" in capsys.readouterr().out
        for text, words in (("ai ia\t<iia>\nai\n", "line 2: "), (f"{'ai ' * 99}\tia\n", "the source has ")):
            (tmp_path / "bad.tsv").write_text(text)
            with pytest.raises(InputError, match=rf"bad\.tsv.*{words}.* give the result as --test") as refused:
                evaluate.main([finished.name, "--split", "test", "--test", str(tmp_path / "bad.tsv")])
            assert not re.search("on_bad_row|max_seq_len", str(refused.value)), "evaluate takes no keys"
        (root / "pairs.tsv").write_text("ai ia\t<iia>\n" * 30 + "".join(f"{s}\t{t}\n" for s, t in PAIRS))
        with pytest.raises(
            ConfigError, match="dataset: the pairs, or the name of a file with them, have changed; bring back"
        ):
            resume(root, f"resume={finished.name}", "training.max_steps=130")


def test_it_is_asked_where_the_data_is_gone(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for options in ([], ["--beams", "3"], ["--temperature", "0.5", "--seed", "1"]):
        generate.main([str(copied), "--source", "ai ia", *options])
        found.append(capsys.readouterr().out.splitlines()[1])
    assert found[:2] == ["<iia>", "<iia>"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ai ia\nbj jb\n")))
    generate.main([str(copied), "--source", "-"])
    assert capsys.readouterr().out.splitlines()[1:] == ["<iia>", "<jjb>"]
    for text, said in (
        (" ", "an empty source"),
        ("ai ia" * 9, "a source of 45 tokens: this model reads at most 12"),
        ("\u00e4", "The character '\u00e4'"),
    ):
        with pytest.raises(InputError, match=said):
            generate.main([str(copied), "--source", text])
    for given, said in ((b"ai ia\n\nbj jb\n", "stdin, line 2: an empty source"), (b"", "nothing came in on stdin")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with pytest.raises(InputError, match=said):
            generate.main([str(copied), "--source", "-"])
    with pytest.raises(InputError, match=r"does not continue texts: .* --source"):
        generate.main([str(copied), "--prompt", "ai"])
    with pytest.raises(InputError, match="network=encoder_decoder cannot be exported"):
        convert.main(["to-hf", str(copied), "exported"])


def test_it_is_served(copied: Path, tmp_path: Path) -> None:
    """As MLflow does it, from a folder that has no optimizer's state and no run around it."""
    checkpoint = copied / "checkpoints/step-000120"
    write_model(tmp_path / "model", checkpoint, "run", "m-1")
    described = json.loads((tmp_path / "model/MLmodel").read_text())
    signature = {name: json.loads(text) for name, text in described["signature"].items()}
    assert signature["inputs"] == signature["outputs"] == [{"type": "string", "required": True}]
    assert [parameter["name"] for parameter in signature["params"]] == ["max_length", "beams", "length_penalty"]
    assert not list((tmp_path / "model").rglob("optimizer*"))
    served = _load_pyfunc(str(tmp_path / "model" / checkpoint.name))
    assert served.predict(["ai ia", "bj jb"], {"beams": 2}) == ["<iia>", "<jjb>"]
    assert served.predict("ai ia", {"max_length": 2}) == ["<i"]
    with pytest.raises(InputError, match="there is no parameter 'beam'"):
        served.predict(["ai ia"], {"beam": 2})


def test_a_plan_knows_the_pairs(tmp_path: Path, here: None) -> None:
    """Also before they are prepared; nothing is written."""
    (tmp_path / "p.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    plan = Planner()._preview(check([*SMALL, "dataset.path=p.tsv"]).jobs[0].config)
    assert plan.examples[0] == "pairs"
    assert plan.network_config.source_vocab_size is not None
    assert plan.steps_per_epoch == plan.order.steps(1)  # type: ignore[union-attr]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset=text"], ["dataset=text: task=translation learns from pairs, dates, postfix; use dataset=pairs"]),
        (["tokenizer=none"], ["tokenizer=none: task=translation reads texts; use tokenizer=bpe"]),
        (["network=decoder"], ["network=decoder: task=translation needs network=encoder_decoder"]),
        (["batching=packed"], ["batching=packed: task=translation never packs several examples"]),
        (["task=language_model"], ["dataset=pairs: task=language_model learns from .* or use task=translation"]),
        (["dataset.path=gone.tsv"], [r"dataset\.path=gone\.tsv: there is no such file or folder"]),
        (["dataset.path=a/b"], [r"a dataset of the hub needs dataset\.format=hub"]),
        (["dataset.format=csv"], [r"dataset\.format=csv: dataset=pairs supports tsv, jsonl"]),
        (["dataset.target_column=source"], [r"dataset\.target_column=source: is the column of the sources"]),
        (["dataset.max_length=9"], [r"dataset\.max_length=9: pairs are never cut"]),
        (["dataset.split=train2"], [r"only dataset\.format=saved or hub has splits"]),
        (["dataset.validation=gone"], [r"dataset\.validation=gone: there is no such file"]),
        (
            ["tokenizer=file", "tokenizer.path=.", "tokenizer.source_path=.", "task.shared_tokenizer=true"],
            [r"tokenizer\.source_path=\.: is for the sources' own tokenizer; add task\.shared_tokenizer=false"],
        ),
        (["init_from=last"], ["init_from"]),
    ],
)
def test_what_does_not_go_together(overrides: list[str], said: list[str], tmp_path: Path, here: None) -> None:
    (tmp_path / "p.tsv").write_text("a\tb\n")
    chosen = {override.partition("=")[0] for override in overrides}
    usual = [one for one in (*SMALL, "dataset=pairs", "dataset.path=p.tsv") if one.partition("=")[0] not in chosen]
    with pytest.raises(ConfigError) as refused:
        check([*usual, *overrides])
    for words in said:
        assert refused.match(words)


def test_a_vocabulary_that_is_too_small(tmp_path: Path, here: None) -> None:
    (tmp_path / "p.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=9: the targets' tokenizer has \d+ tokens, and padding"):
        run_job(check([*SMALL, "dataset.path=p.tsv", "model.vocab_size=9"]).jobs[0].config, tmp_path)
