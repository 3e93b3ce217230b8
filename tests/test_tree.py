"""Facts about the checkout as a whole."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_TREE_BYTES = 40_000_000
TOP_LEVEL_FOLDERS = {".ci", "docs", "evals", "kernels", "llmopt", "recipes", "tests"}


def test_the_tree_is_small_enough_to_clone_in_a_moment() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 20
    assert sum(file.stat().st_size for file in files) < MAX_TREE_BYTES
    folders = {file.relative_to(ROOT).parts[0] for file in files if file.parent != ROOT}
    assert folders <= TOP_LEVEL_FOLDERS
