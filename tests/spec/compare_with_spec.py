"""Does `requirements.py` leave out a MUST? Compares it with the specification's own source.

    git clone https://github.com/oasis-tcs/virtio-spec
    python tests/spec/compare_with_spec.py virtio-spec [REVISION]

The revision is virtio 1.3's unless given. Exit code 1 if a count differs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from requirements import SECTIONS

REVISION = "v1.3-wd02"
# A block ends where the next heading begins, of whatever kind.
BLOCK = re.compile(
    r"\\devicenormative\{[^}]*\}\{([^}]*)\}\s*\{[^}]*\}(.*?)"
    r"(?=\\(?:sub)*section\*?\{|\\(?:driver|device)normative|\\(?:sub)?paragraph\*?\{|\Z)",
    re.DOTALL,
)

Key = tuple[str, str]


def musts_in(source: str) -> Counter[str]:
    """Their number under each title."""
    source = re.sub(r"(?<!\\)%.*", "", source)  # comments
    found: Counter[str] = Counter()
    for title, text in BLOCK.findall(source):
        found[" ".join(title.split())] += len(re.findall(r"\b(?:MUST|SHALL)\b", text))
    return found


def main(repository: str, revision: str = REVISION) -> int:
    """Print each difference; the exit code."""
    ours: Counter[Key] = Counter()
    for section in SECTIONS:
        ours[section.file, section.title] += section.count
    theirs: Counter[Key] = Counter()
    for file in dict.fromkeys(section.file for section in SECTIONS):
        show = ["git", "-C", repository, "show", f"{revision}:{file}"]
        source = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        theirs.update({(file, title): count for title, count in musts_in(source).items()})
    for file, title in sorted(ours.keys() | theirs.keys()):
        count, listed = theirs[file, title], ours[file, title]
        if count != listed:
            print(f"{file}: {title}: {count} in the specification, {listed} in requirements.py")
    print(f"{sum(theirs.values())} in the specification, {sum(ours.values())} in requirements.py")
    return int(ours != theirs)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
