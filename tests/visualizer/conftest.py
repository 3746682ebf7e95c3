"""Some runs for the tests of the visualizer."""

from pathlib import Path

import pytest
from logged_runs import write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("visualizer")
    for number, name in enumerate(["first", "same", "same", "<script>alert('$x$')</script>", "last"]):
        path = write_run(root, name, losses=[5.0 - number] * 3, validation={15: 6.0 - number, 30: 5.5 - number})
        (path / "samples" / "step-000015.txt").write_text(f"a {number}\n\n----\n\nb\n")
        (path / "loss_curves.png").write_bytes(b"\x89PNG\r\n")
        (path / "link.png").symlink_to("/etc/hostname")
    (path / "samples" / "step-000030.txt").write_text("late\n")
    return root
