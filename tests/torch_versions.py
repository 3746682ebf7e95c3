"""Runs the tests of the kernels with every version of PyTorch that setup.cfg allows, each in its own environment.

    python tests/torch_versions.py [VERSION ...]      all, or some: 2.10

A version is available if pip finds a build for CPUs in its configured indexes (PIP_EXTRA_INDEX_URL for example): builds
for GPUs have gigabytes. Unavailable versions are named and skipped; with TORCH_VERSIONS=all they are an error.
CONTRIBUTING.md says when that is required.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("tests/kernels/test_compiled_kernels.py", "tests/kernels/test_kernels.py")
OF_A_GPU = ("nvidia-", "cuda-", "triton", "rocm")  # how names of packages begin that a build for GPUs needs


def allowed() -> list[str]:
    """The minor versions of setup.cfg's range, "2.10" and so on."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    first, end = re.search(r"torch >=2\.(\d+),<2\.(\d+)", config["options"]["install_requires"]).groups()
    return [f"2.{minor}" for minor in range(int(first), int(end))]


def why_not(version: str) -> str | None:
    """Why no build for CPUs is available, or None. pip reads the metadata of packages and downloads none."""
    words = ["install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", f"torch=={version}.*"]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=300)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
    names = [package["metadata"]["name"] for package in json.loads(done.stdout)["install"]]
    of_a_gpu = [name for name in names if name.startswith(OF_A_GPU)]
    return f"pip finds a build for GPUs, with {of_a_gpu[0]} and {len(of_a_gpu) - 1} more packages" if of_a_gpu else None


def passes(version: str, folder: Path) -> bool:
    """Whether the tests pass. The new environment has only its own PyTorch; everything else is from this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    words = ["install", "--quiet", "--no-deps", f"torch=={version}.*"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *words], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    given = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    is_there = f"import torch; assert torch.__version__.startswith('{version}.'), torch.__version__"
    if subprocess.run([python, "-c", is_there], env=given, cwd=ROOT).returncode:
        return False
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not nightly", *KERNELS]
    return subprocess.run(tests, env=given, cwd=ROOT).returncode == 0


def main(versions: list[str]) -> int:
    wanted = versions or allowed()
    if unknown := set(wanted) - set(allowed()):
        print(f"{', '.join(sorted(unknown))}: setup.cfg allows {', '.join(allowed())}")
        return 2
    failed, missing = [], []
    for version in wanted:
        start = time.monotonic()
        if (reason := why_not(version)) is not None:
            missing.append(version)
            print(f"PyTorch {version}: skipped, {reason}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            if not passes(version, Path(folder)):
                failed.append(version)
        word = "failed" if version in failed else "passed"
        print(f"PyTorch {version}: {word} in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(wanted) - len(failed) - len(missing)} passed, {len(failed)} failed, {len(missing)} skipped")
    return bool(failed or (missing and os.environ.get("TORCH_VERSIONS") == "all") or len(missing) == len(wanted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
