"""A hook of mkdocs: source files that the pages link to become files of the site, as plain text."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r"\]\(\.\./([^)#]+)[^)]*\)")  # from docs/ to elsewhere in the repository


def on_files(files, config):
    """Adds what is linked; what is not there is left for `--strict` to tell."""
    names = {n for page in files.documentation_pages() for n in LINK.findall(page.content_string)}
    for name in sorted(names):
        if (ROOT / name).is_file():
            place = File.generated(config, _place(name), abs_src_path=str(ROOT / name))
            files.append(place)
    return files


def on_page_markdown(markdown, page, config, files):
    """Points the links at them."""

    def link(found):
        there = files.get_file_from_path(_place(found[1]))
        return f"]({there.src_uri})" if there else found[0]

    return LINK.sub(link, markdown)


def _place(name):
    return f"source/{name}.txt"
