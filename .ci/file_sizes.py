"""File-size report: fails on Python files too long to be read in one sitting."""

import subprocess
import sys
from pathlib import Path

LIMIT = 400
KERNEL_LIMIT = 600
SHOWN = 10


def limit_of(path: str) -> int:
    """The most lines that the file at ``path`` (relative to the checkout) may have."""
    return KERNEL_LIMIT if path.startswith("kernels/") else LIMIT


def python_files(root: Path) -> list[str]:
    """Python files that git tracks or would track, relative to ``root``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return [path for path in listing.stdout.splitlines() if (root / path).is_file()]


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    sizes = sorted(
        ((len((root / path).read_text("utf-8").splitlines()), path) for path in python_files(root)),
        reverse=True,
    )
    print(f"{len(sizes)} Python files, {sum(lines for lines, _ in sizes)} lines; the longest:")
    for lines, path in sizes[:SHOWN]:
        print(f"  {lines:5d}  {path}")
    too_long = [(lines, path) for lines, path in sizes if lines > limit_of(path)]
    for lines, path in too_long:
        print(f"too long: {path} has {lines} lines, at most {limit_of(path)} are allowed")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
