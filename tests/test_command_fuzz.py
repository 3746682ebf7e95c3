"""Hundreds of right and wrong command lines: each gives a config, or a report that names the mistake."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_tools import refused

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.composition import Composer, composer
from manual_backprop.config.rules import Betas, Flag, FlagOrAuto, Number, Share, Tags, Text, Texts, Whole, Word, Words
from manual_backprop.config.schema import RunConfig, shipped_folder
from manual_backprop.config.validation import groups, keys
from manual_backprop.training.command_line import check_with


@pytest.fixture(scope="module")
def hydra() -> Iterator[Composer]:
    with composer() as opened:
        yield opened


CHOICES = [
    [],
    ["model=tiny"],
    ["model=medium", "architecture=vaswani"],
    ["optimizer=sgd", "tokenizer=byte"],
    ["schedule=linear", "precision=bf16_mixed", "training=smoke"],
]
VALUES = [
    ("model.n_blocks", ["1", "12", "3.0"]),
    ("model.dropout", ["0", "0.1", "1e-2"]),
    ("model.vocab_size", ["null", "50257", "1e5"]),
    ("optimizer.weight_decay", ["0", "0.01"]),
    ("schedule.warmup_ratio", ["0", "0.1"]),
    ("training.batch_size", ["1", "8", "64"]),
    ("training.eval_every", ["epoch", "7"]),
    ("training.eval_batches", ["null", "3"]),
    ("training.max_grad_norm", ["null", "0.5"]),
    ("training.sample_prompts", ["[]", "['a b','c']"]),
    ("seed", ["0", "4294967295"]),
    ("run_name", ["null", "'x y'", "abc"]),
    ("tags.note", ["x", "3", "'ü'"]),
    ("device.threads", ["null", "2"]),
]
NONSENSE = [
    "",
    "=",
    "==",
    "model",
    "~",
    "~x",
    "+",
    "++=",
    "model==tiny",
    "model.=1",
    ".model=1",
    "model..d_model=1",
    "tags.=1",
    "seed=[",
    "seed=]",
    "seed={",
    "seed='",
    'seed="',
    "seed=\\",
    "seed=$",
    "seed=${",
    "seed=${seed}",
    "seed=${hydra:x}",
    "seed=${oc.env:NO_SUCH_NAME}",
    "seed=\x00",
    "seed=\n",
    "seed=🙂",
    "ключ=1",
    "seed=1 2",
    "seed=(1)",
    "seed=int(x)",
    "seed=range(1)",
    "seed=sort(3,1)",
    "seed=1,2",
    "seed=" + "9" * 400,
    "x" * 3000 + "=1",
    "model=../tiny",
    "model=/etc/passwd",
    "model=tiny.yaml",
    "model=[tiny,small]",
    "experiments=[none]",
    "experiments=../conf/config",
    "model@=tiny",
    "model@a@b=c",
    "hydra",
    "hydra.=1",
    "hydra..x=1",
    "hydra.run=3",
    "hydra.job=null",
    "hydra.sweeper.params=3",
    "hydra.searchpath=x",
    "hydra.sweeper._target_=os.system",
    "hydra/=1",
    "hydra/job_logging=none,none",
    "-",
    "--",
    "---x=1",
    "-m=1",
    "tags=[1]",
    "tags={a:{b:1}}",
    "tags={1:2}",
    "tags=null",
    "optimizer={}",
    "training=null",
    "plan=1",
    "resume=''",
    "resume=[]",
    "training.sample_prompts=[[]]",
    "optimizer.betas=[a,b]",
    "optimizer.betas={}",
    "model.d_model=1e999",
    "model.d_model=-inf",
    "seed=true",
    "seed=null",
    "device=tpu",
    "device.name=cpu",
    "precision.name.x=1",
    "model.n_heads=0",
    "model.n_heads=7",
]


MANY = pytest.mark.parametrize(
    "many", [pytest.param(100, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.nightly)]
)


@MANY
def test_hundreds_of_right_command_lines(many: int, hydra: Composer) -> None:
    generator = random.Random(1)
    for _ in range(many):
        arguments = list(generator.choice(CHOICES))
        arguments += [f"{key}={generator.choice(values)}" for key, values in generator.sample(VALUES, 4)]
        generator.shuffle(arguments)
        (job,) = check_with(hydra, arguments).jobs
        assert isinstance(job.config, RunConfig)


# Values that no key of a kind takes.
WRONG_VALUES: dict[type, tuple[str, ...]] = {
    Whole: ("abc", "-1", "1.5", "[1]", "{a:1}", "true", "nan", "1e99", "'1 2'"),
    Number: ("abc", "-1", "[1]", "{a:1}", "true", "nan", "inf", "-inf"),
    Share: ("0", "1", "-0.5", "2", "true", "[0.1]", "{a:1}", "nan"),
    Word: ("nonsense", "3", "[a]", "''"),
    Flag: ("maybe", "1", "null", "[true]"),
    FlagOrAuto: ("maybe", "1", "null", "[true]"),
    Betas: ("0.9", "[0.9]", "[0.9,1.5]", "[a,b]", "null"),
    Words: ("nonsense", "3", "[a]", "{a:b}"),
    Texts: ("3", "abc", "['']", "{a:b}"),
    Text: ("[a]", "{a:b}", "''"),  # a number or a word of YAML's is text, as it was typed
}


def mistaken(generator: random.Random) -> tuple[list[str], str]:
    """A command line with one mistake, and the word that the report must have for it."""
    assert {type(field.metadata["rule"]) for field in keys().values()} <= {*WRONG_VALUES, Tags}, "a new kind of value"
    group_of = {key: key.partition(".")[0] for key in keys()}
    settable = [key for key in keys() if not key.endswith(".name") and key != "tags"]
    key = generator.choice(settable)
    metadata = keys()[key].metadata
    base = list(generator.choice(CHOICES)) if "." not in key else []
    if metadata["only_for"]:
        base = [f"{group_of[key]}={metadata['only_for'][0]}"]
    kind = generator.choice(["value", "value", "key", "option", "group", "plus", "tilde", "package", "hydra"])
    if kind == "value":
        value = generator.choice(WRONG_VALUES[type(metadata["rule"])])
        return [*base, f"{key}={value}"], key
    if kind == "key":
        misspelt = key[:-1] + generator.choice("qxz") + key[-1]
        return [*base, f"{misspelt}=1"], misspelt
    group = generator.choice(list(groups()))
    option = generator.choice(options_of(group))
    if kind == "option":
        return [f"{group}={option}qq"], group
    if kind == "group":
        return [f"{group}qq={option}"], f"{group}qq"
    if kind == "plus":
        return [*base, f"+{key}=1"], key
    if kind == "tilde":
        return [*base, f"~{key}"], key
    if kind == "package":
        return [f"{group}@{group}.x={option}"], group
    name = generator.choice(["verbose", "mode", "sweep.dir", "job.name"])
    return [f"hydra.{name}qq=1"], f"hydra.{name}qq"


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (shipped_folder("conf") / group).glob("*.yaml"))


@MANY
def test_hundreds_of_mistakes_are_named(
    many: int, hydra: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = random.Random(3)
    for _ in range(many):
        arguments, name = mistaken(generator)
        found = refused(hydra, arguments)
        assert any(name in violation for violation in found), (arguments, found)
        assert all(violation.isprintable() for violation in found)
    assert list(tmp_path.iterdir()) == []


@MANY
def test_hundreds_of_wrong_command_lines(
    many: int, hydra: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = random.Random(2)
    wrong = [[nonsense] for nonsense in NONSENSE]
    about_the_run = [nonsense for nonsense in NONSENSE if not nonsense.startswith("hydra")]  # the others take longer
    for _ in range(many // 2):
        key, values = generator.choice(VALUES)
        right = f"{key}={generator.choice(values)}"
        at = generator.randrange(len(right))
        flipped = right[:at] + generator.choice("=,[]{}'\"$~+@:. \\\u00fc\u2028") + right[at + 1 :]
        wrong.append([*generator.choice(CHOICES), flipped])  # may be right by chance
        wrong.append([*generator.choice(CHOICES), generator.choice(about_the_run), right])
    refusals = 0
    for arguments in wrong:
        try:
            check_with(hydra, arguments, multirun=len(arguments) % 2 == 0)
        except ConfigError as error:
            refusals += bool(error.violations)
            for violation in error.violations:
                assert violation.strip()
                assert violation.isprintable()
    assert refusals > 0.7 * len(wrong)
    assert list(tmp_path.iterdir()) == []
    assert [nonsense for nonsense in NONSENSE if not _refused(hydra, nonsense)] == []


def _refused(hydra: Composer, argument: str) -> bool:
    try:
        check_with(hydra, [argument])
    except ConfigError:
        return True
    return False
