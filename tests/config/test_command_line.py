"""What the check of a command line says: every mistake with its way out, and every job of a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_tools import refused

from manual_backprop.config.composition import EXTRAS, Composer, composer, missing_extra
from manual_backprop.config.validation import validate
from manual_backprop.training.command_line import check_with


@pytest.fixture(scope="module")
def hydra() -> Iterator[Composer]:
    with composer() as opened:
        yield opened


REFUSED: list[tuple[str, str]] = [
    # what is given, what the only violation must say
    ("optimizer.lerning_rate=1e-3", "did you mean optimizer.learning_rate?"),
    ("model=smal", "did you mean small?"),
    ("modle=small", "did you mean model?"),
    ("lr=1e-3", "did you mean optimizer.learning_rate?"),
    ("model.n_layers=3", "did you mean model.n_blocks?"),
    ("experiment=overfit_one_batch", "did you mean experiments?"),
    ("experiments=overfit", "did you mean overfit_one_batch?"),
    ("hydra.verbos=true", "did you mean hydra.verbose?"),
    ("hydra/laucher=basic", "did you mean hydra/launcher?"),
    ("hydra/launcher=nowhere", "basic"),
    ("hydra.mode=FAST", "hydra.mode"),
    ("hydra=3", "hydra.verbose"),
    ("+foo=1", "no such key"),
    ("++foo=1", "no such key"),
    ("+model.d_model=64", "leave out the +"),
    ("+model=tiny", "leave out the +"),
    ("++model.d_model=3", "divisible by model.n_heads"),
    ("~model", "every run needs"),
    ("~model.d_model", "every run needs"),
    ("model@other=tiny", "model=tiny"),
    ("model=", "tiny, small, medium, gpt2"),
    ("model=null", "tiny, small, medium, gpt2"),
    ("model={d_model:3}", "tiny, small, medium, gpt2"),
    ("model.d_model=", "whole number"),
    ("model.d_model=abc", "whole number"),
    ("model.d_model=-3", "at least 1"),
    ("model/tiny=1", "did you mean model?"),
    ("optimizer.learning_rate=nan", "greater than 0"),
    ("optimizer.name=sgd", "optimizer=sgd"),
    ("optimizer.momentum=0.5", "optimizer=sgd"),
    ("tokenizer.vocab_size=100", "at least 257"),
    ("dataset=text", "dataset.path=PATH"),
    ("dataset.path=/somewhere", "dataset=text"),
    ("resume=/nowhere/at/all", "last"),
    ("model=tiny,small", "-m"),
    ("optimizer.betas=0.9,0.99", "[0.9,0.99]"),
    ("tiny", "did you mean model=tiny?"),
    ("plan", "did you mean plan=true?"),
    ("--plan", "did you mean plan=true?"),
    ("--model=tiny", "did you mean model=tiny?"),
    ("--experimental-rerun=x", "no such option"),
    ("", "KEY=VALUE"),
    ("=3", "KEY=VALUE"),
    ("run_name='", "cannot be read"),
    ("run_name=ünï", "\"run_name='ünï'\""),
    ("run_name=???", "run_name"),
    ("seed=${nowhere}", "nowhere"),
    ("seed=" + "[" * 200, "cannot be read"),
    ("tags={a@b:1}", "letters"),
    ("tags.a@b=1", "one place"),
    ("model@:foo=tiny", "model=tiny"),
    ("optimizer.=3", "is not a key; did you mean optimizer?"),
    ("ключ=1", "is not a key"),
    ("model.d_model.x=64", "did you mean model.d_model?"),
    ("run_name=${oc.env:HOME}", 'the shell fills in "$HOME"'),
    ("tags={note:'${oc.env:HOME}'}", "tags.note"),
    ("training.sample_prompts=['${now:%Y}']", "refer only to a key"),
    ("tags._target_=os.system", "_target_ is not supported"),
    ("+hydra.callbacks.x={_target_:os.system}", "_target_ is not supported"),
    ("hydra.sweeper.params={seed:'1,2'}", "-m seed=1,2,3"),
    ("+hydra.sweeper.params.seed='1,2'", "-m seed=1,2,3"),
    ("hydra.run.dir=/somewhere", "its own directory"),
    ("hydra.job.chdir=true", "its own directory"),
    ("hydra/launcher=basic", "add -m"),
    ("hydra.sweep.dir=/somewhere", "add -m"),
    ("hydra/job_logging=default", "one job obeys hydra.mode"),
    ("hydra.job.name=x", "one job obeys hydra.mode"),
    ("hydra.searchpath=[/somewhere]", "--config-dir DIR"),
    ("hydra.verbose=3", "names of loggers"),
    ("tags.note='???'", "tags.note"),
    ("tags.a.b=1", "tags"),
    ("seed.start=4", "did you mean seed?"),
    ("seed.compile=true", "did you mean seed?"),
    ("model.d_model.x=4", "did you mean model.d_model?"),
    ("task.name.x=4", "did you mean task?"),
    ("run=mine", "did you mean run_name?"),
    ("training.seeds=4", "did you mean seed?"),
    ("--dataset.name=text", "did you mean dataset=text?"),
    ("start=4", "manual_backprop.generate last --prompt TEXT"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[given[:40] for given, _ in REFUSED])
def test_a_wrong_override_is_one_violation_that_says_how_to_go_on(hydra: Composer, given: str, says: str) -> None:
    found = refused(hydra, [given])
    assert len(found) == 1, found
    assert says in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    "given",
    ["optimizer.fused=true", "fused=true", "kernels.fused=true", "optimizer.foreach=true", "model.start=4", "port=80"],
)
def test_nothing_is_hinted_at_where_nothing_is_near(hydra: Composer, given: str) -> None:
    assert refused(hydra, [given]) == [f"{given}: there is no such key"]
    assert refused(hydra, [f"--{given}"]) == [f"--{given}: there is no such option"]


ACCEPTED = [
    [],
    ["model=tiny", "training=smoke", "tracking=none"],
    ["training.max_steps=1e3"],
    ["++model.d_model=64"],
    ["optimizer=sgd", "optimizer.momentum=0.5"],
    ["training.max_steps=null", "training.num_epochs=0.5"],
    ["optimizer.betas=[0.8,0.9]"],
    ["tags.note=first", "+tags.other=2", "tags.third='a b'"],
    ["tags={note:first}"],
    ["run_name='ünï (1)'"],
    ["run_name=7"],
    ["resume=last"],
    ["hydra.verbose=true"],
    ["hydra.verbose=[mlflow,matplotlib]", "+hydra.job.env_set.NAME=value", "hydra.mode=RUN"],
    ["experiments=null"],
    ["model.d_ffn=${model.d_model}"],
    ["training.eval_every=epoch", "training.overfit_batches=1"],
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=" ".join)
def test_right_overrides_arrive(
    hydra: Composer, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no run to go on with
    (job,) = check_with(hydra, arguments).jobs
    assert validate(job.config.to_dict()) == job.config


def test_values_of_the_overrides_are_in_the_config(hydra: Composer) -> None:
    (job,) = check_with(hydra, ["model=tiny", "model.n_heads=4", "tags.note=7", "run_name=7", "seed=5"]).jobs
    assert (job.config.model.d_model, job.config.model.n_heads) == (64, 4)
    assert job.config.tags == {"note": "7"}
    assert (job.config.run_name, job.config.seed) == ("7", 5)


def test_everything_is_in_one_report(hydra: Composer) -> None:
    wrong = ["model=smal", "modle=tiny", "optimizer.lerning_rate=-1", "seed=x", "--fast", "+foo=1", "model.n_heads=3"]
    found = refused(hydra, wrong)
    for name in (
        "model=smal",
        "modle",
        "optimizer.lerning_rate",
        "optimizer.learning_rate=-1",
        "seed",
        "--fast",
        "+foo",
    ):
        assert any(violation.startswith(name) for violation in found), (name, found)
    assert any(violation.startswith("model.d_model=128") for violation in found)


def test_an_unknown_option_blames_nothing_else(hydra: Composer) -> None:
    assert len(refused(hydra, ["dataset=wikipedia", "dataset.path=/etc"])) == 1


def test_a_sweep_is_every_combination(hydra: Composer) -> None:
    checked = check_with(hydra, ["model=tiny,small", "seed=range(1,4)"], multirun=True)
    assert checked.multirun
    assert [(job.runtime.choices["model"], job.config.seed) for job in checked.jobs] == [
        (model, seed) for model in ("tiny", "small") for seed in (1, 2, 3)
    ]
    assert checked.jobs[0].overrides == ("model=tiny", "seed=1")


def test_a_sweep_is_checked_to_its_last_job(hydra: Composer) -> None:
    found = refused(hydra, ["model=tiny,small", "model.n_heads=2,3"], multirun=True)
    assert len(found) == 2
    assert "model.d_model=64" in found[0]
    assert "job 2 of 4" in found[0]
    assert "job 4 of 4" in found[1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("model=tiny,smal", "did you mean small?"),
        ("model=glob(x*)", "matches none"),
        ("seed=range(0,1000000000)", "1000000000 jobs"),
        ("seed=range(3,0)", "0 jobs"),
        ("seed=range(0,3,0)", "0 jobs"),
        ("seed=interval(0,3)", "has no end"),
        ("hydra.verbose=true,false", "one value"),
        ("hydra.mode=RUN", "leave one of the two out"),
    ],
)
def test_a_wrong_sweep_is_refused(hydra: Composer, given: str, says: str) -> None:
    (violation,) = refused(hydra, [given], multirun=True)
    assert says in violation


@pytest.mark.parametrize(("option", "extra"), sorted(EXTRAS.items()))
def test_a_plugin_that_is_not_installed_says_what_to_install(hydra: Composer, option: str, extra: str) -> None:
    """In Hydra's words it is a file that cannot be found; the fresh environments of test_installed.py have none."""
    said = missing_extra(f"In 'hydra/launcher/parallel': Could not find 'hydra/launcher/{option}'")
    assert said is not None
    assert said.endswith(f"pip install 'manual-backprop[{extra}]'")
    assert missing_extra("hydra/launcher=basic") is None


MEANT = [
    # what is typed, as other programs want it, and what is meant
    ("training.min_learning_rate=0", "schedule.min_learning_rate"),
    ("training.warmup_ratio=0.1", "schedule.warmup_ratio"),
    ("optimizer.warmup_ratio=0.1", "schedule.warmup_ratio"),
    ("training.lr=1e-3", "optimizer.learning_rate"),
    ("model.learning_rat=1e-3", "model.learning_rate"),
    ("training.dropout=0.1", "model.dropout"),
    ("training.seed=3", "seed"),
    ("training.optimizer=sgd", "optimizer"),
    ("data.dataset=tinystories", "dataset"),
    ("model.dtype=bf16", "precision"),
    ("dtype=bfloat16", "precision=bf16_mixed"),
    ("trainer.callbacks.early_stopping.patience=3", "training.patience"),
    ("warmup_iters=100", "schedule.warmup_steps"),
    ("--eval_only", "python -m manual_backprop.evaluate last"),
    ("lr=1e-3", "optimizer.learning_rate"),
    ("lr_decay=linear", "schedule"),
    ("epochs=3", "training.num_epochs"),
    ("batch_size=3", "training.batch_size"),
    ("bs=3", "training.batch_size"),
    ("warmup_steps=0", "schedule.warmup_steps"),
    ("dtype=bf16", "precision"),
    ("optim=adamw", "optimizer"),
    ("name=x", "run_name"),
    ("hidden_size=128", "model.d_model"),
    ("--epochs 20", "training.num_epochs=20"),
    ("--epochs=20", "training.num_epochs=20"),
    ("--lr 3e-4", "optimizer.learning_rate=3e-4"),
    ("--batch-size 8", "training.batch_size=8"),
    ("--seed -1", "seed=VALUE"),
    ("--warmup_steps 100", "schedule.warmup_steps=100"),
    ("--resume", "resume=VALUE"),
    ("--resume last", "resume=last"),
    ("--config overfit_one_batch.yaml", "experiments=overfit_one_batch"),
    ("--model-type gpt2", "architecture=gpt2"),
    ("--dtype float16", "precision=fp16_mixed"),
    ("--optim AdamW", "optimizer=adamw"),
    ("--bf16", "precision=bf16_mixed"),
    ("--gpu", "device=cuda"),
]


@pytest.mark.parametrize(("typed", "meant"), MEANT, ids=[typed for typed, _ in MEANT])
def test_what_is_typed_elsewhere_gets_the_right_name(hydra: Composer, typed: str, meant: str) -> None:
    (found,) = refused(hydra, typed.split())
    assert found.startswith(f"{typed}: ")
    assert found.endswith(f"; did you mean {meant}?")
