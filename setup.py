"""What setup.cfg cannot say: the README as a package index shows it, where links to files of this repository lead nowhere."""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PICTURES = (".png", ".svg", ".gif", ".jpg")


def absolute(page: str, url: str, version: str) -> str:
    """A page with links to the repository, as it was at the version's tag, instead of relative ones; code stays as it is."""

    def link(found: "re.Match[str]") -> str:
        path = found.group(1)
        if path.startswith("#"):
            path = f"README.md{path}"
        kind = "raw" if path.endswith(PICTURES) else "blob"
        return f"]({url}/{kind}/v{version}/{path})"

    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", page, flags=re.DOTALL | re.MULTILINE)
    # Every other part is code; text in backticks that is a link's name is followed by its address in the next part.
    return "".join(part if i % 2 else re.sub(r"\]\((?!\w+:)([^)\s]+)\)", link, part) for i, part in enumerate(parts))


if __name__ == "__main__":
    config = configparser.ConfigParser()
    config.read(str(ROOT / "setup.cfg"), encoding="utf-8")
    package = (ROOT / "dacal_addon" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute(page, config["metadata"]["url"].rstrip("/"), version),
        long_description_content_type="text/markdown",
    )
