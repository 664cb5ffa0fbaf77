"""What the site needs beyond Markdown, as hooks of MkDocs.

Pages link to files of the repository that are no pages (recipes, results, tests) by relative paths, which work in a
checkout; on the site they lead to the repository, and one that does not exist fails the build. `llms.txt` lists the
pages for language models.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks")
_OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """`](../recipes/README.md)` leads to the repository."""
    root = Path(config.config_file_path).parent

    def to_repository(link: re.Match[str]) -> str:
        target = link[1]
        if not (root / target).exists():
            _LOG.warning("%s links to ../%s, which does not exist", page.file.src_uri, target)
        return f"{config.repo_url.rstrip('/')}/{'tree' if (root / target).is_dir() else 'blob'}/main/{target}"

    return _OUTSIDE.sub(to_repository, markdown)


def on_nav(nav: Any, *, config: Any, files: Any) -> None:
    """Write llms.txt: every page in the order of the navigation, with its first sentence."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    section = None
    for page in nav.pages:
        if (title := page.parent.title if page.parent else "Pages") != section:
            section = title
            lines += ["", f"## {section}", ""]
        text = Path(page.file.abs_src_path).read_text("utf-8")
        lines.append(f"- [{page.title or page.file.name}]({page.url}): {_first_sentence(text)}")
    target = Path(config.site_dir) / "llms.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    config["llms_txt"] = (target, "\n".join(lines) + "\n")


def on_post_build(*, config: Any) -> None:
    """After the site's folder has been emptied and filled."""
    target, text = config["llms_txt"]
    target.write_text(text, "utf-8")


def _first_sentence(markdown: str) -> str:
    """Of the first paragraph that is prose: no heading, code, table, picture or comment. Links become their text."""
    body = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    for paragraph in body.split("\n\n"):
        text = " ".join(paragraph.split())
        if text and text[0] not in "#|!<:":
            text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
            return re.split(r"(?<=[.:])\s", text)[0].rstrip(":")
    return ""
