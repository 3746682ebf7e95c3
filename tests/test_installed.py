"""The package in fresh environments, as a wheel, from an sdist and as an editable install: builds without a warning,
works in any directory, with completion and with its types.

The environments see the libraries of the one that runs the tests, and nothing else of it: neither this project nor its
plugins. What installing the libraries takes is tried by .ci/run, with README.md's own command.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("conf", "experiments", "manual_backprop", "setup.cfg", "pyproject.toml", "README.md")
SMALL = ("model=tiny", "training=smoke", "training.max_steps=2", "training.sample_length=2", "device.threads=1")

# Of the environment; the last one makes setuptools warn that it compiles nothing.
NOT_OURS = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")

SLOW, NIGHTLY = pytest.mark.slow, pytest.mark.nightly  # all else runs in an editable install in .ci/run


def run(*command: str | Path, cwd: Path, code: int = 0, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout has; building writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(path, folder / name)
    return folder


def pip(*arguments: str | Path, cwd: Path) -> None:
    # Without isolation where the build's own requirement is here already: it need not be downloaded then.
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    run(sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", *isolation, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what `python -m build` makes: an sdist, and of that a wheel."""
    folder = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if find_spec("setuptools") else []
    done = run(sys.executable, "-m", "build", "--outdir", folder, *isolation, source, cwd=folder)
    assert re.findall(r".*(?:warning|deprecat).*", done.stdout + done.stderr, flags=re.IGNORECASE) == []
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param("wheel", marks=SLOW), *(pytest.param(n, marks=NIGHTLY) for n in ("editable", "sdist"))],
)
def scripts(
    request: pytest.FixtureRequest, source: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a fresh environment's commands."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    # A folder that a .pth file adds is searched for modules only: its own .pth files, as of an editable install,
    # are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if request.param == "sdist":
        target: list[str | Path] = [*request.getfixturevalue("built").glob("*.tar.gz")]
    else:
        target = [wheel] if request.param == "wheel" else ["--editable", source]
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed"),
        *(["--no-build-isolation"] if find_spec("setuptools") else []),
        *target,
        cwd=folder,
    )
    home = source if request.param == "editable" else packages
    found = run(python, "-c", "import manual_backprop; print(manual_backprop.__file__)", cwd=folder).stdout.strip()
    assert Path(found).is_relative_to(home)
    return folder / "bin"


@SLOW
def test_configs_and_experiments_travel_inside_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "experiments"):
        shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.yaml")}
        assert shipped
        assert {f"manual_backprop/{name}" for name in shipped} <= inside
    files = [path for path in (ROOT / "manual_backprop").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"manual_backprop/ops/linear.py", "manual_backprop/study/levels.md"} <= names
    assert names <= inside, "every subpackage is listed in setup.cfg, and what it has beside modules"
    assert not any(name.startswith(("tests/", "conf/", "experiments/", "outputs/")) for name in inside)


@SLOW
def test_the_metadata_says_what_it_is(wheel: Path) -> None:
    """And nothing that is not so: there is no page of the project, and no licence."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "manual-backprop"
    assert metadata["Summary"].startswith("A laboratory for backpropagation")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "# manual_backprop" in metadata.get_payload()
    low, high = sorted(map(int, re.findall(r"3\.(\d+)", metadata["Requires-Python"])))
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in range(low, high)]
    classifiers = metadata.get_all("Classifier", [])
    assert [one for one in classifiers if re.search(r":: 3\.\d", one)] == versions
    assert "Typing :: Typed" in classifiers
    assert not {"License", "License-Expression", "Project-URL", "Home-page"} & set(metadata.keys())


@NIGHTLY
def test_the_wheel_of_the_sdist_is_that_of_the_checkout(built: Path, wheel: Path) -> None:
    (of_the_sdist,) = built.glob("*.whl")
    with zipfile.ZipFile(of_the_sdist) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []


PROGRAM = """\
from pathlib import Path

import torch

from manual_backprop import CheckpointManager, CustomTransformer, CustomTransformerWrapper, Evaluator
from manual_backprop import EncoderWrapper, TrainingLogger, load_training_log
from manual_backprop.ops import linear_backward, linear_forward

model = CustomTransformerWrapper(vocab_size=16, d_model=16)
ids = torch.tensor([[1, 2, 3]])
result: dict[str, float | str] = model.train_step(ids, labels=ids, learning_rate=0.1)
loss: float = Evaluator(model, device="cpu").evaluate([{"input_ids": ids, "labels": ids}]).loss
TrainingLogger("run", config=model.config).log_step(1, {"train/loss": loss})
path: Path = CheckpointManager("checkpoints").save_checkpoint(model, metric=loss)
steps: list[int] = load_training_log("run").training["train/loss"].steps
y, cache = linear_forward(torch.ones(2, 3), torch.ones(4, 3))
dx: torch.Tensor = linear_backward(y, cache, torch.zeros(4, 3))
CustomTransformer(model.config).update_parameters(learning_rate=0.1)
EncoderWrapper(vocab_size=16, n_outputs=2).predict([[1, 2]]).argmax(-1)
"""
WRONG = {
    'model.train_step(ids, labels=ids, learning_rate="fast")': "arg-type",
    "Evaluator(model).evaluate(3)": "arg-type",
    "linear_forward(torch.ones(2, 3))": "call-arg",
    "CheckpointManager(1.5)": "arg-type",
    "loss.upper()": "attr-defined",
    "from manual_backprop import CustomTransfomer": "attr-defined",
}


@NIGHTLY
@pytest.mark.parametrize(
    "scripts", ["wheel", "sdist"], indirect=True
)  # mypy does not follow an editable install's hook
def test_a_program_of_a_user_is_checked_against_the_types(scripts: Path, tmp_path: Path) -> None:
    """What is right passes, strictly; each wrong line is an error of its kind."""
    (tmp_path / "program.py").write_text(PROGRAM + "\n".join(WRONG) + "\n")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", scripts / "python", "--no-error-summary")
    done = run(*mypy, "program.py", cwd=tmp_path, code=1, seconds=600)
    found = re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, flags=re.MULTILINE)
    first = PROGRAM.count("\n") + 1
    assert found == [(str(first + number), kind) for number, kind in enumerate(WRONG.values())], done.stdout


def test_the_commands_work_in_any_directory(scripts: Path, tmp_path: Path) -> None:
    page = run(scripts / "manual-backprop", "--help", cwd=tmp_path).stdout
    assert "model" in page
    assert "overfit_one_batch" in page
    planned = run(scripts / "manual-backprop", "plan=true", "model=tiny", "experiments=overfit_one_batch", cwd=tmp_path)
    assert "experiments=overfit_one_batch" in planned.stdout
    wrong = run(scripts / "manual-backprop", "modle=tiny", cwd=tmp_path, code=2)
    assert "did you mean model?" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    run(scripts / "python", "-m", "manual_backprop.explain", "--output", "page.md", cwd=tmp_path)  # of a file beside it


def test_a_run_and_a_sweep_write_where_the_command_is_started(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"the cat saw {n % 7} mice." for n in range(1000)))
    data = ("dataset=text", "dataset.path=text.txt", "tokenizer=byte")
    run(scripts / "manual-backprop", *SMALL, *data, cwd=tmp_path)
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 1
    assert (tmp_path / "mlflow.db").is_file()
    sweep = ("-m", *SMALL, *data, "tracking=none", "seed=1,2")
    run(scripts / "python", "-m", "manual_backprop.run", *sweep, cwd=tmp_path)
    assert len(list((tmp_path / "outputs" / "sweeps").iterdir())) == 1
    assert not (scripts.parent / "outputs").exists()


COMPLETE = """
PATH={scripts}:$PATH
eval "$(manual-backprop -sc install=bash)"
complete -p manual-backprop | grep -o -- '-F [a-z_]*' >&2
for line in "$@"; do
    words=($line)
    COMP_LINE=$line COMP_POINT=${{#line}} COMP_CWORD=$((${{#words[@]}} - 1)) COMPREPLY=()
    hydra_bash_completion
    echo "${{COMPREPLY[*]}}"
done
"""


def test_bash_completes_groups_options_and_keys(scripts: Path, tmp_path: Path) -> None:
    lines = ("model=", "model=s", "optimizer.lear", "-m seed=1 precision=fp32,bf1", "plan=", "train")
    asked = [f"manual-backprop {line}" for line in lines]
    done = run("bash", "-c", COMPLETE.format(scripts=scripts), "bash", *asked, cwd=tmp_path)
    assert [answer.split() for answer in done.stdout.splitlines()] == [
        ["model=gpt2", "model=medium", "model=small", "model=tiny"],
        ["model=small"],
        ["optimizer.learning_rate="],
        ["precision=fp32,bf16", "precision=fp32,bf16_mixed"],
        ["plan=true", "plan=false"],
        ["training=", "training."],
    ]
    assert list(tmp_path.iterdir()) == []
